//! Clients that nobody here wrote, each of which does everything once, in a pod that is enrolled and in one that is not: they
//! must not notice. What they did is then looked for in three witnesses that must agree: the record, the API server's own
//! audit log, and the objects that the server holds.
//!
//! What each does is in `tests/testbed/clients`; it prints nothing that differs from run to run.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use weir_common::{
    attributes::Execution,
    event::{Channel, Connection, Event, Kind, Outcome},
};
use weir_tests::{
    Clients, Coverage, Pod, PodSpec, Testbed, agent::TrustSource, audit, progress::Progress, wait_until,
};

use super::{
    DEADLINE, Scene, shown,
    spoken::{copies_are_on_record, each_spoke_as_expected, proxied_is_of_kubectl},
    target, verify,
    watched::{Watched, told},
};

/// The clients, each with the port of its container of the target.
const CLIENTS: [(&str, u16); 7] = [
    ("python", 7001),
    ("node", 7002),
    ("go", 7003),
    (KUBECTL, 7004),
    ("kubectl-old", 7005),
    (HELM, 7006),
    (JAVA, 7007),
];
/// And how the older one's name begins.
const KUBECTL: &str = "kubectl";
/// It has no streams, and labels nothing.
const HELM: &str = "helm";
const JAVA: &str = "java";
/// The pods that are enrolled, and those that are not.
const NAMESPACES: [(&str, bool); 2] = [("it-clients", true), ("it-clients-free", false)];
/// Bytes that go through an exec each way; with `WEIR_TEST_LONG` more, but through the Java client, whose connection ended once within 4 MiB on a busy
/// machine without Weir. The last line has no end.
const BYTES: usize = 256 * 1024 + 7;
const BYTES_LONG: usize = 64 * 1024 * 1024 + 7;
/// How long a forwarded port lies idle with `WEIR_TEST_LONG`: longer than the minute after which proxies cut it.
const IDLE_SECONDS_LONG: &str = "70";
/// A client that takes longer is ended, and the test fails.
const CLIENT_SECONDS_MAX: &str = "900";
/// Bytes of gzip in base64, and of that in base64 again, as a release of Helm's is stored and sent.
const GZIP: [&str; 2] = ["H4sIAAAA", "SDRzSUFBQUE"];

/// By client: exit code, output, errors.
type Said = BTreeMap<&'static str, (Option<i32>, String, String)>;

fn is_long() -> bool {
    std::env::var_os("WEIR_TEST_LONG").is_some()
}

fn clients() -> impl Iterator<Item = (&'static str, u16)> {
    CLIENTS.into_iter()
}

fn bytes(client: &str) -> usize {
    if is_long() && client != JAVA { BYTES_LONG } else { BYTES }
}

/// A pod with a container for each client, which talks to whoever attaches and echoes what comes to its port.
pub(super) fn run_target(testbed: &Testbed, namespace: &str, clients: &[(&str, u16)]) {
    let container = |&(name, port): &(&str, u16)| {
        let script = format!(
            "(while :; do nc -l -p {port} -e cat; done) & \
             echo begins; while read line; do echo \"got $line\"; [ \"$line\" = quit ] && break; done; echo ends"
        );
        target::container(name, false, &script)
    };
    target::run(testbed, namespace, &clients.iter().map(container).collect::<Vec<_>>());
}

/// What a client's command line is.
fn command(clients: &Clients, java: &[String], namespace: &str, (name, port): (&str, u16)) -> Vec<String> {
    let (port, bytes) = (port.to_string(), bytes(name).to_string());
    let source = Clients::source;
    let program = match name {
        "python" => vec![clients.python.clone(), source("client.py")],
        "node" => vec![
            "env".to_owned(),
            format!("NODE_PACKAGES={}", clients.node_packages),
            clients.node.clone(),
            source("client.mjs"),
        ],
        "go" => vec![Clients::binary("client-go")],
        JAVA => java.to_vec(),
        HELM => vec!["sh".to_owned(), source("helm.sh"), Clients::binary("helm")],
        _ => {
            let kubectl = if name == "kubectl" { "/bin/kubectl" } else { &clients.old_kubectl };
            vec!["sh".to_owned(), source("kubectl.sh"), kubectl.to_owned()]
        }
    };
    let idle = format!("IDLE={}", if is_long() { IDLE_SECONDS_LONG } else { "0" });
    let program = ["env".to_owned(), idle].into_iter().chain(program);
    let own = [namespace.to_owned(), name.to_owned(), port, bytes, clients.python.clone()];
    program.chain(own).collect()
}

/// What every client says in a pod, as far as it does not name the namespace.
fn said_by_all(programs: &Clients, java: &[String], pod: &Pod<'_>) -> Said {
    let said = |client: (&'static str, u16)| {
        let command = command(programs, java, &pod.namespace, client);
        let words = ["timeout", CLIENT_SECONDS_MAX].into_iter();
        let words: Vec<&str> = words.chain(command.iter().map(String::as_str)).collect();
        let (code, out, err) = shown(&pod.exec(&words).unwrap());
        let neutral = |text: String| text.replace(&pod.namespace, "NAMESPACE");
        (client.0, (code, neutral(out), neutral(err)))
    };
    thread::scope(|scope| {
        let running: Vec<_> = clients().map(|client| scope.spawn(move || said(client))).collect();
        running.into_iter().map(|client| client.join().unwrap()).collect()
    })
}

/// What each must have come to, so that nothing is the same because it failed in both places.
#[track_caller]
fn all_was_done(said: &Said) {
    let kubectl = [
        "same",
        "True True exit 5",
        "exit 3",
        "exit 4",
        "quoted: 1 1",
        "visible-kubectl-4",
        "idle: exit 0\nbefore\nafter\n",
    ];
    let expected: [(&str, &[&str]); 7] = [
        (
            "python",
            &["bytes in: [true", "bytes out: [true", "[true, true, 5]", "logs -f: ", "port-forward: "],
        ),
        (
            "node",
            &["bytes in: [true", "bytes out: [true", "[true,true,5]", "logs -f: ", "cp: ", "port-forward: "],
        ),
        ("go", &["bytes in: [true", "bytes out: [true", "[true,true,5]", "logs -f: ", "port-forward: "]),
        ("kubectl", &[&kubectl[..], &["debugged through"]].concat()),
        ("kubectl-old", &[&kubectl[..5], &kubectl[6..], &["visible-kubectl-old-4"]].concat()),
        (
            JAVA,
            &[
                "bytes in: true",
                "bytes out: true",
                "true true 5",
                "cp there: true",
                "cp back: true",
                "logs -f: ",
            ],
        ),
        (HELM, &["STATUS: deployed", "Rollback was a success", "release \"helm\" uninstalled"]),
    ];
    for (name, expected) in expected.into_iter().filter(|(name, _)| said.contains_key(name)) {
        for text in expected {
            assert!(said[name].1.contains(text), "{name} does not say {text:?}");
        }
        let ping = format!("ping-{name}");
        assert!(name == HELM || said[name].1.contains(&ping), "{name} does not say {ping}");
    }
}

/// What is on record of each request.
#[derive(Default)]
struct Request {
    verb: String,
    uri: String,
    /// Whether it says that it is `kubectl cp`, which others take for a reason not to record.
    says_cp: bool,
    /// What an exec runs, or attach reaches.
    execution: Execution,
    lanes: BTreeMap<(Channel, Option<Connection>), Vec<u8>>,
    exit_code: Option<i32>,
    outcome: Option<Outcome>,
}

fn requests(events: &[Event]) -> BTreeMap<String, Request> {
    let mut requests = BTreeMap::<String, Request>::new();
    for event in events {
        let Some(id) = &event.request else { continue };
        let request = requests.entry(id.clone()).or_default();
        match &event.kind {
            Kind::RequestOpened(opened) => {
                request.verb.clone_from(&opened.attributes.verb);
                request.uri.clone_from(&opened.uri);
                request.says_cp = opened.headers.iter().any(|header| header.name == "kubectl-command");
                request.execution = opened.execution.as_deref().cloned().unwrap_or_default();
            }
            Kind::Content(content) => {
                let lane = request.lanes.entry((content.channel, content.connection)).or_default();
                lane.extend(content.bytes.to_vec().unwrap());
            }
            Kind::RequestClosed(closed) => {
                request.exit_code = closed.exit_code;
                request.outcome = Some(closed.outcome);
            }
            _ => {}
        }
    }
    requests
}

#[test]
fn no_client_notices_weir_and_the_record_is_all_that_they_did() {
    let Some(mut scene) = Scene::new() else { return };
    let mut programs = Clients::install(Progress::Shown).unwrap();
    let java = programs.install_java(Progress::Shown).unwrap();
    for (namespace, enrolled) in NAMESPACES {
        scene.namespace(namespace, enrolled);
    }
    let pods = thread::scope(|scope| {
        let run = |namespace| {
            run_target(&scene.testbed, namespace, &CLIENTS);
            let spec = PodSpec { folders: programs.folders(), ..PodSpec::idle(namespace, "caller") };
            scene.testbed.run_pod(&spec).unwrap()
        };
        let pods = NAMESPACES.map(|(namespace, _)| scope.spawn(move || run(namespace)));
        pods.map(|pod| pod.join().unwrap())
    });
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let said = thread::scope(|scope| {
        let said = pods.each_ref().map(|pod| scope.spawn(|| said_by_all(&programs, &java, pod)));
        said.map(|said| said.join().unwrap())
    });
    let [with, without] = &said;
    for (name, (code, out, err)) in with {
        println!("== {name}: {code:?}\n{out}{err}");
    }
    for (name, (code, out, err)) in with {
        assert_eq!(*code, Some(0), "{name}: {out}{err}");
        assert_eq!(with[name], without[name], "{name}");
    }
    all_was_done(with);
    let log = scene.testbed.layout().audit_log();
    let compared = wait_until("the record and the audit log to agree", DEADLINE, || {
        let audited = audit::finished_by_pod(&log, &pods[0].uid)?;
        let coverage = Coverage::compare(&audited, &scene.events(), &pods[0].uid);
        Ok(coverage.is_complete().then_some(coverage))
    });
    let coverage = compared.unwrap_or_else(|error| {
        let audited = audit::finished_by_pod(&log, &pods[0].uid).unwrap();
        panic!("{error:#}\n{}", Coverage::compare(&audited, &scene.events(), &pods[0].uid))
    });
    println!("{coverage}");
    let written_down = written_down(&pods[0]);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let events = scene.events();
    for (name, resource, told) in written_down {
        let watches = Watched::find(&events, resource, &format!("client%3D{name}&"));
        assert!(!watches.is_empty(), "{name} watches {resource}");
        watches.iter().for_each(|watch| watch.has_told(&told));
    }
    each_spoke_as_expected(&events);
    copies_are_on_record(&events, bytes(KUBECTL));
    proxied_is_of_kubectl(&events, NAMESPACES[0].0);
    let requests = requests(&events);
    streams_are_on_record(&requests, with);
    objects_are_on_record(&scene, &requests);
    no_canary_is_on_record(&requests, &events);
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}

/// By client and resource: of each event of a watch its type, and the object's name and version.
fn written_down(pod: &Pod<'_>) -> Vec<(&'static str, &'static str, Vec<[String; 3]>)> {
    let of = |(client, resource): (&'static str, &'static str)| {
        let mut told = told(pod, client, resource);
        if client.starts_with(KUBECTL) {
            // A table, and what was listed before: its third column is no version.
            let listed: Vec<_> = told.drain(..5).collect();
            assert!(listed.iter().all(|[event, ..]| event == "ADDED"), "{listed:?}");
            told.iter_mut().for_each(|[.., version]| version.clear());
        }
        (client, resource, told)
    };
    let maps = clients().filter(|(name, _)| *name != HELM).map(|(name, _)| (name, "configmaps"));
    maps.chain(["python", "go"].map(|name| (name, "secrets"))).map(of).collect()
}

/// What the clients say that they wrote and read is what the record has.
#[track_caller]
fn streams_are_on_record(requests: &BTreeMap<String, Request>, said: &Said) {
    let digest = |bytes: &Vec<u8>| hex::encode(Sha256::digest(bytes));
    for (name, port) in clients().filter(|(name, _)| *name != HELM) {
        let container = format!("container={name}&");
        let of = |part: &str| {
            let is_it = |request: &&Request| {
                format!("{}&", request.uri).contains(&container) && request.uri.contains(part)
            };
            let found: Vec<_> = requests.values().filter(is_it).collect();
            assert!(!found.is_empty(), "{name}: no request with {part}");
            found
        };
        let digests: BTreeSet<_> = said[name].1.split('"').filter(|word| word.len() == 64).collect();
        assert_eq!(digests.len(), 1, "{name} says one digest: {digests:?}");
        let written = |request: &&Request| {
            request.lanes.get(&(Channel::Stdin, None)).filter(|stdin| stdin.len() == bytes(name)).map(&digest)
        };
        let written: Vec<_> = of("sha256sum").iter().filter_map(written).collect();
        assert!(!written.is_empty(), "{name} writes");
        assert!(written.iter().all(|digest| digests.contains(digest.as_str())), "{name}: what was written");
        for request in of("yes") {
            let stdout = &request.lanes[&(Channel::Stdout, None)];
            assert!(digests.contains(&*digest(stdout)), "{name}: what was read");
            assert_eq!(request.exit_code, Some(0), "{name}: what was read");
        }
        if name == JAVA {
            let copies = |word: &String| word.starts_with("cat ") && word.contains("/tmp/java.txt");
            let copied: Vec<_> = of("/exec")
                .into_iter()
                .filter(|request| request.execution.command.iter().any(copies))
                .collect();
            assert!(!copied.is_empty(), "{name} copies");
            all_was_sent(&of("yes"), &copied);
        }
        for (arguments, stdin, tty, code) in [
            (&["sh", "-c", "echo out; echo err >&2; exit 3", "two words"][..], false, false, 3),
            (&["sh", "-c", if name == JAVA { "head -c 6; exit 4" } else { "cat; exit 4" }], true, false, 4),
            (&["sh", "-c", "test -t 0 && echo a terminal; read it; exit 5"], true, true, 5),
        ] {
            let found: Vec<_> =
                of("/exec").into_iter().filter(|request| request.execution.command == arguments).collect();
            assert!(!found.is_empty(), "{name}: {arguments:?}");
            for request in found {
                assert_eq!(request.exit_code, Some(code), "{name}: {arguments:?}");
                assert_eq!(request.execution, execution(name, arguments, stdin, tty), "{name}");
            }
        }
        if name == "go" {
            assert!(of("").iter().all(|request| request.says_cp), "its header is on record");
        }
        let [attached] = of("/attach")[..] else { panic!("{name} attaches once") };
        assert_eq!(attached.execution, execution(name, &[], true, false), "{name}");
        assert_eq!(attached.lanes[&(Channel::Stdin, None)], b"one\nquit\n", "{name}");
        let shown = &attached.lanes[&(Channel::Stdout, None)];
        let all = b"got one\ngot quit\nends\n";
        assert!(shown.starts_with(b"got one\n") && all.starts_with(shown), "{name}: {shown:?}");
        let followed = of("/log");
        let followed = followed.iter().find(|request| request.uri.contains("follow=")).unwrap();
        let lines = &followed.lanes[&(Channel::ResponseBody, None)];
        assert_eq!(*lines, b"begins\ngot one\ngot quit\nends\n", "{name}");
        let ping = format!("ping-{name}\n").into_bytes();
        for channel in [Channel::PortIn, Channel::PortOut] {
            let is_it = |request: &Request| {
                request.lanes.iter().any(|((lane, connection), bytes)| {
                    *lane == channel && connection.is_some_and(|to| to.port == port) && *bytes == ping
                })
            };
            assert!(requests.values().any(is_it), "{name}: {channel:?}");
        }
    }
}

fn execution(client: &str, command: &[&str], stdin: bool, tty: bool) -> Execution {
    let command = command.iter().copied().map(str::to_owned).collect();
    Execution { container: Some(client.to_owned()), command, stdin, tty }
}

/// The Java client does again what its own library takes for broken: each time, its server and Weir have said all.
#[track_caller]
fn all_was_sent(read: &[&Request], copied: &[&Request]) {
    for request in copied {
        let stdout = &request.lanes[&(Channel::Stdout, None)];
        assert!(*stdout == b"0123456789abcde\n".repeat(10_000), "{} bytes", stdout.len());
    }
    for request in read.iter().chain(copied) {
        assert_eq!(
            (request.exit_code, request.outcome),
            (Some(0), Some(Outcome::Complete)),
            "{}",
            request.uri
        );
    }
}

/// What the server holds of each object is what it answered to the last change on record.
#[track_caller]
fn objects_are_on_record(scene: &Scene, requests: &BTreeMap<String, Request>) {
    let held =
        scene.testbed.kubectl(&["get", "configmaps", "-n", NAMESPACES[0].0, "-l", "client", "-o", "json"]);
    let held: Value = serde_json::from_str(&held.unwrap()).unwrap();
    let held = held["items"].as_array().unwrap();
    // All but the one that each has deleted.
    assert_eq!(held.len(), (clients().count() - 1) * 4);
    for object in held {
        let [name, version] =
            ["name", "resourceVersion"].map(|field| object["metadata"][field].as_str().unwrap());
        let answered = requests.values().any(|request| {
            let Some(body) = request.lanes.get(&(Channel::ResponseBody, None)) else { return false };
            if !["create", "patch", "update"].contains(&request.verb.as_str()) {
                return false;
            }
            match serde_json::from_slice::<Value>(body) {
                Ok(body) => {
                    body["metadata"]["resourceVersion"] == version
                        && body["metadata"]["name"] == name
                        && body["data"] == object["data"]
                        && body["metadata"]["uid"] == object["metadata"]["uid"]
                }
                // In protobuf, the strings stand as they are.
                Err(_) => {
                    let data = object["data"].as_object().unwrap().values();
                    let texts = data.filter_map(Value::as_str).chain([name, version]);
                    texts.into_iter().all(|text| contains(body, text.as_bytes()))
                }
            }
        });
        assert!(answered, "{name} at version {version} is not on record as the server holds it");
    }
}

pub(super) fn contains(bytes: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(bytes, part).is_some()
}

/// What a text is in base64, wherever in what was encoded it stands.
pub(super) fn in_base64(text: &str) -> [String; 3] {
    use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
    [0, 1, 2].map(|before| {
        let padded = format!("{}{text}", "-".repeat(before));
        let encoded = STANDARD_NO_PAD.encode(&padded);
        // The first characters have bits of what is before, the last of what is behind.
        let begin = [0, 2, 3][before];
        let end = padded.len() * 8 / 6;
        encoded[begin..end].to_owned()
    })
}

/// Nothing of a Secret's value is there; what is no Secret is, by the same search.
#[track_caller]
fn no_canary_is_on_record(requests: &BTreeMap<String, Request>, events: &[Event]) {
    // What was said about them: heads, arguments, names, words.
    let told = events.iter().filter(|event| !matches!(event.kind, Kind::Content(_)));
    let told: Vec<_> = told.map(|event| serde_json::to_vec(event).unwrap()).collect();
    for (name, _) in clients() {
        let canary = format!("canary-{name}-4711");
        let mut hidden = vec![canary.clone()];
        hidden.extend(in_base64(&canary));
        for once in in_base64(&canary) {
            hidden.extend(in_base64(&once));
        }
        for (event, text) in told.iter().flat_map(|event| hidden.iter().map(move |text| (event, text))) {
            let found = contains(event, text.as_bytes());
            assert!(!found, "{text} is in {}", String::from_utf8_lossy(event));
        }
        hidden.extend(GZIP.map(str::to_owned));
        for request in requests.values() {
            for ((channel, _), bytes) in &request.lanes {
                for text in &hidden {
                    let found = contains(bytes, text.as_bytes());
                    assert!(!found, "{text} is in {channel:?} of {} {}", request.verb, request.uri);
                }
            }
        }
        let visible = format!("visible-{name}-2");
        let on_record =
            |request: &Request| request.lanes.values().any(|bytes| contains(bytes, visible.as_bytes()));
        assert!(requests.values().any(on_record), "{visible} is on record");
    }
}
