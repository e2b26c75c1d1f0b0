//! A pod that holds no rights acts in the AWS role that a rule gives it: its own kubectl, through the agent, to the API server
//! that asks aws-iam-authenticator; moto is STS behind the real host name. What AWS does not give, nobody goes on without.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
    time::Duration,
};

use serde_json::{Value, json};
use weir_common::event::{ActsAs, Event, Kind, RoleAssumed};
use weir_tests::{
    AgentProcess, AwsRig, PodSpec, audit,
    aws::{self, Call, Fault, RoleMapping},
    wait_until,
};

use super::{
    DEADLINE, Scene,
    client::token,
    identity::{ACCOUNT, ask, configured, opened, pod, powerless, said},
};

/// Who may edit in a test's namespace.
const DEPLOYERS: &str = "it-role-deployers";
const MAPPINGS: &[RoleMapping] = &[
    RoleMapping { role: "deploy", username: "deploy:{{SessionName}}", groups: &[DEPLOYERS] },
    RoleMapping { role: "idle", username: "idle:{{SessionName}}", groups: &[] },
];
/// The agent uses credentials until a minute before their end: this leaves seconds.
const SHORT_LIFE: Duration = Duration::from_secs(66);
/// A token is not got anew within 30 s, and the API server believes one for seconds.
const RENEWAL_DEADLINE: Duration = Duration::from_secs(90);

/// The rule that everyone goes on in this role.
fn in_role(role: &str) -> Value {
    let cluster = json!({"name": aws::CLUSTER, "region": aws::REGION});
    json!([{
        "name": "everyone", "when": "true",
        "assumeRole": {"roleArn": aws::role_arn(role), "eksCluster": cluster},
    }])
}

fn start(scene: &Scene, rig: &AwsRig, role: &str) -> AgentProcess {
    start_with(scene, rig, in_role(role))
}

fn start_with(scene: &Scene, rig: &AwsRig, roles: Value) -> AgentProcess {
    let log = scene.scratch.path().join("agent.log");
    AgentProcess::start_on_aws(rig, &configured(scene, roles), &log).unwrap()
}

fn deployers_may_edit(scene: &Scene, namespace: &str) {
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "deployers", "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
        "subjects": [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": DEPLOYERS}],
    });
    scene.testbed.apply(&binding.to_string()).unwrap();
}

/// Credentials that were recorded, with their session.
fn assumed(events: &[Event]) -> Vec<(String, RoleAssumed)> {
    let of = |event: &Event| match &event.kind {
        Kind::RoleAssumed(assumed) => Some((event.session.clone(), RoleAssumed::clone(assumed))),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

/// The first `count` credentials that were recorded; reads and what belongs to them come to the disk a little later.
#[track_caller]
fn recorded(scene: &Scene, count: usize) -> Vec<(String, RoleAssumed)> {
    wait_until("the credentials in the record", DEADLINE, || {
        let found = assumed(&scene.events());
        Ok((found.len() >= count).then_some(found))
    })
    .unwrap()
}

fn roles_asked(rig: &AwsRig) -> Vec<Call> {
    rig.calls().into_iter().filter(|call| call.action == "AssumeRole").collect()
}

/// The user of a request in the API server's own audit log.
fn user_of(scene: &Scene, request: &str) -> Value {
    wait_until("the request to be in the API server's audit log", DEADLINE, || {
        let text = std::fs::read_to_string(scene.testbed.layout().audit_log())?;
        let mut entries = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(entries.find(|entry| entry["auditID"] == request).map(|entry| entry["user"].clone()))
    })
    .unwrap()
}

fn access_key(user: &Value) -> String {
    user["extra"]["accessKeyId"][0].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_pod_without_rights_acts_in_the_role_that_a_rule_gives_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-role", true);
    powerless(&scene, "it-role");
    deployers_may_edit(&scene, "it-role");
    let rig = AwsRig::start(&scene.testbed, MAPPINGS).unwrap();
    let runner = pod(&scene, "it-role", "runner");
    let agent = start(&scene, &rig, "deploy");
    let created = runner.exec(&["kubectl", "create", "configmap", "one"]).unwrap();
    assert!(created.status.success(), "{created:?}\n{}\n{}", agent.last_lines(), rig.authenticator_log());

    // One call of STS for all the requests, with what leads back to the pod.
    let [call] = roles_asked(&rig).try_into().expect("one role was asked for");
    assert_eq!(call.access_key_id, "AKIAWEIRAGENT");
    let [(session, credentials)] = recorded(&scene, 1).try_into().expect("it is recorded once");
    let events = scene.events();
    let name = format!("weir-{session}");
    assert_eq!(call.parameters["RoleArn"], aws::role_arn("deploy"));
    assert_eq!(call.parameters["RoleSessionName"], name);
    let identity = &call.parameters["SourceIdentity"];
    assert!(identity.starts_with("system-serviceaccount-it-role-powerless-"), "{identity}");
    let tags: Vec<_> = (1..=5)
        .map(|at| {
            let part = |part: &str| call.parameters[&format!("Tags.member.{at}.{part}")].as_str();
            (part("Key"), part("Value"))
        })
        .collect();
    let expected = [
        ("weir-session", session.as_str()),
        ("weir-namespace", "it-role"),
        ("weir-pod", "runner"),
        ("weir-pod-uid", runner.uid.as_str()),
        ("weir-service-account", ACCOUNT),
    ];
    assert_eq!(tags, expected);
    assert_eq!(credentials.role_arn, aws::role_arn("deploy"));
    assert!(credentials.assumed_role_arn.ends_with(&format!(":assumed-role/deploy/{name}")));

    // The API server's audit log has the role's user, our session's name and the key that CloudTrail has.
    let event = opened(&events, "/configmaps?fieldManager=kubectl-create").pop().expect("it is recorded");
    assert_eq!(event.session, session);
    let Kind::RequestOpened(request) = &event.kind else { unreachable!() };
    let identity = request.identity.as_deref().expect("it is recorded who asked");
    assert_eq!(identity.user.username, "system:serviceaccount:it-role:powerless");
    assert!(
        matches!(&identity.acts_as, Some(ActsAs::Role { arn, by }) if *arn == aws::role_arn("deploy") && by == "assumeRole")
    );
    let user = user_of(&scene, event.request.as_deref().unwrap());
    assert_eq!(user["username"], format!("deploy:{name}"));
    assert_eq!(user["extra"]["sessionName"][0], name);
    assert_eq!(user["extra"]["arn"][0], credentials.assumed_role_arn);
    assert_eq!(access_key(&user), credentials.access_key_id);

    // RBAC for the role decides, and its refusal names the role's user.
    let refused = said(&runner.exec(&["kubectl", "get", "configmaps", "-n", "kube-system"]).unwrap());
    assert!(refused.contains(&format!("User \"deploy:{name}\" cannot list")), "{refused}");

    // Another pod has another session, whatever its account.
    let other = pod(&scene, "it-role", "other");
    let listed = said(&other.exec(&["kubectl", "get", "configmap", "one", "-o", "name"]).unwrap());
    assert_eq!(listed, "configmap/one\n", "{}", agent.last_lines());
    let sessions: Vec<_> = recorded(&scene, 2).into_iter().map(|(session, _)| session).collect();
    let names: Vec<_> =
        roles_asked(&rig).iter().map(|call| call.parameters["RoleSessionName"].clone()).collect();
    assert!(sessions.len() == 2 && sessions[0] != sessions[1], "{sessions:?}");
    assert_eq!(names, sessions.iter().map(|session| format!("weir-{session}")).collect::<Vec<_>>());

    let record = serde_json::to_string(&scene.events()).unwrap();
    for (place, text) in [("record", record), ("log", agent.log().unwrap())] {
        for secret in ["k8s-aws-v1.", "weir-agent-secret", "X-Amz-"] {
            assert!(!text.contains(secret), "{secret} stands in the {place}");
        }
    }
}

#[test]
fn a_role_that_trusts_the_cluster_is_assumed_with_a_token_of_the_very_pod() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-role-token", true);
    powerless(&scene, "it-role-token");
    deployers_may_edit(&scene, "it-role-token");
    let rig = AwsRig::start(&scene.testbed, MAPPINGS).unwrap();
    let runner = pod(&scene, "it-role-token", "runner");
    let cluster = json!({"name": aws::CLUSTER, "region": aws::REGION});
    let minted = json!([{
        "name": "minted", "when": "true",
        "webIdentity": {"token": "minted", "roleArn": aws::role_arn("deploy"), "eksCluster": cluster},
    }]);
    let agent = start_with(&scene, &rig, minted);
    let created = runner.exec(&["kubectl", "create", "configmap", "one"]).unwrap();
    assert!(created.status.success(), "{created:?}\n{}\n{}", agent.last_lines(), rig.authenticator_log());

    let calls = rig.calls();
    let calls: Vec<_> = calls.iter().filter(|call| call.action == "AssumeRoleWithWebIdentity").collect();
    let [call] = calls[..] else { panic!("one role was asked for: {calls:?}") };
    assert_eq!(call.access_key_id, "", "the token alone is the proof");
    let claims = &call.web_identity;
    assert_eq!(claims["aud"], json!(["sts.amazonaws.com"]));
    assert_eq!(claims["sub"], "system:serviceaccount:it-role-token:powerless");
    assert_eq!(claims["kubernetes.io"]["pod"]["uid"], runner.uid.as_str());
    let [(session, credentials)] = recorded(&scene, 1).try_into().expect("it is recorded once");
    let events = scene.events();
    assert_eq!(call.parameters["RoleSessionName"], format!("weir-{session}"));
    let event = opened(&events, "/configmaps?fieldManager=kubectl-create").pop().expect("it is recorded");
    let Kind::RequestOpened(request) = &event.kind else { unreachable!() };
    assert!(
        matches!(&request.identity.as_deref().unwrap().acts_as, Some(ActsAs::Role { by, .. }) if by == "webIdentity")
    );
    let user = user_of(&scene, event.request.as_deref().unwrap());
    assert_eq!(user["username"], format!("deploy:weir-{session}"));
    assert_eq!(access_key(&user), credentials.access_key_id);
}

#[test]
fn what_aws_does_not_give_nobody_goes_on_without() {
    let Some(mut scene) = Scene::new() else { return };
    // Its pods' own account may do everything: a request that went on as it would be noticed.
    scene.namespace("it-role-refused", true);
    let rig = AwsRig::start(&scene.testbed, MAPPINGS).unwrap();
    let caller = scene.testbed.run_pod(&PodSpec::idle("it-role-refused", "caller")).unwrap();
    let message = "User: arn:aws:iam::123456789012:user/weir is not authorized to perform: sts:TagSession on resource: x";
    rig.fail(Some(Fault::Error { status: 403, code: "AccessDenied", message }));
    let agent = start(&scene, &rig, "idle");
    let refused = caller.exec(&["kubectl", "create", "configmap", "leak"]).unwrap();
    let text = said(&refused);
    assert!(!refused.status.success(), "{text}");
    let role = aws::role_arn("idle");
    for part in ["AWS refuses role", &role, message, "trust policy", "(weir request "] {
        assert!(text.contains(part), "{text:?} has no {part:?}; {}", agent.last_lines());
    }
    let is_refusal = |event: &Event| matches!(&event.kind, Kind::RequestRefused { status: 403, reason, .. } if reason.contains(message));
    scene.event("the refusal in the record", is_refusal);
    assert_eq!(assumed(&scene.events()), []);

    // Throttled: to be tried again, and when.
    let head = format!(
        "GET /api/v1/namespaces/it-role-refused/configmaps HTTP/1.1\r\nAuthorization: Bearer {}\r\n",
        token(&caller)
    );
    let until = |status: u16| {
        let what = format!("the answer to be {status}");
        wait_until(&what, DEADLINE, || {
            let (found, body) = ask(&scene, &caller, &head, "");
            Ok((found == status).then_some(body))
        })
        .unwrap()
    };
    rig.fail(Some(Fault::Error { status: 400, code: "Throttling", message: "Rate exceeded" }));
    let answer: Value = serde_json::from_str(&until(503)).unwrap();
    assert_eq!((&answer["kind"], &answer["reason"]), (&json!("Status"), &json!("ServiceUnavailable")));
    assert!(answer["details"]["retryAfterSeconds"].as_u64().unwrap() >= 1, "{answer}");

    // All this time the API server saw nothing of it.
    let before = audit::read(&scene.testbed.layout().audit_log()).unwrap();
    let own = "system:serviceaccount:it-role-refused:default";
    assert!(!before.iter().any(|entry| entry.user == own), "{before:?}");

    // AWS gives it, and it is the role's rights that count: none.
    rig.fail(None);
    let denied = wait_until("the role's own rights to count", DEADLINE, || {
        let (_, body) = ask(&scene, &caller, &head, "");
        Ok(body.contains("cannot list resource").then_some(body))
    })
    .unwrap();
    assert!(denied.contains("User \\\"idle:weir-"), "{denied}");
    let absent = scene.testbed.kubectl(&["get", "configmap", "leak", "-n", "it-role-refused"]);
    assert!(absent.is_err(), "nothing was created: {absent:?}");
    let after = audit::read(&scene.testbed.layout().audit_log()).unwrap();
    assert!(!after.iter().any(|entry| entry.user == own), "nothing went on as the pod itself");
}

#[test]
fn a_watch_outlives_its_credentials_and_those_that_are_taken_back_are_got_anew() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-role-watch", true);
    powerless(&scene, "it-role-watch");
    deployers_may_edit(&scene, "it-role-watch");
    let rig = AwsRig::start(&scene.testbed, MAPPINGS).unwrap();
    rig.credentials_live(Some(SHORT_LIFE));
    let runner = pod(&scene, "it-role-watch", "runner");
    let agent = start(&scene, &rig, "deploy");
    let mut watching = runner
        .exec_command()
        .args(["timeout", "900", "kubectl", "get", "configmaps", "-w", "-o", "name"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = BufReader::new(watching.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert_eq!(shown.next().as_deref(), Some("configmap/kube-root-ca.crt"), "{}", agent.last_lines());
    let watch = scene.event(
        "the watch in the record",
        |event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.verb == "watch"),
    );
    let began_with = access_key(&user_of(&scene, watch.request.as_deref().unwrap()));
    // Meanwhile, of another pod.
    rig.credentials_live(None);
    revoked_credentials_are_got_anew(&scene, &rig, &agent, &watch.session);
    wait_until("the watch's credentials to end", 2 * SHORT_LIFE, || {
        Ok(rig.has_expired(&began_with)?.then_some(()))
    })
    .unwrap();

    let created = runner.exec(&["kubectl", "create", "configmap", "late"]).unwrap();
    assert!(created.status.success(), "{created:?}\n{}", agent.last_lines());
    assert_eq!(shown.next().as_deref(), Some("configmap/late"), "the watch goes on");
    let events = scene.events();
    let closed =
        |event: &Event| event.request == watch.request && matches!(event.kind, Kind::RequestClosed(_));
    assert!(!events.iter().any(closed));
    let later = opened(&events, "/configmaps?fieldManager=kubectl-create").pop().expect("it is recorded");
    let user = user_of(&scene, later.request.as_deref().unwrap());
    assert_eq!(later.session, watch.session);
    assert_eq!(user["username"], format!("deploy:weir-{}", watch.session), "one session, one user");
    assert_ne!(access_key(&user), began_with);
    for key in [&began_with, &access_key(&user)] {
        let with_it = |event: &Event| matches!(&event.kind, Kind::RoleAssumed(assumed) if assumed.access_key_id == *key);
        assert_eq!(scene.event("the credentials in the record", with_it).session, watch.session);
    }
    let _ = watching.kill();
    watching.wait().unwrap();
}

/// Credentials that the cluster takes no longer are got anew, and not with each request.
#[track_caller]
fn revoked_credentials_are_got_anew(scene: &Scene, rig: &AwsRig, agent: &AgentProcess, other: &str) {
    let runner = pod(scene, "it-role-watch", "revoked");
    let head = format!(
        "GET /api/v1/namespaces/it-role-watch/configmaps HTTP/1.1\r\nAuthorization: Bearer {}\r\n",
        token(&runner)
    );
    let asked = || ask(scene, &runner, &head, "").0;
    assert_eq!(asked(), 200, "{}\n{}", agent.last_lines(), rig.authenticator_log());
    let of_pod = |count: usize| {
        wait_until("the pod's credentials in the record", DEADLINE, || {
            let of_pod = assumed(&scene.events()).into_iter().filter(|(session, _)| session != other);
            let of_pod: Vec<_> = of_pod.collect();
            Ok((of_pod.len() >= count).then_some(of_pod))
        })
        .unwrap()
    };
    let [(session, credentials)] = of_pod(1).try_into().expect("they are recorded once");
    let calls = || {
        let name = format!("weir-{session}");
        roles_asked(rig).iter().filter(|call| call.parameters["RoleSessionName"] == name).count()
    };
    rig.revoke(&credentials.access_key_id);
    // While they are new it would not help to ask again: the API server's answer is the client's.
    wait_until("the API server to notice", DEADLINE, || Ok((asked() == 401).then_some(()))).unwrap();
    assert_eq!(calls(), 1);
    // Then they are forgotten, and the request is sent once more with others: its client sees nothing of it.
    let mut statuses = Vec::new();
    wait_until("other credentials", RENEWAL_DEADLINE, || {
        statuses.push(asked());
        Ok((statuses.last() == Some(&200)).then_some(()))
    })
    .unwrap();
    assert!(statuses.iter().all(|status| matches!(status, 401 | 200)), "{statuses:?}");
    assert_eq!(calls(), 2, "{statuses:?}");
    let keys: Vec<_> = of_pod(2).into_iter().map(|(_, assumed)| assumed.access_key_id).collect();
    assert!(keys.len() == 2 && keys[0] != keys[1], "{keys:?}");
}
