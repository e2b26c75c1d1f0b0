//! Every kind of container and pod that a kubelet makes: what each does with the API server is that pod's, in the record as in
//! the API server's own audit log.

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::{Value, json};
use weir_common::event::{Event, Kind};
use weir_tests::{
    Coverage,
    agent::TrustSource,
    audit,
    testbed::{AGENT_IMAGE, API_CLUSTER_IP},
    wait_until,
};

use super::{DEADLINE, Scene};

/// What a container asks for as its first instruction: an object that is not there and bears the container's name.
fn ask(container: &str) -> String {
    format!("kubectl get configmap asked-by-{container} --ignore-not-found")
}

fn container(name: &str, script: &str) -> Value {
    json!({
        "name": name, "image": AGENT_IMAGE, "imagePullPolicy": "Never",
        "command": ["/bin/sh", "-c", format!("trap 'exit 0' TERM; {script}")],
    })
}

/// A request of nobody: without any credential kubectl asks for one, and passwords mean nothing to the API server.
fn as_nobody(path: &str) -> String {
    format!(
        "kubectl --server https://{API_CLUSTER_IP} --insecure-skip-tls-verify --username nobody --password none get --raw {path}"
    )
}

const THEN_WAIT: &str = "while :; do sleep 1000 & wait $!; done";

/// Who asked for `asked-by-NAME` by the journal: the names and pod UIDs of their sessions and containers' ids.
fn askers(events: &[Event], name: &str) -> Vec<(String, String)> {
    let session = |event: &Event| event.session.clone();
    let asked = events.iter().filter(|event| {
        matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.name == format!("asked-by-{name}"))
    });
    asked
        .map(|asked| {
            let pod = events.iter().find_map(|event| match &event.kind {
                Kind::SessionStarted { caller } if session(event) == asked.session => caller.pod.clone(),
                _ => None,
            });
            let container = events.iter().find_map(|event| match &event.kind {
                Kind::InvocationStarted { container, .. } if event.invocation == asked.invocation => {
                    container.clone()
                }
                _ => None,
            });
            (pod.unwrap_or_default().uid, container.map(|container| container.id).unwrap_or_default())
        })
        .collect()
}

#[test]
fn every_container_of_a_pod_is_intercepted_from_its_first_instruction() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-kinds", true);
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    // The second main container fails once, so that it is started a second time.
    let once =
        format!("{} && if [ ! -e /shared/failed ]; then touch /shared/failed; exit 1; fi", ask("again"));
    let mounted = |mut container: Value| {
        container["volumeMounts"] = json!([{"name": "shared", "mountPath": "/shared"}]);
        container
    };
    let mut sidecar = container("sidecar", &format!("{}; {THEN_WAIT}", ask("sidecar")));
    sidecar["restartPolicy"] = json!("Always");
    let pod = |name: &str, host_network: bool| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "it-kinds", "name": name},
            "spec": {
                "restartPolicy": "OnFailure", "terminationGracePeriodSeconds": 1, "hostNetwork": host_network,
                "volumes": [{"name": "shared", "emptyDir": {}}],
                "initContainers": [container("first", &ask("first")), sidecar],
                "containers": [
                    container("main", &format!("{}; {THEN_WAIT}", ask("main"))),
                    mounted(container("again", &format!("{once}; {THEN_WAIT}"))),
                ],
            },
        })
    };
    for (name, host_network) in [("kinds", false), ("kinds-host", true)] {
        scene.testbed.apply(&pod(name, host_network).to_string()).unwrap();
        let found = wait_until(&format!("the containers of {name} to run"), 2 * DEADLINE, || {
            let pod = scene.testbed.kubectl(&["get", "pod", name, "-n", "it-kinds", "-o", "json"])?;
            let pod: Value = serde_json::from_str(&pod)?;
            let statuses = pod["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
            let runs = statuses.len() == 2 && statuses.iter().all(|status| status["ready"] == true);
            let again = statuses.iter().any(|status| status["restartCount"] == 1);
            Ok((runs && again).then_some(pod))
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", agent.last_lines()));
        let uid = found["metadata"]["uid"].as_str().unwrap();
        let debug =
            ["debug", name, "-n", "it-kinds", "--quiet", "--image", AGENT_IMAGE, "--container", "debugger"];
        let mut debug = debug.to_vec();
        // An ephemeral container has no service account's token.
        let ask = as_nobody("/api/v1/namespaces/it-kinds/configmaps/asked-by-debugger");
        let script = format!("{ask}; {THEN_WAIT}");
        debug.extend(["--image-pull-policy=Never", "--", "sh", "-c", &script]);
        scene.testbed.kubectl(&debug).unwrap();
        let asked = |events: &[Event], container: &str| -> BTreeSet<String> {
            let askers = askers(events, container).into_iter();
            askers.filter(|(asker, _)| asker == uid).map(|(_, container)| container).collect()
        };
        // The restarted container is another one of the same name.
        for (container, starts) in [("first", 1), ("sidecar", 1), ("main", 1), ("again", 2), ("debugger", 1)]
        {
            wait_until(&format!("what {container} of {name} asked for"), DEADLINE, || {
                let asked = asked(&scene.events(), container);
                Ok((asked.len() == starts && !asked.contains("")).then_some(()))
            })
            .unwrap_or_else(|error| panic!("{error:#}: {}", agent.last_lines()));
        }
        let audit = audit::finished_by_pod(&scene.testbed.layout().audit_log(), uid).unwrap();
        let coverage = Coverage::compare(&audit, &scene.events(), uid);
        assert!(coverage.unrecorded.is_empty(), "{:?}", coverage.unrecorded);
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}

/// A static pod's manifest, there as long as this value.
struct Manifest(PathBuf);

impl Drop for Manifest {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn a_static_pod_is_enrolled_by_the_hash_that_names_its_cgroup() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-static", true);
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    // Until its mirror is known it is refused.
    let ask = as_nobody("/version");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "it-static", "name": "static"},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [container("main", &format!("until {ask}; do sleep 0.1; done; {THEN_WAIT}"))],
        },
    });
    let manifest = Manifest(scene.testbed.layout().path("static-pods").join("static.json"));
    fs::write(&manifest.0, pod.to_string()).unwrap();
    let started = scene.event("the static pod's session", |event| {
        matches!(&event.kind, Kind::SessionStarted { caller }
            if caller.pod.as_ref().is_some_and(|pod| pod.namespace == "it-static" && pod.name.starts_with("static-")))
    });
    scene.event("what it asked for", |event| {
        event.session == started.session
            && matches!(&event.kind, Kind::RequestOpened(opened) if opened.uri.starts_with("/version"))
    });
    // A direct call would have been one of nobody that has no record.
    let audit = audit::read(&scene.testbed.layout().audit_log()).unwrap();
    let events = scene.events();
    let recorded: BTreeSet<&str> = events.iter().filter_map(|event| event.request.as_deref()).collect();
    let (ours, direct): (Vec<_>, Vec<_>) = audit
        .iter()
        .filter(|entry| entry.request_uri.starts_with("/version") && entry.user == "system:anonymous")
        .partition(|entry| recorded.contains(entry.audit_id.as_str()));
    assert!(direct.is_empty(), "{direct:?}");
    assert!(!ours.is_empty(), "the audit log has what the pod asked for");
    drop(manifest);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}
