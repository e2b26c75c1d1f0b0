//! Follows a journal that an agent is writing: what is there, then what comes, new segments and epochs included.
//!
//! A segment that has a successor is read as any other; the last one of an epoch is read frame by frame from where
//! the last look ended, so a look costs no more than what is new. Waiting is the caller's.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use weir_common::{
    frame::{self, FRAME_BYTES_MAX},
    segment::SEGMENT_HEADER_BYTES,
};

use super::{Entry, Journal, Record, SourceError, read_header, read_segment};

/// Most bytes of a growing segment that one look reads.
const LOOK_BYTES_MAX: usize = 16 * FRAME_BYTES_MAX;

/// A followed journal.
#[derive(Debug)]
pub(crate) struct Tail {
    path: PathBuf,
    /// By epoch folder: number of its segment that is being read, and where to go on in it.
    positions: BTreeMap<PathBuf, (usize, usize)>,
    ready: VecDeque<Record>,
}

impl Journal {
    /// Follows this journal from its beginning.
    pub(crate) fn tail(&self) -> Tail {
        Tail { path: self.path().to_owned(), positions: BTreeMap::new(), ready: VecDeque::new() }
    }
}

impl Tail {
    /// The next event, if there is one by now.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub(crate) fn next_record(&mut self) -> Result<Option<Record>, SourceError> {
        if self.ready.is_empty() {
            self.look()?;
        }
        Ok(self.ready.pop_front())
    }

    /// Reads until something is ready or nothing is new.
    fn look(&mut self) -> Result<(), SourceError> {
        let journal = Journal::open(&self.path)?;
        for epoch in &journal.epochs {
            let position = self.positions.entry(epoch.directory.clone()).or_insert((0, SEGMENT_HEADER_BYTES));
            while let Some(path) = journal.segments.get(epoch.segments.start + position.0)
                && epoch.segments.contains(&(epoch.segments.start + position.0))
            {
                let number = epoch.segments.start + position.0;
                // A successor without a header has just been made: its first sequence is not known yet.
                if journal.successor(number).is_none() {
                    position.1 = read_growing(path, number, position.1, &mut self.ready)?;
                    break;
                }
                let bytes = read_segment(path)?;
                let fresh =
                    journal.entries(number, &bytes).into_iter().filter(|entry| entry.offset >= position.1);
                self.ready.extend(fresh.map(|entry| entry.record(number, &bytes)));
                *position = (position.0 + 1, SEGMENT_HEADER_BYTES);
                if !self.ready.is_empty() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// Reads whole frames from `offset` and returns where they end.
fn read_growing(
    path: &Path,
    number: usize,
    offset: usize,
    ready: &mut VecDeque<Record>,
) -> Result<usize, SourceError> {
    if read_header(path).is_none() {
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
