//! Hot upgrade: a new agent takes the listeners of the one that runs, so that no connection is refused meanwhile.
//!
//! Over a unix socket whose folder only root can enter, one message per packet, listening sockets as SCM_RIGHTS:
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
use weir_common::kernel::LAYOUT_VERSION;

use super::{
    listener::{ListenerError, Sockets},
    namespace::NamespaceId,
};

/// Version of the messages; another one is refused.
const VERSION: u32 = 1;
/// Largest message, bytes.
const MESSAGE_BYTES_MAX: usize = 4096;
/// Most listeners that are taken.
const LISTENERS_MAX: usize = 8192;
/// How long one message may take.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
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
    Hello { version: u32, layout: u32, pid: u32 },
    Refused { reason: String },
    Welcome { listeners: usize },
    Listener { cgroup: u64, namespace: NamespaceId },
    Complete,
    Goodbye,
}

/// A listener on its way to another process.
#[derive(Debug)]
pub(super) struct Passed {
    /// The pod's cgroup.
    pub(super) cgroup: u64,
    /// The network namespace it listens in.
    pub(super) namespace: NamespaceId,
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
    let hello = Message::Hello { version: VERSION, layout: LAYOUT_VERSION, pid: std::process::id() };
    send(&connection, &hello, &[])?;
    let count = match receive(&connection)? {
        (Message::Welcome { listeners }, _) if listeners <= LISTENERS_MAX => listeners,
        (Message::Refused { reason }, _) => return Err(HandoverError::Refused { reason }),
        (other, _) => return Err(unexpected(&other).into()),
    };
    let mut listeners = Vec::with_capacity(count);
    for _ in 0..count {
        match receive(&connection)? {
            (Message::Listener { cgroup, namespace }, sockets) => {
                let sockets = Sockets::of_descriptors(sockets)?;
                listeners.push(Passed { cgroup, namespace, sockets });
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
    pub(super) async fn serve(self, requests: mpsc::Sender<Request>, cancellation: CancellationToken) {
        loop {
            let connection = tokio::select! {
                () = cancellation.cancelled() => break,
                connection = self.accept() => connection,
            };
            let result = match connection {
                Ok(connection) => hand_over(connection, &requests).await,
                Err(error) => Err(error.into()),
            };
            match result {
                // The successor has put its own socket in this place.
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "a handover broke off; this agent goes on"),
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
async fn hand_over(connection: OwnedFd, requests: &mpsc::Sender<Request>) -> Result<bool, HandoverError> {
    let peer = getsockopt(&connection, PeerCredentials).map_err(io::Error::from)?;
    if peer.uid() != 0 {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied).into());
    }
    set_timeout(&connection, MESSAGE_TIMEOUT)?;
    let (connection, hello) = tokio::task::spawn_blocking(move || {
        let hello = receive(&connection);
        (connection, hello)
    })
    .await?;
    if matches!(&hello, Err(error) if error.kind() == io::ErrorKind::UnexpectedEof) {
        // Somebody only looks whether an agent runs.
        return Ok(false);
    }
    let Message::Hello { version, layout, pid } = hello?.0 else {
        return Err(io::Error::from(io::ErrorKind::InvalidData).into());
    };
    if (version, layout) != (VERSION, LAYOUT_VERSION) {
        let reason = format!(
            "it has version {VERSION} of the handover and {LAYOUT_VERSION} of the maps, the new one {version} and {layout}"
        );
        send(&connection, &Message::Refused { reason }, &[])?;
        return Ok(false);
    }
    tracing::info!(pid, "a successor takes over");
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
        let message = Message::Listener { cgroup: passed.cgroup, namespace: passed.namespace };
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
