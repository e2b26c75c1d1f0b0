//! The contract of the command line: exit codes, error texts, what goes to which stream.
//!
//! Runs the real binary. What the commands print is tested beside their code.
#![expect(clippy::unwrap_used, reason = "a test that cannot write its journal has failed")]

#[path = "command_line/tampered.rs"]
mod tampered;

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rdkafka::{
    config::ClientConfig,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    message::{Header, OwnedHeaders},
    mocking::MockCluster,
    producer::{BaseProducer, BaseRecord, Producer as _},
    topic_partition_list::{Offset, TopicPartitionList},
};
use weir_common::{
    checkpoint::{Checkpoint, NoteSigner},
    envelope::Envelope,
    frame::{self, FrameType},
    merkle::Tree,
    message::Message,
    segment::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentReader},
};

/// Writes a journal of this many events of one session, a microsecond apart, and a checkpoint; returns the path of its segment.
fn write_journal(directory: &Path, events: u64) -> std::path::PathBuf {
    let (epoch, node) = (uuid::Uuid::from_u128(1), "node-1".to_owned());
    let header = SegmentHeader {
        index: 0,
        first_sequence: 0,
        first_commit: 0,
        created_unix_us: 0,
        epoch,
        node: node.clone(),
    };
    let (mut bytes, mut tree) = (header.encode().unwrap().to_vec(), Tree::new());
    for sequence in 0..events {
        let time_unix_us = 5 + i64::try_from(sequence).unwrap();
        let value = serde_json::json!({
            "schema": 1, "sequence": sequence, "timeUnixUs": time_unix_us, "cluster": "c", "node": node, "epoch": epoch,
            "session": "s1", "type": "sessionStarted",
            "data": {"caller": {"cgroup": 1, "netns": 1, "dialled": "10.0.0.1:443", "claimedUser": "u"}},
        });
        let envelope = Envelope {
            key: "s1".into(),
            id: format!("{epoch}/{sequence}"),
            event_type: "weir.v1.sessionStarted".into(),
            source: format!("/weir/{node}/{epoch}"),
            time_unix_us,
            ..Envelope::default()
        };
        let value = value.to_string();
        let (event, value) = (FrameType::Event, value.as_bytes());
        tree.push(frame::encode(&mut bytes, event, sequence, sequence, &envelope, value).unwrap());
    }
    let signer = NoteSigner::from_seed("weir/node-1", &[7; 32]).unwrap();
    let origin = format!("weir/{node}/{epoch}");
    let note = Checkpoint::of(&origin, &tree, 5).sign(std::slice::from_ref(&signer));
    let envelope = Envelope::of_checkpoint(&node, &epoch.to_string(), events, 5);
    frame::encode(&mut bytes, FrameType::Checkpoint, events, events, &envelope, note.as_bytes()).unwrap();
    let folder = directory.join(epoch.to_string());
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("node.pub"), signer.verifier().to_string()).unwrap();
    let path = folder.join(SegmentHeader::file_name(0));
    std::fs::write(&path, bytes).unwrap();
    path
}

fn weir(journal: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.args(arguments).arg("--from").arg(journal).stdin(Stdio::null());
    command
}

fn text(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn what_was_asked_wrongly_exits_with_2_and_says_what_is_possible() {
    let cases: [(&[&str], &str); 6] = [
        (&["sessions", "--from", "kafka://broker/weir"], "brokers are HOST:PORT with commas between"),
        (&["events", "--from", "x", "--format", "xml"], "available: json, audit, ocsf"),
        (&["sessions", "--from", "x", "--since", "yesterday"], "give a time as RFC 3339"),
        (&["replay", "--from", "x"], "required arguments were not provided"),
        (&["replay", "--from", "x", "s1", "--speed", "0"], "give a number above 0"),
        (&["verify"], "--from <SOURCE>"),
    ];
    for (arguments, expected) in cases {
        let output = Command::new(env!("CARGO_BIN_EXE_weir")).args(arguments).output().unwrap();
        let (code, out, error) = text(&output);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
}

#[test]
fn what_cannot_be_done_exits_with_1_and_names_the_thing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (code, out, error) = text(&weir(path, &["verify"]).output().unwrap());
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(error.starts_with(&format!("weir: no journal in {}", path.display())), "{error}");
    write_journal(path, 1);
    for arguments in [&["replay", "zz"][..], &["replay", "--request", "zz"], &["events", "--session", "zz"]] {
        let (code, out, error) = text(&weir(path, arguments).output().unwrap());
        assert_eq!((code, out.as_str()), (Some(1), ""), "{arguments:?}");
        assert!(error.contains("has the id zz"), "{error}");
    }
}

#[test]
fn a_file_of_properties_is_named_with_the_line_that_is_wrong_and_no_secret() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("client.properties");
    let run = || {
        let source = ["sessions", "--from", "kafka://127.0.0.1:1/weir"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.args(source).env("WEIR_KAFKA_CONFIG", &path).stdin(Stdio::null());
        text(&command.output().unwrap())
    };
    let (code, out, error) = run();
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(error.starts_with(&format!("weir: cannot read {}", path.display())), "{error}");
    for (content, expected) in [
        ("sasl.username=a\nhunter2\n", "line 2: there is no `=`"),
        ("sasl.pasword=hunter2\n", "line 1: sasl.pasword is no property that the Kafka client"),
    ] {
        std::fs::write(&path, content).unwrap();
        let (code, _, error) = run();
        assert_eq!(code, Some(1));
        assert!(error.contains(&format!("{} {expected}", path.display())), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[test]
fn verify_exits_with_0_for_a_whole_journal_and_with_1_for_damage() {
    let directory = tempfile::tempdir().unwrap();
    let segment = write_journal(directory.path(), 3);
    let (code, out, error) = text(&weir(directory.path(), &["verify"]).output().unwrap());
    assert_eq!((code, error.as_str()), (Some(0), ""), "{out}");
    assert!(out.contains("this proves consistency, not authorship") && !out.contains('\x1b'), "{out}");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[SEGMENT_HEADER_BYTES + 100] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let (code, out, _) = text(&weir(directory.path(), &["verify"]).output().unwrap());
    assert_eq!(code, Some(1));
    let place = format!("damage {} offset {SEGMENT_HEADER_BYTES} sequence 0", segment.display());
    assert!(out.contains(&place), "{out}");
    let (code, out, _) = text(&weir(directory.path(), &["verify", "--json"]).output().unwrap());
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["sound"]), (Some(1), &serde_json::Value::Bool(false)));
    let (code, out, error) = text(&weir(directory.path(), &["sessions"]).output().unwrap());
    assert!(code == Some(0) && out.contains("s1"), "{out}");
    assert!(error.contains("segment is damaged at offset") && error.contains("weir verify"), "{error}");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    write_journal(directory.path(), 2000);
    let mut child =
        weir(directory.path(), &["events"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let (code, _, error) = text(&child.wait_with_output().unwrap());
    assert_eq!((code, error.as_str()), (Some(0), ""));
}

#[test]
fn whoever_interrupts_the_reading_of_a_topic_leaves_nothing_of_it_behind() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("weir", 1, 1).unwrap();
    let source = format!("kafka://{}/weir", cluster.bootstrap_servers());
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let temporary = tempfile::tempdir().unwrap();
        let spools = || std::fs::read_dir(temporary.path()).unwrap().count();
        let mut reader = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["events", "--follow", "--from", &source])
            .env("TMPDIR", temporary.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while spools() == 0 {
            assert!(begun.elapsed() < Duration::from_secs(60) && reader.try_wait().unwrap().is_none());
            std::thread::yield_now();
        }
        kill(Pid::from_raw(i32::try_from(reader.id()).unwrap()), signal).unwrap();
        assert_eq!(reader.wait().unwrap().code(), Some(code));
        assert_eq!(spools(), 0);
    }
}

#[test]
fn a_group_that_goes_on_behind_a_time_passes_over_what_is_older() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(write_journal(directory.path(), 2)).unwrap();
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("weir", 1, 1).unwrap();
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", cluster.bootstrap_servers()).set("group.id", "siem");
    let producer: BaseProducer = config.create().unwrap();
    for located in SegmentReader::new(&bytes, None).unwrap() {
        let frame = located.unwrap().frame;
        let message = Message::of_frame(&frame, None);
        let headers = message.headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
            headers.insert(Header { key, value: Some(value.as_ref()) })
        });
        let record: BaseRecord<'_, str, [u8]> =
            BaseRecord { key: message.key, ..BaseRecord::to("weir").payload(message.value).headers(headers) };
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(Duration::from_secs(60)).unwrap();
    // It was somewhere: before all of them.
    let consumer: BaseConsumer = config.create().unwrap();
    let mut offsets = TopicPartitionList::new();
    offsets.add_partition_offset("weir", 0, Offset::Offset(0)).unwrap();
    consumer.commit(&offsets, CommitMode::Sync).unwrap();
    let source = format!("kafka://{}/weir", cluster.bootstrap_servers());
    let mut member = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["events", "--follow", "--group", "siem", "--since", "1970-01-01T00:00:00.000006Z"])
        .args(["--from", &source])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(member.stdout.take().unwrap()).read_line(&mut first).unwrap();
    member.kill().unwrap();
    member.wait().unwrap();
    let event: serde_json::Value = serde_json::from_str(&first).unwrap();
    assert_eq!(event["sequence"], 1, "{first}");
}
