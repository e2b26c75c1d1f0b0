//! `weir-agent doctor` where something is missing: exit code 1, the thing and the mend. What it says of a node where all is
//! well, and of an API server that is away, is in `api_server_faults`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use weir_tests::{
    PodSpec,
    agent::{self, TrustSource},
    command,
};

use super::{Scene, escape::place, shown};

/// Runs `doctor --json` without any capability, whoever runs the test.
fn doctor(configuration: &Path) -> (Option<i32>, Vec<Value>) {
    let binary = agent::built_binary("weir-agent").unwrap();
    if nix::unistd::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.arg("--bounding-set=-all").arg(binary);
        said_by(command, configuration)
    } else {
        said_by(Command::new(binary), configuration)
    }
}

fn said_by(mut command: Command, configuration: &Path) -> (Option<i32>, Vec<Value>) {
    let ended = command::output(command.args(["doctor", "--json", "--config"]).arg(configuration)).unwrap();
    let (code, out, err) = shown(&ended);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    assert_eq!(report["ok"], false, "{out}");
    (code, report["checks"].as_array().unwrap().clone())
}

#[track_caller]
fn check(checks: &[Value], name: &str, found: &str, mend: &str) {
    let check =
        checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}: {checks:?}"));
    assert_eq!((&check["ok"], &check["need"]), (&json!(false), &json!("must")), "{check}");
    let has = |field: &str, part: &str| check[field].as_str().is_some_and(|text| text.contains(part));
    assert!(has("found", found) && has("mend", mend), "{check}");
}

/// A configuration whose cluster is not there.
fn configured(scratch: &Path) -> PathBuf {
    let kubeconfig = scratch.join("kubeconfig");
    std::fs::write(&kubeconfig, "").unwrap();
    let configuration = json!({
        "apiVersion": "weir.dev/v1alpha1",
        "kind": "AgentConfiguration",
        "journal": {"directory": scratch.join("journal")},
        "clusters": [{
            "name": "testbed",
            "kubeconfig": kubeconfig,
            "trust": {"mountedCa": {"certificate": "/absent/ca.crt", "key": "/absent/ca.key"}},
        }],
        "enrolment": [{"namespaceSelector": {}, "podSelector": {}, "mode": "enforce"}],
    });
    let path = scratch.join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    path
}

#[test]
fn doctor_names_a_missing_right_and_a_missing_ca_with_the_mend() {
    let scratch = tempfile::tempdir().unwrap();
    let (code, checks) = doctor(&configured(scratch.path()));
    assert_eq!(code, Some(1));
    check(&checks, "capabilities", "CAP_BPF", "run as root");
    let missing = "clusters[0].trust.mountedCa.certificate: cannot open /absent/ca.crt";
    check(&checks, "config", missing, "is it mounted?");
}

#[test]
fn doctor_names_a_cgroup_tree_that_is_mounted_read_only() {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var("CI").is_err(), "a mount namespace needs root");
        eprintln!("DID NOT RUN: a mount namespace needs root");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of_v2 = mounts.lines().find(|line| line.contains(" - cgroup2 ")).unwrap();
    let tree = of_v2.split(' ').nth(4).unwrap();
    // In a mount namespace of its own: nothing else sees it read-only.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c"]);
    command.arg(format!("mount -o remount,bind,ro {tree} && exec \"$0\" \"$@\""));
    command.arg(agent::built_binary("weir-agent").unwrap());
    let (code, checks) = said_by(command, &configured(scratch.path()));
    assert_eq!(code, Some(1));
    check(&checks, "cgroup v2, writable", tree, "read-write");
}

#[test]
fn doctor_names_selected_pods_that_could_go_past_weir() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-powers", true);
    let plain = scene.testbed.run_pod(&PodSpec::idle("it-powers", "plain")).unwrap();
    let configuration = scene.config(TrustSource::MountedCa);
    let look = || {
        let mut command = Command::new(agent::built_binary("weir-agent").unwrap());
        let ended =
            command::output(command.args(["doctor", "--json", "--config"]).arg(&configuration)).unwrap();
        let report: Value = serde_json::from_str(&shown(&ended).1).unwrap();
        let of = |name: &str| {
            let all = report["checks"].as_array().unwrap().iter();
            let check = all.clone().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{report}"));
            (check["ok"] == true, check["found"].as_str().unwrap().to_owned(), check["mend"].to_string())
        };
        (of("selected pods"), of("selected pods' interfaces"))
    };
    let ((ok, found, mend), (guarded, _, _)) = look();
    assert!(ok && guarded && found.starts_with("none of 1 is privileged"), "{found}");
    assert!(
        mend.contains("detach the programs") && mend.contains("enforce=baseline"),
        "what one could do is said anyway: {mend}"
    );

    let mut manifest = PodSpec::idle("it-powers", "powerful").manifest();
    manifest["spec"]["hostPID"] = json!(true);
    manifest["spec"]["containers"][0]["securityContext"] = json!({"privileged": true});
    scene.testbed.apply(&manifest.to_string()).unwrap();
    // A device without an end on the host, as macvlan and ipvlan networks give pods one.
    let (_, pid) = place(&plain);
    let macvlan = ["ip", "link", "add", "link", "eth0", "name", "mac9", "type", "macvlan"];
    command::run(Command::new("nsenter").args(["-t", &pid, "-n"]).args(macvlan)).unwrap();
    let ((ok, found, _), (guarded, ends, mend)) = look();
    assert!(
        !ok && found.contains("it-powers/powerful (hostPID, privileged)") && !found.contains("plain"),
        "{found}"
    );
    assert!(!guarded && ends.contains("it-powers/plain (mac9)") && mend.contains("NET_RAW"), "{ends}");
}
