//! Goldens of every format, and what must hold of any record.

use std::collections::BTreeSet;

use expect_test::expect_file;
use proptest::prelude::*;
use serde_json::Value;
use weir_common::event::{Event, Kind};

use super::{Format, Projector, sample};

/// What a format makes of these events: the number of the event, and a line of it.
fn projected(format: Format, events: &[Event]) -> Vec<(usize, Value)> {
    let mut projector = Projector::new(format);
    let mut lines = Vec::new();
    for (number, event) in events.iter().enumerate() {
        for line in projector.take(&sample::record(event)) {
            assert!(!line.contains('\n'));
            lines.push((number, serde_json::from_str(&line).unwrap()));
        }
    }
    lines
}

fn golden(format: Format) -> String {
    let mut projector = Projector::new(format);
    let lines = sample::events().into_iter().flat_map(|event| projector.take(&sample::record(&event)));
    lines.map(|line| line + "\n").collect()
}

/// The event that a line of a format is of: `EPOCH/SEQUENCE`.
fn told_id(format: Format, line: &Value) -> String {
    match format {
        Format::Audit => {
            let said = |name: &str| line["annotations"][format!("weir.dev/{name}")].as_str().unwrap();
            format!("{}/{}", said("epoch"), said("sequence"))
        }
        Format::Ocsf => {
            let uid = line["metadata"]["uid"].as_str().unwrap();
            uid.strip_suffix("/process").unwrap_or(uid).to_owned()
        }
        Format::Ecs => line["event"]["id"].as_str().unwrap().to_owned(),
        Format::CloudEvents => line["id"].as_str().unwrap().to_owned(),
    }
}

/// When a line says that it happened.
fn told_us(format: Format, line: &Value) -> i64 {
    let micros = |text: &Value| text.as_str().unwrap().parse::<jiff::Timestamp>().unwrap().as_microsecond();
    match format {
        Format::Audit => {
            let stage = micros(&line["stageTimestamp"]);
            assert!(micros(&line["requestReceivedTimestamp"]) <= stage);
            stage
        }
        Format::Ocsf => line["time"].as_i64().unwrap() * 1000,
        Format::Ecs => micros(&line["@timestamp"]),
        Format::CloudEvents => micros(&line["time"]),
    }
}

#[test]
fn audit_events_are_golden() {
    expect_file!["../../golden/audit.jsonl"].assert_eq(&golden(Format::Audit));
}

#[test]
fn ocsf_events_are_golden() {
    expect_file!["../../golden/ocsf.jsonl"].assert_eq(&golden(Format::Ocsf));
}

#[test]
fn ecs_documents_are_golden() {
    expect_file!["../../golden/ecs.jsonl"].assert_eq(&golden(Format::Ecs));
}

/// What ECS 8.11 says of `event.category`: which types it expects with each (elastic/ecs `schemas/event.yml`).
#[test]
fn types_are_those_that_ecs_expects_with_the_categories() {
    let expected: [(&str, &[&str]); 7] = [
        (
            "api",
            &[
                "access", "admin", "allowed", "change", "creation", "deletion", "denied", "end", "info",
                "start", "user",
            ],
        ),
        ("authentication", &["start", "end", "info"]),
        ("configuration", &["access", "change", "creation", "deletion", "info"]),
        ("file", &["access", "change", "creation", "deletion", "info"]),
        ("network", &["access", "allowed", "connection", "denied", "end", "info", "protocol", "start"]),
        ("process", &["access", "change", "end", "info", "start"]),
        ("session", &["start", "end", "info"]),
    ];
    for (number, document) in projected(Format::Ecs, &sample::events()) {
        let event = &document["event"];
        let texts = |name: &str| -> Vec<String> {
            let list = event[name].as_array().cloned().unwrap_or_default();
            list.iter().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        let categories = texts("category");
        let allowed = |kind: &String| {
            let of = expected.iter().filter(|(category, _)| categories.iter().any(|one| one == category));
            of.flat_map(|(_, types)| types.iter()).any(|one| one == kind)
        };
        assert!(categories.iter().all(|one| expected.iter().any(|(category, _)| one == category)));
        assert!(texts("type").iter().all(allowed), "{number}: {event}");
        let (kind, outcome) = (event["kind"].as_str().unwrap(), event["outcome"].as_str());
        assert!(["event", "alert", "pipeline_error"].contains(&kind));
        assert!(outcome.is_none_or(|outcome| ["success", "failure", "unknown"].contains(&outcome)));
    }
}

#[test]
fn cloudevents_are_golden_and_hold_the_recorded_bytes() {
    let text = golden(Format::CloudEvents);
    expect_file!["../../golden/cloudevents.jsonl"].assert_eq(&text);
    let mut sealed = sample::record(&sample::events()[1]);
    (sealed.envelope.flags, sealed.envelope.key_id) = (1, 7);
    let lines = Projector::new(Format::CloudEvents).take(&sealed);
    let line: Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!((line["weirflags"].as_str(), line["weirkeyid"].as_str()), (Some("1"), Some("7")));
    assert!(lines[0].contains(std::str::from_utf8(&sealed.value).unwrap()));
}

#[test]
fn the_sample_has_every_kind() {
    let kinds: BTreeSet<&str> = sample::events().iter().map(|event| event.kind.name()).collect();
    assert_eq!(kinds.len(), 18, "{kinds:?}");
}

/// Rows of the table in `docs/schema.md`: what becomes of each kind.
#[test]
fn what_becomes_of_each_kind_is_documented_as_it_is() {
    let document = include_str!("../../../docs/schema.md");
    let events = sample::events();
    let kinds: BTreeSet<&str> = events.iter().map(|event| event.kind.name()).collect();
    for kind in kinds {
        let cells = Format::ALL.map(|format| {
            let mut projector = Projector::new(format);
            let mut made = 0;
            let of_kind = |event: &&Event| event.kind.name() == kind;
            for event in &events {
                let lines = projector.take(&sample::record(event)).len();
                made += if of_kind(&event) { lines } else { 0 };
            }
            let left_out = projector.left_out.get(kind).copied().unwrap_or_default();
            match (made, left_out) {
                (0, 0) => "in others",
                (_, 0) => "yes",
                (0, all) if all == events.iter().filter(of_kind).count() as u64 => "–",
                _ => "some",
            }
        });
        let row = format!("| `{kind}` | {} |", cells.join(" | "));
        assert!(document.contains(&row), "docs/schema.md has no row {row}");
    }
}

#[test]
fn a_line_says_what_was_not_seen_when_the_reader_came_late() {
    let mut events = sample::events();
    events.retain(|event| {
        !matches!(
            event.kind,
            Kind::SessionStarted { .. } | Kind::InvocationStarted { .. } | Kind::RequestOpened(_)
        )
    });
    for format in Format::ALL.into_iter().filter(|format| *format != Format::CloudEvents) {
        let lines = projected(format, &events);
        assert!(!lines.is_empty());
        for (number, line) in lines.iter().filter(|(number, _)| events[*number].request.is_some()) {
            assert!(line.to_string().contains("session,invocation,request"), "{number}: {line}");
        }
    }
}

/// Whoever may write to a topic can claim any time and any number.
#[test]
fn numbers_that_nobody_means_do_no_harm() {
    for (time_us, number) in [(i64::MIN, 0), (i64::MAX, u64::MAX)] {
        let mut events = sample::events();
        for event in &mut events {
            event.time_unix_us = time_us;
            match &mut event.kind {
                Kind::RequestClosed(closed) => {
                    (closed.duration_us, closed.response_bytes, closed.client_bytes) =
                        (number, number, number);
                }
                Kind::Content(content) => content.offset = number,
                Kind::FileCopied(file) => file.bytes = number,
                Kind::ConnectionForwarded(forwarded) => {
                    (forwarded.bytes_in, forwarded.bytes_out) = (number, number);
                }
                _ => {}
            }
        }
        for format in Format::ALL {
            assert!(!projected(format, &events).is_empty());
        }
    }
}

#[test]
fn what_is_no_event_is_counted_and_left_out() {
    let mut strange = sample::record(&sample::events()[0]);
    strange.value = b"{\"schema\":2,\"type\":\"somethingNew\"}".to_vec();
    let mut projector = Projector::new(Format::Audit);
    assert!(projector.take(&strange).is_empty());
    assert_eq!(projector.left_out().as_deref(), Some("events that audit has no place for: 1 unreadable"));
}

/// Any events in the order of their record: those of the sample, some left out, some of another epoch, with times that go on.
fn any_record() -> impl Strategy<Value = Vec<Event>> {
    let each = (0..4_u8, 0..3_i64, ".{0,8}", any::<bool>());
    let count = sample::events().len();
    proptest::collection::vec(each, count).prop_map(|choices| {
        let mut time_us = crate::fixture::START_US;
        let events = sample::events().into_iter().zip(choices);
        let events = events.filter_map(|(mut event, (keep, pause, text, other))| {
            time_us += pause * 1_700;
            event.time_unix_us = time_us;
            if other {
                event.epoch = "0198aaaa-0000-7000-8000-0000000000ff".into();
            }
            event.tenant = (!text.is_empty()).then(|| text.clone());
            match &mut event.kind {
                Kind::RequestOpened(opened) => opened.uri.push_str(&text),
                Kind::RequestClosed(closed) => closed.reason = Some(text),
                Kind::InvocationStarted { process, .. } => process.argv.push(text),
                _ => {}
            }
            (keep > 0).then_some(event)
        });
        events.collect()
    })
}

proptest! {
    // Each case goes through every format.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_line_leads_back_to_its_event_and_time_goes_on(events in any_record()) {
        for format in Format::ALL {
            let mut last_us = i64::MIN;
            for (number, line) in projected(format, &events) {
                let event = &events[number];
                prop_assert_eq!(told_id(format, &line), format!("{}/{}", event.epoch, event.sequence));
                let us = told_us(format, &line);
                prop_assert!(us >= last_us);
                prop_assert!(us.abs_diff(events[number].time_unix_us) < 1_000, "in milliseconds at worst");
                last_us = us;
            }
        }
    }

    /// A mask stays as it is, wherever it comes to stand.
    #[test]
    fn what_is_masked_stays_masked(digits in 0..=u64::MAX) {
        let mask = format!("weir:masked:le16:{digits:016x}");
        let recorded = serde_json::to_string(&sample::events()).unwrap().replace(sample::MASK, &mask);
        let masks = |text: &str| -> BTreeSet<String> {
            let ends = |end: char| !(end.is_ascii_alphanumeric() || end == ':');
            let found = text.match_indices("weir:masked:");
            found.map(|(start, _)| text[start..].split(ends).next().unwrap().to_owned()).collect()
        };
        let expected = masks(&recorded);
        prop_assert!(expected.contains(&mask) && expected.len() == 2);
        for format in Format::ALL {
            let events: Vec<Event> = serde_json::from_str(&recorded).unwrap();
            for (_, line) in projected(format, &events) {
                prop_assert!(masks(&line.to_string()).is_subset(&expected), "{}", line);
            }
        }
    }
}
