//! Verdicts, redirects and flow records, each seen from a client's side.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use weir_agent::{
    doctor,
    interception::{
        counters::Counters,
        listener::{Listener, Namespace, own_netns},
        loader::{Kernel, KernelError, OBJECT, Pinning},
    },
};
use weir_common::{
    kernel::{CgroupEntry, Class},
    sieve::pod_slot,
};

use crate::world::{API4, API6, Dial, OwnCgroup, OwnNetns, dial, load, not_tested};

/// Two addresses in the API set, the programs attached to a cgroup, and nothing classified.
fn attached(name: &str) -> Option<(Arc<Kernel>, OwnCgroup)> {
    let kernel = load(Pinning::Unpinned)?;
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
    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
    assert_ne!(listener.netns(), own_netns().unwrap());
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    let container = cgroup.below("container");
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

/// Pods share slots of what is counted at hand: whose a slot is not is counted as ever.
#[tokio::test]
async fn redirects_are_counted_for_their_pod_whether_it_has_a_slot_of_its_own_or_not() {
    let Some((kernel, cgroup)) = attached("slots") else { return };
    let netns = OwnNetns::new();
    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
    let neighbour = (1 << 40..).find(|id| pod_slot(*id) == pod_slot(cgroup.id())).unwrap();
    let connect = || dial(&cgroup.0, Some(&netns), Dial::Tcp(API4)).unwrap();
    let counted = |of: u64| {
        let counters = kernel.pod_counters(of).unwrap()?;
        assert_eq!((counters.seen, counters.flows_published), (counters.redirected, counters.redirected));
        Some(counters.redirected)
    };
    let unselected = CgroupEntry { listener_netns: 0, class: Class::Unselected as u32, listener_port: 0 };
    kernel.classify(neighbour, unselected).unwrap();
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    connect();
    assert_eq!((counted(cgroup.id()), counted(neighbour)), (Some(1), Some(0)));
    // The slot becomes free, and is taken by the next word about the pod.
    kernel.forget_cgroup(neighbour).unwrap();
    connect();
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    connect();
    connect();
    assert_eq!((counted(cgroup.id()), counted(neighbour)), (Some(4), None));
    kernel.classify(neighbour, unselected).unwrap();
    connect();
    assert_eq!((counted(cgroup.id()), counted(neighbour)), (Some(5), Some(0)));
    // Who is forgotten leaves nothing to who comes after.
    kernel.forget_cgroup(cgroup.id()).unwrap();
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    assert_eq!(counted(cgroup.id()), Some(0));
    let counters = kernel.counters().unwrap();
    assert_eq!((counters.seen, counters.redirected), (5, 5), "the node's");
}

/// Now, on the clock of the flow records, ns.
fn boottime_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap();
    u64::try_from(Duration::from(now).as_nanos()).unwrap()
}

#[tokio::test]
async fn a_flow_bears_the_time_of_its_connect_also_if_it_leaves_much_later() {
    /// How long what connects waits before it sends anything.
    const PAUSE: Duration = Duration::from_millis(600);
    /// What the timer's ticks may be behind, far more than the two that the programs reckon with.
    const TICKS: Duration = Duration::from_millis(200);
    let Some((kernel, cgroup)) = attached("time") else { return };
    let netns = OwnNetns::new();
    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    for (client, pause) in [(Dial::Tcp(API4), Duration::ZERO), (Dial::Late(API4, PAUSE), PAUSE)] {
        let before = boottime_ns();
        dial(&cgroup.0, Some(&netns), client).unwrap();
        let after = boottime_ns();
        let (stream, from) = listener.accept().await.unwrap();
        let flow =
            kernel.take_flow(listener.netns(), from, stream.local_addr().unwrap()).expect("has a flow");
        let connected = flow.record.connected_boottime_ns;
        let slack = |time: Duration| u64::try_from(time.as_nanos()).unwrap();
        assert!(connected + slack(TICKS) >= before, "{before} {connected}: too early");
        assert!(connected + slack(pause.saturating_sub(TICKS)) <= after, "{connected} {after}: too late");
    }
}

/// Whoever may change the pod's network takes from Weir what leads to its listener, and gains nothing by it.
#[tokio::test]
async fn with_the_loopback_interface_down_an_enrolled_pod_reaches_nothing() {
    let Some((kernel, cgroup)) = attached("lo-down") else { return };
    let (netns, other) = (OwnNetns::new(), OwnNetns::new());
    netns.join_to(&other, (Ipv4Addr::new(192, 0, 2, 7).into(), API4.ip()));
    let far = other.within(|| std::net::TcpListener::bind(API4).unwrap());
    far.set_nonblocking(true).unwrap();
    // The kernel goes on for two minutes else.
    netns.run("ip link set lo down && echo 1 > /proc/sys/net/ipv4/tcp_syn_retries");
    let connect = || dial(&cgroup.0, Some(&netns), Dial::Tcp(API4));
    classify(&kernel, &cgroup, Class::Unselected, None);
    connect().unwrap();
    far.accept().expect("the far side hears a pod whose loopback interface is down");

    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    let lost = connect().unwrap_err();
    assert!(matches!(lost, nix::Error::ETIMEDOUT | nix::Error::ENETUNREACH), "{lost}");
    assert_eq!(far.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "at the far side");
    netns.run("ip link set lo up");
    connect().unwrap();
    listener.accept().await.unwrap();
    assert_eq!(far.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "at the far side");
}

#[tokio::test]
async fn every_verdict_but_redirect_is_what_the_table_says() {
    let Some((kernel, cgroup)) = attached("verdicts") else { return };
    let netns = OwnNetns::new();
    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
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
    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
    classify(&kernel, &cgroup, Class::Unselected, None);
    assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Mptcp(API4)), Err(nix::Error::ENETUNREACH));
    // Not every kernel has it; those of the kernel matrix do.
    let has_sctp = std::env::var_os("WEIR_TEST_SCTP").is_some();
    if has_sctp {
        assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Sctp(API4)), Err(nix::Error::ENETUNREACH));
    }
    classify(&kernel, &cgroup, Class::Enrolled, Some(&listener));
    assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Mptcp(API4)), Err(nix::Error::EPROTONOSUPPORT));
    assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Udp(API4)), Err(nix::Error::ECONNREFUSED));
    assert_eq!(kernel.counters().unwrap().protocol_refused, 2);
    if has_sctp {
        assert_eq!(dial(&cgroup.0, Some(&netns), Dial::Sctp(API4)), Err(nix::Error::EPROTONOSUPPORT));
        assert_eq!(kernel.counters().unwrap().protocol_refused, 3);
    }
    let mut notices = kernel.notices().unwrap().expect("taken once");
    let first = notices.next().await.unwrap();
    assert_eq!((first.kind, first.protocol), (3, 262));
}

#[tokio::test]
async fn a_connection_that_meets_the_programs_twice_counts_once() {
    let Some((kernel, outer)) = attached("levels") else { return };
    let inner = outer.below("pod");
    kernel.attach(&inner.0).unwrap();
    kernel.set_settings(0, 2).unwrap();
    let netns = OwnNetns::new();
    let listener = Listener::in_netns(Namespace::of_process(netns.pid()).unwrap()).unwrap();
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

/// What the verifier may look at of one program; an agent's start waits for it. Programs of which it looks at more multiply states:
/// the mend is a global function, which is looked at once (`judgement.rs`), a loop by `bpf_loop`, or `class::unknown` for an answer
/// that much follows on.
const VERIFIED_MAX: u32 = 20_000;
/// The same of the one that reads answers in two loops, at whose steps Linux 6.1 looks time and again.
const VERIFIED_MAX_INGRESS: u32 = 60_000;

#[tokio::test]
async fn programs_are_verified_in_little_time() {
    let Some(_kernel) = attached("verified") else { return };
    let mut seen = std::collections::BTreeMap::new();
    for program in aya::programs::loaded_programs().flatten() {
        let name = program.name_as_str().unwrap_or_default().to_owned();
        if let Some(count) = program.verified_instruction_count().filter(|_| name.starts_with("weir_")) {
            seen.insert(name, count);
        }
    }
    println!("instructions verified: {seen:?}");
    assert!(seen.len() >= 11, "{seen:?}");
    for (name, count) in &seen {
        let most = if name == "weir_ingress" { VERIFIED_MAX_INGRESS } else { VERIFIED_MAX };
        assert!(*count < most, "{name}: {seen:?}");
    }
}

#[test]
fn whoever_reads_that_a_program_is_refused_reads_why() {
    /// Of the text in all; the log of a program that is refused at its end is longer.
    const TEXT_MAX: usize = 4400;
    let Some(object) = OBJECT else { return not_tested(&KernelError::NotBuilt) };
    // The first that is loaded. Before each of its ends it reads what is above its stack.
    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    const READ_ABOVE: [u8; 8] = [0x79, 0xa0, 8, 0, 0, 0, 0, 0];
    let mut object = object.to_vec();
    let code = section(&object, "cgroup_skb/egress");
    let (instructions, _) = object[code].as_chunks_mut();
    let ends: Vec<_> = (1..instructions.len()).filter(|at| instructions[*at] == EXIT).collect();
    ends.iter().for_each(|end| instructions[end - 1] = READ_ABOVE);
    let error = Kernel::load_object(&object, Pinning::Unpinned).unwrap_err();
    if !matches!(error, KernelError::Refused { .. }) {
        return not_tested(&error);
    }
    let said = doctor::chain(&error);
    println!("{} bytes: {said}", said.len());
    assert!(said.starts_with("the kernel refuses the program weir_egress ("), "{said}");
    assert!(said.contains("invalid read from stack R10 off=8 size=8"), "{said}");
    assert!(said.contains("Permission denied") && !said.contains('\n'), "{said}");
    assert!((4096..TEXT_MAX).contains(&said.len()), "{}: {said}", said.len());
}

/// Where a section of an ELF file of this kind (64 bits, little end first) is.
fn section(object: &[u8], name: &str) -> std::ops::Range<usize> {
    let number = |at: usize, length: usize| {
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(&object[at..at + length]);
        usize::try_from(u64::from_le_bytes(bytes)).unwrap()
    };
    // `e_shoff`, `e_shentsize`, `e_shnum` and `e_shstrndx`; `sh_name`, `sh_offset` and `sh_size` (elf(5)).
    let [first, size, count, names] =
        [(0x28, 8), (0x3a, 2), (0x3c, 2), (0x3e, 2)].map(|(at, length)| number(at, length));
    let names = number(first + names * size + 0x18, 8);
    let header = (0..count)
        .map(|index| first + index * size)
        .find(|header| object[names + number(*header, 4)..].starts_with(format!("{name}\0").as_bytes()));
    let offset = number(header.unwrap() + 0x18, 8);
    offset..offset + number(header.unwrap() + 0x20, 8)
}
