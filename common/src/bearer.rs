//! What can be seen of a bearer token without knowing its issuer: its form, and when it says that it ends. Nothing here makes
//! a token credible.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

/// Longest token: larger ones fit in no header of the servers that take them.
pub const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// Whether a text can be a token: visible ASCII, so that it ends no field of the protocol that carries it.
#[must_use]
pub fn is_token(text: &str) -> bool {
    !text.is_empty() && text.len() <= TOKEN_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// When a JSON Web Token says that it ends, in seconds since the Unix epoch; none if it does not, or is none.
#[must_use]
pub fn expiry(token: &str) -> Option<i64> {
    let mut parts = token.split('.');
    let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let claims: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    let end = claims.get("exp")?;
    // RFC 7519: a number, also one with a fraction.
    #[expect(clippy::cast_possible_truncation, reason = "a float that is no i64 becomes the nearest")]
    end.as_i64().or_else(|| end.as_f64().map(|end| end as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(claims: &str) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims))
    }

    #[test]
    fn the_end_of_a_token_is_read_where_it_says_one() {
        assert_eq!(expiry(&token(r#"{"exp":1795891810}"#)), Some(1_795_891_810));
        assert_eq!(expiry(&token(r#"{"exp":1795891810.9,"iat":1}"#)), Some(1_795_891_810));
        for text in ["", "opaque", "a.b", "a.b.c", "a.b.c.d", &token("{}"), &token(r#"{"exp":"1"}"#)] {
            assert_eq!(expiry(text), None, "{text}");
        }
    }

    #[test]
    fn what_would_end_a_field_is_no_token() {
        assert!(is_token("abc.def-_~+/="));
        let long = "a".repeat(TOKEN_BYTES_MAX + 1);
        for text in ["", "a b", "a\u{1}b", "a\nb", "ä", &long] {
            assert!(!is_token(text), "{text:?}");
        }
    }
}
