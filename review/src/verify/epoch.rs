//! Checks one epoch: its segments in order, each frame, the log's root at every checkpoint.
//!
//! What an epoch's first event says of its predecessor is checked when the predecessor is read, so roots are
//! compared while the tree grows and never kept. After damage the root of that log cannot be known any more;
//! frames and signatures are still checked.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use weir_common::{
    checkpoint::{Checkpoint, valid_name},
    event::{Event, Kind, SCHEMA_VERSION},
    frame::{self, FRAME_BYTES_MAX, Frame, FrameType},
    merkle::{Hash, Tree},
    segment::{Located, SEGMENT_HEADER_BYTES, SegmentError, SegmentHeader, SegmentReader, Tail},
};

use super::{EpochReport, Finding, Findings, Kept, Report, VerifyError, keys::Keys, read_text};
use crate::{
    source::{Epoch, Journal, is_unmade, read_segment, with_sources},
    terminal::Progress,
};

/// File in an epoch's folder with the last checkpoint that the agent signed.
const CHECKPOINT_FILE: &str = "checkpoint";

/// What an epoch says of the one before it.
#[derive(Clone, Debug)]
struct Claim {
    successor: String,
    size: u64,
    root: String,
    met: bool,
}

/// What epochs say of their predecessors, by predecessor.
#[derive(Debug)]
pub(crate) struct Known {
    claims: BTreeMap<String, Vec<Claim>>,
    /// What [`CHECKPOINT_FILE`] says, by epoch.
    own: BTreeMap<String, Checkpoint>,
    /// Only one epoch's folder was opened: its predecessor is elsewhere.
    single: bool,
    path: String,
}

impl Known {
    /// Reads the first event and the checkpoint file of each epoch.
    ///
    /// # Errors
    /// A checkpoint file cannot be read.
    pub(crate) fn new(journal: &Journal, keys: &Keys, report: &mut Report) -> Result<Self, VerifyError> {
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
            let file = path.display().to_string();
            report.damage.push(Finding { file, offset: None, sequence: None, what: wrong });
        }
        Ok(Self { claims, own, single, path: journal.name() })
    }

    /// Reports claims about logs that were cut or are missing.
    pub(crate) fn finish(&self, report: &mut Report) {
        for (predecessor, claims) in &self.claims {
            let log = report.epochs.iter().find(|epoch| epoch.epoch == *predecessor);
            for claim in claims.iter().filter(|claim| !claim.met) {
                let what = match log {
                    Some(log) => format!(
                        "epoch {predecessor} was cut: epoch {} found {} events in it, the journal holds {} of them",
                        claim.successor, claim.size, log.events
                    ),
                    None => format!(
                        "epoch {predecessor} is missing: epoch {} names it as its predecessor, with {} events",
                        claim.successor, claim.size
                    ),
                };
                let finding = Finding { file: self.path.clone(), offset: None, sequence: None, what };
                if self.single && log.is_none() { &mut report.notes } else { &mut report.damage }
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

/// What every event has, whatever version made it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Loose {
    schema: u32,
    sequence: u64,
    time_unix_us: i64,
    node: String,
    epoch: String,
    #[serde(default)]
    session: String,
    #[serde(default)]
    request: Option<String>,
    #[serde(rename = "type")]
    kind: String,
}

/// Checks one epoch and adds what it finds to `report`.
///
/// # Errors
/// A segment cannot be read.
pub(crate) fn check(
    journal: &Journal,
    epoch: &Epoch,
    keys: &Keys,
    kept: Option<&mut Kept>,
    known: &mut Known,
    report: &mut Report,
    progress: &mut Progress,
) -> Result<(), VerifyError> {
    let mut no_claims = Vec::new();
    let claims = known.claims.get_mut(&epoch.name).unwrap_or(&mut no_claims);
    let kept = kept.filter(|kept| kept.checkpoint.origin.rsplit('/').next() == Some(epoch.name.as_str()));
    let mut checked = Check {
        report,
        keys,
        claims,
        kept,
        file: String::new(),
        tree: Tree::new(),
        intact: true,
        totals: EpochReport { epoch: epoch.name.clone(), ..EpochReport::default() },
        open: HashMap::new(),
        own: known.own.remove(&epoch.name),
        newer_schema: None,
    };
    checked.compare_root(0, None);
    for number in epoch.segments.clone() {
        let path = &journal.segments[number];
        checked.file = path.display().to_string();
        let bytes = read_segment(path)?;
        checked.segment(&bytes, journal.successor(number));
        progress.advance(bytes.len() as u64);
    }
    checked.finish(&epoch.directory.display().to_string());
    Ok(())
}

/// Name of an epoch's log: a node's name stands in it as far as a key's name may hold it.
fn origin(node: &str, epoch: &str) -> String {
    let node: String =
        node.chars().map(|c| if valid_name(c.encode_utf8(&mut [0; 4])) { c } else { '-' }).collect();
    format!("weir/{}/{epoch}", if node.is_empty() { "node" } else { &node })
}

struct Check<'a> {
    report: &'a mut Report,
    keys: &'a Keys,
    claims: &'a mut Vec<Claim>,
    kept: Option<&'a mut Kept>,
    /// The segment that is being read.
    file: String,
    tree: Tree,
    /// No damage so far: the tree's root means something.
    intact: bool,
    totals: EpochReport,
    /// Requests without an end, with the sequence of their beginning.
    open: HashMap<String, u64>,
    newer_schema: Option<u32>,
    /// What [`CHECKPOINT_FILE`] says, until the log has reached its size.
    own: Option<Checkpoint>,
}

impl Check<'_> {
    fn finding(&self, offset: Option<usize>, sequence: Option<u64>, what: String) -> Finding {
        Finding { file: self.file.clone(), offset: offset.map(|offset| offset as u64), sequence, what }
    }

    fn damage(&mut self, offset: Option<usize>, sequence: Option<u64>, what: String) {
        let finding = self.finding(offset, sequence, what);
        self.report.damage.push(finding);
    }

    fn note(&mut self, offset: Option<usize>, sequence: Option<u64>, what: String) {
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
        if !self.file.ends_with(&SegmentHeader::file_name(header.index)) {
            wrong.push(format!("segment {} has the name of another", header.index));
        }
        if header.epoch.to_string() != self.totals.epoch {
            wrong.push(format!("segment belongs to epoch {}, not to this folder", header.epoch));
        }
        if header.node != self.totals.node {
            wrong.push(format!("segment is of node {}, the epoch of {}", header.node, self.totals.node));
        }
        // Later segments are held against the sequence of the one before; numbers may have holes.
        if self.totals.segments == 1 && header.first_sequence != 0 {
            wrong.push(format!(
                "the first {} events are missing: a segment was removed",
                header.first_sequence
            ));
        }
        for what in wrong {
            self.intact = false;
            self.damage(Some(0), None, what);
        }
    }

    fn unreadable(&mut self, error: &SegmentError) {
        self.intact = false;
        let (offset, sequence) = match error {
            SegmentError::Damaged { offset, .. } => (Some(*offset), Some(self.tree.size())),
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
                self.compare_root(self.tree.size(), Some(*offset));
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
        if checkpoint.size != frame.sequence {
            let what = format!(
                "checkpoint covers {} events, but {} stand before it",
                checkpoint.size, frame.sequence
            );
            return self.damage(Some(offset), sequence, what);
        }
        if !self.intact {
            // The damage has been named; a root over what is left would only repeat it.
            return;
        }
        if checkpoint.root != self.tree.root() {
            self.intact = false;
            let what = "Merkle root of the events does not match the signed checkpoint: an event before it was changed";
            return self.damage(Some(offset), sequence, what.into());
        }
        self.totals.covered = checkpoint.size;
    }

    fn event(&mut self, offset: usize, frame: &Frame<'_>) {
        let sequence = Some(frame.sequence);
        let event: Loose = match serde_json::from_slice(frame.value) {
            Ok(event) => event,
            Err(error) => {
                return self.damage(Some(offset), sequence, format!("value is not an event: {error}"));
            }
        };
        if event.schema > SCHEMA_VERSION {
            self.newer_schema = Some(event.schema);
        }
        self.envelope(offset, frame, &event);
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

    /// The envelope is outside of the Merkle log, so it may not say anything that the value does not.
    fn envelope(&mut self, offset: usize, frame: &Frame<'_>, event: &Loose) {
        let (envelope, totals) = (&frame.envelope, &self.totals);
        let expected_id = format!("{}/{}", event.epoch, event.sequence);
        let expected_source = format!("/weir/{}/{}", event.node, event.epoch);
        let expected_type = format!("weir.v{}.{}", event.schema, event.kind);
        let wrong = [
            (event.sequence != frame.sequence, "sequence of the event differs from that of its frame"),
            (event.epoch != totals.epoch, "event belongs to another epoch"),
            (event.node != totals.node, "event belongs to another node"),
            (envelope.key != event.session, "key of the envelope is not the event's session"),
            (envelope.id != expected_id, "id of the envelope is not the event's"),
            (envelope.source != expected_source, "source of the envelope is not the event's"),
            (envelope.event_type != expected_type, "type of the envelope is not the event's"),
            (envelope.time_unix_us != event.time_unix_us, "time of the envelope is not the event's"),
        ];
        for (is_wrong, what) in wrong {
            if is_wrong {
                self.damage(Some(offset), Some(frame.sequence), what.into());
            }
        }
    }

    fn gap(&mut self, offset: usize, frame: &Frame<'_>) {
        let number =
            |number: Option<u64>| number.map_or("an unknown number of".to_owned(), |n| n.to_string());
        let what = match serde_json::from_slice::<Event>(frame.value).map(|event| event.kind) {
            Ok(Kind::Gap { reason, events, bytes }) => {
                format!("{} events, {} bytes missing: {reason}", number(events), number(bytes))
            }
            _ => "a gap that this version cannot read".into(),
        };
        let finding = self.finding(Some(offset), Some(frame.sequence), what);
        self.report.gaps.push(finding);
    }

    /// Compares the log's root with what others say it was at this size.
    fn compare_root(&mut self, size: u64, offset: Option<usize>) {
        let kept_here = self.kept.as_ref().is_some_and(|kept| kept.checkpoint.size == size);
        let own = self.own.take_if(|own| own.size == size);
        if !kept_here && own.is_none() && !self.claims.iter().any(|claim| claim.size == size) {
            return;
        }
        let root: Hash = self.tree.root();
        if self.intact && own.is_some_and(|own| own.root != root) {
            let what =
                format!("root at {size} events is not the one in the epoch's file `{CHECKPOINT_FILE}`");
            self.damage(offset, Some(size), what);
        }
        if let Some(kept) = self.kept.as_mut().filter(|_| kept_here) {
            kept.matches = Some(self.intact && kept.checkpoint.root == root);
        }
        let hex = hex::encode(root);
        let mut wrong = Vec::new();
        for claim in self.claims.iter_mut().filter(|claim| claim.size == size) {
            claim.met = true;
            if self.intact && claim.root != hex {
                wrong.push(format!(
                    "root at {size} events is not the one that epoch {} found",
                    claim.successor
                ));
            }
        }
        for what in wrong {
            self.damage(offset, Some(size), what);
        }
    }

    fn finish(mut self, directory: &str) {
        self.file = directory.to_owned();
        if let Some(own) = self.own.take() {
            let what = format!(
                "epoch was cut: its file `{CHECKPOINT_FILE}` covers {} events, the segments hold {} of them",
                own.size, self.totals.events
            );
            self.damage(None, Some(self.totals.events), what);
        }
        if let Some(kept) = &mut self.kept {
            kept.log_size = Some(self.totals.events);
        }
        if let Some(schema) = self.newer_schema {
            let what =
                format!("events of schema {schema}, newer than this version: checked, but not understood");
            self.note(None, None, what);
        }
        let uncovered = self.totals.events - self.totals.covered.min(self.totals.events);
        if self.intact && uncovered > 0 {
            let what = format!("the last {uncovered} events are not covered by a checkpoint (yet)");
            self.note(None, Some(self.totals.covered), what);
        }
        if self.totals.stopped && self.totals.checkpoints == 0 {
            self.damage(None, None, "the epoch ended in order, but has no checkpoint".into());
        }
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
        self.totals.root = self.intact.then(|| hex::encode(self.tree.root()));
        self.report.epochs.push(self.totals);
    }
}
