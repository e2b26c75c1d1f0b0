//! The keys that checkpoints are verified with: given by the verifier, or else those that lie in the journal.

use std::path::{Path, PathBuf};

use weir_common::checkpoint::{Checkpoint, CheckpointError, NoteVerifier};

use super::{KeySource, VerifyError, read_text};
use crate::source::{Journal, entries as files};

/// Ending of the files with verifier keys, in the journal's directory or an epoch's folder.
const KEY_SUFFIX: &str = ".pub";

/// How a public key begins that has no name of its own, and verifies for any node.
const PEM: &str = "-----BEGIN PUBLIC KEY-----";

/// How the name of a key begins that is a node's own: `weir/<node>`.
const OF_NODE: &str = "weir/";

/// Verifier keys.
#[derive(Debug)]
pub(crate) struct Keys {
    source: KeySource,
    list: Vec<NoteVerifier>,
    /// Public keys in PEM: several nodes may sign with one, each in its own name.
    pems: Vec<String>,
}

impl Keys {
    /// Reads `given`; without it what lies in the journal.
    ///
    /// # Errors
    /// A file cannot be read or holds something else.
    pub(crate) fn load(journal: &Journal, given: &[PathBuf]) -> Result<Self, VerifyError> {
        if let Some(keys) = Self::given(given)? {
            return Ok(keys);
        }
        let mut list = Vec::new();
        let folders = journal.epochs.iter().map(|epoch| epoch.directory.as_path());
        let beside =
            journal.path().parent().filter(|_| journal.epochs.iter().any(|e| e.directory == journal.path()));
        for folder in folders.chain([journal.path()]).chain(beside) {
            for path in files(folder)? {
                if path.to_string_lossy().ends_with(KEY_SUFFIX) && path.is_file() {
                    let found = read_keys(&path, &read_text(&path)?)?;
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
        Ok(Self { source: KeySource::Journal, list, pems: Vec::new() })
    }

    /// Reads the files that the verifier gave; none if there are none.
    ///
    /// # Errors
    /// A file cannot be read or holds something else.
    pub(super) fn given(given: &[PathBuf]) -> Result<Option<Self>, VerifyError> {
        let (mut list, mut pems) = (Vec::new(), Vec::new());
        for path in given {
            let text = read_text(path)?;
            if text.trim_start().starts_with(PEM) {
                let wrong = |source| VerifyError::Key { path: path.clone(), source };
                NoteVerifier::from_pem(&text, "weir/node/epoch").map_err(wrong)?;
                pems.push(text);
                continue;
            }
            let found = read_keys(path, &text)?;
            if found.is_empty() {
                return Err(VerifyError::NoKey { path: path.clone() });
            }
            list.extend(found);
        }
        Ok((!given.is_empty()).then_some(Self { source: KeySource::Given, list, pems }))
    }

    /// Keys that something brought with it.
    pub(super) fn brought(list: Vec<NoteVerifier>) -> Self {
        Self { source: KeySource::Journal, list, pems: Vec::new() }
    }

    /// Where they came from.
    pub(crate) fn source(&self) -> KeySource {
        self.source
    }

    /// Verifies a note with any of the keys; one that is named after a node vouches for no other node's log.
    ///
    /// # Errors
    /// No key has signed it, its signature is wrong, or it is for another node's log.
    pub(crate) fn verify(&self, note: &str) -> Result<Checkpoint, CheckpointError> {
        let mut worst = None;
        let origin = Checkpoint::parse_unverified(note)?.origin;
        let of_pems = self.pems.iter().map(|pem| NoteVerifier::from_pem(pem, &origin));
        for key in self.list.iter().cloned().map(Ok).chain(of_pems) {
            let verified = key.and_then(|key| {
                let checkpoint = Checkpoint::verify(note, &key)?;
                if key.name().starts_with(OF_NODE) && !is_of(key.name(), &origin) {
                    return Err(CheckpointError::OtherNode {
                        name: key.name().to_owned(),
                        origin: origin.clone(),
                    });
                }
                Ok(checkpoint)
            });
            match verified {
                Ok(checkpoint) => return Ok(checkpoint),
                // A wrong signature tells more than a missing one.
                Err(CheckpointError::Unsigned { .. }) if worst.is_some() => {}
                Err(error) => worst = Some(error),
            }
        }
        Err(worst.unwrap_or(CheckpointError::Key { reason: "there is no key" }))
    }
}

/// Whether a log is of the node that a key is named after.
fn is_of(name: &str, origin: &str) -> bool {
    origin.rsplit_once('/').is_some_and(|(node, _)| node == name)
}

fn read_keys(path: &Path, text: &str) -> Result<Vec<NoteVerifier>, VerifyError> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            NoteVerifier::parse(line).map_err(|source| VerifyError::Key { path: path.to_owned(), source })
        })
        .collect()
}
