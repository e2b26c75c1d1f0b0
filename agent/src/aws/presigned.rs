//! Signs URLs (Signature Version 4 in the query): whoever has one may make this one request, until it ends.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use aws_credential_types::Credentials as SigningCredentials;
use aws_sigv4::{
    http_request::{SignableBody, SignableRequest, SignatureLocation, SigningSettings, sign},
    sign::v4,
};
use zeroize::Zeroizing;

use super::{credentials::Credentials, error::StsError};

/// A GET without a body.
pub(super) struct Request<'a> {
    /// With a query already, encoded as SigV4 does it.
    pub(super) url: &'a str,
    /// Those that are signed: who makes the request must send the same.
    pub(super) headers: &'a [(&'a str, &'a str)],
    /// As SigV4 calls it.
    pub(super) service: &'a str,
    pub(super) region: &'a str,
    pub(super) expires: Duration,
}

impl Request<'_> {
    /// The URL with its signature.
    ///
    /// # Errors
    /// It cannot be signed.
    pub(super) fn presigned(
        &self,
        credentials: &Credentials,
        now: SystemTime,
    ) -> Result<Zeroizing<String>, StsError> {
        let failed = |cause: String| StsError::Signing { cause: cause.into() };
        let identity = SigningCredentials::new(
            credentials.access_key_id.as_str(),
            credentials.secret_access_key.as_str(),
            Some(credentials.session_token.as_str().to_owned()).filter(|token| !token.is_empty()),
            None,
            "weir",
        )
        .into();
        let mut settings = SigningSettings::default();
        settings.signature_location = SignatureLocation::QueryParams;
        settings.expires_in = Some(self.expires);
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region(self.region)
            .name(self.service)
            .time(now)
            .settings(settings)
            .build()
            .map_err(|error| failed(error.to_string()))?
            .into();
        let headers = self.headers.iter().copied();
        let request = SignableRequest::new("GET", self.url, headers, SignableBody::Bytes(&[]))
            .map_err(|error| failed(error.to_string()))?;
        let (instructions, _) =
            sign(request, &params).map_err(|error| failed(error.to_string()))?.into_parts();
        let (_, query) = instructions.into_parts();
        // Every byte may become three; room for all from the start, so that no copy is left behind by growing.
        let room: usize = query.iter().map(|(name, value)| name.len() + value.len() * 3 + 2).sum();
        let mut url = Zeroizing::new(String::with_capacity(self.url.len() + room));
        url.push_str(self.url);
        for (name, value) in query {
            let value = Zeroizing::new(value.into_owned());
            url.push('&');
            url.push_str(name);
            url.push('=');
            push_encoded(&mut url, &value);
        }
        Ok(url)
    }
}

/// As SigV4 encodes the values of a query: everything but `A-Z a-z 0-9 - . _ ~`.
fn push_encoded(url: &mut String, value: &str) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            url.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(url, "%{byte:02X}");
        }
    }
}
