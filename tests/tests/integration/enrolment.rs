//! Enrolment against the clock of a real kubelet: pods whose first instruction is an API call.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{AgentProcess, Folder, PodSpec, agent::TrustSource, testbed::API_CLUSTER_IP, wait_until};

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
    let calls = FirstCalls { scene: &scene, namespace: "it-first", frames_by: None };
    for round in 0..rounds {
        calls.check(&agent, &format!("first-{round}"), PODS);
    }
}

/// Pods that come at once, and whose first instruction is an API call.
pub(super) struct FirstCalls<'a> {
    pub(super) scene: &'a Scene,
    pub(super) namespace: &'a str,
    /// The program that sends a frame to the API server before that.
    pub(super) frames_by: Option<&'a Path>,
}

impl FirstCalls<'_> {
    /// Each is served, recorded, and none was refused.
    pub(super) fn check(&self, agent: &AgentProcess, prefix: &str, pods: usize) {
        let Self { scene, namespace, .. } = *self;
        let before = refused(scene).len();
        let names: Vec<String> = (0..pods).map(|index| format!("{prefix}-{index}")).collect();
        self.start(&names);
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
        // Where programs decide in the kernel's security hooks, there is no socket for a frame.
        let frame = if self.frames_by.is_some() { ["sent\n", "failed EPERM\n"] } else { [""; 2] };
        for name in &names {
            let (uid, phase) = &ended[name];
            let said = scene.testbed.kubectl(&["logs", "-n", namespace, name]).unwrap();
            let said = frame.iter().find_map(|frame| said.strip_prefix(frame)).unwrap_or(&said);
            assert_eq!(
                (phase.as_str(), said),
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

    fn start(&self, names: &[String]) {
        const FOLDER: &str = "/weir-first";
        const CALL: &str = "exec kubectl get namespace default -o name";
        let (mut script, mut folders) = (CALL.to_owned(), Vec::new());
        if let Some(program) = self.frames_by {
            let name = program.file_name().unwrap().to_str().unwrap();
            script = format!("{FOLDER}/{name} frame {API_CLUSTER_IP}:443; {CALL}");
            folders.push(Folder::new(program.parent().unwrap().to_owned(), FOLDER));
        }
        let spec =
            |name| PodSpec { script: &script, folders: &folders, ..PodSpec::idle(self.namespace, name) };
        let items: Vec<Value> = names.iter().map(|name| spec(name).manifest()).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        self.scene.testbed.apply(&list.to_string()).unwrap();
    }
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
