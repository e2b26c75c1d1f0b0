//! An agent that hangs, and one that ends again and again, both under the kubelet: what pods have of it, and whoever is on call.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
};

use anyhow::ensure;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use weir_tests::{Pod, command, components, progress::Progress, wait_until};

use super::{
    super::{DEADLINE, guard::asks, monitoring::Monitored, shown},
    release::{Release, on_node},
};

/// Where the chart's agent tells its metrics by default.
const METRICS: &str = "127.0.0.1:9155";
/// Ends that the kubelet begins to wait after, and those that the alert needs, with `WEIR_TEST_LONG`.
const ENDS: usize = 2;
const ENDS_LONG: usize = 3;
/// How often it is killed for one of them at most: the kubelet may have started it again before all was looked at.
const KILLS: usize = 5;

/// What Prometheus keeps of one question: nothing but `up` where nobody answers.
type Scraped = Option<BTreeMap<String, f64>>;

/// The agent, as the node's own status has it.
fn on_the_node() -> Value {
    let status = command::run(&mut on_node(&["status", "--json"])).unwrap();
    serde_json::from_str::<Value>(&status).unwrap()["agent"].take()
}

pub(super) fn agents_process() -> Pid {
    Pid::from_raw(i32::try_from(on_the_node()["pid"].as_i64().unwrap()).unwrap())
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
    let noticed = wait_until("the pod not to be ready", DEADLINE, || Ok((!is_ready(release)).then_some(())));
    kill(agent, Signal::SIGCONT).unwrap();
    noticed.unwrap();
    wait_until("the pod to be ready", DEADLINE, || Ok(is_ready(release).then_some(()))).unwrap();
}

/// What is seen of an agent that has ended, from before somebody looks until after.
struct Away<'a> {
    release: &'a Release<'a>,
    enrolled: &'a Pod<'a>,
    free: &'a Pod<'a>,
    monitored: Monitored,
    /// Starts so far, as the kubelet counts them: one for each kill.
    starts: u64,
}

impl Away<'_> {
    fn container(&self) -> Value {
        self.release.pods()[0]["status"]["containerStatuses"][0].clone()
    }

    /// Waits until the kubelet has told of as many starts as there were kills, which it does a little late.
    fn is_counted(&self) {
        let counted = wait_until("the last start to be counted", DEADLINE, || {
            let container = self.container();
            let starts = container["restartCount"].as_u64().unwrap();
            ensure!(starts <= self.starts, "{starts} starts, and {} ends", self.starts);
            Ok((starts == self.starts && container["state"]["running"].is_object()).then_some(()))
        });
        counted.unwrap_or_else(|error| panic!("{error:#}\n{}", self.release.told()));
    }

    /// Kills the agent and looks, each time anew, until all was looked at while none was there.
    fn is_killed(&mut self, is_to_wait: bool, when: &str) {
        for _ in 0..KILLS {
            if self.is_killed_and_seen(is_to_wait, when) {
                return;
            }
            eprintln!("{when}: it was there again before all was looked at");
            self.is_served_again();
        }
        panic!("{when}: it was there again each time before all was looked at\n{}", self.release.told());
    }

    /// Whether all was looked at while no agent was there, which is known only afterwards, when none is there yet and the enrolled pod is
    /// still refused: else nothing that was seen counts.
    fn is_killed_and_seen(&mut self, is_to_wait: bool, when: &str) -> bool {
        self.is_counted();
        let before = self.starts;
        kill(agents_process(), Signal::SIGKILL).unwrap();
        self.starts += 1;
        let (of_enrolled, of_free) = (asks(self.enrolled), asks(self.free));
        let mut waits = None;
        if is_to_wait {
            let waiting = wait_until("the kubelet to wait before it starts it again", DEADLINE, || {
                let container = self.container();
                if container["restartCount"] != before {
                    return Ok(Some(false));
                }
                Ok((container["state"]["waiting"]["reason"] == "CrashLoopBackOff").then_some(true))
            });
            if !waiting.unwrap() {
                return false;
            }
            let is_nobody_there = self.monitored.get("/metrics").is_err();
            waits = Some((is_ready(self.release), asks(self.enrolled), asks(self.free)));
            // One that starts tells its metrics before it serves pods.
            if !is_nobody_there {
                return false;
            }
        }
        if on_the_node()["state"] != "absent" || asks(self.enrolled).0 == Some(0) {
            return false;
        }
        is_refused(&of_enrolled, when);
        assert_eq!(of_free.0, Some(0), "a pod that is not enrolled, {when}: {}", of_free.1);
        if let Some((is_ready, of_enrolled, of_free)) = waits {
            assert!(!is_ready);
            is_refused(&of_enrolled, "while the kubelet waits");
            assert_eq!(
                of_free.0,
                Some(0),
                "a pod that is not enrolled, while the kubelet waits: {}",
                of_free.1
            );
        }
        true
    }

    fn is_served_again(&self) {
        wait_until("the pod to be served again", DEADLINE, || {
            Ok((asks(self.enrolled).0 == Some(0)).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", self.release.told()));
    }
}

#[track_caller]
fn is_refused((code, said): &(Option<i32>, String), when: &str) {
    assert_eq!(*code, Some(1), "{when}: {said}");
    assert!(said.contains("refused"), "{when}: {said}");
}

/// Enrolled pods are refused each time, others see no change, and what monitoring is told makes the alerts fire.
pub(super) fn an_agent_that_ends_again_and_again_is_told_of(
    release: &Release<'_>,
    enrolled: &Pod<'_>,
    free: &Pod<'_>,
) {
    let long = std::env::var_os("WEIR_TEST_LONG").is_some();
    let monitored = Monitored::at(METRICS.parse().unwrap());
    let mut away = Away { release, enrolled, free, monitored, starts: 0 };
    away.starts = away.container()["restartCount"].as_u64().unwrap();
    let mut scraped: Vec<Scraped> = vec![Some(away.monitored.metrics())];
    for end in 1..=if long { ENDS_LONG } else { ENDS } {
        // After the first, the kubelet starts it at once.
        let is_to_wait = end > 1;
        away.is_killed(is_to_wait, &format!("after end {end}"));
        if is_to_wait {
            scraped.push(None);
        }
        away.is_served_again();
        scraped.push(Some(away.monitored.metrics()));
    }
    away.is_counted();
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
