//! A runner of Actions Runner Controller, as its chart and its controller make it, with an image of ours: nobody changes the pod for
//! Weir, and what it does goes through it.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::{Value, json};
use weir_common::event::{Caller, Event, IdentityMethod, Kind};
use weir_tests::{agent, components, wait_until};

use super::{
    super::{DEADLINE, Scene, guard::direct_requests, guides, identity::own_issuer},
    JOURNAL,
    release::Release,
};

pub(super) const NAMESPACE: &str = "it-arc";
const RUNNER: &str = include_str!("arc-runner.yaml");
/// What `run.sh` of the image does on the API, as the hooks of `kubernetes` mode do: verb, resource, subresource.
const DONE: [(&str, &str, &str); 7] = [
    ("create", "selfsubjectaccessreviews", ""),
    ("list", "pods", ""),
    ("create", "secrets", ""),
    ("create", "pods", ""),
    ("get", "pods", ""),
    ("get", "pods", "exec"),
    ("delete", "pods", ""),
];

/// The rule of the guide that is for it.
const RULE: &str = "the-runners-own-calls";

/// The release has that rule, for this namespace; by no other one do its pods go on, and all others do.
pub(super) fn goes_on_by_the_guides_rule(release: &Release<'_>, scene: &Scene) {
    let rule = guides::block("arc", &format!("- name: {RULE}"));
    assert_eq!(rule.matches("'arc-runners'").count(), 2, "{rule}");
    let rule = rule.replace("'arc-runners'", &format!("'{NAMESPACE}'"));
    let mut roles: Value = serde_yaml_ng::from_str(&rule).unwrap();
    roles.as_array_mut().unwrap().push(json!({
        "name": "others", "when": format!("pod.namespace != '{NAMESPACE}'"),
        "takes": ["token", "workload", "unverified"], "passThrough": {},
    }));
    let defaults = components::repository().join("deploy/helm/weir/values.yaml");
    let defaults: Value = serde_yaml_ng::from_str(&fs::read_to_string(defaults).unwrap()).unwrap();
    let mut clusters = defaults["config"]["clusters"].clone();
    clusters[0]["authentication"] = json!({"jwt": [own_issuer(scene)]});
    clusters[0]["roles"] = roles;
    release.change_values(|all| all["config"]["clusters"] = clusters);
}

/// The namespace is enrolled, with the admission policy in force.
pub(super) fn works_unchanged(release: &Release<'_>, scene: &Scene) {
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": NAMESPACE},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "standard",
            "hostPath": {"path": release.scratch.join("runner"), "type": "DirectoryOrCreate"},
        },
    });
    release.testbed.apply(&volume.to_string()).unwrap();
    release.testbed.apply(RUNNER).unwrap();
    let get = ["get", "pod", "runners-abcde", "-n", NAMESPACE, "-o", "json"];
    let pod = wait_until("the runner to end", 3 * DEADLINE, || {
        let pod: Value = serde_json::from_str(&release.testbed.kubectl(&get)?)?;
        Ok(matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")).then_some(pod))
    })
    .unwrap();
    let log = release.testbed.kubectl(&["logs", "runners-abcde", "-n", NAMESPACE]).unwrap();
    assert_eq!(pod["status"]["phase"], "Succeeded", "{log}\n{}", release.told());
    assert!(log.contains("said by the job"), "{log}");

    let submitted = RUNNER.rsplit("\n---\n").next().unwrap();
    let submitted: Value = serde_yaml_ng::from_str(submitted).unwrap();
    let mut made = pod["spec"].clone();
    // The API server gives every pod its account's token.
    let token =
        |object: &Value| object["name"].as_str().is_some_and(|name| name.starts_with("kube-api-access-"));
    made["volumes"].as_array_mut().unwrap().retain(|volume| !token(volume));
    made["containers"][0]["volumeMounts"].as_array_mut().unwrap().retain(|mount| !token(mount));
    let mut all = added(&submitted["spec"], &made, "spec");
    for of in ["labels", "annotations"] {
        let given = submitted["metadata"].get(of).cloned().unwrap_or_else(|| json!({}));
        let has = pod["metadata"].get(of).cloned().unwrap_or_else(|| json!({}));
        all.extend(added(&given, &has, &format!("metadata.{of}")));
    }
    all.retain(|key| !DEFAULTS.contains(&key.as_str()));
    assert!(all.is_empty(), "was added to the pod: {all:?}");

    let uid = pod["metadata"]["uid"].as_str().unwrap().to_owned();
    let events = agent::read_events(Path::new(JOURNAL)).unwrap();
    let sessions: BTreeSet<_> = events
        .iter()
        .filter(|event| matches!(&event.kind, Kind::SessionStarted { caller } if is_of(caller, &uid)))
        .map(|event| event.session.clone())
        .collect();
    let opened = |event: &Event| match &event.kind {
        Kind::RequestOpened(opened) if sessions.contains(&event.session) => Some(opened.clone()),
        _ => None,
    };
    let opened: Vec<_> = events.iter().filter_map(opened).collect();
    for request in &opened {
        let by = request.identity.as_deref().map(|identity| (identity.method, identity.rule.as_deref()));
        assert_eq!(by, Some((IdentityMethod::Token, Some(RULE))), "{request:?}");
    }
    let done: BTreeSet<_> = opened
        .iter()
        .map(|opened| &opened.attributes)
        .map(|of| (of.verb.as_str(), of.resource.as_str(), of.subresource.as_str()))
        .collect();
    let left: Vec<_> = DONE.iter().filter(|request| !done.contains(*request)).collect();
    assert!(left.is_empty(), "not on record: {left:?}; but {done:?}");
    let direct = direct_requests(scene, &BTreeSet::from([uid]));
    assert!(direct.is_empty(), "{direct:?}");
    release.testbed.kubectl(&["delete", "persistentvolume", NAMESPACE, "--wait=false"]).unwrap();
}

fn is_of(caller: &Caller, uid: &str) -> bool {
    caller.pod.as_ref().is_some_and(|pod| pod.uid == uid)
}

/// What the API server, the scheduler and the control plane add to every pod.
const DEFAULTS: [&str; 19] = [
    "spec.containers.env.valueFrom.fieldRef.apiVersion",
    "spec.containers.imagePullPolicy",
    "spec.containers.resources",
    "spec.containers.terminationMessagePath",
    "spec.containers.terminationMessagePolicy",
    "spec.dnsPolicy",
    "spec.enableServiceLinks",
    "spec.nodeName",
    "spec.preemptionPolicy",
    "spec.priority",
    "spec.schedulerName",
    "spec.securityContext",
    "spec.serviceAccount",
    "spec.terminationGracePeriodSeconds",
    "spec.tolerations",
    "spec.volumes.ephemeral.volumeClaimTemplate.metadata",
    "spec.volumes.ephemeral.volumeClaimTemplate.metadata.creationTimestamp",
    "spec.volumes.ephemeral.volumeClaimTemplate.spec.volumeMode",
    "metadata.annotations.kubectl.kubernetes.io/last-applied-configuration",
];

/// Whether all of it was taken as it was submitted; gives what was added, but for lists, which have nothing else.
#[track_caller]
fn added(submitted: &Value, made: &Value, at: &str) -> Vec<String> {
    match (submitted, made) {
        (Value::Object(submitted), Value::Object(all)) => {
            let there =
                submitted.iter().flat_map(|(key, value)| added(value, &made[key], &format!("{at}.{key}")));
            let others = all.keys().filter(|key| !submitted.contains_key(*key));
            there.chain(others.map(|key| format!("{at}.{key}"))).collect()
        }
        (Value::Array(submitted), Value::Array(made)) => {
            assert_eq!(submitted.len(), made.len(), "{at}: {made:?}");
            submitted.iter().zip(made).flat_map(|(one, other)| added(one, other, at)).collect()
        }
        _ => {
            assert_eq!(submitted, made, "{at}");
            Vec::new()
        }
    }
}
