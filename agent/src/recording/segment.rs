//! Segment files as the journal's writer sees them: made, filled, cut.
//!
//! Knows sizes and offsets, not what is written. The layout is in `weir_common::segment`.

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use weir_common::{
    encryption::WRAPPED_KEY_SUFFIX,
    segment::{SEGMENT_HEADER_BYTES, SEGMENT_SUFFIX},
};

use super::durable::Durable;
use crate::storage::{Storage, StoredFile};

/// Size of an epoch's first segment: small, since many epochs are short (`weir-agent exec`).
pub(super) const SEGMENT_BYTES_FIRST: u64 = 4 * 1024 * 1024;

/// Size that segments grow to, each twice as large as the one before.
pub(super) const SEGMENT_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Bytes at the end of each segment that only the last words may take: that recording stopped, and why.
pub(super) const SEGMENT_RESERVE_BYTES: u64 = 64 * 1024;

/// What file systems give space in.
const BLOCK_BYTES: u64 = 4096;

/// Size of the segment after `growth` others, which must hold at least `needed` bytes of frames; `first` is that of the
/// first, and they grow up to `largest`.
pub(super) fn size((first, largest): (u64, u64), growth: u64, needed: u64) -> u64 {
    let grown = first << growth.min(8);
    grown.min(largest).max(smallest(needed))
}

/// The smallest segment that holds `needed` bytes of frames.
pub(super) fn smallest(needed: u64) -> u64 {
    SEGMENT_HEADER_BYTES as u64 + needed + SEGMENT_RESERVE_BYTES
}

/// The segment that is being filled.
#[derive(Debug)]
pub(super) struct OpenSegment {
    index: u64,
    file: Box<dyn StoredFile>,
    /// Where the next frame goes: everything before it is durable.
    offset: u64,
    bytes: u64,
}

impl OpenSegment {
    /// Begins a segment in a file that was allocated for it: with its header on disk it counts.
    pub(super) fn begin(
        file: Box<dyn StoredFile>,
        index: u64,
        header: &[u8; SEGMENT_HEADER_BYTES],
        bytes: u64,
    ) -> io::Result<Self> {
        file.write_at(header, 0)?;
        file.sync_data()?;
        Ok(Self { index, file, offset: header.len() as u64, bytes })
    }

    /// Where its durable frames end.
    pub(super) fn durable(&self) -> Durable {
        Durable { segment: self.index, offset: self.offset }
    }

    /// Bytes that frames may still take; with the reserve only for last words.
    pub(super) fn room(&self, with_reserve: bool) -> u64 {
        let reserve = if with_reserve { 0 } else { SEGMENT_RESERVE_BYTES };
        self.bytes.saturating_sub(self.offset + reserve)
    }

    /// Bytes that only last words may take.
    pub(super) fn reserve(&self) -> u64 {
        self.room(true).min(SEGMENT_RESERVE_BYTES)
    }

    /// Writes frames durably; returns how long it took to make them so.
    pub(super) fn commit(&mut self, frames: &[u8]) -> io::Result<Duration> {
        debug_assert!(frames.len() as u64 <= self.room(true));
        self.file.write_at(frames, self.offset)?;
        let written = Instant::now();
        self.file.sync_data()?;
        self.offset += frames.len() as u64;
        Ok(written.elapsed())
    }

    /// Gives back the space that is not used; returns how much. What a failed write left is cut away too.
    pub(super) fn finish(self) -> io::Result<u64> {
        self.file.set_length(self.offset)?;
        self.file.sync_all()?;
        Ok(self.bytes - self.offset)
    }
}

/// What a file takes on disk: wrapped keys are much shorter than that.
pub(super) fn whole_blocks(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_BYTES)
}

/// Bytes of all segments and wrapped keys in a journal, of every epoch.
pub(super) fn bytes_of_all(storage: &dyn Storage, journal: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for epoch in storage.entries(journal)?.into_iter().filter(|entry| entry.is_folder) {
        let files = match storage.entries(&journal.join(epoch.name)) {
            // Another process may be removing an epoch just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            files => files?,
        };
        for file in files.into_iter().filter(|file| !file.is_folder) {
            if file.name.ends_with(SEGMENT_SUFFIX) {
                bytes += file.bytes;
            } else if file.name.ends_with(WRAPPED_KEY_SUFFIX) {
                bytes += whole_blocks(file.bytes);
            }
        }
    }
    Ok(bytes)
}
