//! Which connection to the API server a request takes.
//!
//! HTTP/2 connections are shared by all callers (every request carries its own credential); HTTP/1.1 connections
//! belong to one client connection, so that no caller can leave bytes in front of another's. The list of shared
//! connections is read without a lock; only opening a new one waits, behind one gate.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use arc_swap::ArcSwap;
use http::Response;
use hyper::body::Incoming;

use super::upstream::{Dialler, Fresh, Http1, Http2, Outgoing, STREAMS_MAX, UpstreamError};

/// Most shared connections to one cluster; with [`STREAMS_MAX`] it bounds what runs at once.
const SHARED_CONNECTIONS_MAX: usize = 256;
/// Most idle HTTP/1.1 connections that one client connection keeps.
const PRIVATE_IDLE_MAX: usize = 4;
/// How often a request is sent at most: a second time where the first cannot have been acted on.
const ATTEMPTS_MAX: usize = 2;

/// A shared HTTP/2 connection.
#[derive(Debug)]
struct Shared {
    sender: Http2,
    streams: AtomicUsize,
    /// A request on it has failed: it takes no more, whatever hyper still thinks of it.
    failed: AtomicBool,
}

impl Shared {
    fn is_usable(&self) -> bool {
        !self.failed.load(Ordering::Relaxed) && !self.sender.is_closed()
    }

    fn take(self: &Arc<Self>) -> Option<Stream> {
        let within = |streams: usize| (streams < STREAMS_MAX).then_some(streams + 1);
        let taken = self.is_usable()
            && self.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok();
        taken.then(|| Stream(Arc::clone(self)))
    }
}

/// A stream's place on a shared connection; given back on drop.
#[derive(Debug)]
pub(super) struct Stream(Arc<Shared>);

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Idle HTTP/1.1 connections of one client connection.
#[derive(Debug, Default)]
pub(super) struct Private(Mutex<Vec<Http1>>);

impl Private {
    fn take(&self) -> Option<Http1> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|sender| !sender.is_closed());
        idle.pop()
    }

    fn put(&self, sender: Http1) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < PRIVATE_IDLE_MAX && !sender.is_closed() {
            idle.push(sender);
        }
    }
}

/// What an answer holds of its connection until its body has ended. Dropped early, an HTTP/1.1 connection is closed.
#[derive(Debug)]
pub(super) enum Lease {
    /// A stream of a shared connection.
    Shared(#[expect(dead_code, reason = "held for its drop")] Stream),
    /// A connection of the client connection's own, and where it goes back to.
    Private(Http1, Arc<Private>),
    /// A connection for one upgrade.
    Dedicated(#[expect(dead_code, reason = "keeps the connection open")] Http1),
}

impl Lease {
    /// The answer was read to its end.
    pub(super) fn finish(self) {
        if let Self::Private(sender, home) = self {
            home.put(sender);
        }
    }
}

/// A connection that was chosen for a request, and whether it was in use before.
enum Chosen {
    Shared { sender: Http2, stream: Stream, reused: bool },
    Private { sender: Http1, reused: bool },
}

/// The connections to one cluster.
#[derive(Debug)]
pub(super) struct Pool {
    dialler: Dialler,
    shared: ArcSwap<Vec<Arc<Shared>>>,
    /// Held while a shared connection is opened; keeps when and why that failed last.
    opening: tokio::sync::Mutex<Option<(Instant, Arc<UpstreamError>)>>,
    http1_only: AtomicBool,
}

impl Pool {
    pub(super) fn new(dialler: Dialler) -> Self {
        Self {
            dialler,
            shared: ArcSwap::default(),
            opening: tokio::sync::Mutex::new(None),
            http1_only: AtomicBool::new(false),
        }
    }

    /// Forgets the shared connections; they end with their streams.
    pub(super) fn clear(&self) {
        self.shared.store(Arc::default());
    }

    /// Sends an ordinary request and waits for the head of its answer.
    pub(super) async fn send(
        &self,
        original: SocketAddr,
        private: &Arc<Private>,
        outgoing: &Outgoing,
    ) -> Result<(Response<Incoming>, Lease), UpstreamError> {
        let mut attempt = 1;
        loop {
            let (reused, unsent, error) = match self.choose(original, private, attempt > 1).await? {
                Chosen::Shared { mut sender, stream, reused } => {
                    match sender.try_send_request(outgoing.for_http2()).await {
                        Ok(response) => return Ok((response, Lease::Shared(stream))),
                        Err(mut failed) => {
                            stream.0.failed.store(true, Ordering::Relaxed);
                            (reused, failed.take_message().is_some(), failed.into_error())
                        }
                    }
                }
                Chosen::Private { mut sender, reused } => {
                    match sender.try_send_request(outgoing.for_http1()).await {
                        Ok(response) => return Ok((response, Lease::Private(sender, Arc::clone(private)))),
                        Err(mut failed) => (reused, failed.take_message().is_some(), failed.into_error()),
                    }
                }
            };
            let again = unsent || was_not_processed(&error) || (reused && outgoing.is_read());
            if !again || attempt == ATTEMPTS_MAX {
                return Err(UpstreamError::Http(error));
            }
            attempt += 1;
        }
    }

    /// Sends a request that asks for an upgrade, on a connection of its own.
    pub(super) async fn send_upgrade(
        &self,
        original: SocketAddr,
        outgoing: &Outgoing,
    ) -> Result<(Response<Incoming>, Lease), UpstreamError> {
        let mut sender = self.dialler.dial_http1(original).await?;
        let response = sender.send_request(outgoing.for_http1()).await.map_err(UpstreamError::Http)?;
        Ok((response, Lease::Dedicated(sender)))
    }

    async fn choose(
        &self,
        original: SocketAddr,
        private: &Arc<Private>,
        again: bool,
    ) -> Result<Chosen, UpstreamError> {
        // A second attempt takes no idle HTTP/1.1 connection: they are all of the same age.
        let reused = if again { self.reuse_shared() } else { self.reuse(private).await };
        if let Some(chosen) = reused {
            return Ok(chosen);
        }
        if self.http1_only.load(Ordering::Relaxed) {
            return self.open(original).await;
        }
        // One opens, the others wait for what it opened, or for its failure: were each to try for itself, one after
        // the other, a silent API server would keep the last of them waiting for all their timeouts together.
        let since = Instant::now();
        let mut last = self.opening.lock().await;
        if let Some(chosen) = self.reuse_shared() {
            return Ok(chosen);
        }
        if let Some((failed, error)) = last.as_ref()
            && *failed >= since
        {
            return Err(UpstreamError::SameAsBefore(Arc::clone(error)));
        }
        match self.open(original).await {
            Ok(chosen) => Ok(chosen),
            Err(error) => {
                let error = Arc::new(error);
                *last = Some((Instant::now(), Arc::clone(&error)));
                Err(UpstreamError::SameAsBefore(error))
            }
        }
    }

    async fn reuse(&self, private: &Private) -> Option<Chosen> {
        if let Some(chosen) = self.reuse_shared() {
            return Some(chosen);
        }
        while let Some(mut sender) = private.take() {
            if sender.ready().await.is_ok() {
                return Some(Chosen::Private { sender, reused: true });
            }
        }
        None
    }

    fn reuse_shared(&self) -> Option<Chosen> {
        let list = self.shared.load();
        list.iter().find_map(|shared| {
            let stream = shared.take()?;
            Some(Chosen::Shared { sender: shared.sender.clone(), stream, reused: true })
        })
    }

    async fn open(&self, original: SocketAddr) -> Result<Chosen, UpstreamError> {
        let sender = match self.dialler.dial(original).await? {
            Fresh::Http1(sender) => {
                self.http1_only.store(true, Ordering::Relaxed);
                return Ok(Chosen::Private { sender, reused: false });
            }
            Fresh::Http2(sender) => sender,
        };
        self.http1_only.store(false, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            sender: sender.clone(),
            streams: AtomicUsize::new(1),
            failed: AtomicBool::new(false),
        });
        let stream = Stream(Arc::clone(&shared));
        let mut full = false;
        self.shared.rcu(|list| {
            let mut list: Vec<_> = list.iter().filter(|shared| shared.is_usable()).cloned().collect();
            full = list.len() >= SHARED_CONNECTIONS_MAX;
            if !full {
                list.push(Arc::clone(&shared));
            }
            list
        });
        if full {
            return Err(UpstreamError::Exhausted);
        }
        Ok(Chosen::Shared { sender, stream, reused: false })
    }
}

/// Whether HTTP/2 itself says that the API server did not act on the request (RFC 9113 §8.7): its stream came after
/// the last one of an orderly GOAWAY, or was refused. The API server sends these when it restarts and, with
/// `--goaway-chance`, at random.
fn was_not_processed(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(http2) = cause.downcast_ref::<h2::Error>() {
            let orderly_goaway =
                http2.is_go_away() && http2.is_remote() && http2.reason() == Some(h2::Reason::NO_ERROR);
            let refused =
                http2.is_reset() && http2.is_remote() && http2.reason() == Some(h2::Reason::REFUSED_STREAM);
            return orderly_goaway || refused;
        }
        source = cause.source();
    }
    false
}
