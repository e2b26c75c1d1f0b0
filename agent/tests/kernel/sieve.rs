//! What spares look-ups hides nothing: seen by programs that are in force while another process writes the maps.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use weir_agent::interception::{listener::own_netns, loader::Pinning};
use weir_common::kernel::{CgroupEntry, Class, maps};

use crate::{
    pins::OwnBpffs,
    world::{API4, DEADLINE, Dial, OwnCgroup, OwnNetns, dial, load},
};

const REFUSED: nix::Error = nix::Error::ECONNREFUSED;
/// What who passes sees, in a namespace without a route.
const PASSED: nix::Error = nix::Error::ENETUNREACH;
/// How often it is dialled while the set changes.
const DIALS: usize = 1000;
/// How often verdicts change.
const ROUNDS: usize = 6;

fn entry(class: Class) -> CgroupEntry {
    CgroupEntry { listener_netns: 0, class: class as u32, listener_port: 0 }
}

/// Addresses of both families, near to each other and far.
fn addresses() -> Vec<SocketAddr> {
    let v4 = (0..40_u32).map(|number| IpAddr::from(Ipv4Addr::from(0x0a00_0001 + number * 517)));
    let v6 = (0..40_u16).map(|number| IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, number, 0, 0, 0, 0, 1)));
    v4.chain(v6).map(|ip| SocketAddr::new(ip, 6443)).collect()
}

#[test]
fn programs_in_force_look_for_every_address_that_any_process_adds() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let (cgroup, netns) = (OwnCgroup::new("sieve"), OwnNetns::new());
    let dialled = |address| dial(&cgroup.0, Some(&netns), Dial::Tcp(address)).map(|_| ());
    let first = load(Pinning::Pinned(pins.clone())).unwrap();
    first.attach(&cgroup.0).unwrap();
    let second = load(Pinning::Pinned(pins.clone())).unwrap();
    for address in addresses() {
        assert_eq!(dialled(address), Err(PASSED), "{address} is not in the set yet");
        second.set_api_endpoint(address, 0).unwrap();
        assert_eq!(dialled(address), Err(REFUSED), "{address}");
        let other = SocketAddr::new(address.ip(), 80);
        assert_eq!(dialled(other), Err(PASSED), "{other} is another server");
    }
    second.remove_api_endpoint(addresses()[0]).unwrap();
    assert_eq!(dialled(addresses()[0]), Err(PASSED));
    second.set_api_endpoint(addresses()[0], 0).unwrap();
    drop((first, second));
    // Somebody's hand has taken the marks: they are there again before programs that would rely on them are.
    std::fs::remove_file(pins.join("maps").join(maps::SIEVE)).unwrap();
    let third = load(Pinning::Pinned(pins)).unwrap();
    third.attach(&cgroup.0).unwrap();
    for address in addresses() {
        assert_eq!(dialled(address), Err(REFUSED), "{address}, after its mark was lost");
    }
}

#[test]
fn nothing_that_was_kept_counts_while_a_map_changes() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let [agent, beside] = [(); 2].map(|()| load(Pinning::Pinned(pins.clone())).unwrap());
    agent.classify(1, entry(Class::Unselected)).unwrap();
    let (ended, deadline) = (AtomicBool::new(false), Instant::now() + DEADLINE);
    let (mut between, mut before, mut seen) = (false, 0, HashSet::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                agent.classify(1, entry(Class::Enrolled)).unwrap();
                agent.forget_cgroup(1).unwrap();
                agent.set_api_endpoint(API4, 0).unwrap();
                agent.remove_api_endpoint(API4).unwrap();
            }
        });
        while !(between && seen.len() > 100) && Instant::now() < deadline {
            let generation = beside.generation().unwrap();
            between |= generation == 0;
            if generation != 0 && generation != before {
                assert!(seen.insert(generation), "a generation that was there before");
                before = generation;
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert!(between, "an agent that is killed while it changes a map leaves what was kept before in force");
    assert!(seen.len() > 100, "{} generations", seen.len());
    assert!(seen.iter().all(|generation| generation >> 63 == 0), "what the programs rely on");
    assert_ne!(beside.generation().unwrap(), 0, "what is found from here on is kept");
}

#[test]
fn an_address_stays_in_the_set_while_all_around_it_are_added_and_removed() {
    let Some(kernel) = load(Pinning::Unpinned) else { return };
    let (cgroup, netns) = (OwnCgroup::new("around"), OwnNetns::new());
    kernel.set_api_endpoint(API4, 0).unwrap();
    kernel.attach(&cgroup.0).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            let mut changes = 0;
            while !ended.load(Ordering::Relaxed) {
                // The same address with other ports as well, and itself, published again.
                let others = [80, 6443].map(|port| SocketAddr::new(API4.ip(), port));
                for address in addresses().into_iter().chain(others) {
                    kernel.set_api_endpoint(address, 1).unwrap();
                    kernel.set_api_endpoint(API4, 0).unwrap();
                    kernel.remove_api_endpoint(address).unwrap();
                    changes += 1;
                }
            }
            changes
        });
        let dialled = || dial(&cgroup.0, Some(&netns), Dial::Tcp(API4)).map(|_| ());
        let passed = (0..DIALS).map(|_| dialled()).find(|dialled| *dialled != Err(REFUSED));
        ended.store(true, Ordering::Relaxed);
        assert_eq!(passed, None);
        assert!(changing.join().unwrap() > 0);
    });
}

/// A process that connects to the API set again and again, so that answers are kept at every moment.
struct Restless(Child);

impl Restless {
    fn within(cgroup: &OwnCgroup, netns: &OwnNetns) -> Self {
        // Nothing that forks: no process must be left in the cgroup.
        let connecting = format!("while true; do : < /dev/tcp/{}/{}; done", API4.ip(), API4.port());
        let child = Command::new("nsenter")
            .args(["-t", &netns.pid().to_string(), "-n", "bash", "-c", &connecting])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        cgroup.take(child.id());
        Self(child)
    }
}

impl Drop for Restless {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_verdict_holds_from_the_moment_it_is_given_however_often_it_changes() {
    if load(Pinning::Unpinned).is_none() {
        return;
    }
    let bpffs = OwnBpffs::mount().unwrap();
    let pins = bpffs.0.path().join("weir/v3");
    let root = OwnCgroup::new("verdict");
    let pod = root.below("pod");
    let container = pod.below("container");
    let netns = OwnNetns::new();
    let first = load(Pinning::Pinned(pins.clone())).unwrap();
    first.set_api_endpoint(API4, 0).unwrap();
    first.attach(&root.0).unwrap();
    let second = load(Pinning::Pinned(pins)).unwrap();
    let restless = [(); 2].map(|()| Restless::within(&container, &netns));
    // Twice each: what is kept of the first must serve the second.
    let dialled = |expected, why: &str| {
        for _ in 0..2 {
            assert_eq!(dial(&container.0, Some(&netns), Dial::Tcp(API4)).map(|_| ()), Err(expected), "{why}");
        }
    };
    let host = own_netns().unwrap();
    let in_pod = netns.within(own_netns).unwrap();
    for round in 0..ROUNDS {
        // Two processes take turns, as an agent and its successor do.
        let (one, other) = if round % 2 == 0 { (&first, &second) } else { (&second, &first) };
        one.classify(root.id(), entry(Class::Container)).unwrap();
        dialled(REFUSED, "nothing is said of the pod");
        other.classify(pod.id(), entry(Class::Unselected)).unwrap();
        dialled(PASSED, "the pod is known");
        one.classify(pod.id(), entry(Class::Enrolled)).unwrap();
        dialled(REFUSED, "the pod is enrolled");
        other.classify(container.id(), entry(Class::Agent)).unwrap();
        dialled(PASSED, "the nearest counts");
        one.forget_cgroup(container.id()).unwrap();
        dialled(REFUSED, "the pod's counts again");
        other.forget_cgroup(pod.id()).unwrap();
        dialled(REFUSED, "the root's counts again");
        one.forget_cgroup(root.id()).unwrap();
        dialled(REFUSED, "in no classified cgroup, and not on the host's network");
        other.set_settings(in_pod, 1).unwrap();
        dialled(PASSED, "a process of the host");
        one.classify(root.id(), entry(Class::Container)).unwrap();
        dialled(REFUSED, "no process of the host any more");
        other.forget_cgroup(root.id()).unwrap();
        one.set_settings(host, 1).unwrap();
    }
    drop(restless);
}
