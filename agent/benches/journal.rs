//! What the journal does on this disk: group commit on one core, how soon an agent accepts with a large journal behind it, and
//! publishing to a broker on the same machine; and what it costs that bodies are encrypted for recipients. `cargo xtask bench journal` runs
//! it, with a Kafka; `--long` with as much as the goals say.
//!
//! Beside records a second stand records for each second of CPU time that the process took, kernel included: what one core does if nothing else is
//! on it, whatever is.
//!
//! Goals: 100,000 records of 1 KiB a second on one core; 50,000 a second to the local broker; 5 s with 10 GiB of segments.
#![expect(clippy::unwrap_used, reason = "what fails here fails the bench, with its place")]
#![expect(clippy::print_stdout, reason = "the table is what the bench is for")]

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, header::CONTENT_TYPE};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike as _,
    },
    unistd::Pid,
};
use weir_agent::{
    config::Kafka,
    publishing::Publishing,
    recording::{Commit, CommitRule, CommitRules, Recorder, RecorderOptions, RequestHead, Unmasked},
};
use weir_common::{
    attributes::Attributes,
    event::{Caller, Outcome, Pod},
};

/// Records of a run of group commit, and those that are published.
const RECORDS: u64 = 500_000;

/// Requests of a run with bodies: each is four records.
const REQUESTS: u64 = 50_000;

/// Whom bodies are encrypted for: Bob of RFC 7748, section 6.1.
const RECIPIENT: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=\n-----END PUBLIC KEY-----\n";

/// Runs, of which all are shown: other work on the machine is seen by their difference.
const RUNS: usize = 3;

/// Bytes of their text: the whole frame is a little over 1 KiB.
const TEXT_BYTES: usize = 640;

/// Bytes that may wait for the writer before producers pause: half of what the queue takes of one lane.
const BACKLOG_BYTES: usize = 8 * 1024 * 1024;

/// Where Kafka is, with its topic; without it publishing is not measured.
const BROKER: &str = "WEIR_BENCH_KAFKA";
/// GiB of segments that an agent finds.
const GIBIBYTES: &str = "WEIR_BENCH_GIB";
/// The journal's folder, for the process that fills it and is killed.
const VICTIM: &str = "WEIR_BENCH_VICTIM";

/// The longest that an agent may take until it accepts, whatever others left.
const ACCEPT_MAX: Duration = Duration::from_secs(5);
/// Where no Kafka is.
const NOWHERE: &str = "127.0.0.1:1/weir";
/// What the one that is killed says when its journal is full.
const FILLED: &str = "filled";

/// The longest that publishing may take.
const DEADLINE: Duration = Duration::from_secs(600);

fn recorder(journal: &Path) -> Recorder {
    let mut options = RecorderOptions::new(journal.to_owned(), "bench".to_owned(), Vec::new());
    options.journal_bytes_max = 1 << 40;
    Recorder::start(options).unwrap()
}

/// What a run came to.
struct Rate {
    records: f64,
    seconds: f64,
    cpu_seconds: f64,
    bytes: f64,
    syncs: u64,
}

impl Rate {
    fn said(&self) -> String {
        let Self { records, seconds, cpu_seconds, bytes, syncs } = self;
        format!(
            "{:>9.0} records/s {:>5.0} MB/s {:>9.0} records a CPU-second  {:.0} bytes each, {syncs} fdatasync",
            records / seconds,
            bytes / seconds / 1e6,
            records / cpu_seconds,
            bytes / records
        )
    }
}

/// CPU time that this process has taken.
fn cpu_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6
}

/// Records `records` events as fast as they are taken, and waits until they are durable.
fn fill(recorder: &Recorder, records: u64) -> Rate {
    let text = "x".repeat(TEXT_BYTES);
    let rate = rate_of(recorder, || {
        for number in 0..records {
            recorder.finding(None, None, "bench", &text);
            pause(recorder, number);
        }
        // Whoever waits for one more waits for all.
        recorder.gap("the end".to_owned(), None).unwrap();
    });
    assert_eq!(rate.records as u64, records + 1);
    rate
}

/// Lets the writer catch up.
fn pause(recorder: &Recorder, number: u64) {
    while number.is_multiple_of(64) && recorder.measured().backlog_bytes > BACKLOG_BYTES {
        // Not by yielding: on one core a thread that is always ready takes half of it from the writer.
        std::thread::park_timeout(Duration::from_micros(500));
    }
}

/// Records mutations that wait for nothing, with a body of the same text, and stops; `recipients` may read them.
fn requests(journal: &Path, recipients: Vec<PathBuf>) -> Rate {
    let mut options =
        RecorderOptions::new(journal.to_owned(), "bench".to_owned(), vec!["cluster".to_owned()]);
    let rule = CommitRule { commit: Some(Commit::Async), ..CommitRule::default() };
    options.rules = CommitRules { rules: vec![rule], async_mutations: true, ..CommitRules::default() };
    (options.journal_bytes_max, options.recipient_files) = (1 << 40, recipients);
    let recorder = Recorder::start(options).unwrap();
    let (method, uri) = (Method::POST, Uri::from_static("/api/v1/namespaces/team-a/configmaps"));
    let attributes = Attributes::parse(method.as_str(), uri.path(), None);
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let head = RequestHead {
        method: &method,
        uri: &uri,
        version: Version::HTTP_2,
        headers: &headers,
        attributes: &attributes,
        upgrade: None,
        identity: None,
    };
    let body = Bytes::from(format!("{{\"data\":{{\"a\":\"{}\"}}}}", "x".repeat(TEXT_BYTES)));
    let caller =
        Arc::new(Caller { pod: Some(Pod { uid: "pod".into(), ..Pod::default() }), ..Caller::default() });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    rate_of(&recorder, || {
        runtime.block_on(async {
            for number in 0..REQUESTS {
                let record = recorder.open(&caller, 0, head, Some(Unmasked(body.clone()))).await.unwrap();
                record.response_started(StatusCode::CREATED, &headers, false);
                record.close(Outcome::Complete, None);
                pause(&recorder, number);
            }
            // Writes all that waits.
            recorder.stop("bench").await.unwrap();
        });
    })
}

/// Measures what is written meanwhile.
fn rate_of(recorder: &Recorder, work: impl FnOnce()) -> Rate {
    let (before, start, cpu) = (recorder.measured(), Instant::now(), cpu_seconds());
    work();
    let (after, seconds) = (recorder.measured(), start.elapsed().as_secs_f64());
    let cpu_seconds = cpu_seconds() - cpu;
    let written = after.events - before.events;
    assert_eq!(after.lost, 0, "nothing was dropped");
    let syncs = after.syncs.iter().sum::<u64>() - before.syncs.iter().sum::<u64>();
    Rate { records: written as f64, seconds, cpu_seconds, bytes: (after.bytes - before.bytes) as f64, syncs }
}

fn kafka(broker: &str) -> Kafka {
    let (brokers, topic) = broker.split_once('/').unwrap();
    Kafka {
        brokers: vec![brokers.to_owned()],
        topic: topic.to_owned(),
        checkpoint_topic: topic.to_owned(),
        key_topic: None,
        properties: BTreeMap::new(),
        property_files: BTreeMap::new(),
        oauth: None,
        replay_window: Duration::from_secs(3600),
    }
}

fn publish(recorder: &Recorder, broker: &str) {
    let events = recorder.measured().events;
    let start = Instant::now();
    let publishing = Publishing::start(&kafka(broker), recorder).unwrap();
    let first = loop {
        if publishing.published().messages > 0 {
            break start.elapsed();
        }
        assert!(start.elapsed() < DEADLINE, "{:?}", publishing.published());
        std::thread::park_timeout(Duration::from_millis(5));
    };
    // Checkpoints are messages too, and the backlog is measured once a second: what counts is the messages.
    while publishing.published().messages < events {
        assert!(start.elapsed() < DEADLINE, "{:?}", publishing.published());
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let seconds = (start.elapsed() - first).as_secs_f64();
    let published = publishing.published();
    println!(
        "publishing  {:>9.0} messages/s {:>5.0} MB/s  after {first:.0?} for the first; {} sent again",
        published.messages as f64 / seconds,
        published.bytes as f64 / seconds / 1e6,
        published.resent
    );
}

/// One core for everything that is started from here on, and all again.
fn on_one_core<T>(run: impl FnOnce() -> T) -> T {
    let all = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut one = CpuSet::new();
    one.set((0..CpuSet::count()).find(|core| all.is_set(*core).unwrap()).unwrap()).unwrap();
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
    let result = run();
    sched_setaffinity(Pid::from_raw(0), &all).unwrap();
    result
}

fn gibibytes() -> u64 {
    std::env::var(GIBIBYTES).map_or(1, |gibibytes| gibibytes.parse().unwrap())
}

/// Fills a journal, says so, and waits for its end.
fn victim(journal: &Path) {
    let recorder = recorder(journal);
    let rate = fill(&recorder, RECORDS);
    let frame = (rate.bytes / rate.records) as u64;
    fill(&recorder, (gibibytes() << 30).saturating_sub(rate.bytes as u64) / frame);
    println!("{FILLED}");
    loop {
        std::thread::park();
    }
}

/// How long an agent takes to accept, whose predecessor was killed with so much in its journal that nobody has published: what it left is
/// adopted by the publisher meanwhile.
fn first_accept(journal: &Path, broker: Option<&str>) {
    let own = std::env::current_exe().unwrap();
    let mut killed = Command::new(own).env(VICTIM, journal).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(killed.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.any(|line| line == FILLED), "it ended before the journal was filled");
    killed.kill().unwrap();
    killed.wait().unwrap();
    let start = Instant::now();
    let next = recorder(journal);
    let publishing = Publishing::start(&kafka(broker.unwrap_or(NOWHERE)), &next).unwrap();
    next.gap("accepted".to_owned(), None).unwrap();
    let accepted = start.elapsed();
    while publishing.published().backlog_bytes < gibibytes() << 29 {
        assert!(start.elapsed() < DEADLINE, "{:?}", publishing.published());
        std::thread::park_timeout(Duration::from_millis(5));
    }
    println!(
        "\nfirst accept {accepted:.0?} after the start, with {} GiB of a killed agent's segments there; their publishing began before {:.0?}",
        gibibytes(),
        start.elapsed()
    );
    assert!(accepted < ACCEPT_MAX, "it took {accepted:?}");
}

fn main() {
    if let Some(journal) = std::env::var_os(VICTIM) {
        return victim(Path::new(&journal));
    }
    let folder = match std::env::var_os("WEIR_BENCH_DIR") {
        Some(on_disk) => tempfile::TempDir::new_in(on_disk),
        None => tempfile::TempDir::new(),
    };
    let folder = folder.unwrap();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    println!("load {}; journal in {}", load.trim(), folder.path().display());
    println!("\ngroup commit, all threads on one core");
    for run in 0..RUNS {
        let journal = folder.path().join(run.to_string());
        // Its threads are started here, and stay on that core.
        let rate = on_one_core(|| fill(&recorder(&journal), RECORDS));
        println!("run {}       {}", run + 1, rate.said());
        std::fs::remove_dir_all(journal).unwrap();
    }
    println!("\nrequests with bodies, all threads on one core, in turn in clear and for one recipient");
    let recipient = folder.path().join("recipient.pem");
    std::fs::write(&recipient, RECIPIENT).unwrap();
    for run in 0..RUNS {
        for (name, recipients) in [("clear", Vec::new()), ("encrypted", vec![recipient.clone()])] {
            let journal = folder.path().join(format!("{name}-{run}"));
            let rate = on_one_core(|| requests(&journal, recipients));
            println!("{name:<11} {}", rate.said());
            std::fs::remove_dir_all(journal).unwrap();
        }
    }
    let journal = folder.path().join("journal");
    let first = recorder(&journal);
    let rate = fill(&first, RECORDS);
    println!("\nall cores   {}", rate.said());
    let broker = std::env::var(BROKER);
    match &broker {
        Ok(broker) => publish(&first, broker),
        Err(_) => println!("publishing: not measured; {BROKER}=HOST:PORT/TOPIC names a Kafka"),
    }
    first_accept(&folder.path().join("killed"), broker.as_deref().ok());
}
