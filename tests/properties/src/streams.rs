//! Properties of what is decoded of upgraded streams.

use weir_agent::streams::{
    Agreed, Direction,
    probe::{Decoded, decode},
};

/// Subresource, upgrade and subprotocol of each way to agree on.
const AGREED: [(&str, &str, &str); 12] = [
    ("exec", "SPDY/3.1", ""),
    ("portforward", "SPDY/3.1", ""),
    ("exec", "websocket", "v5.channel.k8s.io"),
    ("attach", "websocket", "v4.channel.k8s.io"),
    ("exec", "websocket", "channel.k8s.io"),
    ("exec", "websocket", "base64.channel.k8s.io"),
    ("exec", "websocket", "v4.base64.channel.k8s.io"),
    ("portforward", "websocket", "SPDY/3.1+portforward.k8s.io"),
    ("portforward", "websocket", "v4.channel.k8s.io"),
    ("log", "websocket", "binary.k8s.io"),
    ("log", "websocket", "base64.binary.k8s.io"),
    ("proxy", "websocket", "chat"),
];

/// However both directions are cut, the same comes out; nothing comes out that did not go in; the decoder never panics.
/// The first byte chooses what was agreed on. Pieces follow: a byte whose highest bit is set for the server's and whose
/// others are the high bits of the length, a byte with the low bits, and so many bytes or those that are left.
pub fn streams(bytes: &[u8]) {
    let Some((choice, mut rest)) = bytes.split_first() else { return };
    let (subresource, upgrade, subprotocol) = AGREED[usize::from(*choice) % AGREED.len()];
    let query = "ports=8080&ports=443";
    let agreed = Agreed { subresource, query, upgrade, subprotocol, ..Agreed::default() };
    let mut pieces: Vec<(Direction, &[u8])> = Vec::new();
    while let [high, low, following @ ..] = rest {
        let direction = if high & 0x80 == 0 { Direction::ClientToServer } else { Direction::ServerToClient };
        let length = usize::from(u16::from_be_bytes([high & 0x7f, *low])).min(following.len());
        let (piece, behind) = following.split_at(length);
        pieces.push((direction, piece));
        rest = behind;
    }
    let whole = decode(agreed, &pieces);
    let single = |(direction, piece): &(Direction, &[u8])| {
        piece.iter().map(|byte| (*direction, [*byte])).collect::<Vec<_>>()
    };
    let cut: Vec<(Direction, [u8; 1])> = pieces.iter().flat_map(single).collect();
    assert_eq!(decode(agreed, &cut), whole, "a cut at every byte changes what is decoded");
    let wire: usize = pieces.iter().map(|(_, piece)| piece.len()).sum();
    assert!(bytes_of(&whole) <= wire, "more comes out than went in");
    if subresource == "proxy" {
        assert_eq!(bytes_of(&whole), wire, "what is not decoded is all there");
    }
}

fn bytes_of(decoded: &Decoded) -> usize {
    decoded.lanes.values().map(Vec::len).sum()
}
