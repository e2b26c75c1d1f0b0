//! The record of one request, as the proxy feeds it.
//!
//! Everything here runs on the forwarding path: it counts, keeps references and hands on; decoding and masking happen
//! in the workers. The one lock is the request's own.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use http::{
    HeaderMap, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
};
use tokio::sync::oneshot;
use weir_common::event::{Kind, Outcome, RequestClosed, RoleAssumed};

use super::{
    admission::COMMIT_WAIT_MAX,
    committed::{Committed, committed},
    content::{Held, Streamed},
    entry::{self, Entry, Waiter},
    error::RecordingError,
    mask::KeyedDigest,
    opening::ERROR_BYTES_MAX,
    plan::{Commit, Plan, Streams},
    upgraded::{Asked, Decoded, LeavesOut, Upgraded},
    worker::{Closing, Context, PIECE_BYTES},
    writer::Status,
};
use crate::streams::Direction;

/// What a server says on an upgraded connection is marked after so many bytes, and waits while a mark before is not on disk: memory
/// does not depend on how much faster than the disk it speaks.
const AHEAD_BYTES: usize = 1024 * 1024;

/// How far what a server says is ahead of the disk.
#[derive(Debug, Default)]
struct Ahead {
    /// Bytes since the last mark.
    bytes: usize,
    mark: Option<oneshot::Receiver<Result<(), RecordingError>>>,
}

/// How much of a response is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// Length only: discovery, OpenAPI, health.
    Metadata,
    /// The first bytes.
    Bounded(usize),
    /// All of it, as it comes (`logs`).
    Streamed,
}

/// The record of one request, from arrival to end. Dropped without [`RequestRecord::close`] it closes itself as
/// `ClientAborted`. Shared by both directions of an upgraded stream through an `Arc`.
#[derive(Debug)]
pub struct RequestRecord {
    pub(super) context: Arc<Context>,
    status: Arc<Status>,
    plan: Plan,
    opened: Instant,
    level: Level,
    /// Why bodies are left out, if they are.
    left_out: Option<String>,
    watch: bool,
    /// What its upgrade asks for, if it asks for one.
    asked: Asked,
    state: Mutex<State>,
    /// The stream that it was upgraded to.
    upgraded: Mutex<Option<Upgraded>>,
    client_bytes: AtomicU64,
    server_bytes: AtomicU64,
    ahead: Mutex<Ahead>,
}

#[derive(Debug, Default)]
struct State {
    http_status: Option<u16>,
    refused: Option<String>,
    response: Response,
    response_bytes: u64,
    /// Bytes of the response that are kept, and those of the budget that they take.
    kept_bytes: usize,
    held_bytes: usize,
    /// The keyed digest of a response that is cut.
    digest: Option<KeyedDigest>,
    closed: bool,
}

/// What becomes of the response's body.
#[derive(Debug, Default)]
enum Response {
    /// No answer yet, or none that has a body.
    #[default]
    None,
    Held(Held),
    Streamed,
}

impl RequestRecord {
    pub(super) fn new(
        context: Context,
        status: Arc<Status>,
        plan: Plan,
        (level, left_out): (Level, Option<String>),
        watch: bool,
    ) -> Self {
        Self {
            context: Arc::new(context),
            status,
            plan,
            opened: Instant::now(),
            level: if left_out.is_some() { Level::Metadata } else { level },
            left_out,
            watch,
            asked: Asked::default(),
            state: Mutex::default(),
            upgraded: Mutex::default(),
            client_bytes: AtomicU64::new(0),
            server_bytes: AtomicU64::new(0),
            ahead: Mutex::default(),
        }
    }

    /// Remembers what its upgrade asks for.
    pub(super) fn asking(mut self, asked: Asked) -> Self {
        self.asked = asked;
        self
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request never happened: it could not be recorded.
    pub(super) fn disarm(&self) {
        self.lock().closed = true;
    }

    /// The request's id, sent upstream as `Audit-ID`.
    pub fn id(&self) -> &str {
        &self.context.request
    }

    /// The session it belongs to.
    pub fn session(&self) -> &str {
        self.context.session.id()
    }

    /// The request goes on with credentials that its session has not used before.
    pub fn role_assumed(&self, role: RoleAssumed) {
        self.push_small(Kind::RoleAssumed(Box::new(role)));
    }

    /// The answer's head arrived. `streaming` (watch, `logs -f`) records each piece as it comes.
    pub fn response_started(&self, status: StatusCode, headers: &HeaderMap, streaming: bool) {
        let mut state = self.lock();
        state.http_status = Some(status.as_u16());
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (content_type, content_encoding) = (text(CONTENT_TYPE), text(CONTENT_ENCODING));
        state.response = match self.level {
            _ if status == StatusCode::SWITCHING_PROTOCOLS => {
                self.upgraded(headers);
                Response::None
            }
            Level::Metadata if status.is_success() || self.left_out.is_some() => {
                state.digest = self.left_out.as_ref().map(|_| self.context.masker.digest());
                let reason = self.left_out.as_deref().unwrap_or("only metadata is recorded of this request");
                Response::Held(Held { cut: Some((reason.to_owned(), None)), ..Held::default() })
            }
            // An error to a watch or log request is a short `Status`, not a stream.
            Level::Streamed | Level::Bounded(_)
                if (streaming || self.level == Level::Streamed) && status.is_success() =>
            {
                self.streamed(content_type, content_encoding.as_deref());
                Response::Streamed
            }
            level => Response::Held(Held {
                content_type,
                content_encoding,
                names_text: self.context.names_text,
                bytes_max: match level {
                    Level::Bounded(bytes_max) => bytes_max,
                    Level::Metadata | Level::Streamed => ERROR_BYTES_MAX,
                },
                ..Held::default()
            }),
        };
        drop(state);
        let headers = self.context.masker.headers(headers);
        self.push_small(Kind::ResponseStarted { status: status.as_u16(), headers });
    }

    fn streamed(&self, content_type: Option<String>, content_encoding: Option<&str>) {
        let Context { masker, sensitivity, .. } = &*self.context;
        self.stream(Streamed::new(masker, *sensitivity, content_type, content_encoding, self.watch));
    }

    fn stream(&self, streamed: Streamed) {
        *self.context.streamed.lock().unwrap_or_else(PoisonError::into_inner) = Some(streamed);
    }

    /// How the stream is read that the head of the response has agreed to.
    fn reads(&self, headers: &HeaderMap) -> Upgraded {
        let leaves_out =
            LeavesOut { payload: self.plan.streams == Streams::Metadata, body: self.left_out.is_some() };
        let Context { sensitivity, masker, request, .. } = &*self.context;
        Upgraded::new(&self.asked, headers, (*sensitivity, masker), leaves_out, request.clone())
    }

    fn upgraded(&self, headers: &HeaderMap) {
        let upgraded = self.reads(headers);
        if upgraded.has_body() && self.left_out.is_none() {
            match self.watch {
                true => self.stream(Streamed::in_messages(&self.context.masker, self.context.sensitivity)),
                false => self.streamed(None, None),
            }
        }
        *self.upgraded.lock().unwrap_or_else(PoisonError::into_inner) = Some(upgraded);
    }

    /// A piece of the answer's body is being forwarded. Cheap: keeps a reference, never waits, bounded. With `strict` a
    /// piece of a stream is forwarded only when what is returned is ready.
    pub fn response_data(&self, data: &Bytes) -> Option<Committed> {
        if data.is_empty() {
            return None;
        }
        let workers = &self.context.workers;
        let mut state = self.lock();
        let state = &mut *state;
        state.response_bytes += data.len() as u64;
        match &mut state.response {
            Response::None => {}
            Response::Streamed => return self.streamed_data(data),
            Response::Held(held) if held.cut.is_some() => {
                if let Some(digest) = &mut state.digest {
                    digest.update(data);
                }
            }
            Response::Held(held) => {
                let room = held.bytes_max - state.kept_bytes;
                let kept = data.len().min(room);
                let affordable = workers.hold(&self.context.share, kept + PIECE_BYTES);
                if affordable {
                    state.kept_bytes += kept;
                    state.held_bytes += kept + PIECE_BYTES;
                    held.chunks.push(data.slice(..kept));
                }
                if !affordable || kept < data.len() {
                    held.cut = Some((
                        if affordable {
                            format!("longer than the {} bytes that are recorded", held.bytes_max)
                        } else {
                            "too many responses were being recorded at the same time".to_owned()
                        },
                        None,
                    ));
                    // From here on the whole is only digested.
                    let mut digest = self.context.masker.digest();
                    held.chunks.iter().for_each(|chunk| digest.update(chunk));
                    digest.update(if affordable { &data[kept..] } else { data });
                    state.digest = Some(digest);
                }
            }
        }
        None
    }

    fn streamed_data(&self, data: &Bytes) -> Option<Committed> {
        let workers = &self.context.workers;
        let waits = self.plan.commit == Commit::Strict && !self.context.emergency.is_on();
        let (waiter, committed) = waits.then(committed).unzip();
        if let Err(waiter) = workers.piece(&self.context, data, waiter) {
            // Whoever waits is told that it is not recorded.
            drop(waiter);
            workers.lost(&self.context, data.len() as u64);
        }
        committed
    }

    /// Bytes of an upgraded connection, client to server: what they mean is durable when this returns; forward them
    /// then. What is not recorded yet is the beginning of something (a frame's head, a control frame) that no server can
    /// act on before the rest has come, which waits in its turn.
    ///
    /// # Errors
    /// The journal cannot accept, or what is said cannot be followed and masked: the stream must be cut.
    pub async fn client_stream_data(&self, data: Bytes) -> Result<(), RecordingError> {
        self.pace().await;
        self.client_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        let (Decoded { kinds, is_unreadable, .. }, _) = self.decoded(Direction::ClientToServer, &data);
        if self.context.emergency.is_on() {
            return self.append(self.context.entries(kinds), false).await;
        }
        let entries = self.context.whole_entries(kinds)?;
        let recorded = if entries.is_empty() { Ok(()) } else { self.append_first(entries).await };
        if is_unreadable { recorded.and(Err(RecordingError::Unreadable)) } else { recorded }
    }

    /// Bytes of an upgraded connection, server to client: queued (waits only while the queue is full, or much of this stream is ahead of
    /// the disk); with `strict` durable.
    ///
    /// # Errors
    /// The journal cannot accept: the stream must be cut.
    pub async fn server_stream_data(&self, data: Bytes) -> Result<(), RecordingError> {
        self.pace().await;
        self.server_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        let (Decoded { kinds, .. }, body) = self.decoded(Direction::ServerToClient, &data);
        for committed in body {
            committed.await?;
        }
        let strict = self.plan.commit == Commit::Strict && !self.context.emergency.is_on();
        let entries = if strict { self.context.whole_entries(kinds)? } else { self.context.entries(kinds) };
        if entries.is_empty() {
            return Ok(());
        }
        self.append(entries, strict).await?;
        self.wait_for_disk(data.len()).await
    }

    /// Waits while too much of the stream is not on disk. Whether it could be written is not asked here.
    async fn wait_for_disk(&self, bytes: usize) -> Result<(), RecordingError> {
        let (waiter, before) = {
            let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            ahead.bytes += bytes;
            if ahead.bytes < AHEAD_BYTES || self.context.emergency.is_on() {
                return Ok(());
            }
            ahead.bytes = 0;
            let (waiter, written) = oneshot::channel();
            (waiter, ahead.mark.replace(written))
        };
        let context = &self.context;
        let written = async {
            let mark = context.append(Vec::new()).told_to(Some(waiter));
            context.queue.push(mark).await?;
            if let Some(before) = before {
                // What failed is told to whoever comes next.
                let _ = before.await;
            }
            Ok(())
        };
        tokio::time::timeout(COMMIT_WAIT_MAX, written).await.unwrap_or(Err(RecordingError::TooSlow))
    }

    /// The server has sent its last byte: when this returns, all of them are durable, where the rules want that.
    ///
    /// # Errors
    /// The journal cannot accept.
    pub async fn server_stream_end(&self) -> Result<(), RecordingError> {
        if let Some(upgraded) = self.upgraded.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            upgraded.server_ends();
        }
        self.append(Vec::new(), self.plan.is_durable()).await
    }

    /// Waits until the pod owes nothing: a stream is slowed down, not cut.
    async fn pace(&self) {
        let owes = self.context.share.owes(Instant::now());
        if !owes.is_zero() && !self.context.emergency.is_on() {
            tokio::time::sleep(owes.min(COMMIT_WAIT_MAX)).await;
        }
    }

    /// Queues what must be recorded before something goes on, and waits until it is durable where the rules want that; and where its
    /// key, which may be refused, is not on disk yet: once a session.
    pub(super) async fn append_first(&self, entries: Vec<Entry>) -> Result<(), RecordingError> {
        let waits = self.plan.is_durable() || entry::await_key(&entries);
        self.append(entries, waits).await
    }

    /// Queues events, and waits until they are durable if that is asked or if the journal is failing.
    pub(super) async fn append(&self, entries: Vec<Entry>, durable: bool) -> Result<(), RecordingError> {
        let context = &self.context;
        if context.emergency.is_on() {
            context.queue.push_or_drop(context.append(entries));
            return Ok(());
        }
        let waits = durable || self.status.is_failing();
        let (waiter, result) = waits.then(oneshot::channel).unzip();
        let append = context.append(entries).told_to(waiter);
        let committed = async {
            context.queue.push(append).await?;
            let Some(result) = result else { return Ok(()) };
            result.await.unwrap_or(Err(RecordingError::Closed))
        };
        tokio::time::timeout(COMMIT_WAIT_MAX, committed).await.unwrap_or(Err(RecordingError::TooSlow))
    }

    /// What a piece of an upgraded connection means; and what to wait for where it is a response body.
    fn decoded(&self, direction: Direction, data: &Bytes) -> (Decoded, Vec<Committed>) {
        let mut decoded = {
            let mut upgraded = self.upgraded.lock().unwrap_or_else(PoisonError::into_inner);
            let nothing_agreed = || self.reads(&HeaderMap::new());
            upgraded.get_or_insert_with(nothing_agreed).feed(direction, data)
        };
        let body = std::mem::take(&mut decoded.body);
        let committed = body.iter().filter_map(|piece| self.streamed_data(piece)).collect();
        (decoded, committed)
    }

    fn push_small(&self, kind: Kind) {
        if let Some(entry) = self.context.entry(kind) {
            self.context.push_small(self.context.append(vec![entry]));
        }
    }

    /// Weir itself refused the request (status and reason as the client gets them).
    pub fn refused(&self, status: StatusCode, reason: &str) {
        {
            let mut state = self.lock();
            state.http_status = Some(status.as_u16());
            state.refused = Some(reason.to_owned());
        }
        self.push_small(Kind::RequestRefused { status: status.as_u16(), reason: reason.to_owned() });
    }

    /// The request is over.
    pub fn close(&self, outcome: Outcome, reason: Option<&str>) {
        self.end(outcome, reason, None);
    }

    /// An upgraded stream is over on both sides, in good order as far as their connections say; `client_first`: the client's was before
    /// the server's.
    pub fn close_stream(&self, client_first: bool) {
        let upgraded = self.upgraded.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = upgraded.as_ref().map(|upgraded| upgraded.ended(client_first));
        drop(upgraded);
        let (outcome, reason) = ended.unwrap_or((Outcome::Complete, None));
        self.close(outcome, reason.as_deref());
    }

    /// The request is over. Where the rules want its record to be durable before the last byte of the answer, that byte
    /// goes when what is returned is ready.
    pub fn close_durably(&self, outcome: Outcome, reason: Option<&str>) -> Option<Committed> {
        let waits = self.plan.is_durable() && !self.context.emergency.is_on();
        let (waiter, committed) = waits.then(committed).unzip();
        self.end(outcome, reason, waiter).then_some(committed).flatten()
    }

    /// Whether this was the end: there is only one.
    fn end(&self, outcome: Outcome, reason: Option<&str>, waiter: Option<Waiter>) -> bool {
        let mut state = self.lock();
        if std::mem::replace(&mut state.closed, true) {
            return false;
        }
        let response_bytes = state.response_bytes + self.server_bytes.load(Ordering::Relaxed);
        let was_streamed = matches!(state.response, Response::Streamed);
        let body = match std::mem::take(&mut state.response) {
            Response::Held(mut held) => {
                held.wire_bytes = response_bytes;
                if let (Some((_, digest)), Some(whole)) = (&mut held.cut, state.digest.take()) {
                    *digest = Some(whole.finish());
                }
                (response_bytes > 0).then_some(held)
            }
            Response::None | Response::Streamed => None,
        };
        let mut upgraded = self.upgraded.lock().unwrap_or_else(PoisonError::into_inner).take();
        let streamed = was_streamed || upgraded.as_ref().is_some_and(Upgraded::has_body);
        let rest = upgraded.as_mut().map(|upgraded| upgraded.finish().kinds).unwrap_or_default();
        let closed = RequestClosed {
            status: state.http_status,
            outcome,
            reason: reason.map(str::to_owned).or_else(|| state.refused.take()),
            response_bytes,
            client_bytes: self.client_bytes.load(Ordering::Relaxed),
            duration_us: u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX),
            exit_code: upgraded.as_ref().and_then(Upgraded::exit_code),
            body: None,
        };
        let held_bytes = std::mem::take(&mut state.held_bytes);
        drop(state);
        let (context, workers) = (&self.context, &self.context.workers);
        let is_small = rest.is_empty() && body.as_ref().is_none_or(Held::is_small);
        if streamed || waiter.is_none() || !is_small {
            workers.close(context, Closing { closed, body, held_bytes, rest, waiter });
            return true;
        }
        // Somebody waits for it, and it is short: no thread need be woken for it.
        let kinds = Closing { closed, body, held_bytes, rest, waiter: None }.reduce(context);
        match context.queue.try_push(context.appendix(kinds, waiter)) {
            Ok(()) => workers.release(&context.share, held_bytes),
            Err(append) => workers.push(context, append, held_bytes),
        }
        true
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let refused = self.lock().refused.is_some();
        self.close(if refused { Outcome::Refused } else { Outcome::ClientAborted }, None);
    }
}
