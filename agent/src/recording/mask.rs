//! Masks of single values: what stands in a record in place of a secret, and which headers and query parameters hold one. Bodies
//! are `body`'s matter, arguments `arguments`'. Sans-IO.
//!
//! A mask is `weir:masked:<length class>:<keyed digest>`: equal secrets are recognisable as equal, and whoever lacks the
//! key cannot try guesses. The key is per cluster, derived from one per journal.

use std::{borrow::Cow, sync::Arc};

use hmac::{Hmac, Mac as _};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use sha2::Sha256;
use weir_common::{
    attributes::Attributes,
    event::{Caller, Header, Process},
};
use zeroize::Zeroizing;

use super::{
    body::Sensitivity,
    masks::{FieldSet, Masks},
    patterns,
};

/// What every mask starts with.
pub(super) const MASK_PREFIX: &str = "weir:masked:";

/// Most bytes of all header names and values that an event holds; beyond that values are replaced by a mark.
const HEADERS_BYTES_MAX: usize = 64 * 1024;

/// Most bytes of a URI that an event holds.
const URI_BYTES_MAX: usize = 64 * 1024;

/// What stands for a header value that is left out because of [`HEADERS_BYTES_MAX`], before its length.
const OMITTED_PREFIX: &str = "weir:omitted:";

/// The subprotocol in which browsers and kubectl carry a bearer token (k8s.io/apiserver
/// `pkg/authentication/request/websocket/protocol.go`).
const WEBSOCKET_BEARER: &str = "base64url.bearer.authorization.k8s.io.";

/// Query parameters that hold a credential.
const CREDENTIAL_PARAMETERS: [&str; 4] = ["token", "access_token", "id_token", "x-amz-security-token"];

/// Makes masks for one cluster, by the rules that hold for one request. `Debug` shows nothing of the key.
#[derive(Clone)]
pub(super) struct Masker {
    key: Arc<Zeroizing<[u8; 32]>>,
    masks: Arc<Masks>,
    /// Fields that are masked in whatever object the request carries.
    fields: FieldSet,
    /// Words about the request may quote what is masked in it.
    quotes: bool,
}

impl std::fmt::Debug for Masker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Masker")
    }
}

impl Masker {
    /// Derives a cluster's key from the journal's. Without other rules, those without a configuration hold.
    pub(super) fn for_cluster(journal_key: &[u8], cluster: &str) -> Self {
        let mut key = Zeroizing::new([0; 32]);
        let mut derived = hmac(journal_key);
        derived.update(b"weir mask key v1\0");
        derived.update(cluster.as_bytes());
        key.copy_from_slice(&derived.finalize().into_bytes());
        Self { key: Arc::new(key), masks: Arc::default(), fields: 0, quotes: false }
    }

    /// The same, by these rules.
    pub(super) fn by(&self, masks: &Arc<Masks>) -> Self {
        Self { key: Arc::clone(&self.key), masks: Arc::clone(masks), fields: 0, quotes: false }
    }

    /// The same, for bodies of a request.
    pub(super) fn of(self, attributes: &Attributes) -> Self {
        let fields = self.masks.of_resource(&attributes.resource);
        let quotes = fields != 0 || Sensitivity::of(attributes) != Sensitivity::None;
        Self { fields, quotes, ..self }
    }

    /// The rules.
    pub(super) fn masks(&self) -> &Masks {
        &self.masks
    }

    /// Fields that are masked in whatever object the request carries.
    pub(super) fn fields(&self) -> FieldSet {
        self.fields
    }

    /// Whether what cannot be read must not be recorded, since a rule may be for something in it.
    pub(super) fn hides(&self) -> bool {
        self.masks.hides(self.fields)
    }

    /// A keyed digest to be fed.
    pub(super) fn digest(&self) -> KeyedDigest {
        KeyedDigest(hmac(self.key.as_slice()))
    }

    /// The mask of a value.
    pub(super) fn mask(&self, value: &[u8]) -> String {
        let mut digest = self.digest();
        digest.update(value);
        let digest = digest.0.finalize().into_bytes();
        format!("{MASK_PREFIX}{}:{}", length_class(value.len()), hex::encode(&digest[..8]))
    }

    /// Text with what expressions match masked.
    pub(super) fn text(&self, text: &str) -> String {
        let masked = self.masks.patterns().and_then(|patterns| patterns.mask(self, text.as_bytes()));
        masked.map_or_else(|| text.to_owned(), |masked| String::from_utf8_lossy(&masked.content).into_owned())
    }

    /// Headers as they are recorded.
    pub(super) fn headers(&self, headers: &HeaderMap) -> Vec<Header> {
        let mut left = HEADERS_BYTES_MAX;
        let one = |(name, value): (&HeaderName, &HeaderValue)| {
            let value = self.header_value(name.as_str(), value.as_bytes());
            let bytes = name.as_str().len() + value.len();
            let value = match left.checked_sub(bytes) {
                Some(rest) => {
                    left = rest;
                    value
                }
                None => format!("{OMITTED_PREFIX}{}", value.len()),
            };
            Header { name: name.as_str().to_owned(), value }
        };
        headers.iter().map(one).collect()
    }

    fn header_value(&self, name: &str, value: &[u8]) -> String {
        let text = String::from_utf8_lossy(value);
        match name {
            "authorization" | "proxy-authorization" => match text.split_once(' ') {
                Some((scheme, rest))
                    if !rest.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric()) =>
                {
                    format!("{scheme} {}", self.mask(rest.as_bytes()))
                }
                _ => self.mask(value),
            },
            "cookie" | "set-cookie" => self.mask(value),
            "sec-websocket-protocol" => {
                let protocols = text.split(',').map(|protocol| self.websocket_protocol(protocol.trim()));
                protocols.collect::<Vec<_>>().join(", ")
            }
            "location" | "referer" => self.uri(&text),
            // An admission webhook's words, among others.
            "warning" if self.quotes => self.mask(value),
            _ if is_credential_header(name) => self.mask(value),
            _ => self.text(&text),
        }
    }

    fn websocket_protocol(&self, protocol: &str) -> String {
        match protocol.get(..WEBSOCKET_BEARER.len()) {
            Some(prefix) if prefix.eq_ignore_ascii_case(WEBSOCKET_BEARER) => {
                let token = &protocol[WEBSOCKET_BEARER.len()..];
                format!("{WEBSOCKET_BEARER}{}", self.mask(token.as_bytes()))
            }
            _ => protocol.to_owned(),
        }
    }

    /// A request's URI as it is recorded: path and query, also where HTTP/2 (`:authority`) or an absolute form gave
    /// more, so that requests read the same whatever the protocol.
    pub(super) fn request_uri(&self, uri: &Uri) -> String {
        self.uri(&uri.path_and_query().map_or_else(|| uri.to_string(), ToString::to_string))
    }

    /// A URI with the values of credential parameters masked, cut to its limit.
    pub(super) fn uri(&self, uri: &str) -> String {
        let mut masked = match uri.split_once('?') {
            None => self.path(uri),
            Some((path, query)) => {
                let (query, fragment) = query.split_once('#').map_or((query, None), |(q, f)| (q, Some(f)));
                let parameters: Vec<_> =
                    self.command(query).map(|parameter| self.parameter(&parameter)).collect();
                let fragment = fragment.map(|_| "#").unwrap_or_default();
                format!("{}?{}{fragment}", self.path(path), parameters.join("&"))
            }
        };
        if masked.len() > URI_BYTES_MAX {
            let whole = masked.len();
            let end = (0..=URI_BYTES_MAX).rev().find(|end| masked.is_char_boundary(*end)).unwrap_or(0);
            masked.truncate(end);
            masked.push_str(&format!(" {OMITTED_PREFIX}{}", whole - end));
        }
        masked
    }

    /// A path with what expressions match masked, as it is written and as it reads without percent-encoding.
    fn path(&self, path: &str) -> String {
        let Some(patterns) = self.masks.patterns() else { return path.to_owned() };
        let (decoded, places) = unescaped(path);
        let mut found = patterns.matches(path.as_bytes());
        found.extend(
            patterns.matches(&decoded).into_iter().map(|found| places[found.start]..places[found.end]),
        );
        let (mut masked, mut from) = (Vec::new(), 0);
        for found in patterns::union(found) {
            let [before, value] = [from..found.start, found.clone()].map(|range| &path.as_bytes()[range]);
            masked.extend_from_slice(before);
            masked.extend_from_slice(self.mask(&unescaped(&String::from_utf8_lossy(value)).0).as_bytes());
            from = found.end;
        }
        masked.extend_from_slice(&path.as_bytes()[from..]);
        String::from_utf8_lossy(&masked).into_owned()
    }

    /// The parameters of a query, those of a command masked as its arguments are.
    fn command<'a>(&self, query: &'a str) -> impl Iterator<Item = Cow<'a, str>> {
        let decoded = |value: &str| percent_decoded(&value.replace('+', " "));
        let argument = |parameter: &'a str| {
            let (name, value) = parameter.split_once('=')?;
            (percent_decoded(name) == "command").then_some(value)
        };
        let given: Vec<_> = query.split('&').filter_map(argument).map(decoded).collect();
        // A URI in a URI is not looked into: it could have another one in it.
        let masked = self.arguments_with(&given, |uri| self.mask(uri.as_bytes()));
        let mut pairs = masked.into_iter().zip(given);
        query.split('&').map(move |parameter| match argument(parameter).and_then(|_| pairs.next()) {
            Some((masked, given)) if masked != given => {
                format!("command={}", self.mask(given.as_bytes())).into()
            }
            _ => Cow::Borrowed(parameter),
        })
    }

    fn parameter(&self, parameter: &str) -> String {
        match parameter.split_once('=') {
            Some((name, value)) if is_credential_parameter(name) => {
                format!("{name}={}", self.mask(value.as_bytes()))
            }
            _ => {
                let decoded = percent_decoded(&parameter.replace('+', " "));
                let matches = |text: &str| {
                    self.masks.patterns().is_some_and(|patterns| patterns.are_in(text.as_bytes()))
                };
                if !matches(&decoded) && !matches(parameter) {
                    return parameter.to_owned();
                }
                // What is masked is not text of a URI any more: all of the value is.
                let (name, value) = parameter.split_once('=').unwrap_or(("", parameter));
                let name = if matches(&percent_decoded(name)) {
                    self.mask(name.as_bytes())
                } else {
                    name.to_owned()
                };
                format!("{name}={}", self.mask(percent_decoded(value).as_bytes()))
            }
        }
    }

    /// A process as it is recorded.
    pub(super) fn process(&self, process: &Process) -> Process {
        Process { argv: self.arguments(&process.argv), ..process.clone() }
    }

    /// A caller as it is recorded.
    pub(super) fn caller(&self, caller: &Caller) -> Caller {
        Caller { process: caller.process.as_ref().map(|process| self.process(process)), ..caller.clone() }
    }
}

/// HMAC-SHA256 with a cluster's key.
pub(super) struct KeyedDigest(Hmac<Sha256>);

impl std::fmt::Debug for KeyedDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyedDigest")
    }
}

impl KeyedDigest {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// As it stands in a body's summary.
    pub(super) fn finish(self) -> String {
        format!("hmac-sha256:{}", hex::encode(self.0.finalize().into_bytes()))
    }
}

fn hmac(key: &[u8]) -> Hmac<Sha256> {
    match Hmac::<Sha256>::new_from_slice(key) {
        Ok(hmac) => hmac,
        // HMAC takes keys of any length.
        Err(_) => unreachable!("HMAC refuses no key"),
    }
}

/// The next power of two, from 8: a length says too much of a short secret.
pub(super) fn length_class(length: usize) -> String {
    if length == 0 { "0".to_owned() } else { format!("le{}", length.max(8).next_power_of_two()) }
}

fn is_credential_header(name: &str) -> bool {
    let named = name.ends_with("-token") || name.ends_with("-secret") || name.ends_with("-password");
    named || name.ends_with("api-key") || name.starts_with("x-auth") || name.ends_with("-authorization")
}

fn is_credential_parameter(name: &str) -> bool {
    let decoded = percent_decoded(name);
    CREDENTIAL_PARAMETERS.iter().any(|parameter| decoded.eq_ignore_ascii_case(parameter))
}

fn percent_decoded(text: &str) -> String {
    String::from_utf8_lossy(&unescaped(text).0).into_owned()
}

/// Text without percent-encoding; and where each byte of it, and its end, stands in `text`.
fn unescaped(text: &str) -> (Vec<u8>, Vec<usize>) {
    let (mut bytes, mut places, mut rest) = (Vec::new(), Vec::new(), text.as_bytes());
    while let [first, tail @ ..] = rest {
        places.push(text.len() - rest.len());
        let escaped = (*first == b'%').then(|| tail.first_chunk::<2>()).flatten();
        let byte = escaped.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    places.push(text.len());
    (bytes, places)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::HeaderMap;

    use super::{HEADERS_BYTES_MAX, MASK_PREFIX, Masker, URI_BYTES_MAX};
    use crate::recording::masks::{MaskRules, Masks};

    fn masker() -> Masker {
        Masker::for_cluster(&[1; 32], "c")
    }

    #[test]
    fn equal_secrets_have_equal_masks_only_under_the_same_key() {
        assert_eq!(masker().mask(b"hunter2"), masker().mask(b"hunter2"));
        assert_ne!(masker().mask(b"hunter2"), masker().mask(b"hunter3"));
        assert_ne!(masker().mask(b"hunter2"), Masker::for_cluster(&[1; 32], "d").mask(b"hunter2"));
        assert_ne!(masker().mask(b"hunter2"), Masker::for_cluster(&[2; 32], "c").mask(b"hunter2"));
        assert!(masker().mask(b"hunter2").starts_with("weir:masked:le8:"));
        assert!(masker().mask(&[0; 33]).starts_with("weir:masked:le64:"));
    }

    #[track_caller]
    fn header(name: &'static str, value: &str) -> String {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        masker().headers(&headers).remove(0).value
    }

    #[test]
    fn credential_headers_are_masked_and_others_are_not() {
        for name in
            ["authorization", "cookie", "set-cookie", "x-vault-token", "x-amz-security-token", "x-api-key"]
        {
            let value = header(name, "Bearer canary.canary");
            assert!(!value.contains("canary") && value.contains(MASK_PREFIX), "{name}: {value}");
        }
        assert!(header("authorization", "Bearer canary").starts_with("Bearer weir:masked:"));
        let value = header(
            "sec-websocket-protocol",
            "v5.channel.k8s.io,base64url.bearer.authorization.k8s.io.Y2FuYXJ5",
        );
        assert!(value.starts_with("v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.weir:masked:"));
        assert_eq!(header("user-agent", "kubectl/v1.36"), "kubectl/v1.36");
        assert!(header("location", "/a?token=canary").starts_with("/a?token=weir:masked:"));
    }

    #[test]
    fn credential_parameters_are_masked_even_if_their_names_are_escaped() {
        for query in ["token=canary", "a=b&access_token=canary", "%74oken=canary", "TOKEN=canary&b"] {
            let uri = masker().request_uri(&format!("/api?{query}").parse().unwrap());
            assert!(!uri.contains("canary") && uri.contains(MASK_PREFIX), "{uri}");
        }
        let exec = "/exec?container=c&command=env&command=A_PASSWORD%3Dcanary&command=--token&command=canary&command=x%3Dy";
        let uri = masker().request_uri(&exec.parse().unwrap());
        assert!(!uri.contains("canary") && uri.ends_with("&command=x%3Dy"), "{uri}");
        let nested = format!("/exec?{}canary", "command=a://?".repeat(4000));
        assert!(!masker().uri(&nested).contains("canary"));
        let uri = "/api/v1/pods?continue=abc&limit=500&watch=true";
        assert_eq!(masker().request_uri(&uri.parse().unwrap()), uri);
    }

    #[test]
    fn what_expressions_match_is_masked_in_paths_however_it_is_escaped() {
        let patterns = vec!["AKIA[0-9A-Z]{4}".to_owned()];
        let masks = Masks::new(MaskRules { patterns, ..MaskRules::default() }).unwrap();
        let masker = masker().by(&Arc::new(masks));
        let mask = masker.mask(b"AKIA0123");
        for key in ["AKIA0123", "%41KIA0123", "AKI%41%30%31%32%33", "%41%4b%49%41%30%31%32%33"] {
            for uri in [format!("/proxy/{key}/x%2Fy"), format!("/proxy/{key}/x%2Fy?a=b")] {
                let recorded = masker.request_uri(&uri.parse().unwrap());
                assert_eq!(recorded, uri.replace(key, &mask), "{key}");
            }
        }
        let other = "/api/v1/namespaces/a%2Db/pods/%C3%A4%zz%";
        assert_eq!(masker.uri(other), other);
    }

    #[test]
    fn expressions_do_not_see_through_percent_encoding_twice_or_outside_of_a_uri() {
        let patterns = vec!["AKIA[0-9A-Z]{4}".to_owned()];
        let masks = Masks::new(MaskRules { patterns, ..MaskRules::default() }).unwrap();
        let masker = masker().by(&Arc::new(masks));
        assert_eq!(masker.uri("/proxy/%2541KIA0123"), "/proxy/%2541KIA0123");
        assert_eq!(masker.header_value("x-note", b"%41KIA0123"), "%41KIA0123");
    }

    #[test]
    fn long_headers_and_uris_are_cut_with_a_mark() {
        let mut headers = HeaderMap::new();
        for n in 0..3 {
            headers.append("x-long", "a".repeat(HEADERS_BYTES_MAX / 2).parse().unwrap());
            headers.append("x-short", n.to_string().parse().unwrap());
        }
        let recorded = masker().headers(&headers);
        assert_eq!(recorded.iter().filter(|header| header.value.starts_with("weir:omitted:")).count(), 2);
        let uri = format!("/{}", "a".repeat(URI_BYTES_MAX + 9));
        assert!(masker().uri(&uri).ends_with(" weir:omitted:10"));
    }
}
