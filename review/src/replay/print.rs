//! Prints a story: who, then step by step what happened, each line with its time and the number of its request.
//!
//! Reads content from the journal as it comes to it and keeps little of it. Every recorded word is escaped here
//! or in [`super::body`]; waiting (for `--speed`) is the caller's.

use std::{
    collections::HashMap,
    io::{self, Write},
};

use weir_common::event::{BodySummary, BytesError, Channel, Header, Kind};

use super::{
    ReplayError,
    body::{self, Detail, Shown},
    changes::Objects,
    debugged,
    story::{Invocation, Piece, Request, Step, Story, channel_name, outcome},
    wording::{acting, execution, meaning, quoted},
};
use crate::{
    moment::{Moment, bytes, counted, length},
    source::Archive,
    terminal::{Style, escaped},
};

/// Most lines of a body that are shown unless all is wanted.
const BODY_LINES_MAX: usize = 24;
/// Most lines of what a change made of an object that are shown unless all is wanted.
const CHANGES_MAX: usize = 40;
/// Most lines of one piece of a stream that are shown unless all is wanted.
const PIECE_LINES_MAX: usize = 40;
/// Most bytes of a body that are read to be shown as a whole; what is longer is printed piece by piece or cut.
const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Most bytes of an unfinished line of a watch that are kept until its end comes.
const LINE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// What stands for content that is for others.
const ENCRYPTED: &[u8] = b"(encrypted; --identity FILE or --kms ARN shows it to whom it is for)";
/// Before each line of content.
const MARGIN: &str = "             │ ";

/// Prints steps of one story.
pub(crate) struct Printer<'a> {
    out: &'a mut dyn Write,
    style: Style,
    story: &'a Story,
    archive: &'a mut dyn Archive,
    detail: Detail,
    /// How to see all of a request, without its id: `weir replay --from DIR --request`.
    full_command: &'a str,
    /// Ends of pieces of watches that are no whole line yet, by request.
    partial: HashMap<usize, Vec<u8>>,
    /// Objects as the session has seen them.
    objects: Objects,
}

impl<'a> Printer<'a> {
    /// Prints `story` to `out`.
    pub(crate) fn new(
        out: &'a mut dyn Write,
        style: Style,
        story: &'a Story,
        archive: &'a mut dyn Archive,
        detail: Detail,
        full_command: &'a str,
    ) -> Self {
        Self {
            out,
            style,
            story,
            archive,
            detail,
            full_command,
            partial: HashMap::new(),
            objects: Objects::default(),
        }
    }

    /// Hands what was printed to the terminal.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Who and where.
    pub(crate) fn header(&mut self) -> io::Result<()> {
        let story = self.story;
        self.field("session", &story.session)?;
        let tenant = story.tenant.as_ref().map(|tenant| format!(" (tenant {tenant})")).unwrap_or_default();
        self.field("cluster", &format!("{}{tenant}", story.cluster))?;
        self.field("node", &story.node)?;
        match &story.caller {
            None => self.field("caller", "not on record: this journal does not hold the session's start")?,
            Some(caller) => {
                if let Some(pod) = &caller.pod {
                    self.field("pod", &format!("{}/{} (uid {})", pod.namespace, pod.name, pod.uid))?;
                    if !pod.service_account.is_empty() {
                        self.field("account", &format!("{}/{}", pod.namespace, pod.service_account))?;
                    }
                    for (name, value) in &pod.intent {
                        self.field("intent", &format!("{name}={value}"))?;
                    }
                }
                if caller.pod.is_none() {
                    self.field("pod", "none: a command under `weir-agent exec`")?;
                }
                let user = match (&caller.user, &caller.claimed_user) {
                    (Some(user), _) => user.clone(),
                    (None, Some(user)) => format!("{user} (as the credential claims; not verified by weir)"),
                    (None, None) => "the credential names none".into(),
                };
                self.field("user", &user)?;
                self.field("dialled", &caller.dialled)?;
            }
        }
        let took = length(story.last_us.abs_diff(story.first_us));
        self.field("started", &format!("{}, on record for {took}", Moment(story.first_us).text()))?;
        let (processes, requests) = (story.invocations.len() as u64, story.requests.len() as u64);
        self.field("holds", &format!("{}, {}", counted(processes, "process"), counted(requests, "request")))
    }

    fn field(&mut self, name: &str, value: &str) -> io::Result<()> {
        writeln!(self.out, "{} {}", self.style.strong(&format!("{name:<9}")), escaped(value))
    }

    /// One step.
    pub(crate) fn step(&mut self, time_us: i64, step: Step) -> Result<(), ReplayError> {
        let story = self.story;
        match step {
            Step::Process(index) => self.process(index, &story.invocations[index])?,
            Step::Opened(index) => self.opened(&story.requests[index])?,
            Step::Answered(index) => self.answered(time_us, &story.requests[index])?,
            Step::StreamStarted(index) => {
                let request = &story.requests[index];
                let status = request.response.as_ref().map(|(_, status, _)| *status);
                self.line(time_us, request, &format!("{} stream begins", self.status(status)))?;
                self.response_headers(request)?;
            }
            Step::Piece(index, piece) => self.piece(index, story.requests[index].pieces[piece])?,
            Step::StreamEnded(index) => self.stream_ended(time_us, index)?,
            Step::Unfinished(index) => {
                let text = "no end on record: still running, or the agent ended without a word";
                self.line(time_us, &story.requests[index], &self.style.warning(text))?;
                self.unfinished_body(&story.requests[index])?;
            }
            Step::RequestNote(index, note) => {
                let request = &story.requests[index];
                let note = &request.notes[note];
                let text = escaped(&note.text);
                let text = if note.calm { self.style.faint(&text) } else { self.style.bad(&text) };
                self.line(time_us, request, &text)?;
            }
            Step::Note(note) => {
                let text = self.style.bad(&escaped(&story.notes[note].text));
                writeln!(self.out, "{} {text}", self.since(time_us))?;
            }
        }
        Ok(())
    }

    fn since(&self, time_us: i64) -> String {
        #[expect(clippy::cast_precision_loss, reason = "shown with milliseconds")]
        let seconds = time_us.saturating_sub(self.story.first_us) as f64 / 1e6;
        self.style.faint(&format!("{:>11}", format!("+{seconds:.3}s")))
    }

    fn line(&mut self, time_us: i64, request: &Request, text: &str) -> io::Result<()> {
        writeln!(self.out, "{} [{}] {text}", self.since(time_us), self.story.label(request))
    }

    fn process(&mut self, index: usize, invocation: &Invocation) -> io::Result<()> {
        let title = format!("process {}", index + 1);
        let Some(process) = &invocation.process else {
            return writeln!(self.out, "\n{} not on record", self.style.strong(&title));
        };
        let argv: Vec<String> = process.argv.iter().map(|argument| quoted(argument)).collect();
        let argv = if argv.is_empty() { "(arguments not on record)".into() } else { argv.join(" ") };
        writeln!(self.out, "\n{} {}", self.style.strong(&title), self.style.strong(&argv))?;
        let executable =
            if process.executable.is_empty() { "executable not on record" } else { &process.executable };
        let container = match &invocation.container {
            None => String::new(),
            Some(container) => {
                let id: String = container.id.chars().take(12).collect();
                let name = if container.name.is_empty() { "" } else { &container.name };
                format!(", container {name} ({id})").replace("  ", " ")
            }
        };
        let text = format!("pid {}, uid {}, {executable}{container}", process.pid, process.uid);
        writeln!(self.out, "{} {}", self.since(invocation.first_us), escaped(&text))?;
        let claim = "the arguments are a claim: a process can rewrite them";
        writeln!(self.out, "            {}", self.style.faint(claim))
    }

    fn opened(&mut self, request: &Request) -> Result<(), ReplayError> {
        let Some((time_us, opened)) = &request.opened else {
            let text = format!("request {}: its beginning is not on record", request.id);
            return Ok(self.line(request.first_us, request, &self.style.warning(&escaped(&text)))?);
        };
        let upgrade = opened.upgrade.as_ref().map(|to| format!(", upgrade to {to}")).unwrap_or_default();
        let what = escaped(&meaning(opened)).into_owned();
        let wire = format!("{} {} ({}{upgrade})", opened.method, opened.uri, opened.protocol);
        let text = format!("{}  {}", self.style.strong(&what), self.style.faint(&escaped(&wire)));
        self.line(*time_us, request, &text)?;
        if let Some(text) = opened.execution.as_deref().map(execution) {
            writeln!(self.out, "{MARGIN}{}", self.style.strong(&text))?;
        }
        if let Some(text) = opened.identity.as_deref().and_then(acting) {
            self.note(&text)?;
        }
        if self.detail == Detail::Full {
            self.note(&format!("Audit-ID {}, arrived {}", request.id, Moment(*time_us).text()))?;
            self.headers("request headers", &opened.headers)?;
        }
        if opened.body.is_some() || request.channel(Channel::RequestBody).next().is_some() {
            self.body("request body", request, Channel::RequestBody, opened.body.as_ref())?;
        }
        Ok(())
    }

    fn answered(&mut self, time_us: i64, request: &Request) -> Result<(), ReplayError> {
        if let Some((_, status, reason)) = &request.refused {
            let text = format!("{} refused by weir: {}", self.status(Some(*status)), escaped(reason));
            self.line(time_us, request, &text)?;
            return Ok(());
        }
        let Some((_, closed)) = &request.closed else { return Ok(()) };
        let status = closed.status.or(request.response.as_ref().map(|(_, status, _)| *status));
        let mut text = format!("{} in {}", self.status(status), length(closed.duration_us));
        text.push_str(&format!(", {}", bytes(closed.response_bytes)));
        self.line(time_us, request, &(text + &self.how_it_ended(request)))?;
        self.response_headers(request)?;
        if request.channel(Channel::ResponseBody).next().is_some() || closed.body.is_some() {
            self.body("response body", request, Channel::ResponseBody, closed.body.as_ref())?;
        }
        Ok(())
    }

    fn unfinished_body(&mut self, request: &Request) -> Result<(), ReplayError> {
        if !request.is_stream() && request.channel(Channel::ResponseBody).next().is_some() {
            self.body("response body so far", request, Channel::ResponseBody, None)?;
        }
        Ok(())
    }

    fn stream_ended(&mut self, time_us: i64, index: usize) -> Result<(), ReplayError> {
        let request = &self.story.requests[index];
        if let Some(rest) = self.partial.remove(&index) {
            let shown = body::show(&rest, self.detail);
            self.content(time_us, request, "end of the stream, no whole line", &shown, PIECE_LINES_MAX)?;
        }
        let Some((_, closed)) = &request.closed else { return Ok(()) };
        let mut text =
            format!("{} stream ends after {}, ", self.status(closed.status), length(closed.duration_us));
        text.push_str(&format!("{} from the server", bytes(closed.response_bytes)));
        if closed.client_bytes > 0 {
            text.push_str(&format!(", {} from the client", bytes(closed.client_bytes)));
        }
        if let Some(code) = closed.exit_code {
            text.push_str(&format!(", exit code {code}"));
        }
        self.line(time_us, request, &(text + &self.how_it_ended(request)))?;
        if let Some(summary) = &closed.body {
            self.summary(summary)?;
        }
        Ok(())
    }

    fn how_it_ended(&self, request: &Request) -> String {
        use weir_common::event::Outcome;
        let Some((_, closed)) = &request.closed else { return String::new() };
        if closed.outcome == Outcome::Complete {
            return String::new();
        }
        let reason =
            closed.reason.as_ref().map(|reason| format!(": {}", escaped(reason))).unwrap_or_default();
        format!(" — {}", self.style.warning(&format!("{}{reason}", outcome(closed.outcome))))
    }

    fn status(&self, status: Option<u16>) -> String {
        match status {
            None => self.style.warning("no status"),
            Some(code @ 400..) => self.style.bad(&code.to_string()),
            Some(code) => self.style.good(&code.to_string()),
        }
    }

    fn note(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.out, "{MARGIN}{}", self.style.faint(&escaped(text)))
    }

    fn response_headers(&mut self, request: &Request) -> io::Result<()> {
        match &request.response {
            Some((_, _, headers)) if self.detail == Detail::Full => self.headers("response headers", headers),
            _ => Ok(()),
        }
    }

    fn headers(&mut self, title: &str, headers: &[Header]) -> io::Result<()> {
        if headers.is_empty() {
            return Ok(());
        }
        self.note(title)?;
        for Header { name, value } in headers {
            writeln!(self.out, "{MARGIN}{}: {}", escaped(name), escaped(value))?;
        }
        Ok(())
    }

    fn summary(&mut self, summary: &BodySummary) -> io::Result<()> {
        let mut parts = Vec::new();
        if summary.masked > 0 {
            parts.push(format!("{} masked", counted(summary.masked, "value")));
        }
        if let Some(encoding) = &summary.decoded {
            parts.push(format!("{encoding} removed ({} on the wire)", bytes(summary.wire_bytes)));
        }
        if self.detail == Detail::Full {
            parts.extend(summary.digest.clone());
        }
        if !parts.is_empty() {
            self.note(&parts.join(", "))?;
        }
        match &summary.truncated {
            None => Ok(()),
            Some(reason) => {
                let text = format!(
                    "cut: {} of {} on record: {reason}",
                    crate::moment::grouped(summary.recorded_bytes),
                    bytes(summary.wire_bytes)
                );
                writeln!(self.out, "{MARGIN}{}", self.style.warning(&escaped(&text)))
            }
        }
    }

    fn body(
        &mut self,
        title: &str,
        request: &Request,
        channel: Channel,
        summary: Option<&BodySummary>,
    ) -> Result<(), ReplayError> {
        let pieces: Vec<Piece> = request.channel(channel).copied().collect();
        let mut content = Vec::new();
        let mut holes = 0_u64;
        let mut read = 0;
        for piece in &pieces {
            if content.len() > BODY_BYTES_MAX {
                break;
            }
            holes += piece.offset.saturating_sub(content.len() as u64 + holes);
            content.extend_from_slice(&self.read(*piece)?);
            read += 1;
        }
        if channel == Channel::ResponseBody && holes == 0 && read == pieces.len() {
            self.changes(request, &content)?;
        }
        if let (Channel::RequestBody, Some((_, opened))) = (channel, &request.opened) {
            self.lines(request, &debugged::containers(opened, &content), BODY_LINES_MAX)?;
        }
        let shown = body::show(&content, self.detail);
        let label = shown.label.as_ref().map(|label| format!(" ({label})")).unwrap_or_default();
        if self.detail == Detail::Full || shown.label.is_some() {
            self.note(&format!("{title}, {} on record{label}", bytes(content.len() as u64)))?;
        }
        self.lines(request, &shown, BODY_LINES_MAX)?;
        // Beyond what is held in memory: as it is, piece by piece.
        for piece in pieces.iter().skip(read) {
            if self.detail != Detail::Full {
                self.more(request, "more of it is on record")?;
                break;
            }
            let bytes = self.read(*piece)?;
            self.lines(request, &body::show_raw(&bytes, Detail::Full), usize::MAX)?;
        }
        if holes > 0 {
            let text = format!("{} are missing from the record", bytes(holes));
            writeln!(self.out, "{MARGIN}{}", self.style.bad(&text))?;
        }
        match summary {
            Some(summary) => Ok(self.summary(summary)?),
            None => Ok(()),
        }
    }

    /// What a patch, an apply or an update made of an object that the session has read before.
    fn changes(&mut self, request: &Request, answer: &[u8]) -> io::Result<()> {
        let Some((_, opened)) = &request.opened else { return Ok(()) };
        let status = request.response.as_ref().map(|(_, status, _)| *status);
        let label = self.story.label(request);
        let Some((title, lines)) = self.objects.changed(&label, opened, status, answer) else {
            return Ok(());
        };
        self.note(&title)?;
        self.lines(request, &Shown { label: None, lines }, CHANGES_MAX)
    }

    fn read(&mut self, piece: Piece) -> Result<Vec<u8>, ReplayError> {
        match self.archive.event_at(piece.place)?.kind {
            Kind::Content(content) => {
                let place = || format!("segment {} offset {}", piece.place.segment, piece.place.offset);
                match content.bytes.to_vec() {
                    Err(BytesError::Encrypted) => Ok(ENCRYPTED.to_vec()),
                    bytes => bytes.map_err(|source| ReplayError::Content { place: place(), source }),
                }
            }
            _ => Err(ReplayError::Changed { place: format!("offset {}", piece.place.offset) }),
        }
    }

    fn piece(&mut self, index: usize, piece: Piece) -> Result<(), ReplayError> {
        let request = &self.story.requests[index];
        let content = self.read(piece)?;
        let title =
            format!("{}, {}", channel_name(piece.channel, piece.connection), bytes(content.len() as u64));
        match piece.channel {
            Channel::ClientRaw | Channel::ServerRaw => {
                let title = format!("{title} (raw, not decoded)");
                let shown = Shown { label: None, ..body::show_raw(&content, self.detail) };
                self.content(piece.time_us, request, &title, &shown, PIECE_LINES_MAX)
            }
            Channel::ResponseBody
                if request.opened.as_ref().is_some_and(|(_, opened)| opened.attributes.verb == "watch") =>
            {
                self.watch_piece(index, piece.time_us, content)
            }
            Channel::Stdin | Channel::Stdout | Channel::Stderr => {
                let shown = body::show_said(&content, self.detail);
                self.content(piece.time_us, request, &title, &shown, PIECE_LINES_MAX)
            }
            _ => {
                let shown = body::show(&content, self.detail);
                self.content(piece.time_us, request, &title, &shown, PIECE_LINES_MAX)
            }
        }
    }

    /// A piece of a watch holds one event, several, or a part of one: an event is shown when its line is whole.
    fn watch_piece(&mut self, index: usize, time_us: i64, content: Vec<u8>) -> Result<(), ReplayError> {
        let request = &self.story.requests[index];
        let mut buffered = self.partial.remove(&index).unwrap_or_default();
        buffered.extend_from_slice(&content);
        let whole = match buffered.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => end + 1,
            // A single event may also come without a line end.
            None if serde_json::from_slice::<serde::de::IgnoredAny>(&buffered).is_ok() => buffered.len(),
            None if buffered.len() > LINE_BYTES_MAX => buffered.len(),
            None => 0,
        };
        let rest = buffered.split_off(whole);
        if !rest.is_empty() {
            self.partial.insert(index, rest);
        }
        if std::str::from_utf8(&buffered).is_err() {
            let shown = body::show(&buffered, self.detail);
            return self.content(time_us, request, "watch", &shown, PIECE_LINES_MAX);
        }
        for line in String::from_utf8_lossy(&buffered).lines().filter(|line| !line.trim().is_empty()) {
            let (title, rows) =
                body::watch_event(line).unwrap_or_else(|| ("not a watch event".into(), Vec::new()));
            let mut shown = body::show(line.as_bytes(), self.detail);
            if self.detail == Detail::Readable && !rows.is_empty() {
                shown = Shown { label: None, lines: rows };
            }
            self.content(time_us, request, &format!("watch: {title}"), &shown, BODY_LINES_MAX)?;
        }
        Ok(())
    }

    /// A title line and lines below it. The title is safe already.
    fn content(
        &mut self,
        time_us: i64,
        request: &Request,
        title: &str,
        shown: &Shown,
        lines_max: usize,
    ) -> Result<(), ReplayError> {
        let label = shown.label.as_ref().map(|label| format!(" ({label})")).unwrap_or_default();
        self.line(time_us, request, &format!("{title}{label}"))?;
        Ok(self.lines(request, shown, lines_max)?)
    }

    fn lines(&mut self, request: &Request, shown: &Shown, lines_max: usize) -> io::Result<()> {
        let lines_max = if self.detail == Detail::Full { usize::MAX } else { lines_max };
        for line in shown.lines.iter().take(lines_max) {
            writeln!(self.out, "{MARGIN}{line}")?;
        }
        match shown.lines.len().saturating_sub(lines_max) {
            0 => Ok(()),
            more => self.more(request, &counted(more as u64, "more line")),
        }
    }

    fn more(&mut self, request: &Request, what: &str) -> io::Result<()> {
        let text = format!("… {what}: {} {}", self.full_command, request.id);
        self.note(&text)
    }
}
