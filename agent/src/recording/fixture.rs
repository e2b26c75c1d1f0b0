//! What recording's tests share: a disk that fails on demand, requests, and the reader that `weir` uses.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Uri, Version};
use weir_common::{
    attributes::Attributes,
    checkpoint::{Checkpoint, NoteVerifier},
    event::{Caller, Event, Pod, Process},
    frame::FrameType,
    merkle::Tree,
    segment::{SegmentReader, Tail},
};

use super::{
    CommitRules, PodQuota, Recorder, RecorderOptions, RecordingError, RequestHead, RequestRecord, Unmasked,
    tuning::Tuning,
};
use crate::{
    recipients::RECIPIENT,
    storage::{Entry, FileSystem, Lock, Open, Storage, StoredFile},
};

pub(super) const CANARY: &str = "canary-hunter2-canary";
pub(super) const JSON: &str = "application/json";

/// A disk that counts, fails and waits on demand.
#[derive(Debug, Default)]
pub(crate) struct TestDisk {
    pub(super) syncs: AtomicU64,
    /// What every creation, write and sync fails with.
    fault: Mutex<Option<io::ErrorKind>>,
    /// Operations so far, and which one fails, once.
    operations: AtomicU64,
    fails_at: AtomicU64,
    /// Syncs wait while this is true.
    held: Mutex<bool>,
    /// The files with these names wait when they are to be made durable.
    held_files: Mutex<&'static [&'static str]>,
    /// Whether keys' files cannot be made durable.
    keys_fail: AtomicBool,
    /// Whether one waits.
    holding: AtomicBool,
    released: Condvar,
}

impl TestDisk {
    fn check(&self) -> io::Result<()> {
        let operation = self.operations.fetch_add(1, Ordering::SeqCst) + 1;
        if operation == self.fails_at.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::Other.into());
        }
        self.fault.lock().unwrap().map_or(Ok(()), |kind| Err(kind.into()))
    }

    pub(crate) fn fail(&self, kind: Option<io::ErrorKind>) {
        *self.fault.lock().unwrap() = kind;
    }

    /// The operation with this number fails, once.
    pub(super) fn fail_once(&self, operation: u64) {
        self.fails_at.store(operation, Ordering::SeqCst);
    }

    /// Number of operations so far.
    pub(super) fn operations(&self) -> u64 {
        self.operations.load(Ordering::SeqCst)
    }

    /// Whether a sync waits.
    pub(crate) fn is_holding(&self) -> bool {
        self.holding.load(Ordering::SeqCst)
    }

    pub(crate) fn hold(&self, held: bool) {
        *self.held.lock().unwrap() = held;
        self.released.notify_all();
    }

    pub(super) fn hold_files(&self, names: &'static [&'static str]) {
        *self.held_files.lock().unwrap() = names;
        self.released.notify_all();
    }

    pub(super) fn fail_keys(&self, fail: bool) {
        self.keys_fail.store(fail, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct TestFile(Box<dyn StoredFile>, Arc<TestDisk>, PathBuf);

#[derive(Debug)]
pub(super) struct SharedDisk(Arc<TestDisk>);

impl Storage for SharedDisk {
    fn open(&self, path: &Path, open: Open) -> io::Result<Box<dyn StoredFile>> {
        if open != Open::Read {
            self.0.check()?;
        }
        Ok(Box::new(TestFile(FileSystem.open(path, open)?, Arc::clone(&self.0), path.to_owned())))
    }
    fn make_folder(&self, path: &Path) -> io::Result<()> {
        self.0.check()?;
        FileSystem.make_folder(path)
    }
    fn sync_folder(&self, _path: &Path) -> io::Result<()> {
        self.0.check()
    }
    fn exists(&self, path: &Path) -> bool {
        FileSystem.exists(path)
    }
    fn entries(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        FileSystem.entries(folder)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.check()?;
        FileSystem.rename(from, to)
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.check()?;
        FileSystem.link(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        FileSystem.remove_file(path)
    }
    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        FileSystem.remove_folder(path)
    }
}

impl StoredFile for TestFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Err(error) = self.1.check() {
            // A write that fails may have written a part.
            self.0.write_at(&bytes[..bytes.len() / 2], offset)?;
            return Err(error);
        }
        // Sparse, and never really synced: what these tests lose, they lose on purpose.
        if bytes.iter().all(|byte| *byte == 0) && offset >= self.0.length()? {
            return self.0.set_length(offset + bytes.len() as u64);
        }
        self.0.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.1.syncs.fetch_add(1, Ordering::SeqCst);
        let mut held = self.1.held.lock().unwrap();
        while *held {
            self.1.holding.store(true, Ordering::SeqCst);
            held = self.1.released.wait(held).unwrap();
        }
        self.1.holding.store(false, Ordering::SeqCst);
        drop(held);
        self.1.check()
    }
    fn sync_all(&self) -> io::Result<()> {
        let mut held = self.1.held_files.lock().unwrap();
        while held.iter().any(|name| self.2.ends_with(name)) {
            held = self.1.released.wait(held).unwrap();
        }
        drop(held);
        let of_key = |name: &str| name.strip_suffix(".new").is_some_and(|name| name.parse::<u64>().is_ok());
        if self.1.keys_fail.load(Ordering::SeqCst)
            && self.2.file_name().and_then(|name| name.to_str()).is_some_and(of_key)
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.1.check()
    }
    fn set_length(&self, bytes: u64) -> io::Result<()> {
        self.1.check()?;
        self.0.set_length(bytes)
    }
    fn length(&self) -> io::Result<u64> {
        self.0.length()
    }
    fn lock(&self, lock: Lock) -> io::Result<bool> {
        self.0.lock(lock)
    }
}

pub(super) fn options(directory: &Path) -> RecorderOptions {
    RecorderOptions {
        directory: directory.to_owned(),
        journal_bytes_max: 1 << 30,
        node: "node-1".into(),
        tenant: None,
        clusters: vec!["prod".into()],
        response_bytes_max: 64 * 1024,
        session_idle_timeout: Duration::from_secs(600),
        signing_key_files: Vec::new(),
        recipient_files: Vec::new(),
        key_service: None,
        idle_checkpoint_interval: TUNING.idle_interval,
        rules: CommitRules::default(),
        pod_quota: PodQuota::UNLIMITED,
    }
}

/// Tests wait for nothing, and fill segments soon.
const TUNING: Tuning = Tuning {
    retry_interval: Duration::ZERO,
    segment_bytes_first: 512 * 1024,
    segment_bytes_max: 64 * 1024 * 1024,
    checkpoint_events: 4096,
    // Long enough that tests of other things see no such checkpoint.
    idle_interval: Duration::from_secs(3600),
};

/// On a real disk, with segments as small as may be; content is encrypted.
pub(crate) fn start_small(storage: Arc<dyn Storage>, directory: &Path) -> Recorder {
    let recipient = directory.with_extension("pem");
    std::fs::write(&recipient, RECIPIENT).unwrap();
    let tuning = Tuning { retry_interval: Duration::from_millis(250), ..super::ledger::TUNING };
    let options = RecorderOptions { recipient_files: vec![recipient], ..options(directory) };
    Recorder::start_on(storage, options, tuning).unwrap()
}

/// On a disk, with a checkpoint as often as can be while nothing is recorded.
pub(super) fn idling(disk: &Arc<TestDisk>, options: RecorderOptions) -> Result<Recorder, RecordingError> {
    let tuning = Tuning { idle_interval: Duration::from_millis(2), ..TUNING };
    Recorder::start_on(Arc::new(SharedDisk(Arc::clone(disk))), options, tuning)
}

pub(crate) fn on(disk: &Arc<TestDisk>, options: RecorderOptions) -> Result<Recorder, RecordingError> {
    Recorder::start_on(Arc::new(SharedDisk(Arc::clone(disk))), options, TUNING)
}

pub(super) fn caller() -> Arc<Caller> {
    Arc::new(Caller {
        pod: Some(Pod { uid: "pod-uid".into(), ..Pod::default() }),
        process: Some(Process { pid: 7, start_boottime_ns: 9, ..Process::default() }),
        ..Caller::default()
    })
}

pub(crate) fn attributes(verb: &str, resource: &str, subresource: &str) -> Attributes {
    Attributes {
        verb: verb.into(),
        api_version: "v1".into(),
        resource: resource.into(),
        subresource: subresource.into(),
        ..Attributes::default()
    }
}

pub(super) fn content_type(value: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("content-type", value.parse().unwrap());
    headers
}

/// Somebody in a pod, of whom nothing else is known but who they claim to be.
pub(crate) fn of_pod(pod: &str, claimed_user: Option<String>) -> Arc<Caller> {
    let pod = Pod { uid: pod.into(), ..Pod::default() };
    Arc::new(Caller { pod: Some(pod), claimed_user, ..Caller::default() })
}

pub(crate) async fn open(
    recorder: &Recorder,
    method: Method,
    attributes: &Attributes,
    headers: &HeaderMap,
    body: Option<&str>,
) -> Result<RequestRecord, RecordingError> {
    open_as(recorder, &caller(), (method, "/api/v1/x"), attributes, headers, body).await
}

/// A request of a caller; it asks for an upgrade if its headers do.
pub(super) async fn open_as(
    recorder: &Recorder,
    caller: &Arc<Caller>,
    (method, uri): (Method, &'static str),
    attributes: &Attributes,
    headers: &HeaderMap,
    body: Option<&str>,
) -> Result<RequestRecord, RecordingError> {
    let head = RequestHead {
        method: &method,
        uri: &Uri::from_static(uri),
        version: Version::HTTP_2,
        headers,
        attributes,
        upgrade: headers.get("upgrade").and_then(|to| to.to_str().ok()),
        identity: None,
    };
    let body = body.map(|body| Unmasked(Bytes::copy_from_slice(body.as_bytes())));
    recorder.open(caller, 0, head, body).await
}

pub(super) async fn get(recorder: &Recorder, attributes: &Attributes) -> RequestRecord {
    open(recorder, Method::GET, attributes, &HeaderMap::new(), None).await.unwrap()
}

pub(super) async fn post(recorder: &Recorder, body: &str) -> Result<RequestRecord, RecordingError> {
    create(recorder, &caller(), body).await
}

/// Makes a `ConfigMap`.
pub(crate) async fn create(
    recorder: &Recorder,
    caller: &Arc<Caller>,
    body: &str,
) -> Result<RequestRecord, RecordingError> {
    let (request, attributes) = ((Method::POST, "/api/v1/x"), attributes("create", "configmaps", ""));
    open_as(recorder, caller, request, &attributes, &content_type(JSON), Some(body)).await
}

/// Reads an epoch as `weir verify` does: everything must be whole, in order, and covered by checkpoints that verify.
#[track_caller]
pub(super) fn read(folder: &Path) -> Vec<Event> {
    let (events, covered) = read_some(folder);
    assert_eq!(covered, events.len() as u64, "the last checkpoint covers everything");
    assert!(folder.join("checkpoint").exists());
    events
}

#[track_caller]
pub(super) fn read_some(folder: &Path) -> (Vec<Event>, u64) {
    let verifier = std::fs::read_to_string(folder.join("node.pub")).unwrap();
    let verifier = NoteVerifier::parse(&verifier).unwrap();
    let segments = segments(folder);
    let bytes: Vec<_> = segments.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let (mut events, mut tree, mut covered) = (Vec::new(), Tree::new(), 0);
    for (index, segment) in bytes.iter().enumerate() {
        let successor =
            bytes.get(index + 1).map(|next| SegmentReader::new(next, None).unwrap().header().first_sequence);
        let mut reader = SegmentReader::new(segment, successor).unwrap();
        for located in reader.by_ref() {
            let frame = located.unwrap().frame;
            match frame.frame_type {
                FrameType::Event => {
                    tree.push(frame.leaf_hash);
                    let event: Event = serde_json::from_slice(frame.value).unwrap();
                    assert_eq!((event.sequence, &event.session), (frame.sequence, &frame.envelope.key));
                    assert_eq!(frame.envelope.event_type, format!("weir.v1.{}", event.kind.name()));
                    events.push(event);
                }
                FrameType::Checkpoint => {
                    let note = std::str::from_utf8(frame.value).unwrap();
                    let checkpoint = Checkpoint::verify(note, &verifier).unwrap();
                    assert_eq!((checkpoint.size, checkpoint.root), (tree.size(), tree.root()));
                    assert_eq!(checkpoint.time_unix_us, Some(frame.envelope.time_unix_us));
                    assert_eq!(checkpoint.tree.as_ref().unwrap_or(&Tree::new()), &tree);
                    covered = checkpoint.size;
                }
            }
        }
        assert!(matches!(
            reader.tail(),
            Some(Tail::Clean { .. } | Tail::Abandoned { .. } | Tail::Torn { .. })
        ));
    }
    // The file may be missing where its disk failed; the log has the checkpoint all the same.
    if let Ok(published) = std::fs::read_to_string(folder.join("checkpoint")) {
        assert!(Checkpoint::verify(&published, &verifier).unwrap().size <= covered);
    }
    (events, covered)
}

pub(super) fn segments(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    paths.sort();
    paths
}

pub(super) fn names(events: &[Event]) -> Vec<&'static str> {
    events.iter().map(|event| event.kind.name()).collect()
}
