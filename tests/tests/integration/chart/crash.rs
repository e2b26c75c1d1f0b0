//! An agent that hangs, and one that ends again and again, both under the kubelet: what pods have of it, and whoever is on call.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use weir_tests::{Pod, command, components, progress::Progress, wait_until};

use super::{
    super::{
        guard::{asks, is_refused},
        monitoring::Monitored,
        shown,
    },
    release::{Release, on_node},
};

/// Where the chart's agent tells its metrics by default.
const METRICS: &str = "127.0.0.1:9155";
/// Three probes that fail, five seconds apart; a container that has ended waits for ten and then for twenty seconds.
const PROBED_DEADLINE: Duration = Duration::from_secs(60);
/// Ends that the kubelet begins to wait after, and those that the alert needs, with `WEIR_TEST_LONG`.
const ENDS: usize = 2;
const ENDS_LONG: usize = 3;

/// What Prometheus keeps of one question: nothing but `up` where nobody answers.
type Scraped = Option<BTreeMap<String, f64>>;

pub(super) fn agents_process() -> Pid {
    let status = command::run(&mut on_node(&["status", "--json"])).unwrap();
    let status: Value = serde_json::from_str(&status).unwrap();
    Pid::from_raw(i32::try_from(status["agent"]["pid"].as_i64().unwrap()).unwrap())
}

fn is_ready(release: &Release<'_>) -> bool {
    let pods = release.pods();
    let conditions = pods[0]["status"]["conditions"].as_array().unwrap();
    conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// Its pod is not ready while it does not answer, and is again when it does.
pub(super) fn a_stopped_agent_is_not_ready(release: &Release<'_>) {
    assert!(is_ready(release));
    let agent = agents_process();
    kill(agent, Signal::SIGSTOP).unwrap();
    let noticed =
        wait_until("the pod not to be ready", PROBED_DEADLINE, || Ok((!is_ready(release)).then_some(())));
    kill(agent, Signal::SIGCONT).unwrap();
    noticed.unwrap();
    wait_until("the pod to be ready", PROBED_DEADLINE, || Ok(is_ready(release).then_some(()))).unwrap();
}

/// Enrolled pods are refused each time, others see no change, and what monitoring is told makes the alerts fire.
pub(super) fn an_agent_that_ends_again_and_again_is_told_of(
    release: &Release<'_>,
    enrolled: &Pod<'_>,
    free: &Pod<'_>,
) {
    let long = std::env::var_os("WEIR_TEST_LONG").is_some();
    let monitored = Monitored::at(METRICS.parse().unwrap());
    let container = || release.pods()[0]["status"]["containerStatuses"][0].clone();
    let before = container()["restartCount"].as_u64().unwrap();
    let mut scraped: Vec<Scraped> = vec![Some(monitored.metrics())];
    let mut waited = false;
    for end in 1..=if long { ENDS_LONG } else { ENDS } {
        kill(agents_process(), Signal::SIGKILL).unwrap();
        is_refused(enrolled, &format!("after end {end}"));
        assert_eq!(asks(free).0, Some(0), "a pod that is not enrolled, after end {end}");
        if end > 1 {
            wait_until("the kubelet to wait before it starts it again", PROBED_DEADLINE, || {
                let reason = &container()["state"]["waiting"]["reason"];
                Ok((reason == "CrashLoopBackOff").then_some(()))
            })
            .unwrap();
            waited = true;
            assert!(!is_ready(release));
            is_refused(enrolled, "while the kubelet waits");
            assert_eq!(asks(free).0, Some(0), "a pod that is not enrolled, while the kubelet waits");
            assert!(monitored.get("/metrics").is_err(), "nobody is there");
            scraped.push(None);
        }
        wait_until("the pod to be served again", PROBED_DEADLINE, || {
            Ok((asks(enrolled).0 == Some(0)).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", release.told()));
        scraped.push(Some(monitored.metrics()));
    }
    assert!(waited);
    let ends = if long { ENDS_LONG } else { ENDS };
    assert_eq!(container()["restartCount"].as_u64().unwrap(), before + u64::try_from(ends).unwrap());
    // One that stays away: nobody has answered for three minutes.
    let mut away = scraped.clone();
    away.pop();
    away.extend([None, None, None]);
    fires(release, "WeirAgentAway", &away);
    if long {
        fires(release, "WeirAgentRestarts", &scraped);
    }
}

/// By promtool, from the series that the agent gave, one question a minute.
#[track_caller]
fn fires(release: &Release<'_>, alert: &str, scraped: &[Scraped]) {
    let names = |name: &str| {
        let of = scraped
            .iter()
            .flatten()
            .flat_map(BTreeMap::keys)
            .filter(|series| series.split('{').next() == Some(name));
        of.cloned().collect::<BTreeSet<_>>()
    };
    let mut series = vec![json!({
        "series": "up{instance=\"n1\",job=\"weir\"}",
        "values": scraped.iter().map(|told| if told.is_some() { "1" } else { "0" }).collect::<Vec<_>>().join(" "),
    })];
    for name in ["weir_build_info", "weir_start_timestamp_seconds"] {
        let named = names(name);
        assert!(!named.is_empty(), "nothing tells {name}");
        for own in named {
            let values: Vec<_> = scraped
                .iter()
                .map(|told| {
                    told.as_ref().and_then(|told| told.get(&own)).map_or("stale".to_owned(), f64::to_string)
                })
                .collect();
            let labels = own
                .split_once('{')
                .map_or(String::new(), |(_, labels)| format!(",{}", labels.trim_end_matches('}')));
            series.push(json!({
                "series": format!("{name}{{instance=\"n1\",job=\"weir\"{labels}}}"), "values": values.join(" "),
            }));
        }
    }
    let labels = format!(
        "ALERTS{{alertname=\"{alert}\",alertstate=\"firing\",severity=\"critical\",instance=\"n1\",job=\"weir\"}}"
    );
    let test = json!({
        "rule_files": [components::repository().join("deploy/prometheus/weir-rules.yaml")],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [{
            "expr": format!("ALERTS{{alertname=\"{alert}\",alertstate=\"firing\"}}"),
            "eval_time": format!("{}m", scraped.len() - 1),
            "exp_samples": [{"labels": labels, "value": 1}],
        }]}],
    });
    let file = release.scratch.join(format!("{alert}.json"));
    fs::write(&file, test.to_string()).unwrap();
    let promtool = components::promtool(Progress::Shown).unwrap();
    let said = shown_of(&command::output(Command::new(promtool).arg(&file)).unwrap());
    assert!(said.0, "{alert} of {test}: {}", said.1);
}

fn shown_of(output: &std::process::Output) -> (bool, String) {
    let (code, out, error) = shown(output);
    (code == Some(0), out + &error)
}
