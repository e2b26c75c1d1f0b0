//! After SQLite: the Nth operation of a scenario fails, for N from 1 until it is not reached any more; once, or from then on
//! until the storage is mended. Recording must refuse what it cannot keep, go on when it can, and lose nothing.

use std::{
    collections::BTreeMap,
    num::NonZero,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::libc;
use rand::{SeedableRng as _, rngs::StdRng};

use super::{
    memory::{Call, Fault},
    world::{Agent, World},
};
use crate::{publishing::fixture::WINDOW, recording::RecordingError};

/// What fails, and with which error of the system.
const FAULTS: [(&str, &[Call], i32); 9] = [
    ("write EIO", &[Call::Write], libc::EIO),
    ("write ENOSPC", &[Call::Write], libc::ENOSPC),
    ("sync EIO", &[Call::Sync], libc::EIO),
    ("open EMFILE", &[Call::OpenToWrite, Call::OpenToRead], libc::EMFILE),
    ("rename EIO", &[Call::Rename], libc::EIO),
    ("remove EIO", &[Call::Remove], libc::EIO),
    ("read EIO", &[Call::Read], libc::EIO),
    ("folder EIO", &[Call::MakeFolder, Call::SyncFolder, Call::SetLength], libc::EIO),
    (
        "change EROFS",
        &[Call::Write, Call::OpenToWrite, Call::SetLength, Call::MakeFolder, Call::Rename, Call::Remove],
        libc::EROFS,
    ),
];

/// Calls that each group needs.
const NEEDED: [Call; 2] = [Call::Write, Call::Sync];

/// Appends; what cannot be kept is refused, and only then.
fn append(world: &mut World, agent: &mut Agent, calls: &[Call], for_ever: bool, refused: &mut u32) {
    let was_met = world.storage.is_met();
    let result = world.append(agent);
    *refused += u32::from(result.is_err());
    // A key that cannot be stored refuses those who need it, and says nothing of the journal.
    if !matches!(result, Err(RecordingError::NoKey(_))) {
        assert_eq!(result.is_err(), agent.life.is_failing(), "{result:?}");
    }
    if was_met && for_ever && NEEDED.iter().any(|call| calls.contains(call)) {
        assert!(result.is_err(), "it cannot have been written");
    }
}

/// Two lives: rotation, checkpoints, publishing, removal; the fault is mended before the end. Returns whether it was met.
fn scenario(at: u64, calls: &'static [Call], errno: i32, for_ever: bool, encrypts: bool) -> bool {
    // The same in every run: only the fault is another.
    let mut world = World { encrypts, ..World::new(1) };
    world.storage.fault(Fault::Fails { at, calls, errno, for_ever });
    let (mut refused, mut is_met) = (0, false);
    for life in 0..2 {
        let mut agent = match world.start() {
            Ok(agent) => agent,
            Err(error) => {
                assert!(world.storage.is_met(), "{error}");
                is_met = true;
                world.storage = world.storage.after_kill();
                world.start().expect("the storage is mended")
            }
        };
        for round in 0..8 {
            append(&mut world, &mut agent, calls, for_ever, &mut refused);
            agent.run.turn_after(&mut world.clock, Duration::from_secs(3));
            world.broker.acknowledge_all();
            let time = if round == 5 { WINDOW } else { Duration::from_secs(16) };
            agent.run.turn_after(&mut world.clock, time);
        }
        assert!(for_ever || refused <= 1, "{at}: one failure refuses one group, not {refused}");
        is_met |= world.storage.is_met();
        if life == 1 {
            world.storage.fault(Fault::Never);
            world.append(&mut agent).expect("the storage is mended, so recording goes on");
            world.publish_all(&mut agent);
        }
        world.end(agent, life == 0);
    }
    finish(world, at);
    is_met
}

/// The power goes, and the next agent publishes what is there.
fn finish(mut world: World, seed: u64) {
    let losses = if std::env::var_os("WEIR_TEST_LONG").is_some() { 10 } else { 1 };
    for seed in seed..seed + losses {
        let after = world.storage.after_power_loss(&mut StdRng::seed_from_u64(seed));
        let before = std::mem::replace(&mut world.storage, after);
        world.check();
        world.storage = before;
    }
    world.storage = world.storage.after_power_loss(&mut StdRng::seed_from_u64(seed));
    let mut agent = world.start().expect("the storage is mended");
    world.publish_all(&mut agent);
    world.end(agent, true);
    world.storage = world.storage.after_kill();
    world.check();
    let missing = world.unpublished() as u64;
    let declared: u64 = world.gaps.iter().map(|(_, events)| events.unwrap_or(u64::MAX / 64)).sum();
    assert!(
        missing <= declared,
        "{missing} events never arrived, {declared} were declared: {:?}",
        world.gaps
    );
}

#[test]
fn a_segment_that_could_not_be_made_hides_nothing_should_it_come_back_with_the_power() {
    const CALLS: &[Call] = &[Call::Sync, Call::SyncFolder];
    let mut at = 0;
    loop {
        at += 1;
        let mut world = World::new(2);
        let Ok(mut agent) = world.start() else { continue };
        world.storage.fault(Fault::Fails { at, calls: CALLS, errno: libc::EIO, for_ever: false });
        (0..8).for_each(|_| drop(world.append(&mut agent)));
        let is_met = world.storage.is_met();
        world.end(agent, false);
        for seed in 0..40 {
            let after = world.storage.after_power_loss(&mut StdRng::seed_from_u64(seed));
            let before = std::mem::replace(&mut world.storage, after);
            world.check();
            world.storage = before;
        }
        if !is_met {
            break;
        }
    }
}

/// A fault, and how it comes: until it is mended, and with encrypted content.
type Case = ((&'static str, &'static [Call], i32), (bool, bool));

/// All operations of a case, one after the other: how many runs, and which of them failed.
fn operations(((name, calls, errno), (for_ever, encrypts)): Case) -> (u64, Vec<String>) {
    let mut failed = Vec::new();
    for at in 1..5000 {
        match std::panic::catch_unwind(|| scenario(at, calls, errno, for_ever, encrypts)) {
            Ok(true) => {}
            Ok(false) => return (at, failed),
            Err(_) => {
                failed.push(format!("operation {at} of {name}, for ever: {for_ever}, encrypted: {encrypts}"))
            }
        }
    }
    panic!("it ends")
}

#[test]
fn whichever_operation_fails_recording_refuses_goes_on_and_loses_nothing() {
    let hows = [(false, false), (true, false), (false, true)];
    let cases: Vec<Case> = FAULTS.iter().flat_map(|fault| hows.map(|how| (*fault, how))).collect();
    // Each is a world of its own; together they take longer than all other tests of this crate.
    let (next, done) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let of_case = operations(*case);
                    done.lock().unwrap().insert((case.0.0, case.1), of_case);
                }
            });
        }
    });
    let (done, mut scenarios, mut failed) = (done.into_inner().unwrap(), 0, Vec::new());
    for ((name, _, _), how) in cases {
        let (runs, of_case) = &done[&(name, how)];
        scenarios += runs;
        failed.extend(of_case);
        let how = match how {
            (true, _) => " until mended",
            (false, false) => " once",
            (false, true) => " once, with encrypted content",
        };
        println!("{name}{how}: {runs} runs");
    }
    println!("operations: {scenarios} scenarios");
    assert!(failed.is_empty(), "{failed:#?}");
}
