//! Impersonation as Kubernetes does it: a user as `Impersonate-*` headers, and back, and the rights that it takes. Sans-IO.
//!
//! Names and escapes are those of k8s.io/client-go `transport/round_trippers.go` and k8s.io/apiserver
//! `pkg/endpoints/filters/impersonation.go`.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue};
use weir_common::event::UserInfo;

use super::{Refused, presented::IMPERSONATE_PREFIX};

const USER: HeaderName = HeaderName::from_static("impersonate-user");
const UID: HeaderName = HeaderName::from_static("impersonate-uid");
const GROUP: HeaderName = HeaderName::from_static("impersonate-group");
const EXTRA_PREFIX: &str = "impersonate-extra-";

/// Most rights that one wish of a client may take: each is a question to the API server.
const RIGHTS_MAX: usize = 32;
/// API group of `uids` and `userextras`.
const AUTHENTICATION_GROUP: &str = "authentication.k8s.io";
const ANONYMOUS: &str = "system:anonymous";
const AUTHENTICATED: &str = "system:authenticated";
const ACCOUNT_PREFIX: &str = "system:serviceaccount:";
const ACCOUNTS: &str = "system:serviceaccounts";

/// What it takes to impersonate one part of a user: the verb `impersonate` on this resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Right {
    /// API group; empty for the core group.
    pub group: &'static str,
    /// `users`, `serviceaccounts`, `groups`, `uids` or `userextras`.
    pub resource: &'static str,
    /// The key, of `userextras`; else empty.
    pub subresource: String,
    /// Of a service account; else empty.
    pub namespace: String,
    /// User, group, uid or value.
    pub name: String,
}

impl Right {
    /// For any value of the extra attribute `key`.
    pub fn of_extra(key: &str) -> Self {
        Self {
            group: AUTHENTICATION_GROUP,
            resource: "userextras",
            subresource: key.to_owned(),
            namespace: String::new(),
            name: String::new(),
        }
    }
}

impl std::fmt::Display for Right {
    /// As an administrator would look for it in a role.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { resource, subresource, namespace, name, .. } = self;
        match (subresource.is_empty(), namespace.is_empty()) {
            (false, _) => write!(formatter, "{resource}/{subresource} {name:?}"),
            (true, false) => write!(formatter, "{resource} {name:?} in namespace {namespace:?}"),
            (true, true) => write!(formatter, "{resource} {name:?}"),
        }
    }
}

/// Every right that it takes to impersonate `user`, as the API server asks for them.
///
/// # Errors
/// There are more than Weir asks for.
pub(crate) fn rights(user: &UserInfo) -> Result<Vec<Right>, Refused> {
    let right = |group, resource, name: &str| Right {
        group,
        resource,
        subresource: String::new(),
        namespace: String::new(),
        name: name.to_owned(),
    };
    let account = user.username.strip_prefix(ACCOUNT_PREFIX).and_then(|account| account.split_once(':'));
    let mut rights = vec![match account {
        Some((namespace, name)) => {
            Right { namespace: namespace.to_owned(), ..right("", "serviceaccounts", name) }
        }
        None => right("", "users", &user.username),
    }];
    if !user.uid.is_empty() {
        rights.push(right(AUTHENTICATION_GROUP, "uids", &user.uid));
    }
    rights.extend(user.groups.iter().map(|group| right("", "groups", group)));
    for (key, values) in &user.extra {
        rights.extend(values.iter().map(|value| Right {
            subresource: key.clone(),
            ..right(AUTHENTICATION_GROUP, "userextras", value)
        }));
    }
    if rights.len() > RIGHTS_MAX {
        return Err(Refused::Malformed { problem: "asks to impersonate with more than 32 names" });
    }
    Ok(rights)
}

/// The groups that the API server takes `user` to be in once it is impersonated.
pub fn effective_groups(user: &UserInfo) -> Vec<String> {
    let mut groups = user.groups.clone();
    let account = user.username.strip_prefix(ACCOUNT_PREFIX).and_then(|account| account.split_once(':'));
    if let Some((namespace, _)) = account
        && groups.is_empty()
    {
        groups.extend([ACCOUNTS.to_owned(), format!("{ACCOUNTS}:{namespace}")]);
    }
    if user.username != ANONYMOUS && !groups.iter().any(|group| group == AUTHENTICATED) {
        groups.push(AUTHENTICATED.to_owned());
    }
    groups
}

/// The headers by which the API server takes a request as `user`'s.
///
/// # Errors
/// A name or value that no header can hold.
pub(crate) fn headers(user: &UserInfo) -> Result<Vec<(HeaderName, HeaderValue)>, Refused> {
    let value = |text: &str, what: &'static str| {
        HeaderValue::from_bytes(text.as_bytes()).map_err(|_| Refused::NotImpersonable { what })
    };
    if user.username.is_empty() {
        return Err(Refused::NotImpersonable { what: "user name, which is empty" });
    }
    let mut headers = vec![(USER, value(&user.username, "user name")?)];
    if !user.uid.is_empty() {
        headers.push((UID, value(&user.uid, "uid")?));
    }
    for group in &user.groups {
        headers.push((GROUP, value(group, "group")?));
    }
    for (key, values) in &user.extra {
        let name = format!("{EXTRA_PREFIX}{}", escape_key(key));
        let name = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| Refused::NotImpersonable { what: "key of an extra attribute" })?;
        for one in values {
            headers.push((name.clone(), value(one, "extra attribute")?));
        }
    }
    Ok(headers)
}

/// What a client asks to be; none if it asks for nothing.
///
/// # Errors
/// Headers that make no sense together, or that Weir does not know.
pub(crate) fn requested(headers: &HeaderMap) -> Result<Option<UserInfo>, Refused> {
    if !headers.keys().any(|name| name.as_str().starts_with(IMPERSONATE_PREFIX)) {
        return Ok(None);
    }
    let malformed = |problem| Refused::Malformed { problem };
    let text = |value: &HeaderValue| {
        let text = std::str::from_utf8(value.as_bytes()).map(str::to_owned);
        text.map_err(|_| malformed("asks to impersonate by a header that is not UTF-8"))
    };
    let only = |name: &HeaderName| {
        let mut values = headers.get_all(name).iter();
        let first = values.next().map(text).transpose()?;
        match values.next() {
            Some(_) => Err(malformed("asks to impersonate two users")),
            None => Ok(first),
        }
    };
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in headers {
        let name = name.as_str();
        if let Some(key) = name.strip_prefix(EXTRA_PREFIX) {
            let key = unescape_key(key)
                .ok_or_else(|| malformed("asks to impersonate with an extra key that is not well escaped"))?;
            extra.entry(key).or_default().push(text(value)?);
        } else if name.starts_with(IMPERSONATE_PREFIX)
            && ![USER, UID, GROUP].iter().any(|known| known == name)
        {
            return Err(malformed("has an Impersonate header that Kubernetes does not know"));
        }
    }
    let groups = headers.get_all(GROUP).iter().map(text).collect::<Result<_, _>>()?;
    let user = UserInfo {
        username: only(&USER)?.unwrap_or_default(),
        uid: only(&UID)?.unwrap_or_default(),
        groups,
        extra,
    };
    if user.username.is_empty() {
        return Err(malformed("asks to impersonate groups, a uid or extra attributes, but no user"));
    }
    Ok(Some(user))
}

/// As client-go does it: what is no legal character of a header's name, and `%`, as `%XX`.
fn escape_key(key: &str) -> String {
    let mut escaped = String::with_capacity(key.len());
    for byte in key.bytes() {
        let legal = byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"!#$&'*+-.^_`|~".contains(&byte);
        if legal {
            escaped.push(char::from(byte));
        } else {
            use std::fmt::Write as _;
            // Writing to a string cannot fail.
            let _ = write!(escaped, "%{byte:02x}");
        }
    }
    escaped
}

fn unescape_key(key: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(key.len());
    let mut rest = key.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next()?, rest.next()?];
        let text = std::str::from_utf8(&digits).ok()?;
        bytes.push(u8::from_str_radix(text, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use http::{HeaderMap, HeaderName};
    use proptest::prelude::*;
    use weir_common::event::UserInfo;

    use super::{Refused, effective_groups, headers, requested, rights};

    fn map(user: &UserInfo) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in headers(user).expect("headers") {
            map.append(name, value);
        }
        map
    }

    #[test]
    fn a_user_becomes_the_headers_of_client_go() {
        let user = UserInfo {
            username: "ada".into(),
            uid: "7".into(),
            groups: vec!["dev".into(), "ops".into()],
            extra: BTreeMap::from([("weir.dev/session".into(), vec!["s".into()])]),
        };
        let map = map(&user);
        assert_eq!(map["impersonate-extra-weir.dev%2fsession"], "s");
        assert_eq!(map.get_all("impersonate-group").iter().count(), 2);
        assert_eq!(requested(&map).expect("well formed"), Some(user));
        assert_eq!(requested(&HeaderMap::new()).expect("nothing"), None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let with = |pairs: &[(&str, &str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in pairs {
                let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
                map.append(name, value.parse().expect("a value"));
            }
            requested(&map)
        };
        for pairs in [
            &[("impersonate-group", "dev")][..],
            &[("impersonate-uid", "7")],
            &[("impersonate-user", "a"), ("impersonate-user", "b")],
            &[("impersonate-user", "a"), ("impersonate-everything", "b")],
            &[("impersonate-user", "a"), ("impersonate-extra-%zz", "b")],
            &[("impersonate-user", "")],
        ] {
            assert!(with(pairs).is_err(), "{pairs:?}");
        }
        assert!(headers(&UserInfo::default()).is_err(), "no name");
        assert!(headers(&UserInfo { username: "a\nb".into(), ..UserInfo::default() }).is_err(), "two lines");
    }

    #[test]
    fn each_part_of_a_user_takes_a_right_of_its_own() {
        let user = UserInfo {
            username: "system:serviceaccount:ci:robot".into(),
            uid: "7".into(),
            groups: vec!["dev".into()],
            extra: BTreeMap::from([("example.dev/job".into(), vec!["a".into(), "b".into()])]),
        };
        let words: Vec<String> =
            rights(&user).expect("few").iter().map(|right| format!("{}: {right}", right.group)).collect();
        assert_eq!(
            words,
            [
                ": serviceaccounts \"robot\" in namespace \"ci\"",
                "authentication.k8s.io: uids \"7\"",
                ": groups \"dev\"",
                "authentication.k8s.io: userextras/example.dev/job \"a\"",
                "authentication.k8s.io: userextras/example.dev/job \"b\"",
            ]
        );
        let plain = UserInfo { username: "ada".into(), ..UserInfo::default() };
        assert_eq!(rights(&plain).expect("one")[0].to_string(), "users \"ada\"");
        let many = UserInfo { groups: vec!["g".into(); 32], ..plain };
        assert!(matches!(rights(&many), Err(Refused::Malformed { .. })));
    }

    #[test]
    fn an_impersonated_user_is_in_the_groups_that_the_api_server_adds() {
        let of = |username: &str, groups: &[&str]| {
            let groups = groups.iter().map(|group| (*group).to_owned()).collect();
            effective_groups(&UserInfo { username: username.into(), groups, ..UserInfo::default() })
        };
        assert_eq!(of("ada", &["dev"]), ["dev", "system:authenticated"]);
        assert_eq!(of("ada", &["system:authenticated"]), ["system:authenticated"]);
        assert_eq!(of("system:anonymous", &[]), Vec::<String>::new());
        assert_eq!(
            of("system:serviceaccount:ci:a", &[]),
            ["system:serviceaccounts", "system:serviceaccounts:ci", "system:authenticated"]
        );
        assert_eq!(of("system:serviceaccount:ci:a", &["dev"]), ["dev", "system:authenticated"]);
    }

    proptest! {
        #[test]
        fn what_is_asked_is_what_is_read(
            username in "[a-zA-Z0-9:@._-]{1,30}",
            groups in proptest::collection::vec("[ -~]{1,20}", 0..4),
            // The API server reads keys in lower case.
            extra in proptest::collection::btree_map("[a-z0-9/%. é-]{1,20}", proptest::collection::vec("[!-~]{1,9}", 1..3), 0..4),
        ) {
            let user = UserInfo { username, uid: String::new(), groups, extra };
            prop_assert_eq!(requested(&map(&user)).expect("well formed"), Some(user));
        }
    }
}
