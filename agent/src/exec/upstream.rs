//! How the agent verifies an API server on behalf of the command: as the kubeconfig tells the command to.

use std::sync::Arc;

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use super::{api_set::Target, kubeconfig::Verification};
use crate::trust::{ClusterCa, TrustError, leaf::crypto_provider};

/// Why an API server cannot be verified as the kubeconfig says.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// Its CA bundle is unusable.
    #[error("cluster {cluster:?}")]
    Bundle {
        /// The cluster.
        cluster: String,
        /// What is wrong.
        source: Box<TrustError>,
    },
    /// This machine has no CA certificates.
    #[error(
        "cluster {cluster:?} has no certificate-authority, and this machine has no CA certificates; install them \
         (package ca-certificates)"
    )]
    NoSystemRoots {
        /// The cluster.
        cluster: String,
    },
    /// The client certificate cannot be used.
    #[error("cluster {cluster:?}: {problem}")]
    Identity {
        /// The cluster.
        cluster: String,
        /// What is wrong.
        problem: String,
    },
    /// rustls refuses.
    #[error(
        "cannot speak TLS to cluster {cluster:?}; do its user's client certificate and key belong together?"
    )]
    Tls {
        /// The cluster.
        cluster: String,
        /// Why.
        source: rustls::Error,
    },
}

/// TLS towards `target`: its CA, its user's client certificate.
///
/// # Errors
/// The kubeconfig's CA, certificate or key cannot be used.
pub fn tls(target: &Target) -> Result<Arc<ClientConfig>, UpstreamError> {
    let cluster = || target.name().to_owned();
    let failed = |source| UpstreamError::Tls { cluster: cluster(), source };
    let provider = crypto_provider();
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(failed)?;
    let builder = match &target.verification {
        Verification::Bundle(pem) => {
            let ca = ClusterCa::from_pem(pem, "in its certificate-authority")
                .map_err(|source| UpstreamError::Bundle { cluster: cluster(), source: Box::new(source) })?;
            builder.with_root_certificates(ca.roots())
        }
        Verification::SystemRoots => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(UpstreamError::NoSystemRoots { cluster: cluster() });
            }
            builder.with_root_certificates(roots)
        }
        Verification::Nothing => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified { provider }))
        }
    };
    let config = match &target.identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let (chain, key) = identity
                .parse()
                .map_err(|problem| UpstreamError::Identity { cluster: cluster(), problem })?;
            builder.with_client_auth_cert(chain, key).map_err(failed)?
        }
    };
    Ok(Arc::new(config))
}

/// Accepts any certificate: what `insecure-skip-tls-verify` asks for, with or without Weir.
#[derive(Debug)]
struct Unverified {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
