//! Exec, cp and port-forward of a real kubectl, over WebSocket and over SPDY: what the processes said is what is on record.

use std::{collections::BTreeMap, process::Command};

use sha2::{Digest as _, Sha256};
use weir_common::event::{Channel, Connection, ConnectionForwarded, Event, FileCopied, Kind};
use weir_tests::{Pod, PodSpec, agent, agent::TrustSource, command};

use super::{Scene, shown, verify};

#[path = "streams/cut.rs"]
mod cut;
#[path = "streams/parallel.rs"]
mod parallel;
#[path = "streams/patterns.rs"]
mod patterns;
#[path = "streams/terminals.rs"]
mod terminals;

/// Bytes that go through an exec each way; with `WEIR_TEST_LONG` more.
const BYTES: usize = 4 * 1024 * 1024;
const BYTES_LONG: usize = 64 * 1024 * 1024;

/// Seconds after which a script fails that waits for what never comes; with `WEIR_TEST_LONG` more.
const SCRIPT_SECONDS: u32 = 300;
const SCRIPT_SECONDS_LONG: u32 = 1200;

/// Of each stream that there must be, a part of its URI.
const STREAMS: [&str; 8] = [
    "tee",
    "exit",
    "stty",
    "-xmf",
    "=cf",
    "/portforward",
    "/attach?container=debug-",
    "/attach?container=websocket-",
];

/// Bytes of a SPDY frame before its payload.
const HEAD_BYTES: usize = 8;

/// The bytes of one request's lanes.
pub(super) fn lanes(events: &[Event], request: &str) -> BTreeMap<(Channel, Option<Connection>), Vec<u8>> {
    let mut lanes: BTreeMap<_, Vec<u8>> = BTreeMap::new();
    for event in events.iter().filter(|event| event.request.as_deref() == Some(request)) {
        if let Kind::Content(content) = &event.kind {
            let lane = lanes.entry((content.channel, content.connection)).or_default();
            assert_eq!(lane.len() as u64, content.offset, "nothing is missing");
            lane.extend(content.bytes.to_vec().unwrap());
        }
    }
    lanes
}

/// The requests that were upgraded, in their order: id, URI, and what they were upgraded to.
pub(super) fn upgrades(events: &[Event]) -> Vec<(String, String, String)> {
    let opened = events.iter().filter_map(|event| match &event.kind {
        Kind::RequestOpened(opened) => {
            Some((event.request.clone()?, opened.uri.clone(), opened.upgrade.clone()?))
        }
        _ => None,
    });
    opened.collect()
}

/// The requests whose URI has this part.
fn opened<'a>(events: &'a [Event], part: &str) -> impl Iterator<Item = &'a Event> {
    events
        .iter()
        .filter(move |event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.uri.contains(part)))
}

pub(super) fn exit_code(events: &[Event], request: &str) -> Option<i32> {
    events.iter().find_map(|event| match &event.kind {
        Kind::RequestClosed(closed) if event.request.as_deref() == Some(request) => closed.exit_code,
        _ => None,
    })
}

/// Whether a stream is said to have ended within a frame.
fn is_cut(events: &[Event], request: &str) -> bool {
    events.iter().filter(|event| event.request.as_deref() == Some(request)).any(
        |event| matches!(&event.kind, Kind::Gap { reason, .. } if reason.contains("ended within a frame")),
    )
}

/// Whether these bytes are less than one SPDY/3.1 frame: a part of its head or, of a control frame, the head and a part of the
/// payload. What came of a data frame's payload is decoded.
fn is_begun_frame(bytes: &[u8]) -> bool {
    let Some((head, payload)) = bytes.split_first_chunk::<HEAD_BYTES>() else { return true };
    let length = u32::from_be_bytes([0, head[5], head[6], head[7]]);
    head[..2] == [0x80, 3] && payload.len() < length as usize
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

pub(super) fn files<'a>(events: &'a [Event], request: &str) -> Vec<&'a FileCopied> {
    let of = events.iter().filter(|event| event.request.as_deref() == Some(request));
    of.filter_map(|event| match &event.kind {
        Kind::FileCopied(file) => Some(&**file),
        _ => None,
    })
    .collect()
}

fn forwarded<'a>(events: &'a [Event], request: &str) -> Vec<&'a ConnectionForwarded> {
    let of = events.iter().filter(|event| event.request.as_deref() == Some(request));
    of.filter_map(|event| match &event.kind {
        Kind::ConnectionForwarded(forwarded) => Some(&**forwarded),
        _ => None,
    })
    .collect()
}

/// What a script in the pod says. It ends, whatever it waits for; what it has started goes with the pod.
#[track_caller]
pub(super) fn run(pod: &Pod<'_>, script: &str) -> String {
    let seconds = if is_long() { SCRIPT_SECONDS_LONG } else { SCRIPT_SECONDS };
    let (code, out, err) = shown(&pod.exec_for(seconds, &["sh", "-c", script]).unwrap());
    assert_eq!(code, Some(0), "{script}: {out}{err}");
    out
}

fn is_long() -> bool {
    std::env::var_os("WEIR_TEST_LONG").is_some()
}

#[test]
fn what_is_said_in_streams_is_on_record_by_channel_whatever_kubectl_speaks() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-streams", true);
    let spec = PodSpec { script: patterns::SCRIPT, ..PodSpec::idle("it-streams", "caller") };
    let pod = scene.testbed.run_pod(&spec).unwrap();
    terminals::run_target(&scene);
    let agent = scene.agent(TrustSource::ClusterSigner);
    let bytes = if is_long() { BYTES_LONG } else { BYTES };
    run(&pod, &format!("head -c {bytes} /dev/urandom > /tmp/sent"));
    let sent = run(&pod, "sha256sum < /tmp/sent")[..64].to_owned();
    run(&pod, &format!("head -c {BYTES} /tmp/sent > /tmp/file"));
    let file_digest = format!("sha256:{}", &run(&pod, "sha256sum < /tmp/file")[..64]);
    for (websocket, spoken) in [("true", "websocket"), ("false", "SPDY/3.1")] {
        let earlier = scene.events().len();
        say_everything(&pod, websocket, &sent);
        terminals::exec(&scene, websocket);
        terminals::attach(&scene, websocket);
        let events =
            scene.ended(earlier, |events| STREAMS.iter().all(|part| opened(events, part).next().is_some()));
        let streams = upgrades(&events);
        assert!(streams.iter().all(|(.., to)| to == spoken), "{streams:?}");
        let id = |part: &str| {
            let found = streams.iter().find(|(_, uri, _)| uri.contains(part));
            &found.unwrap_or_else(|| panic!("{part} in {streams:?}")).0
        };
        let of = |part: &str| (lanes(&events, id(part)), exit_code(&events, id(part)));
        let text = |lanes: &BTreeMap<(Channel, Option<Connection>), Vec<u8>>, channel| {
            String::from_utf8_lossy(&lanes[&(channel, None)]).into_owned()
        };
        let (tee, code) = of("tee");
        assert_eq!(code, Some(0));
        let digest = |channel| sha256(&tee[&(channel, None)]);
        assert_eq!(digest(Channel::Stdin), sent, "{spoken}");
        assert_eq!(digest(Channel::Stdout), sent, "{spoken}");
        assert_eq!(text(&tee, Channel::Stderr), "told\n", "{spoken}");
        assert_eq!(of("exit").1, Some(7), "{spoken}");
        let (terminal, code) = of("stty");
        assert_eq!(code, Some(3), "{spoken}");
        assert!(text(&terminal, Channel::Stdin).contains("typed"), "{spoken}");
        assert!(text(&terminal, Channel::Stdout).contains("a terminal"), "{spoken}");
        terminals::sizes_are_on_record(&terminal[&(Channel::Resize, None)], spoken);
        for (part, channel, path) in
            [("-xmf", Channel::Stdin, "copied"), ("=cf", Channel::Stdout, "tmp/file")]
        {
            let found = files(&events, id(part));
            let [file] = found[..] else { panic!("{found:?}") };
            assert_eq!((file.channel, file.path.as_str(), file.bytes), (channel, path, BYTES as u64));
            assert_eq!(file.digest.as_ref(), Some(&file_digest), "{spoken}");
        }
        terminals::attached_are_on_record(&events, spoken);
        forwards(&events, id("/portforward"), spoken);
        for (id, uri, _) in &streams {
            let mut raw = lanes(&events, id);
            raw.retain(|(channel, _), _| matches!(channel, Channel::ClientRaw | Channel::ServerRaw));
            if is_cut(&events, id) {
                // Both sides write frames in pieces: who ends first, or is killed, cuts a goodbye within one.
                raw.retain(|_, bytes| !is_begun_frame(bytes));
            }
            assert!(raw.is_empty(), "all of {uri} is decoded, over {spoken}: {raw:02x?}");
        }
        let replay = replayed(&scene, &["--request", id("exit"), "--transcript"]);
        assert!(replay.contains("runs sh -c 'exit 7'") && replay.contains("# exit code 7"), "{replay}");
        terminals::debug_is_replayed(&scene, &events, spoken);
        let replay = replayed(&scene, &["--request", id("/portforward")]);
        assert!(replay.contains("tls to db.example"), "{replay}");
    }
    cut::what_is_cut_behind_the_api_server_is_not_complete(&scene, &pod);
    parallel::many_at_once_are_on_record(&scene, &pod);
    patterns::what_a_pattern_finds_is_in_no_record(&scene, &agent, &pod);
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}

/// Exec, cp and port-forward in every way, by the pod's own kubectl.
fn say_everything(pod: &Pod<'_>, websocket: &str, sent: &str) {
    let kubectl = format!(
        "export KUBECTL_REMOTE_COMMAND_WEBSOCKETS={websocket} KUBECTL_PORT_FORWARD_WEBSOCKETS={websocket}; "
    );
    let back = run(
        pod,
        &format!(
            "{kubectl} kubectl exec -i -n it-streams caller -- sh -c 'tee /tmp/got; echo told >&2' < /tmp/sent \
             2>/tmp/told | sha256sum; cat /tmp/told"
        ),
    );
    assert_eq!((&back[..64], back.lines().last()), (sent, Some("told")));
    let code = run(pod, &format!("{kubectl} kubectl exec -n it-streams caller -- sh -c 'exit 7'; echo $?"));
    assert!(code.lines().last() == Some("7"), "{code}");
    run(
        pod,
        &format!(
            "{kubectl} kubectl cp /tmp/file it-streams/caller:/tmp/copied && cmp /tmp/file /tmp/copied && \
             kubectl cp it-streams/caller:/tmp/file /tmp/back && cmp /tmp/file /tmp/back"
        ),
    );
    // The second connection is that of a TLS client that will not be answered. By its port in hexadecimal, the kernel's list of
    // sockets says when the second server listens (state 0A).
    let answer = run(
        pod,
        &format!(
            "{kubectl} (echo answer | timeout 120 nc -l -p 9000 >/tmp/asked; sleep 2 | timeout 120 nc -l -p 9000) \
             >/dev/null 2>&1 & \
             kubectl port-forward -n it-streams pod/caller 9001:9000 >/tmp/forwarding 2>&1 & forward=$!; \
             until grep -q Forwarding /tmp/forwarding; do sleep 0.1; done; \
             echo question | timeout 120 nc 127.0.0.1 9001; \
             until grep -q ':2328 [0-9A-F]*:0000 0A ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done; \
             kubectl --kubeconfig /dev/null --server https://127.0.0.1:9001 --tls-server-name db.example --token x \
             --insecure-skip-tls-verify --request-timeout 1s get --raw / >/dev/null 2>&1; \
             kill $forward; rm /tmp/forwarding"
        ),
    );
    assert_eq!(answer, "answer\n");
}

/// What the record says of the two connections.
#[track_caller]
fn forwards(events: &[Event], request: &str, spoken: &str) {
    let lanes = lanes(events, request);
    let found = forwarded(events, request);
    let first = found.iter().find(|forwarded| forwarded.protocol.is_none()).unwrap();
    assert_eq!((first.connection.port, first.bytes_in, first.bytes_out), (9000, 9, 7), "{spoken}: {found:?}");
    assert_eq!(lanes[&(Channel::PortIn, Some(first.connection))], b"question\n", "{spoken}");
    assert_eq!(lanes[&(Channel::PortOut, Some(first.connection))], b"answer\n", "{spoken}");
    let tls = found.iter().find(|forwarded| forwarded.protocol.as_deref() == Some("tls")).unwrap();
    assert_eq!(tls.server_name.as_deref(), Some("db.example"), "{spoken}: {found:?}");
    assert_eq!(tls.bytes_in, lanes[&(Channel::PortIn, Some(tls.connection))].len() as u64, "{spoken}");
}

/// What `weir replay` says.
#[track_caller]
fn replayed(scene: &Scene, arguments: &[&str]) -> String {
    let weir = agent::built_binary("weir").unwrap();
    let mut replay = Command::new(weir);
    replay.args(["replay", "--from"]).arg(scene.journal()).args(arguments);
    command::run(&mut replay).unwrap()
}
