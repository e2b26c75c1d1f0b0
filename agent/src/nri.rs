//! What a container runtime asks before it starts a pod's container.
//!
//! By NRI (github.com/containerd/nri), which containerd 2 offers unless it is told not to: the agent connects to the runtime's
//! socket, registers as a plug-in, and is called. Here is the connection; [`wire`] and `messages` say what its bytes mean,
//! `patience` how long an answer may take. What becomes of a pod is for who implements [`Asked`]. No answer is an error, so none
//! keeps a container from starting.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

pub(crate) use self::messages::Sandbox;
use self::{
    messages::{Call, MessageError},
    patience::Patience,
    wire::{Decoder, Kind, Service, WireError},
};

pub(crate) mod messages;
mod patience;
pub mod wire;

/// Where containerd and CRI-O listen for plug-ins.
pub const STANDARD_SOCKET: &str = "/var/run/nri/nri.sock";

/// Pause before the next attempt to connect, and the longest, as attempts fail.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Bytes that are read at a time.
const READ_MAX: usize = 64 * 1024;
/// Most calls that are not answered yet; beyond it one is answered at once. containerd makes one at a time.
const CALLS_MAX: usize = 64;

/// Who is asked.
pub(crate) trait Asked {
    /// A runtime asks from now on, or does not, for this reason.
    fn asks(&self, asks: Result<(), String>);

    /// A pod's sandbox runs, and no container of it yet.
    fn sandbox_runs(&self, sandbox: &Sandbox);

    /// A container of the pod is about to start. What is given is waited for, and should not take longer than `until`.
    fn container_starts(
        &self,
        sandbox: &Sandbox,
        until: Instant,
    ) -> Option<impl Future<Output = ()> + Send + use<'_, Self>>;
}

/// Why the connection to the runtime ended.
#[derive(Debug, thiserror::Error)]
enum NriError {
    #[error("the runtime closed the connection")]
    Closed,
    #[error(transparent)]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// Answers the runtime at `socket`, which need not be there, until cancelled; connects again, less and less often, when it is
/// restarted.
pub(crate) async fn follow(socket: PathBuf, asked: impl Asked, part: CancellationToken) {
    let following = async {
        let (mut pause, mut said_absent) = (RETRY, false);
        asked.asks(Err(format!("{} has not answered yet", socket.display())));
        loop {
            let mut connection =
                Connection { asked: &asked, patience: Patience::default(), registered: false };
            let reason = match connection.serve(&socket).await {
                Ok(()) => NriError::Closed,
                Err(error) => error,
            };
            asked.asks(Err(format!("{}: {reason}; `weir-agent doctor` has the mend", socket.display())));
            if connection.registered {
                (pause, said_absent) = (RETRY, false);
                tracing::warn!(event = "nri-lost", %reason, "the container runtime does not ask any more; containers start without waiting");
            } else if !said_absent {
                said_absent = true;
                tracing::info!(
                    event = "nri-absent",
                    socket = %socket.display(), %reason,
                    "the container runtime offers no NRI; containers start without waiting, and are denied until they are enrolled"
                );
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    };
    tokio::select! {
        () = part.cancelled() => {}
        () = following => {}
    }
    asked.asks(Err("the agent ends".to_owned()));
}

/// One connection.
struct Connection<'a, A> {
    asked: &'a A,
    patience: Patience,
    /// Whether the runtime asks.
    registered: bool,
}

impl<'a, A: Asked> Connection<'a, A> {
    /// Serves it to its end.
    async fn serve(&mut self, socket: &Path) -> Result<(), NriError> {
        let mut runtime = UnixStream::connect(socket).await?;
        runtime.write_all(&messages::register()?).await?;
        let mut decoder = Decoder::default();
        let mut waiting = FuturesUnordered::new();
        let mut buffer = vec![0; READ_MAX];
        loop {
            let length = tokio::select! {
                Some(answer) = waiting.next() => {
                    let answer: Result<Vec<u8>, WireError> = answer;
                    runtime.write_all(&answer?).await?;
                    continue;
                }
                length = runtime.read(&mut buffer) => length?,
            };
            if length == 0 {
                return Ok(());
            }
            for message in decoder.push(&buffer[..length])? {
                match (message.service, message.kind) {
                    (Service::Runtime, Kind::Response) => messages::registered(&message.data)?,
                    (Service::Plugin, Kind::Request) => {
                        let call = messages::call(&message.data).unwrap_or_else(|error| {
                            tracing::warn!(event = "nri-call-unreadable", %error, "a call of the container runtime cannot be read; it is answered all the same");
                            Call::Other
                        });
                        let answer = messages::answer(message.stream, &call);
                        match self.take(call).filter(|_| waiting.len() < CALLS_MAX) {
                            Some(wait) => waiting.push(async move {
                                wait.await;
                                answer
                            }),
                            None => runtime.write_all(&answer?).await?,
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Does what a call asks for at once; gives what its answer has to wait for.
    fn take(&mut self, call: Call) -> Option<impl Future<Output = ()> + Send + use<'a, A>> {
        match call {
            Call::Configure(configure) => {
                self.patience = Patience::of_runtime(configure.request_timeout_ms);
                let (runtime, version) = (configure.runtime, configure.version);
                tracing::info!(
                    event = "nri-in-force",
                    runtime,
                    version,
                    "the container runtime asks before it starts a container"
                );
                None
            }
            Call::Synchronize { more: false } => {
                // From the answer on it asks.
                self.registered = true;
                self.asked.asks(Ok(()));
                None
            }
            Call::SandboxRuns(sandbox) => {
                self.patience.begins(&sandbox.uid, Instant::now());
                self.asked.sandbox_runs(&sandbox);
                None
            }
            Call::ContainerStarts(sandbox) => {
                let until = self.patience.until(&sandbox.uid, Instant::now());
                self.asked.container_starts(&sandbox, until)
            }
            Call::Synchronize { more: true } | Call::Other => None,
        }
    }
}
