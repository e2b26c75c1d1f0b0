//! The canary: a connection of the agent's own that must be refused, and one that must be redirected, so that "ready"
//! means that the kernel does what it was told and not that it was told. Links that look healthy can enforce nothing.
//!
//! Both come from a child process in a cgroup made for it directly below the root of the tree, so that the programs at
//! the root judge it (no root of pods is above it), and are dialled to an address of the real API set:
//!
//! 1. enrolled without a listener: refused at once, and the kernel counted the refusal. An API server that is down
//!    refuses as well, but is not counted;
//! 2. enrolled with a listener of the agent: arrives there, with a flow record that names the canary's cgroup and the
//!    address dialled.
//!
//! Refusal comes first, and a failure ends the check: should nothing be in force, one connection to the API server is made
//! and closed, without a byte. What the canary does is in the node's counters and in a row of its own, in no pod's, and
//! its refusals are not recorded. Process and cgroup are gone when a check ends.

use std::{
    fs, io,
    net::SocketAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockname, getsockopt, socket, sockopt,
    },
    unistd::{ForkResult, fork, pipe2},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weir_common::kernel::{CgroupEntry, Class, KUBELET};

use super::{
    cgroup,
    listener::{Listener, ListenerError, Namespace},
    loader::{Kernel, KernelError},
    observed::Observed,
    run::InterceptionError,
};
use crate::{doctor, recording::Recorder};

/// How often it is sent.
const INTERVAL: Duration = Duration::from_secs(60);
/// The same while it fails.
const INTERVAL_FAILING: Duration = Duration::from_secs(5);
/// The same while there is no address to dial yet.
const INTERVAL_WAITING: Duration = Duration::from_millis(250);
/// How long a connect, and then its arrival, may take. Both happen within this machine.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How its cgroups begin; the id of the agent's process follows.
const PREFIX: &str = "weir-canary-";
/// Attempts to remove the cgroup, which the kernel empties a moment after its process has ended.
const REMOVE_ATTEMPTS_MAX: usize = 50;

/// What the last check has shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// There was none yet.
    #[default]
    Unknown,
    /// One connection was refused, one redirected.
    Passed,
    /// Why not, with what it means.
    Failed(String),
}

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    /// Nothing to dial.
    #[error("no address of an API server is known yet")]
    NoAddress,
    /// The canary's cgroup.
    #[error("its cgroup {} cannot be made or entered; is the tree writable, and this root?", path.display())]
    Cgroup {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The canary's process.
    #[error("its process cannot be made or asked; is the agent limited in processes?")]
    Process(#[source] io::Error),
    /// The maps.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The listener that it must arrive at.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// The thread panicked.
    #[error("its thread panicked")]
    Task(#[from] tokio::task::JoinError),
    /// Nothing refuses.
    #[error(
        "a connection that must be refused was established: the kernel programs are not in force; are they detached, or another's program before them?"
    )]
    NotRefused,
    /// Only the guard drops.
    #[error("a connection that must be refused at once was not within {} s: the guard alone is in force", TIMEOUT.as_secs())]
    NotAtOnce,
    /// The refusal is not the programs'.
    #[error(
        "a connection was refused by someone else than the kernel programs ({errno}): they are not in force, or another's program is before them"
    )]
    RefusedElsewhere {
        /// With what.
        errno: Errno,
    },
    /// There is no redirect.
    #[error("a connection that must be redirected was refused ({errno}); is the loopback interface up?")]
    NotConnected {
        /// With what.
        errno: Errno,
    },
    /// There is no redirect, and the API server answers.
    #[error(
        "a connection that must be redirected was established and did not arrive at the agent: it went to the API server itself"
    )]
    NotArrived,
    /// The redirect leaves no trace.
    #[error("a redirected connection arrived without a flow record that names it; is the flow map full?")]
    NoFlow,
}

/// Where canaries are sent from, and what they are told by.
#[derive(Debug)]
pub struct Canary {
    kernel: Arc<Kernel>,
    recorder: Recorder,
    observed: Arc<Observed>,
    /// Its cgroup, while there is one.
    folder: PathBuf,
}

impl Canary {
    /// One below the root of the tree that is mounted at `mount`. What killed agents have left is removed.
    pub fn new(kernel: Arc<Kernel>, recorder: Recorder, observed: Arc<Observed>, mount: &Path) -> Self {
        remove_left(mount);
        let folder = mount.join(format!("{PREFIX}{}", std::process::id()));
        Self { kernel, recorder, observed, folder }
    }

    /// Sends canaries until cancelled. While a successor takes over none is sent: it may forget what this one has put into
    /// the maps.
    pub(super) async fn run(
        self,
        mut settled: watch::Receiver<bool>,
        mut frozen: watch::Receiver<bool>,
        cancellation: CancellationToken,
    ) -> Result<&'static str, InterceptionError> {
        // Until then entries of cgroups that are no pod's are removed from the maps.
        let settled = async { settled.wait_for(|settled| *settled).await.is_ok() };
        if cancellation.run_until_cancelled(settled).await != Some(true) {
            return Ok("sending canaries");
        }
        loop {
            let pause = if *frozen.borrow_and_update() {
                INTERVAL
            } else {
                let checked = self.check().await;
                if *frozen.borrow() { INTERVAL_FAILING } else { self.judge(checked) }
            };
            tokio::select! {
                () = cancellation.cancelled() => return Ok("sending canaries"),
                Ok(()) = frozen.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Says what a check has shown, where that is new; returns when to send the next.
    fn judge(&self, checked: Result<(), CanaryError>) -> Duration {
        let former = self.observed.canary();
        let health = match checked {
            Ok(()) => Health::Passed,
            // Before the clusters are reached there is nothing to dial.
            Err(CanaryError::NoAddress) => Health::Unknown,
            Err(error) => Health::Failed(doctor::chain(&error)),
        };
        match (&former, &health) {
            (_, Health::Failed(reason)) if former != health => {
                tracing::error!(
                    event = "canary-failed",
                    reason,
                    "the canary failed: what must be intercepted may not be"
                );
                let message = format!("the canary failed: {reason}");
                self.recorder.finding(None, None, "canaryFailed", &message);
            }
            (Health::Failed(_), Health::Passed) => {
                tracing::warn!(
                    event = "canary-recovered",
                    "the canary is refused and redirected again as it must be"
                );
                let message = "the canary is refused and redirected again as it must be";
                self.recorder.finding(None, None, "canaryRecovered", message);
            }
            _ => {}
        }
        let pause = match health {
            Health::Passed => INTERVAL,
            Health::Failed(_) => INTERVAL_FAILING,
            Health::Unknown => INTERVAL_WAITING,
        };
        self.observed.checked(health);
        pause
    }

    /// Sends one, once refused and once redirected.
    ///
    /// # Errors
    /// What is not as it must be; see [`CanaryError`].
    pub async fn check(&self) -> Result<(), CanaryError> {
        let servers = self.kernel.api_endpoints()?;
        let servers = servers.into_iter().filter(|(_, cluster)| *cluster != KUBELET);
        let address = servers.map(|(address, _)| address).min().ok_or(CanaryError::NoAddress)?;
        let at = |source| CanaryError::Cgroup { path: self.folder.clone(), source };
        match fs::create_dir(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(error)),
            _ => {}
        }
        let cgroup = cgroup::id(&self.folder).map_err(|error| at(io::Error::other(error)))?;
        self.observed.canary_begins(cgroup);
        let result = match self.refused(cgroup, address).await {
            Ok(()) => self.redirected(cgroup, address).await,
            failed => failed,
        };
        if let Ok(Some(counters)) = self.kernel.pod_counters(cgroup) {
            self.observed.canary_counted(&counters);
        }
        let forgotten = self.kernel.forget_cgroup(cgroup);
        remove(&self.folder).await;
        result.and(forgotten.map_err(CanaryError::from))
    }

    /// The connection that must be refused, by the programs and by nobody else.
    async fn refused(&self, cgroup: u64, address: SocketAddr) -> Result<(), CanaryError> {
        self.kernel.classify(cgroup, entry(None))?;
        let denied = || -> Result<u64, CanaryError> {
            Ok(self.kernel.pod_counters(cgroup)?.unwrap_or_default().denied_no_listener)
        };
        let before = denied()?;
        match self.dial(address).await? {
            Ok(_) => Err(CanaryError::NotRefused),
            Err(Errno::ETIMEDOUT) => Err(CanaryError::NotAtOnce),
            Err(Errno::ECONNREFUSED) if denied()? > before => Ok(()),
            Err(errno) => Err(CanaryError::RefusedElsewhere { errno }),
        }
    }

    /// The connection that must arrive here.
    async fn redirected(&self, cgroup: u64, address: SocketAddr) -> Result<(), CanaryError> {
        let listener = Listener::in_netns(Namespace::Own)?;
        self.kernel.classify(cgroup, entry(Some(&listener)))?;
        let port = self.dial(address).await?.map_err(|errno| CanaryError::NotConnected { errno })?;
        let arrival = async {
            loop {
                // Anybody may dial the port; only the canary's own connection is waited for.
                match listener.accept().await {
                    Ok((stream, from)) if from.port() == port => return Ok((stream.local_addr()?, from)),
                    Ok(_) => {}
                    Err(error) => return Err(error),
                }
            }
        };
        let arrived = tokio::time::timeout(TIMEOUT, arrival).await.map_err(|_| CanaryError::NotArrived)?;
        let (local, from) = arrived.map_err(CanaryError::Process)?;
        let flow = self.kernel.take_flow(listener.netns(), from, local).ok_or(CanaryError::NoFlow)?;
        if flow.original != address || flow.record.pod_cgroup != cgroup {
            return Err(CanaryError::NoFlow);
        }
        Ok(())
    }

    /// Connects from a process in the cgroup, and closes at once; gives the client's port.
    async fn dial(&self, address: SocketAddr) -> Result<Result<u16, Errno>, CanaryError> {
        let folder = self.folder.clone();
        let procs = fs::File::options().write(true).open(folder.join("cgroup.procs"));
        let procs = procs.map_err(|source| CanaryError::Cgroup { path: folder, source })?;
        let dialled = tokio::task::spawn_blocking(move || dial(procs.into(), address)).await?;
        dialled.map_err(CanaryError::Process)
    }
}

fn entry(listener: Option<&Listener>) -> CgroupEntry {
    CgroupEntry {
        listener_netns: listener.map_or(0, Listener::netns),
        class: Class::Enrolled as u32,
        listener_port: listener.map_or(0, |listener| u32::from(listener.port())),
    }
}

/// What the child writes: an errno (0: connected) and the port of its end.
const REPORT_BYTES: usize = 6;

/// A whole process is in a cgroup, and so is what it connects: hence a child. It is not another program, so that it
/// depends on no file; it only makes system calls, and shares nothing but what it needs, so that no socket of the agent's
/// stays open for it.
fn dial(procs: OwnedFd, address: SocketAddr) -> io::Result<Result<u16, Errno>> {
    let (report, write) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let target = SockaddrStorage::from(address);
    // SAFETY: the child only makes system calls on what was made before, and leaves by _exit.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let (errno, port) = match in_child(&procs, &write, address.is_ipv4(), &target) {
                Ok(port) => (0, port),
                Err(errno) => (errno as i32, 0),
            };
            let mut bytes = [0; REPORT_BYTES];
            bytes[..4].copy_from_slice(&errno.to_ne_bytes());
            bytes[4..].copy_from_slice(&port.to_ne_bytes());
            let _ = nix::unistd::write(&write, &bytes);
            // SAFETY: ends the child without running the agent's exit handlers.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop((procs, write));
            let mut bytes = [0; REPORT_BYTES];
            let read = io::Read::read_exact(&mut fs::File::from(report), &mut bytes);
            // It ends by itself: its wait has a limit.
            while nix::sys::wait::waitpid(child, None) == Err(Errno::EINTR) {}
            read?;
            let [a, b, c, d, port @ ..] = bytes;
            let errno = i32::from_ne_bytes([a, b, c, d]);
            Ok(if errno == 0 { Ok(u16::from_ne_bytes(port)) } else { Err(Errno::from_raw(errno)) })
        }
    }
}

/// Runs between fork and _exit: neither allocates nor takes a lock.
fn in_child(procs: &OwnedFd, report: &OwnedFd, ipv4: bool, target: &SockaddrStorage) -> Result<u16, Errno> {
    // Above these two numbers is everything else that the agent has open.
    let (low, high) = if procs.as_raw_fd() < report.as_raw_fd() { (procs, report) } else { (report, procs) };
    for (first, last) in [
        (3, low.as_raw_fd() - 1),
        (low.as_raw_fd() + 1, high.as_raw_fd() - 1),
        (high.as_raw_fd() + 1, i32::MAX),
    ] {
        if first <= last {
            // SAFETY: takes numbers only; nothing in this process uses the descriptors that it closes.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
    nix::unistd::write(procs, b"0")?;
    let family = if ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    match connect(socket.as_raw_fd(), target) {
        Err(Errno::EINPROGRESS) => {
            let mut wait = [PollFd::new(std::os::fd::AsFd::as_fd(&socket), PollFlags::POLLOUT)];
            let timeout = PollTimeout::try_from(TIMEOUT).unwrap_or(PollTimeout::ZERO);
            if poll(&mut wait, timeout)? == 0 {
                return Err(Errno::ETIMEDOUT);
            }
            match getsockopt(&socket, sockopt::SocketError)? {
                0 => {}
                errno => return Err(Errno::from_raw(errno)),
            }
        }
        connected => connected?,
    }
    let own: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    let port = own.as_sockaddr_in().map(nix::sys::socket::SockaddrIn::port);
    let port = port.or_else(|| own.as_sockaddr_in6().map(nix::sys::socket::SockaddrIn6::port));
    port.ok_or(Errno::EAFNOSUPPORT)
}

/// Removes the cgroup as soon as the kernel has let the process go.
async fn remove(folder: &Path) {
    for _ in 0..REMOVE_ATTEMPTS_MAX {
        match fs::remove_dir(folder) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(event = "canary-cgroup-stays", cgroup = %folder.display(), %error, "cannot remove the canary's cgroup");
                return;
            }
            _ => return,
        }
    }
    tracing::warn!(event = "canary-cgroup-stays", cgroup = %folder.display(), "the canary's cgroup stays busy; it is removed with the next");
}

/// Removes cgroups of agents that are gone.
pub(super) fn remove_left(mount: &Path) {
    let program = |process: &str| fs::read(format!("/proc/{process}/comm")).ok();
    let own = program("self");
    for entry in fs::read_dir(mount).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        // The kernel may have given the number to another program since.
        let is_gone = |pid: u32| program(&pid.to_string()).is_none_or(|program| Some(program) != own);
        if pid.is_some_and(is_gone) {
            // One that is busy is of another pid namespace's agent.
            let _ = fs::remove_dir(entry.path());
        }
    }
}
