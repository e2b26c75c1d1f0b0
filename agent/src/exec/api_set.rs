//! The API servers that a command may reach: each distinct server of its kubeconfig is one cluster of the session.
//!
//! Entries that name the same host and port are one server. A server that cannot be recorded faithfully is
//! refused here, with the mend, before anything is started. Resolving names is the only thing done over the wire.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use super::{
    kubeconfig::{ClientIdentity, Kubeconfig, Server, UserEntry, Verification},
    proxy_environment,
};

/// How long a name may take to resolve.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(5);
/// Most addresses of one server.
const ADDRESSES_MAX: usize = 64;
/// How to get rid of what the command does not need.
const MINIFY: &str = "keep only the context that the command needs: kubectl config view --minify --flatten \
     --context=NAME > FILE, and give it with --kubeconfig FILE";

/// Why a server cannot be in the API set.
#[derive(Debug, thiserror::Error)]
pub enum ApiSetError {
    /// `proxy-url` in the kubeconfig.
    #[error(
        "cluster {cluster:?} has a proxy-url, which would carry its traffic past Weir; remove it if the API server \
         can be reached directly, or {MINIFY}"
    )]
    ProxyUrl {
        /// The cluster entry.
        cluster: String,
    },
    /// `HTTPS_PROXY` and the like.
    #[error(
        "{variable} would carry the traffic of {host} past Weir; unset it, or except the host: \
         NO_PROXY={host}${{NO_PROXY:+,$NO_PROXY}}"
    )]
    ProxyEnvironment {
        /// The variable.
        variable: &'static str,
        /// The API server's host.
        host: String,
    },
    /// The current context's server speaks plain HTTP.
    #[error(
        "cluster {cluster:?} is at http://, where Weir cannot tell callers apart; use its https:// address"
    )]
    PlainHttp {
        /// The cluster entry.
        cluster: String,
    },
    /// Which client certificate belongs to which request could not be told.
    #[error(
        "several users ({users}) are used with the API server {host}, and some by client certificate; Weir presents \
         one certificate only: {MINIFY}"
    )]
    SeveralUsers {
        /// Names of the users.
        users: String,
        /// The API server's host.
        host: String,
    },
    /// A client certificate or key cannot be used.
    #[error("user {user:?}: {problem}")]
    Identity {
        /// The user entry.
        user: String,
        /// What is wrong.
        problem: String,
    },
    /// Entries for one server do not agree.
    #[error(
        "the clusters {clusters} name the same API server {host} but do not verify it in the same way; {MINIFY}"
    )]
    Disagree {
        /// Names of the entries.
        clusters: String,
        /// The API server's host.
        host: String,
    },
    /// The current context's server cannot be resolved.
    #[error("cannot resolve {host}, the API server of cluster {cluster:?}; is the network up?")]
    Resolve {
        /// The API server's host.
        host: String,
        /// The cluster entry.
        cluster: String,
        /// Why.
        source: std::io::Error,
    },
}

/// One API server.
#[derive(Clone)]
pub struct Target {
    /// Names of its cluster entries; the first names it in records.
    pub clusters: Vec<String>,
    /// Where it is.
    pub server: Server,
    /// The name (or address) that its certificate is verified for.
    pub server_name: String,
    /// How it is verified.
    pub verification: Verification,
    /// The client certificate with which the command's user authenticates, if it is one.
    pub identity: Option<ClientIdentity>,
    /// Whether the current context uses it: then it must work.
    pub current: bool,
}

impl Target {
    /// The name of its cluster in records.
    pub fn name(&self) -> &str {
        self.clusters.first().map_or("", String::as_str)
    }

    /// Looks its host up.
    ///
    /// # Errors
    /// It cannot be resolved in time.
    pub async fn resolve(&self) -> std::io::Result<BTreeSet<SocketAddr>> {
        let lookup = tokio::net::lookup_host((self.server.host.as_str(), self.server.port));
        let found = tokio::time::timeout(RESOLVE_DEADLINE, lookup).await.map_err(std::io::Error::from)??;
        Ok(found.take(ADDRESSES_MAX).collect())
    }

    /// The error for a current server that cannot be resolved.
    pub fn unresolved(&self, source: std::io::Error) -> ApiSetError {
        ApiSetError::Resolve { host: self.server.host.clone(), cluster: self.name().to_owned(), source }
    }
}

/// The servers that `kubeconfig` names, the current context's first; `environment` is the command's.
///
/// # Errors
/// One of them could be reached past Weir, or not be recorded faithfully.
pub fn targets(
    kubeconfig: &Kubeconfig,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Target>, ApiSetError> {
    let current = kubeconfig.current().map(|context| context.cluster.as_str());
    let mut targets: Vec<Target> = Vec::new();
    for cluster in &kubeconfig.clusters {
        if cluster.proxy_url.is_some() {
            return Err(ApiSetError::ProxyUrl { cluster: cluster.name.clone() });
        }
        if let Some(carried) = proxy_environment::carried(&cluster.server, &environment) {
            return Err(ApiSetError::ProxyEnvironment { variable: carried.variable, host: carried.host });
        }
        let is_current = current == Some(cluster.name.as_str());
        if !cluster.server.tls && is_current {
            return Err(ApiSetError::PlainHttp { cluster: cluster.name.clone() });
        }
        let server_name = cluster.tls_server_name.clone().unwrap_or_else(|| cluster.server.host.clone());
        if let Some(known) = targets.iter_mut().find(|known| known.server == cluster.server) {
            if known.server_name != server_name || known.verification != cluster.verification {
                return Err(ApiSetError::Disagree {
                    clusters: format!("{}, {}", known.clusters.join(", "), cluster.name),
                    host: cluster.server.host.clone(),
                });
            }
            known.clusters.push(cluster.name.clone());
            continue;
        }
        targets.push(Target {
            clusters: vec![cluster.name.clone()],
            server: cluster.server.clone(),
            server_name,
            verification: cluster.verification.clone(),
            identity: None,
            current: is_current,
        });
    }
    for target in &mut targets {
        let names: Vec<_> = target.clusters.iter().map(String::as_str).collect();
        target.identity = identity(&kubeconfig.users_of(&names), &target.server)?;
    }
    Ok(targets)
}

/// The one client certificate that is used with `server`, if any is.
fn identity(users: &[&UserEntry], server: &Server) -> Result<Option<ClientIdentity>, ApiSetError> {
    let Some(user) = users.iter().find(|user| user.identity.is_some()) else { return Ok(None) };
    if users.iter().any(|other| other.identity != user.identity) {
        let users: Vec<_> = users.iter().map(|user| user.name.as_str()).collect();
        return Err(ApiSetError::SeveralUsers { users: users.join(", "), host: server.host.clone() });
    }
    if let Some(Err(problem)) = user.identity.as_ref().map(ClientIdentity::parse) {
        return Err(ApiSetError::Identity { user: user.name.clone(), problem });
    }
    Ok(user.identity.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(content: &str, environment: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("config");
        std::fs::write(&path, content).expect("write");
        let kubeconfig = Kubeconfig::load(&[path]).expect("loads");
        let value = |name: &str| {
            environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        targets(&kubeconfig, value)
            .map(|targets| {
                let show = |target: &Target| {
                    let current = if target.current { "*" } else { "" };
                    format!(
                        "{current}{} {} {}",
                        target.clusters.join("+"),
                        target.server.host,
                        target.server_name
                    )
                };
                targets.iter().map(show).collect()
            })
            .map_err(|error| error.to_string())
    }

    const TWO: &str = "
current-context: b
clusters:
- {name: a, cluster: {server: 'https://a.example'}}
- {name: b, cluster: {server: 'https://b.example:6443', tls-server-name: kubernetes}}
- {name: again, cluster: {server: 'https://A.example:443/'}}
contexts:
- {name: b, context: {cluster: b, user: u}}
users:
- {name: u, user: {token: t}}
";

    #[test]
    fn entries_for_one_server_are_one_cluster() {
        let shown = check(TWO, &[]).expect("usable");
        assert_eq!(shown, ["*b b.example kubernetes", "a+again a.example a.example"]);
    }

    #[test]
    fn proxies_are_refused_by_name() {
        let error = check(TWO, &[("HTTPS_PROXY", "p"), ("NO_PROXY", "b.example")]).expect_err("refused");
        assert!(error.starts_with("HTTPS_PROXY would carry the traffic of a.example"), "{error}");
        assert!(error.ends_with("NO_PROXY=a.example${NO_PROXY:+,$NO_PROXY}"), "{error}");
        let error = check(&TWO.replace("tls-server-name: kubernetes", "proxy-url: 'socks5://p'"), &[]);
        assert!(error.expect_err("refused").starts_with("cluster \"b\" has a proxy-url"));
    }

    #[test]
    fn plain_http_is_refused_for_the_current_context() {
        let error = check(&TWO.replace("https://b", "http://b"), &[]).expect_err("refused");
        assert!(error.starts_with("cluster \"b\" is at http://"), "{error}");
    }

    #[test]
    fn entries_for_one_server_must_agree() {
        let insecure = "'https://A.example:443/', insecure-skip-tls-verify: true";
        let error = check(&TWO.replace("'https://A.example:443/'", insecure), &[]).expect_err("refused");
        assert!(error.starts_with("the clusters a, again name the same API server a.example"), "{error}");
    }

    #[test]
    fn a_client_certificate_must_be_the_only_way_to_log_in() {
        let certificate = "client-certificate-data: eA==, client-key-data: eA==";
        let error = check(&TWO.replace("token: t", certificate), &[]).expect_err("refused");
        assert_eq!(error, "user \"u\": its client certificate is not PEM");
        let both = TWO
            .replace("token: t}}", &format!("{certificate}}}}}\n- {{name: other, user: {{token: t}}}}"))
            .replace("contexts:", "contexts:\n- {name: c, context: {cluster: b, user: other}}");
        let error = check(&both, &[]).expect_err("refused");
        assert!(
            error.starts_with("several users (u, other) are used with the API server b.example"),
            "{error}"
        );
    }
}
