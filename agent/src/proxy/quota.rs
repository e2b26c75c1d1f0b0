//! Bounds per pod and for the whole agent: connections and held request bodies, so that one pod cannot take the
//! agent from its neighbours.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use weir_common::event::Caller;

/// A count that may not pass its bound.
#[derive(Debug)]
struct Bounded {
    used: AtomicUsize,
    max: usize,
}

impl Bounded {
    fn new(max: usize) -> Self {
        Self { used: AtomicUsize::new(0), max }
    }

    fn take(&self, amount: usize) -> bool {
        let within = |used: usize| used.checked_add(amount).filter(|sum| *sum <= self.max);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
    }

    fn give_back(&self, amount: usize) {
        self.used.fetch_sub(amount, Ordering::Relaxed);
    }
}

/// Bounds of one kind of thing, per pod and in all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    /// For one pod.
    pub(super) per_pod: usize,
    /// For all of them together.
    pub(super) in_all: usize,
}

/// Whose quota it is: the pod's UID, or the cgroup where there is no pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Pod(String),
    Cgroup(u64),
}

/// All quotas.
#[derive(Debug)]
pub(super) struct Quotas {
    connections: Bound,
    held_bytes: Bound,
    all_connections: Bounded,
    all_held: Arc<Bounded>,
    /// Pods with at least one connection, or that hold anything still. Touched when a connection comes or goes, never per request.
    pods: Mutex<HashMap<Owner, Weak<Quota>>>,
}

/// What one pod uses.
#[derive(Debug)]
pub(super) struct Quota {
    connections: Bounded,
    held: Bounded,
    all_held: Arc<Bounded>,
}

/// A connection's place; given back on drop.
#[derive(Debug)]
pub(super) struct Place {
    quotas: Arc<Quotas>,
    owner: Owner,
    quota: Arc<Quota>,
}

/// Room for a held body; given back on drop.
#[derive(Debug)]
pub(super) struct HeldBytes {
    quota: Arc<Quota>,
    bytes: usize,
}

impl Quotas {
    pub(super) fn new(connections: Bound, held_bytes: Bound) -> Arc<Self> {
        Arc::new(Self {
            connections,
            held_bytes,
            all_connections: Bounded::new(connections.in_all),
            all_held: Arc::new(Bounded::new(held_bytes.in_all)),
            pods: Mutex::default(),
        })
    }

    /// A place for one more connection of `caller`; none if its pod or the agent has no more.
    pub(super) fn place(self: &Arc<Self>, caller: &Caller) -> Option<Place> {
        let owner =
            caller.pod.as_ref().map_or(Owner::Cgroup(caller.cgroup), |pod| Owner::Pod(pod.uid.clone()));
        if !self.all_connections.take(1) {
            return None;
        }
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let quota = pods.get(&owner).and_then(Weak::upgrade).unwrap_or_else(|| {
            let quota = Arc::new(Quota {
                connections: Bounded::new(self.connections.per_pod),
                held: Bounded::new(self.held_bytes.per_pod),
                all_held: Arc::clone(&self.all_held),
            });
            // What is held longer than any connection of its pod goes without a word.
            pods.retain(|_, quota| quota.strong_count() > 0);
            pods.insert(owner.clone(), Arc::downgrade(&quota));
            quota
        });
        if !quota.connections.take(1) {
            self.all_connections.give_back(1);
            return None;
        }
        Some(Place { quotas: Arc::clone(self), owner, quota })
    }
}

impl Place {
    /// The pod's quota.
    pub(super) fn quota(&self) -> &Arc<Quota> {
        &self.quota
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.quotas.all_connections.give_back(1);
        let mut pods = self.quotas.pods.lock().unwrap_or_else(PoisonError::into_inner);
        self.quota.connections.give_back(1);
        // Whoever looks for it holds the lock. A body that is held longer than its connection still counts for the next one.
        if Arc::strong_count(&self.quota) == 1 {
            pods.remove(&self.owner);
        }
    }
}

impl Quota {
    /// Room for a body of `bytes`; none if the pod or the agent has no more.
    pub(super) fn hold(self: &Arc<Self>, bytes: usize) -> Option<HeldBytes> {
        self.take_held(bytes).then(|| HeldBytes { quota: Arc::clone(self), bytes })
    }

    fn take_held(&self, bytes: usize) -> bool {
        if !self.held.take(bytes) {
            return false;
        }
        let taken = self.all_held.take(bytes);
        if !taken {
            self.held.give_back(bytes);
        }
        taken
    }
}

impl HeldBytes {
    /// How much room there is.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes the room at least `bytes` large; false if there is no more.
    pub(super) fn grow(&mut self, bytes: usize) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let taken = self.quota.take_held(more);
        if taken {
            self.bytes += more;
        }
        taken
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.quota.held.give_back(self.bytes);
        self.quota.all_held.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use weir_common::event::Pod;

    use super::*;

    fn caller(uid: &str) -> Caller {
        Caller { pod: Some(Pod { uid: uid.into(), ..Pod::default() }), ..Caller::default() }
    }

    #[test]
    fn one_pod_cannot_take_all_places_and_gives_them_back() {
        let quotas = Quotas::new(Bound { per_pod: 2, in_all: 3 }, Bound { per_pod: 10, in_all: 15 });
        let first = quotas.place(&caller("a")).expect("the first");
        let _second = quotas.place(&caller("a")).expect("the second");
        assert!(quotas.place(&caller("a")).is_none());
        let other = quotas.place(&caller("b")).expect("the third in all");
        assert!(quotas.place(&caller("c")).is_none());
        drop(first);
        assert!(quotas.place(&caller("a")).is_some());
        drop(other);
        assert_eq!(
            quotas.pods.lock().expect("not poisoned").len(),
            1,
            "a pod without connections is forgotten"
        );
    }

    #[test]
    fn what_is_held_longer_than_its_connection_counts_for_the_next_one() {
        let quotas = Quotas::new(Bound { per_pod: 2, in_all: 4 }, Bound { per_pod: 10, in_all: 15 });
        let held = quotas.place(&caller("a")).expect("a place").quota().hold(10).expect("all of it");
        assert!(quotas.place(&caller("a")).expect("a place").quota().hold(1).is_none());
        drop(held);
        assert!(quotas.place(&caller("b")).expect("a place").quota().hold(1).is_some());
        assert_eq!(quotas.pods.lock().expect("not poisoned").len(), 0, "nobody is kept for ever");
    }

    #[test]
    fn held_bodies_are_bounded_per_pod_and_in_all() {
        let quotas = Quotas::new(Bound { per_pod: 2, in_all: 4 }, Bound { per_pod: 10, in_all: 15 });
        let (a, b) = (quotas.place(&caller("a")).expect("a"), quotas.place(&caller("b")).expect("b"));
        let mut held = a.quota().hold(6).expect("within the pod's bound");
        assert!(held.grow(10) && !held.grow(11));
        assert!(b.quota().hold(6).is_none(), "over the bound of all");
        drop(held);
        assert!(b.quota().hold(10).is_some());
    }
}
