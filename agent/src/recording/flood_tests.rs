//! What one pod can do to the recorder's memory and to its neighbours while the disk hangs.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
    mpsc,
};

use bytes::Bytes;
use futures::FutureExt as _;
use http::{HeaderMap, Method, StatusCode};
use tempfile::TempDir;
use weir_common::event::{Channel, Event, Kind, Outcome};

use super::{
    Recorder, RequestRecord, admission::COMMIT_WAIT_MAX, fixture::*, masking, queue::QUEUE_BYTES_MAX,
    share::Share,
};

/// A piece of a log.
const PIECE: Bytes = Bytes::from_static(&[b'x'; 16 * 1024]);

fn recorder() -> (Recorder, Arc<TestDisk>, TempDir) {
    let (directory, disk) = (TempDir::new().unwrap(), Arc::new(TestDisk::default()));
    (on(&disk, options(directory.path())).unwrap(), disk, directory)
}

fn share(recorder: &Recorder, pod: &str) -> Arc<Share> {
    recorder.inner.shares.of(&of_pod(pod, None), std::time::Instant::now())
}

async fn log(recorder: &Recorder, pod: &str) -> RequestRecord {
    let attributes = attributes("get", "pods", "log");
    let request = (Method::GET, "/api/v1/namespaces/a/pods/b/log?follow=true");
    let caller = of_pod(pod, None);
    let record = open_as(recorder, &caller, request, &attributes, &HeaderMap::new(), None).await.unwrap();
    record.response_started(StatusCode::OK, &content_type("text/plain"), true);
    record
}

/// The disk hangs with a group; what is recorded from now on waits.
async fn hang(recorder: &Recorder, disk: &TestDisk) {
    disk.hold(true);
    let finding = recorder.clone();
    tokio::spawn(async move { finding.finding_durably("test", "the disk hangs").await });
    while !disk.is_holding() {
        tokio::task::yield_now().await;
    }
}

/// Floods until the pod's lane has no room and its next records wait for it; returns the bytes that were sent.
async fn flood(recorder: &Recorder, record: &RequestRecord, share: &Share) -> u64 {
    let mut sent = 0;
    let (queue, workers) = (&recorder.inner.queue, &recorder.inner.workers);
    // One lane alone holds no more than a third of the queue.
    while !(workers.are_stuck() && queue.lane_bytes(share) > QUEUE_BYTES_MAX / 4) {
        if workers.waiting() < 8 {
            record.response_data(&PIECE);
            sent += PIECE.len() as u64;
        }
        tokio::task::yield_now().await;
    }
    sent
}

/// Bytes of the answer that are recorded, and those that gaps say are missing.
fn accounted(events: &[Event]) -> (u64, u64) {
    let (mut recorded, mut missing) = (0, 0);
    for event in events {
        match &event.kind {
            Kind::Content(content) if content.channel == Channel::ResponseBody => {
                recorded += content.bytes.to_vec().unwrap().len() as u64;
            }
            Kind::Gap { bytes: Some(bytes), .. } => missing += bytes,
            _ => {}
        }
    }
    (recorded, missing)
}

#[tokio::test]
async fn a_log_that_floods_while_the_disk_hangs_does_not_hold_up_another_pods() {
    let (recorder, disk, _directory) = recorder();
    let (greedy, quiet) = (log(&recorder, "greedy").await, log(&recorder, "quiet").await);
    hang(&recorder, &disk).await;
    let sent = flood(&recorder, &greedy, &share(&recorder, "greedy")).await;
    assert!(recorder.inner.workers.waiting() > 0);
    let (neighbour, waiting) = (share(&recorder, "quiet"), recorder.inner.workers.waiting());
    // What is masked for it reaches the queue, whatever thread is its.
    let mut others = vec![quiet];
    for _ in 0..8 {
        others.push(log(&recorder, "quiet").await);
    }
    let before = recorder.inner.queue.lane_bytes(&neighbour);
    for other in &others {
        other.response_data(&PIECE);
    }
    while recorder.inner.queue.lane_bytes(&neighbour) < before + others.len() * PIECE.len() {
        tokio::task::yield_now().await;
    }
    assert!(recorder.inner.workers.waiting() >= waiting, "the other one waits still");
    disk.hold(false);
    drop((greedy, others));
    recorder.stop("test").await.unwrap();
    let (recorded, missing) = accounted(&read(recorder.folder()));
    assert_eq!((recorded, missing), (sent + 9 * PIECE.len() as u64, 0), "all of it is there in the end");
}

#[tokio::test]
async fn a_stream_of_single_bytes_is_bounded_and_what_does_not_fit_is_one_stretch() {
    const BYTES: usize = 100_000;
    let (recorder, disk, _directory) = recorder();
    let record = log(&recorder, "greedy").await;
    hang(&recorder, &disk).await;
    let mut sent = flood(&recorder, &record, &share(&recorder, "greedy")).await;
    for _ in 0..BYTES {
        record.response_data(&Bytes::from_static(b"y"));
    }
    sent += BYTES as u64;
    let waiting = recorder.inner.workers.waiting();
    assert!(waiting < 17_000, "{waiting} pieces wait");
    disk.hold(false);
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let (recorded, missing) = accounted(&read(recorder.folder()));
    assert!(missing > 0 && recorded + missing == sent, "{recorded} and {missing} of {sent}");
}

#[tokio::test]
async fn requests_that_come_and_go_while_the_disk_hangs_leave_nothing_behind() {
    let (recorder, disk, _directory) = recorder();
    let record = log(&recorder, "greedy").await;
    hang(&recorder, &disk).await;
    flood(&recorder, &record, &share(&recorder, "greedy")).await;
    let (bytes, jobs) = (recorder.inner.queue.backlog_bytes(), recorder.inner.workers.waiting());
    for number in 0..1000 {
        // Each claims to be somebody else, so that each is a session of its own.
        let caller = of_pod("greedy", Some(format!("user-{number}")));
        assert!(
            create(&recorder, &caller, "{}").now_or_never().is_none(),
            "it waits, and the client goes away"
        );
    }
    assert_eq!(recorder.inner.queue.backlog_bytes(), bytes);
    assert_eq!(recorder.inner.workers.waiting(), jobs);
    // Another pod has room.
    assert!(log(&recorder, "quiet").now_or_never().is_some());
    disk.hold(false);
    drop(record);
    recorder.stop("test").await.unwrap();
    read(recorder.folder());
}

#[tokio::test]
async fn bodies_of_a_pod_that_take_for_ever_do_not_hold_up_another_pods() {
    let (recorder, _disk, _directory) = recorder();
    let greedy = share(&recorder, "greedy");
    let (release, held) = mpsc::channel::<()>();
    let (held, begun) = (Arc::new(Mutex::new(held)), Arc::new(AtomicUsize::new(0)));
    let mut flood = Vec::new();
    for _ in 0..330 {
        let (recorder, greedy) = (recorder.clone(), Arc::clone(&greedy));
        let (held, begun) = (Arc::clone(&held), Arc::clone(&begun));
        flood.push(tokio::spawn(async move {
            let hang = move || {
                begun.fetch_add(1, Ordering::SeqCst);
                held.lock().unwrap().recv().is_err()
            };
            recorder.inner.masking.run(&greedy, 10 * COMMIT_WAIT_MAX, hang).await
        }));
    }
    while begun.load(Ordering::SeqCst) < masking::OF_POD_MAX {
        tokio::task::yield_now().await;
    }
    let body = format!(r#"{{"data":{{"a":"{}"}}}}"#, "x".repeat(100 * 1024));
    // Fails after 30 s where it waits behind them.
    let record = create(&recorder, &of_pod("quiet", None), &body).await.unwrap();
    let own = create(&recorder, &of_pod("greedy", None), &body).now_or_never();
    assert!(own.is_none(), "its own wait behind each other");
    assert_eq!(begun.load(Ordering::SeqCst), masking::OF_POD_MAX);
    drop(release);
    for masked in flood {
        assert!(masked.await.unwrap().unwrap());
    }
    record.close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let recorded = read(recorder.folder()).into_iter().map(|event| match event.kind {
        Kind::Content(content) if content.channel == Channel::RequestBody => {
            content.bytes.to_vec().unwrap().len()
        }
        _ => 0,
    });
    assert_eq!(recorded.sum::<usize>(), body.len());
}
