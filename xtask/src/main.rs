//! Developer commands. Each is a module; this file is only the command line.
//!
//! `cargo xtask` needs nothing but the pinned toolchain: what a command needs beyond that it finds, makes or
//! names with the mend.
#![expect(clippy::print_stdout, reason = "a command line's results go to standard output")]

mod bench;
mod build_ebpf;
mod chaos;
mod chart;
mod cross;
mod demo;
mod dist;
mod docs;
mod fuzz;
mod kernels;
mod logs;
mod native;
mod sbom;
mod test;
mod testbed;
mod tidy;

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

/// Developer commands of Weir.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure on this machine: kernel programs, identity, enrolment, commits, the journal and Kafka, the proxy beside others.
    Bench(bench::Arguments),
    /// Build the kernel programs, making the toolchain for them if need be.
    BuildEbpf(build_ebpf::Options),
    /// Cut power, fail system calls, kill agents and brokers, with fresh seeds until the time is over; writes docs/chaos.md.
    Chaos(chaos::Arguments),
    /// The whole story on this machine: set-up, a pod at work, its record replayed, verified and compared.
    Demo(demo::Arguments),
    /// Record conversations of Kubernetes' own clients and servers of streams, and bodies of its codecs, anew: what `cargo test`
    /// holds decoders and masks to.
    Conversations,
    /// Build what is given away, into target/dist: image, tarball, chart, list of packages, checksums; for x86_64, aarch64 or both in one image.
    Dist(dist::Arguments),
    /// Write the documentation that is generated from types: docs/configuration.md with its JSON schema, the chart's values.schema.json, docs/metrics.md.
    Docs,
    /// Run the fuzz targets of `tests/fuzz`, all or one.
    Fuzz(fuzz::Arguments),
    /// A one-node Kubernetes cluster of real components on this machine.
    Testbed(testbed::Arguments),
    /// Check what keeps the tree in order: layers, file sizes, headers, lints.
    Tidy,
    /// Check licences, advisories, duplicate versions and sources of dependencies.
    Deny,
    /// Test the alert rules of deploy/prometheus with promtool.
    Rules,
    /// Check the Helm chart: lint, what it renders to, and which mistakes in values it refuses.
    Chart {
        /// Compare the runner of its test with the chart in this checkout of Actions Runner Controller, and nothing else.
        #[arg(long, value_name = "FOLDER")]
        arc: Option<std::path::PathBuf>,
    },
    /// Run everything that must pass before a change lands.
    Test {
        /// Full counts where a suite has fewer by default.
        #[arg(long)]
        long: bool,
        /// Only the kernel tests, on older kernels under qemu; a part of the whole.
        #[arg(long, conflicts_with = "long")]
        kernels: bool,
        /// With --kernels: one kernel after the other, so that one processor is left for others.
        #[arg(long, requires = "kernels")]
        in_turn: bool,
        /// With --kernels: only the tests whose names contain this.
        #[arg(
            long,
            requires = "kernels",
            value_name = "NAME",
            default_value = "",
            hide_default_value = true
        )]
        only: String,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not the Debug form of anyhow, which adds a backtrace that says nothing to who runs a command.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent folder")?;
    match command {
        Command::Bench(arguments) => bench::run(root, &arguments),
        Command::BuildEbpf(options) => build_ebpf::run(root, options).map(drop),
        Command::Chaos(arguments) => chaos::run(root, &arguments),
        Command::Demo(arguments) => demo::run(root, &arguments),
        Command::Conversations => test::conversations(root),
        Command::Dist(arguments) => dist::run(root, &arguments),
        Command::Docs => docs::run(root),
        Command::Fuzz(arguments) => fuzz::run(root, &arguments),
        Command::Testbed(arguments) => testbed::run(&arguments),
        Command::Tidy => tidy::run(root),
        Command::Deny => test::deny(root),
        Command::Rules => test::rules(root),
        Command::Chart { arc } => chart::run(root, arc.as_deref()),
        Command::Test { kernels: true, in_turn, only, .. } => kernels::run(root, in_turn, &only),
        Command::Test { long, .. } => test::run(root, long),
    }
}
