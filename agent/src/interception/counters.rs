//! The kernel's counters: of the node, and of each pod.

use aya::{
    maps::{MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues},
    util::nr_cpus,
};
use weir_common::{
    kernel::{COUNTERS, Counter, PodCounters, maps},
    sieve::{PodSlot, pod_slot},
};

use super::{
    loader::{Kernel, KernelError},
    maps::{absent_is_fine, filled, lock},
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

/// Reads the counters of one pod, with what is counted at hand, if anything is; none if there are none of it.
pub(super) fn read_pod_counters(
    map: &PerCpuHashMap<MapData, u64, PodCounters>,
    slots: Option<&PerCpuArray<MapData, PodSlot>>,
    cgroup: u64,
) -> Result<Option<Counters>, KernelError> {
    let values = match map.get(&cgroup, 0) {
        Ok(values) => values,
        Err(MapError::KeyNotFound) => return Ok(None),
        Err(source) => return Err(KernelError::Map { map: maps::POD_COUNTERS, source }),
    };
    let mut counters =
        Counters::from_sums(|counter| values.iter().map(|counters| counters[counter as usize]).sum());
    if let Some(slots) = slots {
        let slot = read_slot(slots, cgroup)?;
        let of_pod = slot.iter().filter(|slot| slot.cgroup == cgroup);
        let redirected: u64 = of_pod.map(|slot| slot.redirected).sum();
        counters.seen += redirected;
        counters.redirected += redirected;
    }
    Ok(Some(counters))
}

/// What each CPU has in the slot of a cgroup, whosever that is.
fn read_slot(
    slots: &PerCpuArray<MapData, PodSlot>,
    cgroup: u64,
) -> Result<PerCpuValues<PodSlot>, KernelError> {
    let failed = |source| KernelError::Map { map: maps::POD_SLOTS, source };
    slots.get(&pod_slot(cgroup), 0).map_err(failed)
}

impl Kernel {
    /// Counts for a cgroup from now on, at hand where its slot is nobody's; what is counted already stays.
    pub(super) fn count_pod(&self, cgroup: u64) -> Result<(), KernelError> {
        let mut pods = lock(&self.pod_counters);
        let failed = |source| KernelError::Map { map: maps::POD_COUNTERS, source };
        if read_pod_counters(&pods, None, cgroup)?.is_none() {
            let cpus = nr_cpus().map_err(|(_, source)| failed(MapError::IoError(source)))?;
            let none =
                || PerCpuValues::try_from(vec![[0; COUNTERS as usize]; cpus]).map_err(MapError::IoError);
            filled(|| pods.insert(cgroup, none()?, 0)).map_err(failed)?;
        }
        self.give_slot(cgroup, 0, cgroup)
    }

    /// Counts for a cgroup no more.
    pub(super) fn uncount_pod(&self, cgroup: u64) -> Result<(), KernelError> {
        self.give_slot(cgroup, cgroup, 0)?;
        absent_is_fine(lock(&self.pod_counters).remove(&cgroup), maps::POD_COUNTERS)
    }

    /// Gives the slot of a cgroup from one to another, and empties it, if it is that one's. Where an agent and its successor do
    /// so at a time, one of the two pods is counted in the hash map alone.
    fn give_slot(&self, cgroup: u64, from: u64, to: u64) -> Result<(), KernelError> {
        let mut slots = lock(&self.pod_slots);
        let current = read_slot(&slots, cgroup)?;
        if current.iter().any(|slot| slot.cgroup != from) {
            return Ok(());
        }
        let failed = |source| KernelError::Map { map: maps::POD_SLOTS, source };
        let given = vec![PodSlot { cgroup: to, redirected: 0 }; current.len()];
        let given = PerCpuValues::try_from(given).map_err(|source| failed(MapError::IoError(source)))?;
        slots.set(pod_slot(cgroup), given, 0).map_err(failed)
    }

    /// The counters of one pod's cgroup; none if it is not classified.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn pod_counters(&self, cgroup: u64) -> Result<Option<Counters>, KernelError> {
        let (pods, slots) = (lock(&self.pod_counters), lock(&self.pod_slots));
        read_pod_counters(&pods, Some(&slots), cgroup)
    }
}
