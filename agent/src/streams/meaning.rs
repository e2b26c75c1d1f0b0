//! What the bytes of lanes mean on top: files of archives in exec, connections of a port-forward.
//!
//! Looks on: what it does not understand it leaves alone, and the bytes come out just the same.

use std::collections::BTreeMap;

use weir_common::event::{Change, Channel, Connection, ConnectionForwarded, FileCopied};

use super::{
    Direction, Event, Lane, Reason,
    archive::{Archive, Found},
    greeting::Greeting,
};

/// Most connections of one port-forward that are counted at the same time; of more the first is told of early.
pub const CONNECTIONS_MAX: usize = 1024;

/// Most of them whose first bytes are kept at the same time.
const GREETINGS_MAX: usize = 64;

/// What is known of one stream.
#[derive(Debug, Default)]
pub(super) struct Meaning {
    /// By direction.
    archives: [Archive; 2],
    connections: BTreeMap<Connection, Forwarded>,
    /// Connections are announced: bytes of one that is over open no new one.
    announced: bool,
}

#[derive(Debug)]
struct Forwarded {
    /// By direction.
    bytes: [u64; 2],
    ended: [bool; 2],
    greeting: Greeting,
}

impl Meaning {
    /// Bytes of a lane.
    pub(super) fn data(&mut self, lane: Lane, bytes: &[u8], events: &mut Vec<Event>) {
        match (lane.channel, lane.connection) {
            (Channel::Stdin, _) => self.archive(Direction::ClientToServer, bytes, events),
            (Channel::Stdout, _) => self.archive(Direction::ServerToClient, bytes, events),
            (Channel::PortIn, Some(of)) => self.forwarded(Direction::ClientToServer, of, bytes, events),
            (Channel::PortOut, Some(of)) => self.forwarded(Direction::ServerToClient, of, bytes, events),
            _ => {}
        }
    }

    /// A lane begins or ends.
    pub(super) fn changed(&mut self, lane: Lane, change: Change, events: &mut Vec<Event>) {
        let (Channel::PortIn | Channel::PortOut, Some(of)) = (lane.channel, lane.connection) else { return };
        if change == Change::Opened {
            self.announced = true;
            self.open(of, events);
            return;
        }
        let Some(forwarded) = self.connections.get_mut(&of) else { return };
        forwarded.ended[usize::from(lane.channel == Channel::PortOut)] = true;
        if change == Change::Reset || forwarded.ended == [true; 2] {
            events.extend(self.connections.remove(&of).map(|forwarded| forwarded.told(of)));
        }
    }

    /// One direction is over.
    pub(super) fn finish(&mut self, direction: Direction, events: &mut Vec<Event>) {
        let found = self.archives[direction.index()].finish();
        events.extend(found.map(|found| told(direction, found)));
    }

    /// Whether connections are open that were announced.
    pub(super) fn has_open_connections(&self) -> bool {
        self.announced && !self.connections.is_empty()
    }

    /// Both are.
    pub(super) fn finish_both(&mut self, events: &mut Vec<Event>) {
        let connections = std::mem::take(&mut self.connections);
        events.extend(connections.into_iter().map(|(of, forwarded)| forwarded.told(of)));
    }

    fn archive(&mut self, direction: Direction, bytes: &[u8], events: &mut Vec<Event>) {
        let mut found = Vec::new();
        self.archives[direction.index()].feed(bytes, &mut found);
        events.extend(found.into_iter().map(|found| told(direction, found)));
    }

    fn forwarded(&mut self, direction: Direction, of: Connection, bytes: &[u8], events: &mut Vec<Event>) {
        if !self.announced {
            self.open(of, events);
        }
        let Some(forwarded) = self.connections.get_mut(&of) else { return };
        forwarded.bytes[direction.index()] += bytes.len() as u64;
        if direction == Direction::ClientToServer {
            forwarded.greeting.feed(bytes);
        }
    }

    fn open(&mut self, of: Connection, events: &mut Vec<Event>) {
        if self.connections.contains_key(&of) {
            return;
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            events.extend(self.connections.pop_first().map(|(of, forwarded)| forwarded.told(of)));
        }
        let read = self.connections.values().filter(|forwarded| forwarded.greeting.is_read()).count();
        let greeting = if read < GREETINGS_MAX { Greeting::expected() } else { Greeting::default() };
        self.connections.insert(of, Forwarded { bytes: [0; 2], ended: [false; 2], greeting });
    }
}

impl Forwarded {
    fn told(self, connection: Connection) -> Event {
        let [bytes_in, bytes_out] = self.bytes;
        let protocol = self.greeting.protocol.map(str::to_owned);
        let server_name = self.greeting.server_name;
        Event::Forwarded(ConnectionForwarded { connection, bytes_in, bytes_out, protocol, server_name })
    }
}

fn told(direction: Direction, found: Found) -> Event {
    let Found::Entry(entry) = found else { return Event::Gap(Reason::Archive) };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Event::Copied(FileCopied {
        channel: match direction {
            Direction::ClientToServer => Channel::Stdin,
            Direction::ServerToClient => Channel::Stdout,
        },
        path: text(&entry.path),
        bytes: entry.bytes,
        digest: entry.digest.map(|digest| format!("sha256:{}", hex::encode(digest))),
        link_target: entry.link.as_deref().map(text),
        passed_bytes: (entry.passed_bytes < entry.bytes).then_some(entry.passed_bytes),
    })
}
