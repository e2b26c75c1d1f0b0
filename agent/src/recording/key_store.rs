//! Makes wrapped keys durable, beside everything else: neither a request's task, nor a thread that masks, nor the journal's writer
//! waits for a key's file. What a key encrypted waits in its pod's lane of the queue until it is told here that the file is on disk.
//! Pods take turns, each with one key at a time: one that begins many sessions, or whose file hangs, holds up itself.
//!
//! One thread with a runtime of its own asks the key service, if there is one, to wrap keys as well, those of many pods at a time, and hands
//! the files to threads that come with the need for them, and go.

use std::{
    collections::HashMap,
    fmt, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use tokio::{
    runtime::Builder,
    sync::{Notify, Semaphore},
    task::{JoinSet, spawn_blocking},
};
use weir_common::{
    encryption::{Secret, WrappedKey, wrapped_key_file},
    kms::{Kms, KmsError},
};

use super::{
    encryption::SessionKey,
    error::RecordingError,
    jobs::{Jobs, Turn},
    measures::Measures,
    queue::Queue,
    segment,
    share::Share,
};
use crate::storage::{self, Storage};

/// Pods whose files may hang before another pod's key waits for them.
const FILES_MAX: usize = 16;

/// Keys that the service is asked for at a time.
const CALLS_MAX: usize = 64;

/// Wraps keys beside their recipients, or instead of them.
pub trait KeyService: fmt::Debug + Send + Sync {
    /// What wrapped keys call its key.
    fn name(&self) -> &str;

    /// Wraps a key, bound to `context`; with bounded waits.
    fn wrap<'a>(
        &'a self,
        secret: &'a Secret,
        context: HashMap<String, String>,
    ) -> BoxFuture<'a, Result<Vec<u8>, KmsError>>;
}

impl KeyService for Kms {
    fn name(&self) -> &str {
        self.key().as_str()
    }

    fn wrap<'a>(
        &'a self,
        secret: &'a Secret,
        context: HashMap<String, String>,
    ) -> BoxFuture<'a, Result<Vec<u8>, KmsError>> {
        Box::pin(self.wrap(secret.as_bytes(), context))
    }
}

/// What is worked on.
#[derive(Debug)]
pub(super) struct KeyFolder {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) service: Option<Arc<dyn KeyService>>,
    /// The epoch's.
    pub(super) folder: PathBuf,
    pub(super) queue: Arc<Queue>,
    pub(super) measures: Arc<Measures>,
    /// The journal's folder, and most bytes of it.
    pub(super) journal: (PathBuf, u64),
    /// Time between attempts after a failure.
    pub(super) retry_interval: Duration,
}

/// See the module.
#[derive(Debug)]
pub(super) struct KeyStore {
    desk: Arc<Desk>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Desk {
    at: KeyFolder,
    state: Mutex<State>,
    work: Notify,
    calls: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    jobs: Jobs<Job>,
    /// Why the last one could not be stored, and when that was.
    failure: Option<(RecordingError, Instant)>,
    ends: bool,
}

#[derive(Debug)]
struct Job {
    key: Arc<SessionKey>,
    wrapped: WrappedKey,
    secret: Secret,
    share: Arc<Share>,
}

/// A key whose turn it is. However its task ends, all are told, and its pod has its next turn.
#[derive(Debug)]
struct UnderWay {
    desk: Arc<Desk>,
    turn: Turn,
    job: Job,
    stored: Result<(), RecordingError>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let stored = std::mem::replace(&mut self.stored, Ok(()));
        let failure = stored.as_ref().err().map(|error| (error.clone(), Instant::now()));
        // Before anybody is told, so that who is refused does not find the old state.
        let before = std::mem::replace(&mut self.desk.lock().failure, failure);
        if let (Err(error), None) = (&stored, before) {
            tracing::warn!(
                event = "content-key-not-stored",
                why = causes(error),
                "a key of recorded content is not stored"
            );
        }
        self.job.key.settle(stored);
        self.desk.at.queue.key_settled(self.job.key.number());
        self.desk.lock().jobs.done(&self.turn);
        self.desk.work.notify_one();
    }
}

impl KeyStore {
    pub(super) fn start(at: KeyFolder) -> io::Result<Self> {
        let (work, calls) = (Notify::new(), Semaphore::new(CALLS_MAX));
        let desk = Arc::new(Desk { at, state: Mutex::default(), work, calls });
        let mut runtime = Builder::new_current_thread();
        let runtime =
            runtime.enable_all().max_blocking_threads(FILES_MAX).thread_name("weir-key-file").build()?;
        let (works, thread) = (Arc::clone(&desk), std::thread::Builder::new().name("weir-keys".to_owned()));
        let thread = thread.spawn(move || runtime.block_on(works.run()))?;
        Ok(Self { desk, thread: Mutex::new(Some(thread)) })
    }

    /// Why no key need be made just now: one failed a moment ago; or the service did not wrap the last one, and is being tried with
    /// another: then nobody else waits for it.
    pub(super) fn failure(&self) -> Option<RecordingError> {
        let state = self.desk.lock();
        let (error, at) = state.failure.as_ref()?;
        let is_tried = error.is_of_key_service() && !state.jobs.is_empty();
        (is_tried || at.elapsed() < self.desk.at.retry_interval).then(|| error.clone())
    }

    /// Has a new key stored; returns at once.
    pub(super) fn store(
        &self,
        key: Arc<SessionKey>,
        (wrapped, secret): (WrappedKey, Secret),
        share: &Arc<Share>,
    ) {
        let job = Job { key, wrapped, secret, share: Arc::clone(share) };
        self.desk.lock().jobs.push(share.lane, job);
        self.desk.work.notify_one();
    }

    /// Where a key's file is.
    pub(super) fn path(&self, number: u64) -> PathBuf {
        self.desk.at.folder.join(wrapped_key_file(number))
    }

    /// Ends the thread when it has done what was handed to it, and waits for it.
    pub(super) fn stop(&self) {
        self.end();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(
                event = "recorder-panicked",
                "the thread that stores keys panicked; what they encrypted is not recorded"
            );
        }
    }

    fn end(&self) {
        self.desk.lock().ends = true;
        self.desk.work.notify_one();
    }
}

impl Drop for KeyStore {
    fn drop(&mut self) {
        self.end();
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>) {
        let mut under_way = JoinSet::new();
        loop {
            let (next, is_over) = {
                let mut state = self.lock();
                let next = state.jobs.take();
                let is_over = next.is_none() && state.ends && state.jobs.is_empty();
                (next, is_over)
            };
            match next {
                Some((turn, job)) => {
                    let stored = Err(RecordingError::Closed);
                    under_way.spawn(UnderWay { desk: Arc::clone(&self), turn, job, stored }.store());
                }
                None if is_over => return,
                None => self.work.notified().await,
            }
            while let Some(ended) = under_way.try_join_next() {
                if ended.is_err() {
                    tracing::error!(
                        event = "recorder-panicked",
                        "a task that stores a key panicked; what it encrypted is not recorded"
                    );
                }
            }
        }
    }

    fn write(&self, number: u64, wrapped: &[u8]) -> Result<(), RecordingError> {
        let KeyFolder { storage, folder, measures, journal, .. } = &self.at;
        let (bytes, (directory, bytes_max)) = (segment::whole_blocks(wrapped.len() as u64), journal);
        if measures.used().saturating_add(bytes) > *bytes_max {
            return Err(RecordingError::Full { path: directory.clone(), bytes_max: *bytes_max });
        }
        measures.use_more(bytes);
        let path = folder.join(wrapped_key_file(number));
        storage::replace(storage.as_ref(), &path, wrapped).map_err(|error| {
            measures.use_less(bytes);
            RecordingError::storage(&path, error)
        })
    }
}

impl UnderWay {
    async fn store(mut self) {
        self.stored = self.wrap_and_write().await;
    }

    async fn wrap_and_write(&self) -> Result<(), RecordingError> {
        let (desk, Job { key, wrapped, secret, share }) = (Arc::clone(&self.desk), &self.job);
        let mut wrapped = wrapped.clone();
        if let Some(service) = &desk.at.service {
            // Never closed.
            let _call = desk.calls.acquire().await;
            // What waited while it was not to be had is not tried one by one.
            let failed = desk.lock().failure.clone().filter(|(error, at)| {
                error.is_of_key_service() && key.made() < *at && at.elapsed() < desk.at.retry_interval
            });
            if let Some((error, _)) = failed {
                return Err(error);
            }
            let by_service = service.wrap(secret, wrapped.context()).await;
            let by_service = by_service.map_err(|error| RecordingError::KeyService(error).no_key())?;
            wrapped = wrapped.with_kms(service.name(), &by_service);
        }
        let (wrapped, number) = (wrapped.encode(), key.number());
        // What it takes on disk is the pod's.
        share.charge(segment::whole_blocks(wrapped.len() as u64) as usize, Instant::now());
        let written = spawn_blocking(move || desk.write(number, &wrapped)).await;
        written.unwrap_or(Err(RecordingError::Closed)).map_err(RecordingError::no_key)
    }
}

/// An error with what it comes from.
fn causes(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
