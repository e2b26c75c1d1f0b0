//! Exports against every way to tamper with them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{EVENTS_FILE, ExportError, MANIFEST_FILE, PROOFS_FILE, export};
use crate::{
    fixture::{SESSION, Writer, one_session, signer},
    source::Journal,
    verify::{self, Keys, Options, Report},
};

fn exported(journal: &Path, session: &str, folder: &Path) -> Result<super::Manifest, ExportError> {
    let journal = Journal::open(journal).unwrap();
    export(&journal, session, &Keys::load(&journal, &[]).unwrap(), folder)
}

fn verified(folder: &Path) -> Report {
    verify::export::verify(folder, &Options::default()).unwrap()
}

fn found(report: &Report) -> String {
    report.damage.listed.iter().map(|finding| format!("{finding:?}\n")).collect()
}

/// `one_session` among events of others, exported: journal, parent of the export, the export.
fn sample() -> (TempDir, TempDir, PathBuf) {
    let (journal, _) = one_session();
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("out");
    let manifest = exported(journal.path(), SESSION, &folder).unwrap();
    assert_eq!((manifest.events, manifest.left_out), (20, 0));
    (journal, parent, folder)
}

#[test]
fn an_export_is_the_recorded_bytes_and_verifies_without_the_journal() {
    let (journal, parent, folder) = sample();
    let events = fs::read(folder.join(EVENTS_FILE)).unwrap();
    let mut listed = Vec::new();
    let opened = Journal::open(journal.path()).unwrap();
    crate::events::list(&opened, crate::events::Lines::new(&mut listed, false, Some(SESSION))).unwrap();
    assert_eq!(events, listed);
    drop(journal);
    let report = verified(&folder);
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!((report.epochs[0].events, report.epochs[0].covered), (20, 21));
    let key = parent.path().join("key");
    for (seed, sound) in [(7, true), (8, false)] {
        fs::write(&key, signer(seed).verifier().to_string()).unwrap();
        let options = Options { keys: std::slice::from_ref(&key), ..Options::default() };
        assert_eq!(verify::export::verify(&folder, &options).unwrap().is_sound(), sound);
    }
    let mut out = Vec::new();
    verify::print(&mut out, crate::terminal::Style::PLAIN, &report).unwrap();
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("20 events, checkpoint over 21 events signed at 2026-"), "{out}");
    assert!(out.contains("that none of the session was left out, only the log itself shows"), "{out}");
}

#[test]
fn whatever_byte_of_events_or_checkpoint_is_flipped_is_found() {
    let (_journal, _parent, folder) = sample();
    let checkpoint = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let checkpoint =
        checkpoint.into_iter().find(|path| path.extension().is_some_and(|e| e == "checkpoint")).unwrap();
    for (path, step) in [(folder.join(EVENTS_FILE), 7), (folder.join(PROOFS_FILE), 7), (checkpoint, 1)] {
        let good = fs::read(&path).unwrap();
        for offset in (0..good.len()).step_by(step) {
            let mut bad = good.clone();
            bad[offset] ^= 1;
            fs::write(&path, &bad).unwrap();
            // A file that is not text any more cannot be read at all.
            let report = verify::export::verify(&folder, &Options::default());
            assert!(
                report.is_ok_and(|report| !report.is_sound()) || std::str::from_utf8(&bad).is_err(),
                "{offset}"
            );
        }
        fs::write(&path, &good).unwrap();
    }
    assert!(verified(&folder).is_sound());
}

#[test]
fn what_is_missing_swapped_appended_or_of_another_is_named() {
    let (_journal, _parent, folder) = sample();
    let read = |name: &str| -> Vec<String> {
        fs::read_to_string(folder.join(name)).unwrap().lines().map(|line| format!("{line}\n")).collect()
    };
    let (events, proofs) = (read(EVENTS_FILE), read(PROOFS_FILE));
    let write = |events: &[String], proofs: &[String]| {
        fs::write(folder.join(EVENTS_FILE), events.concat()).unwrap();
        fs::write(folder.join(PROOFS_FILE), proofs.concat()).unwrap();
        let report = verified(&folder);
        assert!(!report.is_sound(), "{report:#?}");
        found(&report)
    };
    let without = |lines: &[String], at: usize| {
        let mut lines = lines.to_vec();
        lines.remove(at);
        lines
    };
    let missing = write(&without(&events, 5), &proofs);
    assert!(missing.contains("sequence: Some(6)") && missing.contains("event is missing"), "{missing}");
    let both = write(&without(&events, 5), &without(&proofs, 5));
    assert!(both.contains("20 were exported, 19 are here and proven"), "{both}");
    let unproven = write(&events, &without(&proofs, 5));
    assert!(unproven.contains("sequence: Some(6)") && unproven.contains("has no proof"), "{unproven}");
    let mut swapped = events.clone();
    swapped.swap(3, 4);
    let swapped = write(&swapped, &proofs);
    assert!(
        swapped.contains("line 5 stands out of order") && swapped.contains("sequence: Some(4)"),
        "{swapped}"
    );
    let mut appended = events.clone();
    appended.push(events[19].replace("\"sequence\":20", "\"sequence\":21"));
    let appended = write(&appended, &proofs);
    assert!(appended.contains("sequence: Some(21)") && appended.contains("has no proof"), "{appended}");
    let mut cut = events.clone();
    cut[19].truncate(30);
    assert!(write(&cut, &proofs).contains("line 20 is cut"));
    let mut changed = events.clone();
    changed[1] = changed[1].replace("kubectl", "kubectk");
    let changed = write(&changed, &proofs);
    assert!(changed.contains("sequence: Some(2)") && changed.contains("was changed"), "{changed}");
    // The manifest of another session.
    fs::write(folder.join(EVENTS_FILE), events.concat()).unwrap();
    fs::write(folder.join(PROOFS_FILE), proofs.concat()).unwrap();
    let manifest = fs::read_to_string(folder.join(MANIFEST_FILE)).unwrap();
    fs::write(folder.join(MANIFEST_FILE), manifest.replace(SESSION, "other")).unwrap();
    assert!(found(&verified(&folder)).contains("event belongs to another session"));
    for nonsense in
        ["", "{}", &manifest.replace("\"version\":1", "\"version\":2"), &manifest.replace("0000-", "../-")]
    {
        fs::write(folder.join(MANIFEST_FILE), nonsense).unwrap();
        assert!(verify::export::verify(&folder, &Options::default()).is_err(), "{nonsense}");
    }
}

#[test]
fn what_no_checkpoint_covers_is_left_out_and_said_and_a_damaged_log_proves_nothing() {
    let journal = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started().commit().session(SESSION, "u").commit().checkpoint().commit().session(SESSION, "u");
    writer.commit().session("other", "u").save(journal.path(), 64);
    // The file covers all; without it the last event waits.
    let folder = journal.path().join("whole");
    assert_eq!(exported(journal.path(), SESSION, &folder).unwrap().events, 2);
    fs::remove_dir_all(&folder).unwrap();
    let epoch = journal.path().join(writer.epoch.to_string());
    fs::remove_file(epoch.join("checkpoint")).unwrap();
    let folder = journal.path().join("part");
    let manifest = exported(journal.path(), SESSION, &folder).unwrap();
    assert_eq!((manifest.events, manifest.left_out), (1, 1));
    let report = verified(&folder);
    assert!(
        report.is_sound()
            && report.notes.listed.iter().any(|note| note.what.contains("1 event of the session"))
    );
    fs::remove_dir_all(&folder).unwrap();
    let refused = exported(journal.path(), "nobody", &folder).unwrap_err();
    assert!(matches!(refused, ExportError::Unknown { .. }), "{refused}");
    let taken = exported(journal.path(), SESSION, &epoch).unwrap_err();
    assert!(matches!(taken, ExportError::Output { .. }), "{taken}");
    let segment = epoch.join("00000000000000000000.seg");
    let mut bytes = fs::read(&segment).unwrap();
    bytes[700] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let refused = exported(journal.path(), SESSION, &folder);
    assert!(!folder.exists() && matches!(refused, Err(ExportError::Damaged { .. })), "{refused:?}");
}

#[test]
fn a_session_behind_segments_that_were_published_and_removed_is_proven_too() {
    let (journal, writer) = one_session();
    let opened = Journal::open(journal.path()).unwrap();
    let mut tree = weir_common::merkle::Tree::new();
    let bytes = fs::read(&opened.segments[0]).unwrap();
    for located in weir_common::segment::SegmentReader::new(&bytes, None).unwrap() {
        let frame = located.unwrap().frame;
        if frame.frame_type == weir_common::frame::FrameType::Event {
            tree.push(frame.leaf_hash);
        }
    }
    let left = writer.sequence - tree.size();
    let removed = weir_common::removed::Removed { epoch: writer.epoch, first_segment: 1, tree };
    fs::write(opened.epochs[0].directory.join("removed"), removed.encode()).unwrap();
    fs::remove_file(&opened.segments[0]).unwrap();
    let folder = journal.path().join("out");
    assert_eq!(exported(journal.path(), SESSION, &folder).unwrap().events, left);
    let report = verified(&folder);
    assert!(report.is_sound(), "{report:#?}");
    assert!(
        report.notes.listed.iter().any(|note| note.what.contains("the session's beginning is not in it"))
    );
}
