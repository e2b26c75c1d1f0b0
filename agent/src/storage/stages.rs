//! What an agent was at when it was killed: the real storage, which writes down in a file of one byte a stage which of them are under
//! way. The file is in the page cache as soon as a byte is written, so it says so after a SIGKILL, too.

use std::{
    cell::Cell,
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use weir_common::{removed::REMOVED_FILE, segment::SEGMENT_SUFFIX};

use super::{Entry, FileSystem, Lock, Open, Storage, StoredFile};

/// What changes a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// A group is written to a segment and made durable.
    Append,
    /// A segment is made, and the one before it cut.
    Rotate,
    /// It is written down how far all was acknowledged.
    Cursor,
    /// Segments and epochs that were published go, and what they were is written down before.
    Unlink,
}

impl Stage {
    pub(super) const ALL: [Self; 4] = [Self::Append, Self::Rotate, Self::Cursor, Self::Unlink];

    fn place(self) -> u64 {
        self as u64
    }

    /// That of a file, but for segments.
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        match name {
            "cursor" => Some(Self::Cursor),
            _ if name.starts_with(REMOVED_FILE) => Some(Self::Unlink),
            _ => None,
        }
    }
}

thread_local! {
    /// What this thread was at last: a folder is made durable for that.
    static LAST: Cell<Option<Stage>> = const { Cell::new(None) };
}

/// Where it is written down.
#[derive(Clone, Debug)]
struct Notes(Arc<File>);

impl Notes {
    fn during<T>(&self, stage: Option<Stage>, act: impl FnOnce() -> T) -> T {
        LAST.set(stage);
        let Some(stage) = stage else { return act() };
        self.0.write_all_at(&[1], stage.place()).unwrap();
        let done = act();
        self.0.write_all_at(&[0], stage.place()).unwrap();
        done
    }
}

/// What the file says of a process that has ended, or of one that goes on.
pub(super) fn under_way(notes: &File) -> Vec<Stage> {
    let mut bytes = [0; Stage::ALL.len()];
    notes.read_exact_at(&mut bytes, 0).unwrap();
    Stage::ALL.into_iter().filter(|stage| bytes[stage.place() as usize] == 1).collect()
}

/// The file, where nothing is under way.
pub(super) fn notes(path: &Path) -> File {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    file.write_all_at(&[0; Stage::ALL.len()], 0).unwrap();
    file
}

/// See the module.
#[derive(Debug)]
pub(super) struct Staged(Notes);

impl Staged {
    pub(super) fn new(notes: File) -> Self {
        Self(Notes(Arc::new(notes)))
    }
}

impl Storage for Staged {
    fn open(&self, path: &Path, open: Open) -> io::Result<Box<dyn StoredFile>> {
        let is_made = open == Open::New && path.to_str().is_some_and(|path| path.ends_with(SEGMENT_SUFFIX));
        let stage = Stage::of(path).filter(|_| open != Open::Read);
        let stage = if is_made { Some(Stage::Rotate) } else { stage };
        let file = self.0.during(stage, || FileSystem.open(path, open))?;
        let notes = self.0.clone();
        Ok(Box::new(StagedFile { file, notes, stage, is_made, is_begun: AtomicBool::new(false) }))
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        FileSystem.make_folder(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.0.during(LAST.get(), || FileSystem.sync_folder(path))
    }

    fn exists(&self, path: &Path) -> bool {
        FileSystem.exists(path)
    }

    fn entries(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        FileSystem.entries(folder)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        // A folder that is renamed is an epoch that goes.
        let stage = Stage::of(from).or_else(|| from.is_dir().then_some(Stage::Unlink));
        self.0.during(stage, || FileSystem.rename(from, to))
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        FileSystem.link(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.during(Some(Stage::Unlink), || FileSystem.remove_file(path))
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        self.0.during(Some(Stage::Unlink), || FileSystem.remove_folder(path))
    }
}

#[derive(Debug)]
struct StagedFile {
    file: Box<dyn StoredFile>,
    notes: Notes,
    stage: Option<Stage>,
    /// It is a segment that this process makes.
    is_made: bool,
    /// Its header is durable: what follows is appended.
    is_begun: AtomicBool,
}

impl StagedFile {
    fn stage(&self) -> Option<Stage> {
        let is_begun = self.is_made && self.is_begun.load(Ordering::Relaxed);
        if is_begun { Some(Stage::Append) } else { self.stage }
    }
}

impl StoredFile for StagedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.notes.during(self.stage(), || self.file.write_at(bytes, offset))
    }

    fn sync_data(&self) -> io::Result<()> {
        let synced = self.notes.during(self.stage(), || self.file.sync_data());
        self.is_begun.store(true, Ordering::Relaxed);
        synced
    }

    fn sync_all(&self) -> io::Result<()> {
        self.notes.during(self.stage, || self.file.sync_all())
    }

    fn set_length(&self, bytes: u64) -> io::Result<()> {
        self.notes.during(self.stage, || self.file.set_length(bytes))
    }

    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn lock(&self, lock: Lock) -> io::Result<bool> {
        self.file.lock(lock)
    }
}
