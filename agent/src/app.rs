//! `weir-agent run`: the only place where the parts are wired together.
//!
//! The order is the promise: the kernel programs are in force before anything else can fail, and the journal accepts before
//! anything waits for the network, so that nothing passes unrecorded. Every task's end is waited for; an unexpected end
//! ends the agent, which leaves the kernel denying.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use weir_common::kms::Kms;

use crate::{
    auth::IssuersError,
    config::{Cluster, Config, Source},
    doctor, emergency,
    interception::{
        api_set::ClusterAddresses,
        canary::Health,
        cluster_access::{ClusterAccess, ClusterAccessError},
        cluster_watch::{self, ApiSet, ClusterWatch, KnownPods},
        guard::{self, InForce},
        handover,
        hosts::Hosts,
        loader::{self, Pinning},
        observed::Observed,
        pod_lookup::{NAMED_MAX, NamedPod},
        run::{self as interception, Ended, InterceptionError},
        startup_taint,
        succession::own_pod,
    },
    proxy::{self, Drained, Proxy, ProxyOptions},
    publishing::{Publishing, PublishingError},
    recording::{KeyService, Recorder, RecorderOptions, RecordingError},
    telemetry::{self, Telemetry},
    traces::Traces,
    trust::TrustError,
};

pub mod approver;
pub(crate) mod cluster;
mod reload;
mod retirement;

use self::reload::Reload;

/// Connections between accept and proxy; beyond it accepting waits.
const ACCEPTED_MAX: usize = 256;
/// How often coverage is recorded.
const COVERAGE_INTERVAL: Duration = Duration::from_secs(60);

/// Why the agent ends whose successor serves its pods.
const HANDED_OVER: &str = "handover";

/// Why the agent cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The journal.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// Kafka.
    #[error(transparent)]
    Publishing(#[from] PublishingError),
    /// The kernel, cgroups or listeners.
    #[error(transparent)]
    Interception(#[from] InterceptionError),
    /// A cluster's credentials or CA.
    #[error(transparent)]
    Access(#[from] ClusterAccessError),
    /// A certificate.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Issuers of tokens.
    #[error(transparent)]
    Issuers(#[from] IssuersError),
    /// TLS towards an API server.
    #[error(transparent)]
    Proxy(#[from] proxy::ProxyError),
    /// Signals cannot be waited for.
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
    /// A name that no certificate can be verified for.
    #[error(
        "cluster {cluster}: {host:?} is neither a host name nor an address; mend `server` in its kubeconfig"
    )]
    ServerName {
        /// The cluster's name.
        cluster: String,
        /// What stands there.
        host: String,
    },
    /// A part that must run as long as the agent ended.
    #[error("{part} ended, so the agent ends; pods of this node are denied the API until it is back")]
    PartEnded {
        /// Which.
        part: &'static str,
    },
}

/// Runs the agent until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// It cannot start, or a part of it failed for good.
pub async fn run((source, config): (Source, Config)) -> Result<(), AppError> {
    let mut signals = Signals::new()?;
    // With nothing known but addresses: the clusters may be away for long, and the journal may be damaged.
    let in_force = guard::begin(&guard_options(&config), Path::new(handover::STANDARD))?;
    let recorder = Recorder::start(recorder_options(&config))?;
    let publishing = match start_publishing(&config, &recorder) {
        Ok(publishing) => publishing,
        Err(error) => {
            recorder.stop(&error.to_string()).await?;
            return Err(error);
        }
    };
    let recorded = (&recorder, publishing.clone());
    let outcome = run_recorded((source, &config), in_force, recorded, &mut signals).await;
    let reason = match &outcome {
        Ok(signal) => (*signal).to_owned(),
        Err(error) => error.to_string(),
    };
    // Last, so that what drained is in the record.
    let stopped = recorder.stop(&reason).await;
    if let Some(publishing) = publishing {
        publishing.stop().await;
    }
    if outcome? == HANDED_OVER && own_pod().is_some() {
        tracing::info!(
            event = "waits-for-other-agent",
            "another agent serves this node's pods; this one waits for the end of its own pod"
        );
        let is_there = || handover::an_agent_runs(Path::new(handover::STANDARD));
        let over = retirement::wait(signals.next(), retirement::LOOK_INTERVAL, is_there).await;
        tracing::info!(event = "wait-ended", ?over, "waits no longer");
    }
    tracing::info!(event = "stopped", %reason, "stopped; the kernel programs stay in force until `weir-agent uninstall`");
    Ok(stopped?)
}

/// Everything between the first and the last record; returns the signal that ended it.
async fn run_recorded(
    (source, config): (Source, &Config),
    in_force: Option<InForce>,
    (recorder, publishing): (&Recorder, Option<Arc<Publishing>>),
    signals: &mut Signals,
) -> Result<&'static str, AppError> {
    let stop = CancellationToken::new();
    let (publish_pods, pods) = watch::channel(KnownPods::None);
    let ((settled, ready), (serve, serves)) = (watch::channel(false), watch::channel(false));
    let (publish, clusters) = addresses(config);
    let (publish_nodes, nodes) = watch::channel(Hosts::default());
    let (name_pod, named) = mpsc::channel(NAMED_MAX);
    let (accepted, mut connections) = mpsc::channel(ACCEPTED_MAX);
    let (telemetry, observed) = observe(recorder, publishing);
    let options = interception::Options {
        guard: guard_options(config),
        pods,
        serves,
        clusters,
        name_servers: config.name_servers.clone(),
        nodes,
        handover: Some(PathBuf::from(handover::STANDARD)),
        nri: config.nri.clone().map(|socket| (socket, name_pod)),
        accepted,
        ready: settled,
        observed: observed.clone(),
        coverage_interval: COVERAGE_INTERVAL,
    };
    let mut intercepted =
        std::pin::pin!(interception::run(options, in_force, recorder.clone(), stop.clone()));
    // What runs as long as the agent does; the set aborts what is left when it is dropped.
    let mut parts: JoinSet<&'static str> = JoinSet::new();
    let (metrics, (traces, exporting)) = (Monitoring::start(config, &telemetry), Exporting::start(config));
    let proxy = tokio::select! {
        proxy = start_proxy((source, config), (recorder, &observed, traces), (publish_pods, named, publish_nodes), publish, &mut parts) => proxy?,
        ended = &mut intercepted => return Err(early(ended)),
        signal = signals.next() => {
            stop.cancel();
            intercepted.await?;
            return Ok(signal);
        }
    };
    telemetry.serves(proxy.clone());
    serve.send_replace(true);
    let mut announced = std::pin::pin!(announce(ready, observed.watch_canary()));
    let ending = loop {
        tokio::select! {
            signal = signals.next() => break Ok(signal),
            Some(connection) = connections.recv() => proxy.serve(connection),
            never = &mut announced => match never {},
            ended = &mut intercepted => break match ended {
                Ok(Ended::HandedOver) => Ok(HANDED_OVER),
                ended => Err(early(ended)),
            },
            Some(ended) = parts.join_next() =>
                break Err(AppError::PartEnded { part: ended.unwrap_or("a part that panicked") }),
        }
    };
    stop.cancel();
    telemetry.ends();
    let Ok(signal) = &ending else {
        // Nothing can be waited for any more; what is open is cut, and its record says so.
        drain(&proxy, Duration::ZERO).await;
        return ending;
    };
    let (limit, serve) = (config.limits.drain, |connection| proxy.serve(connection));
    tracing::info!(event = "draining", %signal, drain_seconds = limit.as_secs(), active = proxy.active(), "draining");
    if *signal == HANDED_OVER {
        // The successor answers from now on.
        metrics.stop().await;
        serve_until(std::future::ready(()), &mut connections, serve).await;
    } else {
        serve_until(intercepted, &mut connections, serve).await?;
    }
    drain(&proxy, limit).await;
    exporting.stop().await;
    ending
}

/// Makes what monitoring sees.
fn observe(recorder: &Recorder, publishing: Option<Arc<Publishing>>) -> (Arc<Telemetry>, Arc<Observed>) {
    let observed: Arc<Observed> = Arc::default();
    if let Some(publishing) = publishing.clone() {
        observed.published_by(publishing);
    }
    let pins = loader::pin_folder();
    (Arc::new(Telemetry::new(recorder.clone(), publishing, Arc::clone(&observed), pins)), observed)
}

/// Starts to publish, if that is configured. Kafka need not be there: what is wrong with it is only said.
fn start_publishing(config: &Config, recorder: &Recorder) -> Result<Option<Arc<Publishing>>, AppError> {
    let Some(kafka) = config.kafka.clone() else { return Ok(None) };
    let publishing = Publishing::start(&kafka, recorder)?;
    // A thread of its own, which nothing waits for: not the start, nor the end.
    let looked = std::thread::Builder::new().name("weir-kafka-look".to_owned()).spawn(move || {
        for check in doctor::kafka::checks(&kafka).into_iter().filter(|check| !check.ok) {
            tracing::warn!(
                event = "kafka-check-failed",
                name = check.name,
                found = check.found,
                mend = check.mend,
                "not as it should be"
            );
        }
    });
    if let Err(error) = looked {
        tracing::warn!(event = "kafka-not-checked", %error, "the brokers and topics are not looked at");
    }
    Ok(Some(Arc::new(publishing)))
}

async fn drain(proxy: &Proxy, limit: Duration) {
    if let Drained::Cut(count) = proxy.drain(limit).await {
        tracing::warn!(event = "connections-cut", count, "connections were cut; their records say so");
    }
}

/// Says in the log when the agent is ready: every pod that was known has its verdict, and the kernel has refused one
/// canary and redirected another.
async fn announce(mut settled: watch::Receiver<bool>, mut canary: watch::Receiver<Health>) -> Infallible {
    let is_settled = settled.wait_for(|settled| *settled).await.is_ok();
    let passed = canary.wait_for(|health| *health == Health::Passed).await.is_ok();
    if is_settled && passed {
        tracing::info!(event = "ready", "ready");
    }
    std::future::pending().await
}

/// Waits for `ending` while serving what still comes, and then what is left: whoever ends may be waiting for room in
/// the channel.
async fn serve_until<T, E>(
    ending: impl Future<Output = E>,
    connections: &mut mpsc::Receiver<T>,
    mut serve: impl FnMut(T),
) -> E {
    tokio::pin!(ending);
    let ended = loop {
        tokio::select! {
            ended = &mut ending => break ended,
            Some(connection) = connections.recv() => serve(connection),
        }
    };
    while let Ok(connection) = connections.try_recv() {
        serve(connection);
    }
    ended
}

fn early(ended: Result<Ended, InterceptionError>) -> AppError {
    ended.map_or_else(AppError::from, |_| AppError::PartEnded { part: "the interception" })
}

/// Where the clusters' addresses come from, and where that is published.
fn addresses(config: &Config) -> (Vec<cluster::Publish>, Vec<ClusterAddresses>) {
    let of_cluster = |(index, cluster): (u32, &Cluster)| {
        let (publish_set, published) = watch::channel(ApiSet::default());
        let (publish_proof, proof) = watch::channel(None);
        let addresses = ClusterAddresses {
            cluster: index,
            published,
            configured: cluster.addresses.clone(),
            names: cluster.endpoint_names.clone(),
            proof,
        };
        ((publish_set, publish_proof), addresses)
    };
    (0..).zip(&config.clusters).map(of_cluster).unzip()
}

/// Connects to the clusters, starts to watch this node's pods, and makes the proxy.
async fn start_proxy(
    (source, config): (Source, &Config),
    (recorder, observed, traces): (&Recorder, &Arc<Observed>, Option<Traces>),
    (publish_pods, named, publish_nodes): (
        watch::Sender<KnownPods>,
        mpsc::Receiver<NamedPod>,
        watch::Sender<Hosts>,
    ),
    publish: Vec<cluster::Publish>,
    parts: &mut JoinSet<&'static str>,
) -> Result<Proxy, AppError> {
    let (change_enrolment, enrolment) = watch::channel(config.enrolment.clone().into());
    // The node belongs to the first cluster: its pods, and the other nodes, are watched there. Before there is a certificate: who
    // is to approve or sign it may be a pod of this node, and is denied the API server until it is known.
    let begin = |access: &ClusterAccess, parts: &mut JoinSet<&'static str>| {
        let client = access.client.clone();
        parts.spawn(async move {
            cluster_watch::watch_nodes(client, publish_nodes).await;
            "the watch of nodes"
        });
        let pods = ClusterWatch {
            client: access.client.clone(),
            node: config.node.clone(),
            enrolment,
            intent_annotations: config.intent_annotations.clone(),
        };
        parts.spawn(async move {
            pods.watch_pods(publish_pods, named).await;
            "the watch of pods"
        });
    };
    let clusters = cluster::connect_all((config, observed), publish, parts, begin).await?;
    let (client, node) = (clusters[0].access.client.clone(), config.node.clone());
    let taint = startup_taint::remove_when_ready(client, node, Arc::clone(observed));
    parts.spawn(async move { match taint.await {} });
    let (upstreams, live) = clusters.into_iter().map(|cluster| (cluster.upstream, cluster.live)).unzip();
    reload::announce_async_mutations(recorder, &config.recording);
    let (change_recording, recording) = watch::channel(config.recording.clone());
    let followed = emergency::follow(recorder.clone(), recording, PathBuf::from(emergency::STANDARD));
    parts.spawn(async move {
        followed.await;
        "the emergency switch"
    });
    let reload = Reload {
        clusters: live,
        recording: change_recording,
        enrolment: change_enrolment,
        recorder: recorder.clone(),
        observed: Arc::clone(observed),
    };
    parts.spawn(async move {
        reload.follow(source).await;
        "the reloading of the configuration"
    });
    Ok(Proxy::new(ProxyOptions {
        clusters: upstreams,
        recorder: recorder.clone(),
        limits: proxy::Limits::default(),
        traces,
    }))
}

/// What `config` says of what must be in force before anything else.
pub fn guard_options(config: &Config) -> guard::Options {
    let clusters = config.clusters.iter().map(|cluster| guard::ConfiguredCluster {
        name: cluster.name.clone(),
        addresses: cluster.addresses.clone(),
        names: cluster.endpoint_names.clone(),
    });
    guard::Options {
        cgroup_root: config.cgroup_root.clone(),
        pinning: Pinning::standard(),
        clusters: Some(clusters.collect()),
        state_directory: config.state_directory.clone(),
    }
}

/// How `config` wants its clusters to be recorded.
pub(crate) fn recorder_options(config: &Config) -> RecorderOptions {
    let clusters = config.clusters.iter().map(|cluster| cluster.name.clone()).collect();
    RecorderOptions {
        journal_bytes_max: config.journal.bytes_max,
        tenant: config.tenant.clone(),
        response_bytes_max: config.limits.response_bytes_max,
        session_idle_timeout: config.limits.session_idle_timeout,
        rules: config.recording.commits.clone(),
        pod_quota: config.limits.pod_quota,
        signing_key_files: config.journal.signing_key_files.clone(),
        idle_checkpoint_interval: config.journal.idle_checkpoint_interval,
        recipient_files: config.recording.recipient_files.clone(),
        key_service: config.recording.kms.clone().map(|key| Arc::new(Kms::new(key)) as Arc<dyn KeyService>),
        ..RecorderOptions::new(config.journal.directory.clone(), config.node.clone(), clusters)
    }
}

/// The server for monitoring, if there is to be one. Nothing waits for it: no pod is refused for its sake.
struct Monitoring(Option<(CancellationToken, tokio::task::JoinHandle<()>)>);

impl Monitoring {
    fn start(config: &Config, telemetry: &Arc<Telemetry>) -> Self {
        Self(config.metrics.map(|address| {
            let stop = CancellationToken::new();
            let serving = telemetry::server::serve(address, telemetry.clone(), stop.clone());
            (stop, tokio::spawn(serving))
        }))
    }

    /// Gives the address free.
    async fn stop(mut self) {
        if let Some((stop, serving)) = self.0.take() {
            stop.cancel();
            // It ends at once; should it have panicked, nothing is left to end.
            let _ = serving.await;
        }
    }
}

impl Drop for Monitoring {
    fn drop(&mut self) {
        if let Some((stop, _)) = &self.0 {
            stop.cancel();
        }
    }
}

/// What sends traces, if any are made. Nothing waits for it but the end of the agent, for a moment.
struct Exporting(Option<(CancellationToken, tokio::task::JoinHandle<()>)>);

impl Exporting {
    fn start(config: &Config) -> (Option<Traces>, Self) {
        let Some(settings) = &config.traces else { return (None, Self(None)) };
        match Traces::new(settings, &config.node) {
            Ok((traces, exporter)) => {
                let stop = CancellationToken::new();
                let running = tokio::spawn(exporter.run(stop.clone()));
                (Some(traces), Self(Some((stop, running))))
            }
            // No pod is refused for their sake.
            Err(error) => {
                tracing::error!(event = "traces-off", error = doctor::chain(&error), "no traces are made");
                (None, Self(None))
            }
        }
    }

    /// Sends what is left.
    async fn stop(self) {
        if let Some((stop, running)) = self.0 {
            stop.cancel();
            // Its own deadline ends it; should it have panicked, nothing is left to send.
            let _ = running.await;
        }
    }
}

/// The signals that end the agent in an orderly way.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, AppError> {
        let wait_for = |kind| signal(kind).map_err(AppError::Signals);
        Ok(Self {
            terminate: wait_for(SignalKind::terminate())?,
            interrupt: wait_for(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::serve_until;

    #[tokio::test]
    async fn what_waits_for_room_at_the_end_is_served() {
        let (sender, mut receiver) = mpsc::channel(1);
        let ending = async move {
            for number in 0..5 {
                sender.send(number).await.expect("the receiver is there");
            }
        };
        let mut served = Vec::new();
        serve_until(ending, &mut receiver, |number| served.push(number)).await;
        assert_eq!(served, [0, 1, 2, 3, 4]);
    }
}
