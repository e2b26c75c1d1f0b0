//! The product on the real parts: the built `weir-agent` on the node of the testbed, real kubectl in real pods.
//!
//! Each test owns its namespaces and its agent process; they run one after another, since a node has one agent. Waits
//! are on conditions. Without root the tests say loudly that they did not run, and fail under `CI=true`.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it must be")]

use std::{
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use weir_common::event::{Event, Kind, Outcome};
use weir_tests::{
    AgentProcess, Coverage, Pod, PodSpec,
    agent::{self, TrustSource},
    audit, command,
};

use scene::Scene;

#[path = "integration/answers.rs"]
mod answers;
#[path = "integration/api_server_faults.rs"]
mod api_server_faults;
#[path = "integration/approver.rs"]
mod approver;
#[path = "integration/before.rs"]
mod before;
#[path = "integration/broker_faults.rs"]
mod broker_faults;
#[path = "integration/bundle.rs"]
mod bundle;
#[path = "integration/bystanders.rs"]
mod bystanders;
#[path = "integration/capabilities.rs"]
mod capabilities;
#[path = "integration/chart.rs"]
mod chart;
#[path = "integration/chart_values.rs"]
mod chart_values;
#[path = "integration/client.rs"]
mod client;
#[path = "integration/client_faults.rs"]
mod client_faults;
#[path = "integration/clients.rs"]
mod clients;
#[path = "integration/clock_jumps.rs"]
mod clock_jumps;
#[path = "integration/clusters.rs"]
mod clusters;
#[path = "integration/commits.rs"]
mod commits;
#[path = "integration/damage.rs"]
mod damage;
#[path = "integration/doctor.rs"]
mod doctor;
#[path = "integration/eks.rs"]
mod eks;
#[path = "integration/eks_pod.rs"]
mod eks_pod;
#[path = "integration/encodings.rs"]
mod encodings;
#[path = "integration/enrolment.rs"]
mod enrolment;
#[path = "integration/escape.rs"]
mod escape;
#[path = "integration/escape6.rs"]
mod escape6;
#[path = "integration/evidence.rs"]
mod evidence;
#[path = "integration/exec.rs"]
mod exec;
#[path = "integration/far_side.rs"]
mod far_side;
#[path = "integration/guard.rs"]
mod guard;
#[path = "integration/guides.rs"]
mod guides;
#[path = "integration/host_network.rs"]
mod host_network;
#[path = "integration/http_attacks.rs"]
mod http_attacks;
#[path = "integration/identity.rs"]
mod identity;
#[path = "integration/identity_provider.rs"]
mod identity_provider;
#[path = "integration/in_cluster.rs"]
mod in_cluster;
#[path = "integration/invocations.rs"]
mod invocations;
#[path = "integration/kafka.rs"]
mod kafka;
#[path = "integration/kafka_access.rs"]
mod kafka_access;
#[path = "integration/kafka_faults.rs"]
mod kafka_faults;
#[path = "integration/kms.rs"]
mod kms;
#[path = "integration/memory.rs"]
mod memory;
#[path = "integration/monitoring.rs"]
mod monitoring;
#[path = "integration/names.rs"]
mod names;
#[path = "integration/nested.rs"]
mod nested;
#[path = "integration/nri.rs"]
mod nri;
#[path = "integration/other_cluster.rs"]
mod other_cluster;
#[path = "integration/own_pod.rs"]
mod own_pod;
#[path = "integration/places.rs"]
mod places;
#[path = "integration/pod_kinds.rs"]
mod pod_kinds;
#[path = "integration/projections.rs"]
mod projections;
#[path = "integration/rendered.rs"]
mod rendered;
#[path = "integration/rights.rs"]
mod rights;
#[path = "integration/rules.rs"]
mod rules;
#[path = "integration/run_time.rs"]
mod run_time;
#[path = "integration/scale.rs"]
mod scale;
#[path = "integration/scene.rs"]
mod scene;
#[path = "integration/siem.rs"]
mod siem;
#[path = "integration/signer.rs"]
mod signer;
#[path = "integration/spoken.rs"]
mod spoken;
#[path = "integration/starting.rs"]
mod starting;
#[path = "integration/storage_faults.rs"]
mod storage_faults;
#[path = "integration/streams.rs"]
mod streams;
#[path = "integration/support.rs"]
mod support;
#[path = "integration/target.rs"]
mod target;
#[path = "integration/traces.rs"]
mod traces;
#[path = "integration/unready.rs"]
mod unready;
#[path = "integration/upgrade.rs"]
mod upgrade;
#[path = "integration/watch.rs"]
mod watch;
#[path = "integration/watched.rs"]
mod watched;
#[path = "integration/witness.rs"]
mod witness;

/// How long a change may take to show; far longer than it takes, also on a machine that has other things to do.
const DEADLINE: Duration = Duration::from_secs(120);

/// The built `weir`, verifying a journal.
fn verify(journal: &Path) -> Output {
    let weir = agent::built_binary("weir").unwrap();
    command::output(Command::new(weir).args(["verify", "--from"]).arg(journal)).unwrap()
}

fn shown(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// It gets the object, and patches what it has got.
const APPLY: &str = "echo '{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{\"name\":\"one\"},\"data\":{\"a\":\"d\"}}' \
     | kubectl apply -n it-same -f -";

/// Commands whose output does not depend on time; each runs twice.
const COMMANDS: [&str; 18] = [
    "kubectl get pods -n it-same -o name",
    "kubectl get configmap -n it-same absent",
    "kubectl create configmap one -n it-same --from-literal=a=b",
    "kubectl create configmap one -n it-same --from-literal=a=b",
    "kubectl get configmap one -n it-same -o jsonpath={.data}",
    "kubectl patch configmap one -n it-same -p {\"data\":{\"a\":\"c\"}}",
    APPLY,
    "kubectl delete configmap one -n it-same",
    "echo '{\"apiVersion\":\"v1\",\"kind\":\"Secret\",\"metadata\":{\"name\":\"one\"},\"stringData\":{\"a\":\"canary-4711\"}}' \
     | kubectl create -n it-same -f -",
    "kubectl get secret one -n it-same -o jsonpath={.data.a}",
    "kubectl delete secret one -n it-same",
    "kubectl get nonsense",
    "kubectl get pods -n it-same --token=wrong",
    "kubectl exec -n it-same caller -- sh -c 'echo out; echo err >&2; exit 3'",
    "kubectl exec -n it-same caller -c absent -- true",
    "echo through stdin | kubectl exec -i -n it-same caller -- cat",
    "kubectl logs -n it-same caller",
    "kubectl auth whoami -o jsonpath={.status.userInfo.username}",
];

fn run_all(pod: &Pod<'_>) -> Vec<(Option<i32>, String, String)> {
    COMMANDS.iter().map(|script| shown(&pod.exec(&["sh", "-c", script]).unwrap())).collect()
}

#[test]
fn kubectl_in_a_pod_says_the_same_with_weir_and_everything_is_recorded() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-same", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-same", "caller")).unwrap();
    let without = run_all(&pod);
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let with = run_all(&pod);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    for (script, (without, with)) in COMMANDS.iter().zip(without.iter().zip(&with)) {
        assert_eq!(without, with, "{script}");
    }
    let events = scene.events();
    // All of it: a request with a wrong token is in the log, but not as the pod's.
    let audit = audit::read(&scene.testbed.layout().audit_log()).unwrap();
    let recorded = events.iter().filter(|event| matches!(event.kind, Kind::RequestOpened(_))).count();
    assert!(recorded >= COMMANDS.len() - 1, "{recorded} requests recorded");
    assert!(matches!(events.last().unwrap().kind, Kind::AgentStopped { .. }));
    // What the pod did before the agent ran is in the audit log alone, so only the other direction holds here.
    let coverage = Coverage::compare(&audit, &events, &pod.uid);
    assert!(coverage.unaudited.is_empty(), "{:?}", coverage.unaudited);
    projections::check(&scene, &pod);
    invocations::check(&events);
    let counted = events.iter().filter_map(|event| match &event.kind {
        Kind::Coverage(coverage) => coverage.pods.iter().find(|counted| counted.uid == pod.uid),
        _ => None,
    });
    let [mut seen, mut proxied] = [0, 0];
    for counted in counted {
        assert_eq!((counted.class.as_str(), counted.passed, counted.dropped), ("enrolled", 0, 0));
        assert_eq!(counted.seen, counted.redirected, "nothing was denied");
        (seen, proxied) = (seen + counted.seen, proxied + counted.proxied);
    }
    assert!(seen > 0);
    assert_eq!(seen, proxied, "what the kernel saw of the pod reached the proxy");
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
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
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let (code, out, err) = ask(&enrolled);
    assert_eq!((code, out.as_str()), (Some(1), ""), "an agent that was told to end leaves denial: {err}");
    assert!(err.contains("refused"), "{err}");
    assert_eq!(ask(&free).0, Some(0), "a pod that is not enrolled sees no change");
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

/// Text of six random bits a byte.
fn random_text(length: usize) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = vec![0; length];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut bytes).unwrap();
    bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte & 63)])).collect()
}

/// Peak of the resident memory since it was last reset (`VmHWM`).
fn peak_resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
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
    // What is in force stays so, whatever the agent stumbles over.
    command::run(Command::new(agent::built_binary("weir-agent").unwrap()).arg("uninstall")).unwrap();
}

#[test]
fn a_pod_in_quarantine_is_cut_off_and_comes_back_when_it_is_lifted() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-quarantine", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-quarantine", "caller")).unwrap();
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let weir_agent = |arguments: &[&str]| {
        let binary = agent::built_binary("weir-agent").unwrap();
        shown(&command::output(Command::new(binary).args(arguments)).unwrap())
    };
    let ask = || shown(&pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap());
    let mut watching = pod
        .exec_command()
        .args(["kubectl", "get", "configmaps", "-n", "it-quarantine", "-w"])
        .spawn()
        .unwrap();
    let opened = scene.event(
        "the watch in the journal",
        |event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.verb == "watch"),
    );
    let (code, out, err) = weir_agent(&["quarantine", "it-quarantine/caller"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.starts_with("it-quarantine/caller is in quarantine; "), "{out}");
    let closed = scene.event("the end of the watch", |event| {
        event.request == opened.request && matches!(event.kind, Kind::RequestClosed(_))
    });
    let Kind::RequestClosed(closed) = closed.kind else { unreachable!("chosen as such") };
    assert_eq!(closed.outcome, Outcome::ClientAborted);
    watching.wait().unwrap();
    let (code, _, err) = ask();
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("refused"), "{err}");
    scene.event(
        "the quarantine",
        |event| matches!(&event.kind, Kind::Finding { name, .. } if name == "quarantined"),
    );
    scene.event("the refused connection", |event| {
        matches!(&event.kind, Kind::ConnectionRefused { reason, .. } if reason.contains("quarantine"))
    });
    // It outlives the agent.
    agent.crash().unwrap();
    let agent = scene.agent(TrustSource::ClusterSigner);
    assert_eq!(ask().0, Some(1));
    let (code, status, _) = weir_agent(&["status"]);
    assert_eq!(code, Some(0));
    assert!(status.contains("it-quarantine/caller in quarantine"), "{status}");
    assert_eq!(weir_agent(&["quarantine", "--lift", "it-quarantine/caller"]).0, Some(0));
    assert_eq!(ask().0, Some(0), "{}", agent.last_lines());
    let (code, _, err) = weir_agent(&["quarantine", "it-quarantine/absent"]);
    assert_eq!(code, Some(1));
    assert!(err.contains("no pod it-quarantine/absent is known on this node"), "{err}");
}
