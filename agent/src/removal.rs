//! Weir removed: from this node, or from every node of its cluster.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};

use crate::{
    config::Access,
    emergency::{self, EmergencyError},
    guard_unit::{self, GuardUnitError},
    interception::{
        attach::AttachError,
        cluster_access::{ClusterAccess, ClusterAccessError},
        handover, layouts,
        leftovers::{self, LeftoverError},
        loader,
        run::InterceptionError,
        uninstallers::{Agents, Uninstallers, UninstallersError},
    },
};

/// How often it is looked whether an agent has ended.
const END_INTERVAL: Duration = Duration::from_millis(200);

/// Why it is not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemovalError {
    /// Pods would go unrecorded.
    #[error("an agent runs on this node, and its pods would go unrecorded; stop it first, or give --force")]
    AgentRuns,
    /// Pins.
    #[error(transparent)]
    Pins(#[from] AttachError),
    /// What is in force keeps it from the API server.
    #[error(transparent)]
    Interception(#[from] InterceptionError),
    /// The emergency switch.
    #[error(transparent)]
    Emergency(#[from] EmergencyError),
    /// Files and cgroups.
    #[error(transparent)]
    Leftover(#[from] LeftoverError),
    /// The unit of a boot.
    #[error(transparent)]
    GuardUnit(#[from] GuardUnitError),
    /// The cluster is not reached.
    #[error(transparent)]
    Access(#[from] ClusterAccessError),
    /// No runtime, no signals.
    #[error("cannot begin")]
    Begin(#[from] std::io::Error),
    /// Nodes, or agents that are meant to run.
    #[error(transparent)]
    Uninstallers(#[from] UninstallersError),
}

/// How it is removed from one node: the arguments of `uninstall`.
#[derive(Debug, clap::Args)]
pub struct NodeOptions {
    /// Also while an agent runs, which then ends.
    #[arg(long)]
    pub force: bool,
    /// Stay until SIGTERM, so that a DaemonSet can show on which nodes it is done.
    #[arg(long)]
    pub stay: bool,
    /// How many seconds to wait for an agent that runs to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub patience: u64,
    /// Refuse while the DaemonSet `weir-agent` of this namespace is there, since its agents may be on their way: asked of the API
    /// server with the service account of this pod.
    #[arg(long, value_name = "NAMESPACE", conflicts_with = "force")]
    pub unless_agents_in: Option<String>,
    /// Remove what `guard-unit` has installed below this root folder, too.
    #[arg(long, value_name = "ROOT")]
    pub guard_unit: Option<PathBuf>,
    /// Remove this folder, too, if nothing is in it: one that the node had not, and that a pod's mount has made.
    #[arg(long, value_name = "FOLDER")]
    pub empty_folder: Option<PathBuf>,
}

/// Removes all but the journal and what is stored for the next boot; `done` is told how many pins there were.
///
/// # Errors
/// An agent runs or is meant to, or something cannot be removed.
pub fn from_node(options: &NodeOptions, done: impl FnOnce(usize)) -> Result<(), RemovalError> {
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.add(Signal::SIGINT);
    if options.stay {
        // As process 1 of a container it would not be ended by them, and else too early.
        end.thread_block().map_err(std::io::Error::from)?;
    }
    let socket = Path::new(handover::STANDARD);
    let until = Instant::now() + Duration::from_secs(options.patience);
    let left = || until.saturating_duration_since(Instant::now());
    if !options.force && !wait_for_end(socket, left()) {
        return Err(RemovalError::AgentRuns);
    }
    if let Some(namespace) = &options.unless_agents_in {
        // What is in force would keep this pod from the API server where no agent has known it.
        layouts::admit_own(&loader::pin_folder())?;
        let namespace = namespace.clone();
        in_cluster(async |access| Ok(Agents { client: access.client, namespace }.are_gone(left()).await?))?;
        if !options.force && handover::an_agent_runs(socket) {
            return Err(RemovalError::AgentRuns);
        }
    }
    let removed = layouts::uninstall_all(&loader::pin_folder())?;
    emergency::end(Path::new(emergency::STANDARD))?;
    leftovers::remove(socket)?;
    if let Some(root) = &options.guard_unit {
        guard_unit::remove(root)?;
    }
    if let Some(folder) = &options.empty_folder {
        leftovers::remove_empty(folder)?;
    }
    done(removed);
    if options.stay {
        end.wait().map_err(std::io::Error::from)?;
    }
    Ok(())
}

/// Ends the agents of a cluster and waits until they are uninstalled everywhere; returns on how many nodes that is.
///
/// # Errors
/// The cluster is not reached, or nodes fail; they are named.
pub fn from_cluster(namespace: String, release: String, patience: Duration) -> Result<usize, RemovalError> {
    in_cluster(async |access| {
        Ok(Uninstallers { client: access.client, namespace, release }.run(patience).await?)
    })
}

/// Does something with the rights of this pod.
fn in_cluster<T>(act: impl AsyncFnOnce(ClusterAccess) -> Result<T, RemovalError>) -> Result<T, RemovalError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { act(ClusterAccess::load("local", &Access::InCluster, None).await?).await })
}

/// Waits until no agent listens there; returns whether that came within `patience`.
#[expect(clippy::disallowed_methods, reason = "it is another process, which tells nobody that it ends")]
fn wait_for_end(path: &Path, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    while handover::an_agent_runs(path) {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(END_INTERVAL);
    }
    true
}
