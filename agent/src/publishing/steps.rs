//! Steps of the node's clock, as they show against time that passes, and what the publisher does about them.
//!
//! What is waited for here goes by time that passes. librdkafka's threads wait for absolute times of the clock instead
//! (`cnd_timedwait`): one that waits while the clock is set back waits that much longer, be it a day, unless something comes for
//! it to do. So the client is made anew then. How old a backlog is, and since when segments may be missed, is told by the
//! times of events and marks: those before a step are taken for what the clock would have said.

use std::{collections::VecDeque, ops::RangeInclusive};

use super::{
    feed::Position,
    flight::Made,
    publisher::Publisher,
    stream::{Now, Stream},
};
use crate::recording::{Durable, IDLE_CHECKPOINT_INTERVAL};

/// What is less is none: clocks are slewed, and a thread may be held up between looking at one clock and the other.
const STEP_US_MIN: i64 = 1_000_000;

/// How long before the clock was set an event may have been made that was durable only afterwards.
const BEHIND_US_MAX: i64 = 2_000_000;

/// And a checkpoint that is not in the log, which stays until the next one is signed.
const UNLOGGED_BEHIND_US_MAX: i64 = IDLE_CHECKPOINT_INTERVAL.as_micros() as i64 + BEHIND_US_MAX;

/// Most steps that are known apart.
const STEPS_MAX: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Steps {
    last: Option<Now>,
    steps: VecDeque<Step>,
}

/// The clock was set.
#[derive(Debug)]
struct Step {
    by_us: i64,
    /// How far the agent's own epoch was durable when that was seen.
    durable: Durable,
    /// What the clock said from the look before, had it been set then, to the look that saw it.
    seen: RangeInclusive<i64>,
}

impl Steps {
    /// By how many microseconds the clock was set since the last look.
    pub(super) fn look(&mut self, now: Now, durable: Durable) -> Option<i64> {
        let last = self.last.replace(now)?;
        let passed = now.instant.saturating_duration_since(last.instant).as_micros();
        let expected = last.unix_us.saturating_add(i64::try_from(passed).unwrap_or(i64::MAX));
        let by_us = now.unix_us.saturating_sub(expected);
        if by_us.saturating_abs() < STEP_US_MIN {
            return None;
        }
        if self.steps.len() == STEPS_MAX
            && let Some(oldest) = self.steps.pop_front()
            && let Some(next) = self.steps.front_mut()
        {
            next.by_us = next.by_us.saturating_add(oldest.by_us);
        }
        let seen = last.unix_us.saturating_add(by_us)..=now.unix_us;
        self.steps.push_back(Step { by_us, durable, seen });
        Some(by_us)
    }

    /// When an event was made, by the clock as it is now; `end` is behind it in the agent's own epoch, and none in one that had
    /// ended before. What was made when the clock had been set and nobody had seen it yet bears its time by the new one.
    pub(super) fn by_now(&self, made: Made, end: Option<Position>) -> i64 {
        if !made.in_log {
            // That is told by the clock as it is, see below.
            return made.unix_us;
        }
        let was_durable = |durable: Durable| {
            end.is_none_or(|Position { segment, offset, .. }| Durable { segment, offset } <= durable)
        };
        self.steps.iter().fold(made.unix_us, |made, step| {
            let is_before = was_durable(step.durable) || step.was_on_its_way(made, BEHIND_US_MAX);
            if is_before { step.shifted(made) } else { made }
        })
    }

    /// When a checkpoint was signed that is not in the log and is sent now, by the clock as it is now.
    pub(super) fn unlogged_by_now(&self, signed_unix_us: i64) -> i64 {
        self.steps.iter().fold(signed_unix_us, |signed, step| {
            if step.was_on_its_way(signed, UNLOGGED_BEHIND_US_MAX) { step.shifted(signed) } else { signed }
        })
    }
}

impl Step {
    /// Whether an event has a time of just before, by the clock as it was: then it was not durable yet when the clock was set.
    fn was_on_its_way(&self, made_unix_us: i64, behind_us_max: i64) -> bool {
        let former = made_unix_us.saturating_add(self.by_us);
        (self.seen.start().saturating_sub(behind_us_max)..=*self.seen.end()).contains(&former)
    }

    /// The time of what was made before, by the clock as it was set; unless it has one of when that was seen, and bears it already. What is
    /// durable is asked a moment later.
    fn shifted(&self, made_unix_us: i64) -> i64 {
        let seen = *self.seen.start()..=self.seen.end().saturating_add(BEHIND_US_MAX);
        if seen.contains(&made_unix_us) { made_unix_us } else { made_unix_us.saturating_add(self.by_us) }
    }
}

impl Publisher {
    /// Looks whether the clock was set.
    pub(super) fn look_at_clock(&mut self, now: Now) {
        let Some(by_us) = self.steps.look(now, self.durable.get()) else { return };
        tracing::warn!(
            event = "clock-set",
            seconds = by_us / 1_000_000,
            "the node's clock was set, or the machine was suspended"
        );
        for stream in &mut self.streams {
            stream.clock_set(by_us / 1_000_000);
            if let Some(step) = self.steps.steps.back() {
                stream.flight.unlogged(|signed| step.shifted(signed));
            }
        }
        self.oldest = self.oldest.map(|oldest| oldest.saturating_add(by_us));
        if by_us < 0 {
            self.give_up();
        }
        self.measure(now);
    }

    /// When the oldest event was made that is on its way, by the clock as it is now.
    pub(super) fn oldest_in_flight(&self) -> Option<i64> {
        let oldest = |stream: &Stream| {
            let (made, end) = stream.flight.oldest()?;
            Some(self.steps.by_now(made, (stream.epoch == self.settings.own).then_some(end)))
        };
        self.streams.iter().filter_map(oldest).min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Made, STEPS_MAX, Steps};
    use crate::{
        publishing::{
            clock::Clock,
            feed::Position,
            fixture::{Broker, Log, Run, WINDOW},
            publisher_tests::{events, settle},
            stream::Now,
        },
        recording::Durable,
    };

    const DAY_S: i64 = 86_400;
    const DAY_US: i64 = DAY_S * 1_000_000;

    fn at(offset: u64) -> Durable {
        Durable { segment: 0, offset }
    }

    fn behind(offset: u64) -> Option<Position> {
        Some(Position { segment: 0, offset, sequence: 0, commit: 0 })
    }

    #[test]
    fn what_was_made_before_a_step_is_as_old_as_it_is() {
        let (mut steps, mut clock) = (Steps::default(), Clock::new());
        assert_eq!(steps.look(clock.pass(Duration::ZERO), at(0)), None);
        let first = clock.0.unix_us;
        clock.set(2 * DAY_S);
        assert_eq!(steps.look(clock.pass(Duration::from_secs(1)), at(10)), Some(2 * DAY_US));
        assert_eq!(steps.look(clock.pass(Duration::from_secs(90)), at(10)), None);
        let second = clock.0.unix_us;
        clock.set(-DAY_S);
        assert_eq!(steps.look(clock.pass(Duration::from_secs(1)), at(20)), Some(-DAY_US));
        let now = clock.0.unix_us;
        let age_s = |unix_us, end| (now - steps.by_now(Made { unix_us, in_log: true }, end)) / 1_000_000;
        // The second of them was on its way to the disk when the clock was set.
        let before = [(first, 10, 92), (first - 500_000, 11, 92), (second, 20, 1), (second, 21, 1)];
        for (made, offset, expected) in before.into_iter().chain([(now, 21, 0)]) {
            assert_eq!(age_s(made, behind(offset)), expected, "{offset}");
        }
        // Made when the clock had been set and nobody had seen it yet.
        let set_before_it_was_seen = [(first + 2 * DAY_US, 10, 92), (now, 20, 0)];
        for (made, offset, expected) in set_before_it_was_seen {
            assert_eq!(age_s(made, behind(offset)), expected, "{offset}");
        }
        assert_eq!(age_s(first, None), 92);
        // Not in the log: signed before the clock was set, and after.
        for (signed, expected) in [(second - 40_000_000, 41), (now - 500_000, 0), (now + 7_000_000, -7)] {
            assert_eq!((now - steps.unlogged_by_now(signed)) / 1_000_000, expected);
        }
        for _ in 0..2 * STEPS_MAX {
            clock.set(2);
            steps.look(clock.pass(Duration::ZERO), at(30));
        }
        let began = Made { unix_us: 0, in_log: true };
        assert_eq!(steps.by_now(began, None), DAY_US + 64_000_000, "none is forgotten");
        assert_eq!(steps.steps.len(), STEPS_MAX);
    }

    #[test]
    fn a_client_that_may_wait_for_a_day_is_made_anew_and_nothing_is_lost() {
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        log.events(3);
        let mut run = Run::with(&log, Box::new(broker.clone()));
        run.turn_at(clock.pass(Duration::ZERO));
        clock.set(DAY_S);
        run.turn_at(clock.pass(Duration::from_secs(1)));
        assert_eq!(broker.with(|state| state.made), 1, "forward it does not wait");
        clock.set(-DAY_S);
        run.turn_at(clock.pass(Duration::from_secs(1)));
        assert_eq!(broker.with(|state| (state.made, state.waiting.len())), (2, 3), "in the same turn");
        settle(&mut run, &broker, &mut clock);
        assert_eq!(broker.with(|state| state.acknowledged.clone()), events(log.epoch, 0..3));
        assert!(run.published().errors.iter().all(|(_, count)| *count == 0), "it is nobody's fault");
    }

    #[test]
    fn a_backlog_is_as_old_as_it_is_whatever_the_clock_says() {
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        log.events(3);
        let mut run = Run::with(&log, Box::new(broker.clone()));
        let age_us = |run: &mut Run, now: Now| {
            run.turn_at(now);
            now.unix_us - run.publisher.measures.unacknowledged().1.unwrap()
        };
        let first = age_us(&mut run, clock.pass(Duration::ZERO));
        for by in [DAY_S, DAY_S, -2 * DAY_S, DAY_S] {
            clock.set(by);
            age_us(&mut run, clock.pass(Duration::from_secs(10)));
        }
        assert_eq!(age_us(&mut run, clock.pass(Duration::ZERO)), first + 40_000_000);
    }

    #[test]
    fn a_replay_window_that_a_step_has_moved_is_the_next_agents_as_well() {
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        log.events(3);
        log.rotate();
        log.events(1);
        let mut run = Run::with(&log, Box::new(broker.clone()));
        run.turn_at(clock.pass(Duration::ZERO));
        broker.acknowledge_all();
        run.turn_at(clock.pass(WINDOW / 8));
        clock.set(DAY_S);
        (0..2).for_each(|_| run.turn_at(clock.pass(WINDOW / 8)));
        drop(run);
        let mut run = Run::with(&log, Box::new(broker));
        run.turn_at(clock.pass(WINDOW / 8));
        assert!(log.segment(0).exists(), "its window has not passed");
        (0..8).for_each(|_| run.turn_at(clock.pass(WINDOW / 8)));
        assert!(!log.segment(0).exists());
    }

    #[test]
    fn a_replay_window_passes_with_the_time_that_passes() {
        let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
        log.events(3);
        log.rotate();
        log.events(1);
        let mut run = Run::with(&log, Box::new(broker.clone()));
        run.turn_at(clock.pass(Duration::ZERO));
        broker.acknowledge_all();
        for by in [0, DAY_S, DAY_S, -2 * DAY_S, DAY_S, 0] {
            clock.set(by);
            run.turn_at(clock.pass(WINDOW / 8));
            assert!(log.segment(0).exists(), "its window has not passed");
        }
        (0..4).for_each(|_| run.turn_at(clock.pass(WINDOW / 8)));
        assert!(!log.segment(0).exists(), "it is not kept for ever");
    }
}
