//! The API set: which addresses are API servers, kept for a while after they are no longer published.
//!
//! An address that the cluster takes away may still be dialled by clients that have it, and on a managed control
//! plane may come back: for hours it still belongs to the cluster. Losing the watch changes nothing at all. Beside the
//! published addresses, those by which the same machines are reached belong to it, and the kubelets of all machines.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use weir_common::kernel::KUBELET;

use super::{
    cluster_watch::ApiSet,
    hosts::{self, Hosts},
    loader::Kernel,
};

/// How long an address stays in the API set after it was last published.
const RETENTION: Duration = Duration::from_secs(6 * 60 * 60);
/// How often addresses are looked through for old ones.
const RETENTION_CHECK: Duration = Duration::from_secs(10 * 60);

/// Where the addresses of one cluster come from.
#[derive(Debug)]
pub struct ClusterAddresses {
    /// Index of the cluster.
    pub cluster: u32,
    /// What the cluster itself publishes.
    pub published: watch::Receiver<ApiSet>,
    /// Addresses from the configuration, which stay for good.
    pub configured: Vec<SocketAddr>,
}

/// Keeps one cluster's part of the kernel's API set up to date until cancelled.
pub(super) async fn follow(
    mut addresses: ClusterAddresses,
    mut hosts: watch::Receiver<Hosts>,
    kernel: Arc<Kernel>,
    cancellation: CancellationToken,
) {
    let mut part = Part::new(kernel, addresses.cluster);
    let mut check = tokio::time::interval(RETENTION_CHECK);
    let mut watched = true;
    loop {
        let published = addresses.published.borrow_and_update().clone();
        let mut current: HashSet<SocketAddr> = published
            .service
            .iter()
            .chain(&published.endpoints)
            .chain(&addresses.configured)
            .copied()
            .collect();
        let aliases = hosts::aliases(&current, &hosts.borrow_and_update());
        current.extend(aliases);
        part.write(&current);
        tokio::select! {
            () = cancellation.cancelled() => return,
            // Whoever watched may have ended: what is known stays.
            changed = addresses.published.changed(), if watched => watched = changed.is_ok(),
            Ok(()) = hosts.changed() => {}
            _ = check.tick() => {}
        }
    }
}

/// The same for the kubelets.
pub(super) async fn follow_kubelets(
    mut hosts: watch::Receiver<Hosts>,
    kernel: Arc<Kernel>,
    cancellation: CancellationToken,
) {
    let mut part = Part::new(kernel, KUBELET);
    let mut check = tokio::time::interval(RETENTION_CHECK);
    loop {
        let current = hosts::kubelets(&hosts.borrow_and_update());
        part.write(&current);
        tokio::select! {
            () = cancellation.cancelled() => return,
            Ok(()) = hosts.changed() => {}
            _ = check.tick() => {}
        }
    }
}

/// The entries of the kernel's API set with one value.
struct Part {
    kernel: Arc<Kernel>,
    value: u32,
    retained: Retained,
}

impl Part {
    fn new(kernel: Arc<Kernel>, value: u32) -> Self {
        let mut retained = Retained::default();
        if let Ok(pinned) = kernel.api_endpoints() {
            // Of a former process: kept as if published now.
            let own = pinned.into_iter().filter(|(_, found)| *found == value);
            retained.publish(own.map(|(address, _)| address), Instant::now());
        }
        Self { kernel, value, retained }
    }

    fn write(&mut self, current: &HashSet<SocketAddr>) {
        let now = Instant::now();
        self.retained.publish(current.iter().copied(), now);
        let added = current.iter().map(|address| self.kernel.set_api_endpoint(*address, self.value));
        let expired = self.retained.expire(now).into_iter();
        let removed = expired.map(|address| self.kernel.remove_api_endpoint(address));
        // One that fails must not leave the others out.
        for error in added.chain(removed).filter_map(Result::err) {
            let error = &error as &dyn std::error::Error;
            tracing::error!(cluster = self.value, error, "cannot update the API set");
        }
    }
}

/// When each address was last published.
#[derive(Debug, Default)]
struct Retained(HashMap<SocketAddr, Instant>);

impl Retained {
    fn publish(&mut self, addresses: impl Iterator<Item = SocketAddr>, now: Instant) {
        self.0.extend(addresses.map(|address| (address, now)));
    }

    /// Forgets and returns the addresses that were last published too long ago.
    fn expire(&mut self, now: Instant) -> Vec<SocketAddr> {
        let old = |published: &Instant| now.saturating_duration_since(*published) > RETENTION;
        let expired: Vec<_> =
            self.0.iter().filter(|(_, published)| old(published)).map(|(address, _)| *address).collect();
        for address in &expired {
            self.0.remove(address);
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::{RETENTION, Retained};

    #[test]
    fn an_address_outlives_its_publication_for_hours() {
        let (old, new) = (([192, 0, 2, 1], 443).into(), ([192, 0, 2, 2], 443).into());
        let start = Instant::now();
        let mut retained = Retained::default();
        retained.publish([old, new].into_iter(), start);
        retained.publish([new].into_iter(), start + RETENTION);
        assert!(retained.expire(start + RETENTION).is_empty());
        assert_eq!(retained.expire(start + RETENTION * 2), [old]);
        assert!(retained.expire(start + RETENTION * 2).is_empty());
    }
}
