//! One frame of the journal: a header with checksums, an envelope, a value.
//!
//! The value is exactly what goes to Kafka. Nothing here knows files or segments, and nothing here panics on any
//! bytes. `docs/recording-format.md` describes the same for readers in other languages; keep both in step.

use crate::{
    envelope::{CODEC_BINCODE_STANDARD, ENVELOPE_BYTES_MAX, Envelope, EnvelopeError},
    merkle::{Hash, leaf_hash},
};

/// Most bytes of a value; longer records are split before framing.
pub const VALUE_BYTES_MAX: usize = 512 * 1024;

/// Version of the frame layout.
pub const FRAME_VERSION: u8 = 1;

/// First bytes of a frame. Not zero, so that preallocated space cannot be taken for a frame.
pub const FRAME_MAGIC: [u8; 4] = *b"WFr1";

/// Bytes before the envelope.
pub const FRAME_HEADER_BYTES: usize = 72;

/// Most bytes of a frame.
pub const FRAME_BYTES_MAX: usize = FRAME_HEADER_BYTES + ENVELOPE_BYTES_MAX + VALUE_BYTES_MAX;

// The layout, all integers little endian:
//
//    0  magic            4   "WFr1"
//    4  version          1   1
//    5  type             1   1 event, 2 checkpoint
//    6  envelope codec   1   1 bincode 2 standard
//    7  flags            1   0; a reader refuses flags that it does not know
//    8  envelope length  4
//   12  value length     4
//   16  sequence         8   event: its index in the log; checkpoint: number of events before it
//   24  commit           8   number of the group commit (one fdatasync) that wrote it
//   32  leaf hash       32   SHA-256(0x00 ‖ value)
//   64  body checksum    4   CRC32C of envelope ‖ value
//   68  header checksum  4   CRC32C of bytes 0..68
//   72  envelope, then value
//
// Magic and version come first, so that any reader can tell what it does not understand. The header has a checksum of
// its own, since only a length that can be trusted leads to the next frame: damage in a body costs one frame, not
// the rest of the segment. `commit` tells a torn tail (the last group commit, never acknowledged) from damage to
// what had been acknowledged: frames of two later commits behind a bad frame prove that it had been synced.
const _: () = assert!(FRAME_HEADER_BYTES == 4 + 4 + 4 + 4 + 8 + 8 + 32 + 4 + 4);

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameType {
    /// An event (JSON): a leaf of the Merkle tree.
    Event,
    /// A signed checkpoint (C2SP signed note) over all events before it; not a leaf.
    Checkpoint,
}

impl FrameType {
    /// The number in the header.
    pub const fn number(self) -> u8 {
        match self {
            Self::Event => 1,
            Self::Checkpoint => 2,
        }
    }

    /// The type with this number, if there is one.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Event),
            2 => Some(Self::Checkpoint),
            _ => None,
        }
    }
}

/// A frame, its value borrowed from where it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What it holds.
    pub frame_type: FrameType,
    /// Index of the event in the log; of a checkpoint the number of events before it.
    pub sequence: u64,
    /// Number of the group commit.
    pub commit: u64,
    /// SHA-256(0x00 ‖ value), checked when decoded.
    pub leaf_hash: Hash,
    /// What accompanies the value.
    pub envelope: Envelope,
    /// The exact bytes for Kafka.
    pub value: &'a [u8],
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The bytes end within the frame.
    #[error("frame ends early: {present} of {needed} bytes")]
    Incomplete {
        /// Bytes there are.
        present: usize,
        /// Bytes it needs at least.
        needed: usize,
    },
    /// Something else is here.
    #[error("no frame starts here")]
    Magic,
    /// The header's checksum is wrong.
    #[error("frame header does not match its checksum")]
    HeaderChecksum,
    /// Made by a later version.
    #[error("frame version {version} is not known; read this journal with a later version")]
    Version {
        /// The number in the header.
        version: u8,
    },
    /// Made by a later version.
    #[error("frame type {number} is not known; read this journal with a later version")]
    Type {
        /// The number in the header.
        number: u8,
    },
    /// Made by a later version.
    #[error("frame flags {flags:#04x} are not known; read this journal with a later version")]
    Flags {
        /// The number in the header.
        flags: u8,
    },
    /// A length beyond the limits.
    #[error(
        "frame claims an envelope of {envelope} and a value of {value} bytes, more than a frame may hold"
    )]
    Length {
        /// Claimed length of the envelope.
        envelope: usize,
        /// Claimed length of the value.
        value: usize,
    },
    /// The checksum over envelope and value is wrong.
    #[error("frame {sequence} does not match its checksum")]
    BodyChecksum {
        /// Sequence in its header.
        sequence: u64,
    },
    /// The leaf hash is wrong although the checksums are right: not an accident.
    #[error("value of frame {sequence} does not match its leaf hash, although checksums match")]
    LeafHash {
        /// Sequence in its header.
        sequence: u64,
    },
    /// The envelope cannot be read.
    #[error("envelope of frame {sequence} cannot be read")]
    Envelope {
        /// Sequence in its header.
        sequence: u64,
        /// Why.
        #[source]
        source: EnvelopeError,
    },
}

/// A header whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame holds.
    pub frame_type: FrameType,
    /// Codec of the envelope.
    pub codec: u8,
    /// Length of the envelope.
    pub envelope_bytes: usize,
    /// Length of the value.
    pub value_bytes: usize,
    /// See [`Frame::sequence`].
    pub sequence: u64,
    /// See [`Frame::commit`].
    pub commit: u64,
    /// See [`Frame::leaf_hash`].
    pub leaf_hash: Hash,
    body_checksum: u32,
}

impl FrameHeader {
    /// Length of the whole frame.
    pub fn frame_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.envelope_bytes + self.value_bytes
    }

    /// Decodes the header at the start of `bytes`.
    ///
    /// # Errors
    /// There is no valid header.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let Some(header) = bytes.first_chunk::<FRAME_HEADER_BYTES>() else {
            return Err(FrameError::Incomplete { present: bytes.len(), needed: FRAME_HEADER_BYTES });
        };
        if header[0..4] != FRAME_MAGIC {
            return Err(FrameError::Magic);
        }
        if crc32c::crc32c(&header[..68]) != u32_at(header, 68) {
            return Err(FrameError::HeaderChecksum);
        }
        if header[4] != FRAME_VERSION {
            return Err(FrameError::Version { version: header[4] });
        }
        let frame_type = FrameType::from_number(header[5]).ok_or(FrameError::Type { number: header[5] })?;
        if header[7] != 0 {
            return Err(FrameError::Flags { flags: header[7] });
        }
        let (envelope_bytes, value_bytes) = (u32_at(header, 8) as usize, u32_at(header, 12) as usize);
        if envelope_bytes > ENVELOPE_BYTES_MAX || value_bytes > VALUE_BYTES_MAX {
            return Err(FrameError::Length { envelope: envelope_bytes, value: value_bytes });
        }
        let mut leaf_hash = Hash::default();
        leaf_hash.copy_from_slice(&header[32..64]);
        Ok(Self {
            frame_type,
            codec: header[6],
            envelope_bytes,
            value_bytes,
            sequence: u64_at(header, 16),
            commit: u64_at(header, 24),
            leaf_hash,
            body_checksum: u32_at(header, 64),
        })
    }
}

fn u32_at(bytes: &[u8; FRAME_HEADER_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes([bytes[offset], bytes[offset + 1], bytes[offset + 2], bytes[offset + 3]])
}

fn u64_at(bytes: &[u8; FRAME_HEADER_BYTES], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}

/// Why a frame cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The value should have been split.
    #[error("value has {bytes} bytes, more than the {VALUE_BYTES_MAX} that a frame may hold")]
    ValueTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The envelope is too long.
    #[error("envelope cannot be encoded")]
    Envelope(#[from] EnvelopeError),
}

/// Appends a frame to `buffer` and returns the leaf hash of its value.
///
/// # Errors
/// Value or envelope are too long; `buffer` is as it was then.
pub fn encode(
    buffer: &mut Vec<u8>,
    frame_type: FrameType,
    sequence: u64,
    commit: u64,
    envelope: &Envelope,
    value: &[u8],
) -> Result<Hash, EncodeError> {
    encode_parts(buffer, frame_type, (sequence, commit), envelope, &[value])
}

/// The same with a value in parts, which is put together in the frame alone; `numbers` are sequence and commit.
///
/// # Errors
/// As of [`encode`].
pub fn encode_parts(
    buffer: &mut Vec<u8>,
    frame_type: FrameType,
    (sequence, commit): (u64, u64),
    envelope: &Envelope,
    value: &[&[u8]],
) -> Result<Hash, EncodeError> {
    let value_bytes = value.iter().map(|part| part.len()).sum();
    if value_bytes > VALUE_BYTES_MAX {
        return Err(EncodeError::ValueTooLong { bytes: value_bytes });
    }
    let start = buffer.len();
    buffer.resize(start + FRAME_HEADER_BYTES, 0);
    let envelope_bytes = match envelope.encode(buffer) {
        Ok(bytes) => bytes,
        Err(error) => {
            buffer.truncate(start);
            return Err(error.into());
        }
    };
    value.iter().for_each(|part| buffer.extend_from_slice(part));
    let leaf = leaf_hash(&buffer[start + FRAME_HEADER_BYTES + envelope_bytes..]);
    let body_checksum = crc32c::crc32c(&buffer[start + FRAME_HEADER_BYTES..]);
    let header = &mut buffer[start..start + FRAME_HEADER_BYTES];
    header[0..4].copy_from_slice(&FRAME_MAGIC);
    header[4..8].copy_from_slice(&[FRAME_VERSION, frame_type.number(), CODEC_BINCODE_STANDARD, 0]);
    // Both lengths are far below 2^32: checked above, the envelope by its encoder.
    header[8..12].copy_from_slice(&(envelope_bytes as u32).to_le_bytes());
    header[12..16].copy_from_slice(&(value_bytes as u32).to_le_bytes());
    header[16..24].copy_from_slice(&sequence.to_le_bytes());
    header[24..32].copy_from_slice(&commit.to_le_bytes());
    header[32..64].copy_from_slice(&leaf);
    header[64..68].copy_from_slice(&body_checksum.to_le_bytes());
    let header_checksum = crc32c::crc32c(&header[..68]);
    header[68..72].copy_from_slice(&header_checksum.to_le_bytes());
    Ok(leaf)
}

/// Decodes the frame at the start of `bytes`; returns it and its length.
///
/// # Errors
/// There is no valid frame.
pub fn decode(bytes: &[u8]) -> Result<(Frame<'_>, usize), FrameError> {
    let header = FrameHeader::decode(bytes)?;
    let (length, sequence) = (header.frame_bytes(), header.sequence);
    let Some(body) = bytes.get(FRAME_HEADER_BYTES..length) else {
        return Err(FrameError::Incomplete { present: bytes.len(), needed: length });
    };
    if crc32c::crc32c(body) != header.body_checksum {
        return Err(FrameError::BodyChecksum { sequence });
    }
    let (envelope, value) = body.split_at(header.envelope_bytes);
    if leaf_hash(value) != header.leaf_hash {
        return Err(FrameError::LeafHash { sequence });
    }
    let envelope = Envelope::decode(header.codec, envelope)
        .map_err(|source| FrameError::Envelope { sequence, source })?;
    let frame = Frame {
        frame_type: header.frame_type,
        sequence,
        commit: header.commit,
        leaf_hash: header.leaf_hash,
        envelope,
        value,
    };
    Ok((frame, length))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::{FRAME_HEADER_BYTES, FrameError, FrameType, VALUE_BYTES_MAX, decode, encode};
    use crate::envelope::Envelope;

    fn sample() -> Vec<u8> {
        let envelope = Envelope { key: "s".into(), ..Envelope::default() };
        let mut bytes = Vec::new();
        encode(&mut bytes, FrameType::Event, 0x0102_0304_0506_0708, 3, &envelope, b"{}").unwrap();
        bytes
    }

    #[test]
    fn the_bytes_of_version_1_are_golden() {
        expect!["574672310101010008000000020000000807060504030201030000000000000028a3a18f6cd6406b086e9ffda1f9b8a13dbcf44b0f3f32cb9031a11fd053acf973ade0a71c73ff2801730000000000007b7d"].assert_eq(&hex::encode(sample()));
    }

    #[test]
    fn a_change_of_any_bit_is_noticed() {
        let good = sample();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_shorter_prefix_is_incomplete() {
        let good = sample();
        for length in 0..good.len() {
            assert!(matches!(decode(&good[..length]), Err(FrameError::Incomplete { .. })), "{length}");
        }
    }

    #[test]
    fn a_value_beyond_the_limit_is_refused_and_leaves_the_buffer_alone() {
        let mut bytes = vec![1];
        let value = vec![0; VALUE_BYTES_MAX + 1];
        assert!(encode(&mut bytes, FrameType::Event, 0, 0, &Envelope::default(), &value).is_err());
        assert_eq!(bytes, [1]);
    }

    proptest! {
        #[test]
        fn decoding_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), fix: bool) {
            if fix && bytes.len() >= FRAME_HEADER_BYTES {
                bytes[0..4].copy_from_slice(b"WFr1");
                bytes[4..8].copy_from_slice(&[1, 1, 1, 0]);
                let checksum = crc32c::crc32c(&bytes[..68]).to_le_bytes();
                bytes[68..72].copy_from_slice(&checksum);
            }
            let _ = decode(&bytes);
        }

        #[test]
        fn what_is_encoded_decodes_to_itself(
            key in ".{0,20}", sequence: u64, commit: u64, checkpoint: bool,
            value in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let envelope = Envelope { key, ..Envelope::default() };
            let frame_type = if checkpoint { FrameType::Checkpoint } else { FrameType::Event };
            let mut bytes = Vec::new();
            let leaf = encode(&mut bytes, frame_type, sequence, commit, &envelope, &value).unwrap();
            bytes.push(0xff);
            let (frame, length) = decode(&bytes).unwrap();
            prop_assert_eq!(length, bytes.len() - 1);
            prop_assert_eq!(frame.envelope, envelope);
            prop_assert_eq!(frame.value, &value[..]);
            prop_assert_eq!((frame.frame_type, frame.sequence, frame.commit, frame.leaf_hash),
                (frame_type, sequence, commit, leaf));
        }
    }
}
