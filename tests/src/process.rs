//! A long-running process that outlives the command that started it: started with a log file, recorded by id and
//! start time, and ended only if both still agree. No process is ever looked up by name.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::wait::wait_until;

/// Position of the start time among the fields of `/proc/PID/stat` that follow the command's name; proc(5) counts
/// it as field 22, of which the first two are before.
const START_FIELD: usize = 19;

/// A process that we started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecordedProcess {
    /// What it is, for messages.
    pub name: String,
    /// Process id.
    pub pid: i32,
    /// Start, in clock ticks since boot: tells it from a later process with the same id.
    pub start_ticks: u64,
    /// Where its output goes.
    pub log: PathBuf,
}

impl RecordedProcess {
    /// Starts `command` in a process group of its own, with its output in `log`.
    ///
    /// # Errors
    /// When the log cannot be made or the command cannot be started.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let errors = output.try_clone().context("cannot share the log file")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name} ({})", command.get_program().to_string_lossy()))?;
        let pid = i32::try_from(child.id()).context("process id out of range")?;
        let start_ticks = stat(pid).map_or(0, |(_, ticks)| ticks);
        Ok(Self { name: name.to_owned(), pid, start_ticks, log: log.to_owned() })
    }

    /// Whether it runs: same id, same start time, not a zombie.
    #[must_use]
    pub fn is_running(&self) -> bool {
        stat(self.pid).is_some_and(|(state, ticks)| ticks == self.start_ticks && !matches!(state, 'Z' | 'X'))
    }

    /// Sends a signal if it still is the process that was recorded.
    pub fn signal(&self, signal: Signal) {
        if self.is_running() {
            // It may end between the two lines; then there is nothing left to signal.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Ends it: SIGTERM, and SIGKILL when `grace` is over.
    ///
    /// # Errors
    /// When it survives both.
    pub fn stop(&self, grace: Duration) -> Result<()> {
        self.signal(Signal::SIGTERM);
        if self.wait_for_end(grace).is_ok() {
            return Ok(());
        }
        self.signal(Signal::SIGKILL);
        self.wait_for_end(Duration::from_secs(5))
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When it still runs at the deadline.
    pub fn wait_for_end(&self, deadline: Duration) -> Result<()> {
        wait_until(&format!("{} (process {}) to end", self.name, self.pid), deadline, || {
            Ok((!self.is_running()).then_some(()))
        })
    }
}

/// Sends SIGTERM to the process group that `leader`, for which nobody has waited yet, leads.
pub fn terminate_group(leader: &Child) {
    if let Ok(group) = i32::try_from(leader.id()) {
        // All of them may have ended; then there is nothing left to signal.
        let _ = killpg(Pid::from_raw(group), Signal::SIGTERM);
    }
}

/// State and start time (in clock ticks since boot) of a process, if there is one.
#[must_use]
pub fn stat(pid: i32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in parentheses and may hold any character, so count from the last one.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some((fields.first()?.chars().next()?, fields.get(START_FIELD)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ended_process_is_not_running_although_nobody_waited_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let process =
            RecordedProcess::spawn("cat", &mut Command::new("cat"), &folder.path().join("log")).unwrap();
        process.wait_for_end(Duration::from_secs(10)).unwrap();
        assert!(!process.is_running());
    }

    #[test]
    fn another_process_with_the_same_id_is_not_taken_for_the_recorded_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("tail");
        command.args(["-f", "/dev/null"]);
        let process = RecordedProcess::spawn("tail", &mut command, &folder.path().join("log")).unwrap();
        let other = RecordedProcess { start_ticks: process.start_ticks + 1, ..process.clone() };
        assert!(process.is_running() && !other.is_running());
        other.signal(Signal::SIGKILL);
        assert!(process.is_running());
        process.stop(Duration::from_secs(10)).unwrap();
    }
}
