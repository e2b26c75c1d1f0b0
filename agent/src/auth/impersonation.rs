//! Impersonation as Kubernetes does it: a user as `Impersonate-*` headers, and back. Sans-IO.
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

    use super::{headers, requested};

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
