//! `weir events`: recorded events, one JSON object a line, byte for byte as they stand in the journal, but for content that is
//! decrypted; or what a [`projection`](crate::projection) makes of them.
//!
//! On a terminal control characters that JSON permits (DEL, C1, bidirectional overrides) are escaped the JSON way;
//! anywhere else the bytes are those that went to Kafka. Memory is bounded by one event.

use std::io::{self, Write};

use crate::{
    invoked,
    moment::Moment,
    projection::Projector,
    source::{Journal, Record, SourceError, group::Group},
    terminal::{escaped, escaped_json},
};

/// Most events that are written before their offsets are committed.
const COMMIT_EVENTS_MAX: usize = 512;

/// What went wrong with listing events.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventsError {
    /// Nothing has this id.
    #[error(
        "no session in {journal} has the id {id}; `{} sessions --from {journal}` lists the sessions",
        invoked::name()
    )]
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
    /// Nothing before the first and nothing after the second, if there are such.
    between: [Option<Moment>; 2],
    projector: Option<Projector>,
    /// Whether the session, or any event, was met, be it of another time.
    met: bool,
}

impl<'a> Lines<'a> {
    /// Writes the events of `session`, or all, to `out`.
    pub(crate) fn new(out: &'a mut dyn Write, terminal: bool, session: Option<&'a str>) -> Self {
        Self { out, terminal, session, between: [None; 2], projector: None, met: false }
    }

    /// Only what was recorded at or after the first, and at or before the second.
    pub(crate) fn between(self, since: Option<Moment>, until: Option<Moment>) -> Self {
        Self { between: [since, until], ..self }
    }

    /// The same, in the words of another format.
    pub(crate) fn projected(self, projector: Option<Projector>) -> Self {
        Self { projector, ..self }
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        if self.session.is_some_and(|session| session != record.session()) {
            return Ok(());
        }
        self.met = true;
        let [since, until] = self.between;
        let time = record.envelope.time_unix_us;
        if since.is_some_and(|since| time < since.0) || until.is_some_and(|until| time > until.0) {
            return Ok(());
        }
        let Some(projector) = &mut self.projector else { return self.line(&record.value) };
        for line in projector.take(record) {
            self.line(line.as_bytes())?;
        }
        Ok(())
    }

    fn line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.terminal {
            return writeln!(self.out, "{}", escaped_json(line));
        }
        self.out.write_all(line)?;
        self.out.write_all(b"\n")
    }
}

/// Writes what the journal holds; says what the format had no place for, if it had not.
///
/// # Errors
/// The session is unknown, or journal or output fail.
pub(crate) fn list(journal: &Journal, mut lines: Lines<'_>) -> Result<Option<String>, EventsError> {
    for record in journal.records() {
        lines.write(&journal.shown(record?))?;
    }
    lines.out.flush()?;
    match lines.session {
        // Of a topic, what is of another time was not read.
        Some(id) if !lines.met && (journal.topic().is_none() || lines.between[0].is_none()) => {
            Err(EventsError::Unknown { id: escaped(id).into_owned(), journal: journal.name() })
        }
        _ => Ok(lines.projector.and_then(|projector| projector.left_out())),
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
            lines.write(&journal.shown(record))?;
        }
        lines.out.flush()?;
        if !wait() {
            return Ok(());
        }
    }
}

/// Writes what comes to a member of a group, and lets it commit what is written.
///
/// # Errors
/// The topics or output fail.
pub(crate) fn follow_group(group: &mut Group, mut lines: Lines<'_>) -> Result<(), EventsError> {
    loop {
        let mut open = COMMIT_EVENTS_MAX;
        while open > 0
            && let Some(record) = group.next_record()?
        {
            lines.write(&record)?;
            open -= 1;
        }
        lines.out.flush()?;
        group.commit().map_err(SourceError::from)?;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{EventsError, Lines, follow, list};
    use crate::{
        fixture::{SESSION, Writer, one_session},
        moment::Moment,
        source::Journal,
    };

    fn listed(journal: &Journal, terminal: bool, session: Option<&str>) -> Result<Vec<u8>, EventsError> {
        let mut out = Vec::new();
        list(journal, Lines::new(&mut out, terminal, session)).map(|_| out)
    }

    #[test]
    fn events_are_the_recorded_bytes_in_their_order() {
        let (directory, writer) = one_session();
        let journal = Journal::open(directory.path()).unwrap();
        let out = listed(&journal, false, None).unwrap();
        let mut tree = weir_common::merkle::Tree::new();
        out.strip_suffix(b"\n").unwrap().split(|byte| *byte == b'\n').for_each(|line| {
            tree.push(weir_common::merkle::leaf_hash(line));
        });
        assert_eq!(tree.root(), writer.tree.root());
        let session = listed(&journal, false, Some(SESSION)).unwrap();
        assert_eq!(session.split(|byte| *byte == b'\n').count(), writer.sequence as usize);
        assert!(matches!(listed(&journal, false, Some("0198")), Err(EventsError::Unknown { .. })));
    }

    #[test]
    fn of_a_time_are_those_between_both_ends_and_the_ends() {
        let (directory, _) = one_session();
        let journal = Journal::open(directory.path()).unwrap();
        let times: Vec<_> =
            journal.records().map(|record| Moment(record.unwrap().envelope.time_unix_us)).collect();
        let (first, last) = (times[0], *times.last().unwrap());
        let amid = Moment(times.iter().map(|time| time.0).find(|time| *time > first.0).unwrap());
        assert!(amid < last);
        let count = |since, until, session| {
            let mut out = Vec::new();
            list(&journal, Lines::new(&mut out, false, session).between(since, until)).unwrap();
            out.iter().filter(|byte| **byte == b'\n').count()
        };
        let expected = |is_it: &dyn Fn(&Moment) -> bool| times.iter().filter(|time| is_it(time)).count();
        assert_eq!(count(Some(amid), None, None), expected(&|time| *time >= amid));
        assert_eq!(count(None, Some(amid), None), expected(&|time| *time <= amid));
        assert_eq!(count(Some(amid), Some(amid), None), expected(&|time| *time == amid));
        assert_eq!(count(Some(first), Some(last), None), times.len());
        assert_eq!(count(Some(Moment(last.0 + 1)), None, Some(SESSION)), 0, "and no error");
        let mut out = Vec::new();
        let unknown = list(&journal, Lines::new(&mut out, false, Some("0198")).between(Some(first), None));
        assert!(matches!(unknown, Err(EventsError::Unknown { .. })));
    }

    #[test]
    fn on_a_terminal_nothing_recorded_can_steer_it() {
        let directory = tempfile::tempdir().unwrap();
        Writer::new(1, 7).session(SESSION, "a\u{9b}2J\u{202e}b").save(directory.path(), 0);
        let journal = Journal::open(directory.path()).unwrap();
        let text = String::from_utf8(listed(&journal, true, None).unwrap()).unwrap();
        assert!(text.contains(r#""claimedUser":"a\u009b2J\u202eb""#), "{text}");
    }

    #[test]
    fn damage_does_not_hide_what_can_be_read_and_is_told() {
        let (directory, writer) = one_session();
        let journal = Journal::open(directory.path()).unwrap();
        let mut bytes = fs::read(&journal.segments[0]).unwrap();
        let whole = listed(&journal, false, None).unwrap();
        let lines = |out: &[u8]| out.iter().filter(|byte| **byte == b'\n').count();
        assert_eq!((lines(&whole) as u64, journal.warnings().0.len()), (writer.sequence, 0));
        bytes[600] ^= 1;
        fs::write(&journal.segments[0], bytes).unwrap();
        assert_eq!(lines(&listed(&journal, false, None).unwrap()) as u64, writer.sequence - 1);
        let (warnings, more) = journal.warnings();
        assert_eq!((warnings.len(), more), (1, 0));
        assert!(
            warnings[0].contains("00000000000000000000.seg: segment is damaged at offset 512"),
            "{warnings:?}"
        );
    }

    #[test]
    fn a_followed_journal_gives_each_event_once_over_torn_tails_segments_and_epochs() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(1, 7);
        writer.started().save(directory.path(), 4096);
        let journal = Journal::open(directory.path()).unwrap();
        let (mut out, mut looks) = (Vec::new(), 0);
        let mut wait = || {
            looks += 1;
            match looks {
                1 => writer.session("s1", "u").session("s2", "u").save(directory.path(), 4096),
                2 => {
                    // Half a frame, as a look in the middle of a write finds it.
                    let before = writer.length();
                    writer.session("s3", "u").save(directory.path(), 0);
                    let path =
                        directory.path().join(writer.epoch.to_string()).join("00000000000000000000.seg");
                    let half = fs::read(&path).unwrap();
                    fs::write(path, &half[..before + 100]).unwrap();
                }
                3 => {
                    writer.commit().rotate(directory.path()).session("s4", "u").save(directory.path(), 0);
                }
                4 => Writer::new(2, 7).started().session("s5", "u").save(directory.path(), 64),
                5 => {}
                _ => return false,
            }
            true
        };
        follow(&journal, Lines::new(&mut out, false, None), &mut wait).unwrap();
        let text = String::from_utf8(out).unwrap();
        let seen: Vec<&str> = text.lines().filter_map(|line| line.split(r#""session":""#).nth(1)).collect();
        let seen: Vec<&str> = seen.iter().filter_map(|rest| rest.get(..2)).collect();
        assert_eq!(seen, ["s1", "s2", "s3", "s4", "s5"]);
        assert_eq!(text.lines().count(), 7);
    }
}
