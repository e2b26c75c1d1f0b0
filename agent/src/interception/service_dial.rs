//! How the agent dials its own cluster where only the Service's address is known to it (`inCluster`).
//!
//! A Service's address leads to an API server only where kube-proxy has written its rules, and on a node that boots
//! kube-proxy may be a pod that waits for the agent. So whoever does not answer there is looked for at the addresses at which
//! API servers were known to be: those that are configured, and those that an agent has stored.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};
use tower::Service;

/// How long the Service's address may take before the others are tried; it is a machine of the same network.
const FIRST_TIMEOUT: Duration = Duration::from_secs(1);
/// How long each of the others may take.
const OTHER_TIMEOUT: Duration = Duration::from_secs(1);
/// Most others that are tried.
pub(super) const OTHERS_MAX: usize = 8;

/// Connects to the address that it is asked for, or else to one of those that lead to the same server. Whoever answers must
/// show a certificate for the address that was asked for: that is for TLS to judge.
#[derive(Clone, Debug)]
pub(super) struct ServiceDial {
    others: Arc<[SocketAddr]>,
}

impl ServiceDial {
    pub(super) fn new(others: &[SocketAddr]) -> Self {
        Self { others: others.iter().copied().take(OTHERS_MAX).collect() }
    }
}

impl Service<Uri> for ServiceDial {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let others = self.others.clone();
        async move {
            let host = to.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let port = to.port_u16().unwrap_or(443);
            let failed = match connected(FIRST_TIMEOUT, TcpStream::connect((host.as_str(), port))).await {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            let asked = format!("{host}:{port}").parse::<SocketAddr>().ok();
            for other in others.iter().filter(|other| Some(**other) != asked) {
                if let Ok(stream) = connected(OTHER_TIMEOUT, TcpStream::connect(other)).await {
                    tracing::info!(event = "api-service-not-reached", %failed, instead = %other, "the API server's Service does not answer; is there a kube-proxy?");
                    return Ok(stream);
                }
            }
            Err(failed)
        }
        .boxed()
    }
}

async fn connected(
    limit: Duration,
    connecting: impl Future<Output = io::Result<TcpStream>>,
) -> io::Result<TokioIo<TcpStream>> {
    let stream = timeout(limit, connecting).await.map_err(|_| io::ErrorKind::TimedOut)??;
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(stream))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tower::ServiceExt as _;

    use super::{OTHERS_MAX, ServiceDial};

    /// Where nobody listens.
    async fn silent() -> std::net::SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address")
    }

    #[tokio::test]
    async fn whoever_does_not_answer_is_looked_for_where_it_was_known_to_be() {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let known = server.local_addr().expect("an address");
        let (service, gone) = (silent().await, silent().await);
        let uri = |address| format!("https://{address}/").parse::<http::Uri>().expect("a URI");
        let dial = |others: &[_], to| ServiceDial::new(others).oneshot(uri(to));
        dial(&[gone, known], service).await.expect("the second of the others answers");
        server.accept().await.expect("it was asked");
        dial(&[gone], known).await.expect("it answers itself");
        dial(&[gone], service).await.expect_err("nobody answers");
        let all = vec![known; OTHERS_MAX + 1];
        assert_eq!(ServiceDial::new(&all).others.len(), OTHERS_MAX);
    }
}
