//! Whether each cluster's API server can be reached, and under which trust tier its clients would be served.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::{Check, Need, chain};
use crate::{
    app::cluster::Derived,
    auth::{OWN_EXTRA_PREFIX, OWN_EXTRAS, claims::CREDENTIAL_ID},
    config::{
        Cluster, Config, Trust,
        roles::{Action, Impersonate, Role},
    },
    exec::{
        api_set::{self, Target},
        invoker::Invoker,
        kubeconfig::{self, Kubeconfig, Verification},
        upstream,
    },
    interception::{
        cluster_access::ClusterAccess,
        cluster_watch::{self, API_SET_READ},
    },
    trust::{
        Authority,
        authority::{EphemeralCa, MountedCa},
        cluster_signer::ClusterSigner,
    },
};

/// How long an API server may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long it may take to say which addresses are its own.
const API_SET_DEADLINE: Duration = Duration::from_secs(10);

/// The clusters of `run`.
pub async fn configured(config: &Config) -> Vec<Check> {
    let mut checks = Vec::new();
    for cluster in &config.clusters {
        let name = format!("cluster {}", cluster.name);
        let loaded =
            ClusterAccess::load(&cluster.name, &cluster.access, cluster.certificate_authority.as_deref())
                .await;
        let access = match loaded {
            Ok(access) => access,
            Err(error) => {
                checks.push(Check::failed(name, Need::Must, &error));
                continue;
            }
        };
        match access.probe().await {
            Ok(version) => checks.push(Check::good(name, Need::Must, format!("{}, {version}", access.host))),
            Err(problem) => {
                let mend = if problem.contains("invalid peer certificate") {
                    "is the CA of the kubeconfig (in a pod: of its service account) that of this API server, and the host one that its \
                     certificate names?"
                } else {
                    "is the API server up, and may the agent's service account log in?"
                };
                checks.push(Check::bad(name, Need::Must, format!("{}: {problem}", access.host), mend));
            }
        }
        checks.extend(impersonation_of(cluster, &access).await);
        checks.extend(reviews_of(cluster, &access).await);
        checks.push(trust_of(cluster, access, &config.node).await);
    }
    checks
}

/// Whether the agent may impersonate every key of an extra attribute that the cluster's rules map to; none where no rule
/// impersonates. RBAC has no wildcard for them, and one that is missing shows only when a request with it is refused.
async fn impersonation_of(cluster: &Cluster, access: &ClusterAccess) -> Option<Check> {
    let keys = extra_keys(cluster)?;
    let name = format!("impersonation {}", cluster.name);
    let mut missing = Vec::new();
    for key in &keys {
        match access.may_impersonate_extra(key).await {
            Ok(true) => {}
            Ok(false) => missing.push(format!("userextras/{key}")),
            Err(problem) => {
                let mend = "may the agent's service account create selfsubjectaccessreviews?";
                return Some(Check::bad(name, Need::Must, format!("{key}: {problem}"), mend));
            }
        }
    }
    Some(if missing.is_empty() {
        Check::good(name, Need::Must, format!("{} keys of extra attributes", keys.len()))
    } else {
        let mend =
            "allow the agent's ClusterRole the verb impersonate on them, in the group authentication.k8s.io";
        Check::bad(name, Need::Must, format!("not allowed: {}", missing.join(", ")), mend)
    })
}

/// Whether the agent may ask whom a mapped user may impersonate; none where no rule lets clients impersonate.
async fn reviews_of(cluster: &Cluster, access: &ClusterAccess) -> Option<Check> {
    let lets =
        |role: &Role| role.allow_impersonation.is_some() && matches!(role.action, Action::Impersonate(_));
    cluster.roles.iter().flatten().find(|role| lets(role))?;
    let name = format!("impersonation by clients {}", cluster.name);
    let mend = "allow the agent's ClusterRole the verb create on subjectaccessreviews, in the group authorization.k8s.io";
    Some(match access.may_review_access().await {
        Ok(true) => Check::good(name, Need::Must, "the agent can ask whom a mapped user may impersonate"),
        Ok(false) => Check::bad(name, Need::Must, "not allowed: create subjectaccessreviews", mend),
        Err(problem) => Check::bad(name, Need::Must, problem, mend),
    })
}

/// Keys that users may have whom the agent impersonates, Weir's own among them.
fn extra_keys(cluster: &Cluster) -> Option<BTreeSet<String>> {
    let mappings: Vec<&Impersonate> = cluster
        .roles
        .iter()
        .flatten()
        .filter_map(|role| match &role.action {
            Action::Impersonate(mapping) => Some(mapping.as_ref()),
            _ => None,
        })
        .collect();
    if mappings.is_empty() {
        return None;
    }
    let mut keys: BTreeSet<String> = OWN_EXTRAS.map(|name| format!("{OWN_EXTRA_PREFIX}{name}")).into();
    for mapping in mappings {
        keys.extend(mapping.extra.keys().cloned());
        // Without another name, the user keeps what its token's issuer says of it.
        if mapping.user.is_none() && !cluster.authentication.jwt.is_empty() {
            keys.insert(CREDENTIAL_ID.to_owned());
            let mapped = cluster.authentication.jwt.iter().flat_map(|issuer| &issuer.mappings.extra);
            keys.extend(mapped.map(|(key, _)| key.clone()));
        }
    }
    Some(keys)
}

/// Asks the authority for a certificate, as the agent would: for the same names.
async fn trust_of(cluster: &Cluster, access: ClusterAccess, node: &str) -> Check {
    let name = format!("trust {}", cluster.name);
    let client = access.client.clone();
    let authority = match &cluster.trust {
        Trust::MountedCa { certificate, key, client_bundle } => {
            let files = (certificate.as_path(), key.as_path());
            MountedCa::load(files, client_bundle.as_deref(), access.ca).map(Authority::Mounted)
        }
        Trust::ClusterSigner { signer_name } => {
            let signer = ClusterSigner::new(access.client, node, access.ca, signer_name.clone());
            Ok(Authority::ClusterSigner(signer))
        }
    };
    let authority = match authority {
        Ok(authority) => authority,
        Err(error) => return Check::failed(name, Need::Must, &error),
    };
    let published = match timeout(API_SET_DEADLINE, cluster_watch::read_api_set(&client)).await {
        Ok(Ok(published)) if published.is_whole() => Ok(published),
        Ok(Ok(_)) => Err("one of them names none".to_owned()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_elapsed) => Err(format!("no answer within {} s", API_SET_DEADLINE.as_secs())),
    };
    // A signer may know the API server by some of them only.
    let names = match published {
        Ok(published) => Derived::new(cluster).names(&published),
        Err(problem) => {
            let found = format!("the certificate's names are not known: {problem}");
            return Check::bad(name, Need::Must, found, format!("the agent waits for {API_SET_READ}"));
        }
    };
    match authority.issue(&names, None).await.map(|_leaf| authority) {
        Ok(authority) => {
            let found = format!("tier {}: {}", authority.tier().name(), authority.describe());
            Check::good(name, Need::Must, found)
        }
        Err(error) => Check::failed(name, Need::Must, &error),
    }
}

/// The clusters of a kubeconfig, for `exec`.
pub async fn of_kubeconfig(
    flag: Option<&Path>,
    invoker: &Invoker,
    environment: impl Fn(&str) -> Option<String>,
) -> Vec<Check> {
    let paths = kubeconfig::paths(flag, environment("KUBECONFIG").as_deref(), &invoker.home);
    let kubeconfig = match invoker.with_rights(|| Kubeconfig::load(&paths)) {
        Ok(Ok(kubeconfig)) => kubeconfig,
        Ok(Err(error)) => return vec![Check::failed("kubeconfig", Need::Must, &error)],
        Err(error) => return vec![Check::failed("kubeconfig", Need::Must, &error)],
    };
    let mut checks = Vec::new();
    let targets = match api_set::targets(&kubeconfig, environment) {
        Ok(targets) => targets,
        Err(error) => return vec![Check::failed("kubeconfig", Need::Must, &error)],
    };
    checks.push(match kubeconfig.current() {
        Some(context) => Check::good("kubeconfig", Need::Must, format!("context {}", context.name)),
        None => Check::bad(
            "kubeconfig",
            Need::Should,
            "no current context",
            "kubectl config use-context NAME, or the command names one itself",
        ),
    });
    for target in &targets {
        checks.push(reach(target).await);
    }
    checks.push(match EphemeralCa::generate() {
        Ok(_) => Check::good("trust", Need::Must, "tier ephemeral: a CA that lives as long as the command"),
        Err(error) => Check::failed("trust", Need::Must, &error),
    });
    checks
}

async fn reach(target: &Target) -> Check {
    let need = if target.current { Need::Must } else { Need::Should };
    let name = format!("cluster {}", target.name());
    let server = format!("{}:{}", target.server.host, target.server.port);
    if !target.server.tls {
        return Check::bad(name, need, format!("{server} speaks plain HTTP"), "use its https:// address");
    }
    match handshake(target).await {
        Ok(()) if target.verification == Verification::Nothing => {
            let mend = "replace insecure-skip-tls-verify by the cluster's certificate-authority-data";
            Check::bad(name, Need::Should, format!("{server} answers, unverified"), mend)
        }
        Ok(()) => Check::good(name, need, format!("{server} answers, verified")),
        Err(problem) => {
            let mend = "is the API server up and reachable, and is certificate-authority-data its CA?";
            Check::bad(name, need, format!("{server}: {problem}"), mend)
        }
    }
}

async fn handshake(target: &Target) -> Result<(), String> {
    let connector = TlsConnector::from(Arc::clone(&upstream::tls(target).map_err(|error| chain(&error))?));
    let name = ServerName::try_from(target.server_name.clone()).map_err(|error| error.to_string())?;
    let connected = async {
        let stream = TcpStream::connect((target.server.host.as_str(), target.server.port)).await?;
        connector.connect(name, stream).await
    };
    match timeout(CONNECT_DEADLINE, connected).await {
        Ok(Ok(_stream)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err(format!("no answer within {} s", CONNECT_DEADLINE.as_secs())),
    }
}
