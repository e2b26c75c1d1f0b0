//! What the selected pods of a node could do past Weir, for `doctor`: by what their specs let them, and by interfaces that
//! have no end on the host. Nothing is changed here.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    path::Path,
};

use k8s_openapi::api::core::v1::{Namespace, Pod, PodSpec, SecurityContext};
use kube::{Api, ResourceExt as _, api::ListParams};

use super::{
    account_rights::Account, cgroup::find_mount, cgroup_tree::Tree, cluster_watch::ClusterWatch, interface,
    namespace, pod::PodUid,
};

/// Folders of the host through which a pod reaches what Weir, the kubelet or the runtime hold; `/` holds them all.
const FOLDERS: [&str; 17] = [
    "/boot",
    "/dev",
    "/etc/cni",
    "/etc/containerd",
    "/etc/cron.d",
    "/etc/kubernetes",
    "/etc/systemd",
    "/opt/cni",
    "/proc",
    "/root",
    "/run",
    "/sys",
    "/usr",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/lib/weir",
    "/var/run",
];
/// Capabilities beyond a runtime's defaults with which a process changes the node's network or kernel, or other processes.
const CAPABILITIES: [&str; 9] = [
    "ALL",
    "BPF",
    "DAC_READ_SEARCH",
    "NET_ADMIN",
    "PERFMON",
    "SYS_ADMIN",
    "SYS_MODULE",
    "SYS_PTRACE",
    "SYS_RAWIO",
];

/// A selected pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// `NAMESPACE/NAME`.
    pub name: String,
    /// What in its spec lets it do more than a pod should, in the spec's words.
    pub powers: BTreeSet<String>,
    /// Its service account; a static pod has none.
    pub account: Option<Account>,
}

/// The selected pods of this node by the UIDs that their cgroups bear, asked once.
///
/// # Errors
/// What the API server says.
pub async fn selected(watch: &ClusterWatch) -> Result<HashMap<PodUid, Selected>, String> {
    let failed = |error: kube::Error| error.to_string();
    let own = ListParams::default().fields(&format!("spec.nodeName={}", watch.node));
    let pods = Api::<Pod>::all(watch.client.clone()).list(&own).await.map_err(failed)?;
    let namespaces = Api::<Namespace>::all(watch.client.clone());
    let namespaces = namespaces.list(&ListParams::default()).await.map_err(failed)?;
    let labels: BTreeMap<_, _> =
        namespaces.iter().map(|namespace| (namespace.name_any(), namespace.labels())).collect();
    let mut selected = HashMap::new();
    for pod in &pods {
        let namespace = pod.namespace().unwrap_or_default();
        let Some(labels) = labels.get(&namespace) else { continue };
        let Some(known) = watch.known_pod(pod, namespace, labels).filter(|known| known.mode.is_some()) else {
            continue;
        };
        let name = format!("{}/{}", known.namespace, known.name);
        let powers = pod.spec.as_ref().map(powers).unwrap_or_default();
        let account = Account { namespace: known.namespace, name: known.service_account };
        let account = (!account.name.is_empty()).then_some(account);
        selected.insert(known.static_hash.unwrap_or(known.uid), Selected { name, powers, account });
    }
    Ok(selected)
}

/// What in a pod's spec lets it do more than a pod should.
fn powers(spec: &PodSpec) -> BTreeSet<String> {
    let mut powers = BTreeSet::new();
    for (is_set, name) in
        [(spec.host_network, "hostNetwork"), (spec.host_pid, "hostPID"), (spec.host_ipc, "hostIPC")]
    {
        powers.extend((is_set == Some(true)).then(|| name.to_owned()));
    }
    for volume in spec.volumes.iter().flatten() {
        let Some(source) = &volume.host_path else { continue };
        let path = Path::new(&source.path);
        let reaches = |folder: &&str| path.starts_with(folder) || Path::new(folder).starts_with(path);
        powers.extend(FOLDERS.iter().any(reaches).then(|| format!("hostPath {}", source.path)));
    }
    let ordinary = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let ordinary = ordinary.map(|container| container.security_context.as_ref());
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    let all = ordinary.chain(ephemeral.map(|container| container.security_context.as_ref()));
    for context in all.flatten() {
        powers.extend(powers_of_container(context));
    }
    powers
}

fn powers_of_container(context: &SecurityContext) -> impl Iterator<Item = String> {
    let privileged = (context.privileged == Some(true)).then(|| "privileged".to_owned());
    let added = context.capabilities.iter().flat_map(|capabilities| capabilities.add.iter().flatten());
    let names = added.map(|name| name.trim_start_matches("CAP_").to_uppercase());
    privileged.into_iter().chain(names.filter(|name| CAPABILITIES.contains(&name.as_str())))
}

/// The interfaces of these pods that no guard of the host can stand at, by the pod's name.
///
/// # Errors
/// The cgroup tree or a pod's interfaces cannot be read (not root, say).
pub fn unguarded(selected: &HashMap<PodUid, Selected>) -> io::Result<BTreeMap<String, Vec<String>>> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo")?;
    let Some(mount) = find_mount(&mountinfo) else { return Err(io::ErrorKind::NotFound.into()) };
    let host = namespace::own()?;
    let mut found = BTreeMap::new();
    for folder in Tree::read(&mount.path, |_| {})?.pods {
        let Some(pod) = selected.get(&folder.uid) else { continue };
        let Some(network) = namespace::of_pod(&folder.path, host) else { continue };
        let interfaces = interface::of_pod(&network.file)?.unguarded;
        if !interfaces.is_empty() {
            found.insert(pod.name.clone(), interfaces);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::powers;

    #[track_caller]
    fn check(spec: &str, expected: &[&str]) {
        let spec = serde_json::from_str(spec).expect("a pod's spec");
        assert_eq!(powers(&spec).into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_lets_a_pod_past_its_walls_is_named_as_the_spec_has_it() {
        check(r#"{"containers": [{"name": "a"}]}"#, &[]);
        check(
            r#"{"containers": [{"name": "a", "securityContext": {"capabilities": {"add": ["NET_RAW", "CHOWN"]}}}],
                "volumes": [{"name": "data", "hostPath": {"path": "/srv/cache"}}, {"name": "e", "emptyDir": {}}]}"#,
            &[],
        );
        check(
            r#"{"containers": [{"name": "a"}], "hostPID": true, "hostNetwork": true, "hostIPC": false,
                "initContainers": [{"name": "b", "securityContext": {"privileged": true}}],
                "ephemeralContainers": [{"name": "c", "securityContext": {"capabilities": {"add": ["CAP_SYS_ADMIN"]}}}],
                "volumes": [{"name": "root", "hostPath": {"path": "/"}},
                            {"name": "switch", "hostPath": {"path": "/run/weir"}},
                            {"name": "socket", "hostPath": {"path": "/var/run/docker.sock"}}]}"#,
            &[
                "SYS_ADMIN",
                "hostNetwork",
                "hostPID",
                "hostPath /",
                "hostPath /run/weir",
                "hostPath /var/run/docker.sock",
                "privileged",
            ],
        );
    }
}
