//! What waits in a pod's lane for keys that are not on disk yet. Only what a key encrypted waits for it, and what the same request says
//! after that: other requests, of the same pod too, are ahead of it meanwhile. Knows neither locks nor clocks.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use super::entry::Append;

/// See the module. Appends of one request keep their order.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// By the number of the key.
    waiting: HashMap<u64, VecDeque<Append>>,
    /// Requests of which something waits, and for which key.
    requests: HashMap<Arc<str>, u64>,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Keeps an append that has to wait; gives back one that need not.
    pub(super) fn keep(&mut self, append: Append) -> Option<Append> {
        let behind = append.request.as_ref().and_then(|request| self.requests.get(request)).copied();
        let Some(key) = behind.or_else(|| append.awaited_key()) else { return Some(append) };
        if let Some(request) = &append.request {
            self.requests.insert(Arc::clone(request), key);
        }
        self.waiting.entry(key).or_default().push_back(append);
        None
    }

    /// What waited for this key, in order. Some of it may have to wait for another one: it is to be kept again.
    pub(super) fn take(&mut self, key: u64) -> VecDeque<Append> {
        let taken = self.waiting.remove(&key).unwrap_or_default();
        for request in taken.iter().filter_map(|append| append.request.as_ref()) {
            self.requests.remove(request);
        }
        taken
    }
}
