//! Collects the events of one piece: joins bytes of the same lane, says each gap once.

use bytes::Bytes;
use weir_common::event::{Change, Channel};

use super::{Direction, Event, Lane, Reason, meaning::Meaning, status::Status};

/// From so many events of one piece on, bytes join the last ones of their lane, whatever came between: a peer that
/// changes lanes with every byte must not make an event of each.
const RUNS_MAX: usize = 64;

/// What is known of one direction over its whole length.
#[derive(Debug)]
pub(super) struct Ledger {
    direction: Direction,
    raw_bytes: u64,
    gaps: u32,
    /// Bytes were there that a server may read, and nobody knows as what.
    is_lost: bool,
}

impl Ledger {
    pub(super) fn new(direction: Direction) -> Self {
        Self { direction, raw_bytes: 0, gaps: 0, is_lost: false }
    }

    /// Whether something could not be followed that the other side may read.
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Whether something of it was not decoded.
    pub(super) fn has_raw(&self) -> bool {
        self.raw_bytes > 0
    }
}

/// The events of one piece.
pub(super) struct Output<'a> {
    ledger: &'a mut Ledger,
    status: &'a mut Status,
    meaning: &'a mut Meaning,
    events: Vec<Event>,
}

impl<'a> Output<'a> {
    pub(super) fn new(ledger: &'a mut Ledger, status: &'a mut Status, meaning: &'a mut Meaning) -> Self {
        Self { ledger, status, meaning, events: Vec::new() }
    }

    pub(super) fn into_events(self) -> Vec<Event> {
        self.events
    }

    /// Bytes of a lane; `count` is how many it has had.
    pub(super) fn data(&mut self, lane: Lane, count: &mut u64, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        if lane.channel == Channel::Status {
            self.status.push(&bytes);
        }
        let offset = *count;
        *count += bytes.len() as u64;
        self.push(lane, offset, bytes.clone());
        self.meaning.data(lane, &bytes, &mut self.events);
    }

    fn push(&mut self, lane: Lane, offset: u64, bytes: Bytes) {
        let reach = if self.events.len() < RUNS_MAX { 1 } else { usize::MAX };
        for event in self.events.iter_mut().rev().take(reach) {
            match event {
                Event::Data { lane: of, parts, .. } if *of == lane => {
                    parts.push(bytes);
                    return;
                }
                _ => {}
            }
        }
        self.events.push(Event::Data { lane, offset, parts: vec![bytes] });
    }

    /// Bytes that are not decoded.
    pub(super) fn raw(&mut self, bytes: Bytes) {
        self.ledger.is_lost |= !bytes.is_empty();
        self.undecoded(bytes);
    }

    /// Bytes behind the end of their side or stream.
    pub(super) fn unheard(&mut self, bytes: Bytes) {
        self.gap(Reason::Ended);
        self.undecoded(bytes);
    }

    fn undecoded(&mut self, bytes: Bytes) {
        let mut count = self.ledger.raw_bytes;
        self.data(Lane::of(self.ledger.direction.raw()), &mut count, bytes);
        self.ledger.raw_bytes = count;
    }

    /// A lane begins or ends.
    pub(super) fn changed(&mut self, lane: Lane, change: Change) {
        self.events.push(Event::Changed(lane, change));
        self.meaning.changed(lane, change, &mut self.events);
    }

    /// Says why the next raw bytes are raw, unless that was said before.
    pub(super) fn gap(&mut self, reason: Reason) {
        let bit = 1 << reason as u32;
        if self.ledger.gaps & bit == 0 {
            self.ledger.gaps |= bit;
            self.events.push(Event::Gap(reason));
        }
    }
}
