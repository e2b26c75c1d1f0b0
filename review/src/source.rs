//! Reads a journal directory: epochs, their segments, the records in them, one segment in memory at a time.
//!
//! Damage does not end the reading: what can be read is, and [`Journal::warnings`] names the rest. Judging damage is
//! `verify`'s job. Nothing here writes to the journal, and nothing takes its lock: an agent may be writing to it.

use std::{
    cell::RefCell,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
};

use weir_common::{
    event::Event,
    frame::{self, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, FrameHeader, FrameType},
    segment::{SEGMENT_HEADER_BYTES, SEGMENT_SUFFIX, SegmentHeader, SegmentReader},
};

pub(crate) mod tail;

/// Longest segment that is read; a file beyond it is no segment of ours.
const SEGMENT_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Most epochs (folders) of a journal.
const EPOCHS_MAX: usize = 100_000;
/// Most warnings that are kept; more are counted.
const WARNINGS_MAX: usize = 20;

/// What went wrong with reading a journal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// The folder cannot be read.
    #[error("cannot read the journal {path}; is it the journal directory of an agent, and may you read it?")]
    Directory { path: PathBuf, source: io::Error },
    /// There is nothing in it.
    #[error("no journal in {path}: neither it nor a folder in it has segments (*{SEGMENT_SUFFIX})")]
    Empty { path: PathBuf },
    /// Too much is in it.
    #[error("{path} holds more than {EPOCHS_MAX} epochs; move old ones away")]
    TooManyEpochs { path: PathBuf },
    /// A file cannot be read.
    #[error("cannot read {path}")]
    File { path: PathBuf, source: io::Error },
    /// A file is too long.
    #[error("{path} has {bytes} bytes, more than a segment may have")]
    TooLong { path: PathBuf, bytes: u64 },
    /// What was there a moment ago is not readable any more.
    #[error("{place} cannot be read any more; did the journal change?")]
    Changed { place: String },
}

/// Where a record is: number of the segment in [`Journal`], offset of the frame in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) segment: usize,
    pub(crate) offset: u64,
}

/// A recorded event, not yet parsed.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) place: Place,
    /// Session, from the envelope.
    pub(crate) session: String,
    /// Length of its frame.
    pub(crate) frame_bytes: u64,
    /// The exact bytes of the event.
    pub(crate) value: Vec<u8>,
}

/// An epoch of an agent: a folder of segments.
#[derive(Clone, Debug)]
pub(crate) struct Epoch {
    /// The folder's name.
    pub(crate) name: String,
    pub(crate) directory: PathBuf,
    /// Its segments: a range of [`Journal::segments`].
    pub(crate) segments: Range<usize>,
}

/// A journal, as it was when it was opened (segments may still grow).
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) segments: Vec<PathBuf>,
    bytes: u64,
    warnings: RefCell<(Vec<String>, u64)>,
}

/// Gives events back by place: what a replay reads content from.
pub(crate) trait Archive {
    /// The event at a place that a record named.
    ///
    /// # Errors
    /// It cannot be read (any more).
    fn event_at(&mut self, place: Place) -> Result<Event, SourceError>;
}

impl Journal {
    /// Opens a journal directory, or one epoch's folder of it.
    ///
    /// # Errors
    /// It cannot be read, or there is no journal.
    pub(crate) fn open(path: &Path) -> Result<Self, SourceError> {
        let mut folders = vec![path.to_owned()];
        for entry in entries(path)? {
            if entry.is_dir() {
                folders.push(entry);
            }
        }
        let mut epochs = Vec::new();
        for folder in folders {
            let mut segments: Vec<PathBuf> = entries(&folder)?;
            segments.retain(|file| file.to_string_lossy().ends_with(SEGMENT_SUFFIX) && file.is_file());
            segments.sort();
            if let Some(first) = segments.first() {
                let created = read_header(first).map_or(i64::MAX, |header| header.created_unix_us);
                epochs.push((created, folder, segments));
            }
            if epochs.len() > EPOCHS_MAX {
                return Err(SourceError::TooManyEpochs { path: path.to_owned() });
            }
        }
        if epochs.is_empty() {
            return Err(SourceError::Empty { path: path.to_owned() });
        }
        epochs.sort();
        let mut journal = Self {
            path: path.to_owned(),
            epochs: Vec::new(),
            segments: Vec::new(),
            bytes: 0,
            warnings: RefCell::default(),
        };
        for (_, directory, segments) in epochs {
            let start = journal.segments.len();
            journal.bytes +=
                segments.iter().map(|file| fs::metadata(file).map_or(0, |data| data.len())).sum::<u64>();
            journal.segments.extend(segments);
            let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            journal.epochs.push(Epoch { name, directory, segments: start..journal.segments.len() });
        }
        Ok(journal)
    }

    /// What the user called it.
    pub(crate) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// The directory that was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of all segments, unused space included.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All events, epoch by epoch, in their order.
    pub(crate) fn records(&self) -> Records<'_> {
        Records { journal: self, segment: 0, bytes: Vec::new(), entries: Vec::new().into_iter() }
    }

    /// The event of a record; none (and a warning) if this version cannot read it.
    pub(crate) fn event(&self, record: &Record) -> Option<Event> {
        match serde_json::from_slice(&record.value) {
            Ok(event) => Some(event),
            Err(error) => {
                let place = self.place(record.place);
                self.warn(format!("{place}: an event that this version cannot read: {error}"));
                None
            }
        }
    }

    /// Reads content back.
    pub(crate) fn archive(&self) -> Contents<'_> {
        Contents { journal: self, open: None }
    }

    /// A place in words.
    pub(crate) fn place(&self, place: Place) -> String {
        match self.segments.get(place.segment) {
            Some(path) => format!("{} offset {}", path.display(), place.offset),
            None => format!("segment {} offset {}", place.segment, place.offset),
        }
    }

    /// What could not be read so far, and how much more there was.
    pub(crate) fn warnings(&self) -> (Vec<String>, u64) {
        self.warnings.borrow().clone()
    }

    fn warn(&self, text: String) {
        let (kept, more) = &mut *self.warnings.borrow_mut();
        if kept.contains(&text) {
            // Another pass over the same journal.
        } else if kept.len() < WARNINGS_MAX {
            kept.push(text);
        } else {
            *more += 1;
        }
    }

    /// First sequence of the next segment of the same epoch that has a header: one without was being made when the
    /// agent died, and holds nothing.
    pub(crate) fn successor(&self, segment: usize) -> Option<u64> {
        let epoch = self.epochs.iter().find(|epoch| epoch.segments.contains(&segment))?;
        let later = self.segments.get(segment + 1..epoch.segments.end)?;
        later.iter().find_map(|path| read_header(path)).map(|header| header.first_sequence)
    }

    fn entries(&self, segment: usize, bytes: &[u8]) -> Vec<Entry> {
        let Some(path) = self.segments.get(segment) else { return Vec::new() };
        let mut list = Vec::new();
        match SegmentReader::new(bytes, self.successor(segment)) {
            Err(_) if is_unmade(bytes) => {}
            Err(error) => self.warn(format!("{}: {}", path.display(), with_sources(&error))),
            Ok(reader) => {
                for located in reader {
                    match located {
                        Ok(located) => list.extend(Entry::new(bytes, located.offset)),
                        Err(error) => self.warn(format!("{}: {}", path.display(), with_sources(&error))),
                    }
                }
            }
        }
        list
    }
}

/// Whether a segment has no header yet: an agent has just begun it, or died doing so. It holds nothing.
pub(crate) fn is_unmade(segment: &[u8]) -> bool {
    segment.len() < SEGMENT_HEADER_BYTES || segment.iter().all(|byte| *byte == 0)
}

/// An error with its causes, in one line.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What is in a folder.
///
/// # Errors
/// It cannot be read.
pub(crate) fn entries(path: &Path) -> Result<Vec<PathBuf>, SourceError> {
    let error = |source| SourceError::Directory { path: path.to_owned(), source };
    let mut list = Vec::new();
    for entry in fs::read_dir(path).map_err(error)? {
        list.push(entry.map_err(error)?.path());
    }
    Ok(list)
}

fn read_header(path: &Path) -> Option<SegmentHeader> {
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    File::open(path).ok()?.read_exact(&mut bytes).ok()?;
    SegmentHeader::decode(&bytes).ok()
}

/// Reads a whole segment.
///
/// # Errors
/// It cannot be read, or is longer than any segment.
pub(crate) fn read_segment(path: &Path) -> Result<Vec<u8>, SourceError> {
    let error = |source| SourceError::File { path: path.to_owned(), source };
    let file = File::open(path).map_err(error)?;
    let bytes = file.metadata().map_err(error)?.len();
    if bytes > SEGMENT_BYTES_MAX {
        return Err(SourceError::TooLong { path: path.to_owned(), bytes });
    }
    let mut content = Vec::with_capacity(usize::try_from(bytes).unwrap_or_default());
    file.take(SEGMENT_BYTES_MAX).read_to_end(&mut content).map_err(error)?;
    Ok(content)
}

/// A frame with an event, found in a segment's bytes.
#[derive(Debug)]
struct Entry {
    offset: usize,
    session: String,
    value: Range<usize>,
}

impl Entry {
    /// None for frames that hold no event.
    fn new(bytes: &[u8], offset: usize) -> Option<Self> {
        let (frame, length) = frame::decode(bytes.get(offset..)?).ok()?;
        let end = offset + length;
        (frame.frame_type == FrameType::Event).then(|| Self {
            offset,
            value: end - frame.value.len()..end,
            session: frame.envelope.key,
        })
    }

    fn record(self, segment: usize, bytes: &[u8]) -> Record {
        let frame_bytes = (self.value.end - self.offset) as u64;
        let value = bytes.get(self.value).unwrap_or_default().to_vec();
        Record {
            place: Place { segment, offset: self.offset as u64 },
            session: self.session,
            frame_bytes,
            value,
        }
    }
}

/// Iterates over all events of a journal.
#[derive(Debug)]
pub(crate) struct Records<'a> {
    journal: &'a Journal,
    /// The segment to read next.
    segment: usize,
    /// The one that is being read.
    bytes: Vec<u8>,
    entries: std::vec::IntoIter<Entry>,
}

impl Iterator for Records<'_> {
    type Item = Result<Record, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.entries.next() {
                return Some(Ok(entry.record(self.segment - 1, &self.bytes)));
            }
            let path = self.journal.segments.get(self.segment)?;
            self.segment += 1;
            // Never two segments in memory.
            self.bytes = Vec::new();
            match read_segment(path) {
                Ok(bytes) => self.bytes = bytes,
                Err(error) => return Some(Err(error)),
            }
            self.entries = self.journal.entries(self.segment - 1, &self.bytes).into_iter();
        }
    }
}

/// Reads single events back, keeping the last file open.
#[derive(Debug)]
pub(crate) struct Contents<'a> {
    journal: &'a Journal,
    open: Option<(usize, File)>,
}

impl Contents<'_> {
    fn read(&mut self, place: Place) -> io::Result<Vec<u8>> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        if self.open.as_ref().is_none_or(|(segment, _)| *segment != place.segment) {
            let path = self.journal.segments.get(place.segment).ok_or_else(gone)?;
            self.open = Some((place.segment, File::open(path)?));
        }
        let (_, file) = self.open.as_mut().ok_or_else(gone)?;
        file.seek(SeekFrom::Start(place.offset))?;
        let mut bytes = vec![0; FRAME_HEADER_BYTES];
        file.read_exact(&mut bytes)?;
        let length =
            FrameHeader::decode(&bytes).map_err(io::Error::other)?.frame_bytes().min(FRAME_BYTES_MAX);
        bytes.resize(length, 0);
        file.read_exact(&mut bytes[FRAME_HEADER_BYTES..])?;
        Ok(bytes)
    }
}

impl Archive for Contents<'_> {
    fn event_at(&mut self, place: Place) -> Result<Event, SourceError> {
        let changed = || SourceError::Changed { place: self.journal.place(place) };
        let bytes =
            self.read(place).map_err(|_| SourceError::Changed { place: self.journal.place(place) })?;
        let (frame, _) = frame::decode(&bytes).map_err(|_| changed())?;
        serde_json::from_slice(frame.value).map_err(|_| changed())
    }
}
