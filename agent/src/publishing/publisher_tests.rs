//! The publisher as a whole, against a Kafka that obeys, on real files: what arrives, what is removed, what survives.

use std::{
    collections::BTreeSet,
    os::unix::fs::FileExt as _,
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;
use weir_common::message::Kind;

use super::{
    clock::{Clock, cursor},
    cursor::{CURSOR_FILE, CursorFile},
    fixture::{Broker, Log, Run, WINDOW},
    publisher::FLIGHT_MESSAGES_MAX,
    sink::Failure,
};
use crate::storage::FileSystem;

pub(super) fn events(epoch: Uuid, sequences: std::ops::Range<u64>) -> BTreeSet<(Uuid, Kind)> {
    sequences.map(|sequence| (epoch, Kind::Event { sequence })).collect()
}

fn other() -> Failure {
    Failure::Other { reason: "a test".into() }
}

/// Turns, with everything acknowledged at once, until nothing more happens.
pub(super) fn settle(run: &mut Run, broker: &Broker, clock: &mut Clock) {
    for _ in 0..20 {
        run.turn_at(clock.pass(Duration::from_secs(31)));
        broker.acknowledge_all();
    }
    run.turn_at(clock.pass(Duration::from_secs(2)));
}

#[test]
fn an_agent_that_is_not_let_in_tries_again_with_what_its_files_hold_then() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    log.events(3);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    broker.with(|state| state.denied = true);
    run.turn_at(clock.pass(Duration::ZERO));
    run.turn_at(clock.pass(Duration::from_secs(5)));
    assert_eq!(broker.with(|state| state.made), 1);
    assert!(run.published().trouble.unwrap().contains("wrong password"));
    for _ in 0..4 {
        run.turn_at(clock.pass(Duration::from_secs(11)));
    }
    assert!(broker.with(|state| state.made) > 1, "the client is made anew");
    assert!(run.published().errors.iter().any(|(name, count)| *name == "denied" && *count > 0));
    broker.with(|state| state.denied = false);
    settle(&mut run, &broker, &mut clock);
    assert_eq!(broker.with(|state| state.acknowledged.clone()), events(log.epoch, 0..3));
    assert!(run.published().trouble.is_none());
}

/// What the file `cursor` says: number of events that are acknowledged. The publisher must be gone.
fn written(log: &Log) -> u64 {
    cursor(&FileSystem, log.folder(), log.epoch)
}

#[test]
fn everything_durable_arrives_and_nothing_else() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    log.events(10);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    log.events(10);
    settle(&mut run, &broker, &mut clock);
    assert_eq!(broker.with(|state| state.acknowledged.clone()), events(log.epoch, 0..10));
    run.durable.publish(log.durable());
    assert!(!run.publisher.is_done());
    settle(&mut run, &broker, &mut clock);
    assert!(run.publisher.is_done());
    assert_eq!(broker.with(|state| state.acknowledged.clone()), events(log.epoch, 0..20));
    assert_eq!(run.published().messages, 20);
}

#[test]
fn a_restart_goes_on_behind_what_was_acknowledged() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    log.events(10);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    run.turn_at(clock.pass(Duration::ZERO));
    (0..4).for_each(|_| broker.acknowledge(0));
    broker.acknowledge(3);
    run.turn_at(clock.pass(Duration::from_secs(2)));
    run.publisher.finish(clock.pass(Duration::ZERO));
    drop(run);
    assert_eq!(written(&log), 4, "the one behind a gap does not count");
    let mut run = Run::with(&log, Box::new(broker.clone()));
    run.turn_at(clock.pass(Duration::ZERO));
    let first = broker.with(|state| state.waiting[0].1);
    assert_eq!(first, (log.epoch, Kind::Event { sequence: 4 }));
}

#[test]
fn epochs_that_have_ended_come_first_and_one_that_somebody_publishes_is_left_alone() {
    let journal = Arc::new(TempDir::new().unwrap());
    let mut logs: Vec<_> = (1..5).map(|epoch| Log::in_journal(Arc::clone(&journal), epoch)).collect();
    logs.iter_mut().for_each(|log| log.events(3));
    // The second one's agent lives; the third is being published by somebody.
    let lock = std::fs::File::create(logs[1].folder().join("lock")).unwrap();
    let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive).unwrap();
    let cursor = CursorFile::open(&FileSystem, logs[2].folder(), logs[2].epoch).unwrap().unwrap();
    let (broker, mut clock) = (Broker::new(), Clock::new());
    let mut run = Run::with(&logs[3], Box::new(broker.clone()));
    run.turn_at(clock.pass(Duration::ZERO));
    let order: Vec<_> = broker.with(|state| state.waiting.iter().map(|(_, (epoch, _), _)| *epoch).collect());
    assert_eq!(order, [vec![logs[0].epoch; 3], vec![logs[3].epoch; 3]].concat());
    drop((lock, cursor));
    settle(&mut run, &broker, &mut clock);
    assert_eq!(broker.with(|state| state.acknowledged.len()), 12);
}

#[test]
fn nothing_is_removed_before_it_is_acknowledged_and_the_window_has_passed() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    log.events(4);
    log.checkpoint();
    log.rotate();
    log.events(4);
    log.rotate();
    log.events(1);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    // Long after everything was sent, but for the last of the first segment nothing is acknowledged.
    run.turn_at(clock.pass(Duration::ZERO));
    (0..4).for_each(|_| broker.acknowledge(0));
    (0..10).for_each(|_| run.turn_at(clock.pass(WINDOW)));
    assert!(log.segment(0).exists());
    // Everything is, but the window has not passed.
    broker.acknowledge_all();
    run.turn_at(clock.pass(Duration::from_secs(2)));
    run.turn_at(clock.pass(WINDOW - Duration::from_secs(3)));
    run.turn_at(clock.pass(Duration::from_secs(2)));
    assert!(log.segment(0).exists() && log.segment(1).exists());
    run.turn_at(clock.pass(Duration::from_secs(20)));
    assert!(!log.segment(0).exists() && !log.segment(1).exists());
    assert!(log.segment(2).exists(), "it is being written");
    assert_eq!(run.published().segments_removed, 2);
    // And nothing of that is missed by whoever starts then.
    drop(run);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    settle(&mut run, &broker, &mut clock);
    assert!(run.gaps.lock().unwrap().is_empty());
}

#[test]
fn a_journal_that_is_short_of_room_gives_up_what_was_acknowledged_one_segment_at_a_time() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    for _ in 0..3 {
        log.events(4);
        log.rotate();
    }
    log.events(1);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    run.measures.set_short(true);
    run.turn_at(clock.pass(Duration::ZERO));
    (0..4).for_each(|_| run.turn_at(clock.pass(Duration::from_secs(2))));
    assert!(log.segment(0).exists(), "what was not acknowledged stays, however short room is");
    broker.acknowledge_all();
    // Once to hear of it and write it down, perhaps.
    for _ in 0..3 {
        if log.segment(0).exists() {
            run.turn_at(clock.pass(Duration::from_secs(2)));
        }
    }
    assert!(!log.segment(0).exists() && log.segment(1).exists() && log.segment(2).exists());
    // There is room again: the others stay for the rest of their window.
    run.measures.set_short(false);
    (0..4).for_each(|_| run.turn_at(clock.pass(Duration::from_secs(2))));
    assert!(log.segment(1).exists());
    let published = run.published();
    assert_eq!((published.segments_removed, published.segments_removed_early), (1, 1));
    (0..3).for_each(|_| run.turn_at(clock.pass(WINDOW)));
    assert!(!log.segment(1).exists() && !log.segment(2).exists() && log.segment(3).exists());
    assert_eq!(run.published().segments_removed_early, 1);
}

#[test]
fn an_epoch_that_cannot_be_opened_is_counted_until_it_can_be() {
    let journal = Log::new();
    let other = Log::in_journal(Arc::clone(journal.journal()), 3);
    let (broker, mut clock) = (Broker::new(), Clock::new());
    // A folder where the file should be.
    std::fs::create_dir(other.folder().join(CURSOR_FILE)).unwrap();
    let mut run = Run::with(&journal, Box::new(broker));
    run.turn_at(clock.pass(Duration::ZERO));
    assert_eq!(run.published().epochs_unreadable, 1);
    std::fs::remove_dir(other.folder().join(CURSOR_FILE)).unwrap();
    run.turn_at(clock.pass(Duration::from_secs(11)));
    assert_eq!(run.published().epochs_unreadable, 0);
}

#[test]
fn an_epoch_that_has_ended_goes_whole_once_nobody_names_it() {
    let journal = Arc::new(TempDir::new().unwrap());
    let mut ended = Log::in_journal(Arc::clone(&journal), 1);
    ended.events(3);
    ended.checkpoint();
    let mut own = Log::in_journal(Arc::clone(&journal), 2);
    own.started(&ended);
    let (broker, mut clock) = (Broker::new(), Clock::new());
    let mut run = Run::with(&own, Box::new(broker.clone()));
    settle(&mut run, &broker, &mut clock);
    assert!(!ended.segment(0).exists(), "its events are published and gone");
    assert!(ended.folder().join("removed").exists(), "its account stays for the sake of its successor");
    own.rotate();
    own.events(1);
    run.durable.publish(own.durable());
    settle(&mut run, &broker, &mut clock);
    assert!(!own.segment(0).exists());
    assert!(!ended.folder().exists());
}

#[test]
fn damage_is_passed_with_one_gap_whatever_happens_and_its_segment_stays() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    log.events(6);
    log.damage(3);
    log.rotate();
    log.events(2);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    run.turn_at(clock.pass(Duration::ZERO));
    // Everything is read again, the damage too.
    broker.refuse(other());
    settle(&mut run, &broker, &mut clock);
    let mut expected = events(log.epoch, 0..8);
    expected.remove(&(log.epoch, Kind::Event { sequence: 3 }));
    assert_eq!(broker.with(|state| state.acknowledged.clone()), expected);
    let gaps = run.gaps.lock().unwrap().clone();
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    assert!(gaps[0].0.contains("segment 0") && gaps[0].1 == Some(1), "{gaps:?}");
    assert_eq!(run.published().damages, 1);
    assert!(log.segment(0).exists(), "damaged evidence is not removed");
    drop(run);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    settle(&mut run, &broker, &mut clock);
    assert!(run.gaps.lock().unwrap().is_empty(), "it is behind the cursor");
}

#[test]
fn what_is_refused_again_and_again_makes_nothing_else_arrive_again_and_again() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    log.events(50);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    run.turn_at(clock.pass(Duration::ZERO));
    assert_eq!(broker.with(|state| state.waiting.len()), 50);
    for _ in 0..10 {
        broker.refuse(Failure::TooLarge { topic: "weir".into(), bytes: 9 });
        run.turn_at(clock.pass(Duration::from_secs(31)));
        run.turn_at(clock.pass(Duration::from_secs(31)));
        assert_eq!(broker.with(|state| state.waiting.len()), 1);
    }
    let published = run.published();
    assert!(published.trouble.unwrap().contains("max.message.bytes"), "an operator is told");
    assert!(published.errors.contains(&("tooLarge", 10)), "{:?}", published.errors);
    settle(&mut run, &broker, &mut clock);
    assert_eq!(broker.with(|state| state.acknowledged.len()), 50);
    assert_eq!(run.published().trouble, None);
}

#[test]
fn a_sink_is_made_anew_after_a_pause_that_grows() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    log.events(1);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    run.turn_at(clock.pass(Duration::ZERO));
    let mut made = Vec::new();
    for _ in 0..6 {
        broker.with(|state| state.fatal = true);
        for _ in 0..10 {
            run.turn_at(clock.pass(Duration::from_millis(500)));
        }
        made.push(broker.with(|state| state.made));
    }
    assert_eq!(made[0], 2);
    assert!(made[5] < 7, "{made:?}");
    let oldest = run.published().backlog_seconds;
    assert_eq!(oldest, 4, "its age is known while nothing can be sent");
}

#[test]
fn what_is_on_its_way_is_bounded() {
    let (mut log, broker, mut clock) = (Log::new(), Broker::new(), Clock::new());
    log.large_events(100, 500_000);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    run.turn_at(clock.pass(Duration::ZERO));
    let waiting = broker.with(|state| state.waiting.len());
    assert!((10..17).contains(&waiting) && waiting < FLIGHT_MESSAGES_MAX, "{waiting}");
    run.turn_at(clock.pass(Duration::ZERO));
    assert_eq!(broker.with(|state| state.waiting.len()), waiting);
    assert!(run.published().backlog_bytes > 49_000_000);
    // A sink without room is no failure.
    let (broker, mut log) = (Broker::new(), Log::new());
    broker.with(|state| state.room = 3);
    log.events(10);
    let mut run = Run::with(&log, Box::new(broker.clone()));
    settle(&mut run, &broker, &mut clock);
    assert_eq!(broker.with(|state| state.acknowledged.len()), 10);
}

/// What may happen next.
#[derive(Clone, Debug)]
enum Step {
    Events(usize),
    Checkpoint,
    Rotate,
    /// What was written becomes durable.
    Durable,
    Turn(u64),
    Acknowledge(usize),
    AcknowledgeAll,
    ArriveUnheard(usize),
    Refuse,
    Fatal,
    Room(usize),
    /// The publisher's process dies.
    Crash,
    /// It dies while it writes one of the cursor's slots.
    CrashTorn(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..6_usize).prop_map(Step::Events),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Rotate),
        4 => Just(Step::Durable),
        10 => prop_oneof![Just(0), 1..3000_u64, Just(40_000)].prop_map(Step::Turn),
        8 => (0..6_usize).prop_map(Step::Acknowledge),
        2 => Just(Step::AcknowledgeAll),
        1 => (0..6_usize).prop_map(Step::ArriveUnheard),
        1 => Just(Step::Refuse),
        1 => Just(Step::Fatal),
        1 => prop_oneof![Just(usize::MAX), 1..5_usize].prop_map(Step::Room),
        1 => Just(Step::Crash),
        1 => (0..1024_u64).prop_map(Step::CrashTorn),
    ]
}

struct Model {
    log: Log,
    broker: Broker,
    clock: Clock,
    run: Option<Run>,
    /// When each segment was seen to be acknowledged whole.
    whole_since: Vec<Option<Instant>>,
    /// Events before each segment.
    begins: Vec<u64>,
}

impl Model {
    fn new() -> Self {
        let (log, broker) = (Log::new(), Broker::new());
        let run = Some(Run::with(&log, Box::new(broker.clone())));
        Self { log, broker, clock: Clock::new(), run, whole_since: Vec::new(), begins: vec![0] }
    }

    fn run(&mut self) -> &mut Run {
        let Self { run, log, broker, .. } = self;
        run.get_or_insert_with(|| Run::with(log, Box::new(broker.clone())))
    }

    fn act(&mut self, step: &Step) {
        match *step {
            Step::Events(count) => self.log.events(count),
            Step::Checkpoint => self.log.checkpoint(),
            Step::Rotate => {
                self.log.rotate();
                self.begins.push(self.log.sequence);
            }
            Step::Durable => {
                let durable = self.log.durable();
                self.run().durable.publish(durable);
            }
            Step::Turn(milliseconds) => {
                let now = self.clock.pass(Duration::from_millis(milliseconds));
                self.run().turn_at(now);
            }
            Step::Acknowledge(index) => self.broker.acknowledge(index),
            Step::AcknowledgeAll => self.broker.acknowledge_all(),
            Step::ArriveUnheard(index) => self.broker.arrive_unheard(index),
            Step::Refuse => self.broker.refuse(other()),
            Step::Fatal => self.broker.with(|state| state.fatal = true),
            Step::Room(room) => self.broker.with(|state| state.room = room),
            Step::Crash => self.run = None,
            Step::CrashTorn(at) => {
                self.run = None;
                let path = self.log.folder().join(CURSOR_FILE);
                if let Ok(file) = std::fs::File::options().write(true).open(path) {
                    file.write_all_at(&[0xa5], at).unwrap();
                }
            }
        }
        self.check();
    }

    /// How many events are acknowledged without a gap.
    fn prefix(&self) -> u64 {
        self.broker.with(|state| {
            let epoch = self.log.epoch;
            let is =
                |sequence: &u64| state.acknowledged.contains(&(epoch, Kind::Event { sequence: *sequence }));
            (0..).take_while(is).count() as u64
        })
    }

    fn check(&mut self) {
        let prefix = self.prefix();
        // What is written down never exceeds what is acknowledged; while the publisher lives it has the file.
        if self.run.is_none() {
            assert!(written(&self.log) <= prefix);
        }
        let now = self.clock.0.instant;
        for (index, begin) in self.begins.iter().enumerate().skip(1) {
            if self.whole_since.len() < index {
                self.whole_since.push(None);
            }
            let whole = &mut self.whole_since[index - 1];
            if whole.is_none() && prefix >= *begin {
                *whole = Some(now);
            }
            let may_go = whole.is_some_and(|since| now.duration_since(since) >= WINDOW);
            let exists = self.log.segment(index as u64 - 1).exists();
            assert!(exists || may_go, "segment {} went at {prefix}", index - 1);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_everything_arrives_in_order_and_nothing_goes_too_soon(
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut model = Model::new();
        steps.iter().for_each(|step| model.act(step));
        // In the end Kafka is well, and the agent lives.
        let durable = model.log.durable();
        model.broker.with(|state| state.room = usize::MAX);
        model.run().durable.publish(durable);
        for _ in 0..30 {
            model.act(&Step::Turn(31_000));
            model.act(&Step::AcknowledgeAll);
        }
        model.act(&Step::Turn(2000));
        let (count, epoch) = (model.log.sequence, model.log.epoch);
        model.broker.with(|state| {
            prop_assert!(events(epoch, 0..count).is_subset(&state.acknowledged));
            // Of each key, what arrives first of an event is behind what arrived first of those before it.
            for (_, arrived) in state.arrived.iter().filter(|(key, _)| key.is_some()) {
                let mut newest = None;
                let mut seen = BTreeSet::new();
                for (_, kind) in arrived {
                    let Kind::Event { sequence } = kind else { continue };
                    if seen.insert(*sequence) {
                        prop_assert!(newest < Some(*sequence), "{arrived:?}");
                        newest = Some(*sequence);
                    }
                }
            }
            Ok(())
        })?;
        let run = model.run.as_ref().unwrap();
        prop_assert!(run.publisher.is_done() || durable.offset == 512);
        prop_assert!(run.gaps.lock().unwrap().is_empty());
    }
}
