//! The threads beside the forwarding path: they decode, mask and split what requests tapped.
//!
//! A request stays with one thread, so its pieces keep their order. What waits for a thread is bounded by bytes, for
//! all requests together and for each one; what does not fit is lost with a gap record, never delayed.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

use bytes::Bytes;
use weir_common::event::{Channel, Kind, RequestClosed};

use super::{
    body::Sensitivity,
    content::{self, Held, Streamed},
    entry::{Append, Entry, Ids, Origin},
    mask::Masker,
    queue::Queue,
};

/// Most bytes that all requests together hold for the threads.
const TAPPED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Most bytes that one streamed response holds for its thread.
const STREAMED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most threads.
const THREADS_MAX: usize = 4;

/// Bytes in use, against a limit.
#[derive(Debug, Default)]
pub(super) struct Budget(AtomicUsize);

impl Budget {
    /// Takes `bytes` if the limit allows.
    fn take(&self, bytes: usize, bytes_max: usize) -> bool {
        let add = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= bytes_max);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
    }

    fn give(&self, bytes: usize) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What events of one request need.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) origin: Arc<Origin>,
    pub(super) queue: Arc<Queue>,
    pub(super) workers: Arc<Workers>,
    pub(super) worker: usize,
    pub(super) masker: Arc<Masker>,
    pub(super) sensitivity: Sensitivity,
    pub(super) cluster: usize,
    pub(super) session: Arc<str>,
    pub(super) invocation: Option<Arc<str>>,
    pub(super) request: Arc<str>,
    /// Set when a streamed response begins; only its thread locks it then.
    pub(super) streamed: Mutex<Option<Streamed>>,
    /// Bytes of the streamed response that wait.
    pub(super) waiting: Budget,
}

impl Context {
    /// Serialises an event of this request. One that is too long for a frame becomes a gap that says so.
    pub(super) fn entry(&self, kind: Kind) -> Option<Entry> {
        let ids = Ids {
            session: &self.session,
            invocation: self.invocation.as_deref(),
            request: Some(&self.request),
        };
        let cluster = Some(self.cluster);
        let made = self.origin.entry(cluster, ids, kind).or_else(|error| {
            let gap = Kind::Gap { reason: error.to_string(), events: Some(1), bytes: None };
            self.origin.entry(cluster, ids, gap)
        });
        made.ok()
    }

    fn entries(&self, kinds: Vec<Kind>) -> Vec<Entry> {
        kinds.into_iter().filter_map(|kind| self.entry(kind)).collect()
    }

    fn append(&self, kinds: Vec<Kind>) {
        if !kinds.is_empty() {
            // After the end of the recorder nothing can be recorded; the request stays open in the record.
            let _ = self.queue.push_blocking(Append::behind(self.entries(kinds)));
        }
    }
}

/// How a request ended, and what was held of its response.
#[derive(Debug)]
pub(super) struct Closing {
    pub(super) closed: RequestClosed,
    pub(super) body: Option<Held>,
    /// Bytes that `body` takes of the budget.
    pub(super) held_bytes: usize,
}

enum Job {
    Piece(Arc<Context>, Bytes),
    Lost(Arc<Context>, u64),
    Close(Arc<Context>, Box<Closing>),
    Stop,
}

/// The threads and what waits for them.
#[derive(Debug)]
pub(super) struct Workers {
    senders: Vec<Sender<Job>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    tapped: Budget,
    next: AtomicUsize,
}

impl Workers {
    pub(super) fn start() -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (mut senders, mut threads) = (Vec::new(), Vec::new());
        for number in 0..cores.div_ceil(2).min(THREADS_MAX) {
            let (sender, receiver) = channel();
            let thread = std::thread::Builder::new().name(format!("weir-mask-{number}"));
            threads.push(thread.spawn(move || run(&receiver))?);
            senders.push(sender);
        }
        Ok(Self {
            senders,
            threads: Mutex::new(threads),
            tapped: Budget::default(),
            next: AtomicUsize::new(0),
        })
    }

    /// The thread for the next request.
    pub(super) fn assign(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % self.senders.len().max(1)
    }

    /// Takes budget to hold `bytes` of a response.
    pub(super) fn hold(&self, bytes: usize) -> bool {
        self.tapped.take(bytes, TAPPED_BYTES_MAX)
    }

    /// Gives it back.
    pub(super) fn release(&self, bytes: usize) {
        self.tapped.give(bytes);
    }

    /// Hands on a piece of a streamed response; false if it does not fit.
    pub(super) fn piece(&self, context: &Arc<Context>, bytes: &Bytes) -> bool {
        if !context.waiting.take(bytes.len(), STREAMED_BYTES_MAX) {
            return false;
        }
        if !self.hold(bytes.len()) {
            context.waiting.give(bytes.len());
            return false;
        }
        self.send(context.worker, Job::Piece(Arc::clone(context), bytes.clone()));
        true
    }

    /// Says that pieces did not fit.
    pub(super) fn lost(&self, context: &Arc<Context>, bytes: u64) {
        self.send(context.worker, Job::Lost(Arc::clone(context), bytes));
    }

    /// Hands on the end of a request.
    pub(super) fn close(&self, context: &Arc<Context>, closing: Closing) {
        self.send(context.worker, Job::Close(Arc::clone(context), Box::new(closing)));
    }

    fn send(&self, worker: usize, job: Job) {
        if let Some(sender) = self.senders.get(worker) {
            // The thread is gone only after `stop`: what comes later stays unrecorded, an open request.
            let _ = sender.send(job);
        }
    }

    /// Waits until the threads have done what was handed to them, and ends them.
    pub(super) fn stop(&self) {
        for sender in &self.senders {
            let _ = sender.send(Job::Stop);
        }
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a recorder thread panicked; what it held is not recorded");
            }
        }
    }
}

fn run(jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        let (context, held_bytes, waiting_bytes) = match &job {
            Job::Piece(context, bytes) => (Arc::clone(context), bytes.len(), bytes.len()),
            Job::Lost(context, _) => (Arc::clone(context), 0, 0),
            Job::Close(context, closing) => (Arc::clone(context), closing.held_bytes, 0),
            Job::Stop => return,
        };
        // A defect in a decoder must cost one response, said in its record, not all that follow on this thread.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(job)));
        if done.is_err() {
            let reason = "the recorder failed on this response; please report it".to_owned();
            context.append(vec![Kind::Gap { reason, events: None, bytes: None }]);
        }
        context.waiting.give(waiting_bytes);
        context.workers.release(held_bytes);
    }
}

fn work(job: Job) {
    match job {
        Job::Piece(context, bytes) => {
            context.append(streamed(&context, |streamed| streamed.push(&context.masker, &bytes)));
        }
        Job::Lost(context, bytes) => context.append(streamed(&context, |streamed| streamed.lost(bytes))),
        Job::Close(context, closing) => close(&context, *closing),
        Job::Stop => {}
    }
}

fn streamed(context: &Context, take: impl FnOnce(&mut Streamed) -> Vec<Kind>) -> Vec<Kind> {
    let mut streamed = context.streamed.lock().unwrap_or_else(PoisonError::into_inner);
    streamed.as_mut().map(take).unwrap_or_default()
}

fn close(context: &Context, mut closing: Closing) {
    let streamed = context.streamed.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut kinds = Vec::new();
    if let Some(streamed) = streamed {
        let (rest, summary) = streamed.finish(&context.masker, closing.closed.response_bytes);
        kinds = rest;
        closing.closed.body = Some(summary);
    } else if let Some(held) = &closing.body {
        let (recorded, summary) = content::reduce(&context.masker, context.sensitivity, held);
        kinds = content::split(Channel::ResponseBody, 0, &recorded);
        closing.closed.body = Some(summary);
    }
    kinds.push(Kind::RequestClosed(Box::new(closing.closed)));
    context.append(kinds);
}
