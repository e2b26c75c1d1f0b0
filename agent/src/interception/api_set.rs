//! The API set: which addresses are API servers, in the kernel's map.
//!
//! Beside what a cluster publishes and the configuration says, it has what host names stand for, the addresses by which
//! the same machines are reached, and the kubelets of all machines. Whose an address is, and how long it stays, is in
//! [`super::claims`]; losing a watch or a name server changes nothing at all.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::{Duration, Instant},
};
use tokio_util::sync::CancellationToken;

use weir_common::kernel::KUBELET;

use super::{
    claims::Claims,
    cluster_watch::ApiSet,
    hosts::{self, Hosts},
    loader::{Kernel, KernelError},
    maps::lock,
    proof::{self, Proof},
};
use crate::{config::EndpointName, recording::Recorder};

/// How often addresses are looked through for old ones.
const RETENTION_CHECK: Duration = Duration::from_secs(10 * 60);
/// Most addresses of one cluster that are asked for a proof at once.
const PROOFS_MAX: usize = 16;
/// How long an address that gave no proof is not suspected again: whoever forges answers holds up no more than one
/// connection attempt of its neighbours in this time.
const ACQUITTED_FOR: Duration = Duration::from_secs(10 * 60);
/// Most addresses that are known to have given no proof; beyond it the record of all of them is dropped.
const ACQUITTED_MAX: usize = 4096;

/// Where the addresses of one cluster come from.
#[derive(Debug)]
pub struct ClusterAddresses {
    /// Index of the cluster.
    pub cluster: u32,
    /// What the cluster itself publishes.
    pub published: watch::Receiver<ApiSet>,
    /// Addresses from the configuration, which stay for good.
    pub configured: Vec<SocketAddr>,
    /// Host names from the configuration.
    pub names: Vec<EndpointName>,
    /// How an address proves to be one of this cluster's API servers, once its CA is read.
    pub proof: watch::Receiver<Option<Proof>>,
}

/// The API set in the kernel, and whose its addresses are.
pub(super) struct Addresses {
    kernel: Arc<Kernel>,
    recorder: Recorder,
    claims: Mutex<Claims>,
    /// What was last refused to each cluster: reported once.
    refused: Mutex<HashMap<u32, HashSet<SocketAddr>>>,
    /// Changes when an address has come in for certain.
    grown: watch::Sender<()>,
}

impl Addresses {
    /// Takes over what a former process had, and writes what the configuration says.
    ///
    /// # Errors
    /// The kernel refuses: without the API set nothing would be denied.
    pub(super) fn new(
        kernel: Arc<Kernel>,
        recorder: Recorder,
        clusters: &[ClusterAddresses],
    ) -> Result<Self, KernelError> {
        let mut claims = Claims::default();
        let now = Instant::now();
        for (address, owner) in kernel.api_endpoints()? {
            claims.adopt(owner, address, now);
        }
        for cluster in clusters {
            for address in &cluster.configured {
                kernel.set_api_endpoint(*address, cluster.cluster)?;
            }
            claims.publish(cluster.cluster, cluster.configured.iter().copied(), now);
        }
        let (claims, grown) = (Mutex::new(claims), watch::channel(()).0);
        Ok(Self { kernel, recorder, claims, refused: Mutex::default(), grown })
    }

    pub(super) fn kernel(&self) -> Arc<Kernel> {
        self.kernel.clone()
    }

    /// Changes when an address has come in for certain.
    pub(super) fn grown(&self) -> watch::Receiver<()> {
        self.grown.subscribe()
    }

    /// Writes all that an owner publishes now; new addresses come in before old ones go.
    fn publish(&self, owner: u32, current: HashSet<SocketAddr>) {
        // Held until all is written: two owners must not overtake each other on the way to the kernel.
        let mut claims = lock(&self.claims);
        let changes = claims.publish(owner, current.iter().copied(), Instant::now());
        let refused: HashMap<_, _> = changes.refused.into_iter().collect();
        let own = current.iter().filter(|address| !refused.contains_key(*address));
        // All of them, not only new ones: what was lost from the map is put back.
        let added = own.map(|address| self.kernel.set_api_endpoint(*address, owner));
        let removed = changes.removed.iter().map(|address| self.kernel.remove_api_endpoint(*address));
        // One that fails must not leave the others out.
        for error in added.chain(removed).filter_map(Result::err) {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                event = "api-set-not-updated",
                cluster = owner,
                error,
                "cannot update the API set"
            );
        }
        drop(claims);
        self.report(owner, &refused);
        if !changes.added.is_empty() {
            self.grown.send_replace(());
        }
    }

    fn report(&self, owner: u32, refused: &HashMap<SocketAddr, u32>) {
        let mut all = lock(&self.refused);
        let known = all.entry(owner).or_default();
        for (address, keeper) in refused.iter().filter(|(address, _)| !known.contains(*address)) {
            tracing::error!(event = "address-of-two-clusters", cluster = owner, %address, keeper, "two clusters publish one address; it stays with the first");
            let keeper =
                if *keeper == KUBELET { "the kubelets".to_owned() } else { format!("cluster {keeper}") };
            let message = format!(
                "{address} is also published by {keeper} (counted from 0, in the order of the configuration), to which connections to it go; give the clusters different addresses"
            );
            let cluster = usize::try_from(owner).ok().filter(|_| owner != KUBELET);
            self.recorder.finding(cluster, None, "addressOfTwoClusters", &message);
        }
        *known = refused.keys().copied().collect();
    }

    /// Takes an address into the API set on suspicion; returns whether it was of nobody before.
    fn suspect(&self, owner: u32, address: SocketAddr) -> bool {
        let mut claims = lock(&self.claims);
        if !claims.suspect(owner, address, Instant::now()) {
            return false;
        }
        if let Err(error) = self.kernel.set_api_endpoint(address, owner) {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                event = "api-set-not-updated",
                cluster = owner,
                error,
                "cannot update the API set"
            );
        }
        // What pods have open there is stalled, but not ended: a forgery must not cost them more.
        true
    }

    /// Keeps it there, or takes it out again.
    fn settle(&self, owner: u32, address: SocketAddr, proven: bool) {
        let mut claims = lock(&self.claims);
        if claims.settle(owner, address, proven, Instant::now())
            && let Err(error) = self.kernel.remove_api_endpoint(address)
        {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                event = "api-set-not-updated",
                cluster = owner,
                error,
                "cannot update the API set"
            );
        }
        drop(claims);
        if proven {
            self.grown.send_replace(());
        }
    }
}

/// What is learnt of a cluster's host names.
pub(super) struct Learnt {
    /// What name servers say, to the agent itself.
    pub(super) resolved: watch::Receiver<HashSet<SocketAddr>>,
    /// What they say to anybody on this node.
    pub(super) suspicions: Arc<Suspicions>,
    /// Which of it is under suspicion and must be proven.
    pub(super) suspected: mpsc::Receiver<(EndpointName, SocketAddr)>,
}

/// Where the addresses go that somebody on this node was told of a cluster's names: at once into the API set, on the
/// thread that saw them; then to who has them proven.
pub(super) struct Suspicions {
    cluster: u32,
    addresses: Arc<Addresses>,
    /// Has room for all that are proven at once.
    suspected: mpsc::Sender<(EndpointName, SocketAddr)>,
    /// Has the agent ask the name servers now.
    ask: Arc<Notify>,
    state: Mutex<Suspected>,
}

#[derive(Default)]
struct Suspected {
    /// How many are under suspicion.
    open: usize,
    /// Those that gave no proof, and when.
    acquitted: HashMap<SocketAddr, Instant>,
}

impl Suspicions {
    pub(super) fn new(
        cluster: u32,
        addresses: Arc<Addresses>,
        ask: Arc<Notify>,
    ) -> (Arc<Self>, mpsc::Receiver<(EndpointName, SocketAddr)>) {
        let (suspected, receiver) = mpsc::channel(PROOFS_MAX);
        (Arc::new(Self { cluster, addresses, suspected, ask, state: Mutex::default() }), receiver)
    }

    /// Has the agent ask the name servers now.
    pub(super) fn ask(&self) {
        self.ask.notify_one();
    }

    /// Takes an address under suspicion, if it is of nobody. Whether it is not known for none of this cluster's.
    pub(super) fn meet(&self, name: &EndpointName, address: SocketAddr) -> bool {
        let mut state = lock(&self.state);
        let young = |acquitted: &Instant| acquitted.elapsed() < ACQUITTED_FOR;
        if state.acquitted.get(&address).is_some_and(young) {
            // It may have become genuine since: then the name servers say so to the agent as well.
            self.ask();
            return false;
        }
        if state.open >= PROOFS_MAX {
            // What is genuine among so many, the name servers say to the agent as well.
            self.ask();
        } else if self.addresses.suspect(self.cluster, address) {
            state.open += 1;
            // As many are open at most as there is room for; nobody receives where the agent ends.
            let _ = self.suspected.try_send((name.clone(), address));
            self.ask();
        }
        true
    }

    /// An address has given its proof, or not.
    fn settle(&self, address: SocketAddr, proven: bool) {
        // In this order: who meets it in between must not find it of nobody and not acquitted.
        let mut state = lock(&self.state);
        state.open = state.open.saturating_sub(1);
        if !proven {
            if state.acquitted.len() >= ACQUITTED_MAX {
                state.acquitted.clear();
            }
            state.acquitted.insert(address, Instant::now());
        }
        drop(state);
        self.addresses.settle(self.cluster, address, proven);
    }
}

/// Keeps one cluster's part of the API set up to date until cancelled.
pub(super) async fn follow(
    mut cluster: ClusterAddresses,
    mut learnt: Learnt,
    mut hosts: watch::Receiver<Hosts>,
    addresses: Arc<Addresses>,
    cancellation: CancellationToken,
) {
    let mut check = tokio::time::interval(RETENTION_CHECK);
    let (mut watched, mut resolving) = (true, true);
    let mut proofs = JoinSet::new();
    let mut stale = true;
    loop {
        if stale {
            let published = cluster.published.borrow_and_update().clone();
            let mut current = learnt.resolved.borrow_and_update().clone();
            current.extend(published.service.iter().chain(&published.endpoints).chain(&cluster.configured));
            let aliases = hosts::aliases(&current, &hosts.borrow_and_update());
            current.extend(aliases);
            addresses.publish(cluster.cluster, current);
        }
        stale = true;
        tokio::select! {
            () = cancellation.cancelled() => return,
            // Whoever watched may have ended: what is known stays.
            changed = cluster.published.changed(), if watched => watched = changed.is_ok(),
            changed = learnt.resolved.changed(), if resolving => resolving = changed.is_ok(),
            Ok(()) = hosts.changed() => {}
            _ = check.tick() => {}
            Some((name, address)) = learnt.suspected.recv() => {
                stale = false;
                tracing::info!(event = "address-suspected", cluster = cluster.cluster, %name, %address, "somebody on this node was told a new address of this name");
                proofs.spawn(proof::given(cluster.proof.clone(), name, address));
            }
            Some(Ok((address, proven))) = proofs.join_next() => {
                stale = false;
                learnt.suspicions.settle(address, proven);
            }
        }
    }
}

/// The same for the kubelets.
pub(super) async fn follow_kubelets(
    mut hosts: watch::Receiver<Hosts>,
    addresses: Arc<Addresses>,
    cancellation: CancellationToken,
) {
    let mut check = tokio::time::interval(RETENTION_CHECK);
    loop {
        let current = hosts::kubelets(&hosts.borrow_and_update());
        addresses.publish(KUBELET, current);
        tokio::select! {
            () = cancellation.cancelled() => return,
            Ok(()) = hosts.changed() => {}
            _ = check.tick() => {}
        }
    }
}
