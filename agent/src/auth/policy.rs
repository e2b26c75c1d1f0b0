//! One cluster's policy: who asks, which rule is for them, and the credential that their requests go on with.
//!
//! [`Policy::decide`] comes before the record, which it is part of; [`Policy::credential`] after it, since what is asked
//! of the cluster or of AWS names the session.

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::json;
use weir_common::event::{ActsAs, Identity, IdentityMethod, Pod, RoleAssumed, UserInfo};
use zeroize::Zeroizing;

use super::{
    Refused,
    impersonation::{self, Right},
    issuers::{Issuers, Moment},
    presented::{self, Presented},
    role_session::{By, InRole},
    rule::{Considered, Matching, Origin, Question, Subject},
    workload,
};
use crate::{
    aws::{Aws, AwsMeasures, Bearer, RoleRequest, WebIdentityToken},
    config::{
        aws_role::{AwsRole, WebToken},
        roles::{Action, Role},
    },
};

/// What the extra attributes begin with that Weir itself adds to who it impersonates.
pub const OWN_EXTRA_PREFIX: &str = "weir.dev/";
/// Those, behind that.
pub const OWN_EXTRAS: [&str; 3] = ["session", "pod", "pod-uid"];

/// The agent's own credential for a cluster.
pub trait OwnCredential: fmt::Debug + Send + Sync {
    /// Its `Authorization`; none where it is the client certificate of the connection.
    fn authorization(&self) -> BoxFuture<'_, Result<Option<HeaderValue>, String>>;

    /// The first of `rights` that the cluster does not give `user`; none if it gives them all. An error is in words.
    fn lacks<'a>(
        &'a self,
        user: &'a UserInfo,
        rights: &'a [Right],
    ) -> BoxFuture<'a, Result<Option<&'a Right>, String>>;

    /// A token of a pod's service account, bound to that pod, for `audience`.
    fn mint<'a>(
        &'a self,
        pod: &'a Pod,
        audience: &'a str,
    ) -> BoxFuture<'a, Result<Zeroizing<String>, String>>;
}

/// The rules of a cluster, with what they need.
#[derive(Debug)]
pub struct Rules {
    /// In order; the first that matches decides.
    pub roles: Vec<Role>,
    /// Whose tokens are verified.
    pub issuers: Arc<Issuers>,
    /// What impersonation goes on with.
    pub own: Arc<dyn OwnCredential>,
    /// Where AWS roles come from.
    pub aws: Aws,
    /// The node that this agent is on: bound tokens name it.
    pub node: String,
}

/// See the module.
#[derive(Debug)]
pub struct Policy {
    cluster: String,
    /// None: everything passes through as it is, for the API server to judge.
    rules: Option<Rules>,
}

/// What a request presents and asks.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// What it asks.
    pub question: Question<'a>,
    /// Where it comes from.
    pub origin: &'a Origin,
    /// Whom the connection's verified client certificate names.
    pub certificate: Option<&'a Arc<Subject>>,
}

/// What is decided of a request.
#[derive(Debug)]
pub struct Decision {
    /// Who it is for; none where that is not known.
    pub identity: Option<Identity>,
    /// How it goes on.
    pub onward: Result<Onward, Refused>,
}

/// How a request goes on.
#[derive(Debug)]
pub enum Onward {
    /// As it is, with its own credential.
    AsPresented,
    /// As a user that the agent impersonates.
    Impersonate {
        /// Whom.
        user: UserInfo,
        /// Whom the rule maps to, where the client itself asks to be `user`: it must have the right to.
        wished_by: Option<UserInfo>,
    },
    /// In an AWS IAM role.
    Role(Box<InRole>),
}

/// What a request goes on with.
#[derive(Debug)]
pub enum Credential {
    /// What it presents.
    AsPresented,
    /// This instead of whatever it presents.
    Replaced {
        /// `Authorization`, if there is to be one.
        authorization: Option<HeaderValue>,
        /// Further headers.
        headers: Vec<(HeaderName, HeaderValue)>,
        /// Whether it takes connections with the agent's own client certificate.
        own_connection: bool,
        /// What is recorded of an AWS role's credentials, the first time that they are used.
        assumed: Option<Box<RoleAssumed>>,
        /// What an AWS role's token was asked for with.
        of_role: Option<Box<OfRole>>,
    },
}

/// A role's token, and what it was asked for with.
#[derive(Debug)]
pub struct OfRole {
    role: Box<InRole>,
    request: RoleRequest,
    bearer: Bearer,
}

impl Credential {
    /// Puts it into the headers of the forwarded request, in the place of whatever is there.
    pub fn apply(&self, headers: &mut HeaderMap) {
        let Self::Replaced { authorization, headers: further, .. } = self else { return };
        presented::remove(headers);
        if let Some(authorization) = authorization {
            let mut authorization = authorization.clone();
            authorization.set_sensitive(true);
            headers.insert(http::header::AUTHORIZATION, authorization);
        }
        for (name, value) in further {
            headers.append(name.clone(), value.clone());
        }
    }

    /// What is to be recorded of it, with its first use.
    pub fn assumed(&self) -> Option<&RoleAssumed> {
        match self {
            Self::AsPresented => None,
            Self::Replaced { assumed, .. } => assumed.as_deref(),
        }
    }

    /// Whether it takes connections with the agent's own client certificate.
    pub fn own_connection(&self) -> bool {
        matches!(self, Self::Replaced { own_connection: true, .. })
    }
}

/// Who asks: verified, or refused with what is known of them.
type Subjected = Result<Arc<Subject>, Refused>;

impl Policy {
    /// Everything passes through as it is.
    pub fn open(cluster: String) -> Self {
        Self { cluster, rules: None }
    }

    /// By rules.
    pub fn new(cluster: String, rules: Rules) -> Self {
        Self { cluster, rules: Some(rules) }
    }

    /// Whose tokens are verified; none where there are no rules.
    pub fn issuers(&self) -> Option<Arc<Issuers>> {
        self.rules.as_ref().map(|rules| Arc::clone(&rules.issuers))
    }

    /// Says who asks and how the request goes on.
    pub async fn decide(&self, asked: &Asked<'_>) -> Decision {
        let requested = match impersonation::requested(asked.headers) {
            Ok(requested) => requested,
            Err(refused) => return Decision { identity: None, onward: Err(refused) },
        };
        let Some(rules) = &self.rules else {
            let onward =
                if requested.is_some() { Err(Refused::Impersonation) } else { Ok(Onward::AsPresented) };
            return Decision { identity: None, onward };
        };
        let subject = match self.subject(rules, asked).await {
            Ok(subject) => subject,
            Err(refused) => return Decision { identity: None, onward: Err(refused) },
        };
        let mut identity = subject.identity();
        let matching = Matching::new(&self.cluster, &subject, asked.origin, &asked.question);
        let onward = Self::onward(rules, &matching, requested, asked, &mut identity);
        Decision { identity: Some(identity), onward }
    }

    /// [`Self::decide`], with what each rule says.
    pub async fn explain(&self, asked: &Asked<'_>) -> (Decision, Vec<Considered>) {
        let decision = self.decide(asked).await;
        let considered = match &self.rules {
            None => Vec::new(),
            Some(rules) => match self.subject(rules, asked).await {
                Ok(subject) => Matching::new(&self.cluster, &subject, asked.origin, &asked.question)
                    .consider(&rules.roles),
                Err(_) => Vec::new(),
            },
        };
        (decision, considered)
    }

    /// Who asks. A certificate counts before a token, as in Kubernetes.
    async fn subject(&self, rules: &Rules, asked: &Asked<'_>) -> Subjected {
        let presented = Presented::read(asked.headers)?;
        let pod = asked.origin.caller().pod.as_ref();
        match (asked.certificate, presented) {
            (Some(certificate), _) => Ok(Arc::clone(certificate)),
            (None, Presented::Token(token)) => {
                match rules.issuers.verify(token.expose(), Moment::now()).await {
                    Ok(verified) => {
                        let subject = &verified.subject;
                        workload::check_binding(
                            verified.claims.get(workload::CLAIM),
                            subject.of_cluster,
                            pod,
                            &rules.node,
                        )?;
                        Ok(Arc::clone(subject))
                    }
                    Err(error) if error.is_foreign() => self.unverified(error.to_string(), rules),
                    Err(error) => Err(Refused::Token(error)),
                }
            }
            (None, Presented::Other) => self.unverified("it is no bearer token".to_owned(), rules),
            (None, Presented::Nothing) => {
                let pod = pod.ok_or_else(|| Refused::NoCredential { cluster: self.cluster.clone() })?;
                self.plain(IdentityMethod::Workload, true, workload::user(pod))
            }
        }
    }

    /// A credential that is for the API server to judge, if a rule takes such at all.
    fn unverified(&self, cause: String, rules: &Rules) -> Subjected {
        if rules.roles.iter().any(|role| role.takes.contains(&IdentityMethod::Unverified)) {
            return self.plain(IdentityMethod::Unverified, false, UserInfo::default());
        }
        Err(Refused::Unverifiable { cluster: self.cluster.clone(), cause })
    }

    fn plain(&self, method: IdentityMethod, of_cluster: bool, user: UserInfo) -> Subjected {
        let subject = Subject::new(method, None, of_cluster, user, &json!({}));
        // Only a value that is too large has no form; names of pods are not.
        subject.map(Arc::new).map_err(|error| Refused::Unverifiable {
            cluster: self.cluster.clone(),
            cause: error.to_string(),
        })
    }

    fn onward(
        rules: &Rules,
        matching: &Matching<'_>,
        requested: Option<UserInfo>,
        asked: &Asked<'_>,
        identity: &mut Identity,
    ) -> Result<Onward, Refused> {
        let role = matching.find(&rules.roles)?;
        identity.rule = Some(role.name.clone());
        if let Action::Deny(message) = &role.action {
            let message = message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
            return Err(Refused::Denied { user: matching.display_name(), rule: role.name.clone(), message });
        }
        if let Some(requested) = &requested
            && !matching.allows(role, requested)?
        {
            return Err(Refused::Impersonation);
        }
        let onward = match &role.action {
            Action::PassThrough if matching.subject.method == IdentityMethod::ClientCertificate => {
                let problem =
                    "a client certificate cannot be passed through, since the gateway has not its key";
                return Err(Refused::NotPossible { rule: role.name.clone(), problem });
            }
            Action::PassThrough | Action::Deny(_) => Onward::AsPresented,
            Action::Impersonate(mapping) => {
                let mapped = matching.mapped(role, mapping)?;
                match requested {
                    None => Onward::Impersonate { user: mapped, wished_by: None },
                    Some(requested) => {
                        let mut user = matching.checked(role, mapping, requested)?;
                        // Weir's own words are not the client's.
                        user.extra.retain(|key, _| !key.starts_with(OWN_EXTRA_PREFIX));
                        Onward::Impersonate { user, wished_by: Some(mapped) }
                    }
                }
            }
            Action::AssumeRole(aws) => Onward::Role(Box::new(InRole {
                rule: role.name.clone(),
                role: AwsRole::clone(aws),
                by: By::Agent,
                user: matching.subject.user.clone(),
                impersonated: requested,
            })),
            Action::WebIdentity(aws, token) => Onward::Role(Box::new(InRole {
                rule: role.name.clone(),
                role: AwsRole::clone(aws),
                by: Self::web_identity(role, *token, matching.subject, asked)?,
                user: matching.subject.user.clone(),
                impersonated: requested,
            })),
        };
        identity.acts_as = Some(match &onward {
            Onward::AsPresented => ActsAs::PassThrough,
            Onward::Impersonate { user, .. } => ActsAs::Impersonate { user: user.clone() },
            Onward::Role(role) => {
                ActsAs::Role { arn: role.role.arn().to_owned(), by: role.by.name().to_owned() }
            }
        });
        Ok(onward)
    }

    /// By whose word AWS gives a role that trusts tokens.
    fn web_identity(
        role: &Role,
        token: WebToken,
        subject: &Subject,
        asked: &Asked<'_>,
    ) -> Result<By, Refused> {
        match token {
            WebToken::Minted => Ok(By::Minted),
            WebToken::Callers if subject.method == IdentityMethod::Token => {
                let Presented::Token(token) = Presented::read(asked.headers)? else {
                    return Err(Refused::NotPossible {
                        rule: role.name.clone(),
                        problem: "there is no token",
                    });
                };
                let token = Arc::new(Zeroizing::new(token.expose().to_owned()));
                Ok(By::Caller(WebIdentityToken::Presented(token)))
            }
            WebToken::Callers => {
                let problem = "the caller presents no verified token that AWS could be shown";
                Err(Refused::NotPossible { rule: role.name.clone(), problem })
            }
        }
    }

    /// What a request goes on with, as part of `session`.
    ///
    /// # Errors
    /// The agent's own credential, or AWS', cannot be had.
    pub async fn credential(
        &self,
        onward: Onward,
        pod: Option<&Pod>,
        session: &str,
    ) -> Result<Credential, Refused> {
        match (onward, &self.rules) {
            (Onward::AsPresented, _) => Ok(Credential::AsPresented),
            // The rules were taken away since they were asked: what they mapped must not go on as the caller.
            (_, None) => Err(Refused::NoOwnCredential { cluster: self.cluster.clone() }),
            (Onward::Impersonate { mut user, wished_by }, Some(rules)) => {
                if let Some(mapped) = wished_by {
                    self.check_wish(rules, &mapped, &user).await?;
                }
                user.extra.retain(|key, _| !key.starts_with(OWN_EXTRA_PREFIX));
                let mut own = |name: &str, value: String| {
                    user.extra.insert(format!("{OWN_EXTRA_PREFIX}{name}"), vec![value]);
                };
                let [of_session, of_pod, of_pod_uid] = OWN_EXTRAS;
                own(of_session, session.to_owned());
                if let Some(pod) = pod {
                    own(of_pod, format!("{}/{}", pod.namespace, pod.name));
                    own(of_pod_uid, pod.uid.clone());
                }
                let authorization = rules.own.authorization().await.map_err(|error| {
                    tracing::warn!(
                        event = "no-own-credential",
                        cluster = self.cluster,
                        error,
                        "no credential of the agent's own"
                    );
                    Refused::NoOwnCredential { cluster: self.cluster.clone() }
                })?;
                let headers = impersonation::headers(&user)?;
                Ok(Credential::Replaced {
                    own_connection: authorization.is_none(),
                    authorization,
                    headers,
                    assumed: None,
                    of_role: None,
                })
            }
            (Onward::Role(role), Some(rules)) => {
                let request = role.request(pod, session, &rules.own)?;
                Self::in_role(rules, role, request).await
            }
        }
    }

    /// Whether `mapped` may impersonate `user`: the API server would ask this of the agent, which may be anybody.
    async fn check_wish(&self, rules: &Rules, mapped: &UserInfo, user: &UserInfo) -> Result<(), Refused> {
        let rights = impersonation::rights(user)?;
        let name = || mapped.username.clone();
        match rules.own.lacks(mapped, &rights).await {
            Ok(None) => Ok(()),
            Ok(Some(right)) => Err(Refused::MayNotImpersonate { user: name(), right: right.to_string() }),
            Err(error) => {
                tracing::warn!(
                    event = "impersonation-not-asked",
                    cluster = self.cluster,
                    error,
                    "cannot ask whom a mapped user may impersonate; may the agent create subjectaccessreviews?"
                );
                Err(Refused::ImpersonationUnchecked { cluster: self.cluster.clone(), user: name() })
            }
        }
    }

    /// Another credential in place of a role's that the cluster did not take; none where asking AWS again would not help.
    ///
    /// # Errors
    /// AWS does not give it.
    pub async fn renewed(&self, refused: &Credential) -> Result<Option<Credential>, Refused> {
        let (Credential::Replaced { of_role: Some(of), .. }, Some(rules)) = (refused, &self.rules) else {
            return Ok(None);
        };
        if !rules.aws.forget(&of.request, &of.bearer) {
            return Ok(None);
        }
        Self::in_role(rules, of.role.clone(), of.request.clone()).await.map(Some)
    }

    async fn in_role(rules: &Rules, role: Box<InRole>, request: RoleRequest) -> Result<Credential, Refused> {
        let bearer = rules.aws.bearer(&request).await.map_err(|error| role.refused(&error))?;
        let headers = role.impersonated.as_ref().map(impersonation::headers).transpose()?;
        Ok(Credential::Replaced {
            own_connection: false,
            authorization: Some(bearer.header()),
            headers: headers.unwrap_or_default(),
            assumed: bearer.is_first_use().then(|| Box::new(role.assumed(&bearer))),
            of_role: Some(Box::new(OfRole { role, request, bearer })),
        })
    }

    /// What has happened with AWS roles.
    pub fn aws_measures(&self) -> AwsMeasures {
        self.rules.as_ref().map(|rules| rules.aws.measures()).unwrap_or_default()
    }
}
