//! Content that only its recipients read: bodies and streams encrypted under keys that are wrapped to them.
//!
//! Each session has keys of its own. A key encrypts pieces of content (AES-256-GCM); it is wrapped to every recipient (HPKE,
//! RFC 9180: X25519, HKDF-SHA256, AES-256-GCM, base mode) and then forgotten. What is wrapped stands apart from the log:
//! without it nobody reads the content any more, and the log, whose leaves hash what is encrypted, verifies as before.
//! A key of a service (AWS KMS) may stand beside recipients, or instead of them: the same key, wrapped by it.
//! Everything else of an event stays readable. `docs/recording-format.md` describes the bytes; keep both in step. Sans-IO.

use std::{collections::HashMap, time::Duration};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    agreement, hmac,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::{
    crypto::{
        aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_256 as SUITE,
        hpke::{EncapsulatedSecret, Hpke as _, HpkePrivateKey, HpkePublicKey},
    },
    pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer, pem::PemObject as _},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::event::{Bytes, Content};

/// Most recipients of a key.
pub const RECIPIENTS_MAX: usize = 16;

/// How long a key encrypts; then its session gets another one.
pub const KEY_LIFE: Duration = Duration::from_hours(24);

/// Most bytes of a wrapped key's file or message.
pub const WRAPPED_KEY_BYTES_MAX: usize = 16 * 1024;

/// Ending of the name of a wrapped key's file.
pub const WRAPPED_KEY_SUFFIX: &str = ".key";

/// Version of the form of wrapped keys.
const VERSION: u32 = 1;
/// Its algorithms, as RFC 9180 names them.
const ALGORITHMS: &str = "DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM";
/// What HPKE binds a wrapped key to.
const INFO: &[u8] = b"weir content key v1";
/// What a piece of content is bound to, beside its place.
const CONTENT: &str = "weir content v1";
/// What the key of digests is made of, with the key itself.
const DIGEST: &[u8] = b"weir digest key v1";
/// What a digest begins with that is made with a key; the key's number follows.
const KEYED_DIGEST: &str = "content-hmac-sha256:";
const KEY_BYTES: usize = 32;
/// What stands between epoch and number in the Kafka key of a wrapped key.
const MESSAGE_KEY: &str = "key";

/// What stands before an X25519 key in DER, as RFC 8410 has it: one way to write it only.
const PUBLIC_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x03, 0x21, 0x00];
const PRIVATE_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x04, 0x22, 0x04, 0x20];

/// Why content cannot be encrypted or read. Never says anything of keys or content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncryptionError {
    /// Not a recipient.
    #[error(
        "it holds no X25519 public key in PEM; make one with `openssl pkey -in identity.pem -pubout -out recipient.pem`"
    )]
    Recipient,
    /// Not an identity.
    #[error(
        "it holds no X25519 private key in PKCS#8 PEM; make one with `openssl genpkey -algorithm x25519 -out identity.pem`"
    )]
    Identity,
    /// The library refused; a recipient's key is perhaps one that agrees on nothing.
    #[error("a key cannot be wrapped to the recipients; is one of them a point of small order?")]
    Wrap,
    /// A wrapped key that this version does not understand.
    #[error("it is no wrapped key of a version that is known")]
    Form,
    /// It is wrapped to others.
    #[error("it is wrapped to others than the identities, or the KMS key, that are given")]
    NotForUs,
    /// Wrapped key or content were changed, or belong somewhere else.
    #[error("it was changed, or belongs somewhere else")]
    Changed,
    /// A key may not encrypt more.
    #[error("the key has encrypted all that it may")]
    Spent,
}

/// The name of a public key: the first eight bytes of its SHA-256, in hex.
fn name_of(public: &[u8]) -> String {
    hex::encode(Sha256::digest(public).get(..8).unwrap_or_default())
}

/// Whom content is for.
#[derive(Clone, Debug)]
pub struct Recipient {
    public: HpkePublicKey,
    name: String,
}

impl Recipient {
    /// From a public key in PEM.
    ///
    /// # Errors
    /// It is none of X25519.
    pub fn from_pem(pem: &[u8]) -> Result<Self, EncryptionError> {
        let der = SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|_| EncryptionError::Recipient)?;
        let public = der.strip_prefix(&PUBLIC_PREFIX).filter(|public| public.len() == KEY_BYTES);
        let public = public.ok_or(EncryptionError::Recipient)?.to_vec();
        Ok(Self { name: name_of(&public), public: HpkePublicKey(public) })
    }

    /// What wrapped keys call it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Who may read. Does not show itself.
pub struct Identity {
    private: Zeroizing<Vec<u8>>,
    name: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.name)
    }
}

impl Identity {
    /// From a private key in PEM, as `openssl genpkey -algorithm x25519` makes it.
    ///
    /// # Errors
    /// It is none of X25519.
    pub fn from_pem(pem: &[u8]) -> Result<Self, EncryptionError> {
        let wrong = EncryptionError::Identity;
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|_| wrong)?;
        let private = der.secret_pkcs8_der().strip_prefix(&PRIVATE_PREFIX);
        let private = private.filter(|private| private.len() == KEY_BYTES).ok_or(wrong)?;
        let key = agreement::PrivateKey::from_private_key(&agreement::X25519, private).map_err(|_| wrong)?;
        let public = key.compute_public_key().map_err(|_| wrong)?;
        Ok(Self { private: Zeroizing::new(private.to_vec()), name: name_of(public.as_ref()) })
    }
}

/// Where a piece of content stands: it cannot be read anywhere else.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The session's id.
    pub session: &'a str,
    /// The request's id.
    pub request: &'a str,
}

/// A key of a session. Does not show itself.
pub struct ContentKey {
    epoch: Uuid,
    number: u64,
    key: LessSafeKey,
    digests: hmac::Key,
}

impl std::fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ContentKey({}/{})", self.epoch, self.number)
    }
}

/// A key as its recipients get it: JSON, for a file or a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WrappedKey {
    version: u32,
    /// Epoch of the agent that encrypts with it.
    pub epoch: Uuid,
    /// Number in the epoch, from 1: the `key id` of envelopes.
    pub key: u64,
    /// The session whose content it encrypts.
    pub session: String,
    /// When it was made, in microseconds since the Unix epoch.
    pub time_unix_us: i64,
    algorithms: String,
    recipients: Vec<Wrapped>,
    /// The same key, wrapped by AWS KMS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kms: Option<WrappedByKms>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrappedByKms {
    /// ARN of the key that it is wrapped with.
    key: String,
    /// KMS's ciphertext, base64.
    wrapped: String,
}

/// The key itself, on its way to a service that wraps it; wiped when dropped. Does not show itself.
pub struct Secret(Zeroizing<[u8; KEY_BYTES]>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_slice()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wrapped {
    /// [`Recipient::name`].
    recipient: String,
    /// HPKE's encapsulated key, base64.
    encapsulated: String,
    /// The wrapped key, base64.
    wrapped: String,
}

/// Number of the key that a digest is made with; none of one that anybody can make.
pub fn key_of_digest(digest: &str) -> Option<u64> {
    digest.strip_prefix(KEYED_DIGEST)?.split_once(':')?.0.parse().ok()
}

/// Name of a wrapped key's file in the folder of its epoch.
pub fn wrapped_key_file(key: u64) -> String {
    format!("{key:020}{WRAPPED_KEY_SUFFIX}")
}

/// What a key is bound to when it is wrapped.
fn key_context(epoch: &Uuid, key: u64, session: &str) -> Vec<u8> {
    // An array of strings and numbers always serialises.
    serde_json::to_vec(&(epoch, key, session)).unwrap_or_default()
}

/// The same content in other bytes.
fn with(content: &Content, bytes: Bytes) -> Content {
    let Content { channel, connection, offset, .. } = content;
    Content { channel: *channel, connection: *connection, offset: *offset, bytes }
}

/// Kafka key of a wrapped key: who writes no value to it erases it.
pub fn message_key(epoch: &Uuid, key: u64) -> String {
    format!("{epoch}/{MESSAGE_KEY}/{key}")
}

/// Epoch and number of a wrapped key's message; none of other messages.
pub fn of_message_key(message_key: &[u8]) -> Option<(Uuid, u64)> {
    let text = std::str::from_utf8(message_key).ok()?;
    let (epoch, number) = text.split_once('/')?;
    let number = number.strip_prefix(MESSAGE_KEY)?.strip_prefix('/')?;
    let (epoch, number) = (Uuid::try_parse(epoch).ok()?, number.parse().ok()?);
    // As agents spell it, and nothing else.
    (self::message_key(&epoch, number) == text).then_some((epoch, number))
}

impl ContentKey {
    /// Makes a key for a session and wraps it to the recipients; nothing else has it then.
    ///
    /// # Errors
    /// There is no recipient, or too many, or one whose key is of no use.
    pub fn generate(
        epoch: Uuid,
        number: u64,
        session: &str,
        time_unix_us: i64,
        recipients: &[Recipient],
    ) -> Result<(Self, WrappedKey), EncryptionError> {
        if recipients.is_empty() {
            return Err(EncryptionError::Wrap);
        }
        let (key, wrapped, _) = Self::generate_for_service(epoch, number, session, time_unix_us, recipients)?;
        Ok((key, wrapped))
    }

    /// The same for a service that wraps the key as well, or alone: it has to be handed to it.
    ///
    /// # Errors
    /// There are too many recipients, or one whose key is of no use.
    pub fn generate_for_service(
        epoch: Uuid,
        number: u64,
        session: &str,
        time_unix_us: i64,
        recipients: &[Recipient],
    ) -> Result<(Self, WrappedKey, Secret), EncryptionError> {
        if recipients.len() > RECIPIENTS_MAX {
            return Err(EncryptionError::Wrap);
        }
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        aws_lc_rs::rand::fill(key.as_mut_slice()).map_err(|_| EncryptionError::Wrap)?;
        let context = key_context(&epoch, number, session);
        let wrap = |recipient: &Recipient| {
            let sealed = SUITE.seal(INFO, &context, key.as_slice(), &recipient.public);
            let (EncapsulatedSecret(encapsulated), wrapped) = sealed.map_err(|_| EncryptionError::Wrap)?;
            Ok(Wrapped {
                recipient: recipient.name.clone(),
                encapsulated: STANDARD.encode(encapsulated),
                wrapped: STANDARD.encode(wrapped),
            })
        };
        let wrapped = WrappedKey {
            version: VERSION,
            epoch,
            key: number,
            session: session.to_owned(),
            time_unix_us,
            algorithms: ALGORITHMS.to_owned(),
            recipients: recipients.iter().map(wrap).collect::<Result<_, _>>()?,
            kms: None,
        };
        Ok((Self::new(epoch, number, key.as_slice())?, wrapped, Secret(key)))
    }

    fn new(epoch: Uuid, number: u64, key: &[u8]) -> Result<Self, EncryptionError> {
        let unbound = UnboundKey::new(&AES_256_GCM, key).map_err(|_| EncryptionError::Changed)?;
        let digests = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), DIGEST);
        let digests = hmac::Key::new(hmac::HMAC_SHA256, digests.as_ref());
        Ok(Self { epoch, number, key: LessSafeKey::new(unbound), digests })
    }

    /// A digest of content that only who has the key can hold against a guess.
    pub fn keyed_digest(&self, digest: &str) -> String {
        let keyed = hmac::sign(&self.digests, digest.as_bytes());
        format!("{KEYED_DIGEST}{}:{}", self.number, hex::encode(keyed))
    }

    /// Its number: the `key id` of envelopes.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Encrypts content. `count` must be another one each time: the nonce is made of it.
    ///
    /// # Errors
    /// It is encrypted already, or the library refuses.
    pub fn encrypt(
        &self,
        place: Place<'_>,
        count: u64,
        content: &Content,
    ) -> Result<Content, EncryptionError> {
        let mut bytes = content.bytes.to_vec().map_err(|_| EncryptionError::Changed)?;
        let mut nonce = [0; NONCE_LEN];
        nonce[NONCE_LEN - 8..].copy_from_slice(&count.to_be_bytes());
        let aad = Aad::from(self.context(place, content));
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut bytes)
            .map_err(|_| EncryptionError::Spent)?;
        let data = STANDARD.encode([nonce.as_slice(), &bytes].concat());
        Ok(with(content, Bytes::Encrypted { key: self.number, data }))
    }

    /// Decrypts content; what is not encrypted stays as it is.
    ///
    /// # Errors
    /// It was changed, stands elsewhere than where it was written, or is encrypted with another key.
    pub fn decrypt(&self, place: Place<'_>, content: &Content) -> Result<Content, EncryptionError> {
        let Bytes::Encrypted { data, .. } = &content.bytes else { return Ok(content.clone()) };
        let sealed = STANDARD.decode(data).map_err(|_| EncryptionError::Changed)?;
        let (nonce, sealed) = sealed.split_at_checked(NONCE_LEN).ok_or(EncryptionError::Changed)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| EncryptionError::Changed)?;
        let mut sealed = sealed.to_vec();
        let aad = Aad::from(self.context(place, content));
        let opened = self.key.open_in_place(nonce, aad, &mut sealed).map_err(|_| EncryptionError::Changed)?;
        Ok(with(content, Bytes::from_slice(opened)))
    }

    fn context(&self, place: Place<'_>, content: &Content) -> Vec<u8> {
        let Place { session, request } = place;
        let Content { channel, connection, offset, .. } = content;
        let bound = (CONTENT, &self.epoch, self.number, session, request, channel, connection, offset);
        // An array of strings and numbers always serialises.
        serde_json::to_vec(&bound).unwrap_or_default()
    }
}

/// What KMS binds a session's key to, and shows in its own log (CloudTrail): in clear, and without anything that only content says.
pub fn kms_context(epoch: Uuid, key: u64, session: &str) -> HashMap<String, String> {
    let purpose = String::from_utf8_lossy(INFO).into_owned();
    let pairs = [
        ("purpose", purpose),
        ("epoch", epoch.to_string()),
        ("key", key.to_string()),
        ("session", session.to_owned()),
    ];
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

impl WrappedKey {
    /// Its bytes, for a file or a message.
    pub fn encode(&self) -> Vec<u8> {
        // Strings and numbers always serialise.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The way back.
    ///
    /// # Errors
    /// It is none, or one of a later version.
    pub fn decode(bytes: &[u8]) -> Result<Self, EncryptionError> {
        if bytes.len() > WRAPPED_KEY_BYTES_MAX {
            return Err(EncryptionError::Form);
        }
        let wrapped: Self = serde_json::from_slice(bytes).map_err(|_| EncryptionError::Form)?;
        let is_known = wrapped.version == VERSION && wrapped.algorithms == ALGORITHMS;
        is_known.then_some(wrapped).ok_or(EncryptionError::Form)
    }

    /// What KMS binds it to.
    pub fn context(&self) -> HashMap<String, String> {
        kms_context(self.epoch, self.key, &self.session)
    }

    /// The same, with what KMS made of the key.
    #[must_use]
    pub fn with_kms(self, arn: &str, wrapped: &[u8]) -> Self {
        let kms = WrappedByKms { key: arn.to_owned(), wrapped: STANDARD.encode(wrapped) };
        Self { kms: Some(kms), ..self }
    }

    /// ARN of the KMS key that it is wrapped with, and the ciphertext; none if it is not.
    pub fn by_kms(&self) -> Option<(&str, Vec<u8>)> {
        let kms = self.kms.as_ref()?;
        Some((&kms.key, STANDARD.decode(&kms.wrapped).ok()?))
    }

    /// The key, of what KMS unwrapped.
    ///
    /// # Errors
    /// It is none.
    pub fn unwrapped(&self, secret: &[u8]) -> Result<ContentKey, EncryptionError> {
        ContentKey::new(self.epoch, self.key, secret)
    }

    /// The names of those whom it is wrapped to.
    pub fn recipients(&self) -> impl Iterator<Item = &str> {
        self.recipients.iter().map(|wrapped| wrapped.recipient.as_str())
    }

    /// The key, if it is for one of the identities.
    ///
    /// # Errors
    /// It is for others, or was changed.
    pub fn unwrap(&self, identities: &[Identity]) -> Result<ContentKey, EncryptionError> {
        let of = |wrapped: &Wrapped| identities.iter().find(|identity| identity.name == wrapped.recipient);
        let (wrapped, identity) = self
            .recipients
            .iter()
            .take(RECIPIENTS_MAX)
            .find_map(|wrapped| Some((wrapped, of(wrapped)?)))
            .ok_or(EncryptionError::NotForUs)?;
        let decoded = |text: &str| STANDARD.decode(text).map_err(|_| EncryptionError::Changed);
        let encapsulated = EncapsulatedSecret(decoded(&wrapped.encapsulated)?);
        let private = HpkePrivateKey::from(identity.private.to_vec());
        let context = key_context(&self.epoch, self.key, &self.session);
        let opened = SUITE.open(&encapsulated, INFO, &context, &decoded(&wrapped.wrapped)?, &private);
        let key = Zeroizing::new(opened.map_err(|_| EncryptionError::Changed)?);
        ContentKey::new(self.epoch, self.key, &key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Channel, Connection};

    /// As `openssl genpkey -algorithm x25519` and `openssl pkey -pubout` write them; the key is Bob's of RFC 7748, section 6.1.
    const IDENTITY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VuBCIEIF2rCH5iSopLeeF/i4OADuZvO7EpJhi2/Rwviyf/iODr\n-----END PRIVATE KEY-----\n";
    const RECIPIENT: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=\n-----END PUBLIC KEY-----\n";

    fn pem(kind: &str, prefix: &[u8], key: &[u8]) -> String {
        let body = STANDARD.encode([prefix, key].concat());
        format!("-----BEGIN {kind} KEY-----\n{body}\n-----END {kind} KEY-----\n")
    }

    /// Private and public half.
    fn pair(seed: u8) -> (Identity, Recipient) {
        let private = agreement::PrivateKey::from_private_key(&agreement::X25519, &[seed; 32]).unwrap();
        let public = private.compute_public_key().unwrap();
        let identity = Identity::from_pem(pem("PRIVATE", &PRIVATE_PREFIX, &[seed; 32]).as_bytes()).unwrap();
        let recipient =
            Recipient::from_pem(pem("PUBLIC", &PUBLIC_PREFIX, public.as_ref()).as_bytes()).unwrap();
        (identity, recipient)
    }

    fn content() -> Content {
        let (channel, bytes) = (Channel::ResponseBody, Bytes::from_slice(b"a canary"));
        Content { channel, connection: None, offset: 7, bytes }
    }

    const PLACE: Place<'_> = Place { session: "s", request: "r" };

    #[test]
    fn every_recipient_reads_it_and_nobody_else() {
        let [(one, to_one), (other, to_other), (stranger, _)] = [1, 2, 3].map(pair);
        let (epoch, recipients) = (Uuid::from_u128(5), [to_one, to_other]);
        let (key, wrapped) = ContentKey::generate(epoch, 9, "s", 1, &recipients).unwrap();
        let encrypted = key.encrypt(PLACE, 1, &content()).unwrap();
        let digest = key.keyed_digest("sha256:00");
        assert!(digest.starts_with("content-hmac-sha256:9:") && digest != key.keyed_digest("sha256:01"));
        assert_eq!(key_of_digest(&digest), Some(9));
        assert!(
            ["sha256:00", "content-hmac-sha256:9", "hmac-sha256:9:00"]
                .into_iter()
                .all(|of| key_of_digest(of).is_none())
        );
        let json = serde_json::to_string(&encrypted).unwrap();
        assert!(json.contains("\"encrypted\":{\"key\":9,\"data\":\"") && !json.contains("canary"), "{json}");
        assert_ne!(key.encrypt(PLACE, 2, &content()).unwrap(), encrypted);
        let bytes = wrapped.encode();
        assert!(bytes.len() < WRAPPED_KEY_BYTES_MAX / RECIPIENTS_MAX);
        let wrapped = WrappedKey::decode(&bytes).unwrap();
        assert_eq!(wrapped.recipients().count(), 2);
        for identity in [one, other] {
            let key = wrapped.unwrap(&[pair(3).0, identity]).unwrap();
            assert_eq!(key.decrypt(PLACE, &encrypted).unwrap(), content());
            assert_eq!(key.keyed_digest("sha256:00"), digest, "who reads can check it");
        }
        assert_eq!(wrapped.unwrap(&[stranger]).unwrap_err(), EncryptionError::NotForUs);
        assert_eq!(key.decrypt(PLACE, &content()).unwrap(), content(), "what is clear stays so");
    }

    #[test]
    fn what_was_changed_or_moved_is_not_read() {
        let (identity, recipient) = pair(1);
        let epoch = Uuid::from_u128(5);
        let (key, wrapped) = ContentKey::generate(epoch, 9, "s", 1, &[recipient]).unwrap();
        let encrypted = key.encrypt(PLACE, 1, &content()).unwrap();
        let moved = [
            (Place { session: "t", ..PLACE }, encrypted.clone()),
            (Place { request: "q", ..PLACE }, encrypted.clone()),
            (PLACE, Content { offset: 8, ..encrypted.clone() }),
            (PLACE, Content { channel: Channel::RequestBody, ..encrypted.clone() }),
            (PLACE, Content { connection: Some(Connection { port: 1, id: 1 }), ..encrypted.clone() }),
            (PLACE, Content { bytes: Bytes::Encrypted { key: 9, data: "AAAA".into() }, ..encrypted.clone() }),
            (PLACE, Content { bytes: Bytes::Encrypted { key: 9, data: "?".into() }, ..encrypted }),
        ];
        for (place, content) in moved {
            assert_eq!(key.decrypt(place, &content).unwrap_err(), EncryptionError::Changed);
        }
        let identities = [identity];
        for changed in [
            WrappedKey { key: 8, ..wrapped.clone() },
            WrappedKey { session: "t".into(), ..wrapped.clone() },
            WrappedKey { epoch: Uuid::from_u128(6), ..wrapped.clone() },
        ] {
            assert_eq!(changed.unwrap(&identities).unwrap_err(), EncryptionError::Changed);
        }
        for later in
            [WrappedKey { version: 2, ..wrapped.clone() }, WrappedKey { algorithms: "x".into(), ..wrapped }]
        {
            assert_eq!(WrappedKey::decode(&later.encode()), Err(EncryptionError::Form));
        }
        assert_eq!(WrappedKey::decode(&vec![b' '; WRAPPED_KEY_BYTES_MAX + 1]), Err(EncryptionError::Form));
    }

    #[test]
    fn keys_of_another_kind_or_of_no_use_are_refused_and_never_shown() {
        let (identity, recipient) = pair(1);
        assert_eq!(format!("{identity:?}"), format!("Identity({})", recipient.name()));
        let private = pem("PRIVATE", &PRIVATE_PREFIX, &[1; 32]);
        for wrong in ["", "x", &private, &pem("PUBLIC", &PUBLIC_PREFIX, &[1; 31])] {
            assert_eq!(Recipient::from_pem(wrong.as_bytes()).unwrap_err(), EncryptionError::Recipient);
        }
        let ed25519 = private.replace("BQYDK2Vu", "BQYDK2Vw");
        for wrong in ["", &ed25519, &pem("PRIVATE", &PRIVATE_PREFIX, &[1; 33])] {
            assert_eq!(Identity::from_pem(wrong.as_bytes()).unwrap_err(), EncryptionError::Identity);
        }
        // All agree on zeros with it.
        let zero = Recipient::from_pem(pem("PUBLIC", &PUBLIC_PREFIX, &[0; 32]).as_bytes()).unwrap();
        let made = ContentKey::generate(Uuid::nil(), 1, "s", 0, &[zero]);
        assert_eq!(made.unwrap_err(), EncryptionError::Wrap);
        assert_eq!(ContentKey::generate(Uuid::nil(), 1, "s", 0, &[]).unwrap_err(), EncryptionError::Wrap);
    }

    #[test]
    fn the_kafka_key_of_a_wrapped_key_is_spelt_in_one_way() {
        let epoch = Uuid::from_u128(5);
        assert_eq!(of_message_key(message_key(&epoch, 7).as_bytes()), Some((epoch, 7)));
        let simple = epoch.simple();
        for other in ["", "7", &format!("{epoch}/7"), &format!("{epoch}/key/07"), &format!("{simple}/key/7")]
        {
            assert_eq!(of_message_key(other.as_bytes()), None, "{other}");
        }
        assert_eq!(of_message_key(b"\xff"), None);
    }

    /// What a version wrote, all later ones read.
    #[test]
    fn a_key_and_content_of_version_1_are_read() {
        let identities = [Identity::from_pem(IDENTITY.as_bytes()).unwrap()];
        assert_eq!(Recipient::from_pem(RECIPIENT.as_bytes()).unwrap().name(), identities[0].name);
        let wrapped = WrappedKey::decode(include_bytes!("golden/content-key-v1.json")).unwrap();
        let content: Content =
            serde_json::from_slice(include_bytes!("golden/encrypted-content-v1.json")).unwrap();
        let read = wrapped.unwrap(&identities).unwrap().decrypt(PLACE, &content).unwrap();
        assert_eq!(read.bytes.to_vec().unwrap(), b"a canary");
    }
}
