//! The chart on the node: installed by Helm with an image of the built binaries, upgraded under load, its admission policy,
//! and removed. The agent of these tests is a container with the chart's rights, and none more.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use weir_common::event::Kind;
use weir_tests::{
    Clients, PodSpec, Testbed, agent, command, components, image::Image, progress::Progress,
    testbed::NODE_NAME, wait_until,
};

use super::{
    DEADLINE, Scene,
    approver::answers_agents_alone,
    bundle,
    guard::{asks, direct_requests, is_refused},
    guides,
    rendered::is_what_the_api_server_takes,
    rights, shown,
};

pub(super) const NAMESPACE: &str = "weir-system";
const IMAGE: &str = "weir.test/weir-agent:1";
/// Where the chart's agent keeps things on the node, which here is this machine.
const STATE: &str = "/var/lib/weir";
pub(super) const JOURNAL: &str = "/var/lib/weir/journal";
/// What keeps pods off a node without an agent.
const STARTUP_TAINT: &str = "weir.dev/agent-not-ready=:NoSchedule";
/// The image is there, and nothing is pulled.
const READY_DEADLINE: &str = "--timeout=120s";
/// Calls that must have succeeded after an upgrade.
const CALLS_AFTER: usize = 10;
/// The kubelet waits ten seconds before it starts a container that has ended twice.
const AGAIN_DEADLINE: Duration = Duration::from_secs(90);

/// The folder that `cargo xtask dist --test` has made.
fn dist() -> Option<PathBuf> {
    std::env::var_os("WEIR_TEST_DIST").map(PathBuf::from)
}

#[track_caller]
fn only_one(folder: &Path, suffix: &str) -> PathBuf {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let found: Vec<_> = files.filter(|path| path.to_string_lossy().ends_with(suffix)).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

/// The release; it, and what it leaves on this machine, goes with this value.
pub(super) struct Release<'a> {
    pub(super) testbed: &'a Testbed,
    helm: PathBuf,
    pub(super) scratch: &'a Path,
}

impl<'a> Release<'a> {
    fn new(scene: &'a Scene) -> Self {
        agent::refuse_beside_another().unwrap();
        assert!(!Path::new(STATE).exists(), "{STATE} exists: this machine has had an agent; remove it");
        let helm = components::helm(Progress::Shown).unwrap();
        let release = Self { testbed: &scene.testbed, helm, scratch: scene.scratch.path() };
        release.import_image();
        release.testbed.create_namespace(NAMESPACE, &[]).unwrap();
        let mut values = json!({
            "image": {"repository": "weir.test/weir-agent", "tag": "1", "pullPolicy": "Never"},
            "config": {"nri": {"socket": scene.testbed.layout().path("containerd/state/nri.sock")}},
        });
        // kubectl reads what it patches, also where it does so as the agent.
        values["extraClusterRules"] = json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]);
        fs::write(release.scratch.join("values.json"), values.to_string()).unwrap();
        release
    }

    /// Of what `cargo xtask dist` made, where that is to be tested; else of the built binaries, by the same code.
    fn import_image(&self) {
        let archive =
            dist().map_or_else(|| self.image_of_built_binaries(), |folder| only_one(&folder, ".oci.tar"));
        command::run(self.testbed.ctr_command().args(["images", "import", "--local"]).arg(&archive)).unwrap();
        let index = command::run(Command::new("tar").arg("-xOf").arg(&archive).arg("./index.json")).unwrap();
        let index: Value = serde_json::from_str(&index).unwrap();
        let name = index["manifests"][0]["annotations"]["io.containerd.image.name"].as_str().unwrap();
        if name != IMAGE {
            eprintln!("{} is installed, {}", archive.display(), index["manifests"][0]["digest"]);
            command::run(self.testbed.ctr_command().args(["images", "tag", "--force", name, IMAGE])).unwrap();
        }
    }

    fn image_of_built_binaries(&self) -> PathBuf {
        let binaries = ["weir-agent", "weir"].map(|name| agent::built_binary(name).unwrap());
        let license = components::repository().join("LICENSE");
        let archive = self.scratch.join("image.tar");
        let image =
            Image { name: IMAGE, version: "test", binaries: &binaries, license: &license, compressed: false };
        image.write(&archive).unwrap();
        archive
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.helm);
        command.args(arguments).args(["--namespace", NAMESPACE]);
        command.env("KUBECONFIG", self.testbed.layout().kubeconfig("admin"));
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.scratch.join("helm"));
        }
        command
    }

    /// Brings the release to these values, and waits until the DaemonSet is ready.
    fn apply(&self, set: &[&str]) -> Output {
        let mut command = self.command(&["upgrade", "weir", "--install", "--wait", READY_DEADLINE]);
        let chart = dist().map(|folder| only_one(&folder, ".tgz"));
        command.arg(chart.unwrap_or_else(|| components::repository().join("deploy/helm/weir")));
        command.arg("--values").arg(self.scratch.join("values.json"));
        for value in set {
            command.args(["--set", value]);
        }
        command::output(&mut command).unwrap()
    }

    #[track_caller]
    pub(super) fn must_apply(&self, set: &[&str]) {
        let output = self.apply(set);
        assert!(output.status.success(), "{:?}\n{}", shown(&output), self.told());
    }

    /// What a failure is explained by.
    pub(super) fn told(&self) -> String {
        let ask = |arguments: &[&str]| {
            let output =
                command::output(self.testbed.kubectl_command().args(arguments).args(["-n", NAMESPACE]));
            output.map(|output| format!("{}\n", shown(&output).1)).unwrap_or_default()
        };
        let mut told = ask(&["get", "pods", "-o", "wide"]) + &ask(&["get", "events"]);
        told += &ask(&["logs", "deployment/weir-approver", "--tail=20"]);
        for pod in self.pods() {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            for container in ["guard", "agent"] {
                told += &ask(&["logs", name, "-c", container, "--tail=20"]);
            }
        }
        told
    }

    /// The agents' pods.
    fn pods(&self) -> Vec<Value> {
        let of_agents =
            ["get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=weir-agent", "-o", "json"];
        let text = self.testbed.kubectl(&of_agents).unwrap();
        let list: Value = serde_json::from_str(&text).unwrap();
        list["items"].as_array().unwrap().clone()
    }

    /// What the API server says to a pod, or makes of it, without making it.
    pub(super) fn try_pod(
        &self,
        namespace: &str,
        change: &dyn Fn(&mut Value),
    ) -> (Option<i32>, String, String) {
        let mut pod = PodSpec::idle(namespace, "tried").manifest();
        change(&mut pod["spec"]);
        let file = self.scratch.join("pod.json");
        fs::write(&file, pod.to_string()).unwrap();
        let mut command = self.testbed.kubectl_command();
        command.args(["create", "--dry-run=server", "-o", "json", "-f"]).arg(&file);
        shown(&command::output(&mut command).unwrap())
    }

    /// A command in the agent's container.
    pub(super) fn in_agent(&self, arguments: &[&str]) -> Output {
        let mut command = self.testbed.kubectl_command();
        command.args(["exec", "-n", NAMESPACE, "daemonset/weir-agent", "-c", "agent", "--"]).args(arguments);
        command::output(&mut command).unwrap()
    }
}

impl Drop for Release<'_> {
    fn drop(&mut self) {
        let _ = command::output(&mut self.command(&["uninstall", "weir", "--wait", "--ignore-not-found"]));
        let _ = self.testbed.delete_namespace(NAMESPACE);
        let lift = ["taint", "node", NODE_NAME, "weir.dev/agent-not-ready-"];
        let _ = command::output(self.testbed.kubectl_command().args(lift));
        let binary = agent::built_binary("weir-agent").unwrap();
        let _ = command::output(Command::new(binary).args(["uninstall", "--force"]));
        let _ = fs::remove_dir_all(STATE);
    }
}

#[test]
fn the_chart_installs_upgrades_under_load_and_removes_itself() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-chart", true);
    let release = Release::new(&scene);
    let clients = Clients::install(Progress::Shown).unwrap();
    let spec = PodSpec { folders: clients.folders(), ..PodSpec::idle("it-chart", "caller") };
    let pod = scene.testbed.run_pod(&spec).unwrap();
    let ask = || shown(&pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap());
    let guides = guides::Node {
        testbed: release.testbed,
        scratch: release.scratch,
        helm: &|arguments| release.command(arguments),
        in_agent: &|arguments| release.in_agent(arguments),
    };
    is_what_the_api_server_takes(&guides);
    guides::values_are_taken(&guides);
    release.testbed.kubectl(&["taint", "node", NODE_NAME, STARTUP_TAINT]).unwrap();
    release.must_apply(&["startupTaint=true"]);
    takes_the_startup_taint_off_and_may_change_nothing_else(&release);
    answers_agents_alone((release.testbed, release.scratch), (&pod.name, &pod.uid));
    assert_eq!(ask(), (Some(0), "namespace/default\n".to_owned(), String::new()));
    let is_recorded = || {
        let events = agent::read_events(Path::new(JOURNAL))?;
        Ok(events.iter().any(|event| matches!(event.kind, Kind::RequestOpened(_))).then_some(()))
    };
    wait_until("the pod's request in the node's journal", DEADLINE, is_recorded).unwrap();
    let examined = release.in_agent(&["weir-agent", "doctor", "--config", "/etc/weir/config/agent.yaml"]);
    assert!(examined.status.success(), "{:?}", shown(&examined));
    println!("{}", shown(&examined).1);
    refuses_pods_that_could_reach_past_weir(&release);
    guides::are_run(&guides);
    is_upgraded_under_load(&release, &pod);
    is_kept_from_the_api_server_through_reboots(&release, &scene, &pod);
    rights::are_all_used(release.testbed);
    bundle::is_given_where_pods_would_not_trust_the_agent(&release, &clients, &pod);
    release.must_apply(&["uninstall=true"]);
    let done = ["rollout", "status", "daemonset/weir-agent", "-n", NAMESPACE, READY_DEADLINE];
    scene.testbed.kubectl(&done).unwrap();
    agent::refuse_beside_another().unwrap();
    assert_eq!(ask().0, Some(0), "the pod reaches the API server directly");
    let removed = command::output(&mut release.command(&["uninstall", "weir", "--wait"])).unwrap();
    assert!(removed.status.success(), "{:?}", shown(&removed));
    wait_until("the last pod to be gone", DEADLINE, || Ok(release.pods().is_empty().then_some(()))).unwrap();
}

fn takes_the_startup_taint_off_and_may_change_nothing_else(release: &Release<'_>) {
    let taints = ["get", "node", NODE_NAME, "-o", "jsonpath={.spec.taints}"];
    wait_until("the taint to be gone", DEADLINE, || {
        Ok(release.testbed.kubectl(&taints)?.is_empty().then_some(()))
    })
    .unwrap();
    // Whoever has only the account's name, and no token of a pod on this node, may not.
    let account = format!("--as=system:serviceaccount:{NAMESPACE}:weir-agent");
    let refused = |change: &[&str], extra: &[&str], said: &str| {
        let mut command = release.testbed.kubectl_command();
        command.args(change).args(["node", NODE_NAME]).arg(&account).args(extra);
        let (code, _, error) = shown(&command::output(&mut command).unwrap());
        assert!(code != Some(0) && error.contains(said), "{change:?}: {code:?} {error}");
    };
    let of_node = format!("--as-user-extra=authentication.kubernetes.io/node-name={NODE_NAME}");
    let (label, patch) = (r#"{"metadata": {"labels": {"a": "b"}}}"#, r#"{"spec": {"unschedulable": true}}"#);
    refused(&["patch", "-p", label], &[], "the node that its own pod runs on, and no other");
    let owner = r#"{"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "gone", "uid": "gone"}]}}"#;
    for change in [label, patch, owner, r#"{"metadata": {"finalizers": ["example.com/a"]}}"#] {
        refused(&["patch", "-p", change], &[&of_node], "and changes nothing else");
    }
}

/// Calls of an enrolled pod go on, one after the other, while the DaemonSet's pod is replaced.
fn is_upgraded_under_load(release: &Release<'_>, pod: &weir_tests::Pod<'_>) {
    let former = release.pods();
    let calls = "while [ ! -e /tmp/stop ]; do kubectl get namespace default -o name >/dev/null 2>/tmp/error; echo $?; done; cat /tmp/error";
    let mut calling = pod.exec_command().args(["sh", "-c", calls]).stdout(Stdio::piped()).spawn().unwrap();
    let mut codes = BufReader::new(calling.stdout.take().unwrap()).lines();
    assert_eq!(codes.next().unwrap().unwrap(), "0");
    release.must_apply(&["startupTaint=true", "admission.enabled=true", "config.limits.drainSeconds=5"]);
    wait_until("the former agent's pod to be gone", Duration::from_secs(60), || {
        Ok((release.pods().len() == 1).then_some(()))
    })
    .unwrap();
    let now = release.pods();
    assert_ne!(former[0]["metadata"]["uid"], now[0]["metadata"]["uid"]);
    assert_eq!(now[0]["status"]["containerStatuses"][0]["restartCount"], 0, "{}", release.told());
    for _ in 0..CALLS_AFTER {
        assert_eq!(codes.next().unwrap().unwrap(), "0");
    }
    pod.shell("touch /tmp/stop").unwrap();
    let codes: Vec<_> = codes.map(Result::unwrap).collect();
    assert!(codes.iter().all(|code| code == "0" || code.is_empty()), "{codes:?}\n{}", release.told());
    calling.wait().unwrap();
    let events = agent::read_events(Path::new(JOURNAL)).unwrap();
    let refused = events.iter().filter(|event| matches!(event.kind, Kind::ConnectionRefused { .. })).count();
    assert_eq!(refused, 0);
    let epochs: std::collections::BTreeSet<_> = events.iter().map(|event| &event.epoch).collect();
    assert_eq!(epochs.len(), 2, "one agent before, one after, and no third that took over again");
}

/// Kubelet, containerd and agent are gone and nothing is pinned, as after a reboot; they come back in each order that a node with
/// `weir-guard.service` can have, which is never the kubelet before the guard.
fn is_kept_from_the_api_server_through_reboots(
    release: &Release<'_>,
    scene: &Scene,
    pod: &weir_tests::Pod<'_>,
) {
    let binary = agent::built_binary("weir-agent").unwrap();
    let on_node = |arguments: &[&str]| command::run(Command::new(&binary).args(arguments)).unwrap();
    for guard_first in [true, false] {
        let began = std::time::Instant::now();
        let status: Value = serde_json::from_str(&on_node(&["status", "--json"])).unwrap();
        let agent = i32::try_from(status["agent"]["pid"].as_i64().unwrap()).unwrap();
        let kubelet = scene.testbed.stop_kubelet().unwrap();
        kill(Pid::from_raw(agent), Signal::SIGKILL).unwrap();
        wait_until("the agent to be gone", DEADLINE, || {
            Ok((!Path::new("/proc").join(agent.to_string()).exists()).then_some(()))
        })
        .unwrap();
        let containerd = scene.testbed.stop_containerd().unwrap();
        on_node(&["uninstall", "--force"]);
        // What `weir-guard.service` runs.
        let guard = || {
            let said = on_node(&["guard"]);
            assert!(said.starts_with("in force: pods are kept from "), "{said}");
        };
        if guard_first {
            guard();
        }
        containerd.end().unwrap();
        if !guard_first {
            guard();
        }
        is_refused(pod, "before the kubelet");
        kubelet.end().unwrap();
        wait_until("the pod to be served again", AGAIN_DEADLINE, || {
            Ok((asks(pod).0 == Some(0)).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", release.told()));
        let done = ["rollout", "status", "daemonset/weir-agent", "-n", NAMESPACE, READY_DEADLINE];
        scene.testbed.kubectl(&done).unwrap();
        eprintln!("as after a reboot, guard first: {guard_first}; served again after {:?}", began.elapsed());
    }
    let direct = direct_requests(scene, &std::iter::once(pod.uid.clone()).collect());
    assert!(direct.is_empty(), "{direct:?}");
}

/// Folders of the node, where `/srv/cache` and `/runner/.cache/` are allowed.
const REFUSED_FOLDERS: [&str; 12] = [
    "/srv",
    "/srv/cache/",
    "/srv/cache/link",
    "/opt/cni/bin",
    "/var/run/docker.sock",
    "/run",
    "/sys/fs/bpf",
    "/sys/fs/cgroup/",
    "/",
    "/var/lib",
    "//sys",
    "/./sys/fs",
];

fn refuses_pods_that_could_reach_past_weir(release: &Release<'_>) {
    release.must_apply(&[
        "startupTaint=true",
        "admission.enabled=true",
        "admission.hostPathsAllowed={/srv/cache,/runner/.cache/}",
    ]);
    let create = |namespace: &str, change: &dyn Fn(&mut Value)| release.try_pod(namespace, change);
    let privileged =
        |spec: &mut Value| spec["containers"][0]["securityContext"] = json!({"privileged": true});
    wait_until("the policy to be in force", DEADLINE, || {
        Ok((create("it-chart", &privileged).0 != Some(0)).then_some(()))
    })
    .unwrap();
    let policy =
        ["get", "validatingadmissionpolicy", "weir-enrolled-pods", "-o", "jsonpath={.status.typeChecking}"];
    let checked = wait_until("the policy to be checked", DEADLINE, || {
        let checked = release.testbed.kubectl(&policy)?;
        Ok((!checked.is_empty()).then_some(checked))
    });
    assert_eq!(checked.unwrap(), "{}", "no expression is doubtful");
    let refused = |said: &str, change: &dyn Fn(&mut Value)| {
        let (code, _, error) = create("it-chart", change);
        assert!(code != Some(0) && error.contains(said), "{said}: {code:?} {error}");
        assert!(error.contains("or use a namespace that is not enrolled"), "{error}");
        assert_eq!(create(NAMESPACE, change).0, Some(0), "{said}: elsewhere it is nobody's business");
    };
    let volume = |path: &'static str| {
        move |spec: &mut Value| spec["volumes"] = json!([{"name": "v", "hostPath": {"path": path}}])
    };
    let adds = |name: &'static str| {
        move |spec: &mut Value| {
            spec["containers"][0]["securityContext"] = json!({"capabilities": {"add": [name]}});
        }
    };
    refused("drop securityContext.privileged", &privileged);
    refused("drop securityContext.privileged", &|spec| {
        let mut container = spec["containers"][0].clone();
        container["name"] = "first".into();
        container["securityContext"] = json!({"privileged": true});
        spec["initContainers"] = json!([container]);
    });
    for key in ["hostNetwork", "hostPID", "hostIPC"] {
        refused("drop hostNetwork, hostPID and hostIPC", &|spec| spec[key] = true.into());
    }
    for name in ["NET_RAW", "CAP_NET_RAW", "SYS_ADMIN", "BPF", "DAC_READ_SEARCH", "ALL"] {
        refused("with what these containers add: main; of capabilities add none of ALL, BPF,", &adds(name));
    }
    for path in REFUSED_FOLDERS {
        refused(&format!("may lead around it: {path}; drop those hostPath volumes"), &volume(path));
    }
    let passes: [&dyn Fn(&mut Value); 4] =
        [&|_| {}, &volume("/srv/cache"), &volume("/runner/.cache/"), &adds("CHOWN")];
    for change in passes {
        assert_eq!(create("it-chart", change).0, Some(0), "a plain pod passes");
    }
}
