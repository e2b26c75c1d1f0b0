//! Ctrl-C and its like while a topic is spooled: the spool goes, then the process.
//!
//! The signals are blocked for all threads and taken by one that waits for them. What SIGKILL leaves, the next reading removes.

use std::{
    io,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::sys::signal::{SigSet, Signal};
use tempfile::TempDir;

/// Tries to remove a folder that is still written to.
const TRIES: usize = 20;

static IS_WATCHED: AtomicBool = AtomicBool::new(false);
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Watches from now on; to be called before the first thread is made. Once is enough.
///
/// # Errors
/// Signals cannot be blocked, or no thread be made.
pub(crate) fn watch() -> io::Result<()> {
    if IS_WATCHED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block()?;
    std::thread::Builder::new().name("weir-signals".to_owned()).spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        remove_all();
        // As a shell says it of a process that died of the signal.
        std::process::exit(128 + signal as i32);
    })?;
    Ok(())
}

/// Makes a folder that is to be removed then. A signal that comes meanwhile waits until it is known.
///
/// # Errors
/// It cannot be made.
pub(crate) fn removed_then(make: impl FnOnce() -> io::Result<TempDir>) -> io::Result<TempDir> {
    let mut folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = make()?;
    folders.push(folder.path().to_owned());
    Ok(folder)
}

fn remove_all() {
    for folder in FOLDERS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        // The other threads go on writing to it meanwhile.
        let _ = (0..TRIES).find(|_| std::fs::remove_dir_all(folder).is_ok() || !folder.exists());
    }
}
