//! Where an IP packet goes, read from its first bytes: what the guards judge by.
//!
//! Sans-IO and without memory of its own: the kernel programs read from a socket buffer, tests and fuzzing from a
//! slice. A packet whose port cannot be told (a later fragment, a protocol without ports, a header that ends too
//! early) or does not count (a tunnel's, which wraps another packet) has port [`PORT_UNKNOWN`]: the guards take that for
//! any port. Only what cannot open a conversation with an API server is left out: ICMP other than echo requests, which
//! neighbour discovery and path MTU need.

/// Stands for every port: the packet does not say which.
pub const PORT_UNKNOWN: u32 = 0;

/// Most IPv6 extension headers that are passed over; behind more of them the port counts as unknown.
const EXTENSIONS_MAX: u32 = 8;

const TCP: u8 = 6;
const UDP: u8 = 17;
const DCCP: u8 = 33;
const SCTP: u8 = 132;
const UDP_LITE: u8 = 136;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;
/// Type of an echo request in ICMP.
const ECHO: u8 = 8;
/// Type of an echo request in ICMPv6.
const ECHO6: u8 = 128;
/// Extension headers (RFC 8200): hop-by-hop options, routing, fragment, authentication, destination options,
/// and those of RFC 7045's list that have the common length field.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

/// Bytes of a packet from its network header on.
pub trait Packet {
    /// `N` bytes at this offset; none if the packet ends before.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// `N` words of four bytes at this offset, as they are in memory; none if the packet ends before. Put together from
    /// single bytes, an address would cost the kernel programs more than looking it up.
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;
}

impl Packet for &[u8] {
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = usize::try_from(offset).ok()?;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }

    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let start = usize::try_from(offset).ok()?;
        let bytes = self.get(start..start.checked_add(N.checked_mul(4)?)?)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_ne_bytes(bytes.try_into().ok()?);
        }
        Some(words)
    }
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To this address; the port (host order) is found out by [`port`] only if the address is of interest.
    Address {
        /// An [`Address`](crate::kernel::Address) by its four words in memory.
        address: [u32; 4],
        /// Where to read on.
        transport: Transport,
    },
    /// The header may name only the next station of its way (IPv6 routing header, IPv4 options): it may go anywhere.
    Hidden,
    /// No IP packet, or none that could open a conversation.
    None,
}

/// The header behind the network header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    /// IP protocol number; 255 (reserved) where a fragment hides it.
    protocol: u8,
    /// Offset from the network header, bytes.
    offset: u32,
}

/// The third word of a v4-mapped address, in memory order.
const MAPPED: u32 = 0xffff_u32.to_be();

/// Protocol number that no packet can bear (reserved by IANA).
const RESERVED: u8 = 255;

/// The IPv4 option behind which there are none.
const END_OF_OPTIONS: u8 = 0;

/// IPv4 option that asks routers to look at a packet (RFC 2113).
const ROUTER_ALERT: u8 = 148;

/// UDP ports at which machines take packets out of a wrapping: VXLAN (4789; Linux' own 8472, of Flannel and Cilium; 4790 with
/// other payloads), Geneve, GUE, MPLS in UDP, Weave. What is inside is not read, so it counts for every port.
const TUNNELS: [u16; 7] = [4789, 8472, 4790, 6081, 6080, 6635, 6784];

/// Where a packet says that it comes from: an [`Address`](crate::kernel::Address) by its four words in memory.
#[inline(always)]
pub fn source(packet: &impl Packet) -> Option<[u32; 4]> {
    match packet.bytes::<1>(0)?[0] >> 4 {
        4 => packet.words::<1>(12).map(|[address]| [0, 0, MAPPED, address]),
        6 => packet.words::<4>(8),
        _ => None,
    }
}

/// Reads the network header.
#[inline(always)]
pub fn destination(packet: &impl Packet) -> Destination {
    // As much as the shorter of the two has, at once: each read of a socket buffer costs a call.
    let Some(header) = packet.words::<5>(0) else { return Destination::None };
    match header[0].to_ne_bytes()[0] >> 4 {
        4 => destination4(packet, header),
        6 => destination6::<false>(packet, header[1].to_ne_bytes()[2]),
        _ => Destination::None,
    }
}

#[inline(always)]
fn destination4(packet: &impl Packet, header: [u32; 5]) -> Destination {
    let words = header[0].to_ne_bytes()[0] & 0xf;
    if words > 5 && !is_harmless(packet.bytes::<1>(20), words) {
        return Destination::Hidden;
    }
    Destination::Address { address: [0, 0, MAPPED, header[4]], transport: transport4(header) }
}

#[inline(always)]
fn transport4(header: [u32; 5]) -> Transport {
    // Version and length, service, total length; id, fragment; time to live, protocol, checksum; source; destination.
    let [first, _, _, _] = header[0].to_ne_bytes();
    let [_, _, high, low] = header[1].to_ne_bytes();
    let [_, protocol, _, _] = header[2].to_ne_bytes();
    let fragment_offset = u16::from_be_bytes([high, low]) & 0x1fff;
    Transport {
        protocol: if fragment_offset == 0 { protocol } else { RESERVED },
        offset: u32::from(first & 0xf) * 4,
    }
}

/// Whether options that begin so, in a header of so many words, name no other machine that the packet goes to, as a source route does (RFC
/// 791 §3.1): there are none, or the one by which members of groups have routers look.
#[inline(always)]
fn is_harmless(first_option: Option<[u8; 1]>, words: u8) -> bool {
    match first_option {
        Some([END_OF_OPTIONS]) => true,
        Some([ROUTER_ALERT]) => words == 6,
        _ => false,
    }
}

/// `ARRIVES`: it is at its destination, whichever way that was.
#[inline(always)]
fn destination6<const ARRIVES: bool>(packet: &impl Packet, mut next: u8) -> Destination {
    // Version, class and label, payload length, next header, hop limit, source, destination.
    let Some(address) = packet.words::<4>(24) else { return Destination::None };
    let mut offset = 40;
    for _ in 0..EXTENSIONS_MAX {
        let length = match next {
            HOP_BY_HOP | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6 | AUTHENTICATION | FRAGMENT => 4,
            ROUTING if ARRIVES => 4,
            ROUTING => return Destination::Hidden,
            _ => 0,
        };
        if length == 0 {
            return Destination::Address { address, transport: Transport { protocol: next, offset } };
        }
        let Some(header) = packet.bytes::<4>(offset) else { break };
        if next == FRAGMENT && u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 {
            break;
        }
        offset += match next {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(header[1]) + 2) * 4,
            _ => (u32::from(header[1]) + 1) * 8,
        };
        next = header[0];
    }
    Destination::Address { address, transport: Transport { protocol: RESERVED, offset } }
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Offset from the network header, bytes.
    pub offset: u32,
    /// Whether it is a part of a stream (TCP), and no datagram (UDP).
    pub stream: bool,
}

/// What a whole packet from this port of a UDP or TCP server carries; none of any other packet.
#[inline(always)]
pub fn payload_from(packet: &impl Packet, port: u16) -> Option<Payload> {
    let header = packet.words::<5>(0)?;
    let transport = match header[0].to_ne_bytes()[0] >> 4 {
        4 => transport4(header),
        6 => match destination6::<true>(packet, header[1].to_ne_bytes()[2]) {
            Destination::Address { transport, .. } => transport,
            _ => return None,
        },
        _ => return None,
    };
    let stream = transport.protocol == TCP;
    if !stream && transport.protocol != UDP {
        return None;
    }
    if u16::from_be_bytes(packet.bytes::<2>(transport.offset)?) != port {
        return None;
    }
    let length = if stream { u32::from(packet.bytes::<1>(transport.offset + 12)?[0] >> 4) * 4 } else { 8 };
    Some(Payload { offset: transport.offset + length, stream })
}

/// The port of a packet, host order; [`PORT_UNKNOWN`] if it does not say; none if it is of a kind that cannot open a
/// conversation.
#[inline(always)]
pub fn port(packet: &impl Packet, transport: Transport) -> Option<u32> {
    match transport.protocol {
        TCP | UDP | UDP_LITE | SCTP | DCCP => match packet.bytes::<2>(transport.offset + 2) {
            Some(port) => {
                let port = u16::from_be_bytes(port);
                let wraps = transport.protocol == UDP && TUNNELS.contains(&port);
                Some(if wraps { PORT_UNKNOWN } else { u32::from(port) })
            }
            None => Some(PORT_UNKNOWN),
        },
        ICMP | ICMP6 => {
            let echo = if transport.protocol == ICMP { ECHO } else { ECHO6 };
            match packet.bytes::<1>(transport.offset) {
                Some([kind]) if kind != echo => None,
                _ => Some(PORT_UNKNOWN),
            }
        }
        _ => Some(PORT_UNKNOWN),
    }
}

#[cfg(test)]
mod tests {
    use super::{Destination, PORT_UNKNOWN, Packet as _, Payload, destination, payload_from, port, source};

    const MAPPED: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1];
    const ADDRESS6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

    fn packet4(protocol: u8, fragment: u16, options: usize, transport: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20 + options];
        packet[0] = 0x40 | u8::try_from((20 + options) / 4).expect("a length");
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = protocol;
        packet[16..20].copy_from_slice(&[192, 0, 2, 1]);
        packet.extend_from_slice(transport);
        packet
    }

    fn packet6(next: u8, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet[6] = next;
        packet[24..40].copy_from_slice(&ADDRESS6);
        packet.extend_from_slice(rest);
        packet
    }

    #[test]
    fn the_source_of_either_family_is_read_and_none_from_a_header_that_ends_early() {
        let mut packet = packet4(17, 0, 0, &[]);
        packet[12..16].copy_from_slice(&[192, 0, 2, 9]);
        let words = |address: [u8; 16]| {
            let mut words = [0; 4];
            for (word, bytes) in words.iter_mut().zip(address.chunks_exact(4)) {
                *word = u32::from_ne_bytes(bytes.try_into().expect("four bytes"));
            }
            words
        };
        let mut expected = MAPPED;
        expected[15] = 9;
        assert_eq!(source(&&packet[..]), Some(words(expected)));
        assert_eq!(source(&&packet[..15]), None);
        let mut packet = packet6(17, &[]);
        packet[8..24].copy_from_slice(&ADDRESS6);
        assert_eq!(source(&&packet[..]), Some(words(ADDRESS6)));
        assert_eq!(source(&&packet[..23]), None);
        assert_eq!(source(&&[0x50; 40][..]), None, "no version of IP");
    }

    /// The address, and the port if the packet could open a conversation.
    fn read(packet: &[u8]) -> Option<([u8; 16], Option<u32>)> {
        match destination(&packet) {
            Destination::Address { address, transport } => {
                let mut bytes = [0; 16];
                for (to, word) in bytes.chunks_exact_mut(4).zip(address) {
                    to.copy_from_slice(&word.to_ne_bytes());
                }
                Some((bytes, port(&packet, transport)))
            }
            Destination::Hidden | Destination::None => None,
        }
    }

    /// Source port 1, destination port 443.
    const PORTS: [u8; 4] = [0, 1, 1, 187];

    /// They have arrived, and are read by whoever they are for.
    #[test]
    fn answers_are_read_behind_whatever_options_and_ways_they_have() {
        let answer = [&53_u16.to_be_bytes()[..], &[0x30, 0x39, 0, 9, 0, 0, 7]].concat();
        let mut packet = packet4(17, 0, 4, &answer);
        packet[20..24].copy_from_slice(&[1, 1, 1, 0]);
        assert_eq!(destination(&&packet[..]), Destination::Hidden);
        assert_eq!(payload_from(&&packet[..], 53), Some(Payload { offset: 32, stream: false }));
        let routed = [&[17, 0, 9, 0, 0, 0, 0, 0][..], &answer].concat();
        let packet = packet6(43, &routed);
        assert_eq!(destination(&&packet[..]), Destination::Hidden);
        assert_eq!(payload_from(&&packet[..], 53), Some(Payload { offset: 56, stream: false }));
        assert_eq!(payload_from(&&packet[..], 54), None);
    }

    #[test]
    fn options_that_may_lead_elsewhere_hide_where_a_packet_goes() {
        let with = |options: &[u8]| {
            let mut packet = packet4(6, 0, options.len(), &PORTS);
            packet[20..20 + options.len()].copy_from_slice(options);
            destination(&&packet[..])
        };
        for hides in [
            &[131, 7, 4, 10, 0, 0, 1, 0][..],
            &[1, 137, 7, 4, 10, 0, 0, 1],
            &[148, 4, 0, 0, 131, 7, 4, 10, 0, 0, 1, 0],
            &[7, 4, 0, 0],
        ] {
            assert_eq!(with(hides), Destination::Hidden, "{hides:?}");
        }
        for plain in [&[148, 4, 0, 0][..], &[0, 0, 0, 0]] {
            assert!(matches!(with(plain), Destination::Address { .. }), "{plain:?}");
        }
        // Cut short.
        let mut packet = packet4(6, 0, 0, &[]);
        packet[0] = 0x46;
        assert_eq!(destination(&&packet[..]), Destination::Hidden);
    }

    #[test]
    fn every_protocol_with_ports_is_read_behind_options_as_well() {
        for protocol in [6, 17, 33, 132, 136] {
            for options in [0, 4, 40] {
                assert_eq!(read(&packet4(protocol, 0, options, &PORTS)), Some((MAPPED, Some(443))));
            }
            assert_eq!(read(&packet6(protocol, &PORTS)), Some((ADDRESS6, Some(443))));
        }
    }

    #[test]
    fn what_does_not_say_its_port_counts_for_every_port() {
        let unknown = Some((MAPPED, Some(PORT_UNKNOWN)));
        assert_eq!(read(&packet4(6, 0x2001, 0, &PORTS)), unknown, "a later fragment");
        assert_eq!(read(&packet4(1, 1, 0, &[0; 8])), unknown, "a later fragment, of whatever it is");
        assert_eq!(read(&packet4(6, 0x2000, 0, &PORTS)), Some((MAPPED, Some(443))), "the first fragment");
        assert_eq!(read(&packet4(6, 0, 0, &PORTS[..3])), unknown, "too short");
        for protocol in [4, 41, 47, 50, 255] {
            assert_eq!(read(&packet4(protocol, 0, 0, &PORTS)), unknown, "{protocol}");
        }
        let fragment = [6, 0, 0, 8, 0, 0, 0, 0, 0, 1, 1, 187];
        assert_eq!(read(&packet6(44, &fragment)), Some((ADDRESS6, Some(PORT_UNKNOWN))));
    }

    #[test]
    fn what_wraps_another_packet_counts_for_every_port() {
        let to = |port: u16| [&[0, 1][..], &port.to_be_bytes()].concat();
        for port in [4789, 8472, 6081] {
            assert_eq!(read(&packet4(17, 0, 0, &to(port))), Some((MAPPED, Some(PORT_UNKNOWN))), "{port}");
            assert_eq!(read(&packet6(17, &to(port))), Some((ADDRESS6, Some(PORT_UNKNOWN))), "{port}");
            assert_eq!(
                read(&packet4(6, 0, 0, &to(port))),
                Some((MAPPED, Some(u32::from(port)))),
                "TCP {port}"
            );
        }
    }

    #[test]
    fn an_echo_request_counts_and_other_icmp_does_not() {
        assert_eq!(read(&packet4(1, 0, 0, &[8, 0])), Some((MAPPED, Some(PORT_UNKNOWN))));
        assert_eq!(read(&packet4(1, 0, 0, &[3, 4])), Some((MAPPED, None)), "fragmentation needed");
        assert_eq!(read(&packet6(58, &[128, 0])), Some((ADDRESS6, Some(PORT_UNKNOWN))));
        assert_eq!(read(&packet6(58, &[135, 0])), Some((ADDRESS6, None)), "neighbour solicitation");
    }

    #[test]
    fn extension_headers_hide_neither_port_nor_protocol() {
        let hop_by_hop = [60, 0, 0, 0, 0, 0, 0, 0];
        let options = [51, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let authentication = [44, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let first_fragment = [6, 0, 0, 1, 0, 0, 0, 0];
        let rest = [&hop_by_hop[..], &options, &authentication, &first_fragment, &PORTS].concat();
        assert_eq!(read(&packet6(0, &rest)), Some((ADDRESS6, Some(443))));
        let endless = [[60, 0, 0, 0, 0, 0, 0, 0]; 12].concat();
        assert_eq!(read(&packet6(60, &endless)), Some((ADDRESS6, Some(PORT_UNKNOWN))));
    }

    #[test]
    fn a_routing_header_hides_where_it_goes() {
        let rest = [6, 2, 0, 1, 0, 0, 0, 0];
        assert_eq!(destination(&&packet6(43, &rest)[..]), Destination::Hidden);
        let behind = [&[43, 0, 0, 0, 0, 0, 0, 0][..], &rest].concat();
        assert_eq!(destination(&&packet6(60, &behind)[..]), Destination::Hidden);
    }

    #[test]
    fn what_is_no_whole_ip_header_goes_nowhere() {
        for bytes in [&[][..], &[0x45; 19], &[0x60; 39], &[0x55; 60]] {
            assert_eq!(destination(&bytes), Destination::None);
        }
        assert_eq!((&[1_u8, 2][..]).bytes::<2>(1), None);
        assert_eq!((&[1_u8, 2][..]).bytes::<2>(u32::MAX), None);
        assert_eq!((&[1_u8, 2, 3, 4][..]).words::<1>(0), Some([u32::from_ne_bytes([1, 2, 3, 4])]));
        assert_eq!((&[1_u8, 2, 3, 4][..]).words::<1>(1), None);
        assert_eq!((&[1_u8, 2, 3, 4][..]).words::<1>(u32::MAX), None);
    }
}
