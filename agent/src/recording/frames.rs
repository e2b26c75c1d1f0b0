//! The events of a watch that is not text. Kubernetes puts the length of each before it, four bytes, big-endian
//! (k8s.io/apimachinery `pkg/util/framer`). Sans-IO.

/// Length of what stands before each event.
pub(super) const HEADER: usize = 4;

/// Cuts a stream into its events.
#[derive(Debug)]
pub(super) struct Frames {
    /// Longest event.
    bytes_max: usize,
    begun: Vec<u8>,
    /// Bytes to come of an event that is passed over, and those that have come.
    skip: u64,
    skipped: u64,
}

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// An event, with its header.
    Whole(&'a [u8]),
    /// One that was too long: how long.
    TooLong(u64),
}

impl Frames {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, begun: Vec::new(), skip: 0, skipped: 0 }
    }

    /// Takes the next bytes, and hands on what ends in them.
    pub(super) fn push(&mut self, mut bytes: &[u8], mut take: impl FnMut(Frame<'_>)) {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let (passed, rest) = bytes.split_at(up_to(self.skip, bytes));
                self.skip -= passed.len() as u64;
                self.skipped += passed.len() as u64;
                bytes = rest;
                if self.skip == 0 {
                    take(Frame::TooLong(std::mem::take(&mut self.skipped)));
                }
                continue;
            }
            // The usual case: it need not be copied.
            if self.begun.is_empty()
                && let Some(end) = length(bytes).filter(|length| *length <= self.bytes_max as u64)
                && let Some((frame, rest)) = bytes.split_at_checked(HEADER + up_to(end, &bytes[HEADER..]))
                && frame.len() as u64 == HEADER as u64 + end
            {
                take(Frame::Whole(frame));
                bytes = rest;
                continue;
            }
            bytes = self.continued(bytes, &mut take);
        }
    }

    /// Adds to the event that has begun; what is behind its header or its end is given back.
    fn continued<'a>(&mut self, bytes: &'a [u8], take: &mut impl FnMut(Frame<'_>)) -> &'a [u8] {
        let wanted = HEADER as u64 + length(&self.begun).unwrap_or(0);
        let (more, rest) = bytes.split_at(up_to(wanted - self.begun.len() as u64, bytes));
        self.begun.extend_from_slice(more);
        match length(&self.begun) {
            Some(length) if length > self.bytes_max as u64 => {
                self.skip = length;
                self.skipped = HEADER as u64;
                self.begun.clear();
            }
            Some(length) if self.begun.len() as u64 == HEADER as u64 + length => {
                take(Frame::Whole(&self.begun));
                self.begun.clear();
            }
            _ => {}
        }
        rest
    }

    /// The stream is over, or goes on elsewhere: bytes of an event that is not whole.
    pub(super) fn finish(&mut self) -> u64 {
        self.skip = 0;
        let begun = std::mem::take(&mut self.begun).len() as u64;
        begun + std::mem::take(&mut self.skipped)
    }
}

fn up_to(number: u64, bytes: &[u8]) -> usize {
    usize::try_from(number).map_or(bytes.len(), |number| number.min(bytes.len()))
}

/// What a header says.
fn length(bytes: &[u8]) -> Option<u64> {
    bytes.first_chunk::<HEADER>().map(|header| u64::from(u32::from_be_bytes(*header)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Frame, Frames};

    const BYTES_MAX: usize = 20;

    fn found(pieces: &[&[u8]]) -> (Vec<Result<Vec<u8>, u64>>, u64) {
        let (mut frames, mut found) = (Frames::new(BYTES_MAX), Vec::new());
        for piece in pieces {
            frames.push(piece, |frame| {
                found.push(match frame {
                    Frame::Whole(bytes) => Ok(bytes.to_vec()),
                    Frame::TooLong(bytes) => Err(bytes),
                });
            });
            assert!(frames.begun.len() <= BYTES_MAX + super::HEADER, "memory is bounded");
        }
        (found, frames.finish())
    }

    fn framed(event: &[u8]) -> Vec<u8> {
        [&u32::try_from(event.len()).unwrap().to_be_bytes()[..], event].concat()
    }

    #[test]
    fn one_that_is_too_long_is_passed_over_and_the_next_is_found() {
        let wire = [framed(b""), framed(&[7; BYTES_MAX + 1]), framed(b"ab"), b"\0\0".to_vec()].concat();
        let expected = vec![Ok(framed(b"")), Err(BYTES_MAX as u64 + 5), Ok(framed(b"ab"))];
        assert_eq!(found(&[&wire]), (expected, 2));
    }

    #[test]
    fn one_that_says_it_is_endless_takes_no_memory() {
        assert_eq!(found(&[b"\xff\xff\xff\xff", &[0; 100]]), (vec![], 104));
    }

    proptest! {
        #[test]
        fn events_are_found_however_the_stream_is_cut(
            events in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..BYTES_MAX + 9), 0..6),
            cuts in proptest::collection::vec(any::<u8>(), 0..6), tail in 0_usize..9,
        ) {
            let mut wire = events.iter().map(|event| framed(event)).collect::<Vec<_>>().concat();
            wire.truncate(wire.len().saturating_sub(tail));
            let mut cuts: Vec<_> = cuts.into_iter().map(|at| usize::from(at) % (wire.len() + 1)).collect();
            cuts.extend([0, wire.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &wire[cut[0]..cut[1]]).collect();
            let (frames, rest) = found(&pieces);
            prop_assert_eq!(&(frames.clone(), rest), &found(&[&wire]));
            let bytes: u64 = frames.iter().map(|frame| match frame {
                Ok(bytes) => bytes.len() as u64,
                Err(bytes) => *bytes,
            }).sum();
            prop_assert_eq!(bytes + rest, wire.len() as u64, "every byte is accounted for");
        }
    }
}
