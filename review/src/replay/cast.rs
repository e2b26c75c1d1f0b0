//! Writes what servers sent over upgraded connections as an asciicast v2 file.
//!
//! The bytes are raw: framing of WebSocket or SPDY is still in them, since the decoder comes later; title and
//! markers say so. Unlike everything else here a cast holds recorded bytes unescaped: playing it lets them act on
//! the terminal that plays it. The format: <https://docs.asciinema.org/manual/asciicast/v2/>.

use std::io::{self, Write};

use serde_json::json;

/// Size that players assume; the real one is inside the undecoded stream.
const COLUMNS: u16 = 80;
const ROWS: u16 = 24;

/// Writes one cast.
#[derive(Debug)]
pub(crate) struct Cast<W> {
    out: W,
    start_us: i64,
    request: Option<String>,
    /// Begin of a character that the next piece may complete.
    partial: Vec<u8>,
    /// Pieces written so far.
    pub(crate) pieces: u64,
    /// Recorded bytes written so far.
    pub(crate) bytes: u64,
}

impl<W: Write> Cast<W> {
    /// Writes the header. Times count from `start_us`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn new(mut out: W, session: &str, start_us: i64) -> io::Result<Self> {
        let title = format!("weir session {session}: raw upgrade bytes, server to client, not decoded");
        let header = json!({
            "version": 2, "width": COLUMNS, "height": ROWS, "timestamp": start_us.div_euclid(1_000_000), "title": title,
        });
        writeln!(out, "{header}")?;
        Ok(Self { out, start_us, request: None, partial: Vec::new(), pieces: 0, bytes: 0 })
    }

    /// Adds a piece of a request's stream; a marker stands where another request begins.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn add(&mut self, time_us: i64, request: &str, bytes: &[u8]) -> io::Result<()> {
        if self.request.as_deref() != Some(request) {
            self.flush_partial(time_us)?;
            self.event(time_us, "m", &format!("raw: request {request}"))?;
            self.request = Some(request.to_owned());
        }
        self.pieces += 1;
        self.bytes += bytes.len() as u64;
        let mut joined = std::mem::take(&mut self.partial);
        joined.extend_from_slice(bytes);
        let text = self.text(&joined);
        self.event(time_us, "o", &text)
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
        if text.is_empty() { Ok(()) } else { self.event(time_us, "o", &text) }
    }

    fn event(&mut self, time_us: i64, code: &str, data: &str) -> io::Result<()> {
        #[expect(clippy::cast_precision_loss, reason = "seconds with microseconds fit for centuries")]
        let seconds = time_us.saturating_sub(self.start_us).max(0) as f64 / 1e6;
        writeln!(self.out, "{}", json!([seconds, code, data]))
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::Cast;

    #[test]
    fn a_cast_holds_every_byte_and_says_that_it_is_raw() {
        let mut out = Vec::new();
        let mut cast = Cast::new(&mut out, "s1", 5_000_000).unwrap();
        cast.add(5_000_000, "r1", b"\x82\x04\x01ok\n").unwrap();
        cast.add(5_250_000, "r1", b"caf\xc3").unwrap();
        cast.add(5_300_000, "r1", b"\xa9 \x1b[31m").unwrap();
        cast.add(7_000_000, "r2", b"end\xe2\x82").unwrap();
        assert_eq!((cast.pieces, cast.bytes), (4, 22));
        cast.finish(8_000_000).unwrap();
        expect![[r#"
            {"height":24,"timestamp":5,"title":"weir session s1: raw upgrade bytes, server to client, not decoded","version":2,"width":80}
            [0.0,"m","raw: request r1"]
            [0.0,"o","\\x82\u0004\u0001ok\n"]
            [0.25,"o","caf"]
            [0.3,"o","é \u001b[31m"]
            [2.0,"m","raw: request r2"]
            [2.0,"o","end"]
            [3.0,"o","\\xe2\\x82"]
        "#]]
        .assert_eq(&String::from_utf8(out).unwrap());
    }
}
