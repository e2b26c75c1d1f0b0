//! What somebody did to a journal, or to a topic, beside what `weir verify` says of it, and its exit code.

use std::{path::Path, process::Stdio, time::Duration};

use rdkafka::{
    ClientConfig,
    message::{Header, OwnedHeaders},
    mocking::MockCluster,
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use uuid::Uuid;
use weir_common::{
    checkpoint::{Checkpoint, NoteSigner},
    envelope::Envelope,
    frame::{self, Frame, FrameType},
    merkle::{Tree, leaf_hash},
    message::Message,
    segment::SegmentHeader,
};

use super::{text, weir};

const NODE: &str = "node-1";
const EPOCH: Uuid = Uuid::from_u128(1);
const TOPIC: &str = "weir-events";
/// How many events an agent recorded.
const EVENTS: u64 = 5;

/// What becomes a frame, or a message.
#[derive(Clone)]
struct Record {
    frame_type: FrameType,
    sequence: u64,
    envelope: Envelope,
    value: Vec<u8>,
}

fn event(sequence: u64, kind: &str, data: &serde_json::Value) -> Record {
    let session = if kind == "agentStopped" { "" } else { "s1" };
    let value = serde_json::json!({
        "schema": 1, "sequence": sequence, "timeUnixUs": 5, "cluster": "c", "node": NODE, "epoch": EPOCH, "session": session,
        "type": kind, "data": data,
    });
    let envelope = Envelope {
        key: session.into(),
        id: format!("{EPOCH}/{sequence}"),
        event_type: format!("weir.v1.{kind}"),
        source: format!("/weir/{NODE}/{EPOCH}"),
        time_unix_us: 5,
        ..Envelope::default()
    };
    Record { frame_type: FrameType::Event, sequence, envelope, value: value.to_string().into_bytes() }
}

fn session(sequence: u64) -> Record {
    let caller = serde_json::json!({"cgroup": 1, "netns": 1, "dialled": "10.0.0.1:443", "claimedUser": "u"});
    event(sequence, "sessionStarted", &serde_json::json!({ "caller": caller }))
}

fn signer() -> NoteSigner {
    NoteSigner::from_seed("weir/node-1", &[7; 32]).unwrap()
}

/// The events of an epoch, which ended in order or goes on, and the checkpoint over all of them.
fn records(ended: bool) -> Vec<Record> {
    let mut list: Vec<_> = (0..EVENTS).map(session).collect();
    if ended {
        list[EVENTS as usize - 1] =
            event(EVENTS - 1, "agentStopped", &serde_json::json!({"reason": "SIGTERM"}));
    }
    let mut tree = Tree::new();
    list.iter().for_each(|record| tree.push(leaf_hash(&record.value)));
    let note = Checkpoint::of(&format!("weir/{NODE}/{EPOCH}"), &tree, 5).sign(&[signer()]);
    list.push(Record {
        frame_type: FrameType::Checkpoint,
        sequence: EVENTS,
        envelope: Envelope::of_checkpoint(NODE, &EPOCH.to_string(), EVENTS, 5),
        value: note.into_bytes(),
    });
    list
}

/// Writes them as whole frames, each in a commit of its own.
fn write(directory: &Path, records: &[Record]) {
    let header = SegmentHeader {
        index: 0,
        first_sequence: 0,
        first_commit: 1,
        created_unix_us: 0,
        epoch: EPOCH,
        node: NODE.into(),
    };
    let mut bytes = header.encode().unwrap().to_vec();
    for (commit, record) in (1..).zip(records) {
        let Record { frame_type, sequence, envelope, value } = record;
        frame::encode(&mut bytes, *frame_type, *sequence, commit, envelope, value).unwrap();
    }
    let folder = directory.join(EPOCH.to_string());
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("node.pub"), signer().verifier().to_string()).unwrap();
    std::fs::write(folder.join(SegmentHeader::file_name(0)), bytes).unwrap();
}

/// Publishes them to a topic, in this order.
fn publish(records: &[Record]) -> MockCluster<'static, rdkafka::producer::DefaultProducerContext> {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic(TOPIC, 1, 1).unwrap();
    let mut configuration = ClientConfig::new();
    configuration.set("bootstrap.servers", cluster.bootstrap_servers()).set("linger.ms", "0");
    let producer: BaseProducer = configuration.create().unwrap();
    let verifier = signer().verifier().to_string();
    for Record { frame_type, sequence, envelope, value } in records {
        let (frame_type, sequence, leaf_hash) = (*frame_type, *sequence, leaf_hash(value));
        let frame = Frame { frame_type, sequence, commit: 1, leaf_hash, envelope: envelope.clone(), value };
        let message = Message::of_frame(&frame, Some(&verifier));
        let mut headers = OwnedHeaders::new();
        for (key, value) in &message.headers {
            headers = headers.insert(Header { key, value: Some(value.as_bytes()) });
        }
        let record = BaseRecord::to(TOPIC).partition(0).payload(message.value).headers(headers);
        producer.send(record.key(message.key.unwrap_or_default())).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(Duration::from_secs(20)).unwrap();
    cluster
}

/// What is said of a source: the exit code, and words that stand in one line of the output.
type Verdict = (i32, &'static [&'static str]);

/// What somebody did, and the verdict over a journal and over a topic.
type Case = (&'static str, bool, fn(&mut Vec<Record>), Verdict, Verdict);

/// Damage that names this event.
macro_rules! damaged {
    ($($word:literal),+) => { (1, &["damage ", $($word),+]) };
}

const WHOLE: Verdict = (0, &["is whole and unchanged"]);

const CASES: [Case; 14] = [
    ("nothing", true, |_| {}, WHOLE, WHOLE),
    (
        "appended behind the end",
        true,
        |list| list.push(session(EVENTS)),
        damaged!(" sequence 5: ", "an event follows the end of the epoch"),
        damaged!(" sequence 5: ", "an event follows the end of the epoch"),
    ),
    (
        "appended while the epoch goes on: a claim that nobody signed",
        false,
        |list| list.push(session(EVENTS)),
        (0, &["note ", " sequence 5: ", "the last 1 events are not covered by a checkpoint"]),
        (0, &["note ", " sequence 5: ", "the last 1 events are not covered by a checkpoint"]),
    ),
    (
        "appended, and one left out",
        false,
        |list| list.push(session(EVENTS + 1)),
        damaged!(" sequence 5: ", "has sequence 6 where 5 must follow"),
        damaged!("event 5 is missing"),
    ),
    (
        "put between others",
        true,
        |list| list.insert(2, session(EVENTS)),
        damaged!(" sequence 2: ", "has sequence 5 where 2 must follow"),
        damaged!(" sequence 5: ", "an event follows the end of the epoch"),
    ),
    (
        "duplicated: a topic has what its brokers did not acknowledge again",
        true,
        |list| list.insert(3, list[2].clone()),
        damaged!(" sequence 3: ", "has sequence 2 where 3 must follow"),
        (0, &["topic 7 messages in 1 partition, 1 of them came again"]),
    ),
    (
        "duplicated at the end",
        false,
        |list| list.push(list[4].clone()),
        damaged!(" sequence 5: ", "has sequence 4 where 5 must follow"),
        (0, &["topic 7 messages in 1 partition, 1 of them came again"]),
    ),
    (
        "duplicated, and changed",
        true,
        |list| {
            let mut again = list[2].clone();
            again.value.push(b' ');
            list.insert(3, again);
        },
        damaged!(" sequence 3: ", "has sequence 2 where 3 must follow"),
        damaged!("event 2 of epoch 00000000-0000-0000-0000-000000000001"),
    ),
    (
        "a checkpoint duplicated: it says nothing new",
        true,
        |list| list.push(list[5].clone()),
        WHOLE,
        (0, &["topic 7 messages in 1 partition, 1 of them came again"]),
    ),
    (
        "swapped: messages are read by their numbers, whatever their places",
        true,
        |list| list.swap(1, 2),
        damaged!(" sequence 1: ", "has sequence 2 where 1 must follow"),
        WHOLE,
    ),
    (
        "swapped, with the other's number",
        true,
        |list| {
            let (one, other) = (list[1].value.clone(), list[2].value.clone());
            (list[1].value, list[2].value) = (other, one);
        },
        damaged!(" sequence 1: ", "sequence of the event differs from that of its frame"),
        damaged!(" sequence 1: ", "sequence of the event differs from that of its frame"),
    ),
    (
        "missing",
        true,
        |list| drop(list.remove(2)),
        damaged!(" sequence 2: ", "has sequence 3 where 2 must follow"),
        damaged!("event 2 is missing"),
    ),
    (
        "the checkpoint missing",
        true,
        |list| drop(list.pop()),
        damaged!("the epoch ended in order, but has no checkpoint"),
        // It brings the key, too.
        (1, &["no checkpoint with its verifier key is on kafka://"]),
    ),
    (
        "flipped, and checksums mended",
        true,
        |list| {
            let at = list[2].value.windows(3).position(|three| three == b"\"u\"").unwrap() + 1;
            list[2].value[at] ^= 1;
        },
        damaged!(" sequence 5: ", "Merkle root of the events does not match the signed checkpoint"),
        damaged!(" sequence 5: ", "Merkle root of the events does not match the signed checkpoint"),
    ),
];

/// Runs `weir verify`, and looks for all words in one line.
#[track_caller]
fn verdict(what: &str, source: &Path, (expected, words): Verdict) {
    let output = weir(source, &["verify"]).stdin(Stdio::null()).output().unwrap();
    let (code, out, error) = text(&output);
    let said = format!("{out}{error}");
    let named = said.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(code == Some(expected) && named, "{what}: exit code {code:?}, not {words:?} in {said}");
}

#[test]
fn what_was_done_to_a_journal_or_a_topic_is_named_and_the_exit_code_says_so() {
    for (what, ended, tamper, journal, topic) in CASES {
        let mut list = records(ended);
        tamper(&mut list);
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &list);
        verdict(&format!("journal, {what}"), directory.path(), journal);
        let cluster = publish(&list);
        let source = format!("kafka://{}/{TOPIC}", cluster.bootstrap_servers());
        verdict(&format!("topic, {what}"), Path::new(&source), topic);
    }
}

/// The checkpoint of these records proves what is appended behind it to be nobody's: it is held against one that was kept.
#[test]
fn a_kept_checkpoint_covers_what_was_there_when_it_was_signed_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let mut list = records(false);
    let kept = directory.path().join("kept.txt");
    std::fs::write(&kept, &list[EVENTS as usize].value).unwrap();
    list.push(session(EVENTS));
    let journal = directory.path().join("journal");
    write(&journal, &list);
    let run = || text(&weir(&journal, &["verify"]).arg("--checkpoint").arg(&kept).output().unwrap());
    let (code, out, _) = run();
    assert!(code == Some(0) && out.contains("(5 of 6 events covered)"), "{out}");
    assert!(out.contains("kept checkpoint: ") && out.contains("are as they were"), "{out}");
    list.truncate(EVENTS as usize - 1);
    write(&journal, &list);
    let (code, out, error) = run();
    assert_eq!(code, Some(1), "{out}{error}");
    assert!(out.contains("covers 5 events, the journal holds 4"), "{out}{error}");
}
