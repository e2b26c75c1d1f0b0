//! The events of a journal one after another, and single ones back from their places; one segment in memory at a time.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    ops::Range,
};

use weir_common::{
    envelope::Envelope,
    event::Event,
    frame::{self, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, FrameHeader, FrameType},
};

use super::{Journal, SourceError, read_segment};

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
    /// What accompanies it.
    pub(crate) envelope: Envelope,
    /// Length of its frame.
    pub(crate) frame_bytes: u64,
    /// The exact bytes of the event.
    pub(crate) value: Vec<u8>,
}

impl Record {
    /// Its session, as the envelope says it.
    pub(crate) fn session(&self) -> &str {
        &self.envelope.key
    }
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
    /// All events, epoch by epoch, in their order.
    pub(crate) fn records(&self) -> Records<'_> {
        Records { journal: self, segment: 0, bytes: Vec::new(), entries: Vec::new().into_iter() }
    }

    /// Reads content back.
    pub(crate) fn archive(&self) -> Contents<'_> {
        Contents { journal: self, open: None }
    }
}

/// A frame with an event, found in a segment's bytes.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) offset: usize,
    envelope: Envelope,
    value: Range<usize>,
}

impl Entry {
    /// None for frames that hold no event.
    pub(super) fn new(bytes: &[u8], offset: usize) -> Option<Self> {
        let (frame, length) = frame::decode(bytes.get(offset..)?).ok()?;
        let end = offset + length;
        (frame.frame_type == FrameType::Event).then(|| Self {
            offset,
            value: end - frame.value.len()..end,
            envelope: frame.envelope,
        })
    }

    pub(super) fn record(self, segment: usize, bytes: &[u8]) -> Record {
        let frame_bytes = (self.value.end - self.offset) as u64;
        let value = bytes.get(self.value).unwrap_or_default().to_vec();
        Record {
            place: Place { segment, offset: self.offset as u64 },
            envelope: self.envelope,
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
                Err(error) if self.journal.is_removed(&error) => {
                    self.journal.warn(format!("{} was published and removed meanwhile", path.display()));
                    continue;
                }
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
        let mut event = serde_json::from_slice(frame.value).map_err(|_| changed())?;
        self.journal.open_content(&mut event);
        Ok(event)
    }
}
