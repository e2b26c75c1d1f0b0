//! Sockets: their storage, the protocols that cannot be redirected, and the port that is the listener's. Only inet
//! sockets pass here; what a packet socket sends is the matter of the guard at the interface.

use core::{
    mem::transmute,
    ptr::{self, addr_of},
};

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock_addr},
    helpers::generated::{bpf_get_netns_cookie, bpf_set_retval, bpf_sk_storage_get},
    programs::{SockAddrContext, SockContext},
};
use weir_common::kernel::{
    Address, ApiEndpoint, Class, Counter, FlowRecord, NestedKey, NoticeKind, Phase, SocketState,
};

use crate::{ASKERS, PROCEED, REJECT, SOCKETS, class};

/// `IPPROTO_TCP`.
const TCP: u32 = 6;
/// `IPPROTO_UDP`.
const UDP: u32 = 17;
/// `IPPROTO_SCTP`.
const SCTP: u32 = 132;
/// `IPPROTO_MPTCP`.
const MPTCP: u32 = 262;
/// `EPROTONOSUPPORT`: clients fall back to TCP on it.
const EPROTONOSUPPORT: i32 = 93;
/// `ENOMEM`.
const ENOMEM: i32 = 12;
/// `EADDRINUSE`.
const EADDRINUSE: i32 = 98;

/// The third word of a v4-mapped address, in memory order.
pub(crate) const MAPPED: u32 = 0xffff_u32.to_be();
/// The last word of ::1, in memory order.
pub(crate) const LOOPBACK6: u32 = 1_u32.to_be();

/// Where what has no destination yet, or hides it, goes.
pub(crate) const NO_ENDPOINT: ApiEndpoint = ApiEndpoint { address: [0; 16], port: 0 };

/// `cgroup/sock_create`: refuses MPTCP and SCTP of enrolled cgroups, and leaves in the socket's storage in which
/// network namespace and by whom it was made, which later hooks cannot find out on every kernel.
///
/// In the host's network namespace only sockets of other protocols get storage: the guard takes one without for a
/// socket of the host's, and the storage is most of what this hook costs.
#[inline(always)]
pub(crate) fn created(ctx: &SockContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: as above.
    let protocol = unsafe { (*ctx.sock).protocol };
    let plain = protocol == TCP || protocol == UDP;
    if plain && class::in_host_netns(class::settings(), netns) {
        return PROCEED;
    }
    if protocol == MPTCP || protocol == SCTP {
        let cgroup = class::own();
        let nearest = class::nearest(cgroup);
        if nearest.entry.class == Class::Enrolled as u32 {
            class::count(Counter::ProtocolRefused, nearest.id);
            let flow = class::record(NO_ENDPOINT, 0, (cgroup, nearest.id), netns, class::now());
            class::report(NoticeKind::ProtocolRefused, protocol, &flow);
            return reject(EPROTONOSUPPORT);
        }
    }
    let (tgid, uid) = class::process();
    // What `connect` finds out is not looked for here: most sockets never go to the API set.
    let flow = FlowRecord {
        original: NO_ENDPOINT,
        cluster: 0,
        cgroup: 0,
        pod_cgroup: 0,
        netns,
        connected_boottime_ns: 0,
        tgid,
        uid,
    };
    let mut state = SocketState { flow, listener_port: 0, phase: Phase::Made as u32 };
    // SAFETY: the context of this hook is the socket.
    match unsafe { storage(ctx.as_ptr(), Some(&mut state)) } {
        Some(_) => {
            // The kernel keeps at hand what was looked for, not what was made: now, and not while it connects.
            // SAFETY: as above.
            let _ = unsafe { storage(ctx.as_ptr(), None) };
            PROCEED
        }
        // The guard would take it for one of the host's.
        None => reject(ENOMEM),
    }
}

/// `cgroup/bind`: nobody in the pod takes the port of its listener, also while no agent is there to hold it; nor does who is in the
/// pod's network and in no cgroup of it, to whom the pod's connections would go.
#[inline(always)]
pub(crate) fn bound(ctx: &SockAddrContext) -> i32 {
    let port = port(ctx.sock_addr);
    // The kernel chooses: never a port that is taken, and nobody asks for one while its listener is away.
    if port == 0 {
        return PROCEED;
    }
    let cgroup = class::own();
    let nearest = class::nearest(cgroup);
    let entry = nearest.entry;
    // SAFETY: the context is valid while the program runs.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let taken = if entry.class != Class::Enrolled as u32 {
        // The host's processes have their ports as ever.
        if class::in_host_netns(class::settings(), netns) {
            return PROCEED;
        }
        class::nested_listener(NestedKey::ANYBODY, netns)
    } else if netns == entry.listener_netns {
        entry.listener_port
    } else {
        class::nested_listener(nearest.id, netns)
    };
    if taken != port {
        return PROCEED;
    }
    class::count(Counter::BindRefused, nearest.id);
    let taken = ApiEndpoint { address: [0; 16], port };
    let flow = class::record(taken, 0, (cgroup, nearest.id), netns, class::now());
    class::report(NoticeKind::BindRefused, 0, &flow);
    reject(EADDRINUSE)
}

/// The port that a socket address hook was called with, host order. The field is 32 bits wide with the 16 bits of the
/// port first in memory.
#[inline(always)]
pub(crate) fn port(ctx: *mut bpf_sock_addr) -> u32 {
    // SAFETY: the context is valid while the program runs; the field is read whole.
    u32::from(u16::from_be(unsafe { addr_of!((*ctx).user_port).read_volatile() } as u16))
}

/// Rejects the operation with this errno instead of `EPERM`.
#[inline(always)]
pub(crate) fn reject(errno: i32) -> i32 {
    // SAFETY: takes a number only.
    unsafe { bpf_set_retval(-errno) };
    REJECT
}

/// The state kept with a socket; made from `initial` if that is given and there is none.
///
/// # Safety
/// `socket` must be what the verifier takes for a socket in this hook, and not null.
#[inline(always)]
pub(crate) unsafe fn storage(
    socket: *mut core::ffi::c_void,
    initial: Option<&mut SocketState>,
) -> Option<&'static mut SocketState> {
    let map = ptr::addr_of!(SOCKETS).cast_mut().cast();
    // SAFETY: the map exists, the socket is valid by this function's contract.
    let state = match initial {
        Some(initial) => unsafe {
            bpf_sk_storage_get(
                map,
                socket,
                ptr::from_mut(initial).cast(),
                u64::from(BPF_SK_STORAGE_GET_F_CREATE),
            )
        },
        None => unsafe { bpf_sk_storage_get(map, socket, ptr::null_mut(), 0) },
    };
    // SAFETY: null or the storage, which lives as long as the socket does, and so longer than this run.
    unsafe { state.cast::<SocketState>().as_mut() }
}

/// The [name server](server) that a socket has gone to last, if it is known to have gone to any.
///
/// # Safety
/// As that of [`storage`].
#[inline(always)]
pub(crate) unsafe fn asked(socket: *mut core::ffi::c_void) -> Option<u32> {
    let map = ptr::addr_of!(ASKERS).cast_mut().cast();
    // SAFETY: the map exists, the socket is valid by this function's contract.
    let asked = unsafe { bpf_sk_storage_get(map, socket, ptr::null_mut(), 0) };
    // SAFETY: null or the storage, which lives as long as the socket does, and so longer than this run.
    unsafe { asked.cast::<u32>().as_ref() }.copied()
}

/// Notes that it goes to one; whether that could be noted.
///
/// # Safety
/// As that of [`storage`].
#[inline(always)]
pub(crate) unsafe fn asks(socket: *mut core::ffi::c_void, mut server: u32) -> bool {
    let map = ptr::addr_of!(ASKERS).cast_mut().cast();
    let value = ptr::from_mut(&mut server).cast();
    // SAFETY: the map exists, the socket is valid by this function's contract, and so is the value.
    let asked = unsafe { bpf_sk_storage_get(map, socket, value, u64::from(BPF_SK_STORAGE_GET_F_CREATE)) };
    if asked.is_null() {
        return false;
    }
    // SAFETY: not null, and as above; a single word.
    unsafe { asked.cast::<u32>().write_volatile(server) };
    true
}

/// An address by as much as is noted of it.
#[inline(always)]
pub(crate) fn server(address: [u32; 4]) -> u32 {
    let mut mixed = 0_u32;
    for word in address {
        // The prime of FNV-1a.
        mixed = (mixed ^ word).wrapping_mul(0x0100_0193);
    }
    mixed
}

/// Four words in memory order are the sixteen bytes in network order.
#[inline(always)]
pub(crate) const fn address(words: [u32; 4]) -> Address {
    // SAFETY: same size, and every bit pattern is valid.
    unsafe { transmute(words) }
}

/// The other way about.
#[inline(always)]
pub(crate) const fn words(address: Address) -> [u32; 4] {
    // SAFETY: same size, and every bit pattern is valid.
    unsafe { transmute(address) }
}

/// Whether an address stays within the network namespace: 127.0.0.0/8, ::1, and the unspecified ones, which the kernel
/// takes for loopback.
#[inline(always)]
pub(crate) fn is_loopback(address: [u32; 4]) -> bool {
    let [first, second, third, last] = address;
    let mapped = third == MAPPED && (last.to_ne_bytes()[0] == 127 || last == 0);
    first == 0 && second == 0 && (mapped || (third == 0 && (last == LOOPBACK6 || last == 0)))
}
