//! What was said in exec and attach, as plain text: a line of a channel at a time, in the order in which lines ended.
//!
//! Every byte is there, escaped so that it can be told again: bytes that are not UTF-8 as `\xNN`, a backslash doubled.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use weir_common::event::{Channel, Outcome, RequestClosed, RequestOpened};

use super::{
    story::{channel_name, outcome},
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

    /// A stream is over: what is left of its lines, and its exit code, or why there is none.
    pub(crate) fn closed(&mut self, request: &str, closed: &RequestClosed) -> io::Result<()> {
        let of = |(id, _): &(String, Channel)| id == request;
        let left: Vec<_> = self.lines.extract_if(.., |key, _| of(key)).collect();
        for ((_, channel), line) in left {
            self.line(request, channel, &line, " (no line end)")?;
        }
        let runs = self.heads.contains_key(request) || self.request == request;
        let end = match (closed.exit_code, closed.outcome) {
            (Some(code), _) => format!("exit code {code}"),
            // Before the fourth version of the protocol only failures are said.
            (None, Outcome::Complete) => return Ok(()),
            (None, cut) => format!("no exit code: {}", outcome(cut)),
        };
        if runs {
            self.turn_to(request)?;
            writeln!(self.out, "# {end}")?;
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use weir_common::{
        attributes::Execution,
        event::{Channel, Outcome, RequestClosed},
    };

    use super::Transcript;
    use crate::fixture::request;

    #[test]
    fn a_process_whose_end_is_not_on_record_has_not_ended_well() {
        let mut opened = request("POST", "create", "/api/v1/namespaces/web/pods/a/exec?command=sh", "web");
        opened.execution = Some(Box::new(Execution { command: vec!["sh".into()], ..Execution::default() }));
        for (outcome, exit_code, last) in [
            (
                Outcome::UpstreamFailed,
                None,
                "# no exit code: the API server failed or closed in the middle\n",
            ),
            (Outcome::ClientAborted, None, "# no exit code: the client went away\n"),
            (Outcome::Complete, None, "stdout: half\n"),
            (Outcome::UpstreamFailed, Some(0), "# exit code 0\n"),
        ] {
            let mut out = Vec::new();
            let mut transcript = Transcript::new(&mut out);
            transcript.opened("r", &opened);
            transcript.add("r", Channel::Stdout, b"half\n").unwrap();
            let closed = RequestClosed {
                status: Some(101),
                outcome,
                reason: None,
                response_bytes: 5,
                client_bytes: 0,
                duration_us: 1,
                exit_code,
                body: None,
            };
            transcript.closed("r", &closed).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(text.ends_with(last), "{outcome:?}: {text}");
        }
    }
}
