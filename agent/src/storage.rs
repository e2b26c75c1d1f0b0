//! Files as the journal and its publisher need them, as a trait: the operating system's, or what tests put in its place.
//!
//! Each method is one system call, so that a test can fail any of them, or cut the power between any two (`memory`). What
//! several make together (a file replaced whole, a segment allocated) stands here as functions on top, and is tested with
//! them.
//! The only file of the agent that makes, writes or removes files of a journal.

#[cfg(test)]
mod contents;
#[cfg(test)]
mod kill_tests;
#[cfg(test)]
pub(crate) mod memory;
#[cfg(test)]
mod operation_tests;
#[cfg(test)]
mod outage_tests;
#[cfg(test)]
mod power_tests;
#[cfg(test)]
mod stages;
#[cfg(test)]
mod world;

use std::{
    fmt::Debug,
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

/// Zeros written at a time while a file is allocated.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Open {
    /// For reading; it must be there.
    Read,
    /// For reading and writing; made (mode 0600) if it is not there.
    Write,
    /// The same, and emptied.
    Emptied,
    /// The same; it must not be there yet.
    New,
}

/// Whom a lock keeps out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Everybody else.
    Exclusive,
    /// Who wants it exclusively.
    Shared,
}

/// What a folder holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Names that are not UTF-8 are nobody's here and are left out.
    pub(crate) name: String,
    pub(crate) is_folder: bool,
    pub(crate) bytes: u64,
}

/// A place for files. What was changed in a folder (a file made, renamed, removed) survives a power loss only after
/// [`Storage::sync_folder`] of it.
pub(crate) trait Storage: Send + Sync + Debug {
    fn open(&self, path: &Path, open: Open) -> io::Result<Box<dyn StoredFile>>;
    /// Makes one folder (mode 0700).
    fn make_folder(&self, path: &Path) -> io::Result<()>;
    fn sync_folder(&self, path: &Path) -> io::Result<()>;
    fn exists(&self, path: &Path) -> bool;
    /// What a folder holds, in any order.
    fn entries(&self, folder: &Path) -> io::Result<Vec<Entry>>;
    /// Renames a file or folder; a file that has the name is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file a second name; nothing may have it yet.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a folder with all that it holds.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;
}

/// An open file. What was written survives a power loss only after a sync. Dropped, it gives up its lock.
pub(crate) trait StoredFile: Send + Debug {
    /// Reads at most as much as there is room for; 0 at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes durable what was written, and the length (fdatasync).
    fn sync_data(&self) -> io::Result<()>;
    /// The same, with all that is known about the file (fsync).
    fn sync_all(&self) -> io::Result<()>;
    fn set_length(&self, bytes: u64) -> io::Result<()>;
    fn length(&self) -> io::Result<u64>;
    /// Locks the file (flock); false if somebody is in the way.
    fn lock(&self, lock: Lock) -> io::Result<bool>;
}

/// The operating system's.
#[derive(Debug)]
pub(crate) struct FileSystem;

impl Storage for FileSystem {
    fn open(&self, path: &Path, open: Open) -> io::Result<Box<dyn StoredFile>> {
        let mut options = OpenOptions::new();
        options.read(true).mode(0o600);
        match open {
            Open::Read => &mut options,
            Open::Write => options.write(true).create(true).truncate(false),
            Open::Emptied => options.write(true).create(true).truncate(true),
            Open::New => options.write(true).create_new(true),
        };
        Ok(Box::new(options.open(path)?))
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn entries(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            match entry.metadata() {
                Ok(found) => {
                    entries.push(Entry { name, is_folder: found.is_dir(), bytes: found.len() });
                }
                // Removed just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::hard_link(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }
}

impl StoredFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(self, buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        Self::sync_data(self)
    }

    fn sync_all(&self) -> io::Result<()> {
        Self::sync_all(self)
    }

    fn set_length(&self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn lock(&self, lock: Lock) -> io::Result<bool> {
        let locked = match lock {
            Lock::Exclusive => self.try_lock(),
            Lock::Shared => self.try_lock_shared(),
        };
        match locked {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// The folder that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a folder and those above it, durably; also those that are there: who made them may not have lived to do so.
pub(crate) fn make_folders(storage: &dyn Storage, path: &Path) -> io::Result<()> {
    make_missing(storage, path)?;
    for above in path.ancestors().skip(1) {
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        match storage.sync_folder(above) {
            // One that this process may not read is not one that an agent has made.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            synced => synced?,
        }
    }
    Ok(())
}

fn make_missing(storage: &dyn Storage, path: &Path) -> io::Result<()> {
    let has_parent = path.parent().is_some_and(|parent| !parent.as_os_str().is_empty());
    let made = match storage.make_folder(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && has_parent => {
            make_missing(storage, parent(path))?;
            storage.make_folder(path)
        }
        made => made,
    };
    made.or_else(|error| if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })
}

/// Makes a new file of this length, allocated and zeroed, durably.
pub(crate) fn create_allocated(
    storage: &dyn Storage,
    path: &Path,
    bytes: u64,
) -> io::Result<Box<dyn StoredFile>> {
    let file = storage.open(path, Open::New)?;
    // Zeros rather than fallocate alone: a write into an unwritten extent changes metadata, which would make
    // every fdatasync of a group commit a journal commit of the file system as well.
    let written = zero(file.as_ref(), bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| storage.sync_folder(parent(path)));
    if let Err(error) = written {
        // What could not be allocated whole must not lie around and fill the disk.
        remove(storage, path);
        return Err(error);
    }
    Ok(file)
}

/// Removes a file of which nothing is needed any more, as well as may be: the storage may be what is wrong.
pub(crate) fn remove(storage: &dyn Storage, path: &Path) {
    let _ = storage.remove_file(path).and_then(|()| storage.sync_folder(parent(path)));
}

fn zero(file: &dyn StoredFile, bytes: u64) -> io::Result<()> {
    let mut offset = 0;
    while offset < bytes {
        let now = (bytes - offset).min(ZEROS.len() as u64);
        file.write_at(&ZEROS[..now as usize], offset)?;
        offset += now;
    }
    Ok(())
}

/// Puts a file with this content in place, atomically and durably.
pub(crate) fn replace(storage: &dyn Storage, path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let file = storage.open(&temporary, Open::Emptied)?;
    file.write_at(content, 0)?;
    file.sync_all()?;
    drop(file);
    storage.rename(&temporary, path)?;
    storage.sync_folder(parent(path))
}

/// Puts a file with this content in place unless there is one, durably; `temporary` must be a name that nobody else uses.
pub(crate) fn add(storage: &dyn Storage, path: &Path, temporary: &Path, content: &[u8]) -> io::Result<()> {
    let file = storage.open(temporary, Open::New)?;
    let written = file.write_at(content, 0).and_then(|()| file.sync_all());
    let linked = written.and_then(|()| storage.link(temporary, path));
    storage.remove_file(temporary)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => storage.sync_folder(parent(path)),
    }
}

/// Reads at most `bytes_max` of a file; what is read is wiped from memory with the value.
pub(crate) fn read_bounded(
    storage: &dyn Storage,
    path: &Path,
    bytes_max: usize,
) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = storage.open(path, Open::Read)?;
    let mut content = Zeroizing::new(vec![0; bytes_max]);
    let length = read_full(file.as_ref(), &mut content, 0)?;
    content.truncate(length);
    Ok(content)
}

/// Fills `buffer` as far as the file goes; returns how far.
pub(crate) fn read_full(file: &dyn StoredFile, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], offset + length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// Files in a folder whose names end with `suffix`, with their lengths.
pub(crate) fn files_named(
    storage: &dyn Storage,
    folder: &Path,
    suffix: &str,
) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut entries = storage.entries(folder)?;
    entries.retain(|entry| !entry.is_folder && entry.name.ends_with(suffix));
    Ok(entries.into_iter().map(|entry| (folder.join(entry.name), entry.bytes)).collect())
}
