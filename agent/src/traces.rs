//! What requests wait for, as OpenTelemetry traces, where a collector is configured: for who asks why a request was slow.
//!
//! No record: a trace may be lost, a record may not, and the trace names the record's id. What a trace says stands in
//! the record too, and never a body, a header, a query, a path or a credential. Whoever makes a trace waits for nothing: it goes into
//! a queue, and is counted and dropped where that is full. `context` has ids, `encode` makes OTLP of them, `export` sends it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

use tokio::sync::mpsc;

mod collector;
mod context;
mod encode;
mod export;
#[cfg(test)]
mod tests;

pub use self::collector::CollectorError;
pub(crate) use self::context::Context;
pub use self::export::Exporter;
use self::{collector::Collector, context::is_sampled};
use crate::config;

/// Most traces that wait to be sent; of about a kilobyte each.
const QUEUE_MAX: usize = 4096;
/// Longest text of an attribute, bytes.
const TEXT_BYTES_MAX: usize = 256;
/// Most stages of one trace: each of a request's, and some again after a credential was renewed.
const STAGES_MAX: usize = 12;

/// What a connection or a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Who connected: the kernel's record of the flow, the process behind it.
    Identify,
    /// TLS with the client.
    Handshake,
    /// The request's body.
    Receive,
    /// Whose the request is, and which rule is for it.
    Authenticate,
    /// Its record, on disk where it must be.
    Record,
    /// The credential to go on with, such as an AWS role's.
    AssumeRole,
    /// The API server, until its answer begins.
    Forward,
    /// The answer, or the stream, to its end.
    Respond,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Identify => "identify",
            Self::Handshake => "handshake",
            Self::Receive => "receive",
            Self::Authenticate => "authenticate",
            Self::Record => "record",
            Self::AssumeRole => "assume role",
            Self::Forward => "forward",
            Self::Respond => "respond",
        }
    }
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    Number(i64),
}

/// What is known of a connection or a request when it is over.
#[derive(Debug)]
struct Traced {
    context: Context,
    name: String,
    links: Vec<Context>,
    attributes: Vec<(&'static str, Value)>,
    /// When each stage began; it lasts until the next one, or the end.
    stages: Vec<(Stage, Instant)>,
    begun: (SystemTime, Instant),
    ended: Instant,
    failed: bool,
}

/// What became of the spans of traces since this process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// The collector took them.
    pub exported: u64,
    /// The queue was full.
    pub queue_full: u64,
    /// The collector could not be reached, or refused them, for too long.
    pub failed: u64,
    /// The collector took what they came with, but not them.
    pub rejected: u64,
}

#[derive(Debug, Default)]
struct Measures {
    exported: AtomicU64,
    queue_full: AtomicU64,
    failed: AtomicU64,
    rejected: AtomicU64,
}

/// Where traces begin and go to. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Traces {
    queue: mpsc::Sender<Traced>,
    measures: Arc<Measures>,
    sample_percent: u8,
}

impl Traces {
    /// Of the agent of a node; what is returned sends them.
    ///
    /// # Errors
    /// The collector's authorities cannot be read.
    pub fn new(config: &config::Traces, node: &str) -> Result<(Self, Exporter), CollectorError> {
        let (queue, queued) = mpsc::channel(QUEUE_MAX);
        let measures: Arc<Measures> = Arc::default();
        let exporter =
            Exporter::new(Collector::new(config)?, encode::resource(node), queued, Arc::clone(&measures));
        Ok((Self { queue, measures, sample_percent: config.sample_percent }, exporter))
    }

    /// What became of them.
    pub fn measured(&self) -> Measured {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Measured {
            exported: read(&self.measures.exported),
            queue_full: read(&self.measures.queue_full),
            failed: read(&self.measures.failed),
            rejected: read(&self.measures.rejected),
        }
    }

    /// Begins one that began at `at`, or none if its turn has not come.
    pub(crate) fn begin(&self, at: Instant) -> Trace {
        let context = Context::new();
        if !is_sampled(&context, self.sample_percent) {
            return Trace::default();
        }
        let now = Instant::now();
        let begun = SystemTime::now() - now.duration_since(at);
        let traced = Traced {
            context,
            name: String::new(),
            links: Vec::new(),
            attributes: Vec::new(),
            stages: Vec::with_capacity(STAGES_MAX),
            begun: (begun, at),
            ended: now,
            failed: false,
        };
        Trace(Some(Box::new(Open { traced, traces: self.clone() })))
    }
}

/// A trace that is being made; nothing where none is wanted. It ends when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Trace(Option<Box<Open>>);

#[derive(Debug)]
struct Open {
    traced: Traced,
    traces: Traces,
}

impl Trace {
    /// Whether anybody will see it: what would cost something to say need not be said otherwise.
    pub(crate) fn is_wanted(&self) -> bool {
        self.0.is_some()
    }

    /// Its ids, for others that belong to it.
    pub(crate) fn context(&self) -> Option<Context> {
        self.0.as_ref().map(|open| open.traced.context)
    }

    fn with(&mut self, change: impl FnOnce(&mut Traced)) {
        if let Some(open) = &mut self.0 {
            change(&mut open.traced);
        }
    }

    /// Names it: what many of its kind have in common.
    pub(crate) fn name(&mut self, name: &str) {
        self.with(|traced| traced.name = short(name));
    }

    /// Begins a stage, which ends the one before.
    pub(crate) fn enter(&mut self, stage: Stage) {
        self.enter_at(stage, None);
    }

    /// The same for a stage that began earlier.
    pub(crate) fn enter_at(&mut self, stage: Stage, at: Option<Instant>) {
        self.with(|traced| {
            if traced.stages.len() < STAGES_MAX {
                traced.stages.push((stage, at.unwrap_or_else(Instant::now)));
            }
        });
    }

    /// Joins it to one that it does not belong to: a connection's, or what an untrusted client says it is part of.
    pub(crate) fn link(&mut self, to: Option<Context>) {
        self.with(|traced| traced.links.extend(to));
    }

    /// Says something of it; nothing if the text is empty.
    pub(crate) fn text(&mut self, key: &'static str, text: &str) {
        if !text.is_empty() {
            self.with(|traced| traced.attributes.push((key, Value::Text(short(text)))));
        }
    }

    /// Says a number of it.
    pub(crate) fn number(&mut self, key: &'static str, number: i64) {
        self.with(|traced| traced.attributes.push((key, Value::Number(number))));
    }

    /// It did not do what was asked.
    pub(crate) fn fail(&mut self) {
        self.with(|traced| traced.failed = true);
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let Some(open) = self.0.take() else { return };
        let Open { mut traced, traces } = *open;
        traced.ended = Instant::now();
        if let Err(full) = traces.queue.try_send(traced) {
            traces.measures.queue_full.fetch_add(encode::count(&full.into_inner()), Ordering::Relaxed);
        }
    }
}

/// At most [`TEXT_BYTES_MAX`] of a text.
fn short(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].to_owned()
}
