//! What several formats say of an event: its data, words for it, how a request ended, addresses.

use std::net::SocketAddr;

use serde_json::Value;
use weir_common::event::{ActsAs, Event, Kind, Outcome, RequestClosed, UserInfo};

use super::context::{Request, Scene};

/// How a request ended, for formats that have three words for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The client got an answer that is no error, or as much of a lasting one as it wanted.
    Success,
    /// It got an error, a refusal, or no whole answer.
    Failure,
    /// It was broken off by the client, or by the agent's end.
    Unknown,
}

impl End {
    pub(super) fn of(closed: &RequestClosed) -> Self {
        match (closed.outcome, closed.status) {
            (Outcome::Refused | Outcome::UpstreamFailed, _) | (_, Some(400..)) => Self::Failure,
            (Outcome::Complete, Some(_)) => Self::Success,
            _ => Self::Unknown,
        }
    }
}

/// What an event says, as the record has it.
pub(super) fn data(event: &Event) -> Value {
    let recorded = serde_json::to_value(&event.kind).unwrap_or_default();
    recorded.get("data").cloned().unwrap_or_default()
}

/// The user that Weir has verified.
pub(super) fn verified_user(request: Option<&Request>) -> Option<&UserInfo> {
    let user = &request?.opened.identity.as_ref()?.user;
    (!user.username.is_empty()).then_some(user)
}

/// The user whom the agent impersonates.
pub(super) fn acted_user(request: Option<&Request>) -> Option<&UserInfo> {
    match request?.opened.identity.as_ref()?.acts_as.as_ref()? {
        ActsAs::Impersonate { user } => Some(user),
        ActsAs::PassThrough | ActsAs::Role { .. } => None,
    }
}

/// The address that was dialled.
pub(super) fn dialled(scene: &Scene<'_>) -> Option<SocketAddr> {
    scene.caller()?.dialled.parse().ok()
}

/// A path's last part: of an executable its name.
pub(super) fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

/// Path and query of a request.
pub(super) fn path_and_query(request: &Request) -> (&str, &str) {
    request.opened.uri.split_once('?').unwrap_or((&request.opened.uri, ""))
}

/// Resource with subresource: `pods/exec`; empty for a path that is none.
pub(super) fn resource(request: &Request) -> String {
    let attributes = &request.opened.attributes;
    let slash = if attributes.subresource.is_empty() { "" } else { "/" };
    format!("{}{slash}{}", attributes.resource, attributes.subresource)
}

/// A request in words: `get pods/exec web/a`, `get /version`.
pub(super) fn words(request: &Request) -> String {
    let attributes = &request.opened.attributes;
    let verb = &attributes.verb;
    if !attributes.is_resource() {
        return format!("{verb} {}", path_and_query(request).0);
    }
    let object = format!("{}/{}", attributes.namespace, attributes.name);
    format!("{verb} {} {}", resource(request), object.trim_matches('/')).trim_end().to_owned()
}

/// An event in words.
pub(super) fn message(scene: &Scene<'_>) -> String {
    let asked = scene.request.map_or_else(|| "a request".to_owned(), words);
    match &scene.event.kind {
        Kind::AgentStarted { version, .. } => format!("agent {version} started"),
        Kind::AgentStopped { reason } => format!("agent stopped: {reason}"),
        Kind::SessionStarted { .. } => "session started".to_owned(),
        Kind::InvocationStarted { process, .. } => format!("{} asks", base_name(&process.executable)),
        Kind::RequestOpened(_) => asked,
        Kind::RequestRefused { status, reason } => format!("{asked}: refused with {status}: {reason}"),
        Kind::RoleAssumed(role) => format!("role assumed: {}", role.assumed_role_arn),
        Kind::Content(_) | Kind::ChannelChanged { .. } => format!("{asked}: content"),
        Kind::ObjectsNamed(named) => {
            let first = named.objects.first().map(|object| format!("{} {}", object.kind, object.name));
            let more = named.objects.len().saturating_sub(1) as u64 + named.left_out;
            format!("{asked}: its body holds {} and {more} more", first.unwrap_or_default())
        }
        Kind::FileCopied(file) => format!("file copied: {}", file.path),
        Kind::ConnectionForwarded(forwarded) => {
            format!("connection to port {} forwarded", forwarded.connection.port)
        }
        Kind::ResponseStarted { status, .. } => format!("{asked}: {status}"),
        Kind::RequestClosed(closed) => match closed.status {
            Some(status) => format!("{asked}: {status}"),
            None => format!("{asked}: no answer"),
        },
        Kind::ConnectionRefused { reason, .. } => format!("connection refused: {reason}"),
        Kind::Gap { reason, .. } => format!("gap in the record: {reason}"),
        Kind::Finding { name, message, .. } => format!("{name}: {message}"),
        Kind::Coverage(coverage) => format!("connections of {} pods counted", coverage.pods.len()),
    }
}
