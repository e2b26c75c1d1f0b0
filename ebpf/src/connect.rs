//! `connect`, `sendmsg` and `getpeername`: where a connection or datagram goes, and what the client sees of it.
//!
//! IPv4 is handled as v4-mapped IPv6 throughout, so that one key serves both families and a dial to
//! `::ffff:a.b.c.d` on an IPv6 socket (which runs `connect6`) is the same connection.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use weir_common::kernel::{ApiEndpoint, FlowRecord, Phase, Settings};

use crate::{
    PROCEED, answer, class,
    judgement::{self, Dialled},
    sieve,
    socket::{self, MAPPED},
};

/// `ECONNREFUSED`: what clients know, and what they get while there is no listener anyway.
const ECONNREFUSED: i32 = 111;
/// 127.0.0.1 in memory order.
const LOOPBACK4: u32 = 0x7f00_0001_u32.to_be();

/// 127.0.0.1 as the maps have it, in words.
const LOOPBACK: [u32; 4] = [0, 0, MAPPED, LOOPBACK4];

/// Where the programs send a connection.
enum Answer {
    Leave,
    Redirect(u32),
    Deny,
}

/// What the task does with the socket.
#[derive(Clone, Copy, PartialEq)]
enum Call {
    Connect,
    Send,
}

#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> i32 {
    let address = address4(ctx.sock_addr);
    match judge(ctx, address, Call::Connect) {
        Answer::Leave => PROCEED,
        Answer::Redirect(port) => {
            // SAFETY: the context is valid while the program runs; the kernel allows this hook to write this field.
            unsafe { addr_of_mut!((*ctx.sock_addr).user_ip4).write_volatile(LOOPBACK4) };
            set_port(ctx.sock_addr, port);
            PROCEED
        }
        Answer::Deny => socket::reject(ECONNREFUSED),
    }
}

#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrContext) -> i32 {
    let address = address6(ctx.sock_addr);
    match judge(ctx, address, Call::Connect) {
        Answer::Leave => PROCEED,
        Answer::Redirect(port) => {
            let mapped = address[0] == 0 && address[1] == 0 && address[2] == MAPPED;
            let target = if mapped { [0, 0, MAPPED, LOOPBACK4] } else { [0, 0, 0, socket::LOOPBACK6] };
            set_address6(ctx.sock_addr, target);
            set_port(ctx.sock_addr, port);
            PROCEED
        }
        Answer::Deny => socket::reject(ECONNREFUSED),
    }
}

/// A datagram sent without a connect: there is nothing to redirect it to.
#[inline(always)]
pub(crate) fn sendmsg4(ctx: &SockAddrContext) -> i32 {
    sendmsg(ctx, address4(ctx.sock_addr))
}

#[inline(always)]
pub(crate) fn sendmsg6(ctx: &SockAddrContext) -> i32 {
    sendmsg(ctx, address6(ctx.sock_addr))
}

#[inline(always)]
fn sendmsg(ctx: &SockAddrContext, address: [u32; 4]) -> i32 {
    match judge(ctx, address, Call::Send) {
        Answer::Leave => PROCEED,
        Answer::Redirect(_) | Answer::Deny => socket::reject(ECONNREFUSED),
    }
}

#[inline(always)]
pub(crate) fn getpeername4(ctx: &SockAddrContext) {
    if let Some(flow) = redirected(ctx) {
        let [_, _, _, address] = socket::words(flow.original.address);
        // SAFETY: as in `address4`.
        unsafe { addr_of_mut!((*ctx.sock_addr).user_ip4).write_volatile(address) };
        set_port(ctx.sock_addr, flow.original.port);
    }
}

#[inline(always)]
pub(crate) fn getpeername6(ctx: &SockAddrContext) {
    if let Some(flow) = redirected(ctx) {
        set_address6(ctx.sock_addr, socket::words(flow.original.address));
        set_port(ctx.sock_addr, flow.original.port);
    }
}

/// The flow of this socket, if the peer it is asked for is the listener it was redirected to.
#[inline(always)]
fn redirected(ctx: &SockAddrContext) -> Option<&'static FlowRecord> {
    // SAFETY: a socket address hook always has its socket.
    let state = unsafe { socket::storage(sock(ctx.sock_addr), None) }?;
    let redirected = state.phase == Phase::Redirected as u32 || state.phase == Phase::Published as u32;
    (redirected && state.listener_port == socket::port(ctx.sock_addr)).then_some(&state.flow)
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, address: [u32; 4], call: Call) -> Answer {
    let port = socket::port(ctx.sock_addr);
    let original = ApiEndpoint { address: socket::address(address), port };
    if !answer::will_be_heard(sock(ctx.sock_addr), address, port) {
        answer::report_unheard(original, kind_and_protocol(ctx.sock_addr).1);
        return Answer::Deny;
    }
    // Never: the map has them.
    let Some(settings) = class::settings() else { return Answer::Deny };
    let local = socket::is_loopback(address);
    // A server on 127.0.0.1 is reached by every address that stands for this machine.
    let key = ApiEndpoint { address: socket::address(if local { LOOPBACK } else { address }), port };
    let found = sieve::api_set(&key);
    // What pods were told, the pod decides.
    let is_doubted = sieve::is_doubted(key.address);
    if found == sieve::NONE && !is_doubted && settings.quarantined == 0 {
        return elsewhere(ctx, settings, &original, call);
    }
    let what = Dialled { original, key, found, local: u64::from(local), is_doubted: u64::from(is_doubted) };
    // SAFETY: the context is valid while the program runs.
    match unsafe { judgement::weir_judge(ctx.sock_addr, &raw const what) } {
        judgement::ELSEWHERE => elsewhere(ctx, settings, &original, call),
        judgement::LEAVE => Answer::Leave,
        port @ 1..=judgement::PORT_MAX => Answer::Redirect(port as u32),
        _ => Answer::Deny,
    }
}

/// Not to the API set.
#[inline(always)]
fn elsewhere(ctx: &SockAddrContext, settings: &Settings, destination: &ApiEndpoint, call: Call) -> Answer {
    // A datagram does not change what its socket is connected to.
    if call == Call::Connect {
        forget_unless_redirected_by_child(ctx, settings, destination);
    }
    Answer::Leave
}

/// A socket that connects elsewhere is no longer a redirected one. Only the connect that a hook further down has
/// just rewritten, by the same process and not yet on its way, stays what it is.
#[inline(always)]
fn forget_unless_redirected_by_child(ctx: &SockAddrContext, settings: &Settings, destination: &ApiEndpoint) {
    // SAFETY: a socket address hook always has its socket.
    let Some(state) = (unsafe { socket::storage(sock(ctx.sock_addr), None) }) else { return };
    if state.phase == Phase::Made as u32 {
        return;
    }
    let rewritten = settings.attach_levels > 1
        && state.phase == Phase::Redirected as u32
        && state.listener_port == destination.port
        && state.flow.tgid == class::thread_group()
        && socket::is_loopback(socket::words(destination.address));
    if !rewritten {
        state.phase = Phase::Made as u32;
    }
}

#[inline(always)]
pub(crate) fn sock(ctx: *mut bpf_sock_addr) -> *mut core::ffi::c_void {
    // SAFETY: the context is valid while the program runs.
    unsafe { addr_of!((*ctx).__bindgen_anon_1.sk).read_volatile().cast() }
}

/// `SOCK_*` and `IPPROTO_*` of the socket.
#[inline(always)]
pub(crate) fn kind_and_protocol(ctx: *mut bpf_sock_addr) -> (u32, u32) {
    // SAFETY: the context is valid while the program runs.
    unsafe { (addr_of!((*ctx).type_).read_volatile(), addr_of!((*ctx).protocol).read_volatile()) }
}

#[inline(always)]
fn set_port(ctx: *mut bpf_sock_addr, port: u32) {
    // SAFETY: as in `address4`.
    unsafe { addr_of_mut!((*ctx).user_port).write_volatile(u32::from((port as u16).to_be())) };
}

#[inline(always)]
fn address4(ctx: *mut bpf_sock_addr) -> [u32; 4] {
    // SAFETY: the context is valid while the program runs; the field is read whole.
    [0, 0, MAPPED, unsafe { addr_of!((*ctx).user_ip4).read_volatile() }]
}

/// Word by word: the verifier knows no other access to this field on older kernels.
#[inline(always)]
fn address6(ctx: *mut bpf_sock_addr) -> [u32; 4] {
    // SAFETY: as in `address4`.
    unsafe {
        [
            addr_of!((*ctx).user_ip6[0]).read_volatile(),
            addr_of!((*ctx).user_ip6[1]).read_volatile(),
            addr_of!((*ctx).user_ip6[2]).read_volatile(),
            addr_of!((*ctx).user_ip6[3]).read_volatile(),
        ]
    }
}

#[inline(always)]
fn set_address6(ctx: *mut bpf_sock_addr, words: [u32; 4]) {
    // SAFETY: as in `address4`.
    unsafe {
        addr_of_mut!((*ctx).user_ip6[0]).write_volatile(words[0]);
        addr_of_mut!((*ctx).user_ip6[1]).write_volatile(words[1]);
        addr_of_mut!((*ctx).user_ip6[2]).write_volatile(words[2]);
        addr_of_mut!((*ctx).user_ip6[3]).write_volatile(words[3]);
    }
}
