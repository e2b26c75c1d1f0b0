//! What was said before an event: an event of a request names its session and process only by their ids.
//!
//! A reader may come late (`--since`, a group that goes on, a partition whose beginning was removed), so everything here may be missing, and
//! the projections say so. Everything is bounded: what was not used the longest is forgotten first.

use weir_common::event::{
    Caller, Channel, Container, Event, FileCopied, Kind, Process, RequestOpened, RoleAssumed,
};

use super::{
    body::{Body, Missing},
    kept::Kept,
};

/// Most sessions, processes and open requests that are remembered.
const SESSIONS_MAX: usize = 10_000;
const INVOCATIONS_MAX: usize = 20_000;
const REQUESTS_MAX: usize = 10_000;

/// Most bytes of bodies of open requests.
const BODIES_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Most files of one request that are remembered; the others are counted.
const FILES_MAX: usize = 32;

/// What is remembered.
#[derive(Debug)]
pub(super) struct Context {
    sessions: Kept<Session>,
    invocations: Kept<Invocation>,
    requests: Kept<Request>,
    /// Whether bodies are put together.
    with_bodies: bool,
    held_bytes: usize,
}

/// A session.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) caller: Caller,
    /// The AWS role that its requests go on in.
    pub(super) role: Option<RoleAssumed>,
}

/// A process that makes requests.
#[derive(Debug)]
pub(super) struct Invocation {
    pub(super) process: Process,
    pub(super) container: Option<Container>,
}

/// A request that is not over.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) opened_us: i64,
    pub(super) opened: RequestOpened,
    /// Status and reason with which Weir has refused it.
    pub(super) refused: Option<(u16, String)>,
    /// Files that went through it, and how many more did.
    pub(super) files: Vec<FileCopied>,
    pub(super) files_more: u64,
    /// Connections that were forwarded through it.
    pub(super) connections: u64,
    /// The last reason why something of it is missing in the record, and how often that was.
    pub(super) gap: Option<String>,
    pub(super) gaps: u64,
    pub(super) request_body: Body,
    pub(super) response_body: Body,
}

impl Request {
    fn new(opened_us: i64, opened: RequestOpened) -> Self {
        Self {
            opened_us,
            opened,
            refused: None,
            files: Vec::new(),
            files_more: 0,
            connections: 0,
            gap: None,
            gaps: 0,
            request_body: Body::default(),
            response_body: Body::default(),
        }
    }

    /// Whether its answer is expected to last, as the API server sees it.
    pub(super) fn is_long_running(&self) -> bool {
        let query = self.opened.uri.split_once('?').map(|(_, query)| query);
        self.opened.attributes.is_long_running(query)
    }

    /// The value of a header that is there once or more: the first.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers(name).next()
    }

    /// All values of a header.
    pub(super) fn headers(&self, name: &str) -> impl Iterator<Item = &str> {
        let headers = self.opened.headers.iter();
        headers.filter(move |header| header.name == name).map(|header| header.value.as_str())
    }

    fn held_bytes(&self) -> usize {
        self.request_body.held_bytes() + self.response_body.held_bytes()
    }
}

/// An event with what was said before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scene<'a> {
    pub(super) event: &'a Event,
    pub(super) session: Option<&'a Session>,
    pub(super) invocation: Option<&'a Invocation>,
    pub(super) request: Option<&'a Request>,
}

impl<'a> Scene<'a> {
    /// Who is behind it, as far as known.
    pub(super) fn caller(&self) -> Option<&'a Caller> {
        match &self.event.kind {
            Kind::SessionStarted { caller }
            | Kind::ConnectionRefused { caller: Some(caller), .. }
            | Kind::Finding { caller: Some(caller), .. } => Some(caller),
            _ => self.session.map(|session| &session.caller),
        }
    }

    /// The process that asks: that of the invocation, else the one that opened the session.
    pub(super) fn process(&self) -> Option<&'a Process> {
        let invocation = self.invocation.map(|invocation| &invocation.process);
        invocation.or_else(|| self.caller().and_then(|caller| caller.process.as_ref()))
    }

    /// The container of that process.
    pub(super) fn container(&self) -> Option<&'a Container> {
        match self.invocation {
            Some(invocation) => invocation.container.as_ref(),
            None => self.caller().and_then(|caller| caller.container.as_ref()),
        }
    }

    /// What ought to be known of a request's event and is not.
    pub(super) fn missing(&self) -> Vec<&'static str> {
        let named = [
            ("session", !self.event.session.is_empty() && self.session.is_none()),
            ("invocation", self.event.invocation.is_some() && self.invocation.is_none()),
            ("request", self.event.request.is_some() && self.request.is_none()),
        ];
        named.into_iter().filter_map(|(name, missing)| missing.then_some(name)).collect()
    }
}

impl Context {
    pub(super) fn new(with_bodies: bool) -> Self {
        Self {
            sessions: Kept::new(SESSIONS_MAX),
            invocations: Kept::new(INVOCATIONS_MAX),
            requests: Kept::new(REQUESTS_MAX),
            with_bodies,
            held_bytes: 0,
        }
    }

    /// Remembers what an event says of those that follow.
    pub(super) fn learn(&mut self, event: &Event) {
        match &event.kind {
            Kind::SessionStarted { caller } => {
                self.sessions.put(&event.session, Session { caller: (**caller).clone(), role: None });
            }
            Kind::InvocationStarted { process, container } => {
                let invocation = Invocation { process: process.clone(), container: container.clone() };
                self.invocations.put(event.invocation.as_deref().unwrap_or_default(), invocation);
            }
            Kind::RoleAssumed(role) => {
                if let Some(session) = self.sessions.used(&event.session) {
                    session.role = Some((**role).clone());
                }
            }
            Kind::RequestOpened(opened) => {
                let id = event.request.as_deref().unwrap_or_default();
                self.let_go(id);
                if self.requests.put(id, Request::new(event.time_unix_us, (**opened).clone())) {
                    self.held_bytes = self.requests.values().map(Request::held_bytes).sum();
                }
            }
            _ => {}
        }
        self.sessions.used(&event.session);
        self.invocations.used(event.invocation.as_deref().unwrap_or_default());
        self.learn_of_request(event);
    }

    fn learn_of_request(&mut self, event: &Event) {
        let Some(request) = event.request.as_deref().and_then(|id| self.requests.used(id)) else { return };
        match &event.kind {
            Kind::RequestRefused { status, reason } => request.refused = Some((*status, reason.clone())),
            Kind::FileCopied(_) if request.files.len() == FILES_MAX => request.files_more += 1,
            Kind::FileCopied(file) => request.files.push((**file).clone()),
            Kind::ConnectionForwarded(_) => request.connections += 1,
            Kind::Gap { reason, .. } => {
                request.gap = Some(reason.clone());
                request.gaps += 1;
            }
            Kind::Content(content) if self.with_bodies => {
                let before = request.held_bytes();
                match content.channel {
                    Channel::RequestBody => request.request_body.add(content),
                    // What lasts is no object.
                    Channel::ResponseBody if !request.is_long_running() => request.response_body.add(content),
                    _ => {}
                }
                self.held_bytes = self.held_bytes - before + request.held_bytes();
                self.make_room();
            }
            _ => {}
        }
    }

    /// Lets go of the bodies of requests of which nothing was heard the longest: they may never end.
    fn make_room(&mut self) {
        while self.held_bytes > BODIES_BYTES_MAX {
            let Some(request) = self.requests.oldest(|request| request.held_bytes() > 0) else { return };
            self.held_bytes -= request.held_bytes();
            request.request_body.drop_for(Missing::TooLarge);
            request.response_body.drop_for(Missing::TooLarge);
        }
    }

    /// An event that was learnt from, with what was said before it.
    pub(super) fn scene<'a>(&'a self, event: &'a Event) -> Scene<'a> {
        let of = |id: &'a Option<String>| id.as_deref().unwrap_or_default();
        Scene {
            event,
            session: self.sessions.get(&event.session),
            invocation: self.invocations.get(of(&event.invocation)),
            request: self.requests.get(of(&event.request)),
        }
    }

    /// Lets go of what an event was the last of.
    pub(super) fn forget(&mut self, event: &Event) {
        if let (Kind::RequestClosed(_), Some(id)) = (&event.kind, &event.request) {
            self.let_go(id);
        }
    }

    fn let_go(&mut self, request: &str) {
        let held_bytes = self.requests.remove(request).map_or(0, |request| request.held_bytes());
        self.held_bytes -= held_bytes;
    }
}

#[cfg(test)]
mod tests {
    use weir_common::event::{Bytes, Channel, Content, Event, Kind};

    use super::{BODIES_BYTES_MAX, Context};
    use crate::{
        fixture::request,
        projection::{body::BODY_BYTES_MAX, sample::event},
    };

    fn of(request: &str, kind: Kind) -> Event {
        Event { request: Some(request.to_owned()), ..event(0, kind) }
    }

    #[test]
    fn bodies_of_requests_that_never_end_take_bounded_room_from_others() {
        let mut context = Context::new(true);
        let piece = "x".repeat(BODY_BYTES_MAX);
        let requests = BODIES_BYTES_MAX / BODY_BYTES_MAX + 2;
        for number in 0..requests {
            let id = number.to_string();
            let opened = request("POST", "create", "/api/v1/namespaces/web/pods", "web");
            context.learn(&of(&id, Kind::RequestOpened(Box::new(opened))));
            let bytes = Bytes::Text(piece.clone());
            let content = Content { channel: Channel::RequestBody, connection: None, offset: 0, bytes };
            context.learn(&of(&id, Kind::Content(content)));
            assert!(context.held_bytes <= BODIES_BYTES_MAX);
        }
        let held: Vec<usize> =
            (0..requests).map(|id| context.requests.get(&id.to_string()).unwrap().held_bytes()).collect();
        assert_eq!(held[..2], [0, 0], "the oldest went");
        assert!(held[2..].iter().all(|bytes| *bytes == BODY_BYTES_MAX));
    }
}
