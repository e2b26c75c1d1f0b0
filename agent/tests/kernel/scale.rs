//! Many pods: a full node is enrolled again when its agent starts anew, and no first connection of a pod goes past it. How
//! long it takes, and how many connections came too early and were refused, is printed, for `cargo xtask bench
//! enrolment`; what must come about is asserted.

use std::{
    collections::{HashMap, VecDeque},
    io::ErrorKind,
    net::TcpListener,
    sync::Arc,
    time::{Duration, Instant},
};

use weir_agent::{
    config::Mode,
    interception::{cluster_watch::KnownPods, loader::Pinning, pinned::pinned_state},
};

use crate::{
    enrolment::{Node, known},
    pins::OwnBpffs,
    world::{API4, Dial, OwnCgroup, OwnNetns, dial, eventually, load},
};

/// Pods of a large node; Kubernetes supports 110 by default, and some managed nodes 250.
const PODS: usize = 250;
/// Pods that connect at once, one after the other; with `WEIR_TEST_LONG` more.
const FIRST: usize = 30;
const FIRST_LONG: usize = 1000;
/// How many of them live at a time.
const ALIVE: usize = 100;
/// How long it may take until they are enrolled, in the build that users run: `cargo xtask bench enrolment` runs this test in that. In
/// another build, on a machine that is busy with other tests, it is printed.
const ENROLLED_MAX: Duration = Duration::from_secs(2);
/// Open files: of each pod two listeners, and the two pipes of the process that stands for it.
const OPEN_FILES: u64 = 4096;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_node_is_enrolled_again_when_its_agent_starts_anew() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    raise_open_files();
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let mut node = Node::pinned("full", Pinning::Pinned(pins.clone())).unwrap();
    let pods: Vec<_> = (0..PODS)
        .map(|number| {
            let uid = format!("{number:08x}-3c1d-4e5f-8a9b-0c1d2e3f4a5b");
            let cgroup = node.kubepods.below(&format!("pod{uid}"));
            let sandbox = OwnNetns::new();
            sandbox.pair(&format!("weir-full{number}"));
            cgroup.take(sandbox.pid());
            (uid, cgroup, sandbox)
        })
        .collect();
    let known: Vec<_> = pods.iter().map(|(uid, ..)| known(uid, Some(Mode::Enforce), false)).collect();
    let all: HashMap<_, _> = known.into_iter().map(|pod| (pod.uid.clone(), Arc::new(pod))).collect();
    let all: KnownPods = Some(Arc::new(all));
    for agent in ["the first agent", "an agent that starts anew"] {
        let started = Instant::now();
        node.restart(Pinning::Pinned(pins.clone()), all.clone()).await;
        node.ready.wait_for(|ready| *ready).await.unwrap();
        let took = started.elapsed();
        let ms = took.as_millis();
        let load = std::fs::read_to_string("/proc/loadavg").unwrap();
        println!("{agent}: {PODS} pods enrolled in {ms} ms; load {}", load.trim());
        assert!(cfg!(debug_assertions) || took < ENROLLED_MAX, "{agent}: {took:?}");
        let state = pinned_state(&pins).unwrap().unwrap();
        let listening = state.pods.iter().filter(|pod| pod.class == "Enrolled" && pod.listener_port != 0);
        assert_eq!(listening.count(), PODS, "{agent}");
        for (uid, cgroup, sandbox) in &pods {
            dial(&cgroup.0, Some(sandbox), Dial::Tcp(API4)).unwrap();
            let accepted = node.accepted.recv().await.unwrap();
            assert_eq!(accepted.caller.pod.as_ref().unwrap().uid, *uid, "{agent}");
        }
    }
    // The processes first: a cgroup that has one cannot be removed.
    for (_, cgroup, sandbox) in pods {
        drop(sandbox);
        drop(cgroup);
    }
    node.stop().await;
}

/// A pod whose first instruction is a connection to an API server.
struct First {
    uid: String,
    sandbox: OwnNetns,
    _cgroup: OwnCgroup,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_first_connection_of_a_pod_goes_past_the_agent() {
    let long = std::env::var_os("WEIR_TEST_LONG").is_some();
    let (count, alive) = if long { (FIRST_LONG, ALIVE) } else { (FIRST, FIRST) };
    let Some(mut node) = Node::start("first") else { return };
    raise_open_files();
    // Before, nothing is attached.
    node.know(&[]);
    node.ready.wait_for(|ready| *ready).await.unwrap();
    let mut pods: VecDeque<First> = VecDeque::new();
    let mut refused = 0;
    for number in 0..count {
        let uid = format!("{number:08x}-3c1d-4e5f-8a9b-0c1d2e3f4a5b");
        // As a kubelet and a runtime do: the API server's list, the pod's cgroup, its network, its process.
        let mut all: Vec<_> = pods.iter().map(|pod| known(&pod.uid, Some(Mode::Enforce), false)).collect();
        all.push(known(&uid, Some(Mode::Enforce), false));
        node.know(&all);
        let cgroup = node.kubepods.below(&format!("pod{uid}"));
        let sandbox = OwnNetns::new();
        sandbox.take_address(API4.ip());
        let far = sandbox.within(|| TcpListener::bind(API4).unwrap());
        far.set_nonblocking(true).unwrap();
        cgroup.take(sandbox.pid());
        let client = || dial(&cgroup.0, Some(&sandbox), Dial::Tcp(API4));
        match client() {
            Ok(_) => {}
            Err(nix::Error::ECONNREFUSED) => {
                refused += 1;
                eventually("enrolled: arrives", client, Result::is_ok).await;
            }
            Err(errno) => panic!("pod {number}: {errno}"),
        }
        assert_eq!(far.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "pod {number}: directly");
        let accepted = node.accepted.recv().await.unwrap();
        assert_eq!(accepted.caller.pod.as_ref().unwrap().uid, uid);
        pods.push_back(First { uid, sandbox, _cgroup: cgroup });
        if pods.len() > alive {
            pods.pop_front();
        }
    }
    println!(
        "{count} pods that connect as soon as their process is there: {refused} refused at first, 0 past the agent"
    );
    pods.clear();
    node.stop().await;
}

impl Drop for First {
    fn drop(&mut self) {
        // Before its cgroup, which cannot be removed while it has a process.
        self.sandbox.end();
    }
}

fn raise_open_files() {
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(files).unwrap();
    nix::sys::resource::setrlimit(files, OPEN_FILES.min(hard), hard).unwrap();
}
