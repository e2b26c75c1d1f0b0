//! Silence that is proven: how long a log had no event, by a signed checkpoint that covers no more than those before.
//!
//! An agent signs one each minute while nothing is recorded. The last of them enters the log before the next event, and
//! all of them go to the topic. Where none stands for longer, nobody vouches for that time: the agent did not run, its
//! clock was changed, or checkpoints are missing.

use serde::Serialize;

use crate::moment::Moment;

/// From this length on a time without events is worth telling.
const SILENCE_US: i64 = 60_000_000;

/// Longest time without a word of an agent of which nothing is to be said: two checkpoints, and time to be late.
const WORDLESS_US: i64 = 150_000_000;

/// Most silences of an epoch that are listed; all are counted.
const SILENCES_MAX: usize = 200;

/// A time without an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Silence {
    /// Time of the last event.
    pub(crate) from: String,
    /// Time of the checkpoint that proves it.
    pub(crate) to: String,
    pub(crate) seconds: u64,
}

/// Silences of an epoch.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Silences {
    pub(crate) number: u64,
    pub(crate) seconds: u64,
    /// The first of them.
    pub(crate) listed: Vec<Silence>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) longest: Option<Silence>,
}

impl Silences {
    fn add(&mut self, from_us: i64, to_us: i64) {
        let us = to_us.saturating_sub(from_us);
        if us < SILENCE_US {
            return;
        }
        let seconds = us.unsigned_abs() / 1_000_000;
        let silence = Silence { from: Moment(from_us).text(), to: Moment(to_us).text(), seconds };
        self.number += 1;
        self.seconds = self.seconds.saturating_add(seconds);
        if self.longest.as_ref().is_none_or(|longest| longest.seconds < seconds) {
            self.longest = Some(silence.clone());
        }
        if self.listed.len() < SILENCES_MAX {
            self.listed.push(silence);
        }
    }
}

/// Follows what an agent says, and when.
#[derive(Debug, Default)]
pub(super) struct Words {
    /// Times of the last event, and of the last checkpoint since then.
    event_us: Option<i64>,
    checkpoint_us: Option<i64>,
    /// Of the epoch, the last one.
    pub(super) signed_us: Option<i64>,
    pub(super) silences: Silences,
}

impl Words {
    /// A checkpoint that covers all events so far was signed.
    pub(super) fn signed(&mut self, time_us: i64) {
        self.checkpoint_us = self.checkpoint_us.max(Some(time_us));
        self.signed_us = self.signed_us.max(Some(time_us));
    }

    /// An event happened. Returns between which times nobody vouches that the agent ran; it must be one that signs while
    /// nothing is recorded.
    pub(super) fn event(&mut self, time_us: i64) -> Option<(i64, i64)> {
        let before = self.event_us.max(self.checkpoint_us);
        self.end();
        self.event_us = Some(time_us);
        let wordless = |before: &i64| time_us.saturating_sub(*before) > WORDLESS_US;
        before.filter(|before| self.signed_us.is_some() && wordless(before)).map(|before| (before, time_us))
    }

    /// Events are missing: when the last one before them happened is not known.
    pub(super) fn interrupted(&mut self) {
        self.end();
        self.event_us = None;
    }

    /// Nothing more follows what was read so far.
    pub(super) fn end(&mut self) {
        if let (Some(from), Some(to)) = (self.event_us, self.checkpoint_us.take()) {
            self.silences.add(from, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Words;

    const SECOND: i64 = 1_000_000;

    #[test]
    fn silence_reaches_from_an_event_to_the_last_checkpoint_over_as_many() {
        let mut words = Words::default();
        assert_eq!(words.event(0), None);
        words.signed(SECOND);
        assert_eq!(words.event(30 * SECOND), None);
        for minute in [2, 1, 3] {
            words.signed(minute * 60 * SECOND);
        }
        assert_eq!(words.event(200 * SECOND), None);
        words.signed(201 * SECOND);
        words.interrupted();
        words.signed(999 * SECOND);
        words.end();
        assert_eq!((words.silences.number, words.silences.seconds), (1, 150));
        let longest = words.silences.longest.unwrap();
        assert_eq!(
            (longest.from.as_str(), longest.to.as_str()),
            ("1970-01-01T00:00:30.000Z", "1970-01-01T00:03:00.000Z")
        );
        assert_eq!(words.signed_us, Some(999 * SECOND));
    }

    #[test]
    fn a_time_for_which_nobody_vouches_is_named_where_agents_sign_while_idle() {
        let mut words = Words::default();
        words.event(0);
        assert_eq!(words.event(1000 * SECOND), None, "an agent of an earlier version");
        words.signed(1001 * SECOND);
        words.signed(1060 * SECOND);
        assert_eq!(words.event(1400 * SECOND), Some((1060 * SECOND, 1400 * SECOND)));
        assert_eq!(words.event(i64::MIN), None, "a clock that was set back");
        assert_eq!(words.silences.seconds, 60);
    }
}
