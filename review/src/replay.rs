//! `weir replay`: a session (or one request of it) as it happened.
//!
//! Finds the session, builds its [`story`], and has it printed by [`print`] or written as a cast by [`cast`].
//! Exec, attach and port-forward streams are raw upgrade bytes for now and are shown as such.

mod body;
mod cast;
mod print;
mod story;

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use weir_common::event::{BytesError, Channel, Kind};

use crate::{
    source::{Journal, Record, SourceError},
    terminal::{Style, escaped},
};
use body::Detail;
use cast::Cast;
use print::Printer;
use story::{Order, Step, Story};

/// Most ids that an ambiguous prefix is answered with.
const CANDIDATES_MAX: usize = 10;

/// What went wrong with a replay.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplayError {
    /// Nothing has this id.
    #[error("no {what} in {journal} has the id {id}; `weir sessions --from {journal}` lists the sessions")]
    Unknown { what: &'static str, id: String, journal: String },
    /// Several have it.
    #[error("{what} id {id} is not unique; give more of it: {candidates}")]
    Ambiguous { what: &'static str, id: String, candidates: String },
    /// No stream to write.
    #[error("nothing for a cast: no server bytes of exec, attach or port-forward are on record here")]
    NothingToCast,
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

/// Prints a session or request; with `speed` waiting as it happened, that many times faster.
///
/// # Errors
/// The subject is unknown, or journal or output fail.
pub(crate) fn play(
    journal: &Journal,
    subject: &Subject,
    speed: Option<f64>,
    out: &mut dyn Write,
    style: Style,
) -> Result<(), ReplayError> {
    let found = find(journal, subject)?;
    let story = tell(journal, &found)?;
    let (detail, order) = match (subject, speed) {
        (Subject::Request(_), _) => (Detail::Full, Order::Grouped),
        (_, Some(_)) => (Detail::Readable, Order::Chronological),
        (_, None) => (Detail::Readable, Order::Grouped),
    };
    let full_command = format!("weir replay --from {} --request", journal.name());
    let mut contents = journal.archive();
    let mut printer = Printer::new(out, style, &story, &mut contents, detail, &full_command);
    printer.header()?;
    let mut wait = |length: Duration| wait(length);
    perform(&mut printer, &story.steps(order), speed, &mut wait)
}

/// Shows the steps, waiting between them if a speed is given. Time that overlaps is not waited for twice.
fn perform(
    printer: &mut Printer<'_>,
    steps: &[(i64, Step)],
    speed: Option<f64>,
    wait: &mut dyn FnMut(Duration),
) -> Result<(), ReplayError> {
    let mut now_us = steps.first().map_or(0, |(time, _)| *time);
    for (time_us, step) in steps {
        if let Some(speed) = speed
            && *time_us > now_us
        {
            printer.flush()?;
            let micros = time_us.abs_diff(now_us);
            // A pause that is too long for the type cannot be waited for anyway.
            let length = Duration::from_micros(micros).as_secs_f64() / speed;
            wait(Duration::try_from_secs_f64(length).unwrap_or(Duration::MAX));
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

/// Writes the server's raw bytes of a session or request to `path`; says how much that was.
///
/// # Errors
/// The subject is unknown, has no such bytes, or journal or file fail.
pub(crate) fn write_cast(journal: &Journal, subject: &Subject, path: &Path) -> Result<String, ReplayError> {
    let found = find(journal, subject)?;
    let error = |source| ReplayError::WriteCast { path: path.to_owned(), source };
    let mut cast: Option<Cast<BufWriter<File>>> = None;
    let mut last_us = 0;
    for record in journal.records() {
        let record = record?;
        if !found.admits(&record) {
            continue;
        }
        let Some(event) = journal.event(&record) else { continue };
        let Kind::Content(content) = &event.kind else { continue };
        let Some(request) = event.request.as_deref().filter(|id| found.admits_request(id)) else { continue };
        if content.channel != Channel::ServerRaw {
            continue;
        }
        let bytes = content
            .bytes
            .to_vec()
            .map_err(|source| ReplayError::Content { place: journal.place(record.place), source })?;
        last_us = event.time_unix_us;
        let writer = match &mut cast {
            Some(writer) => writer,
            None => {
                let file = BufWriter::new(File::create(path).map_err(error)?);
                cast.insert(Cast::new(file, &found.session, last_us).map_err(error)?)
            }
        };
        writer.add(last_us, request, &bytes).map_err(error)?;
    }
    let cast = cast.ok_or(ReplayError::NothingToCast)?;
    let text = format!(
        "wrote {} in {} of raw upgrade bytes (not decoded) to {}; playing it lets them act on the terminal",
        crate::moment::bytes(cast.bytes),
        crate::moment::counted(cast.pieces, "piece"),
        path.display()
    );
    cast.finish(last_us).map_err(error)?;
    Ok(text)
}

/// What a prefix stands for.
#[derive(Debug)]
struct Found {
    session: String,
    request: Option<String>,
}

impl Found {
    fn admits(&self, record: &Record) -> bool {
        record.session == self.session
    }

    fn admits_request(&self, id: &str) -> bool {
        self.request.as_deref().is_none_or(|request| request == id)
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
        if record.session.is_empty() {
            continue;
        }
        let (id, found) = match subject {
            Subject::Session(_) => (Some(record.session.clone()), (record.session.clone(), None)),
            Subject::Request(_) => {
                let request = journal.event(&record).and_then(|event| event.request);
                (request.clone(), (record.session.clone(), request))
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
mod tests;
