//! The ways around Weir from an enrolled pod in the host's network: there its cgroup alone tells it from everything else of the node.
//!
//! It has the node's address, which the agent has as well, so that the far side is told by something else. The API server's own log says
//! of a request with the pod's token by its id whether it is in Weir's record: if not, it came from the pod itself. And nobody but these pods goes
//! to the address that the tests gave the node: what goes there crosses the loopback interface, which is watched. (Frames that it
//! could make with NET_RAW are a stated limit.)

use std::net::IpAddr;

use nix::sys::signal::Signal;
use weir_common::event::Kind;
use weir_tests::{AgentProcess, Pod};

use super::{
    Scene,
    escape::{
        ALIAS, Attack, BRIDGE_ADDRESS,
        Expected::{self, Dropped, Proxied, Says},
        GUARDED, REFUSED, Target,
    },
    places::{
        Places,
        Put::{self, Below, Cgroup, Late, LeftToRoot, Sibling},
    },
    watch::{self, PROGRAM, UDP, Watch},
    witness::{Server, Witness},
};

/// How a packet of ICMP is shown.
const ICMP: &str = " 1 0";
/// What comes of a port that is the listener's.
const TAKEN: &str = "failed EADDRINUSE";

/// From its container.
const WAYS: [(&str, Target, Expected); 37] = [
    ("tcp", Target::Service, Proxied),
    ("unspec-after", Target::Service, Proxied),
    ("tcp", Target::Endpoint, Proxied),
    ("tcp", Target::Alias, Proxied),
    ("bound", Target::Alias, Proxied),
    ("nonblocking", Target::Alias, Proxied),
    ("fastopen", Target::Alias, Proxied),
    ("fastopen-connect", Target::Alias, Proxied),
    ("io-uring", Target::Alias, Proxied),
    ("mapped", Target::Alias, Proxied),
    ("mark", Target::Alias, Proxied),
    ("unspec", Target::Alias, Proxied),
    ("unspec-after", Target::Alias, Proxied),
    ("unspec-pending", Target::Alias, Proxied),
    ("unspec-accepted", Target::Alias, Proxied),
    ("mptcp", Target::Alias, Says("failed EPROTONOSUPPORT")),
    ("mptcp-fastopen", Target::Alias, Says("failed EPROTONOSUPPORT")),
    ("sctp", Target::Alias, Says("failed EPROTONOSUPPORT")),
    ("udp", Target::Alias, REFUSED),
    ("udp-sendto", Target::Alias, REFUSED),
    ("udp-mapped-sendto", Target::Alias, REFUSED),
    ("udp-unspec", Target::Alias, REFUSED),
    ("udp-unspec-sendto", Target::Alias, REFUSED),
    ("udp-unspec-address", Target::Alias, REFUSED),
    ("udp-connected-sendto", Target::Alias, REFUSED),
    ("udp6-connect4", Target::Alias, REFUSED),
    ("udp6-sendto4", Target::Alias, REFUSED),
    ("udplite", Target::Alias, GUARDED),
    ("raw", Target::Alias, GUARDED),
    ("raw-protocol", Target::Alias, GUARDED),
    ("raw-connected", Target::Alias, GUARDED),
    // The node's connection tracking waits for the rest of its packet, before any guard.
    ("raw-fragment", Target::Alias, Dropped),
    ("raw-gre", Target::Alias, GUARDED),
    ("nested-user", Target::Alias, REFUSED),
    ("tcp", Target::Kubelet, REFUSED),
    ("udp-sendto", Target::Kubelet, REFUSED),
    ("raw", Target::Kubelet, GUARDED),
];

/// From where a process of the host puts itself.
const PLACES: [(&[Put], &str, Expected); 7] = [
    (&[Cgroup, Late], "tcp", Proxied),
    (&[Cgroup, Late], "unspec-accepted", Proxied),
    (&[Cgroup, Late], "passed", Proxied),
    (&[Below], "tcp", Proxied),
    (&[Sibling], "tcp", REFUSED),
    (&[Sibling], "raw", GUARDED),
    (&[Cgroup, LeftToRoot], "raw", GUARDED),
];

/// A pod in the host's network, and who watches what it does.
pub(super) struct OnHost<'a> {
    scene: &'a Scene,
    pod: &'a Pod<'a>,
    attack: &'a Attack<'a>,
    witness: Witness<'a>,
    watch: Watch,
    kubelet: String,
}

impl<'a> OnHost<'a> {
    /// The attack has given the node its other address.
    pub(super) fn new(scene: &'a Scene, pod: &'a Pod<'a>, attack: &'a Attack<'a>) -> Self {
        pod.install(&attack.program, PROGRAM).unwrap();
        let (_, port) = attack.address(Target::Kubelet).rsplit_once(':').unwrap();
        Self {
            scene,
            pod,
            attack,
            witness: Witness::on_host(scene, pod, BRIDGE_ADDRESS),
            watch: Watch::to(&attack.program, "lo", ALIAS),
            kubelet: format!("{ALIAS}:{port}"),
        }
    }

    fn address(&self, target: Target) -> &str {
        if target == Target::Kubelet { &self.kubelet } else { self.attack.address(target) }
    }

    /// What the pod says of these, all by one command.
    fn say(&self, ways: &[(&str, &str)]) -> Vec<String> {
        let commands = ways.iter().map(|(way, address)| format!("{PROGRAM} {way} {address}"));
        let said = self.pod.shell(&commands.collect::<Vec<_>>().join("; ")).unwrap();
        said.lines().map(str::to_owned).collect()
    }

    /// The same for one that connects, with a request over the connection.
    fn ask(&self, way: &str, target: Target) -> String {
        let mut command = self.scene.testbed.kubectl_command();
        command.args(["exec", "-i", "-n", &self.pod.namespace, &self.pod.name, "--"]);
        command.args([PROGRAM, "--relay", way, self.address(target)]);
        self.witness.ask(command)
    }

    /// The packets to the API server or kubelet that were seen at the other address since the last time.
    fn direct(&self) -> Vec<String> {
        let mut seen = self.watch.until_marker(ALIAS.parse::<IpAddr>().unwrap(), UDP, |address| {
            self.say(&[("udp-sendto", address)]);
        });
        // The kernel's own word on a marker, for which nobody listens.
        seen.retain(|packet| !packet.ends_with(ICMP));
        watch::to_any(seen, &[self.address(Target::Alias), &self.kubelet])
    }

    /// The watch is no blind one, nor is who reads the API server's log.
    pub(super) fn is_seen_without_an_agent(&self) {
        for (way, target) in [("tcp", Target::Alias), ("raw", Target::Alias), ("udp-sendto", Target::Kubelet)]
        {
            let said = self.say(&[(way, self.address(target))]);
            assert!(!self.direct().is_empty(), "{way} to the {target:?} ({said:?}) was not seen");
        }
        assert_eq!(self.ask("tcp", Target::Service), "connected");
        assert_eq!(self.witness.check(Server::Api, None), 1);
        assert!(self.witness.direct() > 0);
    }

    /// Tries all of them, and the listener's port; returns that.
    pub(super) fn goes_no_way_around(&self, agent: &AgentProcess) -> String {
        let before = self.witness.direct();
        // The answers to what was sent before must not be taken for more of it.
        self.direct();
        let (asks, says): (Vec<_>, Vec<_>) = WAYS.iter().partition(|(.., expected)| *expected == Proxied);
        let mut failed = Vec::new();
        let mut check = |what: String, expected: Expected, said: &str| {
            eprintln!("{what} from the host's network: {said}");
            if !expected.is(said) {
                failed.push(format!("{what}: {said}"));
            }
        };
        for (way, target, expected) in &asks {
            check(format!("{way} to the {target:?}"), *expected, &self.ask(way, *target));
        }
        let commands: Vec<_> = says.iter().map(|(way, target, _)| (*way, self.address(*target))).collect();
        let said = self.say(&commands);
        assert_eq!(said.len(), says.len(), "{said:?}");
        for ((way, target, expected), said) in says.iter().zip(&said) {
            check(format!("{way} to the {target:?}"), *expected, said);
        }
        let places = Places::new(self.pod, self.pod);
        let alias = self.address(Target::Alias);
        for (puts, way, expected) in &PLACES {
            let mut command = std::process::Command::new(&self.attack.program);
            command.args(places.words(puts));
            let said = if *expected == Proxied {
                self.witness.ask({
                    command.args(["--relay", way, alias]);
                    command
                })
            } else {
                weir_tests::command::run(command.args([way, alias])).unwrap().trim().to_owned()
            };
            check(format!("{way} from {puts:?}"), *expected, &said);
        }
        let direct = self.direct();
        assert!(
            failed.is_empty() && direct.is_empty(),
            "{failed:#?}; the far side saw {direct:?}: {}",
            agent.last_lines()
        );
        let placed = PLACES.iter().filter(|(.., expected)| *expected == Proxied).count();
        assert_eq!(self.witness.check(Server::Weir, Some(agent)), asks.len() + placed);
        assert_eq!(self.witness.direct(), before, "requests that the API server had from the pod itself");
        self.attack_listener(agent)
    }

    /// It is neither shared nor taken, and dialled directly it closes; returns its port.
    fn attack_listener(&self, agent: &AgentProcess) -> String {
        let status = agent.status().unwrap();
        let mut pods = status["pods"].as_array().unwrap().iter();
        let port = &pods.find(|pod| pod["uid"] == self.pod.uid.as_str()).unwrap()["listenerPort"];
        let port = port.to_string();
        self.takes_not_the_port_of(&port);
        let known = self.scene.events().len();
        let dials = ["127.0.0.1", "[::1]"].map(|address| format!("{address}:{port}"));
        assert_eq!(self.say(&dials.each_ref().map(|address| ("ask", address.as_str()))), ["closed"; 2]);
        weir_tests::wait_until("the direct dials in the record", super::DEADLINE, || {
            let new = self.scene.events().split_off(known);
            let dials = new.iter().filter(|event| {
                matches!(&event.kind, Kind::ConnectionRefused { reason, .. } if reason.contains("past the kernel's redirect"))
            });
            Ok((dials.count() == 2).then_some(()))
        })
        .unwrap();
        port
    }

    /// In no form that its address has.
    pub(super) fn takes_not_the_port_of(&self, listener: &str) {
        let all = ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"].map(|address| format!("{address}:{listener}"));
        assert_eq!(self.say(&all.each_ref().map(|address| ("steal", address.as_str()))), [TAKEN; 4]);
    }

    /// The same where the agent does not run, for whatever reason; `allowed` is what comes of a connection then.
    pub(super) fn goes_no_way_around_after(&self, signal: Signal, allowed: &str) {
        let ways = [
            ("tcp", Target::Alias, allowed),
            ("io-uring", Target::Alias, allowed),
            ("unspec-accepted", Target::Alias, allowed),
            ("udp-sendto", Target::Alias, "refused"),
            ("raw", Target::Alias, "failed EPERM"),
            ("mptcp", Target::Alias, "failed EPROTONOSUPPORT"),
            ("tcp", Target::Kubelet, "refused"),
        ];
        let said = self.say(&ways.map(|(way, target, _)| (way, self.address(target))));
        assert_eq!(said, ways.map(|(.., expected)| expected), "after {signal}");
        assert_eq!(self.direct(), [""; 0], "after {signal}");
    }
}
