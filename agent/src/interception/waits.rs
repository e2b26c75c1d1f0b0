//! What is counted of containers that are held back, for metrics, and whether any are, for `weir-agent status`.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Upper bounds of the classes that waits are counted in; longer ones are in a last class.
pub const WAIT_BOUNDS: [Duration; 9] = [
    Duration::from_micros(100),
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_millis(1500),
];

/// How a container came to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Release {
    /// Its pod had its verdict, and its listener.
    Settled,
    /// It did not get them in time.
    TimedOut,
    /// It is no pod's of a kubelet, or another agent sees to it.
    NotOurs,
}

/// Why no container waits while no runtime is to ask.
const TURNED_OFF: &str = "`nri.enabled` is false in the agent's configuration";

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// Whether a runtime asks, and why it does not; none while it is not to.
    asks: Mutex<Option<Result<(), String>>>,
    settled: AtomicU64,
    timed_out: AtomicU64,
    not_ours: AtomicU64,
    looked_up: AtomicU64,
    waits: [AtomicU64; WAIT_BOUNDS.len() + 1],
    waited_us: AtomicU64,
}

/// The same as numbers, since this process started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WaitNumbers {
    /// Whether a runtime asks before it starts a container.
    pub connected: bool,
    /// Containers that were started with their pod's verdict in force.
    pub settled: u64,
    /// … without it, since it did not come in time.
    pub timed_out: u64,
    /// … that no pod of a kubelet has, or that another agent sees to.
    pub not_ours: u64,
    /// Pods that the API server was asked for by name.
    pub looked_up: u64,
    /// How many starts waited up to each of [`WAIT_BOUNDS`] (and longer than the one before), and longer than all.
    pub waits: [u64; WAIT_BOUNDS.len() + 1],
    /// How long they waited together.
    pub waited: Duration,
}

impl Waits {
    /// A runtime asks from now on, or does not, for this reason.
    pub(super) fn asks(&self, asks: Result<(), String>) {
        *self.asks.lock().unwrap_or_else(PoisonError::into_inner) = Some(asks);
    }

    /// Whether there are any; else why not.
    pub(super) fn are_made(&self) -> Result<(), String> {
        let asks = self.asks.lock().unwrap_or_else(PoisonError::into_inner);
        asks.clone().unwrap_or_else(|| Err(TURNED_OFF.to_owned()))
    }

    pub(super) fn looked_up(&self) {
        self.looked_up.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn released(&self, release: Release, waited: Duration) {
        let counter = match release {
            Release::Settled => &self.settled,
            Release::TimedOut => &self.timed_out,
            Release::NotOurs => &self.not_ours,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let class = WAIT_BOUNDS.partition_point(|bound| *bound < waited);
        self.waits[class].fetch_add(1, Ordering::Relaxed);
        let us = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        self.waited_us.fetch_add(us, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> WaitNumbers {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        WaitNumbers {
            connected: self.are_made().is_ok(),
            settled: read(&self.settled),
            timed_out: read(&self.timed_out),
            not_ours: read(&self.not_ours),
            looked_up: read(&self.looked_up),
            waits: self.waits.each_ref().map(read),
            waited: Duration::from_micros(read(&self.waited_us)),
        }
    }
}
