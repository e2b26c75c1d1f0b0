//! `cargo xtask chaos`: the tests that cut power, fail system calls, kill agents and make Kafka forget, again and again with fresh
//! seeds; with `--node` also the faults of real brokers and disks, once. It ends with a table, in docs/chaos.md.
//!
//! The tests are those of `cargo test`, and say themselves which seed brings a failure back. docs/reliability.md says what they do.

use std::{
    collections::BTreeMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::test;

/// Tests whose cases come from a seed, the operations that fail one after the other, and disks and a Kafka that are away for long: those
/// have no seed, and another order of threads each time.
const TESTS: [&str; 7] = [
    "storage::power_tests",
    "storage::operation_tests",
    "storage::kill_tests",
    "storage::outage_tests",
    "publishing::publisher_tests",
    "recording::durability_tests",
    "recording::flood_tests",
];
/// Those of real brokers and disks, and of a clock that is set.
const NODE_TESTS: [&str; 5] =
    ["kafka_faults::", "broker_faults::", "storage_faults::", "commits::", "clock_jumps::"];
/// Where the table stands.
const TABLE: &str = "docs/chaos.md";

/// How long, and what.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// No round begins after so many minutes.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// The faults of real brokers and disks as well, on a testbed. Needs root.
    #[arg(long)]
    node: bool,
}

/// What came of all rounds.
#[derive(Debug, Default)]
struct Account {
    rounds: u64,
    /// By the words that follow the number in what tests print.
    counted: BTreeMap<&'static str, u64>,
}

/// What tests print: the words before a number, and those after it by which it is counted.
const COUNTED: [(&str, &str); 12] = [
    ("power loss: ", "scenarios of power loss"),
    ("power cuts: ", "power cuts and kills in them"),
    ("operations: ", "scenarios in which an operation fails"),
    ("kills: ", "agents killed (SIGKILL)"),
    ("a group was appended: ", "of them while a group was appended"),
    ("a segment made or cut: ", "of them while a segment was made or cut"),
    ("the cursor written: ", "of them while the cursor was written"),
    ("published segments removed: ", "of them while published segments were removed"),
    ("an agent recovered: ", "of them while an agent recovered"),
    ("Kafka away for ", "events while Kafka was away"),
    ("durable: ", "events that those had called durable, none lost"),
    ("once more: ", "of their messages that came once more"),
];

impl Account {
    fn take(&mut self, text: &str) {
        for (before, what) in COUNTED {
            for line in text.lines() {
                let number =
                    line.split_once(before).and_then(|(_, after)| after.split(' ').next()?.parse().ok());
                *self.counted.entry(what).or_default() += number.unwrap_or(0_u64);
            }
        }
        self.rounds += 1;
    }
}

/// Runs them until the time has passed, or one fails.
///
/// # Errors
/// One fails: what it said names its seed.
pub(crate) fn run(root: &Path, arguments: &Arguments) -> Result<()> {
    let (first, begin) = (test::seed()?, Instant::now());
    let mut account = Account::default();
    println!("seed: WEIR_FUZZ_SEED={first}, the next round's is 2^32 more");
    while account.rounds == 0 || begin.elapsed() < Duration::from_secs(arguments.minutes * 60) {
        // Far enough apart: a round counts up from its seed.
        let seed = first.wrapping_add(account.rounds << 32);
        let mut command = Command::new("cargo");
        command.args(["test", "--locked", "-p", "weir-agent", "--lib", "--"]).args(TESTS);
        // One after the other: a child that one of them starts has copies of the others' locks for a moment.
        command.args(["--nocapture", "--test-threads=1"]);
        command.env("WEIR_FUZZ_SEED", seed.to_string());
        let output = command.current_dir(root).output().context("cannot start cargo")?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let more = String::from_utf8_lossy(&output.stderr);
            bail!("WEIR_FUZZ_SEED={seed}: {}\n{text}\n{more}", output.status);
        }
        account.take(&text);
        println!("round {} passed after {} s", account.rounds, begin.elapsed().as_secs());
    }
    let node = if arguments.node { Some(on_node(root)?) } else { None };
    let table = account.table(first, begin.elapsed(), node);
    println!("\n{table}");
    let title = "# The last chaos run\n\n`cargo xtask chaos` writes this file when nothing has failed; [reliability.md](reliability.md) \
                 says what was done.\n\n";
    std::fs::write(root.join(TABLE), format!("{title}{}\n{table}", test::circumstances(root)?))
        .with_context(|| format!("cannot write {TABLE}"))
}

/// The faults of real brokers and disks; how long they took.
fn on_node(root: &Path) -> Result<Duration> {
    let begin = Instant::now();
    let mut build = Command::new("cargo");
    build.args(["build", "--locked", "-p", "weir-agent", "-p", "weir"]);
    let mut tests = Command::new("cargo");
    tests.args(["test", "--locked", "-p", "weir-tests", "--test", "integration", "--"]).args(NODE_TESTS);
    tests.env("WEIR_TEST_LONG", "1").env("CI", "true");
    for mut command in [build, tests] {
        let status = command.current_dir(root).status().context("cannot start cargo")?;
        if !status.success() {
            bail!("{command:?} ended with {status}");
        }
    }
    Ok(begin.elapsed())
}

impl Account {
    fn table(&self, first: u64, took: Duration, node: Option<Duration>) -> String {
        let Self { rounds, counted } = self;
        let mut table = format!(
            "- Rounds: {rounds}, {} seconds\n- Seeds: `WEIR_FUZZ_SEED={first}`, and 2^32 more for each further round\n\n\
             | what | number |\n|---|---|\n",
            took.as_secs()
        );
        for (what, number) in counted {
            table.push_str(&format!("| {what} | {number} |\n"));
        }
        let node = node.map_or("not run".to_owned(), |took| format!("passed, {} s", took.as_secs()));
        table.push_str(&format!("| real brokers and disks (`--node`, full counts) | {node} |\n"));
        table
    }
}
