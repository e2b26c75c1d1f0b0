//! `cargo xtask bench`: figures of this machine, each beside what it is to be compared with, from one run.
//!
//! Nothing passes or fails here: a figure depends on the machine and on what else it does, so the load is printed as well.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};

use crate::build_ebpf;

/// Measure on this machine.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time to know whose a request is: a token that was verified before, and one rule. In the build that users run.
    Auth,
    /// What a mutation waits for until its record is durable, beside fdatasync alone; `WEIR_BENCH_DIR` names a folder on the
    /// disk in question.
    Commits,
    /// Time of the kernel programs per run, by the kernel's own count, beside that of empty ones. Needs root.
    Hooks,
    /// Time until a node of 250 pods is enrolled, and what becomes of 1,000 pods that connect at once. Needs root.
    Enrolment,
}

/// Runs one.
///
/// # Errors
/// It cannot be built or run; what it printed says why.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    match arguments.what {
        What::Auth => cargo_bench(root, "auth", "release"),
        // What is waited for is the disk; a release build is long, and takes some µs off the rest.
        What::Commits => cargo_bench(root, "commits", "dev"),
        What::Hooks => {
            build_ebpf::run(root, build_ebpf::Options::default())?;
            // The programs are the kernel's; how the rest is compiled makes no difference, and a release build is long.
            cargo_bench(root, "hooks", "dev")
        }
        What::Enrolment => {
            build_ebpf::run(root, build_ebpf::Options::default())?;
            enrolment(root)
        }
    }
}

fn cargo_bench(root: &Path, name: &str, profile: &str) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(["bench", "--locked", "--profile", profile, "-p", "weir-agent", "--bench", name]);
    let status = command.current_dir(root).status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the bench {name} ended with {status}; does it need root, or a machine without an agent?");
    }
    Ok(())
}

/// The kernel tests about many pods, in the build that users run: they print what they measure.
fn enrolment(root: &Path) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(["test", "--locked", "--release", "-p", "weir-agent", "--test", "kernel", "--"]);
    command.args(["scale::", "--nocapture", "--test-threads=1"]).env("WEIR_TEST_LONG", "1").env("CI", "true");
    let status = command.current_dir(root).status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the enrolment of many pods ended with {status}; what failed is above");
    }
    Ok(())
}
