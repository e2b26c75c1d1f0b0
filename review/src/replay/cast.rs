//! Writes the terminals of exec and attach as an asciicast v2 file: output, input, sizes.
//!
//! What the agent could not decode is raw, framing included; markers say so. Unlike everything else here a cast holds
//! recorded bytes unescaped: playing it lets them act on the terminal that plays it. The format:
//! <https://docs.asciinema.org/manual/asciicast/v2/>.

use std::{
    io::{self, Write},
    time::Duration,
};

use serde::Deserialize;
use serde_json::json;
use weir_common::event::Channel;

/// Size that players assume until the client's terminal says its own.
const COLUMNS: u16 = 80;
const ROWS: u16 = 24;

/// Most bytes of a size that is not whole yet.
const SIZE_BYTES_MAX: usize = 4096;

/// As client-go sends it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

/// Writes one cast.
#[derive(Debug)]
pub(crate) struct Cast<W> {
    out: W,
    start_us: i64,
    /// Whose bytes the last ones were.
    lane: Option<(String, Channel)>,
    /// Begin of a size that the next piece may complete.
    size: Vec<u8>,
    /// Begin of a character that the next piece may complete.
    partial: Vec<u8>,
    /// Pieces written so far.
    pub(crate) pieces: u64,
    /// Recorded bytes written so far.
    pub(crate) bytes: u64,
}

impl<W: Write> Cast<W> {
    /// Writes the header. Times count from `start_us`; a player waits no longer than `idle_limit` at once.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn new(
        mut out: W,
        session: &str,
        start_us: i64,
        idle_limit: Option<Duration>,
    ) -> io::Result<Self> {
        let title = format!("weir session {session}");
        let mut header = json!({
            "version": 2, "width": COLUMNS, "height": ROWS, "timestamp": start_us.div_euclid(1_000_000), "title": title,
        });
        if let Some(limit) = idle_limit {
            header["idle_time_limit"] = json!(limit.as_secs_f64());
        }
        writeln!(out, "{header}")?;
        Ok(Self { out, start_us, lane: None, size: Vec::new(), partial: Vec::new(), pieces: 0, bytes: 0 })
    }

    /// Adds a piece of a request's stream; a marker stands where another request begins.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn add(
        &mut self,
        time_us: i64,
        request: &str,
        channel: Channel,
        bytes: &[u8],
    ) -> io::Result<()> {
        let same_request = self.lane.as_ref().is_some_and(|(of, _)| of == request);
        if !same_request || self.lane.as_ref().is_some_and(|(_, of)| *of != channel) {
            self.flush_partial(time_us)?;
        }
        if !same_request {
            self.size.clear();
            let raw = if channel == Channel::ServerRaw { "raw, not decoded: " } else { "" };
            self.event(time_us, "m", &format!("{raw}request {request}"))?;
        }
        self.lane = Some((request.to_owned(), channel));
        if channel == Channel::Resize {
            return self.resize(time_us, bytes);
        }
        self.pieces += 1;
        self.bytes += bytes.len() as u64;
        let mut joined = std::mem::take(&mut self.partial);
        joined.extend_from_slice(bytes);
        let text = self.text(&joined);
        self.event(time_us, code(channel), &text)
    }

    /// The client's terminal has another size: JSON objects, one after the other.
    fn resize(&mut self, time_us: i64, bytes: &[u8]) -> io::Result<()> {
        let mut buffered = std::mem::take(&mut self.size);
        buffered.extend_from_slice(bytes);
        let mut sizes = serde_json::Deserializer::from_slice(&buffered).into_iter::<Size>();
        let mut whole = 0;
        while let Some(Ok(Size { width, height })) = sizes.next() {
            whole = sizes.byte_offset();
            self.event(time_us, "r", &format!("{width}x{height}"))?;
        }
        self.size = buffered.split_off(whole);
        if self.size.len() > SIZE_BYTES_MAX {
            self.size.clear();
        }
        Ok(())
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn finish(mut self, time_us: i64) -> io::Result<()> {
        self.flush_partial(time_us)?;
        self.out.flush()
    }

    /// A cast holds text only: a byte that is not UTF-8 becomes `\xNN`, so that nothing is lost. The begin of a
    /// character at the end is kept for the next piece.
    fn text(&mut self, bytes: &[u8]) -> String {
        let mut text = String::with_capacity(bytes.len());
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let may_continue =
                std::str::from_utf8(chunk.invalid()).is_err_and(|error| error.error_len().is_none());
            if chunks.peek().is_none() && may_continue {
                self.partial = chunk.invalid().to_vec();
            } else {
                chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
            }
        }
        text
    }

    fn flush_partial(&mut self, time_us: i64) -> io::Result<()> {
        let text: String =
            std::mem::take(&mut self.partial).iter().map(|byte| format!("\\x{byte:02x}")).collect();
        let code = self.lane.as_ref().map_or("o", |(_, channel)| code(*channel));
        if text.is_empty() { Ok(()) } else { self.event(time_us, code, &text) }
    }

    fn event(&mut self, time_us: i64, code: &str, data: &str) -> io::Result<()> {
        #[expect(clippy::cast_precision_loss, reason = "seconds with microseconds fit for centuries")]
        let seconds = time_us.saturating_sub(self.start_us).max(0) as f64 / 1e6;
        writeln!(self.out, "{}", json!([seconds, code, data]))
    }
}

/// What a cast calls it: input or output.
fn code(channel: Channel) -> &'static str {
    if channel == Channel::Stdin { "i" } else { "o" }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use weir_common::event::Channel;

    use super::{Cast, Duration};

    #[test]
    fn a_cast_holds_every_byte_and_says_what_is_raw() {
        let mut out = Vec::new();
        let mut cast = Cast::new(&mut out, "s1", 5_000_000, Some(Duration::from_millis(1500))).unwrap();
        cast.add(5_000_000, "r1", Channel::Resize, b"{\"Width\":120,\"Hei").unwrap();
        cast.add(5_000_000, "r1", Channel::Resize, b"ght\":40}\n{\"Width\":90,\"Height\":30}").unwrap();
        cast.add(5_100_000, "r1", Channel::Stdin, b"ls\xc3").unwrap();
        cast.add(5_250_000, "r1", Channel::Stdout, b"caf\xc3").unwrap();
        cast.add(5_300_000, "r1", Channel::Stdout, b"\xa9 \x1b[31m").unwrap();
        cast.add(7_000_000, "r2", Channel::ServerRaw, b"\x82\x04\x01end\xe2\x82").unwrap();
        assert_eq!((cast.pieces, cast.bytes), (4, 22));
        cast.finish(8_000_000).unwrap();
        expect![[r#"
            {"height":24,"idle_time_limit":1.5,"timestamp":5,"title":"weir session s1","version":2,"width":80}
            [0.0,"m","request r1"]
            [0.0,"r","120x40"]
            [0.0,"r","90x30"]
            [0.1,"i","ls"]
            [0.25,"i","\\xc3"]
            [0.25,"o","caf"]
            [0.3,"o","é \u001b[31m"]
            [2.0,"m","raw, not decoded: request r2"]
            [2.0,"o","\\x82\u0004\u0001end"]
            [3.0,"o","\\xe2\\x82"]
        "#]]
        .assert_eq(&String::from_utf8(out).unwrap());
    }
}
