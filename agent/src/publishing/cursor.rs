//! How far an epoch is acknowledged, on disk: the file `cursor` in the epoch's folder.
//!
//! Two slots of one sector each are written in turn and synced, so that a write that is torn leaves the one before. A
//! cursor that is lost costs duplicates, never a message: reading starts at the first segment again. The file is locked
//! as long as its epoch is being published, so that no two processes do it. `docs/recording-format.md` describes it.

use std::{io, path::Path, time::Duration};

use uuid::Uuid;

use super::feed::Position;
use crate::storage::{self, Lock, Open, Storage, StoredFile};

/// The file's name in an epoch's folder.
pub(super) const CURSOR_FILE: &str = "cursor";

const MAGIC: [u8; 8] = *b"WEIRCUR\n";
const VERSION: u32 = 1;
const SLOT_BYTES: usize = 512;
const MARKS_OFFSET: usize = 72;
const CHECKSUM_OFFSET: usize = SLOT_BYTES - 4;

/// Most marks that are kept.
const MARKS_MAX: usize = 16;

/// Marks stand at least this part of the replay window apart, so that they span it with room to spare.
const MARKS_PER_WINDOW: u32 = 8;

// A slot, all integers little endian:
//
//    0  magic          8   "WEIRCUR\n"
//    8  version        4   1
//   12  marks          4   their number, at most 16
//   16  generation     8   the slot with the higher one counts
//   24  epoch         16   UUID, in network order
//   40  segment        8   everything before this segment
//   48  offset         8     and before this offset in it was acknowledged
//   56  sequence       8   number of events before that place
//   64  commit         8   group commit of the last frame before it
//   72  marks     16 × n   segment (8): acknowledged were all before it, at this time (8): seconds since the Unix epoch
//    …  zeros
//  508  checksum       4   CRC32C of bytes 0..508
//
// Marks say since when segments may be missed: they are removed when the replay window has passed since.
const _: () = assert!(MARKS_OFFSET + MARKS_MAX * 16 <= CHECKSUM_OFFSET);

/// At `unix_seconds` every segment before `segment` was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    segment: u64,
    unix_seconds: u64,
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    epoch: Uuid,
    /// Everything before it was acknowledged.
    pub(super) position: Position,
    marks: Vec<Mark>,
}

impl Cursor {
    /// Of an epoch of which nothing was acknowledged, but for what is before `position`.
    pub(super) fn new(epoch: Uuid, position: Position) -> Self {
        Self { epoch, position, marks: Vec::new() }
    }

    /// Takes over a position and, where it has reached another segment, the time.
    pub(super) fn advance(&mut self, position: Position, unix_seconds: u64, window: Duration) {
        self.position = position;
        let segment = position.segment;
        if segment == 0 || self.marks.last().is_some_and(|last| last.segment >= segment) {
            return;
        }
        let apart = (window / MARKS_PER_WINDOW).as_secs();
        let mark = Mark { segment, unix_seconds };
        let is_full = self.marks.len() == MARKS_MAX;
        match self.marks.as_mut_slice() {
            // The later time stands for both: nothing is removed too soon.
            [.., before, last]
                if is_full || last.unix_seconds.saturating_sub(before.unix_seconds) < apart =>
            {
                *last = mark;
            }
            _ => self.marks.push(mark),
        }
    }

    /// Somebody has set the clock by so many seconds: since when segments may be missed is as long ago as it was.
    pub(super) fn clock_set(&mut self, by_seconds: i64) {
        for mark in &mut self.marks {
            mark.unix_seconds = mark.unix_seconds.saturating_add_signed(by_seconds);
        }
    }

    /// Segments before this one were acknowledged at least `window` ago.
    pub(super) fn removable_before(&mut self, unix_seconds: u64, window: Duration) -> u64 {
        for mark in &mut self.marks {
            // A clock that was ahead must not keep segments for ever.
            mark.unix_seconds = mark.unix_seconds.min(unix_seconds);
        }
        // Both times are rounded down: with a second more the whole window has passed.
        let window = window.as_secs() + u64::from(!window.is_zero());
        let passed = |mark: &Mark| mark.unix_seconds.saturating_add(window) <= unix_seconds;
        let Some(newest) = self.marks.iter().rposition(passed) else { return 0 };
        self.marks.drain(..newest);
        self.marks[0].segment
    }

    fn encode(&self, generation: u64) -> [u8; SLOT_BYTES] {
        let mut slot = [0; SLOT_BYTES];
        slot[0..8].copy_from_slice(&MAGIC);
        slot[8..12].copy_from_slice(&VERSION.to_le_bytes());
        slot[12..16].copy_from_slice(&(self.marks.len() as u32).to_le_bytes());
        slot[24..40].copy_from_slice(self.epoch.as_bytes());
        let Position { segment, offset, sequence, commit } = self.position;
        let numbers = [(16, generation), (40, segment), (48, offset), (56, sequence), (64, commit)];
        let marks = (MARKS_OFFSET..).step_by(16).zip(&self.marks);
        let marks = marks.flat_map(|(at, mark)| [(at, mark.segment), (at + 8, mark.unix_seconds)]);
        for (at, number) in numbers.into_iter().chain(marks) {
            slot[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let checksum = crc32c::crc32c(&slot[..CHECKSUM_OFFSET]);
        slot[CHECKSUM_OFFSET..].copy_from_slice(&checksum.to_le_bytes());
        slot
    }

    /// Generation and content of a slot; none if it holds no cursor of this epoch.
    fn decode(slot: &[u8; SLOT_BYTES], epoch: Uuid) -> Option<(u64, Self)> {
        let u32_at = |at: usize| u32::from_le_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let marks = u32_at(12) as usize;
        let whole = slot[0..8] == MAGIC
            && crc32c::crc32c(&slot[..CHECKSUM_OFFSET]) == u32_at(CHECKSUM_OFFSET)
            && u32_at(8) == VERSION
            && slot[24..40] == *epoch.as_bytes()
            && marks <= MARKS_MAX;
        let mark = |at| Mark { segment: u64_at(at), unix_seconds: u64_at(at + 8) };
        whole.then(|| {
            let position = Position {
                segment: u64_at(40),
                offset: u64_at(48),
                sequence: u64_at(56),
                commit: u64_at(64),
            };
            let marks = (MARKS_OFFSET..).step_by(16).take(marks).map(mark).collect();
            (u64_at(16), Self { epoch, position, marks })
        })
    }
}

/// The file, locked as long as this lives.
#[derive(Debug)]
pub(super) struct CursorFile {
    file: Box<dyn StoredFile>,
    generation: u64,
}

impl CursorFile {
    /// Opens or makes the file of this epoch and reads it; none if another process publishes the epoch.
    pub(super) fn open(
        storage: &dyn Storage,
        folder: &Path,
        epoch: Uuid,
    ) -> io::Result<Option<(Self, Option<Cursor>)>> {
        let file = storage.open(&folder.join(CURSOR_FILE), Open::Write)?;
        if !file.lock(Lock::Exclusive)? {
            return Ok(None);
        }
        if file.length()? < 2 * SLOT_BYTES as u64 {
            // Written, not only as long: what comes later must not need space on a disk that is full.
            file.write_at(&[0; 2 * SLOT_BYTES], 0)?;
            file.sync_all()?;
            storage.sync_folder(folder)?;
        }
        let mut slots = [[0; SLOT_BYTES]; 2];
        for (slot, at) in slots.iter_mut().zip([0, SLOT_BYTES as u64]) {
            storage::read_full(file.as_ref(), slot, at)?;
        }
        let newest = slots.iter().filter_map(|slot| Cursor::decode(slot, epoch)).max_by_key(|(n, _)| *n);
        let (generation, cursor) = newest.unzip();
        Ok(Some((Self { file, generation: generation.unwrap_or_default() }, cursor)))
    }

    /// Puts `cursor` in place of the older slot, durably.
    pub(super) fn write(&mut self, cursor: &Cursor) -> io::Result<()> {
        // Taken over only when it is on disk: should this fail, the other slot must stay the one that counts.
        let generation = self.generation + 1;
        let at = (generation % 2) * SLOT_BYTES as u64;
        self.file.write_at(&cursor.encode(generation), at)?;
        self.file.sync_data()?;
        self.generation = generation;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt as _, time::Duration};

    use expect_test::expect;
    use uuid::Uuid;

    use super::{CURSOR_FILE, Cursor, CursorFile, MARKS_MAX, SLOT_BYTES};
    use crate::{publishing::feed::Position, storage::FileSystem};

    const EPOCH: Uuid = Uuid::from_u128(7);
    const WINDOW: Duration = Duration::from_secs(800);

    fn at(segment: u64, offset: u64) -> Position {
        Position { segment, offset, sequence: 3, commit: 4 }
    }

    fn reopen(folder: &std::path::Path) -> Option<Cursor> {
        CursorFile::open(&FileSystem, folder, EPOCH).unwrap().unwrap().1
    }

    #[test]
    fn the_bytes_of_version_1_are_golden() {
        let mut cursor = Cursor::new(EPOCH, at(0, 512));
        cursor.advance(at(2, 600), 1_700_000_000, WINDOW);
        let slot = cursor.encode(9);
        assert!(slot[88..508].iter().all(|byte| *byte == 0));
        expect!["574549524355520a01000000010000000900000000000000000000000000000000000000000000070200000000000000580200000000000003000000000000000400000000000000020000000000000000f153650000000001767151"].assert_eq(&hex::encode([&slot[..88], &slot[508..]].concat()));
    }

    #[test]
    fn what_was_written_last_is_read_and_one_torn_slot_costs_one_write() {
        let folder = tempfile::tempdir().unwrap();
        let (mut file, cursor) = CursorFile::open(&FileSystem, folder.path(), EPOCH).unwrap().unwrap();
        assert_eq!(cursor, None);
        assert!(CursorFile::open(&FileSystem, folder.path(), EPOCH).unwrap().is_none(), "it is locked");
        let mut cursor = Cursor::new(EPOCH, at(0, 512));
        for offset in 600..605 {
            cursor.advance(at(0, offset), 1, WINDOW);
            file.write(&cursor).unwrap();
        }
        drop(file);
        assert_eq!(reopen(folder.path()).unwrap().position, at(0, 604));
        assert!(
            CursorFile::open(&FileSystem, folder.path(), Uuid::from_u128(8)).unwrap().unwrap().1.is_none()
        );
        // The last write is torn: the one before it counts.
        let raw = std::fs::File::options().write(true).open(folder.path().join(CURSOR_FILE)).unwrap();
        raw.write_all_at(&[0xff; 100], SLOT_BYTES as u64 + 300).unwrap();
        assert_eq!(reopen(folder.path()).unwrap().position, at(0, 603));
        raw.write_all_at(&[0xff; 100], 300).unwrap();
        assert_eq!(reopen(folder.path()), None);
    }

    #[test]
    fn a_segment_may_go_when_the_window_has_passed_since_it_was_acknowledged() {
        let mut cursor = Cursor::new(EPOCH, at(0, 512));
        cursor.advance(at(0, 900), 1000, WINDOW);
        assert_eq!(cursor.removable_before(u64::MAX, WINDOW), 0, "the first segment is not left yet");
        cursor.advance(at(1, 512), 1100, WINDOW);
        assert_eq!(cursor.removable_before(1900, WINDOW), 0, "acknowledged late in its second");
        assert_eq!(cursor.removable_before(1901, WINDOW), 1);
        cursor.advance(at(2, 512), 2000, WINDOW);
        cursor.advance(at(3, 512), 2010, WINDOW);
        assert_eq!(cursor.removable_before(2800, WINDOW), 1);
        assert_eq!(cursor.removable_before(2801, WINDOW), 2);
        assert_eq!(cursor.removable_before(2811, WINDOW), 3);
        // Without a window it may go at once; and a clock that was set back does not keep it.
        cursor.advance(at(4, 512), 9000, Duration::ZERO);
        assert_eq!(cursor.removable_before(3000, Duration::ZERO), 4);
    }

    #[test]
    fn however_fast_segments_are_acknowledged_marks_are_few_and_none_goes_too_soon_or_much_too_late() {
        let mut cursor = Cursor::new(EPOCH, at(0, 512));
        for second in 1..10_000 {
            cursor.advance(at(second, 512), second, WINDOW);
            assert!(cursor.marks.len() <= MARKS_MAX);
            let before = cursor.removable_before(second, WINDOW);
            assert!(before <= second.saturating_sub(800), "{second}: {before}");
            assert!(before + 800 + 202 >= second, "{second}: {before}");
        }
    }
}
