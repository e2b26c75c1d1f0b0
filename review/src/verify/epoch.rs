//! Checks one epoch: its segments in order, each frame, the log's root at every checkpoint.
//!
//! What an epoch's first event says of its predecessor is checked when the predecessor is read, so roots are
//! compared while the tree grows and never kept. After damage the root of that log cannot be known any more;
//! frames and signatures are still checked. The same holds where a topic's retention has removed events. What an agent
//! published and removed left its tree behind, and the log goes on from there.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;
use weir_common::{
    checkpoint::{Checkpoint, valid_name},
    event::{Event, Kind, SCHEMA_VERSION},
    frame::{Frame, FrameType},
    merkle::Tree,
    segment::{Located, SegmentError, SegmentHeader, SegmentReader, Tail},
};

use super::{
    EpochReport, Finding, Findings, Kept, KeySource, Report, VerifyError,
    envelope::Said,
    gone,
    keys::Keys,
    known::{CHECKPOINT_FILE, Claim, Known},
    silence::Words,
};
use crate::{
    moment::{Moment, counted},
    source::{Epoch, Journal, is_unmade, made_us, missing, read_segment, with_sources},
    terminal::Progress,
};

/// Checks one epoch and adds what it finds to `report`.
///
/// # Errors
/// A segment cannot be read.
#[expect(clippy::too_many_arguments, reason = "each is another part of one verification")]
pub(crate) fn check(
    journal: &Journal,
    epoch: &Epoch,
    keys: &Keys,
    partial: bool,
    kept: Option<&mut Kept>,
    known: &mut Known,
    report: &mut Report,
    progress: &mut Progress,
) -> Result<(), VerifyError> {
    let mut no_claims = Vec::new();
    let claims = known.claims.get_mut(&epoch.name).unwrap_or(&mut no_claims);
    let kept = kept.filter(|kept| kept.checkpoint.origin.rsplit('/').next() == Some(epoch.name.as_str()));
    let id = Uuid::try_parse(&epoch.name).ok();
    let mut checked = Check {
        journal,
        report,
        keys,
        claims,
        kept,
        file: journal.label(&epoch.directory),
        tree: Tree::new(),
        intact: true,
        whole: true,
        partial,
        last_us: id.as_ref().and_then(made_us).unwrap_or(i64::MIN),
        later_us: gone::later_us(journal, epoch)?,
        totals: EpochReport { epoch: epoch.name.clone(), ..EpochReport::default() },
        open: HashMap::new(),
        own: known.own.remove(&epoch.name),
        newer_schema: None,
        words: Words::default(),
        proven: 0,
    };
    checked.removed(epoch, id);
    checked.compare_root(checked.totals.end, None);
    for number in epoch.segments.clone() {
        let path = &journal.segments[number];
        checked.file = journal.label(path);
        let bytes = read_segment(path)?;
        checked.segment(&bytes, journal.successor(number));
        progress.advance(bytes.len() as u64);
    }
    checked.finish(journal.label(&epoch.directory));
    Ok(())
}

/// Name of an epoch's log: a node's name stands in it as far as a key's name may hold it.
fn origin(node: &str, epoch: &str) -> String {
    let node: String =
        node.chars().map(|c| if valid_name(c.encode_utf8(&mut [0; 4])) { c } else { '-' }).collect();
    format!("weir/{}/{epoch}", if node.is_empty() { "node" } else { &node })
}

/// An epoch that is being checked.
pub(super) struct Check<'a> {
    pub(super) journal: &'a Journal,
    pub(super) report: &'a mut Report,
    pub(super) keys: &'a Keys,
    pub(super) claims: &'a mut Vec<Claim>,
    pub(super) kept: Option<&'a mut Kept>,
    /// The segment that is being read.
    pub(super) file: String,
    pub(super) tree: Tree,
    /// No damage so far.
    pub(super) intact: bool,
    /// No event is gone so far that may be. The tree's root means something if both hold.
    pub(super) whole: bool,
    /// Events may be gone where a topic's retention has removed the beginning.
    pub(super) partial: bool,
    /// Time of the last event, or of the epoch's beginning.
    pub(super) last_us: i64,
    /// See [`gone::later_us`].
    pub(super) later_us: BTreeMap<u64, i64>,
    pub(super) totals: EpochReport,
    /// Requests without an end, with the sequence of their beginning.
    pub(super) open: HashMap<String, u64>,
    pub(super) newer_schema: Option<u32>,
    /// What [`CHECKPOINT_FILE`] says, until the log has reached its size.
    pub(super) own: Option<Checkpoint>,
    /// What the agent said, and when.
    pub(super) words: Words,
    /// How many of the events were read when the last checkpoint proved them.
    pub(super) proven: u64,
}

impl Check<'_> {
    fn finding(&self, offset: Option<usize>, sequence: Option<u64>, what: String) -> Finding {
        // A topic has no segments; epoch and sequence name its messages.
        let offset = offset.filter(|_| self.journal.topic().is_none()).map(|offset| offset as u64);
        Finding { file: self.file.clone(), offset, sequence, what }
    }

    pub(super) fn damage(&mut self, offset: Option<usize>, sequence: Option<u64>, what: String) {
        let finding = self.finding(offset, sequence, what);
        self.report.damage.push(finding);
    }

    pub(super) fn note(&mut self, offset: Option<usize>, sequence: Option<u64>, what: String) {
        let finding = self.finding(offset, sequence, what);
        self.report.notes.push(finding);
    }

    fn segment(&mut self, bytes: &[u8], successor: Option<u64>) {
        let mut reader = match SegmentReader::new(bytes, successor) {
            Ok(reader) => reader,
            Err(_) if is_unmade(bytes) => {
                return self.note(
                    None,
                    None,
                    "segment has no header: it was being made, and holds nothing".into(),
                );
            }
            Err(error) => {
                self.intact = false;
                return self.damage(Some(0), None, with_sources(&error));
            }
        };
        self.totals.segments += 1;
        let header = reader.header().clone();
        self.header(&header);
        for next in reader.by_ref() {
            match next {
                Ok(located) => self.frame(&located),
                Err(error) => self.unreadable(&error),
            }
        }
        match reader.tail() {
            Some(Tail::Torn { offset, reason }) => self.torn(*offset, &with_sources(reason)),
            Some(Tail::Abandoned { offset }) => {
                self.note(
                    Some(*offset),
                    None,
                    "frames that were never acknowledged; the next segment replaces them".into(),
                );
            }
            Some(Tail::Clean { .. }) | None => {}
        }
    }

    fn header(&mut self, header: &SegmentHeader) {
        if self.totals.node.is_empty() {
            self.totals.node.clone_from(&header.node);
        }
        let mut wrong = Vec::new();
        let is_topic = self.journal.topic().is_some();
        if !is_topic && !self.file.ends_with(&SegmentHeader::file_name(header.index)) {
            wrong.push(format!("segment {} has the name of another", header.index));
        }
        if header.epoch.to_string() != self.totals.epoch {
            wrong.push(format!("segment belongs to epoch {}, not to this folder", header.epoch));
        }
        if header.node != self.totals.node {
            wrong.push(format!("segment is of node {}, the epoch of {}", header.node, self.totals.node));
        }
        // Later segments are held against the sequence of the one before; numbers may have holes.
        let (first, expected) = (header.first_sequence, self.totals.end);
        if self.totals.segments == 1 && first > expected {
            if is_topic {
                self.totals.removed = first;
                self.lost(expected, first);
            } else if expected == 0 {
                wrong.push(format!("the first {first} events are missing: a segment was removed"));
            } else {
                wrong.push(format!("{}: a segment was removed", missing(expected, first)));
            }
        } else if self.totals.segments == 1 && first < expected {
            wrong.push(format!(
                "segment begins with event {first}, but {expected} events are said to be removed before it"
            ));
        }
        for what in wrong {
            self.intact = false;
            self.damage(Some(0), None, what);
        }
    }

    fn unreadable(&mut self, error: &SegmentError) {
        if let SegmentError::Sequence { expected, found: next, .. }
        | SegmentError::Missing { expected, successor: next, .. } = error
            && self.journal.topic().is_some()
        {
            return self.lost(*expected, *next);
        }
        self.intact = false;
        let (offset, sequence) = match error {
            SegmentError::Damaged { offset, .. } => (Some(*offset), Some(self.totals.end)),
            SegmentError::Sequence { offset, expected, .. }
            | SegmentError::Missing { offset, expected, .. } => (Some(*offset), Some(*expected)),
            _ => (None, None),
        };
        self.damage(offset, sequence, with_sources(error));
    }

    fn torn(&mut self, offset: usize, reason: &str) {
        if self.totals.stopped {
            self.intact = false;
            return self.damage(
                Some(offset),
                None,
                format!("something follows the end of the epoch: {reason}"),
            );
        }
        let what = format!(
            "torn tail ({reason}): a write that was never acknowledged, as a crash leaves it; only a checkpoint that you \
             kept can tell it from a cut"
        );
        self.note(Some(offset), None, what);
    }

    fn frame(&mut self, located: &Located<'_>) {
        let Located { offset, frame } = located;
        match frame.frame_type {
            FrameType::Checkpoint => self.checkpoint(*offset, frame),
            FrameType::Event => {
                self.event(*offset, frame);
                self.tree.push(frame.leaf_hash);
                self.totals.events += 1;
                self.totals.end = frame.sequence.saturating_add(1);
                self.compare_root(self.totals.end, Some(*offset));
            }
        }
    }

    fn checkpoint(&mut self, offset: usize, frame: &Frame<'_>) {
        self.totals.checkpoints += 1;
        let sequence = Some(frame.sequence);
        let signed = match std::str::from_utf8(frame.value) {
            Err(_) => return self.damage(Some(offset), sequence, "checkpoint is not text".into()),
            Ok(note) => self.keys.verify(note),
        };
        let checkpoint = match signed {
            Ok(checkpoint) => checkpoint,
            Err(error) => return self.damage(Some(offset), sequence, with_sources(&error)),
        };
        let origin = origin(&self.totals.node, &self.totals.epoch);
        if checkpoint.origin != origin {
            let what = format!("checkpoint is for the log {}, not for {origin}", checkpoint.origin);
            return self.damage(Some(offset), sequence, what);
        }
        self.envelope_of_checkpoint(offset, frame, checkpoint.time_unix_us);
        if checkpoint.size != frame.sequence {
            let what = format!(
                "checkpoint covers {} events, but {} stand before it",
                checkpoint.size, frame.sequence
            );
            return self.damage(Some(offset), sequence, what);
        }
        if self.intact && !self.whole && checkpoint.tree.is_some() {
            return self.go_on(checkpoint);
        }
        if !self.has_root() {
            // What is missing has been named; a root over what is left would only repeat it.
            return;
        }
        if checkpoint.root != self.tree.root() {
            self.intact = false;
            let what = "Merkle root of the events does not match the signed checkpoint: an event before it was changed";
            return self.damage(Some(offset), sequence, what.into());
        }
        self.vouched(&checkpoint);
    }

    /// Goes on from the tree that a signed checkpoint brings: events before it are gone, those behind it are proven by the
    /// next.
    fn go_on(&mut self, mut checkpoint: Checkpoint) {
        self.totals.unproven += self.totals.events - self.proven;
        self.whole = true;
        if let Some(tree) = checkpoint.tree.take() {
            self.tree = tree;
        }
        self.vouched(&checkpoint);
        self.compare_root(checkpoint.size, None);
    }

    /// A checkpoint that is right covers everything that was read so far.
    pub(super) fn vouched(&mut self, checkpoint: &Checkpoint) {
        self.totals.covered = checkpoint.size;
        self.proven = self.totals.events;
        if let Some(time) = checkpoint.time_unix_us {
            self.words.signed(time);
        }
    }

    fn event(&mut self, offset: usize, frame: &Frame<'_>) {
        let sequence = Some(frame.sequence);
        let event: Said = match serde_json::from_slice(frame.value) {
            Ok(event) => event,
            Err(error) => {
                return self.damage(Some(offset), sequence, format!("value is not an event: {error}"));
            }
        };
        self.last_us = event.time_unix_us;
        if let Some((from, to)) = self.words.event(event.time_unix_us) {
            let what = format!(
                "nobody vouches that the agent ran between {} and {}, as no checkpoint was signed then and one is due each \
                 minute: it was suspended, its clock was changed, or checkpoints are missing",
                Moment(from).text(),
                Moment(to).text(),
            );
            self.note(Some(offset), sequence, what);
        }
        if event.schema > SCHEMA_VERSION {
            self.newer_schema = Some(event.schema);
        }
        self.envelope_of_event(offset, frame, &event);
        if self.totals.stopped {
            self.damage(Some(offset), sequence, "an event follows the end of the epoch".into());
        }
        match (event.kind.as_str(), event.request) {
            ("requestOpened", Some(request)) => {
                self.open.insert(request, frame.sequence);
            }
            ("requestClosed", Some(request)) => {
                self.open.remove(&request);
            }
            ("agentStopped", _) => self.totals.stopped = true,
            ("gap", _) => self.gap(offset, frame),
            _ => {}
        }
    }

    /// Says what stands between missing events and the checkpoint that follows.
    fn unproven(&mut self) {
        let events = self.totals.unproven;
        if events > 0 && self.has_root() {
            let what = format!(
                "{} before the first checkpoint behind missing ones: nothing proves them; what follows is proven",
                counted(events, "event")
            );
            self.note(None, None, what);
        }
    }

    /// An epoch that nobody signed for: its first event comes with a checkpoint.
    fn unsigned(&mut self) {
        if self.totals.checkpoints > 0 || self.totals.events == 0 {
            return;
        }
        let hint = if self.journal.topic().is_some() {
            "; is the topic of checkpoints named, too? If the agent has just begun, read again"
        } else {
            ""
        };
        if self.totals.stopped {
            self.damage(None, None, format!("the epoch ended in order, but has no checkpoint{hint}"));
        } else if self.keys.source() == KeySource::Given {
            let what = format!(
                "no checkpoint of this epoch is signed by a given key: anybody may have made it{hint}"
            );
            // Where retention takes events it takes checkpoints.
            if self.may_be_gone(None) { self.note(None, None, what) } else { self.damage(None, None, what) }
        }
    }

    fn gap(&mut self, offset: usize, frame: &Frame<'_>) {
        let number =
            |number: Option<u64>| number.map_or("an unknown number of".to_owned(), |n| n.to_string());
        let what = match serde_json::from_slice::<Event>(frame.value).map(|event| event.kind) {
            // Bytes of a stream that are there, only not decoded.
            Ok(Kind::Gap { reason, events: None, bytes: Some(0) }) => format!("nothing missing: {reason}"),
            Ok(Kind::Gap { reason, events, bytes }) => {
                format!("{} events, {} bytes missing: {reason}", number(events), number(bytes))
            }
            _ => "a gap that this version cannot read".into(),
        };
        let finding = self.finding(Some(offset), Some(frame.sequence), what);
        self.report.gaps.push(finding);
    }

    fn finish(mut self, directory: String) {
        self.file = directory;
        if let Some(own) = self.own.take() {
            let what = format!(
                "epoch was cut: its file `{CHECKPOINT_FILE}` covers {} events, the segments hold {} of them",
                own.size, self.totals.end
            );
            self.damage(None, Some(self.totals.end), what);
        }
        if let Some(kept) = &mut self.kept {
            kept.log_size = Some(self.totals.end);
            // What it covers was reached, and could not be compared.
            kept.gone |= kept.matches.is_none() && kept.checkpoint.size <= self.totals.end;
        }
        self.words.end();
        self.totals.silences = std::mem::take(&mut self.words.silences);
        self.totals.last_signed = self.words.signed_us.map(|time| Moment(time).text());
        if let Some(schema) = self.newer_schema {
            let what =
                format!("events of schema {schema}, newer than this version: checked, but not understood");
            self.note(None, None, what);
        }
        let uncovered = self.totals.end - self.totals.covered.min(self.totals.end);
        if self.has_root() && uncovered > 0 {
            let what = format!("the last {uncovered} events are not covered by a checkpoint (yet)");
            self.note(None, Some(self.totals.covered), what);
        }
        self.unproven();
        if self.intact && !self.whole {
            let what = "its root cannot be computed, as events are gone: sequence, envelopes and the signatures of \
                        checkpoints were verified, but not that events are those that checkpoints cover";
            self.note(None, None, what.into());
        }
        self.unsigned();
        self.totals.open_requests = self.open.len() as u64;
        let mut open: Vec<(u64, String)> =
            self.open.drain().map(|(request, sequence)| (sequence, request)).collect();
        open.sort();
        let mut listed = Findings::default();
        for (sequence, request) in open {
            listed.push(self.finding(
                None,
                Some(sequence),
                format!("request {request} has no end on record"),
            ));
        }
        self.report.notes.more += listed.more;
        listed.listed.into_iter().for_each(|finding| self.report.notes.push(finding));
        self.totals.root = self.has_root().then(|| hex::encode(self.tree.root()));
        self.report.epochs.push(self.totals);
    }
}
