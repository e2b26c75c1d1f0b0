//! What the proxy's tests stand on: a real HTTP server behind real TLS on loopback as the API server, a real
//! recorder in a temporary folder, and the proxy between them. No part of it is replaced.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};
use weir_common::{
    event::{Caller, Event, Pod},
    frame::FrameType,
    segment::SegmentReader,
};

use super::{Accepted, ClusterUpstream, Endpoints, Limits, Proxy, ProxyOptions, upstream_tls};
use crate::{
    auth::Policy,
    recording::{
        Recorder, RecorderOptions,
        fixture::{self, TestDisk},
    },
    traces::Traces,
    trust::ServingCertificate,
};

/// Name that both certificates are for.
pub(super) const NAME: &str = "api.example";
/// Length of `/big`.
pub(super) const BIG_BYTES: usize = 25 * 1024 * 1024;
const BIG_PIECE_BYTES: usize = 64 * 1024;
/// What the server says in a stream when the test asks.
pub(super) const SAID: &[u8; 5] = b"said\n";
/// Nothing in a test takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(30);

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A request as the API server got it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) uri: Uri,
    pub(super) version: Version,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// The API server's side.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) seen: Mutex<Vec<Seen>>,
    pub(super) connections: watch::Sender<usize>,
    /// Makes it end its connections in an orderly way (GOAWAY).
    pub(super) restart: Notify,
    /// Lets `/watch` send its second event, and a stream's server speak.
    pub(super) next_event: Notify,
    /// What came in upgraded streams.
    pub(super) streamed: watch::Sender<Vec<u8>>,
    /// `Authorization` that is answered 401.
    pub(super) refused: Mutex<Vec<HeaderValue>>,
}

/// All of it.
pub(super) struct Rig {
    pub(super) proxy: Proxy,
    pub(super) recorder: Recorder,
    pub(super) upstream: Arc<Upstream>,
    pub(super) endpoints: Arc<ArcSwap<Vec<SocketAddr>>>,
    pub(super) policy: Arc<ArcSwap<Policy>>,
    listener: TcpListener,
    _folder: tempfile::TempDir,
    client_tls: Arc<rustls::ClientConfig>,
}

/// Waits for what must happen soon.
pub(super) async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("it happens in time")
}

impl Rig {
    /// A proxy in front of an API server that offers `upstream_alpn`.
    pub(super) async fn new(upstream_alpn: &[&str]) -> Self {
        Self::with_limits(upstream_alpn, Limits::default()).await
    }

    pub(super) async fn with_limits(upstream_alpn: &[&str], limits: Limits) -> Self {
        let start = |options| Recorder::start(options).expect("a recorder");
        Self::recorded_by(upstream_alpn, limits, start, None).await
    }

    /// The same, with a journal on a disk that the test has in its hands.
    pub(super) async fn on_disk(upstream_alpn: &[&str], disk: &Arc<TestDisk>) -> Self {
        let start = |options| fixture::on(disk, options).expect("a recorder");
        Self::recorded_by(upstream_alpn, Limits::default(), start, None).await
    }

    /// The same, with traces.
    pub(super) async fn traced(upstream_alpn: &[&str], traces: Traces) -> Self {
        let start = |options| Recorder::start(options).expect("a recorder");
        Self::recorded_by(upstream_alpn, Limits::default(), start, Some(traces)).await
    }

    async fn recorded_by(
        upstream_alpn: &[&str],
        limits: Limits,
        start: impl FnOnce(RecorderOptions) -> Recorder,
        traces: Option<Traces>,
    ) -> Self {
        let (server_tls, roots) = certificates();
        let (upstream, address) = Upstream::start(&server_tls, upstream_alpn).await;
        let endpoints = Arc::new(ArcSwap::from_pointee(vec![address]));
        let folder = tempfile::tempdir().expect("a temporary folder");
        let recorder = start(RecorderOptions {
            journal_bytes_max: 256 * 1024 * 1024,
            response_bytes_max: 64 * 1024,
            session_idle_timeout: Duration::from_secs(60),
            ..RecorderOptions::new(folder.path().to_owned(), "node".into(), vec!["test".into()])
        });
        let tls = upstream_tls(roots.clone(), None).expect("a client configuration");
        let policy = Arc::new(ArcSwap::from_pointee(Policy::open("test".into())));
        let cluster = ClusterUpstream {
            name: "test".into(),
            names: vec![NAME.into()],
            endpoints: Endpoints::Listed(Arc::clone(&endpoints)),
            server_name: ServerName::try_from(NAME).expect("a name"),
            tls: Arc::clone(&tls),
            own_tls: None,
            policy: Arc::clone(&policy),
            serving: ServingCertificate::new(
                with_alpn(&server_tls, &["h2", "http/1.1"]),
                std::time::SystemTime::UNIX_EPOCH,
            ),
        };
        let proxy =
            Proxy::new(ProxyOptions { clusters: vec![cluster], recorder: recorder.clone(), limits, traces });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        Self { proxy, recorder, upstream, endpoints, policy, listener, _folder: folder, client_tls: tls }
    }

    /// A connection of the test pod, before TLS, handed to the proxy.
    pub(super) async fn connect_tcp(&self) -> TcpStream {
        let address = self.listener.local_addr().expect("an address");
        let (client, accepted) = tokio::join!(TcpStream::connect(address), self.listener.accept());
        let pod =
            Pod { uid: "uid".into(), name: "agent".into(), ip: Some("10.244.0.7".into()), ..Pod::default() };
        self.proxy.serve(Accepted {
            stream: accepted.expect("accepted").0,
            accepted: std::time::Instant::now(),
            original_destination: address,
            cluster: 0,
            caller: Arc::new(Caller { pod: Some(pod), cgroup: 1, ..Caller::default() }),
            labels: Arc::default(),
        });
        client.expect("connected")
    }

    pub(super) async fn try_connect(
        &self,
        alpn: &str,
        name: &'static str,
    ) -> io::Result<TlsStream<TcpStream>> {
        let tcp = self.connect_tcp().await;
        let mut tls = rustls::ClientConfig::clone(&self.client_tls);
        tls.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let name = ServerName::try_from(name).expect("a name");
        TlsConnector::from(Arc::new(tls)).connect(name, tcp).await
    }

    pub(super) async fn connect(&self, alpn: &str) -> TlsStream<TcpStream> {
        self.try_connect(alpn, NAME).await.expect("a TLS connection")
    }

    pub(super) async fn http1(&self) -> http1::SendRequest<Full<Bytes>> {
        let io = TokioIo::new(self.connect("http/1.1").await);
        let (sender, connection) = http1::handshake(io).await.expect("HTTP/1.1");
        tokio::spawn(connection.with_upgrades());
        sender
    }

    pub(super) async fn http2(&self) -> http2::SendRequest<Full<Bytes>> {
        let io = TokioIo::new(self.connect("h2").await);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.expect("HTTP/2");
        tokio::spawn(connection);
        sender
    }

    /// Sends bytes as they are over TLS and reads the answer until the proxy closes.
    pub(super) async fn raw(&self, request: &str) -> String {
        let mut stream = self.connect("http/1.1").await;
        stream.write_all(request.as_bytes()).await.expect("sent");
        // What TLS still holds is not sent by reading. Whoever was answered early may have closed.
        let _ = soon(stream.flush()).await;
        let mut answer = Vec::new();
        // A connection may end without close_notify.
        let _ = soon(stream.read_to_end(&mut answer)).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// What the API server got.
    pub(super) fn seen(&self) -> Vec<Seen> {
        self.upstream.seen.lock().expect("not poisoned").clone()
    }

    /// Drains, stops the recorder and reads the journal back.
    pub(super) async fn events(self) -> Vec<Event> {
        soon(self.proxy.drain(PATIENCE)).await;
        self.recorder.stop("test").await.expect("the last records are written");
        let mut segments: Vec<_> = std::fs::read_dir(self.recorder.folder())
            .expect("the epoch's folder")
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
            .collect();
        segments.sort();
        let mut events = Vec::new();
        for path in segments {
            let bytes = std::fs::read(&path).expect("a segment");
            for located in SegmentReader::new(&bytes, None).expect("a header") {
                let frame = located.expect("a whole frame").frame;
                if frame.frame_type == FrameType::Event {
                    events.push(serde_json::from_slice(frame.value).expect("an event"));
                }
            }
        }
        events
    }
}

/// A server configuration for [`NAME`] and the roots that trust it.
fn certificates() -> (rustls::ServerConfig, rustls::RootCertStore) {
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_key = rcgen::KeyPair::generate().expect("a key");
    let authority = rcgen::CertifiedIssuer::self_signed(parameters, authority_key).expect("an authority");
    let key = rcgen::KeyPair::generate().expect("a key");
    let leaf = rcgen::CertificateParams::new(vec![NAME.to_owned()])
        .and_then(|parameters| parameters.signed_by(&key, &authority))
        .expect("a certificate");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.der().clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("protocol versions")
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .expect("a server configuration");
    (config, roots)
}

fn with_alpn(config: &rustls::ServerConfig, protocols: &[&str]) -> Arc<rustls::ServerConfig> {
    let mut config = config.clone();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    Arc::new(config)
}

impl Upstream {
    async fn start(tls: &rustls::ServerConfig, alpn: &[&str]) -> (Arc<Self>, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let upstream = Arc::new(Self {
            seen: Mutex::default(),
            connections: watch::Sender::new(0),
            next_event: Notify::new(),
            streamed: watch::Sender::default(),
            restart: Notify::new(),
            refused: Mutex::default(),
        });
        let (this, acceptor) = (Arc::clone(&upstream), TlsAcceptor::from(with_alpn(tls, alpn)));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (this, acceptor) = (Arc::clone(&this), acceptor.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    this.connections.send_modify(|count| *count += 1);
                    let served = Arc::clone(&this);
                    let service = service_fn(move |request| serve(Arc::clone(&served), request));
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let serving = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
                    let mut serving = std::pin::pin!(serving);
                    tokio::select! {
                        _ = serving.as_mut() => {}
                        () = this.restart.notified() => {
                            serving.as_mut().graceful_shutdown();
                            let _ = serving.await;
                        }
                    }
                    this.connections.send_modify(|count| *count -= 1);
                });
            }
        });
        (upstream, address)
    }
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

async fn serve(upstream: Arc<Upstream>, mut request: Request<Incoming>) -> Result<Response<Body>, io::Error> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let path = head.uri.path().to_owned();
    let seen = Seen { uri: head.uri, version: head.version, headers: head.headers, body: body.clone() };
    let audit_id = seen.headers.get("audit-id").cloned();
    let agreed = ["upgrade", "sec-websocket-protocol"].map(|name| (name, seen.headers.get(name).cloned()));
    let refuses = {
        let refused = upstream.refused.lock().expect("not poisoned");
        seen.headers.get("authorization").is_some_and(|presented| refused.contains(presented))
    };
    upstream.seen.lock().expect("not poisoned").push(seen);
    let mut response = Response::new(full("not found"));
    if let Some(id) = audit_id {
        response.headers_mut().insert("audit-id", id);
    }
    match path.as_str() {
        _ if refuses => *response.status_mut() = StatusCode::UNAUTHORIZED,
        "/big" => *response.body_mut() = big(),
        "/watch" => *response.body_mut() = watch(upstream, false),
        "/hangup" => return Err(io::Error::other("hung up")),
        "/broken" => *response.body_mut() = watch(upstream, true),
        "/later" => {
            upstream.next_event.notified().await;
            *response.body_mut() = full(body);
        }
        "/two" => *response.body_mut() = two(upstream),
        "/trailers" => *response.body_mut() = trailers(),
        path if path.ends_with("/exec") => {
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert("connection", "Upgrade".parse().expect("a value"));
            for (name, value) in agreed {
                value.and_then(|value| response.headers_mut().insert(name, value));
            }
            *response.body_mut() = full("");
            tokio::spawn(stream_back(upstream, upgrade));
        }
        path if path.ends_with("/attach") => {
            *response.status_mut() = StatusCode::FORBIDDEN;
            *response.body_mut() = full("no attach for you");
        }
        _ => *response.body_mut() = full(body),
    }
    Ok(response)
}

/// Greets first, then reads to the client's end (and speaks when the test asks), then sends back all that came, then closes: it needs half-close.
async fn stream_back(upstream: Arc<Upstream>, upgrade: hyper::upgrade::OnUpgrade) {
    let Ok(upgraded) = upgrade.await else { return };
    let mut stream = TokioIo::new(upgraded);
    let _ = stream.write_all(b"\x00hello").await;
    let _ = stream.flush().await;
    let mut all = Vec::new();
    loop {
        let before = all.len();
        let read = tokio::select! {
            read = stream.read_buf(&mut all) => Some(read.unwrap_or(0)),
            () = upstream.next_event.notified() => None,
        };
        match read {
            Some(0) => break,
            Some(_) => upstream.streamed.send_modify(|streamed| streamed.extend_from_slice(&all[before..])),
            None => {
                let _ = stream.write_all(SAID).await;
                let _ = stream.flush().await;
            }
        }
    }
    let _ = stream.write_all(&all).await;
    let _ = stream.shutdown().await;
}

fn big() -> Body {
    let piece = Bytes::from(vec![b'x'; BIG_PIECE_BYTES]);
    let pieces = stream::iter((0..BIG_BYTES / BIG_PIECE_BYTES).map(move |_| Ok(Frame::data(piece.clone()))));
    StreamBody::new(pieces).boxed_unsync()
}

/// Sends an event, and one more each time the test asks; with `breaks`, an error in the second's place.
fn watch(upstream: Arc<Upstream>, breaks: bool) -> Body {
    let events = stream::unfold(0, move |count| {
        let upstream = Arc::clone(&upstream);
        async move {
            if count > 0 {
                upstream.next_event.notified().await;
            }
            let event = Frame::data(Bytes::from(format!("event {count}\n")));
            let broken = breaks && count > 0;
            Some((if broken { Err(io::Error::other("gone")) } else { Ok(event) }, count + 1))
        }
    });
    StreamBody::new(events).boxed_unsync()
}

/// Sends a piece, and the last one when the test asks, without having said how long it is.
fn two(upstream: Arc<Upstream>) -> Body {
    let pieces = stream::unfold(0, move |count| {
        let upstream = Arc::clone(&upstream);
        async move {
            if count == 1 {
                upstream.next_event.notified().await;
            }
            (count < 2).then(|| (Ok(Frame::data(Bytes::from(format!("piece {count}")))), count + 1))
        }
    });
    StreamBody::new(pieces).boxed_unsync()
}

fn trailers() -> Body {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-trailer", "kept".parse().expect("a value"));
    let pieces = [Ok(Frame::data(Bytes::from_static(b"data"))), Ok(Frame::trailers(trailers))];
    StreamBody::new(stream::iter(pieces)).boxed_unsync()
}
