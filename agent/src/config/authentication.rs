//! `clusters[].authentication`: the issuers whose tokens are believed, in the shape of Kubernetes'
//! `AuthenticationConfiguration` (k8s.io/apiserver `pkg/apis/apiserver`), with its rules of validation.

use std::sync::Arc;

use rustls::RootCertStore;
use serde::Deserialize;

use super::raw::{Invalid, invalid};
use crate::{
    auth::{
        claims::{CLAIMS, ClaimMappings, ClaimRule, Condition, Mapping, USER},
        expression::Expression,
    },
    trust::ClusterCa,
};

/// Most issuers of one cluster.
pub const ISSUERS_MAX: usize = 64;
/// Most audiences of an issuer.
pub const AUDIENCES_MAX: usize = 32;
/// Most rules of one kind, and most extra values, of an issuer.
pub const RULES_MAX: usize = 64;

/// Who is believed when they say who calls.
#[derive(Clone, Debug, Default)]
pub struct Authentication {
    /// Issuers, no two with one URL.
    pub jwt: Vec<JwtIssuer>,
}

/// An issuer of tokens, and what its tokens say of a user.
#[derive(Clone, Debug)]
pub struct JwtIssuer {
    /// What its tokens name as `iss`, to the letter.
    pub url: String,
    /// Where its documents are.
    pub documents: Documents,
    /// Whom a token must be for: one of them.
    pub audiences: Vec<String>,
    /// From claims to a user.
    pub mappings: ClaimMappings,
}

/// Where the documents of an issuer are.
#[derive(Clone, Debug)]
pub enum Documents {
    /// On the web.
    Web {
        /// Its discovery document, if it is not where its URL says.
        discovery_url: Option<String>,
        /// Who vouches for the host; absent: whom the node trusts.
        authorities: Option<Arc<RootCertStore>>,
    },
    /// On the API server of the cluster, which the agent asks with its own credential.
    Cluster,
}

/// Who is believed when they say who calls: issuers of tokens, in the shape of Kubernetes' `AuthenticationConfiguration`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawAuthentication {
    /// Issuers of JSON Web Tokens. Each URL stands once. The cluster's own issuer of service account tokens is an entry
    /// like any other.
    #[cfg_attr(test, schemars(length(max = ISSUERS_MAX)))]
    #[serde(default)]
    jwt: Vec<RawJwt>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawJwt {
    /// The issuer.
    issuer: RawIssuer,
    /// How its claims make a user.
    claim_mappings: RawMappings,
    /// What must hold of the claims, all of it.
    #[cfg_attr(test, schemars(length(max = RULES_MAX)))]
    #[serde(default)]
    claim_validation_rules: Vec<RawClaimRule>,
    /// What must hold of the user, all of it.
    #[cfg_attr(test, schemars(length(max = RULES_MAX)))]
    #[serde(default)]
    user_validation_rules: Vec<RawUserRule>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawIssuer {
    /// What tokens name as `iss`: an https URL without query and fragment, compared to the letter. Its discovery document
    /// is at `/.well-known/openid-configuration` behind it.
    url: String,
    /// Where the discovery document is instead. Its `issuer` must be `url` all the same.
    #[serde(rename = "discoveryURL")]
    discovery_url: Option<String>,
    /// Discovery document and keys are read from the cluster's API server with the agent's own credential: for the
    /// cluster's issuer of service account tokens. Not with `discoveryURL` or `certificateAuthority`. Kubernetes has no
    /// such key.
    #[serde(default)]
    through_cluster: bool,
    /// The CA (PEM text, not a file) of the host that serves the documents. Without it: the CAs that the node trusts.
    certificate_authority: Option<String>,
    /// Whom a token must be for: one of these must be in its `aud`.
    #[cfg_attr(test, schemars(length(min = 1, max = AUDIENCES_MAX)))]
    audiences: Vec<String>,
    /// `MatchAny`; required where there are several audiences.
    audience_match_policy: Option<RawMatchPolicy>,
}

/// How audiences are compared.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum RawMatchPolicy {
    /// One of the configured audiences is in the token.
    MatchAny,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawMappings {
    /// The user's name. Where it is the claim `email`, the claim `email_verified` must be true or absent; an expression
    /// that reads `claims.email` must say so itself, or a rule must.
    username: RawPrefixed,
    /// The user's groups: a claim or an expression with a string or a list of strings. May be missing.
    groups: Option<RawPrefixed>,
    /// The user's uid.
    uid: Option<RawUnprefixed>,
    /// Further values. What is empty is left out.
    #[cfg_attr(test, schemars(length(max = RULES_MAX)))]
    #[serde(default)]
    extra: Vec<RawExtra>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawPrefixed {
    /// Name of a claim. Either this or `expression`.
    claim: Option<String>,
    /// What is put in front of the claim's value; required beside `claim`, and may be empty.
    prefix: Option<String>,
    /// A CEL expression over `claims`. Either this or `claim`.
    expression: Option<String>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawUnprefixed {
    /// Name of a claim. Either this or `expression`.
    claim: Option<String>,
    /// A CEL expression over `claims`. Either this or `claim`.
    expression: Option<String>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawExtra {
    /// Its key: a domain, a slash and a path, in lower case; not of `kubernetes.io` or `k8s.io`. Each stands once.
    key: String,
    /// A CEL expression over `claims` with a string or a list of strings.
    value_expression: String,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawClaimRule {
    /// Name of a claim that must be there. Either this or `expression`.
    claim: Option<String>,
    /// The string that the claim must be. Without it: the empty one.
    required_value: Option<String>,
    /// A CEL expression over `claims` that must be true. Either this or `claim`.
    expression: Option<String>,
    /// What the caller is told where the expression is not true.
    message: Option<String>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawUserRule {
    /// A CEL expression over `user` (`username`, `uid`, `groups`, `extra`) that must be true.
    expression: String,
    /// What the caller is told where the expression is not true.
    message: Option<String>,
}

impl RawAuthentication {
    pub(super) fn validate(self, key: &str) -> Result<Authentication, Invalid> {
        let key = format!("{key}.jwt");
        at_most(&key, self.jwt.len(), ISSUERS_MAX)?;
        let mut jwt: Vec<JwtIssuer> = Vec::with_capacity(self.jwt.len());
        for (index, raw) in self.jwt.into_iter().enumerate() {
            let key = format!("{key}[{index}]");
            let issuer = raw.validate(&key)?;
            if jwt.iter().any(|other| other.url == issuer.url) {
                let problem = format!("{:?} stands twice; a token would have two meanings", issuer.url);
                return invalid(format!("{key}.issuer.url"), problem);
            }
            let discovery = |issuer: &JwtIssuer| match &issuer.documents {
                Documents::Web { discovery_url, .. } => discovery_url.clone(),
                Documents::Cluster => None,
            };
            let own = discovery(&issuer);
            if own.is_some() && jwt.iter().any(|other| discovery(other) == own) {
                return invalid(
                    format!("{key}.issuer.discoveryURL"),
                    "stands twice; a document is of one issuer",
                );
            }
            jwt.push(issuer);
        }
        Ok(Authentication { jwt })
    }
}

impl RawJwt {
    fn validate(self, key: &str) -> Result<JwtIssuer, Invalid> {
        let at = format!("{key}.claimMappings");
        let username = match prefixed(self.claim_mappings.username, &format!("{at}.username"))? {
            Some(mapping) => mapping,
            None => {
                return invalid(format!("{at}.username"), "say either `claim` and `prefix` or `expression`");
            }
        };
        let groups = self.claim_mappings.groups.map(|raw| prefixed(raw, &format!("{at}.groups")));
        let uid = self.claim_mappings.uid.map(|raw| {
            let raw = RawPrefixed {
                prefix: raw.claim.as_ref().map(|_| String::new()),
                claim: raw.claim,
                expression: raw.expression,
            };
            prefixed(raw, &format!("{at}.uid"))
        });
        let extra = extra(self.claim_mappings.extra, &format!("{at}.extra"))?;
        let claim_rules = claim_rules(self.claim_validation_rules, &format!("{key}.claimValidationRules"))?;
        let user_rules = user_rules(self.user_validation_rules, &format!("{key}.userValidationRules"))?;
        let mappings = ClaimMappings {
            username,
            groups: groups.transpose()?.flatten(),
            uid: uid.transpose()?.flatten(),
            extra,
            claim_rules,
            user_rules,
        };
        email_is_verified(&mappings, &format!("{at}.username.expression"))?;
        let (url, documents, audiences) = self.issuer.validate(&format!("{key}.issuer"))?;
        Ok(JwtIssuer { url, documents, audiences, mappings })
    }
}

impl RawIssuer {
    fn validate(self, key: &str) -> Result<(String, Documents, Vec<String>), Invalid> {
        https_url(&format!("{key}.url"), &self.url)?;
        let at = format!("{key}.audiences");
        if self.audiences.is_empty() {
            return invalid(at, "is empty, so a token for anybody would do; name whom tokens must be for");
        }
        at_most(&at, self.audiences.len(), AUDIENCES_MAX)?;
        for (index, audience) in self.audiences.iter().enumerate() {
            if audience.is_empty() || self.audiences[..index].contains(audience) {
                return invalid(format!("{at}[{index}]"), "must not be empty or stand twice");
            }
        }
        if self.audiences.len() > 1 && self.audience_match_policy.is_none() {
            return invalid(
                format!("{key}.audienceMatchPolicy"),
                "must be MatchAny, since there are several audiences",
            );
        }
        if self.through_cluster {
            if self.discovery_url.is_some() || self.certificate_authority.is_some() {
                let problem =
                    "leaves no room for discoveryURL or certificateAuthority; the API server is asked";
                return invalid(format!("{key}.throughCluster"), problem);
            }
            return Ok((self.url, Documents::Cluster, self.audiences));
        }
        if let Some(discovery) = &self.discovery_url {
            let at = format!("{key}.discoveryURL");
            https_url(&at, discovery)?;
            if discovery.trim_end_matches('/') == self.url.trim_end_matches('/') {
                return invalid(at, "must be another than url; leave it out where they are the same");
            }
        }
        let authorities = self.certificate_authority.map(|pem| {
            let at = format!("{key}.certificateAuthority");
            // What is wrong in it is said of files elsewhere; here the usual mistake is to name one.
            match ClusterCa::from_pem(pem.as_bytes(), at.as_str()) {
                Ok(ca) => Ok(ca.roots()),
                Err(_) => invalid(
                    at,
                    "holds no certificate that can be read; it is PEM text, not the name of a file",
                ),
            }
        });
        let documents =
            Documents::Web { discovery_url: self.discovery_url, authorities: authorities.transpose()? };
        Ok((self.url, documents, self.audiences))
    }
}

fn at_most(key: &str, found: usize, most: usize) -> Result<(), Invalid> {
    if found > most {
        return invalid(key, format!("has {found} entries; at most {most} are read"));
    }
    Ok(())
}

fn https_url(key: &str, text: &str) -> Result<(), Invalid> {
    let uri = text.parse::<http::Uri>().ok().filter(|uri| uri.scheme_str() == Some("https"));
    let Some(authority) = uri.as_ref().and_then(http::Uri::authority) else {
        return invalid(key, format!("{text:?} is no https URL"));
    };
    if authority.as_str().contains('@') {
        return invalid(key, "must not contain a user name or password");
    }
    if text.contains('?') || text.contains('#') {
        return invalid(key, "must not have a query or fragment");
    }
    Ok(())
}

fn compiled(source: &str, variable: &str, key: String) -> Result<Arc<Expression>, Invalid> {
    match Expression::compile(source, &[variable]) {
        Ok(expression) => Ok(Arc::new(expression)),
        Err(error) => invalid(key, error.to_string()),
    }
}

fn prefixed(raw: RawPrefixed, key: &str) -> Result<Option<Mapping>, Invalid> {
    let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
    match (filled(raw.claim), filled(raw.expression)) {
        (Some(_), Some(_)) => invalid(key, "say either `claim` or `expression`, not both"),
        (None, None) => Ok(None),
        (Some(name), None) => match raw.prefix {
            Some(prefix) => Ok(Some(Mapping::Claim { name, prefix })),
            None => invalid(format!("{key}.prefix"), "is required beside claim; \"\" puts nothing in front"),
        },
        (None, Some(_)) if raw.prefix.is_some() => {
            invalid(format!("{key}.prefix"), "goes with claim; an expression puts it in front itself")
        }
        (None, Some(source)) => {
            Ok(Some(Mapping::Expression(compiled(&source, CLAIMS, format!("{key}.expression"))?)))
        }
    }
}

fn extra(raw: Vec<RawExtra>, key: &str) -> Result<Vec<(String, Arc<Expression>)>, Invalid> {
    at_most(key, raw.len(), RULES_MAX)?;
    let mut extra: Vec<(String, Arc<Expression>)> = Vec::with_capacity(raw.len());
    for (index, raw) in raw.into_iter().enumerate() {
        let at = format!("{key}[{index}].key");
        let (domain, path) = raw.key.split_once('/').unwrap_or(("", ""));
        let plain = |text: &str, more: &str| {
            !text.is_empty()
                && text.bytes().all(|byte| {
                    byte.is_ascii_lowercase() || byte.is_ascii_digit() || more.as_bytes().contains(&byte)
                })
        };
        let is_domain = domain
            .split('.')
            .all(|label| plain(label, "-") && !label.starts_with('-') && !label.ends_with('-'));
        if !is_domain || !plain(path, "-._~!$&'()*+,;=:@/%") {
            return invalid(at, format!("{:?} must be a domain, a slash and a path, in lower case", raw.key));
        }
        let reserved = ["kubernetes.io", "k8s.io"]
            .iter()
            .any(|own| domain == *own || domain.ends_with(&format!(".{own}")));
        if reserved {
            return invalid(at, format!("{:?} is of a domain that Kubernetes keeps to itself", raw.key));
        }
        if extra.iter().any(|(other, _)| *other == raw.key) {
            return invalid(at, format!("{:?} stands twice", raw.key));
        }
        let expression = compiled(&raw.value_expression, CLAIMS, format!("{key}[{index}].valueExpression"))?;
        extra.push((raw.key, expression));
    }
    Ok(extra)
}

fn claim_rules(raw: Vec<RawClaimRule>, key: &str) -> Result<Vec<ClaimRule>, Invalid> {
    at_most(key, raw.len(), RULES_MAX)?;
    raw.into_iter()
        .enumerate()
        .map(|(index, raw)| {
            let key = format!("{key}[{index}]");
            match (raw.claim, raw.expression) {
                (Some(claim), None) if raw.message.is_none() && !claim.is_empty() => {
                    Ok(ClaimRule::Required { claim, value: raw.required_value.unwrap_or_default() })
                }
                (None, Some(source)) if raw.required_value.is_none() => {
                    let expression = compiled(&source, CLAIMS, format!("{key}.expression"))?;
                    Ok(ClaimRule::Condition(Condition { expression, message: raw.message }))
                }
                _ => invalid(key, "say either `claim` and `requiredValue`, or `expression` and `message`"),
            }
        })
        .collect()
}

fn user_rules(raw: Vec<RawUserRule>, key: &str) -> Result<Vec<Condition>, Invalid> {
    at_most(key, raw.len(), RULES_MAX)?;
    raw.into_iter()
        .enumerate()
        .map(|(index, raw)| {
            let expression = compiled(&raw.expression, USER, format!("{key}[{index}].expression"))?;
            Ok(Condition { expression, message: raw.message })
        })
        .collect()
}

/// Kubernetes' rule: who takes the email address for a name must look at whether the issuer has verified it.
fn email_is_verified(mappings: &ClaimMappings, key: &str) -> Result<(), Invalid> {
    let Mapping::Expression(username) = &mappings.username else { return Ok(()) };
    let rules = mappings.claim_rules.iter().filter_map(|rule| match rule {
        ClaimRule::Condition(condition) => Some(&condition.expression),
        ClaimRule::Required { .. } => None,
    });
    let mut all = mappings.extra.iter().map(|(_, expression)| expression).chain(rules).chain([username]);
    if username.selects(CLAIMS, "email")
        && !all.any(|expression| expression.selects(CLAIMS, "email_verified"))
    {
        let problem = "reads claims.email, so it, a claimValidationRules expression or an extra valueExpression must \
                       read claims.email_verified";
        return invalid(key, problem);
    }
    Ok(())
}
