//! What recording makes of single bodies, headers, URIs and arguments, for the properties in `tests/properties`.
//!
//! Only a door: nothing is decided here, and the product does not come through it. The mask key is a fixed one.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Uri};
use weir_common::{
    attributes::Attributes,
    event::{BodySummary, Header, Kind},
};

use super::{
    body::Sensitivity,
    content::{self, Held, Kept, Streamed},
    mask::Masker,
    masks::{MaskRules, Masks},
    sieve::Sieve,
};

/// A body's way and what its headers claim.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// The request that it belongs to.
    pub attributes: &'a Attributes,
    /// `Content-Type`.
    pub content_type: Option<&'a str>,
    /// `Content-Encoding`.
    pub content_encoding: Option<&'a str>,
}

fn masker() -> Masker {
    Masker::for_cluster(&[1; 32], "properties")
}

/// What is recorded of a body that was held, with at most `bytes_max` of it; with `cut`, of one that went on.
pub fn held(claim: Claim<'_>, body: &[u8], bytes_max: usize, cut: bool) -> (Vec<u8>, BodySummary) {
    let held = Held {
        chunks: vec![Bytes::copy_from_slice(body)],
        wire_bytes: body.len() as u64,
        cut: cut.then(|| ("it goes on".to_owned(), None)),
        content_type: claim.content_type.map(str::to_owned),
        content_encoding: claim.content_encoding.map(str::to_owned),
        bytes_max,
        names_text: true,
    };
    let Kept { content, summary, .. } = content::reduce(&masker(), Sensitivity::of(claim.attributes), &held);
    (content, summary)
}

/// What is recorded of a body that is recorded while it comes, piece by piece.
pub fn streamed(claim: Claim<'_>, watch: bool, pieces: &[&[u8]]) -> (Vec<Kind>, BodySummary) {
    let masker = masker();
    let content_type = claim.content_type.map(str::to_owned);
    let sensitivity = Sensitivity::of(claim.attributes);
    let mut stream = Streamed::new(&masker, sensitivity, content_type, claim.content_encoding, watch);
    let mut kinds: Vec<Kind> = pieces.iter().flat_map(|piece| stream.push(&masker, piece)).collect();
    let wire_bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
    let (mut rest, summary) = stream.finish(&masker, wire_bytes);
    kinds.append(&mut rest);
    (kinds, summary)
}

/// Headers as they are recorded.
pub fn headers(headers: &HeaderMap) -> Vec<Header> {
    masker().headers(headers)
}

/// A request's URI as it is recorded.
pub fn request_uri(uri: &Uri) -> String {
    masker().request_uri(uri)
}

/// A process's arguments as they are recorded.
pub fn arguments(arguments: &[String]) -> Vec<String> {
    masker().arguments(arguments)
}

/// The search for what an expression matches in a stream.
#[derive(Debug)]
pub struct Sifting(Masker);

impl Sifting {
    /// For one expression; none if it is none.
    pub fn new(expression: &str) -> Option<Self> {
        let rules = MaskRules { patterns: vec![expression.to_owned()], ..MaskRules::default() };
        Masks::new(rules).ok().map(|masks| Self(masker().by(&Arc::new(masks))))
    }

    /// What is recorded of a stream that comes in these pieces.
    pub fn recorded(&self, pieces: &[&[u8]]) -> Vec<u8> {
        let Some(patterns) = self.0.masks().patterns() else { return pieces.concat() };
        let mut sieve = Sieve::default();
        let mut recorded: Vec<u8> =
            pieces.iter().flat_map(|piece| sieve.push(&self.0, patterns, piece).into_owned()).collect();
        recorded.extend(sieve.finish(&self.0, patterns));
        recorded
    }
}
