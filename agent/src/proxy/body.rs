//! Bodies: requests are held whole within a limit, answers stream through a tap.
//!
//! The tap shows each piece to the record and passes it on at once; nothing here may collect an answer. Only what ends an
//! answer (the last piece where that is known, else the end itself) waits, where the rules want the record of the whole
//! to be durable first.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::request::Parts;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use weir_common::event::Outcome;

use super::{
    pool::Lease,
    quota::{HeldBytes, Quota},
    status::Refusal,
};
use crate::{
    recording::{Committed, RecordingError, RequestRecord},
    traces::Trace,
};

/// How much room a body of unknown length gets before the next piece asks for more.
const HOLD_STEP_BYTES: usize = 64 * 1024;

/// How much of a refused body is read and thrown away before the connection is closed on the client.
const DISCARDED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// What a request that is open takes at least, whatever it is: its record, buffers and task. 24 MiB for a pod are thus some
/// 2,700 open watches.
const REQUEST_BYTES: usize = 8 * 1024;
/// What a header takes beside its name and value (as HTTP/2 counts it, RFC 9113 §6.5.2).
const HEADER_BYTES: usize = 32;

/// Room for a request without its body, kept until the request is over; none if its pod or the agent has no more.
pub(super) fn request_room(quota: &Arc<Quota>, head: &Parts) -> Option<HeldBytes> {
    let headers = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + HEADER_BYTES);
    let uri = head.uri.path_and_query().map_or(0, |path| path.as_str().len());
    quota.hold(REQUEST_BYTES + uri + headers.sum::<usize>())
}

/// A request's body, whole, with the room it takes in the quotas.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// The body; empty if there is none.
    pub(super) bytes: Bytes,
    _room: Option<HeldBytes>,
    /// From [`request_room`].
    pub(super) request_room: Option<HeldBytes>,
}

impl Held {
    /// The body has been forwarded: gives its room back, and returns that of the request.
    pub(super) fn forwarded(self) -> Option<HeldBytes> {
        self.request_room
    }
}

/// Reads a request's body up to `bytes_max` within `timeout`.
pub(super) async fn hold(
    mut body: Incoming,
    quota: &Arc<Quota>,
    bytes_max: usize,
    timeout: Duration,
) -> Result<Held, Refusal> {
    if body.is_end_stream() {
        return Ok(Held::default());
    }
    let announced = body.size_hint().exact();
    let collected = async {
        let collected = if announced.is_some_and(|length| length > bytes_max as u64) {
            Err(Refusal::BodyTooLarge { bytes_max })
        } else {
            collect(&mut body, quota, bytes_max, announced).await
        };
        if collected.is_err() {
            discard(&mut body).await;
        }
        collected
    };
    tokio::time::timeout(timeout, collected)
        .await
        .unwrap_or(Err(Refusal::BodyTimeout { seconds: timeout.as_secs() }))
}

/// Reads on, so that a client that is still sending gets to read its answer instead of a broken connection.
async fn discard(body: &mut Incoming) {
    let mut discarded = 0;
    while discarded < DISCARDED_BYTES_MAX
        && let Some(Ok(frame)) = body.frame().await
    {
        discarded += frame.data_ref().map_or(0, Bytes::len);
    }
}

async fn collect(
    body: &mut Incoming,
    quota: &Arc<Quota>,
    bytes_max: usize,
    announced: Option<u64>,
) -> Result<Held, Refusal> {
    let expected = announced.and_then(|length| usize::try_from(length).ok()).unwrap_or(HOLD_STEP_BYTES);
    let mut room = quota.hold(expected).ok_or(Refusal::TooManyBodies)?;
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Refusal::BodyAborted)?.into_data() else { continue };
        let length = first.len() + whole.len() + data.len();
        if length > bytes_max {
            return Err(Refusal::BodyTooLarge { bytes_max });
        }
        if length > room.bytes() && !room.grow(length.max(HOLD_STEP_BYTES)) {
            return Err(Refusal::TooManyBodies);
        }
        // Most bodies come in one piece, which then needs no copy.
        if first.is_empty() && whole.is_empty() {
            first = data;
            continue;
        }
        if whole.is_empty() {
            whole.reserve(expected.max(length));
            whole.extend_from_slice(&std::mem::take(&mut first));
        }
        whole.extend_from_slice(&data);
    }
    let bytes = if whole.is_empty() { first } else { whole.freeze() };
    Ok(Held { bytes, _room: Some(room), request_room: None })
}

/// Body of what the client gets.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are of the large one, and a box would be an allocation for each answer"
)]
pub(super) enum ResponseBody {
    /// Made by Weir, or empty.
    Whole(Option<Bytes>),
    /// The API server's, passed through.
    Tapped(Tapped),
}

impl ResponseBody {
    /// A body that is there already.
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self::Whole((!bytes.is_empty()).then_some(bytes))
    }
}

/// Why an answer breaks off.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    /// The API server's side.
    #[error(transparent)]
    Upstream(#[from] hyper::Error),
    /// Its record is not durable, so the rest is kept back.
    #[error("the answer cannot be recorded, so it is cut: {}", .0.for_client())]
    Recording(RecordingError),
}

/// The API server's body on its way to the client.
pub(super) struct Tapped {
    inner: Incoming,
    record: Arc<RequestRecord>,
    lease: Option<Lease>,
    cut: CancellationToken,
    closed: bool,
    /// Bytes that are still to come where the length was announced, else more than any: with the last of them the client has everything,
    /// whatever HTTP/2 says of the end only later.
    left: u64,
    held_back: Option<HeldBack>,
    _request_room: Option<HeldBytes>,
    trace: Trace,
}

/// The next piece of a body, or its end.
type Next = Option<Result<Frame<Bytes>, BodyError>>;

/// What goes on when a record is durable: a piece, or the end.
struct HeldBack {
    committed: Committed,
    frame: Option<Frame<Bytes>>,
}

impl std::fmt::Debug for Tapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tapped").field("record", &self.record.id()).finish_non_exhaustive()
    }
}

impl Tapped {
    /// Taps `inner`; `lease` goes back to its pool when the body has ended, `request_room` to the quotas.
    pub(super) fn new(
        inner: Incoming,
        record: Arc<RequestRecord>,
        lease: Lease,
        cut: CancellationToken,
        request_room: Option<HeldBytes>,
    ) -> Self {
        let (lease, closed, held_back) = (Some(lease), false, None);
        let left = inner.size_hint().exact().unwrap_or(u64::MAX);
        Self {
            inner,
            record,
            lease,
            cut,
            closed,
            left,
            held_back,
            _request_room: request_room,
            trace: Trace::default(),
        }
    }

    /// What ends with it.
    pub(super) fn trace(&mut self, trace: Trace) {
        self.trace = trace;
    }

    /// What the head waits for where nothing follows it: nobody would ask for the end of such a body.
    pub(super) fn ends_with_head(&mut self) -> Option<Committed> {
        if self.inner.is_end_stream() { self.finish() } else { None }
    }

    fn close(&mut self, outcome: Outcome, reason: Option<&str>) {
        if !std::mem::replace(&mut self.closed, true) {
            self.record.close(outcome, reason);
        }
    }

    /// Whether the last byte was given.
    fn is_whole(&self) -> bool {
        self.inner.is_end_stream() || self.left == 0
    }

    /// The answer is whole; what ends it goes to the client when what is returned is ready.
    fn finish(&mut self) -> Option<Committed> {
        let first = !std::mem::replace(&mut self.closed, true);
        let committed = if first { self.record.close_durably(Outcome::Complete, None) } else { None };
        if let Some(lease) = self.lease.take() {
            lease.finish();
        }
        committed
    }

    /// The next piece of the API server's body, and what it waits for.
    fn poll_inner(&mut self, context: &mut Context<'_>) -> Poll<(Next, Option<Committed>)> {
        let next = ready!(Pin::new(&mut self.inner).poll_frame(context));
        Poll::Ready(match next {
            Some(Ok(frame)) => {
                let piece = frame.data_ref().and_then(|data| self.record.response_data(data));
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                self.left = self.left.saturating_sub(length);
                let is_last = frame.is_trailers() || self.is_whole();
                let whole = if is_last { self.finish() } else { None };
                (Some(Ok(frame)), whole.or(piece))
            }
            Some(Err(error)) => {
                let reason = super::upstream::explain(&error);
                self.close(Outcome::UpstreamFailed, Some(&reason));
                (Some(Err(error.into())), None)
            }
            None => (None, self.finish()),
        })
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Next> {
        if self.held_back.is_none() {
            let (next, committed) = ready!(self.poll_inner(context));
            let Some(committed) = committed else { return Poll::Ready(next) };
            match next.transpose() {
                Ok(frame) => self.held_back = Some(HeldBack { committed, frame }),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
        let Some(held_back) = &mut self.held_back else { return Poll::Ready(None) };
        let committed = ready!(held_back.committed.as_mut().poll(context));
        let frame = self.held_back.take().and_then(|held_back| held_back.frame);
        Poll::Ready(match committed {
            Ok(()) => frame.map(Ok),
            Err(error) => Some(Err(BodyError::Recording(error))),
        })
    }
}

impl Drop for Tapped {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        // hyper does not ask for the end of a body whose length it knows.
        if self.is_whole() {
            drop(self.finish());
        } else if self.cut.is_cancelled() {
            self.close(Outcome::Drained, Some("the agent reached its drain limit"));
        } else {
            self.close(Outcome::ClientAborted, Some("the client went away before the answer ended"));
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Next> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Tapped(tapped) => tapped.poll_next(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Tapped(tapped) => tapped.held_back.is_none() && tapped.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Tapped(tapped) => tapped.inner.size_hint(),
        }
    }
}
