//! Whether an address is an API server of a cluster: it shows a certificate of the cluster's CA for the name by which it
//! was found. Whoever forges an answer of a name server cannot forge that; who only passes it on is a way to the API
//! server as well.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, sync::watch, time::timeout};
use tokio_rustls::TlsConnector;

use crate::config::EndpointName;

/// Longest time until an address has given its proof; meanwhile it is held for an API server's.
const PROOF_TIMEOUT: Duration = Duration::from_secs(2);

/// TLS that trusts a cluster's CA alone.
pub type Proof = Arc<rustls::ClientConfig>;

/// Asks an address for the proof; returns the address with the answer. Waits for the cluster's CA if need be.
pub(super) async fn given(
    mut proof: watch::Receiver<Option<Proof>>,
    name: EndpointName,
    address: SocketAddr,
) -> (SocketAddr, bool) {
    let Some(tls) = proof.wait_for(Option::is_some).await.ok().and_then(|tls| tls.clone()) else {
        return (address, false);
    };
    let shown = async {
        let server_name = ServerName::try_from(name.host.clone()).map_err(std::io::Error::other)?;
        let stream = TcpStream::connect(address).await?;
        TlsConnector::from(tls).connect(server_name, stream).await
    };
    let proven = match timeout(PROOF_TIMEOUT, shown).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", PROOF_TIMEOUT.as_secs())),
    };
    match &proven {
        Ok(()) => {
            tracing::info!(event = "address-proven", %name, %address, "an address of this name is in the API set from now on")
        }
        Err(why) => {
            tracing::warn!(event = "address-not-proven", %name, %address, why, "an answer named an address that is none of this name's")
        }
    }
    (address, proven.is_ok())
}
