//! Masks by regular expression, over strings of bodies and over text; [`super::sieve`] has streams that come in pieces. Sans-IO.
//!
//! Expressions are over bytes. They have no anchors and match no empty text: what they match does not depend on what stands
//! around it, so a piece can be searched without the rest. From the expressions one more is made that matches every beginning of what they
//! match that can go on. Where it matches up to the end of a piece, the next piece may make a match of it: that much is masked, too, and
//! searched again with what follows. So nothing is held back, and no match is recorded in clear wherever it was cut.
//!
//! Each expression is searched for by itself, and what any of them matches is masked: in one search for all of them a match would
//! hide those of others that overlap it. Matches that overlap have one mask.

use std::ops::Range;

use regex::bytes::{Regex, RegexBuilder};
use regex_syntax::{
    ParserBuilder,
    hir::{Class, ClassBytes, ClassBytesRange, Hir, HirKind, Repetition},
};

use super::{
    automaton::{Automaton, Reached},
    mask::Masker,
};

/// Longest match that is kept where pieces cut it, so that its mask has a digest, bytes; within one piece, and in bodies, they may be
/// longer.
const LOOK_BEHIND_BYTES: usize = 4 * 1024;

/// How often in one piece a match is looked for from where the last one ended, although something that may go on to the piece's end
/// began before that.
const RETRIES_MAX: usize = 64;

/// Most bytes of all expressions when compiled, and of what their search may remember.
const COMPILED_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most groups within groups.
const NEST_MAX: u32 = 32;

/// An expression that cannot be. Never spells it.
#[derive(Debug)]
pub(super) struct PatternError {
    /// Which one; none: all of them together.
    pub(super) index: Option<usize>,
    pub(super) problem: String,
}

/// Least of what the search for one expression among many may remember, bytes.
const REMEMBERED_BYTES_MIN: usize = 256 * 1024;

/// An expression, or all of them together.
struct Pattern {
    whole: Regex,
    /// What may become a match, at the end of a piece.
    begun: Regex,
    /// None where it would have too many states: what is too long to be kept is hidden to the end then.
    automaton: Option<Automaton>,
}

/// How far the search for one expression is, from piece to piece.
#[derive(Default)]
pub(super) struct Search {
    /// Where in what is kept it goes on.
    from: usize,
    /// It is in something that is too long to be kept.
    long: Option<Reached>,
}

impl Search {
    /// Whether something is masked until it ends.
    pub(super) fn is_long(&self) -> bool {
        self.long.is_some()
    }
}

/// What a piece is found to hold, each in its order and without overlaps.
#[derive(Debug, Default)]
pub(super) struct Decided {
    /// Matches that nothing which follows makes longer.
    pub(super) found: Vec<Range<usize>>,
    /// What may be, or is, a part of a match whose whole is not there.
    pub(super) hidden: Vec<Range<usize>>,
    /// The text from here on is needed to search on.
    pub(super) keep: usize,
}

/// All expressions.
pub(super) struct Patterns {
    /// All in one: whether there is anything to search for.
    any: Pattern,
    each: Vec<Pattern>,
    look_behind: usize,
}

/// Text with its matches masked.
pub(super) struct Masked {
    pub(super) content: Vec<u8>,
    pub(super) masks: u64,
}

impl Patterns {
    /// Compiles expressions; none if there are none.
    pub(super) fn new(expressions: &[String]) -> Result<Option<Self>, PatternError> {
        if expressions.is_empty() {
            return Ok(None);
        }
        let remembered = (COMPILED_BYTES_MAX / expressions.len()).max(REMEMBERED_BYTES_MIN);
        let (mut all, mut each) = (Vec::new(), Vec::new());
        for (index, expression) in expressions.iter().enumerate() {
            let read = read(expression).and_then(|hir| Ok((Pattern::new(&hir, remembered)?, hir)));
            let (pattern, hir) = read.map_err(|problem| PatternError { index: Some(index), problem })?;
            each.push(pattern);
            all.push(hir);
        }
        // Also the bound of what all of them take.
        let any = Pattern::new(&Hir::alternation(all), COMPILED_BYTES_MAX)
            .map_err(|problem| PatternError { index: None, problem })?;
        Ok(Some(Self { any, each, look_behind: LOOK_BEHIND_BYTES }))
    }

    /// Keeps no more of what may become a match.
    #[cfg(test)]
    pub(super) fn looking_behind(self, bytes: usize) -> Self {
        Self { look_behind: bytes, ..self }
    }

    /// Whether there is a match.
    pub(super) fn are_in(&self, text: &[u8]) -> bool {
        self.any.whole.is_match(text)
    }

    /// Whether there is a match, or `text` ends where one may have begun.
    pub(super) fn may_be_in(&self, text: &[u8]) -> bool {
        self.are_in(text) || self.any.begins_at(text, 0).is_some()
    }

    /// Text that is all there; none: nothing in it matches.
    pub(super) fn mask(&self, masker: &Masker, text: &[u8]) -> Option<Masked> {
        if !self.are_in(text) {
            return None;
        }
        let mut masked = Masked { content: Vec::new(), masks: 0 };
        let mut from = 0;
        for found in self.matches(text) {
            masked.content.extend_from_slice(&text[from..found.start]);
            masked.content.extend_from_slice(masker.mask(&text[found.clone()]).as_bytes());
            masked.masks += 1;
            from = found.end;
        }
        masked.content.extend_from_slice(&text[from..]);
        Some(masked)
    }

    /// Matches in text that is all there.
    pub(super) fn matches(&self, text: &[u8]) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        for pattern in &self.each {
            found.extend(pattern.whole.find_iter(text).map(|found| found.range()));
            found = union(found);
        }
        found
    }

    /// What the next piece holds; `text` is what was kept of those before and the piece, which begins at `seen`.
    pub(super) fn decided(&self, text: &[u8], seen: usize, searches: &mut Vec<Search>) -> Decided {
        searches.resize_with(self.each.len(), Search::default);
        let mut decided = Decided { keep: text.len(), ..Decided::default() };
        for (pattern, search) in self.each.iter().zip(&mut *searches) {
            if let Some(reached) = &mut search.long {
                search.from = seen + pattern.follow(reached, &text[seen..]);
                decided.hidden.push(seen..search.from);
                if search.from == text.len() {
                    continue;
                }
                search.long = None;
            }
            pattern.decided(text, &mut search.from, &mut decided.found);
            decided.found = union(decided.found);
            decided.hidden.push(search.from..text.len());
            if text.len() - search.from > self.look_behind {
                let mut reached = Reached::default();
                pattern.follow(&mut reached, &text[search.from..]);
                (search.from, search.long) = (text.len(), Some(reached));
            }
            decided.keep = decided.keep.min(search.from);
        }
        searches.iter_mut().for_each(|search| search.from -= decided.keep);
        decided.hidden = union(decided.hidden);
        decided
    }

    /// Matches in what is left at the end, each expression searched from its place on.
    pub(super) fn left(&self, text: &[u8], searches: &[Search]) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        for (pattern, search) in self.each.iter().zip(searches) {
            let mut at = search.from;
            while let Some(one) = pattern.whole.find_at(text, at) {
                found.push(one.range());
                at = one.end();
            }
        }
        union(found)
    }
}

impl Pattern {
    fn new(hir: &Hir, remembered: usize) -> Result<Self, String> {
        let begun = format!("(?:{})\\z", beginning(hir));
        let (whole, begun) = (compile(&hir.to_string(), remembered)?, compile(&begun, remembered)?);
        Ok(Self { whole, begun, automaton: Automaton::new(hir) })
    }

    /// How much of a text may belong to matches that have begun before it.
    fn follow(&self, reached: &mut Reached, text: &[u8]) -> usize {
        self.automaton.as_ref().map_or(text.len(), |automaton| automaton.follow(reached, text))
    }

    /// See [`Patterns::decided`].
    fn decided(&self, text: &[u8], from: &mut usize, decided: &mut Vec<Range<usize>>) {
        let mut begins = self.begins_at(text, *from);
        let mut retries = 0;
        while let Some(found) = self.whole.find_at(text, *from) {
            // What follows may make another one of it.
            if begins.is_some_and(|begins| begins <= found.start()) {
                break;
            }
            decided.push(found.range());
            *from = found.end();
            if begins.is_some_and(|begins| begins < *from) {
                if retries == RETRIES_MAX {
                    break;
                }
                retries += 1;
                begins = self.begins_at(text, *from);
            }
        }
        *from = begins.unwrap_or(text.len());
    }

    /// The earliest place from `from` on where a match may have begun that is not over at the end.
    fn begins_at(&self, text: &[u8], from: usize) -> Option<usize> {
        let begun = self.begun.find(&text[from..])?;
        (!begun.is_empty()).then_some(from + begun.start())
    }
}

/// Ranges in their order, those that overlap as one.
pub(super) fn union(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let overlaps = next.start < last.end;
        if overlaps {
            last.end = last.end.max(next.end);
        }
        overlaps
    });
    ranges
}

fn compile(expression: &str, remembered: usize) -> Result<Regex, String> {
    let builder = |expression| {
        let mut builder = RegexBuilder::new(expression);
        builder.unicode(false).size_limit(COMPILED_BYTES_MAX).dfa_size_limit(remembered);
        builder.nest_limit(8 * NEST_MAX).build()
    };
    builder(expression).map_err(|_| too_large())
}

fn too_large() -> String {
    format!(
        "takes more than {COMPILED_BYTES_MAX} bytes when compiled; repeat less, or give fewer expressions"
    )
}

/// Reads an expression.
fn read(expression: &str) -> Result<Hir, String> {
    let mut parser = ParserBuilder::new().unicode(false).utf8(false).nest_limit(NEST_MAX).build();
    let hir = parser.parse(expression).map_err(|error| match error {
        regex_syntax::Error::Parse(error) => {
            format!("is no regular expression: {} at byte {}", error.kind(), error.span().start.offset)
        }
        regex_syntax::Error::Translate(error) => {
            format!(
                "is no regular expression over bytes: {} at byte {}",
                error.kind(),
                error.span().start.offset
            )
        }
        _ => "is no regular expression".to_owned(),
    })?;
    let properties = hir.properties();
    if !properties.look_set().is_empty() {
        return Err("has an anchor or word boundary (^, $, \\b, …), which means nothing in a stream that comes in pieces; \
                    leave it out"
            .to_owned());
    }
    match properties.minimum_len() {
        None => Err("matches nothing".to_owned()),
        Some(0) => Err("matches the empty text; make it match at least one byte".to_owned()),
        Some(_) => Ok(hir),
    }
}

/// An expression for every beginning of what `hir` matches that can go on.
fn beginning(hir: &Hir) -> Hir {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => Hir::fail(),
        HirKind::Literal(literal) => {
            chain(literal.0.iter().map(|byte| (Hir::empty(), Hir::literal(vec![*byte]))))
        }
        HirKind::Class(Class::Unicode(_)) => {
            let range =
                |start, end| Hir::class(Class::Bytes(ClassBytes::new([ClassBytesRange::new(start, end)])));
            let repeated = |max, sub| {
                Hir::repetition(Repetition { min: 0, max: Some(max), greedy: true, sub: Box::new(sub) })
            };
            // The first bytes of a character.
            repeated(1, Hir::concat(vec![range(0xc0, 0xff), repeated(2, range(0x80, 0xbf))]))
        }
        HirKind::Class(_) => Hir::empty(),
        HirKind::Repetition(repetition) => match repetition.max {
            Some(0) => Hir::fail(),
            max => {
                let max = max.map(|max| max - 1);
                let before = Repetition { min: 0, max, greedy: true, sub: repetition.sub.clone() };
                Hir::concat(vec![Hir::repetition(before), beginning(&repetition.sub)])
            }
        },
        HirKind::Capture(capture) => beginning(&capture.sub),
        HirKind::Concat(parts) => chain(parts.iter().map(|part| (beginning(part), part.clone()))),
        HirKind::Alternation(ways) => Hir::alternation(ways.iter().map(beginning).collect()),
    }
}

/// The beginnings of parts in a row, each with its own: that of the first, or the first and a beginning of the rest.
fn chain(parts: impl DoubleEndedIterator<Item = (Hir, Hir)>) -> Hir {
    parts.rev().fold(Hir::fail(), |rest, (begun, whole)| {
        Hir::alternation(vec![Hir::concat(vec![whole, rest]), begun])
    })
}
