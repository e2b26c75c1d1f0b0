//! The testbed's certificate authority, its certificates and the kubeconfigs that use them.
//!
//! The only file of this crate that imports rcgen. One authority signs everything, as kubeadm's cluster CA does
//! for what pods see; keys lie in the testbed's folder (mode 0700) and go with it.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

/// An authority and the folder it writes to.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
}

/// What a certificate says.
pub struct Subject<'a> {
    /// Name of the files: `NAME.crt` and `NAME.key`.
    pub file: &'a str,
    /// Kubernetes reads the user name from here.
    pub common_name: &'a str,
    /// Kubernetes reads the group from here.
    pub organization: Option<&'a str>,
    /// Names and addresses of a server.
    pub names: &'a [&'a str],
}

impl Authority {
    /// Makes a new authority: `ca.crt` and `ca.key` in `folder`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn create(folder: &Path, common_name: &str) -> Result<Self> {
        let key = KeyPair::generate().context("cannot make the authority's key")?;
        let mut params = CertificateParams::new(Vec::new()).context("cannot describe the authority")?;
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        params.not_before = date_time_ymd(2025, 1, 1);
        params.not_after = date_time_ymd(2045, 1, 1);
        let certificate = params.self_signed(&key).context("cannot sign the authority's certificate")?;
        write_private(&folder.join("ca.crt"), &certificate.pem())?;
        write_private(&folder.join("ca.key"), &key.serialize_pem())?;
        Ok(Self { issuer: Issuer::new(params, key), folder: folder.to_owned() })
    }

    /// Signs a certificate for client and server use.
    ///
    /// # Errors
    /// When a name is not a DNS name or a file cannot be written.
    pub fn sign(&self, subject: &Subject<'_>) -> Result<()> {
        let key = KeyPair::generate().context("cannot make a key")?;
        let mut params = CertificateParams::new(Vec::new()).context("cannot describe a certificate")?;
        params.distinguished_name.push(DnType::CommonName, subject.common_name);
        if let Some(organization) = subject.organization {
            params.distinguished_name.push(DnType::OrganizationName, organization);
        }
        params.subject_alt_names =
            subject.names.iter().map(|name| subject_alt_name(name)).collect::<Result<_>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = date_time_ymd(2025, 1, 1);
        params.not_after = date_time_ymd(2045, 1, 1);
        let certificate = params
            .signed_by(&key, &self.issuer)
            .with_context(|| format!("cannot sign the certificate of {}", subject.common_name))?;
        write_private(&self.folder.join(format!("{}.crt", subject.file)), &certificate.pem())?;
        write_private(&self.folder.join(format!("{}.key", subject.file)), &key.serialize_pem())
    }
}

/// A request for a node's serving certificate, as `kubernetes.io/kubelet-serving` takes it: PEM, of a key that is thrown away.
///
/// # Errors
/// When a name is not a DNS name.
pub fn node_request(node: &str, names: &[&str]) -> Result<String> {
    let key = KeyPair::generate().context("cannot make a key")?;
    let mut params = CertificateParams::new(Vec::new()).context("cannot describe a certificate")?;
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{node}"));
    params.subject_alt_names = names.iter().map(|name| subject_alt_name(name)).collect::<Result<_>>()?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let request = params.serialize_request(&key).context("cannot make a request")?;
    request.pem().context("cannot write a request")
}

/// Signs a request with the CA that lies in `folder`, as a signer of the cluster does, for a day: for the names that it asks for, or for these.
///
/// # Errors
/// When a file cannot be read, or the request is none.
pub fn sign_request(folder: &Path, request: &str, names: Option<&[&str]>) -> Result<String> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let key = KeyPair::from_pem(&read("ca.key")?).context("the authority's key is none")?;
    let issuer = Issuer::from_ca_cert_pem(&read("ca.crt")?, key).context("the authority is none")?;
    let mut request = CertificateSigningRequestParams::from_pem(request).context("the request is none")?;
    let now = SystemTime::now();
    request.params.not_before = (now - Duration::from_secs(60)).into();
    request.params.not_after = (now + Duration::from_hours(24)).into();
    if let Some(names) = names {
        request.params.subject_alt_names =
            names.iter().map(|name| subject_alt_name(name)).collect::<Result<_>>()?;
    }
    Ok(request.signed_by(&issuer).context("cannot sign a request")?.pem())
}

fn subject_alt_name(name: &str) -> Result<SanType> {
    Ok(match name.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName(name.try_into().with_context(|| format!("{name} is no DNS name"))?),
    })
}

/// Makes the key pair that service account tokens are signed with: `NAME.key` and `NAME.pub` in `folder`.
///
/// # Errors
/// When a file cannot be written.
pub fn create_key_pair(folder: &Path, name: &str) -> Result<()> {
    let key = KeyPair::generate().context("cannot make a key")?;
    write_private(&folder.join(format!("{name}.key")), &key.serialize_pem())?;
    write_private(&folder.join(format!("{name}.pub")), &key.public_key_pem())
}

/// A kubeconfig for the client certificate `file` of the authority in `pki`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_kubeconfig(to: &Path, server: &str, pki: &Path, file: &str) -> Result<()> {
    let user = serde_json::json!({
        "client-certificate": pki.join(format!("{file}.crt")),
        "client-key": pki.join(format!("{file}.key")),
    });
    write_kubeconfig_of(to, server, pki, file, user)
}

/// A kubeconfig without credentials, for who brings a token, or needs none.
///
/// # Errors
/// When the file cannot be written.
pub fn write_anonymous_kubeconfig(to: &Path, server: &str, pki: &Path) -> Result<()> {
    write_kubeconfig_of(to, server, pki, "anonymous", serde_json::json!({}))
}

fn write_kubeconfig_of(
    to: &Path,
    server: &str,
    pki: &Path,
    name: &str,
    user: serde_json::Value,
) -> Result<()> {
    let content = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "testbed", "cluster": {"server": server, "certificate-authority": pki.join("ca.crt")}}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": name}}],
        "current-context": "testbed",
    });
    write_private(to, &serde_yaml_ng::to_string(&content).context("cannot write a kubeconfig as YAML")?)
}

fn write_private(path: &Path, content: &str) -> Result<()> {
    use std::io::Write;
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).with_context(|| format!("cannot make {}", path.display()))?;
    file.write_all(content.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}
