//! Addresses that the SDK of AWS is asked to use in place of AWS's own: none may be one where others on the way read what is sent.
//!
//! The environment (`AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_STS` …), a profile or a proxy of the network can lead anywhere; what goes there
//! are keys, tokens and signed requests. Each client has [`Confidential`], and [`check_environment`] refuses at the start what the SDK would
//! only use later, also for calls of its own.

use std::{error::Error, ffi::OsString, net::IpAddr, sync::Arc};

use aws_sdk_kms::{
    config::{ConfigBag, Intercept, RuntimeComponents, interceptors::BeforeTransmitInterceptorContextRef},
    error::BoxError,
};
use http::{Uri, uri::Scheme};

use super::shortened;

/// Variables that name an address: for all services, or for one of those that are asked, by Weir or for the credentials that it has.
const VARIABLES: [&str; 6] = [
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_KMS",
    "AWS_ENDPOINT_URL_SIGNIN",
    "AWS_ENDPOINT_URL_SSO",
    "AWS_ENDPOINT_URL_SSO_OIDC",
    "AWS_ENDPOINT_URL_STS",
];

/// Keys or credentials would cross the network in clear.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{endpoint} is not https: keys and credentials would cross the network in clear; mend {named} (http is for loopback alone)"
)]
pub struct PlainEndpoint {
    /// Address that was to be asked.
    endpoint: Arc<str>,
    /// What may name it.
    named: Arc<str>,
}

impl PlainEndpoint {
    /// What [`Confidential`] said, if an error comes from there.
    #[must_use]
    pub fn of(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(plain) = error.downcast_ref::<Self>() {
                return Some(plain.clone());
            }
            cause = error.source();
        }
        None
    }
}

/// Keeps every request from an address that would let others read it, wherever the SDK has that address from: the environment, a
/// profile, or AWS's own rules. It comes before anything is sent.
#[derive(Debug)]
pub struct Confidential;

impl Intercept for Confidential {
    fn name(&self) -> &'static str {
        "Confidential"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        Ok(confidential(context.request().uri())?)
    }
}

/// Whether nobody on the way reads what is sent there: TLS, or it does not leave the machine.
///
/// # Errors
/// Others might read it.
pub fn confidential(endpoint: &str) -> Result<(), PlainEndpoint> {
    if is_confidential(endpoint) {
        return Ok(());
    }
    let named = "AWS_ENDPOINT_URL, that of the service (AWS_ENDPOINT_URL_KMS, AWS_ENDPOINT_URL_STS) or endpoint_url in the AWS profile";
    Err(PlainEndpoint { endpoint: shown(endpoint), named: named.into() })
}

/// The same for each variable of an environment that names an address for the SDK. A profile's `services` are not looked at: there
/// [`Confidential`] alone stands, and the SDK's own call of web identity does not have it.
///
/// # Errors
/// The first one that names an address where others might read.
pub fn check_environment(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<(), PlainEndpoint> {
    for (name, endpoint) in variables {
        let Some(name) = name.to_str().filter(|name| VARIABLES.contains(name)) else { continue };
        // Empty is as good as none for the SDK.
        let endpoint = endpoint.to_string_lossy();
        if !endpoint.is_empty() && !is_confidential(&endpoint) {
            return Err(PlainEndpoint { endpoint: shown(&endpoint), named: shortened(name) });
        }
    }
    Ok(())
}

fn is_confidential(endpoint: &str) -> bool {
    let uri = endpoint.parse::<Uri>().unwrap_or_default();
    let is_loopback = |host: &str| {
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        address.map_or_else(|_| host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
    };
    uri.scheme() == Some(&Scheme::HTTPS)
        || uri.scheme() == Some(&Scheme::HTTP) && uri.host().is_some_and(is_loopback)
}

/// Neither a path nor what stands before a host: there may be a password.
fn shown(endpoint: &str) -> Arc<str> {
    let uri = endpoint.parse::<Uri>().unwrap_or_default();
    match (uri.scheme_str(), uri.host()) {
        (Some(scheme), Some(host)) => shortened(&format!("{scheme}://{host}")),
        _ => "the endpoint of AWS".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::{check_environment, confidential};

    const CONFIDENTIAL: [&str; 5] = [
        "https://kms.eu-central-1.amazonaws.com",
        "http://127.0.0.1:8080",
        "http://127.1.2.3/",
        "http://[::1]:1",
        "http://LOCALHOST:1",
    ];
    const PLAIN: [&str; 6] = [
        "kms",
        "ftp://127.0.0.1",
        "http://10.0.0.1",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://user:pass-4711@10.0.0.1/pass-4711",
    ];

    #[test]
    fn https_and_loopback_are_confidential_and_nothing_else_is() {
        CONFIDENTIAL.iter().for_each(|endpoint| confidential(endpoint).unwrap());
        for endpoint in PLAIN.iter().chain(&[""]) {
            let said = confidential(endpoint).unwrap_err().to_string();
            assert!(!said.contains("pass-4711"), "{said}");
        }
    }

    #[test]
    fn each_variable_that_leads_the_sdk_elsewhere_is_looked_at_and_no_other() {
        let of = |name: &str, value: &str| {
            check_environment([("PATH".into(), "/bin".into()), (name.into(), value.into())])
        };
        for name in
            ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL_SSO_OIDC"]
        {
            CONFIDENTIAL.iter().for_each(|endpoint| of(name, endpoint).unwrap());
            for endpoint in PLAIN {
                let said = of(name, endpoint).unwrap_err().to_string();
                assert!(said.contains(&format!("mend {name} (")) && !said.contains("pass-4711"), "{said}");
            }
            of(name, "").unwrap();
        }
        // Nobody here asks S3.
        for other in ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URLS", "HTTP_PROXY"] {
            of(other, "http://10.0.0.1").unwrap();
        }
    }
}
