//! What streams carried: files in archives, connections through a port-forward.

use serde::{Deserialize, Serialize};

use super::{Channel, Connection};

/// A file or link in a tar archive that passed through exec, as `kubectl cp` sends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileCopied {
    /// `stdin`: into the container; `stdout`: out of it.
    pub channel: Channel,
    /// Path in the archive; bytes that are not UTF-8 are replaced.
    pub path: String,
    /// Length, as the archive says it; 0 for a link.
    pub bytes: u64,
    /// Digest of the content, `sha256:…`; none for a link, and where the content is not whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Where a link leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
    /// How many of its bytes passed, where the stream ended before the file did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed_bytes: Option<u64>,
}

/// A connection through a port-forward, when it is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionForwarded {
    /// Which.
    pub connection: Connection,
    /// Bytes towards the pod.
    pub bytes_in: u64,
    /// Bytes from the pod.
    pub bytes_out: u64,
    /// What the client speaks, where its first bytes say so: `tls`, `http/1`, `h2`, `ssh`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Whom a TLS client asks for (SNI).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}
