//! A network inside a pod, as docker-in-docker makes one: a bridge, a network namespace behind it, and the pod's own address
//! on what leaves it. Sockets there are refused until Weir listens there too; what passes them is seen at the pod's interface like
//! the pod's own. Tasks outside the pod's cgroup stay refused.

use std::{
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
};

use weir_agent::interception::{
    listener::own_netns,
    loader::{Kernel, Pinning},
};
use weir_common::kernel::CgroupEntry;
use weir_tests::{
    AgentProcess, Pod, PodSpec,
    agent::{self, TrustSource},
    command, wait_until,
};

use super::{
    DEADLINE, Scene,
    escape::{
        Attack,
        Expected::{self, Dropped, Proxied},
        Folder, GUARDED, REFUSED, place,
    },
    monitoring::Monitored,
    witness::Server,
};

const NETWORK: &str = "172.31.99.0/24";
const GATEWAY: &str = "172.31.99.1";
const INSIDE: &str = "172.31.99.2/24";

/// What may come of a way in the pod's own cgroup, below it, and beside the root of pods, once there is a listener.
pub(super) const INSIDE_WAYS: [(&str, [Expected; 3]); 4] = [
    ("tcp", [Proxied, Proxied, REFUSED]),
    ("udp-sendto", [REFUSED; 3]),
    ("raw", [GUARDED; 3]),
    ("frame", [Dropped; 3]),
];

/// The namespace; it ends with its process, and what is in the pod for it ends with the pod.
pub(super) struct Nested(Child);

impl Nested {
    pub(super) fn new(pod: &str) -> Self {
        let mut child = Command::new("nsenter")
            .args(["-t", pod, "-n", "unshare", "--net", "sh", "-c", "echo there && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let nested = Self(child);
        let inside = nested.pid();
        let gateway = format!("{GATEWAY}/24");
        for (namespace, words) in [
            (pod, &["ip", "link", "add", "docker0", "type", "bridge"][..]),
            (pod, &["ip", "address", "add", &gateway, "dev", "docker0"]),
            (pod, &["ip", "link", "set", "docker0", "up"]),
            (pod, &["ip", "link", "add", "inner0", "type", "veth", "peer", "name", "eth0", "netns", &inside]),
            (pod, &["ip", "link", "set", "inner0", "master", "docker0", "up"]),
            (pod, &["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]),
            (
                pod,
                &[
                    "iptables",
                    "-t",
                    "nat",
                    "-A",
                    "POSTROUTING",
                    "-s",
                    NETWORK,
                    "-o",
                    "eth0",
                    "-j",
                    "MASQUERADE",
                ],
            ),
            (&inside, &["ip", "link", "set", "lo", "up"]),
            (&inside, &["ip", "address", "add", INSIDE, "dev", "eth0"]),
            (&inside, &["ip", "link", "set", "eth0", "up"]),
            (&inside, &["ip", "route", "add", "default", "via", GATEWAY]),
        ] {
            command::run(Command::new("nsenter").args(["-t", namespace, "-n"]).args(words)).unwrap();
        }
        nested
    }

    pub(super) fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_network_inside_a_pod_leads_not_around_weir() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-nested", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-nested", "caller")).unwrap();
    let attack = Attack::new(&scene, &pod);
    let (own, pid) = place(&pod);
    let nested = Nested::new(&pid);
    let inside = nested.pid();
    // Where docker puts its containers: below the pod's cgroup, or beside the root of pods.
    let below = Folder::new(own.join("docker"));
    let root = own.ancestors().find(|folder: &&Path| !folder.join("cgroup.events").exists()).unwrap();
    let beside = Folder::new(root.join("docker-weir-nested.scope"));
    let places = [own.to_str().unwrap(), below.path(), beside.path()];

    // Without an agent it leads to the API server, under the pod's address.
    for way in ["tcp", "udp-sendto", "frame", "raw"] {
        let (said, direct) = attack.try_from(&["--netns", &inside, "--cgroup", places[1]], way);
        assert!(!direct.is_empty(), "{way} ({said}) was not seen");
    }
    assert_eq!(attack.witness.check(Server::Api, None), 1);
    let before = attack.witness.direct();

    let mut agent = scene.agent(TrustSource::ClusterSigner);
    // Denied at first, which is reported; then there is a listener there as well.
    let (said, direct) = attack.try_from(&["--netns", &inside, "--cgroup", places[1]], "tcp");
    assert_eq!((said.as_str(), direct.as_slice()), ("refused", &[][..]), "{}", agent.last_lines());
    let served = |agent: &AgentProcess| {
        wait_until("the network inside the pod to be served", DEADLINE, || {
            let (said, direct) = attack.try_from(&["--netns", &inside, "--cgroup", places[1]], "tcp");
            assert!(direct.is_empty(), "the far side saw {direct:?}: {}", agent.last_lines());
            Ok((said == "connected").then_some(()))
        })
        .unwrap();
        assert_eq!(attack.witness.check(Server::Weir, Some(agent)), 1);
    };
    served(&agent);
    let check = |agent: &AgentProcess| {
        for (way, expected) in &INSIDE_WAYS {
            for (cgroup, expected) in places.into_iter().zip(expected) {
                let (said, direct) = attack.try_from(&["--netns", &inside, "--cgroup", cgroup], way);
                assert!(expected.is(&said), "{way} in {cgroup}: {said}: {}", agent.last_lines());
                assert!(direct.is_empty(), "{way} in {cgroup}: the far side saw {direct:?}");
            }
        }
        assert_eq!(attack.witness.check(Server::Weir, Some(agent)), 2);
    };
    check(&agent);
    // The next agent takes over this listener like the others, and refuses no connection meanwhile.
    let mut next = AgentProcess::start(agent.config(), &scene.scratch.path().join("next.log")).unwrap();
    assert!(agent.wait_for_succession().unwrap().success(), "{}", agent.last_lines());
    check(&next);
    // After a crash nobody listens there, and the one after it finds the way anew.
    next.crash().unwrap();
    let (said, direct) = attack.try_from(&["--netns", &inside, "--cgroup", places[1]], "tcp");
    assert_eq!((said.as_str(), direct.as_slice()), ("refused", &[][..]));
    let agent = scene.agent(TrustSource::ClusterSigner);
    served(&agent);
    assert_eq!(attack.witness.direct(), before, "requests that the API server had from the pod itself");
    scene.event("the refused connections", |event| {
        matches!(&event.kind, weir_common::event::Kind::ConnectionRefused { reason, .. }
            if reason.contains("denied by the kernel"))
    });
}

#[test]
fn a_pod_is_not_served_in_the_network_of_another_nor_by_its_listener() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-strange", true);
    scene.namespace("it-plain", false);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-strange", "caller")).unwrap();
    let others = ["it-strange", "it-plain"]
        .map(|namespace| scene.testbed.run_pod(&PodSpec::idle(namespace, "other")).unwrap());
    let host = PodSpec { host_network: true, ..PodSpec::idle("it-strange", "host") };
    let host = scene.testbed.run_pod(&host).unwrap();
    let configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    let (agent, monitored) = Monitored::start_with(&scene, configuration);
    let attack = Attack::new(&scene, &pod);
    let (own, _) = place(&pod);
    let [strange, _] = others.each_ref().map(|other| place(other).1);
    for other in &others {
        let (_, pid) = place(other);
        // Often enough for a listener to have come, had one been made.
        for _ in 0..20 {
            let (said, direct) =
                attack.try_from(&["--netns", &pid, "--cgroup", own.to_str().unwrap()], "tcp");
            assert_eq!((said.as_str(), direct.as_slice()), ("refused", &[][..]), "{}", agent.last_lines());
        }
    }
    let nested = |event: &weir_common::event::Event| matches!(&event.kind, weir_common::event::Kind::Finding { name, .. } if name == "nestedNetwork");
    assert!(!scene.events().iter().any(nested));

    // The kernel sends a connection to its own pod's listener alone, so that a map must be false for one to come to another's, be
    // it by an agent's fault or a privileged hand: then the listener's network namespace says one pod and the cgroup another. In
    // the host's network namespace, which all of its pods share, the cgroup alone does.
    let kernel = Kernel::load(Pinning::standard()).unwrap();
    let cgroup = weir_agent::interception::cgroup::id(own.parent().unwrap()).unwrap();
    let of_caller = kernel.cgroups().unwrap()[&cgroup];
    let own_place = ["--cgroup", own.to_str().unwrap()];
    let there = ["--netns", strange.as_str(), own_place[0], own_place[1]];
    let monitored = |result: &str| {
        monitored.metrics()[&format!("weir_connections_accepted_total{{result=\"{result}\"}}")]
    };
    for (count, (other, place, netns)) in (1..).zip([
        (&others[0], &there[..], cookie(&format!("/proc/{strange}/ns/net"))),
        (&host, &own_place[..], cookie("/proc/self/ns/net")),
    ]) {
        let port = listener_port(&agent, other);
        kernel
            .classify(cgroup, CgroupEntry { listener_netns: netns, listener_port: port, ..of_caller })
            .unwrap();
        let (said, direct) = attack.try_from(place, "tcp");
        assert!(said.starts_with("\"connected\", then "), "{said}: {}", agent.last_lines());
        assert_eq!(direct, [""; 0]);
        scene.event("both pods in the record", |event| {
            matches!(&event.kind, weir_common::event::Kind::ConnectionRefused { reason, caller: Some(caller) }
                if reason.contains(&format!("is of the pod it-strange/caller ({})", pod.uid))
                    && reason.contains(&format!("serves it-strange/{} ({})", other.name, other.uid))
                    && caller.pod.as_ref().is_some_and(|found| found.uid == other.uid))
        });
        assert_eq!((monitored("disagreed"), monitored("closed")), (f64::from(count), 0.0));
    }
    kernel.classify(cgroup, of_caller).unwrap();
    for pod in [&pod, &host] {
        let out = pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap();
        assert!(out.status.success(), "{}: {}", pod.name, agent.last_lines());
        scene.event("a session of the pod's own", |event| {
            matches!(&event.kind, weir_common::event::Kind::SessionStarted { caller }
                if caller.pod.as_ref().is_some_and(|found| found.uid == pod.uid))
        });
    }
    assert_eq!(attack.witness.direct(), 0, "requests that the API server had from the pod itself");
}

/// The cookie of a network namespace.
fn cookie(path: &str) -> u64 {
    let file = File::open(path).unwrap();
    // On a thread of its own, which is gone afterwards.
    let inside = std::thread::spawn(move || {
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        own_netns().unwrap()
    });
    inside.join().unwrap()
}

/// The port of a pod's listener.
fn listener_port(agent: &AgentProcess, pod: &Pod<'_>) -> u32 {
    let status = agent.status().unwrap();
    let of_pod = status["pods"].as_array().unwrap().iter().find(|state| state["uid"] == pod.uid.as_str());
    of_pod.unwrap()["listenerPort"].as_u64().unwrap().try_into().unwrap()
}
