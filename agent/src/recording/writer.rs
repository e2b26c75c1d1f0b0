//! The writer's thread: takes groups from the queue, commits them, tells whoever waits.
//!
//! It is the only user of the journal. Its state is published, so that requests are refused while it cannot write.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use super::{entry::Append, error::RecordingError, journal::Journal, measures::Measures, queue::Queue};

/// What others may know of the writer.
#[derive(Debug, Default)]
pub(super) struct Status {
    failing: AtomicBool,
    failure: Mutex<Option<RecordingError>>,
    losses: AtomicU64,
}

impl Status {
    /// Whether the last commit failed: nothing may be only queued then.
    pub(super) fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Acquire)
    }

    /// Why.
    pub(super) fn failure(&self) -> Option<RecordingError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes whenever events are lost.
    pub(super) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }

    fn publish(&self, failure: Option<&RecordingError>) {
        if failure.is_some() || self.is_failing() {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure.cloned();
            self.failing.store(failure.is_some(), Ordering::Release);
        }
    }
}

/// Closes the queue however the thread ends: without a writer everything must be refused, not wait.
struct CloseOnExit(Arc<Queue>);

impl Drop for CloseOnExit {
    fn drop(&mut self) {
        self.0.close("the writer ended");
    }
}

/// Counts how far behind a group was for whom nobody waited.
fn count_behind(appends: &[Append], measures: &Measures) {
    let behind = appends.iter().filter(|append| append.waiter.is_none());
    if let Some(oldest) = behind.map(|append| append.since).min() {
        measures.behind(oldest.elapsed());
    }
}

/// Starts the thread; it ends when the queue is closed, with the result of the last words.
pub(super) fn start(
    mut journal: Journal,
    queue: Arc<Queue>,
    status: Arc<Status>,
    measures: Arc<Measures>,
) -> std::io::Result<JoinHandle<Result<(), RecordingError>>> {
    std::thread::Builder::new().name("weir-journal".to_owned()).spawn(move || {
        let _close = CloseOnExit(Arc::clone(&queue));
        loop {
            let group = queue.take(journal.due());
            journal.lose(group.dropped);
            if !group.appends.is_empty() {
                let result = journal.commit(&group.appends);
                if result.is_ok() {
                    count_behind(&group.appends, &measures);
                } else {
                    status.losses.fetch_add(1, Ordering::AcqRel);
                }
                // Before anybody is told, so that a request that was refused does not find the old state.
                status.publish(journal.failure());
                for waiter in group.appends.into_iter().filter_map(|append| append.waiter) {
                    // Who went away need not be told.
                    let _ = waiter.send(result.clone());
                }
            }
            journal.do_what_is_due();
            status.publish(journal.failure());
            if let Some(reason) = group.closed {
                return journal.finish(&reason);
            }
        }
    })
}
