//! What may reach a reviewer's terminal: escaping, colour, progress.
//!
//! Recorded content comes from the very processes that are under review. Whatever they wrote must not move the
//! reviewer's cursor, set a title, answer a query or hide text, so everything recorded passes through
//! [`escaped`], [`escaped_exactly`] or [`escaped_json`] on its way out. Colour is for terminals only.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

/// Least time between two updates of a progress line.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Tells whether a character could steer a terminal or hide or reorder what stands beside it: controls (C0, DEL,
/// C1), bidirectional overrides, invisible format characters, line separators, tags.
pub(crate) fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Makes a piece of recorded text safe to print within a line: what could steer a terminal is shown as `\n`,
/// `\x1b` or `\u{202e}`.
pub(crate) fn escaped(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        push_escaped(&mut out, character);
    }
    Cow::Owned(out)
}

fn push_escaped(out: &mut String, character: char) {
    match character {
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        c if !is_unsafe(c) => out.push(c),
        c if c.is_ascii() => push_byte(out, c as u8),
        c => push_formatted(out, format_args!("\\u{{{:x}}}", u32::from(c))),
    }
}

fn push_byte(out: &mut String, byte: u8) {
    push_formatted(out, format_args!("\\x{byte:02x}"));
}

fn push_formatted(out: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = out.write_fmt(arguments);
}

/// Like [`escaped`] for bytes, and reversible: those that are not UTF-8 are shown as `\xNN`, and a backslash is
/// doubled, so that each output has one origin only.
pub(crate) fn escaped_exactly(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character == '\\' {
                out.push('\\');
            }
            push_escaped(&mut out, character);
        }
        chunk.invalid().iter().for_each(|byte| push_byte(&mut out, *byte));
    }
    out
}

/// Makes one line of JSON safe for a terminal with JSON's own escapes, so that it still means the same.
pub(crate) fn escaped_json(line: &[u8]) -> String {
    let mut out = String::with_capacity(line.len());
    for character in String::from_utf8_lossy(line).chars() {
        if is_unsafe(character) {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                push_formatted(&mut out, format_args!("\\u{unit:04x}"));
            }
        } else {
            out.push(character);
        }
    }
    out
}

/// How words are set off; colour only where the output is a terminal and `NO_COLOR` is not set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    colour: bool,
}

impl Style {
    /// Without colour.
    #[cfg(test)]
    pub(crate) const PLAIN: Self = Self { colour: false };

    /// For what is printed to standard output. `NO_COLOR` counts if it is not empty (<https://no-color.org>).
    pub(crate) fn for_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        Self { colour: std::io::stdout().is_terminal() && !refused }
    }

    /// A heading.
    pub(crate) fn strong(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// What matters less.
    pub(crate) fn faint(self, text: &str) -> String {
        self.paint("2", text)
    }

    /// Success.
    pub(crate) fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// What a reviewer should look at.
    pub(crate) fn warning(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// Failure, damage.
    pub(crate) fn bad(self, text: &str) -> String {
        self.paint("31", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A line on standard error that says how far long work has come; silent where that is not a terminal.
#[derive(Debug)]
pub(crate) struct Progress {
    label: &'static str,
    total: u64,
    done: u64,
    shown: Option<Instant>,
    enabled: bool,
}

impl Progress {
    /// Starts at 0 of `total` bytes.
    pub(crate) fn new(label: &'static str, total: u64) -> Self {
        Self { label, total, done: 0, shown: None, enabled: std::io::stderr().is_terminal() }
    }

    /// `bytes` more are done.
    pub(crate) fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        if !self.enabled || self.shown.is_some_and(|shown| shown.elapsed() < PROGRESS_INTERVAL) {
            return;
        }
        self.shown = Some(Instant::now());
        // A progress line that cannot be written is no reason to stop.
        let _ = write!(std::io::stderr(), "\r{}", self.line());
    }

    fn line(&self) -> String {
        let percent = (self.done.min(self.total) * 100).checked_div(self.total).unwrap_or(100);
        format!("{} {percent:3} %", self.label)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::{Progress, Style, escaped, escaped_exactly, escaped_json};

    #[track_caller]
    fn check(input: &[u8], expected: Expect) {
        expected.assert_eq(&escaped_exactly(input));
    }

    #[test]
    fn what_could_steer_a_terminal_is_shown_not_sent() {
        check(b"plain \xc3\xa9", expect!["plain é"]);
        check(b"\x1b]0;owned\x07\x1b[2J", expect![[r"\x1b]0;owned\x07\x1b[2J"]]);
        check("\u{9b}31m".as_bytes(), expect![[r"\u{9b}31m"]]);
        check(b"one\r\ntwo\tthree\x7f\0", expect![[r"one\r\ntwo\tthree\x7f\x00"]]);
        check("a\u{202e}b\u{2066}c\u{feff}".as_bytes(), expect![[r"a\u{202e}b\u{2066}c\u{feff}"]]);
    }

    #[test]
    fn bytes_that_are_not_utf8_survive_as_hex() {
        check(b"\xff\xfeab\x80", expect![[r"\xff\xfeab\x80"]]);
        check(b"cut \xe2\x82", expect![[r"cut \xe2\x82"]]);
    }

    #[test]
    fn no_control_character_ever_passes() {
        for code in 0..=u32::from(char::MAX) {
            let Some(character) = char::from_u32(code) else { continue };
            let out = escaped_exactly(character.to_string().as_bytes());
            assert!(!out.chars().any(char::is_control), "{code:x}");
        }
        for byte in 0..=255_u8 {
            assert!(!escaped_exactly(&[byte]).chars().any(char::is_control), "{byte:x}");
            assert!(!escaped_json(&[byte]).chars().any(char::is_control), "{byte:x}");
        }
    }

    #[test]
    fn the_exact_form_tells_a_backslash_from_an_escape() {
        assert_eq!(escaped_exactly(b"\\x1b"), r"\\x1b");
        assert_eq!(escaped_exactly(b"\x1b"), r"\x1b");
    }

    #[test]
    fn escaped_json_means_the_same() {
        let line = "{\"a\":\"\u{9b}31m\u{7f}\u{e0041}é\"}";
        let safe = escaped_json(line.as_bytes());
        assert!(!safe.chars().any(char::is_control), "{safe}");
        let (before, after): (serde_json::Value, serde_json::Value) =
            (serde_json::from_str(line).unwrap(), serde_json::from_str(&safe).unwrap());
        assert_eq!(before, after);
    }

    #[test]
    fn progress_is_how_much_of_all_is_done_and_never_more_than_all() {
        let mut progress = Progress::new("verifying", 400);
        assert_eq!(progress.line(), "verifying   0 %");
        progress.advance(150);
        assert_eq!(progress.line(), "verifying  37 %");
        // A journal that grows meanwhile.
        progress.advance(1000);
        assert_eq!(progress.line(), "verifying 100 %");
        assert_eq!(Progress::new("verifying", 0).line(), "verifying 100 %");
    }

    #[test]
    fn nothing_is_coloured_without_a_terminal() {
        assert_eq!(Style::PLAIN.bad("x"), "x");
        assert_eq!(Style { colour: true }.bad("x"), "\x1b[31mx\x1b[0m");
        assert_eq!(escaped("x"), "x");
    }
}
