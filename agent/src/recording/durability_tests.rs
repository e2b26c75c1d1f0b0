//! Tests of the journal as a whole: group commit, limits, faults, epochs, on real files.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use http::{HeaderMap, Method};
use tempfile::TempDir;
use weir_common::{
    checkpoint::Checkpoint,
    event::{Coverage, Event, Kind, Outcome},
    frame::FrameType,
    segment::SegmentReader,
};

use super::{Recorder, RecorderOptions, RecordingError, fixture::*, segment};
use crate::storage::FileSystem;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_durable_appends_share_their_syncs() {
    const REQUESTS: usize = 40;
    let directory = TempDir::new().unwrap();
    let disk = Arc::new(TestDisk::default());
    let recorder = on(&disk, options(directory.path())).unwrap();
    let spawn_post = || {
        let recorder = recorder.clone();
        tokio::spawn(async move { post(&recorder, "{}").await.map(drop) })
    };
    // The writer's hands are full with one group…
    disk.hold(true);
    let first = spawn_post();
    let before = disk.syncs.load(Ordering::SeqCst);
    while !disk.is_holding() {
        tokio::task::yield_now().await;
    }
    // …while the others gather.
    let tasks: Vec<_> = (0..REQUESTS).map(|_| spawn_post()).chain([first]).collect();
    while recorder.inner.queue.waiting_durable() < REQUESTS {
        tokio::task::yield_now().await;
    }
    disk.hold(false);
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let syncs = disk.syncs.load(Ordering::SeqCst) - before;
    // The first group, the gathered ones, and what their ends may have added.
    assert!(syncs <= 4, "{syncs} syncs for {REQUESTS} appends");
    recorder.stop("test").await.unwrap();
    read(recorder.folder());
}

#[tokio::test]
async fn an_agent_starts_in_a_full_journal_and_records_when_there_is_room() {
    let directory = TempDir::new().unwrap();
    let old = directory.path().join("old");
    std::fs::create_dir(&old).unwrap();
    std::fs::write(old.join("0.seg"), vec![0; 16 << 20]).unwrap();
    let disk = Arc::new(TestDisk::default());
    let options = || RecorderOptions { journal_bytes_max: 16 << 20, ..options(directory.path()) };
    let recorder = on(&disk, options()).unwrap();
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(200_000));
    assert!(matches!(post(&recorder, &large).await, Err(RecordingError::Full { .. })));
    // Starts have a bound, too.
    assert!(matches!(on(&disk, options()), Err(RecordingError::Full { .. })));
    std::fs::remove_file(old.join("0.seg")).unwrap();
    post(&recorder, &large).await.unwrap().close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    read(recorder.folder());
}

#[tokio::test]
async fn a_full_journal_refuses_says_so_and_goes_on_when_there_is_room() {
    let directory = TempDir::new().unwrap();
    let old = directory.path().join("old");
    std::fs::create_dir(&old).unwrap();
    std::fs::write(old.join("0.seg"), vec![0; 3 << 20]).unwrap();
    let disk = Arc::new(TestDisk::default());
    let options = RecorderOptions { journal_bytes_max: 4 << 20, ..options(directory.path()) };
    let recorder = on(&disk, options).unwrap();
    assert_eq!(recorder.measured().reserve, 64 << 10);
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(200_000));
    let mut accepted = 0;
    let error = loop {
        match post(&recorder, &large).await {
            Ok(record) => record.close(Outcome::Complete, None),
            Err(error) => break error,
        }
        accepted += 1;
        assert!(accepted < 100, "1 MiB of journal takes no 100 × 200 kB");
    };
    assert!(accepted > 0);
    let text = error.to_string();
    assert!(matches!(error, RecordingError::Full { .. }), "{text}");
    assert!(text.contains(&*directory.path().to_string_lossy()) && text.contains("raise"), "{text}");
    // Reads are refused too, not silently lost.
    let read_attributes = attributes("get", "pods", "");
    let refused = open(&recorder, Method::GET, &read_attributes, &HeaderMap::new(), None).await;
    assert!(matches!(refused, Err(RecordingError::Full { .. })));
    assert!(recorder.failure().is_some());
    let (events, covered) = read_some(recorder.folder());
    assert_eq!(covered, events.len() as u64);
    assert!(matches!(&events.last().unwrap().kind, Kind::Gap { reason, .. } if reason.contains("is full")));
    let gaps = |kind| recorder.measured().gaps.into_iter().find(|(name, _)| *name == kind).unwrap().1;
    assert_eq!((gaps("stopped"), gaps("not_written"), gaps("other")), (1, 0, 0));

    std::fs::remove_file(old.join("0.seg")).unwrap();
    post(&recorder, "{}").await.unwrap().close(Outcome::Complete, None);
    assert!(recorder.failure().is_none());
    assert_eq!((gaps("stopped"), gaps("not_written"), gaps("other")), (1, 1, 0));
    assert_eq!(recorder.measured().reserve, 64 << 10);
    recorder.stop("test").await.unwrap();
    let events = read(recorder.folder());
    let lost: u64 = events
        .iter()
        .filter_map(|event| match event.kind {
            Kind::Gap { events, .. } => events,
            _ => None,
        })
        .sum();
    assert!(lost > 0);
    let starts = names(&events).iter().filter(|name| **name == "sessionStarted").count();
    assert_eq!(starts, 2, "after a loss sessions begin anew");
}

#[tokio::test]
async fn a_failed_write_poisons_the_segment_and_the_next_one_goes_on_without_a_hole() {
    for (kind, wanted) in [
        (io::ErrorKind::ReadOnlyFilesystem, "read-only"),
        (io::ErrorKind::StorageFull, "no space left"),
        (io::ErrorKind::Other, "cannot be written"),
    ] {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options(directory.path())).unwrap();
        post(&recorder, "{}").await.unwrap().close(Outcome::Complete, None);
        disk.fail(Some(kind));
        let error = post(&recorder, "{}").await.unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
        assert_eq!(recorder.measured().reserve, 0);
        let read_attributes = attributes("get", "pods", "");
        assert!(open(&recorder, Method::GET, &read_attributes, &HeaderMap::new(), None).await.is_err());
        disk.fail(None);
        post(&recorder, "{}").await.unwrap().close(Outcome::Complete, None);
        assert_eq!(recorder.measured().reserve, 64 << 10);
        recorder.stop("test").await.unwrap();
        let events = read(recorder.folder());
        assert!(names(&events).contains(&"gap"), "{:?}", names(&events));
        assert!(events.iter().zip(0..).all(|(event, sequence)| event.sequence == sequence));
        assert_eq!(segments(recorder.folder()).len(), 2);
    }
}

#[tokio::test]
async fn a_group_that_one_segment_did_not_take_is_in_the_next_and_nobody_is_refused() {
    // The write of a group, and its fdatasync.
    for (operation, request) in [(1, "{\"a\":1}"), (2, "{\"a\":2}")] {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options(directory.path())).unwrap();
        post(&recorder, "{}").await.unwrap().close_durably(Outcome::Complete, None).unwrap().await.unwrap();
        disk.fail_once(disk.operations() + operation);
        post(&recorder, request).await.unwrap().close(Outcome::Complete, None);
        assert!(recorder.failure().is_none());
        recorder.stop("test").await.unwrap();
        let events = read(recorder.folder());
        let told = |text: &str| {
            let says =
                |event: &&weir_common::event::Event| serde_json::to_string(event).unwrap().contains(text);
            events.iter().filter(says).count()
        };
        assert_eq!(told(&request.replace('"', "\\\"")), 1, "{:?}", names(&events));
        assert!(!names(&events).contains(&"gap"), "nothing is lost: {:?}", names(&events));
        assert_eq!(segments(recorder.folder()).len(), 2);
    }
}

#[tokio::test]
async fn room_that_removal_has_made_is_used_before_anything_is_refused() {
    let directory = TempDir::new().unwrap();
    let options = RecorderOptions { journal_bytes_max: 3 << 20, ..options(directory.path()) };
    let recorder = on(&Arc::new(TestDisk::default()), options).unwrap();
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(200_000));
    let mut removed = 0;
    // Several times as much as the journal may hold.
    for _ in 0..60 {
        drop(post(&recorder, &large).await.unwrap());
        let mut published = segments(recorder.folder());
        published.pop();
        for path in published {
            std::fs::remove_file(path).unwrap();
            removed += 1;
        }
    }
    assert!(removed > 4, "{removed}");
    assert!(recorder.failure().is_none());
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn attempts_that_failed_do_not_make_the_next_segment_larger() {
    let directory = TempDir::new().unwrap();
    let disk = Arc::new(TestDisk::default());
    let recorder = on(&disk, options(directory.path())).unwrap();
    let length = |file: &std::path::PathBuf| std::fs::metadata(file).unwrap().len();
    let first = length(&segments(recorder.folder())[0]);
    disk.fail(Some(io::ErrorKind::StorageFull));
    for _ in 0..5 {
        assert!(post(&recorder, "{}").await.is_err());
    }
    disk.fail(None);
    let record = post(&recorder, "{}").await.unwrap();
    assert_eq!(length(segments(recorder.folder()).last().unwrap()), first);
    drop(record);
    recorder.stop("test").await.unwrap();
}

#[tokio::test]
async fn a_journal_that_cannot_be_made_is_an_error_that_names_it() {
    let directory = TempDir::new().unwrap();
    let disk = Arc::new(TestDisk::default());
    disk.fail(Some(io::ErrorKind::ReadOnlyFilesystem));
    let error = on(&disk, options(directory.path())).unwrap_err();
    assert!(matches!(error, RecordingError::ReadOnly { .. }), "{error}");
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Recorder::start(options(&file.join("journal"))).unwrap_err();
    assert!(error.to_string().contains(&*file.to_string_lossy()), "{error}");
    let tiny = RecorderOptions { journal_bytes_max: 100, ..options(directory.path()) };
    assert!(matches!(Recorder::start(tiny), Err(RecordingError::Full { .. })));
    let key = RecorderOptions { signing_key_files: vec![file.clone()], ..options(directory.path()) };
    assert!(matches!(Recorder::start(key), Err(RecordingError::Key { path, .. }) if path == file));
}

#[tokio::test]
async fn two_recorders_on_one_folder_make_two_epochs_and_a_later_one_names_its_predecessor() {
    let directory = TempDir::new().unwrap();
    let (one, two) = (options(directory.path()), options(directory.path()));
    let (one, two) = (Recorder::start(one).unwrap(), Recorder::start(two).unwrap());
    assert_ne!(one.folder(), two.folder());
    one.stop("test").await.unwrap();
    two.stop("test").await.unwrap();
    let predecessor = |events: &[Event]| match &events[0].kind {
        Kind::AgentStarted { predecessor, .. } => predecessor.clone(),
        other => panic!("{other:?}"),
    };
    // An epoch that still runs is nobody's predecessor.
    assert_eq!(predecessor(&read(two.folder())), None);
    let last = two.folder().to_owned();
    drop((one, two));
    let three = Recorder::start(options(directory.path())).unwrap();
    three.stop("test").await.unwrap();
    let named = predecessor(&read(three.folder())).unwrap();
    assert_eq!(named.epoch, last.file_name().unwrap().to_str().unwrap());
    assert_eq!(named.size, read(&last).len() as u64);
}

#[tokio::test]
async fn segments_are_changed_when_full_and_read_back_in_order() {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(1 << 20));
    for _ in 0..6 {
        post(&recorder, &large).await.unwrap().close(Outcome::Complete, None);
    }
    recorder.stop("test").await.unwrap();
    assert_eq!(segments(recorder.folder()).len(), 2);
    let events = read(recorder.folder());
    assert_eq!(names(&events).iter().filter(|name| **name == "requestClosed").count(), 6);
    let used = segment::bytes_of_all(&FileSystem, directory.path()).unwrap();
    assert!(used < 7 << 20, "unused space was given back: {used}");
}

#[tokio::test]
async fn whichever_operation_fails_once_what_was_acknowledged_is_there_and_the_log_verifies() {
    let mut operation = 0;
    loop {
        operation += 1;
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        disk.fail_once(operation);
        let Ok(recorder) = on(&disk, options(directory.path())) else { continue };
        let large = format!("{{\"a\":\"{}\"}}", "x".repeat(100_000));
        let mut acknowledged = Vec::new();
        for _ in 0..5 {
            if let Ok(record) = post(&recorder, &large).await {
                acknowledged.push(record.id().to_owned());
                record.close(Outcome::Complete, None);
            }
        }
        let stopped = recorder.stop("test").await;
        let (events, covered) = read_some(recorder.folder());
        assert!(covered == events.len() as u64 || stopped.is_err(), "operation {operation}: {covered}");
        let opened = |id: &String| {
            let is = |event: &Event| event.request.as_ref() == Some(id);
            events.iter().any(|event| is(event) && event.kind.name() == "requestOpened")
        };
        assert!(acknowledged.iter().all(opened), "operation {operation}");
        assert!(acknowledged.len() >= 4, "operation {operation}: one failure refuses one request");
        if disk.operations() < operation {
            assert!(stopped.is_ok() && acknowledged.len() == 5);
            break;
        }
    }
}

/// The checkpoints of the log: how many events each covers, and when it was signed.
fn checkpoints(folder: &std::path::Path) -> Vec<(u64, i64)> {
    let mut list = Vec::new();
    for path in segments(folder) {
        let bytes = std::fs::read(path).unwrap();
        for located in SegmentReader::new(&bytes, None).unwrap() {
            let frame = located.unwrap().frame;
            if frame.frame_type == FrameType::Checkpoint {
                list.push((frame.sequence, frame.envelope.time_unix_us));
            }
        }
    }
    list
}

#[tokio::test]
async fn the_first_event_of_an_epoch_is_signed_for_at_once() {
    let directory = TempDir::new().unwrap();
    let recorder = Recorder::start(options(directory.path())).unwrap();
    assert_eq!(checkpoints(recorder.folder()).iter().map(|(size, _)| *size).collect::<Vec<_>>(), [1]);
    drop(recorder);
}

#[tokio::test]
async fn silence_is_signed_for_in_the_checkpoint_file_and_takes_one_frame_when_it_ends() {
    let directory = TempDir::new().unwrap();
    let recorder = idling(&Arc::new(TestDisk::default()), options(directory.path())).unwrap();
    let before =
        segments(recorder.folder()).iter().map(|path| std::fs::read(path).unwrap()).collect::<Vec<_>>();
    let note = || std::fs::read_to_string(recorder.folder().join("checkpoint")).unwrap();
    let mut signed = Vec::new();
    while signed.len() < 4 {
        // As the agent does each minute: no pod did anything.
        recorder.coverage(Coverage { interval_ms: 60_000, ..Coverage::default() });
        let checkpoint = Checkpoint::parse_unverified(&note()).unwrap();
        assert_eq!(checkpoint.size, 1);
        if signed.last() != Some(&checkpoint.time_unix_us) {
            signed.push(checkpoint.time_unix_us);
        }
        std::thread::yield_now();
    }
    assert!(signed.is_sorted(), "{signed:?}");
    let after =
        segments(recorder.folder()).iter().map(|path| std::fs::read(path).unwrap()).collect::<Vec<_>>();
    assert!(before == after, "nothing is written to the log meanwhile");
    post(&recorder, "{}").await.unwrap().close(Outcome::Complete, None);
    recorder.stop("test").await.unwrap();
    let logged = checkpoints(recorder.folder());
    let silent: Vec<_> = logged.iter().filter(|(size, _)| *size == 1).collect();
    assert_eq!(silent.len(), 2, "that of the first event, and the last before the next one: {logged:?}");
    assert!(Some(silent[1].1) >= *signed.last().unwrap());
    read(recorder.folder());
}
