//! `cargo xtask testbed`: the command line of [`weir_tests::testbed`].

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use weir_tests::Testbed;
use weir_tests::components::{self, Components};
use weir_tests::progress::Progress;
use weir_tests::wait::interrupt_on_signals;
use weir_tests::{kafka, opensearch};

/// A one-node Kubernetes cluster of real components on this machine.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Folder of the testbed [default: $XDG_STATE_HOME/weir-testbed, else ~/.local/state/weir-testbed].
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install Debian packages, build Go modules and fetch the tests' Kafka, as far as they are missing.
    Build {
        /// Instead, what tests use beside it: clients, Helm, promtool and others.
        #[arg(long)]
        tools: bool,
    },
    /// Build what is missing, start everything and wait until pods can run.
    Up,
    /// Stop and remove everything, also what a failed `up` left.
    Down,
    /// List the processes; exit 1 if the testbed is not whole.
    Status,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    interrupt_on_signals()?;
    let folder = match &arguments.dir {
        Some(folder) => folder.clone(),
        None => Testbed::default_folder()?,
    };
    match arguments.command {
        Command::Build { tools: true } => components::build_tools(Progress::Shown),
        Command::Build { tools: false } => {
            Components::build(Progress::Shown)?;
            kafka::install(Progress::Shown)?;
            opensearch::install(Progress::Shown)
        }
        Command::Up => {
            let testbed = Testbed::up(&folder, Progress::Shown)?;
            let kubeconfig = testbed.layout().kubeconfig("admin");
            let kubectl = testbed.components().binary("kubectl");
            println!("{} --kubeconfig {}", kubectl.display(), kubeconfig.display());
            Ok(())
        }
        Command::Down => Testbed::down(&folder, Progress::Shown),
        Command::Status => {
            let Some(state) = Testbed::status(&folder)? else {
                bail!("no testbed in {}; run `cargo xtask testbed up`", folder.display());
            };
            for process in &state.processes {
                let word = if process.is_running() { "running" } else { "ended" };
                println!("{word:8} {:>8} {:24} {}", process.pid, process.name, process.log.display());
            }
            if !state.ready || state.processes.iter().any(|process| !process.is_running()) {
                bail!("the testbed is not whole; run `cargo xtask testbed down`, then `up`");
            }
            println!("API server {}", state.api_server);
            Ok(())
        }
    }
}
