//! Files with keys: read once, whole, and only if nobody could have changed them or, where it matters, read them.

use std::{fs::File, io::Read as _, os::unix::fs::MetadataExt as _, path::Path};

use nix::unistd::geteuid;
use zeroize::Zeroizing;

use crate::recording::RecordingError;

/// Most bytes of a key file that are read.
const BYTES_MAX: u64 = 16 * 1024;

/// Reads a key file. `others` are the rights that nobody but the owner may have; `refused` says what is wrong and the mend, for the
/// mode that the file has.
///
/// # Errors
/// It cannot be read, belongs to another user than root or this one, or others have such rights.
pub(crate) fn read(
    path: &Path,
    others: u32,
    refused: impl FnOnce(u32) -> String,
) -> Result<Zeroizing<Vec<u8>>, RecordingError> {
    let wrong = |reason: String| RecordingError::Key { path: path.to_owned(), reason };
    let failed = |error: std::io::Error| wrong(error.to_string());
    let file = File::open(path).map_err(failed)?;
    // Of what was opened: a path can be another file a moment later.
    let metadata = file.metadata().map_err(failed)?;
    if metadata.uid() != 0 && metadata.uid() != geteuid().as_raw() {
        return Err(wrong(format!("it belongs to user {}, who can change it", metadata.uid())));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & others != 0 {
        return Err(wrong(refused(mode)));
    }
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}
