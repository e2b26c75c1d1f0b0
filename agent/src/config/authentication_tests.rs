//! What of `authentication` in a configuration is taken, and what is refused with which words.

use expect_test::{Expect, expect};

use crate::config::{Config, Documents};

const ISSUER: &str = "{url: 'https://a.test', audiences: [weir]}";
const MAPPINGS: &str = "{username: {claim: sub, prefix: ''}}";

fn parsed(jwt: &str) -> Result<Config, String> {
    let text = format!(
        "{{apiVersion: weir.dev/v1alpha1, kind: AgentConfiguration, enrolment: [{{podSelector: {{}}, \
         namespaceSelector: {{}}}}], clusters: [{{name: a, inCluster: true, trust: {{clusterSigner: {{}}}}, \
         authentication: {{jwt: {jwt}}}, roles: []}}]}}"
    );
    Config::parse("weir.yaml".as_ref(), &text, "node").map_err(|error| error.to_string())
}

#[track_caller]
fn refused(jwt: &str, expected: Expect) {
    let error = parsed(jwt).expect_err("is refused");
    let place = "configuration weir.yaml: clusters[0].authentication.";
    expected.assert_eq(error.strip_prefix(place).unwrap_or(&error));
}

#[track_caller]
fn issuer_refused(issuer: &str, expected: Expect) {
    refused(&format!("[{{issuer: {issuer}, claimMappings: {MAPPINGS}}}]"), expected);
}

#[track_caller]
fn mappings_refused(mappings: &str, expected: Expect) {
    refused(&format!("[{{issuer: {ISSUER}, claimMappings: {mappings}}}]"), expected);
}

#[track_caller]
fn rules_refused(rules: &str, expected: Expect) {
    refused(&format!("[{{issuer: {ISSUER}, claimMappings: {MAPPINGS}, {rules}}}]"), expected);
}

#[test]
fn issuers_are_read() {
    let config = parsed(&format!("[{{issuer: {ISSUER}, claimMappings: {MAPPINGS}}}]")).expect("is valid");
    let issuer = &config.clusters[0].authentication.jwt[0];
    assert_eq!(
        (issuer.url.as_str(), issuer.audiences.as_slice()),
        ("https://a.test", &["weir".to_owned()][..])
    );
    assert!(matches!(issuer.documents, Documents::Web { discovery_url: None, authorities: None }));
    assert_eq!(parsed("[]").expect("is valid").clusters[0].authentication.jwt.len(), 0);
}

#[test]
fn issuers_follow_the_rules_of_kubernetes() {
    issuer_refused(
        "{url: 'http://a.test', audiences: [a]}",
        expect![[r#"jwt[0].issuer.url: "http://a.test" is no https URL"#]],
    );
    issuer_refused("{url: '', audiences: [a]}", expect![[r#"jwt[0].issuer.url: "" is no https URL"#]]);
    issuer_refused(
        "{url: 'https://u:p@a.test', audiences: [a]}",
        expect!["jwt[0].issuer.url: must not contain a user name or password"],
    );
    issuer_refused(
        "{url: 'https://a.test/?b=c', audiences: [a]}",
        expect!["jwt[0].issuer.url: must not have a query or fragment"],
    );
    issuer_refused(
        "{url: 'https://a.test', audiences: []}",
        expect![
            "jwt[0].issuer.audiences: is empty, so a token for anybody would do; name whom tokens must be for"
        ],
    );
    issuer_refused(
        "{url: 'https://a.test', audiences: [a, a], audienceMatchPolicy: MatchAny}",
        expect!["jwt[0].issuer.audiences[1]: must not be empty or stand twice"],
    );
    issuer_refused(
        "{url: 'https://a.test', audiences: [a, b]}",
        expect!["jwt[0].issuer.audienceMatchPolicy: must be MatchAny, since there are several audiences"],
    );
    issuer_refused(
        "{url: 'https://a.test', audiences: [a], audienceMatchPolicy: MatchAll}",
        expect![
            "jwt[0].issuer.audienceMatchPolicy: unknown variant `MatchAll`, expected `MatchAny` at line 1 column 273"
        ],
    );
}

#[test]
fn documents_are_of_one_issuer_and_in_one_place() {
    issuer_refused(
        "{url: 'https://a.test', audiences: [a], discoveryURL: 'https://a.test/'}",
        expect!["jwt[0].issuer.discoveryURL: must be another than url; leave it out where they are the same"],
    );
    issuer_refused(
        "{url: 'https://a.test', audiences: [a], discoveryURL: 'ftp://b.test'}",
        expect![[r#"jwt[0].issuer.discoveryURL: "ftp://b.test" is no https URL"#]],
    );
    issuer_refused(
        "{url: 'https://a.test', audiences: [a], certificateAuthority: /etc/ca.crt}",
        expect![
            "jwt[0].issuer.certificateAuthority: holds no certificate that can be read; it is PEM text, not the name of a file"
        ],
    );
    issuer_refused(
        "{url: 'https://a.test', audiences: [a], throughCluster: true, discoveryURL: 'https://b.test'}",
        expect![
            "jwt[0].issuer.throughCluster: leaves no room for discoveryURL or certificateAuthority; the API server is asked"
        ],
    );
    issuer_refused(
        "{url: 'https://a.test', audiences: [a], egressSelectorType: cluster}",
        expect![
            "jwt[0].issuer: unknown field `egressSelectorType`, expected one of `url`, `discoveryURL`, `throughCluster`, `certificateAuthority`, `audiences`, `audienceMatchPolicy` at line 1 column 252"
        ],
    );
    let one = format!("{{issuer: {ISSUER}, claimMappings: {MAPPINGS}}}");
    refused(
        &format!("[{one}, {one}]"),
        expect![[r#"jwt[1].issuer.url: "https://a.test" stands twice; a token would have two meanings"#]],
    );
    let at = |url: &str| {
        format!(
            "{{issuer: {{url: '{url}', audiences: [a], discoveryURL: 'https://d.test/x'}}, claimMappings: {MAPPINGS}}}"
        )
    };
    refused(
        &format!("[{}, {}]", at("https://a.test"), at("https://b.test")),
        expect!["jwt[1].issuer.discoveryURL: stands twice; a document is of one issuer"],
    );
    let many: Vec<String> = (0..65).map(|index| at(&format!("https://{index}.test"))).collect();
    refused(&format!("[{}]", many.join(", ")), expect!["jwt: has 65 entries; at most 64 are read"]);
}

#[test]
fn mappings_follow_the_rules_of_kubernetes() {
    mappings_refused(
        "{username: {}}",
        expect!["jwt[0].claimMappings.username: say either `claim` and `prefix` or `expression`"],
    );
    mappings_refused(
        "{username: {claim: sub}}",
        expect![[
            r#"jwt[0].claimMappings.username.prefix: is required beside claim; "" puts nothing in front"#
        ]],
    );
    mappings_refused(
        "{username: {claim: sub, prefix: '', expression: claims.sub}}",
        expect!["jwt[0].claimMappings.username: say either `claim` or `expression`, not both"],
    );
    mappings_refused(
        "{username: {prefix: a, expression: claims.sub}}",
        expect![
            "jwt[0].claimMappings.username.prefix: goes with claim; an expression puts it in front itself"
        ],
    );
    mappings_refused(
        "{username: {expression: 'claims.sub +'}}",
        expect![
            "jwt[0].claimMappings.username.expression: line 1, column 13: Syntax error: mismatched input '<EOF>' expecting {'[', '{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, NUM_UINT, STRING, BYTES, IDENTIFIER}"
        ],
    );
    mappings_refused(
        "{username: {expression: user.username}}",
        expect![[
            r#"jwt[0].claimMappings.username.expression: line 1, column 1: unknown variable "user"; known here: claims"#
        ]],
    );
    mappings_refused(
        "{username: {expression: claims.email}}",
        expect![
            "jwt[0].claimMappings.username.expression: reads claims.email, so it, a claimValidationRules expression or an extra valueExpression must read claims.email_verified"
        ],
    );
    mappings_refused(
        "{username: {claim: a, prefix: ''}, groups: {claim: b}}",
        expect![[
            r#"jwt[0].claimMappings.groups.prefix: is required beside claim; "" puts nothing in front"#
        ]],
    );
    mappings_refused(
        "{username: {claim: a, prefix: ''}, uid: {claim: b, expression: claims.c}}",
        expect!["jwt[0].claimMappings.uid: say either `claim` or `expression`, not both"],
    );
}

#[test]
fn extra_values_have_keys_of_a_domain() {
    let extra = |extra: &str| format!("{{username: {{claim: a, prefix: ''}}, extra: [{extra}]}}");
    mappings_refused(
        &extra("{key: team, valueExpression: claims.a}"),
        expect![[
            r#"jwt[0].claimMappings.extra[0].key: "team" must be a domain, a slash and a path, in lower case"#
        ]],
    );
    mappings_refused(
        &extra("{key: a.test/Team, valueExpression: claims.a}"),
        expect![[
            r#"jwt[0].claimMappings.extra[0].key: "a.test/Team" must be a domain, a slash and a path, in lower case"#
        ]],
    );
    mappings_refused(
        &extra("{key: x.k8s.io/a, valueExpression: claims.a}"),
        expect![[
            r#"jwt[0].claimMappings.extra[0].key: "x.k8s.io/a" is of a domain that Kubernetes keeps to itself"#
        ]],
    );
    mappings_refused(
        &extra("{key: kubernetes.io/a, valueExpression: claims.a}"),
        expect![[
            r#"jwt[0].claimMappings.extra[0].key: "kubernetes.io/a" is of a domain that Kubernetes keeps to itself"#
        ]],
    );
    mappings_refused(
        &extra("{key: a.test/a, valueExpression: ''}"),
        expect![
            "jwt[0].claimMappings.extra[0].valueExpression: line 1, column 1: Syntax error: mismatched input '<EOF>' expecting {'[', '{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, NUM_UINT, STRING, BYTES, IDENTIFIER}"
        ],
    );
    mappings_refused(
        &extra("{key: a.test/a, valueExpression: claims.a}, {key: a.test/a, valueExpression: claims.b}"),
        expect![[r#"jwt[0].claimMappings.extra[1].key: "a.test/a" stands twice"#]],
    );
    let verified = [
        "{username: {expression: \"claims.email_verified ? claims.email : claims.sub\"}}",
        "{username: {expression: claims.email}, extra: [{key: a.test/b, valueExpression: string(claims.email_verified)}]}",
    ];
    for mappings in verified {
        assert!(parsed(&format!("[{{issuer: {ISSUER}, claimMappings: {mappings}}}]")).is_ok(), "{mappings}");
    }
}

#[test]
fn rules_are_of_one_kind_and_can_be_evaluated() {
    rules_refused(
        "claimValidationRules: [{}]",
        expect![
            "jwt[0].claimValidationRules[0]: say either `claim` and `requiredValue`, or `expression` and `message`"
        ],
    );
    rules_refused(
        "claimValidationRules: [{claim: a, expression: 'true'}]",
        expect![
            "jwt[0].claimValidationRules[0]: say either `claim` and `requiredValue`, or `expression` and `message`"
        ],
    );
    rules_refused(
        "claimValidationRules: [{claim: a, message: b}]",
        expect![
            "jwt[0].claimValidationRules[0]: say either `claim` and `requiredValue`, or `expression` and `message`"
        ],
    );
    rules_refused(
        "claimValidationRules: [{expression: 'true', requiredValue: b}]",
        expect![
            "jwt[0].claimValidationRules[0]: say either `claim` and `requiredValue`, or `expression` and `message`"
        ],
    );
    rules_refused(
        "claimValidationRules: [{expression: 'now()'}]",
        expect![[
            r#"jwt[0].claimValidationRules[0].expression: line 1, column 4: unknown function "now"; known with these arguments: bool, bytes, double, dyn, int, size, string, type, uint"#
        ]],
    );
    rules_refused(
        "userValidationRules: [{expression: claims.sub}]",
        expect![[
            r#"jwt[0].userValidationRules[0].expression: line 1, column 1: unknown variable "claims"; known here: user"#
        ]],
    );
    let many = vec!["{expression: 'true'}"; 65].join(", ");
    rules_refused(
        &format!("userValidationRules: [{many}]"),
        expect!["jwt[0].userValidationRules: has 65 entries; at most 64 are read"],
    );
}
