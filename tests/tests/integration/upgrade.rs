//! Hot upgrade: an agent follows another under load, and no pod notices.

use std::{
    io::{BufRead as _, BufReader, Lines, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use weir_common::event::{Kind, Outcome};
use weir_tests::{AgentProcess, Pod, PodSpec, agent, agent::TrustSource, command, wait_until};

use super::{
    DEADLINE, Scene,
    monitoring::Monitored,
    unready::{Misled, nobody_is_told_nothing},
    verify,
};

/// Calls in a row that must have succeeded after an upgrade, and with `WEIR_TEST_LONG`.
const CALLS_AFTER: usize = 10;
const CALLS_AFTER_LONG: usize = 500;

/// The agent before has another layout of the kernel's maps, as one of an earlier version may.
const OLDER_LAYOUT: (&str, &str) = ("WEIR_TEST_LAYOUT", "2");

#[test]
fn an_upgrade_refuses_no_connection_and_cuts_no_stream() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-upgrade", true);
    scene.namespace("it-upgrade-free", false);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-upgrade", "caller")).unwrap();
    let other = scene.testbed.run_pod(&PodSpec::idle("it-upgrade", "other")).unwrap();
    let free = scene.testbed.run_pod(&PodSpec::idle("it-upgrade-free", "free")).unwrap();
    let long = std::env::var_os("WEIR_TEST_LONG").is_some();
    // Longer than all the calls may take: the stream must not meet the limit.
    let path = draining(&scene, if long { 3600 } else { 300 });
    let start = |name: &str| AgentProcess::start(&path, &scene.scratch.path().join(name)).unwrap();
    let mut current = with_older_layout(&path, &scene.scratch.path().join("agent-0.log"));
    let pins = |layout: &str| Path::new("/sys/fs/bpf/weir").join(layout).exists();
    assert_eq!((pins("v2"), pins("v3")), (true, false));

    // One call after the other; each prints its exit code.
    let calls = "while [ ! -e /tmp/stop ]; do kubectl get namespace default -o name >/dev/null 2>/tmp/error; echo $?; done; cat /tmp/error";
    let begin =
        |pod: &Pod<'_>| pod.exec_command().args(["sh", "-c", calls]).stdout(Stdio::piped()).spawn().unwrap();
    let (mut calling, calling_freely) = (begin(&pod), begin(&free));
    let mut codes = BufReader::new(calling.stdout.take().unwrap()).lines();
    let mut call = |when: &str| assert_eq!(codes.next().unwrap().unwrap(), "0", "{when}");
    // A stream of the pod itself: what goes in comes out, before and after.
    let mut session = Echo::begin(&scene, &pod, &other);
    // And a watch of the pod's: what happens is told, before and after.
    let script = "kubectl get configmaps -n it-upgrade -w -o name & while [ ! -e /tmp/stop ]; do sleep 0.1; done; kill $!";
    let mut watching = pod.exec_command().args(["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut told = BufReader::new(watching.stdout.take().unwrap()).lines();
    assert_eq!(told.next().unwrap().unwrap(), "configmap/kube-root-ca.crt");
    let mut hears = |name: &str| {
        scene.testbed.kubectl(&["create", "configmap", name, "-n", "it-upgrade"]).unwrap();
        assert_eq!(told.next().unwrap().unwrap(), format!("configmap/{name}"));
    };
    call("before");
    session.say("before the upgrade");
    hears("before");

    let calls_after = if long { CALLS_AFTER_LONG } else { CALLS_AFTER };
    let mut first = None;
    for upgrade in 1..=2 {
        let log = format!("agent-{upgrade}.log");
        let next = start(&log);
        let former = std::mem::replace(&mut current, next);
        for _ in 0..calls_after {
            call(&format!("during upgrade {upgrade}: {}", current.last_lines()));
        }
        session.say(&format!("after upgrade {upgrade}"));
        hears(&format!("after-{upgrade}"));
        if upgrade == 1 {
            wait_until("the older layout to be gone", DEADLINE, || Ok((!pins("v2")).then_some(()))).unwrap();
            for _ in 0..CALLS_AFTER {
                call(&format!("without the older layout: {}", current.last_lines()));
            }
        }
        // The second serves no stream, and so has nothing to drain.
        match upgrade {
            1 => first = Some(former),
            _ => succeeded(former),
        }
    }
    no_way_back(&path);
    call("after an older one was refused");
    for pod in [&pod, &free] {
        pod.shell("touch /tmp/stop").unwrap();
    }
    let freely = calling_freely.wait_with_output().unwrap();
    let freely = String::from_utf8(freely.stdout).unwrap();
    assert!(freely.starts_with("0\n0\n") && freely.lines().all(|code| code == "0"), "{freely}");
    for code in codes.by_ref() {
        let code = code.unwrap();
        assert!(code == "0" || code.is_empty(), "{code}");
    }
    calling.wait().unwrap();
    watching.wait().unwrap();
    session.end();
    succeeded(first.unwrap());
    assert!(current.terminate().unwrap().success(), "{}", current.last_lines());

    check_records(&scene);
}

/// A configuration by which an agent waits so many seconds for streams.
fn draining(scene: &Scene, seconds: u64) -> PathBuf {
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["limits"] = serde_json::json!({"drainSeconds": seconds});
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    path
}

fn succeeded(mut former: AgentProcess) {
    assert!(former.wait_for_succession().unwrap().success(), "{}", former.last_lines());
}

pub(super) fn with_older_layout(configuration: &Path, log: &Path) -> AgentProcess {
    let agent = AgentProcess::spawn_with(configuration, log, &[OLDER_LAYOUT]).unwrap();
    wait_until("the agent with the older layout to be ready", DEADLINE, || {
        Ok(agent.log()?.contains(": ready").then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", agent.last_lines()));
    agent
}

/// Back to an older layout there is no handover, and nothing comes of the attempt.
fn no_way_back(configuration: &Path) {
    let mut older = Command::new(agent::built_binary("weir-agent").unwrap());
    older.args(["run", "--config"]).arg(configuration).env(OLDER_LAYOUT.0, OLDER_LAYOUT.1);
    let (code, _, err) = super::shown(&command::output(&mut older).unwrap());
    assert!(code == Some(1) && err.contains("does not hand over: it has version"), "{code:?} {err}");
}

/// An exec stream from one pod into another, which says again what it is told.
struct Echo {
    process: Child,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
}

impl Echo {
    fn begin(scene: &Scene, pod: &Pod<'_>, other: &Pod<'_>) -> Self {
        let mut command = scene.testbed.kubectl_command();
        command.args(["exec", "-i", "-n", "it-upgrade", &pod.name, "--"]);
        command.args(["kubectl", "exec", "-i", "-n", "it-upgrade", &other.name, "--", "cat"]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self { process, to, from: BufReader::new(from).lines() }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.to, "{line}").unwrap();
        assert_eq!(self.from.next().unwrap().unwrap(), line);
    }

    fn end(self) {
        let Self { mut process, to, from: _from } = self;
        drop(to);
        assert!(process.wait().unwrap().success());
    }
}

/// Three epochs, and one exec stream that ended where it began.
fn check_records(scene: &Scene) {
    let events = scene.events();
    // That of the agent which was refused has none.
    let requests = events.iter().filter(|event| matches!(event.kind, Kind::RequestOpened(_)));
    let epochs: std::collections::BTreeSet<_> = requests.map(|event| &event.epoch).collect();
    assert_eq!(epochs.len(), 3, "each process has its own epoch");
    let exec = events
        .iter()
        .find(|event| matches!(&event.kind, Kind::RequestOpened(opened) if opened.attributes.subresource == "exec"))
        .unwrap();
    let closed = events.iter().find_map(|event| match &event.kind {
        Kind::RequestClosed(closed) if event.request == exec.request => Some((closed.outcome, &event.epoch)),
        _ => None,
    });
    assert_eq!(
        closed,
        Some((Outcome::Complete, &exec.epoch)),
        "the first agent served the stream to its end"
    );
    let refused = events.iter().filter(|event| matches!(event.kind, Kind::ConnectionRefused { .. })).count();
    assert_eq!(refused, 0);
    let verified = verify(&scene.journal());
    assert!(verified.status.success(), "{:?}", super::shown(&verified));
}

#[test]
fn a_successor_that_fails_leaves_the_running_agent_in_charge() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-successor", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-successor", "caller")).unwrap();
    let (mut running, monitored) = Monitored::start(&scene);
    let ask = || super::shown(&pod.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap());
    assert_eq!(ask().0, Some(0));
    let (cgroup, _) = super::escape::place(&pod);
    let root = cgroup.ancestors().find(|folder| !folder.join("cgroup.events").exists()).unwrap();
    // None is sent while a successor is there, and one as soon as it has failed.
    let misled = Misled::new(&running, &monitored, root);
    // It takes the listeners, reaches no API server, and dies.
    let broken = scene.scratch.path().join("broken.yaml");
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    let kubeconfig = scene.scratch.path().join("broken.kubeconfig");
    let file = configuration["clusters"][0]["kubeconfig"].as_str().unwrap().to_owned();
    let text = std::fs::read_to_string(file).unwrap();
    let mut changed = String::new();
    for line in text.lines() {
        let server = line.trim_start().starts_with("server:");
        changed.push_str(if server { "    server: https://127.0.0.1:9" } else { line });
        changed.push('\n');
    }
    std::fs::write(&kubeconfig, changed).unwrap();
    configuration["clusters"][0]["kubeconfig"] = kubeconfig.to_str().unwrap().into();
    agent::write_configuration(&configuration, &broken).unwrap();
    let binary = agent::built_binary("weir-agent").unwrap();
    let mut successor = std::process::Command::new(binary)
        .args(["run", "--config"])
        .arg(&broken)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the handover to begin", DEADLINE, || {
        Ok(running.log()?.contains("a successor takes over").then_some(()))
    })
    .unwrap();
    assert_eq!(ask().0, Some(0), "while the successor is there");
    successor.kill().unwrap();
    successor.wait().unwrap();
    wait_until("the running agent to go on", DEADLINE, || {
        Ok(running.log()?.contains("this agent goes on").then_some(()))
    })
    .unwrap();
    misled.is_unready();
    // Pods are served all the same.
    assert_eq!(ask().0, Some(0));
    let late = scene.testbed.run_pod(&PodSpec::idle("it-successor", "late")).unwrap();
    let out = late.exec(&["kubectl", "get", "namespace", "default", "-o", "name"]).unwrap();
    assert!(out.status.success(), "{}", running.last_lines());
    // A process of a pod that has got at the socket is no successor, root or not: its own pod is on its side of the wall.
    let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", cgroup.display());
    let stranger = command::output(
        std::process::Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(agent::built_binary("weir-agent").unwrap())
            .args(["run", "--config"])
            .arg(running.config()),
    );
    let (code, _, err) = super::shown(&stranger.unwrap());
    assert!(
        code == Some(1) && err.contains("does not hand over: it runs in the pod it-successor/caller"),
        "{code:?} {err}"
    );
    scene.event(
        "the stranger in the record",
        |event| matches!(&event.kind, Kind::Finding { name, .. } if name == "successorRefused"),
    );
    nobody_is_told_nothing();
    assert_eq!(ask().0, Some(0), "the running agent goes on");
    misled.until_ready_again(&scene);
    assert!(running.terminate().unwrap().success(), "{}", running.last_lines());
}
