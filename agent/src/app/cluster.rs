//! One configured cluster, made ready to serve: reached, its API set watched, its certificate issued.
//!
//! Whatever is wrong with a file fails at once; whatever may pass (the API server is down, the signer refuses) is
//! tried again with backoff and said in the log, while the kernel denies.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rustls::pki_types::ServerName;
use tokio::{sync::watch, task::JoinSet};

use super::AppError;
use crate::{
    auth::{Issuers, Policy, Rules, fetch::Fetch},
    aws::Aws,
    config::{Cluster, Config, Trust},
    interception::{
        cluster_access::ClusterAccess,
        cluster_watch::{self, API_SET_READ, ApiSet},
        observed::Observed,
        proof::Proof,
        stored_set::StoredSet,
    },
    proxy::{ClusterUpstream, Endpoints, upstream_tls},
    trust::{
        self, Authority, ServingNames, authority::MountedCa, client::ClientCa, cluster_signer::ClusterSigner,
    },
};

/// First pause between attempts to reach a cluster.
const RETRY_FIRST: Duration = Duration::from_millis(500);
/// Longest pause between attempts.
const RETRY_LONGEST: Duration = Duration::from_secs(15);

/// A cluster that can be served.
pub(super) struct Connected {
    pub(super) access: ClusterAccess,
    pub(super) upstream: ClusterUpstream,
    pub(super) live: Live,
}

/// Where a cluster's addresses are published, and how they prove to be its own.
pub(super) type Publish = (watch::Sender<ApiSet>, watch::Sender<Option<Proof>>);

/// Makes all clusters of the configuration ready, in their order. What must run on is spawned into `parts`; `begin` spawns what
/// of the first one must not wait until it can be served.
pub(super) async fn connect_all(
    (config, observed): (&Config, &Observed),
    publish: Vec<Publish>,
    parts: &mut JoinSet<&'static str>,
    begin: impl FnOnce(&ClusterAccess, &mut JoinSet<&'static str>),
) -> Result<Vec<Connected>, AppError> {
    let mut connected = Vec::with_capacity(config.clusters.len());
    let mut begin = Some(begin);
    for (cluster, publish) in config.clusters.iter().zip(publish) {
        let (known, ca) = (known(config, cluster), cluster.certificate_authority.as_deref());
        let access = ClusterAccess::load_with(&cluster.name, &cluster.access, ca, &known).await?;
        if let Some(begin) = begin.take() {
            begin(&access, parts);
        }
        connected.push(connect((config, observed), cluster, (access, publish), parts).await?);
    }
    Ok(connected)
}

async fn connect(
    (config, observed): (&Config, &Observed),
    cluster: &Cluster,
    (access, (publish, proof)): (ClusterAccess, Publish),
    parts: &mut JoinSet<&'static str>,
) -> Result<Connected, AppError> {
    let tls = upstream_tls((*access.ca.roots()).clone(), None)?;
    proof.send_replace(Some(tls.clone()));
    let clients = cluster.client_certificate_authority.as_deref().map(ClientCa::load).transpose()?;
    // Checked before the network is waited for: a CA that does not chain is a mistake in the configuration.
    let authority = Arc::new(authority(config, cluster, &access)?);
    let server_name = ServerName::try_from(access.host.trim_matches(['[', ']']).to_owned())
        .map_err(|_| AppError::ServerName { cluster: cluster.name.clone(), host: access.host.clone() })?;
    reach(cluster, &access, observed).await;
    // Each step leaves a word before it waits: who asks why the agent is not ready is told of the one that it is at.
    observed.cluster_waits(Some(format!("{}: waits for {API_SET_READ}", cluster.name)));

    let published = publish.subscribe();
    let client = access.client.clone();
    parts.spawn(async move {
        cluster_watch::watch_api_set(client, publish).await;
        "the watch of the API set"
    });
    let derived = Derived::new(cluster);
    let (names, endpoints) = derived.follow(published, parts).await?;
    let asks = format!("{}: has asked for a certificate, of the {}", cluster.name, authority.describe());
    observed.cluster_waits(Some(asks));
    let asked = (authority.clone(), names.clone(), clients);
    let (serving, renewal) = serving_certificate(cluster, asked, observed).await;
    parts.spawn(async move {
        renewal.run().await;
        "the renewal of a certificate"
    });
    tracing::info!(event = "cluster-has-certificate", cluster = cluster.name, "has its serving certificate");
    let own_tls = access.certificate.as_ref().map(|certificate| {
        let mut own = rustls::ClientConfig::clone(&tls);
        own.client_auth_cert_resolver = Arc::clone(certificate);
        Arc::new(own)
    });
    // Of this cluster alone: no credential of one cluster's is found for another.
    let aws = Aws::new();
    let policy =
        Arc::new(ArcSwap::from_pointee(policy(&config.node, cluster, &access, (None, aws.clone()))?));
    let live = Live { access: access.clone(), node: config.node.clone(), aws, policy: Arc::clone(&policy) };
    let upstream = ClusterUpstream {
        policy,
        own_tls,
        name: cluster.name.clone(),
        names: names.borrow().all().collect(),
        endpoints: Endpoints::Listed(endpoints),
        server_name,
        tls,
        serving,
    };
    Ok(Connected { access, upstream, live })
}

/// Addresses at which the cluster's API servers are, or were when an agent last ran.
fn known(config: &Config, cluster: &Cluster) -> Vec<SocketAddr> {
    // What is wrong with the file was said when the guard read it.
    let stored = StoredSet::read(&config.state_directory).ok().flatten().unwrap_or_default();
    let stored = stored.clusters.into_iter().filter(|stored| stored.name == cluster.name);
    cluster.addresses.iter().copied().chain(stored.flat_map(|stored| stored.addresses)).collect()
}

/// What of a cluster changes while the agent runs.
pub(super) struct Live {
    access: ClusterAccess,
    node: String,
    aws: Aws,
    policy: Arc<ArcSwap<Policy>>,
}

impl Live {
    /// Makes the rules and issuers of `cluster`; gives what puts them in force, for requests from then on.
    /// Issuers that are the same keep what is remembered of them: they may be out of reach just now.
    pub(super) fn prepare(
        &self,
        cluster: &Cluster,
        same_issuers: bool,
    ) -> Result<impl FnOnce() + use<>, AppError> {
        let issuers = if same_issuers { self.policy.load().issuers() } else { None };
        let policy = policy(&self.node, cluster, &self.access, (issuers, self.aws.clone()))?;
        let place = Arc::clone(&self.policy);
        Ok(move || place.store(Arc::new(policy)))
    }
}

/// Who may ask the cluster, and as whom.
pub(crate) fn policy(
    node: &str,
    cluster: &Cluster,
    access: &ClusterAccess,
    (issuers, aws): (Option<Arc<Issuers>>, Aws),
) -> Result<Policy, AppError> {
    let Some(roles) = &cluster.roles else { return Ok(Policy::open(cluster.name.clone())) };
    let issuers = match issuers {
        Some(issuers) => issuers,
        None => {
            let through_cluster: Arc<dyn Fetch> = access.own.clone();
            Arc::new(Issuers::new(&cluster.authentication.jwt, &through_cluster)?)
        }
    };
    let rules = Rules { roles: roles.clone(), issuers, own: access.own.clone(), aws, node: node.to_owned() };
    Ok(Policy::new(cluster.name.clone(), rules))
}

fn authority(config: &Config, cluster: &Cluster, access: &ClusterAccess) -> Result<Authority, AppError> {
    Ok(match &cluster.trust {
        Trust::MountedCa { certificate, key, client_bundle } => {
            let files = (certificate.as_path(), key.as_path());
            Authority::Mounted(MountedCa::load(files, client_bundle.as_deref(), access.ca.clone())?)
        }
        Trust::ClusterSigner { signer_name } => Authority::ClusterSigner(ClusterSigner::new(
            access.client.clone(),
            config.node.clone(),
            access.ca.clone(),
            signer_name.clone(),
        )),
    })
}

/// Waits until the API server answers.
async fn reach(cluster: &Cluster, access: &ClusterAccess, observed: &Observed) {
    let mut pause = RETRY_FIRST;
    loop {
        match access.probe().await {
            Ok(version) => {
                tracing::info!(
                    event = "api-server-reached",
                    cluster = cluster.name,
                    version,
                    "API server reached"
                );
                return;
            }
            Err(error) => {
                tracing::warn!(
                    event = "api-server-not-reached",
                    cluster = cluster.name,
                    error,
                    retry_in_ms = pause.as_millis(),
                    "API server not reached; pods of this node are denied until it is"
                );
                observed.cluster_waits(Some(format!("{}: API server not reached: {error}", cluster.name)));
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LONGEST);
    }
}

/// The first certificate; an authority that refuses now may not refuse later.
async fn serving_certificate(
    cluster: &Cluster,
    (authority, names, clients): (Arc<Authority>, watch::Receiver<ServingNames>, Option<ClientCa>),
    observed: &Observed,
) -> (trust::ServingCertificate, trust::Renewal) {
    let mut pause = RETRY_FIRST;
    loop {
        match trust::serve(authority.clone(), names.clone(), clients.clone()).await {
            Ok(served) => {
                observed.cluster_waits(None);
                return served;
            }
            Err(error) => {
                tracing::error!(
                    event = "no-certificate",
                    cluster = cluster.name,
                    error = %Causes(&error),
                    retry_in_ms = pause.as_millis(),
                    "no certificate that pods would trust; enrolled pods are refused until there is one"
                );
                observed.cluster_waits(Some(format!("{}: {}", cluster.name, Causes(&error))));
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LONGEST);
    }
}

/// An error with its causes, in one line.
struct Causes<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Causes<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(formatter, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

/// What follows from a cluster's API set and its configuration.
pub(crate) struct Derived {
    addresses: Vec<SocketAddr>,
    host_names: Vec<String>,
}

type Followed = (watch::Receiver<ServingNames>, Arc<ArcSwap<Vec<SocketAddr>>>);

impl Derived {
    pub(crate) fn new(cluster: &Cluster) -> Self {
        Self { addresses: cluster.addresses.clone(), host_names: cluster.host_names.clone() }
    }

    /// What a certificate must cover. What the `approver` lets it cover must be as much.
    pub(crate) fn names(&self, published: &ApiSet) -> ServingNames {
        let addresses = published.service.iter().chain(&published.endpoints).chain(&self.addresses);
        let mut names = ServingNames::of_own_cluster(addresses.map(SocketAddr::ip));
        for host in &self.host_names {
            names.add_host(host);
        }
        names
    }

    /// Waits for the first whole API set, then keeps two things in step with it: the names that the certificate
    /// covers, and the endpoints that the proxy dials.
    async fn follow(
        self,
        mut published: watch::Receiver<ApiSet>,
        parts: &mut JoinSet<&'static str>,
    ) -> Result<Followed, AppError> {
        let first = published
            .wait_for(ApiSet::is_whole)
            .await
            .map_err(|_| AppError::PartEnded { part: "the watch of the API set" })?
            .clone();
        let list = |set: &ApiSet| Arc::new(set.endpoints.iter().copied().collect::<Vec<_>>());
        let endpoints = Arc::new(ArcSwap::new(list(&first)));
        let (publish_names, names) = watch::channel(self.names(&first));
        let followed = endpoints.clone();
        parts.spawn(async move {
            while published.changed().await.is_ok() {
                let set = published.borrow_and_update().clone();
                followed.store(list(&set));
                publish_names.send_replace(self.names(&set));
            }
            "the watch of the API set"
        });
        Ok((names, endpoints))
    }
}
