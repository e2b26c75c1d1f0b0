//! Listeners inside other network namespaces. A listening socket belongs to the namespace it was made in, and is
//! used from anywhere.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener},
    os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd},
    path::PathBuf,
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, getsockname, getsockopt, listen,
    setsockopt, socket, sockopt,
};
use tokio::net::{TcpListener, TcpStream};

use super::namespace;

/// Connections that wait in the kernel for `accept`, per listener and family.
const BACKLOG: i32 = 1024;
/// Ports that are tried until one is free for both families.
const PORT_ATTEMPTS_MAX: usize = 32;

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// The namespace's file cannot be opened.
    #[error("cannot open the network namespace {}; has its process ended?", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The namespace cannot be entered.
    #[error("cannot enter the network namespace; is this root (CAP_SYS_ADMIN)?")]
    Enter(#[source] io::Error),
    /// The sockets cannot be made.
    #[error("cannot {action} in the network namespace")]
    Socket {
        /// What failed.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Which network namespace to listen in.
#[derive(Debug)]
pub enum Namespace {
    /// The one of this process.
    Own,
    /// That of an opened `/proc/<pid>/ns/net` (or a bind mount of one).
    Of(File),
}

impl Namespace {
    /// That of a process. The caller must check *after* this that the process is still the one it meant.
    ///
    /// # Errors
    /// The process has ended.
    pub fn of_process(pid: u32) -> Result<Self, ListenerError> {
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        File::open(&path).map(Self::Of).map_err(|source| ListenerError::Open { path, source })
    }
}

/// Listening sockets on 127.0.0.1 and ::1 on one port, and the namespace they are in.
#[derive(Debug)]
pub struct Listener {
    ipv4: TcpListener,
    /// None where the kernel has no IPv6: then nothing can be redirected there either.
    ipv6: Option<TcpListener>,
    port: u16,
    netns: u64,
}

/// The sockets on their way from the thread that made them, or between two agents.
#[derive(Debug)]
pub(super) struct Sockets {
    ipv4: StdListener,
    ipv6: Option<StdListener>,
    port: u16,
    netns: u64,
}

impl Sockets {
    /// Takes listening sockets, IPv4 first, from another agent; what they are is asked of the kernel.
    pub(super) fn of_descriptors(descriptors: Vec<OwnedFd>) -> Result<Self, ListenerError> {
        let missing = || ListenerError::Socket {
            action: "find the listener in what was passed",
            source: io::ErrorKind::InvalidData.into(),
        };
        let mut descriptors = descriptors.into_iter();
        let ipv4 = descriptors.next().ok_or_else(missing)?;
        let listens = getsockopt(&ipv4, sockopt::AcceptConn).unwrap_or(false);
        let port = port(&ipv4).ok().filter(|_| listens).ok_or_else(missing)?;
        let netns = cookie(&ipv4)?;
        Ok(Self { ipv4: ipv4.into(), ipv6: descriptors.next().map(StdListener::from), port, netns })
    }

    /// Their descriptors, as [`Self::of_descriptors`] takes them.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        [Some(&self.ipv4), self.ipv6.as_ref()].into_iter().flatten().map(AsRawFd::as_raw_fd).collect()
    }
}

impl Listener {
    /// Enters the namespace, listens on a free port of 127.0.0.1 and ::1, and comes back. Must be called in a
    /// tokio runtime; blocks for a few system calls.
    ///
    /// # Errors
    /// The namespace cannot be entered, or no socket can be made in it.
    pub fn in_netns(namespace: Namespace) -> Result<Self, ListenerError> {
        let sockets = match namespace {
            Namespace::Own => sockets()?,
            Namespace::Of(file) => namespace::within(&file, sockets).map_err(ListenerError::Enter)??,
        };
        Self::of_sockets(sockets)
    }

    /// Listens with sockets that listen already. Must be called in a tokio runtime.
    pub(super) fn of_sockets(sockets: Sockets) -> Result<Self, ListenerError> {
        let wrap = |listener: StdListener| {
            listener
                .set_nonblocking(true)
                .and_then(|()| TcpListener::from_std(listener))
                .map_err(|source| ListenerError::Socket { action: "use the listener", source })
        };
        Ok(Self {
            ipv4: wrap(sockets.ipv4)?,
            ipv6: sockets.ipv6.map(wrap).transpose()?,
            port: sockets.port,
            netns: sockets.netns,
        })
    }

    /// Its sockets once more, for another agent: both then accept from the same queue.
    pub(super) fn share(&self) -> io::Result<Sockets> {
        let share = |listener: &TcpListener| listener.as_fd().try_clone_to_owned().map(StdListener::from);
        Ok(Sockets {
            ipv4: share(&self.ipv4)?,
            ipv6: self.ipv6.as_ref().map(share).transpose()?,
            port: self.port,
            netns: self.netns,
        })
    }

    /// The port, the same for both families.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Cookie of the network namespace that the sockets are in.
    pub fn netns(&self) -> u64 {
        self.netns
    }

    /// Waits for a connection on either family; gives it with the peer's address. Safe to drop while it waits.
    ///
    /// # Errors
    /// As of `accept`; most are passing ones (the peer reset, no descriptors left).
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        match &self.ipv6 {
            None => self.ipv4.accept().await,
            Some(ipv6) => tokio::select! {
                accepted = self.ipv4.accept() => accepted,
                accepted = ipv6.accept() => accepted,
            },
        }
    }
}

/// The cookie of this thread's network namespace.
///
/// # Errors
/// No socket can be made, or the kernel is older than 5.14.
pub fn own_netns() -> Result<u64, ListenerError> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|errno| ListenerError::Socket { action: "make a socket", source: errno.into() })?;
    cookie(&socket)
}

fn sockets() -> Result<Sockets, ListenerError> {
    let failed = |action| move |errno: nix::Error| ListenerError::Socket { action, source: errno.into() };
    let mut last = nix::Error::EADDRINUSE;
    for _ in 0..PORT_ATTEMPTS_MAX {
        let ipv4 =
            listening(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).map_err(failed("listen on 127.0.0.1"))?;
        let port = port(&ipv4).map_err(failed("find the port of the listener"))?;
        let netns = cookie(&ipv4)?;
        match listening(SocketAddr::from((Ipv6Addr::LOCALHOST, port))) {
            Ok(ipv6) => return Ok(Sockets { ipv4: ipv4.into(), ipv6: Some(ipv6.into()), port, netns }),
            Err(nix::Error::EAFNOSUPPORT | nix::Error::EADDRNOTAVAIL) => {
                return Ok(Sockets { ipv4: ipv4.into(), ipv6: None, port, netns });
            }
            // The port is taken on ::1 only: another one.
            Err(errno) => last = errno,
        }
    }
    Err(failed("find a port that is free on 127.0.0.1 and ::1")(last))
}

fn listening(address: SocketAddr) -> nix::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    // A pod's loopback interface may still be down, or have no address yet: the listener comes first.
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

fn port(socket: &OwnedFd) -> nix::Result<u16> {
    let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    address.as_sockaddr_in().map(nix::sys::socket::SockaddrIn::port).ok_or(nix::Error::EAFNOSUPPORT)
}

/// `SO_NETNS_COOKIE`: what the kernel programs know a network namespace by.
fn cookie(socket: &OwnedFd) -> Result<u64, ListenerError> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or_default();
    // SAFETY: the option writes eight bytes, and the buffer and its length say that it has eight.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 && cookie != 0 {
        return Ok(cookie);
    }
    let source =
        if result == 0 { io::Error::from(io::ErrorKind::InvalidData) } else { io::Error::last_os_error() };
    Err(ListenerError::Socket { action: "read the cookie (Linux 5.14)", source })
}
