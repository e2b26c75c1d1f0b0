//! Recording: sessions and invocations, masks, the journal.
//!
//! The proxy opens a [`RequestRecord`] for each request and feeds it; it never sees frames or files.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use weir_common::{
    attributes::Attributes,
    event::{Caller, Outcome},
};

/// A body that no mask has seen. It cannot be serialised, and its `Debug` shows only its length.
pub struct Unmasked(pub Bytes);

/// Where and how to record.
#[derive(Debug, Clone)]
pub struct RecorderOptions {
    /// Folder of the journal; each process epoch makes its own folder in it.
    pub directory: PathBuf,
    /// Most bytes of all segments of this journal; beyond that, recording refuses.
    pub journal_bytes_max: u64,
    /// Name of the node (or host).
    pub node: String,
    /// Tenant for every event.
    pub tenant: Option<String>,
    /// Names of the clusters, by index.
    pub clusters: Vec<String>,
    /// Most bytes of a read's response that are recorded, per request.
    pub response_bytes_max: usize,
    /// A session ends after this time without a request.
    pub session_idle_timeout: std::time::Duration,
    /// Ed25519 key (PKCS#8, PEM) that signs checkpoints; without one each epoch makes its own and publishes only
    /// its public half.
    pub signing_key_file: Option<PathBuf>,
}

/// What went wrong with recording; the proxy answers 503 with it.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// Placeholder until the journal lands.
    #[error("recording is not available")]
    Unavailable,
}

/// Records what one agent process sees. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Recorder {}

/// A request as the proxy knows it when it arrives.
#[derive(Debug)]
pub struct RequestHead<'a> {
    /// HTTP method.
    pub method: &'a http::Method,
    /// Path and query.
    pub uri: &'a http::Uri,
    /// HTTP version.
    pub version: http::Version,
    /// Headers as the client sent them; recording masks credentials.
    pub headers: &'a HeaderMap,
    /// What it means.
    pub attributes: &'a Attributes,
    /// The protocol it asks to upgrade to.
    pub upgrade: Option<&'a str>,
}

/// Whether a record must be on disk before the request goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Mutations and streams: `open` returns after fdatasync.
    BeforeForward,
    /// Reads: `open` returns when the record is queued.
    Behind,
}

#[expect(clippy::unimplemented, reason = "signatures only, until the journal lands")]
impl Recorder {
    /// Opens a new epoch in `options.directory` and starts the writer.
    ///
    /// # Errors
    /// The folder cannot be made, locked or written.
    pub fn start(_options: RecorderOptions) -> Result<Self, RecordingError> {
        unimplemented!()
    }

    /// Records that a request arrived (with its session and invocation, if they are new) and returns its record.
    ///
    /// # Errors
    /// The journal cannot accept: the request must be refused.
    pub async fn open(
        &self,
        _caller: &Arc<Caller>,
        _cluster: usize,
        _head: RequestHead<'_>,
        _body: Option<Unmasked>,
        _durability: Durability,
    ) -> Result<RequestRecord, RecordingError> {
        unimplemented!()
    }

    /// Records a connection that never became a request.
    pub fn connection_refused(&self, _cluster: Option<usize>, _caller: Option<&Arc<Caller>>, _reason: &str) {
        unimplemented!()
    }

    /// Records something an operator should know; `name` is stable, `message` says the mend.
    pub fn finding(
        &self,
        _cluster: Option<usize>,
        _caller: Option<&Arc<Caller>>,
        _name: &str,
        _message: &str,
    ) {
        unimplemented!()
    }

    /// Writes what is queued, a last checkpoint and `AgentStopped`, and waits for the writer.
    ///
    /// # Errors
    /// The last writes failed.
    pub async fn stop(&self, _reason: &str) -> Result<(), RecordingError> {
        unimplemented!()
    }
}

/// The record of one request, from arrival to end. Dropped without [`RequestRecord::close`] it closes itself as
/// `ClientAborted`. Shared by both directions of an upgraded stream through an `Arc`.
#[derive(Debug)]
pub struct RequestRecord {}

#[expect(clippy::unimplemented, reason = "signatures only, until the journal lands")]
impl RequestRecord {
    /// The request's id, sent upstream as `Audit-ID`.
    pub fn id(&self) -> &str {
        unimplemented!()
    }

    /// The answer's head arrived. `streaming` (watch, `logs -f`) records each piece as it comes.
    pub fn response_started(&self, _status: StatusCode, _headers: &HeaderMap, _streaming: bool) {
        unimplemented!()
    }

    /// A piece of the answer's body is being forwarded. Cheap: keeps a reference, never waits, bounded.
    pub fn response_data(&self, _data: &Bytes) {
        unimplemented!()
    }

    /// Bytes of an upgraded connection, client to server: durable when this returns; forward them then.
    ///
    /// # Errors
    /// The journal cannot accept: the stream must be cut.
    pub async fn client_stream_data(&self, _data: Bytes) -> Result<(), RecordingError> {
        unimplemented!()
    }

    /// Bytes of an upgraded connection, server to client: queued (waits only while the queue is full).
    ///
    /// # Errors
    /// The journal cannot accept: the stream must be cut.
    pub async fn server_stream_data(&self, _data: Bytes) -> Result<(), RecordingError> {
        unimplemented!()
    }

    /// Weir itself refused the request (status and reason as the client gets them).
    pub fn refused(&self, _status: StatusCode, _reason: &str) {
        unimplemented!()
    }

    /// The request is over.
    pub fn close(&self, _outcome: Outcome, _reason: Option<&str>) {
        unimplemented!()
    }
}
