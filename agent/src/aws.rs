//! AWS: a caller's role, assumed at STS, and its token for an EKS cluster.
//!
//! Who gets which role is decided elsewhere and comes in as a [`RoleRequest`]; what comes out is a [`Bearer`] for the
//! upstream request and what the record says of it. The brokers of Amazon MSK take an [`MskToken`] of the agent's own. Credentials never leave this module, are wiped when dropped, and show
//! themselves in no log, error or record.

mod cache;
#[cfg(test)]
mod cache_tests;
mod credentials;
mod eks_token;
mod error;
mod identifier;
mod measures;
mod msk_token;
mod presigned;
mod request;
#[cfg(test)]
pub(crate) mod stand_in;
mod sts;
#[cfg(test)]
mod sts_tests;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::HeaderValue;
use tracing::{Level, Metadata};

pub use error::StsError;
pub use identifier::{RoleArn, SessionName, SourceIdentity, Tag};
pub use measures::AwsMeasures;
pub use msk_token::{MskToken, msk_token};
pub use request::{
    AssumeRole, CHAINED_DURATION_MAX, EksCluster, RequestError, Role, RoleRequest, TokenSource, WebIdentity,
    WebIdentityToken, is_region,
};

use cache::Cache;
use credentials::Credentials;
use sts::Sts;

/// How long a role's credentials hold where nobody says otherwise: also possible for chained roles, and with an agent whose
/// own credentials are a role's.
pub const DURATION_DEFAULT: Duration = CHAINED_DURATION_MAX;

/// Crates of the AWS SDK, by the beginning of their log targets.
const SDK_TARGETS: &str = "aws_";

/// Roles and tokens of this agent's callers; a clone shares them.
#[derive(Clone)]
pub struct Aws {
    cache: Cache,
}

impl Aws {
    /// Asks nobody yet.
    #[must_use]
    pub fn new() -> Self {
        Self { cache: Cache::new(Sts::new(), Box::new(SystemTime::now)) }
    }

    /// A token that is good for a request made now: from the cache, or from STS by one call for all who ask at a time.
    ///
    /// # Errors
    /// STS gives no credentials for the role, or did not just before.
    pub async fn bearer(&self, request: &RoleRequest) -> Result<Bearer, StsError> {
        self.cache.bearer(request).await
    }

    /// Whether another token can be had in place of one that the cluster did not take: what is kept for the request is
    /// forgotten, and the next one asks STS. Not if it is new: then asking again would not help.
    #[must_use]
    pub fn forget(&self, request: &RoleRequest, refused: &Bearer) -> bool {
        self.cache.forget(request, refused)
    }

    /// What has happened so far.
    #[must_use]
    pub fn measures(&self) -> AwsMeasures {
        self.cache.counters().read(self.cache.len())
    }
}

impl Default for Aws {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Aws {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Aws").finish_non_exhaustive()
    }
}

/// Whether an event may be logged: below INFO the SDK shows what it sends and gets, and with LOG_SIGNABLE_BODY or
/// LOG_SENSITIVE_BODIES in the environment the tokens and keys in it.
#[must_use]
pub fn may_log(metadata: &Metadata<'_>) -> bool {
    !metadata.target().starts_with(SDK_TARGETS) || *metadata.level() <= Level::INFO
}

/// A token for a cluster, and what the record says of it; a clone is cheap and shares the token.
#[derive(Clone)]
pub struct Bearer(Arc<Parts>);

struct Parts {
    header: HeaderValue,
    access_key_id: String,
    assumed_role_arn: String,
    session_name: SessionName,
    end: SystemTime,
    used: AtomicBool,
}

impl Bearer {
    fn new(header: HeaderValue, credentials: &Credentials, role: &Role, end: SystemTime) -> Self {
        Self(Arc::new(Parts {
            header,
            access_key_id: credentials.access_key_id.clone(),
            assumed_role_arn: credentials.assumed_role_arn.clone(),
            session_name: role.session_name().clone(),
            end,
            used: AtomicBool::new(false),
        }))
    }

    /// The value of `Authorization`, marked sensitive.
    #[must_use]
    pub fn header(&self) -> HeaderValue {
        self.0.header.clone()
    }

    /// An identifier, no secret: CloudTrail and `user.extra` in the cluster's audit log have it.
    #[must_use]
    pub fn access_key_id(&self) -> &str {
        &self.0.access_key_id
    }

    /// `arn:aws:sts::ACCOUNT:assumed-role/ROLE/SESSION`.
    #[must_use]
    pub fn assumed_role_arn(&self) -> &str {
        &self.0.assumed_role_arn
    }

    /// The role session's name.
    #[must_use]
    pub fn session_name(&self) -> &SessionName {
        &self.0.session_name
    }

    /// Whether this is the first time that it is asked, for what is recorded once.
    #[must_use]
    pub fn is_first_use(&self) -> bool {
        !self.0.used.swap(true, Ordering::Relaxed)
    }

    /// Whether it is the very same token as `other`.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// From then on it must not be used.
    #[must_use]
    pub fn end(&self) -> SystemTime {
        self.0.end
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Bearer")
            .field("access_key_id", &self.0.access_key_id)
            .field("assumed_role_arn", &self.0.assumed_role_arn)
            .field("end", &self.0.end)
            .finish_non_exhaustive()
    }
}
