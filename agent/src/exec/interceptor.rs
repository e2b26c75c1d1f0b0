//! The kernel's part of a session: programs on the command's cgroup alone, the API set kept up to date, and a
//! listener whose connections go to the proxy.
//!
//! Nothing is pinned: all of it goes with this process.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use weir_common::kernel::{CgroupEntry, Class};

use super::{
    api_set::{ApiSetError, Target},
    cgroup::{CgroupError, CommandCgroup},
};
use crate::{
    interception::{
        accept::{self, Sink},
        caller::Tenant,
        counters::Counters,
        listener::{Listener, ListenerError, Namespace},
        loader::{Kernel, KernelError, Pinning},
    },
    proxy::Proxy,
    recording::Recorder,
};

/// Connections that wait for the proxy.
const ACCEPTED_MAX: usize = 64;
/// How often names of API servers are looked up again: their addresses change while a command runs.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);
/// Most addresses of the API set: old ones stay, since a client may still dial them.
const ADDRESSES_MAX: usize = 1024;

/// Why the command's connections cannot be intercepted.
#[derive(Debug, thiserror::Error)]
pub enum InterceptorError {
    /// The kernel programs do not work.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// There is no listener.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// There is no cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The API server of the current context cannot be found.
    #[error(transparent)]
    ApiSet(#[from] ApiSetError),
}

/// Interception of one command; dropped, it ends.
#[derive(Debug)]
pub struct Interceptor {
    kernel: Arc<Kernel>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Interceptor {
    /// Listens, classifies the cgroup, fills the API set, and attaches. When it returns, whatever a process of the
    /// cgroup connects to an address of the API set arrives at `proxy`.
    ///
    /// # Errors
    /// See [`InterceptorError`].
    pub async fn start(
        cgroup: &CommandCgroup,
        targets: Vec<Target>,
        proxy: &Proxy,
        recorder: &Recorder,
    ) -> Result<Self, InterceptorError> {
        let kernel = Arc::new(Kernel::load(Pinning::Unpinned)?);
        let listener = Listener::in_netns(Namespace::Own)?;
        let id = cgroup.id()?;
        let entry = CgroupEntry {
            listener_netns: listener.netns(),
            class: Class::Enrolled as u32,
            listener_port: u32::from(listener.port()),
        };
        kernel.classify(id, entry)?;
        // The programs are on one cgroup of the tree. In this network namespace, loopback is where a kubeconfig's server may be, as those of
        // kind and minikube are.
        kernel.set_settings(listener.netns(), 1)?;
        let mut api_set = ApiSet { kernel: Arc::clone(&kernel), targets, known: BTreeMap::new() };
        api_set.fill().await?;
        kernel.attach(cgroup.path())?;

        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let (sender, mut accepted) = mpsc::channel(ACCEPTED_MAX);
        let tenant = Tenant { cgroup: id, folder: cgroup.path().to_owned(), ..Tenant::default() };
        let (keep, tenant) = watch::channel(Arc::new(tenant));
        let sink = Sink {
            kernel: Arc::clone(&kernel),
            recorder: recorder.clone(),
            accepted: sender,
            observed: Arc::default(),
        };
        let accepting = accept::serve(Arc::new(listener), tenant, Arc::default(), sink, stop.clone());
        tasks.spawn(async move {
            accepting.await;
            drop(keep);
        });
        let proxy = proxy.clone();
        tasks.spawn(async move {
            while let Some(connection) = accepted.recv().await {
                proxy.serve(connection);
            }
        });
        let refreshing = stop.clone();
        tasks.spawn(
            async move { refreshing.run_until_cancelled_owned(api_set.refresh()).await.unwrap_or(()) },
        );
        Ok(Self { kernel, stop, tasks })
    }

    /// What the kernel has counted.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn counters(&self) -> Result<Counters, KernelError> {
        self.kernel.counters()
    }

    /// Accepts no more; connections that were accepted have reached the proxy when this returns.
    pub async fn stop(&mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// The addresses at which the kernel redirects.
struct ApiSet {
    kernel: Arc<Kernel>,
    targets: Vec<Target>,
    /// Which target has an address.
    known: BTreeMap<SocketAddr, usize>,
}

impl ApiSet {
    /// The first look-up: the current context's server must be found.
    async fn fill(&mut self) -> Result<(), InterceptorError> {
        for index in 0..self.targets.len() {
            match self.targets[index].resolve().await {
                Ok(addresses) => self.add(index, addresses)?,
                Err(error) if self.targets[index].current => {
                    return Err(self.targets[index].unresolved(error).into());
                }
                Err(error) => {
                    let target = &self.targets[index];
                    info!(event = "exec-server-not-resolved", cluster = target.name(), host = target.server.host, %error, "cannot resolve an API server");
                }
            }
        }
        Ok(())
    }

    /// Adds addresses that have not been seen. Where two servers share one, the first keeps it: the address alone
    /// tells the cluster.
    fn add(&mut self, index: usize, found: impl IntoIterator<Item = SocketAddr>) -> Result<(), KernelError> {
        for address in found {
            match self.known.get(&address) {
                Some(owner) if *owner == index => {}
                Some(owner) => warn!(
                    event = "exec-address-shared",
                    %address,
                    served = self.targets[*owner].name(),
                    refused = self.targets[index].name(),
                    "two clusters share an address; only the first can be used in this session"
                ),
                None if self.known.len() >= ADDRESSES_MAX => {
                    warn!(event = "exec-too-many-addresses", %address, "too many addresses; connections to this one are not recorded");
                }
                None => {
                    let cluster = u32::try_from(index).unwrap_or(u32::MAX);
                    self.kernel.set_api_endpoint(address, cluster)?;
                    self.known.insert(address, index);
                }
            }
        }
        Ok(())
    }

    async fn refresh(mut self) {
        let mut ticks = tokio::time::interval(RESOLVE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            for index in 0..self.targets.len() {
                // What cannot be resolved now cannot be dialled by a client either; the next round asks again.
                let Ok(found) = self.targets[index].resolve().await else { continue };
                if let Err(error) = self.add(index, found) {
                    warn!(event = "exec-address-not-added", %error, "cannot add an address to the API set; connections to it are not recorded");
                }
            }
        }
    }
}
