//! What a client gets when Weir itself answers: Kubernetes `Status` objects, so that kubectl prints them as it
//! prints the API server's own refusals.
//!
//! The message says why and how to mend it; nothing internal (addresses of the agent, file paths, credentials)
//! may stand in it.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::json;

use super::{body::ResponseBody, measures::Verdict};
use crate::auth::{Kind, Refused};

/// Most characters of a warning.
const WARNING_CHARS_MAX: usize = 1024;
/// Seconds after which a client should try again, where trying again can help.
const RETRY_AFTER_S: u32 = 1;

/// Why a request is answered by Weir and not forwarded (or why its answer could not be fetched).
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// CONNECT, or an upgrade to HTTP/2 without TLS.
    #[error("{what} is not supported by the recording gateway weir; use an ordinary request")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
    },
    /// No `Host`, two of them, or one that disagrees with the request line.
    #[error("the request's host is {problem}")]
    MalformedHost {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A host that is not the cluster's.
    #[error(
        "{host:?} is not a name of the cluster that this connection was made to; use the name or address \
             in the kubeconfig, or add it to the cluster's names in weir's configuration"
    )]
    Misdirected {
        /// The host as the client sent it.
        host: String,
    },
    /// Who the request is for.
    #[error("{0}")]
    Identity(Refused),
    /// A body over the limit of the API server itself, in the API server's own words.
    #[error("Request entity too large: limit is {bytes_max}")]
    BodyTooLarge {
        /// The limit.
        bytes_max: usize,
    },
    /// The pod or the agent has too many requests, or bytes of them, in flight already.
    #[error("too many requests are in flight; try again")]
    TooManyBodies,
    /// The body did not arrive in time.
    #[error("the request's body did not arrive within {seconds} seconds")]
    BodyTimeout {
        /// The limit.
        seconds: u64,
    },
    /// The client went away, or its framing broke, in the middle of its body. Nobody reads the answer.
    #[error("the request's body ended early")]
    BodyAborted,
    /// The journal does not accept.
    #[error("the request cannot be recorded, so it is not forwarded: {cause}")]
    NotRecorded {
        /// Why, in recording's words for clients.
        cause: &'static str,
    },
    /// Nothing of the body would be on record.
    #[error(
        "the request's body cannot be read, so it would not be on record and is not forwarded: it {cause}; send one document in \
         JSON, without a content encoding"
    )]
    Unreadable {
        /// Why, in recording's words for clients.
        cause: &'static str,
    },
    /// The pod records more than it may.
    #[error("too much of this pod is being recorded, so the request is not forwarded: {cause}")]
    OverQuota {
        /// Why, in recording's words for clients.
        cause: &'static str,
    },
    /// The request was carried out, but the record of its answer cannot be made durable: the answer is kept back.
    #[error(
        "the API server has answered, but its answer cannot be recorded, so it is kept back: {cause}; look at what \
         became of the request before you repeat it"
    )]
    AnswerNotRecorded {
        /// Why, in recording's words for clients.
        cause: &'static str,
    },
    /// The API server cannot be reached.
    #[error("the API server of cluster {cluster:?} cannot be reached: {cause}")]
    Unreachable {
        /// Name of the cluster.
        cluster: String,
        /// Why.
        cause: String,
    },
    /// The API server broke off before its answer began.
    #[error(
        "the API server of cluster {cluster:?} failed before it answered: {cause}; whether it acted on the \
             request is not known"
    )]
    UpstreamFailed {
        /// Name of the cluster.
        cluster: String,
        /// Why.
        cause: String,
    },
}

/// A `Warning` header as the API server writes it (k8s.io/apimachinery `pkg/util/net`, code 299); without the request's id,
/// so that a client that repeats itself prints it once.
fn warning(text: &str) -> Option<HeaderValue> {
    let mut header = String::from("299 - \"");
    for c in text.chars().take(WARNING_CHARS_MAX) {
        match c {
            '"' | '\\' => header.extend(['\\', c]),
            ' '..='~' => header.push(c),
            _ => header.push('?'),
        }
    }
    header.push('"');
    HeaderValue::from_str(&header).ok()
}

impl Refusal {
    /// HTTP status.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Unsupported { .. }
            | Self::MalformedHost { .. }
            | Self::BodyAborted
            | Self::Unreadable { .. } => StatusCode::BAD_REQUEST,
            Self::Misdirected { .. } => StatusCode::MISDIRECTED_REQUEST,
            Self::Identity(refused) => match refused.kind() {
                Kind::Malformed => StatusCode::BAD_REQUEST,
                Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
                Kind::Forbidden => StatusCode::FORBIDDEN,
                Kind::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            },
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooManyBodies | Self::OverQuota { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::AnswerNotRecorded { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::BodyTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::NotRecorded { .. } | Self::Unreachable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::UpstreamFailed { .. } => StatusCode::BAD_GATEWAY,
        }
    }

    /// What it is counted as.
    pub(super) fn verdict(&self) -> Verdict {
        match self {
            Self::Unsupported { .. } => Verdict::Unsupported,
            Self::MalformedHost { .. } => Verdict::MalformedHost,
            Self::Misdirected { .. } => Verdict::Misdirected,
            Self::Identity(refused) => match refused.kind() {
                Kind::Malformed => Verdict::MalformedIdentity,
                Kind::Unauthenticated => Verdict::Unauthenticated,
                Kind::Forbidden => Verdict::Forbidden,
                Kind::Unavailable(_) => Verdict::IdentityUnavailable,
            },
            Self::BodyTooLarge { .. } => Verdict::BodyTooLarge,
            Self::TooManyBodies => Verdict::TooManyBodies,
            Self::BodyTimeout { .. } => Verdict::BodyTimeout,
            Self::BodyAborted => Verdict::BodyAborted,
            Self::NotRecorded { .. } => Verdict::NotRecorded,
            Self::Unreadable { .. } => Verdict::Unreadable,
            Self::OverQuota { .. } => Verdict::OverQuota,
            Self::AnswerNotRecorded { .. } => Verdict::AnswerNotRecorded,
            Self::Unreachable { .. } => Verdict::Unreachable,
            Self::UpstreamFailed { .. } => Verdict::UpstreamFailed,
        }
    }

    /// Kubernetes' machine-readable reason (apimachinery `StatusReason`, as far as it has one for the status).
    fn reason(&self) -> &'static str {
        match self {
            Self::Unsupported { .. }
            | Self::MalformedHost { .. }
            | Self::BodyAborted
            | Self::Unreadable { .. } => "BadRequest",
            Self::Misdirected { .. } => "MisdirectedRequest",
            Self::Identity(refused) => match refused.kind() {
                Kind::Malformed => "BadRequest",
                Kind::Unauthenticated => "Unauthorized",
                Kind::Forbidden => "Forbidden",
                Kind::Unavailable(_) => "ServiceUnavailable",
            },
            Self::BodyTooLarge { .. } => "RequestEntityTooLarge",
            Self::TooManyBodies | Self::OverQuota { .. } => "TooManyRequests",
            Self::AnswerNotRecorded { .. } => "InternalError",
            Self::BodyTimeout { .. } => "Timeout",
            Self::NotRecorded { .. } | Self::Unreachable { .. } => "ServiceUnavailable",
            Self::UpstreamFailed { .. } => "BadGateway",
        }
    }

    /// Whether the client should try again by itself. Not for an API server that is down: kubectl would then wait
    /// through ten attempts where without Weir it says so at once. Not where the request was carried out.
    fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::NotRecorded { .. } | Self::OverQuota { .. } | Self::TooManyBodies => Some(RETRY_AFTER_S),
            Self::Identity(refused) => match refused.kind() {
                Kind::Unavailable(after) => {
                    Some(u32::try_from(after.as_secs()).unwrap_or(u32::MAX).max(RETRY_AFTER_S))
                }
                _ => None,
            },
            _ => None,
        }
    }

    /// What the client is told. Who was refused for who it is finds the record by its id.
    fn message(&self, request: Option<&str>) -> String {
        match (self, request) {
            (Self::Identity(_), Some(id)) => format!("{self} (weir request {id})"),
            _ => self.to_string(),
        }
    }

    /// The answer. `request` is the record's id, if there is a record.
    pub(super) fn response(&self, request: Option<&str>) -> Response<ResponseBody> {
        let status = self.status();
        let mut object = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message(request),
            "reason": self.reason(),
            "code": status.as_u16(),
        });
        if let Some(seconds) = self.retry_after_s() {
            object["details"] = json!({ "retryAfterSeconds": seconds });
        }
        let mut response = Response::new(ResponseBody::whole(Bytes::from(object.to_string())));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
        if let Some(seconds) = self.retry_after_s() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // kubectl prints warnings also where it prints words of its own for a status, as in discovery.
        if matches!(self, Self::Identity(_))
            && let Some(warning) = warning(&self.to_string())
        {
            headers.insert(header::WARNING, warning);
        }
        if let Some(id) = request.and_then(|id| HeaderValue::from_str(id).ok()) {
            headers.insert(super::headers::AUDIT_ID, id);
        }
        response
    }
}
