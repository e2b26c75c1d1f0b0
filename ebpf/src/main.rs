//! Weir's kernel programs: entry points and maps. What they do is in the modules; what they decide is in
//! `weir_common::verdict`, from maps that the agent fills. Nothing here knows policy, pods or names.
//!
//! - `connect4`, `connect6` judge a connection to an API server: pass, redirect to the listener, deny;
//! - `sendmsg4`, `sendmsg6` judge datagrams that are sent without a connect;
//! - `bind4`, `bind6` keep the listener's port free for the listener;
//! - `sock_ops` publishes a redirected connection's flow record before its SYN leaves;
//! - `getpeername4`, `getpeername6` answer with the address that the client dialled;
//! - `sock_create` marks sockets and refuses the protocols that cannot be redirected;
//! - `egress` and `interface` guard: they drop packets to an API server that came past all of these;
//! - `ingress` notes the addresses that a pod is told for a configured host name, before it is told;
//! - `lsm_socket`, `lsm_bpf` add to that where the kernel lets programs decide in its security hooks.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod answer;
mod class;
mod connect;
mod flow;
mod guard;
mod judgement;
mod security;
mod sieve;
mod socket;

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, cgroup_skb, cgroup_sock, cgroup_sock_addr, classifier, lsm, map, sock_ops},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
    programs::{LsmContext, SkBuffContext, SockAddrContext, SockContext, SockOpsContext, TcContext},
};
use weir_common::{
    answer::Reading,
    kernel::{
        API_ENDPOINTS_MAX, ApiEndpoint, CGROUPS_MAX, COUNTERS as COUNTERS_MAX, CgroupEntry, FLOWS_MAX,
        FlowKey, FlowRecord, INTERFACES_MAX, NAMES_MAX, NESTED_MAX, NOTICES_BYTES, Named, NestedKey,
        PodCounters, PodName, REPORTED_MAX, SPENDERS_MAX, SUSPECTED_MAX, Settings, SocketState, Suspect,
        Suspicion, TICK_NS_MAX,
    },
    sieve::{
        DOUBT_SLOTS, ENDPOINT_SLOTS, Endpoint, NEAREST_SLOTS, Nearest, POD_SLOTS as POD_SLOTS_MAX, PodSlot,
        SIEVE_SLOTS,
    },
};

// Not allocated ahead: small clusters need a hundredth of it.
#[map]
static API_SET: HashMap<ApiEndpoint, u32> = HashMap::with_max_entries(API_ENDPOINTS_MAX, BPF_F_NO_PREALLOC);

#[map]
static CGROUPS: HashMap<u64, CgroupEntry> = HashMap::with_max_entries(CGROUPS_MAX, 0);

// Not allocated ahead: most nodes have none.
#[map]
static NESTED: HashMap<NestedKey, u32> = HashMap::with_max_entries(NESTED_MAX, BPF_F_NO_PREALLOC);

#[map]
static SIEVE: Array<u64> = Array::with_max_entries(SIEVE_SLOTS, 0);

#[map]
static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

#[map]
static ENDPOINTS: Array<Endpoint> = Array::with_max_entries(ENDPOINT_SLOTS, 0);

#[map]
static NEAREST: Array<Nearest> = Array::with_max_entries(NEAREST_SLOTS, 0);

// Not allocated ahead: most nodes have a handful.
#[map]
static NAMES: HashMap<u64, Named> = HashMap::with_max_entries(NAMES_MAX, BPF_F_NO_PREALLOC);

#[map]
static SUSPECTED: HashMap<Suspect, Suspicion> = HashMap::with_max_entries(SUSPECTED_MAX, 0);

#[map]
static SUSPICIONS: HashMap<u64, u32> = HashMap::with_max_entries(CGROUPS_MAX, 0);

#[map]
static DOUBTS: Array<u64> = Array::with_max_entries(DOUBT_SLOTS, 0);

#[map]
static READING: PerCpuArray<Reading> = PerCpuArray::with_max_entries(1, 0);

#[map]
static SPENT: LruHashMap<u64, answer::Spent> = LruHashMap::with_max_entries(SPENDERS_MAX, 0);

#[map]
static FLOWS: LruHashMap<FlowKey, FlowRecord> = LruHashMap::with_max_entries(FLOWS_MAX, 0);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS_MAX, 0);

#[map]
static NOTICES: RingBuf = RingBuf::with_byte_size(NOTICES_BYTES, 0);

#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

// Not allocated ahead: it costs memory per CPU, and a node has far fewer pods than it may have.
#[map]
static POD_COUNTERS: PerCpuHashMap<u64, PodCounters> =
    PerCpuHashMap::with_max_entries(CGROUPS_MAX, BPF_F_NO_PREALLOC);

#[map]
static POD_SLOTS: PerCpuArray<PodSlot> = PerCpuArray::with_max_entries(POD_SLOTS_MAX, 0);

#[map]
static INTERFACES: HashMap<u32, u64> = HashMap::with_max_entries(INTERFACES_MAX, 0);

#[map]
static QUARANTINE: HashMap<u64, u64> = HashMap::with_max_entries(CGROUPS_MAX, 0);

// Not read here: it keeps the names with what they name, whatever becomes of the agent.
#[map]
static PODS: HashMap<u64, PodName> = HashMap::with_max_entries(CGROUPS_MAX, BPF_F_NO_PREALLOC);

#[map]
static REPORTED: LruHashMap<u64, u64> = LruHashMap::with_max_entries(REPORTED_MAX, 0);

// Of its own, not in the state: with that, sockets keep what an older layout has made of it.
#[btf_map]
static ASKERS: SkStorage<u32> = SkStorage::new();

#[btf_map]
static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// How long a tick of the kernel's timer is, ns; the agent sets it ([`TICK_NS`](weir_common::kernel::TICK_NS)).
#[unsafe(no_mangle)]
static TICK_NS: u64 = TICK_NS_MAX;

/// The hook lets the operation go on.
const PROCEED: i32 = 1;
/// The hook rejects the operation.
const REJECT: i32 = 0;

#[cgroup_sock_addr(connect4)]
fn weir_connect4(ctx: SockAddrContext) -> i32 {
    connect::connect4(&ctx)
}

#[cgroup_sock_addr(connect6)]
fn weir_connect6(ctx: SockAddrContext) -> i32 {
    connect::connect6(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
fn weir_sendmsg4(ctx: SockAddrContext) -> i32 {
    connect::sendmsg4(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
fn weir_sendmsg6(ctx: SockAddrContext) -> i32 {
    connect::sendmsg6(&ctx)
}

#[cgroup_sock_addr(bind4)]
fn weir_bind4(ctx: SockAddrContext) -> i32 {
    socket::bound(&ctx)
}

#[cgroup_sock_addr(bind6)]
fn weir_bind6(ctx: SockAddrContext) -> i32 {
    socket::bound(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
fn weir_getpeername4(ctx: SockAddrContext) -> i32 {
    connect::getpeername4(&ctx);
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
fn weir_getpeername6(ctx: SockAddrContext) -> i32 {
    connect::getpeername6(&ctx);
    PROCEED
}

#[sock_ops]
fn weir_sock_ops(ctx: SockOpsContext) -> u32 {
    flow::publish(&ctx);
    1
}

#[cgroup_sock(sock_create)]
fn weir_sock_create(ctx: SockContext) -> i32 {
    socket::created(&ctx)
}

#[cgroup_skb(egress)]
fn weir_egress(ctx: SkBuffContext) -> i32 {
    guard::egress(ctx.skb.skb)
}

#[cgroup_skb(ingress)]
fn weir_ingress(ctx: SkBuffContext) -> i32 {
    answer::ingress(ctx.skb.skb)
}

#[classifier]
fn weir_interface(ctx: TcContext) -> i32 {
    guard::interface(ctx.skb.skb)
}

#[lsm(hook = "socket_create")]
fn weir_lsm_socket(ctx: LsmContext) -> i32 {
    security::socket_created(ctx.arg(0))
}

#[lsm(hook = "bpf")]
fn weir_lsm_bpf(ctx: LsmContext) -> i32 {
    security::bpf_called(ctx.arg(0))
}

/// The programs' licence: GPL-compatible, since some of the helpers they call ask for that.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a loop without end, so a program that could panic does not load.
    loop {}
}
