//! Upgraded connections (exec, attach, port-forward): bytes pass unchanged both ways, each half closed by itself.
//!
//! Client to server, a piece is durable before it is forwarded; server to client, it is queued for recording, and
//! durable before the end is forwarded (`strict`: before itself is). No
//! idle limit here: a port-forward may be silent for hours.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::{BufMut as _, BytesMut};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;
use weir_common::event::{CONTENT_BYTES_MAX, Outcome};

use crate::recording::{RecordingError, RequestRecord};

/// Most bytes that are read, recorded and forwarded at once, in each direction.
const PIECE_BYTES_MAX: usize = 32 * 1024;
const _: () = assert!(PIECE_BYTES_MAX <= CONTENT_BYTES_MAX);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    ClientToServer,
    ServerToClient,
}

impl Direction {
    fn read_error(self, error: io::Error) -> StreamError {
        match self {
            Self::ClientToServer => StreamError::Client(error),
            Self::ServerToClient => StreamError::Server(error),
        }
    }

    fn write_error(self, error: io::Error) -> StreamError {
        match self {
            Self::ClientToServer => StreamError::Server(error),
            Self::ServerToClient => StreamError::Client(error),
        }
    }
}

/// Why a stream ended early.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("the client's side failed: {0}")]
    Client(io::Error),
    #[error("the client went away before the stream ended")]
    ClientGone,
    #[error("the API server's side failed: {0}")]
    Server(io::Error),
    #[error("the stream cannot be recorded, so it is cut: {}", .0.for_client())]
    Recording(RecordingError),
}

impl StreamError {
    fn outcome(&self) -> Outcome {
        match self {
            Self::Client(_) | Self::ClientGone => Outcome::ClientAborted,
            Self::Server(_) => Outcome::UpstreamFailed,
            Self::Recording(_) => Outcome::Refused,
        }
    }
}

/// Joins both sides once their `101` has been exchanged; returns when both halves are closed.
pub(super) async fn run(
    client: OnUpgrade,
    server: OnUpgrade,
    record: Arc<RequestRecord>,
    cut: CancellationToken,
) {
    let joined = async {
        let server = server.await.map_err(|error| StreamError::Server(io::Error::other(error)))?;
        let client = client.await.map_err(|error| StreamError::Client(io::Error::other(error)))?;
        join(client, server, &record).await
    };
    let ended = tokio::select! {
        ended = joined => ended,
        () = cut.cancelled() => {
            record.close(Outcome::Drained, Some("the agent reached its drain limit"));
            return;
        }
    };
    match ended {
        Ok(()) => record.close(Outcome::Complete, None),
        Err(error) => record.close(error.outcome(), Some(&error.to_string())),
    }
}

async fn join(client: Upgraded, server: Upgraded, record: &RequestRecord) -> Result<(), StreamError> {
    join_sides(TokioIo::new(client), TokioIo::new(server), record).await
}

async fn join_sides(
    client: impl AsyncRead + AsyncWrite,
    server: impl AsyncRead + AsyncWrite,
    record: &RequestRecord,
) -> Result<(), StreamError> {
    let (client_reader, client_writer) = tokio::io::split(client);
    let (server_reader, server_writer) = tokio::io::split(server);
    let ends = Ends::default();
    tokio::try_join!(
        pump(client_reader, server_writer, Direction::ClientToServer, record, &ends),
        pump(server_reader, client_writer, Direction::ServerToClient, record, &ends),
    )?;
    if ends.client_gone.into_inner() { Err(StreamError::ClientGone) } else { Ok(()) }
}

/// How the two directions have ended so far.
#[derive(Debug, Default)]
struct Ends {
    one_ended: AtomicBool,
    /// The client's end came first, and without TLS's close_notify, as when its process dies.
    client_gone: AtomicBool,
}

/// Passes bytes one way until their end, then closes that half.
async fn pump(
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    direction: Direction,
    record: &RequestRecord,
    ends: &Ends,
) -> Result<(), StreamError> {
    // A side that has sent its end may close altogether: what the other still sends is then lost to nobody.
    let settle =
        |error: StreamError| if ends.one_ended.load(Ordering::Relaxed) { Ok(()) } else { Err(error) };
    let mut buffer = BytesMut::new();
    let mut said_so = true;
    let mut taken = true;
    loop {
        buffer.reserve(PIECE_BYTES_MAX);
        let read = match reader.read_buf(&mut (&mut buffer).limit(PIECE_BYTES_MAX)).await {
            Ok(read) => read,
            // The other half goes on: what is on its way to a peer that shut down like this may still arrive.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                said_so = false;
                0
            }
            Err(error) => return settle(direction.read_error(error)),
        };
        if read == 0 {
            let first = !ends.one_ended.swap(true, Ordering::Relaxed);
            if first && !said_so && direction == Direction::ClientToServer {
                ends.client_gone.store(true, Ordering::Relaxed);
            }
            if direction == Direction::ServerToClient {
                record.server_stream_end().await.map_err(StreamError::Recording)?;
            }
            return match writer.shutdown().await {
                Err(error) if first && taken && error.kind() != io::ErrorKind::NotConnected => {
                    Err(direction.write_error(error))
                }
                _ => Ok(()),
            };
        }
        let piece = buffer.split().freeze();
        match direction {
            Direction::ClientToServer => record.client_stream_data(piece.clone()).await,
            Direction::ServerToClient => record.server_stream_data(piece.clone()).await,
        }
        .map_err(StreamError::Recording)?;
        if !taken {
            continue;
        }
        let written = async {
            writer.write_all(&piece).await?;
            writer.flush().await
        };
        match (written.await, direction) {
            (Ok(()), _) => {}
            // A server that has said all closes, whatever the client still says (a ping). Its last words are on their way to the
            // client, and are lost if the client's side closes with something unread: all is read, to the client's end.
            (Err(_), Direction::ClientToServer) => taken = false,
            (Err(error), Direction::ServerToClient) => return settle(direction.write_error(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::join_sides;
    use crate::recording::{Recorder, RecorderOptions, fixture};

    #[tokio::test]
    async fn what_a_server_said_before_it_closed_arrives_although_the_client_still_speaks() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let options = RecorderOptions::new(folder.path().to_owned(), "node".into(), vec!["test".into()]);
        let recorder = Recorder::start(options).expect("a recorder");
        let attributes = fixture::attributes("create", "pods", "exec");
        let record = fixture::open(&recorder, Method::POST, &attributes, &HeaderMap::new(), None).await;
        let record = record.expect("a record");
        let said: Vec<u8> = (0..2_000_000u32).map(|at| (at % 251) as u8).collect();
        let (mut far_server, server) = tokio::io::duplex(said.len());
        far_server.write_all(&said).await.expect("said");
        drop(far_server);
        // The server's words need many turns to pass, the client's two of their own.
        let (mut far_client, client) = tokio::io::duplex(64);
        let client_speaks = async {
            far_client.write_all(b"ping").await.expect("sent");
            let mut heard = Vec::new();
            far_client.read_to_end(&mut heard).await.expect("read to the end");
            far_client.write_all(b"ping").await.expect("sent");
            drop(far_client);
            heard
        };
        let (joined, heard) = tokio::join!(join_sides(client, server, &record), client_speaks);
        assert!(heard == said, "{} of {} bytes", heard.len(), said.len());
        joined.expect("ended as it should");
    }
}
