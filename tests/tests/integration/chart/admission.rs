//! The admission policy for enrolled namespaces, on the real API server.

use serde_json::{Value, json};
use weir_tests::wait_until;

use super::{
    super::DEADLINE,
    release::{NAMESPACE, Release},
};

/// Folders of the node, where `/srv/cache` and `/runner/.cache/` are allowed.
const REFUSED_FOLDERS: [&str; 12] = [
    "/srv",
    "/srv/cache/",
    "/srv/cache/link",
    "/opt/cni/bin",
    "/var/run/docker.sock",
    "/run",
    "/sys/fs/bpf",
    "/sys/fs/cgroup/",
    "/",
    "/var/lib",
    "//sys",
    "/./sys/fs",
];

pub(super) fn refuses_pods_that_could_reach_past_weir(release: &Release<'_>) {
    release.must_apply(&[
        "startupTaint=true",
        "admission.enabled=true",
        "admission.hostPathsAllowed={/srv/cache,/runner/.cache/}",
    ]);
    let create = |namespace: &str, change: &dyn Fn(&mut Value)| release.try_pod(namespace, change);
    let privileged =
        |spec: &mut Value| spec["containers"][0]["securityContext"] = json!({"privileged": true});
    wait_until("the policy to be in force", DEADLINE, || {
        Ok((create("it-chart", &privileged).0 != Some(0)).then_some(()))
    })
    .unwrap();
    let policy =
        ["get", "validatingadmissionpolicy", "weir-enrolled-pods", "-o", "jsonpath={.status.typeChecking}"];
    let checked = wait_until("the policy to be checked", DEADLINE, || {
        let checked = release.testbed.kubectl(&policy)?;
        Ok((!checked.is_empty()).then_some(checked))
    });
    assert_eq!(checked.unwrap(), "{}", "no expression is doubtful");
    let refused = |said: &str, change: &dyn Fn(&mut Value)| {
        let (code, _, error) = create("it-chart", change);
        assert!(code != Some(0) && error.contains(said), "{said}: {code:?} {error}");
        assert!(error.contains("or use a namespace that is not enrolled"), "{error}");
        assert_eq!(create(NAMESPACE, change).0, Some(0), "{said}: elsewhere it is nobody's business");
    };
    let volume = |path: &'static str| {
        move |spec: &mut Value| spec["volumes"] = json!([{"name": "v", "hostPath": {"path": path}}])
    };
    let adds = |name: &'static str| {
        move |spec: &mut Value| {
            spec["containers"][0]["securityContext"] = json!({"capabilities": {"add": [name]}});
        }
    };
    refused("drop securityContext.privileged", &privileged);
    refused("drop securityContext.privileged", &|spec| {
        let mut container = spec["containers"][0].clone();
        container["name"] = "first".into();
        container["securityContext"] = json!({"privileged": true});
        spec["initContainers"] = json!([container]);
    });
    for key in ["hostNetwork", "hostPID", "hostIPC"] {
        refused("drop hostNetwork, hostPID and hostIPC", &|spec| spec[key] = true.into());
    }
    for name in ["NET_RAW", "CAP_NET_RAW", "SYS_ADMIN", "BPF", "DAC_READ_SEARCH", "ALL"] {
        refused("with what these containers add: main; of capabilities add none of ALL, BPF,", &adds(name));
    }
    for path in REFUSED_FOLDERS {
        refused(&format!("may lead around it: {path}; drop those hostPath volumes"), &volume(path));
    }
    let passes: [&dyn Fn(&mut Value); 4] =
        [&|_| {}, &volume("/srv/cache"), &volume("/runner/.cache/"), &adds("CHOWN")];
    for change in passes {
        assert_eq!(create("it-chart", change).0, Some(0), "a plain pod passes");
    }
}
