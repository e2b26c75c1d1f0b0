//! Containers that a runtime asks about over its socket; what a real one does, the integration tests see.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    cluster_watch::KnownPods,
    held_back::HeldBack,
    observed::Observed,
    pod::PodUid,
    pod_lookup::NamedPod,
    settled::{Settled, Verdict},
    waits::WaitNumbers,
};
use crate::nri::{
    self,
    messages::tests::{calls, configure, container_starts},
    wire::{self, Decoder, Kind, Service},
};

const UID: &str = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";

/// An agent's plugin and everything around it.
struct Rig {
    folder: tempfile::TempDir,
    listener: UnixListener,
    settled: Arc<Settled>,
    _known: watch::Sender<KnownPods>,
    named: mpsc::Receiver<NamedPod>,
    observed: Arc<Observed>,
    frozen: watch::Sender<bool>,
    part: CancellationToken,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.part.cancel();
    }
}

impl Rig {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("nri.sock");
        let listener = UnixListener::bind(&socket).expect("listens");
        let (publish, known) = watch::channel(Some(Arc::default()));
        let (send, named) = mpsc::channel(8);
        let (freeze, frozen) = watch::channel(false);
        let (settled, observed): (Arc<Settled>, Arc<Observed>) = Default::default();
        let part = CancellationToken::new();
        let held_back =
            HeldBack { settled: settled.clone(), known, named: send, observed: observed.clone(), frozen };
        tokio::spawn(nri::follow(socket, held_back, part.clone()));
        Self { folder, listener, settled, _known: publish, named, observed, frozen: freeze, part }
    }

    /// A runtime whose plugin has registered, and is told how long it may take.
    async fn runtime(&self, request_timeout_ms: i64) -> Runtime {
        let (stream, _) = self.listener.accept().await.expect("accepts");
        let mut runtime = Runtime { stream, decoder: Decoder::default() };
        let register = runtime.read().await;
        assert_eq!((register.service, register.kind), (Service::Runtime, Kind::Request));
        for (stream, method, payload) in
            [(1, "Configure", configure(request_timeout_ms)), (3, "Synchronize", Vec::new())]
        {
            runtime.call(stream, method, payload).await;
            assert_eq!(runtime.read().await.stream, stream);
        }
        runtime
    }

    fn numbers(&self) -> WaitNumbers {
        self.observed.waits()
    }
}

struct Runtime {
    stream: UnixStream,
    decoder: Decoder,
}

impl Runtime {
    async fn call(&mut self, stream: u32, method: &str, payload: Vec<u8>) {
        self.stream.write_all(&calls(stream, method, payload)).await.expect("is taken");
    }

    async fn read(&mut self) -> wire::Message {
        let mut buffer = [0; 4096];
        let length = self.stream.read(&mut buffer).await.expect("says something");
        let mut messages = self.decoder.push(&buffer[..length]).expect("is NRI");
        assert_eq!(messages.len(), 1);
        messages.remove(0)
    }
}

#[tokio::test]
async fn a_container_is_held_back_until_its_pod_has_everything() {
    let mut rig = Rig::start();
    let mut runtime = rig.runtime(600_000).await;
    assert!(rig.numbers().connected);
    runtime.call(5, "StateChange", container_starts(UID, 0)).await;
    // The API server is asked for a pod that nobody knows, and then it is waited for.
    assert!(rig.named.recv().await.is_some());
    assert_eq!((rig.numbers().looked_up, rig.numbers().settled), (1, 0));
    let pod = PodUid::new(UID).expect("a UID");
    rig.settled.set(&pod, Some(Verdict::Listens((4, 1))));
    assert_eq!(runtime.read().await.stream, 5);
    // The next one of the same pod does not wait.
    runtime.call(7, "StateChange", container_starts(UID, 0)).await;
    assert_eq!(runtime.read().await.stream, 7);
    assert_eq!((rig.numbers().settled, rig.numbers().timed_out), (2, 0));
}

#[tokio::test]
async fn a_container_is_let_go_before_the_runtime_throws_the_plugin_out() {
    let rig = Rig::start();
    let mut runtime = rig.runtime(40).await;
    let asked = Instant::now();
    runtime.call(5, "StateChange", container_starts(UID, 0)).await;
    assert_eq!(runtime.read().await.stream, 5);
    assert!(asked.elapsed() >= Duration::from_millis(30));
    assert_eq!((rig.numbers().settled, rig.numbers().timed_out), (0, 1));
}

#[tokio::test]
async fn while_a_successor_takes_over_it_is_the_one_to_wait_for() {
    let mut rig = Rig::start();
    let mut runtime = rig.runtime(600_000).await;
    runtime.call(5, "StateChange", container_starts(UID, 0)).await;
    assert!(rig.named.recv().await.is_some());
    rig.frozen.send_replace(true);
    assert_eq!(runtime.read().await.stream, 5);
    runtime.call(7, "StateChange", container_starts(UID, 0)).await;
    assert_eq!(runtime.read().await.stream, 7);
    assert_eq!((rig.numbers().not_ours, rig.numbers().timed_out), (2, 0));
}

#[tokio::test]
async fn what_is_no_pod_of_a_kubelet_is_not_waited_for() {
    let rig = Rig::start();
    let mut runtime = rig.runtime(600_000).await;
    runtime.call(5, "StateChange", container_starts("made-by-hand", 0)).await;
    assert_eq!(runtime.read().await.stream, 5);
    runtime.call(7, "StateChange", b"\xff".to_vec()).await;
    assert_eq!(runtime.read().await.stream, 7, "what cannot be read is answered");
    assert_eq!((rig.numbers().not_ours, rig.numbers().timed_out), (1, 0));
}

#[tokio::test]
async fn a_runtime_that_is_restarted_is_registered_with_again() {
    let mut rig = Rig::start();
    drop(rig.runtime(2000).await);
    rig.runtime(2000).await;
    // One that was away for a while, as at the start of a node.
    let socket = rig.folder.path().join("nri.sock");
    std::fs::remove_file(&socket).expect("is there");
    let says_why = async {
        while !rig.observed.containers_wait().is_err_and(|reason| reason.contains("No such file")) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), says_why).await.expect("the reason is said");
    rig.listener = UnixListener::bind(&socket).expect("listens");
    rig.runtime(2000).await;
    assert_eq!((rig.numbers().connected, rig.observed.containers_wait()), (true, Ok(())));
}
