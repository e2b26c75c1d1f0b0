//! WebSocket frames (RFC 6455 §5), one direction. Payloads come out as they come in, unmasked.
//!
//! Lenient where that hides nothing: a client's frame without a mask is taken as it is. Where the RFC leaves no
//! meaning, the bytes come out as they are, and so does all that follows: without a frame's length there is no next
//! one.

use bytes::{Bytes, BytesMut};

/// Longest head: two bytes, eight of length, four of mask.
const HEAD_BYTES_MAX: usize = 14;

/// Longest payload of a control frame (RFC 6455 §5.5).
const CONTROL_BYTES_MAX: u64 = 125;

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PONG: u8 = 10;

/// What frames hold.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Bytes of a message.
    Payload(Bytes),
    /// A frame of a message is over: the last one, or one of several.
    End { last: bool },
    /// Messages behind a close frame and all that follows, as they came.
    Behind(Bytes),
    /// Bytes that are no frames, as they came.
    Invalid(Bytes),
}

/// Reads frames.
#[derive(Debug, Default)]
pub(super) struct Frames {
    head: [u8; HEAD_BYTES_MAX],
    head_bytes: usize,
    frame: Option<Frame>,
    in_message: bool,
    /// A close frame was there: nobody reads messages that follow (RFC 6455 §5.5.1).
    closed: bool,
    /// One of those was there.
    behind: bool,
    invalid: bool,
}

#[derive(Debug)]
struct Frame {
    opcode: u8,
    last: bool,
    remaining: u64,
    /// Turned so that its first byte is for the next one of the payload.
    mask: Option<[u8; 4]>,
}

impl Frames {
    /// Takes the next bytes.
    pub(super) fn feed(&mut self, mut input: Bytes, take: &mut dyn FnMut(Part)) {
        while !input.is_empty() {
            if self.invalid {
                return take(Part::Invalid(input));
            }
            if self.behind {
                return take(Part::Behind(input));
            }
            match &mut self.frame {
                Some(frame) => {
                    let bytes = frame.payload(&mut input);
                    if frame.opcode < CLOSE {
                        take(Part::Payload(bytes));
                    }
                }
                None => {
                    self.head[self.head_bytes] = input[0];
                    self.head_bytes += 1;
                    let _ = input.split_to(1);
                    self.begin(take);
                }
            }
            self.end(take);
        }
    }

    /// Whether a close frame was there.
    pub(super) fn has_closed(&self) -> bool {
        self.closed
    }

    /// What was kept of a head that is not whole.
    pub(super) fn take_rest(&mut self) -> Vec<u8> {
        self.head[..std::mem::take(&mut self.head_bytes)].to_vec()
    }

    /// Begins a frame once its head is whole.
    fn begin(&mut self, take: &mut dyn FnMut(Part)) {
        let head = &self.head[..self.head_bytes];
        let [first, second, rest @ ..] = head else { return };
        let (length, masked) = (second & 0x7f, second & 0x80 != 0);
        let length_bytes = match length {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        if rest.len() < length_bytes + if masked { 4 } else { 0 } {
            return;
        }
        let (extended, mask) = rest.split_at(length_bytes);
        let remaining = match length_bytes {
            0 => u64::from(length),
            _ => extended.iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte)),
        };
        let (opcode, last) = (first & 0x0f, first & 0x80 != 0);
        let valid = first & 0x70 == 0
            && remaining <= u64::MAX >> 1
            && match opcode {
                CONTINUATION => self.in_message,
                TEXT | BINARY => !self.in_message,
                CLOSE..=PONG => last && remaining <= CONTROL_BYTES_MAX,
                _ => false,
            };
        if !valid {
            self.invalid = true;
            return take(Part::Invalid(self.take_rest().into()));
        }
        if self.closed && opcode < CLOSE {
            self.behind = true;
            return take(Part::Behind(self.take_rest().into()));
        }
        self.frame = Some(Frame { opcode, last, remaining, mask: mask.try_into().ok() });
        self.head_bytes = 0;
    }

    /// Ends a frame that has no bytes left.
    fn end(&mut self, take: &mut dyn FnMut(Part)) {
        let Some(Frame { opcode, last, remaining: 0, .. }) = self.frame else { return };
        self.frame = None;
        match opcode {
            CONTINUATION | TEXT | BINARY => {
                self.in_message = !last;
                take(Part::End { last });
            }
            CLOSE => self.closed = true,
            _ => {}
        }
    }
}

impl Frame {
    /// The next bytes of its payload, without the mask.
    fn payload(&mut self, input: &mut Bytes) -> Bytes {
        let length = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(input.len());
        self.remaining -= length as u64;
        let bytes = input.split_to(length);
        let Some(mask) = &mut self.mask else { return bytes };
        let mut clear = BytesMut::from(&bytes[..]);
        let (blocks, rest) = clear.as_chunks_mut::<4>();
        // Blocks of a known length become wide instructions.
        for block in blocks {
            *block = [block[0] ^ mask[0], block[1] ^ mask[1], block[2] ^ mask[2], block[3] ^ mask[3]];
        }
        rest.iter_mut().zip(*mask).for_each(|(byte, key)| *byte ^= key);
        mask.rotate_left(length % 4);
        clear.freeze()
    }
}
