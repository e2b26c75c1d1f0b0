//! The release: Helm, the image, the values, and what it leaves on this machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Value, json};
use weir_tests::{
    PodSpec, Testbed, agent, command, components, image, progress::Progress, testbed::NODE_NAME,
};

use super::{
    super::{Scene, shown},
    OTHER_TAINT_LIFTED,
};

pub(crate) const NAMESPACE: &str = "weir-system";
const IMAGE: &str = "weir.test/weir-agent:1";
/// Where the chart's agent keeps things on the node, which here is this machine.
pub(crate) const STATE: &str = "/var/lib/weir";
/// The image is there, and nothing is pulled; but an agent before it may drain as long as it may.
pub(crate) const READY_DEADLINE: &str = "--timeout=300s";

/// The folder that `cargo xtask dist --test` has made.
fn dist() -> Option<PathBuf> {
    std::env::var_os("WEIR_TEST_DIST").map(PathBuf::from)
}

/// The chart's package that `dist` has made, where that is to be tested; else its folder.
fn chart() -> PathBuf {
    let package = dist().map(|folder| only_one(&folder, ".tgz"));
    package.unwrap_or_else(|| components::repository().join("deploy/helm/weir"))
}

pub(crate) fn runbook() -> String {
    fs::read_to_string(components::repository().join("docs/runbook.md")).unwrap()
}

#[track_caller]
fn only_one(folder: &Path, suffix: &str) -> PathBuf {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let found: Vec<_> = files.filter(|path| path.to_string_lossy().ends_with(suffix)).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

/// The release; it, and what it leaves on this machine, goes with this value.
pub(crate) struct Release<'a> {
    pub(crate) testbed: &'a Testbed,
    helm: PathBuf,
    pub(crate) scratch: &'a Path,
}

impl<'a> Release<'a> {
    pub(crate) fn new(scene: &'a Scene) -> Self {
        agent::refuse_beside_another().unwrap();
        assert!(!Path::new(STATE).exists(), "{STATE} exists: this machine has had an agent; remove it");
        // What a test that was cut short has left.
        command::run(&mut on_node(&["uninstall", "--guard-unit", "/"])).unwrap();
        let helm = components::helm(Progress::Shown).unwrap();
        let release = Self { testbed: &scene.testbed, helm, scratch: scene.scratch.path() };
        release.import_image();
        let text = runbook();
        for begins in ["kubectl create namespace weir-system", "kubectl label namespace weir-system "] {
            let line = text.lines().map(str::trim).find(|line| line.starts_with(begins)).unwrap();
            let words: Vec<_> = line.split(' ').skip(1).collect();
            release.testbed.kubectl(&words).unwrap();
        }
        let mut values = json!({
            "image": {"repository": "weir.test/weir-agent", "tag": "1", "pullPolicy": "Never"},
            "config": {
                "nri": {"socket": scene.testbed.layout().path("containerd/state/nri.sock")},
                // Longer than a busy machine takes for an upgrade: a stream through it must not meet the limit.
                "limits": {"drainSeconds": 120},
            },
        });
        values["guardUnit"] = json!({"enabled": true});
        // kubectl reads what it patches, also where it does so as the agent.
        values["extraClusterRules"] = json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]);
        fs::write(release.scratch.join("values.json"), values.to_string()).unwrap();
        release
    }

    /// Of all that is installed from now on.
    pub(crate) fn change_values(&self, change: impl FnOnce(&mut Value)) {
        let path = self.scratch.join("values.json");
        let mut values: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut values);
        fs::write(&path, values.to_string()).unwrap();
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
        image::write_own(IMAGE, binaries.to_vec(), &license, &archive).unwrap();
        archive
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.helm();
        command.args(arguments).args(["--namespace", NAMESPACE]);
        command
    }

    fn helm(&self) -> Command {
        let mut command = Command::new(&self.helm);
        command.env("KUBECONFIG", self.testbed.layout().kubeconfig("admin"));
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.scratch.join("helm"));
        }
        command
    }

    /// A command of Helm's as the runbook has it, the first one that begins so, with this chart and these values.
    #[track_caller]
    pub(crate) fn of_the_runbook(&self, begins: &str) -> Command {
        let text = runbook();
        let line = text.lines().map(str::trim).find(|line| line.starts_with(begins));
        let words = line.unwrap_or_else(|| panic!("the runbook has no {begins:?}")).split(' ').skip(1);
        let mut command = self.helm();
        for word in words {
            match word {
                "deploy/helm/weir" => command.arg(chart()),
                "values.yaml" => command.arg(self.scratch.join("values.json")),
                word => command.arg(word),
            };
        }
        command
    }

    /// Brings the release to these values, and waits until the DaemonSet is ready and its former pods are gone.
    pub(crate) fn to_apply(&self, verb: &str, set: &[&str]) -> Command {
        let mut command = self.command(&[verb, "weir", "--wait", READY_DEADLINE]);
        command.arg(chart());
        command.arg("--values").arg(self.scratch.join("values.json"));
        for value in set {
            command.args(["--set", value]);
        }
        command
    }

    #[track_caller]
    pub(crate) fn must_install(&self, set: &[&str]) {
        let mut command = self.of_the_runbook("helm install weir ");
        for value in set {
            command.args(["--set", value]);
        }
        self.must(command);
    }

    #[track_caller]
    pub(crate) fn must_apply(&self, set: &[&str]) {
        self.must(self.to_apply("upgrade", set));
    }

    #[track_caller]
    pub(crate) fn must(&self, mut command: Command) {
        let output = command::output(&mut command).unwrap();
        assert!(output.status.success(), "{:?}\n{}", shown(&output), self.told());
        self.can_be_followed();
    }

    /// What a hand-over between two pods of the host's network needs, in the object that the cluster has.
    #[track_caller]
    pub(crate) fn can_be_followed(&self) {
        let get = ["get", "daemonset", "weir-agent", "-n", NAMESPACE, "-o", "json"];
        let object: Value = serde_json::from_str(&self.testbed.kubectl(&get).unwrap()).unwrap();
        let spec = &object["spec"]["template"]["spec"];
        let drain = self.drain_seconds();
        let grace = spec["terminationGracePeriodSeconds"].as_u64().unwrap();
        assert!(grace >= drain + 30, "{grace} s of grace, {drain} s of draining");
        for container in
            ["initContainers", "containers"].iter().flat_map(|kind| spec[kind].as_array()).flatten()
        {
            assert!(container["ports"].is_null(), "a port would be the host's: {container}");
        }
        let agent = &spec["containers"][0];
        if agent["command"][1] == "run" {
            assert!(
                agent["livenessProbe"]["httpGet"]["port"].is_u64(),
                "a port by name needs a declared one"
            );
            assert_eq!(agent["readinessProbe"]["exec"]["command"], json!(["weir-agent", "ready"]));
            let strategy = &object["spec"]["updateStrategy"]["rollingUpdate"];
            assert_eq!(strategy["maxUnavailable"], 0, "{strategy}");
        }
    }

    /// How long agents may drain, in the configuration that the cluster has.
    pub(crate) fn drain_seconds(&self) -> u64 {
        let get = ["get", "configmap", "weir-agent", "-n", NAMESPACE, "-o", "jsonpath={.data.agent\\.yaml}"];
        let config: Value = serde_yaml_ng::from_str(&self.testbed.kubectl(&get).unwrap()).unwrap();
        config["limits"]["drainSeconds"].as_u64().unwrap()
    }

    /// What a failure is explained by.
    pub(crate) fn told(&self) -> String {
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
    pub(crate) fn pods(&self) -> Vec<Value> {
        let of_agents =
            ["get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=weir-agent", "-o", "json"];
        let text = self.testbed.kubectl(&of_agents).unwrap();
        let list: Value = serde_json::from_str(&text).unwrap();
        list["items"].as_array().unwrap().clone()
    }

    /// What the API server says to a pod, or makes of it, without making it.
    pub(crate) fn try_pod(
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
    pub(crate) fn in_agent(&self, arguments: &[&str]) -> Output {
        let mut command = self.testbed.kubectl_command();
        command.args(["exec", "-n", NAMESPACE, "daemonset/weir-agent", "-c", "agent", "--"]).args(arguments);
        command::output(&mut command).unwrap()
    }
}

impl Drop for Release<'_> {
    fn drop(&mut self) {
        let _ = command::output(&mut self.command(&[
            "uninstall",
            "weir",
            "--wait",
            "--no-hooks",
            "--ignore-not-found",
        ]));
        let _ = self.testbed.delete_namespace(NAMESPACE);
        for taint in ["weir.dev/agent-not-ready-", OTHER_TAINT_LIFTED] {
            let lift = ["taint", "node", NODE_NAME, taint];
            let _ = command::output(self.testbed.kubectl_command().args(lift));
        }
        // Only where a test has failed is anything left to remove.
        let _ = command::output(&mut on_node(&["uninstall", "--force", "--guard-unit", "/"]));
        let _ = fs::remove_dir_all(STATE);
    }
}

/// The agent's program on the node itself, as an administrator has it there.
pub(crate) fn on_node(arguments: &[&str]) -> Command {
    let mut command = Command::new(agent::built_binary("weir-agent").unwrap());
    command.args(arguments);
    command
}
