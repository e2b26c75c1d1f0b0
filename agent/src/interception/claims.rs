//! Which cluster each address of the API set belongs to, and for how long after it was last published.
//!
//! An address that a cluster takes away may still be dialled by clients that have it, and on a managed control plane may
//! come back: for hours it still belongs to the cluster. An address that two clusters publish stays with the first, since a
//! connection must be for one. Time is given; the kernel's maps are written elsewhere.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use tokio::time::Instant;

/// How long an address stays in the API set after it was last published.
pub(super) const RETENTION: Duration = Duration::from_secs(6 * 60 * 60);
/// Most addresses of one cluster that are kept although they are not published any more; the oldest go first.
pub(super) const RETAINED_MAX: usize = 4096;

/// The addresses and their clusters.
#[derive(Debug, Default)]
pub(super) struct Claims(HashMap<SocketAddr, Claim>);

#[derive(Debug)]
struct Claim {
    owner: u32,
    /// Whether the owner publishes it now.
    published: bool,
    /// Whether it was ever published, or has proved to be the owner's.
    proven: bool,
    /// When that was last so.
    last: Instant,
}

/// What is to be written after a publication.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Addresses that belong to the API set from now on, for certain, or whose owner is another one.
    pub(super) added: Vec<SocketAddr>,
    /// Addresses that do no longer.
    pub(super) removed: Vec<SocketAddr>,
    /// Addresses that stay with another owner, and with which.
    pub(super) refused: Vec<(SocketAddr, u32)>,
}

/// The one form of an address: a v4-mapped one is its IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl Claims {
    /// Takes over what a former process had: kept as if published until now, but not against who publishes it.
    pub(super) fn adopt(&mut self, owner: u32, address: SocketAddr, now: Instant) {
        let claim = Claim { owner, published: false, proven: true, last: now };
        self.0.entry(canonical(address)).or_insert(claim);
    }

    /// Says what an owner publishes now, all of it.
    pub(super) fn publish(
        &mut self,
        owner: u32,
        current: impl IntoIterator<Item = SocketAddr>,
        now: Instant,
    ) -> Changes {
        let current: HashSet<SocketAddr> = current.into_iter().map(canonical).collect();
        let mut changes = Changes::default();
        for (address, claim) in self.0.iter_mut().filter(|(_, claim)| claim.owner == owner) {
            if claim.published && !current.contains(address) {
                (claim.published, claim.last) = (false, now);
            }
        }
        for address in current {
            match self.0.get(&address) {
                Some(claim) if claim.owner != owner && claim.published => {
                    changes.refused.push((address, claim.owner));
                    continue;
                }
                Some(claim) if claim.owner == owner && claim.proven => {}
                // Also what was under suspicion until now: what pods have open there is still to be ended.
                _ => changes.added.push(address),
            }
            self.0.insert(address, Claim { owner, published: true, proven: true, last: now });
        }
        changes.removed = self.expire(owner, now);
        changes
    }

    /// Takes an address for an owner's on mere suspicion. Returns whether it was of nobody before.
    pub(super) fn suspect(&mut self, owner: u32, address: SocketAddr, now: Instant) -> bool {
        let address = canonical(address);
        if let Some(claim) = self.0.get_mut(&address) {
            if claim.owner == owner && claim.proven {
                claim.last = now;
            }
            return false;
        }
        self.0.insert(address, Claim { owner, published: false, proven: false, last: now });
        true
    }

    /// Ends a suspicion: the address is the owner's, or it is of nobody. Returns whether it is now of nobody.
    pub(super) fn settle(&mut self, owner: u32, address: SocketAddr, proven: bool, now: Instant) -> bool {
        let address = canonical(address);
        match self.0.get_mut(&address) {
            // Meanwhile published, by whomever.
            Some(claim) if claim.owner != owner || claim.proven => false,
            Some(claim) if proven => {
                (claim.proven, claim.last) = (true, now);
                false
            }
            Some(_) => self.0.remove(&address).is_some(),
            None => false,
        }
    }

    /// Forgets and returns the owner's addresses that were last published too long ago, or are too many.
    fn expire(&mut self, owner: u32, now: Instant) -> Vec<SocketAddr> {
        let retained = self.0.iter().filter(|(_, claim)| claim.owner == owner && !claim.published);
        let mut retained: Vec<_> = retained.map(|(address, claim)| (claim.last, *address)).collect();
        // The latest first.
        retained.sort_unstable_by(|one, other| other.cmp(one));
        let is_old = |last: &Instant| now.saturating_duration_since(*last) > RETENTION;
        let expired = retained.into_iter().enumerate();
        let expired = expired.filter(|(index, (last, _))| *index >= RETAINED_MAX || is_old(last));
        let expired: Vec<_> = expired.map(|(_, (_, address))| address).collect();
        for address in &expired {
            self.0.remove(address);
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use tokio::time::Instant;

    use super::{Changes, Claims, RETAINED_MAX, RETENTION};

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn an_address_outlives_its_publication_for_hours() {
        let (old, new) = (address("192.0.2.1:443"), address("[2001:db8::2]:443"));
        let start = Instant::now();
        let mut claims = Claims::default();
        assert_eq!(claims.publish(0, [old], start).added, [old]);
        assert_eq!(claims.publish(0, [new], start), Changes { added: vec![new], ..Changes::default() });
        assert_eq!(claims.publish(0, [new], start + RETENTION), Changes::default());
        let late = start + RETENTION + Duration::from_secs(1);
        assert_eq!(claims.publish(0, [new], late), Changes { removed: vec![old], ..Changes::default() });
        assert_eq!(claims.publish(0, [new], late), Changes::default());
    }

    #[test]
    fn of_those_that_are_not_published_any_more_the_oldest_go_first() {
        let start = Instant::now();
        let mut claims = Claims::default();
        let all: Vec<SocketAddr> = (0..=RETAINED_MAX)
            .map(|index| address(&format!("10.0.{}.{}:443", index / 256, index % 256)))
            .collect();
        // Most of them by a former process: each publication looks at all that there are.
        let (former, own) = all.split_at(RETAINED_MAX - 10);
        for (one, passed) in former.iter().zip(0..) {
            claims.adopt(0, *one, start + Duration::from_millis(passed));
        }
        for (one, passed) in own.iter().zip(10_000..) {
            claims.publish(0, [*one], start + Duration::from_millis(passed));
        }
        let now = start + Duration::from_secs(60);
        assert_eq!(claims.publish(0, [], now).removed, [all[0]]);
    }

    #[test]
    fn an_address_that_two_clusters_publish_stays_with_the_first() {
        let (both, mapped) = (address("192.0.2.1:443"), address("[::ffff:192.0.2.1]:443"));
        let now = Instant::now();
        let mut claims = Claims::default();
        claims.publish(0, [both], now);
        let refused = Changes { refused: vec![(both, 0)], ..Changes::default() };
        assert_eq!(claims.publish(1, [mapped], now), refused);
        // Once the first has given it up, it is the second's at once, and stays so.
        assert_eq!(claims.publish(0, [], now), Changes::default());
        assert_eq!(claims.publish(1, [both], now).added, [both]);
        assert_eq!(claims.publish(0, [], now + RETENTION * 2), Changes::default());
    }

    #[test]
    fn what_a_former_process_knew_is_no_hindrance_to_who_publishes_it() {
        let (known, other) = (address("192.0.2.1:443"), address("192.0.2.2:443"));
        let now = Instant::now();
        let mut claims = Claims::default();
        claims.adopt(0, known, now);
        claims.adopt(0, other, now);
        assert_eq!(claims.publish(1, [known], now), Changes { added: vec![known], ..Changes::default() });
        assert_eq!(claims.publish(0, [], now + RETENTION * 2).removed, [other]);
    }

    #[test]
    fn a_suspicion_holds_until_it_is_settled_and_never_against_who_publishes() {
        let (one, other, third) =
            (address("192.0.2.1:443"), address("192.0.2.2:443"), address("192.0.2.3:443"));
        let now = Instant::now();
        let mut claims = Claims::default();
        assert!(claims.suspect(0, one, now));
        assert!(!claims.suspect(0, one, now), "already");
        assert!(claims.settle(0, one, false, now), "of nobody again");
        assert!(claims.suspect(0, other, now));
        assert!(!claims.settle(0, other, true, now));
        assert!(!claims.settle(0, other, false, now), "proven is proven");
        assert!(claims.suspect(0, third, now));
        assert_eq!(claims.publish(1, [third], now).added, [third]);
        assert!(!claims.settle(0, third, false, now), "meanwhile another's");
        assert!(claims.suspect(0, one, now));
        assert_eq!(claims.publish(0, [one], now).added, [one], "certain from now on");
        assert!(!claims.settle(0, one, false, now), "published");
        assert_eq!(claims.publish(0, [], now + RETENTION * 2).removed, [other]);
    }
}
