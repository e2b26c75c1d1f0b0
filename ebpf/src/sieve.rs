//! What spares look-ups in hash maps: which addresses are certainly not in the API set, and what was found there and above a
//! cgroup the last time.
//!
//! All are arrays, which the kernel reads without a call. None decides anything: where one has no answer, or cannot be
//! read, the maps are asked.

use core::ptr::{addr_of, addr_of_mut};

use weir_common::{
    kernel::{Address, ApiEndpoint, CgroupEntry, Suspect},
    sieve::{Endpoint, Nearest, doubt_of, endpoint_slot, nearest_slot, slot_of},
};

use crate::{API_SET, DOUBTS, ENDPOINTS, GENERATION, NEAREST, SIEVE, SUSPECTED, socket};

/// No cluster, as a number: of an `Option` the compiler would copy what was never written, which the verifier refuses.
pub(crate) const NONE: u64 = 1 << 32;

/// The cluster of an entry of the API set, or [`NONE`]; most addresses are known for not being there without a look-up.
#[inline(always)]
pub(crate) fn api_set(endpoint: &ApiEndpoint) -> u64 {
    let (address, port) = (socket::words(endpoint.address), endpoint.port);
    if let Some(mark) = SIEVE.get_ptr(slot_of(address))
        // SAFETY: the map has this entry, a single word.
        && unsafe { mark.read_volatile() } == 0
    {
        return NONE;
    }
    let generation = generation();
    let slot = endpoint_slot(address, port);
    if let Some(kept) = kept_endpoint(slot)
        && let Some(cluster) = kept.found(address, port, generation)
    {
        return u64::from(cluster);
    }
    let key = ApiEndpoint { port: port + after(generation), ..*endpoint };
    // SAFETY: values are single words.
    match unsafe { API_SET.get(&key) } {
        Some(cluster) => {
            keep_endpoint(slot, &Endpoint::new(address, port, generation, *cluster));
            u64::from(*cluster)
        }
        None => NONE,
    }
}

/// Whether any pod may have been told this address for a configured host name.
#[inline(always)]
pub(crate) fn is_doubted(address: Address) -> bool {
    match DOUBTS.get_ptr(doubt_of(socket::words(address))) {
        // SAFETY: the map has this entry, a single word.
        Some(mark) => unsafe { mark.read_volatile() != 0 },
        None => true,
    }
}

/// Marks an address as one that a pod was told: from here on it is looked for in both maps.
#[inline(always)]
pub(crate) fn doubt(address: Address) -> bool {
    let words = socket::words(address);
    let marks = (SIEVE.get_ptr_mut(slot_of(words)), DOUBTS.get_ptr_mut(doubt_of(words)));
    let (Some(sieve), Some(doubts)) = marks else { return false };
    // SAFETY: the maps have these entries, single words.
    unsafe {
        sieve.write_volatile(1);
        doubts.write_volatile(1);
    }
    true
}

/// The cluster as whose this pod has been told an address, or [`NONE`].
#[inline(always)]
pub(crate) fn suspected(cgroup: u64, endpoint: &ApiEndpoint) -> u64 {
    let key = Suspect { cgroup, address: endpoint.address, port: endpoint.port, filling: 0 };
    // SAFETY: an entry is written whole, and not changed while it is there.
    match unsafe { SUSPECTED.get(&key) } {
        Some(suspicion) => u64::from(suspicion.cluster),
        None => NONE,
    }
}

#[inline(always)]
fn kept_endpoint(slot: u32) -> Option<Endpoint> {
    let kept = ENDPOINTS.get_ptr(slot)?;
    // SAFETY: the map has this entry. Others may write meanwhile: what is not whole is recognised by its seal.
    Some(unsafe {
        Endpoint {
            address: [
                addr_of!((*kept).address[0]).read_volatile(),
                addr_of!((*kept).address[1]).read_volatile(),
            ],
            port_and_cluster: addr_of!((*kept).port_and_cluster).read_volatile(),
            generation: addr_of!((*kept).generation).read_volatile(),
            seal: addr_of!((*kept).seal).read_volatile(),
        }
    })
}

#[inline(always)]
fn keep_endpoint(slot: u32, new: &Endpoint) {
    let Some(kept) = ENDPOINTS.get_ptr_mut(slot) else { return };
    // SAFETY: the map has this entry; each word is written whole.
    unsafe {
        addr_of_mut!((*kept).address[0]).write_volatile(new.address[0]);
        addr_of_mut!((*kept).address[1]).write_volatile(new.address[1]);
        addr_of_mut!((*kept).port_and_cluster).write_volatile(new.port_and_cluster);
        addr_of_mut!((*kept).generation).write_volatile(new.generation);
        addr_of_mut!((*kept).seal).write_volatile(new.seal);
    }
}

/// 0, for no generation has its highest bit (as the agent chooses them), but what is looked up with it is looked up after the generation
/// was read, on every processor: its address depends on it. Else an answer from before a change might be kept as one of after.
#[inline(always)]
pub(crate) fn after(generation: u64) -> u32 {
    (generation >> 63) as u32
}

/// The generation that holds, 0 if nothing may be kept.
#[inline(always)]
pub(crate) fn generation() -> u64 {
    match GENERATION.get_ptr(0) {
        // SAFETY: the map has this entry, a single word.
        Some(generation) => unsafe { generation.read_volatile() },
        None => 0,
    }
}

/// What was found above this cgroup, if it was in this generation.
#[inline(always)]
pub(crate) fn kept(cgroup: u64, generation: u64) -> Option<(u64, CgroupEntry)> {
    let kept = NEAREST.get_ptr(nearest_slot(cgroup))?;
    // SAFETY: the map has this entry. Others may write meanwhile: what is not whole is recognised by its seal.
    let kept = unsafe {
        Nearest {
            cgroup: addr_of!((*kept).cgroup).read_volatile(),
            generation: addr_of!((*kept).generation).read_volatile(),
            id: addr_of!((*kept).id).read_volatile(),
            listener_netns: addr_of!((*kept).listener_netns).read_volatile(),
            class_and_port: addr_of!((*kept).class_and_port).read_volatile(),
            seal: addr_of!((*kept).seal).read_volatile(),
        }
    };
    kept.found(cgroup, generation)
}

/// Keeps what was found above this cgroup by a walk that began after this generation was read.
#[inline(always)]
pub(crate) fn keep(cgroup: u64, generation: u64, found: (u64, CgroupEntry)) {
    let Some(kept) = NEAREST.get_ptr_mut(nearest_slot(cgroup)) else { return };
    let new = Nearest::new(cgroup, generation, found);
    // SAFETY: the map has this entry; each word is written whole.
    unsafe {
        addr_of_mut!((*kept).cgroup).write_volatile(new.cgroup);
        addr_of_mut!((*kept).generation).write_volatile(new.generation);
        addr_of_mut!((*kept).id).write_volatile(new.id);
        addr_of_mut!((*kept).listener_netns).write_volatile(new.listener_netns);
        addr_of_mut!((*kept).class_and_port).write_volatile(new.class_and_port);
        addr_of_mut!((*kept).seal).write_volatile(new.seal);
    }
}
