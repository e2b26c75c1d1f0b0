//! Which requests are committed how, and what becomes of them while the journal is behind: the rules. Sans-IO.
//!
//! Rules match as those of Kubernetes' audit `Policy` do (k8s.io/apiserver `pkg/audit/policy/checker.go`): what is left
//! empty matches everything, the first rule that matches decides. Only a user that Weir has verified is a user here: nobody
//! chooses a rule by a claim.

use std::{sync::Arc, time::Duration};

use serde::Deserialize;
use weir_common::{
    attributes::{self, Attributes},
    event::{Identity, IdentityMethod},
};

use super::masks::Masks;

/// When a record must be on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Commit {
    /// The request before it is forwarded, the answer's record before its last byte; of a stream each piece that the
    /// client sends before it is forwarded.
    Sync,
    /// Soon: at most `COMMIT_BEHIND_MS` and one sync later.
    Async,
    /// As `sync`, and each piece of a stream that the server sends before it is forwarded, too.
    Strict,
}

/// What becomes of a request while the journal, or Kafka, is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum WhenBehind {
    /// It waits for `backlog.waitSeconds` and is refused then.
    Block,
    /// It is refused.
    Refuse,
    /// It is recorded without its bodies, with a gap that says so; streams, and what no journal takes, are refused.
    MetadataOnly,
}

/// What of a request's bodies is recorded: the levels of Kubernetes' audit `Policy`, without `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bodies {
    /// Neither body; their lengths and keyed digests.
    Metadata,
    /// The request's; of the answer's as much as of both with `Metadata`.
    Request,
    /// Both.
    RequestResponse,
}

impl Bodies {
    /// Why a request's body is left out, if it is.
    pub(super) fn without_request(self) -> Option<&'static str> {
        (self == Self::Metadata).then_some("left out: a rule wants Metadata of this request")
    }

    /// Why an answer's body is left out, if it is.
    pub(super) fn without_answer(self) -> Option<&'static str> {
        match self {
            Self::Metadata => self.without_request(),
            Self::Request => Some("left out: a rule wants Request of this request"),
            Self::RequestResponse => None,
        }
    }
}

/// What of exec, attach, port-forward and other upgraded streams is recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Streams {
    /// All that is said in them.
    #[default]
    Full,
    /// That they were: their command, files, connections, exit code and lengths.
    Metadata,
}

/// Resources of one API group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// The group; empty: the core group.
    pub group: String,
    /// `pods`, `pods/log`, `pods/*`, `*/scale`, `*`; empty: all of the group.
    pub resources: Vec<String>,
    /// Names of objects; empty: all.
    pub resource_names: Vec<String>,
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitRule {
    /// How what it matches is committed; none: as without a rule.
    pub commit: Option<Commit>,
    /// What becomes of it while the journal is behind; none: as without a rule.
    pub when_behind: Option<WhenBehind>,
    /// What of its bodies is recorded; none: as without a rule.
    pub level: Option<Bodies>,
    /// Most bytes of a read's answer that are recorded; none: as without a rule.
    pub response_bytes_max: Option<usize>,
    /// What of its streams is recorded.
    pub streams: Streams,
    /// Names of verified users.
    pub users: Vec<String>,
    /// Groups of verified users.
    pub user_groups: Vec<String>,
    /// Verbs.
    pub verbs: Vec<String>,
    /// Resources.
    pub resources: Vec<Resources>,
    /// Namespaces; the empty one: resources without a namespace.
    pub namespaces: Vec<String>,
    /// Paths that are no resources, with `*` at the end as a wildcard.
    pub non_resource_urls: Vec<String>,
}

/// When the journal counts as behind, and how long requests wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BacklogLimits {
    /// Most bytes that Kafka has not acknowledged (without Kafka: that the journal holds).
    pub bytes_max: Option<u64>,
    /// Most age of the oldest event that Kafka has not acknowledged.
    pub age_max: Option<Duration>,
    /// How long `block` waits, and a pod that is over its quota.
    pub wait: Duration,
}

impl Default for BacklogLimits {
    fn default() -> Self {
        Self { bytes_max: None, age_max: None, wait: Duration::from_secs(5) }
    }
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitRules {
    /// The first that matches decides.
    pub rules: Vec<CommitRule>,
    /// Whether a rule may make mutations and streams `async`.
    pub async_mutations: bool,
    /// What becomes of requests that no rule says it of.
    pub when_behind: Option<WhenBehind>,
    /// When that is.
    pub backlog: BacklogLimits,
    /// What is masked beside what always is.
    pub masks: Arc<Masks>,
}

/// What rules ask of a request.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// What it means.
    pub attributes: &'a Attributes,
    /// Its path as sent.
    pub path: &'a str,
    /// Who it is for.
    pub identity: Option<&'a Identity>,
    /// Whether it may change something: a mutation or a stream.
    pub changes: bool,
}

/// What holds for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// When its records must be on disk.
    pub commit: Commit,
    /// What becomes of it while the journal is behind.
    pub when_behind: WhenBehind,
    /// What of its bodies is recorded, if a rule says it.
    pub level: Option<Bodies>,
    /// Most bytes of a read's answer that are recorded, if a rule says it.
    pub response_bytes_max: Option<usize>,
    /// What of its streams is recorded.
    pub streams: Streams,
}

impl Plan {
    /// Whether somebody waits for its records.
    pub fn is_durable(self) -> bool {
        self.commit != Commit::Async
    }
}

impl CommitRules {
    /// What holds for a request.
    pub fn plan(&self, asked: Asked<'_>) -> Plan {
        let rule = self.rules.iter().find(|rule| rule.matches(asked));
        let commit = match rule.and_then(|rule| rule.commit) {
            // What changes something is not weakened by a rule that was meant for reads.
            Some(Commit::Async) if asked.changes && !self.async_mutations => Commit::Sync,
            Some(commit) => commit,
            None if asked.changes => Commit::Sync,
            None => Commit::Async,
        };
        let when_behind = rule.and_then(|rule| rule.when_behind).or(self.when_behind);
        Plan {
            commit,
            when_behind: when_behind.unwrap_or(WhenBehind::Refuse),
            level: rule.and_then(|rule| rule.level),
            response_bytes_max: rule.and_then(|rule| rule.response_bytes_max),
            streams: rule.map(|rule| rule.streams).unwrap_or_default(),
        }
    }
}

impl CommitRule {
    fn matches(&self, asked: Asked<'_>) -> bool {
        let Asked { attributes, path, identity, .. } = asked;
        let user = identity
            .filter(|identity| identity.method != IdentityMethod::Unverified)
            .map(|identity| &identity.user);
        let has = |list: &[String], text: &str| list.iter().any(|entry| entry == text);
        if !self.users.is_empty() && !user.is_some_and(|user| has(&self.users, &user.username)) {
            return false;
        }
        if !self.user_groups.is_empty()
            && !user.is_some_and(|user| user.groups.iter().any(|group| has(&self.user_groups, group)))
        {
            return false;
        }
        if !self.verbs.is_empty() && !has(&self.verbs, &attributes.verb) {
            return false;
        }
        if !self.namespaces.is_empty() || !self.resources.is_empty() {
            return attributes.is_resource()
                && (self.namespaces.is_empty() || has(&self.namespaces, &attributes.namespace))
                && (self.resources.is_empty() || self.resources.iter().any(|of| of.matches(attributes)));
        }
        self.non_resource_urls.is_empty()
            || !attributes.is_resource() && {
                let path = attributes::decoded_path(path);
                self.non_resource_urls.iter().any(|pattern| match pattern.strip_suffix('*') {
                    Some(prefix) => path.starts_with(prefix),
                    None => *pattern == path,
                })
            }
    }
}

impl Resources {
    fn matches(&self, attributes: &Attributes) -> bool {
        let Attributes { api_group, resource, subresource, name, .. } = attributes;
        if self.group != *api_group || !(self.resource_names.is_empty() || self.resource_names.contains(name))
        {
            return false;
        }
        let of = |pattern: &String| match pattern.split_once('/') {
            _ if pattern == "*" => true,
            None => pattern == resource && subresource.is_empty(),
            Some(("*", sub)) => sub == subresource,
            Some((whole, "*")) => whole == resource,
            Some((whole, sub)) => whole == resource && sub == subresource,
        };
        self.resources.is_empty() || self.resources.iter().any(of)
    }
}

#[cfg(test)]
mod tests {
    use weir_common::{
        attributes::Attributes,
        event::{Identity, IdentityMethod, UserInfo},
    };

    use super::{Asked, Commit, CommitRule, CommitRules, Resources, WhenBehind};

    fn list(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn of(group: &str, resources: &[&str]) -> Resources {
        Resources { group: group.into(), resources: list(resources), ..Resources::default() }
    }

    #[track_caller]
    fn check(rule: &CommitRule, request: &str, expected: bool) {
        let (method, path) = request.split_once(' ').expect("a method and a path");
        let attributes = Attributes::parse(method, path, None);
        let asked = Asked { attributes: &attributes, path, identity: None, changes: false };
        assert_eq!(rule.matches(asked), expected, "{request}");
    }

    #[test]
    fn resources_match_as_in_kubernetes_audit_policy() {
        let pods = CommitRule { resources: vec![of("", &["pods"])], ..CommitRule::default() };
        check(&pods, "GET /api/v1/namespaces/a/pods/b", true);
        check(&pods, "GET /api/v1/namespaces/a/pods/b/log", false);
        check(&pods, "GET /apis/metrics.k8s.io/v1/namespaces/a/pods/b", false);
        check(&pods, "GET /healthz", false);
        let all = CommitRule { resources: vec![of("", &["pods/*", "*/scale"])], ..CommitRule::default() };
        check(&all, "GET /api/v1/namespaces/a/pods/b/log", true);
        check(&all, "GET /api/v1/namespaces/a/replicationcontrollers/b/scale", true);
        check(&all, "GET /api/v1/namespaces/a/services", false);
        let group = CommitRule { resources: vec![of("apps", &[])], ..CommitRule::default() };
        check(&group, "GET /apis/apps/v1/namespaces/a/deployments/b/status", true);
        let named = Resources { resource_names: list(&["b"]), ..of("", &["*"]) };
        let named = CommitRule { resources: vec![named], ..CommitRule::default() };
        check(&named, "GET /api/v1/namespaces/a/secrets/b", true);
        check(&named, "GET /api/v1/namespaces/a/secrets/c", false);
    }

    #[test]
    fn namespaces_verbs_and_paths_match_as_in_kubernetes_audit_policy() {
        let namespace = CommitRule {
            namespaces: list(&["prod", ""]),
            verbs: list(&["get", "list"]),
            ..CommitRule::default()
        };
        check(&namespace, "GET /api/v1/namespaces/prod/pods", true);
        check(&namespace, "GET /api/v1/nodes/n", true);
        check(&namespace, "GET /api/v1/namespaces/other/pods", false);
        check(&namespace, "POST /api/v1/namespaces/prod/pods", false);
        let paths = CommitRule { non_resource_urls: list(&["/metrics", "/logs/*"]), ..CommitRule::default() };
        check(&paths, "GET /metrics", true);
        check(&paths, "GET /%6detrics", true);
        check(&paths, "GET /metrics/cadvisor", false);
        check(&paths, "GET /logs/kubelet", true);
        check(&paths, "GET /api/v1/namespaces/prod/pods", false);
    }

    fn plan(rules: &CommitRules, method: &str, identity: Option<&Identity>) -> super::Plan {
        let path = "/api/v1/namespaces/a/secrets/b";
        let attributes = Attributes::parse(method, path, None);
        let changes = attributes.is_mutating(method);
        rules.plan(Asked { attributes: &attributes, path, identity, changes })
    }

    #[test]
    fn without_rules_what_changes_something_is_sync_and_reads_are_async() {
        let rules = CommitRules::default();
        assert_eq!(plan(&rules, "POST", None).commit, Commit::Sync);
        assert_eq!(plan(&rules, "GET", None).commit, Commit::Async);
        assert_eq!(plan(&rules, "GET", None).when_behind, WhenBehind::Refuse);
    }

    #[test]
    fn no_rule_weakens_what_changes_something_without_the_switch() {
        let asynchronous = CommitRule { commit: Some(Commit::Async), ..CommitRule::default() };
        let mut rules = CommitRules { rules: vec![asynchronous], ..CommitRules::default() };
        assert_eq!(plan(&rules, "DELETE", None).commit, Commit::Sync);
        rules.async_mutations = true;
        assert_eq!(plan(&rules, "DELETE", None).commit, Commit::Async);
        // The switch alone changes nothing.
        rules.rules.clear();
        assert_eq!(plan(&rules, "DELETE", None).commit, Commit::Sync);
        rules.rules.push(CommitRule { when_behind: Some(WhenBehind::Block), ..CommitRule::default() });
        assert_eq!(plan(&rules, "DELETE", None).commit, Commit::Sync);
        assert_eq!(plan(&rules, "GET", None).commit, Commit::Async);
    }

    #[test]
    fn a_claim_chooses_no_rule() {
        let strict =
            CommitRule { commit: Some(Commit::Strict), users: list(&["anna"]), ..CommitRule::default() };
        let rules = CommitRules { rules: vec![strict], ..CommitRules::default() };
        let identity = |method| Identity {
            method,
            issuer: None,
            user: UserInfo { username: "anna".into(), ..UserInfo::default() },
            rule: None,
            acts_as: None,
        };
        assert_eq!(plan(&rules, "GET", None).commit, Commit::Async);
        assert_eq!(plan(&rules, "GET", Some(&identity(IdentityMethod::Unverified))).commit, Commit::Async);
        assert_eq!(plan(&rules, "GET", Some(&identity(IdentityMethod::Token))).commit, Commit::Strict);
    }
}
