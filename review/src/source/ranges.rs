//! Which numbers of a sequence are there: few ranges, however many numbers.

use std::collections::BTreeMap;

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Ranges;

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
