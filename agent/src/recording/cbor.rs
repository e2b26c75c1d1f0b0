//! CBOR as the API server speaks it where it is asked to, as JSON: what masks and names read. Sans-IO.
//!
//! Kubernetes writes texts as byte strings, and what is base64 in JSON as byte strings with tag 22 (k8s.io/apimachinery
//! `pkg/runtime/serializer/cbor/internal/modes`). What it would refuse (names given twice, other tags) is not read here either.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Number, Value};

use super::bounded::{Budget, Exceeded};

/// Deepest nesting; Kubernetes reads no deeper.
const DEPTH_MAX: u32 = 64;

/// "This is CBOR": before every object.
const SELF_DESCRIBED: u64 = 55_799;
/// The first byte of that.
pub(super) const FIRST: u8 = 0xd9;
/// A byte string that JSON has in base64.
const BASE64: u64 = 22;

/// These bytes are no CBOR that Kubernetes would read, or too much of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl From<Exceeded> for Malformed {
    fn from(Exceeded: Exceeded) -> Self {
        Self
    }
}

/// A body in CBOR as JSON, which is recorded in its place; none: it is none, or nothing that the API server would read.
pub(super) fn as_json(content_type: Option<&str>, body: &[u8]) -> Option<Vec<u8>> {
    let essence = content_type?.split(';').next()?.trim().to_ascii_lowercase();
    if essence != "application/cbor" && !essence.ends_with("+cbor") {
        return None;
    }
    serde_json::to_vec(&decode(body).ok()?).ok()
}

/// Whether a stream of this type has one document after the other, as a watch in CBOR has its events.
pub(super) fn is_sequence(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default();
    essence.trim().eq_ignore_ascii_case("application/cbor-seq")
}

/// Documents that follow one another (RFC 8742), as lines of JSON.
pub(super) struct Sequence {
    /// Longest document.
    bytes_max: usize,
    begun: Vec<u8>,
    /// How far it is known of what has begun where it ends.
    scan: Scan,
}

impl std::fmt::Debug for Sequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sequence({} bytes)", self.begun.len())
    }
}

impl Sequence {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, begun: Vec::new(), scan: Scan::default() }
    }

    /// Takes the next bytes: documents that end in them, and how many bytes are left out if it cannot go on from there.
    pub(super) fn lines(&mut self, bytes: &[u8]) -> (Vec<u8>, Result<(), u64>) {
        self.begun.extend_from_slice(bytes);
        let (mut lines, mut from) = (Vec::new(), 0);
        loop {
            let rest = &self.begun[from..];
            let length = match self.scan.end(rest) {
                Ok(Some(length)) => length,
                Ok(None) if rest.len() <= self.bytes_max => break,
                Ok(None) | Err(Malformed) => return (lines, Err(self.give_up(from))),
            };
            let json = decode(&rest[..length]).ok().and_then(|value| serde_json::to_vec(&value).ok());
            let Some(json) = json.filter(|_| length <= self.bytes_max) else {
                return (lines, Err(self.give_up(from)));
            };
            lines.extend_from_slice(&json);
            lines.push(b'\n');
            from += length;
            self.scan = Scan::default();
        }
        self.begun.drain(..from);
        (lines, Ok(()))
    }

    fn give_up(&mut self, from: usize) -> u64 {
        let left = self.begun.len() - from;
        self.begun = Vec::new();
        self.scan = Scan::default();
        left as u64
    }

    /// The stream is over, or goes on elsewhere: bytes of a document that is not whole.
    pub(super) fn finish(&mut self) -> u64 {
        self.give_up(0)
    }
}

/// Looks for the end of a document whose bytes come in pieces. Goes on from where it was: a document that comes byte by byte
/// costs no more than one that comes at once.
#[derive(Default)]
struct Scan {
    /// Bytes of the document that it has passed.
    at: usize,
    /// What it is in, the innermost last: at most [`DEPTH_MAX`].
    open: Vec<Open>,
}

/// A list, map, tag or string in pieces that has not ended.
enum Open {
    /// Ends after so many more.
    Of(u64),
    /// Ends with a break.
    Indefinite,
}

impl Scan {
    /// Length of the document that `bytes` begin with, which are those of before and more; none: it does not end in them.
    fn end(&mut self, bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        loop {
            let rest = bytes.get(self.at..).unwrap_or_default();
            let mut reader = Reader { rest, budget: Budget::default(), is_short: false };
            let opened = match self.open.last() {
                Some(Open::Indefinite) if reader.breaks() => {
                    self.open.pop();
                    None
                }
                _ => match reader.begin() {
                    Ok(opened) => opened,
                    Err(Malformed) if reader.is_short => return Ok(None),
                    Err(Malformed) => return Err(Malformed),
                },
            };
            self.at = bytes.len() - reader.rest.len();
            if let Some(opened) = opened {
                if self.open.len() >= DEPTH_MAX as usize {
                    return Err(Malformed);
                }
                self.open.push(opened);
            } else if self.ended() {
                return Ok(Some(self.at));
            }
        }
    }

    /// Something has ended; whether that was the document.
    fn ended(&mut self) -> bool {
        while let Some(Open::Of(more)) = self.open.last_mut() {
            *more -= 1;
            if *more > 0 {
                return false;
            }
            self.open.pop();
        }
        self.open.is_empty()
    }
}

/// One document, all of `body`.
fn decode(body: &[u8]) -> Result<Value, Malformed> {
    let mut reader = Reader { rest: body, budget: Budget::default(), is_short: false };
    let value = reader.value(0)?;
    if reader.rest.is_empty() { Ok(value) } else { Err(Malformed) }
}

struct Reader<'a> {
    rest: &'a [u8],
    budget: Budget,
    /// It ended before what it should have.
    is_short: bool,
}

/// How long what follows is.
#[derive(Clone, Copy)]
enum Length {
    Of(u64),
    /// Up to a break.
    Indefinite,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: u64) -> Result<&'a [u8], Malformed> {
        let length = usize::try_from(length).map_err(|_| Malformed)?;
        let Some((taken, rest)) = self.rest.split_at_checked(length) else {
            self.is_short = true;
            return Err(Malformed);
        };
        self.rest = rest;
        Ok(taken)
    }

    /// Passes over what begins next: all of it, or up to the first of what it holds.
    fn begin(&mut self) -> Result<Option<Open>, Malformed> {
        let (major, _, length) = self.head()?;
        match (major, length) {
            (2 | 3, Length::Of(length)) => self.take(length).map(|_| None),
            (2..6, Length::Indefinite) => Ok(Some(Open::Indefinite)),
            (4 | 5, Length::Of(0)) | (0 | 1 | 7, Length::Of(_)) => Ok(None),
            // What is short ends it, however many entries it says.
            (4, Length::Of(entries)) => Ok(Some(Open::Of(entries))),
            (5, Length::Of(entries)) => Ok(Some(Open::Of(entries.saturating_mul(2)))),
            (6, Length::Of(_)) => Ok(Some(Open::Of(1))),
            _ => Err(Malformed),
        }
    }

    /// The major type of what comes next, the lower bits of its first byte, and its argument.
    fn head(&mut self) -> Result<(u8, u8, Length), Malformed> {
        let first = self.take(1)?[0];
        let (major, bits) = (first >> 5, first & 0x1f);
        let bytes = match bits {
            0..24 => return Ok((major, bits, Length::Of(bits.into()))),
            24..28 => self.take(1 << (bits - 24))?,
            31 => return Ok((major, bits, Length::Indefinite)),
            _ => return Err(Malformed),
        };
        let argument = bytes.iter().fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
        Ok((major, bits, Length::Of(argument)))
    }

    fn value(&mut self, depth: u32) -> Result<Value, Malformed> {
        if depth > DEPTH_MAX {
            return Err(Malformed);
        }
        let (major, bits, length) = self.head()?;
        self.budget.value(0)?;
        match (major, length) {
            (0, Length::Of(number)) => Ok(number.into()),
            (1, Length::Of(number)) => {
                let number = i64::try_from(number).map_err(|_| Malformed)?;
                Ok((-1 - number).into())
            }
            (2 | 3, length) => self.text(major, length).map(Value::String),
            (4, length) => self.list(length, depth),
            (5, length) => self.map(length, depth),
            (6, Length::Of(SELF_DESCRIBED)) => self.value(depth + 1),
            (6, Length::Of(BASE64)) => match self.head()? {
                (2, _, length) => self.bytes(2, length).map(|bytes| STANDARD.encode(bytes).into()),
                _ => Err(Malformed),
            },
            (7, Length::Of(number)) => simple(bits, number),
            _ => Err(Malformed),
        }
    }

    /// A string of bytes or characters, in one or more pieces.
    fn bytes(&mut self, major: u8, length: Length) -> Result<Vec<u8>, Malformed> {
        if let Length::Of(length) = length {
            return Ok(self.take(length)?.to_vec());
        }
        let mut all = Vec::new();
        while !self.breaks() {
            match self.head()? {
                (of, _, Length::Of(length)) if of == major => all.extend_from_slice(self.take(length)?),
                _ => return Err(Malformed),
            }
        }
        Ok(all)
    }

    fn text(&mut self, major: u8, length: Length) -> Result<String, Malformed> {
        String::from_utf8(self.bytes(major, length)?).map_err(|_| Malformed)
    }

    fn list(&mut self, length: Length, depth: u32) -> Result<Value, Malformed> {
        let mut entries = Vec::new();
        while self.goes_on(length, entries.len()) {
            entries.push(self.value(depth + 1)?);
        }
        Ok(Value::Array(entries))
    }

    fn map(&mut self, length: Length, depth: u32) -> Result<Value, Malformed> {
        let mut entries = Map::new();
        while self.goes_on(length, entries.len()) {
            let (major, _, length) = self.head()?;
            if !matches!(major, 2 | 3) {
                return Err(Malformed);
            }
            let name = self.text(major, length)?;
            self.budget.entry(entries.len(), name.len())?;
            if entries.insert(name, self.value(depth + 1)?).is_some() {
                return Err(Malformed);
            }
        }
        Ok(Value::Object(entries))
    }

    /// Whether another entry follows. Each takes a byte at least, so a length that lies ends with the input.
    fn goes_on(&mut self, length: Length, read: usize) -> bool {
        match length {
            Length::Of(length) => (read as u64) < length,
            Length::Indefinite => !self.breaks(),
        }
    }

    fn breaks(&mut self) -> bool {
        let rest = self.rest.strip_prefix(&[0xff]);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }
}

/// `false`, `true`, nothing, or a number with a fraction.
fn simple(bits: u8, number: u64) -> Result<Value, Malformed> {
    let float = match (bits, u32::try_from(number)) {
        (20, _) => return Ok(Value::Bool(false)),
        (21, _) => return Ok(Value::Bool(true)),
        (22, _) => return Ok(Value::Null),
        (26, Ok(bits)) => f64::from(f32::from_bits(bits)),
        (27, _) => f64::from_bits(number),
        // Kubernetes writes no halves.
        _ => return Err(Malformed),
    };
    Number::from_f64(float).map(Value::Number).ok_or(Malformed)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{Malformed, Sequence, decode};

    /// As Kubernetes writes: texts as byte strings.
    pub(in super::super) fn encoded(value: &Value) -> Vec<u8> {
        let head = |major: u8, number: u64| {
            let mut out = vec![major << 5 | 27];
            out.extend(number.to_be_bytes());
            out
        };
        match value {
            Value::Null => vec![0xf6],
            Value::Bool(is) => vec![0xf4 + u8::from(*is)],
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => head(0, number),
                (_, Some(number)) => head(1, (-1 - number) as u64),
                _ => [&[0xfb][..], &number.as_f64().unwrap().to_be_bytes()].concat(),
            },
            Value::String(text) => [head(2, text.len() as u64), text.clone().into_bytes()].concat(),
            Value::Array(list) => {
                [head(4, list.len() as u64), list.iter().flat_map(encoded).collect()].concat()
            }
            Value::Object(map) => {
                let entries =
                    map.iter().flat_map(|(name, value)| [encoded(&json!(name)), encoded(value)].concat());
                [head(5, map.len() as u64), entries.collect()].concat()
            }
        }
    }

    #[test]
    fn what_kubernetes_writes_is_read_and_what_it_refuses_is_not() {
        let value = json!({"kind": "Pod", "list": [1, -7, 1.5, true, null, {"a": "b"}]});
        let body = [&[0xd9, 0xd9, 0xf7][..], &encoded(&value)].concat();
        assert_eq!(decode(&body), Ok(value));
        assert_eq!(decode(b"\xd6\x43abc"), Ok(json!("YWJj")));
        assert_eq!(decode(b"\x9f\x01\x5f\x41a\x41b\xff\xff"), Ok(json!([1, "ab"])));
        for body in [
            &b""[..],
            b"\x41",
            b"\xa2\x41a\x01\x41a\x02",
            b"\xa1\x01\x02",
            b"\x41\xff",
            b"\x01\x02",
            b"\xc1\x01",
            b"\xf9\x3c\x00",
            b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            &[0x81; 100],
            b"\xff",
            b"\x5f\x61a\xff",
        ] {
            assert_eq!(decode(body), Err(Malformed), "{body:x?}");
        }
    }

    fn lines(pieces: &[&[u8]], bytes_max: usize) -> (String, Option<u64>, u64) {
        let (mut sequence, mut all, mut broken) = (Sequence::new(bytes_max), Vec::new(), None);
        for piece in pieces {
            let (lines, read) = sequence.lines(piece);
            all.extend(lines);
            broken = broken.or(read.err());
            assert!(sequence.begun.len() <= bytes_max, "memory is bounded");
        }
        (String::from_utf8(all).unwrap(), broken, sequence.finish())
    }

    #[test]
    fn documents_of_a_sequence_become_lines_however_it_is_cut() {
        let one = json!({"type": "ADDED", "object": {"kind": "Pod", "list": [1, -7, 1.5, null, true]}});
        let documents = [
            &[0xd9, 0xd9, 0xf7][..],
            &encoded(&one),
            b"\x9f\x01\x5f\x41a\x41b\xff\xff",
            b"\xd6\x43abc",
            &encoded(&one),
        ]
        .concat();
        let expected = format!("{one}\n[1,\"ab\"]\n\"YWJj\"\n{one}\n");
        for at in 0..documents.len() {
            let (before, after) = documents.split_at(at);
            assert_eq!(lines(&[before, after], 200), (expected.clone(), None, 0), "{at}");
        }
        let single: Vec<_> = documents.chunks(1).collect();
        assert_eq!(lines(&single, 200), (expected, None, 0));
        // One that is not whole, one that is none, one that is too long.
        assert_eq!(lines(&[b"\x01\x42a"], 200), ("1\n".into(), None, 2));
        assert_eq!(lines(&[b"\x01\xff\x02"], 200), ("1\n".into(), Some(2), 0));
        assert_eq!(lines(&[b"\x01\x58\xff", &[0; 9]], 10), ("1\n".into(), Some(11), 0));
        assert_eq!(lines(&[&encoded(&one)], 10), (String::new(), Some(encoded(&one).len() as u64), 0));
        assert_eq!(lines(&[b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x01"], 200).2, 10);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_what_is_written_is_read(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), text in ".{0,20}", number: i64, float in -1e9..1e9,
        ) {
            let _ = decode(&bytes);
            let value = json!({"a": [text, number, float, {"b": null}]});
            prop_assert_eq!(decode(&encoded(&value)), Ok(value));
        }
    }
}
