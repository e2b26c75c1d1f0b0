//! Calls of AWS STS, with the agent's own credentials from the SDK's default chain (environment, profile and SSO, IRSA, Pod
//! Identity, instance profile).
//!
//! The only file that imports the AWS SDK. It asks the STS of the cluster's region, with few tries and bounded waits; what
//! is kept, and for how long, is [`super::cache`]'s.

use std::{
    collections::HashMap,
    error::Error,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_credential_types::{
    Credentials as SdkCredentials,
    provider::{ProvideCredentials as _, error::CredentialsError},
};
use aws_sdk_sts::{
    Client,
    config::{
        Builder,
        endpoint::{DefaultResolver, Params, ResolveEndpoint},
    },
    error::{BuildError, DisplayErrorContext, ProvideErrorMetadata, SdkError},
    types::{AssumedRoleUser, PolicyDescriptorType, Tag as SdkTag},
};
use futures::future::BoxFuture;
use http::header::RETRY_AFTER;
use tokio::sync::OnceCell;
use weir_common::kms::endpoint::{Confidential, PlainEndpoint, confidential};
use zeroize::Zeroizing;

use super::{
    cache::AssumesRoles,
    credentials::Credentials,
    error::{Answer, Call, StsError, shortened},
    identifier::RoleArn,
    request::{AssumeRole, CHAINED_DURATION_MAX, Role, WebIdentity, WebIdentityToken},
};

/// Tries of one call, the first included; between them the SDK waits with jitter.
const ATTEMPTS_MAX: u32 = 3;
/// Pause before the second try, at most; the third's may be twice that.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
/// Longest pause between two tries.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// For one call with all its tries.
const CALL_TIMEOUT: Duration = Duration::from_secs(12);
/// Most regions that are asked: the configuration has few clusters.
const REGIONS_MAX: usize = 64;
/// Most causes of an error that are looked at.
const CAUSES_MAX: usize = 16;

/// STS in every region that was asked for.
pub(super) struct Sts {
    regions: Mutex<HashMap<String, Arc<Regional>>>,
    /// In unit tests: an address in STS's place, and the agent's own credentials.
    #[cfg(test)]
    stand_in: Option<(String, SdkCredentials)>,
}

#[derive(Default)]
struct Regional {
    config: OnceCell<SdkConfig>,
    host: OnceCell<String>,
}

impl Sts {
    pub(super) fn new() -> Self {
        Self {
            regions: Mutex::default(),
            #[cfg(test)]
            stand_in: None,
        }
    }

    #[cfg(test)]
    pub(super) fn at(url: String) -> Self {
        let own = SdkCredentials::new("AKIATEST", "own-secret", None, None, "test");
        Self { regions: Mutex::default(), stand_in: Some((url, own)) }
    }

    fn regional(&self, region: &str) -> Result<Arc<Regional>, StsError> {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(regional) = regions.get(region) {
            return Ok(regional.clone());
        }
        if regions.len() >= REGIONS_MAX {
            return Err(StsError::Busy);
        }
        Ok(regions.entry(region.to_owned()).or_default().clone())
    }

    /// Finds out nothing yet: credentials are looked for with the first call, and kept by the SDK until they expire.
    async fn config(&self, region: &str) -> Result<SdkConfig, StsError> {
        let regional = self.regional(region)?;
        let load = async || {
            let retries = RetryConfig::standard()
                .with_max_attempts(ATTEMPTS_MAX)
                .with_initial_backoff(BACKOFF_FIRST)
                .with_max_backoff(BACKOFF_MAX);
            let timeouts = TimeoutConfig::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .operation_attempt_timeout(ATTEMPT_TIMEOUT)
                .operation_timeout(CALL_TIMEOUT)
                .build();
            let loader = aws_config::defaults(BehaviorVersion::latest())
                .region(Region::new(region.to_owned()))
                .retry_config(retries)
                .timeout_config(timeouts);
            #[cfg(test)]
            let loader = match &self.stand_in {
                Some((url, own)) => loader.endpoint_url(url).credentials_provider(own.clone()),
                None => loader,
            };
            let config = loader.load().await;
            // Those who give credentials are asked there too, before STS is.
            if let Some(endpoint) = config.endpoint_url() {
                confidential(endpoint)?;
            }
            Ok::<_, StsError>(config)
        };
        regional.config.get_or_try_init(load).await.cloned()
    }

    /// The agent's own credentials, from the SDK's default chain.
    pub(super) async fn own(&self, region: &str) -> Result<Credentials, StsError> {
        let config = self.config(region).await?;
        let none = |cause: String| StsError::NoCredentials { cause: shortened(&cause) };
        let provider = config.credentials_provider().ok_or_else(|| none("no provider".to_owned()))?;
        let own = provider.provide_credentials().await.map_err(|error| none(causes(&error)))?;
        Ok(Credentials {
            access_key_id: own.access_key_id().to_owned(),
            secret_access_key: Zeroizing::new(own.secret_access_key().to_owned()),
            session_token: Zeroizing::new(own.session_token().unwrap_or_default().to_owned()),
            // Keys of a user have no end; a token has its own.
            expires: own.expiry().unwrap_or_else(|| SystemTime::now() + CHAINED_DURATION_MAX),
            assumed_role_arn: String::new(),
        })
    }

    pub(super) async fn assume_role(
        &self,
        region: &str,
        request: &AssumeRole,
    ) -> Result<Credentials, StsError> {
        let config = self.config(region).await?;
        let mut client = client(Builder::from(&config));
        for hop in &request.chain {
            let hop = AssumeRole {
                role_arn: hop.clone(),
                tags: Vec::new(),
                external_id: None,
                duration: CHAINED_DURATION_MAX,
                policy: None,
                policy_arns: Vec::new(),
                chain: Vec::new(),
                ..request.clone()
            };
            let credentials = call_assume_role(&client, region, &hop).await?;
            client = self::client(Builder::from(&config).credentials_provider(signing(&credentials)));
        }
        call_assume_role(&client, region, request).await
    }

    async fn assume_role_with_web_identity(
        &self,
        region: &str,
        request: &WebIdentity,
    ) -> Result<Credentials, StsError> {
        let role = &request.role_arn;
        let no_token =
            |cause: String| StsError::NoWebIdentity { role: role.clone(), cause: shortened(&cause) };
        let token = match &request.token {
            WebIdentityToken::Presented(token) => Zeroizing::new(token.as_str().to_owned()),
            WebIdentityToken::Minted(source) => source.token().await.map_err(no_token)?,
        };
        let output = client(Builder::from(&self.config(region).await?))
            .assume_role_with_web_identity()
            .role_arn(role.as_str())
            .role_session_name(request.session_name.as_str())
            .web_identity_token(token.as_str())
            .duration_seconds(seconds(request.duration))
            .set_policy(request.policy.clone())
            .set_policy_arns(policies(&request.policy_arns))
            .send()
            .await
            .map_err(|error| failure(&error, Call::WebIdentity, role, region))?;
        credentials(output.credentials, output.assumed_role_user, role)
    }

    /// Host of STS in `region`, in whatever partition that is.
    async fn find_host(&self, region: &str) -> Result<String, StsError> {
        let regional = self.regional(region)?;
        let failed = |error: &dyn Error| StsError::Signing { cause: shortened(&causes(error)) };
        let find = async || {
            let params = Params::builder().region(region).build().map_err(|error| failed(&error))?;
            let endpoint = DefaultResolver::new()
                .resolve_endpoint(&params)
                .await
                .map_err(|error| failed(error.as_ref()))?;
            Ok(endpoint.url().trim_start_matches("https://").trim_end_matches('/').to_owned())
        };
        regional.host.get_or_try_init(find).await.cloned()
    }
}

impl AssumesRoles for Sts {
    fn assume<'a>(&'a self, region: &'a str, role: &'a Role) -> BoxFuture<'a, Result<Credentials, StsError>> {
        Box::pin(async move {
            match role {
                Role::Assume(role) => self.assume_role(region, role).await,
                Role::WebIdentity(role) => self.assume_role_with_web_identity(region, role).await,
            }
        })
    }

    fn host<'a>(&'a self, region: &'a str) -> BoxFuture<'a, Result<String, StsError>> {
        Box::pin(self.find_host(region))
    }
}

/// Every client is made here, so that none sends anything where others read it.
fn client(own: Builder) -> Client {
    Client::from_conf(own.interceptor(Confidential).build())
}

async fn call_assume_role(
    client: &Client,
    region: &str,
    request: &AssumeRole,
) -> Result<Credentials, StsError> {
    let role = &request.role_arn;
    let tags = request.tags.iter().map(|tag| SdkTag::builder().key(tag.key()).value(tag.value()).build());
    let tags: Vec<SdkTag> = tags
        .collect::<Result<_, BuildError>>()
        .map_err(|error| StsError::Signing { cause: shortened(&error.to_string()) })?;
    let output = client
        .assume_role()
        .role_arn(role.as_str())
        .role_session_name(request.session_name.as_str())
        .set_source_identity(request.source_identity.as_ref().map(|identity| identity.as_str().to_owned()))
        .set_tags(Some(tags).filter(|tags| !tags.is_empty()))
        .set_external_id(request.external_id.clone())
        .duration_seconds(seconds(request.duration))
        .set_policy(request.policy.clone())
        .set_policy_arns(policies(&request.policy_arns))
        .send()
        .await
        .map_err(|error| failure(&error, Call::AssumeRole, role, region))?;
    credentials(output.credentials, output.assumed_role_user, role)
}

/// A request's duration is at most twelve hours.
fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs()).unwrap_or(i32::MAX)
}

fn policies(arns: &[String]) -> Option<Vec<PolicyDescriptorType>> {
    let of = |arn: &String| PolicyDescriptorType::builder().arn(arn).build();
    Some(arns.iter().map(of).collect()).filter(|policies: &Vec<_>| !policies.is_empty())
}

fn signing(credentials: &Credentials) -> SdkCredentials {
    SdkCredentials::new(
        credentials.access_key_id.as_str(),
        credentials.secret_access_key.as_str(),
        Some(credentials.session_token.as_str().to_owned()),
        Some(credentials.expires),
        "weir",
    )
}

/// Takes the texts out of the answer without a copy, so that they are wiped in the end.
fn credentials(
    answer: Option<aws_sdk_sts::types::Credentials>,
    user: Option<AssumedRoleUser>,
    role: &RoleArn,
) -> Result<Credentials, StsError> {
    let (Some(answer), Some(user)) = (answer, user) else {
        let message = "the answer has no credentials".into();
        return Err(StsError::Refused { role: role.clone(), code: "none".into(), message });
    };
    Ok(Credentials {
        access_key_id: answer.access_key_id,
        secret_access_key: Zeroizing::new(answer.secret_access_key),
        session_token: Zeroizing::new(answer.session_token),
        expires: SystemTime::try_from(answer.expiration).unwrap_or(SystemTime::UNIX_EPOCH),
        assumed_role_arn: user.arn,
    })
}

fn failure<E>(
    error: &SdkError<E, aws_sdk_sts::config::http::HttpResponse>,
    call: Call,
    role: &RoleArn,
    region: &str,
) -> StsError
where
    E: Error + ProvideErrorMetadata + 'static,
{
    if let SdkError::ServiceError(context) = error {
        let (answer, raw) = (context.err(), context.raw());
        let retry_after = raw.headers().get(RETRY_AFTER.as_str()).and_then(|value| value.parse().ok());
        let answer = Answer {
            status: raw.status().as_u16(),
            code: answer.code().unwrap_or_default(),
            message: answer.message().unwrap_or_default(),
            retry_after: retry_after.map(Duration::from_secs),
        };
        return StsError::of(answer, call, role, region);
    }
    let cause = shortened(&causes(error));
    if let Some(plain) = PlainEndpoint::of(error) {
        return plain.into();
    }
    if caused_by_credentials(error) {
        return StsError::NoCredentials { cause };
    }
    StsError::Unreachable { region: region.into(), cause }
}

/// Whether the call failed before it was made: the agent's own credentials could not be found.
fn caused_by_credentials(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    for _ in 0..CAUSES_MAX {
        match cause {
            Some(error) if error.is::<CredentialsError>() => return true,
            Some(error) => cause = error.source(),
            None => break,
        }
    }
    false
}

fn causes(error: &dyn Error) -> String {
    DisplayErrorContext(error).to_string()
}
