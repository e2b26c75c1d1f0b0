//! Why a bearer token is not believed: what its bearer is told, and with which HTTP status. Never the token.

use std::time::Duration;

use http::StatusCode;
use jiff::Timestamp;

use super::token::TOKEN_BYTES_MAX;

/// Longest part of a token's content that a message repeats, in characters.
const REPEATED_CHARS_MAX: usize = 128;
/// When to try again where an issuer cannot be asked.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Most entries of a list that a message repeats.
const REPEATED_MAX: usize = 8;

/// Why a token is not believed. Texts are for who presented it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Longer than [`TOKEN_BYTES_MAX`].
    #[error("the bearer token has {bytes} bytes; at most {TOKEN_BYTES_MAX} are read")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// No JSON Web Token at all: a static token, for example.
    #[error(
        "the bearer token is no JSON Web Token, so no issuer can be asked for it; log in again for one that is"
    )]
    NotJwt,
    /// It has three parts, but one of them cannot be read.
    #[error("the bearer token's {part} {problem}; log in again")]
    Malformed {
        /// Which part.
        part: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
    /// Not signed, or in a way that is not accepted.
    #[error("the bearer token is signed with algorithm {found:?}; accepted are {}", super::token::Algorithm::NAMES.join(", "))]
    Algorithm {
        /// What its header says.
        found: String,
    },
    /// Of an issuer that is not configured.
    #[error("the bearer token's issuer {issuer:?} is not configured for this cluster")]
    UnknownIssuer {
        /// What it says.
        issuer: String,
    },
    /// Signed with a key that its issuer does not publish.
    #[error(
        "the bearer token is signed with a key that its issuer {issuer:?} does not publish; log in again"
    )]
    UnknownKey {
        /// The issuer.
        issuer: String,
    },
    /// Signed with a key that its issuer did not publish when it was asked last, which is too short ago to ask again.
    #[error(
        "the bearer token is signed with a key that its issuer {issuer:?} did not publish a moment ago; try again in {} s",
        retry_after.as_secs()
    )]
    KeyNotKnownYet {
        /// The issuer.
        issuer: String,
        /// When it may be asked again.
        retry_after: Duration,
    },
    /// The signature is not of the issuer's key.
    #[error("the bearer token's signature is not one of its issuer {issuer:?}")]
    Signature {
        /// The issuer.
        issuer: String,
    },
    /// After its time.
    #[error("the bearer token expired at {}; log in again", time(*at))]
    Expired {
        /// `exp`, in seconds since 1970.
        at: i64,
    },
    /// Before its time.
    #[error("the bearer token is valid only from {}; is a clock wrong?", time(*at))]
    NotYetValid {
        /// `nbf` or `iat`, in seconds since 1970.
        at: i64,
    },
    /// For somebody else.
    #[error("the bearer token's audience is {}; expected is {}", list(found), list(expected))]
    Audience {
        /// What it says.
        found: Vec<String>,
        /// What is accepted.
        expected: Vec<String>,
    },
    /// The issuer's keys cannot be had.
    #[error("the keys of the bearer token's issuer {issuer:?} cannot be had: {reason}; try again later")]
    IssuerUnavailable {
        /// The issuer.
        issuer: String,
        /// Why not, without what concerns the agent alone.
        reason: String,
    },
    /// A mapping or a rule of the configuration refuses it.
    #[error("the bearer token of issuer {issuer:?} is refused: {problem}")]
    Claims {
        /// The issuer.
        issuer: String,
        /// Which mapping or rule, and why.
        problem: String,
    },
}

impl TokenError {
    /// Whether the token is nobody's that this cluster knows: no JSON Web Token, or of another issuer. Whether it holds is not
    /// known then.
    pub fn is_foreign(&self) -> bool {
        matches!(self, Self::NotJwt | Self::UnknownIssuer { .. })
    }

    /// When the same token may be believed; none where it never will be.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::IssuerUnavailable { .. } => Some(RETRY_AFTER),
            Self::KeyNotKnownYet { retry_after, .. } => Some(*retry_after),
            _ => None,
        }
    }

    /// The status of the answer: 503 where the same token may be believed later, else 401.
    pub fn status(&self) -> StatusCode {
        match self.retry_after() {
            Some(_) => StatusCode::SERVICE_UNAVAILABLE,
            None => StatusCode::UNAUTHORIZED,
        }
    }
}

/// What of a token's content a message may repeat: not without end.
pub(super) fn repeated(text: &str) -> String {
    text.chars().take(REPEATED_CHARS_MAX).collect()
}

fn list(entries: &[String]) -> String {
    if entries.is_empty() {
        return "missing".to_owned();
    }
    let mut text =
        entries.iter().take(REPEATED_MAX).map(|entry| format!("{:?}", repeated(entry))).collect::<Vec<_>>();
    if entries.len() > REPEATED_MAX {
        text.push(format!("{} more", entries.len() - REPEATED_MAX));
    }
    text.join(", ")
}

fn time(seconds: i64) -> String {
    Timestamp::from_second(seconds).map_or_else(|_| format!("second {seconds}"), |time| time.to_string())
}
