//! What a request means to the API server: verb, resource, namespace, name, read from method and path.
//!
//! Follows Kubernetes' `RequestInfoFactory` (k8s.io/apiserver `pkg/endpoints/request/requestinfo.go`), so that
//! rules and records speak of the same things as RBAC and the API server's audit log. Sans-IO.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// Verbs that stand in the path, `/api/v1/watch/…`; both are deprecated, the API server still reads them.
const PATH_VERBS: [&str; 2] = ["proxy", "watch"];

/// What may follow `/namespaces/{name}/` and still belong to the namespace itself.
const NAMESPACE_SUBRESOURCES: [&str; 2] = ["status", "finalize"];

/// Subresources whose request opens a stream to a container or is passed on to a workload: whatever the method,
/// they can change things.
const CONNECT_SUBRESOURCES: [&str; 4] = ["attach", "exec", "portforward", "proxy"];

/// Most proxies that a request is followed through.
const PROXIES_MAX: usize = 8;

/// The attributes of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attributes {
    /// Kubernetes verb as RBAC and the audit log have it: get, list, watch, create, update, patch, delete,
    /// deletecollection, proxy; for non-resource paths the method in lower case. An exec is a `get` or `create`
    /// of `pods/exec`, as in RBAC ([`Attributes::is_connect`] tells it). Empty for a method without a verb.
    pub verb: String,
    /// Empty for the core group and for non-resource requests.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub api_group: String,
    /// For example `v1`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub api_version: String,
    /// For example `pods`; empty for non-resource requests.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub resource: String,
    /// For example `exec`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subresource: String,
    /// Empty for cluster-scoped and all-namespace requests.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Object name; empty for collections.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
}

impl Attributes {
    /// Reads the attributes from a method (upper case), a path as sent (percent-encoded) and its query. Never
    /// fails: what is no resource request is a non-resource request, as in the API server.
    pub fn parse(method: &str, path: &str, query: Option<&str>) -> Self {
        let decoded = decoded_path(path);
        let trimmed = decoded.trim_matches('/');
        let parts: Vec<&str> = trimmed.split('/').collect();
        let non_resource = || Self { verb: method.to_ascii_lowercase(), ..Self::default() };

        let (group, rest) = match parts.as_slice() {
            ["api", rest @ ..] if rest.len() >= 2 => ("", rest),
            ["apis", group, rest @ ..] if rest.len() >= 2 => (*group, rest),
            _ => return non_resource(),
        };
        let (version, mut rest) = (rest[0], &rest[1..]);
        let mut attributes =
            Self { api_group: group.to_owned(), api_version: version.to_owned(), ..non_resource() };
        if PATH_VERBS.contains(&rest[0]) {
            if rest.len() < 2 {
                return attributes;
            }
            rest[0].clone_into(&mut attributes.verb);
            rest = &rest[1..];
        } else {
            verb_of(method).clone_into(&mut attributes.verb);
        }

        if let ["namespaces", namespace, inner @ ..] = rest {
            (*namespace).clone_into(&mut attributes.namespace);
            if inner.first().is_some_and(|first| !NAMESPACE_SUBRESOURCES.contains(first)) {
                rest = inner;
            }
        }
        if let Some(subresource) = rest.get(2)
            && attributes.verb != "proxy"
        {
            (*subresource).clone_into(&mut attributes.subresource);
        }
        if let Some(name) = rest.get(1) {
            (*name).clone_into(&mut attributes.name);
        }
        rest[0].clone_into(&mut attributes.resource);
        attributes.settle_collection(query.unwrap_or_default());
        attributes
    }

    /// What a request that goes through the API server's proxy (of a service, a pod or a node) would be about if another API server
    /// were behind it, as the Service `kubernetes` has one; none if it goes through none. Of one that goes through more than
    /// [`PROXIES_MAX`], it is said that it is about Secrets. Path and query as of [`Attributes::parse`].
    pub fn behind_proxy(method: &str, path: &str, query: Option<&str>) -> Option<Self> {
        let decoded = decoded_path(path);
        let behind = |(at, proxy): (usize, &str)| {
            let rest = decoded[at + proxy.len()..].strip_prefix('/')?.trim_start_matches('/');
            (rest.starts_with("api/") || rest.starts_with("apis/")).then_some(rest)
        };
        let mut last = None;
        for (number, rest) in decoded.match_indices("/proxy").filter_map(behind).enumerate() {
            if number == PROXIES_MAX {
                return Some(Self::parse(method, "/api/v1/secrets", query));
            }
            last = Some(rest);
        }
        Some(Self::parse(method, &format!("/{}", last?), query)).filter(Self::is_resource)
    }

    /// A get or delete without a name is about the collection; a field selector on the name gives it back.
    fn settle_collection(&mut self, query: &str) {
        if !self.name.is_empty() {
            return;
        }
        match self.verb.as_str() {
            "get" => {
                let watch = query_value(query, "watch").is_some_and(|value| is_true(&value));
                if watch { "watch" } else { "list" }.clone_into(&mut self.verb);
                if let Some(name) =
                    query_value(query, "fieldSelector").and_then(|selector| selected_name(&selector))
                {
                    self.name = name;
                }
            }
            "delete" => "deletecollection".clone_into(&mut self.verb),
            _ => {}
        }
    }

    /// Whether this is about an object or collection, not a path such as `/version`.
    pub fn is_resource(&self) -> bool {
        !self.resource.is_empty()
    }

    /// Whether this opens a stream to a workload or is passed on to one: exec, attach, portforward and every proxy
    /// path, whatever the method.
    pub fn is_connect(&self) -> bool {
        self.verb == "proxy" || CONNECT_SUBRESOURCES.contains(&self.subresource.as_str())
    }

    /// Whether this must be durable before it is forwarded: every method that is not known to be a read, and
    /// [`Attributes::is_connect`].
    pub fn is_mutating(&self, method: &str) -> bool {
        !matches!(method, "GET" | "HEAD" | "OPTIONS") || self.is_connect()
    }

    /// Whether the answer is expected to last: watch, `log` with `follow`, connect.
    pub fn is_long_running(&self, query: Option<&str>) -> bool {
        if self.verb == "watch" || self.is_connect() {
            return true;
        }
        self.subresource == "log"
            && query_value(query.unwrap_or_default(), "follow").is_some_and(|value| is_true(&value))
    }
}

/// Verb of a resource request whose path names none.
fn verb_of(method: &str) -> &'static str {
    match method {
        "POST" => "create",
        "GET" | "HEAD" => "get",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "",
    }
}

/// What exec runs in a pod, or attach reaches there, as the request's query says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Execution {
    /// The container; none where the API server chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The command's arguments in their order; none for attach.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Whether the client writes to it.
    #[serde(default)]
    pub stdin: bool,
    /// Whether it has a terminal.
    #[serde(default)]
    pub tty: bool,
}

impl Execution {
    /// Reads it from the query of a request; none for other requests.
    pub fn parse(attributes: &Attributes, query: Option<&str>) -> Option<Self> {
        let pods = attributes.api_group.is_empty() && attributes.resource == "pods";
        if !pods || !matches!(attributes.subresource.as_str(), "exec" | "attach") {
            return None;
        }
        let query = query.unwrap_or_default();
        let flag = |key| query_value(query, key).is_some_and(|value| is_true(&value));
        Some(Self {
            container: query_value(query, "container").map(Cow::into_owned).filter(|name| !name.is_empty()),
            command: query_values(query, "command").map(Cow::into_owned).collect(),
            stdin: flag("stdin"),
            tty: flag("tty"),
        })
    }
}

/// Kubernetes' reading of a boolean parameter: present means true unless it says `false` or `0`
/// (apimachinery `Convert_Slice_string_To_bool`).
fn is_true(value: &str) -> bool {
    !(value == "0" || value.eq_ignore_ascii_case("false"))
}

/// First value of a query parameter.
fn query_value<'a>(query: &'a str, key: &str) -> Option<Cow<'a, str>> {
    query_values(query, key).next()
}

/// Values of a query parameter, decoded. As in Go, a pair that does not decode or holds a `;` does not count.
fn query_values<'a>(query: &'a str, key: &str) -> impl Iterator<Item = Cow<'a, str>> {
    query.split('&').filter(|pair| !pair.contains(';')).filter_map(move |pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (percent_decode(name, true)? == key).then(|| percent_decode(value, true)).flatten()
    })
}

/// A path as rules compare it, without percent-encoding; as it is if that is malformed.
pub fn decoded_path(path: &str) -> Cow<'_, str> {
    percent_decode(path, false).unwrap_or(Cow::Borrowed(path))
}

/// Undoes percent-encoding; none if it is malformed. Bytes that are not UTF-8 are replaced.
fn percent_decode(text: &str, plus_is_space: bool) -> Option<Cow<'_, str>> {
    if !text.bytes().any(|byte| byte == b'%' || (plus_is_space && byte == b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => hex_digit(bytes.next()?)? << 4 | hex_digit(bytes.next()?)?,
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    Some(Cow::Owned(match String::from_utf8(decoded) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    }))
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// The name that a field selector asks for with `metadata.name=…`, if it does and the name can stand in a path.
fn selected_name(selector: &str) -> Option<String> {
    for term in split_unescaped(selector, ',') {
        let Some((field, value)) = term.split_once('=') else { continue };
        if field == "metadata.name" {
            let name = unescape(value.strip_prefix('=').unwrap_or(value));
            let usable = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '%']);
            return usable.then_some(name);
        }
    }
    None
}

fn split_unescaped(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut escaped = false;
    text.split(move |character| {
        let splits = character == separator && !escaped;
        escaped = character == '\\' && !escaped;
        splits
    })
}

fn unescape(text: &str) -> String {
    let mut characters = text.chars();
    let mut plain = String::with_capacity(text.len());
    while let Some(character) = characters.next() {
        plain.extend(if character == '\\' { characters.next() } else { Some(character) });
    }
    plain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One line per request: method, uri → verb group/version namespace resource/subresource name, then the
    /// classes: M mutating, C connect, L long-running.
    #[track_caller]
    fn check(request: &str, expected: &str) {
        let (method, uri) = request.split_once(' ').expect("a method and a path");
        let (path, query) = uri.split_once('?').map_or((uri, None), |(path, query)| (path, Some(query)));
        let a = Attributes::parse(method, path, query);
        let classes: String =
            [('M', a.is_mutating(method)), ('C', a.is_connect()), ('L', a.is_long_running(query))]
                .into_iter()
                .filter_map(|(letter, holds)| holds.then_some(letter))
                .collect();
        let got = format!(
            "{}|{}/{}|{}|{}/{}|{}|{classes}",
            a.verb, a.api_group, a.api_version, a.namespace, a.resource, a.subresource, a.name
        );
        assert_eq!(got, expected, "{request}");
    }

    #[test]
    fn what_is_behind_a_proxy_is_told_however_often_it_is_one() {
        let behind = |path: &str| {
            let behind = Attributes::behind_proxy("PATCH", path, None)?;
            Some(format!("{} {}/{} {}", behind.verb, behind.resource, behind.name, behind.namespace))
        };
        let secret = "api/v1/namespaces/a/secrets/s";
        let found = Some("patch secrets/s a".to_owned());
        let service = "/api/v1/namespaces/default/services/https:kubernetes:443/proxy";
        assert_eq!(behind(&format!("{service}/{secret}")), found);
        assert_eq!(behind(&format!("{service}//{secret}")), found);
        assert_eq!(behind(&format!("{service}{service}/{secret}")), found);
        assert_eq!(behind(&format!("{service}/{}", secret.replace('s', "%73"))), found);
        assert_eq!(behind(&format!("/api/v1/nodes/n/proxy/{secret}")), found);
        assert_eq!(behind(&format!("/{secret}")), None);
        assert_eq!(behind(&format!("{service}/metrics")), None);
        assert_eq!(behind(&format!("/api/v1/namespaces/a/services/proxy/proxy/{secret}")), found);
        // However many there are, it is looked at once.
        let many = "/proxy/api".repeat(13_000);
        assert_eq!(behind(&many), Some("patch secrets/ ".to_owned()));
        assert_eq!(behind(&"/proxy".repeat(20_000)), None);
    }

    #[test]
    fn an_execution_has_every_argument_in_its_order() {
        let path = "/api/v1/namespaces/a/pods/p/exec";
        let query =
            "command=sh&container=c&command=-c&command=echo+%22a%26b%22&stdin=true&stdout=true&tty=false";
        let execution = Execution::parse(&Attributes::parse("POST", path, Some(query)), Some(query));
        let command = ["sh", "-c", "echo \"a&b\""].map(str::to_owned).to_vec();
        let expected = Execution { container: Some("c".to_owned()), command, stdin: true, tty: false };
        assert_eq!(execution, Some(expected));
        for other in ["/api/v1/namespaces/a/pods/p/portforward", "/apis/x/v1/namespaces/a/pods/p/exec"] {
            assert_eq!(Execution::parse(&Attributes::parse("POST", other, None), Some(query)), None);
        }
    }

    #[test]
    fn resource_requests_have_the_verbs_of_rbac() {
        check("GET /api/v1/pods", "list|/v1||pods/||");
        check("GET /api/v1/namespaces/a/pods", "list|/v1|a|pods/||");
        check("GET /api/v1/namespaces/a/pods/p", "get|/v1|a|pods/|p|");
        check("HEAD /api/v1/namespaces/a/pods/p", "get|/v1|a|pods/|p|");
        check("POST /api/v1/namespaces/a/pods", "create|/v1|a|pods/||M");
        check("PUT /api/v1/namespaces/a/pods/p", "update|/v1|a|pods/|p|M");
        check("PATCH /apis/apps/v1/namespaces/a/deployments/d", "patch|apps/v1|a|deployments/|d|M");
        check("DELETE /api/v1/namespaces/a/pods/p", "delete|/v1|a|pods/|p|M");
        check("DELETE /api/v1/namespaces/a/pods", "deletecollection|/v1|a|pods/||M");
        check("GET /apis/apps/v1/namespaces/a/deployments/d/scale", "get|apps/v1|a|deployments/scale|d|");
        check("OPTIONS /api/v1/pods", "|/v1||pods/||");
        check("SEARCH /api/v1/pods", "|/v1||pods/||M");
    }

    #[test]
    fn namespaces_are_resources_too() {
        check("GET /api/v1/namespaces", "list|/v1||namespaces/||");
        check("GET /api/v1/namespaces/a", "get|/v1|a|namespaces/|a|");
        check("PUT /api/v1/namespaces/a/finalize", "update|/v1|a|namespaces/finalize|a|M");
        check("PATCH /api/v1/namespaces/a/status", "patch|/v1|a|namespaces/status|a|M");
        check("DELETE /api/v1/namespaces/a", "delete|/v1|a|namespaces/|a|M");
    }

    #[test]
    fn watches_are_told_by_parameter_or_prefix() {
        check("GET /api/v1/pods?watch=true", "watch|/v1||pods/||L");
        check("GET /api/v1/pods?watch=1", "watch|/v1||pods/||L");
        check("GET /api/v1/pods?watch", "watch|/v1||pods/||L");
        check("GET /api/v1/pods?watch=False", "list|/v1||pods/||");
        check("GET /api/v1/pods?watch=0", "list|/v1||pods/||");
        check("GET /api/v1/pods?w%61tch=true", "watch|/v1||pods/||L");
        check("GET /api/v1/watch/pods", "watch|/v1||pods/||L");
        check("GET /api/v1/watch/namespaces/a/pods/p", "watch|/v1|a|pods/|p|L");
        check("GET /apis/apps/v1/watch/namespaces/a/deployments", "watch|apps/v1|a|deployments/||L");
        check("GET /api/v1/namespaces/a/pods/p?watch=true", "get|/v1|a|pods/|p|");
        check("POST /api/v1/watch/pods", "watch|/v1||pods/||ML");
    }

    #[test]
    fn a_field_selector_on_the_name_gives_the_name() {
        check(
            "GET /api/v1/namespaces/a/pods?fieldSelector=metadata.name%3Dp&watch=true",
            "watch|/v1|a|pods/|p|L",
        );
        check("GET /api/v1/namespaces/a/pods?fieldSelector=x=y,metadata.name==p", "list|/v1|a|pods/|p|");
        check("GET /api/v1/namespaces/a/pods?fieldSelector=metadata.name!=p", "list|/v1|a|pods/||");
        check("GET /api/v1/namespaces/a/pods?fieldSelector=metadata.name=..", "list|/v1|a|pods/||");
        check("GET /api/v1/namespaces/a/pods?fieldSelector=x=a\\,metadata.name=p", "list|/v1|a|pods/||");
    }

    #[test]
    fn connects_are_mutating_whatever_the_method() {
        check("GET /api/v1/namespaces/a/pods/p/exec?command=ls", "get|/v1|a|pods/exec|p|MCL");
        check("POST /api/v1/namespaces/a/pods/p/attach", "create|/v1|a|pods/attach|p|MCL");
        check("GET /api/v1/namespaces/a/pods/p/portforward", "get|/v1|a|pods/portforward|p|MCL");
        check(
            "GET /api/v1/namespaces/a/services/http:s:80/proxy/x/y",
            "get|/v1|a|services/proxy|http:s:80|MCL",
        );
        check("GET /api/v1/nodes/n/proxy/pods", "get|/v1||nodes/proxy|n|MCL");
        check("GET /api/v1/proxy/namespaces/a/pods/p/x", "proxy|/v1|a|pods/|p|MCL");
        check("GET /api/v1/namespaces/a/pods/p%2Fexec", "get|/v1|a|pods/exec|p|MCL");
        check("GET /api/v1/namespaces/a/pods/p/%65xec", "get|/v1|a|pods/exec|p|MCL");
    }

    #[test]
    fn logs_last_only_when_followed() {
        check("GET /api/v1/namespaces/a/pods/p/log?follow=true", "get|/v1|a|pods/log|p|L");
        check("GET /api/v1/namespaces/a/pods/p/log?container=c", "get|/v1|a|pods/log|p|");
    }

    #[test]
    fn other_paths_are_non_resource() {
        check("GET /", "get|/||/||");
        check("GET /version", "get|/||/||");
        check("GET /api", "get|/||/||");
        check("GET /api/v1", "get|/||/||");
        check("GET /api/v1/", "get|/||/||");
        check("GET /apis/apps/v1", "get|/||/||");
        check("GET /openapi/v3/apis/apps/v1", "get|/||/||");
        check("POST /metrics", "post|/||/||M");
        check("GET /api/v1/watch", "get|/v1||/||");
        check("GET /%zz/api", "get|/||/||");
        check("GET *", "get|/||/||");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(method in "[A-Z]{0,8}", path in "\\PC{0,80}", query in "\\PC{0,80}") {
            let attributes = Attributes::parse(&method, &path, Some(&query));
            attributes.is_long_running(Some(&query));
        }

        #[test]
        fn path_like_input_never_panics(
            parts in proptest::collection::vec("(api|apis|v1|watch|proxy|namespaces|status|pods|%2F|%|exec|)", 0..9),
            query in "(watch|fieldSelector|metadata.name|=|&|;|%|%3D|\\\\|,|!|p){0,9}",
        ) {
            let attributes = Attributes::parse("GET", &format!("/{}", parts.join("/")), Some(&query));
            prop_assert!(attributes.is_mutating("POST"));
        }
    }
}
