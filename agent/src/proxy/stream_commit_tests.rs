//! When bytes of an upgraded stream go on, beside when they are durable.

use std::sync::Arc;

use http::{Request, StatusCode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::oneshot,
};

use super::{
    commit_tests::asked,
    rig::{Rig, SAID, soon},
    tests::send,
};
use crate::recording::{Commit, CommitRule, CommitRules, fixture::TestDisk};

/// A frame of WebSocket for the process' standard input; its mask is zero.
fn frame(payload: &[u8]) -> Vec<u8> {
    [&[0x82, 0x80 | (payload.len() + 1) as u8, 0, 0, 0, 0, 0][..], payload].concat()
}

/// A stream, open both ways, whose records so far are durable: from here on the disk is asked for what follows, and nothing else.
async fn exec(commit: Commit) -> (Arc<TestDisk>, Rig, TokioIo<Upgraded>) {
    let disk = Arc::new(TestDisk::default());
    let rig = Rig::on_disk(&["http/1.1"], &disk).await;
    let rule = CommitRule { commit: Some(commit), ..CommitRule::default() };
    rig.recorder.set_rules(CommitRules { rules: vec![rule], ..CommitRules::default() });
    let head = Request::post("/api/v1/namespaces/a/pods/p/exec?command=sh&stdin=true")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-protocol", "v4.channel.k8s.io");
    let response = send(&rig, head, "").await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.expect("upgraded"));
    soon(stream.read_exact(&mut [0; 6])).await.expect("a greeting");
    // The group that this is in has all that was said before it.
    let first = frame(b"first");
    stream.write_all(&first).await.expect("sent");
    reached(&rig, first.len()).await;
    (disk, rig, stream)
}

/// Waits until the server has got so many bytes of the stream.
async fn reached(rig: &Rig, bytes: usize) {
    let mut streamed = rig.upstream.streamed.subscribe();
    soon(streamed.wait_for(|all| all.len() >= bytes)).await.expect("the server is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_says_reaches_the_server_when_it_is_durable_and_not_before() {
    for commit in [Commit::Sync, Commit::Strict] {
        let (disk, rig, mut stream) = exec(commit).await;
        let streamed = || rig.upstream.streamed.borrow().clone();
        let before = streamed();
        for words in [&b"rm -r x\n"[..], b"exit\n"] {
            let before = streamed();
            disk.hold(true);
            stream.write_all(&frame(words)).await.expect("sent");
            asked(&disk).await;
            assert_eq!(streamed(), before, "{commit:?}: it was forwarded before it was durable");
            disk.hold(false);
            reached(&rig, before.len() + frame(words).len()).await;
        }
        let said = [&before[..], &frame(b"rm -r x\n"), &frame(b"exit\n")].concat();
        assert_eq!(streamed(), said, "{commit:?}");
        drop(stream);
        rig.recorder.stop("test").await.expect("stopped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_says_waits_for_its_record_under_strict_alone() {
    for commit in [Commit::Sync, Commit::Strict] {
        let (disk, rig, mut stream) = exec(commit).await;
        disk.hold(true);
        rig.upstream.next_event.notify_one();
        let heard = tokio::spawn(async move {
            let mut said = [0; SAID.len()];
            soon(stream.read_exact(&mut said)).await.expect("heard");
            (said, stream)
        });
        if commit == Commit::Strict {
            asked(&disk).await;
            assert!(!heard.is_finished(), "it was forwarded before it was durable");
            disk.hold(false);
        }
        let (said, stream) = heard.await.expect("no panic");
        assert_eq!(&said, SAID);
        disk.hold(false);
        drop(stream);
        rig.recorder.stop("test").await.expect("stopped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_stream_reaches_the_client_when_all_of_it_is_durable() {
    let (disk, rig, mut stream) = exec(Commit::Sync).await;
    let echo = rig.upstream.streamed.borrow().clone();
    disk.hold(true);
    stream.shutdown().await.expect("half closed");
    let (heard, echoed) = oneshot::channel();
    let ended = tokio::spawn(async move {
        let mut said = vec![0; echo.len()];
        soon(stream.read_exact(&mut said)).await.expect("heard");
        heard.send(said == echo).expect("somebody waits");
        soon(stream.read_to_end(&mut Vec::new())).await.expect("the end")
    });
    assert!(echoed.await.expect("no panic"), "what is not the end waits for no disk");
    asked(&disk).await;
    assert!(!ended.is_finished(), "it ended before its record was durable");
    disk.hold(false);
    assert_eq!(ended.await.expect("no panic"), 0);
    rig.recorder.stop("test").await.expect("stopped");
}
