//! A journal whose account is kept by who writes it: what was tried, and what it said is durable. For tests.
//!
//! One thread, as the writer's, and no clock: the same steps make the same calls to the storage.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use uuid::Uuid;
use weir_common::{
    encryption::{ContentKey, Place, Recipient, wrapped_key_file},
    event::{Bytes, Channel, Content, Kind},
};

use super::{
    DurablePosition, RecordingError,
    encryption::SessionKey,
    entry::{Append, Entry, Ids, Origin, unix_us},
    epoch::{self, Epoch},
    journal::Journal,
    tuning::Tuning,
};
use crate::{
    recipients::RECIPIENT,
    storage::{self, Storage},
};

/// Sessions, so that messages have keys.
const SESSIONS: [&str; 3] = ["a", "b", "c"];

/// Events that a session's key encrypts: few, so that many keys' files are written.
const EVENTS_OF_KEY: u64 = 5;

/// Segments are as small as they may be, so that there are many.
pub(super) const TUNING: Tuning = Tuning {
    retry_interval: Duration::ZERO,
    segment_bytes_first: 132 * 1024,
    segment_bytes_max: 132 * 1024,
    checkpoint_events: 6,
    idle_interval: Duration::from_secs(3600),
};

/// What is tried and what holds, over all lives of the agent.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Numbers of all events that were ever handed to a journal, by epoch: each has one, and they grow.
    pub(crate) tried: Vec<(Uuid, u64)>,
    /// Of those, what the journal said is durable.
    pub(crate) held: Vec<(Uuid, u64)>,
}

/// An agent's journal from its start on.
#[derive(Debug)]
pub(crate) struct Life {
    journal: Journal,
    origin: Arc<Origin>,
    pub(crate) epoch: Uuid,
    /// Where content is encrypted.
    keys: Option<Keys>,
}

/// Keys of sessions, each of whose files is on disk before it encrypts anything: as the recorder has it, on this one thread.
#[derive(Debug)]
struct Keys {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    epoch: Uuid,
    made: u64,
    current: BTreeMap<&'static str, (Arc<SessionKey>, u64)>,
}

impl Keys {
    /// The key of a session, or a new one when that has done its part.
    fn of(&mut self, session: &'static str) -> Result<Arc<SessionKey>, RecordingError> {
        if let Some((key, used)) = self.current.get_mut(session)
            && *used < EVENTS_OF_KEY
        {
            *used += 1;
            return Ok(Arc::clone(key));
        }
        self.made += 1;
        let recipient = Recipient::from_pem(RECIPIENT.as_bytes()).expect("a recipient");
        let made = ContentKey::generate(self.epoch, self.made, session, unix_us(), &[recipient]);
        let (key, wrapped) = made.expect("a key can be wrapped");
        let path = self.folder.join(wrapped_key_file(self.made));
        storage::replace(self.storage.as_ref(), &path, &wrapped.encode())
            .map_err(|error| RecordingError::storage(&path, error).no_key())?;
        let key = SessionKey::of(key);
        key.settle(Ok(()));
        self.current.insert(session, (Arc::clone(&key), 1));
        Ok(key)
    }
}

impl Life {
    pub(crate) fn start(
        storage: &Arc<dyn Storage>,
        folder: &Path,
        bytes_max: u64,
        encrypts: bool,
    ) -> Result<Self, RecordingError> {
        let epoch = Epoch::create(storage.as_ref(), folder, "node-1", &[])?;
        epoch::mask_key(storage.as_ref(), folder)?;
        let id = epoch.id;
        let keys = encrypts.then(|| Keys {
            storage: Arc::clone(storage),
            folder: epoch.folder.clone(),
            epoch: id,
            made: 0,
            current: BTreeMap::new(),
        });
        let origin = Arc::new(Origin {
            node: "node-1".to_owned(),
            epoch: id.to_string(),
            tenant: None,
            clusters: Vec::new(),
            encryption: None,
        });
        let predecessor = epoch.predecessor.clone();
        let mut journal = Journal::create(
            Arc::clone(storage),
            folder.to_owned(),
            bytes_max,
            TUNING,
            epoch,
            Arc::clone(&origin),
            Arc::default(),
        )?;
        let started = Kind::AgentStarted { version: "1".to_owned(), predecessor };
        journal.commit(&[Append::behind(vec![origin.entry(None, Ids::default(), started)?])])?;
        Ok(Self { journal, origin, epoch: id, keys })
    }

    /// How far it is durable.
    pub(crate) fn durable(&self) -> Arc<DurablePosition> {
        Arc::clone(self.journal.durable())
    }

    /// Whether it says that it can record.
    pub(crate) fn is_failing(&self) -> bool {
        self.journal.failure().is_some()
    }

    /// A finding, or, where content is encrypted, every other time a piece of content.
    fn entry(&mut self, number: u64, bytes: usize) -> Result<Entry, RecordingError> {
        let (name, message) = (number.to_string(), "x".repeat(bytes));
        let session = SESSIONS[(number % 3) as usize];
        let ids = Ids { session, request: Some("r"), ..Ids::default() };
        let Some(keys) = self.keys.as_mut().filter(|_| number % 2 == 1) else {
            return self.origin.entry(None, ids, Kind::Finding { name, message, caller: None });
        };
        let (key, bytes) = (keys.of(session)?, Bytes::Text(format!("{name} {message}")));
        let content = Content { channel: Channel::RequestBody, connection: None, offset: 0, bytes };
        let content = key.encrypt(Place { session, request: "r" }, &content).expect("it can be encrypted");
        Ok(self.origin.entry(None, ids, Kind::Content(content))?.encrypted_with(&key))
    }

    /// Writes a group of events of these lengths, all or none of which hold; without its key none is tried.
    pub(crate) fn append(&mut self, ledger: &mut Ledger, lengths: &[usize]) -> Result<(), RecordingError> {
        let first = ledger.tried.len() as u64;
        let entries: Vec<_> =
            (first..).zip(lengths).map(|(n, bytes)| self.entry(n, *bytes)).collect::<Result<_, _>>()?;
        let numbers: Vec<_> = (first..).take(lengths.len()).map(|number| (self.epoch, number)).collect();
        ledger.tried.extend(&numbers);
        self.journal.commit(&[Append::behind(entries)])?;
        ledger.held.extend(&numbers);
        Ok(())
    }

    /// Ends in an orderly way.
    pub(crate) fn finish(self) -> Result<(), RecordingError> {
        self.journal.finish("test")
    }
}
