//! Ways past the protocols: raw IP packets, and frames from a packet socket.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::socket::{MsgFlags, SockaddrStorage, connect, sendto},
};

use crate::{
    Outcome,
    sockets::{ENDED, Place},
};

const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_VLAN: u16 = 0x8100;
/// Flags and offset of a later fragment, of an earlier one, and bytes of the first fragment: a multiple of eight.
const LATER: u16 = 185;
const MORE: u16 = 0x2000;
const FIRST_BYTES: usize = 24;
/// Between two frames of many, and how many are sent after the end of the input.
const BETWEEN_FRAMES_MS: u16 = 1;
const LAST_FRAMES: u32 = 5;
/// Where machines take VXLAN packets, and the number of the network that the test makes.
const VXLAN_PORT: u16 = 4789;
const VXLAN_NETWORK: u8 = 42;
/// The pod's interface, as every CNI names it.
pub(crate) const INTERFACE: &str = "eth0";

/// Sends a packet over a raw socket.
pub(crate) fn raw(way: &str, target: SocketAddrV4, place: &Place) -> Outcome {
    place.enter()?;
    let to = SockaddrStorage::from(SocketAddr::V4(target));
    let own = own_address()?;
    let (protocol, bytes) = match way {
        "raw-protocol" | "raw-connected" => (libc::IPPROTO_TCP, segment(own, target, &[])),
        "raw-fragment" => (libc::IPPROTO_RAW, ip(target, own, 6, LATER)),
        "raw-gre" => (libc::IPPROTO_RAW, ip(target, own, 47, 0)),
        _ => (libc::IPPROTO_RAW, ip(target, own, 6, 0)),
    };
    let socket = socket(libc::AF_INET, libc::SOCK_RAW, protocol)?;
    place.leave()?;
    place.made();
    if way == "raw-connected" {
        connect(socket.as_raw_fd(), &to)?;
        nix::unistd::write(&socket, &bytes)?;
    } else {
        sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::empty())?;
    }
    Ok("sent")
}

/// Sends a frame, or the two of a packet in fragments, over a packet socket.
pub(crate) fn frame(way: &str, target: SocketAddrV4, place: &Place) -> Outcome {
    place.enter()?;
    let own = own_address()?;
    let mut header = gateway_hardware_address()?;
    header.extend(own_hardware_address()?);
    let tags = match way {
        "frame-vlan" => 1,
        "frame-double-vlan" => 2,
        _ => 0,
    };
    for _ in 0..tags {
        header.extend(ETHERTYPE_VLAN.to_be_bytes());
        header.extend(1_u16.to_be_bytes());
    }
    header.extend(ETHERTYPE_IPV4.to_be_bytes());
    let packets = match way {
        "frame-fragment" => vec![ip(target, own, 6, LATER)],
        "frame-fragments" => {
            let segment = segment(own, target, &[0; 12]);
            let (first, rest) = segment.split_at(FIRST_BYTES);
            let part = |field, payload: &[u8]| ip_packet(*target.ip(), own, (6, field), payload);
            vec![part(MORE, first), part(FIRST_BYTES as u16 / 8, rest)]
        }
        "frame-vxlan" => {
            let via = place.via.ok_or(nix::Error::EDESTADDRREQ)?;
            let inner = vxlan(target, own);
            let mut datagram = Vec::new();
            for number in [VXLAN_PORT, VXLAN_PORT, (8 + inner.len()) as u16, 0] {
                datagram.extend(number.to_be_bytes());
            }
            datagram.extend(inner);
            vec![ip_packet(via, own, (17, 0), &datagram)]
        }
        _ => vec![ip(target, own, 6, 0)],
    };
    let socket = frame_socket(ETHERTYPE_IPV4)?;
    place.made();
    for packet in packets {
        send_frame(&socket, &[&header[..], &packet].concat(), ETHERTYPE_IPV4)?;
    }
    Ok("sent")
}

/// Sends one frame after the other until its input ends, and then a few more that say they are from another address; says how many those were.
#[expect(clippy::print_stdout, reason = "the count is what was asked for")]
pub(crate) fn frames(target: SocketAddrV4, last_from: Ipv4Addr, place: &Place) -> Outcome {
    place.enter()?;
    let from = place.from.map_or_else(own_address, Ok)?;
    let mut header = gateway_hardware_address()?;
    header.extend(own_hardware_address()?);
    header.extend(ETHERTYPE_IPV4.to_be_bytes());
    let [frame, last_frame] = [from, last_from].map(|from| [&header[..], &ip(target, from, 6, 0)].concat());
    let socket = frame_socket(ETHERTYPE_IPV4)?;
    let input = std::io::stdin();
    let mut is_over = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    let mut sent = LAST_FRAMES;
    while poll(&mut is_over, BETWEEN_FRAMES_MS)? == 0 {
        send_frame(&socket, &frame, ETHERTYPE_IPV4)?;
        sent += 1;
    }
    for _ in 0..LAST_FRAMES {
        send_frame(&socket, &last_frame, ETHERTYPE_IPV4)?;
    }
    println!("{sent}");
    Ok(ENDED)
}

/// Sends a packet inside a datagram, as a machine of an overlay network does to another one.
pub(crate) fn wrapped(target: SocketAddrV4, place: &Place) -> Outcome {
    place.enter()?;
    let via = place.via.ok_or(nix::Error::EDESTADDRREQ)?;
    let failed = |error: std::io::Error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    let inner = vxlan(target, place.from.map_or_else(own_address, Ok)?);
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(failed)?;
    socket.send_to(&inner, (via, VXLAN_PORT)).map_err(failed)?;
    Ok("sent")
}

/// A frame to everybody in a VXLAN header (RFC 7348, 5).
fn vxlan(target: SocketAddrV4, own: Ipv4Addr) -> Vec<u8> {
    let mut bytes = vec![8, 0, 0, 0, 0, 0, VXLAN_NETWORK, 0];
    bytes.extend([0xff; 6]);
    bytes.extend([2, 0, 0, 0, 0, 1]);
    bytes.extend(ETHERTYPE_IPV4.to_be_bytes());
    bytes.extend(ip(target, own, 6, 0));
    bytes
}

/// For frames of a kind.
pub(crate) fn frame_socket(protocol: u16) -> nix::Result<OwnedFd> {
    socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol.to_be()))
}

/// Sends a frame over the pod's interface.
pub(crate) fn send_frame(socket: &OwnedFd, frame: &[u8], protocol: u16) -> nix::Result<()> {
    let index = nix::net::if_::if_nametoindex(INTERFACE)?;
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: i32::try_from(index).map_err(|_| nix::Error::ENODEV)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    // SAFETY: buffer and address are valid, their sizes are given, and the call keeps no pointer.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    nix::Error::result(sent).map(drop)
}

pub(crate) fn socket(family: i32, kind: i32, protocol: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers only; the descriptor is new and ours.
    unsafe { Ok(OwnedFd::from_raw_fd(nix::Error::result(libc::socket(family, kind, protocol))?)) }
}

/// A TCP header that asks for a connection; its checksum is left open.
pub(crate) fn syn(port: u16) -> Vec<u8> {
    let mut header = vec![0; 20];
    header[0..2].copy_from_slice(&40_000_u16.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[12] = 0x50;
    header[13] = 2;
    header
}

pub(crate) fn ip(target: SocketAddrV4, source: Ipv4Addr, protocol: u8, fragment: u16) -> Vec<u8> {
    ip_packet(*target.ip(), source, (protocol, fragment), &segment(source, target, &[]))
}

/// A request for a connection with its checksum, which who translates addresses on the way wants to be right.
fn segment(source: Ipv4Addr, target: SocketAddrV4, data: &[u8]) -> Vec<u8> {
    let mut segment = syn(target.port());
    segment.extend(data);
    let length = (segment.len() as u16).to_be_bytes();
    let covered =
        [&source.octets()[..], &target.ip().octets(), &[0, 6, length[0], length[1]], &segment].concat();
    segment[16..18].copy_from_slice(&checksum(&covered).to_be_bytes());
    segment
}

/// Of the internet protocols (RFC 1071), over an even number of bytes.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// An IPv4 packet; `fragment` is the field of flags and offset.
fn ip_packet(to: Ipv4Addr, source: Ipv4Addr, (protocol, fragment): (u8, u16), payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 20];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    // By its number the fragments of a packet are known: that of the process serves.
    packet[4..6].copy_from_slice(&(std::process::id() as u16).to_be_bytes());
    packet[6..8].copy_from_slice(&fragment.to_be_bytes());
    packet[8] = 64;
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn read(path: &str) -> nix::Result<String> {
    fs::read_to_string(path).map_err(|_| nix::Error::ENOENT)
}

/// That of the pod's interface. Not read from `/sys`, which shows the network namespace that it was mounted in.
pub(crate) fn own_hardware_address() -> nix::Result<Vec<u8>> {
    let own = |interface: &nix::ifaddrs::InterfaceAddress| interface.interface_name == INTERFACE;
    let address = |interface: nix::ifaddrs::InterfaceAddress| interface.address?.as_link_addr()?.addr();
    let found = nix::ifaddrs::getifaddrs()?.filter(own).find_map(address);
    found.map(Vec::from).ok_or(nix::Error::ENODEV)
}

fn hardware_address(text: &str) -> nix::Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> =
        text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.filter(|bytes| bytes.len() == 6).ok_or(nix::Error::ENODEV)
}

/// The address that this machine would send from.
fn own_address() -> nix::Result<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|_| nix::Error::ENETUNREACH)?;
    socket.connect("198.51.100.1:9").map_err(|_| nix::Error::ENETUNREACH)?;
    match socket.local_addr().map(|address| address.ip()) {
        Ok(std::net::IpAddr::V4(address)) => Ok(address),
        _ => Err(nix::Error::ENETUNREACH),
    }
}

/// The gateway's, which the kernel knows once something was sent to it.
fn gateway_hardware_address() -> nix::Result<Vec<u8>> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|_| nix::Error::ENETUNREACH)?;
    let deadline = std::time::Instant::now() + crate::TIMEOUT;
    loop {
        let _ = socket.send_to(b"x", "198.51.100.1:9");
        // IP address, type, flags, hardware address, …
        for line in read("/proc/net/arp")?.lines().skip(1) {
            let address = line.split_whitespace().nth(3).unwrap_or_default();
            if address != "00:00:00:00:00:00" {
                return hardware_address(address);
            }
        }
        if std::time::Instant::now() > deadline {
            return Err(nix::Error::EHOSTUNREACH);
        }
    }
}
