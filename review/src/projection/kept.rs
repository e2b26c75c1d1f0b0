//! A map of bounded size that forgets what was not asked for the longest.

use std::collections::HashMap;

/// What share of a full map is forgotten at once, so that making room costs little for each entry.
const FORGOTTEN_AT_ONCE: usize = 8;

/// Entries by their ids.
#[derive(Debug)]
pub(super) struct Kept<V> {
    entries: HashMap<String, (u64, V)>,
    /// Counts looks; the larger, the later.
    looks: u64,
    entries_max: usize,
}

impl<V> Kept<V> {
    pub(super) fn new(entries_max: usize) -> Self {
        Self { entries: HashMap::new(), looks: 0, entries_max }
    }

    /// Puts an entry in; says whether others were forgotten for it.
    pub(super) fn put(&mut self, id: &str, value: V) -> bool {
        let full = self.entries.len() >= self.entries_max && !self.entries.contains_key(id);
        if full {
            let mut looks: Vec<u64> = self.entries.values().map(|(look, _)| *look).collect();
            let place = looks.len() / FORGOTTEN_AT_ONCE;
            let (_, last, _) = looks.select_nth_unstable(place);
            let last = *last;
            self.entries.retain(|_, (look, _)| *look > last);
        }
        self.looks += 1;
        self.entries.insert(id.to_owned(), (self.looks, value));
        full
    }

    /// An entry to be looked at or changed: it counts as used.
    pub(super) fn used(&mut self, id: &str) -> Option<&mut V> {
        self.looks += 1;
        let (look, value) = self.entries.get_mut(id)?;
        *look = self.looks;
        Some(value)
    }

    pub(super) fn get(&self, id: &str) -> Option<&V> {
        self.entries.get(id).map(|(_, value)| value)
    }

    pub(super) fn remove(&mut self, id: &str) -> Option<V> {
        self.entries.remove(id).map(|(_, value)| value)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.values().map(|(_, value)| value)
    }

    /// Of those that `counts`, the one that was not used the longest.
    pub(super) fn oldest(&mut self, counts: impl Fn(&V) -> bool) -> Option<&mut V> {
        let candidates = self.entries.values_mut().filter(|(_, value)| counts(value));
        candidates.min_by_key(|(look, _)| *look).map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::Kept;

    #[test]
    fn what_was_not_used_the_longest_is_forgotten() {
        let mut kept = Kept::new(16);
        for number in 0..16 {
            assert!(!kept.put(&number.to_string(), number));
        }
        assert_eq!(kept.used("0"), Some(&mut 0));
        assert!(!kept.put("3", 33), "nothing has to go for one that is there");
        assert!(kept.put("16", 16));
        let there = |id: &str| kept.get(id).is_some();
        assert!(there("0") && there("16") && kept.get("3") == Some(&33));
        assert!(!there("1") && !there("2"));
        assert!(kept.values().count() <= 16);
        assert_eq!(kept.oldest(|value| *value > 5), Some(&mut 6));
        assert_eq!((kept.remove("0"), kept.remove("0")), (Some(0), None));
    }
}
