//! Enrolment on a cgroup tree of the test's own, shaped like a node's: the API server's part is a channel, the rest
//! is the kernel's.

use std::{
    collections::{BTreeMap, HashMap},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use weir_agent::{
    config::Mode,
    interception::{
        api_set::ClusterAddresses,
        canary::Health,
        cluster_watch::{ApiSet, KnownPod, KnownPods},
        guard::{self, ConfiguredCluster},
        hosts::Hosts,
        loader::Pinning,
        observed::Observed,
        pinned::pinned_state,
        pod::PodUid,
        quarantine,
        run::{Ended, InterceptionError, Options, run},
    },
    proxy::Accepted,
    recording::{Recorder, RecorderOptions},
};

use crate::coverage::covered;
use crate::pins::OwnBpffs;
use crate::world::{API4, API6, Dial, OwnCgroup, OwnNetns, dial, eventually, is, load};

/// How often coverage is recorded here: an agent does it once a minute.
const COVERAGE: Duration = Duration::from_secs(1);
const CONTAINER: &str = "4f1c0c9a7f0e4d7b8a6f5e4d3c2b1a09f8e7d6c5b4a392817060504030201000";

pub(crate) fn known(uid: &str, mode: Option<Mode>, host_network: bool) -> KnownPod {
    KnownPod {
        uid: PodUid::new(uid).unwrap(),
        static_hash: None,
        namespace: "agents".to_owned(),
        name: format!("pod-{uid}"),
        service_account: "builder".to_owned(),
        ip: None,
        host_network,
        containers: BTreeMap::from([(CONTAINER.to_owned(), "shell".to_owned())]),
        intent: BTreeMap::new(),
        labels: Arc::default(),
        mode,
    }
}

/// A node: the tree, the agent's interception on it, and what it accepts.
pub(crate) struct Node {
    root: OwnCgroup,
    pub(crate) kubepods: OwnCgroup,
    pods: watch::Sender<KnownPods>,
    pub(crate) published: watch::Sender<ApiSet>,
    pub(crate) accepted: mpsc::Receiver<Accepted>,
    pub(crate) ready: watch::Receiver<bool>,
    pub(crate) serves: watch::Sender<bool>,
    pub(crate) recorder: Recorder,
    observed: Arc<Observed>,
    cancellation: CancellationToken,
    running: tokio::task::JoinHandle<Result<Ended, InterceptionError>>,
    pub(crate) journal: tempfile::TempDir,
}

/// An agent's interception that runs, and both ends of what it talks to.
struct Agent {
    pods: watch::Sender<KnownPods>,
    published: watch::Sender<ApiSet>,
    accepted: mpsc::Receiver<Accepted>,
    ready: watch::Receiver<bool>,
    serves: watch::Sender<bool>,
    observed: Arc<Observed>,
    cancellation: CancellationToken,
    running: tokio::task::JoinHandle<Result<Ended, InterceptionError>>,
}

impl Agent {
    fn start(
        root: &OwnCgroup,
        pinning: Pinning,
        known: KnownPods,
        recorder: &Recorder,
        journal: &Path,
    ) -> Self {
        let (pods, watched) = watch::channel(known);
        let (published, api_set) = watch::channel(ApiSet::default());
        let (sender, accepted) = mpsc::channel(16);
        let (ready, is_ready) = watch::channel(false);
        let (serves, is_serving) = watch::channel(true);
        let cancellation = CancellationToken::new();
        let observed: Arc<Observed> = Arc::default();
        let options = Options {
            serves: is_serving,
            guard: guard::Options {
                cgroup_root: Some(root.0.clone()),
                pinning,
                clusters: Some(vec![ConfiguredCluster {
                    name: "cluster".to_owned(),
                    addresses: vec![API4],
                    names: Vec::new(),
                }]),
                state_directory: journal.join("state"),
            },
            pods: watched,
            clusters: vec![ClusterAddresses {
                cluster: 0,
                published: api_set,
                configured: vec![API4],
                names: Vec::new(),
                proof: watch::channel(None).1,
            }],
            name_servers: Vec::new(),
            nodes: watch::channel(Hosts::default()).1,
            handover: None,
            nri: None,
            accepted: sender,
            ready,
            observed: observed.clone(),
            coverage_interval: COVERAGE,
        };
        let running = tokio::spawn(run(options, None, recorder.clone(), cancellation.clone()));
        Self { pods, published, accepted, ready: is_ready, serves, observed, cancellation, running }
    }
}

impl Node {
    pub(crate) fn start(name: &str) -> Option<Self> {
        Self::pinned(name, Pinning::Unpinned)
    }

    pub(crate) fn pinned(name: &str, pinning: Pinning) -> Option<Self> {
        load(Pinning::Unpinned)?;
        let root = OwnCgroup::new(name);
        let kubepods = root.below("kubepods");
        let journal = tempfile::tempdir().unwrap();
        let recorder = Recorder::start(RecorderOptions {
            journal_bytes_max: 256 * 1024 * 1024,
            response_bytes_max: 1024,
            session_idle_timeout: Duration::from_secs(60),
            ..RecorderOptions::new(journal.path().to_owned(), "node".to_owned(), vec!["cluster".to_owned()])
        })
        .unwrap();
        let agent = Agent::start(&root, pinning, None, &recorder, journal.path());
        Some(Self {
            root,
            kubepods,
            pods: agent.pods,
            published: agent.published,
            accepted: agent.accepted,
            ready: agent.ready,
            serves: agent.serves,
            recorder,
            observed: agent.observed,
            cancellation: agent.cancellation,
            running: agent.running,
            journal,
        })
    }

    /// Ends the agent and starts another, which knows the pods at once.
    pub(crate) async fn restart(&mut self, pinning: Pinning, known: KnownPods) {
        self.cancellation.cancel();
        (&mut self.running).await.unwrap().unwrap();
        let agent = Agent::start(&self.root, pinning, known, &self.recorder, self.journal.path());
        (self.pods, self.published, self.accepted) = (agent.pods, agent.published, agent.accepted);
        (self.ready, self.cancellation, self.running) = (agent.ready, agent.cancellation, agent.running);
        (self.observed, self.serves) = (agent.observed, agent.serves);
    }

    pub(crate) fn know(&self, pods: &[KnownPod]) {
        let pods: HashMap<_, _> = pods.iter().map(|pod| (pod.uid.clone(), Arc::new(pod.clone()))).collect();
        self.pods.send_replace(Some(Arc::new(pods)));
    }

    /// Ends the agent. Gives its cgroups, for who still has some below them; they are removed in this order.
    pub(crate) async fn stop(self) -> (OwnCgroup, OwnCgroup) {
        self.cancellation.cancel();
        self.running.await.unwrap().unwrap();
        self.recorder.stop("test").await.unwrap();
        (self.kubepods, self.root)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_denied_until_it_is_enrolled_and_then_known_by_name() {
    let Some(mut node) = Node::start("enrol") else { return };
    let uid = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";
    let qos = node.kubepods.below("besteffort");
    let pod = qos.below(&format!("pod{uid}"));
    let container = pod.below(CONTAINER);
    let sandbox = OwnNetns::new();
    container.take(sandbox.pid());
    let client = |target| dial(&container.0, Some(&sandbox), target);
    eventually("unknown: denied", || client(Dial::Tcp(API4)), is(nix::Error::ECONNREFUSED)).await;
    assert!(!*node.ready.borrow(), "nothing is known yet");

    node.know(&[known(uid, Some(Mode::Enforce), false)]);
    node.ready.wait_for(|ready| *ready).await.unwrap();
    eventually("enrolled: arrives", || client(Dial::Tcp(API4)), Result::is_ok).await;
    let accepted = node.accepted.recv().await.unwrap();
    assert_eq!((accepted.original_destination, accepted.cluster), (API4, 0));
    let caller = &accepted.caller;
    assert_eq!(caller.pod.as_ref().unwrap().uid, uid);
    let found = caller.container.as_ref().unwrap();
    assert_eq!((found.id.as_str(), found.name.as_str()), (CONTAINER, "shell"));
    assert_eq!((caller.cgroup, caller.dialled.as_str()), (container.id(), "192.0.2.1:443"));
    assert!(caller.process.as_ref().unwrap().pid > 0);

    // What the kernel saw against what was served is recorded again and again.
    let first = covered(node.recorder.folder(), 1).await;
    client(Dial::Tcp(API4)).unwrap();
    let redirected = first.iter().flat_map(|one| &one.pods).map(|pod| pod.redirected).sum::<u64>();
    let coverage = covered(node.recorder.folder(), redirected + 1).await;
    assert!(coverage.len() > first.len());
    for pod in coverage[first.len()..].iter().flat_map(|one| &one.pods) {
        assert_eq!((pod.uid.as_str(), pod.class.as_str(), pod.denied, pod.dropped), (uid, "enrolled", 0, 0));
        assert_eq!(pod.seen, pod.redirected);
    }
    // No more often than that; a busy machine may take longer.
    assert!(coverage.iter().all(|one| one.interval_ms >= 1000), "{coverage:?}");

    // An address that the cluster publishes belongs to the API set as well.
    assert_eq!(client(Dial::Tcp(API6)), Err(nix::Error::ENETUNREACH));
    node.published.send_if_modified(|set| set.endpoints.insert(API6));
    eventually("published: arrives", || client(Dial::Tcp(API6)), Result::is_ok).await;

    // Losing sight of the pod, or of all, changes nothing.
    node.know(&[]);
    client(Dial::Tcp(API4)).unwrap();
    node.know(&[known(uid, None, false)]);
    eventually("unselected: passes", || client(Dial::Tcp(API4)), is(nix::Error::ENETUNREACH)).await;
    node.know(&[known(uid, Some(Mode::Enforce), false)]);
    eventually("selected again: arrives", || client(Dial::Tcp(API4)), Result::is_ok).await;

    drop(sandbox);
    let sandbox = OwnNetns::new();
    let client = || dial(&container.0, Some(&sandbox), Dial::Tcp(API4));
    assert_eq!(client(), Err(nix::Error::ECONNREFUSED), "a new sandbox has no listener yet");
    container.take(sandbox.pid());
    eventually("a new sandbox: arrives", client, Result::is_ok).await;
    drop((sandbox, container, pod, qos));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_in_the_hosts_network_is_known_by_its_cgroup() {
    let Some(mut node) = Node::start("host") else { return };
    let uids = ["0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b", "1b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b"];
    let pods = uids.map(|uid| node.kubepods.below(&format!("pod{uid}")));
    node.know(&uids.map(|uid| known(uid, Some(Mode::Enforce), true)));
    for (pod, uid) in pods.iter().zip(uids) {
        eventually("arrives", || dial(&pod.0, None, Dial::Tcp(API4)), Result::is_ok).await;
        let accepted = node.accepted.recv().await.unwrap();
        assert_eq!(accepted.caller.pod.as_ref().unwrap().uid, uid);
    }
    drop(pods);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pod_connected_before_it_was_enrolled_is_ended_and_nothing_else() {
    let Some(node) = Node::start("before") else { return };
    let uid = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";
    let pod = node.kubepods.below(&format!("pod{uid}"));
    let sandbox = OwnNetns::new();
    sandbox.take_address(API4.ip());
    pod.take(sandbox.pid());
    node.know(&[known(uid, None, false)]);
    let mut ready = node.ready.clone();
    ready.wait_for(|ready| *ready).await.unwrap();
    let other = SocketAddr::new(API4.ip(), 80);
    let [api, other] = [API4, other].map(|address| {
        let server = sandbox.within(|| TcpListener::bind(address).unwrap());
        let client = sandbox.within(|| TcpStream::connect(address).unwrap());
        (server, client)
    });
    node.know(&[known(uid, Some(Mode::Enforce), false)]);
    // It blocks until the connection is ended.
    let error = tokio::task::spawn_blocking(move || (&api.1).read(&mut [0]).unwrap_err()).await.unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
    (&other.1).write_all(b"x").unwrap();
    let (mut accepted, _) = other.0.accept().unwrap();
    accepted.read_exact(&mut [0]).unwrap();
    drop((sandbox, pod));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_takes_every_port_stays_denied_and_is_reported_once_and_others_are_enrolled() {
    let Some(node) = Node::start("trouble") else { return };
    let mut ready = node.ready.clone();
    let uids = ["0", "1", "2"].map(|first| format!("{first}b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b"));
    let pods = uids.each_ref().map(|uid| node.kubepods.below(&format!("pod{uid}")));
    let sandboxes = uids.each_ref().map(|_| OwnNetns::new());
    let have_ports = |range: &str| {
        // Of the namespace of the thread that writes it.
        sandboxes[0].within(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range)).unwrap();
    };
    have_ports("20000 20000");
    let _only = sandboxes[0].within(|| TcpListener::bind("127.0.0.1:20000").unwrap());
    for (pod, sandbox) in pods.iter().zip(&sandboxes) {
        pod.take(sandbox.pid());
    }
    let client = |index: usize| dial(&pods[index].0, Some(&sandboxes[index]), Dial::Tcp(API4));
    let pod = |index: usize| known(&uids[index], Some(Mode::Enforce), false);
    let reported = |node: &Node| node.recorder.measured().findings["cannotEnrol"];
    node.know(&[pod(0), pod(1)]);
    ready.wait_for(|ready| *ready).await.unwrap();
    client(1).unwrap();
    assert_eq!(client(0), Err(nix::Error::ECONNREFUSED));
    assert_eq!(reported(&node), 1);
    node.know(&[pod(0), pod(1), pod(2)]);
    eventually("a third one: arrives", || client(2), Result::is_ok).await;
    // Two verdicts of one pod are of two passes: in the first of them pod 0 was tried again.
    node.know(&[pod(0), pod(1), known(&uids[2], None, false)]);
    eventually("unselected: passes", || client(2), is(nix::Error::ENETUNREACH)).await;
    assert_eq!(client(0), Err(nix::Error::ECONNREFUSED));
    assert_eq!(reported(&node), 1, "tried again, and said once");
    have_ports("20000 30000");
    eventually("with ports: arrives", || client(0), Result::is_ok).await;
    assert_eq!(reported(&node), 1);
    drop((sandboxes, pods));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_in_quarantine_connects_nowhere_until_it_is_lifted_also_across_agents() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let node = Node::pinned("quarantine", Pinning::Pinned(pins.clone())).unwrap();
    let uids = ["0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b", "1b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b"];
    let pods = uids.map(|uid| node.kubepods.below(&format!("pod{uid}")));
    let sandboxes = [OwnNetns::new(), OwnNetns::new()];
    let other = SocketAddr::new(API4.ip(), 80);
    for (pod, sandbox) in pods.iter().zip(&sandboxes) {
        sandbox.take_address(API4.ip());
        pod.take(sandbox.pid());
    }
    node.know(&uids.map(|uid| known(uid, None, false)));
    let mut ready = node.ready.clone();
    ready.wait_for(|ready| *ready).await.unwrap();
    let _servers = sandboxes.each_ref().map(|sandbox| sandbox.within(|| TcpListener::bind(other).unwrap()));
    let client = |index: usize| dial(&pods[index].0, Some(&sandboxes[index]), Dial::Tcp(other)).map(|_| ());
    // One that is open: a process of the pod that waits.
    let script =
        format!("exec 3<>/dev/tcp/{}/{} && echo open && read line <&3; echo ended", other.ip(), other.port());
    let mut open = std::process::Command::new("nsenter")
        .args(["-t", &sandboxes[0].pid().to_string(), "-n", "sh", "-c"])
        .arg(format!("echo 0 > {}/cgroup.procs && exec bash -c '{script}'", pods[0].0.display()))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut said = open.stdout.take().unwrap();
    said.read_exact(&mut [0; 5]).unwrap();

    let pod = format!("agents/pod-{}", uids[0]);
    let nobody = quarantine::begin(&pins, &node.root.0, "agents/nobody").unwrap_err().to_string();
    assert!(nobody.contains("no pod agents/nobody"), "{nobody}");
    let begun = quarantine::begin(&pins, &node.root.0, &pod).unwrap();
    assert_eq!((begun.pod.as_str(), begun.uid.as_str()), (pod.as_str(), uids[0]));
    assert_eq!(begun.connections_ended, 1);
    assert_eq!(client(0), Err(nix::Error::ECONNREFUSED));
    client(1).unwrap();
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "ended\n");
    open.wait().unwrap();
    let state = pinned_state(&pins).unwrap().unwrap();
    let states: Vec<_> = state.pods.iter().map(|pod| (pod.uid.as_str(), pod.quarantined)).collect();
    assert_eq!(states, [(uids[0], true), (uids[1], false)]);
    assert_eq!(state.pods[0].counters.denied_quarantined, 1);

    // Another agent takes over what is pinned.
    let second = load(Pinning::Pinned(pins.clone())).unwrap();
    second.set_settings(0, 2).unwrap();
    assert_eq!(client(0), Err(nix::Error::ECONNREFUSED));
    drop(second);
    quarantine::lift(&pins, uids[0]).unwrap();
    client(0).unwrap();
    drop((sandboxes, pods));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_of_another_that_refuses_first_fails_the_canary_until_it_is_gone() {
    let Some(other) = load(Pinning::Unpinned) else { return };
    let node = Node::start("canary-run").unwrap();
    let mut canary = node.observed.watch_canary();
    // Not Weir's of this node: it knows the address and nobody.
    other.set_api_endpoint(API4, 0).unwrap();
    other.attach(&node.root.0).unwrap();
    node.know(&[]);
    let failed = canary.wait_for(|health| matches!(health, Health::Failed(_))).await.unwrap().clone();
    let findings = || node.recorder.measured().findings;
    assert_eq!((findings()["canaryFailed"], findings()["canaryRecovered"]), (1, 0), "{failed:?}");
    assert!(*node.ready.borrow(), "the pods are enrolled, and the agent is not ready all the same");
    drop(other);
    canary.wait_for(|health| *health == Health::Passed).await.unwrap();
    assert_eq!((findings()["canaryFailed"], findings()["canaryRecovered"]), (1, 1));
    assert_eq!(node.recorder.measured().connections_refused, 0, "what the canary is refused is no pod's");
    node.stop().await;
}
