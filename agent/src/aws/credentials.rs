//! What STS gives for a role: temporary credentials, in memory only, wiped when dropped.

use std::{fmt, time::SystemTime};

use zeroize::Zeroizing;

/// Temporary credentials of an assumed role.
pub(super) struct Credentials {
    /// An identifier, no secret: CloudTrail and the cluster's audit log have it.
    pub(super) access_key_id: String,
    pub(super) secret_access_key: Zeroizing<String>,
    pub(super) session_token: Zeroizing<String>,
    pub(super) expires: SystemTime,
    /// `arn:aws:sts::ACCOUNT:assumed-role/ROLE/SESSION`.
    pub(super) assumed_role_arn: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Credentials")
            .field("access_key_id", &self.access_key_id)
            .field("expires", &self.expires)
            .field("assumed_role_arn", &self.assumed_role_arn)
            .finish_non_exhaustive()
    }
}
