//! From the pod to the SIEM: a real agent, a real Kafka, rsyslog and OpenSearch with the files of `deploy/siem`. What must be there
//! is known from the journal.

use std::collections::BTreeMap;

use serde_json::Value;
use weir_common::event::Event;
use weir_tests::{Kafka, OpenSearch, PodSpec, Rsyslog, kafka::Message, wait_until};

use super::{
    Scene,
    kafka::{EVENTS, PUBLISHED_DEADLINE, kafka, publishing, recorded, start, wait_until_published},
};

/// Events of the journal by the id of their document.
fn ledger(scene: &Scene) -> BTreeMap<String, Value> {
    let events = recorded(&scene.journal()).into_iter().filter(|frame| !frame.id.contains("/checkpoint/"));
    events.map(|frame| (frame.id.clone(), serde_json::from_str(&frame.value).unwrap())).collect()
}

#[test]
fn every_event_is_found_in_the_store_by_its_key_whatever_was_killed() {
    let Some(mut scene) = Scene::new() else { return };
    let kafka = kafka();
    let mut store = OpenSearch::start().unwrap();
    let rsyslog = Rsyslog::start(&kafka.bootstrap(), &store).unwrap();
    scene.namespace("it-siem", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-siem", "caller")).unwrap();
    let mut agent = start(&scene, publishing(&kafka.bootstrap()), "agent.log");
    let work = |round: &str| {
        pod.shell(&format!(
            "kubectl create configmap {round} -n it-siem --from-literal=a='ü \"quoted\"'
             kubectl get pods,configmaps -n it-siem -o yaml
             kubectl exec -n it-siem caller -- sh -c 'echo through a stream'"
        ))
        .unwrap();
    };
    let stored = |what: &str, expected: &BTreeMap<String, Value>| {
        let ids: Vec<String> = expected.keys().cloned().collect();
        let found = wait_until(what, PUBLISHED_DEADLINE, || {
            let found = store_documents(&store, &ids)?;
            Ok((found.len() == ids.len()).then_some(found))
        });
        found.unwrap_or_else(|error| panic!("{error}; {}", rsyslog.said()))
    };
    work("one");
    wait_until_published(&kafka, &scene.journal());
    stored("the first events to be in the store", &ledger(&scene));

    // The store is away while events come, and comes back.
    store.kill().unwrap();
    work("two");
    wait_until_published(&kafka, &scene.journal());
    store.restart().unwrap();
    work("three");
    // Some come twice, and one is of somebody else.
    let again = kafka.messages(EVENTS).unwrap();
    let again: Vec<_> = again.iter().take(5).collect();
    for message in &again {
        kafka.produce(EVENTS, message.key.as_deref(), &message.value).unwrap();
    }
    kafka.produce(EVENTS, None, "{\"hello\":1}").unwrap();
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let expected = ledger(&scene);
    let ids: Vec<String> = expected.keys().cloned().collect();
    let found = wait_until("all events to be in the store", PUBLISHED_DEADLINE, || {
        let found = store_documents(&store, &ids)?;
        Ok((found.len() == ids.len()).then_some(found))
    });
    let found = found.unwrap_or_else(|error| panic!("{error}; {}", rsyslog.said()));
    wait_until("what is of others to be put aside", PUBLISHED_DEADLINE, || {
        Ok((rsyslog.foreign() == 1).then_some(()))
    })
    .unwrap();

    // Each is what was recorded, with its time in front; none is there twice, and nothing else is.
    for mut document in found {
        let event: Event = serde_json::from_value(document.clone()).unwrap();
        let milliseconds = document.as_object_mut().unwrap().remove("@timestamp").unwrap();
        assert_eq!(milliseconds.as_i64(), Some(event.time_unix_us / 1000));
        assert_eq!(document, expected[&format!("{}/{}", event.epoch, event.sequence)]);
    }
    let all =
        wait_until("the store to have counted", PUBLISHED_DEADLINE, || Ok(Some(store.count("*")?))).unwrap();
    assert_eq!(all, expected.len() as u64);
    println!("{all} events in the store, {} of them sent twice", again.len());

    // Found by what an analyst asks for.
    let by = |query: &str| store.count(query).unwrap();
    let (_, first) = expected.iter().next().unwrap();
    let key = format!("epoch:\"{}\" AND sequence:{}", first["epoch"].as_str().unwrap(), first["sequence"]);
    assert_eq!(by(&key), 1, "{key}");
    assert_eq!(
        by("type:requestOpened AND data.attributes.verb:create AND data.attributes.resource:configmaps"),
        3
    );
    assert_eq!(by("type:requestOpened AND data.attributes.subresource:exec"), 3);
    assert_eq!(by("type:sessionStarted AND data.caller.pod.name:caller"), 1);
    assert_eq!(by("@timestamp:[now-1h TO now]"), all);
}

fn store_documents(store: &OpenSearch, ids: &[String]) -> anyhow::Result<Vec<Value>> {
    // There is no index before the first event.
    Ok(store.documents(ids).unwrap_or_default())
}

/// What is on a topic.
struct Sizes {
    messages: u64,
    /// Keys, headers and values.
    plain: u64,
    /// In the broker's log: compressed, with the overhead of batches.
    stored: u64,
}

fn sizes(kafka: &Kafka) -> Sizes {
    let messages = kafka.messages(EVENTS).unwrap();
    let of = |message: &Message| {
        let headers: usize = message.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        message.key.as_deref().map_or(0, str::len) + headers + message.value.len()
    };
    let plain = messages.iter().map(|message| of(message) as u64).sum();
    Sizes { messages: messages.len() as u64, plain, stored: kafka.stored_bytes(EVENTS).unwrap() }
}

/// The table of docs/siem.md: `WEIR_TEST_LONG=1 cargo test -p weir-tests --test integration -- siem::what_requests_cost --nocapture`.
#[test]
fn what_requests_cost_on_the_topic() {
    let requests: u64 = if std::env::var_os("WEIR_TEST_LONG").is_some() { 50 } else { 5 };
    let Some(mut scene) = Scene::new() else { return };
    let kafka = kafka();
    scene.namespace("it-siem-sizes", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-siem-sizes", "caller")).unwrap();
    let mut agent = start(&scene, publishing(&kafka.bootstrap()), "agent.log");
    // Sessions, invocations and discovery belong to no kind of request.
    let loops = |command: &str| {
        pod.shell(&format!("for n in $(seq {requests}); do {command}; done >/dev/null")).unwrap();
        wait_until_published(&kafka, &scene.journal());
    };
    let filler = "for n in $(seq 50); do kubectl create configmap filler-$n --from-literal=a=$(seq -s- 300) -o name; done";
    pod.shell(filler).unwrap();
    loops("kubectl get --raw /version");
    println!("| request | messages | bytes, plain | bytes on the topic |");
    for (what, command) in [
        ("get of a pod", "kubectl get --raw /api/v1/namespaces/it-siem-sizes/pods/caller"),
        ("list of 50 objects of 1 KB", "kubectl get --raw /api/v1/namespaces/it-siem-sizes/configmaps"),
        ("exec of `true`", "kubectl exec caller -- true"),
        ("create of an object of 1 KB", "kubectl create configmap more-$n --from-literal=a=$(seq -s- 300)"),
    ] {
        let before = sizes(&kafka);
        loops(command);
        let after = sizes(&kafka);
        let each = |count: fn(&Sizes) -> u64| (count(&after) - count(&before)) / requests;
        let (messages, plain, stored) = (each(|s| s.messages), each(|s| s.plain), each(|s| s.stored));
        println!("| {what} | {messages} | {plain} | {stored} |");
        assert!(messages >= 3 && stored > 0 && stored < plain, "{what}: {messages}, {plain}, {stored}");
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}
