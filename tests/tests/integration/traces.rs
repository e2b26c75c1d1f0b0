//! What the OpenTelemetry collector has of an agent's traces, as it writes them: a part of the test of metrics, whose agent has one.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use weir_common::event::{Kind, RequestOpened};
use weir_tests::{OtelCollector, Pod, otel_collector::Received, testbed::NODE_NAME, wait_until};

use super::{DEADLINE, Scene, monitoring::Monitored};

/// What operators read of traces.
const DOCUMENTATION: &str = include_str!("../../../docs/traces.md");
/// Below a request, in this order; each only where there was something to wait for.
const STAGES: [&str; 6] = ["receive", "authenticate", "record", "assume role", "forward", "respond"];
/// Of OTLP.
const SERVER: u64 = 2;

fn attributes(list: &Value) -> BTreeMap<String, String> {
    let text = |value: &Value| {
        let text = value["stringValue"].as_str().or_else(|| value["intValue"].as_str());
        text.map_or_else(|| value.to_string(), str::to_owned)
    };
    let pairs = list.as_array().into_iter().flatten();
    pairs.map(|pair| (pair["key"].as_str().unwrap().to_owned(), text(&pair["value"]))).collect()
}

fn text<'a>(span: &'a Value, key: &str) -> &'a str {
    span[key].as_str().unwrap_or_default()
}

/// The spans below another one, by their names.
fn below<'a>(spans: &'a [Received], whole: &Value) -> Vec<&'a str> {
    let parts = spans.iter().map(|received| &received.span).filter(|span| {
        text(span, "parentSpanId") == text(whole, "spanId") && span["traceId"] == whole["traceId"]
    });
    parts.map(|span| text(span, "name")).collect()
}

/// The agent is told of `collector`, and `pod` has had its requests forwarded.
pub(super) fn are_what_a_collector_writes(
    scene: &Scene,
    (collector, monitored): (&OtelCollector, &Monitored),
    pod: &Pod<'_>,
) {
    let events = scene.events();
    let requests: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.kind {
            Kind::RequestOpened(opened) => Some((event, opened)),
            _ => None,
        })
        .collect();
    assert!(requests.len() >= 3, "{requests:?}");
    let taken = wait_until("all spans to be with the collector", DEADLINE, || {
        let (spans, metrics) = (collector.spans()?, monitored.metrics());
        let of_requests = spans.iter().map(|it| attributes(&it.span["attributes"]));
        let ids: BTreeSet<_> = of_requests.filter_map(|mut said| said.remove("weir.request.id")).collect();
        let exported = metrics["weir_trace_spans_total{result=\"exported\"}"];
        let whole =
            requests.iter().all(|(event, _)| event.request.as_ref().is_some_and(|id| ids.contains(id)))
                && f64::from(u32::try_from(spans.len())?) == exported;
        Ok(whole.then_some((spans, metrics)))
    });
    let (spans, metrics) = taken.unwrap();
    for lost in ["queue_full", "failed", "rejected"] {
        assert_eq!(metrics[&format!("weir_trace_spans_total{{result=\"{lost}\"}}")], 0.0, "{lost}");
    }
    for Received { resource, scope, span } in &spans {
        let of = attributes(resource);
        assert_eq!((of["service.name"].as_str(), of["k8s.node.name"].as_str()), ("weir-agent", NODE_NAME));
        assert_eq!((scope.as_str(), text(span, "traceId").len()), (Some("weir-agent"), 32), "{span}");
        assert_eq!(text(span, "spanId").len(), 16, "{span}");
        for key in attributes(&span["attributes"]).keys() {
            let short = key.strip_prefix("weir.request").unwrap_or(key);
            let is_documented =
                [key.as_str(), short].iter().any(|key| DOCUMENTATION.contains(&format!("`{key}`")));
            assert!(is_documented, "{key} is not in docs/traces.md");
        }
    }
    for (event, opened) in requests {
        let id = event.request.as_deref().unwrap();
        let said = |it: &&Received| {
            attributes(&it.span["attributes"]).get("weir.request.id").map(String::as_str) == Some(id)
        };
        let of_request: Vec<_> = spans.iter().filter(said).collect();
        assert_eq!(of_request.len(), 1, "one trace a request: {of_request:?}");
        is_of(&spans, &of_request[0].span, (&event.session, opened), pod);
    }
}

/// The trace of one request that was forwarded.
#[track_caller]
fn is_of(spans: &[Received], whole: &Value, (session, opened): (&str, &RequestOpened), pod: &Pod<'_>) {
    let what = if opened.attributes.resource.is_empty() { "path" } else { "resource" };
    assert_eq!(text(whole, "name"), format!("{} {what}", opened.method));
    assert_eq!((whole["kind"].as_u64(), text(whole, "parentSpanId")), (Some(SERVER), ""));
    let said = attributes(&whole["attributes"]);
    let expected = [
        ("weir.session.id", session),
        ("weir.cluster", "testbed"),
        ("weir.verdict", "forwarded"),
        ("weir.request.verb", &opened.attributes.verb),
        ("k8s.namespace.name", &pod.namespace),
        ("k8s.pod.name", &pod.name),
        ("k8s.pod.uid", &pod.uid),
        ("http.request.method", &opened.method),
        ("http.response.status_code", "200"),
    ];
    for (key, value) in expected {
        assert_eq!(said.get(key).map(String::as_str), Some(value), "{key}: {said:?}");
    }
    let stages = below(spans, whole);
    assert!(stages.ends_with(&["forward", "respond"]), "{stages:?}");
    let places: Vec<_> = stages.iter().map(|stage| STAGES.iter().position(|known| known == stage)).collect();
    assert!(places.is_sorted() && !places.contains(&None), "{stages:?}");
    let link = &whole["links"][0];
    let connections =
        spans.iter().map(|received| &received.span).filter(|span| text(span, "name") == "accept");
    let is_linked = |span: &&Value| span["spanId"] == link["spanId"] && span["traceId"] == link["traceId"];
    let connection: Vec<_> = connections.filter(is_linked).collect();
    assert_eq!(connection.len(), 1, "{link} is a connection's");
    assert_eq!(below(spans, connection[0]), ["identify", "handshake"]);
    let said = attributes(&connection[0]["attributes"]);
    for (key, value) in [("k8s.pod.uid", pod.uid.as_str()), ("process.executable.path", "/bin/kubectl")] {
        assert_eq!(said.get(key).map(String::as_str), Some(value), "{key}: {said:?}");
    }
}
