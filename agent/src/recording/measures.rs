//! What recording counts of itself, for metrics. Counting is atomic additions; nothing waits for who reads.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::gaps;

/// Upper bounds of the classes that the durations of fdatasync are counted in; longer ones are in a last class.
pub const SYNC_BOUNDS: [Duration; 12] = [
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_micros(1000),
    Duration::from_micros(2500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(1000),
];

/// Upper bounds of the classes that the delays of what nobody waits for are counted in; longer ones are in a last class.
pub const BEHIND_BOUNDS: [Duration; 8] = [
    Duration::from_millis(5),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(60),
    Duration::from_millis(75),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(1000),
];

/// How often something took up to each of some bounds (and longer than the one before), and longer than all.
#[derive(Debug)]
struct Classes<const N: usize> {
    counts: [AtomicU64; N],
    sum_ns: AtomicU64,
}

impl<const N: usize> Default for Classes<N> {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::default()), sum_ns: AtomicU64::default() }
    }
}

impl<const N: usize> Classes<N> {
    fn count(&self, bounds: &[Duration], took: Duration) {
        let class = bounds.iter().position(|bound| took <= *bound).unwrap_or(bounds.len());
        if let Some(count) = self.counts.get(class) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn read(&self) -> ([u64; N], Duration) {
        let counts = std::array::from_fn(|class| self.counts[class].load(Ordering::Relaxed));
        (counts, Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)))
    }
}

/// Findings that are counted from 0 on, so that the first one is seen as an increase; others are counted from their
/// first on.
const FINDINGS: [&str; 18] = [
    "asyncMutations",
    "canaryFailed",
    "canaryRecovered",
    "cannotEnrol",
    "directConnectionsEnded",
    "emergencyBegan",
    "emergencyEnded",
    "emergencyRefused",
    "foreignProgram",
    "notEnrolledAnyMore",
    "programDetached",
    "proxyEnvironment",
    "quarantineLifted",
    "quarantined",
    "recordingRulesChanged",
    "replayWindowShortened",
    "unguardedInterface",
    "wouldRedirect",
];

/// What is counted where it happens.
#[derive(Debug)]
pub(super) struct Measures {
    events: AtomicU64,
    bytes: AtomicU64,
    lost: AtomicU64,
    failed: AtomicU64,
    gaps: [AtomicU64; gaps::KINDS.len()],
    syncs: Classes<{ SYNC_BOUNDS.len() + 1 }>,
    behind: Classes<{ BEHIND_BOUNDS.len() + 1 }>,
    connections_refused: AtomicU64,
    /// Bytes of all segments and wrapped keys, as far as known.
    used: AtomicU64,
    /// Bytes of the next segment.
    next: AtomicU64,
    /// Bytes of the open segment that only last words may take.
    reserve: AtomicU64,
    /// Findings are rare, and their names are literals of this program: a handful.
    findings: Mutex<BTreeMap<String, u64>>,
}

/// The same as numbers, since this process started.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Events that are on disk.
    pub events: u64,
    /// Bytes of their frames.
    pub bytes: u64,
    /// Events that were lost; a gap record says so.
    pub lost: u64,
    /// How often a segment did not take a group.
    pub failed: u64,
    /// Gap records by kind.
    pub gaps: Vec<(&'static str, u64)>,
    /// How many fdatasync took up to each of [`SYNC_BOUNDS`] (and longer than the one before), and longer than all.
    pub syncs: [u64; SYNC_BOUNDS.len() + 1],
    /// How long they took together.
    pub sync_time: Duration,
    /// The same of how long the oldest event that nobody waited for had waited, each time that such were written.
    pub behind: [u64; BEHIND_BOUNDS.len() + 1],
    /// How long they waited together.
    pub behind_time: Duration,
    /// Connections that never became a request.
    pub connections_refused: u64,
    /// Findings by name.
    pub findings: BTreeMap<String, u64>,
    /// Bytes that wait for the disk.
    pub backlog_bytes: usize,
    /// Bytes of all segments (preallocated space included) and wrapped keys of the journal, and the most that they may be.
    pub used: (u64, u64),
    /// Bytes that are allocated for the words that recording stopped.
    pub reserve: u64,
    /// For how long requests may still go on without waiting for their records; none: they may not.
    pub emergency: Option<Duration>,
    /// Requests that did.
    pub emergency_requests: u64,
    /// Whether rules may make mutations and streams wait for nothing.
    pub async_mutations: bool,
    /// Why recording is not possible just now, in words that may be shown.
    pub failure: Option<&'static str>,
}

impl Default for Measures {
    fn default() -> Self {
        Self {
            events: AtomicU64::default(),
            bytes: AtomicU64::default(),
            lost: AtomicU64::default(),
            failed: AtomicU64::default(),
            gaps: std::array::from_fn(|_| AtomicU64::default()),
            syncs: Classes::default(),
            behind: Classes::default(),
            connections_refused: AtomicU64::default(),
            used: AtomicU64::default(),
            next: AtomicU64::default(),
            reserve: AtomicU64::default(),
            findings: Mutex::new(FINDINGS.iter().map(|name| ((*name).to_owned(), 0)).collect()),
        }
    }
}

impl Measures {
    /// A group is on disk, with so many gap records of each kind.
    pub(super) fn written(&self, events: u64, bytes: u64, gaps: &gaps::Counts, sync: Duration) {
        self.events.fetch_add(events, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        for (counter, gaps) in self.gaps.iter().zip(gaps).filter(|(_, gaps)| **gaps > 0) {
            counter.fetch_add(*gaps, Ordering::Relaxed);
        }
        self.syncs.count(&SYNC_BOUNDS, sync);
    }

    /// Events that nobody waited for are on disk; the oldest of them waited so long.
    pub(super) fn behind(&self, waited: Duration) {
        self.behind.count(&BEHIND_BOUNDS, waited);
    }

    /// A group is not.
    pub(super) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn lost(&self, events: u64) {
        self.lost.fetch_add(events, Ordering::Relaxed);
    }

    pub(super) fn connection_refused(&self) {
        self.connections_refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_used(&self, bytes: u64) {
        self.used.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn use_more(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn use_less(&self, bytes: u64) {
        let less = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    pub(super) fn set_next(&self, bytes: u64) {
        self.next.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn set_reserve(&self, bytes: u64) {
        self.reserve.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn finding(&self, name: &str) {
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        match findings.get_mut(name) {
            Some(count) => *count += 1,
            None => drop(findings.insert(name.to_owned(), 1)),
        }
    }

    /// The numbers, but for what others know.
    pub(super) fn read(&self, backlog_bytes: usize, failure: Option<&'static str>) -> Measured {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let ((syncs, sync_time), (behind, behind_time)) = (self.syncs.read(), self.behind.read());
        Measured {
            events: read(&self.events),
            bytes: read(&self.bytes),
            lost: read(&self.lost),
            failed: read(&self.failed),
            gaps: gaps::KINDS.into_iter().zip(self.gaps.iter().map(read)).collect(),
            syncs,
            sync_time,
            behind,
            behind_time,
            connections_refused: read(&self.connections_refused),
            findings: self.findings.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            backlog_bytes,
            used: (read(&self.used), 0),
            reserve: read(&self.reserve),
            emergency: None,
            emergency_requests: 0,
            async_mutations: false,
            failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{BEHIND_BOUNDS, Measures, SYNC_BOUNDS};

    #[test]
    fn each_sync_is_counted_in_the_class_that_it_fits() {
        let measures = Measures::default();
        for micros in [1, 100, 101, 2_000_000] {
            measures.written(2, 10, &Default::default(), Duration::from_micros(micros));
        }
        let read = measures.read(0, None);
        assert_eq!((read.syncs[0], read.syncs[1], read.syncs[SYNC_BOUNDS.len()]), (2, 1, 1));
        assert_eq!((read.events, read.bytes), (8, 40));
        assert_eq!(read.sync_time, Duration::from_micros(2_000_202));
    }

    #[test]
    fn what_nobody_waited_for_is_counted_by_how_long_it_waited() {
        let measures = Measures::default();
        [4, 50, 51, 3000].iter().for_each(|millis| measures.behind(Duration::from_millis(*millis)));
        let read = measures.read(0, None);
        assert_eq!((read.behind[0], read.behind[2], read.behind[3]), (1, 1, 1));
        assert_eq!(read.behind[BEHIND_BOUNDS.len()], 1);
        assert_eq!(read.behind_time, Duration::from_millis(3105));
    }

    #[test]
    fn a_finding_is_counted_under_its_name() {
        let measures = Measures::default();
        measures.finding("programDetached");
        measures.finding("new");
        let read = measures.read(0, None).findings;
        assert_eq!((read["programDetached"], read["new"], read["canaryFailed"]), (1, 1, 0));
    }
}
