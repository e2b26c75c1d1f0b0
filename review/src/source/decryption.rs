//! Content that is encrypted, for whoever has the private half of a recipient's key, or may have AWS KMS unwrap it.
//!
//! Nothing that is decrypted is kept: it is made anew whenever it is shown.

use std::{
    cell::RefCell,
    collections::HashMap,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    rc::Rc,
};

use tokio::runtime::{Builder, Runtime};

use uuid::Uuid;
use weir_common::{
    encryption::{
        ContentKey, EncryptionError, Identity, Place, RECIPIENTS_MAX, WRAPPED_KEY_BYTES_MAX, WrappedKey,
        wrapped_key_file,
    },
    event::{Bytes, Event, Kind},
    kms::{KeyArn, Kms, KmsError, KmsKey},
};
use zeroize::Zeroizing;

/// Most bytes of an identity file.
const IDENTITY_BYTES_MAX: u64 = 16 * 1024;
/// Most keys that are kept; then they are unwrapped again.
const KEYS_MAX: usize = 4096;
/// Rights of others than the owner.
const OTHERS: u32 = 0o077;

/// What is wrong with an identity.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    /// It cannot be read.
    #[error("cannot read the identity {path}")]
    File { path: PathBuf, source: io::Error },
    /// Others may.
    #[error("others may read the identity {path} (mode {mode:04o}); set mode 0400")]
    Open { path: PathBuf, mode: u32 },
    /// It is none.
    #[error("{path} is no identity: {reason}")]
    Form { path: PathBuf, reason: String },
    /// More than a key can be wrapped to.
    #[error("more than {RECIPIENTS_MAX} identities are given")]
    TooMany,
    /// The system.
    #[error("cannot make what asks KMS")]
    Runtime(#[source] io::Error),
}

/// For whom content is decrypted.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    identities: Vec<Identity>,
    kms: Option<Service>,
}

/// A key of KMS, asked one key at a time with the credentials of whoever reads.
#[derive(Debug)]
struct Service {
    kms: Kms,
    runtime: Runtime,
    /// Why it is not asked any more: the next key would wait for the same.
    failure: RefCell<Option<KmsError>>,
}

impl Reader {
    /// Reads the identities in these files; KMS is asked when there is something to unwrap, at `AWS_ENDPOINT_URL_KMS` if that is set.
    ///
    /// # Errors
    /// One cannot be read, is not for its user alone, or is none.
    pub(crate) fn new(files: &[PathBuf], key: Option<&KeyArn>) -> Result<Self, IdentityError> {
        let service = |arn: &KeyArn| {
            let runtime =
                Builder::new_current_thread().enable_all().build().map_err(IdentityError::Runtime)?;
            let kms = Kms::new(KmsKey { arn: arn.clone(), endpoint: None });
            Ok(Service { kms, runtime, failure: RefCell::default() })
        };
        Ok(Self { identities: identities(files)?, kms: key.map(service).transpose()? })
    }

    fn unwrap(&self, wrapped: &WrappedKey) -> Result<ContentKey, String> {
        let by_identity = wrapped.unwrap(&self.identities);
        let (Err(EncryptionError::NotForUs), Some(service)) = (&by_identity, &self.kms) else {
            return by_identity.map_err(|error| error.to_string());
        };
        match wrapped.by_kms() {
            Some((arn, ciphertext)) if service.kms.key().unwraps(arn) => {
                let secret = service.unwrap(ciphertext, wrapped).map_err(|error| error.to_string())?;
                wrapped.unwrapped(&secret).map_err(|error| error.to_string())
            }
            _ => by_identity.map_err(|error| error.to_string()),
        }
    }
}

impl Service {
    fn unwrap(&self, ciphertext: Vec<u8>, wrapped: &WrappedKey) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        if let Some(failure) = self.failure.borrow().clone() {
            return Err(failure);
        }
        let unwrapped = self.runtime.block_on(self.kms.unwrap(ciphertext, wrapped.context()));
        // What it says of one key may be otherwise with the next; no answer, and a key that cannot be used, are not.
        if let Err(error @ (KmsError::Unreachable { .. } | KmsError::Unusable { .. })) = &unwrapped {
            *self.failure.borrow_mut() = Some(error.clone());
        }
        unwrapped
    }
}

/// Reads the identities in these files.
///
/// # Errors
/// One cannot be read, is not for its user alone, or is none.
fn identities(files: &[PathBuf]) -> Result<Vec<Identity>, IdentityError> {
    if files.len() > RECIPIENTS_MAX {
        return Err(IdentityError::TooMany);
    }
    files.iter().map(|path| identity(path)).collect()
}

fn identity(path: &Path) -> Result<Identity, IdentityError> {
    let failed = |source| IdentityError::File { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & OTHERS != 0 {
        return Err(IdentityError::Open { path: path.to_owned(), mode });
    }
    let mut pem = Vec::new();
    file.take(IDENTITY_BYTES_MAX).read_to_end(&mut pem).map_err(failed)?;
    let read = Identity::from_pem(&pem);
    // The private half is not left behind.
    pem.fill(0);
    read.map_err(|error| IdentityError::Form { path: path.to_owned(), reason: error.to_string() })
}

/// A key, if it can be had.
type Unwrapped = Option<Rc<ContentKey>>;

/// Unwraps keys and reads content with them.
#[derive(Debug, Default)]
pub(crate) struct Decryption {
    reader: Reader,
    /// Those that were asked for; none: it cannot be had.
    keys: RefCell<HashMap<(Uuid, u64), Unwrapped>>,
}

impl Decryption {
    pub(crate) fn new(reader: Reader) -> Self {
        Self { reader, ..Self::default() }
    }

    /// Whether there is anybody to read for.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.reader.identities.is_empty() || self.reader.kms.is_some()
    }

    /// Decrypts the content in an event, if it is encrypted; `folder` is that of its epoch.
    ///
    /// # Errors
    /// In words; once for each key that cannot be had.
    pub(crate) fn open(&self, event: &mut Event, folder: Option<&Path>) -> Result<(), String> {
        let Kind::Content(content) = &mut event.kind else { return Ok(()) };
        let Bytes::Encrypted { key: number, .. } = content.bytes else { return Ok(()) };
        if !self.is_wanted() {
            return Ok(());
        }
        let named = |error: String| format!("epoch {} key {number}: {error}", event.epoch);
        let epoch = Uuid::try_parse(&event.epoch).map_err(|error| named(error.to_string()))?;
        let known = self.keys.borrow().get(&(epoch, number)).cloned();
        let key = match known {
            Some(key) => key,
            None => {
                let key = self.unwrap(epoch, number, folder);
                let mut keys = self.keys.borrow_mut();
                if keys.len() >= KEYS_MAX {
                    keys.clear();
                }
                keys.insert((epoch, number), key.as_ref().ok().cloned());
                Some(key.map_err(named)?)
            }
        };
        let Some(key) = key else { return Ok(()) };
        let place = Place { session: &event.session, request: event.request.as_deref().unwrap_or_default() };
        *content = key.decrypt(place, content).map_err(|error| named(error.to_string()))?;
        Ok(())
    }

    fn unwrap(&self, epoch: Uuid, number: u64, folder: Option<&Path>) -> Result<Rc<ContentKey>, String> {
        let gone = "the wrapped key is not there: it was erased, and the content with it; or name the topic of keys too";
        let path = folder.ok_or(gone)?.join(wrapped_key_file(number));
        let mut bytes = Vec::new();
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(gone.to_owned()),
            opened => opened
                .and_then(|file| file.take(WRAPPED_KEY_BYTES_MAX as u64 + 1).read_to_end(&mut bytes))
                .map_err(|error| error.to_string())?,
        };
        let wrapped = WrappedKey::decode(&bytes).map_err(|error| error.to_string())?;
        if (wrapped.epoch, wrapped.key) != (epoch, number) {
            return Err("its file holds the wrapped key of something else".to_owned());
        }
        self.reader.unwrap(&wrapped).map(Rc::new)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::PermissionsExt as _,
        path::Path,
    };

    use tempfile::TempDir;
    use weir_common::{
        encryption::{ContentKey, Place, Recipient, wrapped_key_file},
        event::{Bytes, Channel, Content, Kind},
    };

    use super::{Reader, identities};
    use crate::{
        events::{Lines, list},
        fixture::{SESSION, Writer, request},
        source::Journal,
        terminal::Style,
    };

    /// Bob's key of RFC 7748, section 6.1.
    const IDENTITY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VuBCIEIF2rCH5iSopLeeF/i4OADuZvO7EpJhi2/Rwviyf/iODr\n-----END PRIVATE KEY-----\n";
    const RECIPIENT: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=\n-----END PUBLIC KEY-----\n";
    const CANARY: &str = "canary-4711";

    /// A journal with encrypted content, its folder `journal`, and an identity that reads it.
    fn encrypted() -> (TempDir, Writer) {
        let directory = TempDir::new().unwrap();
        let journal = directory.path().join("journal");
        let mut writer = Writer::new(1, 7);
        let recipient = Recipient::from_pem(RECIPIENT.as_bytes()).unwrap();
        let (key, wrapped) = ContentKey::generate(writer.epoch, 1, SESSION, 0, &[recipient]).unwrap();
        let ids = [SESSION, "invocation", "request"];
        let (channel, bytes) = (Channel::ResponseBody, Bytes::from_slice(CANARY.as_bytes()));
        let content = Content { channel, connection: None, offset: 0, bytes };
        let place = Place { session: SESSION, request: ids[2] };
        let content = key.encrypt(place, 0, &content).unwrap();
        writer
            .started()
            .session(SESSION, "user")
            .invocation(SESSION, ids[1], &["kubectl"])
            .open(ids, request("GET", "get", "/api/v1/namespaces/ci/pods/a", "ci"))
            .event(SESSION, ids[1], ids[2], Kind::Content(content))
            .close(ids, 200, 5)
            .commit()
            .checkpoint()
            .save(&journal, 0);
        let folder = journal.join(writer.epoch.to_string());
        fs::write(folder.join(wrapped_key_file(1)), wrapped.encode()).unwrap();
        let identity = directory.path().join("identity.pem");
        fs::write(&identity, IDENTITY).unwrap();
        fs::set_permissions(identity, Permissions::from_mode(0o400)).unwrap();
        (directory, writer)
    }

    fn open(directory: &Path) -> Journal {
        let reader = Reader::new(&[directory.join("identity.pem")], None).unwrap();
        Journal::open(&directory.join("journal")).unwrap().read_by(reader)
    }

    fn listed(journal: &Journal) -> String {
        let mut out = Vec::new();
        list(journal, Lines::new(&mut out, false, None)).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn replayed(journal: &Journal) -> String {
        let (mut out, subject) = (Vec::new(), crate::replay::Subject::Session(SESSION.into()));
        crate::replay::play(journal, &subject, None, None, &mut out, Style::PLAIN).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn content_is_shown_to_whom_it_is_for_and_to_others_that_there_is_some() {
        let (directory, _) = encrypted();
        let [ours, plain] =
            [open(directory.path()), Journal::open(&directory.path().join("journal")).unwrap()];
        assert!(listed(&ours).contains(CANARY) && replayed(&ours).contains(CANARY));
        assert!(listed(&plain).contains("\"encrypted\":{\"key\":1,") && !listed(&plain).contains(CANARY));
        let replayed = replayed(&plain);
        assert!(replayed.contains("--identity FILE") && !replayed.contains(CANARY), "{replayed}");
        for line in listed(&plain).lines().zip(listed(&ours).lines()) {
            assert!(line.0 == line.1 || line.0.contains("\"encrypted\""), "the rest is as it was: {line:?}");
        }
    }

    #[test]
    fn content_is_gone_with_its_wrapped_key_and_the_log_is_whole_without_it() {
        let (directory, writer) = encrypted();
        let journal = directory.path().join("journal");
        fs::remove_file(journal.join(writer.epoch.to_string()).join(wrapped_key_file(1))).unwrap();
        let ours = open(directory.path());
        assert!(!listed(&ours).contains(CANARY));
        let (warnings, more) = ours.warnings();
        assert!(more == 0 && warnings.len() == 1 && warnings[0].contains("it was erased"), "{warnings:?}");
        let options = crate::verify::Options { keys: &[], checkpoint: None, partial: false };
        assert!(crate::verify::verify(&ours, &options).unwrap().is_sound());
    }

    #[test]
    fn an_identity_that_others_may_read_or_that_is_none_is_refused() {
        let (directory, _) = encrypted();
        let path = directory.path().join("identity.pem");
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let refused = identities(std::slice::from_ref(&path)).unwrap_err().to_string();
        assert!(refused.contains("(mode 0640); set mode 0400"), "{refused}");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, RECIPIENT).unwrap();
        let refused = identities(std::slice::from_ref(&path)).unwrap_err().to_string();
        assert!(refused.contains("openssl genpkey -algorithm x25519"), "{refused}");
    }
}
