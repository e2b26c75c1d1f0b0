//! Verification against every kind of damage that a file can take, and against a log that was cut.

use std::{fs, path::Path};

use tempfile::TempDir;
use weir_common::{
    event::{Kind, Predecessor},
    frame::{self, Frame, FrameHeader, FrameType},
    segment::SEGMENT_HEADER_BYTES,
};

use super::{KeySource, Options, Report, VerifyError, verify};
use crate::{
    events::{Lines, list},
    fixture::{SESSION, Writer, one_session, request, signer},
    source::Journal,
};

fn verified(directory: &Path) -> Report {
    verify(&Journal::open(directory).unwrap(), &Options::default()).unwrap()
}

fn damage(report: &Report) -> String {
    report.damage.listed.iter().map(|finding| format!("{finding:?}")).collect::<Vec<_>>().join("\n")
}

/// A small epoch that ended in order: `(directory, path of its only segment, its length without unused space)`.
fn small() -> (TempDir, std::path::PathBuf, usize) {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    let ids = [SESSION, "i1", "r1"];
    writer.started().commit().session(SESSION, "u").commit();
    writer.open(ids, request("GET", "list", "/api/v1/pods", "")).commit().close(ids, 200, 5).commit();
    writer.checkpoint().commit().stopped().checkpoint().save(directory.path(), 256);
    let path = directory.path().join(writer.epoch.to_string()).join("00000000000000000000.seg");
    (directory, path, writer.length())
}

#[test]
fn a_whole_journal_is_sound() {
    let (directory, path, _) = small();
    let report = verified(directory.path());
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(report.key_source, KeySource::Journal);
    let epoch = &report.epochs[0];
    assert_eq!((epoch.events, epoch.covered, epoch.checkpoints, epoch.stopped), (5, 5, 2, true));
    assert_eq!((report.notes.number(), report.gaps.number()), (0, 0));
    assert!(verified(path.parent().unwrap()).is_sound());
}

#[test]
fn a_journal_that_is_being_written_is_sound_and_says_what_is_open() {
    let (directory, _) = one_session();
    let report = verified(directory.path());
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!((report.epochs[0].open_requests, report.epochs[0].segments), (1, 2));
    assert!(report.notes.listed.iter().any(|note| note.what == "request req-create has no end on record"));
}

/// Journals are kept for years: what this version writes, byte by byte, is what later ones must read. The copy is also verified in emulation
/// of other architectures (`cargo xtask dist`).
#[test]
fn a_journal_of_this_format_is_golden() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/journal");
    let (directory, writer) = one_session();
    let epoch = writer.epoch.to_string();
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        let _ = fs::remove_dir_all(&golden);
        fs::create_dir_all(golden.join(&epoch)).unwrap();
        for entry in fs::read_dir(directory.path().join(&epoch)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), golden.join(&epoch).join(entry.file_name())).unwrap();
        }
    }
    let files = |journal: &Path| -> std::collections::BTreeMap<_, _> {
        let entries = fs::read_dir(journal.join(&epoch)).unwrap().map(Result::unwrap);
        entries.map(|entry| (entry.file_name(), fs::read(entry.path()).unwrap())).collect()
    };
    assert!(
        files(directory.path()) == files(&golden),
        "the format has changed; see docs/recording-format.md"
    );
    assert!(verified(&golden).is_sound());
}

#[test]
fn every_flipped_byte_is_found() {
    let (directory, path, length) = small();
    let good = fs::read(&path).unwrap();
    let last_commit = frames(&good)[5].start;
    for offset in 0..good.len() {
        let mut bad = good.clone();
        bad[offset] ^= 0x41;
        fs::write(&path, &bad).unwrap();
        let report = verified(directory.path());
        // A flip in the last group commit could also be what a crash left: it is named, not judged.
        let named =
            report.notes.listed.iter().any(|note| note.what.contains("torn tail") && note.offset.is_some());
        assert!(!report.is_sound() || named, "offset {offset} of {length}: {report:#?}");
        assert!(!report.is_sound() || offset >= last_commit, "offset {offset} is in an acknowledged commit");
        assert!(!report.is_sound() || offset < length, "garbage behind the end of the epoch at {offset}");
    }
}

fn frames(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (mut list, mut offset) = (Vec::new(), SEGMENT_HEADER_BYTES);
    while let Ok(header) = FrameHeader::decode(&bytes[offset..]) {
        list.push(offset..offset + header.frame_bytes());
        offset += header.frame_bytes();
    }
    list
}

#[test]
fn a_missing_frame_and_swapped_frames_are_found() {
    let (directory, path, _) = small();
    let good = fs::read(&path).unwrap();
    let frames = frames(&good);
    assert_eq!(frames.len(), 7);
    // The last is a checkpoint: to lose it cuts the tail, which only a kept checkpoint shows.
    for (number, frame) in frames[..6].iter().enumerate() {
        let bad = [&good[..frame.start], &good[frame.end..]].concat();
        fs::write(&path, &bad).unwrap();
        let report = verified(directory.path());
        // Frame 4 is a checkpoint that a later one covers, too: nothing of the log is lost.
        assert_eq!(report.is_sound(), number == 4, "frame {number}: {report:#?}");
    }
    for pair in frames.windows(2).take(5) {
        let (a, b) = (&good[pair[0].clone()], &good[pair[1].clone()]);
        let bad = [&good[..pair[0].start], b, a, &good[pair[1].end..]].concat();
        fs::write(&path, &bad).unwrap();
        let report = verified(directory.path());
        assert!(!report.is_sound(), "{pair:?} {report:#?}");
        assert!(report.damage.listed[0].offset.is_some(), "{}", damage(&report));
    }
}

#[test]
fn a_cut_tail_is_found_by_a_checkpoint() {
    let (directory, writer) = one_session();
    let kept = directory.path().join("kept.txt");
    fs::write(&kept, writer.note()).unwrap();
    let options = Options { checkpoint: Some(&kept), ..Options::default() };
    let journal = Journal::open(directory.path()).unwrap();
    let report = verify(&journal, &options).unwrap();
    assert!(report.is_sound(), "{report:#?}");
    assert!(report.checkpoint.unwrap().contains("are as they were"));

    let bytes = fs::read(&journal.segments[0]).unwrap();
    let first = frames(&bytes).into_iter().find_map(|range| match frame::decode(&bytes[range]).unwrap().0 {
        Frame { frame_type: FrameType::Checkpoint, value, .. } => Some(value),
        _ => None,
    });
    let older = first.unwrap();
    let segment = journal.segments.last().unwrap();
    let bytes = fs::read(segment).unwrap();
    let frames = frames(&bytes);
    fs::write(segment, &bytes[..frames[frames.len() - 3].start]).unwrap();
    assert!(damage(&verified(directory.path())).contains("its file `checkpoint` covers 21 events"));
    // Whoever cuts the tail can put an older checkpoint beside it.
    fs::write(journal.epochs[0].directory.join("checkpoint"), older).unwrap();
    assert!(verified(directory.path()).is_sound());
    let report = verify(&journal, &options).unwrap();
    assert!(
        damage(&report).contains("was cut: the kept checkpoint covers 21 events, the journal holds 19"),
        "{}",
        damage(&report)
    );

    fs::remove_dir_all(&journal.epochs[0].directory).unwrap();
    Writer::new(2, 7).started().save(directory.path(), 0);
    let report = verify(&Journal::open(directory.path()).unwrap(), &options).unwrap();
    assert!(damage(&report).contains("is not in this journal"), "{}", damage(&report));
}

#[test]
fn a_rewritten_log_is_found_by_key_or_kept_checkpoint() {
    let (original, writer) = one_session();
    let (kept, key) = (original.path().join("kept.txt"), original.path().join("key.txt"));
    fs::write(&kept, writer.note()).unwrap();
    fs::write(&key, format!("# node-1\n{}\n", signer(7).verifier())).unwrap();
    // Someone rewrites the epoch from its start, with a key of their own beside it.
    let forged = tempfile::tempdir().unwrap();
    let mut forger = Writer::new(1, 8);
    forger.started();
    (0..30).for_each(|_| {
        forger.session(SESSION, "someone else");
    });
    forger.checkpoint().save(forged.path(), 0);
    let journal = Journal::open(forged.path()).unwrap();
    assert!(verify(&journal, &Options::default()).unwrap().is_sound());
    let report =
        verify(&journal, &Options { keys: std::slice::from_ref(&key), ..Options::default() }).unwrap();
    assert_eq!(report.key_source, KeySource::Given);
    assert!(damage(&report).contains("no signature by key"), "{}", damage(&report));
    let report = verify(
        &journal,
        &Options { keys: std::slice::from_ref(&key), checkpoint: Some(&kept), ..Options::default() },
    )
    .unwrap();
    assert!(damage(&report).contains("are not those that the kept checkpoint covers"), "{}", damage(&report));
    let unknown = verify(&journal, &Options { checkpoint: Some(&kept), ..Options::default() });
    assert!(matches!(unknown, Err(VerifyError::Unsigned { .. })));
}

#[test]
fn missing_segments_and_epochs_are_found() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    fs::remove_file(&journal.segments[0]).unwrap();
    let report = verified(directory.path());
    assert!(damage(&report).contains("events are missing: a segment was removed"), "{}", damage(&report));

    // A number without a segment, or with an unmade one, is none that is missing.
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let unmade = journal.epochs[0].directory.join("00000000000000000003.seg");
    fs::write(&unmade, [0; 100]).unwrap();
    let report = verified(directory.path());
    assert!(
        report.is_sound() && report.notes.listed.iter().any(|note| note.file == unmade.display().to_string())
    );
    // One that was emptied is.
    fs::write(&journal.segments[0], []).unwrap();
    assert!(!verified(directory.path()).is_sound());

    let (directory, first) = one_session();
    let predecessor =
        Predecessor { epoch: first.epoch.to_string(), size: 21, root: hex::encode(first.tree.root()) };
    let started =
        |predecessor| Kind::AgentStarted { version: "0.1.0".into(), predecessor: Some(predecessor) };
    Writer::new(2, 7).event("", "", "", started(predecessor.clone())).save(directory.path(), 0);
    assert!(verified(directory.path()).is_sound());
    let wrong = Predecessor { root: "00".repeat(32), ..predecessor.clone() };
    Writer::new(2, 7).event("", "", "", started(wrong)).save(directory.path(), 0);
    assert!(damage(&verified(directory.path())).contains("is not the one that epoch"));
    let longer = Predecessor { size: 22, ..predecessor };
    Writer::new(2, 7).event("", "", "", started(longer)).save(directory.path(), 0);
    assert!(damage(&verified(directory.path())).contains("was cut"));
    fs::remove_dir_all(directory.path().join(first.epoch.to_string())).unwrap();
    assert!(damage(&verified(directory.path())).contains("is missing"));
}

#[test]
fn a_torn_tail_is_named_and_no_damage_while_the_epoch_goes_on() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let segment = journal.segments.last().unwrap();
    let bytes = fs::read(segment).unwrap();
    let end = frames(&bytes).last().unwrap().end;
    for garbage in [&b"WFr1 half a header"[..], b"\x01"] {
        fs::write(segment, [&bytes[..end], garbage].concat()).unwrap();
        let report = verified(directory.path());
        assert!(report.is_sound(), "{report:#?}");
        let torn = |note: &super::Finding| note.what.contains("torn tail") && note.offset == Some(end as u64);
        assert!(report.notes.listed.iter().any(torn), "{report:#?}");
    }
}

#[test]
fn a_torn_tail_amid_an_epoch_is_no_damage_where_the_next_segment_has_all_that_follows() {
    let (directory, _) = one_session();
    let journal = Journal::open(directory.path()).unwrap();
    let segment = &journal.segments[0];
    let bytes = fs::read(segment).unwrap();
    let frames = frames(&bytes);
    let (last, end) = (frames.last().unwrap().clone(), frames.last().unwrap().end);
    // A group that failed, as a disk leaves it: the next segment has it.
    fs::write(segment, [&bytes[..end], &bytes[last.start..last.end - 1]].concat()).unwrap();
    let report = verified(directory.path());
    let torn = |note: &super::Finding| note.what.contains("torn tail") && note.offset == Some(end as u64);
    assert!(report.is_sound() && report.notes.listed.iter().any(torn), "{report:#?}");
    // The same of what had been acknowledged: nothing has it.
    fs::write(segment, &bytes[..end - 1]).unwrap();
    let report = verified(directory.path());
    let missing = format!(
        "segment ends at offset {} before sequence 9, but the next segment starts with 10",
        last.start
    );
    assert_eq!(report.damage.number(), 1, "{report:#?}");
    assert!(damage(&report).contains(&missing), "{}", damage(&report));
    assert_eq!(report.damage.listed[0].sequence, Some(9));
}

#[test]
fn an_envelope_that_says_other_than_its_event_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started();
    let value = serde_json::json!({
        "schema": 1, "sequence": 1, "timeUnixUs": 1, "node": "node-1", "epoch": writer.epoch, "session": "s", "type": "news",
    });
    let envelope = weir_common::envelope::Envelope {
        key: "another".into(),
        id: format!("{}/1", writer.epoch),
        event_type: "weir.v1.news".into(),
        source: format!("/weir/node-1/{}", writer.epoch),
        time_unix_us: 1,
        ..Default::default()
    };
    writer.frame(FrameType::Event, &envelope, value.to_string().as_bytes());
    writer.checkpoint().save(directory.path(), 0);
    let report = verified(directory.path());
    assert_eq!(report.damage.number(), 1, "{report:#?}");
    assert!(damage(&report).contains("key of the envelope is not the event's session"));
}

/// Two epochs of one node; the second one's key is `seed`.
fn two_epochs(seed: u8) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    Writer::new(1, 7).started().checkpoint().save(directory.path(), 0);
    let mut second = Writer::new(2, seed);
    second.started();
    if seed == 7 {
        second.checkpoint();
    }
    second.save(directory.path(), 0);
    directory
}

#[test]
fn an_epoch_that_no_given_key_signed_is_damage_and_keys_may_be_several_or_pem() {
    let keys = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = keys.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let (mine, other) = (signer(7).verifier().to_string(), signer(8).verifier().to_string());
    let (mine, other) = (file("mine", &mine), file("other", &other));
    let with = |directory: &TempDir, keys: &[std::path::PathBuf]| {
        verify(&Journal::open(directory.path()).unwrap(), &Options { keys, ..Options::default() }).unwrap()
    };
    let (whole, forged) = (two_epochs(7), two_epochs(9));
    assert!(with(&whole, std::slice::from_ref(&mine)).is_sound());
    assert!(with(&whole, &[other.clone(), mine.clone()]).is_sound());
    assert!(verified(forged.path()).is_sound(), "its key lies beside it");
    fs::remove_file(forged.path().join(uuid::Uuid::from_u128(2).to_string()).join("checkpoint")).unwrap();
    let report = with(&forged, &[mine]);
    assert!(damage(&report).contains("no checkpoint of this epoch is signed by a given key"), "{report:#?}");
    assert!(!with(&whole, &[other]).is_sound());
    // The public half of the key that the signer of seed 7 has.
    let pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA6kpsY+KcUgq+9VB7Ey7F+ZVHdq6+vnuSQh7qaRRG0iw=\n-----END PUBLIC KEY-----\n";
    let report = with(&whole, &[file("key.pem", pem)]);
    assert_eq!((report.is_sound(), report.key_source), (true, KeySource::Given), "{report:#?}");
}

#[test]
fn a_note_with_the_signatures_of_two_keys_verifies_with_either() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started();
    let note = weir_common::checkpoint::Checkpoint::of(
        &format!("weir/node-1/{}", writer.epoch),
        &writer.tree,
        crate::fixture::START_US,
    )
    .sign(&[signer(8), signer(7)]);
    let (size, time) = (writer.sequence, crate::fixture::START_US);
    let envelope =
        weir_common::envelope::Envelope::of_checkpoint("node-1", &writer.epoch.to_string(), size, time);
    writer.frame(FrameType::Checkpoint, &envelope, note.as_bytes()).save(directory.path(), 0);
    fs::write(directory.path().join(writer.epoch.to_string()).join("checkpoint"), note).unwrap();
    for seed in [7, 8] {
        let key = directory.path().join("key");
        fs::write(&key, signer(seed).verifier().to_string()).unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let options = Options { keys: std::slice::from_ref(&key), ..Options::default() };
        assert!(verify(&journal, &options).unwrap().is_sound());
    }
}

#[test]
fn the_key_of_one_node_vouches_for_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started();
    // The log is of node-1.
    let other = weir_common::checkpoint::NoteSigner::from_seed("weir/node-2", &[9; 32]).unwrap();
    let origin = format!("weir/node-1/{}", writer.epoch);
    let checkpoint = weir_common::checkpoint::Checkpoint::of(&origin, &writer.tree, crate::fixture::START_US);
    let (size, time) = (writer.sequence, crate::fixture::START_US);
    let envelope =
        weir_common::envelope::Envelope::of_checkpoint("node-1", &writer.epoch.to_string(), size, time);
    let keys = [other.verifier().to_string(), signer(7).verifier().to_string()];
    let note = checkpoint.sign(&[other, signer(7)]);
    writer.frame(FrameType::Checkpoint, &envelope, note.as_bytes()).save(directory.path(), 0);
    let with = |keys: &str| {
        let key = directory.path().join("key");
        fs::write(&key, keys).unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let options = Options { keys: std::slice::from_ref(&key), ..Options::default() };
        verify(&journal, &options).unwrap()
    };
    let report = with(&keys[0]);
    let named = format!("vouches for the logs of its own node, not for {origin}");
    assert!(!report.is_sound() && damage(&report).contains(&named), "{report:#?}");
    assert!(with(&keys[1]).is_sound() && with(&keys.join("\n")).is_sound());
}

#[test]
fn silence_up_to_the_checkpoint_file_is_proven_and_a_time_without_any_word_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started().checkpoint().after_ms(59_000).checkpoint().after_ms(200_000).session(SESSION, "u");
    writer.checkpoint().save(directory.path(), 0);
    // The agent is idle: only the file is replaced.
    writer.after_ms(120_000);
    fs::write(directory.path().join(writer.epoch.to_string()).join("checkpoint"), writer.note()).unwrap();
    let report = verified(directory.path());
    assert!(report.is_sound(), "{report:#?}");
    let epoch = &report.epochs[0];
    assert_eq!((epoch.silences.number, epoch.silences.seconds), (1, 120), "{report:#?}");
    assert_eq!(epoch.last_signed.as_deref(), Some("2026-01-31T12:06:19.000Z"));
    let wordless =
        "nobody vouches that the agent ran between 2026-01-31T12:00:59.000Z and 2026-01-31T12:04:19.000Z";
    assert!(report.notes.listed.iter().any(|note| note.what.contains(wordless)), "{report:#?}");
    // An idle checkpoint over a log that was cut before it.
    let segment = directory.path().join(writer.epoch.to_string()).join("00000000000000000000.seg");
    let bytes = fs::read(&segment).unwrap();
    fs::write(&segment, &bytes[..frames(&bytes)[3].start]).unwrap();
    assert!(damage(&verified(directory.path())).contains("its file `checkpoint` covers 2 events"));
}

#[test]
fn a_clock_that_is_set_by_a_day_damages_nothing_and_what_nobody_vouches_for_is_named() {
    const DAY_MS: i64 = 86_400_000;
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    let ids = |request: &'static str| [SESSION, "i1", request];
    let get = || request("GET", "list", "/api/v1/pods", "");
    writer.started().session(SESSION, "u").checkpoint().commit();
    writer.after_ms(DAY_MS).open(ids("r1"), get()).checkpoint().commit();
    writer.after_ms(-2 * DAY_MS).close(ids("r1"), 200, 5).checkpoint().commit();
    writer.after_ms(DAY_MS).open(ids("r2"), get()).close(ids("r2"), 200, 5).commit();
    writer.stopped().checkpoint().save(directory.path(), 256);
    let report = verified(directory.path());
    assert!(report.is_sound() && report.epochs[0].silences.number == 0, "{report:#?}");
    let wordless =
        |note: &&super::Finding| note.what.starts_with("nobody vouches that the agent ran between");
    assert_eq!(report.notes.listed.iter().filter(wordless).count(), 2, "both times forward: {report:#?}");
    // Numbers say what came after what, not times.
    let journal = Journal::open(directory.path()).unwrap();
    let mut printed = Vec::new();
    list(&journal, Lines::new(&mut printed, false, None)).unwrap();
    let lines = String::from_utf8(printed).unwrap();
    let sequences: Vec<_> =
        (0..writer.sequence).map(|sequence| format!("{{\"schema\":1,\"sequence\":{sequence},")).collect();
    let are_in_order = lines.lines().zip(&sequences).all(|(line, begin)| line.starts_with(begin));
    assert!(are_in_order && lines.lines().count() == sequences.len(), "{lines}");
}

#[test]
fn a_checkpoint_whose_envelope_has_another_time_is_damage() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(1, 7);
    writer.started();
    let (note, epoch) = (writer.note(), writer.epoch.to_string());
    let envelope = weir_common::envelope::Envelope::of_checkpoint("node-1", &epoch, 1, 5);
    writer.frame(FrameType::Checkpoint, &envelope, note.as_bytes()).save(directory.path(), 0);
    assert!(damage(&verified(directory.path())).contains("its envelope says other"));
}

#[test]
fn while_keys_are_changed_each_run_verifies_by_a_key_that_signed_it() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (directory.path().join("old.pub"), directory.path().join("new.pub"));
    fs::write(&old, signer(7).verifier().to_string()).unwrap();
    fs::write(&new, signer(8).verifier().to_string()).unwrap();
    let journal = directory.path().join("journal");
    let mut predecessor = None;
    for (run, seeds) in [(1, &[7_u8][..]), (2, &[8, 7]), (3, &[8])] {
        let mut writer = Writer::new(run, 7);
        let started = Kind::AgentStarted { version: "0.1.0".into(), predecessor: predecessor.take() };
        writer.signed_by(seeds).event("", "", "", started).checkpoint().commit();
        writer.session(SESSION, "u").stopped().checkpoint().save(&journal, 0);
        let root = hex::encode(writer.tree.root());
        predecessor = Some(Predecessor { epoch: writer.epoch.to_string(), size: 3, root });
    }
    let whole = Journal::open(&journal).unwrap();
    let by = |keys: &[std::path::PathBuf]| verify(&whole, &Options { keys, ..Options::default() }).unwrap();
    let runs_of = |report: &Report| {
        let is_proven = |epoch: &&super::EpochReport| epoch.covered == epoch.events;
        report.epochs.iter().filter(is_proven).map(|epoch| epoch.epoch[35..].to_owned()).collect::<String>()
    };
    let both = by(&[old.clone(), new.clone()]);
    assert!(both.is_sound(), "{both:#?}");
    assert_eq!(runs_of(&both), "123");
    // Who has one key alone has what it signed, and is told of each run that it did not sign.
    for (key, proven, foreign) in [(&old, "12", 3_u128), (&new, "23", 1)] {
        let report = by(std::slice::from_ref(key));
        assert_eq!(runs_of(&report), proven, "{report:#?}");
        let foreign = uuid::Uuid::from_u128(foreign).to_string();
        assert_eq!(report.damage.number(), 3, "both checkpoints of its log, and the file: {report:#?}");
        assert!(report.damage.listed.iter().all(|finding| finding.file.contains(&foreign)), "{report:#?}");
        assert!(damage(&report).contains("has no signature by key"), "{}", damage(&report));
    }
    // Without any, what lies beside it: consistent, whoever wrote it.
    assert!(verified(&journal).is_sound());
}
