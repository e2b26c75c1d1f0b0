//! The agent's memory while much passes: what a stream, a list or a copy has in it must not stay.
//!
//! With `WEIR_TEST_LONG=1` an exec writes 1 GiB and 64 MiB go through one each way, and a list has 200 MiB.

use std::{fs, path::Path};

use weir_common::event::{Channel, Event, Kind};
use weir_tests::{AgentProcess, Pod, PodSpec, agent, agent::TrustSource, wait_until};

use super::{DEADLINE, Scene, peak_resident_kib, random_text};

const NAMESPACE: &str = "it-large";
/// Most that memory may grow once there is what is kept for the next request: pools, arenas, the writer's buffers.
const GROWN_KIB_MAX: u64 = 8 * 1024;
/// Bytes that an exec writes: first, then while memory is watched. What comes from the server goes on before it is on disk.
const FIRST_BYTES: u64 = 16 << 20;
const BYTES: u64 = 32 << 20;
const BYTES_LONG: u64 = 1 << 30;
/// Bytes through an exec each way, where each piece waits for the disk.
const BOTH_WAYS_BYTES_LONG: u64 = 64 << 20;
/// Objects of a list, of 1,000,000 bytes each, and how often it is read.
const OBJECTS: usize = 25;
const OBJECTS_LONG: usize = 210;
const LISTS: usize = 4;

fn is_long() -> bool {
    std::env::var_os("WEIR_TEST_LONG").is_some()
}

/// Runs `work` and says by how much the memory of the agent was larger meanwhile than at its peak before.
fn grown_kib(agent: &AgentProcess, what: &str, work: impl FnOnce()) -> u64 {
    fs::write(format!("/proc/{}/clear_refs", agent.pid()), "5").unwrap();
    let before = peak_resident_kib(agent.pid());
    work();
    let grown = peak_resident_kib(agent.pid()).saturating_sub(before);
    eprintln!("{what}: peak resident memory {before} KiB + {grown} KiB");
    grown
}

/// Has a program write so many bytes.
fn written(pod: &Pod<'_>, bytes: u64) {
    let script = format!("kubectl exec -n {NAMESPACE} caller -- head -c {bytes} /dev/zero | wc -c");
    assert_eq!(pod.shell(&script).unwrap().trim(), bytes.to_string());
}

/// Sends so many bytes into a program that sends them back.
fn both_ways(pod: &Pod<'_>, bytes: u64) {
    let script = format!("head -c {bytes} /dev/zero | kubectl exec -i -n {NAMESPACE} caller -- cat | wc -c");
    assert_eq!(pod.shell(&script).unwrap().trim(), bytes.to_string());
}

/// Bytes of all files in a folder and those below it.
fn bytes_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(
            |entry| {
                if entry.path().is_dir() { bytes_in(&entry.path()) } else { entry.metadata().unwrap().len() }
            },
        )
        .sum()
}

/// Bytes of output that are on record.
fn shown_on_record(scene: &Scene) -> u64 {
    let bytes = |event: &Event| match &event.kind {
        Kind::Content(content) if content.channel == Channel::Stdout => {
            content.bytes.to_vec().unwrap().len() as u64
        }
        _ => 0,
    };
    wait_until("the end of the last exec", DEADLINE, || {
        let events = scene.events();
        let ended = events.iter().filter(
            |event| matches!(&event.kind, Kind::RequestClosed(closed) if closed.exit_code == Some(0)),
        );
        Ok((ended.count() == 2).then(|| events.iter().map(bytes).sum()))
    })
    .unwrap()
}

#[test]
fn memory_stays_flat_over_large_lists_and_long_streams() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace(NAMESPACE, true);
    let pod = scene.testbed.run_pod(&PodSpec::idle(NAMESPACE, "caller")).unwrap();
    // Random, since the API server compresses large lists.
    let objects = if is_long() { OBJECTS_LONG } else { OBJECTS };
    for index in 0..objects {
        let value = random_text(1_000_000);
        let object = serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": format!("large-{index}"), "namespace": NAMESPACE}, "data": {"value": value},
        });
        let file = scene.scratch.path().join("large.json");
        fs::write(&file, object.to_string()).unwrap();
        scene.testbed.kubectl(&["create", "-f", file.to_str().unwrap()]).unwrap();
    }
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["journal"]["bytesMax"] = serde_json::json!(8_u64 << 30);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    let get = format!("kubectl get --raw /api/v1/namespaces/{NAMESPACE}/configmaps | wc -c");
    let list = || {
        let bytes: usize = pod.shell(&get).unwrap().trim().parse().unwrap();
        assert!(bytes > objects * 1_000_000, "{bytes}");
    };
    list();
    let of_lists =
        grown_kib(&agent, &format!("{LISTS} lists of {objects} MB"), || (0..LISTS).for_each(|_| list()));
    scene.event("a list whose record says that it is cut", |event| {
        matches!(&event.kind, Kind::RequestClosed(closed)
            if closed.response_bytes > 15_000_000 && closed.body.as_ref().is_some_and(|body| body.truncated.is_some()))
    });
    written(&pod, FIRST_BYTES);
    let bytes = if is_long() { BYTES_LONG } else { BYTES };
    let of_stream = grown_kib(&agent, &format!("{bytes} bytes of an exec"), || written(&pod, bytes));
    // A stream that is not recorded takes no memory either. More than some of it is not read into this process.
    let recorded = if is_long() { bytes_in(&scene.journal()) } else { shown_on_record(&scene) };
    assert!(recorded >= bytes + if is_long() { 0 } else { FIRST_BYTES }, "{recorded} bytes of record");
    if is_long() {
        let bytes = BOTH_WAYS_BYTES_LONG;
        let of_both = grown_kib(&agent, &format!("{bytes} bytes each way"), || both_ways(&pod, bytes));
        assert!(of_both < GROWN_KIB_MAX, "both ways: grew by {of_both} KiB");
    }
    assert!(of_lists < GROWN_KIB_MAX, "lists: grew by {of_lists} KiB");
    assert!(of_stream < GROWN_KIB_MAX, "a stream: grew by {of_stream} KiB");
}
