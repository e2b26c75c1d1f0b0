//! The ways of `escape`, tried without a pause while agents start: from what a killed one has left, and from the guard alone.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
};

use weir_tests::{
    AgentProcess, PodSpec,
    agent::{Guard, TrustSource},
};

use super::{
    Scene,
    escape::{Attack, Target},
    watch::PROGRAM,
};

/// Starts that are tried from each state of the node.
const STARTS: usize = 3;

/// Ways of an enrolled pod, one after the other, until it is told to stop; each with what came of it.
struct Trying {
    process: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Trying {
    fn begin(attack: &Attack<'_>, ways: &[&str]) -> Self {
        attack.pod.shell("rm -f /tmp/stop").unwrap();
        let targets =
            [Target::Service, Target::Endpoint, Target::Kubelet].map(|target| attack.address(target));
        let script = format!(
            "while [ ! -e /tmp/stop ]; do for to in {}; do for way in {}; do echo $way $({PROGRAM} $way $to); done; done; echo round; done",
            targets.join(" "),
            ways.join(" ")
        );
        let mut command = attack.pod.exec_command();
        let mut process = command.args(["sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    /// Waits until every way was tried once, from its beginning.
    fn round(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        for end in 0..2 {
            let round = self.lines.by_ref().map(Result::unwrap).take_while(|line| line != "round");
            said.extend(round);
            assert!(!said.is_empty(), "ended in round {end}");
        }
        said
    }

    fn end(mut self, attack: &Attack<'_>) -> Vec<String> {
        attack.pod.shell("touch /tmp/stop").unwrap();
        let said = self.lines.map(Result::unwrap).filter(|line| line != "round").collect();
        assert!(self.process.wait().unwrap().success());
        said
    }
}

#[test]
fn while_an_agent_starts_no_way_leads_around_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-starting", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-starting", "caller")).unwrap();
    let attack = Attack::new(&scene, &pod);
    let sockets = ["tcp", "mapped", "io-uring", "mptcp", "udp-sendto", "raw", "raw-fragment"];
    let check = |said: Vec<String>, frames: bool| {
        let expected = |line: &String| match line.split_once(' ') {
            Some(("tcp" | "mapped" | "io-uring", said)) => said == "connected" || said == "refused",
            // A pod that nobody knows may make such a socket; then it connects nowhere.
            Some(("mptcp", said)) => said == "failed EPROTONOSUPPORT" || said == "refused",
            Some(("udp-sendto", said)) => said == "refused",
            Some(("raw" | "raw-fragment", said)) => said == "failed EPERM",
            Some(("frame", said)) => frames && said == "sent",
            _ => false,
        };
        let others: Vec<_> = said.iter().filter(|line| !expected(line)).collect();
        assert!(others.is_empty(), "{others:?}");
        let direct = attack.direct();
        assert!(direct.is_empty(), "the far side saw {direct:?}");
        said.iter().filter(|line| line.ends_with("connected")).count()
    };
    let log = |name: &str, number| scene.scratch.path().join(format!("{name}-{number}.log"));

    // From what a former agent has left: it knows the pod and guards its interface.
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    attack.wait_until_known(&agent);
    let config = agent.config().to_owned();
    let with_frames = [&sockets[..], &["frame"]].concat();
    for number in 0..STARTS {
        agent.crash().unwrap();
        attack.direct();
        let mut trying = Trying::begin(&attack, &with_frames);
        let mut said = trying.round();
        assert!(said.iter().all(|line| !line.ends_with("connected")), "no agent runs: {said:?}");
        let mut next = AgentProcess::spawn(&config, &log("pinned", number)).unwrap();
        next.wait_until_ready().unwrap();
        said.extend(trying.round());
        said.extend(trying.end(&attack));
        assert!(check(said, true) > 0, "{}", next.last_lines());
        // Its pins are the next one's from here on.
        let mut former = std::mem::replace(&mut agent, next);
        former.wait_for_succession().unwrap();
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    drop(agent);

    // From the guard alone: the pod is unknown, and frames pass its interface until the agent guards it.
    for number in 0..STARTS {
        let guard = Guard::put_in_force(&config).unwrap();
        attack.direct();
        let mut trying = Trying::begin(&attack, &sockets);
        let mut said = trying.round();
        assert!(said.iter().all(|line| !line.ends_with("connected")), "no agent runs: {said:?}");
        let mut agent = guard.succeed(&config, &log("guarded", number)).unwrap();
        agent.wait_until_ready().unwrap();
        said.extend(trying.round());
        said.extend(trying.end(&attack));
        assert!(check(said, false) > 0, "{}", agent.last_lines());
        assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    }
}
