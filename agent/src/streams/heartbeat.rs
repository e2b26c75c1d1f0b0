//! Pings: what a client says on an upgraded connection only to learn whether somebody is there; and where in a server's words an
//! answer to one fits in. Sans-IO.

/// Bytes in front of a SPDY/3.1 PING's payload: control bit and version, type 6, no flags, a length of four.
const SPDY_PING: [u8; 8] = [0x80, 3, 0, 6, 0, 0, 0, 4];
/// The kinds of control frames whose length all servers read alike, as far as it is theirs. SETTINGS is none: how long it is stands in it.
const SPDY_OPENING: u8 = 1;
const SPDY_REPLY: u8 = 2;
const SPDY_RESET: u8 = 3;
const SPDY_PING_KIND: u8 = 6;
const SPDY_GOAWAY: u8 = 7;
const SPDY_HEADERS: u8 = 8;
const SPDY_WINDOW: u8 = 9;
/// Bytes of a SPDY PING's id.
const SPDY_ID: usize = 4;
/// First byte of a whole PING of RFC 6455.
const WEBSOCKET_PING: u8 = 0x89;
/// Second byte's bit of a frame with a mask, as each of a client's has.
const MASKED: u8 = 0x80;
/// Longest payload of a control frame.
const CONTROL_BYTES_MAX: u8 = 125;
/// Bytes of a mask.
const MASK: usize = 4;
/// First byte of what answers a PING of RFC 6455.
const WEBSOCKET_PONG: u8 = 0x8a;
/// Bytes of a SPDY/3.1 frame's head.
const SPDY_HEAD: usize = 8;
/// Longest head of a frame of RFC 6455: two bytes, a length of eight, a mask.
const WEBSOCKET_HEAD_MAX: usize = 2 + 8 + MASK;

/// Whether these bytes of a client are whole pings and nothing else, if a frame begins where they do: what looks like one in the
/// middle of a frame is content ([`FrameEnds`]).
pub(crate) fn only_pings(framing: Framing, bytes: &[u8]) -> bool {
    let mut rest = bytes;
    while !rest.is_empty() {
        let Some(after) = after_ping(framing, rest) else { return false };
        rest = after;
    }
    !bytes.is_empty()
}

fn after_ping(framing: Framing, bytes: &[u8]) -> Option<&[u8]> {
    if framing == Framing::Spdy {
        return bytes.strip_prefix(&SPDY_PING)?.get(SPDY_ID..);
    }
    let [WEBSOCKET_PING, length, rest @ ..] = bytes else { return None };
    let length = length.checked_sub(MASKED).filter(|length| *length <= CONTROL_BYTES_MAX)?;
    rest.get(MASK + usize::from(length)..)
}

/// What a server would answer to these, which are whole pings and nothing else ([`only_pings`]).
pub(crate) fn answers(framing: Framing, pings: &[u8]) -> Vec<u8> {
    let (mut rest, mut answers) = (pings, Vec::new());
    while let Some(after) = after_ping(framing, rest) {
        let ping = &rest[..rest.len() - after.len()];
        rest = after;
        let [WEBSOCKET_PING, length, masked @ ..] = ping else {
            // Of SPDY: the same comes back.
            answers.extend_from_slice(ping);
            continue;
        };
        let (mask, payload) = masked.split_at(MASK);
        answers.extend([WEBSOCKET_PONG, length & !MASKED]);
        answers.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    }
    answers
}

/// What an upgraded connection has its frames of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// RFC 6455.
    WebSocket,
    /// SPDY/3.1.
    Spdy,
}

impl Framing {
    /// That of a protocol, as the header `Upgrade` names it.
    pub(crate) fn of(protocol: &str) -> Option<Self> {
        match protocol {
            _ if protocol.eq_ignore_ascii_case("websocket") => Some(Self::WebSocket),
            _ if protocol.eq_ignore_ascii_case("spdy/3.1") => Some(Self::Spdy),
            _ => None,
        }
    }
}

/// Knows where frames end in bytes that come piece by piece.
#[derive(Debug)]
pub(crate) struct FrameEnds {
    framing: Framing,
    /// Of a frame's head what has come.
    head: Vec<u8>,
    /// Bytes of its payload that are to come.
    payload: u64,
    /// A frame was there that some servers take for longer or shorter than it says.
    lost: bool,
}

impl FrameEnds {
    /// From the first byte behind the upgrade on.
    pub(crate) fn new(framing: Framing) -> Self {
        Self { framing, head: Vec::with_capacity(WEBSOCKET_HEAD_MAX), payload: 0, lost: false }
    }

    /// Whether what comes next surely begins a frame.
    pub(crate) fn is_between(&self) -> bool {
        self.head.is_empty() && self.payload == 0 && !self.lost
    }

    /// Whether it will not be sure of that any more.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Passes over the next bytes, and tells behind how many of them the last frame ends that ends in them, if one does.
    pub(crate) fn pass(&mut self, bytes: &[u8]) -> Option<usize> {
        let (mut rest, mut end) = (bytes, None);
        while let [first, behind @ ..] = rest {
            if self.payload > 0 {
                let passed = usize::try_from(self.payload).map_or(rest.len(), |left| left.min(rest.len()));
                self.payload -= passed as u64;
                rest = &rest[passed..];
            } else {
                self.head.push(*first);
                rest = behind;
                if let Some(payload) = self.announced() {
                    self.payload = payload;
                    self.head.clear();
                }
            }
            if self.is_between() {
                end = Some(bytes.len() - rest.len());
            }
        }
        end
    }

    /// Length of the payload, once the head is whole.
    fn announced(&mut self) -> Option<u64> {
        if self.framing == Framing::Spdy {
            let [first, .., kind, _, high, middle, low] = self.head[..] else { return None };
            let length = u32::from_be_bytes([0, high, middle, low]);
            let is_whole = self.head.len() == SPDY_HEAD;
            let is_as_long = match kind {
                _ if first & 0x80 == 0 => true,
                SPDY_PING_KIND => length == 4,
                SPDY_RESET | SPDY_GOAWAY | SPDY_WINDOW => length == 8,
                SPDY_OPENING => length >= 10,
                SPDY_REPLY | SPDY_HEADERS => length >= 4,
                _ => false,
            };
            self.lost |= is_whole && !is_as_long;
            return is_whole.then_some(length.into());
        }
        let [_, second, rest @ ..] = &self.head[..] else { return None };
        let mask = if second & MASKED == 0 { 0 } else { MASK };
        let (length, rest) = match second & !MASKED {
            126 => rest.split_first_chunk().map(|(length, rest)| (u16::from_be_bytes(*length).into(), rest)),
            127 => rest.split_first_chunk().map(|(length, rest)| (u64::from_be_bytes(*length), rest)),
            length => Some((length.into(), rest)),
        }?;
        (rest.len() == mask).then_some(length)
    }
}

#[cfg(test)]
mod tests {
    use super::{FrameEnds, Framing, answers, only_pings};

    #[test]
    fn pings_are_answered_as_a_server_would() {
        const SPDY: &[u8] = b"\x80\x03\0\x06\0\0\0\x04\0\0\0\x01";
        let pings = [&b"\x89\x80mask"[..], b"\x89\x83mask\x0c\x03\x10"];
        let expected = [&b"\x8a\0"[..], b"\x8a\x03abc"];
        for (ping, expected) in pings.iter().zip(expected) {
            assert_eq!(answers(Framing::WebSocket, ping), expected, "{ping:x?}");
        }
        assert_eq!(answers(Framing::WebSocket, &pings.concat()), expected.concat());
        assert_eq!(answers(Framing::Spdy, &SPDY.repeat(2)), SPDY.repeat(2));
    }

    #[test]
    fn ends_of_frames_are_known_wherever_pieces_are_cut() {
        let long = |head: &[u8], bytes: usize| [head, &vec![0x89; bytes]].concat();
        let websocket = [
            long(b"\x82\x05", 5),
            long(b"\x88\0", 0),
            long(b"\x82\x7e\x01\x2c", 300),
            long(b"\x02\x7f\0\0\0\0\0\x01\0\0", 65536),
            long(b"\x82\x85mask", 5),
        ];
        let spdy = [
            long(b"\x80\x03\0\x02\0\0\0\x06", 6),
            long(b"\0\0\0\x01\x01\0\0\0", 0),
            long(b"\0\0\0\x01\0\x01\0\0", 65536),
        ];
        for (framing, frames) in [(Framing::WebSocket, &websocket[..]), (Framing::Spdy, &spdy)] {
            let all = frames.concat();
            let mut expected: Vec<usize> = vec![0];
            for frame in frames {
                expected.push(expected.last().unwrap_or(&0) + frame.len());
            }
            for cut in (0..400).chain(all.len() - 400..=all.len()) {
                let mut ends = FrameEnds::new(framing);
                let last = |from: usize, to: usize| {
                    expected.iter().rfind(|end| (from + 1..=to).contains(end)).map(|end| end - from)
                };
                assert_eq!(ends.pass(&all[..cut]), last(0, cut), "{framing:?} {cut}");
                assert_eq!(ends.is_between(), expected.contains(&cut), "{framing:?} {cut}");
                assert_eq!(ends.pass(&all[cut..]), last(cut, all.len()), "{framing:?} {cut}");
                assert!(ends.is_between(), "{framing:?} {cut}");
            }
        }
    }

    #[test]
    fn behind_a_control_frame_whose_length_is_none_of_its_kind_nothing_surely_begins_a_frame() {
        for (frame, is_sure) in [
            (&b"\x80\x03\0\x06\0\0\0\x04\0\0\0\x01"[..], true),
            (b"\x80\x03\0\x06\0\0\0\x05\0\0\0\x01\0", false),
            (b"\x80\x03\0\x03\0\0\0\x08\0\0\0\x01\0\0\0\x05", true),
            (b"\x80\x03\0\x03\0\0\0\0", false),
            (b"\x80\x03\0\x04\0\0\0\x04\0\0\0\0", false),
            (b"\0\0\0\x06\0\0\0\x01x", true),
        ] {
            let mut ends = FrameEnds::new(Framing::Spdy);
            for piece in frame.chunks(3) {
                ends.pass(piece);
            }
            assert_eq!(ends.is_between(), is_sure, "{frame:x?}");
            ends.pass(b"\0\0\0\x01\0\0\0\0");
            assert_eq!(ends.is_between(), is_sure, "{frame:x?}, and later");
        }
    }

    #[test]
    fn whole_pings_are_told_from_all_else() {
        use Framing::{Spdy, WebSocket};

        let websocket = b"\x89\x80mask".to_vec();
        let with_payload = b"\x89\x83maskabc".to_vec();
        let spdy = b"\x80\x03\0\x06\0\0\0\x04\0\0\0\x01".to_vec();
        for (framing, pings) in [
            (WebSocket, &websocket),
            (WebSocket, &with_payload),
            (WebSocket, &[&*websocket, &with_payload].concat()),
            (Spdy, &spdy),
            (Spdy, &spdy.repeat(2)),
        ] {
            assert!(only_pings(framing, pings), "{pings:x?}");
            for cut in 1..pings.len() {
                let [first, second] = [&pings[..cut], &pings[cut..]].map(|part| only_pings(framing, part));
                assert_eq!(first, second, "{pings:x?} {cut}");
            }
            assert!(!only_pings(framing, &[&**pings, b"\x82"].concat()));
            // Those of the other are none here.
            let other = if framing == Spdy { WebSocket } else { Spdy };
            assert!(!only_pings(other, pings), "{pings:x?}");
        }
        for other in
            [&b""[..], b"\x82\x81mask\x03", b"\x8a\x80mask", b"\x89\x00", b"\x89\xffmask", b"\x88\x80mask"]
        {
            assert!(!only_pings(WebSocket, other), "{other:x?}");
        }
    }
}
