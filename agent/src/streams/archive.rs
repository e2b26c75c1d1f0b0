//! Files of a tar archive (ustar, pax, GNU), from its bytes as they come: path, length and digest of each.
//!
//! `kubectl cp` is a tar through exec. What is no archive from its first block on is left alone. Odd archives are read
//! as Go's `archive/tar` reads them, which is kubectl's; another tar may see other files in one: the bytes are on record.

use sha2::{Digest as _, Sha256};

const BLOCK_BYTES: usize = 512;

/// Most bytes of a long name, or of pax records.
const EXTENSION_BYTES_MAX: u64 = 64 * 1024;

/// Most bytes of a path that are recorded.
const PATH_BYTES_MAX: usize = 4096;

/// A file or link.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) bytes: u64,
    /// Fewer than `bytes` if the archive ended within it.
    pub(super) passed_bytes: u64,
    /// None for a link, and for what is not whole.
    pub(super) digest: Option<[u8; 32]>,
    pub(super) link: Option<Vec<u8>>,
}

/// What an archive shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Entry(Entry),
    /// It cannot be followed from here on.
    Lost,
}

/// Reads one.
#[derive(Debug, Default)]
pub(super) struct Archive {
    state: State,
    /// Begin of a header block.
    block: Vec<u8>,
    /// What stands before a header about the entry behind it.
    about_next: About,
    /// A header was there: it is an archive.
    begun: bool,
    /// A block of zeros was there: it may be over.
    ending: bool,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Header,
    File {
        path: Vec<u8>,
        bytes: u64,
        passed_bytes: u64,
        hash: Box<Sha256>,
    },
    Extension {
        kind: u8,
        remaining: u64,
        padding: u64,
        content: Vec<u8>,
    },
    Skip {
        remaining: u64,
    },
    /// No archive, or not followed any more.
    Ignored,
}

#[derive(Debug, Default)]
struct About {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    bytes: Option<u64>,
}

impl Archive {
    /// Takes the next bytes.
    pub(super) fn feed(&mut self, mut input: &[u8], found: &mut Vec<Found>) {
        while !input.is_empty() {
            match &mut self.state {
                State::Ignored => return,
                State::Header => {
                    let piece = take(&mut input, (BLOCK_BYTES - self.block.len()) as u64);
                    self.block.extend_from_slice(piece);
                    if self.block.len() == BLOCK_BYTES {
                        let block = std::mem::take(&mut self.block);
                        if self.header(&block, found).is_none() {
                            self.lose(found);
                        }
                    }
                }
                State::File { bytes, passed_bytes, hash, .. } => {
                    let piece = take(&mut input, *bytes - *passed_bytes);
                    *passed_bytes += piece.len() as u64;
                    hash.update(piece);
                    self.end_of_file(found);
                }
                State::Extension { remaining, content, .. } => {
                    let piece = take(&mut input, *remaining);
                    *remaining -= piece.len() as u64;
                    content.extend_from_slice(piece);
                    if self.end_of_extension().is_none() {
                        self.lose(found);
                    }
                }
                State::Skip { remaining } => {
                    let piece = take(&mut input, *remaining);
                    *remaining -= piece.len() as u64;
                    if *remaining == 0 {
                        self.state = State::Header;
                    }
                }
            }
        }
    }

    /// No more bytes follow: a file that is not whole.
    pub(super) fn finish(&mut self) -> Option<Found> {
        match std::mem::replace(&mut self.state, State::Ignored) {
            State::File { path, bytes, passed_bytes, .. } => {
                Some(Found::Entry(Entry { path, bytes, passed_bytes, digest: None, link: None }))
            }
            _ => None,
        }
    }

    fn lose(&mut self, found: &mut Vec<Found>) {
        // What follows the end of an archive is nobody's.
        if self.begun && !self.ending {
            found.push(Found::Lost);
        }
        self.state = State::Ignored;
    }

    /// Reads a header block; none where it is none.
    fn header(&mut self, block: &[u8], found: &mut Vec<Found>) -> Option<()> {
        if block.iter().all(|byte| *byte == 0) {
            self.ending = self.begun;
            return self.begun.then_some(());
        }
        let magic = block.get(257..263)?;
        if !magic.starts_with(b"ustar") || number(block.get(148..156)?) != Some(checksum(block)) {
            return None;
        }
        (self.begun, self.ending) = (true, false);
        let stated_bytes = number(block.get(124..136)?)?;
        let kind = *block.get(156)?;
        match kind {
            b'L' | b'K' | b'x' if stated_bytes <= EXTENSION_BYTES_MAX => {
                let padding = padding(stated_bytes);
                self.state = State::Extension { kind, remaining: stated_bytes, padding, content: Vec::new() };
                return self.end_of_extension();
            }
            // GNU's sparse files have their maps in further blocks.
            b'L' | b'K' | b'x' | b'S' => return None,
            b'g' => {
                self.skip(stated_bytes.checked_add(padding(stated_bytes))?);
                return Some(());
            }
            _ => {}
        }
        let about = std::mem::take(&mut self.about_next);
        let bytes = about.bytes.unwrap_or(stated_bytes);
        let path = cut(about.path.unwrap_or_else(|| path(block, magic == b"ustar\0")));
        match kind {
            b'1' | b'2' => {
                let link = cut(about.link.unwrap_or_else(|| text(block.get(157..257).unwrap_or_default())));
                let entry = Entry { path, bytes: 0, passed_bytes: 0, digest: None, link: Some(link) };
                found.push(Found::Entry(entry));
            }
            // Devices, directories and pipes have no content, whatever the header says.
            b'3'..=b'6' => {}
            _ => {
                self.state = State::File { path, bytes, passed_bytes: 0, hash: Box::default() };
                self.end_of_file(found);
            }
        }
        Some(())
    }

    /// The file's last byte may have come.
    fn end_of_file(&mut self, found: &mut Vec<Found>) {
        if !matches!(&self.state, State::File { bytes, passed_bytes, .. } if bytes == passed_bytes) {
            return;
        }
        if let State::File { path, bytes, passed_bytes, hash } = std::mem::take(&mut self.state) {
            let digest = Some((*hash).finalize().into());
            found.push(Found::Entry(Entry { path, bytes, passed_bytes, digest, link: None }));
            self.skip(padding(bytes));
        }
    }

    /// The extension's last byte may have come; none where it has no meaning.
    fn end_of_extension(&mut self) -> Option<()> {
        if !matches!(&self.state, State::Extension { remaining: 0, .. }) {
            return Some(());
        }
        if let State::Extension { kind, padding, content, .. } = std::mem::take(&mut self.state) {
            match kind {
                b'L' => self.about_next.path = Some(text(&content)),
                b'K' => self.about_next.link = Some(text(&content)),
                _ => self.about_next.pax(&content)?,
            }
            self.skip(padding);
        }
        Some(())
    }

    fn skip(&mut self, remaining: u64) {
        if remaining > 0 {
            self.state = State::Skip { remaining };
        }
    }
}

impl About {
    /// Reads pax records: `LENGTH KEY=VALUE\n`, the length that of the whole record.
    fn pax(&mut self, mut records: &[u8]) -> Option<()> {
        while !records.is_empty() {
            let digits = records.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(records.get(..digits)?).ok()?.parse().ok()?;
            let (record, rest) = records.split_at_checked(length)?;
            records = rest;
            let record = record.get(digits + 1..)?.strip_suffix(b"\n")?;
            let (key, value) = record.split_at(record.iter().position(|byte| *byte == b'=')?);
            let value = value.get(1..)?;
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.bytes = Some(std::str::from_utf8(value).ok()?.parse().ok()?),
                // The content is a map and pieces then.
                key if key.starts_with(b"GNU.sparse.") => return None,
                _ => {}
            }
        }
        Some(())
    }
}

/// The next bytes, at most so many.
fn take<'a>(input: &mut &'a [u8], most: u64) -> &'a [u8] {
    let length = usize::try_from(most).unwrap_or(usize::MAX).min(input.len());
    let (piece, rest) = input.split_at(length);
    *input = rest;
    piece
}

/// Zeros behind content, up to the next block.
fn padding(bytes: u64) -> u64 {
    bytes.wrapping_neg() % BLOCK_BYTES as u64
}

/// Sum of all bytes, those of the sum itself counted as spaces.
fn checksum(block: &[u8]) -> u64 {
    let byte = |(at, byte): (usize, &u8)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) };
    block.iter().enumerate().map(byte).sum()
}

/// Octal digits, or a binary number behind a set bit.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((0x80, binary)) = field.split_first() {
        let (high, low) = binary.split_last_chunk::<8>().unwrap_or((binary, &[0; 8]));
        return high.iter().all(|byte| *byte == 0).then(|| u64::from_be_bytes(*low));
    }
    let digits = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

/// What stands before the first zero.
fn text(field: &[u8]) -> Vec<u8> {
    field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

/// The path in a header: POSIX has a prefix where GNU has something else.
fn path(block: &[u8], posix: bool) -> Vec<u8> {
    let name = text(block.get(..100).unwrap_or_default());
    let prefix = text(block.get(345..500).unwrap_or_default());
    if posix && !prefix.is_empty() { [&prefix[..], b"/", &name].concat() } else { name }
}

fn cut(mut path: Vec<u8>) -> Vec<u8> {
    path.truncate(PATH_BYTES_MAX);
    path
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

    use sha2::{Digest as _, Sha256};

    use super::{Archive, BLOCK_BYTES, Entry, Found};

    fn read(bytes: &[u8], piece_bytes: usize) -> Vec<Found> {
        let (mut archive, mut found) = (Archive::default(), Vec::new());
        bytes.chunks(piece_bytes).for_each(|piece| archive.feed(piece, &mut found));
        found.extend(archive.finish());
        found
    }

    fn file(path: &str, content: &[u8]) -> Found {
        let bytes = content.len() as u64;
        let digest = Some(Sha256::digest(content).into());
        Found::Entry(Entry { path: path.into(), bytes, passed_bytes: bytes, digest, link: None })
    }

    /// As the system's tar writes it.
    fn archive_of(folder: &Path, format: &str, paths: &[&str]) -> Vec<u8> {
        let mut tar = Command::new("tar");
        tar.args(["-c", "-f", "-", "--format", format, "-C"]).arg(folder).args(paths);
        let output = tar.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    }

    #[test]
    fn every_format_of_the_systems_tar_is_read_however_it_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let deep = format!("{}/{}", "d".repeat(90), "n".repeat(60));
        let long = format!("{0}/{0}", "x".repeat(120));
        fs::create_dir_all(folder.path().join("d".repeat(90))).unwrap();
        fs::create_dir_all(folder.path().join("x".repeat(120))).unwrap();
        let large = vec![7_u8; 3 * BLOCK_BYTES];
        for (path, content) in [("empty", &b""[..]), ("odd", b"12345"), (&deep, &large), (&long, b"long")] {
            fs::write(folder.path().join(path), content).unwrap();
        }
        symlink("/etc/shadow", folder.path().join("link")).unwrap();
        let link = || {
            let link = Some(b"/etc/shadow".to_vec());
            Found::Entry(Entry { path: b"link".into(), bytes: 0, passed_bytes: 0, digest: None, link })
        };
        for format in ["ustar", "gnu", "posix"] {
            let mut paths = vec!["empty", "link", "odd", &deep];
            let mut expected = vec![file("empty", b""), link(), file("odd", b"12345"), file(&deep, &large)];
            if format != "ustar" {
                paths.push(&long);
                expected.push(file(&long, b"long"));
            }
            let bytes = archive_of(folder.path(), format, &paths);
            for piece_bytes in [1, 511, 512, 513, bytes.len()] {
                assert_eq!(read(&bytes, piece_bytes), expected, "{format}, pieces of {piece_bytes}");
            }
        }
    }

    #[test]
    fn a_file_that_is_cut_says_how_much_of_it_passed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), [1; 1000]).unwrap();
        let bytes = archive_of(folder.path(), "gnu", &["a"]);
        let cut = Entry { path: b"a".into(), bytes: 1000, passed_bytes: 88, digest: None, link: None };
        assert_eq!(read(&bytes[..600], 64), [Found::Entry(cut)]);
    }

    #[test]
    fn what_is_no_archive_is_left_alone_and_one_that_breaks_is_said_to() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), b"x").unwrap();
        fs::write(folder.path().join("b"), b"x").unwrap();
        let mut bytes = archive_of(folder.path(), "gnu", &["a", "b"]);
        bytes.extend([b'z'; 700]);
        assert_eq!(read(&bytes, 100), [file("a", b"x"), file("b", b"x")], "what follows the end is nobody's");
        bytes[2 * BLOCK_BYTES + 3] ^= 1;
        assert_eq!(read(&bytes, 100), [file("a", b"x"), Found::Lost]);
        for other in [vec![0; 2000], vec![b'a'; 2000], b"short".to_vec()] {
            assert_eq!(read(&other, 100), []);
        }
    }
}
