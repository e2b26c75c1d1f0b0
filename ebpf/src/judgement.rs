//! The judgement of a connection or datagram that may go to the API set, of both families and both hooks.
//!
//! It is a global function: the kernel verifies it once and on its own, with whatever arguments it may be called, and
//! takes its answer for any number. In one piece with the hooks it would look at everything here once for each way
//! that leads to it. Its arguments are the context and a struct without padding, all of which is written. There is one, not
//! several that call each other: together with the caller's they have 512 bytes of stack.

use aya_ebpf::{bindings::bpf_sock_addr, helpers::generated::bpf_get_netns_cookie};
use weir_common::{
    kernel::{ApiEndpoint, Class, FlowRecord, KUBELET, Notice, Phase, Settings, SocketState},
    verdict::{Target, Verdict, verdict},
};

use crate::{
    QUARANTINE,
    class::{self, Classified},
    connect::{kind_and_protocol, sock},
    sieve, socket,
};

/// `SOCK_STREAM`.
const STREAM: u32 = 1;

/// What is answered: up to this one a port of a listener, to which the connection is redirected; any number that is not
/// named here denies it.
pub(crate) const PORT_MAX: u64 = 0xffff;
/// It goes where it was meant to go.
pub(crate) const LEAVE: u64 = 1 << 16;
/// So it does, and not to the API set.
pub(crate) const ELSEWHERE: u64 = 2 << 16;
/// It is refused.
const DENY: u64 = 3 << 16;

const REDIRECT: u64 = Verdict::Redirect as u64;

/// What a hook knows before it knows whose the socket is.
#[repr(C)]
pub(crate) struct Dialled {
    pub(crate) original: ApiEndpoint,
    /// As it is in the API set.
    pub(crate) key: ApiEndpoint,
    /// Its cluster, or [`sieve::NONE`].
    pub(crate) found: u64,
    /// Not 0: an address that stays within the network namespace.
    pub(crate) local: u64,
    /// Not 0: some pod may have been told the address.
    pub(crate) is_doubted: u64,
}

const _: () = {
    assert!(size_of::<Dialled>() == 2 * size_of::<ApiEndpoint>() + 24);
};

/// Finds out whose the socket is, and with that the verdict.
///
/// # Safety
/// The context must be that of a hook that runs.
#[inline(never)]
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn weir_judge(ctx: *mut bpf_sock_addr, dialled: *const Dialled) -> u64 {
    // Never: it is in the caller's stack, and the map has its entry.
    // SAFETY: null or valid.
    let (Some(dialled), Some(settings)) = (unsafe { dialled.as_ref() }, class::settings()) else {
        return DENY;
    };
    // SAFETY: a socket address hook always has its socket.
    let state = unsafe { socket::storage(sock(ctx), None) };
    // A socket stays in its network namespace, which most have noted when they were made.
    let netns = match &state {
        Some(state) => state.flow.netns,
        // SAFETY: the context is valid while the program runs.
        None => unsafe { bpf_get_netns_cookie(ctx.cast()) },
    };
    // An answer that the verifier is to follow no further than it must.
    let host_netns = class::unknown(settings, u64::from(class::in_host_netns(Some(settings), netns)));
    let cgroup = class::own();
    let nearest = class::nearest(cgroup);
    let (pod_cgroup, number) = (nearest.id, nearest.entry.class);
    let quarantined = settings.quarantined != 0
        && (dialled.local == 0 || host_netns != 0)
        // SAFETY: values are single words.
        && unsafe { QUARANTINE.get(&pod_cgroup) }.is_some();
    let cluster = cluster(dialled, host_netns != 0, pod_cgroup);
    if cluster == sieve::NONE && !quarantined {
        return ELSEWHERE;
    }
    // Of none it is 0.
    let cluster = cluster as u32;
    let listener_port = listener_port(&nearest, netns);
    // A number that no class has is a class of a newer agent: unknown, and denied.
    let class = Class::from_number(number);
    let target = if cluster == KUBELET { Target::Kubelet } else { Target::ApiServer };
    let verdict = if quarantined {
        Verdict::DenyQuarantined
    } else if class.is_none() && pod_cgroup != 0 {
        Verdict::DenyUnknown
    } else {
        verdict(target, class, listener_port != 0, host_netns != 0)
    };
    #[cfg(feature = "debug-log")]
    aya_log_ebpf::info!(
        &aya_ebpf::programs::SockAddrContext::new(ctx),
        "port {}, cgroup {}, pod cgroup {}, class {}, netns {}: verdict {}",
        dialled.original.port,
        cgroup,
        pod_cgroup,
        number,
        netns,
        verdict as u32
    );
    let flow = |now| class::record(dialled.original, cluster, (cgroup, pod_cgroup), netns, now);
    let verdict = class::unknown(settings, verdict as u64);
    settle(ctx, settings, verdict, (&dialled.original, pod_cgroup, flow), state, listener_port)
}

/// The cluster that is dialled, or [`sieve::NONE`].
#[inline(always)]
fn cluster(dialled: &Dialled, host_netns: bool, pod_cgroup: u64) -> u64 {
    if dialled.found != sieve::NONE {
        // The loopback address of a pod's own network namespace is no server of the node.
        if dialled.local != 0 && !host_netns { sieve::NONE } else { dialled.found }
    } else if dialled.is_doubted != 0 {
        sieve::suspected(pod_cgroup, &dialled.key)
    } else {
        sieve::NONE
    }
}

/// The port of the listener in this network namespace; 0 if there is none for whom it is.
#[inline(always)]
fn listener_port(nearest: &Classified, netns: u64) -> u32 {
    if nearest.entry.listener_port != 0 && nearest.entry.listener_netns == netns {
        nearest.entry.listener_port
    } else if nearest.entry.class == Class::Enrolled as u32 {
        // Rare: nothing that is redirected in a pod's own network comes this way.
        class::nested_listener(nearest.id, netns)
    } else {
        0
    }
}

/// Counts, reports, and notes the verdict (as number) with the socket.
#[inline(always)]
fn settle(
    ctx: *mut bpf_sock_addr,
    settings: &Settings,
    verdict: u64,
    (original, pod_cgroup, flow): (&ApiEndpoint, u64, impl Fn(u64) -> FlowRecord),
    mut state: Option<&'static mut SocketState>,
    listener_port: u32,
) -> u64 {
    // Outside every classified cgroup the programs are met once, and nothing is redirected: a socket that has no
    // storage yet needs none.
    if state.is_none() && pod_cgroup != 0 {
        let mut initial = SocketState { flow: flow(0), listener_port, phase: Phase::Made as u32 };
        // SAFETY: a socket address hook always has its socket.
        state = unsafe { socket::storage(sock(ctx), Some(&mut initial)) };
    }
    if let Some(state) = &mut state
        && settings.attach_levels > 1
        && state.phase == Phase::Judged as u32
        && same(&state.flow.original, original)
        && state.flow.tgid == class::thread_group()
    {
        // The hook of a cgroup further down has counted and reported this very connect.
        state.phase = Phase::Made as u32;
        // Never a redirect, since a redirected connection no longer has an address of the API set.
        return if Verdict::passes(verdict) { LEAVE } else { DENY };
    }
    let (kind, protocol) = kind_and_protocol(ctx);
    let verdict = match (verdict, &state) {
        // The listener speaks TCP alone: anything else to an API server's address is no way around it.
        (REDIRECT, _) if kind != STREAM => Verdict::DenyProtocol as u64,
        // Without storage no flow could be published, and the listener would close the connection.
        (REDIRECT, None) => Verdict::DenyNoRoom as u64,
        (REDIRECT, Some(_)) | (_, _) => verdict,
    };
    if verdict == REDIRECT
        && let Some(state) = state
    {
        class::count_redirect(pod_cgroup);
        // Dated when it is published: until then it bears the tick, which costs nothing to read.
        state.flow = flow(class::ticks());
        state.listener_port = listener_port;
        state.phase = Phase::Redirected as u32;
        // Never another answer, nor 0: that is no port.
        return u64::from(listener_port as u16);
    }
    class::count_number(settings, Verdict::counter_number(verdict), pod_cgroup);
    let answer = if Verdict::passes(verdict) { LEAVE } else { DENY };
    let notice = Verdict::notice_number(verdict);
    if state.is_none() && notice == 0 {
        return answer;
    }
    let flow = flow(if notice == 0 { 0 } else { class::now() });
    if notice != 0 {
        class::report_whole(&Notice { flow, kind: notice, protocol });
    }
    if let Some(state) = state {
        state.flow = flow;
        state.listener_port = listener_port;
        state.phase = Phase::Judged as u32;
    }
    answer
}

/// Whether two endpoints are the same, by words: by bytes it would be twice the program.
#[inline(always)]
fn same(one: &ApiEndpoint, other: &ApiEndpoint) -> bool {
    one.port == other.port && socket::words(one.address) == socket::words(other.address)
}
