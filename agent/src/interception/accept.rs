//! Accepting: a connection gets through only if the kernel vouches for it, and for the pod that the listener
//! serves. What does not is closed and recorded. What the connection says is the proxy's matter.

use std::{
    borrow::Cow,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    caller::Tenant, flow::Flow, listener::Listener, loader::Kernel, observed::Observed, pinned, pod_network,
};
use crate::{proxy::Accepted, recording::Recorder};

/// Most connections of one listener that are between `accept` and the proxy; more wait in the kernel.
const PENDING_MAX: usize = 128;
/// Pause after an error of `accept` that will not pass at once (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Most refusals of one kind of source that are recorded each, per [`REFUSAL_WINDOW`]; the rest is counted.
const REFUSALS_MAX: u32 = 20;
/// See [`REFUSALS_MAX`].
const REFUSAL_WINDOW: Duration = Duration::from_secs(60);

/// What accepted connections go to.
#[derive(Clone, Debug)]
pub struct Sink {
    /// The kernel's maps, for the flow records.
    pub kernel: Arc<Kernel>,
    /// Where refusals are recorded.
    pub recorder: Recorder,
    /// The proxy; bounded, so that a slow proxy slows down accepting.
    pub accepted: mpsc::Sender<Accepted>,
    /// What is counted of them.
    pub observed: Arc<Observed>,
}

/// Accepts connections of one tenant until cancelled, and counts those that get to the proxy in `proxied`; then the sockets are closed, which refuses new ones.
pub async fn serve(
    listener: Arc<Listener>,
    tenant: watch::Receiver<Arc<Tenant>>,
    proxied: Arc<AtomicU64>,
    sink: Sink,
    cancellation: CancellationToken,
) {
    let pending = Arc::new(Semaphore::new(PENDING_MAX));
    let mut refusals = Refusals::new(Instant::now());
    let (refused, mut refusals_made) = mpsc::channel::<Refusal>(PENDING_MAX);
    let mut handling = JoinSet::new();
    loop {
        while handling.try_join_next().is_some() {}
        let accept = async {
            // The semaphore is never closed.
            let permit = pending.clone().acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, result) = tokio::select! {
            () = cancellation.cancelled() => break,
            Some(refusal) = refusals_made.recv() => {
                refusals.record(refusal, &sink.recorder, Instant::now());
                continue;
            }
            accepted = accept => accepted,
        };
        match result {
            Ok((stream, client)) => {
                let tenant = tenant.borrow().clone();
                let (netns, proxied) = (listener.netns(), proxied.clone());
                let arrived = Arrived { stream, client, netns, permit, proxied };
                handling.spawn(handle(arrived, tenant, sink.clone(), refused.clone()));
            }
            // The client gave up before it was accepted.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(event = "accept-failed", %error, "cannot accept; are there too many open files?");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // What was accepted before the end still reaches the proxy, which drains by its own deadline.
    drop(listener);
    drop(refused);
    while let Some(refusal) = refusals_made.recv().await {
        refusals.record(refusal, &sink.recorder, Instant::now());
    }
    while handling.join_next().await.is_some() {}
    refusals.end(&sink.recorder);
}

struct Arrived {
    stream: TcpStream,
    client: SocketAddr,
    netns: u64,
    permit: Option<OwnedSemaphorePermit>,
    proxied: Arc<AtomicU64>,
}

struct Refusal {
    tenant: Arc<Tenant>,
    flow: Option<Flow>,
    reason: Cow<'static, str>,
}

async fn handle(arrived: Arrived, tenant: Arc<Tenant>, sink: Sink, refused: mpsc::Sender<Refusal>) {
    let Arrived { stream, client, netns, permit, proxied } = arrived;
    let accepted = std::time::Instant::now();
    let flow = match stream.local_addr() {
        Ok(local) => sink.kernel.take_flow(netns, client, local),
        Err(_) => None,
    };
    let reason = match &flow {
        None => {
            sink.observed.closed();
            Some(Cow::Borrowed("no flow record: dialled past the kernel's redirect"))
        }
        Some(flow) if flow.record.pod_cgroup != tenant.cgroup => {
            sink.observed.disagreed();
            Some(Cow::Owned(disagreement(&sink.kernel, flow.record.pod_cgroup, &tenant)))
        }
        Some(_) => None,
    };
    if let Some(reason) = reason {
        drop(stream);
        // The accept loop takes these; at its end it takes all that are left.
        let _ = refused.send(Refusal { tenant, flow, reason }).await;
        return;
    }
    let Some(flow) = flow else { return };
    let caller = tenant.caller(&flow).await;
    let cluster = usize::try_from(flow.record.cluster).unwrap_or(usize::MAX);
    let labels = Arc::clone(&tenant.labels);
    let accepted =
        Accepted { stream, accepted, original_destination: flow.original, cluster, caller, labels };
    // Fails only if the proxy has ended: then the connection ends, too.
    if sink.accepted.send(accepted).await.is_ok() {
        proxied.fetch_add(1, Ordering::Relaxed);
        sink.observed.proxied();
    }
    drop(permit);
}

/// Whose connection came to whose listener. The kernel sends none there; a map that somebody else has written could.
fn disagreement(kernel: &Kernel, cgroup: u64, tenant: &Tenant) -> String {
    let whose = match kernel.pod_name(cgroup) {
        Some(name) => format!("the pod {} ({})", pinned::pod(&name), pinned::text(&name.uid)),
        None => format!("no pod that is known ({cgroup})"),
    };
    let uid = tenant.pod.as_ref().map_or("", |pod| &pod.uid);
    let served = pod_network::name(tenant);
    format!(
        "the connection's cgroup is of {whose}, and the listener serves {served} ({uid}): identities that do not agree are refused"
    )
}

/// Bounds what refusals write to the journal: a pod must not fill it by dialling the listener in a loop.
pub(super) struct Refusals {
    since: Instant,
    recorded: u32,
    suppressed: u64,
}

impl Refusals {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, recorded: 0, suppressed: 0 }
    }

    /// Whether one more may be recorded; and how many a window that has ended had left out.
    pub(super) fn admit(&mut self, now: Instant) -> (bool, Option<u64>) {
        let mut left_out = None;
        if now.saturating_duration_since(self.since) >= REFUSAL_WINDOW {
            left_out = (self.suppressed > 0).then_some(self.suppressed);
            *self = Self::new(now);
        }
        let admitted = self.recorded < REFUSALS_MAX;
        if admitted {
            self.recorded += 1;
        } else {
            self.suppressed += 1;
        }
        (admitted, left_out)
    }

    fn record(&mut self, refusal: Refusal, recorder: &Recorder, now: Instant) {
        let (admitted, left_out) = self.admit(now);
        if let Some(left_out) = left_out {
            Self::left_out(left_out, recorder);
        }
        if admitted {
            let Refusal { tenant, flow, reason } = refusal;
            let cluster = flow.and_then(|flow| usize::try_from(flow.record.cluster).ok());
            recorder.connection_refused(cluster, Some(&tenant.unproven(flow.as_ref())), &reason);
        }
    }

    pub(super) fn end(&self, recorder: &Recorder) {
        if self.suppressed > 0 {
            Self::left_out(self.suppressed, recorder);
        }
    }

    pub(super) fn left_out(count: u64, recorder: &Recorder) {
        recorder.connection_refused(None, None, &format!("{count} more refusals like the ones before"));
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::{REFUSAL_WINDOW, REFUSALS_MAX, Refusals};

    #[test]
    fn refusals_are_recorded_up_to_the_bound_and_then_counted() {
        let start = Instant::now();
        let mut refusals = Refusals::new(start);
        for _ in 0..REFUSALS_MAX {
            assert_eq!(refusals.admit(start), (true, None));
        }
        assert_eq!(refusals.admit(start), (false, None));
        assert_eq!(refusals.admit(start), (false, None));
        assert_eq!(refusals.admit(start + REFUSAL_WINDOW), (true, Some(2)));
    }
}
