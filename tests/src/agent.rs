//! The node agent as a real process: the built binary with a configuration file, its readiness, end and journal.
//!
//! Tests and the demo never call the agent's code; they see what a node's operator sees.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use weir_common::event::Event;

use crate::aws::AwsRig;
use crate::command::{output, run, tail};
use crate::testbed::{NODE_NAME, Testbed};
use crate::wait::wait_until;

/// Loading kernel programs, a certificate from the cluster, the first list of pods; the machine may be slow, and busy.
const READY_DEADLINE: Duration = Duration::from_secs(180);

/// The agent's own drain limit is 30 s by default; the machine may be slow, and busy.
const END_DEADLINE: Duration = Duration::from_secs(120);

/// Lines of its log that an error shows.
const LOG_LINES: usize = 20;

/// Namespaces with this label are enrolled by [`configuration`].
pub const ENROL_LABEL: (&str, &str) = ("weir.dev/enrol", "true");

/// A running agent; killed and its pins removed when this value goes.
#[derive(Debug)]
pub struct AgentProcess {
    child: Child,
    binary: PathBuf,
    config: PathBuf,
    log: PathBuf,
    /// Its own variables; who asks of it has them as well.
    environment: Vec<(String, String)>,
    ended: bool,
    /// Whether another one has taken over its pins.
    succeeded: bool,
}

/// How the agent gets a serving certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustSource {
    /// From the cluster's signer `kubernetes.io/kubelet-serving`.
    ClusterSigner,
    /// From the cluster's own CA, mounted.
    MountedCa,
}

/// Where an agent pins what stays in force without it; `weir-agent uninstall` removes it.
const PINS: &str = "/sys/fs/bpf/weir";

/// A node has one agent. Starting another beside it and uninstalling that one would take away the first one's pins,
/// and its pods would reach the API server unrecorded.
///
/// # Errors
/// When an agent is installed on this machine.
pub fn refuse_beside_another() -> Result<()> {
    if Path::new(PINS).exists() {
        bail!("an agent is installed on this machine ({PINS}); end it and run `weir-agent uninstall` first");
    }
    Ok(())
}

/// An agent configuration for the testbed: namespaces with [`ENROL_LABEL`] are enrolled and enforced.
#[must_use]
pub fn configuration(testbed: &Testbed, journal: &Path, trust: TrustSource) -> Value {
    let pki = testbed.layout().path("pki");
    let trust = match trust {
        TrustSource::ClusterSigner => json!({"clusterSigner": {}}),
        TrustSource::MountedCa => {
            json!({"mountedCa": {"certificate": pki.join("ca.crt"), "key": pki.join("ca.key")}})
        }
    };
    json!({
        "apiVersion": "weir.dev/v1alpha1",
        "kind": "AgentConfiguration",
        "node": NODE_NAME,
        "journal": {"directory": journal},
        "stateDirectory": journal.with_file_name("state"),
        // Tests that are about it name the testbed's socket; a runtime of the machine itself is left alone.
        "nri": {"enabled": false},
        "clusters": [{
            "name": "testbed",
            "kubeconfig": testbed.layout().kubeconfig("agent"),
            "trust": trust,
        }],
        "enrolment": [{
            "namespaceSelector": {"matchLabels": {ENROL_LABEL.0: ENROL_LABEL.1}},
            "podSelector": {},
            "mode": "enforce",
        }],
    })
}

/// Writes a configuration as YAML.
///
/// # Errors
/// When the file cannot be written.
pub fn write_configuration(configuration: &Value, to: &Path) -> Result<()> {
    let text = serde_yaml_ng::to_string(configuration).context("cannot write a configuration as YAML")?;
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
}

/// A binary of this workspace, beside or above the running one.
///
/// # Errors
/// When it is not built; the error has the command that builds it.
pub fn built_binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the running binary")?;
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|file| file.is_file());
    found.with_context(|| format!("{name} is not built; run `cargo build -p weir-agent -p weir`"))
}

impl AgentProcess {
    /// Starts `weir-agent run --config CONFIG` and waits until it is ready.
    ///
    /// # Errors
    /// When it ends instead or is not ready in time; the error has its last lines.
    pub fn start(config: &Path, log: &Path) -> Result<Self> {
        let mut agent = Self::spawn(config, log)?;
        agent.wait_until_ready()?;
        Ok(agent)
    }

    /// Starts it where STS's host name leads to `rig` and there are AWS credentials, and waits until it is ready.
    ///
    /// # Errors
    /// As of [`AgentProcess::start`].
    pub fn start_on_aws(rig: &AwsRig, config: &Path, log: &Path) -> Result<Self> {
        let command = rig.in_view(&built_binary("weir-agent")?);
        let mut agent = Self::spawn_by(command, config, log)?;
        agent.wait_until_ready()?;
        Ok(agent)
    }

    /// Starts it without waiting: for tests of what makes it fail.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(config: &Path, log: &Path) -> Result<Self> {
        Self::spawn_by(Command::new(built_binary("weir-agent")?), config, log)
    }

    /// The same with these variables in its environment.
    ///
    /// # Errors
    /// As of [`AgentProcess::spawn`].
    pub fn spawn_with(config: &Path, log: &Path, environment: &[(&str, &str)]) -> Result<Self> {
        let mut command = Command::new(built_binary("weir-agent")?);
        command.envs(environment.iter().copied());
        let mut agent = Self::spawn_by(command, config, log)?;
        agent.environment =
            environment.iter().map(|(name, value)| [*name, *value].map(str::to_owned).into()).collect();
        Ok(agent)
    }

    /// `command` becomes the agent, once it has its arguments.
    ///
    /// # Errors
    /// As of [`AgentProcess::spawn`].
    pub fn spawn_by(mut command: Command, config: &Path, log: &Path) -> Result<Self> {
        let binary = built_binary("weir-agent")?;
        let output = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let errors = output.try_clone().context("cannot share the log file")?;
        let child = command
            .args(["run", "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            // A Ctrl-C at the terminal is for us: we end the agent in our own order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        Ok(Self {
            child,
            binary,
            config: config.to_owned(),
            log: log.to_owned(),
            environment: Vec::new(),
            ended: false,
            succeeded: false,
        })
    }

    /// Waits for the log line that says so, and for `weir-agent status` to answer.
    ///
    /// # Errors
    /// When the agent ends or the deadline is over; the error has its last lines.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let log = self.log.clone();
        let ready = wait_until("the agent to be ready", READY_DEADLINE, || {
            if let Some(status) = self.child.try_wait().context("cannot ask for the agent's state")? {
                bail!("the agent ended ({status})");
            }
            let said = fs::read_to_string(&log).unwrap_or_default().lines().any(says_ready);
            Ok((said && self.status().is_ok()).then_some(()))
        });
        ready.map_err(|error| self.explained(&error))
    }

    /// What `weir-agent status --json` says.
    ///
    /// # Errors
    /// When it fails or writes no JSON.
    pub fn status(&self) -> Result<Value> {
        let mut status = Command::new(&self.binary);
        status.args(["status", "--json"]).envs(self.environment.iter().map(|(name, value)| (name, value)));
        let text = run(&mut status)?;
        serde_json::from_str(&text).context("weir-agent status wrote no JSON")
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its log so far.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("cannot read {}", self.log.display()))
    }

    /// Its last lines.
    #[must_use]
    pub fn last_lines(&self) -> String {
        tail(&self.log, LOG_LINES)
    }

    fn explained(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow!("{error:#}; last lines of the agent:\n{}", self.last_lines())
    }

    /// Path of its configuration.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("process id out of range")?;
        kill(Pid::from_raw(pid), signal).context("cannot signal the agent")
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When the deadline is over.
    pub fn wait_for_end(&mut self) -> Result<ExitStatus> {
        let status = wait_until("the agent to end", END_DEADLINE, || {
            self.child.try_wait().context("cannot ask for the agent's state")
        })?;
        self.ended = true;
        Ok(status)
    }

    /// Waits until it has ended because another one took over, whose the pins are now.
    ///
    /// # Errors
    /// When the deadline is over; the error has its last lines.
    pub fn wait_for_succession(&mut self) -> Result<ExitStatus> {
        self.succeeded = true;
        let ended = self.wait_for_end();
        ended.map_err(|error| self.explained(&error))
    }

    /// Sends SIGTERM and waits for the end. Pins stay, as on a node.
    ///
    /// # Errors
    /// When it does not end in time; the error has its last lines.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let ended = self.wait_for_end();
        ended.map_err(|error| self.explained(&error))
    }

    /// Kills it, as a crash would: pins stay, nothing is written any more.
    ///
    /// # Errors
    /// When the kernel does not let it go.
    pub fn crash(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait_for_end().map(|_| ())
    }

    /// Removes every pin: `weir-agent uninstall`.
    ///
    /// # Errors
    /// When the command fails.
    pub fn uninstall(&self) -> Result<()> {
        run(Command::new(&self.binary).arg("uninstall")).map(|_| ())
    }
}

/// What `weir-agent guard` has put in force; removed when this value goes, unless an agent has taken it over.
#[derive(Debug)]
pub struct Guard {
    binary: PathBuf,
    succeeded: bool,
}

/// Runs `weir-agent guard --config CONFIG`, as a node does before its kubelet, and gives what it says.
///
/// # Errors
/// When it fails; the error has what it wrote.
pub fn guard(config: &Path) -> Result<String> {
    run(Command::new(built_binary("weir-agent")?).args(["guard", "--config"]).arg(config))
}

impl Guard {
    /// Runs [`guard`].
    ///
    /// # Errors
    /// As there, and when it says that nothing is in force.
    pub fn put_in_force(config: &Path) -> Result<Self> {
        let this = Self { binary: built_binary("weir-agent")?, succeeded: false };
        let said = guard(config)?;
        ensure!(said.starts_with("in force: pods are kept from "), "weir-agent guard says {said:?}");
        Ok(this)
    }

    /// Starts an agent that takes over what is in force, without waiting for it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn succeed(mut self, config: &Path, log: &Path) -> Result<AgentProcess> {
        let agent = AgentProcess::spawn(config, log)?;
        self.succeeded = true;
        Ok(agent)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.succeeded {
            let _ = output(Command::new(&self.binary).arg("uninstall"));
        }
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        if !self.ended && self.crash().is_err() {
            // It has ended by itself; what counts is that its pins go.
            self.ended = true;
        }
        if !self.succeeded {
            let _ = output(Command::new(&self.binary).arg("uninstall"));
        }
    }
}

/// Whether a log line has the message `ready`, as text or as JSON.
fn says_ready(line: &str) -> bool {
    line.contains(r#""message":"ready""#) || line.ends_with(": ready") || line.contains(": ready ")
}

/// The events of a journal, as `weir events` gives them.
///
/// # Errors
/// When `weir` fails or a line is no event of the schema.
pub fn read_events(journal: &Path) -> Result<Vec<Event>> {
    let weir = built_binary("weir")?;
    let text = run(Command::new(weir).args(["events", "--format", "json", "--from"]).arg(journal))?;
    let event =
        |line: &str| serde_json::from_str(line).with_context(|| format!("no event of the schema: {line}"));
    text.lines().filter(|line| !line.is_empty()).map(event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_message_ready_counts_as_readiness() {
        assert!(says_ready("2026-01-01T00:00:00Z  INFO weir_agent::app: ready clusters=1"));
        assert!(says_ready("2026-01-01T00:00:00Z  INFO weir_agent::app: ready"));
        assert!(!says_ready(
            "2026-01-01T00:00:00Z  INFO weir_agent::app::cluster: cluster ready cluster=\"a\""
        ));
        assert!(says_ready(r#"{"level":"INFO","fields":{"message":"ready","clusters":1}}"#));
        assert!(!says_ready("2026-01-01T00:00:00Z  INFO weir_agent::app: the API server is already known"));
    }
}
