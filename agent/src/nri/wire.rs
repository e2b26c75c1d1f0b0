//! The bytes between the agent and a container runtime: calls in both directions over one connection.
//!
//! NRI lays two ttrpc connections into one (containerd/nri `pkg/net/multiplex`), each with its own numbers of streams, so
//! that both sides can call. Their messages are split over frames as the sender likes:
//!
//! ```text
//! frame:   connection (u32) · length (u32) · bytes of that connection
//! message: length (u32) · stream (u32) · type (u8) · flags (u8) · data      (containerd/ttrpc `PROTOCOL.md`)
//! ```
//!
//! All numbers are big-endian. Sans-IO: bytes in, messages out. What `data` says is the matter of `messages`.

/// Length of both headers before a message's data.
const FRAME_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;
/// Longest data of a message, by ttrpc's own rules.
const DATA_MAX: usize = 4 << 20;
/// Longest frame: the longest message.
const FRAME_MAX: usize = MESSAGE_HEADER + DATA_MAX;
/// Longest message of the agent: the runtime takes each frame at once into a buffer of this length (Go's `bufio`), and ends the
/// connection if it does not fit.
const OWN_MESSAGE_MAX: usize = 4096;

/// Why the connection cannot go on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A frame that no message fills.
    #[error("a frame of {0} bytes, more than the longest message has")]
    Frame(u32),
    /// A message that is too long.
    #[error("a message of {0} bytes, more than ttrpc allows")]
    Message(u32),
    /// A message that is neither a request nor a response: NRI has no streams.
    #[error("a message of type {0}, which NRI does not use")]
    Kind(u8),
    /// An answer of the agent that is too long.
    #[error("a message of {0} bytes does not fit into the runtime's buffer")]
    TooLong(usize),
}

/// Which of the two connections: named after who serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// The runtime calls the agent.
    Plugin,
    /// The agent calls the runtime.
    Runtime,
}

impl Service {
    const ALL: [Self; 2] = [Self::Plugin, Self::Runtime];

    fn number(self) -> u32 {
        match self {
            Self::Plugin => 1,
            Self::Runtime => 2,
        }
    }
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A call.
    Request,
    /// Its answer.
    Response,
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
        }
    }
}

/// A call or an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The connection.
    pub service: Service,
    /// Which call of it.
    pub stream: u32,
    /// What it is.
    pub kind: Kind,
    /// A ttrpc request or response in protobuf.
    pub data: Vec<u8>,
}

impl Message {
    /// Its bytes, in one frame.
    ///
    /// # Errors
    /// It is too long for the runtime.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let length = MESSAGE_HEADER + self.data.len();
        if length > OWN_MESSAGE_MAX {
            return Err(WireError::TooLong(length));
        }
        let number = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        let mut bytes = Vec::with_capacity(FRAME_HEADER + length);
        bytes.extend(self.service.number().to_be_bytes());
        bytes.extend(number(length));
        bytes.extend(number(self.data.len()));
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend([self.kind.number(), 0]);
        bytes.extend(&self.data);
        Ok(bytes)
    }
}

/// Reads messages out of bytes as they come.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The part of a frame's header that has come.
    header: Vec<u8>,
    /// The connection of the frame that is read, none for one that is passed over, and how much of it is to come.
    frame: (Option<Service>, usize),
    /// What has come of each connection's next message.
    pending: [Vec<u8>; 2],
}

impl Decoder {
    /// Takes `bytes` and gives the messages that are whole. After an error nothing more can be read.
    ///
    /// # Errors
    /// What came is not NRI, or longer than it allows.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<Vec<Message>, WireError> {
        let mut messages = Vec::new();
        while !bytes.is_empty() {
            let (service, left) = self.frame;
            if left == 0 {
                bytes = self.push_header(bytes)?;
                continue;
            }
            let (part, rest) = bytes.split_at(left.min(bytes.len()));
            (self.frame.1, bytes) = (left - part.len(), rest);
            if let Some(service) = service {
                let pending = &mut self.pending[usize::from(service == Service::Runtime)];
                pending.extend_from_slice(part);
                take_messages(service, pending, &mut messages)?;
            }
        }
        Ok(messages)
    }

    /// Takes what is missing of a frame's header; gives the rest.
    fn push_header<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], WireError> {
        let (part, rest) = bytes.split_at((FRAME_HEADER - self.header.len()).min(bytes.len()));
        self.header.extend_from_slice(part);
        if let [a, b, c, d, e, f, g, h] = self.header[..] {
            let (connection, length) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
            if length as usize > FRAME_MAX {
                return Err(WireError::Frame(length));
            }
            // The runtime, too, passes over connections that it does not know.
            let service = Service::ALL.into_iter().find(|service| service.number() == connection);
            self.frame = (service, length as usize);
            self.header.clear();
        }
        Ok(rest)
    }

    /// Bytes that are kept.
    pub fn kept(&self) -> usize {
        self.header.len() + self.pending.iter().map(Vec::len).sum::<usize>()
    }
}

/// Takes every whole message out of `pending`.
fn take_messages(
    service: Service,
    pending: &mut Vec<u8>,
    messages: &mut Vec<Message>,
) -> Result<(), WireError> {
    let mut taken = 0;
    while let Some((header, rest)) = pending[taken..].split_first_chunk::<MESSAGE_HEADER>() {
        let [a, b, c, d, e, f, g, h, kind, _flags] = *header;
        let length = u32::from_be_bytes([a, b, c, d]);
        if length as usize > DATA_MAX {
            return Err(WireError::Message(length));
        }
        let kind = match kind {
            1 => Kind::Request,
            2 => Kind::Response,
            other => return Err(WireError::Kind(other)),
        };
        let Some(data) = rest.get(..length as usize) else { break };
        messages.push(Message {
            service,
            stream: u32::from_be_bytes([e, f, g, h]),
            kind,
            data: data.to_vec(),
        });
        taken += MESSAGE_HEADER + data.len();
    }
    if taken == pending.len() {
        // A long one's room is not kept.
        *pending = Vec::new();
    } else {
        pending.drain(..taken);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(service: Service, stream: u32, data: &[u8]) -> Message {
        Message { service, stream, kind: Kind::Request, data: data.to_vec() }
    }

    #[test]
    fn a_message_is_one_frame_with_both_headers() {
        let bytes = message(Service::Runtime, 1, b"ab").encode().expect("is short");
        assert_eq!(bytes, [0, 0, 0, 2, 0, 0, 0, 12, 0, 0, 0, 2, 0, 0, 0, 1, 1, 0, b'a', b'b']);
        let long = message(Service::Runtime, 1, &[0; OWN_MESSAGE_MAX]).encode();
        assert_eq!(long, Err(WireError::TooLong(OWN_MESSAGE_MAX + 10)));
    }

    #[test]
    fn what_is_too_long_or_no_call_ends_the_connection_before_it_is_kept() {
        let frame = |length: u32| [&[0, 0, 0, 1][..], &length.to_be_bytes()].concat();
        let longest = u32::try_from(FRAME_MAX).expect("fits");
        let mut decoder = Decoder::default();
        assert_eq!(decoder.push(&frame(longest)), Ok(Vec::new()));
        assert_eq!(decoder.push(&[0, 0x40, 0, 1, 0, 0, 0, 1, 1, 0]), Err(WireError::Message(0x40_0001)));
        assert_eq!(Decoder::default().push(&frame(longest + 1)), Err(WireError::Frame(longest + 1)));
        let mut decoder = Decoder::default();
        decoder.push(&frame(10)).expect("a frame");
        assert_eq!(decoder.push(&[0, 0, 0, 0, 0, 0, 0, 1, 3, 0]), Err(WireError::Kind(3)));
    }

    #[test]
    fn frames_of_other_connections_are_passed_over() {
        let mut bytes = [&7_u32.to_be_bytes()[..], &3_u32.to_be_bytes(), b"xyz"].concat();
        let expected = message(Service::Plugin, 5, b"data");
        bytes.extend(expected.encode().expect("is short"));
        assert_eq!(Decoder::default().push(&bytes), Ok(vec![expected]));
    }

    proptest! {
        /// However the bytes are split, over reads and over frames, the messages are the same.
        #[test]
        fn messages_do_not_depend_on_how_they_come(
            sent in proptest::collection::vec((any::<bool>(), any::<u32>(), proptest::collection::vec(any::<u8>(), 0..200)), 0..8),
            frame in 1_usize..64,
            read in 1_usize..64,
        ) {
            let sent: Vec<_> = sent
                .iter()
                .map(|(runtime, stream, data)| {
                    let service = if *runtime { Service::Runtime } else { Service::Plugin };
                    message(service, *stream, data)
                })
                .collect();
            let mut bytes = Vec::new();
            for message in &sent {
                let whole = message.encode().expect("is short");
                for part in whole[FRAME_HEADER..].chunks(frame) {
                    bytes.extend(&whole[..4]);
                    bytes.extend(u32::try_from(part.len()).expect("is short").to_be_bytes());
                    bytes.extend(part);
                }
            }
            let mut decoder = Decoder::default();
            let mut received = Vec::new();
            for part in bytes.chunks(read) {
                received.extend(decoder.push(part).expect("is NRI"));
            }
            prop_assert_eq!(received, sent);
            prop_assert_eq!(decoder.kept(), 0);
        }
    }
}
