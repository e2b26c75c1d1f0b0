//! The same ways over IPv6.

use std::{
    net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::sys::socket::{
    Backlog, MsgFlags, SockaddrStorage, bind, listen, sendto, setsockopt, sockopt::ReusePort,
};

use crate::{
    Outcome,
    packet::{INTERFACE, hardware_address, read, send_frame, socket, syn},
    sockets::{Place, through},
};

const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Everybody on the link: whose the address is need not be known.
const BROADCAST: [u8; 6] = [0xff; 6];

pub(crate) fn attempt(way: &str, target: SocketAddrV6, place: &Place) -> Outcome {
    place.enter()?;
    let to = SocketAddr::V6(target);
    match way {
        "raw" | "raw-protocol" => raw(way, target),
        "frame" => frame(target),
        "steal" => {
            let socket = socket(libc::AF_INET6, libc::SOCK_STREAM, 0)?;
            setsockopt(&socket, ReusePort, &true)?;
            bind(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
            listen(&socket, Backlog::new(8)?)?;
            Ok("stolen")
        }
        _ => {
            let kind = if way.starts_with("udp") { libc::SOCK_DGRAM } else { libc::SOCK_STREAM };
            let protocol = if way == "mptcp" { libc::IPPROTO_MPTCP } else { 0 };
            through(way, &socket(libc::AF_INET6, kind, protocol)?, to)
        }
    }
}

/// Sends a packet over a raw socket: the kernel writes its IP header, or we do.
fn raw(way: &str, target: SocketAddrV6) -> Outcome {
    // A raw socket's port is its protocol, and no other (raw(7)).
    let to = SockaddrStorage::from(SocketAddr::from((*target.ip(), 0)));
    let (protocol, bytes) = match way {
        "raw-protocol" => (libc::IPPROTO_TCP, segment(own_address(target)?, target)),
        _ => (libc::IPPROTO_RAW, ip(target)?),
    };
    let socket = socket(libc::AF_INET6, libc::SOCK_RAW, protocol)?;
    sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::empty())?;
    Ok("sent")
}

/// Sends a frame over a packet socket.
fn frame(target: SocketAddrV6) -> Outcome {
    let mut frame = BROADCAST.to_vec();
    frame.extend(hardware_address(&read(&format!("/sys/class/net/{INTERFACE}/address"))?)?);
    frame.extend(ETHERTYPE_IPV6.to_be_bytes());
    frame.extend(ip(target)?);
    send_frame(&frame, ETHERTYPE_IPV6)
}

fn ip(target: SocketAddrV6) -> nix::Result<Vec<u8>> {
    let own = own_address(target)?;
    let payload = segment(own, target);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([6, 64]);
    packet.extend(own.octets());
    packet.extend(target.ip().octets());
    packet.extend(payload);
    Ok(packet)
}

/// A TCP header that asks for a connection, with its checksum (RFC 8200, 8.1): connection tracking at a bridge would drop it
/// without.
fn segment(own: Ipv6Addr, target: SocketAddrV6) -> Vec<u8> {
    let mut header = syn(target.port());
    let covered = [&own.octets()[..], &target.ip().octets(), &[0, 0, 0, 20, 0, 0, 0, 6], &header].concat();
    let sum: u32 = covered.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    header[16..18].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    header
}

/// The address that this machine would send from.
fn own_address(target: SocketAddrV6) -> nix::Result<Ipv6Addr> {
    let socket = UdpSocket::bind("[::]:0").map_err(|_| nix::Error::ENETUNREACH)?;
    // Another port, or the hooks would answer.
    let elsewhere = SocketAddrV6::new(*target.ip(), 9, 0, 0);
    socket.connect(elsewhere).map_err(|_| nix::Error::ENETUNREACH)?;
    match socket.local_addr().map(|address| address.ip()) {
        Ok(std::net::IpAddr::V6(address)) => Ok(address),
        _ => Err(nix::Error::ENETUNREACH),
    }
}
