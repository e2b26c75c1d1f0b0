//! What waits for one of the threads that mask: each pod has a lane, and lanes take turns. One whose records find no room
//! before the writer is passed over until there is: a pod that floods holds up itself. Knows neither threads nor clocks.

use std::collections::{HashMap, VecDeque};

/// See the module. Within a lane order is kept.
#[derive(Debug)]
pub(super) struct Jobs<T> {
    /// Those in which something waits, and the one whose job is being done.
    lanes: HashMap<u64, VecDeque<T>>,
    /// Lanes by whose turn it is.
    turns: VecDeque<u64>,
    /// Lanes that are passed over.
    stuck: Vec<u64>,
    /// How often there was room again.
    rooms: u64,
}

/// Whose job is being done. Its lane has no other turn until this one ends.
#[derive(Debug)]
pub(super) struct Turn {
    lane: u64,
    rooms: u64,
}

// Not derived: that would ask the same of the jobs.
impl<T> Default for Jobs<T> {
    fn default() -> Self {
        Self { lanes: HashMap::new(), turns: VecDeque::new(), stuck: Vec::new(), rooms: 0 }
    }
}

impl<T> Jobs<T> {
    pub(super) fn push(&mut self, lane: u64, job: T) {
        let turns = &mut self.turns;
        let waiting = self.lanes.entry(lane).or_insert_with(|| {
            turns.push_back(lane);
            VecDeque::new()
        });
        waiting.push_back(job);
    }

    /// The next job of the lane whose turn it is; none while there is none, or all are passed over.
    pub(super) fn take(&mut self) -> Option<(Turn, T)> {
        let lane = self.turns.pop_front()?;
        let job = self.lanes.get_mut(&lane)?.pop_front()?;
        Some((Turn { lane, rooms: self.rooms }, job))
    }

    /// The job is done.
    pub(super) fn done(&mut self, turn: &Turn) {
        if self.lanes.get(&turn.lane).is_some_and(VecDeque::is_empty) {
            self.lanes.remove(&turn.lane);
        } else {
            self.turns.push_back(turn.lane);
        }
    }

    /// What is left of the job found no room: it comes first in its lane, when there is room again.
    pub(super) fn put_back(&mut self, turn: &Turn, rest: T) {
        self.lanes.entry(turn.lane).or_default().push_front(rest);
        // There may have been room since it was tried.
        if turn.rooms == self.rooms {
            self.stuck.push(turn.lane);
        } else {
            self.turns.push_back(turn.lane);
        }
    }

    /// There is room: lanes that were passed over have turns again.
    pub(super) fn resume(&mut self) {
        self.rooms += 1;
        self.turns.extend(self.stuck.drain(..));
    }

    /// How many wait.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lanes.values().map(VecDeque::len).sum()
    }

    /// How many lanes are passed over, if all are.
    #[cfg(test)]
    pub(super) fn stuck(&self) -> Option<usize> {
        (self.stuck.len() == self.lanes.len()).then_some(self.stuck.len())
    }

    /// Whether nothing waits and nothing is being done.
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::Jobs;

    #[test]
    fn lanes_take_turns_and_keep_their_order() {
        let mut jobs = Jobs::default();
        for (lane, job) in [(1, 'a'), (1, 'b'), (1, 'c'), (2, 'x'), (2, 'y')] {
            jobs.push(lane, job);
        }
        let mut done = String::new();
        while let Some((turn, job)) = jobs.take() {
            done.push(job);
            jobs.done(&turn);
        }
        assert_eq!(done, "axbyc");
        assert!(jobs.is_empty() && jobs.turns.is_empty());
    }

    #[test]
    fn a_lane_without_room_is_passed_over_until_there_is_and_then_goes_on_where_it_was() {
        let mut jobs = Jobs::default();
        jobs.push(1, 'a');
        jobs.push(1, 'b');
        let (turn, job) = jobs.take().unwrap();
        jobs.put_back(&turn, job);
        jobs.push(2, 'x');
        jobs.push(1, 'c');
        let (turn, job) = jobs.take().unwrap();
        assert_eq!(job, 'x');
        jobs.done(&turn);
        assert!(jobs.take().is_none() && !jobs.is_empty());
        jobs.resume();
        let mut done = String::new();
        while let Some((turn, job)) = jobs.take() {
            done.push(job);
            jobs.done(&turn);
        }
        assert_eq!(done, "abc");
    }

    #[test]
    fn room_that_came_while_a_job_was_tried_is_not_missed() {
        let mut jobs = Jobs::default();
        jobs.push(1, 'a');
        let (turn, job) = jobs.take().unwrap();
        jobs.resume();
        jobs.put_back(&turn, job);
        assert_eq!(jobs.take().map(|(_, job)| job), Some('a'));
    }
}
