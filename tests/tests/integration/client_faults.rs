//! Clients that go in the middle, and a watch that does not end.

use std::thread;

use weir_common::event::{Caller, Event, Kind, Outcome};
use weir_tests::{Pod, PodSpec, agent::TrustSource, audit, testbed::API_CLUSTER_IP, wait_until};

use super::{
    DEADLINE, Scene,
    client::{RawClient, Requests, token},
    clients::contains,
    peak_resident_kib,
};

/// Whether this is the end of a request whose client went away within its body. It is seen as the end of the connection or as
/// that of the body, whichever comes first.
fn broke_off(event: &Event) -> bool {
    match &event.kind {
        Kind::ConnectionRefused { reason, .. } => reason.contains("ended in the middle of its body"),
        Kind::RequestClosed(closed) => closed.outcome == Outcome::ClientAborted,
        _ => false,
    }
}

/// A request that creates an object, up to the first of the thousand bytes of its body.
fn half_a_request(pod: &Pod<'_>) -> String {
    let (namespace, token) = (&pod.namespace, token(pod));
    format!(
        "POST /api/v1/namespaces/{namespace}/configmaps HTTP/1.1\r\nHost: {API_CLUSTER_IP}\r\n\
         Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"
    )
}

#[test]
fn a_request_whose_client_goes_in_the_middle_of_its_body_is_recorded_and_not_forwarded() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-gone", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-gone", "caller")).unwrap();
    let _agent = scene.agent(TrustSource::ClusterSigner);
    let mut client = RawClient::connect(&scene.testbed, &pod, API_CLUSTER_IP, "http/1.1");
    client.send(half_a_request(&pod).as_bytes()).unwrap();
    pod.shell("killall -9 nc").unwrap();
    drop(client);
    scene.event("the request that broke off", broke_off);
    let audited = audit::read(&scene.testbed.layout().audit_log()).unwrap();
    let created = |entry: &&audit::AuditEntry| {
        entry.pod_uid.as_deref() == Some(pod.uid.as_str()) && entry.verb == "create"
    };
    assert_eq!(audited.iter().filter(created).count(), 0);
}

/// How many file descriptors a process has.
fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn a_pod_that_is_deleted_in_the_middle_of_its_requests_leaves_closed_records_and_nothing_open() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-deleted", true);
    let stays = scene.testbed.run_pod(&PodSpec::idle("it-deleted", "stays")).unwrap();
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    let mut other = Requests::new(&scene.testbed, &stays);
    // Connections to the API server are kept for the next request: those of a first round are there before it is counted.
    let mut before = None;
    let mut streams = Vec::new();
    for (round, name) in ["first", "second"].into_iter().enumerate() {
        let pod = scene.testbed.run_pod(&PodSpec::idle("it-deleted", name)).unwrap();
        pod.shell("kubectl get configmaps -n it-deleted -w -o name >/dev/null 2>&1 &").unwrap();
        pod.shell("kubectl exec -n it-deleted stays -- sleep 1000 >/dev/null 2>&1 &").unwrap();
        let mut client = RawClient::connect(&scene.testbed, &pod, API_CLUSTER_IP, "http/1.1");
        client.send(half_a_request(&pod).as_bytes()).unwrap();
        let uid = pod.uid.clone();
        let is_pod = |caller: &Caller| caller.pod.as_ref().is_some_and(|pod| pod.uid == uid);
        let session = scene.event(
            "the pod's session",
            |event| matches!(&event.kind, Kind::SessionStarted { caller, .. } if is_pod(caller)),
        );
        let open = ["watch", "exec"].map(|what| {
            let opened = |event: &Event| {
                event.session == session.session
                    && matches!(&event.kind, Kind::RequestOpened(opened)
                        if [&opened.attributes.verb, &opened.attributes.subresource].contains(&&what.to_owned()))
            };
            scene.event(what, opened).request
        });
        pod.delete().unwrap();
        drop(client);
        for request in &open {
            let closed = scene.event("the end of what the pod had open", |event| {
                event.request == *request && matches!(event.kind, Kind::RequestClosed(_))
            });
            let Kind::RequestClosed(closed) = closed.kind else { unreachable!() };
            assert_eq!(closed.outcome, Outcome::ClientAborted, "{:?}", closed.reason);
        }
        streams.extend(open);
        wait_until("the request that broke off", DEADLINE, || {
            let broken = |event: &&Event| broke_off(event) && !streams.contains(&event.request);
            Ok((scene.events().iter().filter(broken).count() == round + 1).then_some(()))
        })
        .unwrap();
        assert_eq!(other.read().status, 200, "another pod sees nothing of it");
        let most = *before.get_or_insert_with(|| descriptors(agent.pid()));
        wait_until("the pod's descriptors to be closed", DEADLINE, || {
            Ok((descriptors(agent.pid()) <= most).then_some(()))
        })
        .unwrap();
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}

/// Changes that a watch sees.
const CHANGES: usize = 2_000;
const _: () = assert!(CHANGES.is_multiple_of(4 * WRITERS * CHANGES_AT_ONCE));
/// Clients that ask for them, each of its own object: each change waits for the disk, and those of one client for each other.
const WRITERS: usize = 5;
/// How many of them one asks for before the first is answered.
const CHANGES_AT_ONCE: usize = 50;

#[test]
fn memory_stays_flat_over_a_watch_of_thousands_of_events() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-watch", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-watch", "caller")).unwrap();
    let agent = scene.agent(TrustSource::ClusterSigner);
    let name = |writer: usize| format!("changing-{writer}");
    let mut writers: Vec<_> = (0..WRITERS).map(|_| Requests::new(&scene.testbed, &pod)).collect();
    for (number, writer) in writers.iter_mut().enumerate() {
        assert_eq!(writer.create(&name(number), 4_000).status, 201);
    }
    pod.shell("kubectl get configmaps -n it-watch -w -o name >/dev/null 2>&1 &").unwrap();
    let opened = scene.event(
        "the watch",
        |event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.verb == "watch"),
    );
    let mut change = |markers: std::ops::Range<usize>| {
        thread::scope(|scope| {
            let each = markers.len() / WRITERS;
            for (number, writer) in writers.iter_mut().enumerate() {
                let first = markers.start + number * each;
                scope.spawn(move || {
                    for first in (first..first + each).step_by(CHANGES_AT_ONCE) {
                        writer.mark(&name(number), first..first + CHANGES_AT_ONCE);
                    }
                });
            }
        });
    };
    // The first ones fill what is kept for the next.
    change(0..CHANGES / 4);
    std::fs::write(format!("/proc/{}/clear_refs", agent.pid()), "5").unwrap();
    let before = peak_resident_kib(agent.pid());
    change(CHANGES..2 * CHANGES);
    let grown = peak_resident_kib(agent.pid()).saturating_sub(before);
    println!("a watch of {CHANGES} events: peak resident memory {before} KiB + {grown} KiB");
    assert!(grown < 12 * 1024, "grew by {grown} KiB");
    // Without this, a watch that had stalled would be as flat.
    let last = (1..=WRITERS).map(|writer| format!("marker-{}", CHANGES + writer * CHANGES / WRITERS - 1));
    let last: Vec<_> = last.collect();
    wait_until("the last changes in the record of the watch", DEADLINE, || {
        let of_watch = scene.events().into_iter().filter(|event| event.request == opened.request);
        let bodies = of_watch.filter_map(|event| match event.kind {
            Kind::Content(content) => content.bytes.to_vec().ok(),
            _ => None,
        });
        let told: Vec<u8> = bodies.flatten().collect();
        Ok(last.iter().all(|marker| contains(&told, marker.as_bytes())).then_some(()))
    })
    .unwrap();
}
