//! What is pinned, read without a process of the agent: for `weir-agent status`. Changes nothing.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use aya::{
    maps::{HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap},
    programs::links::{FdLink, PinnedLink},
};
use weir_common::{
    kernel::{ApiEndpoint, CgroupEntry, Class, KUBELET, PodCounters, PodName, maps},
    sieve::PodSlot,
};

use super::{
    attach::AttachError,
    bpf::attached_programs,
    cluster_watch::KnownPod,
    counters::{Counters, read_counters, read_pod_counters},
    loader::KernelError,
    security::{self, Way},
    usage,
};

/// The state of the pins, for `weir-agent status`; none if nothing is pinned.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PinnedState {
    /// The folder of pins.
    pub folder: PathBuf,
    /// Pinned links, `<cgroup id>-<program>`.
    pub links: Vec<String>,
    /// How programs decide in the kernel's security hooks; none if they do not.
    pub security_hooks: Option<Way>,
    /// The counters.
    pub counters: Counters,
    /// The API set.
    pub api_endpoints: Vec<SocketAddr>,
    /// Kubelets' addresses, which enrolled pods are kept from.
    pub kubelets: Vec<SocketAddr>,
    /// Cgroups per class.
    pub cgroups: BTreeMap<String, usize>,
    /// Kernel memory that each map takes, bytes.
    pub map_bytes: BTreeMap<&'static str, u64>,
    /// The pods of this node that are classified.
    pub pods: Vec<PodState>,
}

/// One pod.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodState {
    /// `NAMESPACE/NAME`.
    pub pod: String,
    /// UID.
    pub uid: String,
    /// How its connections to the API set are treated.
    pub class: String,
    /// Port of its listener; 0: none, so it is denied if it is enrolled.
    pub listener_port: u32,
    /// Whether it is in quarantine.
    pub quarantined: bool,
    /// What was counted of it.
    pub counters: Counters,
}

impl fmt::Display for PinnedState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "pinned under    {}", self.folder.display())?;
        writeln!(formatter, "programs        {}", self.links.len())?;
        let map_bytes: u64 = self.map_bytes.values().sum();
        writeln!(formatter, "map memory      {} KiB", map_bytes / 1024)?;
        match self.security_hooks {
            Some(way) => writeln!(formatter, "security hooks  in force ({way})")?,
            None => writeln!(formatter, "security hooks  absent: weir-agent doctor says why")?,
        }
        for (class, count) in &self.cgroups {
            writeln!(formatter, "cgroups         {count} {class}")?;
        }
        for address in &self.api_endpoints {
            writeln!(formatter, "API endpoint    {address}")?;
        }
        for address in &self.kubelets {
            writeln!(formatter, "kubelet         {address}")?;
        }
        for pod in &self.pods {
            let state = if pod.quarantined { "in quarantine" } else { &pod.class };
            let counters = &pod.counters;
            let denied = counters.denied_no_listener + counters.denied_kubelet + counters.denied_quarantined;
            writeln!(
                formatter,
                "pod             {} {state}: {} redirected, {denied} denied, {} dropped",
                pod.pod,
                counters.redirected,
                counters.guard_dropped + counters.interface_dropped
            )?;
        }
        let counters = &self.counters;
        writeln!(
            formatter,
            "connections     {} seen, {} redirected, {} passed, {} denied (unknown), {} denied (no listener), {} denied (kubelet)",
            counters.seen,
            counters.redirected,
            counters.passed,
            counters.denied_unknown,
            counters.denied_no_listener,
            counters.denied_kubelet
        )?;
        write!(
            formatter,
            "guards          {} packets dropped at sockets, {} at interfaces; {} sockets refused by protocol, {} by the listener's port",
            counters.guard_dropped,
            counters.interface_dropped,
            counters.protocol_refused,
            counters.bind_refused
        )
    }
}

/// The names of the pinned links in a folder of pins.
pub(super) fn pinned_links(pins: &Path) -> Result<Vec<String>, AttachError> {
    let path = pins.join("links");
    let failed = |source| AttachError::Remove { path: path.clone(), source };
    let entries = match fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Whether a pinned link attaches its program to this cgroup; `kind` is a number of `enum bpf_attach_type`.
pub(super) fn is_attached_by(pin: &Path, cgroup: &File, kind: u32) -> bool {
    let link = PinnedLink::from_pin(pin).map(FdLink::from);
    let Ok(program) = link.and_then(|link| link.info()).map(|info| info.program_id()) else { return false };
    attached_programs(cgroup, kind).is_ok_and(|attached| attached.contains(&program))
}

/// Reads what is pinned, without a process of the agent.
///
/// # Errors
/// Pins are there but cannot be read.
pub fn pinned_state(folder: &Path) -> Result<Option<PinnedState>, KernelError> {
    let pinned = folder.join("maps");
    if !pinned.join(maps::COUNTERS).exists() {
        return Ok(None);
    }
    let counters: PerCpuArray<MapData, u64> = pinned_map(&pinned, maps::COUNTERS)?;
    let api_set: HashMap<MapData, ApiEndpoint, u32> = pinned_map(&pinned, maps::API_SET)?;
    let classified: HashMap<MapData, u64, CgroupEntry> = pinned_map(&pinned, maps::CGROUPS)?;
    let known = super::maps::api_endpoints(&api_set)?;
    let of_kind = |kubelet: bool| {
        let mut addresses: Vec<_> = known
            .iter()
            .filter(|(_, cluster)| (**cluster == KUBELET) == kubelet)
            .map(|(address, _)| *address)
            .collect();
        addresses.sort();
        addresses
    };
    let (api_endpoints, kubelets) = (of_kind(false), of_kind(true));
    let mut cgroups = BTreeMap::new();
    for entry in classified.iter() {
        let (_, entry) = entry.map_err(|source| KernelError::Map { map: maps::CGROUPS, source })?;
        *cgroups.entry(class(entry.class)).or_default() += 1;
    }
    Ok(Some(PinnedState {
        folder: folder.to_owned(),
        links: pinned_links(folder)?,
        security_hooks: security::pinned_way(folder),
        counters: read_counters(&counters)?,
        api_endpoints,
        kubelets,
        cgroups,
        map_bytes: usage::map_bytes(&pinned)?,
        pods: pods(&pinned, &classified)?,
    }))
}

fn pods(
    folder: &Path,
    classified: &HashMap<MapData, u64, CgroupEntry>,
) -> Result<Vec<PodState>, KernelError> {
    let names: HashMap<MapData, u64, PodName> = pinned_map(folder, maps::PODS)?;
    let quarantine: HashMap<MapData, u64, u64> = pinned_map(folder, maps::QUARANTINE)?;
    let counters: PerCpuHashMap<MapData, u64, PodCounters> = pinned_map(folder, maps::POD_COUNTERS)?;
    // An agent from before there was this map may have left the pins.
    let slots: Option<PerCpuArray<MapData, PodSlot>> = match folder.join(maps::POD_SLOTS).exists() {
        true => Some(pinned_map(folder, maps::POD_SLOTS)?),
        false => None,
    };
    let mut pods = Vec::new();
    for entry in names.iter() {
        let (cgroup, name) = entry.map_err(|source| KernelError::Map { map: maps::PODS, source })?;
        // Gone between two reads.
        let Ok(entry) = classified.get(&cgroup, 0) else { continue };
        pods.push(PodState {
            pod: pod(&name),
            uid: text(&name.uid),
            class: class(entry.class),
            listener_port: entry.listener_port,
            quarantined: quarantine.get(&cgroup, 0).is_ok(),
            counters: read_pod_counters(&counters, slots.as_ref(), cgroup)?.unwrap_or_default(),
        });
    }
    pods.sort_by(|one, other| one.pod.cmp(&other.pod));
    Ok(pods)
}

fn class(number: u32) -> String {
    Class::from_number(number).map_or_else(|| number.to_string(), |class| format!("{class:?}"))
}

/// The names as the kernel's map has them.
pub(super) fn pod_name(known: &KnownPod) -> PodName {
    fn filled<const N: usize>(text: &str) -> [u8; N] {
        let mut bytes = [0; N];
        let length = text.len().min(N);
        bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
        bytes
    }
    PodName {
        namespace: filled(&known.namespace),
        name: filled(&known.name),
        uid: filled(known.uid.as_str()),
    }
}

/// `NAMESPACE/NAME`.
pub(super) fn pod(name: &PodName) -> String {
    format!("{}/{}", text(&name.namespace), text(&name.name))
}

/// A name without the zeros that fill it up.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// A pinned map.
pub(super) fn pinned_map<M: TryFrom<Map, Error = MapError>>(
    folder: &Path,
    name: &'static str,
) -> Result<M, KernelError> {
    MapData::from_pin(folder.join(name))
        .and_then(Map::from_map_data)
        .and_then(M::try_from)
        .map_err(|source| KernelError::Map { map: name, source })
}
