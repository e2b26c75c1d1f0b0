//! The chart on the node: installed by Helm with an image of the built binaries, upgraded under load, its admission policy,
//! and removed. The agent of these tests is a container with the chart's rights, and none more.

use std::{path::Path, process::Command};

use weir_common::event::Kind;
use weir_tests::{Clients, PodSpec, agent, command, progress::Progress, testbed::NODE_NAME, wait_until};

use super::{
    DEADLINE, Scene,
    approver::answers_agents_alone,
    bundle,
    guides::{self, with_kubectl},
    rendered::{are_known_no_more, is_what_the_api_server_takes},
    rights, shown,
};
use node_state::NodeState;
pub(super) use release::{NAMESPACE, Release, runbook};

#[path = "chart/admission.rs"]
mod admission;
#[path = "chart/crash.rs"]
mod crash;
#[path = "chart/node_state.rs"]
mod node_state;
#[path = "chart/reboot.rs"]
mod reboot;
#[path = "chart/release.rs"]
mod release;
#[path = "chart/removal.rs"]
mod removal;
#[path = "chart/renewal.rs"]
mod renewal;
#[path = "chart/runner.rs"]
mod runner;
#[path = "chart/scraped.rs"]
mod scraped;
#[path = "chart/signing.rs"]
mod signing;
#[path = "chart/upgrade.rs"]
mod upgrade;

/// Where no runtime of this node has an NRI, nor a folder for it.
const NO_NRI: &str = "/run/weir-test-no-nri";
/// What keeps pods off a node without an agent.
const STARTUP_TAINT: &str = "weir.dev/agent-not-ready=:NoSchedule";
/// One that keeps no pod of the test away.
const OTHER_TAINT: &str = "example.com/runners=:PreferNoSchedule";
const OTHER_TAINT_LIFTED: &str = "example.com/runners-";
const ASK: [&str; 6] = ["kubectl", "get", "namespace", "default", "-o", "name"];
pub(super) const JOURNAL: &str = "/var/lib/weir/journal";

#[test]
fn the_chart_installs_upgrades_under_load_and_removes_itself() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-chart", true);
    scene.namespace(runner::NAMESPACE, true);
    scene.namespace("it-chart-free", false);
    let clients = Clients::install(Progress::Shown).unwrap();
    let spec = PodSpec { folders: clients.folders(), ..PodSpec::idle("it-chart", "caller") };
    let pod = scene.testbed.run_pod(&spec).unwrap();
    let free = scene.testbed.run_pod(&PodSpec::idle("it-chart-free", "free")).unwrap();
    let release = Release::new(&scene);
    let ask = || shown(&pod.exec(&ASK).unwrap());
    let guides = guides::Node {
        testbed: release.testbed,
        scratch: release.scratch,
        helm: &|arguments| release.command(arguments),
        in_agent: &|arguments| release.in_agent(arguments),
    };
    let _signed = release.testbed.sign_for(renewal::LIFE).unwrap();
    is_what_the_api_server_takes(&guides);
    guides::values_are_taken(&guides);
    let first = PodSpec::idle("it-chart", "first");
    a_pod_waits_for_the_startup_taint(&release, &first);
    let keys = signing::Keys::make(&release);
    runner::goes_on_by_the_guides_rule(&release, &scene);
    release.change_values(|all| all["config"]["intentAnnotations"] = guides::intent_annotations());
    release.must_install(&["startupTaint=true"]);
    takes_the_startup_taint_off_and_may_change_nothing_else(&release);
    let first = scene.testbed.run_pod(&first).unwrap();
    assert_eq!(shown(&first.exec(&ASK).unwrap()).0, Some(0), "the pod that has waited");
    first.delete().unwrap();
    answers_agents_alone((release.testbed, release.scratch), (&pod.name, &pod.uid));
    assert_eq!(ask(), (Some(0), "namespace/default\n".to_owned(), String::new()));
    let is_recorded = || {
        let events = agent::read_events(Path::new(JOURNAL))?;
        Ok(events.iter().any(|event| matches!(event.kind, Kind::RequestOpened(_))).then_some(()))
    };
    wait_until("the pod's request in the node's journal", DEADLINE, is_recorded).unwrap();
    let client = renewal::Client::begin(&release, &pod, &clients);
    is_verified_as_its_notes_say(&release, &guides);
    is_privileged_and_the_approver_is_not(&release);
    tells_of_itself_in_its_container(&release);
    admission::refuses_pods_that_could_reach_past_weir(&release);
    runner::works_unchanged(&release, &scene);
    guides::are_run(&guides);
    client.lives_past_the_first_certificate(&release);
    renewal::its_key_is_in_no_file(&release);
    renewal::the_approver_leaves_no_core_dump();
    upgrade::is_upgraded_under_load(&release, &pod, &keys.both());
    are_known_no_more(release.testbed);
    crash::a_stopped_agent_is_not_ready(&release);
    crash::an_agent_that_ends_again_and_again_is_told_of(&release, &pod, &free);
    reboot::is_kept_from_the_api_server_through_reboots(&release, &scene, &pod);
    rights::are_all_used(release.testbed);
    keys.new_alone();
    bundle::is_given_where_pods_would_not_trust_the_agent(&release, &clients, &pod);
    keys.have_signed();
    removal::names_a_node_that_is_down(&release);
    let removed = command::output(&mut release.command(&["uninstall", "weir", "--wait"])).unwrap();
    assert!(removed.status.success(), "{:?}", shown(&removed));
    wait_until("the last pod to be gone", DEADLINE, || Ok(release.pods().is_empty().then_some(()))).unwrap();
    removal::reaches_the_api_server_directly(&pod);
}

#[test]
fn helm_uninstall_leaves_the_node_as_it_was_or_says_where_it_fails() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-chart", true);
    let clients = Clients::install(Progress::Shown).unwrap();
    let spec = PodSpec { folders: clients.folders(), ..PodSpec::idle("it-chart", "caller") };
    let pod = scene.testbed.run_pod(&spec).unwrap();
    let release = Release::new(&scene);
    // A run that was cut short may have left it.
    let _ = std::fs::remove_dir(NO_NRI);
    let before = NodeState::now(&pod);
    let no_nri = format!("config.nri.socket={NO_NRI}/nri.sock");
    let values = ["startupTaint=true", no_nri.as_str()];
    release.must_install(&values);
    assert_eq!(shown(&pod.exec(&ASK).unwrap()), (Some(0), "namespace/default\n".to_owned(), String::new()));
    removal::is_seen_on_the_node(&pod, &before);
    removal::is_done_by_values(&release, &pod);
    assert!(!Path::new(NO_NRI).exists(), "the folder that the agent's mount has made");
    removal::is_refused_where_agents_are_meant_to_run(&release, &pod);
    release.must_apply(&values);
    removal::is_done_by_helm_alone(&release, &pod);
    removal::leaves_the_node_as_it_was(&pod, &before);
}

/// What Helm prints after the installation, run as it stands there.
fn is_verified_as_its_notes_say(release: &Release<'_>, node: &guides::Node<'_>) {
    let notes = command::run(&mut release.command(&["get", "notes", "weir"])).unwrap();
    let commands: Vec<_> = notes.lines().filter_map(|line| line.strip_prefix("    kubectl ")).collect();
    let agent = release.pods()[0]["metadata"]["name"].as_str().unwrap().to_owned();
    let said: Vec<_> = commands
        .iter()
        .map(|command| {
            let command = command
                .replace(" exec POD ", &format!(" exec {agent} "))
                .replace("namespace NAME ", "namespace it-chart ");
            command::run(&mut with_kubectl(node.testbed, &format!("kubectl {command}"))).unwrap()
        })
        .collect();
    let of = |part: &str| {
        let at = commands.iter().position(|command| command.contains(part));
        said[at.unwrap_or_else(|| panic!("no {part} in {notes}"))].as_str()
    };
    assert!(of(" rollout status ").contains("successfully rolled out"), "{said:?}");
    assert!(of(" logs deployment/weir-approver").contains("approved"), "{said:?}");
    assert!(of(" weir-agent doctor ").contains("tier T0: cluster signer"), "{said:?}");
    assert!(of(" weir-agent status").contains("enrolled"), "{said:?}");
    assert!(of("label namespace ").contains("it-chart"), "{said:?}");
    assert!(of(" get pods -o wide").contains(&agent), "{said:?}");
    assert!(of(" weir sessions ").contains("caller"), "{said:?}");
    assert_eq!(commands.len(), 7, "{notes}");
}

/// The API server says which pods a level of the pod security standards would not have let in.
fn is_privileged_and_the_approver_is_not(release: &Release<'_>) {
    let warned = |level: &str| {
        let label = format!("pod-security.kubernetes.io/enforce={level}");
        let mut command = release.testbed.kubectl_command();
        command.args(["label", "--dry-run=server", "--overwrite", "namespace", NAMESPACE, &label]);
        let (code, _, said) = shown(&command::output(&mut command).unwrap());
        assert_eq!(code, Some(0), "{said}");
        said
    };
    let said = warned("baseline");
    assert!(said.contains("weir-agent-") && said.contains("host namespaces"), "{said}");
    let said = warned("restricted");
    assert!(said.contains("weir-agent-") && !said.contains("weir-approver-"), "{said}");
    assert!(!warned("privileged").contains("weir-agent-"), "as the runbook labels it");
}

/// What the runbook has typed there when something is wrong: by the chart's rights, on its root that nothing is written to.
fn tells_of_itself_in_its_container(release: &Release<'_>) {
    let text = runbook();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("AGENT weir-agent support "));
    let (options, _) = line.unwrap().split_once(" > ").unwrap();
    let words: Vec<_> = ["weir-agent", "support"].into_iter().chain(options.split(' ')).collect();
    let bundle = release.in_agent(&words);
    assert!(bundle.status.success(), "{}", String::from_utf8_lossy(&bundle.stderr));
    let archive = release.scratch.join("support.tar.gz");
    std::fs::write(&archive, &bundle.stdout).unwrap();
    let part = |name: &str| {
        let mut unpack = Command::new("tar");
        unpack.args(["--wildcards", "-xzOf"]).arg(&archive).arg(format!("*/{name}"));
        command::run(&mut unpack).unwrap()
    };
    for (name, expected) in [
        ("status.json", "\"ready\": true"),
        ("kernel.json", "\"CGROUPS\""),
        ("metrics.txt", "weir_ready 1"),
        ("doctor.txt", "tier T0: cluster signer"),
        ("configuration.yaml", "weir.dev/v1alpha1"),
        ("journal.txt", "mask.key"),
        ("log.txt", "kubectl -n NAMESPACE logs"),
    ] {
        let said = part(name);
        assert!(said.contains(expected), "{name}: {said}\n{}", part("README.txt"));
    }
    let file = ["--config", "/etc/weir/config/agent.yaml"];
    let explain = [&["weir-agent", "explain"], &file[..], &["--pod", "it-chart/caller"]].concat();
    let (code, said, error) = shown(&release.in_agent(&explain));
    assert!(code == Some(0) && said.contains("caller"), "{said}{error}");
}

/// Without an agent the node takes no pod that does not tolerate the taint.
fn a_pod_waits_for_the_startup_taint(release: &Release<'_>, pod: &PodSpec<'_>) {
    release.testbed.kubectl(&["taint", "node", NODE_NAME, STARTUP_TAINT]).unwrap();
    release.testbed.apply(&pod.manifest().to_string()).unwrap();
    let why = "jsonpath={.status.phase}: {.status.conditions[?(@.type==\"PodScheduled\")].message}";
    wait_until("the pod to wait", DEADLINE, || {
        let said = release.testbed.kubectl(&["get", "pod", pod.name, "-n", pod.namespace, "-o", why])?;
        Ok((said.starts_with("Pending: ") && said.contains("untolerated taint")).then_some(()))
    })
    .unwrap();
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
    // Nor of other taints, which keep pods off its node that are not meant for it.
    release.testbed.kubectl(&["taint", "node", NODE_NAME, OTHER_TAINT]).unwrap();
    for change in [
        r#"{"metadata": {"annotations": {"a": "b"}}}"#,
        r#"{"spec": {"taints": null}}"#,
        r#"{"spec": {"taints": [{"key": "example.com/runners", "effect": "NoSchedule"}]}}"#,
        r#"{"spec": {"taints": [{"key": "example.com/runners", "effect": "PreferNoSchedule"}, {"key": "b", "effect": "NoExecute"}]}}"#,
    ] {
        refused(&["patch", "--type=merge", "-p", change], &[&of_node], "and changes nothing else");
    }
    release.testbed.kubectl(&["taint", "node", NODE_NAME, OTHER_TAINT_LIFTED]).unwrap();
}
