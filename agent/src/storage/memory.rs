//! Files in memory that lose what was not synced when the power goes, and fail on demand. For tests.
//!
//! The model is harsher than most file systems. At a power cut each sector (512 or 4096 bytes, aligned) of each write
//! since the last sync of its file is there or not, by itself; so is each change of length, and each change of a folder
//! since that folder's last sync, either in their order or one by one. Only a rename is atomic. A sync that fails has lost
//! what it was to make durable for good, though readers still see it until the power goes (as Linux does it); a write
//! that fails has written half.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io,
    path::{Component, Path},
    sync::{Arc, Mutex, MutexGuard},
};

use nix::libc;
use rand::{Rng as _, rngs::StdRng};

use super::{Entry, Lock, Open, Storage, StoredFile};

/// What is asked of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Opening for reading, and listing folders.
    OpenToRead,
    OpenToWrite,
    Read,
    Write,
    Sync,
    SetLength,
    MakeFolder,
    SyncFolder,
    Rename,
    Remove,
}

/// When something goes wrong.
#[derive(Clone, Debug, Default)]
pub(crate) enum Fault {
    #[default]
    Never,
    /// In the operation with this number the power goes: nothing works any more.
    Power(u64),
    /// The operation with this number, counted among these calls, fails with this error of the system; those after it too.
    Fails { at: u64, calls: &'static [Call], errno: i32, for_ever: bool },
}

type Id = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    File(Id),
    Folder(Id),
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

#[derive(Clone, Debug, Default)]
struct File {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// What is between them, in order.
    pending: Vec<Change>,
    exclusive: bool,
    shared: usize,
}

#[derive(Clone, Debug)]
enum FolderChange {
    Add(String, Node),
    Take(String),
    Rename(String, String, Node),
}

#[derive(Clone, Debug, Default)]
struct Folder {
    now: BTreeMap<String, Node>,
    durable: BTreeMap<String, Node>,
    pending: Vec<FolderChange>,
}

#[derive(Debug, Default)]
struct State {
    files: Vec<File>,
    /// The first one is the root.
    folders: Vec<Folder>,
    fault: Fault,
    operations: u64,
    is_off: bool,
    /// A fault was met.
    is_met: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Memory(Arc<Mutex<State>>);

fn not_found() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

fn overwrite(bytes: &mut Vec<u8>, offset: u64, content: &[u8]) {
    let (from, to) = (offset as usize, offset as usize + content.len());
    bytes.resize(bytes.len().max(to), 0);
    bytes[from..to].copy_from_slice(content);
}

impl File {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        overwrite(&mut self.now, offset, bytes);
        self.pending.push(Change::Write(offset, bytes.to_vec()));
    }

    /// Only what is pending: what an earlier sync has lost stays lost.
    fn sync(&mut self) {
        for change in self.pending.drain(..) {
            match change {
                Change::Length(bytes) => self.durable.resize(bytes as usize, 0),
                Change::Write(offset, content) => overwrite(&mut self.durable, offset, &content),
            }
        }
    }

    /// What is there after the power went: what was durable, and of the rest what `random` says.
    fn survive(&mut self, random: &mut StdRng) {
        let sector = if random.gen_bool(0.5) { 512 } else { 4096 };
        let share = [0.0, 0.3, 0.9, 1.0][random.gen_range(0..4)];
        for change in std::mem::take(&mut self.pending) {
            match change {
                Change::Length(bytes) if random.gen_bool(share) => self.durable.resize(bytes as usize, 0),
                Change::Length(_) => {}
                Change::Write(offset, content) => {
                    let mut at = 0;
                    while at < content.len() {
                        let here = offset as usize + at;
                        let length = (sector - here % sector).min(content.len() - at);
                        if random.gen_bool(share) {
                            overwrite(&mut self.durable, here as u64, &content[at..at + length]);
                        }
                        at += length;
                    }
                }
            }
        }
    }
}

impl Folder {
    fn change(&mut self, change: FolderChange) {
        apply(&mut self.now, &change);
        self.pending.push(change);
    }

    fn survive(&mut self, random: &mut StdRng) {
        let pending = std::mem::take(&mut self.pending);
        let in_order = random.gen_bool(0.5);
        let first = random.gen_range(0..=pending.len());
        for (index, change) in pending.iter().enumerate() {
            if if in_order { index < first } else { random.gen_bool(0.5) } {
                apply(&mut self.durable, change);
            }
        }
    }
}

fn apply(entries: &mut BTreeMap<String, Node>, change: &FolderChange) {
    match change {
        FolderChange::Add(name, node) => drop(entries.insert(name.clone(), *node)),
        FolderChange::Take(name) => drop(entries.remove(name)),
        FolderChange::Rename(from, to, node) => {
            entries.remove(from);
            entries.insert(to.clone(), *node);
        }
    }
}

impl State {
    /// Counts a call. Fails if it is the one that fails, or the power is off.
    fn enter(&mut self, call: Call) -> io::Result<()> {
        let failed = |errno| Err(io::Error::from_raw_os_error(errno));
        if self.is_off {
            return failed(libc::EIO);
        }
        let counts = !matches!(&self.fault, Fault::Fails { calls, .. } if !calls.contains(&call));
        self.operations += u64::from(counts);
        match self.fault {
            Fault::Power(at) if self.operations >= at => {
                (self.is_off, self.is_met) = (true, true);
                failed(libc::EIO)
            }
            Fault::Fails { at, errno, for_ever, .. } if counts => {
                let fails = self.operations == at || (for_ever && self.operations > at);
                self.is_met |= fails;
                if fails { failed(errno) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }

    fn find(&self, path: &Path) -> io::Result<Node> {
        let mut node = Node::Folder(0);
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            let Node::Folder(id) = node else { return Err(io::Error::from_raw_os_error(libc::ENOTDIR)) };
            node = *self.folders[id].now.get(text(name)).ok_or_else(not_found)?;
        }
        Ok(node)
    }

    fn folder(&mut self, path: &Path) -> io::Result<&mut Folder> {
        match self.find(path)? {
            Node::Folder(id) => Ok(&mut self.folders[id]),
            Node::File(_) => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        }
    }

    fn parent(&mut self, path: &Path) -> io::Result<(&mut Folder, String)> {
        let name = text(path.file_name().expect("a name")).to_owned();
        Ok((self.folder(path.parent().expect("a parent"))?, name))
    }

    fn open(&mut self, path: &Path, open: Open) -> io::Result<Id> {
        let id = match self.find(path) {
            Ok(Node::Folder(_)) => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
            Ok(Node::File(_)) if open == Open::New => {
                return Err(io::Error::from_raw_os_error(libc::EEXIST));
            }
            Ok(Node::File(id)) => id,
            Err(error) if open == Open::Read || error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) => {
                let id = self.files.len();
                let (folder, name) = self.parent(path)?;
                folder.change(FolderChange::Add(name, Node::File(id)));
                self.files.push(File::default());
                id
            }
        };
        if open == Open::Emptied && !self.files[id].now.is_empty() {
            self.files[id].now.clear();
            self.files[id].pending.push(Change::Length(0));
        }
        Ok(id)
    }
}

fn text(name: &OsStr) -> &str {
    name.to_str().expect("names are text")
}

impl Memory {
    pub(crate) fn new() -> Self {
        let state = State { folders: vec![Folder::default()], ..State::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nothing panics with it")
    }

    /// From now on this goes wrong; operations are counted anew.
    pub(crate) fn fault(&self, fault: Fault) {
        let mut state = self.state();
        (state.fault, state.operations, state.is_met) = (fault, 0, false);
    }

    /// Whether the fault was met.
    pub(crate) fn is_met(&self) -> bool {
        self.state().is_met
    }

    /// What a computer finds that is switched on after the power went. Whoever had this one finds nothing any more.
    pub(crate) fn after_power_loss(&self, random: &mut StdRng) -> Self {
        let after = self.after_kill();
        let mut state = after.state();
        for file in &mut state.files {
            file.survive(random);
            file.now.clone_from(&file.durable);
        }
        for folder in &mut state.folders {
            folder.survive(random);
            folder.now.clone_from(&folder.durable);
        }
        drop(state);
        after
    }

    /// What the next process finds after this one was killed: everything, but no locks.
    pub(crate) fn after_kill(&self) -> Self {
        let mut state = self.state();
        state.is_off = true;
        let unlocked = |file: &File| File { exclusive: false, shared: 0, ..file.clone() };
        let files = state.files.iter().map(unlocked).collect();
        let after = State { files, folders: state.folders.clone(), ..State::default() };
        Self(Arc::new(Mutex::new(after)))
    }
}

impl Storage for Memory {
    fn open(&self, path: &Path, open: Open) -> io::Result<Box<dyn StoredFile>> {
        let call = if open == Open::Read { Call::OpenToRead } else { Call::OpenToWrite };
        let mut state = self.state();
        state.enter(call)?;
        let id = state.open(path, open)?;
        Ok(Box::new(MemoryFile { memory: self.clone(), id, held: Mutex::new(None) }))
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.enter(Call::MakeFolder)?;
        let id = state.folders.len();
        let is_root = path.file_name().is_none();
        if is_root || state.find(path).is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        let (folder, name) = state.parent(path)?;
        folder.change(FolderChange::Add(name, Node::Folder(id)));
        state.folders.push(Folder::default());
        Ok(())
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.enter(Call::SyncFolder)?;
        let folder = state.folder(path)?;
        folder.durable.clone_from(&folder.now);
        folder.pending.clear();
        Ok(())
    }

    fn exists(&self, path: &Path) -> bool {
        self.state().find(path).is_ok()
    }

    fn entries(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let mut state = self.state();
        state.enter(Call::OpenToRead)?;
        let entries = state.folder(folder)?.now.clone();
        let entry = |(name, node)| match node {
            Node::File(id) => Entry { name, is_folder: false, bytes: state.files[id].now.len() as u64 },
            Node::Folder(_) => Entry { name, is_folder: true, bytes: 4096 },
        };
        Ok(entries.into_iter().map(entry).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        assert_eq!(from.parent(), to.parent(), "nothing is moved between folders");
        let mut state = self.state();
        state.enter(Call::Rename)?;
        let node = state.find(from)?;
        let new = text(to.file_name().expect("a name")).to_owned();
        let (folder, old) = state.parent(from)?;
        folder.change(FolderChange::Rename(old, new, node));
        Ok(())
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.enter(Call::OpenToWrite)?;
        if state.find(to).is_ok() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        let node = state.find(from)?;
        let (folder, name) = state.parent(to)?;
        folder.change(FolderChange::Add(name, node));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.enter(Call::Remove)?;
        let Node::File(_) = state.find(path)? else {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        };
        let (folder, name) = state.parent(path)?;
        folder.change(FolderChange::Take(name));
        Ok(())
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        for entry in self.entries(path)? {
            let below = path.join(entry.name);
            if entry.is_folder { self.remove_folder(&below)? } else { self.remove_file(&below)? }
        }
        let mut state = self.state();
        state.enter(Call::Remove)?;
        let (folder, name) = state.parent(path)?;
        folder.change(FolderChange::Take(name));
        Ok(())
    }
}

#[derive(Debug)]
struct MemoryFile {
    memory: Memory,
    id: Id,
    held: Mutex<Option<Lock>>,
}

impl MemoryFile {
    fn sync(&self) -> io::Result<()> {
        let mut state = self.memory.state();
        let entered = state.enter(Call::Sync);
        match entered {
            Ok(()) => state.files[self.id].sync(),
            Err(_) if state.is_off => {}
            // It may have done its work all the same.
            Err(_) if state.operations.is_multiple_of(2) => state.files[self.id].sync(),
            // The next one does not try again.
            Err(_) => state.files[self.id].pending.clear(),
        }
        entered
    }
}

impl StoredFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.memory.state();
        state.enter(Call::Read)?;
        let rest = state.files[self.id].now.get(offset as usize..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.memory.state();
        if state.is_off {
            return state.enter(Call::Write);
        }
        let entered = state.enter(Call::Write);
        // What the power cut off in the middle may be there in any part, what failed is there by half.
        let written = if entered.is_ok() || state.is_off { bytes } else { &bytes[..bytes.len() / 2] };
        state.files[self.id].write(offset, written);
        entered
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync()
    }

    fn set_length(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.memory.state();
        state.enter(Call::SetLength)?;
        let file = &mut state.files[self.id];
        file.now.resize(bytes as usize, 0);
        file.pending.push(Change::Length(bytes));
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        let mut state = self.memory.state();
        state.enter(Call::Read)?;
        Ok(state.files[self.id].now.len() as u64)
    }

    fn lock(&self, lock: Lock) -> io::Result<bool> {
        let mut state = self.memory.state();
        let file = &mut state.files[self.id];
        let free = !file.exclusive && (lock == Lock::Shared || file.shared == 0);
        if free {
            match lock {
                Lock::Exclusive => file.exclusive = true,
                Lock::Shared => file.shared += 1,
            }
            *self.held.lock().expect("nothing panics with it") = Some(lock);
        }
        Ok(free)
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let mut state = self.memory.state();
        let file = &mut state.files[self.id];
        match self.held.get_mut().expect("nothing panics with it") {
            Some(Lock::Exclusive) => file.exclusive = false,
            Some(Lock::Shared) => file.shared -= 1,
            None => {}
        }
    }
}
