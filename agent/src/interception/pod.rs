//! Reading pods and containers out of cgroup paths.
//!
//! The kubelet names a pod's cgroup after its UID, in two ways: `kubepods/burstable/pod<uid>/<id>` with the driver
//! `cgroupfs`, `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice/<runtime>-<id>.scope`
//! with `systemd` (k8s.io/kubernetes `pkg/kubelet/cm/cgroup_manager_linux.go`). The container's name is the runtime's:
//! containerd `cri-containerd-<id>.scope`, CRI-O `crio-<id>.scope`, Docker `docker-<id>.scope`. Pure: paths in, values out.

use std::path::Path;

/// UID of a pod, as the API server writes it; for static pods a hash in hex.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(String);

impl PodUid {
    /// Takes a UID as the API server writes it; none if a cgroup could not bear it as name.
    pub fn new(uid: &str) -> Option<Self> {
        let fits = !uid.is_empty()
            && uid.len() <= UID_LENGTH_MAX
            && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        fits.then(|| Self(uid.to_owned()))
    }

    /// The UID as the API server writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Longest UID: a UUID has 36 characters, a static pod's hash 32.
const UID_LENGTH_MAX: usize = 64;
/// Length of a container id: 32 bytes in hex.
const CONTAINER_ID_LENGTH: usize = 64;

/// What a cgroup's path says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodCgroup {
    /// The pod.
    pub pod: PodUid,
    /// The container, where the path leads into one.
    pub container: Option<String>,
}

/// Names of the root of all pods' cgroups, with the driver `cgroupfs` and with `systemd`.
pub const KUBEPODS_ROOTS: [&str; 2] = ["kubepods", "kubepods.slice"];

/// Whether the name of a folder is that of the root of all pods.
pub fn is_kubepods_root(name: &str) -> bool {
    KUBEPODS_ROOTS.contains(&name)
}

/// Whether a folder is the root of all pods, wherever a node keeps it (kind's `kubelet.slice`).
fn is_root(name: &str) -> bool {
    is_kubepods_root(name) || name.ends_with("-kubepods.slice")
}

/// Whether what a kubelet names a sandbox's parent is below a root of pods: a path, or with `systemd` the slice's name alone,
/// which has the names of those above it in it.
pub(super) fn is_below_kubepods(parent: &str) -> bool {
    let of_slice = |name: &str| {
        let (above, _) = name.split_once("-pod").unwrap_or((name, ""));
        above.split('-').any(is_kubepods_root)
    };
    parent.split('/').any(|name| is_root(name) || of_slice(name))
}

/// Reads a cgroup's path, absolute or relative to the mount; none if it is not a pod's or below one.
///
/// A name below the pod's that is no container id (an own cgroup that a container made, say) is passed over: the first
/// container on the way counts.
pub fn parse(path: &Path) -> Option<PodCgroup> {
    let mut names = path.iter().filter_map(|name| name.to_str());
    // Some nodes keep pods below a further folder, so the root may come at any depth.
    names.by_ref().find(|name| is_root(name))?;
    let pod = names.by_ref().find_map(pod_uid)?;
    let container = names.find_map(container_id).map(str::to_owned);
    Some(PodCgroup { pod, container })
}

/// The pod of a folder's name: `pod<uid>` or `…-pod<uid with underscores>.slice`.
fn pod_uid(name: &str) -> Option<PodUid> {
    if let Some(uid) = name.strip_prefix("pod") {
        return PodUid::new(uid);
    }
    let slice = name.strip_suffix(".slice")?;
    let (_, uid) = slice.rsplit_once("-pod")?;
    PodUid::new(&uid.replace('_', "-"))
}

/// The container of a folder's name: `<id>` or `<runtime>-<id>.scope`.
fn container_id(name: &str) -> Option<&str> {
    let id = match name.strip_suffix(".scope") {
        Some(scope) => scope.rsplit_once('-').map_or(scope, |(_, id)| id),
        None => name,
    };
    (id.len() == CONTAINER_ID_LENGTH && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{is_below_kubepods, parse};

    const UID: &str = "0b5e2f6a-3c1d-4e5f-8a9b-0c1d2e3f4a5b";
    const ID: &str = "4f1c0c9a7f0e4d7b8a6f5e4d3c2b1a09f8e7d6c5b4a392817060504030201000";

    #[track_caller]
    fn check(path: &str, expected: Option<(&str, Option<&str>)>) {
        let parsed = parse(Path::new(path));
        let parsed = parsed.as_ref().map(|found| (found.pod.as_str(), found.container.as_deref()));
        assert_eq!(parsed, expected, "{path}");
    }

    #[test]
    fn cgroupfs_paths_are_read() {
        check(&format!("/kubepods/burstable/pod{UID}/{ID}"), Some((UID, Some(ID))));
        check(&format!("/kubepods/pod{UID}/{ID}"), Some((UID, Some(ID))));
        check(&format!("/kubepods/besteffort/pod{UID}"), Some((UID, None)));
        check(&format!("/sys/fs/cgroup/unified/kubepods/pod{UID}/{ID}/own/below"), Some((UID, Some(ID))));
    }

    #[test]
    fn systemd_paths_are_read_for_each_runtime() {
        let escaped = UID.replace('-', "_");
        let pod = format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{escaped}.slice");
        check(&pod, Some((UID, None)));
        for runtime in ["cri-containerd", "crio", "docker"] {
            check(&format!("{pod}/{runtime}-{ID}.scope"), Some((UID, Some(ID))));
        }
        check(&format!("/kubepods.slice/kubepods-pod{escaped}.slice/crio-{ID}.scope"), Some((UID, Some(ID))));
        check(
            &format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{escaped}.slice/cri-containerd-{ID}.scope"
            ),
            Some((UID, Some(ID))),
        );
    }

    #[test]
    fn static_pods_are_read() {
        let hash = "0123456789abcdef0123456789abcdef";
        check(&format!("/kubepods/burstable/pod{hash}/{ID}"), Some((hash, Some(ID))));
    }

    #[test]
    fn what_a_kubelet_names_a_sandboxs_parent_is_told_from_others() {
        for parent in [
            "/kubepods/besteffort/pod1",
            "/kubepods/pod1",
            "kubepods-besteffort-pod1.slice",
            "/kubepods.slice/kubepods-pod1.slice",
            "kubelet-kubepods-burstable-pod1.slice",
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1.slice",
            "/weir-kubepods.slice/kubepods-besteffort-pod1.slice",
        ] {
            assert!(is_below_kubepods(parent), "{parent}");
        }
        for parent in ["", "/", "/k8s.io", "system.slice", "/user.slice/user-0.slice"] {
            assert!(!is_below_kubepods(parent), "{parent}");
        }
    }

    #[test]
    fn what_is_no_pod_is_none() {
        check("/system.slice/kubelet.service", None);
        check(&format!("/docker/{ID}"), None);
        check("/kubepods/burstable", None);
        check("/kubepods/burstable/podNOT-A-UID", None);
        check("", None);
    }
}
