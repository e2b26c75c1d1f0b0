//! What a collector gets of requests, read by OpenTelemetry's own messages.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind},
};
use prost::Message as _;
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use weir_common::event::Kind;

use super::{
    rig::{NAME, Rig, soon},
    tests::{bytes, request},
};
use crate::{
    config::{self, CollectorEndpoint},
    traces::{Measured, Traces},
};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// What a collector answers, in turn; the last answer again and again.
type Answers = &'static [(StatusCode, i64)];

/// A collector: takes OTLP over HTTP, in clear or by TLS.
struct Collector {
    bodies: mpsc::UnboundedReceiver<Bytes>,
    config: config::Traces,
    _authority: tempfile::NamedTempFile,
}

impl Collector {
    async fn start(tls: bool, answers: Answers) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (taken, bodies) = mpsc::unbounded_channel();
        let (server, authority) = certificate();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        tokio::spawn(async move {
            for number in 0.. {
                let (stream, _) = listener.accept().await.expect("a connection");
                let answer = answers[number.min(answers.len() - 1)];
                let (taken, acceptor) = (taken.clone(), acceptor.clone());
                let service = service_fn(move |request| take(request, taken.clone(), answer));
                // One that fails is the exporter's to count.
                tokio::spawn(async move {
                    if tls {
                        let Ok(stream) = acceptor.accept(stream).await else { return };
                        let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                    } else {
                        let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                    }
                });
            }
        });
        let config = settings(address, tls, authority.path());
        Self { bodies, config, _authority: authority }
    }
}

fn settings(address: SocketAddr, tls: bool, authority: &std::path::Path) -> config::Traces {
    let endpoint = CollectorEndpoint {
        host: "localhost".into(),
        port: address.port(),
        authority: format!("localhost:{}", address.port()),
        path: "/v1/traces".into(),
        tls: tls.then(|| "localhost".try_into().expect("a name")),
    };
    config::Traces { endpoint, certificate_authority: tls.then(|| authority.to_owned()), sample_percent: 100 }
}

fn certificate() -> (rustls::ServerConfig, tempfile::NamedTempFile) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), made.cert.pem()).expect("is written");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("protocol versions")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .expect("a server configuration");
    (config, file)
}

async fn take(
    request: Request<Incoming>,
    taken: mpsc::UnboundedSender<Bytes>,
    (status, rejected): (StatusCode, i64),
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    assert_eq!((request.method().as_str(), request.uri().path()), ("POST", "/v1/traces"));
    assert_eq!(request.headers()["content-type"], "application/x-protobuf");
    let body = request.into_body().collect().await?.to_bytes();
    if status.is_success() {
        let _ = taken.send(body);
    }
    let partial_success =
        Some(ExportTracePartialSuccess { rejected_spans: rejected, error_message: "as asked".to_owned() });
    let answer = ExportTraceServiceResponse { partial_success }.encode_to_vec();
    let mut response = Response::new(Full::new(answer.into()));
    *response.status_mut() = status;
    Ok(response)
}

/// Traces that go to a collector, and how they end.
struct Sending {
    traces: Traces,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Sending {
    fn to(config: &config::Traces) -> Self {
        let (traces, exporter) = Traces::new(config, "node-1").expect("traces");
        let stop = CancellationToken::new();
        let running = tokio::spawn(exporter.run(stop.clone()));
        Self { traces, stop, running }
    }

    async fn end(self) -> Measured {
        self.stop.cancel();
        soon(self.running).await.expect("no panic");
        self.traces.measured()
    }
}

fn spans(body: &[u8]) -> Vec<Span> {
    let request = ExportTraceServiceRequest::decode(body).expect("OTLP");
    let all = request.resource_spans.into_iter().flat_map(|resource| {
        let resource_of = attributes(&resource.resource.expect("a resource").attributes);
        assert_eq!(resource_of["service.name"], "weir-agent");
        assert_eq!(resource_of["k8s.node.name"], "node-1");
        resource.scope_spans
    });
    all.flat_map(|scope| scope.spans).collect()
}

fn attributes(pairs: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |pair: &KeyValue| match pair.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{other:?}"),
    };
    pairs.iter().map(|pair| (pair.key.clone(), text(pair))).collect()
}

fn below<'a>(spans: &'a [Span], whole: &Span) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.parent_span_id == whole.span_id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_says_what_a_request_waited_for_leads_to_its_record_and_tells_no_secret() {
    let mut collector = Collector::start(true, &[(StatusCode::OK, 0)]).await;
    let sending = Sending::to(&collector.config);
    let rig = Rig::traced(&["h2"], sending.traces.clone()).await;
    let post = Request::post("/api/v1/namespaces/a/configmaps?token=secret-query")
        .header("host", NAME)
        .header("authorization", "Bearer secret-token")
        .header("cookie", "secret-cookie")
        .header("traceparent", PARENT);
    let answer = soon(rig.http1().await.send_request(request(post, "secret-body"))).await.expect("an answer");
    let status = answer.status().as_u16().to_string();
    bytes(answer).await;
    let events = rig.events().await;
    let opened = events.iter().find(|event| matches!(event.kind, Kind::RequestOpened(_)));
    let id = opened.and_then(|event| event.request.clone()).expect("a record");
    let measured = sending.end().await;

    let body = soon(collector.bodies.recv()).await.expect("an export");
    for secret in ["secret", "token=", "Bearer"] {
        assert!(!body.windows(secret.len()).any(|window| window == secret.as_bytes()), "{secret}");
    }
    let spans = spans(&body);
    assert_eq!(measured, Measured { exported: spans.len() as u64, ..Measured::default() });
    let whole = |name: &str| spans.iter().find(|span| span.name == name).expect("is there");
    let (accepted, asked) = (whole("accept"), whole("POST resource"));
    let stages = |whole| -> Vec<_> { below(&spans, whole).iter().map(|span| span.name.as_str()).collect() };
    assert_eq!(stages(accepted), ["identify", "handshake"]);
    let waited = ["receive", "authenticate", "record", "assume role", "forward", "respond"];
    assert_eq!(stages(asked), waited);
    let links: Vec<_> = asked.links.iter().map(|link| (hex::encode(&link.trace_id), &link.span_id)).collect();
    // What the client says is linked: it has no say in where the trace belongs.
    let client = hex::decode("00f067aa0ba902b7").expect("hex");
    let parent = "4bf92f3577b34da6a3ce929d0e0e4736".to_owned();
    assert_eq!(links, [(hex::encode(&accepted.trace_id), &accepted.span_id), (parent, &client)]);
    assert_ne!(asked.trace_id, accepted.trace_id);
    assert!(asked.parent_span_id.is_empty());
    let said = attributes(&asked.attributes);
    let expected = [
        ("http.request.method", "POST"),
        ("http.response.status_code", status.as_str()),
        ("k8s.pod.name", "agent"),
        ("weir.cluster", "test"),
        ("weir.request.id", id.as_str()),
        ("weir.request.namespace", "a"),
        ("weir.request.resource", "configmaps"),
        ("weir.request.verb", "create"),
        ("weir.verdict", "forwarded"),
    ];
    for (key, value) in expected {
        assert_eq!(said.get(key).map(String::as_str), Some(value), "{key}: {said:?}");
    }
    let parts = below(&spans, asked);
    assert!(parts.iter().all(|span| span.trace_id == asked.trace_id));
    assert!(parts[0].start_time_unix_nano >= asked.start_time_unix_nano);
    assert!(parts.windows(2).all(|pair| pair[0].end_time_unix_nano == pair[1].start_time_unix_nano));
    assert_eq!(parts[5].end_time_unix_nano, asked.end_time_unix_nano);
    assert_eq!(parts[4].kind, SpanKind::Client as i32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_request_has_a_trace_that_says_so() {
    let mut collector = Collector::start(false, &[(StatusCode::OK, 0)]).await;
    let sending = Sending::to(&collector.config);
    let rig = Rig::traced(&["h2"], sending.traces.clone()).await;
    let get = Request::get("/api/v1/pods").header("host", "elsewhere.example.com");
    let answer = soon(rig.http1().await.send_request(request(get, ""))).await.expect("an answer");
    assert!(answer.status().is_client_error());
    drop((answer, rig));
    sending.end().await;
    let spans = spans(&soon(collector.bodies.recv()).await.expect("an export"));
    let asked = spans.iter().find(|span| span.name == "GET resource").expect("is there");
    assert_eq!(attributes(&asked.attributes)["weir.verdict"], "misdirected");
    assert_eq!(asked.status.as_ref().map(|status| status.code), Some(2));
    let stages: Vec<_> = below(&spans, asked).iter().map(|span| span.name.as_str()).collect();
    assert_eq!(stages, ["receive", "record"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_is_asked_again_while_it_may_answer_and_what_it_does_not_take_is_counted() {
    let spans = |measured: Measured| (measured.exported, measured.failed, measured.rejected);
    let cases: [(Answers, _); 3] = [
        (&[(StatusCode::SERVICE_UNAVAILABLE, 0), (StatusCode::OK, 0)], (1, 0, 0)),
        (&[(StatusCode::BAD_REQUEST, 0)], (0, 1, 0)),
        (&[(StatusCode::OK, 1)], (0, 0, 1)),
    ];
    for (answers, expected) in cases {
        let collector = Collector::start(false, answers).await;
        let sending = Sending::to(&collector.config);
        drop(sending.traces.begin(std::time::Instant::now()));
        let traces = sending.traces.clone();
        soon(async {
            while spans(traces.measured()) == (0, 0, 0) {
                tokio::task::yield_now().await;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        assert_eq!(spans(sending.end().await), expected, "{answers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_delays_no_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let silent = settings(listener.local_addr().expect("an address"), false, "/".as_ref());
    let sending = Sending::to(&silent);
    let rig = Rig::traced(&["h2"], sending.traces.clone()).await;
    for _ in 0..3 {
        let get = Request::get("/api/v1/pods").header("host", NAME);
        let answer = soon(rig.http1().await.send_request(request(get, ""))).await.expect("an answer");
        bytes(answer).await;
    }
    let measured = sending.end().await;
    assert_eq!(measured.exported, 0);
}
