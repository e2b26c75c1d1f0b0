//! Events on their way to the journal: serialised by whoever makes them, numbered by the writer.
//!
//! The writer is one thread, so it should only number, hash and copy. An [`Entry`] therefore holds the finished JSON
//! behind the sequence; the writer puts the sequence in front of it.

use std::{
    cell::RefCell,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use tokio::sync::oneshot;
use weir_common::{
    event::{Kind, SCHEMA_VERSION},
    frame::VALUE_BYTES_MAX,
};

use super::{
    encryption::{Encryption, SessionKey, SessionKeys},
    error::RecordingError,
    gaps,
    share::Share,
};

/// What the JSON of every event starts with while its sequence is 0.
const UNNUMBERED: &[u8] = br#"{"schema":1,"sequence":0"#;

/// Most bytes that the number adds to an event: the digits of the largest sequence.
const NUMBER_BYTES_MAX: usize = 20;

const _: () = assert!(SCHEMA_VERSION == 1, "UNNUMBERED spells the version");

/// Now, in microseconds since the Unix epoch.
pub(super) fn unix_us() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX)
}

/// What every event of this process epoch bears.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) node: String,
    pub(super) epoch: String,
    pub(super) tenant: Option<String>,
    pub(super) clusters: Vec<String>,
    /// What encrypts content; none: it is recorded as it is.
    pub(super) encryption: Option<Encryption>,
}

/// The ids that an event bears.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ids<'a> {
    pub(super) session: &'a str,
    /// What content of it is encrypted with, where there may be some, and whose it is.
    pub(super) keys: Option<(&'a SessionKeys, &'a Arc<Share>)>,
    pub(super) invocation: Option<&'a str>,
    pub(super) request: Option<&'a str>,
}

/// An event without its number.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kafka_key: String,
    /// Name of its kind.
    pub(super) name: &'static str,
    /// When it happened.
    pub(super) time_unix_us: i64,
    /// What content in it is encrypted with, or a digest of content keyed with.
    key: Option<Arc<SessionKey>>,
    /// Whether there is content in it.
    is_content: bool,
    /// Which kind of gap record it is, if it is one.
    pub(super) gap: Option<usize>,
    /// Its JSON, with 0 for the number.
    json: Vec<u8>,
}

impl Origin {
    /// Name of a cluster; empty for events of the agent itself.
    pub(super) fn cluster(&self, index: Option<usize>) -> &str {
        index.and_then(|index| self.clusters.get(index)).map_or("", String::as_str)
    }

    /// Serialises an event. Every event passes here, so that no content is recorded in clear where it is to be encrypted.
    ///
    /// # Errors
    /// It is longer than a frame may be, or cannot be encrypted.
    pub(super) fn entry(
        &self,
        cluster: Option<usize>,
        ids: Ids<'_>,
        kind: Kind,
    ) -> Result<Entry, RecordingError> {
        let (name, time_unix_us, is_content) = (kind.name(), unix_us(), matches!(kind, Kind::Content(_)));
        let gap = gaps::kind(&kind);
        let (kind, key) = match &self.encryption {
            Some(encryption) => encryption.protect(ids, kind)?,
            None => (kind, None),
        };
        let event = Borrowed {
            schema: SCHEMA_VERSION,
            sequence: 0,
            time_unix_us,
            cluster: self.cluster(cluster),
            tenant: self.tenant.as_deref(),
            node: &self.node,
            epoch: &self.epoch,
            session: ids.session,
            invocation: ids.invocation,
            request: ids.request,
            kind: &kind,
        };
        let json = event.json();
        if !json.starts_with(UNNUMBERED) || json.len() + NUMBER_BYTES_MAX > VALUE_BYTES_MAX {
            return Err(RecordingError::TooLong { bytes: json.len() });
        }
        Ok(Entry { kafka_key: ids.session.to_owned(), name, time_unix_us, key, is_content, gap, json })
    }
}

/// [`weir_common::event::Event`] as it is written: each event of a request bears the same names, which need not be copied for that.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Borrowed<'a> {
    schema: u32,
    sequence: u64,
    time_unix_us: i64,
    cluster: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<&'a str>,
    node: &'a str,
    epoch: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    session: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    invocation: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<&'a str>,
    #[serde(flatten)]
    kind: &'a Kind,
}

fn is_empty(text: &&str) -> bool {
    text.is_empty()
}

thread_local! {
    /// Where events are written first: one that grows as it is written is moved again and again.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// More of the scratch room than this is not kept.
const SCRATCH_BYTES_MAX: usize = 32 * 1024;

impl Borrowed<'_> {
    /// Its JSON, in no more memory than that takes: what waits is counted by its length. Nothing, if it cannot be serialised, as which it
    /// is then refused: maps have string keys, and nothing else fails.
    fn json(&self) -> Vec<u8> {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.clear();
            let written = serde_json::to_writer(&mut *scratch, self);
            let json = written.map(|()| scratch.as_slice().to_vec()).unwrap_or_default();
            scratch.clear();
            scratch.shrink_to(SCRATCH_BYTES_MAX);
            json
        })
    }
}

impl Entry {
    /// The event with its number between what comes before and behind it: the bytes for Kafka.
    pub(super) fn value<'a>(&'a self, sequence: &'a str) -> [&'a [u8]; 3] {
        let (before, behind) = (UNNUMBERED.len() - 1, UNNUMBERED.len());
        [&self.json[..before], sequence.as_bytes(), &self.json[behind..]]
    }

    /// Number of the key that content in it is encrypted with; 0: none is.
    pub(super) fn key_id(&self) -> u64 {
        self.key.as_ref().map_or(0, |key| key.number())
    }

    /// Its length, near enough for limits.
    pub(super) fn bytes(&self) -> usize {
        self.json.len()
    }

    /// Whether nobody will ever read what it holds: its key is not stored.
    fn is_lost(&self) -> bool {
        self.is_content && self.key.as_ref().is_some_and(|key| matches!(key.stored(), Some(Err(_))))
    }

    /// One of a length, which costs nothing to make.
    #[cfg(test)]
    pub(super) fn of_length(bytes: usize) -> Self {
        let (name, json) = ("gap", vec![0; UNNUMBERED.len() + bytes]);
        Self {
            kafka_key: String::new(),
            name,
            time_unix_us: 0,
            key: None,
            is_content: false,
            gap: None,
            json,
        }
    }

    /// The same, as if it were content that `key` encrypted.
    #[cfg(test)]
    pub(super) fn encrypted_with(self, key: &Arc<SessionKey>) -> Self {
        Self { key: Some(Arc::clone(key)), is_content: true, ..self }
    }
}

/// Whether any of them has content whose key is not on disk.
pub(super) fn await_key(entries: &[Entry]) -> bool {
    let of_content = entries.iter().filter(|entry| entry.is_content);
    of_content.filter_map(|entry| entry.key.as_ref()).any(|key| !matches!(key.stored(), Some(Ok(()))))
}

/// Tells whoever waits whether events are durable.
pub(super) type Waiter = oneshot::Sender<Result<(), RecordingError>>;

/// Events that go to the journal together, and who waits for them.
#[derive(Debug)]
pub(super) struct Append {
    pub(super) entries: Vec<Entry>,
    /// Told when all of them are durable, or why not.
    pub(super) waiter: Option<Waiter>,
    /// Since when they wait.
    pub(super) since: Instant,
    /// Whose they are; none: the agent's own.
    pub(super) share: Option<Arc<Share>>,
    /// Id of the request whose other events they do not come before.
    pub(super) request: Option<Arc<str>>,
}

impl Append {
    /// Events that nobody waits for: durable within the bound.
    pub(super) fn behind(entries: Vec<Entry>) -> Self {
        Self { entries, waiter: None, since: Instant::now(), share: None, request: None }
    }

    /// Events that somebody waits for.
    pub(super) fn durable(entries: Vec<Entry>) -> (Self, oneshot::Receiver<Result<(), RecordingError>>) {
        let (waiter, result) = oneshot::channel();
        (Self::behind(entries).told_to(Some(waiter)), result)
    }

    /// The same, told to `waiter`.
    pub(super) fn told_to(self, waiter: Option<Waiter>) -> Self {
        Self { waiter, ..self }
    }

    /// The same, of a pod.
    pub(super) fn of(self, share: &Arc<Share>) -> Self {
        Self { share: Some(Arc::clone(share)), ..self }
    }

    /// The same, of a request of that pod.
    pub(super) fn of_request(self, share: &Arc<Share>, request: &Arc<str>) -> Self {
        Self { request: Some(Arc::clone(request)), ..self.of(share) }
    }

    /// Number of a key that is needed, and of which is not known yet whether it will be on disk.
    pub(super) fn awaited_key(&self) -> Option<u64> {
        self.keys().find(|key| key.stored().is_none()).map(|key| key.number())
    }

    /// Why one of their keys will not be on disk.
    ///
    /// # Errors
    /// One will not be.
    pub(super) fn keys_stored(&self) -> Result<(), RecordingError> {
        self.keys().filter_map(|key| key.stored()).find(|stored| stored.is_err()).cloned().unwrap_or(Ok(()))
    }

    fn keys(&self) -> impl Iterator<Item = &Arc<SessionKey>> {
        self.entries.iter().filter_map(|entry| entry.key.as_ref())
    }

    /// Takes out content whose key is not stored; how many events that were. What is said of a request without its content is
    /// recorded all the same, with digests that nobody can compute.
    pub(super) fn without_lost(&mut self) -> u64 {
        let before = self.entries.len();
        self.entries.retain(|entry| !entry.is_lost());
        (before - self.entries.len()) as u64
    }

    /// Their length.
    pub(super) fn bytes(&self) -> usize {
        self.entries.iter().map(Entry::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use weir_common::event::{Bytes, Channel, Content, Event, Kind, SCHEMA_VERSION};

    use super::Borrowed;

    /// Both have the same fields in the same order.
    #[test]
    fn an_event_is_written_as_its_schema_has_it() {
        let gap = Kind::Gap { reason: "lost".into(), events: Some(1), bytes: None };
        let text = "long ".repeat(20_000);
        let content = Content {
            channel: Channel::ResponseBody,
            connection: None,
            offset: 7,
            bytes: Bytes::from_slice(text.as_bytes()),
        };
        for (kind, optional) in [(gap, None), (Kind::Content(content), Some("one".to_owned()))] {
            let event = Event {
                schema: SCHEMA_VERSION,
                sequence: 0,
                time_unix_us: 1_790_000_000_000_000,
                cluster: "c".into(),
                tenant: optional.clone(),
                node: "n\"".into(),
                epoch: "e".into(),
                session: optional.clone().unwrap_or_default(),
                invocation: optional.clone(),
                request: optional.clone(),
                kind,
            };
            let borrowed = Borrowed {
                schema: event.schema,
                sequence: event.sequence,
                time_unix_us: event.time_unix_us,
                cluster: &event.cluster,
                tenant: event.tenant.as_deref(),
                node: &event.node,
                epoch: &event.epoch,
                session: &event.session,
                invocation: event.invocation.as_deref(),
                request: event.request.as_deref(),
                kind: &event.kind,
            };
            let json = borrowed.json();
            assert_eq!(json, serde_json::to_vec(&event).unwrap());
            assert_eq!(json.capacity(), json.len());
        }
    }
}
