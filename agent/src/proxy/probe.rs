//! What the proxy makes of request heads, for the properties in `tests/properties`.
//!
//! Only a door: nothing is decided here, and the product does not come through it.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderValue, request::Parts};

use super::headers::{Forwarded, HostNames, check_target, prepare_request, upgrade_protocol};
use crate::auth::impersonation;

/// The authority that is forwarded of a request to the cluster of these names, and the protocol that it upgrades to;
/// none if it is refused.
pub fn accepted(head: &Parts, names: &[String], dialled: SocketAddr) -> Option<(String, Option<String>)> {
    let authority = check_target(head, &HostNames::new(names), dialled).ok()?;
    if !matches!(impersonation::requested(&head.headers), Ok(None)) {
        return None;
    }
    Some((authority.to_string(), upgrade_protocol(head).map(str::to_owned)))
}

/// The headers that the API server gets of a request with a body of `body_bytes`.
pub fn forwarded(
    headers: &HeaderMap,
    audit_id: HeaderValue,
    pod_ip: Option<&HeaderValue>,
    body_bytes: usize,
    upgrade: bool,
) -> HeaderMap {
    let mut headers = headers.clone();
    prepare_request(&mut headers, Forwarded { audit_id, pod_ip, body_bytes, upgrade });
    headers
}
