//! The container runtime asks the agent before it starts a container: containerd with a real kubelet.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{self, TrustSource},
    command,
    testbed::{API_CLUSTER_IP, BRIDGE, BRIDGE_ADDRESS, POD_RANGE},
    wait_until,
};

use super::{
    DEADLINE, Scene,
    enrolment::FirstCalls,
    monitoring::Monitored,
    own_pod::{OwnPod, Root},
    shown,
    watch::{self, UDP, Watch},
};

/// Pods that start one after the other, and with `WEIR_TEST_LONG`.
const PODS: usize = 10;
const PODS_LONG: usize = 30;
/// … and after an upgrade, which is only about the connection to the runtime.
const PODS_AFTER_UPGRADE: usize = 5;
/// A call. With a flag for its patience kubectl would not look for the cluster that it runs in.
const ASK: [&str; 5] = ["kubectl", "get", "namespace", "default", "-o=name"];

/// Takes connections to an API server on, and can hold those that there are: what comes over them is late for ever, as with a
/// watch whose connection has died without a word.
struct Relay {
    address: SocketAddr,
    held: Arc<Held>,
}

#[derive(Default)]
struct Held {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Connections so far.
    count: usize,
    /// Those before this one are held.
    held: usize,
    streams: Vec<TcpStream>,
    over: bool,
}

impl Held {
    fn wait_while_held(&self, number: usize) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(state, |state| number < state.held && !state.over));
    }
}

impl Relay {
    fn start(server: &str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (address, held): (_, Arc<Held>) = (listener.local_addr().unwrap(), Arc::default());
        let (server, shared) = (server.to_owned(), held.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) = (client.unwrap(), TcpStream::connect(&server).unwrap());
                let number = {
                    let mut state = shared.state.lock().unwrap();
                    if state.over {
                        return;
                    }
                    state.streams.extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                    state.count += 1;
                    state.count - 1
                };
                for (from, to) in
                    [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
                {
                    let shared = shared.clone();
                    thread::spawn(move || copy(from, to, || shared.wait_while_held(number)));
                }
            }
        });
        Self { address, held }
    }

    /// From now on nothing comes over the connections that there are.
    fn hold(&self) {
        let mut state = self.held.state.lock().unwrap();
        state.held = state.count;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let mut state = self.held.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.over = true;
        for stream in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(state);
        self.held.changed.notify_all();
        // Wakes the one that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, wait: impl Fn()) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        wait();
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// The pods' bridge, behind the guards at their interfaces, and one pod there of the test's own: what it sends comes after all that others
/// have sent.
struct FarSide {
    program: PathBuf,
    watch: Watch,
    pod: OwnPod,
    container: PathBuf,
    _root: Root,
}

impl FarSide {
    const UID: &'static str = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";
    /// Not among those that the CNI gives away.
    const ADDRESS: &'static str = "10.244.0.230";

    fn new() -> Self {
        let (program, root) = (watch::program(), Root::new("weir-asked"));
        let watch = Watch::start(&program, BRIDGE, POD_RANGE.split('/').next().unwrap());
        let pod = OwnPod::start(&root, Self::UID, 0, Self::ADDRESS);
        let container = pod.container('1');
        Self { program, watch, pod, container, _root: root }
    }

    fn say(&self, way: &str, to: &str) {
        command::run(self.pod.process(&self.program, &self.container).args([way, to])).unwrap();
    }

    /// The packets of connections since the last time: pods have none here but to the API server, by whichever of its addresses.
    fn seen(&self) -> Vec<String> {
        let mark = |to: &str| self.say("udp-sendto", to);
        let mut seen = self.watch.until_marker(BRIDGE_ADDRESS.parse().unwrap(), UDP, mark);
        seen.retain(|packet| packet.split(' ').nth(2) == Some("6"));
        seen
    }
}

/// The configuration of an agent that containerd asks.
fn asked(scene: &Scene) -> Value {
    let mut configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
    configuration["nri"] = json!({"socket": scene.testbed.layout().nri_socket()});
    configuration
}

/// What containers waited for.
struct Starts {
    settled: f64,
    timed_out: f64,
    looked_up: f64,
    waited_seconds: f64,
}

impl Starts {
    fn of(monitored: &Monitored) -> Self {
        let metrics = monitored.metrics();
        let starts =
            |result: &str| metrics[&format!("weir_nri_container_starts_total{{result=\"{result}\"}}")];
        Self {
            settled: starts("settled"),
            timed_out: starts("timed_out"),
            looked_up: metrics["weir_nri_pods_looked_up_total"],
            waited_seconds: metrics["weir_nri_wait_duration_seconds_sum"],
        }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            settled: self.settled - before.settled,
            timed_out: self.timed_out - before.timed_out,
            looked_up: self.looked_up - before.looked_up,
            waited_seconds: self.waited_seconds - before.waited_seconds,
        }
    }

    /// Every pod's container waited until its pod had everything.
    fn check(&self, what: &str, pods: usize, agent: &AgentProcess) -> String {
        let summary = format!(
            "{pods} pods {what}: {} containers held back until enrolled, {:.1} ms each in the mean; the API server asked for {} pods",
            self.settled,
            self.waited_seconds * 1e3 / self.settled,
            self.looked_up
        );
        let pods = pods.to_string().parse::<f64>().unwrap();
        assert!(
            self.settled >= pods && self.timed_out == 0.0,
            "{what}: {} and {}; {}",
            self.settled,
            self.timed_out,
            agent.last_lines()
        );
        summary
    }
}

/// Of the runtime, as the metrics and `status` say.
fn wait_until_asked(monitored: &Monitored, agent: &AgentProcess) {
    wait_until("the runtime to ask the agent", DEADLINE, || {
        // Between two agents nobody may listen.
        let metrics = monitored.get("/metrics").map(|(_, text)| text).unwrap_or_default();
        let asked = metrics.lines().any(|line| line == "weir_nri_connected 1");
        Ok((asked && agent.status()?["agent"]["containersWait"] == true).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_first_call_is_intercepted_although_the_watch_stands_still() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-asked", true);
    let relay = Relay::start(scene.testbed.api_server());
    let kubeconfig = std::fs::read_to_string(scene.testbed.layout().kubeconfig("agent")).unwrap();
    let through = kubeconfig.replace(scene.testbed.api_server(), &relay.address.to_string());
    assert_ne!(through, kubeconfig);
    let path = scene.scratch.path().join("through-relay.kubeconfig");
    std::fs::write(&path, through).unwrap();
    let mut configuration = asked(&scene);
    configuration["clusters"][0]["kubeconfig"] = json!(path);
    let far_side = FarSide::new();
    // Without an agent it sees them.
    far_side.say("frame", &format!("{API_CLUSTER_IP}:443"));
    let seen = far_side.seen();
    // One that has its address translated on the way may be seen twice.
    assert!(seen.iter().any(|packet| packet.starts_with(FarSide::ADDRESS)), "{seen:?}");
    let (mut agent, monitored) = Monitored::start_with(&scene, configuration);
    wait_until_asked(&monitored, &agent);

    let count = if std::env::var_os("WEIR_TEST_LONG").is_some() { PODS_LONG } else { PODS };
    let before = Starts::of(&monitored);
    let calls = FirstCalls { scene: &scene, namespace: "it-asked", frames_by: Some(&far_side.program) };
    calls.check(&agent, "first", count);
    let with_watch = Starts::of(&monitored);
    println!("{}", with_watch.since(&before).check("with a watch", count, &agent));

    relay.hold();
    calls.check(&agent, "held", count);
    let without = Starts::of(&monitored).since(&with_watch);
    println!("{}", without.check("with a watch that stands still", count, &agent));
    let pods = count.to_string().parse::<f64>().unwrap();
    assert!(without.looked_up >= pods, "the watch did not stand still: {} looked up", without.looked_up);

    assert_eq!(far_side.seen(), [""; 0], "frames of first instructions");

    // A successor is asked in its turn; it watches anew.
    let mut next = AgentProcess::start(agent.config(), &scene.scratch.path().join("next.log")).unwrap();
    assert!(agent.wait_for_succession().unwrap().success(), "{}", agent.last_lines());
    wait_until_asked(&monitored, &next);
    let calls = FirstCalls { frames_by: None, ..calls };
    calls.check(&next, "next", PODS_AFTER_UPGRADE);
    println!("{}", Starts::of(&monitored).check("after an upgrade", PODS_AFTER_UPGRADE, &next));

    // A runtime that has crashed asks again as soon as it is back; meanwhile it is said that nobody asks.
    let outage = scene.testbed.stop_containerd().unwrap();
    wait_until("the agent to say that nobody asks it", DEADLINE, || {
        Ok((next.status()?["agent"]["containersWait"] == false).then_some(()))
    })
    .unwrap();
    outage.end().unwrap();
    wait_until_asked(&monitored, &next);
    let before = Starts::of(&monitored);
    calls.check(&next, "restarted", 1);
    println!("{}", Starts::of(&monitored).since(&before).check("after a crash of the runtime", 1, &next));
    assert!(next.terminate().unwrap().success(), "{}", next.last_lines());
}

#[test]
fn pods_start_and_are_denied_while_the_agent_is_stopped_or_killed() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-unasked", true);
    let (mut agent, monitored) = Monitored::start_with(&scene, asked(&scene));
    wait_until_asked(&monitored, &agent);
    let refused = |name: &str| {
        let pod = scene.testbed.run_pod(&PodSpec::idle("it-unasked", name)).unwrap();
        let (code, out, err) = shown(&pod.exec(&ASK).unwrap());
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(err.contains(API_CLUSTER_IP) && err.contains("refused"), "{err}");
        pod
    };
    let served = |pod: &weir_tests::Pod<'_>, last_lines: &dyn Fn() -> String| {
        let mut said = Default::default();
        wait_until("the pod to be served", DEADLINE, || {
            said = shown(&pod.exec(&ASK)?);
            Ok((said.1 == "namespace/default\n").then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {said:?}\n{}", last_lines()));
    };
    // containerd waits for it no longer than it waits for any plugin, and then not again.
    agent.signal(Signal::SIGSTOP).unwrap();
    let stopped = refused("stopped");
    agent.signal(Signal::SIGCONT).unwrap();
    served(&stopped, &|| agent.last_lines());
    // It is thrown out and comes back.
    wait_until("the runtime to ask the agent again", DEADLINE, || {
        let registered = agent.log()?.matches("asks before it starts a container").count();
        Ok((registered > 1).then_some(()))
    })
    .unwrap();
    wait_until_asked(&monitored, &agent);
    let before = Starts::of(&monitored);
    let calls = FirstCalls { scene: &scene, namespace: "it-unasked", frames_by: None };
    calls.check(&agent, "again", 1);
    println!("{}", Starts::of(&monitored).since(&before).check("after the agent was stopped", 1, &agent));

    agent.crash().unwrap();
    let waiting = Waiting::new(&scene, "it-unasked");
    let killed = refused("killed");
    waiting.wait_until_refused();
    let next = AgentProcess::start(agent.config(), &scene.scratch.path().join("next.log")).unwrap();
    served(&killed, &|| next.last_lines());
    served(&stopped, &|| next.last_lines());
    waiting.wait_until_served(&next);
}

/// A pod that says that no container of it starts without the agent, and whose first instruction is a call.
struct Waiting<'a> {
    scene: &'a Scene,
    namespace: &'a str,
}

impl<'a> Waiting<'a> {
    const NAME: &'static str = "waiting";

    fn new(scene: &'a Scene, namespace: &'a str) -> Self {
        let script = "exec kubectl get namespace default -o name";
        let mut manifest = PodSpec { script, ..PodSpec::idle(namespace, Self::NAME) }.manifest();
        manifest["metadata"]["annotations"] = json!({"required-plugins.noderesource.dev": "[weir]"});
        scene.testbed.apply(&manifest.to_string()).unwrap();
        Self { scene, namespace }
    }

    fn get(&self, words: &[&str]) -> anyhow::Result<String> {
        self.scene.testbed.kubectl(&[&["get", "-n", self.namespace][..], words].concat())
    }

    /// The runtime makes no container, and so nothing of the pod runs.
    fn wait_until_refused(&self) {
        let of_it = format!("involvedObject.name={}", Self::NAME);
        wait_until("the runtime to make no container", DEADLINE, || {
            let events = self.get(&["events", "--field-selector", &of_it, "-o", "yaml"])?;
            Ok(events.contains("not present").then_some(()))
        })
        .unwrap();
        let started = self.get(&["pod", Self::NAME, "-o", "jsonpath={.status.containerStatuses[*].started}"]);
        assert_eq!(started.unwrap(), "false");
    }

    /// It comes by itself, and its first call is answered.
    fn wait_until_served(&self, agent: &AgentProcess) {
        wait_until("the pod that waited to be served", DEADLINE, || {
            let phase = self.get(&["pod", Self::NAME, "-o", "jsonpath={.status.phase}"])?;
            assert_ne!(phase, "Failed", "{}", agent.last_lines());
            Ok((phase == "Succeeded").then_some(()))
        })
        .unwrap();
    }
}
