//! Why a request is not let through on account of who it is for. The words go to the client (kubectl prints them) and
//! into the record: they say what failed and what to do, and hold nothing secret.

use std::time::Duration;

use weir_common::event::Pod;

use super::TokenError;

/// Seconds after which a client should try again, where nothing says when.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Which kind of answer a refusal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request itself makes no sense: 400.
    Malformed,
    /// It is not known who asks: 401.
    Unauthenticated,
    /// It is known, and not allowed: 403.
    Forbidden,
    /// It cannot be found out just now: 503, to be tried again after this.
    Unavailable(Duration),
}

/// Why.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refused {
    /// Credentials or impersonation that cannot be read in one way only.
    #[error("the request {problem}; send one credential, in one place")]
    Malformed {
        /// What is wrong.
        problem: &'static str,
    },
    /// No credential.
    #[error(
        "the request has no credential, and no rule of the recording gateway weir lets this pod act on cluster \
         {cluster:?} without one; mount a service account token, or ask for a rule that takes `workload`"
    )]
    NoCredential {
        /// The cluster.
        cluster: String,
    },
    /// A token of a configured issuer that does not hold.
    #[error("the token is refused by the recording gateway weir: {0}")]
    Token(TokenError),
    /// A service account's token that belongs to another pod, or to none.
    #[error(
        "the token is refused by the recording gateway weir: it was issued to {issued_to}, and it arrived from pod \
         {arrived_from}; use the token that is mounted into this pod"
    )]
    FromOtherPod {
        /// Whom it names.
        issued_to: String,
        /// Where it came from.
        arrived_from: String,
    },
    /// A credential that Weir cannot verify.
    #[error(
        "the credential cannot be verified by the recording gateway weir ({cause}), and no rule for cluster \
         {cluster:?} passes such credentials through; use a token of a configured issuer"
    )]
    Unverifiable {
        /// The cluster.
        cluster: String,
        /// Why not.
        cause: String,
    },
    /// No rule is for this caller.
    #[error(
        "no rule of the recording gateway weir is for {user:?} on cluster {cluster:?}; ask its operators for one \
         (`weir-agent explain` shows what they would match)"
    )]
    NoRule {
        /// The user, or the pod.
        user: String,
        /// The cluster.
        cluster: String,
    },
    /// A rule that denies.
    #[error("{user:?} is denied by rule {rule:?} of the recording gateway weir{message}")]
    Denied {
        /// The user, or the pod.
        user: String,
        /// The rule.
        rule: String,
        /// What the rule says, behind a colon; or nothing.
        message: String,
    },
    /// A rule that cannot be evaluated, which refuses: passing over it could pass over a denial.
    #[error(
        "rule {rule:?} of the recording gateway weir cannot be evaluated for {user:?}: {cause}; tell its operators"
    )]
    RuleFailed {
        /// The rule.
        rule: String,
        /// The user, or the pod.
        user: String,
        /// Why.
        cause: String,
    },
    /// `Impersonate-*` headers that no rule allows.
    #[error(
        "impersonation is refused by the recording gateway weir: no rule allows it for this caller; remove \
         --as, --as-group and --as-uid"
    )]
    Impersonation,
    /// `Impersonate-*` headers that a rule allows, and the cluster's RBAC does not.
    #[error(
        "impersonation is refused by the recording gateway weir: {user:?}, as whom this request would go on, has no right \
         to impersonate {right}; remove --as, or ask for the verb impersonate on it"
    )]
    MayNotImpersonate {
        /// The mapped user.
        user: String,
        /// What it lacks.
        right: String,
    },
    /// Whether the mapped user may impersonate.
    #[error(
        "the recording gateway weir cannot ask cluster {cluster:?} just now whom {user:?} may impersonate; try again, and \
         if it stays so tell its operators"
    )]
    ImpersonationUnchecked {
        /// The cluster.
        cluster: String,
        /// The mapped user.
        user: String,
    },
    /// A user that no header can name.
    #[error(
        "the mapped identity has a {what} that cannot be sent to the API server; tell the operators of weir"
    )]
    NotImpersonable {
        /// What.
        what: &'static str,
    },
    /// A mapping to one of Kubernetes' own users or groups by somebody who is not the cluster itself.
    #[error(
        "rule {rule:?} of the recording gateway weir maps {user:?} to {name:?}, which is Kubernetes' own; the rule \
         must say `systemIdentities: true` for that"
    )]
    SystemIdentity {
        /// The rule.
        rule: String,
        /// The user.
        user: String,
        /// The name.
        name: String,
    },
    /// A rule whose way up cannot carry this caller's credential.
    #[error("rule {rule:?} of the recording gateway weir cannot be followed: {problem}; tell its operators")]
    NotPossible {
        /// The rule.
        rule: String,
        /// Why not.
        problem: &'static str,
    },
    /// The agent's own credential for the cluster.
    #[error(
        "the recording gateway weir has no credential of its own for cluster {cluster:?} just now; try again"
    )]
    NoOwnCredential {
        /// The cluster.
        cluster: String,
    },
    /// AWS refuses the role.
    #[error("AWS refuses role {role}: {cause}")]
    RoleDenied {
        /// Its ARN.
        role: String,
        /// In AWS' words.
        cause: String,
    },
    /// AWS cannot be asked.
    #[error("role {role} cannot be assumed just now: {cause}; try again")]
    RoleUnavailable {
        /// Its ARN.
        role: String,
        /// Why.
        cause: String,
        /// When to try again.
        retry_after: Duration,
    },
}

impl Refused {
    /// What the client gets.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Malformed { .. } => Kind::Malformed,
            Self::NoCredential { .. } | Self::FromOtherPod { .. } | Self::Unverifiable { .. } => {
                Kind::Unauthenticated
            }
            Self::Token(error) => error.retry_after().map_or(Kind::Unauthenticated, Kind::Unavailable),
            Self::NoRule { .. }
            | Self::Denied { .. }
            | Self::RuleFailed { .. }
            | Self::Impersonation
            | Self::MayNotImpersonate { .. }
            | Self::NotImpersonable { .. }
            | Self::SystemIdentity { .. }
            | Self::NotPossible { .. }
            | Self::RoleDenied { .. } => Kind::Forbidden,
            Self::NoOwnCredential { .. } | Self::ImpersonationUnchecked { .. } => {
                Kind::Unavailable(RETRY_AFTER)
            }
            Self::RoleUnavailable { retry_after, .. } => Kind::Unavailable(*retry_after),
        }
    }

    /// The name of the finding that goes with it, where an operator should know of it.
    pub fn finding(&self) -> Option<&'static str> {
        matches!(self, Self::FromOtherPod { .. }).then_some("tokenFromOtherPod")
    }
}

/// A pod as it stands in messages.
pub(super) fn pod_name(pod: Option<&Pod>) -> String {
    pod.map_or_else(|| "none".to_owned(), |pod| format!("{}/{} (uid {})", pod.namespace, pod.name, pod.uid))
}
