//! One segment file of the journal: a header, frames, unused space; and how to read it back.
//!
//! The reader works on bytes in memory (or mapped), yields frames and errors that name their offset, goes on behind
//! damage, and says at the end how the segment ended. It allows a torn tail only where nothing that had been
//! acknowledged can follow. Sans-IO, never panics on any bytes.

use uuid::Uuid;

use crate::frame::{self, FRAME_HEADER_BYTES, FRAME_MAGIC, Frame, FrameError, FrameHeader, FrameType};

/// First bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"WEIRSEG\n";

/// Version of the segment layout.
pub const SEGMENT_VERSION: u32 = 1;

/// Bytes before the first frame.
pub const SEGMENT_HEADER_BYTES: usize = 512;

/// Most bytes of a node's name: that of a DNS name.
pub const NODE_BYTES_MAX: usize = 253;

/// Ending of a segment's file name.
pub const SEGMENT_SUFFIX: &str = ".seg";

// The header, all integers little endian:
//
//    0  magic            8   "WEIRSEG\n"
//    8  version          4   1
//   12  header length    4   512
//   16  index            8   number of the segment in its epoch, from 0; also its file name
//   24  first sequence   8   sequence of the first event in it
//   32  first commit     8   number of the first group commit in it
//   40  created          8   microseconds since the Unix epoch, signed
//   48  epoch           16   UUID, in network order
//   64  node length      2
//   66  node           253   UTF-8, rest 0
//  319  reserved       189   0
//  508  checksum         4   CRC32C of bytes 0..508
//  512  frames, back to back; behind the last one zeros (preallocated space)
//
// One disk sector, so that a header is written whole or not at all.

/// What stands at the start of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Number of the segment in its epoch, from 0.
    pub index: u64,
    /// Sequence of the first event in it. Events with this sequence or a later one at the end of the segment
    /// before were never acknowledged and do not count.
    pub first_sequence: u64,
    /// Number of the first group commit in it.
    pub first_commit: u64,
    /// When it was made, in microseconds since the Unix epoch.
    pub created_unix_us: i64,
    /// The agent's process epoch.
    pub epoch: Uuid,
    /// Name of the node.
    pub node: String,
}

/// Why a segment, or a place in it, cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// Shorter than a header.
    #[error("segment ends within its header: {present} of {SEGMENT_HEADER_BYTES} bytes")]
    Incomplete {
        /// Its length.
        present: usize,
    },
    /// Not a segment.
    #[error("no journal segment: it does not start with the segment magic")]
    Magic,
    /// Damage in the header.
    #[error("segment header does not match its checksum")]
    HeaderChecksum,
    /// Made by a later version.
    #[error("segment version {version} is not known; read this journal with a later version")]
    Version {
        /// The number in the header.
        version: u32,
    },
    /// The node's name is too long or not UTF-8.
    #[error("segment header holds no valid node name")]
    Node,
    /// Something that had been acknowledged cannot be read any more.
    #[error("segment is damaged at offset {offset}")]
    Damaged {
        /// Where in the segment.
        offset: usize,
        /// What is wrong there.
        #[source]
        source: FrameError,
    },
    /// Frames are missing or out of order.
    #[error("frame at offset {offset} has sequence {found} where {expected} must follow")]
    Sequence {
        /// Where in the segment.
        offset: usize,
        /// What must follow.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// The segment ends before the next one begins.
    #[error(
        "segment ends at offset {offset} before sequence {expected}, but the next segment starts with {successor}"
    )]
    Missing {
        /// Where its last frame ends.
        offset: usize,
        /// First sequence that is missing.
        expected: u64,
        /// First sequence of the next segment.
        successor: u64,
    },
}

impl SegmentHeader {
    /// The file name: the index with 20 digits and `.seg`, so that names sort as numbers do.
    pub fn file_name(index: u64) -> String {
        format!("{index:020}{SEGMENT_SUFFIX}")
    }

    /// Encodes the header.
    ///
    /// # Errors
    /// The node's name is longer than [`NODE_BYTES_MAX`].
    pub fn encode(&self) -> Result<[u8; SEGMENT_HEADER_BYTES], SegmentError> {
        let node = self.node.as_bytes();
        if node.len() > NODE_BYTES_MAX {
            return Err(SegmentError::Node);
        }
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[0..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..12].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(SEGMENT_HEADER_BYTES as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.index.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.first_sequence.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.first_commit.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.created_unix_us.to_le_bytes());
        bytes[48..64].copy_from_slice(self.epoch.as_bytes());
        bytes[64..66].copy_from_slice(&(node.len() as u16).to_le_bytes());
        bytes[66..66 + node.len()].copy_from_slice(node);
        let checksum = crc32c::crc32c(&bytes[..508]);
        bytes[508..].copy_from_slice(&checksum.to_le_bytes());
        Ok(bytes)
    }

    /// Decodes the header at the start of `bytes`.
    ///
    /// # Errors
    /// There is no valid header.
    pub fn decode(bytes: &[u8]) -> Result<Self, SegmentError> {
        let Some(header) = bytes.first_chunk::<SEGMENT_HEADER_BYTES>() else {
            return Err(SegmentError::Incomplete { present: bytes.len() });
        };
        if header[0..8] != SEGMENT_MAGIC {
            return Err(SegmentError::Magic);
        }
        if crc32c::crc32c(&header[..508]).to_le_bytes() != header[508..] {
            return Err(SegmentError::HeaderChecksum);
        }
        let version = u32::from_le_bytes(array(header, 8));
        if version != SEGMENT_VERSION {
            return Err(SegmentError::Version { version });
        }
        let node_bytes = usize::from(u16::from_le_bytes(array(header, 64)));
        if node_bytes > NODE_BYTES_MAX {
            return Err(SegmentError::Node);
        }
        let node = std::str::from_utf8(&header[66..66 + node_bytes]).map_err(|_| SegmentError::Node)?;
        Ok(Self {
            index: u64::from_le_bytes(array(header, 16)),
            first_sequence: u64::from_le_bytes(array(header, 24)),
            first_commit: u64::from_le_bytes(array(header, 32)),
            created_unix_us: i64::from_le_bytes(array(header, 40)),
            epoch: Uuid::from_bytes(array(header, 48)),
            node: node.to_owned(),
        })
    }
}

/// `N` bytes from `offset`; both are constants of the layout within the header.
fn array<const N: usize>(header: &[u8; SEGMENT_HEADER_BYTES], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[offset..offset + N]);
    bytes
}

/// A frame and where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<'a> {
    /// Offset in the segment.
    pub offset: usize,
    /// The frame.
    pub frame: Frame<'a>,
}

/// How a segment ends.
#[derive(Debug)]
pub enum Tail {
    /// Nothing but unused space behind the last frame.
    Clean {
        /// Where the last frame ends.
        offset: usize,
    },
    /// The last group commit did not reach the disk whole (crash, or a write that failed). Nothing in it had been
    /// acknowledged.
    Torn {
        /// Where the torn part begins.
        offset: usize,
        /// What is wrong there.
        reason: FrameError,
    },
    /// Whole frames that were never acknowledged: the next segment has their sequences again.
    Abandoned {
        /// Where they begin.
        offset: usize,
    },
}

/// Reads a segment: an iterator over its frames, in order.
///
/// After an error the iterator goes on with the next frame that can be read; behind a hole in the sequences that is
/// the frame that showed it. When it is exhausted, [`Self::tail`]
/// says how the segment ended and [`Self::next_sequence`] which event must come next.
#[derive(Debug)]
pub struct SegmentReader<'a> {
    bytes: &'a [u8],
    header: SegmentHeader,
    /// First sequence of the next segment, if there is one.
    successor: Option<u64>,
    offset: usize,
    next_sequence: u64,
    last_commit: u64,
    tail: Option<Tail>,
}

impl<'a> SegmentReader<'a> {
    /// Reads the header. `successor_first_sequence` comes from the header of the next segment of the same epoch,
    /// none for the last one.
    ///
    /// # Errors
    /// There is no valid header.
    pub fn new(bytes: &'a [u8], successor_first_sequence: Option<u64>) -> Result<Self, SegmentError> {
        let header = SegmentHeader::decode(bytes)?;
        Ok(Self {
            bytes,
            successor: successor_first_sequence,
            offset: SEGMENT_HEADER_BYTES,
            next_sequence: header.first_sequence,
            last_commit: header.first_commit.saturating_sub(1),
            header,
            tail: None,
        })
    }

    /// Goes on at `offset`, for who has read the frames before it by other means: `next_sequence` must follow there, and
    /// `last_commit` is that of the last frame that was read.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn resume(
        bytes: &'a [u8],
        successor_first_sequence: Option<u64>,
        offset: usize,
        next_sequence: u64,
        last_commit: u64,
    ) -> Result<Self, SegmentError> {
        let reader = Self::new(bytes, successor_first_sequence)?;
        Ok(Self { offset, next_sequence, last_commit, ..reader })
    }

    /// Where it goes on.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The segment's header.
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// How the segment ended; none until the iterator is exhausted.
    pub fn tail(&self) -> Option<&Tail> {
        self.tail.as_ref()
    }

    /// Sequence of the event that must follow what has been read.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Ends the reading; complains if the next segment begins later than this one ends.
    fn end(&mut self, tail: Tail) -> Option<Result<Located<'a>, SegmentError>> {
        let offset = self.offset;
        self.tail = Some(tail);
        match self.successor {
            Some(successor) if successor != self.next_sequence => {
                let expected = self.next_sequence;
                Some(Err(SegmentError::Missing { offset, expected, successor }))
            }
            _ => None,
        }
    }

    /// What to do where no frame can be read: unused space, torn tail, or damage.
    fn judge(&mut self, reason: FrameError) -> Option<Result<Located<'a>, SegmentError>> {
        let offset = self.offset;
        let rest = self.bytes.get(offset..).unwrap_or_default();
        if rest.iter().all(|byte| *byte == 0) {
            return self.end(Tail::Clean { offset });
        }
        let later = LaterFrames { bytes: self.bytes, offset: offset + 1 };
        let Some((resume, newest)) = later.first_and_newest_commit() else {
            return self.end(Tail::Torn { offset, reason });
        };
        // The bad frame is of the last good frame's commit or of the one after it. Only the very last commit can
        // be torn: a frame of a commit two further on was written after this one had been synced.
        if newest <= self.last_commit.saturating_add(1) {
            return self.end(Tail::Torn { offset, reason });
        }
        self.offset = match FrameHeader::decode(rest) {
            Ok(header) => offset + header.frame_bytes(),
            Err(_) => resume,
        };
        // Reported once, here; what follows is judged by its own sequence.
        if let Ok((frame, _)) = frame::decode(self.bytes.get(resume..).unwrap_or_default()) {
            self.next_sequence = frame.sequence;
        }
        Some(Err(SegmentError::Damaged { offset, source: reason }))
    }
}

impl<'a> Iterator for SegmentReader<'a> {
    type Item = Result<Located<'a>, SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.tail.is_some() {
            return None;
        }
        let offset = self.offset;
        let (frame, length) = match frame::decode(self.bytes.get(offset..).unwrap_or_default()) {
            Ok(decoded) => decoded,
            Err(reason) => return self.judge(reason),
        };
        let abandoned = match (self.successor, frame.frame_type) {
            (Some(successor), FrameType::Event) => frame.sequence >= successor,
            (Some(successor), FrameType::Checkpoint) => frame.sequence > successor,
            (None, _) => false,
        };
        if abandoned {
            return self.end(Tail::Abandoned { offset });
        }
        let (expected, found) = (self.next_sequence, frame.sequence);
        if found > expected {
            // Said once; the frame itself is whole, and comes next.
            self.next_sequence = found;
            return Some(Err(SegmentError::Sequence { offset, expected, found }));
        }
        self.offset += length;
        self.last_commit = frame.commit;
        self.next_sequence = match frame.frame_type {
            FrameType::Event => found.saturating_add(1),
            FrameType::Checkpoint => found,
        };
        if expected != found {
            return Some(Err(SegmentError::Sequence { offset, expected, found }));
        }
        Some(Ok(Located { offset, frame }))
    }
}

/// Looks for frame headers anywhere behind a bad place.
struct LaterFrames<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl LaterFrames<'_> {
    /// Offset of the first valid header, and the newest commit of all valid headers.
    fn first_and_newest_commit(mut self) -> Option<(usize, u64)> {
        let mut found: Option<(usize, u64)> = None;
        while let Some(rest) = self.bytes.get(self.offset..).filter(|rest| rest.len() >= FRAME_HEADER_BYTES) {
            let Some(distance) = rest.iter().position(|byte| *byte == FRAME_MAGIC[0]) else { break };
            self.offset += distance;
            if let Ok(header) = FrameHeader::decode(&rest[distance..]) {
                found = Some(match found {
                    None => (self.offset, header.commit),
                    Some((first, newest)) => (first, newest.max(header.commit)),
                });
            }
            self.offset += 1;
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::{SEGMENT_HEADER_BYTES, SegmentError, SegmentHeader, SegmentReader, Tail};
    use crate::{
        envelope::Envelope,
        frame::{FrameError, FrameType, encode},
    };

    fn header(first_sequence: u64) -> SegmentHeader {
        SegmentHeader {
            index: 0,
            first_sequence,
            first_commit: 5,
            created_unix_us: -1,
            epoch: Uuid::from_u128(7),
            node: "node-1".into(),
        }
    }

    /// A segment with events 10, 11, 12… of the given commits; the offsets of the frames.
    fn segment(commits: &[u64]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = header(10).encode().unwrap().to_vec();
        let mut offsets = Vec::new();
        for (sequence, commit) in (10..).zip(commits) {
            offsets.push(bytes.len());
            let value = format!("event {sequence}");
            encode(&mut bytes, FrameType::Event, sequence, *commit, &Envelope::default(), value.as_bytes())
                .unwrap();
        }
        offsets.push(bytes.len());
        bytes.resize(bytes.len() + 300, 0);
        (bytes, offsets)
    }

    fn read(bytes: &[u8], successor: Option<u64>) -> (Vec<u64>, Vec<SegmentError>, Tail) {
        let mut reader = SegmentReader::new(bytes, successor).unwrap();
        let (mut sequences, mut errors) = (Vec::new(), Vec::new());
        for item in reader.by_ref() {
            match item {
                Ok(located) => sequences.push(located.frame.sequence),
                Err(error) => errors.push(error),
            }
        }
        (sequences, errors, reader.tail.unwrap())
    }

    #[test]
    fn a_header_decodes_to_itself_and_damage_to_it_is_noticed() {
        let bytes = header(3).encode().unwrap();
        assert_eq!(SegmentHeader::decode(&bytes).unwrap(), header(3));
        for byte in 0..SEGMENT_HEADER_BYTES {
            let mut bad = bytes;
            bad[byte] ^= 0x10;
            assert!(SegmentHeader::decode(&bad).is_err(), "byte {byte}");
        }
        assert!(matches!(SegmentHeader::decode(&bytes[..511]), Err(SegmentError::Incomplete { .. })));
    }

    #[test]
    fn a_whole_segment_ends_clean() {
        let (bytes, offsets) = segment(&[5, 5, 6]);
        let (sequences, errors, tail) = read(&bytes, None);
        assert_eq!(sequences, [10, 11, 12]);
        assert!(errors.is_empty());
        assert!(matches!(tail, Tail::Clean { offset } if offset == offsets[3]));
    }

    #[test]
    fn a_torn_last_commit_is_a_torn_tail_wherever_it_is_torn() {
        let (bytes, offsets) = segment(&[5, 6, 6]);
        for cut in offsets[1] + 1..offsets[3] {
            let mut torn = bytes.clone();
            torn[cut..].fill(0);
            let (sequences, errors, tail) = read(&torn, None);
            assert!(errors.is_empty(), "{errors:?}");
            let whole = if cut < offsets[2] { 1 } else { 2 };
            assert_eq!(sequences.len(), whole, "cut at {cut}");
            assert!(matches!(tail, Tail::Torn { .. } | Tail::Clean { .. }));
        }
        // Pages of one commit may reach the disk in any order.
        let mut torn = bytes;
        torn[offsets[1]..offsets[2]].fill(0);
        let (sequences, errors, tail) = read(&torn, None);
        assert_eq!((sequences.len(), errors.len()), (1, 0));
        assert!(matches!(tail, Tail::Torn { offset, .. } if offset == offsets[1]));
    }

    #[test]
    fn damage_before_a_later_commit_is_an_error_that_names_the_offset_and_costs_one_frame() {
        let (mut bytes, offsets) = segment(&[5, 6, 7, 8]);
        bytes[offsets[1] + 80] ^= 1;
        let (sequences, errors, tail) = read(&bytes, None);
        assert_eq!(sequences, [10, 12, 13]);
        assert!(matches!(
            errors[..],
            [SegmentError::Damaged { offset, source: FrameError::BodyChecksum { sequence: 11 } }] if offset == offsets[1]
        ));
        assert!(matches!(tail, Tail::Clean { .. }));
        bytes[offsets[1] + 8] ^= 1;
        let (sequences, errors, _) = read(&bytes, None);
        assert_eq!(sequences, [10, 12, 13]);
        assert!(matches!(errors[..], [SegmentError::Damaged { source: FrameError::HeaderChecksum, .. }]));
    }

    #[test]
    fn a_missing_frame_is_an_error() {
        let (mut bytes, offsets) = segment(&[5, 6, 7]);
        bytes.drain(offsets[1]..offsets[2]);
        let (sequences, errors, _) = read(&bytes, None);
        assert_eq!(sequences, [10, 12]);
        assert!(matches!(errors[..], [SegmentError::Sequence { expected: 11, found: 12, .. }]));
    }

    #[test]
    fn frames_that_the_next_segment_has_again_are_abandoned_and_missing_ones_are_an_error() {
        let (bytes, offsets) = segment(&[5, 6, 7]);
        let (sequences, errors, tail) = read(&bytes, Some(12));
        assert_eq!((sequences.len(), errors.len()), (2, 0));
        assert!(matches!(tail, Tail::Abandoned { offset } if offset == offsets[2]));
        let (_, errors, _) = read(&bytes, Some(14));
        assert!(matches!(errors[..], [SegmentError::Missing { expected: 13, successor: 14, .. }]));
    }

    proptest! {
        #[test]
        fn reading_never_panics_and_ends(
            changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..8), cut: u16, successor: Option<u8>,
        ) {
            let (mut bytes, _) = segment(&[5, 5, 6, 7, 7, 9]);
            for (at, value) in changes {
                let at = SEGMENT_HEADER_BYTES + usize::from(at) % (bytes.len() - SEGMENT_HEADER_BYTES);
                bytes[at] = value;
            }
            bytes.truncate(bytes.len() - usize::from(cut) % 200);
            let reader = SegmentReader::new(&bytes, successor.map(u64::from)).unwrap();
            prop_assert!(reader.count() < 100);
        }

        #[test]
        fn arbitrary_bytes_are_no_segment(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(SegmentReader::new(&bytes, None).is_err());
        }
    }
}
