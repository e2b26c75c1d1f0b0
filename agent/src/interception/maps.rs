//! What the agent writes into the kernel's maps and reads from them: the API set, cgroups and their pods, interfaces.
//! Each change is one system call; what follows from it is the programs' matter.

use std::{
    collections::{HashMap as StdHashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use aya::maps::{HashMap, MapData, MapError};
use weir_common::{
    kernel::{Address, ApiEndpoint, CgroupEntry, Class, NestedKey, Notice, PodName, Settings, maps},
    packet::PORT_UNKNOWN,
};

use super::{
    attach,
    counters::{Counters, read_counters},
    interface::HostEnd,
    layouts,
    loader::{Kernel, KernelError},
    quarantine,
};

impl Kernel {
    /// Tells the programs in which network namespace the host is (0: no connection passes for being there), and
    /// on how many levels of the cgroup tree they meet a pod's connection.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_settings(&self, host_netns: u64, attach_levels: u32) -> Result<(), KernelError> {
        let quarantined = quarantine::length(&lock(&self.quarantine))?;
        let settings = Settings { host_netns, attach_levels: attach_levels.min(255), quarantined };
        lock(&self.settings)
            .set(0, settings, 0)
            .map_err(|source| KernelError::Map { map: maps::SETTINGS, source })
    }

    /// Adds an address to the API set: an API server's of the cluster with this index, or a kubelet's
    /// ([`KUBELET`](weir_common::kernel::KUBELET)).
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn set_api_endpoint(&self, address: SocketAddr, cluster: u32) -> Result<(), KernelError> {
        let endpoint = endpoint(address);
        let any = ApiEndpoint { port: PORT_UNKNOWN, ..endpoint };
        let mut set = lock(&self.api_set);
        let is_new = set.get(&endpoint, 0).ok() != Some(cluster);
        self.sieve.mark(endpoint.address)?;
        // The guards look for the address first: at no moment is an endpoint known to the hooks alone.
        self.sieve.change(|| {
            [any, endpoint]
                .iter()
                .try_for_each(|key| filled(|| set.insert(key, cluster, 0)))
                .map_err(|source| KernelError::Map { map: maps::API_SET, source })
        })?;
        if is_new {
            self.api_set_changed.notify_one();
        }
        Ok(())
    }

    /// Takes an address out of the API set.
    ///
    /// # Errors
    /// The kernel refuses. That it was not there is no error.
    pub fn remove_api_endpoint(&self, address: SocketAddr) -> Result<(), KernelError> {
        let endpoint = endpoint(address);
        let mut set = lock(&self.api_set);
        self.sieve.change(|| absent_is_fine(set.remove(&endpoint), maps::API_SET))?;
        self.api_set_changed.notify_one();
        let keys = set.keys().collect::<Result<Vec<_>, _>>();
        let keys = keys.map_err(|source| KernelError::Map { map: maps::API_SET, source })?;
        if keys.iter().any(|key| key.address == endpoint.address && key.port != PORT_UNKNOWN) {
            return Ok(());
        }
        let any = ApiEndpoint { port: PORT_UNKNOWN, ..endpoint };
        self.sieve.change(|| absent_is_fine(set.remove(&any), maps::API_SET))
    }

    /// Waits until this process has changed the API set; a change since the last time counts. For one caller.
    pub(super) async fn api_set_changed(&self) {
        self.api_set_changed.notified().await;
    }

    /// The API set: addresses and cluster indices (or [`KUBELET`](weir_common::kernel::KUBELET)).
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn api_endpoints(&self) -> Result<StdHashMap<SocketAddr, u32>, KernelError> {
        api_endpoints(&lock(&self.api_set))
    }

    /// Whether an address belongs to the API set: one look-up, where reading the whole set takes two calls an entry. Not
    /// if the kernel does not say.
    pub(super) fn is_api_endpoint(&self, address: SocketAddr) -> bool {
        lock(&self.api_set).get(&endpoint(address), 0).is_ok()
    }

    /// Marks all of the API set again, and what pods were told: a sieve that is newer than the set (its pin was lost) must not
    /// hide any of it.
    pub(super) fn mark_api_set(&self) -> Result<(), KernelError> {
        let set = lock(&self.api_set);
        for key in set.keys() {
            let key = key.map_err(|source| KernelError::Map { map: maps::API_SET, source })?;
            self.sieve.mark(key.address)?;
        }
        drop(set);
        self.suspected()?.iter().try_for_each(|(suspect, _)| self.sieve.doubt(suspect.address))
    }

    /// Says what a cgroup is. For [`Class::Enrolled`] the listener must be listening before this is called.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn classify(&self, cgroup: u64, entry: CgroupEntry) -> Result<(), KernelError> {
        self.count_pod(cgroup)?;
        if entry.listener_netns != 0 {
            let port = u16::try_from(entry.listener_port).unwrap_or_default();
            self.nest(NestedKey { cgroup: NestedKey::ANYBODY, netns: entry.listener_netns }, port)?;
        }
        let former = self.listener_netns(cgroup);
        self.sieve.change(|| {
            lock(&self.cgroups)
                .insert(cgroup, entry, 0)
                .map_err(|source| KernelError::Map { map: maps::CGROUPS, source })
        })?;
        self.free_port(former.filter(|netns| *netns != entry.listener_netns))
    }

    /// The network namespace of a cgroup's listener, if it has one.
    fn listener_netns(&self, cgroup: u64) -> Option<u64> {
        let entry = lock(&self.cgroups).get(&cgroup, 0).ok()?;
        Some(entry.listener_netns).filter(|netns| *netns != 0)
    }

    /// The port of the listener that was in this network namespace is anybody's.
    fn free_port(&self, netns: Option<u64>) -> Result<(), KernelError> {
        let key = netns.map(|netns| NestedKey { cgroup: NestedKey::ANYBODY, netns });
        key.map_or(Ok(()), |key| self.unnest(&key))
    }

    /// Notes the names of the pod that a cgroup is of, for `status` and `quarantine`.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub(super) fn name_pod(&self, cgroup: u64, name: PodName) -> Result<(), KernelError> {
        let mut pods = lock(&self.pods);
        filled(|| pods.insert(cgroup, name, 0)).map_err(|source| KernelError::Map { map: maps::PODS, source })
    }

    /// The names of the pod that a cgroup is of, as far as they are noted.
    pub(super) fn pod_name(&self, cgroup: u64) -> Option<PodName> {
        lock(&self.pods).get(&cgroup, 0).ok()
    }

    /// Puts right how many cgroups are in quarantine, should an agent's start and the command have overtaken each other.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn recount_quarantine(&self) -> Result<(), KernelError> {
        let failed = |source| KernelError::Map { map: maps::SETTINGS, source };
        let quarantined = quarantine::length(&lock(&self.quarantine))?;
        let mut settings = lock(&self.settings);
        let current = settings.get(&0, 0).map_err(failed)?;
        if current.quarantined == quarantined {
            return Ok(());
        }
        settings.set(0, Settings { quarantined, ..current }, 0).map_err(failed)
    }

    /// The cgroups in quarantine.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn quarantined(&self) -> Result<HashSet<u64>, KernelError> {
        lock(&self.quarantine)
            .keys()
            .collect::<Result<_, _>>()
            .map_err(|source| KernelError::Map { map: maps::QUARANTINE, source })
    }

    /// Forgets a cgroup.
    ///
    /// # Errors
    /// The kernel refuses. That it was not there is no error.
    pub fn forget_cgroup(&self, cgroup: u64) -> Result<(), KernelError> {
        let listener = self.listener_netns(cgroup);
        self.sieve.change(|| absent_is_fine(lock(&self.cgroups).remove(&cgroup), maps::CGROUPS))?;
        self.free_port(listener)?;
        absent_is_fine(lock(&self.quarantine).remove(&cgroup), maps::QUARANTINE)?;
        absent_is_fine(lock(&self.pods).remove(&cgroup), maps::PODS)?;
        self.uncount_pod(cgroup)
    }

    /// All classified cgroups.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn cgroups(&self) -> Result<StdHashMap<u64, CgroupEntry>, KernelError> {
        lock(&self.cgroups)
            .iter()
            .collect::<Result<_, _>>()
            .map_err(|source| KernelError::Map { map: maps::CGROUPS, source })
    }

    /// The ids of the enrolled cgroups.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn enrolled(&self) -> Result<HashSet<u64>, KernelError> {
        let enrolled = |entry: &CgroupEntry| entry.class == Class::Enrolled as u32;
        let cgroups = self.cgroups()?.into_iter();
        Ok(cgroups.filter(|(_, entry)| enrolled(entry)).map(|(cgroup, _)| cgroup).collect())
    }

    /// Whether a cgroup is classified as enrolled.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn is_enrolled(&self, cgroup: u64) -> Result<bool, KernelError> {
        match lock(&self.cgroups).get(&cgroup, 0) {
            Ok(entry) => Ok(entry.class == Class::Enrolled as u32),
            Err(error) => absent_is_fine(Err(error), maps::CGROUPS).map(|()| false),
        }
    }

    /// Sends an enrolled pod's connections from a network namespace inside it to the listener there, which listens already.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub(super) fn nest(&self, key: NestedKey, port: u16) -> Result<(), KernelError> {
        let mut nested = lock(&self.nested);
        filled(|| nested.insert(key, u32::from(port), 0))
            .map_err(|source| KernelError::Map { map: maps::NESTED, source })
    }

    /// Forgets one: connections from it are denied.
    ///
    /// # Errors
    /// The kernel refuses. That it was not there is no error.
    pub(super) fn unnest(&self, key: &NestedKey) -> Result<(), KernelError> {
        absent_is_fine(lock(&self.nested).remove(key), maps::NESTED)
    }

    /// Forgets all but these, and those of pods' own listeners.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn keep_nested(&self, keep: impl Fn(&NestedKey) -> bool) -> Result<(), KernelError> {
        let own: HashSet<u64> = self.cgroups()?.into_values().map(|entry| entry.listener_netns).collect();
        let keep = |key: &NestedKey| {
            if key.cgroup == NestedKey::ANYBODY { own.contains(&key.netns) } else { keep(key) }
        };
        let mut nested = lock(&self.nested);
        let keys = nested.keys().collect::<Result<Vec<_>, _>>();
        let keys = keys.map_err(|source| KernelError::Map { map: maps::NESTED, source })?;
        let stale: Vec<_> = keys.iter().filter(|key| !keep(key)).collect();
        stale.into_iter().try_for_each(|key| absent_is_fine(nested.remove(key), maps::NESTED))
    }

    /// The counters, summed over all CPUs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn counters(&self) -> Result<Counters, KernelError> {
        read_counters(&self.counters)
    }

    /// Guards the host's end of a pod's interface. The pod may be known or not; what the map of cgroups says of it
    /// counts. What a former process has noted gives way.
    ///
    /// # Errors
    /// It is guarded for another pod, which is still there; the map is full, or the kernel refuses.
    pub(super) fn guard_interface(&self, end: &HostEnd, cgroup: u64) -> Result<(), KernelError> {
        let mut attached = attach::lock(&self.attached);
        if let Some(owner) = attached.owner(end.index).filter(|owner| *owner != cgroup) {
            return Err(KernelError::InterfaceOfAnother { name: end.name.clone(), owner });
        }
        lock(&self.interfaces)
            .insert(end.index, cgroup, 0)
            .map_err(|source| KernelError::Map { map: maps::INTERFACES, source })?;
        Ok(attached.guard_interface(end, cgroup)?)
    }

    /// Whether an interface is guarded as this pod's.
    pub(super) fn guards_interface(&self, index: u32, cgroup: u64) -> bool {
        lock(&self.interfaces).get(&index, 0).is_ok_and(|guarded| guarded == cgroup)
    }

    /// Guards the interfaces that an older layout guards and this one does not: of pods that could not be enrolled yet, say.
    pub(super) fn guard_interfaces_of(&self, older: &Path) -> Result<(), KernelError> {
        for (index, cgroup) in layouts::interfaces(older)? {
            if lock(&self.interfaces).get(&index, 0).is_ok() {
                continue;
            }
            // One that is gone took its guard along.
            let Ok(name) = nix::net::if_::if_indextoname(index) else { continue };
            let name = name.to_string_lossy().into_owned();
            let guarded = self.guard_interface(&HostEnd { index, name }, cgroup);
            if guarded.is_err() && nix::net::if_::if_indextoname(index).is_ok() {
                // Not to be taken for guarded the next time.
                absent_is_fine(lock(&self.interfaces).remove(&index), maps::INTERFACES)?;
                return guarded;
            }
        }
        Ok(())
    }

    /// Forgets the interfaces of a pod that is gone; the guards have gone with them. What is another pod's stays.
    ///
    /// # Errors
    /// The kernel refuses, or a pin cannot be removed.
    pub(super) fn forget_interfaces(&self, ends: &[HostEnd], cgroup: u64) -> Result<(), KernelError> {
        let mut attached = attach::lock(&self.attached);
        let mut interfaces = lock(&self.interfaces);
        ends.iter().try_for_each(|end| {
            let owner = attached.owner(end.index).or_else(|| interfaces.get(&end.index, 0).ok());
            if owner.is_some_and(|owner| owner != cgroup) {
                return Ok(());
            }
            absent_is_fine(interfaces.remove(&end.index), maps::INTERFACES)?;
            Ok(attached.unguard_interface(end.index)?)
        })
    }

    /// Forgets the interfaces, of a former process too, of pods that are not among these cgroups.
    ///
    /// # Errors
    /// The kernel refuses, or a pin cannot be removed.
    pub(super) fn keep_interfaces(&self, cgroups: &HashSet<u64>) -> Result<(), KernelError> {
        let known = lock(&self.interfaces).iter().collect::<Result<Vec<_>, _>>();
        let known = known.map_err(|source| KernelError::Map { map: maps::INTERFACES, source })?;
        let mut stale = known.into_iter().filter(|(_, cgroup)| !cgroups.contains(cgroup));
        stale.try_for_each(|(index, cgroup)| {
            self.forget_interfaces(&[HostEnd { index, name: String::new() }], cgroup)
        })
    }
}

pub(super) fn absent_is_fine(result: Result<(), MapError>, map: &'static str) -> Result<(), KernelError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result.map_err(|source| KernelError::Map { map, source }),
    }
}

/// How often the kernel is asked again for memory of a map, first after a millisecond and then after twice the time each: a
/// second in all.
const FILL_TRIES: u32 = 10;

/// Writes into a map that is not allocated ahead. Its memory comes from a small stock, which the kernel fills up beside
/// (`mm/percpu.c` keeps four pages a CPU): who writes faster is told ENOMEM, and is served a moment later.
#[expect(clippy::disallowed_methods, reason = "the kernel tells nobody when its stock is filled up")]
pub(super) fn filled(mut insert: impl FnMut() -> Result<(), MapError>) -> Result<(), MapError> {
    for tried in 0..FILL_TRIES {
        match insert() {
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOMEM) => {
                std::thread::sleep(Duration::from_millis(1 << tried));
            }
            result => return result,
        }
    }
    insert()
}

/// The addresses of the API set, without the entries that stand for every port of one.
pub(super) fn api_endpoints(
    set: &HashMap<MapData, ApiEndpoint, u32>,
) -> Result<StdHashMap<SocketAddr, u32>, KernelError> {
    set.iter()
        .filter(|entry| !matches!(entry, Ok((endpoint, _)) if endpoint.port == PORT_UNKNOWN))
        .map(|entry| entry.map(|(endpoint, cluster)| (socket_address(&endpoint), cluster)))
        .collect::<Result<_, _>>()
        .map_err(|source| KernelError::Map { map: maps::API_SET, source })
}

/// A map is never left half-changed by a panic: each change is one system call.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An address as the maps have it.
pub(super) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn endpoint(address_and_port: SocketAddr) -> ApiEndpoint {
    ApiEndpoint { address: address(address_and_port.ip()), port: u32::from(address_and_port.port()) }
}

/// An address of the maps; v4-mapped ones as IPv4.
pub(super) fn socket_address(endpoint: &ApiEndpoint) -> SocketAddr {
    let ip = std::net::Ipv6Addr::from(endpoint.address).to_canonical();
    SocketAddr::new(ip, u16::try_from(endpoint.port).unwrap_or_default())
}

/// A notice from the ring buffer, if it has the size of one.
pub(super) fn notice(bytes: &[u8]) -> Option<Notice> {
    if bytes.len() != size_of::<Notice>() {
        return None;
    }
    // SAFETY: the length is that of a notice, whose fields are integers: every bit pattern is valid.
    Some(unsafe { bytes.as_ptr().cast::<Notice>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use std::io;

    use aya::{maps::MapError, sys::SyscallError};

    use super::{FILL_TRIES, filled};

    #[test]
    fn a_map_waits_for_memory_for_a_while_and_for_nothing_else() {
        let refused = |number| {
            let io_error = io::Error::from_raw_os_error(number);
            Err(MapError::SyscallError(SyscallError { call: "bpf_map_update_elem", io_error }))
        };
        let tries = |answer: &dyn Fn(u32) -> Result<(), MapError>| {
            let mut tries = 0;
            let result = filled(|| {
                tries += 1;
                answer(tries)
            });
            (result.is_ok(), tries)
        };
        assert_eq!(tries(&|tried| if tried < 4 { refused(libc::ENOMEM) } else { Ok(()) }), (true, 4));
        assert_eq!(tries(&|_| refused(libc::E2BIG)), (false, 1), "it is full");
        assert_eq!(tries(&|_| refused(libc::ENOMEM)), (false, FILL_TRIES + 1));
    }
}
