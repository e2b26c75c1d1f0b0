//! The ways of `escape`, tried without a pause while agents start (from what a killed one has left, and from the guard alone),
//! are upgraded, stand still, and are dead.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
};

use nix::sys::signal::Signal;
use weir_tests::{
    AgentProcess, PodSpec,
    agent::{Guard, TrustSource},
};

use super::{
    Scene,
    escape::{
        Attack, BRIDGE_ADDRESS,
        Expected::{self, Dropped, Proxied, Says},
        Target, WAYS,
    },
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
    fn begin(attack: &Attack<'_>, ways: &[(&str, Target)]) -> Self {
        attack.pod.shell("rm -f /tmp/stop").unwrap();
        let tries: Vec<String> = ways
            .iter()
            .map(|(way, target)| {
                let to = attack.address(*target);
                format!("echo {way} {target:?} $({PROGRAM} --via {BRIDGE_ADDRESS} {way} {to})")
            })
            .collect();
        let script = format!("while [ ! -e /tmp/stop ]; do {}; echo round; done", tries.join("; "));
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

/// Checks that every way came to what may come of it, and that the far side saw none.
#[track_caller]
fn check(attack: &Attack<'_>, said: &[String], may_say: impl Fn(&Expected, &str) -> bool) {
    let mut wrong = Vec::new();
    for line in said {
        let mut words = line.splitn(3, ' ');
        let (way, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let tried = WAYS.iter().find(|(name, to, _)| *name == way && format!("{to:?}") == target);
        if !tried.is_some_and(|(.., expected)| may_say(expected, words.next().unwrap_or_default())) {
            wrong.push(line);
        }
    }
    let direct = attack.direct();
    assert!(wrong.is_empty() && direct.is_empty(), "{wrong:#?}; the far side saw {direct:?}");
}

#[test]
fn while_an_agent_is_upgraded_or_stands_still_or_is_dead_no_way_leads_around_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-interrupted", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-interrupted", "caller")).unwrap();
    let attack = Attack::new(&scene, &pod);
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    attack.wait_until_known(&agent);
    let config = agent.config().to_owned();
    attack.direct();
    let all: Vec<_> = WAYS.iter().map(|(way, target, _)| (*way, *target)).collect();
    // More than a listener has room for would wait for one that stands still.
    let few: Vec<_> = all.iter().copied().filter(|(way, _)| *way != "concurrent").collect();

    // Upgraded, nothing changes at all: what is proxied is never refused.
    let mut trying = Trying::begin(&attack, &all);
    let mut said = trying.round();
    for number in 0..STARTS {
        let log = scene.scratch.path().join(format!("next-{number}.log"));
        let mut next = AgentProcess::spawn(&config, &log).unwrap();
        next.wait_until_ready().unwrap();
        std::mem::replace(&mut agent, next).wait_for_succession().unwrap();
        said.extend(trying.round());
    }
    said.extend(trying.end(&attack));
    println!("{} tries while {STARTS} agents followed each other", said.len());
    check(&attack, &said, Expected::is);

    agent.signal(Signal::SIGSTOP).unwrap();
    let mut trying = Trying::begin(&attack, &few);
    let mut said = trying.round();
    said.extend(trying.end(&attack));
    check(&attack, &said, |expected, said| match expected {
        // The kernel accepts for it.
        Proxied => said == "connected" || said == "timedOut",
        expected => expected.is(said),
    });

    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait_for_end().unwrap();
    let mut trying = Trying::begin(&attack, &all);
    let mut said = trying.round();
    said.extend(trying.end(&attack));
    check(&attack, &said, |expected, said| match expected {
        Proxied => said == "refused",
        expected => expected.is(said),
    });
    assert_eq!(attack.witness.direct(), 0, "requests that the API server had from the pod itself");
}

#[test]
fn while_an_agent_starts_no_way_leads_around_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-starting", true);
    let pod = scene.testbed.run_pod(&PodSpec::idle("it-starting", "caller")).unwrap();
    let attack = Attack::new(&scene, &pod);
    let ways = |is_one: &dyn Fn(&str) -> bool| {
        let all = WAYS.iter().map(|(way, target, _)| (*way, *target));
        all.filter(|(way, _)| is_one(way)).collect::<Vec<_>>()
    };
    let check = |said: Vec<String>| {
        check(&attack, &said, |expected, said| match expected {
            Proxied => said == "connected" || said == "refused",
            // A pod that nobody knows may make such a socket; then it connects nowhere.
            Says(word) => said == *word || said == "refused",
            Dropped => said == "sent",
        });
        said.iter().filter(|line| line.ends_with("connected")).count()
    };
    let log = |name: &str, number| scene.scratch.path().join(format!("{name}-{number}.log"));

    // From what a former agent has left: it knows the pod and guards its interface.
    let mut agent = scene.agent(TrustSource::ClusterSigner);
    attack.wait_until_known(&agent);
    let config = agent.config().to_owned();
    let all = ways(&|_| true);
    for number in 0..STARTS {
        agent.crash().unwrap();
        attack.direct();
        let mut trying = Trying::begin(&attack, &all);
        let mut said = trying.round();
        assert!(said.iter().all(|line| !line.ends_with("connected")), "no agent runs: {said:?}");
        let mut next = AgentProcess::spawn(&config, &log("pinned", number)).unwrap();
        next.wait_until_ready().unwrap();
        said.extend(trying.round());
        said.extend(trying.end(&attack));
        assert!(check(said) > 0, "{}", next.last_lines());
        // Its pins are the next one's from here on.
        let mut former = std::mem::replace(&mut agent, next);
        former.wait_for_succession().unwrap();
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    drop(agent);

    // From the guard alone: the pod is unknown, and frames pass its interface until the agent guards it.
    let sockets = ways(&|way| !way.starts_with("frame"));
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
        assert!(check(said) > 0, "{}", agent.last_lines());
        assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    }
}
