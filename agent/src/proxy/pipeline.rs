//! The way of one request: parse, check, hold, record, forward, stream the answer back.
//!
//! The order is the promise: a mutation or stream is durable before a byte of it goes up, and what cannot be
//! recorded is not forwarded. Refused requests are recorded like the others.

use std::{convert::Infallible, sync::Arc};

use http::{
    HeaderValue, Request, Response, StatusCode, header,
    request::Parts,
    uri::{Authority, PathAndQuery},
};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use weir_common::{
    attributes::Attributes,
    event::{Identity, Outcome},
};

use super::{
    body::{self, Held, ResponseBody, Tapped},
    headers::{self, Forwarded},
    measures::Verdict,
    pool::Lease,
    quota::HeldBytes,
    server::Connection,
    status::Refusal,
    traced, upgrade,
    upstream::{Outgoing, UpstreamError},
};
use crate::{
    auth::{Asked, Credential, Decision, Onward, Policy, Question},
    recording::{RecordingError, RequestHead, RequestRecord, Unmasked},
    streams::Framing,
    traces::{Stage, Trace},
};

/// Answers one request, whatever happens with it.
pub(super) async fn answer(
    connection: Arc<Connection>,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let client_upgrade = hyper::upgrade::on(&mut request);
    let (head, body) = request.into_parts();
    let attributes = Attributes::parse(head.method.as_str(), head.uri.path(), head.uri.query());

    let mut trace = traced::request(&connection, &head, &attributes);
    let request_room = body::request_room(connection.place.quota(), &head);
    let mut checked = match &request_room {
        Some(_) => check(&connection, &head, &attributes, body, &mut trace).await,
        None => Checked::refused(Refusal::TooManyBodies),
    };
    checked.held.request_room = request_room;
    let Checked { held, identity, outcome } = checked;
    traced::identified(&mut trace, identity.as_ref());
    trace.enter(Stage::Record);
    let recorded = record(&connection, &head, &attributes, &held, identity.as_ref()).await;
    let record = match recorded {
        Ok(record) => Arc::new(record),
        Err(refusal) => {
            connection.cluster().measures.request(refusal.verdict());
            traced::decided(&mut trace, refusal.verdict());
            return Ok(refusal.response(None));
        }
    };
    traced::recorded(&mut trace, &record);
    let outcome = outcome.and_then(|way| match record.unread() {
        Some(cause) => Err(Refusal::Unreadable { cause }),
        None => Ok(way),
    });
    let mut guard = CutGuard { connection: &connection, record: &record, armed: true };
    let forwarded = match outcome {
        Ok(way) => {
            let trace = &mut trace;
            forward(&connection, head, &attributes, (held, way), (&record, trace), client_upgrade).await
        }
        Err(refusal) => Err(refusal),
    };
    guard.armed = false;
    let verdict = forwarded.as_ref().map_or_else(Refusal::verdict, |_| Verdict::Forwarded);
    connection.cluster().measures.request(verdict);
    traced::decided(&mut trace, verdict);
    Ok(match forwarded {
        Ok(response) => response,
        Err(refusal) => refuse(&refusal, &record).await,
    })
}

/// Says in the record that it was the drain limit, should that end the wait for an answer. Disarmed
/// once there is an answer.
struct CutGuard<'a> {
    connection: &'a Connection,
    record: &'a RequestRecord,
    armed: bool,
}

impl Drop for CutGuard<'_> {
    fn drop(&mut self) {
        if self.armed && self.connection.shared.cut.is_cancelled() {
            self.record.close(Outcome::Drained, Some("the agent reached its drain limit"));
        }
    }
}

/// Leaves a trace of a request whose client goes away before its body is whole: hyper then drops the request's
/// task, which has no record yet.
struct ArrivalGuard<'a> {
    connection: &'a Connection,
    head: &'a Parts,
    armed: bool,
}

impl Drop for ArrivalGuard<'_> {
    fn drop(&mut self) {
        if self.armed {
            let reason =
                format!("{} {} ended in the middle of its body", self.head.method, self.head.uri.path());
            let Connection { shared, cluster_index, origin, .. } = self.connection;
            shared.recorder.connection_refused(Some(*cluster_index), Some(origin.caller()), &reason);
        }
    }
}

/// What is known of a request before it is recorded.
struct Checked {
    held: Held,
    /// Who it is for.
    identity: Option<Identity>,
    /// Where it goes, and how.
    outcome: Result<Way, Refusal>,
}

/// How a request that is let through goes on.
struct Way {
    authority: Authority,
    onward: Onward,
    /// What decided of it also gives its credential, whatever has been configured meanwhile.
    policy: Arc<Policy>,
}

impl Checked {
    fn refused(refusal: Refusal) -> Self {
        Self { held: Held::default(), identity: None, outcome: Err(refusal) }
    }
}

/// Holds the body, checks the head, and finds out who asks. A refused request keeps its body for the record, unless its
/// target is in doubt already: then nobody should send it.
async fn check(
    connection: &Connection,
    head: &Parts,
    attributes: &Attributes,
    body: Incoming,
    trace: &mut Trace,
) -> Checked {
    let cluster = connection.cluster();
    let authority = match headers::check_target(head, &cluster.names, connection.original_destination) {
        Ok(authority) => authority,
        Err(refusal) => return Checked::refused(refusal),
    };
    let limits = &connection.shared.limits;
    let mut guard = ArrivalGuard { connection, head, armed: true };
    let held = body::hold(body, connection.place.quota(), limits.body_bytes_max, limits.body_timeout).await;
    let held = match held {
        Ok(held) => held,
        Err(refusal) => {
            guard.armed = false;
            return Checked::refused(refusal);
        }
    };
    // Servers hand over the connection with what they have not read of a body, which would be the first bytes of the stream.
    if !held.bytes.is_empty() && headers::upgrade_protocol(head).is_some() {
        guard.armed = false;
        let outcome = Err(Refusal::Unsupported { what: "an upgrade with a body" });
        return Checked { held, identity: None, outcome };
    }
    let question = Question { method: head.method.as_str(), path: head.uri.path(), attributes };
    let asked = Asked {
        headers: &head.headers,
        question,
        origin: &connection.origin,
        certificate: connection.certificate.as_ref(),
    };
    let policy = cluster.policy.load_full();
    trace.enter(Stage::Authenticate);
    let Decision { identity, onward } = policy.decide(&asked).await;
    guard.armed = false;
    if let Err(refused) = &onward
        && let Some(name) = refused.finding()
    {
        connection.finding(name, &refused.to_string());
    }
    let outcome = onward.map(|onward| Way { authority, onward, policy }).map_err(Refusal::Identity);
    Checked { held, identity, outcome }
}

async fn record(
    connection: &Connection,
    head: &Parts,
    attributes: &Attributes,
    held: &Held,
    identity: Option<&Identity>,
) -> Result<RequestRecord, Refusal> {
    let upgrade = headers::upgrade_protocol(head);
    let request_head = RequestHead {
        method: &head.method,
        uri: &head.uri,
        version: head.version,
        headers: &head.headers,
        attributes,
        upgrade,
        identity,
    };
    let body = (!held.bytes.is_empty()).then(|| Unmasked(held.bytes.clone()));
    connection
        .shared
        .recorder
        .open(connection.origin.caller(), connection.cluster_index, request_head, body)
        .await
        .map_err(|error| match error.is_of_pod() {
            true => Refusal::OverQuota { cause: error.for_client() },
            false => Refusal::NotRecorded { cause: error.for_client() },
        })
}

async fn forward(
    connection: &Connection,
    head: Parts,
    attributes: &Attributes,
    (mut held, Way { authority, onward, policy }): (Held, Way),
    (record, trace): (&Arc<RequestRecord>, &mut Trace),
    client_upgrade: OnUpgrade,
) -> Result<Response<ResponseBody>, Refusal> {
    let asks_upgrade = headers::upgrade_protocol(&head).is_some();
    let streaming = attributes.is_long_running(head.uri.query());
    let pod = connection.origin.caller().pod.as_ref();
    trace.enter(Stage::AssumeRole);
    let credential = policy.credential(onward, pod, record.session()).await.map_err(Refusal::Identity)?;
    let mut outgoing = outgoing(connection, head, &mut held, authority, record.id(), asks_upgrade);
    trace.enter(Stage::Forward);
    let mut answer = send(connection, &credential, &mut outgoing, asks_upgrade, record).await?;
    // It was not acted on (RFC 9110 §15.5.2), so it may be sent once more, a mutation too: its body is held whole. What a
    // pod or a kubelet answers by way of the API server says nothing of the credential.
    if answer.0.status() == StatusCode::UNAUTHORIZED
        && !attributes.is_connect()
        && let Some(renewed) = policy.renewed(&credential).await.map_err(Refusal::Identity)?
    {
        drop(answer);
        answer = send(connection, &renewed, &mut outgoing, asks_upgrade, record).await?;
    }
    drop(outgoing);
    let (response, lease) = answer;
    let request_room = held.forwarded();
    trace.enter(Stage::Respond);
    traced::answered(trace, response.status());
    respond(connection, response, (lease, request_room), streaming, (record, trace), client_upgrade).await
}

/// Sends a request with a credential, on a connection that is meant for it.
async fn send(
    connection: &Connection,
    credential: &Credential,
    outgoing: &mut Outgoing,
    asks_upgrade: bool,
    record: &RequestRecord,
) -> Result<(Response<Incoming>, Lease), Refusal> {
    if let Some(assumed) = credential.assumed() {
        record.role_assumed(assumed.clone());
    }
    credential.apply(&mut outgoing.headers);
    let cluster = connection.cluster();
    let own = credential.own_connection().then_some(&cluster.own).and_then(Option::as_ref);
    let (pool, private) = match own {
        Some(own) => (own, &connection.own_private),
        None => (&cluster.pool, &connection.private),
    };
    let sent = if asks_upgrade {
        pool.send_upgrade(connection.original_destination, outgoing).await
    } else {
        pool.send(connection.original_destination, private, outgoing).await
    };
    sent.map_err(|error| upstream_refusal(connection, error))
}

fn outgoing(
    connection: &Connection,
    head: Parts,
    held: &mut Held,
    authority: Authority,
    id: &str,
    upgrade: bool,
) -> Outgoing {
    let body = std::mem::take(&mut held.bytes);
    let mut headers = head.headers;
    // The id is hex digits and dashes.
    let audit_id = HeaderValue::from_str(id).unwrap_or_else(|_| HeaderValue::from_static("invalid"));
    let pod_ip = connection.pod_ip.as_ref();
    headers::prepare_request(&mut headers, Forwarded { audit_id, pod_ip, body_bytes: body.len(), upgrade });
    let target = head.uri.into_parts().path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
    Outgoing { method: head.method, target, authority, headers, body }
}

/// Turns the API server's answer into the client's.
async fn respond(
    connection: &Connection,
    mut response: Response<Incoming>,
    (lease, request_room): (Lease, Option<HeldBytes>),
    streaming: bool,
    (record, trace): (&Arc<RequestRecord>, &mut Trace),
    client_upgrade: OnUpgrade,
) -> Result<Response<ResponseBody>, Refusal> {
    let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    headers::prepare_response(response.headers_mut(), upgraded);
    // The version is the connection's own, on each side.
    *response.version_mut() = http::Version::default();
    record.response_started(response.status(), response.headers(), streaming || upgraded);
    if !upgraded {
        let cut = connection.shared.cut.clone();
        let (head, inner) = response.into_parts();
        let mut tapped = Tapped::new(inner, Arc::clone(record), lease, cut, request_room);
        if let Some(committed) = tapped.ends_with_head() {
            let cause = |error: RecordingError| Refusal::AnswerNotRecorded { cause: error.for_client() };
            committed.await.map_err(cause)?;
        }
        tapped.trace(traced::forwarded(trace));
        return Ok(Response::from_parts(head, ResponseBody::Tapped(tapped)));
    }
    let protocol = response.headers().get(header::UPGRADE).and_then(|protocol| protocol.to_str().ok());
    let framing = protocol.and_then(Framing::of);
    let server_upgrade = hyper::upgrade::on(&mut response);
    let (shared, record, trace) = (&connection.shared, Arc::clone(record), traced::forwarded(trace));
    let (cut, place) = (shared.cut.clone(), Arc::clone(&connection.place));
    shared.tasks.spawn(async move {
        upgrade::run(client_upgrade, server_upgrade, framing, record, cut).await;
        drop((lease, request_room, place, trace));
    });
    Ok(response.map(|_| ResponseBody::Whole(None)))
}

fn upstream_refusal(connection: &Connection, error: UpstreamError) -> Refusal {
    let cluster = connection.cluster().name.clone();
    let cause = error.to_string();
    match error {
        UpstreamError::Http(_) => Refusal::UpstreamFailed { cluster, cause },
        _ => Refusal::Unreachable { cluster, cause },
    }
}

/// Answers with a refusal when it is recorded, as durably as the rules want it.
async fn refuse(refusal: &Refusal, record: &RequestRecord) -> Response<ResponseBody> {
    let message = refusal.to_string();
    let outcome = match refusal {
        // That the answer was whole is said already, or lost.
        Refusal::AnswerNotRecorded { .. } => return refusal.response(Some(record.id())),
        Refusal::BodyAborted => Outcome::ClientAborted,
        Refusal::UpstreamFailed { .. } | Refusal::Unreachable { .. } => Outcome::UpstreamFailed,
        _ => Outcome::Refused,
    };
    if !matches!(refusal, Refusal::BodyAborted) {
        record.refused(refusal.status(), &message);
    }
    if let Some(committed) = record.close_durably(outcome, Some(&message)) {
        // It is refused either way.
        let _ = committed.await;
    }
    refusal.response(Some(record.id()))
}
