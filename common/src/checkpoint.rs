//! Signed checkpoints of the log: C2SP `tlog-checkpoint` in a C2SP `signed-note`, with Ed25519.
//!
//! A checkpoint says: the log named `origin` had `size` events and this Merkle root. Whoever keeps one can prove
//! later that nothing before it was changed. Formats: <https://c2sp.org/tlog-checkpoint> and
//! <https://c2sp.org/signed-note>. Sans-IO; where keys live is the agent's matter.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use sha2::{Digest as _, Sha256};

use crate::merkle::Hash;

/// Most bytes of a signed note that is parsed.
pub const NOTE_BYTES_MAX: usize = 16 * 1024;

/// Signature type of Ed25519 in the signed-note format.
const ED25519: u8 = 1;

/// The state of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Name of the log: `weir/<node>/<epoch>`.
    pub origin: String,
    /// Number of events.
    pub size: u64,
    /// Merkle root over them.
    pub root: Hash,
}

/// Why a note, a checkpoint or a key is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Not a signed note.
    #[error("not a signed note: {reason}")]
    Note {
        /// What is wrong.
        reason: &'static str,
    },
    /// The note's text is not a checkpoint.
    #[error("not a checkpoint: {reason}")]
    Text {
        /// What is wrong.
        reason: &'static str,
    },
    /// The verifier key cannot be read.
    #[error("not a verifier key of the form name+hash+base64: {reason}")]
    Key {
        /// What is wrong.
        reason: &'static str,
    },
    /// The note carries no signature by this key.
    #[error("checkpoint has no signature by key {name}+{id:08x}")]
    Unsigned {
        /// The key's name.
        name: String,
        /// The key's id.
        id: u32,
    },
    /// The signature is wrong.
    #[error("signature by key {name}+{id:08x} does not match the checkpoint")]
    Signature {
        /// The key's name.
        name: String,
        /// The key's id.
        id: u32,
    },
}

impl Checkpoint {
    /// The text that is signed.
    pub fn text(&self) -> String {
        format!("{}\n{}\n{}\n", self.origin, self.size, STANDARD.encode(self.root))
    }

    /// Reads a checkpoint's text; extension lines after the root are allowed and ignored.
    ///
    /// # Errors
    /// The text is not a checkpoint.
    pub fn parse(text: &str) -> Result<Self, CheckpointError> {
        let wrong = |reason| CheckpointError::Text { reason };
        let mut lines = text.strip_suffix('\n').ok_or(wrong("it does not end with a newline"))?.split('\n');
        let origin = lines.next().filter(|line| !line.is_empty()).ok_or(wrong("origin is missing"))?;
        let size = lines.next().ok_or(wrong("size is missing"))?;
        let canonical = size == "0" || (!size.starts_with('0') && size.bytes().all(|b| b.is_ascii_digit()));
        let size = size.parse().ok().filter(|_| canonical).ok_or(wrong("size is not a decimal number"))?;
        let root = lines.next().ok_or(wrong("root is missing"))?;
        let root = STANDARD.decode(root).ok().and_then(|bytes| Hash::try_from(bytes).ok());
        let root = root.ok_or(wrong("root is not 32 bytes in base64"))?;
        if lines.any(str::is_empty) {
            return Err(wrong("an extension line is empty"));
        }
        Ok(Self { origin: origin.to_owned(), size, root })
    }

    /// Signs the checkpoint: a complete signed note.
    pub fn sign(&self, signer: &NoteSigner) -> String {
        let text = self.text();
        let signature = signer.key.sign(text.as_bytes());
        let mut blob = signer.verifier.id.to_be_bytes().to_vec();
        blob.extend_from_slice(&signature.to_bytes());
        format!("{text}\n\u{2014} {} {}\n", signer.verifier.name, STANDARD.encode(blob))
    }

    /// Verifies a signed note with this key and returns its checkpoint. Signatures by other keys are ignored.
    ///
    /// # Errors
    /// Not a signed note, not signed by this key, or not a checkpoint.
    pub fn verify(note: &str, verifier: &NoteVerifier) -> Result<Self, CheckpointError> {
        let (text, signatures) = split_note(note)?;
        let (name, id) = (verifier.name.clone(), verifier.id);
        let Some(signature) = signatures.iter().find(|line| line.name == name && line.id == id) else {
            return Err(CheckpointError::Unsigned { name, id });
        };
        let signature = Signature::from_slice(&signature.signature).ok();
        match signature.map(|signature| verifier.key.verify_strict(text.as_bytes(), &signature)) {
            Some(Ok(())) => Self::parse(text),
            _ => Err(CheckpointError::Signature { name, id }),
        }
    }

    /// Reads the checkpoint of a signed note **without verifying it**.
    ///
    /// # Errors
    /// Not a signed note, or not a checkpoint.
    pub fn parse_unverified(note: &str) -> Result<Self, CheckpointError> {
        Self::parse(split_note(note)?.0)
    }
}

/// A signature line of a note.
struct SignatureLine<'a> {
    name: &'a str,
    id: u32,
    signature: Vec<u8>,
}

/// Splits a note into its text and its signatures.
fn split_note(note: &str) -> Result<(&str, Vec<SignatureLine<'_>>), CheckpointError> {
    let wrong = |reason| CheckpointError::Note { reason };
    if note.len() > NOTE_BYTES_MAX {
        return Err(wrong("it is too long"));
    }
    if note.chars().any(|c| c != '\n' && c.is_ascii_control()) {
        return Err(wrong("it has control characters"));
    }
    let split = note.rfind("\n\n").ok_or(wrong("no empty line stands before the signatures"))?;
    let (text, lines) = (&note[..=split], &note[split + 2..]);
    let lines = lines.strip_suffix('\n').ok_or(wrong("it does not end with a newline"))?;
    let mut signatures = Vec::new();
    for line in lines.split('\n') {
        let line = line.strip_prefix("\u{2014} ").ok_or(wrong("a signature line has no dash"))?;
        let (name, blob) = line.split_once(' ').ok_or(wrong("a signature line has no signature"))?;
        let blob = STANDARD.decode(blob).map_err(|_| wrong("a signature is not base64"))?;
        let (id, signature) = blob.split_first_chunk::<4>().ok_or(wrong("a signature has no key id"))?;
        if !valid_name(name) || signature.is_empty() {
            return Err(wrong("a signature line has no valid name or signature"));
        }
        signatures.push(SignatureLine { name, id: u32::from_be_bytes(*id), signature: signature.to_vec() });
    }
    Ok((text, signatures))
}

/// Whether a key may have this name: not empty, no white space, no plus.
pub fn valid_name(name: &str) -> bool {
    !name.is_empty() && !name.chars().any(|c| c.is_whitespace() || c.is_control() || c == '+')
}

/// A public key that verifies notes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoteVerifier {
    name: String,
    id: u32,
    key: VerifyingKey,
}

impl NoteVerifier {
    fn of(name: String, key: VerifyingKey) -> Self {
        let mut digest = Sha256::new();
        digest.update(name.as_bytes());
        digest.update([b'\n', ED25519]);
        digest.update(key.as_bytes());
        let digest = digest.finalize();
        Self { name, id: u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]), key }
    }

    /// Reads the form `name+hash+base64` (as in `node.pub`); white space around it is ignored.
    ///
    /// # Errors
    /// It has another form, another algorithm than Ed25519, or a hash that does not match.
    pub fn parse(text: &str) -> Result<Self, CheckpointError> {
        let wrong = |reason| CheckpointError::Key { reason };
        let mut parts = text.trim().splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong("it has not three parts"));
        };
        if !valid_name(name) {
            return Err(wrong("its name is not valid"));
        }
        let key = STANDARD.decode(key).map_err(|_| wrong("its key is not base64"))?;
        let key = match key.split_first() {
            Some((&ED25519, key)) => key.try_into().map_err(|_| wrong("its key has not 32 bytes"))?,
            _ => return Err(wrong("its algorithm is not Ed25519")),
        };
        let key = VerifyingKey::from_bytes(key).map_err(|_| wrong("its key is not a point of the curve"))?;
        let verifier = Self::of(name.to_owned(), key);
        if format!("{:08x}", verifier.id) != id {
            return Err(wrong("its hash does not match name and key"));
        }
        Ok(verifier)
    }

    /// The key's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl std::fmt::Display for NoteVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut key = vec![ED25519];
        key.extend_from_slice(self.key.as_bytes());
        write!(f, "{}+{:08x}+{}", self.name, self.id, STANDARD.encode(key))
    }
}

/// A private key that signs notes. `Debug` shows only the public half.
pub struct NoteSigner {
    key: SigningKey,
    verifier: NoteVerifier,
}

impl NoteSigner {
    /// Gives a key its name.
    ///
    /// # Errors
    /// The name is empty, or has white space or a plus in it.
    pub fn new(name: &str, key: SigningKey) -> Result<Self, CheckpointError> {
        if !valid_name(name) {
            return Err(CheckpointError::Key { reason: "its name is not valid" });
        }
        let verifier = NoteVerifier::of(name.to_owned(), key.verifying_key());
        Ok(Self { key, verifier })
    }

    /// Gives the key that grows from these 32 secret bytes its name.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn from_seed(name: &str, seed: &[u8; 32]) -> Result<Self, CheckpointError> {
        Self::new(name, SigningKey::from_bytes(seed))
    }

    /// The public half.
    pub fn verifier(&self) -> &NoteVerifier {
        &self.verifier
    }
}

impl std::fmt::Debug for NoteSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NoteSigner").field("verifier", &self.verifier).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use expect_test::expect;
    use proptest::prelude::*;

    use super::{Checkpoint, CheckpointError, NoteSigner, NoteVerifier};

    fn signer(seed: u8) -> NoteSigner {
        NoteSigner::new("weir/node-1", SigningKey::from_bytes(&[seed; 32])).unwrap()
    }

    fn sample() -> Checkpoint {
        Checkpoint { origin: "weir/node-1/epoch".into(), size: 300, root: [7; 32] }
    }

    #[test]
    fn the_note_and_the_key_are_golden() {
        expect![[r#"
            weir/node-1/epoch
            300
            BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=

            — weir/node-1 yXn1m3sILNqbJ+jM+OHopzlH80imXc47zamDXR3q0FBBGU7E9f6PFWeV+jWxm6TvxwLO2sAQLVBLJuOCfw6QSEnVgAs=
        "#]].assert_eq(&sample().sign(&signer(1)));
        expect!["weir/node-1+c979f59b+AYqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c"]
            .assert_eq(&signer(1).verifier().to_string());
    }

    #[test]
    fn the_example_key_of_the_go_note_package_has_its_hash() {
        let key = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
        assert_eq!(NoteVerifier::parse(key).unwrap().to_string(), key);
        let note = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n\u{2014} PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";
        // The signature is right; the text is no checkpoint.
        let verified = Checkpoint::verify(note, &NoteVerifier::parse(key).unwrap());
        assert!(matches!(verified, Err(CheckpointError::Text { .. })), "{verified:?}");
    }

    #[test]
    fn a_signed_checkpoint_verifies_with_its_key_only() {
        let note = sample().sign(&signer(1));
        let verifier = NoteVerifier::parse(&signer(1).verifier().to_string()).unwrap();
        assert_eq!(Checkpoint::verify(&note, &verifier).unwrap(), sample());
        let other = Checkpoint::verify(&note, signer(2).verifier());
        assert!(matches!(other, Err(CheckpointError::Unsigned { .. })));
        let changed = note.replacen("300", "301", 1);
        assert!(matches!(Checkpoint::verify(&changed, &verifier), Err(CheckpointError::Signature { .. })));
    }

    #[test]
    fn names_sizes_and_keys_out_of_form_are_refused() {
        assert!(NoteSigner::new("a b", SigningKey::from_bytes(&[1; 32])).is_err());
        assert!(NoteSigner::new("a+b", SigningKey::from_bytes(&[1; 32])).is_err());
        for text in ["", "o\n", "o\n01\nAA==\n", "o\n-1\n\n", "\n1\nAA==\n"] {
            assert!(Checkpoint::parse(text).is_err(), "{text:?}");
        }
        for key in [
            "",
            "a+b",
            "a+00000000+AQ==",
            "PeterNeumann+c74f20a4+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        ] {
            assert!(NoteVerifier::parse(key).is_err(), "{key:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,200}", tail in ".{0,80}") {
            let _ = Checkpoint::parse(&text);
            let _ = Checkpoint::verify(&text, signer(1).verifier());
            let _ = Checkpoint::parse_unverified(&format!("{text}\n\n\u{2014} {tail}\n"));
            let _ = NoteVerifier::parse(&text);
        }
    }
}
