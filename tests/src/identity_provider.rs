//! A real OpenID provider on loopback, and what a browser does to log in to it.
//!
//! It is zitadel's (`tests/testbed/identity-provider`), and runs only while a test has an [`IdentityProvider`]. It makes its
//! signing key when it starts: to stop it and to start it again is to rotate the key and to withdraw the old one.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};

use crate::certificates::{Authority, Subject};
use crate::command::tail;
use crate::components::GoModule;
use crate::process::RecordedProcess;
use crate::progress::Progress;
use crate::testbed::{Testbed, free_ports};
use crate::wait::wait_until;

/// Name of its binary.
pub const BINARY: &str = "identity-provider";
/// A part of the testbed that also serves without the rest of it.
pub(crate) const MODULE: GoModule = GoModule {
    folder: "identity-provider",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[(BINARY, ".")],
    minutes: 0.5,
};

/// Where it listens, and what its certificate is for.
const ADDRESS: &str = "127.0.0.1";
const HOST: &str = "localhost";

/// It listens within a second; builds may run beside it.
const READY_DEADLINE: Duration = Duration::from_secs(120);
/// Of one exchange with it.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// For it to end by itself.
const GRACE: Duration = Duration::from_secs(3);
/// Most bytes of an answer.
const ANSWER_BYTES_MAX: u64 = 1024 * 1024;

/// Of every user and client; nobody else reaches it.
const SECRET: &str = "for-tests-only";
/// The one that the example's clients may have, encoded. Nobody listens there: a browser would only bring the code.
const REDIRECT: &str = "http%3A%2F%2Flocalhost%3A9999%2Fauth%2Fcallback";

/// An application that users log in to: the audience of its tokens.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Its id.
    pub id: &'static str,
    /// How long after their issue its ID tokens expire; before it, if negative.
    pub lifetime_seconds: i64,
}

/// Who may log in.
#[derive(Clone, Copy, Debug)]
pub struct User {
    /// The subject of the tokens.
    pub id: &'static str,
    /// Whether the provider has verified the email address. If not, its tokens lack the claim.
    pub email_verified: bool,
    /// The claim `groups`.
    pub groups: &'static [&'static str],
}

/// The provider; it ends when this value goes.
#[derive(Debug)]
pub struct IdentityProvider {
    folder: tempfile::TempDir,
    binary: PathBuf,
    port: u16,
    tls: Arc<ClientConfig>,
    process: Option<RecordedProcess>,
}

/// What every provider answers.
const DISCOVERY: &str = "/.well-known/openid-configuration";

/// An answer of HTTP/1.0, whose end is that of the connection.
struct Answer {
    status: u16,
    location: Option<String>,
    body: Vec<u8>,
}

impl IdentityProvider {
    /// Starts the testbed's with these clients and users, on a port that nobody uses.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(testbed: &Testbed, clients: &[Client], users: &[User]) -> Result<Self> {
        Self::start_binary(testbed.components().binary(BINARY), clients, users)
    }

    /// As [`Self::start`], without a testbed; its program is built if it is not there.
    ///
    /// # Errors
    /// When it cannot be built, or does not come up.
    pub fn start_alone(clients: &[Client], users: &[User]) -> Result<Self> {
        Self::start_binary(MODULE.tool(Progress::Shown)?, clients, users)
    }

    fn start_binary(binary: PathBuf, clients: &[Client], users: &[User]) -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a scratch folder")?;
        let [port] = free_ports(ADDRESS)?;
        Authority::create(folder.path(), "weir-testbed-identity-provider")?.sign(&Subject {
            file: "provider",
            common_name: HOST,
            organization: None,
            names: &[HOST],
        })?;
        let clients: Vec<Value> = clients
            .iter()
            .map(|client| json!({"id": client.id, "secret": SECRET, "lifetimeSeconds": client.lifetime_seconds}))
            .collect();
        let users: BTreeMap<&str, Value> = users
            .iter()
            .map(|user| {
                let email = format!("{}@corp.example", user.id);
                let user_json = json!({
                    "password": SECRET, "email": email, "emailVerified": user.email_verified, "groups": user.groups,
                });
                (user.id, user_json)
            })
            .collect();
        let configuration = json!({
            "issuer": format!("https://{HOST}:{port}"),
            "address": format!("{ADDRESS}:{port}"),
            "certificate": folder.path().join("provider.crt"),
            "key": folder.path().join("provider.key"),
            "clients": clients,
            "users": users,
        });
        fs::write(folder.path().join("provider.json"), configuration.to_string())
            .context("cannot write the provider's configuration")?;
        let tls = Arc::new(trusting(&folder.path().join("ca.crt"))?);
        let mut provider = Self { folder, binary, port, tls, process: None };
        provider.resume()?;
        Ok(provider)
    }

    /// Starts it again after [`Self::stop`], at the same URL and with another key.
    ///
    /// # Errors
    /// When it runs, or does not come up.
    pub fn resume(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the identity provider runs already");
        let mut command = Command::new(&self.binary);
        command.arg(self.folder.path().join("provider.json"));
        let process = RecordedProcess::spawn(BINARY, &mut command, &self.log())?;
        self.process = Some(process.clone());
        // An accepted connection would not be enough: what was left of the one before it may take one and reset it.
        wait_until("the identity provider to answer", READY_DEADLINE, || {
            if !process.is_running() {
                bail!("the identity provider has ended:\n{}", tail(&process.log, 10));
            }
            Ok(self.get(DISCOVERY).ok().filter(|answer| answer.status == 200).map(drop))
        })
    }

    /// Ends it: connections to its URL are refused.
    ///
    /// # Errors
    /// When it survives.
    pub fn stop(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |process| process.stop(GRACE))
    }

    /// Its URL, as its tokens have it.
    #[must_use]
    pub fn issuer(&self) -> String {
        format!("https://{HOST}:{}", self.port)
    }

    /// Who vouches for its URL, as PEM.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn certificate_authority(&self) -> Result<String> {
        fs::read_to_string(self.folder.path().join("ca.crt")).context("cannot read the provider's authority")
    }

    /// How often `path` was asked for since it was last started, by its own log.
    ///
    /// # Errors
    /// When its log cannot be read.
    pub fn asked(&self, path: &str) -> Result<usize> {
        let log = fs::read_to_string(self.log()).context("cannot read the provider's log")?;
        let wanted = format!("path={path}");
        Ok(log.lines().filter(|line| line.split(' ').any(|word| word == wanted)).count())
    }

    /// Logs `user` in to `client`, as a browser would, and gives the ID token: OpenID Connect's authorization code flow.
    ///
    /// # Errors
    /// When the provider refuses a step.
    pub fn login(&self, user: &str, client: &str) -> Result<String> {
        let begin = self.get(&format!(
            "/auth?client_id={client}&response_type=code&scope=openid%20email&redirect_uri={REDIRECT}&state=none"
        ))?;
        let id = begin.parameter("authRequestID").context("no login page")?;
        let form = format!("id={id}&username={user}&password={SECRET}");
        let back = self.post("/login/username", "", &form)?.location.context("the login is refused")?;
        let path = back.strip_prefix(&self.issuer()).context("the login leads elsewhere")?;
        let code = self.get(path)?.parameter("code").context("no code")?;
        let secret = BASE64_STANDARD.encode(format!("{client}:{SECRET}"));
        let answer = self.post(
            "/oauth/token",
            &format!("Authorization: Basic {secret}\r\n"),
            &format!("grant_type=authorization_code&code={code}&redirect_uri={REDIRECT}"),
        )?;
        ensure!(answer.status == 200, "no token: {}", String::from_utf8_lossy(&answer.body));
        let tokens: Value = serde_json::from_slice(&answer.body).context("the answer is no JSON")?;
        tokens["id_token"].as_str().map(str::to_owned).context("no ID token")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("provider.log")
    }

    fn get(&self, path: &str) -> Result<Answer> {
        self.exchange(&format!("GET {path} HTTP/1.0\r\nHost: {HOST}:{}\r\n\r\n", self.port))
    }

    fn post(&self, path: &str, headers: &str, form: &str) -> Result<Answer> {
        self.exchange(&format!(
            "POST {path} HTTP/1.0\r\nHost: {HOST}:{}\r\nContent-Type: application/x-www-form-urlencoded\r\n\
             Content-Length: {}\r\n{headers}\r\n{form}",
            self.port,
            form.len(),
        ))
    }

    fn exchange(&self, request: &str) -> Result<Answer> {
        let stream =
            TcpStream::connect((ADDRESS, self.port)).context("the identity provider is not there")?;
        stream.set_read_timeout(Some(EXCHANGE_TIMEOUT)).context("cannot set a timeout")?;
        let name = ServerName::try_from(HOST).context("no name of a server")?;
        let tls = ClientConnection::new(self.tls.clone(), name).context("cannot begin TLS")?;
        let mut stream = StreamOwned::new(tls, stream);
        stream.write_all(request.as_bytes()).context("cannot ask the identity provider")?;
        let mut bytes = Vec::new();
        stream
            .take(ANSWER_BYTES_MAX)
            .read_to_end(&mut bytes)
            .context("the identity provider does not answer")?;
        let end = bytes
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .context("its answer has no end of a head")?;
        let head = String::from_utf8_lossy(&bytes[..end]);
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
        let location = head.lines().find_map(|line| line.strip_prefix("Location: ")).map(str::to_owned);
        Ok(Answer { status, location, body: bytes[end + 4..].to_vec() })
    }
}

impl Answer {
    /// Of the URL that it redirects to.
    fn parameter(&self, name: &str) -> Option<String> {
        let (_, query) = self.location.as_ref()?.split_once('?')?;
        let value = |pair: &str| {
            pair.split_once('=').filter(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
        };
        query.split('&').find_map(value)
    }
}

impl Drop for IdentityProvider {
    fn drop(&mut self) {
        // What survives SIGKILL, nobody can mend here.
        let _ = self.stop();
    }
}

fn trusting(authority: &std::path::Path) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let certificate =
        CertificateDer::from_pem_file(authority).context("cannot read the provider's authority")?;
    roots.add(certificate).context("the provider's authority is none")?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("cannot set up TLS")?
        .with_root_certificates(roots)
        .with_no_client_auth())
}
