//! What changes while the agent runs: a pod is enrolled and let out again, and one is only observed. Whether a packet of it
//! goes to the API server directly is seen at the bridge.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
};

use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{self, ENROL_LABEL, TrustSource},
    wait_until,
};

use super::{
    DEADLINE, Scene,
    escape::{Attack, Target},
    shown,
    witness::Server,
};

/// A watch inside a pod; ends with its connection.
struct Watching(Child);

impl Watching {
    /// Waits for the first line, so that it is open.
    fn begin(attack: &Attack<'_>) -> Self {
        let mut command = attack.pod.exec_command();
        command.args(["kubectl", "get", "configmaps", "-n", &attack.pod.namespace, "-w", "-o", "name"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut first).unwrap();
        assert_eq!(first, "configmap/kube-root-ca.crt\n");
        Self(child)
    }

    fn end(mut self) {
        self.0.wait().unwrap();
    }
}

fn finding(name: &str, uid: &str) -> impl Fn(&Event) -> bool {
    move |event| {
        matches!(&event.kind, Kind::Finding { name: found, caller: Some(caller), .. }
            if found == name && caller.pod.as_ref().is_some_and(|pod| pod.uid == uid))
    }
}

fn label(scene: &Scene, namespace: &str, enrolled: bool) {
    let (key, value) = ENROL_LABEL;
    let label = if enrolled { format!("{key}={value}") } else { format!("{key}-") };
    scene.testbed.kubectl(&["label", "namespace", namespace, &label]).unwrap();
}

#[test]
fn a_pod_that_is_enrolled_while_it_runs_loses_its_direct_connections_and_one_that_is_let_out_works_as_before()
{
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-runtime", false);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-runtime", "caller")).unwrap();
    let attack = Attack::new(&scene, &pod);
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let ask = || shown(&pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap());
    let expected = (Some(0), "namespace/default\n".to_owned(), String::new());
    let class = || {
        let status = agent.status().unwrap();
        let mut pods = status["pods"].as_array().unwrap().iter();
        let found = pods.find(|found| found["uid"] == pod.uid.as_str());
        found.map(|found| found["class"].as_str().unwrap().to_owned())
    };
    let watching = Watching::begin(&attack);
    assert!(!attack.direct().is_empty(), "it goes to the API server directly");

    label(&scene, "it-runtime", true);
    scene.event("the end of what it had open", finding("directConnectionsEnded", &pod.uid));
    attack.direct();
    watching.end();
    assert_eq!(ask(), expected, "{}", agent.last_lines());
    let (said, direct) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), direct), ("connected", Vec::new()));
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), 1);
    assert_eq!(attack.try_way("raw", Target::Endpoint), ("failed EPERM".to_owned(), Vec::new()));

    label(&scene, "it-runtime", false);
    scene.event("what it is from then on", finding("notEnrolledAnyMore", &pod.uid));
    wait_until("the verdict", DEADLINE, || Ok((class().as_deref() == Some("Unselected")).then_some(())))
        .unwrap();
    assert_eq!(ask(), expected);
    assert!(!attack.direct().is_empty(), "directly, as before");
    let (said, _) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), attack.witness.check(Server::Api, None)), ("connected", 1));

    // Once more: nothing is left of the first time that would be in the way.
    label(&scene, "it-runtime", true);
    wait_until("the verdict", DEADLINE, || Ok((class().as_deref() == Some("Enrolled")).then_some(())))
        .unwrap();
    wait_until("it to be served", DEADLINE, || Ok((ask() == expected).then_some(()))).unwrap();
    attack.direct();
    let (said, direct) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), direct), ("connected", Vec::new()));
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), 1);

    // The same by the configuration, whose selection the running agent takes up.
    let written =
        || serde_yaml_ng::from_str::<Value>(&std::fs::read_to_string(agent.config()).unwrap()).unwrap();
    let (selects, mut selects_not) = (written(), written());
    selects_not["enrolment"][0]["podSelector"] = json!({"matchLabels": {"selected": "nowhere"}});
    let known = scene.events().len();
    let since = |what: &str, name: &'static str| {
        let is_it = finding(name, &pod.uid);
        wait_until(what, DEADLINE, || {
            Ok(scene.events().split_off(known).into_iter().find(|event| is_it(event)))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", agent.last_lines()))
    };
    agent::write_configuration(&selects_not, agent.config()).unwrap();
    since("what the configuration makes of it", "notEnrolledAnyMore");
    wait_until("the verdict", DEADLINE, || Ok((class().as_deref() == Some("Unselected")).then_some(())))
        .unwrap();
    let (said, _) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), attack.witness.check(Server::Api, None)), ("connected", 1));
    let watching = Watching::begin(&attack);
    assert!(!attack.direct().is_empty(), "directly, as before");
    agent::write_configuration(&selects, agent.config()).unwrap();
    since("the end of what it had open", "directConnectionsEnded");
    watching.end();
    attack.direct();
    assert_eq!(ask(), expected, "{}", agent.last_lines());
    let (said, direct) = attack.ask_by("tcp", Target::Service);
    assert_eq!((said.as_str(), direct), ("connected", Vec::new()));
    assert_eq!(attack.witness.check(Server::Weir, Some(&agent)), 1);
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
