//! Clients that go in the middle, and a watch that does not end.

use weir_common::event::{Kind, Outcome};
use weir_tests::{PodSpec, agent::TrustSource, audit, testbed::API_CLUSTER_IP};

use super::{
    Scene,
    client::{RawClient, Requests, token},
    peak_resident_kib,
};

#[test]
fn a_request_whose_client_goes_in_the_middle_of_its_body_is_recorded_and_not_forwarded() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-gone", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-gone", "caller")).unwrap();
    let _agent = scene.agent(TrustSource::ClusterSigner);
    let mut client = RawClient::connect(&scene.testbed, &pod, API_CLUSTER_IP, "http/1.1");
    let token = token(&pod);
    let head = format!(
        "POST /api/v1/namespaces/it-gone/configmaps HTTP/1.1\r\nHost: {API_CLUSTER_IP}\r\n\
         Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"
    );
    client.send(head.as_bytes()).unwrap();
    pod.shell("killall -9 nc").unwrap();
    drop(client);
    // Its end is seen as that of the connection or as that of the body, whichever comes first.
    scene.event("the request that broke off", |event| match &event.kind {
        Kind::ConnectionRefused { reason, .. } => reason.contains("ended in the middle of its body"),
        Kind::RequestClosed(closed) => closed.outcome == Outcome::ClientAborted,
        _ => false,
    });
    let audited = audit::read(&scene.testbed.layout().audit_log()).unwrap();
    let created = |entry: &&audit::AuditEntry| {
        entry.pod_uid.as_deref() == Some(pod.uid.as_str()) && entry.verb == "create"
    };
    assert_eq!(audited.iter().filter(created).count(), 0);
}

/// Changes that a watch sees.
const CHANGES: usize = 2_000;
/// How many of them are asked for before the first is answered.
const CHANGES_AT_ONCE: usize = 50;

#[test]
fn memory_stays_flat_over_a_watch_of_thousands_of_events() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-watch", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-watch", "caller")).unwrap();
    let agent = scene.agent(TrustSource::ClusterSigner);
    let mut requests = Requests::new(&scene.testbed, &pod);
    assert_eq!(requests.create("changing", 4_000).status, 201);
    pod.shell("kubectl get configmaps -n it-watch -w -o name >/dev/null 2>&1 &").unwrap();
    let opened = scene.event(
        "the watch",
        |event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.verb == "watch"),
    );
    let mut change = |count: usize| {
        for first in (0..count).step_by(CHANGES_AT_ONCE) {
            requests.mark("changing", first..first + CHANGES_AT_ONCE);
        }
    };
    // The first ones fill what is kept for the next.
    change(CHANGES / 4);
    std::fs::write(format!("/proc/{}/clear_refs", agent.pid()), "5").unwrap();
    let before = peak_resident_kib(agent.pid());
    change(CHANGES);
    let grown = peak_resident_kib(agent.pid()).saturating_sub(before);
    println!("a watch of {CHANGES} events: peak resident memory {before} KiB + {grown} KiB");
    assert!(grown < 12 * 1024, "grew by {grown} KiB");
    // Without this, a watch that had stalled would be as flat.
    let last = format!("marker-{}", CHANGES - 1);
    scene.event("the last change in the record of the watch", |event| {
        event.request == opened.request
            && matches!(&event.kind, Kind::Content(content) if content.bytes.to_vec().is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(&last)))
    });
}
