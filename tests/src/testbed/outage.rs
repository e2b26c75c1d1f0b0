//! A component of the testbed taken away and given back, while everything else runs on.
//!
//! It is killed, as by a crash of its machine: what it would do in an orderly end (the API server takes its address out of the
//! endpoints) is not what a fault does.

use std::net::TcpStream;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::{ffi::OsString, fs};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::{MARK, Testbed};
use crate::command::output;
use crate::process::RecordedProcess;
use crate::wait::wait_until;

/// Their names among the testbed's processes.
const API_SERVER: &str = "kube-apiserver";
const CONTAINERD: &str = "containerd";
const KUBELET: &str = "kubelet";
const CONTROLLER_MANAGER: &str = "kube-controller-manager";
/// How long the cluster's signers have what they sign last, however long was asked for.
const SIGNING_DURATION: &str = "--cluster-signing-duration=";

/// As at the start of the testbed; builds may run beside it.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// For a killed process to be gone.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// A testbed without one of its components; that is started again when this value goes.
#[derive(Debug)]
pub struct Outage<'a> {
    testbed: &'a Testbed,
    name: &'static str,
    command: Vec<OsString>,
    environment: Vec<OsString>,
    /// As which it was started in vain and runs all the same.
    running: Option<RecordedProcess>,
    over: bool,
}

/// A testbed of which one component runs with further flags; as before when this value goes.
#[derive(Debug)]
pub struct ChangedFlags<'a> {
    testbed: &'a Testbed,
    name: &'static str,
    flag: OsString,
}

impl Drop for ChangedFlags<'_> {
    fn drop(&mut self) {
        // Whoever uses the testbed next finds out if this does not succeed.
        let _ = self.testbed.stop(self.name).and_then(|mut outage| {
            outage.command.retain(|word| *word != self.flag);
            outage.end()
        });
    }
}

impl Testbed {
    /// Has certificates signed for `life` and no longer, by whichever signer of the cluster.
    ///
    /// # Errors
    /// When the controller manager, whose signers they are, cannot be started so.
    pub fn sign_for(&self, life: Duration) -> Result<ChangedFlags<'_>> {
        self.change(CONTROLLER_MANAGER, format!("{SIGNING_DURATION}{}s", life.as_secs()))
    }

    /// Has the API server started again with these feature gates (`NAME=BOOL[,NAME=BOOL]`).
    ///
    /// # Errors
    /// When it cannot be started so.
    pub fn with_feature_gates(&self, gates: &str) -> Result<ChangedFlags<'_>> {
        self.change(API_SERVER, format!("--feature-gates={gates}"))
    }

    /// Has the kubelet started again with these feature gates. Nothing is waited for: whoever runs a pod then does.
    ///
    /// # Errors
    /// When it cannot be started so.
    pub fn with_kubelet_gates(&self, gates: &str) -> Result<ChangedFlags<'_>> {
        self.change(KUBELET, format!("--feature-gates={gates}"))
    }

    fn change(&self, name: &'static str, flag: String) -> Result<ChangedFlags<'_>> {
        let changed = ChangedFlags { testbed: self, name, flag: flag.into() };
        let mut outage = self.stop(name)?;
        outage.command.push(changed.flag.clone());
        outage.end()?;
        Ok(changed)
    }

    /// Kills the API server, and nothing else.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub fn stop_api_server(&self) -> Result<Outage<'_>> {
        self.stop(API_SERVER)
    }

    /// Kills containerd; containers run on.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub fn stop_containerd(&self) -> Result<Outage<'_>> {
        self.stop(CONTAINERD)
    }

    /// Kills the kubelet; containers run on, and none that ends is started again.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub fn stop_kubelet(&self) -> Result<Outage<'_>> {
        self.stop(KUBELET)
    }

    fn stop(&self, name: &'static str) -> Result<Outage<'_>> {
        let state = self.layout.read_state()?.context("the testbed has no state file")?;
        let process = state.processes.iter().find(|process| process.name == name);
        let process = process.with_context(|| format!("{name} is no process of the testbed"))?;
        let folder = Path::new("/proc").join(process.pid.to_string());
        let words = |file: &str| -> Result<Vec<OsString>> {
            let bytes =
                fs::read(folder.join(file)).with_context(|| format!("cannot read the {file} of {name}"))?;
            let words = bytes.split(|byte| *byte == 0).filter(|word| !word.is_empty());
            Ok(words.map(|word| OsString::from_vec(word.to_vec())).collect())
        };
        let (command, environment) = (words("cmdline")?, words("environ")?);
        process.signal(Signal::SIGKILL);
        process.wait_for_end(END_DEADLINE)?;
        Ok(Outage { testbed: self, name, command, environment, running: None, over: false })
    }
}

impl Outage<'_> {
    /// Starts it while what it needs is away, as on a node that boots in that order; returns whether it has ended for want of it
    /// before `patience` was over. [`end`](Self::end) starts what has ended again, as its unit would.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_in_vain(&mut self, patience: Duration) -> Result<bool> {
        let started = self.spawn()?;
        let has_ended = started.wait_for_end(patience).is_ok();
        self.running = (!has_ended).then_some(started);
        Ok(has_ended)
    }

    /// Starts it again as it was, and waits until it answers (of the kubelet nothing is waited for).
    ///
    /// # Errors
    /// When it does not come up.
    pub fn end(mut self) -> Result<()> {
        self.start()
    }

    fn start(&mut self) -> Result<()> {
        self.over = true;
        let started = match self.running.take().filter(RecordedProcess::is_running) {
            Some(running) => running,
            None => self.spawn()?,
        };
        let layout = &self.testbed.layout;
        wait_until(&format!("{} to answer again", self.name), READY_DEADLINE, || {
            if !started.is_running() {
                bail!(
                    "{} ended as soon as it was started; see {}",
                    self.name,
                    layout.log(self.name).display()
                );
            }
            let answers = match self.name {
                API_SERVER => {
                    output(self.testbed.kubectl_command().args(["get", "--raw", "/readyz"]))?.status.success()
                }
                CONTROLLER_MANAGER => TcpStream::connect(("127.0.0.1", secure_port(&self.command)?)).is_ok(),
                CONTAINERD => output(self.testbed.ctr_command().arg("version"))?.status.success(),
                _ => true,
            };
            Ok(answers.then_some(()))
        })
    }

    /// Starts it as it was, and has the testbed know it.
    fn spawn(&self) -> Result<RecordedProcess> {
        let layout = &self.testbed.layout;
        let (program, arguments) = self.command.split_first().context("the command line is empty")?;
        let mut command = Command::new(program);
        command.args(arguments);
        for variable in &self.environment {
            let bytes = variable.as_encoded_bytes();
            let Some(at) = bytes.iter().position(|byte| *byte == b'=') else { continue };
            let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
            command.env(text(&bytes[..at]), text(&bytes[at + 1..]));
        }
        command.env(MARK, &layout.root);
        let started = RecordedProcess::spawn(self.name, &mut command, &layout.log(self.name))?;
        let mut state = layout.read_state()?.context("the testbed has no state file")?;
        for process in state.processes.iter_mut().filter(|process| process.name == self.name) {
            process.clone_from(&started);
        }
        layout.write_state(&state)?;
        Ok(started)
    }
}

impl Drop for Outage<'_> {
    fn drop(&mut self) {
        if !self.over {
            // The test has failed already; whoever uses the testbed next finds out if this does, too.
            let _ = self.start();
        }
    }
}

/// The port of which a command line says that it is listened on.
fn secure_port(arguments: &[OsString]) -> Result<u16> {
    let mut named = arguments.iter().filter_map(|argument| argument.to_str()?.strip_prefix("--secure-port="));
    named
        .next_back()
        .context("the command line has no --secure-port")?
        .parse()
        .context("--secure-port is no port")
}
