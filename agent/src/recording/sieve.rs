//! Expressions over streams that come in pieces: what they match is masked wherever a piece cuts it. Sans-IO.
//!
//! Nothing is held back: a piece is recorded before it is forwarded, so what it holds has to be decided with what there is. A match
//! that may have begun where the piece ends is recorded as `weir:masked:<length class>:begun`, and its bytes are kept to be searched
//! again with the next piece. When they are a match in the end, the mask of the whole follows, with its digest; should
//! they be none, they stay masked. One that grows too long to be kept is masked piece by piece until a byte comes that it cannot hold.

use std::{borrow::Cow, collections::HashMap, ops::Range};

use weir_common::event::Kind;

use super::{
    mask::{MASK_PREFIX, Masker, length_class},
    patterns::{Decided, Patterns, Search},
};
use crate::streams::{CONNECTIONS_MAX, Lane};

/// What stands for a digest where there is none: digests of single letters could be told apart.
const BEGUN: &str = "begun";

/// Most lanes of one stream that are searched at the same time: bytes both ways and errors of all connections that are counted.
const LANES_MAX: usize = 3 * CONNECTIONS_MAX;

/// The search through one stream. `Debug` would show what it keeps.
#[derive(Default)]
pub(super) struct Sieve {
    /// What the last piece ended with, where a match may have begun.
    begun: Vec<u8>,
    /// How far each expression is; none where nothing has begun.
    searches: Vec<Search>,
    /// Masks so far, and bytes that they stand for.
    pub(super) masks: u64,
    pub(super) masked_bytes: u64,
}

impl std::fmt::Debug for Sieve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sieve({} bytes)", self.begun.len())
    }
}

impl Sieve {
    /// What is recorded of the next piece.
    pub(super) fn push<'a>(
        &mut self,
        masker: &Masker,
        patterns: &Patterns,
        piece: &'a [u8],
    ) -> Cow<'a, [u8]> {
        if self.searches.is_empty() && !patterns.may_be_in(piece) {
            return Cow::Borrowed(piece);
        }
        let masks = self.masks;
        let (text, Decided { found, hidden, .. }) = self.search(patterns, piece);
        let (mut recorded, mut out) = (text.len() - piece.len(), Vec::new());
        for found in found {
            self.between(&text, recorded..found.start, &hidden, &mut out);
            out.extend_from_slice(masker.mask(&text[found.clone()]).as_bytes());
            recorded = recorded.max(found.start);
            self.count(found.end.saturating_sub(recorded));
            recorded = recorded.max(found.end);
        }
        self.between(&text, recorded..text.len(), &hidden, &mut out);
        if self.masks == masks { Cow::Borrowed(piece) } else { Cow::Owned(out) }
    }

    /// What the next piece holds, with the text that was kept before it; and keeps what is needed to search on.
    fn search<'a>(&mut self, patterns: &Patterns, piece: &'a [u8]) -> (Cow<'a, [u8]>, Decided) {
        let seen = self.begun.len();
        let text = if seen == 0 { Cow::Borrowed(piece) } else { [&self.begun[..], piece].concat().into() };
        let decided = patterns.decided(&text, seen, &mut self.searches);
        self.begun = text[decided.keep..].to_vec();
        if self.begun.is_empty() && !self.searches.iter().any(Search::is_long) {
            self.searches = Vec::new();
        }
        (text, decided)
    }

    /// Bytes that no match holds: clear where nothing is hidden.
    fn between(&mut self, text: &[u8], range: Range<usize>, hidden: &[Range<usize>], out: &mut Vec<u8>) {
        if range.is_empty() {
            return;
        }
        let mut at = range.start;
        for hidden in hidden {
            let start = hidden.start.clamp(at, range.end);
            let end = hidden.end.clamp(start, range.end);
            out.extend_from_slice(&text[at..start]);
            at = end;
            if end > start {
                let class = length_class(end - start);
                out.extend_from_slice(format!("{MASK_PREFIX}{class}:{BEGUN}").as_bytes());
                self.count(end - start);
            }
        }
        out.extend_from_slice(&text[at..range.end]);
    }

    fn count(&mut self, bytes: usize) {
        self.masks += 1;
        self.masked_bytes += bytes as u64;
    }

    /// The stream is over: a match that could have gone on is whole. Its bytes are recorded as begun; this is its mask.
    pub(super) fn finish(&mut self, masker: &Masker, patterns: &Patterns) -> Vec<u8> {
        let begun = std::mem::take(&mut self.begun);
        let searches = std::mem::take(&mut self.searches);
        let mut out = Vec::new();
        for found in patterns.left(&begun, &searches) {
            out.extend_from_slice(masker.mask(&begun[found]).as_bytes());
            self.count(0);
        }
        out
    }

    /// Something is missing here: what came before goes with nothing that follows.
    pub(super) fn forget(&mut self) {
        self.begun.clear();
        self.searches.clear();
    }
}

/// The search through all lanes of one connection.
#[derive(Debug)]
pub(super) struct Sieves {
    masker: Masker,
    /// With the length of what is recorded of each.
    lanes: HashMap<Lane, (Sieve, u64)>,
    /// Masks in lanes that are over, and the bytes that they stand for.
    masks: u64,
    masked_bytes: u64,
}

impl Sieves {
    /// None where nothing is searched for.
    pub(super) fn of(masker: &Masker) -> Option<Self> {
        masker.masks().patterns()?;
        Some(Self { masker: masker.clone(), lanes: HashMap::new(), masks: 0, masked_bytes: 0 })
    }

    /// What is recorded of the next bytes of a lane, and its offset there. None: there are too many lanes.
    pub(super) fn push<'a>(&mut self, lane: Lane, bytes: &'a [u8]) -> Option<(u64, Cow<'a, [u8]>)> {
        if !self.lanes.contains_key(&lane) && self.lanes.len() >= LANES_MAX {
            return None;
        }
        let (sieve, recorded) = self.lanes.entry(lane).or_default();
        let content = sieve.push(&self.masker, self.masker.masks().patterns()?, bytes);
        let offset = *recorded;
        *recorded += content.len() as u64;
        Some((offset, content))
    }

    /// Whether something in a lane was masked.
    pub(super) fn has_masked(&self, lane: Lane) -> bool {
        self.lanes.get(&lane).is_some_and(|(sieve, _)| sieve.masks > 0)
    }

    /// A lane is over: what is recorded at its end, and the offset there.
    pub(super) fn end(&mut self, lane: Lane) -> Option<(u64, Vec<u8>)> {
        let patterns = self.masker.masks().patterns()?;
        let (sieve, recorded) = self.lanes.get_mut(&lane)?;
        let (offset, rest) = (*recorded, sieve.finish(&self.masker, patterns));
        *recorded += rest.len() as u64;
        // Connections come and go; of others there are few, and what is masked of them counts on.
        if lane.connection.is_some()
            && let Some((sieve, _)) = self.lanes.remove(&lane)
        {
            self.masks += sieve.masks;
            self.masked_bytes += sieve.masked_bytes;
        }
        Some((offset, rest))
    }

    /// Lanes that are there.
    pub(super) fn lanes(&self) -> Vec<Lane> {
        self.lanes.keys().copied().collect()
    }

    /// A word of it.
    pub(super) fn text(&self, text: &str) -> String {
        self.masker.text(text)
    }

    /// How much of the stream was masked, if anything was.
    pub(super) fn told(&self) -> Option<Kind> {
        let sieves = || self.lanes.values().map(|(sieve, _)| sieve);
        let masks = self.masks + sieves().map(|sieve| sieve.masks).sum::<u64>();
        let bytes = self.masked_bytes + sieves().map(|sieve| sieve.masked_bytes).sum::<u64>();
        (masks > 0).then(|| Kind::Gap {
            reason: format!("masked by rule: {masks} masks stand in what this stream carried"),
            events: None,
            bytes: Some(bytes),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::{Masker, Patterns, Sieve};
    use crate::recording::masks::{MaskRules, Masks};

    fn masker(patterns: &[&str]) -> Masker {
        let patterns = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        let masks = Masks::new(MaskRules { patterns, ..MaskRules::default() }).unwrap();
        Masker::for_cluster(&[1; 32], "c").by(&Arc::new(masks))
    }

    fn sifted(masker: &Masker, pieces: &[&[u8]]) -> Vec<u8> {
        let mut sieve = Sieve::default();
        let patterns = masker.masks().patterns().unwrap();
        let recorded = pieces.iter().map(|piece| sieve.push(masker, patterns, piece).into_owned());
        let mut recorded = recorded.collect::<Vec<_>>().concat();
        recorded.extend(sieve.finish(masker, patterns));
        recorded
    }

    fn shown(masker: &Masker, pieces: &[&[u8]]) -> String {
        String::from_utf8_lossy(&sifted(masker, pieces)).into_owned()
    }

    /// Without masks, as pieces between them.
    fn clear(recorded: &[u8]) -> Vec<String> {
        let masks = regex::Regex::new("(?:weir:masked:(?:0|le[0-9]+):(?:[0-9a-f]{16}|begun))+").unwrap();
        masks.split(&String::from_utf8_lossy(recorded)).map(str::to_owned).collect()
    }

    #[test]
    fn a_match_that_a_piece_cuts_is_masked_and_its_whole_is_recognisable() {
        let masker = masker(&["AKIA[0-9A-Z]{16}", "password=[^ ]+"]);
        let secret = "AKIA0123456789ABCDEF";
        let whole = String::from_utf8_lossy(masker.mask(secret.as_bytes()).as_bytes()).into_owned();
        assert_eq!(shown(&masker, &[b"x AKIA0123456789ABCDEF y"]), format!("x {whole} y"));
        assert_eq!(
            shown(&masker, &[b"x AK", b"IA0123", b"456789ABCDEF y"]),
            format!("x weir:masked:le8:begunweir:masked:le8:begun{whole} y")
        );
        // What was none stays masked, and what follows is clear.
        assert_eq!(shown(&masker, &[b"x AK", b"KA"]), "x weir:masked:le8:begunKweir:masked:le8:begun");
        // One that may go on.
        let password = masker.mask(b"password=ab");
        assert_eq!(
            shown(&masker, &[b"password=a", b"b", b" c"]),
            format!("weir:masked:le16:begunweir:masked:le8:begun{password} c")
        );
        // The end says that it does not.
        assert_eq!(shown(&masker, &[b"password=ab"]), format!("weir:masked:le16:begun{password}"));
    }

    #[test]
    fn what_nothing_matches_is_passed_on_as_it_is() {
        let masker = masker(&["AKIA[0-9A-Z]{16}"]);
        assert_eq!(shown(&masker, &[b"some \xff", b"text\n"]), "some \u{fffd}text\n");
    }

    #[test]
    fn expressions_whose_matches_overlap_hide_nothing_from_each_other() {
        for (patterns, text) in [
            (["Bearer [A-Za-z0-9]+", r"[\w-]+\.[\w-]+\.[\w-]+"], "Bearer eyJ.payload.sig"),
            (["token", "token=[^ ]+"], "token=hunter2"),
        ] {
            for patterns in [patterns, [patterns[1], patterns[0]]] {
                let masker = masker(&patterns);
                let whole = String::from_utf8_lossy(masker.mask(text.as_bytes()).as_bytes()).into_owned();
                let text = format!("({text}) !");
                let text = text.as_bytes();
                let body = masker.masks().patterns().unwrap().mask(&masker, text).unwrap();
                if patterns.contains(&"token") {
                    let shown = String::from_utf8_lossy(&body.content).into_owned();
                    assert!(!shown.contains("hunter2") && shown.starts_with("(weir:masked:"), "{shown}");
                } else {
                    assert_eq!(String::from_utf8_lossy(&body.content), format!("({whole}) !"));
                    assert_eq!(shown(&masker, &[text]), format!("({whole}) !"));
                }
                for at in 0..text.len() {
                    let clear = clear(&sifted(&masker, &[&text[..at], &text[at..]])).concat();
                    assert!(
                        !["eyJ", "payload", "sig", "hunter"].iter().any(|word| clear.contains(word)),
                        "{clear}"
                    );
                }
            }
        }
    }

    #[test]
    fn expressions_do_not_see_through_an_echo_another_form_or_a_loss() {
        let masker = masker(&["AKIA[0-9A-Z]{8}"]);
        for text in ["$ AKIA01234 \r567", "AKIA\x1b[1m01234567", "QUtJQTAxMjM0NTY3", "%41KIA01234567"] {
            assert_eq!(shown(&masker, &[text.as_bytes()]), text);
        }
        let (mut sieve, patterns) = (Sieve::default(), masker.masks().patterns().unwrap());
        assert_eq!(&*sieve.push(&masker, patterns, b"AKIA"), b"weir:masked:le8:begun");
        sieve.forget();
        assert_eq!(&*sieve.push(&masker, patterns, b"01234567"), b"01234567");
    }

    const PATTERNS: [&str; 4] = ["ab+c", "(?:ca|a)bb", "aab|aabbcc", "c[abc]{2}a"];

    #[test]
    fn a_match_of_any_length_is_hidden_to_its_end_and_no_further() {
        for (pattern, begin, end) in [
            ("password=[^ ]+", "password=", " and the rest"),
            ("-----BEGIN[^-]+-----END", "-----BEGIN", "-----END and the rest"),
        ] {
            let masker = masker(&[pattern]);
            for (length, piece) in [(5_000, 4_999), (200_000, 32_768), (9_000, 7), (5_000, 1)] {
                let text = format!("before {begin}{}{end}", "s3cret\n".repeat(length / 7));
                let pieces: Vec<_> = text.as_bytes().chunks(piece).collect();
                let clear = clear(&sifted(&masker, &pieces)).concat();
                assert_eq!(clear, "before  and the rest", "{pattern} in pieces of {piece}");
            }
        }
        // Too many states to be followed: to the end.
        let masker_of_many = masker(&["[a-z]{300,}"]);
        let text = format!("clear {} hidden", "x".repeat(9_000));
        let pieces: Vec<_> = text.as_bytes().chunks(5_000).collect();
        assert_eq!(clear(&sifted(&masker_of_many, &pieces)).concat(), "clear ");
        // The second begins where the first, which is long, is not over yet.
        let masker = masker(&["a[^ ]+", "end of[^!]+!"]);
        let text = format!("a{}-end of it and more! x", "b".repeat(9_000));
        let pieces: Vec<_> = text.as_bytes().chunks(1_000).collect();
        assert_eq!(clear(&sifted(&masker, &pieces)).concat(), " x");
    }

    proptest! {
        /// Every byte that is masked in the whole is masked however it is cut, and what is clear is what it was.
        #[test]
        fn a_cut_hides_no_less(
            text in "[abcx]{0,40}", cuts in proptest::collection::vec(0_usize..40, 0..6),
            which in proptest::sample::subsequence(&PATTERNS, 1..=PATTERNS.len()).prop_shuffle(),
        ) {
            let masker = masker(&which);
            let mut cuts: Vec<_> = cuts.into_iter().map(|at| at.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|cut| &text.as_bytes()[cut[0]..cut[1]]).collect();
            let mut hidden = vec![false; text.len()];
            for pattern in which {
                let regex = regex::Regex::new(pattern).unwrap();
                regex.find_iter(&text).for_each(|found| hidden[found.range()].fill(true));
            }
            // The whole, as in a body.
            let clear_text = |hidden: &[bool]| -> String {
                text.char_indices().filter(|(at, _)| !hidden[*at]).map(|(_, c)| c).collect()
            };
            let body = masker.masks().patterns().unwrap().mask(&masker, text.as_bytes());
            let body = body.map_or_else(|| text.clone().into_bytes(), |masked| masked.content);
            prop_assert_eq!(clear(&body).concat(), clear_text(&hidden));
            // What may have begun at a cut, by trying whether anything makes a match of it.
            let mut sieve = Sieve::default();
            let patterns = masker.masks().patterns().unwrap();
            let (mut at, mut seen) = (0, String::new());
            for piece in &pieces {
                let recorded = sieve.push(&masker, patterns, piece);
                let begun = at + piece.len() - sieve.begun.len().min(at + piece.len());
                hidden[begun.max(at)..at + piece.len()].fill(true);
                at += piece.len();
                seen.push_str(&clear(&recorded).join("|"));
                seen.push('|');
            }
            prop_assert_eq!(seen.replace('|', ""), clear_text(&hidden));
        }

        /// However little of it is kept, no byte of a match is clear, and what no match may begin with is.
        #[test]
        fn what_is_not_kept_is_hidden(
            text in "[abcx]{0,40}", cuts in proptest::collection::vec(0_usize..40, 0..6), look_behind in 0_usize..6,
            which in proptest::sample::subsequence(&PATTERNS, 1..=PATTERNS.len()).prop_shuffle(),
        ) {
            let expressions: Vec<_> = which.iter().map(|pattern| (*pattern).to_owned()).collect();
            let patterns = Patterns::new(&expressions).unwrap().unwrap().looking_behind(look_behind);
            let mut cuts: Vec<_> = cuts.into_iter().map(|at| at.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let (mut sieve, mut hidden, mut at) = (Sieve::default(), vec![false; text.len()], 0);
            for cut in cuts.windows(2) {
                let piece = &text.as_bytes()[cut[0]..cut[1]];
                let (kept, decided) = sieve.search(&patterns, piece);
                let before = kept.len() - piece.len();
                for range in decided.found.into_iter().chain(decided.hidden) {
                    hidden[at + range.start.max(before) - before..at + range.end.max(before) - before].fill(true);
                }
                prop_assert!(sieve.begun.len() <= look_behind);
                at += piece.len();
            }
            for pattern in which {
                for found in regex::Regex::new(pattern).unwrap().find_iter(&text) {
                    prop_assert!(hidden[found.range()].iter().all(|is| *is), "{pattern} at {}", found.start());
                }
            }
            for (at, _) in text.match_indices('x') {
                prop_assert!(!hidden[at], "no match holds it");
            }
        }

        #[test]
        fn a_secret_is_hidden_cut_into_single_bytes(before in "[ -~]{0,10}", secret in "[0-9A-Z]{16}", after in "[a-z]{0,10}") {
            let masker = masker(&["AKIA[0-9A-Z]{16}"]);
            let text = format!("{before}AKIA{secret}{after}");
            let pieces: Vec<_> = text.as_bytes().chunks(1).collect();
            let recorded = shown(&masker, &pieces);
            let whole = masker.mask(format!("AKIA{secret}").as_bytes());
            prop_assert!(recorded.contains(&whole), "{}", recorded);
            prop_assert!(!clear(recorded.as_bytes()).join("").contains(&secret[..6]), "{}", recorded);
        }
    }
}
