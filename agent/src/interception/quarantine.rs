//! The kill switch: a pod in quarantine connects nowhere beyond itself, and what it had open is ended. It works on the
//! pinned maps, so also while no agent runs, and lasts until it is lifted or the pod is gone.

use std::{
    io,
    path::{Path, PathBuf},
};

use aya::maps::{Array, HashMap, MapData, MapError};
use weir_common::kernel::{PodName, Settings, maps};

use super::{
    cgroup_tree::{PodFolder, Tree},
    flow::boottime_ns,
    loader::KernelError,
    maps::absent_is_fine,
    namespace, pinned, sockets,
};

/// Why a pod cannot be put into quarantine, or let out.
#[derive(Debug, thiserror::Error)]
pub enum QuarantineError {
    /// Nothing is pinned.
    #[error("nothing is pinned under {}, so nothing would enforce a quarantine; start `weir-agent run` first", folder.display())]
    NotPinned {
        /// The folder of pins.
        folder: PathBuf,
    },
    /// No such pod.
    #[error(
        "no pod {pod} is known on this node; `weir-agent status` lists them, as NAMESPACE/NAME and by UID"
    )]
    NoPod {
        /// What was asked for.
        pod: String,
    },
    /// The maps.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// New connections are refused, old ones may go on.
    #[error(
        "the pod's new connections are refused, but its open ones cannot be ended; delete the pod to end them"
    )]
    Sockets(#[source] io::Error),
}

/// A pod that was put into quarantine or let out.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Quarantined {
    /// `NAMESPACE/NAME`.
    pub pod: String,
    /// UID.
    pub uid: String,
    /// How many open connections were ended.
    pub connections_ended: usize,
}

/// Puts a pod, given as `NAMESPACE/NAME` or by UID, into quarantine: its new connections are refused when this returns,
/// its open ones are ended. `cgroup_root` is where cgroup v2 is mounted.
///
/// # Errors
/// Nothing is pinned, the pod is not known, or the kernel refuses.
pub fn begin(pins: &Path, cgroup_root: &Path, pod: &str) -> Result<Quarantined, QuarantineError> {
    let (cgroups, mut quarantined) = find(pins, pod)?;
    let failed = |source| KernelError::Map { map: maps::QUARANTINE, source };
    let mut map: HashMap<MapData, u64, u64> = pinned::pinned_map(&pins.join("maps"), maps::QUARANTINE)?;
    for cgroup in &cgroups {
        map.insert(cgroup, boottime_ns().unwrap_or(0), 0).map_err(failed)?;
    }
    count(pins, &map)?;
    // After the map: what connects meanwhile is refused or ended.
    let tree = Tree::read(cgroup_root, |_| {}).map_err(QuarantineError::Sockets)?;
    for folder in tree.pods.iter().filter(|folder| cgroups.contains(&folder.cgroup)) {
        quarantined.connections_ended += end_connections(folder).map_err(QuarantineError::Sockets)?;
    }
    Ok(quarantined)
}

/// Lets a pod out of quarantine.
///
/// # Errors
/// As [`begin`].
pub fn lift(pins: &Path, pod: &str) -> Result<Quarantined, QuarantineError> {
    let (cgroups, quarantined) = find(pins, pod)?;
    let mut map: HashMap<MapData, u64, u64> = pinned::pinned_map(&pins.join("maps"), maps::QUARANTINE)?;
    for cgroup in &cgroups {
        absent_is_fine(map.remove(cgroup), maps::QUARANTINE)?;
    }
    count(pins, &map)?;
    Ok(quarantined)
}

/// The cgroups of a pod: more than one while the kubelet replaces it.
fn find(pins: &Path, pod: &str) -> Result<(Vec<u64>, Quarantined), QuarantineError> {
    let folder = pins.join("maps");
    if !folder.join(maps::PODS).exists() {
        return Err(QuarantineError::NotPinned { folder: pins.to_owned() });
    }
    let names: HashMap<MapData, u64, PodName> = pinned::pinned_map(&folder, maps::PODS)?;
    let names = names.iter().collect::<Result<Vec<_>, _>>();
    let names = names.map_err(|source| KernelError::Map { map: maps::PODS, source })?;
    let is_meant = |name: &PodName| pinned::text(&name.uid) == pod || pinned::pod(name) == pod;
    let meant: Vec<_> = names.into_iter().filter(|(_, name)| is_meant(name)).collect();
    let Some((_, name)) = meant.first() else {
        return Err(QuarantineError::NoPod { pod: pod.to_owned() });
    };
    let quarantined =
        Quarantined { pod: pinned::pod(name), uid: pinned::text(&name.uid), connections_ended: 0 };
    Ok((meant.into_iter().map(|(cgroup, _)| cgroup).collect(), quarantined))
}

/// Tells the programs whether there is anything to look for.
fn count(pins: &Path, map: &HashMap<MapData, u64, u64>) -> Result<(), KernelError> {
    let failed = |source| KernelError::Map { map: maps::SETTINGS, source };
    let mut settings: Array<MapData, Settings> = pinned::pinned_map(&pins.join("maps"), maps::SETTINGS)?;
    let current = settings.get(&0, 0).map_err(failed)?;
    settings.set(0, Settings { quarantined: length(map)?, ..current }, 0).map_err(failed)
}

/// Number of cgroups in quarantine.
pub(super) fn length(map: &HashMap<MapData, u64, u64>) -> Result<u32, KernelError> {
    let keys = map.keys().collect::<Result<Vec<_>, MapError>>();
    let keys = keys.map_err(|source| KernelError::Map { map: maps::QUARANTINE, source })?;
    Ok(u32::try_from(keys.len()).unwrap_or(u32::MAX))
}

/// Ends every connection of a pod, also those within it: what a process of it has open may be a way out.
fn end_connections(folder: &PodFolder) -> io::Result<usize> {
    let own = sockets::cgroups_of(&folder.path);
    let is_its =
        |connection: &sockets::Connection| connection.cgroup.is_some_and(|cgroup| own.contains(&cgroup));
    let host = namespace::own()?;
    match namespace::of_pod(&folder.path, host) {
        Some(namespace) => sockets::destroy(Some(&namespace.file), is_its),
        None => sockets::destroy(None, is_its),
    }
}
