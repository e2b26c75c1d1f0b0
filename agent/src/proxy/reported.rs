//! Which findings were reported a moment ago: a pod that repeats what one is about must not fill the journal with it. Each
//! of its requests is recorded anyway.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long the same finding is not reported again.
const WINDOW: Duration = Duration::from_secs(60);
/// Most findings that are remembered; beyond it each is reported.
const REMEMBERED_MAX: usize = 1024;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Reported(Mutex<HashMap<String, Instant>>);

impl Reported {
    /// Whether `message` is new, and is remembered from now on.
    pub(super) fn is_new(&self, message: &str, now: Instant) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = |at: &Instant| now.saturating_duration_since(*at) < WINDOW;
        if known.get(message).is_some_and(fresh) {
            return false;
        }
        if known.len() >= REMEMBERED_MAX {
            known.retain(|_, at| fresh(at));
        }
        if known.len() < REMEMBERED_MAX {
            known.insert(message.to_owned(), now);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{REMEMBERED_MAX, Reported, WINDOW};

    #[test]
    fn a_finding_is_new_once_in_a_while_and_never_lost_for_want_of_room() {
        let (reported, start) = (Reported::default(), Instant::now());
        assert!(reported.is_new("a", start));
        assert!(!reported.is_new("a", start));
        assert!(reported.is_new("b", start));
        assert!(reported.is_new("a", start + WINDOW));
        for number in 0..REMEMBERED_MAX + 10 {
            assert!(reported.is_new(&number.to_string(), start));
        }
        assert!(
            reported.is_new("late", start) && reported.is_new("late", start),
            "without room, each is reported"
        );
        assert!(reported.is_new("later", start + WINDOW * 2));
        assert!(!reported.is_new("later", start + WINDOW * 2), "room was made");
    }
}
