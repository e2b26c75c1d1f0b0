//! Who vouches for a bearer token, and for how long that is remembered.
//!
//! A token that was verified once is known by its digest until it expires, as long as the key that it was signed with
//! is believed: what takes a key out of its issuer's set takes the tokens out of this memory.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value as Json};

use super::{
    claims::ClaimMappings,
    error::{TokenError, repeated},
    fetch::{Fetch, HttpsFetch, system_roots},
    key_source::{KeySource, Location},
    keys::Fingerprint,
    rule::Subject,
    token::{Token, TokenDigest},
};
use crate::config::{Documents, JwtIssuer};

/// How far clocks may be apart: as much later than `exp`, or earlier than `nbf` and `iat`, a token is still believed.
pub const CLOCK_SKEW: Duration = Duration::from_secs(60);
/// Most tokens that are remembered.
pub const VERIFIED_MAX: usize = 4096;
/// Most bytes of the tokens that are remembered, all together; their claims take some ten times as much.
pub const VERIFIED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A time: the one that tokens speak of, and the one that goes on evenly.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// By the node's clock.
    pub wall: SystemTime,
    /// By a clock that is never set.
    pub steady: Instant,
}

impl Moment {
    /// This one.
    pub fn now() -> Self {
        Self { wall: SystemTime::now(), steady: Instant::now() }
    }
}

/// Why issuers cannot be asked at all.
#[derive(Debug, thiserror::Error)]
pub enum IssuersError {
    /// No authority to verify a host with.
    #[error("issuer {issuer:?} has no certificateAuthority, and the node trusts no CA: {cause}")]
    NoRoots {
        /// The issuer.
        issuer: String,
        /// What was met.
        cause: String,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS to issuer {issuer:?}")]
    Tls {
        /// The issuer.
        issuer: String,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
}

/// A token that is believed.
pub struct Verified {
    /// Whom it is of.
    pub subject: Arc<Subject>,
    /// Its claims.
    pub claims: Map<String, Json>,
    /// When it expires, in seconds since 1970.
    pub expires: i64,
    /// When it begins to be valid.
    begins: i64,
    key: Fingerprint,
}

/// Shows whom it is of, not what else its issuer says of them.
impl fmt::Debug for Verified {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Verified");
        shown
            .field("user", &self.subject.user.username)
            .field("issuer", &self.subject.issuer)
            .field("expires", &self.expires);
        shown.finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Issuer {
    keys: Arc<KeySource>,
    audiences: Vec<String>,
    mappings: ClaimMappings,
    /// Whether the cluster itself speaks.
    of_cluster: bool,
}

/// The issuers of one cluster. Nothing of it is shared with another cluster's.
pub struct Issuers {
    issuers: HashMap<String, Issuer>,
    memory: Mutex<Memory>,
}

impl fmt::Debug for Issuers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.issuers.keys()).finish()
    }
}

impl Issuers {
    /// Those of the configuration. `cluster` reads from the cluster's API server, at the paths that it is given.
    ///
    /// # Errors
    /// [`IssuersError`]. No issuer is asked before a token of it comes.
    pub fn new(configured: &[JwtIssuer], cluster: &Arc<dyn Fetch>) -> Result<Self, IssuersError> {
        let mut issuers = HashMap::with_capacity(configured.len());
        for issuer in configured {
            let (location, fetch): (_, Arc<dyn Fetch>) = match &issuer.documents {
                Documents::Cluster => (Location::Cluster, Arc::clone(cluster)),
                Documents::Web { discovery_url, authorities } => {
                    let url = issuer.url.clone();
                    let roots = match authorities {
                        Some(roots) => Arc::clone(roots),
                        None => system_roots()
                            .map_err(|cause| IssuersError::NoRoots { issuer: url.clone(), cause })?,
                    };
                    let fetch = HttpsFetch::new(roots)
                        .map_err(|source| IssuersError::Tls { issuer: url.clone(), source })?;
                    let location = discovery_url.as_ref().map_or_else(
                        || Location::of_issuer(&url),
                        |discovery| Location::Url(discovery.clone()),
                    );
                    (location, Arc::new(fetch))
                }
            };
            let keys = KeySource::new(issuer.url.clone(), location, fetch);
            let known = Issuer {
                keys,
                audiences: issuer.audiences.clone(),
                mappings: issuer.mappings.clone(),
                of_cluster: matches!(issuer.documents, Documents::Cluster),
            };
            issuers.insert(issuer.url.clone(), known);
        }
        Ok(Self { issuers, memory: Mutex::default() })
    }

    /// Whose `token` is, at `now`.
    ///
    /// # Errors
    /// [`TokenError`], which says what its bearer can do.
    pub async fn verify(&self, token: &str, now: Moment) -> Result<Arc<Verified>, TokenError> {
        let bytes = token.len();
        // Too long is said before anything is done with it.
        if bytes > super::token::TOKEN_BYTES_MAX {
            return Err(TokenError::TooLong { bytes });
        }
        let wall = seconds(now.wall);
        let digest = TokenDigest::of(token);
        if let Some(known) = self.remembered(&digest, wall, now.steady) {
            return Ok(known);
        }
        let token = Token::parse(token)?;
        let name = token.issuer().to_owned();
        let Some(issuer) = self.issuers.get(&name) else {
            return Err(TokenError::UnknownIssuer { issuer: repeated(&name) });
        };
        // Looked at before the signature: who is refused for these need not wait for the issuer, and is told what to do.
        let (begins, expires) = in_time(token.claims(), wall)?;
        audience(token.claims(), &issuer.audiences)?;
        let key = issuer.keys.verify(&token, now.steady).await?;
        let claims = token.into_claims();
        let refused = |problem: &dyn fmt::Display| TokenError::Claims {
            issuer: name.clone(),
            problem: problem.to_string(),
        };
        let (user, claims_value) = issuer.mappings.user(&claims).map_err(|error| refused(&error))?;
        let subject = Subject::of_token(name.clone(), issuer.of_cluster, user, claims_value);
        let subject = Arc::new(subject.map_err(|error| refused(&error))?);
        let verified = Arc::new(Verified { subject, claims, expires, begins, key });
        self.memory().remember(digest, Arc::clone(&verified), bytes);
        Ok(verified)
    }

    fn remembered(&self, digest: &TokenDigest, wall: i64, steady: Instant) -> Option<Arc<Verified>> {
        let known = self.memory().find(digest)?;
        let issuer = self.issuers.get(known.subject.issuer.as_deref()?)?;
        // Where the clock was set back, one that has ended may seem valid: what began later than now is looked at anew, and refused.
        let in_time =
            (known.begins.saturating_sub(skew())..known.expires.saturating_add(skew())).contains(&wall);
        (in_time && issuer.keys.believes(&known.key, steady)).then_some(known)
    }

    /// How many tokens are remembered, and their bytes.
    pub fn remembers(&self) -> (usize, usize) {
        let memory = self.memory();
        (memory.young.known.len() + memory.old.known.len(), memory.young.bytes + memory.old.bytes)
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        // Nothing panics while it is held; were it otherwise, what is in it is whole.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is remembered: two halves, of which the older goes as a whole when the younger is full. What is used moves to
/// the younger.
#[derive(Default)]
struct Memory {
    young: Half,
    old: Half,
}

#[derive(Default)]
struct Half {
    known: HashMap<TokenDigest, (Arc<Verified>, usize)>,
    bytes: usize,
}

impl Memory {
    fn find(&mut self, digest: &TokenDigest) -> Option<Arc<Verified>> {
        if let Some((known, _)) = self.young.known.get(digest) {
            return Some(Arc::clone(known));
        }
        let (known, bytes) = self.old.known.remove(digest)?;
        self.old.bytes -= bytes;
        self.remember(*digest, Arc::clone(&known), bytes);
        Some(known)
    }

    fn remember(&mut self, digest: TokenDigest, verified: Arc<Verified>, bytes: usize) {
        let full =
            self.young.known.len() >= VERIFIED_MAX / 2 || self.young.bytes + bytes > VERIFIED_BYTES_MAX / 2;
        if full {
            self.old = std::mem::take(&mut self.young);
        }
        if let Some((_, former)) = self.young.known.insert(digest, (verified, bytes)) {
            self.young.bytes -= former;
        }
        self.young.bytes += bytes;
    }
}

fn seconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(_) => 0,
    }
}

fn skew() -> i64 {
    i64::try_from(CLOCK_SKEW.as_secs()).unwrap_or(0)
}

/// A NumericDate (RFC 7519, 2), which may have a fraction.
fn date(claims: &Map<String, Json>, name: &'static str) -> Result<Option<i64>, TokenError> {
    let wrong = || TokenError::Malformed {
        part: "claims",
        problem: "have a time (exp, nbf, iat) that is no number of seconds",
    };
    match claims.get(name) {
        None => Ok(None),
        Some(Json::Number(number)) => {
            let seconds = number.as_i64().or_else(|| {
                // `as` takes what is out of range to the nearest end: as late, or as early, as a time can be.
                number.as_f64().filter(|seconds| seconds.is_finite()).map(|seconds| seconds.floor() as i64)
            });
            seconds.map(Some).ok_or_else(wrong)
        }
        Some(_) => Err(wrong()),
    }
}

/// When it begins and expires, if `now` is within its time.
fn in_time(claims: &Map<String, Json>, now: i64) -> Result<(i64, i64), TokenError> {
    let Some(expires) = date(claims, "exp")? else {
        return Err(TokenError::Malformed { part: "claims", problem: "never expire (no exp)" });
    };
    if now >= expires.saturating_add(skew()) {
        return Err(TokenError::Expired { at: expires });
    }
    let mut begins = i64::MIN;
    for name in ["nbf", "iat"] {
        let Some(at) = date(claims, name)? else { continue };
        if now < at.saturating_sub(skew()) {
            return Err(TokenError::NotYetValid { at });
        }
        begins = begins.max(at);
    }
    Ok((begins, expires))
}

/// Whether one of `expected` is in `aud`, which may be one string or a list of them (RFC 7519, 4.1.3).
fn audience(claims: &Map<String, Json>, expected: &[String]) -> Result<(), TokenError> {
    let found: Vec<String> = match claims.get("aud") {
        Some(Json::String(one)) => vec![one.clone()],
        Some(Json::Array(items)) => {
            items.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect()
        }
        _ => Vec::new(),
    };
    if found.iter().any(|audience| expected.contains(audience)) {
        return Ok(());
    }
    Err(TokenError::Audience {
        found: found.iter().map(|audience| repeated(audience)).collect(),
        expected: expected.to_vec(),
    })
}
