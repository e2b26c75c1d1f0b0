//! Kafka is away for long: what waits for it waits on disk, and memory does not grow with it. In a process of its own, whose
//! memory is nobody else's.

use std::{collections::BTreeMap, path::Path, process::Command, time::Duration};

use tempfile::TempDir;

use crate::{
    config::Kafka,
    publishing::Publishing,
    recording::{Recorder, RecorderOptions},
};

/// Events that come while Kafka is away; with `WEIR_TEST_LONG` as many as 2,000 a second are in an hour.
const EVENTS: u64 = 60_000;
const EVENTS_LONG: u64 = 2000 * 3600;

/// Bytes of their text: the whole frame is a little over 1 KiB.
const TEXT_BYTES: usize = 640;

/// What the process may have more at its peak, at the end, than when a tenth had come: a few per cent of what is on disk.
const GROWTH_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// The journal's folder, for the process whose memory is measured; without it this test is the one that starts it.
const AGENT: &str = "WEIR_OUTAGE_TEST_JOURNAL";

fn events() -> u64 {
    if std::env::var_os("WEIR_TEST_LONG").is_some() { EVENTS_LONG } else { EVENTS }
}

/// The most memory that this process has had.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

fn record(recorder: &Recorder, events: u64) {
    let text = "x".repeat(TEXT_BYTES);
    for number in 1..=events {
        recorder.finding(None, None, "test", &text);
        // Whoever waits for one waits for all before it: the queue never has more.
        if number % 1000 == 0 || number == events {
            recorder.gap("so far".to_owned(), None).unwrap();
        }
    }
}

/// The process whose memory is measured.
fn agent(journal: &Path) {
    let mut options = RecorderOptions::new(journal.to_owned(), "node".to_owned(), Vec::new());
    options.journal_bytes_max = 1 << 40;
    let recorder = Recorder::start(options).unwrap();
    let kafka = Kafka {
        // Nobody listens there.
        brokers: vec!["127.0.0.1:1".to_owned()],
        topic: "weir".to_owned(),
        checkpoint_topic: "weir".to_owned(),
        key_topic: None,
        properties: BTreeMap::new(),
        property_files: BTreeMap::new(),
        oauth: None,
        replay_window: Duration::from_secs(3600),
    };
    let publishing = Publishing::start(&kafka, &recorder).unwrap();
    record(&recorder, events() / 10);
    let early = peak_bytes();
    record(&recorder, events() - events() / 10);
    let (late, measured) = (peak_bytes(), recorder.measured());
    println!(
        "Kafka away for {} events, {} MB: {} MB of memory at a tenth, {} MB in the end",
        measured.events,
        measured.bytes / 1_000_000,
        early / 1_000_000,
        late / 1_000_000
    );
    assert!(measured.lost == 0 && measured.events > events() && publishing.published().messages == 0);
    assert!(late - early < GROWTH_BYTES_MAX, "memory grew from {early} to {late} bytes");
}

#[test]
fn memory_does_not_grow_with_what_waits_for_kafka() {
    if let Some(journal) = std::env::var_os(AGENT) {
        return agent(Path::new(&journal));
    }
    let folder = TempDir::new().unwrap();
    let name = "storage::outage_tests::memory_does_not_grow_with_what_waits_for_kafka";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(AGENT, folder.path().join("journal"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().find(|line| line.contains("Kafka away for"));
    assert!(output.status.success() && line.is_some(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    println!("{}", line.unwrap_or_default());
}
