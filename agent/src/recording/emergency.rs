//! The emergency switch as the recorder sees it: whether requests may go on without waiting for their records.
//!
//! It ends by itself: by the monotonic clock, which nobody sets, whatever becomes of whoever switched it on.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Emergency {
    /// So that a request asks for no lock while all is well.
    on: AtomicBool,
    until: Mutex<Option<Instant>>,
    requests: AtomicU64,
}

impl Emergency {
    /// Whether it is on.
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire) && self.left(Instant::now()).is_some()
    }

    /// How long it still is on; none: it is off.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.and_then(|until| until.checked_duration_since(now)).filter(|left| !left.is_zero())
    }

    /// On until then; none: off.
    pub(super) fn set(&self, until: Option<Instant>) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = until;
        self.on.store(until.is_some(), Ordering::Release);
    }

    /// A request goes on without waiting for its record.
    pub(super) fn count(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// How many did.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}
