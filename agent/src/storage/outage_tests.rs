//! Kafka is away for long: what waits for it waits on disk, and memory does not grow with it. In a process of its own, whose
//! memory is nobody else's.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use futures::future::join_all;
use http::StatusCode;
use tempfile::TempDir;
use weir_common::event::Outcome;

use crate::{
    config::Kafka,
    publishing::Publishing,
    recipients::RECIPIENT,
    recording::{
        Recorder, RecorderOptions,
        fixture::{create, of_pod},
    },
};

/// Events that come while Kafka is away, as quick as they go; with `WEIR_TEST_LONG` so many a second for an hour by the clock.
const EVENTS: u64 = 60_000;
const EVENTS_PER_SECOND: u64 = 2000;
const SECONDS_LONG: u64 = 3600;

/// Another number of seconds by the clock.
const SECONDS: &str = "WEIR_OUTAGE_SECONDS";

/// Bytes of their text: the whole frame is a little over 1 KiB.
const TEXT_BYTES: usize = 640;

/// What is recorded at a time: requests of these pods, each four events with a body that is encrypted, and findings.
const BATCH_EVENTS: u64 = 100;
const BATCH_REQUESTS: u64 = 10;
const EVENTS_OF_REQUEST: u64 = 4;
const PODS: u64 = 20;

/// What the process may have more at its peak, at the end, than when a tenth had come: a few per cent of what is on disk.
const GROWTH_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// How often its memory is looked at.
const SAMPLES: u64 = 60;

/// The journal's folder, for the process whose memory is measured; without it this test is the one that starts it.
const AGENT: &str = "WEIR_OUTAGE_TEST_JOURNAL";

/// How many events, and over how long; none: as quick as they go.
fn load() -> (u64, Option<Duration>) {
    let is_long = std::env::var_os("WEIR_TEST_LONG").is_some();
    let given = std::env::var(SECONDS).ok().map(|seconds| seconds.parse().expect("a number of seconds"));
    match given.or(is_long.then_some(SECONDS_LONG)) {
        Some(seconds) => (seconds * EVENTS_PER_SECOND, Some(Duration::from_secs(seconds))),
        None => (EVENTS, None),
    }
}

/// What the kernel says of this process's memory, in bytes.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    value.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// Records some events; the last of them are durable when it returns.
async fn batch(recorder: &Recorder, number: u64) {
    let text = "x".repeat(TEXT_BYTES);
    let request = async |request: u64| {
        let pod = of_pod(&format!("pod-{}", (number * BATCH_REQUESTS + request) % PODS), None);
        let record = create(recorder, &pod, &format!("{{\"data\":\"{text}\"}}")).await.unwrap();
        record.response_started(StatusCode::CREATED, &http::HeaderMap::new(), false);
        record.close_durably(Outcome::Complete, None).unwrap().await.unwrap();
    };
    join_all((0..BATCH_REQUESTS).map(request)).await;
    for _ in 1..BATCH_EVENTS - BATCH_REQUESTS * EVENTS_OF_REQUEST {
        recorder.finding(None, None, "test", &text);
    }
    // Whoever waits for one waits for all before it: the queue never has more.
    let recorder = recorder.clone();
    tokio::task::spawn_blocking(move || recorder.gap("so far".to_owned(), None).unwrap()).await.unwrap();
}

/// The process whose memory is measured.
async fn agent(journal: &Path) {
    let recipient = journal.with_extension("pem");
    std::fs::write(&recipient, RECIPIENT).unwrap();
    let mut options = RecorderOptions::new(journal.to_owned(), "node".to_owned(), vec!["prod".to_owned()]);
    options.journal_bytes_max = 1 << 40;
    options.recipient_files = vec![recipient];
    let recorder = Recorder::start(options).unwrap();
    let kafka = Kafka {
        // Nobody listens there.
        brokers: vec!["127.0.0.1:1".to_owned()],
        topic: "weir".to_owned(),
        checkpoint_topic: "weir".to_owned(),
        key_topic: Some("weir-keys".to_owned()),
        properties: BTreeMap::new(),
        property_files: BTreeMap::new(),
        oauth: None,
        replay_window: Duration::from_secs(3600),
    };
    let publishing = Publishing::start(&kafka, &recorder).unwrap();
    let (events, time) = load();
    let (batches, began, mut early) = (events / BATCH_EVENTS, Instant::now(), 0);
    for number in 0..batches {
        batch(&recorder, number).await;
        if let Some(time) = time {
            // By the clock: one that comes late does not make the next one late.
            let due = began + time.mul_f64((number + 1) as f64 / batches as f64);
            tokio::time::sleep_until(due.into()).await;
        }
        if (number + 1) % (batches / SAMPLES) == 0 {
            say(&recorder, began);
        }
        if number + 1 == batches / 10 {
            early = memory("VmHWM:");
        }
    }
    let (late, measured) = (memory("VmHWM:"), recorder.measured());
    println!(
        "Kafka away for {} events, {} MB, {:.0} s: {} MB of memory at its peak when a tenth had come, {} MB in the end",
        measured.events,
        measured.bytes / 1_000_000,
        began.elapsed().as_secs_f64(),
        early / 1_000_000,
        late / 1_000_000
    );
    assert!(measured.lost == 0 && measured.events > events && publishing.published().messages == 0);
    // The kernel's account of a peak is off by some pages, and may go down.
    assert!(late.saturating_sub(early) < GROWTH_BYTES_MAX, "memory grew from {early} to {late} bytes");
}

/// One line of the table of samples.
fn say(recorder: &Recorder, began: Instant) {
    let (resident, measured) = (memory("VmRSS:"), recorder.measured());
    println!(
        "Kafka away: {:.0} s, {} events, {} MB on disk, {:.1} MB resident",
        began.elapsed().as_secs_f64(),
        measured.events,
        measured.used.0 / 1_000_000,
        resident as f64 / 1e6
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_does_not_grow_with_what_waits_for_kafka() {
    if let Some(journal) = std::env::var_os(AGENT) {
        return agent(Path::new(&journal)).await;
    }
    let folder = TempDir::new().unwrap();
    let name = "storage::outage_tests::memory_does_not_grow_with_what_waits_for_kafka";
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(AGENT, folder.path().join("journal"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    // As they come: an hour is long.
    let said = lines.inspect(|line| println!("{line}")).filter(|line| line.contains("Kafka away")).count();
    assert!(child.wait().unwrap().success() && said as u64 > SAMPLES, "{said} lines");
}
