//! Kubernetes' channels in WebSocket messages: the first byte of a message names its channel.
//!
//! `v5.channel.k8s.io` adds channel 255, which closes another one. In the base64 variants the channel is a digit and
//! the rest of the message base64. A port-forward has two channels for each port, and the server begins both with the
//! port (`k8s.io/cri-streaming/pkg/streaming/portforward/websocket.go`).

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use weir_common::event::{Change, Channel, Connection};

use super::{Direction, Lane, Reason, output::Output, websocket::Part};

/// As Go's `base64.StdEncoding` decodes: padded, and the bits behind the last byte are whatever they are.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical)
        .with_decode_allow_trailing_bits(true),
);

/// `v5.channel.k8s.io`: the next byte names a channel that ends.
const CLOSE: u8 = 255;

/// Characters that are decoded together.
const QUANTUM_BYTES: usize = 4;

/// Bytes of a port, in front of a forwarded connection.
const PORT_BYTES: usize = 2;

/// Which channels there are.
#[derive(Clone, Debug)]
pub(super) enum Layout {
    /// Those of exec and attach; with `closes` also [`CLOSE`].
    Process { closes: bool },
    /// Those of a port-forward: data and error for each port.
    Forward { ports: Vec<u16> },
    /// None: messages are pieces of a response body.
    Body,
}

/// Where a message goes.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// Not known before its first byte.
    Unknown,
    Lane {
        lane: Lane,
        channel: u8,
    },
    /// What follows are channels; with `raw`, what of them is none follows in the raw bytes.
    Close {
        raw: bool,
    },
    Raw,
}

/// Reads the messages of one direction.
#[derive(Debug)]
pub(super) struct Messages {
    direction: Direction,
    layout: Layout,
    base64: bool,
    target: Target,
    /// Begin of a base64 quantum.
    quantum: Vec<u8>,
    /// A quantum with padding was there: none may follow.
    padded: bool,
    /// By channel: bytes so far.
    counts: [u64; 256],
    /// By channel: what is left of the port that the server begins with.
    ports_left: Vec<Vec<u8>>,
    /// By channel: it was closed.
    ended: [bool; 256],
}

impl Messages {
    pub(super) fn new(direction: Direction, layout: Layout, base64: bool) -> Self {
        let ports_left = match (&layout, direction) {
            (Layout::Forward { ports }, Direction::ServerToClient) => ports
                .iter()
                .flat_map(|port| [port.to_le_bytes().to_vec(), port.to_le_bytes().to_vec()])
                .collect(),
            _ => Vec::new(),
        };
        Self {
            direction,
            layout,
            base64,
            target: Target::Unknown,
            quantum: Vec::new(),
            padded: false,
            counts: [0; 256],
            ports_left,
            ended: [false; 256],
        }
    }

    /// Whether messages are pieces of a response body.
    pub(super) fn is_body(&self) -> bool {
        matches!(self.layout, Layout::Body)
    }

    /// Takes the next part.
    pub(super) fn part(&mut self, part: Part, out: &mut Output<'_>) {
        match part {
            Part::Payload(bytes) => self.payload(bytes, out),
            Part::End { last: true } => self.end(out),
            Part::End { last: false } => {
                if self.direction == Direction::ClientToServer {
                    out.gap(Reason::Fragment);
                }
            }
            Part::Behind(bytes) => out.unheard(bytes),
            Part::Invalid(bytes) => {
                out.gap(Reason::Frame);
                out.raw(bytes);
            }
        }
    }

    /// What was kept of a quantum that is not whole.
    pub(super) fn take_rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.quantum)
    }

    fn payload(&mut self, mut bytes: Bytes, out: &mut Output<'_>) {
        if let (Target::Unknown, Some(first)) = (self.target, bytes.first().copied()) {
            self.target = self.target(first);
            match self.target {
                Target::Raw => out.gap(Reason::Channel),
                Target::Lane { .. } if self.is_body() => {}
                _ => drop(bytes.split_to(1)),
            }
        }
        match self.target {
            Target::Unknown => {}
            Target::Raw => out.raw(bytes),
            Target::Close { raw } => self.close(raw, &bytes, out),
            Target::Lane { lane, channel } if self.base64 => self.decode(lane, channel, &bytes, out),
            Target::Lane { lane, channel } => self.data(lane, channel, bytes, out),
        }
    }

    fn target(&self, first: u8) -> Target {
        let channel = match self.base64 {
            _ if self.is_body() => 0,
            true => first.wrapping_sub(b'0'),
            false => first,
        };
        let lane = match &self.layout {
            Layout::Body => Some(Lane::of(Channel::ResponseBody)),
            Layout::Process { closes: true } if first == CLOSE => return Target::Close { raw: false },
            Layout::Process { .. } => process(channel),
            Layout::Forward { ports } => ports.get(usize::from(channel / 2)).map(|port| {
                let channel_of = match (channel % 2, self.direction) {
                    (0, Direction::ClientToServer) => Channel::PortIn,
                    (0, Direction::ServerToClient) => Channel::PortOut,
                    _ => Channel::PortError,
                };
                let connection = Connection { port: *port, id: u32::from(channel / 2) };
                Lane { channel: channel_of, connection: Some(connection) }
            }),
        };
        let from_client = self.direction == Direction::ClientToServer;
        match lane.filter(|lane| lane.channel.is_from_client() == from_client) {
            Some(lane) => Target::Lane { lane, channel },
            None => Target::Raw,
        }
    }

    /// Bytes of a channel; those of the port in front of them are framing.
    fn data(&mut self, lane: Lane, channel: u8, mut bytes: Bytes, out: &mut Output<'_>) {
        if let Some(left) = self.ports_left.get_mut(usize::from(channel)).filter(|left| !left.is_empty()) {
            let length = left.len().min(bytes.len());
            if left[..length] == bytes[..length] {
                left.drain(..length);
                let _ = bytes.split_to(length);
            } else {
                let port = lane.connection.map_or(0, |connection| connection.port).to_le_bytes();
                let passed = &port[..PORT_BYTES - left.len()];
                out.gap(Reason::Port);
                out.data(lane, &mut self.counts[usize::from(channel)], Bytes::copy_from_slice(passed));
                left.clear();
            }
        }
        out.data(lane, &mut self.counts[usize::from(channel)], bytes);
    }

    fn decode(&mut self, lane: Lane, channel: u8, text: &[u8], out: &mut Output<'_>) {
        let mut decoded = Vec::with_capacity(text.len() / 4 * 3 + 3);
        let mut failed_at = None;
        for (at, byte) in text.iter().enumerate().filter(|(_, byte)| !matches!(byte, b'\r' | b'\n')) {
            self.quantum.push(*byte);
            if self.quantum.len() == QUANTUM_BYTES {
                let good = decoded.len();
                if self.padded || BASE64.decode_vec(&self.quantum, &mut decoded).is_err() {
                    decoded.truncate(good);
                    failed_at = Some(at);
                    break;
                }
                self.padded = byte == &b'=';
                self.quantum.clear();
            }
        }
        self.data(lane, channel, decoded.into(), out);
        if let Some(at) = failed_at {
            out.gap(Reason::Base64);
            out.raw(self.take_rest().into());
            out.raw(Bytes::copy_from_slice(&text[at + 1..]));
            self.target = Target::Raw;
        }
    }

    fn close(&mut self, mut raw: bool, channels: &[u8], out: &mut Output<'_>) {
        for channel in channels {
            match process(*channel) {
                Some(lane) if !std::mem::replace(&mut self.ended[usize::from(*channel)], true) => {
                    out.changed(lane, Change::Ended);
                }
                Some(_) => {}
                None => {
                    out.gap(Reason::Channel);
                    let both = [CLOSE, *channel];
                    out.raw(Bytes::copy_from_slice(if raw { &both[1..] } else { &both }));
                    raw = true;
                }
            }
        }
        self.target = Target::Close { raw };
    }

    fn end(&mut self, out: &mut Output<'_>) {
        if !self.quantum.is_empty() {
            out.gap(Reason::Base64);
            out.raw(self.take_rest().into());
        }
        self.padded = false;
        self.target = Target::Unknown;
    }
}

/// `k8s.io/apimachinery/pkg/util/remotecommand/constants.go`.
fn process(channel: u8) -> Option<Lane> {
    let channel = match channel {
        0 => Channel::Stdin,
        1 => Channel::Stdout,
        2 => Channel::Stderr,
        3 => Channel::Status,
        4 => Channel::Resize,
        _ => return None,
    };
    Some(Lane::of(channel))
}
