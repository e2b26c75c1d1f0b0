//! What operators and disks do to a broker while a pod works, one after the other on the same broker: rights taken, messages too
//! large, a full disk that leaves a partition without leader, a password changed, a topic deleted. What kubectl said was made is
//! on the topic in the end; what was deleted with it comes again from the node, whose segments stay for the replay window.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use weir_tests::{Kafka, Pod, PodSpec, kafka::Message, wait_until};

use super::{
    Scene,
    kafka::{
        CHECKPOINTS, EVENTS, PUBLISHED_DEADLINE, Recorded, check, configuration, epochs, published, recorded,
        sound, source, wait_until_published, weir,
    },
    kafka_faults::{Ledger, check_ledger, note, sent_again},
    monitoring::Monitored,
    shown,
    storage_faults::Mounted,
};

/// What the user's password becomes.
const ROTATED: &str = "another-for-tests";

/// Two disks of the broker's, and what holds them.
fn disks(scene: &Scene) -> (Vec<PathBuf>, Vec<Mounted>) {
    let paths = [scene.scratch.path().join("disk-1"), scene.scratch.path().join("disk-2")];
    let mount = |path: &PathBuf| Mounted::new(&["-t", "tmpfs", "-o", "size=64m"], Path::new("none"), path);
    let mounted = paths.iter().map(mount).collect();
    (paths.to_vec(), mounted)
}

/// The file that fills a disk.
const FILLER: &str = "filler";

fn fill(disk: &Path) {
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(disk.join(FILLER)).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

/// Waits until monitoring has nothing to complain of and no backlog.
#[track_caller]
pub(super) fn recovered(monitored: &Monitored, from: &str) {
    wait_until(&format!("publishing to go on after {from}"), PUBLISHED_DEADLINE, || {
        let (_, text) = monitored.get("/readyz")?;
        let is_published = monitored.metrics()["weir_kafka_backlog_bytes"] == 0.0;
        Ok((is_published && !text.contains("not in Kafka yet")).then_some(()))
    })
    .unwrap();
}

/// Checks that what has the same key came in its order, not counting what came once more.
#[track_caller]
pub(super) fn check_order(messages: &[Message]) {
    let (mut seen, mut last) = (BTreeSet::new(), BTreeMap::new());
    for message in messages {
        let id = message.header("ce_id").unwrap();
        if let (true, Some(key)) = (seen.insert(id), &message.key) {
            let (epoch, sequence) = id.split_once('/').unwrap();
            let sequence: u64 = sequence.parse().unwrap();
            let before = last.insert((key.clone(), epoch.to_owned()), sequence);
            assert!(before < Some(sequence), "{id} came after {before:?}");
        }
    }
}

fn make_events(kafka: &Kafka) {
    kafka.create_topic(EVENTS, 4, &[]).unwrap();
    kafka.allow(EVENTS).unwrap();
}

/// The part of the configuration that publishes by a password in a file.
fn publishing(kafka: &Kafka, password: &Path) -> Value {
    let secured = kafka.secured();
    std::fs::write(password, secured.password).unwrap();
    json!({
        "brokers": [secured.bootstrap], "topic": EVENTS, "checkpointTopic": CHECKPOINTS,
        "properties": {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": secured.user,
            "ssl.ca.location": secured.certificate_authority,
            // A topic may be new, so that the client waits for it; 30 s unless it is told otherwise.
            "topic.metadata.propagation.max.ms": "1000",
        },
        "propertyFiles": {"sasl.password": password},
    })
}

fn right_is_taken(kafka: &Kafka, monitored: &Monitored, ledger: &mut Ledger) {
    kafka.forbid(EVENTS).unwrap();
    ledger.go_on(3, "without the right to write");
    note(monitored, "the brokers refuse the agent");
    kafka.allow(EVENTS).unwrap();
    recovered(monitored, "the right to write is back");
}

fn messages_are_too_large(kafka: &Kafka, monitored: &Monitored, ledger: &mut Ledger) {
    kafka.set_topic(EVENTS, "max.message.bytes", Some("300")).unwrap();
    ledger.go_on(3, "while messages are too large");
    note(monitored, "set its max.message.bytes to at least");
    kafka.set_topic(EVENTS, "max.message.bytes", None).unwrap();
    recovered(monitored, "messages are not too large");
}

/// The disk of the partition that the pod's session is on has no room; while the broker is started anew, the password becomes
/// another.
fn disk_is_full(kafka: &mut Kafka, monitored: &Monitored, ledger: &mut Ledger, of_pod: u32, password: &Path) {
    let full = kafka.disk_of(EVENTS, of_pod).unwrap().to_owned();
    wait_until("the partition to have no leader", PUBLISHED_DEADLINE, || {
        // Again and again: the broker may give back some.
        fill(&full);
        ledger.go_on(1, "while a disk of the broker is full");
        Ok(kafka.leaderless(EVENTS)?.contains(&of_pod).then_some(()))
    })
    .unwrap();
    wait_until("a backlog", PUBLISHED_DEADLINE, || {
        Ok((monitored.metrics()["weir_kafka_backlog_bytes"] > 0.0).then_some(()))
    })
    .unwrap();
    kafka.set_password(ROTATED).unwrap();
    std::fs::remove_file(full.join(FILLER)).unwrap();
    kafka.kill().unwrap();
    kafka.restart().unwrap();
    ledger.go_on(3, "with a password that is none any more");
    note(monitored, "the brokers refuse the agent");
    std::fs::write(password, ROTATED).unwrap();
    recovered(monitored, "the password was renewed");
}

/// Somebody deletes the topic with all that is on it. The pod goes on while there is none; what comes then waits.
fn topic_is_deleted(kafka: &Kafka, monitored: &Monitored, pod: &Pod<'_>) -> BTreeSet<String> {
    // Before the pod goes on: what is acknowledged until then goes with the topic.
    kafka.delete_topic(EVENTS).unwrap();
    let mut ledger = Ledger::start(pod, "third");
    ledger.go_on(3, "while there is no topic");
    note(monitored, &format!("topic {EVENTS} does not exist"));
    make_events(kafka);
    recovered(monitored, "the topic was made anew");
    let made = ledger.end(pod);
    recovered(monitored, "the pod has ended");
    check_order(&kafka.messages(EVENTS).unwrap());
    // What somebody deleted is missed by who verifies the topic.
    let (code, out, err) = shown(&weir(&["verify", "--from", &source(&kafka.bootstrap())]));
    assert_ne!(code, Some(0), "{out}{err}");
    made
}

/// As docs/kafka.md has it: no agent runs, `cursor` goes, an agent starts. All that the journal has comes once more then.
fn is_published_again(scene: &Scene, kafka: &Kafka, configuration: Value) -> BTreeMap<String, Vec<Message>> {
    let before = published(kafka);
    for epoch in epochs(&scene.journal()) {
        std::fs::remove_file(epoch.join("cursor")).unwrap();
    }
    let (mut agent, monitored) = Monitored::start_with(scene, configuration);
    wait_until_published(kafka, &scene.journal());
    let sent_again = sent_again(&monitored);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let after = published(kafka);
    let (recorded, mut again) = (recorded(&scene.journal()), 0);
    check(&recorded, &after);
    for Recorded { id, .. } in &recorded {
        let [before, after] = [&before, &after].map(|messages| messages.get(id).map_or(0, Vec::len));
        again += after.saturating_sub(before + 1);
    }
    assert!(again <= sent_again, "{again} came more than once, {sent_again} were on their way");
    after
}

#[test]
fn whatever_is_done_to_a_broker_nothing_that_a_pod_was_told_is_missing() {
    let Some(mut scene) = Scene::new() else { return };
    let (paths, _mounted) = disks(&scene);
    let mut kafka = Kafka::start_guarded(&paths).unwrap();
    make_events(&kafka);
    kafka.create_topic(CHECKPOINTS, 1, &[]).unwrap();
    kafka.allow(CHECKPOINTS).unwrap();
    scene.namespace("it-broker", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-broker", "caller")).unwrap();
    let password = scene.scratch.path().join("password");
    let configuration = configuration(&scene, publishing(&kafka, &password));
    let (mut agent, monitored) = Monitored::start_with(&scene, configuration.clone());
    let mut ledger = Ledger::start(&pod, "first");
    ledger.go_on(3, "before");
    recovered(&monitored, "the start");
    right_is_taken(&kafka, &monitored, &mut ledger);
    messages_are_too_large(&kafka, &monitored, &mut ledger);
    // Who reads while somebody writes comes to no end.
    let mut made = ledger.end(&pod);
    let of_pod = kafka.messages(EVENTS).unwrap().pop().unwrap().partition;
    let mut ledger = Ledger::start(&pod, "second");
    disk_is_full(&mut kafka, &monitored, &mut ledger, of_pod, &password);
    made.append(&mut ledger.end(&pod));

    // What is on the topic before it is deleted is known.
    let mut on_topic = wait_until_published(&kafka, &scene.journal());
    check_order(&kafka.messages(EVENTS).unwrap());
    made.append(&mut topic_is_deleted(&kafka, &monitored, &pod));
    let sent_again = sent_again(&monitored);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    // What was not deleted is known already.
    for (id, messages) in published(&kafka) {
        let known = on_topic.entry(id).or_default();
        let fresh: Vec<_> = messages.into_iter().filter(|message| !known.contains(message)).collect();
        known.extend(fresh);
    }
    let recorded = recorded(&scene.journal());
    check_ledger(&made, None, &on_topic);
    let again = check(&recorded, &on_topic);
    println!("{} objects, {} frames, {again} of them once more", made.len(), recorded.len());
    assert!(again <= sent_again, "{again} messages came again, {sent_again} were on their way");
    assert!(!agent.log().unwrap().contains(ROTATED));

    let whole = is_published_again(&scene, &kafka, configuration);
    check_ledger(&made, None, &whole);
    let report = sound(&source(&kafka.bootstrap()), &[]);
    assert_eq!(report["epochs"].as_array().map(Vec::len), Some(2), "{report:#}");
}
