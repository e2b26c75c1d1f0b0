//! The command line of `weir-agent`: arguments in, exit codes out; everything else is in the library.
//!
//! Exit codes: 0 for success, 1 for failure, 2 for usage; `exec` ends with the code of its command.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use weir_agent::{
    doctor::{self, DoctorOptions},
    exec::{self, ExecOptions},
};

/// Makes the pods of a Kubernetes node act through a recording gateway.
#[derive(Parser)]
#[command(name = "weir-agent", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run one command and record its Kubernetes API calls; no cluster install, no change to the command.
    Exec {
        /// Configuration whose node, tenant, journal and limits apply.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Kubeconfig [default: $KUBECONFIG, else ~/.kube/config of the invoking user].
        #[arg(long, value_name = "FILE")]
        kubeconfig: Option<PathBuf>,
        /// Journal [default: ~/.local/state/weir/journal of the invoking user].
        #[arg(long, value_name = "DIR")]
        journal: Option<PathBuf>,
        /// Do not say at the end what was recorded.
        #[arg(long, short)]
        quiet: bool,
        /// The command and its arguments.
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Say what this node can and cannot do, each with the mend; exit 1 if a must is missing.
    Doctor {
        /// Configuration of `run`; without one, what `exec` needs is looked at.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Kubeconfig for `exec` [default: $KUBECONFIG, else ~/.kube/config of the invoking user].
        #[arg(long, value_name = "FILE", conflicts_with = "config")]
        kubeconfig: Option<PathBuf>,
        /// Journal for `exec`.
        #[arg(long, value_name = "DIR", conflicts_with = "config")]
        journal: Option<PathBuf>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Exec { config, kubeconfig, journal, quiet, command } => {
            log_to_stderr("warn");
            execute(&ExecOptions { config, kubeconfig, journal, quiet, command })
        }
        Command::Doctor { config, kubeconfig, journal, json } => {
            examine(&DoctorOptions { config, kubeconfig, journal }, json)
        }
    }
}

fn execute(options: &ExecOptions) -> ExitCode {
    match exec::run(options) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("weir-agent: {}", doctor::chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

#[expect(clippy::print_stdout, reason = "the report is what the command is for")]
fn examine(options: &DoctorOptions, json: bool) -> ExitCode {
    let report = doctor::run(options);
    match json.then(|| report.json()) {
        None => println!("{report}"),
        Some(Ok(text)) => println!("{text}"),
        Some(Err(error)) => {
            eprintln!("weir-agent: cannot write the report as JSON: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::from(report.exit_code())
}

fn log_to_stderr(default: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("WEIR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}
