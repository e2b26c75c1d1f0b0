//! A process epoch's folder: its lock, its verifier keys, the epoch before it; and the journal's mask key.
//!
//! `<journal>/mask.key` is shared by all epochs, so that equal secrets are recognisable across restarts;
//! `<journal>/<epoch>/` holds `lock`, `node.pub`, `checkpoint` and the segments.

use std::{
    io,
    path::{Path, PathBuf},
};

use rand::{RngCore as _, rngs::OsRng};
use uuid::{NoContext, Timestamp, Uuid};
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
        let id = next_id(storage, journal);
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

/// An id that sorts behind those of all epochs in the journal, also where one of them was begun by a clock that was ahead: it
/// is by this order that an epoch names the one before it, and that what is left of them is published.
fn next_id(storage: &dyn Storage, journal: &Path) -> Uuid {
    let entries = storage.entries(journal).unwrap_or_default();
    let times = entries.iter().filter_map(|entry| Uuid::parse_str(&entry.name).ok()?.get_timestamp());
    let id = Uuid::now_v7();
    let (newest, now) =
        (times.map(|time| time.to_unix()).max(), id.get_timestamp().map(|time| time.to_unix()));
    let Some((seconds, nanoseconds)) = newest.filter(|newest| now <= Some(*newest)) else { return id };
    // Ids know milliseconds.
    let (seconds, nanoseconds) = match nanoseconds + 1_000_000 {
        more @ 1_000_000_000.. => (seconds + 1, more - 1_000_000_000),
        less => (seconds, less),
    };
    Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, nanoseconds))
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

#[cfg(test)]
mod tests {
    use uuid::{NoContext, Timestamp, Uuid};

    use super::{Epoch, next_id};
    use crate::storage::FileSystem;

    #[test]
    fn an_epoch_sorts_behind_one_that_a_clock_which_was_ahead_began() {
        let journal = tempfile::tempdir().unwrap();
        let (tomorrow, nanoseconds) = Uuid::now_v7().get_timestamp().unwrap().to_unix();
        let ahead = Uuid::new_v7(Timestamp::from_unix(NoContext, tomorrow + 86_400, nanoseconds));
        std::fs::create_dir(journal.path().join(ahead.to_string())).unwrap();
        let mut before = ahead;
        for _ in 0..3 {
            let epoch = Epoch::create(&FileSystem, journal.path(), "node-1", &[]).unwrap();
            assert!(epoch.id > before, "{} after {before}", epoch.id);
            before = epoch.id;
        }
        let last = Uuid::from_u128(u128::MAX >> 80 << 80 | 0x7000_8000_0000_0000_0000);
        std::fs::create_dir(journal.path().join(last.to_string())).unwrap();
        assert_eq!(next_id(&FileSystem, journal.path()).get_version_num(), 7, "whatever is there");
    }
}
