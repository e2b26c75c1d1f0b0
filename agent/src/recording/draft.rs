//! A group on its way into the log: its frames, and what they add, which is taken over only when they are durable.

use std::fmt::Write as _;

use weir_common::{
    checkpoint::Checkpoint,
    envelope::Envelope,
    frame::{self, FrameType},
    merkle::Tree,
};

use super::{
    entry::{Entry, Origin, unix_us},
    epoch::Epoch,
    error::RecordingError,
    gaps,
};

/// See the module.
pub(super) struct Draft {
    pub(super) frames: Vec<u8>,
    /// Number of the event after it.
    pub(super) sequence: u64,
    pub(super) tree: Tree,
    /// The last checkpoint in it.
    pub(super) signed: Option<String>,
    /// Gap records in it.
    pub(super) gaps: gaps::Counts,
    commit: u64,
    /// That of the event before: the next one's is written over it, and takes no memory of its own.
    envelope: Envelope,
}

/// What types of events begin with.
const EVENT_TYPE: &str = "weir.v1.";

impl Draft {
    /// An empty one, behind that many events.
    pub(super) fn begin(mut frames: Vec<u8>, sequence: u64, tree: Tree, commit: u64) -> Self {
        frames.clear();
        let (signed, gaps, envelope) = (None, gaps::Counts::default(), Envelope::default());
        Self { frames, sequence, tree, signed, gaps, commit, envelope }
    }

    /// Adds an event.
    pub(super) fn event(&mut self, origin: &Origin, entry: &Entry) -> Result<(), RecordingError> {
        let Origin { node, epoch, .. } = origin;
        let Envelope { key, id, event_type, source, time_unix_us, key_id, flags: _ } = &mut self.envelope;
        if source.is_empty() {
            *source = format!("/weir/{node}/{epoch}");
            *id = format!("{epoch}/");
            EVENT_TYPE.clone_into(event_type);
        }
        key.clone_from(&entry.kafka_key);
        id.truncate(epoch.len() + 1);
        // Writing to a string does not fail.
        let _ = write!(id, "{}", self.sequence);
        event_type.truncate(EVENT_TYPE.len());
        event_type.push_str(entry.name);
        (*time_unix_us, *key_id) = (entry.time_unix_us, entry.key_id());
        let value = entry.value(&self.envelope.id[epoch.len() + 1..]);
        let (frame_type, numbers) = (FrameType::Event, (self.sequence, self.commit));
        let leaf = frame::encode_parts(&mut self.frames, frame_type, numbers, &self.envelope, &value)
            .map_err(|_| RecordingError::TooLong { bytes: entry.bytes() })?;
        self.tree.push(leaf);
        self.sequence += 1;
        entry.gap.into_iter().for_each(|kind| self.gaps[kind] += 1);
        Ok(())
    }

    /// Signs for everything so far.
    pub(super) fn checkpoint(&mut self, origin: &Origin, epoch: &Epoch) -> Result<(), RecordingError> {
        let time_unix_us = unix_us();
        let checkpoint = Checkpoint::of(&epoch.origin, &self.tree, time_unix_us);
        let note = checkpoint.sign(&epoch.signers);
        self.note(origin, &note, time_unix_us)?;
        self.signed = Some(note);
        Ok(())
    }

    /// Adds a checkpoint that is signed.
    pub(super) fn note(
        &mut self,
        origin: &Origin,
        note: &str,
        time_unix_us: i64,
    ) -> Result<(), RecordingError> {
        let Origin { node, epoch, .. } = origin;
        let envelope = Envelope::of_checkpoint(node, epoch, self.sequence, time_unix_us);
        let (frame_type, value) = (FrameType::Checkpoint, note.as_bytes());
        frame::encode(&mut self.frames, frame_type, self.sequence, self.commit, &envelope, value)
            .map_err(|_| RecordingError::TooLong { bytes: note.len() })?;
        Ok(())
    }
}
