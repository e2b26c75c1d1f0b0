//! Whom recorded content is for: public keys in files. Nothing secret is in them, but who can change one reads what comes.

use std::path::{Path, PathBuf};

use weir_common::encryption::Recipient;

use crate::{key_file, recording::RecordingError};

/// The right to write of others than the owner.
const OTHERS_WRITE: u32 = 0o022;

/// Reads the recipients in these files.
///
/// # Errors
/// A file cannot be read, others may change it, or it holds no X25519 public key; or two hold the same.
pub(crate) fn read_all(files: &[PathBuf]) -> Result<Vec<Recipient>, RecordingError> {
    let mut recipients: Vec<Recipient> = Vec::with_capacity(files.len());
    for path in files {
        let recipient = read(path)?;
        if recipients.iter().any(|other| other.name() == recipient.name()) {
            let reason =
                "it holds the same key as another one of recording.encryption.recipientFiles".to_owned();
            return Err(RecordingError::Key { path: path.clone(), reason });
        }
        recipients.push(recipient);
    }
    Ok(recipients)
}

fn read(path: &Path) -> Result<Recipient, RecordingError> {
    let wrong = |reason: String| RecordingError::Key { path: path.to_owned(), reason };
    let refused = |mode| format!("others may change it (mode {mode:04o}); set mode 0444");
    let pem = key_file::read(path, OTHERS_WRITE, refused)?;
    Recipient::from_pem(&pem).map_err(|error| wrong(error.to_string()))
}

/// What tests encrypt for: Bob's key of RFC 7748, section 6.1.
#[cfg(test)]
pub(crate) const RECIPIENT: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=\n-----END PUBLIC KEY-----\n";

/// Its private half.
#[cfg(test)]
pub(crate) const IDENTITY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VuBCIEIF2rCH5iSopLeeF/i4OADuZvO7EpJhi2/Rwviyf/iODr\n-----END PRIVATE KEY-----\n";

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::PermissionsExt as _,
    };

    use super::{RECIPIENT, read_all};

    #[test]
    fn a_recipient_that_others_may_change_or_that_is_none_is_refused_with_the_mend() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str, mode| {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            path
        };
        let good = file("good", RECIPIENT, 0o444);
        assert_eq!(read_all(std::slice::from_ref(&good)).unwrap().len(), 1);
        for (content, mode, expected) in [
            (RECIPIENT, 0o664, "others may change it (mode 0664)"),
            (RECIPIENT, 0o446, "others may change it"),
            (RECIPIENT, 0o400, "it holds the same key as another one"),
            ("x", 0o400, "`openssl pkey -in identity.pem -pubout"),
        ] {
            let path = file("bad", content, mode);
            let error = read_all(&[good.clone(), path.clone()]).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(&*path.to_string_lossy()), "{error}");
            fs::remove_file(path).unwrap();
        }
        assert!(read_all(&[folder.path().join("none")]).is_err());
    }
}
