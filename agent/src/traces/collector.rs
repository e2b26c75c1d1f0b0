//! The collector's side: OTLP over HTTP/1.1, in clear or by TLS, one connection for each batch. Bounded in time and in what is read.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{auth, config};

/// Longest time for one batch, from looking the host up to the last byte of the answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Most of an answer that is read.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Why no traces can be sent at all.
#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    /// The file of `traces.certificateAuthority`.
    #[error("cannot read certificates of traces.certificateAuthority, {}; are they PEM?", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
    },
    /// The node trusts nobody.
    #[error(
        "the node has no certificate authorities to verify the collector by ({cause}); set traces.certificateAuthority"
    )]
    NoAuthorities {
        /// What was met.
        cause: String,
    },
    /// rustls.
    #[error("cannot use TLS towards the collector")]
    Tls(#[from] rustls::Error),
}

/// Why a batch was not taken.
pub(super) struct PostError {
    /// Whether it may be taken another time.
    pub(super) again: bool,
    pub(super) cause: String,
}

impl PostError {
    fn later(cause: impl fmt::Display) -> Self {
        Self { again: true, cause: cause.to_string() }
    }
}

/// Where traces are sent.
pub(super) struct Collector {
    endpoint: config::CollectorEndpoint,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl fmt::Debug for Collector {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Collector").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Collector {
    pub(super) fn new(config: &config::Traces) -> Result<Self, CollectorError> {
        let endpoint = config.endpoint.clone();
        let Some(name) = endpoint.tls.clone() else { return Ok(Self { endpoint, tls: None }) };
        let roots = match &config.certificate_authority {
            None => auth::fetch::system_roots().map_err(|cause| CollectorError::NoAuthorities { cause })?,
            Some(path) => {
                let unreadable = || CollectorError::Authority { path: path.clone() };
                let mut roots = RootCertStore::empty();
                for certificate in CertificateDer::pem_file_iter(path).map_err(|_| unreadable())? {
                    roots.add(certificate.map_err(|_| unreadable())?).map_err(|_| unreadable())?;
                }
                if roots.is_empty() {
                    return Err(unreadable());
                }
                Arc::new(roots)
            }
        };
        let config = ClientConfig::builder_with_provider(crate::trust::leaf::crypto_provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { endpoint, tls: Some((TlsConnector::from(Arc::new(config)), name)) })
    }

    /// Sends one export, and gives the answer's body.
    pub(super) async fn post(&self, body: Bytes) -> Result<Bytes, PostError> {
        let posted = async {
            let endpoint = &self.endpoint;
            let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await;
            let stream = stream.map_err(PostError::later)?;
            // A head, then a body: without it they would wait for each other's acknowledgement.
            let _ = stream.set_nodelay(true);
            match &self.tls {
                None => self.exchange(stream, body).await,
                Some((tls, name)) => {
                    let stream = tls.connect(name.clone(), stream).await.map_err(PostError::later)?;
                    self.exchange(stream, body).await
                }
            }
        };
        let posted = timeout(TIMEOUT, posted).await;
        posted.unwrap_or_else(|_| Err(PostError::later(format!("no answer within {} s", TIMEOUT.as_secs()))))
    }

    async fn exchange<S>(&self, stream: S, body: Bytes) -> Result<Bytes, PostError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let request = Request::post(&self.endpoint.path)
            .header(header::HOST, &self.endpoint.authority)
            .header(header::CONTENT_TYPE, "application/x-protobuf")
            .header(header::USER_AGENT, concat!("weir-agent/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(body))
            .map_err(PostError::later)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(PostError::later)?;
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(PostError::later)?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(PostError::later)?.to_bytes();
            match status {
                status if status.is_success() => Ok(body),
                // Those that may be tried again, by OTLP's specification.
                StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT => Err(PostError::later(status)),
                status => Err(PostError { again: false, cause: status.to_string() }),
            }
        };
        // What the connection meets, the exchange is told; so only the exchange says when this is over.
        let driver = async {
            let _ = connection.await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = exchange => answer,
            () = driver => Err(PostError::later("the connection ended")),
        }
    }
}
