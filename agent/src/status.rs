//! `weir-agent status`: whether an agent is alive on this node, and what is in force in the kernel.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;

use crate::{
    emergency::{self, Emergency, EmergencyError},
    interception::{
        foreign, handover,
        loader::{self, KernelError},
        pinned::{self, PinnedState},
        presence::Presence,
    },
};

/// Why the state is not known.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// No agent has been here, or it was uninstalled.
    #[error(
        "nothing is pinned under {}, so nothing is intercepted and pods reach their API servers directly; is \
         `weir-agent run` running on this node?", folder.display()
    )]
    NothingPinned {
        /// The folder of pins.
        folder: PathBuf,
    },
    /// The pins cannot be read.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The emergency switch cannot be read.
    #[error(transparent)]
    Emergency(#[from] EmergencyError),
}

/// The state of this node.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Whether an agent is alive.
    pub agent: Presence,
    /// What somebody asked for. Whether the agent takes it up is its configuration's to say.
    pub emergency: Option<Emergency>,
    /// Programs of others that decide where connections of pods go.
    #[serde(rename = "foreignPrograms")]
    pub foreign_programs: Vec<String>,
    /// What is in force.
    #[serde(flatten)]
    pub pinned: PinnedState,
}

/// Reads it; changes nothing.
///
/// # Errors
/// Nothing is in force, or it cannot be read.
pub fn read() -> Result<Status, StatusError> {
    let folder = loader::pin_folder();
    let Some(pinned) = pinned::pinned_state(&folder)? else {
        return Err(StatusError::NothingPinned { folder });
    };
    let agent = handover::presence(Path::new(handover::STANDARD));
    let asked_for = emergency::read(Path::new(emergency::STANDARD))?;
    let emergency = asked_for.filter(|emergency| emergency.left(Duration::MAX).is_some());
    let foreign_programs = foreign::on_node(&folder);
    Ok(Status { agent, emergency, foreign_programs, pinned })
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "agent           {}", self.agent)?;
        if let Some(emergency) = &self.emergency {
            writeln!(formatter, "emergency       asked for by {}: {}", emergency.by, emergency.reason)?;
        }
        for program in &self.foreign_programs {
            writeln!(formatter, "another's       program {program}")?;
        }
        write!(formatter, "{}", self.pinned)
    }
}
