//! Envelopes that somebody rewrote, with every checksum as it must be: in a journal's frames, and as headers of messages.

use std::{fs, path::Path};

use tempfile::TempDir;
use weir_common::{
    encryption::key_of_digest,
    envelope::Envelope,
    event::{BodySummary, Bytes, Channel, Content, FileCopied, Kind},
    frame::{self, Frame, FrameType},
    segment::SEGMENT_HEADER_BYTES,
};

use crate::{
    fixture::{SESSION, Writer, request},
    source::{
        Journal,
        kafka::{Broker, Sent},
        topic::Reading,
    },
    verify::{Finding, Options, Report, verify},
};

const EVENTS: &str = "weir-events";
const CHECKPOINTS: &str = "weir-checkpoints";

fn digest(number: u64) -> Option<String> {
    Some(format!("content-hmac-sha256:{number}:00"))
}

/// A journal in which keys protect content (3), the digest of a body (4) and of a file (5), and an epoch that ended in order.
fn journal() -> (TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    let ids = [SESSION, "i1", "r1"];
    let mut opened = request("POST", "create", "/api/v1/namespaces/ci/pods", "ci");
    opened.body = Some(BodySummary { digest: digest(4), ..BodySummary::default() });
    let bytes = Bytes::Encrypted { key: 3, data: "AAAA".into() };
    let content = Content { channel: Channel::RequestBody, connection: None, offset: 0, bytes };
    let file = FileCopied {
        channel: Channel::Stdin,
        path: "a".into(),
        bytes: 7,
        digest: digest(5),
        link_target: None,
        passed_bytes: None,
    };
    writer.started().session(SESSION, "u").commit().open(ids, opened).commit();
    writer.event(ids[0], ids[1], ids[2], Kind::Content(content));
    writer.event(ids[0], ids[1], ids[2], Kind::FileCopied(Box::new(file)));
    writer.close(ids, 201, 5).commit().checkpoint().commit();
    writer.after_ms(1000).stopped().checkpoint().save(directory.path(), 256);
    let path = directory.path().join(writer.epoch.to_string()).join("00000000000000000000.seg");
    (directory, path)
}

/// The frames of a segment, with their offsets.
fn frames(bytes: &[u8]) -> Vec<(usize, Frame<'_>)> {
    let (mut list, mut offset) = (Vec::new(), SEGMENT_HEADER_BYTES);
    while let Ok((frame, length)) = frame::decode(&bytes[offset..]) {
        list.push((offset, frame));
        offset += length;
    }
    list
}

/// Rewrites the envelope of one of them.
fn rewritten(bytes: &[u8], number: usize, change: fn(&mut Envelope)) -> Vec<u8> {
    let mut out = bytes[..SEGMENT_HEADER_BYTES].to_vec();
    for (index, (_, frame)) in frames(bytes).into_iter().enumerate() {
        let Frame { frame_type, sequence, commit, mut envelope, value, .. } = frame;
        if index == number {
            change(&mut envelope);
        }
        frame::encode(&mut out, frame_type, sequence, commit, &envelope, value).unwrap();
    }
    out
}

fn verified(directory: &Path) -> Report {
    verify(&Journal::open(directory).unwrap(), &Options::default()).unwrap()
}

/// What can be rewritten, and what is said of an event's and of a checkpoint's.
type Change = (fn(&mut Envelope), &'static str, &'static str);

const CHANGES: [Change; 7] = [
    (
        |envelope| envelope.key.push('x'),
        "key of the envelope is not the event's session",
        "envelope of a checkpoint has a key",
    ),
    (
        |envelope| envelope.id.push('0'),
        "id of the envelope is not the event's",
        "id of the envelope is not the checkpoint's",
    ),
    (
        |envelope| envelope.event_type.push('x'),
        "type of the envelope is not the event's",
        "type of the envelope is not that of a checkpoint",
    ),
    (
        |envelope| envelope.source.push('x'),
        "source of the envelope is not the event's",
        "source of the envelope is not the checkpoint's",
    ),
    (
        |envelope| envelope.time_unix_us += 1,
        "time of the envelope is not the event's",
        "checkpoint was signed at 2026-01-31T12:00:0",
    ),
    (
        |envelope| envelope.flags = 1,
        "envelope has flags, of which none is defined",
        "envelope has flags, of which none is defined",
    ),
    (
        |envelope| envelope.key_id = u64::from(envelope.key_id == 0),
        "key id of the envelope is not that of the key that protects the event",
        "envelope of a checkpoint has the id of a key",
    ),
];

#[test]
fn whatever_is_rewritten_of_a_frames_envelope_is_named_with_its_place() {
    let (directory, path) = journal();
    let good = fs::read(&path).unwrap();
    assert!(verified(directory.path()).is_sound(), "{:#?}", verified(directory.path()));
    let frames = frames(&good);
    let keys: Vec<_> = frames.iter().map(|(_, frame)| frame.envelope.key_id).collect();
    assert_eq!(keys, [0, 0, 4, 3, 5, 0, 0, 0, 0]);
    for (number, (offset, frame)) in frames.iter().enumerate() {
        for (change, of_event, of_checkpoint) in CHANGES {
            fs::write(&path, rewritten(&good, number, change)).unwrap();
            let report = verified(directory.path());
            let expected = if frame.frame_type == FrameType::Event { of_event } else { of_checkpoint };
            let [Finding { file, offset: place, sequence, what }] = &report.damage.listed[..] else {
                panic!("frame {number}, {expected}: {report:#?}")
            };
            assert!(what.starts_with(expected), "frame {number}, {expected}: {what}");
            assert_eq!((*place, *sequence), (Some(*offset as u64), Some(frame.sequence)), "{what}");
            assert_eq!(*file, path.display().to_string());
            assert!(!report.is_sound());
        }
    }
}

/// What can be rewritten of a message, and what is said of it.
type HeaderChange = (fn(&mut Sent), &'static str, &'static str);

fn header<'s>(sent: &'s mut Sent, name: &str) -> &'s mut String {
    &mut sent.headers.iter_mut().find(|(header, _)| header == name).unwrap().1
}

const HEADERS: [HeaderChange; 6] = [
    (
        |sent| sent.key = Some("another".into()),
        "key of the envelope is not the event's session",
        "envelope of a checkpoint has a key",
    ),
    (
        |sent| header(sent, "ce_type").push('x'),
        "type of the envelope is not the event's",
        "type of the envelope is not that of a checkpoint",
    ),
    (
        |sent| header(sent, "ce_source").push('x'),
        "source of the envelope is not the event's",
        "source of the envelope is not the checkpoint's",
    ),
    (
        |sent| *header(sent, "ce_time") = "2026-01-31T12:00:07.000001Z".into(),
        "time of the envelope is not the event's",
        "checkpoint was signed at 2026-01-31T12:00:0",
    ),
    (
        |sent| sent.headers.push(("ce_weirflags".into(), "1".into())),
        "envelope has flags, of which none is defined",
        "envelope has flags, of which none is defined",
    ),
    (
        |sent| {
            let headers = sent.headers.len();
            sent.headers.retain(|(name, _)| name != "ce_weirkeyid");
            if sent.headers.len() == headers {
                sent.headers.push(("ce_weirkeyid".into(), "1".into()));
            }
        },
        "key id of the envelope is not that of the key that protects the event",
        "envelope of a checkpoint has the id of a key",
    ),
];

#[test]
fn whatever_is_rewritten_of_a_messages_headers_is_named_with_its_sequence() {
    let (directory, _) = journal();
    let good = Sent::of_journal(directory.path(), EVENTS, CHECKPOINTS);
    let protected = good.iter().filter(|sent| sent.headers.iter().any(|(name, _)| name == "ce_weirkeyid"));
    assert_eq!(protected.count(), 3);
    let report = |list: &[Sent]| {
        let broker = Broker::new(&[EVENTS, CHECKPOINTS]);
        broker.send(list);
        let topics = broker.topics(&[EVENTS, CHECKPOINTS]);
        let journal = Journal::of_topics(&topics, &Default::default(), Reading::default()).unwrap();
        verify(&journal, &Options::default()).unwrap()
    };
    assert!(report(&good).is_sound(), "{:#?}", report(&good));
    for (change, of_event, of_checkpoint) in HEADERS {
        // The first names the node, which the others are held against.
        let mut bad = good.clone();
        bad.iter_mut().skip(1).for_each(change);
        let report = report(&bad);
        let number =
            |what: &str| report.damage.listed.iter().filter(|finding| finding.what.starts_with(what)).count();
        let is_same = of_event == of_checkpoint;
        let expected = if is_same { [8, 8] } else { [6, 2] };
        assert_eq!([number(of_event), number(of_checkpoint)], expected, "{of_event}: {report:#?}");
        assert_eq!(report.damage.number(), 8, "{of_event}: {report:#?}");
        assert!(report.damage.listed.iter().all(|finding| finding.sequence.is_some()), "{report:#?}");
    }
}

#[test]
fn a_later_version_may_protect_more_than_this_one_knows() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started();
    let mut add = |schema: u64, data: serde_json::Value| {
        let sequence = writer.sequence;
        let value = serde_json::json!({
            "schema": schema, "sequence": sequence, "timeUnixUs": 1, "node": "node-1", "epoch": writer.epoch, "session": "s",
            "type": "news", "data": data,
        });
        let envelope = Envelope {
            key: "s".into(),
            id: format!("{}/{sequence}", writer.epoch),
            event_type: format!("weir.v{schema}.news"),
            source: format!("/weir/node-1/{}", writer.epoch),
            time_unix_us: 1,
            flags: 0,
            key_id: if schema == 1 { 0 } else { 6 },
        };
        writer.frame(FrameType::Event, &envelope, value.to_string().as_bytes());
    };
    // The same names with other things under them.
    add(1, serde_json::json!({"encrypted": true, "body": "text", "digest": {"sha256": "00"}}));
    add(1, serde_json::Value::Null);
    add(2, serde_json::json!({"sealed": {"key": 6}}));
    writer.checkpoint().save(directory.path(), 0);
    let report = verified(directory.path());
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(key_of_digest("sha256:00"), None);
}
