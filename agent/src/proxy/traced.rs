//! What traces tell of connections and requests: who, what and how long, as it stands in the record. No path, query, header or body.

use std::{sync::Arc, time::Instant};

use http::{StatusCode, request::Parts};
use weir_common::{
    attributes::Attributes,
    event::{Caller, Identity},
};

use super::{Shared, measures::Verdict, server::Connection};
use crate::{
    recording::RequestRecord,
    traces::{Context, Stage, Trace},
};

/// Begins the trace of a connection that was accepted at `accepted`.
pub(super) fn connection(shared: &Arc<Shared>, cluster: &str, caller: &Caller, accepted: Instant) -> Trace {
    let Some(traces) = &shared.traces else { return Trace::default() };
    let mut trace = traces.begin(accepted);
    trace.name("accept");
    trace.enter_at(Stage::Identify, Some(accepted));
    who(&mut trace, cluster, caller);
    if let Some(process) = &caller.process {
        trace.text("process.executable.path", &process.executable);
    }
    trace
}

/// Begins the trace of a request that has just arrived.
pub(super) fn request(connection: &Connection, head: &Parts, attributes: &Attributes) -> Trace {
    let Some(traces) = &connection.shared.traces else { return Trace::default() };
    let mut trace = traces.begin(Instant::now());
    if !trace.is_wanted() {
        return trace;
    }
    // What a client sends in the place of a verb or resource is in no name: names are few.
    let method = standard(head.method.as_str());
    let name = match (attributes.resource.is_empty(), attributes.subresource.is_empty()) {
        (true, _) => format!("{method} path"),
        (false, true) => format!("{method} resource"),
        (false, false) => format!("{method} subresource"),
    };
    trace.name(&name);
    trace.link(connection.traced);
    trace.link(Context::of_client(&head.headers));
    who(&mut trace, &connection.cluster().name, connection.origin.caller());
    trace.text("http.request.method", method);
    trace.text("weir.request.verb", &attributes.verb);
    trace.text("weir.request.api_group", &attributes.api_group);
    trace.text("weir.request.resource", &attributes.resource);
    trace.text("weir.request.subresource", &attributes.subresource);
    trace.text("weir.request.namespace", &attributes.namespace);
    trace.enter(Stage::Receive);
    trace
}

/// Who asks is known, if it could be established.
pub(super) fn identified(trace: &mut Trace, identity: Option<&Identity>) {
    if let Some(identity) = identity {
        trace.text("enduser.id", &identity.user.username);
        trace.text("weir.rule", identity.rule.as_deref().unwrap_or_default());
    }
}

/// There is a record, by which the trace leads to it.
pub(super) fn recorded(trace: &mut Trace, record: &RequestRecord) {
    trace.text("weir.request.id", record.id());
    trace.text("weir.session.id", record.session());
}

/// The answer's head is there.
pub(super) fn answered(trace: &mut Trace, status: StatusCode) {
    trace.number("http.response.status_code", i64::from(status.as_u16()));
    if status.is_server_error() {
        trace.fail();
    }
}

/// Takes the trace of a request that was forwarded to where its answer is, which it ends with.
pub(super) fn forwarded(trace: &mut Trace) -> Trace {
    decided(trace, Verdict::Forwarded);
    std::mem::take(trace)
}

/// What became of the request.
pub(super) fn decided(trace: &mut Trace, verdict: Verdict) {
    trace.text("weir.verdict", verdict.name());
    if verdict != Verdict::Forwarded {
        trace.fail();
    }
}

fn who(trace: &mut Trace, cluster: &str, caller: &Caller) {
    trace.text("weir.cluster", cluster);
    if let Some(pod) = &caller.pod {
        trace.text("k8s.namespace.name", &pod.namespace);
        trace.text("k8s.pod.name", &pod.name);
        trace.text("k8s.pod.uid", &pod.uid);
    }
}

/// A method as OpenTelemetry's conventions have it: what is none of HTTP's own is `_OTHER`.
fn standard(method: &str) -> &str {
    match method {
        "GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS" | "TRACE" | "CONNECT" => method,
        _ => "_OTHER",
    }
}
