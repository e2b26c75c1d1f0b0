//! From a rule's AWS role to what STS is asked for: a session's name, source identity and tags, by which CloudTrail and
//! the cluster's audit log lead back to Weir's session and to the pod.

use std::{sync::Arc, time::UNIX_EPOCH};

use futures::{FutureExt as _, future::BoxFuture};
use weir_common::event::{Pod, RoleAssumed, UserInfo};
use zeroize::Zeroizing;

use super::{OwnCredential, Refused};
use crate::{
    aws::{
        Bearer, RequestError, RoleRequest, SessionName, SourceIdentity, StsError, Tag, TokenSource,
        WebIdentityToken,
    },
    config::aws_role::AwsRole,
};

/// What a minted token is for.
const AUDIENCE: &str = "sts.amazonaws.com";

/// By whose word AWS gives the role.
#[derive(Clone, Debug)]
pub(super) enum By {
    /// The agent's own AWS identity.
    Agent,
    /// The caller's token.
    Caller(WebIdentityToken),
    /// A token that is minted for the pod.
    Minted,
}

impl By {
    /// As it is recorded.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Agent => "assumeRole",
            Self::Caller(_) | Self::Minted => "webIdentity",
        }
    }
}

/// A role that a request goes on in.
#[derive(Clone, Debug)]
pub struct InRole {
    /// Name of the rule.
    pub(super) rule: String,
    /// The role.
    pub(super) role: AwsRole,
    /// How it is assumed.
    pub(super) by: By,
    /// Who asks.
    pub(super) user: UserInfo,
    /// Whom the client asks to be, where a rule allows it: the role's own rights decide.
    pub(super) impersonated: Option<UserInfo>,
}

/// Mints tokens for one pod.
struct Minted {
    own: Arc<dyn OwnCredential>,
    pod: Pod,
    subject: String,
}

impl TokenSource for Minted {
    fn subject(&self) -> &str {
        &self.subject
    }

    fn token(&self) -> BoxFuture<'_, Result<Zeroizing<String>, String>> {
        async move {
            self.own.mint(&self.pod, AUDIENCE).await.map_err(|error| {
                tracing::warn!(
                    event = "token-not-minted",
                    subject = self.subject,
                    error,
                    "no token could be minted"
                );
                "the cluster mints no token for the pod's service account".to_owned()
            })
        }
        .boxed()
    }
}

impl InRole {
    /// What STS is asked for.
    pub(super) fn request(
        &self,
        pod: Option<&Pod>,
        session: &str,
        own: &Arc<dyn OwnCredential>,
    ) -> Result<RoleRequest, Refused> {
        let name = SessionName::fit(&format!("weir-{session}"));
        let requested = match &self.by {
            By::Agent => {
                let tags = tags(pod, session).map_err(|error| self.impossible(&error))?;
                self.role.assume(name, Some(SourceIdentity::fit(&self.user.username)), tags)
            }
            By::Caller(token) => self.role.with_token(name, token.clone()),
            By::Minted => {
                let pod = pod.ok_or_else(|| Refused::NotPossible {
                    rule: self.rule.clone(),
                    problem: "there is no pod to mint a token for",
                })?;
                let subject = format!("{}/{}/{}", pod.namespace, pod.service_account, pod.uid);
                let source = Minted { own: Arc::clone(own), pod: pod.clone(), subject };
                self.role.with_token(name, WebIdentityToken::Minted(Arc::new(source)))
            }
        };
        requested.map_err(|error| self.impossible(&error))
    }

    fn impossible(&self, error: &RequestError) -> Refused {
        Refused::RoleDenied { role: self.role.arn().to_owned(), cause: error.to_string() }
    }

    /// What the caller is told of an error of STS.
    pub(super) fn refused(&self, error: &StsError) -> Refused {
        let role = self.role.arn().to_owned();
        tracing::warn!(event = "no-role-credentials", role, error = %error, detail = error.detail(), "no credentials of a role");
        match error.retry_after() {
            Some(retry_after) => Refused::RoleUnavailable { role, cause: error.to_string(), retry_after },
            None => Refused::RoleDenied { role, cause: error.to_string() },
        }
    }

    /// What is recorded of credentials.
    pub(super) fn assumed(&self, bearer: &Bearer) -> RoleAssumed {
        let end = bearer.end().duration_since(UNIX_EPOCH).unwrap_or_default();
        RoleAssumed {
            role_arn: self.role.arn().to_owned(),
            assumed_role_arn: bearer.assumed_role_arn().to_owned(),
            access_key_id: bearer.access_key_id().to_owned(),
            expires_unix_us: i64::try_from(end.as_micros()).unwrap_or(i64::MAX),
        }
    }
}

/// Session tags: where the request comes from.
fn tags(pod: Option<&Pod>, session: &str) -> Result<Vec<Tag>, RequestError> {
    let mut tags = vec![Tag::new("weir-session", session)?];
    if let Some(pod) = pod {
        tags.push(Tag::new("weir-namespace", &pod.namespace)?);
        tags.push(Tag::new("weir-pod", &pod.name)?);
        tags.push(Tag::new("weir-pod-uid", &pod.uid)?);
        tags.push(Tag::new("weir-service-account", &pod.service_account)?);
    }
    Ok(tags)
}
