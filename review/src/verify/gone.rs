//! What an epoch holds no more, and what its log is compared with: what was published and removed, what a topic's
//! retention took, and what others say that the root was at some size.

use uuid::Uuid;
use weir_common::merkle::Hash;

use super::{epoch::Check, known::CHECKPOINT_FILE};
use crate::{
    moment::counted,
    source::{Epoch, missing, read_removed, with_sources},
};

impl Check<'_> {
    /// Goes on behind what was published and removed.
    pub(super) fn removed(&mut self, epoch: &Epoch, id: Option<Uuid>) {
        match (&epoch.removed, read_removed(&epoch.directory)) {
            (Some(removed), _) if Some(removed.epoch) == id => {
                self.tree = removed.tree.clone();
                (self.totals.removed, self.totals.end) = (self.tree.size(), self.tree.size());
            }
            (Some(removed), _) => {
                self.intact = false;
                let what = format!("the record of removed segments is that of epoch {}", removed.epoch);
                self.damage(None, None, what);
            }
            (None, Err(error)) => {
                self.intact = false;
                self.damage(None, None, with_sources(&error));
            }
            // One that has just been written is met when its segments cannot be found.
            (None, Ok(_)) => {}
        }
        if self.totals.removed > 0 {
            let events = counted(self.totals.removed, "event");
            self.note(
                None,
                None,
                format!("the first {events} were published and removed: the topic has them"),
            );
        }
    }

    pub(super) fn has_root(&self) -> bool {
        self.intact && self.whole
    }

    fn is_before_horizon(&self) -> bool {
        let horizon = self.journal.topic().and_then(|topic| topic.facts().horizon_us);
        horizon.is_some_and(|horizon| self.last_us < horizon)
    }

    /// Whether retention may have removed what comes here, and that is accepted.
    pub(super) fn may_be_gone(&self) -> bool {
        self.partial && self.is_before_horizon()
    }

    /// Events that a topic does not have.
    pub(super) fn lost(&mut self, expected: u64, next: u64) {
        let before_horizon = self.is_before_horizon();
        self.words.interrupted();
        let what = missing(expected, next);
        if self.may_be_gone() {
            self.whole = false;
            return self.note(
                None,
                Some(expected),
                format!("{what}: the topic's retention has removed them"),
            );
        }
        self.intact = false;
        let hint = "; the topic's retention may have removed them: --partial accepts that";
        let hint = if before_horizon { hint } else { "" };
        self.damage(None, Some(expected), format!("{what}{hint}"));
    }

    /// Compares the log's root with what others say it was at this size. What they say of a smaller size, where events
    /// are gone, cannot be compared any more.
    pub(super) fn compare_root(&mut self, size: u64, offset: Option<usize>) {
        let has_root = self.has_root();
        let kept = self.kept.as_mut().filter(|kept| kept.checkpoint.size <= size && !kept.is_judged());
        // A checkpoint of the log that comes here may bring the root yet.
        let kept = kept.filter(|kept| has_root || !self.intact || kept.checkpoint.size < size);
        let own = self.own.take_if(|own| own.size <= size);
        if kept.is_none()
            && own.is_none()
            && !self.claims.iter().any(|claim| claim.size <= size && !claim.met)
        {
            return;
        }
        let root: Hash = self.tree.root();
        match kept {
            Some(kept) if !self.intact => kept.matches = Some(false),
            Some(kept) if !has_root || kept.checkpoint.size < size => kept.gone = true,
            Some(kept) => kept.matches = Some(kept.checkpoint.root == root),
            None => {}
        }
        if let Some(own) = own.filter(|own| has_root && own.size == size) {
            if own.root != root {
                let what =
                    format!("root at {size} events is not the one in the epoch's file `{CHECKPOINT_FILE}`");
                self.damage(offset, Some(size), what);
            } else {
                // Signed while nothing was recorded, or all that is left of a log that was removed.
                self.vouched(&own);
            }
        }
        let hex = hex::encode(root);
        let mut wrong = Vec::new();
        for claim in self.claims.iter_mut().filter(|claim| claim.size <= size && !claim.met) {
            claim.met = true;
            if has_root && claim.size == size && claim.root != hex {
                wrong.push(format!(
                    "root at {size} events is not the one that epoch {} found",
                    claim.successor
                ));
            }
        }
        for what in wrong {
            self.damage(offset, Some(size), what);
        }
    }
}
