//! When bytes of an answer reach the client, beside when its record is durable; and what the client is told where it
//! cannot be.

use std::{io, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::task::JoinHandle;

use super::{
    rig::{NAME, Rig, soon},
    tests::{bytes, closed, request, status},
};
use crate::recording::fixture::TestDisk;

type Answer = Response<Incoming>;

/// Sends without waiting for the answer, which must come.
async fn begin(rig: &Rig, alpn: &str, method: &str, path: &str, body: &'static str) -> JoinHandle<Answer> {
    let answer = try_begin(rig, alpn, method, path, body).await;
    tokio::spawn(async move { answer.await.expect("no panic").expect("an answer") })
}

/// Sends without waiting for the answer.
async fn try_begin(
    rig: &Rig,
    alpn: &str,
    method: &str,
    path: &str,
    body: &'static str,
) -> JoinHandle<Result<Answer, hyper::Error>> {
    if alpn == "h2" {
        let builder = Request::builder().method(method).uri(format!("https://{NAME}{path}"));
        let sent = rig.http2().await.send_request(request(builder, body));
        return tokio::spawn(async move { soon(sent).await });
    }
    let builder = Request::builder().method(method).uri(path).header("host", NAME);
    let mut client = rig.http1().await;
    let sent = client.send_request(request(builder, body));
    tokio::spawn(async move {
        let answer = soon(sent).await;
        drop(client);
        answer
    })
}

/// Waits until the API server has got something, which is durable then.
async fn forwarded(rig: &Rig) {
    while rig.seen().is_empty() {
        tokio::task::yield_now().await;
    }
}

/// Waits until the disk is asked to make something durable, and gives whoever could go on anyway the time to.
pub(super) async fn asked(disk: &TestDisk) {
    while !disk.is_holding() {
        tokio::task::yield_now().await;
    }
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

fn collect(answer: Answer) -> JoinHandle<Result<Bytes, hyper::Error>> {
    tokio::spawn(async move { soon(answer.into_body().collect()).await.map(|whole| whole.to_bytes()) })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_piece_of_an_answer_waits_for_its_record_and_the_head_does_not() {
    for alpn in ["http/1.1", "h2"] {
        let disk = Arc::new(TestDisk::default());
        let rig = Rig::on_disk(&["h2", "http/1.1"], &disk).await;
        let answer = begin(&rig, alpn, "POST", "/later", "body").await;
        forwarded(&rig).await;
        disk.hold(true);
        rig.upstream.next_event.notify_one();
        let answer = answer.await.expect("the head comes at once");
        assert_eq!(answer.status(), StatusCode::OK);
        let body = collect(answer);
        asked(&disk).await;
        assert!(!body.is_finished(), "{alpn}: the answer came before its record was durable");
        disk.hold(false);
        assert_eq!(body.await.expect("no panic").expect("whole"), "body", "{alpn}");
        rig.recorder.stop("test").await.expect("stopped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_answer_of_unknown_length_only_the_end_waits() {
    for alpn in ["http/1.1", "h2"] {
        let disk = Arc::new(TestDisk::default());
        let rig = Rig::on_disk(&["h2", "http/1.1"], &disk).await;
        let answer = begin(&rig, alpn, "POST", "/two", "").await;
        let mut answer = answer.await.expect("the head");
        let first = soon(answer.frame()).await.expect("a frame").expect("is whole").into_data();
        assert_eq!(first.expect("data"), "piece 0", "{alpn}: nothing holds back what is not the end");
        disk.hold(true);
        rig.upstream.next_event.notify_one();
        let body = collect(answer);
        asked(&disk).await;
        assert!(!body.is_finished(), "{alpn}: the answer ended before its record was durable");
        disk.hold(false);
        assert_eq!(body.await.expect("no panic").expect("whole"), "piece 1", "{alpn}");
        rig.recorder.stop("test").await.expect("stopped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_only_a_head_waits_as_a_whole() {
    for alpn in ["http/1.1", "h2"] {
        let disk = Arc::new(TestDisk::default());
        let rig = Rig::on_disk(&["h2", "http/1.1"], &disk).await;
        let answer = begin(&rig, alpn, "DELETE", "/later", "").await;
        forwarded(&rig).await;
        disk.hold(true);
        rig.upstream.next_event.notify_one();
        asked(&disk).await;
        assert!(!answer.is_finished(), "{alpn}: the answer came before its record was durable");
        disk.hold(false);
        assert_eq!(answer.await.expect("no panic").status(), StatusCode::OK);
        rig.recorder.stop("test").await.expect("stopped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_no_disk() {
    let disk = Arc::new(TestDisk::default());
    let rig = Rig::on_disk(&["h2"], &disk).await;
    disk.hold(true);
    let answer = begin(&rig, "h2", "GET", "/trailers", "").await;
    assert_eq!(bytes(answer.await.expect("the head")).await, "data");
    disk.hold(false);
    let events = rig.events().await;
    assert_eq!(closed(&events).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_whose_record_cannot_be_durable_is_cut_or_said_to_be_kept_back() {
    for alpn in ["http/1.1", "h2"] {
        let disk = Arc::new(TestDisk::default());
        let rig = Rig::on_disk(&["h2", "http/1.1"], &disk).await;
        let answer = try_begin(&rig, alpn, "POST", "/later", "body").await;
        forwarded(&rig).await;
        disk.fail(Some(io::ErrorKind::StorageFull));
        rig.upstream.next_event.notify_one();
        // The head may be cut as well, if it had not left yet.
        if let Ok(head) = answer.await.expect("no panic") {
            collect(head).await.expect("no panic").expect_err("the last piece is kept back");
        }
        disk.fail(None);

        let answer = begin(&rig, alpn, "DELETE", "/later", "").await;
        while rig.seen().len() < 2 {
            tokio::task::yield_now().await;
        }
        disk.fail(Some(io::ErrorKind::StorageFull));
        rig.upstream.next_event.notify_one();
        let answer = answer.await.expect("an answer");
        // A client that tried again by itself would do it twice.
        assert!(!answer.headers().contains_key("retry-after"));
        let (code, reason, message) = status(answer).await;
        assert_eq!((code, reason.as_str()), (500, "InternalError"), "{message}");
        assert!(message.contains("no space left for the journal"), "{message}");
        assert!(message.contains("before you repeat it"), "{message}");

        let answer = begin(&rig, alpn, "POST", "/x", "").await.await.expect("an answer");
        assert_eq!(answer.headers()["retry-after"], "1");
        let (code, reason, message) = status(answer).await;
        assert_eq!((code, reason.as_str()), (503, "ServiceUnavailable"), "{message}");
        assert!(message.starts_with("the request cannot be recorded, so it is not forwarded: "), "{message}");
        assert_eq!(rig.seen().len(), 2, "what is not recorded is not forwarded");
    }
}
