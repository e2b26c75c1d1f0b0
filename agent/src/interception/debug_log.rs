//! What the kernel programs log, if they were built to (`cargo xtask build-ebpf --debug-log`): into the agent's own
//! log. Other builds have nothing to log, and nothing of this runs.

use std::{io, pin::Pin};

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::{Interest, unix::AsyncFd};

/// Copies lines for ever, once it is awaited in a tokio runtime.
pub(super) type Copying = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// Takes the log out of a loaded object; none if it has none.
pub(super) fn take(ebpf: &mut Ebpf) -> Option<Copying> {
    let logger = EbpfLogger::init(ebpf).ok()?;
    Some(Box::pin(async move {
        // SAFETY: the logger owns its map's descriptor, which stays open and the same until it is dropped.
        let log = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        let mut log = log.map_err(io::Error::from)?;
        loop {
            let mut guard = log.readable_mut().await?;
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    }))
}
