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
    emergency::Emergency,
    entry::{Append, Entry, Ids, Origin, Waiter},
    mask::Masker,
    queue::Queue,
    share::{Budget, Share},
};

/// Most bytes that all requests together hold for the threads.
const TAPPED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Most bytes of it that the requests of one pod hold.
const TAPPED_BYTES_PER_POD_MAX: usize = 16 * 1024 * 1024;

/// Most bytes that one streamed response holds for its thread.
const STREAMED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most threads.
const THREADS_MAX: usize = 4;

/// What events of one request need.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) origin: Arc<Origin>,
    pub(super) queue: Arc<Queue>,
    pub(super) emergency: Arc<Emergency>,
    /// What its pod may take.
    pub(super) share: Arc<Share>,
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

    /// Events of this request, with whoever waits for them.
    pub(super) fn appendix(&self, kinds: Vec<Kind>, waiter: Option<Waiter>) -> Append {
        Append::behind(self.entries(kinds)).of(&self.share).told_to(waiter)
    }

    /// Queues, and blocks the thread for room: not a request's.
    fn append(&self, kinds: Vec<Kind>, waiter: Option<Waiter>) {
        if !kinds.is_empty() || waiter.is_some() {
            self.push(self.appendix(kinds, waiter));
        }
    }

    fn push(&self, append: Append) {
        if self.emergency.is_on() {
            return self.queue.push_or_drop(append);
        }
        // After the end of the recorder nothing can be recorded; the request stays open in the record.
        let _ = self.queue.push_blocking(append);
    }
}

/// How a request ended, and what was held of its response.
#[derive(Debug)]
pub(super) struct Closing {
    pub(super) closed: RequestClosed,
    pub(super) body: Option<Held>,
    /// Bytes that `body` takes of the budget.
    pub(super) held_bytes: usize,
    /// Told when the record of the whole is durable.
    pub(super) waiter: Option<Waiter>,
}

impl Closing {
    /// What is recorded of the end, with what was held of the response.
    pub(super) fn reduce(mut self, context: &Context) -> Vec<Kind> {
        let mut kinds = Vec::new();
        if let Some(held) = &self.body {
            let (recorded, summary) = content::reduce(&context.masker, context.sensitivity, held);
            kinds = content::split(Channel::ResponseBody, 0, &recorded);
            self.closed.body = Some(summary);
        }
        kinds.push(Kind::RequestClosed(Box::new(self.closed)));
        kinds
    }
}

enum Job {
    Piece(Arc<Context>, Bytes, Option<Waiter>),
    Lost(Arc<Context>, u64),
    Close(Arc<Context>, Box<Closing>),
    /// What is made already and found no room, and the bytes of the budget that it takes.
    Made(Arc<Context>, Append, usize),
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
    pub(super) fn hold(&self, share: &Share, bytes: usize) -> bool {
        if !share.tapped.take(bytes, TAPPED_BYTES_PER_POD_MAX) {
            return false;
        }
        let held = self.tapped.take(bytes, TAPPED_BYTES_MAX);
        if !held {
            share.tapped.give(bytes);
        }
        held
    }

    /// Gives it back.
    pub(super) fn release(&self, share: &Share, bytes: usize) {
        share.tapped.give(bytes);
        self.tapped.give(bytes);
    }

    /// Hands on a piece of a streamed response; `waiter` is told when what it makes is durable. Gives the waiter back if
    /// the piece does not fit.
    pub(super) fn piece(
        &self,
        context: &Arc<Context>,
        bytes: &Bytes,
        waiter: Option<Waiter>,
    ) -> Result<(), Option<Waiter>> {
        if !context.waiting.take(bytes.len(), STREAMED_BYTES_MAX) {
            return Err(waiter);
        }
        if !self.hold(&context.share, bytes.len()) {
            context.waiting.give(bytes.len());
            return Err(waiter);
        }
        self.send(context.worker, Job::Piece(Arc::clone(context), bytes.clone(), waiter));
        Ok(())
    }

    /// Hands on what is made already and found no room in the queue.
    pub(super) fn push(&self, context: &Arc<Context>, append: Append, held_bytes: usize) {
        self.send(context.worker, Job::Made(Arc::clone(context), append, held_bytes));
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
            Job::Piece(context, bytes, _) => (Arc::clone(context), bytes.len(), bytes.len()),
            Job::Lost(context, _) => (Arc::clone(context), 0, 0),
            Job::Close(context, closing) => (Arc::clone(context), closing.held_bytes, 0),
            Job::Made(context, _, held_bytes) => (Arc::clone(context), *held_bytes, 0),
            Job::Stop => return,
        };
        // A defect in a decoder must cost one response, said in its record, not all that follow on this thread.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(job)));
        if done.is_err() {
            let reason = "the recorder failed on this response; please report it".to_owned();
            context.append(vec![Kind::Gap { reason, events: None, bytes: None }], None);
        }
        context.waiting.give(waiting_bytes);
        context.workers.release(&context.share, held_bytes);
    }
}

fn work(job: Job) {
    match job {
        Job::Piece(context, bytes, waiter) => {
            context.append(streamed(&context, |streamed| streamed.push(&context.masker, &bytes)), waiter);
        }
        Job::Lost(context, bytes) => {
            context.append(streamed(&context, |streamed| streamed.lost(bytes)), None);
        }
        Job::Close(context, closing) => close(&context, *closing),
        Job::Made(context, append, _) => context.push(append),
        Job::Stop => {}
    }
}

fn streamed(context: &Context, take: impl FnOnce(&mut Streamed) -> Vec<Kind>) -> Vec<Kind> {
    let mut streamed = context.streamed.lock().unwrap_or_else(PoisonError::into_inner);
    streamed.as_mut().map(take).unwrap_or_default()
}

fn close(context: &Context, mut closing: Closing) {
    let waiter = closing.waiter.take();
    let streamed = context.streamed.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut kinds = Vec::new();
    if let Some(streamed) = streamed {
        let (rest, summary) = streamed.finish(&context.masker, closing.closed.response_bytes);
        kinds = rest;
        closing.closed.body = Some(summary);
    }
    kinds.append(&mut closing.reduce(context));
    context.append(kinds, waiter);
}
