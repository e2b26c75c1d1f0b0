//! Pods of the testbed: made from the image that holds the real kubectl and a shell, and driven from the host.
//!
//! Commands in a pod are started by `kubectl exec` of the host, which goes to the API server directly; what the pod
//! itself does goes through whatever its connections go through. Nothing here knows Weir.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::command::{output, run};
use crate::testbed::{AGENT_IMAGE, Testbed};
use crate::wait::wait_until;

/// A pod of a warm testbed runs within 2 s; builds may run beside it, on a machine that is slow.
const READY_DEADLINE: Duration = Duration::from_secs(180);
/// For what the controller manager makes. Where the API server was away it looks again after 30 to 60 s (client-go's reflectors, whose
/// pauses grow until all was well for two minutes), and the machine may be busy.
const CONTROLLED_DEADLINE: Duration = Duration::from_secs(150);

/// What a pod is made from.
#[derive(Clone, Debug)]
pub struct PodSpec<'a> {
    /// Namespace; it must exist.
    pub namespace: &'a str,
    /// Name.
    pub name: &'a str,
    /// Labels of the pod.
    pub labels: &'a [(&'a str, &'a str)],
    /// Annotations of the pod.
    pub annotations: &'a [(&'a str, &'a str)],
    /// Service account; it must exist.
    pub service_account: &'a str,
    /// Whether it shares the host's network.
    pub host_network: bool,
    /// Folders of this machine that it may read.
    pub folders: &'a [Folder],
    /// What its container runs, in a shell.
    pub script: &'a str,
}

/// A folder of this machine, as a pod has it: read-only.
#[derive(Clone, Debug)]
pub struct Folder {
    from: PathBuf,
    to: String,
}

impl Folder {
    /// `from`, as `to`.
    #[must_use]
    pub fn new(from: PathBuf, to: &str) -> Self {
        Self { from, to: to.to_owned() }
    }

    /// At the same path.
    #[must_use]
    pub fn same(folder: &Path) -> Self {
        Self { from: folder.to_owned(), to: folder.display().to_string() }
    }
}

impl<'a> PodSpec<'a> {
    /// A pod that waits to be driven by [`Pod::exec`].
    #[must_use]
    pub fn idle(namespace: &'a str, name: &'a str) -> Self {
        // A shell as process 1 ignores SIGTERM unless told otherwise, and it must reap what is left to it.
        let script = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
        Self {
            namespace,
            name,
            labels: &[],
            annotations: &[],
            service_account: "default",
            host_network: false,
            folders: &[],
            script,
        }
    }

    /// The pod's object.
    #[must_use]
    pub fn manifest(&self) -> Value {
        let folders =
            || self.folders.iter().enumerate().map(|(number, folder)| (format!("folder-{number}"), folder));
        let volumes =
            folders().map(|(name, folder)| json!({"name": name, "hostPath": {"path": folder.from}}));
        let mounts =
            folders().map(|(name, folder)| json!({"name": name, "mountPath": folder.to, "readOnly": true}));
        let map = |of: &[(&str, &str)]| {
            of.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect::<serde_json::Map<_, _>>()
        };
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": self.namespace,
                "name": self.name,
                "labels": map(self.labels),
                "annotations": map(self.annotations),
            },
            "spec": {
                "serviceAccountName": self.service_account,
                "hostNetwork": self.host_network,
                "terminationGracePeriodSeconds": 1,
                "restartPolicy": "Never",
                "volumes": volumes.collect::<Vec<_>>(),
                "containers": [{
                    "name": "main",
                    "image": AGENT_IMAGE,
                    "imagePullPolicy": "Never",
                    "command": ["/bin/sh", "-c", self.script],
                    "volumeMounts": mounts.collect::<Vec<_>>(),
                }],
            },
        })
    }
}

/// A pod that was seen running.
#[derive(Debug)]
pub struct Pod<'a> {
    testbed: &'a Testbed,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Id of its one container, as the runtime and the cgroup have it.
    pub container: String,
}

impl Testbed {
    /// Makes a namespace and waits for what every pod in it needs.
    ///
    /// # Errors
    /// When kubectl fails or the deadline is over.
    pub fn create_namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: serde_json::Map<_, _> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        // One of that name may be on its way out, or left over by a run that was killed.
        let gone = format!("--timeout={}s", READY_DEADLINE.as_secs());
        if self.try_kubectl(&["get", "namespace", name])? {
            self.kubectl(&["delete", "namespace", name, "--ignore-not-found", "--wait=true", &gone])?;
        }
        self.apply(&namespace.to_string())?;
        for object in ["serviceaccount/default", "configmap/kube-root-ca.crt"] {
            wait_until(&format!("{object} of namespace {name}"), CONTROLLED_DEADLINE, || {
                Ok(self.try_kubectl(&["get", object, "-n", name])?.then_some(()))
            })?;
        }
        Ok(())
    }

    /// Deletes a namespace, and waits until no pod of it is left. The rest goes by itself: the namespace controller
    /// lets 5 s pass before it begins, and no test needs to wait for that.
    ///
    /// # Errors
    /// When kubectl fails or the deadline is over.
    pub fn delete_namespace(&self, name: &str) -> Result<()> {
        self.kubectl(&["delete", "namespace", name, "--ignore-not-found", "--wait=false"])?;
        let deadline = format!("--timeout={}s", READY_DEADLINE.as_secs());
        self.kubectl(&["delete", "pods", "--all", "-n", name, "--wait=true", &deadline]).map(|_| ())
    }

    /// Makes a pod and waits until it is ready.
    ///
    /// # Errors
    /// When kubectl fails, or the pod is not ready in time; then the error has the pod's events.
    pub fn run_pod(&self, spec: &PodSpec<'_>) -> Result<Pod<'_>> {
        self.apply(&spec.manifest().to_string())?;
        let (namespace, name) = (spec.namespace, spec.name);
        let status = wait_until(&format!("pod {namespace}/{name} to be ready"), READY_DEADLINE, || {
            let pod = self.kubectl(&["get", "pod", name, "-n", namespace, "-o", "json"])?;
            let pod: Value = serde_json::from_str(&pod).context("kubectl wrote no JSON")?;
            Ok((pod["status"]["containerStatuses"][0]["ready"] == true).then_some(pod))
        })
        .map_err(|error| match self.kubectl(&["get", "events", "-n", namespace]) {
            Ok(events) => error.context(format!("events of namespace {namespace}:\n{events}")),
            Err(_) => error,
        })?;
        let uid = status["metadata"]["uid"].as_str().context("the pod has no uid")?.to_owned();
        let container = status["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default();
        let container = container.trim_start_matches("containerd://").to_owned();
        Ok(Pod { testbed: self, namespace: namespace.to_owned(), name: name.to_owned(), uid, container })
    }

    fn try_kubectl(&self, arguments: &[&str]) -> Result<bool> {
        Ok(output(self.kubectl_command().args(arguments))?.status.success())
    }
}

impl Pod<'_> {
    /// `kubectl exec` of the host into this pod, to add a command to; its exit code is the command's.
    #[must_use]
    pub fn exec_command(&self) -> Command {
        let mut command = self.testbed.kubectl_command();
        command.args(["exec", "-n", &self.namespace, &self.name, "--"]);
        command
    }

    /// Runs a command in the pod, whatever its exit code.
    ///
    /// # Errors
    /// When the host's kubectl cannot be started.
    pub fn exec(&self, arguments: &[&str]) -> Result<Output> {
        output(self.exec_command().args(arguments))
    }

    /// The same, but not longer than so many seconds, also where something that the command has started holds its output: then the host's
    /// kubectl is ended, with exit code 124, and what runs in the pod goes with the pod.
    ///
    /// # Errors
    /// When `timeout` cannot be started.
    pub fn exec_for(&self, seconds: u32, arguments: &[&str]) -> Result<Output> {
        let kubectl = self.exec_command();
        let mut command = Command::new("timeout");
        command.args(["--kill-after", "5", &seconds.to_string()]).arg(kubectl.get_program());
        command.args(kubectl.get_args()).args(arguments);
        for (name, value) in kubectl.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        output(&mut command)
    }

    /// A command in the pod's container that is started by the container runtime alone: for when the API server is
    /// away. `id` must differ from that of every other one that still runs.
    #[must_use]
    pub fn runtime_command(&self, id: &str) -> Command {
        let mut command = self.testbed.ctr_command();
        command.args(["tasks", "exec", "--exec-id", id, &self.container]);
        command
    }

    /// Runs a shell script in the pod and gives its output.
    ///
    /// # Errors
    /// When its exit code is not 0.
    pub fn shell(&self, script: &str) -> Result<String> {
        run(self.exec_command().args(["sh", "-c", script]))
    }

    /// Copies a program of the host to a path in the pod.
    ///
    /// # Errors
    /// When it cannot be read, or the pod has no room for it.
    pub fn install(&self, program: &Path, to: &str) -> Result<()> {
        let file = File::open(program).with_context(|| format!("cannot open {}", program.display()))?;
        let mut command = self.testbed.kubectl_command();
        command.args(["exec", "-i", "-n", &self.namespace, &self.name, "--", "sh", "-c"]);
        command.arg(format!("cat > {to} && chmod +x {to}"));
        let output = command.stdin(file).output().context("cannot start kubectl")?;
        ensure!(output.status.success(), "kubectl exec: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Deletes the pod and waits until it is gone.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn delete(self) -> Result<()> {
        self.testbed.kubectl(&["delete", "pod", &self.name, "-n", &self.namespace, "--wait=true"]).map(|_| ())
    }
}
