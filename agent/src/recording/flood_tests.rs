//! What one pod can do to the recorder's memory and to its neighbours while the disk hangs.

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt as _;
use http::{HeaderMap, Method, StatusCode};
use tempfile::TempDir;
use weir_common::event::{Channel, Event, Kind, Outcome};

use super::{Recorder, RequestRecord, fixture::*, queue::QUEUE_BYTES_MAX, share::Share};

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
