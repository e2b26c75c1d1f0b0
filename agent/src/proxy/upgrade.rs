//! Upgraded connections (exec, attach, port-forward): bytes pass unchanged both ways, each half closed by itself.
//!
//! Client to server, a piece is durable before it is forwarded; server to client, it is queued for recording, and
//! durable before the end is forwarded (`strict`: before itself is). No
//! idle limit here: a port-forward may be silent for hours.
//!
//! A client's ping waits while the server's words do, and ten seconds longer: a server that has said all closes at once, and what its kernel
//! has not sent yet is lost when anything comes in from here. That holds for the API server, and for the kubelet behind it, to which it
//! passes the ping. Without a recorder on the way, and on an idle machine, those moments are short. Where the server has not been silent for
//! that long when the ping has waited, Weir answers in its place: this alone is not passed. Only a whole ping between two frames is one: what
//! looks like it within a frame is content, and a client could hide from the record whatever is not passed.

use std::{
    borrow::Cow,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::FutureExt as _;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::Notify,
    task::unconstrained,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use weir_common::event::{CONTENT_BYTES_MAX, Outcome};

use crate::{
    recording::{RecordingError, RequestRecord},
    streams::{FrameEnds, Framing, answers, only_pings},
};

/// Most bytes that are read, recorded and forwarded at once, in each direction.
const PIECE_BYTES_MAX: usize = 32 * 1024;
const _: () = assert!(PIECE_BYTES_MAX <= CONTENT_BYTES_MAX);

/// When a ping that waits is answered in the place of a server that spoke within [`SILENCE`]. Clients want an answer to one of theirs within a
/// minute (client-go), half of one (OkHttp), a quarter (aiohttp with a heartbeat of 30 s), or a few seconds, as they are configured.
const PING_WAIT_MAX: Duration = Duration::from_millis(if cfg!(test) { 400 } else { 4000 });
/// How long a server must have said nothing before a ping goes on: what is on its way from the kubelet comes in gaps, on a busy machine of
/// more than a second.
const SILENCE: Duration = Duration::from_millis(if cfg!(test) { 600 } else { 10_000 });
/// Most bytes of pings that wait, and of answers.
const PINGS_BYTES_MAX: usize = 4096;

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
    framing: Option<Framing>,
    record: Arc<RequestRecord>,
    cut: CancellationToken,
) {
    let joined = async {
        let server = server.await.map_err(|error| StreamError::Server(io::Error::other(error)))?;
        let client = client.await.map_err(|error| StreamError::Client(io::Error::other(error)))?;
        join(client, server, framing, &record).await
    };
    let ended = tokio::select! {
        ended = joined => ended,
        () = cut.cancelled() => {
            record.close(Outcome::Drained, Some("the agent reached its drain limit"));
            return;
        }
    };
    match ended {
        Ok(first) => record.close_stream(first == Direction::ClientToServer),
        Err(error) => record.close(error.outcome(), Some(&error.to_string())),
    }
}

async fn join(
    client: Upgraded,
    server: Upgraded,
    framing: Option<Framing>,
    record: &RequestRecord,
) -> Result<Direction, StreamError> {
    join_sides(TokioIo::new(client), TokioIo::new(server), framing, record).await
}

/// Passes bytes until both sides have ended, and tells whose end came first.
async fn join_sides(
    client: impl AsyncRead + AsyncWrite,
    server: impl AsyncRead + AsyncWrite,
    framing: Option<Framing>,
    record: &RequestRecord,
) -> Result<Direction, StreamError> {
    let (client_reader, client_writer) = tokio::io::split(client);
    let (server_reader, server_writer) = tokio::io::split(server);
    let heartbeat = framing.map(|framing| Mutex::new(Heartbeat::new(framing)));
    let ends = Ends { heartbeat, ..Ends::default() };
    tokio::try_join!(
        pump(client_reader, server_writer, Direction::ClientToServer, record, &ends),
        pump(server_reader, client_writer, Direction::ServerToClient, record, &ends),
    )?;
    let server_ended = ends.server_ended.into_inner();
    match ends.server_lost.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) if !server_ended => Err(StreamError::Server(error)),
        _ if ends.client_gone.into_inner() => Err(StreamError::ClientGone),
        _ if ends.client_first.into_inner() => Ok(Direction::ClientToServer),
        _ => Ok(Direction::ServerToClient),
    }
}

/// How the two directions have ended so far.
#[derive(Debug, Default)]
struct Ends {
    one_ended: AtomicBool,
    /// The client's end came first.
    client_first: AtomicBool,
    /// And without TLS's close_notify, as when its process dies.
    client_gone: AtomicBool,
    /// The server has said its end.
    server_ended: AtomicBool,
    /// Why it said no more, or could not be told the client's end: whether that matters is known when its own has come, as may be at the
    /// same time.
    server_lost: Mutex<Option<io::Error>>,
    /// More of the server's was there when it was last read.
    server_speaks: AtomicBool,
    /// Nothing more is.
    server_is_quiet: Notify,
    /// When it was there last, or it was seen that nothing more is.
    server_spoke: Mutex<Option<Instant>>,
    /// None: where frames begin is not known, so nothing waits.
    heartbeat: Option<Mutex<Heartbeat>>,
    /// A ping begins to wait.
    ping_waits: Notify,
}

impl Ends {
    /// One direction has come to its end, with or without a word; whether it is the first.
    fn ended(&self, direction: Direction, said_so: bool) -> bool {
        let first = !self.one_ended.swap(true, Ordering::Relaxed);
        if first && direction == Direction::ClientToServer {
            self.client_first.store(true, Ordering::Relaxed);
        }
        match direction {
            Direction::ClientToServer if first && !said_so => self.client_gone.store(true, Ordering::Relaxed),
            Direction::ServerToClient if said_so => self.server_ended.store(true, Ordering::Relaxed),
            _ => {}
        }
        first
    }

    /// A side that has sent its end may close altogether: what the other still sends is then lost to nobody.
    fn settle(&self, error: StreamError) -> Result<(), StreamError> {
        if self.one_ended.load(Ordering::Relaxed) { Ok(()) } else { Err(error) }
    }

    /// No more can be read of one direction. None: it has ended without a word, and what was read before is on its way and may still arrive,
    /// if its side ends like at an end.
    fn broke_off(&self, direction: Direction, error: io::Error) -> Option<Result<(), StreamError>> {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return None;
        }
        if direction == Direction::ServerToClient && !self.one_ended.load(Ordering::Relaxed) {
            *locked(&self.server_lost) = Some(error);
            return None;
        }
        Some(self.settle(direction.read_error(error)))
    }

    /// The other side could not be told of that end.
    fn not_told(&self, direction: Direction, error: io::Error) -> Result<(), StreamError> {
        if direction == Direction::ServerToClient {
            return Err(direction.write_error(error));
        }
        *locked(&self.server_lost) = Some(error);
        Ok(())
    }

    /// Its silence begins now: what it said last may have been read long before it could be passed on.
    fn set_quiet(&self) {
        if self.server_speaks.swap(false, Ordering::Relaxed) {
            *locked(&self.server_spoke) = Some(Instant::now());
            self.server_is_quiet.notify_waiters();
        }
    }

    fn set_speaks(&self) {
        *locked(&self.server_spoke) = Some(Instant::now());
        self.server_speaks.store(true, Ordering::Relaxed);
    }

    /// When the server will have been silent for long enough, if it says nothing more; none: it speaks.
    fn silent_at(&self) -> Option<Instant> {
        let spoke = *locked(&self.server_spoke);
        let quiet = !self.server_speaks.load(Ordering::Relaxed);
        quiet.then(|| spoke.map_or_else(Instant::now, |spoke| spoke + SILENCE))
    }

    fn is_silent(&self) -> bool {
        self.silent_at().is_some_and(|at| at <= Instant::now())
    }

    /// Waits until the server has been silent for long enough. Safe to drop.
    async fn silence(&self) {
        while !self.is_silent() {
            let quiet = self.server_is_quiet.notified();
            match self.silent_at() {
                Some(at) => sleep_until(at).await,
                None => quiet.await,
            }
        }
    }

    /// Takes note of what the client says, and keeps it if it is nothing but pings and the server is not silent.
    fn keep(&self, piece: &[u8]) -> bool {
        let kept = self.heartbeat.as_ref().is_some_and(|heartbeat| {
            let is_silent = self.is_silent();
            locked(heartbeat).hear(piece, is_silent)
        });
        if kept {
            self.ping_waits.notify_waiters();
        }
        kept
    }

    /// When time is up for the first ping that waits.
    fn due_at(&self) -> Option<Instant> {
        self.heartbeat.as_ref().and_then(|heartbeat| locked(heartbeat).due)
    }

    /// Waits until the pings that wait go on, for ever if there are none. Safe to drop.
    async fn pings_go_on(&self) {
        match self.due_at() {
            None => std::future::pending().await,
            Some(_) => self.silence().await,
        }
    }

    /// Waits until pings have waited for long enough. Safe to drop.
    async fn pings_are_due(&self) {
        loop {
            let waits = self.ping_waits.notified();
            match self.due_at() {
                None => waits.await,
                Some(due) if due <= Instant::now() => return,
                Some(due) => sleep_until(due).await,
            }
        }
    }

    fn take_pings(&self) -> Bytes {
        self.heartbeat.as_ref().map(|heartbeat| locked(heartbeat).take()).unwrap_or_default()
    }

    /// The server's next piece with what answers pings that have waited for long enough, if a frame ends in it.
    fn with_answers<'a>(&self, piece: &'a [u8]) -> Cow<'a, [u8]> {
        match &self.heartbeat {
            Some(heartbeat) => locked(heartbeat).with_answers(piece),
            None => Cow::Borrowed(piece),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A client's pings that wait until the server is silent, the client says something else (they keep their order), or time is up; then
/// what answers them, on its way into the server's words.
#[derive(Debug)]
struct Heartbeat {
    framing: Framing,
    /// Of the client.
    said: FrameEnds,
    pings: BytesMut,
    /// When time is up for the first of them.
    due: Option<Instant>,
    /// Of the server.
    heard: FrameEnds,
    answers: Vec<u8>,
}

impl Heartbeat {
    fn new(framing: Framing) -> Self {
        let [said, heard] = [FrameEnds::new(framing), FrameEnds::new(framing)];
        Self { framing, said, pings: BytesMut::new(), due: None, heard, answers: Vec::new() }
    }

    /// Passes over what the client says; whether it waits: pings and nothing else, where a frame begins.
    fn hear(&mut self, piece: &[u8], is_silent: bool) -> bool {
        let between = self.said.is_between();
        self.said.pass(piece);
        let has_room = self.pings.len() + piece.len() <= PINGS_BYTES_MAX;
        // Where no answer could fit in, none waits for one.
        let waits =
            between && !self.heard.is_lost() && !is_silent && has_room && only_pings(self.framing, piece);
        if waits {
            self.pings.extend_from_slice(piece);
            self.due.get_or_insert_with(|| Instant::now() + PING_WAIT_MAX);
        }
        waits
    }

    fn take(&mut self) -> Bytes {
        self.due = None;
        self.pings.split().freeze()
    }

    fn with_answers<'a>(&mut self, piece: &'a [u8]) -> Cow<'a, [u8]> {
        if self.due.is_some_and(|due| due <= Instant::now()) {
            let more = answers(self.framing, &self.take());
            // Of a client that does not read, those that are too many are left out.
            if self.answers.len() + more.len() <= PINGS_BYTES_MAX {
                self.answers.extend(more);
            }
        }
        let between = self.heard.is_between().then_some(0);
        let Some(end) = self.heard.pass(piece).or(between).filter(|_| !self.answers.is_empty()) else {
            return Cow::Borrowed(piece);
        };
        let (before, behind) = piece.split_at(end);
        Cow::Owned([before, &std::mem::take(&mut self.answers), behind].concat())
    }
}

/// Passes bytes one way until their end, then closes that half.
async fn pump(
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    direction: Direction,
    record: &RequestRecord,
    ends: &Ends,
) -> Result<(), StreamError> {
    let mut buffer = BytesMut::new();
    let (mut said_so, mut taken) = (true, true);
    let of_client = direction == Direction::ClientToServer;
    loop {
        buffer.reserve(PIECE_BYTES_MAX);
        let read = tokio::select! {
            biased;
            read = read_piece(&mut reader, &mut buffer, direction, ends) => read,
            () = ends.pings_go_on(), if of_client => {
                taken &= write(&mut writer, &ends.take_pings()).await.is_ok();
                continue;
            }
            () = ends.pings_are_due(), if !of_client => {
                if let Err(error) = write(&mut writer, &ends.with_answers(&[])).await {
                    return ends.settle(direction.write_error(error));
                }
                continue;
            }
        };
        let read = match read {
            Ok(read) => read,
            Err(error) => match ends.broke_off(direction, error) {
                Some(ended) => return ended,
                None => {
                    said_so = false;
                    0
                }
            },
        };
        if read == 0 {
            let first = ends.ended(direction, said_so);
            if of_client {
                taken = taken && write(&mut writer, &ends.take_pings()).await.is_ok();
            } else {
                record.server_stream_end().await.map_err(StreamError::Recording)?;
            }
            return match writer.shutdown().await {
                Err(error) if first && taken && error.kind() != io::ErrorKind::NotConnected => {
                    ends.not_told(direction, error)
                }
                _ => Ok(()),
            };
        }
        let piece = buffer.split().freeze();
        match direction {
            Direction::ClientToServer => {
                record.client_stream_data(piece.clone()).await.map_err(StreamError::Recording)?;
                // A server that has said all closes, whatever the client still says (a ping). Its last words are on their way to
                // the client, and are lost if the client's side closes with something unread: all is read, to the client's end.
                if !ends.keep(&piece) && taken {
                    taken = write(&mut writer, &ends.take_pings()).await.is_ok()
                        && write(&mut writer, &piece).await.is_ok();
                }
            }
            Direction::ServerToClient => {
                record.server_stream_data(piece.clone()).await.map_err(StreamError::Recording)?;
                // What answers pings that came meanwhile goes before the next word is waited for.
                let mut next = ends.with_answers(&piece);
                while !next.is_empty() {
                    if let Err(error) = write(&mut writer, &next).await {
                        return ends.settle(direction.write_error(error));
                    }
                    next = ends.with_answers(&[]);
                }
            }
        }
    }
}

/// Reads some bytes, and notes whether the server has more to say than was read. Safe to drop while it waits.
async fn read_piece(
    reader: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
    direction: Direction,
    ends: &Ends,
) -> io::Result<usize> {
    if direction == Direction::ClientToServer {
        return reader.read_buf(&mut buffer.limit(PIECE_BYTES_MAX)).await;
    }
    // Where the scheduler gives others a turn, that says nothing of what is there.
    let at_once = unconstrained(reader.read_buf(&mut (&mut *buffer).limit(PIECE_BYTES_MAX))).now_or_never();
    let read = match at_once {
        Some(read) => read,
        None => {
            ends.set_quiet();
            reader.read_buf(&mut buffer.limit(PIECE_BYTES_MAX)).await
        }
    };
    match read {
        Ok(1..) => ends.set_speaks(),
        _ => ends.set_quiet(),
    }
    read
}

async fn write(writer: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    writer.write_all(bytes).await?;
    writer.flush().await
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        path::Path,
        pin::Pin,
        task::{Context, Poll, ready},
        time::Duration,
    };

    use http::{HeaderMap, Method};
    use tokio::{
        io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
        time::Instant,
    };

    use weir_common::event::Outcome;

    use super::{PING_WAIT_MAX, SILENCE, join_sides};
    use crate::{
        recording::{Recorder, RecorderOptions, RequestRecord, fixture},
        streams::Framing,
    };

    const PING: &[u8] = b"\x89\x80mask";
    const PONG: &[u8] = b"\x8a\0";
    const FRAMING: Option<Framing> = Some(Framing::WebSocket);

    async fn record(folder: &Path) -> (Recorder, RequestRecord) {
        let options = RecorderOptions::new(folder.to_owned(), "node".into(), vec!["test".into()]);
        let recorder = Recorder::start(options).expect("a recorder");
        let attributes = fixture::attributes("create", "pods", "exec");
        let record = fixture::open(&recorder, Method::POST, &attributes, &HeaderMap::new(), None).await;
        (recorder, record.expect("a record"))
    }

    /// A server that is gone when it is told the client's end, having said its own or failing so.
    struct Gone {
        inner: tokio::io::DuplexStream,
        says: Option<io::ErrorKind>,
    }

    impl AsyncRead for Gone {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            to: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let before = to.filled().len();
            ready!(Pin::new(&mut self.inner).poll_read(cx, to))?;
            let is_end = to.filled().len() == before;
            Poll::Ready(self.says.filter(|_| is_end).map_or(Ok(()), |error| Err(error.into())))
        }
    }

    impl AsyncWrite for Gone {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.inner).poll_write(cx, bytes)
        }
        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_flush(cx)
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }
    }

    #[tokio::test]
    async fn both_ends_at_the_same_time_are_no_failure_if_the_server_has_said_its_own() {
        for says in [None, Some(io::ErrorKind::UnexpectedEof), Some(io::ErrorKind::ConnectionReset)] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let (_recorder, record) = record(folder.path()).await;
            let (far_server, inner) = tokio::io::duplex(64);
            let (far_client, client) = tokio::io::duplex(64);
            // The client's end is seen first.
            drop(far_client);
            let ends = async {
                tokio::time::sleep(SILENCE / 4).await;
                drop(far_server);
            };
            let (joined, ()) = tokio::join!(join_sides(client, Gone { inner, says }, FRAMING, &record), ends);
            match joined {
                Ok(_) => assert!(says.is_none(), "it is a failure"),
                Err(error) => {
                    assert!(says.is_some() && error.outcome() == Outcome::UpstreamFailed, "{error}");
                }
            }
        }
    }

    /// The beginning of a frame, in which nothing fits.
    fn words() -> Vec<u8> {
        b"\x82\x7f\0\0\0\0\0\xff\xff\xff"
            .iter()
            .copied()
            .chain((0..2_000_000u32).map(|at| (at % 251) as u8))
            .collect()
    }

    #[tokio::test]
    async fn a_ping_does_not_reach_a_server_whose_words_are_not_read() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (_recorder, record) = record(folder.path()).await;
        let said = [&b"\x82\x7f\0\0\0\0\0\x1e\x84\x80"[..], &[0x89; 2_000_000]].concat();
        let (mut far_server, server) = tokio::io::duplex(said.len());
        far_server.write_all(&said).await.expect("said");
        let (mut far_client, client) = tokio::io::duplex(64);
        let client_speaks = async {
            let mut heard = vec![0; 1000];
            far_client.read_exact(&mut heard).await.expect("heard");
            far_client.write_all(PING).await.expect("sent");
            far_client.write_all(PING).await.expect("sent");
            heard.resize(said.len() + 2 * PONG.len(), 0);
            far_client.read_exact(&mut heard[1000..]).await.expect("heard");
            drop(far_client);
            heard
        };
        let server_listens = async {
            let mut all = Vec::new();
            far_server.read_to_end(&mut all).await.expect("the client's end");
            drop(far_server);
            all
        };
        let (joined, heard, reached) =
            tokio::join!(join_sides(client, server, FRAMING, &record), client_speaks, server_listens);
        assert!(heard == [&said[..], PONG, PONG].concat(), "{:x?}", &heard[said.len()..]);
        assert_eq!(reached, b"", "the pings are answered");
        joined.expect("ended as it should");
    }

    /// Frames of a server's that are longer than what is read at once, and one behind them.
    fn frames(count: usize) -> Vec<u8> {
        let long = [&b"\x82\x7f\0\0\0\0\0\x01\0\0"[..], &[0x89; 65536]].concat();
        [&*long.repeat(count), b"\x82\x03end"].concat()
    }

    #[tokio::test]
    async fn a_ping_is_answered_in_the_place_of_a_server_that_speaks_on_and_does_not_reach_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (_recorder, record) = record(folder.path()).await;
        let said = frames(100);
        let (mut far_server, server) = tokio::io::duplex(said.len());
        far_server.write_all(&said).await.expect("said");
        let (mut far_client, client) = tokio::io::duplex(64);
        let client_speaks = async {
            let mut heard = vec![0; 1000];
            far_client.read_exact(&mut heard).await.expect("heard");
            far_client.write_all(PING).await.expect("sent");
            // It reads on when the ping has waited: until then the server has more to say.
            tokio::time::sleep(PING_WAIT_MAX + PING_WAIT_MAX / 4).await;
            let mut rest = [0; 4096];
            while heard.len() < said.len() + PONG.len() {
                let more = far_client.read(&mut rest).await.expect("heard");
                heard.extend_from_slice(&rest[..more]);
            }
            drop(far_client);
            heard
        };
        let server_listens = async {
            let mut all = Vec::new();
            far_server.read_to_end(&mut all).await.expect("the client's end");
            drop(far_server);
            all
        };
        let (joined, heard, reached) =
            tokio::join!(join_sides(client, server, FRAMING, &record), client_speaks, server_listens);
        assert_eq!(reached, b"", "the ping is answered already");
        joined.expect("ended as it should");
        let frame = 65536 + 10;
        let at = (0..100).map(|number| number * frame).find(|at| heard[*at..].starts_with(PONG));
        let at = at.expect("an answer between two frames");
        assert!(heard[..at] == said[..at] && heard[at + PONG.len()..] == said[at..]);
    }

    #[tokio::test]
    async fn a_ping_that_need_not_wait_longer_waits_until_the_server_has_been_silent_for_a_while() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (_recorder, record) = record(folder.path()).await;
        let (mut far_server, server) = tokio::io::duplex(1000);
        let (mut far_client, client) = tokio::io::duplex(64);
        far_server.write_all(&[&b"\x82\x7e\x03\x20"[..], &[0x89; 800]].concat()).await.expect("said");
        let client_pings = async {
            // It is not silent while its words wait for the client.
            tokio::time::sleep(SILENCE + SILENCE / 2).await;
            let reads = Instant::now();
            far_client.read_exact(&mut [0; 804]).await.expect("heard");
            tokio::time::sleep(SILENCE - PING_WAIT_MAX / 2).await;
            far_client.write_all(PING).await.expect("sent");
            reads
        };
        let ping_arrives = async {
            far_server.read_exact(&mut [0; PING.len()]).await.expect("arrives");
            Instant::now()
        };
        let both = async { tokio::join!(client_pings, ping_arrives) };
        tokio::select! {
            joined = join_sides(client, server, FRAMING, &record) => panic!("{joined:?}"),
            (reads, arrived) = both => assert!(arrived >= reads + SILENCE, "{:?}", arrived - reads),
        }
    }

    /// What reached a server that says so many words, one now and then, and what a client heard that sent a ping after the first.
    async fn pinged(words: usize) -> (Vec<u8>, Vec<u8>) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (_recorder, record) = record(folder.path()).await;
        let (mut far_server, server) = tokio::io::duplex(1000);
        let (mut far_client, client) = tokio::io::duplex(1000);
        let server_speaks = async {
            for _ in 0..words {
                far_server.write_all(b"\x82\x01a").await.expect("said");
                tokio::time::sleep(SILENCE / 4).await;
            }
            // What is due is answered without another word.
            tokio::time::sleep(PING_WAIT_MAX).await;
            far_server.shutdown().await.expect("ended");
            let mut reached = Vec::new();
            far_server.read_to_end(&mut reached).await.expect("the client's end");
            reached
        };
        let client_speaks = async {
            let mut heard = vec![0; 3];
            far_client.read_exact(&mut heard).await.expect("heard");
            far_client.write_all(PING).await.expect("sent");
            far_client.read_to_end(&mut heard).await.expect("heard");
            drop(far_client);
            heard
        };
        let (joined, reached, heard) =
            tokio::join!(join_sides(client, server, FRAMING, &record), server_speaks, client_speaks);
        joined.expect("ended as it should");
        (reached, heard)
    }

    /// A machine that stands still makes a silence of it, in which the ping goes on: then it is tried again.
    #[tokio::test]
    async fn a_ping_is_answered_in_the_place_of_a_server_that_has_spoken_lately_and_does_not_reach_it() {
        for words in [1, 6] {
            let mut tries = 0;
            loop {
                let (reached, heard) = pinged(words).await;
                let answered = heard.windows(PONG.len()).filter(|part| *part == PONG).count();
                assert_eq!(heard.len(), words * 3 + answered * PONG.len(), "{heard:x?}");
                match answered {
                    1 => break assert_eq!(reached, b"", "the ping is answered already"),
                    _ => assert_eq!((answered, &reached[..]), (0, PING)),
                }
                tries += 1;
                assert!(tries < 20, "it always reaches the server");
            }
        }
    }

    #[tokio::test]
    async fn what_looks_like_a_ping_within_a_frame_is_content_and_reaches_the_server_at_once() {
        let spdy_ping = b"\x80\x03\0\x06\0\0\0\x04\0\0\0\x01";
        for (framing, head, ping) in [
            (Framing::WebSocket, &b"\x82\x87kkkkc"[..], PING),
            // Half a head, too.
            (Framing::WebSocket, b"\x82\xfe", PING),
            (Framing::Spdy, b"\0\0\0\x01\0\0\0\x0c", spdy_ping),
            // That of another protocol.
            (Framing::WebSocket, b"\x82\x80kkkk", spdy_ping),
            (Framing::Spdy, b"\0\0\0\x01\0\0\0\0", PING),
        ] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let (_recorder, record) = record(folder.path()).await;
            // A server that speaks on: no ping would reach it.
            let (mut far_server, server) = tokio::io::duplex(10_000_000);
            far_server.write_all(&words()).await.expect("said");
            let (mut far_client, client) = tokio::io::duplex(64);
            let speaks = async {
                let mut reached = vec![0; head.len()];
                far_client.write_all(head).await.expect("sent");
                far_server.read_exact(&mut reached).await.expect("arrives");
                far_client.write_all(ping).await.expect("sent");
                reached.resize(head.len() + ping.len(), 0);
                far_server.read_exact(&mut reached[head.len()..]).await.expect("arrives");
                assert_eq!(reached, [head, ping].concat(), "{framing:?}");
            };
            tokio::select! {
                joined = join_sides(client, server, Some(framing), &record) => panic!("{joined:?}"),
                () = speaks => {}
                () = tokio::time::sleep(Duration::from_secs(60)) => panic!("{framing:?}: it does not arrive"),
            }
        }
    }

    #[tokio::test]
    async fn a_ping_waits_no_longer_than_what_the_client_says_next_and_not_at_all_where_nobody_can_answer_it()
    {
        for (framing, next) in [(FRAMING, &b"\x82\x82maskno"[..]), (None, b"")] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let (_recorder, record) = record(folder.path()).await;
            let (mut far_server, server) = tokio::io::duplex(10_000_000);
            far_server.write_all(&words()).await.expect("said");
            // A client that reads nothing: the server's words wait for ever.
            let (mut far_client, client) = tokio::io::duplex(64);
            let speaks = async {
                far_client.write_all(PING).await.expect("sent");
                far_client.write_all(next).await.expect("sent");
                let mut both = vec![0; PING.len() + next.len()];
                far_server.read_exact(&mut both).await.expect("arrives");
                assert_eq!(both, [PING, next].concat(), "in order");
            };
            tokio::select! {
                joined = join_sides(client, server, framing, &record) => panic!("{joined:?}"),
                () = speaks => {}
                () = tokio::time::sleep(Duration::from_secs(60)) => panic!("{framing:?}: it does not arrive"),
            }
        }
    }

    /// The server's connection breaks when it has said all. Only a real socket loses what its kernel has not sent yet.
    #[tokio::test]
    async fn what_a_server_said_before_its_connection_broke_arrives_although_the_client_still_speaks() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (_recorder, record) = record(folder.path()).await;
        let said = words();
        let (mut far_server, inner) = tokio::io::duplex(said.len());
        far_server.write_all(&said).await.expect("said");
        drop(far_server);
        let server = Gone { inner, says: Some(io::ErrorKind::ConnectionReset) };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("its address");
        let (far_client, accepted) = tokio::join!(tokio::net::TcpStream::connect(address), listener.accept());
        let (mut far_client, (client, _)) = (far_client.expect("connected"), accepted.expect("accepted"));
        let client_speaks = async {
            let mut heard = vec![0; 1000];
            far_client.read_exact(&mut heard).await.expect("heard");
            // Meanwhile all that the kernels have room for is written to it, and the server's connection breaks.
            tokio::time::sleep(SILENCE / 2).await;
            far_client.write_all(PING).await.expect("sent");
            tokio::time::sleep(SILENCE / 2).await;
            far_client.read_to_end(&mut heard).await.expect("read to the end");
            drop(far_client);
            heard
        };
        let (joined, heard) = tokio::join!(join_sides(client, server, FRAMING, &record), client_speaks);
        assert!(heard == said, "{} of {} bytes", heard.len(), said.len());
        assert_eq!(joined.expect_err("it broke").outcome(), Outcome::UpstreamFailed);
    }

    #[tokio::test]
    async fn what_a_server_said_before_it_closed_arrives_although_the_client_still_speaks() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (_recorder, record) = record(folder.path()).await;
        let said = words();
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
        let (joined, heard) = tokio::join!(join_sides(client, server, FRAMING, &record), client_speaks);
        assert!(heard == said, "{} of {} bytes", heard.len(), said.len());
        joined.expect("ended as it should");
    }
}
