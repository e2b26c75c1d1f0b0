//! Agents that are killed (SIGKILL) at random: the real recorder and publisher in a process of their own, real files, small
//! segments. Who kills keeps account of what the agent said is durable, and is the Kafka that it publishes to.
//!
//! What an agent is at takes it a thousandth of its time, or most: a third of the kills wait for one of [`Stage::ALL`], the others for
//! nothing. Which stages were under way when a kill came is counted, whatever it waited for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tempfile::TempDir;
use uuid::Uuid;
use weir_common::{
    encryption::wrapped_key_file,
    event::{Event, Kind},
};

use super::{
    FileSystem, Storage,
    contents::{self, Reader},
    stages::{self, Stage, Staged},
    world::Log,
};
use crate::{
    publishing::{
        clock,
        pipe::{publish, say},
    },
    recording::{
        Recorder,
        fixture::{create, of_pod, start_small},
    },
};

/// Kills of one journal, and journals with `WEIR_TEST_LONG`.
const KILLS: u32 = 30;
const JOURNALS_LONG: u64 = 34;

/// The journal's folder, for the process that is killed; without it this test is the one that kills.
const VICTIM: &str = "WEIR_KILL_TEST_JOURNAL";
/// And the first number that it writes.
const FIRST: &str = "WEIR_KILL_TEST_FIRST";

/// And the file that says at which stages it is.
const STAGES: &str = "WEIR_KILL_TEST_STAGES";

/// How often it is looked whether the stage has come that a kill waits for, and how long it is waited for.
const LOOK: Duration = Duration::from_micros(100);
const STAGE_WAIT_MAX: Duration = Duration::from_millis(300);

/// Requests of a user, whose session has a key: then another one comes.
const REQUESTS_OF_USER: u64 = 40;

/// The longest that anything may take.
const DEADLINE: Duration = Duration::from_secs(120);

/// What is written as event `number`: nobody else would write that.
fn text(number: u64) -> String {
    format!("{number} {}", "y".repeat((number * 7919 % 9000) as usize))
}

/// The number in such a text.
fn number(text: &str) -> Option<u64> {
    let number = text.split([' ', '_']).next()?.parse().ok()?;
    assert_eq!(text.replace('_', " "), self::text(number), "that was never written");
    Some(number)
}

/// A request whose body says it. Whether it is durable.
fn request(recorder: &Recorder, number: u64) -> bool {
    let pod = of_pod(&format!("pod-{}", number % 3), Some(format!("user-{}", number / REQUESTS_OF_USER)));
    let body = format!("{{\"data\":\"{}\"}}", text(number));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(create(recorder, &pod, &body)).is_ok()
}

/// The number in such a request's content.
fn number_of_content(said: &str) -> Option<u64> {
    number(said.strip_prefix("{\"data\":\"")?.strip_suffix("\"}")?)
}

/// The process that is killed: three threads write, every other time a request with content that is encrypted; a fourth publishes.
fn victim(journal: &Path) {
    let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
    let notes = stages::notes(Path::new(&std::env::var_os(STAGES).unwrap()));
    let storage: Arc<dyn Storage> = Arc::new(Staged::new(notes));
    say("begins");
    let recorder = start_small(Arc::clone(&storage), journal);
    say("ready");
    for thread in 0..3 {
        let recorder = recorder.clone();
        std::thread::spawn(move || {
            for number in (first + thread..).step_by(3) {
                let is_held = match number % 2 {
                    0 => recorder.gap(text(number), None).is_ok(),
                    _ => request(&recorder, number),
                };
                if is_held {
                    say(&format!("held {number}"));
                }
            }
        });
    }
    let own = recorder.folder().file_name().unwrap().to_str().unwrap().parse().unwrap();
    publish(storage, &recorder, journal, own);
    say("ended");
}

struct Account {
    reader: Reader,
    /// Wrapped keys that arrived.
    keys: BTreeMap<(Uuid, u64), Vec<u8>>,
    /// What was called durable.
    held: BTreeSet<u64>,
    /// What arrived: number, if it is one of ours.
    arrived: BTreeMap<(Uuid, u64), Option<u64>>,
    acknowledged: BTreeSet<(Uuid, u64)>,
    /// Where the cursors of its epochs stood when the life began, and what it has sent.
    cursors: BTreeMap<Uuid, u64>,
    sent: BTreeSet<(Uuid, u64)>,
    again: u64,
    /// Kills before the recorder was started, before the first event was durable, and after.
    kills: [u32; 3],
    /// Kills while each of [`Stage::ALL`] was under way, and those before the recorder was started in a journal that had something.
    stages: [u32; Stage::ALL.len()],
    recovering: u32,
    removed: u64,
    /// Of what arrived, what had content.
    contents: u64,
}

/// Where the agents of a journal write down at which stages they are.
fn stages_of(journal: &Path) -> PathBuf {
    journal.with_extension("stages")
}

/// When an agent is killed.
#[derive(Clone, Copy, Debug)]
enum When {
    /// So long after it began.
    Begun(Duration),
    /// So long after its recorder was ready.
    Ready(Duration),
    /// As soon after that as it is at this.
    At(Stage),
}

impl When {
    fn at_random(random: &mut StdRng) -> Self {
        let milliseconds =
            |random: &mut StdRng, most: f64| Duration::from_secs_f64(random.gen_range(0.0..most) / 1000.0);
        match random.gen_range(0..9) {
            // While it recovers.
            0..3 => Self::Begun(milliseconds(random, 12.0)),
            3..6 => Self::Ready(milliseconds(random, 250.0)),
            _ => Self::At(Stage::ALL[random.gen_range(0..Stage::ALL.len())]),
        }
    }
}

struct Victim {
    child: Child,
    acknowledges: Option<ChildStdin>,
    says: Receiver<String>,
}

impl Victim {
    fn start(journal: &Path, first: u64) -> Self {
        let name = "storage::kill_tests::killed_agents_lose_nothing_that_they_called_durable";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(VICTIM, journal)
            .env(FIRST, first.to_string())
            .env(STAGES, stages_of(journal))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (sender, says) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let words = line.find("weir ").and_then(|at| line[at + 5..].strip_suffix(" ."));
                if words.is_some_and(|words| sender.send(words.to_owned()).is_err()) {
                    break;
                }
            }
        });
        let acknowledges = child.stdin.take();
        Self { child, acknowledges, says }
    }
}

fn acknowledge(victim: Option<&mut Victim>, ticket: &str) {
    if let Some(to) = victim.and_then(|victim| victim.acknowledges.as_mut()) {
        let _ = to.write_all(format!("{ticket}\n").as_bytes());
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Account {
    fn new() -> Self {
        Self {
            reader: Reader::new(),
            keys: BTreeMap::new(),
            held: BTreeSet::new(),
            arrived: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            cursors: BTreeMap::new(),
            sent: BTreeSet::new(),
            again: 0,
            kills: [0; 3],
            stages: [0; Stage::ALL.len()],
            recovering: 0,
            removed: 0,
            contents: 0,
        }
    }

    /// The number in what was sent: content is read with the key that came before it.
    fn number(&mut self, epoch: Uuid, words: &str) -> Option<u64> {
        let Some(event) = words.strip_prefix('=') else { return number(words) };
        let event: Event = serde_json::from_slice(&BASE64_STANDARD.decode(event).unwrap()).unwrap();
        let key = contents::key_of(&event).unwrap();
        let wrapped = self.keys.get(&(epoch, key)).expect("content came without its key");
        self.contents += 1;
        number_of_content(&self.reader.text(wrapped, &event))
    }

    /// Takes down what the victim said, and answers.
    fn take(&mut self, said: &str, victim: Option<&mut Victim>) {
        let words: Vec<_> = said.split(' ').collect();
        match words[..] {
            ["held", number] => assert!(self.held.insert(number.parse().unwrap())),
            ["key", ticket, epoch, number, wrapped] => {
                let id = (epoch.parse().unwrap(), number.parse().unwrap());
                self.keys.insert(id, BASE64_STANDARD.decode(wrapped).unwrap());
                acknowledge(victim, ticket);
            }
            ["sent", ticket, epoch, sequence, text] => {
                if let Ok(sequence) = sequence.parse() {
                    let id = (epoch.parse().unwrap(), sequence);
                    let number = self.number(id.0, text);
                    // What comes again is what was not written down as acknowledged, and comes once a life.
                    let cursor = self.cursors.get(&id.0).copied().unwrap_or_default();
                    assert!(sequence >= cursor, "{id:?} was acknowledged up to {cursor}, and is sent again");
                    assert!(self.sent.insert(id), "{id:?} is sent twice in one life");
                    self.again += u64::from(self.arrived.contains_key(&id));
                    assert_eq!(
                        *self.arrived.entry(id).or_insert(number),
                        number,
                        "{id:?} says something else now"
                    );
                    if victim.is_some() {
                        self.acknowledged.insert(id);
                    }
                }
                acknowledge(victim, ticket);
            }
            ["damage", ..] => panic!("nothing was damaged: {said}"),
            _ => {}
        }
    }

    /// A life, killed then; some Kafkas do not answer.
    fn live_and_die(&mut self, journal: &Path, victim: &mut Victim, when: When, answers: bool) {
        let had_something = !self.held.is_empty();
        // What comes before is the loader's time, and of no interest.
        let from = if matches!(when, When::Begun(_)) { "begins" } else { "ready" };
        while victim.says.recv_timeout(DEADLINE).unwrap() != from {}
        let mut came = usize::from(from == "ready");
        let notes = File::open(stages_of(journal)).unwrap();
        let (until, stage) = match when {
            When::Begun(time) | When::Ready(time) => (Instant::now() + time, None),
            When::At(stage) => (Instant::now() + STAGE_WAIT_MAX, Some(stage)),
        };
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if stage.is_some_and(|stage| stages::under_way(&notes).contains(&stage)) {
                break;
            }
            let look = if stage.is_some() { left.min(LOOK) } else { left };
            match victim.says.recv_timeout(look) {
                Ok(said) => {
                    came = came.max(
                        ["ready", "held"].iter().position(|word| said.starts_with(word)).map_or(0, |n| n + 1),
                    );
                    // Before it is answered, so that what it takes for acknowledged is.
                    self.take(&said, answers.then_some(&mut *victim));
                }
                Err(RecvTimeoutError::Timeout) if !left.is_zero() => {}
                Err(_) => break,
            }
        }
        victim.child.kill().unwrap();
        victim.child.wait().unwrap();
        self.kills[came] += 1;
        self.recovering += u32::from(came == 0 && had_something);
        stages::under_way(&notes).into_iter().for_each(|stage| self.stages[stage as usize] += 1);
        // What it said before it died counts; nobody answers any more.
        while let Ok(said) = victim.says.recv() {
            self.take(&said, None);
        }
    }

    /// A life that ends when everything has arrived.
    fn live_and_publish(&mut self, victim: &mut Victim) {
        let until = Instant::now() + DEADLINE;
        let held = self.held.clone();
        let is_missing = |account: &Self| {
            let arrived: BTreeSet<_> = account.arrived.values().flatten().collect();
            held.iter().any(|number| !arrived.contains(number))
        };
        // On a slow disk all others may have died before a key was stored: something that is encrypted is among what is seen.
        while is_missing(self) || self.contents == 0 {
            // Not at each message: that would take long.
            for _ in 0..1000 {
                match victim.says.recv_timeout(Duration::from_millis(200)) {
                    Ok(said) => self.take(&said, Some(&mut *victim)),
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => panic!("it ended"),
                }
            }
            assert!(Instant::now() < until, "not everything arrives");
        }
        // Without its standard input it ends.
        victim.acknowledges = None;
        let mut has_ended = false;
        while let Ok(said) = victim.says.recv() {
            has_ended |= said == "ended";
            self.take(&said, None);
        }
        assert!(has_ended && victim.child.wait().unwrap().success());
    }

    /// Of a life that has ended, before the next one begins.
    fn check(&mut self, journal: &Path) {
        self.sent.clear();
        let mut present: BTreeSet<u64> = self.arrived.values().flatten().copied().collect();
        for entry in std::fs::read_dir(journal).into_iter().flatten() {
            let folder = entry.unwrap().path();
            let Some(epoch) = folder.file_name().and_then(|name| name.to_str()?.parse::<Uuid>().ok()) else {
                continue;
            };
            let log = Log::read(&FileSystem, &folder);
            let prefix =
                (0..).take_while(|sequence| self.acknowledged.contains(&(epoch, *sequence))).count() as u64;
            let cursor = clock::cursor(&FileSystem, &folder, epoch);
            assert!(
                cursor <= prefix && log.removed <= cursor,
                "{epoch}: {} removed, cursor {cursor}, {prefix}",
                log.removed
            );
            let before = self.cursors.insert(epoch, cursor).unwrap_or_default();
            assert!(before <= cursor, "the cursor of {epoch} went back from {before} to {cursor}");
            self.removed = self.removed.max(log.removed);
            for (sequence, value) in &log.events {
                let event: Event = serde_json::from_slice(value).unwrap();
                let number = match (&event.kind, contents::key_of(&event)) {
                    (Kind::Gap { reason, .. }, _) => number(reason),
                    (_, Some(key)) => {
                        let wrapped = std::fs::read(folder.join(wrapped_key_file(key)));
                        let wrapped = wrapped
                            .unwrap_or_else(|error| panic!("content is there without its key: {error}"));
                        number_of_content(&self.reader.text(&wrapped, &event))
                    }
                    _ => continue,
                };
                present.extend(number);
                if let Some(arrived) = self.arrived.get(&(epoch, *sequence)) {
                    assert_eq!(*arrived, number, "Kafka has something else as {epoch}/{sequence}");
                }
            }
        }
        let gone = self.held.iter().find(|number| !present.contains(number));
        assert_eq!(gone, None, "it was called durable and is gone");
    }
}

#[test]
fn killed_agents_lose_nothing_that_they_called_durable() {
    if let Some(journal) = std::env::var_os(VICTIM) {
        return victim(Path::new(&journal));
    }
    let journals = if std::env::var_os("WEIR_TEST_LONG").is_some() { JOURNALS_LONG } else { 1 };
    let seed = super::power_tests::seed();
    let (mut stages, mut recovering) = ([0; Stage::ALL.len()], 0);
    for journal in 0..journals {
        let account = kill(seed.wrapping_add(journal));
        stages.iter_mut().zip(account.stages).for_each(|(all, of_one)| *all += of_one);
        recovering += account.recovering;
    }
    let [append, rotate, cursor, unlink] = stages;
    println!(
        "kills while a group was appended: {append} , a segment made or cut: {rotate} , the cursor written: {cursor} , published \
         segments removed: {unlink} , an agent recovered: {recovering} ; of {}",
        u64::from(KILLS) * journals
    );
    // In one journal of few kills a stage may be missed: which one is said.
    assert!(
        journals == 1 || stages.iter().all(|kills| *kills > 0) && recovering > 0,
        "a stage was never hit"
    );
}

/// Kills that come one after the other upon one journal.
fn kill(seed: u64) -> Account {
    println!("kills: {KILLS} from WEIR_FUZZ_SEED={seed} on");
    let (mut random, mut account) = (StdRng::seed_from_u64(seed), Account::new());
    let folder = TempDir::new().unwrap();
    let journal = folder.path().join("journal");
    let first = |life: u32| u64::from(life) * 1_000_000;
    let mut lives = 0;
    // Where a machine is slow more are killed early, by the clock: it goes on until enough were late.
    while lives < KILLS || account.kills[2] <= KILLS / 4 && lives < 4 * KILLS {
        let life = lives;
        lives += 1;
        let mut victim = Victim::start(&journal, first(life));
        let when = When::at_random(&mut random);
        // Without a Kafka that answers these never come.
        let waits_for_kafka = matches!(when, When::At(Stage::Cursor | Stage::Unlink));
        account.live_and_die(&journal, &mut victim, when, random.gen_bool(0.8) || waits_for_kafka);
        account.check(&journal);
    }
    let mut last = Victim::start(&journal, first(lives));
    account.live_and_publish(&mut last);
    account.check(&journal);
    let [before, early, late] = account.kills;
    println!(
        "killed {before} before the recorder was ready, {early} before an event was durable, {late} later; durable: {} events were \
         called so, none lost, {} of those that arrived were encrypted, with {} keys; sent once more: {} messages; most removed of an epoch: {}",
        account.held.len(),
        account.contents,
        account.keys.len(),
        account.again,
        account.removed
    );
    assert!(late > KILLS / 4 && account.removed > 0 && account.contents > 0, "{:?}", account.kills);
    account
}
