//! The threads beside the forwarding path: they decode, mask and split what requests tapped.
//!
//! A request stays with one thread, so its pieces keep their order. What waits for a thread is bounded by bytes, for
//! all requests together, for each pod and for each request; what does not fit is lost with a gap record, never delayed. A
//! thread never waits for a pod's room before the writer: it goes on with the next pod's ([`super::jobs`]).

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Wake, Waker},
    thread::JoinHandle,
};

use bytes::Bytes;
use weir_common::event::{Channel, Kind, RequestClosed};

use super::{
    body::Sensitivity,
    content::{self, Held, Kept, Streamed},
    desk::Desk,
    emergency::Emergency,
    encryption::SessionKeys,
    entry::{Append, Entry, Ids, Origin, Waiter},
    error::RecordingError,
    mask::Masker,
    queue::Queue,
    share::{Budget, Share},
    split,
};

/// Most bytes that all requests together hold for the threads.
const TAPPED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Most bytes of it that the requests of one pod hold.
const TAPPED_BYTES_PER_POD_MAX: usize = 16 * 1024 * 1024;

/// Most bytes that one streamed response holds for its thread.
const STREAMED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What a piece takes of these bounds beside its bytes: a stream of single bytes is not free.
pub(super) const PIECE_BYTES: usize = 256;

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
    pub(super) masker: Masker,
    pub(super) sensitivity: Sensitivity,
    /// See [`Held`].
    pub(super) names_text: bool,
    pub(super) cluster: usize,
    pub(super) session: Arc<SessionKeys>,
    pub(super) invocation: Option<Arc<str>>,
    pub(super) request: Arc<str>,
    /// See [`RequestRecord::unread`](super::RequestRecord::unread).
    pub(super) unread: Option<&'static str>,
    /// Set when a streamed response begins; only its thread locks it then.
    pub(super) streamed: Mutex<Option<Streamed>>,
    /// Bytes of the streamed response that wait.
    pub(super) waiting: Budget,
    /// Bytes of it that did not fit, which its thread has not been told of yet.
    pub(super) lost: AtomicU64,
}

impl Context {
    /// What its events bear.
    pub(super) fn ids(&self) -> Ids<'_> {
        Ids {
            session: self.session.id(),
            keys: Some((&self.session, &self.share)),
            invocation: self.invocation.as_deref(),
            request: Some(&self.request),
        }
    }

    /// Serialises an event of this request. One that is too long for a frame becomes a gap that says so.
    pub(super) fn entry(&self, kind: Kind) -> Option<Entry> {
        let (cluster, ids) = (Some(self.cluster), self.ids());
        let made = self.origin.entry(cluster, ids, kind).or_else(|error| {
            let gap = Kind::Gap { reason: error.to_string(), events: Some(1), bytes: None };
            self.origin.entry(cluster, ids, gap)
        });
        made.ok()
    }

    /// The same of several, where what they are about goes on only when they are recorded.
    ///
    /// # Errors
    /// One of them cannot be encrypted.
    pub(super) fn whole_entries(&self, kinds: Vec<Kind>) -> Result<Vec<Entry>, RecordingError> {
        let entry = |kind| match self.origin.entry(Some(self.cluster), self.ids(), kind) {
            Err(RecordingError::TooLong { bytes }) => {
                let reason = RecordingError::TooLong { bytes }.to_string();
                self.origin.entry(
                    Some(self.cluster),
                    self.ids(),
                    Kind::Gap { reason, events: Some(1), bytes: None },
                )
            }
            made => made,
        };
        kinds.into_iter().map(entry).collect()
    }

    pub(super) fn entries(&self, kinds: Vec<Kind>) -> Vec<Entry> {
        kinds.into_iter().filter_map(|kind| self.entry(kind)).collect()
    }

    /// Events of this request, with whoever waits for them.
    pub(super) fn appendix(&self, kinds: Vec<Kind>, waiter: Option<Waiter>) -> Append {
        self.append(self.entries(kinds)).told_to(waiter)
    }

    /// Events of this request that are made already.
    pub(super) fn append(&self, entries: Vec<Entry>) -> Append {
        Append::behind(entries).of_request(&self.share, &self.request)
    }

    /// What is made of a piece; none if that is nothing, and nobody waits for it.
    fn made(&self, kinds: Vec<Kind>, waiter: Option<Waiter>) -> Option<Append> {
        (!kinds.is_empty() || waiter.is_some()).then(|| self.appendix(kinds, waiter))
    }

    /// Queues one of the few small events that each request adds.
    pub(super) fn push_small(&self, append: Append) {
        if self.emergency.is_on() {
            return self.queue.push_or_drop(append);
        }
        self.queue.push_small(append);
    }

    /// Queues if there is room; else gives back, and `waker` is woken when there is.
    fn push(&self, append: Append, waker: &Waker) -> Result<(), Append> {
        if self.emergency.is_on() {
            self.queue.push_or_drop(append);
            return Ok(());
        }
        self.queue.push_or_wake(append, waker)
    }
}

/// How a request ended, and what was held of its response.
#[derive(Debug)]
pub(super) struct Closing {
    pub(super) closed: RequestClosed,
    pub(super) body: Option<Held>,
    /// Bytes that `body` takes of the budget.
    pub(super) held_bytes: usize,
    /// What an upgraded stream ended with.
    pub(super) rest: Vec<Kind>,
    /// Told when the record of the whole is durable.
    pub(super) waiter: Option<Waiter>,
}

impl Closing {
    /// What is recorded of the end, with what was held of the response.
    pub(super) fn reduce(mut self, context: &Context) -> Vec<Kind> {
        let mut kinds = self.rest;
        if let Some(held) = &self.body {
            let Kept { content, summary, names, .. } =
                content::reduce_answer(&context.masker, context.sensitivity, held);
            kinds.append(&mut split::split(Channel::ResponseBody, 0, &content));
            kinds.append(&mut names.kinds(Channel::ResponseBody));
            self.closed.body = Some(summary);
        }
        kinds.push(Kind::RequestClosed(Box::new(self.closed)));
        kinds
    }
}

#[derive(Debug)]
enum Job {
    Piece(Arc<Context>, Bytes, Option<Waiter>),
    /// Pieces did not fit; the context knows how much.
    Lost(Arc<Context>),
    Close(Arc<Context>, Box<Closing>),
    /// What is made already and found no room.
    Made(Arc<Context>, Append, Taken),
}

/// Bytes of budgets that a job takes until its records are queued.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    /// Of what all requests, and those of the pod, may hold.
    held: usize,
    /// Of what the request may have waiting.
    waiting: usize,
}

impl Job {
    fn context(&self) -> &Arc<Context> {
        match self {
            Self::Piece(context, ..)
            | Self::Lost(context)
            | Self::Close(context, _)
            | Self::Made(context, ..) => context,
        }
    }

    /// Whether somebody waits for it.
    fn is_awaited(&self) -> bool {
        match self {
            Self::Piece(.., waiter) => waiter.is_some(),
            Self::Close(_, closing) => closing.waiter.is_some(),
            Self::Made(_, append, _) => append.waiter.is_some(),
            Self::Lost(_) => false,
        }
    }

    fn taken(&self) -> Taken {
        match self {
            Self::Piece(_, bytes, _) => {
                let bytes = bytes.len() + PIECE_BYTES;
                Taken { held: bytes, waiting: bytes }
            }
            Self::Lost(_) => Taken::default(),
            Self::Close(_, closing) => Taken { held: closing.held_bytes, waiting: 0 },
            Self::Made(_, _, taken) => *taken,
        }
    }
}

/// The threads and what waits for them.
#[derive(Debug)]
pub(super) struct Workers {
    desks: Vec<Arc<Desk<Job>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    tapped: Budget,
    next: AtomicUsize,
}

impl Workers {
    pub(super) fn start() -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (mut desks, mut threads) = (Vec::new(), Vec::new());
        for number in 0..cores.div_ceil(2).min(THREADS_MAX) {
            let desk = Arc::new(Desk::default());
            desks.push(Arc::clone(&desk));
            let thread = std::thread::Builder::new().name(format!("weir-mask-{number}"));
            threads.push(thread.spawn(move || run(&desk))?);
        }
        Ok(Self { desks, threads: Mutex::new(threads), tapped: Budget::default(), next: AtomicUsize::new(0) })
    }

    /// The thread for the next request.
    pub(super) fn assign(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % self.desks.len().max(1)
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
        let taken = bytes.len() + PIECE_BYTES;
        // What is lost is one stretch until its thread knows of it: what follows must not be taken for its continuation.
        if context.lost.load(Ordering::Acquire) > 0 || !context.waiting.take(taken, STREAMED_BYTES_MAX) {
            return Err(waiter);
        }
        if !self.hold(&context.share, taken) {
            context.waiting.give(taken);
            return Err(waiter);
        }
        self.send(Job::Piece(Arc::clone(context), bytes.clone(), waiter));
        Ok(())
    }

    /// Hands on what is made already and found no room in the queue.
    pub(super) fn push(&self, context: &Arc<Context>, append: Append, held_bytes: usize) {
        let taken = Taken { held: held_bytes, waiting: 0 };
        self.send(Job::Made(Arc::clone(context), append, taken));
    }

    /// Says that pieces did not fit: to the thread once, until it knows.
    pub(super) fn lost(&self, context: &Arc<Context>, bytes: u64) {
        if context.lost.fetch_add(bytes, Ordering::AcqRel) == 0 {
            self.send(Job::Lost(Arc::clone(context)));
        }
    }

    /// Hands on the end of a request.
    pub(super) fn close(&self, context: &Arc<Context>, closing: Closing) {
        self.send(Job::Close(Arc::clone(context), Box::new(closing)));
    }

    fn send(&self, job: Job) {
        if let Some(desk) = self.desks.get(job.context().worker) {
            // The thread is gone only after `stop`: what comes later stays unrecorded, an open request.
            let (lane, is_awaited) = (job.context().share.lane, job.is_awaited());
            desk.put(lane, job, is_awaited);
        }
    }

    /// What found no room is tried again.
    pub(super) fn resume(&self) {
        self.desks.iter().for_each(|desk| Arc::clone(desk).wake());
    }

    /// Jobs that wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.desks.iter().map(|desk| desk.waiting()).sum()
    }

    /// Whether all of them wait for room.
    #[cfg(test)]
    pub(super) fn are_stuck(&self) -> bool {
        let stuck: Option<usize> = self.desks.iter().map(|desk| desk.stuck()).sum();
        stuck.is_some_and(|lanes| lanes > 0)
    }

    /// Waits until the threads have done what was handed to them, and ends them.
    pub(super) fn stop(&self) {
        self.desks.iter().for_each(|desk| desk.end());
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!(
                    event = "recorder-panicked",
                    "a recorder thread panicked; what it held is not recorded"
                );
            }
        }
    }
}

fn run(desk: &Arc<Desk<Job>>) {
    let waker = Waker::from(Arc::clone(desk));
    while let Some((turn, job)) = desk.next() {
        let (context, taken) = (Arc::clone(job.context()), job.taken());
        // A defect in a decoder must cost one response, said in its record, not all that follow on this thread.
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(job)));
        let made = made.unwrap_or_else(|_| {
            let reason = "the recorder failed on this response; please report it".to_owned();
            context.made(vec![Kind::Gap { reason, events: None, bytes: None }], None)
        });
        let queued = made.map_or(Ok(()), |append| context.push(append, &waker));
        if queued.is_ok() {
            context.waiting.give(taken.waiting);
            context.workers.release(&context.share, taken.held);
        }
        match queued {
            Ok(()) => desk.done(&turn),
            Err(append) => desk.put_back(&turn, Job::Made(context, append, taken)),
        }
    }
}

fn work(job: Job) -> Option<Append> {
    match job {
        Job::Piece(context, bytes, waiter) => {
            let kinds = streamed(&context, |streamed| streamed.push(&context.masker, &bytes));
            context.made(kinds, waiter)
        }
        Job::Lost(context) => {
            let bytes = context.lost.swap(0, Ordering::AcqRel);
            context.made(streamed(&context, |streamed| streamed.lost(bytes)), None)
        }
        Job::Close(context, closing) => close(&context, *closing),
        Job::Made(_, append, _) => Some(append),
    }
}

fn streamed(context: &Context, take: impl FnOnce(&mut Streamed) -> Vec<Kind>) -> Vec<Kind> {
    let mut streamed = context.streamed.lock().unwrap_or_else(PoisonError::into_inner);
    streamed.as_mut().map(take).unwrap_or_default()
}

fn close(context: &Context, mut closing: Closing) -> Option<Append> {
    let waiter = closing.waiter.take();
    let streamed = context.streamed.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut kinds = std::mem::take(&mut closing.rest);
    if let Some(streamed) = streamed {
        let (mut rest, summary) = streamed.finish(&context.masker, closing.closed.response_bytes);
        kinds.append(&mut rest);
        closing.closed.body = Some(summary);
    }
    kinds.append(&mut closing.reduce(context));
    context.made(kinds, waiter)
}
