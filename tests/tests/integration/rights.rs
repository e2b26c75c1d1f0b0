//! What the chart's roles grant is what their holders use, by the API server's own audit log: a part of the chart's test, near its end.

use std::collections::BTreeSet;

use serde_json::Value;
use weir_tests::{Testbed, audit};

/// Resource and verb.
type Right = (String, String);

/// Of each account, what no request of its own needs to show: granted by the test's values, asked about by admission on another
/// one's request, or used only where something came too early or failed.
const UNSEEN: [(&str, &[(&str, &str)]); 2] = [
    (
        "weir-agent",
        &[("nodes", "get"), ("pods", "get"), ("namespaces", "get"), ("certificatesigningrequests", "get")],
    ),
    ("weir-approver", &[("signers", "approve")]),
];

/// Of the cluster, and of the namespace `default`.
fn granted(testbed: &Testbed, account: &str) -> BTreeSet<Right> {
    let roles = [vec!["clusterrole", account], vec!["role", account, "-n", "default"]];
    let rules = roles.into_iter().flat_map(|role| {
        let text = testbed.kubectl(&[&["get", "-o", "json"], &role[..]].concat()).unwrap();
        let role: Value = serde_json::from_str(&text).unwrap();
        role["rules"].as_array().unwrap().clone()
    });
    let texts = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let rights = rules.flat_map(|rule| {
        let verbs = texts(&rule["verbs"]);
        let of = move |resource: String| {
            verbs.clone().into_iter().map(move |verb| (resource.clone(), verb)).collect::<Vec<_>>()
        };
        texts(&rule["resources"]).into_iter().flat_map(of).collect::<Vec<_>>()
    });
    rights.collect()
}

/// The hook's, whose roles are gone by then: what it may do, as `templates/uninstall.yaml` has it, and what it did.
const HOOK: [(&str, &[(&str, &str)]); 2] = [
    ("weir-uninstall", &[("daemonsets", "delete"), ("daemonsets", "get"), ("pods", "list")]),
    ("weir-uninstall-node", &[("daemonsets", "get")]),
];

pub(super) fn of_the_hook_are_all_used(testbed: &Testbed) {
    let entries = audit::read(&testbed.layout().audit_log()).unwrap();
    for (account, granted) in HOOK {
        let used = used(&entries, account);
        let granted = granted.iter().map(|(resource, verb)| ((*resource).to_owned(), (*verb).to_owned()));
        assert_eq!(used, granted.collect(), "{account}");
    }
}

fn used(entries: &[audit::AuditEntry], account: &str) -> BTreeSet<Right> {
    let user = format!("system:serviceaccount:weir-system:{account}");
    let own = entries.iter().filter(|entry| entry.user == user && !entry.resource.is_empty());
    own.map(|entry| (entry.resource.clone(), entry.verb.clone())).collect()
}

pub(super) fn are_all_used(testbed: &Testbed) {
    let entries = audit::read(&testbed.layout().audit_log()).unwrap();
    for (account, unseen) in UNSEEN {
        let used = used(&entries, account);
        let granted = granted(testbed, account);
        assert!(granted.len() > 4, "{granted:?}");
        let is_seen = |(resource, verb): &&Right| !unseen.contains(&(resource.as_str(), verb.as_str()));
        let needless: Vec<_> = granted.difference(&used).filter(is_seen).collect();
        assert!(needless.is_empty(), "{account} may do what it never does: {needless:?}; it did {used:?}");
    }
}
