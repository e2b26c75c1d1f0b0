//! Enrolment against the clock of a real kubelet: pods whose first instruction is an API call.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{AgentProcess, PodSpec, agent::TrustSource, wait_until};

use super::{DEADLINE, Scene};

/// Pods at a time; `WEIR_TEST_LONG` multiplies the rounds.
const PODS: usize = 30;
const ROUNDS_LONG: usize = 10;

/// Refused connections by the kernel's own account, whatever a client makes of it; a pod that is not known yet has no name
/// there.
fn refused(scene: &Scene) -> Vec<String> {
    let refused = |event: Event| match event.kind {
        Kind::ConnectionRefused { reason, .. } if reason.starts_with("denied by the kernel") => Some(reason),
        _ => None,
    };
    scene.events().into_iter().filter_map(refused).collect()
}

#[test]
fn the_first_instruction_of_a_pod_may_be_an_api_call() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-first", true);
    let agent = scene.agent(TrustSource::ClusterSigner);
    let rounds = if std::env::var_os("WEIR_TEST_LONG").is_some() { ROUNDS_LONG } else { 1 };
    for round in 0..rounds {
        check_first_calls(&scene, &agent, "it-first", &format!("first-{round}"), PODS);
    }
}

/// Pods that come at once, and whose first instruction is an API call: each is served, recorded, and none was refused.
pub(super) fn check_first_calls(
    scene: &Scene,
    agent: &AgentProcess,
    namespace: &str,
    prefix: &str,
    pods: usize,
) {
    let before = refused(scene).len();
    let names: Vec<String> = (0..pods).map(|index| format!("{prefix}-{index}")).collect();
    let script = "exec kubectl get namespace default -o name";
    let manifest = |name: &String| PodSpec { script, ..PodSpec::idle(namespace, name) }.manifest();
    let items: Vec<Value> = names.iter().map(manifest).collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    scene.testbed.apply(&list.to_string()).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let ended = wait_until("every pod to have ended", 4 * DEADLINE, || {
        let pods = scene.testbed.kubectl(&["get", "pods", "-n", namespace, "-o", "json"])?;
        let pods: Value = serde_json::from_str(&pods)?;
        let ended: BTreeMap<String, (String, String)> = pods["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|pod| matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")))
            .map(|pod| {
                (
                    text(&pod["metadata"]["name"]),
                    (text(&pod["metadata"]["uid"]), text(&pod["status"]["phase"])),
                )
            })
            .collect();
        Ok(names.iter().all(|name| ended.contains_key(name)).then_some(ended))
    })
    .unwrap();
    let events = scene.events();
    assert_eq!(refused(scene)[before..], [""; 0], "no first connection came too early");
    for name in &names {
        let (uid, phase) = &ended[name];
        let said = scene.testbed.kubectl(&["logs", "-n", namespace, name]).unwrap();
        assert_eq!(
            (phase.as_str(), said.as_str()),
            ("Succeeded", "namespace/default\n"),
            "{name}: {}",
            agent.last_lines()
        );
        check_recorded(&events, uid, name);
    }
    let pods = names.iter().map(String::as_str);
    let delete = ["delete", "pods", "-n", namespace, "--wait=true"];
    scene.testbed.kubectl(&delete.into_iter().chain(pods).collect::<Vec<_>>()).unwrap();
}

/// One session of the pod, with its request.
fn check_recorded(events: &[Event], uid: &str, name: &str) {
    let is_the_pods = |event: &&Event| {
        matches!(&event.kind, Kind::SessionStarted { caller }
            if caller.pod.as_ref().is_some_and(|pod| pod.uid == uid))
    };
    let sessions: Vec<_> = events.iter().filter(is_the_pods).map(|event| &event.session).collect();
    assert_eq!(sessions.len(), 1, "{name}");
    let recorded = events.iter().any(|event| {
        &event.session == sessions[0]
            && matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.name == "default")
    });
    assert!(recorded, "{name}");
}
