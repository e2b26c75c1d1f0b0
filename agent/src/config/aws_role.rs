//! `clusters[].roles[].assumeRole` and `.webIdentity`: AWS IAM roles and how their sessions are made.

use std::{sync::Arc, time::Duration};

use serde::Deserialize;
use zeroize::Zeroizing;

use super::raw::{Invalid, invalid};
use crate::aws::{
    AssumeRole, DURATION_DEFAULT, EksCluster, Role, RoleArn, RoleRequest, SessionName, SourceIdentity, Tag,
    WebIdentity, WebIdentityToken,
};

/// Shortest and longest session of a role, in seconds (AWS STS API, `DurationSeconds`).
#[cfg(test)]
const SESSION_SECONDS: (u64, u64) = (900, 43_200);

/// A role and how its session is made.
#[derive(Clone, Debug)]
pub struct AwsRole {
    role_arn: RoleArn,
    through: Vec<RoleArn>,
    external_id: Option<String>,
    duration: Duration,
    policy: Option<String>,
    policy_arns: Vec<String>,
    cluster: EksCluster,
}

/// Which token a web identity is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum WebToken {
    /// The one that the caller presents.
    Callers,
    /// One that the agent has minted (TokenRequest) for the pod's service account, bound to the pod, with audience
    /// `sts.amazonaws.com`.
    Minted,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawAssumeRole {
    /// ARN of the role.
    role_arn: String,
    /// The EKS cluster that its tokens are for.
    eks_cluster: RawEksCluster,
    /// ARNs of roles that are assumed before it, one from the other. Such sessions last an hour at most.
    #[serde(default)]
    through: Vec<String>,
    /// What the trust policy asks for as `sts:ExternalId`.
    external_id: Option<String>,
    /// Length of the session. Without it: an hour.
    #[cfg_attr(test, schemars(range(min = SESSION_SECONDS.0, max = SESSION_SECONDS.1)))]
    duration_seconds: Option<u64>,
    /// Policy (JSON) that narrows the role for the session.
    session_policy: Option<String>,
    /// ARNs of managed policies that narrow it.
    #[serde(default)]
    session_policy_arns: Vec<String>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawWebIdentity {
    /// Which token AWS is shown.
    token: WebToken,
    /// ARN of the role.
    role_arn: String,
    /// The EKS cluster that its tokens are for.
    eks_cluster: RawEksCluster,
    /// Length of the session. Without it: an hour.
    #[cfg_attr(test, schemars(range(min = SESSION_SECONDS.0, max = SESSION_SECONDS.1)))]
    duration_seconds: Option<u64>,
    /// Policy (JSON) that narrows the role for the session.
    session_policy: Option<String>,
    /// ARNs of managed policies that narrow it.
    #[serde(default)]
    session_policy_arns: Vec<String>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawEksCluster {
    /// Its name in EKS.
    name: String,
    /// Its region, whose STS is asked.
    region: String,
}

impl RawAssumeRole {
    pub(super) fn validate(self, key: &str) -> Result<AwsRole, Invalid> {
        let arn = |name: String, text: &str| {
            RoleArn::parse(text).or_else(|error| invalid(format!("{key}.{name}"), error.to_string()))
        };
        let through = self.through.iter().enumerate();
        let role = AwsRole {
            role_arn: arn("roleArn".to_owned(), &self.role_arn)?,
            through: through
                .map(|(index, text)| arn(format!("through[{index}]"), text))
                .collect::<Result<_, _>>()?,
            external_id: self.external_id,
            duration: self.duration_seconds.map_or(DURATION_DEFAULT, Duration::from_secs),
            policy: self.session_policy,
            policy_arns: self.session_policy_arns,
            cluster: self.eks_cluster.validate(key)?,
        };
        // What STS would refuse of it is refused here.
        let request = role.assume(SessionName::fit("check"), None, Vec::new());
        request.map(|_| role).or_else(|error| invalid(key, error.to_string()))
    }
}

impl RawWebIdentity {
    pub(super) fn validate(self, key: &str) -> Result<(AwsRole, WebToken), Invalid> {
        let role_arn = RoleArn::parse(&self.role_arn)
            .or_else(|error| invalid(format!("{key}.roleArn"), error.to_string()))?;
        let role = AwsRole {
            role_arn,
            through: Vec::new(),
            external_id: None,
            duration: self.duration_seconds.map_or(DURATION_DEFAULT, Duration::from_secs),
            policy: self.session_policy,
            policy_arns: self.session_policy_arns,
            cluster: self.eks_cluster.validate(key)?,
        };
        let token = WebIdentityToken::Presented(Arc::new(Zeroizing::new(String::new())));
        let request = role.with_token(SessionName::fit("check"), token);
        request.map(|_| (role, self.token)).or_else(|error| invalid(key, error.to_string()))
    }
}

impl RawEksCluster {
    fn validate(self, key: &str) -> Result<EksCluster, Invalid> {
        let cluster = EksCluster::new(&self.name, &self.region);
        cluster.or_else(|error| invalid(format!("{key}.eksCluster"), error.to_string()))
    }
}

impl AwsRole {
    /// ARN of the role.
    pub fn arn(&self) -> &str {
        self.role_arn.as_str()
    }

    /// Assumes it by the agent's own AWS identity.
    ///
    /// # Errors
    /// What STS does not take.
    pub fn assume(
        &self,
        session_name: SessionName,
        source_identity: Option<SourceIdentity>,
        tags: Vec<Tag>,
    ) -> Result<RoleRequest, crate::aws::RequestError> {
        let role = AssumeRole {
            role_arn: self.role_arn.clone(),
            session_name,
            source_identity,
            tags,
            external_id: self.external_id.clone(),
            duration: self.duration,
            policy: self.policy.clone(),
            policy_arns: self.policy_arns.clone(),
            chain: self.through.clone(),
        };
        RoleRequest::new(Role::Assume(role), self.cluster.clone())
    }

    /// Assumes it by a token.
    ///
    /// # Errors
    /// What STS does not take.
    pub fn with_token(
        &self,
        session_name: SessionName,
        token: WebIdentityToken,
    ) -> Result<RoleRequest, crate::aws::RequestError> {
        let role = WebIdentity {
            role_arn: self.role_arn.clone(),
            session_name,
            token,
            duration: self.duration,
            policy: self.policy.clone(),
            policy_arns: self.policy_arns.clone(),
        };
        RoleRequest::new(Role::WebIdentity(role), self.cluster.clone())
    }
}
