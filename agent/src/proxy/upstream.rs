//! The way to one cluster's API server: dial its endpoints, verify it, speak HTTP/2 or HTTP/1.1 to it.
//!
//! Which connection a request takes is the pool's business; what may be sent is the pipeline's.

use std::{
    error::Error as _,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Uri, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{ProxyError, Tracked};

/// Most endpoints that one dial tries.
const ENDPOINTS_TRIED_MAX: usize = 8;
/// Streams that Weir puts on one HTTP/2 connection; the API server allows 100.
pub(super) const STREAMS_MAX: usize = 64;
/// Receive window of one stream: what one slow client can make the agent hold.
const STREAM_WINDOW_BYTES: u32 = 512 * 1024;
/// Receive window of a connection: all its streams' windows, so that slow clients cannot stop the others'.
const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
const _: () = assert!(STREAM_WINDOW_BYTES as usize * STREAMS_MAX <= CONNECTION_WINDOW_BYTES as usize);
/// Largest HTTP/2 frame that the API server may send.
const FRAME_BYTES_MAX: u32 = 64 * 1024;
/// What may wait to be sent on one HTTP/2 stream.
const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// Largest head of an answer.
const RESPONSE_HEAD_BYTES_MAX: u32 = 256 * 1024;
/// Pings tell a dead API server from a quiet watch; the values are client-go's.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// The same for HTTP/1.1, where only TCP can ask.
const TCP_KEEPALIVE_IDLE_S: u32 = 30;

/// HTTP/2 to the API server, shared by requests.
pub(super) type Http2 = http2::SendRequest<Full<Bytes>>;
/// HTTP/1.1 to the API server, one request at a time.
pub(super) type Http1 = http1::SendRequest<Full<Bytes>>;

/// Where a cluster's API server is dialled: directly, never at an address that interception would redirect.
#[derive(Clone, Debug)]
pub enum Endpoints {
    /// These addresses, in turn; the list is replaced as endpoints change.
    Listed(Arc<ArcSwap<Vec<SocketAddr>>>),
    /// The address that the client dialled (`weir-agent exec`).
    OriginalDestination,
}

/// Why an API server did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    /// No endpoint is known.
    #[error("no endpoint of it is known")]
    NoEndpoint,
    /// TCP.
    #[error("cannot connect to {endpoint}: {cause}")]
    Dial {
        /// What was dialled.
        endpoint: SocketAddr,
        /// Why not.
        cause: String,
    },
    /// TLS: certificate, name, protocol.
    #[error("TLS with {endpoint} failed: {cause}")]
    Tls {
        /// What was dialled.
        endpoint: SocketAddr,
        /// Why not.
        cause: String,
    },
    /// All connections that the pool may have are full.
    #[error("all connections to it are in use")]
    Exhausted,
    /// What another request, which this one waited for, met when it opened a connection for both.
    #[error("{0}")]
    SameAsBefore(Arc<UpstreamError>),
    /// HTTP.
    #[error("{}", explain(.0))]
    Http(hyper::Error),
}

/// A hyper error with what caused it, as one line.
pub(super) fn explain(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A request on its way up, in a form that both versions of HTTP are made from.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) method: Method,
    pub(super) target: PathAndQuery,
    pub(super) authority: Authority,
    /// Prepared headers, without `Host`.
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Outgoing {
    /// Whether sending it twice is harmless.
    pub(super) fn is_read(&self) -> bool {
        self.method == Method::GET || self.method == Method::HEAD
    }

    fn request(&self, uri: Uri) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = self.headers.clone();
        request
    }

    pub(super) fn for_http1(&self) -> Request<Full<Bytes>> {
        let mut request = self.request(Uri::from(self.target.clone()));
        // A valid authority is a valid header value; without one the server would refuse the request itself.
        if let Ok(host) = HeaderValue::from_str(self.authority.as_str()) {
            request.headers_mut().insert(header::HOST, host);
        }
        request
    }

    pub(super) fn for_http2(&self) -> Request<Full<Bytes>> {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTPS);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(self.target.clone());
        let uri = Uri::from_parts(parts).unwrap_or_else(|_| Uri::from(self.target.clone()));
        self.request(uri)
    }
}

/// A fresh connection, in the version that the API server chose.
pub(super) enum Fresh {
    Http1(Http1),
    Http2(Http2),
}

/// Dials one cluster.
pub(super) struct Dialler {
    endpoints: Endpoints,
    server_name: ServerName<'static>,
    any: TlsConnector,
    http1: TlsConnector,
    timeout: Duration,
    next: AtomicUsize,
    tasks: TaskTracker,
    cut: CancellationToken,
}

impl std::fmt::Debug for Dialler {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Dialler").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl Dialler {
    pub(super) fn new(
        endpoints: Endpoints,
        server_name: ServerName<'static>,
        tls: &rustls::ClientConfig,
        timeout: Duration,
        tasks: TaskTracker,
        cut: CancellationToken,
    ) -> Self {
        let connector = |protocols: &[&[u8]]| {
            let mut config = tls.clone();
            config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            TlsConnector::from(Arc::new(config))
        };
        Self {
            endpoints,
            server_name,
            any: connector(&[b"h2", b"http/1.1"]),
            http1: connector(&[b"http/1.1"]),
            timeout,
            next: AtomicUsize::new(0),
            tasks,
            cut,
        }
    }

    /// A connection for ordinary requests.
    pub(super) async fn dial(&self, original: SocketAddr) -> Result<Fresh, UpstreamError> {
        let stream = self.connect(original, &self.any).await?;
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            Ok(Fresh::Http2(self.start_http2(stream).await?))
        } else {
            Ok(Fresh::Http1(self.start_http1(stream).await?))
        }
    }

    /// A connection for one upgrade: HTTP/1.1 whatever else the API server speaks.
    pub(super) async fn dial_http1(&self, original: SocketAddr) -> Result<Http1, UpstreamError> {
        let stream = self.connect(original, &self.http1).await?;
        self.start_http1(stream).await
    }

    /// Tries the endpoints in turn, each time from the next one on.
    async fn connect(
        &self,
        original: SocketAddr,
        tls: &TlsConnector,
    ) -> Result<TlsStream<TcpStream>, UpstreamError> {
        let list = match &self.endpoints {
            Endpoints::OriginalDestination => return self.connect_to(original, tls).await,
            Endpoints::Listed(list) => list.load_full(),
        };
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let mut last = UpstreamError::NoEndpoint;
        for offset in 0..list.len().min(ENDPOINTS_TRIED_MAX) {
            match self.connect_to(list[start.wrapping_add(offset) % list.len()], tls).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn connect_to(
        &self,
        endpoint: SocketAddr,
        tls: &TlsConnector,
    ) -> Result<TlsStream<TcpStream>, UpstreamError> {
        let dial_error = |cause: String| UpstreamError::Dial { endpoint, cause };
        let stream = match tokio::time::timeout(self.timeout, TcpStream::connect(endpoint)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(dial_error(error.to_string())),
            Err(_) => return Err(dial_error(format!("no answer within {} s", self.timeout.as_secs()))),
        };
        // Without these the connection works, only slower or longer after the server's death.
        let _ = stream.set_nodelay(true);
        let _ = setsockopt(&stream, sockopt::KeepAlive, &true);
        let _ = setsockopt(&stream, sockopt::TcpKeepIdle, &TCP_KEEPALIVE_IDLE_S);
        let tls_error = |cause: String| UpstreamError::Tls { endpoint, cause };
        match tokio::time::timeout(self.timeout, tls.connect(self.server_name.clone(), stream)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(tls_error(error.to_string())),
            Err(_) => Err(tls_error(format!("no answer within {} s", self.timeout.as_secs()))),
        }
    }

    async fn start_http1(&self, stream: TlsStream<TcpStream>) -> Result<Http1, UpstreamError> {
        let (sender, connection) = http1::Builder::new()
            .title_case_headers(true)
            .max_buf_size(RESPONSE_HEAD_BYTES_MAX as usize)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(UpstreamError::Http)?;
        self.drive(connection.with_upgrades());
        Ok(sender)
    }

    async fn start_http2(&self, stream: TlsStream<TcpStream>) -> Result<Http2, UpstreamError> {
        let (sender, connection) = http2::Builder::new(Tracked(self.tasks.clone()))
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_send_buf_size(SEND_BUFFER_BYTES)
            .max_header_list_size(RESPONSE_HEAD_BYTES_MAX)
            .initial_max_send_streams(STREAMS_MAX)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(UpstreamError::Http)?;
        self.drive(connection);
        Ok(sender)
    }

    /// Runs a connection until it ends or the agent's drain limit cuts it. Requests on it learn of an error
    /// themselves; an idle one's end is of no interest.
    fn drive(&self, connection: impl Future<Output = hyper::Result<()>> + Send + 'static) {
        let cut = self.cut.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(error = explain(&error), "connection to the API server ended");
                },
                () = cut.cancelled() => {}
            }
        });
    }
}

/// TLS towards an API server: verified against `roots`; `identity` is the client certificate that Weir presents,
/// where the upstream credential is one.
///
/// # Errors
/// The certificate and key do not belong together, or cannot be used.
pub fn upstream_tls(
    roots: rustls::RootCertStore,
    identity: Option<(
        Vec<rustls::pki_types::CertificateDer<'static>>,
        rustls::pki_types::PrivateKeyDer<'static>,
    )>,
) -> Result<Arc<rustls::ClientConfig>, ProxyError> {
    let builder = rustls::ClientConfig::builder_with_provider(crate::trust::leaf::crypto_provider())
        .with_safe_default_protocol_versions()
        .map_err(|source| ProxyError::UpstreamTls { source })?
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            builder.with_client_auth_cert(chain, key).map_err(|source| ProxyError::UpstreamTls { source })?
        }
    };
    Ok(Arc::new(config))
}
