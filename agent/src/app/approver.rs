//! `weir-agent approver`: the wiring of what approves the agents' certificates. It runs once for a cluster, with a service account
//! of its own; it needs nothing of a node, and no configuration, which names files that only agents have.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use tokio_util::sync::CancellationToken;

use super::{AppError, Signals};
use crate::{
    config::{Access, METRICS_PORT},
    interception::{
        cluster_access::{ClusterAccess, ClusterAccessError},
        cluster_watch,
    },
    telemetry::server,
    trust::{
        ServingNames,
        approvals::Approvals,
        approver::{self, ApproverError},
    },
};

/// What user names of service accounts begin with.
const ACCOUNT_PREFIX: &str = "system:serviceaccount:";

/// What the approver is told.
#[derive(Debug)]
pub struct ApproverOptions {
    /// The agents' service account, NAMESPACE/NAME.
    pub service_account: String,
    /// The signer whose requests are answered.
    pub signer: String,
    /// Hosts that a certificate may name beside what the cluster publishes.
    pub names: Vec<String>,
    /// How the cluster is reached; none: as from one of its pods.
    pub kubeconfig: Option<PathBuf>,
    /// Where metrics and health are served; none: nowhere.
    pub metrics: Option<SocketAddr>,
}

/// Reads the address of [`ApproverOptions::metrics`]: `IP:PORT`, or an IP alone, as a pod knows its own.
///
/// # Errors
/// It is neither.
pub fn metrics_address(text: &str) -> Result<SocketAddr, String> {
    let address =
        text.parse::<SocketAddr>().or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, METRICS_PORT).into()));
    match address {
        Ok(address) if address.port() != 0 => Ok(address),
        _ => Err("give an IP address, or IP:PORT ([IPv6]:PORT)".to_owned()),
    }
}

/// Why there is no approver.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not NAMESPACE/NAME.
    #[error("{given:?} is no service account; give it as NAMESPACE/NAME")]
    ServiceAccount {
        /// What was given.
        given: String,
    },
    /// Credentials or CA.
    #[error(transparent)]
    Access(#[from] ClusterAccessError),
    /// A right is missing.
    #[error("{problem}; may the approver's service account approve signers/{signer} (certificates.k8s.io)?")]
    NotAllowed {
        /// What was found.
        problem: String,
        /// Whose requests.
        signer: String,
    },
    /// It cannot begin.
    #[error(transparent)]
    Approver(#[from] ApproverError),
    /// Signals.
    #[error(transparent)]
    App(#[from] AppError),
}

/// Answers the agents' requests until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start: a credential or a right is missing.
pub async fn run(options: &ApproverOptions) -> Result<(), Error> {
    let mut signals = Signals::new()?;
    let approvals = Arc::new(Approvals::default());
    let serving = async {
        match options.metrics {
            // Nobody ends it but this function, by its own end.
            Some(address) => server::serve(address, approvals.clone(), CancellationToken::new()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        never = answer(options, &approvals) => match never? {},
        () = serving => {}
        signal = signals.next() => tracing::info!(event = "approver-ends", signal, "ends"),
    }
    Ok(())
}

/// Answers the agents' requests for ever.
async fn answer(options: &ApproverOptions, approvals: &Approvals) -> Result<Infallible, Error> {
    let agent = user(&options.service_account)?;
    let access = options.kubeconfig.clone().map_or(Access::InCluster, Access::Kubeconfig);
    let access = ClusterAccess::load("local", &access, None).await?;
    let signer = options.signer.clone();
    match access.may_approve(&signer).await {
        Ok(true) => {}
        Ok(false) => {
            let problem = "requests could not be answered".to_owned();
            return Err(Error::NotAllowed { problem, signer });
        }
        Err(problem) => return Err(Error::NotAllowed { problem, signer }),
    }
    let names = async || {
        let set = cluster_watch::read_api_set(&access.client).await;
        let set = set.map_err(|error| format!("cannot read where the API server is: {error}"))?;
        let addresses = set.service.iter().chain(&set.endpoints).map(SocketAddr::ip);
        let mut names = ServingNames::of_own_cluster(addresses);
        for host in &options.names {
            names.add_host(host);
        }
        Ok(names)
    };
    Ok(approver::run(access.client.clone(), (&agent, &signer), names, approvals).await?)
}

/// The user that a service account is.
fn user(service_account: &str) -> Result<String, Error> {
    match service_account.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(format!("{ACCOUNT_PREFIX}{namespace}:{name}"))
        }
        _ => Err(Error::ServiceAccount { given: service_account.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::{metrics_address, user};

    #[test]
    fn metrics_are_served_where_the_pod_is_or_at_a_port_of_ones_own() {
        let read = |text| metrics_address(text).map(|address| address.to_string());
        assert_eq!(read("10.0.0.1"), Ok("10.0.0.1:9155".to_owned()));
        assert_eq!(read("fd00::1"), Ok("[fd00::1]:9155".to_owned()));
        assert_eq!(read("[fd00::1]:80"), Ok("[fd00::1]:80".to_owned()));
        for wrong in ["", "10.0.0.1:0", "localhost", ":9155", "10.0.0.1:99999"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_service_account_is_given_with_its_namespace() {
        let agent = user("weir-system/weir-agent").expect("is one");
        assert_eq!(agent, "system:serviceaccount:weir-system:weir-agent");
        for wrong in ["weir-agent", "/weir-agent", "weir-system/", "a/b/c", ""] {
            assert!(user(wrong).expect_err("is none").to_string().contains("NAMESPACE/NAME"), "{wrong}");
        }
    }
}
