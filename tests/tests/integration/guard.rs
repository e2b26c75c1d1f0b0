//! A node that starts: what is in force before the agent is, in whichever order the parts of a node come, and how soon pods
//! work afterwards. A reboot is what it leaves behind: no pins, no agent, and the state directory.
//!
//! That no connection went around Weir is said by the far side: the watch at the bridge, and the API server's own log.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use weir_common::event::Kind;
use weir_tests::{
    AgentProcess, Pod, PodSpec,
    agent::{self, Guard, TrustSource},
    audit, command, wait_until,
};

use super::{
    DEADLINE, Scene,
    escape::{Attack, Target},
    shown,
};

/// How long after the agent is ready a pod may wait that came before it.
const AFTER_READY: Duration = Duration::from_secs(2);
/// Longer than the kubelet takes to find that there is no container runtime.
const KUBELET_PATIENCE: Duration = Duration::from_secs(20);
/// The node's own address, from which the agent connects.
const NODE: &str = "10.244.0.1";
const ASK: [&str; 6] = ["kubectl", "get", "namespace", "default", "-o", "name"];

/// What is left of the time before a reboot: an agent has run, and stored the addresses.
pub(super) fn before_reboot(scene: &Scene, attack: &Attack<'_>) -> PathBuf {
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    attack.wait_until_known(&agent);
    let file = scene.journal().with_file_name("state/api-set.json");
    let known = [Target::Service, Target::Endpoint, Target::Alias, Target::Kubelet];
    wait_until("the API set to be stored", DEADLINE, || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let stored = |target: &Target| text.contains(&format!("\"{}\"", attack.address(*target)));
        Ok(known.iter().all(stored).then_some(()))
    })
    .unwrap();
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    agent.config().to_owned()
}

/// Asks the API server from the pod again and again, beginning now; ends with the first answer.
struct Asking(Child);

impl Asking {
    fn begin(pod: &Pod<'_>) -> Self {
        // Once more when all is well: how long kubectl takes to start is the machine's.
        let script = format!(
            "while ! {0} >/dev/null 2>&1; do :; done; read answered rest < /proc/uptime; {0} >/dev/null && read again rest < /proc/uptime && \
             echo $answered $again",
            ASK.join(" ")
        );
        let mut command = pod.runtime_command("asking");
        Self(command.args(["timeout", "300", "sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// How long after `from`, an uptime in seconds, the answer came, without what attempts take by themselves: one may have been under way,
    /// and fail, and the next one takes as long, on a machine that has others to serve.
    #[track_caller]
    fn answered_after(mut self, from: f64) -> Duration {
        let mut said = String::new();
        std::io::Read::read_to_string(&mut self.0.stdout.take().unwrap(), &mut said).unwrap();
        assert!(self.0.wait().unwrap().success(), "{said}");
        let words: Vec<f64> = said.split_whitespace().map(uptime).collect();
        let [answered, again] = words[..] else { panic!("{said}") };
        Duration::from_secs_f64((answered - from - 2.0 * (again - answered)).max(0.0))
    }
}

fn uptime(text: &str) -> f64 {
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// Waits until the agent is ready; gives the uptime at which that was seen.
fn ready_at(agent: &mut AgentProcess) -> f64 {
    agent.wait_until_ready().unwrap();
    uptime(&std::fs::read_to_string("/proc/uptime").unwrap())
}

/// Requests of these pods that came to the API server from elsewhere than the agent.
pub(super) fn direct_requests(scene: &Scene, pods: &BTreeSet<String>) -> Vec<audit::AuditEntry> {
    let log = audit::read(&scene.testbed.layout().audit_log()).unwrap();
    log.into_iter()
        .filter(|entry| entry.pod_uid.as_ref().is_some_and(|uid| pods.contains(uid)))
        .filter(|entry| entry.source_ips.last().is_none_or(|address| address != NODE))
        .collect()
}

/// Whether a pod gets an answer, without a way through the API server to ask it.
#[track_caller]
pub(super) fn asks(pod: &Pod<'_>) -> (Option<i32>, String) {
    let (code, _, err) = shown(&command::output(pod.runtime_command("ask").args(ASK)).unwrap());
    (code, err)
}

#[track_caller]
pub(super) fn is_refused(pod: &Pod<'_>, when: &str) {
    let (code, err) = asks(pod);
    assert_eq!(code, Some(1), "{when}: {err}");
    assert!(err.contains("refused"), "{when}: {err}");
}

#[test]
fn after_a_reboot_pods_are_kept_from_the_api_server_until_an_agent_serves_them() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-reboot", true);
    scene.namespace("it-reboot-free", false);
    let early = scene.testbed.run_pod(&PodSpec::idle("it-reboot", "early")).unwrap();
    let attack = Attack::new(&scene, &early);
    let config = before_reboot(&scene, &attack);
    let (said, direct) = attack.try_way("tcp", Target::Service);
    assert!(!direct.is_empty(), "nothing is in force: {said} is seen");

    let guard = Guard::put_in_force(&config).unwrap();
    let run = |name| scene.testbed.run_pod(&PodSpec::idle("it-reboot", name)).unwrap();
    let late = run("late");
    let host = PodSpec { host_network: true, ..PodSpec::idle("it-reboot", "host") };
    let host = scene.testbed.run_pod(&host).unwrap();
    let free = scene.testbed.run_pod(&PodSpec::idle("it-reboot-free", "free")).unwrap();
    for pod in [&early, &late, &host, &free] {
        is_refused(pod, &pod.name);
    }
    let enforced = Attack::new(&scene, &late);
    for way in ["tcp", "mapped", "io-uring", "udp-sendto", "mptcp", "raw", "raw-fragment"] {
        for target in [Target::Service, Target::Endpoint, Target::Alias, Target::Kubelet] {
            let (said, direct) = enforced.try_way(way, target);
            assert!(said == "refused" || said == "failed EPERM", "{way} to the {target:?}: {said}");
            assert!(direct.is_empty(), "{way} to the {target:?}: the far side saw {direct:?}");
        }
    }
    assert_eq!(attack.try_from(&[], "tcp").0, "connected", "a process of the host");
    // The kubelet, the controllers and the API server itself have worked all the time: three pods have come up.
    let again = agent::guard(&config).unwrap();
    assert!(again.starts_with("in force: "), "{again}");

    let asking = [&late, &free].map(Asking::begin);
    let mut agent = guard.succeed(&config, &scene.scratch.path().join("agent.log")).unwrap();
    let ready = ready_at(&mut agent);
    for (asking, pod) in asking.into_iter().zip([&late, &free]) {
        let waited = asking.answered_after(ready);
        println!("{} was answered {} ms after the agent was ready", pod.name, waited.as_millis());
        assert!(waited <= AFTER_READY, "{}: {waited:?}", pod.name);
    }
    assert_eq!(asks(&host).0, Some(0), "{}", agent.last_lines());
    for pod in [&late, &host] {
        scene.event("the session of a pod that came before the agent", |event| {
            matches!(&event.kind, Kind::SessionStarted { caller }
                if caller.pod.as_ref().is_some_and(|found| found.uid == pod.uid))
        });
    }
    let enrolled = BTreeSet::from([late.uid.clone(), host.uid.clone()]);
    let direct = direct_requests(&scene, &enrolled);
    assert!(direct.is_empty(), "{direct:?}");
    assert!(!direct_requests(&scene, &BTreeSet::from([free.uid.clone()])).is_empty(), "the log would tell");
    assert_eq!(agent::guard(&config).unwrap(), "an agent runs on this node: nothing to do\n");
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}

#[test]
fn in_whichever_order_a_cold_node_starts_nothing_waits_for_ever_and_no_request_is_direct() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-cold", true);
    let run = |name| scene.testbed.run_pod(&PodSpec::idle("it-cold", name)).unwrap();
    let pod = run("caller");
    let attack = Attack::new(&scene, &pod);
    let config = before_reboot(&scene, &attack);
    let start = |guard: Guard, name: &str| guard.succeed(&config, &scene.scratch.path().join(name)).unwrap();
    let mut enrolled = BTreeSet::from([pod.uid.clone()]);

    // The API server comes last: neither the guard nor the agent needs it to know what to deny.
    let outage = scene.testbed.stop_api_server().unwrap();
    let guard = Guard::put_in_force(&config).unwrap();
    is_refused(&pod, "with the guard alone");
    let mut agent = start(guard, "without-api-server.log");
    wait_until("the agent to look for the API server", DEADLINE, || {
        Ok(agent.log()?.contains("API server not reached").then_some(()))
    })
    .unwrap();
    is_refused(&pod, "with an agent that knows nothing yet");
    let asking = Asking::begin(&pod);
    outage.end().unwrap();
    let waited = asking.answered_after(ready_at(&mut agent));
    println!("API server last: answered {} ms after the agent was ready", waited.as_millis());
    assert!(waited <= AFTER_READY, "{waited:?}");
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    drop(agent);

    // The agent comes last: after the pods.
    let guard = Guard::put_in_force(&config).unwrap();
    let before = run("before-agent");
    enrolled.insert(before.uid.clone());
    is_refused(&before, "before the agent");
    let asking = Asking::begin(&before);
    let mut agent = start(guard, "after-pods.log");
    let waited = asking.answered_after(ready_at(&mut agent));
    println!("agent after pods: answered {} ms after the agent was ready", waited.as_millis());
    assert!(waited <= AFTER_READY, "{waited:?}");

    // The pods come last: their first request is answered.
    enrolled.insert(first_request(&scene, "after-agent", &agent));
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    drop(agent);

    // Kubelet and container runtime come last, in either order: neither the guard nor the agent waits for them, and the kubelet
    // ends until the runtime is there.
    let mut kubelet = scene.testbed.stop_kubelet().unwrap();
    let containerd = scene.testbed.stop_containerd().unwrap();
    let guard = Guard::put_in_force(&config).unwrap();
    let has_ended = kubelet.start_in_vain(KUBELET_PATIENCE).unwrap();
    println!("without a runtime the kubelet {}", if has_ended { "ended" } else { "waited" });
    let mut agent = start(guard, "without-runtime.log");
    ready_at(&mut agent);
    containerd.end().unwrap();
    kubelet.end().unwrap();
    enrolled.insert(first_request(&scene, "after-runtime", &agent));

    let kubelet = scene.testbed.stop_kubelet().unwrap();
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    drop(agent);
    let containerd = scene.testbed.stop_containerd().unwrap();
    let guard = Guard::put_in_force(&config).unwrap();
    containerd.end().unwrap();
    kubelet.end().unwrap();
    let mut agent = start(guard, "after-kubelet.log");
    ready_at(&mut agent);
    enrolled.insert(first_request(&scene, "after-kubelet", &agent));

    let direct = direct_requests(&scene, &enrolled);
    assert!(direct.is_empty(), "{direct:?}");
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}

/// Waits until a new pod's first request, which is its first instruction, is answered; gives its UID.
fn first_request(scene: &Scene, name: &str, agent: &AgentProcess) -> String {
    let script = "exec kubectl get namespace default -o name";
    let first = PodSpec { script, ..PodSpec::idle("it-cold", name) };
    scene.testbed.apply(&first.manifest().to_string()).unwrap();
    let words = ["get", "pod", name, "-n", "it-cold", "-o", "jsonpath={.metadata.uid} {.status.phase}"];
    wait_until("the pod's first request to be answered", DEADLINE, || {
        let phase = scene.testbed.kubectl(&words)?;
        let (uid, phase) = phase.split_once(' ').unwrap_or_default();
        assert_ne!(phase, "Failed", "{name}: {}", agent.last_lines());
        Ok((phase == "Succeeded").then(|| uid.to_owned()))
    })
    .unwrap()
}

#[test]
fn a_pod_that_is_not_enrolled_and_made_while_no_agent_runs_works_within_two_seconds_of_its_return() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-system", false);
    // As a name server's, and as kube-proxy's, which is in the host's network.
    let specs = [("name-server", false), ("node-proxy", true)]
        .map(|(name, host_network)| PodSpec { host_network, ..PodSpec::idle("it-system", name) });
    let run = |spec: &PodSpec<'_>| scene.testbed.run_pod(spec).unwrap();
    let before = specs.each_ref().map(run);
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    for pod in &before {
        assert_eq!(asks(pod).0, Some(0), "{}: {}", pod.name, agent.last_lines());
    }
    agent.crash().unwrap();
    for pod in &before {
        assert_eq!(asks(pod).0, Some(0), "{}: a known one keeps its verdict", pod.name);
    }
    before.into_iter().for_each(|pod| pod.delete().unwrap());
    let after = specs.each_ref().map(run);
    for pod in &after {
        is_refused(pod, &format!("{}: a new one is not known", pod.name));
    }
    let asking = after.each_ref().map(Asking::begin);
    let log = scene.scratch.path().join("back.log");
    let mut back = AgentProcess::spawn(agent.config(), &log).unwrap();
    let ready = ready_at(&mut back);
    for (asking, pod) in asking.into_iter().zip(&after) {
        let waited = asking.answered_after(ready);
        println!("{} was answered {} ms after the agent was ready", pod.name, waited.as_millis());
        assert!(waited <= AFTER_READY, "{}: {waited:?}", pod.name);
    }
    assert!(back.terminate().unwrap().success(), "{}", back.last_lines());
}

#[test]
fn an_agent_that_cannot_start_after_a_reboot_leaves_pods_denied() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-broken", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-broken", "caller")).unwrap();
    let attack = Attack::new(&scene, &pod);
    let _ended = before_reboot(&scene, &attack);
    assert_eq!(asks(&pod).0, Some(0), "nothing is in force");
    let mut broken = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    broken["journal"]["directory"] = "/proc/weir".into();
    let path = scene.scratch.path().join("broken.yaml");
    agent::write_configuration(&broken, &path).unwrap();
    let mut agent = AgentProcess::spawn(&path, &scene.scratch.path().join("broken.log")).unwrap();
    assert_eq!(agent.wait_for_end().unwrap().code(), Some(1), "{}", agent.last_lines());
    assert!(agent.last_lines().contains("/proc/weir"), "{}", agent.last_lines());
    is_refused(&pod, "with a journal that cannot be opened");
    assert_eq!(attack.try_from(&[], "tcp").0, "connected", "a process of the host");
}
