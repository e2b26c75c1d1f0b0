//! Rules in the hands of an operator: the file changes while the agent runs, `weir-agent explain` says what they would do, and
//! `weir-agent doctor` which rights of the agent they lack.

use std::{path::Path, process::Command};

use serde_json::{Value, json};
use weir_common::event::Kind;
use weir_tests::{Pod, agent, command, wait_until};

use super::{
    DEADLINE, Scene,
    client::token,
    identity::{configured, pod, powerless, said, start},
    shown,
};

fn weir_agent(arguments: &[&str], config: &Path) -> (Option<i32>, String, String) {
    let binary = agent::built_binary("weir-agent").unwrap();
    shown(&command::output(Command::new(binary).args(arguments).arg("--config").arg(config)).unwrap())
}

fn whoami(pod: &Pod<'_>) -> String {
    said(&pod.exec(&["kubectl", "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"]).unwrap())
}

fn denial() -> Value {
    json!([{"name": "nobody", "when": "serviceAccount == 'powerless'", "deny": {"message": "not today"}}])
}

#[test]
fn rules_change_while_the_agent_runs_and_explain_says_what_they_do() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-rules", true);
    powerless(&scene, "it-rules");
    let runner = pod(&scene, "it-rules", "runner");
    let agent = start(&scene, denial());
    let answer = whoami(&runner);
    assert!(answer.contains("is denied by rule \"nobody\"") && answer.contains("not today"), "{answer}");
    let tokens = scene.scratch.path().join("token");
    std::fs::write(&tokens, token(&runner)).unwrap();
    let explain = || {
        let token = tokens.to_str().unwrap();
        let request = "DELETE /api/v1/namespaces/it-rules/pods/runner";
        weir_agent(&["explain", "--token", token, "--request", request], agent.config())
    };
    let (code, out, err) = explain();
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("pod         it-rules/runner (uid ") && out.contains(&runner.uid), "{out}");
    assert!(
        out.contains("identity    token")
            && out.contains("  user      system:serviceaccount:it-rules:powerless")
    );
    assert!(out.contains("rule        nobody: holds: serviceAccount == 'powerless'"), "{out}");
    assert!(out.contains("refused     ") && out.contains("not today"), "{out}");
    let signature = token(&runner).rsplit('.').next().unwrap().to_owned();
    assert!(!format!("{out}{err}").contains(&signature), "no token is shown");

    // `explain` reads the file; the agent follows within seconds, and no connection is lost for it.
    configured(
        &scene,
        json!([
            {"name": "readers", "when": "request.verb == 'get'", "impersonate": {"user": "'weir:reader'"}},
            {"name": "runners", "when": "true", "impersonate": {"user": "'weir:' + pod.name"}},
        ]),
    );
    let (code, out, err) = explain();
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("rule        readers: does not hold: request.verb == 'get'"), "{out}");
    assert!(
        out.contains("rule        runners: holds: true") && out.contains("  user      weir:runner"),
        "{out}"
    );
    wait_until("the rules to change", DEADLINE, || Ok((whoami(&runner) == "weir:runner").then_some(())))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", agent.last_lines()));

    // What is invalid changes nothing, and is said.
    configured(&scene, json!([{"name": "typo", "when": "usr.username == 'x'", "passThrough": {}}]));
    wait_until("the status to say so", DEADLINE, || {
        Ok(agent.status()?["agent"].to_string().contains("clusters[0].roles[0].when").then_some(()))
    })
    .unwrap();
    assert_eq!(whoami(&runner), "weir:runner");
    let refused = |kind: &Kind| matches!(kind, Kind::Finding { name, .. } if name == "configurationRefused");
    scene.event("the finding", |event| refused(&event.kind));
    let (code, _, err) = explain();
    assert!(code == Some(1) && err.contains("clusters[0].roles[0].when"), "{err}");

    configured(&scene, denial());
    wait_until("the rules to be the first again", DEADLINE, || {
        Ok(whoami(&runner).contains("not today").then_some(()))
    })
    .unwrap();
    assert!(!agent.status().unwrap()["agent"].to_string().contains("clusters[0]"));
}

#[test]
fn doctor_names_the_extra_attributes_that_the_agent_may_not_impersonate() {
    let Some(scene) = Scene::new() else { return };
    let check = |extra: Value| {
        let role = json!([{"name": "all", "when": "true", "impersonate": {"user": "'x'", "extra": extra}}]);
        let (_, out, err) = weir_agent(&["doctor", "--json"], &configured(&scene, role));
        let report: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
        let checks = report["checks"].as_array().unwrap().clone();
        checks.into_iter().find(|check| check["name"] == "impersonation testbed").expect("it is looked at")
    };
    let good = check(json!({"example.dev/job": "'7'"}));
    assert_eq!((&good["ok"], &good["found"]), (&json!(true), &json!("4 keys of extra attributes")));
    let bad = check(json!({"example.dev/job": "'7'", "example.dev/unheard-of": "'8'"}));
    assert_eq!((&bad["ok"], &bad["need"]), (&json!(false), &json!("must")));
    assert_eq!(bad["found"], "not allowed: userextras/example.dev/unheard-of");
    assert!(bad["mend"].as_str().unwrap().contains("authentication.k8s.io"), "{bad}");
}
