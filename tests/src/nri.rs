//! A container runtime that only asks: containerd's own half of NRI (`tests/testbed/nri`), for pods that a test makes itself.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::testbed::Testbed;

/// Name of its binary.
pub const BINARY: &str = "nri-runtime";

/// What a runtime tells its plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A pod's sandbox runs.
    SandboxRuns,
    /// A container of it is about to start.
    ContainerStarts,
}

/// A pod as the runtime names it.
#[derive(Clone, Copy, Debug)]
pub struct AskedFor<'a> {
    /// UID.
    pub uid: &'a str,
    /// Namespace.
    pub namespace: &'a str,
    /// Name.
    pub name: &'a str,
    /// The sandbox's process.
    pub pid: u32,
    /// The pod's cgroup.
    pub cgroup: &'a str,
}

/// The runtime; ends with this value.
#[derive(Debug)]
pub struct NriRuntime {
    socket: PathBuf,
    child: Child,
    /// One call at a time, as in containerd.
    calls: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
}

impl NriRuntime {
    /// Starts it with its socket and log in `folder`, and waits until plugins can connect.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(testbed: &Testbed, folder: &Path) -> Result<Self> {
        let (socket, plugins) = (folder.join("nri.sock"), folder.join("nri-plugins"));
        fs::create_dir_all(&plugins).with_context(|| format!("cannot make {}", plugins.display()))?;
        let log = fs::File::create(folder.join("nri-runtime.log")).context("cannot make the log")?;
        let mut command = Command::new(testbed.components().binary(BINARY));
        command.arg(&socket).arg(&plugins).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().context("cannot start the runtime's half of NRI")?;
        let pipes = child.stdin.take().zip(child.stdout.take()).context("it has no pipes")?;
        let mut this = Self { socket, child, calls: Mutex::new((pipes.0, BufReader::new(pipes.1))) };
        let calls = this.calls.get_mut().unwrap_or_else(PoisonError::into_inner);
        ensure!(read(&mut calls.1)? == "listening", "the runtime's half of NRI does not listen");
        Ok(this)
    }

    /// Where plugins connect.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks every plugin; returns how long that took.
    ///
    /// # Errors
    /// When one answers with an error: then containerd would not start the container.
    pub fn ask(&self, asked: Asked, pod: &AskedFor<'_>) -> Result<Duration> {
        let call = match asked {
            Asked::SandboxRuns => "run",
            Asked::ContainerStarts => "start",
        };
        let AskedFor { uid, namespace, name, pid, cgroup } = pod;
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(calls.0, "{call} {uid} {namespace} {name} {pid} {cgroup}")
            .context("the runtime has ended")?;
        let answer = read(&mut calls.1)?;
        match answer.strip_prefix("ok ").map(str::parse) {
            Some(Ok(us)) => Ok(Duration::from_micros(us)),
            _ => bail!("the runtime says {answer:?}"),
        }
    }
}

impl Drop for NriRuntime {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(lines: &mut BufReader<ChildStdout>) -> Result<String> {
    let mut line = String::new();
    lines.read_line(&mut line).context("the runtime says nothing")?;
    Ok(line.trim_end().to_owned())
}
