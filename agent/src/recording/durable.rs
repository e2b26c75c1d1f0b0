//! What a reader behind the writer needs: how far the journal is durable, whose epoch has ended, and a way to record
//! what it finds missing. It reads the files themselves; nothing here is on a request's way.

use std::{
    path::Path,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use weir_common::event::Kind;

use super::{
    Recorder, RecordingError,
    entry::{Append, Ids},
    epoch,
};
use crate::storage::Storage;

/// A place in an epoch's segments: every frame before it is durable, in this segment and in those before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Durable {
    /// Number of the segment.
    pub segment: u64,
    /// Offset in it.
    pub offset: u64,
}

/// How far an epoch is durable, for whoever reads behind its writer.
#[derive(Debug, Default)]
pub struct DurablePosition {
    at: Mutex<Durable>,
    moved: Condvar,
}

impl DurablePosition {
    /// Everything before `at` is durable now.
    pub(crate) fn publish(&self, at: Durable) {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = at;
        self.moved.notify_all();
    }

    /// Where it is now.
    pub fn get(&self) -> Durable {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is beyond `seen`, but not longer than `timeout`.
    pub fn wait_beyond(&self, seen: Durable, timeout: Duration) -> Durable {
        let at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.moved.wait_timeout_while(at, timeout, |at| *at <= seen);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Recorder {
    /// How far this epoch's journal is durable.
    pub fn durable(&self) -> Arc<DurablePosition> {
        Arc::clone(&self.inner.durable)
    }

    /// Records that something is missing, durably: blocks until the record is on disk.
    ///
    /// # Errors
    /// The journal cannot accept.
    pub fn gap(&self, reason: String, events: Option<u64>) -> Result<(), RecordingError> {
        let inner = &self.inner;
        let entry = inner.origin.entry(None, Ids::default(), Kind::Gap { reason, events, bytes: None })?;
        let (append, durable) = Append::durable(vec![entry]);
        inner.queue.push_blocking(append)?;
        durable.blocking_recv().unwrap_or(Err(RecordingError::Closed))
    }
}

/// Whether the process has ended whose epoch is in this folder.
pub(crate) fn has_ended(storage: &dyn Storage, folder: &Path) -> bool {
    epoch::has_ended(storage, folder)
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::{Durable, DurablePosition};
    use crate::recording::{Recorder, fixture};

    #[test]
    fn who_waits_is_woken_when_the_position_moves() {
        let position = Arc::new(DurablePosition::default());
        let waiting = Arc::clone(&position);
        let seen = position.get();
        let waiter = std::thread::spawn(move || waiting.wait_beyond(seen, Duration::from_secs(60)));
        let beyond = Durable { segment: 0, offset: 600 };
        position.publish(beyond);
        assert_eq!(waiter.join().unwrap(), beyond);
        assert_eq!(position.wait_beyond(beyond, Duration::ZERO), beyond);
    }

    #[tokio::test]
    async fn everything_before_the_published_position_can_be_read_and_a_gap_is_among_it() {
        let directory = tempfile::TempDir::new().unwrap();
        let recorder = Recorder::start(fixture::options(directory.path())).unwrap();
        let (durable, blocking) = (recorder.durable(), recorder.clone());
        let before = durable.get();
        assert!(before.offset > 512, "the first event is there");
        tokio::task::spawn_blocking(move || blocking.gap("a test".to_owned(), Some(3)).unwrap())
            .await
            .unwrap();
        let after = durable.get();
        assert!(after > before);
        let bytes = std::fs::read(&fixture::segments(recorder.folder())[0]).unwrap();
        let text = String::from_utf8_lossy(&bytes[..after.offset as usize]).into_owned();
        assert!(text.contains(r#""reason":"a test","events":3"#), "{text}");
        recorder.stop("test").await.unwrap();
        fixture::read(recorder.folder());
    }
}
