//! The guards: packets to the API set that came past the other hooks, whatever made them.
//!
//! `cgroup_skb/egress` judges by the socket's cgroup (raw sockets, sockets that changed hands, connections from
//! before enrolment); the program at the host's end of a pod's interface by the pod behind it (packet sockets, tun
//! devices, nested network namespaces). Legitimate connections of an enrolled pod bear the listener's address and
//! meet neither.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_hdr_start_off::BPF_HDR_START_NET, bpf_sock},
    helpers::generated::{
        bpf_sk_ancestor_cgroup_id, bpf_sk_cgroup_id, bpf_sk_fullsock, bpf_skb_load_bytes_relative,
    },
};
use weir_common::{
    kernel::{ApiEndpoint, Class, Counter, FlowRecord, NoticeKind, REPORT_INTERVAL_NS},
    packet::{self, Destination, PORT_UNKNOWN, Packet},
    verdict::guard_passes,
};

use crate::{
    INTERFACES, PROCEED, REJECT, REPORTED, class,
    sieve::{self, NONE},
    socket,
};

/// EtherTypes that carry an IP packet further in, where its destination is not read: VLAN and double VLAN tags,
/// MPLS, PPPoE. Pods have no use for them, so the guard at an interface lets none through.
const WRAPPING: [u16; 5] = [0x8100, 0x88a8, 0x8847, 0x8848, 0x8864];

/// A socket buffer, read from its network header on.
pub(crate) struct Buffer(pub(crate) *mut __sk_buff);

impl Buffer {
    /// A `T` at this offset, of whatever bytes are there.
    ///
    /// # Safety
    /// Every bit pattern must be a valid `T`.
    #[inline(always)]
    unsafe fn read<T>(&self, offset: u32) -> Option<T> {
        // Not zeroed: the compiler would call a function for it, and the helper fills it whole, or with zeros.
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the context is valid while the program runs; the helper writes the whole value, also where it fails.
        unsafe {
            let result = bpf_skb_load_bytes_relative(
                self.0.cast(),
                offset,
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
                BPF_HDR_START_NET,
            );
            (result == 0).then(|| value.assume_init())
        }
    }
}

impl Packet for Buffer {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // SAFETY: bytes are valid whatever they are.
        unsafe { self.read(offset) }
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // SAFETY: so are words.
        unsafe { self.read(offset) }
    }
}

/// The entry of the API set that a packet goes to, and its cluster; a hidden destination counts as one. [`NONE`] for the
/// cluster: pods were told this address, and whose packet it is decides.
#[inline(always)]
fn target(buffer: &Buffer) -> Option<(ApiEndpoint, u64)> {
    let (address, transport) = match packet::destination(buffer) {
        Destination::Address { address, transport } => (socket::address(address), transport),
        Destination::Hidden => return Some((socket::NO_ENDPOINT, 0)),
        Destination::None => return None,
    };
    let any = ApiEndpoint { address, port: PORT_UNKNOWN };
    let known = sieve::api_set(&any);
    let is_doubted = sieve::is_doubted(address);
    if known == NONE && !is_doubted {
        return None;
    }
    let endpoint = ApiEndpoint { address, port: packet::port(buffer, transport)? };
    let whole = known == NONE || endpoint.port == PORT_UNKNOWN;
    let cluster = if whole { known } else { sieve::api_set(&endpoint) };
    if cluster == NONE && !is_doubted { None } else { Some((endpoint, cluster)) }
}

/// The cluster that is known, or as whose this pod was told the address; none if nobody told it.
#[inline(always)]
fn cluster_of(cluster: u64, pod_cgroup: u64, original: &ApiEndpoint) -> Option<u32> {
    let cluster = if cluster == NONE { sieve::suspected(pod_cgroup, original) } else { cluster };
    if cluster == NONE { None } else { Some(cluster as u32) }
}

#[inline(always)]
pub(crate) fn egress(skb: *mut __sk_buff) -> i32 {
    let Some((original, cluster)) = target(&Buffer(skb)) else { return PROCEED };
    // SAFETY: the context is valid while the program runs; the helper takes null.
    let sock: *mut bpf_sock = unsafe {
        let sock = (*skb).__bindgen_anon_2.sk;
        if sock.is_null() { sock } else { bpf_sk_fullsock(sock) }
    };
    if sock.is_null() {
        // The kernel runs this hook for full sockets only; should that change, nothing unjudged passes.
        class::count(Counter::GuardDropped, 0);
        return REJECT;
    }
    // SAFETY: not null, and the verifier knows it for a full socket.
    let cgroup = unsafe { bpf_sk_cgroup_id(sock.cast()) };
    let nearest = class::nearest_of(cgroup, |level| {
        // SAFETY: as above.
        unsafe { bpf_sk_ancestor_cgroup_id(sock.cast(), level) }
    });
    // SAFETY: as above.
    let state = unsafe { socket::storage(sock.cast(), None) };
    // A socket from before the programs were attached has no storage: its cgroup alone decides.
    let host_netns = match &state {
        Some(state) => class::in_host_netns(class::settings(), state.flow.netns),
        None => true,
    };
    let to = socket::words(original.address);
    // Without an address at all it may go anywhere.
    let hidden = to == socket::words(socket::NO_ENDPOINT.address);
    if !host_netns && !hidden && socket::is_loopback(to) {
        // The loopback address of a pod's own network namespace is no server of the node.
        return PROCEED;
    }
    let pod_cgroup = nearest.id;
    let Some(cluster) = cluster_of(cluster, pod_cgroup, &original) else { return PROCEED };
    // A number that no class has is a class of a newer agent: unknown, and it passes nowhere.
    let class = Class::from_number(nearest.entry.class);
    if (class.is_some() || pod_cgroup == 0) && guard_passes(class, host_netns) {
        return PROCEED;
    }
    class::count(Counter::GuardDropped, pod_cgroup);
    let (netns, tgid, uid) = match &state {
        Some(state) => (state.flow.netns, state.flow.tgid, state.flow.uid),
        None => (0, 0, 0),
    };
    // SAFETY: as above.
    let protocol = unsafe { (*sock).protocol };
    if let Some(now) = may_report(cgroup, NoticeKind::GuardDropped) {
        let flow = FlowRecord {
            original,
            cluster,
            cgroup,
            pod_cgroup,
            netns,
            connected_boottime_ns: now,
            tgid,
            uid,
        };
        class::report(NoticeKind::GuardDropped, protocol, &flow);
    }
    REJECT
}

#[inline(always)]
pub(crate) fn interface(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let (index, ether_type) = unsafe { ((*skb).ingress_ifindex, u16::from_be((*skb).protocol as u16)) };
    let wrapped = WRAPPING.contains(&ether_type);
    let found = if wrapped { Some((socket::NO_ENDPOINT, 0)) } else { target(&Buffer(skb)) };
    let Some((original, cluster)) = found else { return TC_ACT_UNSPEC };
    // SAFETY: values are single words.
    let pod_cgroup = match unsafe { INTERFACES.get(&index) } {
        Some(cgroup) => *cgroup,
        None => 0,
    };
    let Some(cluster) = cluster_of(cluster, pod_cgroup, &original) else { return TC_ACT_UNSPEC };
    // Unlike a socket, an interface has one owner: only what is said of that very pod counts, and a pod that is not
    // known (any more) gets nothing through.
    if let Some(entry) = class::entry(pod_cgroup)
        && let Some(class) = Class::from_number(entry.class)
        && guard_passes(Some(class), false)
    {
        return TC_ACT_UNSPEC;
    }
    class::count(Counter::InterfaceDropped, pod_cgroup);
    if let Some(now) = may_report(u64::from(index), NoticeKind::InterfaceDropped) {
        let flow = FlowRecord {
            original,
            cluster,
            cgroup: pod_cgroup,
            pod_cgroup,
            netns: 0,
            connected_boottime_ns: now,
            tgid: 0,
            uid: 0,
        };
        class::report(NoticeKind::InterfaceDropped, u32::from(ether_type), &flow);
    }
    TC_ACT_SHOT as i32
}

/// Now, if nothing of this kind was reported under this key for a while. By kinds: a pod must not hide one behind another.
#[inline(always)]
pub(crate) fn may_report(key: u64, kind: NoticeKind) -> Option<u64> {
    let now = class::now();
    // Neither cgroups nor interfaces have numbers that long.
    let key = key ^ (kind as u64) << 56;
    // SAFETY: values are single words.
    if let Some(last) = unsafe { REPORTED.get(&key) }
        && now.wrapping_sub(*last) < REPORT_INTERVAL_NS
    {
        return None;
    }
    // That it does not fit only means that the next packet may be reported as well.
    let _ = REPORTED.insert(&key, &now, 0);
    Some(now)
}
