//! The far side: prints every packet from a /24 (but its first address, the gateway's) that an interface takes in, behind
//! what guards that interface's ports. `SOURCE DESTINATION PROTOCOL PORT` a line; port 0 where there is none (a fragment, a protocol without ports).

use std::{io::Write as _, net::Ipv4Addr, os::fd::AsRawFd as _, process::ExitCode};

use crate::packet::socket;

/// `ETH_P_ALL`, linux/if_ether.h.
const ALL: u16 = 3;

pub(crate) fn run(interface: &str, network: &str) -> ExitCode {
    match watch(interface, network) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The IPv4 packet in what a packet socket gives: the kernel takes the first VLAN tag off, a second one stands before.
fn untagged(bytes: &[u8]) -> Option<&[u8]> {
    let tagged = bytes.len() >= 4 && bytes[2..4] == [8, 0] && bytes[0] >> 4 != 4;
    let packet = if tagged { &bytes[4..] } else { bytes };
    (packet.len() >= 20 && packet[0] >> 4 == 4).then_some(packet)
}

fn watch(interface: &str, network: &str) -> nix::Result<()> {
    let network: Ipv4Addr = network.parse().map_err(|_| nix::Error::EINVAL)?;
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
    let mut out = std::io::stdout();
    let _ = writeln!(out, "watching");
    let mut packet = [0; 2048];
    loop {
        let length = nix::unistd::read(&socket, &mut packet)?;
        // As a packet socket of this kind gives it: from the IP header on.
        let Some(packet) = packet.get(..length).and_then(untagged) else { continue };
        let from = &packet[12..16];
        if from[..3] != network.octets()[..3] || from[3] == 1 {
            continue;
        }
        let to = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
        let transport = usize::from(packet[0] & 0xf) * 4;
        let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff;
        let port = match packet.get(transport + 2..transport + 4) {
            Some(port) if fragment == 0 && matches!(packet[9], 6 | 17 | 33 | 132) => {
                u16::from_be_bytes([port[0], port[1]])
            }
            _ => 0,
        };
        let from = Ipv4Addr::new(from[0], from[1], from[2], from[3]);
        if writeln!(out, "{from} {to} {} {port}", packet[9]).is_err() {
            return Ok(());
        }
    }
}
