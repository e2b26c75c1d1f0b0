//! The story of one session: which process sent which requests, and where in the journal their content is.
//!
//! Built in one pass. Content stays in the journal and is read when it is printed, so memory grows with the
//! number of events of the session, never with their size. Pure: events in, story out.

use std::collections::HashMap;

use weir_common::event::{
    Caller, Change, Channel, Connection, Container, Content, Event, Header, Kind, Outcome, Process,
    RequestClosed, RequestOpened,
};

use super::wording;
use crate::source::Place;

/// A session.
#[derive(Debug)]
pub(crate) struct Story {
    pub(crate) session: String,
    pub(crate) cluster: String,
    pub(crate) node: String,
    pub(crate) tenant: Option<String>,
    pub(crate) caller: Option<Box<Caller>>,
    /// Time of the first event; relative times count from here.
    pub(crate) first_us: i64,
    pub(crate) last_us: i64,
    pub(crate) invocations: Vec<Invocation>,
    pub(crate) requests: Vec<Request>,
    /// Gaps and findings that belong to no request.
    pub(crate) notes: Vec<Note>,
    /// The one request to show, if not all are.
    pub(crate) focus: Option<String>,
    invocation_index: HashMap<Option<String>, usize>,
    request_index: HashMap<String, usize>,
}

/// The requests of one process.
#[derive(Debug)]
pub(crate) struct Invocation {
    /// Time of its first event.
    pub(crate) first_us: i64,
    /// None for requests of a process that could not be told.
    pub(crate) process: Option<Process>,
    pub(crate) container: Option<Container>,
    /// Number of requests so far: the next one's number within the invocation.
    requests: usize,
}

/// A request. Every half may be missing: an agent can crash, a journal can be cut.
#[derive(Debug, Default)]
pub(crate) struct Request {
    pub(crate) id: String,
    pub(crate) invocation: usize,
    /// Number within the invocation, from 1.
    pub(crate) number: usize,
    pub(crate) first_us: i64,
    pub(crate) opened: Option<(i64, Box<RequestOpened>)>,
    pub(crate) refused: Option<(i64, u16, String)>,
    pub(crate) response: Option<(i64, u16, Vec<Header>)>,
    pub(crate) closed: Option<(i64, Box<RequestClosed>)>,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) notes: Vec<Note>,
}

/// A piece of content that the journal holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) time_us: i64,
    pub(crate) place: Place,
    pub(crate) channel: Channel,
    pub(crate) connection: Option<Connection>,
    pub(crate) offset: u64,
}

/// What a channel is called, in words that need no escaping.
pub(crate) fn channel_name(channel: Channel, connection: Option<Connection>) -> String {
    let port = || connection.map_or_else(String::new, |of| format!(" {} (connection {})", of.port, of.id));
    match channel {
        Channel::RequestBody => "request body".into(),
        Channel::ResponseBody => "output".into(),
        Channel::ClientRaw => "client → server".into(),
        Channel::ServerRaw => "server → client".into(),
        Channel::Stdin => "stdin".into(),
        Channel::Stdout => "stdout".into(),
        Channel::Stderr => "stderr".into(),
        Channel::Status => "status".into(),
        Channel::Resize => "terminal size".into(),
        Channel::PortIn => format!("to port{}", port()),
        Channel::PortOut => format!("from port{}", port()),
        Channel::PortError => format!("error of port{}", port()),
    }
}

/// A gap, a finding, or the end of a channel, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) time_us: i64,
    pub(crate) text: String,
    /// Nothing to worry about.
    pub(crate) calm: bool,
}

impl Note {
    /// None for other kinds.
    fn of(time_us: i64, kind: &Kind) -> Option<Self> {
        let calm = matches!(
            kind,
            Kind::ChannelChanged { .. }
                | Kind::FileCopied(_)
                | Kind::ConnectionForwarded(_)
                | Kind::ObjectsNamed(_)
        );
        note(kind).map(|text| Self { time_us, text, calm })
    }
}

impl Story {
    /// An empty story.
    pub(crate) fn new(session: String) -> Self {
        Self {
            session,
            cluster: String::new(),
            node: String::new(),
            tenant: None,
            caller: None,
            first_us: i64::MAX,
            last_us: i64::MIN,
            invocations: Vec::new(),
            requests: Vec::new(),
            notes: Vec::new(),
            focus: None,
            invocation_index: HashMap::new(),
            request_index: HashMap::new(),
        }
    }

    /// Takes the next event of this session, which is found at `place`.
    pub(crate) fn add(&mut self, place: Place, event: Event) {
        let time_us = event.time_unix_us;
        if self.first_us == i64::MAX {
            (self.cluster, self.node, self.tenant) = (event.cluster, event.node, event.tenant);
        }
        self.first_us = self.first_us.min(time_us);
        self.last_us = self.last_us.max(time_us);
        match event.kind {
            Kind::SessionStarted { caller } => self.caller = Some(caller),
            Kind::InvocationStarted { process, container } => {
                let index = self.invocation(event.invocation, time_us);
                self.invocations[index].process = Some(process);
                self.invocations[index].container = container;
            }
            kind => match event.request {
                Some(id) => {
                    let invocation = self.invocation(event.invocation, time_us);
                    self.request(id, invocation, time_us).add(place, time_us, kind);
                }
                None => self.notes.extend(Note::of(time_us, &kind)),
            },
        }
    }

    /// The number that stands before each line of a request: process and request within it, from 1.
    pub(crate) fn label(&self, request: &Request) -> String {
        format!("{}.{}", request.invocation + 1, request.number)
    }

    fn invocation(&mut self, id: Option<String>, time_us: i64) -> usize {
        *self.invocation_index.entry(id).or_insert_with(|| {
            self.invocations.push(Invocation {
                first_us: time_us,
                process: None,
                container: None,
                requests: 0,
            });
            self.invocations.len() - 1
        })
    }

    fn request(&mut self, id: String, invocation: usize, time_us: i64) -> &mut Request {
        let index = *self.request_index.entry(id.clone()).or_insert_with(|| {
            let counter = &mut self.invocations[invocation].requests;
            *counter += 1;
            let number = *counter;
            self.requests.push(Request { id, invocation, number, first_us: time_us, ..Request::default() });
            self.requests.len() - 1
        });
        &mut self.requests[index]
    }
}

impl Request {
    fn add(&mut self, place: Place, time_us: i64, kind: Kind) {
        match kind {
            Kind::RequestOpened(opened) => self.opened = Some((time_us, opened)),
            Kind::RequestRefused { status, reason } => self.refused = Some((time_us, status, reason)),
            Kind::ResponseStarted { status, headers } => self.response = Some((time_us, status, headers)),
            Kind::RequestClosed(closed) => self.closed = Some((time_us, closed)),
            Kind::Content(Content { channel, connection, offset, .. }) => {
                self.pieces.push(Piece { time_us, place, channel, connection, offset });
            }
            kind => self.notes.extend(Note::of(time_us, &kind)),
        }
    }

    /// Whether its answer is a stream that is shown piece by piece: a watch, a followed log, an upgrade. An error
    /// (or a refusal) in their place is an answer like any other.
    pub(crate) fn is_stream(&self) -> bool {
        let body = |piece: &Piece| matches!(piece.channel, Channel::RequestBody | Channel::ResponseBody);
        if !self.pieces.iter().all(body) {
            return true;
        }
        let Some((_, opened)) = &self.opened else { return false };
        let status = self.response.as_ref().map(|(_, status, _)| *status);
        if self.refused.is_some() || status.is_some_and(|status| status >= 300) {
            return false;
        }
        let query = opened.uri.split_once('?').map_or("", |(_, query)| query);
        let follows = || query.split('&').any(|pair| matches!(pair, "follow=true" | "follow=1" | "follow"));
        opened.upgrade.is_some()
            || opened.attributes.verb == "watch"
            || (opened.attributes.subresource == "log" && follows())
    }

    /// Its pieces of one channel.
    pub(crate) fn channel(&self, channel: Channel) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().filter(move |piece| piece.channel == channel)
    }
}

/// What a note says; none for other kinds.
fn note(kind: &Kind) -> Option<String> {
    match kind {
        // The bytes are there, only not decoded.
        Kind::Gap { reason, events: None, bytes: Some(0) } => Some(reason.clone()),
        Kind::ChannelChanged { channel, connection, change } => {
            let change = match change {
                Change::Opened => "is opened",
                Change::Ended => "ends",
                Change::Reset => "is broken off",
            };
            Some(format!("{} {change}", channel_name(*channel, *connection)))
        }
        Kind::FileCopied(file) => Some(wording::copied(file)),
        Kind::ConnectionForwarded(forwarded) => Some(wording::forwarded(forwarded)),
        Kind::ObjectsNamed(named) => Some(wording::named(named)),
        Kind::Gap { reason, events, bytes } => {
            let number = |number: &Option<u64>, noun| number.map(|n| crate::moment::counted(n, noun));
            let missing: Vec<String> =
                [number(events, "event"), number(bytes, "byte")].into_iter().flatten().collect();
            let missing = if missing.is_empty() { "an unknown amount".into() } else { missing.join(", ") };
            Some(format!("gap in the record: {missing} missing: {reason}"))
        }
        Kind::Finding { name, message, .. } => Some(format!("finding {name}: {message}")),
        Kind::ConnectionRefused { reason, .. } => Some(format!("connection refused: {reason}")),
        Kind::RoleAssumed(role) => {
            Some(format!("role assumed: {} with access key {}", role.assumed_role_arn, role.access_key_id))
        }
        _ => None,
    }
}

/// How a request ended, in words.
pub(crate) fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Complete => "complete",
        Outcome::ClientAborted => "the client went away",
        Outcome::UpstreamFailed => "the API server failed or closed in the middle",
        Outcome::Refused => "refused by weir",
        Outcome::Drained => "cut by the agent's drain limit",
    }
}

/// One thing to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// An invocation (index) begins.
    Process(usize),
    /// A request (index) arrives, with its body.
    Opened(usize),
    /// A request that is no stream is over: status, body.
    Answered(usize),
    /// A stream's status arrived.
    StreamStarted(usize),
    /// A piece (second index) of a stream.
    Piece(usize, usize),
    /// A stream is over.
    StreamEnded(usize),
    /// Nothing says how this request ended.
    Unfinished(usize),
    /// A note (second index) of a request.
    RequestNote(usize, usize),
    /// A note of the session.
    Note(usize),
}

/// In which order steps are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Process by process, request by request.
    Grouped,
    /// As it happened, with what overlapped interleaved.
    Chronological,
}

impl Story {
    /// What to show, with its time.
    pub(crate) fn steps(&self, order: Order) -> Vec<(i64, Step)> {
        // (invocation, request) sort a grouped story; notes of the session come last.
        let mut steps: Vec<((usize, usize), i64, Step)> = Vec::new();
        let wanted = |request: &&Request| self.focus.as_ref().is_none_or(|focus| *focus == request.id);
        let focused = self.focus.is_some().then(|| self.requests.iter().find(wanted)).flatten();
        for (index, invocation) in self.invocations.iter().enumerate() {
            if self.focus.is_none() || focused.is_some_and(|request| request.invocation == index) {
                steps.push(((index, 0), invocation.first_us, Step::Process(index)));
            }
        }
        for (index, request) in self.requests.iter().enumerate().filter(|(_, request)| wanted(request)) {
            let key = (request.invocation, index + 1);
            steps
                .extend(request.steps(index, self.last_us).into_iter().map(|(time, step)| (key, time, step)));
        }
        for (index, note) in self.notes.iter().enumerate().filter(|_| self.focus.is_none()) {
            steps.push(((usize::MAX, index), note.time_us, Step::Note(index)));
        }
        match order {
            Order::Grouped => steps.sort_by_key(|(key, ..)| *key),
            Order::Chronological => steps.sort_by_key(|(_, time, _)| *time),
        }
        steps.into_iter().map(|(_, time, step)| (time, step)).collect()
    }
}

impl Request {
    fn steps(&self, index: usize, last_us: i64) -> Vec<(i64, Step)> {
        let mut steps = vec![(self.first_us, Step::Opened(index))];
        let stream = self.is_stream();
        if stream {
            steps.extend(self.response.as_ref().map(|(time, ..)| (*time, Step::StreamStarted(index))));
            let shown =
                self.pieces.iter().enumerate().filter(|(_, piece)| piece.channel != Channel::RequestBody);
            steps.extend(shown.map(|(number, piece)| (piece.time_us, Step::Piece(index, number))));
        }
        let notes = self.notes.iter().enumerate();
        steps.extend(notes.map(|(number, note)| (note.time_us, Step::RequestNote(index, number))));
        let end = match (&self.closed, &self.refused) {
            (Some((time, _)), _) if stream => (*time, Step::StreamEnded(index)),
            (Some((time, _)), _) | (None, Some((time, ..))) => (*time, Step::Answered(index)),
            (None, None) => (last_us, Step::Unfinished(index)),
        };
        steps.sort_by_key(|(time, _)| *time);
        steps.push(end);
        steps
    }
}
