//! The kernel's counters: of the node, and of each pod.

use aya::{
    maps::{MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues},
    util::nr_cpus,
};
use weir_common::kernel::{COUNTERS, Counter, PodCounters, maps};

use super::{
    loader::{Kernel, KernelError},
    maps::{filled, lock},
};

/// Sums of the kernel's counters over all CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counters {
    /// Connects to the API set that the hooks saw.
    pub seen: u64,
    /// … redirected.
    pub redirected: u64,
    /// … passed.
    pub passed: u64,
    /// … denied, cgroup unknown.
    pub denied_unknown: u64,
    /// … denied, no listener.
    pub denied_no_listener: u64,
    /// … denied, to a kubelet.
    pub denied_kubelet: u64,
    /// Connects, to anywhere, denied for quarantine.
    pub denied_quarantined: u64,
    /// Refused because of their protocol.
    pub protocol_refused: u64,
    /// Flows published.
    pub flows_published: u64,
    /// Flows that could not be published.
    pub flows_lost: u64,
    /// Notices that did not fit.
    pub notices_lost: u64,
    /// Connects of observed pods that would have been redirected.
    pub would_redirect: u64,
    /// Packets that the guard dropped.
    pub guard_dropped: u64,
    /// Packets that the guard at an interface dropped.
    pub interface_dropped: u64,
    /// Sockets kept from taking a listener's port.
    pub bind_refused: u64,
}

impl Counters {
    fn from_sums(sum: impl Fn(Counter) -> u64) -> Self {
        Self {
            seen: sum(Counter::Seen),
            redirected: sum(Counter::Redirected),
            passed: sum(Counter::Passed),
            denied_unknown: sum(Counter::DeniedUnknown),
            denied_no_listener: sum(Counter::DeniedNoListener),
            denied_kubelet: sum(Counter::DeniedKubelet),
            denied_quarantined: sum(Counter::DeniedQuarantined),
            protocol_refused: sum(Counter::ProtocolRefused),
            flows_published: sum(Counter::FlowsPublished),
            flows_lost: sum(Counter::FlowsLost),
            notices_lost: sum(Counter::NoticesLost),
            would_redirect: sum(Counter::WouldRedirect),
            guard_dropped: sum(Counter::GuardDropped),
            interface_dropped: sum(Counter::InterfaceDropped),
            bind_refused: sum(Counter::BindRefused),
        }
    }
}

/// Reads the node's counters.
pub(super) fn read_counters(map: &PerCpuArray<MapData, u64>) -> Result<Counters, KernelError> {
    let mut sums = [0_u64; COUNTERS as usize];
    for (index, sum) in (0..COUNTERS).zip(&mut sums) {
        let values = map.get(&index, 0).map_err(|source| KernelError::Map { map: maps::COUNTERS, source })?;
        *sum = values.iter().sum();
    }
    Ok(Counters::from_sums(|counter| sums[counter as usize]))
}

/// Reads the counters of one pod; none if there are none of it.
pub(super) fn read_pod_counters(
    map: &PerCpuHashMap<MapData, u64, PodCounters>,
    cgroup: u64,
) -> Result<Option<Counters>, KernelError> {
    match map.get(&cgroup, 0) {
        Ok(values) => Ok(Some(Counters::from_sums(|counter| {
            values.iter().map(|counters| counters[counter as usize]).sum()
        }))),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(source) => Err(KernelError::Map { map: maps::POD_COUNTERS, source }),
    }
}

impl Kernel {
    /// Counts for a cgroup from now on; what is counted already stays.
    pub(super) fn count_pod(&self, cgroup: u64) -> Result<(), KernelError> {
        let mut pods = lock(&self.pod_counters);
        if read_pod_counters(&pods, cgroup)?.is_some() {
            return Ok(());
        }
        let failed = |source| KernelError::Map { map: maps::POD_COUNTERS, source };
        let cpus = nr_cpus().map_err(|(_, source)| failed(MapError::IoError(source)))?;
        let none = || PerCpuValues::try_from(vec![[0; COUNTERS as usize]; cpus]).map_err(MapError::IoError);
        filled(|| pods.insert(cgroup, none()?, 0)).map_err(failed)
    }

    /// The counters of one pod's cgroup; none if it is not classified.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn pod_counters(&self, cgroup: u64) -> Result<Option<Counters>, KernelError> {
        read_pod_counters(&lock(&self.pod_counters), cgroup)
    }
}
