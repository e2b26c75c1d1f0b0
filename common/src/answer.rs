//! What a name server's answer tells: read in the kernel before it is the pod's, and in tests from a slice.
//!
//! Sans-IO, without memory of its own, and in steps of a byte: what the verifier of a kernel accepts of a parser is one step that
//! may be taken many times. Nothing of an answer is trusted: whoever forges one tells itself something. What cannot be read within
//! the bounds is refused if it is about a configured name, so that nobody is told of an address that was not noted.

use crate::kernel::Address;

/// Longest message that is read. Name servers send no longer datagram (RFC 6891, 6.2.5).
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Most addresses of one answer.
pub const ADDRESSES_MAX: usize = 64;
/// Most different configured names in one answer.
pub const NAMES_MAX: usize = 4;
/// Most steps until an answer is read.
pub const STEPS_MAX: u32 = 16_384;

const MESSAGE_MASK: u32 = MESSAGE_BYTES_MAX as u32 - 1;
const ADDRESSES_MASK: u32 = ADDRESSES_MAX as u32 - 1;
const NAMES_MASK: u32 = NAMES_MAX as u32 - 1;

/// Length of a message's header, and of the type, class, life and length of a record.
const HEADER_BYTES: u32 = 12;
const RECORD_BYTES: u32 = 10;
/// Types of records.
const A: u32 = 1;
const AAAA: u32 = 28;
const SVCB: u32 = 64;
const HTTPS: u32 = 65;
/// Bits of the header's second word.
const RESPONSE: u32 = 0x8000;
const TRUNCATED: u32 = 0x0200;

/// What makes an answer about a configured name one to be refused: it ends too early or is none that a name server writes; it has
/// more than there is room for; it tells addresses in another way (hints of a service).
const BROKEN: u32 = 1;
const TOO_MUCH: u32 = 2;
const HINTS: u32 = 4;

/// Of a name of no labels (FNV-1a).
const NO_LABEL: u64 = 0xcbf2_9ce4_8422_2325;

/// The hash by which the kernel knows a name. Never 0. Anybody can make a name with the hash of another: whoever asks for that one
/// is told addresses that are held for an API server's, for the pod that asks alone.
pub fn name_hash(name: &str) -> u64 {
    let name = name.trim_end_matches('.');
    name.split('.').fold(NO_LABEL, |hash, label| {
        label.bytes().fold(mix(hash, label.len() as u8), |hash, byte| mix(hash, byte.to_ascii_lowercase()))
    })
}

#[inline(always)]
const fn mix(hash: u64, byte: u8) -> u64 {
    (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3)
}

/// What is to be done with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It tells nothing of a configured name.
    Pass,
    /// It tells addresses of configured names, which are to be noted first.
    Told,
    /// It is about a configured name and cannot be read: nobody is to have it.
    Refuse,
}

/// An answer that is being read, and what it has told so far.
#[repr(C)]
#[derive(Debug)]
pub struct Reading {
    /// What is read: one message, or what a segment has of a stream of them, each with its length before it.
    pub bytes: [u8; MESSAGE_BYTES_MAX],
    /// The addresses, whichever name they stand with.
    pub addresses: [Address; ADDRESSES_MAX],
    /// The hashes of the configured names.
    pub names: [u64; NAMES_MAX],
    hash: u64,
    /// How many bytes there are.
    pub length: u32,
    /// How many addresses.
    pub told: u32,
    /// How many names.
    pub named: u32,
    stream: u32,
    /// Where the next message begins.
    next: u32,
    open: u32,
    start: u32,
    end: u32,
    truncated: u32,
    questions: u32,
    records: u32,
    at: u32,
    /// Bytes that the present label still has.
    label: u32,
    /// Where it goes on behind a name that is told by a pointer; 0: not by one, so far.
    resume: u32,
    /// Where the last name lay that was told by a pointer alone: it is told so again and again.
    last: u32,
    faults: u32,
    read: u32,
}

impl Reading {
    /// One with nothing in it.
    pub const fn new() -> Self {
        Self {
            bytes: [0; MESSAGE_BYTES_MAX],
            addresses: [[0; 16]; ADDRESSES_MAX],
            names: [0; NAMES_MAX],
            hash: NO_LABEL,
            length: 0,
            told: 0,
            named: 0,
            stream: 0,
            next: 0,
            open: 0,
            start: 0,
            end: 0,
            truncated: 0,
            questions: 0,
            records: 0,
            at: 0,
            label: 0,
            resume: 0,
            last: 0,
            faults: 0,
            read: 0,
        }
    }

    /// Begins anew with that many bytes, which `bytes` has when the first step is taken.
    #[inline(always)]
    pub fn begin(&mut self, length: u32, stream: bool) {
        self.length = length;
        self.stream = stream as u32;
        (self.told, self.named, self.next, self.open, self.faults, self.read) = (0, 0, 0, 0, 0, 0);
    }

    /// Reads on; whether that was all. `is_configured` knows the hashes of the configured names.
    #[inline(always)]
    pub fn step(&mut self, is_configured: impl FnOnce(u64) -> bool) -> bool {
        if self.open == 0 {
            return self.open_message();
        }
        if self.questions == 0 && self.records == 0 {
            self.open = 0;
            return false;
        }
        let at = self.at;
        if at >= self.end {
            return self.ends_early();
        }
        let byte = self.byte(at);
        if self.label > 0 {
            self.label -= 1;
            self.hash = mix(self.hash, byte.to_ascii_lowercase());
            self.at = at + 1;
            return false;
        }
        match byte >> 6 {
            0 if byte == 0 => {
                self.at = if self.resume == 0 { at + 1 } else { self.resume };
                // The root's name is nobody's: additional records of the protocol itself bear it.
                if self.hash != NO_LABEL && is_configured(self.hash) {
                    self.name();
                }
                self.after_name()
            }
            0 => {
                self.label = byte as u32;
                self.hash = mix(self.hash, byte);
                self.at = at + 1;
                false
            }
            3 => self.pointer(at),
            _ => self.fault(BROKEN),
        }
    }

    /// What is to be done, once it is read; what took too many steps is not.
    #[inline(always)]
    pub fn outcome(&self) -> Outcome {
        if self.read == 0 || (self.named > 0 && self.faults != 0) {
            Outcome::Refuse
        } else if self.named == 0 || self.told == 0 {
            Outcome::Pass
        } else {
            Outcome::Told
        }
    }

    /// Of an answer in a slice: all of it at once.
    pub fn read(&mut self, message: &[u8], stream: bool, is_configured: impl Fn(u64) -> bool) -> Outcome {
        let length = message.len().min(MESSAGE_BYTES_MAX);
        if length < message.len() && !stream {
            return Outcome::Refuse;
        }
        self.begin(length as u32, stream);
        self.bytes[..length].copy_from_slice(&message[..length]);
        for _ in 0..STEPS_MAX {
            if self.step(&is_configured) {
                break;
            }
        }
        self.outcome()
    }

    #[inline(always)]
    fn open_message(&mut self) -> bool {
        let mut start = self.next;
        let mut end = self.length;
        if self.stream != 0 {
            if start + 2 > self.length {
                return self.finish();
            }
            let size = self.word(start);
            start += 2;
            self.next = start + size;
            if self.next < end {
                end = self.next;
            }
        } else {
            self.next = end;
        }
        if start + HEADER_BYTES > end {
            return self.finish();
        }
        let flags = self.word(start + 2);
        if flags & RESPONSE == 0 {
            return self.finish();
        }
        self.truncated = flags & TRUNCATED;
        self.questions = self.word(start + 4);
        // Whichever section an address stands in.
        self.records = self.word(start + 6) + self.word(start + 8) + self.word(start + 10);
        (self.start, self.end, self.at) = (start, end, start + HEADER_BYTES);
        // The question's name is read by itself.
        self.last = HEADER_BYTES;
        self.open = 1;
        self.next_name();
        false
    }

    #[inline(always)]
    fn next_name(&mut self) {
        (self.hash, self.label, self.resume) = (NO_LABEL, 0, 0);
    }

    #[inline(always)]
    fn pointer(&mut self, at: u32) -> bool {
        if at + 2 > self.end {
            return self.ends_early();
        }
        let target = self.word(at) & 0x3fff;
        if self.resume == 0 {
            self.resume = at + 2;
        }
        // To something before it: nobody writes others.
        if self.start + target >= at {
            return self.fault(BROKEN);
        }
        if self.hash == NO_LABEL {
            if target == self.last && self.questions == 0 {
                self.at = self.resume;
                return self.after_name();
            }
            self.last = target;
        }
        self.at = self.start + target;
        false
    }

    /// Behind a name: the rest of a question or of a record.
    #[inline(always)]
    fn after_name(&mut self) -> bool {
        self.next_name();
        if self.questions > 0 {
            self.questions -= 1;
            self.at += 4;
            return false;
        }
        let data = self.at + RECORD_BYTES;
        if data > self.end {
            return self.ends_early();
        }
        let (kind, size) = (self.word(data - 10), self.word(data - 2));
        self.at = data + size;
        self.records -= 1;
        if self.at > self.end {
            return self.ends_early();
        }
        match kind {
            A if size == 4 => self.tell4(data),
            AAAA if size == 16 => self.tell6(data),
            A | AAAA => self.fault(BROKEN),
            SVCB | HTTPS => {
                self.faults |= HINTS;
                false
            }
            _ => false,
        }
    }

    #[inline(always)]
    fn tell4(&mut self, data: u32) -> bool {
        let mut address = [0; 16];
        (address[10], address[11]) = (0xff, 0xff);
        for index in 0..4 {
            address[12 + index] = self.byte(data + index as u32);
        }
        self.tell(address)
    }

    #[inline(always)]
    fn tell6(&mut self, data: u32) -> bool {
        let mut address = [0; 16];
        for (index, byte) in address.iter_mut().enumerate() {
            *byte = self.byte(data + index as u32);
        }
        self.tell(address)
    }

    #[inline(always)]
    fn tell(&mut self, address: Address) -> bool {
        if !is_of_a_machine(&address) {
            return false;
        }
        if self.told >= ADDRESSES_MAX as u32 {
            self.faults |= TOO_MUCH;
            return false;
        }
        self.addresses[(self.told & ADDRESSES_MASK) as usize] = address;
        self.told += 1;
        false
    }

    /// Notes the present name.
    #[inline(always)]
    fn name(&mut self) {
        for index in 0..NAMES_MAX {
            if (index as u32) < self.named && self.names[index] == self.hash {
                return;
            }
        }
        if self.named >= NAMES_MAX as u32 {
            self.faults |= TOO_MUCH;
            return;
        }
        self.names[(self.named & NAMES_MASK) as usize] = self.hash;
        self.named += 1;
    }

    /// A name server that has more to say than fits says so, and where it stops is up to it.
    #[inline(always)]
    fn ends_early(&mut self) -> bool {
        if self.truncated != 0 { self.finish() } else { self.fault(BROKEN) }
    }

    #[inline(always)]
    fn fault(&mut self, fault: u32) -> bool {
        self.faults |= fault;
        self.finish()
    }

    #[inline(always)]
    fn finish(&mut self) -> bool {
        self.read = 1;
        true
    }

    #[inline(always)]
    fn byte(&self, at: u32) -> u8 {
        self.bytes[(at & MESSAGE_MASK) as usize]
    }

    #[inline(always)]
    fn word(&self, at: u32) -> u32 {
        (self.byte(at) as u32) << 8 | self.byte(at + 1) as u32
    }
}

impl Default for Reading {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether an address can be another machine's: an answer must not make the loopback address an API server's.
#[expect(clippy::needless_range_loop, reason = "an iterator would be more than the verifier has to look at")]
#[inline(always)]
fn is_of_a_machine(address: &Address) -> bool {
    let mut high = 0;
    for index in 0..10 {
        high |= address[index];
    }
    let [b10, b11, b12, b13, b14, b15] =
        [address[10], address[11], address[12], address[13], address[14], address[15]];
    if high == 0 && b10 == 0xff && b11 == 0xff {
        // 127.0.0.0/8, 0.0.0.0, 224.0.0.0/4.
        return b12 != 127 && b12 >> 4 != 14 && (b12 | b13 | b14 | b15) != 0;
    }
    // ::, ::1, ff00::/8.
    let low = b10 | b11 | b12 | b13 | b14;
    !(high == 0 && low == 0 && b15 <= 1) && address[0] != 0xff
}

/// Why an answer of a name server was kept from a pod.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptAnswer {
    /// It is longer than a name server's, or several datagrams in one.
    TooLong = 1,
    /// The pod has had as much of them read as is read for one.
    TooMany = 2,
    /// It is about a configured name, and cannot be read.
    Unreadable = 3,
    /// It is about a configured name, and its socket has asked nobody.
    NotAskedFor = 4,
    /// There is no room to note what it tells.
    NoRoom = 5,
}

/// Above a protocol's number.
const KEPT_ANSWER_SHIFT: u32 = 16;

impl KeptAnswer {
    /// What stands for the protocol in the notice.
    #[inline(always)]
    pub const fn with(self, protocol: u32) -> u32 {
        protocol | (self as u32) << KEPT_ANSWER_SHIFT
    }

    /// The protocol, and why, from the notice.
    pub const fn from_notice(protocol: u32) -> (u32, Option<Self>) {
        let why = match protocol >> KEPT_ANSWER_SHIFT {
            1 => Some(Self::TooLong),
            2 => Some(Self::TooMany),
            3 => Some(Self::Unreadable),
            4 => Some(Self::NotAskedFor),
            5 => Some(Self::NoRoom),
            _ => None,
        };
        (protocol & ((1 << KEPT_ANSWER_SHIFT) - 1), why)
    }
}

#[cfg(test)]
mod tests {
    use super::{MESSAGE_BYTES_MAX, Outcome, Reading, name_hash};

    const NAME: &str = "api.example.test";

    fn labels(name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        for label in name.split('.').filter(|label| !label.is_empty()) {
            bytes.push(label.len() as u8);
            bytes.extend(label.bytes());
        }
        bytes.push(0);
        bytes
    }

    /// An answer to a question for `question`, with records of an owner as it is written, a type and data.
    fn message(question: &str, records: &[(&[u8], u16, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0, 7, 0x81, 0x80, 0, 1, 0, records.len() as u8, 0, 0, 0, 0];
        bytes.extend(labels(question));
        bytes.extend([0, 1, 0, 1]);
        for (owner, kind, data) in records {
            bytes.extend(*owner);
            bytes.extend(kind.to_be_bytes());
            bytes.extend([0, 1, 0, 0, 0, 60]);
            bytes.extend((data.len() as u16).to_be_bytes());
            bytes.extend(*data);
        }
        bytes
    }

    fn read(message: &[u8], stream: bool) -> (Outcome, Vec<[u8; 16]>) {
        let mut reading = Reading::new();
        let outcome = reading.read(message, stream, |hash| hash == name_hash(NAME));
        (outcome, reading.addresses[..reading.told as usize].to_vec())
    }

    fn mapped(last: [u8; 4]) -> [u8; 16] {
        let mut address = [0; 16];
        (address[10], address[11]) = (0xff, 0xff);
        address[12..].copy_from_slice(&last);
        address
    }

    const POINTER: &[u8] = &[0xc0, 12];
    const V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];

    #[test]
    fn a_configured_name_is_known_however_it_is_written() {
        for question in [NAME, "API.Example.TEST"] {
            let answer = message(question, &[(POINTER, 1, &[192, 0, 2, 1]), (POINTER, 28, &V6)]);
            assert_eq!(read(&answer, false), (Outcome::Told, vec![mapped([192, 0, 2, 1]), V6]));
        }
        let whole = message("other.example.test", &[(&labels("api.EXAMPLE.test"), 1, &[192, 0, 2, 1])]);
        assert_eq!(read(&whole, false).0, Outcome::Told, "as an alias' target, not compressed");
        // `api` before a pointer to the last two labels of the question.
        let partly = message("other.example.test", &[(b"\x03api\xc0\x12", 1, &[192, 0, 2, 1])]);
        assert_eq!(read(&partly, false).0, Outcome::Told, "compressed in part");
        for other in ["example.test", "xapi.example.test", "api.example.test.more", "a.pi.example.test"] {
            let answer = message(other, &[(POINTER, 1, &[192, 0, 2, 1])]);
            assert_eq!(read(&answer, false).0, Outcome::Pass, "{other}");
        }
    }

    #[test]
    fn what_tells_no_address_of_another_machine_passes() {
        for data in [[127, 0, 0, 1], [0; 4], [224, 0, 0, 1]] {
            assert_eq!(read(&message(NAME, &[(POINTER, 1, &data)]), false).0, Outcome::Pass, "{data:?}");
        }
        assert_eq!(read(&message(NAME, &[]), false).0, Outcome::Pass);
        let mut question = message(NAME, &[(POINTER, 1, &[192, 0, 2, 1])]);
        question[2] = 1;
        assert_eq!(read(&question, false).0, Outcome::Pass, "a question");
        assert_eq!(read(&[0; 11], false).0, Outcome::Pass, "no message");
        assert_eq!(read(&[], false).0, Outcome::Pass);
    }

    #[test]
    fn what_is_about_a_configured_name_and_cannot_be_read_is_refused() {
        let answer = message(NAME, &[(POINTER, 1, &[192, 0, 2, 1])]);
        for length in 12 + labels(NAME).len()..answer.len() {
            assert_eq!(read(&answer[..length], false).0, Outcome::Refuse, "cut off after {length} bytes");
            let mut truncated = answer[..length].to_vec();
            truncated[2] |= 2;
            assert_eq!(read(&truncated, false).0, Outcome::Pass, "it says so, and nothing else");
        }
        let forward: &[u8] = &[0xc0, 0xff];
        assert_eq!(read(&message(NAME, &[(forward, 1, &[192, 0, 2, 1])]), false).0, Outcome::Refuse);
        assert_eq!(read(&message(NAME, &[(POINTER, 65, &[0; 20])]), false).0, Outcome::Refuse, "hints");
        let many = vec![(POINTER, 1_u16, &[192_u8, 0, 2, 1][..]); 65];
        assert_eq!(read(&message(NAME, &many[..64]), false).1.len(), 64);
        assert_eq!(read(&message(NAME, &many), false).0, Outcome::Refuse, "too many");
        let long = vec![0; MESSAGE_BYTES_MAX + 1];
        assert_eq!(read(&long, false).0, Outcome::Refuse, "too long");
        // A name without an end: each pointer to a label before it that leads to the pointer again.
        let mut endless = message("other.test", &[]);
        endless[7] = 1;
        let start = endless.len() as u8;
        endless.extend([1, b'a', 0xc0, start]);
        endless.extend([0; 10]);
        assert_eq!(read(&endless, false).0, Outcome::Refuse, "too many steps");
    }

    #[test]
    fn a_stream_has_each_message_behind_its_length() {
        let framed = |message: &[u8]| [&(message.len() as u16).to_be_bytes(), message].concat();
        let other = framed(&message("other.test", &[(POINTER, 1, &[192, 0, 2, 9])]));
        let named = framed(&message(NAME, &[(POINTER, 1, &[192, 0, 2, 1])]));
        assert_eq!(read(&named, true), (Outcome::Told, vec![mapped([192, 0, 2, 1])]));
        assert_eq!(read(&[other.clone(), named.clone()].concat(), true).0, Outcome::Told);
        assert_eq!(read(&other, true).0, Outcome::Pass);
        assert_eq!(read(&named[..named.len() - 1], true).0, Outcome::Refuse, "in two segments");
        assert_eq!(read(&other[..other.len() - 1], true).0, Outcome::Pass, "of no interest");
    }
}
