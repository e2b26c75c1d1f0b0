//! Tokens from their arrival to a user, and everything that may be wrong with one. Documents are in memory here; the
//! way to real ones is `fetch`'s to test.

use std::{
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use expect_test::{Expect, expect};
use serde_json::{Value, json};
use weir_common::event::UserInfo;

use super::{
    error::TokenError,
    fetch::Fetch,
    issuers::{CLOCK_SKEW, Issuers, Moment, VERIFIED_BYTES_MAX, VERIFIED_MAX},
    key_source::{FETCH_INTERVAL_MIN, KEYS_AGE_MAX, KEYS_REFRESH_AGE},
    signer::{Signer, encoded},
    site::Site,
    token::TOKEN_BYTES_MAX,
};
use crate::config::{Config, JwtIssuer};

/// The service accounts of a cluster.
const CLUSTER: &str = "https://kubernetes.default.svc";
/// When all of this is: 2026-11-24T12:00:00Z.
const NOW: u64 = 1_795_521_600;

fn configured(jwt: &str) -> Vec<JwtIssuer> {
    let text = format!(
        "{{apiVersion: weir.dev/v1alpha1, kind: AgentConfiguration, enrolment: [{{podSelector: {{}}, \
         namespaceSelector: {{}}}}], clusters: [{{name: a, inCluster: true, trust: {{clusterSigner: {{}}}}, \
         authentication: {{jwt: {jwt}}}, roles: []}}]}}"
    );
    let config = Config::parse("weir.yaml".as_ref(), &text, "node").unwrap_or_else(|error| panic!("{error}"));
    config.clusters[0].authentication.jwt.clone()
}

const PLAIN: &str = "[{issuer: {url: 'https://kubernetes.default.svc', throughCluster: true, audiences: [weir, other], \
    audienceMatchPolicy: MatchAny}, claimMappings: {username: {claim: sub, prefix: 'k8s:'}, groups: {claim: groups, \
    prefix: 'k8s:'}}}]";

struct Rig {
    issuers: Issuers,
    site: Arc<Site>,
    signer: Signer,
    now: Moment,
}

impl Rig {
    fn new(jwt: &str) -> Self {
        let signer = Signer::es256();
        let site = Arc::new(Site::default());
        let discovery = json!({"issuer": CLUSTER, "jwks_uri": "https://10.0.0.1/openid/v1/jwks"});
        site.publish("/.well-known/openid-configuration", &discovery);
        site.publish("/openid/v1/jwks", &json!({"keys": [signer.public("k1")]}));
        let fetch: Arc<dyn Fetch> = Arc::clone(&site) as _;
        let issuers = Issuers::new(&configured(jwt), &fetch).expect("can be made");
        let mut now = Moment::now();
        now.wall = UNIX_EPOCH + Duration::from_secs(NOW);
        Self { issuers, site, signer, now }
    }

    fn claims() -> Value {
        json!({
            "iss": CLUSTER, "aud": ["weir"], "sub": "jane", "groups": ["dev"], "jti": "7",
            "iat": NOW - 60, "nbf": NOW - 60, "exp": NOW + 3600,
        })
    }

    /// A token with claims that differ in these; null takes one out.
    fn token(&self, other: &Value) -> String {
        let mut claims = Self::claims();
        for (name, value) in other.as_object().expect("is an object") {
            match value {
                Value::Null => drop(claims.as_object_mut().expect("is an object").remove(name)),
                value => claims[name] = value.clone(),
            }
        }
        self.signer.token("k1", &claims)
    }

    #[track_caller]
    fn check(&self, token: &str, error: &TokenError, expected: Expect) {
        let text = error.to_string();
        expected.assert_eq(&text);
        let signature = token.rsplit_once('.').map_or(token, |(_, signature)| signature);
        assert!(signature.len() < 20 || !text.contains(&signature[..20]), "shows the token");
    }

    async fn refused(&self, token: &str, expected: Expect) {
        let error = self.issuers.verify(token, self.now).await.expect_err("is refused");
        assert_eq!(error.status(), 401, "{error}");
        self.check(token, &error, expected);
    }

    async fn user(&self, other: &Value) -> UserInfo {
        let verified = self.issuers.verify(&self.token(other), self.now).await;
        verified.unwrap_or_else(|error| panic!("{error}")).subject.user.clone()
    }
}

#[tokio::test]
async fn a_token_names_its_user_and_is_verified_once() {
    let rig = Rig::new(PLAIN);
    let token = rig.token(&json!({}));
    let first = rig.issuers.verify(&token, rig.now).await.expect("is believed");
    assert_eq!(
        (first.subject.user.username.as_str(), first.subject.user.groups.as_slice()),
        ("k8s:jane", &["k8s:dev".to_owned()][..])
    );
    assert_eq!(first.subject.user.extra["authentication.kubernetes.io/credential-id"], ["JTI=7"]);
    assert_eq!(
        (first.subject.issuer.as_deref().unwrap_or_default(), first.claims["aud"].clone()),
        (CLUSTER, json!(["weir"]))
    );
    assert_eq!(rig.site.asked().len(), 2);
    let second = rig.issuers.verify(&token, rig.now).await.expect("is believed");
    assert!(Arc::ptr_eq(&first, &second));
    assert_eq!(rig.site.asked(), [] as [&str; 0]);
    assert!(!format!("{first:?} {:?}", rig.issuers).contains("dev"), "claims are not for logs");
}

#[tokio::test]
async fn times_audiences_and_issuers_that_do_not_agree_are_refused_for_their_own_reason() {
    let rig = Rig::new(PLAIN);
    rig.refused(
        &rig.token(&json!({"exp": NOW - 60})),
        expect!["the bearer token expired at 2026-11-24T11:59:00Z; log in again"],
    )
    .await;
    rig.refused(
        &rig.token(&json!({"exp": NOW - 86_400})),
        expect!["the bearer token expired at 2026-11-23T12:00:00Z; log in again"],
    )
    .await;
    rig.refused(
        &rig.token(&json!({"exp": null})),
        expect!["the bearer token's claims never expire (no exp); log in again"],
    )
    .await;
    rig.refused(
        &rig.token(&json!({"exp": "soon"})),
        expect![
            "the bearer token's claims have a time (exp, nbf, iat) that is no number of seconds; log in again"
        ],
    )
    .await;
    rig.refused(
        &rig.token(&json!({"nbf": NOW + 61})),
        expect!["the bearer token is valid only from 2026-11-24T12:01:01Z; is a clock wrong?"],
    )
    .await;
    rig.refused(
        &rig.token(&json!({"iat": NOW + 600})),
        expect!["the bearer token is valid only from 2026-11-24T12:10:00Z; is a clock wrong?"],
    )
    .await;
    rig.refused(
        &rig.token(&json!({"aud": "sts.amazonaws.com"})),
        expect![[r#"the bearer token's audience is "sts.amazonaws.com"; expected is "weir", "other""#]],
    )
    .await;
    rig.refused(&rig.token(&json!({"aud": vec!["x"; 100]})), expect![[r#"the bearer token's audience is "x", "x", "x", "x", "x", "x", "x", "x", 92 more; expected is "weir", "other""#]]).await;
    rig.refused(
        &rig.token(&json!({"aud": null})),
        expect![[r#"the bearer token's audience is missing; expected is "weir", "other""#]],
    )
    .await;
    rig.refused(&rig.token(&json!({"iss": "https://kubernetes.default.svc/"})), expect![[r#"the bearer token's issuer "https://kubernetes.default.svc/" is not configured for this cluster"#]]).await;
    rig.refused(&rig.token(&json!({"iss": "x".repeat(5000)})), expect![[r#"the bearer token's issuer "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" is not configured for this cluster"#]]).await;
    rig.refused(&rig.token(&json!({"sub": 7})), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: its claim "sub" is no string, and claimMappings.username needs it"#]]).await;
    rig.refused(&rig.token(&json!({"sub": ""})), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: its claims give an empty user name"#]]).await;
    rig.refused(&rig.token(&json!({"groups": {"a": 1}})), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: its claim "groups" is neither a string nor a list of strings, and claimMappings.groups needs it"#]]).await;
    // Just within what clocks may differ.
    for other in [
        json!({"exp": NOW - 59}),
        json!({"nbf": NOW + 60}),
        json!({"iat": NOW as f64 + 59.5}),
        json!({"aud": "other"}),
        json!({"nbf": null, "iat": null}),
        json!({"exp": 1e300}),
    ] {
        assert_eq!(rig.user(&other).await.username, "k8s:jane", "{other}");
    }
}

#[tokio::test]
async fn a_clock_that_is_ten_minutes_off_is_named() {
    let mut rig = Rig::new(PLAIN);
    let token = rig.token(&json!({"exp": NOW + 300}));
    rig.now.wall -= Duration::from_secs(600);
    rig.refused(
        &token,
        expect!["the bearer token is valid only from 2026-11-24T11:59:00Z; is a clock wrong?"],
    )
    .await;
    rig.now.wall += Duration::from_secs(1200);
    rig.refused(&token, expect!["the bearer token expired at 2026-11-24T12:05:00Z; log in again"]).await;
}

#[tokio::test]
async fn forged_tokens_are_refused() {
    let mut rig = Rig::new(PLAIN);
    let good = rig.token(&json!({}));
    let (signed, signature) = good.rsplit_once('.').expect("has dots");
    let (header, _) = signed.split_once('.').expect("has dots");
    let root = encoded(json!({"iss": CLUSTER, "aud": ["weir"], "sub": "root", "exp": NOW + 60}).to_string());
    rig.refused(
        &format!("{header}.{root}.{signature}"),
        expect![[
            r#"the bearer token's signature is not one of its issuer "https://kubernetes.default.svc""#
        ]],
    )
    .await;
    let none = encoded(r#"{"alg":"none"}"#);
    rig.refused(&format!("{none}.{root}."), expect![[r#"the bearer token is signed with algorithm "none"; accepted are RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA"#]]).await;
    rig.refused(&format!("{none}.{root}.{signature}"), expect![[r#"the bearer token is signed with algorithm "none"; accepted are RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA"#]]).await;
    // HMAC with the public key, which everybody has.
    let hmac = encoded(r#"{"alg":"HS256","kid":"k1"}"#);
    rig.refused(&format!("{hmac}.{root}.{}", encoded(hmac_with_public_key(&rig.signer, &format!("{hmac}.{root}")))), expect![[r#"the bearer token is signed with algorithm "HS256"; accepted are RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA"#]]).await;
    // Another algorithm than the key is for. The issuer is asked whether it has such a key.
    rig.now.steady += FETCH_INTERVAL_MIN;
    let other = encoded(r#"{"alg":"RS256","kid":"k1"}"#);
    rig.refused(&format!("{other}.{root}.{signature}"), expect![[r#"the bearer token is signed with a key that its issuer "https://kubernetes.default.svc" does not publish; log in again"#]]).await;
    let stranger = Signer::es256();
    rig.refused(
        &stranger.token("k1", &Rig::claims()),
        expect![[
            r#"the bearer token's signature is not one of its issuer "https://kubernetes.default.svc""#
        ]],
    )
    .await;
    rig.now.steady += FETCH_INTERVAL_MIN;
    rig.refused(&stranger.token("k9", &Rig::claims()), expect![[r#"the bearer token is signed with a key that its issuer "https://kubernetes.default.svc" does not publish; log in again"#]]).await;
    rig.refused(
        &"a".repeat(1024 * 1024),
        expect!["the bearer token has 1048576 bytes; at most 16384 are read"],
    )
    .await;
    rig.refused("static-token", expect!["the bearer token is no JSON Web Token, so no issuer can be asked for it; log in again for one that is"]).await;
    assert!(rig.issuers.verify(&good, rig.now).await.is_ok());
}

fn hmac_with_public_key(signer: &Signer, signed: &str) -> Vec<u8> {
    use aws_lc_rs::hmac;
    let public = signer.public("k1").to_string();
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, public.as_bytes()), signed.as_bytes()).as_ref().to_vec()
}

#[tokio::test]
async fn what_is_remembered_ends_with_the_token_and_with_its_key() {
    let mut rig = Rig::new(PLAIN);
    let token = rig.token(&json!({"exp": NOW + 300}));
    assert!(rig.issuers.verify(&token, rig.now).await.is_ok());
    let begun = rig.now;
    // What has ended must not come back with the time before it.
    rig.now.wall -= Duration::from_secs(86_400);
    rig.refused(
        &token,
        expect!["the bearer token is valid only from 2026-11-24T11:59:00Z; is a clock wrong?"],
    )
    .await;
    rig.now = begun;
    rig.now.wall += Duration::from_secs(300) + CLOCK_SKEW;
    rig.refused(&token, expect!["the bearer token expired at 2026-11-24T12:05:00Z; log in again"]).await;
    rig.now = begun;
    let token = rig.token(&json!({"exp": NOW + 86_400}));
    assert!(rig.issuers.verify(&token, rig.now).await.is_ok());
    // The key is taken back: the next use of the token has the keys refreshed, the one after that is refused.
    let next = Signer::es256();
    rig.site.publish("/openid/v1/jwks", &json!({"keys": [next.public("k2")]}));
    rig.now.steady += KEYS_REFRESH_AGE + Duration::from_secs(1);
    rig.site.asked();
    assert!(rig.issuers.verify(&token, rig.now).await.is_ok());
    while rig.site.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    let error = rig.issuers.verify(&token, rig.now).await.expect_err("is refused");
    assert_eq!(error.status(), 503, "it may be newer than what was fetched: {error}");
    rig.now.steady += FETCH_INTERVAL_MIN;
    rig.refused(&token, expect![[r#"the bearer token is signed with a key that its issuer "https://kubernetes.default.svc" does not publish; log in again"#]]).await;
    assert!(rig.issuers.verify(&next.token("k2", &Rig::claims()), rig.now).await.is_ok());
}

#[tokio::test]
async fn an_issuer_that_is_down_is_no_fault_of_the_token() {
    let mut rig = Rig::new(PLAIN);
    let token = rig.token(&json!({}));
    rig.site.withdraw("/openid/v1/jwks");
    let error = rig.issuers.verify(&token, rig.now).await.expect_err("is refused");
    assert_eq!(error.status(), 503);
    rig.check(&token, &error, expect![[r#"the keys of the bearer token's issuer "https://kubernetes.default.svc" cannot be had: it answers 404; try again later"#]]);
    rig.site.publish("/openid/v1/jwks", &json!({"keys": [rig.signer.public("k1")]}));
    assert_eq!(
        rig.issuers.verify(&token, rig.now).await.expect_err("is refused").status(),
        503,
        "not at once"
    );
    rig.now.steady += FETCH_INTERVAL_MIN;
    assert!(rig.issuers.verify(&token, rig.now).await.is_ok());
    // A token that is remembered, of an issuer that has been down for longer than its keys are believed.
    rig.site.withdraw("/openid/v1/jwks");
    rig.now.steady += KEYS_AGE_MAX + Duration::from_secs(1);
    assert_eq!(rig.issuers.verify(&token, rig.now).await.expect_err("is refused").status(), 503);
}

#[tokio::test]
async fn what_is_remembered_is_bounded() {
    let rig = Rig::new(PLAIN);
    for index in 0..VERIFIED_MAX {
        let token = rig.token(&json!({"sub": format!("user-{index}")}));
        assert!(rig.issuers.verify(&token, rig.now).await.is_ok());
    }
    let (tokens, bytes) = rig.issuers.remembers();
    assert!((VERIFIED_MAX / 2..=VERIFIED_MAX).contains(&tokens), "{tokens}");
    assert!(bytes <= VERIFIED_BYTES_MAX);
    for index in 0..VERIFIED_BYTES_MAX / (TOKEN_BYTES_MAX / 2) {
        let token =
            rig.token(&json!({"sub": format!("user-{index}"), "pad": "x".repeat(TOKEN_BYTES_MAX / 2)}));
        assert!(rig.issuers.verify(&token, rig.now).await.is_ok());
    }
    let (_, bytes) = rig.issuers.remembers();
    assert!((VERIFIED_BYTES_MAX / 4..=VERIFIED_BYTES_MAX).contains(&bytes), "{bytes}");
}

const MAPPED: &str = "[{issuer: {url: 'https://kubernetes.default.svc', throughCluster: true, audiences: [weir]}, \
    claimMappings: {username: {expression: \"'oidc:' + claims.email\"}, groups: {expression: \"claims.?roles.orValue([])\"}, \
    uid: {claim: sub}, extra: [{key: example.com/team, valueExpression: \"claims.?team.orValue('')\"}]}, \
    claimValidationRules: [{claim: hd, requiredValue: example.com}, {expression: 'claims.email_verified == true', \
    message: the email address is not verified}, {expression: 'claims.level > 2'}], \
    userValidationRules: [{expression: \"!user.username.endsWith('root')\", message: the name is reserved}, \
    {expression: \"user.groups.all(g, !g.startsWith('system:'))\"}]}]";

#[tokio::test]
async fn expressions_map_claims_and_rules_decide() {
    let rig = Rig::new(MAPPED);
    let other = |more: Value| {
        let mut claims =
            json!({"email": "jane@example.com", "email_verified": true, "hd": "example.com", "level": 3});
        for (name, value) in more.as_object().expect("is an object") {
            claims[name] = value.clone();
        }
        claims
    };
    let user = rig.user(&other(json!({"roles": ["a", "", "b"], "team": "blue"}))).await;
    expect![[r#"
        UserInfo {
            username: "oidc:jane@example.com",
            uid: "jane",
            groups: [
                "a",
                "b",
            ],
            extra: {
                "authentication.kubernetes.io/credential-id": [
                    "JTI=7",
                ],
                "example.com/team": [
                    "blue",
                ],
            },
        }
    "#]]
    .assert_debug_eq(&user);
    assert_eq!(rig.user(&other(json!({"roles": "one"}))).await.groups, ["one"]);
    assert_eq!(rig.user(&other(json!({}))).await.extra.len(), 1, "what is empty is left out");
    let refused = async |more: Value, expected: Expect| rig.refused(&rig.token(&other(more)), expected).await;
    refused(json!({"hd": "example.org"}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: its claim "hd" has another value than the required one"#]]).await;
    refused(json!({"hd": null}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: its claim "hd" is missing, and claimValidationRules needs it"#]]).await;
    refused(json!({"email_verified": false}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: the email address is not verified"#]]).await;
    refused(json!({"email_verified": "true"}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: the email address is not verified"#]]).await;
    refused(json!({"email_verified": null}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: claimValidationRules: no such key: "email_verified"; test for it with has()"#]]).await;
    refused(json!({"email": null}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: claimMappings.username: no such key: "email"; test for it with has()"#]]).await;
    refused(json!({"email": 7}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: claimMappings.username: "add" cannot be done with its operands"#]]).await;
    refused(json!({"level": 2}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: claimValidationRules: it does not hold that claims.level > 2"#]]).await;
    refused(json!({"level": "3"}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: claimValidationRules: found no matching overload for '_>_' applied to '(string, int)'"#]]).await;
    refused(
        json!({"email": "root"}),
        expect![[
            r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: the name is reserved"#
        ]],
    )
    .await;
    refused(json!({"roles": ["system:masters"]}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: userValidationRules: it does not hold that user.groups.all(g, !g.startsWith('system:'))"#]]).await;
    refused(json!({"roles": [7]}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: claimMappings.groups: the expression yields list, not a string or a list of strings"#]]).await;
    refused(json!({"sub": null}), expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: its claim "sub" is missing, and claimMappings.uid needs it"#]]).await;
    refused(
        json!({"roles": vec!["a"; 3000]}),
        expect!["the bearer token has 16451 bytes; at most 16384 are read"],
    )
    .await;
}

#[tokio::test]
async fn an_email_address_that_its_issuer_has_not_verified_is_no_name() {
    let rig = Rig::new(
        "[{issuer: {url: 'https://kubernetes.default.svc', throughCluster: true, audiences: [weir]}, \
         claimMappings: {username: {claim: email, prefix: ''}}}]",
    );
    assert_eq!(rig.user(&json!({"email": "a@b", "email_verified": true})).await.username, "a@b");
    assert_eq!(rig.user(&json!({"email": "a@b"})).await.username, "a@b");
    for verified in [json!(false), json!("true"), json!(1)] {
        let token = rig.token(&json!({"email": "a@b", "email_verified": verified}));
        rig.refused(&token, expect![[r#"the bearer token of issuer "https://kubernetes.default.svc" is refused: its claim "email_verified" is not true, so the email address may be somebody else's"#]]).await;
    }
}
