//! Counts of what the approver did, read by telemetry.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::request::Denial;

/// What has happened since the start.
#[derive(Debug, Default)]
pub struct Approvals {
    reads: AtomicBool,
    approved: AtomicU64,
    denied: [AtomicU64; Denial::KINDS.len()],
    unread: AtomicU64,
    unanswered: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Approvals {
    /// All requests have been read, and what comes is told.
    pub(super) fn reads(&self) {
        self.reads.store(true, Ordering::Relaxed);
    }

    /// Requests cannot be read, until [`Self::reads`].
    pub(super) fn unread(&self) {
        self.reads.store(false, Ordering::Relaxed);
        count(&self.unread);
    }

    /// One could not be answered.
    pub(super) fn unanswered(&self) {
        count(&self.unanswered);
    }

    pub(super) fn answered(&self, verdict: &Result<(), Denial>) {
        match verdict {
            Ok(()) => count(&self.approved),
            Err(denial) => {
                let kinds = self.denied.iter().zip(Denial::KINDS);
                kinds.filter(|(_, kind)| *kind == denial.kind()).for_each(|(counter, _)| count(counter));
            }
        }
    }

    /// Whether requests can be read at the moment.
    pub fn is_reading(&self) -> bool {
        self.reads.load(Ordering::Relaxed)
    }

    /// How many requests were approved.
    pub fn approved(&self) -> u64 {
        self.approved.load(Ordering::Relaxed)
    }

    /// How many were denied, by [`Denial::kind`].
    pub fn denied(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Denial::KINDS.into_iter().zip(self.denied.iter().map(|counter| counter.load(Ordering::Relaxed)))
    }

    /// What failed and was tried again, by what it was.
    pub fn failed(&self) -> [(&'static str, u64); 2] {
        [("read", &self.unread), ("answer", &self.unanswered)]
            .map(|(step, counter)| (step, counter.load(Ordering::Relaxed)))
    }
}
