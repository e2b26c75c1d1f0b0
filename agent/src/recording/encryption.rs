//! Keys of sessions: made with the first content of a session, wrapped to the recipients beside the log, used from memory.
//!
//! A wrapped key is on disk before anything that it encrypted can be: it is made here, in no time, and stored by a thread of its own
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
    encryption::{ContentKey, EncryptionError, KEY_LIFE, Place, Recipient},
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
    /// The request whose content it was made for.
    request: Option<Box<str>>,
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

    /// When it was made.
    pub(super) fn made(&self) -> Instant {
        self.made
    }

    /// Whether its file is on disk, or why it is not; none: it is not known yet.
    pub(super) fn stored(&self) -> Option<&Result<(), RecordingError>> {
        self.stored.get()
    }

    /// One that nobody stores, for tests.
    #[cfg(test)]
    pub(super) fn unsettled(number: u64) -> Arc<Self> {
        let recipient = Recipient::from_pem(crate::recipients::RECIPIENT.as_bytes()).unwrap();
        let (key, _) = ContentKey::generate(Uuid::nil(), number, "s", 0, &[recipient]).unwrap();
        Self::of(key)
    }

    /// One whose file is its maker's affair, for tests.
    #[cfg(test)]
    pub(super) fn of(key: ContentKey) -> Arc<Self> {
        let (made, count) = (Instant::now(), AtomicU64::new(0));
        Arc::new(Self { key, made, request: None, count, stored: OnceLock::new() })
    }

    /// Now it is known.
    pub(super) fn settle(&self, stored: Result<(), RecordingError>) {
        let _ = self.stored.set(stored);
    }

    /// Encrypts content in its place.
    pub(super) fn encrypt(&self, place: Place<'_>, content: &Content) -> Result<Content, EncryptionError> {
        self.key.encrypt(place, self.count.fetch_add(1, Ordering::Relaxed), content)
    }

    fn may_be_used(&self) -> bool {
        self.made.elapsed() < KEY_LIFE && self.stored().is_none_or(Result::is_ok)
    }
}

impl Encryption {
    /// For an epoch; recipients there may be none, where the store has a key service.
    pub(super) fn new(epoch: Uuid, recipients: Vec<Recipient>, store: KeyStore) -> Self {
        Self { epoch, recipients, made: AtomicU64::new(0), store }
    }

    /// Ends the thread that stores keys.
    pub(super) fn stop(&self) {
        self.store.stop();
    }

    /// Encrypts the content in an event, and keys the digests of content; returns the key, if one was needed. A digest that there is
    /// no key for is left out: what else the event says is worth more.
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
            Kind::FileCopied(file) => self.keyed(ids, Some(&mut file.digest))?,
            _ => None,
        };
        Ok((kind, key))
    }

    fn encrypt(&self, ids: Ids<'_>, content: &mut Content) -> Result<Arc<SessionKey>, RecordingError> {
        let key = self.key_of(ids)?;
        let place = Place { session: ids.session, request: ids.request.unwrap_or_default() };
        let encrypted = key.encrypt(place, content);
        *content = encrypted.map_err(|error| self.failed(key.number(), &error.to_string()))?;
        Ok(key)
    }

    /// A digest lets whoever guesses the content know that the guess is right: nobody shall who cannot read it anyway.
    fn keyed(
        &self,
        ids: Ids<'_>,
        digest: Option<&mut Option<String>>,
    ) -> Result<Option<Arc<SessionKey>>, RecordingError> {
        let Some((slot, digest)) = digest.and_then(|slot| slot.take().map(|digest| (slot, digest))) else {
            return Ok(None);
        };
        match self.key_of(ids) {
            Ok(key) => {
                *slot = Some(key.key.keyed_digest(&digest));
                Ok(Some(key))
            }
            Err(RecordingError::NoKey(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The session's key; of a pod that has begun more sessions than get one each, the key that those beyond have together.
    fn key_of(&self, ids: Ids<'_>) -> Result<Arc<SessionKey>, RecordingError> {
        let (keys, share) = ids.keys.ok_or_else(|| self.failed(0, "content belongs to a session"))?;
        let key = keys.current.get_or(|| {
            // Before one is spent.
            if let Some(failure) = self.store.failure() {
                return Err(failure);
            }
            let make = || self.make(ids, share);
            if share.takes_key(Instant::now()) { make() } else { share.common_key.get_or(make) }
        })?;
        // While the key service does not answer, one request finds out when it does: the session's others do not wait with it.
        if key.stored().is_none()
            && key.request.as_deref() != ids.request
            && let Some(failure) = self.store.failure().filter(RecordingError::is_of_key_service)
        {
            return Err(failure);
        }
        Ok(key)
    }

    fn make(&self, ids: Ids<'_>, share: &Arc<Share>) -> Result<Arc<SessionKey>, RecordingError> {
        // The number is spent even if it cannot be stored: nobody knows what is on disk then.
        let number = self.made.fetch_add(1, Ordering::Relaxed) + 1;
        let made =
            ContentKey::generate_for_service(self.epoch, number, ids.session, unix_us(), &self.recipients);
        let (key, wrapped, secret) = made.map_err(|error| self.failed(number, &error.to_string()))?;
        let (made, count, request) = (Instant::now(), AtomicU64::new(0), ids.request.map(Into::into));
        let key = Arc::new(SessionKey { key, made, request, count, stored: OnceLock::new() });
        self.store.store(Arc::clone(&key), (wrapped, secret), share);
        Ok(key)
    }

    fn failed(&self, number: u64, reason: &str) -> RecordingError {
        RecordingError::Key { path: self.store.path(number), reason: reason.to_owned() }
    }
}

fn digest_of(body: &mut Option<BodySummary>) -> Option<&mut Option<String>> {
    Some(&mut body.as_mut()?.digest)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        path::Path,
        sync::{
            Arc,
            atomic::{AtomicBool, AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use futures::{FutureExt as _, future::BoxFuture};
    use http::{HeaderMap, Method, StatusCode};
    use tempfile::TempDir;
    use tokio::sync::Semaphore;
    use weir_common::{
        encryption::{Identity, Place, Secret, WrappedKey, wrapped_key_file},
        event::{Bytes, Caller, Channel, Event, FileCopied, Kind, Outcome},
        kms::KmsError,
    };

    use super::{Ids, SessionKeys};
    use crate::{
        recipients::{IDENTITY, RECIPIENT},
        recording::{
            BacklogLimits, Commit, CommitRule, CommitRules, KeyService, PodQuota, Recorder, RecorderOptions,
            RecordingError, WhenBehind, fixture::*, segment::bytes_of_all, share::KEYS_BURST,
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
    async fn keys_whose_files_hang_hold_up_their_own_pods_alone() {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options_for(directory.path())).unwrap();
        disk.hold_files(&[
            "00000000000000000001.new",
            "00000000000000000002.new",
            "00000000000000000003.new",
        ]);
        let others = ["c", "d"].map(|pod| of_pod(pod, None));
        let caller = of_pod("a", None);
        let mut hanging = Box::pin(create(&recorder, &caller, "{\"a\":1}"));
        assert!(hanging.as_mut().now_or_never().is_none());
        let mut also = others.each_ref().map(|caller| Box::pin(create(&recorder, caller, "{\"c\":1}")));
        assert!(also.iter_mut().all(|hanging| hanging.as_mut().now_or_never().is_none()));
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
        drop(also);
        disk.hold_files(&[]);
        drop(hanging.await.unwrap());
        let folder = recorder.folder().to_owned();
        recorder.stop("test").await.unwrap();
        let all = String::from_utf8(decrypted(&folder, &read(&folder))).unwrap();
        assert!(all.starts_with(&"{\"b\":1}".repeat(3)), "{all}");
        assert_eq!(all.matches("\"a\"").count(), 1, "{all}");
    }

    #[tokio::test]
    async fn a_recorder_that_stops_waits_for_keys() {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options_for(directory.path())).unwrap();
        disk.hold_files(&["00000000000000000001.new"]);
        answered(&recorder, &of_pod("a", None), "{\"a\":1}").await;
        let mut stop = Box::pin(recorder.stop("test"));
        assert!(stop.as_mut().now_or_never().is_none());
        disk.hold_files(&[]);
        stop.await.unwrap();
        let folder = recorder.folder();
        assert_eq!(decrypted(folder, &read(folder)), b"{\"a\":1}");
    }

    /// A read, whose answer is its session's first content.
    async fn answered(recorder: &Recorder, caller: &Arc<Caller>, body: &'static str) {
        let (request, attributes) = ((Method::GET, "/api/v1/x"), attributes("get", "configmaps", ""));
        let record = open_as(recorder, caller, request, &attributes, &HeaderMap::new(), None).await.unwrap();
        record.response_started(StatusCode::OK, &content_type(JSON), false);
        record.response_data(&body.into());
        record.close(Outcome::Complete, None);
    }

    /// Mutations are asynchronous.
    fn rules(when_behind: WhenBehind, wait: Duration) -> CommitRules {
        let asynchronous = CommitRule { commit: Some(Commit::Async), ..CommitRule::default() };
        CommitRules {
            rules: vec![asynchronous],
            async_mutations: true,
            when_behind: Some(when_behind),
            backlog: BacklogLimits { wait, ..BacklogLimits::default() },
            ..CommitRules::default()
        }
    }

    #[tokio::test]
    async fn a_mutation_whose_key_is_not_stored_meets_the_policy_though_nobody_waits_for_its_record() {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options_for(directory.path())).unwrap();
        let body = format!("{{\"a\":\"{CANARY}\"}}");
        let a = of_pod("a", None);
        disk.fail_keys(true);
        recorder.set_rules(rules(WhenBehind::Refuse, Duration::ZERO));
        let refused = create(&recorder, &a, &body).await;
        assert!(matches!(refused, Err(RecordingError::NoKey(_))), "{refused:?}");

        recorder.set_rules(rules(WhenBehind::MetadataOnly, Duration::ZERO));
        drop(create(&recorder, &a, &body).await.unwrap());

        recorder.set_rules(rules(WhenBehind::Block, Duration::from_millis(120)));
        let refused = create(&recorder, &a, &body).await;
        assert!(matches!(refused, Err(RecordingError::NoKey(_))), "{refused:?}");
        recorder.set_rules(rules(WhenBehind::Block, Duration::from_secs(60)));
        let mut waits = Box::pin(create(&recorder, &a, "{\"b\":1}"));
        assert!(waits.as_mut().now_or_never().is_none());
        disk.fail_keys(false);
        drop(waits.await.unwrap());

        let folder = recorder.folder().to_owned();
        recorder.stop("test").await.unwrap();
        let events = read(&folder);
        assert_eq!(decrypted(&folder, &events), b"{\"b\":1}");
        let opened: Vec<_> = events
            .iter()
            .filter_map(|event| match &event.kind {
                Kind::RequestOpened(opened) => opened.body.clone(),
                _ => None,
            })
            .collect();
        assert_eq!(opened.len(), 2, "what was refused never happened");
        assert_eq!((opened[0].wire_bytes, &opened[0].digest), (body.len() as u64, &None));
        let gap = events.iter().any(|event| {
            matches!(&event.kind, Kind::Gap { reason, bytes: Some(bytes), .. }
            if reason.starts_with("bodies of this request are left out") && *bytes == body.len() as u64)
        });
        assert!(gap, "{:?}", names(&events));
    }

    #[tokio::test]
    async fn of_an_answer_whose_key_is_not_stored_all_but_the_content_is_recorded() {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options_for(directory.path())).unwrap();
        disk.fail_keys(true);
        answered(&recorder, &of_pod("a", None), "{\"a\":1}").await;
        let folder = recorder.folder().to_owned();
        recorder.stop("test").await.unwrap();
        let events = read(&folder);
        assert!(decrypted(&folder, &events).is_empty());
        let closed = events.iter().any(|event| {
            matches!(&event.kind, Kind::RequestClosed(closed)
            if closed.status == Some(200) && closed.response_bytes == 7)
        });
        assert!(closed, "{:?}", names(&events));
        let lost = |event: &Event| matches!(&event.kind, Kind::Gap { events: Some(1), .. });
        assert!(events.iter().any(lost), "what is lost is counted: {events:?}");
    }

    const ARN: &str = "arn:aws:kms:eu-central-1:123456789012:key/1";

    /// A key service in the hands of a test: it turns keys round.
    #[derive(Debug)]
    struct Service {
        calls: AtomicUsize,
        fails: AtomicBool,
        /// A call takes one for good.
        permits: Semaphore,
    }

    impl Service {
        fn new(permits: usize) -> Arc<Self> {
            let (calls, fails) = (AtomicUsize::new(0), AtomicBool::new(false));
            Arc::new(Self { calls, fails, permits: Semaphore::new(permits) })
        }
    }

    impl KeyService for Service {
        fn name(&self) -> &str {
            ARN
        }

        fn wrap<'a>(
            &'a self,
            secret: &'a Secret,
            context: HashMap<String, String>,
        ) -> BoxFuture<'a, Result<Vec<u8>, KmsError>> {
            Box::pin(async move {
                self.calls.fetch_add(1, Ordering::SeqCst);
                self.permits.acquire().await.unwrap().forget();
                assert_eq!((context["purpose"].as_str(), context.len()), ("weir content key v1", 4));
                if self.fails.load(Ordering::SeqCst) {
                    return Err(KmsError::Throttled);
                }
                Ok(secret.as_bytes().iter().rev().copied().collect())
            })
        }
    }

    fn with_service(directory: &Path, service: &Arc<Service>) -> Recorder {
        let service: Arc<dyn KeyService> = Arc::<Service>::clone(service);
        let options = RecorderOptions { key_service: Some(service), ..options(&directory.join("journal")) };
        on(&Arc::new(TestDisk::default()), options).unwrap()
    }

    #[tokio::test]
    async fn a_key_service_wraps_one_key_of_a_session_and_what_it_unwraps_reads() {
        let (directory, service) = (TempDir::new().unwrap(), Service::new(1));
        let recorder = with_service(directory.path(), &service);
        for _ in 0..3 {
            drop(create(&recorder, &of_pod("a", None), "{\"a\":1}").await.unwrap());
        }
        let folder = recorder.folder().to_owned();
        recorder.stop("test").await.unwrap();
        assert_eq!(service.calls.load(Ordering::SeqCst), 1);
        let wrapped = std::fs::read(folder.join(wrapped_key_file(1))).unwrap();
        let wrapped = WrappedKey::decode(&wrapped).unwrap();
        assert_eq!(wrapped.recipients().count(), 0);
        let (arn, mut secret) = wrapped.by_kms().unwrap();
        assert_eq!(arn, ARN);
        secret.reverse();
        let key = wrapped.unwrapped(&secret).unwrap();
        let contents = read(&folder).into_iter().filter_map(|event| match &event.kind {
            Kind::Content(content) => {
                let place = Place { session: &event.session, request: event.request.as_deref().unwrap() };
                Some(key.decrypt(place, content).unwrap().bytes.to_vec().unwrap())
            }
            _ => None,
        });
        assert_eq!(contents.collect::<Vec<_>>(), [b"{\"a\":1}"; 3]);
    }

    #[tokio::test]
    async fn while_the_key_service_is_away_only_new_sessions_with_content_are_refused_or_wait() {
        let (directory, service) = (TempDir::new().unwrap(), Service::new(1));
        let recorder = with_service(directory.path(), &service);
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|pod| of_pod(pod, None));
        let body = "{\"a\":1}";
        drop(create(&recorder, &a, body).await.unwrap());
        // It does not answer.
        let mut hanging = [&b, &c].map(|pod| Box::pin(create(&recorder, pod, body)));
        assert!(hanging.iter_mut().all(|hanging| hanging.as_mut().now_or_never().is_none()));
        drop(create(&recorder, &a, body).await.unwrap());
        drop(get(&recorder, &attributes("get", "pods", "")).await);
        // It says no.
        service.fails.store(true, Ordering::SeqCst);
        service.permits.add_permits(2);
        for hanging in hanging {
            let refused = hanging.await.unwrap_err();
            assert!(refused.is_of_key_service() && refused.for_client().contains("AWS KMS"), "{refused:?}");
        }
        // While it is tried with one, the others are not kept waiting.
        let mut tried = Box::pin(create(&recorder, &b, body));
        assert!(tried.as_mut().now_or_never().is_none());
        for pod in [&c, &b] {
            let refused = create(&recorder, pod, body).now_or_never().unwrap().unwrap_err();
            assert!(refused.is_of_key_service());
        }
        drop(create(&recorder, &a, body).await.unwrap());
        recorder
            .set_rules(CommitRules { when_behind: Some(WhenBehind::MetadataOnly), ..CommitRules::default() });
        drop(create(&recorder, &d, body).await.unwrap());
        // It is back.
        service.fails.store(false, Ordering::SeqCst);
        service.permits.add_permits(2);
        drop(tried.await.unwrap());
        drop(create(&recorder, &c, body).await.unwrap());
        recorder.stop("test").await.unwrap();
        let events = read(recorder.folder());
        let count = |name| names(&events).into_iter().filter(|of| *of == name).count();
        let left_out = |event: &&Event| matches!(&event.kind, Kind::Gap { reason, .. } if reason.starts_with("bodies of this request are left out"));
        let left_out = events.iter().filter(left_out).count();
        assert_eq!((count("requestOpened"), count("content"), left_out), (7, 5, 1));
    }

    #[tokio::test]
    async fn what_needs_no_key_does_not_wait_behind_a_request_of_its_pod_that_does() {
        let (directory, service) = (TempDir::new().unwrap(), Service::new(0));
        let recorder = with_service(directory.path(), &service);
        let pod = of_pod("a", None);
        let mut hanging = Box::pin(create(&recorder, &pod, "{\"a\":1}"));
        assert!(hanging.as_mut().now_or_never().is_none());
        // Durable before it goes on, and its answer ends when its own record is.
        let (request, attributes) = ((Method::DELETE, "/api/v1/x"), attributes("delete", "configmaps", ""));
        let record = open_as(&recorder, &pod, request, &attributes, &HeaderMap::new(), None).await.unwrap();
        record.response_started(StatusCode::OK, &HeaderMap::new(), false);
        record.close_durably(Outcome::Complete, None).unwrap().await.unwrap();
        assert!(hanging.as_mut().now_or_never().is_none());
        service.permits.add_permits(1);
        let created = hanging.await.unwrap();
        created.response_started(StatusCode::CREATED, &content_type(JSON), false);
        created.close_durably(Outcome::Complete, None).unwrap().await.unwrap();
        drop((record, created));
        recorder.stop("test").await.unwrap();
        let events = read(recorder.folder());
        let of_requests = events.iter().filter(|event| event.request.is_some());
        let mut each: Vec<(&str, Vec<&str>)> = Vec::new();
        for event in of_requests {
            let request = event.request.as_deref().unwrap();
            match each.iter_mut().find(|(of, _)| *of == request) {
                Some((_, names)) => names.push(event.kind.name()),
                None => each.push((request, vec![event.kind.name()])),
            }
        }
        let each: Vec<_> = each.into_iter().map(|(_, names)| names).collect();
        let deleted = ["requestOpened", "responseStarted", "requestClosed"];
        let created = ["requestOpened", "content", "responseStarted", "requestClosed"];
        assert_eq!(each, [&deleted[..], &created[..]], "{:?}", names(&events));
    }

    #[tokio::test]
    async fn what_a_client_says_in_a_stream_is_not_passed_on_without_a_key() {
        let directory = TempDir::new().unwrap();
        let disk = Arc::new(TestDisk::default());
        let recorder = on(&disk, options_for(directory.path())).unwrap();
        disk.fail_keys(true);
        for when_behind in [WhenBehind::Refuse, WhenBehind::MetadataOnly] {
            recorder.set_rules(rules(when_behind, Duration::ZERO));
            let mut headers = HeaderMap::new();
            headers.insert("upgrade", "unknown".parse().unwrap());
            let (request, attributes) = ((Method::POST, "/api/v1/x"), attributes("create", "pods", "exec"));
            let a = of_pod("a", None);
            let record = open_as(&recorder, &a, request, &attributes, &headers, None).await.unwrap();
            record.response_started(StatusCode::SWITCHING_PROTOCOLS, &headers, true);
            let said = record.client_stream_data("rm -r x".into()).await;
            assert!(matches!(said, Err(RecordingError::NoKey(_))), "{said:?}");
            // What the server says is not delayed; that it is missing is recorded.
            record.server_stream_data("done".into()).await.unwrap();
        }
        recorder.stop("test").await.unwrap();
        assert!(decrypted(recorder.folder(), &read(recorder.folder())).is_empty());
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
        let Some(RecordingError::NoKey(why)) = refused else { panic!("{refused:?}") };
        assert!(matches!(*why, RecordingError::Full { .. }), "{why:?}");
        let journal = directory.path().join("journal");
        assert!(bytes_of_all(&FileSystem, &journal).unwrap() <= 600 * 1024);
    }
}
