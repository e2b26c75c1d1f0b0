//! Documents of an issuer over HTTPS: bounded in time and size, and from where they were asked for, so that no redirect
//! leads elsewhere.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::keys::KEY_SET_BYTES_MAX;

/// Longest time for one document, from looking its host up to its last byte.
pub const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest document.
pub const DOCUMENT_BYTES_MAX: usize = KEY_SET_BYTES_MAX;
/// Largest head of an answer.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Why a document cannot be had. The text is for the log; [`FetchError::brief`] for who presented a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The URL is none that could be fetched.
    #[error("{url:?} is no https URL with a host")]
    Url {
        /// The URL.
        url: String,
    },
    /// Name, connection, TLS or HTTP.
    #[error("cannot fetch {url}: {cause}")]
    Unreachable {
        /// The URL.
        url: String,
        /// What the library says.
        cause: String,
    },
    /// Longer than [`FETCH_TIMEOUT`].
    #[error("{url} did not answer within {} s", FETCH_TIMEOUT.as_secs())]
    Timeout {
        /// The URL.
        url: String,
    },
    /// A redirect: the configuration says where documents are, nobody else.
    #[error(
        "{url} redirects elsewhere ({status}), which is not followed; configure the URL that it leads to"
    )]
    Redirect {
        /// The URL.
        url: String,
        /// The answer's status.
        status: StatusCode,
    },
    /// Any other answer than 200.
    #[error("{url} answered {status}")]
    Status {
        /// The URL.
        url: String,
        /// The answer's status.
        status: StatusCode,
    },
    /// Over [`DOCUMENT_BYTES_MAX`].
    #[error("{url} answered more than {DOCUMENT_BYTES_MAX} bytes")]
    TooLong {
        /// The URL.
        url: String,
    },
}

impl FetchError {
    /// What is wrong, in words that tell nothing of the agent's network.
    pub fn brief(&self) -> String {
        match self {
            Self::Url { .. } => "its documents are at no URL that can be fetched".to_owned(),
            Self::Unreachable { .. } => "it cannot be reached".to_owned(),
            Self::Timeout { .. } => "it does not answer in time".to_owned(),
            Self::Redirect { .. } => "it redirects elsewhere".to_owned(),
            Self::Status { status, .. } => format!("it answers {}", status.as_u16()),
            Self::TooLong { .. } => "its answer is too long".to_owned(),
        }
    }
}

/// Where documents come from.
pub trait Fetch: Send + Sync + fmt::Debug {
    /// The document at `target`: an https URL, or for an issuer that is read through its cluster a path of the API
    /// server (`/openid/v1/jwks`). Bounded by [`FETCH_TIMEOUT`] and [`DOCUMENT_BYTES_MAX`].
    fn fetch<'a>(&'a self, target: &'a str) -> BoxFuture<'a, Result<Bytes, FetchError>>;
}

/// Fetches from hosts that certain authorities vouch for.
pub struct HttpsFetch {
    tls: TlsConnector,
}

impl fmt::Debug for HttpsFetch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("HttpsFetch")
    }
}

impl HttpsFetch {
    /// Trusts `roots` alone.
    ///
    /// # Errors
    /// rustls has no protocol version to offer.
    pub fn new(roots: Arc<RootCertStore>) -> Result<Self, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(crate::trust::leaf::crypto_provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { tls: TlsConnector::from(Arc::new(config)) })
    }

    async fn document(&self, url: &str) -> Result<Bytes, FetchError> {
        let no_url = || FetchError::Url { url: url.to_owned() };
        let unreachable = |cause: &dyn fmt::Display| FetchError::Unreachable {
            url: url.to_owned(),
            cause: cause.to_string(),
        };
        let uri: Uri = url.parse().map_err(|_| no_url())?;
        let authority = uri.authority().filter(|_| uri.scheme_str() == Some("https")).ok_or_else(no_url)?;
        let host = authority.host().trim_matches(['[', ']']);
        let name = ServerName::try_from(host.to_owned()).map_err(|_| no_url())?;
        let port = authority.port_u16().unwrap_or(443);
        let request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(header::HOST, authority.as_str())
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("weir-agent/", env!("CARGO_PKG_VERSION")))
            .body(Empty::<Bytes>::new())
            .map_err(|_| no_url())?;

        let stream = TcpStream::connect((host, port)).await.map_err(|error| unreachable(&error))?;
        let stream = self.tls.connect(name, stream).await.map_err(|error| unreachable(&error))?;
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_BYTES_MAX);
        let (mut sender, connection) =
            builder.handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(&error))?;
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(|error| unreachable(&error))?;
            let status = answer.status();
            if status.is_redirection() {
                return Err(FetchError::Redirect { url: url.to_owned(), status });
            }
            if status != StatusCode::OK {
                return Err(FetchError::Status { url: url.to_owned(), status });
            }
            match Limited::new(answer.into_body(), DOCUMENT_BYTES_MAX).collect().await {
                Ok(body) => Ok(body.to_bytes()),
                Err(error) if error.is::<LengthLimitError>() => {
                    Err(FetchError::TooLong { url: url.to_owned() })
                }
                Err(error) => Err(unreachable(&error)),
            }
        };
        // What the connection meets, the exchange is told; so only the exchange says when this is over.
        let driver = async {
            let _ = connection.await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            document = exchange => document,
            () = driver => Err(unreachable(&"the connection ended")),
        }
    }
}

impl Fetch for HttpsFetch {
    fn fetch<'a>(&'a self, target: &'a str) -> BoxFuture<'a, Result<Bytes, FetchError>> {
        Box::pin(async move {
            let document = timeout(FETCH_TIMEOUT, self.document(target)).await;
            document.unwrap_or_else(|_| Err(FetchError::Timeout { url: target.to_owned() }))
        })
    }
}

/// The authorities that the node trusts.
///
/// # Errors
/// It trusts none, with what was met on the way.
pub fn system_roots() -> Result<Arc<RootCertStore>, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _ignored) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let cause = found.errors.first().map_or_else(|| "none is installed".to_owned(), ToString::to_string);
        return Err(cause);
    }
    Ok(Arc::new(roots))
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use rustls::{RootCertStore, ServerConfig, pki_types::PrivateKeyDer};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    use super::{DOCUMENT_BYTES_MAX, FETCH_TIMEOUT, Fetch as _, FetchError, HttpsFetch};

    /// A host that answers every request with the same bytes, and then, if it is told so, with nothing for ever.
    struct Host {
        url: String,
        roots: Arc<RootCertStore>,
        serving: tokio::task::JoinHandle<()>,
    }

    impl Drop for Host {
        fn drop(&mut self) {
            self.serving.abort();
        }
    }

    async fn host(answer: impl Into<Vec<u8>>, stays_open: bool) -> Host {
        let answer = answer.into();
        let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
        let mut roots = RootCertStore::empty();
        roots.add(own.cert.der().clone()).expect("is a certificate");
        let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).expect("is a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("there are versions")
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .expect("key and certificate fit");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("can listen");
        let port = listener.local_addr().expect("has an address").port();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let serving = tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                // Whoever does not trust the certificate leaves here.
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { break };
                    request.push(byte);
                }
                // Who has read enough may be gone.
                let _ = stream.write_all(&answer).await;
                let _ = stream.flush().await;
                match stays_open {
                    true => open.push(stream),
                    false => drop(stream.shutdown().await),
                }
            }
        });
        Host { url: format!("https://localhost:{port}/keys"), roots: Arc::new(roots), serving }
    }

    async fn fetched(host: &Host) -> Result<bytes::Bytes, FetchError> {
        HttpsFetch::new(Arc::clone(&host.roots)).expect("TLS can be set up").fetch(&host.url).await
    }

    fn answer(status: &str, headers: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
    }

    #[tokio::test]
    async fn a_document_is_fetched_from_a_host_that_is_vouched_for() {
        let host = host(answer("200 OK", "", "{}"), true).await;
        assert_eq!(fetched(&host).await.as_deref(), Ok(&b"{}"[..]));
        let stranger = HttpsFetch::new(Arc::new(RootCertStore::empty())).expect("TLS can be set up");
        let refused = stranger.fetch(&host.url).await;
        assert!(
            matches!(&refused, Err(FetchError::Unreachable { cause, .. }) if cause.contains("UnknownIssuer")),
            "{refused:?}"
        );
        let other_name = host.url.replace("localhost", "127.0.0.1");
        let refused =
            HttpsFetch::new(Arc::clone(&host.roots)).expect("TLS can be set up").fetch(&other_name).await;
        assert!(matches!(&refused, Err(FetchError::Unreachable { .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn what_is_no_document_is_said_for_its_own_reason() {
        let status =
            |error: FetchError| error.to_string().split_once("/keys").expect("names the URL").1.to_owned();
        let refused =
            async |text: String| status(fetched(&host(text, false).await).await.expect_err("is refused"));
        assert_eq!(
            refused(answer("500 Internal Server Error", "", "")).await,
            " answered 500 Internal Server Error"
        );
        let elsewhere = answer("302 Found", "location: https://elsewhere.test/\r\n", "");
        assert_eq!(
            refused(elsewhere).await,
            " redirects elsewhere (302 Found), which is not followed; configure the URL that it leads to"
        );
        assert_eq!(
            refused("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}".to_owned()).await,
            ": error reading a body from connection"
        );
        assert_eq!(refused(String::new()).await, ": connection closed before message completed");
        assert_eq!(refused("SSH-2.0-x\r\n\r\n".to_owned()).await, ": invalid HTTP version parsed");
    }

    #[tokio::test]
    async fn documents_are_bounded_whether_or_not_they_say_how_long_they_are() {
        let body = "a".repeat(DOCUMENT_BYTES_MAX + 1);
        let open_ended = format!("HTTP/1.1 200 OK\r\n\r\n{body}");
        for text in [answer("200 OK", "", &body), open_ended] {
            let refused = fetched(&host(text, true).await).await;
            assert!(matches!(refused, Err(FetchError::TooLong { .. })), "{refused:?}");
        }
        let head = format!("HTTP/1.1 200 OK\r\nx: {body}\r\n\r\n");
        let refused = fetched(&host(head, true).await).await;
        assert!(matches!(refused, Err(FetchError::Unreachable { .. })), "{refused:?}");
        let largest = answer("200 OK", "", &"a".repeat(DOCUMENT_BYTES_MAX));
        assert_eq!(fetched(&host(largest, true).await).await.map(|body| body.len()), Ok(DOCUMENT_BYTES_MAX));
    }

    #[tokio::test]
    async fn a_host_that_does_not_answer_is_not_waited_for() {
        let begun = Instant::now();
        let (silent, half) = tokio::join!(async { fetched(&host("", true).await).await }, async {
            fetched(&host("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}", true).await).await
        },);
        for refused in [silent, half] {
            assert!(matches!(refused, Err(FetchError::Timeout { .. })), "{refused:?}");
        }
        assert!(begun.elapsed() >= FETCH_TIMEOUT);
    }

    #[tokio::test]
    async fn only_https_urls_with_a_host_are_fetched() {
        let fetch = HttpsFetch::new(Arc::new(RootCertStore::empty())).expect("TLS can be set up");
        for url in
            ["http://localhost/keys", "file:///etc/shadow", "/openid/v1/jwks", "https:///x", "localhost", ""]
        {
            assert_eq!(fetch.fetch(url).await, Err(FetchError::Url { url: url.to_owned() }));
        }
    }
}
