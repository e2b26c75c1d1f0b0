//! What a journal does how often, and how large its segments are: what tests set otherwise.

use std::time::Duration;

use super::segment;

/// While nothing is recorded, a checkpoint that says so is signed this often, unless it is configured: whoever holds one knows that until then there
/// was nothing more.
pub const IDLE_CHECKPOINT_INTERVAL: Duration = Duration::from_secs(60);

/// A checkpoint is signed at least after this many events.
const CHECKPOINT_EVENTS: u64 = 4096;

/// While recording is not possible, it is tried again at most this often.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// What tests set otherwise.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tuning {
    /// Time between attempts to go on after a failure.
    pub(super) retry_interval: Duration,
    /// Size of the first segment.
    pub(super) segment_bytes_first: u64,
    /// Size that segments grow to.
    pub(super) segment_bytes_max: u64,
    /// A checkpoint is signed at least after this many events.
    pub(super) checkpoint_events: u64,
    /// Time between checkpoints while nothing is recorded.
    pub(super) idle_interval: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            retry_interval: RETRY_INTERVAL,
            segment_bytes_first: segment::SEGMENT_BYTES_FIRST,
            segment_bytes_max: segment::SEGMENT_BYTES_MAX,
            checkpoint_events: CHECKPOINT_EVENTS,
            idle_interval: IDLE_CHECKPOINT_INTERVAL,
        }
    }
}
