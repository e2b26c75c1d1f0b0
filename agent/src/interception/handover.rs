//! Hot upgrade: a new agent takes the listeners of the one that runs, so that no connection is refused meanwhile.
//!
//! Over a unix socket whose folder only root can enter, to a process that may follow ([`succession`](super::succession)), one
//! message per packet, listening sockets as SCM_RIGHTS:
//!
//! ```text
//! new                      running
//! Hello{version,layout} ─▶           it stops to change maps and pins, and goes on to accept and serve
//!                       ◀─ Welcome{listeners}, then a Listener (with its sockets) each
//! …enrols, serves them…
//! Complete              ─▶           it stops to accept, drains, ends
//!                       ◀─ Goodbye
//! ```
//!
//! `Ping` in the place of `Hello` is answered by `Pong`: that is how `weir-agent status` knows that an agent is alive.
//!
//! Both accept from the same sockets until the new one is complete; should it fail before, the running one goes on as
//! if nothing had been. No key crosses the socket: each process has certificates and a journal epoch of its own.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    listener::{ListenerError, Sockets},
    loader::layout_version,
    namespace::NamespaceId,
    presence::Presence,
    succession::Gate,
};
use nix::{
    cmsg_space,
    sys::{
        socket::{
            AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
            UnixAddr, accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, setsockopt, socket,
            sockopt::{PeerCredentials, ReceiveTimeout, SendTimeout},
        },
        time::{TimeVal, TimeValLike as _},
    },
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;

/// Version of the messages; another one is refused.
const VERSION: u32 = 1;
/// Largest message, bytes. What a message tells fits into it, however its characters are written.
const MESSAGE_BYTES_MAX: usize = 8192;
/// Most characters of a problem of the configuration that a message tells.
const PROBLEM_CHARS_MAX: usize = 700;
/// Most characters of what is said of events that are not published.
const UNPUBLISHED_CHARS_MAX: usize = 250;
/// Most characters of why containers do not wait.
const NO_WAIT_CHARS_MAX: usize = 250;
/// Most listeners that are taken.
const LISTENERS_MAX: usize = 8192;
/// How long one message may take.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long whoever connects may take to its first message: others wait meanwhile.
const HELLO_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an agent may take to say that it is alive.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the new agent may take from its welcome to being complete: it must reach the clusters first.
const COMPLETE_TIMEOUT: Duration = Duration::from_secs(300);

/// Where the running agent listens for its successor.
pub const STANDARD: &str = "/run/weir/handover.sock";

/// Why listeners cannot be taken or given.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The running agent does not hand over.
    #[error("another agent runs on this node and does not hand over: {reason}; stop it first")]
    Refused {
        /// Why.
        reason: String,
    },
    /// The socket or its folder cannot be made.
    #[error("cannot listen on {} for a successor", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The talk with the other agent broke.
    #[error(
        "the handover from the running agent broke off; is it stopped or stuck? end it, then start this one again"
    )]
    Broken(#[from] io::Error),
    /// A socket that was passed is no listener.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// The thread panicked.
    #[error("the handover's thread panicked")]
    Task(#[from] tokio::task::JoinError),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Message {
    Hello {
        version: u32,
        layout: u32,
        pid: u32,
    },
    Refused {
        reason: String,
    },
    Welcome {
        listeners: usize,
    },
    Listener {
        cgroup: u64,
        namespace: NamespaceId,
        /// An agent of an earlier version says nothing of it, and has none of them.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        nested: bool,
    },
    Complete,
    Goodbye,
    Ping,
    Pong {
        pid: u32,
        version: String,
        /// An agent of an earlier version says nothing of it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        configuration_problem: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unpublished: Option<String>,
        /// Whether something keeps it from being ready.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        unready: bool,
        /// Whether containers wait until their pod is enrolled.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        containers_wait: bool,
        /// Why they do not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        no_wait: Option<String>,
    },
}

impl Message {
    /// What an agent says of itself.
    fn pong(gate: &Gate) -> Self {
        let observed = &gate.observed;
        let short = |text: String, chars_max| text.chars().take(chars_max).collect();
        let no_wait = observed.containers_wait().err();
        Self::Pong {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            configuration_problem: observed
                .configuration_problem()
                .map(|text| short(text, PROBLEM_CHARS_MAX)),
            unpublished: observed.unpublished().map(|text| short(text, UNPUBLISHED_CHARS_MAX)),
            unready: !gate.is_ready(),
            containers_wait: no_wait.is_none(),
            no_wait: no_wait.map(|text| short(text, NO_WAIT_CHARS_MAX)),
        }
    }

    /// The same for who asked; none if this says something else.
    fn presence(self) -> Option<Presence> {
        let Self::Pong {
            pid,
            version,
            configuration_problem,
            unpublished,
            unready,
            containers_wait,
            no_wait,
        } = self
        else {
            return None;
        };
        Some(Presence::Running {
            pid,
            version,
            configuration_problem,
            unpublished,
            ready: !unready,
            containers_wait,
            no_wait,
        })
    }
}

/// A listener on its way to another process.
#[derive(Debug)]
pub(super) struct Passed {
    /// The pod's cgroup.
    pub(super) cgroup: u64,
    /// The network namespace it listens in.
    pub(super) namespace: NamespaceId,
    /// Whether that is one inside the pod, not the pod's.
    pub(super) nested: bool,
    /// Its sockets.
    pub(super) sockets: Sockets,
}

/// What a successor asks of enrolment.
#[derive(Debug)]
pub(super) struct Request {
    /// Gets the listeners; from then on nothing is changed in the kernel.
    pub(super) passed: oneshot::Sender<Vec<Passed>>,
    /// Whether the successor is complete; else, or if this is dropped, it failed.
    pub(super) completed: oneshot::Receiver<()>,
}

/// The listeners of the agent that ran before, and the way to tell it that they are served.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) listeners: Vec<Passed>,
    connection: OwnedFd,
}

/// Takes the listeners of the agent that runs; none if none does.
pub(super) async fn take(path: &Path) -> Result<Option<Taken>, HandoverError> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || take_blocking(&path)).await?
}

/// Whether an agent runs that would hand over.
pub fn an_agent_runs(path: &Path) -> bool {
    let Ok(connection) = unix_socket(SockFlag::empty()) else { return false };
    let Ok(address) = UnixAddr::new(path) else { return false };
    connect(connection.as_raw_fd(), &address).is_ok()
}

/// Asks whether an agent is alive; waits two seconds for its answer.
pub fn presence(path: &Path) -> Presence {
    let Ok(connection) = unix_socket(SockFlag::empty()) else { return Presence::Absent };
    let connected = UnixAddr::new(path).and_then(|address| connect(connection.as_raw_fd(), &address));
    if connected.is_err() {
        return Presence::Absent;
    }
    let asked = set_timeout(&connection, PING_TIMEOUT).and_then(|()| send(&connection, &Message::Ping, &[]));
    match asked.and_then(|()| receive(&connection)) {
        Ok((pong, _)) => pong.presence().unwrap_or(Presence::Silent),
        Err(_) => Presence::Silent,
    }
}

fn take_blocking(path: &Path) -> Result<Option<Taken>, HandoverError> {
    let connection = unix_socket(SockFlag::empty())?;
    let address = UnixAddr::new(path).map_err(io::Error::from)?;
    match connect(connection.as_raw_fd(), &address) {
        Ok(()) => {}
        // Nobody, or one that has crashed.
        Err(nix::Error::ENOENT | nix::Error::ECONNREFUSED) => return Ok(None),
        Err(errno) => return Err(io::Error::from(errno).into()),
    }
    set_timeout(&connection, MESSAGE_TIMEOUT)?;
    let hello = Message::Hello { version: VERSION, layout: layout_version(), pid: std::process::id() };
    send(&connection, &hello, &[])?;
    let count = match receive(&connection)? {
        (Message::Welcome { listeners }, _) if listeners <= LISTENERS_MAX => listeners,
        (Message::Refused { reason }, _) => return Err(HandoverError::Refused { reason }),
        (other, _) => return Err(unexpected(&other).into()),
    };
    let mut listeners = Vec::with_capacity(count);
    for _ in 0..count {
        match receive(&connection)? {
            (Message::Listener { cgroup, namespace, nested }, sockets) => {
                let sockets = Sockets::of_descriptors(sockets)?;
                listeners.push(Passed { cgroup, namespace, nested, sockets });
            }
            (other, _) => return Err(unexpected(&other).into()),
        }
    }
    Ok(Some(Taken { listeners, connection }))
}

impl Taken {
    /// Tells the former agent that its listeners are served: it drains and ends.
    pub(super) async fn complete(self) -> Result<(), HandoverError> {
        let connection = self.connection;
        tokio::task::spawn_blocking(move || {
            send(&connection, &Message::Complete, &[])?;
            match receive(&connection)? {
                (Message::Goodbye, _) => Ok(()),
                (other, _) => Err(unexpected(&other).into()),
            }
        })
        .await?
    }
}

/// Where a successor is waited for.
#[derive(Debug)]
pub(super) struct Server {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Server {
    /// Listens; whoever listened there before has ended.
    pub(super) fn bind(path: &Path) -> Result<Self, HandoverError> {
        let failed = |source: io::Error| HandoverError::Listen { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let socket = unix_socket(SockFlag::SOCK_NONBLOCK).map_err(failed)?;
        let address = UnixAddr::new(path).map_err(|errno| failed(errno.into()))?;
        bind(socket.as_raw_fd(), &address).map_err(|errno| failed(errno.into()))?;
        listen(&socket, Backlog::MAXALLOWABLE).map_err(|errno| failed(errno.into()))?;
        // SAFETY: the descriptor is owned by what is registered, and so stays open and the same as long.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(|error| failed(error.into()))?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Serves successors, one after the other, until cancelled or until one has taken over.
    pub(super) async fn serve(
        self,
        requests: mpsc::Sender<Request>,
        gate: Gate,
        cancellation: CancellationToken,
    ) {
        loop {
            let connection = tokio::select! {
                () = cancellation.cancelled() => break,
                connection = self.accept() => connection,
            };
            let result = match connection {
                Ok(connection) => hand_over(connection, &requests, &gate).await,
                Err(error) => Err(error.into()),
            };
            match result {
                // The successor has put its own socket in this place.
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(event = "handover-broke-off", %error, "a handover broke off; this agent goes on")
                }
            }
        }
        let _ = fs::remove_file(&self.path);
    }

    async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let mut ready = self.socket.readable().await?;
            match accept4(self.socket.get_ref().as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
                Ok(descriptor) => return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
                Err(nix::Error::EAGAIN) => ready.clear_ready(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Returns whether the successor has taken over.
async fn hand_over(
    connection: OwnedFd,
    requests: &mpsc::Sender<Request>,
    gate: &Gate,
) -> Result<bool, HandoverError> {
    let peer = getsockopt(&connection, PeerCredentials).map_err(io::Error::from)?;
    if peer.uid() != 0 {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied).into());
    }
    // Before and after its first message: a process that has ended must not be taken for another one with its number.
    let stranger = gate.successors.refusal(u32::try_from(peer.pid()).unwrap_or(0));
    set_timeout(&connection, HELLO_TIMEOUT)?;
    let (connection, hello) = tokio::task::spawn_blocking(move || {
        let hello = receive(&connection);
        (connection, hello)
    })
    .await?;
    set_timeout(&connection, MESSAGE_TIMEOUT)?;
    let (version, layout, pid) = match hello {
        Ok((Message::Hello { version, layout, pid }, _)) => (version, layout, pid),
        Ok((Message::Ping, _)) => {
            send(&connection, &Message::pong(gate), &[])?;
            return Ok(false);
        }
        // Somebody looked whether an agent is here.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        Ok((other, _)) => return Err(unexpected(&other).into()),
        Err(error) => return Err(error.into()),
    };
    // One with a newer layout of the maps knows ours; the other way about nobody does.
    let own = layout_version();
    if version != VERSION || layout < own {
        let reason = format!(
            "it has version {VERSION} of the handover and {own} of the maps, the new one {version} and {layout}"
        );
        send(&connection, &Message::Refused { reason }, &[])?;
        return Ok(false);
    }
    if let Some(reason) = gate.refusal(peer.pid(), stranger) {
        send(&connection, &Message::Refused { reason }, &[])?;
        return Ok(false);
    }
    tracing::info!(event = "handover-begins", pid, "a successor takes over");
    let (passed, listeners) = oneshot::channel();
    let (complete, completed) = oneshot::channel();
    if requests.send(Request { passed, completed }).await.is_err() {
        return Ok(false);
    }
    let Ok(listeners) = listeners.await else { return Ok(false) };
    let connection = tokio::task::spawn_blocking(move || give(connection, &listeners)).await??;
    // Dropped before this if the successor broke off: enrolment goes on.
    let _ = complete.send(());
    // After enrolment knows: from here on the successor is alone.
    send(&connection, &Message::Goodbye, &[])?;
    Ok(true)
}

/// Passes the listeners and waits until they are served.
fn give(connection: OwnedFd, listeners: &[Passed]) -> io::Result<OwnedFd> {
    send(&connection, &Message::Welcome { listeners: listeners.len() }, &[])?;
    for passed in listeners {
        let (cgroup, namespace, nested) = (passed.cgroup, passed.namespace, passed.nested);
        let message = Message::Listener { cgroup, namespace, nested };
        send(&connection, &message, &passed.sockets.descriptors())?;
    }
    set_timeout(&connection, COMPLETE_TIMEOUT)?;
    match receive(&connection)? {
        (Message::Complete, _) => Ok(connection),
        (other, _) => Err(unexpected(&other)),
    }
}

fn unix_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | flags, None)?)
}

fn set_timeout(connection: &OwnedFd, timeout: Duration) -> io::Result<()> {
    let timeout = TimeVal::seconds(i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX));
    setsockopt(connection, ReceiveTimeout, &timeout)?;
    setsockopt(connection, SendTimeout, &timeout)?;
    Ok(())
}

fn send(connection: &OwnedFd, message: &Message, descriptors: &[RawFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &[][..] } else { &rights[..] };
    let parts = [io::IoSlice::new(&bytes)];
    sendmsg::<UnixAddr>(connection.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn receive(connection: &OwnedFd) -> io::Result<(Message, Vec<OwnedFd>)> {
    let mut bytes = [0; MESSAGE_BYTES_MAX];
    let mut space = cmsg_space!([RawFd; 2]);
    let (length, descriptors) = {
        let mut parts = [io::IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<UnixAddr>(connection.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let mut descriptors = Vec::new();
        for control in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(passed) = control {
                // SAFETY: the kernel has just installed these descriptors for us, and nobody else knows them.
                descriptors.extend(passed.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        (received.bytes, descriptors)
    };
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let message = serde_json::from_slice(&bytes[..length])?;
    Ok((message, descriptors))
}

fn unexpected(message: &Message) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the other agent answers {message:?}"))
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd as _, sync::Arc};

    use nix::sys::socket::{Backlog, SockFlag, UnixAddr, bind, listen};
    use tokio::sync::{mpsc, watch};
    use tokio_util::sync::CancellationToken;

    use super::{
        super::{canary::Health, observed::Observed, succession::Successors},
        Gate, Message, Presence, Server, presence, unix_socket,
    };
    use crate::recording::{Recorder, RecorderOptions};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_agent_that_serves_successors_says_that_it_is_alive() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI must run this as root");
            eprintln!("skipped: needs root");
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("handover.sock");
        assert_eq!(presence(&path), Presence::Absent);
        let (requests, mut received) = mpsc::channel(1);
        let cancellation = CancellationToken::new();
        let server = Server::bind(&path).expect("listens");
        let observed = Arc::new(Observed::default());
        let (_pods, pods) = watch::channel(None);
        let options = RecorderOptions::new(folder.path().join("journal"), "node".to_owned(), Vec::new());
        let gate = Gate {
            successors: Successors::new(pods),
            recorder: Recorder::start(options).expect("a recorder"),
            observed: observed.clone(),
        };
        let serving = tokio::spawn(server.serve(requests, gate, cancellation.clone()));
        let ask = || {
            let path = path.clone();
            async move { tokio::task::spawn_blocking(move || presence(&path)).await.expect("ends") }
        };
        let running = |configuration_problem| Presence::Running {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            configuration_problem,
            unpublished: None,
            ready: observed.canary() == Health::Passed,
            containers_wait: observed.containers_wait().is_ok(),
            no_wait: observed.containers_wait().err(),
        };
        assert_eq!(ask().await, running(None));
        observed.checked(Health::Passed);
        assert_eq!(ask().await, running(None));
        observed.configured(Some("clusters[0].roles: say one".to_owned()));
        assert_eq!(ask().await, running(Some("clusters[0].roles: say one".to_owned())));
        observed.waits.asks(Err("é\n".repeat(500)));
        assert!(
            matches!(ask().await, Presence::Running { no_wait: Some(said), .. } if said.chars().count() == 250)
        );
        observed.waits.asks(Ok(()));
        assert!(matches!(ask().await, Presence::Running { containers_wait: true, no_wait: None, .. }));
        assert!(received.try_recv().is_err(), "no handover has begun");
        cancellation.cancel();
        serving.await.expect("ends");
        assert_eq!(ask().await, Presence::Absent);
    }

    #[test]
    fn an_agent_of_an_earlier_version_is_understood() {
        let message: Message =
            serde_json::from_str(r#"{"pong": {"pid": 7, "version": "0.0.1"}}"#).expect("is one");
        let said = message.presence().expect("says who it is").to_string();
        assert!(
            said.starts_with("running, pid 7, version 0.0.1\n") && said.contains("does not say"),
            "{said}"
        );
    }

    #[test]
    fn an_agent_that_does_not_answer_is_told_from_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("handover.sock");
        let socket = unix_socket(SockFlag::empty()).expect("a socket");
        bind(socket.as_raw_fd(), &UnixAddr::new(&path).expect("an address")).expect("binds");
        listen(&socket, Backlog::MAXALLOWABLE).expect("listens");
        let asking = std::thread::spawn(move || presence(&path));
        let accepted = nix::sys::socket::accept(socket.as_raw_fd()).expect("is asked");
        nix::unistd::close(accepted).expect("closes");
        assert_eq!(asking.join().expect("ends"), Presence::Silent);
    }
}
