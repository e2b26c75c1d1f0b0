//! What a certificate signing request asks for, and whether an agent may have it. Sans-IO: the request and the names of the
//! API server in, a verdict out.
//!
//! The signer behind it signs whatever is approved: it takes subject and names from the request's PKCS#10 part, usages and life
//! from the object. So both are judged, and whatever is not known is refused. The request's bytes are untrusted, and read by
//! others again when they are signed: what two readers could take for two things is refused too.

use std::net::IpAddr;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::{ExtendedKeyUsage, GeneralName, ParsedExtension},
    oid_registry::{OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME},
    prelude::FromDer as _,
};

use super::{
    ServingNames,
    cluster_signer::{EXPIRATION_SECONDS_MAX, USAGES},
};

/// Longest request that is looked at; an agent's has less than a kilobyte, and some more with many names.
const REQUEST_BYTES_MAX: usize = 16 << 10;
/// Longest part of a request's own words in a message.
const QUOTED_CHARS_MAX: usize = 80;
/// Group of those whose requests the signer takes (k8s.io/kubernetes `pkg/apis/certificates/helpers.go`).
const ORGANIZATION: &str = "system:nodes";
const PEM_BEGIN: &str = "-----BEGIN CERTIFICATE REQUEST-----";
const PEM_END: &str = "-----END CERTIFICATE REQUEST-----";

/// What is judged of a request's object.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Who made it, by the API server's word.
    pub user: &'a str,
    /// The node of the pod that the maker's token is bound to, by the API server's word; not exactly one: none.
    pub node: Option<&'a str>,
    /// The request, PEM.
    pub pem: &'a [u8],
    /// `spec.usages`.
    pub usages: &'a [String],
    /// `spec.expirationSeconds`.
    pub expiration_seconds: Option<i32>,
}

/// Why a request is denied. The text becomes the message of the condition, so each says what would be right.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// Somebody else's.
    #[error(
        "{user} asks, and only {agent} may; name requests of your own otherwise than weir-serving-…, or give the approver the \
         agent's service account (--service-account)"
    )]
    NotTheAgent {
        /// Who asks.
        user: String,
        /// Who may.
        agent: String,
    },
    /// A token that is bound to no pod.
    #[error(
        "the token of {user} names no node: it is bound to no pod, and whoever has it could be anywhere; only a token that the \
         kubelet has mounted into the agent's pod will do (Kubernetes 1.32 or later)"
    )]
    NotBoundToNode {
        /// Who asks.
        user: String,
    },
    /// Longer than a day, or as long as the signer likes.
    #[error("expirationSeconds is {asked}, and must be given and at most {EXPIRATION_SECONDS_MAX}")]
    Life {
        /// What is asked for.
        asked: String,
    },
    /// Others than for serving.
    #[error("usages are {asked}, and may be {} alone", USAGES.join(", "))]
    Usages {
        /// What is asked for.
        asked: String,
    },
    /// No request at all, or one that two readers could read differently.
    #[error("spec.request cannot be read: {problem}")]
    Unreadable {
        /// What is wrong.
        problem: String,
    },
    /// Another subject.
    #[error(
        "the subject is {asked}, and must be O={ORGANIZATION}, CN=system:node:{node}, of the node that the token is bound to"
    )]
    Subject {
        /// What is asked for.
        asked: String,
        /// The node.
        node: String,
    },
    /// Something that is asked for beside names.
    #[error("the request asks for {asked}; names, key usage and server auth are all that an agent needs")]
    Extension {
        /// What.
        asked: String,
    },
    /// A name that is not the API server's.
    #[error(
        "{name} is not a name or address of the API server; those are {allowed} (the Service and EndpointSlices \
         default/kubernetes, hostNames and addresses of the configuration)"
    )]
    Name {
        /// The name.
        name: String,
        /// Those that are.
        allowed: String,
    },
    /// A certificate for nobody.
    #[error("the request has no name")]
    NoName,
}

impl Denial {
    /// All of [`Self::kind`].
    pub const KINDS: [&str; 9] = [
        "not_the_agent",
        "not_bound_to_node",
        "life",
        "usages",
        "unreadable",
        "subject",
        "extension",
        "name",
        "no_name",
    ];

    /// A word for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotTheAgent { .. } => "not_the_agent",
            Self::NotBoundToNode { .. } => "not_bound_to_node",
            Self::Life { .. } => "life",
            Self::Usages { .. } => "usages",
            Self::Unreadable { .. } => "unreadable",
            Self::Subject { .. } => "subject",
            Self::Extension { .. } => "extension",
            Self::Name { .. } => "name",
            Self::NoName => "no_name",
        }
    }
}

/// Whether `agent` (a user name) may have what it asks for, where `allowed` are all names of the API server.
///
/// # Errors
/// It may not; the reason.
pub fn judge(asked: &Asked<'_>, agent: &str, allowed: &ServingNames) -> Result<(), Denial> {
    if asked.user != agent {
        return Err(Denial::NotTheAgent { user: quoted(asked.user), agent: agent.to_owned() });
    }
    let node = asked.node.filter(|node| !node.is_empty());
    let node = node.ok_or_else(|| Denial::NotBoundToNode { user: quoted(asked.user) })?;
    let life = asked.expiration_seconds;
    if !life.is_some_and(|life| (1..=EXPIRATION_SECONDS_MAX).contains(&life)) {
        return Err(Denial::Life { asked: life.map_or("not given".to_owned(), |life| life.to_string()) });
    }
    let is_known = |usage: &String| USAGES.contains(&usage.as_str());
    if !asked.usages.iter().all(is_known) || !asked.usages.iter().any(|usage| usage == "server auth") {
        return Err(Denial::Usages { asked: quoted(&asked.usages.join(", ")) });
    }
    let der = der(asked.pem)?;
    let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|error| unreadable(&error))?;
    if !rest.is_empty() {
        return Err(unreadable(&"there is something behind it"));
    }
    request.verify_signature().map_err(|_| unreadable(&"its signature is not of its own key"))?;
    subject(&request, node)?;
    let names = names(&request)?;
    if names.is_empty() {
        return Err(Denial::NoName);
    }
    names.iter().try_for_each(|name| name_is_allowed(name, allowed))
}

fn unreadable(problem: &dyn std::fmt::Display) -> Denial {
    Denial::Unreadable { problem: quoted(&problem.to_string()) }
}

/// A request's own words, for a message: bounded, and without what a terminal would act on.
fn quoted(text: &str) -> String {
    let printable = text.chars().map(|character| if character.is_control() { '?' } else { character });
    let mut short: String = printable.take(QUOTED_CHARS_MAX).collect();
    if text.chars().count() > QUOTED_CHARS_MAX {
        short.push('…');
    }
    short
}

/// The bytes of the one request that the text is. Strict, where readers of PEM skip what they do not know: Go's, which signs, and
/// another one could choose different blocks.
fn der(pem: &[u8]) -> Result<Vec<u8>, Denial> {
    if pem.len() > REQUEST_BYTES_MAX {
        return Err(unreadable(&format!("it is longer than {REQUEST_BYTES_MAX} bytes")));
    }
    let text = std::str::from_utf8(pem).map_err(|_| unreadable(&"it is no text"))?;
    let inner = text.trim().strip_prefix(PEM_BEGIN).and_then(|rest| rest.strip_suffix(PEM_END));
    let inner =
        inner.ok_or_else(|| unreadable(&"it is not one PEM block CERTIFICATE REQUEST and nothing else"))?;
    let encoded: String = inner.split_ascii_whitespace().collect();
    STANDARD.decode(encoded).map_err(|_| unreadable(&"it is not base64"))
}

fn subject(request: &X509CertificationRequest<'_>, node: &str) -> Result<(), Denial> {
    let subject = &request.certification_request_info.subject;
    let common_name = format!("system:node:{node}");
    let wanted = [
        (OID_X509_ORGANIZATION_NAME, Some(ORGANIZATION)),
        (OID_X509_COMMON_NAME, Some(common_name.as_str())),
    ];
    let found = subject.iter_attributes().map(|found| (found.attr_type().clone(), found.as_str().ok()));
    let found: Vec<_> = found.collect();
    if found.len() != wanted.len() || !wanted.iter().all(|attribute| found.contains(attribute)) {
        return Err(Denial::Subject { asked: quoted(&subject.to_string()), node: node.to_owned() });
    }
    Ok(())
}

/// A name that is asked for.
#[derive(Debug)]
enum Name<'a> {
    Dns(&'a str),
    Address(IpAddr),
    /// Of another kind.
    Other(String),
}

/// All names; nothing else may be asked for but key usages, which the signer takes from the object anyway.
fn names<'a>(request: &'a X509CertificationRequest<'_>) -> Result<Vec<Name<'a>>, Denial> {
    let attributes = request.certification_request_info.attributes();
    let extensions =
        match attributes.iter().map(|attribute| attribute.parsed_attribute()).collect::<Vec<_>>()[..] {
            [] => return Err(Denial::NoName),
            [ParsedCriAttribute::ExtensionRequest(request)] => &request.extensions,
            _ => {
                return Err(Denial::Extension {
                    asked: "an attribute that is no extension, or several".to_owned(),
                });
            }
        };
    let mut names = None;
    for extension in extensions {
        match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(found) if names.is_none() => {
                names = Some(found.general_names.iter().map(name).collect());
            }
            ParsedExtension::KeyUsage(usage) if !usage.key_cert_sign() && !usage.crl_sign() => {}
            ParsedExtension::ExtendedKeyUsage(usage) if serves_only(usage) => {}
            _ => return Err(Denial::Extension { asked: format!("the extension {}", extension.oid) }),
        }
    }
    Ok(names.unwrap_or_default())
}

fn serves_only(usage: &ExtendedKeyUsage<'_>) -> bool {
    let others = [
        usage.any,
        usage.client_auth,
        usage.code_signing,
        usage.email_protection,
        usage.time_stamping,
        usage.ocsp_signing,
    ];
    usage.server_auth && !others.contains(&true) && usage.other.is_empty()
}

fn name<'a>(name: &'a GeneralName<'_>) -> Name<'a> {
    match name {
        GeneralName::DNSName(name) => Name::Dns(name),
        GeneralName::IPAddress(bytes) => {
            let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            match four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)) {
                Ok(address) => Name::Address(address),
                Err(_) => Name::Other("an address of another length".to_owned()),
            }
        }
        other => Name::Other(quoted(&other.to_string())),
    }
}

fn name_is_allowed(name: &Name<'_>, allowed: &ServingNames) -> Result<(), Denial> {
    let (is_allowed, name) = match name {
        // As it stands: a wildcard, another case or a final dot is none of them.
        Name::Dns(name) => (allowed.dns.contains(*name), quoted(name)),
        Name::Address(address) => (allowed.addresses.contains(address), address.to_string()),
        Name::Other(name) => (false, name.clone()),
    };
    if is_allowed {
        return Ok(());
    }
    Err(Denial::Name { name, allowed: allowed.all().collect::<Vec<_>>().join(", ") })
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
