//! Sends what is queued, some at a time, and tries again for a while: a collector that is down costs its traces alone.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use opentelemetry_proto::tonic::resource::v1::Resource;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Measures, Traced,
    collector::{Collector, PostError},
    encode,
};

/// Most traces that are sent at once.
const BATCH_MAX: usize = 512;
/// How long the first of them waits for others.
const BATCH_WAIT: Duration = Duration::from_secs(1);
/// How long is waited after the first failure, and twice as long after each further one.
const RETRY_WAIT: Duration = Duration::from_secs(1);
/// Tries of one batch; then it is dropped. The queue goes on to fill meanwhile.
const TRIES_MAX: u32 = 5;
/// How long the end of the agent may wait for the last ones.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// The sending side; there is one.
#[derive(Debug)]
pub struct Exporter {
    collector: Collector,
    resource: Resource,
    queued: mpsc::Receiver<Traced>,
    measures: Arc<Measures>,
}

impl Exporter {
    pub(super) fn new(
        collector: Collector,
        resource: Resource,
        queued: mpsc::Receiver<Traced>,
        measures: Arc<Measures>,
    ) -> Self {
        Self { collector, resource, queued, measures }
    }

    /// Sends until `stop`, and then what is left, within [`END_TIMEOUT`].
    pub async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        while !stop.is_cancelled() {
            tokio::select! {
                () = self.fill(&mut batch) => {}
                () = stop.cancelled() => {}
            }
            tokio::select! {
                () = self.send(&batch) => batch.clear(),
                () = stop.cancelled() => {}
            }
        }
        let end = async {
            loop {
                self.send(&batch).await;
                batch.clear();
                while batch.len() < BATCH_MAX
                    && let Ok(traced) = self.queued.try_recv()
                {
                    batch.push(traced);
                }
                if batch.is_empty() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(END_TIMEOUT, end).await;
    }

    /// Waits for a first trace, and then for as many as come in a while.
    async fn fill(&mut self, batch: &mut Vec<Traced>) {
        let room = BATCH_MAX - batch.len();
        if self.queued.recv_many(batch, room).await == 0 {
            // Everybody who could send has gone; `stop` says when this is over.
            std::future::pending::<()>().await;
        }
        let until = Instant::now() + BATCH_WAIT;
        while batch.len() < BATCH_MAX {
            let room = BATCH_MAX - batch.len();
            match tokio::time::timeout_at(until, self.queued.recv_many(batch, room)).await {
                Ok(more) if more > 0 => {}
                _ => return,
            }
        }
    }

    async fn send(&self, batch: &[Traced]) {
        if batch.is_empty() {
            return;
        }
        let spans: u64 = batch.iter().map(encode::count).sum();
        let body = Bytes::from(encode::request(&self.resource, batch));
        let mut wait = RETRY_WAIT;
        for tries in 1..=TRIES_MAX {
            match self.collector.post(body.clone()).await {
                Ok(answer) => {
                    let (rejected, problem) = encode::rejected(&answer).unwrap_or_default();
                    if rejected > 0 {
                        tracing::warn!(
                            event = "traces-rejected",
                            rejected,
                            problem,
                            "the collector has not taken all traces"
                        );
                    }
                    let rejected = rejected.min(spans);
                    self.measures.rejected.fetch_add(rejected, Ordering::Relaxed);
                    self.measures.exported.fetch_add(spans - rejected, Ordering::Relaxed);
                    return;
                }
                Err(PostError { again: true, .. }) if tries < TRIES_MAX => {}
                Err(PostError { cause, .. }) => {
                    tracing::warn!(
                        event = "traces-dropped",
                        cause,
                        spans,
                        "traces are dropped: the collector does not take them"
                    );
                    break;
                }
            }
            tokio::time::sleep(wait).await;
            wait *= 2;
        }
        self.measures.failed.fetch_add(spans, Ordering::Relaxed);
    }
}
