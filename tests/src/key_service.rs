//! AWS KMS for the tests: local-kms, which wraps and unwraps with encryption contexts, disables keys and says no as KMS does. It checks
//! no signatures and no policies. No part of the testbed.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    command::tail, components::GoModule, process::RecordedProcess, progress::Progress, testbed::free_ports,
    wait::wait_until,
};

pub(crate) static LOCAL_KMS: GoModule = GoModule {
    folder: "local-kms",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("local-kms", "github.com/nsmithuk/local-kms")],
    minutes: 0.5,
};

/// The key that it begins with.
const KEY: &str = "bc436485-5092-42b8-92a3-0aa8b93536dc";
const REGION: &str = "eu-central-1";
const ACCOUNT: &str = "123456789012";
/// File in its folder that names the key.
const SEED: &str = "seed.yaml";
const READY_DEADLINE: Duration = Duration::from_secs(120);
/// For it to end by itself.
const GRACE: Duration = Duration::from_secs(3);
/// Lines of its log that an error shows.
const LOG_LINES: usize = 10;

/// The service with one key; it ends when this value goes.
#[derive(Debug)]
pub struct KeyService {
    binary: PathBuf,
    process: RecordedProcess,
    address: String,
    folder: tempfile::TempDir,
}

impl KeyService {
    /// Builds it, if it is not there, and starts it.
    ///
    /// # Errors
    /// There is no Go, or it does not come up.
    pub fn start(progress: Progress) -> Result<Self> {
        let binary = LOCAL_KMS.tool(progress)?;
        let folder = tempfile::tempdir().context("cannot make a scratch folder")?;
        let backing = "5cdaead27fe7da2de47945d73cd6d79e36494e73802f3cd3869f1d2cb0b5d7a9";
        let keys = format!(
            "{{Keys: {{Symmetric: {{Aes: [{{Metadata: {{KeyId: {KEY}}}, BackingKeys: [{backing}]}}]}}}}}}\n"
        );
        fs::write(folder.path().join(SEED), keys).context("cannot write its keys")?;
        let [port] = free_ports("127.0.0.1")?;
        let process = spawn(&binary, folder.path(), port)?;
        let address = format!("127.0.0.1:{port}");
        let service = Self { binary, process, address, folder };
        service.wait_until_it_answers()?;
        Ok(service)
    }

    /// Starts it again where it was, with the same key.
    ///
    /// # Errors
    /// It does not come up.
    pub fn restart(&mut self) -> Result<()> {
        let port = self.address.rsplit(':').next().and_then(|port| port.parse().ok());
        self.process = spawn(&self.binary, self.folder.path(), port.context("it has no port")?)?;
        self.wait_until_it_answers()
    }

    fn wait_until_it_answers(&self) -> Result<()> {
        wait_until("local-kms to answer", READY_DEADLINE, || {
            if !self.process.is_running() {
                bail!("local-kms has ended:\n{}", tail(&self.process.log, LOG_LINES));
            }
            Ok(self.call("DescribeKey").ok())
        })
    }

    /// ARN of its key.
    #[must_use]
    pub fn key(&self) -> String {
        format!("arn:aws:kms:{REGION}:{ACCOUNT}:key/{KEY}")
    }

    /// Environment in which KMS is this one, and there are credentials.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let own = |(name, value): (&'static str, &str)| (name, value.to_owned());
        let credentials = [
            ("AWS_ACCESS_KEY_ID", "AKIAWEIR"),
            ("AWS_SECRET_ACCESS_KEY", "weir-secret"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ];
        let endpoint = ("AWS_ENDPOINT_URL_KMS", format!("http://{}", self.address));
        credentials.map(own).into_iter().chain([endpoint]).collect()
    }

    /// Disables its key, or enables it.
    ///
    /// # Errors
    /// It does not.
    pub fn enable(&self, enabled: bool) -> Result<()> {
        self.call(if enabled { "EnableKey" } else { "DisableKey" })
    }

    /// Ends it; nobody answers at its address then.
    ///
    /// # Errors
    /// It survives SIGKILL.
    pub fn stop(&self) -> Result<()> {
        self.process.stop(GRACE)
    }

    fn call(&self, action: &str) -> Result<()> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let body = format!("{{\"KeyId\":\"{KEY}\"}}");
        write!(
            stream,
            "POST / HTTP/1.0\r\nHost: kms\r\nContent-Type: application/x-amz-json-1.1\r\nX-Amz-Target: TrentService.{action}\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if !answer.split("\r\n").next().unwrap_or_default().contains(" 200") {
            bail!("{action}: {answer}");
        }
        Ok(())
    }
}

fn spawn(binary: &Path, folder: &Path, port: u16) -> Result<RecordedProcess> {
    let mut command = Command::new(binary);
    command.env("PORT", port.to_string()).env("KMS_REGION", REGION).env("KMS_ACCOUNT_ID", ACCOUNT);
    command.env("KMS_SEED_PATH", folder.join(SEED)).env("KMS_DATA_PATH", folder.join("data"));
    RecordedProcess::spawn("local-kms", &mut command, &folder.join("local-kms.log"))
}

impl Drop for KeyService {
    fn drop(&mut self) {
        // What survives SIGKILL, nobody can mend here.
        let _ = self.process.stop(GRACE);
    }
}
