//! Certificates that pods trust as they are: who signs (authority), how they are kept fresh (leaf).

use std::sync::Arc;

/// What the proxy needs of trust: a TLS server configuration for the cluster that the client dialled, with
/// ALPN `h2` and `http/1.1`, whose certificate is renewed behind it.
#[derive(Clone, Debug)]
pub struct ServingCertificate {
    current: Arc<arc_swap::ArcSwap<rustls::ServerConfig>>,
}

impl ServingCertificate {
    /// Wraps the first configuration.
    pub fn new(config: Arc<rustls::ServerConfig>) -> Self {
        Self { current: Arc::new(arc_swap::ArcSwap::new(config)) }
    }

    /// The configuration for the next handshake.
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        self.current.load_full()
    }

    /// Puts a renewed certificate in place; running connections keep theirs.
    pub fn replace(&self, config: Arc<rustls::ServerConfig>) {
        self.current.store(config);
    }
}
