//! Where messages stand that are worth naming, and which of them contradict each other.

use uuid::Uuid;
use weir_common::frame::FrameType;

/// Most places of a kind that are kept; more are counted.
const PLACES_MAX: usize = 200;

/// Where a message stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MessagePlace {
    /// Number of the topic in the source.
    pub(crate) topic: u8,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
}

/// Things that were found, bounded.
#[derive(Clone, Debug)]
pub(crate) struct Places<T> {
    pub(crate) listed: Vec<T>,
    /// Number of those that are not listed.
    pub(crate) more: u64,
}

impl<T> Default for Places<T> {
    fn default() -> Self {
        Self { listed: Vec::new(), more: 0 }
    }
}

impl<T> Places<T> {
    pub(crate) fn push(&mut self, found: T) {
        if self.listed.len() < PLACES_MAX {
            self.listed.push(found);
        } else {
            self.more += 1;
        }
    }

    pub(crate) fn number(&self) -> u64 {
        self.listed.len() as u64 + self.more
    }
}

/// Two messages that should be the same and are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    pub(crate) epoch: Uuid,
    pub(crate) frame_type: FrameType,
    pub(crate) sequence: u64,
    pub(crate) first: MessagePlace,
    pub(crate) other: MessagePlace,
}
