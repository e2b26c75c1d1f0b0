//! What `weir` answers, from a journal and from topics: the same; from a time on; and how it says how far it is.

use std::{collections::BTreeMap, process::Command};

use weir_common::event::Event;
use weir_tests::{agent, command};

use super::{kafka::weir, shown};

/// Every question has the same answer from the journal and from the topics.
#[track_caller]
pub(super) fn answers_the_same(journal: &str, topics: &str, session: &str, [before, amid]: [&str; 2]) {
    let questions: [&[&str]; 10] = [
        &["sessions"],
        &["sessions", "--json"],
        &["sessions", "--json", "--since", before],
        &["sessions", "--json", "--since", amid],
        &["events"],
        &["events", "--session", session],
        &["events", "--since", amid],
        &["events", "--until", amid],
        &["events", "--since", before, "--until", amid],
        &["replay", session],
    ];
    let answer = |question: &[&str], from: &str| {
        let (code, out, err) = shown(&weir(&[question, &["--from", from]].concat()));
        assert_eq!(code, Some(0), "{question:?} from {from}: {err}");
        // It says how to see more.
        out.replace(from, "SOURCE")
    };
    for question in questions {
        let expected = answer(question, journal);
        assert!(!expected.is_empty(), "{question:?}");
        assert_eq!(answer(question, topics), expected, "{question:?}");
    }
    // Only the later session has something at or after either time; what it did before belongs to it.
    let [all, later, still] =
        [questions[1], questions[2], questions[3]].map(|question| answer(question, topics));
    assert_eq!((all.lines().count(), later.lines().count(), &still), (2, 1, &later), "{all}{still}");
    assert!(all.contains(&later), "{all}{later}");
    begins_amid(topics, amid);
}

/// Long work says on a terminal how far it is, and on nothing else.
#[track_caller]
pub(super) fn shows_progress(from: &str) {
    let arguments = ["verify", "--from", from];
    let (code, _, err) = shown(&weir(&arguments));
    assert!(code == Some(0) && !err.contains('%'), "{err}");
    let binary = agent::built_binary("weir").unwrap();
    let line = format!("exec '{}' verify --from '{from}'", binary.display());
    let terminal = command::output(Command::new("script").args(["-qec", &line, "/dev/null"])).unwrap();
    let (code, out, err) = shown(&terminal);
    assert!(code == Some(0) && out.contains("\rverifying ") && out.contains(" %"), "{out}{err}");
}

/// From a time on and up to it: both together are all, and only what is of the very moment comes twice.
#[track_caller]
fn begins_amid(topics: &str, amid: &str) {
    let events = |more: &[&str]| -> BTreeMap<u64, i64> {
        let (code, out, err) = shown(&weir(&[&["events", "--from", topics], more].concat()));
        assert_eq!(code, Some(0), "{err}");
        let events = out.lines().map(|line| serde_json::from_str::<Event>(line).unwrap());
        events.map(|event| (event.sequence, event.time_unix_us)).collect()
    };
    let (all, later, earlier) = (events(&[]), events(&["--since", amid]), events(&["--until", amid]));
    let from = amid.parse::<jiff::Timestamp>().unwrap().as_microsecond();
    let of = |is_it: &dyn Fn(i64) -> bool| -> BTreeMap<u64, i64> {
        all.iter().filter(|(_, time)| is_it(**time)).map(|(sequence, time)| (*sequence, *time)).collect()
    };
    assert_eq!((&later, &earlier), (&of(&|time| time >= from), &of(&|time| time <= from)));
    assert!(!later.is_empty() && later.len() < all.len() / 2, "{} of {}", later.len(), all.len());
}
