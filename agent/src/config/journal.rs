//! `journal` as it is written: where records are kept, and the keys that sign them.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{
    JOURNAL_BYTES_MIN, Journal,
    raw::{Invalid, invalid},
};
use crate::{
    recording::{IDLE_CHECKPOINT_INTERVAL, JOURNAL_BYTES_MAX},
    signing::SIGNING_KEYS_MAX,
};

/// Longest time between checkpoints while nothing is recorded: `weir verify` counts on it.
const IDLE_CHECKPOINT_SECONDS_MAX: u64 = IDLE_CHECKPOINT_INTERVAL.as_secs();

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawJournal {
    /// Folder, an absolute path; made if absent.
    directory: PathBuf,
    /// Most bytes of all segments and wrapped keys together. A full journal refuses requests, reads too, so that nothing goes on unrecorded. Agents
    /// that start take up to a sixty-fourth more, so that they can publish what makes room.
    #[cfg_attr(test, schemars(range(min = JOURNAL_BYTES_MIN)))]
    bytes_max: u64,
    /// Files with Ed25519 private keys (PKCS#8 PEM, as `openssl genpkey -algorithm ed25519` makes them) that sign checkpoints,
    /// such as those of a mounted Secret; absolute paths. Nobody but the agent's user may read them (mode 0400). All of them
    /// sign: to change a key, name the new one and the old one until every verifier knows the new one. They are read when the
    /// agent starts. Without any, each run makes a key that ends with it.
    #[cfg_attr(test, schemars(length(max = SIGNING_KEYS_MAX)))]
    signing_key_files: Vec<PathBuf>,
    /// How often a checkpoint is signed while nothing is recorded, which says so: how soon silence is proven. Each is written to
    /// the disk and published.
    #[cfg_attr(test, schemars(range(min = 1, max = IDLE_CHECKPOINT_SECONDS_MAX)))]
    idle_checkpoint_seconds: u64,
}

impl Default for RawJournal {
    fn default() -> Self {
        Self {
            directory: "/var/lib/weir/journal".into(),
            bytes_max: JOURNAL_BYTES_MAX,
            signing_key_files: Vec::new(),
            idle_checkpoint_seconds: IDLE_CHECKPOINT_SECONDS_MAX,
        }
    }
}

impl RawJournal {
    pub(super) fn validate(self) -> Result<Journal, Invalid> {
        let Self { directory, bytes_max, signing_key_files, idle_checkpoint_seconds } = self;
        if !directory.is_absolute() {
            return invalid("journal.directory", "must be an absolute path");
        }
        if bytes_max < JOURNAL_BYTES_MIN {
            return invalid("journal.bytesMax", format!("must be at least {JOURNAL_BYTES_MIN}"));
        }
        if signing_key_files.len() > SIGNING_KEYS_MAX {
            return invalid("journal.signingKeyFiles", format!("has more than {SIGNING_KEYS_MAX} files"));
        }
        if let Some(index) = signing_key_files.iter().position(|path| !path.is_absolute()) {
            return invalid(format!("journal.signingKeyFiles[{index}]"), "must be an absolute path");
        }
        if !(1..=IDLE_CHECKPOINT_SECONDS_MAX).contains(&idle_checkpoint_seconds) {
            return invalid(
                "journal.idleCheckpointSeconds",
                format!("must be between 1 and {IDLE_CHECKPOINT_SECONDS_MAX}"),
            );
        }
        let idle_checkpoint_interval = Duration::from_secs(idle_checkpoint_seconds);
        Ok(Journal { directory, bytes_max, signing_key_files, idle_checkpoint_interval })
    }
}
