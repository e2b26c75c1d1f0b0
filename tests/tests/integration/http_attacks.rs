//! HTTP that is made to be understood differently by Weir and by the API server, sent by a pod byte for byte.
//!
//! Whatever Weir makes of it: the API server sees no request that is not in the record.

use weir_common::event::{Event, Kind};
use weir_tests::{Coverage, Pod, PodSpec, agent::TrustSource, audit, testbed::API_CLUSTER_IP, wait_until};

use super::{
    DEADLINE, Scene,
    client::{RawClient, token},
};

/// A request's head without its end. `to` is what the request line asks for.
fn head(method: &str, to: &str, host: &str, token: &str) -> String {
    format!("{method} {to} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n")
}

/// Statuses of all answers to `bytes`, until the connection ends.
fn statuses(scene: &Scene, pod: &Pod<'_>, bytes: &[u8]) -> Vec<u16> {
    let mut client = RawClient::connect(&scene.testbed, pod, API_CLUSTER_IP, "http/1.1");
    // The server may close before it has read all of it.
    let _ = client.send(bytes);
    std::iter::from_fn(|| client.answer()).map(|answer| answer.status).collect()
}

/// Events that tell of a request or connection, whether or not it was let through.
fn told(events: &[Event]) -> usize {
    let tells = |event: &&Event| {
        matches!(
            event.kind,
            Kind::RequestOpened(_) | Kind::RequestRefused { .. } | Kind::ConnectionRefused { .. }
        )
    };
    events.iter().filter(tells).count()
}

/// What a pod sends, what it must get, and how many requests of it may reach the API server.
struct Attack {
    name: &'static str,
    bytes: String,
    statuses: &'static [u16],
    forwarded: usize,
}

const CLOSE: &str = "Connection: close\r\n";

fn get(to: &str, host: &str, headers: &str, token: &str) -> String {
    format!("{}{headers}\r\n", head("GET", to, host, token))
}

/// Requests whose end is in doubt, with another one hidden behind it.
fn framing(token: &str) -> Vec<Attack> {
    let hidden = get("/api/v1/namespaces/hidden", API_CLUSTER_IP, CLOSE, token);
    let chunk = format!("{:x}\r\n{hidden}\r\n0\r\n\r\n", hidden.len());
    let behind = format!("0\r\n\r\n{hidden}");
    let (all, plain) = (behind.len(), hidden.len());
    let both = format!("Content-Length: {all}\r\nTransfer-Encoding: chunked\r\n");
    let attacks = [
        ("CL.TE", both, behind),
        ("TE.CL", "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n".to_owned(), chunk.clone()),
        ("an unknown coding", "Transfer-Encoding: xchunked\r\n".to_owned(), chunk.clone()),
        ("a space before the colon", "Transfer-Encoding : chunked\r\n".to_owned(), chunk.clone()),
        ("chunked is not last", "Transfer-Encoding: chunked, identity\r\n".to_owned(), chunk.clone()),
        ("a control character", "Transfer-Encoding:\u{b}chunked\r\n".to_owned(), chunk.clone()),
        ("a folded line", "Transfer-Encoding:\r\n chunked\r\n".to_owned(), chunk.clone()),
        ("a chunk size that is none", "Transfer-Encoding: chunked\r\n".to_owned(), format!("0x{chunk}")),
        (
            "a chunk size beyond 64 bits",
            "Transfer-Encoding: chunked\r\n".to_owned(),
            format!("1{:016x}\r\n{hidden}", 0),
        ),
        ("two lengths", format!("Content-Length: 0\r\nContent-Length: {plain}\r\n"), hidden.clone()),
        ("a signed length", format!("Content-Length: +{plain}\r\n"), hidden.clone()),
        ("a list as length", format!("Content-Length: 0, {plain}\r\n"), hidden.clone()),
    ];
    let path = "/api/v1/namespaces/it-http/configmaps";
    let attack = |(name, headers, body)| {
        let bytes = format!("{}{headers}\r\n{body}", head("POST", path, API_CLUSTER_IP, token));
        // With both lengths the chunks count and the connection ends (RFC 9112 §6.3). The one request that this is goes on
        // with a length of Weir's own; its body is no object, which the API server refuses.
        let forwarded = usize::from(matches!(name, "CL.TE" | "TE.CL"));
        Attack { name, bytes, statuses: &[400], forwarded }
    };
    attacks.into_iter().map(attack).collect()
}

/// Requests to somebody else, as somebody else, or for another protocol.
fn targets(token: &str) -> Vec<Attack> {
    let api = |headers: &str| get("/api", API_CLUSTER_IP, headers, token);
    let absolute = format!("https://{API_CLUSTER_IP}/api");
    let port = format!("{API_CLUSTER_IP}:443");
    let h2c =
        "Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
    // Servers take what they have not read of a body for the first bytes of the stream, which are no part of the record's.
    let body = "id\n";
    let exec = "/api/v1/namespaces/it-http/pods/caller/exec?command=sh&stdin=true&stdout=true";
    let websocket = "Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n";
    let headers = format!("{websocket}Content-Length: {}\r\n", body.len());
    let upgrade = format!("{}{body}", get(exec, API_CLUSTER_IP, &headers, token));
    let refused = |name, statuses, bytes| Attack { name, bytes, statuses, forwarded: 0 };
    let other = "other.example";
    vec![
        refused("another host", &[421], get("/api", other, CLOSE, token)),
        refused("absolute form and Host", &[421], get("https://other.example/api", other, CLOSE, token)),
        refused("absolute form", &[400], get("https://other.example/api", API_CLUSTER_IP, CLOSE, token)),
        refused("absolute form and another Host", &[400], get(&absolute, other, CLOSE, token)),
        refused("two hosts", &[400], api(&format!("{CLOSE}Host: other.example\r\n"))),
        refused("h2c", &[400], api(h2c)),
        refused("an upgrade with a body", &[400], upgrade),
        refused("CONNECT", &[400], format!("{}{CLOSE}\r\n", head("CONNECT", &port, &port, token))),
        refused("impersonation", &[403], api(&format!("{CLOSE}Impersonate-User: admin\r\n"))),
        Attack {
            name: "a bare line feed",
            bytes: api(&format!("X: a\n{CLOSE}")),
            statuses: &[200],
            forwarded: 1,
        },
        Attack { name: "pipelining", bytes: api("") + &api(CLOSE), statuses: &[200, 200], forwarded: 2 },
    ]
}

#[test]
fn no_http_trick_brings_a_request_to_the_api_server_without_a_record() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-http", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-http", "caller")).unwrap();
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let token = token(&pod);
    let seen = || audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap().len();
    let mut wrong = Vec::new();
    for Attack { name, bytes, statuses: expected, forwarded } in
        framing(&token).into_iter().chain(targets(&token))
    {
        let (told_before, seen_before) = (told(&scene.events()), seen());
        let found = statuses(&scene, &pod, bytes.as_bytes());
        // The API server's own entry may come after its answer.
        let reached = wait_until("what is forwarded to be seen", DEADLINE, || {
            let reached = seen() - seen_before;
            Ok((reached >= forwarded).then_some(reached))
        })
        .unwrap_or_default();
        if (found.as_slice(), reached) != (expected, forwarded) {
            wrong.push(format!("{name}: {found:?}, {reached} forwarded; not {expected:?}, {forwarded}"));
        }
        let what = format!("{name} in the record");
        wait_until(&what, DEADLINE, || Ok((told(&scene.events()) > told_before).then_some(()))).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    check_another_sni(&scene, &pod);
    check_http2_with_connection_headers(&scene, &pod, &token);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let audit = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap();
    let coverage = Coverage::compare(&audit, &scene.events(), &pod.uid);
    // Not in the other direction: a request whose chunks break off is recorded, and never forwarded.
    assert!(!audit.is_empty() && coverage.unrecorded.is_empty(), "{coverage}");
}

fn check_another_sni(scene: &Scene, pod: &Pod<'_>) {
    let mut client = RawClient::connect(&scene.testbed, pod, "other.example", "http/1.1");
    assert!(client.send(b"GET /api HTTP/1.1\r\nHost: 10.96.0.1\r\n\r\n").is_err());
    scene.event("the name that is not the cluster's", |event| {
        matches!(&event.kind, Kind::ConnectionRefused { reason, .. } if reason.contains("\"other.example\" (SNI)"))
    });
}

/// A header of HTTP/2 that is in no table (RFC 7541 §6.2.2).
fn literal(name: &str, value: &str) -> Vec<u8> {
    [vec![0], length(name), name.into(), length(value), value.into()].concat()
}

/// Length of a text that is not compressed: an integer with a prefix of seven bits (RFC 7541 §5.1).
fn length(text: &str) -> Vec<u8> {
    if text.len() < 127 {
        return vec![u8::try_from(text.len()).unwrap()];
    }
    let (mut bytes, mut left) = (vec![127], text.len() - 127);
    while left >= 128 {
        bytes.push(u8::try_from(left % 128).unwrap() | 128);
        left /= 128;
    }
    bytes.push(u8::try_from(left).unwrap());
    bytes
}

/// A frame of HTTP/2 (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

/// They are forbidden there (RFC 9113 §8.2.2), and a proxy that passed them on would let a client frame the next hop's
/// messages.
fn check_http2_with_connection_headers(scene: &Scene, pod: &Pod<'_>, token: &str) {
    let seen = || audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap().len();
    let bearer = format!("Bearer {token}");
    for (header, value) in [("transfer-encoding", "chunked"), ("connection", "upgrade"), ("plain", "a")] {
        let before = seen();
        let mut client = RawClient::connect(&scene.testbed, pod, API_CLUSTER_IP, "h2");
        let block: Vec<u8> = [
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", API_CLUSTER_IP),
            (":path", "/api"),
            ("authorization", &bearer),
            (header, value),
        ]
        .iter()
        .flat_map(|(name, value)| literal(name, value))
        .collect();
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        // SETTINGS; HEADERS with END_STREAM and END_HEADERS.
        client.send(&[preface, frame(4, 0, 0, &[]), frame(1, 5, 1, &block)].concat()).unwrap();
        // HEADERS of an answer, RST_STREAM or GOAWAY ends it.
        let answer = loop {
            let (kind, stream) = client.frame().expect("an answer to the stream");
            if stream == 1 && matches!(kind, 1 | 3) || kind == 7 {
                break kind;
            }
        };
        drop(client);
        let expected = if header == "plain" { (1, 1) } else { (3, 0) };
        assert_eq!((answer, seen() - before), expected, "{header}: {value}");
    }
}
