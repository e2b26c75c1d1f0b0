//! A runner of Actions Runner Controller, as its chart and its controller make it, with an image of ours: nobody changes the pod for
//! Weir, and what it does goes through it.

use std::{collections::BTreeSet, path::Path};

use serde_json::{Value, json};
use weir_common::event::{Caller, Kind};
use weir_tests::{agent, wait_until};

use super::{
    super::{DEADLINE, Scene, guard::direct_requests},
    JOURNAL,
    release::Release,
};

pub(super) const NAMESPACE: &str = "it-arc";
const RUNNER: &str = include_str!("arc-runner.yaml");
/// What `run.sh` of the image does on the API, as the hooks of `kubernetes` mode do: verb, resource, subresource.
const DONE: [(&str, &str, &str); 6] = [
    ("list", "pods", ""),
    ("create", "secrets", ""),
    ("create", "pods", ""),
    ("get", "pods", ""),
    ("get", "pods", "exec"),
    ("delete", "pods", ""),
];

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
    is_there(&submitted["spec"], &made, "spec");
    assert!(made["initContainers"].is_null(), "{made}");

    let uid = pod["metadata"]["uid"].as_str().unwrap().to_owned();
    let events = agent::read_events(Path::new(JOURNAL)).unwrap();
    let sessions: BTreeSet<_> = events
        .iter()
        .filter(|event| matches!(&event.kind, Kind::SessionStarted { caller } if is_of(caller, &uid)))
        .map(|event| event.session.clone())
        .collect();
    let done: BTreeSet<_> = events
        .iter()
        .filter(|event| sessions.contains(&event.session))
        .filter_map(|event| match &event.kind {
            Kind::RequestOpened(opened) => {
                let of = &opened.attributes;
                Some((of.verb.as_str(), of.resource.as_str(), of.subresource.as_str()))
            }
            _ => None,
        })
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

/// Whether all of it was taken as it was submitted, and lists have nothing else.
#[track_caller]
fn is_there(submitted: &Value, made: &Value, at: &str) {
    match (submitted, made) {
        (Value::Object(submitted), Value::Object(_)) => {
            for (key, value) in submitted {
                is_there(value, &made[key], &format!("{at}.{key}"));
            }
        }
        (Value::Array(submitted), Value::Array(made)) => {
            assert_eq!(submitted.len(), made.len(), "{at}: {made:?}");
            for (one, other) in submitted.iter().zip(made) {
                is_there(one, other, at);
            }
        }
        _ => assert_eq!(submitted, made, "{at}"),
    }
}
