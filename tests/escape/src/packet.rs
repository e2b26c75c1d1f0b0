//! Ways past the protocols: raw IP packets, and frames from a packet socket.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};

use crate::{Outcome, sockets::Place};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_VLAN: u16 = 0x8100;
/// The pod's interface, as every CNI names it.
pub(crate) const INTERFACE: &str = "eth0";

/// Sends a packet over a raw socket.
pub(crate) fn raw(way: &str, target: SocketAddrV4, place: &Place) -> Outcome {
    place.enter()?;
    let to = SockaddrStorage::from(SocketAddr::V4(target));
    let (protocol, bytes) = match way {
        "raw-protocol" => (libc::IPPROTO_TCP, syn(target.port())),
        "raw-fragment" => (libc::IPPROTO_RAW, ip(target, Ipv4Addr::UNSPECIFIED, 6, 185)),
        "raw-gre" => (libc::IPPROTO_RAW, ip(target, Ipv4Addr::UNSPECIFIED, 47, 0)),
        _ => (libc::IPPROTO_RAW, ip(target, Ipv4Addr::UNSPECIFIED, 6, 0)),
    };
    let socket = socket(libc::AF_INET, libc::SOCK_RAW, protocol)?;
    sendto(socket.as_raw_fd(), &bytes, &to, MsgFlags::empty())?;
    Ok("sent")
}

/// Sends a frame over a packet socket.
pub(crate) fn frame(way: &str, target: SocketAddrV4) -> Outcome {
    let own = own_address()?;
    let mut frame = Vec::new();
    frame.extend(gateway_hardware_address()?);
    frame.extend(hardware_address(&read(&format!("/sys/class/net/{INTERFACE}/address"))?)?);
    let tags = match way {
        "frame-vlan" => 1,
        "frame-double-vlan" => 2,
        _ => 0,
    };
    for _ in 0..tags {
        frame.extend(ETHERTYPE_VLAN.to_be_bytes());
        frame.extend(1_u16.to_be_bytes());
    }
    frame.extend(ETHERTYPE_IPV4.to_be_bytes());
    frame.extend(ip(target, own, 6, if way == "frame-fragment" { 185 } else { 0 }));
    send_frame(&frame, ETHERTYPE_IPV4)
}

/// Sends a frame over the pod's interface.
pub(crate) fn send_frame(frame: &[u8], protocol: u16) -> Outcome {
    let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol.to_be()))?;
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
    if sent < 0 { Err(nix::Error::last()) } else { Ok("sent") }
}

pub(crate) fn socket(family: i32, kind: i32, protocol: i32) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers only; the descriptor is new and ours.
    unsafe { Ok(OwnedFd::from_raw_fd(nix::Error::result(libc::socket(family, kind, protocol))?)) }
}

/// A TCP header that asks for a connection; its checksum is left open, since no answer is wanted.
pub(crate) fn syn(port: u16) -> Vec<u8> {
    let mut header = vec![0; 20];
    header[0..2].copy_from_slice(&40_000_u16.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[12] = 0x50;
    header[13] = 2;
    header
}

fn ip(target: SocketAddrV4, source: Ipv4Addr, protocol: u8, fragment: u16) -> Vec<u8> {
    let payload = syn(target.port());
    let mut packet = vec![0; 20];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    packet[6..8].copy_from_slice(&fragment.to_be_bytes());
    packet[8] = 64;
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&target.ip().octets());
    let sum = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    packet.extend(payload);
    packet
}

pub(crate) fn read(path: &str) -> nix::Result<String> {
    fs::read_to_string(path).map_err(|_| nix::Error::ENOENT)
}

pub(crate) fn hardware_address(text: &str) -> nix::Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> =
        text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.filter(|bytes| bytes.len() == 6).ok_or(nix::Error::ENODEV)
}

/// The address that this machine would send from.
fn own_address() -> nix::Result<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|_| nix::Error::ENETUNREACH)?;
    socket.connect("192.0.2.1:9").map_err(|_| nix::Error::ENETUNREACH)?;
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
        let _ = socket.send_to(b"x", "192.0.2.1:9");
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
