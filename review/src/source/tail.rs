//! Follows a journal that an agent is writing: what is there, then what comes, new segments and epochs included.
//!
//! A segment that has a successor is read as any other; the last one of an epoch is read frame by frame from where
//! the last look ended, so a look costs no more than what is new. Segments that are published and removed meanwhile
//! are passed over. Waiting is the caller's.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use weir_common::{
    frame::{self, FRAME_BYTES_MAX},
    segment::SEGMENT_HEADER_BYTES,
};

use super::{Entry, Journal, Record, SourceError, read_header, read_segment, topic::TopicTail};

/// Most bytes of a growing segment that one look reads.
const LOOK_BYTES_MAX: usize = 16 * FRAME_BYTES_MAX;

/// A followed journal.
pub(crate) enum Tail<'a> {
    /// A directory.
    Directory(DirectoryTail),
    /// Topics.
    Topic(TopicTail<'a>),
}

impl Journal {
    /// Follows this journal from its beginning.
    pub(crate) fn tail(&self) -> Tail<'_> {
        match &self.topic {
            Some(topic) => Tail::Topic(TopicTail::new(self, topic)),
            None => Tail::Directory(DirectoryTail {
                path: self.path().to_owned(),
                positions: BTreeMap::new(),
                ready: VecDeque::new(),
            }),
        }
    }
}

impl Tail<'_> {
    /// The next event, if there is one by now.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub(crate) fn next_record(&mut self) -> Result<Option<Record>, SourceError> {
        match self {
            Self::Directory(tail) => tail.next_record(),
            Self::Topic(tail) => tail.next_record(),
        }
    }
}

/// A followed journal directory.
#[derive(Debug)]
pub(crate) struct DirectoryTail {
    path: PathBuf,
    /// By epoch folder: its segment that is being read, and where to go on in it.
    positions: BTreeMap<PathBuf, (PathBuf, usize)>,
    ready: VecDeque<Record>,
}

impl DirectoryTail {
    fn next_record(&mut self) -> Result<Option<Record>, SourceError> {
        if self.ready.is_empty() {
            self.look()?;
        }
        Ok(self.ready.pop_front())
    }

    /// Reads until something is ready or nothing is new.
    fn look(&mut self) -> Result<(), SourceError> {
        let journal = Journal::open(&self.path)?;
        for epoch in &journal.epochs {
            for number in epoch.segments.clone() {
                let Some(path) = journal.segments.get(number) else { break };
                let position = self.positions.entry(epoch.directory.clone()).or_default();
                // Names sort as numbers do.
                let from = match position.0.cmp(path) {
                    std::cmp::Ordering::Greater => continue,
                    std::cmp::Ordering::Equal => position.1,
                    std::cmp::Ordering::Less => SEGMENT_HEADER_BYTES,
                };
                // A successor without a header has just been made: its first sequence is not known yet.
                let is_last = journal.successor(number).is_none();
                let read = if is_last {
                    read_growing(path, number, from, &mut self.ready)
                } else {
                    read_ended(&journal, path, number, from, &mut self.ready)
                };
                match read {
                    Ok(end) => *position = (path.clone(), end),
                    Err(SourceError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                        // The next look finds what is left.
                        break;
                    }
                    Err(error) => return Err(error),
                }
                if is_last {
                    break;
                }
                if !self.ready.is_empty() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// Reads what is behind `from` of a segment that grows no more; returns where it ends.
fn read_ended(
    journal: &Journal,
    path: &Path,
    number: usize,
    from: usize,
    ready: &mut VecDeque<Record>,
) -> Result<usize, SourceError> {
    if from == usize::MAX {
        return Ok(from);
    }
    let bytes = read_segment(path)?;
    let fresh = journal.entries(number, &bytes).into_iter().filter(|entry| entry.offset >= from);
    ready.extend(fresh.map(|entry| entry.record(number, &bytes)));
    Ok(usize::MAX)
}

/// Reads whole frames from `offset` and returns where they end.
fn read_growing(
    path: &Path,
    number: usize,
    offset: usize,
    ready: &mut VecDeque<Record>,
) -> Result<usize, SourceError> {
    // A segment that has ended may be the last one again, when its successor was unmade.
    if read_header(path).is_none() || offset == usize::MAX {
        return Ok(offset);
    }
    let error = |source| SourceError::File { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(error)?;
    file.seek(SeekFrom::Start(offset as u64)).map_err(error)?;
    let mut bytes = Vec::new();
    file.take(LOOK_BYTES_MAX as u64).read_to_end(&mut bytes).map_err(error)?;
    let mut done = 0;
    while let Ok((_, length)) = frame::decode(bytes.get(done..).unwrap_or_default()) {
        if let Some(entry) = Entry::new(&bytes, done) {
            let mut record = entry.record(number, &bytes);
            record.place.offset += offset as u64;
            ready.push_back(record);
        }
        done += length;
    }
    Ok(offset + done)
}
