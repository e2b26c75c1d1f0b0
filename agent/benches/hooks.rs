//! What each kernel program costs a run, by the kernel's own count, beside an empty program of the same kind at the
//! same cgroup in the same run. `cargo xtask bench hooks` runs it; it needs root and a node without an agent.
//!
//! Each scene is counted twice: `warm`, one operation after the other, and `cold`, with the caches emptied before each,
//! as on a node that does other work between two connects.
//!
//! It fails where a redirect takes very many times what an empty program does: what else the machine does slows both.
#![expect(clippy::unwrap_used, reason = "what fails here fails the bench, with its place")]
#![expect(clippy::print_stdout, reason = "the table is what the bench is for")]

#[path = "hooks/empty.rs"]
mod empty;
#[path = "../tests/kernel/world.rs"]
#[expect(dead_code, reason = "the bench needs a part of what the tests make")]
mod world;

use std::{
    hint::black_box,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use hickory_resolver::proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, Record, RecordType},
};
use weir_agent::config::EndpointName;
use weir_agent::interception::{
    cgroup,
    listener::{Listener, Namespace, own_netns},
    loader::{Kernel, Pinning},
    usage::{ProgramUsage, count_runs},
};
use weir_common::kernel::{CgroupEntry, Class, KUBELET, STEP_SHIFT, STEPS_AHEAD_MAX, programs};

use crate::{
    empty::Empty,
    world::{API4, API6, OwnCgroup, OwnNetns},
};

/// An address that is not the loopback one, of a network that nobody is in (RFC 5737).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Another one, of an API server: what was in the API set once is looked up ever after.
const API_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The same of IPv6 (RFC 3849).
const ADDRESS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x51);
/// Operations of a scene with warm caches.
const WARM: usize = 20_000;
/// How many times as long as an empty program a redirect with warm caches may take: about twice of what it does (docs/performance.md).
const REDIRECT_RATIO_MAX: f64 = 10.0;
/// How the names of its scenes end, and those of its programs begin.
const REDIRECTED: &str = ", redirected";
const CONNECT: &str = "weir_connect";
/// Answers of a name server, which a pod gets no more of than it may be ahead of what it makes good for: too many are kept from it.
const WARM_ANSWERS: usize = 3_000;
/// No answer takes longer to come.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// Operations with cold ones.
const COLD: usize = 1_000;
/// What is written to empty the caches; beyond the second level of the machines that have been seen.
const CACHES_BYTES: usize = 8 * 1024 * 1024;
/// Entries that a node of a middle-sized cluster has in the API set: kubelets, each with two addresses.
const KUBELETS: u32 = 1000;
/// Pods that are known on the node.
const PODS: u64 = 250;

fn main() {
    let kernel = Arc::new(Kernel::load(Pinning::Unpinned).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let node = Node::new(&kernel);
    let _counting = count_runs().unwrap();
    println!("load {}", std::fs::read_to_string("/proc/loadavg").unwrap().trim());
    println!(
        "{:<46} {:<18} {:>6} {:>8} {:>7} {:>9} {:>6}",
        "scene", "program", "caches", "runs", "mean/ns", "empty/ns", "ratio"
    );
    node.host.within(|| node.host_processes());
    node.pods();
    node.host.within(|| node.datagrams());
    let slow = node.slow.lock().unwrap();
    assert!(
        slow.is_empty(),
        "redirects take more than {REDIRECT_RATIO_MAX} times as long as an empty program: {slow:#?}"
    );
}

/// A tree like a node's, with the programs at its top, and what is known of it.
struct Node {
    kernel: Arc<Kernel>,
    home: PathBuf,
    service: OwnCgroup,
    container: OwnCgroup,
    /// In the order in which they can be removed.
    above: [OwnCgroup; 5],
    pod: u64,
    /// Stands for the host's network namespace.
    host: OwnNetns,
    sandbox: OwnNetns,
    empty: Vec<Empty>,
    caches: Mutex<Vec<u8>>,
    /// Redirects that take too long.
    slow: Mutex<Vec<String>>,
}

impl Node {
    fn new(kernel: &Arc<Kernel>) -> Self {
        let home = cgroup::of_process(std::process::id()).unwrap_or_default();
        let home = cgroup::mount_point().unwrap().join(home);
        let root = OwnCgroup::new("bench");
        let slice = root.below("system.slice");
        let service = slice.below("kubelet.service");
        let kubepods = root.below("kubepods");
        let class = kubepods.below("besteffort");
        let pod = class.below("pod0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b");
        let container = pod.below("container");
        let entry = |class| CgroupEntry { listener_netns: 0, class, listener_port: 0 };
        kernel.classify(kubepods.id(), entry(Class::Container as u32)).unwrap();
        (0..PODS).for_each(|id| kernel.classify(u64::MAX - id, entry(Class::Enrolled as u32)).unwrap());
        let host = OwnNetns::new();
        let sandbox = OwnNetns::new();
        [&host, &sandbox].iter().for_each(|netns| netns.take_address(ADDRESS.into()));
        sandbox.take_address(ADDRESS6.into());
        host.take_address(API_ADDRESS.into());
        kernel.set_settings(host.within(own_netns).unwrap(), 1).unwrap();
        kernel.set_api_endpoint(API4, 0).unwrap();
        kernel.set_api_endpoint(API6, 0).unwrap();
        for number in 0..KUBELETS {
            let ip = IpAddr::V4(Ipv4Addr::from(0x0a0a_0000 + number));
            kernel.set_api_endpoint(SocketAddr::new(ip, 10250), KUBELET).unwrap();
        }
        kernel.attach(&root.0).unwrap();
        let empty = [
            programs::CONNECT4,
            programs::CONNECT6,
            programs::SOCK_CREATE,
            programs::SOCK_OPS,
            programs::EGRESS,
            programs::INGRESS,
        ];
        let empty = empty.into_iter().map(|name| Empty::at(&root.0, name).unwrap()).collect();
        let pod_id = pod.id();
        Self {
            kernel: kernel.clone(),
            home,
            service,
            container,
            above: [slice, pod, class, kubepods, root],
            pod: pod_id,
            host,
            sandbox,
            empty,
            caches: Mutex::new(vec![1; CACHES_BYTES]),
            slow: Mutex::default(),
        }
    }

    fn host_processes(&self) {
        let server = TcpListener::bind((ADDRESS, 0)).unwrap();
        let address = server.local_addr().unwrap();
        let seen = [programs::CONNECT4, programs::SOCK_CREATE, programs::SOCK_OPS, programs::EGRESS];
        self.scene("host process: not the API set", &self.service.0, &seen, || connect(&server, address));
        let server = TcpListener::bind((API_ADDRESS, 0)).unwrap();
        let address = server.local_addr().unwrap();
        self.kernel.set_api_endpoint(address, 0).unwrap();
        self.scene("host process: the API set, passes", &self.service.0, &seen, || connect(&server, address));
        self.kernel.remove_api_endpoint(address).unwrap();
    }

    fn pods(&self) {
        let seen = [programs::CONNECT4, programs::SOCK_CREATE, programs::SOCK_OPS, programs::EGRESS];
        let listener = Listener::in_netns(Namespace::of_process(self.sandbox.pid()).unwrap()).unwrap();
        let entry = CgroupEntry {
            listener_netns: listener.netns(),
            class: Class::Enrolled as u32,
            listener_port: u32::from(listener.port()),
        };
        self.kernel.classify(self.pod, entry).unwrap();
        let port = listener.port();
        drop(listener);
        self.sandbox.within(|| {
            let server = TcpListener::bind((ADDRESS, 0)).unwrap();
            let address = server.local_addr().unwrap();
            self.scene("enrolled pod: not the API set", &self.container.0, &seen, || {
                connect(&server, address)
            });
        });
        self.sandbox.within(|| {
            let server = TcpListener::bind((ADDRESS6, 0)).unwrap();
            let address = server.local_addr().unwrap();
            self.scene(
                "enrolled pod: IPv6, not the API set",
                &self.container.0,
                &[programs::CONNECT6],
                || connect(&server, address),
            );
        });
        // Taken before the process is in the pod's cgroup, where nobody may have it.
        let server = self.sandbox.within(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap());
        let server6 = self.sandbox.within(|| TcpListener::bind((Ipv6Addr::LOCALHOST, port)).unwrap());
        self.sandbox.within(|| {
            self.scene("enrolled pod: IPv6, redirected", &self.container.0, &[programs::CONNECT6], || {
                connect(&server6, API6)
            });
        });
        self.sandbox.within(|| {
            self.scene("enrolled pod: the API set, redirected", &self.container.0, &seen, || {
                connect(&server, API4)
            });
        });
        self.as_on_a_node(&server);
        self.answers();
        self.kernel
            .classify(
                self.pod,
                CgroupEntry { listener_netns: 0, class: Class::Unselected as u32, listener_port: 0 },
            )
            .unwrap();
    }

    /// What the pod hears from a name server and from others, while there are host names of API servers. The program is at the root
    /// of pods, where `as_on_a_node` has attached it.
    fn answers(&self) {
        let name = EndpointName { host: "api.example.test".to_owned(), port: 443 };
        self.kernel.set_names(&[(name, 0)]).unwrap();
        let heard = |scene: &str, port: u16, told: &[u8]| {
            self.sandbox.within(|| {
                let server = UdpSocket::bind((ADDRESS, port)).unwrap();
                Self::enter(&self.container.0);
                let client = UdpSocket::bind((ADDRESS, 0)).unwrap();
                client.connect((ADDRESS, port)).unwrap();
                client.set_read_timeout(Some(ANSWER_DEADLINE)).unwrap();
                let from = client.local_addr().unwrap();
                make_good();
                self.scene_of(WARM_ANSWERS, scene, &self.container.0, &[programs::INGRESS], || {
                    server.send_to(told, from).unwrap();
                    client.recv(&mut [0; 512]).expect("the answer was kept from the pod");
                });
            });
        };
        heard("enrolled pod: a datagram of no name server", 5300, &answer("other.example.test."));
        heard("enrolled pod: an answer about another name", 53, &answer("other.example.test."));
        heard("enrolled pod: an answer with a known address", 53, &answer("api.example.test."));
        self.kernel.set_names(&[]).unwrap();
    }

    /// The pod's connects with the programs on both levels of the tree, where each meets them twice: what the kernel's count of a
    /// node shows. `server` is the pod's listener.
    fn as_on_a_node(&self, server: &TcpListener) {
        let [_, _, _, kubepods, _] = &self.above;
        self.kernel.attach_hooks(&kubepods.0).unwrap();
        self.kernel.set_settings(self.host.within(own_netns).unwrap(), 2).unwrap();
        self.sandbox.within(|| {
            let seen = [programs::CONNECT4];
            self.scene("on a node: the API set alone", &self.container.0, &seen, || connect(server, API4));
            let other = TcpListener::bind((ADDRESS, 0)).unwrap();
            let address = other.local_addr().unwrap();
            // A job that calls the API server and one other, whose name it asks for: both kinds of address, in datagrams.
            self.scene("on a node: one in four to the API set", &self.container.0, &seen, || {
                connect(server, API4);
                for _ in 0..2 {
                    UdpSocket::bind((ADDRESS, 0)).unwrap().connect((ADDRESS, 53)).unwrap();
                }
                connect(&other, address);
            });
        });
        self.kernel.set_settings(self.host.within(own_netns).unwrap(), 1).unwrap();
    }

    fn datagrams(&self) {
        let server = UdpSocket::bind((ADDRESS, 0)).unwrap();
        server.set_nonblocking(true).unwrap();
        let address = server.local_addr().unwrap();
        // Of the cgroup that it is made in.
        Self::enter(&self.service.0);
        let client = UdpSocket::bind((ADDRESS, 0)).unwrap();
        client.connect(address).unwrap();
        let send = || {
            client.send(b"x").unwrap();
            server.recv(&mut [0]).unwrap();
        };
        self.scene("host process: datagram, not the API set", &self.service.0, &[programs::EGRESS], send);
        // The last scene: nobody else goes to this address.
        self.kernel.set_api_endpoint(address, 0).unwrap();
        self.scene("host process: datagram, the API set", &self.service.0, &[programs::EGRESS], send);
    }

    /// Does it again and again from within the cgroup, and prints what the programs cost.
    fn scene(&self, name: &str, cgroup: &Path, seen: &[&'static str], operation: impl Fn()) {
        self.scene_of(WARM, name, cgroup, seen, operation);
    }

    /// As [`Self::scene`], so many times with warm caches.
    fn scene_of(&self, warm: usize, name: &str, cgroup: &Path, seen: &[&'static str], operation: impl Fn()) {
        Self::enter(cgroup);
        for (caches, count) in [("warm", warm), ("cold", COLD)] {
            let before = (self.kernel.program_usage().unwrap(), self.empty_usage());
            for _ in 0..count {
                if caches == "cold" {
                    black_box(&self.caches).lock().unwrap().fill(1);
                }
                operation();
            }
            let after = (self.kernel.program_usage().unwrap(), self.empty_usage());
            for program in seen {
                let (runs, took) = mean(&before.0, &after.0, program);
                let (_, empty) = mean(&before.1, &after.1, program);
                let ratio = took as f64 / empty.max(1) as f64;
                let row = format!(
                    "{name:<46} {program:<18} {caches:>6} {runs:>8} {took:>7} {empty:>9} {ratio:>6.1}"
                );
                println!("{row}");
                let is_redirect = name.ends_with(REDIRECTED) && program.starts_with(CONNECT);
                // With cold caches there are few, and how cold they are depends on who else is there.
                if is_redirect && caches == "warm" && ratio > REDIRECT_RATIO_MAX {
                    self.slow.lock().unwrap().push(row);
                }
            }
        }
        Self::enter(&self.home);
    }

    /// Goes into a cgroup with the whole process.
    fn enter(cgroup: &Path) {
        std::fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    }

    fn empty_usage(&self) -> Vec<ProgramUsage> {
        self.empty.iter().map(|empty| empty.usage().unwrap()).collect()
    }
}

/// Runs between two looks at a program, and their mean, ns.
fn mean(before: &[ProgramUsage], after: &[ProgramUsage], program: &str) -> (u64, u64) {
    let of = |usage: &[ProgramUsage]| {
        usage.iter().find(|usage| usage.name == program).map(|usage| (usage.runs, usage.time)).unwrap()
    };
    let ((before_runs, before_time), (after_runs, after_time)) = (of(before), of(after));
    let runs = after_runs - before_runs;
    let time = u64::try_from((after_time - before_time).as_nanos()).unwrap();
    (runs, time / runs.max(1))
}

/// Waits until the pod has made good for all answers that it may be ahead by.
#[expect(
    clippy::disallowed_methods,
    reason = "it goes by the kernel's time, and by nothing that could be asked"
)]
fn make_good() {
    std::thread::sleep(Duration::from_nanos(STEPS_AHEAD_MAX << STEP_SHIFT));
}

/// What a name server says of a name: an address of the API set.
fn answer(question: &str) -> Vec<u8> {
    let name: Name = question.parse().unwrap();
    let mut message = Message::new(7, MessageType::Response, OpCode::Query);
    message.add_query(Query::query(name.clone(), RecordType::A));
    let IpAddr::V4(address) = API4.ip() else { unreachable!("it is one of IPv4") };
    message.add_answer(Record::from_rdata(name, 60, RData::A(address.into())));
    message.to_vec().unwrap()
}

/// Connects, is accepted, and resets, so that no port is kept.
fn connect(server: &TcpListener, address: SocketAddr) {
    let client = TcpStream::connect(address).unwrap();
    match server.accept() {
        Ok((accepted, _)) => {
            nix::sys::socket::setsockopt(
                &client,
                nix::sys::socket::sockopt::Linger,
                &libc::linger { l_onoff: 1, l_linger: 0 },
            )
            .unwrap();
            drop((client, accepted));
        }
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionAborted),
    }
}
