//! What each pod may take of the recorder, so that none starves its neighbours: bytes a second, room in the queue and for
//! responses that wait to be masked, a part of the backlog. Time is a parameter.
//!
//! Room in the queue is judged by the queue, the rest here. What a pod is over its rate it owes: requests that are under
//! way go on, and its next ones wait, or are refused.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;
use weir_common::event::Caller;

use super::{encryption::KeySlot, masking};

/// Pods that are told apart; what is beyond shares one allowance.
const SHARES_MAX: usize = 4096;

/// Sessions of one pod that get keys of their own at once, and how many more in a second: each key is a file that stays for days.
pub(super) const KEYS_BURST: u32 = 64;
const KEYS_PER_SECOND: f64 = 1.0 / 60.0;

/// How often it is looked at all of them.
const SETTLE_INTERVAL: Duration = Duration::from_millis(500);

/// What one pod may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodQuota {
    /// Bytes of records in a second, on and on.
    pub bytes_per_second: u64,
    /// Bytes of records at once.
    pub burst_bytes: u64,
    /// Per cent of the backlog's limit that one pod may fill, once the backlog is half full.
    pub backlog_percent: u8,
}

impl PodQuota {
    /// For a recorder that serves one caller only.
    pub const UNLIMITED: Self =
        Self { bytes_per_second: u64::MAX, burst_bytes: u64::MAX, backlog_percent: 100 };
}

impl Default for PodQuota {
    fn default() -> Self {
        Self { bytes_per_second: 32 * 1024 * 1024, burst_bytes: 128 * 1024 * 1024, backlog_percent: 25 }
    }
}

/// Whom something is counted for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    /// By UID.
    Pod(String),
    /// Where there is no pod.
    Cgroup(u64),
    /// Who is not known, or not told apart any more.
    Others,
}

impl Owner {
    pub(super) fn of(caller: &Caller) -> Self {
        caller.pod.as_ref().map_or(Self::Cgroup(caller.cgroup), |pod| Self::Pod(pod.uid.clone()))
    }
}

/// Bytes in use, against a limit.
#[derive(Debug, Default)]
pub(super) struct Budget(AtomicUsize);

impl Budget {
    /// Takes `bytes` if the limit allows.
    pub(super) fn take(&self, bytes: usize, bytes_max: usize) -> bool {
        let add = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= bytes_max);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
    }

    pub(super) fn give(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What one pod has taken.
#[derive(Debug)]
pub(super) struct Share {
    /// Names its lane in the queue.
    pub(super) lane: u64,
    /// Responses that wait to be masked.
    pub(super) tapped: Budget,
    /// Turns at masking bodies of requests that are not small.
    pub(super) masking: Arc<Semaphore>,
    quota: PodQuota,
    bucket: Mutex<Bucket>,
    /// Keys that its sessions may still get.
    own_keys: Mutex<Bucket>,
    /// The key of its sessions that get none of their own.
    pub(super) common_key: KeySlot,
    /// Bytes of records that are in the backlog still, near enough.
    backlog: AtomicU64,
}

/// Bytes that may still be recorded at once; below zero: what is owed.
#[derive(Debug)]
struct Bucket {
    level: f64,
    since: Instant,
}

impl Bucket {
    fn full(burst: f64, now: Instant) -> Mutex<Self> {
        Mutex::new(Self { level: burst, since: now })
    }

    fn refill(&mut self, per_second: f64, burst: f64, now: Instant) {
        let seconds = now.saturating_duration_since(self.since).as_secs_f64();
        self.level = seconds.mul_add(per_second, self.level).min(burst);
        self.since = now;
    }
}

impl Share {
    fn new(lane: u64, quota: PodQuota, now: Instant) -> Self {
        Self {
            lane,
            tapped: Budget::default(),
            masking: Arc::new(Semaphore::new(masking::OF_POD_MAX)),
            quota,
            bucket: Bucket::full(quota.burst_bytes as f64, now),
            own_keys: Bucket::full(KEYS_BURST.into(), now),
            common_key: KeySlot::default(),
            backlog: AtomicU64::new(0),
        }
    }

    fn bucket<T>(&self, now: Instant, read: impl FnOnce(&mut Bucket) -> T) -> T {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.refill(self.quota.bytes_per_second as f64, self.quota.burst_bytes as f64, now);
        read(&mut bucket)
    }

    fn own_keys<T>(&self, now: Instant, read: impl FnOnce(&mut f64) -> T) -> T {
        let mut bucket = self.own_keys.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.refill(KEYS_PER_SECOND, KEYS_BURST.into(), now);
        read(&mut bucket.level)
    }

    /// Takes a key for one of its sessions, if it may have one more.
    pub(super) fn takes_key(&self, now: Instant) -> bool {
        self.own_keys(now, |left| {
            let may = *left >= 1.0;
            *left -= if may { 1.0 } else { 0.0 };
            may
        })
    }

    /// Records of this length are queued.
    pub(super) fn charge(&self, bytes: usize, now: Instant) {
        self.backlog.fetch_add(bytes as u64, Ordering::Relaxed);
        self.bucket(now, |bucket| bucket.level -= bytes as f64);
    }

    /// How long until nothing is owed.
    pub(super) fn owes(&self, now: Instant) -> Duration {
        let debt = self.bucket(now, |bucket| -bucket.level);
        if debt <= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(debt / self.quota.bytes_per_second.max(1) as f64).unwrap_or(Duration::MAX)
    }

    /// Whether its part of a backlog of at most `bytes_max` is used up.
    pub(super) fn has_used_its_part(&self, bytes_max: u64) -> bool {
        if self.quota.backlog_percent >= 100 {
            return false;
        }
        let part = u128::from(bytes_max) * u128::from(self.quota.backlog_percent) / 100;
        u128::from(self.backlog.load(Ordering::Relaxed)) > part
    }

    fn is_idle(&self, now: Instant) -> bool {
        self.backlog.load(Ordering::Relaxed) == 0
            && self.bucket(now, |bucket| bucket.level >= self.quota.burst_bytes as f64)
            && self.own_keys(now, |left| *left >= f64::from(KEYS_BURST))
    }
}

/// The shares of all pods.
#[derive(Debug)]
pub(super) struct Shares {
    quota: PodQuota,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    shares: HashMap<Owner, Arc<Share>>,
    /// Lanes that were given; the first one is the agent's own.
    lanes: u64,
    /// When it was last settled what pods have in the backlog, and how long that was.
    settled: Option<(Instant, u64)>,
}

impl Shares {
    pub(super) fn new(quota: PodQuota) -> Self {
        Self { quota, table: Mutex::default() }
    }

    /// The share of a caller's pod.
    pub(super) fn of(&self, caller: &Caller, now: Instant) -> Arc<Share> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut owner = Owner::of(caller);
        if let Some(share) = table.shares.get(&owner) {
            return Arc::clone(share);
        }
        if table.shares.len() >= SHARES_MAX {
            table.shares.retain(|_, share| Arc::strong_count(share) > 1 || !share.is_idle(now));
        }
        if table.shares.len() >= SHARES_MAX {
            owner = Owner::Others;
        }
        let Table { shares, lanes, .. } = &mut *table;
        let share = shares.entry(owner).or_insert_with(|| {
            *lanes += 1;
            Arc::new(Share::new(*lanes, self.quota, now))
        });
        Arc::clone(share)
    }

    /// The backlog has `bytes` left: what pods added beyond that is gone, of each in proportion to what it had. Looks at
    /// all of them only when it has become shorter, or after a while: each request asks.
    pub(super) fn settle(&self, bytes: u64, now: Instant) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let is_settled =
            |(at, before)| bytes >= before && now.saturating_duration_since(at) < SETTLE_INTERVAL;
        if table.settled.is_some_and(is_settled) {
            return;
        }
        table.settled = Some((now, bytes));
        let added: u64 = table.shares.values().map(|share| share.backlog.load(Ordering::Relaxed)).sum();
        if added <= bytes {
            return;
        }
        for share in table.shares.values() {
            // What is added meanwhile stays.
            let of_pod = share.backlog.load(Ordering::Relaxed);
            let left = u128::from(of_pod) * u128::from(bytes) / u128::from(added);
            let gone = of_pod.saturating_sub(u64::try_from(left).unwrap_or(of_pod));
            share.backlog.fetch_sub(gone, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use weir_common::event::{Caller, Pod};

    use super::{PodQuota, SETTLE_INTERVAL, SHARES_MAX, Shares};

    const QUOTA: PodQuota = PodQuota { bytes_per_second: 100, burst_bytes: 300, backlog_percent: 25 };

    fn caller(uid: &str) -> Caller {
        Caller { pod: Some(Pod { uid: uid.into(), ..Pod::default() }), ..Caller::default() }
    }

    #[test]
    fn a_pod_owes_what_it_is_over_its_rate_and_no_other_does() {
        let (shares, start) = (Shares::new(QUOTA), Instant::now());
        let (one, other) = (shares.of(&caller("a"), start), shares.of(&caller("b"), start));
        one.charge(300, start);
        assert_eq!(one.owes(start), Duration::ZERO, "its burst");
        one.charge(200, start);
        assert_eq!((one.owes(start), other.owes(start)), (Duration::from_secs(2), Duration::ZERO));
        assert_eq!(one.owes(start + Duration::from_secs(2)), Duration::ZERO);
        // Rest gives no more than a burst.
        let later = start + Duration::from_secs(1000);
        one.charge(400, later);
        assert_eq!(one.owes(later), Duration::from_secs(1));
    }

    #[test]
    fn a_backlog_is_shared_until_it_is_gone() {
        let (shares, now) = (Shares::new(QUOTA), Instant::now());
        let (one, other) = (shares.of(&caller("a"), now), shares.of(&caller("b"), now));
        one.charge(251, now);
        other.charge(250, now);
        assert!(one.has_used_its_part(1000) && !other.has_used_its_part(1000));
        shares.settle(0, now);
        assert!(!one.has_used_its_part(1000));
    }

    #[test]
    fn what_kafka_has_taken_of_a_backlog_is_gone_for_each_pod_though_there_is_always_one() {
        let (shares, now) = (Shares::new(QUOTA), Instant::now());
        let (one, other) = (shares.of(&caller("a"), now), shares.of(&caller("b"), now));
        one.charge(600, now);
        shares.settle(600, now);
        assert!(one.has_used_its_part(1000), "nothing of it is gone");
        // The backlog stays as long as it is, and is another pod's after a while.
        for turn in 1..=10 {
            let later = now + turn * SETTLE_INTERVAL;
            other.charge(100, later);
            shares.settle(600, later);
        }
        assert!(!one.has_used_its_part(1000) && other.has_used_its_part(1000));
        // Not for each request.
        let backlog = |share: &super::Share| share.backlog.load(std::sync::atomic::Ordering::Relaxed);
        other.charge(100, now);
        let before = backlog(&other);
        shares.settle(600, now + 10 * SETTLE_INTERVAL);
        assert_eq!(backlog(&other), before);
        shares.settle(0, now + 10 * SETTLE_INTERVAL);
        assert_eq!(backlog(&one) + backlog(&other), 0);
    }

    #[test]
    fn an_unlimited_share_owes_nothing() {
        let (shares, now) = (Shares::new(PodQuota::UNLIMITED), Instant::now());
        let share = shares.of(&caller("a"), now);
        share.charge(usize::MAX / 2, now);
        assert_eq!(share.owes(now), Duration::ZERO);
        assert!(!share.has_used_its_part(u64::MAX / 2));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_who_is_idle() {
        let (shares, now) = (Shares::new(QUOTA), Instant::now());
        for number in 0..2 * SHARES_MAX {
            shares.of(&caller(&number.to_string()), now).charge(400, now);
        }
        let count = || shares.table.lock().unwrap().shares.len();
        assert_eq!(count(), SHARES_MAX + 1, "those beyond share one");
        shares.settle(0, now);
        shares.of(&caller("new"), now + Duration::from_secs(1_000_000));
        assert_eq!(count(), 1);
    }
}
