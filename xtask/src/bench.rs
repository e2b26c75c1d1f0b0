//! `cargo xtask bench`: figures of this machine, each beside what it is to be compared with, from one run.
//!
//! Nothing passes or fails here but by a ratio of two figures of one run that is clearly wrong: a figure depends on the machine and on what
//! else it does, so the load is printed as well.

mod configurations;
mod load;
mod peers;
mod proxy;
mod table;

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use weir_tests::Kafka;

use crate::build_ebpf;

/// Where the bench of the journal publishes.
const TOPIC: &str = "bench";
const PARTITIONS: u32 = 3;

/// Weir's own code as in a release, the rest as tests have it: where the disk and Weir's own work are what is measured. A release build is
/// long, and a little faster than this.
const OPTIMISED: [&str; 2] = ["weir-agent", "weir-common"];

/// Measure on this machine.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
    /// As much as the goals say, where a bench does less by default: minutes, and 10 GiB of disk.
    #[arg(long, global = true)]
    long: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time to know whose a request is: a token that was verified before, and one rule. In the build that users run.
    Auth,
    /// What a mutation waits for until its record is durable, beside fdatasync alone; `WEIR_BENCH_DIR` names a folder on the
    /// disk in question.
    Commits,
    /// Time of the kernel programs per run, by the kernel's own count, beside that of empty ones; fails where a redirect takes very many
    /// times as long. Needs root.
    Hooks,
    /// Records a second of group commit, messages a second to a Kafka that is started for it, and the start with a large journal.
    /// `WEIR_BENCH_DIR` names a folder on the disk in question.
    Journal,
    /// Time until a node of 250 pods is enrolled, and what becomes of 1,000 pods that connect at once. Needs root.
    Enrolment,
    /// Requests, handshakes and bytes for a second of CPU, added time and memory, beside nginx, HAProxy, Envoy and mitmproxy, with TLS on
    /// both sides; Weir records everything. Needs root, two cores, and a machine without an agent. `WEIR_BENCH_DIR` names a folder on the
    /// disk that the journal is to be on, `WEIR_BENCH_AGENT` an agent that is built already.
    Proxy {
        /// Only these, by their names in the table.
        #[arg(long)]
        only: Vec<String>,
    },
}

/// Runs one.
///
/// # Errors
/// It cannot be built or run; what it printed says why.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        What::Auth => cargo_bench(root, "auth", "release", &[], &[]),
        What::Commits => cargo_bench(root, "commits", "dev", &[], &OPTIMISED),
        What::Journal => journal(root, arguments.long),
        What::Hooks => {
            build_ebpf::run(root, build_ebpf::Options::default())?;
            // The programs are the kernel's; how the rest is compiled makes no difference, and a release build is long.
            cargo_bench(root, "hooks", "dev", &[], &[])
        }
        What::Enrolment => {
            build_ebpf::run(root, build_ebpf::Options::default())?;
            enrolment(root)
        }
        What::Proxy { only } => {
            build_ebpf::run(root, build_ebpf::Options::default())?;
            proxy::run(root, arguments.long, only)
        }
    }
}

/// With a Kafka beside it, whose topic has as many partitions as one would have that takes so much.
fn journal(root: &Path, long: bool) -> Result<()> {
    let kafka = Kafka::start()?;
    kafka.create_topic(TOPIC, PARTITIONS, &[])?;
    let broker = format!("{}/{TOPIC}", kafka.bootstrap());
    let gibibytes = if long { "10" } else { "1" };
    let environment = [("WEIR_BENCH_KAFKA", broker.as_str()), ("WEIR_BENCH_GIB", gibibytes)];
    cargo_bench(root, "journal", "dev", &environment, &OPTIMISED)
}

/// Runs a bench; the packages `optimised` are so whatever the profile says.
fn cargo_bench(
    root: &Path,
    name: &str,
    profile: &str,
    environment: &[(&str, &str)],
    optimised: &[&str],
) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(["bench", "--locked", "--profile", profile, "-p", "weir-agent", "--bench", name]);
    command.envs(environment.iter().copied());
    for package in optimised {
        command.arg(format!("--config=profile.{profile}.package.{package}.opt-level=3"));
    }
    let status = command.current_dir(root).status().context("cannot start cargo")?;
    if !status.success() {
        bail!(
            "the bench {name} ended with {status}; if nothing above says why, does it need root, or a machine without an agent?"
        );
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
