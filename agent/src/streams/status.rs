//! The exit code in the status that ends an exec: `k8s.io/apimachinery` `metav1.Status`, as `v4.channel.k8s.io` has it.

use serde::Deserialize;

/// Most bytes of a status that are looked into.
const STATUS_BYTES_MAX: usize = 64 * 1024;

/// The status channel so far.
#[derive(Debug, Default)]
pub(super) struct Status {
    bytes: Vec<u8>,
}

#[derive(Deserialize)]
struct Said {
    status: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    details: Option<Details>,
}

#[derive(Default, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Deserialize)]
struct Cause {
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
}

impl Status {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = STATUS_BYTES_MAX - self.bytes.len();
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// Whether it is whole, or longer than what is looked into.
    pub(super) fn is_said(&self) -> bool {
        self.bytes.len() == STATUS_BYTES_MAX || serde_json::from_slice::<Said>(&self.bytes).is_ok()
    }

    pub(super) fn exit_code(&self) -> Option<i32> {
        let said: Said = serde_json::from_slice(&self.bytes).ok()?;
        match (said.status.as_str(), said.reason.as_str()) {
            ("Success", _) => Some(0),
            ("Failure", "NonZeroExitCode") => {
                let causes = said.details.unwrap_or_default().causes;
                causes.iter().find(|cause| cause.reason == "ExitCode")?.message.parse().ok()
            }
            _ => None,
        }
    }
}
