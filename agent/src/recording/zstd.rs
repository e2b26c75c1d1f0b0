//! Bodies in Zstandard, with a bound on what one can become and on the memory that it takes. Sans-IO.
//!
//! API servers do not speak it; what stands behind `services/proxy` and aggregated API servers may. Some bytes of it become many
//! thousand times as many, so decoding ends with the first byte that is too many.

use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

/// What a frame begins with.
pub(super) const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Most memory that a body may have its decoder keep, as a power of two: what RFC 9659 allows for HTTP.
const WINDOW_LOG_MAX: u32 = 23;

/// Output that is decoded at a time.
const PIECE_BYTES: usize = 128 * 1024;

/// The input is not Zstandard, or needs more memory than HTTP allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotZstd;

/// Decodes `input`, of one or more frames, into at most `bytes_max` bytes; whether that is all of it.
pub(super) fn decode(input: &[u8], bytes_max: usize) -> Result<(Vec<u8>, bool), NotZstd> {
    let mut context = DCtx::try_create().ok_or(NotZstd)?;
    context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(|_| NotZstd)?;
    let (mut decoded, mut piece) = (Vec::new(), vec![0; PIECE_BYTES]);
    let mut from = InBuffer::around(input);
    loop {
        let before = from.pos();
        let mut to = OutBuffer::around(&mut piece[..]);
        let left = context.decompress_stream(&mut to, &mut from).map_err(|_| NotZstd)?;
        let made = to.as_slice();
        let room = bytes_max - decoded.len();
        decoded.extend_from_slice(&made[..made.len().min(room)]);
        if made.len() > room {
            return Ok((decoded, false));
        }
        let is_all_read = from.pos() == input.len();
        let goes_on = made.len() == PIECE_BYTES || !is_all_read && (from.pos() > before || !made.is_empty());
        // Nothing is left of a frame that is whole.
        let is_whole = is_all_read && left == 0;
        if is_whole || !goes_on {
            return Ok((decoded, is_whole || input.is_empty()));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{NotZstd, PIECE_BYTES, decode};

    pub(super) fn zstd(content: &[u8]) -> Vec<u8> {
        let mut out = vec![0; zstd_safe::compress_bound(content.len())];
        let length = zstd_safe::compress(&mut out[..], content, 3).unwrap();
        out.truncate(length);
        out
    }

    #[test]
    fn whole_cut_and_bounded_input_is_told_apart() {
        let content = b"some text ".repeat(100);
        let input = zstd(&content);
        assert_eq!(decode(&input, 1000), Ok((content.clone(), true)));
        assert_eq!(decode(&input, 999), Ok((content[..999].to_vec(), false)));
        let (decoded, whole) = decode(&input[..input.len() - 1], 1000).unwrap();
        assert!(!whole && content.starts_with(&decoded));
        // Several frames, one of which is to be skipped.
        let frames = [&input[..], &[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7], &input].concat();
        assert_eq!(decode(&frames, 2000), Ok((content.repeat(2), true)));
        assert_eq!(decode(b"this is not zstd", 10), Err(NotZstd));
        assert_eq!(decode(&[&input[..], b"and more"].concat(), 2000), Err(NotZstd));
    }

    #[test]
    fn lengths_around_a_piece_are_decoded() {
        for length in [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES] {
            let content: Vec<u8> = (0..length).map(|at| (at * at / 7) as u8).collect();
            assert!(decode(&zstd(&content), length) == Ok((content, true)), "{length}");
        }
    }

    #[test]
    fn a_bomb_is_bounded() {
        let input = zstd(&vec![0; 50 << 20]);
        assert!(input.len() < 8 * 1024);
        let (decoded, whole) = decode(&input, 1 << 20).unwrap();
        assert_eq!((decoded.len(), whole), (1 << 20, false));
    }

    #[test]
    fn a_window_beyond_what_http_allows_is_refused() {
        // Window descriptors: exponents 13 and 14, so 8 and 16 MiB; then an empty last block.
        let frame = |descriptor: u8| [&super::MAGIC[..], &[0x00, descriptor, 1, 0, 0]].concat();
        assert_eq!(decode(&frame(13 << 3), 10), Ok((vec![], true)));
        assert_eq!(decode(&frame(14 << 3), 10), Err(NotZstd));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(mut input in proptest::collection::vec(any::<u8>(), 0..300), magic: bool, bytes_max in 0_usize..1000) {
            if magic {
                input.splice(0..0, super::MAGIC);
            }
            if let Ok((decoded, _)) = decode(&input, bytes_max) {
                prop_assert!(decoded.len() <= bytes_max);
            }
        }
    }
}
