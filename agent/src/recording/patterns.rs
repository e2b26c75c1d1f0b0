//! Masks by regular expression, over strings of bodies and over text; [`super::sieve`] has streams that come in pieces. Sans-IO.
//!
//! Expressions are over bytes. They have no anchors and match no empty text: what they match does not depend on what stands
//! around it, so a piece can be searched without the rest. From the expressions one more is made that matches every beginning of what they
//! match that can go on. Where it matches up to the end of a piece, the next piece may make a match of it: that much is masked, too, and
//! searched again with what follows. So nothing is held back, and no match is recorded in clear wherever it was cut.

use regex::bytes::{Match, Regex, RegexBuilder};
use regex_syntax::{
    ParserBuilder,
    hir::{Class, ClassBytes, ClassBytesRange, Hir, HirKind, Repetition},
};

use super::mask::Masker;

/// Longest match that is found where pieces cut it, bytes; within one piece, and in bodies, they may be longer.
pub(super) const LOOK_BEHIND_BYTES: usize = 4 * 1024;

/// Most bytes of a compiled expression, and of what its search may remember.
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

/// All expressions together.
pub(super) struct Patterns {
    any: Regex,
    /// What may become a match, at the end of a piece.
    begun: Regex,
}

/// Text with its matches masked.
pub(super) struct Masked {
    pub(super) content: Vec<u8>,
    pub(super) masks: u64,
}

impl Patterns {
    /// Compiles expressions; none if there are none.
    pub(super) fn new(expressions: &[String]) -> Result<Option<Self>, PatternError> {
        let mut whole = Vec::new();
        for (index, expression) in expressions.iter().enumerate() {
            let read = read(expression).and_then(|hir| compile(&hir.to_string()).map(|_| hir));
            whole.push(read.map_err(|problem| PatternError { index: Some(index), problem })?);
        }
        if whole.is_empty() {
            return Ok(None);
        }
        let begun = Hir::alternation(whole.iter().map(beginning).collect());
        let any = Hir::alternation(whole);
        let together = |problem| PatternError { index: None, problem };
        let any = compile(&any.to_string()).map_err(together)?;
        let begun = compile(&format!("(?:{begun})\\z")).map_err(together)?;
        Ok(Some(Self { any, begun }))
    }

    /// Whether there is a match.
    pub(super) fn are_in(&self, text: &[u8]) -> bool {
        self.any.is_match(text)
    }

    /// Whether there is a match, or `text` ends where one may have begun.
    pub(super) fn may_be_in(&self, text: &[u8]) -> bool {
        self.are_in(text) || self.begins_at(text, 0).is_some()
    }

    /// Text that is all there; none: nothing in it matches.
    pub(super) fn mask(&self, masker: &Masker, text: &[u8]) -> Option<Masked> {
        let mut masked = Masked { content: Vec::new(), masks: 0 };
        let mut from = 0;
        for found in self.any.find_iter(text) {
            masked.content.extend_from_slice(&text[from..found.start()]);
            masked.content.extend_from_slice(masker.mask(found.as_bytes()).as_bytes());
            masked.masks += 1;
            from = found.end();
        }
        if masked.masks == 0 {
            return None;
        }
        masked.content.extend_from_slice(&text[from..]);
        Some(masked)
    }

    /// The first match from `from` on.
    pub(super) fn find_at<'a>(&self, text: &'a [u8], from: usize) -> Option<Match<'a>> {
        self.any.find_at(text, from)
    }

    /// The earliest place from `from` on, within [`LOOK_BEHIND_BYTES`] of the end, where a match may have begun.
    pub(super) fn begins_at(&self, text: &[u8], from: usize) -> Option<usize> {
        let from = from.max(text.len().saturating_sub(LOOK_BEHIND_BYTES));
        let begun = self.begun.find(&text[from..])?;
        (!begun.is_empty()).then_some(from + begun.start())
    }
}

fn compile(expression: &str) -> Result<Regex, String> {
    let builder = |expression| {
        let mut builder = RegexBuilder::new(expression);
        builder.unicode(false).size_limit(COMPILED_BYTES_MAX).dfa_size_limit(COMPILED_BYTES_MAX);
        builder.nest_limit(8 * NEST_MAX).build()
    };
    builder(expression).map_err(|_| {
        format!(
            "takes more than {COMPILED_BYTES_MAX} bytes when compiled; repeat less, or give fewer expressions"
        )
    })
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
