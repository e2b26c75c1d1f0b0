//! The chart's approver, and what admission leaves an agent's token: on the real API server, in the name of an agent's service
//! account. That an agent's own request is approved shows in its being ready at all.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use weir_tests::{
    PodSpec, Testbed, certificates, command,
    testbed::{API_CLUSTER_IP, NODE_NAME},
    wait_until,
};

use super::{DEADLINE, monitoring, shown};

const AGENT: &str = "--as=system:serviceaccount:weir-system:weir-agent";
const SIGNER: &str = "kubernetes.io/kubelet-serving";
/// With every right, so that it is admission that refuses.
const MASTERS: &str = "--as-group=system:masters";

/// What the approver's metrics have of the requests below.
const COUNTED: [(&str, f64); 7] = [
    ("weir_approver_approved_total", 1.0),
    (r#"weir_approver_denied_total{reason="name"}"#, 3.0),
    (r#"weir_approver_denied_total{reason="life"}"#, 2.0),
    (r#"weir_approver_denied_total{reason="usages"}"#, 1.0),
    (r#"weir_approver_denied_total{reason="subject"}"#, 1.0),
    (r#"weir_approver_denied_total{reason="not_bound_to_node"}"#, 1.0),
    (r#"weir_approver_denied_total{reason="not_the_agent"}"#, 1.0),
];

/// What kubectl says to who acts as somebody else.
struct As<'a> {
    testbed: &'a Testbed,
    scratch: &'a Path,
}

impl As<'_> {
    fn kubectl(&self, who: &[&str], arguments: &[&str]) -> (Option<i32>, String, String) {
        shown(&command::output(self.testbed.kubectl_command().args(arguments).args(who)).unwrap())
    }

    /// Makes a request for a certificate as an agent makes it, but for `change`.
    fn ask(&self, who: &[&str], name: &str, names: &[&str], change: Value) -> (Option<i32>, String, String) {
        let usages = ["digital signature", "key encipherment", "server auth"];
        let pem = certificates::node_request(NODE_NAME, names).unwrap();
        let mut request = json!({
            "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": {"name": name},
            "spec": {"request": STANDARD.encode(pem), "signerName": SIGNER, "usages": usages, "expirationSeconds": 86400},
        });
        for (key, value) in change.as_object().unwrap() {
            request["spec"][key] = value.clone();
        }
        let file = self.scratch.join("request.json");
        fs::write(&file, request.to_string()).unwrap();
        self.kubectl(who, &["create", "-f", file.to_str().unwrap()])
    }

    #[track_caller]
    fn refused(&self, who: &[&str], arguments: &[&str], said: &str) {
        let (code, _, error) = self.kubectl(who, arguments);
        assert!(code != Some(0) && error.contains(said), "{arguments:?}: {code:?} {error}");
    }

    fn status(&self, name: &str) -> Value {
        let request = self.testbed.kubectl(&["get", "csr", name, "-o", "json"]).unwrap();
        serde_json::from_str::<Value>(&request).unwrap()["status"].clone()
    }

    #[track_caller]
    fn asked(&self, who: &[&str], name: &str, names: &[&str], change: Value) {
        let (code, _, error) = self.ask(who, name, names, change);
        assert_eq!(code, Some(0), "{name}: {error}");
    }

    #[track_caller]
    fn denied(&self, name: &str, said: &str) {
        let answered = wait_until(&format!("{name} to be answered"), DEADLINE, || {
            let status = self.status(name);
            Ok((!status["conditions"].is_null()).then_some(status))
        });
        let condition = answered.unwrap()["conditions"][0].clone();
        assert_eq!((&condition["type"], &condition["reason"]), (&json!("Denied"), &json!("WeirApprover")));
        let message = condition["message"].as_str().unwrap();
        assert!(message.contains(said), "{message}");
    }
}

/// A process that may be dumped belongs in /proc to its own user, one that may not to root (proc(5)).
fn leaves_no_core_dump() {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let is_it = |path: &PathBuf| {
        let line = fs::read_to_string(path.join("cmdline")).unwrap_or_default();
        line.contains("\0approver\0--service-account=weir-system/weir-agent\0")
    };
    let approvers: Vec<_> = processes.filter(is_it).collect();
    assert!(!approvers.is_empty());
    for folder in approvers {
        let status = fs::read_to_string(folder.join("status")).unwrap();
        assert!(status.contains("\nUid:\t65532\t"), "{status}");
        assert_eq!(fs::metadata(folder.join("status")).unwrap().uid(), 0);
    }
}

/// The release is installed, and its agent ready. `pod` is one of `it-chart`.
pub(super) fn answers_agents_alone((testbed, scratch): (&Testbed, &Path), (pod, uid): (&str, &str)) {
    let it = As { testbed, scratch };
    let of_node = |node: &str| format!("--as-user-extra=authentication.kubernetes.io/node-name={node}");
    let (node, other) = (of_node(NODE_NAME), of_node("another"));
    let agent = [AGENT, &node];
    let names = ["kubernetes.default.svc", API_CLUSTER_IP];
    let log = it.kubectl(&[], &["logs", "-n", "weir-system", "deployment/weir-approver"]).1;
    assert!(log.contains("approved") && log.contains(NODE_NAME), "{log}");

    leaves_no_core_dump();
    let monitored = monitoring::of_approver(testbed);
    let before = monitored.metrics();

    // Left alone: neither an agent's nor named as one.
    it.asked(&[], "somebody-elses", &names, json!({}));
    it.asked(&agent, "weir-serving-good", &names, json!({"expirationSeconds": 600}));
    it.asked(&agent, "weir-serving-name", &["kubernetes", "kubernetes.evil.example"], json!({}));
    it.asked(&agent, "weir-serving-wildcard", &["*.default.svc"], json!({}));
    it.asked(&agent, "weir-serving-address", &[API_CLUSTER_IP, "10.96.0.2"], json!({}));
    it.asked(&agent, "weir-serving-long", &names, json!({"expirationSeconds": 86401}));
    it.asked(&agent, "weir-serving-endless", &names, json!({"expirationSeconds": null}));
    let usages = json!({"usages": ["digital signature", "server auth", "client auth"]});
    it.asked(&agent, "weir-serving-usages", &names, usages);
    it.asked(&[AGENT, &other], "weir-serving-node", &names, json!({}));
    it.asked(&[AGENT], "weir-serving-unbound", &names, json!({}));
    let another = ["--as=system:serviceaccount:it-chart:default", MASTERS, &node];
    it.asked(&another, "weir-serving-account", &names, json!({}));
    it.denied(
        "weir-serving-name",
        "kubernetes.evil.example is not a name or address of the API server; those are",
    );
    it.denied("weir-serving-wildcard", "*.default.svc is not a name or address of the API server");
    it.denied("weir-serving-address", "10.96.0.2 is not a name or address of the API server");
    it.denied("weir-serving-long", "expirationSeconds is 86401, and must be given and at most 86400");
    it.denied("weir-serving-endless", "expirationSeconds is not given");
    it.denied("weir-serving-usages", "usages are digital signature, server auth, client auth, and may be");
    it.denied(
        "weir-serving-node",
        "must be O=system:nodes, CN=system:node:another, of the node that the token is",
    );
    it.denied("weir-serving-unbound", "names no node: it is bound to no pod");
    it.denied("weir-serving-account", "system:serviceaccount:it-chart:default asks, and only");
    let issued = wait_until("the certificate", DEADLINE, || {
        let status = it.status("weir-serving-good");
        Ok((!status["certificate"].is_null()).then_some(status))
    });
    assert_eq!(issued.unwrap()["conditions"][0]["reason"], "WeirApprover");
    assert!(it.status("somebody-elses")["conditions"].is_null(), "it is nobody's business here");
    let after = monitored.metrics();
    for (series, count) in COUNTED {
        assert_eq!(after[series] - before[series], count, "{series}");
    }

    let refused = |who: &[&str], arguments: &[&str], said: &str| it.refused(who, arguments, said);
    refused(&agent, &["certificate", "approve", "somebody-elses"], "forbidden");
    refused(
        &agent,
        &["delete", "csr", "somebody-elses"],
        "deletes its own requests for certificates, and no others",
    );
    refused(&agent, &["delete", "csr", "weir-serving-node"], "deletes its own requests");
    assert_eq!(it.kubectl(&agent, &["delete", "csr", "weir-serving-good"]).0, Some(0));
    for change in
        [json!({"signerName": "kubernetes.io/kube-apiserver-client"}), json!({"signerName": "example.com/a"})]
    {
        let (code, _, error) = it.ask(&agent, "weir-serving-signer", &names, change);
        assert!(code != Some(0) && error.contains("and no other signer"), "{error}");
    }

    // What follows a request in PEM is nobody's business, and would be read by all who read the request.
    let pem = certificates::node_request(NODE_NAME, &names).unwrap();
    let padded = json!({"request": STANDARD.encode(format!("{pem}{}", "\n".repeat(24 * 1024)))});
    let (code, _, error) = it.ask(&agent, "weir-serving-padded", &names, padded);
    assert!(code != Some(0) && error.contains("24 KiB at most"), "{error}");

    testbed.kubectl(&["delete", "csr", "--all"]).unwrap();
    mints_for_sts_alone(&it, &[AGENT, MASTERS, &node], (pod, uid));
}

/// What tokens an agent that may mint some has minted.
fn mints_for_sts_alone(it: &As<'_>, agent: &[&str], (pod, uid): (&str, &str)) {
    let refused = |who: &[&str], arguments: &[&str], said: &str| it.refused(who, arguments, said);
    let token = ["create", "token", "default", "-n", "it-chart"];
    let (audience, uid) = ("--audience=sts.amazonaws.com", format!("--bound-object-uid={uid}"));
    let bound = ["--bound-object-kind=Pod", &format!("--bound-object-name={pod}"), &uid];
    refused(agent, &token, "for sts.amazonaws.com alone");
    refused(agent, &[&token[..], &bound].concat(), "for sts.amazonaws.com alone");
    refused(agent, &[&token[..], &[audience]].concat(), "has tokens minted for a pod");
    let whole = [&token[..], &[audience], &bound].concat();
    refused(&[AGENT, MASTERS], &whole, "that the kubelet has mounted into its pod");
    refused(agent, &[&whole[..], &["--duration=61m"]].concat(), "for an hour at most");
    let elsewhere = ["create", "token", "default", "-n", "kube-system", audience];
    let elsewhere = [&elsewhere[..], &bound].concat();
    refused(agent, &elsewhere, "in namespaces that are enrolled (config.enrolment), and in no other");
    assert_eq!(it.kubectl(agent, &whole).0, Some(0));
    // The policies are for the agent's token: everybody else's requests pass, also where there is no pod whose node could be looked at.
    assert_eq!(it.testbed.kubectl(&["get", "pods", "-n", "kube-system", "-o", "name"]).unwrap(), "");
    it.testbed.kubectl(&["create", "token", "default", "-n", "kube-system"]).unwrap();
    // Nor for a pod of another node, or of none.
    let of_other_node = "--as-user-extra=authentication.kubernetes.io/node-name=another";
    let own_node = "for pods of the node that its own pod runs on, and for no others";
    refused(&[AGENT, MASTERS, of_other_node], &whole, own_node);
    let mut unscheduled = PodSpec::idle("it-chart", "unscheduled").manifest();
    unscheduled["spec"]["nodeSelector"] = json!({"no": "node"});
    it.testbed.apply(&unscheduled.to_string()).unwrap();
    let uid = ["get", "pod", "unscheduled", "-n", "it-chart", "-o", "jsonpath={.metadata.uid}"];
    let uid = format!("--bound-object-uid={}", it.testbed.kubectl(&uid).unwrap());
    let bound = ["--bound-object-kind=Pod", "--bound-object-name=unscheduled", &uid];
    refused(agent, &[&token[..], &[audience], &bound].concat(), own_node);
    it.testbed.kubectl(&["delete", "pod", "unscheduled", "-n", "it-chart", "--grace-period=0"]).unwrap();
    impersonates_whom_rbac_names(it);
}

/// Whom it may be, no policy can say: impersonation is judged before admission. A rule of `extraClusterRules` does, by name.
fn impersonates_whom_rbac_names(it: &As<'_>) {
    let role = [
        "create",
        "clusterrole",
        "it-impersonates",
        "--verb=impersonate",
        "--resource=users",
        "--resource-name=ci:a",
    ];
    it.testbed.kubectl(&role).unwrap();
    let account = ["--clusterrole=it-impersonates", "--serviceaccount=weir-system:weir-agent"];
    it.testbed
        .kubectl(&[&["create", "clusterrolebinding", "it-impersonates"], &account[..]].concat())
        .unwrap();
    let may = |user: &str| it.kubectl(&[AGENT], &["auth", "can-i", "impersonate", user]).1;
    wait_until("the rule to be in force", DEADLINE, || Ok((may("users/ci:a") == "yes\n").then_some(())))
        .unwrap();
    for other in ["users/ci:b", "users", "groups/system:masters", "serviceaccounts/default"] {
        assert_eq!(may(other), "no\n", "{other}");
    }
    it.testbed.kubectl(&["delete", "clusterrole,clusterrolebinding", "it-impersonates"]).unwrap();
}
