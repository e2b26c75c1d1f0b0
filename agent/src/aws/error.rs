//! What went wrong on the way to a role's token, by what a caller or an operator can do about it.
//!
//! Pure: STS's error codes come in as text. No variant holds a credential; messages of STS are cut, and dropped where they may
//! repeat a token.

use std::{sync::Arc, time::Duration};

use weir_common::kms::endpoint::PlainEndpoint;

use super::identifier::RoleArn;

/// Most bytes of a message of STS that are kept.
const MESSAGE_BYTES_MAX: usize = 512;

/// When to try again, where STS does not say.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// The same after STS refused for too many calls.
const RETRY_AFTER_THROTTLED: Duration = Duration::from_secs(5);
/// The longest that is made of what STS says.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

/// Why there is no token.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StsError {
    /// AWS says no.
    #[error(
        "AWS STS does not give the role {role}: {message}; the role's trust policy must allow the agent's own role the \
         actions sts:AssumeRole, sts:TagSession and sts:SetSourceIdentity (with the external ID, if it asks for one), and \
         so must the agent's own policy"
    )]
    Denied {
        /// The role.
        role: RoleArn,
        /// STS's words.
        message: Arc<str>,
    },
    /// AWS does not take the token for this role.
    #[error(
        "AWS STS does not give the role {role} for this token: {message}; IAM must have an OIDC provider for the token's \
         issuer, and the role's trust policy must allow it sts:AssumeRoleWithWebIdentity for the token's audience and subject"
    )]
    WebIdentityDenied {
        /// The role.
        role: RoleArn,
        /// STS's words.
        message: Arc<str>,
    },
    /// The caller's or the minted token has expired.
    #[error("AWS STS says that the token for the role {role} has expired; present a new one")]
    WebIdentityExpired {
        /// The role.
        role: RoleArn,
    },
    /// There is no token to present to STS.
    #[error("there is no token for the role {role}: {cause}")]
    NoWebIdentity {
        /// The role.
        role: RoleArn,
        /// Why.
        cause: Arc<str>,
    },
    /// AWS does not take the request as it is.
    #[error("AWS STS refuses the request for the role {role} ({code}): {message}")]
    Refused {
        /// The role.
        role: RoleArn,
        /// STS's error code.
        code: Arc<str>,
        /// STS's words.
        message: Arc<str>,
    },
    /// Too many calls.
    #[error("AWS STS is asked too often; try again in {} s", retry_after.as_secs())]
    Throttled {
        /// When to try again.
        retry_after: Duration,
    },
    /// No answer, or an error of STS itself.
    #[error(
        "AWS STS in {region} cannot be reached; does the node have a way to sts.{region}.amazonaws.com (NAT or a VPC endpoint)?"
    )]
    Unreachable {
        /// The region.
        region: Arc<str>,
        /// Details, for the log.
        cause: Arc<str>,
    },
    /// This node's clock and AWS's do not agree.
    #[error(
        "AWS STS says that this node's clock is wrong: {message}; is time synchronisation (chrony) running?"
    )]
    ClockSkew {
        /// STS's words.
        message: Arc<str>,
    },
    /// The agent has no AWS credentials, or AWS does not take them.
    #[error(
        "the agent has no valid AWS credentials of its own; does its service account have a role (IRSA or Pod Identity), or the \
         node an instance profile that it can reach?"
    )]
    NoCredentials {
        /// Details, for the log.
        cause: Arc<str>,
    },
    /// Longer than EKS takes.
    #[error(
        "the token for the cluster has {bytes} bytes, and EKS takes {bytes_max}; use fewer or shorter session tags, or a \
         shorter session policy"
    )]
    TokenTooLong {
        /// Its length.
        bytes: usize,
        /// The longest.
        bytes_max: usize,
    },
    /// The credentials are none that can sign. Not expected.
    #[error("the token for the cluster cannot be signed: {cause}")]
    Signing {
        /// Why.
        cause: Arc<str>,
    },
    /// Tokens and keys would cross the network in clear.
    #[error(transparent)]
    Plain(#[from] PlainEndpoint),
    /// All entries of the cache are in use.
    #[error("too many AWS roles are being assumed at once; try again")]
    Busy,
    /// The task that asked STS ended without an answer. Not expected.
    #[error("the request to AWS STS ended without an answer; try again")]
    Abandoned,
}

/// Which call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    AssumeRole,
    WebIdentity,
}

/// An error as STS answers it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer<'a> {
    pub(super) status: u16,
    pub(super) code: &'a str,
    pub(super) message: &'a str,
    pub(super) retry_after: Option<Duration>,
}

impl StsError {
    /// Reads STS's answer to a request for `role` in `region`.
    pub(super) fn of(answer: Answer<'_>, call: Call, role: &RoleArn, region: &str) -> Self {
        let role = role.clone();
        let message = || shortened(answer.message);
        let of_web_identity = call == Call::WebIdentity;
        match answer.code {
            "Throttling"
            | "ThrottlingException"
            | "ThrottledException"
            | "RequestThrottled"
            | "RequestThrottledException"
            | "RequestLimitExceeded"
            | "TooManyRequestsException"
            | "SlowDown" => Self::throttled(answer.retry_after),
            _ if answer.status == 429 => Self::throttled(answer.retry_after),
            // The issuer did not answer AWS in time: STS itself asks for another try.
            "IDPCommunicationError" => Self::Unreachable { region: region.into(), cause: described(answer) },
            _ if answer.status >= 500 => {
                Self::Unreachable { region: region.into(), cause: described(answer) }
            }
            "AccessDenied" | "AccessDeniedException" if of_web_identity => {
                Self::WebIdentityDenied { role, message: message() }
            }
            "AccessDenied" | "AccessDeniedException" => Self::Denied { role, message: message() },
            "ExpiredTokenException" | "ExpiredToken" if of_web_identity => Self::WebIdentityExpired { role },
            "InvalidIdentityToken"
            | "InvalidIdentityTokenException"
            | "IDPRejectedClaim"
            | "IDPRejectedClaimException" => Self::WebIdentityDenied { role, message: message() },
            "RequestExpired" | "RequestTimeTooSkewed" => Self::ClockSkew { message: message() },
            // "Signature expired: … is now earlier than …" and "Signature not yet current: … is still later than …".
            "SignatureDoesNotMatch" | "InvalidSignatureException"
                if ["Signature expired", "Signature not yet current"]
                    .iter()
                    .any(|start| answer.message.starts_with(start)) =>
            {
                Self::ClockSkew { message: message() }
            }
            "SignatureDoesNotMatch"
            | "InvalidSignatureException"
            | "InvalidClientTokenId"
            | "UnrecognizedClientException"
            | "ExpiredToken"
            | "ExpiredTokenException"
            | "IncompleteSignature"
            | "MissingAuthenticationToken" => Self::NoCredentials { cause: described(answer) },
            // These quote the value that they refuse, which may be the token.
            "ValidationError" | "ValidationException" if of_web_identity => Self::Refused {
                role,
                code: shortened(answer.code),
                message: "STS does not take a value of it".into(),
            },
            _ => Self::Refused { role, code: shortened(answer.code), message: message() },
        }
    }

    fn throttled(retry_after: Option<Duration>) -> Self {
        let retry_after = retry_after.unwrap_or(RETRY_AFTER_THROTTLED).min(RETRY_AFTER_MAX);
        Self::Throttled { retry_after: retry_after.max(Duration::from_secs(1)) }
    }

    /// When trying again may help; `None` where somebody has to mend something first.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Throttled { retry_after } => Some(*retry_after),
            Self::Unreachable { .. } | Self::Busy | Self::Abandoned => Some(RETRY_AFTER),
            _ => None,
        }
    }

    /// What only the log may have: it may name addresses and files of the node.
    #[must_use]
    pub fn detail(&self) -> Option<&str> {
        match self {
            Self::Unreachable { cause, .. } | Self::NoCredentials { cause } => Some(cause),
            _ => None,
        }
    }

    /// All of [`Self::kind`].
    pub const KINDS: [&str; 14] = [
        "denied",
        "web_identity_denied",
        "web_identity_expired",
        "no_web_identity",
        "refused",
        "throttled",
        "unreachable",
        "clock_skew",
        "no_credentials",
        "token_too_long",
        "signing",
        "plain_endpoint",
        "busy",
        "abandoned",
    ];

    /// A word for metrics and records.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Denied { .. } => "denied",
            Self::WebIdentityDenied { .. } => "web_identity_denied",
            Self::WebIdentityExpired { .. } => "web_identity_expired",
            Self::NoWebIdentity { .. } => "no_web_identity",
            Self::Refused { .. } => "refused",
            Self::Throttled { .. } => "throttled",
            Self::Unreachable { .. } => "unreachable",
            Self::ClockSkew { .. } => "clock_skew",
            Self::NoCredentials { .. } => "no_credentials",
            Self::TokenTooLong { .. } => "token_too_long",
            Self::Signing { .. } => "signing",
            Self::Plain(_) => "plain_endpoint",
            Self::Busy => "busy",
            Self::Abandoned => "abandoned",
        }
    }
}

fn described(answer: Answer<'_>) -> Arc<str> {
    shortened(&format!("HTTP {}, {}: {}", answer.status, answer.code, answer.message))
}

/// The beginning of a text, on one line.
pub(super) fn shortened(text: &str) -> Arc<str> {
    let end = text.floor_char_boundary(MESSAGE_BYTES_MAX);
    text[..end].chars().map(|char| if char.is_control() { ' ' } else { char }).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role() -> RoleArn {
        RoleArn::parse("arn:aws:iam::123456789012:role/deploy").unwrap()
    }

    #[track_caller]
    fn check(status: u16, code: &str, message: &str, assumed: &str, with_token: &str) {
        assert!(StsError::KINDS.contains(&assumed) && StsError::KINDS.contains(&with_token), "{code}");
        let answer = Answer { status, code, message, retry_after: None };
        assert_eq!(StsError::of(answer, Call::AssumeRole, &role(), "eu-central-1").kind(), assumed, "{code}");
        assert_eq!(
            StsError::of(answer, Call::WebIdentity, &role(), "eu-central-1").kind(),
            with_token,
            "{code}"
        );
    }

    #[test]
    fn answers_are_told_apart_by_what_can_be_done() {
        check(403, "AccessDenied", "User: … is not authorized", "denied", "web_identity_denied");
        check(400, "ExpiredTokenException", "Token expired", "no_credentials", "web_identity_expired");
        check(
            403,
            "ExpiredToken",
            "The security token … is expired",
            "no_credentials",
            "web_identity_expired",
        );
        check(
            400,
            "InvalidIdentityToken",
            "Incorrect token audience",
            "web_identity_denied",
            "web_identity_denied",
        );
        check(400, "Throttling", "Rate exceeded", "throttled", "throttled");
        check(429, "", "", "throttled", "throttled");
        check(503, "ServiceUnavailable", "", "unreachable", "unreachable");
        check(400, "IDPCommunicationError", "", "unreachable", "unreachable");
        check(
            403,
            "InvalidClientTokenId",
            "The security token … is invalid",
            "no_credentials",
            "no_credentials",
        );
        check(400, "PackedPolicyTooLarge", "", "refused", "refused");
        check(400, "SomethingNew", "", "refused", "refused");
    }

    #[test]
    fn a_wrong_clock_is_told_from_a_wrong_key() {
        let early = "Signature not yet current: 20260101T001000Z is still later than 20260101T000500Z (…)";
        let late = "Signature expired: 20260101T000000Z is now earlier than 20260101T000500Z (…)";
        for message in [early, late] {
            check(403, "SignatureDoesNotMatch", message, "clock_skew", "clock_skew");
        }
        let wrong = "The request signature we calculated does not match the signature you provided.";
        check(403, "SignatureDoesNotMatch", wrong, "no_credentials", "no_credentials");
    }

    #[test]
    fn a_denial_says_what_the_trust_policy_needs() {
        let message = "User: arn:aws:sts::1:assumed-role/weir/i is not authorized to perform: sts:TagSession";
        let answer = Answer { status: 403, code: "AccessDenied", message, retry_after: None };
        let text = StsError::of(answer, Call::AssumeRole, &role(), "eu-central-1").to_string();
        for part in ["role/deploy", message, "sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_refusal_that_may_quote_the_token_is_not_repeated() {
        let message = "1 validation error detected: Value 'eyJhbGciOi' at 'webIdentityToken' failed to satisfy constraint";
        let answer = Answer { status: 400, code: "ValidationError", message, retry_after: None };
        let error = StsError::of(answer, Call::WebIdentity, &role(), "eu-central-1");
        assert!(!format!("{error} {error:?}").contains("eyJ"));
    }

    #[test]
    fn what_sts_says_of_trying_again_is_bounded() {
        for (said, kept) in [(None, 5), (Some(0), 1), (Some(7), 7), (Some(9000), 30)] {
            let retry_after = said.map(Duration::from_secs);
            let answer = Answer { status: 400, code: "Throttling", message: "", retry_after };
            let error = StsError::of(answer, Call::AssumeRole, &role(), "eu-central-1");
            assert_eq!(error.retry_after(), Some(Duration::from_secs(kept)));
        }
    }

    #[test]
    fn messages_are_cut_and_kept_on_one_line() {
        let text = shortened(&"ä\n".repeat(400));
        assert!(text.len() <= MESSAGE_BYTES_MAX && !text.contains('\n'));
    }
}
