//! What publishing's tests share: a log written frame by frame, and a Kafka that obeys.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use tempfile::TempDir;
use uuid::Uuid;
use weir_common::{
    checkpoint::{Checkpoint, NoteSigner},
    encryption::{message_key, of_message_key},
    envelope::Envelope,
    event::{self, Event, Predecessor, SCHEMA_VERSION},
    frame::{self, FrameType},
    merkle::Tree,
    message::{Kind, Message, Received},
    segment::{SEGMENT_HEADER_BYTES, SegmentHeader},
};

pub(crate) use super::trial::{Run, WINDOW};
use super::{
    sink::{Failure, MakeSink, Outcome, Sink, Taken, Ticket},
    stream::Now,
};
use crate::recording::Durable;

/// An epoch in a journal of its own, written as an agent writes it; every event is a group commit.
pub(super) struct Log {
    journal: Arc<TempDir>,
    pub(super) epoch: Uuid,
    folder: PathBuf,
    signer: NoteSigner,
    segment: u64,
    offset: u64,
    file: File,
    pub(super) sequence: u64,
    commit: u64,
    pub(super) tree: Tree,
    /// Key that the next events are encrypted with.
    pub(super) key_id: u64,
    /// Segment and offset of each event.
    places: Vec<(u64, u64)>,
}

impl Log {
    pub(super) fn new() -> Self {
        Self::in_journal(Arc::new(TempDir::new().unwrap()), 1)
    }

    /// The epoch with this number in a journal; they are of this age.
    pub(super) fn in_journal(journal: Arc<TempDir>, epoch: u128) -> Self {
        let epoch = Uuid::from_u128(0x0197_0000_0000_7000_8000_0000_0000_0000 + epoch);
        let folder = journal.path().join(epoch.to_string());
        std::fs::create_dir(&folder).unwrap();
        let signer = NoteSigner::from_seed("weir/node-1", &[1; 32]).unwrap();
        std::fs::write(folder.join("node.pub"), format!("{}\n", signer.verifier())).unwrap();
        let file = File::create(folder.join("none")).unwrap();
        std::fs::remove_file(folder.join("none")).unwrap();
        let mut log = Self {
            journal,
            epoch,
            folder,
            signer,
            segment: 0,
            offset: 0,
            file,
            sequence: 0,
            commit: 1,
            tree: Tree::new(),
            key_id: 0,
            places: Vec::new(),
        };
        log.begin();
        log
    }

    pub(super) fn journal(&self) -> &Arc<TempDir> {
        &self.journal
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn segment(&self, index: u64) -> PathBuf {
        self.folder.join(SegmentHeader::file_name(index))
    }

    pub(super) fn durable(&self) -> Durable {
        Durable { segment: self.segment, offset: self.offset }
    }

    fn begin(&mut self) {
        let header = SegmentHeader {
            index: self.segment,
            first_sequence: self.sequence,
            first_commit: self.commit,
            created_unix_us: 0,
            epoch: self.epoch,
            node: "node-1".into(),
        };
        let path = self.segment(self.segment);
        self.file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        self.file.set_len(64 * 1024).unwrap();
        self.file.write_all_at(&header.encode().unwrap(), 0).unwrap();
        self.offset = SEGMENT_HEADER_BYTES as u64;
    }

    /// Ends the segment and begins the next one.
    pub(super) fn rotate(&mut self) {
        self.file.set_len(self.offset).unwrap();
        self.segment += 1;
        self.begin();
    }

    /// The next number is spent on a file that never became a segment.
    pub(super) fn skip_segment(&mut self, content: &[u8]) {
        self.segment += 1;
        std::fs::write(self.segment(self.segment), content).unwrap();
    }

    fn frame(&self, frame_type: FrameType, name: &str, key: &str, value: &[u8]) -> Vec<u8> {
        let envelope = Envelope {
            key: key.to_owned(),
            id: format!("{}/{}", self.epoch, self.sequence),
            event_type: format!("weir.v1.{name}"),
            source: format!("/weir/node-1/{}", self.epoch),
            time_unix_us: 1_000_000 + self.sequence as i64,
            flags: 0,
            key_id: self.key_id,
        };
        let mut bytes = Vec::new();
        frame::encode(&mut bytes, frame_type, self.sequence, self.commit, &envelope, value).unwrap();
        bytes
    }

    fn event_frame(&self) -> Vec<u8> {
        let key = ["", "one", "two", "three"][(self.sequence % 4) as usize];
        self.frame(FrameType::Event, "gap", key, format!("{{\"event\":{}}}", self.sequence).as_bytes())
    }

    pub(super) fn events(&mut self, count: usize) {
        for _ in 0..count {
            let frame = self.event_frame();
            self.append(&frame);
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        self.file.write_all_at(bytes, self.offset).unwrap();
        self.places.push((self.segment, self.offset));
        let (frame, length) = frame::decode(bytes).unwrap();
        self.tree.push(frame.leaf_hash);
        self.offset += length as u64;
        self.sequence += 1;
        self.commit += 1;
    }

    pub(super) fn checkpoint(&mut self) {
        self.logged_checkpoint(1_000_000 + self.sequence as i64);
    }

    pub(super) fn idle_checkpoint(&self, time_unix_us: i64) {
        std::fs::write(self.folder.join("checkpoint"), self.note(time_unix_us)).unwrap();
    }
    fn note(&self, time_unix_us: i64) -> String {
        let origin = format!("weir/node-1/{}", self.epoch);
        Checkpoint::of(&origin, &self.tree, time_unix_us).sign(std::slice::from_ref(&self.signer))
    }

    pub(super) fn logged_checkpoint(&mut self, time_unix_us: i64) {
        let (note, mut bytes) = (self.note(time_unix_us), Vec::new());
        let epoch = self.epoch.to_string();
        let envelope = Envelope::of_checkpoint("node-1", &epoch, self.sequence, time_unix_us);
        let checkpoint = FrameType::Checkpoint;
        frame::encode(&mut bytes, checkpoint, self.sequence, self.commit, &envelope, note.as_bytes())
            .unwrap();
        self.file.write_all_at(&bytes, self.offset).unwrap();
        self.offset += bytes.len() as u64;
        self.commit += 1;
    }

    /// A write that did not reach the disk whole.
    pub(super) fn torn_event(&mut self) {
        let bytes = self.event_frame();
        self.file.write_all_at(&bytes[..bytes.len() - 3], self.offset).unwrap();
    }

    /// A frame that is whole and was never acknowledged.
    pub(super) fn abandoned_event(&mut self) {
        let bytes = self.event_frame();
        self.file.write_all_at(&bytes, self.offset).unwrap();
        self.file.set_len(self.offset + bytes.len() as u64).unwrap();
        self.commit += 1;
        self.segment += 1;
        self.begin();
    }

    /// Changes a byte of an event's value.
    pub(super) fn damage(&self, sequence: usize) {
        let (segment, offset) = self.places[sequence];
        let file = File::options().read(true).write(true).open(self.segment(segment)).unwrap();
        let at = offset + frame::FRAME_HEADER_BYTES as u64 + 10;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
    }

    pub(super) fn damage_header(&self, segment: u64) {
        let file = File::options().write(true).open(self.segment(segment)).unwrap();
        file.write_all_at(&[0xff; 8], 100).unwrap();
    }
}

/// What a message is about.
pub(super) type Id = (Uuid, Kind);

/// A Kafka of which tests decide what it does.
#[derive(Clone, Default)]
pub(crate) struct Broker(Arc<Mutex<BrokerState>>);

#[derive(Default)]
pub(super) struct BrokerState {
    /// Every message that was acknowledged, in the order of arrival, by key.
    pub(super) arrived: BTreeMap<Option<String>, Vec<Id>>,
    pub(super) acknowledged: BTreeSet<Id>,
    /// What each message said that was ever sent; the same, however often it came.
    said: BTreeMap<Id, Vec<u8>>,
    /// Taken and neither acknowledged nor refused yet, of the present client.
    pub(super) waiting: VecDeque<(Ticket, Id, Option<String>)>,
    outcomes: Vec<Outcome>,
    /// Wrapped keys, in their order, each with the number of other messages before it.
    pub(super) keys: Vec<(String, usize)>,
    /// What the last message of each said.
    key_files: BTreeMap<String, Vec<u8>>,
    /// The present client must be made anew.
    pub(super) fatal: bool,
    pub(super) room: usize,
    pub(super) made: usize,
    pub(super) topics: BTreeSet<String>,
    /// Nobody is let in.
    pub(super) denied: bool,
}

impl BrokerState {
    fn take_key(&mut self, ticket: Ticket, topic: &str, message: &Message<'_>) -> Result<Taken, Failure> {
        assert_eq!(topic, "weir-keys");
        let before = self.waiting.len() + self.acknowledged.len();
        let name = message.key.unwrap_or_default();
        self.keys.push((name.to_owned(), before));
        self.key_files.insert(name.to_owned(), message.value.to_vec());
        self.outcomes.push(Outcome { ticket, result: Ok(()) });
        Ok(Taken::Yes)
    }

    fn arrive(&mut self, index: usize) -> Option<(Ticket, Id)> {
        let key = self.waiting.get(index)?.2.clone();
        // Without a key, messages go to any partition.
        let first = match key {
            None => index,
            Some(_) => self.waiting.iter().position(|(_, _, other)| *other == key)?,
        };
        let (ticket, id, key) = self.waiting.remove(first)?;
        self.arrived.entry(key).or_default().push(id);
        Some((ticket, id))
    }
}

impl Broker {
    /// One that has room.
    pub(crate) fn new() -> Self {
        let broker = Self::default();
        broker.with(|state| state.room = usize::MAX);
        broker
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut BrokerState) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    /// Acknowledges the first of those that wait with the key of the one at this place, if there is one: within a key
    /// the order is kept.
    pub(crate) fn acknowledge(&self, index: usize) {
        self.with(|state| {
            if let Some((ticket, id)) = state.arrive(index) {
                state.acknowledged.insert(id);
                state.outcomes.push(Outcome { ticket, result: Ok(()) });
            }
        });
    }

    /// The same arrives, but nobody hears of it: the client fails first.
    pub(crate) fn arrive_unheard(&self, index: usize) {
        self.with(|state| {
            state.arrive(index);
            state.waiting.clear();
            state.fatal = true;
        });
    }

    pub(crate) fn acknowledge_all(&self) {
        while self.with(|state| !state.waiting.is_empty()) {
            self.acknowledge(0);
        }
    }

    /// The events that are acknowledged, with what they say.
    pub(crate) fn events(&self) -> BTreeMap<(Uuid, u64), Vec<u8>> {
        self.with(|state| {
            let said = |id: &Id| match id.1 {
                Kind::Event { sequence } => Some(((id.0, sequence), state.said[id].clone())),
                Kind::Checkpoint { .. } => None,
            };
            state.acknowledged.iter().filter_map(said).collect()
        })
    }

    /// A wrapped key that it has.
    pub(crate) fn key(&self, epoch: Uuid, number: u64) -> Option<Vec<u8>> {
        self.with(|state| state.key_files.get(&message_key(&epoch, number)).cloned())
    }

    /// Refuses what waits first; what waits behind it never arrives.
    pub(super) fn refuse(&self, failure: Failure) {
        self.with(|state| {
            if let Some((ticket, _, _)) = state.waiting.pop_front() {
                state.waiting.clear();
                state.outcomes.push(Outcome { ticket, result: Err(failure) });
            }
        });
    }
}

struct Client(Broker);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.with(|state| {
            state.waiting.clear();
            state.outcomes.clear();
        });
    }
}

impl Sink for Client {
    fn send(
        &mut self,
        ticket: Ticket,
        topic: &str,
        message: &Message<'_>,
        _unix_ms: i64,
    ) -> Result<Taken, Failure> {
        let headers = message.headers.iter().map(|(name, value)| (*name, Some(value.as_bytes())));
        if message.key.is_some_and(|key| of_message_key(key.as_bytes()).is_some()) {
            return self.0.with(|state| state.take_key(ticket, topic, message));
        }
        let received = Received::parse(message.key.map(str::as_bytes), headers, Some(message.value)).unwrap();
        self.0.with(|state| {
            if state.fatal {
                return Err(Failure::Fatal { reason: "a test".into() });
            }
            if state.waiting.len() >= state.room {
                return Ok(Taken::Full);
            }
            state.topics.insert(topic.to_owned());
            let id = (received.epoch, received.kind);
            let said = state.said.entry(id).or_insert_with(|| message.value.to_vec());
            assert_eq!(said, message.value, "{id:?} says something else the second time");
            state.waiting.push_back((ticket, id, message.key.map(str::to_owned)));
            Ok(Taken::Yes)
        })
    }

    fn poll(&mut self, _timeout: Duration, outcomes: &mut Vec<Outcome>) -> Result<(), Failure> {
        self.0.with(|state| {
            outcomes.append(&mut state.outcomes);
            if state.fatal { Err(Failure::Fatal { reason: "a test".into() }) } else { Ok(()) }
        })
    }

    fn is_connected(&self) -> Option<bool> {
        None
    }

    fn denied(&self) -> Option<String> {
        self.0.with(|state| state.denied.then(|| "wrong password".to_owned()))
    }
}

impl MakeSink for Broker {
    fn make(&mut self) -> Result<Box<dyn Sink>, Failure> {
        self.with(|state| {
            state.fatal = false;
            state.made += 1;
        });
        Ok(Box::new(Client(self.clone())))
    }
}

impl Now {
    pub(super) fn real() -> Self {
        super::now()
    }

    pub(super) fn later(by: Duration) -> Self {
        let now = super::now();
        Self { instant: now.instant + by, unix_us: now.unix_us + i64::try_from(by.as_micros()).unwrap() }
    }
}

impl Log {
    /// Events with values of about this length.
    pub(super) fn large_events(&mut self, count: usize, bytes: usize) {
        for _ in 0..count {
            let value = format!("{{\"event\":\"{}\"}}", "x".repeat(bytes));
            let frame = self.frame(FrameType::Event, "gap", "one", value.as_bytes());
            self.append(&frame);
        }
    }

    /// The first event of an epoch, which names the one before it.
    pub(super) fn started(&mut self, before: &Self) {
        let root = hex::encode(before.tree.root());
        let predecessor = Predecessor { epoch: before.epoch.to_string(), size: before.sequence, root };
        let event = Event {
            schema: SCHEMA_VERSION,
            sequence: self.sequence,
            time_unix_us: 0,
            cluster: String::new(),
            tenant: None,
            node: "node-1".into(),
            epoch: self.epoch.to_string(),
            session: String::new(),
            invocation: None,
            request: None,
            kind: event::Kind::AgentStarted { version: "1".into(), predecessor: Some(predecessor) },
        };
        let frame = self.frame(FrameType::Event, "agentStarted", "", &serde_json::to_vec(&event).unwrap());
        self.append(&frame);
    }
}
