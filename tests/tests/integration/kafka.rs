//! What the journal has is on Kafka, byte for byte, and answers the same; what is there may leave the node. Faults are in
//! `kafka_faults`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use serde_json::{Value, json};
use weir_common::{
    envelope::Envelope,
    frame::FrameType,
    segment::{SegmentHeader, SegmentReader},
};
use weir_tests::{
    AgentProcess, Kafka, Pod, PodSpec, agent, agent::TrustSource, command, kafka::Message, wait_until,
};

use super::{
    DEADLINE, Scene,
    answers::{answers_the_same, shows_progress},
    client::Requests,
    evidence::{
        CANARY, KEYS, KeyPair, check_order, only_recipients_read, proves_silence, signed_by, silences,
        verified_by_others,
    },
    kafka_faults::{requests_of, stays_after_acknowledgement},
    monitoring::{Monitored, check_documented},
    shown,
};

/// Where events go, and where checkpoints go.
pub(super) const EVENTS: &str = "weir-events";
pub(super) const CHECKPOINTS: &str = "weir-checkpoints";

/// Until what was recorded is on a topic: a client that has lost its broker waits between its tries.
pub(super) const PUBLISHED_DEADLINE: Duration = Duration::from_secs(120);

/// More events than any of these tests records.
const OBJECTS_MAX: usize = 200;

/// A frame of a journal.
#[derive(Clone, Debug)]
pub(super) struct Recorded {
    /// As the header `ce_id` of its message must have it.
    pub(super) id: String,
    pub(super) epoch: String,
    pub(super) sequence: u64,
    pub(super) kind: FrameType,
    envelope: Envelope,
    pub(super) value: String,
    /// What verifies the epoch's checkpoints.
    verifier: String,
}

/// A broker with both topics.
pub(super) fn kafka() -> Kafka {
    let kafka = Kafka::start().unwrap();
    // Each by a Java that takes its time to start.
    std::thread::scope(|scope| {
        scope.spawn(|| kafka.create_topic(EVENTS, 3, &[]).unwrap());
        kafka.create_topic(CHECKPOINTS, 1, &[]).unwrap();
    });
    kafka
}

/// Both topics, as `weir` takes them.
pub(super) fn source(bootstrap: &str) -> String {
    format!("kafka://{bootstrap}/{EVENTS},{CHECKPOINTS}")
}

/// The part of the configuration that publishes to `bootstrap`.
pub(super) fn publishing(bootstrap: &str) -> Value {
    json!({"brokers": [bootstrap], "topic": EVENTS, "checkpointTopic": CHECKPOINTS})
}

/// The configuration of an agent that publishes so.
pub(super) fn configuration(scene: &Scene, kafka: Value) -> Value {
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["kafka"] = kafka;
    configuration
}

/// Starts such an agent; `name` is that of its log.
pub(super) fn start(scene: &Scene, kafka: Value, name: &str) -> AgentProcess {
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration(scene, kafka), &path).unwrap();
    AgentProcess::start(&path, &scene.scratch.path().join(name)).unwrap()
}

/// What `weir-agent doctor` found and how to mend it, of what has this name and is not as it should be.
#[track_caller]
pub(super) fn doctor(configuration: &Path, name: &str) -> String {
    let binary = agent::built_binary("weir-agent").unwrap();
    let output =
        command::output(Command::new(binary).args(["doctor", "--json", "--config"]).arg(configuration));
    let (_, out, err) = shown(&output.unwrap());
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    let checks = report["checks"].as_array().unwrap();
    let check =
        checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}: {out}"));
    assert_eq!(check["ok"], false, "{check}");
    format!("{}; {}", check["found"].as_str().unwrap(), check["mend"].as_str().unwrap_or_default())
}

/// The built `weir`.
pub(super) fn weir(arguments: &[&str]) -> Output {
    command::output(Command::new(agent::built_binary("weir").unwrap()).args(arguments)).unwrap()
}

/// Folders of a journal's epochs, the oldest first.
pub(super) fn epochs(journal: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(journal).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries.filter(|path| path.join("node.pub").is_file()).collect();
    folders.sort();
    folders
}

/// Segments of an epoch, in order.
pub(super) fn segments(epoch: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(epoch).unwrap().map(|entry| entry.unwrap().path());
    let mut segments: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|end| end == "seg")).collect();
    segments.sort();
    segments
}

/// What the segments of an epoch hold, in order. One that goes meanwhile, as what is published does, has them read anew.
fn contents_of(epoch: &Path) -> Vec<Vec<u8>> {
    wait_until("an epoch to be read whole", DEADLINE, || {
        let contents: std::io::Result<Vec<_>> = segments(epoch).iter().map(std::fs::read).collect();
        match contents {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            contents => Ok(Some(contents?)),
        }
    })
    .unwrap()
}

/// All frames of a journal, read without the agent and without `weir`.
pub(super) fn recorded(journal: &Path) -> Vec<Recorded> {
    let mut recorded = Vec::new();
    for folder in epochs(journal) {
        let epoch = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let verifier = std::fs::read_to_string(folder.join("node.pub")).unwrap().trim().to_owned();
        let contents = contents_of(&folder);
        for (number, bytes) in contents.iter().enumerate() {
            let next = contents.get(number + 1);
            let next =
                next.and_then(|bytes| SegmentHeader::decode(bytes).ok()).map(|next| next.first_sequence);
            // One that is being made holds nothing yet.
            let Ok(reader) = SegmentReader::new(bytes, next) else { continue };
            for located in reader {
                let frame = located.unwrap().frame;
                let (sequence, signed) = (frame.sequence, frame.envelope.time_unix_us);
                let id = match frame.frame_type {
                    FrameType::Event => format!("{epoch}/{sequence}"),
                    FrameType::Checkpoint => format!("{epoch}/checkpoint/{sequence}/{signed}"),
                };
                let value = String::from_utf8(frame.value.to_vec()).unwrap();
                let (epoch, verifier) = (epoch.clone(), verifier.clone());
                let (kind, envelope) = (frame.frame_type, frame.envelope);
                recorded.push(Recorded { id, epoch, sequence, kind, envelope, value, verifier });
            }
        }
    }
    recorded
}

/// The messages of both topics by the header `ce_id`, each as often as it is there.
pub(super) fn published(kafka: &Kafka) -> BTreeMap<String, Vec<Message>> {
    let mut messages = BTreeMap::<_, Vec<_>>::new();
    for topic in [EVENTS, CHECKPOINTS] {
        for message in kafka.messages(topic).unwrap() {
            let id = message.header("ce_id").unwrap_or_else(|| panic!("no id: {message:?}")).to_owned();
            assert_eq!(id.contains("/checkpoint/"), topic == CHECKPOINTS, "{id} is on {topic}");
            messages.entry(id).or_default().push(message);
        }
    }
    messages
}

/// Waits until all that the journal has is on the topics.
#[track_caller]
pub(super) fn wait_until_published(kafka: &Kafka, journal: &Path) -> BTreeMap<String, Vec<Message>> {
    wait_until("the journal to be on the topics", PUBLISHED_DEADLINE, || {
        let recorded = recorded(journal);
        let published = published(kafka);
        Ok(recorded.iter().all(|frame| published.contains_key(&frame.id)).then_some(published))
    })
    .unwrap()
}

/// Checks that every frame is there, each time with its own bytes and what its envelope says. Returns how many messages are
/// there once more.
#[track_caller]
pub(super) fn check(recorded: &[Recorded], published: &BTreeMap<String, Vec<Message>>) -> usize {
    let mut again = 0;
    for frame in recorded {
        let messages = published.get(&frame.id).unwrap_or_else(|| panic!("{} is not published", frame.id));
        for message in messages {
            let key = message.key.as_deref().unwrap_or_default();
            assert_eq!(key, frame.envelope.key, "{}", frame.id);
            assert_ne!(message.key.as_deref(), Some(""), "{}: an empty key is none", frame.id);
            assert_eq!(message.value, frame.value, "{}", frame.id);
            let headers: BTreeSet<_> = message.headers.iter().cloned().collect();
            assert_eq!(headers.len(), message.headers.len(), "{}: a header twice", frame.id);
            assert_eq!(headers, expected_headers(frame), "{}", frame.id);
        }
        again += messages.len() - 1;
    }
    again
}

/// CloudEvents 1.0 in the binary mode of its Kafka binding.
fn expected_headers(frame: &Recorded) -> BTreeSet<(String, String)> {
    let envelope = &frame.envelope;
    let seconds = envelope.time_unix_us.div_euclid(1_000_000);
    let mut time = jiff::Timestamp::from_second(seconds).unwrap().strftime("%Y-%m-%dT%H:%M:%S").to_string();
    write!(time, ".{:06}Z", envelope.time_unix_us.rem_euclid(1_000_000)).unwrap();
    let content_type = match frame.kind {
        FrameType::Event => "application/json",
        FrameType::Checkpoint => "text/plain; charset=utf-8",
    };
    let mut headers = vec![
        ("ce_specversion", "1.0"),
        ("ce_id", &frame.id),
        ("ce_source", &envelope.source),
        ("ce_type", &envelope.event_type),
        ("ce_time", &time),
        ("content-type", content_type),
    ];
    let key_id = envelope.key_id.to_string();
    if envelope.key_id != 0 {
        headers.push(("ce_weirkeyid", &key_id));
    }
    if frame.kind == FrameType::Checkpoint {
        headers.push(("ce_weirverifier", &frame.verifier));
    }
    headers.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The report of `weir verify --json`, which must find no damage.
#[track_caller]
pub(super) fn sound(from: &str, more: &[&str]) -> Value {
    let output = weir(&[&["verify", "--json", "--from", from], more].concat());
    let (code, out, err) = shown(&output);
    assert_eq!(code, Some(0), "{out}{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["sound"], true, "{report:#}");
    report
}

/// What verification says of each epoch that does not depend on where it was read from.
fn totals(report: &Value) -> Vec<Value> {
    let of_epoch = |epoch: &Value| {
        ["epoch", "node", "events", "covered", "root", "stopped", "openRequests"]
            .map(|name| epoch[name].clone())
            .into_iter()
            .collect()
    };
    report["epochs"].as_array().unwrap().iter().map(of_epoch).collect()
}

/// Some of everything: mutations, a refusal, secrets that are masked, a stream, a log.
fn work(pod: &Pod<'_>) {
    let (namespace, name) = (&pod.namespace, &pod.name);
    pod.shell(&format!(
        "set -e
         kubectl create configmap first-{name} --from-literal=a='ü, \"quoted\"' -n {namespace}
         kubectl create secret generic hidden-{name} --from-literal=password=hunter-2 -n {namespace}
         kubectl get configmaps,secrets -n {namespace} -o yaml
         kubectl exec -n {namespace} {name} -- sh -c 'echo through a stream; echo and an error >&2'
         kubectl logs -n {namespace} {name}
         kubectl get configmap absent -n {namespace} || true
         kubectl delete configmap first-{name} -n {namespace}"
    ))
    .unwrap();
}

#[test]
fn what_the_journal_has_is_on_the_topics_byte_for_byte_and_answers_the_same() {
    let Some(mut scene) = Scene::new() else { return };
    let kafka = kafka();
    scene.namespace("it-kafka", true);
    let [one, other] =
        ["one", "other"].map(|name| scene.testbed.run_pod(&PodSpec::idle("it-kafka", name)).unwrap());
    let mut configuration = configuration(&scene, publishing(&kafka.bootstrap()));
    let keys = ["new", "old"].map(|name| KeyPair::make(scene.scratch.path(), name, "ed25519"));
    configuration["journal"]["idleCheckpointSeconds"] = json!(1);
    // Nobody listens there: that spans are lost holds up nothing.
    configuration["traces"] = json!({"endpoint": "http://127.0.0.1:9"});
    configuration["journal"]["signingKeyFiles"] = keys.iter().map(|key| json!(key.private)).collect();
    let (mut agent, monitored) = Monitored::start_with(&scene, configuration);
    work(&other);
    let before = jiff::Timestamp::now().to_string();
    work(&one);
    let amid = jiff::Timestamp::now().to_string();
    one.shell("kubectl get configmaps -n it-kafka").unwrap();
    wait_until_published(&kafka, &scene.journal());
    // Pods that do nothing leave no event, and that there was none is proven on the topic.
    wait_until("a silence on the topic", PUBLISHED_DEADLINE, || {
        Ok(proves_silence(&recorded(&scene.journal()), &published(&kafka)).then_some(()))
    })
    .unwrap();
    let metrics = monitored.metrics();
    check_documented(&metrics, |_| true);
    assert_eq!(metrics["weir_kafka_connected"], 1.0);
    assert!(metrics["weir_kafka_messages_total"] > 20.0, "{metrics:#?}");
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());

    // Its last words are there too: it waits for what is under way.
    let (recorded, published) = (recorded(&scene.journal()), published(&kafka));
    let again = check(&recorded, &published);
    let count = recorded.len() + silences(&recorded, &published);
    assert_eq!((again, published.len()), (0, count), "{}", agent.last_lines());
    assert!(recorded.iter().any(|frame| frame.kind == FrameType::Checkpoint));
    assert!(recorded.iter().all(|frame| !frame.value.contains("hunter-2")));
    let messages = kafka.messages(EVENTS).unwrap();
    assert_eq!(check_order(&messages), 2, "two pods, two sessions");
    for topic in [EVENTS, CHECKPOINTS] {
        let by_java = kafka.messages_by_java(topic).unwrap();
        assert_eq!(by_java, kafka.messages(topic).unwrap(), "as Kafka's own consumer reads {topic}");
    }

    let journal = scene.journal();
    let (journal, topics) = (journal.to_str().unwrap(), source(&kafka.bootstrap()));
    let session = messages.iter().find_map(|message| message.key.as_deref()).unwrap();
    answers_the_same(journal, &topics, session, [&before, &amid]);
    let report = sound(&topics, &[]);
    assert_eq!(totals(&report), totals(&sound(journal, &[])));
    shows_progress(journal);
    let told = (&report["topic"]["messages"], &report["topic"]["duplicates"]);
    assert_eq!(told, (&json!(count), &json!(0)), "{report:#}");
    verified_by_others(&epochs(&scene.journal())[0], &[journal, &topics], session);
    // Held against what was kept elsewhere.
    let epoch = &epochs(&scene.journal())[0];
    let [key, checkpoint] = ["node.pub", "checkpoint"].map(|name| epoch.join(name).display().to_string());
    sound(&topics, &["--key", &key, "--checkpoint", &checkpoint]);
    signed_by(&keys, &[journal, &topics]);

    // A message of somebody else is no reason to doubt Weir's.
    kafka.produce(EVENTS, Some("stranger"), "{\"hello\":1}").unwrap();
    assert_eq!(sound(&topics, &[])["topic"]["foreign"], 1);
}

/// The same with PLAIN, which some brokers offer alone, by an agent that has ended then.
#[track_caller]
fn publishes_with_plain(scene: &Scene, kafka: &Kafka, pod: &Pod<'_>, configuration: &Path) -> AgentProcess {
    let scram = std::fs::read_to_string(configuration).unwrap();
    let plain = scram.replace("SCRAM-SHA-512", "PLAIN");
    assert_ne!(plain, scram);
    std::fs::write(configuration, plain).unwrap();
    let mut agent = AgentProcess::start(configuration, &scene.scratch.path().join("plain.log")).unwrap();
    pod.shell("kubectl get configmap told -n it-kafka-tls").unwrap();
    wait_until_published(kafka, &scene.journal());
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    check(&recorded(&scene.journal()), &published(kafka));
    agent
}

#[test]
fn the_agent_publishes_over_tls_with_a_password_that_stands_in_a_file_alone() {
    let Some(mut scene) = Scene::new() else { return };
    let kafka = kafka();
    let secured = kafka.secured();
    scene.namespace("it-kafka-tls", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-kafka-tls", "caller")).unwrap();
    let password = scene.scratch.path().join("password");
    std::fs::write(&password, format!("{}\n", secured.password)).unwrap();
    let mut publishing = publishing(&secured.bootstrap);
    publishing["properties"] = json!({
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": secured.user,
        "ssl.ca.location": secured.certificate_authority,
    });
    publishing["propertyFiles"] = json!({"sasl.password": password});
    // And what goes over it, only those can read whom it is for.
    kafka.create_topic(KEYS, 1, &[("cleanup.policy", "compact")]).unwrap();
    publishing["keyTopic"] = json!(KEYS);
    let recipient = KeyPair::make(scene.scratch.path(), "recipient", "x25519");
    let mut configuration = configuration(&scene, publishing);
    configuration["recording"] = json!({"encryption": {"recipientFiles": [recipient.public]}});
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    let mut agent = AgentProcess::start(&path, &scene.scratch.path().join("agent.log")).unwrap();
    work(&pod);
    pod.shell(&format!(
        "set -e
         printf '%s-%s' {} {} > /tmp/told
         kubectl create configmap told --from-file=a=/tmp/told -n it-kafka-tls
         kubectl get configmap told -o yaml -n it-kafka-tls
         kubectl exec -n it-kafka-tls caller -- cat /tmp/told",
        CANARY.0, CANARY.1
    ))
    .unwrap();
    wait_until_published(&kafka, &scene.journal());
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    check(&recorded(&scene.journal()), &published(&kafka));

    // Who reads needs the same, and has it from a file too.
    let properties = scene.scratch.path().join("weir.properties");
    let ca = secured.certificate_authority.display();
    let lines = format!(
        "security.protocol=SASL_SSL\nsasl.mechanism=SCRAM-SHA-512\nsasl.username={}\nsasl.password={}\nssl.ca.location={ca}\n",
        secured.user, secured.password
    );
    std::fs::write(&properties, &lines).unwrap();
    let properties = properties.to_str().unwrap();
    let report = sound(&source(&secured.bootstrap), &["--kafka-config", properties]);
    assert_eq!(totals(&report), totals(&sound(scene.journal().to_str().unwrap(), &[])));

    only_recipients_read(&kafka, &recipient, &scene.journal());

    let scram = std::fs::read_to_string(&path).unwrap();
    let agent_plain = publishes_with_plain(&scene, &kafka, &pod, &path);
    std::fs::write(properties, lines.replace("SCRAM-SHA-512", "PLAIN")).unwrap();
    let report = sound(&source(&secured.bootstrap), &["--kafka-config", properties]);
    assert_eq!(report["epochs"].as_array().map(Vec::len), Some(2), "{report:#}");

    // A password that is not the right one: said by those who are asked, and never repeated.
    std::fs::write(&password, "wrong-password-4711").unwrap();
    std::fs::write(properties, lines.replace(secured.password, "wrong-password-4711")).unwrap();
    let read = weir(&["verify", "--from", &source(&secured.bootstrap), "--kafka-config", properties]);
    let (code, out, err) = shown(&read);
    assert_eq!(code, Some(1), "{out}{err}");
    let found_plain = doctor(&path, "kafka");
    std::fs::write(&path, scram).unwrap();
    let found = doctor(&path, "kafka");
    for said in [format!("{out}{err}"), found_plain, found] {
        assert!(said.to_lowercase().contains("authentication"), "{said}");
        assert!(!said.contains("4711"), "{said}");
    }
    for agent in [agent, agent_plain] {
        assert!(!agent.log().unwrap().contains(secured.password), "{}", agent.last_lines());
    }
}

#[test]
fn segments_leave_the_node_when_all_of_them_is_published_and_their_time_is_over() {
    const WINDOW: Duration = Duration::from_secs(5);
    let Some(mut scene) = Scene::new() else { return };
    let mut kafka = kafka();
    scene.namespace("it-kafka-gone", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-kafka-gone", "caller")).unwrap();
    let mut publishing = publishing(&kafka.bootstrap());
    publishing["replayWindowSeconds"] = WINDOW.as_secs().into();
    let mut agent = start(&scene, publishing.clone(), "agent.log");
    let epoch = epochs(&scene.journal()).remove(0);
    // While Kafka is away nothing leaves, however much there is.
    kafka.kill().unwrap();
    let mut requests = Requests::new(&scene.testbed, &pod);
    let mut objects = 0;
    while segments(&epoch).len() < 3 {
        assert!(objects < OBJECTS_MAX, "{objects} objects fill no two segments");
        assert_eq!(requests.create(&format!("filler-{objects}"), 200_000).status, 201);
        objects += 1;
    }
    let kept = recorded(&scene.journal());
    assert!(kept[0].id.ends_with("/0"), "{}", kept[0].id);

    let stayed = stays_after_acknowledgement(&mut kafka, &epoch, &agent);
    assert!(stayed >= WINDOW, "the first one stayed for {stayed:?}");
    let again = check(&kept, &published(&kafka));
    println!("{} frames, {again} of them twice; the first segment stayed for {stayed:?}", kept.len());

    // What is left still verifies, and the whole of it is on the topics.
    let journal = scene.journal();
    let (_, out, err) = shown(&weir(&["verify", "--from", journal.to_str().unwrap()]));
    assert!(out.contains("published and removed"), "{out}{err}");
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let left = sound(journal.to_str().unwrap(), &[]);
    let whole = sound(&source(&kafka.bootstrap()), &[]);
    let numbers = |report: &Value| {
        let number = |name: &str| report["epochs"][0][name].as_u64().unwrap();
        (number("removed"), number("events"))
    };
    let ((removed, remaining), (none, all)) = (numbers(&left), numbers(&whole));
    assert!(removed > 0 && none == 0, "{left:#}{whole:#}");
    assert_eq!(removed + remaining, all, "{left:#}{whole:#}");
    assert_eq!(left["epochs"][0]["root"], whole["epochs"][0]["root"]);

    // All of an epoch leaves whose agent is gone.
    let successor = start(&scene, publishing, "successor.log");
    wait_until("all of the epoch to leave", PUBLISHED_DEADLINE, || {
        Ok((!epoch.exists() || segments(&epoch).is_empty()).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}; {}", successor.last_lines()));
    assert_eq!(sound(&source(&kafka.bootstrap()), &[])["epochs"].as_array().unwrap().len(), 2);
    sound(journal.to_str().unwrap(), &[]);
    assert_eq!(requests_of(&pod, objects), objects, "the cluster has what the topics say");
}
