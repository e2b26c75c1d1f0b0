//! Enrolment: joins what the API server says of this node's pods with their cgroups, and writes the verdicts.
//!
//! Order is everything here. A listener listens before the map names it; a pod that is to be enrolled is classified
//! as such (and so denied) before it has a listener; what is not known stays unclassified, which below the root of
//! pods means denied. Nothing that was denied becomes allowed because the API server is away or a pod has
//! vanished from its list: a verdict ends with the pod's cgroup.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use weir_common::kernel::Class;

use super::{
    accept::{self, Sink},
    caller::Tenant,
    cgroup_tree::{PodFolder, Tree},
    cluster_watch::{KnownPod, KnownPods},
    coverage::{Counted, Ledger},
    enrolled::{Enrolled, Outcome, Step, due, entry, tenant},
    foreign::Foreign,
    handover::Passed,
    interface::HostEnd,
    loader::{Kernel, KernelError},
    namespace::NamespaceId,
    pinned::pod_name,
    pod::{self, PodUid},
    pod_network::{PodInterfaces, guard_stranger, name},
    settled::{Settled, Verdict},
    trouble::Troubles,
};
use crate::config::Mode;

/// Pods whose listeners are seen to at a time.
const AT_ONCE: usize = 16;
/// How long a pod's network namespace is taken for the one it was, unless its cgroup has changed. To look for it takes
/// reading its processes: with each change of the tree for every pod of a full node, new pods would wait for that.
const NAMESPACE_RECHECK: Duration = Duration::from_millis(500);

/// The classified pods by cgroup id, for who reports about them.
pub type Tenants = watch::Receiver<Arc<HashMap<u64, Arc<Tenant>>>>;

/// What must be known to enrol pods.
pub(super) struct Settings {
    /// The host's network namespace.
    pub(super) host_namespace: NamespaceId,
    /// Cgroup of the agent itself; none where that is the root cgroup, which nothing can be said about.
    pub(super) own_cgroup: Option<u64>,
    /// Where accepted connections go.
    pub(super) sink: Sink,
    /// Where it is said which pods have everything.
    pub(super) settled: Arc<Settled>,
    /// How often coverage is recorded.
    pub(super) coverage_interval: Duration,
}

/// What is to be done about a pod's listener.
enum Judged {
    /// It must be seen to.
    ListenerDue,
    /// It was, lately.
    LookedAtLately,
    /// The pod needs none.
    WithoutListener,
}

/// The pods of this node and what was made of them.
pub(super) struct Enrolment {
    settings: Settings,
    cancellation: CancellationToken,
    pods: HashMap<u64, Enrolled>,
    /// Roots of pods that the programs are attached to.
    attached: HashSet<u64>,
    /// Other cgroups that are classified.
    runtimes: HashSet<u64>,
    /// Listeners of the agent that ran before, by cgroup, which are not served yet.
    adopted: HashMap<u64, Passed>,
    /// Guarded interfaces of pods that had no verdict when they were first seen, by cgroup.
    strangers: HashMap<u64, Vec<HostEnd>>,
    /// What is said of pods that cannot be enrolled.
    troubles: Troubles,
    /// Programs of others that are reported.
    foreign: Foreign,
    /// What was counted when coverage was last recorded.
    ledger: Ledger,
    coverage_recorded: Instant,
    /// Cgroups in quarantine that are reported.
    quarantined: HashSet<u64>,
    /// Pods that are looked at in this pass, however lately they were.
    wanted: HashSet<PodUid>,
    /// Whether entries of a former process have been looked through.
    reconciled: bool,
    tenants: watch::Sender<Arc<HashMap<u64, Arc<Tenant>>>>,
    serving: JoinSet<()>,
}

impl Enrolment {
    pub(super) fn new(
        settings: Settings,
        adopted: Vec<Passed>,
        cancellation: CancellationToken,
    ) -> (Self, Tenants) {
        let (tenants, receiver) = watch::channel(Arc::default());
        let enrolment = Self {
            settings,
            cancellation,
            pods: HashMap::new(),
            attached: HashSet::new(),
            runtimes: HashSet::new(),
            adopted: adopted.into_iter().map(|passed| (passed.cgroup, passed)).collect(),
            strangers: HashMap::new(),
            troubles: Troubles::default(),
            foreign: Foreign::default(),
            ledger: Ledger::default(),
            coverage_recorded: Instant::now(),
            quarantined: HashSet::new(),
            wanted: HashSet::new(),
            reconciled: false,
            tenants,
            serving: JoinSet::new(),
        };
        (enrolment, receiver)
    }

    /// Brings the maps and listeners in line with the tree and what is known of the pods. Returns whether a pod
    /// waits for its network namespace: then this should be called again soon. While nobody `serves`, those that are not
    /// selected are seen to alone: what gives the agent its certificate may be one of them.
    pub(super) async fn apply(
        &mut self,
        (tree, known): (Tree, &KnownPods),
        serves: bool,
    ) -> Result<bool, KernelError> {
        while self.serving.try_join_next().is_some() {}
        self.wanted = self.settled().take_wanted();
        self.containers(&tree)?;
        self.remove_gone(&tree)?;
        self.guard_strangers(&tree, known, serves).await;
        let mut waiting = false;
        if let Some(known) = known {
            waiting = self.see_to((&tree, known), serves).await;
            if serves && !self.reconciled {
                self.forget_strangers(&tree)?;
                self.reconciled = true;
            }
        }
        self.report_quarantine()?;
        if self.coverage_recorded.elapsed() >= self.settings.coverage_interval {
            self.record_coverage()?;
        }
        self.publish();
        Ok(waiting)
    }

    /// Guards the interfaces of pods that have no verdict yet.
    async fn guard_strangers(&mut self, tree: &Tree, known: &KnownPods, serves: bool) {
        let has_verdict = |folder: &PodFolder| {
            // A known one keeps its verdict while the API server is away.
            self.pods.contains_key(&folder.cgroup)
                || known.as_ref().and_then(|known| due(known, folder, serves)).is_some()
        };
        let host = self.settings.host_namespace;
        let mut new = Vec::new();
        for folder in &tree.pods {
            if !has_verdict(folder) && !self.strangers.contains_key(&folder.cgroup) {
                let (folder, sink) = (folder.clone(), self.settings.sink.clone());
                new.push(async move { (folder.cgroup, guard_stranger(&sink, &folder, host).await) });
            }
        }
        let guarded: Vec<_> = stream::iter(new).buffer_unordered(AT_ONCE).collect().await;
        self.strangers.extend(guarded.into_iter().filter_map(|(cgroup, ends)| Some((cgroup, ends?))));
    }

    /// Writes the verdicts of known pods, then sees to the listeners of those that are enrolled. One pod's trouble must not
    /// keep the others from being enrolled; it stays denied. Returns whether one waits for its network namespace.
    async fn see_to(
        &mut self,
        (tree, known): (&Tree, &HashMap<PodUid, Arc<KnownPod>>),
        serves: bool,
    ) -> bool {
        let (sink, host) = (self.settings.sink.clone(), self.settings.host_namespace);
        let mut steps = Vec::new();
        for folder in &tree.pods {
            let Some(pod) = due(known, folder, serves) else { continue };
            match self.judge(folder, pod) {
                Ok(Judged::ListenerDue) => {
                    steps.extend(self.step(folder).map(|step| step.take(sink.clone(), host)));
                }
                Ok(Judged::WithoutListener) => {
                    self.settled().set(&folder.uid, Some(Verdict::WithoutListener));
                    self.troubles.over(folder.cgroup);
                }
                Ok(Judged::LookedAtLately) => self.troubles.over(folder.cgroup),
                Err(error) => self.troubles.met(&tenant(folder, pod), &error.into(), &sink.recorder),
            }
        }
        let mut steps = stream::iter(steps).buffer_unordered(AT_ONCE);
        let mut waiting = false;
        while let Some((step, outcome)) = steps.next().await {
            let Step { folder, pod, adopted, .. } = step;
            self.adopted.extend(adopted.map(|adopted| (folder.cgroup, adopted)));
            let listens = matches!(outcome, Ok(Outcome::Same | Outcome::Listens));
            match outcome {
                Ok(Outcome::Waits) => waiting = true,
                Ok(Outcome::Same) => self.troubles.over(folder.cgroup),
                Ok(Outcome::Listens) => {
                    self.troubles.over(folder.cgroup);
                    self.serve(&pod);
                }
                Err(error) => self.troubles.met(&pod.tenant.borrow(), &error, &sink.recorder),
            }
            if let Some(listening) = pod.listening.as_ref().filter(|_| listens) {
                self.settled().set(&folder.uid, Some(Verdict::Listens(listening.namespace)));
            }
            self.pods.insert(folder.cgroup, pod);
        }
        waiting
    }

    /// Records which pods were put into quarantine, or let out, since the last time.
    fn report_quarantine(&mut self) -> Result<(), KernelError> {
        let sink = &self.settings.sink;
        sink.kernel.recount_quarantine()?;
        let now = sink.kernel.quarantined()?;
        for (cgroups, finding, message) in [
            (
                now.difference(&self.quarantined),
                "quarantined",
                "the pod is in quarantine: it connects nowhere until `weir-agent quarantine --lift`",
            ),
            (self.quarantined.difference(&now), "quarantineLifted", "the pod is out of quarantine"),
        ] {
            for pod in cgroups.filter_map(|cgroup| self.pods.get(cgroup)) {
                let tenant = pod.tenant.borrow().clone();
                tracing::warn!(event = "pod-quarantine", pod = %name(&tenant), message);
                sink.recorder.finding(None, Some(&tenant.unproven(None)), finding, message);
            }
        }
        // One that is not known yet is reported when it is.
        self.quarantined = now.into_iter().filter(|cgroup| self.pods.contains_key(cgroup)).collect();
        Ok(())
    }

    /// Records what the kernel counted of each pod against what reached the proxy, since the last time.
    fn record_coverage(&mut self) -> Result<(), KernelError> {
        let sink = &self.settings.sink;
        let mut counted = HashMap::with_capacity(self.pods.len());
        for (cgroup, pod) in &self.pods {
            let Some(kernel) = sink.kernel.pod_counters(*cgroup)? else { continue };
            let class = match pod.class {
                Class::Enrolled => "enrolled",
                Class::Observed => "observed",
                _ => "unselected",
            };
            let proxied = pod.proxied.load(Ordering::Relaxed);
            let pod = pod.tenant.borrow().pod.clone().unwrap_or_default();
            counted.insert(*cgroup, Counted { pod, class, kernel, proxied });
        }
        let interval = self.coverage_recorded.elapsed().as_millis();
        self.coverage_recorded = Instant::now();
        let coverage = self.ledger.take(u64::try_from(interval).unwrap_or(u64::MAX), counted);
        sink.recorder.coverage(coverage);
        Ok(())
    }

    /// Which pods have everything.
    pub(super) fn settled(&self) -> &Arc<Settled> {
        &self.settings.settled
    }

    /// The programs and maps that verdicts are written to.
    pub(super) fn kernel(&self) -> &Kernel {
        &self.settings.sink.kernel
    }

    /// Attaches what someone has detached, and says so; says as well which programs of others are beside ours.
    pub(super) fn inspect(&mut self) -> Result<(), KernelError> {
        let sink = &self.settings.sink;
        let found = sink.kernel.inspect()?;
        if !found.repaired.is_empty() {
            let programs = found.repaired.join(", ");
            tracing::error!(event = "programs-reattached", %programs, "were detached or replaced by someone, and are attached again");
            let message = format!(
                "detached or replaced by someone, and attached again: {programs}; who else is privileged on this node?"
            );
            sink.recorder.finding(None, None, "programDetached", &message);
        }
        let pods = self.pods.values().map(|pod| pod.tenant.borrow().clone());
        self.foreign.report(found.foreign, pods, &sink.recorder);
        Ok(())
    }

    /// The listeners, for a successor. What is not listed it makes anew.
    pub(super) fn share(&self) -> Vec<Passed> {
        let listening = self.pods.iter().filter_map(|(cgroup, pod)| Some((*cgroup, pod.listening.as_ref()?)));
        listening
            .filter_map(|(cgroup, listening)| {
                let sockets = listening.listener.share();
                let sockets = sockets.inspect_err(|error| {
                    tracing::error!(event = "listener-not-shared", %error, "cannot share a listener; are there too many open files?");
                });
                Some(Passed { cgroup, namespace: listening.namespace, nested: false, sockets: sockets.ok()? })
            })
            .collect()
    }

    /// Ends every listener; the maps stay, so that enrolled pods are denied from here on.
    pub(super) async fn end(mut self) {
        for pod in self.pods.values_mut() {
            pod.listening = None;
        }
        while self.serving.join_next().await.is_some() {}
        // After the last connection, so that the agent's last minute is covered as well.
        if let Err(error) = self.record_coverage() {
            tracing::warn!(event = "coverage-not-recorded", %error, "cannot record the coverage of the last minute");
        }
    }

    /// Attaches to new roots of pods, and marks them and other runtimes' cgroups: below them nothing passes
    /// for being in the host's network namespace.
    fn containers(&mut self, tree: &Tree) -> Result<(), KernelError> {
        let kernel = &self.settings.sink.kernel;
        let entry = entry(Class::Container, None);
        for (path, id) in &tree.roots {
            if !self.attached.contains(id) {
                kernel.classify(*id, entry)?;
                kernel.attach_hooks(path)?;
                self.attached.insert(*id);
                tracing::info!(event = "pod-root-attached", cgroup = %path.display(), "attached to the root of pods");
            }
        }
        let new: HashSet<u64> = tree.runtimes.iter().copied().collect();
        for gone in self.runtimes.difference(&new) {
            kernel.forget_cgroup(*gone)?;
        }
        // The agent itself may run in such a scope.
        let own = self.settings.own_cgroup;
        for id in new.difference(&self.runtimes).filter(|id| Some(**id) != own) {
            kernel.classify(*id, entry)?;
        }
        self.runtimes = new;
        Ok(())
    }

    fn remove_gone(&mut self, tree: &Tree) -> Result<(), KernelError> {
        let there: HashSet<u64> = tree.pods.iter().map(|folder| folder.cgroup).collect();
        self.troubles.keep(&there);
        for (cgroup, ends) in self.strangers.extract_if(|cgroup, _| !there.contains(cgroup)) {
            self.settings.sink.kernel.forget_interfaces(&ends, cgroup)?;
        }
        let gone: Vec<u64> = self.pods.keys().copied().filter(|cgroup| !there.contains(cgroup)).collect();
        for cgroup in gone {
            self.settings.sink.kernel.forget_cgroup(cgroup)?;
            if let Some(pod) = self.pods.remove(&cgroup) {
                self.settings.sink.kernel.forget_interfaces(&pod.interfaces.guarded, cgroup)?;
                let tenant = pod.tenant.borrow().clone();
                if let Some(found) = pod::parse(&tenant.folder) {
                    self.settled().set(&found.pod, None);
                }
                self.settings.sink.observed.forget(tenant.pod.as_ref().map_or("", |pod| &pod.uid));
                tracing::info!(event = "pod-gone", pod = %name(&tenant), "pod is gone");
            }
        }
        Ok(())
    }

    /// Entries that a former process has left in pinned maps, of cgroups that are no more.
    fn forget_strangers(&mut self, tree: &Tree) -> Result<(), KernelError> {
        let kernel = self.settings.sink.kernel.clone();
        let mut there: HashSet<u64> = tree.pods.iter().map(|folder| folder.cgroup).collect();
        there.extend(tree.roots.iter().map(|(_, id)| *id));
        there.extend(&tree.runtimes);
        there.extend(self.settings.own_cgroup);
        for cgroup in kernel.cgroups()?.into_keys().filter(|cgroup| !there.contains(cgroup)) {
            kernel.forget_cgroup(cgroup)?;
        }
        self.adopted.retain(|cgroup, _| there.contains(cgroup));
        kernel.keep_interfaces(&there)?;
        kernel.prune_links()
    }

    /// Writes a pod's verdict, which is new to it.
    fn classify(
        &mut self,
        folder: &PodFolder,
        known: &KnownPod,
        class: Class,
        tenant: &Arc<Tenant>,
    ) -> Result<(), KernelError> {
        self.settled().set(&folder.uid, None);
        let kernel = &self.settings.sink.kernel;
        // An enrolled pod is denied until its listener is there; another one's listener ends after its entry.
        kernel.name_pod(folder.cgroup, pod_name(known))?;
        // With a listener that is handed over, it is redirected to that all the time.
        if class != Class::Enrolled {
            self.adopted.remove(&folder.cgroup);
        }
        if !self.adopted.contains_key(&folder.cgroup) {
            kernel.classify(folder.cgroup, entry(class, None))?;
        }
        let host_network = known.host_network;
        let (sender, _) = watch::channel(tenant.clone());
        let former = self.pods.insert(
            folder.cgroup,
            Enrolled {
                class,
                host_network,
                tenant: sender,
                listening: None,
                proxied: self.settings.sink.observed.counter_of(known.uid.as_str()),
                interfaces: PodInterfaces::default(),
            },
        );
        if former.as_ref().is_some_and(|former| former.class == Class::Enrolled) {
            tracing::warn!(event = "pod-not-enrolled-any-more", pod = %name(tenant), class = ?class, "pod is no longer enrolled");
            let message = "the pod's labels, its namespace's or the configuration changed, and it is no longer enrolled: what it does from here on is not recorded";
            self.settings.sink.recorder.finding(
                None,
                Some(&tenant.unproven(None)),
                "notEnrolledAnyMore",
                message,
            );
        }
        if let (Some(former), Some(pod)) = (former, self.pods.get_mut(&folder.cgroup)) {
            // Only the verdict is new.
            (pod.proxied, pod.interfaces) = (former.proxied.clone(), former.interfaces.clone());
        }
        self.ledger.begin(folder.cgroup, kernel.pod_counters(folder.cgroup)?.unwrap_or_default());
        tracing::info!(event = "pod-classified", pod = %name(tenant), class = ?class, "pod is classified");
        Ok(())
    }

    /// Writes a pod's verdict; returns what is to be done about its listener.
    fn judge(&mut self, folder: &PodFolder, known: &KnownPod) -> Result<Judged, KernelError> {
        let tenant = Arc::new(tenant(folder, known));
        let class = match known.mode {
            None => Class::Unselected,
            Some(Mode::Observe) => Class::Observed,
            Some(Mode::Enforce) => Class::Enrolled,
        };
        if self.pods.get(&folder.cgroup).is_none_or(|pod| pod.class != class) {
            self.classify(folder, known, class, &tenant)?;
        }
        let wanted = self.wanted.contains(&folder.uid);
        let Some(pod) = self.pods.get_mut(&folder.cgroup) else { return Ok(Judged::LookedAtLately) };
        pod.tenant.send_if_modified(|current| {
            let differs = **current != *tenant;
            *current = tenant;
            differs
        });
        let recent = pod.listening.as_ref().is_some_and(|listening| {
            let (found, links) = listening.found;
            links == folder.links && found.elapsed() < NAMESPACE_RECHECK
        });
        Ok(match class {
            Class::Enrolled if recent && !wanted => Judged::LookedAtLately,
            Class::Enrolled => Judged::ListenerDue,
            _ => Judged::WithoutListener,
        })
    }

    /// Takes a pod out of the table for as long as its listener is seen to.
    fn step(&mut self, folder: &PodFolder) -> Option<Step> {
        let pod = self.pods.remove(&folder.cgroup)?;
        let adopted = self.adopted.remove(&folder.cgroup);
        Some(Step { folder: folder.clone(), pod, adopted, end: self.cancellation.child_token() })
    }

    fn serve(&mut self, pod: &Enrolled) {
        let Some(listening) = &pod.listening else { return };
        let (tenant, proxied) = (pod.tenant.subscribe(), pod.proxied.clone());
        let (listener, end) = (listening.listener.clone(), listening.end.clone());
        self.serving.spawn(accept::serve(listener, tenant, proxied, self.settings.sink.clone(), end));
    }

    fn publish(&self) {
        let tenants: HashMap<u64, Arc<Tenant>> =
            self.pods.iter().map(|(cgroup, pod)| (*cgroup, pod.tenant.borrow().clone())).collect();
        self.tenants.send_if_modified(|current| {
            let changed = **current != tenants;
            if changed {
                *current = Arc::new(tenants);
            }
            changed
        });
    }
}
