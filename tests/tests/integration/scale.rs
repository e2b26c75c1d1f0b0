//! Many pods whose first instruction is an API call, and the agent as it is. The pods are objects of the API server, on a
//! node that no kubelet serves; cgroups, network namespaces and processes are made here, in the order in which a kubelet and
//! a runtime make them, only quicker. In each namespace somebody else has the API server's address and waits for whom comes
//! past the agent.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, Coverage,
    agent::{self, TrustSource},
    audit, command,
    testbed::API_CLUSTER_IP,
    wait_until,
};

use super::{
    DEADLINE, Scene,
    client::RawClient,
    watch::program,
    witness::{certificates_of, digest},
};

/// Pods, and how many come at a time; with `WEIR_TEST_LONG` more.
const PODS: usize = 30;
const PODS_LONG: usize = 1000;
const AT_A_TIME: usize = 10;
const NODE: &str = "weir-scale";
const NAMESPACE: &str = "it-scale";

/// What a kubelet and a runtime make of a pod.
struct OwnPod {
    uid: String,
    folder: PathBuf,
    sandbox: Child,
    /// Has the API server's address.
    elsewhere: TcpListener,
}

impl OwnPod {
    fn start(root: &Path, uid: &str) -> Self {
        let folder = root.join(format!("kubepods-besteffort-pod{}.slice", uid.replace('-', "_")));
        fs::create_dir(&folder).unwrap();
        let script =
            format!("ip link set lo up && ip address add {API_CLUSTER_IP}/32 dev lo && echo up && exec cat");
        let mut sandbox = Command::new("unshare")
            .args(["--net", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        sandbox.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
        let netns = File::open(format!("/proc/{}/ns/net", sandbox.id())).unwrap();
        let bind = move || {
            setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
            TcpListener::bind((API_CLUSTER_IP, 443)).unwrap()
        };
        let elsewhere = std::thread::spawn(bind).join().unwrap();
        elsewhere.set_nonblocking(true).unwrap();
        let pod = Self { uid: uid.to_owned(), folder, sandbox, elsewhere };
        // The network is there before the sandbox's process is.
        fs::write(pod.container('0').join("cgroup.procs"), pod.sandbox.id().to_string()).unwrap();
        pod
    }

    /// A container's cgroup, which is made.
    fn container(&self, digit: char) -> PathBuf {
        let id: String = std::iter::repeat_n(digit, 64).collect();
        let folder = self.folder.join(format!("cri-containerd-{id}.scope"));
        fs::create_dir(&folder).unwrap();
        folder
    }

    /// A process in a container whose first instruction connects to the API server.
    fn first_instruction(&self, program: &Path, container: &Path) -> Command {
        let mut command = Command::new(program);
        command.args(["--netns", &self.sandbox.id().to_string(), "--cgroup", container.to_str().unwrap()]);
        command.args(["--relay", "tcp", &format!("{API_CLUSTER_IP}:443")]);
        command
    }

    fn path(&self) -> String {
        format!("/api/v1/namespaces/{NAMESPACE}/configmaps/first-{}", self.uid)
    }
}

impl Drop for OwnPod {
    fn drop(&mut self) {
        let _ = self.sandbox.kill();
        let _ = self.sandbox.wait();
        // A cgroup goes once the kernel has let its processes go.
        let _ = wait_until("the pod's cgroup to be empty", DEADLINE, || {
            for folder in fs::read_dir(&self.folder)?.flatten() {
                if folder.path().is_dir() && fs::remove_dir(folder.path()).is_err() {
                    return Ok(None);
                }
            }
            Ok(fs::remove_dir(&self.folder).ok())
        });
    }
}

/// The root of this test's pods.
struct Root(PathBuf);

impl Root {
    fn new() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let v2 = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap();
        let path = Path::new(v2.split(' ').nth(4).unwrap()).join("weir-scale-kubepods.slice");
        let _ = fs::remove_dir(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Makes pods of the node that is none; gives their UIDs.
fn make_pods(scene: &Scene, numbers: std::ops::Range<usize>) -> Vec<String> {
    let pod = |number: usize| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": NAMESPACE, "name": format!("first-{number}")},
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
    made.map(|pod| pod.unwrap()["metadata"]["uid"].as_str().unwrap().to_owned()).collect()
}

/// The first connection of a pod, with a request over it; gives how often it was refused before.
fn connects(scene: &Scene, pod: &OwnPod, program: &Path, token: &str, agent: &AgentProcess) -> usize {
    let container = pod.container('1');
    let mut refused = 0;
    let mut client = wait_until("the first connection", DEADLINE, || {
        match RawClient::by(&scene.testbed, pod.first_instruction(program, &container)) {
            Ok(client) => Ok(Some(client)),
            Err(said) if said == "refused" => {
                refused += 1;
                Ok(None)
            }
            Err(said) => anyhow::bail!("{said}"),
        }
    })
    .unwrap_or_else(|error| panic!("{}: {error:#}\n{}", pod.uid, agent.last_lines()));
    let shown = digest(client.certificate());
    assert!(certificates_of(agent).contains(&shown), "{}: not Weir's certificate", pod.uid);
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: kubernetes\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n",
        pod.path()
    );
    client.send(request.as_bytes()).unwrap();
    assert_eq!(client.answer().expect("an answer").status, 404);
    let past = pod.elsewhere.accept().map(|(_, from)| from);
    assert_eq!(past.unwrap_err().kind(), ErrorKind::WouldBlock, "{}: came past the agent", pod.uid);
    refused
}

/// The pod of each request's session, by the request's path.
fn pods_of_requests(events: &[Event]) -> std::collections::BTreeMap<String, String> {
    let uid = |session: &str| {
        events.iter().find_map(|event| match &event.kind {
            Kind::SessionStarted { caller } if event.session == session => {
                caller.pod.as_ref().map(|pod| pod.uid.clone())
            }
            _ => None,
        })
    };
    let requests = events.iter().filter_map(|event| match &event.kind {
        Kind::RequestOpened(opened) => {
            Some((opened.attributes.name.clone(), uid(&event.session).unwrap_or_default()))
        }
        _ => None,
    });
    requests.collect()
}

#[test]
fn no_first_connection_of_many_pods_goes_past_the_agent() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace(NAMESPACE, true);
    let token = scene.testbed.kubectl(&["create", "token", "default", "-n", NAMESPACE]).unwrap();
    let (token, program, root) = (token.trim().to_owned(), program(), Root::new());
    let mut configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
    configuration["node"] = json!(NODE);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    let count = if std::env::var_os("WEIR_TEST_LONG").is_some() { PODS_LONG } else { PODS };
    let (mut refused, mut refused_pods, mut milliseconds) = (0, 0, 0);
    let mut all = Vec::with_capacity(count);
    for first in (0..count).step_by(AT_A_TIME) {
        let numbers = first..count.min(first + AT_A_TIME);
        let mut alive = Vec::new();
        for uid in make_pods(&scene, numbers) {
            let pod = OwnPod::start(&root.0, &uid);
            let there = Instant::now();
            let before = connects(&scene, &pod, &program, &token, &agent);
            milliseconds += there.elapsed().as_millis();
            (refused, refused_pods) = (refused + before, refused_pods + usize::from(before > 0));
            all.push((format!("first-{uid}"), uid, pod.path()));
            alive.push(pod);
        }
        drop(alive);
        let delete =
            ["delete", "pods", "--all", "-n", NAMESPACE, "--force", "--grace-period=0", "--wait=false"];
        scene.testbed.kubectl(&delete).unwrap();
    }
    println!(
        "{count} pods whose first instruction is an API call: {refused_pods} refused at first ({refused} times), 0 past the agent; {} ms from the sandbox to the answer in the mean",
        milliseconds / count as u128
    );
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    drop(root);
    // Each request is in the record as its pod's, and the API server had it once, from Weir.
    let events = scene.events();
    let recorded = pods_of_requests(&events);
    let audited = audit::read(&scene.testbed.layout().audit_log()).unwrap();
    for (name, uid, path) in &all {
        assert_eq!(recorded.get(name), Some(uid), "{name}");
        let finished =
            |entry: &&audit::AuditEntry| entry.request_uri == *path && entry.stage == "ResponseComplete";
        assert_eq!(audited.iter().filter(finished).count(), 1, "{name}");
        let coverage = Coverage::compare(&[], &events, uid);
        assert_eq!(coverage.unaudited.len(), 1, "{name}: one request is recorded");
    }
    let left = command::run(Command::new("find").args([
        "/sys/fs/cgroup",
        "-maxdepth",
        "2",
        "-name",
        "weir-scale-*",
    ]));
    assert_eq!(left.unwrap(), "", "cgroups are left behind");
}
