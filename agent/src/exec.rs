//! `weir-agent exec`: one command under interception, no cluster install.
//!
//! Here are the order of things and the way back from each of them; the parts are in the sub-modules. Everything is
//! checked before anything is started, and nothing of it outlives the command but its journal.

use std::{ffi::OsString, path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use nix::{sys::signal::SigSet, unistd::Uid};
use rustls::pki_types::ServerName;
use tokio::{sync::watch, task::JoinSet};
use tracing::warn;

use self::{
    api_set::{ApiSetError, Target},
    cgroup::{CgroupError, CommandCgroup},
    child::{ChildError, Spec},
    interceptor::{Interceptor, InterceptorError},
    invoker::{Invoker, InvokerError},
    journal::JournalError,
    kubeconfig::{Kubeconfig, KubeconfigError, Overlay, Verification},
    signals::{Blocked, Signals},
    upstream::UpstreamError,
};
use crate::{
    app,
    auth::Policy,
    config::{self, Config, ConfigError},
    proxy::{self, ClusterUpstream, Endpoints, Proxy, ProxyOptions},
    recording::{PodQuota, Recorder, RecorderOptions, RecordingError},
    trust::{self, Authority, ServingNames, TrustError, authority::EphemeralCa},
};

pub mod api_set;
pub mod cgroup;
pub mod child;
pub mod interceptor;
pub mod invoker;
pub mod journal;
pub mod kubeconfig;
mod kubeconfig_file;
#[doc(hidden)]
pub mod probe;
pub mod proxy_environment;
pub mod signals;
pub mod upstream;

/// How long what is still open when the command has ended may take: answers nobody reads any more.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);
/// A session is the whole command, however long it pauses.
const SESSION_IDLE_TIMEOUT: Duration = Duration::from_hours(24);

/// What to run, and how.
#[derive(Clone, Debug, Default)]
pub struct ExecOptions {
    /// Configuration whose node, tenant, journal and limits apply; its clusters and enrolment do not.
    pub config: Option<PathBuf>,
    /// Kubeconfig; else `$KUBECONFIG`, else `~/.kube/config` of the invoking user.
    pub kubeconfig: Option<PathBuf>,
    /// Journal; else that of the configuration, else in the invoking user's state folder.
    pub journal: Option<PathBuf>,
    /// Whether to keep quiet about what was recorded.
    pub quiet: bool,
    /// The command and its arguments.
    pub command: Vec<OsString>,
}

/// Why the command was not run, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is no command.
    #[error("no command; say what to run: weir-agent exec -- CMD ARGS…")]
    NoCommand,
    /// Not root.
    #[error("exec needs root to load kernel programs; run it with sudo: the command still runs as you")]
    NotRoot,
    /// The process cannot be set up.
    #[error("cannot {action}")]
    Runtime {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The invoking user.
    #[error(transparent)]
    Invoker(#[from] InvokerError),
    /// The kubeconfig.
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
    /// The API servers.
    #[error(transparent)]
    ApiSet(#[from] ApiSetError),
    /// TLS to an API server.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// A name that no certificate can be verified for.
    #[error("cluster {cluster:?}: {name:?} is no host name; correct server or tls-server-name")]
    ServerName {
        /// The cluster.
        cluster: String,
        /// The name.
        name: String,
    },
    /// The certificate for the command.
    #[error(transparent)]
    Trust(Box<TrustError>),
    /// The journal's folder.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The kernel's part.
    #[error(transparent)]
    Interceptor(Box<InterceptorError>),
    /// The command itself.
    #[error(transparent)]
    Child(#[from] ChildError),
}

impl From<TrustError> for ExecError {
    fn from(error: TrustError) -> Self {
        Self::Trust(Box::new(error))
    }
}

impl From<InterceptorError> for ExecError {
    fn from(error: InterceptorError) -> Self {
        Self::Interceptor(Box::new(error))
    }
}

impl ExecError {
    /// The exit code: 2 for usage, the shells' 126 and 127 for a command that cannot be run, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoCommand => 2,
            Self::Child(error) => error.exit_code(),
            _ => 1,
        }
    }
}

/// Runs the command and gives its exit code (128 and the number of the signal that ended it). Call it before any
/// thread is started: signals are blocked in all threads of the process. Makes its own runtime.
///
/// # Errors
/// See [`ExecError`]; the command has not been started then, but for errors of its own end.
pub fn run(options: &ExecOptions) -> Result<u8, ExecError> {
    if options.command.is_empty() {
        return Err(ExecError::NoCommand);
    }
    if !Uid::effective().is_root() {
        return Err(ExecError::NotRoot);
    }
    let failed = |action| move |source| ExecError::Runtime { action, source };
    let blocked = Blocked::new().map_err(failed("block signals"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(failed("start the runtime"))?;
    runtime.block_on(async {
        let signals = blocked.listen().map_err(failed("listen to signals"))?;
        prepare(options, blocked.before()).await?.run(signals).await
    })
}

/// All that is known before anything is started.
struct Session {
    invoker: Invoker,
    targets: Vec<Target>,
    overlays: Vec<Overlay>,
    upstreams: Vec<ClusterUpstream>,
    /// Keeps certificates fresh; ends with the session.
    renewals: JoinSet<()>,
    recorder: RecorderOptions,
    command: Vec<OsString>,
    blocked: SigSet,
    kubeconfig: Option<PathBuf>,
    quiet: bool,
}

async fn prepare(options: &ExecOptions, blocked: SigSet) -> Result<Session, ExecError> {
    let environment = |name: &str| std::env::var(name).ok();
    let config =
        options.config.as_deref().map(|path| Config::load(path, &config::default_node())).transpose()?;
    let invoker = Invoker::find(environment)?;
    let paths =
        kubeconfig::paths(options.kubeconfig.as_deref(), environment("KUBECONFIG").as_deref(), &invoker.home);
    let kubeconfig = invoker.with_rights(|| Kubeconfig::load(&paths))??;
    let targets = api_set::targets(&kubeconfig, environment)?;

    let ca = EphemeralCa::generate()?;
    let overlays = invoker.with_rights(|| kubeconfig.overlays(ca.certificate_pem()))??;
    let authority = Arc::new(Authority::Ephemeral(ca));
    let mut renewals = JoinSet::new();
    let mut upstreams = Vec::new();
    for target in &targets {
        upstreams.push(upstream(target, &authority, &mut renewals).await?);
    }
    let recorder = recorder_options(options, config, &invoker, &targets);
    let made = options.kubeconfig.as_ref().map(std::path::absolute).transpose();
    let kubeconfig =
        made.map_err(|source| ExecError::Runtime { action: "find the working directory", source })?;
    let (command, quiet) = (options.command.clone(), options.quiet);
    Ok(Session {
        invoker,
        targets,
        overlays,
        upstreams,
        renewals,
        recorder,
        command,
        blocked,
        kubeconfig,
        quiet,
    })
}

async fn upstream(
    target: &Target,
    authority: &Arc<Authority>,
    renewals: &mut JoinSet<()>,
) -> Result<ClusterUpstream, ExecError> {
    let server_name = ServerName::try_from(target.server_name.clone()).map_err(|_invalid| {
        ExecError::ServerName { cluster: target.name().to_owned(), name: target.server_name.clone() }
    })?;
    let mut names = ServingNames::default();
    names.add_host(&target.server.host);
    names.add_host(&target.server_name);
    let accepted_names = names.all().collect();
    let (never_changed, names) = watch::channel(names);
    let (serving, renewal) = trust::serve(Arc::clone(authority), names, None).await?;
    renewals.spawn(async move {
        renewal.run().await;
        drop(never_changed);
    });
    // Whoever runs the command acts with their own credential: there is nobody to be verified against.
    let policy = Arc::new(ArcSwap::from_pointee(Policy::open(target.name().to_owned())));
    Ok(ClusterUpstream {
        own_tls: None,
        policy,
        name: target.name().to_owned(),
        names: accepted_names,
        endpoints: Endpoints::OriginalDestination,
        server_name,
        tls: upstream::tls(target)?,
        serving,
    })
}

fn recorder_options(
    options: &ExecOptions,
    config: Option<Config>,
    invoker: &Invoker,
    targets: &[Target],
) -> RecorderOptions {
    let clusters = targets.iter().map(|target| target.name().to_owned()).collect();
    let state_home = std::env::var("XDG_STATE_HOME").ok();
    let mut recorder = match config {
        Some(config) => app::recorder_options(&config),
        None => {
            let directory = invoker.journal(state_home.as_deref());
            RecorderOptions::new(directory, config::default_node(), Vec::new())
        }
    };
    if let Some(directory) = &options.journal {
        recorder.directory.clone_from(directory);
    }
    // There is one caller, who takes nothing from a neighbour.
    let pod_quota = PodQuota::UNLIMITED;
    RecorderOptions { clusters, session_idle_timeout: SESSION_IDLE_TIMEOUT, pod_quota, ..recorder }
}

impl Session {
    /// Records the command from its start to the end of the last process that it left.
    async fn run(mut self, signals: Signals) -> Result<u8, ExecError> {
        let directory = self.recorder.directory.clone();
        journal::prepare(&directory, &self.invoker)?;
        let recorder = Recorder::start(self.recorder.clone())?;
        for (index, target) in self.targets.iter().enumerate() {
            if target.verification == Verification::Nothing {
                let message = "the API server's certificate is not verified (insecure-skip-tls-verify); replace it \
                     by certificate-authority-data";
                recorder.finding(Some(index), None, "insecureSkipTlsVerify", message);
            }
        }
        let (quiet, invoker) = (self.quiet, self.invoker.clone());
        let mut renewals = std::mem::take(&mut self.renewals);
        let outcome = self.intercepted(&recorder, signals).await;
        renewals.shutdown().await;
        let reason = match &outcome {
            Ok((code, _)) => format!("the command ended with exit code {code}"),
            Err(error) => error.to_string(),
        };
        // The command's exit code is the contract; a record that is not whole is said all the same.
        if let Err(error) = recorder.stop(&reason).await {
            eprintln!("weir-agent: the record is incomplete: {}", crate::doctor::chain(&error));
        }
        if let Err(error) = journal::hand_over(&directory, &invoker) {
            eprintln!("weir-agent: the journal {} stays root's: {error}", directory.display());
        }
        let (code, redirected) = outcome?;
        if !quiet {
            eprintln!("{}", summary(redirected, &directory.display().to_string()));
        }
        Ok(code)
    }

    /// Gives the command's exit code and how many of its connections were redirected.
    async fn intercepted(self, recorder: &Recorder, signals: Signals) -> Result<(u8, u64), ExecError> {
        let proxy = Proxy::new(ProxyOptions {
            clusters: self.upstreams,
            recorder: recorder.clone(),
            limits: proxy::Limits::default(),
            traces: None,
        });
        let cgroup = CommandCgroup::create()?;
        let mut interceptor = Interceptor::start(&cgroup, self.targets, &proxy, recorder).await?;
        let spec = Spec {
            command: self.command,
            procs: cgroup.open_procs()?,
            invoker: self.invoker,
            blocked: self.blocked,
            kubeconfig: self.kubeconfig,
            overlays: self.overlays,
        };
        let outcome = supervise(spec, signals).await;
        // Also after an error: whoever is in the cgroup must not go on unrecorded.
        let left = cgroup.end().await?;
        if left > 0 {
            warn!(
                event = "exec-processes-ended",
                processes = left,
                "ended processes that the command had left behind"
            );
        }
        interceptor.stop().await;
        proxy.drain(DRAIN_DEADLINE).await;
        let redirected = interceptor.counters().map_or(0, |counters| counters.redirected);
        Ok((outcome?, redirected))
    }
}

/// Runs the command to its end, passing signals on.
async fn supervise(spec: Spec, mut signals: Signals) -> Result<u8, ExecError> {
    let mut running = child::start(spec).await?;
    loop {
        tokio::select! {
            status = running.ended() => return Ok(child::exit_code(status?)),
            signal = signals.next() => match signal {
                Ok(signal) => running.signal(signal),
                Err(source) => return Err(ExecError::Runtime { action: "read signals", source }),
            },
        }
    }
}

/// The line at the end.
fn summary(redirected: u64, journal: &str) -> String {
    if redirected == 0 {
        return "weir: the command connected to no API server of its kubeconfig".to_owned();
    }
    let connections = if redirected == 1 { "connection" } else { "connections" };
    format!(
        "weir: recorded {redirected} {connections}; list: weir sessions --from {journal}, replay: weir replay \
         --from {journal} ID"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_says_how_to_replay() {
        assert_eq!(
            summary(2, "/j"),
            "weir: recorded 2 connections; list: weir sessions --from /j, replay: weir replay --from /j ID"
        );
        assert!(summary(0, "/j").contains("no API server"));
    }

    #[test]
    fn usage_is_exit_code_two() {
        let error = run(&ExecOptions::default()).expect_err("no command");
        assert_eq!(error.exit_code(), 2);
    }
}
