//! Many pods whose first instruction is an API call, and the agent as it is. The pods are objects of the API server, on a
//! node that no kubelet serves; the rest of them is made here ([`super::own_pod`]), several at once. Whether a byte goes past
//! the agent is seen on the bridge behind their interfaces, where without an agent it is seen. Once their first instruction comes
//! as early as it can, and once as a container runtime lets it come: after it has asked the agent. Beside that connection each sends frames
//! to the API server from its first instruction on, which only the guard at its interface meets.

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, Coverage,
    agent::{self, TrustSource},
    audit,
    nri::{Asked, NriRuntime},
    testbed::{API_CLUSTER_IP, BRIDGE, BRIDGE_ADDRESS, POD_RANGE},
    wait_until,
};

use super::{
    DEADLINE, Scene,
    client::RawClient,
    own_pod::{OwnPod, Root},
    watch::{UDP, Watch, program, to_any},
    witness::{api_server_certificate, certificates_of, digest},
};

/// Pods, and how many come at once; with `WEIR_TEST_LONG` more.
const PODS: usize = 30;
const PODS_LONG: usize = 1000;
const AT_ONCE: usize = 10;
const NODE: &str = "weir-scale";
const NAMESPACE: &str = "it-scale";
/// The last part of the first one's address, behind those that the CNI gives away.
const FIRST_ADDRESS: usize = 200;
/// Behind those, the addresses that frames say they are from: by them the far side tells them from the pods' other packets.
const FRAMES_FROM: usize = FIRST_ADDRESS + AT_ONCE + 1;
/// The same of those that are sent once the first connection is served.
const LAST_FRAMES_FROM: usize = FRAMES_FROM + AT_ONCE + 1;
/// How many those are.
const LAST_FRAMES: u64 = 5;
/// The one that comes without an agent. Its address is nobody else's: the end of its connection is on its way when it is gone.
const WITHOUT_AGENT: usize = 0;

/// What all of them share.
struct Stage<'a> {
    scene: &'a Scene,
    root: &'a Root,
    program: PathBuf,
    token: String,
    watch: Watch,
    /// The container runtime that asks before a pod's process starts; none: nobody does.
    runtime: Option<NriRuntime>,
}

/// What became of one pod's first connection.
struct Served {
    pod: OwnPod,
    /// How often it was refused before.
    refused: usize,
    /// From the sandbox to the answer.
    milliseconds: u128,
    /// How long the container runtime waited for an answer about its container.
    held_back: Duration,
    certificate: String,
    frames_sent: u64,
    /// Whether the far side saw any of them, and of the last.
    frames_seen: [bool; 2],
}

/// Pods that came at once; they end at once as well, and their objects after them.
struct Wave<'a> {
    served: Vec<Served>,
    /// Packets to the API server that the far side saw.
    direct: Vec<String>,
    _objects: Objects<'a>,
}

impl Drop for Wave<'_> {
    fn drop(&mut self) {
        thread::scope(|scope| {
            for served in self.served.drain(..) {
                scope.spawn(move || drop(served));
            }
        });
    }
}

/// The node's object. Without one the controller-manager deletes all pods of that name at once, from 40 s after it has seen the
/// first (k8s.io/kubernetes `pkg/controller/podgc`, `quarantineTime`), and to an agent a pod without an object is nobody's.
struct NodeObject<'a>(&'a Scene);

impl<'a> NodeObject<'a> {
    fn make(scene: &'a Scene) -> Self {
        let node = Self(scene);
        // Nobody else's pods: it has no kubelet.
        let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "spec": {"unschedulable": true}});
        scene.testbed.apply(&object.to_string()).unwrap();
        node
    }
}

impl Drop for NodeObject<'_> {
    fn drop(&mut self) {
        let _ = self.0.testbed.kubectl(&["delete", "node", NODE, "--ignore-not-found", "--wait=false"]);
    }
}

/// Objects of the API server; gone with this value, since no kubelet says that their pods have ended.
struct Objects<'a> {
    scene: &'a Scene,
    uids: Vec<String>,
}

impl<'a> Objects<'a> {
    fn make(scene: &'a Scene, numbers: Range<usize>) -> Self {
        let mut objects = Self { scene, uids: Vec::new() };
        let pod = |number: usize| {
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"namespace": NAMESPACE, "name": object_name(number)},
                "spec": {
                    "nodeName": NODE,
                    "containers": [{"name": "main", "image": "none.invalid/none"}],
                    "tolerations": [{"operator": "Exists"}],
                },
            })
        };
        let pods: Vec<Value> = numbers.map(pod).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": pods}).to_string();
        let file = scene.scratch.path().join("pods.json");
        fs::write(&file, list).unwrap();
        let made = scene.testbed.kubectl(&["create", "-f", file.to_str().unwrap(), "-o", "json"]).unwrap();
        // One document after the other.
        let made = serde_json::Deserializer::from_str(&made).into_iter::<Value>();
        let uid = |pod: Value| pod["metadata"]["uid"].as_str().unwrap().to_owned();
        objects.uids = made.map(|pod| uid(pod.unwrap())).collect();
        objects
    }
}

impl Drop for Objects<'_> {
    fn drop(&mut self) {
        let delete =
            ["delete", "pods", "--all", "-n", NAMESPACE, "--force", "--grace-period=0", "--wait=false"];
        let _ = self.scene.testbed.kubectl(&delete);
    }
}

/// Of pods that come at once each has its own.
fn address(number: usize) -> String {
    address_behind(FIRST_ADDRESS, number)
}

/// The same that its frames are from, and the last of them.
fn frames_from(number: usize) -> [String; 2] {
    [FRAMES_FROM, LAST_FRAMES_FROM].map(|first| address_behind(first, number))
}

fn address_behind(first: usize, number: usize) -> String {
    let network = BRIDGE_ADDRESS.rsplit_once('.').unwrap().0;
    let place = if number == WITHOUT_AGENT { AT_ONCE } else { number % AT_ONCE };
    format!("{network}.{}", first + place)
}

/// Whether a packet that the far side saw is from this address.
fn is_from(packet: &str, address: &str) -> bool {
    packet.strip_prefix(address).is_some_and(|rest| rest.starts_with(' '))
}

fn object_name(number: usize) -> String {
    format!("first-{number}")
}

fn path(uid: &str) -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/configmaps/first-{uid}")
}

impl<'a> Stage<'a> {
    fn new(scene: &'a Scene, root: &'a Root, runtime: Option<NriRuntime>) -> Self {
        let token = scene.testbed.kubectl(&["create", "token", "default", "-n", NAMESPACE]).unwrap();
        let program = program();
        let network = POD_RANGE.split('/').next().unwrap();
        let watch = Watch::start(&program, BRIDGE, network);
        Self { scene, root, program, token: token.trim().to_owned(), watch, runtime }
    }

    fn come(&self, numbers: Range<usize>) -> Wave<'a> {
        let objects = Objects::make(self.scene, numbers.clone());
        assert_eq!(objects.uids.len(), numbers.len());
        let mut served = thread::scope(|scope| {
            let comes = |(number, uid): (usize, &'_ String)| {
                let uid = uid.clone();
                scope.spawn(move || self.first_connection(&uid, number))
            };
            let coming: Vec<_> = numbers.clone().zip(&objects.uids).map(comes).collect();
            coming.into_iter().map(|pod| pod.join().unwrap()).collect::<Vec<_>>()
        });
        // What one sends now comes after all that they have sent before.
        let last = &served.last().unwrap().pod;
        let container = last.container('2');
        let mut seen = self.watch.until_marker(BRIDGE_ADDRESS.parse().unwrap(), UDP, |to| {
            let mut send = last.process(&self.program, &container);
            weir_tests::command::run(send.args(["udp-sendto", to])).unwrap();
        });
        // Of frames alone their source says what they are: whoever translates addresses may take those of one run for another's.
        for (number, served) in numbers.zip(&mut served) {
            served.frames_seen = frames_from(number).map(|from| {
                let all = seen.len();
                seen.retain(|packet| !is_from(packet, &from));
                seen.len() < all
            });
        }
        let service = format!("{API_CLUSTER_IP}:443");
        let direct = to_any(seen, &[&service, self.scene.testbed.api_server()]);
        Wave { served, direct, _objects: objects }
    }

    /// A pod, its first connection and a request over it.
    fn first_connection(&self, uid: &str, number: usize) -> Served {
        let pod = OwnPod::start(self.root, uid, number, &address(number));
        let there = Instant::now();
        let name = object_name(number);
        let ask = |asked| match &self.runtime {
            Some(runtime) => runtime.ask(asked, &pod.named(NAMESPACE, &name)).unwrap(),
            None => Duration::ZERO,
        };
        ask(Asked::SandboxRuns);
        let container = pod.container('1');
        let held_back = ask(Asked::ContainerStarts);
        let service = format!("{API_CLUSTER_IP}:443");
        let mut frames = pod.process(&self.program, &container);
        let [from, last_from] = frames_from(number);
        frames.args(["--from", &from, "frames", &service, &last_from]);
        let frames = frames.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut refused = 0;
        let mut client = wait_until("the first connection", DEADLINE, || {
            let mut process = pod.process(&self.program, &container);
            process.args(["--relay", "tcp", &service]);
            match RawClient::by(&self.scene.testbed, process) {
                Ok(client) => Ok(Some(client)),
                Err(said) if said == "refused" => {
                    refused += 1;
                    Ok(None)
                }
                Err(said) => anyhow::bail!("{said}"),
            }
        })
        .unwrap_or_else(|error| panic!("{uid}: {error:#}"));
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: kubernetes\r\nAuthorization: Bearer {}\r\nConnection: close\r\n\r\n",
            path(uid),
            self.token
        );
        client.send(request.as_bytes()).unwrap();
        assert_eq!(client.answer().expect("an answer").status, 404);
        let milliseconds = there.elapsed().as_millis();
        let certificate = digest(client.certificate());
        // Its input ends with this.
        let said = String::from_utf8(frames.wait_with_output().unwrap().stdout).unwrap();
        // Where programs decide in the kernel's security hooks, there is no socket for frames.
        let frames_sent = if said.trim() == "failed EPERM" { 0 } else { said.trim().parse().unwrap() };
        Served { pod, refused, milliseconds, held_back, certificate, frames_sent, frames_seen: [false; 2] }
    }
}

/// What the kernel counted of a pod: one connection that it redirected, and nothing but refusals beside it. Returns how many of its frames
/// were not dropped as its own.
fn check_counters(status: &Value, served: &Served) -> u64 {
    let uid = served.pod.uid.as_str();
    let pod = status["pods"].as_array().unwrap().iter().find(|pod| pod["uid"] == uid);
    let pod = pod.unwrap_or_else(|| panic!("{uid} has no counters"));
    let count = |counter: &str| pod["counters"][counter].as_u64().unwrap();
    assert_eq!((pod["class"].as_str().unwrap(), count("redirected")), ("Enrolled", 1), "{pod}");
    let others = ["passed", "wouldRedirect", "guardDropped", "flowsLost"];
    assert_eq!(others.map(count), [0; 4], "{pod}");
    let denied = count("deniedNoListener") + count("deniedUnknown");
    assert_eq!(count("seen"), 1 + denied, "{pod}");
    // Refusals before it was known are counted, but not as its own.
    assert!(denied <= served.refused as u64, "{pod}: refused {} times", served.refused);
    if served.frames_sent > 0 {
        assert!(count("interfaceDropped") >= LAST_FRAMES, "{pod}");
        assert!(!served.frames_seen[1], "{pod}: the far side saw frames that came late");
    }
    served.frames_sent.checked_sub(count("interfaceDropped")).unwrap_or_else(|| panic!("{pod}"))
}

/// The pod of each request's session, by the request's path.
fn pods_of_requests(events: &[Event]) -> BTreeMap<&str, &str> {
    let started = events.iter().filter_map(|event| match &event.kind {
        Kind::SessionStarted { caller } => Some((event.session.as_str(), caller.pod.as_ref()?.uid.as_str())),
        _ => None,
    });
    let sessions: BTreeMap<&str, &str> = started.collect();
    let requests = events.iter().filter_map(|event| match &event.kind {
        Kind::RequestOpened(opened) => {
            Some((opened.uri.as_str(), *sessions.get(event.session.as_str()).unwrap_or(&"")))
        }
        _ => None,
    });
    requests.collect()
}

/// Addresses of the clients of finished requests, by path, once each of these paths has one.
fn audited(log: &Path, uids: &[String]) -> BTreeMap<String, Vec<Vec<String>>> {
    wait_until("the audit log's entries", DEADLINE, || {
        let mut found: BTreeMap<String, Vec<Vec<String>>> = BTreeMap::new();
        for entry in audit::read(log)?.into_iter().filter(|entry| entry.stage == "ResponseComplete") {
            found.entry(entry.request_uri).or_default().push(entry.source_ips);
        }
        Ok(uids.iter().all(|uid| found.contains_key(&path(uid))).then_some(found))
    })
    .unwrap()
}

/// What became of all of them.
#[derive(Default)]
struct Counted {
    uids: Vec<String>,
    refused: Vec<usize>,
    milliseconds: Vec<u128>,
    held_back: Vec<Duration>,
    frames_sent: u64,
    frames_passed: Vec<u64>,
    frames_seen: usize,
    /// All of it in words.
    summary: String,
}

impl Counted {
    fn add(&mut self, served: &Served, frames_passed: u64) {
        self.refused.push(served.refused);
        self.milliseconds.push(served.milliseconds);
        self.held_back.push(served.held_back);
        self.frames_sent += served.frames_sent;
        self.frames_passed.push(frames_passed);
        self.frames_seen += usize::from(served.frames_seen[0]);
        self.uids.push(served.pod.uid.clone());
    }

    /// How many were refused before they were served.
    fn refused_at_first(&self) -> usize {
        self.refused.iter().filter(|times| **times > 0).count()
    }

    fn summary(&mut self, started: Instant) -> String {
        self.milliseconds.sort_unstable();
        self.held_back.sort_unstable();
        self.frames_passed.sort_unstable();
        let count = self.uids.len();
        format!(
            "{count} pods whose first instruction is an API call, {AT_ONCE} at once: {} refused at first ({} times, at most {} \
             one of them), 0 packets past the agent; from the sandbox to the answer {} ms in the median, {} ms at most; \
             held back {:.1} ms in the median, {:.1} ms in 99 of 100, {:.1} ms at most; {} frames, one each millisecond: \
             those of {} pods were seen, at most {} of one not dropped, {} in the median; {} s in all",
            self.refused_at_first(),
            self.refused.iter().sum::<usize>(),
            self.refused.iter().max().unwrap(),
            self.milliseconds[count / 2],
            self.milliseconds[count - 1],
            self.held_back[count / 2].as_secs_f64() * 1e3,
            self.held_back[count * 99 / 100].as_secs_f64() * 1e3,
            self.held_back[count - 1].as_secs_f64() * 1e3,
            self.frames_sent,
            self.frames_seen,
            self.frames_passed[count - 1],
            self.frames_passed[count / 2],
            started.elapsed().as_secs()
        )
    }
}

#[test]
fn no_first_connection_of_many_pods_goes_past_the_agent() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace(NAMESPACE, true);
    println!("{}", many_pods(&scene, None).summary);
}

#[test]
fn no_first_connection_of_many_pods_is_refused_where_the_runtime_asks_before_it_starts_them() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace(NAMESPACE, true);
    let runtime = NriRuntime::start(&scene.testbed, scene.scratch.path()).unwrap();
    let counted = many_pods(&scene, Some(runtime));
    println!("{}", counted.summary);
    assert_eq!(counted.refused_at_first(), 0, "{:?}", counted.refused);
    // The guard at the interface is there before the pod's first instruction is.
    assert_eq!(counted.frames_seen, 0, "pods whose frames went past the agent");
}

/// Pods without an agent, and then many with one.
fn many_pods(scene: &Scene, runtime: Option<NriRuntime>) -> Counted {
    let (root, node) = (Root::new("weir-scale"), NodeObject::make(scene));
    let stage = Stage::new(scene, &root, runtime);
    let log = scene.testbed.layout().audit_log();

    // Without an agent they reach the API server itself, and the far side sees them.
    let wave = stage.come(WITHOUT_AGENT..WITHOUT_AGENT + 1);
    let [served] = &wave.served[..] else { panic!("one pod came") };
    assert!(served.refused == 0 && !wave.direct.is_empty(), "was not seen");
    assert_eq!(served.frames_seen, [true; 2], "frames");
    assert_eq!(served.certificate, api_server_certificate(&scene.testbed));
    let uid = &served.pod.uid;
    assert_eq!(audited(&log, std::slice::from_ref(uid))[&path(uid)], [[served.pod.address.as_str()]]);
    drop(wave);

    let mut agent = start_agent(scene, stage.runtime.as_ref());
    let count = if std::env::var_os("WEIR_TEST_LONG").is_some() { PODS_LONG } else { PODS };
    let mut counted = Counted::default();
    let started = Instant::now();
    for first in (1..=count).step_by(AT_ONCE) {
        let mut wave = stage.come(first..(first + AT_ONCE).min(count + 1));
        wave.direct.retain(|packet| !is_from(packet, &address(WITHOUT_AGENT)));
        assert!(wave.direct.is_empty(), "the far side saw {:?}\n{}", wave.direct, agent.last_lines());
        let (status, certificates) = (agent.status().unwrap(), certificates_of(&agent));
        for served in &wave.served {
            let frames_passed = check_counters(&status, served);
            assert!(certificates.contains(&served.certificate), "{}: not Weir's certificate", served.pod.uid);
            counted.add(served, frames_passed);
        }
    }
    counted.summary = counted.summary(started);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    check_records(scene, &counted.uids);
    assert_eq!(counted.uids.len(), count);
    drop((stage, node));
    assert_eq!(root.leftovers(), [""; 0].map(PathBuf::from), "left behind");
    counted
}

/// The agent of the node without a kubelet.
fn start_agent(scene: &Scene, runtime: Option<&NriRuntime>) -> AgentProcess {
    let mut configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
    configuration["node"] = json!(NODE);
    configuration["nri"] = match runtime {
        Some(runtime) => json!({"socket": runtime.socket()}),
        None => json!({"enabled": false}),
    };
    let file = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &file).unwrap();
    AgentProcess::start(&file, &scene.scratch.path().join("agent.log")).unwrap()
}

/// Each request is in the record as its pod's, and the API server had it once, from Weir.
fn check_records(scene: &Scene, uids: &[String]) {
    let events = scene.events();
    let recorded = pods_of_requests(&events);
    let audited = audited(&scene.testbed.layout().audit_log(), uids);
    for uid in uids {
        let path = path(uid);
        assert_eq!(recorded.get(path.as_str()), Some(&uid.as_str()), "{path}");
        let [sources] = &audited[&path][..] else { panic!("{path}: {:?}", audited[&path]) };
        let network = BRIDGE_ADDRESS.rsplit_once('.').unwrap().0;
        let from_a_pod = |source: &String| *source != BRIDGE_ADDRESS && source.starts_with(network);
        assert!(!sources.iter().any(from_a_pod), "{path}: {sources:?}");
        let coverage = Coverage::compare(&[], &events, uid);
        assert_eq!(coverage.unaudited.len(), 1, "{uid}: one request is recorded");
    }
}
