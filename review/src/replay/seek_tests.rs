//! Replays that begin later than their session.

use weir_common::event::Channel;

use super::{Pace, Subject, play, write_cast, write_json};
use crate::{
    fixture::{SESSION, START_US, Writer, one_session, request},
    moment::{Moment, Seek},
    source::Journal,
    terminal::Style,
};

#[test]
fn a_replay_begins_where_it_is_asked_to() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let subject = Subject::Session(SESSION.into());
    let played = |seek, pace| {
        let mut out = Vec::new();
        let played = play(&journal, &subject, pace, seek, &mut out, Style::PLAIN);
        played.map(|()| String::from_utf8(out).unwrap())
    };
    let whole = played(None, None).unwrap();
    assert_eq!(played(Some(Seek::After(0)), None).unwrap(), whole);
    // The list came and went before; the watch has gone on since, the exec begins later.
    let at = Moment(START_US + 500_000);
    let fast = Some(Pace { speed: 1e6, idle_limit: None });
    for seek in [Seek::After(500_000), Seek::At(at)] {
        for pace in [None, fast] {
            let text = played(Some(seek), pace).unwrap();
            assert!(whole.contains("list pods in web") && !text.contains("list pods in web"), "{text}");
            assert!(text.contains("[1.2]") && text.contains("pods/a/exec"), "{text}");
            assert!(text.contains("+0.618s"), "times are those since the session's start: {text}");
        }
    }
    let over = played(Some(Seek::After(3_600_000_000)), None);
    let text = over.unwrap_err().to_string();
    assert_eq!(
        text,
        "nothing is on record at or after 2026-01-31T13:00:00.000Z; it ends at 2026-01-31T12:00:01.138Z"
    );

    let mut out = Vec::new();
    write_json(&journal, &subject, Some(Seek::At(at)), &mut out, false).unwrap();
    let first = out.split(|byte| *byte == b'\n').next().unwrap();
    let first: serde_json::Value = serde_json::from_slice(first).unwrap();
    assert_eq!((first["at"].as_f64(), &first["event"]["type"]), (Some(0.618), &"invocationStarted".into()));
}

#[test]
fn a_cast_that_begins_later_has_at_once_what_came_before() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    let exec = [SESSION, "i", "exec"];
    writer.started().session(SESSION, "u").open(exec, request("POST", "create", "/x", "web"));
    writer.content(exec, Channel::Stdout, 0, b"before").after_ms(3000);
    writer.content(exec, Channel::Stdout, 6, b"after").commit().checkpoint().save(directory.path(), 64);
    let journal = Journal::open(directory.path()).unwrap();
    let path = directory.path().join("out.cast");
    let seek = Some(Seek::After(2_000_000));
    write_cast(&journal, &Subject::Session(SESSION.into()), &path, None, seek).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("\"o\"")).collect();
    assert_eq!(lines, [r#"[0.0,"o","before"]"#, r#"[1.0,"o","after"]"#]);
}
