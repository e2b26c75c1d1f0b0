//! Enrolment against the clock of a real kubelet: pods whose first instruction is an API call.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{PodSpec, agent::TrustSource, wait_until};

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
    let before = refused(&scene).len();
    let rounds = if std::env::var_os("WEIR_TEST_LONG").is_some() { ROUNDS_LONG } else { 1 };
    for round in 0..rounds {
        let names: Vec<String> = (0..PODS).map(|index| format!("first-{round}-{index}")).collect();
        let items: Vec<Value> = names
            .iter()
            .map(|name| {
                let script = "exec kubectl get namespace default -o name";
                PodSpec { script, ..PodSpec::idle("it-first", name) }.manifest()
            })
            .collect();
        scene
            .testbed
            .apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string())
            .unwrap();
        let ended = wait_until("every pod to have ended", 4 * DEADLINE, || {
            let pods = scene.testbed.kubectl(&["get", "pods", "-n", "it-first", "-o", "json"])?;
            let pods: Value = serde_json::from_str(&pods)?;
            let ended: BTreeMap<String, (String, String)> = pods["items"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|pod| matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")))
                .map(|pod| {
                    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                    let metadata = &pod["metadata"];
                    (text(&metadata["name"]), (text(&metadata["uid"]), text(&pod["status"]["phase"])))
                })
                .collect();
            Ok((ended.len() == PODS).then_some(ended))
        })
        .unwrap();
        let events = scene.events();
        assert_eq!(refused(&scene)[before..], [""; 0], "no first connection came too early");
        for name in &names {
            let (uid, phase) = &ended[name];
            let said = scene.testbed.kubectl(&["logs", "-n", "it-first", name]).unwrap();
            assert_eq!(
                (phase.as_str(), said.as_str()),
                ("Succeeded", "namespace/default\n"),
                "{name}: {}",
                agent.last_lines()
            );
            let sessions: Vec<_> = events
                .iter()
                .filter(|event| {
                    matches!(&event.kind, Kind::SessionStarted { caller }
                        if caller.pod.as_ref().is_some_and(|pod| pod.uid == *uid))
                })
                .map(|event| &event.session)
                .collect();
            assert_eq!(sessions.len(), 1, "{name}");
            let recorded = events.iter().any(|event| {
                &event.session == sessions[0]
                    && matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.name == "default")
            });
            assert!(recorded, "{name}");
        }
        scene.testbed.kubectl(&["delete", "pods", "--all", "-n", "it-first", "--wait=true"]).unwrap();
    }
}
