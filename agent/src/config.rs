//! The configuration file: raw (serde, unknown keys refused) → validated, once.
//!
//! [`Config::load`] is the only way in. Errors name the file, the path in it and the mend. Files that the
//! configuration names are checked to exist here; what they hold is checked by who uses them ([`crate::trust`]).

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

pub use authentication::{AUDIENCES_MAX, Authentication, Documents, ISSUERS_MAX, JwtIssuer, RULES_MAX};
pub use kafka::{Kafka, OAuth};
pub use recording::Recording;
pub use roles::Role;
pub use selector::LabelSelector;
pub use source::Source;
pub use traces::{CollectorEndpoint, Traces};

use weir_common::kms::endpoint::{PlainEndpoint, check_environment};

use crate::recording::PodQuota;

mod authentication;
#[cfg(test)]
mod authentication_tests;
pub mod aws_role;
mod journal;
mod kafka;
mod limits;
mod nri;
mod raw;
mod recording;
#[cfg(test)]
mod reference;
pub mod roles;
mod selector;
pub mod shown;
pub mod source;
mod traces;

pub(crate) use self::raw::METRICS_PORT;

/// The `apiVersion` that this agent reads.
pub const API_VERSION: &str = "weir.dev/v1alpha1";
/// The `kind` of the agent's configuration.
pub const KIND: &str = "AgentConfiguration";
/// Longest configuration file that is read, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 1024 * 1024;
/// Most clusters in one configuration.
pub const CLUSTERS_MAX: usize = 64;
/// Folder of what must outlive a reboot, where the configuration names none.
pub const STATE_DIRECTORY: &str = "/var/lib/weir";
/// Most host names among the addresses of one cluster: each is resolved again and again.
pub const ENDPOINT_NAMES_MAX: usize = 16;
/// Most name servers: every one is asked for every host name.
pub const NAME_SERVERS_MAX: usize = 8;
/// Least size of a journal: below it a few requests would fill it.
pub const JOURNAL_BYTES_MIN: u64 = 64 * 1024 * 1024;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {}; does it exist, and may the agent read it?", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is longer than [`CONFIG_BYTES_MAX`].
    #[error("configuration {} has {bytes} bytes, more than the {CONFIG_BYTES_MAX} that are read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Not YAML, an unknown key, or a value of the wrong type. The message has the place.
    #[error("configuration {}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser says: key path, line, column, expected keys.
        message: String,
    },
    /// A variable that leads the SDK of AWS to an address where others read what is sent.
    #[error("environment: {0}")]
    Environment(PlainEndpoint),
    /// A value that has the right type but makes no sense.
    #[error("configuration {}: {key}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Path of the key, for example `clusters[0].trust`.
        key: String,
        /// What is wrong and how to mend it.
        problem: String,
    },
}

/// The validated configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the node whose pods are watched.
    pub node: String,
    /// Tenant, in every event.
    pub tenant: Option<String>,
    /// The journal.
    pub journal: Journal,
    /// Where events are published; nowhere if absent, and the journal keeps everything then.
    pub kafka: Option<Kafka>,
    /// When records must be on disk.
    pub recording: Recording,
    /// Folder of what else must outlive a reboot: the API set; made if absent.
    pub state_directory: PathBuf,
    /// The clusters, in the order of their indices.
    pub clusters: Vec<Cluster>,
    /// Who is asked for the host names of clusters; empty: those of `/etc/resolv.conf`.
    pub name_servers: Vec<SocketAddr>,
    /// Which pods are enrolled; the first entry that selects a pod decides.
    pub enrolment: Vec<Enrolment>,
    /// Annotations of pods that are recorded as the session's intent.
    pub intent_annotations: Vec<String>,
    /// Mount point of cgroup v2; found in `/proc/self/mountinfo` if absent.
    pub cgroup_root: Option<PathBuf>,
    /// The container runtime's NRI socket, by which containers wait until their pods are enrolled; none: they do not.
    pub nri: Option<PathBuf>,
    /// Where metrics and health are served; nowhere if absent.
    pub metrics: Option<SocketAddr>,
    /// Where traces of requests are sent; nowhere if absent.
    pub traces: Option<Traces>,
    /// Limits.
    pub limits: Limits,
}

/// Where the journal is and how large it may be.
#[derive(Clone, Debug)]
pub struct Journal {
    /// Folder; made if absent.
    pub directory: PathBuf,
    /// Most bytes of all its segments together.
    pub bytes_max: u64,
    /// Keys that sign its checkpoints; without any each run makes its own.
    pub signing_key_files: Vec<PathBuf>,
    /// Time between checkpoints while nothing is recorded.
    pub idle_checkpoint_interval: Duration,
}

/// A cluster that pods of this node act on.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Name in records.
    pub name: String,
    /// The agent's own access to it.
    pub access: Access,
    /// CA file to verify its API server with; absent: the one of `access`.
    pub certificate_authority: Option<PathBuf>,
    /// Addresses beside those that the cluster itself publishes (`default/kubernetes`).
    pub addresses: Vec<SocketAddr>,
    /// Host names whose addresses, whatever they are at the time, are further ones.
    pub endpoint_names: Vec<EndpointName>,
    /// Names under which pods may ask for it, beside `kubernetes.default.svc` and its shorter forms; those of
    /// `endpoint_names` are among them.
    pub host_names: Vec<String>,
    /// Where the serving certificate comes from.
    pub trust: Trust,
    /// Who is believed when they say who calls.
    pub authentication: Authentication,
    /// Who signs the certificates by which clients are known; none: they are not asked for one.
    pub client_certificate_authority: Option<PathBuf>,
    /// Who goes on as whom; none: everybody as they are.
    pub roles: Option<Vec<Role>>,
}

/// A host name and port where an API server is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointName {
    /// In lower case, without a dot at its end.
    pub host: String,
    /// Port, never 0.
    pub port: u16,
}

impl fmt::Display for EndpointName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.host, self.port)
    }
}

/// How the agent itself reaches a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// The service account of the agent's own pod.
    InCluster,
    /// A kubeconfig file.
    Kubeconfig(PathBuf),
}

/// Where serving certificates come from that pods trust: as they are (tier T0), or by a bundle that they are given (T1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// A signer of the cluster's own.
    ClusterSigner {
        /// Its name.
        signer_name: String,
    },
    /// A CA (or intermediate) that chains to the pods' CA bundle, mounted as files.
    MountedCa {
        /// PEM certificates, the issuing one first.
        certificate: PathBuf,
        /// PEM private key.
        key: PathBuf,
        /// PEM certificates that pods are given in the place of the cluster's CA (tier T1).
        client_bundle: Option<PathBuf>,
    },
}

/// Which pods, and what happens to them.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Labels of the pod's namespace.
    pub namespaces: LabelSelector,
    /// Labels of the pod.
    pub pods: LabelSelector,
    /// Enforce or only observe.
    pub mode: Mode,
}

/// What enrolment does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Mode {
    /// Redirect; no way around.
    Enforce,
    /// Count and report what would be redirected.
    Observe,
}

/// Limits of the running agent.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long open requests and streams may go on after SIGTERM.
    pub drain: Duration,
    /// Most bytes of a read's response that are recorded, per request; beyond it length and digest.
    pub response_bytes_max: usize,
    /// A session ends after this time without a request.
    pub session_idle_timeout: Duration,
    /// What one pod may have recorded.
    pub pod_quota: PodQuota,
}

impl Config {
    /// Reads and validates the file at `path`; `default_node` is used where the file names no node.
    ///
    /// # Errors
    /// [`ConfigError`], with the place in the file and the mend.
    pub fn load(path: &Path, default_node: &str) -> Result<Self, ConfigError> {
        check_environment(std::env::vars_os()).map_err(ConfigError::Environment)?;
        Self::parse(path, &read(path)?, default_node)
    }

    /// Validates `text`, which came from `path`.
    ///
    /// # Errors
    /// See [`Self::load`].
    pub fn parse(path: &Path, text: &str, default_node: &str) -> Result<Self, ConfigError> {
        let raw: raw::AgentConfiguration = serde_yaml_ng::from_str(text)
            .map_err(|error| ConfigError::Syntax { path: path.to_owned(), message: error.to_string() })?;
        raw.validate(default_node).map_err(|invalid| ConfigError::Value {
            path: path.to_owned(),
            key: invalid.key,
            problem: invalid.problem,
        })
    }
}

/// The text of the file at `path`.
fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > CONFIG_BYTES_MAX {
        return Err(ConfigError::TooLong { path: path.to_owned(), bytes });
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// The name of this node where the configuration has none: `$NODE_NAME` (set by the DaemonSet from
/// `spec.nodeName`), else the host name.
pub fn default_node() -> String {
    std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| {
        nix::unistd::gethostname()
            .map_or_else(|_| "unknown".to_owned(), |name| name.to_string_lossy().into_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use expect_test::{Expect, expect};

    use super::{Config, Mode, Trust};

    const WHOLE: &str = "
apiVersion: weir.dev/v1alpha1
kind: AgentConfiguration
node: node-1
tenant: acme
nameServers: [198.51.100.53, '[2001:db8::53]:5353']
journal: {directory: /var/lib/weir/journal, bytesMax: 1073741824}
clusters:
- name: production
  inCluster: true
  addresses: ['10.96.0.1:443', '[fd00::1]:443', 'ABC.eks.example.test.:443']
  hostNames: [api.example.test]
  trust: {clusterSigner: {}}
enrolment:
- namespaceSelector: {matchLabels: {weir.dev/enrol: 'true'}}
  podSelector: {matchExpressions: [{key: role, operator: NotIn, values: [system]}]}
  mode: observe
intentAnnotations: [ci.example/job-url]
nri: {socket: /run/nri/nri.sock}
metrics: {address: '127.0.0.1:9155'}
limits: {drainSeconds: 10, responseBytesMax: 4096, sessionIdleTimeoutSeconds: 60}
";

    #[track_caller]
    fn refused(text: &str, expected: Expect) {
        let error = Config::parse(Path::new("weir.yaml"), text, "here").expect_err("is refused");
        expected.assert_eq(&error.to_string());
    }

    #[test]
    fn a_whole_configuration_is_read() {
        let config = Config::parse(Path::new("weir.yaml"), WHOLE, "here").expect("is valid");
        assert_eq!((config.node.as_str(), config.tenant.as_deref()), ("node-1", Some("acme")));
        assert_eq!(config.clusters[0].addresses.len(), 2);
        let names: Vec<_> = config.clusters[0].endpoint_names.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["abc.eks.example.test:443"]);
        assert_eq!(config.clusters[0].host_names, ["api.example.test", "abc.eks.example.test"]);
        let servers = ["198.51.100.53:53", "[2001:db8::53]:5353"];
        assert_eq!(config.name_servers, servers.map(|server| server.parse().expect("an address")));
        assert_eq!(config.enrolment[0].mode, Mode::Observe);
        assert_eq!(config.metrics, Some(([127, 0, 0, 1], 9155).into()));
        assert_eq!(config.nri.as_deref(), Some(Path::new("/run/nri/nri.sock")));
        assert_eq!(config.limits.drain.as_secs(), 10);
    }

    #[test]
    fn what_is_left_out_has_the_documented_default() {
        let text = "apiVersion: weir.dev/v1alpha1\nkind: AgentConfiguration\nclusters: [{name: a, inCluster: true, trust: {clusterSigner: {}}}]\nenrolment: [{podSelector: {}, namespaceSelector: {}}]";
        let config = Config::parse(Path::new("weir.yaml"), text, "here").expect("is valid");
        assert_eq!(config.node, "here");
        assert_eq!(config.journal.directory, Path::new("/var/lib/weir/journal"));
        assert_eq!(config.state_directory, Path::new("/var/lib/weir"));
        assert_eq!(config.enrolment[0].mode, Mode::Enforce);
        assert_eq!(config.metrics, None);
        assert_eq!(config.nri.as_deref(), Some(Path::new("/var/run/nri/nri.sock")));
        let off = Config::parse(Path::new("weir.yaml"), &format!("{text}\nnri: {{enabled: false}}"), "here");
        assert_eq!(off.expect("is valid").nri, None);
        let text = format!("{text}\nmetrics: {{}}");
        let config = Config::parse(Path::new("weir.yaml"), &text, "here").expect("is valid");
        assert_eq!(config.metrics, Some(([127, 0, 0, 1], 9155).into()));
    }

    #[test]
    fn an_unknown_key_is_named() {
        refused(
            &WHOLE.replace("tenant", "tenent"),
            expect![
                "configuration weir.yaml: unknown field `tenent`, expected one of `apiVersion`, `kind`, `node`, `tenant`, `journal`, `kafka`, `recording`, `stateDirectory`, `clusters`, `nameServers`, `enrolment`, `intentAnnotations`, `cgroupRoot`, `nri`, `metrics`, `traces`, `limits` at line 5 column 1"
            ],
        );
    }

    #[test]
    fn what_is_published_encrypted_needs_a_topic_for_its_keys() {
        let encrypted = "tenant: acme\nrecording: {encryption: {recipientFiles: [/a]}}\nkafka: {brokers: ['k:9092'], topic: t";
        refused(
            &WHOLE.replace("tenant: acme", &format!("{encrypted}}}")),
            expect![
                "configuration weir.yaml: kafka.keyTopic: is needed with recording.encryption: without its keys nobody can read what is published"
            ],
        );
        let whole = WHOLE.replace("tenant: acme", &format!("{encrypted}, keyTopic: keys}}"));
        Config::parse(Path::new("weir.yaml"), &whole, "here").expect("is valid");
    }

    #[test]
    fn folders_that_depend_on_where_the_agent_is_started_are_refused() {
        refused(
            &WHOLE.replace("tenant: acme", "stateDirectory: state"),
            expect!["configuration weir.yaml: stateDirectory: must be an absolute path"],
        );
        refused(
            &WHOLE.replace("/run/nri/nri.sock", "nri.sock"),
            expect!["configuration weir.yaml: nri.socket: must be an absolute path"],
        );
    }

    #[test]
    fn a_wrong_type_is_named() {
        refused(
            &WHOLE.replace("drainSeconds: 10", "drainSeconds: soon"),
            expect![[
                r#"configuration weir.yaml: limits.drainSeconds: invalid type: string "soon", expected u64 at line 21 column 24"#
            ]],
        );
    }

    #[test]
    fn another_version_is_refused() {
        refused(
            &WHOLE.replace("v1alpha1", "v9"),
            expect![
                "configuration weir.yaml: apiVersion: is \"weir.dev/v9\"; this agent reads \"weir.dev/v1alpha1\""
            ],
        );
    }

    #[test]
    fn a_cluster_needs_exactly_one_kind_of_access() {
        refused(
            &WHOLE.replace("  inCluster: true\n", ""),
            expect![
                "configuration weir.yaml: clusters[0]: say either `inCluster: true` or `kubeconfig: FILE`"
            ],
        );
    }

    #[test]
    fn another_signer_is_named_and_one_that_signs_no_servers_is_refused() {
        let with = |name: &str| {
            WHOLE.replace("{clusterSigner: {}}", &format!("{{clusterSigner: {{signerName: {name}}}}}"))
        };
        let signer = |text: &str| {
            Config::parse("weir.yaml".as_ref(), text, "node").map(|config| config.clusters[0].trust.clone())
        };
        let named = |name: &str| Trust::ClusterSigner { signer_name: name.to_owned() };
        assert_eq!(signer(WHOLE).expect("is valid"), named("kubernetes.io/kubelet-serving"));
        let of_eks = "beta.eks.amazonaws.com/app-serving";
        assert_eq!(signer(&with(of_eks)).expect("is valid"), named(of_eks));
        refused(
            &with("kubernetes.io/kube-apiserver-client"),
            expect![
                "configuration weir.yaml: clusters[0].trust.clusterSigner.signerName: kubernetes.io/kube-apiserver-client signs no certificates of servers; Kubernetes has kubernetes.io/kubelet-serving for them"
            ],
        );
        for wrong in ["kubelet-serving", "'/a'", "'a.b/'", "a/b", "a.b/c'd", "A.b/c", "'a..b/c'", "a.b/c/d"] {
            assert!(signer(&with(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_missing_ca_is_named_with_its_path() {
        refused(
            &WHOLE.replace(
                "{clusterSigner: {}}",
                "{mountedCa: {certificate: /nowhere/ca.crt, key: /nowhere/ca.key}}",
            ),
            expect![
                "configuration weir.yaml: clusters[0].trust.mountedCa.certificate: cannot open /nowhere/ca.crt: No such file or directory (os error 2); is it mounted?"
            ],
        );
    }

    #[test]
    fn metrics_on_no_port_are_refused_because_nobody_would_find_them() {
        refused(
            &WHOLE.replace("127.0.0.1:9155", "127.0.0.1:0"),
            expect!["configuration weir.yaml: metrics.address: has port 0; name the port to be asked at"],
        );
    }

    #[test]
    fn two_clusters_with_one_address_or_name_are_refused_by_name() {
        let second = |own: &str| {
            let cluster = format!(
                "- {{name: staging, inCluster: true, trust: {{clusterSigner: {{}}}}, {own}}}\nenrolment:"
            );
            WHOLE.replace("enrolment:", &cluster)
        };
        refused(
            &second("addresses: ['10.0.0.9:443', '[::ffff:10.96.0.1]:443']"),
            expect![[
                r#"configuration weir.yaml: clusters[1].addresses[1]: [::ffff:10.96.0.1]:443 is also an address of cluster "production"; keep one"#
            ]],
        );
        refused(
            &second("hostNames: [API.example.test.]"),
            expect![[
                r#"configuration weir.yaml: clusters[1].hostNames[0]: "API.example.test." is also a host name of cluster "production"; keep one"#
            ]],
        );
        refused(
            &second("addresses: ['abc.EKS.example.test:6443']"),
            expect![[
                r#"configuration weir.yaml: clusters[1].addresses[0]: "abc.eks.example.test" is also a host name of cluster "production"; keep one"#
            ]],
        );
        refused(
            &second("hostNames: [abc.eks.example.test]"),
            expect![[
                r#"configuration weir.yaml: clusters[1].hostNames[0]: "abc.eks.example.test" is also a host name of cluster "production"; keep one"#
            ]],
        );
        Config::parse(Path::new("weir.yaml"), &second("addresses: ['10.96.0.1:6443']"), "here")
            .expect("other port");
    }

    #[test]
    fn what_is_neither_an_address_nor_a_host_name_is_refused_by_name() {
        for (address, why) in [
            ("api.example.test", "has no port; say `IP:PORT`, `[IPv6]:PORT` or `HOST:PORT`"),
            ("api.example.test:0", "has no port; say `IP:PORT`, `[IPv6]:PORT` or `HOST:PORT`"),
            ("10.0.0.1", "has no port; say `IP:PORT`, `[IPv6]:PORT` or `HOST:PORT`"),
            ("https://api.example.test:443", "is neither an address nor a host name"),
            ("fd00::1:443", "is neither an address nor a host name"),
            ("10.0.0.300:443", "is neither an address nor a host name"),
        ] {
            let text = WHOLE.replace("ABC.eks.example.test.:443", address);
            let error = Config::parse(Path::new("weir.yaml"), &text, "here").expect_err("is refused");
            let expected = format!("configuration weir.yaml: clusters[0].addresses[2]: {address:?} {why}");
            assert_eq!(error.to_string(), expected);
        }
        refused(
            &WHOLE.replace("198.51.100.53", "dns.example.test"),
            expect![[
                r#"configuration weir.yaml: nameServers[0]: "dns.example.test" is no address; say `IP` or `IP:PORT`, since names are what it is asked for"#
            ]],
        );
    }

    #[test]
    fn an_empty_enrolment_is_refused_because_it_would_enrol_nobody() {
        let cut = WHOLE.find("enrolment:").expect("is there");
        refused(
            &WHOLE[..cut],
            expect![
                "configuration weir.yaml: enrolment: is empty, so no pod would be enrolled; name at least one selector"
            ],
        );
    }

    #[test]
    fn a_selector_that_kubernetes_would_refuse_is_refused() {
        refused(
            &WHOLE.replace("operator: NotIn, values: [system]", "operator: Exists, values: [system]"),
            expect![
                "configuration weir.yaml: enrolment[0].podSelector.matchExpressions[0].values: must be empty for Exists and DoesNotExist"
            ],
        );
    }
}
