//! The ways of `escape`, `escape6`, `places` and `nested`, tried without a pause while agents start (from what a killed one has left,
//! and from the guard alone), are upgraded, stand still, and are dead.

use std::{
    io::{BufRead as _, BufReader},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::json;
use weir_tests::{
    AgentProcess, Pod, PodSpec,
    agent::{self, Guard, TrustSource},
    wait_until,
};

use super::{
    DEADLINE, Scene,
    before::{Before, ENDED_WORD},
    escape::{
        Attack, BRIDGE_ADDRESS,
        Expected::{self, Dropped, Proxied, Says},
        Folder, Target, WAYS, endpoint, place,
    },
    escape6::{POD6, Scene6, WAYS6},
    far_side::FarSide,
    nested::{INSIDE_WAYS, Nested},
    places::{PLACES, Places, Put},
    upgrade::with_older_layout,
    watch::PROGRAM,
};

/// Starts that are tried from each state of the node.
const STARTS: usize = 3;
/// Agents that are killed while they start.
const KILLED: usize = 4;
/// How long whoever asks an agent waits for it, which may be slow on a busy machine, and for one that stands still.
const RUNNING_SECONDS: &str = "30";
const STOPPED_SECONDS: &str = "2";
/// Who asks the listener itself is told nothing.
const CLOSED: Expected = Says("closed");
/// The port is the listener's.
const TAKEN_WORD: &str = "failed EADDRINUSE";
const TAKEN: Expected = Says(TAKEN_WORD);

/// A way that is tried again and again.
#[derive(Clone)]
struct Way {
    /// Without a space.
    name: String,
    /// For a shell.
    command: String,
    expected: Expected,
}

/// Everything that can be tried with a pod.
struct Attacks<'a> {
    on_four: &'a Attack<'a>,
    on_six: &'a Scene6<'a>,
    far_side: &'a FarSide,
    places: Places,
    nested: Nested,
    /// The pod's own cgroup, one below it, and one beside the root of pods.
    inside: [String; 3],
    _folders: [Folder; 2],
}

impl<'a> Attacks<'a> {
    fn new(on_four: &'a Attack<'a>, on_six: &'a Scene6<'a>, far_side: &'a FarSide, other: &Pod<'_>) -> Self {
        let (own, pid) = place(on_four.pod);
        let root = own.ancestors().find(|folder| !folder.join("cgroup.events").exists()).unwrap();
        let beside = format!("docker-weir-inside-{}.scope", on_four.pod.namespace);
        let folders = [Folder::new(own.join("docker")), Folder::new(root.join(beside))];
        Self {
            on_four,
            on_six,
            far_side,
            places: Places::new(on_four.pod, other),
            nested: Nested::new(&pid),
            inside: [own.to_str().unwrap(), folders[0].path(), folders[1].path()].map(str::to_owned),
            _folders: folders,
        }
    }

    /// From a container of the pod.
    fn of_pod(&self) -> Vec<Way> {
        let four = WAYS.iter().map(|(way, target, expected)| Way {
            name: format!("{way}/{target:?}"),
            command: format!("{PROGRAM} --via {BRIDGE_ADDRESS} {way} {}", self.on_four.address(*target)),
            // The NAT of the network inside the pod tracks connections: it waits for the rest of a packet before anybody sees it.
            expected: if *way == "raw-fragment" { Dropped } else { *expected },
        });
        let six = WAYS6.iter().map(|(way, expected)| Way {
            name: format!("{way}/IPv6"),
            command: self.on_six.command(way),
            expected: *expected,
        });
        four.chain(six).collect()
    }

    /// From processes that put themselves somewhere.
    fn of_host(&self) -> Vec<Way> {
        let program = &self.on_four.program.display().to_string();
        let service = self.on_four.address(Target::Service);
        let places = PLACES.iter().map(|(name, puts, way, expected)| Way {
            name: (*name).to_owned(),
            command: format!("{program} {} {way} {service}", self.places.words(puts).join(" ")),
            expected: *expected,
        });
        let netns = &self.nested.pid();
        let inside = INSIDE_WAYS.iter().flat_map(|(way, expected)| {
            self.inside.iter().zip(expected).enumerate().map(move |(number, (cgroup, expected))| Way {
                name: format!("inside/{way}/{number}"),
                command: format!("{program} --netns {netns} --cgroup {cgroup} {way} {service}"),
                expected: *expected,
            })
        });
        places.chain(inside).collect()
    }

    /// At which port of the pod an agent listens.
    fn listener(&self, agent: &AgentProcess) -> String {
        let status = agent.status().unwrap();
        let uid = self.on_four.pod.uid.as_str();
        let pod = status["pods"].as_array().unwrap().iter().find(|pod| pod["uid"] == uid).unwrap();
        pod["listenerPort"].to_string()
    }

    /// The listener's port, taken while nobody may listen there, in all forms that its address has.
    fn thefts(&self, port: &str) -> Vec<Way> {
        let way = |address: &str| Way {
            name: format!("steal/{address}"),
            command: format!("{PROGRAM} steal {address}:{port}"),
            expected: TAKEN,
        };
        ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"].map(way).into()
    }

    /// The same by who is in the pod's network and in no cgroup of it.
    fn theft_from_beside(&self, port: &str) -> Way {
        let program = self.on_four.program.display();
        let place = self.places.words(&[Put::Network, Put::Sibling]).join(" ");
        Way {
            name: "steal/beside".to_owned(),
            command: format!("{program} {place} steal 127.0.0.1:{port}"),
            expected: TAKEN,
        }
    }

    /// The listener, dialled past the kernel's redirect, by whoever waits so long.
    fn dials(&self, port: &str, patience: &str) -> Vec<Way> {
        let way = |address: &str| Way {
            name: format!("ask/{address}"),
            command: format!("{PROGRAM} --patience {patience} ask {address}:{port}"),
            expected: CLOSED,
        };
        ["127.0.0.1", "[::1]"].map(way).into()
    }

    /// Until there is a listener in the network inside the pod: it is made once a connection was denied there.
    fn wait_until_served_inside(&self, agent: &AgentProcess) {
        let (netns, cgroup) = (self.nested.pid(), &self.inside[1]);
        wait_until("the network inside the pod to be served", DEADLINE, || {
            let (said, direct) =
                self.on_four.try_from(&["--netns", &netns, "--cgroup", cgroup], "nonblocking");
            assert!(direct.is_empty(), "the far side saw {direct:?}: {}", agent.last_lines());
            Ok((said == "connected").then_some(()))
        })
        .unwrap();
    }

    /// What the far sides saw since the last time.
    fn direct(&self) -> Vec<String> {
        let mut direct = self.on_four.direct();
        direct.extend(self.on_six.direct());
        let came = self.far_side.came_from(POD6.parse::<IpAddr>().unwrap());
        direct.extend(came.iter().map(|to| format!("a connection to {to}")));
        direct
    }
}

/// An agent's configuration that knows the API server's IPv6 address as well.
fn configuration(scene: &Scene, on_six: &Scene6<'_>) -> PathBuf {
    let mut configuration =
        agent::configuration(&scene.testbed, &scene.journal(), TrustSource::ClusterSigner);
    configuration["clusters"][0]["addresses"] = json!([on_six.target]);
    let path = scene.scratch.path().join("agent.yaml");
    agent::write_configuration(&configuration, &path).unwrap();
    path
}

/// A shell that tries ways one after the other, until it is told to stop; it says of each what came of it.
struct Loop {
    process: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Loop {
    fn begin(mut command: Command, ways: &[Way], stop: &Path) -> Self {
        let tries: Vec<String> =
            ways.iter().map(|way| format!("echo {} $({})", way.name, way.command)).collect();
        let script = format!("while [ ! -e {} ]; do {}; echo round; done", stop.display(), tries.join("; "));
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

    fn end(mut self) -> Vec<String> {
        let said = self.lines.map(Result::unwrap).filter(|line| line != "round").collect();
        assert!(self.process.wait().unwrap().success());
        said
    }
}

/// The ways of the pod and those of the host, at the same time.
struct Trying<'a> {
    attacks: &'a Attacks<'a>,
    ways: Vec<Way>,
    loops: [Loop; 2],
    said: Vec<String>,
    stop: tempfile::TempDir,
}

impl<'a> Trying<'a> {
    const STOP: &'static str = "/tmp/stop";

    fn begin(attacks: &'a Attacks<'a>, of_pod: &[Way], of_host: &[Way]) -> Self {
        let pod = attacks.on_four.pod;
        pod.shell(&format!("rm -f {}", Self::STOP)).unwrap();
        let stop = tempfile::tempdir().unwrap();
        let (in_pod, on_host) = (Path::new(Self::STOP), stop.path().join("stop"));
        // `env` runs what it is given.
        let host = Loop::begin(Command::new("env"), of_host, &on_host);
        let loops = [Loop::begin(pod.exec_command(), of_pod, in_pod), host];
        Self { attacks, ways: [of_pod, of_host].concat(), loops, said: Vec::new(), stop }
    }

    /// Waits until every way was tried once, from its beginning.
    fn round(&mut self) -> &[String] {
        let before = self.said.len();
        for attempts in &mut self.loops {
            self.said.extend(attempts.round());
        }
        &self.said[before..]
    }

    /// Checks that every way came to what may come of it, and that the far side saw none; gives what was said.
    #[track_caller]
    fn end(mut self, may_say: impl Fn(&Expected, &str) -> bool) -> Vec<String> {
        self.attacks.on_four.pod.shell(&format!("touch {}", Self::STOP)).unwrap();
        std::fs::write(self.stop.path().join("stop"), "").unwrap();
        for attempts in self.loops {
            self.said.extend(attempts.end());
        }
        let mut wrong = Vec::new();
        for line in &self.said {
            let (name, said) = line.split_once(' ').unwrap_or((line, ""));
            let way = self.ways.iter().find(|way| way.name == name);
            if !way.is_some_and(|way| may_say(&way.expected, said)) {
                wrong.push(line);
            }
        }
        let direct = self.attacks.direct();
        assert!(wrong.is_empty() && direct.is_empty(), "{wrong:#?}; the far side saw {direct:?}");
        self.said
    }
}

fn has_older_layout() -> bool {
    Path::new("/sys/fs/bpf/weir/v2").exists()
}

/// Chance, with a seed that is printed.
struct Chance(u64);

impl Chance {
    fn new() -> Self {
        let fresh = || u64::from(std::process::id());
        let seed = std::env::var("WEIR_FUZZ_SEED").map_or_else(|_| fresh(), |seed| seed.parse().unwrap());
        eprintln!("seed: WEIR_FUZZ_SEED={seed}");
        Self(seed)
    }

    /// Lets some of the time go by that an agent takes to start.
    #[expect(
        clippy::disallowed_methods,
        reason = "the time is what is tested: there is no event to wait for"
    )]
    fn wait(&mut self) {
        // SplitMix64, cut down to what serves here.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let milliseconds = 20 + (mixed >> 32) % 780;
        eprintln!("killed after {milliseconds} ms");
        std::thread::sleep(Duration::from_millis(milliseconds));
    }
}

/// Starts agents, and kills each before it is ready.
fn kill_early(config: &Path, log: &Path, chance: &mut Chance) {
    for _ in 0..KILLED {
        let agent = AgentProcess::spawn(config, log).unwrap();
        chance.wait();
        abandon(agent);
    }
}

/// Kills an agent whose pins are the next one's.
fn abandon(mut agent: AgentProcess) {
    agent.crash().unwrap();
    agent.wait_for_succession().unwrap();
}

#[test]
fn while_an_agent_is_upgraded_or_stands_still_or_is_dead_no_way_leads_around_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-interrupted", true);
    let run = |name| scene.testbed.run_pod(&PodSpec::idle("it-interrupted", name)).unwrap();
    let (pod, other) = (run("caller"), run("other"));
    let far_side = FarSide::new(endpoint(&scene), scene.scratch.path());
    let (on_four, on_six) = (Attack::new(&scene, &pod), Scene6::new(&scene, &pod));
    let attacks = Attacks::new(&on_four, &on_six, &far_side, &other);
    let config = configuration(&scene, &on_six);
    // Sockets from before all agents.
    let [before_stop, before_death] = [(); 2].map(|()| Before::make(&on_four, |_| true));
    let mut agent = with_older_layout(&config, &scene.scratch.path().join("agent.log"));
    on_four.wait_until_known(&agent);
    // What was connected before, and what became of it.
    attacks.direct();
    attacks.wait_until_served_inside(&agent);
    attacks.direct();
    let (mut all, mut of_host) = (attacks.of_pod(), attacks.of_host());
    let port = attacks.listener(&agent);
    all.extend(attacks.thefts(&port));
    of_host.push(attacks.theft_from_beside(&port));
    // More than a listener has room for keep the others from one that stands still.
    let mut few: Vec<_> = all.iter().filter(|way| !way.name.starts_with("concurrent")).cloned().collect();
    few.extend(attacks.dials(&port, STOPPED_SECONDS));
    all.extend(attacks.dials(&port, RUNNING_SECONDS));

    // Upgraded, from another layout of the maps first, nothing changes at all: what is proxied is never refused.
    let mut trying = Trying::begin(&attacks, &all, &of_host);
    trying.round();
    for number in 0..STARTS {
        let log = scene.scratch.path().join(format!("next-{number}.log"));
        let mut next = AgentProcess::spawn(&config, &log).unwrap();
        next.wait_until_ready().unwrap();
        std::mem::replace(&mut agent, next).wait_for_succession().unwrap();
        wait_until("the older layout to be gone", DEADLINE, || Ok((!has_older_layout()).then_some(())))
            .unwrap();
        trying.round();
    }
    let said = trying.end(Expected::is);
    println!("{} tries while {STARTS} agents followed each other", said.len());

    agent.signal(Signal::SIGSTOP).unwrap();
    // The kernel accepts for it.
    let stopped = |expected: &Expected, said: &str| match expected {
        Proxied => said == "connected" || said == "timedOut",
        expected if *expected == CLOSED => said == "timedOut",
        expected => expected.is(said),
    };
    before_stop.check(|| on_four.direct(), stopped);
    let mut trying = Trying::begin(&attacks, &few, &of_host);
    trying.round();
    let said = trying.end(stopped);
    let service = on_four.address(Target::Service);
    let many = pod.exec(&[PROGRAM, "--patience", STOPPED_SECONDS, "concurrent", service]).unwrap();
    let (many, direct) = (String::from_utf8(many.stdout).unwrap(), on_four.direct());
    assert_eq!((many.trim(), direct.len()), ("timedOut", 0), "{direct:?}");
    println!("{} tries while it stood still", said.len());

    agent.signal(Signal::SIGKILL).unwrap();
    agent.wait_for_end().unwrap();
    let dead = |expected: &Expected, said: &str| match expected {
        Proxied => said == "refused",
        expected if *expected == CLOSED => said == "refused",
        expected => expected.is(said),
    };
    before_death.check(|| on_four.direct(), dead);
    let mut trying = Trying::begin(&attacks, &all, &of_host);
    trying.round();
    let said = trying.end(dead);
    println!("{} tries while none ran", said.len());
    assert_eq!(on_four.witness.direct(), 0, "requests that the API server had from the pod itself");
}

/// Whether it may be said while an agent starts.
fn comes_of_it_in_a_start(expected: &Expected, said: &str) -> bool {
    match expected {
        Proxied => said == "connected" || said == "refused",
        // A pod that nobody knows may make such a socket; then it connects nowhere. The port of a dead agent's listener is anybody's
        // once the next one's is known: nobody comes there.
        Says(word) => said == *word || said == "refused" || *word == TAKEN_WORD && said == "stolen",
        Dropped => said == "sent",
    }
}

#[test]
fn while_an_agent_starts_no_way_leads_around_it() {
    let Some(mut scene) = Scene::new() else { return };
    scene.namespace("it-starting", true);
    let run = |name| scene.testbed.run_pod(&PodSpec::idle("it-starting", name)).unwrap();
    let (pod, other) = (run("caller"), run("other"));
    let far_side = FarSide::new(endpoint(&scene), scene.scratch.path());
    let (on_four, on_six) = (Attack::new(&scene, &pod), Scene6::new(&scene, &pod));
    let attacks = Attacks::new(&on_four, &on_six, &far_side, &other);
    let connects = |line: &String| line.ends_with("connected");
    let gains = |line: &String| connects(line) || line.ends_with("stolen");
    let log = |name: &str, number| scene.scratch.path().join(format!("{name}-{number}.log"));

    // From what a former agent has left: it knows the pod and guards its interface.
    let config = configuration(&scene, &on_six);
    let mut agent = AgentProcess::start(&config, &log("first", 0)).unwrap();
    on_four.wait_until_known(&agent);
    attacks.wait_until_served_inside(&agent);
    let (all, of_host, mut chance) = (attacks.of_pod(), attacks.of_host(), Chance::new());
    for number in 0..STARTS {
        let port = attacks.listener(&agent);
        // Who dials would be heard by a thief.
        let [on_listener, beside] = match number {
            0 => [attacks.thefts(&port), vec![attacks.theft_from_beside(&port)]],
            _ => [attacks.dials(&port, RUNNING_SECONDS), Vec::new()],
        };
        agent.crash().unwrap();
        attacks.direct();
        let (of_pod, beside) = ([&all[..], &on_listener].concat(), [&of_host[..], &beside].concat());
        let mut trying = Trying::begin(&attacks, &of_pod, &beside);
        let said = trying.round();
        assert!(!said.iter().any(gains), "no agent runs: {said:?}");
        if number == 0 {
            kill_early(&config, &log("killed", number), &mut chance);
        }
        let mut next = AgentProcess::spawn(&config, &log("pinned", number)).unwrap();
        next.wait_until_ready().unwrap();
        trying.round();
        let said = trying.end(comes_of_it_in_a_start);
        assert!(said.iter().any(connects), "{}", next.last_lines());
        // Its pins are the next one's from here on.
        let mut former = std::mem::replace(&mut agent, next);
        former.wait_for_succession().unwrap();
    }
    assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    drop(agent);

    // From the guard alone, which has found the pod there: nobody has said anything of it.
    for number in 0..STARTS {
        let before = Before::make(&on_four, |_| true);
        let guard = Guard::put_in_force(&config).unwrap();
        attacks.direct();
        // Nobody ends what is connected; the guards drop what it sends.
        before.check(
            || on_four.direct(),
            |expected, said| match expected {
                Dropped => said == "sent",
                Says(word) if *word == ENDED_WORD => said == "sent",
                _ => said == "refused" || said == "failed EPERM",
            },
        );
        let mut trying = Trying::begin(&attacks, &all, &of_host);
        let said = trying.round();
        assert!(!said.iter().any(connects), "no agent runs: {said:?}");
        let mut agent = guard.succeed(&config, &log("guarded", number)).unwrap();
        if number == 0 {
            chance.wait();
            abandon(agent);
            kill_early(&config, &log("killed-guarded", number), &mut chance);
            agent = AgentProcess::spawn(&config, &log("guarded-again", number)).unwrap();
        }
        agent.wait_until_ready().unwrap();
        trying.round();
        let said = trying.end(comes_of_it_in_a_start);
        assert!(said.iter().any(connects), "{}", agent.last_lines());
        assert!(agent.terminate().unwrap().success(), "{}", agent.last_lines());
    }
}
