//! Sockets: their storage, and the protocols that cannot be redirected. Only inet sockets pass here; what a
//! packet socket sends is the egress guard's matter.

use core::ptr;

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    helpers::generated::{bpf_get_netns_cookie, bpf_set_retval, bpf_sk_storage_get},
    programs::SockContext,
};
use weir_common::kernel::{ApiEndpoint, Class, Counter, NoticeKind, Phase, SocketState};

use crate::{PROCEED, REJECT, SOCKETS, class};

/// `IPPROTO_SCTP`.
const SCTP: u32 = 132;
/// `IPPROTO_MPTCP`.
const MPTCP: u32 = 262;
/// `EPROTONOSUPPORT`: clients fall back to TCP on it.
const EPROTONOSUPPORT: i32 = 93;

const NO_ENDPOINT: ApiEndpoint = ApiEndpoint { address: [0; 16], port: 0 };

/// `cgroup/sock_create`: refuses MPTCP and SCTP of enrolled cgroups, and leaves in the socket's storage in which
/// network namespace and by whom it was made, which later hooks cannot find out on every kernel.
#[inline(always)]
pub(crate) fn created(ctx: &SockContext) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: as above.
    let protocol = unsafe { (*ctx.sock).protocol };
    let nearest = class::nearest();
    let (pod_cgroup, number) = match nearest {
        Some(nearest) => (nearest.id, nearest.entry.class),
        None => (0, 0),
    };
    let flow = class::record(NO_ENDPOINT, 0, pod_cgroup, netns);
    if number == Class::Enrolled as u32 && (protocol == MPTCP || protocol == SCTP) {
        class::count(Counter::ProtocolRefused);
        class::report(NoticeKind::ProtocolRefused, protocol, &flow);
        return reject(EPROTONOSUPPORT);
    }
    let mut state = SocketState { flow, listener_port: 0, phase: Phase::Made as u32 };
    // SAFETY: the context of this hook is the socket. Without memory for the storage the socket has none: hooks
    // treat that like an unknown socket.
    let _ = unsafe { storage(ctx.as_ptr(), Some(&mut state)) };
    PROCEED
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
