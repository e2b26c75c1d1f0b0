//! A pod that clients attach to and run things in: a container for each of them.

use serde_json::{Value, json};
use weir_tests::{Testbed, testbed::AGENT_IMAGE};

/// A container with a keyboard, which runs a script.
pub(super) fn container(name: &str, tty: bool, script: &str) -> Value {
    json!({
        "name": name, "image": AGENT_IMAGE, "imagePullPolicy": "Never", "stdin": true, "tty": tty,
        "command": ["/bin/sh", "-c", script],
    })
}

/// Runs the pod, whose name is `target`, and waits until it is ready.
#[track_caller]
pub(super) fn run(testbed: &Testbed, namespace: &str, containers: &[Value]) {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "target", "namespace": namespace},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": containers},
    });
    testbed.apply(&pod.to_string()).unwrap();
    let ready = ["wait", "pod/target", "-n", namespace, "--for=condition=Ready", "--timeout=300s"];
    testbed.kubectl(&ready).unwrap();
}
