//! The proxy between a real client and a real server: what goes up, what comes back, what is recorded.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version, request::Builder};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use weir_common::event::{Channel, Event, Kind, Outcome};

use super::{
    Drained,
    rig::{BIG_BYTES, NAME, Rig, soon},
};

const POD: &str = "/api/v1/namespaces/a/pods/p";

pub(super) fn request(builder: Builder, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    builder.body(Full::new(body.into())).expect("a request")
}

/// Sends over HTTP/1.1 on a connection of its own.
pub(super) async fn send(rig: &Rig, builder: Builder, body: impl Into<Bytes>) -> Response<Incoming> {
    let builder = builder.header("host", NAME);
    soon(rig.http1().await.send_request(request(builder, body))).await.expect("an answer")
}

pub(super) async fn bytes(response: Response<Incoming>) -> Bytes {
    soon(response.into_body().collect()).await.expect("a whole body").to_bytes()
}

/// The `Status` object of an answer that Weir made.
pub(super) async fn status(response: Response<Incoming>) -> (u16, String, String) {
    let code = response.status().as_u16();
    assert_eq!(response.headers()["content-type"], "application/json");
    let object: Value = serde_json::from_slice(&bytes(response).await).expect("JSON");
    assert_eq!((&object["kind"], &object["apiVersion"]), (&Value::from("Status"), &Value::from("v1")));
    assert_eq!((&object["status"], &object["code"]), (&Value::from("Failure"), &Value::from(code)));
    let text = |name: &str| object[name].as_str().expect("a string").to_owned();
    (code, text("reason"), text("message"))
}

pub(super) fn closed(events: &[Event]) -> Vec<(Option<u16>, Outcome)> {
    let close = |event: &Event| match &event.kind {
        Kind::RequestClosed(closed) => Some((closed.status, closed.outcome)),
        _ => None,
    };
    events.iter().filter_map(close).collect()
}

pub(super) fn refused_connections(events: &[Event]) -> Vec<String> {
    let refused = |event: &Event| match &event.kind {
        Kind::ConnectionRefused { reason, .. } => Some(reason.clone()),
        _ => None,
    };
    events.iter().filter_map(refused).collect()
}

fn content(events: &[Event], channel: Channel) -> Vec<u8> {
    let mut all = Vec::new();
    for event in events {
        match &event.kind {
            Kind::Content(content) if content.channel == channel => {
                all.extend(content.bytes.to_vec().expect("readable"));
            }
            _ => {}
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_arrives_as_it_was_sent_whatever_the_versions() {
    for (client, alpn) in [("http/1.1", "http/1.1"), ("http/1.1", "h2"), ("h2", "h2"), ("h2", "http/1.1")] {
        let rig = Rig::new(&[alpn]).await;
        let post =
            |uri: &str| Request::post(uri).header("audit-id", "forged").header("authorization", "Bearer t");
        let response = if client == "h2" {
            let uri = format!("https://{NAME}/api/v1/namespaces/a/configmaps?dryRun=All");
            soon(rig.http2().await.send_request(request(post(&uri), "{\"a\":1}"))).await.expect("an answer")
        } else {
            send(&rig, post("/api/v1/namespaces/a/configmaps?dryRun=All"), "{\"a\":1}").await
        };
        assert_eq!(response.status(), StatusCode::OK, "{client} to {alpn}");
        let audit_id = response.headers()["audit-id"].clone();
        assert_eq!(bytes(response).await, "{\"a\":1}");
        let [seen] = rig.seen().try_into().expect("one request");
        assert_eq!(seen.version, if alpn == "h2" { Version::HTTP_2 } else { Version::HTTP_11 });
        assert_eq!(seen.uri.path_and_query().expect("a path"), "/api/v1/namespaces/a/configmaps?dryRun=All");
        assert_eq!(seen.headers["audit-id"], audit_id);
        assert_eq!(seen.headers["authorization"], "Bearer t");
        assert_eq!(seen.headers["x-forwarded-for"], "10.244.0.7");
        assert_eq!(seen.headers["content-length"], "7");
        assert_eq!(seen.body, "{\"a\":1}");
        let events = rig.events().await;
        assert_eq!(closed(&events), [(Some(200), Outcome::Complete)], "{client} to {alpn}");
        assert_eq!(content(&events, Channel::RequestBody), b"{\"a\":1}");
        let ids: Vec<_> = events.iter().filter_map(|event| event.request.as_deref()).collect();
        assert!(!ids.is_empty() && ids.iter().all(|id| *id == audit_id), "the record has the audit id");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_refused_and_not_forwarded() {
    let rig = Rig::new(&["h2"]).await;
    let body = vec![b'x'; 8 * 1024 * 1024];
    let response = send(&rig, Request::post("/api/v1/namespaces/a/pods"), body).await;
    assert_eq!(status(response).await.0, 413);
    // Without a Content-Length, so that only reading tells.
    let head = format!(
        "POST /x HTTP/1.1\r\nHost: {NAME}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    );
    let chunk = format!("{:x}\r\n{}\r\n", 1024 * 1024, "x".repeat(1024 * 1024));
    let answer = rig.raw(&format!("{head}{}0\r\n\r\n", chunk.repeat(4))).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(rig.seen().is_empty());
    let whole = vec![b'x'; 3 * 1024 * 1024];
    let response = send(&rig, Request::post("/api/v1/namespaces/a/pods"), whole).await;
    assert_eq!(bytes(response).await.len(), 3 * 1024 * 1024);
    let refused = (Some(413), Outcome::Refused);
    assert_eq!(closed(&rig.events().await), [refused, refused, (Some(200), Outcome::Complete)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn impersonation_is_refused_and_recorded_with_its_body() {
    let rig = Rig::new(&["h2"]).await;
    let post = Request::post("/api/v1/namespaces/a/configmaps").header("Impersonate-User", "admin");
    let (code, reason, message) = status(send(&rig, post, "{\"b\":2}").await).await;
    assert_eq!((code, reason.as_str()), (403, "Forbidden"));
    assert!(message.contains("impersonation"), "{message}");
    assert!(rig.seen().is_empty());
    let events = rig.events().await;
    assert_eq!(closed(&events), [(Some(403), Outcome::Refused)]);
    assert_eq!(content(&events, Channel::RequestBody), b"{\"b\":2}");
}

#[tokio::test(flavor = "multi_thread")]
async fn framing_tricks_never_make_two_requests_of_one() {
    let rig = Rig::new(&["http/1.1"]).await;
    let two_lengths =
        format!("POST /x HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd");
    assert!(rig.raw(&two_lengths).await.starts_with("HTTP/1.1 400"));
    let not_chunked =
        format!("POST /x HTTP/1.1\r\nHost: {NAME}\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n");
    assert!(rig.raw(&not_chunked).await.starts_with("HTTP/1.1 400"));
    assert!(rig.seen().is_empty());
    let smuggled = format!(
        "POST /x HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n\
         3\r\nabc\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: {NAME}\r\n\r\n"
    );
    rig.raw(&smuggled).await;
    let [seen] = rig.seen().try_into().expect("one request");
    assert_eq!(
        (seen.uri.path(), &seen.headers["content-length"], &seen.body[..]),
        ("/x", &"3".parse().expect("a value"), &b"abc"[..])
    );
    assert!(!seen.headers.contains_key("transfer-encoding"));
    let malformed = refused_connections(&rig.events().await);
    assert_eq!(malformed.len(), 2, "{malformed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_host_is_refused_in_the_request_line_host_and_sni() {
    let rig = Rig::new(&["http/1.1"]).await;
    let absolute = "GET http://evil.example/api HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    assert!(rig.raw(absolute).await.starts_with("HTTP/1.1 421"));
    let differing = format!("GET http://evil.example/ HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n");
    assert!(rig.raw(&differing).await.starts_with("HTTP/1.1 400"));
    let connect = format!("CONNECT {NAME}:443 HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n");
    assert!(rig.raw(&connect).await.starts_with("HTTP/1.1 400"));
    let h2c = format!("GET / HTTP/1.1\r\nHost: {NAME}\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n");
    assert!(rig.raw(&h2c).await.starts_with("HTTP/1.1 400"));
    // A body would be the first bytes of what follows.
    let exec = "/api/v1/namespaces/n/pods/p/exec?command=sh&stdin=true";
    let upgrade = format!("Host: {NAME}\r\nConnection: Upgrade, close\r\nUpgrade: SPDY/3.1\r\n");
    for body in ["Content-Length: 3\r\n\r\nid\n", "Transfer-Encoding: chunked\r\n\r\n3\r\nid\n\r\n0\r\n\r\n"]
    {
        let said = rig.raw(&format!("POST {exec} HTTP/1.1\r\n{upgrade}{body}")).await;
        assert!(said.starts_with("HTTP/1.1 400") && said.contains("an upgrade with a body"), "{said}");
    }
    assert!(rig.try_connect("h2", "evil.example").await.is_err());
    assert!(rig.seen().is_empty());
    let [sni] = refused_connections(&rig.events().await).try_into().expect("one refused connection");
    assert!(sni.contains("evil.example"), "{sni}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_closed_and_recorded() {
    let rig = Rig::new(&["http/1.1"]).await;
    let mut tcp = rig.connect_tcp().await;
    tcp.write_all(b"GET /api HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("sent");
    let mut answer = Vec::new();
    let _ = soon(tcp.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP/"));
    let [reason] = refused_connections(&rig.events().await).try_into().expect("one refused connection");
    assert!(reason.contains("does not speak TLS"), "{reason}");
}

fn exec() -> Builder {
    Request::post(format!("{POD}/exec?command=sh&stdin=true"))
        .header("connection", "Upgrade")
        .header("upgrade", "SPDY/3.1")
        .header("x-stream-protocol-version", "v4.channel.k8s.io")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgraded_stream_passes_byte_for_byte_with_half_close() {
    let rig = Rig::new(&["h2", "http/1.1"]).await;
    let response = send(&rig, exec(), "").await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(
        (&response.headers()["upgrade"], &response.headers()["connection"]),
        (&"SPDY/3.1".parse().expect("a value"), &"Upgrade".parse().expect("a value"))
    );
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.expect("upgraded"));
    let mut greeting = [0; 6];
    soon(stream.read_exact(&mut greeting)).await.expect("a greeting");
    assert_eq!(&greeting, b"\x00hello");
    let sent: Vec<u8> = (0..300_000u32).map(|at| (at % 251) as u8).collect();
    stream.write_all(&sent).await.expect("sent");
    stream.shutdown().await.expect("half closed");
    let mut back = Vec::new();
    soon(stream.read_to_end(&mut back)).await.expect("all comes back after the half-close");
    assert!(back == sent, "{} of {} bytes", back.len(), sent.len());
    let [seen] = rig.seen().try_into().expect("one request");
    assert_eq!(seen.version, Version::HTTP_11);
    assert_eq!(seen.headers["x-stream-protocol-version"], "v4.channel.k8s.io");
    let events = rig.events().await;
    assert_eq!(closed(&events), [(Some(101), Outcome::Complete)]);
    assert!(content(&events, Channel::ClientRaw) == sent);
    assert!(content(&events, Channel::ServerRaw) == [&b"\x00hello"[..], &sent].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_upgrade_comes_back_unchanged() {
    let rig = Rig::new(&["h2", "http/1.1"]).await;
    let attach =
        Request::post(format!("{POD}/attach")).header("connection", "Upgrade").header("upgrade", "websocket");
    let response = send(&rig, attach, "").await;
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    assert_eq!(bytes(response).await, "no attach for you");
    assert_eq!(closed(&rig.events().await), [(Some(403), Outcome::Complete)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_down_is_told_as_a_status() {
    let rig = Rig::new(&["h2"]).await;
    let unused =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    rig.endpoints.store(vec![unused].into());
    let (code, reason, message) = status(send(&rig, Request::get("/api/v1/pods"), "").await).await;
    assert_eq!((code, reason.as_str()), (503, "ServiceUnavailable"));
    assert!(message.contains("cannot be reached"), "{message}");
    assert_eq!(status(send(&rig, exec(), "").await).await.0, 503);
    rig.endpoints.store(Vec::new().into());
    assert_eq!(status(send(&rig, Request::get("/api/v1/pods"), "").await).await.0, 503);
    assert_eq!(closed(&rig.events().await), [(Some(503), Outcome::UpstreamFailed); 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_hangs_up_is_told_as_a_status_and_mutations_are_not_repeated() {
    for alpn in ["http/1.1", "h2"] {
        let rig = Rig::new(&[alpn]).await;
        let (code, reason, _) = status(send(&rig, Request::post("/hangup"), "x").await).await;
        assert_eq!((code, reason.as_str()), (502, "BadGateway"), "{alpn}");
        assert_eq!(rig.seen().len(), 1, "{alpn}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_breaks_off_for_the_client() {
    for alpn in ["http/1.1", "h2"] {
        let rig = Rig::new(&[alpn]).await;
        let mut body = send(&rig, Request::get("/broken"), "").await.into_body();
        let first = soon(body.frame()).await.expect("a frame").expect("no error yet");
        assert_eq!(first.into_data().expect("data"), "event 0\n");
        rig.upstream.next_event.notify_one();
        assert!(soon(body.frame()).await.expect("not an orderly end").is_err(), "{alpn}");
        assert_eq!(closed(&rig.events().await), [(Some(200), Outcome::UpstreamFailed)], "{alpn}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_resets_in_its_body_leaves_a_trace_and_nothing_is_forwarded() {
    let rig = Rig::new(&["h2"]).await;
    let mut stream = rig.connect("http/1.1").await;
    let head =
        format!("POST {POD} HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("sent");
    let mut go_on = [0; 12];
    soon(stream.read_exact(&mut go_on)).await.expect("the proxy waits for the body");
    assert_eq!(&go_on, b"HTTP/1.1 100");
    stream.write_all(b"half").await.expect("sent");
    drop(stream);
    let upstream = Arc::clone(&rig.upstream);
    let events = rig.events().await;
    assert!(upstream.seen.lock().expect("not poisoned").is_empty());
    let (aborted, refused) = (closed(&events), refused_connections(&events));
    assert!(aborted.iter().all(|(_, outcome)| *outcome == Outcome::ClientAborted), "{aborted:?}");
    assert!(refused.iter().all(|reason| reason.contains("in the middle of its body")), "{refused:?}");
    assert_eq!(aborted.len() + refused.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_event_of_a_watch_arrives_while_the_watch_goes_on() {
    for alpn in ["http/1.1", "h2"] {
        let rig = Rig::new(&[alpn]).await;
        let mut body = send(&rig, Request::get("/watch"), "").await.into_body();
        for event in 0..3 {
            let frame = soon(body.frame()).await.expect("a frame").expect("no error");
            assert_eq!(frame.into_data().expect("data"), format!("event {event}\n"), "{alpn}");
            rig.upstream.next_event.notify_one();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_answer_arrives_whole_and_trailers_are_kept() {
    for alpn in ["http/1.1", "h2"] {
        let rig = Rig::new(&[alpn]).await;
        let mut sender = rig.http2().await;
        let get = |path: &str| request(Request::get(format!("https://{NAME}{path}")), "");
        let mut body = soon(sender.send_request(get("/big"))).await.expect("an answer").into_body();
        let mut length = 0;
        while let Some(frame) = soon(body.frame()).await {
            length += frame.expect("no error").data_ref().map_or(0, Bytes::len);
        }
        assert_eq!(length, BIG_BYTES, "{alpn}");
        if alpn == "h2" {
            let response = soon(sender.send_request(get("/trailers"))).await.expect("an answer");
            let collected = soon(response.into_body().collect()).await.expect("a body");
            assert_eq!(collected.trailers().expect("trailers")["x-trailer"], "kept");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_recorded_is_not_forwarded() {
    let rig = Rig::new(&["h2"]).await;
    rig.recorder.stop("test").await.expect("stopped");
    for builder in [Request::get("/api/v1/pods"), Request::post("/api/v1/namespaces/a/pods"), exec()] {
        let response = send(&rig, builder, "").await;
        assert!(response.headers().contains_key("retry-after"));
        let (code, reason, message) = status(response).await;
        assert_eq!((code, reason.as_str()), (503, "ServiceUnavailable"));
        assert!(message.contains("cannot be recorded"), "{message}");
    }
    assert!(rig.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_share_http2_upstream_and_never_http1() {
    for (alpn, expected) in [("h2", 1), ("http/1.1", 2)] {
        let rig = Rig::new(&[alpn]).await;
        let mut clients = [rig.http1().await, rig.http1().await];
        for turn in 0..4 {
            let sender = &mut clients[turn % 2];
            soon(sender.ready()).await.expect("ready");
            let get = request(Request::get("/api/v1/pods").header("host", NAME), "");
            bytes(soon(sender.send_request(get)).await.expect("an answer")).await;
        }
        assert_eq!(*rig.upstream.connections.borrow(), expected, "{alpn}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_survive_an_api_server_that_ends_its_connections_in_an_orderly_way() {
    for alpn in ["http/1.1", "h2"] {
        let rig = Rig::new(&[alpn]).await;
        let mut sender = rig.http2().await;
        for turn in 1..=20 {
            let post = request(Request::post(format!("https://{NAME}{POD}")), "x");
            let answered = soon(sender.send_request(post)).await.expect("an answer");
            assert_eq!(answered.status(), StatusCode::OK, "{alpn}");
            bytes(answered).await;
            assert_eq!(rig.seen().len(), turn, "each request is acted on once");
            rig.upstream.restart.notify_waiters();
            if alpn == "http/1.1" {
                // It cannot say that it closes: of a request that is on its way then nobody knows whether it was acted on.
                let mut connections = rig.upstream.connections.subscribe();
                soon(connections.wait_for(|count| *count == 0)).await.expect("the connection's end");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_share_few_connections() {
    let rig = Rig::new(&["h2"]).await;
    let mut sender = rig.http2().await;
    let requests = (0..100).map(|_| {
        let answer = sender.send_request(request(Request::get(format!("https://{NAME}/watch")), ""));
        async move {
            let mut body = soon(answer).await.expect("an answer").into_body();
            assert!(soon(body.frame()).await.expect("a frame").is_ok());
            body
        }
    });
    let open: Vec<Incoming> = futures::future::join_all(requests).await;
    assert_eq!(open.len(), 100);
    assert_eq!(*rig.upstream.connections.borrow(), 2, "64 streams on one connection, the rest on another");
}

#[tokio::test(flavor = "multi_thread")]
async fn open_requests_of_a_pod_are_bounded_and_the_refused_one_is_recorded() {
    let limits = super::Limits { held_bytes_per_pod_max: 20 * 1024, ..super::Limits::default() };
    let rig = Rig::with_limits(&["h2"], limits).await;
    let mut sender = rig.http2().await;
    let mut watch = || sender.send_request(request(Request::get(format!("https://{NAME}/watch")), ""));
    let mut open = Vec::new();
    for _ in 0..2 {
        let answer = soon(watch()).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK);
        open.push(answer);
    }
    let (code, reason, message) = status(soon(watch()).await.expect("an answer")).await;
    assert_eq!((code, reason.as_str()), (429, "TooManyRequests"), "{message}");
    drop(open.pop());
    // The stream's reset is on its way.
    soon(async { while soon(watch()).await.expect("an answer").status() != StatusCode::OK {} }).await;
    drop((open, sender));
    assert!(closed(&rig.events().await).iter().any(|(_, outcome)| *outcome == Outcome::Refused));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_closes_what_is_idle_and_cuts_what_does_not_end() {
    let rig = Rig::new(&["h2", "http/1.1"]).await;
    let mut idle = rig.http1().await;
    let get = request(Request::get("/x").header("host", NAME), "");
    bytes(soon(idle.send_request(get)).await.expect("an answer")).await;
    let mut open = send(&rig, Request::get("/watch"), "").await.into_body();
    assert!(soon(open.frame()).await.is_some());
    let upgraded = hyper::upgrade::on(send(&rig, exec(), "").await).await.expect("upgraded");
    assert!(matches!(soon(rig.proxy.drain(Duration::ZERO)).await, Drained::Cut(_)));
    assert_eq!(rig.proxy.active(), 0);
    let again = request(Request::get("/x").header("host", NAME), "");
    assert!(soon(idle.send_request(again)).await.is_err(), "the idle connection is closed");
    assert!(soon(open.frame()).await.is_none_or(|frame| frame.is_err()), "the watch is cut");
    drop(upgraded);
    let outcomes: Vec<_> = closed(&rig.events().await).into_iter().map(|(_, outcome)| outcome).collect();
    assert_eq!(outcomes, [Outcome::Complete, Outcome::Drained, Outcome::Drained]);
}
