//! What a request pays for being somebody's: a token that was verified before, and one rule over whose it is.
//! `cargo xtask bench auth` runs it. Goal: 50 µs for both.
#![expect(clippy::unwrap_used, reason = "what fails here fails the bench, with its place")]
#![expect(clippy::print_stdout, reason = "the table is what the bench is for")]

#[path = "../src/auth/signer.rs"]
#[expect(dead_code, reason = "the bench needs a part of what the tests make")]
mod signer;

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use serde_json::json;
use tokio::runtime::Runtime;
use weir_agent::{
    auth::{
        Asked, Origin, OwnCredential, Policy, Question, Right, Rules,
        expression::{Expression, Value},
        fetch::{Fetch, FetchError},
        issuers::{Issuers, Moment},
    },
    aws::Aws,
    config::Config,
    proxy::Labels,
};
use weir_common::{
    attributes::Attributes,
    event::{Caller, Pod, UserInfo},
};
use zeroize::Zeroizing;

use crate::signer::Signer;

/// Operations of a row.
const OPERATIONS: u32 = 20_000;
/// Groups of the caller: a person of a large company.
const GROUPS: usize = 100;
/// Rules before the one that is for the caller, in the last rows.
const RULES_BEFORE: usize = 31;
const CONFIGURATION: &str = "
apiVersion: weir.dev/v1alpha1
kind: AgentConfiguration
clusters:
- name: a
  inCluster: true
  trust: {clusterSigner: {}}
  authentication:
    jwt:
    - issuer: {url: 'https://issuer.test', throughCluster: true, audiences: [weir]}
      claimMappings:
        username: {claim: sub, prefix: 'oidc:'}
        groups: {claim: groups, prefix: 'oidc:'}
  roles: ROLES
enrolment: [{podSelector: {}, namespaceSelector: {}}]
";
/// The rule that is for the caller, which it tells by the last of its groups.
const RULE: &str = "'oidc:group-99' in groups && claims.sub.startsWith('jane') && request.verb in ['get', 'list'] && \
                    request.namespace == 'team-a'";
/// The same with a macro, which asks for each group one by one.
const RULE_WITH_MACRO: &str = "groups.exists(g, g == 'oidc:group-99') && claims.sub.startsWith('jane') && request.verb in \
                               ['get', 'list'] && request.namespace == 'team-a'";
const POD_UID: &str = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";

/// An issuer's documents, in memory.
#[derive(Debug)]
struct Documents(serde_json::Value);

impl Fetch for Documents {
    fn fetch<'a>(&'a self, target: &'a str) -> BoxFuture<'a, Result<Bytes, FetchError>> {
        let document = match target {
            "/openid/v1/jwks" => self.0.clone(),
            _ => json!({"issuer": "https://issuer.test", "jwks_uri": "https://issuer.test/keys"}),
        };
        Box::pin(async move { Ok(document.to_string().into()) })
    }
}

/// An agent whose own credential is a token.
#[derive(Debug)]
struct Own;

impl OwnCredential for Own {
    fn authorization(&self) -> BoxFuture<'_, Result<Option<HeaderValue>, String>> {
        Box::pin(async { Ok(Some(HeaderValue::from_static("Bearer own"))) })
    }

    fn lacks<'a>(
        &'a self,
        _: &'a UserInfo,
        _: &'a [Right],
    ) -> BoxFuture<'a, Result<Option<&'a Right>, String>> {
        Box::pin(async { Err("not asked for".to_owned()) })
    }

    fn mint<'a>(&'a self, _: &'a Pod, _: &'a str) -> BoxFuture<'a, Result<Zeroizing<String>, String>> {
        Box::pin(async { Err("not asked for".to_owned()) })
    }
}

fn configuration(rules_before: usize) -> Config {
    let before = (0..rules_before).map(|index| {
        let when = RULE.replace("group-99", &format!("other-{index}"));
        format!("{{name: r{index}, when: \"{when}\", deny: {{}}}}, ")
    });
    let before: String = before.collect();
    let roles = format!(
        "[{before}{{name: readers, when: \"{RULE}\", impersonate: {{user: \"'ci:' + claims.sub\"}}}}]"
    );
    Config::parse("weir.yaml".as_ref(), &CONFIGURATION.replace("ROLES", &roles), "node").unwrap()
}

/// All that the proxy does to know whose a request is and what it goes on with.
fn decisions(runtime: &Runtime, documents: &Arc<dyn Fetch>, token: &str) {
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
    let path = "/api/v1/namespaces/team-a/pods";
    let attributes = Attributes::parse("GET", path, None);
    let pod = Pod { uid: POD_UID.to_owned(), ..Pod::default() };
    let caller = Arc::new(Caller { pod: Some(pod), ..Caller::default() });
    let origin = Origin::new("a", caller, &Labels::default());
    for rules_before in [0, RULES_BEFORE] {
        let cluster = &configuration(rules_before).clusters[0];
        let policy = Policy::new(
            "a".to_owned(),
            Rules {
                roles: cluster.roles.clone().unwrap(),
                issuers: Arc::new(Issuers::new(&cluster.authentication.jwt, documents).unwrap()),
                own: Arc::new(Own),
                aws: Aws::new(),
                node: "node".to_owned(),
            },
        );
        row(&format!("decision and credential, rule {}", rules_before + 1), || {
            let question = Question { method: "GET", path, attributes: &attributes };
            let asked = Asked { headers: &headers, question, origin: &origin, certificate: None };
            let onward = runtime.block_on(policy.decide(&asked)).onward.unwrap();
            let credential = runtime.block_on(policy.credential(onward, None, "session")).unwrap();
            let mut forwarded = headers.clone();
            credential.apply(&mut forwarded);
            black_box(forwarded);
        });
    }
}

fn row(name: &str, mut operation: impl FnMut()) {
    operation();
    let begun = Instant::now();
    for _ in 0..OPERATIONS {
        operation();
    }
    let each: Duration = begun.elapsed() / OPERATIONS;
    println!("{name:<58} {:>9.2}", each.as_nanos() as f64 / 1000.0);
}

fn main() {
    println!("load {}", std::fs::read_to_string("/proc/loadavg").unwrap().trim());
    println!("{:<58} {:>9}", "operation", "mean/µs");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = configuration(0);
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let groups: Vec<String> = (0..GROUPS).map(|index| format!("group-{index}")).collect();
    let claims = json!({
        "iss": "https://issuer.test", "aud": "weir", "sub": "jane", "exp": seconds + 3600, "groups": groups,
        "kubernetes.io": {"pod": {"uid": POD_UID}},
    });
    for signer in [Signer::rs256(), Signer::es256()] {
        let documents: Arc<dyn Fetch> = Arc::new(Documents(json!({"keys": [signer.public("k1")]})));
        let issuers = Issuers::new(&config.clusters[0].authentication.jwt, &documents).unwrap();
        let token = signer.token("k1", &claims);
        let verified = runtime.block_on(issuers.verify(&token, Moment::now())).unwrap();
        let bytes = token.len();
        row(&format!("{} token of {bytes} bytes, verified before", signer.algorithm()), || {
            black_box(runtime.block_on(issuers.verify(&token, Moment::now())).unwrap());
        });
        let tokens: Vec<String> = (0..64).map(|_| signer.token("k1", &claims)).collect();
        let begun = Instant::now();
        for token in &tokens {
            // A memory of its own for each, so that none is known.
            let issuers = Issuers::new(&config.clusters[0].authentication.jwt, &documents).unwrap();
            black_box(runtime.block_on(issuers.verify(token, Moment::now())).unwrap());
        }
        let each = begun.elapsed() / u32::try_from(tokens.len()).unwrap();
        println!(
            "{:<58} {:>9.2}",
            format!("{} token, first time, keys in memory", signer.algorithm()),
            each.as_nanos() as f64 / 1000.0
        );

        let request = json!({"verb": "get", "resource": "pods", "namespace": "team-a", "path": "/api/v1/namespaces/team-a/pods"});
        for (name, rule) in [("a rule", RULE), ("a rule with a macro", RULE_WITH_MACRO)] {
            let rule = Expression::compile(rule, &["groups", "claims", "request"]).unwrap();
            row(&format!("{name} over claims, request and {GROUPS} groups"), || {
                let request = Value::from_json(&request).unwrap();
                let variables = verified.subject.variables().with("request", &request);
                assert!(rule.boolean(&variables).unwrap());
            });
        }
        decisions(&runtime, &documents, &token);
    }
}
