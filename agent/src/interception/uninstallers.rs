//! Weir taken from every node of a cluster: the agents' DaemonSet goes, and the one whose pods uninstall is watched. Helm's hook
//! before `helm uninstall` runs it, with rights to these two objects and to look at pods.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ContainerState, ContainerStatus, Pod},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams},
};
use tokio::time::{Instant, sleep, timeout};

use crate::doctor;

/// How often it is looked.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// One question to the API server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The agents' DaemonSet, as the chart names it; it is deleted.
const AGENTS: &str = "weir-agent";
/// The one that uninstalls.
const UNINSTALLERS: &str = "weir-uninstall";
/// Label of its pods.
const UNINSTALLERS_LABEL: &str = "app.kubernetes.io/name=weir-uninstall";
/// Helm's annotation with the name of a release.
const RELEASE: &str = "meta.helm.sh/release-name";
/// What is known of a node that says nothing.
const NOT_STARTED: &str = "its pod is not started: does its kubelet run? Take a node that is gone for good out of the cluster (kubectl delete node)";
/// Most characters of what a node says.
const SAID_CHARS_MAX: usize = 500;

/// Why Weir is not gone from every node.
#[derive(Debug, thiserror::Error)]
pub enum UninstallersError {
    /// The API server does not answer, or refuses.
    #[error("cannot ask the API server: {problem}")]
    Api {
        /// Why.
        problem: String,
    },
    /// Somebody has installed Weir again, or it was never removed.
    #[error(
        "the DaemonSet {AGENTS} is there, so agents are meant to run on this node: what keeps pods from the API servers until they do stays in force"
    )]
    AgentsAreMeant,
    /// The objects of the hook were made by something that knows no hooks, beside agents that are to stay.
    #[error(
        "the DaemonSet {AGENTS} is not one that Helm has installed as release {release:?}, so this is no `helm uninstall` of it, and nothing is removed: leave the hook out where the chart is          rendered for another tool (helm template --no-hooks)"
    )]
    NotOfRelease {
        /// The name that was looked for.
        release: String,
    },
    /// Nodes on which it is still in force.
    #[error(
        "Weir is not removed from these nodes, whose enrolled pods may be refused still; mend them and repeat `helm uninstall`:\n  {}",
        listed(nodes)
    )]
    Nodes {
        /// Their names, and why.
        nodes: BTreeMap<String, String>,
    },
}

fn listed(nodes: &BTreeMap<String, String>) -> String {
    nodes.iter().map(|(node, why)| format!("{node}: {why}")).collect::<Vec<_>>().join("\n  ")
}

/// The agents' DaemonSet, for whoever uninstalls on one node.
pub struct Agents {
    /// A client with the right to see it.
    pub client: Client,
    /// Its namespace.
    pub namespace: String,
}

impl Agents {
    /// Returns once it is gone, so that no agent is on its way to this node.
    ///
    /// # Errors
    /// It is there after `patience`, or nobody says that it is not.
    pub async fn are_gone(&self, patience: Duration) -> Result<(), UninstallersError> {
        let end = Instant::now() + patience;
        let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), &self.namespace);
        loop {
            let problem = match timeout(ANSWER_TIMEOUT, sets.get_opt(AGENTS)).await {
                Ok(Ok(None)) => return Ok(()),
                Ok(Ok(Some(_))) => UninstallersError::AgentsAreMeant,
                Ok(Err(error)) => UninstallersError::Api { problem: doctor::chain(&error) },
                Err(_) => UninstallersError::Api { problem: no_answer() },
            };
            if Instant::now() >= end {
                return Err(problem);
            }
            sleep(LOOK_INTERVAL).await;
        }
    }
}

fn no_answer() -> String {
    format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())
}

/// The two DaemonSets.
pub struct Uninstallers {
    /// A client with the hook's rights.
    pub client: Client,
    /// Of both.
    pub namespace: String,
    /// Whose agents end: of no other, and of none that something else than Helm has put there.
    pub release: String,
}

impl Uninstallers {
    /// Returns on how many nodes it is done: on all. Where it is not, the DaemonSet that uninstalls goes: nothing of it may be there when
    /// nodes boot, or Weir is installed again.
    ///
    /// # Errors
    /// It is not done on all of them within `patience`, or fails on one.
    pub async fn run(&self, patience: Duration) -> Result<usize, UninstallersError> {
        let result = self.are_done(patience).await;
        if result.is_err() {
            let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), &self.namespace);
            // Helm removes it as well, too, if it is not too old; and its pods refuse where agents are meant to run.
            let _ = timeout(ANSWER_TIMEOUT, sets.delete(UNINSTALLERS, &DeleteParams::background())).await;
        }
        result
    }

    async fn are_done(&self, patience: Duration) -> Result<usize, UninstallersError> {
        let end = Instant::now() + patience;
        let mut known = BTreeMap::new();
        loop {
            let problem = match timeout(ANSWER_TIMEOUT, self.look()).await {
                Ok(Ok(Progress::Done(nodes))) => return Ok(nodes),
                Ok(Ok(Progress::Failed(nodes))) => return Err(UninstallersError::Nodes { nodes }),
                Ok(Ok(Progress::NotOfRelease)) => {
                    return Err(UninstallersError::NotOfRelease { release: self.release.clone() });
                }
                Ok(Ok(Progress::Waits(nodes))) if Instant::now() >= end => {
                    return Err(UninstallersError::Nodes { nodes });
                }
                Ok(Ok(Progress::Waits(nodes))) => {
                    known = nodes;
                    None
                }
                // On a node whose agent is gone it has no way there, until Weir is removed from that one.
                Ok(Err(error)) => Some(doctor::chain(&error)),
                Err(_) => Some(no_answer()),
            };
            if let Some(problem) = problem
                && Instant::now() >= end
            {
                return Err(unanswered(known, problem));
            }
            sleep(LOOK_INTERVAL).await;
        }
    }

    async fn look(&self) -> Result<Progress, kube::Error> {
        let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), &self.namespace);
        if let Some(agents) = sets.get_opt(AGENTS).await? {
            if !is_of_release(&agents, &self.release) {
                return Ok(Progress::NotOfRelease);
            }
            match sets.delete(AGENTS, &DeleteParams::background()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                deleted => drop(deleted?),
            }
        }
        let set = sets.get(UNINSTALLERS).await?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let pods = pods.list(&ListParams::default().labels(UNINSTALLERS_LABEL)).await?;
        Ok(judge(&set, &pods.items))
    }
}

/// At the end nobody answers: what was known before is said all the same.
fn unanswered(mut known: BTreeMap<String, String>, problem: String) -> UninstallersError {
    if known.is_empty() {
        return UninstallersError::Api { problem };
    }
    known.insert("(since)".to_owned(), format!("cannot ask the API server: {problem}"));
    UninstallersError::Nodes { nodes: known }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// On that many nodes.
    Done(usize),
    /// These are not done.
    Waits(BTreeMap<String, String>),
    /// The agents are not this release's.
    NotOfRelease,
    /// Of these some cannot be, and all others are done.
    Failed(BTreeMap<String, String>),
}

/// Helm writes this on what it installs, and not on what it only renders.
fn is_of_release(agents: &DaemonSet, release: &str) -> bool {
    agents.annotations().get(RELEASE).is_some_and(|name| name == release)
}

fn judge(set: &DaemonSet, pods: &[Pod]) -> Progress {
    let mut nodes = BTreeMap::new();
    let mut failed = false;
    let mut waits = false;
    let mut done = 0;
    for pod in pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()) {
        if is_ready(pod) {
            done += 1;
            continue;
        }
        let (why, ended) = why(pod);
        failed |= ended;
        waits |= !ended;
        nodes.insert(node(pod), why);
    }
    let status = set.status.as_ref();
    let seen = status.is_some_and(|status| status.observed_generation == set.metadata.generation);
    let wanted = status.map_or(0, |status| usize::try_from(status.desired_number_scheduled).unwrap_or(0));
    if !seen || done + nodes.len() < wanted {
        nodes.insert("(others)".to_owned(), format!("{done} of {wanted} nodes have a pod that is done"));
        return Progress::Waits(nodes);
    }
    match (nodes.is_empty(), failed && !waits) {
        (true, _) => Progress::Done(done),
        (false, true) => Progress::Failed(nodes),
        (false, false) => Progress::Waits(nodes),
    }
}

fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// A DaemonSet's pod is for one node, by name, also before it is scheduled there.
fn node(pod: &Pod) -> String {
    let spec = pod.spec.as_ref();
    let bound = spec.and_then(|spec| spec.node_name.clone());
    let terms = spec
        .and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    let fields = terms
        .iter()
        .flat_map(|terms| &terms.node_selector_terms)
        .flat_map(|term| term.match_fields.iter().flatten());
    let mut meant = fields.filter_map(|field| field.values.as_ref()?.first().cloned());
    bound.or_else(|| meant.next()).unwrap_or_else(|| format!("(of pod {})", pod.name_any()))
}

/// Why it is not done there, and whether it has tried and failed.
fn why(pod: &Pod) -> (String, bool) {
    let Some(status) = &pod.status else { return ("its pod has not started".to_owned(), false) };
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let containers: Vec<&ContainerStatus> = containers.collect();
    let ends = containers.iter().flat_map(|container| [&container.state, &container.last_state]);
    let mut ended = ends.flatten().filter_map(|state: &ContainerState| state.terminated.as_ref());
    if let Some(end) = ended.find(|end| end.exit_code != 0) {
        let said = shortened(end.message.as_deref());
        return (format!("`weir-agent uninstall` ended with {}: {said}", end.exit_code), true);
    }
    let waiting = containers.iter().find_map(|container| container.state.as_ref()?.waiting.as_ref());
    let waiting =
        waiting.and_then(|waiting| waiting.reason.clone()).filter(|reason| reason != "PodInitializing");
    let mut conditions = status.conditions.iter().flatten();
    let unscheduled = conditions
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
        .and_then(|condition| condition.message.clone());
    if let Some(why) = unscheduled.or(waiting) {
        return (format!("its pod waits: {why}"), false);
    }
    let phase = status.phase.as_deref().unwrap_or_default();
    let is_bound = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    if is_bound && containers.is_empty() && phase == "Pending" {
        return (NOT_STARTED.to_owned(), false);
    }
    // A kubelet that does not take it, or ends it, says why of the pod itself. The cluster makes another.
    let said = [&status.reason, &status.message].into_iter().flatten();
    let said: String = said.map(|said| format!(": {}", shortened(Some(said)))).collect();
    (format!("its pod is {phase}{said}"), false)
}

fn shortened(said: Option<&str>) -> String {
    said.unwrap_or_default().trim().chars().take(SAID_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{
        BTreeMap, DaemonSet, NOT_STARTED, Pod, Progress, RELEASE, UninstallersError, is_of_release, judge,
        unanswered,
    };

    fn set(observed: i64, desired: i32) -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": {"generation": 1},
            "status": {"observedGeneration": observed, "desiredNumberScheduled": desired,
                "currentNumberScheduled": 0, "numberMisscheduled": 0, "numberReady": 0},
        }))
        .expect("a DaemonSet")
    }

    fn pod(node: &str, status: &Value) -> Pod {
        let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}]}}});
        serde_json::from_value(json!({
            "metadata": {"name": "a"}, "spec": {"containers": [], "affinity": affinity}, "status": status,
        }))
        .expect("a pod")
    }

    fn ready() -> Value {
        json!({"conditions": [{"type": "Ready", "status": "True"}]})
    }

    fn ended(key: &str) -> Value {
        let mut container =
            json!({"name": "uninstall", "image": "", "imageID": "", "ready": false, "restartCount": 1});
        container[key] = json!({"terminated": {"exitCode": 1, "message": "cannot remove the pin\n"}});
        json!({"phase": "Pending", "initContainerStatuses": [container]})
    }

    fn nodes(of: &[(&str, &str)]) -> BTreeMap<String, String> {
        of.iter().map(|(node, why)| ((*node).to_owned(), (*why).to_owned())).collect()
    }

    #[test]
    fn agents_that_helm_has_not_installed_are_left_alone() {
        let mut agents = set(1, 1);
        assert!(!is_of_release(&agents, "weir"), "as `helm template` gives it");
        agents.metadata.annotations = Some([(RELEASE.to_owned(), "weir".to_owned())].into());
        assert!(is_of_release(&agents, "weir") && !is_of_release(&agents, "other"));
    }

    #[test]
    fn it_is_done_when_every_node_has_a_pod_that_is_done() {
        let done = [pod("a", &ready()), pod("b", &ready())];
        assert_eq!(judge(&set(1, 2), &done), Progress::Done(2));
        assert_eq!(judge(&set(1, 0), &[]), Progress::Done(0));
        assert!(matches!(judge(&set(0, 0), &[]), Progress::Waits(_)), "nobody has looked at it");
        assert!(matches!(judge(&set(1, 3), &done), Progress::Waits(_)), "a pod is not made");
        let scheduled = json!([{"type": "PodScheduled", "status": "False", "message": "no room"}]);
        let waits = [pod("a", &ready()), pod("b", &json!({"phase": "Pending", "conditions": scheduled}))];
        assert_eq!(judge(&set(1, 2), &waits), Progress::Waits(nodes(&[("b", "its pod waits: no room")])));
    }

    #[test]
    fn a_pod_that_its_kubelet_has_not_taken_is_told_from_one_whose_kubelet_says_nothing() {
        let why = |status: &Value| {
            let mut pod = pod("a", status);
            pod.spec.as_mut().expect("a spec").node_name = Some("a".to_owned());
            let Progress::Waits(mut found) = judge(&set(1, 1), &[pod]) else { panic!("a is not done") };
            found.remove("a").expect("a")
        };
        assert_eq!(why(&json!({"phase": "Pending"})), NOT_STARTED);
        let full = json!({"phase": "Failed", "reason": "OutOfpods", "message": "Node didn't have enough resource: pods"});
        assert_eq!(why(&full), "its pod is Failed: OutOfpods: Node didn't have enough resource: pods");
        assert_eq!(why(&json!({"phase": "Failed", "reason": "Evicted"})), "its pod is Failed: Evicted");
        assert_eq!(why(&json!({"phase": "Running"})), "its pod is Running");
    }

    #[test]
    fn nodes_are_named_also_where_the_api_server_does_not_answer_any_more() {
        let said = unanswered(nodes(&[("a", NOT_STARTED)]), "no answer".to_owned()).to_string();
        let named = format!("\n  (since): cannot ask the API server: no answer\n  a: {NOT_STARTED}");
        assert!(said.ends_with(&named), "{said}");
        let said = unanswered(BTreeMap::new(), "no answer".to_owned()).to_string();
        assert_eq!(said, "cannot ask the API server: no answer");
    }

    #[test]
    fn a_node_where_it_fails_is_named_with_what_it_said_once_no_other_is_waited_for() {
        let why = "`weir-agent uninstall` ended with 1: cannot remove the pin";
        for key in ["state", "lastState"] {
            let pods = [pod("a", &ended(key)), pod("b", &ready())];
            assert_eq!(judge(&set(1, 2), &pods), Progress::Failed(nodes(&[("a", why)])));
        }
        let pods = [pod("a", &ended("state")), pod("b", &json!({"phase": "Running"}))];
        let Progress::Waits(found) = judge(&set(1, 2), &pods) else { panic!("b is not done") };
        assert_eq!(found, nodes(&[("a", why), ("b", "its pod is Running")]));
        let said = UninstallersError::Nodes { nodes: found }.to_string();
        assert!(said.contains("\n  a: `weir-agent uninstall` ended with 1"), "{said}");
    }
}
