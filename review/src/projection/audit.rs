//! `audit.k8s.io/v1`: what the API server's own audit log would say, with what Weir knows besides in annotations ([`super::attested`]).
//!
//! A request is told when it arrives (`RequestReceived`), where its answer lasts also when that begins (`ResponseStarted`), and when it is
//! over (`ResponseComplete`), as the API server tells it (k8s.io/apiserver `pkg/endpoints/filters/audit.go`). `Panic` is the API server's own:
//! Weir sees a connection that fails, and says so in `weir.dev/outcome`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use weir_common::{
    event::{BodySummary, Channel, Kind, RequestClosed, UserInfo},
    message::rfc3339,
};

use super::{
    attested::{self, Texts},
    body::{Body, Missing},
    context::{Request, Scene},
    facts, known, protobuf,
};

/// What a client's own headers of impersonation begin with.
const IMPERSONATED_EXTRA: &str = "impersonate-extra-";

/// The line of an event, if it is one.
pub(super) fn lines(scene: &Scene<'_>) -> Vec<String> {
    let line = match (&scene.event.kind, scene.request) {
        (Kind::RequestOpened(_), _) => audit(scene, "RequestReceived"),
        (Kind::ResponseStarted { status, .. }, Some(request)) if request.is_long_running() => {
            let mut audit = audit(scene, "ResponseStarted");
            audit.insert("responseStatus".into(), json!({"metadata": {}, "code": status}));
            audit
        }
        (Kind::RequestClosed(closed), _) => complete(scene, closed),
        _ => return Vec::new(),
    };
    vec![Value::Object(line).to_string()]
}

/// Whether what the event says stands in the line of a later one.
pub(super) fn is_told_later(scene: &Scene<'_>) -> bool {
    match scene.event.kind {
        Kind::SessionStarted { .. }
        | Kind::InvocationStarted { .. }
        | Kind::RoleAssumed(_)
        | Kind::RequestRefused { .. }
        | Kind::ResponseStarted { .. }
        | Kind::FileCopied(_)
        | Kind::ConnectionForwarded(_) => true,
        Kind::Gap { .. } => scene.request.is_some(),
        Kind::Content(ref content) => {
            let body = matches!(content.channel, Channel::RequestBody | Channel::ResponseBody);
            body && scene.request.is_some_and(|request| !request.is_long_running())
        }
        _ => false,
    }
}

/// What every stage has.
fn audit(scene: &Scene<'_>, stage: &str) -> Map<String, Value> {
    let (event, request) = (scene.event, scene.request);
    let opened = request.map(|request| &request.opened);
    // A stage is never before the request, also where a clock was set back in between.
    let received_us = request.map_or(event.time_unix_us, |request| request.opened_us);
    let stage_us = event.time_unix_us.max(received_us);
    let optional = json!({
        "sourceIPs": scene.caller().and_then(|caller| caller.pod.as_ref()?.ip.as_ref()).map(|ip| [ip]),
        "userAgent": request.and_then(|request| request.header("user-agent")),
        "objectRef": object_reference(request),
        "impersonatedUser": impersonated(request),
    });
    let required = json!({
        "kind": "Event",
        "apiVersion": "audit.k8s.io/v1",
        "level": "Metadata",
        "auditID": event.request,
        "stage": stage,
        "requestURI": opened.map_or("", |opened| &opened.uri),
        "verb": opened.map_or("", |opened| &opened.attributes.verb),
        "user": user(scene),
        "requestReceivedTimestamp": rfc3339(received_us),
        "stageTimestamp": rfc3339(stage_us),
        "annotations": annotations(attested::texts(scene)),
    });
    let mut all = fields(required);
    all.extend(known(optional).map(fields).unwrap_or_default());
    all
}

fn annotations(texts: Texts) -> Map<String, Value> {
    texts.into_iter().map(|(name, text)| (format!("weir.dev/{name}"), text.into())).collect()
}

fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// The end, with the objects that are on record.
fn complete(scene: &Scene<'_>, closed: &RequestClosed) -> Map<String, Value> {
    let mut audit = audit(scene, "ResponseComplete");
    let mut texts = attested::of_end(scene.request, closed);
    // As for the API server: only requests for resources have objects.
    let request = scene.request.filter(|request| request.opened.attributes.is_resource());
    let mut object = |name: &str, body: &Body, summary: &Option<BodySummary>| {
        let object = recorded(body, summary.as_ref());
        if let Err(missing) = &object {
            let name = if name == "requestObject" { "request-object" } else { "response-object" };
            texts.insert(format!("{name}-omitted"), missing.text().to_owned());
        }
        object.ok().flatten()
    };
    let [sent, answered] = match request {
        Some(request) => [
            object("requestObject", &request.request_body, &request.opened.body),
            if request.is_long_running() {
                None
            } else {
                object("responseObject", &request.response_body, &closed.body)
            },
        ],
        None => [None, None],
    };
    let level = match (&sent, &answered) {
        (_, Some(_)) => "RequestResponse",
        (Some(_), None) => "Request",
        (None, None) => "Metadata",
    };
    audit.insert("level".into(), level.into());
    if let Some(status) = response_status(scene.request, closed, answered.as_ref()) {
        audit.insert("responseStatus".into(), status);
    }
    let protobuf = || request.and_then(|request| protobuf::names(request.request_body.bytes()));
    let names = sent.as_ref().map(|object| object["metadata"].clone()).or_else(protobuf);
    if audit["verb"] == "create" {
        name_new_object(&mut audit, &names.unwrap_or_default());
    }
    audit.extend(sent.map(|object| ("requestObject".to_owned(), object)));
    audit.extend(answered.map(|object| ("responseObject".to_owned(), object)));
    if let Some(Value::Object(all)) = audit.get_mut("annotations") {
        all.append(&mut annotations(texts));
    }
    audit
}

/// The object that a body holds; none where there is none.
fn recorded(body: &Body, summary: Option<&BodySummary>) -> Result<Option<Value>, Missing> {
    if summary.is_some_and(|summary| summary.truncated.is_some()) {
        return Err(Missing::NotWhole);
    }
    body.object(summary.map(|summary| summary.recorded_bytes))
}

/// What the client got. An error's words are those of its `Status`, or of Weir where it refused.
fn response_status(
    request: Option<&Request>,
    closed: &RequestClosed,
    answered: Option<&Value>,
) -> Option<Value> {
    let refused = request.and_then(|request| request.refused.as_ref());
    let code = closed.status.or(refused.map(|(status, _)| *status))?;
    if code < 400 {
        return Some(json!({"metadata": {}, "code": code}));
    }
    let status = answered.filter(|object| object["kind"] == "Status");
    let said = |name: &str| status.and_then(|status| status[name].as_str());
    let message = refused.map(|(_, reason)| reason.as_str()).or(said("message"));
    let words = known(json!({"status": "Failure", "message": message, "reason": said("reason")}));
    let mut all = words.map(fields).unwrap_or_default();
    all.insert("metadata".into(), json!({}));
    all.insert("code".into(), code.into());
    Some(Value::Object(all))
}

fn object_reference(request: Option<&Request>) -> Option<Value> {
    let attributes = &request.filter(|request| request.opened.attributes.is_resource())?.opened.attributes;
    Some(json!({
        "resource": attributes.resource,
        "namespace": attributes.namespace,
        "name": attributes.name,
        "apiGroup": attributes.api_group,
        "apiVersion": attributes.api_version,
        "subresource": attributes.subresource,
    }))
}

/// A request that creates says the name in its object alone; the API server takes it from there, too.
fn name_new_object(audit: &mut Map<String, Value>, metadata: &Value) {
    let Some(reference) = audit.get_mut("objectRef").and_then(Value::as_object_mut) else { return };
    for name in ["name", "namespace", "uid", "resourceVersion"] {
        let said = metadata[name].as_str().filter(|text| !text.is_empty());
        if let (false, Some(text)) = (reference.contains_key(name), said) {
            reference.insert(name.to_owned(), text.into());
        }
    }
}

fn user_info(user: &UserInfo) -> Value {
    json!({"username": user.username, "uid": user.uid, "groups": user.groups, "extra": user.extra})
}

/// Whom it is for: as verified, else as the credential claims (`weir.dev/user-verified` tells which).
fn user(scene: &Scene<'_>) -> Value {
    let verified = facts::verified_user(scene.request);
    let claimed = || json!({"username": scene.caller()?.user_or_claim()?}).into();
    verified.map(user_info).or_else(claimed).and_then(known).unwrap_or_else(|| json!({}))
}

/// As whom it goes on: whom the agent impersonates, else whom the client asks to be.
fn impersonated(request: Option<&Request>) -> Option<Value> {
    let request = request?;
    if let Some(user) = facts::acted_user(Some(request)) {
        return Some(user_info(user));
    }
    let extra = request.opened.headers.iter().filter_map(|header| {
        Some((header.name.strip_prefix(IMPERSONATED_EXTRA)?.to_owned(), header.value.clone()))
    });
    let mut extras: BTreeMap<String, Vec<String>> = BTreeMap::new();
    extra.for_each(|(name, value)| extras.entry(name).or_default().push(value));
    let user = UserInfo {
        username: request.header("impersonate-user").unwrap_or_default().to_owned(),
        uid: request.header("impersonate-uid").unwrap_or_default().to_owned(),
        groups: request.headers("impersonate-group").map(str::to_owned).collect(),
        extra: extras,
    };
    (!user.username.is_empty()).then(|| user_info(&user))
}
