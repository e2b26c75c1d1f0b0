//! What was said: pieces of bodies and streams, and the channels that they belong to.

use base64::Engine as _;
use serde::{Deserialize, Serialize};

/// A piece of a body or stream. JSON holds it as text where it is UTF-8, else as base64.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Content {
    /// Which.
    pub channel: Channel,
    /// Which of several, for what a port-forward carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<Connection>,
    /// Offset of the first byte within the channel's recorded content.
    pub offset: u64,
    /// The bytes.
    #[serde(flatten)]
    pub bytes: Bytes,
}

/// What a [`Content`] belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Channel {
    /// The request's body.
    RequestBody,
    /// The response's body.
    ResponseBody,
    /// Raw bytes of an upgraded connection, client to server.
    ClientRaw,
    /// Raw bytes of an upgraded connection, server to client.
    ServerRaw,
    /// What the client writes to the process (exec, attach).
    Stdin,
    /// What the process writes to its standard output, or to its terminal.
    Stdout,
    /// What the process writes to its standard error.
    Stderr,
    /// How the process ended, as the server says it: a Kubernetes `Status` in JSON from `v4.channel.k8s.io` on.
    Status,
    /// Sizes of the client's terminal, each a JSON object with `Width` and `Height`.
    Resize,
    /// Bytes of a forwarded connection towards the pod.
    PortIn,
    /// Bytes of a forwarded connection from the pod.
    PortOut,
    /// Why a forwarded connection failed, in words of the server.
    PortError,
}

impl Channel {
    /// Whether its bytes go from the client to the server.
    pub fn is_from_client(self) -> bool {
        match self {
            Self::RequestBody | Self::ClientRaw | Self::Stdin | Self::Resize | Self::PortIn => true,
            Self::ResponseBody
            | Self::ServerRaw
            | Self::Stdout
            | Self::Stderr
            | Self::Status
            | Self::PortOut
            | Self::PortError => false,
        }
    }
}

/// One of the connections that a port-forward carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// Port of the pod.
    pub port: u16,
    /// Number within the request, in no particular order.
    pub id: u32,
}

/// What becomes of a [`Channel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Change {
    /// It began: only for what a port-forward carries.
    Opened,
    /// Whoever writes to it has said that nothing follows.
    Ended,
    /// One side has broken it off.
    Reset,
}

/// Bytes in JSON: `{"text": …}` where they are UTF-8, else `{"base64": …}`, and where only
/// recipients may read them `{"encrypted": …}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Bytes {
    /// UTF-8.
    Text(String),
    /// Anything else, standard base64 with padding.
    Base64(String),
    /// For recipients alone: see [`crate::encryption`].
    Encrypted {
        /// Number of the key in the epoch.
        key: u64,
        /// Nonce, what is encrypted and its tag; standard base64 with padding.
        data: String,
    },
}

/// Why the bytes of a [`Content`] cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BytesError {
    /// Weir did not write it.
    #[error("content is not valid base64")]
    Base64(#[from] base64::DecodeError),
    /// They are for others.
    #[error("content is encrypted; name a private key that may read it with --identity FILE")]
    Encrypted,
}

impl Bytes {
    /// Text if the bytes are UTF-8 and do not grow much as JSON, else base64.
    pub fn from_slice(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) if escaped_bytes(bytes) <= bytes.len() + bytes.len() / 3 + 64 => {
                Self::Text(text.to_owned())
            }
            _ => Self::Base64(base64::engine::general_purpose::STANDARD.encode(bytes)),
        }
    }

    /// The bytes.
    ///
    /// # Errors
    /// The base64 is not valid, or they are encrypted.
    pub fn to_vec(&self) -> Result<Vec<u8>, BytesError> {
        match self {
            Self::Text(text) => Ok(text.clone().into_bytes()),
            Self::Base64(text) => Ok(base64::engine::general_purpose::STANDARD.decode(text)?),
            Self::Encrypted { .. } => Err(BytesError::Encrypted),
        }
    }
}

/// Length as a JSON string, so that no event outgrows a frame: a control character takes six bytes.
fn escaped_bytes(bytes: &[u8]) -> usize {
    // Counts, not a sum of lengths: the compiler counts many bytes at a time.
    let count = |is: fn(u8) -> bool| bytes.iter().filter(|byte| is(**byte)).count();
    let control = count(|byte| byte < 0x20);
    let short = count(|byte| matches!(byte, b'\n' | b'\r' | b'\t'));
    let quoted = count(|byte| matches!(byte, b'"' | b'\\'));
    bytes.len() + 5 * control - 4 * short + quoted
}
