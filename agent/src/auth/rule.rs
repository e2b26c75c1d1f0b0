//! From a verified identity to as whom it goes on: the rules of one cluster, first match wins.
//!
//! A rule that cannot be evaluated refuses: passing over it could pass over a denial.

use std::{fmt, sync::Arc};

use serde::Serialize;
use serde_json::json;
use weir_common::{
    attributes::Attributes,
    event::{Caller, Identity, IdentityMethod, UserInfo},
};

use super::{
    Refused,
    expression::{Expression, ExpressionError, Value, Variables},
    refused::pod_name,
};
use crate::{
    config::roles::{Impersonate, Role},
    proxy::Labels,
};

/// What Kubernetes' own users and groups begin with.
const SYSTEM_PREFIX: &str = "system:";
/// What those of service accounts begin with.
const ACCOUNT_PREFIX: &str = "system:serviceaccount";
/// The group of everybody who is authenticated: it says nothing about whom a token maps to.
const AUTHENTICATED: &str = "system:authenticated";

type Named = (&'static str, Value);

/// Where a connection comes from, as expressions see it; made once for a connection.
#[derive(Debug)]
pub struct Origin {
    caller: Arc<Caller>,
    values: Result<[Named; 6], ExpressionError>,
}

impl Origin {
    /// Of a connection to `cluster`.
    pub fn new(cluster: &str, caller: Arc<Caller>, labels: &Labels) -> Self {
        let values = Self::values(cluster, &caller, labels);
        Self { caller, values }
    }

    /// Who connected.
    pub fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    fn values(cluster: &str, caller: &Caller, labels: &Labels) -> Result<[Named; 6], ExpressionError> {
        let pod = caller.pod.as_ref();
        let account = pod.map(|pod| pod.service_account.as_str()).unwrap_or_default();
        let container =
            caller.container.as_ref().map(|container| container.name.as_str()).unwrap_or_default();
        let pod = pod.map(|pod| {
            json!({
                "name": pod.name, "namespace": pod.namespace, "uid": pod.uid,
                "ip": pod.ip.as_deref().unwrap_or_default(), "container": container,
            })
        });
        let process = caller.process.as_ref().map(|process| {
            json!({
                "executable": process.executable, "argv": process.argv, "uid": process.uid, "pid": process.pid,
            })
        });
        let object = |value: Option<serde_json::Value>| value.unwrap_or_else(|| json!({}));
        Ok([
            ("cluster", Value::of(&cluster)?),
            ("labels", Value::of(&labels.pod)?),
            ("namespaceLabels", Value::of(&labels.namespace)?),
            ("pod", Value::of(&object(pod))?),
            ("process", Value::of(&object(process))?),
            ("serviceAccount", Value::of(&account)?),
        ])
    }
}

/// Who asks, as far as it is verified; made once for a token.
#[derive(Debug)]
pub struct Subject {
    /// What it was established by.
    pub method: IdentityMethod,
    /// Issuer of the token.
    pub issuer: Option<String>,
    /// Whether the cluster itself vouches for it: its own issuer, or the kernel.
    pub of_cluster: bool,
    /// The user; empty for `unverified`.
    pub user: UserInfo,
    values: [Named; 4],
}

impl Subject {
    /// A subject with the claims of its token (an empty object where there is none).
    ///
    /// # Errors
    /// It is larger than expressions read.
    pub fn new(
        method: IdentityMethod,
        issuer: Option<String>,
        of_cluster: bool,
        user: UserInfo,
        claims: &serde_json::Value,
    ) -> Result<Self, ExpressionError> {
        Self::with_claims(method, issuer, of_cluster, user, Value::from_json(claims)?)
    }

    /// Whom a verified token of `issuer` is of.
    ///
    /// # Errors
    /// It is larger than expressions read.
    pub(super) fn of_token(
        issuer: String,
        of_cluster: bool,
        user: UserInfo,
        claims: Value,
    ) -> Result<Self, ExpressionError> {
        Self::with_claims(IdentityMethod::Token, Some(issuer), of_cluster, user, claims)
    }

    fn with_claims(
        method: IdentityMethod,
        issuer: Option<String>,
        of_cluster: bool,
        user: UserInfo,
        claims: Value,
    ) -> Result<Self, ExpressionError> {
        let identity = json!({"method": method, "issuer": issuer.as_deref().unwrap_or_default()});
        let values = [
            ("claims", claims),
            ("groups", Value::of(&user.groups)?),
            ("identity", Value::of(&identity)?),
            ("user", user_value(&user)?),
        ];
        Ok(Self { method, issuer, of_cluster, user, values })
    }

    /// The variables that rules read of it.
    pub fn variables(&self) -> Variables<'_> {
        self.values.iter().fold(Variables::new(), |variables, (name, value)| variables.with(name, value))
    }

    /// As it is recorded.
    pub fn identity(&self) -> Identity {
        Identity {
            method: self.method,
            issuer: self.issuer.clone(),
            user: self.user.clone(),
            rule: None,
            acts_as: None,
        }
    }

    /// The name by which messages call it.
    fn display_name(&self, caller: &Caller) -> String {
        if self.user.username.is_empty() {
            format!("pod {}", pod_name(caller.pod.as_ref()))
        } else {
            self.user.username.clone()
        }
    }
}

/// A user as expressions see it: every field is there.
pub(super) fn user_value(user: &UserInfo) -> Result<Value, ExpressionError> {
    let UserInfo { username, uid, groups, extra } = user;
    Value::of(&json!({"username": username, "uid": uid, "groups": groups, "extra": extra}))
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// HTTP method.
    pub method: &'a str,
    /// Path as sent.
    pub path: &'a str,
    /// What it means.
    pub attributes: &'a Attributes,
}

impl Question<'_> {
    fn value(&self) -> Result<Value, ExpressionError> {
        let attributes = self.attributes;
        Value::of(&json!({
            "method": self.method, "path": self.path, "verb": attributes.verb,
            "apiGroup": attributes.api_group, "apiVersion": attributes.api_version,
            "resource": attributes.resource, "subresource": attributes.subresource,
            "namespace": attributes.namespace, "name": attributes.name,
        }))
    }
}

/// A rule that was looked at, for `weir-agent explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Considered {
    /// Its name.
    pub rule: String,
    /// Its condition.
    pub when: String,
    /// What came of it.
    #[serde(flatten)]
    pub said: Said,
}

/// What a rule says of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "camelCase")]
pub enum Said {
    /// It does not take identities of this kind.
    DoesNotTake,
    /// Its condition does not hold.
    DoesNotMatch,
    /// Its condition holds: it decides.
    Matches,
    /// It cannot be evaluated, which refuses.
    Fails {
        /// Why.
        cause: String,
    },
}

impl fmt::Display for Considered {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule, when, said } = self;
        match said {
            Said::DoesNotTake => write!(formatter, "{rule}: does not take such identities"),
            Said::DoesNotMatch => write!(formatter, "{rule}: does not hold: {when}"),
            Said::Matches => write!(formatter, "{rule}: holds: {when}"),
            Said::Fails { cause } => write!(formatter, "{rule}: cannot be evaluated ({cause}): {when}"),
        }
    }
}

/// One decision in the making.
#[derive(Debug)]
pub(super) struct Matching<'a> {
    /// The cluster.
    pub(super) cluster: &'a str,
    /// Who asks.
    pub(super) subject: &'a Subject,
    /// From where.
    pub(super) origin: &'a Origin,
    request: Result<Value, ExpressionError>,
}

impl<'a> Matching<'a> {
    /// Of `subject` at `origin`, who asks `question`.
    pub(super) fn new(
        cluster: &'a str,
        subject: &'a Subject,
        origin: &'a Origin,
        question: &Question<'_>,
    ) -> Self {
        Self { cluster, subject, origin, request: question.value() }
    }

    /// The name by which messages call who asks.
    pub(super) fn display_name(&self) -> String {
        self.subject.display_name(&self.origin.caller)
    }

    fn failed(&self, rule: &Role, cause: &ExpressionError) -> Refused {
        Refused::RuleFailed { rule: rule.name.clone(), user: self.display_name(), cause: cause.to_string() }
    }

    fn variables(&self) -> Result<Variables<'_>, &ExpressionError> {
        let origin = self.origin.values.as_ref()?;
        let named = origin.iter().chain(&self.subject.values).map(|(name, value)| (*name, value));
        let variables = named.fold(Variables::new(), |variables, (name, value)| variables.with(name, value));
        Ok(variables.with("request", self.request.as_ref()?))
    }

    /// The first rule that takes the subject and whose condition holds.
    ///
    /// # Errors
    /// There is none, or one before it cannot be evaluated.
    pub(super) fn find<'r>(&self, rules: &'r [Role]) -> Result<&'r Role, Refused> {
        for rule in rules.iter().filter(|rule| rule.takes.contains(&self.subject.method)) {
            let variables = self.variables().map_err(|error| self.failed(rule, error))?;
            if rule.when.boolean(&variables).map_err(|error| self.failed(rule, &error))? {
                return Ok(rule);
            }
        }
        Err(self.nobody())
    }

    /// What each of the rules says, up to the one that decides.
    pub(super) fn consider(&self, rules: &[Role]) -> Vec<Considered> {
        let mut considered = Vec::new();
        for rule in rules {
            let said = if rule.takes.contains(&self.subject.method) {
                let variables = self.variables().map_err(Clone::clone);
                match variables.and_then(|variables| rule.when.boolean(&variables)) {
                    Ok(true) => Said::Matches,
                    Ok(false) => Said::DoesNotMatch,
                    Err(error) => Said::Fails { cause: error.to_string() },
                }
            } else {
                Said::DoesNotTake
            };
            let decides = matches!(said, Said::Matches | Said::Fails { .. });
            considered.push(Considered {
                rule: rule.name.clone(),
                when: rule.when.source().to_owned(),
                said,
            });
            if decides {
                break;
            }
        }
        considered
    }

    /// No rule matched: what that means depends on what was presented.
    fn nobody(&self) -> Refused {
        let cluster = self.cluster.to_owned();
        match self.subject.method {
            IdentityMethod::Workload => Refused::NoCredential { cluster },
            IdentityMethod::Unverified => {
                Refused::Unverifiable { cluster, cause: "it is no token of a configured issuer".to_owned() }
            }
            IdentityMethod::Token | IdentityMethod::ClientCertificate => {
                Refused::NoRule { user: self.display_name(), cluster }
            }
        }
    }

    /// Whether `rule` lets the client's own wish to be `requested` through.
    ///
    /// # Errors
    /// Its expression cannot be evaluated.
    pub(super) fn allows(&self, rule: &Role, requested: &UserInfo) -> Result<bool, Refused> {
        let Some(allow) = &rule.allow_impersonation else { return Ok(false) };
        let requested = user_value(requested).map_err(|error| self.failed(rule, &error))?;
        let variables = self.variables().map_err(|error| self.failed(rule, error))?;
        let variables = variables.with("impersonated", &requested);
        allow.boolean(&variables).map_err(|error| self.failed(rule, &error))
    }

    /// The user that `rule` maps the subject to.
    ///
    /// # Errors
    /// An expression cannot be evaluated, or yields one of Kubernetes' own users or groups.
    pub(super) fn mapped(&self, rule: &Role, mapping: &Impersonate) -> Result<UserInfo, Refused> {
        let failed = |error: &ExpressionError| self.failed(rule, error);
        let variables = self.variables().map_err(failed)?;
        let one = |expression: &Expression| expression.string(&variables).map_err(|error| failed(&error));
        let many = |expression: &Expression| expression.strings(&variables).map_err(|error| failed(&error));
        let from = &self.subject.user;
        // A user of another name must not keep the rights of the one it was.
        let renamed = mapping.user.is_some();
        let kept = |value: &String| if renamed { String::new() } else { value.clone() };
        let username = mapping.user.as_deref().map(one).transpose()?.unwrap_or_else(|| from.username.clone());
        let uid = mapping.uid.as_deref().map(one).transpose()?.unwrap_or_else(|| kept(&from.uid));
        let groups = match &mapping.groups {
            Some(expression) => many(expression)?,
            None if renamed => Vec::new(),
            None => from.groups.clone(),
        };
        let mut extra = if renamed { Default::default() } else { from.extra.clone() };
        for (key, expression) in &mapping.extra {
            extra.insert(key.clone(), many(expression)?);
        }
        self.checked(rule, mapping, UserInfo { username, uid, groups, extra })
    }

    /// `user`, unless it is one of Kubernetes' own, or in a group of these, where it must not be.
    ///
    /// # Errors
    /// It is.
    pub(super) fn checked(
        &self,
        rule: &Role,
        mapping: &Impersonate,
        user: UserInfo,
    ) -> Result<UserInfo, Refused> {
        match self.foreign_system_name(mapping, &user) {
            None => Ok(user),
            Some(name) => Err(Refused::SystemIdentity {
                rule: rule.name.clone(),
                user: self.display_name(),
                name: name.clone(),
            }),
        }
    }

    /// What a foreign issuer says must not become one of Kubernetes' own identities by accident: whoever can choose
    /// claims there could otherwise name `system:masters`. The cluster's own word is good for its service accounts.
    fn foreign_system_name<'u>(&self, mapping: &Impersonate, user: &'u UserInfo) -> Option<&'u String> {
        if mapping.system_identities {
            return None;
        }
        let own = |name: &String| self.subject.of_cluster && name.starts_with(ACCOUNT_PREFIX);
        std::iter::once(&user.username)
            .chain(&user.groups)
            .find(|name| name.starts_with(SYSTEM_PREFIX) && name.as_str() != AUTHENTICATED && !own(name))
    }
}
