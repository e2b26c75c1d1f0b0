//! How containers are held back until their pods are enrolled.

use std::path::PathBuf;

use serde::Deserialize;

use super::raw::{Invalid, invalid};
use crate::nri::STANDARD_SOCKET;

// As it is written.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawNri {
    /// Whether to ask for it. Where the socket is not there, pods are found by their cgroups alone, and tried again for.
    enabled: bool,
    /// The runtime's socket, an absolute path: mount its folder where the agent runs in a pod.
    socket: PathBuf,
}

impl Default for RawNri {
    fn default() -> Self {
        Self { enabled: true, socket: STANDARD_SOCKET.into() }
    }
}

impl RawNri {
    pub(super) fn validate(self) -> Result<Option<PathBuf>, Invalid> {
        if !self.socket.is_absolute() {
            return invalid("nri.socket", "must be an absolute path");
        }
        Ok(self.enabled.then_some(self.socket))
    }
}
