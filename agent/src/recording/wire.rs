//! Protobuf as it stands on the wire: fields by number, without their types. Sans-IO.

/// Largest number of a field.
const NUMBER_MAX: u64 = (1 << 29) - 1;

/// These bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// A field on the wire.
#[derive(Clone, Copy)]
pub(super) struct Field<'a> {
    pub(super) number: u32,
    /// What it holds, if that has a length: a string, bytes, a message.
    pub(super) bytes: Option<&'a [u8]>,
    /// It with its tag.
    pub(super) whole: &'a [u8],
}

impl<'a> Field<'a> {
    /// Whether it is a group: no type of Kubernetes has any, and its decoders skip them.
    pub(super) fn is_group(&self) -> bool {
        self.whole.first().is_some_and(|tag| tag & 7 == 3)
    }

    /// The first field, and what follows.
    pub(super) fn next(message: &'a [u8]) -> Result<(Self, &'a [u8]), Malformed> {
        let mut rest = message;
        let tag = varint(&mut rest)?;
        let number =
            u32::try_from(tag >> 3).ok().filter(|number| (1..=NUMBER_MAX).contains(&u64::from(*number)));
        let number = number.ok_or(Malformed)?;
        let mut bytes = None;
        match tag & 7 {
            0 => {
                varint(&mut rest)?;
            }
            1 => rest = rest.get(8..).ok_or(Malformed)?,
            2 => {
                let length = usize::try_from(varint(&mut rest)?).map_err(|_| Malformed)?;
                let (content, after) = rest.split_at_checked(length).ok_or(Malformed)?;
                (bytes, rest) = (Some(content), after);
            }
            5 => rest = rest.get(4..).ok_or(Malformed)?,
            3 => rest = after_group(rest)?,
            _ => return Err(Malformed),
        }
        Ok((Self { number, bytes, whole: &message[..message.len() - rest.len()] }, rest))
    }
}

/// What follows a group whose beginning was read. As Kubernetes skips them (`skipGenerated` beside its types): which groups begin and
/// end is not compared.
fn after_group(mut rest: &[u8]) -> Result<&[u8], Malformed> {
    let mut depth = 1_usize;
    while depth > 0 {
        match varint(&mut rest)? & 7 {
            0 => {
                varint(&mut rest)?;
            }
            1 => rest = rest.get(8..).ok_or(Malformed)?,
            2 => {
                let length = usize::try_from(varint(&mut rest)?).map_err(|_| Malformed)?;
                rest = rest.get(length..).ok_or(Malformed)?;
            }
            3 => depth += 1,
            4 => depth -= 1,
            5 => rest = rest.get(4..).ok_or(Malformed)?,
            _ => return Err(Malformed),
        }
    }
    Ok(rest)
}

/// The fields of a message.
pub(super) fn fields(mut message: &[u8]) -> impl Iterator<Item = Result<Field<'_>, Malformed>> {
    std::iter::from_fn(move || {
        if message.is_empty() {
            return None;
        }
        let next = Field::next(message);
        message = next.map_or(&[][..], |(_, rest)| rest);
        Some(next.map(|(field, _)| field))
    })
}

/// The field of this number; the last one counts, as it does for who decodes it.
pub(super) fn field(message: &[u8], number: u32) -> Option<&[u8]> {
    let fields = fields(message).map_while(Result::ok).filter(|field| field.number == number);
    fields.filter_map(|field| field.bytes).last()
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Malformed> {
    let mut value = 0_u64;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        // The tenth byte has one bit.
        if at == 9 && *byte > 1 {
            break;
        }
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            *bytes = &bytes[at + 1..];
            return Ok(value);
        }
    }
    Err(Malformed)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// Writes a string, bytes or message.
pub(super) fn put(out: &mut Vec<u8>, number: u32, content: &[u8]) {
    put_varint(out, u64::from(number) << 3 | 2);
    put_varint(out, content.len() as u64);
    out.extend_from_slice(content);
}
