//! `weir-agent doctor` where something is missing: exit code 1, the thing and the mend. What it says of a node where all is
//! well, and of an API server that is away, is in `api_server_faults`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use weir_tests::{
    PodSpec,
    agent::{self, TrustSource},
    certificates::Authority,
    command, wait_until,
};

use super::{DEADLINE, Scene, escape::place, shown, signer::Unsigned};

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
    fs::write(&kubeconfig, "").unwrap();
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
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
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

/// What `doctor` says by the name of a check: whether it is good, what was found, and the mend.
fn said_of(configuration: &Path) -> impl Fn(&str) -> (bool, String, String) {
    let mut command = Command::new(agent::built_binary("weir-agent").unwrap());
    let ended = command::output(command.args(["doctor", "--json", "--config"]).arg(configuration)).unwrap();
    let report: Value = serde_json::from_str(&shown(&ended).1).unwrap();
    move |name| {
        let all = report["checks"].as_array().unwrap().iter();
        let check = all.clone().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{report}"));
        (check["ok"] == true, check["found"].as_str().unwrap().to_owned(), check["mend"].to_string())
    }
}

/// The namespace's service account may do everything; then nothing; then one thing in another namespace.
fn names_service_accounts_that_hold_rights(scene: &Scene, configuration: &Path, namespace: &str) {
    let said = || said_of(configuration)("selected pods' rights");
    let account = format!("{namespace}/default");
    let (ok, found, mend) = said();
    assert!(!ok && found.contains(&format!("{account} (list namespaces everywhere, ")), "{found}");
    assert!(mend.contains("RoleBindings") && mend.contains("kubectl auth can-i --list --as="), "{mend}");

    let kubectl = |arguments: &[&str]| scene.testbed.kubectl(arguments).unwrap();
    kubectl(&["delete", "clusterrolebinding", namespace]);
    wait_until("the account to hold nothing", DEADLINE, || Ok(said().0.then_some(()))).unwrap();
    let (_, found, _) = said();
    assert!(found.starts_with("none of 1 service accounts holds any of 40 rights"), "{found}");

    let service_account = format!("--serviceaccount={namespace}:default");
    for (verb, resource, named) in [
        ("get", "configmaps", "get configmaps in kube-public"),
        ("create", "pods/attach", "create pods/attach in kube-public"),
        ("impersonate", "groups", "impersonate groups everywhere"),
        ("bind", "clusterroles.rbac.authorization.k8s.io", "bind clusterroles everywhere"),
        ("escalate", "clusterroles.rbac.authorization.k8s.io", "escalate clusterroles everywhere"),
    ] {
        let cluster = if named.ends_with("everywhere") { "cluster" } else { "" };
        let place: &[&str] = if cluster.is_empty() { &["-n", "kube-public"] } else { &[] };
        let (kind, binding) = (format!("{cluster}role"), format!("{cluster}rolebinding"));
        let right =
            [format!("--verb={verb}"), format!("--resource={resource}"), format!("--{kind}={namespace}")];
        let [verb, resource, role] = right.each_ref().map(String::as_str);
        kubectl(&[&["create", &kind, namespace, verb, resource], place].concat());
        kubectl(&[&["create", &binding, namespace, role, &service_account], place].concat());
        wait_until("the account to hold something", DEADLINE, || Ok((!said().0).then_some(()))).unwrap();
        let (_, found, _) = said();
        kubectl(&[&["delete", &format!("{kind},{binding}"), namespace], place].concat());
        assert!(found.ends_with(&format!(": {account} ({named})")), "{found}");
        wait_until("the account to hold nothing", DEADLINE, || Ok(said().0.then_some(()))).unwrap();
    }
}

/// Under which tier clients would be served; under none, what is wrong, and what to do.
fn names_the_tier_and_what_is_wrong_with_a_ca(scene: &Scene) {
    let folder = scene.scratch.path().join("own");
    fs::create_dir(&folder).unwrap();
    Authority::create(&folder, "weir-ca").unwrap();
    let (own, cluster) = (folder.join("ca.crt"), scene.testbed.layout().path("pki/ca.crt"));
    let bundle = folder.join("bundle.crt");
    fs::write(&bundle, fs::read_to_string(&own).unwrap() + &fs::read_to_string(&cluster).unwrap()).unwrap();
    let garbage = folder.join("garbage.crt");
    fs::write(&garbage, "no certificate").unwrap();
    let said = |check: &str, change: &dyn Fn(&mut Value)| {
        let mut configuration =
            agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
        change(&mut configuration["clusters"][0]);
        let path = folder.join("agent.yaml");
        agent::write_configuration(&configuration, &path).unwrap();
        said_of(&path)(check)
    };
    let own_ca = json!({"certificate": own, "key": folder.join("ca.key")});

    let (ok, found, _) = said("trust testbed", &|_| {});
    assert!(ok && found.starts_with("tier T0: "), "{found}");
    let (ok, found, _) = said("trust testbed", &|cluster| cluster["trust"] = json!({"clusterSigner": {}}));
    assert_eq!((ok, found.as_str()), (true, "tier T0: cluster signer kubernetes.io/kubelet-serving"));
    let (ok, found, _) = said("trust testbed", &|cluster| {
        cluster["trust"] = json!({"mountedCa": own_ca});
        cluster["trust"]["mountedCa"]["clientBundle"] = json!(bundle);
    });
    assert!(ok && found.starts_with("tier T1: "), "{found}");
    let (ok, found, mend) = said("trust testbed", &|cluster| cluster["trust"] = json!({"mountedCa": own_ca}));
    assert!(!ok && found.contains("does not chain to") && mend.contains("clientBundle"), "{found} {mend}");
    let (ok, found, _) = said("trust testbed", &|cluster| {
        cluster["trust"]["mountedCa"]["certificate"] = json!(garbage);
    });
    assert!(!ok && found.contains("garbage.crt is not a PEM file with the certificate of the CA"), "{found}");

    // A Secret that is mounted, without that key in it.
    let absent = folder.join("tls.crt");
    let (ok, found, mend) = said("config", &|cluster| {
        cluster["trust"]["mountedCa"]["certificate"] = json!(absent);
    });
    let named = format!("clusters[0].trust.mountedCa.certificate: cannot open {}", absent.display());
    assert!(!ok && found.contains(&named) && mend.contains("is it mounted?"), "{found} {mend}");
    let kubeconfig = fs::read_to_string(scene.testbed.layout().kubeconfig("agent")).unwrap();
    let other = folder.join("kubeconfig");
    fs::write(&other, kubeconfig.replace(cluster.to_str().unwrap(), own.to_str().unwrap())).unwrap();
    let (ok, found, mend) = said("cluster testbed", &|cluster| cluster["kubeconfig"] = json!(other));
    assert!(
        !ok && found.contains("UnknownIssuer") && mend.contains("that of this API server"),
        "{found} {mend}"
    );
    let (ok, found, _) = said("kafka", &|_| {});
    assert!(!ok && found.contains("nothing leaves this node's journal"), "{found}");
}

#[test]
fn doctor_names_selected_pods_that_could_go_past_weir() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-powers", true);
    let plain = scene.testbed.run_pod(&PodSpec::idle("it-powers", "plain")).unwrap();
    let configuration = scene.config(TrustSource::MountedCa);
    let unsigned = Unsigned::begin(&scene);
    let look = || {
        let of = said_of(&configuration);
        (of("selected pods"), of("selected pods' interfaces"))
    };
    let ((ok, found, mend), (guarded, _, _)) = look();
    assert!(ok && guarded && found.starts_with("none of 1 is privileged"), "{found}");
    assert!(
        mend.contains("detach the programs") && mend.contains("enforce=baseline"),
        "what one could do is said anyway: {mend}"
    );

    names_the_tier_and_what_is_wrong_with_a_ca(&scene);
    names_service_accounts_that_hold_rights(&scene, &configuration, "it-powers");

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
    unsigned.end_when_it_is_mended(&scene, &plain);
}
