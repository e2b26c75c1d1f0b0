//! Who is calling, and as whom it goes on, on the real cluster: pods whose service accounts hold no rights act as what a
//! rule maps them to; a token works in the pod that it was issued to and nowhere else.

use std::{path::PathBuf, process::Output};

use base64::Engine as _;
use serde_json::{Value, json};
use weir_common::event::{ActsAs, Event, IdentityMethod, Kind};
use weir_tests::{AgentProcess, Pod, PodSpec, agent, agent::TrustSource, audit, testbed::API_CLUSTER_IP};

use super::{
    Scene,
    client::{RawClient, token},
};

/// The service account of pods that hold no rights.
pub(super) const ACCOUNT: &str = "powerless";

/// A namespace's service account without any rights.
pub(super) fn powerless(scene: &Scene, namespace: &str) {
    let account = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": namespace},
    });
    scene.testbed.apply(&account.to_string()).unwrap();
}

pub(super) fn pod<'a>(scene: &'a Scene, namespace: &'a str, name: &'a str) -> Pod<'a> {
    let spec =
        PodSpec { service_account: ACCOUNT, labels: &[("job", "build-7")], ..PodSpec::idle(namespace, name) };
    scene.testbed.run_pod(&spec).unwrap()
}

/// Writes the configuration of an agent whose cluster has the cluster's own issuer and these rules.
pub(super) fn configured(scene: &Scene, roles: Value) -> PathBuf {
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["clusters"][0]["authentication"] = json!({"jwt": [own_issuer(scene)]});
    configuration["clusters"][0]["roles"] = roles;
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    path
}

/// An agent with that configuration.
pub(super) fn start(scene: &Scene, roles: Value) -> AgentProcess {
    AgentProcess::start(&configured(scene, roles), &scene.scratch.path().join("agent.log")).unwrap()
}

/// The cluster's own issuer of service account tokens.
pub(super) fn own_issuer(scene: &Scene) -> Value {
    let document = scene.testbed.kubectl(&["get", "--raw", "/.well-known/openid-configuration"]).unwrap();
    let document: Value = serde_json::from_str(&document).unwrap();
    json!({
        "issuer": {"url": document["issuer"], "throughCluster": true, "audiences": [document["issuer"]]},
        "claimMappings": {
            "username": {"claim": "sub", "prefix": ""},
            "groups": {"expression": "['system:serviceaccounts']"},
        },
    })
}

/// Without padding (RFC 4648 §5).
fn base64url(text: &str) -> String {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text)
}

pub(super) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Sends one request of a pod, to whose head only its end is added; gives status and body of the answer.
pub(super) fn ask(scene: &Scene, pod: &Pod<'_>, head: &str, body: &str) -> (u16, String) {
    let mut client = RawClient::connect(&scene.testbed, pod, API_CLUSTER_IP, "http/1.1");
    let length = body.len();
    let request = format!("{head}Host: {API_CLUSTER_IP}\r\nContent-Length: {length}\r\n\r\n{body}");
    client.send(request.as_bytes()).unwrap();
    let answer = client.answer().expect("an answer");
    (answer.status, String::from_utf8_lossy(&answer.body).into_owned())
}

/// What the journal says of the requests of a pod: session, identity, event.
pub(super) fn opened<'a>(events: &'a [Event], path: &str) -> Vec<&'a Event> {
    let of_path =
        |event: &&Event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.uri.contains(path));
    events.iter().filter(of_path).collect()
}

#[test]
fn a_pod_without_rights_acts_as_the_user_that_a_rule_maps_it_to() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-mapped", true);
    powerless(&scene, "it-mapped");
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "runners", "namespace": "it-mapped"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
        "subjects": [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": "weir:runners"}],
    });
    scene.testbed.apply(&binding.to_string()).unwrap();
    let pod = pod(&scene, "it-mapped", "runner");
    let denied = pod.exec(&["kubectl", "get", "pods"]).unwrap();
    assert!(
        !denied.status.success() && said(&denied).contains("powerless"),
        "it holds no rights: {denied:?}"
    );

    let agent = start(
        &scene,
        json!([{
            "name": "runners",
            "when": format!("serviceAccount == '{ACCOUNT}' && user.username == 'system:serviceaccount:it-mapped:{ACCOUNT}'"),
            "impersonate": {
                "user": "'weir:' + pod.namespace + ':' + serviceAccount",
                "groups": "['weir:runners']",
                "extra": {"example.dev/job": "labels['job']"},
            },
        }]),
    );
    let listed = pod.exec(&["kubectl", "get", "pods", "-o", "name"]).unwrap();
    assert_eq!(said(&listed), "pod/runner\n", "{}", agent.last_lines());
    // RBAC for the mapped user decides, and its refusal names that user.
    let refused = pod.exec(&["kubectl", "delete", "pod", "runner"]).unwrap();
    assert!(said(&refused).contains("User \"weir:it-mapped:powerless\" cannot delete"), "{refused:?}");
    let review = pod.exec(&["kubectl", "auth", "whoami", "-o", "json"]).unwrap();
    let review: Value = serde_json::from_slice(&review.stdout).unwrap();
    let user = &review["status"]["userInfo"];
    assert_eq!(user["username"], "weir:it-mapped:powerless");
    assert_eq!(user["groups"], json!(["weir:runners", "system:authenticated"]));
    let extra = |key: &str| user["extra"][key][0].as_str().unwrap_or_default().to_owned();
    assert_eq!(extra("example.dev/job"), "build-7");
    assert_eq!(extra("weir.dev/pod"), "it-mapped/runner");
    assert_eq!(extra("weir.dev/pod-uid"), pod.uid);

    // The cluster's audit log leads to our session, and our record to the rule and the user.
    let log = std::fs::read_to_string(scene.testbed.layout().audit_log()).unwrap();
    let events = scene.events();
    let opened = opened(&events, "/api/v1/namespaces/it-mapped/pods");
    assert!(!opened.is_empty());
    for event in opened {
        let (session, id) = (&event.session, event.request.as_deref().unwrap());
        assert_eq!(*session, extra("weir.dev/session"), "one caller, one session");
        let Kind::RequestOpened(opened) = &event.kind else { unreachable!() };
        let identity = opened.identity.as_deref().expect("it is recorded who asked");
        assert_eq!((identity.method, identity.rule.as_deref()), (IdentityMethod::Token, Some("runners")));
        assert_eq!(identity.user.username, "system:serviceaccount:it-mapped:powerless");
        assert!(
            matches!(&identity.acts_as, Some(ActsAs::Impersonate { user }) if user.username == "weir:it-mapped:powerless")
        );
        let entry: Value = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .find(|entry: &Value| entry["auditID"] == id && entry["stage"] == "ResponseComplete")
            .expect("the API server's own entry of the request");
        assert_eq!(entry["impersonatedUser"]["username"], "weir:it-mapped:powerless");
        assert_eq!(entry["impersonatedUser"]["extra"]["weir.dev/session"][0], **session);
    }
}

#[test]
fn a_token_works_in_the_pod_that_it_was_issued_to_and_nowhere_else() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-stolen", true);
    let (one, other) = ("owner", "thief");
    let owner = scene.testbed.run_pod(&PodSpec::idle("it-stolen", one)).unwrap();
    let thief = scene.testbed.run_pod(&PodSpec::idle("it-stolen", other)).unwrap();
    let agent = start(&scene, json!([{"name": "own rights", "when": "true", "passThrough": {}}]));
    let token = owner.shell("cat /var/run/secrets/kubernetes.io/serviceaccount/token").unwrap();
    let token = token.trim();
    let with_it = ["kubectl", "--token", token, "get", "configmaps", "-o", "name"];
    assert!(owner.exec(&with_it).unwrap().status.success(), "{}", agent.last_lines());
    let stolen = thief.exec(&with_it).unwrap();
    let text = said(&stolen);
    assert!(!stolen.status.success() && text.contains("it was issued to pod it-stolen/owner"), "{text}");
    assert!(text.contains("it arrived from pod it-stolen/thief"), "{text}");
    assert!(thief.exec(&["kubectl", "get", "configmaps"]).unwrap().status.success(), "its own token works");

    // A token that is bound to no pod is no pod's.
    let unbound = scene.testbed.kubectl(&["create", "token", "default", "-n", "it-stolen"]).unwrap();
    let text = said(&thief.exec(&["kubectl", "--token", unbound.trim(), "get", "configmaps"]).unwrap());
    assert!(text.contains("bound to no pod"), "{text}");
    // Nor does a token that was tampered with, or none at all, get anywhere.
    let tampered = format!("{}AAAA", &token[..token.len() - 4]);
    let text = said(&thief.exec(&["kubectl", "--token", &tampered, "get", "configmaps"]).unwrap());
    assert!(text.contains("signature") && !text.contains(&tampered), "{text}");
    let text = said(&thief.exec(&["kubectl", "--token", "opaque", "get", "configmaps"]).unwrap());
    assert!(text.contains("cannot be verified"), "{text}");

    let events = scene.events();
    let findings: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.kind {
            Kind::Finding { name, message, caller } if name == "tokenFromOtherPod" => Some((message, caller)),
            _ => None,
        })
        .collect();
    assert!(!findings.is_empty(), "{events:#?}");
    assert!(
        findings.iter().all(|(_, caller)| caller.as_ref().unwrap().pod.as_ref().unwrap().uid == thief.uid)
    );
    assert!(findings.iter().any(|(message, _)| message.contains(&owner.uid) && message.contains(&thief.uid)));
    // The API server never saw the stolen token: all it has of the owner came from the owner.
    let entries = audit::finished_by_pod(&scene.testbed.layout().audit_log(), &owner.uid).unwrap();
    let recorded: Vec<_> = events
        .iter()
        .filter(|event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.identity.is_some()))
        .filter_map(|event| event.request.clone())
        .collect();
    assert!(!entries.is_empty() && entries.iter().all(|entry| recorded.contains(&entry.audit_id)));
    let text = serde_json::to_string(&events).unwrap();
    let signature = token.rsplit('.').next().unwrap();
    assert!(!text.contains(signature), "no token stands in the record");
}

#[test]
fn what_presents_no_token_or_presents_it_elsewhere_is_judged_by_the_same_rules() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-workload", true);
    powerless(&scene, "it-workload");
    let runner = pod(&scene, "it-workload", "runner");
    let other = PodSpec { service_account: ACCOUNT, ..PodSpec::idle("it-workload", "other") };
    let other = scene.testbed.run_pod(&other).unwrap();
    let agent = start(
        &scene,
        json!([
            {"name": "tokens", "when": "true", "takes": ["token"],
             "impersonate": {"user": "'weir:token:' + pod.name"}},
            {"name": "jobs", "when": "'job' in labels", "takes": ["workload"],
             "impersonate": {"user": "'weir:workload:' + pod.name"}},
        ]),
    );
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}).to_string();
    let ask = |pod: &Pod<'_>, head: &str, body: &str| ask(&scene, pod, head, body);
    let whoami = "POST /apis/authentication.k8s.io/v1/selfsubjectreviews HTTP/1.1\r\nContent-Type: application/json\r\n";
    let (status, body) = ask(&runner, whoami, &review);
    assert_eq!(status, 201, "{body}; {}", agent.last_lines());
    let user: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(user["status"]["userInfo"]["username"], "weir:workload:runner");
    let (status, body) = ask(&other, whoami, &review);
    assert_eq!(status, 401, "{body}");
    let refusal: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&refusal["kind"], &refusal["reason"]), (&json!("Status"), &json!("Unauthorized")));
    let message = refusal["message"].as_str().unwrap();
    let id = message.split("(weir request ").nth(1).and_then(|rest| rest.strip_suffix(')')).expect("an id");

    // A WebSocket's subprotocol may hold the token: it is read, replaced, and not recorded.
    let token = token(&runner);
    let exec = |protocol: &str| {
        format!(
            "GET /api/v1/namespaces/it-workload/pods/runner/exec?command=id&stdout=1 HTTP/1.1\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
             Sec-WebSocket-Protocol: {protocol}\r\n"
        )
    };
    let in_protocol =
        format!("base64url.bearer.authorization.k8s.io.{}, v5.channel.k8s.io", base64url(&token));
    let (status, body) = ask(&runner, &exec(&in_protocol), "");
    assert_eq!(status, 403, "{body}");
    assert!(body.contains("User \\\"weir:token:runner\\\" cannot get resource"), "{body}");
    let (status, body) = ask(&other, &exec(&in_protocol), "");
    assert_eq!(status, 401, "{body}");
    assert!(body.contains("it was issued to pod it-workload/runner"), "{body}");
    let twice = format!("{}Authorization: Bearer {token}\r\n", exec(&in_protocol));
    assert_eq!(ask(&runner, &twice, "").0, 400, "two credentials");
    let front_proxy = format!("{whoami}X-Remote-User: admin\r\nX-Remote-Group: system:masters\r\n");
    let (_, body) = ask(&runner, &front_proxy, &review);
    assert!(body.contains("weir:workload:runner") && !body.contains("system:masters"), "{body}");
    let impersonating = format!("{whoami}Impersonate-Uid: 0\r\nImpersonate-User: admin\r\n");
    assert_eq!(ask(&runner, &impersonating, &review).0, 403);

    let events = scene.events();
    let refused = |event: &&Event| event.request.as_deref() == Some(id);
    assert!(
        events
            .iter()
            .filter(refused)
            .any(|event| matches!(event.kind, Kind::RequestRefused { status: 401, .. }))
    );
    let text = serde_json::to_string(&events).unwrap();
    let signature = token.rsplit('.').next().unwrap();
    assert!(!text.contains(signature) && !text.contains(&base64url(&token)), "no token stands in the record");
}

#[test]
fn a_client_impersonates_only_whom_the_mapped_user_may() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-as", true);
    powerless(&scene, "it-as");
    // RBAC gives the mapped user a robot and a group, and nobody else.
    let rbac = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "weir-it-as"},
         "rules": [
            {"apiGroups": [""], "resources": ["users"], "resourceNames": ["robot:it-as", "robot:other"], "verbs": ["impersonate"]},
            {"apiGroups": [""], "resources": ["groups"], "resourceNames": ["robots"], "verbs": ["impersonate"]},
         ]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "weir-it-as"},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "weir-it-as"},
         "subjects": [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": "weir:runners"}]},
    ]});
    scene.testbed.apply(&rbac.to_string()).unwrap();
    let runner = pod(&scene, "it-as", "runner");
    let agent = start(
        &scene,
        json!([{
            "name": "runners", "when": "true",
            "allowImpersonation": "impersonated.username.startsWith('robot:') && impersonated.username != 'robot:other'",
            "impersonate": {"user": "'weir:' + pod.name", "groups": "['weir:runners']"},
        }]),
    );
    // With flags of its own, kubectl does not look for the pod's service account.
    let (server, token) = (format!("--server=https://{API_CLUSTER_IP}"), token(&runner));
    let authority = "--certificate-authority=/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
    let whoami = |further: &[&str]| {
        let kubectl = ["kubectl", &server, authority, "--token", &token, "auth", "whoami", "-o", "json"];
        runner.exec(&[&kubectl, further].concat()).unwrap()
    };
    let user = |output: &Output| -> Value {
        let review: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}\n{}", said(output), agent.last_lines()));
        review["status"]["userInfo"].clone()
    };
    assert_eq!(user(&whoami(&[]))["username"], "weir:runner");
    let robot = user(&whoami(&["--as", "robot:it-as", "--as-group", "robots"]));
    assert_eq!((&robot["username"], &robot["groups"][0]), (&json!("robot:it-as"), &json!("robots")));
    assert_eq!(robot["extra"]["weir.dev/pod"], json!(["it-as/runner"]), "it leads back all the same");

    let refusal = |further: &[&str], words: &str| {
        let refused = whoami(further);
        let text = said(&refused);
        assert!(!refused.status.success() && text.contains(words), "{further:?}: {text}");
    };
    // The agent itself may impersonate anybody; the mapped user may not.
    refusal(
        &["--as", "robot:third"],
        "\"weir:runner\", as whom this request would go on, has no right to impersonate users \"robot:third\"",
    );
    refusal(&["--as", "robot:it-as", "--as-group", "admins"], "no right to impersonate groups \"admins\"");
    refusal(&["--as", "robot:it-as", "--as-uid", "7"], "no right to impersonate uids \"7\"");
    // What RBAC gives, the rule may still not.
    refusal(&["--as", "robot:other"], "no rule allows it");
    let masters = ["--as", "robot:it-as", "--as-group", "system:masters"];
    refusal(&masters, "system:masters");
    for output in ["clusterrolebinding/weir-it-as", "clusterrole/weir-it-as"] {
        scene.testbed.kubectl(&["delete", output]).unwrap();
    }
}
