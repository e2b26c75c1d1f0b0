//! AWS as far as a cluster on EKS needs it: moto as STS behind the real host name, and aws-iam-authenticator as the API server's
//! token webhook, as on EKS.
//!
//! moto checks no signatures, trust policies or web identity tokens; [`front`] checks the signatures of presigned requests,
//! which are what tokens are. The testbed's API server always has the webhook; its server runs only while a rig does.

mod front;
mod presigned;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::certificates::{Authority, Subject};
use crate::command::tail;
use crate::process::RecordedProcess;
use crate::python::MOTO;
use crate::testbed::{AUTHENTICATOR_PORT, Testbed, free_ports};
use crate::wait::wait_until;

pub use front::{Call, Fault};

/// The region whose STS the rig is.
pub const REGION: &str = "eu-central-1";

/// Its host name.
pub const STS_HOST: &str = "sts.eu-central-1.amazonaws.com";

/// Where that name leads: port 443 of a loopback address that nobody else uses.
const STS_ADDRESS: &str = "127.83.84.83";

/// The account that moto knows everything in.
pub const ACCOUNT: &str = "123456789012";

/// Name of the cluster as the authenticator knows it.
pub const CLUSTER: &str = "weir-testbed";

/// moto takes about 3 s to start on an idle core; builds may run beside it.
const READY_DEADLINE: Duration = Duration::from_secs(90);

/// Lines of its log that an error shows.
const LOG_LINES: usize = 10;

/// For a process to end by itself.
const GRACE: Duration = Duration::from_secs(3);

/// An IAM role and who it is in the cluster, as in the ConfigMap `aws-auth`.
#[derive(Clone, Debug)]
pub struct RoleMapping {
    /// The role's name.
    pub role: &'static str,
    /// `{{SessionName}}` stands for the session's.
    pub username: &'static str,
    /// Groups.
    pub groups: &'static [&'static str],
}

/// ARN of a role of [`ACCOUNT`].
#[must_use]
pub fn role_arn(name: &str) -> String {
    format!("arn:aws:iam::{ACCOUNT}:role/{name}")
}

/// moto, the front and the authenticator; all end when this value goes.
#[derive(Debug)]
pub struct AwsRig {
    folder: tempfile::TempDir,
    processes: Vec<RecordedProcess>,
    front: front::Front,
}

impl AwsRig {
    /// Starts all three for `testbed`, with `mappings` in the authenticator.
    ///
    /// # Errors
    /// When one of them does not come up.
    pub fn start(testbed: &Testbed, mappings: &[RoleMapping]) -> Result<Self> {
        let authenticator = testbed.components().binary("aws-iam-authenticator");
        Self::start_with(&testbed.layout().path("pki"), &authenticator, mappings)
    }

    /// The same without a testbed, for an authenticator whose certificate is in `pki`.
    ///
    /// # Errors
    /// When one of them does not come up.
    pub fn start_with(pki: &Path, authenticator: &Path, mappings: &[RoleMapping]) -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a scratch folder")?;
        let authority = Authority::create(folder.path(), "weir-testbed-aws")?;
        authority.sign(&Subject {
            file: "sts",
            common_name: STS_HOST,
            organization: None,
            names: &[STS_HOST],
        })?;
        let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
        fs::write(folder.path().join("hosts"), format!("{hosts}\n{STS_ADDRESS} {STS_HOST}\n"))
            .context("cannot write a hosts file")?;
        let [port] = free_ports("127.0.0.1")?;
        let front = front::Front::start(folder.path(), STS_ADDRESS, port)?;
        let mut rig = Self { folder, processes: Vec::new(), front };
        rig.start_moto(port)?;
        rig.start_authenticator(pki, authenticator, mappings)?;
        rig.wait_for(port, "/moto-api/")?;
        rig.wait_for_authenticator()?;
        Ok(rig)
    }

    fn start_moto(&mut self, port: u16) -> Result<()> {
        let mut moto = Command::new(MOTO.python()?);
        moto.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()]);
        self.spawn("moto", moto.env("MOTO_ACCOUNT_ID", ACCOUNT))
    }

    fn start_authenticator(&mut self, pki: &Path, binary: &Path, mappings: &[RoleMapping]) -> Result<()> {
        let state = self.path("authenticator");
        fs::create_dir(&state).context("cannot make the authenticator's folder")?;
        // The certificate that the API server expects: of the testbed's authority, made when that came up.
        for (from, to) in [("authenticator.crt", "cert.pem"), ("authenticator.key", "key.pem")] {
            fs::copy(pki.join(from), state.join(to))
                .with_context(|| format!("cannot copy {from}; was the testbed started by this version?"))?;
        }
        let roles: Vec<_> = mappings
            .iter()
            .map(|mapping| {
                json!({"roleARN": role_arn(mapping.role), "username": mapping.username, "groups": mapping.groups})
            })
            .collect();
        let configuration = self.path("authenticator.yaml");
        let content = json!({"clusterID": CLUSTER, "server": {"mapRoles": roles}});
        fs::write(&configuration, content.to_string())
            .context("cannot write the authenticator's configuration")?;
        let mut authenticator = self.in_view(binary);
        authenticator.args(["server", "--kubeconfig-pregenerated=true", "--address=127.0.0.1"]);
        authenticator.arg(format!("--port={AUTHENTICATOR_PORT}"));
        authenticator.arg("--config").arg(&configuration).arg("--state-dir").arg(&state);
        // It asks the instance metadata service for its region otherwise.
        self.spawn("aws-iam-authenticator", authenticator.env("AWS_EC2_METADATA_DISABLED", "true"))
    }

    fn spawn(&mut self, name: &str, command: &mut Command) -> Result<()> {
        let log = self.path(&format!("{name}.log"));
        self.processes.push(RecordedProcess::spawn(name, command, &log)?);
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `program` in a mount namespace in which STS's host name leads to the rig, and with an environment in which the rig's
    /// certificate is trusted and there are credentials: as on an EC2 instance with a profile.
    #[must_use]
    pub fn in_view(&self, program: &Path) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "slave", "--", "sh", "-c"]);
        command.arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"").arg(self.path("hosts")).arg(program);
        command.env("SSL_CERT_FILE", self.path("ca.crt"));
        command.env("AWS_ACCESS_KEY_ID", "AKIAWEIRAGENT").env("AWS_SECRET_ACCESS_KEY", "weir-agent-secret");
        command.env_remove("AWS_PROFILE").env_remove("AWS_SESSION_TOKEN").env_remove("AWS_ENDPOINT_URL_STS");
        command
    }

    /// What STS was asked, in order; without secrets and tokens.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.front.calls()
    }

    /// Has STS fail so, until told otherwise; tokens are still checked.
    pub fn fail(&self, fault: Option<Fault>) {
        self.front.fail(fault);
    }

    /// Has credentials that are issued from now on end so early; None: when they are asked to. They are good for no signature
    /// then.
    pub fn credentials_live(&self, life: Option<Duration>) {
        self.front.credentials_live(life);
    }

    /// Whether credentials have ended.
    ///
    /// # Errors
    /// When they were not issued while [`Self::credentials_live`] had them end early.
    pub fn has_expired(&self, access_key_id: &str) -> Result<bool> {
        self.front.has_expired(access_key_id)
    }

    /// Has these credentials be good for nothing, as if they had been taken back.
    pub fn revoke(&self, access_key_id: &str) {
        self.front.revoke(access_key_id);
    }

    /// What the authenticator has logged.
    #[must_use]
    pub fn authenticator_log(&self) -> String {
        fs::read_to_string(self.path("aws-iam-authenticator.log")).unwrap_or_default()
    }

    /// Waits until a server of plain HTTP on loopback answers.
    fn wait_for(&self, port: u16, path: &str) -> Result<()> {
        wait_until(&format!("port {port} to answer"), READY_DEADLINE, || {
            self.check_running()?;
            Ok(answers(port, path).ok())
        })
    }

    fn wait_for_authenticator(&self) -> Result<()> {
        wait_until("aws-iam-authenticator to listen", READY_DEADLINE, || {
            self.check_running()?;
            Ok(TcpStream::connect(("127.0.0.1", AUTHENTICATOR_PORT)).ok().map(|_| ()))
        })
    }

    fn check_running(&self) -> Result<()> {
        if let Some(process) = self.processes.iter().find(|process| !process.is_running()) {
            bail!("{} has ended:\n{}", process.name, tail(&process.log, LOG_LINES));
        }
        Ok(())
    }
}

impl Drop for AwsRig {
    fn drop(&mut self) {
        for process in self.processes.iter().rev() {
            // What survives SIGKILL, nobody can mend here.
            let _ = process.stop(GRACE);
        }
    }
}

fn answers(port: u16, path: &str) -> Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut first = [0; 8];
    stream.read_exact(&mut first)?;
    ensure!(first.starts_with(b"HTTP/1."));
    Ok(())
}
