//! An agent's journal and publisher, a Kafka and a storage in memory, over several lives; and what must hold of them. For
//! tests.
//!
//! What must hold, whatever the storage lost or refused: what the journal called durable is in the journal, whole and at
//! its place in the log, or Kafka has it; there is nothing in either that was never written; the log verifies; the
//! cursor and the account of what was removed never say more than Kafka acknowledged; and wherever there is encrypted
//! content, there is its key, and whoever may read it can.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use uuid::Uuid;
use weir_common::{
    checkpoint::{Checkpoint, NoteVerifier},
    encryption::wrapped_key_file,
    event::{Event, Kind},
    frame::FrameType,
    merkle::{Hash, Tree},
    removed::{REMOVED_FILE, Removed},
    segment::{SegmentHeader, SegmentReader},
};

use super::{
    Open, Storage,
    contents::{self, Reader},
    files_named,
    memory::Memory,
    read_bounded, read_full,
};
use crate::{
    publishing::{
        clock::{self, Clock},
        fixture::{Broker, Run, WINDOW},
    },
    recording::{
        RecordingError,
        ledger::{Ledger, Life},
    },
};

/// Lengths of events, some of which need most of a segment.
const LENGTHS: [usize; 5] = [1, 300, 4000, 15_000, 40_000];

/// Where the journal is; nothing of it is there at first.
pub(super) fn folder() -> &'static Path {
    Path::new("/var/weir/journal")
}

/// Everything that outlives an agent.
pub(super) struct World {
    pub(super) storage: Memory,
    pub(super) broker: Broker,
    pub(super) clock: Clock,
    pub(super) ledger: Ledger,
    pub(super) random: StdRng,
    /// What publishers found missing.
    pub(super) gaps: Vec<(String, Option<u64>)>,
    /// Whether content is encrypted.
    pub(super) encrypts: bool,
    pub(super) reader: Reader,
}

/// An agent that lives.
pub(super) struct Agent {
    pub(super) life: Life,
    pub(super) run: Run,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            storage: Memory::new(),
            broker: Broker::new(),
            clock: Clock::new(),
            ledger: Ledger::default(),
            random: StdRng::seed_from_u64(seed),
            gaps: Vec::new(),
            encrypts: false,
            reader: Reader::new(),
        }
    }

    pub(super) fn start(&mut self) -> Result<Agent, RecordingError> {
        let storage: Arc<dyn Storage> = Arc::new(self.storage.clone());
        let life = Life::start(&storage, folder(), 1 << 30, self.encrypts)?;
        let run = Run::of(storage, folder(), life.epoch, life.durable(), &self.broker);
        Ok(Agent { life, run })
    }

    /// Writes a group of a few events.
    pub(super) fn append(&mut self, agent: &mut Agent) -> Result<(), RecordingError> {
        let count = self.random.gen_range(1..5);
        let lengths: Vec<_> = (0..count).map(|_| LENGTHS[self.random.gen_range(0..LENGTHS.len())]).collect();
        agent.life.append(&mut self.ledger, &lengths)
    }

    /// Does something that agents, Kafka and time do.
    pub(super) fn step(&mut self, agent: &mut Agent) {
        let turn = |world: &mut Self, agent: &mut Agent, time| agent.run.turn_after(&mut world.clock, time);
        match self.random.gen_range(0..13) {
            0..5 => drop(self.append(agent)),
            5..7 => {
                let milliseconds = self.random.gen_range(0..3000);
                turn(self, agent, Duration::from_millis(milliseconds));
            }
            7 => {
                for _ in 0..self.random.gen_range(0..6) {
                    self.broker.acknowledge(self.random.gen_range(0..3));
                }
            }
            8 => self.broker.acknowledge_all(),
            9 => self.broker.arrive_unheard(self.random.gen_range(0..3)),
            // By a day.
            12 => self.clock.set([-86_400, 86_400][self.random.gen_range(0..2)]),
            10 => turn(self, agent, Duration::from_secs(31)),
            _ => turn(self, agent, WINDOW + Duration::from_secs(1)),
        }
    }

    /// It ends, in an orderly way or as if killed.
    pub(super) fn end(&mut self, agent: Agent, orderly: bool) {
        self.gaps.extend(agent.run.gaps());
        if orderly {
            // It may fail: what holds then is checked as after a kill.
            let _ = agent.life.finish();
        }
    }

    /// Everything that can be published is, and what may be removed is removed.
    pub(super) fn publish_all(&mut self, agent: &mut Agent) {
        for _ in 0..30 {
            agent.run.turn_after(&mut self.clock, Duration::from_secs(31));
            self.broker.acknowledge_all();
        }
        agent.run.turn_after(&mut self.clock, Duration::from_secs(2));
    }

    /// Checks what must hold of what the next agent finds.
    #[track_caller]
    pub(super) fn check(&self) {
        let published = self.broker.events();
        let mut present: BTreeSet<(Uuid, u64)> = BTreeSet::new();
        for (epoch, sequence) in published.keys() {
            present.extend(self.published_number(*epoch, *sequence, &published[&(*epoch, *sequence)]));
        }
        let epochs: Vec<(Uuid, PathBuf)> = self.epochs();
        for (epoch, folder) in &epochs {
            let log = Log::read(&self.storage, folder);
            let account = &log.removed;
            let prefix =
                (0..).take_while(|sequence| published.contains_key(&(*epoch, *sequence))).count() as u64;
            assert!(account <= &prefix, "{epoch}: {account} events were removed, {prefix} acknowledged");
            let cursor = clock::cursor(&self.storage, folder, *epoch);
            // What could not be read is passed with a gap, and kept.
            let is_kept = |sequence: u64| {
                published.contains_key(&(*epoch, sequence)) || log.events.contains_key(&sequence)
            };
            let is_passed = !self.gaps.is_empty() && (*account..cursor).all(is_kept);
            assert!(cursor <= prefix || is_passed, "{epoch}: cursor at {cursor}, acknowledged {prefix}");
            for (sequence, value) in &log.events {
                let key = |key| match read_bounded(&self.storage, &folder.join(wrapped_key_file(key)), 8192) {
                    Ok(wrapped) => wrapped.to_vec(),
                    Err(error) => panic!("{epoch}/{sequence} is there without its key: {error}"),
                };
                present.extend(self.number(*epoch, *sequence, value, key));
                if let Some(said) = published.get(&(*epoch, *sequence)) {
                    assert_eq!(said, value, "Kafka has something else as {epoch}/{sequence}");
                }
            }
        }
        for held in &self.ledger.held {
            assert!(present.contains(held), "event {held:?} was called durable and is gone");
        }
    }

    fn epochs(&self) -> Vec<(Uuid, PathBuf)> {
        let entries = self.storage.entries(folder()).unwrap_or_default();
        let epoch = |name: &str| Uuid::try_parse(name).ok();
        entries.iter().filter_map(|entry| Some((epoch(&entry.name)?, folder().join(&entry.name)))).collect()
    }

    /// The number of an event in the ledger, as Kafka has it.
    fn published_number(&self, epoch: Uuid, sequence: u64, value: &[u8]) -> Option<(Uuid, u64)> {
        let key = |key| self.broker.key(epoch, key).expect("Kafka has content without its key");
        self.number(epoch, sequence, value, key)
    }

    /// The number of an event in the ledger; none of those that the journal adds itself. `key` gives wrapped keys.
    fn number(
        &self,
        epoch: Uuid,
        sequence: u64,
        value: &[u8],
        key: impl Fn(u64) -> Vec<u8>,
    ) -> Option<(Uuid, u64)> {
        let event: Event = serde_json::from_slice(value).expect("an event");
        assert_eq!((&event.epoch, event.sequence), (&epoch.to_string(), sequence));
        let name = match (&event.kind, contents::key_of(&event)) {
            (Kind::Finding { name, .. }, _) => name.clone(),
            (_, Some(number)) => {
                let said = self.reader.text(&key(number), &event);
                let (name, rest) = said.split_once(' ').expect("a number");
                assert!(rest.bytes().all(|byte| byte == b'x'), "{said}");
                name.to_owned()
            }
            _ => return None,
        };
        let number: u64 = name.parse().expect("a number");
        assert_eq!(self.ledger.tried[number as usize], (epoch, number), "it was never written");
        Some((epoch, number))
    }

    /// Events that were called durable and never arrived.
    pub(super) fn unpublished(&self) -> usize {
        let published = self.broker.events();
        let arrived: BTreeSet<_> = published
            .iter()
            .filter_map(|((epoch, sequence), value)| self.published_number(*epoch, *sequence, value))
            .collect();
        self.ledger.held.iter().filter(|held| !arrived.contains(held)).count()
    }
}

/// What an epoch's folder holds, read as whoever verifies does: it must be whole.
pub(super) struct Log {
    pub(super) events: BTreeMap<u64, Vec<u8>>,
    /// Number of events that were removed.
    pub(super) removed: u64,
}

impl Log {
    #[track_caller]
    pub(super) fn read(storage: &dyn Storage, folder: &Path) -> Self {
        let mut files = files_named(storage, folder, ".seg").unwrap();
        files.sort();
        let whole = |(path, bytes): &(PathBuf, u64)| {
            let mut content = vec![0; *bytes as usize];
            read_full(storage.open(path, Open::Read).unwrap().as_ref(), &mut content, 0).unwrap();
            content
        };
        let files: Vec<_> = files.iter().map(whole).collect();
        let removed = read_bounded(storage, &folder.join(REMOVED_FILE), 8192).ok();
        let removed = removed.map(|bytes| Removed::decode(&bytes).expect("the account is whole"));
        let (first, tree) = removed.map_or((0, Tree::new()), |removed| (removed.first_segment, removed.tree));
        let mut log = Self { events: BTreeMap::new(), removed: tree.size() };
        // A file without a header was being made, if nothing is behind.
        let made = |bytes: &&Vec<u8>| {
            SegmentHeader::decode(bytes).is_ok() || bytes.iter().skip(512).any(|byte| *byte != 0)
        };
        let segments: Vec<_> = files.iter().filter(made).collect();
        let header = |bytes: &Vec<u8>| SegmentHeader::decode(bytes).expect("a header is whole or not there");
        let segments: Vec<_> = segments.into_iter().filter(|bytes| header(bytes).index >= first).collect();
        if segments.is_empty() {
            return log;
        }
        let verifier = read_bounded(storage, &folder.join("node.pub"), 4096).expect("the key is there first");
        let verifier = NoteVerifier::parse(std::str::from_utf8(&verifier).unwrap()).unwrap();
        let roots = log.fill(&segments, tree, &verifier);
        if let Ok(note) = read_bounded(storage, &folder.join("checkpoint"), 16 * 1024) {
            let checkpoint = Checkpoint::verify(std::str::from_utf8(&note).unwrap(), &verifier).unwrap();
            let is_there =
                checkpoint.size < log.removed || roots.get(&checkpoint.size) == Some(&checkpoint.root);
            assert!(is_there, "the checkpoint of {} events is ahead of the log", checkpoint.size);
        }
        log
    }

    /// Reads the segments; returns the tree's root at each size.
    fn fill(
        &mut self,
        segments: &[&Vec<u8>],
        mut tree: Tree,
        verifier: &NoteVerifier,
    ) -> BTreeMap<u64, Hash> {
        let mut roots = BTreeMap::from([(tree.size(), tree.root())]);
        for (index, segment) in segments.iter().enumerate() {
            let successor =
                segments.get(index + 1).map(|next| SegmentHeader::decode(next).unwrap().first_sequence);
            let reader = SegmentReader::new(segment, successor).unwrap();
            assert_eq!(reader.header().first_sequence, tree.size(), "segment {}", reader.header().index);
            for located in reader {
                let frame = located
                    .unwrap_or_else(|error| panic!("segment {index} of {}: {error}", segments.len()))
                    .frame;
                match frame.frame_type {
                    FrameType::Event => {
                        assert_eq!(frame.sequence, tree.size());
                        tree.push(frame.leaf_hash);
                        roots.insert(tree.size(), tree.root());
                        self.events.insert(frame.sequence, frame.value.to_vec());
                    }
                    FrameType::Checkpoint => {
                        let note = std::str::from_utf8(frame.value).unwrap();
                        let checkpoint = Checkpoint::verify(note, verifier).unwrap();
                        assert_eq!((checkpoint.size, checkpoint.root), (tree.size(), tree.root()));
                    }
                }
            }
        }
        roots
    }
}
