//! Which timestamps a topic takes: none that is ahead of the brokers' clocks by more than `message.timestamp.after.max.ms`,
//! an hour by default.
//!
//! A message's timestamp is its event's time. Where that is refused, since the node's clock is wrong or was when the event was
//! made, the message goes with the latest time that the topic is known to take; the event keeps its own. Otherwise nothing
//! would be published until the brokers' clocks are there, also when the node's is right again. Sans-IO.

use std::time::{Duration, Instant};

/// So long a topic that has refused a time is given none that is later than what it takes; then it is tried again, for its
/// settings, or a clock, may be others.
const REFUSED_FOR: Duration = Duration::from_secs(600);

/// How much earlier a time is that is tried next while none is known to be taken; it doubles each time.
const EARLIER_MS: i64 = 3_600_000;

/// So long a message may be under way: by that it is earlier, as what the brokers take becomes later meanwhile.
const UNDER_WAY_MS_MAX: i64 = 300_000;

/// Those of all topics, by name: three at most, looked through for each message.
#[derive(Debug, Default)]
pub(super) struct TopicStamps(Vec<(String, Stamps)>);

/// Which topic it is; stays the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TopicIndex(usize);

impl TopicStamps {
    pub(super) fn index(&mut self, topic: &str) -> TopicIndex {
        let known = self.0.iter().position(|(name, _)| name == topic);
        TopicIndex(known.unwrap_or_else(|| {
            self.0.push((topic.to_owned(), Stamps::new(Instant::now())));
            self.0.len() - 1
        }))
    }

    pub(super) fn of(&mut self, topic: TopicIndex) -> &mut Stamps {
        &mut self.0[topic.0].1
    }
}

/// Those of one topic. Times are kept as they were at `origin`: what the brokers take becomes later as time passes.
#[derive(Debug)]
pub(super) struct Stamps {
    origin: Instant,
    /// The latest that was taken.
    taken_ms: Option<i64>,
    /// The earliest that was refused, while the latest that is taken is searched for between the two.
    refused_ms: Option<i64>,
    /// The latest that is sent, and when that was found out.
    latest: Option<(i64, Instant)>,
    earlier_ms: i64,
}

impl Stamps {
    pub(super) fn new(origin: Instant) -> Self {
        Self { origin, taken_ms: None, refused_ms: None, latest: None, earlier_ms: EARLIER_MS }
    }

    fn passed_ms(&self, now: Instant) -> i64 {
        i64::try_from(now.saturating_duration_since(self.origin).as_millis()).unwrap_or(i64::MAX)
    }

    /// The timestamp of a message whose event was made at this time.
    pub(super) fn stamp(&mut self, unix_ms: i64, now: Instant) -> i64 {
        let refused_for = |since| now.saturating_duration_since(since);
        self.latest = self.latest.filter(|(_, since)| refused_for(*since) < REFUSED_FOR);
        self.refused_ms = self.refused_ms.filter(|_| self.latest.is_some());
        let latest =
            self.latest.map_or(i64::MAX, |(at_origin, _)| at_origin.saturating_add(self.passed_ms(now)));
        unix_ms.min(latest).max(0)
    }

    /// A message with this timestamp was taken.
    pub(super) fn taken(&mut self, unix_ms: i64, now: Instant) {
        let at_origin = unix_ms.saturating_sub(self.passed_ms(now));
        self.taken_ms = self.taken_ms.max(Some(at_origin));
        self.earlier_ms = EARLIER_MS;
        let (Some((latest, _)), Some(refused)) = (&mut self.latest, self.refused_ms) else { return };
        if at_origin.saturating_add(UNDER_WAY_MS_MAX) < *latest {
            return;
        }
        // Half way further each time, until it is within an hour.
        let further = refused.saturating_sub(at_origin);
        if further > EARLIER_MS {
            *latest = at_origin.saturating_add(further / 2);
        } else {
            (*latest, self.refused_ms) = (at_origin, None);
        }
    }

    /// A message with this timestamp was refused for it.
    pub(super) fn refused(&mut self, unix_ms: i64, now: Instant) {
        let at_origin = unix_ms.saturating_sub(self.passed_ms(now));
        // Others were on their way when the first was refused: they say nothing new.
        if self.latest.is_some_and(|(latest, _)| at_origin > latest) {
            return;
        }
        // What is later than one that is refused now is not taken any more: a clock of the brokers was set.
        self.taken_ms = self.taken_ms.filter(|taken| *taken < at_origin);
        // What was taken before is about now; where nothing was, it is searched for.
        if self.taken_ms.is_none() || self.refused_ms.is_some() {
            self.refused_ms = Some(at_origin);
        }
        let latest = self.taken_ms.unwrap_or_else(|| {
            let earlier = at_origin.saturating_sub(self.earlier_ms);
            self.earlier_ms = self.earlier_ms.saturating_mul(2);
            earlier
        });
        self.latest = Some((latest, now));
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::{EARLIER_MS, REFUSED_FOR, Stamps};

    const HOUR_MS: i64 = 3_600_000;
    const DAY_MS: i64 = 24 * HOUR_MS;

    /// A topic that takes what is at most an hour ahead of its clock, which goes as time does.
    struct Topic {
        stamps: Stamps,
        now: Instant,
        unix_ms: i64,
    }

    impl Topic {
        fn new() -> Self {
            let now = Instant::now();
            Self { stamps: Stamps::new(now), now, unix_ms: 1_700_000_000_000 }
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
            self.unix_ms += i64::try_from(time.as_millis()).unwrap();
        }

        /// Sends an event until it is taken; gives the timestamp and how often it was refused.
        fn send(&mut self, unix_ms: i64) -> (i64, u32) {
            let mut refused = 0;
            loop {
                let stamp = self.stamps.stamp(unix_ms, self.now);
                self.pass(Duration::from_millis(500));
                if stamp <= self.unix_ms + HOUR_MS {
                    self.stamps.taken(stamp, self.now);
                    return (stamp, refused);
                }
                self.stamps.refused(stamp, self.now);
                refused += 1;
                assert!(refused < 64, "it is never taken");
            }
        }
    }

    #[test]
    fn a_time_that_is_refused_becomes_one_that_is_taken_and_others_are_as_they_were() {
        let mut topic = Topic::new();
        let now = topic.unix_ms;
        assert_eq!(topic.send(now), (now, 0));
        // The clock is a day ahead: once refused, then as late as what was taken, and later as time passes.
        let (first, refused) = topic.send(now + DAY_MS);
        assert_eq!((first / 1000, refused), (now / 1000, 1));
        topic.pass(Duration::from_secs(60));
        let (second, refused) = topic.send(now + DAY_MS + 60_000);
        assert!(refused == 0 && second >= first + 60_000, "{first} {second}");
        // The clock is right again, and one that is a day behind is taken as it is.
        let late = topic.unix_ms - 2000;
        assert_eq!((topic.send(late), topic.send(late - DAY_MS)), ((late, 0), (late - DAY_MS, 0)));
        // It is tried again what the topic takes.
        topic.pass(REFUSED_FOR);
        let now = topic.unix_ms;
        assert_eq!(topic.send(now + HOUR_MS / 2), (now + HOUR_MS / 2, 0));
    }

    #[test]
    fn a_node_whose_clock_was_never_right_finds_a_time_that_is_taken() {
        let mut topic = Topic::new();
        let wrong = topic.unix_ms + 365 * DAY_MS;
        let (stamp, refused) = topic.send(wrong);
        assert!(stamp > 0 && refused < 16, "{stamp} after {refused}");
        // What is long ago a topic may forget at once: it comes nearer with each message.
        let refused: u32 = (0..20).map(|_| topic.send(wrong).1).sum();
        let (stamp, again) = topic.send(wrong);
        assert!(
            (topic.unix_ms - 2 * HOUR_MS..).contains(&stamp),
            "{} hours",
            (topic.unix_ms - stamp) / HOUR_MS
        );
        assert!(refused < 16 && again == 0, "refused {refused} times, and {again}");
    }

    #[test]
    fn many_that_are_refused_at_once_are_one_refusal() {
        let mut topic = Topic::new();
        let wrong = topic.unix_ms + DAY_MS;
        let stamps: Vec<_> = (0..100).map(|_| topic.stamps.stamp(wrong, topic.now)).collect();
        stamps.iter().for_each(|stamp| topic.stamps.refused(*stamp, topic.now));
        assert_eq!(topic.stamps.stamp(wrong, topic.now), wrong - EARLIER_MS);
    }

    proptest! {
        #[test]
        fn whatever_clocks_say_each_event_is_taken_soon(
            steps in proptest::collection::vec((-400..400_i64, -400..400_i64, 0..2000_u64), 1..30),
        ) {
            let mut topic = Topic::new();
            for (node_days, broker_days, seconds) in steps {
                topic.pass(Duration::from_secs(seconds));
                // Somebody sets the brokers' clocks as well.
                topic.unix_ms += broker_days / 100 * DAY_MS;
                let (stamp, refused) = topic.send(topic.unix_ms + node_days * DAY_MS);
                prop_assert!(stamp <= topic.unix_ms + HOUR_MS);
                prop_assert!(refused <= 3 + (400 * DAY_MS / EARLIER_MS).ilog2(), "refused {refused} times");
            }
        }
    }
}
