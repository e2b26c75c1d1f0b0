//! Removes what was published: segments, and at last whole epochs. The only file of the agent that unlinks a segment.
//!
//! Each segment is read once more before it goes: its events join the Merkle tree that the file `removed` keeps, so that
//! who verifies goes on from there. That file is durable before the segment is unlinked. What cannot be read whole is
//! kept, with everything behind it.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use uuid::Uuid;
use weir_common::{
    event::{Event, Kind},
    frame::{self, FRAME_BYTES_MAX, FrameType},
    removed::{REMOVED_BYTES_MAX, REMOVED_FILE, Removed},
    segment::{SEGMENT_HEADER_BYTES, SegmentHeader},
};

use super::feed::{self, Feed, Next, Position};
use crate::storage::{self, Open, Storage, read_bounded};

/// Ending of the name of an epoch's folder that is being removed: readers take it for none.
const REMOVING_SUFFIX: &str = ".removing";

/// Extension of the empty file beside a segment that is kept.
const KEPT_EXTENSION: &str = "kept";

/// What may be removed of one epoch.
#[derive(Debug)]
pub(super) struct Retention {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    removed: Removed,
    /// Something in this segment cannot be read, or could not: it and those behind it are kept.
    kept_from: u64,
}

impl Retention {
    /// Reads what was removed before; ends what a crash interrupted.
    ///
    /// # Errors
    /// The folder cannot be read, or its file `removed` is damaged: nothing is removed then.
    pub(super) fn open(storage: Arc<dyn Storage>, folder: PathBuf, epoch: Uuid) -> io::Result<Self> {
        // One more than may be there, so that what is longer is not taken for whole.
        let removed = match read_bounded(storage.as_ref(), &folder.join(REMOVED_FILE), REMOVED_BYTES_MAX + 1)
        {
            Ok(bytes) => Removed::decode(&bytes)
                .ok()
                .filter(|removed| removed.epoch == epoch)
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Removed { epoch, first_segment: 0, tree: Default::default() }
            }
            Err(error) => return Err(error),
        };
        let retention = Self { storage, folder, removed, kept_from: u64::MAX };
        retention.unlink()?;
        Ok(retention)
    }

    /// The first place that may still be there.
    pub(super) fn beginning(&self) -> Position {
        Position::beginning(self.removed.first_segment, self.removed.tree.size())
    }

    /// Removes the segments before `segment`; returns how many went.
    ///
    /// # Errors
    /// The disk.
    pub(super) fn remove_before(&mut self, segment: u64) -> io::Result<u64> {
        let mut count = 0;
        while self.removed.first_segment < segment.min(self.kept_from) {
            let is_kept = self.storage.exists(&self.kept(self.removed.first_segment));
            let Some(next) = (if is_kept { None } else { self.read_first()? }) else {
                self.kept_from = self.removed.first_segment;
                tracing::warn!(
                    event = "segment-unreadable",
                    folder = %self.folder.display(),
                    segment = self.removed.first_segment,
                    "a published segment cannot be read whole; it and those behind it are kept"
                );
                break;
            };
            // Not left yet; or nothing is there any more: a file that was being made may be gone after a power loss.
            if next.first_segment > segment || next.first_segment == self.removed.first_segment {
                break;
            }
            let path = self.folder.join(REMOVED_FILE);
            storage::replace(self.storage.as_ref(), &path, &next.encode())?;
            self.removed = next;
            count += self.unlink()?;
        }
        Ok(count)
    }

    /// Keeps this segment and those behind it, also when it can be read again: something in it was not published.
    ///
    /// # Errors
    /// The disk: it is kept as long as this lives.
    pub(super) fn keep(&mut self, segment: u64) -> io::Result<()> {
        self.kept_from = self.kept_from.min(segment);
        self.storage.open(&self.kept(segment), Open::Write)?.sync_all()?;
        self.storage.sync_folder(&self.folder)
    }

    /// The file that says that a segment is kept.
    fn kept(&self, segment: u64) -> PathBuf {
        self.folder.join(SegmentHeader::file_name(segment)).with_extension(KEPT_EXTENSION)
    }

    /// Whether no segment is left.
    pub(super) fn is_empty(&self) -> io::Result<bool> {
        Ok(feed::segments(self.storage.as_ref(), &self.folder)?.is_empty())
    }

    /// What is to be kept of the first segment once it is gone; none if something in it cannot be read.
    fn read_first(&self) -> io::Result<Option<Removed>> {
        let Removed { epoch, first_segment, mut tree } = self.removed.clone();
        let beginning = Position::beginning(first_segment, tree.size());
        let mut feed = Feed::new(Arc::clone(&self.storage), self.folder.clone(), beginning).impatient();
        // To be read to its end, the next one must be there, or the epoch have ended.
        let first_segment = loop {
            let next = feed.next(None, &mut |frame, end| {
                let is_first = end.segment == first_segment;
                if is_first && frame.frame_type == FrameType::Event {
                    tree.push(frame.leaf_hash);
                }
                is_first
            })?;
            match next {
                Next::Taken => {}
                Next::Damage(damage) if damage.segment == first_segment => return Ok(None),
                // That is the next one's.
                Next::Damage(damage) => break damage.segment,
                Next::NotTaken | Next::Waiting | Next::End => break feed.position().segment,
            }
        };
        Ok(Some(Removed { epoch, first_segment, tree }))
    }

    fn unlink(&self) -> io::Result<u64> {
        let mut count = 0;
        let segments = feed::segments(self.storage.as_ref(), &self.folder)?;
        for (_, (path, _)) in segments.range(..self.removed.first_segment) {
            self.storage.remove_file(path)?;
            count += 1;
        }
        if count > 0 {
            self.storage.sync_folder(&self.folder)?;
        }
        Ok(count)
    }
}

/// Removes the folder of an epoch that holds no segment any more.
///
/// # Errors
/// The disk.
pub(super) fn remove_epoch(storage: &dyn Storage, folder: &Path) -> io::Result<()> {
    let Some(journal) = folder.parent() else { return Ok(()) };
    let mut name = folder.as_os_str().to_owned();
    name.push(REMOVING_SUFFIX);
    // In one step, so that nobody finds half an epoch.
    storage.rename(folder, Path::new(&name))?;
    storage.sync_folder(journal)?;
    storage.remove_folder(Path::new(&name))
}

/// Removes what is left of epochs whose removal a crash interrupted.
pub(super) fn sweep(storage: &dyn Storage, journal: &Path) -> io::Result<()> {
    for entry in storage.entries(journal)? {
        let epoch = entry.name.strip_suffix(REMOVING_SUFFIX);
        if epoch.is_some_and(|epoch| Uuid::try_parse(epoch).is_ok()) {
            storage.remove_folder(&journal.join(&entry.name))?;
        }
    }
    Ok(())
}

/// The epochs in a journal, the oldest first.
pub(super) fn epochs(storage: &dyn Storage, journal: &Path) -> io::Result<Vec<(Uuid, PathBuf)>> {
    let mut found = Vec::new();
    for entry in storage.entries(journal)? {
        // As agents spell it, and nothing else.
        let epoch = Uuid::try_parse(&entry.name).ok().filter(|epoch| epoch.to_string() == entry.name);
        found.extend(epoch.map(|epoch| (epoch, journal.join(&entry.name))));
    }
    // UUIDs of version 7 sort by time.
    found.sort_unstable();
    Ok(found)
}

/// The epochs that others name as their predecessors: what is left of those is what that can be checked against.
pub(super) fn predecessors(storage: &dyn Storage, journal: &Path) -> io::Result<BTreeSet<String>> {
    let mut named = BTreeSet::new();
    for (_, folder) in epochs(storage, journal)? {
        let first = feed::segments(storage, &folder)?.remove(&0);
        named.extend(first.and_then(|(path, _)| predecessor(storage, &path)));
    }
    Ok(named)
}

/// The epoch that the first event of a log names.
fn predecessor(storage: &dyn Storage, first_segment: &Path) -> Option<String> {
    let bytes = read_bounded(storage, first_segment, SEGMENT_HEADER_BYTES + FRAME_BYTES_MAX).ok()?;
    let (frame, _) = frame::decode(bytes.get(SEGMENT_HEADER_BYTES..)?).ok()?;
    match serde_json::from_slice::<Event>(frame.value).ok()?.kind {
        Kind::AgentStarted { predecessor, .. } => predecessor.map(|predecessor| predecessor.epoch),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rand::{SeedableRng as _, rngs::StdRng};
    use weir_common::removed::{REMOVED_FILE, Removed};

    use super::{Retention, epochs, remove_epoch, sweep};
    use crate::{
        publishing::fixture::Log,
        storage::{FileSystem, Storage as _, make_folders, memory::Memory, replace},
    };

    fn removed(log: &Log) -> Removed {
        Removed::decode(&std::fs::read(log.folder().join(REMOVED_FILE)).unwrap()).unwrap()
    }

    #[test]
    fn what_goes_is_remembered_with_its_tree() {
        let mut log = Log::new();
        log.events(5);
        log.checkpoint();
        log.rotate();
        log.events(2);
        let tree = log.tree.clone();
        log.rotate();
        log.events(1);
        let mut retention =
            Retention::open(Arc::new(FileSystem), log.folder().to_owned(), log.epoch).unwrap();
        assert_eq!(retention.remove_before(0).unwrap(), 0);
        assert_eq!(retention.remove_before(2).unwrap(), 2);
        assert_eq!(removed(&log), Removed { epoch: log.epoch, first_segment: 2, tree: tree.clone() });
        assert!(!log.segment(1).exists() && log.segment(2).exists());
        // Restarted, it goes on from there; a segment that a crash left is removed then.
        std::fs::write(log.segment(1), "left").unwrap();
        let mut retention =
            Retention::open(Arc::new(FileSystem), log.folder().to_owned(), log.epoch).unwrap();
        assert!(!log.segment(1).exists());
        assert_eq!(retention.remove_before(3).unwrap(), 1, "the epoch has ended");
        assert!(retention.is_empty().unwrap());
        assert_eq!(removed(&log).tree, log.tree);
    }

    #[test]
    fn what_went_does_not_come_back_with_the_power_and_is_remembered_then() {
        let mut log = Log::new();
        (0..3).for_each(|_| {
            log.events(2);
            log.rotate();
        });
        for seed in 0..20 {
            let memory = Memory::new();
            make_folders(&memory, log.folder()).unwrap();
            for index in 0..=3 {
                replace(&memory, &log.segment(index), &std::fs::read(log.segment(index)).unwrap()).unwrap();
            }
            let mut retention =
                Retention::open(Arc::new(memory.clone()), log.folder().to_owned(), log.epoch).unwrap();
            assert_eq!(retention.remove_before(2).unwrap(), 2);
            let after = memory.after_power_loss(&mut StdRng::seed_from_u64(seed));
            let is_there = |index| after.exists(&log.segment(index));
            assert_eq!([0, 1, 2, 3].map(is_there), [false, false, true, true], "seed {seed}");
            assert!(after.exists(&log.folder().join(REMOVED_FILE)), "seed {seed}");
        }
    }

    #[test]
    fn damage_is_kept_with_what_is_behind_it() {
        let mut log = Log::new();
        (0..3).for_each(|_| {
            log.events(4);
            log.rotate();
        });
        log.damage(5);
        let mut retention =
            Retention::open(Arc::new(FileSystem), log.folder().to_owned(), log.epoch).unwrap();
        assert_eq!(retention.remove_before(3).unwrap(), 1);
        assert!(!log.segment(0).exists() && log.segment(1).exists() && log.segment(2).exists());
        assert_eq!(removed(&log).first_segment, 1);
    }

    #[test]
    fn removal_ends_where_nothing_is_left_though_more_was_acknowledged() {
        let mut log = Log::new();
        log.events(1);
        let mut retention =
            Retention::open(Arc::new(FileSystem), log.folder().to_owned(), log.epoch).unwrap();
        assert_eq!(retention.remove_before(9).unwrap(), 1);
        assert_eq!(removed(&log).first_segment, 1);
        assert_eq!(retention.remove_before(9).unwrap(), 0);
    }

    #[test]
    fn a_segment_that_is_kept_stays_with_those_behind_it_also_after_a_restart() {
        let mut log = Log::new();
        (0..3).for_each(|_| {
            log.events(2);
            log.rotate();
        });
        let open = || Retention::open(Arc::new(FileSystem), log.folder().to_owned(), log.epoch).unwrap();
        let mut retention = open();
        retention.keep(1).unwrap();
        assert_eq!(retention.remove_before(3).unwrap(), 1);
        assert_eq!(open().remove_before(3).unwrap(), 0);
        assert!(log.segment(1).exists() && log.segment(2).exists());
    }

    #[test]
    fn a_damaged_account_stops_removal() {
        let mut log = Log::new();
        log.events(1);
        log.rotate();
        std::fs::write(log.folder().join(REMOVED_FILE), "nonsense").unwrap();
        assert!(Retention::open(Arc::new(FileSystem), log.folder().to_owned(), log.epoch).is_err());
    }

    #[test]
    fn an_epoch_goes_whole_and_what_a_crash_left_of_it_is_swept() {
        let log = Log::new();
        let journal = log.journal().path();
        assert_eq!(epochs(&FileSystem, journal).unwrap(), [(log.epoch, log.folder().to_owned())]);
        let left = journal.join("01970000-0000-7000-8000-000000000009.removing");
        std::fs::create_dir(&left).unwrap();
        remove_epoch(&FileSystem, log.folder()).unwrap();
        assert!(epochs(&FileSystem, journal).unwrap().is_empty());
        sweep(&FileSystem, journal).unwrap();
        assert_eq!(std::fs::read_dir(journal).unwrap().count(), 0);
    }
}
