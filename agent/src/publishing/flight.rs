//! What is on its way: messages that were sent and, of those, how far all are acknowledged without a gap.
//!
//! Sans-IO. Outcomes come in any order; the watermark moves only over what is acknowledged from the beginning on.

use std::collections::VecDeque;

use super::{feed::Position, sink::Ticket};

#[derive(Debug)]
struct Sent {
    ticket: Ticket,
    /// Behind its frame.
    end: Position,
    bytes: usize,
    time_unix_us: i64,
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
    pub(super) fn oldest(&self) -> Option<(i64, Position)> {
        self.sent.front().map(|sent| (sent.time_unix_us, sent.end))
    }

    /// A message was sent; `end` is behind its frame.
    pub(super) fn sent(&mut self, ticket: Ticket, end: Position, bytes: usize, time_unix_us: i64) {
        debug_assert!(self.sent.back().is_none_or(|last| last.ticket < ticket && last.end <= end));
        self.bytes += bytes;
        self.sent.push_back(Sent { ticket, end, bytes, time_unix_us, done: false });
    }

    /// There is nothing to send before `end`.
    pub(super) fn passed(&mut self, ticket: Ticket, end: Position) {
        self.sent.push_back(Sent { ticket, end, bytes: 0, time_unix_us: i64::MAX, done: true });
        self.settle();
    }

    /// A message was acknowledged; returns its length, when its event was made, and what is behind that; none if it is not one
    /// of these.
    pub(super) fn acknowledge(&mut self, ticket: Ticket) -> Option<(usize, i64, Position)> {
        let index = self.sent.binary_search_by_key(&ticket, |sent| sent.ticket).ok()?;
        let sent = self.sent.get_mut(index).filter(|sent| !sent.done)?;
        sent.done = true;
        let (bytes, time_unix_us, end) = (sent.bytes, sent.time_unix_us, sent.end);
        self.bytes -= bytes;
        self.settle();
        Some((bytes, time_unix_us, end))
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

    use super::{super::feed::Position, Flight};

    fn at(offset: u64) -> Position {
        Position { segment: 0, offset, sequence: offset, commit: 0 }
    }

    #[test]
    fn the_watermark_waits_for_the_first_that_is_not_acknowledged() {
        let mut flight = Flight::new(at(0));
        (1..=3).for_each(|n| flight.sent(n, at(n), 10, n as i64));
        flight.passed(4, at(4));
        assert_eq!(flight.acknowledge(2).map(|(bytes, ..)| bytes), Some(10));
        assert_eq!((flight.watermark(), flight.bytes(), flight.oldest()), (at(0), 20, Some((1, at(1)))));
        flight.acknowledge(1);
        assert_eq!((flight.watermark(), flight.oldest()), (at(2), Some((3, at(3)))));
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
