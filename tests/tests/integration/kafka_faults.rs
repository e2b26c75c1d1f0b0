//! Kafka is away, hangs, or is not as it must be: pods go on working, and nothing that was acknowledged to them is missing
//! on the topic in the end. What was acknowledged is known from what kubectl said in the pod, not from Weir.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Lines},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;
use weir_common::{
    event::{Channel, Event, Kind},
    frame::FrameType,
};
use weir_tests::{
    AgentProcess, Kafka, Pod, PodSpec, agent, command, kafka::Message, testbed::free_ports, wait_until,
};

use super::{
    DEADLINE, Scene,
    broker_faults::{check_order, recovered},
    damage::{Turned, a_damage_is_told_once, all_but_one_is_published, of_epoch},
    kafka::{
        CHECKPOINTS, EVENTS, PUBLISHED_DEADLINE, check, configuration, doctor, epochs, kafka, published,
        publishing, recorded, segments, sound, source, start, wait_until_published,
    },
    kafka_access::Follower,
    monitoring::Monitored,
    shown,
};

/// The cursor is written each second, on a busy machine a little later.
const CURSOR_DEADLINE: Duration = Duration::from_secs(120);

/// How long the broker is dead with `WEIR_TEST_LONG`.
const OUTAGE_LONG: Duration = Duration::from_secs(600);

fn is_long() -> bool {
    std::env::var_os("WEIR_TEST_LONG").is_some()
}

/// A pod that makes objects one after the other, and what kubectl said of each.
pub(super) struct Ledger {
    prefix: &'static str,
    made: BTreeSet<String>,
    kubectl: Child,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Ledger {
    pub(super) fn start(pod: &Pod<'_>, prefix: &'static str) -> Self {
        let pause = if is_long() { "sleep 0.5;" } else { "" };
        let script = format!(
            "rm -f /tmp/stop; n=0; while [ ! -e /tmp/stop ] && [ $n -lt 2000 ]; do n=$((n+1)); {pause} \
             kubectl create configmap {prefix}-$n --from-literal=n=$n -o name || echo refused; done"
        );
        let mut command = pod.exec_command();
        let mut kubectl = command.args(["sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let answers = BufReader::new(kubectl.stdout.take().unwrap()).lines();
        Self { prefix, made: BTreeSet::new(), kubectl, answers }
    }

    /// The next answer, if there is one.
    fn next(&mut self) -> bool {
        let Some(answer) = self.answers.next() else { return false };
        let answer = answer.unwrap();
        let name = answer.strip_prefix("configmap/").unwrap_or_else(|| panic!("kubectl says {answer:?}"));
        assert!(name.starts_with(self.prefix) && self.made.insert(name.to_owned()), "{name}");
        true
    }

    /// Waits for so many more objects.
    pub(super) fn go_on(&mut self, objects: usize, when: &str) {
        for _ in 0..objects {
            assert!(self.next(), "the pod makes no more objects {when}");
        }
    }

    /// Ends it and gives all that kubectl said was made.
    pub(super) fn end(mut self, pod: &Pod<'_>) -> BTreeSet<String> {
        pod.shell("touch /tmp/stop").unwrap();
        while self.next() {}
        self.kubectl.wait().unwrap();
        self.made
    }
}

/// Checks that the topic tells of each object: the request with its name in the body, and that it was answered by 201.
/// The answer for `last` may be missing: its record comes behind it, and the agent was killed then.
#[track_caller]
pub(super) fn check_ledger(
    made: &BTreeSet<String>,
    last: Option<&str>,
    published: &BTreeMap<String, Vec<Message>>,
) {
    let (mut opened, mut created) = (BTreeSet::new(), BTreeSet::new());
    let mut bodies = Vec::new();
    for message in published.values().flatten().filter(|message| message.value.starts_with('{')) {
        let event: Event = serde_json::from_str(&message.value).unwrap();
        let Some(request) = event.request else { continue };
        match event.kind {
            Kind::RequestOpened(_) => drop(opened.insert(request)),
            Kind::Content(content) if content.channel == Channel::RequestBody => {
                bodies.push((content.bytes.to_vec().unwrap(), request));
            }
            Kind::RequestClosed(closed) if closed.status == Some(201) => drop(created.insert(request)),
            _ => {}
        }
    }
    for name in made {
        // Kubernetes' protobuf, which kubectl sends: a field of this type and length.
        let field = [&[0x0a, u8::try_from(name.len()).unwrap()], name.as_bytes()].concat();
        let has = |body: &[u8]| body.windows(field.len()).any(|part| part == field);
        let found = bodies.iter().find(|(body, _)| has(body));
        let (_, request) =
            found.unwrap_or_else(|| panic!("{name} was made, and the topic has no body of it"));
        assert!(opened.contains(request), "{name}: its request is not on the topic");
        let answered = created.contains(request) || last == Some(name);
        assert!(answered, "{name}: its answer is not on the topic");
    }
}

/// Waits until monitoring says that something is wrong, and gives the words.
#[track_caller]
pub(super) fn note(monitored: &Monitored, of: &str) -> String {
    wait_until(&format!("readiness to say {of:?}"), PUBLISHED_DEADLINE, || {
        let (status, text) = monitored.get("/readyz")?;
        assert_eq!(status, 200, "Kafka is no reason to refuse pods: {text}");
        Ok(text.contains(of).then_some(text))
    })
    .unwrap()
}

/// Messages that this agent may have sent twice: those that were on their way when it gave a client up. As long as a client lives, it and
/// the broker tell what comes again from what is new.
pub(super) fn sent_again(monitored: &Monitored) -> usize {
    monitored.metrics()["weir_kafka_messages_resent_total"] as usize
}

/// What of an epoch is acknowledged, by its file `cursor`: all segments before this one, and so many events. Of two slots the one with
/// the higher generation says so. `docs/recording-format.md` describes it.
pub(super) fn acknowledged(epoch: &Path) -> (u64, u64) {
    let Ok(bytes) = std::fs::read(epoch.join("cursor")) else { return (0, 0) };
    let number = |slot: &[u8], at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap());
    let slots = bytes.chunks_exact(512).filter(|slot| slot.starts_with(b"WEIRCUR\n"));
    let newest = slots.max_by_key(|slot| number(slot, 16));
    newest.map_or((0, 0), |slot| (number(slot, 40), number(slot, 56)))
}

/// Starts the broker, and says how long the first segment stays after all of it was acknowledged: from the last look at which it was not, since the
/// broker takes longer to start than any window that a test has time for.
#[track_caller]
pub(super) fn stays_after_acknowledgement(kafka: &mut Kafka, epoch: &Path, agent: &AgentProcess) -> Duration {
    let (first, mut not_yet) = (segments(epoch).remove(0), Instant::now());
    std::thread::scope(|scope| {
        let restarted = scope.spawn(|| kafka.restart());
        wait_until("the published segments to leave", PUBLISHED_DEADLINE, || {
            let looked = Instant::now();
            if acknowledged(epoch).0 == 0 {
                not_yet = looked;
            }
            Ok((!first.exists()).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error}; {:?}: {}", segments(epoch), agent.last_lines()));
        restarted.join().unwrap().unwrap();
    });
    not_yet.elapsed()
}

#[test]
fn nothing_that_a_pod_was_told_is_missing_after_the_broker_was_killed_and_hung() {
    let Some(mut scene) = Scene::new() else { return };
    let mut kafka = kafka();
    scene.namespace("it-kafka-down", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-kafka-down", "caller")).unwrap();
    let configuration = configuration(&scene, publishing(&kafka.bootstrap()));
    let (mut agent, monitored) = Monitored::start_with(&scene, configuration);
    pod.shell("kubectl get configmaps").unwrap();
    let before = wait_until_published(&kafka, &scene.journal());
    // Who follows the topic does so through all of it, from its beginning or from now on.
    let from = format!("kafka://{}/{EVENTS}", kafka.bootstrap());
    let mut whole = Follower::start(&from, &[]);
    let mut latest = Follower::start(&from, &["--group", "late", "--offset", "latest"]);
    let mut ledger = Ledger::start(&pod, "ledger");
    wait_until("who begins at the end to be given something", PUBLISHED_DEADLINE, || {
        ledger.go_on(1, "before");
        Ok(latest.has_begun().then_some(()))
    })
    .unwrap();
    kafka.kill().unwrap();
    let outage = Instant::now();
    ledger.go_on(5, "while the broker is dead");
    while is_long() && outage.elapsed() < OUTAGE_LONG {
        ledger.go_on(1, "while the broker is dead for long");
    }
    wait_until("a backlog", PUBLISHED_DEADLINE, || {
        let metrics = monitored.metrics();
        Ok((metrics["weir_kafka_backlog_bytes"] > 0.0 && metrics["weir_kafka_connected"] == 0.0)
            .then_some(()))
    })
    .unwrap();
    kafka.restart().unwrap();
    ledger.go_on(3, "when the broker is back");
    kafka.stop().unwrap();
    ledger.go_on(5, "while the broker hangs");
    kafka.cont().unwrap();
    ledger.go_on(3, "when the broker goes on");
    let made = ledger.end(&pod);
    wait_until_published(&kafka, &scene.journal());
    wait_until("no backlog", PUBLISHED_DEADLINE, || {
        let metrics = monitored.metrics();
        Ok((metrics["weir_kafka_backlog_bytes"] == 0.0 && metrics["weir_kafka_connected"] == 1.0)
            .then_some(()))
    })
    .unwrap();
    let sent_again = sent_again(&monitored);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());

    let (recorded, published) = (recorded(&scene.journal()), published(&kafka));
    check_ledger(&made, None, &published);
    check_order(&kafka.messages(EVENTS).unwrap());
    let again = check(&recorded, &published);
    println!("{} objects, {} frames, {again} of them once more", made.len(), recorded.len());
    assert!(again <= sent_again, "{again} messages came again, {sent_again} were on their way");
    assert_eq!(published.len(), recorded.len(), "there is nothing on the topics that is not in the journal");
    let report = sound(&source(&kafka.bootstrap()), &[]);
    assert_eq!(report["topic"]["duplicates"].as_u64(), u64::try_from(again).ok(), "{report:#}");
    let [all, given] = whole.check_given(&kafka, true);
    assert_eq!(given, all);
    let [all, given] = latest.check_given(&kafka, false);
    println!("who began at the end was given {given} of {all} events");
    let is_old = |event: &Event| before.contains_key(&format!("{}/{}", event.epoch, event.sequence));
    assert!(!latest.events.iter().any(is_old), "something of before it began was given");
}

#[test]
fn what_a_killed_agent_left_is_published_by_the_next_one() {
    let Some(mut scene) = Scene::new() else { return };
    let mut kafka = kafka();
    scene.namespace("it-kafka-orphan", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-kafka-orphan", "caller")).unwrap();
    let mut agent = start(&scene, publishing(&kafka.bootstrap()), "killed.log");
    let mut ledger = Ledger::start(&pod, "first");
    let orphan = epochs(&scene.journal()).remove(0);
    ledger.go_on(3, "with the broker");
    // All that is on record by now counts as acknowledged before the broker dies.
    let known = recorded(&scene.journal()).iter().filter(|frame| frame.kind == FrameType::Event).count();
    wait_until("what is acknowledged to be written down", CURSOR_DEADLINE, || {
        Ok((acknowledged(&orphan).1 >= known as u64).then_some(()))
    })
    .unwrap();
    kafka.kill().unwrap();
    ledger.go_on(5, "without the broker");
    let mut made = ledger.end(&pod);
    agent.crash().unwrap();
    let (_, acknowledged) = acknowledged(&orphan);
    let number = |name: &String| name.rsplit('-').next().and_then(|number| number.parse::<u32>().ok());
    let last = made.iter().max_by_key(|name| number(name)).cloned();

    // The broker is still away when its successor starts.
    let configured = configuration(&scene, publishing(&kafka.bootstrap()));
    let (mut successor, monitored) = Monitored::start_with(&scene, configured);
    let mut ledger = Ledger::start(&pod, "second");
    ledger.go_on(3, "with the next agent");
    made.append(&mut ledger.end(&pod));
    kafka.restart().unwrap();
    wait_until_published(&kafka, &scene.journal());
    let sent_again = sent_again(&monitored);
    assert!(successor.terminate().unwrap().success(), "{}", successor.last_lines());

    let (recorded, published) = (recorded(&scene.journal()), published(&kafka));
    assert_eq!(epochs(&scene.journal()).len(), 2);
    assert!(of_epoch(&orphan, &recorded).next().is_some(), "{orphan:?}");
    check_ledger(&made, last.as_deref(), &published);
    check_order(&kafka.messages(EVENTS).unwrap());
    let again = check(&recorded, &published);
    println!("{} objects, {} frames, {again} of them once more", made.len(), recorded.len());
    // Once more comes what the killed one had sent and did not know to be acknowledged, and nothing else.
    let unknown = of_epoch(&orphan, &recorded).filter(|frame| frame.sequence >= acknowledged);
    let of_unknown = unknown.map(|frame| published[&frame.id].len() - 1);
    let (of_unknown, most) = (of_unknown.clone().sum::<usize>(), of_unknown.max().unwrap_or_default());
    assert!(
        again - of_unknown + most.saturating_sub(1) <= sent_again,
        "{again}, {of_unknown}, {most}, {sent_again}"
    );
    let report = sound(&source(&kafka.bootstrap()), &[]);
    let stopped: Vec<_> =
        report["epochs"].as_array().unwrap().iter().map(|epoch| &epoch["stopped"]).collect();
    assert_eq!(stopped, [&json!(false), &json!(true)], "{report:#}");
    a_damage_is_told_once(&scene, &kafka, &recorded, &published);
}

/// What an agent says by itself when it starts: that one topic is not there, and what the other one lacks.
#[track_caller]
fn is_told_of_topics(agent: &AgentProcess) {
    let of_topics = |log: &str| {
        let lines = log.lines().filter(|line| line.contains("kafka-check-failed"));
        lines.filter(|line| line.contains("kafka topic ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let said = wait_until("the topics to be looked at", PUBLISHED_DEADLINE, || {
        Ok(Some(of_topics(&agent.log()?)).filter(|lines| lines.len() == 2))
    })
    .unwrap_or_else(|error| panic!("{error}; {}", agent.last_lines()));
    let words = [
        (EVENTS, "there is no such topic"),
        (CHECKPOINTS, "1 replicas, min.insync.replicas 1, max.message.bytes 300000"),
        (CHECKPOINTS, "use 3 replicas and min.insync.replicas 2: as it is, one broker's disk can lose"),
        (CHECKPOINTS, "set max.message.bytes of the topic to at least 540672"),
    ];
    for (topic, words) in words {
        let is_said = |line: &String| line.contains(&format!("kafka topic {topic}")) && line.contains(words);
        assert!(said.iter().any(is_said), "{topic}: {words}: {said:?}");
    }
}

#[test]
fn an_agent_whose_broker_or_topic_is_not_there_serves_and_says_so_until_it_is() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-kafka-none", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-kafka-none", "caller")).unwrap();
    let serves = |agent: &AgentProcess| {
        let answered = pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap();
        assert!(answered.status.success(), "{}", agent.last_lines());
    };
    // Nobody listens there.
    let [port] = free_ports("127.0.0.1").unwrap();
    let nowhere = configuration(&scene, publishing(&format!("127.0.0.1:{port}")));
    let (mut agent, monitored) = Monitored::start_with(&scene, nowhere);
    serves(&agent);
    // It asks for a while; meanwhile the agent finds out.
    let found = doctor(&scene.scratch.path().join("agent.yaml"), "kafka");
    assert!(found.contains("no broker answers") && found.contains("kafka.brokers"), "{found}");
    let said = note(&monitored, "not in Kafka yet");
    assert!(said.starts_with("ready\n"), "{said}");
    let weir_agent = agent::built_binary("weir-agent").unwrap();
    let status = command::run(Command::new(&weir_agent).arg("status")).unwrap();
    assert!(status.contains("not in Kafka yet"), "{status}");
    assert_eq!(monitored.metrics()["weir_kafka_connected"], 0.0);
    assert!(monitored.metrics()["weir_kafka_backlog_bytes"] > 0.0);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let turned = Turned::turn(&epochs(&scene.journal())[0], &recorded(&scene.journal()));

    // A broker without the topic; it has one of them.
    let kafka = Kafka::start().unwrap();
    kafka.create_topic(CHECKPOINTS, 1, &[("max.message.bytes", "300000")]).unwrap();
    let mut publishing_there = publishing(&kafka.bootstrap());
    // A topic may be new, so that the client waits for it; 30 s unless it is told otherwise.
    publishing_there["properties"] = json!({"topic.metadata.propagation.max.ms": "1000"});
    let configuration = configuration(&scene, publishing_there);
    let (mut agent, monitored) = Monitored::start_with(&scene, configuration);
    serves(&agent);
    is_told_of_topics(&agent);
    note(&monitored, &format!("topic {EVENTS} does not exist"));
    assert!(monitored.metrics()["weir_kafka_errors_total{kind=\"unknownTopic\"}"] >= 1.0);
    assert!(agent.log().unwrap().contains(EVENTS), "{}", agent.last_lines());
    let found = doctor(&scene.scratch.path().join("agent.yaml"), &format!("kafka topic {EVENTS}"));
    assert!(found.contains("no such topic") && found.contains("create it"), "{found}");
    // It need not start anew for what is mended.
    kafka.create_topic(EVENTS, 3, &[]).unwrap();
    recovered(&monitored, "the topic was made");
    assert_eq!(monitored.metrics()["weir_journal_damages_total"], 1.0);
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    all_but_one_is_published(&scene, &kafka, &agent, &turned);

    // A topic that would lose events in every way that its settings allow.
    let settings = [
        ("cleanup.policy", "compact,delete"),
        ("retention.ms", "60000"),
        ("retention.bytes", "1000000"),
        ("message.timestamp.type", "LogAppendTime"),
        ("message.timestamp.before.max.ms", "1000"),
        ("unclean.leader.election.enable", "true"),
    ];
    kafka.create_topic("leaky", 2, &settings).unwrap();
    let mut leaky = publishing(&kafka.bootstrap());
    leaky["topic"] = "leaky".into();
    let path = scene.scratch.path().join("leaky.yaml");
    agent::write_configuration(&super::kafka::configuration(&scene, leaky), &path).unwrap();
    let found = doctor(&path, "kafka topic leaky");
    for (name, value) in settings {
        assert!(found.contains(&format!("set {name} to ")), "{name}: {found}");
        assert!(found.contains(value), "{name} is {value}: {found}");
    }

    // What cannot be right keeps it from starting, with the place.
    let mut wrong = publishing(&kafka.bootstrap());
    wrong["properties"] = json!({"acks": "0"});
    let path = scene.scratch.path().join("wrong.yaml");
    agent::write_configuration(&super::kafka::configuration(&scene, wrong), &path).unwrap();
    let ended = command::output(Command::new(&weir_agent).args(["run", "--config"]).arg(&path)).unwrap();
    let (code, _, err) = shown(&ended);
    assert!(code == Some(1) && err.contains("kafka.properties.acks"), "{err}");
}

/// How many of the objects that were made are there.
pub(super) fn requests_of(pod: &Pod<'_>, most: usize) -> usize {
    let names = wait_until("the pod to be served", DEADLINE, || {
        let listed = pod.exec(&["kubectl", "get", "configmaps", "-o", "name"])?;
        Ok(listed.status.success().then(|| String::from_utf8_lossy(&listed.stdout).into_owned()))
    })
    .unwrap();
    names.lines().filter(|name| name.contains("/filler-")).count().min(most)
}
