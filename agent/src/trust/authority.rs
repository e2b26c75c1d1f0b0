//! Who signs Weir's certificates: a mounted CA, the cluster's own signer, or a CA of this process alone.
//!
//! Each gives a leaf for a fresh key; [`Authority::issue`] verifies it as the clients will before handing it on.
//! A mounted CA is read anew for each leaf, so its key is not kept and a rotated CA is picked up by itself.

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::parse_x509_certificate;

use super::{
    ClusterCa, ServingNames, Tier, TrustError,
    client::ClientCa,
    cluster_signer::ClusterSigner,
    leaf::{self, Leaf},
};

/// Life of a leaf that a mounted or ephemeral CA signs.
const LEAF_LIFE: Duration = Duration::from_hours(24);
/// Life of the ephemeral CA: longer than any command under `exec` should run; its key dies with the process.
const EPHEMERAL_CA_LIFE: Duration = Duration::from_hours(30 * 24);
/// Certificates start this much in the past, for clients whose clock is behind.
pub(super) const CLOCK_SKEW: Duration = Duration::from_mins(5);

/// A source of certificates that the clients of one cluster trust.
#[derive(Debug)]
pub enum Authority {
    /// A CA whose certificate and key are files.
    Mounted(MountedCa),
    /// A signer of the cluster itself.
    ClusterSigner(ClusterSigner),
    /// A CA made by this process.
    Ephemeral(EphemeralCa),
}

impl Authority {
    /// How much clients must be told to trust it.
    pub fn tier(&self) -> Tier {
        match self {
            Self::Mounted(ca) => ca.clients.tier(),
            Self::ClusterSigner(_) => Tier::Native,
            Self::Ephemeral(_) => Tier::Ephemeral,
        }
    }

    /// Whether certificates are valid from when this node's clock says, not from when somebody else's does.
    pub(super) fn signs_by_own_clock(&self) -> bool {
        match self {
            Self::Mounted(_) | Self::Ephemeral(_) => true,
            Self::ClusterSigner(_) => false,
        }
    }

    /// Where certificates come from, in words.
    pub fn describe(&self) -> String {
        match self {
            Self::Mounted(ca) => match &ca.clients {
                Clients::Cluster(_) => format!("mounted CA {}", ca.certificate_path.display()),
                Clients::Bundle { path, .. } => {
                    format!(
                        "mounted CA {}, which pods know by {}",
                        ca.certificate_path.display(),
                        path.display()
                    )
                }
            },
            Self::ClusterSigner(signer) => format!("cluster signer {}", signer.name()),
            Self::Ephemeral(_) => "CA of this process".to_owned(),
        }
    }

    /// A new key and a certificate for it that covers `names`, verified as the clients will verify it.
    ///
    /// # Errors
    /// The source gives none, or one that clients would refuse.
    pub async fn issue(&self, names: &ServingNames, clients: Option<&ClientCa>) -> Result<Leaf, TrustError> {
        let key = leaf::generate_key()?;
        let (chain, cluster_ca) = match self {
            Self::Mounted(ca) => (ca.sign(&key, names)?, ca.clients.ca()?),
            Self::ClusterSigner(signer) => {
                let request = leaf::signing_request(&key, names, &signer.subject())?;
                (signer.sign(&request).await?, Cow::Borrowed(signer.cluster_ca()))
            }
            Self::Ephemeral(ca) => (ca.sign(&key, names)?, Cow::Borrowed(&ca.trusted)),
        };
        cluster_ca.verify(&chain, names)?;
        Leaf::new(key, chain, clients)
    }
}

/// A CA whose certificate and key are mounted as files.
pub struct MountedCa {
    certificate_path: PathBuf,
    key_path: PathBuf,
    clients: Clients,
}

/// What clients judge certificates by.
enum Clients {
    /// The cluster's own CA, which pods hold anyway.
    Cluster(ClusterCa),
    /// A bundle that pods are given in its place, as a file that is read anew for each certificate, as the CA is.
    Bundle { path: PathBuf, cluster: ClusterCa },
}

impl Clients {
    fn tier(&self) -> Tier {
        match self {
            Self::Cluster(_) => Tier::Native,
            Self::Bundle { .. } => Tier::Bundle,
        }
    }

    /// The CA by which they judge.
    fn ca(&self) -> Result<Cow<'_, ClusterCa>, TrustError> {
        let (path, cluster) = match self {
            Self::Cluster(ca) => return Ok(Cow::Borrowed(ca)),
            Self::Bundle { path, cluster } => (path, cluster),
        };
        let pem =
            std::fs::read(path).map_err(|source| TrustError::ReadFile { path: path.clone(), source })?;
        let bundle = ClusterCa::from_pem(&pem, path.display().to_string())?;
        if !bundle.holds(cluster) {
            return Err(TrustError::BundleLacksCluster {
                path: path.clone(),
                origin: cluster.origin.clone(),
            });
        }
        Ok(Cow::Owned(bundle))
    }
}

impl fmt::Debug for MountedCa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("MountedCa")
            .field("certificate", &self.certificate_path)
            .finish_non_exhaustive()
    }
}

impl MountedCa {
    /// Reads the files and verifies that the CA chains to `cluster_ca`, or to the `bundle` that pods are given in its place, by
    /// signing a certificate for nobody.
    ///
    /// # Errors
    /// A file cannot be read or parsed, they do not belong together, or pods would not trust this CA; the error
    /// names the file and the mend.
    pub fn load(
        (certificate, key): (&Path, &Path),
        bundle: Option<&Path>,
        cluster_ca: ClusterCa,
    ) -> Result<Self, TrustError> {
        let clients = match bundle {
            None => Clients::Cluster(cluster_ca),
            Some(path) => Clients::Bundle { path: path.to_owned(), cluster: cluster_ca },
        };
        let ca = Self { certificate_path: certificate.into(), key_path: key.into(), clients };
        let judge = ca.clients.ca()?;
        let probe_key = leaf::generate_key()?;
        let mut probe_names = ServingNames::default();
        probe_names.add_host("probe.weir.invalid");
        let chain = ca.sign(&probe_key, &probe_names)?;
        judge.verify(&chain, &probe_names).map_err(|source| TrustError::CaNotChained {
            path: certificate.into(),
            origin: judge.origin.clone(),
            source: Box::new(source),
        })?;
        drop(judge);
        Ok(ca)
    }

    fn sign(&self, key: &KeyPair, names: &ServingNames) -> Result<Vec<CertificateDer<'static>>, TrustError> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|source| TrustError::ReadFile { path: path.into(), source })
        };
        let unusable =
            |reason: String| TrustError::CaCertificate { path: self.certificate_path.clone(), reason };
        let bundle = CertificateDer::pem_slice_iter(&read(&self.certificate_path)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| unusable(error.to_string()))?;
        let issuer_der = bundle.first().ok_or_else(|| unusable("it holds no certificate".to_owned()))?;
        let (_, parsed) = parse_x509_certificate(issuer_der).map_err(|error| unusable(error.to_string()))?;
        if !parsed.is_ca() {
            return Err(unusable("its first certificate is not a CA certificate".to_owned()));
        }

        let ca_key = String::from_utf8(read(&self.key_path)?)
            .ok()
            .and_then(|pem| KeyPair::from_pem(&pem).ok())
            .ok_or_else(|| TrustError::CaKey { path: self.key_path.clone() })?;
        if ca_key.subject_public_key_info() != parsed.public_key().raw {
            return Err(TrustError::CaKeyMismatch {
                key: self.key_path.clone(),
                certificate: self.certificate_path.clone(),
            });
        }

        let ca_end = leaf::from_unix_seconds(parsed.validity().not_after.timestamp());
        let issuer = Issuer::from_ca_cert_der(issuer_der, ca_key)
            .map_err(|source| TrustError::Generate { what: "an issuer of the mounted CA", source })?;
        let leaf = sign_leaf(&issuer, key, names, ca_end)?;
        // Roots are what the client has already; intermediates it needs.
        let intermediates = bundle.iter().filter(|der| {
            parse_x509_certificate(der).is_ok_and(|(_, ca)| ca.subject().as_raw() != ca.issuer().as_raw())
        });
        Ok(std::iter::once(leaf).chain(intermediates.cloned()).collect())
    }
}

/// A CA of this process: only who is given [`EphemeralCa::certificate_pem`] trusts it.
pub struct EphemeralCa {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    not_after: SystemTime,
    trusted: ClusterCa,
}

impl fmt::Debug for EphemeralCa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("EphemeralCa").finish_non_exhaustive()
    }
}

impl EphemeralCa {
    /// Makes a key and a self-signed certificate for it.
    ///
    /// # Errors
    /// The crypto library refuses (no entropy).
    pub fn generate() -> Result<Self, TrustError> {
        let failed = |source| TrustError::Generate { what: "the ephemeral CA", source };
        let key = leaf::generate_key()?;
        let not_after = SystemTime::now() + EPHEMERAL_CA_LIFE;
        let mut params = CertificateParams::default();
        params.distinguished_name =
            leaf::distinguished_name(&[(DnType::CommonName, "weir exec ephemeral CA")]);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.not_before = (SystemTime::now() - CLOCK_SKEW).into();
        params.not_after = not_after.into();
        let certificate_pem = params.self_signed(&key).map_err(failed)?.pem();
        let trusted = ClusterCa::from_pem(certificate_pem.as_bytes(), "ephemeral CA")?;
        Ok(Self { issuer: Issuer::new(params, key), certificate_pem, not_after, trusted })
    }

    /// What a client must add to its CA bundle.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    fn sign(&self, key: &KeyPair, names: &ServingNames) -> Result<Vec<CertificateDer<'static>>, TrustError> {
        Ok(vec![sign_leaf(&self.issuer, key, names, self.not_after)?])
    }
}

/// Whose a certificate says that it is. Nobody names a CA so: OpenSSL takes one that is named as its issuer for signed by itself.
const LEAF_NAME: &str = "serving certificate of Weir's agent";

/// Signs a serving certificate for `key` that ends before its issuer does.
fn sign_leaf(
    issuer: &Issuer<'_, KeyPair>,
    key: &KeyPair,
    names: &ServingNames,
    issuer_end: SystemTime,
) -> Result<CertificateDer<'static>, TrustError> {
    let now = SystemTime::now();
    let mut params = leaf::serving_params(names, &[(DnType::CommonName, LEAF_NAME)])?;
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + LEAF_LIFE).min(issuer_end).into();
    params.use_authority_key_identifier_extension = true;
    let certificate = params
        .signed_by(key, issuer)
        .map_err(|source| TrustError::Generate { what: "a serving certificate", source })?;
    Ok(certificate.der().clone())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A CA as files: what an operator mounts.
    pub(crate) struct CaFiles {
        pub(crate) folder: tempfile::TempDir,
        pub(crate) certificate_pem: String,
        issuer: Issuer<'static, KeyPair>,
    }

    impl CaFiles {
        fn write(params: CertificateParams, key: KeyPair, certificate_pem: String) -> Self {
            let folder = tempfile::tempdir().expect("temporary folder");
            std::fs::write(folder.path().join("ca.crt"), &certificate_pem).expect("write");
            std::fs::write(folder.path().join("ca.key"), key.serialize_pem()).expect("write");
            Self { folder, certificate_pem, issuer: Issuer::new(params, key) }
        }

        fn params(name: &str) -> CertificateParams {
            let mut params = CertificateParams::default();
            params.distinguished_name = leaf::distinguished_name(&[(DnType::CommonName, name)]);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params
        }

        pub(crate) fn root() -> Self {
            let (params, key) = (Self::params("root"), KeyPair::generate().expect("key"));
            let pem = params.self_signed(&key).expect("self-signed").pem();
            Self::write(params, key, pem)
        }

        /// A certificate for `name` that is valid from the first day of one year to that of another.
        pub(crate) fn signed(&self, name: &str, (from, to): (i32, i32)) -> CertificateDer<'static> {
            let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
            params.not_before = rcgen::date_time_ymd(from, 1, 1);
            params.not_after = rcgen::date_time_ymd(to, 1, 1);
            let key = KeyPair::generate().expect("key");
            params.signed_by(&key, &self.issuer).expect("signed").der().clone()
        }

        fn intermediate(&self) -> Self {
            let (params, key) = (Self::params("intermediate"), KeyPair::generate().expect("key"));
            let pem = params.signed_by(&key, &self.issuer).expect("signed").pem();
            Self::write(params, key, pem)
        }

        fn load(&self, cluster_ca: &Self) -> Result<MountedCa, TrustError> {
            let trusted = ClusterCa::from_pem(cluster_ca.certificate_pem.as_bytes(), "pods' ca.crt")?;
            self.load_for(None, trusted)
        }

        fn load_for(&self, bundle: Option<&Path>, cluster: ClusterCa) -> Result<MountedCa, TrustError> {
            let file = |name: &str| self.folder.path().join(name);
            MountedCa::load((&file("ca.crt"), &file("ca.key")), bundle, cluster)
        }
    }

    fn names() -> ServingNames {
        ServingNames::of_own_cluster([
            "10.96.0.1".parse().expect("address"),
            "fd00::1".parse().expect("address"),
        ])
    }

    #[tokio::test]
    async fn the_clusters_own_ca_and_its_intermediate_are_trusted() {
        let root = CaFiles::root();
        for ca in [root.load(&root), root.intermediate().load(&root)] {
            // The files of the intermediate are gone by now: only load had to work for it.
            ca.expect("loads");
        }
        let intermediate = root.intermediate();
        let authority = Authority::Mounted(intermediate.load(&root).expect("loads"));
        let leaf = authority.issue(&names(), None).await.expect("issues");
        assert_eq!(authority.tier(), Tier::Native);
        assert!(leaf.not_after() > SystemTime::now() + LEAF_LIFE / 2);
    }

    #[test]
    fn a_ca_that_does_not_chain_is_named_with_its_file() {
        let (cluster, other) = (CaFiles::root(), CaFiles::root());
        let error = other.load(&cluster).expect_err("must be refused").to_string();
        assert!(error.contains("ca.crt does not chain to pods' ca.crt"), "{error}");
    }

    #[tokio::test]
    async fn a_ca_of_its_own_serves_pods_that_are_given_a_bundle_with_it_and_the_clusters() {
        let (cluster, own) = (CaFiles::root(), CaFiles::root());
        let trusted =
            || ClusterCa::from_pem(cluster.certificate_pem.as_bytes(), "pods' ca.crt").expect("a CA");
        let bundle = own.folder.path().join("bundle.crt");
        let write = |cas: &[&CaFiles]| {
            let pem: String = cas.iter().map(|ca| ca.certificate_pem.as_str()).collect();
            std::fs::write(&bundle, pem).expect("write");
        };
        let refused = || own.load_for(Some(&bundle), trusted()).expect_err("must be refused").to_string();
        assert!(refused().contains("cannot read"), "{}", refused());
        write(&[&own]);
        assert!(refused().contains("bundle.crt lacks a certificate of pods' ca.crt"), "{}", refused());
        write(&[&cluster]);
        assert!(
            refused().contains("ca.crt does not chain to") && refused().contains("bundle.crt"),
            "{}",
            refused()
        );
        write(&[&cluster, &own]);
        let authority = Authority::Mounted(own.load_for(Some(&bundle), trusted()).expect("loads"));
        assert_eq!(authority.tier(), Tier::Bundle);
        authority.issue(&names(), None).await.expect("issues");
        // It is what pods have at the time that counts.
        write(&[&cluster]);
        authority.issue(&names(), None).await.expect_err("pods would refuse it");
    }

    #[test]
    fn a_key_of_another_ca_is_named_with_its_file() {
        let (cluster, other) = (CaFiles::root(), CaFiles::root());
        std::fs::copy(other.folder.path().join("ca.key"), cluster.folder.path().join("ca.key"))
            .expect("copy");
        let error = cluster.load(&cluster).expect_err("must be refused").to_string();
        assert!(error.contains("ca.key is not the private key of"), "{error}");
    }

    #[test]
    fn files_that_are_missing_or_garbage_are_named() {
        let cluster = CaFiles::root();
        let key = cluster.folder.path().join("ca.key");
        std::fs::write(&key, "garbage").expect("write");
        assert!(cluster.load(&cluster).expect_err("garbage").to_string().contains("ca.key is not a PEM"));
        std::fs::remove_file(&key).expect("remove");
        assert!(cluster.load(&cluster).expect_err("missing").to_string().contains("cannot read"));
        std::fs::write(cluster.folder.path().join("ca.crt"), "garbage").expect("write");
        assert!(
            cluster.load(&cluster).expect_err("no certificate").to_string().contains("holds no certificate")
        );
    }

    #[tokio::test]
    async fn an_ephemeral_ca_is_trusted_by_who_is_given_it_and_by_nobody_else() {
        let ephemeral = EphemeralCa::generate().expect("generates");
        let pem = ephemeral.certificate_pem().to_owned();
        let key = leaf::generate_key().expect("key");
        let chain = ephemeral.sign(&key, &names()).expect("signs");
        ClusterCa::from_pem(pem.as_bytes(), "given")
            .expect("bundle")
            .verify(&chain, &names())
            .expect("trusted");

        let stranger = CaFiles::root();
        let other = ClusterCa::from_pem(stranger.certificate_pem.as_bytes(), "other").expect("bundle");
        other.verify(&chain, &names()).expect_err("must not be trusted");

        let mut more = names();
        more.add_host("elsewhere.example");
        let given = ClusterCa::from_pem(pem.as_bytes(), "given").expect("bundle");
        let error = given.verify(&chain, &more).expect_err("lacks a name").to_string();
        assert!(error.contains("elsewhere.example"), "{error}");
        assert!(!format!("{:?}", Authority::Ephemeral(ephemeral)).contains("PRIVATE"));
    }
}
