//! The clock of a node is set by a day, ahead and back, while the agent runs: the agent's own alone, as `ShiftedClock` gives it.
//! Requests, records, publishing and what goes by time go on as before; what must not be believed is not, and all is well
//! again once the clock is right.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use weir_common::event::{Channel, Event, Kind};
use weir_tests::{
    AgentProcess, Kafka, Pod, PodSpec, ShiftedClock, agent, agent::TrustSource, kafka::Message, wait_until,
};

use super::{
    DEADLINE, Scene,
    broker_faults::{check_order, recovered},
    client::Requests,
    identity,
    kafka::{
        CHECKPOINTS, EVENTS, Recorded, check, configuration, epochs, kafka, published, publishing, recorded,
        sound, source, wait_until_published, weir,
    },
    kafka_faults::sent_again,
    monitoring::Monitored,
    shown,
};

const DAY: i64 = 86_400;

/// No request takes as long, the machine being as busy as it may be. What waits by a clock that is a day off waits until the agent has
/// waited for 30 s (`COMMIT_WAIT_MAX`), and is then refused.
const REQUEST_MAX: Duration = Duration::from_secs(25);

/// What is recorded each minute has come by then.
const TICK_DEADLINE: Duration = Duration::from_secs(100);

/// Of a core, by an agent that has little to do, not optimised.
const CPU_MAX: f64 = 0.5;

/// How long a connection may have been idle that is used: after two minutes the agent closes it.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// How long segments stay that Kafka has acknowledged.
const WINDOW: Duration = Duration::from_secs(40);

/// Between two looks of the agent for segments that may go.
const REMOVAL: Duration = Duration::from_secs(15);

fn unix_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

/// A pod that works, on a node whose clock somebody sets.
struct Node<'a> {
    scene: &'a Scene,
    pod: &'a Pod<'a>,
    clock: ShiftedClock,
    ahead: i64,
    agent: AgentProcess,
    monitored: Monitored,
    requests: Requests,
    /// When the connection of those was used last.
    used: Instant,
    made: BTreeSet<String>,
}

impl<'a> Node<'a> {
    fn start(scene: &'a Scene, pod: &'a Pod<'a>, configuration: Value) -> Self {
        let clock = ShiftedClock::new().unwrap();
        let (agent, monitored) = Monitored::start_in(scene, configuration, &clock.environment());
        let requests = Requests::new(&scene.testbed, pod);
        let (used, made) = (Instant::now(), BTreeSet::new());
        Self { scene, pod, clock, ahead: 0, agent, monitored, requests, used, made }
    }

    /// Its successor, on a node with the same clock.
    fn succeeded_by(mut self, configuration: Value) -> Self {
        assert!(self.agent.terminate().unwrap().success(), "{}", self.agent.last_lines());
        let (agent, monitored) = Monitored::start_in(self.scene, configuration, &self.clock.environment());
        let requests = Requests::new(&self.scene.testbed, self.pod);
        Self { agent, monitored, requests, used: Instant::now(), ..self }
    }

    /// Sees to it that the pod has a connection, from before what comes now: a busy machine may have been long about what came before.
    #[track_caller]
    fn stay_connected(&mut self) {
        if self.used.elapsed() > IDLE_MAX {
            self.requests = Requests::new(&self.scene.testbed, self.pod);
            assert_eq!(self.requests.read().status, 200, "{}", self.agent.last_lines());
            self.used = Instant::now();
        }
    }

    #[track_caller]
    fn set(&mut self, ahead: i64) {
        self.stay_connected();
        self.clock.set(ahead).unwrap();
        self.ahead = ahead;
    }

    /// Waits until the agent says so, too: what it sends again, since its clock is set back, is counted by then.
    #[track_caller]
    fn set_and_seen(&mut self, ahead: i64) {
        let said = |node: &Self| node.agent.log().unwrap().matches("clock-set").count();
        let before = said(self);
        self.set(ahead);
        wait_until("the agent to see its clock set", DEADLINE, || Ok((said(self) > before).then_some(())))
            .unwrap();
    }

    /// The pod makes and reads objects, on the connection that it has and on a new one; no request waits, and the record of each
    /// has the time that the agent's clock said.
    #[track_caller]
    fn goes_on(&mut self, when: &str) {
        const EACH: usize = 4;
        self.stay_connected();
        let (from, mut slowest) = (unix_us(), Duration::ZERO);
        for is_new in [false, true] {
            if is_new {
                self.requests = Requests::new(&self.scene.testbed, self.pod);
            }
            for _ in 0..EACH {
                let name = format!("object-{}", self.made.len());
                let begun = Instant::now();
                assert_eq!(
                    self.requests.create(&name, 10).status,
                    201,
                    "{when}: {}",
                    self.agent.last_lines()
                );
                slowest = slowest.max(begun.elapsed());
                let begun = Instant::now();
                assert_eq!(self.requests.read().status, 200, "{when}: {}", self.agent.last_lines());
                slowest = slowest.max(begun.elapsed());
                self.made.insert(name);
                self.used = Instant::now();
            }
        }
        let ahead_us = self.ahead * 1_000_000;
        let then = from + ahead_us..=unix_us() + ahead_us;
        let is_create = |event: &&Event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.verb == "create");
        let events = self.scene.events();
        let created =
            events.iter().filter(is_create).filter(|event| then.contains(&event.time_unix_us)).count();
        eprintln!("{when}: the slowest request took {slowest:?}");
        assert_eq!(created, 2 * EACH, "{when}: records with the time of the agent's clock");
        assert!(slowest < REQUEST_MAX, "{when}: a request took {slowest:?}");
    }

    /// All is published, and what monitoring is told can be.
    #[track_caller]
    fn is_well(&self, when: &str) {
        recovered(&self.monitored, when);
        let metrics = self.monitored.metrics();
        for (name, value) in &metrics {
            assert!(*value >= 0.0, "{when}: {name} is {value}");
            let is_duration =
                name.contains("_seconds") && !name.contains("_timestamp_") && !name.contains("_bucket");
            assert!(!is_duration || name.contains("_count") || *value < 3600.0, "{when}: {name} is {value}");
        }
        assert_eq!((metrics["weir_ready"], metrics["weir_journal_recording"]), (1.0, 1.0), "{when}");
        assert_eq!(metrics["weir_kafka_connected"], 1.0, "{when}");
    }

    /// What is recorded each minute goes on to be, at little cost.
    #[track_caller]
    fn ticks(&self, when: &str) {
        // By their numbers: events that were published may leave the journal meanwhile.
        let coverage = || -> BTreeSet<(String, u64)> {
            let events = self.scene.events().into_iter();
            let coverage = events.filter(|event| matches!(event.kind, Kind::Coverage(_)));
            coverage.map(|event| (event.epoch, event.sequence)).collect()
        };
        let known = coverage();
        let (begun, used) = (Instant::now(), self.processor_seconds());
        let ticked = wait_until("what is recorded each minute", TICK_DEADLINE, || {
            Ok((!coverage().is_subset(&known)).then_some(()))
        });
        let used = (self.processor_seconds() - used) / begun.elapsed().as_secs_f64();
        eprintln!("{when}: coverage after {:?}, {used:.2} of a core", begun.elapsed());
        ticked.unwrap_or_else(|error| panic!("{when}: {error:#}"));
        assert!(used < CPU_MAX, "{when}: {used} of a core");
    }

    fn processor_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.agent.pid())).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        // User and system time, in hundredths.
        fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
    }
}

/// Each object that the pod was told was made is on the topic.
#[track_caller]
fn check_made(made: &BTreeSet<String>, kafka: &Kafka) {
    let bodies: Vec<_> = kafka
        .messages(EVENTS)
        .unwrap()
        .iter()
        .filter_map(|message| match serde_json::from_str::<Event>(&message.value).unwrap().kind {
            Kind::Content(content) if content.channel == Channel::RequestBody => content.bytes.to_vec().ok(),
            _ => None,
        })
        .map(|body| String::from_utf8_lossy(&body).into_owned())
        .collect();
    for name in made {
        assert!(
            bodies.iter().any(|body| body.contains(&format!("\"{name}\""))),
            "{name} is not on the topic"
        );
    }
}

/// The topic has no time that its brokers refuse, and that of each event which they do not.
#[track_caller]
fn check_timestamps(kafka: &Kafka, began_us: i64) {
    let (mut own, mut earlier) = (0, 0);
    for (message, timestamp_ms) in
        [EVENTS, CHECKPOINTS].iter().flat_map(|topic| kafka.timestamps(topic).unwrap())
    {
        assert!(timestamp_ms < unix_us() / 1000 + 3_600_000, "{message:?} is of {timestamp_ms}");
        let time: jiff::Timestamp = message.header("ce_time").unwrap().parse().unwrap();
        match time.as_millisecond() {
            time_ms if time_ms == timestamp_ms => own += 1,
            time_ms => {
                earlier += 1;
                // What is taken is known as of when it was: of a right clock, it may be as much earlier as a message is under way.
                let is_ahead = time_ms > began_us / 1000 + 3_600_000;
                let is_as_good = time_ms - timestamp_ms < 3000;
                assert!(
                    timestamp_ms < time_ms && (is_ahead || is_as_good),
                    "{message:?} is of {timestamp_ms}"
                );
                // As late as it came, near enough.
                assert!(timestamp_ms > began_us / 1000 - 3_600_000, "{message:?} is of {timestamp_ms}");
            }
        }
    }
    eprintln!("{own} messages with the time of their event, {earlier} with an earlier one");
    assert!(own > 0 && earlier > 0, "{own}, {earlier}");
}

/// Epoch and sequence of what `weir events` gives of this time.
fn between(from: &str, since_us: i64, until_us: i64) -> BTreeSet<(String, u64)> {
    let [since, until] =
        [since_us, until_us].map(|us| jiff::Timestamp::from_microsecond(us).unwrap().to_string());
    let output = weir(&["events", "--format", "json", "--from", from, "--since", &since, "--until", &until]);
    let (code, out, err) = shown(&output);
    assert_eq!(code, Some(0), "{err}");
    let event = |line: &str| serde_json::from_str::<Event>(line).unwrap();
    out.lines()
        .filter(|line| !line.is_empty())
        .map(event)
        .map(|event| (event.epoch, event.sequence))
        .collect()
}

/// Events are found by the time that they bear: in the journal all, on the topic those that its brokers took as they are.
#[track_caller]
fn are_found_by_their_times(scene: &Scene, topics: &str) {
    let (journal, now, hour, day) = (scene.journal(), unix_us(), 3_600_000_000, DAY * 1_000_000);
    let all = scene.events();
    for (around, is_on_topic) in [(now, true), (now - day, true), (now + day, false)] {
        let (since, until) = (around - hour, around + hour);
        let expected: BTreeSet<_> = all
            .iter()
            .filter(|event| (since..=until).contains(&event.time_unix_us))
            .map(|event| (event.epoch.clone(), event.sequence))
            .collect();
        assert!(!expected.is_empty(), "{around}");
        assert_eq!(between(journal.to_str().unwrap(), since, until), expected, "{around}");
        // Those of a clock that is ahead are there under the time when they came.
        let found = between(topics, if is_on_topic { since } else { now - 2 * hour }, until);
        let missing: Vec<_> = expected.difference(&found).collect();
        assert!(missing.is_empty(), "{around}: not on the topic: {missing:?}");
    }
}

/// What is recorded now, and the topics' messages once they have it: what was recorded last is on its way, by a client that is made
/// anew where the clock has just been set back.
fn published_whole(scene: &Scene, kafka: &Kafka) -> (Vec<Recorded>, BTreeMap<String, Vec<Message>>) {
    let frames = recorded(&scene.journal());
    let messages = wait_until("the last records on the topic", DEADLINE, || {
        let messages = published(kafka);
        Ok(frames.iter().all(|frame| messages.contains_key(&frame.id)).then_some(messages))
    });
    (frames, messages.unwrap())
}

/// Segments of an epoch.
fn segments(epoch: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(epoch) else { return 0 };
    entries.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "seg")).count()
}

/// Segments go when their time has passed, whatever the clock says: until then some of this epoch are there.
#[track_caller]
fn stay(epoch: &Path, not_acknowledged: Instant) {
    let are_there = segments(epoch) > 0;
    assert!(are_there || not_acknowledged.elapsed() >= WINDOW, "what was acknowledged stays for {WINDOW:?}");
}

#[test]
fn an_agent_whose_clock_is_set_by_a_day_records_publishes_and_forgets_as_before() {
    let Some(mut scene) = Scene::new() else { return };
    let mut kafka = kafka();
    scene.namespace("it-clock", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-clock", "caller")).unwrap();
    let mut configuration = configuration(&scene, publishing(&kafka.bootstrap()));
    configuration["kafka"]["replayWindowSeconds"] = json!(WINDOW.as_secs());
    configuration["journal"]["idleCheckpointSeconds"] = json!(5);
    let began_us = unix_us();
    let mut node = Node::start(&scene, &pod, configuration.clone());
    node.goes_on("before");
    node.is_well("before");
    for (ahead, when) in
        [(DAY, "a day ahead"), (0, "right again"), (-DAY, "a day behind"), (0, "right once more")]
    {
        node.goes_on("just before");
        node.set(ahead);
        node.goes_on(when);
        node.is_well(when);
        // Each takes a minute.
        if ahead != 0 && std::env::var_os("WEIR_TEST_LONG").is_some() {
            node.ticks(when);
        }
    }

    // Whoever waits for a broker just then must not wait for the old time.
    kafka.kill().unwrap();
    node.goes_on("without a broker");
    wait_until("the agent to know", DEADLINE, || {
        Ok((node.monitored.metrics()["weir_kafka_connected"] == 0.0).then_some(()))
    })
    .unwrap();
    node.set(-DAY);
    node.goes_on("a day behind, without a broker");
    let age = node.monitored.metrics()["weir_kafka_backlog_seconds"];
    assert!(age < 600.0, "the backlog is {age} seconds old");
    kafka.restart().unwrap();
    node.is_well("a day behind, the broker is back");
    node.set(DAY);
    node.goes_on("two days further");
    node.is_well("two days further");

    // The next agent starts with the right time.
    node.set_and_seen(0);
    let first = epochs(&scene.journal()).remove(0);
    let by_first = sent_again(&node.monitored);
    // Its last records are made when it ends, and nothing is acknowledged before it is made.
    let not_yet = Instant::now();
    let mut node = node.succeeded_by(configuration);
    node.goes_on("with the next agent");
    let published_all = wait_until_published(&kafka, &scene.journal());
    let acknowledged = Instant::now();
    drop(published_all);
    let topics = source(&kafka.bootstrap());
    node.set(DAY);
    while acknowledged.elapsed() < REMOVAL + Duration::from_secs(3) {
        node.goes_on("while segments wait");
        stay(&first, not_yet);
    }
    node.set(-DAY);
    let (frames, messages) = published_whole(&scene, &kafka);
    are_found_by_their_times(&scene, &topics);
    // Who goes by the clock waits for a day now.
    node.ticks("a day behind");
    wait_until("segments to go", WINDOW + 3 * REMOVAL, || Ok((segments(&first) == 0).then_some(()))).unwrap();
    node.set(0);
    node.is_well("in the end");
    let sent_again = by_first + sent_again(&node.monitored);
    assert!(node.agent.terminate().unwrap().success(), "{}", node.agent.last_lines());

    let again = check(&frames, &messages);
    println!("{} objects, {} frames, {again} of them once more", node.made.len(), frames.len());
    assert!(again <= sent_again, "{again} messages came again, {sent_again} were on their way");
    check_made(&node.made, &kafka);
    check_order(&kafka.messages(EVENTS).unwrap());
    check_timestamps(&kafka, began_us);
    sound(scene.journal().to_str().unwrap(), &[]);
    sound(&topics, &[]);
}

/// A token of the pod's own, for ten minutes.
fn short_token(scene: &Scene, pod: &Pod<'_>) -> String {
    let bound = ["--bound-object-kind=Pod", "--bound-object-name", &pod.name, "--bound-object-uid", &pod.uid];
    let arguments =
        [&["create", "token", identity::ACCOUNT, "-n", &pod.namespace, "--duration=600s"][..], &bound];
    scene.testbed.kubectl(&arguments.concat()).unwrap().trim().to_owned()
}

#[test]
fn a_token_is_believed_in_its_time_alone_by_an_agent_whose_clock_is_set() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-clock-token", true);
    identity::powerless(&scene, "it-clock-token");
    let pod = identity::pod(&scene, "it-clock-token", "caller");
    let impersonated = json!([{
        "name": "any", "when": "true", "impersonate": {"user": "'weir:tester'", "groups": "['weir:runners']"},
    }]);
    let path = identity::configured(&scene, impersonated);
    let clock = ShiftedClock::new().unwrap();
    let environment = clock.environment();
    let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut agent =
        AgentProcess::spawn_with(&path, &scene.scratch.path().join("agent.log"), &environment).unwrap();
    agent.wait_until_ready().unwrap();
    let token = short_token(&scene, &pod);
    let ask = || {
        let head = format!("GET /version HTTP/1.1\r\nAuthorization: Bearer {token}\r\n");
        identity::ask(&scene, &pod, &head, "")
    };
    for (ahead, status, says) in
        [(0, 200, ""), (DAY, 401, "expired"), (0, 200, ""), (-DAY, 401, "is valid only from"), (0, 200, "")]
    {
        clock.set(ahead).unwrap();
        let (answered, body) = ask();
        assert_eq!(answered, status, "{ahead}: {body} {}", agent.last_lines());
        assert!(body.contains(says), "{ahead}: {body}");
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}

#[test]
fn certificates_of_a_clock_that_was_wrong_are_replaced_when_it_is_right() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-clock-leaf", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-clock-leaf", "caller")).unwrap();
    let clock = ShiftedClock::new().unwrap();
    let configuration = agent::configuration(&scene.testbed, &scene.journal(), TrustSource::MountedCa);
    let (mut agent, _) = Monitored::start_in(&scene, configuration, &clock.environment());
    let renewed = |agent: &AgentProcess| agent.log().unwrap().matches("serving certificate renewed").count();
    let mut known = 0;
    for ahead in [DAY, 0, -DAY, 0] {
        clock.set(ahead).unwrap();
        // By its own clock, the one that it has is of no use.
        wait_until("a certificate of this clock", DEADLINE, || Ok((renewed(&agent) > known).then_some(())))
            .unwrap_or_else(|error| panic!("{ahead}: {error:#}: {}", agent.last_lines()));
        known = renewed(&agent);
        if ahead == 0 {
            // A client with the right time.
            assert_eq!(Requests::new(&scene.testbed, &pod).read().status, 200, "{}", agent.last_lines());
        }
    }
    assert!(known < 10, "renewed {known} times");
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
}
