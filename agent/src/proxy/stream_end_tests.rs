//! How upgraded streams end, and what they hold until then: real TLS on both sides.

use std::time::Duration;

use http::{Request, StatusCode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;

use super::{
    Limits,
    rig::{NAME, Rig, soon},
    tests::{closed, refused_connections, send},
};

/// A stream that has begun.
async fn exec(rig: &Rig) -> TokioIo<Upgraded> {
    let head = Request::post("/api/v1/namespaces/a/pods/p/exec?command=sh")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-protocol", "v4.channel.k8s.io");
    let response = send(rig, head, "").await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut stream = TokioIo::new(hyper::upgrade::on(response).await.expect("upgraded"));
    soon(stream.read_exact(&mut [0; 6])).await.expect("a greeting");
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgraded_stream_keeps_its_connections_place_until_it_ends() {
    let limits = Limits { connections_per_pod_max: 2, ..Limits::default() };
    let rig = Rig::with_limits(&["http/1.1"], limits).await;
    let (first, second) = (exec(&rig).await, exec(&rig).await);
    // HTTP is over on both connections, and each is a stream.
    soon(async {
        while rig.proxy.active() > 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let connected = || rig.try_connect("http/1.1", NAME);
    assert!(soon(connected()).await.is_err(), "a third connection of a pod that may have two");
    drop(first);
    soon(async { while connected().await.is_err() {} }).await;
    drop(second);
    let events = rig.events().await;
    assert!(refused_connections(&events).iter().all(|reason| reason.contains("too many connections")));
    assert_eq!(closed(&events).len(), 2);
}
