//! What is said on upgraded connections: exec, attach and port-forward, over WebSocket and SPDY/3.1. Sans-IO.
//!
//! A [`Decoder`] is fed the bytes of both directions as they pass, and yields what they mean as [`Event`]s. It never
//! fails and changes nothing: what it cannot decode comes out as raw bytes behind a [`Event::Gap`] that says why, and
//! the stream goes on. Every byte of a payload comes out in the piece that completes it; what a decoder keeps back is
//! part of a frame's head, a control frame or a base64 quantum, on which no server can act either.
//!
//! What is left out: framing (masks, lengths, pings, windows, names of streams). It has no meaning of its own.
//! Sources: RFC 6455; the SPDY/3.1 draft; `k8s.io/streaming/pkg/httpstream` and `k8s.io/cri-streaming`.

mod archive;
mod channels;
mod greeting;
mod header_block;
mod heartbeat;
#[cfg(test)]
mod lack_tests;
mod meaning;
mod output;
#[doc(hidden)]
pub mod probe;
mod spdy;
#[cfg(test)]
mod spdy_tests;
mod status;
#[cfg(test)]
mod tests;
mod websocket;

use bytes::Bytes;
use weir_common::event::{Change, Channel, Connection, ConnectionForwarded, FileCopied};

pub(crate) use self::heartbeat::{FrameEnds, Framing, answers, only_pings};
pub use self::meaning::CONNECTIONS_MAX;
use self::{
    channels::{Layout, Messages},
    meaning::Meaning,
    output::{Ledger, Output},
    spdy::Session,
    status::Status,
    websocket::{Frames, Part},
};

/// Most ports of one port-forward whose channels are told apart.
const PORTS_MAX: usize = 64;

/// Subprotocol of a WebSocket that carries SPDY.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the client.
    ClientToServer,
    /// From the API server.
    ServerToClient,
}

impl Direction {
    fn index(self) -> usize {
        usize::from(self == Self::ServerToClient)
    }

    /// The channel of bytes that are not decoded.
    fn raw(self) -> Channel {
        match self {
            Self::ClientToServer => Channel::ClientRaw,
            Self::ServerToClient => Channel::ServerRaw,
        }
    }
}

/// Where bytes belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lane {
    /// The channel.
    pub channel: Channel,
    /// Which of several, for what a port-forward carries.
    pub connection: Option<Connection>,
}

impl Lane {
    fn of(channel: Channel) -> Self {
        Self { channel, connection: None }
    }
}

/// What bytes meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a lane, in one or more parts that follow one another.
    Data {
        /// Where they belong.
        lane: Lane,
        /// Offset of the first one within the lane.
        offset: u64,
        /// The bytes; mostly slices of what was fed.
        parts: Vec<Bytes>,
    },
    /// A lane begins or ends.
    Changed(Lane, Change),
    /// A file or link of an archive is whole, or cut by the end of the stream.
    Copied(FileCopied),
    /// A connection of a port-forward is over.
    Forwarded(ConnectionForwarded),
    /// Something could not be decoded: it follows as raw bytes. Each reason comes once for each direction.
    Gap(Reason),
}

/// Why something is not decoded, or not surely as the server takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Neither a subprotocol nor a resource that is known.
    #[error("the protocol of this upgrade is not one that is decoded; all of it is recorded raw")]
    Protocol,
    /// `permessage-deflate` or another one, which Weir does not offer.
    #[error("the server took up a websocket extension that was not offered; all of it is recorded raw")]
    Extension,
    /// RFC 6455 forbids it.
    #[error("not a valid websocket frame; this and what follows in this direction is recorded raw")]
    Frame,
    /// API servers take each fragment for a message; RFC 6455 says otherwise.
    #[error(
        "a fragmented websocket message, joined here as RFC 6455 says; API servers take each fragment for a message \
         with a channel of its own, so its pieces may have reached other channels"
    )]
    Fragment,
    /// A channel that does not exist or is the other side's to write.
    #[error("a message for a channel that this side does not write; it is recorded raw")]
    Channel,
    /// Not base64.
    #[error("a message that is not valid base64; what is left of it is recorded raw")]
    Base64,
    /// The port that a port-forward's channel begins with is another one.
    #[error("a forwarded connection does not begin with its port; it is recorded with what it begins with")]
    Port,
    /// Not SPDY version 3, or a control frame of another length than its kind has.
    #[error("not a valid SPDY/3.1 frame; this and what follows in this direction is recorded raw")]
    SpdyFrame,
    /// A control frame of another type, or longer than [`spdy::CONTROL_BYTES_MAX`].
    #[error(
        "a SPDY control frame of an unknown type or length; this and what follows in this direction is recorded raw"
    )]
    SpdyControl,
    /// Headers that do not decompress within their bound.
    #[error("SPDY headers that cannot be read; this and what follows in this direction is recorded raw")]
    SpdyHeaders,
    /// A stream that was not opened, is the other side's to write or one of two for a channel.
    #[error("data of a SPDY stream whose meaning is not known; it is recorded raw")]
    SpdyStream,
    /// Sparse files, broken headers, long names without end.
    #[error(
        "a tar archive that cannot be followed from here on; its bytes are recorded, its files are not listed"
    )]
    Archive,
    /// Behind a WebSocket's close frame, SPDY's GOAWAY, or the end of a SPDY stream.
    #[error("what a side says behind its own end, which nobody reads; it is recorded raw")]
    Ended,
    /// The connection ended within a frame.
    #[error("the stream ended within a frame; its beginning is recorded raw")]
    Cut,
}

/// What a stream lacks, had it ended before it was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    /// The server has not said how the process ended.
    #[error("how the process ended was not said")]
    Status,
    /// Connections of a port-forward were neither ended nor broken off.
    #[error("forwarded connections were open")]
    Connections,
}

/// What an upgrade was agreed to be, as far as it decides the decoder.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreed<'a> {
    /// API group of the resource.
    pub api_group: &'a str,
    /// Subresource, for example `exec`.
    pub subresource: &'a str,
    /// Verb, for example `watch`.
    pub verb: &'a str,
    /// Query of the request.
    pub query: &'a str,
    /// `Upgrade` of the response.
    pub upgrade: &'a str,
    /// `Sec-WebSocket-Protocol` of the response.
    pub subprotocol: &'a str,
    /// `X-Stream-Protocol-Version` of the response: SPDY's subprotocol.
    pub spdy_protocol: &'a str,
    /// Whether the response has `Sec-WebSocket-Extensions`.
    pub extensions: bool,
}

/// Decodes both directions of one upgraded connection.
#[derive(Debug)]
pub struct Decoder {
    transport: Transport,
    ledgers: [Ledger; 2],
    status: Status,
    meaning: Meaning,
    finished: [bool; 2],
    /// What it lacks where it is cut.
    may_lack: Option<Lack>,
}

#[derive(Debug)]
enum Transport {
    Raw(Reason),
    Spdy(Box<Session>),
    Messages {
        frames: [Frames; 2],
        messages: Box<[Messages; 2]>,
    },
    /// SPDY in the messages of a WebSocket, whose borders mean nothing.
    Tunnel {
        frames: [Frames; 2],
        session: Box<Session>,
    },
}

impl Lack {
    /// What a stream may lack that is decoded as one of `agreed`. Connections over WebSocket's channels end with the stream alone.
    fn of(agreed: Agreed<'_>) -> Option<Self> {
        let is_spdy = agreed.upgrade.eq_ignore_ascii_case("SPDY/3.1");
        let protocol = if is_spdy { agreed.spdy_protocol } else { agreed.subprotocol };
        match agreed.subresource {
            // Before the fourth version only failures are said.
            "exec" | "attach" => {
                ["v4.", "v5."].iter().any(|version| protocol.starts_with(version)).then_some(Self::Status)
            }
            "portforward" if is_spdy || protocol == TUNNEL => Some(Self::Connections),
            _ => None,
        }
    }
}

impl Transport {
    fn of(agreed: Agreed<'_>) -> Self {
        let session = |forwards| Box::new(Session::new(forwards));
        let pod = agreed.api_group.is_empty();
        let process = pod && matches!(agreed.subresource, "exec" | "attach");
        let forward = pod && agreed.subresource == "portforward";
        if agreed.upgrade.eq_ignore_ascii_case("SPDY/3.1") {
            return if process || forward {
                Self::Spdy(session(forward))
            } else {
                Self::Raw(Reason::Protocol)
            };
        }
        if !agreed.upgrade.eq_ignore_ascii_case("websocket") {
            return Self::Raw(Reason::Protocol);
        }
        if agreed.extensions {
            return Self::Raw(Reason::Extension);
        }
        // A watch is one whatever the subprotocol: the API server agrees to any, and sends its events as they are.
        let is_watch = agreed.verb == "watch";
        let base64 = !is_watch && agreed.subprotocol.split('.').any(|part| part == "base64");
        let layout = match agreed.subprotocol {
            _ if is_watch => Layout::Body,
            TUNNEL if forward => {
                return Self::Tunnel { frames: Default::default(), session: session(true) };
            }
            "v5.channel.k8s.io" if process => Layout::Process { closes: true },
            ""
            | "channel.k8s.io"
            | "base64.channel.k8s.io"
            | "v4.channel.k8s.io"
            | "v4.base64.channel.k8s.io" => match (process, forward) {
                (true, _) => Layout::Process { closes: false },
                (_, true) => Layout::Forward { ports: ports(agreed.query) },
                _ if agreed.subprotocol.is_empty() && is_log(agreed) => Layout::Body,
                _ => return Self::Raw(Reason::Protocol),
            },
            "binary.k8s.io" | "base64.binary.k8s.io" if is_log(agreed) => Layout::Body,
            _ => return Self::Raw(Reason::Protocol),
        };
        let messages = |direction| Messages::new(direction, layout.clone(), base64);
        Self::Messages {
            frames: Default::default(),
            messages: Box::new([messages(Direction::ClientToServer), messages(Direction::ServerToClient)]),
        }
    }
}

/// Whether the API server sends a log as messages.
fn is_log(agreed: Agreed<'_>) -> bool {
    agreed.api_group.is_empty() && agreed.subresource == "log"
}

/// The ports of a port-forward over WebSocket channels: `ports=80&ports=443`, or `ports=80,443`.
fn ports(query: &str) -> Vec<u16> {
    let values = query.split('&').filter_map(|pair| pair.strip_prefix("ports="));
    let numbers = values.flat_map(|value| value.split(',').flat_map(|part| part.split("%2C")));
    numbers.map(|number| number.parse().unwrap_or_default()).take(PORTS_MAX).collect()
}

impl Decoder {
    /// A decoder for what both sides agreed on.
    pub fn new(agreed: Agreed<'_>) -> Self {
        Self {
            transport: Transport::of(agreed),
            ledgers: [Ledger::new(Direction::ClientToServer), Ledger::new(Direction::ServerToClient)],
            status: Status::default(),
            meaning: Meaning::default(),
            finished: [false; 2],
            may_lack: Lack::of(agreed),
        }
    }

    /// Takes the next bytes of one direction.
    pub fn feed(&mut self, direction: Direction, piece: &Bytes) -> Vec<Event> {
        let at = direction.index();
        let mut out = Output::new(&mut self.ledgers[at], &mut self.status, &mut self.meaning);
        match &mut self.transport {
            Transport::Raw(reason) => {
                out.gap(*reason);
                out.raw(piece.clone());
            }
            Transport::Spdy(session) => session.feed(direction, piece.clone(), &mut out),
            Transport::Messages { frames, messages } => {
                frames[at].feed(piece.clone(), &mut |part| messages[at].part(part, &mut out));
            }
            Transport::Tunnel { frames, session } => frames[at].feed(piece.clone(), &mut |part| match part {
                Part::Payload(bytes) => session.feed(direction, bytes, &mut out),
                Part::Invalid(bytes) => {
                    out.gap(Reason::Frame);
                    out.raw(bytes);
                }
                Part::Behind(bytes) => out.unheard(bytes),
                Part::End { .. } => {}
            }),
        }
        out.into_events()
    }

    /// One direction is over: what was kept of an unfinished frame comes out.
    pub fn finish(&mut self, direction: Direction) -> Vec<Event> {
        let at = direction.index();
        let mut out = Output::new(&mut self.ledgers[at], &mut self.status, &mut self.meaning);
        let rest = match &mut self.transport {
            Transport::Raw(_) => Vec::new(),
            Transport::Spdy(session) => session.take_rest(direction),
            Transport::Messages { frames, messages } => {
                [messages[at].take_rest(), frames[at].take_rest()].concat()
            }
            Transport::Tunnel { frames, session } => {
                [session.take_rest(direction), frames[at].take_rest()].concat()
            }
        };
        if !rest.is_empty() {
            out.gap(Reason::Cut);
            out.raw(rest.into());
        }
        let mut events = out.into_events();
        self.finished[at] = true;
        self.meaning.finish(direction, &mut events);
        if self.finished == [true; 2] {
            self.meaning.finish_both(&mut events);
        }
        events
    }

    /// Whether the server's messages are pieces of a response body.
    pub fn has_body(&self) -> bool {
        matches!(&self.transport, Transport::Messages { messages, .. } if messages[0].is_body())
    }

    /// What it lacks, had it ended now on both sides; none also where that cannot be known: API servers of old protocols say nothing of
    /// a process that succeeded, and what the server said may not be decoded (a gap tells that).
    pub fn lacks(&self) -> Option<Lack> {
        let raw = |direction: Direction| self.ledgers[direction.index()].has_raw();
        self.may_lack.filter(|lack| match lack {
            Lack::Status => !raw(Direction::ServerToClient) && !self.status.is_said(),
            Lack::Connections => {
                let any = raw(Direction::ServerToClient) || raw(Direction::ClientToServer);
                !any && self.meaning.has_open_connections()
            }
        })
    }

    /// Whether this side has said what could not be followed and the other may read.
    pub fn is_lost(&self, direction: Direction) -> bool {
        self.ledgers[direction.index()].is_lost()
    }

    /// Whether the client has said that it is about to go: by a close frame of WebSocket, or SPDY's GOAWAY.
    pub fn client_left(&self) -> bool {
        let client = Direction::ClientToServer.index();
        match &self.transport {
            Transport::Raw(_) => false,
            Transport::Spdy(session) => session.client_left(),
            Transport::Messages { frames, .. } => frames[client].has_closed(),
            Transport::Tunnel { frames, session } => frames[client].has_closed() || session.client_left(),
        }
    }

    /// Exit code of the process, if the server has said how it ended.
    pub fn exit_code(&self) -> Option<i32> {
        self.status.exit_code()
    }
}
