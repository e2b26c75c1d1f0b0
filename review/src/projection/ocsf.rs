//! OCSF 1.5.0: API Activity (6003) of requests, Process Activity (1007) of what exec runs and of processes that ask, Base Event (0) of
//! what OCSF has no class for and an operator should see. Profiles: container, host, security_control.
//!
//! Held against the published schema in the tests (`tests/testbed/ocsf`). What it has no attribute for is in `unmapped.weir`.

use serde_json::{Value, json};
use weir_common::{
    attributes::Execution,
    event::{Container, Kind, Pod, Process, RequestClosed},
};

use super::{
    attested,
    context::{Request, Scene},
    facts::{self, End},
    known, merge,
};

const VERSION: &str = "1.5.0";

/// Methods that OCSF has a name for; others stand in `api.operation` as verbs alone.
const METHODS: [&str; 8] = ["OPTIONS", "GET", "HEAD", "POST", "PUT", "DELETE", "TRACE", "CONNECT"];

/// A class of events, and what is done in it.
struct Class {
    uid: u32,
    name: &'static str,
    category: (u32, &'static str),
    activity: (u32, String),
}

impl Class {
    fn api(request: Option<&Request>) -> Self {
        let activity = request.map_or((0, "Unknown".to_owned()), activity);
        Self { uid: 6003, name: "API Activity", category: (6, "Application Activity"), activity }
    }

    fn process(id: u32, name: &str) -> Self {
        let activity = (id, name.to_owned());
        Self { uid: 1007, name: "Process Activity", category: (1, "System Activity"), activity }
    }

    fn base(name: &str) -> Self {
        Self { uid: 0, name: "Base Event", category: (0, "Uncategorized"), activity: (99, name.to_owned()) }
    }
}

/// The lines of an event.
pub(super) fn lines(scene: &Scene<'_>) -> Vec<String> {
    let execution = scene.request.and_then(|request| request.opened.execution.as_deref());
    let run = execution.filter(|execution| !execution.command.is_empty());
    let events = match &scene.event.kind {
        Kind::RequestOpened(_) => {
            vec![Some(api_activity(scene, None)), run.map(|run| execution_activity(scene, run, None))]
        }
        Kind::RequestClosed(closed) => {
            let ended = run.filter(|_| closed.exit_code.is_some());
            let ended = ended.map(|run| execution_activity(scene, run, Some(closed)));
            vec![Some(api_activity(scene, Some(closed))), ended]
        }
        Kind::InvocationStarted { .. } => vec![Some(asking_process(scene))],
        Kind::SessionStarted { .. }
        | Kind::RequestRefused { .. }
        | Kind::ResponseStarted { .. }
        | Kind::Content(_)
        | Kind::ObjectsNamed(_)
        | Kind::ChannelChanged { .. } => return Vec::new(),
        _ => vec![Some(base_event(scene))],
    };
    events.into_iter().flatten().filter_map(known).map(|event| event.to_string()).collect()
}

/// Whether what the event says stands in the line of a later one.
pub(super) fn is_told_later(scene: &Scene<'_>) -> bool {
    !matches!(scene.event.kind, Kind::Content(_) | Kind::ObjectsNamed(_) | Kind::ChannelChanged { .. })
}

/// What every event has. `part` tells apart what several are made of one.
fn event(scene: &Scene<'_>, class: &Class, part: &str) -> Value {
    let event = scene.event;
    let (activity_id, activity_name) = &class.activity;
    let severity = severity(scene);
    json!({
        "activity_id": activity_id,
        "activity_name": activity_name,
        "category_uid": class.category.0,
        "category_name": class.category.1,
        "class_uid": class.uid,
        "class_name": class.name,
        "type_uid": class.uid * 100 + activity_id,
        "severity_id": severity.0,
        "severity": severity.1,
        "time": event.time_unix_us.div_euclid(1000),
        "message": facts::message(scene),
        "metadata": {
            "version": VERSION,
            "profiles": ["container", "host", "security_control"],
            "product": {"name": "Weir", "vendor_name": "Weir", "feature": {"name": event.kind.name()}},
            "uid": format!("{}/{}{part}", event.epoch, event.sequence),
            "sequence": i64::try_from(event.sequence).ok(),
            "correlation_uid": event.request,
            "event_code": event.kind.name(),
            "log_name": event.epoch,
            "log_provider": event.node,
            "tenant_uid": event.tenant,
        },
        "unmapped": {"weir": attested::texts(scene)},
    })
}

fn severity(scene: &Scene<'_>) -> (u32, &'static str) {
    match &scene.event.kind {
        Kind::Gap { .. } | Kind::Finding { .. } => (3, "Medium"),
        Kind::ConnectionRefused { .. } => (2, "Low"),
        Kind::RequestClosed(_) if scene.request.is_some_and(|request| request.refused.is_some()) => {
            (2, "Low")
        }
        _ => (1, "Informational"),
    }
}

/// What a verb does, in OCSF's words.
fn activity(request: &Request) -> (u32, String) {
    let attributes = &request.opened.attributes;
    let (id, name) = match attributes.verb.as_str() {
        _ if attributes.is_connect() => (99, "Connect"),
        "create" => (1, "Create"),
        "get" | "list" | "watch" => (2, "Read"),
        "update" | "patch" => (3, "Update"),
        "delete" | "deletecollection" => (4, "Delete"),
        "" => (0, "Unknown"),
        other => (99, other),
    };
    (id, name.to_owned())
}

/// A request that arrives, or is over.
fn api_activity(scene: &Scene<'_>, closed: Option<&RequestClosed>) -> Value {
    let request = scene.request;
    let opened = request.map(|request| &request.opened);
    let attributes = opened.map(|opened| &opened.attributes);
    let refused = request.and_then(|request| request.refused.as_ref());
    let mut all = event(scene, &Class::api(request), "");
    let more = json!({
        "actor": actor(scene),
        "api": {
            // Required, and not known where the request's beginning was not seen.
            "operation": attributes.map_or("unknown", |attributes| &attributes.verb),
            "version": attributes.map(|attributes| &attributes.api_version),
            "group": {"name": attributes.map(|attributes| &attributes.api_group)},
            "service": {"name": "kubernetes", "uid": scene.event.cluster},
            "request": {"uid": scene.event.request},
            "response": closed.map(|closed| json!({
                "code": closed.status,
                "error": refused.map(|_| "Refused"),
                "error_message": refused.map(|(_, reason)| reason).or(closed.reason.as_ref()),
            })),
        },
        "device": device(scene),
        "src_endpoint": source(scene),
        "dst_endpoint": destination(scene),
        "http_request": request.map(http_request),
        "http_response": closed.and_then(|closed| {
            let length = i64::try_from(closed.response_bytes).ok();
            closed.status.map(|code| json!({"code": code, "length": length}))
        }),
        "resources": request.and_then(resources),
        "policy": {"name": opened.and_then(|opened| opened.identity.as_ref()?.rule.as_ref())},
    });
    merge(&mut all, more);
    merge(&mut all, closed.map_or_else(opened_status, |closed| closed_status(scene, closed)));
    all
}

/// A request that has only arrived: what becomes of it, the line of its end says.
fn opened_status() -> Value {
    json!({"status_id": 99, "status": "Open", "action_id": 3, "action": "Observed"})
}

fn closed_status(scene: &Scene<'_>, closed: &RequestClosed) -> Value {
    let (status_id, status) = match End::of(closed) {
        End::Success => (1, "Success"),
        End::Failure => (2, "Failure"),
        End::Unknown => (99, attested::outcome(closed.outcome)),
    };
    let refused = scene.request.and_then(|request| request.refused.as_ref());
    let (action, disposition) = match refused {
        Some(_) => ((2, "Denied"), (2, "Blocked")),
        None => ((1, "Allowed"), (1, "Allowed")),
    };
    let start_us = scene.request.map(|request| request.opened_us);
    json!({
        "status_id": status_id,
        "status": status,
        "status_code": closed.status.map(|status| status.to_string()),
        "status_detail": refused.map(|(_, reason)| reason).or(closed.reason.as_ref()),
        "action_id": action.0,
        "action": action.1,
        "disposition_id": disposition.0,
        "disposition": disposition.1,
        "duration": closed.duration_us / 1000,
        "start_time": start_us.map(|us| us.div_euclid(1000)),
        "end_time": scene.event.time_unix_us.div_euclid(1000),
        "unmapped": {"weir": attested::of_end(scene.request, closed)},
    })
}

/// A process that exec starts in a pod, or its end with the code that the server says.
fn execution_activity(scene: &Scene<'_>, run: &Execution, closed: Option<&RequestClosed>) -> Value {
    let class = if closed.is_some() { Class::process(2, "Terminate") } else { Class::process(1, "Launch") };
    let mut all = event(scene, &class, "/process");
    let attributes = scene.request.map(|request| &request.opened.attributes);
    let pod = attributes.map(|attributes| format!("{}/{}", attributes.namespace, attributes.name));
    merge(
        &mut all,
        json!({
            "actor": actor(scene),
            "device": {"type_id": 99, "type": "Pod", "name": pod},
            "process": {
                "uid": scene.event.request,
                "name": run.command.first().map(|command| facts::base_name(command)),
                "cmd_line": run.command.join(" "),
                "container": {"name": run.container},
            },
            "exit_code": closed.and_then(|closed| closed.exit_code),
            "status_id": 1,
            "status": "Success",
        }),
    );
    // Whether it was started, nothing says at that time.
    if closed.is_none() {
        merge(&mut all, opened_status());
    }
    all
}

/// A process of a session that asks for the first time. When it was started, Weir has not seen.
fn asking_process(scene: &Scene<'_>) -> Value {
    let mut all = event(scene, &Class::process(99, "First request"), "");
    merge(
        &mut all,
        json!({
            "actor": actor(scene),
            "device": device(scene),
            "process": scene.process().map(|asking| process(scene, asking)),
            "status_id": 99,
            "status": "Observed",
        }),
    );
    all
}

/// What OCSF has no class for.
fn base_event(scene: &Scene<'_>) -> Value {
    let mut all = event(scene, &Class::base(scene.event.kind.name()), "");
    let known_actor = !scene.event.session.is_empty();
    merge(
        &mut all,
        json!({
            "actor": known_actor.then(|| actor(scene)),
            "device": device(scene),
            "status_id": 99,
            "status": "Observed",
            "unmapped": {"data": facts::data(scene.event)},
        }),
    );
    all
}

/// Who: the user as verified, else as the credential claims; the process; the session.
fn actor(scene: &Scene<'_>) -> Value {
    let verified = facts::verified_user(scene.request);
    let claimed = scene.caller().and_then(|caller| caller.user_or_claim());
    let groups =
        verified.map(|user| user.groups.iter().map(|name| json!({"name": name})).collect::<Vec<_>>());
    let identity = scene.request.and_then(|request| request.opened.identity.as_ref());
    let issuer = identity.and_then(|identity| identity.issuer.as_ref());
    json!({
        "user": {
            "name": verified.map(|user| user.username.as_str()).or(claimed),
            "uid": verified.map(|user| &user.uid),
            "groups": groups,
        },
        "process": scene.process().map(|asking| process(scene, asking)),
        "session": {"uid": scene.event.session, "issuer": issuer},
        "idp": {"name": issuer},
    })
}

fn process(scene: &Scene<'_>, process: &Process) -> Value {
    let name = facts::base_name(&process.executable);
    let file = (!name.is_empty()).then(|| json!({"name": name, "path": process.executable, "type_id": 1}));
    let pod = scene.caller().and_then(|caller| caller.pod.as_ref());
    json!({
        "pid": process.pid,
        "uid": scene.event.invocation,
        "name": name,
        "path": process.executable,
        "file": file,
        "cmd_line": process.argv.join(" "),
        "user": {"uid": process.uid.to_string()},
        "container": scene.container().map(|inner| container(inner, pod)),
    })
}

fn container(container: &Container, pod: Option<&Pod>) -> Value {
    json!({
        "name": container.name,
        "uid": container.id,
        "orchestrator": "Kubernetes",
        "pod_uuid": pod.map(|pod| &pod.uid).filter(|uid| uuid::Uuid::try_parse(uid).is_ok()),
    })
}

/// The pod that asks; else the node.
fn device(scene: &Scene<'_>) -> Value {
    match scene.caller().and_then(|caller| caller.pod.as_ref()) {
        Some(pod) => json!({
            "type_id": 99,
            "type": "Pod",
            "name": format!("{}/{}", pod.namespace, pod.name),
            "uid": pod.uid,
            "ip": pod.ip,
            "hostname": scene.event.node,
        }),
        None => json!({"type_id": 1, "type": "Server", "hostname": scene.event.node}),
    }
}

fn source(scene: &Scene<'_>) -> Value {
    let pod = scene.caller().and_then(|caller| caller.pod.as_ref());
    json!({
        "hostname": scene.event.node,
        "name": pod.map(|pod| format!("{}/{}", pod.namespace, pod.name)),
        "uid": pod.map(|pod| &pod.uid),
        "ip": pod.and_then(|pod| pod.ip.as_ref()),
        "container": scene.container().map(|inner| container(inner, pod)),
    })
}

fn destination(scene: &Scene<'_>) -> Value {
    let address = facts::dialled(scene);
    json!({
        "svc_name": "kube-apiserver",
        "name": scene.event.cluster,
        "ip": address.map(|address| address.ip().to_string()),
        "port": address.map(|address| address.port()),
    })
}

fn http_request(request: &Request) -> Value {
    let opened = &request.opened;
    let (path, query) = facts::path_and_query(request);
    json!({
        "http_method": METHODS.contains(&opened.method.as_str()).then_some(&opened.method),
        "url": {"scheme": "https", "path": path, "query_string": query},
        "user_agent": request.header("user-agent"),
        "version": opened.protocol,
        "body_length": opened.body.as_ref().and_then(|body| i64::try_from(body.wire_bytes).ok()),
    })
}

/// The object or collection; its path is its id.
fn resources(request: &Request) -> Option<Value> {
    let attributes = &request.opened.attributes;
    attributes.is_resource().then(|| {
        json!([{
            "uid": facts::path_and_query(request).0,
            "type": facts::resource(request),
            "namespace": attributes.namespace,
            "name": attributes.name,
        }])
    })
}
