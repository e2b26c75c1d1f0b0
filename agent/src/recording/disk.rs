//! What the journal needs of a disk, as a trait, so that tests can count, fail and lose writes.
//!
//! Every method returns only when what it did would survive a power loss, except [`DiskFile::write_at`], which
//! needs a [`DiskFile::sync`] after it. The only file of recording that makes or writes journal files.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use weir_common::segment::SEGMENT_SUFFIX;

/// Zeros written at a time while a segment is made.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Deepest folder below the journal that is looked at when its size is taken: `<journal>/<epoch>/<segment>`.
const EPOCH_DEPTH: usize = 1;

/// A place for files.
pub(super) trait Disk: Send + Sync + std::fmt::Debug {
    /// Makes a folder (mode 0700) and those above it.
    fn make_directory(&self, path: &Path) -> io::Result<()>;
    /// Makes a new file (mode 0600) of this length that starts with `header`, the rest allocated and zeroed.
    fn create(&self, path: &Path, header: &[u8], bytes: u64) -> io::Result<Box<dyn DiskFile>>;
    /// Puts a file (mode 0600) with this content in place, atomically.
    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()>;
    /// Bytes of all segments in this journal, of every epoch.
    fn used(&self, journal: &Path) -> io::Result<u64>;
}

/// A file that is open for writing.
pub(super) trait DiskFile: Send + std::fmt::Debug {
    /// Writes all of `bytes` at this offset.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes durable what was written (fdatasync).
    fn sync(&mut self) -> io::Result<()>;
    /// Cuts the file and makes that durable.
    fn truncate(&mut self, bytes: u64) -> io::Result<()>;
}

/// The real one.
#[derive(Debug)]
pub(super) struct FileSystem;

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

impl Disk for FileSystem {
    fn make_directory(&self, path: &Path) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        sync_parent(path)
    }

    fn create(&self, path: &Path, header: &[u8], bytes: u64) -> io::Result<Box<dyn DiskFile>> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        // Zeros rather than fallocate alone: a write into an unwritten extent changes metadata, which would make
        // every fdatasync of a group commit a journal commit of the file system as well.
        let written = file
            .write_all(header)
            .and_then(|()| zero(&mut file, bytes.saturating_sub(header.len() as u64)))
            .and_then(|()| file.sync_all())
            .and_then(|()| sync_parent(path));
        if let Err(error) = written {
            // What could not be allocated whole must not lie around and fill the disk.
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
        Ok(Box::new(file))
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension("new");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        sync_parent(path)
    }

    fn used(&self, journal: &Path) -> io::Result<u64> {
        segment_bytes(journal, EPOCH_DEPTH)
    }
}

fn zero(file: &mut File, bytes: u64) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let now = left.min(ZEROS.len() as u64);
        file.write_all(&ZEROS[..now as usize])?;
        left -= now;
    }
    Ok(())
}

fn segment_bytes(folder: &Path, depth: usize) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        // Another process may be removing an epoch just now.
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(error),
        };
        if metadata.is_dir() && depth > 0 {
            bytes += match segment_bytes(&entry.path(), depth - 1) {
                Err(error) if gone(&error) => 0,
                other => other?,
            };
        } else if entry.file_name().to_string_lossy().ends_with(SEGMENT_SUFFIX) {
            bytes += metadata.len();
        }
    }
    Ok(bytes)
}

impl DiskFile for File {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn truncate(&mut self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)?;
        self.sync_all()
    }
}
