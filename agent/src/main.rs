//! The command line of `weir-agent`: arguments in, exit codes out; everything else is in the library.
//!
//! Exit codes: 0 for success, 1 for failure, 2 for usage; `exec` ends with the code of its command.

use std::{
    ffi::OsString,
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand};
use tracing_subscriber::{filter::filter_fn, layer::SubscriberExt as _, util::SubscriberInitExt as _};
use weir_agent::{
    app::{self, approver::ApproverOptions},
    aws,
    config::{self, Config, Source},
    doctor::{self, DoctorOptions},
    emergency,
    exec::{self, ExecOptions},
    explain::{self, ExplainOptions, Explanation},
    guard_unit,
    interception::{
        cgroup,
        guard::{self, Guarded},
        handover, loader, quarantine,
    },
    readiness, removal, status,
    support::{self, SupportOptions},
    trust::cluster_signer::SIGNER_NAME,
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
    /// Run the node agent (the DaemonSet's process).
    Run {
        /// Configuration file.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Log as JSON, one object a line.
        #[arg(long)]
        log_json: bool,
    },
    /// Approve the certificates that agents ask of the cluster's signer, and deny what no agent needs: once for a cluster, so that no
    /// agent needs the right to approve.
    Approver {
        /// The agents' service account, as NAMESPACE/NAME.
        #[arg(long, value_name = "ACCOUNT")]
        service_account: String,
        /// The signer that agents ask, as they have it in `trust.clusterSigner.signerName`.
        #[arg(long, value_name = "NAME", default_value = SIGNER_NAME)]
        signer: String,
        /// A name or address of the API server beside those that the cluster publishes, as the agents have it in `hostNames` or
        /// `addresses`. May be given several times.
        #[arg(long = "name", value_name = "HOST")]
        names: Vec<String>,
        /// Kubeconfig [default: the service account of this pod].
        #[arg(long, value_name = "FILE")]
        kubeconfig: Option<PathBuf>,
        /// Serve metrics and health by plain HTTP at this IP or IP:PORT [default port: 9155]; without it nothing is served.
        #[arg(long, value_name = "ADDRESS", value_parser = app::approver::metrics_address)]
        metrics: Option<SocketAddr>,
        /// Log as JSON, one object a line.
        #[arg(long)]
        log_json: bool,
    },
    /// Keep pods from the API servers until the agent runs: for the start of a node, before its kubelet. Changes nothing
    /// where an agent runs.
    Guard {
        /// Configuration file; without one, the addresses that an agent has stored in /var/lib/weir count.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
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
    /// Show whether an agent is alive, and what is in force in the kernel: programs, API set, cgroups by class, counters.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a bundle for whoever is to find out what is wrong here: versions, kernel, configuration, status, doctor, metrics, names
    /// of the journal's files, log. Without secrets and without anything that was recorded.
    Support {
        /// Configuration of `run`.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// File to write (tar.gz), which must not exist [default: standard output].
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Say which issuer, claims and rule would apply to a token or a pod, and why; exit 1 if the request would be refused.
    Explain {
        /// Configuration of `run`.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Cluster that is asked [default: the first of the configuration].
        #[arg(long, value_name = "NAME")]
        cluster: Option<String>,
        /// File with a bearer token.
        #[arg(long, value_name = "FILE")]
        token: Option<PathBuf>,
        /// The pod that asks, as NAMESPACE/NAME [default: the one that the token names, if it does].
        #[arg(long, value_name = "POD")]
        pod: Option<String>,
        /// What it asks.
        #[arg(long, value_name = "REQUEST", default_value = "GET /api/v1/pods")]
        request: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Cut a pod of this node off: its new connections, to anywhere, are refused at once, its open ones ended.
    Quarantine {
        /// The pod, as NAMESPACE/NAME or by UID (see `status`).
        #[arg(value_name = "POD")]
        pod: String,
        /// Let it connect again.
        #[arg(long)]
        lift: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Let requests go on for a time although their records cannot be made durable: the last resort while a journal or its
    /// disk is broken. Only where the configuration allows it; recorded, and shown by metrics and an alert.
    Emergency {
        #[command(subcommand)]
        action: Action,
    },
    /// Exit 0 if the agent of this pod (or, asked on the host itself, of this node) is ready: for probes.
    Ready,
    /// Copy this program to a node's own files, with the systemd unit that runs `guard` before the kubelet, and enable that: for the
    /// chart's init step. `uninstall --guard-unit ROOT` removes them.
    GuardUnit {
        /// The node's root folder, of which `opt` and `etc/systemd/system` must be there.
        #[arg(long, value_name = "ROOT")]
        root: PathBuf,
    },
    /// Remove every pin: the kernel programs detach, and nothing is intercepted any more.
    Uninstall(removal::NodeOptions),
    /// End this cluster's agents and wait until `uninstall` is done on every node, for the chart's hook; exit 1 where it fails.
    UninstallAll {
        /// Namespace of the DaemonSets `weir-agent`, which is deleted, and `weir-uninstall`, whose pods uninstall.
        #[arg(long, value_name = "NAME")]
        namespace: String,
        /// Name of Helm's release: agents that are not of it are left alone.
        #[arg(long, value_name = "NAME")]
        release: String,
        /// How long all of it may take: seconds, or a number with s, m or h.
        #[arg(long, value_name = "TIME", value_parser = duration)]
        patience: Duration,
    },
}

#[derive(Subcommand)]
enum Action {
    /// Begin, or begin anew.
    On {
        /// Configuration of `run`.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// Why; it is recorded.
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// How long at most: seconds, or a number with s, m or h.
        #[arg(long = "for", value_name = "TIME", value_parser = duration)]
        duration: Duration,
    },
    /// End it.
    Off,
}

/// `90`, `90s`, `30m`, `2h`.
fn duration(text: &str) -> Result<Duration, String> {
    let mut units = [('s', 1), ('m', 60), ('h', 3600)].into_iter();
    let (number, unit) =
        units.find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit))).unwrap_or((text, 1));
    let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    let seconds = seconds.filter(|seconds| *seconds > 0);
    seconds.map(Duration::from_secs).ok_or_else(|| "is no time such as 90s, 30m or 2h".to_owned())
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    // Before there is a thread. Where it fails, what is then not found is named by whoever looks for it.
    if nix::unistd::geteuid().is_root()
        && !matches!(command, Command::GuardUnit { .. })
        && let Err(error) = cgroup::enter_nodes_namespace()
    {
        eprintln!(
            "weir-agent: cannot enter the node's cgroup namespace, so cgroups may not be found: {error}; does \
             this container have CAP_SYS_ADMIN and CAP_SYS_PTRACE?"
        );
    }
    match command {
        Command::Run { config, log_json } => logged(log_json, || run(&config)),
        Command::Approver { service_account, signer, names, kubeconfig, metrics, log_json } => {
            logged(log_json, || {
                forbid_core_dumps()?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let options = ApproverOptions { service_account, signer, names, kubeconfig, metrics };
                Ok(runtime.block_on(app::approver::run(&options))?)
            })
        }
        Command::Guard { config } => {
            log_to_stderr("warn", false);
            finish(put_guard_in_force(config.as_deref()))
        }
        Command::Status { json } => finish(show_status(json)),
        Command::Support { config, output } => finish(write_bundle(config, output.as_deref())),
        Command::Explain { config, cluster, token, pod, request, json } => {
            log_to_stderr("warn", false);
            explain(&ExplainOptions { config, cluster, token, pod, request }, json)
        }
        Command::Quarantine { pod, lift, json } => finish(set_quarantine(&pod, lift, json)),
        Command::Emergency { action } => finish(set_emergency(action)),
        Command::Ready => {
            finish(require_root("ready").and_then(|()| Ok(readiness::check(Path::new(handover::STANDARD))?)))
        }
        Command::GuardUnit { root } => finish(guard_unit::install(&root).map_err(Into::into)),
        Command::Uninstall(options) => finish(uninstall(&options)),
        Command::UninstallAll { namespace, release, patience } => {
            finish(uninstall_all(namespace, release, patience))
        }
        Command::Exec { config, kubeconfig, journal, quiet, command } => {
            log_to_stderr("warn", false);
            if let Err(error) = forbid_core_dumps() {
                return finish(Err(error));
            }
            execute(&ExecOptions { config, kubeconfig, journal, quiet, command })
        }
        Command::Doctor { config, kubeconfig, journal, json } => {
            examine(&DoctorOptions { config, kubeconfig, journal }, json)
        }
    }
}

/// Something that runs for long, and says why it ended where it has said everything else.
fn logged(json: bool, run: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    log_to_stderr("info", json);
    let result = run();
    // Whoever collects JSON would lose, or choke on, a line that is none.
    if let (true, Err(error)) = (json, &result) {
        tracing::error!(event = "failed", "{}", doctor::chain(error.as_ref()));
        return ExitCode::FAILURE;
    }
    finish(result)
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

#[expect(clippy::print_stdout, reason = "the explanation is what the command is for")]
fn explain(options: &ExplainOptions, json: bool) -> ExitCode {
    let explained = || -> anyhow::Result<Explanation> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let explanation = runtime.block_on(explain::run(options))?;
        match json {
            true => println!("{}", serde_json::to_string_pretty(&explanation)?),
            false => print!("{explanation}"),
        }
        Ok(explanation)
    };
    match explained() {
        Ok(explanation) if explanation.refused.is_none() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => finish(Err(error)),
    }
}

/// Every connection of every pod is an open file, and the soft limit that processes inherit is that of interactive ones.
fn raise_open_files() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    tracing::info!(event = "open-files-raised", open_files = hard, "limit of open files raised");
    Ok(())
}

/// The dump of a process has all that its memory holds: keys of certificates, tokens, bodies.
fn forbid_core_dumps() -> anyhow::Result<()> {
    use anyhow::Context as _;
    nix::sys::prctl::set_dumpable(false).context("cannot forbid core dumps of this process")
}

fn run(path: &Path) -> anyhow::Result<()> {
    forbid_core_dumps()?;
    let configured = Source::load(path, &config::default_node())?;
    raise_open_files()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(app::run(configured));
    // Nobody waits for a thread that a pod's process holds up (`interception::reads`).
    runtime.shutdown_background();
    Ok(ended?)
}

#[expect(clippy::print_stdout, reason = "says what was done")]
fn put_guard_in_force(config: Option<&Path>) -> anyhow::Result<()> {
    require_root("guard")?;
    let options = match config {
        Some(path) => app::guard_options(&Config::load(path, &config::default_node())?),
        None => guard::Options {
            cgroup_root: None,
            pinning: loader::Pinning::standard(),
            clusters: None,
            state_directory: config::STATE_DIRECTORY.into(),
        },
    };
    match guard::once(&options, Path::new(handover::STANDARD))? {
        Guarded::AgentRuns => println!("an agent runs on this node: nothing to do"),
        Guarded::InForce { api_servers: 0, .. } => {
            println!(
                "in force, but no address of an API server is known: pods are kept from none until an agent has run"
            );
            eprintln!(
                "weir-agent: nothing is stored in {} yet, as before an agent has reached a cluster; name clusters[].addresses in a configuration, and give --config",
                options.state_directory.display()
            );
        }
        Guarded::InForce { api_servers, kubelets } => println!(
            "in force: pods are kept from {api_servers} addresses of API servers and {kubelets} of kubelets until an agent runs"
        ),
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the state is what the command is for")]
fn show_status(json: bool) -> anyhow::Result<()> {
    require_root("status")?;
    let status = status::read()?;
    match json {
        true => println!("{}", serde_json::to_string_pretty(&status)?),
        false => println!("{status}"),
    }
    Ok(())
}

fn write_bundle(config: Option<PathBuf>, output: Option<&Path>) -> anyhow::Result<()> {
    require_root("support")?;
    let mut stdout = std::io::stdout();
    anyhow::ensure!(
        output.is_some() || !stdout.is_terminal(),
        "the bundle is no text for a terminal; give --output FILE, or redirect it to a file"
    );
    let bundle = support::collect(&SupportOptions { config })?;
    match output {
        Some(path) => bundle.write(path)?,
        None => stdout.write_all(&bundle.bytes).and_then(|()| stdout.flush())?,
    }
    eprint!("{}", bundle.contents);
    Ok(())
}

#[expect(clippy::print_stdout, reason = "says what was done")]
fn set_quarantine(pod: &str, lift: bool, json: bool) -> anyhow::Result<()> {
    require_root("quarantine")?;
    let pins = loader::pin_folder();
    let done = if lift {
        quarantine::lift(&pins, pod)?
    } else {
        quarantine::begin(&pins, &cgroup::mount_point()?, pod)?
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&done)?);
    } else if lift {
        println!("{} is out of quarantine", done.pod);
    } else {
        println!("{} is in quarantine; {} open connections were ended", done.pod, done.connections_ended);
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "says what was done")]
fn set_emergency(action: Action) -> anyhow::Result<()> {
    require_root("emergency")?;
    let path = Path::new(emergency::STANDARD);
    match action {
        Action::On { config, reason, duration } => {
            let recording = Config::load(&config, &config::default_node())?.recording;
            let by = match std::env::var("SUDO_USER") {
                Ok(user) => format!("root, by its word for {user:?}"),
                Err(_) => "root".to_owned(),
            };
            emergency::begin(path, &recording, &reason, by, duration)?;
            println!(
                "requests go on without durable records for {} seconds, from within a second on; `weir-agent emergency off` ends it",
                duration.as_secs()
            );
        }
        Action::Off => match emergency::end(path)? {
            true => println!("ended; requests wait for their records again within a second"),
            false => println!("there was none"),
        },
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "says what was done")]
fn uninstall(options: &removal::NodeOptions) -> anyhow::Result<()> {
    require_root("uninstall")?;
    let done = |pins| println!("removed {pins} pins; pods reach their API servers directly from now on");
    Ok(removal::from_node(options, done)?)
}

#[expect(clippy::print_stdout, reason = "says what was done")]
fn uninstall_all(namespace: String, release: String, patience: Duration) -> anyhow::Result<()> {
    println!("uninstalled on {} nodes", removal::from_cluster(namespace, release, patience)?);
    Ok(())
}

/// To anybody else the bpf file system looks empty, which must not be taken for "nothing is in force".
fn require_root(command: &str) -> anyhow::Result<()> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "{command} needs root to reach the kernel's pins; run it with sudo"
    );
    Ok(())
}

fn finish(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("weir-agent: {}", doctor::chain(error.as_ref()));
    ExitCode::FAILURE
}

fn log_to_stderr(default: &str, json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("WEIR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // What shows secrets below INFO is out of reach of WEIR_LOG.
    let safe = filter_fn(aws::may_log);
    if json {
        builder.json().finish().with(safe).init();
    } else {
        builder.with_ansi(false).finish().with(safe).init();
    }
}
