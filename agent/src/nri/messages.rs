//! What a container runtime and a plugin say to each other, as far as Weir needs it.
//!
//! Numbers of fields are those of containerd/nri `pkg/api/api.proto` and containerd/ttrpc `request.proto`; what is left out is
//! passed over when it is read: environments and arguments of containers among it. The only file that imports prost.

use prost::Message;

use super::wire::{self, Kind, Service, WireError};

/// What the runtime is told: the plugin's name, and its place among the others, which are called in this order.
const PLUGIN: (&str, &str) = ("weir", "05");

/// Of NRI's events, those that the agent asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Event {
    Unknown = 0,
    RunPodSandbox = 1,
    StartContainer = 6,
}

/// A call.
#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    timeout_nano: i64,
}

/// An answer.
#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
struct RegisterPlugin {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    index: String,
}

/// The runtime introduces itself.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Configure {
    #[prost(string, tag = "2")]
    pub(super) runtime: String,
    #[prost(string, tag = "3")]
    pub(super) version: String,
    /// How long it waits for an answer, in milliseconds; 0 from those before NRI 0.8.
    #[prost(int64, tag = "5")]
    pub(super) request_timeout_ms: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Configured {
    #[prost(int32, tag = "2")]
    events: i32,
}

/// What runs already, and in an answer what is wanted of that: nothing.
#[derive(Clone, PartialEq, Message)]
struct Synchronize {
    #[prost(bool, tag = "3")]
    more: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Synchronized {
    #[prost(bool, tag = "2")]
    more: bool,
}

#[derive(Clone, PartialEq, Message)]
struct StateChange {
    #[prost(enumeration = "Event", tag = "1")]
    event: i32,
    #[prost(message, optional, tag = "2")]
    pod: Option<Sandbox>,
}

/// A pod as the runtime knows it.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Sandbox {
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    #[prost(string, tag = "3")]
    pub(crate) uid: String,
    #[prost(string, tag = "4")]
    pub(crate) namespace: String,
    #[prost(message, optional, tag = "8")]
    pub(crate) linux: Option<LinuxSandbox>,
    /// Of its sandbox, 0 if it has none.
    #[prost(uint32, tag = "9")]
    pub(crate) pid: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct LinuxSandbox {
    #[prost(string, tag = "3")]
    pub(crate) cgroup_parent: String,
}

/// What the runtime calls for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Call {
    Configure(Configure),
    Synchronize {
        /// Whether the list goes on in another call.
        more: bool,
    },
    /// A sandbox runs, and no container of it yet.
    SandboxRuns(Sandbox),
    /// A container is about to start.
    ContainerStarts(Sandbox),
    /// What the agent did not ask for, and what asks for nothing.
    Other,
}

/// Why what was said makes no sense.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    /// Not protobuf.
    #[error("what the runtime says is no message of NRI")]
    Decode(#[from] prost::DecodeError),
    /// The runtime takes no plugin.
    #[error("the runtime refuses the plugin: {0}")]
    Refused(String),
}

/// The agent's own call, with which all begins.
pub(super) fn register() -> Result<Vec<u8>, WireError> {
    let plugin = RegisterPlugin { name: PLUGIN.0.to_owned(), index: PLUGIN.1.to_owned() };
    let request = Request {
        service: "nri.pkg.api.v1alpha1.Runtime".to_owned(),
        method: "RegisterPlugin".to_owned(),
        payload: plugin.encode_to_vec(),
        timeout_nano: 0,
    };
    let (service, kind) = (Service::Runtime, Kind::Request);
    wire::Message { service, stream: 1, kind, data: request.encode_to_vec() }.encode()
}

/// What the runtime says to the agent's call.
///
/// # Errors
/// It refuses.
pub(super) fn registered(data: &[u8]) -> Result<(), MessageError> {
    match Response::decode(data)?.status {
        Some(status) if status.code != 0 => Err(MessageError::Refused(status.message)),
        _ => Ok(()),
    }
}

/// Reads a call of the runtime.
///
/// # Errors
/// It cannot be read.
pub(super) fn call(data: &[u8]) -> Result<Call, MessageError> {
    let request = Request::decode(data)?;
    let payload = request.payload.as_slice();
    Ok(match request.method.as_str() {
        "Configure" => Call::Configure(Configure::decode(payload)?),
        "Synchronize" => Call::Synchronize { more: Synchronize::decode(payload)?.more },
        "StateChange" => {
            let change = StateChange::decode(payload)?;
            match (change.event(), change.pod) {
                (Event::RunPodSandbox, Some(pod)) => Call::SandboxRuns(pod),
                (Event::StartContainer, Some(pod)) => Call::ContainerStarts(pod),
                _ => Call::Other,
            }
        }
        _ => Call::Other,
    })
}

/// The answer to a call. None fails: a pod is never kept from starting by what the agent says.
pub(super) fn answer(stream: u32, to: &Call) -> Result<Vec<u8>, WireError> {
    let bit = |event: Event| 1 << (event as i32 - 1);
    let payload = match to {
        Call::Configure(_) => {
            Configured { events: bit(Event::RunPodSandbox) | bit(Event::StartContainer) }.encode_to_vec()
        }
        // A list in parts goes on only if the plugin repeats that there is more.
        Call::Synchronize { more } => Synchronized { more: *more }.encode_to_vec(),
        Call::SandboxRuns(_) | Call::ContainerStarts(_) | Call::Other => Vec::new(),
    };
    let data = Response { status: None, payload }.encode_to_vec();
    wire::Message { service: Service::Plugin, stream, kind: Kind::Response, data }.encode()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a runtime sends.
    pub(crate) fn calls(stream: u32, method: &str, payload: Vec<u8>) -> Vec<u8> {
        let service = "nri.pkg.api.v1alpha1.Plugin".to_owned();
        let request = Request { service, method: method.to_owned(), payload, timeout_nano: 2_000_000_000 };
        let data = request.encode_to_vec();
        wire::Message { service: Service::Plugin, stream, kind: Kind::Request, data }.encode().expect("short")
    }

    /// How it introduces itself.
    pub(crate) fn configure(request_timeout_ms: i64) -> Vec<u8> {
        Configure { request_timeout_ms, ..Configure::default() }.encode_to_vec()
    }

    /// That a container of this pod starts.
    pub(crate) fn container_starts(uid: &str, pid: u32) -> Vec<u8> {
        let (name, namespace) = ("first".to_owned(), "jobs".to_owned());
        let pod = Sandbox { name, uid: uid.to_owned(), namespace, pid, linux: None };
        StateChange { event: Event::StartContainer.into(), pod: Some(pod) }.encode_to_vec()
    }

    #[track_caller]
    fn answered(bytes: &[u8]) -> Response {
        let messages = wire::Decoder::default().push(bytes).expect("is NRI");
        Response::decode(messages[0].data.as_slice()).expect("is an answer")
    }

    #[test]
    fn only_the_events_that_pods_wait_for_are_asked_for() {
        let bytes = answer(3, &Call::Configure(Configure::default())).expect("is short");
        let configured = Configured::decode(answered(&bytes).payload.as_slice()).expect("is an answer");
        assert_eq!(configured.events, 0b10_0001);
    }

    #[test]
    fn a_list_in_parts_goes_on_to_its_end() {
        let payload = Synchronize { more: true }.encode_to_vec();
        let data =
            Request { method: "Synchronize".to_owned(), payload, ..Request::default() }.encode_to_vec();
        let read = call(&data).expect("is a call");
        assert_eq!(read, Call::Synchronize { more: true });
        let answer = answered(&answer(5, &read).expect("is short"));
        assert!(Synchronized::decode(answer.payload.as_slice()).expect("is an answer").more);
    }

    #[test]
    fn what_was_not_asked_for_is_answered_with_nothing() {
        let data = Request { method: "CreateContainer".to_owned(), ..Request::default() }.encode_to_vec();
        assert_eq!(call(&data).expect("is a call"), Call::Other);
        assert_eq!(answered(&answer(7, &Call::Other).expect("is short")), Response::default());
    }

    #[test]
    fn a_runtime_that_takes_no_plugin_says_why() {
        let refused = Status { code: 3, message: "invalid plugin index".to_owned() };
        let data = Response { status: Some(refused), payload: Vec::new() }.encode_to_vec();
        let error = registered(&data).expect_err("is refused").to_string();
        assert_eq!(error, "the runtime refuses the plugin: invalid plugin index");
        assert!(registered(&[]).is_ok());
    }
}
