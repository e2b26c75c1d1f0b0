//! The serving certificate: its key, the TLS configuration made of it, and its renewal before it ends.
//!
//! Keys are ECDSA P-256, made here for each certificate and dropped with the configuration they serve. A failed
//! renewal is retried with growing pauses for as long as it takes; the certificate in place keeps serving.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rand::Rng;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    NamedGroup, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tracing::{info, warn};
use x509_parser::parse_x509_certificate;

use super::{
    Authority, ServingCertificate, ServingNames, TrustError, authority::CLOCK_SKEW, client::ClientCa,
};

/// First pause after a failed renewal.
const RETRY_FIRST: Duration = Duration::from_secs(5);
/// Longest pause after a failed renewal.
const RETRY_LONGEST: Duration = Duration::from_mins(5);
/// Longest sleep before the clock is read again: where it was set, or the machine was suspended, pods must not meet an ended
/// certificate for long.
const CLOCK_CHECK: Duration = Duration::from_secs(10);
/// A certificate with less time than this left is not worth serving.
const LIFE_SHORTEST: Duration = Duration::from_secs(30);

/// The one crypto provider of this program.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // The AWS SDK's features would put the hybrid group first in the whole program. Most of what Weir serves does not leave the
    // node; who asks for that group alone still gets it.
    provider.kx_groups.sort_by_key(|group| group.name() == NamedGroup::X25519MLKEM768);
    Arc::new(provider)
}

pub(super) fn generate_key() -> Result<KeyPair, TrustError> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
        .map_err(|source| TrustError::Generate { what: "a private key", source })
}

pub(super) fn distinguished_name(entries: &[(DnType, &str)]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for (kind, value) in entries {
        name.push(kind.clone(), *value);
    }
    name
}

/// Parameters of a serving certificate for `names`, life not yet set.
pub(super) fn serving_params(
    names: &ServingNames,
    subject: &[(DnType, &str)],
) -> Result<CertificateParams, TrustError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished_name(subject);
    for name in &names.dns {
        let name =
            name.as_str().try_into().map_err(|_not_ascii| TrustError::InvalidName { name: name.clone() })?;
        params.subject_alt_names.push(SanType::DnsName(name));
    }
    params.subject_alt_names.extend(names.addresses.iter().map(|address| SanType::IpAddress(*address)));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(params)
}

/// A PEM certificate signing request for `key`.
pub(super) fn signing_request(
    key: &KeyPair,
    names: &ServingNames,
    subject: &[(DnType, String)],
) -> Result<String, TrustError> {
    let subject: Vec<_> = subject.iter().map(|(kind, value)| (kind.clone(), value.as_str())).collect();
    serving_params(names, &subject)?
        .serialize_request(key)
        .and_then(|request| request.pem())
        .map_err(|source| TrustError::Generate { what: "a certificate signing request", source })
}

pub(super) fn from_unix_seconds(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// A verified certificate with its key, ready to serve.
pub struct Leaf {
    config: Arc<ServerConfig>,
    not_after: SystemTime,
    /// Of its DER form, in hexadecimal digits: what a client's tools show of the certificate that it saw.
    sha256: String,
}

impl fmt::Debug for Leaf {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Leaf").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl Leaf {
    /// Makes the TLS configuration (TLS 1.2 and 1.3, ALPN `h2` and `http/1.1`, session tickets); with `clients`, whoever
    /// presents a certificate must have it from there.
    pub(super) fn new(
        key: KeyPair,
        chain: Vec<CertificateDer<'static>>,
        clients: Option<&ClientCa>,
    ) -> Result<Self, TrustError> {
        let unparsable = |reason: String| TrustError::Unparsable { reason };
        let leaf = chain.first().ok_or(TrustError::EmptyChain)?;
        let (_, parsed) = parse_x509_certificate(leaf).map_err(|error| unparsable(error.to_string()))?;
        let not_after = from_unix_seconds(parsed.validity().not_after.timestamp());
        let sha256 = hex::encode(Sha256::digest(leaf));
        if not_after < SystemTime::now() + LIFE_SHORTEST {
            return Err(TrustError::Expired { not_after });
        }
        let failed = |source| TrustError::ServerConfig { source };
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let builder = ServerConfig::builder_with_provider(crypto_provider())
            .with_safe_default_protocol_versions()
            .map_err(failed)?;
        let builder = match clients {
            Some(clients) => builder.with_client_cert_verifier(clients.verifier()),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(failed)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // Stateless tickets: resumption without memory per session.
        config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().map_err(failed)?;
        Ok(Self { config: Arc::new(config), not_after, sha256 })
    }

    /// End of the certificate's validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The TLS configuration.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

/// Gets the first certificate for the current `names` and returns it with the task that keeps it fresh: run
/// [`Renewal::run`] for as long as the certificate serves.
///
/// # Errors
/// There is no certificate that clients would trust.
pub async fn serve(
    authority: Arc<Authority>,
    mut names: watch::Receiver<ServingNames>,
    clients: Option<ClientCa>,
) -> Result<(ServingCertificate, Renewal), TrustError> {
    let wanted = names.borrow_and_update().clone();
    let leaf = authority.issue(&wanted, clients.as_ref()).await?;
    let serving = ServingCertificate::new(leaf.server_config(), leaf.not_after);
    info!(
        event = "certificate-issued",
        authority = authority.describe(),
        sha256 = leaf.sha256,
        "serving certificate issued"
    );
    let (not_after, issued) = (leaf.not_after, SystemTime::now());
    let renewal = Renewal { authority, serving: serving.clone(), names, clients, not_after, issued };
    Ok((serving, renewal))
}

/// Replaces a certificate before it ends, and when the names that it must cover change.
#[derive(Debug)]
pub struct Renewal {
    authority: Arc<Authority>,
    serving: ServingCertificate,
    names: watch::Receiver<ServingNames>,
    clients: Option<ClientCa>,
    not_after: SystemTime,
    issued: SystemTime,
}

impl Renewal {
    /// Runs until the sender of the names is dropped.
    pub async fn run(mut self) {
        let mut renew_at =
            renewal_time(SystemTime::now(), self.not_after, rand::thread_rng().gen_range(0.0..1.0));
        let mut pause = RETRY_FIRST;
        loop {
            if self.is_of_the_future() {
                (renew_at, self.issued) = (SystemTime::now(), SystemTime::now());
            }
            let wait = renew_at.duration_since(SystemTime::now()).unwrap_or_default();
            if !wait.is_zero() {
                tokio::select! {
                    () = tokio::time::sleep(wait.min(CLOCK_CHECK)) => continue,
                    changed = self.names.changed() => if changed.is_err() { return },
                }
            }
            let names = self.names.borrow_and_update().clone();
            let jitter = rand::thread_rng().gen_range(0.0..1.0);
            match self.authority.issue(&names, self.clients.as_ref()).await {
                Ok(leaf) => {
                    self.serving.replace(leaf.server_config(), leaf.not_after);
                    (self.not_after, self.issued) = (leaf.not_after, SystemTime::now());
                    renew_at = renewal_time(SystemTime::now(), self.not_after, jitter);
                    pause = RETRY_FIRST;
                    info!(
                        event = "certificate-renewed",
                        authority = self.authority.describe(),
                        sha256 = leaf.sha256,
                        "serving certificate renewed"
                    );
                }
                Err(error) => {
                    let left = self.not_after.duration_since(SystemTime::now()).unwrap_or_default();
                    warn!(
                        event = "certificate-not-renewed",
                        error = &error as &dyn std::error::Error,
                        valid_for_s = left.as_secs(),
                        retry_in_s = pause.as_secs(),
                        "cannot renew the serving certificate; pods are served until it ends, then they refuse it"
                    );
                    renew_at = SystemTime::now() + pause.mul_f64(1.0 + 0.2 * jitter);
                    pause = (pause * 2).min(RETRY_LONGEST);
                }
            }
        }
    }
}

impl Renewal {
    /// Whether the clock by which the certificate was signed has been set back since, so that it is not valid yet.
    fn is_of_the_future(&self) -> bool {
        self.authority.signs_by_own_clock() && SystemTime::now() + CLOCK_SKEW < self.issued
    }
}

/// Between 60 % and 75 % of the time that is left, so that the agents of a cluster do not renew all at once and
/// a quarter of the life remains for retries.
fn renewal_time(now: SystemTime, not_after: SystemTime, jitter: f64) -> SystemTime {
    let left = not_after.duration_since(now).unwrap_or_default();
    now + left.mul_f64(0.60 + 0.15 * jitter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::authority::EphemeralCa;

    #[test]
    fn no_feature_of_a_dependency_chooses_the_key_exchange() {
        let names: Vec<NamedGroup> = crypto_provider().kx_groups.iter().map(|group| group.name()).collect();
        assert_eq!(
            (names.first(), names.last()),
            (Some(&NamedGroup::X25519), Some(&NamedGroup::X25519MLKEM768))
        );
    }

    #[test]
    fn renewal_leaves_a_quarter_of_the_life_for_retries() {
        let now = SystemTime::UNIX_EPOCH;
        let end = now + Duration::from_secs(1000);
        assert_eq!(renewal_time(now, end, 0.0), now + Duration::from_secs(600));
        assert_eq!(renewal_time(now, end, 1.0), now + Duration::from_secs(750));
        assert_eq!(renewal_time(end, now, 0.5), end, "a past end renews at once");
    }

    #[tokio::test]
    async fn new_names_replace_the_certificate() {
        let authority = Arc::new(Authority::Ephemeral(EphemeralCa::generate().expect("generates")));
        let names = |host: &str| {
            let mut names = ServingNames::default();
            names.add_host(host);
            names
        };
        let (sender, receiver) = watch::channel(names("10.0.0.1"));
        let (serving, renewal) = serve(authority, receiver, None).await.expect("serves");
        let first = serving.server_config();
        assert_eq!(first.alpn_protocols, [b"h2".to_vec(), b"http/1.1".to_vec()]);
        let task = tokio::spawn(renewal.run());
        sender.send(names("10.0.0.2")).expect("receiver lives");
        while Arc::ptr_eq(&first, &serving.server_config()) {
            tokio::task::yield_now().await;
        }
        drop(sender);
        task.await.expect("ends with its sender");
    }

    #[tokio::test]
    async fn a_certificate_of_a_clock_that_was_ahead_is_replaced_once_it_is_right() {
        let authority = Arc::new(Authority::Ephemeral(EphemeralCa::generate().expect("generates")));
        let mut names = ServingNames::default();
        names.add_host("10.0.0.1");
        let (sender, receiver) = watch::channel(names);
        let (serving, mut renewal) = serve(authority, receiver, None).await.expect("serves");
        renewal.issued += Duration::from_hours(24);
        let first = serving.server_config();
        let task = tokio::spawn(renewal.run());
        let replaced = async {
            while Arc::ptr_eq(&first, &serving.server_config()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), replaced).await.expect("it is replaced");
        drop(sender);
        task.await.expect("ends with its sender");
    }
}
