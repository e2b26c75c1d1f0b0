//! Waiting for a condition until a deadline, and being interrupted while waiting.
//!
//! The only place of this crate that lets time pass. Nothing waits for a fixed time in the hope that something
//! has happened by then: a condition is asked again and again, and the deadline's error names it.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

static INTERRUPTED: Mutex<bool> = Mutex::new(false);
static INTERRUPT: Condvar = Condvar::new();

/// Turns SIGINT, SIGTERM and SIGHUP into errors of the next [`wait_until`] or [`check_interrupted`], so that guards
/// run and nothing is left behind.
///
/// By handlers, not by a blocked mask: children inherit the mask, and an agent that starts with SIGTERM blocked
/// cannot be ended in its own order.
///
/// # Errors
/// When the handlers or the thread cannot be set up.
pub fn interrupt_on_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("cannot make the runtime that waits for signals")?;
    let (mut interrupt, mut terminate, mut hang_up) = {
        let _entered = runtime.enter();
        let handle = |kind| signal(kind).context("cannot handle signals");
        (handle(SignalKind::interrupt())?, handle(SignalKind::terminate())?, handle(SignalKind::hangup())?)
    };
    let wait = move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => (),
                    _ = terminate.recv() => (),
                    _ = hang_up.recv() => (),
                }
                *INTERRUPTED.lock().unwrap_or_else(PoisonError::into_inner) = true;
                INTERRUPT.notify_all();
            }
        });
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .context("cannot start the thread that waits for signals")?;
    Ok(())
}

/// Forgets an interruption, for the clean-up that follows it.
pub fn clear_interrupt() {
    *INTERRUPTED.lock().unwrap_or_else(PoisonError::into_inner) = false;
}

/// # Errors
/// When a signal asked this process to end.
pub fn check_interrupted() -> Result<()> {
    if *INTERRUPTED.lock().unwrap_or_else(PoisonError::into_inner) {
        bail!("interrupted by a signal");
    }
    Ok(())
}

/// Asks `check` until it gives a value. `what` completes the sentence "timed out waiting for …".
///
/// # Errors
/// The error of `check`, an interruption, or the deadline.
pub fn wait_until<T>(
    what: &str,
    deadline: Duration,
    mut check: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = check()? {
            return Ok(value);
        }
        check_interrupted()?;
        if start.elapsed() >= deadline {
            bail!("timed out after {} s waiting for {what}", deadline.as_secs());
        }
        pause(POLL_INTERVAL);
    }
}

/// Lets time pass between two looks at a condition; an interruption ends it early.
fn pause(interval: Duration) {
    let guard = INTERRUPTED.lock().unwrap_or_else(PoisonError::into_inner);
    let _woken = INTERRUPT.wait_timeout_while(guard, interval, |interrupted| !*interrupted);
}
