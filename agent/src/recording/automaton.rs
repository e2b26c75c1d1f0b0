//! Follows an expression through a text that is too long to be kept: whether a match may still go on. Sans-IO.
//!
//! It runs through the expression's states, all that the text may have reached at once, and keeps nothing of the text. A match may
//! begin at each byte; so where no state is left, no match that began before that byte, or at it, holds it. Whoever sends a text decides
//! how long that goes on, so a byte costs no more than [`STATES_MAX`] steps, and what is kept of a text is one bit for each state.

use regex_automata::{
    nfa::thompson::{Compiler, NFA, State, WhichCaptures},
    util::primitives::StateID,
};
use regex_syntax::hir::Hir;

/// Most states of an expression that is followed.
const STATES_MAX: usize = 256;

/// Most bytes that are spent on finding out how many states an expression has.
const COMPILED_BYTES_MAX: usize = 64 * 1024;

/// A set of states.
type States = [u64; STATES_MAX / 64];

/// An expression.
#[derive(Debug)]
pub(super) struct Automaton {
    nfa: NFA,
    /// By state: itself, and those that are reached from it without a byte.
    closures: Vec<States>,
}

/// What a text has reached of it.
#[derive(Default)]
pub(super) struct Reached(States);

impl Automaton {
    /// None: it has too many states.
    pub(super) fn new(hir: &Hir) -> Option<Self> {
        let config = NFA::config().utf8(false).which_captures(WhichCaptures::None);
        let mut compiler = Compiler::new();
        compiler.configure(config.nfa_size_limit(Some(COMPILED_BYTES_MAX)));
        let nfa = compiler.build_from_hir(hir).ok().filter(|nfa| nfa.states().len() <= STATES_MAX)?;
        let closures = (0..nfa.states().len()).map(|state| closure(&nfa, state)).collect();
        Some(Self { nfa, closures })
    }

    /// How many of the next bytes matches may hold that have begun anywhere before, one after the other: all of them, or those
    /// up to one that none holds.
    pub(super) fn follow(&self, reached: &mut Reached, text: &[u8]) -> usize {
        let begun = &self.closures[self.nfa.start_anchored().as_usize()];
        for (at, byte) in text.iter().enumerate() {
            let (mut states, mut next) = (reached.0, States::default());
            add(&mut states, begun);
            for (place, bits) in states.iter_mut().enumerate() {
                while *bits != 0 {
                    let state = place * 64 + bits.trailing_zeros() as usize;
                    *bits &= *bits - 1;
                    if let Some(to) = step(&self.nfa.states()[state], *byte) {
                        add(&mut next, &self.closures[to.as_usize()]);
                    }
                }
            }
            reached.0 = next;
            if next == States::default() {
                return at;
            }
        }
        text.len()
    }
}

fn add(states: &mut States, others: &States) {
    states.iter_mut().zip(others).for_each(|(bits, others)| *bits |= others);
}

/// Where a state goes with a byte.
fn step(state: &State, byte: u8) -> Option<StateID> {
    match state {
        State::ByteRange { trans } => trans.matches_byte(byte).then_some(trans.next),
        State::Sparse(transitions) => transitions.matches_byte(byte),
        State::Dense(transitions) => transitions.matches_byte(byte),
        _ => None,
    }
}

/// A state, and those that are reached from it without a byte.
fn closure(nfa: &NFA, state: usize) -> States {
    let (mut states, mut stack) = (States::default(), vec![state]);
    while let Some(state) = stack.pop() {
        let (place, bit) = (state / 64, 1_u64 << (state % 64));
        if states[place] & bit != 0 {
            continue;
        }
        states[place] |= bit;
        match &nfa.states()[state] {
            State::Union { alternates } => stack.extend(alternates.iter().map(|to| to.as_usize())),
            State::BinaryUnion { alt1, alt2 } => stack.extend([alt1.as_usize(), alt2.as_usize()]),
            // Expressions have no anchors.
            State::Capture { next, .. } | State::Look { next, .. } => stack.push(next.as_usize()),
            _ => {}
        }
    }
    states
}

#[cfg(test)]
mod tests {
    use regex_syntax::ParserBuilder;

    use super::{Automaton, Reached};

    /// Bytes of `text` up to one that no match holds.
    fn held(expression: &str, text: &str) -> usize {
        let hir = ParserBuilder::new().unicode(false).utf8(false).build().parse(expression).unwrap();
        let automaton = Automaton::new(&hir).unwrap();
        let mut reached = Reached::default();
        let whole = automaton.follow(&mut reached, text.as_bytes());
        let (mut reached, mut bytes) = (Reached::default(), 0);
        for byte in text.bytes() {
            match automaton.follow(&mut reached, &[byte]) {
                1 => bytes += 1,
                _ => break,
            }
        }
        assert_eq!(bytes, whole, "byte by byte");
        whole
    }

    #[test]
    fn a_match_is_followed_to_the_byte_that_it_cannot_hold() {
        assert_eq!(held("password=[^ ]+", "password=abc d"), 12);
        assert_eq!(held("password=[^ ]+", "password=abcd"), 13);
        assert_eq!(held("-BEGIN-[^-]+-END-", "-BEGIN-a\nb-END-x"), 15);
        assert_eq!(held("-BEGIN-[^-]+-END-", "-BEGIN-a\nb-ENx"), 13);
        // One begins before the other ends.
        assert_eq!(held("ab+c|cd+e", "abbcdde."), 7);
        assert_eq!(held("(?:ab|bc){2,3}", "ababbcbc."), 8);
        assert_eq!(held("ab", "xab"), 0);
    }

    #[test]
    fn one_that_has_too_many_states_is_not_followed() {
        for (expression, is_followed) in
            [("[a-z]{200,}", true), ("[a-z]{300,}", false), ("[a-z]{9999}", false)]
        {
            let hir = ParserBuilder::new().unicode(false).utf8(false).build().parse(expression).unwrap();
            assert_eq!(Automaton::new(&hir).is_some(), is_followed, "{expression}");
        }
    }
}
