//! `weir-agent explain`: which issuer, claims and rule would apply to a token or a pod, and why; nothing is changed.
//!
//! It decides by the same code as the agent, with the configuration as it is in the file.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use serde::Serialize;
use weir_common::{
    attributes::Attributes,
    event::{ActsAs, Caller, Identity, Pod, UserInfo},
};

use crate::{
    app,
    auth::{Asked, Considered, Origin, Question},
    aws::Aws,
    config::{self, Config, ConfigError},
    interception::{
        cluster_access::{ClusterAccess, ClusterAccessError},
        pod_lookup::{self, PodLookupError},
    },
    proxy::Labels,
};

/// Longest token file, in bytes.
const TOKEN_BYTES_MAX: u64 = 1024 * 1024;

/// What to explain.
#[derive(Clone, Debug)]
pub struct ExplainOptions {
    /// The agent's configuration.
    pub config: PathBuf,
    /// The cluster; the first of the configuration if absent.
    pub cluster: Option<String>,
    /// File with a bearer token.
    pub token: Option<PathBuf>,
    /// The pod that asks, `NAMESPACE/NAME`; the one that the token names if absent.
    pub pod: Option<String>,
    /// What it asks: method, a space, path and query.
    pub request: String,
}

/// Why nothing can be explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No such cluster.
    #[error("the configuration has no cluster {name:?}; it has {known}")]
    UnknownCluster {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// No pod and no token.
    #[error("say who asks: --token FILE, --pod NAMESPACE/NAME, or both")]
    Nobody,
    /// A request that is none.
    #[error("{text:?} is no request; say it as `GET /api/v1/pods`")]
    Request {
        /// What was given.
        text: String,
    },
    /// The token cannot be read.
    #[error("cannot read the token in {}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The token cannot be sent.
    #[error("what stands in {} is no token: it has bytes that no header can hold, or too many", path.display())]
    NoToken {
        /// The file.
        path: PathBuf,
    },
    /// The agent's own access to the cluster.
    #[error(transparent)]
    Access(#[from] ClusterAccessError),
    /// The issuers.
    #[error(transparent)]
    Policy(#[from] app::AppError),
    /// The pod.
    #[error(transparent)]
    Pod(#[from] PodLookupError),
}

/// What would happen.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The cluster.
    pub cluster: String,
    /// The request.
    pub request: String,
    /// What it means.
    pub attributes: Attributes,
    /// The pod, where one was named.
    pub pod: Option<Pod>,
    /// Who it would be for.
    pub identity: Option<Identity>,
    /// The rules that were looked at, in order, and what they said.
    pub rules: Vec<Considered>,
    /// What the caller would be told; none if the request went on.
    pub refused: Option<String>,
}

/// Decides as the agent would.
///
/// # Errors
/// The configuration, the token or the pod cannot be read.
pub async fn run(options: &ExplainOptions) -> Result<Explanation, ExplainError> {
    if options.token.is_none() && options.pod.is_none() {
        return Err(ExplainError::Nobody);
    }
    let config = Config::load(&options.config, &config::default_node())?;
    let cluster = match &options.cluster {
        None => config.clusters.first(),
        Some(name) => config.clusters.iter().find(|cluster| cluster.name == *name),
    };
    let Some(cluster) = cluster else {
        let known: Vec<_> = config.clusters.iter().map(|cluster| cluster.name.as_str()).collect();
        let name = options.cluster.clone().unwrap_or_default();
        return Err(ExplainError::UnknownCluster { name, known: known.join(", ") });
    };
    let malformed = || ExplainError::Request { text: options.request.clone() };
    let (method, target) = options.request.split_once(' ').ok_or_else(malformed)?;
    let uri: http::Uri = target.trim().parse().map_err(|_| malformed())?;
    let headers = headers(options.token.as_deref())?;

    let load = |cluster: &config::Cluster| {
        let (name, access, ca) =
            (cluster.name.clone(), cluster.access.clone(), cluster.certificate_authority.clone());
        async move { ClusterAccess::load(&name, &access, ca.as_deref()).await }
    };
    let access = load(cluster).await?;
    // Pods are those of the node's own cluster, whichever they talk to.
    let home = load(&config.clusters[0]).await?;
    // A service account's token says which pod it belongs to: without another one, that one asks.
    let named = options.pod.clone().or_else(|| pod_of_token(&headers));
    let (pod, labels) = match &named {
        None => (None, Labels::default()),
        Some(pod) => {
            let (pod, labels) = pod_lookup::describe(home.client, pod).await?;
            (Some(pod), labels)
        }
    };
    let policy = app::cluster::policy(&config.node, cluster, &access, (None, Aws::new()))?;
    let caller = Arc::new(Caller { pod: pod.clone(), ..Caller::default() });
    let origin = Origin::new(&cluster.name, caller, &labels);
    let attributes = Attributes::parse(method, uri.path(), uri.query());
    let question = Question { method, path: uri.path(), attributes: &attributes };
    let asked = Asked { headers: &headers, question, origin: &origin, certificate: None };
    let (decision, rules) = policy.explain(&asked).await;
    Ok(Explanation {
        cluster: cluster.name.clone(),
        request: options.request.clone(),
        attributes,
        pod,
        identity: decision.identity,
        rules,
        refused: decision.onward.err().map(|refused| refused.to_string()),
    })
}

fn headers(token: Option<&Path>) -> Result<HeaderMap, ExplainError> {
    let mut headers = HeaderMap::new();
    let Some(path) = token else { return Ok(headers) };
    let failed = |source| ExplainError::Token { path: path.to_owned(), source };
    let none = || ExplainError::NoToken { path: path.to_owned() };
    if std::fs::metadata(path).map_err(failed)?.len() > TOKEN_BYTES_MAX {
        return Err(none());
    }
    let token = zeroize::Zeroizing::new(std::fs::read_to_string(path).map_err(failed)?);
    let value = zeroize::Zeroizing::new(format!("Bearer {}", token.trim()));
    let mut value = HeaderValue::from_str(&value).map_err(|_| none())?;
    value.set_sensitive(true);
    headers.insert(AUTHORIZATION, value);
    Ok(headers)
}

/// The pod that a bound service account token names, whether the token holds or not.
fn pod_of_token(headers: &HeaderMap) -> Option<String> {
    let token = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&payload).ok()?;
    let bound = &claims["kubernetes.io"];
    Some(format!("{}/{}", bound["namespace"].as_str()?, bound["pod"]["name"].as_str()?))
}

impl fmt::Display for Explanation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &str| writeln!(formatter, "{name:<11} {value}");
        line("cluster", &self.cluster)?;
        line("request", &self.request)?;
        if let Some(pod) = &self.pod {
            let account = &pod.service_account;
            line("pod", &format!("{}/{} (uid {}, account {account})", pod.namespace, pod.name, pod.uid))?;
        }
        match &self.identity {
            None => line("identity", "not established")?,
            Some(identity) => {
                let method = serde_json::to_value(identity.method).unwrap_or_default();
                line("identity", method.as_str().unwrap_or_default())?;
                if let Some(issuer) = &identity.issuer {
                    line("issuer", issuer)?;
                }
                user(&mut line, &identity.user)?;
            }
        }
        for rule in &self.rules {
            line("rule", &rule.to_string())?;
        }
        if let Some(refused) = &self.refused {
            return line("refused", refused);
        }
        match self.identity.as_ref().and_then(|identity| identity.acts_as.as_ref()) {
            None | Some(ActsAs::PassThrough) => line("goes on", "with the caller's own credential"),
            Some(ActsAs::Impersonate { user: mapped }) => {
                line("goes on", "impersonated by the agent, as")?;
                user(&mut line, mapped)
            }
            Some(ActsAs::Role { arn, by }) => line("goes on", &format!("in {arn} ({by})")),
        }
    }
}

fn user(line: &mut impl FnMut(&str, &str) -> fmt::Result, user: &UserInfo) -> fmt::Result {
    line("  user", &user.username)?;
    if !user.uid.is_empty() {
        line("  uid", &user.uid)?;
    }
    if !user.groups.is_empty() {
        line("  groups", &user.groups.join(", "))?;
    }
    for (key, values) in &user.extra {
        line("  extra", &format!("{key}={}", values.join(", ")))?;
    }
    Ok(())
}
