//! Counts of what the cache and STS did, read by telemetry.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::error::StsError;

/// What has happened since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AwsMeasures {
    /// Requests that found a token.
    pub hits: u64,
    /// Requests that waited for one.
    pub waited: u64,
    /// Requests that were refused by a failure just before.
    pub refused: u64,
    /// Roles asked of STS; the SDK's further tries and roles on the way not counted.
    pub asked: u64,
    /// Tokens signed.
    pub signed: u64,
    /// Entries that made room for others.
    pub evicted: u64,
    /// Tokens that the cluster did not take and that were forgotten with their credentials.
    pub forgotten: u64,
    /// Failures by [`StsError::kind`].
    pub failed: BTreeMap<&'static str, u64>,
    /// Roles × sessions × clusters that are kept at the moment.
    pub entries: usize,
}

#[derive(Default)]
pub(super) struct Counters {
    hits: AtomicU64,
    waited: AtomicU64,
    refused: AtomicU64,
    asked: AtomicU64,
    signed: AtomicU64,
    evicted: AtomicU64,
    forgotten: AtomicU64,
    failed: Mutex<BTreeMap<&'static str, u64>>,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn hit(&self) {
        count(&self.hits);
    }

    pub(super) fn waited(&self) {
        count(&self.waited);
    }

    pub(super) fn refused(&self) {
        count(&self.refused);
    }

    pub(super) fn asked(&self) {
        count(&self.asked);
    }

    pub(super) fn signed(&self) {
        count(&self.signed);
    }

    pub(super) fn evicted(&self) {
        count(&self.evicted);
    }

    pub(super) fn forgotten(&self) {
        count(&self.forgotten);
    }

    pub(super) fn failed(&self, error: &StsError) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner).entry(error.kind()).or_default() += 1;
    }

    pub(super) fn read(&self, entries: usize) -> AwsMeasures {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        AwsMeasures {
            hits: read(&self.hits),
            waited: read(&self.waited),
            refused: read(&self.refused),
            asked: read(&self.asked),
            signed: read(&self.signed),
            evicted: read(&self.evicted),
            forgotten: read(&self.forgotten),
            failed: self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            entries,
        }
    }
}
