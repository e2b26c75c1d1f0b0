//! Who waits for room in the queue. What they need is kept free from lanes that hold more turns' worth than theirs, and, among those
//! that hold as much, from whoever came later: so the one that comes first is passed by nobody and gets room as the queue
//! drains, however many lanes refill what becomes free. Without that a long append never finds the room that many short ones take.
//! Knows neither locks nor clocks.

/// Most bytes of a lane that the writer takes in one turn, beyond its last append.
pub(super) const TURN_BYTES: usize = 512 * 1024;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// At most one of each lane.
    waiting: Vec<Claim>,
    made: u64,
}

#[derive(Debug)]
struct Claim {
    number: u64,
    lane: u64,
    bytes: usize,
}

/// Where somebody stands: before all that are greater.
type Rank = (usize, u64);

fn rank(lane_bytes: usize, number: u64) -> Rank {
    // What goes with the next turn counts as nothing: a small event does not throw its lane back.
    (lane_bytes / TURN_BYTES, number)
}

/// What must be free for an append in a lane that holds `lane_bytes`.
pub(super) fn need(lane_bytes: usize, bytes: usize) -> usize {
    // Half of what is free is a lane's, unless it is empty.
    if lane_bytes == 0 { bytes } else { 2 * (lane_bytes + bytes) }
}

impl Claims {
    /// A lane waits for room; `own` is what an earlier try was told. The claim's number, unless it is another one's of the same lane.
    pub(super) fn wait(&mut self, lane: u64, bytes: usize, own: Option<u64>) -> Option<u64> {
        if let Some(claim) = self.waiting.iter().find(|claim| claim.lane == lane) {
            return own.filter(|own| *own == claim.number);
        }
        self.made += 1;
        self.waiting.push(Claim { number: self.made, lane, bytes });
        Some(self.made)
    }

    /// Nobody waits for it any more; whether it was there.
    pub(super) fn end(&mut self, number: u64) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|claim| claim.number != number);
        self.waiting.len() < before
    }

    /// So many bytes of a lane have found room, or wait for none: what waited for more still does.
    pub(super) fn served(&mut self, lane: u64, bytes: usize) {
        self.waiting.retain(|claim| claim.lane != lane || claim.bytes > bytes);
    }

    /// How much an append must leave free for those that come before it.
    pub(super) fn reserved(&self, lane: u64, bytes: usize, held: impl Fn(u64) -> usize) -> usize {
        // A short one does not use the claim of a long one in its lane.
        let own = self.waiting.iter().find(|claim| claim.lane == lane && claim.bytes <= bytes);
        let rank_of_own = rank(held(lane), own.map_or(u64::MAX, |claim| claim.number));
        let before = self.waiting.iter().filter(|claim| rank(held(claim.lane), claim.number) < rank_of_own);
        before.map(|claim| need(held(claim.lane), claim.bytes)).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::{Claims, TURN_BYTES};

    #[test]
    fn who_waits_is_passed_only_by_lanes_that_hold_less() {
        let mut claims = Claims::default();
        assert_eq!(claims.wait(1, 100, None), Some(1));
        assert_eq!(claims.wait(2, 200, None), Some(2));
        let nothing = |_| 0;
        assert_eq!(claims.reserved(1, 100, nothing), 0, "it came first");
        assert_eq!(claims.reserved(2, 200, nothing), 100);
        assert_eq!(claims.reserved(3, 5, nothing), 200, "it came last");
        // The first one's lane holds more than goes with a turn.
        let first = |lane| if lane == 1 { TURN_BYTES } else { 0 };
        assert_eq!(claims.reserved(2, 200, first), 0);
        assert_eq!(claims.reserved(1, 100, first), 200);
        assert_eq!(claims.reserved(3, 5, first), 200);
        let little = |lane| if lane == 1 { 10 } else { 0 };
        assert_eq!(claims.reserved(3, 5, little), 220, "what its lane holds is needed as well");
    }

    #[test]
    fn a_lane_has_one_claim_which_a_shorter_append_neither_uses_nor_ends() {
        let mut claims = Claims::default();
        let own = claims.wait(1, 100, None);
        assert_eq!(claims.wait(1, 50, None), None, "it is another one's");
        assert_eq!(claims.wait(1, 100, own), own);
        assert_eq!(claims.reserved(1, 50, |_| 0), 100);
        claims.served(1, 50);
        assert_eq!(claims.wait(1, 100, own), own);
        claims.served(1, 100);
        assert_eq!(claims.reserved(2, 1, |_| 0), 0);
        let again = claims.wait(1, 100, own).unwrap();
        assert!(Some(again) != own && claims.end(again) && !claims.end(again));
    }
}
