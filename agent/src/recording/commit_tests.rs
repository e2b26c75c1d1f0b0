//! Tests of when a record is durable, of what happens while the journal is behind, and of what one pod may take.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use tempfile::TempDir;
use weir_common::event::{Channel, Event, Kind, Outcome};

use super::{
    BEHIND_BOUNDS, BacklogLimits, Bodies, COMMIT_BEHIND_MS, Commit, CommitRule, CommitRules, Committed,
    Measured, PodQuota, Recorder, RecorderOptions, RecordingError, RequestRecord, WhenBehind, fixture::*,
    tests::content,
};

fn is_ready(committed: &mut Committed) -> bool {
    committed.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

fn everything(commit: Commit) -> CommitRules {
    let rule = CommitRule { commit: Some(commit), ..CommitRule::default() };
    CommitRules { rules: vec![rule], ..CommitRules::default() }
}

fn behind(when_behind: WhenBehind, wait: Duration) -> CommitRules {
    let backlog = BacklogLimits { bytes_max: Some(1000), age_max: None, wait };
    CommitRules { when_behind: Some(when_behind), backlog, ..CommitRules::default() }
}

/// A recorder whose disk the test has in its hands.
fn recorder(rules: CommitRules) -> (Recorder, Arc<TestDisk>, TempDir) {
    let (directory, disk) = (TempDir::new().unwrap(), Arc::new(TestDisk::default()));
    let options = RecorderOptions { rules, ..options(directory.path()) };
    (on(&disk, options).unwrap(), disk, directory)
}

async fn exec(recorder: &Recorder) -> Result<RequestRecord, RecordingError> {
    let attributes = attributes("create", "pods", "exec");
    let mut headers = HeaderMap::new();
    headers.insert("upgrade", "SPDY/3.1".parse().unwrap());
    let request = (Method::POST, "/api/v1/namespaces/a/pods/b/exec");
    open_as(recorder, &caller(), request, &attributes, &headers, None).await
}

async fn post_as(recorder: &Recorder, pod: &str, body: &str) -> Result<RequestRecord, RecordingError> {
    create(recorder, &of_pod(pod, None), body).await
}

fn answer(record: &RequestRecord, body: &'static str) {
    record.response_started(StatusCode::OK, &content_type(JSON), false);
    assert!(
        record.response_data(&Bytes::from_static(body.as_bytes())).is_none(),
        "it is held, not waited for"
    );
}

fn gaps(events: &[Event]) -> Vec<&str> {
    events
        .iter()
        .filter_map(|event| match &event.kind {
            Kind::Gap { reason, .. } => Some(reason.as_str()),
            _ => None,
        })
        .collect()
}

#[tokio::test]
async fn the_answer_to_a_mutation_waits_until_its_record_is_durable() {
    let (recorder, disk, _directory) = recorder(CommitRules::default());
    let record = post(&recorder, "{}").await.unwrap();
    disk.hold(true);
    answer(&record, "{}");
    let mut committed = record.close_durably(Outcome::Complete, None).expect("somebody waits");
    while !disk.is_holding() {
        tokio::task::yield_now().await;
    }
    assert!(!is_ready(&mut committed));
    disk.hold(false);
    committed.await.unwrap();
    assert!(record.close_durably(Outcome::Complete, None).is_none(), "there is one end");
    // It is there, although nothing has been stopped in an orderly way.
    let (events, _) = read_some(recorder.folder());
    assert_eq!(*names(&events).last().unwrap(), "requestClosed");
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn a_mutation_costs_a_sync_before_it_is_forwarded_and_one_before_its_answer_ends() {
    let (recorder, disk, _directory) = recorder(CommitRules::default());
    drop(post(&recorder, "{}").await.unwrap());
    // What was dropped closes behind; another request's commit takes it along.
    for _ in 0..5 {
        let before = disk.syncs.load(Ordering::SeqCst);
        let record = post(&recorder, "{}").await.unwrap();
        let opened = disk.syncs.load(Ordering::SeqCst);
        assert_eq!(opened - before, 1);
        let committed = record.close_durably(Outcome::Complete, None).unwrap();
        committed.await.unwrap();
        assert_eq!(disk.syncs.load(Ordering::SeqCst) - opened, 1);
    }
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn what_nobody_waits_for_is_on_disk_50_ms_and_a_sync_later_and_how_far_behind_it_was_is_measured() {
    let (recorder, disk, _directory) = recorder(CommitRules::default());
    let pods = attributes("list", "pods", "");
    let until = async |what: &str, is_so: &dyn Fn(&Measured) -> bool| {
        let begun = Instant::now();
        while !is_so(&recorder.measured()) {
            assert!(begun.elapsed() < Duration::from_secs(30), "{what}: {:?}", recorder.measured());
            tokio::task::yield_now().await;
        }
    };
    let groups = |measured: &Measured| measured.behind.iter().sum::<u64>();
    let within = |measured: &Measured, bound: u64| -> u64 {
        let bounds = BEHIND_BOUNDS.iter().take_while(|of| **of <= Duration::from_millis(bound));
        measured.behind.iter().zip(bounds).map(|(count, _)| count).sum()
    };
    let first = recorder.measured();
    for _ in 0..20 {
        let before = groups(&recorder.measured());
        get(&recorder, &pods).await.close(Outcome::Complete, None);
        // Nobody waits, nothing else is recorded, nothing is stopped: it is written all the same.
        until("it is written", &|measured| groups(measured) > before).await;
    }
    let last = recorder.measured();
    // A busy machine may turn to it late, again and again, but not each time.
    assert_eq!(COMMIT_BEHIND_MS, 50, "as documented");
    assert!(within(&last, 100) > within(&first, 100), "{:?}", last.behind);

    // A disk that hangs makes it later, and that is seen.
    disk.hold(true);
    let begun = Instant::now();
    get(&recorder, &pods).await.close(Outcome::Complete, None);
    while !disk.is_holding() || begun.elapsed() < Duration::from_millis(300) {
        tokio::task::yield_now().await;
    }
    disk.hold(false);
    let late = Duration::from_millis(200);
    until("it is late", &|measured| measured.behind_time - last.behind_time > late).await;
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn reads_wait_for_nothing_unless_a_rule_says_so() {
    let (recorder, disk, _directory) = recorder(CommitRules::default());
    let pods = attributes("list", "pods", "");
    disk.hold(true);
    let record = get(&recorder, &pods).await;
    answer(&record, "{}");
    assert!(record.close_durably(Outcome::Complete, None).is_none());
    disk.hold(false);

    for commit in [Commit::Sync, Commit::Strict] {
        recorder.set_rules(everything(commit));
        let before = disk.syncs.load(Ordering::SeqCst);
        let record = get(&recorder, &pods).await;
        assert!(disk.syncs.load(Ordering::SeqCst) > before);
        answer(&record, "{}");
        record.close_durably(Outcome::Complete, None).expect("somebody waits").await.unwrap();
    }
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn strict_makes_each_piece_of_a_stream_durable_before_it_goes_on() {
    let (recorder, disk, _directory) = recorder(everything(Commit::Strict));
    let watch = get(&recorder, &attributes("watch", "pods", "")).await;
    watch.response_started(StatusCode::OK, &content_type(JSON), true);
    let committed = watch.response_data(&Bytes::from_static(b"{\"type\":\"ADDED\"}\n")).expect("it waits");
    committed.await.unwrap();
    let (events, _) = read_some(recorder.folder());
    assert_eq!(*names(&events).last().unwrap(), "content");

    let stream = exec(&recorder).await.unwrap();
    stream.server_stream_data(Bytes::from_static(b"out")).await.unwrap();
    let (events, _) = read_some(recorder.folder());
    assert_eq!(*names(&events).last().unwrap(), "content");

    disk.fail(Some(io::ErrorKind::Other));
    let committed = watch.response_data(&Bytes::from_static(b"{\"type\":\"ADDED\"}\n")).expect("it waits");
    committed.await.unwrap_err();
    stream.server_stream_data(Bytes::from_static(b"out")).await.unwrap_err();
}

#[tokio::test]
async fn all_that_a_stream_sent_is_durable_before_its_end_goes_on() {
    let (recorder, disk, _directory) = recorder(CommitRules::default());
    let stream = exec(&recorder).await.unwrap();
    let before = disk.syncs.load(Ordering::SeqCst);
    stream.server_stream_data(Bytes::from_static(b"exit 0")).await.unwrap();
    stream.server_stream_end().await.unwrap();
    assert!(disk.syncs.load(Ordering::SeqCst) > before);
    let (events, _) = read_some(recorder.folder());
    assert!(names(&events).contains(&"content"));
    // With nothing to wait for it costs nothing.
    let before = disk.syncs.load(Ordering::SeqCst);
    stream.server_stream_end().await.unwrap();
    assert_eq!(disk.syncs.load(Ordering::SeqCst), before);
    disk.fail(Some(io::ErrorKind::Other));
    stream.server_stream_data(Bytes::from_static(b"more")).await.ok();
    stream.server_stream_end().await.unwrap_err();
}

#[tokio::test]
async fn an_answer_whose_record_fails_is_known_to_fail() {
    let (recorder, disk, _directory) = recorder(CommitRules::default());
    let record = post(&recorder, "{}").await.unwrap();
    disk.fail(Some(io::ErrorKind::StorageFull));
    let committed = record.close_durably(Outcome::Complete, None).expect("somebody waits");
    assert!(matches!(committed.await, Err(RecordingError::NoSpace { .. })));
}

#[tokio::test]
async fn while_kafka_is_behind_requests_are_refused_or_wait() {
    let (recorder, _disk, _directory) = recorder(behind(WhenBehind::Refuse, Duration::from_secs(60)));
    recorder.set_unacknowledged(999, Some(1));
    post(&recorder, "{}").await.unwrap();
    recorder.set_unacknowledged(1000, Some(1));
    let error = post(&recorder, "{}").await.unwrap_err();
    assert!(matches!(error, RecordingError::Behind { bytes: 1000, .. }), "{error}");
    let pods = attributes("get", "pods", "");
    assert!(open(&recorder, Method::GET, &pods, &HeaderMap::new(), None).await.is_err(), "reads too");

    recorder.set_rules(behind(WhenBehind::Block, Duration::from_secs(60)));
    let waiting = tokio::spawn({
        let recorder = recorder.clone();
        async move { post(&recorder, "{}").await.map(drop) }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    recorder.set_unacknowledged(0, None);
    waiting.await.unwrap().unwrap();

    recorder.set_unacknowledged(1000, Some(1));
    recorder.set_rules(behind(WhenBehind::Block, Duration::from_millis(20)));
    assert!(
        matches!(post(&recorder, "{}").await, Err(RecordingError::Behind { .. })),
        "the wait has a bound"
    );

    // By age as well.
    let age =
        BacklogLimits { bytes_max: None, age_max: Some(Duration::from_secs(60)), ..BacklogLimits::default() };
    recorder.set_rules(CommitRules { backlog: age, ..CommitRules::default() });
    assert!(matches!(post(&recorder, "{}").await, Err(RecordingError::Behind { .. })));
    recorder.set_unacknowledged(1000, Some(super::entry::unix_us()));
    post(&recorder, "{}").await.unwrap();
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn with_metadata_only_bodies_are_left_out_and_a_gap_says_so() {
    let (recorder, _disk, _directory) = recorder(behind(WhenBehind::MetadataOnly, Duration::ZERO));
    recorder.set_unacknowledged(5000, Some(1));
    let record = post(&recorder, &format!("{{\"a\":\"{CANARY}\"}}")).await.unwrap();
    answer(&record, "{\"answer\":1}");
    record.close_durably(Outcome::Complete, None).expect("somebody waits").await.unwrap();
    // What a stream does is in what it carries: a record without that is none.
    assert!(matches!(exec(&recorder).await, Err(RecordingError::Behind { .. })));
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    assert_eq!(
        names(&events)[1..],
        [
            "sessionStarted",
            "invocationStarted",
            "requestOpened",
            "gap",
            "responseStarted",
            "requestClosed",
            "agentStopped"
        ]
    );
    assert!(gaps(&events)[0].starts_with("bodies of this request are left out: "), "{:?}", gaps(&events));
    let summaries: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.kind {
            Kind::RequestOpened(opened) => opened.body.clone(),
            Kind::RequestClosed(closed) => closed.body.clone(),
            _ => None,
        })
        .collect();
    assert_eq!(summaries.len(), 2);
    for summary in summaries {
        assert_eq!(summary.recorded_bytes, 0);
        assert!(summary.wire_bytes > 0 && summary.truncated.unwrap().contains("left out"));
        assert!(
            summary.digest.unwrap().starts_with("hmac-sha256:"),
            "what it was can be proven all the same"
        );
    }
}

#[tokio::test]
async fn a_request_that_waits_for_the_journal_goes_on_when_the_disk_is_back() {
    let rules = CommitRules {
        when_behind: Some(WhenBehind::Block),
        backlog: BacklogLimits { wait: Duration::from_secs(60), ..BacklogLimits::default() },
        ..CommitRules::default()
    };
    let (recorder, disk, _directory) = recorder(rules);
    disk.fail(Some(io::ErrorKind::StorageFull));
    let waiting = tokio::spawn({
        let recorder = recorder.clone();
        async move { post(&recorder, "{}").await.map(drop) }
    });
    while recorder.failure().is_none() {
        tokio::task::yield_now().await;
    }
    disk.fail(None);
    // Nothing else is recorded that would try the disk again.
    waiting.await.unwrap().unwrap();
    recorder.stop("test").await.unwrap();
    let lost = gaps(&read(recorder.folder())).len();
    assert_eq!(lost, 1, "it was tried once, not again and again");
}

#[tokio::test]
async fn a_pod_over_its_quota_is_refused_and_no_other() {
    let (directory, disk) = (TempDir::new().unwrap(), Arc::new(TestDisk::default()));
    let quota = PodQuota { bytes_per_second: 1000, burst_bytes: 20_000, backlog_percent: 100 };
    let rules = CommitRules {
        backlog: BacklogLimits { wait: Duration::ZERO, ..BacklogLimits::default() },
        ..CommitRules::default()
    };
    let options = RecorderOptions { pod_quota: quota, rules, ..options(directory.path()) };
    let recorder = on(&disk, options).unwrap();
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(30_000));
    post_as(&recorder, "greedy", &large).await.unwrap();
    let error = post_as(&recorder, "greedy", "{}").await.unwrap_err();
    assert!(matches!(error, RecordingError::OverQuota) && error.is_of_pod(), "{error}");
    post_as(&recorder, "other", "{}").await.unwrap();
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn a_pod_may_fill_its_part_of_a_backlog_and_no_more() {
    let (directory, disk) = (TempDir::new().unwrap(), Arc::new(TestDisk::default()));
    let quota = PodQuota { backlog_percent: 25, ..PodQuota::UNLIMITED };
    let rules = CommitRules {
        backlog: BacklogLimits { bytes_max: Some(100_000), ..BacklogLimits::default() },
        ..CommitRules::default()
    };
    let options = RecorderOptions { pod_quota: quota, rules, ..options(directory.path()) };
    let recorder = on(&disk, options).unwrap();
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(30_000));
    recorder.set_unacknowledged(20_000, Some(1));
    post_as(&recorder, "greedy", &large).await.unwrap();
    post_as(&recorder, "greedy", "{}").await.unwrap();
    recorder.set_unacknowledged(60_000, Some(1));
    assert!(matches!(post_as(&recorder, "greedy", "{}").await, Err(RecordingError::OverPart)));
    post_as(&recorder, "other", "{}").await.unwrap();
    // Kafka has caught up: a new account begins.
    recorder.set_unacknowledged(1_000, Some(1));
    post_as(&recorder, "greedy", "{}").await.unwrap();
    recorder.set_unacknowledged(60_000, Some(1));
    post_as(&recorder, "greedy", "{}").await.unwrap();
    recorder.stop("test").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pod_that_floods_delays_itself_and_not_its_neighbour() {
    const FLOODERS: usize = 48;
    const QUIET: usize = 100;
    let (recorder, _disk, _directory) = recorder(CommitRules::default());
    let (ends, large) =
        (Arc::new(AtomicBool::new(false)), format!("{{\"a\":\"{}\"}}", "x".repeat(1_000_000)));
    let flood = |_| {
        let (recorder, ends, large) = (recorder.clone(), Arc::clone(&ends), large.clone());
        tokio::spawn(async move {
            let mut took = Vec::new();
            while !ends.load(Ordering::Relaxed) {
                let since = Instant::now();
                drop(post_as(&recorder, "greedy", &large).await.expect("it is only slow"));
                took.push(since.elapsed());
            }
            took
        })
    };
    let flooders: Vec<_> = (0..FLOODERS).map(flood).collect();
    let mut quiet = Vec::new();
    for _ in 0..QUIET {
        let since = Instant::now();
        let record = post_as(&recorder, "quiet", "{}").await.expect("nobody is refused for another");
        quiet.push(since.elapsed());
        record.close(Outcome::Complete, None);
    }
    ends.store(true, Ordering::Relaxed);
    let mut greedy = Vec::new();
    for flooder in flooders {
        greedy.append(&mut flooder.await.unwrap());
    }
    let median = |mut took: Vec<Duration>| {
        took.sort_unstable();
        took[took.len() / 2]
    };
    let (quiet, greedy) = (median(quiet), median(greedy));
    println!("median of the quiet pod {quiet:?}, of the one that floods {greedy:?}");
    assert!(quiet * 3 < greedy, "{quiet:?} against {greedy:?}");
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn in_an_emergency_requests_go_on_without_durable_records_and_the_gap_says_how_many_events_are_lost() {
    let (recorder, disk, _directory) = recorder(CommitRules::default());
    let stream = exec(&recorder).await.unwrap();
    disk.fail(Some(io::ErrorKind::StorageFull));
    post(&recorder, "{}").await.unwrap_err();
    recorder.set_emergency(Some(Duration::from_secs(600)));
    let measured = recorder.measured();
    assert!(measured.emergency.is_some() && measured.emergency_requests == 0);
    let record = post(&recorder, "{}").await.unwrap();
    answer(&record, "{}");
    assert!(record.close_durably(Outcome::Complete, None).is_none(), "nobody waits");
    stream.client_stream_data(Bytes::from_static(b"ls")).await.unwrap();
    assert_eq!(recorder.measured().emergency_requests, 1);
    assert!(recorder.failure().is_some(), "that recording stopped is said all the same");

    recorder.set_emergency(None);
    post(&recorder, "{}").await.unwrap_err();
    assert!(recorder.measured().emergency.is_none());
    disk.fail(None);
    post(&recorder, "{}").await.unwrap();
    recorder.stop("test").await.unwrap();
    assert!(!gaps(&read(recorder.folder())).is_empty());
}

#[tokio::test]
async fn an_emergency_ends_by_itself() {
    let (recorder, disk, _directory) = recorder(CommitRules::default());
    recorder.set_emergency(Some(Duration::ZERO));
    assert!(recorder.measured().emergency.is_none());
    disk.fail(Some(io::ErrorKind::StorageFull));
    post(&recorder, "{}").await.unwrap_err();
}

#[tokio::test]
async fn a_level_leaves_out_bodies_and_says_so_and_never_the_request_itself() {
    for (level, [asked, answered]) in [
        (Bodies::Metadata, [false, false]),
        (Bodies::Request, [true, false]),
        (Bodies::RequestResponse, [true, true]),
    ] {
        let rule = CommitRule { level: Some(level), ..CommitRule::default() };
        let (recorder, disk, _directory) =
            recorder(CommitRules { rules: vec![rule], ..CommitRules::default() });
        let before = disk.syncs.load(Ordering::SeqCst);
        let record = post(&recorder, r#"{"a":"asked"}"#).await.unwrap();
        assert!(disk.syncs.load(Ordering::SeqCst) > before, "a mutation is durable at every level");
        answer(&record, r#"{"b":"answered"}"#);
        record.close_durably(Outcome::Complete, None).expect("somebody waits").await.unwrap();
        recorder.stop("test").await.unwrap();
        let events = read(recorder.folder());
        let has = |wanted| !content(&events, wanted).is_empty();
        assert_eq!([has(Channel::RequestBody), has(Channel::ResponseBody)], [asked, answered], "{level:?}");
        let bodies = events.iter().filter_map(|event| match &event.kind {
            Kind::RequestOpened(opened) => opened.body.clone(),
            Kind::RequestClosed(closed) => closed.body.clone(),
            _ => None,
        });
        for (summary, recorded) in bodies.zip([asked, answered]) {
            let why = summary.truncated.unwrap_or_default();
            assert_eq!(why.starts_with("left out: a rule wants"), !recorded, "{level:?}: {why}");
            let keyed = summary.digest.unwrap().starts_with("hmac-sha256:");
            assert!(summary.wire_bytes > 0 && keyed != recorded, "{level:?}");
        }
    }
}
