//! What publishing counts of itself, for metrics and `/readyz`. Counting is atomic; nothing waits for who reads.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::{LATE, sink::Failure};

/// Upper bounds of the classes of delivery times, in milliseconds: what a client that waits for a batch takes, and what a broker
/// that is away makes of it.
pub(crate) const DELIVERY_BOUNDS_MS: [u64; 9] = [100, 250, 500, 1000, 2500, 5000, 10_000, 60_000, 600_000];

/// What is counted where it happens.
#[derive(Debug, Default)]
pub(super) struct Measures {
    messages: AtomicU64,
    bytes: AtomicU64,
    errors: [AtomicU64; Failure::NAMES.len()],
    resent: AtomicU64,
    deliveries: [AtomicU64; DELIVERY_BOUNDS_MS.len() + 1],
    delivery_us: AtomicU64,
    backlog_bytes: AtomicU64,
    /// When the oldest event was made that is not acknowledged; 0: there is none.
    oldest_unix_us: AtomicU64,
    connected: AtomicBool,
    removed: AtomicU64,
    /// Of those, the ones that went before their replay window had passed.
    removed_early: AtomicU64,
    /// The journal needs room.
    is_short: AtomicBool,
    unreadable: AtomicU64,
    damages: AtomicU64,
    unaccounted: AtomicU64,
    trouble: Mutex<Option<String>>,
}

/// The same as numbers, since this process started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Messages that were acknowledged.
    pub messages: u64,
    /// Bytes of their keys, headers and values.
    pub bytes: u64,
    /// Failures by name.
    pub errors: Vec<(&'static str, u64)>,
    /// Messages that were on their way when a client was given up, and are sent again.
    pub resent: u64,
    /// Messages by how long they took from being recorded to being acknowledged: the classes of `DELIVERY_BOUNDS_MS`, and longer.
    pub deliveries: [u64; DELIVERY_BOUNDS_MS.len() + 1],
    /// How long all of them took, in microseconds.
    pub delivery_us: u64,
    /// Bytes in the journal that are not acknowledged.
    pub backlog_bytes: u64,
    /// Age of the oldest event that is not acknowledged, in seconds.
    pub backlog_seconds: u64,
    /// Whether Kafka takes messages, as far as known.
    pub connected: bool,
    /// Segments that were published and removed.
    pub segments_removed: u64,
    /// Of those, the ones that went before the replay window had passed, since the journal needed room.
    pub segments_removed_early: u64,
    /// Epochs in the journal that cannot be opened.
    pub epochs_unreadable: u64,
    /// Places in the journal that could not be read.
    pub damages: u64,
    /// Epochs of which it cannot be read what was removed, so that nothing more is.
    pub unaccounted: u64,
    /// Why nothing is published just now, in words; none while all is well.
    pub trouble: Option<String>,
}

impl Published {
    /// What is not published yet, in words, if that is late or cannot be published.
    pub(super) fn unpublished(&self) -> Option<String> {
        let why = self.trouble.as_ref().map(|trouble| format!(": {trouble}"));
        let is_late = self.backlog_seconds >= LATE.as_secs();
        (is_late || why.is_some()).then(|| {
            format!(
                "{} bytes of the journal are not in Kafka yet, the oldest event since {} seconds{}",
                self.backlog_bytes,
                self.backlog_seconds,
                why.unwrap_or_default()
            )
        })
    }
}

impl Measures {
    pub(super) fn acknowledged(&self, messages: u64, bytes: u64) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, failure: &Failure) {
        self.errors[failure.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// Messages were on their way to a client that is given up.
    pub(super) fn resent(&self, messages: usize) {
        self.resent.fetch_add(messages as u64, Ordering::Relaxed);
    }

    /// A message was acknowledged so long after its event was made.
    pub(super) fn delivered(&self, after_us: i64) {
        // A clock that was set back makes it negative.
        let after_us = u64::try_from(after_us).unwrap_or_default();
        let class = DELIVERY_BOUNDS_MS.partition_point(|bound| bound * 1000 < after_us);
        self.deliveries[class].fetch_add(1, Ordering::Relaxed);
        self.delivery_us.fetch_add(after_us, Ordering::Relaxed);
    }

    pub(super) fn removed(&self, segments: u64) {
        self.removed.fetch_add(segments, Ordering::Relaxed);
    }

    /// A segment went before its replay window had passed.
    pub(super) fn removed_early(&self, segments: u64) {
        self.removed(segments);
        self.removed_early.fetch_add(segments, Ordering::Relaxed);
    }

    /// How many did.
    pub(super) fn early(&self) -> u64 {
        self.removed_early.load(Ordering::Relaxed)
    }

    /// Whether the journal needs room.
    pub(super) fn set_short(&self, is_short: bool) {
        self.is_short.store(is_short, Ordering::Relaxed);
    }

    pub(super) fn is_short(&self) -> bool {
        self.is_short.load(Ordering::Relaxed)
    }

    pub(super) fn unreadable(&self, epochs: u64) {
        self.unreadable.store(epochs, Ordering::Relaxed);
    }

    pub(super) fn damaged(&self) {
        self.damages.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn unaccounted(&self, epochs: u64) {
        self.unaccounted.store(epochs, Ordering::Relaxed);
    }

    pub(super) fn backlog(&self, bytes: u64, oldest_unix_us: Option<i64>) {
        self.backlog_bytes.store(bytes, Ordering::Relaxed);
        let oldest = oldest_unix_us.and_then(|oldest| u64::try_from(oldest).ok()).unwrap_or_default();
        self.oldest_unix_us.store(oldest, Ordering::Relaxed);
    }

    /// The backlog, and when the oldest event in it was made.
    pub(super) fn unacknowledged(&self) -> (u64, Option<i64>) {
        let oldest = i64::try_from(self.oldest_unix_us.load(Ordering::Relaxed)).ok();
        (self.backlog_bytes.load(Ordering::Relaxed), oldest.filter(|oldest| *oldest > 0))
    }

    pub(super) fn connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    /// Takes over what is wrong; returns whether it is another thing than before.
    pub(super) fn trouble(&self, trouble: Option<String>) -> bool {
        let mut kept = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *kept != trouble;
        *kept = trouble;
        changed
    }

    pub(super) fn read(&self, now_unix_us: i64) -> Published {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let oldest = i64::try_from(read(&self.oldest_unix_us)).unwrap_or(i64::MAX);
        let age = if oldest == 0 { 0 } else { now_unix_us.saturating_sub(oldest).max(0) / 1_000_000 };
        Published {
            messages: read(&self.messages),
            bytes: read(&self.bytes),
            errors: Failure::NAMES.into_iter().zip(self.errors.iter().map(read)).collect(),
            resent: read(&self.resent),
            deliveries: std::array::from_fn(|class| read(&self.deliveries[class])),
            delivery_us: read(&self.delivery_us),
            backlog_bytes: read(&self.backlog_bytes),
            backlog_seconds: u64::try_from(age).unwrap_or_default(),
            connected: self.connected.load(Ordering::Relaxed),
            segments_removed: read(&self.removed),
            segments_removed_early: read(&self.removed_early),
            epochs_unreadable: read(&self.unreadable),
            damages: read(&self.damages),
            unaccounted: read(&self.unaccounted),
            trouble: self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::sink::Failure, Measures};

    #[test]
    fn a_backlog_has_the_age_of_its_oldest_event() {
        let measures = Measures::default();
        assert_eq!(measures.read(5_000_000).backlog_seconds, 0);
        measures.backlog(10, Some(1_000_000));
        assert_eq!(measures.read(5_000_000).backlog_seconds, 4);
        assert_eq!(measures.read(0).backlog_seconds, 0, "a clock that was set back");
    }

    #[test]
    fn a_backlog_is_worth_a_word_when_it_is_late_or_has_a_reason() {
        let measures = Measures::default();
        measures.backlog(10, Some(1_000_000));
        assert_eq!(measures.read(60_000_000).unpublished(), None);
        let late = "10 bytes of the journal are not in Kafka yet, the oldest event since 60 seconds";
        assert_eq!(measures.read(61_000_000).unpublished().as_deref(), Some(late));
        measures.trouble(Some("no broker answers".into()));
        let why = "10 bytes of the journal are not in Kafka yet, the oldest event since 1 seconds: no broker answers";
        assert_eq!(measures.read(2_000_000).unpublished().as_deref(), Some(why));
    }

    #[test]
    fn deliveries_are_classed_by_how_long_they_took() {
        let measures = Measures::default();
        for after_us in [-1, 0, 100_000, 100_001, 600_000_001] {
            measures.delivered(after_us);
        }
        let read = measures.read(0);
        assert_eq!((read.deliveries[0], read.deliveries[1], read.deliveries[9]), (3, 1, 1));
        assert_eq!(read.delivery_us, 600_200_002);
    }

    #[test]
    fn a_failure_is_counted_under_its_name_and_trouble_is_new_once() {
        let measures = Measures::default();
        measures.failed(&Failure::Fatal { reason: String::new() });
        let errors = measures.read(0).errors;
        assert_eq!(errors.iter().find(|(name, _)| *name == "fatal"), Some(&("fatal", 1)));
        assert!(measures.trouble(Some("a".into())) && !measures.trouble(Some("a".into())));
        assert!(measures.trouble(None) && measures.read(0).trouble.is_none());
    }
}
