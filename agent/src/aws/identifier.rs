//! Names that STS takes and CloudTrail shows: role ARNs, session names, source identities, session tags.
//!
//! Pure. A name that comes from a caller is *fitted* to STS's rules: deterministic, valid, and two different texts never
//! become one name, since trust policies and access entries may compare these values. What an operator wrote is refused instead.

use std::fmt;

use sha2::{Digest, Sha256};

use super::request::RequestError;

/// Shortest session name and source identity of STS.
const NAME_CHARS_MIN: usize = 2;
/// Longest session name and source identity of STS.
const NAME_CHARS_MAX: usize = 64;
/// Longest key of a session tag.
const TAG_KEY_CHARS_MAX: usize = 128;
/// Longest value of a session tag.
const TAG_VALUE_CHARS_MAX: usize = 256;
/// Longest ARN of STS.
const ARN_BYTES_MAX: usize = 2048;
/// Hexadecimal digits of a fitted name's digest: 64 bits, so that nobody finds a text that is fitted to a name that he
/// wants.
const DIGEST_CHARS: usize = 16;
/// The prefix that AWS keeps for itself in keys of tags and in source identities.
const RESERVED: &str = "aws:";

/// ARN of an IAM role.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RoleArn(String);

/// `RoleSessionName`: in CloudTrail, in the assumed role's ARN, and in `user.extra` of the cluster's audit log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionName(String);

/// `SourceIdentity`: set once, and kept through every role that is assumed from there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceIdentity(String);

/// A session tag.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    key: String,
    value: String,
}

impl RoleArn {
    /// # Errors
    /// It is no ARN of a role.
    pub fn parse(text: &str) -> Result<Self, RequestError> {
        let refused = || RequestError::RoleArn { arn: text.chars().take(ARN_BYTES_MAX).collect() };
        let parts: Vec<&str> = text.splitn(6, ':').collect();
        let [arn, partition, service, region, account, resource] = parts[..] else { return Err(refused()) };
        let is_role = arn == "arn"
            && partition.starts_with("aws")
            && partition.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-')
            && service == "iam"
            && region.is_empty()
            && account.len() == 12
            && account.bytes().all(|byte| byte.is_ascii_digit())
            && resource.strip_prefix("role/").is_some_and(|path| !path.is_empty() && !path.ends_with('/'))
            && resource.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'*')
            && text.len() <= ARN_BYTES_MAX;
        if is_role { Ok(Self(text.to_owned())) } else { Err(refused()) }
    }

    /// The ARN.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RoleArn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Debug for RoleArn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl SessionName {
    /// Fits any text.
    #[must_use]
    pub fn fit(text: &str) -> Self {
        Self(fit(text, is_name_char, NAME_CHARS_MIN, NAME_CHARS_MAX))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SourceIdentity {
    /// Fits any text.
    #[must_use]
    pub fn fit(text: &str) -> Self {
        // `aws:` cannot be left after this: the colon is not in the set.
        Self(fit(text, is_name_char, NAME_CHARS_MIN, NAME_CHARS_MAX))
    }

    /// The identity.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Tag {
    /// A tag of a key that an operator or Weir itself chose and a value that may come from a caller: this one is fitted.
    ///
    /// # Errors
    /// The key is none that STS takes.
    pub fn new(key: &str, value: &str) -> Result<Self, RequestError> {
        let chars = key.chars().count();
        let is_reserved = key.get(..RESERVED.len()).is_some_and(|start| start.eq_ignore_ascii_case(RESERVED));
        if chars == 0 || chars > TAG_KEY_CHARS_MAX || is_reserved || !key.chars().all(is_tag_char) {
            return Err(RequestError::TagKey { key: key.chars().take(TAG_KEY_CHARS_MAX).collect() });
        }
        Ok(Self { key: key.to_owned(), value: fit(value, is_tag_char, 0, TAG_VALUE_CHARS_MAX) })
    }

    /// Key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Value, as fitted.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }
}

/// STS: `[\w+=,.@-]`.
fn is_name_char(char: char) -> bool {
    char.is_ascii_alphanumeric() || "_+=,.@-".contains(char)
}

/// STS: `[\p{L}\p{Z}\p{N}_.:/=+\-@]`. Of its letters, digits and separators only those of ASCII: others are fitted,
/// so that two that look the same are not.
fn is_tag_char(char: char) -> bool {
    char.is_ascii_alphanumeric() || " _.:/=+-@".contains(char)
}

/// The text itself where it is valid. Else its valid characters, `-` for the others, and a digest of the text.
///
/// A valid text that ends as a fitted one does is fitted, too; so no text is fitted to another one's name.
fn fit(text: &str, is_allowed: fn(char) -> bool, chars_min: usize, chars_max: usize) -> String {
    let mut chars = 0;
    // Stops early: the text may be far longer than a name.
    let is_valid = text.chars().take(chars_max + 1).inspect(|_| chars += 1).all(is_allowed);
    if is_valid && (chars_min..=chars_max).contains(&chars) && !is_fitted(text) {
        return text.to_owned();
    }
    let kept = text.chars().take(chars_max - DIGEST_CHARS - 1);
    let mut name: String = kept.map(|char| if is_allowed(char) { char } else { '-' }).collect();
    name.push('-');
    name.push_str(&hex::encode(Sha256::digest(text))[..DIGEST_CHARS]);
    name
}

/// Whether it ends in `-` and as many hexadecimal digits as a fitted name does.
fn is_fitted(text: &str) -> bool {
    let Some(at) = text.len().checked_sub(DIGEST_CHARS + 1) else { return false };
    let end = &text.as_bytes()[at..];
    end[0] == b'-' && end[1..].iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_valid_name_stays_as_it_is() {
        for name in ["ci-deploy", "alice@example.com", "0198f1f0-5b8e-7c3a-9d55-1d2f6a7b8c9d", "a,b=c+d_e.f"]
        {
            assert_eq!(SessionName::fit(name).as_str(), name);
            assert_eq!(SourceIdentity::fit(name).as_str(), name);
        }
    }

    #[test]
    fn what_sts_does_not_take_is_replaced_and_told_apart() {
        let name = SessionName::fit("system:serviceaccount:ci:runner");
        assert_eq!(name.as_str(), "system-serviceaccount-ci-runner-b6bb33cf66095121");
        assert_ne!(name, SessionName::fit("system-serviceaccount:ci:runner"));
        assert_eq!(SessionName::fit("").as_str(), "-e3b0c44298fc1c14");
        // A caller whose name is, letter by letter, what another one's is fitted to.
        assert_ne!(name, SessionName::fit("system-serviceaccount-ci-runner-b6bb33cf66095121"));
    }

    #[test]
    fn a_tag_keeps_the_values_of_kubernetes() {
        let tag = Tag::new("weir:service-account", "system:serviceaccount:ci:runner").unwrap();
        assert_eq!((tag.key(), tag.value()), ("weir:service-account", "system:serviceaccount:ci:runner"));
        assert_eq!(Tag::new("team", "").unwrap().value(), "");
        for key in ["", "aws:x", "AWS:x", "a*b", "schlüssel", &"k".repeat(129)] {
            assert!(Tag::new(key, "v").is_err(), "{key}");
        }
    }

    #[test]
    fn only_arns_of_roles_are_taken() {
        for arn in [
            "arn:aws:iam::123456789012:role/deploy",
            "arn:aws-cn:iam::123456789012:role/a/path/deploy",
            "arn:aws-us-gov:iam::123456789012:role/service-role/x+y=z,.@-",
        ] {
            assert_eq!(RoleArn::parse(arn).unwrap().as_str(), arn);
        }
        for arn in [
            "",
            "deploy",
            "arn:aws:iam::123456789012:user/alice",
            "arn:aws:iam::123456789012:role/",
            "arn:aws:iam::123456789012:role/*",
            "arn:aws:iam::1234:role/deploy",
            "arn:aws:iam:eu-central-1:123456789012:role/deploy",
            "arn:aws:sts::123456789012:assumed-role/deploy/x",
            "arn:gcp:iam::123456789012:role/deploy",
            "arn:aws:iam::123456789012:role/a b",
        ] {
            assert!(RoleArn::parse(arn).is_err(), "{arn}");
        }
    }

    proptest! {
        #[test]
        fn every_text_becomes_a_valid_session_name(text in any::<String>()) {
            let name = SessionName::fit(&text);
            let chars = name.as_str().chars().count();
            prop_assert!((2..=64).contains(&chars));
            prop_assert!(name.as_str().chars().all(|c| c.is_ascii_alphanumeric() || "_+=,.@-".contains(c)));
            prop_assert_eq!(&name, &SessionName::fit(&text));
        }

        #[test]
        fn every_text_becomes_a_valid_value_of_a_tag(text in any::<String>()) {
            let tag = Tag::new("k", &text).unwrap();
            prop_assert!(tag.value().chars().count() <= 256);
            prop_assert!(tag.value().chars().all(|c| c.is_ascii_alphanumeric() || " _.:/=+-@".contains(c)));
        }

        #[test]
        fn different_texts_become_different_names(text in "[a-c:/@-]{0,70}", other in "[a-c:/@-]{0,70}") {
            prop_assume!(text != other);
            prop_assert_ne!(SessionName::fit(&text), SessionName::fit(&other));
            // The strongest candidates for one name: a text, and what it is fitted to.
            let fitted = SessionName::fit(&text);
            if fitted.as_str() != text {
                prop_assert_ne!(&SessionName::fit(fitted.as_str()), &fitted);
            }
        }
    }
}
