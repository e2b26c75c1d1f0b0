//! What an epoch holds no more, and what its log is compared with: what was published and removed, what a topic's
//! retention took, and what others say that the root was at some size.

use std::collections::BTreeMap;

use uuid::Uuid;
use weir_common::{frame::FrameType, merkle::Hash, segment::SegmentReader};

use super::{epoch::Check, known::CHECKPOINT_FILE};
use crate::{
    moment::counted,
    source::{Epoch, Journal, SourceError, missing, read_removed, read_segment, with_sources},
};

/// The earliest time that events behind a hole bear, by the event that follows it; of topics whose beginning is gone.
///
/// # Errors
/// A segment cannot be read.
pub(super) fn later_us(journal: &Journal, epoch: &Epoch) -> Result<BTreeMap<u64, i64>, SourceError> {
    let mut holes: Vec<(u64, i64)> = Vec::new();
    if journal.topic().is_none_or(|topic| topic.facts().trimmed == 0) {
        return Ok(BTreeMap::new());
    }
    let mut expected = 0;
    for number in epoch.segments.clone() {
        let bytes = read_segment(&journal.segments[number])?;
        let Ok(reader) = SegmentReader::new(&bytes, journal.successor(number)) else { continue };
        let frames = reader.flatten().map(|located| located.frame);
        for frame in frames.filter(|frame| frame.frame_type == FrameType::Event) {
            if frame.sequence > expected {
                holes.push((frame.sequence, i64::MAX));
            }
            expected = frame.sequence.saturating_add(1);
            let time = frame.envelope.time_unix_us;
            // Those before a hole whose events are all of before this time know of an earlier one already.
            holes
                .iter_mut()
                .rev()
                .take_while(|(_, later)| *later > time)
                .for_each(|(_, later)| *later = time);
        }
    }
    Ok(holes.into_iter().collect())
}

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

    /// Whether what comes behind the last event, and before the event `next` if there is one, may be of a time that retention has
    /// taken. Clocks are set back: what an event bears that comes later says more than one before it, or than the epoch's name.
    fn is_before_horizon(&self, next: Option<u64>) -> bool {
        let Some(horizon) = self.journal.topic().and_then(|topic| topic.facts().horizon_us) else {
            return false;
        };
        let later = next.and_then(|next| self.later_us.range(next..).next());
        self.last_us < horizon || later.is_some_and(|(_, later)| *later <= horizon)
    }

    /// Whether retention may have removed what comes here, and that is accepted.
    pub(super) fn may_be_gone(&self, next: Option<u64>) -> bool {
        self.partial && self.is_before_horizon(next)
    }

    /// Events that a topic does not have.
    pub(super) fn lost(&mut self, expected: u64, next: u64) {
        let before_horizon = self.is_before_horizon(Some(next));
        self.words.interrupted();
        let what = missing(expected, next);
        if self.may_be_gone(Some(next)) {
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
