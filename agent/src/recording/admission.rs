//! Whether a request may begin: the rules for it, its pod's quota, and whether the journal or Kafka is behind.
//!
//! What may not begin waits within a bound, or is refused with the reason. Nothing here waits for a lock that a disk holds.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use weir_common::event::Kind;

use super::{
    Recorder, RecordingError, RequestHead,
    entry::{Append, Ids, unix_us},
    plan::{Asked, CommitRules, Plan, WhenBehind},
    share::Share,
};

/// Nobody waits longer for a record to be durable: a disk that hangs refuses as one that fails.
pub(super) const COMMIT_WAIT_MAX: Duration = Duration::from_secs(30);

/// How often a request that waits looks again.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// A backlog up to this part of its limit is none: what pods added to it is forgotten.
const BACKLOG_PARTS: u64 = 8;

/// A record without its bodies, and why.
pub(super) type Reduced = RecordingError;

/// What Kafka has not acknowledged, as the publisher last said.
#[derive(Debug, Default)]
pub(super) struct Unacknowledged {
    known: AtomicBool,
    bytes: AtomicU64,
    /// When the oldest event was made; 0: there is none.
    oldest_unix_us: AtomicI64,
}

impl Recorder {
    /// Takes over rules; requests that are under way keep theirs.
    pub fn set_rules(&self, rules: CommitRules) {
        self.inner.rules.store(Arc::new(rules));
    }

    /// How much of the journal Kafka has not acknowledged, and since when.
    pub fn set_unacknowledged(&self, bytes: u64, oldest_unix_us: Option<i64>) {
        let unacknowledged = &self.inner.unacknowledged;
        unacknowledged.bytes.store(bytes, Ordering::Relaxed);
        unacknowledged.oldest_unix_us.store(oldest_unix_us.unwrap_or_default(), Ordering::Relaxed);
        unacknowledged.known.store(true, Ordering::Release);
    }

    /// Whether the journal needs what acknowledged segments hold: the next segment would not fit.
    pub fn is_short_of_space(&self) -> bool {
        let inner = &self.inner;
        inner.measures.used().saturating_add(inner.measures.next()) > inner.journal_bytes_max
    }

    /// Lets requests go on without waiting for their records, for `duration`; none: no more.
    pub fn set_emergency(&self, duration: Option<Duration>) {
        self.inner.emergency.set(duration.and_then(|duration| Instant::now().checked_add(duration)));
        // What waits for room need not wait now.
        self.inner.workers.resume();
    }

    /// Records a finding, durably.
    ///
    /// # Errors
    /// The journal does not accept within the bound.
    pub async fn finding_durably(&self, name: &str, message: &str) -> Result<(), RecordingError> {
        let kind = Kind::Finding { name: name.to_owned(), message: message.to_owned(), caller: None };
        let entry = self.inner.origin.entry(None, Ids::default(), kind)?;
        let (append, durable) = Append::durable(vec![entry]);
        self.inner.queue.try_push(append).map_err(|_| RecordingError::TooSlow)?;
        let durable = tokio::time::timeout(COMMIT_WAIT_MAX, durable);
        durable.await.map_err(|_| RecordingError::TooSlow)?.unwrap_or(Err(RecordingError::Closed))?;
        self.inner.measures.finding(name);
        Ok(())
    }

    /// What holds for a request.
    pub(super) fn plan(&self, head: &RequestHead<'_>) -> Plan {
        let RequestHead { method, uri, attributes, upgrade, identity, .. } = *head;
        let changes = upgrade.is_some() || attributes.is_mutating(method.as_str());
        self.inner.rules.load().plan(Asked { attributes, path: uri.path(), identity, changes })
    }

    /// Waits until a request may begin, but not beyond `deadline`; says whether its bodies are to be left out.
    ///
    /// # Errors
    /// It may not.
    pub(super) async fn admit(
        &self,
        share: &Share,
        plan: Plan,
        is_stream: bool,
        deadline: Instant,
    ) -> Result<Option<Reduced>, RecordingError> {
        loop {
            if self.inner.emergency.is_on() {
                return Ok(None);
            }
            let now = Instant::now();
            let owes = share.owes(now);
            // Who waits does not try again and again what would be lost: the writer does.
            let failing = || self.failure().filter(|_| plan.when_behind == WhenBehind::Block);
            let (wait, why) = match self.behind(share).or_else(failing) {
                Some(why) => match plan.when_behind {
                    // What a pod has brought about by itself must not spare it the record of its bodies.
                    WhenBehind::MetadataOnly if !is_stream && owes.is_zero() && !why.is_of_pod() => {
                        return Ok(Some(why));
                    }
                    WhenBehind::Refuse | WhenBehind::MetadataOnly => return Err(why),
                    WhenBehind::Block => (LOOK_INTERVAL, why),
                },
                None if owes.is_zero() => return Ok(None),
                None => (owes, RecordingError::OverQuota),
            };
            if now + wait > deadline {
                return Err(why);
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// Why the journal counts as behind for a pod, if it does.
    fn behind(&self, share: &Share) -> Option<RecordingError> {
        let inner = &self.inner;
        let limits = inner.rules.load().backlog;
        let journal_max = inner.journal_bytes_max;
        let limit = limits.bytes_max.unwrap_or(journal_max).min(journal_max);
        let unacknowledged = &inner.unacknowledged;
        let published = unacknowledged.known.load(Ordering::Acquire);
        let bytes =
            if published { unacknowledged.bytes.load(Ordering::Relaxed) } else { inner.measures.used() };
        let oldest = unacknowledged.oldest_unix_us.load(Ordering::Relaxed);
        let age_us = if oldest == 0 { 0 } else { unix_us().saturating_sub(oldest).max(0) };
        let age = Duration::from_micros(age_us.unsigned_abs());
        if limits.bytes_max.is_some_and(|bytes_max| bytes >= bytes_max)
            || limits.age_max.is_some_and(|age_max| published && age >= age_max)
        {
            return Some(RecordingError::Behind { bytes, seconds: age.as_secs() });
        }
        // What is below is no backlog.
        inner.shares.settle(if bytes <= limit / BACKLOG_PARTS { 0 } else { bytes }, Instant::now());
        if bytes >= limit / 2 && share.has_used_its_part(limit) {
            return Some(RecordingError::OverPart);
        }
        None
    }
}
