//! Keys of sessions: made with the first content of a session, wrapped to the recipients beside the log, used from memory.
//!
//! A wrapped key is on disk before anything that it encrypted can be. No key outlives its day, so that what a key reads is
//! bounded in time, and its file can go once what it encrypted is gone.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use uuid::Uuid;
use weir_common::{
    encryption::{ContentKey, KEY_LIFE, Place, Recipient, wrapped_key_file},
    event::{BodySummary, Content, Kind},
};

use super::{
    entry::{Ids, unix_us},
    error::RecordingError,
};
use crate::storage::{self, Storage};

/// Most keys in memory; then all sessions get new ones.
const KEYS_MAX: usize = 4096;

/// Encrypts content for recipients.
#[derive(Debug)]
pub(super) struct Encryption {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    epoch: Uuid,
    recipients: Vec<Recipient>,
    keys: Mutex<Keys>,
}

#[derive(Debug, Default)]
struct Keys {
    /// How many were made.
    made: u64,
    of_sessions: HashMap<String, Arc<SessionKey>>,
}

#[derive(Debug)]
struct SessionKey {
    key: ContentKey,
    made: Instant,
    /// Pieces that it encrypted.
    count: AtomicU64,
}

impl Encryption {
    /// For the epoch in this folder; none without recipients.
    pub(super) fn new(
        storage: &Arc<dyn Storage>,
        folder: PathBuf,
        epoch: Uuid,
        recipients: Vec<Recipient>,
    ) -> Option<Self> {
        let keys = Mutex::default();
        (!recipients.is_empty()).then(|| Self {
            storage: Arc::clone(storage),
            folder,
            epoch,
            recipients,
            keys,
        })
    }

    /// Encrypts the content in an event, and keys the digests of content; returns the number of the key, 0 if none was needed.
    ///
    /// # Errors
    /// The key cannot be made or stored: nothing may be recorded in clear instead.
    pub(super) fn protect(&self, ids: Ids<'_>, mut kind: Kind) -> Result<(Kind, u64), RecordingError> {
        let number = match &mut kind {
            Kind::Content(content) => self.encrypt(ids, content)?,
            Kind::RequestOpened(opened) => self.keyed(ids, digest_of(&mut opened.body))?,
            Kind::RequestClosed(closed) => self.keyed(ids, digest_of(&mut closed.body))?,
            Kind::FileCopied(file) => self.keyed(ids, file.digest.as_mut())?,
            _ => 0,
        };
        Ok((kind, number))
    }

    fn encrypt(&self, ids: Ids<'_>, content: &mut Content) -> Result<u64, RecordingError> {
        let key = self.key_of(ids.session)?;
        let place = Place { session: ids.session, request: ids.request.unwrap_or_default() };
        let count = key.count.fetch_add(1, Ordering::Relaxed);
        let encrypted = key.key.encrypt(place, count, content);
        *content = encrypted.map_err(|error| self.failed(&key.key, &error.to_string()))?;
        Ok(key.key.number())
    }

    /// A digest lets whoever guesses the content know that the guess is right: nobody shall who cannot read it anyway.
    fn keyed(&self, ids: Ids<'_>, digest: Option<&mut String>) -> Result<u64, RecordingError> {
        let Some(digest) = digest else { return Ok(0) };
        let key = self.key_of(ids.session)?;
        *digest = key.key.keyed_digest(digest);
        Ok(key.key.number())
    }

    fn key_of(&self, session: &str) -> Result<Arc<SessionKey>, RecordingError> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = keys.of_sessions.get(session).filter(|key| key.made.elapsed() < KEY_LIFE) {
            return Ok(Arc::clone(key));
        }
        let number = keys.made + 1;
        let path = self.folder.join(wrapped_key_file(number));
        let made = ContentKey::generate(self.epoch, number, session, unix_us(), &self.recipients);
        let (key, wrapped) =
            made.map_err(|error| RecordingError::Key { path: path.clone(), reason: error.to_string() })?;
        // The number is spent even if this fails: nobody knows what is on disk then.
        keys.made = number;
        storage::replace(self.storage.as_ref(), &path, &wrapped.encode())
            .map_err(|error| RecordingError::storage(&path, error))?;
        if keys.of_sessions.len() >= KEYS_MAX {
            keys.of_sessions.clear();
        }
        let key = Arc::new(SessionKey { key, made: Instant::now(), count: AtomicU64::new(0) });
        keys.of_sessions.insert(session.to_owned(), Arc::clone(&key));
        Ok(key)
    }

    fn failed(&self, key: &ContentKey, reason: &str) -> RecordingError {
        let path = self.folder.join(wrapped_key_file(key.number()));
        RecordingError::Key { path, reason: reason.to_owned() }
    }
}

fn digest_of(body: &mut Option<BodySummary>) -> Option<&mut String> {
    body.as_mut()?.digest.as_mut()
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use tempfile::TempDir;
    use uuid::Uuid;
    use weir_common::{
        encryption::{Identity, Place, Recipient, WrappedKey, wrapped_key_file},
        event::{Bytes, Channel, Event, FileCopied, Kind},
    };

    use super::{Encryption, Ids};
    use crate::{
        recipients::{IDENTITY, RECIPIENT},
        recording::{RecorderOptions, fixture::*},
        storage::{FileSystem, Storage},
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

    #[test]
    fn digests_of_copied_files_are_keyed_and_what_holds_no_content_needs_no_key() {
        let directory = TempDir::new().unwrap();
        let storage: Arc<dyn Storage> = Arc::new(FileSystem);
        let recipients = vec![Recipient::from_pem(RECIPIENT.as_bytes()).unwrap()];
        let epoch = Uuid::from_u128(1);
        let encryption = Encryption::new(&storage, directory.path().to_owned(), epoch, recipients).unwrap();
        let ids = Ids { session: "s", ..Ids::default() };
        let linked = FileCopied {
            channel: Channel::Stdin,
            path: "a".into(),
            bytes: 0,
            digest: None,
            link_target: Some("b".into()),
            passed_bytes: None,
        };
        let copied = FileCopied { digest: Some("sha256:00".into()), link_target: None, ..linked.clone() };
        assert_eq!(encryption.protect(ids, Kind::FileCopied(Box::new(linked))).unwrap().1, 0);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let (kind, number) = encryption.protect(ids, Kind::FileCopied(Box::new(copied))).unwrap();
        let Kind::FileCopied(copied) = kind else { panic!("{kind:?}") };
        assert!(copied.digest.unwrap().starts_with("content-hmac-sha256:1:"));
        assert_eq!(number, 1);
        assert!(directory.path().join(wrapped_key_file(1)).exists());
    }
}
