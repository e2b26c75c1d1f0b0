//! Who is behind a flow: the pod that a listener serves, the container by its cgroup, the process by `/proc`.
//!
//! The kernel's record decides the pod; what `/proc` says is evidence read afterwards and may be missing. What a
//! client says over the connection plays no part here.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use weir_common::event::{Caller, Container, Pod};

use super::{
    cgroup,
    flow::Flow,
    pod,
    process::{Connector, Proc},
    reads::{READS, Reads},
};
use crate::proxy::Labels;

/// Longest time that reading `/proc` may take, with the wait for other reads of the pod: a process can make its own entries slow
/// to read, by mapping its arguments from a file system that it serves itself.
const EVIDENCE_TIMEOUT: Duration = Duration::from_secs(1);
/// Deepest level below a pod's cgroup on which a task's cgroup is looked for.
const DEPTH_MAX: usize = 8;
/// Most cgroups below a pod's that are looked at for one connection.
const FOLDERS_MAX: usize = 1024;

/// Whom a listener serves: a pod, or the command of `weir-agent exec`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tenant {
    /// Id of its cgroup: the one that is classified as enrolled with this listener.
    pub cgroup: u64,
    /// Folder of that cgroup.
    pub folder: PathBuf,
    /// The pod; none for `exec`.
    pub pod: Option<Pod>,
    /// Names of the pod's containers by runtime id, as far as they are known.
    pub containers: BTreeMap<String, String>,
    /// What the pod and its namespace are labelled with.
    pub labels: Arc<Labels>,
}

impl Tenant {
    /// The caller of a flow of this tenant, with what `/proc` and the cgroup tree say, if they say it in time.
    pub async fn caller(&self, flow: &Flow) -> Arc<Caller> {
        self.caller_by(&READS, Proc::default(), flow).await
    }

    async fn caller_by(&self, reads: &Reads, proc: Proc, flow: &Flow) -> Arc<Caller> {
        let record = flow.record;
        let connector = Connector {
            tgid: record.tgid,
            uid: record.uid,
            connected_boottime_ns: record.connected_boottime_ns,
        };
        let folder = self.folder.clone();
        let in_pod = self.pod.is_some() && record.cgroup != self.cgroup;
        let read = move || {
            let container = in_pod.then(|| container_of(&folder, record.cgroup)).flatten();
            (proc.evidence(connector), container)
        };
        // By the kernel's word, which also tells apart pods that are not known.
        let read = reads.of(record.pod_cgroup, EVIDENCE_TIMEOUT, read).await;
        let (process, container) = read.unwrap_or_else(|| {
            let process =
                weir_common::event::Process { pid: record.tgid, uid: record.uid, ..Default::default() };
            (process, None)
        });
        let container = container.map(|id| {
            let name = self.containers.get(&id).cloned().unwrap_or_default();
            Container { id, name }
        });
        Arc::new(Caller {
            pod: self.pod.clone(),
            container,
            process: Some(process),
            cgroup: record.cgroup,
            netns: record.netns,
            dialled: flow.original.to_string(),
            claimed_user: None,
            user: None,
        })
    }

    /// What is known of a refused connection: the pod that the listener serves, and the kernel's record if there is
    /// one. Neither proves that the pod's own process connected.
    pub fn unproven(&self, flow: Option<&Flow>) -> Arc<Caller> {
        let record = flow.map(|flow| flow.record);
        Arc::new(Caller {
            pod: self.pod.clone(),
            process: record.map(|record| weir_common::event::Process {
                pid: record.tgid,
                uid: record.uid,
                ..Default::default()
            }),
            cgroup: record.map_or(self.cgroup, |record| record.cgroup),
            netns: record.map_or(0, |record| record.netns),
            dialled: flow.map(|flow| flow.original.to_string()).unwrap_or_default(),
            ..Caller::default()
        })
    }
}

/// The container in a pod's folder whose cgroup has this id, or has a cgroup with this id below it.
fn container_of(pod: &Path, id: u64) -> Option<String> {
    let mut left = FOLDERS_MAX;
    let mut pending = vec![(pod.to_owned(), 0)];
    while let Some((folder, depth)) = pending.pop() {
        left = left.checked_sub(1)?;
        if cgroup::id(&folder).is_ok_and(|found| found == id) {
            return pod::parse(&folder)?.container;
        }
        if depth < DEPTH_MAX {
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
            let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            pending.extend(folders.map(|entry| (entry.path(), depth + 1)));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Arc, time::Duration};

    use weir_common::kernel::{ApiEndpoint, FlowRecord};

    use super::{
        super::reads::{OF_ALL_MAX, OF_POD_MAX, Reads, hanging::Hanging},
        Caller, Flow, Tenant, cgroup, container_of,
    };

    /// Longer than any of these waits where all is well.
    const LONG: Duration = Duration::from_secs(60);

    /// A connection that process `tgid` has made of the pod with the same number as its cgroup.
    fn flow(pod_cgroup: u64, tgid: u32) -> Flow {
        let original = ApiEndpoint { address: [0; 16], port: 443 };
        let record = FlowRecord {
            original,
            cluster: 0,
            cgroup: pod_cgroup,
            pod_cgroup,
            netns: 1,
            connected_boottime_ns: u64::MAX,
            tgid,
            uid: 7,
        };
        Flow::of(record)
    }

    /// As many at once as the runtime has threads for what blocks, and more: their callers in time, though what is read hangs.
    async fn flood(hanging: &Hanging, reads: &Arc<Reads>, pods: u64) -> Vec<Arc<Caller>> {
        let mut callers = tokio::task::JoinSet::new();
        for number in 0..600 {
            let (reads, proc, flow) = (Arc::clone(reads), hanging.proc(), flow(1 + number % pods, 1));
            callers.spawn(async move { Tenant::default().caller_by(&reads, proc, &flow).await });
        }
        tokio::time::timeout(LONG, callers.join_all()).await.expect("no connection waits for ever")
    }

    /// Of a process that can be read, as soon as there is a place for that: on a slow machine one attempt may be too late.
    async fn arguments(hanging: &Hanging, reads: &Reads, flow: &Flow) -> Vec<String> {
        let read = async {
            loop {
                let caller = Tenant::default().caller_by(reads, hanging.proc(), flow).await;
                let arguments = caller.process.clone().expect("is known").argv;
                if !arguments.is_empty() {
                    return arguments;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LONG, read).await.expect("there is a place for it")
    }

    async fn other_work_goes_on() {
        let other = tokio::task::spawn_blocking(|| "done");
        let other = tokio::time::timeout(LONG, other).await.expect("there are threads for it");
        assert_eq!(other.expect("ends"), "done");
    }

    #[test]
    fn arguments_that_hang_cost_their_pod_its_evidence_and_nobody_else_anything() {
        let hanging = Hanging::new();
        hanging.process(1, "cmdline", None);
        hanging.process(2, "cmdline", Some("kubectl\0get\0pods\0"));
        hanging.block_on(async {
            let reads = Arc::new(Reads::default());
            let callers = flood(&hanging, &reads, 1).await;
            let processes: HashSet<_> = callers
                .iter()
                .map(|caller| caller.process.clone().expect("the kernel says which it is"))
                .map(|process| (process.pid, process.uid, process.argv))
                .collect();
            assert_eq!(processes, HashSet::from([(1, 7, Vec::new())]));
            other_work_goes_on().await;
            assert_eq!(arguments(&hanging, &reads, &flow(2, 2)).await, ["kubectl", "get", "pods"]);
            assert_eq!(reads.under_way(), OF_POD_MAX);
        });
    }

    #[test]
    fn arguments_of_many_pods_that_hang_leave_threads_for_all_else() {
        let hanging = Hanging::new();
        hanging.process(1, "cmdline", None);
        hanging.process(2, "cmdline", Some("kubectl\0"));
        hanging.block_on(async {
            let reads = Arc::new(Reads::default());
            flood(&hanging, &reads, 20).await;
            assert_eq!(reads.under_way(), OF_ALL_MAX);
            other_work_goes_on().await;
            hanging.release();
            assert_eq!(arguments(&hanging, &reads, &flow(1, 2)).await, ["kubectl"]);
        });
    }

    #[test]
    fn a_cgroup_below_a_container_belongs_to_it() {
        let root = tempfile::tempdir().expect("a folder");
        let id = "4f1c0c9a7f0e4d7b8a6f5e4d3c2b1a09f8e7d6c5b4a392817060504030201000";
        let pod = root.path().join("kubepods/burstable/pod0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b");
        let below = pod.join(id).join("nested/deeper");
        std::fs::create_dir_all(&below).expect("folders");
        for folder in [pod.join(id), below] {
            assert_eq!(container_of(&pod, cgroup::id(&folder).expect("an id")).as_deref(), Some(id));
        }
        assert_eq!(
            container_of(&pod, cgroup::id(&pod).expect("an id")),
            None,
            "the pod itself is no container"
        );
        assert_eq!(container_of(&pod, 1), None);
    }
}
