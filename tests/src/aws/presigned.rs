//! The check of presigned requests, as STS makes it: signature, validity, session token. Written from AWS's description of
//! Signature Version 4, apart from any signer that Weir uses.
//!
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html>

use std::collections::BTreeMap;
use std::fmt::Write as _;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

/// STS takes a presigned request for so long, whatever X-Amz-Expires says.
const LIFE_SECONDS: i64 = 15 * 60;

/// How far a clock may be ahead.
const AHEAD_SECONDS: i64 = 5 * 60;

/// What was issued for an access key.
#[derive(Clone, Debug)]
pub(super) struct Issued {
    pub(super) secret_access_key: String,
    pub(super) session_token: String,
    /// In seconds since 1970, where it is before what was asked for.
    pub(super) expires: Option<i64>,
}

/// A request as it arrived.
pub(super) struct Presigned<'a> {
    pub(super) query: &'a str,
    /// By lower-case name.
    pub(super) headers: BTreeMap<String, String>,
}

/// An error code of AWS and its words.
pub(super) type Refusal = (&'static str, String);

impl Presigned<'_> {
    /// The pairs of its query, decoded.
    pub(super) fn parameters(&self) -> BTreeMap<String, String> {
        pairs(self.query)
    }

    /// Checks it at `now` (seconds since 1970) with what was issued for its access key.
    pub(super) fn check(&self, now: i64, issued: impl Fn(&str) -> Option<Issued>) -> Result<(), Refusal> {
        let parameters = self.parameters();
        let parameter = |name: &str| {
            let missing = || ("IncompleteSignature", format!("there is no {name}"));
            parameters.get(name).cloned().ok_or_else(missing)
        };
        let date = parameter("X-Amz-Date")?;
        let made = seconds(&date).ok_or(("IncompleteSignature", format!("{date} is no date")))?;
        if now > made + LIFE_SECONDS {
            return Err((
                "SignatureDoesNotMatch",
                format!("Signature expired: {date} is now earlier than now"),
            ));
        }
        if made > now + AHEAD_SECONDS {
            return Err((
                "SignatureDoesNotMatch",
                format!("Signature not yet current: {date} is still later than now"),
            ));
        }
        let credential = parameter("X-Amz-Credential")?;
        let (access_key_id, scope) = credential.split_once('/').unwrap_or_default();
        let invalid =
            || ("InvalidClientTokenId", "The security token included in the request is invalid".to_owned());
        let issued = issued(access_key_id).ok_or_else(invalid)?;
        if parameters.get("X-Amz-Security-Token") != Some(&issued.session_token) {
            return Err(invalid());
        }
        if issued.expires.is_some_and(|expires| expires <= now) {
            return Err(("ExpiredToken", "The security token included in the request is expired".to_owned()));
        }
        let expected = self.signature(&parameters, &date, scope, &issued.secret_access_key);
        if parameter("X-Amz-Signature")? != expected {
            let message = "The request signature we calculated does not match the signature you provided.";
            return Err(("SignatureDoesNotMatch", message.to_owned()));
        }
        Ok(())
    }

    fn signature(
        &self,
        parameters: &BTreeMap<String, String>,
        date: &str,
        scope: &str,
        secret: &str,
    ) -> String {
        let signed: Vec<&str> =
            parameters.get("X-Amz-SignedHeaders").map(|names| names.split(';').collect()).unwrap_or_default();
        let query: Vec<String> = parameters
            .iter()
            .filter(|(name, _)| *name != "X-Amz-Signature")
            .map(|(name, value)| format!("{}={}", encoded(name), encoded(value)))
            .collect();
        let mut canonical = format!("GET\n/\n{}\n", query.join("&"));
        for name in &signed {
            let value = self.headers.get(*name).map_or("", |value| value.trim());
            let _ = writeln!(canonical, "{name}:{value}");
        }
        let _ = write!(canonical, "\n{}\n{}", signed.join(";"), hex::encode(Sha256::digest(b"")));
        let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex::encode(Sha256::digest(canonical)));
        let key = scope.split('/').fold(format!("AWS4{secret}").into_bytes(), |key, part| mac(&key, part));
        hex::encode(mac(&key, &text))
    }
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return Vec::new() };
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// The pairs of a query or form; what is no escape stays as it is.
pub(super) fn pairs(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (decoded(name), decoded(value))).collect()
}

fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let escape = text.get(at + 1..at + 3).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (bytes[at], escape) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Seconds since 1970 of `20260101T000000Z`.
fn seconds(date: &str) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| date.get(range)?.parse::<i64>().ok();
    let (year, month, day) = (number(0..4)?, number(4..6)?, number(6..8)?);
    let (hour, minute, second) = (number(9..11)?, number(11..13)?, number(13..15)?);
    // Days from civil, Howard Hinnant: years begin in March, so that the leap day is the last.
    let shifted = if month > 2 { year } else { year - 1 };
    let (era, year_of_era) = (shifted.div_euclid(400), shifted.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days =
        era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made with aws-sdk-go 1.44.332's v4 signer.
    const QUERY: &str = "Action=GetCallerIdentity&Version=2011-06-15&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=\
        ASIAEXAMPLE%2F20260101%2Fus-east-1%2Fsts%2Faws4_request&X-Amz-Date=20260101T000000Z&X-Amz-Expires=60\
        &X-Amz-Security-Token=IQoJb3JpZ2luX2Vj%2Ba%2Fb%3D%3D&X-Amz-SignedHeaders=host%3Bx-k8s-aws-id\
        &X-Amz-Signature=dac3826a1403a0fc370e378debedac721c75dffb8e0d9df7867353f667e3d45e";
    const AT: i64 = 1_767_225_600;

    fn check(query: &str, cluster: &str, now: i64) -> Result<(), Refusal> {
        let headers = [("host", "sts.us-east-1.amazonaws.com"), ("x-k8s-aws-id", cluster)];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let issued = |id: &str| {
            (id == "ASIAEXAMPLE").then(|| Issued {
                secret_access_key: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".to_owned(),
                session_token: "IQoJb3JpZ2luX2Vj+a/b==".to_owned(),
                expires: Some(AT + 899),
            })
        };
        Presigned { query, headers }.check(now, issued)
    }

    #[test]
    fn what_another_signer_signed_is_taken_and_nothing_else() {
        check(QUERY, "ci-cluster_2", AT + 898).unwrap();
        assert_eq!(check(QUERY, "ci-cluster_2", AT + 899).unwrap_err().0, "ExpiredToken");
        assert_eq!(check(QUERY, "another", AT).unwrap_err().0, "SignatureDoesNotMatch");
        assert!(check(QUERY, "ci-cluster_2", AT + 901).unwrap_err().1.starts_with("Signature expired"));
        assert!(
            check(QUERY, "ci-cluster_2", AT - 600).unwrap_err().1.starts_with("Signature not yet current")
        );
        let other = QUERY.replace("Expires=60", "Expires=61");
        assert_eq!(check(&other, "ci-cluster_2", AT).unwrap_err().0, "SignatureDoesNotMatch");
        let other = QUERY.replace("ASIAEXAMPLE", "ASIAOTHER");
        assert_eq!(check(&other, "ci-cluster_2", AT).unwrap_err().0, "InvalidClientTokenId");
        let other = QUERY.replace("IQoJ", "IQoK");
        assert_eq!(check(&other, "ci-cluster_2", AT).unwrap_err().0, "InvalidClientTokenId");
    }
}
