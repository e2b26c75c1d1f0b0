//! `clusters[].roles`: which caller goes on as whom. Raw → validated; expressions are compiled here, so that a mistake
//! in one is known at start.

use std::{collections::BTreeMap, sync::Arc};

use serde::Deserialize;
use weir_common::event::IdentityMethod;

use super::{
    aws_role::{AwsRole, RawAssumeRole, RawWebIdentity, WebToken},
    raw::{Invalid, invalid},
};
use crate::auth::expression::Expression;

/// Most rules of one cluster.
pub const ROLES_MAX: usize = 256;
/// What expressions in rules may ask for. The pod's namespace is `pod.namespace`: CEL keeps `namespace` for itself.
pub const VARIABLES: [&str; 11] = [
    "claims",
    "cluster",
    "groups",
    "identity",
    "labels",
    "namespaceLabels",
    "pod",
    "process",
    "request",
    "serviceAccount",
    "user",
];
/// The same, in `allowImpersonation`.
const IMPERSONATED: &str = "impersonated";

/// One rule.
#[derive(Clone, Debug)]
pub struct Role {
    /// Name in records and messages; unique in its cluster.
    pub name: String,
    /// Whom and what it is for.
    pub when: Arc<Expression>,
    /// Which identities it takes.
    pub takes: Vec<IdentityMethod>,
    /// Whether the client's own `Impersonate-*` headers go on; never without it.
    pub allow_impersonation: Option<Arc<Expression>>,
    /// As whom the request goes on.
    pub action: Action,
}

/// As whom a request goes on.
#[derive(Clone, Debug)]
pub enum Action {
    /// With its own credential.
    PassThrough,
    /// Not at all; with what the caller is told.
    Deny(Option<String>),
    /// As a Kubernetes user, by the agent's own credential.
    Impersonate(Box<Impersonate>),
    /// In an AWS IAM role that the agent's own AWS identity assumes.
    AssumeRole(Box<AwsRole>),
    /// In an AWS IAM role that trusts a token.
    WebIdentity(Box<AwsRole>, WebToken),
}

/// The user that is impersonated; what is absent is the verified identity's.
#[derive(Clone, Debug)]
pub struct Impersonate {
    /// Name.
    pub user: Option<Arc<Expression>>,
    /// UID.
    pub uid: Option<Arc<Expression>>,
    /// Groups.
    pub groups: Option<Arc<Expression>>,
    /// Further attributes.
    pub extra: BTreeMap<String, Arc<Expression>>,
    /// Whether Kubernetes' own users and groups (`system:…`) may come of it, for identities that are not the cluster's own.
    pub system_identities: bool,
}

#[derive(Clone, Copy, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) enum RawMethod {
    /// A verified token.
    Token,
    /// A verified client certificate.
    ClientCertificate,
    /// No credential: the pod itself.
    Workload,
    /// A credential that Weir cannot verify.
    Unverified,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawRole {
    /// Name in records and messages; unique in its cluster.
    #[cfg_attr(test, schemars(length(min = 1)))]
    name: String,
    /// CEL: whom and what it is for. `true` is everybody.
    when: String,
    /// Which identities it takes. Without it: `[token, clientCertificate]`. Without a credential a pod is let through only
    /// by a rule that takes `workload`; a credential that Weir cannot verify, only by one that takes `unverified`, and only to
    /// be passed through.
    takes: Option<Vec<RawMethod>>,
    /// CEL, with `impersonated` (a user): whether the client's own `Impersonate-*` headers go on. Without it: no.
    allow_impersonation: Option<String>,
    /// `{}`: with the caller's own credential. Exactly one of this and the next four.
    pass_through: Option<super::raw::Nothing>,
    /// Not at all.
    deny: Option<RawDeny>,
    /// As a Kubernetes user, by the agent's own credential.
    impersonate: Option<RawImpersonate>,
    /// In an AWS IAM role that the agent's own AWS identity assumes; source identity and session tags lead back to the pod.
    assume_role: Option<RawAssumeRole>,
    /// In an AWS IAM role that trusts a token; only the session's name leads back.
    web_identity: Option<RawWebIdentity>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawDeny {
    /// What the caller is told.
    message: Option<String>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawImpersonate {
    /// CEL (string). Without it: the verified identity's name.
    user: Option<String>,
    /// CEL (string). Without it: the verified identity's, unless `user` is given.
    uid: Option<String>,
    /// CEL (list of strings). Without it: the verified identity's, unless `user` is given.
    groups: Option<String>,
    /// CEL (string or list of strings) by key; `weir.dev/…` are Weir's own.
    #[serde(default)]
    extra: BTreeMap<String, String>,
    /// Whether Kubernetes' own users and groups (`system:…`) may come of it for an identity that is not the cluster's own.
    #[serde(default)]
    system_identities: bool,
}

impl From<RawMethod> for IdentityMethod {
    fn from(raw: RawMethod) -> Self {
        match raw {
            RawMethod::Token => Self::Token,
            RawMethod::ClientCertificate => Self::ClientCertificate,
            RawMethod::Workload => Self::Workload,
            RawMethod::Unverified => Self::Unverified,
        }
    }
}

/// Validates the rules under `key`.
pub(super) fn roles(key: &str, raw: Vec<RawRole>) -> Result<Vec<Role>, Invalid> {
    if raw.len() > ROLES_MAX {
        return invalid(key, format!("has {} entries; at most {ROLES_MAX} are read", raw.len()));
    }
    let mut roles: Vec<Role> = Vec::with_capacity(raw.len());
    for (index, raw) in raw.into_iter().enumerate() {
        let role = role(&format!("{key}[{index}]"), raw)?;
        if roles.iter().any(|other| other.name == role.name) {
            return invalid(format!("{key}[{index}].name"), "must be unique");
        }
        roles.push(role);
    }
    Ok(roles)
}

fn role(key: &str, raw: RawRole) -> Result<Role, Invalid> {
    if raw.name.is_empty() {
        return invalid(format!("{key}.name"), "must be there");
    }
    let action = match (raw.pass_through, raw.deny, raw.impersonate, raw.assume_role, raw.web_identity) {
        (Some(_), None, None, None, None) => Action::PassThrough,
        (None, Some(deny), None, None, None) => Action::Deny(deny.message),
        (None, None, Some(raw), None, None) => {
            Action::Impersonate(Box::new(raw.validate(&format!("{key}.impersonate"))?))
        }
        (None, None, None, Some(raw), None) => {
            Action::AssumeRole(Box::new(raw.validate(&format!("{key}.assumeRole"))?))
        }
        (None, None, None, None, Some(raw)) => {
            let (role, token) = raw.validate(&format!("{key}.webIdentity"))?;
            Action::WebIdentity(Box::new(role), token)
        }
        _ => {
            let problem = "say one of `passThrough`, `deny`, `impersonate`, `assumeRole` and `webIdentity`";
            return invalid(key, problem);
        }
    };
    let takes: Vec<IdentityMethod> = match raw.takes {
        None => vec![IdentityMethod::Token, IdentityMethod::ClientCertificate],
        Some(takes) if takes.is_empty() => {
            return invalid(format!("{key}.takes"), "is empty, so the rule would be for nobody");
        }
        Some(takes) => takes.into_iter().map(IdentityMethod::from).collect(),
    };
    let passes = matches!(action, Action::PassThrough | Action::Deny(_));
    if takes.contains(&IdentityMethod::Unverified) && !passes {
        let problem = "has `unverified`: such a credential can only be passed through or denied";
        return invalid(format!("{key}.takes"), problem);
    }
    let mut with_impersonated = VARIABLES.to_vec();
    with_impersonated.push(IMPERSONATED);
    Ok(Role {
        when: compile(format!("{key}.when"), &raw.when, &VARIABLES)?,
        allow_impersonation: raw
            .allow_impersonation
            .map(|source| compile(format!("{key}.allowImpersonation"), &source, &with_impersonated))
            .transpose()?,
        name: raw.name,
        takes,
        action,
    })
}

fn compile(key: String, source: &str, variables: &[&str]) -> Result<Arc<Expression>, Invalid> {
    let compiled = Expression::compile(source, variables).map(Arc::new);
    compiled.or_else(|error| invalid(key, error.to_string()))
}

impl RawImpersonate {
    fn validate(self, key: &str) -> Result<Impersonate, Invalid> {
        let expression = |name: &str, source: Option<String>| {
            source.map(|source| compile(format!("{key}.{name}"), &source, &VARIABLES)).transpose()
        };
        let mut extra = BTreeMap::new();
        for (name, source) in self.extra {
            let place = format!("{key}.extra[{name:?}]");
            if name != name.to_ascii_lowercase() {
                return invalid(place, "must be in lower case, as Kubernetes reads it");
            }
            if name.starts_with(crate::auth::OWN_EXTRA_PREFIX) {
                return invalid(place, "is Weir's own");
            }
            extra.insert(name, compile(place, &source, &VARIABLES)?);
        }
        Ok(Impersonate {
            user: expression("user", self.user)?,
            uid: expression("uid", self.uid)?,
            groups: expression("groups", self.groups)?,
            extra,
            system_identities: self.system_identities,
        })
    }
}
