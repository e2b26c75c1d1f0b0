//! What the demo's agent pod does: the objects it needs and the commands it runs, as a person would type them.
//!
//! The commands use the pod's own kubectl with its own service account; nothing in them or in the pod names Weir.

use serde_json::json;

/// Namespace of the agent pod: enrolled by its label.
pub(super) const AGENTS: &str = "demo-agents";

/// Namespace that the agent pod works on.
pub(super) const WORK: &str = "demo-work";

/// Name of the agent pod and of its service account.
pub(super) const AGENT: &str = "agent";

/// The pod that the agent enters and copies to.
pub(super) const WORKER: &str = "worker";

/// A value that must not be in any record.
pub(super) const SECRET: &str = "correct-horse-battery-staple";

/// One step: its title and a script for the pod's shell.
pub(super) struct Step {
    pub(super) title: &'static str,
    pub(super) script: String,
}

/// The service account of the agent pod and its rights in [`WORK`].
pub(super) fn rights() -> String {
    let rule = |resources: &[&str], verbs: &[&str]| json!({"apiGroups": [""], "resources": resources, "verbs": verbs});
    let objects = json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": AGENT, "namespace": AGENTS},
            },
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "Role",
                "metadata": {"name": AGENT, "namespace": WORK},
                "rules": [
                    rule(
                        &["pods", "configmaps", "secrets"],
                        &["get", "list", "watch", "create", "update", "patch", "delete"],
                    ),
                    rule(&["pods/log"], &["get"]),
                    rule(&["pods/exec"], &["get", "create"]),
                ],
            },
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "RoleBinding",
                "metadata": {"name": AGENT, "namespace": WORK},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": AGENT},
                "subjects": [{"kind": "ServiceAccount", "name": AGENT, "namespace": AGENTS}],
            },
        ],
    });
    objects.to_string()
}

/// The commands, in order.
pub(super) fn steps(image: &str) -> Vec<Step> {
    let step =
        |title, script: &str| Step { title, script: format!("set -e\n{}", script.replace("WORK", WORK)) };
    vec![
        step("get", "kubectl get pods -n WORK"),
        step("apply", &format!("kubectl apply -n WORK -f - <<'END'\n{}END\n", objects(image))),
        step(
            "get -w",
            // The watch is ended once it has shown the change that is made beside it.
            r#"kubectl get configmap settings -n WORK -w -o 'jsonpath={.data.colour}{"\n"}' >/tmp/watch &
watch=$!
until grep -q blue /tmp/watch; do sleep 0.2; done
kubectl patch configmap settings -n WORK -p '{"data":{"colour":"green"}}'
until grep -q green /tmp/watch; do sleep 0.2; done
kill $watch
cat /tmp/watch"#,
        ),
        step(
            "logs -f",
            // Ends by itself when the container does; waiting for the start is kubectl's.
            "kubectl wait -n WORK --for=jsonpath='{.status.containerStatuses[0].started}' pod/printer --timeout=60s ||
kubectl wait -n WORK --for=jsonpath='{.status.phase}'=Succeeded pod/printer --timeout=60s
kubectl logs -n WORK -f printer",
        ),
        step("exec", "kubectl exec -n WORK worker -- sh -c 'hostname; echo to standard error >&2'"),
        step("exec -i", "echo hello from the agent | kubectl exec -i -n WORK worker -- tee /tmp/greeting"),
        step(
            "cp to the pod and back",
            "head -c 100000 /dev/urandom >/tmp/there
kubectl cp /tmp/there WORK/worker:/tmp/copy
kubectl cp WORK/worker:/tmp/copy /tmp/back
cmp /tmp/there /tmp/back && echo the copies are equal",
        ),
        step("get secret", "kubectl get secret password -n WORK -o jsonpath='{.data.value}' | base64 -d | wc -c"),
        step("a refusal of the API server", "! kubectl get nodes"),
        step("delete", "kubectl delete configmap/settings secret/password pod/printer -n WORK"),
    ]
}

fn objects(image: &str) -> String {
    format!(
        "apiVersion: v1
kind: ConfigMap
metadata: {{name: settings}}
data: {{colour: blue}}
---
apiVersion: v1
kind: Secret
metadata: {{name: password}}
stringData: {{value: {SECRET}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: printer}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: {image}
    imagePullPolicy: Never
    command: [/bin/sh, -c, 'for line in 1 2 3 4 5; do echo line $line; sleep 0.5; done']
"
    )
}
