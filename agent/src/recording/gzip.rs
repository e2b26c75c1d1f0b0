//! Incremental gzip with a bound on what one input can become. Sans-IO.
//!
//! The API server compresses large answers; masks need the content. A few bytes can become a thousand times as many, so
//! input goes in by small slices and the output is handed on after each.

use std::io::Write as _;

use flate2::write::MultiGzDecoder;

/// Input that is decoded at a time: at deflate's best ratio (1:1032) it becomes 4 MiB.
const SLICE_BYTES: usize = 4 * 1024;

/// What gzip begins with.
pub(super) const MAGIC: [u8; 2] = [0x1f, 0x8b];

/// A stream of gzip members that is being decoded.
pub(super) struct Gunzip {
    decoder: MultiGzDecoder<Vec<u8>>,
}

impl std::fmt::Debug for Gunzip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gunzip")
    }
}

/// The input is not gzip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotGzip;

impl Gunzip {
    pub(super) fn new() -> Self {
        Self { decoder: MultiGzDecoder::new(Vec::new()) }
    }

    /// Decodes what can be decoded and hands it on by pieces, until `take` says that it has enough.
    pub(super) fn push(
        &mut self,
        input: &[u8],
        mut take: impl FnMut(&[u8]) -> std::ops::ControlFlow<()>,
    ) -> Result<(), NotGzip> {
        for slice in input.chunks(SLICE_BYTES) {
            let written = self.decoder.write_all(slice).and_then(|()| self.decoder.flush());
            let output = self.decoder.get_mut();
            let enough = !output.is_empty() && take(output).is_break();
            output.clear();
            if enough {
                return Ok(());
            }
            written.map_err(|_| NotGzip)?;
        }
        Ok(())
    }

    /// Whether the input ended where a member ended.
    pub(super) fn is_whole(&mut self) -> bool {
        self.decoder.try_finish().is_ok()
    }
}

/// Decodes `input` into at most `bytes_max` bytes; whether that is all of it.
pub(super) fn decode(input: &[u8], bytes_max: usize) -> Result<(Vec<u8>, bool), NotGzip> {
    let (mut gunzip, mut decoded, mut cut) = (Gunzip::new(), Vec::new(), false);
    gunzip.push(input, |piece| {
        let room = bytes_max - decoded.len();
        decoded.extend_from_slice(&piece[..piece.len().min(room)]);
        if piece.len() > room {
            cut = true;
            return std::ops::ControlFlow::Break(());
        }
        std::ops::ControlFlow::Continue(())
    })?;
    let whole = !cut && gunzip.is_whole();
    Ok((decoded, whole))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;

    use super::{NotGzip, decode};

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn whole_cut_and_bounded_input_is_told_apart() {
        let content = b"some text ".repeat(100);
        let input = gzip(&content);
        assert_eq!(decode(&input, 1000), Ok((content.clone(), true)));
        assert_eq!(decode(&input, 999), Ok((content[..999].to_vec(), false)));
        let (decoded, whole) = decode(&input[..input.len() - 9], 1000).unwrap();
        assert!(!whole && content.starts_with(&decoded));
        assert_eq!(decode(b"this is not gzip", 10), Err(NotGzip));
    }

    #[test]
    fn a_bomb_is_bounded() {
        let input = gzip(&vec![0; 50 << 20]);
        let (decoded, whole) = decode(&input, 1 << 20).unwrap();
        assert_eq!((decoded.len(), whole), (1 << 20, false));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(mut input in proptest::collection::vec(any::<u8>(), 0..300), magic: bool) {
            if magic {
                input.splice(0..0, [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]);
            }
            let _ = decode(&input, 1000);
        }
    }
}
