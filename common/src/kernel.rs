//! The layouts of the maps that the kernel programs and the agent share.
//!
//! Every type is `repr(C)`, without implicit padding, of a size asserted here: a layout that differs between
//! the two sides would let connections escape. Addresses are 16 bytes in network order, IPv4 as v4-mapped IPv6
//! (`::ffff:a.b.c.d`), so that one key serves both families. Ports are in host order. Nothing here knows policy.

pub mod programs;

/// The version of all layouts in this file; part of the name of the folder of pinned maps.
pub const LAYOUT_VERSION: u32 = 3;

/// Most entries of the API set: API servers of all clusters, and a kubelet (each with several addresses) a node.
pub const API_ENDPOINTS_MAX: u32 = 65_536;
/// Most pod (and other classified) cgroups on a node.
pub const CGROUPS_MAX: u32 = 8192;
/// Most listeners of pods: one in the own network namespace of each that is enrolled, and a few in namespaces inside it.
pub const NESTED_MAX: u32 = 8192;
/// Most host names of API servers.
pub const NAMES_MAX: u32 = 2048;
/// Most ports, of all clusters, that one host name has.
pub const NAME_ENDPOINTS_MAX: usize = 16;
/// Most addresses, with and without a port, that pods were told and nobody has judged yet.
pub const SUSPECTED_MAX: u32 = 16_384;
/// Most of one pod's: it may tell itself what it likes, and must not take the room of others.
pub const SUSPECTED_BY_POD_MAX: u32 = 256;
/// Most accounts, two a pod, of what reading answers costs; the oldest are forgotten, and begin anew.
pub const SPENDERS_MAX: u32 = 2048;
/// Most steps through answers that a pod may be ahead of [`STEP_SHIFT`].
pub const STEPS_AHEAD_MAX: u64 = 1 << 20;
/// After `1 << STEP_SHIFT` ns a pod has made good for a step through an answer: 244,000 a second, some 1,500 answers, and less than
/// a hundredth of a processor.
pub const STEP_SHIFT: u32 = 12;
/// Most flows between `connect` and `accept` that are kept; the oldest are dropped (and then refused on accept).
pub const FLOWS_MAX: u32 = 65_536;
/// Most network interfaces (the host's ends of enrolled pods') that are guarded.
pub const INTERFACES_MAX: u32 = 8192;
/// Most pods and interfaces, by kinds of notices, whose last one is remembered; the oldest are forgotten, and may then be reported
/// once more.
pub const REPORTED_MAX: u32 = 1024;
/// Least time between two notices of a guard about one pod or interface, ns: a flood of packets must not become a
/// flood of notices.
pub const REPORT_INTERVAL_NS: u64 = 1_000_000_000;
/// Size of the ring buffer for [`Notice`]s, in bytes; a power of two and a multiple of the page size.
pub const NOTICES_BYTES: u32 = 256 * 1024;

/// Name of the programs' constant that says how long a tick of the kernel's timer is (`u64`, ns), which the agent sets before it
/// loads them.
pub const TICK_NS: &str = "TICK_NS";
/// The longest that a tick may be (`CONFIG_HZ` is 100 at least), ns.
pub const TICK_NS_MAX: u64 = 10_000_000;

/// An address in network byte order; IPv4 as `::ffff:a.b.c.d`.
pub type Address = [u8; 16];

/// Key of the API set: one address and port of an API server. The value is the cluster's index (`u32`), or
/// [`KUBELET`]. Each address is there a second time with port [`PORT_UNKNOWN`](crate::packet::PORT_UNKNOWN), so that
/// the guards can dismiss all others with one look-up.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApiEndpoint {
    /// IP address, network order.
    pub address: Address,
    /// Port, host order, in the low 16 bits.
    pub port: u32,
}

/// Value in the API set of a kubelet's address: it takes exec and logs of every pod of its node, so enrolled pods
/// have no business there.
pub const KUBELET: u32 = u32::MAX;

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

/// A network namespace that an enrolled pod has made in itself; key of the map of listeners there, whose value is the
/// listener's port on 127.0.0.1 and ::1, host order (`u32`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NestedKey {
    /// Id of the pod's cgroup.
    pub cgroup: u64,
    /// Cookie of the network namespace.
    pub netns: u64,
}

impl NestedKey {
    /// No cgroup has this id: under it is the port of a pod's own listener, for whoever asks by the network namespace alone.
    pub const ANYBODY: u64 = u64::MAX;
}

/// Where a host name of API servers leads; value of the map keyed by [`name_hash`](crate::answer::name_hash). Where the map has
/// anything, it has the key 0 as well.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Those with port 0 are none.
    pub endpoints: [NamedEndpoint; NAME_ENDPOINTS_MAX],
}

/// A port of a host name.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamedEndpoint {
    /// Index of the cluster.
    pub cluster: u32,
    /// Port, host order.
    pub port: u32,
}

/// What a pod was told to be an address of a configured host name, before anybody else knows of it; key of the map of
/// [`Suspicion`]s. As in the API set, each address is there a second time with port
/// [`PORT_UNKNOWN`](crate::packet::PORT_UNKNOWN).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Suspect {
    /// Id of the pod's cgroup.
    pub cgroup: u64,
    /// IP address, network order.
    pub address: Address,
    /// Port, host order.
    pub port: u32,
    /// 0.
    pub filling: u32,
}

/// As what it is suspected.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// Hash of the name.
    pub name: u64,
    /// Index of the cluster.
    pub cluster: u32,
    /// 0.
    pub filling: u32,
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
    /// When it connected, in ns since boot (`CLOCK_BOOTTIME`). A process that bears `tgid` later and started
    /// before this time is the one that connected: a pid is not given twice at a time. (The start time itself
    /// would need offsets into `task_struct`, which differ between kernels.)
    pub connected_boottime_ns: u64,
    /// Thread group id in the initial pid namespace.
    pub tgid: u32,
    /// User id in the initial user namespace.
    pub uid: u32,
}

/// What is kept with a socket; value of the socket storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketState {
    /// The redirect, or (before any) only who made the socket and in which network namespace. Until it is published, the time of
    /// a redirect is given in ticks of the kernel's timer: to read the clock is a good part of what a connect costs.
    pub flow: FlowRecord,
    /// Port of the listener that the socket was redirected to, host order.
    pub listener_port: u32,
    /// A [`Phase`] as number.
    pub phase: u32,
}

/// How far a socket is, in [`SocketState`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Made, or connected to something that is no API server.
    Made = 0,
    /// Judged with another verdict than redirect: a hook on a cgroup further up must not count it again.
    Judged = 1,
    /// Its address is rewritten; the flow is not published yet.
    Redirected = 2,
    /// Its flow is published.
    Published = 3,
}

/// What the agent tells the programs; the only entry of the settings array.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Cookie of the network namespace of the host; 0: none is known, and nothing passes for being there.
    pub host_netns: u64,
    /// On how many levels of the cgroup tree the programs are attached above a pod (1 or 2): with 2, a
    /// connection meets them twice and must be counted once. Below 256: the programs rely on the bits above being 0.
    pub attach_levels: u32,
    /// How many cgroups are in quarantine: with 0 no connection pays for looking.
    pub quarantined: u32,
}

/// Names of the maps, as in the object file and in the folder of pins.
pub mod maps {
    /// Hash of [`ApiEndpoint`](super::ApiEndpoint) → cluster index (`u32`).
    pub const API_SET: &str = "API_SET";
    /// Hash of cgroup id (`u64`) → [`CgroupEntry`](super::CgroupEntry).
    pub const CGROUPS: &str = "CGROUPS";
    /// Hash of [`NestedKey`](super::NestedKey) → port of the listener there (`u32`): in namespaces inside pods, and for
    /// [`ANYBODY`](super::NestedKey::ANYBODY) in pods' own.
    pub const NESTED: &str = "NESTED";
    /// Hash of [`name_hash`](crate::answer::name_hash) (`u64`) → [`Named`](super::Named).
    pub const NAMES: &str = "NAMES";
    /// Hash of [`Suspect`](super::Suspect) → [`Suspicion`](super::Suspicion): written by the kernel, taken out by the agent.
    pub const SUSPECTED: &str = "SUSPECTED";
    /// Hash of cgroup id (`u64`) → how many entries it has in [`SUSPECTED`] (`u32`).
    pub const SUSPICIONS: &str = "SUSPICIONS";
    /// Array of `u64` by [`sieve::doubt_of`](crate::sieve::doubt_of): not 0 where an address in [`SUSPECTED`] has this slot. As with
    /// [`SIEVE`], a mark comes first and stays.
    pub const DOUBTS: &str = "DOUBTS";
    /// LRU hash of [`FlowKey`](super::FlowKey) → [`FlowRecord`](super::FlowRecord).
    pub const FLOWS: &str = "FLOWS";
    /// Per-CPU array of `u64`, indexed by [`Counter`](super::Counter).
    pub const COUNTERS: &str = "COUNTERS";
    /// Ring buffer of [`Notice`](super::Notice).
    pub const NOTICES: &str = "NOTICES";
    /// Array of one [`Settings`](super::Settings).
    pub const SETTINGS: &str = "SETTINGS";
    /// Socket storage of [`SocketState`](super::SocketState).
    pub const SOCKETS: &str = "SOCKETS";
    /// Socket storage of a `u32`: there if the socket has gone to port 53, whose answers are read; where to, mixed.
    pub const ASKERS: &str = "ASKERS";
    /// Per-CPU hash of cgroup id (`u64`) → [`PodCounters`](super::PodCounters); the agent makes the entries.
    pub const POD_COUNTERS: &str = "POD_COUNTERS";
    /// Per-CPU array of [`PodSlot`](crate::sieve::PodSlot) by [`sieve::pod_slot`](crate::sieve::pod_slot); the agent says whose a slot is.
    pub const POD_SLOTS: &str = "POD_SLOTS";
    /// Hash of interface index (`u32`) → id of the cgroup of the pod behind it (`u64`).
    pub const INTERFACES: &str = "INTERFACES";
    /// Hash of the ids of the cgroups in quarantine (`u64`) → since when, in ns since boot (`u64`).
    pub const QUARANTINE: &str = "QUARANTINE";
    /// Hash of cgroup id (`u64`) → [`PodName`](super::PodName): for people, the programs do not read it.
    pub const PODS: &str = "PODS";
    /// LRU hash of cgroup id or interface index, with the kind in the highest byte (`u64`) → time of the last notice of that kind, in ns
    /// since boot (`u64`).
    pub const REPORTED: &str = "REPORTED";
    /// Array of `u64` by [`sieve::slot_of`](crate::sieve::slot_of): not 0 where an address of the API set has this slot. Whoever adds an
    /// address marks it first, and nobody takes a mark away, so that an address without one needs no look-up.
    pub const SIEVE: &str = "SIEVE";
    /// Array of one `u64`: which state of [`CGROUPS`] and [`API_SET`] this is. Whoever changes one of them writes 0 before (what
    /// is kept does not count, and nothing is kept), and then a number below 2^63 that was never there before.
    pub const GENERATION: &str = "GENERATION";
    /// All that are pinned; what the programs keep for themselves (`sieve`) is not.
    pub const ALL: [&str; 21] = [
        API_SET,
        CGROUPS,
        NESTED,
        SIEVE,
        GENERATION,
        NAMES,
        SUSPECTED,
        SUSPICIONS,
        DOUBTS,
        FLOWS,
        COUNTERS,
        NOTICES,
        SETTINGS,
        SOCKETS,
        ASKERS,
        POD_COUNTERS,
        POD_SLOTS,
        INTERFACES,
        QUARANTINE,
        PODS,
        REPORTED,
    ];
}

/// Why the kernel reports something; in [`Notice`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoticeKind {
    /// A connection was denied: its cgroup is not classified.
    DeniedUnknown = 1,
    /// A connection was denied: enrolled, but there is no listener in its network namespace.
    DeniedNoListener = 2,
    /// A socket was refused because of its protocol (MPTCP, SCTP), or its connect (UDP).
    ProtocolRefused = 3,
    /// A connection of an observed pod that would have been redirected.
    WouldRedirect = 4,
    /// A connection to a kubelet was denied.
    DeniedKubelet = 5,
    /// The guard dropped a packet that came past the other hooks.
    GuardDropped = 6,
    /// The guard at an interface did.
    InterfaceDropped = 7,
    /// A socket was kept from taking the listener's port.
    BindRefused = 8,
    /// A connection of a pod in quarantine was denied.
    DeniedQuarantined = 9,
    /// A packet socket was refused; its family stands for the protocol.
    PacketSocketRefused = 10,
    /// A call of bpf(2) was refused; the command stands for the protocol.
    BpfRefused = 11,
    /// An answer of a name server was kept from a pod. The address is whom it came from, and a [`KeptAnswer`](crate::answer::KeptAnswer) is with the protocol.
    AnswerRefused = 12,
    /// A socket did not get to a name server: there is no room for the note that it asks.
    QuestionRefused = 13,
}

impl NoticeKind {
    /// The kind with this number, if there is one.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::DeniedUnknown),
            2 => Some(Self::DeniedNoListener),
            3 => Some(Self::ProtocolRefused),
            4 => Some(Self::WouldRedirect),
            5 => Some(Self::DeniedKubelet),
            6 => Some(Self::GuardDropped),
            7 => Some(Self::InterfaceDropped),
            8 => Some(Self::BindRefused),
            9 => Some(Self::DeniedQuarantined),
            10 => Some(Self::PacketSocketRefused),
            11 => Some(Self::BpfRefused),
            12 => Some(Self::AnswerRefused),
            13 => Some(Self::QuestionRefused),
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
    /// Sockets refused because of their protocol, and UDP of enrolled pods to the API set.
    ProtocolRefused = 5,
    /// Flows published to the flow map.
    FlowsPublished = 6,
    /// Flows that could not be published: their connection is closed on accept.
    FlowsLost = 7,
    /// Notices that did not fit into the ring buffer.
    NoticesLost = 8,
    /// Connects of observed pods that would have been redirected.
    WouldRedirect = 9,
    /// … denied because they go to a kubelet.
    DeniedKubelet = 10,
    /// Packets that the guard dropped.
    GuardDropped = 11,
    /// Packets that the guard at an interface dropped.
    InterfaceDropped = 12,
    /// Sockets that were kept from taking the listener's port.
    BindRefused = 13,
    /// Connects (to anywhere) of pods in quarantine that were denied.
    DeniedQuarantined = 14,
}

/// Number of [`Counter`]s.
pub const COUNTERS: u32 = 15;

/// Names of the pod that a cgroup is of, UTF-8, filled up with zeros. A Kubernetes namespace has up to 63 bytes, a
/// pod's name up to 253, a UID 36.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodName {
    /// Namespace.
    pub namespace: [u8; 64],
    /// Name.
    pub name: [u8; 256],
    /// UID.
    pub uid: [u8; 64],
}

/// The counters of one pod, indexed by [`Counter`].
pub type PodCounters = [u64; COUNTERS as usize];

const _: () = {
    use core::mem::size_of;
    assert!(size_of::<ApiEndpoint>() == 20);
    assert!(size_of::<CgroupEntry>() == 16);
    assert!(size_of::<NestedKey>() == 16);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<FlowRecord>() == 64);
    assert!(size_of::<Notice>() == 72);
    assert!(size_of::<SocketState>() == 72);
    assert!(size_of::<Settings>() == 16);
    assert!(size_of::<PodName>() == 384);
    assert!(size_of::<Named>() == 128);
    assert!(size_of::<Suspect>() == 32);
    assert!(size_of::<Suspicion>() == 16);
};

#[cfg(feature = "user")]
mod pod {
    use super::{
        ApiEndpoint, CgroupEntry, FlowKey, FlowRecord, Named, NestedKey, Notice, PodName, Settings, Suspect,
        Suspicion,
    };
    // SAFETY: all are repr(C), made of integers only, and without padding (the sizes are asserted above).
    unsafe impl aya::Pod for ApiEndpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for CgroupEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for FlowRecord {}
    // SAFETY: see above.
    unsafe impl aya::Pod for NestedKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Notice {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Settings {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodName {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::sieve::PodSlot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Named {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Suspect {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Suspicion {}
}
