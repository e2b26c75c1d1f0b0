//! Suites that run beside those in front: all they need is a processor, and tests on the node leave one idle for most of their time.
//!
//! Their priority is low, so that what is in front hardly notices. What one prints is kept and shown whole when it ends: its lines
//! would stand between those of what runs in front.

use std::{
    io::{Read as _, Seek as _},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use weir_tests::{process::terminate_group, wait::wait_until};

use super::{Suite, Used};

/// What nice(1) is given: a tenth of a processor that others want too. With less, what waits for a guest's answers gives up.
const NICENESS: &str = "10";
/// No suite takes so long.
const DEADLINE: Duration = Duration::from_secs(6 * 3600);
/// How long a suite that was told to end has for its clean-up.
const GRACE: Duration = Duration::from_secs(20);

/// Suites one after the other on a thread of their own; the one that runs is ended when this is dropped.
pub(super) struct Beside {
    turn: Arc<Mutex<Turn>>,
    thread: Option<JoinHandle<Result<Vec<Used>>>>,
    used: Vec<Used>,
}

/// The suite that runs, as the leader of a process group, and whether another may begin.
#[derive(Default)]
struct Turn {
    over: bool,
    child: Option<Child>,
}

impl Beside {
    pub(super) fn start(suites: Vec<Suite>) -> Result<Self> {
        let turn = Arc::new(Mutex::new(Turn::default()));
        let of_thread = Arc::clone(&turn);
        let thread = thread::Builder::new()
            .name("beside".to_owned())
            .spawn(move || suites.into_iter().map(|suite| run(suite, &of_thread)).collect())
            .context("cannot start the thread of the suites beside")?;
        Ok(Self { turn, thread: Some(thread), used: Vec::new() })
    }

    /// Fails if a suite has failed by now.
    pub(super) fn check(&mut self) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) { self.join() } else { Ok(()) }
    }

    /// Waits for the last suite; what each has used.
    pub(super) fn wait(&mut self) -> Result<Vec<Used>> {
        self.join()?;
        Ok(std::mem::take(&mut self.used))
    }

    fn join(&mut self) -> Result<()> {
        if let Some(thread) = self.thread.take() {
            self.used = thread.join().map_err(|_| anyhow!("the thread of the suites beside panicked"))??;
        }
        Ok(())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let mut turn = lock(&self.turn);
        turn.over = true;
        if let Some(child) = &turn.child {
            terminate_group(child);
        }
        drop(turn);
        // Whatever became of it: this run has failed already, and says why.
        let _ = wait_until("the suite beside to end", GRACE, || Ok(thread.is_finished().then_some(())));
    }
}

fn lock(turn: &Mutex<Turn>) -> MutexGuard<'_, Turn> {
    turn.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one suite, and prints what it printed.
fn run(suite: Suite, turn: &Mutex<Turn>) -> Result<Used> {
    let mut output = tempfile::tempfile().context("cannot make a file for a suite's output")?;
    let mut command = Command::new("nice");
    command.args(["-n", NICENESS]).arg(suite.command.get_program()).args(suite.command.get_args());
    if let Some(folder) = suite.command.get_current_dir() {
        command.current_dir(folder);
    }
    command.envs(suite.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output.try_clone()?).process_group(0);
    let started = Instant::now();
    {
        let mut turn = lock(turn);
        ensure!(!turn.over, "{} did not begin: the run was over", suite.name);
        turn.child = Some(command.spawn().with_context(|| format!("{}: cannot start nice", suite.name))?);
    }
    let status = wait_until(suite.name, DEADLINE, || {
        let mut turn = lock(turn);
        let ended = turn.child.as_mut().map(Child::try_wait).transpose()?.flatten();
        if ended.is_some() {
            // Its number may be another's from now on.
            turn.child = None;
        }
        Ok(ended)
    })?;
    let mut text = Vec::new();
    output.rewind().and_then(|()| output.read_to_end(&mut text)).context("cannot read a suite's output")?;
    println!("\n== {}, beside ==\n{}== end of {} ==", suite.name, String::from_utf8_lossy(&text), suite.name);
    if !status.success() {
        println!("FAILED: {} (beside); the run ends with the suite in front", suite.name);
        bail!("{}: {:?} ended with {status}; its output is above", suite.name, suite.command);
    }
    Ok((suite.name, suite.budget, started.elapsed()))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn suite(name: &'static str, script: &str) -> Suite {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Suite { name, budget: Duration::ZERO, command }
    }

    #[test]
    fn each_runs_in_its_turn_and_the_first_that_fails_ends_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        let make = |name: &str| format!("touch {}", file(name).display());
        let suites =
            vec![suite("first", &make("first")), suite("second", "false"), suite("third", &make("third"))];
        let said = format!("{:#}", Beside::start(suites).unwrap().wait().unwrap_err());
        assert!(said.starts_with("second: ") && said.contains("exit status: 1"), "{said}");
        assert!(file("first").exists() && !file("third").exists());
        let mut all_well = Beside::start(vec![suite("first", "true"), suite("second", "true")]).unwrap();
        let names: Vec<_> = all_well.wait().unwrap().iter().map(|(name, ..)| *name).collect();
        assert_eq!(names, ["first", "second"]);
    }

    #[test]
    fn what_runs_when_the_run_is_over_is_ended_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        // Whoever is told to end may clean up.
        let cleaned = folder.path().join("cleaned");
        let script = format!(
            "trap 'touch {}; exit 1' TERM; tail -f /dev/null & echo $! > {}; wait",
            cleaned.display(),
            pid.display()
        );
        let beside = Beside::start(vec![suite("endless", &script), suite("next", "false")]).unwrap();
        let read = || fs::read_to_string(&pid).unwrap_or_default();
        wait_until("the suite to begin", GRACE, || Ok(read().ends_with('\n').then_some(()))).unwrap();
        drop(beside);
        assert!(cleaned.exists());
        let process = Path::new("/proc").join(read().trim());
        let state = || fs::read_to_string(process.join("stat")).unwrap_or_default();
        // Its parent is gone; who is left to wait for it does so in its own time.
        wait_until("its process to end", GRACE, || {
            let state = state();
            Ok((state.is_empty() || state.contains(") Z ")).then_some(()))
        })
        .unwrap();
    }
}
