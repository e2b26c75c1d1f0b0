//! Interfaces that a pod is given while it runs (as a CNI that plugs networks into running pods does).

use std::{
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use weir_agent::config::Mode;

use crate::{
    enrolment::{Node, known},
    world::{Dial, OwnNetns, dial, eventually},
};

/// How long an interface that a pod is given may be without a guard; a pass of the agent each second sees it.
const PLUGGED_MAX: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interface_that_an_enrolled_pod_is_given_is_guarded_or_reported_once() {
    let Some(node) = Node::start("plugged") else { return };
    let uid = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";
    let pod = node.kubepods.below(&format!("pod{uid}"));
    let sandbox = OwnNetns::new();
    pod.take(sandbox.pid());
    // Of a network that nobody is in (RFC 5737), this machine included.
    let server: SocketAddr = "198.51.100.1:443".parse().unwrap();
    node.published.send_if_modified(|set| set.endpoints.insert(server));
    node.know(&[known(uid, Some(Mode::Enforce), false)]);
    eventually("enrolled: arrives", || dial(&pod.0, Some(&sandbox), Dial::Tcp(server)), Result::is_ok).await;

    sandbox.join("weir-plug0", server.ip(), "198.51.100.2".parse().unwrap());
    let plugged = Instant::now();
    let api = UdpSocket::bind(server).unwrap();
    let other = UdpSocket::bind(SocketAddr::new(server.ip(), 444)).unwrap();
    api.set_nonblocking(true).unwrap();
    other.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
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
        assert!(plugged.elapsed() < PLUGGED_MAX, "not guarded after {PLUGGED_MAX:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("guarded {} ms after it was there; seen before: {seen_before}", plugged.elapsed().as_millis());

    // One without an end on the host is found as well, and said once; the next one, too.
    let reported = || node.recorder.measured().findings.get("unguardedInterface").copied().unwrap_or(0);
    assert_eq!(reported(), 0);
    for (name, expected) in [("weir-direct0", 1), ("weir-direct1", 2)] {
        sandbox.plug_direct("weir-plug0", name);
        let wait = async {
            while reported() < expected {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PLUGGED_MAX, wait).await.unwrap_or_else(|_| panic!("{name} is not reported"));
        assert_eq!(reported(), expected, "each once");
    }
    drop((sandbox, pod));
    node.stop().await;
}
