//! Sockets that are used again: connected, taken back by a connect to `AF_UNSPEC` (connect(2)), and connected anew; and
//! addresses that do not say their family, or another one than their socket has.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockaddrStorage, connect, sendto},
};

use crate::{
    Outcome,
    sockets::{Place, connect_timed, non_blocking},
};

/// A port that is no API server's and no kubelet's.
const DISCARD: u16 = 9;

/// Streams: what is connected at the end.
pub(crate) fn stream(way: &str, socket: OwnedFd, to: SocketAddr, place: &Place) -> Outcome {
    let address = SockaddrStorage::from(to);
    let failed = |_| Errno::EADDRINUSE;
    match way {
        // First to a server of our own, then away from it.
        "unspec" => {
            let own = server(to)?;
            let own = own.local_addr().map_err(failed)?;
            connect(socket.as_raw_fd(), &SockaddrStorage::from(at_home(own)))?;
            disconnect(socket.as_raw_fd())?;
            connect_timed(&socket, &address)?;
        }
        // Twice to the same.
        "unspec-after" => {
            connect_timed(&socket, &address)?;
            disconnect(socket.as_raw_fd())?;
            connect_timed(&socket, &address)?;
        }
        // While the first is still on its way.
        "unspec-pending" => {
            nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
            match connect(socket.as_raw_fd(), &address) {
                Ok(()) | Err(Errno::EINPROGRESS) => {}
                Err(errno) => return Err(errno),
            }
            disconnect(socket.as_raw_fd())?;
            non_blocking(&socket, &address)?;
        }
        // One that a server of our own has accepted: no call has made it.
        _ => {
            let own = server(to)?;
            let client = TcpStream::connect(at_home(own.local_addr().map_err(failed)?)).map_err(failed)?;
            let accepted = OwnedFd::from(own.accept().map_err(failed)?.0);
            drop(client);
            disconnect(accepted.as_raw_fd())?;
            connect_timed(&accepted, &address)?;
            return place.connected(accepted.into());
        }
    }
    place.connected(socket.into())
}

/// Datagrams.
pub(crate) fn datagram(way: &str, socket: &OwnedFd, to: SocketAddr) -> Outcome {
    let (fd, address) = (socket.as_raw_fd(), SockaddrStorage::from(to));
    if way != "udp-unspec-address" {
        // To another port, which is nobody's business.
        connect(fd, &SockaddrStorage::from(SocketAddr::new(to.ip(), DISCARD)))?;
    }
    match (way, to) {
        ("udp-unspec", _) => {
            disconnect(fd)?;
            connect(fd, &address)?;
            nix::unistd::write(socket, b"x")?;
        }
        ("udp-unspec-sendto", _) => {
            disconnect(fd)?;
            sendto(fd, b"x", &address, MsgFlags::empty())?;
        }
        ("udp-unspec-address", SocketAddr::V4(to)) => send_without_family(fd, to)?,
        // Connected to one, and sent to another.
        _ => {
            sendto(fd, b"x", &address, MsgFlags::empty())?;
        }
    }
    Ok("sent")
}

/// An IPv6 socket of datagrams takes IPv4 addresses as they are.
pub(crate) fn other_family(way: &str, socket: &OwnedFd, to: SocketAddrV4) -> Outcome {
    let (fd, address) = (socket.as_raw_fd(), SockaddrStorage::from(SocketAddr::V4(to)));
    if way == "udp6-connect4" {
        connect(fd, &address)?;
        nix::unistd::write(socket, b"x")?;
    } else {
        sendto(fd, b"x", &address, MsgFlags::empty())?;
    }
    Ok("sent")
}

/// Every address of this machine, of the family of another address.
fn anywhere(like: SocketAddr) -> SocketAddr {
    if like.is_ipv6() { (Ipv6Addr::UNSPECIFIED, 0).into() } else { (Ipv4Addr::UNSPECIFIED, 0).into() }
}

/// The loopback address with the same port.
fn at_home(server: SocketAddr) -> SocketAddr {
    let port = server.port();
    if server.is_ipv6() { (Ipv6Addr::LOCALHOST, port).into() } else { (Ipv4Addr::LOCALHOST, port).into() }
}

/// Not bound to one address: what it accepts would keep that.
fn server(like: SocketAddr) -> nix::Result<TcpListener> {
    TcpListener::bind(anywhere(like)).map_err(|_| Errno::EADDRINUSE)
}

/// Sends to an IPv4 address of the family `AF_UNSPEC`, which the kernel takes for one of IPv4.
fn send_without_family(fd: RawFd, to: SocketAddrV4) -> nix::Result<()> {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_UNSPEC as libc::sa_family_t,
        sin_port: to.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(to.ip().octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: buffer and address are valid, their sizes are given, and the call keeps no pointer.
    let sent = unsafe {
        libc::sendto(
            fd,
            b"x".as_ptr().cast(),
            1,
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_in>() as libc::socklen_t,
        )
    };
    Errno::result(sent).map(drop)
}

/// Connects to `AF_UNSPEC`.
fn disconnect(fd: RawFd) -> nix::Result<()> {
    let unspecified = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: the address is valid and its size is given.
    let result =
        unsafe { libc::connect(fd, &raw const unspecified, size_of::<libc::sockaddr>() as libc::socklen_t) };
    Errno::result(result).map(drop)
}
