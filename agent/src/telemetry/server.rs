//! The HTTP server for monitoring: `GET /metrics`, `/healthz`, `/readyz`; plain HTTP/1.1, nothing else.
//!
//! Whoever reaches the address may ask, so each answer costs little, and how many ask at once, how much they send and
//! how long they take is bounded. No answer holds anything of a request.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

use super::exposition;

/// Most connections at once; more wait in the kernel.
const CONNECTIONS_MAX: usize = 8;
/// Most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most headers of a request.
const HEADERS_MAX: usize = 32;
/// How long one connection may take in all; each serves one request.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is tried to listen, while another process (the agent before this one) has the address.
const LISTEN_RETRY: Duration = Duration::from_secs(1);
/// Pause after an error of `accept` that will not pass at once (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

const PLAIN: &str = "text/plain; charset=utf-8";

/// The process that is asked about.
pub trait Monitored: Send + Sync + 'static {
    /// Why it is not ready, each with what that means; empty if it is.
    fn unready(&self) -> Vec<String>;

    /// What an operator should know although it may be ready.
    fn notes(&self) -> Option<String>;

    /// Its metrics, as OpenMetrics text. May block for some system calls.
    fn metrics(&self) -> String;
}

/// Serves until cancelled. That the address cannot be had is logged and tried again: pods must not be refused for it.
pub async fn serve(address: SocketAddr, monitored: Arc<dyn Monitored>, cancellation: CancellationToken) {
    let serving = async {
        let listener = listen(address).await;
        tracing::info!(event = "metrics-served", %address, "metrics and health are served");
        accept(listener, monitored).await;
    };
    cancellation.run_until_cancelled(serving).await;
}

async fn listen(address: SocketAddr) -> TcpListener {
    let mut said: Option<io::ErrorKind> = None;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => {
                if said != Some(error.kind()) {
                    tracing::warn!(
                        event = "metrics-not-served",
                        %address, %error,
                        "cannot serve metrics and health yet, and tries again; does something else have metrics.address?"
                    );
                    said = Some(error.kind());
                }
            }
        }
        tokio::time::sleep(LISTEN_RETRY).await;
    }
}

/// Accepts for ever.
pub(super) async fn accept(listener: TcpListener, monitored: Arc<dyn Monitored>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Dropped with this future, it ends what is open.
    let mut open = tokio::task::JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        // The semaphore is never closed.
        let place = places.clone().acquire_owned().await.ok();
        match listener.accept().await {
            Ok((stream, _)) => {
                let answering = answer_one(stream, monitored.clone());
                open.spawn(async move {
                    // Who is too slow is cut off.
                    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, answering).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "cannot accept for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn answer_one(stream: TcpStream, monitored: Arc<dyn Monitored>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let monitored = monitored.clone();
        async move { Ok::<_, Infallible>(answer(request.method(), request.uri().path(), monitored).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(CONNECTION_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a client of metrics went away or sent no HTTP");
    }
}

async fn answer(method: &Method, path: &str, monitored: Arc<dyn Monitored>) -> Response<Full<Bytes>> {
    if *method != Method::GET && *method != Method::HEAD {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, PLAIN, "only GET is served\n".to_owned());
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/healthz" => text(StatusCode::OK, PLAIN, "ok\n".to_owned()),
        "/readyz" => {
            let (reasons, notes) = (monitored.unready(), monitored.notes());
            let (status, mut lines) = match reasons.is_empty() {
                true => (StatusCode::OK, vec!["ready".to_owned()]),
                false => (StatusCode::SERVICE_UNAVAILABLE, reasons),
            };
            lines.extend(notes);
            text(status, PLAIN, lines.join("\n") + "\n")
        }
        "/metrics" => match tokio::task::spawn_blocking(move || monitored.metrics()).await {
            Ok(rendered) => text(StatusCode::OK, exposition::CONTENT_TYPE, rendered),
            Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, PLAIN, "cannot read the metrics\n".to_owned()),
        },
        _ => text(StatusCode::NOT_FOUND, PLAIN, "there are /metrics, /healthz and /readyz\n".to_owned()),
    }
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
