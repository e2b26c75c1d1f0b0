//! The API server taken away and given back, while everything else of the testbed runs on.
//!
//! It is killed, as by a crash of its machine: what it would do in an orderly end (take its address out of the
//! endpoints) is not what a fault does.

use std::os::unix::ffi::OsStringExt;
use std::process::Command;
use std::time::Duration;
use std::{ffi::OsString, fs};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::{MARK, Testbed};
use crate::command::output;
use crate::process::RecordedProcess;
use crate::wait::wait_until;

/// Its name among the testbed's processes.
const NAME: &str = "kube-apiserver";

/// As at the start of the testbed; builds may run beside it.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// For a killed process to be gone.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// A testbed without its API server; it is started again when this value goes.
#[derive(Debug)]
pub struct ApiServerOutage<'a> {
    testbed: &'a Testbed,
    command: Vec<OsString>,
    over: bool,
}

impl Testbed {
    /// Kills the API server, and nothing else.
    ///
    /// # Errors
    /// When it does not run or does not end.
    pub fn stop_api_server(&self) -> Result<ApiServerOutage<'_>> {
        let state = self.layout.read_state()?.context("the testbed has no state file")?;
        let process = state.processes.iter().find(|process| process.name == NAME);
        let process = process.with_context(|| format!("{NAME} is no process of the testbed"))?;
        let words = fs::read(format!("/proc/{}/cmdline", process.pid))
            .with_context(|| format!("cannot read the command line of {NAME}"))?;
        let words = words.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        let command = words.map(|word| OsString::from_vec(word.to_vec())).collect();
        process.signal(Signal::SIGKILL);
        process.wait_for_end(END_DEADLINE)?;
        Ok(ApiServerOutage { testbed: self, command, over: false })
    }
}

impl ApiServerOutage<'_> {
    /// Starts it again as it was, and waits until it says that it is ready.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn end(mut self) -> Result<()> {
        self.start()
    }

    fn start(&mut self) -> Result<()> {
        self.over = true;
        let layout = &self.testbed.layout;
        let (program, arguments) = self.command.split_first().context("the command line is empty")?;
        let mut command = Command::new(program);
        command.args(arguments).env(MARK, &layout.root);
        let started = RecordedProcess::spawn(NAME, &mut command, &layout.log(NAME))?;
        let mut state = layout.read_state()?.context("the testbed has no state file")?;
        for process in state.processes.iter_mut().filter(|process| process.name == NAME) {
            process.clone_from(&started);
        }
        layout.write_state(&state)?;
        wait_until("the API server to be ready again", READY_DEADLINE, || {
            let mut kubectl = self.testbed.kubectl_command();
            let ready = output(kubectl.args(["get", "--raw", "/readyz"]))?;
            Ok(ready.status.success().then_some(()))
        })
    }
}

impl Drop for ApiServerOutage<'_> {
    fn drop(&mut self) {
        if !self.over {
            // The test has failed already; whoever uses the testbed next finds out if this does, too.
            let _ = self.start();
        }
    }
}
