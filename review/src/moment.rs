//! Points in time and lengths of time, as users write and read them.
//!
//! `--since` and `--until` take RFC 3339 or a length of time before now (`2h`, `1h30m`). Times are printed in UTC
//! with milliseconds, so that lines of different nodes sort. The clock is a parameter.

use jiff::Timestamp;

/// A length of time that is too long to be meant, in seconds: about 100 years.
const AGO_SECONDS_MAX: u64 = 100 * 366 * 86_400;

/// A point in time, in microseconds since the Unix epoch: what events carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(pub(crate) i64);

impl Moment {
    /// Now.
    pub(crate) fn now() -> Self {
        Self(Timestamp::now().as_microsecond())
    }

    /// Reads RFC 3339, or a length of time before `now`.
    ///
    /// # Errors
    /// In words, with what is accepted.
    pub(crate) fn parse(text: &str, now: Self) -> Result<Self, String> {
        if let Some(seconds) = ago_seconds(text) {
            return Ok(Self(now.0 - i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000)));
        }
        text.parse::<Timestamp>().map(|time| Self(time.as_microsecond())).map_err(|_| {
            "give a time as RFC 3339 (2026-01-31T12:00:00Z) or as a length of time before now (30m, 2h, 1d12h)".into()
        })
    }

    /// RFC 3339 in UTC with milliseconds.
    pub(crate) fn text(self) -> String {
        match Timestamp::from_microsecond(self.0) {
            Ok(time) => time.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string(),
            // An event may claim any time; one outside of the calendar is shown as the number it is.
            Err(_) => format!("{} µs since 1970", self.0),
        }
    }
}

/// Where in a recording to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seek {
    /// This long after its beginning, in microseconds.
    After(i64),
    /// At this time.
    At(Moment),
}

impl Seek {
    /// Reads RFC 3339, or a length of time since the beginning.
    ///
    /// # Errors
    /// In words, with what is accepted.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some(seconds) = ago_seconds(text).and_then(|seconds| i64::try_from(seconds).ok()) {
            return Ok(Self::After(seconds.saturating_mul(1_000_000)));
        }
        text.parse::<Timestamp>().map(|time| Self::At(Moment(time.as_microsecond()))).map_err(|_| {
            "give a length of time since the beginning (90s, 1h30m) or a time as RFC 3339 (2026-01-31T12:00:00Z)".into()
        })
    }

    /// The time that is meant, in a recording that begins at `first_us`.
    pub(crate) fn unix_us(self, first_us: i64) -> i64 {
        match self {
            Self::After(us) => first_us.saturating_add(us),
            Self::At(moment) => moment.0,
        }
    }
}

/// `1h30m` in seconds; none if it is not a length of time.
fn ago_seconds(text: &str) -> Option<u64> {
    let (mut total, mut rest) = (0_u64, text);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest.get(..digits)?.parse().ok()?;
        let (unit, after) = rest.get(digits..)?.split_at_checked(1)?;
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return None,
        };
        total = total.checked_add(number.checked_mul(seconds)?)?;
        rest = after;
    }
    (!text.is_empty() && total <= AGO_SECONDS_MAX).then_some(total)
}

/// A length of time in microseconds, for reading: `850 µs`, `12.3 ms`, `4.20 s`, `3 m 07 s`, `2 h 05 m`.
#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
pub(crate) fn length(us: u64) -> String {
    let seconds = us / 1_000_000;
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        1_000_000..60_000_000 => format!("{:.2} s", us as f64 / 1e6),
        60_000_000..3_600_000_000 => format!("{} m {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} m", seconds / 3600, seconds / 60 % 60),
    }
}

/// A number with its thousands set apart: `4,321`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of bytes: `1 byte`, `4,321 bytes`.
pub(crate) fn bytes(number: u64) -> String {
    counted(number, "byte")
}

/// A number of things: `1 request`, `2 requests`. `noun` forms its plural with `s` or, after `s`, with `es`.
pub(crate) fn counted(number: u64, noun: &str) -> String {
    match (number, noun.ends_with('s')) {
        (1, _) => format!("1 {noun}"),
        (_, true) => format!("{} {noun}es", grouped(number)),
        (_, false) => format!("{} {noun}s", grouped(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::{Moment, Seek, bytes, counted, length};

    const NOW: Moment = Moment(1_800_000_000_000_000);

    #[test]
    fn times_are_read_as_rfc_3339_or_as_a_length_before_now() {
        let at = |text| Moment::parse(text, NOW).map(|moment| (NOW.0 - moment.0) / 1_000_000);
        assert_eq!(at("2h"), Ok(7200));
        assert_eq!(at("1d12h30m5s"), Ok(131_405));
        assert_eq!(Moment::parse("1970-01-01T01:00:00+01:00", NOW), Ok(Moment(0)));
        assert_eq!(Moment::parse("1970-01-01T00:00:01.5Z", NOW), Ok(Moment(1_500_000)));
        for wrong in ["", "h", "2", "2w", "-2h", "yesterday", "2026-01-31", "99999999999d", "2é"] {
            assert!(Moment::parse(wrong, NOW).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_place_to_begin_is_a_length_since_the_beginning_or_a_time() {
        let at = |text| Seek::parse(text).map(|seek| seek.unix_us(7));
        assert_eq!(at("1m30s"), Ok(90_000_007));
        assert_eq!(at("1970-01-01T00:00:01.5Z"), Ok(1_500_000));
        assert_eq!(Seek::After(i64::MAX).unix_us(7), i64::MAX);
        for wrong in ["", "-5s", "90", "noon"] {
            assert!(Seek::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_printed_in_utc() {
        assert_eq!(Moment(1_800_000_000_123_456).text(), "2027-01-15T08:00:00.123Z");
        assert_eq!(Moment(i64::MIN).text(), "-9223372036854775808 µs since 1970");
    }

    #[test]
    fn lengths_and_numbers_read_well() {
        let lengths = [850, 12_340, 4_200_000, 187_000_000, 7_500_000_000].map(length);
        assert_eq!(lengths, ["850 µs", "12.3 ms", "4.20 s", "3 m 07 s", "2 h 05 m"]);
        assert_eq!(
            [0, 1, 999, 4321, 1_234_567].map(bytes),
            ["0 bytes", "1 byte", "999 bytes", "4,321 bytes", "1,234,567 bytes"]
        );
        assert_eq!(counted(2, "process"), "2 processes");
    }
}
