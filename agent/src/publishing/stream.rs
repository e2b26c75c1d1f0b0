//! One epoch on its way to Kafka: what of it is read, on its way, acknowledged, written down and removed.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;
use weir_common::{
    checkpoint::{Checkpoint, NOTE_BYTES_MAX},
    envelope::Envelope,
};

use super::{
    cursor::{Cursor, CursorFile},
    feed::{self, Feed, Position},
    flight::Flight,
    retention::Retention,
    wrapped::Keys,
};
use crate::{
    recording::{CHECKPOINT_FILE, Durable},
    storage::{Open, Storage, read_bounded, read_full},
};

/// The cursor is written at most this often: what was acknowledged since is sent again after a crash.
const CURSOR_INTERVAL: Duration = Duration::from_secs(1);

/// Most bytes of `node.pub` that are read.
const VERIFIER_BYTES_MAX: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct Stream {
    storage: Arc<dyn Storage>,
    pub(super) epoch: Uuid,
    pub(super) folder: PathBuf,
    /// What `node.pub` holds, for checkpoints.
    pub(super) verifier: Option<String>,
    pub(super) feed: Feed,
    pub(super) flight: Flight,
    /// Nothing is left to read: its agent has ended.
    pub(super) is_read: bool,
    /// Damage up to here has been recorded.
    pub(super) damaged_to: (u64, u64),
    /// Size and time of the last checkpoint that was sent.
    pub(super) checkpoint: Option<(u64, i64)>,
    /// The keys of content that is encrypted.
    pub(super) keys: Keys,
    /// When it was looked for one that is not in the log.
    pub(super) looked: Option<Instant>,
    cursor: Cursor,
    file: CursorFile,
    written: Option<Instant>,
    /// The clock was set, and the file has the marks as they were.
    marks_moved: bool,
    /// None: the account of what was removed cannot be read, and nothing more is removed.
    retention: Option<Retention>,
}

impl Stream {
    /// Takes the epoch in `folder`; none if another process publishes it.
    ///
    /// # Errors
    /// The disk.
    pub(super) fn open(storage: Arc<dyn Storage>, epoch: Uuid, folder: PathBuf) -> io::Result<Option<Self>> {
        let Some((file, cursor)) = CursorFile::open(storage.as_ref(), &folder, epoch)? else {
            return Ok(None);
        };
        let retention = Retention::open(Arc::clone(&storage), folder.clone(), epoch);
        if let Err(error) = &retention {
            tracing::warn!(
                event = "removal-state-unreadable",
                folder = %folder.display(), %error,
                "what was removed of this epoch cannot be read, so nothing more of it is removed"
            );
        }
        let retention = retention.ok();
        let beginning = retention.as_ref().map_or(Position::beginning(0, 0), Retention::beginning);
        // A cursor that was lost, or is older than what was removed.
        let cursor = cursor
            .filter(|cursor| cursor.position >= beginning)
            .unwrap_or_else(|| Cursor::new(epoch, beginning));
        let verifier = read_bounded(storage.as_ref(), &folder.join("node.pub"), VERIFIER_BYTES_MAX);
        Ok(Some(Self {
            epoch,
            verifier: verifier.ok().and_then(|verifier| String::from_utf8(verifier.to_vec()).ok()),
            feed: Feed::new(Arc::clone(&storage), folder.clone(), cursor.position),
            flight: Flight::new(cursor.position),
            keys: Keys::new(Arc::clone(&storage), folder.clone(), epoch),
            storage,
            folder,
            is_read: false,
            damaged_to: (0, 0),
            checkpoint: None,
            looked: None,
            cursor,
            file,
            written: None,
            marks_moved: false,
            retention,
        }))
    }

    /// Everything is acknowledged, and nothing can follow.
    pub(super) fn is_done(&self) -> bool {
        self.is_read && self.flight.is_empty()
    }

    /// What was sent and not acknowledged is lost: it is read again.
    pub(super) fn rewind(&mut self) {
        self.feed.seek(self.flight.rewind());
        self.is_read = false;
        (self.checkpoint, self.looked) = (None, None);
        self.keys.rewind();
    }

    /// The checkpoint that an agent signed since the last frame, while nothing was recorded; everything must be read. None if
    /// there is none, or it was sent: note, envelope.
    pub(super) fn idle_checkpoint(&self) -> Option<(String, Envelope)> {
        let path = self.folder.join(CHECKPOINT_FILE);
        let note = read_bounded(self.storage.as_ref(), &path, NOTE_BYTES_MAX).ok()?;
        let note = String::from_utf8(note.to_vec()).ok()?;
        // Whether it is signed is for readers to say, as it is of every frame.
        let checkpoint = Checkpoint::parse_unverified(&note).ok()?;
        let time = checkpoint.time_unix_us?;
        let position = self.feed.position();
        let epoch = self.epoch.to_string();
        let is_last = checkpoint.size == position.sequence
            && checkpoint.origin.ends_with(&epoch)
            // Not that it is later: the clock may have been set back since.
            && self.checkpoint != Some((checkpoint.size, time));
        if !is_last {
            return None;
        }
        let segments = feed::segments(self.storage.as_ref(), &self.folder).ok()?;
        if self.is_last_frame(&note, &segments) {
            return None;
        }
        let header =
            segments.values().rev().find_map(|(path, _)| feed::good_header(self.storage.as_ref(), path))?;
        let envelope = Envelope::of_checkpoint(&header.node, &epoch, checkpoint.size, time);
        Some((note, envelope))
    }

    /// Whether the log ends with this note, so that it was sent as a frame, if not by this process.
    fn is_last_frame(&self, note: &str, segments: &BTreeMap<u64, (PathBuf, u64)>) -> bool {
        let Some((index, (path, bytes))) = segments.last_key_value() else { return false };
        let position = self.feed.position();
        let end = if *index == position.segment { position.offset } else { *bytes };
        let mut last = vec![0; note.len()];
        let read = |offset| {
            let file = self.storage.open(path, Open::Read)?;
            read_full(file.as_ref(), &mut last, offset)
        };
        let read = end.checked_sub(note.len() as u64).map(read);
        matches!(read, Some(Ok(_))) && last == note.as_bytes()
    }

    /// Writes down how far all is acknowledged, if it has moved; `at_once`, or not too often.
    ///
    /// # Errors
    /// The disk.
    pub(super) fn write_cursor(&mut self, now: Now, window: Duration, at_once: bool) -> io::Result<()> {
        let watermark = self.flight.watermark();
        let waits = self.written.is_some_and(|at| now.instant.duration_since(at) < CURSOR_INTERVAL);
        let is_behind = watermark != self.cursor.position;
        if !is_behind && !self.marks_moved || (waits && !at_once && !self.is_done()) {
            return Ok(());
        }
        self.written = Some(now.instant);
        let mut next = self.cursor.clone();
        if is_behind {
            next.advance(watermark, now.unix_seconds(), window);
        }
        self.file.write(&next)?;
        (self.cursor, self.marks_moved) = (next, false);
        Ok(())
    }

    /// Somebody has set the clock by so many seconds.
    pub(super) fn clock_set(&mut self, by_seconds: i64) {
        self.cursor.clock_set(by_seconds);
        self.marks_moved = true;
    }

    /// Removes the segments that were acknowledged long enough ago; returns how many.
    ///
    /// # Errors
    /// The disk.
    pub(super) fn remove_published(&mut self, now: Now, window: Duration) -> io::Result<u64> {
        let before = self.cursor.removable_before(now.unix_seconds(), window);
        let count = self.retention.as_mut().map_or(Ok(0), |retention| retention.remove_before(before))?;
        if count > 0 {
            self.keys.remove_unused(now.instant)?;
        }
        Ok(count)
    }

    /// Keeps a segment of which not everything was published, and those behind it.
    ///
    /// # Errors
    /// The disk: it is kept as long as this lives.
    pub(super) fn keep(&mut self, segment: u64) -> io::Result<()> {
        self.retention.as_mut().map_or(Ok(()), |retention| retention.keep(segment))
    }

    /// Removes the oldest segment although its window has not passed, if all of it was acknowledged; returns how many went.
    ///
    /// # Errors
    /// The disk.
    fn remove_oldest_acknowledged(&mut self, now: Now) -> io::Result<u64> {
        // A copy: the marks still say when others may go.
        let acknowledged = self.cursor.clone().removable_before(now.unix_seconds(), Duration::ZERO);
        let Some(retention) = &mut self.retention else { return Ok(0) };
        let next = retention.beginning().segment + 1;
        if next > acknowledged { Ok(0) } else { retention.remove_before(next) }
    }

    /// Whether its account of what was removed cannot be read, so that nothing more is.
    pub(super) fn is_unaccounted(&self) -> bool {
        self.retention.is_none()
    }

    /// Whether nothing of it is left but what others refer to.
    pub(super) fn is_gone(&self) -> bool {
        self.is_done()
            && self.retention.as_ref().is_some_and(|retention| retention.is_empty().unwrap_or(false))
    }

    /// Bytes that are not acknowledged; `limit` is where an epoch ends that is still written.
    pub(super) fn backlog_bytes(&self, limit: Option<Durable>) -> u64 {
        if self.is_done() {
            return 0;
        }
        let from = self.flight.watermark();
        let Ok(segments) = feed::segments(self.storage.as_ref(), &self.folder) else { return 0 };
        let length = |index: u64, bytes: u64| match limit {
            Some(limit) if limit.segment < index => 0,
            Some(limit) if limit.segment == index => limit.offset,
            _ => bytes,
        };
        let behind = segments.range(from.segment..).map(|(index, (_, bytes))| {
            let start = if *index == from.segment { from.offset } else { 0 };
            length(*index, *bytes).saturating_sub(start)
        });
        behind.sum()
    }
}

/// Makes room: of all epochs' segments the oldest goes that is acknowledged, although its window has not passed; returns how
/// many went.
pub(super) fn remove_oldest(streams: &mut [Stream], now: Now) -> u64 {
    for stream in streams {
        match stream.remove_oldest_acknowledged(now) {
            Ok(0) => {}
            Ok(count) => {
                tracing::warn!(event = "segment-removed-early", epoch = %stream.epoch, "a published segment goes before its replay window has passed, for want of room");
                return count;
            }
            Err(error) => {
                tracing::warn!(event = "segments-not-removed", epoch = %stream.epoch, %error, "published segments cannot be removed");
            }
        }
    }
    0
}

/// The time, both ways.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) instant: Instant,
    pub(super) unix_us: i64,
}

impl Now {
    fn unix_seconds(self) -> u64 {
        u64::try_from(self.unix_us / 1_000_000).unwrap_or_default()
    }

    /// Whether something is due that was done at `last`, and is done now.
    pub(super) fn is_due(self, last: &mut Option<Instant>, interval: Duration) -> bool {
        let due = last.is_none_or(|last| self.instant.duration_since(last) >= interval);
        if due {
            *last = Some(self.instant);
        }
        due
    }
}
