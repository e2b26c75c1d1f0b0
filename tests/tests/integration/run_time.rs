//! What changes while the agent runs: a pod is enrolled and let out again, and one is only observed. Whether a packet of it
//! goes to the API server directly is seen at the bridge.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Lines},
    process::{Child, ChildStdout, Command, Stdio},
};

use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, Pod, PodSpec,
    agent::{self, ENROL_LABEL, TrustSource},
    command,
    testbed::API_CLUSTER_IP,
    wait_until,
};

use super::{
    DEADLINE, Scene,
    escape::{Attack, Target, endpoint},
    shown,
    witness::Server,
};

/// Of the pods that are enrolled and let out.
const NAMESPACE: &str = "it-runtime";

/// A watch of the namespace's configmaps; ends with its connection.
struct Watching {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watching {
    /// By this kubectl. Waits for the first line, so that it is open.
    fn begin(mut kubectl: Command) -> Self {
        kubectl.args(["get", "configmaps", "-n", NAMESPACE, "-w", "-o", "name"]);
        let mut process = kubectl.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut watching = Self { process, lines };
        assert!(watching.hears("kube-root-ca.crt"));
        watching
    }

    /// By the kubectl of a pod.
    fn in_pod(pod: &Pod<'_>) -> Self {
        let mut kubectl = pod.exec_command();
        kubectl.arg("kubectl");
        Self::begin(kubectl)
    }

    /// Whether it hears of this before it ends.
    fn hears(&mut self, name: &str) -> bool {
        let heard = format!("configmap/{name}");
        self.lines.by_ref().map(Result::unwrap).any(|line| line == heard)
    }

    #[track_caller]
    fn end(mut self) {
        wait_until("the watch to end", DEADLINE, || Ok(self.process.try_wait()?)).unwrap();
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Who else in the host's network has connections to the same API server.
struct Bystanders<'a> {
    scene: &'a Scene,
    watches: [(&'static str, Watching); 2],
    /// The API server's port, and the kubelet's connections there.
    kubelet: (u16, BTreeSet<String>),
    heard: usize,
}

impl<'a> Bystanders<'a> {
    /// This pod, which is not enrolled; a process of the host; and the kubelet.
    fn begin(scene: &'a Scene, pod: &Pod<'_>) -> Self {
        // Those that are held up end as well.
        let mut in_pod = pod.exec_command();
        in_pod.args(["timeout", "300", "kubectl"]);
        let mut on_host = scene.testbed.kubectl_command();
        on_host.args(["--server", &format!("https://{API_CLUSTER_IP}"), "--request-timeout=300s"]);
        let watches = [("another pod", in_pod), ("a process of the host", on_host)];
        let watches = watches.map(|(whose, kubectl)| (whose, Watching::begin(kubectl)));
        let port = endpoint(scene).port();
        let kubelet = connections_of_kubelet(port);
        assert!(!kubelet.is_empty());
        Self { scene, watches, kubelet: (port, kubelet), heard: 0 }
    }

    /// All of them are still there, and what is said goes over them.
    #[track_caller]
    fn go_on(&mut self, agent: &AgentProcess) {
        self.heard += 1;
        let name = format!("heard-{}", self.heard);
        self.scene.testbed.kubectl(&["create", "configmap", &name, "-n", NAMESPACE]).unwrap();
        for (whose, watching) in &mut self.watches {
            assert!(watching.hears(&name), "{whose} has lost its connection: {}", agent.last_lines());
        }
        let (port, before) = &self.kubelet;
        let now = connections_of_kubelet(*port);
        let lost: Vec<_> = before.difference(&now).collect();
        assert!(lost.is_empty(), "the kubelet has lost {lost:?}: {}", agent.last_lines());
    }
}

/// Both ends of each to a server at this port.
fn connections_of_kubelet(port: u16) -> BTreeSet<String> {
    let peer = format!(":{port}");
    let all = command::run(Command::new("ss").args(["-Htnp", "state", "established"])).unwrap();
    let ends = all.lines().filter(|line| line.contains("(\"kubelet\",")).map(|line| {
        let mut words = line.split_whitespace().skip(2);
        [words.next().unwrap(), words.next().unwrap()].map(str::to_owned)
    });
    ends.filter(|[_, to]| to.ends_with(&peer)).map(|ends| ends.join(" ")).collect()
}

/// Puts a pod into quarantine, or lets it out; returns what is said.
fn quarantine(pod: &Pod<'_>, options: &[&str]) -> Value {
    let mut quarantine = Command::new(agent::built_binary("weir-agent").unwrap());
    quarantine.args(["quarantine", "--json"]).args(options).arg(format!("{NAMESPACE}/{}", pod.name));
    serde_json::from_str(&command::run(&mut quarantine).unwrap()).unwrap()
}

fn finding(name: &str, uid: &str) -> impl Fn(&Event) -> bool {
    move |event| {
        matches!(&event.kind, Kind::Finding { name: found, caller: Some(caller), .. }
            if found == name && caller.pod.as_ref().is_some_and(|pod| pod.uid == uid))
    }
}

/// Waits until both are of this class.
#[track_caller]
fn become_class(agent: &AgentProcess, pods: [&Pod<'_>; 2], class: &str) {
    wait_until("the verdict", DEADLINE, || {
        let status = agent.status()?;
        let of = |uid: &str| status["pods"].as_array().unwrap().iter().find(|found| found["uid"] == uid);
        let is_it = |pod: &&Pod<'_>| of(&pod.uid).is_some_and(|found| found["class"] == class);
        Ok(pods.iter().all(is_it).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", agent.last_lines()));
}

/// In quarantine, what a pod has open is ended, and nothing of others in its network.
fn quarantine_ends_its_own(agent: &AgentProcess, host: &Pod<'_>, bystanders: &mut Bystanders<'_>) {
    let watching = Watching::in_pod(host);
    assert_eq!(quarantine(host, &[])["connectionsEnded"], 1);
    watching.end();
    bystanders.go_on(agent);
    let (code, _, refusal) = shown(&host.exec(&["kubectl", "get", "namespace", "default"]).unwrap());
    assert!(code == Some(1) && refusal.contains("was refused"), "{code:?} {refusal}");
    quarantine(host, &["--lift"]);
}

/// What a pod is told.
fn ask(pod: &Pod<'_>) -> (Option<i32>, String, String) {
    shown(&pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap())
}

/// What it must be told.
fn answer() -> (Option<i32>, String, String) {
    (Some(0), "namespace/default\n".to_owned(), String::new())
}

fn label(scene: &Scene, enrolled: bool) {
    let (key, value) = ENROL_LABEL;
    let label = if enrolled { format!("{key}={value}") } else { format!("{key}-") };
    scene.testbed.kubectl(&["label", "namespace", NAMESPACE, &label]).unwrap();
}

/// Both are let out and enrolled by the configuration, whose selection the running agent takes up.
fn by_the_configuration(
    agent: &AgentProcess,
    (pod, host): (&Pod<'_>, &Pod<'_>),
    attack: &Attack<'_>,
    bystanders: &mut Bystanders<'_>,
) {
    let written =
        || serde_yaml_ng::from_str::<Value>(&std::fs::read_to_string(agent.config()).unwrap()).unwrap();
    let (selects, mut selects_not) = (written(), written());
    selects_not["enrolment"][0]["podSelector"] = json!({"matchLabels": {"selected": "nowhere"}});
    let known = bystanders.scene.events().len();
    let since = |what: &str, name: &'static str| {
        let is_it = finding(name, &pod.uid);
        wait_until(what, DEADLINE, || {
            Ok(bystanders.scene.events().split_off(known).into_iter().find(|event| is_it(event)))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", agent.last_lines()))
    };
    agent::write_configuration(&selects_not, agent.config()).unwrap();
    since("what the configuration makes of it", "notEnrolledAnyMore");
    become_class(agent, [pod, host], "Unselected");
    let (said, _) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), attack.witness.check(Server::Api, None)), ("connected", 1));
    let watching = [pod, host].map(Watching::in_pod);
    assert!(!attack.direct().is_empty(), "directly, as before");
    agent::write_configuration(&selects, agent.config()).unwrap();
    since("the end of what it had open", "directConnectionsEnded");
    watching.into_iter().for_each(Watching::end);
    bystanders.go_on(agent);
    attack.direct();
    assert_eq!(ask(pod), answer(), "{}", agent.last_lines());
    let (said, direct) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), direct), ("connected", Vec::new()));
    assert_eq!(attack.witness.check(Server::Weir, Some(agent)), 1);
}

#[test]
fn a_pod_that_is_enrolled_while_it_runs_loses_its_direct_connections_and_one_that_is_let_out_works_as_before()
{
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace(NAMESPACE, false);
    scene.namespace("it-runtime-others", false);
    // In the host's network a pod's connections are among those of others. All start at the same time.
    let on_host = |namespace, name| PodSpec { host_network: true, ..PodSpec::idle(namespace, name) };
    let (host, other) = (on_host(NAMESPACE, "host"), on_host("it-runtime-others", "other"));
    for pod in [&host, &other] {
        scene.testbed.apply(&pod.manifest().to_string()).unwrap();
    }
    let pod = scene.testbed.run_pod(&PodSpec::idle(NAMESPACE, "caller")).unwrap();
    let [host, other] = [host, other].map(|pod| scene.testbed.run_pod(&pod).unwrap());
    let attack = Attack::new(&scene, &pod);
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let (ask, expected) = (|| ask(&pod), answer());
    let is = |class: &str| become_class(&agent, [&pod, &host], class);
    let mut bystanders = Bystanders::begin(&scene, &other);
    let watching = [&pod, &host].map(Watching::in_pod);
    assert!(!attack.direct().is_empty(), "it goes to the API server directly");

    label(&scene, true);
    for pod in [&pod, &host] {
        scene.event("the end of what it had open", finding("directConnectionsEnded", &pod.uid));
    }
    attack.direct();
    watching.into_iter().for_each(Watching::end);
    bystanders.go_on(&agent);
    assert_eq!(ask(), expected, "{}", agent.last_lines());
    let (said, direct) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), direct), ("connected", Vec::new()));
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), 1);
    assert_eq!(attack.try_way("raw", Target::Endpoint), ("failed EPERM".to_owned(), Vec::new()));

    label(&scene, false);
    scene.event("what it is from then on", finding("notEnrolledAnyMore", &pod.uid));
    is("Unselected");
    assert_eq!(ask(), expected);
    assert!(!attack.direct().is_empty(), "directly, as before");
    let (said, _) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), attack.witness.check(Server::Api, None)), ("connected", 1));

    quarantine_ends_its_own(&agent, &host, &mut bystanders);

    // Once more: nothing is left of the first time that would be in the way.
    label(&scene, true);
    is("Enrolled");
    wait_until("it to be served", DEADLINE, || Ok((ask() == expected).then_some(()))).unwrap();
    attack.direct();
    let (said, direct) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), direct), ("connected", Vec::new()));
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), 1);

    by_the_configuration(&agent, (&pod, &host), &attack, &mut bystanders);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}

#[test]
fn a_pod_that_is_observed_sees_no_change_and_what_would_become_of_it_is_counted_and_recorded() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-observe", true);
    let labels = &[("mode", "observed")];
    let observed = PodSpec { labels, ..PodSpec::idle("it-observe", "observed") };
    let observed = scene.testbed.run_pod(&observed).unwrap();
    let enforced = scene.testbed.run_pod(&PodSpec::idle("it-observe", "enforced")).unwrap();
    // The watch sees both, and what is left of a direct connection may come late: the one without comes first.
    let attacks = [&enforced, &observed].map(|pod| Attack::new(&scene, pod));
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    // The first that fits counts.
    let enforce = configuration["enrolment"][0].clone();
    let mut observe = enforce.clone();
    (observe["podSelector"], observe["mode"]) =
        (json!({"matchLabels": {"mode": "observed"}}), json!("observe"));
    configuration["enrolment"] = json!([observe, enforce]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    for (attack, server) in attacks.iter().zip([Server::Weir, Server::Api]) {
        attack.direct();
        let (said, direct) = attack.ask_by("tcp", Target::Service);
        assert_eq!((said.as_str(), direct.is_empty()), ("connected", server == Server::Weir), "{server:?}");
        let by = (server == Server::Weir).then_some(&agent);
        assert_eq!(attack.witness.check(server, by), 1, "{server:?}");
    }
    let (said, direct) = attacks[1].try_way("raw", Target::Endpoint);
    assert_eq!((said.as_str(), direct.is_empty()), ("sent", false), "guards leave it alone as well");
    let status = agent.status().unwrap();
    let of =
        |uid: &str| status["pods"].as_array().unwrap().iter().find(|pod| pod["uid"] == uid).cloned().unwrap();
    let (free, bound) = (of(&observed.uid), of(&enforced.uid));
    let count = |pod: &serde_json::Value, counter: &str| pod["counters"][counter].as_u64().unwrap();
    assert_eq!((&free["class"], count(&free, "wouldRedirect")), (&json!("Observed"), 1), "{free}");
    assert_eq!((&bound["class"], count(&bound, "redirected")), (&json!("Enrolled"), 1), "{bound}");
    scene.event("what would have become of it", finding("wouldRedirect", &observed.uid));
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}
