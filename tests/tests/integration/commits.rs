//! What kubectl is told while the journal or Kafka is behind, the emergency switch, and a neighbour of a pod that floods.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{AgentProcess, Pod, PodSpec, agent, agent::TrustSource, command, wait_until};

use super::{
    DEADLINE, Scene,
    client::Requests,
    kafka::{PUBLISHED_DEADLINE, kafka, publishing},
    monitoring::Monitored,
    shown, verify,
};

/// `weir-agent emergency`, with what it said.
fn emergency(arguments: &[&str]) -> (Option<i32>, String, String) {
    let binary = agent::built_binary("weir-agent").unwrap();
    shown(&command::output(Command::new(binary).arg("emergency").args(arguments)).unwrap())
}

/// Changes `recording` of a running agent's configuration.
#[track_caller]
pub(super) fn change(agent: &AgentProcess, configuration: &mut Value, recording: Value) {
    let before = agent.log().unwrap().matches("configuration changed").count();
    configuration["recording"] = recording;
    agent::write_configuration(configuration, agent.config()).unwrap();
    wait_until("the change to be taken", DEADLINE, || {
        Ok((agent.log()?.matches("configuration changed").count() > before).then_some(()))
    })
    .unwrap();
}

fn findings(events: &[Event], wanted: &str) -> Vec<String> {
    let message = |event: &Event| match &event.kind {
        Kind::Finding { name, message, .. } if name == wanted => Some(message.clone()),
        _ => None,
    };
    events.iter().filter_map(message).collect()
}

fn with_metrics(scene: &Scene, recording: Value) -> (Value, AgentProcess, Monitored) {
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["recording"] = recording;
    let (agent, monitored) = Monitored::start_with(scene, configuration.clone());
    let written = std::fs::read_to_string(agent.config()).unwrap();
    (serde_yaml_ng::from_str(&written).unwrap(), agent, monitored)
}

/// Takes the switch back, whatever becomes of the test.
struct Off;

impl Drop for Off {
    fn drop(&mut self) {
        emergency(&["off"]);
    }
}

/// Of one namespace body and output are on record, of the other neither, but that it was done.
#[track_caller]
fn check_unsaid(events: &[Event]) {
    let says = |text: &str, event: &Event| match &event.kind {
        Kind::Content(content) => {
            content.bytes.to_vec().unwrap().windows(text.len()).any(|part| part == text.as_bytes())
        }
        _ => false,
    };
    let count = |text: &str| events.iter().filter(|event| says(text, event)).count();
    assert!(count("two") > 0 && count("unsaid") == 0);
    assert!(count("infull-created") > 0 && count("infull-shown") > 0, "one namespace is in full");
    let closed =
        |event: &&Event| matches!(&event.kind, Kind::RequestClosed(closed) if closed.exit_code == Some(0));
    assert_eq!(events.iter().filter(closed).count(), 2, "how each command ended is on record");
    // kubectl gets the pod before it runs a command in it.
    let done = |event: &&Event| {
        matches!(&event.kind, Kind::RequestOpened(opened)
            if opened.attributes.namespace == "it-elsewhere"
                && (opened.attributes.resource == "configmaps" || opened.execution.is_some()))
    };
    assert_eq!(events.iter().filter(done).count(), 2, "that it was done is on record");
}

/// A body and an output in each of two namespaces.
#[track_caller]
fn in_full_and_elsewhere(pod: &Pod<'_>) {
    pod.shell("kubectl create configmap infull-created -n it-behind").unwrap();
    let echo = "kubectl exec -n it-behind caller -- sh -c \"echo in''full-shown\"";
    assert_eq!(pod.shell(echo).unwrap().trim(), "infull-shown");
    pod.shell("kubectl create configmap unsaid -n it-elsewhere").unwrap();
    let echo = "kubectl exec -n it-elsewhere other -- sh -c \"echo un''said\"";
    assert_eq!(pod.shell(echo).unwrap().trim(), "unsaid");
}

#[test]
fn kubectl_is_told_why_it_is_refused_and_only_an_emergency_that_is_allowed_lets_it_through() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-behind", true);
    scene.namespace("it-elsewhere", false);
    scene.testbed.run_pod(&PodSpec::idle("it-elsewhere", "other")).unwrap();
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-behind", "caller")).unwrap();
    // Without Kafka the journal itself is the backlog; it has more bytes than one.
    let full = json!({"backlog": {"bytesMax": 1}});
    let (mut configuration, mut agent, monitored) = with_metrics(&scene, full);
    let create = |name: &str| {
        shown(&pod.exec(&["kubectl", "create", "configmap", name, "-n", "it-behind", "-o", "name"]).unwrap())
    };
    let refused = |(code, out, err): (Option<i32>, String, String)| {
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        let why = "the request cannot be recorded, so it is not forwarded: the journal holds more than its operator allows; \
                   the operator must see to Kafka or make room";
        assert!(err.contains(why), "{err}");
        err
    };
    let said = refused(create("refused"));
    assert!(said.starts_with("error: failed to create configmap: the request"), "{said}");
    let read = pod.exec(&["kubectl", "get", "--raw", "/api/v1/namespaces/default"]).unwrap();
    let said = refused(shown(&read));
    assert!(said.starts_with("Error from server (ServiceUnavailable): the request"), "{said}");

    let _off = Off;
    let config = agent.config().to_str().unwrap().to_owned();
    let on = ["on", "--config", &config, "--reason", "the test wants it", "--for", "5m"];
    let (code, _, err) = emergency(&on);
    assert!(code == Some(1) && err.contains("does not allow an emergency"), "{err}");
    change(&agent, &mut configuration, json!({"backlog": {"bytesMax": 1}, "emergency": {"secondsMax": 600}}));
    refused(create("refused"));
    let (code, out, err) = emergency(&on);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("300 seconds"), "{out}");
    scene.event(
        "the finding",
        |event| matches!(&event.kind, Kind::Finding { name, .. } if name == "emergencyBegan"),
    );
    let relaxed = "weir_recording_relaxed{what=\"emergency\"}";
    wait_until("the emergency", DEADLINE, || Ok((monitored.metrics()[relaxed] == 1.0).then_some(())))
        .unwrap();
    assert_eq!(create("one"), (Some(0), "configmap/one\n".to_owned(), String::new()));
    assert_eq!(agent.status().unwrap()["emergency"]["reason"], "the test wants it");
    assert!(monitored.get("/readyz").unwrap().1.contains("an emergency is on"));

    // It outlives the agent.
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let mut agent =
        AgentProcess::start(Path::new(&config), &scene.scratch.path().join("second.log")).unwrap();
    wait_until("the emergency", DEADLINE, || Ok((monitored.metrics()[relaxed] == 1.0).then_some(())))
        .unwrap();
    assert_eq!(create("two").0, Some(0));
    assert!(monitored.metrics()["weir_emergency_requests_total"] >= 1.0);
    assert_eq!(emergency(&["off"]).0, Some(0));
    wait_until("its end", DEADLINE, || Ok((monitored.metrics()[relaxed] == 0.0).then_some(()))).unwrap();
    refused(create("refused"));
    // Of one namespace the rules want all, of others to know that it happens, not what is said.
    let full = json!({"level": "RequestResponse", "namespaces": ["it-behind"]});
    change(
        &agent,
        &mut configuration,
        json!({"rules": [full, {"level": "Metadata", "streams": "metadata"}]}),
    );
    in_full_and_elsewhere(&pod);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());

    let events = scene.events();
    check_unsaid(&events);
    let began = findings(&events, "emergencyBegan");
    assert_eq!(began.len(), 2, "each run of the agent says so: {began:?}");
    assert!(began[0].contains("the test wants it") && began[0].contains("begun by root"), "{began:?}");
    assert_eq!(findings(&events, "emergencyEnded").len(), 1);
    assert_eq!(findings(&events, "recordingRulesChanged").len(), 2);
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", shown(&verified));
}

#[test]
fn while_kafka_is_away_for_too_long_requests_are_refused_or_lose_their_bodies_or_wait_until_it_is_back() {
    let Some(mut scene) = Scene::new() else { return };
    let mut kafka = kafka();
    scene.namespace("it-late", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-late", "caller")).unwrap();
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["kafka"] = publishing(&kafka.bootstrap());
    configuration["recording"] = json!({"backlog": {"ageSecondsMax": 10}});
    let (agent, _monitored) = Monitored::start_with(&scene, configuration);
    let written = std::fs::read_to_string(agent.config()).unwrap();
    let mut configuration: Value = serde_yaml_ng::from_str(&written).unwrap();
    let mut requests = Requests::new(&scene.testbed, &pod);
    assert_eq!(requests.create("before", 10).status, 201);
    kafka.kill().unwrap();
    let mut number = 0;
    let refused = wait_until("a refusal", PUBLISHED_DEADLINE, || {
        number += 1;
        let answer = requests.create(&format!("while-{number}"), 10);
        Ok((answer.status != 201).then_some(answer))
    })
    .unwrap();
    assert_eq!(refused.status, 503, "{}", refused.head);
    assert!(refused.head.to_ascii_lowercase().contains("retry-after: 1"), "{}", refused.head);
    let status: Value = serde_json::from_slice(&refused.body).unwrap();
    assert!(
        status["message"].as_str().unwrap().ends_with("the operator must see to Kafka or make room"),
        "{status}"
    );
    let recording = |when| json!({"backlog": {"ageSecondsMax": 10, "waitSeconds": 60}, "whenBehind": when});
    change(&agent, &mut configuration, recording("metadataOnly"));
    let answer = requests.create("without-its-body", 10);
    assert_eq!(answer.status, 201, "{}", answer.head);
    let left_out = scene.event("a request without its body", |event| {
        let Kind::RequestOpened(opened) = &event.kind else { return false };
        let body = opened.body.as_ref().and_then(|body| body.truncated.as_deref());
        body.is_some_and(|why| why.starts_with("left out: the journal holds more"))
    });
    scene.event("a gap that says so", |event| {
        let Kind::Gap { reason, .. } = &event.kind else { return false };
        event.request == left_out.request && reason.starts_with("bodies of this request are left out")
    });

    change(&agent, &mut configuration, recording("block"));
    let waited = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let since = Instant::now();
            (requests.create("that-waits", 10), since.elapsed())
        });
        // As long as it takes to start a broker it is not answered, and then it is.
        kafka.restart().unwrap();
        asked.join().unwrap()
    });
    assert_eq!(waited.0.status, 201, "{}", waited.0.head);
    assert!(waited.1 > Duration::from_secs(1), "it waited for {:?} alone", waited.1);
    wait_until("requests to go on", PUBLISHED_DEADLINE, || {
        number += 1;
        Ok((requests.create(&format!("after-{number}"), 10).status == 201).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", agent.last_lines()));
}

#[test]
fn a_pod_that_floods_is_told_to_wait_and_its_neighbour_notices_nothing() {
    const READS: usize = 30;
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-flood", true);
    let greedy = scene.testbed.run_pod(&PodSpec::idle("it-flood", "greedy")).unwrap();
    let quiet = scene.testbed.run_pod(&PodSpec::idle("it-flood", "quiet")).unwrap();
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    // The least that there is, so that a slow machine has it exceeded as well.
    configuration["limits"] = json!({"podBytesPerSecond": 1 << 20, "podBurstBytes": 1 << 20});
    configuration["recording"] = json!({"backlog": {"waitSeconds": 0}});
    let (agent, monitored) = Monitored::start_with(&scene, configuration);
    let (mut flood, mut calm) =
        (Requests::new(&scene.testbed, &greedy), Requests::new(&scene.testbed, &quiet));
    let mut number = 0;
    let refused = wait_until("the pod to be over its quota", DEADLINE, || {
        number += 1;
        let answer = flood.create(&format!("flood-{number}"), 900_000);
        Ok((answer.status != 201).then_some(answer))
    })
    .unwrap();
    assert_eq!(refused.status, 429, "{}", refused.head);
    let status: Value = serde_json::from_slice(&refused.body).unwrap();
    assert_eq!(status["reason"], "TooManyRequests", "{status}");
    for read in 0..READS {
        let since = Instant::now();
        // It goes on flooding: what it owes is paid back at 1 MiB a second.
        let _ = flood.create(&format!("more-{read}"), 900_000);
        let answer = calm.create(&format!("calm-{read}"), 10);
        assert_eq!(answer.status, 201, "{} after {:?}", answer.head, since.elapsed());
    }
    let over = "weir_proxy_requests_total{cluster=\"testbed\",verdict=\"over_quota\"}";
    assert!(monitored.metrics()[over] >= 1.0, "{}", agent.last_lines());
}
