//! What the chart renders is what the API server takes: a part of the chart's test, before its release is there.

use std::fs;

use weir_tests::{Testbed, command, components};

use super::guides::Node;

/// What an API server serves from 1.36 on.
const MUTATING: &str = "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy";
/// The Prometheus operator's, which the chart has where it is asked for them.
const KINDS: [&str; 2] = ["servicemonitors.monitoring.coreos.com", "prometheusrules.monitoring.coreos.com"];

/// Everything that the golden values render is of the API server's own schema, no key unknown to it; and of the Prometheus operator's,
/// whose definitions of its kinds it has from then on, until [`are_known_no_more`].
pub(super) fn is_what_the_api_server_takes(node: &Node<'_>) {
    for definition in components::prometheus_operator_kinds().unwrap() {
        let file = definition.to_str().unwrap();
        node.testbed.kubectl(&["apply", "--server-side", "-f", file]).unwrap();
    }
    let kinds = KINDS.map(|kind| format!("crd/{kind}"));
    let served = ["wait", "--for=condition=Established", "--timeout=120s", &kinds[0], &kinds[1]];
    node.testbed.kubectl(&served).unwrap();
    let root = components::repository().join("deploy/helm");
    let file = node.scratch.join("rendered.yaml");
    for name in ["default", "everything", "monitored", "signer", "uninstall"] {
        let mut command =
            (node.helm)(&["template", "weir", "--kube-version", "1.36.0", "--api-versions", MUTATING]);
        command.arg(root.join("weir")).arg("--values").arg(root.join(format!("golden/{name}.values.yaml")));
        // Its text stands elsewhere, and is in no golden file.
        command.args(["--set", "monitoring.prometheusRule=true"]);
        let rendered = command::run(&mut command).unwrap();
        assert!(rendered.contains("kind: PrometheusRule"), "{name}");
        fs::write(&file, rendered).unwrap();
        let apply = ["apply", "--dry-run=server", "--validate=strict", "-f", file.to_str().unwrap()];
        node.testbed.kubectl(&apply).unwrap();
    }
}

/// Takes the Prometheus operator's kinds out of the cluster, and all objects of them with it.
pub(super) fn are_known_no_more(testbed: &Testbed) {
    let kinds = KINDS.map(|kind| format!("crd/{kind}"));
    testbed.kubectl(&["delete", "--ignore-not-found", "--wait=false", &kinds[0], &kinds[1]]).unwrap();
}
