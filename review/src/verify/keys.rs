//! The keys that checkpoints are verified with: given by the verifier, or else those that lie in the journal.

use std::path::Path;

use weir_common::checkpoint::{Checkpoint, CheckpointError, NoteVerifier};

use super::{KeySource, VerifyError, read_text};
use crate::source::{Journal, entries as files};

/// Ending of the files with verifier keys, in the journal's directory or an epoch's folder.
const KEY_SUFFIX: &str = ".pub";

/// Verifier keys.
#[derive(Debug)]
pub(crate) struct Keys {
    source: KeySource,
    list: Vec<NoteVerifier>,
}

impl Keys {
    /// Reads `given`; without it what lies in the journal.
    ///
    /// # Errors
    /// A file cannot be read or holds something else.
    pub(crate) fn load(journal: &Journal, given: Option<&Path>) -> Result<Self, VerifyError> {
        let mut list = Vec::new();
        if let Some(path) = given {
            list.extend(read_keys(path)?);
            if list.is_empty() {
                return Err(VerifyError::NoKey { path: path.to_owned() });
            }
            return Ok(Self { source: KeySource::Given, list });
        }
        let folders = journal.epochs.iter().map(|epoch| epoch.directory.as_path());
        let beside =
            journal.path().parent().filter(|_| journal.epochs.iter().any(|e| e.directory == journal.path()));
        for folder in folders.chain([journal.path()]).chain(beside) {
            for path in files(folder)? {
                if path.to_string_lossy().ends_with(KEY_SUFFIX) && path.is_file() {
                    let found = read_keys(&path)?;
                    list.extend(found.into_iter().filter(|key| !list.contains(key)).collect::<Vec<_>>());
                }
            }
        }
        if list.is_empty() {
            return Err(match journal.topic() {
                Some(topic) => VerifyError::NoKeyOnTopic { topic: topic.name() },
                None => VerifyError::NoKeyInJournal { journal: journal.name() },
            });
        }
        Ok(Self { source: KeySource::Journal, list })
    }

    /// Where they came from.
    pub(crate) fn source(&self) -> KeySource {
        self.source
    }

    /// Verifies a note with any of the keys.
    ///
    /// # Errors
    /// No key has signed it, or its signature is wrong.
    pub(crate) fn verify(&self, note: &str) -> Result<Checkpoint, CheckpointError> {
        let mut worst = None;
        for key in &self.list {
            match Checkpoint::verify(note, key) {
                Ok(checkpoint) => return Ok(checkpoint),
                // A wrong signature tells more than a missing one.
                Err(CheckpointError::Unsigned { .. }) if worst.is_some() => {}
                Err(error) => worst = Some(error),
            }
        }
        Err(worst.unwrap_or(CheckpointError::Key { reason: "there is no key" }))
    }
}

fn read_keys(path: &Path) -> Result<Vec<NoteVerifier>, VerifyError> {
    let text = read_text(path)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            NoteVerifier::parse(line).map_err(|source| VerifyError::Key { path: path.to_owned(), source })
        })
        .collect()
}
