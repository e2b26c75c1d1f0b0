//! The bounded queue before the journal's writer: many producers, async and threads; one consumer, a thread.
//!
//! The consumer takes everything that waits at once: that is the group of a group commit. While the disk syncs one
//! group, the next gathers, so the group grows with the load and nobody waits for a timer.
//!
//! Each pod has a lane of its own, the agent another. Within a lane order is kept; lanes take turns, so that one that is
//! flooded delays itself. A lane may hold half of what is free: however many are flooded, there is room for a new one.
//! Who waits for room has it kept free from those that hold more or came later ([`Claims`]): nobody waits for ever.
//! What is encrypted with a key that is not on disk yet is held back in its lane ([`Held`]), and so is what its request says after that.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::{Duration, Instant},
};

use tokio::sync::{Notify, futures::Notified};

use super::{
    claims::{self, Claims, TURN_BYTES},
    entry::Append,
    error::RecordingError,
    held::Held,
    share::Share,
};

/// Most bytes that wait for the writer; a producer beyond that waits (or, where it cannot, loses with a gap record).
pub(super) const QUEUE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Most bytes with the small events that requests add which are under way already; what comes beyond that is lost with a gap
/// record.
const QUEUE_BYTES_WITH_SMALL_MAX: usize = QUEUE_BYTES_MAX + 16 * 1024 * 1024;

/// Room that there must be in its lane before a request begins: for its small events.
const SMALL_BYTES: usize = 64 * 1024;

/// Most bytes of one group commit, beyond its first append.
const GROUP_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The agent's own lane.
const OWN_LANE: u64 = 0;

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
    /// Those in which something waits.
    lanes: HashMap<u64, Lane>,
    /// The same, by whose turn it is.
    turns: VecDeque<u64>,
    bytes: usize,
    /// Of them, those that are not held back.
    ready: usize,
    durable: usize,
    dropped: u64,
    claims: Claims,
    /// Woken when there is room.
    wakers: Vec<Waker>,
    /// Whether the writer waits for work.
    idle: bool,
    closed: Option<String>,
}

#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Append>,
    /// Of what waits for a key.
    held: Held,
    bytes: usize,
}

impl State {
    fn has_room(&self, append: &Append) -> bool {
        self.has_room_for(lane(append), append.bytes())
    }

    fn has_room_for(&self, lane: u64, bytes: usize) -> bool {
        let held = |lane: u64| self.lanes.get(&lane).map_or(0, |lane| lane.bytes);
        // What the agent itself has to say is little, and does not wait.
        let reserved = if lane == OWN_LANE { 0 } else { self.claims.reserved(lane, bytes, held) };
        let free = QUEUE_BYTES_MAX.saturating_sub(self.bytes).saturating_sub(reserved);
        claims::need(held(lane), bytes) <= free || (self.bytes == 0 && reserved == 0)
    }

    /// Takes what is next of the lane whose turn it is, up to `bytes_max`; returns how much.
    fn take_turn(&mut self, bytes_max: usize, appends: &mut Vec<Append>) -> usize {
        let Some(number) = self.turns.pop_front() else { return 0 };
        let Some(lane) = self.lanes.get_mut(&number) else { return 0 };
        let mut taken = 0;
        while taken < bytes_max
            && let Some(append) = lane.waiting.pop_front()
        {
            taken += append.bytes();
            self.durable -= usize::from(append.waiter.is_some());
            appends.push(append);
        }
        lane.bytes -= taken;
        if !lane.waiting.is_empty() {
            self.turns.push_back(number);
        } else if lane.held.is_empty() {
            self.lanes.remove(&number);
        }
        self.ready -= taken;
        self.bytes -= taken;
        taken
    }

    /// Lets an append go on in its lane, unless it has to wait for a key. Of what has none that will ever be, who waits is told so; where
    /// nobody waits, content is lost and counted, and the rest goes on. Returns whether the writer has to look.
    fn let_on(&mut self, number: u64, append: Append) -> bool {
        let Some(lane) = self.lanes.get_mut(&number) else { return false };
        let Some(mut append) = lane.held.keep(append) else { return false };
        let mut bytes = append.bytes();
        if let Err(error) = append.keys_stored() {
            lane.bytes -= bytes;
            self.bytes -= bytes;
            if let Some(waiter) = append.waiter.take() {
                self.dropped += append.entries.len() as u64;
                // Who went away need not be told.
                let _ = waiter.send(Err(error));
                return false;
            }
            self.dropped += append.without_lost();
            if append.entries.is_empty() {
                return false;
            }
            bytes = append.bytes();
            lane.bytes += bytes;
            self.bytes += bytes;
        }
        self.ready += bytes;
        self.durable += usize::from(append.waiter.is_some());
        let wakes = append.waiter.is_some() || self.turns.is_empty() || self.ready > GROUP_BYTES_MAX;
        if lane.waiting.is_empty() {
            self.turns.push_back(number);
        }
        lane.waiting.push_back(append);
        wakes
    }

    /// What waited for a key in a lane goes on. Returns whether the writer has to look.
    fn release(&mut self, number: u64, key: u64) -> bool {
        let waited = self.lanes.get_mut(&number).map(|lane| lane.held.take(key)).unwrap_or_default();
        let wake = waited.into_iter().filter_map(|append| self.let_on(number, append).then_some(())).count();
        self.forget_if_empty(number);
        wake > 0
    }

    fn forget_if_empty(&mut self, number: u64) {
        if self.lanes.get(&number).is_some_and(|lane| lane.waiting.is_empty() && lane.held.is_empty()) {
            self.lanes.remove(&number);
        }
    }

    /// Whether the next group is to be taken now; if not, when at the latest, and none: not before something comes. Who waits for an
    /// append waits for no timer.
    fn is_due(&self, now: Instant, deadline: Option<Instant>) -> Result<(), Option<Instant>> {
        let oldest = self.lanes.values().filter_map(|lane| Some(lane.waiting.front()?.since)).min();
        let due = oldest.map(|since| since + Duration::from_millis(COMMIT_BEHIND_MS));
        let latest = due.into_iter().chain(deadline).min();
        let is_due = self.durable > 0
            || self.ready >= GROUP_BYTES_MAX
            || self.closed.is_some() && !self.turns.is_empty()
            || self.has_ended()
            || latest.is_some_and(|latest| latest <= now);
        if is_due { Ok(()) } else { Err(latest) }
    }

    /// Whether nothing comes any more.
    fn has_ended(&self) -> bool {
        self.closed.is_some() && self.lanes.is_empty()
    }
}

fn lane(append: &Append) -> u64 {
    append.share.as_ref().map_or(OWN_LANE, |share| share.lane)
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    work: Condvar,
    room: Condvar,
    room_async: Notify,
    /// Those of them that have a claim: at most one of each lane.
    claimants: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds this lock; if it did, counters may be stale but the queue is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, state: &mut State, append: Append) {
        let bytes = append.bytes();
        if let Some(share) = &append.share {
            share.charge(bytes, append.since);
        }
        state.bytes += bytes;
        let number = lane(&append);
        state.claims.served(number, bytes);
        let lane = state.lanes.entry(number).or_default();
        lane.bytes += bytes;
        let wake = state.let_on(number, append);
        state.forget_if_empty(number);
        if wake {
            self.wake_writer(state);
        }
    }

    /// A key is on disk, or will not be. What it encrypted may lie in another lane than that of the pod's share when it was made: a
    /// pod that shared one with others may have its own by now.
    pub(super) fn key_settled(&self, key: u64) {
        let mut state = self.lock();
        let held: Vec<_> =
            state.lanes.iter().filter(|(_, lane)| !lane.held.is_empty()).map(|(number, _)| *number).collect();
        let woken = held.into_iter().filter(|number| state.release(*number, key)).count();
        if woken > 0 || state.has_ended() {
            self.wake_writer(&state);
        }
        self.tell_of_room(&mut state);
    }

    /// Bytes that wait for the writer.
    pub(super) fn backlog_bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Queues, waiting for room.
    pub(super) async fn push(&self, append: Append) -> Result<(), RecordingError> {
        let (lane, bytes) = (lane(&append), append.bytes());
        self.when_room(lane, bytes, |queue, state| queue.put(state, append)).await
    }

    /// Waits until a request of this pod may begin: its small events find room.
    pub(super) async fn room(&self, share: &Share) -> Result<(), RecordingError> {
        self.when_room(share.lane, SMALL_BYTES, |_, _| ()).await
    }

    async fn when_room(
        &self,
        lane: u64,
        bytes: usize,
        then: impl FnOnce(&Self, &mut State),
    ) -> Result<(), RecordingError> {
        let mut claim = Claimed { queue: self, number: None };
        loop {
            let mut room = std::pin::pin!(self.room_async.notified());
            let mut freed = std::pin::pin!(None);
            {
                // Whoever tells of room holds this lock: nothing is missed that is told after it.
                let mut state = self.lock();
                room.as_mut().enable();
                if state.closed.is_some() {
                    return Err(RecordingError::Closed);
                }
                if state.has_room_for(lane, bytes) {
                    then(self, &mut state);
                    return Ok(());
                }
                claim.number = state.claims.wait(lane, bytes, claim.number);
                if claim.number.is_some() {
                    freed.set(Some(self.claimants.notified()));
                    freed.as_mut().as_pin_mut().map(Notified::enable);
                }
            }
            match freed.as_pin_mut() {
                Some(freed) => {
                    futures::future::select(room, freed).await;
                }
                None => room.await,
            }
        }
    }

    /// Queues, blocking the thread for room.
    pub(super) fn push_blocking(&self, append: Append) -> Result<(), RecordingError> {
        let mut claim = Claimed { queue: self, number: None };
        let mut state = self.lock();
        while state.closed.is_none() && !state.has_room(&append) {
            claim.number = state.claims.wait(lane(&append), append.bytes(), claim.number);
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed.is_some() {
            return Err(RecordingError::Closed);
        }
        self.put(&mut state, append);
        Ok(())
    }

    /// Queues if there is room; else gives back.
    pub(super) fn try_push(&self, append: Append) -> Result<(), Append> {
        let mut state = self.lock();
        if state.closed.is_some() || !state.has_room(&append) {
            return Err(append);
        }
        self.put(&mut state, append);
        Ok(())
    }

    /// Queues if there is room; else gives back, and wakes whoever asked when there is some. After the end of the recorder
    /// nothing can be recorded: it is dropped.
    pub(super) fn push_or_wake(&self, append: Append, waker: &Waker) -> Result<(), Append> {
        let mut state = self.lock();
        if state.closed.is_some() {
            return Ok(());
        }
        if state.has_room(&append) {
            self.put(&mut state, append);
            return Ok(());
        }
        state.claims.wait(lane(&append), append.bytes(), None);
        if !state.wakers.iter().any(|waiting| waiting.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
        Err(append)
    }

    /// Queues also beyond the room of its lane: only for the few small events that each request adds which began while there was
    /// room ([`Self::room`]).
    pub(super) fn push_small(&self, append: Append) {
        let mut state = self.lock();
        if state.closed.is_some() {
            return;
        }
        if state.bytes + append.bytes() > QUEUE_BYTES_WITH_SMALL_MAX {
            state.dropped += append.entries.len() as u64;
            return;
        }
        self.put(&mut state, append);
    }

    /// Queues if there is room; else the events are lost, and counted for a gap record.
    pub(super) fn push_or_drop(&self, append: Append) {
        let mut state = self.lock();
        if state.closed.is_none() && state.has_room(&append) {
            self.put(&mut state, append);
        } else {
            state.dropped += append.entries.len() as u64;
            state.claims.served(lane(&append), append.bytes());
        }
    }

    /// Ends the queue: what waits is still taken, nothing more is accepted.
    pub(super) fn close(&self, reason: &str) {
        let mut state = self.lock();
        state.closed.get_or_insert_with(|| reason.to_owned());
        self.wake_writer(&state);
        self.tell_of_room(&mut state);
    }

    /// A writer that is at work looks by itself before it waits: under load nobody makes a system call for it.
    fn wake_writer(&self, state: &State) {
        if state.idle {
            self.work.notify_one();
        }
    }

    /// Whoever is woken may take locks of its own, but never asks this queue under one of them.
    fn tell_of_room(&self, state: &mut State) {
        self.room_async.notify_waiters();
        self.tell_claimants(state);
    }

    /// A claim is gone, and what it reserved is free: that is for those with the next claims. Of all the others one is woken, for
    /// where nobody has a claim; as soon as anything is taken they are told too. So a pod whose requests wait and go away one by one
    /// costs as much for each as there are lanes that wait, and not as there are requests.
    fn tell_of_claim(&self, state: &mut State) {
        self.room_async.notify_one();
        self.tell_claimants(state);
    }

    fn tell_claimants(&self, state: &mut State) {
        self.room.notify_all();
        self.claimants.notify_waiters();
        state.wakers.drain(..).for_each(Waker::wake);
    }

    /// Takes the next group: as soon as somebody waits for an append, or the oldest one has waited long enough, or the
    /// group is large; or nothing, when `deadline` passes.
    pub(super) fn take(&self, deadline: Option<Instant>) -> Group {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let Err(latest) = state.is_due(now, deadline) else { return self.take_now(&mut state) };
            state.idle = true;
            state = match latest {
                None => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let woken = self.work.wait_timeout(state, until - now);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.idle = false;
        }
    }

    /// Bytes in a pod's lane.
    #[cfg(test)]
    pub(super) fn lane_bytes(&self, share: &Share) -> usize {
        self.lock().lanes.get(&share.lane).map_or(0, |lane| lane.bytes)
    }

    /// Number of appends that somebody waits for.
    #[cfg(test)]
    pub(super) fn waiting_durable(&self) -> usize {
        self.lock().durable
    }

    fn take_now(&self, state: &mut State) -> Group {
        let mut group = Group { dropped: std::mem::take(&mut state.dropped), ..Group::default() };
        let mut bytes = 0;
        while bytes < GROUP_BYTES_MAX && !state.turns.is_empty() {
            bytes += state.take_turn(TURN_BYTES, &mut group.appends);
        }
        if state.lanes.is_empty() {
            group.closed.clone_from(&state.closed);
        }
        self.tell_of_room(state);
        group
    }
}

/// What somebody waits for, as long as they do.
struct Claimed<'a> {
    queue: &'a Queue,
    number: Option<u64>,
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let mut state = self.queue.lock();
        if state.claims.end(number) {
            // Others need not leave it free any more.
            self.queue.tell_of_claim(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::{self, Wake, Waker},
        time::{Duration, Instant},
    };

    use futures::FutureExt as _;
    use proptest::prelude::*;
    use weir_common::event::{Caller, Pod};

    use super::{
        super::encryption::SessionKey,
        super::entry::{Append, Entry},
        super::error::RecordingError,
        super::share::{PodQuota, Share, Shares},
        COMMIT_BEHIND_MS, QUEUE_BYTES_MAX, QUEUE_BYTES_WITH_SMALL_MAX, Queue,
    };

    /// Not serialised: thousands of long ones would take a minute.
    fn entry(bytes: usize) -> Entry {
        Entry::of_length(bytes)
    }

    fn pods<const N: usize>() -> [Arc<Share>; N] {
        let shares = Shares::new(PodQuota::UNLIMITED);
        std::array::from_fn(|number| {
            let pod = Pod { uid: number.to_string(), ..Pod::default() };
            shares.of(&Caller { pod: Some(pod), ..Caller::default() }, Instant::now())
        })
    }

    fn append(share: &Arc<Share>, bytes: usize) -> Append {
        Append::behind(vec![entry(bytes)]).of(share)
    }

    /// Fills a pod's lane; returns how much it took.
    fn flood(queue: &Queue, share: &Arc<Share>) -> usize {
        while queue.try_push(append(share, 100_000)).is_ok() {}
        queue.lock().lanes[&share.lane].bytes
    }

    #[test]
    fn an_idle_journal_writes_at_once_for_whoever_waits_and_within_the_bound_for_nobody() {
        let (queue, [one, other]) = (Queue::default(), pods());
        let now = Instant::now();
        let is_due = |after_ms: u64| queue.lock().is_due(now + Duration::from_millis(after_ms), None);
        assert_eq!(is_due(1_000_000), Err(None), "nothing is there");
        // Nobody waits: it may gather, so long and no longer.
        let at = |append: Append, ms: u64| Append { since: now + Duration::from_millis(ms), ..append };
        queue.try_push(at(append(&one, 10), 0)).unwrap();
        queue.try_push(at(append(&other, 10), 30)).unwrap();
        let latest = now + Duration::from_millis(COMMIT_BEHIND_MS);
        assert_eq!((is_due(0), is_due(COMMIT_BEHIND_MS - 1)), (Err(Some(latest)), Err(Some(latest))));
        assert_eq!(is_due(COMMIT_BEHIND_MS), Ok(()));
        queue.take(Some(now));
        // Somebody waits: there is no time that has to pass, and what is behind goes with it.
        queue.try_push(at(append(&one, 10), 0)).unwrap();
        let (waits, _told) = Append::durable(vec![entry(10)]);
        queue.try_push(at(waits.of(&other), 0)).unwrap();
        assert_eq!(is_due(0), Ok(()));
        assert_eq!(queue.take(None).appends.len(), 2);
        assert_eq!(is_due(0), Err(None));
    }

    #[test]
    fn a_flooded_lane_leaves_room_and_the_next_group_to_others() {
        let (queue, [one, other, third]) = (Queue::default(), pods());
        let taken = flood(&queue, &one);
        assert!(taken < QUEUE_BYTES_MAX / 2, "{taken}");
        let second = flood(&queue, &third);
        assert!(second > 4 << 20 && taken + second < QUEUE_BYTES_MAX, "{second}");
        // However it is flooded, another pod has room for the longest request, at once.
        queue.try_push(append(&other, 500_000)).expect("room for a pod that holds nothing");
        let (waiting, _result) = Append::durable(vec![entry(10)]);
        queue.try_push(waiting.of(&other)).expect("room");
        let group = queue.take(None);
        let of = |share: &Arc<Share>| {
            group.appends.iter().filter(|append| append.share.as_ref().unwrap().lane == share.lane).count()
        };
        assert_eq!(of(&other), 2, "all of the quiet pod is in the first group");
        assert!(of(&one) > 0 && of(&third) > 0);
    }

    #[test]
    fn a_lane_that_is_over_its_room_waits_while_another_does_not() {
        let (queue, [one, other]) = (Queue::default(), pods());
        flood(&queue, &one);
        assert!(queue.try_push(append(&one, 100_000)).is_err());
        assert!(queue.try_push(append(&other, 100_000)).is_ok());
        while !queue.take(Some(Instant::now())).appends.is_empty() {}
        assert!(queue.try_push(append(&one, 100_000)).is_ok());
        assert_eq!(queue.lock().lanes.len(), 1);
    }

    #[test]
    fn small_events_have_a_bound_of_their_own_and_what_is_beyond_it_is_counted() {
        let (queue, [one]) = (Queue::default(), pods());
        flood(&queue, &one);
        for _ in 0..100 {
            queue.push_small(append(&one, 400_000));
        }
        let (bytes, state) = (queue.backlog_bytes(), queue.lock());
        assert!(bytes > QUEUE_BYTES_MAX && bytes <= QUEUE_BYTES_WITH_SMALL_MAX, "{bytes}");
        assert!(state.dropped > 0 && state.dropped + state.lanes[&one.lane].waiting.len() as u64 > 100);
    }

    fn long(share: &Arc<Share>) -> Append {
        Append::behind((0..9).map(|_| entry(450_000)).collect()).of(share)
    }

    #[test]
    fn a_long_append_finds_room_in_bounded_time_though_many_lanes_refill_what_is_free() {
        let queue = Queue::default();
        let [quiet, other, flooding @ ..] = pods::<14>();
        for share in &flooding {
            flood(&queue, share);
        }
        let mut waiting: Vec<_> =
            flooding.iter().map(|share| Box::pin(queue.push(append(share, 100_000)))).collect();
        let mut mutation = Box::pin(queue.push(long(&quiet)));
        let mut read = Box::pin(queue.room(&other));
        let mut groups = 0;
        loop {
            // Whoever floods is always first, with what waits and with what is new.
            for (share, waits) in flooding.iter().zip(&mut waiting) {
                if waits.as_mut().now_or_never().is_some() {
                    *waits = Box::pin(queue.push(append(share, 100_000)));
                }
                while queue.try_push(append(share, 10_000)).is_ok() {}
            }
            // Its lane is never quite empty.
            queue.push_small(append(&quiet, 100));
            if mutation.as_mut().now_or_never().is_some() {
                break;
            }
            queue.take(Some(Instant::now()));
            groups += 1;
            assert!(groups < 10, "it waits for ever");
        }
        assert!(read.as_mut().now_or_never().is_some(), "who needs little has it too");
    }

    #[test]
    fn long_appends_that_wait_come_in_their_order_and_who_went_away_holds_up_nobody() {
        let queue = Queue::default();
        let [second, first, gone, late, flooding @ ..] = pods::<14>();
        for share in &flooding {
            flood(&queue, share);
        }
        let mut waits = [&gone, &first, &second].map(|share| Box::pin(queue.push(long(share))));
        assert!(waits.iter_mut().all(|wait| wait.as_mut().now_or_never().is_none()), "there is no room");
        let [gone, mut first, mut second] = waits;
        drop(gone);
        let mut order = Vec::new();
        while order.len() < 2 {
            queue.take(Some(Instant::now()));
            for (name, wait) in [("second", &mut second), ("first", &mut first)] {
                if !order.contains(&name) && wait.as_mut().now_or_never().is_some() {
                    order.push(name);
                }
            }
        }
        assert_eq!(order, ["first", "second"]);
        // What the agent has to say is not kept out by a claim.
        let mut waits =
            Box::pin(queue.push(Append::behind((0..90).map(|_| entry(450_000)).collect()).of(&late)));
        assert!(waits.as_mut().now_or_never().is_none());
        assert!(queue.try_push(append(&flooding[0], 10)).is_err());
        queue.try_push(Append::behind(vec![entry(10)])).expect("room for the agent's own");
    }

    #[test]
    fn what_a_key_held_back_goes_on_in_whichever_lane_it_lies() {
        let (queue, [one, other]) = (Queue::default(), pods());
        let key = SessionKey::unsettled(1);
        let held = || vec![entry(10).encrypted_with(&key)];
        queue.try_push(Append::behind(held()).of(&one)).unwrap();
        let (waits, told) = Append::durable(held());
        queue.try_push(waits.of(&other)).unwrap();
        queue.try_push(append(&other, 10)).unwrap();
        assert_eq!(
            queue.take(Some(Instant::now())).appends.len(),
            1,
            "what needs no key does not wait for one"
        );
        key.settle(Ok(()));
        queue.key_settled(2);
        assert!(queue.take(Some(Instant::now())).appends.is_empty(), "that is another one");
        queue.key_settled(1);
        assert_eq!(queue.take(Some(Instant::now())).appends.len(), 2);
        assert_eq!((queue.backlog_bytes(), queue.lock().lanes.len()), (0, 0));
        drop(told);
    }

    #[test]
    fn a_request_keeps_its_order_behind_what_waits_for_keys_and_others_pass_it() {
        let (queue, [pod]) = (Queue::default(), pods());
        let keys = [1, 2].map(SessionKey::unsettled);
        let requests = ["a", "b"].map(std::sync::Arc::<str>::from);
        // Told apart by their lengths.
        let push = |request: usize, bytes: usize, key: Option<usize>| {
            let entry = entry(bytes);
            let entry = key.map_or(Entry::of_length(bytes), |key| entry.encrypted_with(&keys[key]));
            let append = Append::behind(vec![entry]).of_request(&pod, &requests[request]);
            assert!(queue.try_push(append).is_ok());
        };
        let taken = || {
            let appends = queue.take(Some(Instant::now())).appends;
            appends.iter().map(|append| append.bytes() - Entry::of_length(0).bytes()).collect::<Vec<_>>()
        };
        push(0, 1, None);
        push(0, 2, Some(0));
        push(0, 3, Some(1));
        push(0, 4, None);
        push(1, 5, None);
        push(1, 6, Some(1));
        push(1, 7, None);
        assert_eq!(taken(), [1, 5]);
        keys[0].settle(Ok(()));
        queue.key_settled(1);
        assert_eq!(taken(), [2]);
        push(0, 8, None);
        assert!(taken().is_empty());
        keys[1].settle(Ok(()));
        queue.key_settled(2);
        let order = taken();
        let of =
            |request: &[usize]| order.iter().copied().filter(|at| request.contains(at)).collect::<Vec<_>>();
        assert_eq!((of(&[3, 4, 8]), of(&[6, 7])), (vec![3, 4, 8], vec![6, 7]), "{order:?}");
        push(0, 9, None);
        assert_eq!(taken(), [9]);
        assert_eq!((queue.backlog_bytes(), queue.lock().lanes.len()), (0, 0));
    }

    #[test]
    fn without_its_key_content_is_lost_and_counted_and_the_rest_goes_on() {
        let (queue, [one]) = (Queue::default(), pods());
        let key = SessionKey::unsettled(1);
        let [lost, told_of] = [0, 1].map(|_| entry(10).encrypted_with(&key));
        queue.try_push(Append::behind(vec![lost, entry(20)]).of(&one)).unwrap();
        let (waits, mut told) = Append::durable(vec![told_of, entry(20)]);
        queue.try_push(waits.of(&one)).unwrap();
        key.settle(Err(RecordingError::Closed.no_key()));
        queue.key_settled(1);
        let group = queue.take(Some(Instant::now()));
        assert_eq!((group.appends.len(), group.appends[0].entries.len(), group.dropped), (1, 1, 3));
        assert!(matches!(told.try_recv(), Ok(Err(RecordingError::NoKey(_)))));
        assert_eq!((queue.backlog_bytes(), queue.lock().lanes.len()), (0, 0));
    }

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_pod_whose_requests_wait_and_go_away_one_by_one_wakes_few_each_time() {
        const REQUESTS: usize = 400;
        let queue = Queue::default();
        let [pod, other, flooding @ ..] = pods::<14>();
        for share in &flooding {
            flood(&queue, share);
        }
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = task::Context::from_waker(&waker);
        let mut others = Box::pin(queue.push(long(&other)));
        assert!(others.as_mut().poll(&mut context).is_pending());
        let mut waiting: Vec<_> = (0..REQUESTS).map(|_| Box::pin(queue.room(&pod))).collect();
        assert!(waiting.iter_mut().all(|wait| wait.as_mut().poll(&mut context).is_pending()));
        while !waiting.is_empty() {
            // The one with the claim is always the first of them.
            drop(waiting.remove(0));
            for wait in &mut waiting {
                assert!(wait.as_mut().poll(&mut context).is_pending());
            }
        }
        let woken = woken.0.load(Ordering::SeqCst);
        assert!(woken <= 3 * REQUESTS, "{woken}");
        // Nobody was forgotten over it.
        while others.as_mut().poll(&mut context).is_pending() {
            assert!(!queue.take(Some(Instant::now())).appends.is_empty(), "it waits for ever");
        }
    }

    proptest! {
        /// Whatever is pushed and taken: each lane comes out in its order, nothing is lost, nothing counted wrongly.
        #[test]
        fn lanes_keep_their_order_and_the_account_is_right(
            steps in prop::collection::vec((0_usize..4, 1_usize..300_000), 1..120)
        ) {
            let (queue, shares) = (Queue::default(), pods::<3>());
            let (mut put, mut got) = ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
            let mut take = |queue: &Queue| {
                let group = queue.take(Some(Instant::now()));
                for append in &group.appends {
                    got[append.share.as_ref().unwrap().lane as usize - 1].push(append.bytes());
                }
                !group.appends.is_empty()
            };
            for (lane, bytes) in steps {
                match shares.get(lane) {
                    Some(share) => {
                        let append = append(share, bytes);
                        let bytes = append.bytes();
                        if queue.try_push(append).is_ok() {
                            put[lane].push(bytes);
                        }
                    }
                    None => drop(take(&queue)),
                }
                prop_assert!(queue.backlog_bytes() <= QUEUE_BYTES_MAX);
            }
            while take(&queue) {}
            prop_assert_eq!(put, got);
            prop_assert_eq!(queue.backlog_bytes(), 0);
        }
    }
}
