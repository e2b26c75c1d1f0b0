//! Tokens that Amazon MSK takes with SASL OAUTHBEARER: a presigned URL of `kafka-cluster:Connect`, as AWS's signers for MSK
//! (`aws-msk-iam-sasl-signer-go`) make it.
//!
//! ```text
//! base64url without padding of
//! https://kafka.REGION.amazonaws.com/?Action=kafka-cluster%3AConnect
//!   &X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=…&X-Amz-Date=…&X-Amz-Expires=900
//!   &X-Amz-Security-Token=…&X-Amz-SignedHeaders=host&X-Amz-Signature=…
//! ```
//!
//! It is signed with the agent's own credentials or with those of a role. The host is the same in every partition of AWS:
//! nobody dials it, the brokers check the signature.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use super::{
    DURATION_DEFAULT,
    credentials::Credentials,
    error::StsError,
    identifier::{RoleArn, SessionName},
    presigned::Request,
    request::AssumeRole,
    sts::Sts,
};

/// How long a token is taken, from its X-Amz-Date.
const TOKEN_LIFE: Duration = Duration::from_mins(15);
/// For all that it takes to make one.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Of the role's session, in CloudTrail.
const SESSION: &str = "weir-agent";

/// A token for the brokers of MSK; wiped when dropped.
pub struct MskToken {
    /// Its text.
    pub text: Zeroizing<String>,
    /// From then on it is not taken.
    pub end: SystemTime,
}

impl fmt::Debug for MskToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("MskToken").field("end", &self.end).finish_non_exhaustive()
    }
}

/// Makes a token for the brokers of `region`, with the agent's own credentials or with those of `role`. Keeps nothing: it is
/// asked for a few times an hour.
///
/// # Errors
/// There are no credentials, or STS does not give those of the role.
pub async fn msk_token(region: &str, role: Option<&RoleArn>) -> Result<MskToken, StsError> {
    let sts = Sts::new();
    let credentials = async {
        match role {
            None => sts.own(region).await,
            Some(role) => sts.assume_role(region, &assumed(role)).await,
        }
    };
    let late = |_| StsError::Unreachable { region: region.into(), cause: "no answer in time".into() };
    let credentials = tokio::time::timeout(TIMEOUT, credentials).await.map_err(late)??;
    sign(&credentials, region, SystemTime::now())
}

fn assumed(role: &RoleArn) -> AssumeRole {
    AssumeRole {
        role_arn: role.clone(),
        session_name: SessionName::fit(SESSION),
        source_identity: None,
        tags: Vec::new(),
        external_id: None,
        duration: DURATION_DEFAULT,
        policy: None,
        policy_arns: Vec::new(),
        chain: Vec::new(),
    }
}

fn sign(credentials: &Credentials, region: &str, now: SystemTime) -> Result<MskToken, StsError> {
    let host = format!("kafka.{region}.amazonaws.com");
    let url = format!("https://{host}/?Action=kafka-cluster%3AConnect");
    let headers = [("host", host.as_str())];
    let request =
        Request { url: &url, headers: &headers, service: "kafka-cluster", region, expires: TOKEN_LIFE };
    let signed = request.presigned(credentials, now)?;
    let mut text = Zeroizing::new(String::with_capacity(signed.len() * 4 / 3 + 4));
    URL_SAFE_NO_PAD.encode_string(signed.as_bytes(), &mut text);
    Ok(MskToken { text, end: credentials.expires.min(now + TOKEN_LIFE) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-28T18:50:10Z, when the tokens below were made.
    const AT: u64 = 1_795_891_810;

    // Made by aws-msk-iam-sasl-signer-go 1.0.4 (`GenerateAuthTokenFromCredentialsProvider`), decoded. What it calls User-Agent is added
    // to the signed URL and not part of what is signed.
    const LONG_LIVED: &str = "https://kafka.eu-central-1.amazonaws.com/?Action=kafka-cluster%3AConnect&User-Agent=aws-msk-iam-sasl-signer-go%2F1.0.4%2Fgo1.26.8&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20261128%2Feu-central-1%2Fkafka-cluster%2Faws4_request&X-Amz-Date=20261128T185010Z&X-Amz-Expires=900&X-Amz-Signature=9838cb25f13705ac7cca95b99057ede93e865fb19d025c8400aa813ca4c5440f&X-Amz-SignedHeaders=host";
    const OF_A_ROLE: &str = "https://kafka.us-east-1.amazonaws.com/?Action=kafka-cluster%3AConnect&User-Agent=aws-msk-iam-sasl-signer-go%2F1.0.4%2Fgo1.26.8&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=ASIAEXAMPLE%2F20261128%2Fus-east-1%2Fkafka-cluster%2Faws4_request&X-Amz-Date=20261128T185010Z&X-Amz-Expires=900&X-Amz-Security-Token=IQoJb3JpZ2luX2Vj%2Ba%2Fb%3D%3D&X-Amz-Signature=65c4e4c070a598217386fdee46ba6a12811acbbd718d1e4ac0d9b6a4dd0481a9&X-Amz-SignedHeaders=host";
    const IN_CHINA: &str = "https://kafka.cn-north-1.amazonaws.com/?Action=kafka-cluster%3AConnect&User-Agent=aws-msk-iam-sasl-signer-go%2F1.0.4%2Fgo1.26.8&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=ASIAEXAMPLE%2F20261128%2Fcn-north-1%2Fkafka-cluster%2Faws4_request&X-Amz-Date=20261128T185010Z&X-Amz-Expires=900&X-Amz-Security-Token=IQoJb3JpZ2luX2Vj%2Ba%2Fb%3D%3D&X-Amz-Signature=c30f61c09f5962039e70a0b9c33dd9e07f7a7d3d3a65e97b3a0d2c2022474d1d&X-Amz-SignedHeaders=host";

    fn credentials(access_key_id: &str, session_token: &str, expires: SystemTime) -> Credentials {
        Credentials {
            access_key_id: access_key_id.to_owned(),
            secret_access_key: Zeroizing::new("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY".to_owned()),
            session_token: Zeroizing::new(session_token.to_owned()),
            expires,
            assumed_role_arn: String::new(),
        }
    }

    /// The parameters in the order of their names: verifiers sort them, signers differ in how they write them down.
    fn sorted(url: &str) -> (String, Vec<String>) {
        let (base, query) = url.split_once('?').unwrap();
        let parameters = query.split('&').filter(|parameter| !parameter.starts_with("User-Agent="));
        let mut parameters: Vec<String> = parameters.map(str::to_owned).collect();
        parameters.sort();
        (base.to_owned(), parameters)
    }

    #[test]
    fn a_token_is_what_awss_own_signer_for_msk_makes() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(AT);
        let later = now + Duration::from_hours(1);
        let of_a_role = credentials("ASIAEXAMPLE", "IQoJb3JpZ2luX2Vj+a/b==", later);
        for (credentials, region, expected) in [
            (&credentials("AKIDEXAMPLE", "", later), "eu-central-1", LONG_LIVED),
            (&of_a_role, "us-east-1", OF_A_ROLE),
            (&of_a_role, "cn-north-1", IN_CHINA),
        ] {
            let token = sign(credentials, region, now).unwrap();
            let url = String::from_utf8(URL_SAFE_NO_PAD.decode(token.text.as_bytes()).unwrap()).unwrap();
            assert_eq!(sorted(&url), sorted(expected));
            assert_eq!(token.end, now + Duration::from_mins(15));
            assert!(!format!("{token:?}").contains(token.text.as_str()));
        }
    }

    #[test]
    fn a_token_does_not_outlive_the_credentials_that_signed_it() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(AT);
        let end = now + Duration::from_mins(3);
        let token = sign(&credentials("ASIAEXAMPLE", "t", end), "eu-central-1", now).unwrap();
        assert_eq!(token.end, end);
    }
}
