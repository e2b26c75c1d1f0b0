//! Properties of what the kernel programs read: packets, and the answers of name servers in them.

use std::net::IpAddr;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use hickory_resolver::proto::{
    op::{Message, MessageType},
    rr::{Name, RData},
};
use weir_common::{
    answer::{ADDRESSES_MAX, NAMES_MAX, Outcome, Reading, name_hash},
    packet::{Destination, PORT_UNKNOWN, destination, payload_from, port},
};

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

/// What another parser takes for an answer that names a host, by its question or as the owner of a record, is none that passes unnoted
/// where that host is configured: every address in it is noted, or nobody has it. Where it is not configured, what is whole
/// passes.
pub fn told(bytes: &[u8]) {
    let Some(payload) = payload_from(&bytes, 53) else { return };
    let Some(carried) = bytes.get(payload.offset as usize..).filter(|carried| !carried.is_empty()) else {
        return;
    };
    let mut reading = Box::new(Reading::new());
    // Whatever the bytes are.
    for stream in [false, true] {
        reading.read(carried, stream, |_| true);
        assert!(reading.told as usize <= ADDRESSES_MAX && reading.named as usize <= NAMES_MAX);
    }
    let Ok(message) = Message::from_vec(carried) else { return };
    if message.metadata.message_type != MessageType::Response {
        return;
    }
    let sections = [&message.answers, &message.authorities, &message.additionals];
    let records = || sections.into_iter().flatten();
    let named = message.queries.iter().map(|query| query.name()).chain(records().map(|record| &record.name));
    let addresses: Vec<IpAddr> = records()
        .filter_map(|record| match &record.data {
            RData::A(address) => Some(IpAddr::V4(address.0)),
            RData::AAAA(address) => Some(IpAddr::V6(address.0)),
            _ => None,
        })
        .filter(|ip| {
            !(ip.is_unspecified() || ip.to_canonical().is_loopback() || ip.to_canonical().is_multicast())
        })
        .filter(|ip| !ip.to_canonical().is_unspecified())
        .collect();
    for name in named.filter(|name| is_plain(name)) {
        let hash = name_hash(&name.to_ascii());
        let outcome = reading.read(carried, false, |one| one == hash);
        let noted: Vec<IpAddr> = reading.addresses[..reading.told as usize]
            .iter()
            .map(|address| IpAddr::from(*address).to_canonical())
            .collect();
        match outcome {
            Outcome::Refuse => {}
            Outcome::Pass => assert!(addresses.is_empty(), "{name} passes with {addresses:?}"),
            Outcome::Told => {
                let missing = addresses.iter().find(|address| !noted.contains(&address.to_canonical()));
                assert_eq!(missing, None, "is told for {name} and not noted");
            }
        }
    }
}

/// Whether it can be a host's: what the configuration takes.
fn is_plain(name: &Name) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-' || *byte == b'_';
    name.num_labels() > 0 && name.iter().all(|label| label.iter().all(plain))
}
