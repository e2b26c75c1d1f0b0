//! Elastic Common Schema 8.11: one document an event.
//!
//! Categories and types are those that ECS allows together (`event.category` says which types go with it). `kubernetes.*` has the pod that
//! asks, by the names that Elastic's own shippers use; `orchestrator.*` what is asked for; `weir.*` what ECS has no field for.

use serde_json::{Value, json};
use weir_common::{
    event::{Channel, ConnectionForwarded, FileCopied, Kind, Outcome, RequestClosed, UserInfo},
    message::rfc3339,
};

use super::{
    attested,
    context::{Request, Scene},
    facts::{self, End},
    known, merge,
};

/// Version of the schema.
const VERSION: &str = "8.11.0";

/// The line of an event, if it is one.
pub(super) fn lines(scene: &Scene<'_>) -> Vec<String> {
    if !is_told(scene) {
        return Vec::new();
    }
    let mut all = document(scene);
    merge(&mut all, who(scene));
    if let Some(request) = scene.request {
        merge(&mut all, what(request));
    }
    match &scene.event.kind {
        Kind::RequestClosed(closed) => merge(&mut all, end(scene, closed)),
        Kind::FileCopied(file) => merge(&mut all, file_copied(file)),
        Kind::ConnectionForwarded(forwarded) => merge(&mut all, connection_forwarded(forwarded)),
        Kind::RequestOpened(_) | Kind::SessionStarted { .. } | Kind::InvocationStarted { .. } => {}
        _ => merge(&mut all, json!({"weir": {"data": facts::data(scene.event).to_string()}})),
    }
    known(all).map(|document| document.to_string()).into_iter().collect()
}

/// Whether an event has a document of its own.
fn is_told(scene: &Scene<'_>) -> bool {
    !matches!(
        scene.event.kind,
        Kind::Content(_)
            | Kind::ObjectsNamed(_)
            | Kind::ChannelChanged { .. }
            | Kind::RequestRefused { .. }
            | Kind::ResponseStarted { .. }
    )
}

/// Whether what the event says stands in the line of a later one.
pub(super) fn is_told_later(scene: &Scene<'_>) -> bool {
    matches!(scene.event.kind, Kind::RequestRefused { .. } | Kind::ResponseStarted { .. })
}

fn document(scene: &Scene<'_>) -> Value {
    let event = scene.event;
    let (kind, categories, types) = categories(scene);
    let verb = scene.request.map(|request| request.opened.attributes.verb.as_str());
    let of_request = matches!(event.kind, Kind::RequestOpened(_) | Kind::RequestClosed(_));
    json!({
        "@timestamp": rfc3339(event.time_unix_us),
        "ecs": {"version": VERSION},
        "message": facts::message(scene),
        "event": {
            "id": format!("{}/{}", event.epoch, event.sequence),
            "kind": kind,
            "category": categories,
            "type": types,
            "action": verb.filter(|verb| of_request && !verb.is_empty()).unwrap_or(event.kind.name()),
            "code": event.kind.name(),
            "sequence": i64::try_from(event.sequence).ok(),
            "module": "weir",
            "dataset": "weir.events",
            "provider": "weir-agent",
            "outcome": of_request.then_some("unknown"),
        },
        "host": {"name": event.node},
        "organization": {"id": event.tenant},
        "weir": attested::texts(scene),
    })
}

/// Kind, categories and types. Types are those that ECS expects with one of the categories.
fn categories(scene: &Scene<'_>) -> (&'static str, Vec<&'static str>, Vec<&'static str>) {
    let plain = |category, kind| ("event", vec![category], vec![kind]);
    match &scene.event.kind {
        Kind::AgentStarted { .. } => plain("process", "start"),
        Kind::AgentStopped { .. } => plain("process", "end"),
        Kind::SessionStarted { .. } => plain("session", "start"),
        Kind::InvocationStarted { .. } => plain("process", "info"),
        Kind::RoleAssumed(_) => plain("authentication", "info"),
        Kind::FileCopied(file) if file.channel == Channel::Stdin => plain("file", "creation"),
        Kind::FileCopied(_) => plain("file", "access"),
        Kind::ConnectionForwarded(_) => ("event", vec!["network"], vec!["connection", "end"]),
        Kind::ConnectionRefused { .. } => ("event", vec!["network"], vec!["connection", "denied"]),
        Kind::Gap { .. } => ("pipeline_error", Vec::new(), Vec::new()),
        Kind::Finding { .. } => ("alert", vec!["configuration"], vec!["info"]),
        Kind::Coverage(_) => plain("network", "info"),
        kind => {
            let mut categories = vec!["api"];
            let mut types: Vec<_> = scene.request.and_then(verb_type).into_iter().collect();
            if scene.request.is_some_and(|request| request.opened.execution.is_some()) {
                categories.push("process");
            }
            types.push(if matches!(kind, Kind::RequestClosed(_)) { "end" } else { "start" });
            if scene.request.is_some_and(|request| request.refused.is_some()) {
                types.push("denied");
            }
            ("event", categories, types)
        }
    }
}

/// What a verb does, in ECS' words.
fn verb_type(request: &Request) -> Option<&'static str> {
    let attributes = &request.opened.attributes;
    match attributes.verb.as_str() {
        _ if attributes.is_connect() => Some("access"),
        "get" | "list" | "watch" | "head" | "options" => Some("access"),
        "create" => Some("creation"),
        "update" | "patch" => Some("change"),
        "delete" | "deletecollection" => Some("deletion"),
        _ => None,
    }
}

/// Who, from where.
fn who(scene: &Scene<'_>) -> Value {
    let caller = scene.caller();
    let pod = caller.and_then(|caller| caller.pod.as_ref());
    let verified = facts::verified_user(scene.request);
    let acted = facts::acted_user(scene.request);
    let claimed = caller.and_then(|caller| caller.user_or_claim());
    let name = verified.map(|user| user.username.as_str()).or(claimed);
    let info = |user: &UserInfo| json!({"name": user.username, "id": user.uid, "roles": user.groups});
    let mut user = verified.map_or_else(|| json!({"name": claimed}), info);
    merge(&mut user, json!({"effective": acted.map(info)}));
    let ip = pod.and_then(|pod| pod.ip.as_ref());
    let address = facts::dialled(scene);
    let people: Vec<&str> = name.into_iter().chain(acted.map(|user| user.username.as_str())).collect();
    json!({
        "user": user,
        "related": {"user": people, "ip": ip.map(|ip| [ip])},
        "source": {"ip": ip, "address": ip},
        "destination": address.map(|address| json!({
            "ip": address.ip().to_string(),
            "address": address.ip().to_string(),
            "port": address.port(),
        })),
        "kubernetes": pod.map(|pod| json!({
            "namespace": pod.namespace,
            "pod": {"name": pod.name, "uid": pod.uid, "ip": pod.ip},
            "container": {"name": scene.container().map(|container| &container.name)},
            "node": {"name": scene.event.node},
        })),
        "container": scene.container().map(|container| json!({"id": container.id, "name": container.name})),
        "process": scene.process().map(|process| json!({
            "pid": process.pid,
            "entity_id": scene.event.invocation,
            "executable": process.executable,
            "name": facts::base_name(&process.executable),
            "args": process.argv,
            "args_count": process.argv.len(),
            "command_line": process.argv.join(" "),
            "user": {"id": process.uid.to_string()},
        })),
        "orchestrator": (!scene.event.cluster.is_empty()).then(|| json!({
            "type": "kubernetes",
            "cluster": {"name": scene.event.cluster},
        })),
    })
}

/// What is asked for.
fn what(request: &Request) -> Value {
    let (opened, attributes) = (&request.opened, &request.opened.attributes);
    let (path, query) = facts::path_and_query(request);
    let body_bytes = opened.body.as_ref().and_then(|body| i64::try_from(body.wire_bytes).ok());
    json!({
        "orchestrator": {
            "api_version": attributes.api_version,
            "namespace": attributes.namespace,
            "resource": {"type": facts::resource(request), "name": attributes.name},
        },
        "url": {"original": opened.uri, "path": path, "query": query, "scheme": "https"},
        "http": {
            "version": opened.protocol.strip_prefix("HTTP/"),
            "request": {"method": opened.method, "body": {"bytes": body_bytes}},
        },
        "user_agent": {"original": request.header("user-agent")},
        "rule": {"name": opened.identity.as_ref().and_then(|identity| identity.rule.as_ref())},
    })
}

fn end(scene: &Scene<'_>, closed: &RequestClosed) -> Value {
    let outcome = match End::of(closed) {
        End::Success => "success",
        End::Failure => "failure",
        End::Unknown => "unknown",
    };
    let refused = scene.request.and_then(|request| request.refused.as_ref()).map(|(_, reason)| reason);
    let failed = (closed.outcome == Outcome::UpstreamFailed).then_some(closed.reason.as_ref());
    json!({
        "event": {
            "outcome": outcome,
            "reason": refused.or(closed.reason.as_ref()),
            "duration": i64::try_from(closed.duration_us).ok().and_then(|us| us.checked_mul(1000)),
            "start": scene.request.map(|request| rfc3339(request.opened_us)),
            "end": rfc3339(scene.event.time_unix_us),
        },
        "error": {"message": failed},
        "http": {"response": {
            "status_code": closed.status,
            "body": {"bytes": i64::try_from(closed.response_bytes).ok()},
        }},
        "weir": attested::of_end(scene.request, closed),
    })
}

fn file_copied(file: &FileCopied) -> Value {
    let sha256 = file.digest.as_ref().and_then(|digest| digest.strip_prefix("sha256:"));
    json!({
        "file": {
            "path": file.path,
            "name": facts::base_name(&file.path),
            "size": i64::try_from(file.bytes).ok(),
            "hash": {"sha256": sha256},
            "target_path": file.link_target,
            "type": if file.link_target.is_some() { "symlink" } else { "file" },
        },
        "related": {"hash": sha256.map(|digest| [digest])},
    })
}

fn connection_forwarded(forwarded: &ConnectionForwarded) -> Value {
    json!({
        "network": {
            "protocol": forwarded.protocol,
            "bytes": i64::try_from(forwarded.bytes_in.saturating_add(forwarded.bytes_out)).ok(),
        },
        "tls": {"client": {"server_name": forwarded.server_name}},
        "weir": {
            "forwarded-port": forwarded.connection.port.to_string(),
            "bytes-in": forwarded.bytes_in.to_string(),
            "bytes-out": forwarded.bytes_out.to_string(),
        },
    })
}
