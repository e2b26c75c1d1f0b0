//! Guards at the host's ends of pods' interfaces: what they drop, whoever interferes with them, and interfaces that a pod is given while
//! it runs (as a CNI that plugs networks into running pods does).

use std::{
    ffi::{CString, c_char},
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use aya::{
    maps::{HashMap, Map, MapData},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{self, NlOptions, TcAttachOptions},
    },
};
use weir_agent::{
    config::Mode,
    interception::{attach, loader::Pinning, pinned::pinned_state},
};
use weir_common::kernel::{maps, programs};

use crate::{
    enrolment::{Node, known},
    pins::{OwnBpffs, take_the_place},
    world::{DEADLINE, Dial, OwnCgroup, OwnNetns, PACE, dial, eventually, load},
};

/// How long somebody's interference with a guard may last, or an interface that a pod is given be without one: the agent looks at
/// everything each second.
const A_LOOK: Duration = Duration::from_secs(5);

/// Checks that it was done within that, of several times the fastest, since a busy machine may stand still for as long; that it is done at
/// all each has shown. In an emulated machine, which has too little of a processor for it, no more than that is shown.
#[track_caller]
fn within_a_look(took: &[Duration]) {
    eprintln!("noticed after {took:?}");
    let is_emulated = std::env::var_os("WEIR_TEST_SECURITY").is_some();
    assert!(is_emulated || took.iter().any(|took| *took < A_LOOK), "{took:?}");
}

/// Waits until something is so; gives how long it took.
async fn until(what: &str, is_so: impl Fn() -> bool) -> Duration {
    let began = Instant::now();
    let wait = async {
        while !is_so() {
            tokio::time::sleep(PACE).await;
        }
    };
    tokio::time::timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("not after {DEADLINE:?}: {what}"));
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interface_that_an_enrolled_pod_is_given_is_guarded_or_reported_once() {
    let Some(node) = Node::start("plugged") else { return };
    let uid = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";
    let pod = node.kubepods.below(&format!("pod{uid}"));
    let sandbox = OwnNetns::new();
    pod.take(sandbox.pid());
    // Of a network that nobody is in (RFC 2544), this machine and the tests below included, which may run at the same time.
    let server: SocketAddr = "198.18.0.1:443".parse().unwrap();
    node.published.send_if_modified(|set| set.endpoints.insert(server));
    node.know(&[known(uid, Some(Mode::Enforce), false)]);
    eventually("enrolled: arrives", || dial(&pod.0, Some(&sandbox), Dial::Tcp(server)), Result::is_ok).await;

    sandbox.join("weir-plug0", server.ip(), "198.18.0.2".parse().unwrap());
    let plugged = Instant::now();
    let api = UdpSocket::bind(server).unwrap();
    let other = UdpSocket::bind(SocketAddr::new(server.ip(), 444)).unwrap();
    api.set_nonblocking(true).unwrap();
    other.set_read_timeout(Some(DEADLINE)).unwrap();
    // The sender is of no cgroup that has hooks: only the interface sees it.
    let arrives = || {
        sandbox.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"x", server).unwrap();
            socket.send_to(b"x", other.local_addr().unwrap()).unwrap();
        });
        other.recv(&mut [0]).expect("the other port is nobody's business");
        api.recv(&mut [0]).is_ok()
    };
    let mut seen_before = false;
    while arrives() {
        seen_before = true;
        assert!(plugged.elapsed() < DEADLINE, "not guarded after {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut took = vec![plugged.elapsed()];
    println!("guarded {} ms after it was there; seen before: {seen_before}", took[0].as_millis());

    // One without an end on the host is found as well, and said once; the next one, too.
    let reported = || node.recorder.measured().findings.get("unguardedInterface").copied().unwrap_or(0);
    assert_eq!(reported(), 0);
    for (name, expected) in [("weir-direct0", 1), ("weir-direct1", 2)] {
        sandbox.plug_direct("weir-plug0", name);
        took.push(until(&format!("{name} is reported"), || reported() >= expected).await);
        assert_eq!(reported(), expected, "each once");
    }
    within_a_look(&took);
    drop((sandbox, pod));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_leaves_by_a_pods_interface_is_guarded_until_uninstalled_whoever_sends_it() {
    let server = "198.51.100.1:443".parse().unwrap();
    check_interface("weir-test0", server, OwnNetns::join).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_is_an_interface_without_a_network_of_its_own_as_on_eks() {
    let server = "203.0.113.1:443".parse().unwrap();
    check_interface("weir-test1", server, OwnNetns::join_by_routes).await;
}

/// `server` is of a network that nobody is in (RFC 5737), this machine included.
async fn check_interface(name: &str, server: SocketAddr, join: fn(&OwnNetns, &str, IpAddr, IpAddr)) {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let node = Node::pinned(name, Pinning::Pinned(pins.clone())).unwrap();
    let uid = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";
    let pod = node.kubepods.below(&format!("pod{uid}"));
    let sandbox = OwnNetns::new();
    let IpAddr::V4(before) = server.ip() else { panic!("IPv4") };
    join(&sandbox, name, server.ip(), Ipv4Addr::from(u32::from(before) + 1).into());
    pod.take(sandbox.pid());
    let [api, other] =
        [server, SocketAddr::new(server.ip(), 444)].map(|address| UdpSocket::bind(address).unwrap());
    api.set_nonblocking(true).unwrap();
    // The sender is of no cgroup that has hooks: only the interface sees it.
    let arrives = || {
        sandbox.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"x", server).unwrap();
            socket.send_to(b"x", other.local_addr().unwrap()).unwrap();
        });
        // What was sent before has arrived by now, if it ever does.
        other.set_read_timeout(Some(DEADLINE)).unwrap();
        other.recv(&mut [0]).expect("the other port is nobody's business");
        let mut arrived = false;
        while api.recv(&mut [0]).is_ok() {
            arrived = true;
        }
        arrived
    };
    node.published.send_if_modified(|set| set.endpoints.insert(server));
    let knows_it = || {
        pinned_state(&pins)
            .is_ok_and(|state| state.is_some_and(|state| state.api_endpoints.contains(&server)))
    };
    until("the kernel knows the API server's address", knows_it).await;
    node.know(&[known(uid, None, false)]);
    let mut ready = node.ready.clone();
    tokio::time::timeout(DEADLINE, ready.wait_for(|ready| *ready))
        .await
        .expect("the agent is ready")
        .unwrap();
    assert!(arrives(), "unselected: passes");
    node.know(&[known(uid, Some(Mode::Enforce), false)]);
    let is_enrolled = || {
        let state = pinned_state(&pins).unwrap().unwrap();
        state.pods.iter().any(|pod| pod.uid == uid && pod.listener_port != 0)
    };
    until("the pod is enrolled", is_enrolled).await;
    assert!(!arrives(), "enrolled: dropped");
    assert_eq!(pinned_state(&pins).unwrap().unwrap().counters.interface_dropped, 1);
    is_the_first_again(&node, name, &bpffs, &arrives).await;
    let cgroups = node.stop().await;
    assert!(!arrives(), "no agent runs");

    let next = bpffs.0.path().join("weir/v4");
    take_the_place(&pins, &next, (server, name), &arrives);
    attach::uninstall(&next).unwrap();
    // The kernel frees an unpinned link a little later.
    until("no guard is left behind", arrives).await;
    // A cgroup is removed only once its processes have ended.
    let root = cgroups.1.0.clone();
    drop(sandbox);
    drop(pod);
    drop(cgroups);
    assert!(!root.exists(), "{} is left behind", root.display());
}

/// Somebody detaches the guard, or puts a program before it that lets everything pass: within seconds it is the first again, and that is
/// recorded.
async fn is_the_first_again(node: &Node, name: &str, bpffs: &OwnBpffs, arrives: &impl Fn() -> bool) {
    let links = bpffs.0.path().join("weir/v3/links");
    let index = nix::net::if_::if_nametoindex(name).unwrap();
    let pin = links.join(format!("interface-{index}"));
    let findings = || {
        let findings = node.recorder.measured().findings;
        (findings["programDetached"], findings["foreignProgram"])
    };
    let (detached, foreign) = findings();
    // The two are counted one after the other.
    let told = async |repairs: u64, others: u64| {
        let expected = (detached + repairs, foreign + others);
        until(&format!("{expected:?} findings"), || findings() == expected).await
    };
    if pin.exists() {
        fs::remove_file(&pin).unwrap();
    } else {
        tc::qdisc_detach_program(name, TcAttachType::Ingress, programs::INTERFACE).unwrap();
    }
    let detached_for = told(1, 0).await;
    assert!(!arrives(), "detached by somebody, and attached again");

    let other = bpffs.0.path().join("other");
    lets_everything_pass(&other);
    let mut other = SchedClassifier::from_pin(&other).unwrap();
    let first = if pin.exists() {
        TcAttachOptions::TcxOrder(LinkOrder::first())
    } else {
        TcAttachOptions::Netlink(NlOptions { priority: 1, ..NlOptions::default() })
    };
    let others = other.attach_with_options(name, TcAttachType::Ingress, first).unwrap();
    assert!(arrives(), "the other's comes first, and passes it");
    within_a_look(&[detached_for, told(2, 1).await]);
    assert!(!arrives(), "ours is the first again");
    other.detach(others).unwrap();
    assert!(!arrives(), "ours stays");
}

/// Pins a program of the kind of a guard that does nothing but pass.
fn lets_everything_pass(pin: &Path) {
    /// `struct { prog_type, insn_cnt, insns, license }` of `union bpf_attr`, linux/bpf.h.
    #[repr(C)]
    struct Load {
        program_type: u32,
        instructions: u32,
        code: *const [u64; 2],
        license: *const c_char,
    }
    /// `struct { pathname, bpf_fd, file_flags }` of the same.
    #[repr(C)]
    struct Pin {
        path: *const c_char,
        program: RawFd,
        flags: u32,
    }
    // `r0 = 0; exit`: `TC_ACT_OK`, and nobody after it is asked.
    let code = [0xb7_u64, 0x95];
    let load = Load { program_type: 3, instructions: 2, code: &raw const code, license: c"GPL".as_ptr() };
    let path = CString::new(pin.as_os_str().as_bytes()).unwrap();
    // SAFETY: `BPF_PROG_LOAD` and `BPF_OBJ_PIN` with attributes of the given sizes, whose pointers outlive the calls.
    let pinned = unsafe {
        let program = libc::syscall(libc::SYS_bpf, 5, &raw const load, size_of::<Load>());
        let program = OwnedFd::from_raw_fd(nix::Error::result(program).unwrap() as RawFd);
        let pin = Pin { path: path.as_ptr(), program: program.as_raw_fd(), flags: 0 };
        libc::syscall(libc::SYS_bpf, 6, &raw const pin, size_of::<Pin>())
    };
    nix::Error::result(pinned).unwrap();
}

/// A pod that is joined to this machine, which is an API server there.
struct Joined {
    /// Before the cgroup, which is removed only once its processes have ended.
    sandbox: OwnNetns,
    pod: OwnCgroup,
    /// Indices of both ends.
    here: u32,
    there: u32,
    api: UdpSocket,
    other: UdpSocket,
}

impl Joined {
    /// Before the pod's own end so many other pairs are there. The indices of both ends are not the same: in one network namespace nobody could
    /// have both.
    fn new(node: &Node, uid: &str, name: &str, server: SocketAddr, others: u32) -> Self {
        let pod = node.kubepods.below(&format!("pod{uid}"));
        let sandbox = OwnNetns::new();
        for other in 0..others {
            sandbox.run(&format!("ip link add other{other} type veth peer name others{other}"));
        }
        let IpAddr::V4(own) = server.ip() else { panic!("IPv4") };
        let join = || {
            sandbox.join(name, server.ip(), Ipv4Addr::from(u32::from(own) + 1).into());
            let index = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
            (index(name), sandbox.within(|| index("eth0")))
        };
        let (mut here, mut there) = join();
        if here == there {
            sandbox.run("ip link delete eth0 && ip link add one-more type veth peer name one-mored");
            (here, there) = join();
        }
        assert_ne!(here, there);
        pod.take(sandbox.pid());
        let [api, other] =
            [server, SocketAddr::new(server.ip(), 444)].map(|address| UdpSocket::bind(address).unwrap());
        api.set_nonblocking(true).unwrap();
        other.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { sandbox, pod, here, there, api, other }
    }

    /// Whether what it sends arrives at the API server. The sender is of no cgroup that has hooks: only the interface sees it.
    fn reaches(&self) -> bool {
        let [api, other] = [&self.api, &self.other].map(|socket| socket.local_addr().unwrap());
        self.sandbox.within(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"x", api).unwrap();
            socket.send_to(b"x", other).unwrap();
        });
        self.other.recv(&mut [0]).expect("the other port is nobody's business");
        self.api.recv(&mut [0]).is_ok()
    }
}

/// Ends a process, and what it was in.
struct InCgroup(Child, PathBuf);

impl Drop for InCgroup {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = fs::remove_dir(&self.1);
    }
}

/// An enrolled pod and an unselected one, of which others want to have the interfaces.
struct Neighbours {
    node: Node,
    pins: PathBuf,
    enrolled: Joined,
    unselected: Joined,
}

impl Neighbours {
    async fn new(pins: PathBuf, [enrolled, unselected, others @ ..]: [&str; 4]) -> Self {
        let node = Node::pinned("claims", Pinning::Pinned(pins.clone())).unwrap();
        let enforce = |uid| known(uid, Some(Mode::Enforce), false);
        let others = others.map(enforce);
        node.know(&[&[enforce(enrolled), known(unselected, None, false)], &others[..]].concat());
        // Of a network that nobody is in (RFC 2544).
        let servers: [SocketAddr; 2] =
            ["198.18.2.1:443", "198.18.3.1:443"].map(|server| server.parse().unwrap());
        let of_enrolled = Joined::new(&node, enrolled, "weir-claim0", servers[0], 0);
        let of_unselected = Joined::new(&node, unselected, "weir-claim1", servers[1], 1);
        node.published.send_if_modified(|set| {
            set.endpoints.extend(servers);
            true
        });
        let neighbours = Self { node, pins, enrolled: of_enrolled, unselected: of_unselected };
        let is_in_force = || {
            let Ok(Some(state)) = pinned_state(&neighbours.pins) else { return false };
            let knows = servers.iter().all(|server| state.api_endpoints.contains(server));
            knows && neighbours.is_known(unselected) && neighbours.listens(enrolled)
        };
        until("the pods are seen to", is_in_force).await;
        neighbours.stand("before");
        neighbours
    }

    fn is_known(&self, uid: &str) -> bool {
        pinned_state(&self.pins).unwrap().unwrap().pods.iter().any(|pod| pod.uid == uid)
    }

    fn listens(&self, uid: &str) -> bool {
        let state = pinned_state(&self.pins).unwrap().unwrap();
        state.pods.iter().any(|pod| pod.uid == uid && pod.listener_port != 0)
    }

    fn findings(&self, kind: &str) -> u64 {
        self.node.recorder.measured().findings.get(kind).copied().unwrap_or(0)
    }

    /// The cgroup whose pod's an interface is taken for.
    fn owner(&self, of: &Joined) -> Option<u64> {
        owners(&self.pins).get(&of.here, 0).ok()
    }

    /// Checks that each is judged as itself.
    #[track_caller]
    fn stand(&self, when: &str) {
        assert_eq!(self.owner(&self.enrolled), Some(self.enrolled.pod.id()), "{when}");
        assert!(!self.enrolled.reaches(), "{when}: enrolled, dropped");
        assert!(self.unselected.reaches(), "{when}: unselected, passes");
    }

    /// The indices in a pod's network namespace are its own affair: it makes pairs of interfaces that look like both pods' ends, one
    /// with a network namespace that it has made, one within its own.
    async fn pairs_with_their_indices(&self, uid: &str) {
        let pod = self.node.kubepods.below(&format!("pod{uid}"));
        let mut sandbox = OwnNetns::new();
        let nested = OwnNetns::new();
        pod.take(sandbox.pid());
        until("the taker is enrolled", || self.listens(uid)).await;
        let pair = |name: &str, of: &Joined, netns: &str| {
            let (here, there) = (of.here, of.there);
            sandbox.run(&format!(
                "ip link add {name} index {there} type veth peer name {name}p index {here} {netns}"
            ));
        };
        pair("nested", &self.enrolled, &format!("netns {}", nested.pid()));
        pair("within", &self.unselected, "");
        // One more, whose report says that all have been looked at.
        sandbox.plug_direct("weir-claim0", "weir-direct");
        until("the pairs are seen", || self.findings("unguardedInterface") >= 1).await;
        self.stand("taken for another's");
        assert_ne!(self.owner(&self.unselected), Some(pod.id()));
        sandbox.end();
        drop((nested, pod));
        until("the taker is gone", || !self.is_known(uid)).await;
        self.stand("the taker is gone");
        assert_eq!(self.findings("unguardedInterface"), 1, "what looks like another's is not even tried");
    }

    /// A pod with a process in another one's network namespace has what that one has.
    async fn a_process_in_the_same_namespace(&self, uid: &str) {
        let refused = self.findings("cannotEnrol");
        let pod = self.node.kubepods.below(&format!("pod{uid}"));
        let mut enter = Command::new("nsenter");
        let namespace = self.enrolled.sandbox.pid().to_string();
        enter.args(["-t", &namespace, "-n", "cat"]).stdin(Stdio::piped());
        let process = InCgroup(enter.spawn().unwrap(), pod.0.clone());
        pod.take(process.0.id());
        let is_refused = || self.findings("cannotEnrol") > refused || self.listens(uid);
        until("it is looked at", is_refused).await;
        self.stand("two pods in one network namespace");
        drop(process);
        until("the other is gone", || !self.is_known(uid)).await;
        self.stand("the other is gone");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_pod_takes_anothers_interface() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let uids = [1, 2, 3, 4].map(|number| format!("0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a{number:02}"));
    let uids = uids.each_ref().map(String::as_str);
    let neighbours = Neighbours::new(bpffs.0.path().join("weir/v3"), uids).await;
    neighbours.pairs_with_their_indices(uids[2]).await;
    neighbours.a_process_in_the_same_namespace(uids[3]).await;

    // Whoever writes into the kernel's maps: a pod is guarded as itself again.
    let Neighbours { enrolled, unselected, .. } = &neighbours;
    owners(&neighbours.pins).insert(enrolled.here, unselected.pod.id(), 0).unwrap();
    let is_itself = || neighbours.owner(enrolled) == Some(enrolled.pod.id());
    within_a_look(&[until("it is guarded as itself", is_itself).await]);
    neighbours.stand("as itself again");
    let Neighbours { node, enrolled, unselected, .. } = neighbours;
    drop((enrolled, unselected));
    let cgroups = node.stop().await;
    let root = cgroups.1.0.clone();
    drop(cgroups);
    assert!(!root.exists(), "{} is left behind", root.display());
}

/// Which cgroup's pod each guarded interface is taken for.
fn owners(pins: &Path) -> HashMap<MapData, u32, u64> {
    let map = MapData::from_pin(pins.join("maps").join(maps::INTERFACES)).unwrap();
    HashMap::try_from(Map::HashMap(map)).unwrap()
}
