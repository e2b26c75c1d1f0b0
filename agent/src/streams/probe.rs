//! What is decoded of bytes that are fed in pieces, for the properties in `tests/properties`.
//!
//! Only a door: nothing is decided here, and the product does not come through it.

use std::collections::BTreeMap;

use bytes::Bytes;
use weir_common::event::{Channel, Connection};

use super::{Agreed, Decoder, Direction, Event, Lack};

/// All that was decoded, whatever the pieces were.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Decoded {
    /// The bytes of each lane.
    pub lanes: BTreeMap<(Channel, Option<Connection>), Vec<u8>>,
    /// Gaps and changes of lanes, in their order within each direction.
    pub said: [Vec<String>; 2],
    /// Exit code of the process.
    pub exit_code: Option<i32>,
    /// What it lacks after the last piece.
    pub lacks: Option<Lack>,
}

/// Feeds pieces to a decoder and joins what comes out; panics where offsets do not follow one another.
pub fn decode<P: AsRef<[u8]>>(agreed: Agreed<'_>, pieces: &[(Direction, P)]) -> Decoded {
    let mut decoder = Decoder::new(agreed);
    let mut decoded = Decoded::default();
    for (direction, piece) in pieces {
        let piece = Bytes::copy_from_slice(piece.as_ref());
        take(&mut decoded, *direction, decoder.feed(*direction, &piece));
    }
    decoded.lacks = decoder.lacks();
    for direction in [Direction::ClientToServer, Direction::ServerToClient] {
        take(&mut decoded, direction, decoder.finish(direction));
    }
    decoded.exit_code = decoder.exit_code();
    decoded
}

fn take(decoded: &mut Decoded, direction: Direction, events: Vec<Event>) {
    for event in events {
        match event {
            Event::Data { lane, offset, parts } => {
                let from_client = direction == Direction::ClientToServer;
                assert_eq!(lane.channel.is_from_client(), from_client, "{lane:?} is written by its own side");
                let bytes = decoded.lanes.entry((lane.channel, lane.connection)).or_default();
                assert_eq!(bytes.len() as u64, offset, "bytes of {lane:?} follow one another");
                assert!(parts.iter().all(|part| !part.is_empty()), "no part is empty");
                bytes.extend(parts.concat());
            }
            Event::Changed(lane, change) => {
                decoded.said[direction.index()]
                    .push(format!("{:?} {:?} {change:?}", lane.channel, lane.connection));
            }
            Event::Copied(file) => decoded.said[direction.index()].push(format!("{file:?}")),
            Event::Forwarded(connection) => decoded.said[direction.index()].push(format!("{connection:?}")),
            Event::Gap(reason) => decoded.said[direction.index()].push(format!("{reason:?}")),
        }
    }
}
