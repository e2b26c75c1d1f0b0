//! Tokens that EKS takes: a presigned URL of STS's GetCallerIdentity, as aws-iam-authenticator's `pkg/token/token.go`
//! makes it.
//!
//! ```text
//! k8s-aws-v1. + base64url without padding of
//! https://sts.REGION.amazonaws.com/?Action=GetCallerIdentity&Version=2011-06-15
//!   &X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=…&X-Amz-Date=…&X-Amz-Expires=60
//!   &X-Amz-Security-Token=…&X-Amz-SignedHeaders=host;x-k8s-aws-id&X-Amz-Signature=…
//! ```
//!
//! The signed header `x-k8s-aws-id` binds it to one cluster. X-Amz-Expires is there for old authenticators: STS takes the
//! URL for 15 minutes after X-Amz-Date, whatever it says.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::HeaderValue;
use zeroize::Zeroizing;

use super::{credentials::Credentials, error::StsError, presigned::Request, request::EksCluster};

/// How long a token is taken, from its X-Amz-Date.
pub(super) const TOKEN_LIFE: Duration = Duration::from_mins(15);

/// `maxTokenLenBytes` of aws-iam-authenticator: it answers a longer one with a 401 that says nothing.
const TOKEN_BYTES_MAX: usize = 4096;

/// What authenticators of 0.3 and older ask for.
const EXPIRES: Duration = Duration::from_mins(1);

const SCHEME: &str = "Bearer ";
const PREFIX: &str = "k8s-aws-v1.";
const CLUSTER_HEADER: &str = "x-k8s-aws-id";

/// The value of `Authorization` for `cluster`, valid for [`TOKEN_LIFE`] from `now`; `host` is STS's in the cluster's
/// region. Wiped when its last copy is dropped, and marked sensitive.
pub(super) fn authorization(
    credentials: &Credentials,
    cluster: &EksCluster,
    host: &str,
    now: SystemTime,
) -> Result<HeaderValue, StsError> {
    let base = format!("https://{host}/?Action=GetCallerIdentity&Version=2011-06-15");
    let request = Request {
        url: &base,
        headers: &[("host", host), (CLUSTER_HEADER, cluster.name())],
        service: "sts",
        region: cluster.region(),
        expires: EXPIRES,
    };
    let url = request.presigned(credentials, now)?;
    let mut value =
        Zeroizing::new(String::with_capacity(SCHEME.len() + PREFIX.len() + url.len() * 4 / 3 + 4));
    value.push_str(SCHEME);
    value.push_str(PREFIX);
    URL_SAFE_NO_PAD.encode_string(url.as_bytes(), &mut value);
    let bytes = value.len() - SCHEME.len();
    if bytes > TOKEN_BYTES_MAX {
        return Err(StsError::TokenTooLong { bytes, bytes_max: TOKEN_BYTES_MAX });
    }
    let mut value = HeaderValue::from_maybe_shared(Bytes::from_owner(Text(value)))
        .map_err(|_| StsError::Signing { cause: "the token is no header value".into() })?;
    value.set_sensitive(true);
    Ok(value)
}

/// Lets [`Bytes`] own a text that is wiped when dropped.
struct Text(Zeroizing<String>);

impl AsRef<[u8]> for Text {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-01-01T00:00:00Z.
    const AT: u64 = 1_767_225_600;

    fn token(access_key_id: &str, session_token: &str, cluster: &str, region: &str) -> HeaderValue {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(AT);
        let credentials = Credentials {
            access_key_id: access_key_id.to_owned(),
            secret_access_key: Zeroizing::new("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".to_owned()),
            session_token: Zeroizing::new(session_token.to_owned()),
            expires: now + TOKEN_LIFE,
            assumed_role_arn: String::new(),
        };
        let cluster = EksCluster::new(cluster, region).unwrap();
        authorization(&credentials, &cluster, &format!("sts.{region}.amazonaws.com"), now).unwrap()
    }

    fn url(header: &HeaderValue) -> String {
        let token = header.to_str().unwrap().strip_prefix("Bearer k8s-aws-v1.").unwrap();
        String::from_utf8(URL_SAFE_NO_PAD.decode(token).unwrap()).unwrap()
    }

    /// The parameters in the order of their names: verifiers sort them, signers differ in how they write them down.
    fn sorted(url: &str) -> (String, Vec<String>) {
        let (base, query) = url.split_once('?').unwrap();
        let mut parameters: Vec<String> = query.split('&').map(str::to_owned).collect();
        parameters.sort();
        (base.to_owned(), parameters)
    }

    // Both made with aws-sdk-go 1.44.332's v4 signer, as aws-iam-authenticator 0.6.13 makes its tokens; the second one's
    // signature also with botocore 1.44.8, as `aws eks get-token` makes its.
    const LONG_LIVED: &str = "https://sts.eu-central-1.amazonaws.com/?Action=GetCallerIdentity&Version=2011-06-15\
        &X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20260101%2Feu-central-1%2Fsts%2Faws4_request\
        &X-Amz-Date=20260101T000000Z&X-Amz-Expires=60&X-Amz-SignedHeaders=host%3Bx-k8s-aws-id\
        &X-Amz-Signature=3cae666d40bfdb088bd7793d58dc710f0eb815d2d609be2eb5c729101c160869";
    const OF_A_ROLE: &str = "https://sts.us-east-1.amazonaws.com/?Action=GetCallerIdentity&Version=2011-06-15\
        &X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=ASIAEXAMPLE%2F20260101%2Fus-east-1%2Fsts%2Faws4_request\
        &X-Amz-Date=20260101T000000Z&X-Amz-Expires=60&X-Amz-Security-Token=IQoJb3JpZ2luX2Vj%2Ba%2Fb%3D%3D\
        &X-Amz-SignedHeaders=host%3Bx-k8s-aws-id\
        &X-Amz-Signature=dac3826a1403a0fc370e378debedac721c75dffb8e0d9df7867353f667e3d45e";

    #[test]
    fn a_token_is_what_aws_iam_authenticator_makes() {
        let long_lived = token("AKIDEXAMPLE", "", "prod", "eu-central-1");
        assert_eq!(sorted(&url(&long_lived)), sorted(LONG_LIVED));
        let of_a_role = token("ASIAEXAMPLE", "IQoJb3JpZ2luX2Vj+a/b==", "ci-cluster_2", "us-east-1");
        assert_eq!(sorted(&url(&of_a_role)), sorted(OF_A_ROLE));
    }

    #[test]
    fn a_token_is_bound_to_its_cluster() {
        let signature = |cluster| {
            let url = url(&token("AKIDEXAMPLE", "", cluster, "eu-central-1"));
            url.split_once("X-Amz-Signature=").unwrap().1.to_owned()
        };
        assert_ne!(signature("prod"), signature("staging"));
    }

    #[test]
    fn a_token_does_not_show_itself() {
        let header = token("AKIDEXAMPLE", "", "prod", "eu-central-1");
        assert!(header.is_sensitive() && format!("{header:?}") == "Sensitive");
    }

    #[test]
    fn a_token_that_eks_would_not_take_is_not_made() {
        let credentials = Credentials {
            access_key_id: "ASIAEXAMPLE".to_owned(),
            secret_access_key: Zeroizing::new("secret".to_owned()),
            session_token: Zeroizing::new("a".repeat(3000)),
            expires: SystemTime::now() + TOKEN_LIFE,
            assumed_role_arn: String::new(),
        };
        let cluster = EksCluster::new("prod", "eu-central-1").unwrap();
        let made = authorization(&credentials, &cluster, "sts.eu-central-1.amazonaws.com", SystemTime::now());
        assert_eq!(made.unwrap_err().kind(), "token_too_long");
    }
}
