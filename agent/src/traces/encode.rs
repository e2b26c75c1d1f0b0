//! OTLP's messages: of a trace a span for the whole, and below it one for each stage.

use std::time::{Duration, Instant, SystemTime};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span, Status, span, status::StatusCode},
};
use prost::Message as _;

use super::{Context, Stage, Traced, Value, context};

/// Who sends: the agent of a node.
pub(super) fn resource(node: &str) -> Resource {
    let attributes = vec![
        text("service.name", "weir-agent"),
        text("service.version", env!("CARGO_PKG_VERSION")),
        text("service.instance.id", node),
        text("k8s.node.name", node),
    ];
    Resource { attributes, ..Resource::default() }
}

/// The body of one export.
pub(super) fn request(resource: &Resource, traces: &[Traced]) -> Vec<u8> {
    let scope = InstrumentationScope {
        name: "weir-agent".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let spans = traces.iter().flat_map(spans).collect();
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, schema_url: String::new() }];
    let resource_spans =
        vec![ResourceSpans { resource: Some(resource.clone()), scope_spans, schema_url: String::new() }];
    ExportTraceServiceRequest { resource_spans }.encode_to_vec()
}

/// How many spans a collector says that it has not taken, and its message; none if its answer says nothing of it.
pub(super) fn rejected(answer: &[u8]) -> Option<(u64, String)> {
    let partial = ExportTraceServiceResponse::decode(answer).ok()?.partial_success?;
    let count = u64::try_from(partial.rejected_spans).ok().filter(|count| *count > 0)?;
    Some((count, partial.error_message))
}

/// How many spans a trace is.
pub(super) fn count(traced: &Traced) -> u64 {
    1 + traced.stages.len() as u64
}

fn spans(traced: &Traced) -> impl Iterator<Item = Span> {
    let (since, begun) = traced.begun;
    // Of the two clocks the one that only goes forward measures.
    let at = move |instant: Instant| nanos(since + instant.saturating_duration_since(begun));
    let ends = traced.stages.iter().skip(1).map(|(_, at)| *at).chain([traced.ended]);
    let stages = traced.stages.iter().zip(ends).map(move |((stage, began), ended)| {
        let kind = match stage {
            Stage::Forward => span::SpanKind::Client,
            _ => span::SpanKind::Internal,
        };
        Span {
            trace_id: traced.context.trace.to_vec(),
            span_id: context::span().to_vec(),
            parent_span_id: traced.context.span.to_vec(),
            name: stage.name().to_owned(),
            kind: kind.into(),
            start_time_unix_nano: at(*began),
            end_time_unix_nano: at(ended),
            ..Span::default()
        }
    });
    let attributes = traced.attributes.iter().map(|(key, value)| match value {
        Value::Text(value) => text(key, value),
        Value::Number(value) => pair(key, any_value::Value::IntValue(*value)),
    });
    let code = if traced.failed { StatusCode::Error } else { StatusCode::Unset };
    let whole = Span {
        trace_id: traced.context.trace.to_vec(),
        span_id: traced.context.span.to_vec(),
        name: traced.name.clone(),
        kind: span::SpanKind::Server.into(),
        start_time_unix_nano: at(begun),
        end_time_unix_nano: at(traced.ended),
        attributes: attributes.collect(),
        links: traced.links.iter().map(link).collect(),
        status: Some(Status { code: code.into(), message: String::new() }),
        ..Span::default()
    };
    std::iter::once(whole).chain(stages)
}

fn link(to: &Context) -> span::Link {
    span::Link { trace_id: to.trace.to_vec(), span_id: to.span.to_vec(), ..span::Link::default() }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn text(key: &str, value: &str) -> KeyValue {
    pair(key, any_value::Value::StringValue(value.to_owned()))
}

fn pair(key: &str, value: any_value::Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}
