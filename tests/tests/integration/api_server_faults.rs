//! The API server away: when the agent starts, and while it runs.

use std::process::Command;

use weir_common::event::{Channel, Kind, Outcome};
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{self, TrustSource},
    command, wait_until,
};

use super::{DEADLINE, Scene, shown};

/// `weir-agent doctor` with this configuration.
fn doctor(configuration: &std::path::Path, more: &[&str]) -> (Option<i32>, String, String) {
    let binary = agent::built_binary("weir-agent").unwrap();
    let mut command = Command::new(binary);
    shown(&command::output(command.args(["doctor", "--config"]).arg(configuration).args(more)).unwrap())
}

#[test]
fn while_the_api_server_is_away_clients_are_told_and_an_agent_that_starts_waits_for_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-away", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-away", "caller")).unwrap();
    let mut agent = scene.agent(TrustSource::MountedCa);
    let ask = |id: &str, verb: &[&str]| {
        shown(&command::output(pod.runtime_command(id).arg("kubectl").args(verb)).unwrap())
    };
    let read = ["get", "namespace", "default", "-o", "name"];
    // ctr says things of its own on standard error.
    let (code, out, err) = ask("before", &read);
    assert_eq!((code, out.as_str()), (Some(0), "namespace/default\n"), "{err}");
    let (code, report, _) = doctor(agent.config(), &["--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!((code, &report["ok"]), (Some(0), &true.into()), "{report}");

    let outage = scene.testbed.stop_api_server().unwrap();
    for (id, verb, method) in [
        ("read", &read[..], "GET"),
        ("write", &["delete", "configmap", "absent", "-n", "it-away"][..], "DELETE"),
    ] {
        let (code, out, err) = ask(id, verb);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
        assert!(err.contains("the API server of cluster \"testbed\" cannot be reached"), "{err}");
        assert!(err.contains("(ServiceUnavailable)"), "kubectl takes it for a Status: {err}");
        // The record of its end comes behind the answer.
        scene.event(
            "the failed request in the record",
            |event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.method == method && opened.uri.contains("names")
                && scene_closed(&scene, event.request.as_deref(), Outcome::UpstreamFailed)),
        );
    }
    let (code, report, _) = doctor(agent.config(), &[]);
    assert_eq!(code, Some(1), "{report}");
    assert!(report.contains("MISSING  cluster testbed"), "{report}");
    assert!(report.contains("-> is the API server up"), "{report}");

    // One that starts now keeps trying, less and less often, and lets nobody through meanwhile.
    agent.crash().unwrap();
    let log = scene.scratch.path().join("waiting.log");
    let mut waiting = AgentProcess::spawn(&scene.config(TrustSource::MountedCa), &log).unwrap();
    wait_until("the agent to have tried again, later", DEADLINE, || {
        let log = waiting.log()?;
        let tried = |pause: &str| log.contains(&format!("retry_in_ms={pause}"));
        Ok((log.contains("API server not reached") && tried("500") && tried("1000")).then_some(()))
    })
    .unwrap();
    let (code, _, err) = ask("meanwhile", &read);
    assert_eq!(code, Some(1), "{err}");
    outage.end().unwrap();
    waiting.wait_until_ready().unwrap();
    assert_eq!(ask("after", &read).0, Some(0), "{}", waiting.last_lines());
}

fn scene_closed(scene: &Scene, request: Option<&str>, outcome: Outcome) -> bool {
    scene.events().iter().any(|event| {
        event.request.as_deref() == request
            && matches!(&event.kind, Kind::RequestClosed(closed) if closed.outcome == outcome)
    })
}

#[test]
fn an_agent_that_runs_serves_again_when_the_api_server_is_back() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-back", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-back", "caller")).unwrap();
    let agent = scene.agent(TrustSource::ClusterSigner);
    let ask = || shown(&pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap());
    assert_eq!(ask().0, Some(0));
    pod.shell("kubectl exec -n it-back caller -- sh -c 'echo begun; sleep 1000' >/dev/null 2>&1 &").unwrap();
    let began = scene.event(
        "a stream to have begun",
        |event| matches!(&event.kind, Kind::Content(content) if content.channel == Channel::Stdout),
    );
    let outage = scene.testbed.stop_api_server().unwrap();
    let cut = scene.event("the end of the stream", |event| {
        event.request == began.request && matches!(event.kind, Kind::RequestClosed(_))
    });
    let Kind::RequestClosed(cut) = cut.kind else { unreachable!() };
    assert_eq!((cut.outcome, cut.exit_code), (Outcome::UpstreamFailed, None), "{:?}", cut.reason);
    let during = command::output(pod.runtime_command("during").args(["kubectl", "version"])).unwrap();
    assert!(!during.status.success(), "{:?}", shown(&during));
    outage.end().unwrap();
    assert_eq!(ask(), (Some(0), "namespace/default\n".to_owned(), String::new()), "{}", agent.last_lines());
    // What it watches is followed again: a pod that is made now is enrolled.
    let later = scene.testbed.run_pod(&PodSpec::idle("it-back", "later")).unwrap();
    wait_until("the pod that came after the outage to be served", DEADLINE, || {
        Ok(later.shell("kubectl get namespace default").is_ok().then_some(()))
    })
    .unwrap();
    scene.event("the session of the pod that came after the outage", |event| {
        matches!(&event.kind, Kind::SessionStarted { caller } if caller.pod.as_ref().is_some_and(|pod| pod.uid == later.uid))
    });
}
