//! Weir taken from the cluster: by `helm uninstall`, whose hook uninstalls on every node and says where it fails, and by values, for
//! tools that run no hooks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde::Deserialize as _;
use serde_json::{Value, json};
use weir_tests::{Pod, Testbed, agent, command, testbed::NODE_NAME, wait_until};

use super::{
    super::{DEADLINE, guard::is_refused, rights, shown},
    ASK, NO_NRI,
    node_state::{NodeState, is_as_it_was},
    reboot::put_guard_in_force,
    release::{NAMESPACE, READY_DEADLINE, Release, STATE, on_node, runbook},
};

/// The folder of this version's pins.
fn pins() -> PathBuf {
    let mut folders = fs::read_dir("/sys/fs/bpf/weir").unwrap();
    folders.next().unwrap().unwrap().path()
}

#[track_caller]
pub(super) fn reaches_the_api_server_directly(pod: &Pod<'_>) {
    agent::refuse_beside_another().unwrap();
    assert_eq!(shown(&pod.exec(&ASK).unwrap()).0, Some(0), "the pod reaches the API server directly");
}

pub(super) fn is_done_by_values(release: &Release<'_>, pod: &Pod<'_>) {
    release.must(release.of_the_runbook(
        "helm upgrade weir deploy/helm/weir -n weir-system --reuse-values --set uninstall=true",
    ));
    let done = ["rollout", "status", "daemonset/weir-agent", "-n", NAMESPACE, READY_DEADLINE];
    release.testbed.kubectl(&done).unwrap();
    reaches_the_api_server_directly(pod);
}

/// Which of an older release's hook may have stayed on a node, and what they say there.
const OF_THE_NODE: [&str; 4] = ["ServiceAccount", "Role", "RoleBinding", "DaemonSet"];

/// Pods that a hook has left behind take nothing away from a node that boots: agents are meant to run there, and none does yet.
/// They can ask although nobody knows them and the guard denies all others the API server.
pub(super) fn is_refused_where_agents_are_meant_to_run(release: &Release<'_>, pod: &Pod<'_>) {
    let mut template = release.to_apply("template", &[]);
    template.args(["--show-only", "templates/uninstall.yaml", "--kube-version", "1.36.0"]);
    let rendered = command::run(&mut template).unwrap();
    let is_of_the_node = |object: &&str| {
        OF_THE_NODE.iter().any(|kind| object.contains(&format!("\nkind: {kind}\n")))
            && (object.contains("\n  name: weir-uninstall-node\n") || object.contains("\nkind: DaemonSet\n"))
    };
    let objects: Vec<_> = rendered.split("\n---\n").filter(is_of_the_node).collect();
    assert_eq!(objects.len(), OF_THE_NODE.len(), "{rendered}");
    let patience = "--patience, \"180\"";
    assert!(rendered.contains(patience), "{rendered}");
    let file = release.scratch.join("left-behind.yaml");
    fs::write(&file, objects.join("\n---\n").replace(patience, "--patience, \"0\"")).unwrap();
    put_guard_in_force(on_node(&["guard"]));
    is_refused(pod, "by the guard");
    release.testbed.kubectl(&["apply", "-f", file.to_str().unwrap()]).unwrap();
    let said = ["get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=weir-uninstall", "-o"];
    let said = [&said[..], &["jsonpath={.items[*].status.initContainerStatuses[*]..message}"]].concat();
    let refuses = wait_until("the pod that is left behind to refuse", DEADLINE, || {
        Ok(release.testbed.kubectl(&said)?.contains("the DaemonSet weir-agent is there").then_some(()))
    });
    assert!(refuses.is_ok(), "{:?}", release.testbed.kubectl(&said));
    is_refused(pod, "by the guard, which has stayed");
    release.testbed.kubectl(&["delete", "-f", file.to_str().unwrap()]).unwrap();
}

/// A node that is down.
const AWAY: &str = "it-away";

/// Where no pod starts, the hook waits as long as it is told, and then names the node; its Job is not put there itself, however much room
/// there is. `helm uninstall` succeeds as soon as that one is out of the cluster.
pub(super) fn names_a_node_that_is_down(release: &Release<'_>) {
    let room = json!({"cpu": "64", "memory": "256Gi", "pods": "100"});
    let node = json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": AWAY, "labels": {"kubernetes.io/os": "linux"}},
        "status": {"allocatable": room, "capacity": room, "conditions": [{"type": "Ready", "status": "Unknown"}]}});
    let _away = Away::join(release, &node);
    let hooks = command::run(&mut release.command(&["get", "hooks", "weir"])).unwrap();
    let mut hooks: Vec<Value> = serde_yaml_ng::Deserializer::from_str(&hooks)
        .map(|object| serde_json::to_value(serde_yaml_ng::Value::deserialize(object).unwrap()).unwrap())
        .collect();
    let job = hooks.iter().position(|object| object["kind"] == "Job").unwrap();
    let mut job = hooks.remove(job);
    let words = job["spec"]["template"]["spec"]["containers"][0]["command"].as_array_mut().unwrap();
    let patience = words.iter().position(|word| word == "--patience").unwrap();
    // By default it is more than three minutes.
    words[patience + 1] = json!("1");
    let hooks = json!({"apiVersion": "v1", "kind": "List", "items": hooks});
    release.testbed.apply(&hooks.to_string()).unwrap();
    ends_no_agents_later(release, job.clone());
    // How long the cluster takes for it is another matter.
    let there = format!("--field-selector=spec.nodeName={AWAY}");
    let bound =
        ["get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=weir-uninstall", "-o", "name", &there];
    wait_until("the pod of the node that is down", DEADLINE, || {
        Ok((!release.testbed.kubectl(&bound)?.is_empty()).then_some(()))
    })
    .unwrap();
    release.testbed.apply(&job.to_string()).unwrap();
    let failed = ["wait", "--for=condition=Failed", "--timeout=300s", "-n", NAMESPACE, "job/weir-uninstall"];
    let ended = release.testbed.kubectl(&failed);
    let said = release.testbed.kubectl(&["logs", "-n", NAMESPACE, "job/weir-uninstall"]).unwrap();
    ended.unwrap_or_else(|error| panic!("{error:#}: {said}"));
    let why = format!("{AWAY}: its pod is not started: does its kubelet run?");
    assert!(said.contains(&why), "{said}");
}

/// One that no node takes is over by itself, and no agent with it.
fn ends_no_agents_later(release: &Release<'_>, mut job: Value) {
    let limit = &mut job["spec"]["activeDeadlineSeconds"];
    assert!(limit.is_u64(), "{limit}");
    // By default it is some minutes.
    *limit = json!(1);
    job["metadata"]["name"] = json!("weir-uninstall-nowhere");
    job["spec"]["template"]["spec"]["nodeSelector"] = json!({"example.com/there-is": "none"});
    release.testbed.apply(&job.to_string()).unwrap();
    let name = ["-n", NAMESPACE, "job/weir-uninstall-nowhere"];
    let failed = [&["wait", "--for=condition=Failed", "--timeout=120s"], &name[..]].concat();
    release.testbed.kubectl(&failed).unwrap();
    let why = [&["get", "-o", "jsonpath={.status.conditions[*].reason}"], &name[..]].concat();
    let why = release.testbed.kubectl(&why).unwrap();
    assert!(why.contains("DeadlineExceeded"), "{why}");
    release.testbed.kubectl(&[&["delete"], &name[..]].concat()).unwrap();
    assert!(!release.pods().is_empty(), "agents run");
}

/// A node that is in the cluster while this value is there.
struct Away<'a>(&'a Testbed);

impl<'a> Away<'a> {
    fn join(release: &Release<'a>, node: &Value) -> Self {
        let away = Self(release.testbed);
        release.testbed.apply(&node.to_string()).unwrap();
        // As the cluster marks each node whose kubelet says nothing any more.
        let effects = "jsonpath={.spec.taints[?(@.key==\"node.kubernetes.io/unreachable\")].effect}";
        wait_until("the node to be marked", DEADLINE, || {
            let effects = release.testbed.kubectl(&["get", "node", AWAY, "-o", effects])?;
            Ok(effects.contains("NoSchedule").then_some(()))
        })
        .unwrap();
        away
    }
}

impl Drop for Away<'_> {
    fn drop(&mut self) {
        let _ = self.0.kubectl(&["delete", "node", "--ignore-not-found", AWAY]);
        // As the cluster does it a minute later.
        let there = format!("--field-selector=spec.nodeName={AWAY}");
        let _ = self.0.kubectl(&["delete", "pods", "-n", NAMESPACE, &there, "--force", "--grace-period=0"]);
    }
}

/// A node on which it fails is named by Helm; when that is mended, the same command succeeds.
pub(super) fn is_done_by_helm_alone(release: &Release<'_>, pod: &Pod<'_>) {
    let in_the_way = pins().join("links/of-somebody-else");
    fs::create_dir(&in_the_way).unwrap();
    let uninstall = || {
        let output = command::output(&mut release.of_the_runbook("helm uninstall weir "));
        let (code, out, error) = shown(&output.unwrap());
        (code, out + &error)
    };
    let (code, said) = uninstall();
    assert_ne!(code, Some(0), "{said}");
    let why = format!("{NODE_NAME}: `weir-agent uninstall` ended with 1: ");
    for part in [why.as_str(), in_the_way.to_str().unwrap(), "job weir-uninstall failed"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    // No pod of the hook stays that could remove what keeps pods back while the node boots.
    let sets = ["get", "daemonsets,serviceaccounts,roles,rolebindings", "-n", NAMESPACE, "-o", "name"];
    let sets = release.testbed.kubectl(&sets).unwrap();
    assert!(!sets.contains("weir-uninstall"), "{sets}");
    fs::remove_dir(&in_the_way).unwrap();
    let (code, said) = uninstall();
    assert_eq!(code, Some(0), "{said}\n{}", release.told());
    reaches_the_api_server_directly(pod);
    rights::of_the_hook_are_all_used(release.testbed);
    let left = ["get", "all,serviceaccounts,roles,rolebindings,configmaps", "-n", NAMESPACE, "-o", "name"];
    wait_until("the last of it to be gone", DEADLINE, || {
        let left = release.testbed.kubectl(&left)?;
        Ok((!left.contains("weir")).then_some(()))
    })
    .unwrap();
}

/// What the comparison rests on: it tells an installed node from one that is not, by each of these.
pub(super) fn is_seen_on_the_node(pod: &Pod<'_>, before: &NodeState) {
    let changed = NodeState::now(pod).since(before);
    let seen =
        |what: &str, text: &str| changed.get(what).into_iter().flatten().any(|line| line.contains(text));
    for (what, text) in [
        ("links", "\"cgroup\""),
        ("programs", "connect4"),
        ("maps", "CGROUPS"),
        ("files", "/sys/fs/bpf/weir"),
        ("files", "/run/weir/handover.sock"),
        ("files", NO_NRI),
        ("files", "/var/lib/weir/journal"),
        ("files", "/etc/systemd/system/weir-guard.service"),
        ("files", "/etc/systemd/system/kubelet.service.requires/weir-guard.service"),
        ("files", "/opt/weir/"),
        ("listeners in a pod", "0100007F:"),
        ("processes", "weir-agent"),
    ] {
        assert!(seen(what, text), "{what}: nothing of {text} in {changed:#?}");
    }
}

/// Once Helm has removed the release, and `weir-agent uninstall` has been run on the node itself. The journal stays, and goes as the
/// runbook says.
pub(super) fn leaves_the_node_as_it_was(pod: &Pod<'_>, before: &NodeState) {
    let said = command::run(&mut on_node(&["uninstall"])).unwrap();
    assert!(said.starts_with("removed 0 pins"), "{said}");
    let stays = |what: &str, line: &str| what == "files" && line.starts_with("+ /var/lib/weir");
    is_as_it_was(pod, before, &stays);
    let mut kept: Vec<_> = fs::read_dir(STATE).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    kept.sort();
    assert_eq!(kept, ["api-set.json", "journal"], "what the runbook names");
    let runbook = runbook();
    let comment = "# journals, too: what is not in Kafka is lost";
    let remove = runbook.lines().find_map(|line| line.trim().strip_suffix(comment)).unwrap();
    command::run(Command::new("sh").args(["-euc", remove])).unwrap();
    assert!(!Path::new(STATE).exists());
    is_as_it_was(pod, before, &|_, _| false);
}
