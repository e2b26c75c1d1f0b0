//! Flow records: who is behind an accepted connection, and the kernel's notices. Lookup only; what follows from
//! a missing record is decided by who accepts.

use std::{fmt, net::SocketAddr, time::Duration};

use aya::maps::{HashMap, MapData, RingBuf};
use tokio::io::{Interest, unix::AsyncFd};
use weir_common::kernel::{FlowKey, FlowRecord, KUBELET, Notice};

use super::{
    loader::Kernel,
    maps::{address, lock, notice, socket_address},
};

/// Oldest flow that may still be accepted. What a connection that never arrived has left must not vouch for a
/// later one from the same port; one that has waited longer in the listener's queue has lost its client.
const AGE_MAX: Duration = Duration::from_secs(60);

/// A redirected connection, as the kernel recorded it before its SYN left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The address that the client dialled.
    pub original: SocketAddr,
    /// The kernel's record.
    pub record: FlowRecord,
}

impl Flow {
    /// The flow that a record of the kernel describes.
    pub(super) fn of(record: FlowRecord) -> Self {
        Self { original: socket_address(&record.original), record }
    }
}

impl Kernel {
    /// Takes the flow of an accepted connection out of the map: `netns` is the cookie of the listener's network
    /// namespace, `client` and `listener` are the peer's and the own address of the accepted socket. None means
    /// that no redirected client is behind it.
    pub fn take_flow(&self, netns: u64, client: SocketAddr, listener: SocketAddr) -> Option<Flow> {
        let key = FlowKey {
            netns,
            client: address(client.ip()),
            listener: address(listener.ip()),
            client_port: u32::from(client.port()),
            listener_port: u32::from(listener.port()),
        };
        let own = take(&mut lock(&self.flows), &key);
        let record = own.or_else(|| self.take_older(&key))?;
        let age = boottime_ns()?.saturating_sub(record.connected_boottime_ns);
        let fresh = u128::from(age) <= AGE_MAX.as_nanos();
        (record.netns == netns && fresh).then(|| Flow::of(record))
    }

    /// That of a connection which an older layout's programs have redirected. Its clusters are numbered by the configuration of the
    /// agent before.
    fn take_older(&self, key: &FlowKey) -> Option<FlowRecord> {
        let record = take(lock(&self.older_flows).as_mut()?, key)?;
        let cluster = lock(&self.api_set).get(&record.original, 0).ok()?;
        (cluster != KUBELET).then_some(FlowRecord { cluster, ..record })
    }

    /// The stream of notices; once per process.
    ///
    /// # Errors
    /// The ring buffer cannot be waited for.
    pub fn notices(&self) -> std::io::Result<Option<Notices>> {
        let Some(ring) = self.take_notices() else { return Ok(None) };
        // SAFETY: the ring buffer owns its map's descriptor, which stays open and the same until it is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        Ok(Some(Notices { ring: ring.map_err(std::io::Error::from)? }))
    }
}

fn take(flows: &mut HashMap<MapData, FlowKey, FlowRecord>, key: &FlowKey) -> Option<FlowRecord> {
    let record = flows.get(key, 0).ok()?;
    // If the map, being full, has dropped it between the two calls, it is ours all the same.
    let _ = flows.remove(key);
    Some(record)
}

/// What the kernel reports: denials, refused protocols.
pub struct Notices {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl fmt::Debug for Notices {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Notices").finish_non_exhaustive()
    }
}

impl Notices {
    /// Waits for the next notice. Safe to drop while it waits.
    ///
    /// # Errors
    /// The ring buffer cannot be waited for.
    pub async fn next(&mut self) -> std::io::Result<Notice> {
        loop {
            let mut guard = self.ring.readable_mut().await?;
            while let Some(item) = guard.get_inner_mut().next() {
                if let Some(notice) = notice(&item) {
                    return Ok(notice);
                }
            }
            guard.clear_ready();
        }
    }
}

/// Now, on the clock that the kernel's records have.
pub(super) fn boottime_ns() -> Option<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).ok()?;
    let seconds = u64::try_from(now.tv_sec()).ok()?;
    let nanoseconds = u64::try_from(now.tv_nsec()).ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)
}
