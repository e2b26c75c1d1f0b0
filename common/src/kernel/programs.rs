//! Names of the programs in the object file, and which of them belong where.

/// Judges TCP and UDP connects over IPv4.
pub const CONNECT4: &str = "weir_connect4";
/// Judges them over IPv6, v4-mapped addresses included.
pub const CONNECT6: &str = "weir_connect6";
/// Answers `getpeername` with the dialled address.
pub const GETPEERNAME4: &str = "weir_getpeername4";
/// The same for IPv6 sockets.
pub const GETPEERNAME6: &str = "weir_getpeername6";
/// Refuses protocols that cannot be redirected and marks sockets.
pub const SOCK_CREATE: &str = "weir_sock_create";
/// Publishes flows before the SYN leaves.
pub const SOCK_OPS: &str = "weir_sock_ops";
/// Judges datagrams that are sent without a connect.
pub const SENDMSG4: &str = "weir_sendmsg4";
/// The same for IPv6 sockets.
pub const SENDMSG6: &str = "weir_sendmsg6";
/// Keeps the listener's port free.
pub const BIND4: &str = "weir_bind4";
/// The same for IPv6 sockets.
pub const BIND6: &str = "weir_bind6";
/// The guard: drops packets to the API set that came past the other hooks.
pub const EGRESS: &str = "weir_egress";
/// Notes the addresses that a pod is told for a configured host name, before it is told.
pub const INGRESS: &str = "weir_ingress";
/// The guard at the host's end of a pod's interface, for what no cgroup hook sees (packet sockets).
pub const INTERFACE: &str = "weir_interface";
/// Where the kernel lets programs decide in its security hooks: keeps pods that are enrolled or not known yet from packet sockets,
/// whichever interface they would use.
pub const LSM_SOCKET: &str = "weir_lsm_socket";
/// The same for bpf(2), with which a privileged pod could detach programs.
pub const LSM_BPF: &str = "weir_lsm_bpf";
/// What only adds to the guards, with the names of the kernel's hooks. Not in [`ALL`], which every kernel has.
pub const LSM: [(&str, &str); 2] = [(LSM_SOCKET, "socket_create"), (LSM_BPF, "bpf")];
/// Those of the root of the tree, one link each, in the order in which they are attached: the guard before anything
/// else, and what publishes flows before what redirects.
pub const GUARD_AND_HOOKS: &[&str] = ALL.split_at(ALL.len() - 2).0;
/// Those of a root of pods, in the same order.
pub const HOOKS: &[&str] = ALL.split_at(ALL.len() - 1).0.split_at(1).1;
/// What a root of pods has before an agent is there: the others stand at the root of the tree by then.
pub const LISTENING: &[&str] = HOOKS.split_at(HOOKS.len() - 1).1;
/// All of them: the guard at sockets, the hooks, what listens to name servers, the guard at interfaces.
pub const ALL: [&str; 13] = [
    EGRESS,
    SOCK_OPS,
    SOCK_CREATE,
    GETPEERNAME4,
    GETPEERNAME6,
    BIND4,
    BIND6,
    SENDMSG4,
    SENDMSG6,
    CONNECT4,
    CONNECT6,
    INGRESS,
    INTERFACE,
];
