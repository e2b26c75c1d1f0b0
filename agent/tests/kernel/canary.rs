//! The canary: it passes where the kernel enforces, and fails where that only looks so.

use std::{
    io::Read as _,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use weir_agent::{
    interception::{
        canary::{Canary, CanaryError},
        listener::own_netns,
        loader::{Kernel, Pinning},
        observed::Observed,
    },
    recording::{Recorder, RecorderOptions},
};
use weir_common::kernel::programs;

use crate::{
    pins::OwnBpffs,
    world::{DEADLINE, OwnCgroup, load},
};

/// A tree of the test's own, and a server in the place of an API server, which the canary must never reach.
struct Field {
    root: OwnCgroup,
    kernel: Arc<Kernel>,
    server: TcpListener,
    address: SocketAddr,
    canary: Canary,
    observed: Arc<Observed>,
    _journal: tempfile::TempDir,
}

impl Field {
    fn new(name: &str, pinning: Pinning) -> Option<Self> {
        let kernel = load(pinning)?;
        let root = OwnCgroup::new(name);
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        server.set_nonblocking(true).unwrap();
        let address = server.local_addr().unwrap();
        kernel.set_settings(own_netns().unwrap(), 2).unwrap();
        kernel.set_api_endpoint(address, 0).unwrap();
        let journal = tempfile::tempdir().unwrap();
        let options = RecorderOptions::new(journal.path().to_owned(), "node".to_owned(), Vec::new());
        let recorder = Recorder::start(options).unwrap();
        let observed: Arc<Observed> = Arc::default();
        let canary = Canary::new(kernel.clone(), recorder, observed.clone(), &root.0);
        Some(Self { root, kernel, server, address, canary, observed, _journal: journal })
    }

    /// What the server got: none if nobody connected, else the bytes.
    fn arrived(&self) -> Option<Vec<u8>> {
        let (mut stream, _) = self.server.accept().ok()?;
        stream.set_nonblocking(false).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Some(bytes)
    }

    /// The folders and the entries that a check has left.
    fn left(&self) -> (usize, usize) {
        let folders = std::fs::read_dir(&self.root.0).unwrap().flatten();
        let folders = folders.filter(|entry| entry.file_name().to_string_lossy().starts_with("weir-canary"));
        (folders.count(), self.kernel.cgroups().unwrap().len())
    }
}

#[tokio::test]
async fn the_canary_is_refused_and_redirected_and_leaves_nothing_behind() {
    let Some(field) = Field::new("canary", Pinning::Unpinned) else { return };
    field.kernel.attach(&field.root.0).unwrap();
    for round in 1..=3 {
        field.canary.check().await.unwrap();
        let counters = field.kernel.counters().unwrap();
        assert_eq!(
            (counters.seen, counters.redirected, counters.denied_no_listener),
            (2 * round, round, round)
        );
        let numbers = field.observed.read();
        assert_eq!((numbers.canary_redirected, numbers.canary_denied), (round, round), "its own row");
        assert_eq!(field.left(), (0, 0));
    }
    assert_eq!(field.arrived(), None, "the server was dialled");
}

#[tokio::test]
async fn the_canary_fails_where_the_programs_are_attached_to_a_cgroup_that_is_not_the_root() {
    let Some(field) = Field::new("canary-elsewhere", Pinning::Unpinned) else { return };
    let below = field.root.below("somewhere");
    field.kernel.attach(&below.0).unwrap();
    let error = field.canary.check().await.unwrap_err();
    assert!(matches!(error, CanaryError::NotRefused), "{error}");
    assert_eq!(field.arrived(), Some(Vec::new()), "connected once, and sent nothing");
    assert_eq!(field.arrived(), None);
    assert_eq!(field.left(), (0, 0));
}

#[tokio::test]
async fn the_canary_fails_when_a_program_is_detached_and_passes_when_it_is_attached_again() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let Some(field) = Field::new("canary-detached", Pinning::Pinned(pins.clone())) else { return };
    field.kernel.attach(&field.root.0).unwrap();
    field.canary.check().await.unwrap();
    let id = field.root.id();
    for program in [programs::CONNECT4, programs::EGRESS] {
        std::fs::remove_file(pins.join(format!("links/{id}-{program}"))).unwrap();
    }
    // The kernel frees an unpinned link a little later, and one after the other: in between the guard alone is in force.
    let mut error = None;
    let detached = async {
        while !matches!(error, Some(CanaryError::NotRefused)) {
            error = field.canary.check().await.err();
        }
    };
    let ended = tokio::time::timeout(DEADLINE, detached).await;
    assert!(ended.is_ok(), "{error:?}");
    assert_eq!(field.arrived(), Some(Vec::new()));
    assert_eq!(field.kernel.inspect().unwrap().repaired.len(), 2);
    field.canary.check().await.unwrap();
    // Flows that are not published: what is redirected would be closed.
    std::fs::remove_file(pins.join(format!("links/{id}-{}", programs::SOCK_OPS))).unwrap();
    let mut error = None;
    let detached = async {
        while !matches!(error, Some(CanaryError::NoFlow)) {
            error = field.canary.check().await.err();
        }
    };
    let ended = tokio::time::timeout(DEADLINE, detached).await;
    assert!(ended.is_ok(), "{error:?}");
}

#[tokio::test]
async fn a_refusal_by_someone_else_is_not_taken_for_the_kernels() {
    let Some(field) = Field::new("canary-refused", Pinning::Unpinned) else { return };
    // Nothing is attached, and nobody listens any more.
    let Field { kernel, canary, server, address, .. } = field;
    drop(server);
    assert_eq!(kernel.api_endpoints().unwrap().keys().copied().collect::<Vec<_>>(), [address]);
    let error = canary.check().await.unwrap_err();
    assert!(matches!(error, CanaryError::RefusedElsewhere { .. }), "{error}");
}

#[tokio::test]
async fn what_a_killed_agents_canary_has_left_goes_when_the_next_agent_starts() {
    let Some(kernel) = load(Pinning::Unpinned) else { return };
    let root = OwnCgroup::new("canary-left");
    let shell = |script: &str| {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", script]).stdin(std::process::Stdio::piped()).spawn().unwrap()
    };
    let mut ended = shell("exit");
    ended.wait().unwrap();
    // Whose number another program has now.
    let mut other = shell("read line");
    let own = std::process::id();
    let left = [ended.id(), other.id()].map(|pid| root.0.join(format!("weir-canary-{pid}")));
    let alive = root.0.join(format!("weir-canary-{own}"));
    let others = root.0.join("weir-canary-not-a-number");
    for folder in left.iter().chain([&alive, &others]) {
        std::fs::create_dir(folder).unwrap();
    }
    let journal = tempfile::tempdir().unwrap();
    let options = RecorderOptions::new(journal.path().to_owned(), "node".to_owned(), Vec::new());
    let recorder = Recorder::start(options).unwrap();
    Canary::new(kernel, recorder, Arc::default(), &root.0);
    let there = left.each_ref().map(|folder| folder.exists());
    assert_eq!((there, alive.exists(), others.exists()), ([false, false], true, true));
    for folder in [alive, others] {
        std::fs::remove_dir(folder).unwrap();
    }
    other.kill().unwrap();
    other.wait().unwrap();
}
