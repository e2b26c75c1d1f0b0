//! The layouts of the maps that the kernel programs and the agent share.
//!
//! Every type is `repr(C)`, without implicit padding, of a size asserted here: a layout that differs between
//! the two sides would let connections escape. Addresses are 16 bytes in network order, IPv4 as v4-mapped IPv6
//! (`::ffff:a.b.c.d`), so that one key serves both families. Ports are in host order. Nothing here knows policy.

/// The version of all layouts in this file; part of the name of the folder of pinned maps.
pub const LAYOUT_VERSION: u32 = 1;

/// Most API endpoint addresses over all clusters.
pub const API_ENDPOINTS_MAX: u32 = 4096;
/// Most pod (and other classified) cgroups on a node.
pub const CGROUPS_MAX: u32 = 8192;
/// Most flows between `connect` and `accept` that are kept; the oldest are dropped (and then refused on accept).
pub const FLOWS_MAX: u32 = 65_536;
/// Size of the ring buffer for [`Notice`]s, in bytes; a power of two and a multiple of the page size.
pub const NOTICES_BYTES: u32 = 256 * 1024;

/// An address in network byte order; IPv4 as `::ffff:a.b.c.d`.
pub type Address = [u8; 16];

/// Key of the API set: one address and port of an API server. The value is the cluster's index (`u32`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApiEndpoint {
    /// IP address, network order.
    pub address: Address,
    /// Port, host order, in the low 16 bits.
    pub port: u32,
}

/// What is known of a cgroup; value of the map keyed by cgroup id (`u64`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupEntry {
    /// Cookie of the network namespace in which the listener of this cgroup listens; 0: no listener yet.
    pub listener_netns: u64,
    /// A [`Class`] as number.
    pub class: u32,
    /// The listener's port on 127.0.0.1 and ::1, host order.
    pub listener_port: u32,
}

/// How connections from a cgroup to the API set are treated.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The agent itself: passes.
    Agent = 1,
    /// Known and not selected: passes.
    Unselected = 2,
    /// Enrolled: redirected to the listener.
    Enrolled = 3,
    /// Selected, but only observed: passes, counted and reported.
    Observed = 4,
    /// A root below which every cgroup must be classified (kubepods): otherwise denied.
    Container = 5,
}

impl Class {
    /// The class with this number, if there is one.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Agent),
            2 => Some(Self::Unselected),
            3 => Some(Self::Enrolled),
            4 => Some(Self::Observed),
            5 => Some(Self::Container),
            _ => None,
        }
    }
}

/// A connection as both ends see it after the redirect; key of the flow map, written before the SYN leaves.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Cookie of the client's network namespace.
    pub netns: u64,
    /// The client's address, as its peer sees it.
    pub client: Address,
    /// The listener's address.
    pub listener: Address,
    /// The client's port.
    pub client_port: u32,
    /// The listener's port.
    pub listener_port: u32,
}

/// What the kernel knows of a redirected connection; value of the flow map and of the socket storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// The address that the client dialled.
    pub original: ApiEndpoint,
    /// Index of the cluster that the dialled address belongs to.
    pub cluster: u32,
    /// Id of the cgroup (the container's) whose task connected.
    pub cgroup: u64,
    /// Id of the classified cgroup (the pod's) at or above `cgroup`.
    pub pod_cgroup: u64,
    /// Cookie of the network namespace of the socket.
    pub netns: u64,
    /// Start of the process (its thread group leader), in ns since boot (`start_boottime`), to tell a reused
    /// pid from the one that connected; 0 where it could not be read.
    pub start_boottime_ns: u64,
    /// Thread group id in the initial pid namespace.
    pub tgid: u32,
    /// User id in the initial user namespace.
    pub uid: u32,
}

/// Why the kernel reports something; in [`Notice`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoticeKind {
    /// A connection was denied: its cgroup is not classified.
    DeniedUnknown = 1,
    /// A connection was denied: enrolled, but there is no listener in its network namespace.
    DeniedNoListener = 2,
    /// A socket was refused because of its protocol (MPTCP, SCTP).
    ProtocolRefused = 3,
    /// A connection of an observed pod that would have been redirected.
    WouldRedirect = 4,
}

impl NoticeKind {
    /// The kind with this number, if there is one.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::DeniedUnknown),
            2 => Some(Self::DeniedNoListener),
            3 => Some(Self::ProtocolRefused),
            4 => Some(Self::WouldRedirect),
            _ => None,
        }
    }
}

/// An entry of the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The connection as far as it is known.
    pub flow: FlowRecord,
    /// A [`NoticeKind`] as number.
    pub kind: u32,
    /// The socket's protocol (IPPROTO_*).
    pub protocol: u32,
}

/// Indices of the per-CPU counter array.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connects to the API set that the hooks saw.
    Seen = 0,
    /// … that were redirected.
    Redirected = 1,
    /// … that passed (agent, unselected, host).
    Passed = 2,
    /// … denied because the cgroup is unknown.
    DeniedUnknown = 3,
    /// … denied because the listener is missing.
    DeniedNoListener = 4,
    /// Sockets refused because of their protocol.
    ProtocolRefused = 5,
    /// Flows published to the flow map.
    FlowsPublished = 6,
    /// Flows that could not be published: their connection is closed on accept.
    FlowsLost = 7,
    /// Notices that did not fit into the ring buffer.
    NoticesLost = 8,
    /// Connects of observed pods that would have been redirected.
    WouldRedirect = 9,
}

/// Number of [`Counter`]s.
pub const COUNTERS: u32 = 10;

const _: () = {
    use core::mem::size_of;
    assert!(size_of::<ApiEndpoint>() == 20);
    assert!(size_of::<CgroupEntry>() == 16);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<FlowRecord>() == 64);
    assert!(size_of::<Notice>() == 72);
};

#[cfg(feature = "user")]
mod pod {
    use super::{ApiEndpoint, CgroupEntry, FlowKey, FlowRecord, Notice};
    // SAFETY: all are repr(C), made of integers only, and without padding (the sizes are asserted above).
    unsafe impl aya::Pod for ApiEndpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for CgroupEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Notice {}
}
