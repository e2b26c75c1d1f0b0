//! Signals for the command: those sent to this process are passed on, those of the terminal are not.
//!
//! The terminal sends its signals (Ctrl-C, Ctrl-\, hang-up) to the whole process group, so the command has them
//! already. Which is which tells the signal's origin, for which signalfd is read instead of tokio's handlers.
//! Stopping and continuing (Ctrl-Z, fg) are left alone: they concern both processes as they are.

use std::io;

use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// What is passed on.
const FORWARDED: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// The signals, blocked for this thread and all that it starts.
#[derive(Debug)]
pub struct Blocked {
    set: SigSet,
    before: SigSet,
}

impl Blocked {
    /// Blocks them; to be called before any other thread is started.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new() -> io::Result<Self> {
        let set: SigSet = FORWARDED.into_iter().collect();
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        Ok(Self { set, before })
    }

    /// What was blocked before: the command is to start with that, since a mask outlives `execve`.
    pub fn before(&self) -> SigSet {
        self.before
    }

    /// Makes them readable within the tokio runtime.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn listen(&self) -> io::Result<Signals> {
        let descriptor = SignalFd::with_flags(&self.set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        // SAFETY: `SignalFd` owns its descriptor, gives the same one each time it is asked, and closes it only when
        // it is dropped, which `AsyncFd` does after it has deregistered it.
        let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE)? };
        Ok(Signals(registered))
    }
}

/// The stream of signals for the command.
#[derive(Debug)]
pub struct Signals(AsyncFd<SignalFd>);

impl Signals {
    /// The next one that the command has not got from the terminal. Safe to drop while it waits.
    ///
    /// # Errors
    /// The descriptor cannot be read.
    pub async fn next(&mut self) -> io::Result<Signal> {
        loop {
            let mut guard = self.0.readable_mut().await?;
            let Some(information) = guard.get_inner_mut().read_signal()? else {
                guard.clear_ready();
                continue;
            };
            let number = information.ssi_signo.cast_signed();
            if information.ssi_code != libc::SI_KERNEL
                && let Ok(signal) = Signal::try_from(number)
            {
                return Ok(signal);
            }
        }
    }
}
