//! Content as events of the record, of which each has its length's bound. Sans-IO.

use weir_common::event::{self, CONTENT_BYTES_MAX, Channel, Content, Kind};

use crate::streams::Lane;

/// Splits content into events, at the boundaries of characters where it is text.
pub(super) fn split(channel: Channel, offset: u64, content: &[u8]) -> Vec<Kind> {
    split_lane(Lane { channel, connection: None }, offset, content)
}

/// Content of one lane of a stream, split over as many events as it needs.
pub(super) fn split_lane(lane: Lane, offset: u64, mut content: &[u8]) -> Vec<Kind> {
    let Lane { channel, connection } = lane;
    let (mut kinds, mut offset) = (Vec::new(), offset);
    while !content.is_empty() {
        let mut end = content.len().min(CONTENT_BYTES_MAX);
        // A continuation byte there: the character began at most three bytes before.
        let boundary =
            (end.saturating_sub(3)..=end).rev().find(|at| content.get(*at).is_none_or(|b| b & 0xc0 != 0x80));
        if let Some(boundary) = boundary.filter(|boundary| *boundary > 0) {
            end = boundary;
        }
        let (piece, rest) = content.split_at(end);
        kinds.push(Kind::Content(Content {
            channel,
            connection,
            offset,
            bytes: event::Bytes::from_slice(piece),
        }));
        offset += end as u64;
        content = rest;
    }
    kinds
}
