//! The configuration as it is written, and its validation. Nothing outside [`super`] sees these types.
//!
//! `docs/configuration.md` is generated from these types ([`super::reference`]): their comments are written for who
//! writes the file, and bounds stand here once, for the validation and for the schema.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use serde::Deserialize;

use super::{
    API_VERSION, Access, Authentication, CLUSTERS_MAX, Cluster, Config, ENDPOINT_NAMES_MAX, EndpointName,
    Enrolment, KIND, LabelSelector, Mode, NAME_SERVERS_MAX, STATE_DIRECTORY, Trust,
    authentication::RawAuthentication,
    journal::RawJournal,
    kafka::RawKafka,
    limits::RawLimits,
    nri::RawNri,
    recording::RawRecording,
    roles::{self, RawRole},
    traces::RawTraces,
};
use crate::trust::cluster_signer::SIGNER_NAME;

/// Longest name of a signer, by Kubernetes' own rules.
const SIGNER_NAME_BYTES_MAX: usize = 571;

/// A value that makes no sense: where, and why.
pub(super) struct Invalid {
    pub(super) key: String,
    pub(super) problem: String,
}

pub(super) fn invalid<T>(key: impl Into<String>, problem: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid { key: key.into(), problem: problem.into() })
}

/// Port of metrics and health, unless another is configured.
pub(crate) const METRICS_PORT: u16 = 9155;

/// The configuration of a node's agent.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct AgentConfiguration {
    /// Version of this format: `weir.dev/v1alpha1`.
    #[cfg_attr(test, schemars(extend("const" = API_VERSION)))]
    api_version: String,
    /// `AgentConfiguration`.
    #[cfg_attr(test, schemars(extend("const" = KIND)))]
    kind: String,
    /// Name of the node whose pods are watched. Without it: `$NODE_NAME`, which the DaemonSet sets, else the host name.
    node: Option<String>,
    /// Tenant, in every event.
    tenant: Option<String>,
    /// Where records are kept on the node.
    #[serde(default)]
    journal: RawJournal,
    /// Where events are published, and what was published leaves the journal. Without it nothing leaves the journal.
    kafka: Option<RawKafka>,
    /// When records must be on disk, and what happens while they cannot be.
    #[serde(default)]
    recording: RawRecording,
    /// Folder of what else must outlive a reboot, an absolute path; made if absent. `api-set.json` in it has the addresses
    /// from which `weir-agent guard` and an agent that starts keep pods before they have reached a cluster.
    #[serde(default = "state_directory")]
    state_directory: PathBuf,
    /// The clusters that this node's pods act on: their own, and others. Names, addresses and host names are each of one
    /// cluster only.
    #[cfg_attr(test, schemars(length(min = 1, max = CLUSTERS_MAX)))]
    #[serde(default)]
    clusters: Vec<RawCluster>,
    /// Name servers (`IP`, `IP:PORT`, `[IPv6]:PORT`) that the agent asks for the host names of clusters: every one of them,
    /// since they may answer differently. Without any: those of the node's `/etc/resolv.conf`. Where pods can ask others
    /// (a public one, for an endpoint that is private and public), name those too.
    #[cfg_attr(test, schemars(length(max = NAME_SERVERS_MAX)))]
    #[serde(default)]
    name_servers: Vec<String>,
    /// Which pods are enrolled; the first entry that selects a pod decides. Pods that none selects are left alone.
    #[cfg_attr(test, schemars(length(min = 1)))]
    #[serde(default)]
    enrolment: Vec<RawEnrolment>,
    /// Annotations of pods that are recorded as the session's intent, such as a job's URL.
    #[serde(default)]
    intent_annotations: Vec<String>,
    /// Mount point of cgroup v2. Without it: the first one in `/proc/self/mountinfo`.
    cgroup_root: Option<PathBuf>,
    /// The container runtime's NRI, by which containers wait until their pods are enrolled. On unless turned off.
    #[serde(default)]
    nri: RawNri,
    /// Metrics and health over plain HTTP: `/metrics`, `/healthz`, `/readyz`. Without it nothing is served. `{}` serves them
    /// on the default address.
    metrics: Option<RawMetrics>,
    /// What requests wait for, as OpenTelemetry traces ([docs/traces.md](traces.md)). Without it none are made.
    traces: Option<RawTraces>,
    /// Limits of the running agent.
    #[serde(default)]
    limits: RawLimits,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct RawMetrics {
    /// Address (`IP:PORT`, `[IPv6]:PORT`) in the network namespace of the agent, which is the host's. Whoever reaches it
    /// may ask; names of pods are among the answers.
    address: SocketAddr,
}

impl Default for RawMetrics {
    fn default() -> Self {
        Self { address: (Ipv4Addr::LOCALHOST, METRICS_PORT).into() }
    }
}

impl RawMetrics {
    fn validate(self) -> Result<SocketAddr, Invalid> {
        if self.address.port() == 0 {
            return invalid("metrics.address", "has port 0; name the port to be asked at");
        }
        Ok(self.address)
    }
}

fn state_directory() -> PathBuf {
    STATE_DIRECTORY.into()
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawCluster {
    /// Name in records; unique.
    #[cfg_attr(test, schemars(length(min = 1)))]
    name: String,
    /// The agent reaches it with the service account of its own pod, at `KUBERNETES_SERVICE_HOST`. Where that does not answer (a
    /// ClusterIP needs a kube-proxy, which may wait for the agent), `addresses` and those that an agent has stored are tried:
    /// for a node's first boot set it, or `addresses`, to the API server's own address. Either this or `kubeconfig`.
    #[serde(default)]
    in_cluster: bool,
    /// The agent reaches it with this kubeconfig file. Either this or `inCluster`.
    kubeconfig: Option<PathBuf>,
    /// File of the CA (PEM) to verify its API server with. Without it: the one of `inCluster` or `kubeconfig`.
    certificate_authority: Option<PathBuf>,
    /// Addresses (`IP:PORT`, `[IPv6]:PORT`) and host names (`HOST:PORT`, such as an EKS endpoint's) beside those that the
    /// cluster publishes in `default/kubernetes`. Host names are resolved again and again, and what they once meant stays
    /// for hours.
    #[serde(default)]
    addresses: Vec<String>,
    /// Names under which pods may ask for it, beside `kubernetes.default.svc`, its shorter forms, and the host names among
    /// `addresses`.
    #[serde(default)]
    host_names: Vec<String>,
    /// Where the certificate comes from that pods are shown; exactly one of its keys.
    trust: RawTrust,
    /// Whose tokens are believed, in the shape of Kubernetes' `AuthenticationConfiguration`. See identity.md.
    authentication: Option<RawAuthentication>,
    /// File of the CA (PEM) whose client certificates are identities: the common name is the user, organizations are groups.
    client_certificate_authority: Option<PathBuf>,
    /// Who goes on as whom: the first rule that takes the caller's identity, and whose condition holds, decides; none: refused.
    /// Without this key everything goes on with the caller's own credential, for the API server to judge.
    roles: Option<Vec<RawRole>>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawTrust {
    /// `{}`: a signer of the cluster's own, where it chains to the CA that pods trust.
    cluster_signer: Option<RawClusterSigner>,
    /// A CA, or an intermediate, that chains to the one that pods trust.
    mounted_ca: Option<RawMountedCa>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawClusterSigner {
    /// The signer's name; on EKS `beta.eks.amazonaws.com/app-serving`. The approver must answer for the same one.
    #[serde(default = "kubelet_serving")]
    #[cfg_attr(test, schemars(length(min = 1, max = SIGNER_NAME_BYTES_MAX)))]
    signer_name: String,
}

fn kubelet_serving() -> String {
    SIGNER_NAME.to_owned()
}

impl RawClusterSigner {
    /// A domain and a path, as Kubernetes has them. Its own other signers give certificates of clients, or none that serve.
    fn validate(self, key: &str) -> Result<Trust, Invalid> {
        let name = self.signer_name;
        let is_domain =
            |text: &str| text.split('.').count() > 1 && text.split('.').all(|part| !part.is_empty());
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
        let (domain, path) = name.split_once('/').unwrap_or_default();
        let is_name = is_domain(domain) && !path.is_empty() && domain.chars().chain(path.chars()).all(plain);
        if !is_name || name.len() > SIGNER_NAME_BYTES_MAX {
            let problem = format!("{name:?} is no name of a signer; give one like {SIGNER_NAME}");
            return invalid(format!("{key}.clusterSigner.signerName"), problem);
        }
        if (domain == "kubernetes.io" || domain.ends_with(".kubernetes.io")) && name != SIGNER_NAME {
            let problem =
                format!("{name} signs no certificates of servers; Kubernetes has {SIGNER_NAME} for them");
            return invalid(format!("{key}.clusterSigner.signerName"), problem);
        }
        Ok(Trust::ClusterSigner { signer_name: name })
    }
}

/// `{}`: a choice without settings.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawMountedCa {
    /// File of its certificates (PEM), the issuing one first.
    certificate: PathBuf,
    /// File of its private key (PEM).
    key: PathBuf,
    /// File (PEM) of the CAs that enrolled pods are given in the place of the cluster's, which must be among them (trust tier T1: the
    /// chart's `trustBundle`). Without it: the CA must be one that pods trust as they are.
    client_bundle: Option<PathBuf>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RawEnrolment {
    // Both are required: an absent selector that meant "everything" would be one typo away.
    /// Labels of the pod's namespace; `{}` selects every namespace.
    namespace_selector: LabelSelector,
    /// Labels of the pod; `{}` selects every pod.
    pod_selector: LabelSelector,
    /// What enrolment does. Without it: `enforce`.
    mode: Option<Mode>,
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
        if !self.state_directory.is_absolute() {
            return invalid("stateDirectory", "must be an absolute path");
        }
        let recording = self.recording.validate()?;
        let kafka = self.kafka.map(RawKafka::validate).transpose()?;
        if recording.is_encrypted() && kafka.as_ref().is_some_and(|kafka| kafka.key_topic.is_none()) {
            let problem =
                "is needed with recording.encryption: without its keys nobody can read what is published";
            return invalid("kafka.keyTopic", problem);
        }
        Ok(Config {
            node: self.node.unwrap_or_else(|| default_node.to_owned()),
            tenant: self.tenant,
            journal: self.journal.validate()?,
            kafka,
            recording,
            state_directory: self.state_directory,
            clusters: clusters(self.clusters)?,
            name_servers: name_servers(&self.name_servers)?,
            enrolment: enrolment(self.enrolment)?,
            intent_annotations: self.intent_annotations,
            cgroup_root: self.cgroup_root,
            nri: self.nri.validate()?,
            metrics: self.metrics.map(RawMetrics::validate).transpose()?,
            traces: self.traces.map(RawTraces::validate).transpose()?,
            limits: self.limits.validate()?,
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
        if cluster.authentication.is_some() && cluster.roles.is_none() {
            let problem = "is there, but no `roles` that would ask who calls; name at least one rule";
            return invalid(format!("{key}.authentication"), problem);
        }
        let (addresses, endpoint_names) = endpoints(&key, &cluster.addresses)?;
        claimed_once(&key, &cluster.addresses, &cluster.host_names, &clusters)?;
        let mut host_names = cluster.host_names;
        host_names.extend(endpoint_names.iter().map(|name| name.host.clone()));
        clusters.push(Cluster {
            name: cluster.name,
            access,
            certificate_authority,
            addresses,
            endpoint_names,
            host_names,
            trust: cluster.trust.validate(&format!("{key}.trust"))?,
            authentication: match cluster.authentication {
                Some(raw) => raw.validate(&format!("{key}.authentication"))?,
                None => Authentication::default(),
            },
            client_certificate_authority: cluster
                .client_certificate_authority
                .map(|path| readable(format!("{key}.clientCertificateAuthority"), path))
                .transpose()?,
            roles: cluster.roles.map(|raw| roles::roles(&format!("{key}.roles"), raw)).transpose()?,
        });
    }
    Ok(clusters)
}

/// What stands under `addresses`.
enum Endpoint {
    Address(SocketAddr),
    Name(EndpointName),
}

fn endpoint(text: &str) -> Result<Endpoint, &'static str> {
    const NO_PORT: &str = "has no port; say `IP:PORT`, `[IPv6]:PORT` or `HOST:PORT`";
    const NEITHER: &str = "is neither an address nor a host name";
    let address = match text.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 => return Err(NO_PORT),
        Ok(address) => return Ok(Endpoint::Address(address)),
        Err(_) => text.rsplit_once(':'),
    };
    let (host, port) = address.ok_or(NO_PORT)?;
    let port = port.parse().ok().filter(|port| *port != 0).ok_or(NO_PORT)?;
    let host = plain(host);
    // A name whose last label is a number would be read as an IPv4 address (RFC 1123, 2.1).
    let ends_in_number = host.rsplit('.').next().is_some_and(|label| label.parse::<u64>().is_ok());
    match rustls::pki_types::DnsName::try_from(host.as_str()) {
        Ok(_) if !ends_in_number => Ok(Endpoint::Name(EndpointName { host, port })),
        _ => Err(NEITHER),
    }
}

/// A host name in the form in which names are compared.
fn plain(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

fn endpoints(key: &str, raw: &[String]) -> Result<(Vec<SocketAddr>, Vec<EndpointName>), Invalid> {
    let (mut addresses, mut names) = (Vec::new(), Vec::new());
    for (index, text) in raw.iter().enumerate() {
        match endpoint(text) {
            Ok(Endpoint::Address(address)) => addresses.push(address),
            Ok(Endpoint::Name(name)) => names.push(name),
            Err(problem) => {
                return invalid(format!("{key}.addresses[{index}]"), format!("{text:?} {problem}"));
            }
        }
    }
    if names.len() > ENDPOINT_NAMES_MAX {
        let problem = format!("has {} host names; at most {ENDPOINT_NAMES_MAX} are resolved", names.len());
        return invalid(format!("{key}.addresses"), problem);
    }
    Ok((addresses, names))
}

/// The port of name servers (RFC 1035, 4.2).
const DNS_PORT: u16 = 53;

fn name_servers(raw: &[String]) -> Result<Vec<SocketAddr>, Invalid> {
    if raw.len() > NAME_SERVERS_MAX {
        let problem = format!("has {} entries; at most {NAME_SERVERS_MAX} are asked", raw.len());
        return invalid("nameServers", problem);
    }
    let server = |(index, text): (usize, &String)| {
        let alone = text.parse().map(|ip: IpAddr| SocketAddr::new(ip, DNS_PORT));
        alone.or_else(|_| text.parse()).or_else(|_| {
            let problem = "is no address; say `IP` or `IP:PORT`, since names are what it is asked for";
            invalid(format!("nameServers[{index}]"), format!("{text:?} {problem}"))
        })
    };
    raw.iter().enumerate().map(server).collect()
}

/// An address or name of two clusters would leave open which of them a connection is for.
fn claimed_once(
    key: &str,
    addresses: &[String],
    host_names: &[String],
    others: &[Cluster],
) -> Result<(), Invalid> {
    let by_name = |place: String, name: &str| {
        let same = |other: &&Cluster| other.host_names.iter().any(|own| plain(own) == plain(name));
        match others.iter().find(same) {
            Some(other) => {
                let problem = format!("{name:?} is also a host name of cluster {:?}; keep one", other.name);
                invalid(place, problem)
            }
            None => Ok(()),
        }
    };
    let canonical = |address: &SocketAddr| (address.ip().to_canonical(), address.port());
    for (index, text) in addresses.iter().enumerate() {
        let place = format!("{key}.addresses[{index}]");
        match endpoint(text) {
            Ok(Endpoint::Address(address)) => {
                let same = |other: &&Cluster| {
                    other.addresses.iter().any(|own| canonical(own) == canonical(&address))
                };
                if let Some(other) = others.iter().find(same) {
                    let problem =
                        format!("{address} is also an address of cluster {:?}; keep one", other.name);
                    return invalid(place, problem);
                }
            }
            Ok(Endpoint::Name(name)) => by_name(place, &name.host)?,
            Err(_) => {}
        }
    }
    for (index, name) in host_names.iter().enumerate() {
        by_name(format!("{key}.hostNames[{index}]"), name)?;
    }
    Ok(())
}

impl RawTrust {
    fn validate(self, key: &str) -> Result<Trust, Invalid> {
        match (self.cluster_signer, self.mounted_ca) {
            (Some(signer), None) => signer.validate(key),
            (None, Some(files)) => Ok(Trust::MountedCa {
                certificate: readable(format!("{key}.mountedCa.certificate"), files.certificate)?,
                client_bundle: files
                    .client_bundle
                    .map(|path| readable(format!("{key}.mountedCa.clientBundle"), path))
                    .transpose()?,
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

pub(super) fn readable(key: String, path: PathBuf) -> Result<PathBuf, Invalid> {
    match File::open(&path) {
        Ok(_) => Ok(path),
        Err(error) => invalid(key, format!("cannot open {}: {error}; is it mounted?", path.display())),
    }
}
