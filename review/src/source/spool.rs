//! Messages of topics as a journal on this disk: what every command reads.
//!
//! Partitions come interleaved and messages may come again. They are written down as frames as they come, with an index
//! in memory (24 bytes a message); then each epoch's frames are written in their order as segments, one frame for each
//! {epoch, kind, sequence}. The folder is private and goes with the [`Journal`](super::Journal) that reads it; what a
//! killed process left behind is removed by the next one.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, BufWriter, Read, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use tempfile::TempDir;
use uuid::Uuid;
use weir_common::{
    checkpoint::{NOTE_BYTES_MAX, NoteVerifier},
    encryption::{WRAPPED_KEY_BYTES_MAX, wrapped_key_file},
    frame::{self, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, FrameHeader, FrameType},
    merkle::{Hash, leaf_hash},
    message::Received,
    segment::{NODE_BYTES_MAX, SegmentHeader},
};

pub(crate) use super::places::{Conflict, MessagePlace, Places};
use super::{
    interrupted,
    ranges::{Ranges, Recent},
};

/// Folder of wrapped keys, until their epochs have folders.
const KEYS_FOLDER: &str = "keys";

/// Most wrapped keys that are taken; each takes a block of the disk.
const WRAPPED_KEYS_MAX: usize = 1_000_000;

/// Most messages that are spooled: what the index takes in memory is bounded by it (1.2 GB).
const MESSAGES_MAX: usize = 50_000_000;
/// Most epochs.
pub(super) const EPOCHS_MAX: usize = 100_000;
/// Most keys of one epoch that are kept; an agent has few.
const KEYS_MAX: usize = 8;
/// Length at which a segment is ended.
const SEGMENT_BYTES: u64 = 64 * 1024 * 1024;
/// How spools are called.
const PREFIX: &str = "weir-spool-";
/// File in a spool that its process holds locked.
const LOCK_FILE: &str = "lock";
/// Age below which a spool that nobody has locked may be one that is being made.
const BEING_MADE: Duration = Duration::from_secs(60);
/// File that messages are written to as they come.
const ARRIVAL_FILE: &str = "arrival";
/// Bytes before each frame of the arrival file: topic, partition, offset.
const PLACE_BYTES: usize = 1 + 4 + 8;
/// Group commits mean nothing on a topic: all frames are of the same.
const COMMIT: u64 = 1;

/// What went wrong with spooling.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpoolError {
    /// The disk.
    #[error("cannot write the topic's messages to {path}; is there room? TMPDIR names another folder")]
    Disk { path: PathBuf, source: io::Error },
    /// Too much.
    #[error(
        "the topic holds more than {MESSAGES_MAX} messages; read less (`sessions` has --since), or the journals of the agents"
    )]
    TooMany,
    /// Too much.
    #[error(
        "the topic holds messages of more than {EPOCHS_MAX} runs of agents; who else may write to it? Read the journals of the agents"
    )]
    TooManyEpochs,
}

/// A message in the index. The order is that of the journal: a checkpoint over n events stands before event n.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    epoch: u32,
    sequence: u64,
    is_event: bool,
    /// Where it begins in the arrival file.
    position: u64,
}

const _: () = assert!(size_of::<Entry>() == 24);

impl Entry {
    fn is_again(&self, other: &Self) -> bool {
        (self.epoch, self.sequence, self.is_event) == (other.epoch, other.sequence, other.is_event)
    }
}

/// An epoch while messages come.
#[derive(Debug)]
struct Arriving {
    epoch: Uuid,
    /// Earliest time that an envelope gives.
    first_us: i64,
    keys: Vec<String>,
    /// Events beyond this one are passed over.
    limit: Option<u64>,
}

/// What tells whether two messages of the same name are the same: the digest of their frame. None: Weir did not write it.
pub(super) fn digest(received: &Received<'_>) -> Option<Hash> {
    let (frame_type, sequence) = (received.kind.frame_type(), received.kind.sequence());
    let mut frame = Vec::new();
    frame::encode(&mut frame, frame_type, sequence, COMMIT, &received.envelope, received.value).ok()?;
    Some(leaf_hash(&frame))
}

/// Takes messages.
#[derive(Debug)]
pub(crate) struct Spool {
    directory: TempDir,
    /// Held as long as the spool is in use.
    lock: File,
    arrival: BufWriter<File>,
    position: u64,
    numbers: HashMap<Uuid, u32>,
    epochs: Vec<Arriving>,
    index: Vec<Entry>,
    buffer: Vec<u8>,
    /// No further epoch is taken.
    closed: bool,
    /// Number of wrapped keys that were taken.
    keys: usize,
}

/// A spool that is complete.
#[derive(Debug)]
pub(crate) struct Spooled {
    directory: TempDir,
    _lock: File,
    /// Messages of which there was one already.
    pub(crate) duplicates: u64,
    pub(crate) conflicts: Places<Conflict>,
    /// Sequences of the events that are there, by epoch.
    pub(crate) events: BTreeMap<Uuid, Ranges>,
    /// What the last of them say.
    pub(crate) recent: Recent,
}

impl Spooled {
    /// The journal's directory.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Spool {
    /// Makes an empty one in the folder for temporary files.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub(crate) fn new() -> Result<Self, SpoolError> {
        let parent = std::env::temp_dir();
        let error = |source| SpoolError::Disk { path: parent.clone(), source };
        let private = fs::Permissions::from_mode(0o700);
        let make = || tempfile::Builder::new().prefix(PREFIX).permissions(private).tempdir_in(&parent);
        let directory = interrupted::removed_then(make).map_err(error)?;
        let lock = File::create_new(directory.path().join(LOCK_FILE)).map_err(error)?;
        lock.lock().map_err(error)?;
        remove_abandoned(&parent, directory.path());
        let arrival = File::options()
            .read(true)
            .append(true)
            .create_new(true)
            .open(directory.path().join(ARRIVAL_FILE))
            .map_err(error)?;
        Ok(Self {
            directory,
            lock,
            arrival: BufWriter::with_capacity(1024 * 1024, arrival),
            position: 0,
            numbers: HashMap::new(),
            epochs: Vec::new(),
            index: Vec::new(),
            buffer: Vec::new(),
            closed: false,
            keys: 0,
        })
    }

    fn disk(&self, source: io::Error) -> SpoolError {
        SpoolError::Disk { path: self.directory.path().to_owned(), source }
    }

    /// Takes a message. False if its envelope has no place in a frame: Weir did not write it.
    ///
    /// # Errors
    /// The disk fails, or there is too much.
    pub(crate) fn add(&mut self, received: &Received<'_>, place: MessagePlace) -> Result<bool, SpoolError> {
        if self.index.len() == MESSAGES_MAX {
            return Err(SpoolError::TooMany);
        }
        let (frame_type, sequence) = (received.kind.frame_type(), received.kind.sequence());
        self.buffer.clear();
        self.buffer.push(place.topic);
        self.buffer.extend_from_slice(&place.partition.to_le_bytes());
        self.buffer.extend_from_slice(&place.offset.to_le_bytes());
        let (envelope, value) = (&received.envelope, received.value);
        if frame::encode(&mut self.buffer, frame_type, sequence, COMMIT, envelope, value).is_err() {
            return Ok(false);
        }
        if self.closed && !self.numbers.contains_key(&received.epoch) {
            return Ok(true);
        }
        let number = self.epoch(received.epoch)?;
        let Some(epoch) = self.epochs.get_mut(number as usize) else { return Ok(false) };
        if epoch.limit.is_some_and(|limit| sequence > limit) {
            return Ok(true);
        }
        epoch.first_us = epoch.first_us.min(envelope.time_unix_us);
        for verifier in received.verifier.iter().flat_map(|keys| keys.lines()) {
            // Anyone may claim to have signed: what is no key, or one of many, is not kept, and then verifies nothing.
            let known = epoch.keys.iter().any(|key| key == verifier) || epoch.keys.len() == KEYS_MAX;
            if !known && NoteVerifier::parse(verifier).is_ok() {
                epoch.keys.push(verifier.to_owned());
            }
        }
        let is_event = frame_type == FrameType::Event;
        self.index.push(Entry { epoch: number, sequence, is_event, position: self.position });
        self.arrival.write_all(&self.buffer).map_err(|source| self.disk(source))?;
        self.position += self.buffer.len() as u64;
        Ok(true)
    }

    /// Takes a wrapped key: the last one that comes counts, and none if that was erased.
    ///
    /// # Errors
    /// The disk fails, or there is too much.
    pub(crate) fn add_key(
        &mut self,
        epoch: Uuid,
        number: u64,
        value: Option<&[u8]>,
    ) -> Result<(), SpoolError> {
        let folder = self.directory.path().join(KEYS_FOLDER).join(epoch.to_string());
        let path = folder.join(wrapped_key_file(number));
        let Some(value) = value else {
            return match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.disk(error)),
                _ => Ok(()),
            };
        };
        if value.len() > WRAPPED_KEY_BYTES_MAX {
            return Ok(());
        }
        if self.keys == WRAPPED_KEYS_MAX {
            return Err(SpoolError::TooMany);
        }
        self.keys += 1;
        fs::create_dir_all(&folder).and_then(|()| fs::write(path, value)).map_err(|source| self.disk(source))
    }

    fn epoch(&mut self, epoch: Uuid) -> Result<u32, SpoolError> {
        if let Some(number) = self.numbers.get(&epoch) {
            return Ok(*number);
        }
        if self.epochs.len() == EPOCHS_MAX {
            return Err(SpoolError::TooManyEpochs);
        }
        let number = self.epochs.len() as u32;
        self.numbers.insert(epoch, number);
        self.epochs.push(Arriving { epoch, first_us: i64::MAX, keys: Vec::new(), limit: None });
        Ok(number)
    }

    /// Whether an epoch lacks an event between two that are there.
    pub(crate) fn has_holes(&mut self) -> bool {
        self.index.sort_unstable();
        let mut last: Option<Entry> = None;
        for entry in self.index.iter().filter(|entry| entry.is_event) {
            let earlier = last.filter(|last| last.epoch == entry.epoch);
            if earlier.is_some_and(|earlier| entry.sequence > earlier.sequence.saturating_add(1)) {
                return true;
            }
            last = Some(*entry);
        }
        false
    }

    /// From now on events that come behind the last one of their epoch are passed over, and epochs that are new.
    pub(crate) fn fill_holes_only(&mut self) {
        self.closed = true;
        for epoch in &mut self.epochs {
            epoch.limit = Some(0);
        }
        for entry in &self.index {
            if let Some(epoch) = self.epochs.get_mut(entry.epoch as usize) {
                epoch.limit = epoch.limit.max(Some(entry.sequence));
            }
        }
    }

    /// Writes the journal.
    ///
    /// # Errors
    /// The disk fails.
    pub(crate) fn finish(mut self) -> Result<Spooled, SpoolError> {
        self.arrival.flush().map_err(|source| self.disk(source))?;
        self.index.sort_unstable();
        let path = self.directory.path().to_owned();
        let disk = |source| SpoolError::Disk { path: path.clone(), source };
        let mut writing = Writing {
            directory: &path,
            arrival: self.arrival.into_inner().map_err(|error| disk(error.into_error()))?,
            segment: None,
            duplicates: 0,
            conflicts: Places::default(),
            events: BTreeMap::new(),
            recent: Recent::default(),
        };
        for entries in self.index.chunk_by(|a, b| a.epoch == b.epoch) {
            let Some(epoch) = entries.first().and_then(|entry| self.epochs.get(entry.epoch as usize)) else {
                continue;
            };
            writing.epoch(epoch, entries).map_err(disk)?;
        }
        let Writing { duplicates, conflicts, events, recent, .. } = writing;
        fs::remove_file(path.join(ARRIVAL_FILE)).map_err(disk)?;
        Ok(Spooled { directory: self.directory, _lock: self.lock, duplicates, conflicts, events, recent })
    }
}

/// Writes segments.
struct Writing<'a> {
    directory: &'a Path,
    arrival: File,
    /// The one that is being written, and its length.
    segment: Option<(BufWriter<File>, u64)>,
    duplicates: u64,
    conflicts: Places<Conflict>,
    events: BTreeMap<Uuid, Ranges>,
    recent: Recent,
}

impl Writing<'_> {
    fn epoch(&mut self, epoch: &Arriving, entries: &[Entry]) -> io::Result<()> {
        let name = epoch.epoch.to_string();
        let folder = self.directory.join(&name);
        match fs::rename(self.directory.join(KEYS_FOLDER).join(&name), &folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir(&folder)?,
            with_its_keys => with_its_keys?,
        }
        if !epoch.keys.is_empty() {
            let keys: String = epoch.keys.iter().map(|key| format!("{key}\n")).collect();
            debug_assert!(keys.len() <= NOTE_BYTES_MAX, "a key file that is too long to be read");
            fs::write(folder.join("node.pub"), keys)?;
        }
        let mut header: Option<SegmentHeader> = None;
        let mut last = None;
        let mut known: HashMap<i64, (MessagePlace, Hash)> = HashMap::new();
        for entry in entries {
            let (place, frame) = self.read(entry.position)?;
            if last.replace(*entry).is_none_or(|last: Entry| !last.is_again(entry)) {
                known.clear();
            }
            // Of checkpoints there are several over as many events, signed at different times.
            let time = if entry.is_event { 0 } else { signed_at(&frame) };
            let digest = leaf_hash(&frame);
            if let Some((first, other)) = known.insert(time, (place, digest)) {
                known.insert(time, (first, other));
                self.duplicates += 1;
                if other != digest {
                    let frame_type = if entry.is_event { FrameType::Event } else { FrameType::Checkpoint };
                    let (epoch, sequence) = (epoch.epoch, entry.sequence);
                    self.conflicts.push(Conflict { epoch, frame_type, sequence, first, other: place });
                }
                continue;
            }
            if entry.is_event {
                self.events.entry(epoch.epoch).or_default().insert(entry.sequence);
                self.recent.keep(epoch.epoch, entry.sequence, digest);
            }
            if self.segment.as_ref().is_none_or(|(_, length)| *length >= SEGMENT_BYTES) {
                let next = match header.take() {
                    Some(header) => {
                        SegmentHeader { index: header.index + 1, first_sequence: entry.sequence, ..header }
                    }
                    None => first_header(epoch, entry.sequence, &frame),
                };
                self.begin(&folder, &next)?;
                header = Some(next);
            }
            if let Some((segment, length)) = &mut self.segment {
                segment.write_all(&frame)?;
                *length += frame.len() as u64;
            }
        }
        self.end()
    }

    fn begin(&mut self, folder: &Path, header: &SegmentHeader) -> io::Result<()> {
        self.end()?;
        let file = File::create_new(folder.join(SegmentHeader::file_name(header.index)))?;
        let mut segment = BufWriter::with_capacity(256 * 1024, file);
        let bytes = header.encode().map_err(io::Error::other)?;
        segment.write_all(&bytes)?;
        self.segment = Some((segment, bytes.len() as u64));
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        self.segment.take().map_or(Ok(()), |(mut segment, _)| segment.flush())
    }

    /// Reads a message of the arrival file back.
    fn read(&mut self, position: u64) -> io::Result<(MessagePlace, Vec<u8>)> {
        let damaged = || io::Error::other("the spool changed while it was read");
        self.arrival.seek(SeekFrom::Start(position))?;
        let mut head = [0; PLACE_BYTES + FRAME_HEADER_BYTES];
        self.arrival.read_exact(&mut head)?;
        let (place, header) = head.split_first_chunk::<PLACE_BYTES>().ok_or_else(damaged)?;
        let length = FrameHeader::decode(header).map_err(io::Error::other)?.frame_bytes();
        let mut frame = vec![0; length.min(FRAME_BYTES_MAX)];
        frame[..FRAME_HEADER_BYTES].copy_from_slice(header);
        self.arrival.read_exact(&mut frame[FRAME_HEADER_BYTES..])?;
        let [topic, p0, p1, p2, p3, offset @ ..] = *place;
        let place = MessagePlace {
            topic,
            partition: i32::from_le_bytes([p0, p1, p2, p3]),
            offset: i64::from_le_bytes(offset),
        };
        Ok((place, frame))
    }
}

/// When a checkpoint was signed, as its envelope says: `verify` holds that against what is signed.
fn signed_at(frame: &[u8]) -> i64 {
    frame::decode(frame).map_or(0, |(frame, _)| frame.envelope.time_unix_us)
}

/// The header of an epoch's first segment, as far as messages tell.
fn first_header(epoch: &Arriving, first_sequence: u64, frame: &[u8]) -> SegmentHeader {
    let source = frame::decode(frame).map(|(frame, _)| frame.envelope.source).unwrap_or_default();
    let name = epoch.epoch.to_string();
    let node = source.strip_prefix("/weir/").and_then(|rest| rest.strip_suffix(&name)?.strip_suffix('/'));
    SegmentHeader {
        index: 0,
        first_sequence,
        first_commit: COMMIT,
        created_unix_us: super::made_us(&epoch.epoch).unwrap_or(epoch.first_us),
        epoch: epoch.epoch,
        // `verify` says so where it is not that of the events.
        node: node.filter(|node| node.len() <= NODE_BYTES_MAX).unwrap_or_default().to_owned(),
    }
}

/// Removes spools of this user whose process is gone. What cannot be removed is left: it is not this process' matter.
fn remove_abandoned(parent: &Path, own: &Path) {
    let Ok(user) = fs::metadata(own).map(|data| data.uid()) else { return };
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let is_spool = entry.file_name().to_string_lossy().starts_with(PREFIX);
        // Never through a symbolic link, and nobody else's: the folder is everyone's.
        let is_ours = entry.metadata().is_ok_and(|data| data.is_dir() && data.uid() == user);
        if !is_spool || !is_ours || entry.path() == own {
            continue;
        }
        let lock = entry.path().join(LOCK_FILE);
        let is_old = |data: fs::Metadata| {
            data.modified().is_ok_and(|made| made.elapsed().is_ok_and(|age| age > BEING_MADE))
        };
        // One that is new, or without its lock, is being made.
        if File::open(lock).is_ok_and(|file| file.metadata().is_ok_and(is_old) && file.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, fs::File, time::SystemTime};

    use uuid::Uuid;
    use weir_common::{
        checkpoint::NoteSigner,
        envelope::Envelope,
        message::{Kind, Received},
    };

    use super::{KEYS_MAX, LOCK_FILE, MessagePlace, PREFIX, Spool, remove_abandoned, wrapped_key_file};
    use crate::source::Journal;

    fn add(spool: &mut Spool, epoch: u128, sequence: u64) {
        let epoch = Uuid::from_u128(epoch);
        let envelope = Envelope { source: format!("/weir/node-1/{epoch}"), ..Envelope::default() };
        let kind = Kind::Event { sequence };
        let received = Received { epoch, kind, envelope, value: b"{}", verifier: None };
        assert!(spool.add(&received, MessagePlace { topic: 0, partition: 0, offset: 0 }).unwrap());
    }

    #[test]
    fn wrapped_keys_lie_with_their_epoch_and_one_that_was_erased_is_gone() {
        let mut spool = Spool::new().unwrap();
        let epoch = Uuid::from_u128(1);
        for (number, value) in [(1, Some(&b"one"[..])), (2, Some(b"two")), (1, None), (3, None)] {
            spool.add_key(epoch, number, value).unwrap();
        }
        spool.add_key(Uuid::from_u128(9), 1, Some(b"of an epoch that has no event")).unwrap();
        add(&mut spool, 1, 0);
        let spooled = spool.finish().unwrap();
        let folder = spooled.path().join(epoch.to_string());
        let kept = [1, 2, 3].map(|number| fs::read(folder.join(wrapped_key_file(number))).ok());
        assert_eq!(kept, [None, Some(b"two".to_vec()), None]);
        assert_eq!(Journal::open(spooled.path()).unwrap().epochs.len(), 1);
    }

    #[test]
    fn a_second_look_fills_holes_and_takes_nothing_that_could_leave_new_ones() {
        let mut spool = Spool::new().unwrap();
        for (epoch, sequence) in [(1, 0), (1, 1), (1, 4), (2, 3)] {
            add(&mut spool, epoch, sequence);
        }
        assert!(spool.has_holes());
        spool.fill_holes_only();
        for (epoch, sequence) in [(1, 3), (1, 2), (1, 5), (3, 0), (2, 2)] {
            add(&mut spool, epoch, sequence);
        }
        assert!(!spool.has_holes());
        let spooled = spool.finish().unwrap();
        let journal = Journal::open(spooled.path()).unwrap();
        assert_eq!((journal.records().count(), journal.warnings().0.len()), (7, 0));
        assert_eq!(spooled.events.len(), 2);
    }

    #[test]
    fn keys_that_messages_claim_are_bounded_and_must_be_keys() {
        let mut spool = Spool::new().unwrap();
        let epoch = Uuid::from_u128(1);
        for seed in 0..20 {
            let signer = NoteSigner::from_seed("weir/node-1", &[seed; 32]).unwrap();
            for verifier in [signer.verifier().to_string(), format!("no key {seed}")] {
                let kind = Kind::Checkpoint { size: u64::from(seed), signed_unix_us: None };
                let envelope = Envelope::default();
                let received = Received { epoch, kind, envelope, value: b"note", verifier: Some(verifier) };
                spool.add(&received, MessagePlace { topic: 0, partition: 0, offset: 0 }).unwrap();
            }
        }
        let spooled = spool.finish().unwrap();
        let keys = fs::read_to_string(spooled.path().join(epoch.to_string()).join("node.pub")).unwrap();
        assert_eq!(keys.lines().count(), KEYS_MAX);
        assert!(!keys.contains("no key"));
    }

    #[test]
    fn a_spool_is_private_goes_with_its_owner_and_leaves_nothing_of_its_arrivals() {
        use std::os::unix::fs::PermissionsExt as _;
        let mut spool = Spool::new().unwrap();
        add(&mut spool, 1, 0);
        let spooled = spool.finish().unwrap();
        let path = spooled.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0);
        let mut names: Vec<String> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [Uuid::from_u128(1).to_string(), LOCK_FILE.to_owned()]);
        drop(spooled);
        assert!(!path.exists());
    }

    #[test]
    fn only_an_old_spool_that_nobody_holds_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, old: bool| {
            let folder = parent.path().join(name);
            fs::create_dir(&folder).unwrap();
            let lock = File::create(folder.join(LOCK_FILE)).unwrap();
            if old {
                lock.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            }
            lock
        };
        let name = |end: &str| format!("{PREFIX}{end}");
        make(&name("own"), true);
        make(&name("abandoned"), true);
        make(&name("new"), false);
        make("other-abandoned", true);
        let held = make(&name("held"), true);
        held.lock().unwrap();
        std::os::unix::fs::symlink(parent.path().join("other-abandoned"), parent.path().join(name("link")))
            .unwrap();
        remove_abandoned(parent.path(), &parent.path().join(name("own")));
        let mut left: Vec<String> = fs::read_dir(parent.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let expected = ["held", "link", "new", "own"].map(name);
        assert_eq!(left, ["other-abandoned".to_owned()].into_iter().chain(expected).collect::<Vec<_>>());
        assert!(parent.path().join("other-abandoned").join(LOCK_FILE).exists());
    }
}
