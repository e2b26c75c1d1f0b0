//! Keys of sessions: made with the first content of a session, wrapped to the recipients beside the log, used from memory.
//!
//! A wrapped key is on disk before anything that it encrypted can be: it is made here, in no time, and stored by threads of its own
//! ([`KeyStore`]), for which the queue holds back what it encrypted. No key outlives its day, so that what a key reads is bounded in
//! time, and its file can go once what it encrypted is gone.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use uuid::Uuid;
use weir_common::{
    encryption::{ContentKey, KEY_LIFE, Place, Recipient},
    event::{BodySummary, Content, Kind},
};

use super::{
    entry::{Ids, unix_us},
    error::RecordingError,
    key_store::KeyStore,
    share::Share,
};

/// Encrypts content for recipients.
#[derive(Debug)]
pub(super) struct Encryption {
    epoch: Uuid,
    recipients: Vec<Recipient>,
    /// How many keys were made.
    made: AtomicU64,
    store: KeyStore,
}

/// A session, and what its content is encrypted with: there is no table of keys, a key goes with its session.
#[derive(Debug)]
pub(super) struct SessionKeys {
    session: Arc<str>,
    current: KeySlot,
}

/// Holds the key that is used now, if there is one.
#[derive(Debug, Default)]
pub(super) struct KeySlot(Mutex<Option<Arc<SessionKey>>>);

/// One key.
#[derive(Debug)]
pub(super) struct SessionKey {
    key: ContentKey,
    made: Instant,
    /// Pieces that it encrypted.
    count: AtomicU64,
    /// Whether its file is on disk, once that is known.
    stored: OnceLock<Result<(), RecordingError>>,
}

impl SessionKeys {
    pub(super) fn new(session: Arc<str>) -> Self {
        Self { session, current: KeySlot::default() }
    }

    /// The session's id.
    pub(super) fn id(&self) -> &str {
        &self.session
    }
}

impl KeySlot {
    /// The key in it, or a new one if there is none that may be used. Under its lock nothing waits for a disk.
    fn get_or(
        &self,
        make: impl FnOnce() -> Result<Arc<SessionKey>, RecordingError>,
    ) -> Result<Arc<SessionKey>, RecordingError> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = slot.as_ref().filter(|key| key.may_be_used()) {
            return Ok(Arc::clone(key));
        }
        let key = make()?;
        *slot = Some(Arc::clone(&key));
        Ok(key)
    }
}

impl SessionKey {
    pub(super) fn number(&self) -> u64 {
        self.key.number()
    }

    /// Whether its file is on disk, or why it is not; none: it is not known yet.
    pub(super) fn stored(&self) -> Option<&Result<(), RecordingError>> {
        self.stored.get()
    }

    /// Now it is known.
    pub(super) fn settle(&self, stored: Result<(), RecordingError>) {
        let _ = self.stored.set(stored);
    }

    fn may_be_used(&self) -> bool {
        self.made.elapsed() < KEY_LIFE && self.stored().is_none_or(Result::is_ok)
    }
}

impl Encryption {
    /// For an epoch.
    pub(super) fn new(epoch: Uuid, recipients: Vec<Recipient>, store: KeyStore) -> Self {
        Self { epoch, recipients, made: AtomicU64::new(0), store }
    }

    /// Ends the threads that store keys.
    pub(super) fn stop(&self) {
        self.store.stop();
    }

    /// Encrypts the content in an event, and keys the digests of content; returns the key, if one was needed.
    ///
    /// # Errors
    /// There is no key: nothing may be recorded in clear instead.
    pub(super) fn protect(
        &self,
        ids: Ids<'_>,
        mut kind: Kind,
    ) -> Result<(Kind, Option<Arc<SessionKey>>), RecordingError> {
        let key = match &mut kind {
            Kind::Content(content) => Some(self.encrypt(ids, content)?),
            Kind::RequestOpened(opened) => self.keyed(ids, digest_of(&mut opened.body))?,
            Kind::RequestClosed(closed) => self.keyed(ids, digest_of(&mut closed.body))?,
            Kind::FileCopied(file) => self.keyed(ids, file.digest.as_mut())?,
            _ => None,
        };
        Ok((kind, key))
    }

    fn encrypt(&self, ids: Ids<'_>, content: &mut Content) -> Result<Arc<SessionKey>, RecordingError> {
        let key = self.key_of(ids)?;
        let place = Place { session: ids.session, request: ids.request.unwrap_or_default() };
        let count = key.count.fetch_add(1, Ordering::Relaxed);
        let encrypted = key.key.encrypt(place, count, content);
        *content = encrypted.map_err(|error| self.failed(key.number(), &error.to_string()))?;
        Ok(key)
    }

    /// A digest lets whoever guesses the content know that the guess is right: nobody shall who cannot read it anyway.
    fn keyed(
        &self,
        ids: Ids<'_>,
        digest: Option<&mut String>,
    ) -> Result<Option<Arc<SessionKey>>, RecordingError> {
        let Some(digest) = digest else { return Ok(None) };
        let key = self.key_of(ids)?;
        *digest = key.key.keyed_digest(digest);
        Ok(Some(key))
    }

    /// The session's key; of a pod that has begun more sessions than get one each, the key that those beyond have together.
    fn key_of(&self, ids: Ids<'_>) -> Result<Arc<SessionKey>, RecordingError> {
        let (keys, share) = ids.keys.ok_or_else(|| self.failed(0, "content belongs to a session"))?;
        keys.current.get_or(|| {
            let make = || self.make(keys.id(), share);
            if share.takes_key(Instant::now()) { make() } else { share.common_key.get_or(make) }
        })
    }

    fn make(&self, session: &str, share: &Arc<Share>) -> Result<Arc<SessionKey>, RecordingError> {
        if let Some(failure) = self.store.failure() {
            return Err(failure);
        }
        // The number is spent even if it cannot be stored: nobody knows what is on disk then.
        let number = self.made.fetch_add(1, Ordering::Relaxed) + 1;
        let made = ContentKey::generate(self.epoch, number, session, unix_us(), &self.recipients);
        let (key, wrapped) = made.map_err(|error| self.failed(number, &error.to_string()))?;
        let (made, count) = (Instant::now(), AtomicU64::new(0));
        let key = Arc::new(SessionKey { key, made, count, stored: OnceLock::new() });
        self.store.store(Arc::clone(&key), wrapped.encode(), share);
        Ok(key)
    }

    fn failed(&self, number: u64, reason: &str) -> RecordingError {
        RecordingError::Key { path: self.store.path(number), reason: reason.to_owned() }
    }
}

fn digest_of(body: &mut Option<BodySummary>) -> Option<&mut String> {
    body.as_mut()?.digest.as_mut()
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use futures::FutureExt as _;
    use tempfile::TempDir;
    use weir_common::{
        encryption::{Identity, Place, WrappedKey, wrapped_key_file},
        event::{Bytes, Channel, Event, FileCopied, Kind},
    };

    use super::{Ids, SessionKeys};
    use crate::{
        recipients::{IDENTITY, RECIPIENT},
        recording::{
            Commit, CommitRule, CommitRules, PodQuota, Recorder, RecorderOptions, RecordingError, fixture::*,
            segment::bytes_of_all, share::KEYS_BURST,
        },
        storage::FileSystem,
    };

    fn options_for(directory: &Path) -> RecorderOptions {
        let recipient = directory.join("recipient.pem");
        std::fs::write(&recipient, RECIPIENT).unwrap();
        RecorderOptions { recipient_files: vec![recipient], ..options(&directory.join("journal")) }
    }

    /// What the events of a journal hold of content, decrypted with what lies beside the log.
    fn decrypted(folder: &Path, events: &[Event]) -> Vec<u8> {
        let identities = [Identity::from_pem(IDENTITY.as_bytes()).unwrap()];
        let mut all = Vec::new();
        for event in events {
            let Kind::Content(content) = &event.kind else { continue };
            let Bytes::Encrypted { key, .. } = content.bytes else { panic!("{event:?}") };
            let wrapped = std::fs::read(folder.join(wrapped_key_file(key))).unwrap();
            let key = WrappedKey::decode(&wrapped).unwrap().unwrap(&identities).unwrap();
            let place = Place { session: &event.session, request: event.request.as_deref().unwrap() };
            all.extend(key.decrypt(place, content).unwrap().bytes.to_vec().unwrap());
        }
        all
    }

    fn bytes_of(folder: &Path) -> Vec<u8> {
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.is_file()).flat_map(|path| std::fs::read(path).unwrap()).collect()
    }

    #[tokio::test]
    async fn bodies_are_encrypted_for_the_recipients_and_their_digests_tell_nobody_else_anything() {
        let directory = TempDir::new().unwrap();
        let recorder = on(&Arc::new(TestDisk::default()), options_for(directory.path())).unwrap();
        let body = format!("{{\"kind\":\"ConfigMap\",\"data\":{{\"a\":\"{CANARY}\"}}}}");
        for _ in 0..2 {
            post(&recorder, &body).await.unwrap();
        }
        let folder = recorder.folder().to_owned();
        recorder.stop("test").await.unwrap();
        let events = read(&folder);
        assert_eq!(decrypted(&folder, &events), body.repeat(2).as_bytes());
        let all = bytes_of(&folder);
        assert!(!all.windows(CANARY.len()).any(|part| part == CANARY.as_bytes()));
        let digests: Vec<_> = events
            .iter()
            .filter_map(|event| match &event.kind {
                Kind::RequestOpened(opened) => opened.body.as_ref()?.digest.clone(),
                _ => None,
            })
            .collect();
        assert_eq!(digests.len(), 2);
        assert!(digests.iter().all(|digest| digest.starts_with("content-hmac-sha256:1:")), "{digests:?}");
        assert!(!folder.join(wrapped_key_file(2)).exists(), "one key for a session");
    }

    #[tokio::test]
    async fn what_cannot_be_encrypted_is_not_recorded_in_clear() {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options_for(directory.path())).unwrap();
        disk.fail(Some(std::io::ErrorKind::StorageFull));
        assert!(post(&recorder, &format!("{{\"a\":\"{CANARY}\"}}")).await.is_err());
        disk.fail(None);
        // As when the disk is there again: with a new key.
        post(&recorder, "{\"b\":1}").await.unwrap();
        let folder = recorder.folder().to_owned();
        recorder.stop("test").await.unwrap();
        let events = read(&folder);
        assert_eq!(decrypted(&folder, &events), b"{\"b\":1}");
    }

    #[test]
    fn a_recipient_that_is_none_stops_the_agent_before_anything_is_made() {
        let directory = TempDir::new().unwrap();
        let options = options_for(directory.path());
        std::fs::write(directory.path().join("recipient.pem"), "x").unwrap();
        assert!(on(&Arc::new(TestDisk::default()), options).is_err());
        assert!(!directory.path().join("journal").exists());
    }

    #[tokio::test]
    async fn digests_of_copied_files_are_keyed_and_what_holds_no_content_needs_no_key() {
        let directory = TempDir::new().unwrap();
        let recorder = on(&Arc::new(TestDisk::default()), options_for(directory.path())).unwrap();
        let encryption = recorder.inner.origin.encryption.as_ref().unwrap();
        let share = recorder.inner.shares.of(&caller(), std::time::Instant::now());
        let keys = SessionKeys::new("s".into());
        let ids = Ids { session: "s", keys: Some((&keys, &share)), ..Ids::default() };
        let linked = FileCopied {
            channel: Channel::Stdin,
            path: "a".into(),
            bytes: 0,
            digest: None,
            link_target: Some("b".into()),
            passed_bytes: None,
        };
        let copied = FileCopied { digest: Some("sha256:00".into()), link_target: None, ..linked.clone() };
        assert!(encryption.protect(ids, Kind::FileCopied(Box::new(linked))).unwrap().1.is_none());
        let (kind, key) = encryption.protect(ids, Kind::FileCopied(Box::new(copied.clone()))).unwrap();
        let Kind::FileCopied(keyed) = kind else { panic!("{kind:?}") };
        assert!(keyed.digest.unwrap().starts_with("content-hmac-sha256:1:"));
        assert_eq!(key.unwrap().number(), 1);
        let nobodys = encryption.protect(Ids::default(), Kind::FileCopied(Box::new(copied)));
        assert!(nobodys.is_err(), "there is no key that belongs to no session");
        recorder.stop("test").await.unwrap();
        assert!(recorder.folder().join(wrapped_key_file(1)).exists());
    }

    fn key_files(recorder: &Recorder) -> usize {
        let files = std::fs::read_dir(recorder.folder()).unwrap();
        files.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|end| end == "key")).count()
    }

    #[tokio::test]
    async fn a_key_whose_file_hangs_holds_up_its_own_pod_alone() {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options_for(directory.path())).unwrap();
        disk.hold_file(Some("00000000000000000001.new"));
        let caller = of_pod("a", None);
        let mut hanging = Box::pin(create(&recorder, &caller, "{\"a\":1}"));
        assert!(hanging.as_mut().now_or_never().is_none());
        // On this very thread: no task blocks either.
        for number in 0..3 {
            create(&recorder, &of_pod("b", Some(format!("user-{number}"))), "{\"b\":1}").await.unwrap();
        }
        // What has no content needs no key.
        drop(get(&recorder, &attributes("get", "pods", "")).await);
        assert!(hanging.as_mut().now_or_never().is_none());
        let on_disk = read_some(recorder.folder()).0;
        assert!(!on_disk.iter().any(|event| matches!(&event.kind, Kind::Content(content)
            if matches!(content.bytes, Bytes::Encrypted { key: 1, .. }))));
        disk.hold_file(None);
        drop(hanging.await.unwrap());
        let folder = recorder.folder().to_owned();
        recorder.stop("test").await.unwrap();
        assert_eq!(decrypted(&folder, &read(&folder)), b"{\"b\":1}{\"b\":1}{\"b\":1}{\"a\":1}");
    }

    #[tokio::test]
    async fn a_recorder_that_stops_waits_for_keys() {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options_for(directory.path())).unwrap();
        disk.hold_file(Some("00000000000000000001.new"));
        let asynchronous = CommitRule { commit: Some(Commit::Async), ..CommitRule::default() };
        recorder.set_rules(CommitRules {
            rules: vec![asynchronous],
            async_mutations: true,
            ..CommitRules::default()
        });
        drop(create(&recorder, &of_pod("a", None), "{\"a\":1}").await.unwrap());
        let mut stop = Box::pin(recorder.stop("test"));
        assert!(stop.as_mut().now_or_never().is_none());
        disk.hold_file(None);
        stop.await.unwrap();
        let folder = recorder.folder();
        assert_eq!(decrypted(folder, &read(folder)), b"{\"a\":1}");
    }

    #[tokio::test]
    async fn sessions_beyond_a_pods_bound_share_a_key_and_what_keys_take_is_counted() {
        let directory = TempDir::new().unwrap();
        let quota = PodQuota { bytes_per_second: 1, burst_bytes: 1 << 30, backlog_percent: 100 };
        let options = RecorderOptions { pod_quota: quota, ..options_for(directory.path()) };
        let recorder = on(&Arc::new(TestDisk::default()), options).unwrap();
        let used = recorder.measured().used.0;
        let sessions = KEYS_BURST as usize + 20;
        for number in 0..sessions {
            drop(create(&recorder, &of_pod("a", Some(format!("user-{number}"))), "{\"a\":1}").await.unwrap());
        }
        drop(create(&recorder, &of_pod("b", None), "{\"b\":1}").await.unwrap());
        let keys = KEYS_BURST as usize + 2;
        assert_eq!(key_files(&recorder), keys, "one that is shared, and the neighbour's");
        assert_eq!(recorder.measured().used.0 - used, keys as u64 * 4096);
        let journal = directory.path().join("journal");
        assert_eq!(bytes_of_all(&FileSystem, &journal).unwrap(), recorder.measured().used.0);
        let folder = recorder.folder().to_owned();
        recorder.stop("test").await.unwrap();
        let all = decrypted(&folder, &read(&folder));
        assert_eq!(all.len(), (sessions + 1) * 7, "all of it can be read");
    }

    #[tokio::test]
    async fn a_full_journal_takes_no_keys() {
        let directory = TempDir::new().unwrap();
        let options = RecorderOptions { journal_bytes_max: 600 * 1024, ..options_for(directory.path()) };
        let recorder = on(&Arc::new(TestDisk::default()), options).unwrap();
        let mut refused = None;
        for number in 0..KEYS_BURST {
            let caller = of_pod("a", Some(format!("user-{number}")));
            match create(&recorder, &caller, "{\"a\":1}").await {
                Ok(record) => drop(record),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        assert!(matches!(refused, Some(RecordingError::Full { .. })), "{refused:?}");
        let journal = directory.path().join("journal");
        assert!(bytes_of_all(&FileSystem, &journal).unwrap() <= 600 * 1024);
    }
}
