//! What is asked of STS: which role, in whose name, for which cluster. Checked once, when it is made.
//!
//! Pure. A [`RoleRequest`] has a key made of everything in it, so that two callers, sessions or clusters never share
//! credentials.

use std::{fmt, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::identifier::{RoleArn, SessionName, SourceIdentity, Tag};

/// Shortest life of a role's credentials at STS.
const DURATION_MIN: Duration = Duration::from_mins(15);
/// Longest life of a role's credentials at STS, if the role allows it.
const DURATION_MAX: Duration = Duration::from_hours(12);
/// Longest life where a role was assumed by way of another (role chaining), whatever the role allows.
pub const CHAINED_DURATION_MAX: Duration = Duration::from_hours(1);
/// Most roles on the way to the last one.
const CHAIN_MAX: usize = 4;
/// Most session tags at STS.
const TAGS_MAX: usize = 50;
/// Longest session policy at STS.
const POLICY_CHARS_MAX: usize = 2048;
/// Most managed policies of a session at STS.
const POLICY_ARNS_MAX: usize = 10;
/// Shortest and longest external ID at STS.
const EXTERNAL_ID_CHARS: std::ops::RangeInclusive<usize> = 2..=1224;
/// Longest web identity token at STS.
const WEB_IDENTITY_TOKEN_BYTES_MAX: usize = 20_000;
/// Longest name of an EKS cluster.
const CLUSTER_NAME_CHARS_MAX: usize = 100;
/// Longest name of a region that is taken; the longest of AWS has 14.
const REGION_CHARS_MAX: usize = 32;

/// Whether a text is in the form of a region's name, so that it may stand in a host's.
#[must_use]
pub fn is_region(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= REGION_CHARS_MAX
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// A role, assumed with the agent's own credentials.
#[derive(Clone, Debug)]
pub struct AssumeRole {
    /// The role.
    pub role_arn: RoleArn,
    /// In CloudTrail, in the assumed role's ARN and in `user.extra` of the cluster's audit log.
    pub session_name: SessionName,
    /// In CloudTrail, also of what is done by roles assumed from this one.
    pub source_identity: Option<SourceIdentity>,
    /// Session tags, for CloudTrail and for conditions of policies.
    pub tags: Vec<Tag>,
    /// What the role's trust policy asks a third party for.
    pub external_id: Option<String>,
    /// How long the credentials hold.
    pub duration: Duration,
    /// Session policy (JSON): takes rights away, gives none.
    pub policy: Option<String>,
    /// Managed policies that do the same.
    pub policy_arns: Vec<String>,
    /// Roles to go through first, in this order. The source identity is set on the first and must be allowed by all.
    pub chain: Vec<RoleArn>,
}

/// A role, assumed with a token of an OIDC issuer that AWS IAM knows. STS takes no tags and no source identity here but from
/// the token's own claims: only the session name leads back.
#[derive(Clone, Debug)]
pub struct WebIdentity {
    /// The role.
    pub role_arn: RoleArn,
    /// In CloudTrail, in the assumed role's ARN and in `user.extra` of the cluster's audit log.
    pub session_name: SessionName,
    /// The token.
    pub token: WebIdentityToken,
    /// How long the credentials hold.
    pub duration: Duration,
    /// Session policy (JSON): takes rights away, gives none.
    pub policy: Option<String>,
    /// Managed policies that do the same.
    pub policy_arns: Vec<String>,
}

/// Where a web identity token comes from.
#[derive(Clone)]
pub enum WebIdentityToken {
    /// The caller's own. Credentials are never shared between two tokens, even of one caller.
    Presented(Arc<Zeroizing<String>>),
    /// Made when it is needed.
    Minted(Arc<dyn TokenSource>),
}

/// Makes tokens, for example by TokenRequest for a pod's service account.
pub trait TokenSource: Send + Sync {
    /// Whose tokens these are: all that tells this subject from another, for example issuer, namespace, service account and
    /// the pod's UID. Credentials are shared between requests whose sources have the same subject.
    fn subject(&self) -> &str;

    /// Makes one.
    ///
    /// # Errors
    /// Why there is none: shown to the caller, so without addresses or secrets.
    fn token(&self) -> BoxFuture<'_, Result<Zeroizing<String>, String>>;
}

impl fmt::Debug for WebIdentityToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Presented(_) => formatter.write_str("Presented(…)"),
            Self::Minted(source) => formatter.debug_tuple("Minted").field(&source.subject()).finish(),
        }
    }
}

/// How a role is assumed.
#[derive(Clone, Debug)]
pub enum Role {
    /// With the agent's own credentials.
    Assume(AssumeRole),
    /// With a token.
    WebIdentity(WebIdentity),
}

impl Role {
    /// Its ARN.
    #[must_use]
    pub fn arn(&self) -> &RoleArn {
        match self {
            Self::Assume(role) => &role.role_arn,
            Self::WebIdentity(role) => &role.role_arn,
        }
    }

    /// Its session's name.
    #[must_use]
    pub fn session_name(&self) -> &SessionName {
        match self {
            Self::Assume(role) => &role.session_name,
            Self::WebIdentity(role) => &role.session_name,
        }
    }
}

/// An EKS cluster as its tokens name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EksCluster {
    name: String,
    region: String,
}

impl EksCluster {
    /// # Errors
    /// The name is none that EKS gives, or the region is no name of one.
    pub fn new(name: &str, region: &str) -> Result<Self, RequestError> {
        let is_name = name.starts_with(|char: char| char.is_ascii_alphanumeric())
            && name.len() <= CLUSTER_NAME_CHARS_MAX
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        if !is_name {
            return Err(RequestError::ClusterName {
                name: name.chars().take(CLUSTER_NAME_CHARS_MAX).collect(),
            });
        }
        if !is_region(region) {
            return Err(RequestError::Region { region: region.chars().take(REGION_CHARS_MAX).collect() });
        }
        Ok(Self { name: name.to_owned(), region: region.to_owned() })
    }

    /// Name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Region, whose STS is used.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.region
    }
}

/// A digest of everything that a request is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key([u8; 32]);

/// A checked request for a role's token for a cluster; a clone is cheap.
#[derive(Clone, Debug)]
pub struct RoleRequest(Arc<Checked>);

#[derive(Debug)]
struct Checked {
    role: Role,
    cluster: EksCluster,
    key: Key,
}

impl RoleRequest {
    /// # Errors
    /// Something in it is nothing that STS takes.
    pub fn new(role: Role, cluster: EksCluster) -> Result<Self, RequestError> {
        match &role {
            Role::Assume(role) => {
                let longest = if role.chain.is_empty() { DURATION_MAX } else { CHAINED_DURATION_MAX };
                check_duration(role.duration, longest)?;
                check_policies(role.policy.as_deref(), &role.policy_arns)?;
                check_external_id(role.external_id.as_deref())?;
                check_tags(&role.tags)?;
                check_count("roles on the way", role.chain.len(), CHAIN_MAX)?;
            }
            Role::WebIdentity(role) => {
                check_duration(role.duration, DURATION_MAX)?;
                check_policies(role.policy.as_deref(), &role.policy_arns)?;
                if let WebIdentityToken::Presented(token) = &role.token
                    && token.len() > WEB_IDENTITY_TOKEN_BYTES_MAX
                {
                    return Err(RequestError::TokenTooLong { bytes_max: WEB_IDENTITY_TOKEN_BYTES_MAX });
                }
            }
        }
        let key = key(&role, &cluster);
        Ok(Self(Arc::new(Checked { role, cluster, key })))
    }

    /// The role.
    #[must_use]
    pub fn role(&self) -> &Role {
        &self.0.role
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&self) -> &EksCluster {
        &self.0.cluster
    }

    pub(super) fn key(&self) -> Key {
        self.0.key
    }
}

fn check_duration(duration: Duration, longest: Duration) -> Result<(), RequestError> {
    if (DURATION_MIN..=longest).contains(&duration) {
        return Ok(());
    }
    Err(RequestError::Duration {
        seconds: duration.as_secs(),
        seconds_min: DURATION_MIN.as_secs(),
        seconds_max: longest.as_secs(),
    })
}

fn check_policies(policy: Option<&str>, arns: &[String]) -> Result<(), RequestError> {
    let chars = policy.map_or(1, |policy| policy.chars().count());
    if chars == 0 || chars > POLICY_CHARS_MAX {
        return Err(RequestError::Policy { chars, chars_max: POLICY_CHARS_MAX });
    }
    check_count("policy ARNs", arns.len(), POLICY_ARNS_MAX)
}

fn check_external_id(id: Option<&str>) -> Result<(), RequestError> {
    let is_char = |char: char| char.is_ascii_alphanumeric() || "_+=,.@:/-".contains(char);
    match id {
        Some(id) if !(EXTERNAL_ID_CHARS.contains(&id.len()) && id.chars().all(is_char)) => {
            Err(RequestError::ExternalId)
        }
        _ => Ok(()),
    }
}

fn check_tags(tags: &[Tag]) -> Result<(), RequestError> {
    check_count("session tags", tags.len(), TAGS_MAX)?;
    for (at, tag) in tags.iter().enumerate() {
        // To STS `Team` and `team` are one key.
        if tags[..at].iter().any(|earlier| earlier.key().eq_ignore_ascii_case(tag.key())) {
            return Err(RequestError::TagTwice { key: tag.key().to_owned() });
        }
    }
    Ok(())
}

fn check_count(what: &'static str, count: usize, count_max: usize) -> Result<(), RequestError> {
    if count > count_max { Err(RequestError::TooMany { what, count, count_max }) } else { Ok(()) }
}

/// Every field with its length, so that no two requests give the same bytes.
fn key(role: &Role, cluster: &EksCluster) -> Key {
    let mut digest = KeyDigest(Sha256::new());
    digest.text(cluster.name());
    digest.text(cluster.region());
    match role {
        Role::Assume(role) => {
            digest.text("assume");
            digest.session(&role.role_arn, &role.session_name, role.duration);
            digest.optional(role.source_identity.as_ref().map(SourceIdentity::as_str));
            digest.optional(role.external_id.as_deref());
            digest.optional(role.policy.as_deref());
            digest.list(role.policy_arns.iter().map(String::as_str));
            digest.list(role.chain.iter().map(RoleArn::as_str));
            digest.list(role.tags.iter().flat_map(|tag| [tag.key(), tag.value()]));
        }
        Role::WebIdentity(role) => {
            digest.text("web identity");
            digest.session(&role.role_arn, &role.session_name, role.duration);
            digest.optional(role.policy.as_deref());
            digest.list(role.policy_arns.iter().map(String::as_str));
            match &role.token {
                WebIdentityToken::Presented(token) => digest.list(["presented", token.as_str()].into_iter()),
                WebIdentityToken::Minted(source) => digest.list(["minted", source.subject()].into_iter()),
            }
        }
    }
    Key(digest.0.finalize().into())
}

struct KeyDigest(Sha256);

impl KeyDigest {
    fn number(&mut self, number: u64) {
        self.0.update(number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text);
    }

    fn optional(&mut self, text: Option<&str>) {
        self.list(text.into_iter());
    }

    fn list<'a>(&mut self, texts: impl Iterator<Item = &'a str> + Clone) {
        self.number(texts.clone().count() as u64);
        texts.for_each(|text| self.text(text));
    }

    fn session(&mut self, role: &RoleArn, name: &SessionName, duration: Duration) {
        self.text(role.as_str());
        self.text(name.as_str());
        self.number(duration.as_secs());
    }
}

/// Why a request is none that STS would take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Not an ARN of a role.
    #[error("{arn:?} is no ARN of an IAM role; give one like arn:aws:iam::123456789012:role/deploy")]
    RoleArn {
        /// What it is.
        arn: String,
    },
    /// Not a key of a tag.
    #[error(
        "{key:?} is no key of a session tag; use 1 to 128 of the characters A-Z a-z 0-9 space _ . : / = + - @, not \
         beginning with aws:"
    )]
    TagKey {
        /// What it is.
        key: String,
    },
    /// Two tags of one key.
    #[error("the session tag {key:?} is set twice (STS does not tell upper from lower case); remove one")]
    TagTwice {
        /// The key.
        key: String,
    },
    /// More than STS takes.
    #[error("{count} {what}, and at most {count_max} are possible; remove some")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        count_max: usize,
    },
    /// Shorter or longer than STS takes.
    #[error(
        "a role session of {seconds} s is not possible; choose {seconds_min} to {seconds_max} s (one hour at most where a \
         role is assumed by way of another)"
    )]
    Duration {
        /// What was asked for.
        seconds: u64,
        /// Shortest.
        seconds_min: u64,
        /// Longest.
        seconds_max: u64,
    },
    /// Empty, or longer than STS takes.
    #[error("a session policy of {chars} characters is not possible; it must have 1 to {chars_max}")]
    Policy {
        /// Its length.
        chars: usize,
        /// The longest.
        chars_max: usize,
    },
    /// Not an external ID.
    #[error(
        "the external ID is none that STS takes; use 2 to 1224 of the characters A-Z a-z 0-9 _ + = , . @ : / -"
    )]
    ExternalId,
    /// Longer than STS takes.
    #[error("the web identity token is longer than {bytes_max} bytes, which is the most that STS takes")]
    TokenTooLong {
        /// The longest.
        bytes_max: usize,
    },
    /// Not a name of an EKS cluster.
    #[error("{name:?} is no name of an EKS cluster; see `aws eks list-clusters`")]
    ClusterName {
        /// What it is.
        name: String,
    },
    /// Not a name of a region.
    #[error("{region:?} is no name of an AWS region; give one like eu-central-1")]
    Region {
        /// What it is.
        region: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role() -> AssumeRole {
        AssumeRole {
            role_arn: RoleArn::parse("arn:aws:iam::123456789012:role/deploy").unwrap(),
            session_name: SessionName::fit("alice"),
            source_identity: Some(SourceIdentity::fit("alice")),
            tags: vec![Tag::new("namespace", "ci").unwrap()],
            external_id: None,
            duration: CHAINED_DURATION_MAX,
            policy: None,
            policy_arns: Vec::new(),
            chain: Vec::new(),
        }
    }

    fn cluster() -> EksCluster {
        EksCluster::new("prod", "eu-central-1").unwrap()
    }

    fn changed(change: impl FnOnce(&mut AssumeRole)) -> Result<RoleRequest, RequestError> {
        let mut role = role();
        change(&mut role);
        RoleRequest::new(Role::Assume(role), cluster())
    }

    fn with_token(token: WebIdentityToken) -> RoleRequest {
        let AssumeRole { role_arn, session_name, duration, .. } = role();
        let role =
            WebIdentity { role_arn, session_name, token, duration, policy: None, policy_arns: Vec::new() };
        RoleRequest::new(Role::WebIdentity(role), cluster()).unwrap()
    }

    struct Of(&'static str);

    impl TokenSource for Of {
        fn subject(&self) -> &str {
            self.0
        }

        fn token(&self) -> BoxFuture<'_, Result<Zeroizing<String>, String>> {
            Box::pin(async { Err("none".to_owned()) })
        }
    }

    #[test]
    fn no_two_requests_that_differ_share_credentials() {
        let other = RoleArn::parse("arn:aws:iam::123456789012:role/other").unwrap();
        let presented =
            |token: &str| with_token(WebIdentityToken::Presented(Arc::new(Zeroizing::new(token.to_owned()))));
        let requests = [
            changed(|_| ()).unwrap(),
            changed(|role| role.role_arn = other.clone()).unwrap(),
            changed(|role| role.session_name = SessionName::fit("bob")).unwrap(),
            changed(|role| role.source_identity = None).unwrap(),
            changed(|role| role.source_identity = Some(SourceIdentity::fit("bob"))).unwrap(),
            changed(|role| role.tags.clear()).unwrap(),
            changed(|role| role.tags[0] = Tag::new("namespac", "eci").unwrap()).unwrap(),
            changed(|role| role.external_id = Some("42".to_owned())).unwrap(),
            changed(|role| role.duration /= 2).unwrap(),
            changed(|role| role.policy = Some("{}".to_owned())).unwrap(),
            changed(|role| role.policy_arns.push("{}".to_owned())).unwrap(),
            changed(|role| role.chain.push(other)).unwrap(),
            RoleRequest::new(Role::Assume(role()), EksCluster::new("test", "eu-central-1").unwrap()).unwrap(),
            RoleRequest::new(Role::Assume(role()), EksCluster::new("prod", "eu-west-1").unwrap()).unwrap(),
            presented("one"),
            presented("two"),
            with_token(WebIdentityToken::Minted(Arc::new(Of("one")))),
            with_token(WebIdentityToken::Minted(Arc::new(Of("two")))),
        ];
        let keys: std::collections::HashSet<Key> = requests.iter().map(RoleRequest::key).collect();
        assert_eq!(keys.len(), requests.len());
        assert_eq!(changed(|_| ()).unwrap().key(), requests[0].key());
    }

    #[test]
    fn what_sts_would_refuse_is_not_asked() {
        let hour = Duration::from_hours(1);
        let chained = |duration| {
            changed(|role| {
                role.chain.push(role.role_arn.clone());
                role.duration = duration;
            })
        };
        assert!(chained(hour).is_ok());
        assert!(matches!(chained(hour * 2), Err(RequestError::Duration { seconds_max: 3600, .. })));
        assert!(changed(|role| role.duration = hour * 2).is_ok());
        assert!(changed(|role| role.duration = hour * 13).is_err());
        assert!(changed(|role| role.duration = Duration::from_mins(14)).is_err());
        assert!(changed(|role| role.policy = Some(String::new())).is_err());
        assert!(changed(|role| role.policy = Some(" ".repeat(2049))).is_err());
        assert!(changed(|role| role.policy_arns = vec![String::new(); 11]).is_err());
        assert!(changed(|role| role.external_id = Some("a".to_owned())).is_err());
        assert!(changed(|role| role.external_id = Some("a b".to_owned())).is_err());
        let again = Tag::new("NameSpace", "x").unwrap();
        assert!(matches!(changed(|role| role.tags.push(again)), Err(RequestError::TagTwice { .. })));
        let many = (0..51).map(|at| Tag::new(&format!("tag{at}"), "").unwrap()).collect();
        assert!(changed(|role| role.tags = many).is_err());
    }

    #[test]
    fn clusters_and_regions_are_names() {
        for (name, region, is_good) in [
            ("prod", "eu-central-1", true),
            ("Prod_1-a", "us-gov-east-1", true),
            ("", "eu-central-1", false),
            ("-prod", "eu-central-1", false),
            ("prod\r\nx: y", "eu-central-1", false),
            ("prod", "", false),
            ("prod", "eu-central-1.evil.example/", false),
        ] {
            assert_eq!(EksCluster::new(name, region).is_ok(), is_good, "{name:?} {region:?}");
        }
    }

    #[test]
    fn a_token_does_not_show_itself() {
        let token = WebIdentityToken::Presented(Arc::new(Zeroizing::new("eyJsecret".to_owned())));
        assert!(!format!("{:?}", with_token(token)).contains("secret"));
    }
}
