//! `weir sessions`: one line for each session, with who was behind it and how much it did.
//!
//! One pass over the journal; memory grows with the number of sessions, not of events. Nothing here prints
//! recorded text unescaped.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io::{self, Write},
};

use serde::Serialize;
use uuid::Uuid;
use weir_common::event::{Caller, Event, Kind, Outcome};

use crate::{
    invoked,
    moment::{Moment, counted, length},
    source::made_us,
    terminal::{Style, escaped, escaped_json},
};

/// Which sessions to list; all that is given must hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    /// The claimed user.
    pub(crate) user: Option<String>,
    /// The cluster.
    pub(crate) cluster: Option<String>,
    /// The caller's pod is in this namespace, or a request was for it.
    pub(crate) namespace: Option<String>,
    /// Something happened at or after this.
    pub(crate) since: Option<Moment>,
    /// Something happened at or before this.
    pub(crate) until: Option<Moment>,
}

/// One session.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Summary {
    /// Its id.
    pub(crate) session: String,
    cluster: String,
    node: String,
    started: String,
    last: String,
    duration_us: u64,
    caller: Option<Box<Caller>>,
    invocations: u64,
    requests: u64,
    mutations: u64,
    streams: u64,
    refused: u64,
    failed: u64,
    gaps: u64,
    /// Whether its beginning was read.
    #[serde(skip)]
    begun: bool,
    /// Requests with no end on record: still running, or the agent ended without a word.
    unfinished: u64,
    namespaces: BTreeSet<String>,
    #[serde(skip)]
    first_us: i64,
    #[serde(skip)]
    last_us: i64,
    #[serde(skip)]
    open: HashSet<String>,
}

/// Events that belong to no session, and that a reviewer should know of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outside {
    connections_refused: u64,
    gaps: u64,
    findings: u64,
}

/// All sessions seen so far.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    by_id: BTreeMap<String, Summary>,
    outside: Outside,
    since: Option<Moment>,
    until: Option<Moment>,
}

impl Sessions {
    /// None yet. Of events that belong to no session only those of this time count; a session counts as a whole.
    pub(crate) fn between(since: Option<Moment>, until: Option<Moment>) -> Self {
        Self { since, until, ..Self::default() }
    }

    /// Whether the beginning of a session was not read, and since when all of them would be: their ids tell. An id that
    /// does not makes it the beginning of everything.
    pub(crate) fn earliest_beginning(&self) -> Option<Option<Moment>> {
        let since = self.since?;
        let goes_on = self.by_id.values().filter(|summary| !summary.begun && summary.last_us >= since.0);
        let began = |summary: &Summary| {
            Uuid::try_parse(&summary.session).ok().and_then(|id| made_us(&id)).map(Moment)
        };
        // None is the least.
        goes_on.map(began).min()
    }

    /// Takes one event into account.
    pub(crate) fn add(&mut self, event: &Event) {
        if event.session.is_empty() {
            let time = Moment(event.time_unix_us);
            if self.since.is_some_and(|since| time < since) || self.until.is_some_and(|until| time > until) {
                return;
            }
            match event.kind {
                Kind::ConnectionRefused { .. } => self.outside.connections_refused += 1,
                Kind::Gap { .. } => self.outside.gaps += 1,
                Kind::Finding { .. } => self.outside.findings += 1,
                _ => {}
            }
            return;
        }
        if !self.by_id.contains_key(&event.session) {
            self.by_id.insert(event.session.clone(), Summary::new(event));
        }
        if let Some(summary) = self.by_id.get_mut(&event.session) {
            summary.add(event);
        }
    }

    /// The sessions that the filter admits, oldest first, and what belongs to none.
    pub(crate) fn finish(self, filter: &Filter) -> (Vec<Summary>, Outside) {
        let mut list: Vec<Summary> = self.by_id.into_values().filter(|s| s.admitted(filter)).collect();
        for summary in &mut list {
            summary.started = Moment(summary.first_us).text();
            summary.last = Moment(summary.last_us).text();
            summary.duration_us = summary.last_us.abs_diff(summary.first_us);
            summary.unfinished = summary.open.len() as u64;
        }
        list.sort_by(|a, b| (a.first_us, &a.session).cmp(&(b.first_us, &b.session)));
        (list, self.outside)
    }
}

impl Summary {
    fn new(event: &Event) -> Self {
        Self {
            session: event.session.clone(),
            cluster: event.cluster.clone(),
            node: event.node.clone(),
            started: String::new(),
            last: String::new(),
            duration_us: 0,
            caller: None,
            invocations: 0,
            requests: 0,
            mutations: 0,
            streams: 0,
            refused: 0,
            failed: 0,
            gaps: 0,
            begun: false,
            unfinished: 0,
            namespaces: BTreeSet::new(),
            first_us: event.time_unix_us,
            last_us: event.time_unix_us,
            open: HashSet::new(),
        }
    }

    fn add(&mut self, event: &Event) {
        self.first_us = self.first_us.min(event.time_unix_us);
        self.last_us = self.last_us.max(event.time_unix_us);
        match &event.kind {
            Kind::SessionStarted { caller } => {
                self.caller = Some(caller.clone());
                self.begun = true;
            }
            Kind::InvocationStarted { .. } => self.invocations += 1,
            Kind::RequestOpened(opened) => {
                self.requests += 1;
                let mutating = matches!(opened.method.as_str(), "POST" | "PUT" | "PATCH" | "DELETE");
                self.mutations += u64::from(mutating && opened.upgrade.is_none());
                self.streams += u64::from(opened.upgrade.is_some());
                if !opened.attributes.namespace.is_empty() {
                    self.namespaces.insert(opened.attributes.namespace.clone());
                }
                self.open.extend(event.request.clone());
            }
            Kind::RequestRefused { .. } => self.refused += 1,
            Kind::RequestClosed(closed) => {
                self.failed += u64::from(matches!(closed.outcome, Outcome::UpstreamFailed));
                if let Some(request) = &event.request {
                    self.open.remove(request);
                }
            }
            Kind::Gap { .. } => self.gaps += 1,
            _ => {}
        }
    }

    fn admitted(&self, filter: &Filter) -> bool {
        let caller = self.caller.as_deref();
        let user = caller.and_then(Caller::user_or_claim);
        let pod_namespace = caller.and_then(|caller| caller.pod.as_ref()).map(|pod| &pod.namespace);
        filter.user.as_ref().is_none_or(|wanted| user == Some(wanted.as_str()))
            && filter.cluster.as_ref().is_none_or(|wanted| self.cluster == *wanted)
            && filter
                .namespace
                .as_ref()
                .is_none_or(|wanted| pod_namespace == Some(wanted) || self.namespaces.contains(wanted))
            && filter.since.is_none_or(|since| self.last_us >= since.0)
            && filter.until.is_none_or(|until| self.first_us <= until.0)
    }

    fn who(&self) -> String {
        let Some(caller) = &self.caller else { return "unknown".into() };
        match (&caller.pod, &caller.process) {
            (Some(pod), _) => format!("pod {}/{}", pod.namespace, pod.name),
            (None, Some(process)) => {
                let name = process.executable.rsplit('/').next().unwrap_or_default();
                format!("{name} (pid {}, uid {})", process.pid, process.uid)
            }
            (None, None) => "unknown".into(),
        }
    }

    fn remarks(&self) -> Vec<String> {
        let remark = |number: u64, word: &str| (number > 0).then(|| format!("{number} {word}"));
        [
            remark(self.refused, "refused"),
            remark(self.failed, "failed"),
            remark(self.unfinished, "unfinished"),
            (self.gaps > 0).then(|| counted(self.gaps, "gap")),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Prints one JSON object a line.
///
/// # Errors
/// The output cannot be written.
pub(crate) fn print_json(out: &mut dyn Write, list: &[Summary]) -> io::Result<()> {
    for summary in list {
        writeln!(out, "{}", escaped_json(&serde_json::to_vec(summary)?))?;
    }
    Ok(())
}

/// Prints a table, and a line on what belongs to no session.
///
/// # Errors
/// The output cannot be written.
pub(crate) fn print(out: &mut dyn Write, style: Style, list: &[Summary], outside: Outside) -> io::Result<()> {
    let head = [
        "SESSION",
        "STARTED",
        "LASTED",
        "CLUSTER",
        "CALLER",
        "CLAIMED USER",
        "PROC",
        "REQ",
        "WRITE",
        "STREAM",
    ];
    let rows: Vec<[String; 10]> = list.iter().map(row).collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([head[column].len()])
            .max()
            .unwrap_or_default()
    };
    let widths: [usize; 10] = std::array::from_fn(width);
    let line = |cells: &[String; 10]| {
        let padded: Vec<String> =
            cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    if list.is_empty() {
        writeln!(out, "no session matches")?;
    } else {
        writeln!(out, "{}", style.strong(&line(&head.map(str::to_owned))))?;
    }
    for (summary, row) in list.iter().zip(&rows) {
        let remarks = summary.remarks();
        let remarks = if remarks.is_empty() { String::new() } else { format!("  ({})", remarks.join(", ")) };
        writeln!(out, "{}{}", line(row), style.warning(&remarks))?;
    }
    let Outside { connections_refused, gaps, findings } = outside;
    if outside != Outside::default() {
        let text = format!(
            "outside of sessions: {}, {}, {} (`{} events` shows them)",
            counted(connections_refused, "refused connection"),
            counted(gaps, "gap"),
            counted(findings, "finding"),
            invoked::name()
        );
        writeln!(out, "{}", style.warning(&text))?;
    }
    Ok(())
}

fn row(summary: &Summary) -> [String; 10] {
    let user = summary.caller.as_ref().and_then(|caller| caller.user_or_claim()).unwrap_or("-");
    [
        escaped(&summary.session).into_owned(),
        summary.started.clone(),
        length(summary.duration_us),
        escaped(&summary.cluster).into_owned(),
        escaped(&summary.who()).into_owned(),
        escaped(user).into_owned(),
        summary.invocations.to_string(),
        summary.requests.to_string(),
        summary.mutations.to_string(),
        summary.streams.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use weir_common::event::Kind;

    use super::{Filter, Sessions, print, print_json};
    use crate::{
        fixture::{START_US, Writer, one_session},
        moment::Moment,
        source::Journal,
        terminal::Style,
    };

    fn read(directory: &std::path::Path) -> Sessions {
        let journal = Journal::open(directory).unwrap();
        let mut sessions = Sessions::default();
        journal
            .records()
            .filter_map(|record| journal.event(&record.unwrap()))
            .for_each(|event| sessions.add(&event));
        sessions
    }

    fn journal() -> tempfile::TempDir {
        let (directory, _) = one_session();
        let mut second = Writer::new(2, 7);
        second.started().after_ms(3_600_000).session("s2", "root\u{1b}[2J");
        second.event("", "", "", Kind::Gap { reason: "disk full".into(), events: Some(3), bytes: None });
        second.event("", "", "", Kind::ConnectionRefused { reason: "plain HTTP".into(), caller: None });
        second.save(directory.path(), 0);
        directory
    }

    #[track_caller]
    fn check(filter: &Filter, expected: Expect) {
        let directory = journal();
        let (list, outside) = read(directory.path()).finish(filter);
        let mut out = Vec::new();
        print(&mut out, Style::PLAIN, &list, outside).unwrap();
        expected.assert_eq(&String::from_utf8(out).unwrap());
    }

    #[test]
    fn sessions_are_listed_oldest_first_with_what_they_did() {
        check(
            &Filter::default(),
            expect![[r#"
            SESSION                               STARTED                   LASTED  CLUSTER  CALLER          CLAIMED USER                    PROC  REQ  WRITE  STREAM
            0198aaaa-0000-7000-8000-000000000001  2026-01-31T12:00:00.000Z  1.14 s  prod     pod ci/agent-1  system:serviceaccount:ci:agent  2     4    1      1  (1 unfinished)
            s2                                    2026-01-31T13:00:00.000Z  0 µs    prod     pod ci/agent-1  root\x1b[2J                     0     0    0      0
            outside of sessions: 1 refused connection, 1 gap, 0 findings (`weir events` shows them)
        "#]],
        );
    }

    #[test]
    fn nothing_that_matches_is_said() {
        check(
            &Filter { cluster: Some("other".into()), ..Filter::default() },
            expect![[r#"
            no session matches
            outside of sessions: 1 refused connection, 1 gap, 0 findings (`weir events` shows them)
        "#]],
        );
    }

    #[test]
    fn every_filter_must_hold() {
        let directory = journal();
        let ids = |filter: Filter| {
            let (list, _) = read(directory.path()).finish(&filter);
            list.into_iter().map(|summary| summary.session.chars().take(4).collect()).collect::<Vec<String>>()
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(ids(Filter { namespace: text("web"), ..Filter::default() }), ["0198"]);
        assert_eq!(ids(Filter { namespace: text("ci"), ..Filter::default() }), ["0198", "s2"]);
        assert_eq!(ids(Filter { user: text("root\u{1b}[2J"), ..Filter::default() }), ["s2"]);
        let later = Some(Moment(START_US + 2_000_000));
        assert_eq!(ids(Filter { since: later, ..Filter::default() }), ["s2"]);
        assert_eq!(ids(Filter { until: later, ..Filter::default() }), ["0198"]);
        assert!(ids(Filter { since: later, until: later, ..Filter::default() }).is_empty());
    }

    #[test]
    fn what_belongs_to_no_session_is_counted_within_the_time_that_is_asked_for() {
        let directory = journal();
        let outside = |since, until| {
            let journal = Journal::open(directory.path()).unwrap();
            let mut sessions = Sessions::between(since, until);
            journal
                .records()
                .filter_map(|record| journal.event(&record.unwrap()))
                .for_each(|event| sessions.add(&event));
            sessions.outside
        };
        let later = Some(Moment(START_US + 2_000_000));
        assert_eq!((outside(None, None).gaps, outside(later, None).gaps), (1, 1));
        assert_eq!(outside(None, later), super::Outside::default());
    }

    #[test]
    fn sessions_that_went_on_say_by_their_ids_from_when_on_they_are_whole() {
        let directory = tempfile::tempdir().unwrap();
        let (begun_us, since) = (START_US - 7_200_000_000, Some(Moment(START_US)));
        let id = |us: i64| {
            let (seconds, rest) = (us as u64 / 1_000_000, (us % 1_000_000) as u32);
            uuid::Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, seconds, rest * 1000)).to_string()
        };
        let (went_on, whole) = (id(begun_us), id(START_US));
        let mut writer = Writer::new(1, 7);
        writer.started().session(&whole, "u").respond([&went_on, "i", "r"], 200).save(directory.path(), 0);
        let add = |since, directory: &std::path::Path| {
            let journal = Journal::open(directory).unwrap();
            let mut sessions = Sessions::between(since, None);
            journal
                .records()
                .filter_map(|record| journal.event(&record.unwrap()))
                .for_each(|event| sessions.add(&event));
            sessions.earliest_beginning()
        };
        assert_eq!(add(since, directory.path()), Some(Some(Moment(begun_us))));
        assert_eq!(add(None, directory.path()), None);
        // An id that does not tell: everything is needed.
        writer.respond(["s3", "i", "r"], 200).save(directory.path(), 0);
        assert_eq!(add(since, directory.path()), Some(None));
        let directory = tempfile::tempdir().unwrap();
        Writer::new(1, 7).session(&whole, "u").save(directory.path(), 0);
        assert_eq!(add(since, directory.path()), None);
    }

    #[test]
    fn json_has_one_object_a_line() {
        let directory = journal();
        let (list, _) = read(directory.path()).finish(&Filter::default());
        let mut out = Vec::new();
        print_json(&mut out, &list).unwrap();
        let text = String::from_utf8(out).unwrap();
        expect![[r#"{"session":"0198aaaa-0000-7000-8000-000000000001","cluster":"prod","node":"node-1","started":"2026-01-31T12:00:00.000Z","last":"2026-01-31T12:00:01.138Z","durationUs":1138000,"caller":{"pod":{"namespace":"ci","name":"agent-1","uid":"uid-1","serviceAccount":"agent"},"cgroup":0,"netns":0,"dialled":"10.96.0.1:443","claimedUser":"system:serviceaccount:ci:agent"},"invocations":2,"requests":4,"mutations":1,"streams":1,"refused":0,"failed":0,"gaps":0,"unfinished":1,"namespaces":["web"]}"#]].assert_eq(text.lines().next().unwrap());
        assert_eq!(text.lines().count(), 2);
    }
}
