//! Which protocols and media types each client spoke, by the record: a client that fell back to others would pass every other test. And what
//! each copied.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest as _, Sha256};
use weir_common::event::{Channel, Event, Header, Kind};

/// By program: what its requests were upgraded to, what they sent objects in, what they got them in.
type Spoken = BTreeMap<String, BTreeSet<String>>;

/// Resources of which each client writes and reads objects.
const OBJECTS: [&str; 2] = ["configmaps", "secrets"];

fn value<'a>(headers: &'a [Header], name: &str) -> Option<&'a str> {
    headers.iter().find(|header| header.name == name).map(|header| header.value.as_str())
}

/// A media type without its parameters.
fn media_type(value: &str) -> &str {
    value.split(';').next().unwrap_or_default().trim()
}

/// What is run at a path; both kubectl have the same name, and one of them is unpacked from a package.
fn program(executable: &str) -> String {
    let name = executable.rsplit('/').next().unwrap_or_default();
    let old = if executable.ends_with("/usr/bin/kubectl") { "-old" } else { "" };
    format!("{name}{old}")
}

fn spoken(events: &[Event]) -> Spoken {
    let mut executables = BTreeMap::new();
    let mut requests = BTreeMap::new();
    let mut spoken = Spoken::new();
    for event in events {
        let (Some(invocation), request) = (event.invocation.as_deref(), event.request.as_deref()) else {
            continue;
        };
        match &event.kind {
            Kind::InvocationStarted { process, .. } => {
                executables.insert(invocation, program(&process.executable));
            }
            Kind::RequestOpened(opened) => {
                let said =
                    spoken.entry(executables.get(invocation).cloned().unwrap_or_default()).or_default();
                requests.insert(request, &**opened);
                if value(&opened.headers, "accept").is_some_and(|accept| accept.contains("as=Table")) {
                    said.insert("asks for tables".to_owned());
                }
                let is_object = OBJECTS.contains(&&*opened.attributes.resource);
                if let Some(sent) =
                    value(&opened.headers, "content-type").filter(|_| is_object && opened.body.is_some())
                {
                    said.insert(format!("sends {}", media_type(sent)));
                }
            }
            Kind::ResponseStarted { status, headers } => {
                let Some(opened) = requests.get(&request) else { continue };
                let said =
                    spoken.entry(executables.get(invocation).cloned().unwrap_or_default()).or_default();
                let attributes = &opened.attributes;
                if *status == 101 {
                    let protocol = value(headers, "sec-websocket-protocol")
                        .or(value(headers, "x-stream-protocol-version"));
                    let upgrade = opened.upgrade.as_deref().unwrap_or_default();
                    let what = if attributes.subresource.is_empty() {
                        &attributes.verb
                    } else {
                        &attributes.subresource
                    };
                    said.insert(format!("{what}: {upgrade} {}", protocol.unwrap_or_default()));
                } else if *status == 200 && OBJECTS.contains(&&*attributes.resource) {
                    let got = media_type(value(headers, "content-type").unwrap_or_default());
                    said.insert(format!("gets {got}"));
                }
            }
            _ => {}
        }
    }
    spoken
}

const WEBSOCKET_V5: [&str; 2] = ["attach: websocket v5.channel.k8s.io", "exec: websocket v5.channel.k8s.io"];
const WEBSOCKET_V4: [&str; 2] = ["attach: websocket v4.channel.k8s.io", "exec: websocket v4.channel.k8s.io"];
const PATCHES: [&str; 4] = [
    "sends application/apply-patch+yaml",
    "sends application/json-patch+json",
    "sends application/merge-patch+json",
    "sends application/strategic-merge-patch+json",
];
const JSON: [&str; 2] = ["gets application/json", "sends application/json"];
const PROTOBUF: [&str; 2] =
    ["gets application/vnd.kubernetes.protobuf", "sends application/vnd.kubernetes.protobuf"];
const PORTS_V4: &str = "portforward: websocket v4.channel.k8s.io";
const PORTS_TUNNELLED: &str = "portforward: websocket SPDY/3.1+portforward.k8s.io";

/// All that each client speaks; `docs/clients.md` names the most of it. Nobody else asks anything in the pod: what is asked through
/// `kubectl proxy` is kubectl's, and what runs for a client without being one (its shell, Python as a terminal) talks to no server.
#[track_caller]
pub(super) fn each_spoke_as_expected(events: &[Event]) {
    let mut spoken = spoken(events);
    let mut check = |program: &str, expected: &[&[&str]]| {
        // Python's name has its version.
        let name = spoken.keys().find(|name| name.starts_with(program)).expect(program).clone();
        let said = spoken.remove(&name).unwrap_or_default();
        let expected: BTreeSet<_> = expected.concat().into_iter().map(str::to_owned).collect();
        assert_eq!(said, expected, "{name}");
    };
    let spdy = "exec: SPDY/3.1 v4.channel.k8s.io";
    check("client-go", &[&WEBSOCKET_V5, &[spdy, PORTS_TUNNELLED], &PROTOBUF, &PATCHES]);
    check("python", &[&WEBSOCKET_V5, &[PORTS_V4], &JSON, &PATCHES]);
    check("node", &[&WEBSOCKET_V5, &[PORTS_V4], &JSON, &PATCHES]);
    check("java", &[&WEBSOCKET_V4, &[PORTS_V4, "watch: websocket "], &JSON, &PATCHES]);
    check("helm", &[&JSON, &PROTOBUF, &[PATCHES[3]]]);
    let old = [
        "attach: SPDY/3.1 v4.channel.k8s.io",
        spdy,
        "portforward: SPDY/3.1 portforward.k8s.io",
        "asks for tables",
    ];
    check("kubectl-old", &[&old, &JSON, &PATCHES]);
    check("kubectl", &[&WEBSOCKET_V5, &[PORTS_TUNNELLED, "asks for tables"], &JSON, &PROTOBUF, &PATCHES]);
    assert!(spoken.is_empty(), "others asked as well: {spoken:?}");
}

/// What another program asked through `kubectl proxy` is of kubectl's invocation.
#[track_caller]
pub(super) fn proxied_is_of_kubectl(events: &[Event], namespace: &str) {
    for name in ["kubectl", "kubectl-old"] {
        let uri = format!("/api/v1/namespaces/{namespace}/configmaps/{name}-4");
        let is_it = |event: &&Event| {
            matches!(&event.kind, Kind::RequestOpened(opened) if opened.uri == uri
                && value(&opened.headers, "user-agent").is_some_and(|agent| agent.starts_with("Wget")))
        };
        let found: Vec<_> = events.iter().filter(is_it).collect();
        let [asked] = found[..] else { panic!("{} requests for {uri}", found.len()) };
        let process = events.iter().find_map(|event| match &event.kind {
            Kind::InvocationStarted { process, .. } if event.invocation == asked.invocation => Some(process),
            _ => None,
        });
        let process = process.expect("its process");
        assert!(process.executable.ends_with("/kubectl"), "{process:?}");
        assert!(process.argv.iter().any(|word| word == "proxy"), "{process:?}");
    }
}

/// Each file that a client copied as an archive, with its size and SHA-256.
#[track_caller]
pub(super) fn copies_are_on_record(events: &[Event], by_kubectl: usize) {
    let containers: BTreeMap<_, _> = events
        .iter()
        .filter_map(|event| match &event.kind {
            Kind::RequestOpened(opened) => {
                Some((event.request.as_deref()?, opened.execution.as_ref()?.container.as_deref()?))
            }
            _ => None,
        })
        .collect();
    let (written, read) = (Channel::Stdin, Channel::Stdout);
    for (name, channel, path, bytes) in [
        ("kubectl", written, "kubectl-file", by_kubectl),
        ("kubectl", read, "tmp/kubectl-file", by_kubectl),
        ("kubectl-old", written, "kubectl-old-file", by_kubectl),
        ("kubectl-old", read, "tmp/kubectl-old-file", by_kubectl),
        ("node", written, "node.txt", 160_000),
        ("java", written, "java.txt", 160_000),
    ] {
        let of = |event: &Event| event.request.as_deref().and_then(|id| containers.get(id)) == Some(&name);
        let copied = events.iter().filter(|event| of(event)).filter_map(|event| match &event.kind {
            Kind::FileCopied(file) if file.channel == channel => Some(file),
            _ => None,
        });
        let copied: Vec<_> = copied.collect();
        let [file] = copied[..] else { panic!("{name} copies one file: {copied:?}") };
        let content = &b"0123456789abcde\n".repeat(bytes / 16 + 1)[..bytes];
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(content)));
        assert_eq!((file.path.as_str(), file.bytes), (path, bytes as u64), "{name}");
        assert_eq!((file.digest.as_ref(), file.passed_bytes), (Some(&digest), None), "{name}");
    }
}
