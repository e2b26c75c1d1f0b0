//! Which numbers of a sequence are there: few ranges, however many numbers.

use std::collections::{BTreeMap, HashMap, VecDeque};

use uuid::Uuid;
use weir_common::merkle::Hash;

/// Most ranges that are kept; then the lowest is forgotten.
const RANGES_MAX: usize = 100_000;

/// A set of numbers that mostly follow one another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// First and last number of each; they neither overlap nor touch.
    list: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds a number; false if it is there already.
    pub(crate) fn insert(&mut self, number: u64) -> bool {
        let before = self.list.range(..=number).next_back().map(|(first, last)| (*first, *last));
        if before.is_some_and(|(_, last)| number <= last) {
            return false;
        }
        let first = match before {
            Some((first, last)) if last.checked_add(1) == Some(number) => first,
            _ => number,
        };
        let after = number.checked_add(1).and_then(|next| self.list.remove(&next));
        self.list.insert(first, after.unwrap_or(number));
        if self.list.len() > RANGES_MAX {
            self.list.pop_first();
        }
        true
    }
}

/// Most events whose digests are kept: what comes again comes soon.
const RECENT_MAX: usize = 65_536;

/// What the last events said, so that one that comes again can be held against it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent {
    digests: HashMap<(Uuid, u64), Hash>,
    order: VecDeque<(Uuid, u64)>,
}

impl Recent {
    /// Keeps the digest of an event that is new.
    pub(crate) fn keep(&mut self, epoch: Uuid, sequence: u64, digest: Hash) {
        if self.digests.insert((epoch, sequence), digest).is_none() {
            self.order.push_back((epoch, sequence));
        }
        if self.order.len() > RECENT_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.digests.remove(&oldest);
        }
    }

    /// Whether an event that comes again says other than before; false also if that is not known any more.
    pub(crate) fn contradicts(&self, epoch: Uuid, sequence: u64, digest: &Hash) -> bool {
        self.digests.get(&(epoch, sequence)).is_some_and(|known| known != digest)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use uuid::Uuid;

    use super::{RECENT_MAX, Ranges, Recent};

    #[test]
    fn the_last_digests_are_kept_and_no_more() {
        let (mut recent, epoch) = (Recent::default(), Uuid::nil());
        (0..=RECENT_MAX as u64).for_each(|sequence| recent.keep(epoch, sequence, [1; 32]));
        assert_eq!((recent.digests.len(), recent.order.len()), (RECENT_MAX, RECENT_MAX));
        assert!(!recent.contradicts(epoch, 0, &[2; 32]), "too old");
        assert!(recent.contradicts(epoch, 1, &[2; 32]) && !recent.contradicts(epoch, 1, &[1; 32]));
    }

    #[test]
    fn numbers_in_any_order_are_the_same_set_and_ranges_that_meet_are_one() {
        let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
        // A fixed walk over 0..97 that comes back to numbers it has met.
        let mut number = 1_u64;
        for _ in 0..300 {
            number = (number * 31 + 7) % 97;
            assert_eq!(ranges.insert(number), set.insert(number), "{number}");
            let listed: BTreeSet<u64> = ranges.list.iter().flat_map(|(first, last)| *first..=*last).collect();
            assert_eq!(listed, set);
        }
        (0..97).for_each(|number| {
            ranges.insert(number);
        });
        assert_eq!(ranges.list.len(), 1);
        assert!(ranges.insert(u64::MAX) && !ranges.insert(u64::MAX));
    }
}
