//! What is known of logs beside what stands in them: what the next epoch found, and the checkpoint file.

use std::collections::BTreeMap;

use weir_common::{
    checkpoint::Checkpoint,
    event::{Event, Kind},
    frame::{self, FRAME_BYTES_MAX},
    segment::SEGMENT_HEADER_BYTES,
};

use super::{Finding, Report, VerifyError, keys::Keys, read_text};
use crate::source::{Journal, read_segment, with_sources};

/// File in an epoch's folder with the last checkpoint that the agent signed.
pub(super) const CHECKPOINT_FILE: &str = "checkpoint";

/// What an epoch says of the one before it.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) successor: String,
    pub(super) size: u64,
    pub(super) root: String,
    /// Its log has come to its size.
    pub(super) met: bool,
}

/// What epochs say of their predecessors, by predecessor.
#[derive(Debug)]
pub(crate) struct Known {
    pub(super) claims: BTreeMap<String, Vec<Claim>>,
    /// What [`CHECKPOINT_FILE`] says, by epoch.
    pub(super) own: BTreeMap<String, Checkpoint>,
    /// Only one epoch's folder was opened: its predecessor is elsewhere.
    single: bool,
    /// The beginnings of topics may be gone: epochs that are named may be, too.
    partial: bool,
    path: String,
    noun: &'static str,
}

impl Known {
    /// Reads the first event and the checkpoint file of each epoch.
    ///
    /// # Errors
    /// A checkpoint file cannot be read.
    pub(crate) fn new(
        journal: &Journal,
        keys: &Keys,
        partial: bool,
        report: &mut Report,
    ) -> Result<Self, VerifyError> {
        let mut claims: BTreeMap<String, Vec<Claim>> = BTreeMap::new();
        for epoch in &journal.epochs {
            let first = journal.segments.get(epoch.segments.start).and_then(|path| read_segment(path).ok());
            let Some(Kind::AgentStarted { predecessor: Some(named), .. }) =
                first.as_deref().and_then(first_kind)
            else {
                continue;
            };
            let claim =
                Claim { successor: epoch.name.clone(), size: named.size, root: named.root, met: false };
            claims.entry(named.epoch).or_default().push(claim);
        }
        let single = journal.epochs.iter().any(|epoch| epoch.directory == journal.path());
        let mut own = BTreeMap::new();
        for epoch in &journal.epochs {
            let path = epoch.directory.join(CHECKPOINT_FILE);
            if !path.is_file() {
                continue;
            }
            let wrong = match keys.verify(&read_text(&path)?) {
                Ok(checkpoint) if checkpoint.origin.rsplit('/').next() == Some(&epoch.name) => {
                    own.insert(epoch.name.clone(), checkpoint);
                    continue;
                }
                Ok(checkpoint) => format!("is for another log: {}", checkpoint.origin),
                Err(error) => with_sources(&error),
            };
            let file = journal.label(&path);
            report.damage.push(Finding { file, offset: None, sequence: None, what: wrong });
        }
        let partial = partial && journal.topic().is_some_and(|topic| topic.facts().trimmed > 0);
        Ok(Self { claims, own, single, partial, path: journal.name(), noun: journal.noun() })
    }

    /// Reports claims about logs that were cut or are missing.
    pub(crate) fn finish(&self, report: &mut Report) {
        for (predecessor, claims) in &self.claims {
            let log = report.epochs.iter().find(|epoch| epoch.epoch == *predecessor);
            for claim in claims.iter().filter(|claim| !claim.met) {
                let what = match log {
                    Some(log) => format!(
                        "epoch {predecessor} was cut: epoch {} found {} events in it, the {} holds {} of them",
                        claim.successor, claim.size, self.noun, log.end
                    ),
                    None => format!(
                        "epoch {predecessor} is missing: epoch {} names it as its predecessor, with {} events",
                        claim.successor, claim.size
                    ),
                };
                let finding = Finding { file: self.path.clone(), offset: None, sequence: None, what };
                if (self.single || self.partial) && log.is_none() {
                    &mut report.notes
                } else {
                    &mut report.damage
                }
                .push(finding);
            }
        }
    }
}

fn first_kind(segment: &[u8]) -> Option<Kind> {
    let end = segment.len().min(SEGMENT_HEADER_BYTES + FRAME_BYTES_MAX);
    let (frame, _) = frame::decode(segment.get(SEGMENT_HEADER_BYTES..end)?).ok()?;
    serde_json::from_slice::<Event>(frame.value).ok().map(|event| event.kind)
}
