//! The record of an upgraded stream: what [`crate::streams`] decodes, as events.
//!
//! Framing is not kept; payload is, and so is whatever could not be decoded.

use std::sync::Arc;

use bytes::Bytes;
use http::{
    HeaderMap,
    header::{SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_PROTOCOL, UPGRADE},
};
use weir_common::event::{Change, Channel, FileCopied, Kind, Outcome};

use super::{RequestHead, body::Sensitivity, content, mask::Masker, sieve::Sieves, split};
use crate::streams::{self, Agreed, Decoder, Direction, Lack, Lane};

/// What an upgrade asks for, as far as it decides how the stream is read.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    api_group: String,
    subresource: String,
    verb: String,
    query: String,
}

impl Asked {
    pub(super) fn of(head: &RequestHead<'_>) -> Self {
        Self {
            api_group: head.attributes.api_group.clone(),
            subresource: head.attributes.subresource.clone(),
            verb: head.attributes.verb.clone(),
            query: head.uri.query().unwrap_or_default().to_owned(),
        }
    }
}

/// What one piece means.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    /// In their order.
    pub(super) kinds: Vec<Kind>,
    /// Pieces of a response body, which the masks must see.
    pub(super) body: Vec<Bytes>,
    /// What the client says cannot be followed, and must be: the stream is to be cut.
    pub(super) is_unreadable: bool,
}

/// A stream while it passes.
#[derive(Debug)]
pub(super) struct Upgraded {
    decoder: Decoder,
    masker: Masker,
    /// Id of the request.
    request: Arc<str>,
    /// Raw bytes may hold objects of the API, which no mask can see in them.
    withholds: bool,
    /// It leads into a pod: what its client says is what somebody does there.
    leads_into_pod: bool,
    /// Finds what rules mask.
    sieves: Option<Sieves>,
    leaves_out: LeavesOut,
    /// Bytes that were left out.
    left_out: u64,
    /// The server has ended; whether the client had said before that it was about to go. What it says later is an answer to that end.
    client_left_first: Option<bool>,
}

/// What the rules do not want of a stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LeavesOut {
    /// What its channels carry.
    pub(super) payload: bool,
    /// The response body that comes through it.
    pub(super) body: bool,
}

impl LeavesOut {
    /// How a stream ended is always recorded.
    fn has(self, channel: Channel) -> bool {
        match channel {
            Channel::ResponseBody => self.body,
            Channel::Status | Channel::PortError => false,
            _ => self.payload,
        }
    }
}

impl Upgraded {
    /// The stream that `asked` and the head of the response agree on.
    pub(super) fn new(
        asked: &Asked,
        headers: &HeaderMap,
        (sensitivity, masker): (Sensitivity, &Masker),
        leaves_out: LeavesOut,
        request: Arc<str>,
    ) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let decoder = Decoder::new(Agreed {
            api_group: &asked.api_group,
            subresource: &asked.subresource,
            verb: &asked.verb,
            query: &asked.query,
            upgrade: text(UPGRADE.as_str()),
            subprotocol: text(SEC_WEBSOCKET_PROTOCOL.as_str()),
            spdy_protocol: text("x-stream-protocol-version"),
            extensions: headers.contains_key(SEC_WEBSOCKET_EXTENSIONS),
        });
        let sieves = Sieves::of(masker);
        // Masked frames and what is compressed hide from expressions, too.
        let withholds = asked.verb == "watch" || sensitivity != Sensitivity::None || sieves.is_some();
        let leads_into_pod =
            asked.api_group.is_empty() && matches!(&asked.subresource[..], "exec" | "attach" | "portforward");
        Self {
            decoder,
            masker: masker.clone(),
            request,
            withholds,
            leads_into_pod,
            sieves,
            leaves_out,
            left_out: 0,
            client_left_first: None,
        }
    }

    /// Takes the next bytes of one direction.
    pub(super) fn feed(&mut self, direction: Direction, piece: &Bytes) -> Decoded {
        let events = self.decoder.feed(direction, piece);
        self.decoded(events)
    }

    /// The stream is over.
    pub(super) fn finish(&mut self) -> Decoded {
        let mut events = self.decoder.finish(Direction::ClientToServer);
        events.append(&mut self.decoder.finish(Direction::ServerToClient));
        let mut decoded = self.decoded(events);
        if self.left_out > 0 {
            let reason = "left out: a rule wants only metadata of what this stream carried".to_owned();
            decoded.kinds.push(Kind::Gap { reason, events: None, bytes: Some(self.left_out) });
        }
        for lane in self.sieves.as_ref().map(Sieves::lanes).unwrap_or_default() {
            decoded.kinds.append(&mut self.end(lane));
        }
        decoded.kinds.extend(self.sieves.as_ref().and_then(Sieves::told));
        decoded
    }

    /// Whether the server's messages are a response body.
    pub(super) fn has_body(&self) -> bool {
        self.decoder.has_body()
    }

    /// How it ended, both sides having closed in good order, and why so; `client_first`: the client did before the server. What it lacks
    /// says that it was cut all the same, be it behind the API server.
    pub(super) fn ended(&self, client_first: bool) -> (Outcome, Option<String>) {
        let by_client = client_first || self.client_left_first.unwrap_or_else(|| self.decoder.client_left());
        match self.decoder.lacks() {
            // A client ends a port-forward whenever it wants to.
            Some(Lack::Connections) if by_client => (Outcome::Complete, None),
            Some(lack) if by_client => {
                (Outcome::ClientAborted, Some(format!("the client ended the stream early: {lack}")))
            }
            Some(lack) => {
                (Outcome::UpstreamFailed, Some(format!("the API server ended the stream early: {lack}")))
            }
            None => (Outcome::Complete, None),
        }
    }

    /// The server's side is over.
    pub(super) fn server_ends(&mut self) {
        self.client_left_first.get_or_insert_with(|| self.decoder.client_left());
    }

    /// Exit code of the process, if the server has said how it ended.
    pub(super) fn exit_code(&self) -> Option<i32> {
        self.decoder.exit_code()
    }

    fn decoded(&mut self, events: Vec<streams::Event>) -> Decoded {
        let mut decoded = Decoded::default();
        for event in events {
            match event {
                streams::Event::Data { lane, parts, .. } if self.leaves_out.has(lane.channel) => {
                    self.left_out += parts.iter().map(|part| part.len() as u64).sum::<u64>();
                }
                streams::Event::Data { lane, parts, .. } if lane.channel == Channel::ResponseBody => {
                    decoded.body.extend(parts);
                }
                streams::Event::Data { lane, offset, parts } => {
                    let bytes = match &parts[..] {
                        [one] => one.clone(),
                        many => many.concat().into(),
                    };
                    if self.withholds && matches!(lane.channel, Channel::ClientRaw | Channel::ServerRaw) {
                        decoded.kinds.push(self.withheld(lane, offset, &bytes));
                        // Else one odd frame would hide all that follows it: clients that people use send none. What they say behind
                        // their own end nobody reads.
                        decoded.is_unreadable |=
                            self.leads_into_pod && self.decoder.is_lost(Direction::ClientToServer);
                        continue;
                    }
                    let Some(sieves) = &mut self.sieves else {
                        decoded.kinds.append(&mut split::split_lane(lane, offset, &bytes));
                        continue;
                    };
                    match sieves.push(lane, &bytes) {
                        // Masks make it longer or shorter: offsets are those of what is recorded.
                        Some((offset, masked)) => {
                            decoded.kinds.append(&mut split::split_lane(lane, offset, &masked));
                        }
                        None => decoded.kinds.push(self.withheld(lane, offset, &bytes)),
                    }
                }
                streams::Event::Changed(lane @ Lane { channel, connection }, change) => {
                    if change != Change::Opened {
                        decoded.kinds.append(&mut self.end(lane));
                    }
                    decoded.kinds.push(Kind::ChannelChanged { channel, connection, change });
                }
                streams::Event::Copied(file) => {
                    decoded.kinds.push(Kind::FileCopied(Box::new(self.copied(file))));
                }
                streams::Event::Forwarded(mut connection) => {
                    if let (Some(sieves), Some(name)) = (&self.sieves, &mut connection.server_name) {
                        *name = sieves.text(name);
                    }
                    decoded.kinds.push(Kind::ConnectionForwarded(Box::new(connection)));
                }
                streams::Event::Gap(reason) => {
                    // The bytes follow as they are, so none are missing.
                    decoded.kinds.push(Kind::Gap {
                        reason: reason.to_string(),
                        events: None,
                        bytes: Some(0),
                    });
                }
            }
        }
        decoded
    }

    /// Bytes of a stream that the masks cannot see into. They pass, but for what a client says into a pod: who configures masks wants secrets
    /// kept out of the record, not connections cut, and whoever holds the bytes can prove by their digest what they were. It is one of the request and the place,
    /// too: a piece may be one byte, and whoever reads the record could look up by what a stream of theirs has.
    fn withheld(&self, lane: Lane, offset: u64, bytes: &[u8]) -> Kind {
        let place = format!("{}/{lane:?}/{offset}/", self.request);
        let digest = content::keyed(&self.masker, &[place.as_bytes(), bytes].concat());
        let reason = format!("withheld: what is not decoded of a stream cannot be masked; {digest}");
        Kind::Gap { reason, events: None, bytes: Some(bytes.len() as u64) }
    }

    /// A lane is over.
    fn end(&mut self, lane: Lane) -> Vec<Kind> {
        let rest = self.sieves.as_mut().and_then(|sieves| sieves.end(lane));
        rest.map(|(offset, rest)| split::split_lane(lane, offset, &rest)).unwrap_or_default()
    }

    /// A file as it is recorded: where something of its channel was masked, or nobody looked, without its digest, which is not keyed.
    fn copied(&self, file: FileCopied) -> FileCopied {
        let Some(sieves) = &self.sieves else {
            return FileCopied { digest: file.digest.filter(|_| !self.leaves_out.payload), ..file };
        };
        let lane = Lane { channel: file.channel, connection: None };
        let digest = file.digest.filter(|_| !self.leaves_out.payload && !sieves.has_masked(lane));
        let link_target = file.link_target.map(|target| sieves.text(&target));
        FileCopied { path: sieves.text(&file.path), digest, link_target, ..file }
    }
}
