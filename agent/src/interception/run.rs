//! Interception on a node: everything of this folder put to work for `weir-agent run`.
//!
//! What [`guard`] does comes first; then the programs are attached at the root of pods, as soon as that is there; then
//! pods are enrolled, for ever.

use std::{
    collections::HashSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    accept::Sink,
    answers::{Answers, Interest},
    api_set::{self, Addresses, ClusterAddresses, Learnt, Suspicions},
    beside::{Beside, Tasks, also},
    cgroup::CgroupError,
    cgroup_tree::{Tree, TreeWatch},
    cluster_watch::KnownPods,
    enrolment::{Enrolment, Settings},
    guard::{self, InForce},
    handover::{self, HandoverError, Passed, Taken},
    held_back::HeldBack,
    hosts::{self, Hosts},
    layouts::{self, OlderLayouts},
    listener::ListenerError,
    loader::{Kernel, KernelError, Pinning},
    namespace,
    nested::Nested,
    observed::Observed,
    pod_lookup::NamedPod,
    resolution::Resolution,
    security::{PACKET_SOCKETS_DENIED, Security},
    stored_set,
    succession::Succession,
    told,
};
use crate::{nri, proxy::Accepted, recording::Recorder};

/// How often the tree is read even if nothing was heard: inotify can lose events.
const RESCAN: Duration = Duration::from_secs(1);
/// How often, while a pod waits for its network namespace. Nothing tells when a process enters one.
const RESCAN_WAITING: Duration = Duration::from_millis(10);
/// How long a pod may make the agent look that often; after that (a sandbox that does not start) it is looked at
/// with the others.
const WAITING_MAX: Duration = Duration::from_secs(30);

/// Why interception cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum InterceptionError {
    /// The kernel's part.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The cgroup tree.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The host's network namespace.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// The agent before or after this one.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// A file of the kernel's.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A part of the interception has ended that should not.
    #[error("{part} ended: {reason}")]
    Ended {
        /// Which.
        part: &'static str,
        /// Why.
        reason: String,
    },
}

/// What interception on a node needs.
#[derive(Debug)]
pub struct Options {
    /// What must be in force before anything else.
    pub guard: guard::Options,
    /// This node's pods, from [`super::cluster_watch::ClusterWatch::watch_pods`].
    pub pods: watch::Receiver<KnownPods>,
    /// Becomes true once whoever connects is served. Until then no pod is enrolled and the agent is not ready, but those that are
    /// not selected pass.
    pub serves: watch::Receiver<bool>,
    /// The addresses of each cluster.
    pub clusters: Vec<ClusterAddresses>,
    /// Who is asked for the clusters' host names; empty: those of `/etc/resolv.conf`.
    pub name_servers: Vec<SocketAddr>,
    /// The machines of this node's cluster, from [`super::cluster_watch::watch_nodes`].
    pub nodes: watch::Receiver<Hosts>,
    /// Where listeners are taken from the agent that runs, and given to the one that follows; none: neither.
    pub handover: Option<PathBuf>,
    /// The container runtime's NRI socket, and where pods go that the API server is to be asked for; none: containers are not
    /// held back.
    pub nri: Option<(PathBuf, mpsc::Sender<NamedPod>)>,
    /// The proxy.
    pub accepted: mpsc::Sender<Accepted>,
    /// Becomes true once the programs are attached and every pod that was known then has its verdict, and its
    /// listener if it runs.
    pub ready: watch::Sender<bool>,
    /// What others read of it meanwhile.
    pub observed: Arc<Observed>,
    /// How often it is recorded what the kernel counted of each pod against what was proxied.
    pub coverage_interval: Duration,
}

/// How interception ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As it was told to.
    Cancelled,
    /// A successor has taken over: what is served still may drain.
    HandedOver,
}

/// Intercepts until cancelled or until a successor has taken over. On return listeners are closed and pins stay: enrolled
/// pods are denied until the next agent is there, unless it is the successor. `in_force` is what [`guard::begin`] gave;
/// without it the guard is put in force here, once the agent that runs waits to be taken over from.
///
/// # Errors
/// Interception cannot start, or a part of it has ended.
pub async fn run(
    options: Options,
    in_force: Option<InForce>,
    recorder: Recorder,
    cancellation: CancellationToken,
) -> Result<Ended, InterceptionError> {
    let mut taken = take_over(options.handover.as_deref(), &options.guard.pinning).await?;
    let in_force = in_force.map_or_else(|| guard::agent_in_force(&options.guard), Ok)?;
    let InForce { kernel, mount, own_cgroup, stored } = in_force;
    if taken.is_none() {
        kernel.forget_flows()?;
    }
    let host_namespace = namespace::own()
        .map_err(|source| InterceptionError::Io { action: "read /proc/self/ns/net", source })?;
    let addresses = Arc::new(Addresses::new(kernel.clone(), recorder.clone(), &options.clusters)?);
    let observed = options.observed;
    let sink = Sink {
        kernel: kernel.clone(),
        recorder: recorder.clone(),
        accepted: options.accepted,
        observed: observed.clone(),
    };
    let settings = Settings {
        host_namespace,
        own_cgroup,
        sink: sink.clone(),
        settled: Arc::default(),
        coverage_interval: options.coverage_interval,
    };
    let listeners = taken.as_mut().map(|taken| std::mem::take(&mut taken.listeners)).unwrap_or_default();
    let (inside, listeners) = listeners.into_iter().partition(|passed: &Passed| passed.nested);
    let (mut enrolment, tenants) = Enrolment::new(settings, listeners, cancellation.child_token());
    // This process's programs take the place of a former one's, at the root first, which has the guard.
    attach(&kernel, &mount)?;
    let watch = tree_watch()?;
    let tree = Tree::read(&mount, |folder| watch.watch(folder))
        .map_err(|source| InterceptionError::Io { action: "read the cgroup tree", source })?;
    enrolment.apply((tree, &None), false).await?;

    let part = cancellation.child_token();
    // While a successor takes over, what the kernel reports is for it to read.
    let (frozen, is_frozen) = watch::channel(false);
    let nested = Arc::new(Nested::default());
    let beside =
        Beside { sink, tenants, host: host_namespace, frozen: is_frozen.clone(), cancellation: part.clone() };
    let mut tasks = beside.start(&mount, &options.ready, addresses.grown(), (&nested, inside))?;
    let names = options.guard.clusters.into_iter().flatten().map(|cluster| cluster.name).collect();
    let storing =
        stored_set::follow(kernel.clone(), names, options.guard.state_directory, stored, part.clone());
    also(&mut tasks, "storing the API set", storing);
    if let Some((socket, named)) = options.nri {
        let (settled, known) = (enrolment.settled().clone(), options.pods.clone());
        let held_back = HeldBack { settled, known, named, observed: observed.clone(), frozen: is_frozen };
        also(&mut tasks, "answering the container runtime", nri::follow(socket, held_back, part.clone()));
    }
    let asked = (&options.name_servers[..], &recorder);
    let clusters = follow_names(&mut tasks, options.clusters, &addresses, asked, &part);
    follow_addresses(&mut tasks, &addresses, clusters, options.nodes, &part)?;
    let mut succession = Succession {
        taken,
        path: options.handover,
        requests: None,
        frozen,
        observed,
        part: part.clone(),
        recorder,
        pods: options.pods.clone(),
        nested,
    };
    let result = tokio::select! {
        result = enrol(&mut enrolment, (&mount, &watch), (options.pods, options.serves), &options.ready, &mut succession) => result,
        Some(ended) = tasks.join_next(), if !tasks.is_empty() => Err(ended_early(ended)),
    };
    part.cancel();
    enrolment.end().await;
    while tasks.join_next().await.is_some() {}
    if cancellation.is_cancelled() { Ok(Ended::Cancelled) } else { result }
}

/// What the agent that runs gives, if one does and this one can follow it.
async fn take_over(handover: Option<&Path>, pinning: &Pinning) -> Result<Option<Taken>, InterceptionError> {
    let Some(path) = handover else { return Ok(None) };
    if let (Pinning::Pinned(pins), true) = (pinning, handover::an_agent_runs(path)) {
        layouts::can_follow(pins)?;
    }
    Ok(handover::take(path).await?)
}

/// Puts this process's programs in force at the root of the tree.
fn attach(kernel: &Kernel, mount: &Path) -> Result<(), KernelError> {
    kernel.attach(mount)?;
    match kernel.attach_security()? {
        Security::InForce(way) => {
            tracing::info!(event = "security-hooks-in-force", %way, "{PACKET_SOCKETS_DENIED}");
        }
        Security::Absent(reason) => {
            tracing::info!(
                event = "security-hooks-absent",
                reason,
                "the kernel lets no program decide in its security hooks; the guards at interfaces stand alone"
            );
        }
    }
    Ok(())
}

/// Starts to keep the API set up to date.
fn follow_addresses(
    tasks: &mut Tasks,
    addresses: &Arc<Addresses>,
    clusters: Vec<(ClusterAddresses, Learnt)>,
    nodes: watch::Receiver<Hosts>,
    part: &CancellationToken,
) -> Result<(), InterceptionError> {
    let local = hosts::local_addresses().map_err(|source| InterceptionError::Io {
        action: "read the addresses of this machine's interfaces",
        source,
    })?;
    let (publish, hosts) = watch::channel(Arc::new(hosts::with_local(&nodes.borrow(), local)));
    for (cluster, learnt) in clusters {
        let following = api_set::follow(cluster, learnt, hosts.clone(), addresses.clone(), part.clone());
        also(tasks, "following the API set", following);
    }
    let following = api_set::follow_kubelets(hosts, addresses.clone(), part.clone());
    also(tasks, "following the kubelets", following);
    let following = hosts::follow(nodes, publish, part.clone());
    also(tasks, "following this machine's addresses", following);
    Ok(())
}

/// Starts to learn what the clusters' host names stand for.
fn follow_names(
    tasks: &mut Tasks,
    clusters: Vec<ClusterAddresses>,
    addresses: &Arc<Addresses>,
    (name_servers, recorder): (&[SocketAddr], &Recorder),
    part: &CancellationToken,
) -> Vec<(ClusterAddresses, Learnt)> {
    let mut interests = Vec::new();
    let mut learning = Vec::with_capacity(clusters.len());
    for (index, cluster) in clusters.into_iter().enumerate() {
        let (publish, resolved) = watch::channel(HashSet::new());
        let ask = Arc::new(Notify::new());
        let (suspicions, suspected) = Suspicions::new(cluster.cluster, addresses.clone(), ask.clone());
        let interested = |name: &_| Interest { name: Clone::clone(name), suspicions: suspicions.clone() };
        interests.extend(cluster.names.iter().map(interested));
        if !cluster.names.is_empty() {
            let resolution = Resolution {
                cluster: index,
                names: cluster.names.clone(),
                servers: name_servers.to_vec(),
                ask,
                recorder: recorder.clone(),
            };
            let part = part.clone();
            tasks.spawn(async {
                resolution.follow(publish, part).await;
                Ok("resolving host names")
            });
        }
        learning.push((cluster, Learnt { resolved, suspicions, suspected }));
    }
    // Also without a name: what was noted for those of before goes.
    let telling = told::follow(addresses.kernel(), interests.clone(), part.clone());
    also(tasks, "judging what pods were told", telling);
    if !interests.is_empty() {
        let (recorder, part) = (recorder.clone(), part.clone());
        tasks.spawn(async move {
            let seen = match Answers::open() {
                Ok(answers) => answers.follow(interests, part.clone()).await,
                Err(error) => Err(error),
            };
            if let Err(error) = seen {
                // The name servers are asked all the same.
                let message = format!("the answers of name servers to pods cannot be seen ({error}); has the agent CAP_NET_RAW?");
                tracing::error!(event = "answers-not-seen", %error, "the answers of name servers to pods cannot be seen; has the agent CAP_NET_RAW?");
                recorder.finding(None, None, "answersNotSeen", &message);
                part.cancelled().await;
            }
            Ok("seeing the answers of name servers")
        });
    }
    learning
}

/// Applies each change of the tree or of what is known, until cancelled.
async fn enrol(
    enrolment: &mut Enrolment,
    (mount, watch): (&Path, &TreeWatch),
    (mut pods, mut serving): (watch::Receiver<KnownPods>, watch::Receiver<bool>),
    ready: &watch::Sender<bool>,
    succession: &mut Succession,
) -> Result<Ended, InterceptionError> {
    let (cancellation, settled) = (succession.part.clone(), enrolment.settled().clone());
    let mut waiting_since = None;
    let mut inspected = None;
    let mut watched = true;
    let mut older = OlderLayouts::default();
    loop {
        let (known, serves) = (pods.borrow_and_update().clone(), *serving.borrow_and_update());
        let mut applied = true;
        let waiting = match Tree::read(mount, |folder| watch.watch(folder)) {
            Ok(tree) => enrolment.apply((tree, &known), serves).await?,
            Err(error) => {
                applied = false;
                tracing::error!(event = "cgroup-tree-not-read", %error, "cannot read the cgroup tree; what is enrolled stays so, new pods stay denied");
                false
            }
        };
        if inspected.is_none_or(|inspected: Instant| inspected.elapsed() >= RESCAN) {
            // After `uninstall` nothing is intercepted: the agent ends, and whoever started it starts it anew.
            enrolment.inspect()?;
            inspected = Some(Instant::now());
            if *ready.borrow() {
                older.remove(enrolment.kernel());
            }
        }
        // Not before every known pod has its verdict: what an older layout denies would pass for a moment.
        if known.is_some() && serves && applied && !*ready.borrow() {
            succession.ready().await?;
            older.remove(enrolment.kernel());
            succession.observed.settle();
            ready.send_replace(true);
        }
        let now = Instant::now();
        waiting_since = waiting.then(|| waiting_since.unwrap_or(now));
        let soon = waiting_since.is_some_and(|since| now - since < WAITING_MAX);
        tokio::select! {
            () = cancellation.cancelled() => return Ok(Ended::Cancelled),
            request = succession.request() => {
                if succession.hand_over(enrolment, request).await {
                    return Ok(Ended::HandedOver);
                }
            }
            () = watch.changed() => waiting_since = None,
            () = settled.asked() => waiting_since = None,
            Ok(()) = serving.changed(), if !serves => {}
            changed = pods.changed(), if watched => match changed {
                Ok(()) => waiting_since = None,
                Err(_) => {
                    tracing::error!(event = "pods-not-watched", "nobody watches the pods any more; new ones stay denied");
                    watched = false;
                }
            },
            () = tokio::time::sleep(if soon { RESCAN_WAITING } else { RESCAN }) => {}
        }
    }
}

fn tree_watch() -> Result<TreeWatch, InterceptionError> {
    TreeWatch::new().map_err(|source| InterceptionError::Io {
        action: "watch the cgroup tree; is fs.inotify.max_user_instances used up",
        source,
    })
}

type Part = Result<Result<&'static str, InterceptionError>, tokio::task::JoinError>;

fn ended_early(ended: Part) -> InterceptionError {
    match ended {
        Ok(Ok(part)) => InterceptionError::Ended { part, reason: "without being asked to".to_owned() },
        Ok(Err(error)) => error,
        Err(error) => InterceptionError::Ended { part: "a task", reason: error.to_string() },
    }
}
