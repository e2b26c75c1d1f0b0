//! SPDY/3.1, as Kubernetes uses it: the client opens streams whose headers say what they are for.
//!
//! Data comes out as it comes in. Both directions share the table of streams: a server writes to streams that the
//! client has opened. Stream ids go up by two at least, so one that does not opens nothing.
//!
//! A control frame of another length than its kind has is read by servers (`github.com/moby/spdystream`) as nobody should rely on: they take
//! some for as long as their kind says, some as their length does. All that follows it is raw, so that nothing is taken for a frame that the
//! server takes for something else. What a side says of a stream that it has ended, as clients do whose one thread ends what another one still
//! writes to, no server reads.

use std::collections::BTreeMap;

use bytes::Bytes;
use weir_common::event::{Change, Channel, Connection};

use super::{
    Direction, Lane, Reason,
    header_block::{HeaderBlocks, headers},
    output::Output,
};

/// Most bytes of a control frame that is read; header blocks are compressed and far shorter.
pub(super) const CONTROL_BYTES_MAX: usize = 64 * 1024;

/// Most streams that are kept, those that have ended too while there is room: a peer may still write to them.
const STREAMS_MAX: usize = 1024;

/// Most bytes of a request id, which joins the two streams of a forwarded connection.
const REQUEST_ID_BYTES_MAX: usize = 64;

/// Largest id of a stream: servers take one with the bit above for another one, which they refuse.
const STREAM_MAX: u32 = 0x7fff_ffff;

const HEAD_BYTES: usize = 8;
const VERSION: u16 = 3;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// One connection.
#[derive(Debug)]
pub(super) struct Session {
    /// A port-forward; else exec or attach.
    forwards: bool,
    sides: [Side; 2],
    streams: BTreeMap<u32, Stream>,
    /// Bytes so far of the channels of exec and attach that streams were opened for.
    counts: BTreeMap<Channel, u64>,
}

/// What one side sends.
#[derive(Debug, Default)]
struct Side {
    /// Head of the frame, until its bytes are known to belong somewhere.
    head: Vec<u8>,
    state: State,
    headers: HeaderBlocks,
    /// Least id of the next stream that it may open, if it has opened any.
    next_stream: u32,
    /// It has said that it goes: what it says of streams afterwards nobody reads.
    gone: bool,
}

/// Where in a frame a side is.
#[derive(Debug, Default)]
enum State {
    #[default]
    Head,
    Data {
        stream: u32,
        fin: bool,
        remaining: usize,
    },
    Control {
        kind: u16,
        flags: u8,
        remaining: usize,
        payload: Vec<u8>,
    },
    /// No frames any more.
    Invalid,
}

#[derive(Debug)]
struct Stream {
    role: Option<Role>,
    /// Joins the streams of a connection.
    request: Vec<u8>,
    /// By direction: bytes so far, of a forwarded connection.
    counts: [u64; 2],
    /// By direction: nothing more is to come, as far as is told.
    ended: [bool; 2],
    /// By direction: its own side has said so. What was on its way when the other one broke it off still is part of it.
    closed: [bool; 2],
    /// It and another one are of one connection.
    paired: bool,
}

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Process(Channel),
    Data(Connection),
    Error(Connection),
}

impl Role {
    /// Where bytes of one direction belong.
    fn lane(self, direction: Direction) -> Option<Lane> {
        let from_client = direction == Direction::ClientToServer;
        let (channel, connection) = match self {
            Self::Process(channel) => (channel, None),
            Self::Data(connection) if from_client => (Channel::PortIn, Some(connection)),
            Self::Data(connection) => (Channel::PortOut, Some(connection)),
            Self::Error(connection) => (Channel::PortError, Some(connection)),
        };
        (channel.is_from_client() == from_client).then_some(Lane { channel, connection })
    }
}

impl Session {
    pub(super) fn new(forwards: bool) -> Self {
        Self { forwards, sides: Default::default(), streams: BTreeMap::new(), counts: BTreeMap::new() }
    }

    /// Whether the client has said that it is about to go.
    pub(super) fn client_left(&self) -> bool {
        self.sides[Direction::ClientToServer.index()].gone
    }

    /// Takes the next bytes of one direction.
    pub(super) fn feed(&mut self, direction: Direction, mut input: Bytes, out: &mut Output<'_>) {
        while !input.is_empty() {
            let side = &mut self.sides[direction.index()];
            match &mut side.state {
                State::Head => {
                    let length = (HEAD_BYTES - side.head.len()).min(input.len());
                    side.head.extend_from_slice(&input.split_to(length));
                    if side.head.len() == HEAD_BYTES {
                        side.begin(out);
                    }
                }
                State::Data { stream, remaining, .. } => {
                    let bytes = take(&mut input, remaining);
                    let open = self.streams.get_mut(stream);
                    let has_ended = open.as_ref().is_some_and(|stream| stream.closed[direction.index()]);
                    let lane = open.as_ref().and_then(|stream| stream.role?.lane(direction));
                    match (open, lane) {
                        _ if side.gone || has_ended => {
                            out.unheard(std::mem::take(&mut side.head).into());
                            out.unheard(bytes);
                        }
                        (Some(stream), Some(lane)) => {
                            side.head.clear();
                            let count = match lane.connection {
                                Some(_) => &mut stream.counts[direction.index()],
                                None => self.counts.entry(lane.channel).or_default(),
                            };
                            out.data(lane, count, bytes);
                        }
                        _ => {
                            out.gap(Reason::SpdyStream);
                            out.raw(std::mem::take(&mut side.head).into());
                            out.raw(bytes);
                        }
                    }
                }
                State::Control { kind, remaining, payload, .. } => {
                    payload.extend_from_slice(&take(&mut input, remaining));
                    if *kind == SETTINGS && !is_settings(payload, *remaining) {
                        side.give_up(Reason::SpdyFrame, out);
                    }
                }
                State::Invalid => {
                    out.raw(input);
                    return;
                }
            }
            self.end(direction, out);
        }
    }

    /// What was kept of a frame that is not whole.
    pub(super) fn take_rest(&mut self, direction: Direction) -> Vec<u8> {
        let side = &mut self.sides[direction.index()];
        let mut rest = std::mem::take(&mut side.head);
        if let State::Control { payload, .. } = std::mem::take(&mut side.state) {
            rest.extend(payload);
        }
        rest
    }

    /// Acts on a frame that has no bytes left.
    fn end(&mut self, direction: Direction, out: &mut Output<'_>) {
        let side = &mut self.sides[direction.index()];
        match &mut side.state {
            State::Data { stream, fin, remaining: 0 } => {
                let (stream, fin) = (*stream, *fin);
                side.state = State::Head;
                side.head.clear();
                if fin {
                    self.fin(direction, stream, out);
                }
            }
            State::Control { kind, flags, remaining: 0, payload } => {
                let (kind, flags, payload) = (*kind, *flags, std::mem::take(payload));
                side.state = State::Head;
                self.control(direction, kind, flags, payload, out);
                self.sides[direction.index()].head.clear();
            }
            _ => {}
        }
    }

    fn control(
        &mut self,
        direction: Direction,
        kind: u16,
        flags: u8,
        payload: Vec<u8>,
        out: &mut Output<'_>,
    ) {
        let side = &mut self.sides[direction.index()];
        side.gone |= kind == GOAWAY;
        let stream = payload.first_chunk::<4>().map(|id| u32::from_be_bytes(*id));
        let (Some(id), true) = (stream, matches!(kind, SYN_STREAM | SYN_REPLY | RST_STREAM | HEADERS)) else {
            return;
        };
        if kind == RST_STREAM {
            return self.reset(direction, id, out);
        }
        let compressed = payload.get(if kind == SYN_STREAM { 10 } else { 4 }..).unwrap_or_default();
        let block = side.headers.next(compressed);
        let Some(headers) = block.as_deref().and_then(headers) else {
            side.state = State::Control { kind, flags, remaining: 0, payload };
            return side.give_up(Reason::SpdyHeaders, out);
        };
        if kind == SYN_STREAM {
            if id == 0 || id < side.next_stream || id > STREAM_MAX || side.gone {
                return out.gap(Reason::SpdyStream);
            }
            side.next_stream = id + 2;
            self.open(direction, id, &headers, out);
        }
        if flags & FIN != 0 {
            self.fin(direction, id, out);
        }
    }

    fn open(&mut self, direction: Direction, id: u32, headers: &[(&[u8], &[u8])], out: &mut Output<'_>) {
        let header = |wanted: &[u8]| {
            let found = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
            found.map(|(_, value)| *value).unwrap_or_default()
        };
        let (kind, request) = (header(b"streamtype"), header(b"requestid"));
        let request = request[..request.len().min(REQUEST_ID_BYTES_MAX)].to_vec();
        // No server of Kubernetes opens streams.
        let role = if direction == Direction::ServerToClient {
            None
        } else if self.forwards {
            let port = std::str::from_utf8(header(b"port")).ok().and_then(|port| port.parse().ok());
            self.forwarded(id, kind, port.unwrap_or_default(), &request)
        } else {
            process(kind).and_then(|channel| self.only(channel)).map(Role::Process)
        };
        match role {
            None => out.gap(Reason::SpdyStream),
            Some(Role::Data(_)) => {
                if let Some(lane) = role.and_then(|role| role.lane(Direction::ClientToServer)) {
                    out.changed(lane, Change::Opened);
                }
            }
            Some(_) => {}
        }
        self.make_room();
        let paired = matches!(role, Some(Role::Data(of) | Role::Error(of)) if of.id != id);
        let stream = Stream { role, request, counts: [0; 2], ended: [false; 2], closed: [false; 2], paired };
        self.streams.insert(id, stream);
    }

    /// This channel, for a stream that is opened for it; none if there was one before: which of them a server reads depends on when it has
    /// seen how many, so that neither is that channel's from now on.
    fn only(&mut self, channel: Channel) -> Option<Channel> {
        if self.counts.contains_key(&channel) {
            let same = self.streams.values_mut().filter(|stream| stream.role == Some(Role::Process(channel)));
            same.for_each(|stream| stream.role = None);
            return None;
        }
        self.counts.insert(channel, 0);
        Some(channel)
    }

    /// The role of a port-forward's stream. A connection has two of them with the same request id, and the number of
    /// the first one; a client without request ids opens the data stream right behind the error stream.
    fn forwarded(&mut self, id: u32, kind: &[u8], port: u16, request: &[u8]) -> Option<Role> {
        let partner = |stream: &&mut Stream| match (kind, stream.role) {
            (b"data", Some(Role::Error(of))) | (b"error", Some(Role::Data(of))) => {
                !stream.paired && stream.request == request && of.port == port
            }
            _ => false,
        };
        let connection = match self.streams.values_mut().rev().find(partner) {
            Some(Stream { role: Some(Role::Data(of) | Role::Error(of)), paired, .. }) => {
                *paired = true;
                *of
            }
            _ => Connection { port, id },
        };
        match kind {
            b"data" => Some(Role::Data(connection)),
            b"error" => Some(Role::Error(connection)),
            _ => None,
        }
    }

    /// Forgets the oldest stream that has ended, or else the oldest.
    fn make_room(&mut self) {
        if self.streams.len() >= STREAMS_MAX {
            let ended = self.streams.iter().find(|(_, stream)| stream.ended == [true; 2]);
            if let Some(id) = ended.or_else(|| self.streams.iter().next()).map(|(id, _)| *id) {
                self.streams.remove(&id);
            }
        }
    }

    fn fin(&mut self, direction: Direction, id: u32, out: &mut Output<'_>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.closed[direction.index()] = true;
        if !std::mem::replace(&mut stream.ended[direction.index()], true)
            && let Some(lane) = stream.role.and_then(|role| role.lane(direction))
        {
            out.changed(lane, Change::Ended);
        }
    }

    fn reset(&mut self, direction: Direction, id: u32, out: &mut Output<'_>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let other = match direction {
            Direction::ClientToServer => Direction::ServerToClient,
            Direction::ServerToClient => Direction::ClientToServer,
        };
        let was_open = std::mem::replace(&mut stream.ended, [true; 2]) != [true; 2];
        stream.closed[direction.index()] = true;
        if was_open
            && let Some(role) = stream.role
            && let Some(lane) = role.lane(direction).or_else(|| role.lane(other))
        {
            out.changed(lane, Change::Reset);
        }
    }
}

impl Side {
    /// Begins the frame whose head is there.
    fn begin(&mut self, out: &mut Output<'_>) {
        let Some([a, b, c, d, flags, length @ ..]) = self.head.first_chunk::<HEAD_BYTES>().copied() else {
            return;
        };
        let remaining = length.iter().fold(0, |number: usize, byte| number << 8 | usize::from(*byte));
        if a & 0x80 == 0 {
            let stream = u32::from_be_bytes([a, b, c, d]);
            self.state = State::Data { stream, fin: flags & FIN != 0, remaining };
            return;
        }
        let kind = u16::from_be_bytes([c, d]);
        let may_be_as_long = match kind {
            PING => remaining == 4,
            RST_STREAM | GOAWAY | WINDOW_UPDATE => remaining == 8,
            SYN_STREAM => remaining >= 10,
            SYN_REPLY | HEADERS | SETTINGS => remaining >= 4,
            _ => true,
        };
        if u16::from_be_bytes([a & 0x7f, b]) != VERSION || !may_be_as_long {
            return self.give_up(Reason::SpdyFrame, out);
        }
        let known = matches!(
            kind,
            SYN_STREAM | SYN_REPLY | RST_STREAM | SETTINGS | PING | GOAWAY | HEADERS | WINDOW_UPDATE
        );
        if !known || remaining > CONTROL_BYTES_MAX {
            return self.give_up(Reason::SpdyControl, out);
        }
        self.state = State::Control { kind, flags, remaining, payload: Vec::new() };
    }

    /// Takes the frame that has begun, and all that follows, for bytes.
    fn give_up(&mut self, reason: Reason, out: &mut Output<'_>) {
        out.gap(reason);
        out.raw(std::mem::take(&mut self.head).into());
        if let State::Control { payload, .. } = std::mem::replace(&mut self.state, State::Invalid) {
            out.raw(payload.into());
        }
    }
}

/// Whether SETTINGS are as many as they say, once that is there.
fn is_settings(payload: &[u8], remaining: usize) -> bool {
    let Some(count) = payload.first_chunk() else { return true };
    u64::from(u32::from_be_bytes(*count)) * 8 + 4 == (payload.len() + remaining) as u64
}

/// The next bytes of a frame.
fn take(input: &mut Bytes, remaining: &mut usize) -> Bytes {
    let length = input.len().min(*remaining);
    *remaining -= length;
    input.split_to(length)
}

/// `k8s.io/api/core/v1`: the `streamType` header.
fn process(kind: &[u8]) -> Option<Channel> {
    Some(match kind {
        b"stdin" => Channel::Stdin,
        b"stdout" => Channel::Stdout,
        b"stderr" => Channel::Stderr,
        b"error" => Channel::Status,
        b"resize" => Channel::Resize,
        _ => return None,
    })
}
