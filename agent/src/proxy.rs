//! The gateway itself: TLS, HTTP, upstream; one accepted connection in, recorded requests out.
//!
//! Knows nothing of the kernel: the caller of a connection arrives with it. Knows nothing of files either: what
//! it sees goes to the recorder, and what the recorder refuses is not forwarded.
//!
//! `server` (the client's side) → `pipeline` (one request: `headers`, `body`, recording) → `pool` and `upstream`
//! (the API server's side); `upgrade` joins both sides of exec and port-forward; `status` is what Weir says itself.

mod body;
#[cfg(test)]
mod commit_tests;
mod headers;
mod measures;
mod pipeline;
mod pool;
#[doc(hidden)]
pub mod probe;
mod quota;
mod reported;
#[cfg(test)]
mod rig;
#[cfg(test)]
mod role_tests;
mod server;
mod status;
#[cfg(test)]
mod stream_commit_tests;
#[cfg(test)]
mod stream_end_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trace_tests;
mod traced;
#[cfg(test)]
mod unread_tests;
mod upgrade;
mod upstream;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::pki_types::ServerName;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weir_common::event::Caller;

use self::{
    headers::HostNames,
    measures::Measures,
    pool::Pool,
    quota::{Bound, Quotas},
    reported::Reported,
    upstream::Dialler,
};
pub use self::{
    measures::{Measured, Verdict},
    upstream::{Endpoints, upstream_tls},
};
use crate::{auth::Policy, aws::AwsMeasures, recording::Recorder, traces::Traces, trust::ServingCertificate};

/// How long cut tasks may take to close their records.
const CUT_GRACE: Duration = Duration::from_secs(5);

/// A connection whose caller is known. Made by the interception, consumed by the proxy.
#[derive(Debug)]
pub struct Accepted {
    /// The connection, before TLS.
    pub stream: tokio::net::TcpStream,
    /// When it was accepted.
    pub accepted: Instant,
    /// The address that the client dialled; decides the cluster, with SNI and Host only checked against it.
    pub original_destination: SocketAddr,
    /// Index of the cluster that address belongs to.
    pub cluster: usize,
    /// Who connected.
    pub caller: Arc<Caller>,
    /// What the pod and its namespace were labelled with at the time.
    pub labels: Arc<Labels>,
}

/// Labels of a pod and of its namespace: what rules may ask for beside the caller. Not recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// The pod's.
    pub pod: BTreeMap<String, String>,
    /// Its namespace's.
    pub namespace: BTreeMap<String, String>,
}

/// What the proxy can fail at before it serves.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The TLS configuration towards an API server.
    #[error(
        "cannot use TLS towards the API server: {source}; do the client certificate and its key belong together?"
    )]
    UpstreamTls {
        /// What rustls says.
        source: rustls::Error,
    },
}

/// One cluster that clients may dial.
#[derive(Clone, Debug)]
pub struct ClusterUpstream {
    /// Its name in the configuration.
    pub name: String,
    /// Host names and addresses that clients may use in SNI and `Host`; the dialled address always may.
    pub names: Vec<String>,
    /// Where its API server is dialled.
    pub endpoints: Endpoints,
    /// The name (or address) that its certificate is verified for.
    pub server_name: ServerName<'static>,
    /// How it is verified, and Weir's client certificate if there is one; from [`upstream_tls`]. ALPN is set here.
    pub tls: Arc<rustls::ClientConfig>,
    /// TLS with the agent's own client certificate, where the agent has one: for whom it impersonates.
    pub own_tls: Option<Arc<rustls::ClientConfig>>,
    /// What clients are served with.
    pub serving: ServingCertificate,
    /// Who may ask, and as whom; replaced as the configuration changes.
    pub policy: Arc<ArcSwap<Policy>>,
}

/// Bounds of the proxy; the defaults are meant to be kept.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most bytes of a request body; the API server's own limit is 3 MiB.
    pub body_bytes_max: usize,
    /// Most bytes of held bodies, for one pod.
    pub held_bytes_per_pod_max: usize,
    /// Most bytes of held bodies in all.
    pub held_bytes_max: usize,
    /// Most connections of one pod.
    pub connections_per_pod_max: usize,
    /// Most connections in all.
    pub connections_max: usize,
    /// How long a TLS handshake may take.
    pub handshake_timeout: Duration,
    /// How long a request's body may take to arrive.
    pub body_timeout: Duration,
    /// How long TCP, and then TLS, to one endpoint of the API server may take.
    pub dial_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: usize = 1024 * 1024;
        Self {
            body_bytes_max: 3 * MIB,
            held_bytes_per_pod_max: 24 * MIB,
            held_bytes_max: 192 * MIB,
            connections_per_pod_max: 1024,
            connections_max: 16 * 1024,
            handshake_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(60),
            dial_timeout: Duration::from_secs(5),
        }
    }
}

/// What a proxy is made of.
#[derive(Debug)]
pub struct ProxyOptions {
    /// The clusters, by index.
    pub clusters: Vec<ClusterUpstream>,
    /// Where everything is recorded.
    pub recorder: Recorder,
    /// Bounds.
    pub limits: Limits,
    /// Where traces begin, if any are made.
    pub traces: Option<Traces>,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Everything ended by itself.
    Finished,
    /// The deadline came first; this many tasks (connections, upgraded streams) were cut, their records say so.
    Cut(usize),
}

#[derive(Debug)]
struct Cluster {
    name: String,
    names: HostNames,
    serving: ServingCertificate,
    pool: Pool,
    /// Connections with the agent's own client certificate.
    own: Option<Pool>,
    policy: Arc<ArcSwap<Policy>>,
    measures: Measures,
}

/// What all connections have in common.
#[derive(Debug)]
struct Shared {
    clusters: Vec<Cluster>,
    recorder: Recorder,
    limits: Limits,
    traces: Option<Traces>,
    quotas: Arc<Quotas>,
    reported: Reported,
    /// Client connections and upgraded streams.
    tasks: TaskTracker,
    /// Connections to API servers.
    upstream_tasks: TaskTracker,
    /// No new requests.
    draining: CancellationToken,
    /// No more bytes.
    cut: CancellationToken,
}

/// Spawns what hyper spawns for HTTP/2 where a drain waits for it.
#[derive(Clone, Debug)]
struct Tracked(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

/// The proxy. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
}

impl Proxy {
    /// Makes a proxy; it opens no connection before a client asks.
    pub fn new(options: ProxyOptions) -> Self {
        let ProxyOptions { clusters, recorder, limits, traces } = options;
        let (upstream_tasks, cut) = (TaskTracker::new(), CancellationToken::new());
        let clusters = clusters
            .into_iter()
            .map(|cluster| {
                let pool = |tls: &rustls::ClientConfig| {
                    Pool::new(Dialler::new(
                        cluster.endpoints.clone(),
                        cluster.server_name.clone(),
                        tls,
                        limits.dial_timeout,
                        upstream_tasks.clone(),
                        cut.clone(),
                    ))
                };
                Cluster {
                    pool: pool(&cluster.tls),
                    own: cluster.own_tls.as_deref().map(pool),
                    names: HostNames::new(&cluster.names),
                    serving: cluster.serving,
                    policy: cluster.policy,
                    name: cluster.name,
                    measures: Measures::default(),
                }
            })
            .collect();
        let quotas = Quotas::new(
            Bound { per_pod: limits.connections_per_pod_max, in_all: limits.connections_max },
            Bound { per_pod: limits.held_bytes_per_pod_max, in_all: limits.held_bytes_max },
        );
        let (tasks, draining) = (TaskTracker::new(), CancellationToken::new());
        Self {
            shared: Arc::new(Shared {
                clusters,
                recorder,
                limits,
                traces,
                quotas,
                reported: Reported::default(),
                tasks,
                upstream_tasks,
                draining,
                cut,
            }),
        }
    }

    /// Serves a connection on a task of its own. While the proxy drains, the connection is closed.
    pub fn serve(&self, accepted: Accepted) {
        if !self.shared.draining.is_cancelled() {
            self.shared.tasks.spawn(server::serve(Arc::clone(&self.shared), accepted));
        }
    }

    /// Number of connections and upgraded streams that are being served.
    pub fn active(&self) -> usize {
        self.shared.tasks.len()
    }

    /// What became of traces, if any are made.
    pub fn traced(&self) -> Option<crate::traces::Measured> {
        self.shared.traces.as_ref().map(Traces::measured)
    }

    /// What is counted of each cluster, and the end of its certificate's validity.
    pub fn measured(&self) -> Vec<(&str, Measured, SystemTime)> {
        let clusters = self.shared.clusters.iter();
        clusters
            .map(|cluster| (cluster.name.as_str(), cluster.measures.read(), cluster.serving.not_after()))
            .collect()
    }

    /// What has happened with AWS roles, of each cluster.
    pub fn aws_measured(&self) -> Vec<(&str, AwsMeasures)> {
        let clusters = self.shared.clusters.iter();
        clusters.map(|cluster| (cluster.name.as_str(), cluster.policy.load().aws_measures())).collect()
    }

    /// Takes no new requests, lets running ones end until `deadline` has passed, then cuts what is left. Stop the
    /// recorder after this, so that the last records are in it.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        let shared = &self.shared;
        shared.draining.cancel();
        shared.tasks.close();
        let finished = tokio::time::timeout(deadline, shared.tasks.wait()).await.is_ok();
        let drained = if finished { Drained::Finished } else { Drained::Cut(shared.tasks.len()) };
        shared.cut.cancel();
        for cluster in &shared.clusters {
            cluster.pool.clear();
            cluster.own.iter().for_each(Pool::clear);
        }
        shared.upstream_tasks.close();
        let ended = async { tokio::join!(shared.tasks.wait(), shared.upstream_tasks.wait()) };
        if tokio::time::timeout(CUT_GRACE, ended).await.is_err() {
            tracing::warn!(
                event = "connections-stay",
                tasks = shared.tasks.len(),
                "connections did not end although they were cut"
            );
        }
        drained
    }
}
