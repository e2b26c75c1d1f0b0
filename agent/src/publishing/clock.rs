//! Time that tests move, and how far a cursor came in it.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{cursor::CursorFile, stream::Now};
use crate::storage::Storage;

/// A clock that tests move.
pub(crate) struct Clock(pub(super) Now);

impl Clock {
    pub(crate) fn new() -> Self {
        Self(Now { instant: Instant::now(), unix_us: 1_000_000_000 })
    }

    /// Somebody sets the clock; the time that passes is not changed by it.
    pub(crate) fn set(&mut self, by_seconds: i64) {
        self.0.unix_us = (self.0.unix_us + by_seconds * 1_000_000).max(0);
    }

    pub(super) fn pass(&mut self, time: Duration) -> Now {
        self.0.instant += time;
        self.0.unix_us += i64::try_from(time.as_micros()).unwrap();
        self.0
    }
}

/// What the cursor of an epoch that nobody publishes says: number of events that are acknowledged.
pub(crate) fn cursor(storage: &dyn Storage, folder: &Path, epoch: Uuid) -> u64 {
    // A process that another test starts holds a copy of every open file, and so of the lock, until it runs its program.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some((_, cursor)) = CursorFile::open(storage, folder, epoch).unwrap() {
            return cursor.map_or(0, |cursor| cursor.position.sequence);
        }
        assert!(Instant::now() < deadline, "nobody has it");
        std::thread::yield_now();
    }
}
