//! The capabilities that the chart gives the agent: all of them are enough, and without any one of them something is missing, which
//! both the agent and `doctor` say.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::json;
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{TrustSource, built_binary, configuration, write_configuration},
    command, wait_until,
};

use super::{
    DEADLINE, Scene,
    guard::{asks, is_refused},
};

/// What the agent says without each.
const LACKING: [(&str, &str); 6] = [
    ("NET_ADMIN", "direct-connections-stalled"),
    ("SYS_ADMIN", "cannot load the kernel programs; is this root"),
    ("SYS_PTRACE", "does this container have CAP_SYS_ADMIN and CAP_SYS_PTRACE?"),
    ("NET_RAW", "answers-not-seen"),
    ("SYS_NICE", "answers-read-late"),
    ("DAC_OVERRIDE", "canary-failed"),
];

/// Those of the chart, in its order.
fn of_the_chart() -> Vec<String> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/weir/templates/daemonset.yaml");
    let text = fs::read_to_string(chart).unwrap();
    let (_, added) = text.split_once("drop: [ALL]\n    add:\n").unwrap();
    let names = added.lines().map_while(|line| line.trim_start().strip_prefix("- "));
    names.map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
}

/// The agent's program with these capabilities and no others.
fn with(capabilities: &[&str]) -> Command {
    let list: String = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", &format!("-all{list}"), "--inh-caps", "-all"]);
    command.arg(built_binary("weir-agent").unwrap());
    command
}

#[test]
fn all_capabilities_that_the_chart_gives_are_enough_and_each_is_missed() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-capabilities", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-capabilities", "caller")).unwrap();
    let config = scene.scratch.path().join("agent.yaml");
    let mut written = configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    // A name that pods may ask for, so that answers are looked at.
    written["clusters"][0]["addresses"] = json!(["api.weir.invalid:443"]);
    write_configuration(&written, &config).unwrap();
    let chart = of_the_chart();
    let names: Vec<_> = LACKING.iter().map(|(name, _)| *name).collect();
    assert_eq!(chart, names, "the chart's, and what is said of each");
    let begin = |lacking: &str| {
        let held: Vec<_> = names.iter().copied().filter(|name| *name != lacking).collect();
        let mut doctor = with(&held);
        let said = command::output(doctor.args(["doctor", "--json", "--config"]).arg(&config)).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == "capabilities").unwrap().clone();
        let log = scene.scratch.path().join(format!("without-{lacking}.log"));
        (check, AgentProcess::spawn_by(with(&held), &config, &log).unwrap())
    };

    let (check, mut agent) = begin("none");
    assert_eq!(check["ok"], true, "{check}");
    agent.wait_until_ready().unwrap();
    assert_eq!(asks(&pod).0, Some(0), "{}", agent.last_lines());
    let log = agent.log().unwrap();
    assert!(!LACKING.iter().any(|(_, said)| log.contains(said)), "{log}");
    drop(agent);

    for (name, said) in LACKING {
        // A connection from before.
        let mut watch = pod.runtime_command(&format!("watch-{name}"));
        let mut watch =
            watch.args(["kubectl", "get", "namespaces", "--watch"]).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Read::read_exact(watch.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let (check, mut agent) = begin(name);
        let found = check["found"].as_str().unwrap();
        assert!(
            check["ok"] == false && found.starts_with("lacks") && found.contains(name),
            "{name}: {found}"
        );
        wait_until(&format!("the agent to miss {name}"), DEADLINE, || {
            Ok(agent.log()?.contains(said).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error}; {}", agent.last_lines()));
        if name == "SYS_PTRACE" {
            agent.wait_until_ready().unwrap();
            is_refused(&pod, "its network namespace cannot be found");
        }
        drop(agent);
        watch.kill().unwrap();
        watch.wait().unwrap();
    }
}
