//! What is on its way: messages that were sent and, of those, how far all are acknowledged without a gap.
//!
//! Sans-IO. Outcomes come in any order; the watermark moves only over what is acknowledged from the beginning on.

use std::collections::VecDeque;

use super::{feed::Position, sink::Ticket};

/// When what a message tells was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) unix_us: i64,
    /// It is a frame of the log; else it is younger than what it follows, and its time follows the clock.
    pub(super) in_log: bool,
}

#[derive(Debug)]
struct Sent {
    ticket: Ticket,
    /// Behind its frame.
    end: Position,
    bytes: usize,
    made: Made,
    done: bool,
}

/// The messages of one epoch that were sent.
#[derive(Debug)]
pub(super) struct Flight {
    watermark: Position,
    /// In the order of their sending: tickets grow.
    sent: VecDeque<Sent>,
    bytes: usize,
}

impl Flight {
    /// Nothing is on its way; everything before `watermark` is acknowledged.
    pub(super) fn new(watermark: Position) -> Self {
        Self { watermark, sent: VecDeque::new(), bytes: 0 }
    }

    /// Everything before it is acknowledged.
    pub(super) fn watermark(&self) -> Position {
        self.watermark
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sent.is_empty()
    }

    /// Bytes of what is not acknowledged yet.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of what is not behind the watermark.
    pub(super) fn len(&self) -> usize {
        self.sent.len()
    }

    /// When the event was made that holds the watermark back, and what is behind it.
    pub(super) fn oldest(&self) -> Option<(Made, Position)> {
        self.sent.front().map(|sent| (sent.made, sent.end))
    }

    /// A frame of the log was sent, made at this time; `end` is behind it.
    pub(super) fn sent(&mut self, ticket: Ticket, end: Position, bytes: usize, unix_us: i64) {
        self.push(ticket, end, bytes, Made { unix_us, in_log: true });
    }

    /// What is not in the log was sent, made at this time, by the clock as it is; all before `end` was.
    pub(super) fn sent_unlogged(&mut self, ticket: Ticket, end: Position, bytes: usize, unix_us: i64) {
        self.push(ticket, end, bytes, Made { unix_us, in_log: false });
    }

    fn push(&mut self, ticket: Ticket, end: Position, bytes: usize, made: Made) {
        debug_assert!(self.sent.back().is_none_or(|last| last.ticket < ticket && last.end <= end));
        self.bytes += bytes;
        self.sent.push_back(Sent { ticket, end, bytes, made, done: false });
    }

    /// The clock was set: by it as it is, what is not in the log was made when `time` says.
    pub(super) fn unlogged(&mut self, time: impl Fn(i64) -> i64) {
        for sent in self.sent.iter_mut().filter(|sent| !sent.made.in_log) {
            sent.made.unix_us = time(sent.made.unix_us);
        }
    }

    /// There is nothing to send before `end`.
    pub(super) fn passed(&mut self, ticket: Ticket, end: Position) {
        let made = Made { unix_us: i64::MAX, in_log: true };
        self.sent.push_back(Sent { ticket, end, bytes: 0, made, done: true });
        self.settle();
    }

    /// A message was acknowledged; returns its length, when its event was made, and what is behind that; none if it is not one
    /// of these.
    pub(super) fn acknowledge(&mut self, ticket: Ticket) -> Option<(usize, Made, Position)> {
        let index = self.sent.binary_search_by_key(&ticket, |sent| sent.ticket).ok()?;
        let sent = self.sent.get_mut(index).filter(|sent| !sent.done)?;
        sent.done = true;
        let (bytes, made, end) = (sent.bytes, sent.made, sent.end);
        self.bytes -= bytes;
        self.settle();
        Some((bytes, made, end))
    }

    fn settle(&mut self) {
        while let Some(first) = self.sent.pop_front_if(|first| first.done) {
            self.watermark = first.end;
        }
    }

    /// What was sent and not acknowledged is lost; returns where to go on.
    pub(super) fn rewind(&mut self) -> Position {
        self.sent.clear();
        self.bytes = 0;
        self.watermark
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::feed::Position, Flight, Made};

    fn at(offset: u64) -> Position {
        Position { segment: 0, offset, sequence: offset, commit: 0 }
    }

    fn made(unix_us: i64) -> Made {
        Made { unix_us, in_log: true }
    }

    #[test]
    fn the_watermark_waits_for_the_first_that_is_not_acknowledged() {
        let mut flight = Flight::new(at(0));
        (1..=3).for_each(|n| flight.sent(n, at(n), 10, n as i64));
        flight.passed(4, at(4));
        assert_eq!(flight.acknowledge(2).map(|(bytes, ..)| bytes), Some(10));
        assert_eq!(
            (flight.watermark(), flight.bytes(), flight.oldest()),
            (at(0), 20, Some((made(1), at(1))))
        );
        flight.acknowledge(1);
        assert_eq!((flight.watermark(), flight.oldest()), (at(2), Some((made(3), at(3)))));
        assert_eq!((flight.acknowledge(1), flight.acknowledge(2), flight.acknowledge(9)), (None, None, None));
        flight.acknowledge(3);
        assert_eq!(flight.watermark(), at(4), "there is nothing to send up to there");
        assert!(flight.is_empty() && flight.bytes() == 0);
    }

    proptest! {
        #[test]
        fn whatever_the_order_the_watermark_is_the_longest_acknowledged_prefix(
            order in Just((1..=40_u64).collect::<Vec<_>>()).prop_shuffle(), taken in 0..40_usize,
        ) {
            let mut flight = Flight::new(at(0));
            (1..=40).for_each(|n| flight.sent(n, at(n), 1, 0));
            let acknowledged = &order[..taken];
            acknowledged.iter().for_each(|ticket| { flight.acknowledge(*ticket); });
            let prefix = (1..=40).take_while(|n| acknowledged.contains(n)).count() as u64;
            prop_assert_eq!(flight.watermark(), at(prefix));
            prop_assert_eq!(flight.bytes(), 40 - taken);
            prop_assert_eq!(flight.rewind(), at(prefix));
            prop_assert!(flight.is_empty() && flight.bytes() == 0);
        }
    }
}
