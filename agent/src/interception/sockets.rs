//! Ending connections that exist already (`SOCK_DESTROY`): those that a pod made past Weir before it was enrolled, and
//! all of a pod in quarantine. The process sees an error (`ECONNABORTED`) and connects anew, into the hooks.

use std::{
    collections::HashSet,
    fs::File,
    io,
    net::SocketAddr,
    os::unix::fs::DirEntryExt as _,
    path::{Path, PathBuf},
};

use netlink_packet_core::Nla as _;
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, SOCK_DESTROY},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::{cgroup, namespace, netlink::Netlink};

/// `INET_DIAG_CGROUP_ID`, linux/inet_diag.h.
const CGROUP_ID: u16 = 21;
/// Most cgroups below a pod's that are looked at.
const FOLDERS_MAX: usize = 1024;

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Connection {
    /// The other end.
    pub(super) peer: SocketAddr,
    /// The cgroup in which the socket was made; none if the kernel does not say.
    pub(super) cgroup: Option<u64>,
}

/// Destroys the chosen TCP and UDP connections of a network namespace (none: this thread's). Returns how many.
///
/// # Errors
/// The namespace cannot be entered, or the kernel refuses (`CONFIG_INET_DIAG_DESTROY`).
pub(super) fn destroy(
    namespace: Option<&File>,
    chosen: impl Fn(&Connection) -> bool + Send,
) -> io::Result<usize> {
    match namespace {
        None => destroy_here(chosen),
        Some(namespace) => namespace::within(namespace, || destroy_here(chosen))?,
    }
}

fn destroy_here(chosen: impl Fn(&Connection) -> bool) -> io::Result<usize> {
    let netlink = Netlink::open(NETLINK_SOCK_DIAG)?;
    let mut destroyed = 0;
    for (family, protocol) in
        [(AF_INET, IPPROTO_TCP), (AF_INET6, IPPROTO_TCP), (AF_INET, IPPROTO_UDP), (AF_INET6, IPPROTO_UDP)]
    {
        let any = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
        let mut found = Vec::new();
        // A listener has no other end, and a connection that only waits for its end carries nothing.
        let states = StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT;
        netlink.dump(question(family, protocol, states.clone(), any), |answer| {
            if let SockDiagMessage::InetResponse(response) = answer
                && chosen(&connection(&response))
            {
                found.push(response.header.socket_id.clone());
            }
        })?;
        for socket in found {
            match netlink.request(
                question(family, protocol, states.clone(), socket),
                Some(SOCK_DESTROY),
                |_| (),
            ) {
                Ok(()) => destroyed += 1,
                // It has ended by itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(destroyed)
}

fn question(family: u8, protocol: u8, states: StateFlags, socket_id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id,
    })
}

fn connection(response: &InetResponse) -> Connection {
    let id = &response.header.socket_id;
    let cgroup = response.nlas.iter().find(|attribute| attribute.kind() == CGROUP_ID).and_then(|attribute| {
        let mut bytes = [0; 8];
        (attribute.value_len() == bytes.len()).then(|| {
            attribute.emit_value(&mut bytes);
            u64::from_ne_bytes(bytes)
        })
    });
    Connection { peer: SocketAddr::new(id.destination_address.to_canonical(), id.destination_port), cgroup }
}

/// The ids of a cgroup and of those below it.
pub(super) fn cgroups_of(folder: &Path) -> HashSet<u64> {
    let mut ids: HashSet<u64> = cgroup::id(folder).into_iter().collect();
    let mut pending: Vec<PathBuf> = vec![folder.to_owned()];
    while let Some(folder) = pending.pop() {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if ids.len() < FOLDERS_MAX {
                ids.insert(entry.ino());
                pending.push(entry.path());
            }
        }
    }
    ids
}
