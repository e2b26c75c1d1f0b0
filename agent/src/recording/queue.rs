//! The bounded queue before the journal's writer: many producers, async and threads; one consumer, a thread.
//!
//! The consumer takes everything that waits at once: that is the group of a group commit. While the disk syncs one
//! group, the next gathers, so the group grows with the load and nobody waits for a timer.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::{entry::Append, error::RecordingError};

/// Most bytes that wait for the writer; a producer beyond that waits (or, where it cannot, loses with a gap record).
pub(super) const QUEUE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Most bytes of one group commit, beyond its first append.
const GROUP_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Events that nobody waits for are written at most this much later.
pub const COMMIT_BEHIND_MS: u64 = 50;

/// What the consumer got.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// In the order of their arrival; empty if the deadline passed.
    pub(super) appends: Vec<Append>,
    /// Events that did not fit into the queue since the last group.
    pub(super) dropped: u64,
    /// Nothing comes any more: why the recorder stops.
    pub(super) closed: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Append>,
    bytes: usize,
    durable: usize,
    dropped: u64,
    closed: Option<String>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    work: Condvar,
    room: Condvar,
    room_async: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds this lock; if it did, counters may be stale but the queue is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, state: &mut State, append: Append) {
        let wake = append.waiter.is_some() || state.waiting.is_empty() || state.bytes > GROUP_BYTES_MAX;
        state.bytes += append.bytes();
        state.durable += usize::from(append.waiter.is_some());
        state.waiting.push_back(append);
        if wake {
            self.work.notify_one();
        }
    }

    /// Bytes that wait for the writer.
    pub(super) fn backlog_bytes(&self) -> usize {
        self.lock().bytes
    }

    fn has_room(state: &State, bytes: usize) -> bool {
        state.bytes == 0 || state.bytes + bytes <= QUEUE_BYTES_MAX
    }

    /// Queues, waiting for room.
    pub(super) async fn push(&self, append: Append) -> Result<(), RecordingError> {
        let bytes = append.bytes();
        let mut append = Some(append);
        loop {
            let mut room = std::pin::pin!(self.room_async.notified());
            room.as_mut().enable();
            {
                let mut state = self.lock();
                if state.closed.is_some() {
                    return Err(RecordingError::Closed);
                }
                if Self::has_room(&state, bytes) {
                    if let Some(append) = append.take() {
                        self.put(&mut state, append);
                    }
                    return Ok(());
                }
            }
            room.await;
        }
    }

    /// Queues, blocking the thread for room.
    pub(super) fn push_blocking(&self, append: Append) -> Result<(), RecordingError> {
        let bytes = append.bytes();
        let mut state = self.lock();
        while state.closed.is_none() && !Self::has_room(&state, bytes) {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed.is_some() {
            return Err(RecordingError::Closed);
        }
        self.put(&mut state, append);
        Ok(())
    }

    /// Queues even beyond the limit: only for the few small events that each admitted request adds.
    pub(super) fn push_small(&self, append: Append) {
        let mut state = self.lock();
        if state.closed.is_none() {
            self.put(&mut state, append);
        }
    }

    /// Queues if there is room; else the events are lost, and counted for a gap record.
    pub(super) fn push_or_drop(&self, append: Append) {
        let mut state = self.lock();
        if state.closed.is_none() && Self::has_room(&state, append.bytes()) {
            self.put(&mut state, append);
        } else {
            state.dropped += append.entries.len() as u64;
        }
    }

    /// Ends the queue: what waits is still taken, nothing more is accepted.
    pub(super) fn close(&self, reason: &str) {
        let mut state = self.lock();
        state.closed.get_or_insert_with(|| reason.to_owned());
        self.work.notify_one();
        self.room.notify_all();
        self.room_async.notify_waiters();
    }

    /// Takes the next group: as soon as somebody waits for an append, or the oldest one has waited long enough, or the
    /// group is large; or nothing, when `deadline` passes.
    pub(super) fn take(&self, deadline: Option<Instant>) -> Group {
        let behind = Duration::from_millis(COMMIT_BEHIND_MS);
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let due = state.waiting.front().map(|append| append.since + behind);
            let ready = state.durable > 0
                || state.bytes >= GROUP_BYTES_MAX
                || state.closed.is_some()
                || due.is_some_and(|due| due <= now)
                || deadline.is_some_and(|deadline| deadline <= now);
            if ready {
                return self.take_now(&mut state);
            }
            state = match due.into_iter().chain(deadline).min() {
                None => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let woken = self.work.wait_timeout(state, until - now);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Number of appends that somebody waits for.
    #[cfg(test)]
    pub(super) fn waiting_durable(&self) -> usize {
        self.lock().durable
    }

    fn take_now(&self, state: &mut State) -> Group {
        let mut group = Group { dropped: std::mem::take(&mut state.dropped), ..Group::default() };
        let mut bytes = 0;
        while let Some(append) = state.waiting.pop_front() {
            bytes += append.bytes();
            state.durable -= usize::from(append.waiter.is_some());
            group.appends.push(append);
            if bytes >= GROUP_BYTES_MAX {
                break;
            }
        }
        state.bytes -= bytes;
        if state.waiting.is_empty() {
            group.closed.clone_from(&state.closed);
        }
        self.room.notify_all();
        self.room_async.notify_waiters();
        group
    }
}
