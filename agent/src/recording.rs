//! Recording: sessions and invocations, masks, the journal.
//!
//! The proxy opens a [`RequestRecord`] for each request and feeds it; it never sees frames or files. Three kinds of
//! threads share the work: the proxy's tasks make events, the workers decode and mask what was tapped, one writer
//! numbers, frames and commits. Nothing unmasked reaches the writer.

mod admission;
mod arguments;
mod automaton;
mod body;
mod bounded;
mod cbor;
mod claims;
#[cfg(test)]
mod commit_tests;
mod committed;
mod content;
mod cut_json;
mod desk;
mod draft;
#[cfg(test)]
mod durability_tests;
mod durable;
mod emergency;
mod encoding;
mod encryption;
mod entry;
mod epoch;
mod error;
#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod flood_tests;
mod frames;
mod gaps;
mod gzip;
mod held;
mod jobs;
mod journal;
mod key_store;
#[cfg(test)]
pub(crate) mod ledger;
mod lenient_json;
mod mask;
mod masking;
mod masks;
mod measures;
mod names;
mod opening;
mod patterns;
mod plan;
#[doc(hidden)]
pub mod probe;
mod protobuf;
#[cfg(test)]
mod protobuf_tests;
mod queue;
mod quoted;
mod request;
#[cfg(test)]
mod rule_tests;
mod schema;
mod segment;
mod session;
mod share;
mod sieve;
mod split;
#[cfg(test)]
mod tests;
mod throttle;
mod tuning;
mod upgraded;
#[cfg(test)]
mod upgraded_tests;
mod walk;
mod wire;
mod worker;
mod writer;
mod zstd;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderMap, Method};
use weir_common::{
    attributes::Attributes,
    event::{Caller, Coverage, Identity, Kind},
};

use self::{
    admission::Unacknowledged,
    emergency::Emergency,
    encryption::Encryption,
    entry::{Append, Ids, Origin},
    epoch::Epoch,
    journal::Journal,
    key_store::{KeyFolder, KeyStore},
    mask::Masker,
    masking::Masking,
    measures::Measures,
    queue::Queue,
    session::Sessions,
    share::Shares,
    throttle::Throttle,
    tuning::Tuning,
    worker::Workers,
    writer::Status,
};
pub use self::{
    committed::Committed,
    durable::{Durable, DurablePosition},
    error::RecordingError,
    key_store::KeyService,
    masks::{ENVIRONMENT, FieldMask, MASK_BYTES_MAX, MASKS_MAX, MaskError, MaskRules, Masks},
    measures::{BEHIND_BOUNDS, Measured, SYNC_BOUNDS},
    plan::{BacklogLimits, Bodies, Commit, CommitRule, CommitRules, Resources, Streams, WhenBehind},
    queue::COMMIT_BEHIND_MS,
    request::RequestRecord,
    share::PodQuota,
    tuning::IDLE_CHECKPOINT_INTERVAL,
};
pub(crate) use self::{durable::has_ended, epoch::CHECKPOINT_FILE};
use crate::{
    recipients,
    storage::{FileSystem, Storage},
};

/// Most bytes of a journal, unless it is configured.
pub const JOURNAL_BYTES_MAX: u64 = 8 * 1024 * 1024 * 1024;
/// Most bytes of a read's response that are recorded, unless it is configured.
pub const RESPONSE_BYTES_MAX: usize = 1024 * 1024;
/// A session ends after this time without a request, unless it is configured.
pub const SESSION_IDLE_TIMEOUT: Duration = Duration::from_secs(1800);

/// A body that no mask has seen. It cannot be serialised, and its `Debug` shows only its length.
pub struct Unmasked(pub Bytes);

impl std::fmt::Debug for Unmasked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unmasked({} bytes)", self.0.len())
    }
}

/// Where and how to record.
#[derive(Debug, Clone)]
pub struct RecorderOptions {
    /// Folder of the journal; each process epoch makes its own folder in it.
    pub directory: PathBuf,
    /// Most bytes of all segments of this journal; beyond that, recording refuses.
    pub journal_bytes_max: u64,
    /// Name of the node (or host).
    pub node: String,
    /// Tenant for every event.
    pub tenant: Option<String>,
    /// Names of the clusters, by index.
    pub clusters: Vec<String>,
    /// Most bytes of a read's response that are recorded, per request.
    pub response_bytes_max: usize,
    /// A session ends after this time without a request.
    pub session_idle_timeout: Duration,
    /// Ed25519 keys (PKCS#8, PEM) that all sign checkpoints; without any each epoch makes its own and publishes only
    /// its public half.
    pub signing_key_files: Vec<PathBuf>,
    /// X25519 public keys (PEM) of whoever may read bodies and streams; without any they are recorded in clear.
    pub recipient_files: Vec<PathBuf>,
    /// What wraps keys for whoever may read, beside those.
    pub key_service: Option<Arc<dyn KeyService>>,
    /// Time between checkpoints while nothing is recorded.
    pub idle_checkpoint_interval: Duration,
    /// How requests are committed.
    pub rules: CommitRules,
    /// What one pod may take.
    pub pod_quota: PodQuota,
}

impl RecorderOptions {
    /// The defaults, for a journal in `directory` of what `node` does with `clusters`.
    pub fn new(directory: PathBuf, node: String, clusters: Vec<String>) -> Self {
        Self {
            directory,
            journal_bytes_max: JOURNAL_BYTES_MAX,
            node,
            tenant: None,
            clusters,
            response_bytes_max: RESPONSE_BYTES_MAX,
            session_idle_timeout: SESSION_IDLE_TIMEOUT,
            signing_key_files: Vec::new(),
            recipient_files: Vec::new(),
            key_service: None,
            idle_checkpoint_interval: IDLE_CHECKPOINT_INTERVAL,
            rules: CommitRules::default(),
            pod_quota: PodQuota::UNLIMITED,
        }
    }
}

/// A request as the proxy knows it when it arrives.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// HTTP method.
    pub method: &'a Method,
    /// Path and query.
    pub uri: &'a http::Uri,
    /// HTTP version.
    pub version: http::Version,
    /// Headers as the client sent them; recording masks credentials.
    pub headers: &'a HeaderMap,
    /// What it means.
    pub attributes: &'a Attributes,
    /// The protocol it asks to upgrade to.
    pub upgrade: Option<&'a str>,
    /// Who it is for, where that is known.
    pub identity: Option<&'a Identity>,
}

/// Records what one agent process sees. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Recorder {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    origin: Arc<Origin>,
    throttle: Throttle,
    queue: Arc<Queue>,
    status: Arc<Status>,
    measures: Arc<Measures>,
    durable: Arc<DurablePosition>,
    workers: Arc<Workers>,
    /// By cluster; the last one is for events of the agent itself.
    maskers: Vec<Masker>,
    sessions: Mutex<SessionTable>,
    response_bytes_max: usize,
    rules: ArcSwap<CommitRules>,
    shares: Shares,
    masking: Masking,
    emergency: Arc<Emergency>,
    unacknowledged: Unacknowledged,
    journal_bytes_max: u64,
    folder: PathBuf,
    writer: Mutex<Option<JoinHandle<Result<(), RecordingError>>>>,
}

#[derive(Debug)]
struct SessionTable {
    sessions: Sessions,
    /// [`Status::losses`] when the table was valid: later losses may have taken the beginnings of sessions.
    losses: u64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.close("the recorder was dropped");
    }
}

impl Recorder {
    /// Opens a new epoch in `options.directory` and starts the writer.
    ///
    /// # Errors
    /// The folder cannot be made, locked or written.
    pub fn start(options: RecorderOptions) -> Result<Self, RecordingError> {
        let tuning = Tuning { idle_interval: options.idle_checkpoint_interval, ..Tuning::default() };
        Self::start_on(Arc::new(FileSystem), options, tuning)
    }

    fn start_on(
        storage: Arc<dyn Storage>,
        options: RecorderOptions,
        tuning: Tuning,
    ) -> Result<Self, RecordingError> {
        // Before anything is made: one that cannot be read leaves nothing behind.
        let recipients = recipients::read_all(&options.recipient_files)?;
        let keys = &options.signing_key_files;
        let epoch = Epoch::create(storage.as_ref(), &options.directory, &options.node, keys)?;
        let mask_key = epoch::mask_key(storage.as_ref(), &options.directory)?;
        let names = options.clusters.iter().map(String::as_str).chain([""]);
        let maskers = names.map(|name| Masker::for_cluster(&mask_key, name)).collect();
        let started = Kind::AgentStarted {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            predecessor: epoch.predecessor.clone(),
        };
        let thread = |error| RecordingError::Thread(Arc::new(error));
        let (queue, measures) = (Arc::new(Queue::default()), Arc::new(Measures::default()));
        let mut encryption = None;
        if !recipients.is_empty() || options.key_service.is_some() {
            let store = KeyStore::start(KeyFolder {
                storage: Arc::clone(&storage),
                service: options.key_service,
                folder: epoch.folder.clone(),
                queue: Arc::clone(&queue),
                measures: Arc::clone(&measures),
                journal: (options.directory.clone(), options.journal_bytes_max),
                retry_interval: tuning.retry_interval,
            });
            encryption = Some(Encryption::new(epoch.id, recipients, store.map_err(thread)?));
        }
        let origin = Arc::new(Origin {
            encryption,
            node: options.node,
            epoch: epoch.id.to_string(),
            tenant: options.tenant,
            clusters: options.clusters,
        });
        let folder = epoch.folder.clone();
        let mut journal = Journal::create(
            storage,
            options.directory,
            options.journal_bytes_max,
            tuning,
            epoch,
            Arc::clone(&origin),
            Arc::clone(&measures),
        )?;
        // In the caller's thread, so that a journal that cannot be written is known at the start.
        journal.commit(&[Append::behind(vec![origin.entry(None, Ids::default(), started)?])])?;
        let status = Arc::new(Status::default());
        let workers = Arc::new(Workers::start().map_err(thread)?);
        let durable = Arc::clone(journal.durable());
        let (its_queue, its_status) = (Arc::clone(&queue), Arc::clone(&status));
        let writer = writer::start(journal, its_queue, its_status, Arc::clone(&measures)).map_err(thread)?;
        let sessions = Sessions::new(options.session_idle_timeout);
        let inner = Inner {
            origin,
            queue,
            status,
            measures,
            durable,
            workers,
            maskers,
            sessions: Mutex::new(SessionTable { sessions, losses: 0 }),
            response_bytes_max: options.response_bytes_max,
            throttle: Throttle::default(),
            rules: ArcSwap::from_pointee(options.rules),
            shares: Shares::new(options.pod_quota),
            masking: Masking::default(),
            emergency: Arc::default(),
            unacknowledged: Unacknowledged::default(),
            journal_bytes_max: options.journal_bytes_max,
            folder,
            writer: Mutex::new(Some(writer)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The folder of this epoch's journal.
    pub fn folder(&self) -> &std::path::Path {
        &self.inner.folder
    }

    /// Why recording is not possible just now; none while all is well.
    pub fn failure(&self) -> Option<RecordingError> {
        self.inner.status.failure()
    }

    /// What is counted of recording.
    pub fn measured(&self) -> Measured {
        let inner = &self.inner;
        let failure = inner.status.failure().map(|failure| failure.for_client());
        let measured = inner.measures.read(inner.queue.backlog_bytes(), failure);
        Measured {
            used: (measured.used.0, inner.journal_bytes_max),
            emergency: inner.emergency.left(Instant::now()),
            emergency_requests: inner.emergency.requests(),
            async_mutations: inner.rules.load().async_mutations,
            ..measured
        }
    }

    fn masker(&self, cluster: Option<usize>) -> Masker {
        let Inner { maskers, rules, .. } = &*self.inner;
        let last = maskers.len() - 1;
        maskers[cluster.unwrap_or(last).min(last)].by(&rules.load().masks)
    }

    /// Records a connection that never became a request. What one pod has of them beyond a rate is recorded as a number.
    pub fn connection_refused(&self, cluster: Option<usize>, caller: Option<&Arc<Caller>>, reason: &str) {
        self.inner.measures.connection_refused();
        if !self.inner.throttle.admits(caller.map(Arc::as_ref), Instant::now()) {
            return;
        }
        let caller = caller.map(|caller| Box::new(self.masker(cluster).caller(caller)));
        self.agent_event(cluster, Kind::ConnectionRefused { reason: reason.to_owned(), caller });
    }

    /// Records something an operator should know; `name` is stable, `message` says the mend. Each is recorded: a pod must not
    /// hide one of its own behind refused connections. Who calls this bounds how often.
    pub fn finding(&self, cluster: Option<usize>, caller: Option<&Arc<Caller>>, name: &str, message: &str) {
        self.inner.measures.finding(name);
        let caller = caller.map(|caller| Box::new(self.masker(cluster).caller(caller)));
        let (name, message) = (name.to_owned(), message.to_owned());
        self.agent_event(cluster, Kind::Finding { name, message, caller });
    }

    /// Records how many events were not recorded one by one.
    fn record_throttled(&self) {
        for (of, events) in self.inner.throttle.take(Instant::now()) {
            let reason = format!("refused connections of {of} came too fast to be recorded one by one");
            self.agent_event(None, Kind::Gap { reason, events: Some(events), bytes: None });
        }
    }

    /// Records what the kernel counted against what was proxied, and what was not recorded one by one. Where no pod did anything there is
    /// nothing to record: that there was nothing the checkpoints prove which are signed meanwhile.
    pub fn coverage(&self, coverage: Coverage) {
        self.record_throttled();
        if coverage.pods.is_empty() && coverage.pods_left_out == 0 {
            return;
        }
        self.agent_event(None, Kind::Coverage(Box::new(coverage)));
    }

    fn agent_event(&self, cluster: Option<usize>, kind: Kind) {
        if let Ok(entry) = self.inner.origin.entry(cluster, Ids::default(), kind) {
            self.inner.queue.push_or_drop(Append::behind(vec![entry]));
        }
    }

    /// Writes what is queued, a last checkpoint and `AgentStopped`, and waits for the writer.
    ///
    /// # Errors
    /// The last writes failed.
    pub async fn stop(&self, reason: &str) -> Result<(), RecordingError> {
        self.record_throttled();
        let (inner, reason) = (Arc::clone(&self.inner), reason.to_owned());
        let stopped = tokio::task::spawn_blocking(move || {
            // First the workers: what they still hold goes into the queue.
            inner.workers.stop();
            inner.queue.close(&reason);
            let writer = inner.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
            let written = writer.map(JoinHandle::join);
            // Last: the writer has waited for what it holds back.
            inner.origin.encryption.iter().for_each(Encryption::stop);
            match written {
                Some(Ok(result)) => result,
                Some(Err(_)) | None => Err(RecordingError::Closed),
            }
        });
        stopped.await.unwrap_or(Err(RecordingError::Closed))
    }
}
