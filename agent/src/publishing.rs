//! Publishing: what the journal holds goes to Kafka, at least once, and what was acknowledged leaves the journal.
//!
//! Kafka is downstream of the journal: nothing here is on a request's way, and nothing waits for it. One thread, the
//! [`publisher`], reads durable frames (`feed`) of this agent's epoch and of those whose agents have ended (`adoption`, `stream`),
//! sends them (`sink`, `kafka`), keeps account of what is on its way (`flight`), writes down how far all is acknowledged
//! (`cursor`), and removes what was acknowledged long enough ago (`retention`). What Kafka is like, `inspection` asks.

mod adoption;
#[cfg(test)]
pub(crate) mod clock;
mod cursor;
mod feed;
#[cfg(test)]
pub(crate) mod fixture;
mod flight;
mod inspection;
mod kafka;
mod measures;
#[cfg(test)]
pub(crate) mod pipe;
mod publisher;
#[cfg(test)]
mod publisher_tests;
mod retention;
mod silence;
mod sink;
mod stamps;
mod steps;
mod stream;
mod token;
#[cfg(test)]
mod trial;
mod wrapped;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use uuid::Uuid;

#[cfg(test)]
pub(crate) use self::inspection::TopicSettings;
pub(crate) use self::inspection::{ClusterFacts, TopicFacts, inspect};
pub(crate) use self::measures::DELIVERY_BOUNDS_MS;
use self::{
    kafka::{Producer, Producers},
    measures::Measures,
    publisher::{Publisher, Settings},
    stream::Now,
};
pub use self::{measures::Published, sink::Failure};
use crate::{config::Kafka, interception::observed::Publishes, recording::Recorder, storage::FileSystem};

/// How long what is left at the end may still be sent; the next agent takes what remains.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the thread sleeps when there is nothing to send.
const IDLE_WAIT: Duration = Duration::from_millis(250);

/// From this age on a backlog is worth a word.
const LATE: Duration = Duration::from_secs(60);

/// Said once, until the journal has room again.
const SHORTENED: &str = "the journal has no room for its next segment: segments that Kafka has acknowledged are removed before their \
                         replay window has passed; raise journal.bytesMax, or lower kafka.replayWindowSeconds";

/// Why nothing can be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishingError {
    /// No client can be made.
    #[error("cannot publish to Kafka")]
    Client(#[from] Failure),
    /// The recorder's folder has no epoch's name.
    #[error("journal folder {path} is not named by its epoch")]
    Epoch {
        /// The folder.
        path: std::path::PathBuf,
    },
    /// The thread cannot be started.
    #[error("publisher thread cannot be started; is the process limited in threads?")]
    Thread(#[source] std::io::Error),
}

/// Publishes as long as it lives.
#[derive(Debug)]
pub struct Publishing {
    measures: Arc<Measures>,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Publishing {
    /// Starts to publish what `recorder` writes, and what agents before it have left in the same journal.
    ///
    /// # Errors
    /// The configuration of Kafka is wrong. That no broker can be reached is no error: the journal keeps the events.
    pub fn start(kafka: &Kafka, recorder: &Recorder) -> Result<Self, PublishingError> {
        // What cannot work is said now; the publisher makes its own.
        drop(Producer::new(kafka)?);
        let folder = recorder.folder();
        let wrong = || PublishingError::Epoch { path: folder.to_owned() };
        let name = folder.file_name().and_then(|name| name.to_str()).ok_or_else(wrong)?;
        let own = Uuid::try_parse(name).map_err(|_| wrong())?;
        let settings = Settings {
            storage: Arc::new(FileSystem),
            journal: folder.parent().ok_or_else(wrong)?.to_owned(),
            own,
            topic: kafka.topic.clone(),
            checkpoint_topic: kafka.checkpoint_topic.clone(),
            key_topic: kafka.key_topic.clone(),
            replay_window: kafka.replay_window,
        };
        let durable = recorder.durable();
        let (measures, stop) = (Arc::new(Measures::default()), Arc::new(AtomicBool::new(false)));
        let gaps = recorder.clone();
        let gap = Box::new(move |reason: String, events| {
            // If it cannot be recorded now, the journal counts it as lost and says so later.
            if let Err(error) = gaps.gap(reason, events) {
                tracing::warn!(event = "damage-not-recorded", %error, "that the journal is damaged could not be recorded");
            }
        });
        let mut publisher = Publisher::new(
            settings,
            Arc::clone(&durable),
            Box::new(Producers::new(kafka.clone())),
            gap,
            Arc::clone(&measures),
        );
        let (ends, counted, behind) = (Arc::clone(&stop), Arc::clone(&measures), recorder.clone());
        let (mut early, mut is_said_early) = (0, false);
        let run = move || {
            while !ends.load(Ordering::Acquire) {
                let seen = durable.get();
                let more = publisher.turn(now());
                // Rules may refuse or delay requests while Kafka is behind.
                let (bytes, oldest) = counted.unacknowledged();
                behind.set_unacknowledged(bytes, oldest);
                counted.set_short(behind.is_short_of_space());
                if counted.early() > early && !std::mem::replace(&mut is_said_early, true) {
                    behind.finding(None, None, "replayWindowShortened", SHORTENED);
                }
                if !counted.is_short() {
                    (is_said_early, early) = (false, counted.early());
                }
                if !more {
                    durable.wait_beyond(seen, IDLE_WAIT);
                }
            }
            let deadline = Instant::now() + FLUSH_TIMEOUT;
            while !publisher.is_done() && Instant::now() < deadline {
                if !publisher.turn(now()) {
                    std::thread::park_timeout(IDLE_WAIT);
                }
            }
            publisher.finish(now());
        };
        let thread = std::thread::Builder::new().name("weir-publisher".to_owned()).spawn(run);
        let thread = Mutex::new(Some(thread.map_err(PublishingError::Thread)?));
        Ok(Self { measures, stop, thread })
    }

    /// What is counted of it.
    pub fn published(&self) -> Published {
        self.measures.read(now().unix_us)
    }

    /// Sends what is left, for at most [`FLUSH_TIMEOUT`], and ends. To be called when the recorder has stopped.
    pub async fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let joined = tokio::task::spawn_blocking(|| thread.map(JoinHandle::join)).await;
        let left = self.published().backlog_bytes;
        match joined {
            Ok(Some(Ok(()))) if left == 0 => {
                tracing::info!(event = "everything-published", "everything is published")
            }
            Ok(Some(Ok(()))) => {
                tracing::info!(
                    event = "unpublished-left",
                    left,
                    "bytes that are not published yet stay in the journal for the next agent"
                );
            }
            _ => tracing::error!(
                event = "publisher-ended",
                "the publisher ended early; the next agent publishes what is left"
            ),
        }
    }
}

impl Publishes for Publishing {
    fn unpublished(&self) -> Option<String> {
        self.published().unpublished()
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn now() -> Now {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { instant: Instant::now(), unix_us: i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX) }
}
