//! What the API server says: this node's pods, and the addresses that are the API server.
//!
//! Two reflectors (pods of this node, namespaces) are joined into one table of [`KnownPod`]s; a third and fourth
//! (Service and EndpointSlices of `default/kubernetes`) give the API set, a fifth (Nodes) the machines. All are published through watch channels.
//! Losing a watch keeps the last state: nothing that was denied becomes allowed because the API server is away.
//! A pod that somebody names before the watch does is asked for ([`pod_lookup`]) and joins the others.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use futures::{Stream, StreamExt as _, stream};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::ListParams,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::sync::{mpsc, watch};

use super::{
    hosts::{self, Host, Hosts},
    pod::PodUid,
    pod_lookup::{self, NamedPod},
};
use crate::{
    config::{Enrolment, Mode},
    proxy::Labels,
};

/// A pod of this node as the API server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPod {
    /// UID.
    pub uid: PodUid,
    /// For a static pod: the hash by which the kubelet names its cgroup, which is not the mirror pod's UID.
    pub static_hash: Option<PodUid>,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Service account.
    pub service_account: String,
    /// First IP address, once there is one.
    pub ip: Option<IpAddr>,
    /// Whether it shares the host's network namespace.
    pub host_network: bool,
    /// Container ids (without `containerd://`) and their names, as far as the status has them.
    pub containers: BTreeMap<String, String>,
    /// Configured annotations.
    pub intent: BTreeMap<String, String>,
    /// Labels, its own and its namespace's.
    pub labels: Arc<Labels>,
    /// What is to be done with it; none: not selected.
    pub mode: Option<Mode>,
}

/// All pods of this node, by the UID that their cgroup bears; none until both lists have been read once, so that
/// "not in the list" can be told from "not known yet".
pub type KnownPods = Option<Arc<HashMap<PodUid, Arc<KnownPod>>>>;

/// What is watched, and how it is judged.
#[derive(Clone)]
pub struct ClusterWatch {
    /// The agent's own client.
    pub client: Client,
    /// This node.
    pub node: String,
    /// Who is selected.
    pub enrolment: watch::Receiver<Arc<[Enrolment]>>,
    /// Annotations that are kept as intent.
    pub intent_annotations: Vec<String>,
}

/// The label of EndpointSlices that names their Service (discovery.k8s.io/v1 `LabelServiceName`).
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// The annotation of a mirror pod that bears the static pod's hash (k8s.io/kubernetes `pkg/kubelet/types`).
const CONFIG_HASH_ANNOTATION: &str = "kubernetes.io/config.hash";
/// The annotation by which a pod is known to be a mirror pod.
const CONFIG_MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

enum Change {
    Pod(Box<watcher::Event<Pod>>),
    Namespace(Box<watcher::Event<Namespace>>),
    /// A pod that was asked for by name, and its namespace.
    Named(Box<(Pod, Namespace)>),
    /// The selectors are others.
    Enrolment,
}

impl ClusterWatch {
    /// Watches until dropped, publishing each new state. Errors are logged and retried with backoff, for ever.
    ///
    /// Pods that come by `named` are asked for at once. What the watch says of a pod counts more than that.
    pub async fn watch_pods(self, publish: watch::Sender<KnownPods>, named: mpsc::Receiver<NamedPod>) {
        let own = watcher::Config::default().fields(&format!("spec.nodeName={}", self.node));
        let pods =
            events(Api::<Pod>::all(self.client.clone()), own).map(|event| Change::Pod(Box::new(event)));
        let namespaces = events(Api::<Namespace>::all(self.client.clone()), watcher::Config::default())
            .map(|event| Change::Namespace(Box::new(event)));
        let selectors = stream::unfold(self.enrolment.clone(), |mut selectors| async move {
            selectors.changed().await.ok()?;
            Some((Change::Enrolment, selectors))
        });
        let found =
            pod_lookup::follow(self.client.clone(), named).map(|found| Change::Named(Box::new(found)));
        let own = stream::select(selectors.boxed(), found.boxed());
        let mut changes = stream::select(stream::select(pods.boxed(), namespaces.boxed()), own.boxed());
        let mut pods = Objects::default();
        let mut namespaces = Objects::default();
        while let Some(change) = changes.next().await {
            match change {
                Change::Pod(event) => pods.apply(*event),
                Change::Namespace(event) => namespaces.apply(*event),
                Change::Named(found) => {
                    let (pod, namespace) = *found;
                    if pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(&self.node) {
                        namespaces.add(namespace);
                        pods.add(pod);
                    }
                }
                Change::Enrolment => {}
            }
            if pods.complete && namespaces.complete {
                let known = Arc::new(self.judge(&pods, &namespaces));
                publish.send_if_modified(|current| {
                    let changed = current.as_deref() != Some(&known);
                    *current = Some(known);
                    changed
                });
            }
        }
    }

    fn judge(&self, pods: &Objects<Pod>, namespaces: &Objects<Namespace>) -> HashMap<PodUid, Arc<KnownPod>> {
        let mut known = HashMap::with_capacity(pods.current.len());
        let mut hashes = Vec::new();
        for pod in pods.current.values() {
            // A pod whose namespace is not known yet has no verdict yet: it stays out, which denies it.
            let namespace = pod.namespace().unwrap_or_default();
            let Some(namespace_labels) =
                namespaces.current.get(&namespace).map(|found| found.labels().clone())
            else {
                continue;
            };
            let Some(found) = self.known_pod(pod, namespace, &namespace_labels) else { continue };
            let found = Arc::new(found);
            if let Some(hash) = &found.static_hash {
                hashes.push((hash.clone(), found.clone()));
            }
            known.insert(found.uid.clone(), found);
        }
        for (hash, found) in hashes {
            // An annotation must not take the place of the pod that bears this as its UID.
            known.entry(hash).or_insert(found);
        }
        known
    }

    pub(super) fn known_pod(
        &self,
        pod: &Pod,
        namespace: String,
        namespace_labels: &BTreeMap<String, String>,
    ) -> Option<KnownPod> {
        let uid = PodUid::new(pod.metadata.uid.as_deref()?)?;
        let spec = pod.spec.as_ref()?;
        let status = pod.status.as_ref();
        let annotations = pod.annotations();
        let statuses = status.into_iter().flat_map(|status| {
            [
                &status.container_statuses,
                &status.init_container_statuses,
                &status.ephemeral_container_statuses,
            ]
            .into_iter()
            .flatten()
            .flatten()
        });
        let containers = statuses
            .filter_map(|status| {
                let id = status.container_id.as_deref()?;
                Some((id.rsplit_once("://").map_or(id, |(_, id)| id).to_owned(), status.name.clone()))
            })
            .collect();
        let selectors = self.enrolment.borrow();
        let mode = selectors
            .iter()
            .find(|entry| entry.namespaces.matches(namespace_labels) && entry.pods.matches(pod.labels()))
            .map(|entry| entry.mode);
        Some(KnownPod {
            uid,
            static_hash: static_hash(pod),
            name: pod.name_any(),
            namespace,
            service_account: spec.service_account_name.clone().unwrap_or_default(),
            ip: status.and_then(|status| status.pod_ip.as_deref()).and_then(|ip| ip.parse().ok()),
            host_network: spec.host_network.unwrap_or(false),
            containers,
            intent: self
                .intent_annotations
                .iter()
                .filter_map(|name| Some((name.clone(), annotations.get(name)?.clone())))
                .collect(),
            labels: Arc::new(Labels { pod: pod.labels().clone(), namespace: namespace_labels.clone() }),
            mode,
        })
    }
}

/// The UID that a static pod's cgroup bears, of its mirror pod.
pub(super) fn static_hash(pod: &Pod) -> Option<PodUid> {
    let annotations = pod.annotations();
    annotations.get(CONFIG_MIRROR_ANNOTATION)?;
    PodUid::new(annotations.get(CONFIG_HASH_ANNOTATION)?)
}

/// The addresses that are one cluster's API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiSet {
    /// ClusterIPs and ports of the Service `default/kubernetes`: what pods dial.
    pub service: BTreeSet<SocketAddr>,
    /// Its endpoints: what the agent dials.
    pub endpoints: BTreeSet<SocketAddr>,
}

impl ApiSet {
    /// Whether it names both: less is never served.
    pub fn is_whole(&self) -> bool {
        !self.service.is_empty() && !self.endpoints.is_empty()
    }
}

/// What an API set is made of, and the right to it, for messages.
pub const API_SET_READ: &str = "addresses in the Service and the EndpointSlices default/kubernetes (may the agent's service account list and watch them?)";

/// Watches the Node objects until dropped, publishing each new state.
pub async fn watch_nodes(client: Client, publish: watch::Sender<Hosts>) {
    let strip = |node: &mut Node| {
        // Most of an object, and of no use here: with thousands of nodes it would be the most of the agent's memory.
        node.managed_fields_mut().clear();
        node.annotations_mut().retain(|name, _| hosts::is_address_annotation(name));
        node.labels_mut().clear();
        if let Some(status) = &mut node.status {
            status.images = None;
            status.conditions = None;
            status.volumes_in_use = None;
        }
    };
    let nodes = watcher(Api::<Node>::all(client), watcher::Config::default()).modify(strip);
    let mut changes = std::pin::pin!(retried(nodes));
    let mut nodes = Objects::default();
    while let Some(event) = changes.next().await {
        nodes.apply(event);
        if nodes.complete {
            let mut hosts: Vec<Host> = nodes.current.values().map(host).collect();
            hosts.sort_by(|one, other| one.addresses.cmp(&other.addresses));
            publish.send_if_modified(|current| {
                let changed = **current != hosts;
                if changed {
                    *current = Arc::new(hosts);
                }
                changed
            });
        }
    }
}

fn host(node: &Node) -> Host {
    let status = node.status.as_ref();
    let addresses = status.and_then(|status| status.addresses.as_ref()).into_iter().flatten();
    let ranges = node.spec.iter().flat_map(|spec| {
        let all = spec.pod_cidrs.iter().flatten().map(String::as_str);
        all.chain(spec.pod_cidr.as_deref())
    });
    let port = status
        .and_then(|status| status.daemon_endpoints.as_ref()?.kubelet_endpoint.as_ref())
        .and_then(|endpoint| u16::try_from(endpoint.port).ok());
    Host {
        addresses: addresses
            .filter_map(|address| address.address.parse().ok())
            .chain(ranges.flat_map(hosts::gateways))
            .chain(node.annotations().values().filter_map(|value| {
                // With or without the length of a prefix.
                value.split('/').next()?.parse().ok()
            }))
            .collect(),
        kubelet_port: port.filter(|port| *port != 0).unwrap_or(hosts::KUBELET_PORT),
    }
}

/// Which `default/kubernetes` is, and where its EndpointSlices are.
fn selected() -> (&'static str, String) {
    ("metadata.name=kubernetes", format!("{SERVICE_NAME_LABEL}=kubernetes"))
}

/// The API set as it is now, from the API server itself and no cache.
///
/// # Errors
/// The API server does not answer, or refuses.
pub async fn read_api_set(client: &Client) -> kube::Result<ApiSet> {
    let (service, slices) = selected();
    let services = Api::<Service>::namespaced(client.clone(), "default");
    let endpoints = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    let services = services.list(&ListParams::default().fields(service)).await?;
    let endpoints = endpoints.list(&ListParams::default().labels(&slices)).await?;
    Ok(ApiSet {
        service: services.items.iter().flat_map(service_addresses).collect(),
        endpoints: endpoints.items.iter().flat_map(slice_addresses).collect(),
    })
}

/// Watches `default/kubernetes` until dropped, publishing each new state; an empty answer never replaces a full one.
pub async fn watch_api_set(client: Client, publish: watch::Sender<ApiSet>) {
    enum Change {
        Service(Box<watcher::Event<Service>>),
        Slice(Box<watcher::Event<EndpointSlice>>),
    }
    let (fields, labels) = selected();
    let service = events(
        Api::<Service>::namespaced(client.clone(), "default"),
        watcher::Config::default().fields(fields),
    );
    let slices = events(
        Api::<EndpointSlice>::namespaced(client, "default"),
        watcher::Config::default().labels(&labels),
    );
    let mut changes = stream::select(
        service.map(|event| Change::Service(Box::new(event))).boxed(),
        slices.map(|event| Change::Slice(Box::new(event))).boxed(),
    );
    let mut services = Objects::default();
    let mut slices = Objects::default();
    while let Some(change) = changes.next().await {
        match change {
            Change::Service(event) => services.apply(*event),
            Change::Slice(event) => slices.apply(*event),
        }
        let new = ApiSet {
            service: services.current.values().flat_map(service_addresses).collect(),
            endpoints: slices.current.values().flat_map(slice_addresses).collect(),
        };
        publish.send_if_modified(|current| {
            let mut changed = false;
            if !new.service.is_empty() && current.service != new.service {
                current.service = new.service;
                changed = true;
            }
            if !new.endpoints.is_empty() && current.endpoints != new.endpoints {
                current.endpoints = new.endpoints;
                changed = true;
            }
            changed
        });
    }
}

fn service_addresses(service: &Service) -> Vec<SocketAddr> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let ips = spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse::<IpAddr>().ok());
    let ports: Vec<u16> =
        spec.ports.iter().flatten().filter_map(|port| u16::try_from(port.port).ok()).collect();
    ips.flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port))).collect()
}

fn slice_addresses(slice: &EndpointSlice) -> Vec<SocketAddr> {
    let ports: Vec<u16> =
        slice.ports.iter().flatten().filter_map(|port| u16::try_from(port.port?).ok()).collect();
    slice
        .endpoints
        .iter()
        .flat_map(|endpoint| &endpoint.addresses)
        .filter_map(|address| address.parse::<IpAddr>().ok())
        .flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)))
        .collect()
}

/// The events of a watch, for ever: errors are logged, the backoff is kube's default (0.8 s to 30 s).
fn events<K>(api: Api<K>, config: watcher::Config) -> impl Stream<Item = watcher::Event<K>>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
    K::DynamicType: Default,
{
    retried(watcher(api, config))
}

fn retried<K>(
    events: impl Stream<Item = Result<watcher::Event<K>, watcher::Error>>,
) -> impl Stream<Item = watcher::Event<K>>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
    K::DynamicType: Default,
{
    events.default_backoff().filter_map(|event| async move {
        event
            .inspect_err(|error| {
                tracing::warn!(
                    event = "watch-interrupted",
                    kind = %K::kind(&K::DynamicType::default()),
                    error = %error,
                    "watch interrupted; the last known state stays in force"
                );
            })
            .ok()
    })
}

/// The objects of one watch by name (namespaced ones are not mixed: pods are keyed by namespace and name).
struct Objects<K> {
    current: HashMap<String, K>,
    /// While a list is being read: what it has so far.
    listing: Option<HashMap<String, K>>,
    /// Whether a list has been read whole once.
    complete: bool,
}

impl<K> Default for Objects<K> {
    fn default() -> Self {
        Self { current: HashMap::new(), listing: None, complete: false }
    }
}

fn key<K: kube::Resource>(object: &K) -> String {
    match object.namespace() {
        Some(namespace) => format!("{namespace}/{}", object.name_any()),
        None => object.name_any(),
    }
}

impl<K: kube::Resource> Objects<K> {
    /// Adds an object that the watch does not have, or has another in the place of, which bore its name before.
    fn add(&mut self, object: K) {
        let known = self.current.get(&key(&object)).map(|known| known.meta().uid.as_ref());
        if known.is_none_or(|uid| uid != object.meta().uid.as_ref()) {
            self.current.insert(key(&object), object);
        }
    }

    fn apply(&mut self, event: watcher::Event<K>) {
        match event {
            watcher::Event::Init => self.listing = Some(HashMap::new()),
            watcher::Event::InitApply(object) => {
                self.listing.get_or_insert_default().insert(key(&object), object);
            }
            watcher::Event::InitDone => {
                self.current = self.listing.take().unwrap_or_default();
                self.complete = true;
            }
            watcher::Event::Apply(object) => {
                self.current.insert(key(&object), object);
            }
            watcher::Event::Delete(object) => {
                self.current.remove(&key(&object));
            }
        }
    }
}
