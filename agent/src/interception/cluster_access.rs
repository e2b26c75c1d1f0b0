//! The agent's own way to a cluster: client, CA, and whether it answers.

use std::{path::Path, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::{config::Access, trust::ClusterCa};

/// Longest time that one call of the agent's own client may take, watches apart.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time until the agent's own client is connected.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a cluster cannot be reached at all, now or later.
#[derive(Debug, thiserror::Error)]
pub enum ClusterAccessError {
    /// The kubeconfig is unreadable or makes no sense.
    #[error("cannot use kubeconfig {path}: {message}")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong with it.
        message: String,
    },
    /// There is no service account where there should be one.
    #[error(
        "cannot use the service account of the agent's pod: {message}; is the agent running in a pod with a mounted token?"
    )]
    InCluster {
        /// What is missing.
        message: String,
    },
    /// The CA.
    #[error("cluster {cluster}: {source}")]
    Ca {
        /// The cluster's name.
        cluster: String,
        /// What is wrong with it.
        source: Box<crate::trust::TrustError>,
    },
    /// There is no CA to verify the API server with.
    #[error(
        "cluster {cluster}: no CA to verify the API server with; set certificateAuthority, or certificate-authority-data in its kubeconfig"
    )]
    NoCa {
        /// The cluster's name.
        cluster: String,
    },
    /// The client cannot be made.
    #[error("cluster {cluster}: cannot make a client: {message}")]
    Client {
        /// The cluster's name.
        cluster: String,
        /// What is wrong.
        message: String,
    },
}

/// The agent's own access to one cluster.
#[derive(Clone)]
pub struct ClusterAccess {
    /// Its client.
    pub client: Client,
    /// The CA by which its API server is verified, and that its pods hold.
    pub ca: ClusterCa,
    /// Host of its API server as the agent dials it.
    pub host: String,
}

impl ClusterAccess {
    /// Reads credentials and CA; does not connect.
    ///
    /// # Errors
    /// A file is missing or makes no sense; the error names it.
    pub async fn load(
        cluster: &str,
        access: &Access,
        ca_file: Option<&Path>,
    ) -> Result<Self, ClusterAccessError> {
        let mut config = load(access).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = None;
        let ca = ca(cluster, &config, ca_file)?;
        let host = config.cluster_url.host().unwrap_or_default().to_owned();
        let client = Client::try_from(config).map_err(|error| ClusterAccessError::Client {
            cluster: cluster.to_owned(),
            message: error.to_string(),
        })?;
        Ok(Self { client, ca, host })
    }

    /// Asks the API server for its version.
    ///
    /// # Errors
    /// It does not answer, or refuses; in words.
    pub async fn probe(&self) -> Result<String, String> {
        match tokio::time::timeout(READ_TIMEOUT, self.client.apiserver_version()).await {
            Ok(Ok(version)) => Ok(version.git_version),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", READ_TIMEOUT.as_secs())),
        }
    }
}

async fn load(access: &Access) -> Result<Config, ClusterAccessError> {
    match access {
        Access::InCluster => {
            Config::incluster().map_err(|error| ClusterAccessError::InCluster { message: error.to_string() })
        }
        Access::Kubeconfig(path) => {
            let failed = |message: String| ClusterAccessError::Kubeconfig {
                path: path.display().to_string(),
                message,
            };
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| failed(error.to_string()))?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(|error| failed(error.to_string()))
        }
    }
}

fn ca(cluster: &str, config: &Config, file: Option<&Path>) -> Result<ClusterCa, ClusterAccessError> {
    let wrap = |source| ClusterAccessError::Ca { cluster: cluster.to_owned(), source: Box::new(source) };
    if let Some(path) = file {
        let pem = std::fs::read(path)
            .map_err(|source| wrap(crate::trust::TrustError::ReadFile { path: path.to_owned(), source }))?;
        return ClusterCa::from_pem(&pem, path.display().to_string()).map_err(wrap);
    }
    let certificates = config.root_cert.as_ref().filter(|certificates| !certificates.is_empty());
    let certificates =
        certificates.ok_or_else(|| ClusterAccessError::NoCa { cluster: cluster.to_owned() })?;
    ClusterCa::from_der(certificates.iter().map(Vec::as_slice), format!("CA of cluster {cluster}"))
        .map_err(wrap)
}
