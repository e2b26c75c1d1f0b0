//! Rules on request and response heads: what is refused, what is removed, what Weir sets. Sans-IO.
//!
//! The cluster is decided by the address that the client dialled; names that the client sends are only checked
//! against it.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header, request::Parts, uri::Authority};

use super::status::Refusal;

/// Joins a request with the API server's audit log: the server takes its audit id from this header.
pub(super) const AUDIT_ID: HeaderName = HeaderName::from_static("audit-id");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// With which the API server would believe a front proxy; a client must not be able to speak as one.
const REMOTE_PREFIX: &str = "x-remote-";

/// What `Connection` may say; an empty word between commas is none.
const CONNECTION_TOKENS: [&str; 6] = ["", "close", "keep-alive", "te", "upgrade", "http2-settings"];
/// Headers about one connection, not about the message (RFC 9110 §7.6.1), and `Expect`, which Weir answers itself.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
];

/// The names that a cluster's API server may be called by, in SNI and `Host`.
#[derive(Debug)]
pub(super) struct HostNames {
    names: Vec<String>,
    addresses: Vec<IpAddr>,
}

impl HostNames {
    /// Takes DNS names and IP addresses, in any case, IPv6 with or without brackets.
    pub(super) fn new(names: &[String]) -> Self {
        let (mut hosts, mut addresses) = (Vec::new(), Vec::new());
        for name in names {
            match parse_ip(name) {
                Some(address) => addresses.push(address),
                None => hosts.push(name.trim_end_matches('.').to_ascii_lowercase()),
            }
        }
        Self { names: hosts, addresses }
    }

    /// Whether `host` names the cluster to a client that dialled `dialled`.
    pub(super) fn agrees(&self, host: &str, dialled: SocketAddr) -> bool {
        match parse_ip(host) {
            Some(address) => dialled.ip().to_canonical() == address || self.addresses.contains(&address),
            None => {
                let host = host.strip_suffix('.').unwrap_or(host);
                self.names.iter().any(|name| name.eq_ignore_ascii_case(host))
            }
        }
    }
}

fn parse_ip(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    bare.parse().ok().map(|address: IpAddr| address.to_canonical())
}

/// Checks what a request says about its target and connection; returns the authority to forward.
pub(super) fn check_target(
    head: &Parts,
    names: &HostNames,
    dialled: SocketAddr,
) -> Result<Authority, Refusal> {
    if head.method == Method::CONNECT {
        return Err(Refusal::Unsupported { what: "CONNECT" });
    }
    if head.headers.contains_key("http2-settings")
        || upgrade_protocol(head).is_some_and(|protocol| protocol.eq_ignore_ascii_case("h2c"))
    {
        return Err(Refusal::Unsupported { what: "an upgrade to h2c" });
    }
    // What it names is removed on the way, and so would be in the record but not in what the API server sees.
    if connection_tokens(&head.headers)
        .any(|token| !CONNECTION_TOKENS.iter().any(|known| token.eq_ignore_ascii_case(known)))
    {
        return Err(Refusal::Unsupported { what: "a Connection header that names other headers" });
    }
    let authority = authority(head)?;
    if authority.as_str().contains('@') {
        return Err(Refusal::MalformedHost { problem: "given with user information" });
    }
    let port =
        port(&authority).ok_or(Refusal::MalformedHost { problem: "given with a port that is none" })?;
    if is_loopback(authority.host()) {
        return own_authority(dialled);
    }
    let port_agrees = port.is_none_or(|port| port == dialled.port());
    if !port_agrees || !names.agrees(authority.host(), dialled) {
        return Err(Refusal::Misdirected { host: authority.to_string() });
    }
    Ok(authority)
}

/// Whether a host is the client's own machine. No cluster's front can mean anything by it, so such a request can only be for
/// what was dialled: `kubectl proxy` before 1.22 passes on the `Host` that it was asked under itself.
fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || parse_ip(host).is_some_and(|address| address.is_loopback())
}

/// What was dialled, as an authority: what is forwarded never names another machine than that.
fn own_authority(dialled: SocketAddr) -> Result<Authority, Refusal> {
    let dialled = SocketAddr::new(dialled.ip().to_canonical(), dialled.port()).to_string();
    Authority::try_from(dialled).map_err(|_| Refusal::MalformedHost { problem: "malformed" })
}

/// The one authority of a request: `Host` and the request line's (absolute form, `:authority`) must not disagree.
fn authority(head: &Parts) -> Result<Authority, Refusal> {
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Refusal::MalformedHost { problem: "given twice" });
    }
    let host = host
        .map(|host| Authority::try_from(host.as_bytes()))
        .transpose()
        .map_err(|_| Refusal::MalformedHost { problem: "malformed" })?;
    match (head.uri.authority(), host) {
        (Some(line), Some(host)) if *line != host => {
            Err(Refusal::MalformedHost { problem: "given twice, differently" })
        }
        (Some(line), _) => Ok(line.clone()),
        (None, Some(host)) => Ok(host),
        (None, None) => Err(Refusal::MalformedHost { problem: "missing" }),
    }
}

/// The port of an authority, where it has one; none at all if anything else stands behind the host: the http crate
/// passes over it.
fn port(authority: &Authority) -> Option<Option<u16>> {
    let rest = authority.as_str().strip_prefix(authority.host())?;
    if matches!(rest, "" | ":") {
        return Some(None);
    }
    let digits = rest.strip_prefix(':').filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))?;
    digits.parse().ok().map(Some)
}

/// The protocol a request asks to upgrade to. HTTP/1.1 only: HTTP/2 has no `Upgrade`, and extended CONNECT
/// (RFC 8441) is not offered.
pub(super) fn upgrade_protocol(head: &Parts) -> Option<&str> {
    let asks = head.version == Version::HTTP_11
        && connection_tokens(&head.headers).any(|token| token.eq_ignore_ascii_case("upgrade"));
    if !asks {
        return None;
    }
    head.headers.get(header::UPGRADE)?.to_str().ok()
}

fn connection_tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// Removes what belongs to the client's connection; with `upgraded`, all but what negotiates the upgrade.
fn remove_hop_by_hop(headers: &mut HeaderMap, upgraded: bool) {
    let named: Vec<HeaderName> = connection_tokens(headers)
        .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
        .filter(|name| !HOP_BY_HOP.contains(name))
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in &HOP_BY_HOP {
        let negotiates = upgraded && (name == header::CONNECTION || name == header::UPGRADE);
        if !negotiates {
            headers.remove(name);
        }
    }
}

/// What Weir puts into a forwarded request.
pub(super) struct Forwarded<'a> {
    /// The record's id.
    pub(super) audit_id: HeaderValue,
    /// The pod's address, if the caller is a pod.
    pub(super) pod_ip: Option<&'a HeaderValue>,
    /// Length of the held body.
    pub(super) body_bytes: usize,
    /// Whether the request goes on as an upgrade.
    pub(super) upgrade: bool,
}

/// Turns a client's headers into those of the forwarded request. `Host` is left to the upstream's version of HTTP.
pub(super) fn prepare_request(headers: &mut HeaderMap, forwarded: Forwarded<'_>) {
    let had_length =
        headers.remove(header::CONTENT_LENGTH).is_some() || headers.contains_key(header::TRANSFER_ENCODING);
    remove_hop_by_hop(headers, forwarded.upgrade);
    let untrusted: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(REMOTE_PREFIX)).cloned().collect();
    for name in untrusted {
        headers.remove(name);
    }
    headers.remove(header::HOST);
    headers.remove(header::FORWARDED);
    // A compressed stream would have to be decompressed to be recorded; no API server compresses one.
    headers.remove(header::SEC_WEBSOCKET_EXTENSIONS);
    // Trailers of a request are not forwarded: the body is held whole, and the API server reads none.
    headers.remove(header::TRAILER);
    match forwarded.pod_ip {
        Some(address) => drop(headers.insert(X_FORWARDED_FOR, address.clone())),
        None => drop(headers.remove(X_FORWARDED_FOR)),
    }
    headers.insert(AUDIT_ID, forwarded.audit_id);
    if had_length || forwarded.body_bytes > 0 {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(forwarded.body_bytes));
    }
}

/// Turns the API server's headers into those that the client gets: all of them but the connection's own.
pub(super) fn prepare_response(headers: &mut HeaderMap, upgraded: bool) {
    remove_hop_by_hop(headers, upgraded);
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use http::Request;
    use proptest::prelude::*;

    use super::*;

    fn head(request: http::request::Builder) -> Parts {
        request.body(()).expect("a valid request").into_parts().0
    }

    #[track_caller]
    fn check(request: http::request::Builder, expected: Expect) {
        let names =
            HostNames::new(&["kubernetes.default.svc".into(), "API.example".into(), "10.96.0.1".into()]);
        let dialled = "[::ffff:10.0.0.5]:6443".parse().expect("an address");
        let got = match check_target(&head(request), &names, dialled) {
            Ok(authority) => format!("forward to {authority}"),
            Err(refusal) => format!("{} {refusal}", refusal.status().as_u16()),
        };
        expected.assert_eq(&got);
    }

    #[test]
    fn a_host_must_be_the_clusters_own() {
        let host = |host: &str| Request::get("/api").header("host", host);
        check(host("kubernetes.default.svc"), expect!["forward to kubernetes.default.svc"]);
        check(host("Kubernetes.default.svc.:6443"), expect!["forward to Kubernetes.default.svc.:6443"]);
        check(host("api.example"), expect!["forward to api.example"]);
        check(host("10.96.0.1"), expect!["forward to 10.96.0.1"]);
        check(host("10.0.0.5:6443"), expect!["forward to 10.0.0.5:6443"]);
        check(host("[::ffff:10.0.0.5]:6443"), expect!["forward to [::ffff:10.0.0.5]:6443"]);
        check(
            host("10.0.0.5:443"),
            expect![[
                r#"421 "10.0.0.5:443" is not a name of the cluster that this connection was made to; use the name or address in the kubeconfig, or add it to the cluster's names in weir's configuration"#
            ]],
        );
        check(
            host("evil.example"),
            expect![[
                r#"421 "evil.example" is not a name of the cluster that this connection was made to; use the name or address in the kubeconfig, or add it to the cluster's names in weir's configuration"#
            ]],
        );
        check(host("10.96.0.1:"), expect!["forward to 10.96.0.1:"]);
        check(host("10.96.0.1:&443"), expect!["400 the request's host is given with a port that is none"]);
        for odd in ["10.96.0.1:+443", "[::ffff:10.0.0.5]x:6443", "[::ffff:10.0.0.5]6443"] {
            check(host(odd), expect!["400 the request's host is given with a port that is none"]);
        }
        check(host("10.96.0.1:65536"), expect!["400 the request's host is given with a port that is none"]);
        check(host("u@api.example"), expect!["400 the request's host is given with user information"]);
        check(host(""), expect!["400 the request's host is malformed"]);
    }

    #[test]
    fn a_clients_own_machine_as_host_stands_for_what_it_dialled() {
        for host in [
            "127.0.0.1:8001",
            "localhost:8001",
            "LOCALHOST",
            "[::1]:8001",
            "127.1.2.3",
            "[::ffff:127.0.0.1]:1",
        ] {
            check(Request::get("/api").header("host", host), expect!["forward to 10.0.0.5:6443"]);
        }
        for host in ["localhost.evil.example", "127.0.0.1.evil.example", "128.0.0.1"] {
            let refusal = check_target(
                &head(Request::get("/api").header("host", host)),
                &HostNames::new(&[]),
                "10.0.0.5:6443".parse().expect("an address"),
            );
            assert!(matches!(refusal, Err(Refusal::Misdirected { .. })), "{host}");
        }
        check(
            Request::get("/api").header("host", "u@127.0.0.1:8001"),
            expect!["400 the request's host is given with user information"],
        );
    }

    #[test]
    fn the_request_line_and_host_must_not_disagree() {
        check(
            Request::get("https://evil.example/api"),
            expect![[
                r#"421 "evil.example" is not a name of the cluster that this connection was made to; use the name or address in the kubeconfig, or add it to the cluster's names in weir's configuration"#
            ]],
        );
        check(
            Request::get("https://api.example/api").header("host", "evil.example"),
            expect!["400 the request's host is given twice, differently"],
        );
        check(
            Request::get("/api").header("host", "api.example").header("host", "api.example"),
            expect!["400 the request's host is given twice"],
        );
        check(Request::get("/api"), expect!["400 the request's host is missing"]);
    }

    #[test]
    fn tunnels_and_cleartext_upgrades_are_refused() {
        check(
            Request::connect("api.example:443"),
            expect!["400 CONNECT is not supported by the recording gateway weir; use an ordinary request"],
        );
        let h2c = Request::get("/").header("host", "api.example").header("connection", "Upgrade");
        check(
            h2c.header("upgrade", "h2c"),
            expect![
                "400 an upgrade to h2c is not supported by the recording gateway weir; use an ordinary request"
            ],
        );
    }

    #[track_caller]
    fn check_prepared(request: http::request::Builder, upgrade: bool, body_bytes: usize, expected: Expect) {
        let mut headers = head(request).headers;
        let pod_ip = HeaderValue::from_static("10.244.0.7");
        let audit_id = HeaderValue::from_static("our-id");
        prepare_request(&mut headers, Forwarded { audit_id, pod_ip: Some(&pod_ip), body_bytes, upgrade });
        let mut lines: Vec<String> = headers
            .iter()
            .map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap_or("?")))
            .collect();
        lines.sort();
        expected.assert_eq(&lines.concat());
    }

    #[test]
    fn forwarded_requests_carry_only_what_the_client_may_say() {
        check_prepared(
            Request::post("/")
                .header("host", "api.example")
                .header("authorization", "Bearer t")
                .header("audit-id", "forged")
                .header("x-forwarded-for", "1.2.3.4")
                .header("X-Remote-User", "admin")
                .header("x-remote-extra-scopes", "all")
                .header("connection", "keep-alive, x-hop, audit-id")
                .header("x-hop", "1")
                .header("te", "trailers")
                .header("expect", "100-continue")
                .header("transfer-encoding", "chunked"),
            false,
            7,
            expect![[r#"
                audit-id: our-id
                authorization: Bearer t
                content-length: 7
                x-forwarded-for: 10.244.0.7
            "#]],
        );
        check_prepared(
            Request::get("/")
                .header("host", "api.example")
                .header("connection", "Upgrade")
                .header("upgrade", "SPDY/3.1")
                .header("sec-websocket-extensions", "permessage-deflate")
                .header("x-stream-protocol-version", "v4.channel.k8s.io"),
            true,
            0,
            expect![[r#"
                audit-id: our-id
                connection: Upgrade
                upgrade: SPDY/3.1
                x-forwarded-for: 10.244.0.7
                x-stream-protocol-version: v4.channel.k8s.io
            "#]],
        );
    }

    proptest! {
        #[test]
        fn any_host_gets_an_answer(host in "\\PC{0,40}", connection in "\\PC{0,20}") {
            let mut request = Request::get("/");
            for (name, value) in [("host", &host), ("connection", &connection)] {
                if let Ok(value) = HeaderValue::from_str(value) {
                    request = request.header(name, value);
                }
            }
            let head = head(request);
            let dialled = SocketAddr::from(([127, 0, 0, 1], 443));
            let _ = check_target(&head, &HostNames::new(&[]), dialled);
            let mut headers = head.headers;
            prepare_response(&mut headers, false);
            prop_assert!(!headers.contains_key(header::CONNECTION));
        }
    }
}
