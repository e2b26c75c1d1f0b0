//! Journals whose segments were published and removed.

use std::{fs, path::Path};

use tempfile::TempDir;
use weir_common::{
    event::{Kind, Predecessor},
    merkle::Tree,
    removed::{REMOVED_FILE, Removed},
    segment::SegmentReader,
};

use super::Journal;
use crate::{
    events::{Lines, follow, list},
    fixture::{Writer, one_session},
    verify::{Findings, Options, Report, verify},
};

fn found(findings: &Findings) -> String {
    findings.listed.iter().map(|finding| finding.what.clone()).collect::<Vec<_>>().join("\n")
}

fn verified(directory: &Path) -> Report {
    verify(&Journal::open(directory).unwrap(), &Options::default()).unwrap()
}

/// The tree over the first segment of `one_session`, and what its `removed` says.
fn record(journal: &Journal) -> Removed {
    let mut tree = Tree::new();
    let bytes = fs::read(&journal.segments[0]).unwrap();
    for located in SegmentReader::new(&bytes, None).unwrap() {
        let frame = located.unwrap().frame;
        if frame.frame_type == weir_common::frame::FrameType::Event {
            tree.push(frame.leaf_hash);
        }
    }
    Removed { epoch: uuid::Uuid::from_u128(1), first_segment: 1, tree }
}

/// `one_session` with its first segment published; it is unlinked if `unlink`.
fn removed(unlink: bool) -> (TempDir, Writer, Removed) {
    let (directory, writer) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let removed = record(&journal);
    fs::write(journal.epochs[0].directory.join(REMOVED_FILE), removed.encode()).unwrap();
    if unlink {
        fs::remove_file(&journal.segments[0]).unwrap();
    }
    (directory, writer, removed)
}

#[test]
fn a_journal_goes_on_behind_what_was_published_and_removed() {
    let (whole, _) = one_session();
    let root = verified(whole.path()).epochs[0].root.clone();
    // The record is there before the segment goes: a crash leaves both.
    for unlink in [false, true] {
        let (directory, writer, removed) = removed(unlink);
        let report = verified(directory.path());
        assert!(report.is_sound(), "{report:#?}");
        let epoch = &report.epochs[0];
        assert_eq!((epoch.removed, epoch.end, &epoch.root), (removed.tree.size(), writer.sequence, &root));
        assert_eq!((epoch.covered, epoch.segments), (writer.sequence, 1));
        let note =
            format!("the first {} events were published and removed: the topic has them", epoch.removed);
        assert!(found(&report.notes).contains(&note), "{report:#?}");
        let mut out = Vec::new();
        crate::verify::print(&mut out, crate::terminal::Style::PLAIN, &report).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("ok what is left in ") && out.contains("not here any more"), "{out}");
    }
}

#[test]
fn readers_say_that_the_journal_is_not_the_whole_record() {
    let (directory, writer, removed) = removed(true);
    let journal = Journal::open(directory.path()).unwrap();
    let mut out = Vec::new();
    list(&journal, Lines::new(&mut out, false, None)).unwrap();
    let lines = out.iter().filter(|byte| **byte == b'\n').count() as u64;
    assert_eq!(lines, writer.sequence - removed.tree.size());
    let (warnings, more) = journal.warnings();
    let text = format!(
        "{} events of this journal were published and removed: the topic has them",
        removed.tree.size()
    );
    assert_eq!((warnings, more), (vec![text], 0));
}

#[test]
fn a_record_that_is_wrong_is_damage() {
    let (directory, _, removed) = removed(true);
    let folder = directory.path().join(uuid::Uuid::from_u128(1).to_string());
    let write = |bytes: &[u8]| fs::write(folder.join(REMOVED_FILE), bytes).unwrap();
    let mut other = Tree::new();
    (0..removed.tree.size()).for_each(|_| other.push([7; 32]));
    let mut shorter = Tree::new();
    (1..removed.tree.size()).for_each(|_| shorter.push([7; 32]));
    let mut cut = removed.encode();
    cut.pop();
    let cases = [
        (Removed { tree: other, ..removed.clone() }.encode(), "an event before it was changed"),
        (Removed { tree: shorter, ..removed.clone() }.encode(), "is missing: a segment was removed"),
        (Removed { epoch: uuid::Uuid::from_u128(9), ..removed.clone() }.encode(), "is that of epoch"),
        (cut, "account of removed segments"),
    ];
    for (bytes, expected) in cases {
        write(&bytes);
        let report = verified(directory.path());
        assert!(found(&report.damage).contains(expected), "{expected}: {report:#?}");
    }
    fs::remove_file(folder.join(REMOVED_FILE)).unwrap();
    assert!(found(&verified(directory.path()).damage).contains("events are missing: a segment was removed"));
}

#[test]
fn an_epoch_of_which_nothing_is_left_still_answers_for_its_root() {
    let (directory, writer) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let folder = &journal.epochs[0].directory;
    let record = Removed { epoch: writer.epoch, first_segment: 2, tree: writer.tree.clone() };
    fs::write(folder.join(REMOVED_FILE), record.encode()).unwrap();
    journal.segments.iter().for_each(|path| fs::remove_file(path).unwrap());
    let report = verified(directory.path());
    assert!(report.is_sound(), "{report:#?}");
    let epoch = &report.epochs[0];
    assert_eq!((epoch.removed, epoch.covered, epoch.segments), (writer.sequence, writer.sequence, 0));
    let predecessor = |root: String, size| Kind::AgentStarted {
        version: "0.1.0".into(),
        predecessor: Some(Predecessor { epoch: writer.epoch.to_string(), size, root }),
    };
    let root = hex::encode(writer.tree.root());
    for (kind, expected) in [
        (predecessor(root.clone(), 21), None),
        (predecessor("00".repeat(32), 21), Some("is not the one that epoch")),
        (predecessor(root, 22), Some("was cut")),
    ] {
        Writer::new(2, 7).event("", "", "", kind).save(directory.path(), 0);
        let report = verified(directory.path());
        assert_eq!(report.is_sound(), expected.is_none(), "{report:#?}");
        assert!(expected.is_none_or(|text| found(&report.damage).contains(text)), "{report:#?}");
    }
    // Its checkpoint is held against the record.
    let other = Removed { tree: Tree::from_peaks(21, vec![[7; 32]; 3]).unwrap(), ..record };
    fs::write(folder.join(REMOVED_FILE), other.encode()).unwrap();
    assert!(
        found(&verified(directory.path()).damage).contains("is not the one in the epoch's file `checkpoint`")
    );
}

#[test]
fn a_kept_checkpoint_is_compared_as_far_as_the_journal_goes() {
    let (directory, writer, removed) = removed(true);
    let kept = directory.path().join("kept.txt");
    let options = Options { checkpoint: Some(&kept), ..Options::default() };
    let journal = Journal::open(directory.path()).unwrap();
    fs::write(&kept, writer.note()).unwrap();
    let report = verify(&journal, &options).unwrap();
    assert!(report.is_sound() && report.checkpoint.unwrap().contains("are as they were"));
    // An older one covers what is gone.
    let mut older = Writer::new(1, 7);
    older.started();
    assert!(older.sequence < removed.tree.size());
    fs::write(&kept, older.note()).unwrap();
    let report = verify(&journal, &options).unwrap();
    assert!(found(&report.damage).contains("cannot be compared"), "{report:#?}");
    assert!(verify(&journal, &Options { partial: true, ..options }).unwrap().is_sound());
}

#[test]
fn a_followed_journal_is_not_led_astray_by_segments_that_go() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started().rotate(directory.path()).session("s1", "u").rotate(directory.path());
    writer.session("s2", "u").save(directory.path(), 64);
    let journal = Journal::open(directory.path()).unwrap();
    let (mut out, mut looks) = (Vec::new(), 0);
    let mut wait = || {
        looks += 1;
        let folder = &journal.epochs[0].directory;
        match looks {
            1 => {
                let mut record = record(&journal);
                record.first_segment = 1;
                fs::write(folder.join(REMOVED_FILE), record.encode()).unwrap();
                fs::remove_file(&journal.segments[0]).unwrap();
                writer
                    .session("s3", "u")
                    .rotate(directory.path())
                    .session("s4", "u")
                    .save(directory.path(), 0);
            }
            2 => fs::remove_file(&journal.segments[1]).unwrap(),
            3 => writer.session("s5", "u").save(directory.path(), 0),
            _ => return false,
        }
        true
    };
    follow(&journal, Lines::new(&mut out, false, None), &mut wait).unwrap();
    let text = String::from_utf8(out).unwrap();
    let sequences: Vec<u64> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["sequence"].as_u64().unwrap())
        .collect();
    assert_eq!(sequences, [0, 1, 2, 3, 4, 5]);
}
