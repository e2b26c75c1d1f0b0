//! `recording`: how requests are committed, what happens while the journal is behind, and the emergency switch.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::Deserialize;
use weir_common::{
    encryption::RECIPIENTS_MAX,
    kms::{KeyArn, KmsKey},
};

use super::raw::{Invalid, invalid};
#[cfg(test)]
use crate::recording::MASKS_MAX;
use crate::recording::{
    BacklogLimits, Bodies, Commit, CommitRule, CommitRules, ENVIRONMENT, FieldMask, MaskError, MaskRules,
    Masks, Resources, Streams, WhenBehind,
};

/// Most rules.
const RULES_MAX: usize = 256;
/// The longest that a request may wait.
const WAIT_SECONDS_MAX: u64 = 60;
/// The longest that one emergency may last.
const EMERGENCY_SECONDS_MAX: u64 = 24 * 3600;
/// Verbs that only read, on a resource or on another path.
const READS: [&str; 5] = ["get", "list", "watch", "head", "options"];

/// How requests are recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recording {
    /// When records must be on disk, and what happens while they cannot be.
    pub commits: CommitRules,
    /// The longest that requests may go on without durable records, by the emergency switch; none: never.
    pub emergency_max: Option<Duration>,
    /// Public keys of whoever may read bodies and streams; none: they are recorded in clear.
    pub recipient_files: Vec<PathBuf>,
    /// The key of AWS KMS whose users may read them, too.
    pub kms: Option<KmsKey>,
}

impl Recording {
    /// Whether bodies and streams are encrypted.
    pub fn is_encrypted(&self) -> bool {
        !self.recipient_files.is_empty() || self.kms.is_some()
    }
}

// As it is written.
#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct RawRecording {
    /// When records must be on disk, what becomes of requests while the journal is behind, and what of bodies and streams is
    /// recorded; the first rule that matches decides all of it. Without one: mutations and streams `sync`, reads
    /// `async`. See recording.md.
    #[cfg_attr(test, schemars(length(max = RULES_MAX)))]
    rules: Vec<RawRule>,
    /// Whether rules may make mutations and streams `async`. They then go on although a crash could lose their records; the
    /// agent records a finding that says so, and a metric shows it.
    allow_async_mutations: bool,
    /// What becomes of requests while the journal is behind, unless a rule says it. Without it: `refuse`.
    when_behind: Option<WhenBehind>,
    /// When the journal counts as behind, and how long requests wait.
    backlog: RawBacklog,
    /// Allows the emergency switch, `weir-agent emergency`. Without this key it has no effect.
    emergency: Option<RawEmergency>,
    /// Encrypts bodies and streams for recipients; all else stays readable. Without it they are recorded in clear.
    encryption: Option<RawEncryption>,
    /// What is masked beside Secrets, tokens and credentials, which always are. See recording.md.
    masks: RawMasks,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawMasks {
    /// Names of environment variables whose values are masked, in pods and in whatever has a list `env` of names and values; `*`
    /// stands for any characters, and the case of letters does not matter. Without it: `*PASSWORD*`, `*PASSWD*`, `*TOKEN*`, `*SECRET*`,
    /// `*KEY*` and `*CREDENTIAL*`. An empty list masks none.
    #[cfg_attr(test, schemars(length(max = MASKS_MAX)))]
    environment: Vec<String>,
    /// Fields of objects that are masked: what is in a ConfigMap, or a custom resource.
    #[cfg_attr(test, schemars(length(max = MASKS_MAX)))]
    fields: Vec<RawFieldMask>,
    /// Regular expressions, in the syntax of Rust's regex, over bytes: what they match is masked in every string of a body, in text and
    /// logs, and in exec, attach and port-forward streams. They have no anchors, and classes are ASCII unless `(?u)` says otherwise.
    #[cfg_attr(test, schemars(length(max = MASKS_MAX)))]
    patterns: Vec<String>,
}

impl Default for RawMasks {
    fn default() -> Self {
        let environment = ENVIRONMENT.map(str::to_owned).to_vec();
        Self { environment, fields: Vec::new(), patterns: Vec::new() }
    }
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawFieldMask {
    /// Kinds of the objects, in any API group, such as `ConfigMap`; without any: all.
    #[serde(default)]
    #[cfg_attr(test, schemars(length(max = MASKS_MAX)))]
    kinds: Vec<String>,
    /// Paths from the object's root, such as `data.*`, `spec.users[*].password` or `data["tls.key"]`. `*` stands for any
    /// characters of a name; lists are looked through.
    #[cfg_attr(test, schemars(length(min = 1, max = MASKS_MAX)))]
    paths: Vec<String>,
}

impl RawMasks {
    fn validate(self) -> Result<Masks, Invalid> {
        let fields = self.fields.into_iter().map(|RawFieldMask { kinds, paths }| FieldMask { kinds, paths });
        let rules =
            MaskRules { environment: self.environment, fields: fields.collect(), patterns: self.patterns };
        Masks::new(rules)
            .or_else(|MaskError { place, problem }| invalid(format!("recording.masks.{place}"), problem))
    }
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawEncryption {
    /// Files with X25519 public keys (PEM, as `openssl pkey -pubout` writes them); absolute paths. Whoever has the private half of
    /// any of them can read. Nobody but the agent's user or root may write them. They are read when the agent starts. With
    /// `kafka`, `kafka.keyTopic` is needed as well. Needed without `kms`. See encryption.md.
    #[cfg_attr(test, schemars(length(min = 1, max = RECIPIENTS_MAX)))]
    recipient_files: Option<Vec<PathBuf>>,
    /// A key of AWS KMS: whoever may call `kms:Decrypt` with it can read, beside the recipients if there are any. The agent calls
    /// `kms:Encrypt`, with its own credentials, once for each session.
    kms: Option<RawKms>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawKms {
    /// ARN of a symmetric key, `arn:aws:kms:REGION:ACCOUNT:key/ID`; no alias.
    key: String,
    /// Address of KMS, `https://…`, such as that of a VPC endpoint without a private name. Without it: as AWS has it for the key's
    /// region.
    endpoint: Option<String>,
}

impl RawEncryption {
    fn validate(self) -> Result<(Vec<PathBuf>, Option<KmsKey>), Invalid> {
        let key = "recording.encryption.recipientFiles";
        let kms = self.kms.map(RawKms::validate).transpose()?;
        let files = match self.recipient_files {
            None if kms.is_some() => Vec::new(),
            None => return invalid("recording.encryption", "names neither recipientFiles nor kms"),
            Some(files) => files,
        };
        if kms.is_none() && files.is_empty() || files.len() > RECIPIENTS_MAX {
            return invalid(key, format!("must name from 1 to {RECIPIENTS_MAX} files"));
        }
        match files.iter().position(|path| !path.is_absolute()) {
            Some(index) => invalid(format!("{key}[{index}]"), "must be an absolute path"),
            None => Ok((files, kms)),
        }
    }
}

impl RawKms {
    fn validate(self) -> Result<KmsKey, Invalid> {
        let key = "recording.encryption.kms";
        let Ok(arn) = KeyArn::parse(&self.key) else {
            let problem = "must be the ARN of a key (arn:aws:kms:REGION:ACCOUNT:key/ID); who may change an alias would decide who reads";
            return invalid(format!("{key}.key"), problem);
        };
        let is_address = |endpoint: &String| {
            let host = endpoint.strip_prefix("https://").unwrap_or_default();
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".:-[]".contains(&byte))
        };
        match self.endpoint {
            Some(endpoint) if !is_address(&endpoint) => {
                invalid(format!("{key}.endpoint"), "must be https://HOST or https://HOST:PORT")
            }
            endpoint => Ok(KmsKey { arn, endpoint }),
        }
    }
}

// As in Kubernetes' audit `Policy`.
#[derive(Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum RawLevel {
    // Known, so that who brings it from there is told why not.
    #[cfg_attr(test, schemars(skip))]
    None,
    /// Neither body: their lengths and keyed digests.
    Metadata,
    /// The request's body.
    Request,
    /// Both bodies.
    RequestResponse,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawRule {
    /// When records of what it matches are on disk: `sync`, the request before it is forwarded and the answer before its last
    /// byte; `strict`, and each piece of a stream before it is forwarded; `async`, soon. Without it: as without a rule.
    commit: Option<Commit>,
    /// What becomes of what it matches while the journal is behind. Without it: as without a rule.
    when_behind: Option<WhenBehind>,
    /// What of the bodies of what it matches is recorded, watches and logs among them: `Metadata`, `Request` or
    /// `RequestResponse`, as in Kubernetes' audit `Policy`. There is no `None`: every request leaves its metadata. Without it:
    /// as without a rule.
    level: Option<RawLevel>,
    /// Most bytes of a read's answer that are recorded, per request; beyond it the length, a keyed digest of the whole and a mark. Without it:
    /// `limits.responseBytesMax`.
    response_bytes_max: Option<usize>,
    /// What of exec, attach, port-forward and other upgraded streams is recorded: `full`, or `metadata`: their command, files,
    /// connections, exit code and lengths. Without it: `full`.
    #[serde(default)]
    streams: Streams,
    /// Names of users; only those that Weir has verified match.
    #[serde(default)]
    users: Vec<String>,
    /// Groups of users; only those that Weir has verified match.
    #[serde(default)]
    user_groups: Vec<String>,
    /// Verbs, such as `get`, `list`, `create`; without any: all.
    #[serde(default)]
    verbs: Vec<String>,
    /// Resources; without any: all.
    #[serde(default)]
    resources: Vec<RawResources>,
    /// Namespaces; `""` matches what has none. Without any: all.
    #[serde(default)]
    namespaces: Vec<String>,
    /// Paths that are no resources, such as `/metrics` or `/logs/*`. Not together with `resources` or `namespaces`.
    #[serde(default, rename = "nonResourceURLs")]
    non_resource_urls: Vec<String>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawResources {
    /// API group; `""` is the core group.
    #[serde(default)]
    group: String,
    /// `pods`, `pods/log`, `pods/*`, `*/scale` or `*`; without any: all of the group.
    #[serde(default)]
    resources: Vec<String>,
    /// Names of objects; without any: all.
    #[serde(default)]
    resource_names: Vec<String>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawBacklog {
    /// Bytes that Kafka has not acknowledged (without Kafka: that the journal holds) from which on the journal is behind.
    /// Without it: only a journal that is full, or cannot be written, refuses.
    #[cfg_attr(test, schemars(range(min = 1)))]
    bytes_max: Option<u64>,
    /// Seconds that the oldest event may wait for Kafka. Without it: any.
    #[cfg_attr(test, schemars(range(min = 1)))]
    age_seconds_max: Option<u64>,
    /// Seconds that a request waits, with `block` or where its pod is over its quota, before it is refused.
    #[cfg_attr(test, schemars(range(max = WAIT_SECONDS_MAX)))]
    wait_seconds: u64,
}

impl Default for RawBacklog {
    fn default() -> Self {
        Self { bytes_max: None, age_seconds_max: None, wait_seconds: BacklogLimits::default().wait.as_secs() }
    }
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawEmergency {
    /// The longest that one emergency may last, in seconds.
    #[cfg_attr(test, schemars(range(min = 1, max = EMERGENCY_SECONDS_MAX)))]
    seconds_max: u64,
}

impl RawRecording {
    pub(super) fn validate(self) -> Result<Recording, Invalid> {
        if self.rules.len() > RULES_MAX {
            let problem = format!("has {} entries; at most {RULES_MAX} are read", self.rules.len());
            return invalid("recording.rules", problem);
        }
        let allowed = self.allow_async_mutations;
        let rules = self.rules.into_iter().enumerate();
        let rules = rules.map(|(index, rule)| rule.validate(&format!("recording.rules[{index}]"), allowed));
        let rules = rules.collect::<Result<_, _>>()?;
        let RawBacklog { bytes_max, age_seconds_max, wait_seconds } = self.backlog;
        // With 0 every request would be refused, always.
        for (key, limit) in [("bytesMax", bytes_max), ("ageSecondsMax", age_seconds_max)] {
            if limit == Some(0) {
                return invalid(
                    format!("recording.backlog.{key}"),
                    "must be at least 1; leave it out for no limit",
                );
            }
        }
        if wait_seconds > WAIT_SECONDS_MAX {
            return invalid("recording.backlog.waitSeconds", format!("must be at most {WAIT_SECONDS_MAX}"));
        }
        let emergency_max = match self.emergency {
            Some(RawEmergency { seconds_max }) if !(1..=EMERGENCY_SECONDS_MAX).contains(&seconds_max) => {
                let problem = format!("must be from 1 to {EMERGENCY_SECONDS_MAX}");
                return invalid("recording.emergency.secondsMax", problem);
            }
            emergency => emergency.map(|emergency| Duration::from_secs(emergency.seconds_max)),
        };
        let backlog = BacklogLimits {
            bytes_max,
            age_max: age_seconds_max.map(Duration::from_secs),
            wait: Duration::from_secs(wait_seconds),
        };
        let when_behind = self.when_behind;
        let masks = Arc::new(self.masks.validate()?);
        let commits = CommitRules { rules, async_mutations: allowed, when_behind, backlog, masks };
        let (recipient_files, kms) =
            self.encryption.map(RawEncryption::validate).transpose()?.unwrap_or_default();
        Ok(Recording { commits, emergency_max, recipient_files, kms })
    }
}

impl RawRule {
    fn validate(self, key: &str, async_mutations: bool) -> Result<CommitRule, Invalid> {
        let of_resources = !self.resources.is_empty() || !self.namespaces.is_empty();
        if of_resources && !self.non_resource_urls.is_empty() {
            let problem = "a request is for a resource or for another path; make two rules of it";
            return invalid(format!("{key}.nonResourceURLs"), problem);
        }
        let changing = self.verbs.iter().find(|verb| !READS.contains(&verb.as_str()));
        if let (Some(Commit::Async), Some(verb), false) = (self.commit, changing, async_mutations) {
            let problem = format!(
                "is async, but {verb:?} changes something, whose record would be lost in a crash; leave the verb out, or \
                 set recording.allowAsyncMutations"
            );
            return invalid(format!("{key}.commit"), problem);
        }
        let level = match self.level {
            Some(RawLevel::None) => {
                let problem = "is None, but every request leaves at least its metadata: without that nobody could say \
                               what is missing; use Metadata";
                return invalid(format!("{key}.level"), problem);
            }
            Some(RawLevel::Metadata) => Some(Bodies::Metadata),
            Some(RawLevel::Request) => Some(Bodies::Request),
            Some(RawLevel::RequestResponse) => Some(Bodies::RequestResponse),
            None => None,
        };
        let star = |pattern: &&String| pattern.trim_end_matches('*').contains('*') || pattern.ends_with("**");
        if let Some(pattern) = self.non_resource_urls.iter().find(star) {
            let problem =
                format!("{pattern:?} has a `*` that is not its last character, where alone it has a meaning");
            return invalid(format!("{key}.nonResourceURLs"), problem);
        }
        let resources = self.resources.into_iter().map(|of| Resources {
            group: of.group,
            resources: of.resources,
            resource_names: of.resource_names,
        });
        Ok(CommitRule {
            commit: self.commit,
            when_behind: self.when_behind,
            level,
            response_bytes_max: self.response_bytes_max,
            streams: self.streams,
            users: self.users,
            user_groups: self.user_groups,
            verbs: self.verbs,
            resources: resources.collect(),
            namespaces: self.namespaces,
            non_resource_urls: self.non_resource_urls,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use expect_test::{Expect, expect};

    use super::{
        Bodies, Commit, CommitRule, FieldMask, MaskRules, Masks, RawRecording, Recording, Streams, WhenBehind,
    };

    fn parse(text: &str) -> Result<Recording, String> {
        let raw: RawRecording = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
        raw.validate().map_err(|invalid| format!("{}: {}", invalid.key, invalid.problem))
    }

    #[track_caller]
    fn refused(text: &str, expected: Expect) {
        expected.assert_eq(&parse(text).expect_err("is refused"));
    }

    #[test]
    fn rules_are_read_in_the_shape_of_an_audit_policy() {
        let text = "
rules:
- {commit: strict, whenBehind: block, resources: [{group: '', resources: [secrets, 'pods/*'], resourceNames: [a]}], namespaces: [prod]}
- {commit: sync, verbs: [get], nonResourceURLs: ['/logs/*'], users: [anna], userGroups: [admins]}
- {whenBehind: metadataOnly, level: Request, responseBytesMax: 4194304, streams: metadata}
backlog: {bytesMax: 1000, ageSecondsMax: 60, waitSeconds: 3}
emergency: {secondsMax: 600}
encryption:
  recipientFiles: [/etc/weir/recipient.pem]
  kms:
    key: arn:aws:kms:eu-central-1:123456789012:key/1-a
    endpoint: https://vpce-1.kms.eu-central-1.vpce.amazonaws.com
masks: {environment: [], fields: [{kinds: [ConfigMap], paths: ['data.*']}], patterns: ['AKIA[0-9A-Z]{16}']}
";
        let Recording { commits, emergency_max, recipient_files, kms } = parse(text).expect("is valid");
        assert_eq!((commits.rules.len(), commits.rules[0].commit), (3, Some(Commit::Strict)));
        assert_eq!(commits.rules[2].when_behind, Some(WhenBehind::MetadataOnly));
        assert_eq!(
            (commits.rules[2].level, commits.rules[2].streams),
            (Some(Bodies::Request), Streams::Metadata)
        );
        assert_eq!(commits.rules[2].response_bytes_max, Some(4 << 20));
        assert_eq!((commits.rules[0].level, commits.rules[0].streams), (None, Streams::Full));
        assert_eq!(commits.rules[1].non_resource_urls, ["/logs/*"]);
        assert_eq!((commits.backlog.bytes_max, commits.backlog.wait), (Some(1000), Duration::from_secs(3)));
        let masks = MaskRules {
            environment: Vec::new(),
            fields: vec![FieldMask { kinds: vec!["ConfigMap".into()], paths: vec!["data.*".into()] }],
            patterns: vec!["AKIA[0-9A-Z]{16}".into()],
        };
        assert_eq!(*commits.masks, Masks::new(masks).expect("is valid"));
        assert_eq!(emergency_max, Some(Duration::from_secs(600)));
        assert_eq!(recipient_files, [PathBuf::from("/etc/weir/recipient.pem")]);
        let kms = kms.expect("is there");
        assert_eq!(kms.arn.as_str(), "arn:aws:kms:eu-central-1:123456789012:key/1-a");
        assert_eq!(kms.endpoint.as_deref(), Some("https://vpce-1.kms.eu-central-1.vpce.amazonaws.com"));
    }

    #[test]
    fn without_it_nothing_is_weakened() {
        assert_eq!(parse("{}"), Ok(Recording::default()));
        assert_eq!(Recording::default().emergency_max, None);
    }

    #[test]
    fn what_would_lose_records_of_changes_is_refused_without_the_switch() {
        refused(
            "rules: [{commit: async, verbs: [get, create]}]",
            expect![[
                r#"recording.rules[0].commit: is async, but "create" changes something, whose record would be lost in a crash; leave the verb out, or set recording.allowAsyncMutations"#
            ]],
        );
        parse("{rules: [{commit: async, verbs: [create]}], allowAsyncMutations: true}").expect("with it");
    }

    #[test]
    fn the_documented_examples_are_read_and_record_in_full_only_where_they_say_so() {
        let documentation = include_str!("../../../docs/recording.md");
        let mut examples = documentation.split("```yaml\n").skip(1).map(|rest| {
            let example = rest.split("```").next().expect("there is a first part");
            let value: serde_yaml_ng::Value = serde_yaml_ng::from_str(example).expect("is YAML");
            parse(&serde_yaml_ng::to_string(&value["recording"]).expect("is YAML")).expect("is valid").commits
        });
        let rules = examples.next().expect("the rules").rules;
        let full =
            |rule: &&CommitRule| rule.level == Some(Bodies::RequestResponse) && rule.streams == Streams::Full;
        let in_full: Vec<_> = rules.iter().filter(full).map(|rule| &rule.namespaces[..]).collect();
        assert_eq!(in_full, [["prod"]], "one rule records in full");
        let last = rules.last().expect("a last one");
        assert!(
            last.namespaces.is_empty() && last.verbs.is_empty() && last.resources.is_empty(),
            "all others"
        );
        assert_eq!((last.level, last.streams), (Some(Bodies::Metadata), Streams::Metadata));
        assert_ne!(examples.next().expect("the masks").masks, Masks::default().into());
        assert!(examples.next().is_none(), "an example that no test reads");
    }

    #[test]
    fn no_rule_leaves_nothing_of_a_request() {
        refused(
            "rules: [{level: None, verbs: [get]}]",
            expect![
                "recording.rules[0].level: is None, but every request leaves at least its metadata: without that nobody could say what is missing; use Metadata"
            ],
        );
    }

    #[test]
    fn masks_are_refused_by_their_place_and_expressions_are_not_spelt() {
        refused(
            "masks: {patterns: [a, 'hunter2(']}",
            expect!["recording.masks.patterns[1]: is no regular expression: unclosed group at byte 7"],
        );
        refused(
            "masks: {patterns: ['^hunter2']}",
            expect![[
                r#"recording.masks.patterns[0]: has an anchor or word boundary (^, $, \b, …), which means nothing in a stream that comes in pieces; leave it out"#
            ]],
        );
        refused(
            "masks: {patterns: ['(hunter2)*']}",
            expect!["recording.masks.patterns[0]: matches the empty text; make it match at least one byte"],
        );
        refused(
            "masks: {patterns: ['(hunter2{1000}){1000}']}",
            expect![
                "recording.masks.patterns[0]: takes more than 4194304 bytes when compiled; repeat less, or give fewer expressions"
            ],
        );
        refused(
            "masks: {fields: [{kinds: [ConfigMap], paths: ['data[0]']}]}",
            expect![
                "recording.masks.fields[0].paths[0]: has something in brackets that is neither * nor a name in quotes; lists are looked through, so leave indices out"
            ],
        );
    }

    #[test]
    fn what_could_never_match_is_refused() {
        refused(
            "rules: [{nonResourceURLs: [/metrics], namespaces: [a]}]",
            expect![
                "recording.rules[0].nonResourceURLs: a request is for a resource or for another path; make two rules of it"
            ],
        );
        refused(
            "rules: [{nonResourceURLs: ['/a*b']}]",
            expect![[
                r#"recording.rules[0].nonResourceURLs: "/a*b" has a `*` that is not its last character, where alone it has a meaning"#
            ]],
        );
        refused(
            "backlog: {bytesMax: 0}",
            expect!["recording.backlog.bytesMax: must be at least 1; leave it out for no limit"],
        );
        refused(
            "emergency: {secondsMax: 0}",
            expect!["recording.emergency.secondsMax: must be from 1 to 86400"],
        );
        refused("encryption: {}", expect!["recording.encryption: names neither recipientFiles nor kms"]);
        for wrong in ["alias/weir", "arn:aws:kms:eu-central-1:123456789012:alias/weir"] {
            refused(
                &format!("encryption: {{kms: {{key: '{wrong}'}}}}"),
                expect![
                    "recording.encryption.kms.key: must be the ARN of a key (arn:aws:kms:REGION:ACCOUNT:key/ID); who may change an alias would decide who reads"
                ],
            );
        }
        for endpoint in ["http://kms", "https://", "https://a/b", "https://a@b"] {
            refused(
                &format!(
                    "encryption: {{kms: {{key: 'arn:aws:kms:eu-central-1:123456789012:key/1', endpoint: '{endpoint}'}}}}"
                ),
                expect!["recording.encryption.kms.endpoint: must be https://HOST or https://HOST:PORT"],
            );
        }
        refused(
            "encryption: {recipientFiles: []}",
            expect!["recording.encryption.recipientFiles: must name from 1 to 16 files"],
        );
        refused(
            "encryption: {recipientFiles: [/a, b]}",
            expect!["recording.encryption.recipientFiles[1]: must be an absolute path"],
        );
    }
}
