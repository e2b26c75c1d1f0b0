//! The same ways over IPv6.

use std::{
    net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};

use crate::{
    Outcome,
    packet::{ETHERTYPE_VLAN, checksum, frame_socket, own_hardware_address, send_frame, socket, syn},
    sockets::{Place, steal, through},
};

const ETHERTYPE_IPV6: u16 = 0x86dd;
/// A fragment but the last has a multiple of eight bytes, and the first the whole TCP header, or it is dropped on the way
/// (RFC 7112).
const FIRST_BYTES: usize = 24;
/// Offset and flag of a later fragment of which no earlier one comes.
const LATER: u16 = 1480;
/// Headers by number, and one with a padding option alone that TCP follows.
const TCP: u8 = 6;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const NO_OPTIONS: [u8; 8] = [TCP, 0, 1, 4, 0, 0, 0, 0];
/// Everybody on the link: whose the address is need not be known.
const BROADCAST: [u8; 6] = [0xff; 6];

pub(crate) fn attempt(way: &str, target: SocketAddrV6, place: &Place) -> Outcome {
    place.enter()?;
    let to = SocketAddr::V6(target);
    match way {
        _ if way.starts_with("raw") => raw(way, target, place),
        _ if way.starts_with("frame") => frame(way, target, place),
        "steal" => steal(to),
        _ => {
            let kind = if way.starts_with("udp") { libc::SOCK_DGRAM } else { libc::SOCK_STREAM };
            let protocol = if way.starts_with("mptcp") { libc::IPPROTO_MPTCP } else { 0 };
            through(way, socket(libc::AF_INET6, kind, protocol)?, to, place)
        }
    }
}

/// Sends a packet over a raw socket: the kernel writes its IP header, or we do.
fn raw(way: &str, target: SocketAddrV6, place: &Place) -> Outcome {
    let (protocol, packets) = match way {
        "raw-protocol" => (libc::IPPROTO_TCP, vec![segment(own_address(target)?, target, &[])]),
        _ => (libc::IPPROTO_RAW, packets(way, target, place)?),
    };
    // A raw socket's port is its protocol, and no other (raw(7)).
    let next = if way.ends_with("routing") { station(place)? } else { *target.ip() };
    let to = SockaddrStorage::from(SocketAddr::from((next, 0)));
    let socket = socket(libc::AF_INET6, libc::SOCK_RAW, protocol)?;
    place.made();
    for bytes in packets {
        sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::empty())?;
    }
    Ok("sent")
}

/// Sends a packet over a packet socket, in as many frames as it has fragments.
fn frame(way: &str, target: SocketAddrV6, place: &Place) -> Outcome {
    let mut header = BROADCAST.to_vec();
    header.extend(own_hardware_address()?);
    if way == "frame-vlan" {
        header.extend(ETHERTYPE_VLAN.to_be_bytes());
        header.extend(1_u16.to_be_bytes());
    }
    header.extend(ETHERTYPE_IPV6.to_be_bytes());
    let packets = packets(way, target, place)?;
    let socket = frame_socket(ETHERTYPE_IPV6)?;
    place.made();
    for packet in packets {
        send_frame(&socket, &[&header[..], &packet].concat(), ETHERTYPE_IPV6)?;
    }
    Ok("sent")
}

/// A request for a connection, whole or in fragments, with what a way puts before it (RFC 8200, 4).
fn packets(way: &str, target: SocketAddrV6, place: &Place) -> nix::Result<Vec<Vec<u8>>> {
    let own = own_address(target)?;
    let plain = segment(own, target, &[]);
    // Next header, nothing, offset (in its upper 13 bits, in units of eight) and more to come, number.
    let part = |offset_and_more: u16, payload: &[u8]| {
        let mut bytes = vec![TCP, 0];
        bytes.extend(offset_and_more.to_be_bytes());
        bytes.extend(std::process::id().to_be_bytes());
        bytes.extend(payload);
        ip_packet(own, *target.ip(), FRAGMENT, &bytes)
    };
    let kind = way.split_once('-').map_or("", |(_, kind)| kind);
    Ok(match kind {
        "fragments" => {
            let segment = segment(own, target, &[0; 12]);
            let (first, rest) = segment.split_at(FIRST_BYTES);
            vec![part(1, first), part(FIRST_BYTES as u16, rest)]
        }
        "fragment" => vec![part(LATER, &plain)],
        "hop-by-hop" | "options" => {
            let header = if kind == "options" { DESTINATION_OPTIONS } else { HOP_BY_HOP };
            vec![ip_packet(own, *target.ip(), header, &[&NO_OPTIONS[..], &plain].concat())]
        }
        // The first station's address is the one that shows (type 0).
        "routing" => {
            let mut header = vec![TCP, 2, 0, 1, 0, 0, 0, 0];
            header.extend(target.ip().octets());
            header.extend(&plain);
            vec![ip_packet(own, station(place)?, ROUTING, &header)]
        }
        _ => vec![ip_packet(own, *target.ip(), TCP, &plain)],
    })
}

fn station(place: &Place) -> nix::Result<Ipv6Addr> {
    place.station.ok_or(nix::Error::EDESTADDRREQ)
}

fn ip_packet(own: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(own.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// A TCP header that asks for a connection, with its checksum (RFC 8200, 8.1): connection tracking at a bridge would drop it
/// without.
fn segment(own: Ipv6Addr, target: SocketAddrV6, data: &[u8]) -> Vec<u8> {
    let mut segment = syn(target.port());
    segment.extend(data);
    let length = (segment.len() as u32).to_be_bytes();
    let covered = [&own.octets()[..], &target.ip().octets(), &length, &[0, 0, 0, 6], &segment].concat();
    segment[16..18].copy_from_slice(&checksum(&covered).to_be_bytes());
    segment
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
