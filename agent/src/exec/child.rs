//! The command itself: born into its cgroup, in a mount namespace where copies lie over the kubeconfig files,
//! with the invoking user's rights.
//!
//! It stays in this process's session and process group, so the terminal is its as it would be without Weir.
//! A thread of its own makes the namespace, starts the command and waits for it: the kernel ends the command
//! when that thread ends, so the command does not outlive its recording.

use std::{
    ffi::{CStr, OsString},
    fs,
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            fs::{OpenOptionsExt as _, fchown},
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_pdeathsig,
        signal::{SigSet, Signal, kill},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Pid, setgroups, setresgid, setresuid, write},
};
use tokio::sync::oneshot;

use super::{invoker::Invoker, kubeconfig::Overlay};

/// Folders any of which can carry the short-lived mount in which copies are made.
const STAGING: [&str; 4] = ["/run", "/tmp", "/dev/shm", "/mnt"];
/// Variables that sudo sets; the command is not under sudo any more.
const SUDO_VARIABLES: [&str; 4] = ["SUDO_COMMAND", "SUDO_GID", "SUDO_UID", "SUDO_USER"];

/// Why the command does not run.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// Its mount namespace cannot be made.
    #[error(
        "cannot {action} for the command's own view of the kubeconfig; does this process have CAP_SYS_ADMIN?"
    )]
    Namespace {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A copy cannot be laid over its file.
    #[error("cannot lay a copy over {}", path.display())]
    Overlay {
        /// The kubeconfig.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is no such command, or it is not executable.
    #[error("cannot run {command:?}")]
    Start {
        /// The command.
        command: OsString,
        /// Why not.
        source: io::Error,
    },
    /// The thread of the command is gone.
    #[error("lost the command; its thread ended early")]
    Lost,
}

impl ChildError {
    /// The exit code that shells give for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Start { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            Self::Start { .. } => 126,
            _ => 1,
        }
    }
}

/// What to run.
pub struct Spec {
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// `cgroup.procs` of its cgroup.
    pub procs: fs::File,
    /// With whose rights.
    pub invoker: Invoker,
    /// The signals that it starts with blocked.
    pub blocked: SigSet,
    /// What its `KUBECONFIG` is set to; none leaves it.
    pub kubeconfig: Option<PathBuf>,
    /// What lies over the kubeconfig files.
    pub overlays: Vec<Overlay>,
}

/// The running command.
#[derive(Debug)]
pub struct Running {
    pid: Arc<Mutex<Option<Pid>>>,
    ended: oneshot::Receiver<ExitStatus>,
}

impl Running {
    /// Sends it a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) {
        let pid = self.pid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = *pid {
            // It can only be gone or have changed its user; nothing to do about either.
            let _ = kill(pid, signal);
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The thread that waits for it is gone.
    pub async fn ended(&mut self) -> Result<ExitStatus, ChildError> {
        (&mut self.ended).await.map_err(|_closed| ChildError::Lost)
    }
}

/// The exit code by which shells tell `status`: the command's own, or 128 and its signal's number.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(1)
}

/// Starts the command.
///
/// # Errors
/// See [`ChildError`].
pub async fn start(spec: Spec) -> Result<Running, ChildError> {
    let (started_sender, started) = oneshot::channel();
    let (ended_sender, ended) = oneshot::channel();
    let pid = Arc::new(Mutex::new(None));
    let shared = Arc::clone(&pid);
    std::thread::Builder::new()
        .name("weir-command".to_owned())
        .spawn(move || {
            let mut child = match spawn(spec) {
                Ok(child) => child,
                Err(error) => {
                    let _ = started_sender.send(Err(error));
                    return;
                }
            };
            let set = |value| *shared.lock().unwrap_or_else(PoisonError::into_inner) = value;
            let id = Pid::from_raw(child.id().cast_signed());
            set(Some(id));
            let _ = started_sender.send(Ok(()));
            // Not reaped yet: until the pid is taken back, a signal cannot hit another process that got the same.
            while waitid(Id::Pid(id), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(nix::Error::EINTR) {
            }
            set(None);
            if let Ok(status) = child.wait() {
                let _ = ended_sender.send(status);
            }
        })
        .map_err(|source| ChildError::Namespace { action: "start a thread", source })?;
    started.await.map_err(|_closed| ChildError::Lost)??;
    Ok(Running { pid, ended })
}

/// Runs on the command's thread, which is in a mount namespace of its own afterwards.
fn spawn(spec: Spec) -> Result<Child, ChildError> {
    let failed = |action| move |error: nix::Error| ChildError::Namespace { action, source: error.into() };
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("make a mount namespace"))?;
    // What the host mounts later shows up here; what is mounted here stays here.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(failed("part its mounts from the host's"))?;
    if !spec.overlays.is_empty() {
        lay_over(&spec.overlays, &spec.invoker)?;
    }
    let (program, arguments) = match spec.command.split_first() {
        Some(split) => split,
        None => return Err(ChildError::Lost),
    };
    let mut command = Command::new(program);
    command.args(arguments);
    if spec.invoker.under_sudo {
        command.env("HOME", &spec.invoker.home);
        command.env("USER", &spec.invoker.name).env("LOGNAME", &spec.invoker.name);
        SUDO_VARIABLES.iter().for_each(|variable| {
            command.env_remove(variable);
        });
    }
    if let Some(kubeconfig) = &spec.kubeconfig {
        command.env("KUBECONFIG", kubeconfig);
    }
    let (procs, invoker, blocked) = (OwnedFd::from(spec.procs), spec.invoker, spec.blocked);
    // SAFETY: the closure makes system calls only; it neither allocates nor takes a lock, and what it uses was
    // moved into it before the fork.
    unsafe {
        command.pre_exec(move || become_command(&procs, &invoker, &blocked));
    }
    command.spawn().map_err(|source| ChildError::Start { command: program.clone(), source })
}

/// Runs in the child between fork and exec.
fn become_command(procs: &OwnedFd, invoker: &Invoker, blocked: &SigSet) -> io::Result<()> {
    write(procs, b"0")?;
    if !invoker.uid.is_root() {
        setgroups(&invoker.groups)?;
        setresgid(invoker.gid, invoker.gid, invoker.gid)?;
        setresuid(invoker.uid, invoker.uid, invoker.uid)?;
    }
    // After the change of user, which clears it.
    set_pdeathsig(Signal::SIGKILL)?;
    // Last: until here a signal would have ended the child unnoticed.
    blocked.thread_set_mask()?;
    Ok(())
}

/// Makes the copies in a tmpfs that only its bind mounts keep alive, each readable by the invoker alone.
fn lay_over(overlays: &[Overlay], invoker: &Invoker) -> Result<(), ChildError> {
    let failed = |action| move |source: io::Error| ChildError::Namespace { action, source };
    // Opened before the tmpfs hides what lies below it: a kubeconfig may be in /tmp.
    let targets: Vec<fs::File> = overlays
        .iter()
        .map(|overlay| {
            fs::File::options()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
                .open(&overlay.path)
                .map_err(|source| ChildError::Overlay { path: overlay.path.clone(), source })
        })
        .collect::<Result<_, _>>()?;
    let staging = STAGING.iter().map(Path::new).find(|folder| folder.is_dir());
    let staging = staging
        .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
        .map_err(failed("find a folder for a tmpfs"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("weir"), staging, Some("tmpfs"), flags, Some("mode=0700"))
        .map_err(|error| failed("mount a tmpfs")(error.into()))?;
    let mut outcome = Ok(());
    for (index, (overlay, target)) in overlays.iter().zip(&targets).enumerate() {
        outcome = lay_one(&staging.join(index.to_string()), &overlay.content, target, invoker)
            .map_err(|source| ChildError::Overlay { path: overlay.path.clone(), source });
        if outcome.is_err() {
            break;
        }
    }
    umount2(staging, MntFlags::MNT_DETACH).map_err(|error| failed("hide a tmpfs")(error.into()))?;
    outcome
}

fn lay_one(copy: &Path, content: &str, target: &fs::File, invoker: &Invoker) -> io::Result<()> {
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(copy)?;
    file.write_all(content.as_bytes())?;
    fchown(&file, Some(invoker.uid.as_raw()), Some(invoker.gid.as_raw()))?;
    drop(file);
    let target = format!("/proc/self/fd/{}", target.as_raw_fd());
    mount(Some(copy), target.as_str(), None::<&CStr>, MsFlags::MS_BIND, None::<&CStr>)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::cgroup::CommandCgroup;

    fn root_or_skip() -> bool {
        let root = nix::unistd::Uid::effective().is_root();
        assert!(root || std::env::var_os("CI").is_none(), "CI must run this as root");
        if !root {
            eprintln!("skipped: needs root");
        }
        root
    }

    async fn run(script: &str, sudo_uid: Option<&str>, overlays: Vec<Overlay>) -> u8 {
        let cgroup = CommandCgroup::create().expect("cgroup");
        let invoker = Invoker::find(|name| match name {
            "SUDO_UID" => sudo_uid.map(str::to_owned),
            _ => None,
        })
        .expect("invoker");
        let command = ["/bin/sh", "-c", script].map(OsString::from).to_vec();
        let procs = cgroup.open_procs().expect("procs");
        let mut running =
            start(Spec { command, procs, invoker, blocked: SigSet::empty(), kubeconfig: None, overlays })
                .await
                .expect("starts");
        let code = exit_code(running.ended().await.expect("ends"));
        cgroup.end().await.expect("cleaned up");
        code
    }

    #[tokio::test]
    async fn the_command_runs_in_its_cgroup_with_the_callers_rights_and_sees_the_copy_alone() {
        if !root_or_skip() {
            return;
        }
        let folder = tempfile::tempdir_in("/tmp").expect("temporary folder");
        let path = folder.path().join("config");
        fs::write(&path, "original").expect("write");
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("mode");
        let overlay = Overlay { path: path.clone(), content: "copy".to_owned() };
        let script = format!(
            "grep -q '^0::.*weir-exec-' /proc/self/cgroup || exit 10; [ \"$(id -u)\" = 65534 ] || exit 11; \
             [ \"$(cat {path})\" = copy ] || exit 12; [ \"$(stat -c %a:%u {path})\" = 600:65534 ] || exit 13; \
             [ -z \"$SUDO_UID\" ] || exit 14; exit 42",
            path = path.display()
        );
        assert_eq!(run(&script, Some("65534"), vec![overlay]).await, 42);
        assert_eq!(fs::read_to_string(&path).expect("still there"), "original");
    }

    #[tokio::test]
    async fn the_command_starts_with_the_signal_mask_of_the_agents_caller() {
        if !root_or_skip() {
            return;
        }
        // Threads inherit the mask, as they do from `Blocked`.
        let blocked: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
        let before = blocked.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK).expect("blocks");
        let code =
            run("[ $(grep SigBlk /proc/self/status | cut -f2) = 0000000000000000 ]", None, vec![]).await;
        before.thread_set_mask().expect("restores");
        assert_eq!(code, 0);
    }

    #[tokio::test]
    async fn what_the_command_leaves_behind_is_ended_with_it() {
        if !root_or_skip() {
            return;
        }
        assert_eq!(
            run("trap '' TERM; (trap '' TERM; exec tail -f /dev/null) & kill -KILL $$", None, vec![]).await,
            137
        );
    }

    #[tokio::test]
    async fn a_command_that_does_not_exist_gives_the_shells_exit_code() {
        if !root_or_skip() {
            return;
        }
        let cgroup = CommandCgroup::create().expect("cgroup");
        for (command, code) in [("/nonexistent/command", 127), ("/etc/passwd", 126)] {
            let spec = Spec {
                command: vec![command.into()],
                procs: cgroup.open_procs().expect("procs"),
                invoker: Invoker::find(|_| None).expect("invoker"),
                blocked: SigSet::empty(),
                kubeconfig: None,
                overlays: vec![],
            };
            assert_eq!(start(spec).await.expect_err("cannot start").exit_code(), code);
        }
        cgroup.end().await.expect("cleaned up");
    }
}
