//! A node's reboot, and the orders in which its parts can come back. The kubelet comes after containerd in all of them: without it, it ends
//! at once.
//!
//! A process of an enrolled pod dials the API server all the time, and the far side's watch says what of that got past the node:
//! something while nothing is in force, so that it is no blind one, and nothing from the guard on.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use weir_tests::{Pod, command, wait_until};

use super::{
    super::{
        DEADLINE, Scene,
        escape::{BRIDGE_ADDRESS, endpoint, place},
        guard::{asks, direct_requests, is_refused},
        watch::{PROGRAM, UDP, Watch, program, to_any},
    },
    release::{NAMESPACE, READY_DEADLINE, Release},
};

/// A pod that the kubelet starts anew, and an agent in it.
const AGAIN_DEADLINE: Duration = Duration::from_secs(300);
const PINS: &str = "/sys/fs/bpf/weir";
const SERVICE: &str = "10.96.0.1:443";
const BRIDGE: &str = "weirtb0";
const POD_NETWORK: &str = "10.244.0.0";

/// When the guard is put in force.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Guard {
    /// By `weir-guard.service`, before both.
    First,
    /// By it, after containerd and before the kubelet.
    Between,
    /// On a node without that unit: by the init step of the agent's own pod, which the kubelet starts.
    Last,
}

const ORDERS: [Guard; 3] = [Guard::First, Guard::Between, Guard::Last];

/// What dials the API server again and again, from the pod's network and cgroup.
struct Dialling<'a> {
    pod: &'a Pod<'a>,
    watch: Watch,
    program: PathBuf,
    /// A process of the pod, and the pod's address: others on the bridge need no agent.
    pid: String,
    address: String,
    endpoint: String,
}

impl<'a> Dialling<'a> {
    fn begin(scene: &Scene, pod: &'a Pod<'a>) -> Self {
        let program = program();
        pod.install(&program, PROGRAM).unwrap();
        // A child of the container's own first process, so that it outlives containerd.
        let dial = format!("while [ ! -e /tmp/dialled ]; do {PROGRAM} tcp {SERVICE}; sleep 0.1; done");
        pod.shell(&format!("({dial}) </dev/null >/dev/null 2>&1 &")).unwrap();
        let watch = Watch::start(&program, BRIDGE, POD_NETWORK);
        let address = pod.shell("hostname -i").unwrap().trim().to_owned();
        Self { address, pod, watch, program, pid: place(pod).1, endpoint: endpoint(scene).to_string() }
    }

    /// The packets that got past the node since the last time. The marker is sent in the pod's network by a process of the host:
    /// while containerd is away none can be started in the pod.
    fn direct(&self) -> Vec<String> {
        let seen = self.watch.until_marker(BRIDGE_ADDRESS.parse().unwrap(), UDP, |address| {
            let mut send = Command::new("nsenter");
            send.args(["-t", &self.pid, "-n"]).arg(&self.program).args(["udp-sendto", address]);
            command::run(&mut send).unwrap();
        });
        let own = format!("{} ", self.address);
        let own = seen.into_iter().filter(|packet| packet.starts_with(&own)).collect();
        to_any(own, &[SERVICE, &self.endpoint])
    }

    #[track_caller]
    fn none_is_direct(&self, when: &str) {
        let direct = self.direct();
        assert!(direct.is_empty(), "{when}: {direct:?}");
    }
}

impl Drop for Dialling<'_> {
    fn drop(&mut self) {
        let _ = self.pod.shell("touch /tmp/dialled");
    }
}

/// What `weir-guard.service` runs, as the chart has installed it on the node.
fn of_the_unit() -> Command {
    let unit = fs::read_to_string("/etc/systemd/system/weir-guard.service").unwrap();
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let words: Vec<_> = start.split(' ').collect();
    assert!(words[0].starts_with("/opt/weir/") && words.ends_with(&["guard"]), "{start}");
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env_clear();
    command
}

pub(super) fn put_guard_in_force(mut guard: Command) {
    let said = command::run(&mut guard).unwrap();
    assert!(said.starts_with("in force: pods are kept from "), "{said}");
}

/// Kubelet, containerd and the agent's pod are gone and nothing is pinned, as after a reboot.
pub(super) fn is_kept_from_the_api_server_through_reboots(
    release: &Release<'_>,
    scene: &Scene,
    pod: &Pod<'_>,
) {
    let dialling = Dialling::begin(scene, pod);
    for order in ORDERS {
        let began = std::time::Instant::now();
        dialling.none_is_direct("before");
        let former = guarded_at(release);
        let kubelet = scene.testbed.stop_kubelet().unwrap();
        kill_agents_pod(release);
        let containerd = scene.testbed.stop_containerd().unwrap();
        fs::remove_dir_all(PINS).unwrap();
        wait_until("the far side to see what nothing keeps back", DEADLINE, || {
            Ok((!dialling.direct().is_empty()).then_some(()))
        })
        .unwrap();
        if order == Guard::First {
            put_guard_in_force(of_the_unit());
            dialling.direct();
        }
        containerd.end().unwrap();
        if order == Guard::Between {
            put_guard_in_force(of_the_unit());
            dialling.direct();
        }
        if order != Guard::Last {
            is_refused(pod, "before the kubelet");
        }
        kubelet.end().unwrap();
        if order == Guard::Last {
            wait_until("the init step of the agent's pod", AGAIN_DEADLINE, || {
                Ok(guarded_at(release).filter(|at| Some(at) != former.as_ref()).map(drop))
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", release.told()));
            dialling.direct();
        }
        wait_until("the pod to be served again", AGAIN_DEADLINE, || {
            Ok((asks(pod).0 == Some(0)).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", release.told()));
        let done = ["rollout", "status", "daemonset/weir-agent", "-n", NAMESPACE, READY_DEADLINE];
        scene.testbed.kubectl(&done).unwrap();
        dialling.none_is_direct(&format!("from the guard on, {order:?}"));
        eprintln!("as after a reboot, guard {order:?}; served again after {:?}", began.elapsed());
    }
    let direct = direct_requests(scene, &BTreeSet::from([pod.uid.clone()]));
    assert!(direct.is_empty(), "{direct:?}");
}

/// When the init step of the agent's pod has last put the guard in force.
fn guarded_at(release: &Release<'_>) -> Option<String> {
    let pods = release.pods();
    let state = &pods.first()?["status"]["initContainerStatuses"][0]["state"]["terminated"];
    (state["exitCode"] == 0).then(|| state["finishedAt"].as_str().map(str::to_owned))?
}

/// With its sandbox, so that the kubelet starts all of it anew.
fn kill_agents_pod(release: &Release<'_>) {
    let pods = release.pods();
    let uid = pods[0]["metadata"]["uid"].as_str().unwrap();
    let ctr = |arguments: &[&str]| command::output(release.testbed.ctr_command().args(arguments)).unwrap();
    let of_pod = format!("labels.\"io.kubernetes.pod.uid\"==\"{uid}\"");
    let found = ctr(&["containers", "list", "-q", &of_pod]);
    let found = String::from_utf8(found.stdout).unwrap();
    let mut killed = 0;
    for id in found.lines() {
        // The init container's has no task any more.
        killed += usize::from(ctr(&["tasks", "kill", "--signal", "SIGKILL", id]).status.success());
    }
    assert!(killed >= 2, "the agent and its sandbox, of {found:?}");
    wait_until("the agent to be gone", DEADLINE, || {
        Ok((!Path::new("/run/weir/handover.sock").exists() || !answers()).then_some(()))
    })
    .unwrap();
}

fn answers() -> bool {
    std::os::unix::net::UnixStream::connect("/run/weir/handover.sock").is_ok()
}
