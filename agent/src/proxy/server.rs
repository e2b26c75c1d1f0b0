//! The client's side of a connection: TLS with the cluster's serving certificate, HTTP/1.1 or HTTP/2 by ALPN.
//!
//! Every connection ends here with a reason: served, or refused and recorded. What a request may do is the
//! pipeline's.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http::HeaderValue;
use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use weir_common::event::{IdentityMethod, UserInfo};

use super::{Accepted, Cluster, Shared, Tracked, pipeline, pool::Private, quota::Place, traced};
use crate::{
    auth::{Origin, Subject},
    traces::{Context, Stage},
    trust::client,
};

/// How long an HTTP/1.1 connection may wait for a request head. It also bounds idle keep-alive, so it is longer
/// than the 90 s after which Go's client closes an idle connection itself: the client must be the first.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);
/// Most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 128 * 1024;
/// Most headers of a request.
const HEADERS_MAX: usize = 100;
/// Receive window of one stream: request bodies are small.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// Receive window of a connection.
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Requests that one HTTP/2 connection may have open at once: watches of one informer-heavy client, with room.
const STREAMS_MAX: u32 = 250;
/// What may wait to be sent on one HTTP/2 stream.
const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// Largest HTTP/2 frame that a client may send.
const FRAME_BYTES_MAX: u32 = 64 * 1024;
/// A fatal TLS alert, `unrecognized_name` (RFC 8446 §6): record type, version, length, level, description.
const ALERT_UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// What the requests of one connection have in common.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    pub(super) cluster_index: usize,
    pub(super) origin: Origin,
    /// Whom the client's certificate names.
    pub(super) certificate: Option<Arc<Subject>>,
    pub(super) original_destination: SocketAddr,
    pub(super) pod_ip: Option<HeaderValue>,
    /// Kept until the connection ends, and by the stream that it is upgraded to until that does.
    pub(super) place: Arc<Place>,
    pub(super) private: Arc<Private>,
    /// The same with the agent's own client certificate.
    pub(super) own_private: Arc<Private>,
    /// The trace of its beginning, if there is one.
    pub(super) traced: Option<Context>,
}

impl Connection {
    /// The cluster that was dialled.
    pub(super) fn cluster(&self) -> &Cluster {
        &self.shared.clusters[self.cluster_index]
    }

    /// Records something that an operator should know of its pod.
    pub(super) fn finding(&self, name: &str, message: &str) {
        if !self.shared.reported.is_new(message, Instant::now()) {
            return;
        }
        self.shared.recorder.finding(Some(self.cluster_index), Some(self.origin.caller()), name, message);
    }
}

/// Why a connection was not served.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("the cluster with index {index} is not configured")]
    UnknownCluster { index: usize },
    #[error("the pod or the agent has too many connections")]
    TooManyConnections,
    #[error("the TLS handshake did not end within {seconds} s")]
    HandshakeTimeout { seconds: u64 },
    #[error("the client asked for {name:?} (SNI), which is not a name of the cluster it dialled")]
    WrongName { name: String },
    #[error("the client does not speak TLS (plain HTTP or something else)")]
    NotTls,
    #[error("the client refused the serving certificate ({alert}); do its pods trust the cluster's CA?")]
    NotTrusted { alert: String },
    #[error("the client's certificate does not name one user in its common name")]
    NamelessCertificate,
    #[error("the TLS handshake failed: {0}")]
    Handshake(io::Error),
    #[error("the client's HTTP is malformed: {0}")]
    Http(String),
}

/// Serves one connection to its end.
pub(super) async fn serve(shared: Arc<Shared>, accepted: Accepted) {
    let caller = Arc::clone(&accepted.caller);
    let cluster = accepted.cluster;
    if let Err(error) = try_serve(&shared, accepted).await {
        let known = (cluster < shared.clusters.len()).then_some(cluster);
        tracing::debug!(%error, cluster, "connection refused");
        shared.recorder.connection_refused(known, Some(&caller), &error.to_string());
    }
}

async fn try_serve(shared: &Arc<Shared>, accepted: Accepted) -> Result<(), ConnectionError> {
    let Accepted { stream, accepted, original_destination, cluster: cluster_index, caller, labels } =
        accepted;
    let cluster =
        shared.clusters.get(cluster_index).ok_or(ConnectionError::UnknownCluster { index: cluster_index })?;
    cluster.measures.connection();
    let place = Arc::new(shared.quotas.place(&caller).ok_or(ConnectionError::TooManyConnections)?);
    // Only slower without it.
    let _ = stream.set_nodelay(true);
    let mut trace = traced::connection(shared, &cluster.name, &caller, accepted);
    trace.enter(Stage::Handshake);
    let timeout = shared.limits.handshake_timeout;
    // What a handshake and its like need is gone when it is over, and a connection keeps no room for it: on the heap.
    let stream = tokio::time::timeout(timeout, Box::pin(handshake(stream, cluster, original_destination)))
        .await
        .map_err(|_| ConnectionError::HandshakeTimeout { seconds: timeout.as_secs() })??;
    let certificate = certificate(&stream)?;
    let pod_ip =
        caller.pod.as_ref().and_then(|pod| pod.ip.as_deref()).and_then(|ip| HeaderValue::from_str(ip).ok());
    let connection = Arc::new(Connection {
        shared: Arc::clone(shared),
        cluster_index,
        origin: Origin::new(&cluster.name, caller, &labels),
        certificate,
        original_destination,
        pod_ip,
        place,
        private: Arc::default(),
        own_private: Arc::default(),
        traced: trace.context(),
    });
    // The requests have traces of their own: a connection may last for days.
    drop(trace);
    let served = if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
        Box::pin(serve_http2(connection, stream)).await
    } else {
        Box::pin(serve_http1(connection, stream)).await
    };
    match served {
        Err(error) if error.is_parse() => Err(ConnectionError::Http(super::upstream::explain(&error))),
        // Anything else is the client's going away, which its requests' records tell.
        _ => Ok(()),
    }
}

async fn handshake(
    stream: TcpStream,
    cluster: &Cluster,
    dialled: SocketAddr,
) -> Result<TlsStream<TcpStream>, ConnectionError> {
    let start =
        LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await.map_err(classify)?;
    let name = start.client_hello().server_name().map(str::to_owned);
    if let Some(name) = name
        && !cluster.names.agrees(&name, dialled)
    {
        let mut stream = start.io;
        let _ = stream.write_all(&ALERT_UNRECOGNIZED_NAME).await;
        let _ = stream.shutdown().await;
        return Err(ConnectionError::WrongName { name });
    }
    start.into_stream(cluster.serving.server_config()).await.map_err(classify)
}

/// Whom the client's certificate names, which the handshake has verified; none if there is none.
fn certificate(stream: &TlsStream<TcpStream>) -> Result<Option<Arc<Subject>>, ConnectionError> {
    let Some(certificate) = stream.get_ref().1.peer_certificates().and_then(<[_]>::first) else {
        return Ok(None);
    };
    let named = client::named(certificate).ok_or(ConnectionError::NamelessCertificate)?;
    let user = UserInfo { username: named.common_name, groups: named.organizations, ..UserInfo::default() };
    let subject = Subject::new(IdentityMethod::ClientCertificate, None, false, user, &serde_json::json!({}));
    subject.map(|subject| Some(Arc::new(subject))).map_err(|_| ConnectionError::NamelessCertificate)
}

/// Says what a failed handshake most likely means.
fn classify(error: io::Error) -> ConnectionError {
    use rustls::{AlertDescription, Error};
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match tls {
        Some(Error::InvalidMessage(_)) => ConnectionError::NotTls,
        Some(Error::AlertReceived(
            alert @ (AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateExpired),
        )) => ConnectionError::NotTrusted { alert: format!("{alert:?}") },
        _ => ConnectionError::Handshake(error),
    }
}

async fn serve_http1(connection: Arc<Connection>, stream: TlsStream<TcpStream>) -> hyper::Result<()> {
    let shared = Arc::clone(&connection.shared);
    // An idle connection keeps no room for a request.
    let service = service_fn(move |request| Box::pin(pipeline::answer(Arc::clone(&connection), request)));
    let mut serving = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .title_case_headers(true)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    tokio::select! {
        served = serving.as_mut() => return served,
        () = shared.draining.cancelled() => serving.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        served = serving => served,
        () = shared.cut.cancelled() => Ok(()),
    }
}

async fn serve_http2(connection: Arc<Connection>, stream: TlsStream<TcpStream>) -> hyper::Result<()> {
    let shared = Arc::clone(&connection.shared);
    let service = service_fn(move |request| Box::pin(pipeline::answer(Arc::clone(&connection), request)));
    let mut serving = std::pin::pin!(
        http2::Builder::new(Tracked(shared.tasks.clone()))
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(STREAMS_MAX)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_send_buf_size(SEND_BUFFER_BYTES)
            .max_header_list_size(HEAD_BYTES_MAX as u32)
            .serve_connection(TokioIo::new(stream), service)
    );
    tokio::select! {
        served = serving.as_mut() => return served,
        () = shared.draining.cancelled() => serving.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        served = serving => served,
        () = shared.cut.cancelled() => Ok(()),
    }
}
