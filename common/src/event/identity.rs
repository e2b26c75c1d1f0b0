//! Who a request is for, and as whom it goes on: what an event says of identities.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Who a request is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// What it was established by.
    pub method: IdentityMethod,
    /// Issuer of the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    /// The user, as the configuration maps it; empty for `unverified`.
    #[serde(default, skip_serializing_if = "UserInfo::is_empty")]
    pub user: UserInfo,
    /// Name of the rule that decided; none where no rules are configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// As whom it goes on; none if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acts_as: Option<ActsAs>,
}

/// What an identity was established by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum IdentityMethod {
    /// A token whose issuer, signature and claims Weir has verified.
    Token,
    /// A client certificate that Weir has verified.
    ClientCertificate,
    /// No credential: the pod that the kernel attests.
    Workload,
    /// A credential that Weir cannot verify: it is the API server's to judge.
    #[default]
    Unverified,
}

/// A user in Kubernetes' sense (authentication.k8s.io `UserInfo`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UserInfo {
    /// Name.
    pub username: String,
    /// UID, if there is one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// Groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// Further attributes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// As whom a request goes on to the API server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ActsAs {
    /// With the caller's own credential.
    PassThrough,
    /// As this user, impersonated by the agent.
    Impersonate {
        /// The user.
        user: UserInfo,
    },
    /// In an AWS IAM role.
    Role {
        /// Its ARN.
        arn: String,
        /// How it is assumed: `assumeRole`, `webIdentity`.
        by: String,
    },
}

/// Credentials of an AWS IAM role, without what is secret of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoleAssumed {
    /// ARN of the role.
    pub role_arn: String,
    /// ARN of the assumed role: with it the session's name.
    pub assumed_role_arn: String,
    /// The access key's id, as CloudTrail has it; no secret.
    pub access_key_id: String,
    /// When the credentials end, in microseconds since the Unix epoch.
    pub expires_unix_us: i64,
}
