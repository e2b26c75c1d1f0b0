//! The bounded queue before the journal's writer: many producers, async and threads; one consumer, a thread.
//!
//! The consumer takes everything that waits at once: that is the group of a group commit. While the disk syncs one
//! group, the next gathers, so the group grows with the load and nobody waits for a timer.
//!
//! Each pod has a lane of its own, the agent another. Within a lane order is kept; lanes take turns, so that one that is
//! flooded delays itself. A lane may hold half of what is free: however many are flooded, there is room for a new one.
//! Who waits for room has it kept free from those that hold more or came later ([`Claims`]): nobody waits for ever.
//! What is encrypted with a key that is not on disk yet is held back in its lane, and what follows in that lane behind it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::{
    claims::{self, Claims, TURN_BYTES},
    entry::Append,
    error::RecordingError,
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
    closed: Option<String>,
}

#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Append>,
    /// What comes behind these: the first one waits for its key.
    held: VecDeque<Append>,
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

    /// What is held back in a lane goes on as far as keys are on disk; what has none that will ever be is refused. Returns whether
    /// the writer has to look.
    fn release(&mut self, number: u64) -> bool {
        let Some(lane) = self.lanes.get_mut(&number) else { return false };
        let mut wake = false;
        while let Some(keys) = lane.held.front().and_then(Append::keys_stored) {
            let Some(append) = lane.held.pop_front() else { break };
            let bytes = append.bytes();
            if let Err(error) = keys {
                lane.bytes -= bytes;
                self.bytes -= bytes;
                self.dropped += append.entries.len() as u64;
                // Who went away need not be told.
                let _ = append.waiter.map(|waiter| waiter.send(Err(error)));
                continue;
            }
            wake |= append.waiter.is_some() || self.turns.is_empty() || self.ready > GROUP_BYTES_MAX;
            self.ready += bytes;
            self.durable += usize::from(append.waiter.is_some());
            if lane.waiting.is_empty() {
                self.turns.push_back(number);
            }
            lane.waiting.push_back(append);
        }
        if lane.waiting.is_empty() && lane.held.is_empty() {
            self.lanes.remove(&number);
        }
        wake
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
        lane.held.push_back(append);
        if state.release(number) {
            self.work.notify_one();
        }
    }

    /// A key is on disk, or will not be. What it encrypted may lie in another lane than that of the pod's share when it was made: a
    /// pod that shared one with others may have its own by now.
    pub(super) fn keys_settled(&self) {
        let mut state = self.lock();
        let held: Vec<_> =
            state.lanes.iter().filter(|(_, lane)| !lane.held.is_empty()).map(|(number, _)| *number).collect();
        let woken = held.into_iter().filter(|number| state.release(*number)).count();
        if woken > 0 || state.has_ended() {
            self.work.notify_one();
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
            room.as_mut().enable();
            {
                let mut state = self.lock();
                if state.closed.is_some() {
                    return Err(RecordingError::Closed);
                }
                if state.has_room_for(lane, bytes) {
                    then(self, &mut state);
                    return Ok(());
                }
                claim.number = state.claims.wait(lane, bytes, claim.number);
            }
            room.await;
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
        self.work.notify_one();
        self.tell_of_room(&mut state);
    }

    /// Whoever is woken may take locks of its own, but never asks this queue under one of them.
    fn tell_of_room(&self, state: &mut State) {
        self.room.notify_all();
        self.room_async.notify_waiters();
        state.wakers.drain(..).for_each(Waker::wake);
    }

    /// Takes the next group: as soon as somebody waits for an append, or the oldest one has waited long enough, or the
    /// group is large; or nothing, when `deadline` passes.
    pub(super) fn take(&self, deadline: Option<Instant>) -> Group {
        let behind = Duration::from_millis(COMMIT_BEHIND_MS);
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let oldest = state.lanes.values().filter_map(|lane| Some(lane.waiting.front()?.since)).min();
            let due = oldest.map(|since| since + behind);
            let ready = state.durable > 0
                || state.ready >= GROUP_BYTES_MAX
                || state.closed.is_some() && !state.turns.is_empty()
                || state.has_ended()
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
            self.queue.tell_of_room(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use futures::FutureExt as _;
    use proptest::prelude::*;
    use weir_common::event::{Caller, Kind, Pod};

    use super::{
        super::entry::{Append, Entry, Ids, Origin},
        super::share::{PodQuota, Share, Shares},
        QUEUE_BYTES_MAX, QUEUE_BYTES_WITH_SMALL_MAX, Queue,
    };

    fn entry(bytes: usize) -> Entry {
        let origin = Origin {
            node: "n".into(),
            epoch: "e".into(),
            tenant: None,
            clusters: Vec::new(),
            encryption: None,
        };
        let reason = "x".repeat(bytes);
        origin.entry(None, Ids::default(), Kind::Gap { reason, events: None, bytes: None }).unwrap()
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
