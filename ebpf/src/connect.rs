//! `connect`, `sendmsg` and `getpeername`: where a connection or datagram goes, and what the client sees of it.
//!
//! IPv4 is handled as v4-mapped IPv6 throughout, so that one key serves both families and a dial to
//! `::ffff:a.b.c.d` on an IPv6 socket (which runs `connect6`) is the same connection.

use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    EbpfContext, bindings::bpf_sock_addr, helpers::generated::bpf_get_netns_cookie, programs::SockAddrContext,
};
use weir_common::{
    kernel::{ApiEndpoint, Class, Counter, FlowRecord, KUBELET, NoticeKind, Phase, Settings, SocketState},
    verdict::{Target, Verdict, verdict},
};

use crate::{
    PROCEED, QUARANTINE, answer, class, sieve,
    socket::{self, MAPPED},
};

/// `ECONNREFUSED`: what clients know, and what they get while there is no listener anyway.
const ECONNREFUSED: i32 = 111;
/// `SOCK_STREAM`.
const STREAM: u32 = 1;
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
    let state = unsafe { socket::storage(sock(ctx), None) }?;
    let redirected = state.phase == Phase::Redirected as u32 || state.phase == Phase::Published as u32;
    (redirected && state.listener_port == socket::port(ctx.sock_addr)).then_some(&state.flow)
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, address: [u32; 4], call: Call) -> Answer {
    let port = socket::port(ctx.sock_addr);
    let original = ApiEndpoint { address: socket::address(address), port };
    if !answer::will_be_heard(sock(ctx), address, port) {
        answer::report_unheard(original, kind_and_protocol(ctx).1);
        return Answer::Deny;
    }
    // Never: the map has them.
    let Some(settings) = class::settings() else { return Answer::Deny };
    // Answers that the verifier is to follow no further than it must.
    let unknown = |answer: bool| class::unknown(settings, u64::from(answer)) != 0;
    let local = unknown(socket::is_loopback(address));
    // A server on 127.0.0.1 is reached by every address that stands for this machine.
    let key = ApiEndpoint { address: socket::address(if local { LOOPBACK } else { address }), port };
    let found = class::unknown(settings, sieve::api_set(&key));
    // What pods were told, the pod decides.
    let is_doubted = unknown(sieve::is_doubted(key.address));
    let may_be_quarantined = settings.quarantined != 0;
    if found == sieve::NONE && !is_doubted && !may_be_quarantined {
        return elsewhere(ctx, settings, &original, call);
    }
    // SAFETY: a socket address hook always has its socket.
    let mut state = unsafe { socket::storage(sock(ctx), None) };
    // A socket stays in its network namespace, which most have noted when they were made.
    let netns = match &state {
        Some(state) => state.flow.netns,
        // SAFETY: the context is valid while the program runs.
        None => unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
    };
    let host_netns = unknown(class::in_host_netns(Some(settings), netns));
    let cgroup = class::own();
    let nearest = class::nearest(cgroup);
    let (pod_cgroup, number) = (nearest.id, nearest.entry.class);
    // SAFETY: values are single words.
    let quarantined = unknown(
        may_be_quarantined && (!local || host_netns) && unsafe { QUARANTINE.get(&pod_cgroup) }.is_some(),
    );
    // The loopback address of a pod's own network namespace is no server of the node.
    let cluster = class::unknown(
        settings,
        if found != sieve::NONE {
            if local && !host_netns { sieve::NONE } else { found }
        } else if is_doubted {
            sieve::suspected(pod_cgroup, &key)
        } else {
            sieve::NONE
        },
    );
    if cluster == sieve::NONE && !quarantined {
        return elsewhere(ctx, settings, &original, call);
    }
    let cluster = if cluster == sieve::NONE { 0 } else { cluster as u32 };
    let own_listener = nearest.entry.listener_port != 0 && nearest.entry.listener_netns == netns;
    let listener_port = class::unknown(
        settings,
        u64::from(if own_listener {
            nearest.entry.listener_port
        } else if number == Class::Enrolled as u32 {
            // Rare: nothing that is redirected in a pod's own network comes this way.
            class::nested_listener(pod_cgroup, netns)
        } else {
            0
        }),
    ) as u32;
    // A number that no class has is a class of a newer agent: unknown, and denied.
    let class = Class::from_number(number);
    let target = if cluster == KUBELET { Target::Kubelet } else { Target::ApiServer };
    let verdict = if quarantined {
        Verdict::DenyQuarantined
    } else if class.is_none() && pod_cgroup != 0 {
        Verdict::DenyUnknown
    } else {
        verdict(target, class, listener_port != 0, host_netns)
    };
    let flow = |now| class::record(original, cluster, (cgroup, pod_cgroup), netns, now);
    // Outside every classified cgroup the programs are met once, and nothing is redirected: a socket that has no
    // storage yet needs none.
    if state.is_none() && pod_cgroup != 0 {
        let mut initial = SocketState { flow: flow(0), listener_port, phase: Phase::Made as u32 };
        // SAFETY: as above.
        state = unsafe { socket::storage(sock(ctx), Some(&mut initial)) };
    }
    if let Some(state) = &mut state
        && settings.attach_levels > 1
        && state.phase == Phase::Judged as u32
        && same(&state.flow.original, &original)
        && state.flow.tgid == class::thread_group()
    {
        // The hook of a cgroup further down has counted and reported this very connect.
        state.phase = Phase::Made as u32;
        return answer_again(verdict);
    }
    #[cfg(feature = "debug-log")]
    aya_log_ebpf::info!(
        ctx,
        "port {}, cgroup {}, pod cgroup {}, class {}, netns {}: verdict {}",
        original.port,
        cgroup,
        pod_cgroup,
        number,
        netns,
        verdict as u32
    );
    decide(verdict, (pod_cgroup, flow), state, listener_port, kind_and_protocol(ctx))
}

/// Whether two endpoints are the same, by words: by bytes it would be twice the program.
#[inline(always)]
fn same(one: &ApiEndpoint, other: &ApiEndpoint) -> bool {
    one.port == other.port && socket::words(one.address) == socket::words(other.address)
}

/// Counts, reports, and notes the verdict with the socket.
#[inline(always)]
fn decide(
    verdict: Verdict,
    (pod_cgroup, flow): (u64, impl FnOnce(u64) -> FlowRecord),
    state: Option<&'static mut SocketState>,
    listener_port: u32,
    (kind, protocol): (u32, u32),
) -> Answer {
    let (answer, counter, notice) = match verdict {
        Verdict::Pass => (Answer::Leave, Counter::Passed, None),
        Verdict::PassObserved => (Answer::Leave, Counter::WouldRedirect, Some(NoticeKind::WouldRedirect)),
        // The listener speaks TCP alone: anything else to an API server's address is no way around it.
        Verdict::Redirect if kind != STREAM => {
            (Answer::Deny, Counter::ProtocolRefused, Some(NoticeKind::ProtocolRefused))
        }
        // Without storage no flow could be published, and the listener would close the connection.
        Verdict::Redirect if state.is_none() => (Answer::Deny, Counter::FlowsLost, None),
        Verdict::Redirect => (Answer::Redirect(listener_port), Counter::Redirected, None),
        Verdict::DenyNoListener => {
            (Answer::Deny, Counter::DeniedNoListener, Some(NoticeKind::DeniedNoListener))
        }
        Verdict::DenyUnknown => (Answer::Deny, Counter::DeniedUnknown, Some(NoticeKind::DeniedUnknown)),
        Verdict::DenyKubelet => (Answer::Deny, Counter::DeniedKubelet, Some(NoticeKind::DeniedKubelet)),
        Verdict::DenyQuarantined => {
            (Answer::Deny, Counter::DeniedQuarantined, Some(NoticeKind::DeniedQuarantined))
        }
    };
    match answer {
        Answer::Redirect(_) => class::count_redirect(pod_cgroup),
        Answer::Leave | Answer::Deny => class::count_all(&[Counter::Seen, counter], pod_cgroup),
    }
    if state.is_none() && notice.is_none() {
        return answer;
    }
    // A redirect is dated when it is published: until then it bears the tick, which costs nothing to read.
    let time = match (&notice, &answer) {
        (Some(_), _) => class::now(),
        (None, Answer::Redirect(_)) => class::ticks(),
        (None, _) => 0,
    };
    let flow = flow(time);
    if let Some(notice) = notice {
        class::report(notice, protocol, &flow);
    }
    if let Some(state) = state {
        state.flow = flow;
        state.listener_port = listener_port;
        state.phase = match answer {
            Answer::Redirect(_) => Phase::Redirected as u32,
            Answer::Leave | Answer::Deny => Phase::Judged as u32,
        };
    }
    answer
}

/// The answer of a hook further up to a verdict that one further down has given: never a redirect, since a
/// redirected connection no longer has an address of the API set.
#[inline(always)]
fn answer_again(verdict: Verdict) -> Answer {
    match verdict {
        Verdict::Pass | Verdict::PassObserved => Answer::Leave,
        Verdict::Redirect
        | Verdict::DenyNoListener
        | Verdict::DenyUnknown
        | Verdict::DenyKubelet
        | Verdict::DenyQuarantined => Answer::Deny,
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
    let Some(state) = (unsafe { socket::storage(sock(ctx), None) }) else { return };
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
fn sock(ctx: &SockAddrContext) -> *mut core::ffi::c_void {
    // SAFETY: the context is valid while the program runs.
    unsafe { addr_of!((*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile().cast() }
}

/// `SOCK_*` and `IPPROTO_*` of the socket.
#[inline(always)]
fn kind_and_protocol(ctx: &SockAddrContext) -> (u32, u32) {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        (
            addr_of!((*ctx.sock_addr).type_).read_volatile(),
            addr_of!((*ctx.sock_addr).protocol).read_volatile(),
        )
    }
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
