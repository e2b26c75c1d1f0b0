//! What is in force before anything else: settings, the API set as far as it is known, the roots of pods, and the programs
//! at the root of the cgroup tree.
//!
//! `weir-agent run` begins with it, before it opens its journal or asks a cluster. `weir-agent guard` does nothing else:
//! after a reboot, before the kubelet, so that no pod comes first. It replaces nothing that is in force already. With
//! it alone, whatever is below a root of pods or in another network namespace than the host's is denied the API set,
//! and processes of the host pass.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use weir_common::kernel::{CgroupEntry, Class, KUBELET};

use super::{
    cgroup,
    cgroup_tree::Tree,
    handover,
    listener::own_netns,
    loader::{Kernel, Pinning},
    namespace,
    pod::KUBEPODS_ROOTS,
    pod_network::guard_strangers,
    run::InterceptionError,
    security::{PACKET_SOCKETS_DENIED, Security},
    stored_set::StoredSet,
};
use crate::config::EndpointName;

/// Levels of the tree on which a pod's connection meets the programs: the root of pods, and the root.
const ATTACH_LEVELS: u32 = 2;

/// What must be known to put the guard in force.
#[derive(Clone, Debug)]
pub struct Options {
    /// Mount point of cgroup v2; found if none is given.
    pub cgroup_root: Option<PathBuf>,
    /// Where programs and maps are pinned.
    pub pinning: Pinning,
    /// The configured clusters, in the order of their indices; without a configuration those that are stored count.
    pub clusters: Option<Vec<ConfiguredCluster>>,
    /// Where the API set is stored.
    pub state_directory: PathBuf,
}

/// What the configuration says of a cluster.
#[derive(Clone, Debug)]
pub struct ConfiguredCluster {
    /// Its name.
    pub name: String,
    /// Addresses of its API servers.
    pub addresses: Vec<SocketAddr>,
    /// Their host names.
    pub names: Vec<EndpointName>,
}

/// What is in force: programs and maps, and what else was found out on the way.
#[derive(Debug)]
pub struct InForce {
    pub(super) kernel: Arc<Kernel>,
    pub(super) mount: PathBuf,
    /// The agent's own cgroup; none where it runs in the root cgroup, which holds everything else as well.
    pub(super) own_cgroup: Option<u64>,
    /// The API set as it was stored.
    pub(super) stored: Option<StoredSet>,
}

/// What `weir-agent guard` has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guarded {
    /// Nothing: an agent runs, and with it everything is in force.
    AgentRuns,
    /// The guard is in force.
    InForce {
        /// How many addresses of API servers pods are kept from.
        api_servers: usize,
        /// How many of kubelets.
        kubelets: usize,
    },
}

/// Puts the guard in force without an agent; twice is as good as once. `handover` is where an agent would listen.
///
/// # Errors
/// The cgroup tree cannot be used, or the kernel refuses.
pub fn once(options: &Options, handover: &Path) -> Result<Guarded, InterceptionError> {
    if handover::an_agent_runs(handover) {
        return Ok(Guarded::AgentRuns);
    }
    make_roots(&mount(options)?)?;
    let in_force = put_in_force(options, None)?;
    // Those that are there already send frames otherwise, until an agent comes, which looks after those that come later.
    let host = namespace::own()
        .map_err(|source| InterceptionError::Io { action: "read /proc/self/ns/net", source })?;
    guard_strangers(&in_force.kernel, &read_tree(&in_force.mount)?.pods, host);
    let endpoints = in_force.kernel.api_endpoints()?;
    let kubelets = endpoints.values().filter(|value| **value == KUBELET).count();
    Ok(Guarded::InForce { api_servers: endpoints.len() - kubelets, kubelets })
}

/// What an agent begins with; none where another agent runs, from which it must take over first.
///
/// # Errors
/// The cgroup tree cannot be used, or the kernel refuses.
pub fn begin(options: &Options, handover: &Path) -> Result<Option<InForce>, InterceptionError> {
    if handover::an_agent_runs(handover) {
        return Ok(None);
    }
    agent_in_force(options).map(Some)
}

/// The same where it is known that none does, or that it waits to be taken over from.
pub(super) fn agent_in_force(options: &Options) -> Result<InForce, InterceptionError> {
    put_in_force(options, own_cgroup()?)
}

fn put_in_force(options: &Options, own_cgroup: Option<u64>) -> Result<InForce, InterceptionError> {
    let mount = mount(options)?;
    let kernel = Arc::new(Kernel::load(options.pinning.clone())?);
    if kernel.adopt_older_layout()? {
        tracing::info!(
            event = "older-layout-adopted",
            "what an older layout of the maps knows is taken over"
        );
    }
    // First, so that the agent can never lock itself out.
    if let Some(own) = own_cgroup {
        kernel.classify(own, entry(Class::Agent))?;
        admit_in_older_layouts(&kernel, own);
    }
    kernel.set_settings(own_netns()?, ATTACH_LEVELS)?;
    let stored = StoredSet::read(&options.state_directory).unwrap_or_else(|error| {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(
            event = "guard-knows-configured-only",
            error,
            "only the configured addresses of API servers are known"
        );
        None
    });
    restore_api_set(&kernel, options.clusters.as_deref(), stored.as_ref())?;
    // The pods that are there are known as pods before anything is attached above them.
    let tree = read_tree(&mount)?;
    let containers = tree.roots.iter().map(|(_, id)| id).chain(&tree.runtimes);
    // The agent itself may run in such a scope.
    for id in containers.filter(|id| Some(**id) != own_cgroup) {
        kernel.classify(*id, entry(Class::Container))?;
    }
    if let Some(clusters) = &options.clusters {
        let names = |(index, cluster): (u32, &ConfiguredCluster)| {
            cluster.names.iter().map(move |name| (name.clone(), index)).collect::<Vec<_>>()
        };
        kernel.set_names(&(0..).zip(clusters).flat_map(names).collect::<Vec<_>>())?;
    }
    kernel.attach_missing(&mount)?;
    tree.roots.iter().try_for_each(|(root, _)| kernel.attach_listening(root))?;
    // The interface of a pod that comes before the agent is not guarded: where the kernel can, it sends no frames either.
    match kernel.attach_missing_security()? {
        Security::InForce(way) => {
            tracing::info!(event = "security-hooks-in-force", %way, "{PACKET_SOCKETS_DENIED}");
        }
        Security::Absent(reason) => {
            tracing::info!(
                event = "security-hooks-absent",
                reason,
                "the kernel lets no program decide in its security hooks; pods that come before the agent can send frames"
            );
        }
    }
    tracing::info!(event = "guard-in-force", cgroup = %mount.display(), "in force at the root of the tree");
    Ok(InForce { kernel, mount, own_cgroup, stored })
}

/// Where an agent from before an upgrade has left its programs, they must let this one reach the API server.
fn admit_in_older_layouts(kernel: &Kernel, own_cgroup: u64) {
    match kernel.admit_in_older_layouts(own_cgroup) {
        Ok(0) => {}
        Ok(layouts) => {
            tracing::info!(event = "older-layouts-told", layouts, "known to the programs of an older layout")
        }
        // Not the end: in the host's network namespace and outside every pod it passes them as it is.
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                event = "older-layout-denies",
                error,
                "the programs of an older layout may deny this agent the API server; if they do, run weir-agent uninstall"
            );
        }
    }
}

/// Writes what was stored and what is configured into the kernel's API set, under today's indices.
fn restore_api_set(
    kernel: &Kernel,
    configured: Option<&[ConfiguredCluster]>,
    stored: Option<&StoredSet>,
) -> Result<(), InterceptionError> {
    let mut known: Vec<(SocketAddr, u32)> = Vec::new();
    let mut dropped: Vec<SocketAddr> = Vec::new();
    for (position, cluster) in (0..).zip(stored.iter().flat_map(|stored| &stored.clusters)) {
        let index = match configured {
            None => Some(position),
            Some(configured) => {
                (0..).zip(configured).find(|(_, now)| now.name == cluster.name).map(|(now, _)| now)
            }
        };
        match index {
            Some(index) => known.extend(cluster.addresses.iter().map(|address| (*address, index))),
            None => dropped.extend(&cluster.addresses),
        }
    }
    for (index, cluster) in (0..).zip(configured.into_iter().flatten()) {
        known.extend(cluster.addresses.iter().map(|address| (*address, index)));
    }
    known.extend(stored.iter().flat_map(|stored| &stored.kubelets).map(|address| (*address, KUBELET)));
    for (address, value) in &known {
        kernel.set_api_endpoint(*address, *value)?;
    }
    // Of clusters that are configured no more: in pinned maps their indices may be another cluster's by now.
    for address in dropped.iter().filter(|address| !known.iter().any(|(known, _)| known == *address)) {
        kernel.remove_api_endpoint(*address)?;
    }
    Ok(())
}

/// Makes the root of pods, under the names that kubelets give it, where there is none yet: what is made there later must
/// be known to be a pod's, also one in the host's network. A kubelet takes over what is there.
fn make_roots(mount: &Path) -> Result<(), InterceptionError> {
    if !read_tree(mount)?.roots.is_empty() {
        return Ok(());
    }
    for name in KUBEPODS_ROOTS {
        match fs::create_dir(mount.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(|source| InterceptionError::Io {
                action: "make the root of pods in the cgroup tree; is it mounted read-only",
                source,
            })?,
        }
    }
    Ok(())
}

fn read_tree(mount: &Path) -> Result<Tree, InterceptionError> {
    Tree::read(mount, |_| {})
        .map_err(|source| InterceptionError::Io { action: "read the cgroup tree", source })
}

fn mount(options: &Options) -> Result<PathBuf, InterceptionError> {
    Ok(match &options.cgroup_root {
        Some(mount) => mount.clone(),
        None => cgroup::mount_point()?,
    })
}

/// This process's own; none where it runs in the root cgroup, which holds everything else as well.
pub(super) fn own_cgroup() -> Result<Option<u64>, InterceptionError> {
    let Some(path) = cgroup::of_process(std::process::id()) else { return Ok(None) };
    let folder = cgroup::mount_point()?.join(path);
    // Every cgroup but the root has this file (cgroup-v2.rst).
    if !folder.join("cgroup.events").exists() {
        return Ok(None);
    }
    Ok(Some(cgroup::id(&folder)?))
}

fn entry(class: Class) -> CgroupEntry {
    CgroupEntry { listener_netns: 0, class: class as u32, listener_port: 0 }
}
