//! What monitoring sees of a node: metrics that agree with what the pods did, health and readiness.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use weir_common::event::{Event, Kind};
use weir_tests::{
    AgentProcess, OtelCollector, Pod, PodSpec, Testbed, agent, agent::TrustSource, command,
    progress::Progress, testbed::free_ports, wait_until,
};

use super::{
    DEADLINE, Scene,
    client::Requests,
    escape::{Attack, Target, place},
    storage_faults::Mounted,
    support::a_bundle_helps_and_holds_no_secret,
    traces,
    watch::{PROGRAM, program},
    witness::Server,
};

/// How long it may take until a detached program is noticed, attached again and in the record. A busy machine may stand still for as
/// long: of several times the fastest is judged, and each must come about.
const NOTICED_MAX: Duration = Duration::from_secs(5);
/// How often programs are detached for that at most.
const REMOVALS: usize = 3;
/// The chart's port of the approver.
const APPROVER_PORT: u16 = 9155;
/// How long an answer may take until it is asked for again; far longer than it takes.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// Every family there is, as operators read of it.
const DOCUMENTATION: &str = include_str!("../../../docs/metrics.md");

/// Families that an agent has which publishes, or tells traces; `kafka` looks for them.
const OF_PUBLISHING: [&str; 6] = [
    "weir_trace_",
    "weir_kafka_",
    "weir_journal_segments_removed",
    "weir_journal_damages",
    "weir_journal_epochs_unreadable",
    "weir_journal_unaccounted_epochs",
];

/// An agent's address for monitoring.
pub(super) struct Monitored(SocketAddr);

impl Monitored {
    /// Starts an agent that serves metrics on a port that is free.
    pub(super) fn start(scene: &Scene) -> (AgentProcess, Self) {
        let configuration =
            agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
        Self::start_with(scene, configuration)
    }

    /// The same with this configuration.
    pub(super) fn start_with(scene: &Scene, configuration: serde_json::Value) -> (AgentProcess, Self) {
        Self::start_in(scene, configuration, &[])
    }

    /// The same in this environment.
    pub(super) fn start_in(
        scene: &Scene,
        mut configuration: serde_json::Value,
        environment: &[(&str, String)],
    ) -> (AgentProcess, Self) {
        // A port that no connection takes meanwhile.
        let [port] = free_ports("127.0.0.1").unwrap();
        let free = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        configuration["metrics"] = serde_json::json!({"address": free.to_string()});
        let path = scene.scratch.path().join("agent.yaml");
        agent::write_configuration(&configuration, &path).unwrap();
        let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let mut agent =
            AgentProcess::spawn_with(&path, &scene.scratch.path().join("agent.log"), &environment).unwrap();
        agent.wait_until_ready().unwrap();
        (agent, Self(free))
    }

    /// An agent that serves them there.
    pub(super) fn at(address: SocketAddr) -> Self {
        Self(address)
    }

    /// Status and body.
    pub(super) fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let answer = wait_until(&format!("an answer to {path}"), DEADLINE, || self.ask(path))?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no whole answer")?;
        let status = head.split(' ').nth(1).context("no status")?;
        Ok((status.parse()?, body.to_owned()))
    }

    /// None of one who says nothing for long, or closes without a word: a busy machine may. Where nobody listens, that is an error.
    fn ask(&self, path: &str) -> anyhow::Result<Option<String>> {
        let mut stream = TcpStream::connect_timeout(&self.0, ANSWER_DEADLINE)?;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.0)?;
        let mut answer = String::new();
        match stream.read_to_string(&mut answer) {
            Ok(_) => Ok((!answer.is_empty()).then_some(answer)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The series by name and labels, as they stand there.
    pub(super) fn metrics(&self) -> BTreeMap<String, f64> {
        let (status, text) = self.get("/metrics").unwrap();
        assert_eq!(status, 200, "{text}");
        let series = text.lines().filter(|line| !line.starts_with('#'));
        series
            .map(|line| line.rsplit_once(' ').unwrap())
            .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
            .collect()
    }
}

#[test]
fn metrics_prove_that_what_the_kernel_saw_of_a_pod_was_proxied() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-metrics", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-metrics", "caller")).unwrap();
    let collector = OtelCollector::start(Progress::Shown).unwrap();
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["traces"] = collector.configuration();
    let (agent, monitored) = Monitored::start_with(&scene, configuration);
    for _ in 0..3 {
        let out = pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap();
        assert!(out.status.success(), "{}", agent.last_lines());
    }
    assert_eq!(monitored.get("/healthz").unwrap(), (200, "ok\n".to_owned()));
    assert_eq!(monitored.get("/readyz").unwrap(), (200, "ready\n".to_owned()));
    let metrics = monitored.metrics();
    let uid = &pod.uid;
    let of_pod = |name: &str, verdict: &str| {
        metrics[&format!("{name}{{namespace=\"it-metrics\",pod=\"caller\",uid=\"{uid}\"{verdict}}}")]
    };
    let redirected = of_pod("weir_pod_connections_total", ",verdict=\"redirected\"");
    assert!(redirected >= 3.0, "{metrics:#?}");
    assert_eq!(of_pod("weir_pod_connections_proxied_total", ""), redirected);
    assert_eq!(of_pod("weir_pod_connections_seen_total", ""), redirected);
    assert_eq!(of_pod("weir_pod_connections_total", ",verdict=\"passed\""), 0.0);
    assert!(metrics["weir_proxy_requests_total{cluster=\"testbed\",verdict=\"forwarded\"}"] >= 3.0);
    assert!(metrics["weir_journal_events_total"] >= 6.0);
    assert_eq!(metrics["weir_journal_recording"], 1.0);
    assert_eq!(metrics["weir_journal_reserve_bytes"], f64::from(64 << 10));
    assert!(metrics["weir_journal_filesystem_free_bytes"] > 0.0);
    assert_eq!(metrics["weir_ready"], 1.0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    assert!(metrics["weir_certificate_expiry_timestamp_seconds{cluster=\"testbed\"}"] > now.as_secs_f64());
    check_documented(&metrics, |name| !OF_PUBLISHING.iter().any(|family| name.starts_with(family)));
    traces::are_what_a_collector_writes(&scene, (&collector, &monitored), &pod);
    a_bundle_helps_and_holds_no_secret(&scene, &agent, &pod);
}

/// The families of the approver, which no agent has.
const OF_THE_APPROVER: &str = "weir_approver_";

/// The approver's address for monitoring, as its pod is there.
pub(super) fn of_approver(testbed: &Testbed) -> Monitored {
    let of_pods = ["get", "pods", "-n", "weir-system", "-l", "app.kubernetes.io/name=weir-approver"];
    let address = [&of_pods[..], &["-o", "jsonpath={.items[*].status.podIP}"]].concat();
    let address: IpAddr = testbed.kubectl(&address).unwrap().parse().unwrap();
    let monitored = Monitored((address, APPROVER_PORT).into());
    assert_eq!(monitored.get("/readyz").unwrap(), (200, "ready\n".to_owned()));
    let metrics = monitored.metrics();
    has_families(&metrics, |name| name.starts_with(OF_THE_APPROVER));
    assert!(metrics.keys().all(|series| series.starts_with(OF_THE_APPROVER)), "{metrics:#?}");
    monitored
}

/// Checks that what operators read about is there, and has a value.
#[track_caller]
pub(super) fn check_documented(metrics: &BTreeMap<String, f64>, expected: impl Fn(&str) -> bool) {
    has_families(metrics, |name| expected(name) && !name.starts_with(OF_THE_APPROVER));
}

#[track_caller]
fn has_families(metrics: &BTreeMap<String, f64>, expected: impl Fn(&str) -> bool) {
    let rows = DOCUMENTATION.lines().filter_map(|line| line.strip_prefix("| `weir_"));
    let names = rows.map(|row| format!("weir_{}", row.split('`').next().unwrap()));
    for name in names.filter(|name| expected(name)) {
        let exposed = metrics.keys().any(|series| series.starts_with(&name));
        assert!(exposed, "{name} is not exposed: {metrics:#?}");
    }
}

#[test]
fn readiness_and_metrics_say_when_recording_stopped() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-unready", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-unready", "caller")).unwrap();
    let mounted = Mounted::new(&["-t", "tmpfs", "-o", "size=6m"], Path::new("none"), &scene.journal());
    let (_agent, monitored) = Monitored::start(&scene);
    assert_eq!(monitored.get("/readyz").unwrap().0, 200);
    let mut requests = Requests::new(&scene.testbed, &pod);
    let mut filled = 0;
    loop {
        match requests.try_create(&format!("filler-{filled}"), 200_000) {
            Some(answer) if answer.status != 201 => break,
            Some(_) => {}
            // It still fitted into the journal, and its answer did not.
            None => requests = Requests::new(&scene.testbed, &pod),
        }
        filled += 1;
        assert!(filled < 100, "6 MiB took {filled} objects");
    }
    let (status, reasons) = monitored.get("/readyz").unwrap();
    assert_eq!(status, 503);
    assert!(reasons.contains("recording stopped: no space left for the journal"), "{reasons}");
    assert_eq!(monitored.get("/healthz").unwrap().0, 200, "a restart would not help");
    let metrics = monitored.metrics();
    assert_eq!((metrics["weir_journal_recording"], metrics["weir_ready"]), (0.0, 0.0));
    let (free, reserve) =
        (metrics["weir_journal_filesystem_free_bytes"], metrics["weir_journal_reserve_bytes"]);
    assert!(free < f64::from(4 << 20), "{free} bytes of 6 MiB are free, and no segment has room");
    assert!(reserve > 0.0 && reserve <= f64::from(64 << 10), "{reserve}");
    assert_eq!(metrics["weir_journal_gaps_total{kind=\"stopped\"}"], 1.0);
    assert!(metrics["weir_proxy_requests_total{cluster=\"testbed\",verdict=\"not_recorded\"}"] >= 1.0);
    assert!(
        metrics["weir_journal_write_failures_total"] >= 1.0
            && metrics["weir_journal_events_lost_total"] >= 1.0
    );
    mounted.remount("size=16m");
    wait_until("recording to go on", DEADLINE, || {
        requests.create("after", 10);
        Ok((monitored.get("/readyz")?.0 == 200).then_some(()))
    })
    .unwrap();
}

/// How long after this a finding was made, by its own time.
fn noticed_after(finding: &Event, began: SystemTime) -> Duration {
    let noticed = Duration::from_micros(finding.time_unix_us.try_into().unwrap());
    noticed.saturating_sub(began.duration_since(SystemTime::UNIX_EPOCH).unwrap())
}

/// Somebody else's program at a cgroup, which sends what connects to one address to another; gone with this value.
pub(super) struct Rewriting(Child);

impl Rewriting {
    pub(super) fn begin(cgroup: &Path, from: &str, to: &str) -> Self {
        let mut command = Command::new(program());
        command.arg("rewrite").arg(cgroup).args([from, to]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "attached\n");
        Self(child)
    }
}

impl Drop for Rewriting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program of others that rewrites where connections go is said and recorded, and leads no connection past Weir: one that runs
/// before Weir's gives them the address to judge, and what one makes of Weir's answer the guard drops.
fn others_programs_lead_nowhere(scene: &Scene, agent: &AgentProcess, pod: &Pod<'_>) {
    let attack = Attack::new(scene, pod);
    let endpoint = attack.address(Target::Endpoint);
    let status = agent.status().unwrap();
    assert_eq!(status["foreignPrograms"], serde_json::json!([]));
    let of_pod = status["pods"].as_array().unwrap().iter().find(|state| state["uid"] == pod.uid.as_str());
    let listener = format!("127.0.0.1:{}", of_pod.unwrap()["listenerPort"]);
    let (container, _) = place(pod);
    let root = container.ancestors().find(|folder| !folder.join("cgroup.events").exists()).unwrap();
    let mut fastest = Duration::MAX;
    for (cgroup, from, expected) in [
        // The kernel runs it first.
        (container.parent().unwrap(), attack.address(Target::Service), "connected"),
        (container.as_path(), "192.0.2.1:443", "connected"),
        // After Weir's, which have been there before.
        (root, listener.as_str(), "timedOut"),
    ] {
        let known = scene.events().len();
        let rewriting = Rewriting::begin(cgroup, from, endpoint);
        let began = SystemTime::now();
        let target = if from == "192.0.2.1:443" { from } else { attack.address(Target::Service) };
        if expected == "connected" {
            let mut command = scene.testbed.kubectl_command();
            command.args(["exec", "-i", "-n", &pod.namespace, &pod.name, "--"]);
            command.args([PROGRAM, "--relay", "tcp", target]);
            let said = attack.witness.ask(command);
            let at = cgroup.display();
            assert_eq!((said.as_str(), attack.direct()), (expected, Vec::new()), "{from} at {at}");
            assert_eq!(attack.witness.check(Server::Weir, Some(agent)), 1);
        } else {
            let said = attack.try_way("tcp", Target::Service);
            assert_eq!(said, (expected.to_owned(), Vec::new()), "{from} at {}", cgroup.display());
        }
        let place = format!(" of connect4 at {}", cgroup.display());
        let noticed = wait_until("the other's program in the record", DEADLINE, || {
            let new = scene.events().split_off(known);
            Ok(new.into_iter().find(|event| {
                matches!(&event.kind, Kind::Finding { name, message, .. }
                    if name == "foreignProgram" && (message.contains(&format!("{place},")) || message.contains(&format!("{place};"))))
            }))
        });
        let noticed = noticed.unwrap_or_else(|error| panic!("{error:#}: {}", agent.last_lines()));
        if cgroup != root {
            assert!(
                matches!(&noticed.kind, Kind::Finding { caller: Some(caller), .. }
                if caller.pod.as_ref().is_some_and(|found| found.uid == pod.uid)),
                "{noticed:?}"
            );
        }
        let after = noticed_after(&noticed, began);
        eprintln!("another's program at {}: noticed after {} ms", cgroup.display(), after.as_millis());
        fastest = fastest.min(after);
        let status = agent.status().unwrap();
        let said = status["foreignPrograms"].as_array().unwrap();
        assert!(said.len() == 1 && said[0].as_str().unwrap().ends_with(&place), "{status}");
        if cgroup == root {
            doctor_names(agent, &place);
        }
        drop(rewriting);
    }
    assert!(fastest < NOTICED_MAX, "{fastest:?}");
    assert_eq!(attack.witness.direct(), 0, "requests that the API server had from the pod itself");
    scene.event("what the guard dropped", |event| {
        matches!(&event.kind, Kind::ConnectionRefused { reason, .. } if reason.contains("dropped by the guard"))
    });
}

fn doctor_names(agent: &AgentProcess, place: &str) {
    let mut doctor = Command::new(agent::built_binary("weir-agent").unwrap());
    let ended = command::output(doctor.args(["doctor", "--json", "--config"]).arg(agent.config())).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "programs of others").unwrap();
    let found = check["found"].as_str().unwrap();
    assert!(check["ok"] == false && found.ends_with(place), "{found}");
}

/// Removes everything at the root and at the pods' root, as a privileged hand would, and waits until the agent is ready; gives after how
/// long that was noticed and repaired.
fn detached_and_noticed(scene: &Scene, links: &Path, monitored: &Monitored) -> Duration {
    let (mut removed, began) = (0, SystemTime::now());
    for entry in std::fs::read_dir(links).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
        removed += 1;
    }
    assert!(removed > 20, "{removed}");
    // Written when they are attached again.
    let finding = scene.event("the finding", |event| {
        let is_new = u128::try_from(event.time_unix_us).unwrap()
            >= began.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros();
        is_new && matches!(&event.kind, Kind::Finding { name, .. } if name == "programDetached")
    });
    let noticed = noticed_after(&finding, began);
    eprintln!("{removed} links removed; noticed and repaired within {} ms", noticed.as_millis());
    wait_until("the agent to be ready", DEADLINE, || Ok((monitored.get("/readyz")?.0 == 200).then_some(())))
        .unwrap();
    noticed
}

#[test]
fn programs_that_someone_detaches_are_attached_again_and_the_agent_is_ready() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-detached", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-detached", "caller")).unwrap();
    let (mut agent, monitored) = Monitored::start(&scene);
    let before = monitored.metrics();
    assert_eq!(
        (before["weir_canary_passing"], before["weir_findings_total{name=\"programDetached\"}"]),
        (1.0, 0.0)
    );
    assert!(before["weir_canary_connections_total{verdict=\"redirected\"}"] >= 1.0, "{before:#?}");
    let status = agent.status().unwrap();
    assert_eq!(
        (status["agent"]["state"].as_str(), status["agent"]["pid"].as_u64()),
        (Some("running"), Some(agent.pid().into()))
    );

    others_programs_lead_nowhere(&scene, &agent, &pod);

    let links = Path::new(status["folder"].as_str().unwrap()).join("links");
    let mut fastest = Duration::MAX;
    for _ in 0..REMOVALS {
        fastest = fastest.min(detached_and_noticed(&scene, &links, &monitored));
        if fastest < NOTICED_MAX {
            break;
        }
    }
    assert!(fastest < NOTICED_MAX, "{fastest:?}");
    let out = pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap();
    assert!(out.status.success(), "{}", agent.last_lines());
    let after = monitored.metrics();
    assert!(after["weir_findings_total{name=\"programDetached\"}"] >= 1.0, "{after:#?}");
    assert_eq!(after["weir_canary_passing"], 1.0);

    agent.crash().unwrap();
    assert_eq!(agent.status().unwrap()["agent"]["state"], "absent");
}
