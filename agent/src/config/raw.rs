//! The configuration as it is written, and its validation. Nothing outside [`super`] sees these types.

use std::{fs::File, net::SocketAddr, path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{
    API_VERSION, Access, CLUSTERS_MAX, Cluster, Config, Enrolment, JOURNAL_BYTES_MIN, Journal, KIND,
    LabelSelector, Limits, Mode, Trust,
};

/// A value that makes no sense: where, and why.
pub(super) struct Invalid {
    pub(super) key: String,
    pub(super) problem: String,
}

fn invalid<T>(key: impl Into<String>, problem: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid { key: key.into(), problem: problem.into() })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct AgentConfiguration {
    api_version: String,
    kind: String,
    node: Option<String>,
    tenant: Option<String>,
    #[serde(default)]
    journal: RawJournal,
    #[serde(default)]
    clusters: Vec<RawCluster>,
    #[serde(default)]
    enrolment: Vec<RawEnrolment>,
    #[serde(default)]
    intent_annotations: Vec<String>,
    cgroup_root: Option<PathBuf>,
    #[serde(default)]
    limits: RawLimits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawJournal {
    directory: PathBuf,
    bytes_max: u64,
}

impl Default for RawJournal {
    fn default() -> Self {
        Self { directory: "/var/lib/weir/journal".into(), bytes_max: 8 * 1024 * 1024 * 1024 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawCluster {
    name: String,
    #[serde(default)]
    in_cluster: bool,
    kubeconfig: Option<PathBuf>,
    certificate_authority: Option<PathBuf>,
    #[serde(default)]
    addresses: Vec<SocketAddr>,
    #[serde(default)]
    host_names: Vec<String>,
    trust: RawTrust,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawTrust {
    cluster_signer: Option<Nothing>,
    mounted_ca: Option<RawMountedCa>,
}

/// `{}`: a choice without settings.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawMountedCa {
    certificate: PathBuf,
    key: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawEnrolment {
    // Both are required: an absent selector that meant "everything" would be one typo away.
    namespace_selector: LabelSelector,
    pod_selector: LabelSelector,
    mode: Option<Mode>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawLimits {
    drain_seconds: u64,
    response_bytes_max: usize,
    session_idle_timeout_seconds: u64,
}

impl Default for RawLimits {
    fn default() -> Self {
        Self { drain_seconds: 30, response_bytes_max: 1024 * 1024, session_idle_timeout_seconds: 1800 }
    }
}

impl AgentConfiguration {
    pub(super) fn validate(self, default_node: &str) -> Result<Config, Invalid> {
        if self.api_version != API_VERSION {
            return invalid(
                "apiVersion",
                format!("is {:?}; this agent reads {API_VERSION:?}", self.api_version),
            );
        }
        if self.kind != KIND {
            return invalid("kind", format!("is {:?}; it must be {KIND:?}", self.kind));
        }
        if !self.journal.directory.is_absolute() {
            return invalid("journal.directory", "must be an absolute path");
        }
        if self.journal.bytes_max < JOURNAL_BYTES_MIN {
            return invalid("journal.bytesMax", format!("must be at least {JOURNAL_BYTES_MIN}"));
        }
        Ok(Config {
            node: self.node.unwrap_or_else(|| default_node.to_owned()),
            tenant: self.tenant,
            journal: Journal { directory: self.journal.directory, bytes_max: self.journal.bytes_max },
            clusters: clusters(self.clusters)?,
            enrolment: enrolment(self.enrolment)?,
            intent_annotations: self.intent_annotations,
            cgroup_root: self.cgroup_root,
            limits: self.limits.validate()?,
        })
    }
}

impl RawLimits {
    fn validate(self) -> Result<Limits, Invalid> {
        if self.drain_seconds > 3600 {
            return invalid("limits.drainSeconds", "must be at most 3600");
        }
        if self.session_idle_timeout_seconds == 0 {
            return invalid("limits.sessionIdleTimeoutSeconds", "must be at least 1");
        }
        Ok(Limits {
            drain: Duration::from_secs(self.drain_seconds),
            response_bytes_max: self.response_bytes_max,
            session_idle_timeout: Duration::from_secs(self.session_idle_timeout_seconds),
        })
    }
}

fn clusters(raw: Vec<RawCluster>) -> Result<Vec<Cluster>, Invalid> {
    if raw.is_empty() {
        return invalid("clusters", "is empty; name at least the cluster that this node belongs to");
    }
    if raw.len() > CLUSTERS_MAX {
        return invalid("clusters", format!("has {} entries; at most {CLUSTERS_MAX} are served", raw.len()));
    }
    let mut clusters: Vec<Cluster> = Vec::with_capacity(raw.len());
    for (index, cluster) in raw.into_iter().enumerate() {
        let key = format!("clusters[{index}]");
        if cluster.name.is_empty() || clusters.iter().any(|other| other.name == cluster.name) {
            return invalid(format!("{key}.name"), "must be there and be unique");
        }
        let access = match (cluster.in_cluster, cluster.kubeconfig) {
            (true, None) => Access::InCluster,
            (false, Some(path)) => Access::Kubeconfig(readable(format!("{key}.kubeconfig"), path)?),
            _ => return invalid(key, "say either `inCluster: true` or `kubeconfig: FILE`"),
        };
        let certificate_authority = cluster
            .certificate_authority
            .map(|path| readable(format!("{key}.certificateAuthority"), path))
            .transpose()?;
        clusters.push(Cluster {
            name: cluster.name,
            access,
            certificate_authority,
            addresses: cluster.addresses,
            host_names: cluster.host_names,
            trust: cluster.trust.validate(&format!("{key}.trust"))?,
        });
    }
    Ok(clusters)
}

impl RawTrust {
    fn validate(self, key: &str) -> Result<Trust, Invalid> {
        match (self.cluster_signer, self.mounted_ca) {
            (Some(Nothing {}), None) => Ok(Trust::ClusterSigner),
            (None, Some(files)) => Ok(Trust::MountedCa {
                certificate: readable(format!("{key}.mountedCa.certificate"), files.certificate)?,
                key: readable(format!("{key}.mountedCa.key"), files.key)?,
            }),
            _ => {
                invalid(key, "say either `clusterSigner: {}` or `mountedCa: {certificate: FILE, key: FILE}`")
            }
        }
    }
}

fn enrolment(raw: Vec<RawEnrolment>) -> Result<Vec<Enrolment>, Invalid> {
    if raw.is_empty() {
        return invalid("enrolment", "is empty, so no pod would be enrolled; name at least one selector");
    }
    raw.into_iter()
        .enumerate()
        .map(|(index, entry)| {
            for (name, selector) in
                [("namespaceSelector", &entry.namespace_selector), ("podSelector", &entry.pod_selector)]
            {
                if let Some((path, problem)) = selector.problem() {
                    return invalid(format!("enrolment[{index}].{name}.{path}"), problem);
                }
            }
            Ok(Enrolment {
                namespaces: entry.namespace_selector,
                pods: entry.pod_selector,
                mode: entry.mode.unwrap_or(Mode::Enforce),
            })
        })
        .collect()
}

fn readable(key: String, path: PathBuf) -> Result<PathBuf, Invalid> {
    match File::open(&path) {
        Ok(_) => Ok(path),
        Err(error) => invalid(key, format!("cannot open {}: {error}; is it mounted?", path.display())),
    }
}
