//! The kernel programs on the running kernel: a cgroup and a network namespace of their own, attached to that
//! cgroup only. Needs root and the built programs: without them it fails under CI=true, and elsewhere says
//! loudly that nothing was tested. Everything made here is removed by drop guards.
#![expect(clippy::unwrap_used, reason = "what fails here fails the test, with its place")]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use nix::sys::socket::{SockaddrStorage, connect, getpeername, getsockname};
use weir_agent::interception::{
    cgroup,
    listener::{Listener, Namespace, own_netns},
    loader::{Counters, Kernel, Pinning},
};
use weir_common::kernel::{CgroupEntry, Class};

const API4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 443);
const API6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 6443);

/// A cgroup that is removed at the end; its processes are moved out by their own end.
struct OwnCgroup(PathBuf);

impl OwnCgroup {
    fn new(name: &str) -> Self {
        let path = cgroup::mount_point().unwrap().join(format!("weir-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn id(&self) -> u64 {
        cgroup::id(&self.0).unwrap()
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A process in a network namespace of its own with `lo` up; the namespace goes with it.
struct OwnNetns(Child);

impl OwnNetns {
    fn new() -> Self {
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up && echo up && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 3];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        assert_eq!(&line, b"up\n");
        Self(child)
    }
}

impl Drop for OwnNetns {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a client thread in the cgroup and namespace saw.
type Dialled = Result<(SocketAddr, SocketAddr), nix::Error>;

#[derive(Clone, Copy, PartialEq)]
enum Dial {
    Tcp(SocketAddr),
    /// An IPv6 socket that dials a v4-mapped address.
    Mapped(SocketAddr),
    Mptcp(SocketAddr),
    Udp(SocketAddr),
}

/// Dials from a child process that is in the cgroup (a cgroup holds whole processes), inside the namespace, and
/// reports the errno or the own and the peer's address through a pipe.
fn dial(cgroup: &Path, netns: Option<&OwnNetns>, dial: Dial) -> Dialled {
    let (own, other) = std::os::unix::net::UnixStream::pair().unwrap();
    let netns = netns.map(|netns| std::fs::File::open(format!("/proc/{}/ns/net", netns.0.id())).unwrap());
    let procs = std::fs::OpenOptions::new().write(true).open(cgroup.join("cgroup.procs")).unwrap();
    // SAFETY: the child only makes system calls on what was opened before, and leaves by _exit.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let result = in_child(&procs, netns.as_ref(), dial);
            let text = match result {
                Ok((own, peer)) => format!("{own} {peer}"),
                Err(errno) => format!("{}", errno as i32),
            };
            let _ = nix::unistd::write(&other, text.as_bytes());
            // SAFETY: ends the child without running the test harness's exit handlers.
            unsafe { libc::_exit(0) };
        }
        nix::unistd::ForkResult::Parent { child } => {
            drop(other);
            let mut text = String::new();
            io::Read::read_to_string(&mut &own, &mut text).unwrap();
            nix::sys::wait::waitpid(child, None).unwrap();
            match text.split_once(' ') {
                Some((own, peer)) => Ok((own.parse().unwrap(), peer.parse().unwrap())),
                None => Err(nix::Error::from_raw(text.parse().unwrap())),
            }
        }
    }
}

fn in_child(procs: &std::fs::File, netns: Option<&std::fs::File>, dial: Dial) -> Dialled {
    nix::unistd::write(procs, b"0")?;
    if let Some(netns) = netns {
        nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
    }
    let (address, kind, protocol) = match dial {
        Dial::Tcp(address) => (address, libc::SOCK_STREAM, 0),
        Dial::Mapped(address) => {
            let IpAddr::V4(ip) = address.ip() else { return Err(nix::Error::EINVAL) };
            (SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()), libc::SOCK_STREAM, 0)
        }
        Dial::Mptcp(address) => (address, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
        Dial::Udp(address) => (address, libc::SOCK_DGRAM, 0),
    };
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: takes numbers only; the descriptor is new and ours.
    let socket = unsafe {
        let fd = nix::Error::result(libc::socket(family, kind, protocol))?;
        OwnedFd::from_raw_fd(fd)
    };
    connect(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    let name = |storage: SockaddrStorage| -> Result<SocketAddr, nix::Error> {
        match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
            (Some(v4), _) => Ok(SocketAddr::new(v4.ip().into(), v4.port())),
            (_, Some(v6)) => Ok(SocketAddr::new(v6.ip().into(), v6.port())),
            _ => Err(nix::Error::EINVAL),
        }
    };
    Ok((name(getsockname(socket.as_raw_fd())?)?, name(getpeername(socket.as_raw_fd())?)?))
}

/// Loads the programs, or says why this machine cannot: `None` skips the test.
fn kernel() -> Option<Arc<Kernel>> {
    match Kernel::load(Pinning::Unpinned) {
        Ok(kernel) => Some(Arc::new(kernel)),
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(error) = source {
                text = format!("{text}: {error}");
                source = error.source();
            }
            assert!(std::env::var("CI").as_deref() != Ok("true"), "cannot test the kernel programs: {text}");
            eprintln!("NOT TESTED: the kernel programs: {text}");
            None
        }
    }
}

/// Two addresses in the API set, the programs attached to a cgroup, and nothing classified.
fn attached(name: &str) -> Option<(Arc<Kernel>, OwnCgroup)> {
    let kernel = kernel()?;
    let cgroup = OwnCgroup::new(name);
    kernel.set_api_endpoint(API4, 0).unwrap();
    kernel.set_api_endpoint(API6, 1).unwrap();
    kernel.attach(&cgroup.0).unwrap();
    Some((kernel, cgroup))
}

fn classify(kernel: &Kernel, cgroup: &OwnCgroup, class: Class, listener: Option<&Listener>) {
    kernel
        .classify(
            cgroup.id(),
            CgroupEntry {
                listener_netns: listener.map_or(0, Listener::netns),
                class: class as u32,
                listener_port: listener.map_or(0, |listener| u32::from(listener.port())),
            },
        )
        .unwrap();
}

#[tokio::test]
async fn enrolled_connections_arrive_at_the_listener_with_their_flow() {
    let Some((kernel, cgroup)) = attached("redirect") else { return };
    let netns = OwnNetns::new();
    let listener = Listener::in_netns(Namespace::of_process(netns.0.id()).unwrap()).unwrap();
    assert_ne!(listener.netns(), own_netns().unwrap());
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    let container = OwnCgroup(cgroup.0.join("container"));
    std::fs::create_dir(&container.0).unwrap();
    let mapped = SocketAddr::new(Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().into(), 443);
    for (client, peer_seen, original, cluster) in [
        (Dial::Tcp(API4), API4, API4, 0),
        (Dial::Tcp(API6), API6, API6, 1),
        (Dial::Mapped(API4), mapped, API4, 0),
    ] {
        let (own, peer) = dial(&container.0, Some(&netns), client).unwrap();
        assert_eq!(peer, peer_seen, "getpeername gives the dialled address");
        let (stream, from) = listener.accept().await.unwrap();
        assert_eq!((from.ip(), from.port()), (own.ip().to_canonical(), own.port()));
        let flow =
            kernel.take_flow(listener.netns(), from, stream.local_addr().unwrap()).expect("has a flow");
        assert_eq!((flow.original, flow.record.cluster), (original, cluster));
        assert_eq!(flow.record.netns, listener.netns());
        assert_eq!((flow.record.pod_cgroup, flow.record.cgroup), (cgroup.id(), container.id()));
        assert!(flow.record.tgid > 0 && flow.record.connected_boottime_ns > 0);
        assert_eq!(flow.record.uid, nix::unistd::getuid().as_raw());
        assert_eq!(kernel.take_flow(listener.netns(), from, stream.local_addr().unwrap()), None, "once");
    }
    let counters = kernel.counters().unwrap();
    let expected = Counters { seen: 3, redirected: 3, flows_published: 3, ..Counters::default() };
    assert_eq!(counters, expected);
    // Straight to the listener, without the hook's doing: accepted, but nobody vouches for it.
    let direct = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.port()));
    dial(&container.0, Some(&netns), Dial::Tcp(direct)).unwrap();
    let (stream, from) = listener.accept().await.unwrap();
    assert_eq!(kernel.take_flow(listener.netns(), from, stream.local_addr().unwrap()), None);
}

#[tokio::test]
async fn every_verdict_but_redirect_is_what_the_table_says() {
    let Some((kernel, cgroup)) = attached("verdicts") else { return };
    let netns = OwnNetns::new();
    let listener = Listener::in_netns(Namespace::of_process(netns.0.id()).unwrap()).unwrap();
    let refused = |class: Option<Class>, listener: Option<&Listener>| {
        match class {
            Some(class) => classify(&kernel, &cgroup, class, listener),
            None => kernel.forget_cgroup(cgroup.id()).unwrap(),
        }
        for target in [Dial::Tcp(API4), Dial::Tcp(API6), Dial::Mapped(API4)] {
            assert_eq!(dial(&cgroup.0, Some(&netns), target), Err(nix::Error::ECONNREFUSED));
        }
    };
    refused(None, None);
    refused(Some(Class::Container), None);
    assert_eq!(kernel.counters().unwrap().denied_unknown, 6);
    refused(Some(Class::Enrolled), None);
    let elsewhere = Listener::in_netns(Namespace::Own).unwrap();
    refused(Some(Class::Enrolled), Some(&elsewhere));
    assert_eq!(kernel.counters().unwrap().denied_no_listener, 6);
    // Passing, in a namespace without a route, is seen by another error than the hook's.
    for class in [Class::Unselected, Class::Agent, Class::Observed] {
        classify(&kernel, &cgroup, class, None);
        assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Tcp(API4)), Err(nix::Error::ENETUNREACH));
    }
    let counters = kernel.counters().unwrap();
    assert_eq!((counters.passed, counters.would_redirect, counters.redirected), (2, 1, 0));
    // The host's network namespace lets unclassified processes pass, once the programs know it.
    kernel.forget_cgroup(cgroup.id()).unwrap();
    kernel.set_settings(listener.netns(), 1).unwrap();
    assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Tcp(API4)), Err(nix::Error::ENETUNREACH));
}

#[tokio::test]
async fn protocols_that_cannot_be_redirected_are_refused() {
    let Some((kernel, cgroup)) = attached("protocols") else { return };
    let netns = OwnNetns::new();
    let listener = Listener::in_netns(Namespace::of_process(netns.0.id()).unwrap()).unwrap();
    classify(&kernel, &cgroup, Class::Unselected, None);
    assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Mptcp(API4)), Err(nix::Error::ENETUNREACH));
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Mptcp(API4)), Err(nix::Error::EPROTONOSUPPORT));
    assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Udp(API4)), Err(nix::Error::ECONNREFUSED));
    assert_eq!(kernel.counters().unwrap().protocol_refused, 2);
    let mut notices = kernel.notices().unwrap().expect("taken once");
    let first = notices.next().await.unwrap();
    assert_eq!((first.kind, first.protocol), (3, 262));
}

#[tokio::test]
async fn a_connection_that_meets_the_programs_twice_counts_once() {
    let Some((kernel, outer)) = attached("levels") else { return };
    let inner = OwnCgroup(outer.0.join("pod"));
    std::fs::create_dir(&inner.0).unwrap();
    kernel.attach(&inner.0).unwrap();
    kernel.set_settings(0, 2).unwrap();
    let netns = OwnNetns::new();
    let listener = Listener::in_netns(Namespace::of_process(netns.0.id()).unwrap()).unwrap();
    classify(&kernel, &inner, Class::Enrolled, Some(&listener));
    let (_, peer) = dial(&inner.0, Some(&netns), Dial::Tcp(API4)).unwrap();
    assert_eq!(peer, API4);
    let (stream, from) = listener.accept().await.unwrap();
    assert!(kernel.take_flow(listener.netns(), from, stream.local_addr().unwrap()).is_some());
    classify(&kernel, &inner, Class::Unselected, None);
    assert_eq!(dial(&inner.0, Some(&netns), Dial::Tcp(API4)), Err(nix::Error::ENETUNREACH));
    kernel.forget_cgroup(inner.id()).unwrap();
    assert_eq!(dial(&inner.0, Some(&netns), Dial::Tcp(API4)), Err(nix::Error::ECONNREFUSED));
    let counters = kernel.counters().unwrap();
    let expected = Counters {
        seen: 3,
        redirected: 1,
        flows_published: 1,
        passed: 1,
        denied_unknown: 1,
        ..Counters::default()
    };
    assert_eq!(counters, expected);
}
