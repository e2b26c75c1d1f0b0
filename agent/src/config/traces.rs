//! Where traces of requests are sent.

use std::path::PathBuf;

use http::Uri;
use rustls::pki_types::ServerName;
use serde::Deserialize;

use super::raw::{Invalid, invalid, readable};

/// Where collectors take traces (OTLP over HTTP), where the endpoint does not say.
const STANDARD_PATH: &str = "/v1/traces";

/// Where traces are sent, and how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    /// The collector.
    pub endpoint: CollectorEndpoint,
    /// File of authorities (PEM) to verify it by; absent: those that the node trusts.
    pub certificate_authority: Option<PathBuf>,
    /// So many of a hundred.
    pub sample_percent: u8,
}

/// The URL of a collector, in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectorEndpoint {
    /// Host name or address, without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// What stands in the `Host` header.
    pub authority: String,
    /// Path, beginning with a slash.
    pub path: String,
    /// The name that its certificate is verified for; none: it is spoken to in clear.
    pub tls: Option<ServerName<'static>>,
}

// As it is written.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct RawTraces {
    /// URL of a collector that takes OTLP over HTTP (protobuf): `https://HOST[:PORT]`, or `http://` to one of the same node, since
    /// names of users and pods go there in clear. Without a path: `/v1/traces`. No user, password or query may stand in it.
    endpoint: String,
    /// File with the authorities (PEM) by which the collector is verified. Without it: those that the node trusts.
    certificate_authority: Option<PathBuf>,
    /// How many of a hundred connections and requests are traced, chosen at random.
    #[cfg_attr(test, schemars(range(min = 1, max = 100)))]
    #[serde(default = "all")]
    sample_percent: u8,
}

fn all() -> u8 {
    100
}

impl RawTraces {
    pub(super) fn validate(self) -> Result<Traces, Invalid> {
        if !(1..=100).contains(&self.sample_percent) {
            return invalid("traces.samplePercent", "must be from 1 to 100; leave `traces` out to have none");
        }
        let endpoint = match endpoint(&self.endpoint) {
            Ok(endpoint) => endpoint,
            Err(problem) => return invalid("traces.endpoint", problem),
        };
        let certificate_authority = self
            .certificate_authority
            .map(|path| readable("traces.certificateAuthority".to_owned(), path))
            .transpose()?;
        Ok(Traces { endpoint, certificate_authority, sample_percent: self.sample_percent })
    }
}

fn endpoint(text: &str) -> Result<CollectorEndpoint, &'static str> {
    const NO_URL: &str = "is no URL; say `https://HOST:PORT` or `http://HOST:PORT`";
    let uri: Uri = text.parse().map_err(|_| NO_URL)?;
    let authority = uri.authority().ok_or(NO_URL)?;
    if authority.as_str().contains('@') || uri.query().is_some() {
        return Err(
            "has a user, password or query, which would be a secret in this file; have a collector of yours add it",
        );
    }
    let host = authority.host().trim_matches(['[', ']']).to_owned();
    let (port, tls) = match uri.scheme_str() {
        Some("https") => {
            let name = ServerName::try_from(host.clone()).map_err(|_| "has a host that is no name")?;
            (443, Some(name))
        }
        Some("http") => (80, None),
        _ => return Err(NO_URL),
    };
    let path = if matches!(uri.path(), "" | "/") { STANDARD_PATH } else { uri.path() };
    Ok(CollectorEndpoint {
        host,
        port: authority.port_u16().unwrap_or(port),
        authority: authority.as_str().to_owned(),
        path: path.to_owned(),
        tls,
    })
}

#[cfg(test)]
mod tests {
    use super::endpoint;

    #[test]
    fn an_endpoint_is_a_url_without_secrets() {
        let read = endpoint("https://collector.example.com").expect("is one");
        assert_eq!((read.port, read.path.as_str(), read.tls.is_some()), (443, "/v1/traces", true));
        let read = endpoint("http://[::1]:4318/otlp/v1/traces").expect("is one");
        assert_eq!((read.host.as_str(), read.port, read.path.as_str()), ("::1", 4318, "/otlp/v1/traces"));
        assert_eq!((read.authority.as_str(), read.tls), ("[::1]:4318", None));
        for wrong in ["", "collector:4318", "grpc://collector:4317", "https://", "/v1/traces"] {
            assert!(endpoint(wrong).is_err_and(|problem| problem.contains("no URL")), "{wrong}");
        }
        for secret in ["https://user:password@collector", "https://collector/v1/traces?key=secret"] {
            assert!(endpoint(secret).is_err_and(|problem| problem.contains("secret")), "{secret}");
        }
    }
}
