//! A frame as a Kafka message: CloudEvents 1.0 in the binary content mode of its Kafka binding.
//!
//! The value is the frame's value, byte for byte; the envelope becomes the key and headers. The way back gives the
//! same frame, but for the number of its group commit, which means something only on the disk that it was for.
//! `docs/recording-format.md` describes the same for readers in other languages; keep both in step. Sans-IO, never
//! panics on any bytes.

use std::borrow::Cow;

use jiff::Timestamp;
use uuid::Uuid;

use crate::{
    checkpoint::Checkpoint,
    envelope::{ENVELOPE_BYTES_MAX, Envelope},
    frame::{Frame, FrameType, VALUE_BYTES_MAX},
};

/// Version of CloudEvents.
pub const SPEC_VERSION: &str = "1.0";

/// Most bytes of a message with key and headers: what a topic's `max.message.bytes` must allow at least.
pub const MESSAGE_BYTES_MAX: usize = VALUE_BYTES_MAX + 16 * 1024;

/// Most bytes of a key or of a header that is read.
pub const HEADER_BYTES_MAX: usize = ENVELOPE_BYTES_MAX;

/// Most headers that are looked at: Weir writes ten, and others (mirrors, tracing) may add theirs.
pub const HEADERS_MAX: usize = 64;

const SPEC_VERSION_HEADER: &str = "ce_specversion";
const ID: &str = "ce_id";
const SOURCE: &str = "ce_source";
const TYPE: &str = "ce_type";
const TIME: &str = "ce_time";
const CONTENT_TYPE: &str = "content-type";
const FLAGS: &str = "ce_weirflags";
const KEY_ID: &str = "ce_weirkeyid";
const VERIFIER: &str = "ce_weirverifier";

/// The headers that are read; the others are passed over.
const KNOWN: [&str; 8] = [SPEC_VERSION_HEADER, ID, SOURCE, TYPE, TIME, FLAGS, KEY_ID, VERIFIER];

/// CloudEvents type of a wrapped key.
const WRAPPED_KEY_TYPE: &str = "weir.v1.contentKey";

/// What stands between epoch and size in the id of a checkpoint.
const CHECKPOINT: &str = "checkpoint";

/// A message that is to be published. Borrows from the frame what it can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Kafka key: the session's id. None for events of the agent itself and for checkpoints.
    pub key: Option<&'a str>,
    /// Names and values of the headers.
    pub headers: Vec<(&'static str, Cow<'a, str>)>,
    /// The frame's value.
    pub value: &'a [u8],
}

impl<'a> Message<'a> {
    /// Makes the message of a frame. `verifier` is what the epoch's `node.pub` holds; it goes with checkpoints, so that
    /// a reader needs nothing but the topic.
    pub fn of_frame(frame: &'a Frame<'_>, verifier: Option<&'a str>) -> Self {
        let envelope = &frame.envelope;
        let (id, content_type) = match frame.frame_type {
            FrameType::Event => (Cow::Borrowed(envelope.id.as_str()), "application/json"),
            // A checkpoint's own id is that of the event that follows it.
            FrameType::Checkpoint => {
                let epoch = envelope.id.split('/').next().unwrap_or_default();
                let time = signed_at(frame.value).map_or_else(String::new, |time| format!("/{time}"));
                let id = format!("{epoch}/{CHECKPOINT}/{}{time}", frame.sequence);
                (id.into(), "text/plain; charset=utf-8")
            }
        };
        let mut headers = Vec::with_capacity(KNOWN.len() + 1);
        headers.extend([
            (SPEC_VERSION_HEADER, SPEC_VERSION.into()),
            (ID, id),
            (SOURCE, envelope.source.as_str().into()),
            (TYPE, envelope.event_type.as_str().into()),
            (TIME, rfc3339(envelope.time_unix_us).into()),
            (CONTENT_TYPE, content_type.into()),
        ]);
        if envelope.flags != 0 {
            headers.push((FLAGS, envelope.flags.to_string().into()));
        }
        if envelope.key_id != 0 {
            headers.push((KEY_ID, envelope.key_id.to_string().into()));
        }
        if let (FrameType::Checkpoint, Some(verifier)) = (frame.frame_type, verifier) {
            headers.push((VERIFIER, verifier.trim().into()));
        }
        let key = Some(envelope.key.as_str()).filter(|key| !key.is_empty());
        Self { key, headers, value: frame.value }
    }

    /// Makes the message of a wrapped key: `key` is its Kafka key, by which a compacted topic keeps the last and lets go of one
    /// that was erased; `source` is that of the epoch's envelopes.
    pub fn of_wrapped_key(key: &'a str, source: &'a str, time_unix_us: i64, value: &'a [u8]) -> Self {
        let headers = vec![
            (SPEC_VERSION_HEADER, SPEC_VERSION.into()),
            (ID, key.into()),
            (SOURCE, source.into()),
            (TYPE, WRAPPED_KEY_TYPE.into()),
            (TIME, rfc3339(time_unix_us).into()),
            (CONTENT_TYPE, "application/json".into()),
        ];
        Self { key: Some(key), headers, value }
    }

    /// Its length, as limits on memory count it.
    pub fn bytes(&self) -> usize {
        let headers = self.headers.iter().map(|(name, value)| name.len() + value.len());
        self.value.len() + self.key.map_or(0, str::len) + headers.sum::<usize>()
    }
}

/// When a checkpoint was signed: while nothing is recorded there are several over as many events.
fn signed_at(note: &[u8]) -> Option<u64> {
    let checkpoint = Checkpoint::parse_unverified(std::str::from_utf8(note).ok()?).ok()?;
    checkpoint.time_unix_us.and_then(|time| u64::try_from(time).ok())
}

/// RFC 3339 in UTC with microseconds. A clock outside of the years that it can spell is set to the nearest one.
pub fn rfc3339(unix_us: i64) -> String {
    let nearest = if unix_us < 0 { Timestamp::MIN } else { Timestamp::MAX };
    format!("{:.6}", Timestamp::from_microsecond(unix_us).unwrap_or(nearest))
}

/// The way back.
pub(crate) fn unix_us_of(rfc3339: &str) -> Option<i64> {
    rfc3339.parse::<Timestamp>().ok().map(Timestamp::as_microsecond)
}

/// What a message holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// An event.
    Event {
        /// Its index in the log of its epoch.
        sequence: u64,
    },
    /// A signed checkpoint.
    Checkpoint {
        /// Number of events before it.
        size: u64,
        /// When it was signed, in microseconds since the Unix epoch; none if an earlier version signed it.
        signed_unix_us: Option<u64>,
    },
}

impl Kind {
    /// The type of its frame.
    pub fn frame_type(self) -> FrameType {
        match self {
            Self::Event { .. } => FrameType::Event,
            Self::Checkpoint { .. } => FrameType::Checkpoint,
        }
    }

    /// The sequence of its frame.
    pub fn sequence(self) -> u64 {
        match self {
            Self::Event { sequence } => sequence,
            Self::Checkpoint { size, .. } => size,
        }
    }
}

/// A message that was read. Messages of the same epoch and kind are the same message, delivered again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received<'a> {
    /// The agent's process epoch.
    pub epoch: Uuid,
    /// What it holds.
    pub kind: Kind,
    /// The envelope of its frame.
    pub envelope: Envelope,
    /// The value of its frame.
    pub value: &'a [u8],
    /// The key that its checkpoint claims to be signed with (`name+hash+base64`). A claim: whoever may write to the
    /// topic can make one.
    pub verifier: Option<String>,
}

/// Why a message is not one of Weir's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A header is missing.
    #[error("header {name} is missing; did Weir write this message?")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// A header is there twice.
    #[error("header {name} is there more than once")]
    Repeated {
        /// Its name.
        name: &'static str,
    },
    /// Key, header or value is longer than Weir makes them.
    #[error("{name} has {bytes} bytes, more than Weir writes")]
    TooLong {
        /// `key`, `value` or the header's name.
        name: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// More headers than are looked at.
    #[error("message has more than {HEADERS_MAX} headers")]
    TooManyHeaders,
    /// Key or header is not UTF-8.
    #[error("{name} is not UTF-8")]
    NotText {
        /// `key` or the header's name.
        name: &'static str,
    },
    /// A header does not say what it must.
    #[error("header {name} is not {expected}")]
    Header {
        /// Its name.
        name: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// The message has no value.
    #[error("message has no value")]
    NoValue,
}

impl<'a> Received<'a> {
    /// Reads a message: its key, its headers (a header may have no value) and its value.
    ///
    /// # Errors
    /// It is not a message that a Weir agent wrote.
    pub fn parse<'h>(
        key: Option<&[u8]>,
        headers: impl IntoIterator<Item = (&'h str, Option<&'h [u8]>)>,
        value: Option<&'a [u8]>,
    ) -> Result<Self, MessageError> {
        let headers = Headers::collect(headers)?;
        if headers.required(SPEC_VERSION_HEADER)? != SPEC_VERSION {
            return Err(MessageError::Header { name: SPEC_VERSION_HEADER, expected: SPEC_VERSION });
        }
        let (epoch, kind) = identity(headers.required(ID)?)?;
        let value = value.ok_or(MessageError::NoValue)?;
        if value.len() > VALUE_BYTES_MAX {
            return Err(MessageError::TooLong { name: "value", bytes: value.len() });
        }
        let time_unix_us = unix_us_of(headers.required(TIME)?)
            .ok_or(MessageError::Header { name: TIME, expected: "a time as in RFC 3339" })?;
        let envelope = Envelope {
            key: text("key", key.unwrap_or_default())?.to_owned(),
            id: format!("{epoch}/{}", kind.sequence()),
            event_type: headers.required(TYPE)?.to_owned(),
            source: headers.required(SOURCE)?.to_owned(),
            time_unix_us,
            flags: headers.number(FLAGS)?,
            key_id: headers.number(KEY_ID)?,
        };
        let verifier = headers.of(VERIFIER).map(str::to_owned);
        Ok(Self { epoch, kind, envelope, value, verifier })
    }
}

/// Epoch and kind of an id; it must be spelt as Weir spells it, so that equal messages have equal ids.
fn identity(id: &str) -> Result<(Uuid, Kind), MessageError> {
    let wrong = MessageError::Header { name: ID, expected: "EPOCH/SEQUENCE or EPOCH/checkpoint/SIZE/TIME" };
    let mut parts = id.split('/');
    let (epoch, second, third, fourth) = (parts.next(), parts.next(), parts.next(), parts.next());
    let epoch = epoch.and_then(|epoch| {
        let parsed = Uuid::try_parse(epoch).ok()?;
        (parsed.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == epoch).then_some(parsed)
    });
    let checkpoint = |size, signed_unix_us| Kind::Checkpoint { size, signed_unix_us };
    let kind = match (second, third, fourth) {
        _ if parts.next().is_some() => None,
        (Some(sequence), None, None) => decimal(sequence).map(|sequence| Kind::Event { sequence }),
        (Some(CHECKPOINT), Some(size), None) => decimal(size).map(|size| checkpoint(size, None)),
        (Some(CHECKPOINT), Some(size), Some(time)) => {
            decimal(size).zip(decimal(time)).map(|(size, time)| checkpoint(size, Some(time)))
        }
        _ => None,
    };
    epoch.zip(kind).ok_or(wrong)
}

/// A number without sign and leading zeros.
fn decimal(text: &str) -> Option<u64> {
    let canonical = text == "0" || text.starts_with(|first: char| ('1'..='9').contains(&first));
    text.parse().ok().filter(|_| canonical)
}

fn text<'t>(name: &'static str, bytes: &'t [u8]) -> Result<&'t str, MessageError> {
    if bytes.len() > HEADER_BYTES_MAX {
        return Err(MessageError::TooLong { name, bytes: bytes.len() });
    }
    std::str::from_utf8(bytes).map_err(|_| MessageError::NotText { name })
}

/// The values of [`KNOWN`], in that order.
struct Headers<'h>([Option<&'h str>; KNOWN.len()]);

impl<'h> Headers<'h> {
    fn collect(headers: impl IntoIterator<Item = (&'h str, Option<&'h [u8]>)>) -> Result<Self, MessageError> {
        let mut found = [None; KNOWN.len()];
        for (count, (name, value)) in headers.into_iter().enumerate() {
            if count == HEADERS_MAX {
                return Err(MessageError::TooManyHeaders);
            }
            let Some(index) = KNOWN.iter().position(|known| *known == name) else { continue };
            let name = KNOWN[index];
            if found[index].replace(text(name, value.unwrap_or_default())?).is_some() {
                return Err(MessageError::Repeated { name });
            }
        }
        Ok(Self(found))
    }

    fn of(&self, name: &str) -> Option<&'h str> {
        KNOWN.iter().zip(self.0).find_map(|(known, value)| value.filter(|_| *known == name))
    }

    fn required(&self, name: &'static str) -> Result<&'h str, MessageError> {
        self.of(name).ok_or(MessageError::Missing { name })
    }

    /// A number that is 0 where its header is not there.
    fn number<N: TryFrom<u64> + Default>(&self, name: &'static str) -> Result<N, MessageError> {
        let Some(text) = self.of(name) else { return Ok(N::default()) };
        let number = decimal(text).and_then(|number| N::try_from(number).ok());
        number.ok_or(MessageError::Header { name, expected: "a decimal number in its range" })
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::{HEADER_BYTES_MAX, HEADERS_MAX, Kind, Message, MessageError, Received};
    use crate::{
        checkpoint::Checkpoint,
        envelope::Envelope,
        frame::{Frame, FrameType, VALUE_BYTES_MAX},
        merkle::{Tree, leaf_hash},
    };

    const EPOCH: Uuid = Uuid::from_u128(0x0197_0000_0000_7000_8000_0000_0000_0001);
    const KEY: &str = "weir/node-1+c979f59b+AYqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c\n";

    fn frame(frame_type: FrameType, sequence: u64, value: &[u8]) -> Frame<'_> {
        let envelope = Envelope {
            key: if frame_type == FrameType::Event { "session-1".into() } else { String::new() },
            id: format!("{EPOCH}/{sequence}"),
            event_type: "weir.v1.gap".into(),
            source: format!("/weir/node-1/{EPOCH}"),
            time_unix_us: 1_700_000_000_000_001,
            flags: 0,
            key_id: 0,
        };
        Frame { frame_type, sequence, commit: 0, leaf_hash: leaf_hash(value), envelope, value }
    }

    fn parse<'a>(message: &'a Message<'_>) -> Result<Received<'a>, MessageError> {
        let headers = message.headers.iter().map(|(name, value)| (*name, Some(value.as_bytes())));
        Received::parse(message.key.map(str::as_bytes), headers, Some(message.value))
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Message<'_>), expected: &str) {
        let frame = frame(FrameType::Event, 7, b"{}");
        let mut message = Message::of_frame(&frame, None);
        change(&mut message);
        assert_eq!(parse(&message).unwrap_err().to_string(), expected);
    }

    #[test]
    fn the_headers_of_an_event_are_golden() {
        let frame = frame(FrameType::Event, 300, b"{}");
        expect![[r#"
            Message {
                key: Some(
                    "session-1",
                ),
                headers: [
                    (
                        "ce_specversion",
                        "1.0",
                    ),
                    (
                        "ce_id",
                        "01970000-0000-7000-8000-000000000001/300",
                    ),
                    (
                        "ce_source",
                        "/weir/node-1/01970000-0000-7000-8000-000000000001",
                    ),
                    (
                        "ce_type",
                        "weir.v1.gap",
                    ),
                    (
                        "ce_time",
                        "2023-11-14T22:13:20.000001Z",
                    ),
                    (
                        "content-type",
                        "application/json",
                    ),
                ],
                value: [
                    123,
                    125,
                ],
            }
        "#]]
        .assert_debug_eq(&Message::of_frame(&frame, Some(KEY)));
    }

    #[test]
    fn a_checkpoint_has_an_id_of_its_own_no_key_and_its_verifier() {
        let frame = frame(FrameType::Checkpoint, 300, b"note");
        let message = Message::of_frame(&frame, Some(KEY));
        assert_eq!(message.key, None);
        assert!(message.headers.contains(&("ce_id", format!("{EPOCH}/checkpoint/300").into())));
        assert!(message.headers.contains(&("content-type", "text/plain; charset=utf-8".into())));
        let received = parse(&message).unwrap();
        assert_eq!(
            (received.epoch, received.kind),
            (EPOCH, Kind::Checkpoint { size: 300, signed_unix_us: None })
        );
        assert_eq!(received.verifier.as_deref(), Some(KEY.trim()));
        assert_eq!(received.envelope, frame.envelope);
    }

    #[test]
    fn checkpoints_over_as_many_events_have_ids_of_their_own() {
        let mut tree = Tree::new();
        tree.push(leaf_hash(b"{}"));
        for time in [1_700_000_000_000_001, 1_700_000_060_000_001] {
            let note = Checkpoint::of("weir/node-1/e", &tree, time).text();
            let note = format!("{note}\n\u{2014} name AAAAAAA=\n");
            let frame = frame(FrameType::Checkpoint, 1, note.as_bytes());
            let message = Message::of_frame(&frame, None);
            assert!(message.headers.contains(&("ce_id", format!("{EPOCH}/checkpoint/1/{time}").into())));
            let received = parse(&message).unwrap();
            assert_eq!(received.kind, Kind::Checkpoint { size: 1, signed_unix_us: Some(time as u64) });
            assert_eq!(received.envelope, frame.envelope);
        }
    }

    #[test]
    fn what_weir_did_not_write_is_refused_with_the_reason() {
        refused(
            |message| message.headers.clear(),
            "header ce_specversion is missing; did Weir write this message?",
        );
        refused(|message| message.headers[0].1 = "0.3".into(), "header ce_specversion is not 1.0");
        refused(
            |message| message.headers.push(("ce_id", "x".into())),
            "header ce_id is there more than once",
        );
        let id = "header ce_id is not EPOCH/SEQUENCE or EPOCH/checkpoint/SIZE/TIME";
        let plain = EPOCH.simple();
        for wrong in ["", "7", "x/7", &format!("{plain}/7"), &format!("{EPOCH}/07"), &format!("{EPOCH}/+7")] {
            refused(|message| message.headers[1].1 = wrong.to_owned().into(), id);
        }
        for end in [
            "",
            "/",
            "/7/8",
            "/checkpoint",
            "/checkpoint/",
            "/checkpoint/7/",
            "/checkpoint/7/08",
            "/checkpoint/7/8/9",
            "/18446744073709551616",
        ] {
            refused(|message| message.headers[1].1 = format!("{EPOCH}{end}").into(), id);
        }
        refused(
            |message| message.headers[4].1 = "noon".into(),
            "header ce_time is not a time as in RFC 3339",
        );
        let range = "header ce_weirflags is not a decimal number in its range";
        refused(|message| message.headers.push(("ce_weirflags", "4294967296".into())), range);
    }

    #[test]
    fn what_is_longer_or_more_than_weir_writes_is_refused() {
        let long = "x".repeat(HEADER_BYTES_MAX + 1);
        refused(
            |message| message.headers[3].1 = long.into(),
            "ce_type has 4097 bytes, more than Weir writes",
        );
        let many = std::iter::repeat_n(("other", "".into()), HEADERS_MAX);
        refused(|message| message.headers.extend(many), "message has more than 64 headers");
        let value = vec![0; VALUE_BYTES_MAX + 1];
        let frame = frame(FrameType::Event, 7, &value);
        let refused = parse(&Message::of_frame(&frame, None)).unwrap_err();
        assert_eq!(refused, MessageError::TooLong { name: "value", bytes: value.len() });
    }

    #[test]
    fn a_message_without_a_value_or_with_a_key_that_is_no_text_is_refused() {
        let frame = frame(FrameType::Event, 7, b"{}");
        let message = Message::of_frame(&frame, None);
        let headers = || message.headers.iter().map(|(name, value)| (*name, Some(value.as_bytes())));
        assert_eq!(Received::parse(None, headers(), None), Err(MessageError::NoValue));
        let refused = Received::parse(Some(b"\xff"), headers(), Some(b"{}"));
        assert_eq!(refused, Err(MessageError::NotText { name: "key" }));
    }

    #[test]
    fn a_clock_out_of_range_is_set_to_the_nearest_time() {
        for (time_unix_us, shown) in
            [(i64::MAX, "9999-12-30T22:00:00.999999Z"), (i64::MIN, "-009999-01-02T01:59:59.000000Z")]
        {
            let mut frame = frame(FrameType::Event, 7, b"{}");
            frame.envelope.time_unix_us = time_unix_us;
            let message = Message::of_frame(&frame, None);
            assert_eq!(message.headers[4].1, shown);
            assert!(parse(&message).is_ok());
        }
    }

    proptest! {
        #[test]
        fn a_frame_survives_the_way_through_kafka(
            key in ".{0,40}", event_type in ".{0,40}", source in ".{0,40}", epoch: u128, sequence: u64,
            time_unix_us in -62_000_000_000_000_000..253_000_000_000_000_000_i64, flags: u32, key_id: u64,
            checkpoint: bool, value in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let frame_type = if checkpoint { FrameType::Checkpoint } else { FrameType::Event };
            let epoch = Uuid::from_u128(epoch);
            let id = format!("{epoch}/{sequence}");
            let envelope = Envelope { key, id, event_type, source, time_unix_us, flags, key_id };
            let leaf_hash = leaf_hash(&value);
            let frame = Frame { frame_type, sequence, commit: 0, leaf_hash, envelope, value: &value };
            let message = Message::of_frame(&frame, Some(KEY));
            let received = parse(&message).unwrap();
            prop_assert_eq!(received.epoch, epoch);
            prop_assert_eq!(received.kind.frame_type(), frame_type);
            prop_assert_eq!(received.kind.sequence(), sequence);
            prop_assert_eq!(&received.envelope, &frame.envelope);
            prop_assert_eq!(received.value, &value[..]);
            prop_assert_eq!(received.verifier.is_some(), checkpoint);
        }

        #[test]
        fn reading_never_panics(
            key in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20)),
            headers in proptest::collection::vec(
                (prop_oneof!["ce_(specversion|id|source|type|time|weirflags|weirkeyid|weirverifier)", ".{0,8}"],
                 prop_oneof!["1\\.0", ".{0,60}", "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/[0-9a-z/]{0,12}"]), 0..12),
        ) {
            let headers = headers.iter().map(|(name, value)| (name.as_str(), Some(value.as_bytes())));
            let _ = Received::parse(key.as_deref(), headers, Some(b"{}"));
        }
    }
}
