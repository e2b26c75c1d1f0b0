//! The guards: what comes past the connect hooks, each seen from the far side as well, which shares the pod's network
//! namespace here but not its cgroup.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{Arc, OnceLock},
};

use nix::sys::socket::{Backlog, SockaddrStorage, bind, connect, listen};
use weir_agent::interception::{
    cgroup,
    listener::{Listener, Namespace, own_netns},
    loader::{Kernel, Pinning},
    security::{Security, Way},
};
use weir_common::kernel::{CgroupEntry, Class, KUBELET};

use crate::world::{API4, DEADLINE, Dial, OwnCgroup, OwnNetns, dial, load, new_socket};

const UDP: u8 = 17;
const GRE: u8 = 47;
const REFUSED: nix::Error = nix::Error::ECONNREFUSED;

/// How this kernel lets programs decide in its security hooks, if it does.
pub(crate) fn security_way() -> Option<Way> {
    static FOUND: OnceLock<Option<Way>> = OnceLock::new();
    *FOUND.get_or_init(|| match std::env::var("WEIR_TEST_SECURITY") {
        Ok(expected) => [Way::Lsm, Way::ModifyReturn].into_iter().find(|way| way.to_string() == expected),
        Err(_) => expected_way(&load(Pinning::Unpinned)?.attach_security().unwrap()),
    })
}

/// How these are in force, if they are. Where it is known how, it must be so.
fn expected_way(security: &Security) -> Option<Way> {
    let way = match security {
        Security::InForce(way) => Some(*way),
        Security::Absent(reason) => {
            eprintln!("no program decides in the security hooks: {reason}");
            None
        }
    };
    if let Ok(expected) = std::env::var("WEIR_TEST_SECURITY") {
        assert_eq!(way.map(|way| way.to_string()), Some(expected), "{security:?}");
    }
    way
}

struct Scene {
    kernel: Arc<Kernel>,
    cgroup: OwnCgroup,
    netns: OwnNetns,
}

impl Scene {
    fn new(name: &str) -> Option<Self> {
        let kernel = load(Pinning::Unpinned)?;
        let (cgroup, netns) = (OwnCgroup::new(name), OwnNetns::new());
        netns.take_address(API4.ip());
        kernel.set_api_endpoint(API4, 0).unwrap();
        kernel.attach(&cgroup.0).unwrap();
        Some(Self { kernel, cgroup, netns })
    }

    fn classify(&self, class: Class, listener: Option<&Listener>) {
        let entry = CgroupEntry {
            listener_netns: listener.map_or(0, Listener::netns),
            class: class as u32,
            listener_port: listener.map_or(0, |listener| u32::from(listener.port())),
        };
        self.kernel.classify(self.cgroup.id(), entry).unwrap();
    }

    fn dial(&self, how: Dial) -> Result<(), nix::Error> {
        dial(&self.cgroup.0, Some(&self.netns), how).map(|_| ())
    }

    fn listener(&self) -> Listener {
        Listener::in_netns(Namespace::of_process(self.netns.pid()).unwrap()).unwrap()
    }
}

#[test]
fn what_the_security_hooks_add_is_in_force_in_each_way_that_the_kernel_takes() {
    let Some(scene) = Scene::new("security") else { return };
    let way = expected_way(&scene.kernel.attach_security().unwrap());
    judged_by_the_security_hooks(&scene, way.is_some());
    // A kernel that takes the better way takes the other as well.
    if way == Some(Way::Lsm) {
        drop(scene);
        let Some(scene) = Scene::new("security") else { return };
        let other = Way::ModifyReturn;
        assert_eq!(scene.kernel.attach_security_by(other).unwrap(), Security::InForce(other));
        judged_by_the_security_hooks(&scene, true);
    }
}

fn judged_by_the_security_hooks(scene: &Scene, in_force: bool) {
    let ways = [Dial::Packet, Dial::Bpf];
    let refused = if in_force { Err(nix::Error::EPERM) } else { Ok(()) };
    assert_eq!(ways.map(|way| scene.dial(way)), [Ok(()); 2], "a process of the host");
    for class in [Class::Unselected, Class::Observed, Class::Enrolled, Class::Container, Class::Unselected] {
        scene.classify(class, None);
        let packet = if matches!(class, Class::Enrolled | Class::Container) { refused } else { Ok(()) };
        // An agent is not known before it has made itself known.
        let bpf = if class == Class::Enrolled { refused } else { Ok(()) };
        assert_eq!(ways.map(|way| scene.dial(way)), [packet, bpf], "{class:?}");
    }
}

#[tokio::test]
async fn datagrams_and_raw_packets_to_an_api_server_do_not_leave_an_enrolled_pod() {
    let Some(scene) = Scene::new("guard-raw") else { return };
    let far = scene.netns.within(|| UdpSocket::bind(API4).unwrap());
    far.set_nonblocking(true).unwrap();
    let arrived = || {
        let mut byte = [0; 64];
        let mut count = 0;
        while far.recv(&mut byte).is_ok() {
            count += 1;
        }
        count
    };
    let ways = [Dial::Udp(API4), Dial::SendTo(API4), Dial::Raw(API4, UDP, 0)];
    scene.classify(Class::Unselected, None);
    for way in ways {
        scene.dial(way).unwrap();
    }
    assert_eq!(arrived(), 2, "the far side hears what is sent (a connect sends nothing)");
    for class in [Class::Enrolled, Class::Container] {
        scene.classify(class, None);
        assert_eq!(ways.map(|way| scene.dial(way)), [Err(REFUSED), Err(REFUSED), Err(nix::Error::EPERM)]);
        // Whose port cannot be told: a later fragment, and a protocol without ports.
        assert_eq!(scene.dial(Dial::Raw(API4, UDP, 185)), Err(nix::Error::EPERM));
        assert_eq!(scene.dial(Dial::Raw(API4, GRE, 0)), Err(nix::Error::EPERM));
        assert_eq!(arrived(), 0, "{class:?}");
    }
    assert_eq!(scene.kernel.counters().unwrap().guard_dropped, 6);
    let pod = scene.kernel.pod_counters(scene.cgroup.id()).unwrap().unwrap();
    assert_eq!((pod.guard_dropped, pod.protocol_refused), (6, 0), "counted for the pod");
    // Other ports of the same address, and other addresses, are nobody's business.
    let other = SocketAddr::new(API4.ip(), 53);
    scene.dial(Dial::SendTo(other)).unwrap();
    scene.dial(Dial::Raw(other, UDP, 0)).unwrap();
    // Once enrolled with a listener, datagrams are refused for their protocol.
    let listener = scene.listener();
    scene.classify(Class::Enrolled, Some(&listener));
    assert_eq!([Dial::Udp(API4), Dial::SendTo(API4)].map(|way| scene.dial(way)), [Err(REFUSED); 2]);
    assert_eq!(scene.kernel.counters().unwrap().protocol_refused, 2);
}

#[tokio::test]
async fn a_connection_from_before_enrolment_is_stalled() {
    let Some(scene) = Scene::new("guard-old") else { return };
    let far = scene.netns.within(|| TcpListener::bind(API4).unwrap());
    scene.classify(Class::Unselected, None);
    // A process of the cgroup connects, says one thing, and after a sign on its standard input another.
    let script = format!(
        "exec 3<>/dev/tcp/{}/{} && echo first >&3 && read line && echo second >&3 && read line",
        API4.ip(),
        API4.port()
    );
    let mut client = std::process::Command::new("nsenter")
        .args(["-t", &scene.netns.pid().to_string(), "-n", "sh", "-c"])
        .arg(format!("echo 0 > {}/cgroup.procs && exec bash -c '{script}'", scene.cgroup.0.display()))
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stream, _) = far.accept().unwrap();
    let mut line = [0; 6];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"first\n");
    scene.classify(Class::Enrolled, None);
    let mut sign = client.stdin.take().unwrap();
    std::io::Write::write_all(&mut sign, b"go on\n").unwrap();
    let dropped = || scene.kernel.counters().unwrap().guard_dropped > 0;
    wait(dropped);
    stream.set_nonblocking(true).unwrap();
    let mut rest = [0; 1];
    assert_eq!(stream.read(&mut rest).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    client.kill().unwrap();
    client.wait().unwrap();
}

/// The kernel ends no such sockets for anybody (`sctp_diag` has no `SOCK_DESTROY`), and connects them past all hooks.
#[test]
fn sctp_sockets_from_before_enrolment_reach_nobody() {
    // Not every kernel has it; those of the kernel matrix do.
    if std::env::var_os("WEIR_TEST_SCTP").is_none() {
        return;
    }
    let Some(scene) = Scene::new("guard-sctp") else { return };
    scene.classify(Class::Unselected, None);
    let to = SockaddrStorage::from(API4);
    let sctp = || new_socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP).unwrap();
    let far = scene.netns.within(sctp);
    bind(far.as_raw_fd(), &to).unwrap();
    listen(&far, Backlog::new(8).unwrap()).unwrap();
    let far = TcpListener::from(far);
    // Sockets are of their maker's cgroup, which a process is in as a whole: nobody makes one beside, since the matrix runs one test at a time.
    let home = cgroup::of_process(std::process::id()).unwrap_or_default();
    let home = cgroup::mount_point().unwrap().join(home).join("cgroup.procs");
    scene.cgroup.take(std::process::id());
    let [connected, made] = scene.netns.within(|| [sctp(), sctp()]);
    std::fs::write(home, std::process::id().to_string()).unwrap();

    connect(connected.as_raw_fd(), &to).unwrap();
    let mut connected = TcpStream::from(connected);
    let (mut accepted, _) = far.accept().unwrap();
    connected.write_all(b"first").unwrap();
    accepted.read_exact(&mut [0; 5]).unwrap();

    scene.classify(Class::Enrolled, None);
    let dropped = || scene.kernel.counters().unwrap().guard_dropped;
    let made = TcpStream::from(made);
    for socket in [&connected, &made, &accepted] {
        socket.set_nonblocking(true).unwrap();
    }
    connected.write_all(b"second").unwrap();
    wait(|| dropped() > 0);
    let before = dropped();
    assert_eq!(connect(made.as_raw_fd(), &to), Err(nix::Error::EINPROGRESS));
    wait(|| dropped() > before);
    far.set_nonblocking(true).unwrap();
    let heard = [accepted.read(&mut [0]).map(drop), far.accept().map(drop)];
    let heard = heard.map(|heard| heard.map_err(|error| error.kind()));
    assert_eq!(heard, [Err(ErrorKind::WouldBlock); 2]);
}

fn wait(holds: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + DEADLINE;
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "nothing was dropped");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn nobody_in_the_pod_takes_the_port_of_its_listener() {
    let Some(scene) = Scene::new("guard-bind") else { return };
    let listener = scene.listener();
    scene.classify(Class::Enrolled, Some(&listener));
    let port = listener.port();
    drop(listener);
    let addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from(([0; 16], port))];
    for address in addresses {
        assert_eq!(scene.dial(Dial::Bind(address)), Err(nix::Error::EADDRINUSE), "{address}");
    }
    scene.dial(Dial::Bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))).unwrap();
    assert_eq!(scene.kernel.counters().unwrap().bind_refused, 2);
    let elsewhere = OwnNetns::new();
    dial(&scene.cgroup.0, Some(&elsewhere), Dial::Bind(addresses[0])).unwrap();
    // Nor who is in the pod's network alone, of a cgroup that is known or not.
    let beside = OwnCgroup::new("guard-bind-beside");
    scene.kernel.attach(&beside.0).unwrap();
    let from_beside = |netns| dial(&beside.0, Some(netns), Dial::Bind(addresses[0])).map(|_| ());
    let unselected = CgroupEntry { listener_netns: 0, class: Class::Unselected as u32, listener_port: 0 };
    for known in [false, true] {
        if known {
            scene.kernel.classify(beside.id(), unselected).unwrap();
        }
        assert_eq!(from_beside(&scene.netns), Err(nix::Error::EADDRINUSE), "known: {known}");
        assert_eq!(from_beside(&elsewhere), Ok(()), "known: {known}");
    }
    scene.classify(Class::Unselected, None);
    scene.dial(Dial::Bind(addresses[0])).unwrap();
    from_beside(&scene.netns).unwrap();
}

#[tokio::test]
async fn an_enrolled_pod_reaches_no_kubelet_and_keeps_its_own_loopback() {
    let Some(scene) = Scene::new("guard-kubelet") else { return };
    let kubelet = SocketAddr::new(API4.ip(), 10250);
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 10250));
    for address in [kubelet, local] {
        scene.kernel.set_api_endpoint(address, KUBELET).unwrap();
    }
    let _servers = scene.netns.within(|| [kubelet, local].map(|address| TcpListener::bind(address).unwrap()));
    let listener = scene.listener();
    scene.classify(Class::Unselected, None);
    scene.dial(Dial::Tcp(kubelet)).unwrap();
    scene.classify(Class::Enrolled, Some(&listener));
    assert_eq!(scene.dial(Dial::Tcp(kubelet)), Err(REFUSED));
    assert_eq!(scene.dial(Dial::Raw(kubelet, 6, 0)), Err(nix::Error::EPERM));
    scene.dial(Dial::Tcp(local)).unwrap();
    assert_eq!(scene.kernel.counters().unwrap().denied_kubelet, 1);

    // In the host's network namespace the loopback address is the node's, by all of its names.
    let host = own_netns().unwrap();
    scene.kernel.set_settings(host, 1).unwrap();
    let in_host = |address: Ipv4Addr| {
        dial(&scene.cgroup.0, None, Dial::Tcp(SocketAddr::from((address, 10250)))).map(|_| ())
    };
    for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 5, 5, 5), Ipv4Addr::UNSPECIFIED] {
        assert_eq!(in_host(address), Err(REFUSED), "{address}");
    }
    assert_eq!(scene.kernel.counters().unwrap().denied_kubelet, 4, "by the hook, not for lack of a server");
}
