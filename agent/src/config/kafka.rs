//! Where events are published. What librdkafka makes of the properties, [`crate::publishing`] checks.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::Deserialize;

use super::raw::{Invalid, invalid, readable};
use crate::aws::{RoleArn, is_region};

/// Most brokers that are named.
const BROKERS_MAX: usize = 64;
/// Most properties, and most files with properties.
const PROPERTIES_MAX: usize = 128;
/// Longest name of a topic, by Kafka's own rules.
const TOPIC_BYTES_MAX: usize = 249;
/// How long what was acknowledged stays in the journal, unless it is configured.
const REPLAY_WINDOW_SECONDS: u64 = 3600;
/// The longest that it may stay.
const REPLAY_WINDOW_SECONDS_MAX: u64 = 30 * 24 * 3600;

/// Properties that Weir sets, since its promises rest on them; and others that would get around them.
const FIXED: [&str; 24] = [
    "acks",
    "allow.auto.create.topics",
    "batch.size",
    "bootstrap.servers",
    "delivery.timeout.ms",
    "enable.gapless.guarantee",
    "enable.idempotence",
    "max.in.flight",
    "max.in.flight.requests.per.connection",
    "message.max.bytes",
    "message.send.max.retries",
    "message.timeout.ms",
    "metadata.broker.list",
    "partitioner",
    "plugin.library.paths",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "request.required.acks",
    "retries",
    "ssl.engine.location",
    "ssl.providers",
    "statistics.interval.ms",
    "transaction.timeout.ms",
    "transactional.id",
];

/// Properties that `kafka.oauth` sets, or makes meaningless.
const OAUTH_FIXED: [&str; 5] =
    ["sasl.mechanism", "sasl.mechanisms", "sasl.password", "sasl.username", "security.protocol"];
/// How others of those begin.
const OAUTH_PREFIX: &str = "sasl.oauthbearer.";

/// Words in the names of properties whose values are secrets.
const SECRET: [&str; 6] =
    ["password", "secret", "passphrase", "key.pem", "private.key", "sasl.oauthbearer.config"];

/// Where those belong.
const SECRET_MEND: &str = "put it into a file and name that in kafka.propertyFiles";

/// Where events are published.
#[derive(Clone, Debug)]
pub struct Kafka {
    /// `HOST:PORT` of brokers to begin with.
    pub brokers: Vec<String>,
    /// Topic of events.
    pub topic: String,
    /// Topic of checkpoints; the same unless configured.
    pub checkpoint_topic: String,
    /// Topic of the wrapped keys of content that is encrypted.
    pub key_topic: Option<String>,
    /// Properties of librdkafka; none is a secret.
    pub properties: BTreeMap<String, String>,
    /// Files with values of others.
    pub property_files: BTreeMap<String, PathBuf>,
    /// Whose token the brokers are shown, if they are to be.
    pub oauth: Option<OAuth>,
    /// How long what was acknowledged stays in the journal.
    pub replay_window: Duration,
}

/// Where the token comes from that the brokers are shown by SASL OAUTHBEARER.
#[derive(Clone, Debug)]
pub enum OAuth {
    /// From a file that somebody else renews.
    TokenFile(PathBuf),
    /// The agent signs it: Amazon MSK knows callers by IAM.
    AwsMskIam {
        /// Region of the brokers.
        region: String,
        /// A role to sign as; without it the agent's own credentials sign.
        role_arn: Option<RoleArn>,
    },
}

impl Kafka {
    /// Whether the configuration sets this property.
    pub fn sets(&self, property: &str) -> bool {
        self.properties.contains_key(property) || self.property_files.contains_key(property)
    }
}

// As it is written.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawKafka {
    /// Brokers to begin with, as `HOST:PORT`; they name the others.
    #[cfg_attr(test, schemars(length(min = 1, max = BROKERS_MAX)))]
    brokers: Vec<String>,
    /// Topic of events. It must exist; see kafka.md for how it should be made.
    #[cfg_attr(test, schemars(length(min = 1, max = TOPIC_BYTES_MAX)))]
    topic: String,
    /// Topic of signed checkpoints. Without it: that of events.
    checkpoint_topic: Option<String>,
    /// Topic of the wrapped keys of encrypted content; needed with `recording.encryption`, and one of its own, since it is
    /// compacted: who erases a key there erases the content. See encryption.md.
    key_topic: Option<String>,
    #[cfg_attr(test, schemars(extend("patternProperties" = secrets())))]
    /// Properties of librdkafka, such as `security.protocol`. Refused are those that Weir sets itself, and secrets, which
    /// belong into files: `propertyFiles`.
    #[serde(default)]
    properties: BTreeMap<String, RawValue>,
    /// Files that hold values of properties, such as `sasl.password`: without the line's end. Read whenever the agent
    /// makes a new client.
    #[serde(default)]
    property_files: BTreeMap<String, PathBuf>,
    /// SASL OAUTHBEARER over TLS: the brokers are shown a token, which is renewed before it ends.
    oauth: Option<RawOAuth>,
    /// Seconds that segments of the journal stay after all in them was acknowledged; then they are removed.
    #[cfg_attr(test, schemars(range(max = REPLAY_WINDOW_SECONDS_MAX)))]
    #[serde(default = "replay_window_seconds")]
    replay_window_seconds: u64,
}

// Exactly one of the two.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawOAuth {
    /// File with the token, which somebody else renews: a projected service account token, or what a sidecar writes. It is read
    /// anew before the token that was in it ends.
    token_file: Option<PathBuf>,
    /// For Amazon MSK with IAM: the agent signs tokens itself.
    aws_msk_iam: Option<RawMskIam>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawMskIam {
    /// Region of the brokers.
    region: String,
    /// IAM role that is assumed to sign. Without it the agent's own credentials sign.
    role_arn: Option<String>,
}

/// Secrets in the schema: by the pattern of their names nothing fits but the mend, which validators then say.
#[cfg(test)]
fn secrets() -> serde_json::Value {
    // Expressions here have no "but not": what follows the word is nothing, or does not end with ".file".
    let no_file = r"(|.*[^e]|(.*[^l])?e|(.*[^i])?le|(.*[^f])?ile|(.*[^.])?file)$";
    let words = SECRET.map(|word| word.replace('.', r"\.")).join("|");
    serde_json::json!({format!("({words}){no_file}"): {"const": SECRET_MEND}})
}

impl RawOAuth {
    fn validate(self) -> Result<OAuth, Invalid> {
        match (self.token_file, self.aws_msk_iam) {
            (Some(path), None) => Ok(OAuth::TokenFile(readable("kafka.oauth.tokenFile".to_owned(), path)?)),
            (None, Some(RawMskIam { region, .. })) if !is_region(&region) => {
                let problem = format!("{region:?} is no name of an AWS region; give one like eu-central-1");
                invalid("kafka.oauth.awsMskIam.region", problem)
            }
            (None, Some(RawMskIam { region, role_arn })) => {
                let role_arn = role_arn.map(|arn| RoleArn::parse(&arn)).transpose();
                let key = "kafka.oauth.awsMskIam.roleArn";
                let role_arn = role_arn.or_else(|error| invalid(key, error.to_string()))?;
                Ok(OAuth::AwsMskIam { region, role_arn })
            }
            _ => invalid("kafka.oauth", "say either `tokenFile: FILE` or `awsMskIam: {region: REGION}`"),
        }
    }
}

fn replay_window_seconds() -> u64 {
    REPLAY_WINDOW_SECONDS
}

// A value as people write it; librdkafka takes text.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(extend("type" = ["string", "integer", "boolean"])))]
#[serde(untagged)]
enum RawValue {
    Text(String),
    Number(i64),
    Flag(bool),
}

impl RawValue {
    fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Number(number) => number.to_string(),
            Self::Flag(flag) => flag.to_string(),
        }
    }
}

impl RawKafka {
    pub(super) fn validate(self) -> Result<Kafka, Invalid> {
        brokers(&self.brokers)?;
        topic("kafka.topic", &self.topic)?;
        if let Some(name) = &self.checkpoint_topic {
            topic("kafka.checkpointTopic", name)?;
        }
        if let Some(name) = &self.key_topic {
            topic("kafka.keyTopic", name)?;
            if *name == self.topic || Some(name) == self.checkpoint_topic.as_ref() {
                let problem = "must be a topic of its own: it is compacted, and the others must not be";
                return invalid("kafka.keyTopic", problem);
            }
        }
        if self.properties.len() > PROPERTIES_MAX || self.property_files.len() > PROPERTIES_MAX {
            return invalid("kafka.properties", format!("has more than {PROPERTIES_MAX} entries"));
        }
        let has_oauth = self.oauth.is_some();
        for name in self.properties.keys() {
            let key = format!("kafka.properties.{name}");
            not_fixed(&key, name, has_oauth)?;
            if SECRET.iter().any(|word| name.contains(word)) && !name.ends_with(".file") {
                let problem = format!("is a secret, which must not stand in a configuration; {SECRET_MEND}");
                return invalid(key, problem);
            }
        }
        let mut property_files = BTreeMap::new();
        for (name, path) in self.property_files {
            let key = format!("kafka.propertyFiles.{name}");
            not_fixed(&key, &name, has_oauth)?;
            if self.properties.contains_key(&name) {
                return invalid(key, "is in kafka.properties as well; keep one");
            }
            property_files.insert(name, readable(key, path)?);
        }
        if self.replay_window_seconds > REPLAY_WINDOW_SECONDS_MAX {
            let problem = format!("must be at most {REPLAY_WINDOW_SECONDS_MAX}");
            return invalid("kafka.replayWindowSeconds", problem);
        }
        Ok(Kafka {
            brokers: self.brokers,
            checkpoint_topic: self.checkpoint_topic.unwrap_or_else(|| self.topic.clone()),
            topic: self.topic,
            key_topic: self.key_topic,
            properties: self.properties.into_iter().map(|(name, value)| (name, value.text())).collect(),
            property_files,
            oauth: self.oauth.map(RawOAuth::validate).transpose()?,
            replay_window: Duration::from_secs(self.replay_window_seconds),
        })
    }
}

fn brokers(brokers: &[String]) -> Result<(), Invalid> {
    if brokers.is_empty() {
        return invalid("kafka.brokers", "is empty; name at least one broker as HOST:PORT");
    }
    if brokers.len() > BROKERS_MAX {
        let problem = format!("has {} entries; at most {BROKERS_MAX} are asked", brokers.len());
        return invalid("kafka.brokers", problem);
    }
    for (index, broker) in brokers.iter().enumerate() {
        let (host, port) = broker.rsplit_once(':').unwrap_or_default();
        let port = port.parse::<u16>().is_ok_and(|port| port != 0);
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._[]:%".contains(c);
        let bracketed = !host.contains(':') || (host.starts_with('[') && host.ends_with(']'));
        if host.is_empty() || !port || !bracketed || !host.chars().all(plain) {
            let problem = format!("{broker:?} is no HOST:PORT; how it is spoken to, kafka.properties says");
            return invalid(format!("kafka.brokers[{index}]"), problem);
        }
    }
    Ok(())
}

/// Kafka's own rules for the names of topics.
fn topic(key: &str, name: &str) -> Result<(), Invalid> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty()
        || name.len() > TOPIC_BYTES_MAX
        || [".", ".."].contains(&name)
        || !name.chars().all(legal)
    {
        let problem = format!(
            "{name:?} is no name of a topic: 1 to {TOPIC_BYTES_MAX} letters, digits, dots, hyphens and underscores"
        );
        return invalid(key, problem);
    }
    Ok(())
}

fn not_fixed(key: &str, name: &str, has_oauth: bool) -> Result<(), Invalid> {
    if has_oauth && (OAUTH_FIXED.contains(&name) || name.starts_with(OAUTH_PREFIX)) {
        return invalid(key, "is set by kafka.oauth, or of no use with it; leave it out");
    }
    // A client that plays broker would take everything, and the journal would let go of it.
    if FIXED.contains(&name) || name.starts_with("test.") {
        return invalid(key, "is set by Weir, whose promises rest on it; leave it out");
    }
    if name.is_empty() || name.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return invalid(key, "is no name of a property");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::RawKafka;

    const WHOLE: &str = "{brokers: ['kafka-1.example.test:9093', '[2001:db8::1]:9092'], topic: weir, properties: {security.protocol: SASL_SSL, linger.ms: 5, socket.keepalive.enable: true}}";

    #[track_caller]
    fn refused(text: &str, expected: &str) {
        let raw: RawKafka = serde_yaml_ng::from_str(text).unwrap();
        let invalid = raw.validate().expect_err("is refused");
        assert_eq!(format!("{}: {}", invalid.key, invalid.problem), expected);
    }

    #[test]
    fn what_is_left_out_has_its_default_and_values_are_text() {
        let kafka = serde_yaml_ng::from_str::<RawKafka>(WHOLE).unwrap().validate().ok().unwrap();
        assert_eq!((kafka.topic.as_str(), kafka.checkpoint_topic.as_str()), ("weir", "weir"));
        assert_eq!(kafka.replay_window, Duration::from_secs(3600));
        assert_eq!(kafka.properties["linger.ms"], "5");
        assert_eq!(kafka.properties["socket.keepalive.enable"], "true");
        assert!(kafka.sets("linger.ms") && !kafka.sets("ssl.ca.pem"));
    }

    #[test]
    fn brokers_and_topics_out_of_form_are_named() {
        refused(
            &WHOLE.replace("['kafka-1.example.test:9093', '[2001:db8::1]:9092']", "[]"),
            "kafka.brokers: is empty; name at least one broker as HOST:PORT",
        );
        for broker in
            ["kafka", "kafka:0", "kafka:x", ":9092", "ssl://kafka:9092", "2001:db8::1:9092", "a,b:1"]
        {
            refused(
                &WHOLE.replace("kafka-1.example.test:9093", broker),
                &format!(
                    "kafka.brokers[0]: {broker:?} is no HOST:PORT; how it is spoken to, kafka.properties says"
                ),
            );
        }
        refused(
            &WHOLE.replace("topic: weir,", "topic: weir, keyTopic: weir,"),
            "kafka.keyTopic: must be a topic of its own: it is compacted, and the others must not be",
        );
        for topic in ["'a b'", "'..'", "''", "a/b"] {
            let raw: RawKafka =
                serde_yaml_ng::from_str(&WHOLE.replace("topic: weir", &format!("topic: {topic}"))).unwrap();
            assert!(raw.validate().is_err_and(|invalid| invalid.key == "kafka.topic"), "{topic}");
        }
    }

    #[test]
    fn what_weir_sets_itself_is_refused_by_name() {
        for name in ["acks", "enable.idempotence", "bootstrap.servers", "test.mock.num.brokers"] {
            refused(
                &WHOLE.replace("linger.ms", name),
                &format!("kafka.properties.{name}: is set by Weir, whose promises rest on it; leave it out"),
            );
        }
    }

    #[test]
    fn one_source_of_tokens_is_named_and_sets_what_belongs_to_it() {
        const PLAIN: &str = "{brokers: ['kafka:9093'], topic: weir, properties: {linger.ms: 5}}";
        let with = |oauth: &str| format!("{}, oauth: {oauth}}}", &PLAIN[..PLAIN.len() - 1]);
        let neither = "kafka.oauth: say either `tokenFile: FILE` or `awsMskIam: {region: REGION}`";
        refused(&with("{}"), neither);
        refused(&with("{tokenFile: /t, awsMskIam: {region: eu-central-1}}"), neither);
        refused(
            &with("{tokenFile: /nowhere/token}"),
            "kafka.oauth.tokenFile: cannot open /nowhere/token: No such file or directory (os error 2); is it mounted?",
        );
        refused(
            &with("{awsMskIam: {region: 'evil.example/'}}"),
            "kafka.oauth.awsMskIam.region: \"evil.example/\" is no name of an AWS region; give one like eu-central-1",
        );
        let role: RawKafka =
            serde_yaml_ng::from_str(&with("{awsMskIam: {region: eu-central-1, roleArn: x}}")).unwrap();
        assert!(role.validate().is_err_and(|invalid| invalid.key == "kafka.oauth.awsMskIam.roleArn"));
        let msk =
            with("{awsMskIam: {region: eu-central-1, roleArn: 'arn:aws:iam::123456789012:role/kafka'}}");
        let kafka = serde_yaml_ng::from_str::<RawKafka>(&msk).unwrap().validate().ok().unwrap();
        assert!(matches!(kafka.oauth, Some(super::OAuth::AwsMskIam { role_arn: Some(_), .. })));
        for name in ["security.protocol", "sasl.mechanisms", "sasl.username", "sasl.oauthbearer.config"] {
            refused(
                &msk.replace("linger.ms", name),
                &format!(
                    "kafka.properties.{name}: is set by kafka.oauth, or of no use with it; leave it out"
                ),
            );
        }
    }

    #[test]
    fn a_secret_stands_in_a_file() {
        for name in ["sasl.password", "ssl.key.password", "ssl.key.pem", "sasl.oauthbearer.client.secret"] {
            refused(
                &WHOLE.replace("linger.ms", name),
                &format!(
                    "kafka.properties.{name}: is a secret, which must not stand in a configuration; put it into a file and name that in kafka.propertyFiles"
                ),
            );
        }
        let patterns = super::secrets();
        let pattern = patterns.as_object().unwrap().keys().next().unwrap();
        let pattern = regex::Regex::new(pattern).unwrap();
        for (name, is_secret) in [
            ("sasl.password", true),
            ("ssl.key.pem", true),
            ("sasl.oauthbearer.client.secret", true),
            ("sasl.oauthbearer.config", true),
            ("sasl.oauthbearer.assertion.private.key.passphrase", true),
            ("ssl.key.passwordfile", true),
            ("sasl.oauthbearer.assertion.private.key.file", false),
            ("ssl.key.location", false),
            ("linger.ms", false),
        ] {
            assert_eq!(pattern.is_match(name), is_secret, "{name} in the schema");
            let taken =
                serde_yaml_ng::from_str::<RawKafka>(&WHOLE.replace("linger.ms", name)).unwrap().validate();
            assert_eq!(taken.is_err(), is_secret, "{name}");
        }
        let with_file =
            |path: &str| format!("{}, propertyFiles: {{sasl.password: {path}}}}}", &WHOLE[..WHOLE.len() - 1]);
        refused(
            &with_file("/nowhere/password"),
            "kafka.propertyFiles.sasl.password: cannot open /nowhere/password: No such file or directory (os error 2); is it mounted?",
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        let raw: RawKafka = serde_yaml_ng::from_str(&with_file(&file.path().display().to_string())).unwrap();
        assert!(raw.validate().ok().unwrap().sets("sasl.password"));
        let both = with_file(&file.path().display().to_string()).replace("sasl.password", "linger.ms");
        refused(&both, "kafka.propertyFiles.linger.ms: is in kafka.properties as well; keep one");
    }
}
