//! How a request's record begins: admission, session and invocation, the masked body, the first commit.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{
    HeaderMap, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
};
use weir_common::{
    attributes::{Attributes, Execution},
    event::{BodySummary, Caller, Channel, IdentityMethod, Kind, RequestOpened},
};

use super::{
    Recorder, RecordingError, RequestHead, RequestRecord, Unmasked,
    admission::{COMMIT_WAIT_MAX, Reduced},
    body::Sensitivity,
    content::{self, Held, Kept},
    entry::{Append, Entry, Ids},
    masking::Masking,
    plan::{Bodies, Plan, WhenBehind},
    request::Level,
    session::{self, Belonging},
    share::{Budget, Share},
    split,
    upgraded::Asked,
    worker::Context,
};

/// Most bytes of a mutating request's body that are recorded: above the API server's own limit of 3 MiB.
const REQUEST_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most bytes of the response to a mutation that are recorded.
const MUTATION_RESPONSE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most bytes of an error's body that are recorded where a success would be recorded otherwise.
pub(super) const ERROR_BYTES_MAX: usize = 64 * 1024;

/// How long whoever waits tries again to begin: each time its body is masked anew.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// How a request begins.
struct Begin<'a> {
    plan: Plan,
    share: &'a Arc<Share>,
    /// Why its bodies are left out, if they are.
    reduced: Option<Reduced>,
}

impl Recorder {
    /// Records that a request arrived (with its session and invocation, if they are new) and returns its record: when the
    /// rules say that somebody waits for it, durable.
    ///
    /// # Errors
    /// The journal cannot accept, or the pod is over its quota: the request must be refused.
    pub async fn open(
        &self,
        caller: &Arc<Caller>,
        cluster: usize,
        head: RequestHead<'_>,
        body: Option<Unmasked>,
    ) -> Result<RequestRecord, RecordingError> {
        let plan = self.plan(&head);
        let share = self.inner.shares.of(caller, Instant::now());
        let deadline = Instant::now() + self.inner.rules.load().backlog.wait;
        let is_stream = head.upgrade.is_some();
        let mut without_key = None;
        loop {
            let reduced = match without_key.take() {
                Some(why) => Some(why),
                None => self.admit(&share, plan, is_stream, deadline).await?,
            };
            let is_reduced = reduced.is_some();
            let begin = Begin { plan, share: &share, reduced };
            let body = body.as_ref().map(|body| body.0.clone()).unwrap_or_default();
            let error = match self.begin(caller, cluster, head, body, begin).await {
                Err(error) if error.may_pass() => error,
                begun => return begun,
            };
            // Without a key there is no content, but all else can be recorded; of a stream it is the content that counts.
            let spares =
                plan.when_behind == WhenBehind::MetadataOnly && !is_stream || self.inner.emergency.is_on();
            if spares && !is_reduced && matches!(error, RecordingError::NoKey(_)) {
                without_key = Some(error);
            } else if plan.when_behind == WhenBehind::Block && Instant::now() + RETRY_INTERVAL < deadline {
                tokio::time::sleep(RETRY_INTERVAL).await;
            } else {
                return Err(error);
            }
        }
    }

    async fn begin(
        &self,
        caller: &Arc<Caller>,
        cluster: usize,
        head: RequestHead<'_>,
        body: Bytes,
        Begin { plan, share, reduced }: Begin<'_>,
    ) -> Result<RequestRecord, RecordingError> {
        if !self.inner.emergency.is_on() {
            // Before anything is queued of it: what is under way is bounded, what comes and goes is not.
            let room = tokio::time::timeout(COMMIT_WAIT_MAX, self.inner.queue.room(share));
            room.await.unwrap_or(Err(RecordingError::TooSlow))?;
        }
        let belonging = self.belonging(caller, cluster, &head, share)?;
        let mut context = self.context(cluster, &belonging, &head, share);
        let without_key = matches!(reduced, Some(RecordingError::NoKey(_)));
        let behind = reduced.map(|why| format!("left out: {}", why.for_client()));
        let by_rule = |why: fn(Bodies) -> Option<&'static str>| plan.level.and_then(why).map(str::to_owned);
        let left_out = behind.clone().or_else(|| by_rule(Bodies::without_request));
        let gap = behind.as_ref().map(|reason| Kind::Gap {
            reason: format!("bodies of this request are {reason}"),
            events: None,
            bytes: Some(body.len() as u64).filter(|bytes| *bytes > 0),
        });
        let body = match body {
            body if body.is_empty() => None,
            body => {
                let masking = &self.inner.masking;
                Some(mask_request(masking, &context, head.headers, body, left_out.as_deref()).await?)
            }
        };
        context.unread = body.as_ref().and_then(|kept| kept.unread).filter(|_| self.must_be_read(&head));
        let opened = RequestOpened {
            method: head.method.as_str().to_owned(),
            uri: context.masker.request_uri(head.uri),
            protocol: protocol(head.version),
            headers: context.masker.headers(head.headers),
            attributes: head.attributes.clone(),
            execution: Execution::parse(head.attributes, head.uri.query()).map(|mut execution| {
                execution.command = context.masker.arguments(&execution.command);
                Box::new(execution)
            }),
            upgrade: head.upgrade.map(str::to_owned),
            identity: head.identity.cloned().map(Box::new),
            body: body.as_ref().map(|kept| {
                // Where there is no key, none for the digest either.
                let digest = kept.summary.digest.clone().filter(|_| !without_key);
                BodySummary { digest, ..kept.summary.clone() }
            }),
        };
        let mut kinds = vec![Kind::RequestOpened(Box::new(opened))];
        if let Some(Kept { content, names, .. }) = body {
            kinds.append(&mut split::split(Channel::RequestBody, 0, &content));
            kinds.append(&mut names.kinds(Channel::RequestBody));
        }
        kinds.extend(gap);
        let entries = self.first_entries(&context, kinds)?;
        let level = self.level(&head, plan);
        let left_out = behind.or_else(|| by_rule(Bodies::without_answer));
        let watch = head.attributes.verb == "watch";
        let status = Arc::clone(&self.inner.status);
        let record = RequestRecord::new(context, status, plan, (level, left_out), watch);
        let record = if head.upgrade.is_some() { record.asking(Asked::of(&head)) } else { record };
        if self.inner.emergency.is_on() {
            self.inner.emergency.count();
        }
        // The record exists before the wait: should the client go away meanwhile, it closes itself.
        match record.append_first(entries).await {
            Ok(()) => Ok(record),
            Err(error) => {
                match error {
                    // It may still become durable: then it says what became of it.
                    RecordingError::TooSlow => {
                        record.refused(StatusCode::SERVICE_UNAVAILABLE, error.for_client());
                    }
                    _ => record.disarm(),
                }
                Err(error)
            }
        }
    }

    /// Not [`Context::entry`]: a request whose record does not fit is refused, not recorded as a gap.
    fn first_entries(&self, context: &Context, kinds: Vec<Kind>) -> Result<Vec<Entry>, RecordingError> {
        let (cluster, ids) = (Some(context.cluster), context.ids());
        kinds.into_iter().map(|kind| self.inner.origin.entry(cluster, ids, kind)).collect()
    }

    /// Finds the request's session and invocation; queues their beginnings, if they are new, under the table's lock, so
    /// that no other request of theirs can come before.
    fn belonging(
        &self,
        caller: &Arc<Caller>,
        cluster: usize,
        head: &RequestHead<'_>,
        share: &Arc<Share>,
    ) -> Result<Belonging, RecordingError> {
        let inner = &self.inner;
        let verified = head.identity.filter(|identity| identity.method != IdentityMethod::Unverified);
        let user = verified.map(|identity| identity.user.username.clone());
        let claimed = || caller.claimed_user.clone().or_else(|| session::claimed_user(head.headers));
        let claimed_user = if user.is_none() { claimed() } else { None };
        let caller = Caller { claimed_user, user, ..Caller::clone(caller) };
        let mut table = inner.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let losses = inner.status.losses();
        if table.losses != losses {
            table.losses = losses;
            table.sessions.forget();
        }
        let belonging = table.sessions.belonging(&caller, cluster, Instant::now());
        let masker = self.masker(Some(cluster));
        let mut entries = Vec::new();
        if belonging.session_is_new {
            let ids = Ids { session: belonging.session.id(), ..Ids::default() };
            let kind = Kind::SessionStarted { caller: Box::new(masker.caller(&caller)) };
            entries.push(inner.origin.entry(Some(cluster), ids, kind)?);
        }
        if let (true, Some(process)) = (belonging.invocation_is_new, &caller.process) {
            let ids = Ids {
                session: belonging.session.id(),
                invocation: belonging.invocation.as_deref(),
                ..Ids::default()
            };
            let process = masker.process(process);
            let kind = Kind::InvocationStarted { process, container: caller.container.clone() };
            entries.push(inner.origin.entry(Some(cluster), ids, kind)?);
        }
        if !entries.is_empty() {
            let append = Append::behind(entries).of(share);
            if inner.emergency.is_on() {
                inner.queue.push_or_drop(append);
            } else {
                inner.queue.push_small(append);
            }
        }
        Ok(belonging)
    }

    fn context(
        &self,
        cluster: usize,
        belonging: &Belonging,
        head: &RequestHead<'_>,
        share: &Arc<Share>,
    ) -> Context {
        let inner = &self.inner;
        let attributes = head.attributes;
        // Through the proxy to an API server, bodies are those of what is asked for there.
        let uri = head.uri;
        let behind = Attributes::behind_proxy(head.method.as_str(), uri.path(), uri.query());
        let meant = behind.as_ref().unwrap_or(attributes);
        Context {
            origin: Arc::clone(&inner.origin),
            queue: Arc::clone(&inner.queue),
            emergency: Arc::clone(&inner.emergency),
            share: Arc::clone(share),
            workers: Arc::clone(&inner.workers),
            worker: inner.workers.assign(),
            masker: self.masker(Some(cluster)).of(meant),
            sensitivity: Sensitivity::of(meant),
            names_text: attributes.is_resource() && attributes.name.is_empty(),
            cluster,
            session: Arc::clone(&belonging.session),
            invocation: belonging.invocation.clone(),
            request: session::new_id(),
            unread: None,
            streamed: Mutex::new(None),
            waiting: Budget::default(),
            lost: AtomicU64::new(0),
        }
    }

    /// Whether the body of such a request must be on record: the API server reads it and acts on it. What it passes on to a workload
    /// may be in any form.
    fn must_be_read(&self, head: &RequestHead<'_>) -> bool {
        let attributes = head.attributes;
        attributes.is_mutating(head.method.as_str())
            && !attributes.is_connect()
            && !self.inner.emergency.is_on()
    }

    fn level(&self, head: &RequestHead<'_>, plan: Plan) -> Level {
        let attributes = head.attributes;
        let response_bytes_max = plan.response_bytes_max.unwrap_or(self.inner.response_bytes_max);
        if head.upgrade.is_some() || attributes.is_mutating(head.method.as_str()) {
            return Level::Bounded(response_bytes_max.max(MUTATION_RESPONSE_BYTES_MAX));
        }
        match (attributes.resource.as_str(), attributes.subresource.as_str()) {
            ("", _) if plan.level.is_none() => Level::Metadata,
            ("pods", "log") => Level::Streamed,
            _ => Level::Bounded(response_bytes_max),
        }
    }
}

impl RequestRecord {
    /// Why nothing of the request's body is on record, where that is since it could not be read: such a request, which would change
    /// something, must not be forwarded.
    pub fn unread(&self) -> Option<&'static str> {
        self.context.unread
    }
}

/// Decodes and masks the body of a request; of one that is left out only length and digest are kept.
async fn mask_request(
    masking: &Masking,
    context: &Context,
    headers: &HeaderMap,
    body: Bytes,
    left_out: Option<&str>,
) -> Result<Kept, RecordingError> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let mut held = Held {
        wire_bytes: body.len() as u64,
        cut: None,
        content_type: text(CONTENT_TYPE),
        content_encoding: text(CONTENT_ENCODING),
        bytes_max: REQUEST_BYTES_MAX,
        names_text: context.names_text,
        chunks: vec![body],
    };
    if let Some(reason) = left_out {
        let mut digest = context.masker.digest();
        held.chunks.iter().for_each(|chunk| digest.update(chunk));
        held.cut = Some((reason.to_owned(), Some(digest.finish())));
        held.chunks = Vec::new();
        held.content_encoding = None;
    }
    if held.is_small() {
        return Ok(content::reduce(&context.masker, context.sensitivity, &held));
    }
    let (masker, sensitivity) = (context.masker.clone(), context.sensitivity);
    let reduce = move || content::reduce(&masker, sensitivity, &held);
    masking.run(&context.share, COMMIT_WAIT_MAX, reduce).await
}

fn protocol(version: http::Version) -> String {
    match version {
        http::Version::HTTP_2 => "HTTP/2".to_owned(),
        http::Version::HTTP_10 => "HTTP/1.0".to_owned(),
        _ => "HTTP/1.1".to_owned(),
    }
}
