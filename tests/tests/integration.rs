//! The product on the real parts: the built `weir-agent` on the node of the testbed, real kubectl in real pods.
//!
//! Each test owns its namespaces and its agent process; they run one after another, since a node has one agent. Waits
//! are on conditions. Without root the tests say loudly that they did not run, and fail under `CI=true`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it must be")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use weir_common::event::{Event, Kind, Outcome};
use weir_tests::{
    AgentProcess, Pod, PodSpec, Testbed,
    agent::{self, ENROL_LABEL, TrustSource},
    command,
    progress::Progress,
    wait_until,
};

#[path = "integration/exec.rs"]
mod exec;

/// A node has one agent.
static ONE_AGENT: Mutex<()> = Mutex::new(());
/// How long a change may take to show.
const DEADLINE: Duration = Duration::from_secs(30);

/// A test's testbed, namespaces and journal.
struct Scene {
    testbed: Testbed,
    namespaces: Vec<String>,
    scratch: tempfile::TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Scene {
    /// None only where the test cannot run for lack of privilege, outside CI.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var("CI").is_err(), "integration tests need root");
            eprintln!("DID NOT RUN: integration tests need root");
            return None;
        }
        let one = ONE_AGENT.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = Testbed::default_folder().unwrap();
        let testbed = Testbed::up(&folder, Progress::Shown).unwrap().down_on_drop();
        let scratch = tempfile::tempdir().unwrap();
        Some(Self { testbed, namespaces: Vec::new(), scratch, _one: one })
    }

    /// A namespace whose default service account may do everything, enrolled or not.
    fn namespace(&mut self, name: &str, enrolled: bool) {
        self.namespaces.push(name.to_owned());
        let labels: &[_] = if enrolled { &[ENROL_LABEL] } else { &[] };
        self.testbed.create_namespace(name, labels).unwrap();
        let binding = format!(
            "{{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {{name: {name}}},
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}},
subjects: [{{kind: ServiceAccount, name: default, namespace: {name}}}]}}"
        );
        self.testbed.apply(&binding).unwrap();
    }

    fn journal(&self) -> PathBuf {
        self.scratch.path().join("journal")
    }

    fn config(&self, trust: TrustSource) -> PathBuf {
        let path = self.scratch.path().join("agent.yaml");
        let configuration = agent::configuration(&self.testbed, &self.journal(), trust);
        agent::write_configuration(&configuration, &path).unwrap();
        path
    }

    fn agent(&self, trust: TrustSource) -> AgentProcess {
        AgentProcess::start(&self.config(trust), &self.scratch.path().join("agent.log")).unwrap()
    }

    fn events(&self) -> Vec<Event> {
        agent::read_events(&self.journal()).unwrap()
    }

    /// Waits until an event is in the journal.
    #[track_caller]
    fn event(&self, what: &str, is_it: impl Fn(&Event) -> bool) -> Event {
        wait_until(what, DEADLINE, || Ok(self.events().into_iter().find(|event| is_it(event)))).unwrap()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            let _ = self.testbed.kubectl(&["delete", "clusterrolebinding", namespace]);
            let _ = self.testbed.delete_namespace(namespace);
        }
    }
}

/// The built `weir`, verifying a journal.
fn verify(journal: &Path) -> Output {
    let weir = agent::built_binary("weir").unwrap();
    command::output(Command::new(weir).args(["verify", "--from"]).arg(journal)).unwrap()
}

fn shown(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_pod_is_refused_while_the_agent_is_dead_and_served_when_it_is_back() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-dead", true);
    scene.namespace("it-free", false);
    let enrolled = scene.testbed.run_pod(&PodSpec::idle("it-dead", "caller")).unwrap();
    let free = scene.testbed.run_pod(&PodSpec::idle("it-free", "caller")).unwrap();
    let ask =
        |pod: &Pod<'_>| shown(&pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap());
    let mut agent = scene.agent(TrustSource::MountedCa);
    assert_eq!(ask(&enrolled), (Some(0), "namespace/default\n".to_owned(), String::new()));
    agent.crash().unwrap();
    let (code, out, err) = ask(&enrolled);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("refused"), "{err}");
    assert_eq!(ask(&free).0, Some(0), "a pod that is not enrolled sees no change");
    let mut agent = scene.agent(TrustSource::MountedCa);
    assert_eq!(ask(&enrolled).0, Some(0), "{}", agent.last_lines());
    agent.terminate().unwrap();
    let epochs =
        std::fs::read_dir(scene.journal()).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir());
    assert_eq!(epochs.count(), 2, "each process has its own epoch");
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}

#[test]
fn what_is_no_request_is_closed_and_recorded() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-garbage", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-garbage", "caller")).unwrap();
    let _agent = scene.agent(TrustSource::ClusterSigner);
    let refused = |event: &Event| {
        matches!(&event.kind, Kind::ConnectionRefused { caller: Some(caller), .. }
            if caller.pod.as_ref().is_some_and(|found| found.uid == pod.uid))
    };
    assert!(!scene.events().iter().any(refused));
    let sent =
        r"printf 'GET / HTTP/1.1\r\nHost: x\r\n\r\n' | timeout 20 nc 10.96.0.1 443 | head -c 100 | wc -c";
    let answered = pod.shell(sent).unwrap();
    assert!(answered.trim().parse::<usize>().unwrap() < 100, "{answered}");
    scene.event("the refused connection in the journal", refused);
}

#[test]
fn a_watch_that_is_open_at_sigterm_ends_within_the_drain_and_is_closed_in_the_record() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-drain", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-drain", "caller")).unwrap();
    let mut configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
    configuration["limits"] = serde_json::json!({"drainSeconds": 1});
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    let mut watching =
        pod.exec_command().args(["kubectl", "get", "configmaps", "-n", "it-drain", "-w"]).spawn().unwrap();
    let opened = scene.event(
        "the watch in the journal",
        |event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.verb == "watch"),
    );
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    watching.wait().unwrap();
    let closed = scene.events().into_iter().find_map(|event| match event.kind {
        Kind::RequestClosed(closed) if event.request == opened.request => Some(closed.outcome),
        _ => None,
    });
    assert_eq!(closed, Some(Outcome::Drained));
}

#[test]
fn a_mistake_in_the_configuration_is_named_with_its_place() {
    let Some(scene) = Scene::new() else { return };
    let wrong = |change: &dyn Fn(&mut serde_json::Value), expected: &str| {
        let mut configuration =
            agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
        change(&mut configuration);
        let path = scene.scratch.path().join("wrong.yaml");
        agent::write_configuration(&configuration, &path).unwrap();
        let binary = agent::built_binary("weir-agent").unwrap();
        let ended = command::output(Command::new(binary).args(["run", "--config"]).arg(&path)).unwrap();
        let (code, _, err) = shown(&ended);
        assert_eq!(code, Some(1), "{err}");
        assert!(err.contains(expected), "{err:?} has no {expected:?}");
    };
    wrong(&|config| config["journall"] = true.into(), "unknown field `journall`");
    wrong(&|config| config["clusters"][0]["addresses"] = "x".into(), "clusters[0].addresses");
    wrong(
        &|config| config["clusters"][0]["trust"]["mountedCa"]["certificate"] = "/absent/ca.crt".into(),
        "clusters[0].trust.mountedCa.certificate: cannot open /absent/ca.crt",
    );
    wrong(&|config| config["journal"]["directory"] = "/proc/weir".into(), "/proc/weir");
    // A CA of somebody else: readable, but pods would not trust what it signs.
    let other = scene.testbed.layout().path("pki");
    let front = std::fs::read_dir(&other).unwrap().flatten().map(|entry| entry.path()).find(|path| {
        path.extension().is_some_and(|extension| extension == "crt") && !path.ends_with("ca.crt")
    });
    let certificate = front.expect("another certificate of the testbed");
    let key = certificate.with_extension("key");
    wrong(
        &|config| {
            config["clusters"][0]["trust"]["mountedCa"] =
                serde_json::json!({"certificate": certificate, "key": key});
        },
        certificate.to_str().unwrap(),
    );
}
