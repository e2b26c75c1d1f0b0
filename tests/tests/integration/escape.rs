//! Every way we know by which a process of an enrolled pod could reach the API server or a kubelet around Weir, tried
//! from a real pod, while a packet socket watches the bridge that all pods are attached to: there, behind the guards of
//! the pods' interfaces, no packet of a pod may show that goes to either of them. The same watch sees those packets
//! while no agent runs, so it is no blind one. What is connected is asked something: [`super::witness`] says whom.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use weir_tests::{AgentProcess, Pod, PodSpec, agent::TrustSource, command, wait_until};

use super::{
    DEADLINE, Scene,
    before::Before,
    host_network::OnHost,
    watch::{self, PROGRAM, TCP, UDP, Watch, program},
    witness::{Server, Witness},
};

pub(super) const BRIDGE: &str = "weirtb0";
pub(super) const BRIDGE_ADDRESS: &str = "10.244.0.1";
const POD_NETWORK: &str = "10.244.0.0";
/// Given to the bridge by the tests: nothing publishes it.
pub(super) const ALIAS: &str = "10.244.0.253";
/// The node's end of an overlay network, which the tests make.
const OVERLAY: &str = "weirtbvx0";
const SERVICE: &str = "10.96.0.1:443";

/// What may come of a way while an agent serves the pod.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Expected {
    /// The listener has it: a request over it is answered with Weir's certificate, and the API server has it from Weir.
    Proxied,
    /// This, in the program's words: an error at once.
    Says(&'static str),
    /// Nobody tells the sender; nothing arrives.
    Dropped,
}

use Expected::{Dropped, Proxied, Says};

/// By a hook of connect or sendmsg.
pub(super) const REFUSED: Expected = Says("refused");
/// By the guard at the socket.
pub(super) const GUARDED: Expected = Says("failed EPERM");

/// From an ordinary container: its capabilities are the runtime's default, NET_RAW among them.
pub(super) const WAYS: [(&str, Target, Expected); 56] = [
    ("tcp", Target::Service, Proxied),
    ("bound", Target::Service, Proxied),
    ("nonblocking", Target::Service, Proxied),
    ("fastopen", Target::Service, Proxied),
    ("fastopen-connect", Target::Service, Proxied),
    ("io-uring", Target::Service, Proxied),
    ("mapped", Target::Service, Proxied),
    ("unspec", Target::Service, Proxied),
    ("unspec-after", Target::Service, Proxied),
    ("unspec-pending", Target::Service, Proxied),
    ("unspec-accepted", Target::Service, Proxied),
    ("mark", Target::Service, Proxied),
    // Bound to an interface that does not lead to the listener.
    ("device", Target::Service, Says("timedOut")),
    ("mptcp", Target::Service, Says("failed EPROTONOSUPPORT")),
    ("mptcp-fastopen", Target::Service, Says("failed EPROTONOSUPPORT")),
    // By the hook where the kernel has it, and by the kernel where it has not.
    ("sctp", Target::Service, Says("failed EPROTONOSUPPORT")),
    ("udp", Target::Service, REFUSED),
    ("udp-sendto", Target::Service, REFUSED),
    ("udp-mapped-sendto", Target::Service, REFUSED),
    ("udp-unspec", Target::Service, REFUSED),
    ("udp-unspec-sendto", Target::Service, REFUSED),
    ("udp-unspec-address", Target::Service, REFUSED),
    ("udp-connected-sendto", Target::Service, REFUSED),
    ("udp6-connect4", Target::Service, REFUSED),
    ("udp6-sendto4", Target::Service, REFUSED),
    // Connected without a hook.
    ("udplite", Target::Service, GUARDED),
    ("raw", Target::Service, GUARDED),
    ("raw-protocol", Target::Service, GUARDED),
    ("raw-connected", Target::Service, GUARDED),
    ("raw-fragment", Target::Service, GUARDED),
    ("raw-gre", Target::Service, GUARDED),
    ("frame", Target::Service, Dropped),
    ("frame-fragment", Target::Service, Dropped),
    ("frame-fragments", Target::Service, Dropped),
    ("frame-vlan", Target::Service, Dropped),
    ("frame-double-vlan", Target::Service, Dropped),
    // The machine that a datagram goes to would unwrap it.
    ("udp-vxlan", Target::Service, GUARDED),
    ("frame-vxlan", Target::Service, Dropped),
    ("udp-vxlan", Target::Kubelet, GUARDED),
    ("concurrent", Target::Service, Proxied),
    // A network namespace of its own needs a user namespace of its own in an ordinary container.
    ("nested-user", Target::Service, REFUSED),
    ("tcp", Target::Endpoint, Proxied),
    ("unspec-after", Target::Endpoint, Proxied),
    ("udp-sendto", Target::Endpoint, REFUSED),
    ("raw", Target::Endpoint, GUARDED),
    ("raw-fragment", Target::Endpoint, GUARDED),
    ("frame", Target::Endpoint, Dropped),
    ("frame-fragments", Target::Endpoint, Dropped),
    ("frame-vlan", Target::Endpoint, Dropped),
    ("tcp", Target::Alias, Proxied),
    ("raw", Target::Alias, GUARDED),
    ("frame", Target::Alias, Dropped),
    ("tcp", Target::Kubelet, REFUSED),
    ("mapped", Target::Kubelet, REFUSED),
    ("raw", Target::Kubelet, GUARDED),
    ("frame", Target::Kubelet, Dropped),
];

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Target {
    Service,
    Endpoint,
    /// Another address of the API server's machine.
    Alias,
    Kubelet,
}

/// Where the API server listens.
pub(super) fn endpoint(scene: &Scene) -> SocketAddr {
    let label = "kubernetes.io/service-name=kubernetes";
    let slices = scene
        .testbed
        .kubectl(&["get", "endpointslices", "-n", "default", "-l", label, "-o", "json"])
        .unwrap();
    let slices: Value = serde_json::from_str(&slices).unwrap();
    let slice = &slices["items"][0];
    let address = slice["endpoints"][0]["addresses"][0].as_str().unwrap();
    format!("{address}:{}", slice["ports"][0]["port"]).parse().unwrap()
}

/// Where the node's kubelet listens.
pub(super) fn kubelet_port(scene: &Scene) -> u64 {
    let nodes = scene.testbed.kubectl(&["get", "nodes", "-o", "json"]).unwrap();
    let nodes: Value = serde_json::from_str(&nodes).unwrap();
    nodes["items"][0]["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64().unwrap()
}

impl Expected {
    /// Whether this is what the program said.
    pub(super) fn is(&self, said: &str) -> bool {
        match self {
            Proxied => said == "connected",
            Says(expected) => said == *expected,
            Dropped => said == "sent",
        }
    }
}

pub(super) struct Attack<'a> {
    scene: &'a Scene,
    pub(super) pod: &'a Pod<'a>,
    pub(super) witness: Witness<'a>,
    pub(super) program: PathBuf,
    endpoint: String,
    alias: String,
    kubelet: String,
    watch: Watch,
    /// Of what is unwrapped.
    watch_inside: Watch,
}

impl<'a> Attack<'a> {
    pub(super) fn new(scene: &'a Scene, pod: &'a Pod<'a>) -> Self {
        let program = program();
        pod.install(&program, PROGRAM).unwrap();
        let endpoint = endpoint(scene);
        let alias = format!("{ALIAS}:{}", endpoint.port());
        command::run(Command::new("ip").args(["address", "replace", &format!("{ALIAS}/32"), "dev", BRIDGE]))
            .unwrap();
        // The node's end of an overlay network, as many CNIs have one. One that is there stays: another attack may
        // be watching it.
        if !Path::new("/sys/class/net").join(OVERLAY).exists() {
            let overlay = ["link", "add", OVERLAY, "type", "vxlan", "id", "42", "dstport", "4789", "local"];
            command::run(Command::new("ip").args(overlay).arg(BRIDGE_ADDRESS)).unwrap();
        }
        command::run(Command::new("ip").args(["link", "set", OVERLAY, "up"])).unwrap();
        Self {
            scene,
            pod,
            witness: Witness::new(scene, pod),
            watch: Watch::start(&program, BRIDGE, POD_NETWORK),
            watch_inside: Watch::start(&program, OVERLAY, POD_NETWORK),
            program,
            alias,
            endpoint: endpoint.to_string(),
            kubelet: format!("{BRIDGE_ADDRESS}:{}", kubelet_port(scene)),
        }
    }

    pub(super) fn address(&self, target: Target) -> &str {
        match target {
            Target::Service => SERVICE,
            Target::Endpoint => &self.endpoint,
            Target::Alias => &self.alias,
            Target::Kubelet => &self.kubelet,
        }
    }

    /// Waits until an agent knows the machine's other address.
    pub(super) fn wait_until_known(&self, agent: &AgentProcess) {
        wait_until("the agent to know the machine's other address", DEADLINE, || {
            let status = agent.status()?;
            let mut known = status["apiEndpoints"].as_array().into_iter().flatten();
            Ok(known.any(|address| *address == self.alias.as_str()).then_some(()))
        })
        .unwrap();
    }

    /// Tries a way from the pod; gives what the client saw and what the far side did.
    pub(super) fn try_way(&self, way: &str, target: Target) -> (String, Vec<String>) {
        let out = self.pod.exec(&[PROGRAM, "--via", BRIDGE_ADDRESS, way, self.address(target)]).unwrap();
        assert!(out.status.success(), "{way}: {}", String::from_utf8_lossy(&out.stderr));
        (String::from_utf8(out.stdout).unwrap().trim().to_owned(), self.direct())
    }

    /// The same for a way that connects, with a request over the connection.
    pub(super) fn ask_by(&self, way: &str, target: Target) -> (String, Vec<String>) {
        let mut command = self.scene.testbed.kubectl_command();
        command.args(["exec", "-i", "-n", &self.pod.namespace, &self.pod.name, "--"]);
        command.args([PROGRAM, "--relay", way, self.address(target)]);
        (self.witness.ask(command), self.direct())
    }

    /// The same from a process of the host that goes where `place` says; with a request if it connects.
    pub(super) fn try_from(&self, place: &[&str], way: &str) -> (String, Vec<String>) {
        let mut command = Command::new(&self.program);
        command.args(place);
        if matches!(way, "tcp" | "passed" | "mark" | "unspec-accepted") {
            command.args(["--relay", way, SERVICE]);
            (self.witness.ask(command), self.direct())
        } else {
            let said = command::run(command.args([way, SERVICE])).unwrap();
            (said.trim().to_owned(), self.direct())
        }
    }

    /// The packets to an API server or kubelet that the far side saw since the last time.
    pub(super) fn direct(&self) -> Vec<String> {
        let bridge = BRIDGE_ADDRESS.parse().unwrap();
        // What the pod sends now comes after all that it has sent before.
        let mut seen = self.watch.until_marker(bridge, UDP, |address| {
            self.pod.exec(&[PROGRAM, "udp-sendto", address]).unwrap();
        });
        // The host may have its own packets unwrapped.
        seen.extend(self.watch_inside.until_marker(bridge, TCP, |address| {
            let mut send = Command::new(&self.program);
            send.args(["--via", BRIDGE_ADDRESS, "--from", ALIAS, "udp-vxlan", address]);
            command::run(&mut send).unwrap();
        }));
        watch::to_any(seen, &[SERVICE, &self.endpoint, &self.alias, &self.kubelet])
    }
}

impl Drop for Attack<'_> {
    fn drop(&mut self) {
        let _ = command::output(Command::new("ip").args([
            "address",
            "delete",
            &format!("{ALIAS}/32"),
            "dev",
            BRIDGE,
        ]));
        let _ = command::output(Command::new("ip").args(["link", "delete", OVERLAY]));
    }
}

fn is_seen_without_an_agent(attack: &Attack<'_>) {
    // Without an agent the far side sees all of them: neither watch is blind. (Not a later fragment alone: connection
    // tracking at the bridge waits for the rest of its packet.)
    let passes = |way: &str| !matches!(way, "raw-fragment" | "frame-fragment");
    let sends = [
        "udp-sendto",
        "udp-unspec-sendto",
        "udp-unspec-address",
        "udp-connected-sendto",
        "udp6-connect4",
        "udp6-sendto4",
        "udplite",
        "raw",
        "raw-protocol",
        "raw-connected",
        "raw-gre",
    ];
    for (way, target, _) in WAYS.iter().filter(|(_, _, expected)| matches!(expected, Dropped | Says(_))) {
        if passes(way) && (sends.contains(way) || way.contains("frame") || way.contains("vxlan")) {
            let (said, direct) = attack.try_way(way, *target);
            assert!(!direct.is_empty(), "{way} to the {target:?} ({said}) was not seen");
        }
    }
    for (way, target) in [("tcp", Target::Service), ("mapped", Target::Service), ("tcp", Target::Endpoint)] {
        let (said, direct) = attack.ask_by(way, target);
        assert!(said == "connected" && !direct.is_empty(), "{way} to the {target:?} ({said}) was not seen");
    }
    let (said, direct) = attack.try_way("tcp", Target::Kubelet);
    assert!(!direct.is_empty(), "the kubelet ({said}) was not seen");
    // Nor is who looks at certificates and the audit log.
    assert_eq!(attack.witness.check(Server::Api, None), 3);
}

#[test]
fn no_process_of_an_enrolled_pod_reaches_an_api_server_or_kubelet_around_weir() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-escape", true);
    // Both start at the same time.
    let host = PodSpec { host_network: true, ..PodSpec::idle("it-escape", "host") };
    scene.testbed.apply(&host.manifest().to_string()).unwrap();
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-escape", "caller")).unwrap();
    let host = scene.testbed.run_pod(&host).unwrap();
    let attack = Attack::new(&scene, &pod);
    let on_host = OnHost::new(&scene, &host, &attack);

    is_seen_without_an_agent(&attack);
    let before = attack.witness.direct();
    assert!(before >= 3, "{before}");
    on_host.is_seen_without_an_agent();

    let sockets = Before::make(&attack, |_| true);
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    attack.wait_until_known(&agent);
    // The answers of the API server to what was sent before must not be taken for more of it.
    attack.direct();
    sockets.check(|| attack.direct(), Expected::is);
    let mut failed = Vec::new();
    for (way, target, expected) in &WAYS {
        let (said, direct) = match expected {
            Proxied => attack.ask_by(way, *target),
            _ => attack.try_way(way, *target),
        };
        println!("{way} to the {target:?}: {said}");
        if !expected.is(&said) || !direct.is_empty() {
            failed.push(format!("{way} to the {target:?}: {said}; the far side saw {direct:?}"));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}\n{}", agent.last_lines());
    let proxied = WAYS.iter().filter(|(.., expected)| matches!(expected, Proxied)).count();
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), proxied);
    assert_eq!(attack.witness.direct(), before, "requests that the API server had from the pod itself");
    let listener = on_host.goes_no_way_around(&agent);

    // Stopped, it holds up what is redirected; nothing goes another way. Dead, it refuses.
    for (signal, allowed) in [(Signal::SIGSTOP, "connected"), (Signal::SIGKILL, "refused")] {
        agent.signal(signal).unwrap();
        if signal == Signal::SIGKILL {
            agent.wait_for_end().unwrap();
        }
        for (way, expected) in
            [("tcp", allowed), ("udp-sendto", "refused"), ("raw", "failed EPERM"), ("frame", "sent")]
        {
            let (said, direct) = attack.try_way(way, Target::Service);
            assert_eq!((said.as_str(), direct.len()), (expected, 0), "{way} after {signal}: {direct:?}");
        }
        let (said, direct) = attack.try_way("tcp", Target::Kubelet);
        assert_eq!((said.as_str(), direct.len()), ("refused", 0), "{direct:?}");
        on_host.goes_no_way_around_after(signal, allowed);
    }
    on_host.takes_not_the_port_of(&listener);
}

/// A container's cgroup, and one of its processes.
pub(super) fn place(pod: &Pod<'_>) -> (PathBuf, String) {
    let found = command::run(Command::new("find").args([
        "/sys/fs/cgroup",
        "-maxdepth",
        "6",
        "-type",
        "d",
        "-name",
        &format!("*{}*", pod.container),
        "-path",
        "*kubepods*",
    ]))
    .unwrap();
    let is_v2 = |folder: &&str| Path::new(folder).join("cgroup.events").exists();
    let folder = PathBuf::from(found.lines().find(is_v2).unwrap());
    let processes = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap();
    (folder, processes.lines().next().unwrap().to_owned())
}

/// A cgroup of the test's own.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn new(path: PathBuf) -> Self {
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}
