//! Signed checkpoints of the log: C2SP `tlog-checkpoint` in a C2SP `signed-note`, with Ed25519.
//!
//! A checkpoint says: the log named `origin` had `size` events and this Merkle root. Whoever keeps one can prove
//! later that nothing before it was changed. Two extension lines follow: when it was signed, so that a later one over as
//! many events proves silence, and the tree's peaks, so that a reader can go on from it. Formats: <https://c2sp.org/tlog-checkpoint> and
//! <https://c2sp.org/signed-note>. Sans-IO; where keys live is the agent's matter.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey, pkcs8::DecodePublicKey as _};
use sha2::{Digest as _, Sha256};

use crate::{
    merkle::{Hash, Tree},
    message::{rfc3339, unix_us_of},
};

/// Most bytes of a signed note that is parsed.
pub const NOTE_BYTES_MAX: usize = 16 * 1024;

/// Signature type of Ed25519 in the signed-note format.
const ED25519: u8 = 1;

/// Beginning of the extension line with the time.
const TIME: &str = "time ";

/// Beginning of the extension line with the peaks.
const PEAKS: &str = "peaks ";

/// Most signature lines of a note that are looked at.
const SIGNATURES_MAX: usize = 64;

/// The state of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Name of the log: `weir/<node>/<epoch>`.
    pub origin: String,
    /// Number of events.
    pub size: u64,
    /// Merkle root over them.
    pub root: Hash,
    /// When it was signed, in microseconds since the Unix epoch. None: an earlier version signed it.
    pub time_unix_us: Option<i64>,
    /// The tree that has this root. None: an earlier version signed it, or it is empty.
    pub tree: Option<Tree>,
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
    /// The key is another node's.
    #[error("key {name} vouches for the logs of its own node, not for {origin}")]
    OtherNode {
        /// The key's name.
        name: String,
        /// The log.
        origin: String,
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
    /// That of a log as it is now.
    pub fn of(origin: &str, tree: &Tree, time_unix_us: i64) -> Self {
        Self {
            origin: origin.to_owned(),
            size: tree.size(),
            root: tree.root(),
            time_unix_us: Some(time_unix_us),
            tree: Some(tree.clone()).filter(|tree| tree.size() > 0),
        }
    }

    /// The text that is signed.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n{}\n{}\n", self.origin, self.size, STANDARD.encode(self.root));
        if let Some(time) = self.time_unix_us {
            text.push_str(&format!("{TIME}{}\n", rfc3339(time)));
        }
        if let Some(tree) = &self.tree {
            text.push_str(&format!("{PEAKS}{}\n", STANDARD.encode(tree.peaks().as_flattened())));
        }
        text
    }

    /// Reads a checkpoint's text. Extension lines after the root that are not known are passed over; peaks must have the
    /// root.
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
        let mut checkpoint = Self { origin: origin.to_owned(), size, root, time_unix_us: None, tree: None };
        for line in lines {
            checkpoint.extend(line).map_err(wrong)?;
        }
        Ok(checkpoint)
    }

    /// Takes an extension line.
    fn extend(&mut self, line: &str) -> Result<(), &'static str> {
        if line.is_empty() {
            return Err("an extension line is empty");
        }
        if let Some(time) = line.strip_prefix(TIME) {
            let parsed = unix_us_of(time).filter(|parsed| rfc3339(*parsed) == time);
            let time = parsed.ok_or("its time is not one as in RFC 3339 with six digits of a second")?;
            if self.time_unix_us.replace(time).is_some() {
                return Err("it has two times");
            }
        } else if let Some(peaks) = line.strip_prefix(PEAKS) {
            let bytes = STANDARD.decode(peaks).map_err(|_| "its peaks are not base64")?;
            let (peaks, rest) = bytes.as_chunks::<32>();
            let tree = Tree::from_peaks(self.size, peaks.to_vec()).filter(|_| rest.is_empty());
            let tree = tree.ok_or("its peaks are not those of a tree of its size")?;
            if tree.root() != self.root {
                return Err("its peaks have another root");
            }
            if self.tree.replace(tree).is_some() {
                return Err("it has peaks twice");
            }
        }
        Ok(())
    }

    /// Signs the checkpoint: a complete signed note, with a signature by each of `signers` (at least one).
    pub fn sign(&self, signers: &[NoteSigner]) -> String {
        let text = self.text();
        let mut note = format!("{text}\n");
        for signer in signers {
            let signature = signer.key.sign(text.as_bytes());
            let mut blob = signer.verifier.id.to_be_bytes().to_vec();
            blob.extend_from_slice(&signature.to_bytes());
            note.push_str(&format!("\u{2014} {} {}\n", signer.verifier.name, STANDARD.encode(blob)));
        }
        note
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
        if signatures.len() == SIGNATURES_MAX {
            return Err(wrong("it has too many signatures"));
        }
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

    /// The key in a PEM file (`openssl pkey -pubout`), by the name that the log of this origin gives it. A key that a
    /// PEM file holds has no name of its own: several nodes may sign with it.
    ///
    /// # Errors
    /// It is no Ed25519 key, or the origin has no name for it.
    pub fn from_pem(pem: &str, origin: &str) -> Result<Self, CheckpointError> {
        let wrong = |reason| CheckpointError::Key { reason };
        let key = VerifyingKey::from_public_key_pem(pem.trim())
            .map_err(|_| wrong("its PEM holds no Ed25519 public key"))?;
        let name = origin.rsplit_once('/').map_or(origin, |(name, _)| name);
        if !valid_name(name) {
            return Err(wrong("its name is not valid"));
        }
        Ok(Self::of(name.to_owned(), key))
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

    use super::{Checkpoint, CheckpointError, NOTE_BYTES_MAX, NoteSigner, NoteVerifier};
    use crate::merkle::{LEAVES_MAX, Tree, leaf_hash};

    fn signer(seed: u8) -> NoteSigner {
        NoteSigner::new("weir/node-1", SigningKey::from_bytes(&[seed; 32])).unwrap()
    }

    /// As versions before `time` and `peaks` signed it.
    fn sample() -> Checkpoint {
        let origin = "weir/node-1/epoch".into();
        Checkpoint { origin, size: 300, root: [7; 32], time_unix_us: None, tree: None }
    }

    fn extended(leaves: u8) -> Checkpoint {
        let mut tree = Tree::new();
        (0..leaves).for_each(|n| tree.push(leaf_hash(&[n])));
        Checkpoint::of("weir/node-1/epoch", &tree, 1_700_000_000_000_001)
    }

    #[test]
    fn the_note_and_the_key_are_golden() {
        expect![[r#"
            weir/node-1/epoch
            300
            BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=

            — weir/node-1 yXn1m3sILNqbJ+jM+OHopzlH80imXc47zamDXR3q0FBBGU7E9f6PFWeV+jWxm6TvxwLO2sAQLVBLJuOCfw6QSEnVgAs=
        "#]].assert_eq(&sample().sign(&[signer(1)]));
        expect!["weir/node-1+c979f59b+AYqI4910CfGV/VLbLTy6XXLKZwm/HZQSG/N0iAG0D29c"]
            .assert_eq(&signer(1).verifier().to_string());
    }

    #[test]
    fn time_and_peaks_are_signed_lines_and_read_back() {
        expect![[r#"
            weir/node-1/epoch
            3
            O2zM1+PgI/85MAbwMDFe562esRGwIrQfun5bejlz9og=
            time 2023-11-14T22:13:20.000001Z
            peaks ogv5p8wtyKCPX0FacbGfasQnurVNJO7IaLXTEDRJlTr88KbHAN0T4nS2+6je6o3Zsm5O7d40lXF8rIQIycUXfw==

            — weir/node-1 yXn1myMcN2eJ7lvJhjX+zaJfsAf3J+7plAKsdUXT54j7OhjFyOkxaSZ+yX6eiwGdVkgcNCNsTXq8fj/EMaKcPyE7LQc=
            — weir/node-1 7Mxwq/TEq29Es+Kj/SxpV5unzeeHxepV9ErGf4UikKCo0YL50+raUKWVZgd1Q2avxfRSVJdxY9wxPiWp6RRlRGOgSgE=
        "#]].assert_eq(&extended(3).sign(&[signer(1), signer(2)]));
        for leaves in 0..40 {
            assert_eq!(Checkpoint::parse(&extended(leaves).text()).unwrap(), extended(leaves));
        }
        let largest = Tree::from_peaks(LEAVES_MAX - 1, vec![[1; 32]; 48]).unwrap();
        let longest = Checkpoint::of(&"o".repeat(320), &largest, i64::MAX);
        let note = longest.sign(&[signer(1), signer(2), signer(3), signer(4)]);
        assert!(note.len() <= NOTE_BYTES_MAX && Checkpoint::verify(&note, signer(4).verifier()).is_ok());
    }

    #[test]
    fn peaks_that_do_not_have_the_root_and_times_that_are_none_are_refused() {
        let text = extended(3).text();
        let other = extended(5).text();
        let peaks = |text: &str| text.lines().last().map(str::to_owned).unwrap();
        for (from, to, expected) in [
            ("\n3\n", "\n4\n", "its peaks are not those of a tree of its size"),
            (peaks(&text).as_str(), peaks(&other).as_str(), "its peaks have another root"),
            (peaks(&text).as_str(), "peaks ?", "its peaks are not base64"),
            (peaks(&text).as_str(), "peaks AAAA", "its peaks are not those of a tree of its size"),
            ("time 2023", "time x2023", "its time is not one as in RFC 3339"),
            ("20.000001Z", "20.0000010Z", "its time is not one as in RFC 3339"),
            ("peaks ", "time 2023-11-14T22:13:20.000000Z\npeaks ", "it has two times"),
        ] {
            let error = Checkpoint::parse(&text.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(expected), "{from} {to}: {error}");
        }
        let unknown = text.replacen("peaks ", "later-version peaks ", 1);
        assert_eq!(Checkpoint::parse(&unknown).unwrap().tree, None);
    }

    #[test]
    fn while_keys_change_both_sign_and_either_verifies() {
        let note = sample().sign(&[signer(1), signer(2)]);
        for seed in [1, 2] {
            assert_eq!(Checkpoint::verify(&note, signer(seed).verifier()).unwrap(), sample());
        }
        assert!(matches!(
            Checkpoint::verify(&note, signer(3).verifier()),
            Err(CheckpointError::Unsigned { .. })
        ));
    }

    #[test]
    fn a_key_in_pem_has_the_name_that_the_log_gives_it() {
        let pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAiojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w=\n-----END PUBLIC KEY-----\n";
        let verifier = NoteVerifier::from_pem(pem, "weir/node-1/epoch").unwrap();
        assert_eq!(&verifier, signer(1).verifier());
        assert!(NoteVerifier::from_pem(pem, "").is_err());
        assert!(
            NoteVerifier::from_pem("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "a/b")
                .is_err()
        );
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
        let note = sample().sign(&[signer(1)]);
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
