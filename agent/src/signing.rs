//! The keys that sign checkpoints: those of the configuration, or one that this run makes and nobody keeps.
//!
//! A configured key must be out of reach of others: who holds it can forge what nobody holds a checkpoint of yet.

use std::path::{Path, PathBuf};

use ed25519_dalek::{SigningKey, pkcs8::DecodePrivateKey as _};
use rand::rngs::OsRng;
use weir_common::checkpoint::{NoteSigner, valid_name};

use crate::{key_file, recording::RecordingError};

/// Most keys that sign: the one in use, the one before it, and room to spare.
pub const SIGNING_KEYS_MAX: usize = 4;

/// Rights of others than the owner.
const OTHERS: u32 = 0o077;

/// `weir/<node>`, with what a key name must not have replaced.
pub(crate) fn key_name(node: &str) -> String {
    let plain = |c: char| if valid_name(&c.to_string()) { c } else { '-' };
    let node: String = node.chars().map(plain).collect();
    if node.is_empty() { "weir/node".to_owned() } else { format!("weir/{node}") }
}

/// Reads the keys in these files; without any, makes one.
///
/// # Errors
/// A file cannot be read, is not for the agent alone, or holds no Ed25519 key; or two hold the same.
pub(crate) fn signers(name: &str, files: &[PathBuf]) -> Result<Vec<NoteSigner>, RecordingError> {
    let named = |key, path: &Path| {
        NoteSigner::new(name, key)
            .map_err(|error| RecordingError::Key { path: path.to_owned(), reason: error.to_string() })
    };
    if files.is_empty() {
        return Ok(vec![named(SigningKey::generate(&mut OsRng), Path::new(name))?]);
    }
    let mut signers: Vec<NoteSigner> = Vec::with_capacity(files.len());
    for path in files {
        let signer = named(read(path)?, path)?;
        if signers.iter().any(|other| other.verifier() == signer.verifier()) {
            let reason = "it holds the same key as another one of journal.signingKeyFiles".to_owned();
            return Err(RecordingError::Key { path: path.clone(), reason });
        }
        signers.push(signer);
    }
    Ok(signers)
}

fn read(path: &Path) -> Result<SigningKey, RecordingError> {
    let wrong = |reason: String| RecordingError::Key { path: path.to_owned(), reason };
    let refused = |mode| {
        format!(
            "others may use it (mode {mode:04o}); set mode 0400, for a mounted Secret with `defaultMode: 0400`"
        )
    };
    let pem = key_file::read(path, OTHERS, refused)?;
    let key = std::str::from_utf8(&pem).ok().and_then(|pem| SigningKey::from_pkcs8_pem(pem).ok());
    let none = "it holds no Ed25519 key in PKCS#8 PEM; make one with `openssl genpkey -algorithm ed25519`";
    key.ok_or_else(|| wrong(none.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::PermissionsExt as _,
        path::PathBuf,
    };

    use ed25519_dalek::{
        SigningKey,
        pkcs8::{EncodePrivateKey as _, spki::der::pem::LineEnding},
    };
    use tempfile::TempDir;

    use super::{key_name, signers};

    fn file(folder: &TempDir, name: &str, content: &str, mode: u32) -> PathBuf {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }

    fn pem(seed: u8) -> String {
        SigningKey::from_bytes(&[seed; 32]).to_pkcs8_pem(LineEnding::LF).unwrap().to_string()
    }

    #[test]
    fn keys_of_files_sign_in_their_order_and_without_files_each_run_has_its_own() {
        let folder = TempDir::new().unwrap();
        let files = [file(&folder, "new", &pem(1), 0o400), file(&folder, "old", &pem(2), 0o600)];
        let verifiers: Vec<String> = signers("weir/node-1", &files)
            .unwrap()
            .iter()
            .map(|signer| signer.verifier().to_string())
            .collect();
        let expected = [1, 2].map(|seed| {
            let key = SigningKey::from_bytes(&[seed; 32]);
            weir_common::checkpoint::NoteSigner::new("weir/node-1", key).unwrap().verifier().to_string()
        });
        assert_eq!(verifiers, expected);
        let own = || signers("weir/node-1", &[]).unwrap()[0].verifier().to_string();
        assert_ne!(own(), own());
        assert_eq!((key_name("a b+c"), key_name("")), ("weir/a-b-c".into(), "weir/node".into()));
    }

    /// As the kubelet lays a Secret out with `defaultMode: 0400`: names lead over a link to a folder that is replaced whole.
    #[test]
    fn a_mounted_secret_is_read_through_its_links_and_only_with_a_mode_that_is_for_the_agent_alone() {
        let volume = TempDir::new().unwrap();
        let data = volume.path().join("..2026_11_29_12_00_00.1");
        fs::create_dir(&data).unwrap();
        std::os::unix::fs::symlink(data.file_name().unwrap(), volume.path().join("..data")).unwrap();
        let mounted = |name: &str, seed, mode| {
            fs::write(data.join(name), pem(seed)).unwrap();
            fs::set_permissions(data.join(name), Permissions::from_mode(mode)).unwrap();
            let path = volume.path().join(name);
            std::os::unix::fs::symlink(PathBuf::from("..data").join(name), &path).unwrap();
            path
        };
        let files = [mounted("new.pem", 1, 0o400), mounted("old.pem", 2, 0o400)];
        assert_eq!(signers("weir/node-1", &files).unwrap().len(), 2);
        // The mode that a Secret has unless the pod says another; the link's own, which anybody may read, counts for nothing.
        let error = signers("weir/node-1", &[mounted("bare.pem", 3, 0o644)]).unwrap_err().to_string();
        assert!(error.contains("(mode 0644)") && error.contains("`defaultMode: 0400`"), "{error}");
    }

    #[test]
    fn a_key_that_others_may_use_or_that_is_none_is_refused_with_the_mend_and_not_shown() {
        let folder = TempDir::new().unwrap();
        let good = file(&folder, "good", &pem(1), 0o600);
        for (content, mode, expected) in [
            (pem(3), 0o640, "others may use it (mode 0640)"),
            (pem(3), 0o604, "`defaultMode: 0400`"),
            (pem(1), 0o400, "it holds the same key as another one"),
            ("secret".to_owned(), 0o400, "`openssl genpkey -algorithm ed25519`"),
            (pem(3).replace("PRIVATE", "PUBLIC"), 0o400, "it holds no Ed25519 key"),
        ] {
            let path = file(&folder, "bad", &content, mode);
            let error = signers("weir/node-1", &[good.clone(), path.clone()]).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(&*path.to_string_lossy()), "{error}");
            assert!(!error.contains("secret"), "{error}");
            fs::remove_file(path).unwrap();
        }
        assert!(signers("weir/node-1", &[folder.path().join("none")]).is_err());
    }
}
