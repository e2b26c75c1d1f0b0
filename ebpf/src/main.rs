//! Weir's kernel programs: entry points and maps. What they do is in the modules; what they decide is in
//! `weir_common::verdict`, from maps that the agent fills. Nothing here knows policy, pods or names.
//!
//! - `connect4`, `connect6` judge a connection to an API server: pass, redirect to the listener, deny;
//! - `sock_ops` publishes a redirected connection's flow record before its SYN leaves;
//! - `getpeername4`, `getpeername6` answer with the address that the client dialled;
//! - `sock_create` marks sockets and refuses the protocols that cannot be redirected.
#![no_std]
#![no_main]

mod class;
mod connect;
mod flow;
mod socket;

use aya_ebpf::{
    btf_maps::SkStorage,
    macros::{btf_map, cgroup_sock, cgroup_sock_addr, map, sock_ops},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};
use weir_common::kernel::{
    API_ENDPOINTS_MAX, ApiEndpoint, CGROUPS_MAX, COUNTERS as COUNTERS_MAX, CgroupEntry, FLOWS_MAX, FlowKey,
    FlowRecord, NOTICES_BYTES, Settings, SocketState,
};

#[map]
static API_SET: HashMap<ApiEndpoint, u32> = HashMap::with_max_entries(API_ENDPOINTS_MAX, 0);

#[map]
static CGROUPS: HashMap<u64, CgroupEntry> = HashMap::with_max_entries(CGROUPS_MAX, 0);

#[map]
static FLOWS: LruHashMap<FlowKey, FlowRecord> = LruHashMap::with_max_entries(FLOWS_MAX, 0);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS_MAX, 0);

#[map]
static NOTICES: RingBuf = RingBuf::with_byte_size(NOTICES_BYTES, 0);

#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

#[btf_map]
static SOCKETS: SkStorage<SocketState> = SkStorage::new();

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

/// The programs' licence: GPL-compatible, since some of the helpers they call ask for that.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a loop without end, so a program that could panic does not load.
    loop {}
}
