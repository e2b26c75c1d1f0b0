//! The durable frames of one epoch, in order, read from its segments behind the writer.
//!
//! Of an epoch that is being written, only what is durable is read; of one that has ended, all. Memory is that of a few
//! frames. What cannot be read is passed with one [`Damage`] and never tried again and again: behind a bad place the rest
//! of that segment is read at once, since only then can be told what is damaged and what merely torn.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::libc;
use weir_common::{
    frame::{self, FRAME_BYTES_MAX, Frame, FrameType},
    segment::{SEGMENT_HEADER_BYTES, SEGMENT_SUFFIX, SegmentError, SegmentHeader, SegmentReader},
};

use crate::{
    recording::Durable,
    storage::{self, Open, Storage, StoredFile},
};

/// Bytes that are read at once.
const READ_BYTES: usize = 512 * 1024;

/// Longest segment that is read whole to judge a bad place in it; the agent's own are half as long.
const WHOLE_BYTES_MAX: u64 = 128 * 1024 * 1024;

/// So often a place must fail to be read before it is passed: an error may go away, and a damage is recorded for good.
const TRIES: u32 = 4;

/// Numbers of segments are below this.
const SEGMENTS_MAX: u64 = 1 << 48;

/// A place between two frames of an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    /// Number of the segment.
    pub(super) segment: u64,
    /// Offset in it.
    pub(super) offset: u64,
    /// Number of events before it.
    pub(super) sequence: u64,
    /// Group commit of the last frame before it.
    pub(super) commit: u64,
}

impl Position {
    /// The beginning of this segment.
    fn of_segment(header: &SegmentHeader) -> Self {
        Self {
            segment: header.index,
            offset: SEGMENT_HEADER_BYTES as u64,
            sequence: header.first_sequence,
            commit: header.first_commit.saturating_sub(1),
        }
    }

    /// The beginning of the segment with this number, with so many events before it.
    pub(super) fn beginning(segment: u64, sequence: u64) -> Self {
        Self { segment, offset: SEGMENT_HEADER_BYTES as u64, sequence, commit: 0 }
    }
}

/// Something that had been acknowledged and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Damage {
    pub(super) segment: u64,
    pub(super) offset: u64,
    /// What is wrong there.
    pub(super) what: String,
    /// Events that are missing, where that is known.
    pub(super) events: Option<u64>,
    /// The disk could not read it; the next time it may.
    pub(super) is_unreadable: bool,
    /// Where reading goes on.
    pub(super) end: Position,
}

/// What came next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A frame, and it was taken.
    Taken,
    /// A frame, and it was not: it comes again.
    NotTaken,
    /// Nothing can be read up to the damage's end.
    Damage(Damage),
    /// Nothing more is durable yet.
    Waiting,
    /// The epoch has ended, and nothing is left to read.
    End,
}

/// Takes a frame that ends at a position, or not.
pub(super) type Take<'t> = dyn FnMut(&Frame<'_>, Position) -> bool + 't;

/// See the module.
#[derive(Debug)]
pub(super) struct Feed {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    position: Position,
    segment: Option<Segment>,
    /// A damage was passed without knowing how many events it cost: the next frame tells.
    lost: bool,
    /// How often in a row the disk could not read, and how often it may until that is a damage.
    failures: u32,
    failures_max: u32,
}

/// The segment that is being read.
#[derive(Debug)]
struct Segment {
    file: Box<dyn StoredFile>,
    index: u64,
    /// The header of the next segment. None: this is the one that is being written, or the last.
    successor: Option<SegmentHeader>,
    /// Bytes of the file from `start` on.
    buffer: Vec<u8>,
    start: u64,
    /// The buffer holds the whole file.
    whole: bool,
}

impl Feed {
    /// Goes on at `position` of the epoch in `folder`.
    pub(super) fn new(storage: Arc<dyn Storage>, folder: PathBuf, position: Position) -> Self {
        Self { storage, folder, position, segment: None, lost: false, failures: 0, failures_max: TRIES }
    }

    /// For who reads only to look: what cannot be read is a damage at once.
    pub(super) fn impatient(self) -> Self {
        Self { failures_max: 1, ..self }
    }

    /// Goes on elsewhere.
    pub(super) fn seek(&mut self, position: Position) {
        self.position = position;
        self.segment = None;
    }

    /// Where it is.
    pub(super) fn position(&self) -> Position {
        self.position
    }

    /// Offers the next frame to `take`. `limit` is how far an epoch is durable that is still written; none if it has ended.
    ///
    /// # Errors
    /// The folder or a segment cannot be opened or read just now.
    pub(super) fn next(&mut self, limit: Option<Durable>, take: &mut Take<'_>) -> io::Result<Next> {
        loop {
            if limit.is_some_and(|limit| self.position.segment >= limit.segment && self.at() >= limit) {
                return Ok(Next::Waiting);
            }
            // It was the one that is written when it was opened; now the next one says where it ends.
            let left = |segment: &Segment| limit.is_some_and(|limit| limit.segment > segment.index);
            self.segment.take_if(|segment| segment.successor.is_none() && left(segment));
            if self.segment.is_none()
                && let Some(next) = self.open(limit)?
            {
                return Ok(next);
            }
            let Some(segment) = &mut self.segment else { continue };
            // The one that is being written: what is behind the limit does not count yet.
            let end = limit.filter(|limit| limit.segment == segment.index).map(|limit| limit.offset);
            if let Err(error) = segment.fill(self.position.offset, end) {
                return self.unreadable(&error, end).ok_or(error);
            }
            let Ok((frame, length)) = frame::decode(segment.rest(self.position.offset)) else {
                match self.judge(end)? {
                    Some(damage) => return Ok(damage),
                    None => continue,
                }
            };
            if segment.is_abandoned(&frame) {
                if let Some(damage) = self.leave() {
                    return Ok(Next::Damage(damage));
                }
                continue;
            }
            let (expected, found) = (self.position.sequence, frame.sequence);
            if expected != found && !std::mem::take(&mut self.lost) {
                return Ok(Next::Damage(self.out_of_order(expected, found)));
            }
            let end = Position {
                offset: self.position.offset + length as u64,
                sequence: found.saturating_add(u64::from(frame.frame_type == FrameType::Event)),
                commit: frame.commit,
                ..self.position
            };
            if !take(&frame, end) {
                return Ok(Next::NotTaken);
            }
            (self.position, self.failures) = (end, 0);
            return Ok(Next::Taken);
        }
    }

    fn at(&self) -> Durable {
        Durable { segment: self.position.segment, offset: self.position.offset }
    }

    fn damage(&mut self, what: String, events: Option<u64>, end: Position) -> Damage {
        let Position { segment, offset, .. } = self.position;
        let is_unreadable = self.failures > 0;
        (self.position, self.failures) = (end, 0);
        Damage { segment, offset, what, events, is_unreadable, end }
    }

    fn out_of_order(&mut self, expected: u64, found: u64) -> Damage {
        let what = format!("sequence {found} stands where {expected} must follow");
        let end = Position { sequence: found, ..self.position };
        self.damage(what, found.checked_sub(expected), end)
    }

    /// Opens the segment of the position, or the first one behind it; says what came next where that is no segment.
    fn open(&mut self, limit: Option<Durable>) -> io::Result<Option<Next>> {
        let within = |index: &u64| limit.is_none_or(|limit| *index <= limit.segment);
        let storage = Arc::clone(&self.storage);
        let segments = segments(storage.as_ref(), &self.folder)?;
        let mut later = segments.range(self.position.segment..).filter(|(index, _)| within(index));
        let Some((index, (path, _))) = later.next() else {
            return Ok(Some(if limit.is_some() { Next::Waiting } else { Next::End }));
        };
        let header = match read_header(storage.as_ref(), path) {
            Err(error) if self.has_failed_for_good(&error) => Header::Bad(error.to_string()),
            read => read?,
        };
        let header = match header {
            Header::Good(header) => header,
            Header::Unmade => {
                // Nothing was ever written to it; whoever made it went on with the next number.
                self.position = Position { segment: index + 1, ..self.beginning() };
                return Ok(None);
            }
            Header::Bad(what) => {
                let mut end = Position { segment: index + 1, ..self.beginning() };
                // How much it held, only the next one tells.
                if let Some(next) = self.good_header(&mut later)? {
                    end.sequence = next.first_sequence;
                }
                let events = end.sequence.checked_sub(self.position.sequence).filter(|events| *events > 0);
                return Ok(Some(Next::Damage(self.damage(what, events, end))));
            }
        };
        let successor = self.good_header(&mut later)?;
        let segment = Segment {
            file: storage.open(path, Open::Read)?,
            index: *index,
            successor,
            buffer: Vec::new(),
            start: 0,
            whole: false,
        };
        let first = header.first_sequence;
        if *index == self.position.segment && self.position.offset > SEGMENT_HEADER_BYTES as u64 {
            self.segment = Some(segment);
            return Ok(None);
        }
        let expected = self.position.sequence;
        let begin = Position::of_segment(&header);
        let missing = (expected != first).then(|| {
            let what = format!("segment {index} starts with {first} where {expected} must follow");
            self.damage(what, first.checked_sub(expected), begin)
        });
        self.position = begin;
        self.segment = Some(segment);
        Ok(missing.map(Next::Damage))
    }

    /// The first of these segments that has a header.
    fn good_header<'s>(
        &mut self,
        segments: &mut dyn Iterator<Item = (&'s u64, &'s (PathBuf, u64))>,
    ) -> io::Result<Option<SegmentHeader>> {
        let storage = Arc::clone(&self.storage);
        for (_, (path, _)) in segments {
            match read_header(storage.as_ref(), path) {
                Ok(Header::Good(header)) => return Ok(Some(header)),
                // Not to be taken for the last one just because the next cannot be read now.
                Err(error) if !self.has_failed_for_good(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(None)
    }

    /// Counts a failure to read; whether it is to be taken for a damage.
    fn has_failed_for_good(&mut self, error: &io::Error) -> bool {
        self.failures += u32::from(is_lasting(error));
        is_lasting(error) && self.failures >= self.failures_max
    }

    fn beginning(&self) -> Position {
        Position { offset: SEGMENT_HEADER_BYTES as u64, ..self.position }
    }

    /// Goes on behind the segment; complains if the next one begins later.
    fn leave(&mut self) -> Option<Damage> {
        let segment = self.segment.take()?;
        let end = match &segment.successor {
            Some(header) => Position::of_segment(header),
            None => Position { segment: segment.index + 1, ..self.beginning() },
        };
        let expected = self.position.sequence;
        if end.sequence == expected {
            self.position = end;
            return None;
        }
        let what = format!("segment ends before sequence {expected}, the next starts with {}", end.sequence);
        Some(self.damage(what, end.sequence.checked_sub(expected), end))
    }

    /// What to do where no frame can be read. None: nothing is wrong; the segment was left, or more is to be read.
    fn judge(&mut self, end: Option<u64>) -> io::Result<Option<Next>> {
        let (position, before) = (self.position, self.position.sequence);
        let Some(segment) = &mut self.segment else { return Ok(None) };
        if end.is_none() && segment.ends_at(position.offset)? {
            return Ok(self.leave().map(Next::Damage));
        }
        if let Err(error) = segment.read_whole(end) {
            return self.unreadable(&error, end).map(Some).ok_or(error);
        }
        let successor = segment.successor.as_ref().map(|header| header.first_sequence);
        let offset = usize::try_from(position.offset).unwrap_or(usize::MAX);
        let reader = SegmentReader::resume(&segment.buffer, successor, offset, before, position.commit);
        let judged = reader.map(|mut reader| match reader.next() {
            Some(Err(SegmentError::Damaged { source, .. })) => {
                Judged::Damaged(source.to_string(), reader.offset() as u64, reader.next_sequence())
            }
            Some(Ok(_)) => Judged::Readable,
            _ => Judged::Tail,
        });
        match judged {
            // It goes on behind the bad place.
            Ok(Judged::Damaged(what, offset, sequence)) => {
                let behind = Position { offset, sequence, ..position };
                let events = sequence.checked_sub(before).filter(|events| *events > 0);
                Ok(Some(Next::Damage(self.damage(what, events, behind))))
            }
            Ok(Judged::Readable) => Ok(None),
            // Torn, or never acknowledged; but not in what is known to be durable.
            Ok(Judged::Tail) if end.is_none() => Ok(self.leave().map(Next::Damage)),
            Ok(Judged::Tail) => {
                Ok(Some(self.skip("a frame that was durable cannot be read".to_owned(), end)))
            }
            Err(error) => Ok(Some(self.skip(error.to_string(), end))),
        }
    }

    /// Passes what the disk cannot read; none if that may be otherwise the next time.
    fn unreadable(&mut self, error: &io::Error, end: Option<u64>) -> Option<Next> {
        self.has_failed_for_good(error).then(|| self.skip(error.to_string(), end))
    }

    /// Passes the rest of the segment, or what of it is durable.
    fn skip(&mut self, what: String, end: Option<u64>) -> Next {
        let behind = match (end, self.segment.take().and_then(|segment| segment.successor)) {
            (Some(offset), _) => Position { offset, ..self.position },
            (None, Some(header)) => Position::of_segment(&header),
            (None, None) => Position { segment: self.position.segment + 1, ..self.beginning() },
        };
        self.lost = end.is_some();
        let events = behind.sequence.checked_sub(self.position.sequence).filter(|events| *events > 0);
        Next::Damage(self.damage(what, events, behind))
    }
}

impl Segment {
    /// Reads on, so that the buffer holds a whole frame from `offset` on, or all there is up to `end`.
    fn fill(&mut self, offset: u64, end: Option<u64>) -> io::Result<()> {
        let needed = match frame::FrameHeader::decode(self.rest(offset)) {
            Ok(header) => header.frame_bytes(),
            Err(_) => frame::FRAME_HEADER_BYTES,
        };
        if self.whole || self.rest(offset).len() >= needed {
            return Ok(());
        }
        let left =
            end.map_or(usize::MAX, |end| usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX));
        // Never less than the longest frame, so that one reading suffices.
        let wanted = READ_BYTES.max(FRAME_BYTES_MAX).min(left);
        self.start = offset;
        self.buffer.clear();
        self.buffer.resize(wanted, 0);
        let read = storage::read_full(self.file.as_ref(), &mut self.buffer, offset);
        self.buffer.truncate(*read.as_ref().unwrap_or(&0));
        read.map(drop)
    }

    /// What the buffer holds from `offset` on.
    fn rest(&self, offset: u64) -> &[u8] {
        let from = offset.checked_sub(self.start).and_then(|from| usize::try_from(from).ok());
        from.and_then(|from| self.buffer.get(from..)).unwrap_or_default()
    }

    /// Whether there is nothing at all from `offset` on: a segment that was ended in order.
    fn ends_at(&self, offset: u64) -> io::Result<bool> {
        Ok(self.file.length()? <= offset)
    }

    /// Reads all of it, up to `end`.
    fn read_whole(&mut self, end: Option<u64>) -> io::Result<()> {
        if self.whole {
            return Ok(());
        }
        let length = self.file.length()?.min(end.unwrap_or(u64::MAX));
        if length > WHOLE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut whole = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        let read = storage::read_full(self.file.as_ref(), &mut whole, 0)?;
        whole.truncate(read);
        (self.buffer, self.start) = (whole, 0);
        // What is still written grows.
        self.whole = end.is_none();
        Ok(())
    }

    /// Whether a whole frame was never acknowledged: the next segment has its number again.
    fn is_abandoned(&self, frame: &Frame<'_>) -> bool {
        self.successor.as_ref().is_some_and(|next| match frame.frame_type {
            FrameType::Event => frame.sequence >= next.first_sequence,
            FrameType::Checkpoint => frame.sequence > next.first_sequence,
        })
    }
}

/// What [`SegmentReader`] says of a place where no frame can be read.
enum Judged {
    /// What is wrong, and offset and sequence behind it.
    Damaged(String, u64, u64),
    Tail,
    Readable,
}

/// Whether reading again would fail again.
fn is_lasting(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EBADMSG | libc::EUCLEAN))
        || error.kind() == io::ErrorKind::FileTooLarge
}

/// The segments in a folder, by number, with their lengths.
pub(super) fn segments(storage: &dyn Storage, folder: &Path) -> io::Result<BTreeMap<u64, (PathBuf, u64)>> {
    let files = storage::files_named(storage, folder, SEGMENT_SUFFIX)?;
    let index = |path: &Path| path.file_stem()?.to_str()?.parse::<u64>().ok();
    // A number at which counting ends is not one that an agent gave.
    let index = |path: &Path| index(path).filter(|index| *index < SEGMENTS_MAX);
    Ok(files.into_iter().filter_map(|(path, bytes)| Some((index(&path)?, (path, bytes)))).collect())
}

enum Header {
    Good(SegmentHeader),
    /// Made, or half made, and never written to.
    Unmade,
    Bad(String),
}

fn read_header(storage: &dyn Storage, path: &Path) -> io::Result<Header> {
    let file = storage.open(path, Open::Read)?;
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    let length = storage::read_full(file.as_ref(), &mut bytes, 0)?;
    if length < SEGMENT_HEADER_BYTES {
        return Ok(Header::Unmade);
    }
    Ok(match SegmentHeader::decode(&bytes) {
        Ok(header) => Header::Good(header),
        // A header is written before any frame: with something behind it, it was there and is lost.
        Err(_) if is_zero(file.as_ref(), SEGMENT_HEADER_BYTES as u64)? => Header::Unmade,
        Err(error) => Header::Bad(error.to_string()),
    })
}

/// Whether there is nothing but zeros in a file from `offset` on.
fn is_zero(file: &dyn StoredFile, mut offset: u64) -> io::Result<bool> {
    let mut bytes = vec![0; READ_BYTES];
    loop {
        match storage::read_full(file, &mut bytes, offset)? {
            0 => return Ok(true),
            read if bytes[..read].iter().all(|byte| *byte == 0) => offset += read as u64,
            _ => return Ok(false),
        }
    }
}

/// The header of a segment that has one.
pub(super) fn good_header(storage: &dyn Storage, path: &Path) -> Option<SegmentHeader> {
    match read_header(storage, path) {
        Ok(Header::Good(header)) => Some(header),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Damage, Feed, Next, Position};
    use crate::{publishing::fixture::Log, recording::Durable, storage::FileSystem};

    /// Everything that comes: sequences of frames, damages, and how it ends.
    fn read(log: &Log, limit: Option<Durable>) -> (Vec<u64>, Vec<Damage>, Next) {
        let mut feed = Feed::new(Arc::new(FileSystem), log.folder().to_owned(), Position::beginning(0, 0));
        let (mut taken, mut damages) = (Vec::new(), Vec::new());
        loop {
            match feed
                .next(limit, &mut |frame, _| {
                    taken.push(frame.sequence);
                    true
                })
                .unwrap()
            {
                Next::Taken => {}
                Next::Damage(damage) => damages.push(damage),
                other => return (taken, damages, other),
            }
            assert!(taken.len() + damages.len() < 1000, "it ends");
        }
    }

    #[test]
    fn segments_are_read_one_after_the_other_and_an_ended_epoch_ends() {
        let mut log = Log::new();
        (0..3).for_each(|_| {
            log.events(5);
            log.rotate();
        });
        log.checkpoint();
        let (taken, damages, end) = read(&log, None);
        assert_eq!((taken, damages, end), ([(0..15).collect(), vec![15]].concat(), vec![], Next::End));
    }

    #[test]
    fn what_is_not_durable_yet_is_not_read() {
        let mut log = Log::new();
        log.events(4);
        let durable = log.durable();
        log.events(4);
        assert_eq!(read(&log, Some(durable)), ((0..4).collect(), vec![], Next::Waiting));
        log.rotate();
        assert_eq!(read(&log, Some(log.durable())), ((0..8).collect(), vec![], Next::Waiting));
    }

    #[test]
    fn a_torn_tail_and_abandoned_frames_are_no_damage() {
        let mut log = Log::new();
        log.events(4);
        log.torn_event();
        assert_eq!(read(&log, None), ((0..4).collect(), vec![], Next::End));
        let mut log = Log::new();
        log.events(4);
        log.abandoned_event();
        log.rotate();
        log.events(2);
        assert_eq!(read(&log, None), ((0..6).collect(), vec![], Next::End));
    }

    #[test]
    fn a_segment_that_was_never_written_to_is_passed() {
        let mut log = Log::new();
        log.events(2);
        log.skip_segment(&[0; 100]);
        log.rotate();
        log.skip_segment(&[0; 600]);
        log.rotate();
        log.events(2);
        assert_eq!(read(&log, None), ((0..4).collect(), vec![], Next::End));
    }

    #[test]
    fn a_damaged_frame_costs_itself_and_is_said_once() {
        let mut log = Log::new();
        log.events(6);
        log.damage(2);
        log.rotate();
        log.events(2);
        let (taken, damages, end) = read(&log, None);
        assert_eq!((taken, end), (vec![0, 1, 3, 4, 5, 6, 7], Next::End));
        assert_eq!(damages.len(), 1);
        assert_eq!((damages[0].segment, damages[0].events), (0, Some(1)));
        // The same while the epoch is written.
        let (taken, damages, end) = read(&log, Some(log.durable()));
        assert_eq!((taken.len(), damages.len(), end), (7, 1, Next::Waiting));
    }

    #[test]
    fn a_damaged_header_costs_its_segment() {
        let mut log = Log::new();
        log.events(2);
        log.rotate();
        log.events(3);
        log.rotate();
        log.events(2);
        log.damage_header(1);
        let (taken, damages, end) = read(&log, None);
        assert_eq!((taken, end), (vec![0, 1, 5, 6], Next::End));
        assert_eq!(damages.iter().map(|damage| damage.events).collect::<Vec<_>>(), [Some(3)]);
    }

    #[test]
    fn a_segment_that_is_gone_is_missed_once() {
        let mut log = Log::new();
        log.events(2);
        log.rotate();
        log.events(3);
        log.rotate();
        log.events(2);
        std::fs::remove_file(log.segment(1)).unwrap();
        let (taken, damages, end) = read(&log, None);
        assert_eq!((taken, end), (vec![0, 1, 5, 6], Next::End));
        assert_eq!(damages.iter().map(|damage| damage.events).collect::<Vec<_>>(), [Some(3)]);
    }

    #[test]
    fn a_frame_that_is_not_taken_comes_again() {
        let mut log = Log::new();
        log.events(1);
        let mut feed = Feed::new(Arc::new(FileSystem), log.folder().to_owned(), Position::beginning(0, 0));
        assert_eq!(feed.next(None, &mut |_, _| false).unwrap(), Next::NotTaken);
        assert_eq!(feed.next(None, &mut |frame, _| frame.sequence == 0).unwrap(), Next::Taken);
        let end = feed.position();
        feed.seek(Position::beginning(0, 0));
        assert_eq!(feed.next(None, &mut |_, at| at == end).unwrap(), Next::Taken);
    }
}
