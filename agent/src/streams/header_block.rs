//! SPDY's compressed headers: one zlib stream for each direction, with a dictionary that both sides know.
//!
//! A block is decompressed into a bounded buffer: a few bytes can become a thousand times as many. A block that fails
//! takes those that follow with it, since they lean on it.

use flate2::{Decompress, FlushDecompress, Status};

/// SPDY/3's dictionary (draft-mbelshe-httpbis-spdy-00 §2.6.10.1).
const DICTIONARY: &[u8] = include_bytes!("spdy_dictionary.bin");

/// Adler-32 of the dictionary, by which zlib streams name it.
const DICTIONARY_ID: [u8; 4] = [0xe3, 0xc6, 0xa7, 0xc2];

/// Most bytes that one block may become: Kubernetes' headers take some hundred, and whoever sends more makes the agent work for nothing.
pub(super) const BLOCK_BYTES_MAX: usize = 4 * 1024;

/// What is added to the output buffer at a time.
const STEP_BYTES: usize = 1024;

/// The compressed headers of one direction.
#[derive(Debug, Default)]
pub(super) enum HeaderBlocks {
    /// Nothing has come yet.
    #[default]
    New,
    Inflating(Box<Decompress>),
    /// A block could not be read.
    Lost,
}

impl HeaderBlocks {
    /// The next block, decompressed; none if that or one before it cannot be.
    pub(super) fn next(&mut self, block: &[u8]) -> Option<Vec<u8>> {
        let (mut inflate, deflated) = match std::mem::replace(self, Self::Lost) {
            Self::New => begin(block)?,
            Self::Inflating(inflate) => (inflate, block),
            Self::Lost => return None,
        };
        let out = decompress(&mut inflate, deflated)?;
        *self = Self::Inflating(inflate);
        Some(out)
    }
}

/// Reads the head of a zlib stream (RFC 1950 §2.2).
///
/// The dictionary is what deflate could refer back to. flate2's own backend takes no dictionary, so it is given one as
/// a stored block (RFC 1951 §3.2.4), whose output is dropped.
fn begin(block: &[u8]) -> Option<(Box<Decompress>, &[u8])> {
    let [method, flags, rest @ ..] = block else { return None };
    if method & 0x0f != 8 || u16::from_be_bytes([*method, *flags]) % 31 != 0 {
        return None;
    }
    let mut inflate = Box::new(Decompress::new(false));
    if flags & 0x20 == 0 {
        return Some((inflate, rest));
    }
    let deflated = rest.strip_prefix(&DICTIONARY_ID[..])?;
    let length = u16::try_from(DICTIONARY.len()).ok()?;
    let head = [&[0][..], &length.to_le_bytes(), &(!length).to_le_bytes()].concat();
    let given = decompress(&mut inflate, &[&head, DICTIONARY].concat())?;
    (given == DICTIONARY).then_some((inflate, deflated))
}

fn decompress(inflate: &mut Decompress, mut input: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    loop {
        out.reserve(STEP_BYTES);
        let before = (inflate.total_in(), inflate.total_out());
        let status = inflate.decompress_vec(input, &mut out, FlushDecompress::Sync).ok()?;
        input = input.get(usize::try_from(inflate.total_in() - before.0).ok()?..)?;
        if out.len() > BLOCK_BYTES_MAX || status == Status::StreamEnd {
            return None;
        }
        // There was room for output, so this is all that there is.
        if (inflate.total_in(), inflate.total_out()) == before {
            return input.is_empty().then_some(out);
        }
    }
}

/// The first value of each header of a decompressed block; none if it is not one.
pub(super) fn headers(block: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let (count, mut rest) = number(block)?;
    let mut headers = Vec::new();
    for _ in 0..count {
        let (name, value);
        (name, rest) = text(rest)?;
        (value, rest) = text(rest)?;
        headers.push((name, value.split(|byte| *byte == 0).next().unwrap_or_default()));
    }
    rest.is_empty().then_some(headers)
}

fn number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*number), rest))
}

fn text(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = number(bytes)?;
    rest.split_at_checked(usize::try_from(length).ok()?)
}
