//! The gateway itself: TLS, HTTP, upstream; one accepted connection in, recorded requests out.
//!
//! Knows nothing of the kernel: the caller of a connection arrives with it.

use std::{net::SocketAddr, sync::Arc};

use weir_common::event::Caller;

/// A connection whose caller is known. Made by the interception, consumed by the proxy.
#[derive(Debug)]
pub struct Accepted {
    /// The connection, before TLS.
    pub stream: tokio::net::TcpStream,
    /// The address that the client dialled; decides the cluster, with SNI and Host only checked against it.
    pub original_destination: SocketAddr,
    /// Index of the cluster that address belongs to.
    pub cluster: usize,
    /// Who connected.
    pub caller: Arc<Caller>,
}
