//! What a policy decides, from the configuration as it is written to the headers that go on.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue};
use weir_common::{
    attributes::Attributes,
    event::{ActsAs, Caller, IdentityMethod, Pod, UserInfo},
};
use zeroize::Zeroizing;

use super::{
    Asked, Credential, Decision, Issuers, Kind, Onward, Origin, OwnCredential, Policy, Question, Refused,
    Right, Rules, Subject,
    fetch::{Fetch, FetchError},
};
use crate::{aws::Aws, config::Config, proxy::Labels};

/// An agent whose own credential is a token, or out of reach.
#[derive(Debug)]
struct Own(Result<&'static str, &'static str>);

/// Who may impersonate whom in the cluster.
const MAY: (&str, &str) = ("system:serviceaccount:ci:deployer", "users \"robot:ci\"");

impl OwnCredential for Own {
    fn authorization(&self) -> BoxFuture<'_, Result<Option<HeaderValue>, String>> {
        let own = self.0.map(|own| Some(HeaderValue::from_static(own))).map_err(str::to_owned);
        async move { own }.boxed()
    }

    fn lacks<'a>(
        &'a self,
        user: &'a UserInfo,
        rights: &'a [Right],
    ) -> BoxFuture<'a, Result<Option<&'a Right>, String>> {
        let may = |right: &&Right| (user.username.as_str(), right.to_string().as_str()) == MAY;
        let answer = self.0.map(|_| rights.iter().find(|right| !may(right))).map_err(str::to_owned);
        async move { answer }.boxed()
    }

    fn mint<'a>(&'a self, _: &'a Pod, _: &'a str) -> BoxFuture<'a, Result<Zeroizing<String>, String>> {
        async { Err("not asked for".to_owned()) }.boxed()
    }
}

fn roles(yaml: &str) -> Result<Vec<crate::config::Role>, String> {
    let text = format!(
        "{{apiVersion: weir.dev/v1alpha1, kind: AgentConfiguration, enrolment: [{{namespaceSelector: {{}}, podSelector: {{}}}}],
clusters: [{{name: c, inCluster: true, trust: {{clusterSigner: {{}}}}, roles: {yaml}}}]}}"
    );
    let config =
        Config::parse(Path::new("agent.yaml"), &text, "node-1").map_err(|error| error.to_string())?;
    Ok(config.clusters[0].roles.clone().expect("roles are configured"))
}

fn policy(yaml: &str) -> Policy {
    with_own(yaml, Own(Ok("Bearer own")))
}

/// No document of the cluster's is asked for.
#[derive(Debug)]
struct Nothing;

impl Fetch for Nothing {
    fn fetch<'a>(&'a self, target: &'a str) -> BoxFuture<'a, Result<Bytes, FetchError>> {
        async move { Err(FetchError::Url { url: target.to_owned() }) }.boxed()
    }
}

fn no_issuers() -> Arc<Issuers> {
    let nothing: Arc<dyn Fetch> = Arc::new(Nothing);
    Arc::new(Issuers::new(&[], &nothing).expect("none to set up"))
}

fn with_own(yaml: &str, own: Own) -> Policy {
    with(yaml, own, Aws::new())
}

fn with(yaml: &str, own: Own, aws: Aws) -> Policy {
    let rules = Rules {
        roles: roles(yaml).expect("roles"),
        issuers: no_issuers(),
        own: Arc::new(own),
        aws,
        node: "node-1".into(),
    };
    Policy::new("c".into(), rules)
}

/// By which every pod goes on in an AWS role, without a credential of its own.
pub(crate) fn in_a_role(aws: Aws) -> Policy {
    let rule = "[{name: pods, takes: [workload], when: 'true', assumeRole: {roleArn: 'arn:aws:iam::123456789012:role/deploy',
eksCluster: {name: prod, region: eu-central-1}}}]";
    with(rule, Own(Err("not asked for")), aws)
}

fn pod() -> Pod {
    Pod {
        namespace: "ci".into(),
        name: "runner".into(),
        uid: "uid-a".into(),
        service_account: "deployer".into(),
        ..Pod::default()
    }
}

fn origin() -> Origin {
    let labels = Labels {
        pod: BTreeMap::from([("job".to_owned(), "build-7".to_owned())]),
        namespace: BTreeMap::from([("team".to_owned(), "payments".to_owned())]),
    };
    Origin::new("c", Arc::new(Caller { pod: Some(pod()), ..Caller::default() }), &labels)
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(*name, HeaderValue::from_static(value));
    }
    headers
}

async fn decide(policy: &Policy, headers: &HeaderMap, certificate: Option<&Arc<Subject>>) -> Decision {
    let attributes = Attributes::parse("GET", "/api/v1/namespaces/ci/pods/a", None);
    let question = Question { method: "GET", path: "/api/v1/namespaces/ci/pods/a", attributes: &attributes };
    policy.decide(&Asked { headers, question, origin: &origin(), certificate }).await
}

/// What goes on after a decision: the headers that the API server sees, or the refusal.
async fn goes_on(policy: &Policy, pairs: &[(&'static str, &'static str)]) -> Result<HeaderMap, String> {
    let mut headers = headers(pairs);
    let decision = decide(policy, &headers, None).await;
    let onward = decision.onward.map_err(|refused| refused.to_string())?;
    let credential = policy.credential(onward, Some(&pod()), "session-1").await;
    credential.map_err(|refused| refused.to_string())?.apply(&mut headers);
    Ok(headers)
}

#[tokio::test]
async fn without_rules_everything_passes_as_it_is_but_impersonation() {
    let policy = Policy::open("c".into());
    let passed = goes_on(&policy, &[("authorization", "Bearer t")]).await.expect("passed");
    assert_eq!(passed["authorization"], "Bearer t");
    let decision = decide(&policy, &headers(&[("impersonate-user", "admin")]), None).await;
    assert!(matches!(decision.onward, Err(Refused::Impersonation)));
    assert_eq!(decision.identity, None);
}

#[tokio::test]
async fn a_pod_without_a_token_goes_on_only_by_a_rule_that_takes_workloads() {
    let strict = policy("[{name: any, when: 'true', impersonate: {}}]");
    let refused = decide(&strict, &HeaderMap::new(), None).await.onward.expect_err("refused");
    assert!(matches!(&refused, Refused::NoCredential { .. }), "{refused:?}");
    assert_eq!(refused.kind(), Kind::Unauthenticated);

    let open = policy(
        "[{name: runners, takes: [workload], when: \"namespaceLabels['team'] == 'payments' && serviceAccount == 'deployer'\",
           impersonate: {user: \"'ci:' + pod.namespace + ':' + pod.name\", groups: \"['ci:runners']\",
           extra: {example.dev/job: \"labels['job']\"}}}]",
    );
    let seen = goes_on(&open, &[]).await.expect("it goes on");
    assert_eq!(seen["authorization"], "Bearer own");
    assert!(seen["authorization"].is_sensitive());
    assert_eq!(seen["impersonate-user"], "ci:ci:runner");
    assert_eq!(seen["impersonate-group"], "ci:runners");
    assert_eq!(seen["impersonate-extra-example.dev%2fjob"], "build-7");
    assert_eq!(seen["impersonate-extra-weir.dev%2fsession"], "session-1");
    assert_eq!(seen["impersonate-extra-weir.dev%2fpod"], "ci/runner");
    assert_eq!(seen["impersonate-extra-weir.dev%2fpod-uid"], "uid-a");
    let identity = decide(&open, &HeaderMap::new(), None).await.identity.expect("known");
    assert_eq!((identity.method, identity.rule.as_deref()), (IdentityMethod::Workload, Some("runners")));
    let Some(ActsAs::Impersonate { user }) = identity.acts_as else { panic!("{identity:?}") };
    assert_eq!(user.username, "ci:ci:runner");
}

#[tokio::test]
async fn a_credential_that_cannot_be_verified_goes_on_only_by_a_rule_that_takes_such() {
    for presented in ["Bearer opaque", "Basic dTpw"] {
        let strict = policy("[{name: any, when: 'true', passThrough: {}}]");
        let refused = goes_on(&strict, &[("authorization", presented)]).await.expect_err("refused");
        assert!(refused.contains("cannot be verified") && !refused.contains("opaque"), "{refused}");
        let open = policy("[{name: any, takes: [unverified], when: 'true', passThrough: {}}]");
        assert_eq!(
            goes_on(&open, &[("authorization", presented)]).await.expect("passed")["authorization"],
            presented
        );
    }
}

#[tokio::test]
async fn the_first_rule_that_matches_decides_and_one_that_fails_refuses() {
    let ordered = policy(
        "[{name: never, takes: [workload], when: \"request.verb == 'delete'\", impersonate: {}},
          {name: stop, takes: [workload], when: \"request.resource == 'pods'\", deny: {message: 'ask team X'}},
          {name: late, takes: [workload], when: 'true', impersonate: {}}]",
    );
    let decision = decide(&ordered, &HeaderMap::new(), None).await;
    let refused = decision.onward.expect_err("denied");
    assert!(
        refused.to_string().ends_with("is denied by rule \"stop\" of the recording gateway weir: ask team X"),
        "{refused}"
    );
    assert_eq!(refused.kind(), Kind::Forbidden);
    let identity = decision.identity.expect("it is known who was denied");
    assert_eq!((identity.rule.as_deref(), identity.acts_as), (Some("stop"), None));

    let failing = policy(
        "[{name: broken, takes: [workload], when: \"labels['absent'] == 'x'\", deny: {}},
          {name: late, takes: [workload], when: 'true', impersonate: {}}]",
    );
    let refused = goes_on(&failing, &[]).await.expect_err("a denial is not passed over");
    assert!(refused.contains("rule \"broken\"") && refused.contains("cannot be evaluated"), "{refused}");
}

#[tokio::test]
async fn only_the_cluster_itself_vouches_for_kubernetes_own_identities() {
    let subject = |of_cluster, username: &str, groups: &[&str]| {
        let user = UserInfo {
            username: username.into(),
            groups: groups.iter().map(|group| (*group).to_owned()).collect(),
            ..UserInfo::default()
        };
        let issuer = Some("https://idp.example".to_owned());
        let claims = serde_json::json!({});
        Arc::new(Subject::new(IdentityMethod::Token, issuer, of_cluster, user, &claims).expect("a subject"))
    };
    let careful = policy("[{name: all, when: 'true', impersonate: {}}]");
    let careless = policy("[{name: all, when: 'true', impersonate: {systemIdentities: true}}]");
    let nothing = HeaderMap::new();
    for (of_cluster, username, groups, passes) in [
        (false, "ada", &["dev", "system:authenticated"][..], true),
        (false, "ada", &["system:masters"], false),
        (false, "system:serviceaccount:kube-system:x", &[], false),
        (true, "system:serviceaccount:ci:x", &["system:serviceaccounts"], true),
        (true, "system:serviceaccount:ci:x", &["system:masters"], false),
        (true, "system:node:n", &[], false),
    ] {
        let who = subject(of_cluster, username, groups);
        let decided = decide(&careful, &nothing, Some(&who)).await.onward;
        assert_eq!(decided.is_ok(), passes, "{username} {groups:?}: {decided:?}");
        assert!(decide(&careless, &nothing, Some(&who)).await.onward.is_ok(), "{username} {groups:?}");
    }
}

#[tokio::test]
async fn a_client_certificate_is_an_identity_that_cannot_be_passed_through() {
    let user = UserInfo { username: "ada".into(), groups: vec!["dev".into()], ..UserInfo::default() };
    let claims = serde_json::json!({});
    let who = Subject::new(IdentityMethod::ClientCertificate, None, false, user, &claims).map(Arc::new);
    let who = who.expect("a subject");
    let nothing = HeaderMap::new();
    let passing = policy("[{name: all, when: 'true', passThrough: {}}]");
    let refused = decide(&passing, &nothing, Some(&who)).await.onward.expect_err("it has no key");
    assert!(refused.to_string().contains("cannot be passed through"), "{refused}");
    let mapping = policy("[{name: all, when: \"'dev' in groups\", impersonate: {}}]");
    assert!(
        matches!(decide(&mapping, &nothing, Some(&who)).await.onward, Ok(Onward::Impersonate { user, .. }) if user.username == "ada")
    );
}

#[tokio::test]
async fn the_clients_own_impersonation_goes_on_only_where_a_rule_allows_it() {
    let asks = [("impersonate-user", "robot:ci"), ("impersonate-extra-weir.dev%2fsession", "forged")];
    let strict = policy("[{name: w, takes: [workload], when: 'true', impersonate: {}}]");
    let refused = goes_on(&strict, &asks).await.expect_err("no rule allows it");
    assert!(refused.contains("impersonation is refused"), "{refused}");

    let open = policy(
        "[{name: w, takes: [workload], when: 'true', allowImpersonation: \"impersonated.username == 'robot:' + pod.namespace\",
           impersonate: {}}]",
    );
    let seen = goes_on(&open, &asks).await.expect("allowed");
    assert_eq!(seen["impersonate-user"], "robot:ci");
    let session: Vec<_> = seen.get_all("impersonate-extra-weir.dev%2fsession").iter().collect();
    assert_eq!(session, ["session-1"], "Weir's own words are not the client's");
    assert!(goes_on(&open, &[("impersonate-user", "robot:other")]).await.is_err());
    // The rule allows it, the cluster does not.
    let lacking = goes_on(&open, &[("impersonate-user", "robot:ci"), ("impersonate-group", "dev")]).await;
    let lacking = lacking.expect_err("no right to the group");
    assert!(lacking.contains("\"system:serviceaccount:ci:deployer\", as whom"), "{lacking}");
    assert!(lacking.contains("no right to impersonate groups \"dev\""), "{lacking}");
    let refused =
        goes_on(&open, &[("impersonate-user", "robot:ci"), ("impersonate-group", "system:masters")]).await;
    assert!(refused.expect_err("Kubernetes' own").contains("system:masters"));
    assert!(
        goes_on(&open, &[("impersonate-group", "dev")]).await.expect_err("no user").contains("but no user")
    );
}

#[tokio::test]
async fn without_the_agents_own_credential_nothing_goes_on() {
    let policy =
        with_own("[{name: w, takes: [workload], when: 'true', impersonate: {}}]", Own(Err("file is gone")));
    let Ok(onward) = decide(&policy, &HeaderMap::new(), None).await.onward else { panic!("a rule matched") };
    let refused = policy.credential(onward, None, "s").await.expect_err("no credential");
    assert!(matches!(refused.kind(), Kind::Unavailable(_)));
    assert!(!refused.to_string().contains("file is gone"), "what went wrong is the operators' matter");

    // Nor as whom a client asks to be, while the cluster does not say whether it may.
    let role = "[{name: w, takes: [workload], when: 'true', allowImpersonation: 'true', impersonate: {}}]";
    let policy = with_own(role, Own(Err("file is gone")));
    let asks = headers(&[("impersonate-user", "robot:ci")]);
    let Ok(onward) = decide(&policy, &asks, None).await.onward else { panic!("the rule allows it") };
    let refused = policy.credential(onward, None, "s").await.expect_err("nobody says");
    assert!(matches!(refused, Refused::ImpersonationUnchecked { .. }), "{refused}");
    assert!(matches!(refused.kind(), Kind::Unavailable(_)));
}

#[test]
fn a_replaced_credential_leaves_nothing_of_the_clients() {
    let protocol = "base64url.bearer.authorization.k8s.io.YWJj, v5.channel.k8s.io";
    let mut seen = headers(&[("impersonate-user", "x"), ("sec-websocket-protocol", protocol)]);
    let credential = Credential::Replaced {
        authorization: None,
        headers: Vec::new(),
        own_connection: true,
        assumed: None,
        of_role: None,
    };
    assert!(credential.own_connection());
    credential.apply(&mut seen);
    assert_eq!(seen.len(), 1);
    assert_eq!(seen["sec-websocket-protocol"], "v5.channel.k8s.io");
}

#[test]
fn a_mistake_in_a_rule_is_named_with_its_place() {
    for (yaml, part) in [
        ("[{name: '', when: 'true', passThrough: {}}]", "clusters[0].roles[0].name: must be there"),
        ("[{name: a, when: 'true'}]", "clusters[0].roles[0]: say one of"),
        ("[{name: a, when: 'true', passThrough: {}, deny: {}}]", "clusters[0].roles[0]: say one of"),
        ("[{name: a, when: 'user.', passThrough: {}}]", "clusters[0].roles[0].when"),
        ("[{name: a, when: 'usr.username', passThrough: {}}]", "clusters[0].roles[0].when"),
        ("[{name: a, when: 'true', takes: [], passThrough: {}}]", "clusters[0].roles[0].takes: is empty"),
        (
            "[{name: a, when: 'true', takes: [unverified], impersonate: {}}]",
            "can only be passed through or denied",
        ),
        ("[{name: a, when: 'true', impersonate: {extra: {weir.dev/session: user.uid}}}]", "is Weir's own"),
        ("[{name: a, when: 'true', impersonate: {extra: {Job: user.uid}}}]", "lower case"),
        (
            "[{name: a, when: 'true', deny: {}}, {name: a, when: 'true', deny: {}}]",
            "roles[1].name: must be unique",
        ),
        ("[{name: a, wen: 'true', deny: {}}]", "unknown field `wen`"),
    ] {
        let error = roles(yaml).expect_err(part);
        assert!(error.contains(part), "{yaml}: {error}");
    }
}
