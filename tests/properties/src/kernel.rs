//! Properties of what the kernel programs read: packets.

use std::net::IpAddr;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use weir_common::packet::{Destination, PORT_UNKNOWN, destination, port};

/// What another parser takes for a TCP or UDP packet to some port goes there for the guards as well, or to a port that
/// they do not know, which counts for every port: no packet looks harmless to them and is not.
pub fn packet(bytes: &[u8]) {
    let ours = destination(&bytes);
    let found = match ours {
        Destination::Address { address, transport } => {
            let mut octets = [0; 16];
            for (to, word) in octets.chunks_exact_mut(4).zip(address) {
                to.copy_from_slice(&word.to_ne_bytes());
            }
            Some((IpAddr::from(octets).to_canonical(), port(&bytes, transport)))
        }
        Destination::Hidden => return,
        Destination::None => None,
    };
    let Ok(theirs) = LaxSlicedPacket::from_ip(bytes) else { return };
    let to: IpAddr = match &theirs.net {
        Some(LaxNetSlice::Ipv4(ip)) => ip.header().destination_addr().into(),
        Some(LaxNetSlice::Ipv6(ip)) => ip.header().destination_addr().into(),
        _ => return,
    };
    let to_port = match &theirs.transport {
        Some(TransportSlice::Tcp(tcp)) => tcp.destination_port(),
        Some(TransportSlice::Udp(udp)) => udp.destination_port(),
        _ => return,
    };
    let (address, port) = found.expect("a packet with ports goes somewhere");
    assert_eq!(address, to.to_canonical());
    assert!(
        port == Some(PORT_UNKNOWN) || port == Some(u32::from(to_port)),
        "{port:?} is not port {to_port} of the other parser"
    );
}
