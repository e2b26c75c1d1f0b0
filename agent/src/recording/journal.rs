//! The journal's writer: numbers events, frames them, grows the Merkle tree, commits groups, signs checkpoints.
//!
//! One thread owns it. A group is written with one write and one fdatasync and counts only when both returned: number
//! and tree go forward then, not before. If either fails, the segment is poisoned (a second fdatasync may succeed
//! without the data), and the group is written once more, from memory, into a new one. If that fails too, or did
//! so shortly before, whoever waited is refused, and the next group tries a new segment, at most once per `RETRY_INTERVAL`, so that a full disk costs
//! neither a busy loop nor the log.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use weir_common::{checkpoint::Checkpoint, event::Kind, merkle::Tree, segment::SegmentHeader};

use super::{
    draft::Draft,
    durable::DurablePosition,
    entry::{Append, Entry, Ids, Origin, unix_us},
    epoch::{CHECKPOINT_FILE, Epoch},
    error::RecordingError,
    measures::Measures,
    segment::{self, OpenSegment},
    tuning::Tuning,
};
use crate::storage::{self, Storage};

/// A checkpoint is signed at least after this time, if there are events since the last one.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);

/// The same without a group.
const RECOVERY_INTERVAL: Duration = Duration::from_secs(1);

/// A journal that is more than half full is measured this often: room that others have made is known soon.
const MEASURE_INTERVAL: Duration = Duration::from_secs(5);

/// A journal is not short of space before this part of it is left, however large its next segment would be.
const SEGMENTS_MIN: u64 = 4;

/// Segments with which epochs begin may take this part beyond the journal's limit: an agent that starts in a full journal publishes
/// what makes room.
const STARTS_PARTS: u64 = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Journal {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    bytes_max: u64,
    /// When it was last measured how many bytes all segments and wrapped keys in the journal have.
    measured: Instant,
    tuning: Tuning,
    epoch: Epoch,
    origin: Arc<Origin>,
    segment: Option<OpenSegment>,
    next_segment: u64,
    /// How often a segment was made since recording last began: each is twice as large as the one before.
    growth: u64,
    /// Number of the next event.
    sequence: u64,
    commit: u64,
    tree: Tree,
    /// Number of events that the last checkpoint covers, and when it was signed.
    checkpointed: (u64, Instant),
    /// A later checkpoint over as many events. Only the last one enters the log, before the next event: a year of silence
    /// takes no more room than a minute.
    idle: Option<Idle>,
    /// Why recording is not possible, and when it was tried last.
    failure: Option<(RecordingError, Instant)>,
    /// When a group was written once more after its segment was given up.
    rewritten: Option<Instant>,
    /// Events that were lost since the last gap record.
    lost: u64,
    /// Room for the frames of the next group.
    frames: Vec<u8>,
    measures: Arc<Measures>,
    durable: Arc<DurablePosition>,
}

/// A checkpoint that says that nothing was recorded since the last one.
#[derive(Debug)]
struct Idle {
    note: String,
    time_unix_us: i64,
    signed: Instant,
}

impl Journal {
    /// Opens the first segment.
    pub(super) fn create(
        storage: Arc<dyn Storage>,
        folder: PathBuf,
        bytes_max: u64,
        tuning: Tuning,
        epoch: Epoch,
        origin: Arc<Origin>,
        measures: Arc<Measures>,
    ) -> Result<Self, RecordingError> {
        let mut journal = Self {
            storage,
            folder,
            bytes_max,
            measured: Instant::now(),
            tuning,
            epoch,
            origin,
            segment: None,
            next_segment: 0,
            growth: 0,
            sequence: 0,
            // From 1, so that a reader can tell the first group of a segment from the one before it.
            commit: 1,
            tree: Tree::new(),
            checkpointed: (0, Instant::now()),
            idle: None,
            failure: None,
            rewritten: None,
            lost: 0,
            frames: Vec::new(),
            measures,
            durable: Arc::default(),
        };
        journal.measure()?;
        journal.rotate(0)?;
        Ok(journal)
    }

    /// How far it is durable.
    pub(super) fn durable(&self) -> &Arc<DurablePosition> {
        &self.durable
    }

    /// Why recording is not possible just now.
    pub(super) fn failure(&self) -> Option<&RecordingError> {
        self.failure.as_ref().map(|(error, _)| error)
    }

    /// Counts events that were lost before they reached the journal.
    pub(super) fn lose(&mut self, events: u64) {
        self.lost += events;
        self.measures.lost(events);
    }

    /// When the next checkpoint is due; none while recording is not possible.
    fn checkpoint_due(&self) -> Option<Instant> {
        let (covered, at) = self.checkpointed;
        if self.failure.is_some() {
            return None;
        }
        if covered < self.sequence {
            return Some(at + CHECKPOINT_INTERVAL);
        }
        Some(self.idle.as_ref().map_or(at, |idle| idle.signed) + self.tuning.idle_interval)
    }

    /// When there is something to do without a group; none while there is not.
    pub(super) fn due(&self) -> Option<Instant> {
        self.checkpoint_due().into_iter().chain(self.recovery_due()).chain(self.measure_due()).min()
    }

    /// Does it.
    pub(super) fn do_what_is_due(&mut self) {
        let now = Instant::now();
        self.checkpoint_if_due();
        // Requests that wait for the journal bring no group. A failure stays where it is.
        if self.recovery_due().is_some_and(|due| due <= now) {
            let _ = self.recover();
        }
        if self.measure_due().is_some_and(|due| due <= now) {
            let _ = self.measure();
        }
    }

    fn recovery_due(&self) -> Option<Instant> {
        self.failure.as_ref().map(|(_, tried)| *tried + RECOVERY_INTERVAL)
    }

    fn measure_due(&self) -> Option<Instant> {
        let is_full = self.failure.is_none() && self.measures.used() > self.bytes_max / 2;
        is_full.then(|| self.measured + MEASURE_INTERVAL)
    }

    /// Makes a group durable: all of it or nothing.
    pub(super) fn commit(&mut self, appends: &[Append]) -> Result<(), RecordingError> {
        let entries = || appends.iter().flat_map(|append| &append.entries);
        // Whoever only asks whether all before is durable costs no sync.
        if entries().next().is_none() && self.lost == 0 && self.failure.is_none() {
            return Ok(());
        }
        let result = self.try_commit(appends, false);
        if result.is_err() {
            self.measures.failed();
            self.lose(entries().count() as u64);
        }
        result
    }

    /// Signs a checkpoint if one is due.
    fn checkpoint_if_due(&mut self) {
        if self.checkpoint_due().is_none_or(|due| due > Instant::now()) {
        } else if self.checkpointed.0 == self.sequence {
            self.checkpoint_silence();
        } else {
            // A failure is kept in `failure` and meets the next group.
            let _ = self.try_commit(&[], true);
        }
    }

    /// Signs that there is still nothing more.
    fn checkpoint_silence(&mut self) {
        let time_unix_us = unix_us();
        let checkpoint = Checkpoint::of(&self.epoch.origin, &self.tree, time_unix_us);
        let note = checkpoint.sign(&self.epoch.signers);
        self.replace_checkpoint(&note);
        self.idle = Some(Idle { note, time_unix_us, signed: Instant::now() });
    }

    fn replace_checkpoint(&self, note: &str) {
        let path = self.epoch.folder.join(CHECKPOINT_FILE);
        if let Err(error) = storage::replace(self.storage.as_ref(), &path, note.as_bytes()) {
            // The log has it as well, or gets it with the next event, so nothing is lost by it.
            tracing::warn!(
                event = "checkpoint-file-stale",
                path = %path.display(),
                %error,
                "checkpoint file cannot be replaced; the journal itself has the checkpoint"
            );
        }
    }

    /// The last words: `AgentStopped` and a checkpoint, in the reserve if need be; then the segment is cut.
    pub(super) fn finish(mut self, reason: &str) -> Result<(), RecordingError> {
        let failure = self.failure.clone();
        let stopped = Kind::AgentStopped { reason: reason.to_owned() };
        let stopped = self.origin.entry(None, Ids::default(), stopped)?;
        let written = self.last_words(&mut std::iter::once(&stopped));
        if let Some(segment) = self.segment.take() {
            let cut = segment.finish();
            written.and(cut.map(drop).map_err(|error| RecordingError::storage(&self.epoch.folder, error)))?;
        } else {
            written?;
        }
        failure.map_or(Ok(()), |(error, _)| Err(error))
    }

    fn try_commit(&mut self, appends: &[Append], checkpoint: bool) -> Result<(), RecordingError> {
        self.recover()?;
        let entries = || appends.iter().flat_map(|append| &append.entries);
        let draft = self.draft(&mut entries(), checkpoint)?;
        let needed = draft.frames.len() as u64;
        if self.segment.as_ref().is_none_or(|segment| segment.room(false) < needed)
            && let Err(error) = self.rotate(needed)
        {
            return Err(self.stop_recording(error));
        }
        let Err(error) = self.write(draft) else { return Ok(()) };
        // A disk that takes each group at its second try alone would fill with segments that were given up.
        let again = self.tuning.retry_interval;
        if self.rewritten.is_some_and(|rewritten| rewritten.elapsed() < again) {
            return Err(self.fail(error));
        }
        self.rewritten = Some(Instant::now());
        self.measures.failed();
        tracing::warn!(event = "segment-given-up", %error, "a segment is given up; what it did not take is written to a new one");
        // Framed anew: what may have reached the disk bears the number of another commit.
        let draft = self.draft(&mut entries(), checkpoint)?;
        let rewritten = self.rotate(needed).and_then(|()| self.write(draft));
        rewritten.map_err(|error| self.fail(error))
    }

    /// Tries a new segment if recording is not possible, but not too often.
    fn recover(&mut self) -> Result<(), RecordingError> {
        let Some((error, tried)) = &mut self.failure else { return Ok(()) };
        if tried.elapsed() < self.tuning.retry_interval {
            return Err(error.clone());
        }
        *tried = Instant::now();
        let rotated = self.measure().and_then(|()| self.rotate(0));
        if let Err(now) = rotated {
            if let Some((error, _)) = &mut self.failure {
                *error = now.clone();
            }
            return Err(now);
        }
        self.failure = None;
        tracing::warn!(event = "recording-resumed", events_lost = self.lost, "recording goes on");
        Ok(())
    }

    /// Frames a group.
    fn draft(
        &mut self,
        entries: &mut dyn Iterator<Item = &Entry>,
        checkpoint: bool,
    ) -> Result<Draft, RecordingError> {
        let frames = std::mem::take(&mut self.frames);
        let mut draft = Draft::begin(frames, self.sequence, self.tree.clone(), self.commit);
        let origin = self.origin.as_ref();
        if let Some(idle) = &self.idle {
            // Kept until it is durable.
            draft.note(origin, &idle.note, idle.time_unix_us)?;
        }
        if self.lost > 0 {
            let reason = "events could not be written to the journal".to_owned();
            let gap = Kind::Gap { reason, events: Some(self.lost), bytes: None };
            draft.event(origin, &origin.entry(None, Ids::default(), gap)?)?;
        }
        for entry in entries {
            draft.event(origin, entry)?;
        }
        let (covered, at) = self.checkpointed;
        // The first group has one, so that every epoch is signed for, and its link to the one before it.
        let is_due = covered == 0
            || draft.sequence - covered >= self.tuning.checkpoint_events
            || at.elapsed() >= CHECKPOINT_INTERVAL;
        if checkpoint || is_due {
            draft.checkpoint(origin, &self.epoch)?;
        }
        Ok(draft)
    }

    /// Writes the frames of a draft and, if that held, takes over what they add; if not, the segment is given up.
    fn write(&mut self, draft: Draft) -> Result<(), RecordingError> {
        let Some(segment) = &mut self.segment else { return Err(RecordingError::Closed) };
        let committed = segment.commit(&draft.frames);
        if let Ok(sync) = &committed {
            let (events, bytes) = (draft.sequence - self.sequence, draft.frames.len() as u64);
            self.measures.written(events, bytes, &draft.gaps, *sync);
        }
        self.frames = draft.frames;
        if let Err(error) = committed {
            let error = RecordingError::storage(&self.epoch.folder, error);
            // Never written to again. Cutting off the failed write may fail as well: readers then see that the
            // next segment has its numbers again.
            let _ = self.segment.take().map(OpenSegment::finish);
            self.publish_durable();
            // Whatever reached the disk bears this commit's number.
            self.commit += 1;
            return Err(error);
        }
        self.publish_durable();
        self.commit += 1;
        self.sequence = draft.sequence;
        self.tree = draft.tree;
        self.lost = 0;
        self.idle = None;
        if let Some(note) = draft.signed {
            self.checkpointed = (self.sequence, Instant::now());
            self.replace_checkpoint(&note);
        }
        Ok(())
    }

    /// Ends the current segment and begins the next, with room for `needed` bytes of frames.
    fn rotate(&mut self, needed: u64) -> Result<(), RecordingError> {
        let wanted = self.next_bytes(needed);
        if self.measures.used() + wanted > self.bytes_max {
            // What was published may have been removed since.
            self.measure()?;
        }
        let mut bytes = wanted.min(self.bytes_max.saturating_sub(self.measures.used()));
        // A segment that holds nothing but its reserve is of no use either.
        let least = segment::smallest(needed.max(segment::SEGMENT_RESERVE_BYTES));
        if self.next_segment == 0
            && self.measures.used() + least <= self.bytes_max + self.bytes_max / STARTS_PARTS
        {
            bytes = bytes.max(least);
        }
        if bytes < least {
            return Err(RecordingError::Full { path: self.folder.clone(), bytes_max: self.bytes_max });
        }
        let header = SegmentHeader {
            index: self.next_segment,
            first_sequence: self.sequence,
            first_commit: self.commit,
            created_unix_us: unix_us(),
            epoch: self.epoch.id,
            node: self.epoch.node.clone(),
        };
        let path = self.epoch.folder.join(SegmentHeader::file_name(header.index));
        let encoded = header.encode().map_err(|_| RecordingError::Node { node: header.node })?;
        // The number is spent even if this fails: a file that is half made must not be in the way.
        self.next_segment += 1;
        // Should this fail, the next attempt wants as little as an epoch's first segment: what is free may never be
        // enough for a larger one.
        let growth = std::mem::take(&mut self.growth);
        let file = storage::create_allocated(self.storage.as_ref(), &path, bytes)
            .map_err(|error| RecordingError::storage(&path, error))?;
        let opened = OpenSegment::begin(file, header.index, &encoded, bytes).map_err(|error| {
            // Whether its header is on disk, nobody knows. If it is, it says that these numbers are its own, and whoever
            // reads passes over the same ones in the segment before: so nothing more is written to that, no last words either.
            let _ = self.segment.take().map(OpenSegment::finish);
            self.publish_durable();
            storage::remove(self.storage.as_ref(), &path);
            RecordingError::storage(&path, error)
        })?;
        self.growth = growth + 1;
        self.measures.use_more(bytes);
        if let Some(full) = self.segment.replace(opened) {
            match full.finish() {
                Ok(unused) => self.measures.use_less(unused),
                Err(error) => {
                    tracing::warn!(event = "segment-room-not-freed", %error, "unused end of a segment cannot be given back");
                }
            }
        }
        self.measures.set_next(self.next_bytes(0).min(self.bytes_max / SEGMENTS_MIN));
        self.publish_durable();
        Ok(())
    }

    /// How large the next segment is to be.
    fn next_bytes(&self, needed: u64) -> u64 {
        let Tuning { segment_bytes_first, segment_bytes_max, .. } = self.tuning;
        segment::size((segment_bytes_first, segment_bytes_max), self.growth, needed)
    }

    fn publish_durable(&self) {
        self.measures.set_reserve(self.segment.as_ref().map_or(0, OpenSegment::reserve));
        if let Some(segment) = &self.segment {
            self.durable.publish(segment.durable());
        }
    }

    /// Takes the journal's size anew: others may have removed epochs.
    fn measure(&mut self) -> Result<(), RecordingError> {
        self.measured = Instant::now();
        let used = segment::bytes_of_all(self.storage.as_ref(), &self.folder);
        self.measures.set_used(used.map_err(|error| RecordingError::storage(&self.folder, error))?);
        Ok(())
    }

    /// No new segment can be had: says so in the reserve of the current one.
    fn stop_recording(&mut self, error: RecordingError) -> RecordingError {
        let reason = format!("recording stopped: {error}");
        let gap = Kind::Gap { reason, events: None, bytes: None };
        if let Ok(gap) = self.origin.entry(None, Ids::default(), gap) {
            // If this fails too, the gap record after the recovery still tells of it.
            let _ = self.last_words(&mut std::iter::once(&gap));
        }
        self.fail(error)
    }

    fn last_words(&mut self, entries: &mut dyn Iterator<Item = &Entry>) -> Result<(), RecordingError> {
        let draft = self.draft(entries, true)?;
        let needed = draft.frames.len() as u64;
        match &self.segment {
            Some(segment) if segment.room(true) >= needed => self.write(draft),
            _ => Err(RecordingError::Full { path: self.folder.clone(), bytes_max: self.bytes_max }),
        }
    }

    fn fail(&mut self, error: RecordingError) -> RecordingError {
        if self.failure.is_none() {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(
                event = "recording-stopped",
                %error,
                source,
                "recording stopped; requests are refused until the journal can be written again, which is tried by itself"
            );
        }
        self.failure = Some((error.clone(), Instant::now()));
        error
    }
}
