//! The credential that a request presents, and how it is taken out of the request again. Sans-IO.
//!
//! Kubernetes reads a bearer token from `Authorization` and, for WebSockets of clients that cannot set headers, from a
//! subprotocol (k8s.io/apiserver `pkg/authentication/request/{bearertoken,websocket}`). A request that presents two is
//! refused: which of them counts must not depend on who reads it.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL},
};
use zeroize::Zeroizing;

use super::Refused;

/// The subprotocol that carries a token, before its base64url.
pub(crate) const WEBSOCKET_BEARER: &str = "base64url.bearer.authorization.k8s.io.";
/// What the headers of impersonation begin with.
pub(crate) const IMPERSONATE_PREFIX: &str = "impersonate-";

/// What a request presents.
pub(crate) enum Presented<'a> {
    /// No credential.
    Nothing,
    /// A bearer token.
    Token(Text<'a>),
    /// An `Authorization` of another scheme (`Basic`, `Negotiate`): nothing that Weir could verify.
    Other,
}

/// A token's text. Its `Debug` shows nothing of it.
pub(crate) enum Text<'a> {
    /// As it stands in the header.
    Header(&'a str),
    /// As it was decoded.
    Decoded(Zeroizing<String>),
}

impl Text<'_> {
    /// The token.
    pub(crate) fn expose(&self) -> &str {
        match self {
            Self::Header(text) => text,
            Self::Decoded(text) => text,
        }
    }
}

impl std::fmt::Debug for Text<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Text(…)")
    }
}

impl std::fmt::Debug for Presented<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Nothing => "Nothing",
            Self::Token(_) => "Token(…)",
            Self::Other => "Other",
        })
    }
}

impl<'a> Presented<'a> {
    /// Reads the headers of a request.
    ///
    /// # Errors
    /// More than one credential, or one that is malformed.
    pub(crate) fn read(headers: &'a HeaderMap) -> Result<Self, Refused> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let header = values.next();
        if values.next().is_some() {
            return Err(Refused::Malformed { problem: "has two Authorization headers" });
        }
        let in_protocol = websocket_token(headers)?;
        match (header, in_protocol) {
            (Some(_), Some(_)) => {
                Err(Refused::Malformed { problem: "presents a token in Authorization and in a subprotocol" })
            }
            (None, Some(token)) => Ok(Self::Token(Text::Decoded(token))),
            (None, None) => Ok(Self::Nothing),
            (Some(value), None) => in_header(value),
        }
    }
}

fn in_header(value: &HeaderValue) -> Result<Presented<'_>, Refused> {
    let malformed = Refused::Malformed { problem: "has an Authorization header that is not plain text" };
    let text = value.to_str().map_err(|_| malformed)?.trim();
    let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Ok(if text.is_empty() { Presented::Nothing } else { Presented::Other });
    }
    // As in Kubernetes: what stands behind a second space is not read.
    let token = token.split(' ').next().unwrap_or_default();
    Ok(if token.is_empty() { Presented::Nothing } else { Presented::Token(Text::Header(token)) })
}

/// The subprotocols that are asked for. A value that is not plain text has none: [`websocket_token`] refuses it, since the
/// API server might read one there.
fn protocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).map(str::trim)
}

fn websocket_token(headers: &HeaderMap) -> Result<Option<Zeroizing<String>>, Refused> {
    if headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().any(|value| value.to_str().is_err()) {
        return Err(Refused::Malformed { problem: "asks for subprotocols that are not plain text" });
    }
    let mut tokens = protocols(headers).filter_map(|protocol| protocol.strip_prefix(WEBSOCKET_BEARER));
    let Some(encoded) = tokens.next() else { return Ok(None) };
    if tokens.next().is_some() {
        return Err(Refused::Malformed { problem: "presents two tokens in subprotocols" });
    }
    let malformed =
        || Refused::Malformed { problem: "presents a token in a subprotocol that is not base64url" };
    let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| malformed())?;
    let text = String::from_utf8(bytes).map_err(|_| malformed())?;
    Ok(Some(Zeroizing::new(text)))
}

/// Takes out of a request's headers everything that says who it is for: credentials, in whatever place, and
/// impersonation.
pub(crate) fn remove(headers: &mut HeaderMap) {
    headers.remove(AUTHORIZATION);
    let impersonation: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(IMPERSONATE_PREFIX)).cloned().collect();
    for name in impersonation {
        headers.remove(name);
    }
    if protocols(headers).any(|protocol| protocol.starts_with(WEBSOCKET_BEARER)) {
        let rest: Vec<&str> =
            protocols(headers).filter(|protocol| !protocol.starts_with(WEBSOCKET_BEARER)).collect();
        // What is left of a header value is one.
        let rest = HeaderValue::from_str(&rest.join(", ")).ok().filter(|rest| !rest.is_empty());
        match rest {
            Some(rest) => drop(headers.insert(SEC_WEBSOCKET_PROTOCOL, rest)),
            None => drop(headers.remove(SEC_WEBSOCKET_PROTOCOL)),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use proptest::prelude::*;

    use super::{Presented, remove};

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().expect("a header value"));
        }
        headers
    }

    #[track_caller]
    fn check(pairs: &[(&'static str, &str)], expected: Result<Option<&str>, &str>) {
        let headers = headers(pairs);
        let read = Presented::read(&headers);
        let read = match &read {
            Ok(Presented::Token(token)) => Ok(Some(token.expose())),
            Ok(Presented::Nothing) => Ok(None),
            Ok(Presented::Other) => Ok(Some("other")),
            Err(error) => Err(error.to_string()),
        };
        match expected {
            Ok(expected) => assert_eq!(read, Ok(expected), "{pairs:?}"),
            Err(part) => assert!(read.as_ref().is_err_and(|error| error.contains(part)), "{read:?}"),
        }
    }

    #[test]
    fn a_token_is_read_where_kubernetes_reads_it() {
        check(&[], Ok(None));
        check(&[("authorization", "Bearer abc")], Ok(Some("abc")));
        check(&[("authorization", "bearer abc def")], Ok(Some("abc")));
        check(&[("authorization", "Bearer ")], Ok(None));
        check(&[("authorization", "Basic dTpw")], Ok(Some("other")));
        let protocol = "base64url.bearer.authorization.k8s.io.YWJj, v4.channel.k8s.io";
        check(&[("sec-websocket-protocol", protocol)], Ok(Some("abc")));
        check(&[("sec-websocket-protocol", "v4.channel.k8s.io")], Ok(None));
    }

    #[test]
    fn two_credentials_are_refused() {
        check(&[("authorization", "Bearer a"), ("authorization", "Bearer b")], Err("two Authorization"));
        let one = "base64url.bearer.authorization.k8s.io.YWJj";
        check(&[("authorization", "Bearer a"), ("sec-websocket-protocol", one)], Err("in a subprotocol"));
        check(&[("sec-websocket-protocol", one), ("sec-websocket-protocol", one)], Err("two tokens"));
        check(&[("sec-websocket-protocol", "base64url.bearer.authorization.k8s.io.!")], Err("base64url"));
        check(&[("sec-websocket-protocol", "base64url.bearer.authorization.k8s.io._w")], Err("base64url"));
    }

    #[test]
    fn a_token_does_not_hide_among_bytes_that_are_not_text() {
        let mut headers = HeaderMap::new();
        let hidden = b"\xe9, base64url.bearer.authorization.k8s.io.YWJj";
        headers
            .append("sec-websocket-protocol", http::HeaderValue::from_bytes(hidden).expect("a header value"));
        let refused = Presented::read(&headers).expect_err("it cannot be read").to_string();
        assert!(refused.contains("not plain text"), "{refused}");
    }

    #[test]
    fn everything_that_names_a_caller_is_removed_and_nothing_else() {
        let mut headers = headers(&[
            ("authorization", "Bearer a"),
            ("impersonate-user", "b"),
            ("impersonate-extra-scopes", "c"),
            ("sec-websocket-protocol", "base64url.bearer.authorization.k8s.io.YWJj, v5.channel.k8s.io"),
            ("accept", "*/*"),
        ]);
        remove(&mut headers);
        assert_eq!(headers.len(), 2, "{headers:?}");
        assert_eq!(headers["sec-websocket-protocol"], "v5.channel.k8s.io");
        assert!(headers.contains_key("accept"));
    }

    proptest! {
        #[test]
        fn whatever_is_presented_is_read_once_and_removed_whole(
            authorization in proptest::option::of("[ -~]{0,40}"),
            protocol in proptest::option::of("(base64url\\.bearer\\.authorization\\.k8s\\.io\\.)?[ -~]{0,40}"),
        ) {
            let mut headers = HeaderMap::new();
            for (name, value) in [("authorization", authorization), ("sec-websocket-protocol", protocol)] {
                if let Some(value) = value.and_then(|value| value.parse().ok()) {
                    headers.append(name, value);
                }
            }
            let _ = Presented::read(&headers);
            remove(&mut headers);
            prop_assert!(matches!(Presented::read(&headers), Ok(Presented::Nothing)));
        }
    }
}
