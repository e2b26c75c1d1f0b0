//! Who may publish and read, by bearer token, and what groups of readers share: on a real Kafka. Amazon's is not to be had: its tokens are
//! held against those of AWS's own signer.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
use serde_json::{Value, json};
use weir_common::event::Event;
use weir_tests::{
    Kafka, Pod, PodSpec, agent, command, components, kafka::Issuer, progress::Progress, wait_until,
};

use super::{
    Scene,
    kafka::{
        CHECKPOINTS, EVENTS, PUBLISHED_DEADLINE, check, configuration, doctor, kafka, published, publishing,
        recorded, sound, source, start, wait_until_published, weir,
    },
    monitoring::Monitored,
    shown,
};

/// `aud` of tokens for the broker.
const AUDIENCE: &str = "kafka.example.test";

/// A few requests.
fn work(pod: &Pod<'_>, name: &str) {
    pod.shell(&format!(
        "kubectl create configmap {name} --from-literal=a=b && kubectl get configmaps -o yaml"
    ))
    .unwrap();
}

/// A token of the cluster's service account issuer.
fn token(scene: &Scene, namespace: &str, audience: &str) -> String {
    let arguments =
        ["create", "token", "default", "-n", namespace, "--duration", "10m", "--audience", audience];
    scene.testbed.kubectl(&arguments).unwrap().trim().to_owned()
}

/// Puts a token into a file as the kubelet does: whole, under its name.
fn renew(file: &Path, token: &str) {
    let fresh = file.with_extension("fresh");
    std::fs::write(&fresh, format!("{token}\n")).unwrap();
    std::fs::rename(fresh, file).unwrap();
}

#[test]
fn the_agent_and_readers_show_a_token_from_a_file_which_is_renewed_while_they_run() {
    let Some(mut scene) = Scene::new() else { return };
    let keys = scene.testbed.kubectl(&["get", "--raw", "/openid/v1/jwks"]).unwrap();
    let discovery = scene.testbed.kubectl(&["get", "--raw", "/.well-known/openid-configuration"]).unwrap();
    let discovery: Value = serde_json::from_str(&discovery).unwrap();
    let name = discovery["issuer"].as_str().unwrap().to_owned();
    let kafka = Kafka::start_with_tokens(Issuer { name, keys, audience: AUDIENCE.to_owned() }).unwrap();
    kafka.create_topic(EVENTS, 3, &[]).unwrap();
    kafka.create_topic(CHECKPOINTS, 1, &[]).unwrap();
    scene.namespace("it-kafka-token", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-kafka-token", "caller")).unwrap();
    let file = scene.scratch.path().join("token");
    // One that is for somebody else: the brokers' own check refuses it.
    let foreign = token(&scene, "it-kafka-token", "somebody.else.test");
    renew(&file, &foreign);
    let mut publishing = publishing(&kafka.bootstrap_for_tokens());
    let authority = kafka.secured().certificate_authority;
    publishing["properties"] = json!({"ssl.ca.location": authority});
    publishing["oauth"] = json!({"tokenFile": file});
    let (mut agent, monitored) = Monitored::start_with(&scene, configuration(&scene, publishing));
    work(&pod, "one");
    let refused = wait_until("readiness to say that the brokers refuse", PUBLISHED_DEADLINE, || {
        let (_, text) = monitored.get("/readyz")?;
        Ok(text.contains("the brokers refuse the agent").then_some(text))
    });
    let refused = refused.unwrap_or_else(|error| panic!("{error}; {}", agent.last_lines()));
    let agent_yaml = scene.scratch.path().join("agent.yaml");
    let found = doctor(&agent_yaml, "kafka");
    for said in [&refused, &found] {
        assert!(said.contains("invalid_token"), "{said}");
        assert!(!said.contains(&foreign), "{said}");
    }
    assert!(published(&kafka).is_empty());

    // The right one takes its place, and nobody starts anything anew.
    let right = token(&scene, "it-kafka-token", AUDIENCE);
    renew(&file, &right);
    wait_until_published(&kafka, &scene.journal());
    work(&pod, "two");
    wait_until_published(&kafka, &scene.journal());
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    check(&recorded(&scene.journal()), &published(&kafka));
    assert!(!agent.log().unwrap().contains(&right), "a token is in the log");

    // Readers have it from a file too.
    let properties = scene.scratch.path().join("weir.properties");
    let lines =
        format!("weir.oauth.token.file={}\nssl.ca.location={}\n", file.display(), authority.display());
    std::fs::write(&properties, lines).unwrap();
    let (properties, topics) = (properties.to_str().unwrap(), source(&kafka.bootstrap_for_tokens()));
    sound(&topics, &["--kafka-config", properties]);
    // One that has ended is said by who reads the file. {"exp":1}
    renew(&file, "e30.eyJleHAiOjF9.c2ln");
    let (code, out, err) = shown(&weir(&["sessions", "--from", &topics, "--kafka-config", properties]));
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(err.contains("ago; does somebody renew it?"), "{err}");
    let found = doctor(&agent_yaml, "kafka");
    assert!(found.contains("ago; does somebody renew it?"), "{found}");
}

/// The region of the token that a process of this test is to make; without it this test compares.
const MSK_REGION: &str = "WEIR_TEST_MSK_REGION";

/// The URL in a token, as its beginning and its parameters in the order of their names: verifiers sort them. What AWS's signer adds about
/// itself is not signed.
fn presigned(token: &str) -> (String, BTreeMap<String, String>) {
    let url = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(token.trim()).unwrap()).unwrap();
    let (base, query) = url.split_once('?').unwrap();
    let parameters = query.split('&').map(|parameter| parameter.split_once('=').unwrap());
    let parameters = parameters.filter(|(name, _)| *name != "User-Agent");
    (base.to_owned(), parameters.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

#[test]
fn a_token_for_amazon_msk_is_the_one_that_awss_own_signer_makes() {
    if let Ok(region) = std::env::var(MSK_REGION) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let token = runtime.block_on(weir_agent::aws::msk_token(&region, None)).unwrap();
        println!("token {}", token.text.as_str());
        return;
    }
    let signer = components::msk_signer(Progress::Shown).unwrap();
    let session = Some("IQoJb3JpZ2luX2Vj+a/b==");
    for (region, session) in [("eu-central-1", None), ("us-east-1", session), ("cn-north-1", session)] {
        let said = |command: &mut Command| {
            command
                .env("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
                .env("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG+bPx");
            command.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
            command.env_remove("AWS_PROFILE").env_remove("AWS_SESSION_TOKEN");
            command.envs(session.map(|session| ("AWS_SESSION_TOKEN", session)));
            command::run(command).unwrap()
        };
        let theirs = || presigned(&said(Command::new(&signer).arg(region)));
        let name = "kafka_access::a_token_for_amazon_msk_is_the_one_that_awss_own_signer_makes";
        let ours = || {
            let mut command = Command::new(std::env::current_exe().unwrap());
            let said = said(command.args(["--exact", name, "--nocapture"]).env(MSK_REGION, region));
            presigned(said.lines().find_map(|line| line.split_once("token ")).unwrap().1)
        };
        // Each has its own look at the clock: until both were in the same second.
        let of_one_second = (0..50).find_map(|_| {
            let (ours, theirs) = (ours(), theirs());
            (ours.1["X-Amz-Date"] == theirs.1["X-Amz-Date"]).then_some((ours, theirs))
        });
        let (ours, theirs) = of_one_second.expect("both are made within a second");
        assert_eq!(ours, theirs, "{region}");
        assert_eq!((ours.1.len(), ours.1["X-Amz-Signature"].len()), (7 + usize::from(session.is_some()), 64));
    }
}

/// A `weir events --follow` and what it has written so far.
pub(super) struct Follower {
    process: Child,
    lines: Receiver<String>,
    pub(super) events: Vec<Event>,
}

impl Follower {
    pub(super) fn start(from: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(agent::built_binary("weir").unwrap());
        command.args(["events", "--follow", "--from", from]).args(arguments).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = channel();
        // It ends with the process, whose output then does.
        std::thread::spawn(move || {
            for line in output.lines() {
                // The last may be half a line, when it was killed in the middle of one.
                let Ok(line) = line else { break };
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { process, lines, events: Vec::new() }
    }

    /// A member of a group.
    fn join(from: &str, properties: &Path, more: &[&str]) -> Self {
        let of_group = ["--group", "siem", "--kafka-config", properties.to_str().unwrap()];
        Self::start(from, &[&of_group, more].concat())
    }

    /// Whether it has given an event of a session by now: one that is in a partition with all others of that session.
    pub(super) fn has_begun(&mut self) -> bool {
        self.take();
        self.events.iter().any(|event| !event.session.is_empty())
    }

    /// Waits until it has given all that is on the topic from where it began in each partition, and checks that it gave each event
    /// once, in its session's order, and nothing else. Returns how many there are on the topic, and how many it gave.
    #[track_caller]
    pub(super) fn check_given(&mut self, kafka: &Kafka, begins_with_the_topic: bool) -> [usize; 2] {
        let messages = kafka.messages(EVENTS).unwrap();
        let on_topic: Vec<_> = messages
            .iter()
            .map(|message| (message, key(&serde_json::from_str(&message.value).unwrap())))
            .collect();
        wait_until("what is followed to be given", PUBLISHED_DEADLINE, || {
            self.take();
            let given: BTreeSet<_> = self.events.iter().map(key).collect();
            let mut begun = BTreeSet::new();
            let expected = on_topic.iter().filter(|(message, key)| {
                if begins_with_the_topic || given.contains(key) {
                    begun.insert(message.partition);
                }
                begun.contains(&message.partition)
            });
            Ok((expected.map(|(_, key)| key.clone()).collect::<BTreeSet<_>>() == given).then_some(()))
        })
        .unwrap();
        let given: BTreeSet<_> = self.events.iter().map(key).collect();
        assert_eq!(given.len(), self.events.len(), "something is given twice");
        check_order(self);
        [on_topic.iter().map(|(_, key)| key).collect::<BTreeSet<_>>().len(), given.len()]
    }

    fn take(&mut self) -> usize {
        while let Ok(line) = self.lines.try_recv() {
            if let Ok(event) = serde_json::from_str(&line) {
                self.events.push(event);
            }
        }
        self.events.len()
    }

    /// SIGKILL: it says nothing more, and leaves no group.
    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        // What it wrote before is in the pipe still.
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(10)) {
            if let Ok(event) = serde_json::from_str(&line) {
                self.events.push(event);
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What names an event wherever it comes from.
fn key(event: &Event) -> (String, u64) {
    (event.epoch.clone(), event.sequence)
}

/// All events of the topic by their key, with their partition.
fn on_topic(kafka: &Kafka) -> BTreeMap<(String, u64), u32> {
    let messages = kafka.messages(EVENTS).unwrap();
    let events = messages.iter().map(|message| {
        let event: Event = serde_json::from_str(&message.value).unwrap();
        (key(&event), message.partition)
    });
    events.collect()
}

/// Checks that each session came in its order.
#[track_caller]
fn check_order(member: &Follower) {
    let mut last = BTreeMap::new();
    for event in member.events.iter().filter(|event| !event.session.is_empty()) {
        let before = last.insert((event.session.clone(), event.epoch.clone()), event.sequence);
        assert!(before < Some(event.sequence), "{} after {before:?}: {}", event.sequence, event.session);
    }
}

#[test]
fn members_of_a_group_share_the_partitions_and_nothing_is_missing_when_one_is_killed() {
    let Some(mut scene) = Scene::new() else { return };
    let kafka = kafka();
    scene.namespace("it-kafka-group", true);
    let names: Vec<String> = (0..6).map(|number| format!("caller-{number}")).collect();
    let pods: Vec<_> = names
        .iter()
        .map(|name| scene.testbed.run_pod(&PodSpec::idle("it-kafka-group", name)).unwrap())
        .collect();
    let properties = scene.scratch.path().join("weir.properties");
    // A member that was killed is missed after so long.
    std::fs::write(&properties, "session.timeout.ms=6000\nheartbeat.interval.ms=1000\n").unwrap();
    let from = format!("kafka://{}/{EVENTS}", kafka.bootstrap());
    let mut agent = start(&scene, publishing(&kafka.bootstrap()), "agent.log");
    let work_of_all = |round: &str| {
        pods.iter().zip(&names).for_each(|(pod, name)| work(pod, &format!("{name}-{round}")));
    };
    work_of_all("first");
    let mut members = [Follower::join(&from, &properties, &[]), Follower::join(&from, &properties, &[])];
    // Both have something to do: six sessions, three partitions.
    let mut round = 0;
    wait_until("both members to be given events", PUBLISHED_DEADLINE, || {
        round += 1;
        work_of_all(&format!("shared-{round}"));
        Ok(members.iter_mut().all(|member| member.take() > 0).then_some(()))
    })
    .unwrap();
    members[0].kill();
    work_of_all("after");
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let expected = on_topic(&kafka);
    wait_until("the other member to give what the killed one has not", PUBLISHED_DEADLINE, || {
        members[1].take();
        let given: BTreeSet<_> = members.iter().flat_map(|member| &member.events).map(key).collect();
        Ok(expected.keys().all(|key| given.contains(key)).then_some(()))
    })
    .unwrap();

    // Duplicates are removed by the key, and each session is in order at each member.
    let given: Vec<_> = members.iter().flat_map(|member| &member.events).map(key).collect();
    let distinct: BTreeSet<_> = given.iter().cloned().collect();
    assert_eq!(distinct, expected.keys().cloned().collect());
    println!("{} events, {} given twice", distinct.len(), given.len() - distinct.len());
    members.iter().for_each(check_order);
    members[1].kill();

    // The group goes on where it was: nothing is new. Another one begins where it is told.
    let mut agent = start(&scene, publishing(&kafka.bootstrap()), "later.log");
    let since = jiff::Timestamp::now();
    work_of_all("later");
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    let all = on_topic(&kafka);
    let fresh: BTreeSet<_> = all.keys().filter(|key| !expected.contains_key(*key)).cloned().collect();
    let mut later = Follower::join(&from, &properties, &[]);
    wait_until("the group to go on", PUBLISHED_DEADLINE, || {
        later.take();
        let given: BTreeSet<_> = later.events.iter().map(key).collect();
        Ok(fresh.is_subset(&given).then_some(()))
    })
    .unwrap();
    let again = later.events.iter().map(key).filter(|key| !fresh.contains(key)).count();
    // At most what the last member had not committed when it was killed.
    assert!(again < expected.len() / 2, "{again} of {} came again", expected.len());
    let since = since.to_string();
    let mut other = Follower::start(&from, &["--group", "other", "--since", &since]);
    let first: Event = serde_json::from_str(&other.lines.recv().unwrap()).unwrap();
    other.kill();
    assert!(!expected.contains_key(&key(&first)), "it is of before: {first:?}");
}
