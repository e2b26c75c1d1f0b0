//! What an epoch's folder keeps of segments that were published and then removed: the file `removed`.
//!
//! It names the first segment that may still be there and holds the Merkle tree over the events before it, so that who
//! verifies goes on from there and the checkpoints that follow bind what is gone. It is in place before the first of
//! those segments is unlinked. `docs/recording-format.md` describes it as well. Sans-IO, never panics on any bytes.

use uuid::Uuid;

use crate::merkle::{Hash, Tree};

/// The file's name in an epoch's folder.
pub const REMOVED_FILE: &str = "removed";

/// Most bytes of the file.
pub const REMOVED_BYTES_MAX: usize = HEADER_BYTES + PEAKS_MAX * 32 + 4;

const MAGIC: [u8; 8] = *b"WEIRREM\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 48;
const PEAKS_MAX: usize = 64;

// The layout, all integers little endian:
//
//    0  magic           8   "WEIRREM\n"
//    8  version         4   1
//   12  peaks           4   their number: one for each bit set in `events`
//   16  epoch          16   UUID, in network order
//   32  first segment   8   every segment with a lower number was removed
//   40  events          8   number of events before it; sequence of the first one in it
//   48  peaks      32 × n   roots of perfect subtrees over those events, the largest first
//    …  checksum        4   CRC32C of everything before it

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// The epoch whose segments were removed.
    pub epoch: Uuid,
    /// Every segment with a lower number was published and removed.
    pub first_segment: u64,
    /// The tree over the events in them; its size is their number.
    pub tree: Tree,
}

/// Why bytes are not a file `removed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RemovedError {
    /// Not such a file, or cut.
    #[error("no account of removed segments: it does not start, or is not as long, as one")]
    Form,
    /// Damage.
    #[error("account of removed segments does not match its checksum")]
    Checksum,
    /// Made by a later version.
    #[error(
        "account of removed segments has version {version}, which is not known; read this journal with a later version"
    )]
    Version {
        /// The number in it.
        version: u32,
    },
    /// The number of peaks is not that of a tree of this size.
    #[error("account of removed segments holds no Merkle tree of {events} events")]
    Peaks {
        /// Number of events that it names.
        events: u64,
    },
}

impl Removed {
    /// Encodes it.
    pub fn encode(&self) -> Vec<u8> {
        let peaks = self.tree.peaks();
        let mut bytes = Vec::with_capacity(HEADER_BYTES + peaks.len() * 32 + 4);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        // At most 64: one for each bit of the size.
        bytes.extend_from_slice(&(peaks.len() as u32).to_le_bytes());
        bytes.extend_from_slice(self.epoch.as_bytes());
        bytes.extend_from_slice(&self.first_segment.to_le_bytes());
        bytes.extend_from_slice(&self.tree.size().to_le_bytes());
        peaks.iter().for_each(|peak| bytes.extend_from_slice(peak));
        let checksum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Decodes the whole of a file.
    ///
    /// # Errors
    /// It is none, or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, RemovedError> {
        let Some((body, checksum)) = bytes.split_last_chunk::<4>() else { return Err(RemovedError::Form) };
        let Some((header, rest)) = body.split_first_chunk::<HEADER_BYTES>() else {
            return Err(RemovedError::Form);
        };
        if header[0..8] != MAGIC {
            return Err(RemovedError::Form);
        }
        if crc32c::crc32c(body).to_le_bytes() != *checksum {
            return Err(RemovedError::Checksum);
        }
        let version = u32::from_le_bytes(array(header, 8));
        if version != VERSION {
            return Err(RemovedError::Version { version });
        }
        let (peaks, left) = rest.as_chunks::<32>();
        let peaks: Vec<Hash> = peaks.to_vec();
        if !left.is_empty() || peaks.len() != u32::from_le_bytes(array(header, 12)) as usize {
            return Err(RemovedError::Form);
        }
        let events = u64::from_le_bytes(array(header, 40));
        Ok(Self {
            epoch: Uuid::from_bytes(array(header, 16)),
            first_segment: u64::from_le_bytes(array(header, 32)),
            tree: Tree::from_peaks(events, peaks).ok_or(RemovedError::Peaks { events })?,
        })
    }
}

/// `N` bytes from `offset`; both are constants of the layout within the header.
fn array<const N: usize>(header: &[u8; HEADER_BYTES], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[offset..offset + N]);
    bytes
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::{REMOVED_BYTES_MAX, Removed, RemovedError};
    use crate::merkle::{Tree, leaf_hash};

    fn sample(events: u8) -> Removed {
        let mut tree = Tree::new();
        (0..events).for_each(|n| tree.push(leaf_hash(&[n])));
        Removed { epoch: Uuid::from_u128(7), first_segment: 3, tree }
    }

    #[test]
    fn the_bytes_of_version_1_are_golden() {
        expect!["5745495252454d0a01000000010000000000000000000000000000000000000703000000000000000200000000000000a20bf9a7cc2dc8a08f5f415a71b19f6ac427bab54d24eec868b5d3103449953aa7475710"].assert_eq(&hex::encode(sample(2).encode()));
    }

    #[test]
    fn what_is_encoded_decodes_to_itself() {
        for events in 0..70 {
            let bytes = sample(events).encode();
            assert!(bytes.len() <= REMOVED_BYTES_MAX);
            assert_eq!(Removed::decode(&bytes), Ok(sample(events)));
        }
    }

    #[test]
    fn a_change_of_any_bit_and_any_cut_are_noticed() {
        let good = sample(5).encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Removed::decode(&bad).is_err(), "bit {bit}");
        }
        for length in 0..good.len() {
            assert!(Removed::decode(&good[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn a_tree_with_too_few_peaks_is_refused() {
        let mut bytes = sample(2).encode();
        bytes[40] = 3;
        let body = bytes.len() - 4;
        let checksum = crc32c::crc32c(&bytes[..body]);
        bytes[body..].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(Removed::decode(&bytes), Err(RemovedError::Peaks { events: 3 }));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Removed::decode(&bytes);
        }
    }
}
