//! Certificates that clients trust as they are: who signs (authority), how they are kept fresh (leaf).
//!
//! The proxy sees one thing of it, [`ServingCertificate`]. Whatever an authority hands out is verified against
//! the CA that the clients hold before it is served: a certificate that they would refuse never gets that far.
//! Private keys are made here, live in memory only and have no `Debug`. Nothing here knows connections.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, sync::Arc, time::SystemTime};

use rustls::{
    CertificateError, RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};

pub mod approvals;
pub mod approver;
pub mod authority;
pub mod client;
pub mod cluster_signer;
pub mod leaf;
#[doc(hidden)]
pub mod probe;
pub mod request;

pub use authority::Authority;
pub use leaf::{Renewal, serve};

/// Names that a cluster's own clients use for its API server, whatever its addresses are.
const CLUSTER_DNS_NAMES: [&str; 4] =
    ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];

/// What the proxy needs of trust: a TLS server configuration for the cluster that the client dialled, with
/// ALPN `h2` and `http/1.1`, whose certificate is renewed behind it.
#[derive(Clone, Debug)]
pub struct ServingCertificate {
    current: Arc<arc_swap::ArcSwap<rustls::ServerConfig>>,
    not_after: Arc<arc_swap::ArcSwap<SystemTime>>,
}

impl ServingCertificate {
    /// Wraps the first configuration, whose certificate is valid until `not_after`.
    pub fn new(config: Arc<rustls::ServerConfig>, not_after: SystemTime) -> Self {
        Self {
            current: Arc::new(arc_swap::ArcSwap::new(config)),
            not_after: Arc::new(arc_swap::ArcSwap::from_pointee(not_after)),
        }
    }

    /// The configuration for the next handshake.
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        self.current.load_full()
    }

    /// End of the validity of the certificate in place.
    pub fn not_after(&self) -> SystemTime {
        **self.not_after.load()
    }

    /// Puts a renewed certificate in place; running connections keep theirs.
    pub fn replace(&self, config: Arc<rustls::ServerConfig>, not_after: SystemTime) {
        self.current.store(config);
        self.not_after.store(Arc::new(not_after));
    }
}

/// How much a cluster's clients had to be told before they trust Weir's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// T0: the certificate chains to the CA that the clients hold anyway.
    Native,
    /// T1: pods are given a bundle in the place of the CA that they would hold.
    Bundle,
    /// A CA of this process alone, known only to the command under `weir-agent exec`.
    Ephemeral,
}

impl Tier {
    /// The name that reports use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "T0",
            Self::Bundle => "T1",
            Self::Ephemeral => "ephemeral",
        }
    }
}

/// The names and addresses under which clients reach an API server: what a certificate must cover.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServingNames {
    /// DNS names, lower case.
    pub dns: BTreeSet<String>,
    /// Addresses: clients that dial an address send no SNI, so these must be in the certificate.
    pub addresses: BTreeSet<IpAddr>,
}

impl ServingNames {
    /// Of the cluster that the agent's own pods belong to: its well-known names and `addresses` (ClusterIPs and
    /// endpoints of `default/kubernetes`).
    pub fn of_own_cluster(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        Self {
            dns: CLUSTER_DNS_NAMES.into_iter().map(str::to_owned).collect(),
            addresses: addresses.into_iter().collect(),
        }
    }

    /// Adds a host as it stands in a URL: a DNS name or an address, IPv6 with or without brackets.
    pub fn add_host(&mut self, host: &str) {
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        match bare.parse() {
            Ok(address) => {
                self.addresses.insert(address);
            }
            Err(_) => {
                self.dns.insert(bare.trim_end_matches('.').to_ascii_lowercase());
            }
        }
    }

    /// All of them, for messages and for a certificate's subject alternative names.
    pub fn all(&self) -> impl Iterator<Item = String> + '_ {
        self.dns.iter().cloned().chain(self.addresses.iter().map(IpAddr::to_string))
    }
}

/// The CA bundle by which a cluster's clients judge its API server (`ca.crt` of the pods).
#[derive(Clone, Debug)]
pub struct ClusterCa {
    roots: Arc<RootCertStore>,
    origin: String,
}

impl ClusterCa {
    /// Reads a bundle; `origin` (a path, for example) names it in errors.
    ///
    /// # Errors
    /// It holds no certificate, or one that is none.
    pub fn from_pem(pem: &[u8], origin: impl Into<String>) -> Result<Self, TrustError> {
        let origin = origin.into();
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate =
                certificate.map_err(|source| TrustError::CaBundlePem { origin: origin.clone(), source })?;
            roots
                .add(certificate)
                .map_err(|source| TrustError::CaBundleCertificate { origin: origin.clone(), source })?;
        }
        if roots.is_empty() {
            return Err(TrustError::CaBundleEmpty { origin });
        }
        Ok(Self { roots: Arc::new(roots), origin })
    }

    /// Takes certificates in DER; `origin` names where they come from in errors.
    ///
    /// # Errors
    /// There is none, or one that is no certificate.
    pub fn from_der<'a>(
        certificates: impl IntoIterator<Item = &'a [u8]>,
        origin: impl Into<String>,
    ) -> Result<Self, TrustError> {
        let origin = origin.into();
        let mut roots = RootCertStore::empty();
        for certificate in certificates {
            roots
                .add(CertificateDer::from(certificate.to_vec()))
                .map_err(|source| TrustError::CaBundleCertificate { origin: origin.clone(), source })?;
        }
        if roots.is_empty() {
            return Err(TrustError::CaBundleEmpty { origin });
        }
        Ok(Self { roots: Arc::new(roots), origin })
    }

    /// The certificates as rustls wants them.
    pub fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.roots)
    }

    /// Whether all of another's certificates are in this one.
    pub fn holds(&self, other: &Self) -> bool {
        other.roots.roots.iter().all(|root| self.roots.roots.contains(root))
    }

    /// Verifies `chain` (leaf first) as a client would that dials each of `names`.
    ///
    /// # Errors
    /// The chain does not lead to this CA, is not valid now, or lacks one of the names.
    pub fn verify(&self, chain: &[CertificateDer<'_>], names: &ServingNames) -> Result<(), TrustError> {
        let Some((leaf, intermediates)) = chain.split_first() else {
            return Err(TrustError::EmptyChain);
        };
        let verifier = WebPkiServerVerifier::builder_with_provider(self.roots(), leaf::crypto_provider())
            .build()
            .map_err(|source| TrustError::Verifier { origin: self.origin.clone(), source })?;
        for name in names.all() {
            let server_name = ServerName::try_from(name.clone())
                .map_err(|_invalid| TrustError::InvalidName { name: name.clone() })?;
            verifier
                .verify_server_cert(leaf, intermediates, &server_name, &[], UnixTime::now())
                .map_err(|source| self.refused(name, source))?;
        }
        Ok(())
    }

    /// What is wrong with a certificate that a client which dials `name` would refuse.
    fn refused(&self, name: String, source: rustls::Error) -> TrustError {
        use CertificateError as Refused;
        match &source {
            rustls::Error::InvalidCertificate(
                Refused::NotValidForName | Refused::NotValidForNameContext { .. },
            ) => TrustError::NotFor { name, source },
            rustls::Error::InvalidCertificate(
                Refused::NotValidYet
                | Refused::NotValidYetContext { .. }
                | Refused::Expired
                | Refused::ExpiredContext { .. },
            ) => TrustError::NotNow { source },
            _ => TrustError::NotTrusted { name, origin: self.origin.clone(), source },
        }
    }
}

/// Why there is no certificate that clients would trust.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file of a mounted CA cannot be read.
    #[error("cannot read {}; does the file exist and may the agent read it?", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A CA bundle is not PEM.
    #[error("the CA bundle {origin} is not valid PEM")]
    CaBundlePem {
        /// Where it comes from.
        origin: String,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// A CA bundle holds something that is no certificate.
    #[error("the CA bundle {origin} holds a certificate that cannot be parsed")]
    CaBundleCertificate {
        /// Where it comes from.
        origin: String,
        /// Why.
        source: rustls::Error,
    },
    /// A CA bundle without certificates.
    #[error("the CA bundle {origin} holds no certificate; it must be the cluster's ca.crt in PEM")]
    CaBundleEmpty {
        /// Where it comes from.
        origin: String,
    },
    /// A CA bundle that clients' certificates cannot be verified with.
    #[error("clients' certificates cannot be verified with the CA bundle {origin}: {reason}")]
    ClientCa {
        /// Where it comes from.
        origin: String,
        /// Why not.
        reason: String,
    },
    /// The mounted CA's certificate file is not usable.
    #[error("{} is not a PEM file with the certificate of the CA that signs (first) and its intermediates: {reason}", path.display())]
    CaCertificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The mounted CA's key file is not usable.
    #[error("{} is not a PEM private key (PKCS#8, PKCS#1 or SEC1, not encrypted)", path.display())]
    CaKey {
        /// The file.
        path: PathBuf,
    },
    /// Key and certificate of the mounted CA do not belong together.
    #[error("{} is not the private key of {}; mount the pair that belongs together", key.display(), certificate.display())]
    CaKeyMismatch {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        certificate: PathBuf,
    },
    /// The mounted CA is not one that pods trust.
    #[error(
        "{} does not chain to {origin}, so pods would refuse every connection; mount the cluster's \
         own CA or an intermediate that it signed, or give pods a bundle (`clientBundle`)",
        path.display()
    )]
    CaNotChained {
        /// The certificate file.
        path: PathBuf,
        /// The cluster CA.
        origin: String,
        /// What a client would say.
        source: Box<TrustError>,
    },
    /// Who is given the bundle could not verify the API server itself.
    #[error(
        "{} lacks a certificate of {origin}, so pods could not verify the API server where Weir does not stand between; put \
         the cluster's ca.crt into it, beside Weir's CA",
        path.display()
    )]
    BundleLacksCluster {
        /// The bundle.
        path: PathBuf,
        /// The cluster CA.
        origin: String,
    },
    /// A key or certificate could not be made.
    #[error("cannot make {what}")]
    Generate {
        /// What.
        what: &'static str,
        /// Why.
        source: rcgen::Error,
    },
    /// rustls refuses the key or the certificate.
    #[error("cannot make a TLS server configuration of the certificate")]
    ServerConfig {
        /// Why.
        source: rustls::Error,
    },
    /// The verifier cannot be made of the CA bundle.
    #[error("the CA bundle {origin} cannot be used to verify")]
    Verifier {
        /// Where the bundle comes from.
        origin: String,
        /// Why.
        source: rustls::client::VerifierBuilderError,
    },
    /// An authority handed out nothing.
    #[error("the authority returned an empty certificate chain")]
    EmptyChain,
    /// A certificate that cannot be parsed.
    #[error("the authority returned a certificate that cannot be parsed: {reason}")]
    Unparsable {
        /// Why.
        reason: String,
    },
    /// Not a DNS name or address.
    #[error("{name:?} is neither a DNS name nor an address; correct the cluster's host names")]
    InvalidName {
        /// The name.
        name: String,
    },
    /// What an authority handed out would be refused by the clients.
    #[error(
        "clients that dial {name} and trust {origin} would refuse the certificate; is that CA the one in the pods' \
         kube-root-ca.crt, and did it (or an intermediate of it) sign?"
    )]
    NotTrusted {
        /// The name or address.
        name: String,
        /// The CA bundle.
        origin: String,
        /// What a client would say.
        source: rustls::Error,
    },
    /// It is of another time: that of the signer's clock, or that of a CA which has ended.
    #[error(
        "the certificate that was issued, or a CA above it, is not valid at this time; is the clock of this node right, and the signer's, \
         and has no CA of it ended?"
    )]
    NotNow {
        /// What a client would say.
        source: rustls::Error,
    },
    /// It is of the right CA, and for others.
    #[error(
        "the certificate that was issued is not for {name}; the signer must leave in all names that are asked for: does it know \
         the API server by that name, and is it the right one (trust.clusterSigner.signerName)?"
    )]
    NotFor {
        /// The name or address.
        name: String,
        /// What a client would say.
        source: rustls::Error,
    },
    /// The cluster's signer gave no certificate.
    #[error(transparent)]
    ClusterSigner(#[from] cluster_signer::ClusterSignerError),
    /// The certificate has no time left.
    #[error("the certificate is valid until {not_after:?} only; is the clock of this node right?")]
    Expired {
        /// End of its validity.
        not_after: SystemTime,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_become_dns_names_or_addresses() {
        let mut names = ServingNames::default();
        for host in ["API.example.com.", "10.0.0.1", "[fd00::1]", "::1"] {
            names.add_host(host);
        }
        assert_eq!(names.all().collect::<Vec<_>>(), ["api.example.com", "10.0.0.1", "::1", "fd00::1"]);
    }

    #[test]
    fn a_certificate_of_another_time_asks_for_the_clock_and_one_of_another_ca_for_the_ca() {
        let (own, other) = (authority::tests::CaFiles::root(), authority::tests::CaFiles::root());
        let trusted = ClusterCa::from_pem(own.certificate_pem.as_bytes(), "ca.crt").expect("a bundle");
        let mut names = ServingNames::default();
        names.add_host("kubernetes");
        let said = |ca: &authority::tests::CaFiles, name, years| {
            trusted.verify(&[ca.signed(name, years)], &names).map_err(|error| error.to_string())
        };
        assert_eq!(said(&own, "kubernetes", (2000, 2100)), Ok(()));
        for years in [(2000, 2001), (2100, 2101)] {
            let error = said(&own, "kubernetes", years).expect_err("not valid now");
            assert!(error.contains("is the clock of this node right, and the signer's"), "{error}");
        }
        let error = said(&other, "kubernetes", (2000, 2100)).expect_err("of another CA");
        assert!(error.contains("is that CA the one in the pods'"), "{error}");
        let error = said(&own, "others", (2000, 2100)).expect_err("for another name");
        assert!(error.contains("is not for kubernetes"), "{error}");
    }

    #[test]
    fn a_bundle_without_certificates_is_refused() {
        let error = ClusterCa::from_pem(b"# nothing\n", "/etc/ca.crt").expect_err("must be refused");
        assert!(error.to_string().contains("/etc/ca.crt"), "{error}");
    }
}
