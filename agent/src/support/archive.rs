//! A bundle's bytes: a tar.gz of text files, bounded, made in memory.

use std::io::{self, Write as _};

use flate2::{Compression, write::GzEncoder};
use tar::{Builder, Header};

/// Most bytes of one file; what is longer is cut, and says so.
const FILE_BYTES_MAX: usize = 4 << 20;
/// Most bytes of all files.
const BYTES_MAX: usize = 24 << 20;

/// See the module.
pub(super) struct Archive {
    tar: Builder<GzEncoder<Vec<u8>>>,
    folder: String,
    seconds: u64,
    bytes: usize,
}

impl Archive {
    /// An empty one, whose files will be in this folder and of this time.
    pub(super) fn new(folder: String, seconds: u64) -> Self {
        let tar = Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
        Self { tar, folder, seconds, bytes: 0 }
    }

    /// Adds a file; returns how many bytes of the text it has.
    pub(super) fn add(&mut self, name: &str, text: &str) -> io::Result<usize> {
        let room = FILE_BYTES_MAX.min(BYTES_MAX - self.bytes);
        let kept = text.floor_char_boundary(room);
        let mut content = text[..kept].to_owned();
        if kept < text.len() {
            content.push_str(&format!("\n[cut here: {} bytes more]\n", text.len() - kept));
        }
        self.bytes += kept;
        let mut header = Header::new_gnu();
        header.set_size(content.len().try_into().unwrap_or(u64::MAX));
        header.set_mode(0o600);
        header.set_mtime(self.seconds);
        self.tar.append_data(&mut header, format!("{}/{name}", self.folder), content.as_bytes())?;
        Ok(kept)
    }

    /// Its bytes.
    pub(super) fn finish(self) -> io::Result<Vec<u8>> {
        let mut gzip = self.tar.into_inner()?;
        gzip.flush()?;
        gzip.finish()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn a_bundle_is_bounded_and_says_where_it_was_cut() {
        let mut archive = Archive::new("bundle".to_owned(), 7);
        let long = "é".repeat(FILE_BYTES_MAX);
        for number in 0..10 {
            archive.add(&number.to_string(), &long).expect("is added");
        }
        let bytes = archive.finish().expect("is written");
        let mut tar = tar::Archive::new(GzDecoder::new(bytes.as_slice()));
        let mut lengths = Vec::new();
        for entry in tar.entries().expect("is a tar") {
            let mut entry = entry.expect("is a file");
            let mut text = String::new();
            entry.read_to_string(&mut text).expect("is text");
            assert_eq!((entry.header().mode().ok(), entry.header().mtime().ok()), (Some(0o600), Some(7)));
            assert!(text.trim_end().ends_with("bytes more]"));
            lengths.push(text.len());
        }
        assert_eq!(lengths.len(), 10);
        assert!(lengths.iter().sum::<usize>() < BYTES_MAX + 10 * 64);
    }
}
