//! What is in force before any cluster has been asked: the guard alone, and the API set that was stored.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::Instant,
};

use weir_agent::{
    config::Mode,
    interception::{
        attach::uninstall,
        guard::{self, ConfiguredCluster, Guarded, Options},
        loader::Pinning,
        pinned::pinned_state,
        security::Security,
    },
};
use weir_common::kernel::{CgroupEntry, Class, programs};

use crate::enrolment::{self, known};
use crate::guards::security_way;
use crate::pins::OwnBpffs;
use crate::world::{API4, API6, DEADLINE, Dial, OwnCgroup, OwnNetns, PACE, dial, eventually, is, load};

const REFUSED: nix::Error = nix::Error::ECONNREFUSED;

/// A node just after its boot.
struct Node {
    root: OwnCgroup,
    state: tempfile::TempDir,
    bpffs: OwnBpffs,
}

impl Node {
    fn new(name: &str) -> Option<Self> {
        load(Pinning::Unpinned)?;
        let bpffs = OwnBpffs::mount().unwrap();
        Some(Self { root: OwnCgroup::new(name), state: tempfile::tempdir().unwrap(), bpffs })
    }

    fn pins(&self) -> PathBuf {
        self.bpffs.0.path().join("weir/v3")
    }

    fn store(&self, text: &str) {
        std::fs::write(self.state.path().join("api-set.json"), text).unwrap();
    }

    fn options(&self, clusters: Option<&[(&str, SocketAddr)]>) -> Options {
        let cluster = |(name, address): &(&str, SocketAddr)| ConfiguredCluster {
            name: (*name).to_owned(),
            addresses: vec![*address],
            names: Vec::new(),
        };
        Options {
            cgroup_root: Some(self.root.0.clone()),
            pinning: Pinning::Pinned(self.pins()),
            clusters: clusters.map(|clusters| clusters.iter().map(cluster).collect()),
            state_directory: self.state.path().to_owned(),
        }
    }

    /// No agent listens there.
    fn handover(&self) -> PathBuf {
        self.state.path().join("handover.sock")
    }

    fn guard(&self, clusters: Option<&[(&str, SocketAddr)]>) -> Guarded {
        guard::once(&self.options(clusters), &self.handover()).unwrap()
    }

    fn in_kernel(&self) -> HashMap<SocketAddr, u32> {
        load(Pinning::Pinned(self.pins())).unwrap().api_endpoints().unwrap()
    }

    fn below(&self, name: &str) -> OwnCgroup {
        self.root.below(name)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for name in ["kubepods", "kubepods.slice"] {
            let _ = std::fs::remove_dir(self.root.0.join(name));
        }
    }
}

fn tcp(cgroup: &Path, netns: Option<&OwnNetns>, address: SocketAddr) -> Result<(), nix::Error> {
    dial(cgroup, netns, Dial::Tcp(address)).map(|_| ())
}

#[test]
fn with_the_guard_alone_pods_of_every_kind_are_denied_and_the_host_passes() {
    let Some(node) = Node::new("cold") else { return };
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let local = server.local_addr().unwrap();
    node.store(&format!(
        r#"{{"version":1,"clusters":[{{"name":"a","addresses":["{API4}","{local}"]}}],"kubelets":["192.0.2.1:10250"]}}"#
    ));
    assert_eq!(node.guard(None), Guarded::InForce { api_servers: 2, kubelets: 1 });
    let netns = OwnNetns::new();
    // The kubelet comes after the guard, and its pods below whichever root it takes.
    let system = node.below("system.slice");
    for root in ["kubepods", "kubepods.slice"] {
        let pod = node.below(&format!("{root}/pod0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b"));
        assert_eq!(tcp(&pod.0, Some(&netns), API4), Err(REFUSED), "{root}");
        assert_eq!(tcp(&pod.0, None, local), Err(REFUSED), "{root}, in the host's network");
    }
    assert_eq!(tcp(&system.0, None, local), Ok(()));
    assert_eq!(tcp(&system.0, Some(&netns), API4), Err(REFUSED), "no pod's cgroup, but no host's network");
    // No interface of a pod is guarded yet: where the kernel can, it makes no packet sockets.
    let packet = |cgroup: &OwnCgroup| dial(&cgroup.0, Some(&netns), Dial::Packet).map(|_| ());
    let expected = if security_way().is_some() { Err(nix::Error::EPERM) } else { Ok(()) };
    // Twice: the next guard leaves in force what there is.
    for _ in 0..2 {
        assert_eq!(packet(&node.below("kubepods/late")), expected);
        assert_eq!(packet(&system), Ok(()), "a process of the host");
        node.guard(None);
    }
}

/// Their names, kinds and instructions are the same as ours; they decide by other maps.
#[test]
fn security_programs_of_somebody_else_in_the_place_of_the_guards_are_replaced() {
    let Some(node) = Node::new("impostor") else { return };
    let Some(way) = security_way() else { return };
    let (pods, elsewhere) = (node.below("kubepods"), OwnCgroup::new("elsewhere"));
    let netns = OwnNetns::new();
    let late = pods.below("late");
    let packet = || dial(&late.0, Some(&netns), Dial::Packet).map(|_| ());
    // The kernel detaches a moment later than the last pin of a link goes.
    let passes_soon = |when: &str| {
        let deadline = Instant::now() + DEADLINE;
        while packet().is_err() {
            assert!(Instant::now() < deadline, "{when}, and still in force");
            std::thread::yield_now();
        }
    };
    node.guard(None);
    assert_eq!(packet(), Err(nix::Error::EPERM));
    let others = node.bpffs.0.path().join("others/v3");
    let options = Options {
        cgroup_root: Some(elsewhere.0.clone()),
        pinning: Pinning::Pinned(others.clone()),
        ..node.options(None)
    };
    guard::once(&options, &node.handover()).unwrap();
    for (name, _) in programs::LSM {
        let pin = |pins: &Path| pins.join(format!("links/lsm-{name}"));
        std::fs::rename(pin(&others), pin(&node.pins())).unwrap();
    }
    passes_soon("they know nothing of this pod");
    node.guard(None);
    assert_eq!(packet(), Err(nix::Error::EPERM), "the guard's own are back");
    // An agent puts its own in the place of the guard's, sees who takes them away, and leaves them when it ends.
    let agent = load(Pinning::Pinned(node.pins())).unwrap();
    assert_eq!(agent.attach_security().unwrap(), Security::InForce(way));
    assert_eq!(agent.inspect().unwrap().repaired, [""; 0]);
    std::fs::remove_file(node.pins().join(format!("links/lsm-{}", programs::LSM_SOCKET))).unwrap();
    let repaired = agent.inspect().unwrap().repaired;
    assert_eq!(repaired, [format!("{} at the kernel's security hook", programs::LSM_SOCKET)]);
    assert_eq!(agent.inspect().unwrap().repaired, [""; 0]);
    drop(agent);
    assert_eq!(packet(), Err(nix::Error::EPERM), "the agent's stay");
    let state = || pinned_state(&node.pins()).unwrap().map(|state| state.security_hooks);
    assert_eq!(state(), Some(Some(way)));
    uninstall(&node.pins()).unwrap();
    assert_eq!(state(), None);
    passes_soon("uninstalled");
    drop(late);
    for root in ["kubepods", "kubepods.slice"] {
        let _ = std::fs::remove_dir(elsewhere.0.join(root));
    }
}

#[test]
fn the_guard_changes_nothing_that_is_in_force() {
    let Some(node) = Node::new("twice") else { return };
    let pods = node.below("kubepods");
    let agent = load(Pinning::Pinned(node.pins())).unwrap();
    agent.set_api_endpoint(API4, 0).unwrap();
    agent.attach(&node.root.0).unwrap();
    let pod = pods.below("pod0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b");
    let entry = CgroupEntry { listener_netns: 0, class: Class::Unselected as u32, listener_port: 0 };
    agent.classify(pod.id(), entry).unwrap();
    for _ in 0..2 {
        assert_eq!(node.guard(Some(&[("a", API6)])), Guarded::InForce { api_servers: 2, kubelets: 0 });
        let inspection = agent.inspect().unwrap();
        assert!(inspection.repaired.is_empty(), "the agent's programs stay: {:?}", inspection.repaired);
        assert!(inspection.foreign.is_empty(), "and are alone: {:?}", inspection.foreign);
        assert_eq!(agent.cgroups().unwrap().get(&pod.id()), Some(&entry), "a known pod keeps its verdict");
    }
    // What is missing comes back, the rest stays.
    let link = node.pins().join(format!("links/{}-{}", node.root.id(), programs::CONNECT4));
    std::fs::remove_file(&link).unwrap();
    node.guard(None);
    assert!(link.exists());
    assert!(!node.root.0.join("kubepods.slice").exists(), "the root of pods is there already");
    let links = pinned_state(&node.pins()).unwrap().unwrap().links;
    let security = if security_way().is_some() { programs::LSM.len() } else { 0 };
    let expected = programs::GUARD_AND_HOOKS.len() + programs::LISTENING.len() + security;
    assert_eq!(links.len(), expected, "{links:?}");
    drop(pod);
}

#[test]
fn what_was_stored_is_found_by_the_clusters_names_when_their_order_changes() {
    let Some(node) = Node::new("names") else { return };
    let _pods = node.below("kubepods");
    let [own, other, gone]: [SocketAddr; 3] =
        ["203.0.113.1:443", "203.0.113.2:443", "203.0.113.3:443"].map(|address| address.parse().unwrap());
    node.store(&format!(
        r#"{{"version":1,"clusters":[{{"name":"gone","addresses":["{gone}","{own}"]}},{{"name":"own","addresses":["{own}"]}},{{"name":"other","addresses":["{other}"]}}],"kubelets":[]}}"#
    ));
    node.guard(None);
    assert_eq!(node.in_kernel(), HashMap::from([(gone, 0), (own, 1), (other, 2)]));
    let begun = guard::begin(&node.options(Some(&[("other", API4), ("own", API6)])), &node.handover());
    assert!(begun.unwrap().is_some());
    assert_eq!(node.in_kernel(), HashMap::from([(other, 0), (API4, 0), (own, 1), (API6, 1)]));
}

#[test]
fn a_damaged_file_leaves_the_configured_addresses() {
    let Some(node) = Node::new("damaged") else { return };
    let _pods = node.below("kubepods");
    node.store("{");
    assert_eq!(node.guard(Some(&[("a", API4)])), Guarded::InForce { api_servers: 1, kubelets: 0 });
    assert_eq!(node.in_kernel(), HashMap::from([(API4, 0)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_cluster_publishes_is_stored_for_the_next_start() {
    let Some(node) = enrolment::Node::start("stored") else { return };
    let file = node.journal.path().join("state/api-set.json");
    let stored = |address: SocketAddr| {
        std::fs::read_to_string(&file).is_ok_and(|text| text.contains(&format!("\"{address}\"")))
    };
    node.published.send_if_modified(|set| set.endpoints.insert(API6));
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !(stored(API4) && stored(API6)) {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", std::fs::read_to_string(&file));
        tokio::time::sleep(PACE).await;
    }
    node.stop().await;
}

/// What gives the agent its certificate may be a pod of its node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_anybody_serves_pods_that_are_not_selected_pass_and_no_others() {
    let Some(mut node) = enrolment::Node::start("unserved") else { return };
    node.serves.send_replace(false);
    let uids = ["0", "1"].map(|first| format!("{first}b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b"));
    let pods = uids.each_ref().map(|uid| node.kubepods.below(&format!("pod{uid}")));
    let sandboxes = uids.each_ref().map(|_| OwnNetns::new());
    for (pod, sandbox) in pods.iter().zip(&sandboxes) {
        pod.take(sandbox.pid());
    }
    let client = |index: usize| dial(&pods[index].0, Some(&sandboxes[index]), Dial::Tcp(API4));
    eventually("nothing is known", || client(0), is(REFUSED)).await;
    node.know(&[known(&uids[0], None, false), known(&uids[1], Some(Mode::Enforce), false)]);
    eventually("unselected: passes", || client(0), is(nix::Error::ENETUNREACH)).await;
    assert_eq!(client(1), Err(REFUSED), "there is nobody to redirect it to");
    assert!(!*node.ready.borrow(), "nor is the agent ready");

    node.serves.send_replace(true);
    node.ready.wait_for(|ready| *ready).await.unwrap();
    eventually("selected: arrives", || client(1), Result::is_ok).await;
    drop((sandboxes, pods));
    node.stop().await;
}
