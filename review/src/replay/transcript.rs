//! What was said in exec and attach, as plain text: a line of a channel at a time, in the order in which lines ended.
//!
//! Every byte is there, escaped so that it can be told again: bytes that are not UTF-8 as `\xNN`, a backslash doubled.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use weir_common::event::{Channel, RequestOpened};

use super::{
    story::channel_name,
    wording::{execution, meaning},
};
use crate::terminal::{escaped, escaped_exactly};

/// Most bytes of a line that are kept until its end comes.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// Writes one transcript.
pub(crate) struct Transcript<'a> {
    out: &'a mut dyn Write,
    /// Begun lines.
    lines: BTreeMap<(String, Channel), Vec<u8>>,
    /// Whose line was the last.
    request: String,
    /// Heads that were not written yet.
    heads: BTreeMap<String, String>,
    pub(crate) is_empty: bool,
}

impl<'a> Transcript<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> Self {
        let request = String::new();
        Self { out, lines: BTreeMap::new(), request, heads: BTreeMap::new(), is_empty: true }
    }

    /// A request that may become a stream.
    pub(crate) fn opened(&mut self, request: &str, opened: &RequestOpened) {
        if let Some(run) = opened.execution.as_deref() {
            let head = format!("{}, {}", escaped(&meaning(opened)), execution(run));
            self.heads.insert(request.to_owned(), head);
        }
    }

    /// Bytes of a channel; whole lines are written.
    pub(crate) fn add(&mut self, request: &str, channel: Channel, bytes: &[u8]) -> io::Result<()> {
        let key = (request.to_owned(), channel);
        let mut begun = self.lines.remove(&key).unwrap_or_default();
        begun.extend_from_slice(bytes);
        let mut rest = &begun[..];
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, behind) = rest.split_at(end);
            self.line(request, channel, line, "")?;
            rest = &behind[1..];
        }
        if rest.len() > LINE_BYTES_MAX {
            self.line(request, channel, rest, " …")?;
            rest = &[];
        }
        if !rest.is_empty() {
            let rest = rest.to_vec();
            self.lines.insert(key, rest);
        }
        Ok(())
    }

    /// A stream is over: what is left of its lines, and its exit code.
    pub(crate) fn closed(&mut self, request: &str, exit_code: Option<i32>) -> io::Result<()> {
        let of = |(id, _): &(String, Channel)| id == request;
        let left: Vec<_> = self.lines.extract_if(.., |key, _| of(key)).collect();
        for ((_, channel), line) in left {
            self.line(request, channel, &line, " (no line end)")?;
        }
        let runs = self.heads.contains_key(request) || self.request == request;
        match exit_code.filter(|_| runs) {
            Some(code) => {
                self.turn_to(request)?;
                writeln!(self.out, "# exit code {code}")
            }
            None => Ok(()),
        }
    }

    /// What is left of streams whose end is not on record.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        for ((request, channel), line) in std::mem::take(&mut self.lines) {
            self.line(&request, channel, &line, " (no line end)")?;
        }
        Ok(())
    }

    fn line(&mut self, request: &str, channel: Channel, line: &[u8], end: &str) -> io::Result<()> {
        self.turn_to(request)?;
        // A terminal's line ends with both.
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        writeln!(self.out, "{}: {}{end}", channel_name(channel, None), escaped_exactly(line))
    }

    fn turn_to(&mut self, request: &str) -> io::Result<()> {
        self.is_empty = false;
        if self.request == request {
            return Ok(());
        }
        self.request = request.to_owned();
        let head = self.heads.remove(request).map_or_else(String::new, |head| format!(": {head}"));
        writeln!(self.out, "# request {}{head}", escaped(request))
    }
}
