//! The far side: prints every packet from a /24 or /64 (but its first address, the gateway's) that an interface takes in, behind
//! what guards that interface's ports; or every packet to one address. `SOURCE DESTINATION PROTOCOL PORT` a line; port 0 where there is none (a fragment, a protocol without ports).
//! `lost` before the next such line, if packets came that there was no room for: then nothing is proven.

use std::{
    io::Write as _,
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    process::ExitCode,
};

use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

use crate::packet::socket;

/// `ETH_P_ALL`, linux/if_ether.h.
const ALL: u16 = 3;
/// Room for packets while this process waits for a processor.
const ROOM_BYTES: usize = 16 * 1024 * 1024;

/// Which packets are of interest.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Wanted {
    /// Those from this network.
    From,
    /// Those to this address.
    To,
}

pub(crate) fn run(interface: &str, address: &str, wanted: Wanted) -> ExitCode {
    match watch(interface, address, wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The IP packet in what a packet socket gives: the kernel takes the first VLAN tag off, a second one stands before.
fn untagged(bytes: &[u8]) -> Option<&[u8]> {
    let tagged = bytes.len() >= 4 && bytes[2..4] == [8, 0] && bytes[0] >> 4 != 4;
    let packet = if tagged { &bytes[4..] } else { bytes };
    (packet.len() >= 20).then_some(packet)
}

/// Source, destination, protocol and port of a packet.
fn parts(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, u16)> {
    let port = |protocol: u8, transport: usize| match packet.get(transport + 2..transport + 4) {
        Some(port) if matches!(protocol, 6 | 17 | 33 | 132) => u16::from_be_bytes([port[0], port[1]]),
        _ => 0,
    };
    match packet[0] >> 4 {
        4 => {
            let address =
                |at: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap_or_default());
            let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff;
            let port = if fragment == 0 { port(packet[9], usize::from(packet[0] & 0xf) * 4) } else { 0 };
            Some((address(12), address(16), packet[9], port))
        }
        6 if packet.len() >= 40 => {
            let address =
                |at: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap_or_default());
            Some((address(8), address(24), packet[6], port(packet[6], 40)))
        }
        _ => None,
    }
}

/// Whether an address is in the /24 or /64 of another one, and not the gateway's.
fn is_within(address: IpAddr, network: IpAddr) -> bool {
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            let (address, network) = (address.octets(), network.octets());
            address[..3] == network[..3] && address[3] != 1
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            let (address, network) = (address.segments(), network.segments());
            address[..4] == network[..4] && address[4..] != [0, 0, 0, 1]
        }
        _ => false,
    }
}

/// How many packets were lost since this was asked last (packet(7)).
fn lost(socket: &OwnedFd) -> nix::Result<u32> {
    let mut seen_and_lost = [0_u32; 2];
    let mut length = size_of_val(&seen_and_lost) as libc::socklen_t;
    // SAFETY: the option writes two numbers, and the buffer and its length say that there is room for them.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut seen_and_lost).cast(),
            &raw mut length,
        )
    };
    nix::Error::result(result).map(|_| seen_and_lost[1])
}

fn watch(interface: &str, address: &str, wanted: Wanted) -> nix::Result<()> {
    let wanted_address: IpAddr = address.parse().map_err(|_| nix::Error::EINVAL)?;
    let socket = socket(libc::AF_PACKET, libc::SOCK_DGRAM, i32::from(ALL.to_be()))?;
    let index = nix::net::if_::if_nametoindex(interface)?;
    let at = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ALL.to_be(),
        sll_ifindex: i32::try_from(index).map_err(|_| nix::Error::ENODEV)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is valid and its size is given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const at).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    nix::Error::result(bound)?;
    setsockopt(&socket, RcvBufForce, &ROOM_BYTES)?;
    let mut out = std::io::stdout();
    let _ = writeln!(out, "watching");
    let mut packet = [0; 2048];
    loop {
        let length = nix::unistd::read(&socket, &mut packet)?;
        // As a packet socket of this kind gives it: from the IP header on.
        let Some(packet) = packet.get(..length).and_then(untagged) else { continue };
        let Some((from, to, protocol, port)) = parts(packet) else { continue };
        let is_wanted = match wanted {
            Wanted::From => is_within(from, wanted_address),
            Wanted::To => to == wanted_address,
        };
        if !is_wanted {
            continue;
        }
        let lost = if lost(&socket)? == 0 { "" } else { "lost\n" };
        if writeln!(out, "{lost}{from} {to} {protocol} {port}").is_err() {
            return Ok(());
        }
    }
}
