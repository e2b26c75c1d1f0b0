//! The ways around Weir over IPv6, to an API server with an IPv6 address on another machine: the real one behind a relay
//! that notes who comes, while a packet socket watches its port of the bridge.

use std::net::{IpAddr, SocketAddr};

use nix::sys::signal::Signal;
use weir_tests::{
    AgentProcess, Pod, PodSpec,
    agent::{self, TrustSource},
};

use super::{
    Scene,
    before::{BEFORE6, Before},
    escape::{
        BRIDGE,
        Expected::{self, Dropped, Proxied, Says},
        GUARDED, REFUSED, endpoint, kubelet_port,
    },
    far_side::{self, FarSide},
    watch::{PROGRAM, UDP, Watch, program},
    witness::{Server, Witness},
};

/// Given to the pod.
pub(super) const POD6: &str = "fd00:10:244::7";

/// The node's, by which its kubelet and every other server of it is reached as well.
const NODE6: &str = "fd00:10:244::1";

/// From an ordinary container.
pub(super) const WAYS6: [(&str, Expected); 27] = [
    ("tcp", Proxied),
    ("bound", Proxied),
    ("nonblocking", Proxied),
    ("fastopen", Proxied),
    ("fastopen-connect", Proxied),
    ("io-uring", Proxied),
    ("unspec", Proxied),
    ("unspec-after", Proxied),
    ("unspec-pending", Proxied),
    ("unspec-accepted", Proxied),
    ("mptcp", Says("failed EPROTONOSUPPORT")),
    ("mptcp-fastopen", Says("failed EPROTONOSUPPORT")),
    ("udp", REFUSED),
    ("udp-sendto", REFUSED),
    ("udp-unspec", REFUSED),
    ("udp-unspec-sendto", REFUSED),
    ("raw", GUARDED),
    ("raw-protocol", GUARDED),
    ("raw-fragment", GUARDED),
    ("raw-hop-by-hop", GUARDED),
    // Its header names another machine than the one that it goes to.
    ("raw-routing", GUARDED),
    ("frame", Dropped),
    ("frame-vlan", Dropped),
    ("frame-fragments", Dropped),
    ("frame-hop-by-hop", Dropped),
    ("frame-options", Dropped),
    ("frame-routing", Dropped),
];

/// A pod with an IPv6 address, and who watches what it does.
pub(super) struct Scene6<'a> {
    scene: &'a Scene,
    pod: &'a Pod<'a>,
    witness: Witness<'a>,
    watch: Watch,
    /// Of what goes to the node.
    watch_node: Watch,
    api: IpAddr,
    /// The API server's.
    pub(super) target: String,
    /// The kubelet's.
    kubelet: String,
}

impl<'a> Scene6<'a> {
    /// The far side must be there already.
    pub(super) fn new(scene: &'a Scene, pod: &'a Pod<'a>) -> Self {
        let program = program();
        pod.install(&program, PROGRAM).unwrap();
        far_side::give_v6_address(pod, POD6);
        let watch = Watch::start(&program, far_side::INTERFACE, far_side::V6_NETWORK);
        let watch_node = Watch::start(&program, BRIDGE, far_side::V6_NETWORK);
        let api = far_side::V6.parse().unwrap();
        let target = SocketAddr::new(api, 443).to_string();
        let kubelet = format!("[{NODE6}]:{}", kubelet_port(scene));
        let witness = Witness::new(scene, pod);
        Self { scene, pod, witness, watch, watch_node, api, target, kubelet }
    }

    /// In the words of a shell in the pod.
    pub(super) fn command(&self, way: &str) -> String {
        format!("{PROGRAM} --station {NODE6} {way} {}", self.target)
    }

    fn say(&self, way: &str, to: &str) -> String {
        let out = self.pod.exec(&[PROGRAM, "--station", NODE6, way, to]).unwrap();
        assert!(out.status.success(), "{way}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }

    /// Tries a way, and asks something over a connection; gives what the client saw and what the far side did.
    fn try_way(&self, way: &str) -> (String, Vec<String>) {
        let asks = |(name, expected): &(&str, Expected)| *name == way && matches!(expected, Proxied);
        let said = if WAYS6.iter().any(asks) {
            let mut command = self.scene.testbed.kubectl_command();
            command.args(["exec", "-i", "-n", &self.pod.namespace, &self.pod.name, "--"]);
            command.args([PROGRAM, "--relay", way, &self.target]);
            self.witness.ask(command)
        } else {
            self.say(way, &self.target)
        };
        (said, self.direct())
    }

    /// The packets to the API server, the kubelet or a station on the way that were seen since the last time.
    pub(super) fn direct(&self) -> Vec<String> {
        let mark = |marker: &str| {
            self.say("udp-sendto", marker);
        };
        let mut seen = self.watch.until_marker(self.api, UDP, mark);
        seen.extend(self.watch_node.until_marker(NODE6.parse().unwrap(), UDP, mark));
        let (to_api, to_node) = (format!("{POD6} {} ", self.api), format!("{POD6} {NODE6} "));
        let kubelet = format!(" {}", self.kubelet.rsplit(':').next().unwrap());
        // A packet whose port is not told may go there as well; but neighbour discovery asks for hardware addresses, and answers.
        let hides = |packet: &String| packet.ends_with(" 0") && !packet.ends_with(" 58 0");
        let is_direct = |packet: &String| {
            packet.starts_with(&to_api) && (packet.ends_with(" 443") || hides(packet))
                || packet.starts_with(&to_node) && (packet.ends_with(&kubelet) || hides(packet))
        };
        seen.into_iter().filter(is_direct).collect()
    }

    /// The listener at ::1 is neither shared nor taken, and dialled directly it closes.
    fn attack_listener(&self, agent: &AgentProcess) {
        let status = agent.status().unwrap();
        let uid = self.pod.uid.as_str();
        let state = status["pods"].as_array().unwrap().iter().find(|state| state["uid"] == uid).unwrap();
        let port = &state["listenerPort"];
        for address in [format!("[::1]:{port}"), format!("[::]:{port}")] {
            assert_eq!(self.say("steal", &address), "failed EADDRINUSE", "{address}");
        }
        assert_eq!(self.say("ask", &format!("[::1]:{port}")), "closed");
        self.scene.event("the direct dial", |event| {
            matches!(&event.kind, weir_common::event::Kind::ConnectionRefused { reason, .. }
                if reason.contains("past the kernel's redirect"))
        });
    }
}

#[test]
fn no_way_over_ipv6_leads_around_weir() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-escape6", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-escape6", "caller")).unwrap();
    let far_side = FarSide::new(endpoint(&scene), scene.scratch.path());
    let own = POD6.parse::<IpAddr>().unwrap();
    let attack = Scene6::new(&scene, &pod);

    // Without an agent the far side sees them: neither the watch nor the relay is blind.
    let sends = |way: &&str| *way == "udp-sendto" || way.starts_with("raw") || way.starts_with("frame");
    // Not a later fragment alone: connection tracking at the bridge waits for the rest of its packet.
    let seen = WAYS6.iter().map(|(way, _)| *way).filter(|way| *way != "raw-fragment").filter(sends);
    for way in ["tcp"].into_iter().chain(seen) {
        let (said, direct) = attack.try_way(way);
        assert!(!direct.is_empty(), "{way} ({said}) was not seen");
    }
    assert_eq!(far_side.came_from(own), [attack.api]);
    assert_eq!(attack.witness.check(Server::Relay, None), 1);
    let said = attack.say("tcp", &attack.kubelet);
    assert!(!attack.direct().is_empty(), "the kubelet ({said}) was not seen");

    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["clusters"][0]["addresses"] = serde_json::json!([attack.target]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let ways = BEFORE6.map(|(way, expected)| (way, attack.target.clone(), expected));
    let sockets = Before::in_pod(&pod, ways.into());
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    // What was connected before was the pod's own doing, and what it was told is no more of it.
    attack.direct();
    far_side.came_from(own);
    sockets.check(|| attack.direct(), Expected::is);
    let mut failed = Vec::new();
    for (way, expected) in &WAYS6 {
        let (said, direct) = attack.try_way(way);
        println!("{way} over IPv6: {said}");
        if !expected.is(&said) || !direct.is_empty() {
            failed.push(format!("{way}: {said}; the far side saw {direct:?}"));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}\n{}", agent.last_lines());
    let proxied = WAYS6.iter().filter(|(_, expected)| matches!(expected, Proxied)).count();
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), proxied);
    let kubelet = || {
        let said = ["tcp", "udp-sendto", "raw", "frame"].map(|way| attack.say(way, &attack.kubelet));
        assert_eq!(said, ["refused", "refused", "failed EPERM", "sent"]);
        assert_eq!(attack.direct(), [""; 0], "to the kubelet");
    };
    kubelet();
    attack.attack_listener(&agent);

    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait_for_end().unwrap();
    for (way, expected) in
        [("tcp", "refused"), ("udp-sendto", "refused"), ("raw", "failed EPERM"), ("frame", "sent")]
    {
        let (said, direct) = attack.try_way(way);
        assert_eq!((said.as_str(), direct.len()), (expected, 0), "{way} after the agent died: {direct:?}");
    }
    kubelet();
    assert_eq!(far_side.came_from(own), Vec::<IpAddr>::new());
}
