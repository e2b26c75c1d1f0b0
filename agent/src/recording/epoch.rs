//! A process epoch's folder: its lock, its verifier keys, the epoch before it; and the journal's mask key.
//!
//! `<journal>/mask.key` is shared by all epochs, so that equal secrets are recognisable across restarts;
//! `<journal>/<epoch>/` holds `lock`, `node.pub`, `checkpoint` and the segments.

use std::{
    io,
    path::{Path, PathBuf},
};

use rand::{RngCore as _, rngs::OsRng};
use uuid::Uuid;
use weir_common::{
    checkpoint::{Checkpoint, NOTE_BYTES_MAX, NoteSigner},
    event::Predecessor,
    segment::NODE_BYTES_MAX,
};
use zeroize::Zeroizing;

use super::error::RecordingError;
use crate::{
    signing,
    storage::{self, Lock, Open, Storage, StoredFile, read_bounded},
};

/// File in an epoch's folder that holds the last signed checkpoint.
pub(crate) const CHECKPOINT_FILE: &str = "checkpoint";

const LOCK_FILE: &str = "lock";
const VERIFIER_FILE: &str = "node.pub";
const MASK_KEY_FILE: &str = "mask.key";

/// Bytes of the mask key.
const MASK_KEY_BYTES: usize = 32;

/// Most bytes of a key file that are read.
const KEY_FILE_BYTES_MAX: usize = 16 * 1024;

/// The folder of one process epoch, locked as long as this lives.
#[derive(Debug)]
pub(super) struct Epoch {
    pub(super) id: Uuid,
    pub(super) folder: PathBuf,
    pub(super) node: String,
    /// Name of the log in checkpoints.
    pub(super) origin: String,
    /// At least one; all of them sign.
    pub(super) signers: Vec<NoteSigner>,
    pub(super) predecessor: Option<Predecessor>,
    _lock: Box<dyn StoredFile>,
}

impl Epoch {
    /// Makes a new epoch in `journal` and publishes its verifier keys there.
    pub(super) fn create(
        storage: &dyn Storage,
        journal: &Path,
        node: &str,
        signing_key_files: &[PathBuf],
    ) -> Result<Self, RecordingError> {
        if node.len() > NODE_BYTES_MAX {
            return Err(RecordingError::Node { node: node.to_owned() });
        }
        let name = signing::key_name(node);
        // Before anything is made: a key that cannot be read leaves nothing behind.
        let signers = signing::signers(&name, signing_key_files)?;
        storage::make_folders(storage, journal).map_err(|error| RecordingError::storage(journal, error))?;
        let predecessor = predecessor(storage, journal);
        let id = Uuid::now_v7();
        let folder = journal.join(id.to_string());
        let made = storage.make_folder(&folder).and_then(|()| storage.sync_folder(journal));
        made.map_err(|error| RecordingError::storage(&folder, error))?;
        let lock = lock(storage, &folder)?;
        let published = folder.join(VERIFIER_FILE);
        let verifiers: String = signers.iter().map(|signer| format!("{}\n", signer.verifier())).collect();
        storage::replace(storage, &published, verifiers.as_bytes())
            .map_err(|error| RecordingError::storage(&published, error))?;
        let origin = format!("{name}/{id}");
        Ok(Self { id, folder, node: node.to_owned(), origin, signers, predecessor, _lock: lock })
    }
}

fn lock(storage: &dyn Storage, folder: &Path) -> Result<Box<dyn StoredFile>, RecordingError> {
    let path = folder.join(LOCK_FILE);
    let file = storage.open(&path, Open::Write).map_err(|error| RecordingError::storage(&path, error))?;
    match file.lock(Lock::Exclusive) {
        Ok(true) => Ok(file),
        Ok(false) => Err(RecordingError::Locked { path }),
        Err(error) => Err(RecordingError::storage(&path, error)),
    }
}

/// Whether no process has this epoch open any more. Asks with a shared lock, so that two who ask at once do not take
/// each other for its owner. To be asked only of a folder that holds something: its owner locks it first.
pub(super) fn has_ended(storage: &dyn Storage, folder: &Path) -> bool {
    match storage.open(&folder.join(LOCK_FILE), Open::Read) {
        Ok(file) => file.lock(Lock::Shared).unwrap_or(false),
        // A copy, perhaps: nobody can have it open.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// The newest epoch that has ended and left a checkpoint. A damaged one is passed over: `weir verify` names it.
fn predecessor(storage: &dyn Storage, journal: &Path) -> Option<Predecessor> {
    let names = storage.entries(journal).ok()?.into_iter().map(|entry| entry.name);
    let mut epochs: Vec<String> = names.filter(|name| Uuid::parse_str(name).is_ok()).collect();
    // UUIDs of version 7 sort by time.
    epochs.sort_unstable_by(|a, b| b.cmp(a));
    epochs.into_iter().find_map(|epoch| {
        let folder = journal.join(&epoch);
        let note = read_bounded(storage, &folder.join(CHECKPOINT_FILE), NOTE_BYTES_MAX).ok()?;
        let checkpoint = Checkpoint::parse_unverified(std::str::from_utf8(&note).ok()?).ok()?;
        has_ended(storage, &folder).then_some(())?;
        Some(Predecessor { epoch, size: checkpoint.size, root: hex::encode(checkpoint.root) })
    })
}

/// The key of masks' digests, made on first use.
pub(super) fn mask_key(storage: &dyn Storage, journal: &Path) -> Result<Zeroizing<Vec<u8>>, RecordingError> {
    let path = journal.join(MASK_KEY_FILE);
    let failed = |error| RecordingError::storage(&path, error);
    match read_bounded(storage, &path, KEY_FILE_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_mask_key(storage, journal, &path).map_err(failed)?;
        }
        Err(error) => return Err(failed(error)),
        Ok(_) => {}
    }
    let key = read_bounded(storage, &path, KEY_FILE_BYTES_MAX).map_err(failed)?;
    if key.len() != MASK_KEY_BYTES {
        let reason =
            format!("it has {} bytes instead of {MASK_KEY_BYTES}; remove it to start a new one", key.len());
        return Err(RecordingError::Key { path, reason });
    }
    Ok(key)
}

/// Puts a new key in place, unless another process was faster: its key stands then.
fn make_mask_key(storage: &dyn Storage, journal: &Path, path: &Path) -> io::Result<()> {
    let mut key = Zeroizing::new([0; MASK_KEY_BYTES]);
    OsRng.fill_bytes(key.as_mut_slice());
    let temporary = journal.join(format!("{MASK_KEY_FILE}.{}", Uuid::now_v7()));
    storage::add(storage, path, &temporary, key.as_slice())
}
