//! `weir events`: recorded events, one JSON object a line, byte for byte as they stand in the journal.
//!
//! On a terminal control characters that JSON permits (DEL, C1, bidirectional overrides) are escaped the JSON way;
//! anywhere else the bytes are those that went to Kafka. Memory is bounded by one event.

use std::io::{self, Write};

use crate::{
    source::{Journal, Record, SourceError},
    terminal::{escaped, escaped_json},
};

/// What went wrong with listing events.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventsError {
    /// Nothing has this id.
    #[error("no session in {journal} has the id {id}; `weir sessions --from {journal}` lists the sessions")]
    Unknown { id: String, journal: String },
    /// The journal cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Standard output.
    #[error("cannot write the output")]
    Output(#[from] io::Error),
}

/// Writes events as lines.
pub(crate) struct Lines<'a> {
    out: &'a mut dyn Write,
    /// Whether `out` is a terminal.
    terminal: bool,
    session: Option<&'a str>,
    written: u64,
}

impl<'a> Lines<'a> {
    /// Writes the events of `session`, or all, to `out`.
    pub(crate) fn new(out: &'a mut dyn Write, terminal: bool, session: Option<&'a str>) -> Self {
        Self { out, terminal, session, written: 0 }
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        if self.session.is_some_and(|session| session != record.session) {
            return Ok(());
        }
        self.written += 1;
        if self.terminal {
            return writeln!(self.out, "{}", escaped_json(&record.value));
        }
        self.out.write_all(&record.value)?;
        self.out.write_all(b"\n")
    }
}

/// Writes what the journal holds.
///
/// # Errors
/// The session is unknown, or journal or output fail.
pub(crate) fn list(journal: &Journal, mut lines: Lines<'_>) -> Result<(), EventsError> {
    for record in journal.records() {
        lines.write(&record?)?;
    }
    lines.out.flush()?;
    match lines.session {
        Some(id) if lines.written == 0 => {
            Err(EventsError::Unknown { id: escaped(id).into_owned(), journal: journal.name() })
        }
        _ => Ok(()),
    }
}

/// Writes what the journal holds and what comes, until `wait` (called when there is nothing new) says false.
///
/// # Errors
/// Journal or output fail.
pub(crate) fn follow(
    journal: &Journal,
    mut lines: Lines<'_>,
    wait: &mut dyn FnMut() -> bool,
) -> Result<(), EventsError> {
    let mut tail = journal.tail();
    loop {
        while let Some(record) = tail.next_record()? {
            lines.write(&record)?;
        }
        lines.out.flush()?;
        if !wait() {
            return Ok(());
        }
    }
}
