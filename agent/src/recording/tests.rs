//! Tests of recording as a whole: real files, real threads, and the reader that `weir` uses.

use std::{
    io,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri, Version};
use tempfile::TempDir;
use weir_common::{
    attributes::Attributes,
    event::{Channel, Event, Kind, Outcome, RequestClosed},
};

use super::{CommitRule, CommitRules, Recorder, RecorderOptions, RecordingError, RequestHead, fixture::*};

pub(super) fn content(events: &[Event], wanted: Channel) -> Vec<u8> {
    let mut all = Vec::new();
    for event in events {
        if let Kind::Content(content) = &event.kind
            && content.channel == wanted
        {
            assert_eq!(content.offset, all.len() as u64);
            all.extend(content.bytes.to_vec().unwrap());
        }
    }
    all
}

#[track_caller]
pub(super) fn closed(events: &[Event]) -> &RequestClosed {
    let mut found = events.iter().filter_map(|event| match &event.kind {
        Kind::RequestClosed(closed) => Some(&**closed),
        _ => None,
    });
    let closed = found.next().expect("a request was closed");
    assert!(found.next().is_none(), "one request was closed");
    closed
}

fn head<'a>(headers: &'a HeaderMap, attributes: &'a Attributes) -> RequestHead<'a> {
    static PATH: std::sync::LazyLock<Uri> = std::sync::LazyLock::new(|| Uri::from_static("/api/v1/pods"));
    RequestHead {
        method: &Method::GET,
        uri: &PATH,
        version: Version::HTTP_11,
        headers,
        attributes,
        upgrade: None,
        identity: None,
    }
}

fn gzip(content: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// Neither the canary nor any base64 of it, at whatever alignment, is in any file of the journal.
#[track_caller]
pub(super) fn no_canary(directory: &Path) {
    let mut forms = vec![CANARY.as_bytes().to_vec()];
    for shift in 0..3 {
        let encoded = STANDARD.encode([&vec![b' '; shift], CANARY.as_bytes()].concat());
        // Without the characters that the neighbours of the canary have a part in.
        forms.push(encoded.as_bytes()[if shift == 0 { 0 } else { 4 }..encoded.len() - 4].to_vec());
    }
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            no_canary(&path);
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        for form in &forms {
            let found = bytes.windows(form.len()).any(|window| window == form.as_slice());
            assert!(!found, "{} in {}", String::from_utf8_lossy(form), path.display());
        }
    }
}

#[tokio::test]
async fn a_secret_that_goes_through_the_proxy_to_an_api_server_is_masked() {
    let uri = "/api/v1/namespaces/default/services/https:kubernetes:443/proxy/api/v1/namespaces/a/secrets/s";
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    let attributes = Attributes::parse("PATCH", uri, None);
    let body = format!("{{\"stringData\":{{\"a\":\"{CANARY}\"}}}}");
    let headers = content_type("application/merge-patch+json");
    let (caller, request) = (caller(), (Method::PATCH, uri));
    let record = open_as(&recorder, &caller, request, &attributes, &headers, Some(&body)).await.unwrap();
    let answer = format!("{{\"data\":{{\"a\":\"{}\"}}}}", STANDARD.encode(CANARY));
    record.response_started(StatusCode::OK, &content_type("application/json"), false);
    record.response_data(&Bytes::from(answer));
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    for channel in [Channel::RequestBody, Channel::ResponseBody] {
        let content = String::from_utf8(content(&events, channel)).unwrap();
        assert!(content.contains("weir:masked:le32:"), "{content}");
    }
    no_canary(directory.path());
}

#[tokio::test]
async fn a_request_is_read_back_as_it_was_recorded_and_verifies() {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    let record = post(&recorder, r#"{"kind":"ConfigMap"}"#).await.unwrap();
    record.response_started(StatusCode::CREATED, &content_type(JSON), false);
    record.response_data(&Bytes::from_static(b"{\"a\":"));
    record.response_data(&Bytes::from_static(b"1}"));
    record.close(Outcome::Complete, None);
    let id = record.id().to_owned();
    let folder = recorder.folder().to_owned();
    recorder.stop("test").await.unwrap();
    let events = read(&folder);
    assert_eq!(
        names(&events),
        [
            "agentStarted",
            "sessionStarted",
            "invocationStarted",
            "requestOpened",
            "content",
            "responseStarted",
            "content",
            "requestClosed",
            "agentStopped"
        ]
    );
    assert_eq!(content(&events, Channel::RequestBody), br#"{"kind":"ConfigMap"}"#);
    assert_eq!(content(&events, Channel::ResponseBody), br#"{"a":1}"#);
    let closed = closed(&events);
    assert_eq!((closed.status, closed.outcome, closed.response_bytes), (Some(201), Outcome::Complete, 7));
    assert!(closed.body.as_ref().unwrap().digest.as_ref().unwrap().starts_with("sha256:"));
    assert!(
        events[3..8].iter().all(|event| event.request.as_deref() == Some(&*id) && event.cluster == "prod")
    );
    assert!(events[3..8].iter().all(|event| event.session == events[1].session && !event.session.is_empty()));
    assert!(matches!(
        recorder.open(&caller(), 0, head(&HeaderMap::new(), &attributes("get", "pods", "")), None).await,
        Err(RecordingError::Closed)
    ));
}

#[tokio::test]
async fn a_dropped_record_closes_as_client_aborted_and_a_closed_one_closes_once() {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    drop(get(&recorder, &attributes("get", "pods", "")).await);
    let record = get(&recorder, &attributes("get", "pods", "")).await;
    record.close(Outcome::UpstreamFailed, Some("reset"));
    record.close(Outcome::Complete, None);
    drop(record);
    let refused = get(&recorder, &attributes("get", "pods", "")).await;
    refused.refused(StatusCode::BAD_GATEWAY, "no upstream");
    drop(refused);
    recorder.stop("test").await.unwrap();
    let outcomes: Vec<_> = read(recorder.folder())
        .into_iter()
        .filter_map(|event| match event.kind {
            Kind::RequestClosed(closed) => Some((closed.outcome, closed.reason)),
            _ => None,
        })
        .collect();
    let mut outcomes = outcomes;
    outcomes.sort_by_key(|(outcome, _)| format!("{outcome:?}"));
    assert_eq!(
        outcomes,
        [
            (Outcome::ClientAborted, None),
            (Outcome::Refused, Some("no upstream".into())),
            (Outcome::UpstreamFailed, Some("reset".into()))
        ]
    );
}

#[tokio::test]
async fn a_response_beyond_the_limit_is_cut_with_a_mark_and_a_digest() {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    let mut other = vec![b'x'; 100_000];
    other[99_999] = b'y';
    for (body, piece) in [(vec![b'x'; 100_000], 1000), (vec![b'x'; 100_000], 70_000), (other, 1000)] {
        let record = get(&recorder, &attributes("list", "pods", "")).await;
        record.response_started(StatusCode::OK, &content_type(JSON), false);
        for piece in body.chunks(piece) {
            record.response_data(&Bytes::copy_from_slice(piece));
        }
        record.close(Outcome::Complete, None);
    }
    let discovery = get(&recorder, &attributes("get", "", "")).await;
    discovery.response_started(StatusCode::OK, &content_type(JSON), false);
    discovery.response_data(&Bytes::from_static(b"{}"));
    drop(discovery);
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    let first = events.iter().find_map(|event| event.request.as_ref());
    let of_first: Vec<_> = events.iter().filter(|event| event.request.as_ref() == first).cloned().collect();
    assert_eq!(content(&of_first, Channel::ResponseBody), vec![b'x'; 64 * 1024]);
    let summaries = events.iter().filter_map(|event| match &event.kind {
        Kind::RequestClosed(closed) => closed.body.clone(),
        _ => None,
    });
    let summaries: Vec<_> = summaries.collect();
    let all_cut: Vec<_> = summaries.iter().filter(|summary| summary.wire_bytes == 100_000).collect();
    let [cut, again, other] = all_cut[..] else { panic!("{all_cut:?}") };
    assert_eq!(cut.digest, again.digest, "of the whole, however it came");
    assert_ne!(cut.digest, other.digest, "also of what was left out");
    assert_eq!(cut.recorded_bytes, 64 * 1024);
    assert!(cut.digest.as_ref().unwrap().starts_with("hmac-sha256:"));
    assert!(cut.truncated.as_ref().unwrap().contains("65536"));
    let metadata = summaries.iter().find(|summary| summary.wire_bytes == 2).unwrap();
    assert_eq!((metadata.recorded_bytes, metadata.truncated.is_some()), (0, true));
}

#[tokio::test]
async fn a_rule_says_how_much_of_an_answer_is_recorded() {
    let body = vec![b'x'; 100_000];
    // Without a rule's word: what the recorder was made with. An answer to a mutation is never cut shorter than it would be without rules.
    for (bytes_max, mutates, expected) in [
        (Some(10), false, 10),
        (Some(90_000), false, 90_000),
        (Some(100_000), false, 100_000),
        (Some(0), false, 0),
        (None, false, 64 * 1024),
        (Some(10), true, 100_000),
    ] {
        let directory = TempDir::new().unwrap();
        let rule = CommitRule { response_bytes_max: bytes_max, ..CommitRule::default() };
        let rules = CommitRules { rules: vec![rule], ..CommitRules::default() };
        let recorder = Recorder::start(RecorderOptions { rules, ..options(directory.path()) }).unwrap();
        let record = if mutates {
            post(&recorder, "{}").await.unwrap()
        } else {
            get(&recorder, &attributes("list", "pods", "")).await
        };
        record.response_started(StatusCode::OK, &HeaderMap::new(), false);
        record.response_data(&Bytes::from(body.clone()));
        record.close(Outcome::Complete, None);
        recorder.stop("test").await.unwrap();
        let events = read(recorder.folder());
        assert_eq!(content(&events, Channel::ResponseBody).len(), expected, "{bytes_max:?}");
        let summary = closed(&events).body.clone().expect("of the answer");
        assert_eq!((summary.wire_bytes, summary.recorded_bytes), (100_000, expected as u64), "{bytes_max:?}");
        let is_cut = expected < body.len();
        let keyed = summary.digest.unwrap().starts_with("hmac-sha256:");
        assert_eq!((summary.truncated.is_some(), keyed), (is_cut, is_cut), "{bytes_max:?}");
    }
}

#[tokio::test]
async fn both_directions_of_a_stream_are_recorded_whole_and_the_clients_durably() {
    let directory = TempDir::new().unwrap();
    let disk = Arc::new(TestDisk::default());
    let recorder = on(&disk, options(directory.path())).unwrap();
    let exec = attributes("create", "pods", "exec");
    let record = open(&recorder, Method::POST, &exec, &HeaderMap::new(), None).await.unwrap();
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &HeaderMap::new(), false);
    let large: Vec<u8> = (0..600_000_u32).map(|n| (n % 251) as u8).collect();
    let before = disk.syncs.load(Ordering::SeqCst);
    record.client_stream_data(Bytes::from_static(b"\x00ls")).await.unwrap();
    assert!(disk.syncs.load(Ordering::SeqCst) > before);
    record.client_stream_data(Bytes::from(large.clone())).await.unwrap();
    record.server_stream_data(Bytes::from(large.clone())).await.unwrap();
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    assert_eq!(content(&events, Channel::ClientRaw), [&b"\x00ls"[..], &large].concat());
    assert_eq!(content(&events, Channel::ServerRaw), large);
    let closed = closed(&events);
    assert_eq!((closed.client_bytes, closed.response_bytes), (600_003, 600_000));
    disk.fail(Some(io::ErrorKind::Other));
    assert!(record.client_stream_data(Bytes::from_static(b"x")).await.is_err());
}

#[tokio::test]
async fn nothing_of_a_watch_over_an_upgraded_connection_reaches_the_journal_unmasked() {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    let record = get(&recorder, &attributes("watch", "secrets", "")).await;
    record.response_started(StatusCode::SWITCHING_PROTOCOLS, &HeaderMap::new(), false);
    let canary = b"\x81\x7e{\"object\":{\"data\":{\"password\":\"canary\"}}}";
    record.server_stream_data(Bytes::from_static(canary)).await.unwrap();
    record.client_stream_data(Bytes::from_static(b"canary")).await.unwrap();
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    let text = serde_json::to_string(&events).unwrap();
    assert!(!text.contains("canary") && content(&events, Channel::ServerRaw).is_empty(), "{text}");
    let left_out = |event: &Event| match &event.kind {
        Kind::Gap { bytes, .. } => *bytes,
        _ => None,
    };
    assert_eq!(events.iter().filter_map(left_out).sum::<u64>(), canary.len() as u64 + 6);
    assert_eq!(closed(&events).response_bytes, canary.len() as u64);
}

#[tokio::test]
async fn a_watch_is_recorded_event_by_event_and_masked_also_when_it_is_compressed() {
    for compressed in [false, true] {
        let directory = TempDir::new().unwrap();
        let recorder = Recorder::start(options(directory.path())).unwrap();
        let record = get(&recorder, &attributes("watch", "secrets", "")).await;
        let mut headers = content_type("application/json;stream=watch");
        let line = |n: u32| {
            format!(
                "{{\"type\":\"ADDED\",\"object\":{{\"kind\":\"Secret\",\"n\":{n},\"data\":{{\"a\":\"{}\"}}}}}}\n",
                STANDARD.encode(CANARY)
            )
        };
        let mut wire = format!("{}{}", line(1), line(2)).into_bytes();
        if compressed {
            headers.insert("content-encoding", "gzip".parse().unwrap());
            wire = gzip(&wire);
        }
        record.response_started(StatusCode::OK, &headers, true);
        for piece in wire.chunks(13) {
            record.response_data(&Bytes::copy_from_slice(piece));
        }
        record.close(Outcome::Complete, None);
        recorder.stop("test").await.unwrap();
        let events = read(recorder.folder());
        let recorded = String::from_utf8(content(&events, Channel::ResponseBody)).unwrap();
        assert_eq!(recorded.lines().count(), 2, "{recorded}");
        assert!(recorded.contains("\"n\":1") && recorded.contains("weir:masked:"), "{recorded}");
        let body = closed(&events).body.clone().unwrap();
        assert_eq!((body.masked, body.truncated), (2, None));
        assert_eq!(body.decoded.as_deref(), compressed.then_some("gzip"));
        no_canary(directory.path());
    }
}

#[tokio::test]
async fn a_secret_is_in_the_journal_in_no_form() {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    let base64 = STANDARD.encode(CANARY);
    let secret = format!(r#"{{"kind":"Secret","data":{{"a":"{base64}"}},"stringData":{{"b":"{CANARY}"}}}}"#);
    let applied = serde_json::json!({ "kind": "Secret", "metadata": { "annotations": {
        "kubectl.kubernetes.io/last-applied-configuration": secret } } });
    let bodies = [
        (JSON, secret.clone()),
        (JSON, applied.to_string()),
        ("application/apply-patch+yaml", format!("kind: Secret\nstringData:\n  a: {CANARY}\n")),
        ("application/yaml", secret.clone()),
        ("application/json-patch+json", format!(r#"[{{"op":"add","path":"/data/a","value":"{base64}"}}]"#)),
        ("application/vnd.kubernetes.protobuf", format!("k8s\0{CANARY}{base64}")),
        (JSON, format!("{{broken {CANARY} {base64}")),
        (JSON, format!(r#"{{"kind":"SecretList","items":[{secret}]}}"#)),
        (JSON, format!(r#"{{"kind":"Table","rows":[{{"object":{applied}}}]}}"#)),
        ("text/plain", format!("error: {CANARY}")),
    ];
    let secrets = attributes("create", "secrets", "");
    for (media_type, body) in &bodies {
        let mut headers = content_type(media_type);
        headers.insert("authorization", format!("Bearer {CANARY}").parse().unwrap());
        let record = open(&recorder, Method::POST, &secrets, &headers, Some(body)).await.unwrap();
        for compressed in [false, true] {
            let record = get(&recorder, &attributes("list", "secrets", "")).await;
            let mut headers = content_type(media_type);
            headers.insert("set-cookie", CANARY.parse().unwrap());
            let mut wire = body.clone().into_bytes();
            if compressed {
                headers.insert("content-encoding", "gzip".parse().unwrap());
                wire = gzip(&wire);
            }
            record.response_started(StatusCode::OK, &headers, false);
            record.response_data(&Bytes::from(wire));
        }
        record.response_started(StatusCode::CREATED, &content_type(media_type), false);
        record.response_data(&Bytes::copy_from_slice(body.as_bytes()));
        let watch = get(&recorder, &attributes("watch", "secrets", "")).await;
        watch.response_started(StatusCode::OK, &content_type(media_type), true);
        watch.response_data(&Bytes::from(format!("{body}\n")));
    }
    let list = format!(r#"{{"kind":"List","items":[{secret}]}}"#);
    drop(post(&recorder, &list).await.unwrap());
    let token = attributes("create", "serviceaccounts", "token");
    let record = open(&recorder, Method::POST, &token, &content_type(JSON), Some("{}")).await.unwrap();
    record.response_started(StatusCode::CREATED, &content_type(JSON), false);
    record
        .response_data(&Bytes::from(format!(r#"{{"kind":"TokenRequest","status":{{"token":"{CANARY}"}}}}"#)));
    drop(record);
    recorder.stop("test").await.unwrap();
    no_canary(directory.path());
    // The test can fail: what is not a secret is there.
    let other = Recorder::start(options(directory.path())).unwrap();
    drop(post(&other, &format!(r#"{{"kind":"ConfigMap","data":{{"a":"{CANARY}"}}}}"#)).await.unwrap());
    other.stop("test").await.unwrap();
    assert!(std::panic::catch_unwind(|| no_canary(directory.path())).is_err());
}

#[tokio::test]
async fn findings_and_refused_connections_are_recorded_with_their_caller() {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    recorder.connection_refused(Some(0), Some(&caller()), "plain HTTP");
    recorder.finding(None, None, "proxyEnvironment", "unset HTTPS_PROXY");
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    assert_eq!(names(&events), ["agentStarted", "connectionRefused", "finding", "agentStopped"]);
    assert_eq!((&*events[1].cluster, &*events[2].cluster), ("prod", ""));
}
