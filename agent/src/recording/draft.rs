//! A group on its way into the log: its frames, and what they add, which is taken over only when they are durable.

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
};

/// See the module.
pub(super) struct Draft {
    pub(super) frames: Vec<u8>,
    /// Number of the event after it.
    pub(super) sequence: u64,
    pub(super) tree: Tree,
    /// The last checkpoint in it.
    pub(super) signed: Option<String>,
    commit: u64,
}

impl Draft {
    /// An empty one, behind that many events.
    pub(super) fn begin(mut frames: Vec<u8>, sequence: u64, tree: Tree, commit: u64) -> Self {
        frames.clear();
        Self { frames, sequence, tree, signed: None, commit }
    }

    /// Adds an event.
    pub(super) fn event(&mut self, origin: &Origin, entry: &Entry) -> Result<(), RecordingError> {
        let sequence = self.sequence;
        let Origin { node, epoch, .. } = origin;
        let envelope = Envelope {
            key: entry.kafka_key.clone(),
            id: format!("{epoch}/{sequence}"),
            event_type: format!("weir.v1.{}", entry.name),
            source: format!("/weir/{node}/{epoch}"),
            time_unix_us: entry.time_unix_us,
            flags: 0,
            key_id: entry.key_id(),
        };
        let value = entry.value(sequence);
        let leaf =
            frame::encode(&mut self.frames, FrameType::Event, sequence, self.commit, &envelope, &value)
                .map_err(|_| RecordingError::TooLong { bytes: value.len() })?;
        self.tree.push(leaf);
        self.sequence += 1;
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
