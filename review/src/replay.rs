//! `weir replay`: a session (or one request of it) as it happened.
//!
//! Finds the session, builds its [`story`], and has it printed by [`print`], written as a cast by [`cast`] or as plain
//! text by [`transcript`].
//! Exec and attach streams are shown by channel; what the agent could not decode is shown raw.

mod body;
mod cast;
mod changes;
mod debugged;
mod print;
mod story;
mod transcript;
mod wording;

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::json;
use weir_common::event::{BytesError, Channel, Content, Event, Kind};

use crate::{
    invoked,
    moment::{Moment, Seek},
    source::{Journal, Record, SourceError},
    terminal::{Style, escaped, escaped_json},
};
use body::Detail;
use cast::Cast;
use print::Printer;
use story::{Order, Step, Story};
use transcript::Transcript;

/// Most ids that an ambiguous prefix is answered with.
const CANDIDATES_MAX: usize = 10;

/// What went wrong with a replay.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplayError {
    /// Nothing has this id.
    #[error(
        "no {what} in {journal} has the id {id}; `{} sessions --from {journal}` lists the sessions",
        invoked::name()
    )]
    Unknown { what: &'static str, id: String, journal: String },
    /// Several have it.
    #[error("{what} id {id} is not unique; give more of it: {candidates}")]
    Ambiguous { what: &'static str, id: String, candidates: String },
    /// No stream to write.
    #[error("nothing to write: no exec or attach stream is on record here")]
    NothingSaid,
    /// It ends before the time that was asked for.
    #[error("nothing is on record at or after {asked}; it ends at {end}")]
    Over { asked: String, end: String },
    /// The cast cannot be written.
    #[error("cannot write the cast {path}")]
    WriteCast { path: PathBuf, source: io::Error },
    /// The journal cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Content cannot be decoded.
    #[error("content at {place} cannot be read")]
    Content { place: String, source: BytesError },
    /// A place that held content holds something else now.
    #[error("the journal changed while it was read: no content at {place} any more")]
    Changed { place: String },
    /// Standard output.
    #[error("cannot write the output")]
    Output(#[from] io::Error),
}

/// What to replay.
#[derive(Clone, Debug)]
pub(crate) enum Subject {
    /// A session, by id or unique prefix.
    Session(String),
    /// One request in full, by id or unique prefix.
    Request(String),
}

/// How long to wait between what happened at different times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// That many times faster than it happened.
    pub(crate) speed: f64,
    /// No longer than this at once.
    pub(crate) idle_limit: Option<Duration>,
}

/// Prints a session or request; with `pace` waiting as it happened, with `seek` what came before is passed over.
///
/// # Errors
/// The subject is unknown, or journal or output fail.
pub(crate) fn play(
    journal: &Journal,
    subject: &Subject,
    pace: Option<Pace>,
    seek: Option<Seek>,
    out: &mut dyn Write,
    style: Style,
) -> Result<(), ReplayError> {
    let found = find(journal, subject)?;
    let story = tell(journal, &found)?;
    let from_us = begin(seek, story.first_us, story.last_us)?;
    let (detail, order) = match (subject, pace) {
        (Subject::Request(_), _) => (Detail::Full, Order::Grouped),
        (_, Some(_)) => (Detail::Readable, Order::Chronological),
        (_, None) => (Detail::Readable, Order::Grouped),
    };
    let full_command = format!("{} replay --from {} --request", invoked::name(), journal.name());
    let mut contents = journal.archive();
    let mut printer = Printer::new(out, style, &story, &mut contents, detail, &full_command);
    printer.header()?;
    let mut wait = |length: Duration| wait(length);
    let mut steps = story.steps(order);
    steps.retain(|(time_us, _)| *time_us >= from_us);
    perform(&mut printer, &steps, pace, &mut wait)
}

/// The time from which on something is shown.
fn begin(seek: Option<Seek>, first_us: i64, last_us: i64) -> Result<i64, ReplayError> {
    let from_us = seek.map_or(first_us, |seek| seek.unix_us(first_us));
    if seek.is_some() && from_us > last_us {
        return Err(ReplayError::Over { asked: Moment(from_us).text(), end: Moment(last_us).text() });
    }
    Ok(from_us)
}

/// Shows the steps, waiting between them if a pace is given. Time that overlaps is not waited for twice.
fn perform(
    printer: &mut Printer<'_>,
    steps: &[(i64, Step)],
    pace: Option<Pace>,
    wait: &mut dyn FnMut(Duration),
) -> Result<(), ReplayError> {
    let mut now_us = steps.first().map_or(0, |(time, _)| *time);
    for (time_us, step) in steps {
        if let Some(Pace { speed, idle_limit }) = pace
            && *time_us > now_us
        {
            printer.flush()?;
            let micros = time_us.abs_diff(now_us);
            // A pause that is too long for the type cannot be waited for anyway.
            let length = Duration::from_micros(micros).as_secs_f64() / speed;
            let length = Duration::try_from_secs_f64(length).unwrap_or(Duration::MAX);
            wait(idle_limit.map_or(length, |limit| length.min(limit)));
            now_us = *time_us;
        }
        printer.step(*time_us, *step)?;
    }
    printer.flush()?;
    Ok(())
}

fn wait(length: Duration) {
    let start = Instant::now();
    // A parked thread may wake for no reason.
    while let Some(rest) = length.checked_sub(start.elapsed()).filter(|rest| !rest.is_zero()) {
        std::thread::park_timeout(rest);
    }
}

/// Writes the terminals of a session or request to `path`, for a player that waits no longer than `idle_limit` at once;
/// says how much that was. With `seek` what came before is there at once, so that the terminal looks as it did then.
///
/// # Errors
/// The subject is unknown, has no such bytes, or journal or file fail.
pub(crate) fn write_cast(
    journal: &Journal,
    subject: &Subject,
    path: &Path,
    idle_limit: Option<Duration>,
    seek: Option<Seek>,
) -> Result<String, ReplayError> {
    let found = find(journal, subject)?;
    let from_us = match seek {
        Some(_) => tell(journal, &found).and_then(|story| begin(seek, story.first_us, story.last_us))?,
        None => i64::MIN,
    };
    let error = |source| ReplayError::WriteCast { path: path.to_owned(), source };
    let mut cast: Option<Cast<BufWriter<File>>> = None;
    let mut last_us = 0;
    visit(journal, &found, &mut |record, event| {
        let (Kind::Content(content), Some(request)) = (&event.kind, &event.request) else { return Ok(()) };
        let shown = matches!(
            content.channel,
            Channel::Stdin | Channel::Stdout | Channel::Stderr | Channel::Resize | Channel::ServerRaw
        );
        if !shown {
            return Ok(());
        }
        let bytes = bytes_of(journal, record, content)?;
        last_us = event.time_unix_us.max(from_us);
        let writer = match &mut cast {
            Some(writer) => writer,
            None => {
                let file = BufWriter::new(File::create(path).map_err(error)?);
                cast.insert(Cast::new(file, &found.session, last_us, idle_limit).map_err(error)?)
            }
        };
        writer.add(last_us, request, content.channel, &bytes).map_err(error)
    })?;
    let cast = cast.ok_or(ReplayError::NothingSaid)?;
    let text = format!(
        "wrote {} in {} to {}; playing it lets them act on the terminal",
        crate::moment::bytes(cast.bytes),
        crate::moment::counted(cast.pieces, "piece"),
        path.display()
    );
    cast.finish(last_us).map_err(error)?;
    Ok(text)
}

/// Writes what was said in exec and attach as plain text.
///
/// # Errors
/// The subject is unknown, nothing was said, or journal or output fail.
pub(crate) fn write_transcript(
    journal: &Journal,
    subject: &Subject,
    out: &mut dyn Write,
) -> Result<(), ReplayError> {
    let found = find(journal, subject)?;
    let mut transcript = Transcript::new(out);
    visit(journal, &found, &mut |record, event| {
        let Some(request) = event.request.as_deref() else { return Ok(()) };
        match &event.kind {
            Kind::RequestOpened(opened) => transcript.opened(request, opened),
            Kind::RequestClosed(closed) => transcript.closed(request, closed)?,
            Kind::Content(content) => {
                let shown = matches!(
                    content.channel,
                    Channel::Stdin
                        | Channel::Stdout
                        | Channel::Stderr
                        | Channel::ClientRaw
                        | Channel::ServerRaw
                );
                if shown {
                    let bytes = bytes_of(journal, record, content)?;
                    transcript.add(request, content.channel, &bytes)?;
                }
            }
            _ => {}
        }
        Ok(())
    })?;
    transcript.finish()?;
    if transcript.is_empty { Err(ReplayError::NothingSaid) } else { Ok(()) }
}

/// Writes what is on record as lines of JSON: seconds since the first of it, and the event as it was recorded.
///
/// # Errors
/// The subject is unknown, or journal or output fail.
pub(crate) fn write_json(
    journal: &Journal,
    subject: &Subject,
    seek: Option<Seek>,
    out: &mut dyn Write,
    terminal: bool,
) -> Result<(), ReplayError> {
    let found = find(journal, subject)?;
    let mut first_us = None;
    visit(journal, &found, &mut |record, event| {
        let first_us = *first_us.get_or_insert(event.time_unix_us);
        if seek.is_some_and(|seek| event.time_unix_us < seek.unix_us(first_us)) {
            return Ok(());
        }
        let since_us = event.time_unix_us.saturating_sub(first_us);
        #[expect(clippy::cast_precision_loss, reason = "seconds with microseconds fit for centuries")]
        let at = since_us as f64 / 1e6;
        // Not made anew: a reader gets the recorded bytes.
        let Ok(recorded) = std::str::from_utf8(&record.value) else { return Ok(()) };
        let line = format!("{{\"at\":{},\"event\":{recorded}}}", json!(at));
        let written = if terminal {
            writeln!(out, "{}", escaped_json(line.as_bytes()))
        } else {
            writeln!(out, "{line}")
        };
        Ok(written?)
    })
}

/// Shows each event of what was found.
fn visit(
    journal: &Journal,
    found: &Found,
    show: &mut dyn FnMut(&Record, &Event) -> Result<(), ReplayError>,
) -> Result<(), ReplayError> {
    for record in journal.records() {
        let record = record?;
        if !found.admits(&record) {
            continue;
        }
        let record = journal.shown(record);
        let Some(event) = journal.event(&record) else { continue };
        if found.request.is_none() || event.request == found.request {
            show(&record, &event)?;
        }
    }
    Ok(())
}

fn bytes_of(journal: &Journal, record: &Record, content: &Content) -> Result<Vec<u8>, ReplayError> {
    let place = || journal.place(record.place);
    content.bytes.to_vec().map_err(|source| ReplayError::Content { place: place(), source })
}

/// What a prefix stands for.
#[derive(Debug)]
struct Found {
    session: String,
    request: Option<String>,
}

impl Found {
    fn admits(&self, record: &Record) -> bool {
        record.session() == self.session
    }
}

fn find(journal: &Journal, subject: &Subject) -> Result<Found, ReplayError> {
    let (what, prefix) = match subject {
        Subject::Session(id) => ("session", id),
        Subject::Request(id) => ("request", id),
    };
    let mut candidates: BTreeSet<(String, Option<String>)> = BTreeSet::new();
    for record in journal.records() {
        let record = record?;
        if record.session().is_empty() {
            continue;
        }
        let (id, found) = match subject {
            Subject::Session(_) => (Some(record.session().to_owned()), (record.session().to_owned(), None)),
            Subject::Request(_) => {
                let request = journal.event(&record).and_then(|event| event.request);
                (request.clone(), (record.session().to_owned(), request))
            }
        };
        if id.as_deref() == Some(prefix) {
            candidates = BTreeSet::from([found]);
            break;
        }
        // One more than is named, so that the answer can say that there are more.
        if candidates.len() <= CANDIDATES_MAX
            && !prefix.is_empty()
            && id.is_some_and(|id| id.starts_with(prefix))
        {
            candidates.insert(found);
        }
    }
    let id = escaped(prefix).into_owned();
    match candidates.len() {
        0 => Err(ReplayError::Unknown { what, id, journal: journal.name() }),
        1 => {
            let (session, request) = candidates.pop_first().unwrap_or_default();
            Ok(Found { session, request })
        }
        number => {
            let named = candidates.into_iter().take(CANDIDATES_MAX);
            let mut names: Vec<String> =
                named.map(|(session, request)| escaped(&request.unwrap_or(session)).into_owned()).collect();
            if number > CANDIDATES_MAX {
                names.push("…".into());
            }
            Err(ReplayError::Ambiguous { what, id, candidates: names.join(", ") })
        }
    }
}

fn tell(journal: &Journal, found: &Found) -> Result<Story, ReplayError> {
    let mut story = Story::new(found.session.clone());
    for record in journal.records() {
        let record = record?;
        if !found.admits(&record) {
            continue;
        }
        let Some(event) = journal.event(&record) else { continue };
        // What numbers processes and requests is told for all of them, the rest for the wanted one.
        let head = matches!(
            event.kind,
            Kind::SessionStarted { .. } | Kind::InvocationStarted { .. } | Kind::RequestOpened(_)
        );
        if head || found.request.is_none() || event.request == found.request {
            story.add(record.place, event);
        }
    }
    story.focus.clone_from(&found.request);
    Ok(story)
}

#[cfg(test)]
mod seek_tests;
#[cfg(test)]
mod tests;
