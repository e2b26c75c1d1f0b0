//! The keys of one issuer, from its discovery document and the key set that it names: kept, refreshed on use, and
//! fetched again for a key that is not among them.
//!
//! There is one fetch at a time and one each [`FETCH_INTERVAL_MIN`], whoever asks. It runs as a task of its own, so that
//! a client that goes away does not end it for all who wait. While the issuer is down its keys are believed for
//! [`KEYS_AGE_MAX`]; a key that it does not publish any more, until the next refresh ([`KEYS_REFRESH_AGE`]).

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use serde::Deserialize;
use tokio::task::AbortHandle;

use super::{
    error::TokenError,
    fetch::{Fetch, FetchError},
    keys::{Fingerprint, KeySet, KeysError, SignatureError},
    token::Token,
};

/// Age at which keys are fetched again when they are used; they are used meanwhile.
pub(super) const KEYS_REFRESH_AGE: Duration = Duration::from_secs(5 * 60);
/// Age at which keys are no longer believed.
pub(super) const KEYS_AGE_MAX: Duration = Duration::from_secs(12 * 60 * 60);
/// Shortest time between two fetches, so that tokens with made-up key ids cannot flood an issuer.
pub(super) const FETCH_INTERVAL_MIN: Duration = Duration::from_secs(10);

/// Where discovery documents are, behind an issuer's URL.
const WELL_KNOWN: &str = "/.well-known/openid-configuration";
/// Where an API server publishes the keys of its service accounts.
const CLUSTER_KEYS: &str = "/openid/v1/jwks";

/// Where an issuer's documents are.
#[derive(Clone, Debug)]
pub(super) enum Location {
    /// At this URL; keys where the document there says.
    Url(String),
    /// At the paths of the cluster's API server.
    Cluster,
}

impl Location {
    /// Where OpenID Connect has the discovery document of the issuer at `url`, as Kubernetes reads it.
    pub(super) fn of_issuer(url: &str) -> Self {
        Self::Url(format!("{}{WELL_KNOWN}", url.strip_suffix('/').unwrap_or(url)))
    }
}

/// What of a discovery document is read; Kubernetes' and GitHub's lack most of the rest.
#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

/// Why keys were not fetched. The text is for the log.
#[derive(Clone, Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("its discovery document has no issuer and jwks_uri")]
    NoDiscovery,
    #[error("its discovery document is that of {found:?}; issuer.url must be the same, to the letter")]
    OtherIssuer { found: String },
    #[error(transparent)]
    Keys(#[from] KeysError),
}

impl LoadError {
    fn brief(&self) -> String {
        match self {
            Self::Fetch(error) => error.brief(),
            Self::OtherIssuer { .. } => "its discovery document is another issuer's".to_owned(),
            Self::NoDiscovery | Self::Keys(_) => self.to_string(),
        }
    }
}

type Flight = Shared<BoxFuture<'static, ()>>;

#[derive(Default)]
struct State {
    keys: Option<(Arc<KeySet>, Instant)>,
    /// When the last fetch began.
    attempted: Option<Instant>,
    /// Why the last fetch failed, for who presents a token.
    failure: Option<String>,
    flight: Option<(AbortHandle, Flight)>,
}

/// The keys of one issuer.
pub(super) struct KeySource {
    issuer: String,
    location: Location,
    fetch: Arc<dyn Fetch>,
    state: Mutex<State>,
}

impl fmt::Debug for KeySource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("KeySource").field(&self.issuer).finish()
    }
}

impl KeySource {
    pub(super) fn new(issuer: String, location: Location, fetch: Arc<dyn Fetch>) -> Arc<Self> {
        Arc::new(Self { issuer, location, fetch, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held; were it otherwise, what is in it is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The keys that are believed now; begins to refresh them where they are old.
    fn believed(self: &Arc<Self>, now: Instant) -> Option<Arc<KeySet>> {
        let (keys, since) = self.state().keys.clone()?;
        let age = now.saturating_duration_since(since);
        if age > KEYS_REFRESH_AGE {
            let _ = self.fly(now);
        }
        (age <= KEYS_AGE_MAX).then_some(keys)
    }

    /// Whether a key that has vouched for a token is believed still.
    pub(super) fn believes(self: &Arc<Self>, key: &Fingerprint, now: Instant) -> bool {
        self.believed(now).is_some_and(|keys| keys.contains(key))
    }

    /// Checks the signature of `token`, asking the issuer where the keys that are known do not bear it out.
    pub(super) async fn verify(
        self: &Arc<Self>,
        token: &Token<'_>,
        now: Instant,
    ) -> Result<Fingerprint, TokenError> {
        let mut known = self.believed(now);
        let mut refused = match &known {
            Some(keys) => match keys.verify(token) {
                Ok(key) => return Ok(key),
                Err(refused) => Some(refused),
            },
            None => None,
        };
        let flight = self.fly(now);
        let asked = flight.is_some();
        if let Some(flight) = flight {
            flight.await;
            let fetched = self.believed(now);
            let new = match (&known, &fetched) {
                (Some(known), Some(fetched)) => !Arc::ptr_eq(known, fetched),
                _ => fetched.is_some(),
            };
            if new {
                known = fetched;
                refused = match known.as_ref().map(|keys| keys.verify(token)) {
                    Some(Ok(key)) => return Ok(key),
                    Some(Err(refused)) => Some(refused),
                    None => None,
                };
            }
        }
        let issuer = self.issuer.clone();
        let (failure, attempted) = {
            let state = self.state();
            (state.failure.clone(), state.attempted)
        };
        // None for who has just had the issuer asked.
        let wait = attempted.filter(|_| !asked).map(|attempted| until_next(attempted, now));
        Err(match (refused, failure) {
            (Some(SignatureError::Wrong), _) => TokenError::Signature { issuer },
            // Signed with a new key, or with none of this issuer: it alone could tell.
            (_, Some(reason)) => TokenError::IssuerUnavailable { issuer, reason },
            (Some(SignatureError::UnknownKey), None) => match wait {
                Some(retry_after) => TokenError::KeyNotKnownYet { issuer, retry_after },
                None => TokenError::UnknownKey { issuer },
            },
            (None, None) => {
                TokenError::IssuerUnavailable { issuer, reason: "they have not been fetched".to_owned() }
            }
        })
    }

    /// The fetch that is under way, or a new one; none if the last one began too short a time ago.
    fn fly(self: &Arc<Self>, now: Instant) -> Option<Flight> {
        let mut state = self.state();
        if let Some((_, flight)) = state.flight.as_ref().filter(|(task, _)| !task.is_finished()) {
            return Some(flight.clone());
        }
        let recent = |attempted| now.saturating_duration_since(attempted) < FETCH_INTERVAL_MIN;
        if state.attempted.is_some_and(recent) {
            return None;
        }
        state.attempted = Some(now);
        let source = Arc::clone(self);
        let task = tokio::spawn(async move {
            let loaded = source.load().await;
            // Their age counts from before they were asked for.
            source.store(loaded, now);
        });
        let handle = task.abort_handle();
        let flight = task.map(|_ended| ()).boxed().shared();
        state.flight = Some((handle, flight.clone()));
        Some(flight)
    }

    fn store(&self, loaded: Result<KeySet, LoadError>, asked: Instant) {
        let mut state = self.state();
        match loaded {
            Ok(keys) => {
                state.keys = Some((Arc::new(keys), asked));
                state.failure = None;
            }
            Err(error) => {
                tracing::warn!(event = "issuer-keys-not-fetched", issuer = %self.issuer, %error, "cannot fetch the keys of an issuer");
                state.failure = Some(error.brief());
            }
        }
    }

    async fn load(&self) -> Result<KeySet, LoadError> {
        let document = match &self.location {
            Location::Url(url) => self.fetch.fetch(url).await?,
            Location::Cluster => self.fetch.fetch(WELL_KNOWN).await?,
        };
        let discovery: Discovery = serde_json::from_slice(&document).map_err(|_| LoadError::NoDiscovery)?;
        if discovery.issuer != self.issuer {
            return Err(LoadError::OtherIssuer { found: super::error::repeated(&discovery.issuer) });
        }
        // An API server's document names keys at an address that need not be reachable, or at a public copy of its own.
        let keys = match &self.location {
            Location::Url(_) => discovery.jwks_uri.as_str(),
            Location::Cluster => CLUSTER_KEYS,
        };
        Ok(KeySet::parse(&self.fetch.fetch(keys).await?)?)
    }
}

/// How long an issuer that was asked at `attempted` is not asked again, in whole seconds.
fn until_next(attempted: Instant, now: Instant) -> Duration {
    let left = FETCH_INTERVAL_MIN.saturating_sub(now.saturating_duration_since(attempted));
    Duration::from_secs(left.as_secs() + 1)
}

#[cfg(test)]
mod tests {
    use std::{
        sync::Arc,
        time::{Duration, Instant},
    };

    use serde_json::{Value, json};

    use super::{FETCH_INTERVAL_MIN, KEYS_AGE_MAX, KEYS_REFRESH_AGE, KeySource, Location};
    use crate::auth::{
        error::TokenError,
        keys::Fingerprint,
        signer::Signer,
        site::{DISCOVERY, KEYS, Site, URL},
        token::Token,
    };

    fn source(site: &Arc<Site>) -> Arc<KeySource> {
        KeySource::new(URL.to_owned(), Location::of_issuer(URL), Arc::clone(site) as _)
    }

    async fn verified(source: &Arc<KeySource>, text: &str, now: Instant) -> Result<Fingerprint, TokenError> {
        source.verify(&Token::parse(text).expect("is well formed"), now).await
    }

    fn token(signer: &Signer, key_id: &str) -> String {
        signer.token(key_id, &json!({"iss": URL}))
    }

    /// Lets a refresh that was begun end.
    async fn settled(source: &Arc<KeySource>) {
        let flight = source.state().flight.as_ref().map(|(_, flight)| flight.clone());
        if let Some(flight) = flight {
            flight.await;
        }
    }

    fn unavailable(reason: &str) -> Result<Fingerprint, TokenError> {
        Err(TokenError::IssuerUnavailable { issuer: URL.to_owned(), reason: reason.to_owned() })
    }

    #[tokio::test]
    async fn keys_are_fetched_once_and_used_again() {
        let signer = Signer::es256();
        let site = Site::issuer(&[signer.public("k1")]);
        let (source, now) = (source(&site), Instant::now());
        for _ in 0..3 {
            assert!(verified(&source, &token(&signer, "k1"), now).await.is_ok());
        }
        assert_eq!(site.asked(), [DISCOVERY, KEYS]);
    }

    #[tokio::test]
    async fn many_who_come_at_once_cause_one_fetch_and_one_who_leaves_does_not_end_it() {
        let signer = Signer::es256();
        let site = Site::issuer(&[signer.public("k1")]);
        let (source, now, text) = (source(&site), Instant::now(), token(&signer, "k1"));
        let gate = site.gate.lock().await;
        let mut all: Vec<_> = (0..100)
            .map(|_| {
                let (source, text) = (Arc::clone(&source), text.clone());
                tokio::spawn(async move { verified(&source, &text, now).await })
            })
            .collect();
        while site.asked.lock().expect("is whole").is_empty() {
            tokio::task::yield_now().await;
        }
        all.remove(0).abort();
        drop(gate);
        for one in all {
            assert!(one.await.expect("is not ended").is_ok());
        }
        assert_eq!(site.asked(), [DISCOVERY, KEYS]);
    }

    #[tokio::test]
    async fn a_new_key_is_fetched_but_made_up_ones_do_not_flood_the_issuer() {
        let (old, new, stranger) = (Signer::es256(), Signer::es256(), Signer::es256());
        let site = Site::issuer(&[old.public("k1")]);
        let (source, mut now) = (source(&site), Instant::now());
        assert!(verified(&source, &token(&old, "k1"), now).await.is_ok());
        site.publish(KEYS, &json!({"keys": [old.public("k1"), new.public("k2")]}));
        let unknown = || Err(TokenError::UnknownKey { issuer: URL.to_owned() });
        let not_yet = |seconds| {
            let retry_after = Duration::from_secs(seconds);
            Err(TokenError::KeyNotKnownYet { issuer: URL.to_owned(), retry_after })
        };
        assert_eq!(verified(&source, &token(&new, "k2"), now).await, not_yet(11), "not within the interval");
        let later = now + Duration::from_millis(7_500);
        assert_eq!(verified(&source, &token(&new, "k2"), later).await, not_yet(3));
        now += FETCH_INTERVAL_MIN;
        assert!(verified(&source, &token(&new, "k2"), now).await.is_ok());
        site.asked();
        for made_up in 0..50 {
            assert_eq!(verified(&source, &token(&stranger, &format!("x{made_up}")), now).await, not_yet(11));
        }
        assert_eq!(site.asked(), [] as [&str; 0]);
        now += FETCH_INTERVAL_MIN;
        assert_eq!(verified(&source, &token(&stranger, "x"), now).await, unknown());
        assert_eq!(site.asked(), [DISCOVERY, KEYS]);
        // The same id with another key, as issuers do that know one id only.
        site.publish(KEYS, &json!({"keys": [stranger.public("k1")]}));
        now += FETCH_INTERVAL_MIN;
        assert!(verified(&source, &token(&stranger, "k1"), now).await.is_ok());
        let signature = Err(TokenError::Signature { issuer: URL.to_owned() });
        assert_eq!(verified(&source, &token(&old, "k1"), now).await, signature);
    }

    #[tokio::test]
    async fn a_key_that_is_withdrawn_is_not_believed_after_the_next_refresh() {
        let (old, new) = (Signer::es256(), Signer::es256());
        let site = Site::issuer(&[old.public("k1")]);
        let (source, mut now) = (source(&site), Instant::now());
        let key = verified(&source, &token(&old, "k1"), now).await.expect("is believed");
        site.publish(KEYS, &json!({"keys": [new.public("k2")]}));
        assert!(source.believes(&key, now));
        now += KEYS_REFRESH_AGE + Duration::from_secs(1);
        assert!(source.believes(&key, now), "is used while keys are refreshed");
        settled(&source).await;
        assert!(!source.believes(&key, now));
        now += FETCH_INTERVAL_MIN;
        assert_eq!(
            verified(&source, &token(&old, "k1"), now).await,
            Err(TokenError::UnknownKey { issuer: URL.to_owned() })
        );
        assert!(verified(&source, &token(&new, "k2"), now).await.is_ok());
    }

    #[tokio::test]
    async fn while_an_issuer_is_down_its_keys_are_believed_for_a_while_and_it_is_tried_again() {
        let signer = Signer::es256();
        let site = Site::issuer(&[signer.public("k1")]);
        let (source, begun) = (source(&site), Instant::now());
        let key = verified(&source, &token(&signer, "k1"), begun).await.expect("is believed");
        site.withdraw(DISCOVERY);
        site.asked();
        let text = token(&signer, "k1");
        for hours in 1..12 {
            let now = begun + Duration::from_secs(hours * 3600);
            assert!(verified(&source, &text, now).await.is_ok());
            settled(&source).await;
            assert_eq!(site.asked(), [DISCOVERY]);
        }
        let now = begun + KEYS_AGE_MAX;
        let other = token(&Signer::es256(), "k2");
        assert_eq!(verified(&source, &other, now).await, unavailable("it answers 404"));
        let forged = token(&Signer::es256(), "k1");
        let refused = verified(&source, &forged, now).await;
        assert_eq!(refused, Err(TokenError::Signature { issuer: URL.to_owned() }));
        let mut now = now + Duration::from_secs(1);
        assert!(!source.believes(&key, now));
        assert_eq!(verified(&source, &text, now).await, unavailable("it answers 404"));
        site.publish(DISCOVERY, &json!({"issuer": URL, "jwks_uri": KEYS}));
        now += FETCH_INTERVAL_MIN;
        assert!(verified(&source, &text, now).await.is_ok());
    }

    #[tokio::test]
    async fn documents_that_are_another_issuers_or_of_no_use_are_refused() {
        let signer = Signer::es256();
        let text = token(&signer, "k1");
        let check = async |target: &str, document: Value, reason: &str| {
            let site = Site::issuer(&[signer.public("k1")]);
            site.publish(target, &document);
            assert_eq!(verified(&source(&site), &text, Instant::now()).await, unavailable(reason));
        };
        let other = json!({"issuer": "https://issuer.test/", "jwks_uri": KEYS});
        check(DISCOVERY, other, "its discovery document is another issuer's").await;
        check(DISCOVERY, json!({"issuer": URL}), "its discovery document has no issuer and jwks_uri").await;
        check(DISCOVERY, json!({"issuer": URL, "jwks_uri": "https://nowhere.test"}), "it answers 404").await;
        check(KEYS, json!([]), "the key set is no JSON object with a list \"keys\"").await;
        let many = json!({"keys": vec![json!({"kty": "EC"}); 10_000]});
        check(KEYS, many, "the key set has 10000 keys, more than 128").await;
        check(KEYS, json!({"keys": []}), "the key set has no key for any accepted algorithm").await;
    }

    #[tokio::test]
    async fn through_its_cluster_an_issuer_is_read_at_the_api_servers_own_paths() {
        let signer = Signer::es256();
        let site = Arc::new(Site::default());
        let elsewhere = json!({"issuer": URL, "jwks_uri": "https://10.0.0.1:6443/openid/v1/jwks"});
        site.publish("/.well-known/openid-configuration", &elsewhere);
        site.publish("/openid/v1/jwks", &json!({"keys": [signer.public("k1")]}));
        let source = KeySource::new(URL.to_owned(), Location::Cluster, Arc::clone(&site) as _);
        assert!(verified(&source, &token(&signer, "k1"), Instant::now()).await.is_ok());
        assert_eq!(site.asked(), ["/.well-known/openid-configuration", "/openid/v1/jwks"]);
    }
}
