//! Host names of API servers: what they stand for changes while the agent runs, and pods are told so first.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::json;
use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, Coverage, Pod, PodSpec,
    agent::{self, TrustSource},
    audit,
    testbed::{BRIDGE_ADDRESS, ENDPOINT_NAME},
    wait_until,
};

use super::{
    DEADLINE, Scene, escape,
    far_side::{
        self, FIRST, FarSide, RECORD_SECONDS, SECOND, THIRD, V6, wait_for_record, wait_for_record_of,
    },
    shown,
    watch::{self, PROGRAM, UDP, Watch},
    witness::{Server, Witness},
};

/// Where nothing listens.
const NOBODY: &str = "10.244.0.244";
/// No API server's.
const OTHER_NAME: &str = "other.weir.test";
/// Where nothing listens, either.
const FORGED: &str = "10.244.0.249";
/// Given to the pod that races.
const POD6: &str = "fd00:10:244::8";
/// How long a record may be over until the agent asks again; one that lives for long it asks for after 30 s.
const ASKED_MAX: Duration = Duration::from_secs(25);
/// Races of each kind; with `WEIR_TEST_LONG` more.
const RACES: usize = 20;
const RACES_LONG: usize = 300;
/// Those without an agent that gets to run.
const STALLED: usize = 5;

/// Whether the agent knows an address as an API server's.
fn is_known(agent: &AgentProcess, address: &str) -> anyhow::Result<bool> {
    let status = agent.status()?;
    let mut known = status["apiEndpoints"].as_array().into_iter().flatten();
    Ok(known.any(|known| *known == format!("{address}:443").as_str()))
}

/// kubectl as a pod uses it that was given an endpoint's name.
fn ask(pod: &Pod<'_>) -> (Option<i32>, String, String) {
    let folder = "/var/run/secrets/kubernetes.io/serviceaccount";
    let script = format!(
        "kubectl --server=https://{ENDPOINT_NAME}:443 --certificate-authority={folder}/ca.crt \
         --token=\"$(cat {folder}/token)\" --request-timeout=20s get namespace default -o name"
    );
    shown(&pod.exec(&["sh", "-c", &script]).unwrap())
}

#[test]
fn a_new_address_of_an_endpoint_is_no_way_out_for_the_pod_that_is_told_it_first() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-names", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-names", "caller")).unwrap();
    let own = pod.shell("hostname -i").unwrap().trim().parse::<IpAddr>().unwrap();
    let mut far_side = FarSide::new(escape::endpoint(&scene), scene.scratch.path());
    pod.shell(&format!("echo nameserver {FIRST} > /etc/resolv.conf")).unwrap();
    pod.install(&watch::program(), watch::PROGRAM).unwrap();
    wait_for_record(&pod, FIRST);

    // Without an agent the far side meets the pod: it is not blind, and the name leads to the API server.
    let first: IpAddr = FIRST.parse().unwrap();
    let expected = (Some(0), "namespace/default\n".to_owned(), String::new());
    assert_eq!(ask(&pod), expected);
    assert_eq!(far_side.came_from(own), [first]);
    let before = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap().len();

    let mut configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
    configuration["nameServers"] = json!([FIRST]);
    configuration["clusters"][0]["addresses"] = json!([format!("{ENDPOINT_NAME}:443")]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    far_side.restart_name_server(1);
    wait_for_record(&pod, FIRST);
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    wait_until("the endpoint's address", DEADLINE, || Ok(is_known(&agent, FIRST)?.then_some(()))).unwrap();
    assert_eq!(ask(&pod), expected, "{}", agent.last_lines());
    assert!(far_side.came_from(own).is_empty());
    learns_by_time_alone(&agent, &pod, &mut far_side);

    // The record lives for an hour: only what the pod is told can have the agent know of the new address.
    assert!(!is_known(&agent, SECOND).unwrap());
    far_side.record(SECOND);
    wait_for_record(&pod, SECOND);
    assert_eq!(ask(&pod), expected, "{}", agent.last_lines());
    wait_until("the proof", DEADLINE, || {
        let log = agent.log()?;
        let mut proven = log.lines().filter(|line| line.contains("is in the API set from now on"));
        Ok(proven.any(|line| line.contains(SECOND)).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", agent.last_lines()));
    assert!(is_known(&agent, SECOND).unwrap() && is_known(&agent, FIRST).unwrap());
    far_side.came_from(own);
    assert_eq!(ask(&pod), expected, "{}", agent.last_lines());
    for address in [FIRST, SECOND, THIRD] {
        let said = pod.exec(&[watch::PROGRAM, "tcp", &format!("{address}:443")]).unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "connected", "{address}");
    }
    assert!(far_side.came_from(own).is_empty());

    // A pod's forgery is found out, and makes nobody else's address an API server's.
    let marker = format!("{FIRST}:9");
    pod.exec(&[watch::PROGRAM, "forge", ENDPOINT_NAME, FORGED, &marker]).unwrap();
    wait_until("the forgery to be found out", DEADLINE, || {
        let found = agent.log()?.contains("an answer named an address that is none of this name's");
        Ok((found && !is_known(&agent, FORGED)?).then_some(()))
    })
    .unwrap();

    // Without the name server everything stays, and that is recorded once; a forgery has the agent ask it. A machine that stands still
    // for seconds may have kept an answer from it before.
    let unresolved =
        |event: &Event| matches!(&event.kind, Kind::Finding { name, .. } if name == "hostNameUnresolved");
    let before_silence = scene.events().iter().filter(|event| unresolved(event)).count();
    far_side.end_name_server();
    pod.exec(&[watch::PROGRAM, "forge", ENDPOINT_NAME, "10.244.0.248", &marker]).unwrap();
    wait_until("the name server's silence", DEADLINE, || {
        Ok((scene.events().iter().filter(|event| unresolved(event)).count() > before_silence).then_some(()))
    })
    .unwrap();
    for address in [FIRST, SECOND, THIRD, NOBODY] {
        assert!(is_known(&agent, address).unwrap(), "{address}");
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let events = scene.events();
    assert_eq!(events.iter().filter(|event| unresolved(event)).count(), before_silence + 1);

    // Every request of the pod that the API server saw has a record.
    let audited = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap();
    let coverage = Coverage::compare(&audited[before..], &events, &pod.uid);
    assert!(coverage.is_complete(), "{coverage}");
}

/// Nobody asks for the name but the agent, once its record's life is over. Afterwards records live for long.
fn learns_by_time_alone(agent: &AgentProcess, pod: &Pod<'_>, far_side: &mut FarSide) {
    let learns = |address| {
        wait_until("the agent to ask again", ASKED_MAX, || Ok(is_known(agent, address)?.then_some(())))
            .unwrap_or_else(|error| panic!("{address}: {error:#}\n{}", agent.last_lines()));
    };
    // It asks at the start, and once more, since its own answer is one that names an endpoint; from then on only time has it ask.
    let before = far_side.asked_from(BRIDGE_ADDRESS);
    wait_until("the agent to ask when a record's life is over", ASKED_MAX, || {
        Ok((far_side.asked_from(BRIDGE_ADDRESS) >= before + 2).then_some(()))
    })
    .unwrap();
    assert!(!is_known(agent, THIRD).unwrap());
    far_side.record(THIRD);
    learns(THIRD);
    assert!(is_known(agent, FIRST).unwrap(), "pods may have it still");

    // It asks no name server that is not there: that would be recorded.
    agent.signal(Signal::SIGSTOP).unwrap();
    far_side.record_all(&[(NOBODY, ENDPOINT_NAME), (FIRST, OTHER_NAME)]);
    far_side.restart_name_server(RECORD_SECONDS);
    wait_for_record_of(pod, OTHER_NAME, FIRST);
    agent.signal(Signal::SIGCONT).unwrap();
    // From then on it has a record that lives for long.
    learns(NOBODY);
}

/// What a pod races for: each time an address of the endpoint that nobody on the node was told before.
struct Course<'a> {
    scene: &'a Scene,
    pod: &'a Pod<'a>,
    far_side: FarSide,
    watch: Watch,
    number: usize,
}

/// What of a race arrived at the far side directly.
struct Arrived {
    /// Requests for a connection.
    connects: usize,
    /// Bytes over connections.
    bytes: u64,
}

impl Arrived {
    #[track_caller]
    fn is_nothing(&self, when: &str) {
        assert_eq!((self.connects, self.bytes), (0, 0), "packets and bytes past the redirect, {when}");
    }
}

impl Course<'_> {
    /// Gives the endpoint a fresh address.
    fn fresh(&mut self) -> SocketAddr {
        self.number += 1;
        let address = format!("fd00:10:244::1:{:x}", self.number);
        self.far_side.take(&address);
        self.far_side.record(&address);
        SocketAddr::new(address.parse().unwrap(), 443)
    }

    /// Arguments of a program that connects in the moment in which it is told this address.
    fn race(way: &str, to: SocketAddr) -> [String; 4] {
        [way.to_owned(), ENDPOINT_NAME.to_owned(), FIRST.to_owned(), to.to_string()]
    }

    /// The same with a request over the connection, which `witness` has looked at.
    fn ask(&mut self, witness: &Witness<'_>) -> (String, Arrived) {
        let to = self.fresh();
        let mut command = self.scene.testbed.kubectl_command();
        command.args(["exec", "-i", "-n", &self.pod.namespace, &self.pod.name, "--", PROGRAM, "--relay"]);
        command.args(Self::race("race", to));
        (witness.ask(command), self.arrived(to))
    }

    /// Microseconds from the answer to the first connection that was redirected.
    fn until_redirected(&mut self) -> (u64, Arrived) {
        let to = self.fresh();
        let mut command = self.pod.exec_command();
        let said =
            weir_tests::command::run(command.arg(PROGRAM).args(Self::race("race-until-redirected", to)))
                .unwrap();
        let words: Vec<&str> = said.split_whitespace().collect();
        let ["redirected", microseconds, _] = words[..] else { panic!("{said}") };
        (microseconds.parse().unwrap(), self.arrived(to))
    }

    fn arrived(&self, to: SocketAddr) -> Arrived {
        let seen = self.watch.until_marker(V6.parse().unwrap(), UDP, |marker| {
            self.pod.exec(&[PROGRAM, "udp-sendto", marker]).unwrap();
        });
        let packet = format!("{POD6} {} 6 443", to.ip());
        let connects = seen.iter().filter(|seen| **seen == packet).count();
        let got = self.far_side.got_from(POD6.parse().unwrap());
        Arrived { connects, bytes: got.iter().map(|(_, bytes)| bytes).sum() }
    }
}

#[test]
fn nothing_of_a_pod_that_connects_as_soon_as_it_is_told_a_fresh_address_goes_past_weir() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-race", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-race", "caller")).unwrap();
    let program = watch::program();
    pod.install(&program, PROGRAM).unwrap();
    let far_side = FarSide::new(escape::endpoint(&scene), scene.scratch.path());
    far_side::give_v6_address(&pod, POD6);
    let watch = Watch::start(&program, far_side::INTERFACE, far_side::V6_NETWORK);
    let mut course = Course { scene: &scene, pod: &pod, far_side, watch, number: 0 };
    let witness = Witness::new(&scene, &pod);

    // Without an agent the race is won: the request arrives at the far side, which sees it.
    let (said, arrived) = course.ask(&witness);
    assert_eq!((said.as_str(), witness.check(Server::Relay, None)), ("connected", 1));
    assert!(arrived.connects > 0 && arrived.bytes > 0);
    let before = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap().len();

    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["nameServers"] = json!([FIRST]);
    configuration["clusters"][0]["addresses"] = json!([format!("{ENDPOINT_NAME}:443")]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    course.far_side.record(FIRST);
    wait_until("the name server to be asked", DEADLINE, || Ok(is_known(&agent, FIRST)?.then_some(())))
        .unwrap();

    let races = if std::env::var_os("WEIR_TEST_LONG").is_some() { RACES_LONG } else { RACES };
    let mut served = 0;
    for number in 1..=races {
        let (said, arrived) = course.ask(&witness);
        served += usize::from(said == "connected");
        arrived.is_nothing(&format!("race {number}: {said}"));
    }
    assert_eq!(served, races, "{}", agent.last_lines());
    assert_eq!(witness.check(Server::Weir, Some(&agent)), served, "{}", agent.last_lines());
    let mut times = Vec::new();
    for number in 1..=races {
        let (microseconds, arrived) = course.until_redirected();
        times.push(microseconds);
        arrived.is_nothing(&format!("race {number} without a pause"));
    }
    times.sort_unstable();
    // The kernel needs no agent for it.
    agent.signal(Signal::SIGSTOP).unwrap();
    for number in 1..=STALLED {
        course.until_redirected().1.is_nothing(&format!("race {number} while the agent is stopped"));
    }
    agent.signal(Signal::SIGCONT).unwrap();
    agent.crash().unwrap();
    for number in 1..=STALLED {
        let (said, arrived) = course.ask(&witness);
        arrived.is_nothing(&format!("race {number} while no agent runs"));
        assert_eq!(said, "refused", "race {number} while no agent runs");
    }
    println!(
        "{races} races for a request: {served} served by Weir. {races} races without a pause: redirected {} µs after the answer in the \
         median, {} µs at most. {STALLED} while the agent was stopped, {STALLED} while none ran. No packet past the redirect in any; load {}",
        times[races / 2],
        times[races - 1],
        std::fs::read_to_string("/proc/loadavg").unwrap().trim()
    );
    let audited = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &pod.uid).unwrap();
    let coverage = Coverage::compare(&audited[before..], &scene.events(), &pod.uid);
    assert!(coverage.unrecorded.is_empty() && audited.len() - before == served, "{coverage}");
}
