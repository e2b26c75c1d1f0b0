//! `cargo xtask test`: everything a contributor needs before a change may land; `.ci/run` calls it.
//!
//! Each suite is a command with a budget in seconds. A budget is a promise about the time of contributors, not
//! a test: what exceeds it is printed, nothing fails by the clock. The first suite that fails ends the run; of those
//! [`beside`], when the suite in front is over.
//!
//! On a machine with empty caches clippy takes as long as a build. So it runs beside the tests, whose [`programs`] are run without
//! cargo: it would wait for the lock on the build folder that clippy holds.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher as _, Hasher as _},
    path::Path,
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use weir_tests::{Testbed, components, kafka, opensearch, progress::Progress, wait::interrupt_on_signals};

use self::{beside::Beside, programs::Programs};
use crate::{build_ebpf, kernels, native};

mod beside;
mod programs;

/// The version of cargo-deny that is installed where none is there.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// A command and what it may cost on a warm machine with two cores.
struct Suite {
    name: &'static str,
    budget: Duration,
    command: Command,
}

/// A suite's name, its budget, and what it took.
type Used = (&'static str, Duration, Duration);

/// Runs all suites; `long` asks for full counts where a suite has fewer by default.
///
/// # Errors
/// The first suite that fails.
pub(crate) fn run(root: &Path, long: bool) -> Result<()> {
    // Ctrl-C ends the suite that runs, and with it the run: what is up goes down first.
    interrupt_on_signals()?;
    // What cannot work is said now, not after half an hour of builds.
    Testbed::check_machine(&Testbed::default_folder()?)?;
    let plans = components::plan()?.into_iter().chain(components::tools_plan()?);
    for line in plans.chain(build_ebpf::plan(root)?).chain(native::plan()) {
        println!("first: {line}");
    }
    let xtask = std::env::current_exe().context("cannot find this program's own path")?;
    for line in [kafka::plan()?, opensearch::plan()?].into_iter().flatten() {
        println!("first: {line}");
    }
    let seed = seed()?;
    println!("seed: WEIR_FUZZ_SEED={seed}");
    native::install()?;
    // The Go builds cost minutes on a fresh machine and share nothing with the Rust ones: side by side.
    let mut testbed = Background::start(Command::new(&xtask).args(["testbed", "build"]).current_dir(root))?;
    let mut used = Vec::new();
    for suite in built(root, &xtask) {
        testbed.check("testbed build")?;
        used.push(suite.run(seed, long)?);
    }
    // Now, so that those beside find everything built, and the suites in front never wait for cargo's lock on their account.
    kernels::Programs::build(root)?;
    let programs = Programs::built(root)?;
    let suites = without_node(root, &xtask).into_iter().map(|suite| suite.with(seed, long)).collect();
    let mut beside = Beside::start(suites)?;
    // On this kernel too, and so not beside an agent: kernel tests attach programs of their own.
    used.push(run_all("unit", 300, programs.commands(|folder| folder != "tests"), seed, long)?);
    let started = Instant::now();
    testbed.wait("testbed build")?;
    used.push(("testbed build (rest)", Duration::from_secs(900), started.elapsed()));
    beside.check()?;
    let started = Instant::now();
    // Integration tests and the demo attach to it; it goes down whatever becomes of them.
    let up = Testbed::up(&Testbed::default_folder()?, Progress::Shown)?.down_on_drop();
    used.push(("testbed up", Duration::from_secs(60), started.elapsed()));
    used.push(run_all("integration", 2100, programs.commands(|folder| folder == "tests"), seed, long)?);
    beside.check()?;
    for suite in [demo(root, &xtask)].into_iter().chain(long.then(|| given_away(root, &xtask))) {
        used.push(suite.run(seed, long)?);
        beside.check()?;
    }
    drop(up);
    let started = Instant::now();
    used.extend(beside.wait()?);
    used.push(("beside (rest)", Duration::ZERO, started.elapsed()));
    println!("\n{:<24} {:>8} {:>8}", "suite", "used/s", "budget/s");
    for (name, budget, used) in &used {
        // The budgets are those of the counts that run by default.
        let mark = if used > budget && !long { "  over its budget" } else { "" };
        println!("{name:<24} {:>8} {:>8}{mark}", used.as_secs(), budget.as_secs());
    }
    if long {
        write_long_run(root, seed, &used)?;
    }
    Ok(())
}

/// The seed of everything random in this run: that of `WEIR_FUZZ_SEED`, or a fresh one.
pub(crate) fn seed() -> Result<u64> {
    match std::env::var("WEIR_FUZZ_SEED") {
        Ok(seed) => seed.parse().with_context(|| format!("WEIR_FUZZ_SEED is {seed:?}; give it a number")),
        Err(_) => Ok(RandomState::new().build_hasher().finish()),
    }
}

/// Of what and where a run was, as lines of a list.
pub(crate) fn circumstances(root: &Path) -> Result<String> {
    let said = |program: &str, arguments: &[&str]| -> Result<String> {
        let output = Command::new(program).args(arguments).current_dir(root).output()?;
        ensure!(output.status.success(), "{program} {arguments:?} ended with {}", output.status);
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let (date, commit) = (said("date", &["-u", "+%F"])?, said("git", &["rev-parse", "--short=12", "HEAD"])?);
    let changed = said("git", &["status", "--porcelain", "--untracked-files=no"])?;
    let state = if changed.is_empty() { "" } else { ", with changes that were not committed" };
    let kernel = said("uname", &["-r"])?;
    // What follows names one machine's build.
    let kernel = kernel.split('-').next().unwrap_or_default();
    Ok(format!("- Date: {date}\n- Commit: {commit}{state}\n- Kernel: {kernel}\n"))
}

/// Where the last long run stands in the documentation.
const LONG_RUN: &str = "docs/long-run.md";

/// Writes down that a long run has passed.
fn write_long_run(root: &Path, seed: u64, used: &[Used]) -> Result<()> {
    let mut text = format!(
        "# The last long run\n\n`cargo xtask test --long` writes this file when every suite has passed with its full counts.\n\n\
         {}- Seed: `WEIR_FUZZ_SEED={seed}`\n\n| suite | seconds |\n|---|---|\n",
        circumstances(root)?
    );
    for (name, _, used) in used {
        text.push_str(&format!("| {name} | {} |\n", used.as_secs()));
    }
    let path = root.join(LONG_RUN);
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {LONG_RUN}");
    Ok(())
}

fn suite(root: &Path, name: &'static str, seconds: u64, program: &Path, arguments: &[&str]) -> Suite {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(root);
    Suite { name, budget: Duration::from_secs(seconds), command }
}

/// What says the most in the shortest time, and builds everything that the others run.
fn built(root: &Path, xtask: &Path) -> Vec<Suite> {
    let suite =
        |name, seconds, program: &Path, arguments: &[&str]| suite(root, name, seconds, program, arguments);
    let cargo = Path::new("cargo");
    let mut format_ebpf = suite("format (kernel)", 10, cargo, &["fmt", "--all", "--check"]);
    format_ebpf.command.current_dir(root.join("ebpf"));
    vec![
        suite("format", 10, cargo, &["fmt", "--all", "--check"]),
        format_ebpf,
        suite("tidy", 10, xtask, &["tidy"]),
        suite("kernel programs", 240, xtask, &["build-ebpf"]),
        suite("tests' build", 600, cargo, &["test", "--workspace", "--locked", "--no-run"]),
        // Integration tests and the demo run these as the real binaries.
        suite("binaries", 300, cargo, &["build", "--locked", "-p", "weir-agent", "-p", "weir"]),
    ]
}

/// What touches nothing of this machine.
fn without_node(root: &Path, xtask: &Path) -> Vec<Suite> {
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    vec![
        suite(root, "clippy", 1500, Path::new("cargo"), &clippy),
        suite(root, "tests' tools", 600, xtask, &["testbed", "build", "--tools"]),
        suite(root, "alert rules", 30, xtask, &["rules"]),
        suite(root, "chart", 30, xtask, &["chart"]),
        suite(root, "deny", 600, xtask, &["deny"]),
        suite(root, "kernels (qemu)", 1500, xtask, &["test", "--kernels", "--in-turn"]),
    ]
}

fn demo(root: &Path, xtask: &Path) -> Suite {
    suite(root, "demo", 180, xtask, &["demo", "--yes"])
}

/// What is given away, for both architectures, and installed: two release builds, which are too long for every change.
fn given_away(root: &Path, xtask: &Path) -> Suite {
    let mut command = Command::new(xtask);
    command.args(["dist", "--arch", "x86_64,aarch64", "--test"]).current_dir(root);
    Suite { name: "dist", budget: Duration::from_secs(3600), command }
}

impl Suite {
    /// With what a run has for all of its suites.
    fn with(mut self, seed: u64, long: bool) -> Self {
        self.command.env("WEIR_FUZZ_SEED", seed.to_string());
        if long {
            self.command.env("WEIR_TEST_LONG", "1");
        }
        self
    }

    fn run(self, seed: u64, long: bool) -> Result<Used> {
        println!("\n== {} ==", self.name);
        let Self { name, budget, mut command } = self.with(seed, long);
        let started = Instant::now();
        let status = command.status().with_context(|| format!("{name}: cannot start {command:?}"))?;
        if !status.success() {
            bail!("{name}: {command:?} ended with {status}");
        }
        Ok((name, budget, started.elapsed()))
    }
}

/// One suite of several programs, one after the other.
fn run_all(name: &'static str, budget: u64, programs: Vec<Command>, seed: u64, long: bool) -> Result<Used> {
    let budget = Duration::from_secs(budget);
    let mut used = Duration::ZERO;
    for command in programs {
        println!("\n{}", command.get_program().display());
        used += Suite { name, budget, command }.run(seed, long)?.2;
    }
    Ok((name, budget, used))
}

/// A command beside the others, ended with this process's failure.
struct Background(Child);

impl Background {
    fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(command.spawn().with_context(|| format!("cannot start {command:?}"))?))
    }

    /// Fails if it has failed by now.
    fn check(&mut self, name: &str) -> Result<()> {
        if self.0.try_wait()?.is_some() { self.wait(name) } else { Ok(()) }
    }

    fn wait(&mut self, name: &str) -> Result<()> {
        let status = self.0.wait()?;
        if !status.success() {
            bail!("{name} ended with {status}; its output is above");
        }
        Ok(())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Both fail only where the child has ended already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where the alert rules and their tests are.
const RULES: &str = "deploy/prometheus";

/// Where the decoders' tests find what was recorded.
const CONVERSATIONS: &str = "agent/src/streams/conversations";

/// Where the tests of masks find the bodies.
const BODIES: &str = "agent/src/recording/protobuf_bodies.json";

/// Records the conversations of streams, and bodies in Kubernetes' protobuf, anew.
///
/// # Errors
/// The recording program cannot be built or fails; its output is shown.
pub(crate) fn conversations(root: &Path) -> Result<()> {
    let status = Command::new(components::streams_capture(Progress::Shown)?)
        .args([root.join(CONVERSATIONS), root.join(BODIES)])
        .status()
        .context("cannot start streams-capture")?;
    ensure!(status.success(), "streams-capture ended with {status}; see above");
    Ok(())
}

/// `cargo xtask rules`: the alert rules fire on what they are for, and on nothing else, by Prometheus' own account.
///
/// # Errors
/// promtool cannot be built, or a test of the rules fails; its output is shown.
pub(crate) fn rules(root: &Path) -> Result<()> {
    let status = Command::new(components::promtool(Progress::Shown)?)
        .arg("weir-rules-test.yaml")
        .current_dir(root.join(RULES))
        .status()
        .context("cannot start promtool")?;
    ensure!(status.success(), "promtool ended with {status}; see above and {RULES}/weir-rules-test.yaml");
    Ok(())
}

/// `cargo xtask deny`: licences, bans and sources always; advisories where their database can be fetched.
///
/// # Errors
/// cargo-deny cannot be installed, or it refuses something.
pub(crate) fn deny(root: &Path) -> Result<()> {
    let tools = tools_folder()?;
    let program = tools.join("bin/cargo-deny");
    if !program.is_file() {
        println!("installing cargo-deny {CARGO_DENY_VERSION} into {} (about 4 minutes)", tools.display());
        let status = Command::new("cargo")
            .args(["install", "cargo-deny", "--locked", "--version", CARGO_DENY_VERSION, "--root"])
            .arg(&tools)
            .status()?;
        if !status.success() {
            bail!("cannot install cargo-deny; try `cargo install cargo-deny --version {CARGO_DENY_VERSION}`");
        }
    }
    let check = |what: &[&str]| -> Result<bool> {
        let status = Command::new(&program)
            .args(["check", "--hide-inclusion-graph"])
            .args(what)
            .current_dir(root)
            .status()?;
        Ok(status.success())
    };
    if !check(&["bans", "licenses", "sources"])? {
        bail!("cargo-deny refuses a dependency; see above and deny.toml");
    }
    let fetched = Command::new(&program).args(["fetch", "db"]).current_dir(root).output()?.status.success();
    if !fetched {
        println!("deny: ADVISORIES NOT CHECKED: their database cannot be fetched from here");
    } else if !check(&["advisories"])? {
        bail!("cargo-deny knows an advisory against a dependency; see above and deny.toml");
    }
    Ok(())
}

/// Where developer tools are installed: outside `target/`, so that `cargo clean` does not cost them.
fn tools_folder() -> Result<std::path::PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(std::path::PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set; set one, tools are installed below it")?;
    Ok(cache.join("weir/tools"))
}
