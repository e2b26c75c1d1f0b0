//! The threads that make wrapped keys durable, beside everything else: neither a request's task, nor a thread that masks, nor the
//! journal's writer waits for a key's file. What a key encrypted waits in its pod's lane of the queue until it is told here that the
//! file is on disk. Pods take turns, each with one file at a time: one that begins many sessions holds up itself.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use weir_common::encryption::wrapped_key_file;

use super::{
    encryption::SessionKey, error::RecordingError, jobs::Jobs, measures::Measures, queue::Queue, segment,
    share::Share,
};
use crate::storage::{self, Storage};

/// How many: while the disk hangs with one pod's file, another pod's is written.
const THREADS: usize = 2;

/// What the threads work on.
#[derive(Debug)]
pub(super) struct KeyFolder {
    pub(super) storage: Arc<dyn Storage>,
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
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Desk {
    at: KeyFolder,
    state: Mutex<State>,
    work: Condvar,
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
    wrapped: Vec<u8>,
    share: Arc<Share>,
}

impl KeyStore {
    pub(super) fn start(at: KeyFolder) -> io::Result<Self> {
        let desk = Arc::new(Desk { at, state: Mutex::default(), work: Condvar::new() });
        let mut threads = Vec::new();
        for number in 0..THREADS {
            let (desk, thread) = (Arc::clone(&desk), std::thread::Builder::new());
            threads.push(thread.name(format!("weir-keys-{number}")).spawn(move || desk.run())?);
        }
        Ok(Self { desk, threads: Mutex::new(threads) })
    }

    /// Why no key need be made just now: one failed a moment ago.
    pub(super) fn failure(&self) -> Option<RecordingError> {
        let state = self.desk.lock();
        let (error, at) = state.failure.as_ref()?;
        (at.elapsed() < self.desk.at.retry_interval).then(|| error.clone())
    }

    /// Has a new key stored; returns at once.
    pub(super) fn store(&self, key: Arc<SessionKey>, wrapped: Vec<u8>, share: &Arc<Share>) {
        // What it takes on disk is the pod's.
        share.charge(segment::whole_blocks(wrapped.len() as u64) as usize, Instant::now());
        let lane = share.lane;
        self.desk.lock().jobs.push(lane, Job { key, wrapped, share: Arc::clone(share) });
        self.desk.work.notify_one();
    }

    /// Where a key's file is.
    pub(super) fn path(&self, number: u64) -> PathBuf {
        self.desk.at.folder.join(wrapped_key_file(number))
    }

    /// Ends the threads when they have done what was handed to them, and waits for it.
    pub(super) fn stop(&self) {
        self.end();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread that stores keys panicked; what they encrypted is not recorded");
            }
        }
    }

    fn end(&self) {
        self.desk.lock().ends = true;
        self.desk.work.notify_all();
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

    fn run(&self) {
        let mut state = self.lock();
        loop {
            // The share stays until its key is counted.
            let Some((turn, Job { key, wrapped, share: _share })) = state.jobs.take() else {
                if state.ends && state.jobs.is_empty() {
                    return;
                }
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let stored = self.write(key.number(), &wrapped);
            let failure = stored.as_ref().err().map(|error| (error.clone(), Instant::now()));
            key.settle(stored);
            self.at.queue.keys_settled();
            state = self.lock();
            state.failure = failure;
            state.jobs.done(&turn);
            // The pod's next one may be another thread's, or the last one was what all wait for.
            self.work.notify_all();
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
