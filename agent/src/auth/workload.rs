//! What binds a service account's token to a pod: a token that was copied elsewhere is caught. Sans-IO.
//!
//! Kubernetes puts the pod and node that a bound token belongs to into the private claim `kubernetes.io`
//! (k8s.io/kubernetes `pkg/serviceaccount/claims.go`); the pod that a connection comes from is the kernel's word.

use serde_json::Value;
use weir_common::event::{Pod, UserInfo};

use super::{Refused, refused::pod_name};

/// The private claim.
pub(super) const CLAIM: &str = "kubernetes.io";

/// Checks that a verified token, whose claim [`CLAIM`] is `bound`, belongs to the pod, and to the node, that it arrives from. `of_cluster`: its issuer is
/// the cluster's own, whose tokens must be bound to a pod.
pub(crate) fn check_binding(
    bound: Option<&Value>,
    of_cluster: bool,
    pod: Option<&Pod>,
    node: &str,
) -> Result<(), Refused> {
    let bound = bound.unwrap_or(&Value::Null);
    if !of_cluster && bound["pod"].is_null() {
        return Ok(());
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (uid, name) = (text(&bound["pod"]["uid"]), text(&bound["pod"]["name"]));
    let elsewhere = |issued_to: String| Err(Refused::FromOtherPod { issued_to, arrived_from: pod_name(pod) });
    let namespace = text(&bound["namespace"]);
    if uid.is_empty() {
        let account = text(&bound["serviceaccount"]["name"]);
        return elsewhere(format!("service account {namespace}/{account}, bound to no pod"));
    }
    if pod.is_none_or(|pod| pod.uid != uid) {
        return elsewhere(format!("pod {namespace}/{name} (uid {uid})"));
    }
    let bound_node = text(&bound["node"]["name"]);
    if !bound_node.is_empty() && bound_node != node {
        return elsewhere(format!("pod {namespace}/{name} (uid {uid}) on node {bound_node}"));
    }
    Ok(())
}

/// The pod itself as a user, where it needs no token: named as Kubernetes names its service account.
pub(crate) fn user(pod: &Pod) -> UserInfo {
    let account = if pod.service_account.is_empty() { "default" } else { &pod.service_account };
    UserInfo {
        username: format!("system:serviceaccount:{}:{account}", pod.namespace),
        uid: String::new(),
        groups: vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{}", pod.namespace),
            "system:authenticated".to_owned(),
        ],
        extra: [
            ("authentication.kubernetes.io/pod-name", &pod.name),
            ("authentication.kubernetes.io/pod-uid", &pod.uid),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), vec![value.clone()]))
        .collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use weir_common::event::Pod;

    use super::{CLAIM, check_binding, user};

    fn pod() -> Pod {
        Pod {
            namespace: "ci".into(),
            name: "runner".into(),
            uid: "uid-a".into(),
            service_account: "deployer".into(),
            ..Pod::default()
        }
    }

    fn token(uid: &str, node: Option<&str>) -> Value {
        json!({"kubernetes.io": {
            "namespace": "ci",
            "pod": {"name": "other", "uid": uid},
            "node": node.map(|name| json!({"name": name})),
            "serviceaccount": {"name": "deployer"},
        }})
    }

    #[test]
    fn a_token_holds_only_in_the_pod_and_on_the_node_that_it_names() {
        let check = |claims: Value| check_binding(claims.get(CLAIM), true, Some(&pod()), "node-1");
        assert!(check(token("uid-a", Some("node-1"))).is_ok());
        assert!(check(token("uid-a", None)).is_ok());
        for (claims, part) in [
            (token("uid-b", Some("node-1")), "issued to pod ci/other (uid uid-b)"),
            (token("uid-a", Some("node-2")), "on node node-2"),
            (
                json!({"kubernetes.io": {"namespace": "ci", "serviceaccount": {"name": "x"}}}),
                "bound to no pod",
            ),
            (json!({}), "bound to no pod"),
            (json!({"kubernetes.io": {"pod": "uid-a"}}), "bound to no pod"),
        ] {
            let refused = check(claims).expect_err(part).to_string();
            assert!(refused.contains(part) && refused.contains("ci/runner (uid uid-a)"), "{refused}");
        }
        assert!(
            check_binding(token("", None).get(CLAIM), true, Some(&Pod::default()), "").is_err(),
            "no uid is no match"
        );
    }

    #[test]
    fn a_token_of_another_issuer_is_bound_only_if_it_says_so() {
        assert!(check_binding(None, false, Some(&pod()), "n").is_ok());
        assert!(check_binding(token("uid-b", None).get(CLAIM), false, Some(&pod()), "n").is_err());
        assert!(check_binding(token("uid-a", None).get(CLAIM), false, None, "n").is_err());
    }

    #[test]
    fn a_pod_without_a_token_is_named_as_its_service_account() {
        let user = user(&pod());
        assert_eq!(user.username, "system:serviceaccount:ci:deployer");
        assert_eq!(user.groups[1], "system:serviceaccounts:ci");
        assert_eq!(user.extra["authentication.kubernetes.io/pod-uid"], ["uid-a"]);
    }
}
