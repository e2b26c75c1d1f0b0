//! Reads a journal directory: epochs, their segments, the records in them, one segment in memory at a time. Topics of
//! Kafka are first made a journal ([`topic`]), so that every command gives the same answers from both.
//!
//! Damage does not end the reading: what can be read is, and [`Journal::warnings`] names the rest. Judging damage is
//! `verify`'s job. Nothing here writes to the journal, and nothing takes its lock: an agent may be writing to it.

use std::{
    cell::RefCell,
    fs::{self, File},
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use uuid::Uuid;
use weir_common::{
    event::Event,
    removed::{REMOVED_BYTES_MAX, REMOVED_FILE, Removed, RemovedError},
    segment::{SEGMENT_HEADER_BYTES, SEGMENT_SUFFIX, SegmentError, SegmentHeader, SegmentReader},
};

use crate::moment::counted;
use decryption::{Decryption, Reader};
use records::Entry;
pub(crate) use records::{Archive, Place, Record, Records};
use topic::Topic;

pub(crate) mod address;
mod client;
pub(crate) mod decryption;
pub(crate) mod group;
pub(crate) mod interrupted;
pub(crate) mod kafka;
mod places;
pub(crate) mod properties;
mod ranges;
mod records;
pub(crate) mod spool;
pub(crate) mod tail;
mod token;
pub(crate) mod topic;

/// Longest segment that is read; a file beyond it is no segment of ours.
const SEGMENT_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Most epochs (folders) of a journal.
const EPOCHS_MAX: usize = 100_000;
/// Ending of an epoch's folder that an agent is removing, all of it being published.
const REMOVING_SUFFIX: &str = ".removing";
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
    /// What is said of removed segments is not understood.
    #[error("cannot understand {path}")]
    Removed { path: PathBuf, source: RemovedError },
    /// Kafka.
    #[error(transparent)]
    Kafka(#[from] kafka::ReadError),
    /// The disk that a topic is spooled to.
    #[error(transparent)]
    Spool(#[from] spool::SpoolError),
    /// Nothing of Weir's is on a topic.
    #[error("{name} holds no event of Weir, and {foreign} of others; is it the agent's topic?")]
    NoMessages { name: String, foreign: String },
    /// What was there a moment ago is not readable any more.
    #[error("{place} cannot be read any more; did the journal change?")]
    Changed { place: String },
}

/// An epoch of an agent: a folder of segments.
#[derive(Clone, Debug)]
pub(crate) struct Epoch {
    /// The folder's name.
    pub(crate) name: String,
    pub(crate) directory: PathBuf,
    /// Its segments: a range of [`Journal::segments`].
    pub(crate) segments: Range<usize>,
    /// What was published and removed, as far as its record can be read.
    pub(crate) removed: Option<Removed>,
}

/// A journal, as it was when it was opened (segments may still grow).
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) segments: Vec<PathBuf>,
    bytes: u64,
    warnings: RefCell<(Vec<String>, u64)>,
    decryption: Decryption,
    /// Where it came from, if not from a directory of the user.
    topic: Option<Topic>,
}

impl Journal {
    /// Opens a journal directory, or one epoch's folder of it.
    ///
    /// # Errors
    /// It cannot be read, or there is no journal.
    pub(crate) fn open(path: &Path) -> Result<Self, SourceError> {
        let mut folders = vec![path.to_owned()];
        for entry in entries(path)? {
            // An epoch that is being removed whole counts as gone.
            if entry.is_dir() && !entry.to_string_lossy().ends_with(REMOVING_SUFFIX) {
                folders.push(entry);
            }
        }
        let mut epochs = Vec::new();
        for folder in folders {
            let removed = read_removed(&folder).ok().flatten();
            let first = removed.as_ref().map_or(0, |removed| removed.first_segment);
            let mut segments: Vec<PathBuf> = entries(&folder)?;
            // What was removed may be there still: an agent writes down that it is removed before it removes it.
            segments.retain(|file| segment_index(file).is_some_and(|index| index >= first) && file.is_file());
            segments.sort();
            if !segments.is_empty() || removed.is_some() {
                let made = match segments.first() {
                    Some(first) => read_header(first).map_or(i64::MAX, |header| header.created_unix_us),
                    None => folder_made_us(&folder),
                };
                epochs.push((made, folder, segments, removed));
            }
            if epochs.len() > EPOCHS_MAX {
                return Err(SourceError::TooManyEpochs { path: path.to_owned() });
            }
        }
        if epochs.is_empty() {
            return Err(SourceError::Empty { path: path.to_owned() });
        }
        epochs.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        let mut journal = Self::empty(path.to_owned());
        for (_, directory, segments, removed) in epochs {
            let start = journal.segments.len();
            journal.bytes +=
                segments.iter().map(|file| fs::metadata(file).map_or(0, |data| data.len())).sum::<u64>();
            journal.segments.extend(segments);
            let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let segments = start..journal.segments.len();
            journal.epochs.push(Epoch { name, directory, segments, removed });
        }
        journal.tell_of_removed();
        Ok(journal)
    }

    /// A journal with nothing in it: of a topic that is followed and empty yet.
    fn empty(path: PathBuf) -> Self {
        Self {
            path,
            epochs: Vec::new(),
            segments: Vec::new(),
            bytes: 0,
            warnings: RefCell::default(),
            decryption: Decryption::default(),
            topic: None,
        }
    }

    /// Says once that this journal is not the whole record.
    fn tell_of_removed(&self) {
        let sizes = self.epochs.iter().filter_map(|epoch| epoch.removed.as_ref()).map(|r| r.tree.size());
        let events: u64 = sizes.sum();
        if events > 0 {
            let events = counted(events, "event");
            self.warn(format!("{events} of this journal were published and removed: the topic has them"));
        }
    }

    /// The same, with its content decrypted for a reader.
    pub(crate) fn read_by(self, reader: Reader) -> Self {
        Self { decryption: Decryption::new(reader), ..self }
    }

    /// Decrypts the content of an event, as far as that can be; warns where it cannot.
    fn open_content(&self, event: &mut Event) {
        let epoch = self.epochs.iter().find(|epoch| epoch.name == event.epoch);
        if let Err(reason) = self.decryption.open(event, epoch.map(|epoch| epoch.directory.as_path())) {
            self.warn(format!("{reason}; its content stays encrypted"));
        }
    }

    /// The value of a record as it is shown: the recorded bytes, but for content that is decrypted.
    pub(crate) fn shown(&self, record: Record) -> Record {
        // Nothing of a JSON string can look like this: its quotes would be escaped.
        let encrypted = b"\"encrypted\":{";
        let is_encrypted = || record.value.windows(encrypted.len()).any(|part| part == encrypted);
        if !self.decryption.is_wanted() || !is_encrypted() {
            return record;
        }
        let opened = self.event(&record).and_then(|event| serde_json::to_vec(&event).ok());
        Record { value: opened.unwrap_or_else(|| record.value.clone()), ..record }
    }

    /// What the user called it.
    pub(crate) fn name(&self) -> String {
        self.topic.as_ref().map_or_else(|| self.path.display().to_string(), |topic| topic.name())
    }

    /// The topics that it came from.
    pub(crate) fn topic(&self) -> Option<&Topic> {
        self.topic.as_ref()
    }

    /// What it is, in a word.
    pub(crate) fn noun(&self) -> &'static str {
        if self.topic.is_some() { "topic" } else { "journal" }
    }

    /// A file or folder of it in words: of topics, which have none, the epoch.
    pub(crate) fn label(&self, path: &Path) -> String {
        let Some(topic) = &self.topic else { return path.display().to_string() };
        let folder = if segment_index(path).is_some() { path.parent() } else { Some(path) };
        let epoch = folder.and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        format!("{} epoch {epoch}", topic.name())
    }

    /// What is wrong with a segment, in words: of topics, which have none, what is missing.
    pub(crate) fn describe(&self, error: &SegmentError) -> String {
        match error {
            SegmentError::Sequence { expected, found: next, .. }
            | SegmentError::Missing { expected, successor: next, .. }
                if self.topic.is_some() =>
            {
                missing(*expected, *next)
            }
            _ => with_sources(error),
        }
    }

    /// The directory that was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of all segments, unused space included.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The event of a record; none (and a warning) if this version cannot read it.
    pub(crate) fn event(&self, record: &Record) -> Option<Event> {
        match serde_json::from_slice(&record.value) {
            Ok(mut event) => {
                self.open_content(&mut event);
                Some(event)
            }
            Err(error) => {
                let place = self.place(record.place);
                self.warn(format!("{place}: an event that this version cannot read: {error}"));
                None
            }
        }
    }

    /// A place in words.
    pub(crate) fn place(&self, place: Place) -> String {
        match self.segments.get(place.segment) {
            Some(path) if self.topic.is_some() => self.label(path),
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

    /// Whether a segment that cannot be found was published and removed since the journal was opened.
    pub(crate) fn is_removed(&self, error: &SourceError) -> bool {
        let SourceError::File { path, source } = error else { return false };
        let removed = path.parent().and_then(|folder| read_removed(folder).ok().flatten());
        source.kind() == io::ErrorKind::NotFound
            && removed.is_some_and(|removed| segment_index(path) < Some(removed.first_segment))
    }

    fn entries(&self, segment: usize, bytes: &[u8]) -> Vec<Entry> {
        let Some(path) = self.segments.get(segment) else { return Vec::new() };
        let mut list = Vec::new();
        match SegmentReader::new(bytes, self.successor(segment)) {
            Err(_) if is_unmade(bytes) => {}
            Err(error) => self.warn(format!("{}: {}", self.label(path), self.describe(&error))),
            Ok(reader) => {
                for located in reader {
                    match located {
                        Ok(located) => list.extend(Entry::new(bytes, located.offset)),
                        Err(error) => self.warn(format!("{}: {}", self.label(path), self.describe(&error))),
                    }
                }
            }
        }
        list
    }
}

/// Events that are missing before `next`, in words.
pub(crate) fn missing(expected: u64, next: u64) -> String {
    let number = next.saturating_sub(expected);
    match number {
        1 => format!("event {expected} is missing"),
        _ => format!("events {expected} to {} are missing ({})", next - 1, counted(number, "event")),
    }
}

/// When a UUID of version 7 was made, in microseconds since the Unix epoch.
pub(crate) fn made_us(id: &Uuid) -> Option<i64> {
    let (seconds, nanoseconds) = id.get_timestamp().filter(|_| id.get_version_num() == 7)?.to_unix();
    i64::try_from(seconds).ok()?.checked_mul(1_000_000)?.checked_add(i64::from(nanoseconds / 1000))
}

/// When an epoch of which no segment is left was begun: its folder's name tells.
fn folder_made_us(folder: &Path) -> i64 {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    Uuid::try_parse(&name).ok().and_then(|id| made_us(&id)).unwrap_or(i64::MIN)
}

/// The number in a segment's file name; none for other files.
fn segment_index(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_suffix(SEGMENT_SUFFIX)?.parse().ok()
}

/// What an epoch's folder says of segments that were published and removed; none if it says nothing.
///
/// # Errors
/// The file cannot be read, or not understood.
pub(crate) fn read_removed(folder: &Path) -> Result<Option<Removed>, SourceError> {
    let path = folder.join(REMOVED_FILE);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(SourceError::File { path, source }),
        Ok(file) => file,
    };
    let mut bytes = Vec::new();
    if let Err(source) = file.take(REMOVED_BYTES_MAX as u64 + 1).read_to_end(&mut bytes) {
        return Err(SourceError::File { path, source });
    }
    Removed::decode(&bytes).map(Some).map_err(|source| SourceError::Removed { path, source })
}

/// Whether a segment has no header yet: an agent has just begun it, or died doing so. It holds nothing.
pub(crate) fn is_unmade(segment: &[u8]) -> bool {
    segment.iter().skip(SEGMENT_HEADER_BYTES).all(|byte| *byte == 0)
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

#[cfg(test)]
mod removed_tests;
#[cfg(test)]
mod topic_tests;
