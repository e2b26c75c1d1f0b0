//! Mutations whose body Weir cannot read: what is not on record does not reach the API server.

use std::time::Duration;

use http::Request;
use weir_common::event::{BodySummary, Event, Kind, Outcome};

use super::{
    rig::Rig,
    tests::{bytes, closed, send},
};

const CONFIG_MAPS: &str = "/api/v1/namespaces/a/configmaps?fieldValidation=Ignore";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const APPLY: &str = "application/apply-patch+yaml";

/// A ConfigMap of this name in its envelope.
fn protobuf(name: &str, in_object: &[u8], behind: &[u8]) -> Vec<u8> {
    let message = |number: u8, content: &[u8]| {
        [&[number << 3 | 2, u8::try_from(content.len()).expect("short")], content].concat()
    };
    let kind = [message(1, b"v1"), message(2, b"ConfigMap")].concat();
    let object = [&message(1, &message(1, name.as_bytes()))[..], in_object].concat();
    [b"k8s\0", &message(1, &kind)[..], &message(2, &object), behind].concat()
}

/// Type and body of what API servers take as a ConfigMap, and Weir cannot read; but for the last, which nobody can.
fn unreadable() -> Vec<(&'static str, Vec<u8>)> {
    let merged = "x: &x {kind: \"Config\\x4dap\", apiVersion: v1}\n<<: *x\nmetadata: {name: m}\n";
    let objects = vec![r#"{"":0}"#; 165_000].join(",");
    let large =
        format!(r#"{{"kind":"\u0043onfigMap","apiVersion":"v1","metadata":{{"name":"m"}},"x":[{objects}]}}"#);
    vec![
        // The type of its content; the object is given twice.
        (PROTOBUF, protobuf("m", b"", b"\x22\x01x")),
        (PROTOBUF, protobuf("m", b"", b"\x12\x00")),
        (APPLY, merged.into()),
        ("application/json", large.into_bytes()),
        ("application/cbor", b"\xd9\xd9\xf7\xa1\x44kindFSecret\x41a".to_vec()),
    ]
}

/// What the record says of the bodies of requests, in order, and how many bytes of content it has.
fn recorded(events: &[Event]) -> (Vec<BodySummary>, usize) {
    let body = |event: &Event| match &event.kind {
        Kind::RequestOpened(opened) => opened.body.clone(),
        _ => None,
    };
    let content = events.iter().filter(|event| matches!(&event.kind, Kind::Content(_))).count();
    (events.iter().filter_map(body).collect(), content)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mutation_that_cannot_be_read_is_refused_and_its_digest_is_on_record() {
    let rig = Rig::new(&["h2"]).await;
    let bodies = unreadable();
    for (content_type, body) in bodies.clone() {
        let post = Request::post(CONFIG_MAPS).header("content-type", content_type);
        let answer = send(&rig, post, body).await;
        assert_eq!(answer.status(), 400, "{content_type}");
        let status: serde_json::Value = serde_json::from_slice(&bytes(answer).await).expect("a Status");
        let message = status["message"].as_str().expect("a message");
        assert_eq!(status["reason"], "BadRequest");
        assert!(
            message.contains("not forwarded") && message.contains("send one document in JSON"),
            "{message}"
        );
    }
    assert_eq!(rig.seen().len(), 0, "nothing reached the API server");
    let events = rig.events().await;
    assert_eq!(closed(&events), vec![(Some(400), Outcome::Refused); bodies.len()]);
    let (summaries, content) = recorded(&events);
    assert_eq!((summaries.len(), content), (bodies.len(), 0));
    for summary in summaries {
        assert!(summary.truncated.is_some_and(|why| why.starts_with("withheld: ")));
        assert!(summary.digest.is_some_and(|digest| digest.starts_with("hmac-sha256:")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_to_a_workload_and_what_goes_through_in_an_emergency_may_be_unreadable() {
    let rig = Rig::new(&["h2"]).await;
    let (content_type, body) = unreadable().swap_remove(0);
    for path in ["/api/v1/namespaces/a/services/s/proxy/x", "/api/v1/namespaces/a/pods/p/proxy/x"] {
        let post = Request::post(path).header("content-type", content_type);
        assert_eq!(send(&rig, post, body.clone()).await.status(), 200, "{path}");
    }
    // Nobody reads it.
    let get = Request::get(CONFIG_MAPS).header("content-type", content_type);
    assert_eq!(send(&rig, get, body.clone()).await.status(), 200);
    rig.recorder.set_emergency(Some(Duration::from_secs(600)));
    let post = || Request::post(CONFIG_MAPS).header("content-type", content_type);
    assert_eq!(send(&rig, post(), body.clone()).await.status(), 200);
    rig.recorder.set_emergency(None);
    assert_eq!(send(&rig, post(), body).await.status(), 400);
    assert_eq!(rig.seen().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kubernetes_skips_in_protobuf_is_skipped_and_the_rest_is_on_record() {
    let rig = Rig::new(&["h2"]).await;
    // A field of the envelope that nobody knows; groups in the object, one of them with something in it.
    let bodies = [
        protobuf("shown-name", b"", b"\x28\x00"),
        protobuf("shown-name", b"\xa3\x06\xa4\x06", b""),
        protobuf("shown-name", b"\xa3\x06\x0a\x01x\x0b\x0c\x10\x01\xa4\x06", b""),
    ];
    for body in bodies.clone() {
        let post = Request::post(CONFIG_MAPS).header("content-type", PROTOBUF);
        assert_eq!(send(&rig, post, body).await.status(), 200);
    }
    assert_eq!(rig.seen().iter().map(|seen| seen.body.to_vec()).collect::<Vec<_>>(), bodies);
    let events = rig.events().await;
    let (summaries, _) = recorded(&events);
    assert!(summaries.iter().all(|summary| summary.truncated.is_none()), "{summaries:?}");
    let masked: Vec<_> = summaries.iter().map(|summary| summary.masked).collect();
    assert_eq!(masked, [1, 0, 0], "what is left out of an envelope is counted");
    let named = events.iter().filter(
        |event| matches!(&event.kind, Kind::ObjectsNamed(named) if named.objects[0].name == "shown-name"),
    );
    assert!(named.count() >= bodies.len());
}
