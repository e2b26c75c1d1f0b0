//! Topics against the journal that was published to them: the same answers, and everything that can be wrong with one.

use std::{collections::BTreeMap, fs, path::Path};

use tempfile::TempDir;
use weir_common::event::Channel;

use super::{
    Journal, SourceError,
    address::Topics,
    kafka::{Broker, Sent},
    properties::Properties,
    topic::Reading,
};
use crate::{
    events::{Lines, follow, list},
    fixture::{SESSION, START_US, Writer, one_session, request},
    replay::{self, Subject},
    sessions::{self, Filter, Sessions},
    terminal::Style,
    verify::{Options, Report, VerifyError, verify},
};

const EVENTS: &str = "weir-events";
const CHECKPOINTS: &str = "weir-checkpoints";

fn read(topics: &Topics) -> Journal {
    Journal::of_topics(topics, &Properties::default(), Reading::default()).unwrap()
}

fn messages(directory: &Path) -> Vec<Sent> {
    Sent::of_journal(directory, EVENTS, CHECKPOINTS)
}

/// Publishes these messages and reads them.
fn published(list: &[Sent]) -> (Broker, Journal) {
    let broker = Broker::new(&[EVENTS, CHECKPOINTS]);
    broker.send(list);
    let journal = read(&broker.topics(&[EVENTS, CHECKPOINTS]));
    (broker, journal)
}

fn verified(journal: &Journal) -> Report {
    verify(journal, &Options::default()).unwrap()
}

fn found(findings: &crate::verify::Findings) -> String {
    let list = findings.listed.iter().map(|finding| format!("{}: {}", finding.file, finding.what));
    list.collect::<Vec<_>>().join("\n")
}

fn events(journal: &Journal) -> Vec<u8> {
    let mut out = Vec::new();
    list(journal, Lines::new(&mut out, false, None)).unwrap();
    out
}

fn listed(journal: &Journal) -> String {
    let mut sessions = Sessions::default();
    for record in journal.records() {
        sessions.add(&journal.event(&record.unwrap()).unwrap());
    }
    let (list, outside) = sessions.finish(&Filter::default());
    let mut out = Vec::new();
    sessions::print_json(&mut out, &list).unwrap();
    sessions::print(&mut out, Style::PLAIN, &list, outside).unwrap();
    String::from_utf8(out).unwrap()
}

fn replayed(journal: &Journal) -> String {
    let mut out = Vec::new();
    for subject in [Subject::Session(SESSION.into()), Subject::Request("req-watch".into())] {
        replay::play(journal, &subject, None, None, &mut out, Style::PLAIN).unwrap();
    }
    String::from_utf8(out).unwrap().replace(&journal.name(), "SOURCE")
}

/// Two epochs: one of several sessions that ended in order, one that goes on.
fn journal() -> TempDir {
    let (directory, _) = one_session();
    let mut second = Writer::new(2, 8);
    second.started().commit().after_ms(60_000);
    for (number, session) in ["a", "b", "c", "d"].into_iter().cycle().take(20).enumerate() {
        let id = format!("r{number}");
        let ids = [session, "i", id.as_str()];
        if number < 4 {
            second.session(session, "u");
        }
        second.open(ids, request("GET", "list", "/api/v1/pods", "")).close(ids, 200, 5).commit();
        if number == 10 {
            second.checkpoint().commit();
        }
    }
    second.stopped().checkpoint().save(directory.path(), 64);
    directory
}

#[test]
fn a_topic_gives_the_answers_of_its_journal() {
    let directory = journal();
    let there = Journal::open(directory.path()).unwrap();
    let (_broker, here) = published(&messages(directory.path()));
    assert_eq!(events(&here), events(&there));
    assert_eq!(listed(&here), listed(&there));
    assert_eq!(replayed(&here), replayed(&there));
    assert!(here.warnings().0.is_empty(), "{:?}", here.warnings());
    let (here, there) = (verified(&here), verified(&there));
    assert!(here.is_sound() && there.is_sound(), "{here:#?}");
    let facts = |report: &Report| -> Vec<_> {
        let epochs = report.epochs.iter();
        epochs
            .map(|e| (e.epoch.clone(), e.node.clone(), e.events, e.covered, e.root.clone(), e.stopped))
            .collect()
    };
    assert_eq!(facts(&here), facts(&there));
    assert!(here.epochs.iter().all(|epoch| epoch.root.is_some() && epoch.covered == epoch.events));
    let topic = here.topic.unwrap();
    assert_eq!((topic.partitions, topic.duplicates, topic.foreign), (6, 0, 0));
}

#[test]
fn checkpoints_on_the_same_topic_are_found_and_without_them_the_error_names_the_mend() {
    let directory = journal();
    let broker = Broker::new(&[EVENTS, CHECKPOINTS]);
    broker.send(&messages(directory.path()));
    let error = verify(&read(&broker.topics(&[EVENTS])), &Options::default()).unwrap_err();
    assert!(matches!(error, VerifyError::NoKeyOnTopic { .. }), "{error}");
    let broker = Broker::new(&[EVENTS]);
    broker.send(&Sent::of_journal(directory.path(), EVENTS, EVENTS));
    assert!(verified(&read(&broker.topics(&[EVENTS]))).is_sound());
}

#[test]
fn what_came_again_is_counted_and_shown_once() {
    let directory = journal();
    let list = messages(directory.path());
    let again: Vec<Sent> = list.iter().chain(&list[5..12]).chain(&list[7..30]).cloned().collect();
    let (_broker, here) = published(&again);
    assert_eq!(events(&here), events(&Journal::open(directory.path()).unwrap()));
    let report = verified(&here);
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(report.topic.unwrap().duplicates, 30);
}

#[test]
fn what_came_again_with_another_content_is_damage_and_both_places_are_named() {
    let directory = journal();
    let mut list = messages(directory.path());
    let mut other = list[3].clone();
    let sequence = other.id().rsplit('/').next().unwrap().to_owned();
    other.value.push(b' ');
    other.partition = 2;
    list.push(other);
    let (_broker, here) = published(&list);
    assert_eq!(events(&here), events(&Journal::open(directory.path()).unwrap()), "the first one is shown");
    let (warnings, _) = here.warnings();
    assert!(warnings[0].contains("says other than topic weir-events partition"), "{warnings:?}");
    let report = verified(&here);
    assert_eq!(report.damage.number(), 1, "{report:#?}");
    let damage = found(&report.damage);
    assert!(damage.starts_with("topic weir-events partition 2 offset "), "{damage}");
    assert!(damage.contains(&format!("event {sequence} of epoch ")), "{damage}");
}

#[test]
fn an_event_that_is_missing_is_named_by_its_sequence_and_hides_no_other() {
    let directory = journal();
    let whole = events(&Journal::open(directory.path()).unwrap());
    let lines = |out: &[u8]| out.iter().filter(|byte| **byte == b'\n').count();
    let list = messages(directory.path());
    let epoch = uuid::Uuid::from_u128(2).to_string();
    for (gone, expected) in
        [(vec![7], "event 7 is missing"), (vec![7, 8, 9], "events 7 to 9 are missing (3 events)")]
    {
        let ids: Vec<String> = gone.iter().map(|sequence| format!("{epoch}/{sequence}")).collect();
        let left: Vec<Sent> =
            list.iter().filter(|sent| !ids.iter().any(|id| id == sent.id())).cloned().collect();
        assert_eq!(left.len(), list.len() - gone.len());
        let (_broker, here) = published(&left);
        assert_eq!(lines(&events(&here)), lines(&whole) - gone.len());
        let (warnings, _) = here.warnings();
        let place = format!("{} epoch {epoch}: {expected}", here.name());
        assert_eq!(warnings, [place.as_str()]);
        let report = verified(&here);
        assert_eq!(found(&report.damage), place);
        assert_eq!(report.epochs[1].root, None);
    }
}

#[test]
fn an_event_that_was_changed_is_found_by_the_next_checkpoint() {
    let directory = journal();
    let list = messages(directory.path());
    for number in [1, 12, 40] {
        let mut changed = list.clone();
        let value = String::from_utf8(changed[number].value.clone()).unwrap();
        assert!(value.contains(r#""cluster":"prod""#), "{value}");
        changed[number].value = value.replace(r#""cluster":"prod""#, r#""cluster":"test""#).into_bytes();
        let report = verified(&published(&changed).1);
        assert!(found(&report.damage).contains("an event before it was changed"), "{number}: {report:#?}");
    }
    // A header alone is held against the value.
    let mut changed = list;
    changed[5].key = Some("another".into());
    let report = verified(&published(&changed).1);
    assert!(found(&report.damage).contains("key of the envelope is not the event's session"), "{report:#?}");
}

#[test]
fn messages_of_others_are_counted_named_and_passed_over() {
    let directory = journal();
    let mut list = messages(directory.path());
    let stranger = Sent {
        topic: EVENTS,
        partition: 1,
        key: None,
        headers: vec![("traceparent".into(), "x\u{1b}[2J".into())],
        value: b"{}".to_vec(),
    };
    list.insert(4, stranger.clone());
    list.push(Sent { headers: Vec::new(), value: Vec::new(), ..stranger });
    let (_broker, here) = published(&list);
    assert_eq!(events(&here), events(&Journal::open(directory.path()).unwrap()));
    let (warnings, _) = here.warnings();
    assert!(warnings[0].starts_with("2 messages of others were passed over, the first at topic weir-events"));
    let report = verified(&here);
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(report.topic.as_ref().unwrap().foreign, 2);
    let named = "partition 1 offset 0: not a message of Weir: header ce_specversion is missing";
    assert!(found(&report.notes).contains(named), "{}", found(&report.notes));
}

#[test]
fn a_topic_with_nothing_of_weirs_on_it_is_an_error() {
    let broker = Broker::new(&[EVENTS]);
    let error = Journal::of_topics(&broker.topics(&[EVENTS]), &Properties::default(), Reading::default());
    assert!(matches!(error, Err(SourceError::NoMessages { .. })), "{error:?}");
}

#[test]
fn a_tail_that_was_cut_is_found_by_a_checkpoint_that_was_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started().session(SESSION, "u").checkpoint().session("s2", "u").session("s3", "u").checkpoint();
    writer.save(directory.path(), 0);
    let kept = directory.path().join("kept.txt");
    fs::write(&kept, writer.note()).unwrap();
    let options = Options { checkpoint: Some(&kept), ..Options::default() };
    let list = messages(directory.path());
    let report = verify(&published(&list).1, &options).unwrap();
    assert!(report.is_sound() && report.checkpoint.unwrap().contains("are as they were"));
    // Without its last events and checkpoint the topic looks whole.
    let (_broker, here) = published(&list[..3]);
    assert!(verified(&here).is_sound());
    let report = verify(&here, &options).unwrap();
    let damage = found(&report.damage);
    assert!(damage.contains("the kept checkpoint covers 4 events, the topic holds 2 of them"), "{damage}");
}

/// More than the broker of these tests keeps of a partition (5 MiB), in one session.
fn long() -> (TempDir, Writer) {
    let mut writer = Writer::new(1, 7);
    writer.started();
    long_by(writer)
}

/// The same of an epoch that has begun.
fn long_by(mut writer: Writer) -> (TempDir, Writer) {
    let directory = tempfile::tempdir().unwrap();
    writer.session(SESSION, "u");
    let content = vec![b'x'; 256 * 1024];
    for number in 0..30_u64 {
        let ids = [SESSION, "i1", "r1"];
        writer.after_ms(1000).content(ids, Channel::ResponseBody, number * 262_144, &content);
        if number % 10 == 9 {
            writer.after_ms(70_000).checkpoint();
        }
    }
    writer.checkpoint().save(directory.path(), 0);
    (directory, writer)
}

#[test]
fn what_retention_has_removed_is_damage_unless_that_is_accepted() {
    let (directory, writer) = long();
    let kept = directory.path().join("kept.txt");
    fs::write(&kept, writer.note()).unwrap();
    let (_broker, here) = published(&messages(directory.path()));
    let topic = here.topic().unwrap();
    assert!(topic.facts().trimmed > 0, "the broker was to remove the beginning: {:?}", topic.facts());
    let report = verified(&here);
    let damage = found(&report.damage);
    assert!(damage.contains("are missing") && damage.contains("--partial accepts that"), "{damage}");
    let partial = Options { partial: true, ..Options::default() };
    let report = verify(&here, &partial).unwrap();
    assert!(report.is_sound(), "{report:#?}");
    // The first checkpoint left brings the tree that the rest is proven with.
    assert!(found(&report.notes).contains("nothing proves them; what follows is proven"), "{report:#?}");
    let epoch = &report.epochs[0];
    assert_eq!(epoch.root, Some(hex::encode(writer.tree.root())));
    assert!(epoch.unproven > 0 && epoch.unproven < 20 && epoch.covered == 32, "{epoch:#?}");
    assert_eq!((epoch.silences.number, epoch.silences.seconds), (2, 140), "{epoch:#?}");
    let mut out = Vec::new();
    crate::verify::print(&mut out, Style::PLAIN, &report).unwrap();
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("ok nothing is wrong with what is left in kafka://"), "{out}");
    assert!(out.contains("silent 2 times for 2 m 20 s in all, proven; the longest from 2026-"), "{out}");
    let report = verify(&here, &Options { checkpoint: Some(&kept), ..partial }).unwrap();
    assert!(report.checkpoint.as_deref().unwrap().contains("are as they were"), "{report:#?}");
    assert!(report.is_sound());
}

#[test]
fn a_value_that_was_changed_is_found_behind_the_first_checkpoint_that_retention_left() {
    let (directory, _) = long();
    let list = messages(directory.path());
    let changed = |end: &str| {
        let mut list = list.clone();
        let sent = list.iter_mut().find(|sent| sent.id().ends_with(end)).unwrap();
        let at = sent.value.len() - 100;
        sent.value[at] = b'y';
        let (_broker, here) = published(&list);
        assert!(here.topic().unwrap().facts().trimmed > 0);
        verify(&here, &Options { partial: true, ..Options::default() }).unwrap()
    };
    let report = changed("/28");
    assert!(found(&report.damage).contains("does not match the signed checkpoint"), "{report:#?}");
    assert!(changed("/20").is_sound(), "nothing proves what comes before the first checkpoint that is left");
}

#[test]
fn where_no_checkpoint_with_its_tree_is_left_the_root_cannot_be_computed() {
    let (directory, _) = long();
    let mut left = messages(directory.path());
    left.retain(|sent| sent.topic == EVENTS || sent.id().contains("/checkpoint/12/"));
    let (_broker, here) = published(&left);
    let report = verify(&here, &Options { partial: true, ..Options::default() }).unwrap();
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(report.epochs[0].root, None);
    assert!(found(&report.notes).contains("its root cannot be computed, as events are gone"), "{report:#?}");
    let mut out = Vec::new();
    crate::verify::print(&mut out, Style::PLAIN, &report).unwrap();
    assert!(String::from_utf8(out).unwrap().contains("root not computable: events are gone"));
}

#[test]
fn checkpoints_of_a_silence_are_all_there_and_one_that_is_said_twice_differently_is_damage() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started().checkpoint();
    for _ in 0..3 {
        writer.after_ms(60_000).checkpoint();
    }
    writer.after_ms(5_000).session(SESSION, "u").checkpoint().save(directory.path(), 0);
    let mut list = messages(directory.path());
    let again = list[2].clone();
    assert!(again.id().contains("/checkpoint/1/"), "{}", again.id());
    list.push(again.clone());
    let report = verified(&published(&list).1);
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!((report.epochs[0].checkpoints, report.topic.as_ref().unwrap().duplicates), (5, 1));
    assert_eq!(report.epochs[0].silences.seconds, 180);
    list.push(Sent { value: b"other".to_vec(), ..again });
    let report = verified(&published(&list).1);
    assert!(found(&report.damage).contains("says other than topic"), "{report:#?}");
}

#[test]
fn what_retention_cannot_have_removed_is_damage_although_a_beginning_is_accepted() {
    let (directory, _) = long();
    let list = messages(directory.path());
    // The last content but one.
    let left: Vec<Sent> = list.iter().filter(|sent| !sent.id().ends_with("/30")).cloned().collect();
    assert_eq!(left.len(), list.len() - 1);
    let (_broker, here) = published(&left);
    assert!(here.topic().unwrap().facts().trimmed > 0);
    let report = verify(&here, &Options { partial: true, ..Options::default() }).unwrap();
    assert!(found(&report.damage).ends_with("event 30 is missing"), "{report:#?}");
}

#[test]
fn an_epoch_that_began_while_its_clock_was_ahead_may_have_lost_its_beginning_to_retention() {
    const DAY_MS: i64 = 86_400_000;
    let made_ms = u64::try_from(START_US / 1000 + DAY_MS).unwrap();
    let epoch = uuid::Builder::from_unix_timestamp_millis(made_ms, &[0; 10]).into_uuid();
    let mut writer = Writer::new(epoch.as_u128(), 7);
    writer.after_ms(DAY_MS).started().checkpoint().after_ms(-DAY_MS);
    let (directory, writer) = long_by(writer);
    let list = messages(directory.path());
    let partial = Options { partial: true, ..Options::default() };
    let (_broker, here) = published(&list);
    let facts = here.topic().unwrap().facts();
    assert!(facts.trimmed > 0 && facts.horizon_us < Some(START_US + DAY_MS * 1000), "{facts:?}");
    let report = verify(&here, &partial).unwrap();
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(report.epochs[0].root, Some(hex::encode(writer.tree.root())));
    assert!(found(&verified(&here).damage).contains("--partial accepts that"));
    // What it cannot have taken is missed all the same.
    let left: Vec<Sent> = list.into_iter().filter(|sent| !sent.id().ends_with("/30")).collect();
    let (_broker, here) = published(&left);
    let report = verify(&here, &partial).unwrap();
    assert!(found(&report.damage).ends_with("event 30 is missing"), "{report:#?}");
}

#[test]
fn a_followed_topic_gives_each_event_once_in_the_order_of_what_has_come() {
    let directory = journal();
    let list = messages(directory.path());
    let broker = Broker::new(&[EVENTS, CHECKPOINTS]);
    let (first, rest) = list.split_at(9);
    broker.send(first);
    let reading = Reading { follow: true, ..Reading::default() };
    let topics = broker.topics(&[EVENTS, CHECKPOINTS]);
    let here = Journal::of_topics(&topics, &Properties::default(), reading).unwrap();
    let total = list.iter().filter(|sent| sent.topic == EVENTS).count();
    let shared = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
    struct Shared(std::rc::Rc<std::cell::RefCell<Vec<u8>>>);
    impl std::io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.borrow_mut().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut sent = false;
    let begun = std::time::Instant::now();
    let seen = std::rc::Rc::clone(&shared);
    let mut wait = || {
        if !sent {
            // Some of what was there comes again, and somebody says other than what was there.
            broker.send(&first[2..]);
            broker.send(&[Sent { value: b"{}".to_vec(), ..first[1].clone() }]);
            broker.send(rest);
            sent = true;
        }
        std::thread::park_timeout(std::time::Duration::from_millis(10));
        let lines = seen.borrow().iter().filter(|byte| **byte == b'\n').count();
        lines < total && begun.elapsed() < std::time::Duration::from_secs(60)
    };
    follow(&here, Lines::new(&mut Shared(std::rc::Rc::clone(&shared)), false, None), &mut wait).unwrap();
    let (warnings, _) = here.warnings();
    assert!(
        warnings.iter().any(|warning| warning.contains("says other than what was shown")),
        "{warnings:?}"
    );
    let out = shared.borrow().clone();
    let sorted = |out: &[u8]| {
        let mut lines: Vec<String> = String::from_utf8_lossy(out).lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&out), sorted(&events(&Journal::open(directory.path()).unwrap())));
    // What one session did stays in its order.
    let mut last: BTreeMap<(String, String), u64> = BTreeMap::new();
    for line in out.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let event: serde_json::Value = serde_json::from_slice(line).unwrap();
        let key = (event["epoch"].to_string(), event["session"].to_string());
        let sequence = event["sequence"].as_u64().unwrap();
        assert!(last.insert(key, sequence).is_none_or(|earlier| earlier < sequence), "{event}");
    }
}
