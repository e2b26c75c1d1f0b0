//! Replays the committed corpus of every fuzz target, and mutations of it from a seed that is printed.
//!
//! `WEIR_FUZZ_SEED` takes a printed seed again. What a fuzzer finds goes into `tests/fuzz/corpus/TARGET`.

use std::{
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use weir_properties::TARGETS;

/// Mutations of each target's corpus, and with `WEIR_TEST_LONG`.
const MUTATIONS: usize = 3000;
const MUTATIONS_LONG: usize = 100_000;
/// Most changes that make one mutation.
const CHANGES_MAX: usize = 4;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz")
}

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = folder().join("corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("can be listed").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} has no corpus", folder.display());
    paths
        .into_iter()
        .map(|path| {
            let bytes = fs::read(&path).expect("a corpus file can be read");
            (path, bytes)
        })
        .collect()
}

#[test]
fn every_property_holds_for_its_corpus() {
    for (target, property) in TARGETS {
        for (path, bytes) in corpus(target) {
            let held = catch_unwind(AssertUnwindSafe(|| property(&bytes)));
            assert!(held.is_ok(), "{target} does not hold for {}", path.display());
        }
    }
}

#[test]
fn every_property_holds_for_mutations_of_its_corpus() {
    let seed = match std::env::var("WEIR_FUZZ_SEED") {
        Ok(seed) => seed.parse().expect("WEIR_FUZZ_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("WEIR_FUZZ_SEED={seed}");
    let long = std::env::var_os("WEIR_TEST_LONG").is_some();
    let mutations = if long { MUTATIONS_LONG } else { MUTATIONS };
    for (target, property) in TARGETS {
        let mut random = StdRng::seed_from_u64(seed);
        let corpus: Vec<Vec<u8>> = corpus(target).into_iter().map(|(_, bytes)| bytes).collect();
        for round in 0..mutations {
            let bytes = mutated(&mut random, &corpus);
            let held = catch_unwind(AssertUnwindSafe(|| property(&bytes)));
            assert!(
                held.is_ok(),
                "{target} does not hold in round {round} of WEIR_FUZZ_SEED={seed}: {:?}",
                bytes.escape_ascii().to_string()
            );
        }
    }
}

#[test]
fn every_target_has_a_fuzz_target_and_a_corpus_and_none_is_left_over() {
    let names = |part: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(folder().join(part)).expect("can be listed");
        entries
            .map(|entry| entry.expect("can be listed").path())
            .map(|path| path.file_stem().expect("has a name").to_string_lossy().into_owned())
            .collect()
    };
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("fuzz_targets"), targets);
    assert_eq!(names("corpus"), targets);
}

fn mutated(random: &mut StdRng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus.choose(random).expect("is not empty").clone();
    for _ in 0..random.gen_range(1..=CHANGES_MAX) {
        let at = random.gen_range(0..=bytes.len());
        let to = random.gen_range(at..=bytes.len().min(at + 16));
        match random.gen_range(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.gen_range(0..8),
            1 if at < bytes.len() => {
                bytes[at] = *[0, 1, 0x7f, 0x80, 0xfb, 0xff].choose(random).expect("has six")
            }
            2 => drop(bytes.drain(at..to)),
            3 => bytes.insert(at, random.r#gen()),
            _ => {
                let other = corpus.choose(random).expect("is not empty");
                let from = random.gen_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes
}
