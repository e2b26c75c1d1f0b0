//! A company's OpenID provider, for real: people's tokens from a login, presented by the kubectl of a pod as an exec plugin
//! gives them; what is refused and why; the provider's keys change, and the provider is away.

use std::{
    process::Output,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use weir_common::event::{ActsAs, IdentityMethod, Kind};
use weir_tests::{
    AgentProcess, IdentityProvider, Pod, PodSpec,
    agent::{self, TrustSource},
    identity_provider::{Client, User},
    testbed::API_CLUSTER_IP,
    wait_until,
};

use super::{DEADLINE, Scene};

/// Believed: one with tokens that last, one whose tokens expire before they are issued, so far that they are believed for 25 s
/// more, since clocks may be a minute apart. The third is an application that the cluster has nothing to do with.
const CLIENTS: [Client; 3] = [
    Client { id: "kubernetes", lifetime_seconds: 3600 },
    Client { id: "kubernetes-lapsing", lifetime_seconds: -35 },
    Client { id: "wiki", lifetime_seconds: 3600 },
];
/// How long after its login one that lapses is believed at least, whatever a clock's seconds were then.
const BELIEVED_LEAST: Duration = Duration::from_secs(20);
const USERS: [User; 3] = [
    User { id: "alice", email_verified: true, groups: &["platform", "everyone"] },
    User { id: "bob", email_verified: false, groups: &["platform"] },
    User { id: "mallory", email_verified: true, groups: &["platform", "system:masters"] },
];

/// What the pod's exec plugin prints: the token that lies in a file.
const PLUGIN: &str = r#"#!/bin/sh
printf '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"%s"}}' "$(cat /tmp/token)"
"#;

/// A pod at which somebody works with a kubeconfig of their own.
struct Desk<'a> {
    scene: &'a Scene,
    pod: Pod<'a>,
}

impl<'a> Desk<'a> {
    /// In a namespace where the group `platform` may read. The pod's own service account may do everything, so that a
    /// request that went on as it would be noticed.
    fn new(scene: &'a Scene, namespace: &str) -> Self {
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": "platform", "namespace": namespace},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
            "subjects": [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": "platform"}],
        });
        scene.testbed.apply(&binding.to_string()).unwrap();
        let this = Self { scene, pod: scene.testbed.run_pod(&PodSpec::idle(namespace, "desk")).unwrap() };
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "corporate",
            "contexts": [{"name": "corporate", "context": {"cluster": "own", "user": "corporate", "namespace": namespace}}],
            "clusters": [{"name": "own", "cluster": {
                "server": format!("https://{API_CLUSTER_IP}"),
                "certificate-authority": "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
            }}],
            "users": [{"name": "corporate", "user": {"exec": {
                "apiVersion": "client.authentication.k8s.io/v1", "command": "/tmp/login", "interactiveMode": "Never",
            }}}],
        });
        this.put(&kubeconfig.to_string(), "/tmp/kubeconfig");
        this.put(PLUGIN, "/tmp/login");
        this
    }

    fn put(&self, text: &str, to: &str) {
        let file = self.scene.scratch.path().join("put");
        std::fs::write(&file, text).unwrap();
        self.pod.install(&file, to).unwrap();
    }

    /// kubectl with `token`: whether it succeeds, and what it says.
    fn kubectl(&self, token: &str, arguments: &[&str]) -> (bool, String) {
        self.put(token, "/tmp/token");
        let output =
            self.pod.exec(&[&["kubectl", "--kubeconfig", "/tmp/kubeconfig"], arguments].concat()).unwrap();
        let text = said(&output);
        let signature = token.rsplit('.').next().unwrap_or_default();
        assert!(signature.len() < 16 || !text.contains(signature), "no token stands in a message");
        (output.status.success(), text)
    }

    fn list(&self, token: &str) -> (bool, String) {
        self.kubectl(token, &["get", "pods", "-o", "name"])
    }

    #[track_caller]
    fn accepted(&self, token: &str) {
        assert_eq!(self.list(token), (true, "pod/desk\n".to_owned()));
    }

    #[track_caller]
    fn refused(&self, token: &str, reason: &str) {
        let (ok, text) = self.list(token);
        assert!(!ok && text.contains(reason), "{text}");
        assert!(text.contains("the recording gateway weir"), "it says who refuses: {text}");
    }

    /// Waits until kubectl succeeds, or fails for this reason.
    #[track_caller]
    fn until(&self, token: &str, reason: Option<&str>) {
        let mut last = String::new();
        let ended = wait_until("the token to be judged otherwise", DEADLINE, || {
            let (ok, text) = self.list(token);
            let is_it = reason.map_or(ok, |reason| !ok && text.contains(reason));
            last = text;
            Ok(is_it.then_some(()))
        });
        assert!(ended.is_ok(), "{ended:?}; {reason:?}: {last}");
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn provider(scene: &Scene) -> IdentityProvider {
    IdentityProvider::start(&scene.testbed, &CLIENTS, &USERS).unwrap()
}

/// An agent that believes `provider`, and lets its users go on as who they are.
fn start(scene: &Scene, provider: &IdentityProvider) -> AgentProcess {
    let issuer = provider.issuer();
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    let cluster = &mut configuration["clusters"][0];
    cluster["authentication"] = json!({"jwt": [{
        "issuer": {
            "url": issuer,
            "certificateAuthority": provider.certificate_authority().unwrap(),
            "audiences": ["kubernetes", "kubernetes-lapsing"],
            "audienceMatchPolicy": "MatchAny",
        },
        "claimMappings": {
            "username": {"claim": "sub", "prefix": "corp:"},
            "groups": {"expression": "claims.groups.filter(group, group != 'everyone')"},
            "extra": [{"key": "example.dev/email", "valueExpression": "claims.email"}],
        },
        "claimValidationRules": [{
            "expression": "claims.?email_verified.orValue(false)",
            "message": "confirm your email address first",
        }],
        "userValidationRules": [{
            "expression": "!user.groups.exists(group, group.startsWith('system:'))",
            "message": "groups of Kubernetes are not the company's to give",
        }],
    }]});
    cluster["roles"] = json!([{
        "name": "staff",
        "when": format!("identity.issuer == '{issuer}' && 'platform' in groups"),
        "impersonate": {},
    }]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap()
}

/// `token` with another header or other claims, and the signature that it had.
fn forged(token: &str, header: Option<Value>, change: impl Fn(&mut Value)) -> String {
    let parts: Vec<&str> = token.split('.').collect();
    let mut claims: Value =
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
    change(&mut claims);
    let header =
        header.map_or(parts[0].to_owned(), |header| BASE64_URL_SAFE_NO_PAD.encode(header.to_string()));
    format!("{header}.{}.{}", BASE64_URL_SAFE_NO_PAD.encode(claims.to_string()), parts[2])
}

#[test]
fn who_logs_in_at_the_companys_provider_goes_on_as_the_user_that_its_token_names() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-corporate", true);
    let provider = provider(&scene);
    let desk = Desk::new(&scene, "it-corporate");
    let agent = start(&scene, &provider);
    let alice = provider.login("alice", "kubernetes").unwrap();
    let (ok, text) = desk.kubectl(&alice, &["auth", "whoami", "-o", "json"]);
    assert!(ok, "{text}; {}", agent.last_lines());
    let review: Value = serde_json::from_str(&text).unwrap();
    let user = &review["status"]["userInfo"];
    assert_eq!(user["username"], "corp:alice");
    assert_eq!(user["groups"], json!(["platform", "system:authenticated"]), "`everyone` is filtered out");
    assert_eq!(user["extra"]["example.dev/email"], json!(["alice@corp.example"]));
    assert_eq!(user["extra"]["weir.dev/pod"], json!(["it-corporate/desk"]));
    assert_eq!(user["extra"]["weir.dev/pod-uid"], json!([desk.pod.uid]));
    desk.accepted(&alice);
    let (_, text) = desk.kubectl(&alice, &["delete", "pod", "desk"]);
    assert!(
        text.contains("User \"corp:alice\" cannot delete"),
        "her own rights count, not the pod's: {text}"
    );
    assert_eq!(provider.asked("/keys").unwrap(), 1, "keys are fetched once");

    let events = scene.events();
    let opened = |event: &&weir_common::event::Event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.uri.contains("/namespaces/it-corporate/pods"));
    let log = std::fs::read_to_string(scene.testbed.layout().audit_log()).unwrap();
    let event = events.iter().find(opened).expect("the list of pods is in the journal");
    assert_eq!(user["extra"]["weir.dev/session"][0], *event.session);
    let Kind::RequestOpened(opened) = &event.kind else { unreachable!() };
    let identity = opened.identity.as_deref().expect("it is recorded who asked");
    assert_eq!(identity.method, IdentityMethod::Token);
    assert_eq!(identity.issuer, Some(provider.issuer()));
    assert_eq!(identity.rule.as_deref(), Some("staff"));
    assert_eq!(
        (identity.user.username.as_str(), &identity.user.groups[..]),
        ("corp:alice", &["platform".to_owned()][..])
    );
    assert!(matches!(&identity.acts_as, Some(ActsAs::Impersonate { user }) if user.username == "corp:alice"));
    let entry = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find(|entry| {
        entry["auditID"].as_str() == event.request.as_deref() && entry["stage"] == "ResponseComplete"
    });
    assert_eq!(entry.expect("the API server's own entry")["impersonatedUser"]["username"], "corp:alice");

    // What holds only until it has expired is not believed longer for having been believed.
    let lapsing = (0..5).find_map(|_| {
        let (issued, token) = (Instant::now(), provider.login("alice", "kubernetes-lapsing").unwrap());
        let (ok, text) = desk.list(&token);
        assert!(ok || issued.elapsed() > BELIEVED_LEAST, "{text}");
        ok.then_some(token)
    });
    let lapsing = lapsing.expect("a machine that asks while a token is believed");
    desk.until(&lapsing, Some("the bearer token expired at "));
    let text = serde_json::to_string(&scene.events()).unwrap();
    for token in [&alice, &lapsing] {
        assert!(!text.contains(token.rsplit('.').next().unwrap()), "no token stands in the record");
    }
}

#[test]
fn a_companys_token_is_refused_for_what_is_wrong_with_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-refused", true);
    let provider = provider(&scene);
    let desk = Desk::new(&scene, "it-refused");
    let _agent = start(&scene, &provider);
    let alice = provider.login("alice", "kubernetes").unwrap();
    desk.accepted(&alice);

    let wiki = provider.login("alice", "wiki").unwrap();
    desk.refused(&wiki, r#"audience is "wiki"; expected is "kubernetes", "kubernetes-lapsing""#);
    let bob = provider.login("bob", "kubernetes").unwrap();
    desk.refused(&bob, "confirm your email address first");
    let mallory = provider.login("mallory", "kubernetes").unwrap();
    desk.refused(&mallory, "groups of Kubernetes are not the company's to give");
    let as_carol = |claims: &mut Value| claims["sub"] = json!("carol");
    let carol = forged(&alice, None, as_carol);
    desk.refused(&carol, "signature is not one of its issuer");
    let unsigned = forged(&alice, Some(json!({"alg": "none"})), as_carol);
    desk.refused(&unsigned, r#"signed with algorithm "none""#);
    let elsewhere = forged(&alice, None, |claims| claims["iss"] = json!("https://elsewhere.example"));
    desk.refused(&elsewhere, "https://elsewhere.example");
    desk.accepted(&alice);

    let events = scene.events();
    for reason in
        ["audience is", "confirm your email", "not the company's to give", "signature is not", "algorithm"]
    {
        let refused = |kind: &Kind| matches!(kind, Kind::RequestRefused { status: 401, reason: found, .. } if found.contains(reason));
        assert!(events.iter().any(|event| refused(&event.kind)), "{reason} is in the record");
    }
    let log = std::fs::read_to_string(scene.testbed.layout().audit_log()).unwrap();
    assert!(log.contains("corp:alice"));
    for never in ["corp:bob", "corp:mallory", "corp:carol"] {
        assert!(!log.contains(never), "{never} never reached the API server");
    }
}

#[test]
fn when_the_provider_changes_its_key_new_tokens_are_believed_and_then_old_ones_no_longer() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-rotation", true);
    let mut provider = provider(&scene);
    let desk = Desk::new(&scene, "it-rotation");
    let agent = start(&scene, &provider);
    let old = provider.login("alice", "kubernetes").unwrap();
    desk.accepted(&old);
    provider.stop().unwrap();
    provider.resume().unwrap();
    let new = provider.login("alice", "kubernetes").unwrap();
    // Nobody has shown a new key yet, and the known ones are young.
    desk.accepted(&old);
    assert_eq!(provider.asked("/keys").unwrap(), 0);
    // An issuer is not asked twice within 10 s; from then on the new key is known.
    desk.until(&new, None);
    assert_eq!(provider.asked("/keys").unwrap(), 1, "{}", agent.last_lines());
    // The old one is no longer among the keys, so what was signed with it does not hold, although it was remembered.
    desk.refused(&old, "does not publish");
    desk.accepted(&new);
}

#[test]
fn while_the_provider_is_away_its_known_keys_go_on_and_who_shows_another_is_told_to_try_again() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-provider-away", true);
    let mut provider = provider(&scene);
    let desk = Desk::new(&scene, "it-provider-away");
    let _agent = start(&scene, &provider);
    let seen = provider.login("alice", "kubernetes").unwrap();
    let unseen = provider.login("alice", "kubernetes").unwrap();
    assert_ne!(seen, unseen);
    desk.accepted(&seen);
    provider.stop().unwrap();
    provider.resume().unwrap();
    let other_key = provider.login("alice", "kubernetes").unwrap();
    provider.stop().unwrap();

    desk.accepted(&seen);
    desk.accepted(&unseen);
    desk.until(&other_key, Some("it cannot be reached; try again later"));
    let (_, text) = desk.list(&other_key);
    assert!(
        text.contains("Error from server (ServiceUnavailable): "),
        "kubectl takes it for a Status: {text}"
    );
    let refused = |kind: &Kind| matches!(kind, Kind::RequestRefused { status: 503, reason, .. } if reason.contains("it cannot be reached"));
    assert!(scene.events().iter().any(|event| refused(&event.kind)));
    desk.accepted(&seen);

    // Back with a third key: whether the second is one of its is known now, and the first is withdrawn.
    provider.resume().unwrap();
    desk.until(&other_key, Some("does not publish"));
    desk.refused(&seen, "does not publish");
    let current = provider.login("alice", "kubernetes").unwrap();
    desk.until(&current, None);
}
