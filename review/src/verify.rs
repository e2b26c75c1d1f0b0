//! `weir verify`: is this journal, or topic, whole and unchanged?
//!
//! Every frame, the sequence, the Merkle root at every checkpoint and its signature, gaps that the agent itself
//! recorded, and a checkpoint that the verifier kept. Works offline, one segment in memory at a time. What it finds
//! is a [`Report`]; [`epoch`] checks one epoch, [`report`] prints.

mod envelope;
mod epoch;
pub(crate) mod export;
mod gone;
mod keys;
mod known;
mod report;
mod silence;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;
use weir_common::{
    checkpoint::{Checkpoint, CheckpointError, NOTE_BYTES_MAX},
    frame::FrameType,
};

use crate::{
    source::{Journal, SourceError, topic::Topic},
    terminal::Progress,
};
pub(crate) use keys::Keys;
pub(crate) use report::{print, print_json};

/// Most findings of one kind that are listed; more are counted.
const FINDINGS_MAX: usize = 200;

/// What went wrong with the verification itself; damage is no error but part of the [`Report`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum VerifyError {
    /// The journal cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A file that the user named cannot be read.
    #[error("cannot read {path}")]
    File { path: PathBuf, source: io::Error },
    /// A file that the user named is far too long.
    #[error("{path} is longer than the {NOTE_BYTES_MAX} bytes that a key file or checkpoint may have")]
    TooLong { path: PathBuf },
    /// `--key` holds no key.
    #[error("{path} holds no verifier key (name+hash+key)")]
    NoKey { path: PathBuf },
    /// The journal holds no key and none was given.
    #[error("no verifier key (*.pub) lies in {journal}; give one with --key FILE")]
    NoKeyInJournal { journal: String },
    /// The topic holds no key and none was given.
    #[error(
        "no checkpoint with its verifier key is on {topic} (yet: an agent writes one within seconds); name the topic of \
         checkpoints too (TOPIC,TOPIC), or give a key with --key FILE"
    )]
    NoKeyOnTopic { topic: String },
    /// `--key` holds something else.
    #[error("{path} holds something that is no verifier key")]
    Key { path: PathBuf, source: CheckpointError },
    /// Not an export.
    #[error("{path} is not that of an export which this version of `weir export` writes")]
    Export { path: PathBuf },
    /// `--checkpoint` holds something else.
    #[error("{path} holds no signed checkpoint")]
    Checkpoint { path: PathBuf, source: CheckpointError },
    /// `--checkpoint` is signed by nobody who is known.
    #[error("the checkpoint in {path} is not signed by a known key; give its verifier key with --key")]
    Unsigned { path: PathBuf, source: CheckpointError },
}

/// What to verify against.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options<'a> {
    /// Files with verifier keys from elsewhere.
    pub(crate) keys: &'a [PathBuf],
    /// A checkpoint kept from earlier.
    pub(crate) checkpoint: Option<&'a Path>,
    /// The beginning may be gone.
    pub(crate) partial: bool,
}

/// How often a verification is begun anew because an agent removed what it had published meanwhile.
const RETRIES: usize = 5;

/// Where something was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Finding {
    /// File or folder.
    pub(crate) file: String,
    /// Offset in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) offset: Option<u64>,
    /// Sequence of the event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
    /// What.
    pub(crate) what: String,
}

/// Findings of one kind, bounded.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Findings {
    pub(crate) listed: Vec<Finding>,
    /// Number of those that are not listed.
    pub(crate) more: u64,
}

impl Findings {
    pub(crate) fn push(&mut self, finding: Finding) {
        if self.listed.len() < FINDINGS_MAX {
            self.listed.push(finding);
        } else {
            self.more += 1;
        }
    }

    pub(crate) fn number(&self) -> u64 {
        self.listed.len() as u64 + self.more
    }
}

/// Where the keys came from that signatures were verified with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum KeySource {
    /// `--key`: signatures prove authorship.
    Given,
    /// The journal itself: signatures prove consistency only.
    Journal,
}

/// Totals of one epoch.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EpochReport {
    pub(crate) epoch: String,
    pub(crate) node: String,
    pub(crate) segments: u64,
    pub(crate) events: u64,
    /// Events before them that were published and removed, or that a topic does not have any more.
    pub(crate) removed: u64,
    /// Sequence behind the last event.
    #[serde(skip)]
    pub(crate) end: u64,
    pub(crate) checkpoints: u64,
    /// Events that the last valid checkpoint covers.
    pub(crate) covered: u64,
    /// Root over all events, hex; none if damage stands in the way.
    pub(crate) root: Option<String>,
    /// Events that no checkpoint proves, as others before it are missing.
    pub(crate) unproven: u64,
    /// Time of the last signed checkpoint that says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_signed: Option<String>,
    /// Times without an event that checkpoints prove.
    pub(crate) silences: silence::Silences,
    /// Whether the agent ended the epoch in an orderly way.
    pub(crate) stopped: bool,
    /// Requests without an end.
    pub(crate) open_requests: u64,
}

/// What there is to say of topics and not of a journal.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TopicReport {
    pub(crate) messages: u64,
    pub(crate) partitions: u64,
    /// Messages that came again, equal or not.
    pub(crate) duplicates: u64,
    /// Messages of others.
    pub(crate) foreign: u64,
    /// Partitions whose beginning is gone.
    pub(crate) trimmed_partitions: u64,
}

/// What a verification found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) journal: String,
    /// What it is, in a word.
    #[serde(skip)]
    pub(crate) noun: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) topic: Option<TopicReport>,
    pub(crate) sound: bool,
    pub(crate) key_source: KeySource,
    pub(crate) epochs: Vec<EpochReport>,
    /// What must not be.
    pub(crate) damage: Findings,
    /// What the agent itself recorded as missing.
    pub(crate) gaps: Findings,
    /// What a reader should know, and is no damage.
    pub(crate) notes: Findings,
    /// Whether the journal holds all that the kept checkpoint covers; none if none was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) checkpoint: Option<String>,
}

impl Report {
    /// Before anything is found.
    fn new(journal: String, noun: &'static str, keys: &Keys) -> Self {
        Self {
            journal,
            noun,
            topic: None,
            sound: true,
            key_source: keys.source(),
            epochs: Vec::new(),
            damage: Findings::default(),
            gaps: Findings::default(),
            notes: Findings::default(),
            checkpoint: None,
        }
    }

    /// No damage.
    pub(crate) fn is_sound(&self) -> bool {
        self.sound
    }
}

/// A checkpoint that the verifier kept, until its log has been met.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) path: PathBuf,
    /// Set when the log has reached its size.
    pub(crate) matches: Option<bool>,
    /// Set when the log has reached its size, and what it covers is gone.
    pub(crate) gone: bool,
    /// How many events its log has, once it has been read.
    pub(crate) log_size: Option<u64>,
}

impl Kept {
    pub(crate) fn is_judged(&self) -> bool {
        self.matches.is_some() || self.gone
    }
}

/// Verifies a journal.
///
/// # Errors
/// Files cannot be read, or `--key` and `--checkpoint` hold something else.
pub(crate) fn verify(journal: &Journal, options: &Options<'_>) -> Result<Report, VerifyError> {
    for _ in 0..RETRIES {
        match verify_once(journal, options) {
            // What is left now is another journal.
            Err(VerifyError::Source(error)) if journal.is_removed(&error) => {}
            result => return result,
        }
    }
    verify_once(journal, options)
}

fn verify_once(journal: &Journal, options: &Options<'_>) -> Result<Report, VerifyError> {
    let keys = Keys::load(journal, options.keys)?;
    let mut kept = options.checkpoint.map(|path| load_checkpoint(path, &keys)).transpose()?;
    let mut report = Report::new(journal.name(), journal.noun(), &keys);
    let mut known = known::Known::new(journal, &keys, options.partial, &mut report)?;
    let reopened;
    let journal = if journal.topic().is_some() {
        journal
    } else {
        // An agent may be writing: what its checkpoints cover is surely in the segments that are listed after them.
        reopened = Journal::open(journal.path())?;
        &reopened
    };
    let mut progress = Progress::new("verifying", journal.bytes());
    for epoch in &journal.epochs {
        let (partial, kept) = (options.partial, kept.as_mut());
        epoch::check(journal, epoch, &keys, partial, kept, &mut known, &mut report, &mut progress)?;
    }
    drop(progress);
    known.finish(&mut report);
    if let Some(topic) = journal.topic() {
        judge_topic(topic, &mut report);
    }
    if let Some(kept) = kept {
        judge_kept(&kept, options.partial, &mut report);
    }
    report.sound = report.damage.number() == 0;
    Ok(report)
}

fn judge_topic(topic: &Topic, report: &mut Report) {
    let (facts, conflicts) = (topic.facts(), topic.conflicts());
    report.topic = Some(TopicReport {
        messages: facts.messages,
        partitions: facts.partitions,
        duplicates: topic.duplicates(),
        foreign: facts.foreign.number(),
        trimmed_partitions: facts.trimmed,
    });
    for conflict in &conflicts.listed {
        report.damage.push(Finding {
            file: topic.place(conflict.other),
            offset: None,
            sequence: Some(conflict.sequence),
            what: format!(
                "{} {} of epoch {} says other than {}, and is the same one",
                if conflict.frame_type == FrameType::Event { "event" } else { "checkpoint" },
                conflict.sequence,
                conflict.epoch,
                topic.place(conflict.first),
            ),
        });
    }
    report.damage.more += conflicts.more;
    for stranger in &facts.foreign.listed {
        report.notes.push(Finding {
            file: topic.place(stranger.place),
            offset: None,
            sequence: None,
            what: format!("not a message of Weir: {}", stranger.what),
        });
    }
    report.notes.more += facts.foreign.more;
}

fn judge_kept(kept: &Kept, partial: bool, report: &mut Report) {
    let Checkpoint { origin, size, .. } = &kept.checkpoint;
    let noun = report.noun;
    let finding =
        |what| Finding { file: kept.path.display().to_string(), offset: None, sequence: None, what };
    let text = match (kept.matches, kept.log_size) {
        (Some(true), _) => format!("the first {size} events of {origin} are as they were"),
        _ if kept.gone => {
            let what = format!(
                "the first {size} events of {origin} cannot be compared: events of them are not in this {noun} any more"
            );
            if partial { &mut report.notes } else { &mut report.damage }.push(finding(what));
            "cannot be compared".into()
        }
        (Some(false), _) => {
            report.damage.push(finding(format!(
                "the first {size} events of {origin} are not those that the kept checkpoint covers"
            )));
            "does not match".into()
        }
        (None, Some(events)) => {
            report.damage.push(finding(format!(
                "{origin} was cut: the kept checkpoint covers {size} events, the {noun} holds {events} of them"
            )));
            format!("{noun} was cut")
        }
        (None, None) => {
            report
                .damage
                .push(finding(format!("the log {origin} of the kept checkpoint is not in this {noun}")));
            "log is missing".into()
        }
    };
    report.checkpoint = Some(text);
}

/// Reads a small text file that the user named, or that lies beside the journal.
fn read_text(path: &Path) -> Result<String, VerifyError> {
    let error = |source| VerifyError::File { path: path.to_owned(), source };
    let length = fs::metadata(path).map_err(error)?.len();
    if length > NOTE_BYTES_MAX as u64 {
        return Err(VerifyError::TooLong { path: path.to_owned() });
    }
    fs::read_to_string(path).map_err(error)
}

fn load_checkpoint(path: &Path, keys: &Keys) -> Result<Kept, VerifyError> {
    let note = read_text(path)?;
    Checkpoint::parse_unverified(&note)
        .map_err(|source| VerifyError::Checkpoint { path: path.to_owned(), source })?;
    let checkpoint =
        keys.verify(&note).map_err(|source| VerifyError::Unsigned { path: path.to_owned(), source })?;
    Ok(Kept { checkpoint, path: path.to_owned(), matches: None, gone: false, log_size: None })
}

#[cfg(test)]
mod envelope_tests;
#[cfg(test)]
mod tests;
