//! Certificates that clients present: verified by a configured CA in the TLS handshake, then read as Kubernetes reads them
//! (k8s.io/apiserver `pkg/authentication/request/x509`): the common name is the user, organizations are groups.

use std::{fmt, path::Path, sync::Arc};

use rustls::{
    pki_types::CertificateDer,
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use x509_parser::parse_x509_certificate;

use super::{ClusterCa, TrustError, leaf::crypto_provider};

/// Whoever signs clients' certificates.
#[derive(Clone)]
pub struct ClientCa {
    verifier: Arc<dyn ClientCertVerifier>,
}

impl fmt::Debug for ClientCa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ClientCa").finish_non_exhaustive()
    }
}

impl ClientCa {
    /// Reads a bundle (PEM).
    ///
    /// # Errors
    /// It cannot be read, or holds no CA.
    pub fn load(path: &Path) -> Result<Self, TrustError> {
        let pem =
            std::fs::read(path).map_err(|source| TrustError::ReadFile { path: path.to_owned(), source })?;
        let origin = path.display().to_string();
        let roots = ClusterCa::from_pem(&pem, origin.clone())?.roots();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, crypto_provider())
            // Most clients present a token, and no certificate.
            .allow_unauthenticated()
            .build()
            .map_err(|source| TrustError::ClientCa { origin, reason: source.to_string() })?;
        Ok(Self { verifier })
    }

    /// As rustls wants it.
    pub(super) fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.verifier)
    }
}

/// Whom a certificate names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Common name.
    pub common_name: String,
    /// Organizations.
    pub organizations: Vec<String>,
}

/// Whom a verified certificate names; none if it has no common name, or anything that is not text.
pub fn named(certificate: &CertificateDer<'_>) -> Option<Named> {
    let (_, parsed) = parse_x509_certificate(certificate).ok()?;
    let subject = parsed.subject();
    let mut names = subject.iter_common_name();
    let common_name = names.next()?.as_str().ok()?.to_owned();
    // Two of them, or an empty one: it is not clear whom it names.
    if names.next().is_some() || common_name.is_empty() {
        return None;
    }
    let organizations = subject.iter_organization().map(|name| name.as_str().map(str::to_owned));
    Some(Named { common_name, organizations: organizations.collect::<Result<_, _>>().ok()? })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::{ClientCa, Named, named};

    fn certificate(names: &[(DnType, &str)]) -> rcgen::Certificate {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate")
    }

    #[test]
    fn a_certificate_names_a_user_and_its_groups() {
        let whole = certificate(&[(DnType::CommonName, "ada"), (DnType::OrganizationName, "dev")]);
        let expected = Named { common_name: "ada".into(), organizations: vec!["dev".into()] };
        assert_eq!(named(whole.der()), Some(expected));
        assert_eq!(named(certificate(&[(DnType::OrganizationName, "dev")]).der()), None);
        assert_eq!(named(certificate(&[(DnType::CommonName, "")]).der()), None);
        assert_eq!(named(&vec![1, 2, 3].into()), None);
    }

    #[test]
    fn a_bundle_that_holds_no_ca_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("clients.crt");
        std::fs::write(&path, "nothing").expect("written");
        let error = ClientCa::load(&path).expect_err("no certificate").to_string();
        assert!(error.contains("clients.crt"), "{error}");
        std::fs::write(&path, certificate(&[(DnType::CommonName, "ca")]).pem()).expect("written");
        assert!(ClientCa::load(&path).is_ok());
    }
}
