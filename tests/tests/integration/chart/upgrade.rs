//! `helm upgrade` while a pod's clients are at work.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, Stdio},
};

use weir_common::event::{Kind, Outcome};
use weir_tests::{Pod, agent, wait_until};

use super::{super::DEADLINE, JOURNAL, release::Release, scraped};

/// Clients of a pod that call one after the other, each on connections of its own.
const CLIENTS: usize = 3;
/// Calls of each that must have succeeded after an upgrade, and with `WEIR_TEST_LONG`.
const CALLS_AFTER: usize = 10;
const CALLS_AFTER_LONG: usize = 300;

struct Calls {
    process: Child,
    codes: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Calls {
    fn begin(pod: &Pod<'_>, number: usize) -> Self {
        let calls = format!(
            "while [ ! -e /tmp/stop ]; do kubectl get namespace default -o name >/dev/null 2>/tmp/error-{number}; \
             echo $?; done; cat /tmp/error-{number}"
        );
        let mut process =
            pod.exec_command().args(["sh", "-c", &calls]).stdout(Stdio::piped()).spawn().unwrap();
        let codes = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, codes }
    }

    #[track_caller]
    fn succeed(&mut self, times: usize) {
        for _ in 0..times {
            assert_eq!(self.codes.next().unwrap().unwrap(), "0");
        }
    }
}

/// Calls of an enrolled pod go on, and a stream and a watch of its, while the DaemonSet's pod is replaced. The streams stay with the former agent,
/// whose pod ends when they have ended. `keys` is a value for those that sign.
pub(super) fn is_upgraded_under_load(release: &Release<'_>, pod: &Pod<'_>, keys: &str) {
    let former = release.pods();
    let mut clients: Vec<_> = (0..CLIENTS).map(|number| Calls::begin(pod, number)).collect();
    clients.iter_mut().for_each(|client| client.succeed(1));
    let echo = ["kubectl", "exec", "-i", "-n", &pod.namespace, &pod.name, "--", "cat"];
    let mut command = release.testbed.kubectl_command();
    command.args(["exec", "-i", "-n", &pod.namespace, &pod.name, "--"]).args(echo);
    let mut session = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut to_session = session.stdin.take().unwrap();
    let mut from_session = BufReader::new(session.stdout.take().unwrap()).lines();
    let mut say = |line: &str| {
        writeln!(to_session, "{line}").unwrap();
        assert_eq!(from_session.next().unwrap().unwrap(), line);
    };
    say("before");
    let values = [
        "startupTaint=true",
        "admission.enabled=true",
        "config.limits.drainSeconds=121",
        "config.metrics.address=0.0.0.0:9155",
        "monitoring.serviceMonitor=true",
        keys,
    ];
    // Helm waits for the former pod to be gone, which waits for the stream.
    let mut upgrade =
        release.of_the_runbook("helm upgrade weir deploy/helm/weir -n weir-system -f values.yaml --wait ");
    for value in values {
        upgrade.args(["--set", value]);
    }
    let mut upgrading = upgrade.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the former agent's pod to be ended", DEADLINE, || {
        let pods = release.pods();
        let ends = pods.iter().any(|pod| pod["metadata"]["deletionTimestamp"].is_string());
        Ok((pods.len() == 2 && ends).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", release.told()));
    let long = std::env::var_os("WEIR_TEST_LONG").is_some();
    clients.iter_mut().for_each(|client| client.succeed(if long { CALLS_AFTER_LONG } else { CALLS_AFTER }));
    say("while the former agent drains");
    drop(to_session);
    assert!(session.wait().unwrap().success());
    assert!(upgrading.wait().unwrap().success(), "{}", release.told());
    release.can_be_followed();
    wait_until("the former agent's pod to be gone", DEADLINE, || {
        Ok((release.pods().len() == 1).then_some(()))
    })
    .unwrap();
    let now = release.pods();
    assert_ne!(former[0]["metadata"]["uid"], now[0]["metadata"]["uid"]);
    assert_eq!(now[0]["status"]["containerStatuses"][0]["restartCount"], 0, "{}", release.told());
    scraped::answers_whom_its_service_monitors_send(release);
    is_rolled_back(release, &mut clients);
    pod.shell("touch /tmp/stop").unwrap();
    for mut client in clients {
        let codes: Vec<_> = client.codes.map(Result::unwrap).collect();
        assert!(codes.iter().all(|code| code == "0" || code.is_empty()), "{codes:?}\n{}", release.told());
        client.process.wait().unwrap();
    }
    check_records();
}

/// By Helm, to what was there before: the clients notice nothing of that either.
fn is_rolled_back(release: &Release<'_>, clients: &mut [Calls]) {
    let newer = release.pods()[0]["metadata"]["uid"].clone();
    assert_eq!(release.drain_seconds(), 121);
    release.must(release.of_the_runbook("helm rollback weir "));
    wait_until("the newer agent's pod to be gone", DEADLINE, || {
        let pods = release.pods();
        Ok((pods.len() == 1 && pods[0]["metadata"]["uid"] != newer).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", release.told()));
    assert_eq!(release.drain_seconds(), 120);
    clients.iter_mut().for_each(|client| client.succeed(CALLS_AFTER));
}

fn check_records() {
    let events = agent::read_events(Path::new(JOURNAL)).unwrap();
    let refused: Vec<_> =
        events.iter().filter(|event| matches!(event.kind, Kind::ConnectionRefused { .. })).collect();
    assert!(refused.is_empty(), "{refused:?}");
    let epochs: BTreeSet<_> = events.iter().map(|event| &event.epoch).collect();
    assert_eq!(
        epochs.len(),
        3,
        "one agent before, one after, one after going back, and no other that took over again"
    );
    let is_exec =
        |kind: &Kind| matches!(kind, Kind::RequestOpened(opened) if opened.attributes.subresource == "exec");
    let stream = events.iter().rfind(|event| is_exec(&event.kind)).unwrap();
    let closed = events.iter().filter(|event| event.request == stream.request);
    let closed = closed.filter_map(|event| match &event.kind {
        Kind::RequestClosed(closed) => Some((&event.epoch, closed.outcome)),
        _ => None,
    });
    assert_eq!(
        closed.collect::<Vec<_>>(),
        [(&stream.epoch, Outcome::Complete)],
        "the former agent served it to its end"
    );
}
