//! The canonical event: the one schema of what Weir records, versioned and append-only.
//!
//! An event is serialised once, as JSON, into the value of a journal frame; exactly those bytes go to Kafka.
//! Fields may be added (readers ignore what they do not know), never renamed, removed or given another meaning
//! without a new [`SCHEMA_VERSION`]. No type here can hold an unmasked body: what arrives is masked already, and
//! no credential has a place in it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::attributes::{Attributes, Execution};

mod carried;
mod content;
mod identity;
mod object;

pub use carried::{ConnectionForwarded, FileCopied};
pub use content::{Bytes, BytesError, Change, Channel, Connection, Content};
pub use identity::{ActsAs, Identity, IdentityMethod, RoleAssumed, UserInfo};
pub use object::{NamedObject, ObjectsNamed};

/// Version of this schema, in every event.
pub const SCHEMA_VERSION: u32 = 1;

/// Most bytes of body or stream in one event, before base64; longer content is split over several events.
pub const CONTENT_BYTES_MAX: usize = 256 * 1024;

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// [`SCHEMA_VERSION`].
    pub schema: u32,
    /// Position in the journal of this agent epoch, from 0, without holes.
    pub sequence: u64,
    /// When the agent saw it, in microseconds since the Unix epoch.
    pub time_unix_us: i64,
    /// Name of the cluster the request is for; empty for events of the agent itself.
    pub cluster: String,
    /// Tenant, if the configuration names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Name of the node (or host) the agent runs on.
    pub node: String,
    /// Id of the agent's process epoch: its journal folder bears the same name.
    pub epoch: String,
    /// Session (caller × pod × cluster): key in Kafka. Empty for events of the agent itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub session: String,
    /// Invocation (the requests of one process).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invocation: Option<String>,
    /// Request; the `Audit-ID` that the API server's own audit log has for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub kind: Kind,
}

/// What happened; `type` names it in JSON, `data` holds the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Kind {
    /// The agent started an epoch.
    AgentStarted {
        /// Version of the agent.
        version: String,
        /// Epoch this one follows, if one is known, with the root of its last signed checkpoint.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        predecessor: Option<Predecessor>,
    },
    /// The agent ends its epoch in an orderly way: nothing follows.
    AgentStopped {
        /// Why, for example `SIGTERM`.
        reason: String,
    },
    /// First request of a caller from a pod to a cluster, or the first after the idle timeout.
    SessionStarted {
        /// Who.
        caller: Box<Caller>,
    },
    /// First request of a process within a session.
    InvocationStarted {
        /// The process.
        process: Process,
        /// The container it runs in, if it is in one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        container: Option<Container>,
    },
    /// A request arrived; durable before it is forwarded if it is a mutation or opens a stream.
    RequestOpened(Box<RequestOpened>),
    /// A request was refused by Weir, not forwarded.
    RequestRefused {
        /// HTTP status that the client got.
        status: u16,
        /// Reason, as the client got it.
        reason: String,
    },
    /// A session's requests go on in an AWS IAM role from here on, with these credentials: what CloudTrail and the
    /// cluster's audit log say of them leads back here.
    RoleAssumed(Box<RoleAssumed>),
    /// A piece of a body or stream.
    Content(Content),
    /// Which objects a body that is not text holds.
    ObjectsNamed(Box<ObjectsNamed>),
    /// A channel of an upgraded connection begins or ends.
    ChannelChanged {
        /// Which.
        channel: Channel,
        /// Which of several, for what a port-forward carries.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        connection: Option<Connection>,
        /// What becomes of it.
        change: Change,
    },
    /// A file went through exec in a tar archive, as with `kubectl cp`.
    FileCopied(Box<FileCopied>),
    /// A connection through a port-forward is over.
    ConnectionForwarded(Box<ConnectionForwarded>),
    /// The answer's status and headers arrived.
    ResponseStarted {
        /// HTTP status.
        status: u16,
        /// Headers that are recorded; credentials are masked.
        headers: Vec<Header>,
    },
    /// A request is over; the second half of the pair that [`Kind::RequestOpened`] begins.
    RequestClosed(Box<RequestClosed>),
    /// A connection that never became a request: no flow record, plain HTTP, garbage, a failed handshake.
    ConnectionRefused {
        /// Why.
        reason: String,
        /// Who, as far as known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        caller: Option<Box<Caller>>,
    },
    /// Something is missing from the record, and this is why.
    Gap {
        /// Why, in words.
        reason: String,
        /// Events that are missing, if the number is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        events: Option<u64>,
        /// Bytes that are missing, if the number is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
    },
    /// Something an operator should know, for example a pod whose environment sets a proxy.
    Finding {
        /// Stable name, for example `proxyEnvironment`.
        name: String,
        /// In words, with the mend.
        message: String,
        /// Who, as far as known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        caller: Option<Box<Caller>>,
    },
    /// What the kernel saw of each pod since the last event of this kind, against what reached the proxy: the proof that
    /// nothing went past. Written also when nothing happened.
    Coverage(Box<Coverage>),
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for this signature")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Connections to API servers, as counted in the kernel and in the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Coverage {
    /// How long ago counting began, ms: since the last event of this kind, or the agent's start.
    pub interval_ms: u64,
    /// The pods that connected to anything of the API set; others did not.
    pub pods: Vec<PodCoverage>,
    /// Pods that are left out, since there are too many for one event.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pods_left_out: u64,
}

/// The same for one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodCoverage {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// How its connections are treated: `enrolled`, `observed`, `unselected`.
    pub class: String,
    /// Connects to the API set that the hooks saw.
    pub seen: u64,
    /// Connects that were redirected to the listener.
    pub redirected: u64,
    /// Connections that the listener accepted and handed to the proxy. Fewer than were redirected: clients that gave
    /// up, or found no listener since the agent was away.
    pub proxied: u64,
    /// Connects that went where they were meant to: none, for an enrolled pod.
    pub passed: u64,
    /// Connects that were denied.
    pub denied: u64,
    /// Packets that a guard dropped.
    pub dropped: u64,
}

/// The epoch before this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Predecessor {
    /// Its id.
    pub epoch: String,
    /// Number of leaves its last checkpoint covers.
    pub size: u64,
    /// Root of its last checkpoint, hex.
    pub root: String,
}

/// Who is behind a connection: what the kernel and the cluster know, apart from what the client claims.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Caller {
    /// The pod; none for `weir-agent exec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// The container, by cgroup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// The process that connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// Cgroup id of the task that connected.
    pub cgroup: u64,
    /// Network namespace cookie of its socket.
    pub netns: u64,
    /// The address it dialled, `ip:port`.
    pub dialled: String,
    /// User name that the presented credential claims, not verified by Weir in pass-through mode: the subject of
    /// a JWT, the common name of a client certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claimed_user: Option<String>,
    /// User name that Weir has verified, as the configuration maps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl Caller {
    /// The user that Weir has verified, or else the one that the credential claims.
    pub fn user_or_claim(&self) -> Option<&str> {
        self.user.as_deref().or(self.claimed_user.as_deref())
    }
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID: what identity is compared by.
    pub uid: String,
    /// Service account.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service_account: String,
    /// IP address, for X-Forwarded-For.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// Session intent: configured annotations of the pod.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub intent: BTreeMap<String, String>,
}

/// A container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Runtime id, from the cgroup's name.
    pub id: String,
    /// Name in the pod, if the pod's status has it already.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
}

/// A process. `pid` and `uid` come from the kernel; `argv` is a claim, since a process can rewrite it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Process id in the initial pid namespace.
    pub pid: u32,
    /// Start in ns since boot.
    pub start_boottime_ns: u64,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// Path of the executable as the process sees it; empty if the process had ended before it could be read.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub executable: String,
    /// Arguments, credentials masked; a claim. Bounded in number and size.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub argv: Vec<String>,
}

/// A header of a request or response. The value of a credential header is masked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Name, lower case.
    pub name: String,
    /// Value, or its mask; bytes that are not UTF-8 are replaced.
    pub value: String,
}

/// A request as it arrived.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestOpened {
    /// HTTP method.
    pub method: String,
    /// Path and query as sent.
    pub uri: String,
    /// `HTTP/1.1` or `HTTP/2`.
    pub protocol: String,
    /// Headers; credentials are masked.
    pub headers: Vec<Header>,
    /// What it means.
    pub attributes: Attributes,
    /// What it runs in a pod or attaches to there; none for other requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution: Option<Box<Execution>>,
    /// The protocol it asks to upgrade to, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<String>,
    /// Who it is for, as Weir has verified it, and as whom it goes on; none where that failed (the refusal says why)
    /// and under `weir-agent exec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Box<Identity>>,
    /// How its body is recorded; none where there is no body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<BodySummary>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestClosed {
    /// HTTP status that the client got; none if it got none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, where the outcome is not `complete`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Bytes of the response body (or of the upgraded stream, server to client) that were forwarded.
    pub response_bytes: u64,
    /// Bytes of the upgraded stream, client to server, that were forwarded; 0 for others.
    #[serde(default)]
    pub client_bytes: u64,
    /// From arrival to end, in microseconds.
    pub duration_us: u64,
    /// Exit code of a process that was run by exec, as the server says it; none where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// How the response body is recorded; none where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<BodySummary>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// The whole response was forwarded; of an exec or attach, also how it ended.
    Complete,
    /// The client went away.
    ClientAborted,
    /// The API server failed or closed in the middle, or ended a stream in good order that was not over.
    UpstreamFailed,
    /// Weir refused it.
    Refused,
    /// The agent had to cut it (drain limit).
    Drained,
}

/// How a body is recorded. What a limit or mask left out is said here, never silently.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BodySummary {
    /// Length as it went over the wire.
    pub wire_bytes: u64,
    /// Length of the content that is recorded (decoded and masked).
    pub recorded_bytes: u64,
    /// Content encoding that was removed before masking, for example `gzip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decoded: Option<String>,
    /// Digest of the recorded content: `sha256:…`, or `hmac-sha256:…` (keyed per cluster) of the whole content
    /// where a mask applied or the content was cut. Where content is encrypted, `content-hmac-sha256:…` of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Number of values that a mask replaced.
    #[serde(default)]
    pub masked: u64,
    /// Why the recorded content is shorter than the whole; none if it is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncated: Option<String>,
}

impl Kind {
    /// The name that stands in `type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AgentStarted { .. } => "agentStarted",
            Self::AgentStopped { .. } => "agentStopped",
            Self::SessionStarted { .. } => "sessionStarted",
            Self::InvocationStarted { .. } => "invocationStarted",
            Self::RequestOpened(_) => "requestOpened",
            Self::RequestRefused { .. } => "requestRefused",
            Self::RoleAssumed(_) => "roleAssumed",
            Self::Content(_) => "content",
            Self::ObjectsNamed(_) => "objectsNamed",
            Self::ChannelChanged { .. } => "channelChanged",
            Self::FileCopied(_) => "fileCopied",
            Self::ConnectionForwarded(_) => "connectionForwarded",
            Self::ResponseStarted { .. } => "responseStarted",
            Self::RequestClosed(_) => "requestClosed",
            Self::ConnectionRefused { .. } => "connectionRefused",
            Self::Gap { .. } => "gap",
            Self::Finding { .. } => "finding",
            Self::Coverage(_) => "coverage",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Bytes, CONTENT_BYTES_MAX, Channel, Content, Event, Kind, SCHEMA_VERSION};
    use crate::frame::VALUE_BYTES_MAX;

    fn event(kind: Kind) -> Event {
        Event {
            schema: SCHEMA_VERSION,
            sequence: 7,
            time_unix_us: 1,
            cluster: "c".into(),
            tenant: None,
            node: "n".into(),
            epoch: "e".into(),
            session: String::new(),
            invocation: None,
            request: None,
            kind,
        }
    }

    #[test]
    fn content_has_its_name_as_type_and_round_trips_whatever_its_bytes_are() {
        for bytes in [&b"text \"quoted\""[..], b"\xff\x00", b"", b"\x01\x02\x03"] {
            let content = Content {
                channel: Channel::ResponseBody,
                connection: None,
                offset: 3,
                bytes: Bytes::from_slice(bytes),
            };
            let event = event(Kind::Content(content));
            let json = serde_json::to_string(&event).unwrap();
            assert!(json.contains(&format!("\"type\":\"{}\"", event.kind.name())), "{json}");
            let back: Event = serde_json::from_str(&json).unwrap();
            assert_eq!(back, event);
            let Kind::Content(content) = back.kind else { panic!("{json}") };
            assert_eq!(content.bytes.to_vec().unwrap(), bytes);
        }
    }

    #[test]
    fn no_content_outgrows_a_frame() {
        for byte in [b'"', 1, 0xff, b'a'] {
            let bytes = Bytes::from_slice(&vec![byte; CONTENT_BYTES_MAX]);
            let event = event(Kind::Content(Content {
                channel: Channel::ClientRaw,
                connection: None,
                offset: 0,
                bytes,
            }));
            assert!(serde_json::to_vec(&event).unwrap().len() < VALUE_BYTES_MAX);
        }
    }
}
