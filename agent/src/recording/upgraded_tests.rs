//! What the journal has of an upgraded stream. What the decoders make of bytes is tested beside them.

use std::sync::{Arc, atomic::Ordering};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::FutureExt as _;
use http::{HeaderMap, Method, StatusCode};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use weir_common::event::{Channel, Event, Kind, Outcome};

use super::{
    CommitRule, CommitRules, MaskRules, Masks, Recorder, RecorderOptions, RecordingError, Streams,
    fixture::{CANARY, TestDisk, attributes, names, on, open, options, read},
    tests::{closed, content, no_canary},
};

fn agreed(subprotocol: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("upgrade", "websocket".parse().unwrap());
    headers.insert("sec-websocket-protocol", subprotocol.parse().unwrap());
    headers
}

/// A frame whose mask is zero: the payload stands in it as it is.
fn from_client(payload: &[u8]) -> Vec<u8> {
    [&[0x82, 0x80 | payload.len() as u8, 0, 0, 0, 0][..], payload].concat()
}

fn from_server(payload: &[u8]) -> Bytes {
    [&[0x82, 126][..], &(payload.len() as u16).to_be_bytes(), payload].concat().into()
}

#[tokio::test]
async fn an_exec_is_recorded_by_channel_and_its_input_is_durable_when_it_is_forwarded() {
    let directory = TempDir::new().unwrap();
    let disk = Arc::new(TestDisk::default());
    let recorder = on(&disk, options(directory.path())).unwrap();
    let headers = agreed("v4.channel.k8s.io");
    let record =
        open(&recorder, Method::POST, &attributes("create", "pods", "exec"), &headers, None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
    let syncs = || disk.syncs.load(Ordering::SeqCst);
    let mut head = Bytes::from(from_client(b"\0rm -r x\n"));
    let payload = head.split_off(7);
    record.client_stream_data(head).await.unwrap();
    let before = syncs();
    record.client_stream_data(payload).await.unwrap();
    assert!(syncs() > before, "nothing is forwarded that is not durable");
    record.server_stream_data(from_server(b"\x01done")).await.unwrap();
    let status = br#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
    record.server_stream_data(from_server(&[b"\x03", &status[..]].concat())).await.unwrap();
    record.server_stream_data(Bytes::from_static(&[0x82])).await.unwrap();
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    assert_eq!(content(&events, Channel::Stdin), b"rm -r x\n");
    assert_eq!(content(&events, Channel::Stdout), b"done");
    assert_eq!(content(&events, Channel::Status), status);
    // The head that no payload followed is the last that is said of it.
    assert_eq!(content(&events, Channel::ServerRaw), [0x82]);
    assert!(content(&events, Channel::ClientRaw).is_empty());
    assert_eq!(
        names(&events)[names(&events).len() - 4..],
        ["gap", "content", "requestClosed", "agentStopped"]
    );
    let closed = closed(&events);
    assert_eq!(
        (closed.exit_code, closed.client_bytes, closed.response_bytes),
        (Some(7), 15, 9 + 4 + 1 + status.len() as u64 + 1)
    );
}

/// What the record has of a watch over WebSocket whose server says `messages`: its body, and why some of it is left out.
async fn watched(resource: &str, subprotocol: &str, messages: &[&[u8]]) -> (String, Option<String>) {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    let headers = agreed(subprotocol);
    let watch = attributes("watch", resource, "");
    let record = open(&recorder, Method::GET, &watch, &headers, None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
    for message in messages {
        for piece in from_server(message).chunks(50) {
            record.server_stream_data(Bytes::copy_from_slice(piece)).await.unwrap();
        }
    }
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    no_canary(directory.path());
    let body = String::from_utf8(content(&events, Channel::ResponseBody)).unwrap();
    (body, closed(&events).body.as_ref().and_then(|body| body.truncated.clone()))
}

#[tokio::test]
async fn a_watch_over_websocket_is_masked_event_by_event_and_one_that_is_not_parsed_is_withheld() {
    let base64 = STANDARD.encode(CANARY);
    let line = format!(
        "{{\"type\":\"ADDED\",\"object\":{{\"kind\":\"Secret\",\"data\":{{\"a\":\"{base64}\"}}}}}}\n"
    );
    // The API server agrees to any of them, and sends the same.
    for subprotocol in ["", "base64.binary.k8s.io", "v4.channel.k8s.io", "chat"] {
        let (body, withheld) = watched("secrets", subprotocol, &[line.as_bytes(), line.as_bytes()]).await;
        assert_eq!((body.matches("weir:masked:").count(), withheld), (2, None), "{subprotocol}: {body}");
    }
    let mut cbor =
        b"\xd9\xd9\xf7\xa2\x44type\x45ADDED\x46object\xa2\x44kind\x46Secret\x44data\xa1\x41a\x58\x1c"
            .to_vec();
    cbor.extend_from_slice(base64.as_bytes());
    assert_eq!(base64.len(), 0x1c);
    let (body, withheld) = watched("secrets", "", &[&cbor, &cbor]).await;
    assert_eq!((body.matches("weir:masked:").count(), withheld), (2, None), "{body}");
    // A pod in protobuf, with a variable whose name says that it is a secret; and what is base64 itself.
    let protobuf = format!("\x0a\x05ADDED\x12\x40\x0a\x0bDB_PASSWORD\x12\x15{CANARY}\n");
    for message in [protobuf, STANDARD.encode(&line)] {
        let (body, withheld) = watched("pods", "", &[message.as_bytes()]).await;
        assert_eq!(body, "");
        let reason = "bytes: is a watch over WebSocket in a form that is not parsed";
        assert!(withheld.is_some_and(|withheld| withheld.ends_with(reason)));
    }
}

/// What `kubectl cp` sends of a file.
fn archive() -> Vec<u8> {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("a"), b"content").unwrap();
    let mut tar = std::process::Command::new("tar");
    tar.args(["-c", "-f", "-", "-C"]).arg(folder.path()).arg("a").output().unwrap().stdout
}

fn copied(events: &[Event]) -> Vec<(&str, u64, Option<String>)> {
    fn file(event: &Event) -> Option<(&str, u64, Option<String>)> {
        match &event.kind {
            Kind::FileCopied(file) => Some((file.path.as_str(), file.bytes, file.digest.clone())),
            _ => None,
        }
    }
    events.iter().filter_map(file).collect()
}

#[tokio::test]
async fn files_that_go_through_exec_are_named_with_length_and_digest() {
    let archive = archive();
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    let headers = agreed("v5.channel.k8s.io");
    let exec = attributes("create", "pods", "exec");
    let record = open(&recorder, Method::POST, &exec, &headers, None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
    for piece in archive.chunks(100) {
        record.client_stream_data(from_client(&[b"\0", piece].concat()).into()).await.unwrap();
    }
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    assert_eq!(content(&events, Channel::Stdin), archive);
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(b"content")));
    assert_eq!(copied(&events), [("a", 7, Some(digest))]);
}

#[tokio::test]
async fn of_a_stream_whose_payload_a_rule_leaves_out_its_end_and_lengths_are_recorded() {
    let directory = TempDir::new().unwrap();
    let rule = CommitRule { streams: Streams::Metadata, ..CommitRule::default() };
    let rules = CommitRules { rules: vec![rule], ..CommitRules::default() };
    let recorder = Recorder::start(RecorderOptions { rules, ..options(directory.path()) }).unwrap();
    let headers = agreed("v4.channel.k8s.io");
    let exec = attributes("create", "pods", "exec");
    let record = open(&recorder, Method::POST, &exec, &headers, None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
    record.client_stream_data(from_client(format!("\0{CANARY}").as_bytes()).into()).await.unwrap();
    record.server_stream_data(from_server(format!("\x01{CANARY}").as_bytes())).await.unwrap();
    record.server_stream_data(from_server(b"\x03{\"status\":\"Success\"}")).await.unwrap();
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    no_canary(directory.path());
    let events = read(recorder.folder());
    assert_eq!(content(&events, Channel::Status), b"{\"status\":\"Success\"}");
    let missing = events.iter().find_map(|event| match &event.kind {
        Kind::Gap { reason, bytes, .. } if reason.starts_with("left out: a rule wants") => *bytes,
        _ => None,
    });
    assert_eq!(missing, Some(2 * CANARY.len() as u64));
    assert_eq!(closed(&events).exit_code, Some(0));
}

#[tokio::test]
async fn of_files_whose_content_a_rule_leaves_out_there_is_no_digest_to_guess_by() {
    let directory = TempDir::new().unwrap();
    let rule = CommitRule { streams: Streams::Metadata, ..CommitRule::default() };
    let rules = CommitRules { rules: vec![rule], ..CommitRules::default() };
    let recorder = Recorder::start(RecorderOptions { rules, ..options(directory.path()) }).unwrap();
    let headers = agreed("v5.channel.k8s.io");
    let record =
        open(&recorder, Method::POST, &attributes("create", "pods", "exec"), &headers, None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
    for piece in archive().chunks(100) {
        record.client_stream_data(from_client(&[b"\0", piece].concat()).into()).await.unwrap();
    }
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    assert_eq!(copied(&read(recorder.folder())), [("a", 7, None)]);
}

#[tokio::test]
async fn what_cannot_be_masked_of_a_stream_goes_on_when_its_length_and_digest_are_on_disk() {
    let directory = TempDir::new().unwrap();
    let disk = Arc::new(TestDisk::default());
    let masks = MaskRules { patterns: vec!["canary-[a-z0-9-]+".into()], ..MaskRules::default() };
    let masks = Arc::new(Masks::new(masks).unwrap());
    let rules = CommitRules { masks, ..CommitRules::default() };
    let recorder = on(&disk, RecorderOptions { rules, ..options(directory.path()) }).unwrap();
    let headers = agreed("chat");
    let proxy = attributes("create", "services", "proxy");
    let record = open(&recorder, Method::GET, &proxy, &headers, None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
    for _ in 0..2 {
        let before = disk.syncs.load(Ordering::SeqCst);
        record.client_stream_data(from_client(CANARY.as_bytes()).into()).await.unwrap();
        assert!(disk.syncs.load(Ordering::SeqCst) > before, "nothing is forwarded that is not durable");
    }
    record.server_stream_data(from_server(CANARY.as_bytes())).await.unwrap();
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    no_canary(directory.path());
    let events = read(recorder.folder());
    let withheld: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.kind {
            Kind::Gap { reason, bytes, .. } if reason.starts_with("withheld") => {
                Some((reason.as_str(), *bytes))
            }
            _ => None,
        })
        .collect();
    let (of_client, of_server) = (from_client(CANARY.as_bytes()).len(), from_server(CANARY.as_bytes()).len());
    let lengths: Vec<_> = withheld.iter().map(|(_, bytes)| bytes.unwrap()).collect();
    assert_eq!(lengths, [of_client as u64, of_client as u64, of_server as u64]);
    assert!(withheld.iter().all(|(reason, _)| reason.contains("; hmac-sha256:")), "{withheld:?}");
    assert_ne!(withheld[0], withheld[1], "no piece is recognised by another of the same bytes");
}

#[tokio::test]
async fn a_client_that_cannot_be_followed_into_a_pod_is_cut_where_expressions_are_masked() {
    let masks = MaskRules { patterns: vec!["canary-[a-z0-9-]+".into()], ..MaskRules::default() };
    for (masks, is_cut) in [(masks, true), (MaskRules::default(), false)] {
        let directory = TempDir::new().unwrap();
        let rules = CommitRules { masks: Arc::new(Masks::new(masks).unwrap()), ..CommitRules::default() };
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, RecorderOptions { rules, ..options(directory.path()) }).unwrap();
        let headers = agreed("v4.channel.k8s.io");
        let exec = attributes("create", "pods", "exec");
        let record = open(&recorder, Method::GET, &exec, &headers, None).await.unwrap();
        record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
        record.client_stream_data(from_client(b"\0ls\n").into()).await.unwrap();
        // A bit that nobody has agreed on: servers take the frame as it is.
        let mut odd = from_client(b"\0id\n");
        odd[0] |= 0x40;
        let told = record.client_stream_data(odd.into()).await;
        assert_eq!(matches!(told, Err(RecordingError::Unreadable)), is_cut, "{told:?}");
        // Behind its own end nobody reads a client: one thread of it may still write what another one has closed.
        if is_cut {
            let other = open(&recorder, Method::GET, &exec, &headers, None).await.unwrap();
            other.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
            let late = [&b"\x88\x80mask"[..], &from_client(b"\0late")].concat();
            other.client_stream_data(late.into()).await.unwrap();
            other.close(Outcome::Complete, None);
        }
        record.server_stream_data(from_server(b"\x01x")).await.unwrap();
        record.close(Outcome::Refused, None);
        recorder.stop("test").await.unwrap();
        let events = read(recorder.folder());
        assert_eq!(content(&events, Channel::Stdin), b"ls\n");
        assert_eq!(content(&events, Channel::ClientRaw).is_empty(), is_cut);
        let is_withheld =
            |event: &Event| matches!(&event.kind, Kind::Gap { reason, .. } if reason.starts_with("withheld"));
        assert_eq!(
            events.iter().any(is_withheld),
            is_cut,
            "what it said last is on record by its length and digest"
        );
    }
}

/// A client that is told of the end says farewell; that it had meant to go is known only of what it said before.
#[tokio::test]
async fn who_ended_a_stream_early_is_who_said_so_before_the_other_did() {
    for (client_first, outcome) in [(true, Outcome::ClientAborted), (false, Outcome::UpstreamFailed)] {
        let directory = TempDir::new().unwrap();
        let recorder = on(&Arc::new(TestDisk::default()), options(directory.path())).unwrap();
        let (headers, exec) = (agreed("v4.channel.k8s.io"), attributes("create", "pods", "exec"));
        let record = open(&recorder, Method::GET, &exec, &headers, None).await.unwrap();
        record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
        record.server_stream_data(from_server(b"\x01half")).await.unwrap();
        let farewell = Bytes::from_static(b"\x88\x80mask");
        if client_first {
            record.client_stream_data(farewell).await.unwrap();
            record.server_stream_end().await.unwrap();
        } else {
            record.server_stream_end().await.unwrap();
            record.client_stream_data(farewell).await.unwrap();
        }
        record.close_stream(false);
        recorder.stop("test").await.unwrap();
        assert_eq!(closed(&read(recorder.folder())).outcome, outcome, "the client first: {client_first}");
    }
}

#[tokio::test]
async fn a_server_that_speaks_faster_than_the_disk_waits_before_much_of_it_is_in_memory() {
    let directory = TempDir::new().unwrap();
    let disk = Arc::new(TestDisk::default());
    let recorder = on(&disk, options(directory.path())).unwrap();
    let headers = agreed("v4.channel.k8s.io");
    let exec = attributes("create", "pods", "exec");
    let record = open(&recorder, Method::POST, &exec, &headers, None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
    disk.hold(true);
    let said = vec![7; 60_000];
    let piece = from_server(&[b"\x01", &said[..]].concat());
    let mut pieces = 1;
    while record.server_stream_data(piece.clone()).now_or_never().is_some() {
        pieces += 1;
        assert!(pieces * said.len() < 3 << 20, "it waits");
    }
    assert!(pieces * said.len() > 1 << 20, "it does not wait for each piece");
    // Content is in base64 there.
    assert!(recorder.inner.queue.backlog_bytes() < 4 << 20);
    disk.hold(false);
    record.server_stream_data(piece).await.unwrap();
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let stdout = content(&read(recorder.folder()), Channel::Stdout);
    assert_eq!(stdout.len(), (pieces + 1) * said.len(), "all of it is on record");
}
