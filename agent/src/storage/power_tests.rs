//! The power goes at any system call: what was called durable is there afterwards, and nothing that was never written.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{
    memory::Fault,
    world::{World, folder},
};
use crate::storage::Storage as _;

/// Cases by default and with `WEIR_TEST_LONG`.
const CASES: u64 = 400;
const CASES_LONG: u64 = 50_000;

/// Of so many cases one encrypts half of what it records, with many keys.
pub(super) const ENCRYPTED_OF: u64 = 4;

/// Seeds that once failed.
const REGRESSIONS: [u64; 0] = [];

/// Says which seed it was, if the test fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("this was case WEIR_FUZZ_SEED={}", self.0);
        }
    }
}

/// The seed of the first case: that of `WEIR_FUZZ_SEED`, or a fresh one.
pub(super) fn seed() -> u64 {
    let given = std::env::var("WEIR_FUZZ_SEED").ok();
    given.map_or_else(rand::random, |seed| seed.parse().expect("WEIR_FUZZ_SEED is a number"))
}

/// Lives that each end by a power cut (or, some, by a kill) at some call, and one that publishes what they left. Returns
/// the number of cuts.
fn lives(seed: u64) -> u64 {
    let _named = Named(seed);
    let mut world = World { encrypts: seed.is_multiple_of(ENCRYPTED_OF), ..World::new(seed) };
    let mut cuts = 0;
    for _ in 0..world.random.gen_range(1..5) {
        // Early ones hit the start and what it finds of those before, late ones rotation and removal.
        let last = [30, 300, 1200][world.random.gen_range(0..3)];
        let at = world.random.gen_range(1..=last);
        world.storage.fault(Fault::Power(at));
        if let Ok(mut agent) = world.start() {
            for _ in 0..world.random.gen_range(0..120) {
                if world.storage.is_met() {
                    break;
                }
                world.step(&mut agent);
            }
            let orderly = world.random.gen_bool(0.3);
            world.end(agent, orderly);
        }
        cuts += u64::from(world.storage.is_met());
        let mut random = StdRng::seed_from_u64(world.random.r#gen());
        let killed = world.random.gen_bool(0.25);
        world.storage =
            if killed { world.storage.after_kill() } else { world.storage.after_power_loss(&mut random) };
        world.check();
        // What was found damaged when nothing could be read any more.
        world.gaps.clear();
    }
    let mut agent = world.start().expect("nothing is wrong with the storage");
    world.publish_all(&mut agent);
    world.append(&mut agent).expect("nothing is wrong with the storage");
    world.publish_all(&mut agent);
    world.end(agent, true);
    world.storage = world.storage.after_kill();
    world.check();
    assert_eq!(world.unpublished(), 0, "everything that was durable arrives");
    assert!(world.gaps.is_empty(), "nothing was damaged: {:?}", world.gaps);
    cuts
}

#[test]
fn whenever_the_power_goes_what_was_called_durable_is_there_and_the_log_verifies() {
    let cases = if std::env::var_os("WEIR_TEST_LONG").is_some() { CASES_LONG } else { CASES };
    let seed = seed();
    println!("power loss: {cases} cases from WEIR_FUZZ_SEED={seed} on");
    let known: u64 = REGRESSIONS.iter().map(|seed| lives(*seed)).sum();
    let cuts: u64 = (0..cases).map(|case| lives(seed.wrapping_add(case))).sum();
    assert!(known + cuts >= cases, "only {cuts} power cuts in {cases} cases");
    println!("power cuts: {cuts} of them, some of them kills");
}

#[test]
fn the_model_loses_what_was_not_synced_and_keeps_what_was() {
    let mut lost = [0; 4];
    for seed in 0..100 {
        let mut random = StdRng::seed_from_u64(seed);
        let world = World::new(seed);
        super::make_folders(&world.storage, folder()).unwrap();
        let path = folder().join("kept");
        let file = super::create_allocated(&world.storage, &path, 8192).unwrap();
        file.write_at(b"header", 0).unwrap();
        file.write_at(&[1; 100], 512).unwrap();
        file.sync_data().unwrap();
        file.write_at(&[2; 5000], 1024).unwrap();
        super::replace(&world.storage, &folder().join("replaced"), b"new").unwrap();
        world.storage.rename(&folder().join("replaced"), &folder().join("renamed")).unwrap();
        drop(world.storage.open(&folder().join("made"), super::Open::New).unwrap());
        let after = world.storage.after_power_loss(&mut random);
        let mut bytes = [0; 8192];
        let read = after.open(&path, super::Open::Read).unwrap().read_at(&mut bytes, 0).unwrap();
        assert!(read == 8192 && bytes.starts_with(b"header") && bytes[512..612] == [1; 100]);
        assert!(file.sync_data().is_err(), "the old one is off");
        let written = bytes[1024..6024].iter().filter(|byte| **byte == 2).count();
        assert!(written == 0 || written.is_multiple_of(512) || bytes[6023] == 2, "sectors are whole");
        assert!(after.exists(&folder().join("replaced")) != after.exists(&folder().join("renamed")));
        lost[0] += usize::from(written == 0);
        lost[1] += usize::from(written == 5000);
        lost[2] += usize::from(after.exists(&folder().join("renamed")));
        lost[3] += usize::from(after.exists(&folder().join("made")));
    }
    assert!(lost.iter().all(|count| (10..90).contains(count)), "{lost:?}");
}
