//! `sock_ops`: publishes the flow of a redirected connection under its 4-tuple. The callback runs after the
//! kernel has chosen the source port and before the SYN leaves, so the listener always finds the entry.

use core::ptr::addr_of;

use aya_ebpf::{bindings::BPF_SOCK_OPS_TCP_CONNECT_CB, programs::SockOpsContext};
use weir_common::kernel::{Counter, FlowKey, Phase};

use crate::{FLOWS, class, socket};

/// `AF_INET`.
const INET: u32 = 2;

#[inline(always)]
pub(crate) fn publish(ctx: &SockOpsContext) {
    if ctx.op() != BPF_SOCK_OPS_TCP_CONNECT_CB {
        return;
    }
    // SAFETY: the context is valid while the program runs.
    let sock: *mut core::ffi::c_void = unsafe { (*ctx.ops).__bindgen_anon_2.sk.cast() };
    if sock.is_null() {
        return;
    }
    // SAFETY: not null, and the verifier knows it for a full socket.
    let Some(state) = (unsafe { socket::storage(sock, None) }) else { return };
    if state.phase != Phase::Redirected as u32 {
        return;
    }
    // Everything is read before anything is decided: the compiler would else join the reads of both families
    // into one at a computed offset, which the verifier refuses.
    // SAFETY: the context is valid while the program runs; each field is read whole, word by word.
    let (family, local4, remote4, local6, remote6) = unsafe {
        let ops = ctx.ops;
        (
            addr_of!((*ops).family).read_volatile(),
            addr_of!((*ops).local_ip4).read_volatile(),
            addr_of!((*ops).remote_ip4).read_volatile(),
            [
                addr_of!((*ops).local_ip6[0]).read_volatile(),
                addr_of!((*ops).local_ip6[1]).read_volatile(),
                addr_of!((*ops).local_ip6[2]).read_volatile(),
                addr_of!((*ops).local_ip6[3]).read_volatile(),
            ],
            [
                addr_of!((*ops).remote_ip6[0]).read_volatile(),
                addr_of!((*ops).remote_ip6[1]).read_volatile(),
                addr_of!((*ops).remote_ip6[2]).read_volatile(),
                addr_of!((*ops).remote_ip6[3]).read_volatile(),
            ],
        )
    };
    let (client, listener) = if family == INET {
        ([0, 0, socket::MAPPED, local4], [0, 0, socket::MAPPED, remote4])
    } else {
        (local6, remote6)
    };
    let key = FlowKey {
        netns: state.flow.netns,
        client: socket::address(client),
        listener: socket::address(listener),
        client_port: ctx.local_port(),
        listener_port: u32::from_be(ctx.remote_port()),
    };
    if key.listener_port != state.listener_port {
        return;
    }
    // Dated here, and not by the hook: what connected with TCP fast open may leave much later.
    state.flow.connected_boottime_ns = class::time_of(state.flow.connected_boottime_ns);
    match FLOWS.insert(&key, &state.flow, 0) {
        Ok(()) => {
            state.phase = Phase::Published as u32;
            class::count(Counter::FlowsPublished, state.flow.pod_cgroup);
        }
        Err(_) => class::count(Counter::FlowsLost, state.flow.pod_cgroup),
    }
}
