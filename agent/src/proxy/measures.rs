//! What the proxy counts of each cluster, for metrics: atomic additions on the way of a request, no locks.

use std::sync::atomic::{AtomicU64, Ordering};

/// What became of a request: forwarded, or why Weir answered it itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The API server has answered.
    Forwarded,
    /// A method or upgrade that is not served.
    Unsupported,
    /// No host, or two of them.
    MalformedHost,
    /// A host that is not the cluster's.
    Misdirected,
    /// Credentials that cannot be read in one way only.
    MalformedIdentity,
    /// It is not known who asks.
    Unauthenticated,
    /// No rule is for who asks, or one denies.
    Forbidden,
    /// Who asks, or the credential to go on with, cannot be had just now.
    IdentityUnavailable,
    /// A body over the limit.
    BodyTooLarge,
    /// Too many bodies in flight.
    TooManyBodies,
    /// The body did not arrive in time.
    BodyTimeout,
    /// The body broke off.
    BodyAborted,
    /// The journal does not accept.
    NotRecorded,
    /// A body that cannot be read, so that it would not be on record.
    Unreadable,
    /// The pod records more than it may.
    OverQuota,
    /// The journal does not accept the answer, which is kept back.
    AnswerNotRecorded,
    /// The API server cannot be reached.
    Unreachable,
    /// The API server broke off.
    UpstreamFailed,
}

impl Verdict {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::Forwarded,
        Self::Unsupported,
        Self::MalformedHost,
        Self::Misdirected,
        Self::MalformedIdentity,
        Self::Unauthenticated,
        Self::Forbidden,
        Self::IdentityUnavailable,
        Self::BodyTooLarge,
        Self::TooManyBodies,
        Self::BodyTimeout,
        Self::BodyAborted,
        Self::NotRecorded,
        Self::Unreadable,
        Self::OverQuota,
        Self::AnswerNotRecorded,
        Self::Unreachable,
        Self::UpstreamFailed,
    ];

    /// Its stable name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Unsupported => "unsupported",
            Self::MalformedHost => "malformed_host",
            Self::Misdirected => "misdirected",
            Self::MalformedIdentity => "malformed_identity",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::IdentityUnavailable => "identity_unavailable",
            Self::BodyTooLarge => "body_too_large",
            Self::TooManyBodies => "too_many_bodies",
            Self::BodyTimeout => "body_timeout",
            Self::BodyAborted => "body_aborted",
            Self::NotRecorded => "not_recorded",
            Self::Unreadable => "body_unreadable",
            Self::OverQuota => "over_quota",
            Self::AnswerNotRecorded => "answer_not_recorded",
            Self::Unreachable => "unreachable",
            Self::UpstreamFailed => "upstream_failed",
        }
    }
}

/// The counters of one cluster.
#[derive(Debug, Default)]
pub(super) struct Measures {
    connections: AtomicU64,
    requests: [AtomicU64; Verdict::ALL.len()],
}

/// The same as numbers, since this process started.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Connections that arrived, before TLS.
    pub connections: u64,
    /// Requests by what became of them.
    pub requests: [(Verdict, u64); Verdict::ALL.len()],
}

impl Measures {
    pub(super) fn connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn request(&self, verdict: Verdict) {
        self.requests[verdict as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Measured {
        let requests =
            Verdict::ALL.map(|verdict| (verdict, self.requests[verdict as usize].load(Ordering::Relaxed)));
        Measured { connections: self.connections.load(Ordering::Relaxed), requests }
    }
}

#[cfg(test)]
mod tests {
    use super::{Measures, Verdict};

    #[test]
    fn a_request_is_counted_under_its_verdict() {
        let measures = Measures::default();
        for verdict in Verdict::ALL {
            (0..=verdict as usize).for_each(|_| measures.request(verdict));
        }
        let counts: Vec<_> = measures.read().requests.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, (1..=Verdict::ALL.len() as u64).collect::<Vec<_>>());
    }
}
