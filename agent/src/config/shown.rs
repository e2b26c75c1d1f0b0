//! A configuration as others may see it: what `weir-agent support` tells of it.
//!
//! A list says what is shown, so that a key that is new, or that nobody knows, is hidden. The file need not be valid: a password that
//! stands where none may is why it is not. Comments are left out.

use std::{collections::BTreeSet, sync::LazyLock};

use regex::Regex;
use serde_yaml_ng::{Mapping, Value};

/// What stands in the place of what is not shown.
pub const HIDDEN: &str = "[hidden]";
/// Longest text that is shown, bytes; the longest expression has less.
const TEXT_BYTES_MAX: usize = 16 * 1024;
/// Deepest nesting that is looked into; no key lies as deep.
const DEPTH_MAX: usize = 16;

/// Keys whose values are shown, as docs/configuration.md names them.
const SHOWN: [&str; 107] = [
    "apiVersion",
    "clusters[].addresses",
    "clusters[].authentication.jwt[].claimMappings.extra[].key",
    "clusters[].authentication.jwt[].claimMappings.extra[].valueExpression",
    "clusters[].authentication.jwt[].claimMappings.groups.claim",
    "clusters[].authentication.jwt[].claimMappings.groups.expression",
    "clusters[].authentication.jwt[].claimMappings.groups.prefix",
    "clusters[].authentication.jwt[].claimMappings.uid.claim",
    "clusters[].authentication.jwt[].claimMappings.uid.expression",
    "clusters[].authentication.jwt[].claimMappings.username.claim",
    "clusters[].authentication.jwt[].claimMappings.username.expression",
    "clusters[].authentication.jwt[].claimMappings.username.prefix",
    "clusters[].authentication.jwt[].claimValidationRules[].claim",
    "clusters[].authentication.jwt[].claimValidationRules[].expression",
    "clusters[].authentication.jwt[].claimValidationRules[].message",
    "clusters[].authentication.jwt[].issuer.audienceMatchPolicy",
    "clusters[].authentication.jwt[].issuer.audiences",
    "clusters[].authentication.jwt[].issuer.discoveryURL",
    "clusters[].authentication.jwt[].issuer.throughCluster",
    "clusters[].authentication.jwt[].issuer.url",
    "clusters[].authentication.jwt[].userValidationRules[].expression",
    "clusters[].authentication.jwt[].userValidationRules[].message",
    "clusters[].hostNames",
    "clusters[].inCluster",
    "clusters[].name",
    "clusters[].roles[].allowImpersonation",
    "clusters[].roles[].assumeRole.durationSeconds",
    "clusters[].roles[].assumeRole.eksCluster.name",
    "clusters[].roles[].assumeRole.eksCluster.region",
    "clusters[].roles[].assumeRole.roleArn",
    "clusters[].roles[].assumeRole.sessionPolicy",
    "clusters[].roles[].assumeRole.sessionPolicyArns",
    "clusters[].roles[].assumeRole.through",
    "clusters[].roles[].deny.message",
    "clusters[].roles[].impersonate.extra",
    "clusters[].roles[].impersonate.groups",
    "clusters[].roles[].impersonate.systemIdentities",
    "clusters[].roles[].impersonate.uid",
    "clusters[].roles[].impersonate.user",
    "clusters[].roles[].name",
    "clusters[].roles[].takes",
    "clusters[].roles[].webIdentity.durationSeconds",
    "clusters[].roles[].webIdentity.eksCluster.name",
    "clusters[].roles[].webIdentity.eksCluster.region",
    "clusters[].roles[].webIdentity.roleArn",
    "clusters[].roles[].webIdentity.sessionPolicy",
    "clusters[].roles[].webIdentity.sessionPolicyArns",
    "clusters[].roles[].webIdentity.token",
    "clusters[].roles[].when",
    "clusters[].trust.clusterSigner.signerName",
    "enrolment[].mode",
    "enrolment[].namespaceSelector.matchExpressions[].key",
    "enrolment[].namespaceSelector.matchExpressions[].operator",
    "enrolment[].namespaceSelector.matchExpressions[].values",
    "enrolment[].namespaceSelector.matchLabels",
    "enrolment[].podSelector.matchExpressions[].key",
    "enrolment[].podSelector.matchExpressions[].operator",
    "enrolment[].podSelector.matchExpressions[].values",
    "enrolment[].podSelector.matchLabels",
    "intentAnnotations",
    "journal.bytesMax",
    "journal.idleCheckpointSeconds",
    "kafka.brokers",
    "kafka.checkpointTopic",
    "kafka.keyTopic",
    "kafka.oauth.awsMskIam.region",
    "kafka.oauth.awsMskIam.roleArn",
    "kafka.replayWindowSeconds",
    "kafka.topic",
    "kind",
    "limits.drainSeconds",
    "limits.podBacklogPercent",
    "limits.podBurstBytes",
    "limits.podBytesPerSecond",
    "limits.responseBytesMax",
    "limits.sessionIdleTimeoutSeconds",
    "metrics.address",
    "nameServers",
    "node",
    "nri.enabled",
    "recording.allowAsyncMutations",
    "recording.backlog.ageSecondsMax",
    "recording.backlog.bytesMax",
    "recording.backlog.waitSeconds",
    "recording.emergency.secondsMax",
    "recording.encryption.kms.endpoint",
    "recording.encryption.kms.key",
    "recording.masks.environment",
    "recording.masks.fields[].kinds",
    "recording.masks.fields[].paths",
    "recording.rules[].commit",
    "recording.rules[].level",
    "recording.rules[].namespaces",
    "recording.rules[].nonResourceURLs",
    "recording.rules[].resources[].group",
    "recording.rules[].resources[].resourceNames",
    "recording.rules[].resources[].resources",
    "recording.rules[].responseBytesMax",
    "recording.rules[].streams",
    "recording.rules[].userGroups",
    "recording.rules[].users",
    "recording.rules[].verbs",
    "recording.rules[].whenBehind",
    "recording.whenBehind",
    "tenant",
    "traces.endpoint",
    "traces.samplePercent",
];

/// Keys that name files. Whoever writes a secret itself there has none of these.
const FILES: [&str; 15] = [
    "cgroupRoot",
    "clusters[].certificateAuthority",
    "clusters[].clientCertificateAuthority",
    "clusters[].kubeconfig",
    "clusters[].trust.mountedCa.certificate",
    "clusters[].trust.mountedCa.clientBundle",
    "clusters[].trust.mountedCa.key",
    "journal.directory",
    "journal.signingKeyFiles",
    "kafka.oauth.tokenFile",
    "kafka.propertyFiles",
    "nri.socket",
    "recording.encryption.recipientFiles",
    "stateDirectory",
    "traces.certificateAuthority",
];

/// Maps with names that the operator chooses.
const MAPS: [&str; 4] = [
    "clusters[].roles[].impersonate.extra",
    "enrolment[].namespaceSelector.matchLabels",
    "enrolment[].podSelector.matchLabels",
    "kafka.propertyFiles",
];

/// Where properties of librdkafka stand, and those of them that are shown.
const PROPERTIES: &str = "kafka.properties";
const SHOWN_PROPERTIES: [&str; 23] = [
    "broker.address.family",
    "client.id",
    "client.rack",
    "compression.codec",
    "compression.level",
    "compression.type",
    "enable.ssl.certificate.verification",
    "linger.ms",
    "metadata.max.age.ms",
    "queue.buffering.max.ms",
    "reconnect.backoff.max.ms",
    "reconnect.backoff.ms",
    "request.timeout.ms",
    "retry.backoff.ms",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.username",
    "security.protocol",
    "socket.keepalive.enable",
    "socket.timeout.ms",
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.endpoint.identification.algorithm",
];

/// Names that are shown although nobody knows such a key: a word, as with a slip of the pen.
static WORD: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new("^[a-z][A-Za-z]{0,39}$").ok());

/// See the module.
#[derive(Debug, Default)]
pub struct Shown {
    /// The file, as YAML.
    pub text: String,
    /// What is hidden in it: it must not show elsewhere, in an error about it say.
    pub hidden: BTreeSet<String>,
}

/// Why nothing is shown.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// It is no YAML. What the parser says of it could hold what stands there.
    #[error("the configuration is no YAML, at line {line}, column {column}")]
    NoYaml {
        /// Line, 0 where the parser does not say.
        line: usize,
        /// Column.
        column: usize,
    },
}

/// Shows the text of a configuration; `harmless` takes from a value that is shown what must not be seen (a password in a URL).
///
/// # Errors
/// It is no YAML.
pub fn show(text: &str, harmless: impl Fn(&str) -> String) -> Result<Shown, Unreadable> {
    let no_yaml = |error: serde_yaml_ng::Error| {
        let (line, column) = error.location().map_or((0, 0), |at| (at.line(), at.column()));
        Unreadable::NoYaml { line, column }
    };
    let whole: Value = serde_yaml_ng::from_str(text).map_err(no_yaml)?;
    let mut hiding = Hiding { hidden: BTreeSet::new(), harmless };
    let shown = hiding.value(whole, "", 0);
    let text = serde_yaml_ng::to_string(&shown).map_err(no_yaml)?;
    Ok(Shown { text, hidden: hiding.hidden })
}

struct Hiding<F> {
    hidden: BTreeSet<String>,
    harmless: F,
}

impl<F: Fn(&str) -> String> Hiding<F> {
    fn value(&mut self, value: Value, path: &str, depth: usize) -> Value {
        match value {
            _ if depth > DEPTH_MAX => {
                self.hide(&value);
                HIDDEN.into()
            }
            Value::Null => Value::Null,
            Value::Mapping(mapping) => Value::Mapping(self.mapping(mapping, path, depth)),
            Value::Sequence(entries) => {
                let path = format!("{path}[]");
                Value::Sequence(
                    entries.into_iter().map(|entry| self.value(entry, &path, depth + 1)).collect(),
                )
            }
            Value::Tagged(tagged) => {
                self.hide(&tagged.value);
                HIDDEN.into()
            }
            scalar => self.scalar(scalar, path.strip_suffix("[]").unwrap_or(path)),
        }
    }

    fn mapping(&mut self, mapping: Mapping, path: &str, depth: usize) -> Mapping {
        let chosen = MAPS.contains(&path);
        let mut shown = Mapping::new();
        for (key, value) in mapping {
            let name = key.as_str().unwrap_or_default();
            let below = match path {
                "" => name.to_owned(),
                _ if chosen => path.to_owned(),
                PROPERTIES if SHOWN_PROPERTIES.contains(&name) => PROPERTIES.to_owned(),
                PROPERTIES => format!("{PROPERTIES}.hidden"),
                _ => format!("{path}.{name}"),
            };
            let is_free = chosen || path == PROPERTIES;
            let is_known = is_free || knows(&below);
            let is_word = WORD.as_ref().is_some_and(|word| word.is_match(name));
            let key = if is_free {
                (self.harmless)(name)
            } else if is_known || is_word {
                name.to_owned()
            } else {
                self.hide(&key);
                format!("{HIDDEN} {}", shown.len() + 1)
            };
            shown.insert(key.into(), self.value(value, &below, depth + 1));
        }
        shown
    }

    fn scalar(&mut self, scalar: Value, path: &str) -> Value {
        let is_file = FILES.contains(&path);
        let is_shown = is_file || path == PROPERTIES || SHOWN.contains(&path);
        match &scalar {
            Value::String(text) if is_shown && text.len() <= TEXT_BYTES_MAX => {
                if is_file && (!text.starts_with('/') || text.contains(char::is_whitespace)) {
                    self.hide(&scalar);
                    return HIDDEN.into();
                }
                (self.harmless)(text).into()
            }
            Value::Bool(_) | Value::Number(_) if is_shown => scalar,
            _ => {
                self.hide(&scalar);
                HIDDEN.into()
            }
        }
    }

    /// Remembers what must not show elsewhere.
    fn hide(&mut self, value: &Value) {
        match value {
            Value::String(text) => {
                self.hidden.insert(text.clone());
                // Of several lines an error may show one.
                self.hidden.extend(text.lines().map(|line| line.trim().to_owned()));
            }
            Value::Number(number) => {
                self.hidden.insert(number.to_string());
            }
            Value::Sequence(entries) => entries.iter().for_each(|entry| self.hide(entry)),
            Value::Mapping(mapping) => mapping.iter().for_each(|(key, value)| {
                self.hide(key);
                self.hide(value);
            }),
            Value::Tagged(tagged) => self.hide(&tagged.value),
            Value::Null | Value::Bool(_) => {}
        }
    }
}

/// Whether there is such a key, or one below it.
fn knows(path: &str) -> bool {
    let begins = |known: &&str| {
        let rest = known.strip_prefix(path);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || rest.starts_with("[]"))
    };
    path == PROPERTIES || SHOWN.iter().chain(&FILES).any(begins)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys whose values are hidden on purpose. A new key is put here or among those that are shown.
    const HIDDEN_ON_PURPOSE: [&str; 5] = [
        "clusters[].authentication.jwt[].claimValidationRules[].requiredValue",
        "clusters[].authentication.jwt[].issuer.certificateAuthority",
        "clusters[].roles[].assumeRole.externalId",
        // An expression may spell the secret.
        "recording.masks.patterns",
        PROPERTIES,
    ];

    fn shown(text: &str) -> Shown {
        show(text, |text| text.replace("user:pass@", "")).expect("is YAML")
    }

    #[test]
    fn every_key_of_the_documentation_is_shown_or_hidden_on_purpose() {
        let documentation = include_str!("../../../docs/configuration.md");
        let rows = documentation.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
        let leaves: BTreeSet<_> = rows
            .filter(|(_, rest)| !rest.starts_with("object |") && !rest.starts_with("list of object |"))
            .map(|(path, _)| path)
            .collect();
        let decided: BTreeSet<_> = SHOWN.into_iter().chain(FILES).chain(HIDDEN_ON_PURPOSE).collect();
        assert_eq!(leaves, decided);
    }

    #[test]
    fn the_example_is_shown_but_for_what_is_hidden_on_purpose() {
        let example = include_str!("example.yaml");
        let shown = shown(example);
        assert_eq!(shown.hidden, BTreeSet::from(["example.com".to_owned(), "weir".to_owned()]));
        assert_eq!(shown.text.matches(HIDDEN).count(), 2, "{}", shown.text);
        let written: Value = serde_yaml_ng::from_str(&shown.text).expect("is YAML");
        let whole: Value = serde_yaml_ng::from_str(example).expect("is YAML");
        assert_eq!(written["recording"], whole["recording"]);
        assert_eq!(written["kafka"], whole["kafka"]);
    }

    #[test]
    fn a_secret_is_hidden_wherever_somebody_has_put_it() {
        for text in [
            "kafka: {properties: {sasl.password: CANARY}}",
            "kafka: {properties: {ssl.key.pem: {of: [CANARY]}}}",
            "kafka: {propertyFiles: {sasl.password: CANARY}}",
            "kafka: {propertyFiles: {sasl.password: /a CANARY}}",
            "kafka: {password: CANARY}",
            "kafka: CANARY",
            "clusters: [{name: a, token: CANARY}]",
            "clusters: [{trust: {mountedCa: {key: CANARY}}}]",
            "clusters: [CANARY]",
            "clusters: [{roles: [{assumeRole: {externalId: CANARY}}]}]",
            "CANARY: 1",
            "CANARY",
            "a: !CANARY CANARY",
            "# CANARY\nnode: node-1",
            "kafka: {topic: {name: CANARY}}",
            "node: {key: CANARY}",
            "[[[[[[[[[[[[[[[[[[[[[[CANARY]]]]]]]]]]]]]]]]]]]]]]",
        ] {
            let shown = shown(text);
            assert!(!shown.text.contains("CANARY"), "{text} is shown as {}", shown.text);
            let is_remembered = shown.hidden.iter().any(|hidden| hidden.contains("CANARY"));
            assert!(is_remembered || text.starts_with('#'), "{text}");
        }
        let shown = shown("kafka: {brokers: ['user:pass@kafka:9092'], properties: {linger.ms: 5}}");
        assert!(shown.text.contains("- kafka:9092") && shown.text.contains("linger.ms: 5"), "{}", shown.text);
        let refused = show("kafka: [CANARY", str::to_owned).expect_err("is no YAML").to_string();
        assert!(!refused.contains("CANARY"), "{refused}");
    }
}
