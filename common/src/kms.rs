//! A key of AWS KMS that session keys are wrapped with, beside recipients or instead of them: whoever may call `kms:Decrypt` with it
//! reads the content, and nobody does once it is disabled.
//!
//! The only file that imports the SDK for KMS. The key never leaves KMS: a session's key goes there to be wrapped (`Encrypt`), bound by
//! an encryption context to where it belongs, and comes back as what stands in the wrapped key. Credentials are those of the SDK's
//! default chain. Few tries and bounded waits; who calls decides what becomes of a failure.

pub mod endpoint;

use std::{collections::HashMap, error::Error, sync::Arc, time::Duration};

use aws_config::{BehaviorVersion, Region, retry::RetryConfig, timeout::TimeoutConfig};
use aws_sdk_kms::{
    Client,
    config::Builder,
    error::{DisplayErrorContext, ProvideErrorMetadata, SdkError},
    primitives::Blob,
};
use tokio::sync::OnceCell;
use zeroize::Zeroizing;

use endpoint::{Confidential, PlainEndpoint, confidential};

/// Tries of one call, the first included.
const ATTEMPTS_MAX: u32 = 3;
/// Pause before the second try, at most; the third's may be twice that.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// For one call with all its tries: well within what a request waits for its record.
const CALL_TIMEOUT: Duration = Duration::from_secs(8);
/// Longest ARN, and most bytes of what AWS says that are kept.
const ARN_BYTES_MAX: usize = 2048;
const MESSAGE_BYTES_MAX: usize = 300;
/// How replicas of a key in other regions are named.
const MULTI_REGION: &str = "key/mrk-";

/// ARN of a key; an alias is none, since whoever may change it would decide who reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyArn {
    text: String,
    region: String,
}

impl KeyArn {
    /// From its text, `arn:aws:kms:REGION:ACCOUNT:key/ID`.
    ///
    /// # Errors
    /// It is no ARN of a key.
    pub fn parse(text: &str) -> Result<Self, KmsError> {
        let lower = |part: &str| {
            let is_in = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            !part.is_empty() && part.len() <= 63 && part.bytes().all(is_in)
        };
        let parts: Vec<&str> = text.splitn(6, ':').collect();
        let ["arn", partition, "kms", region, account, resource] = parts[..] else {
            return Err(KmsError::Arn);
        };
        let is_key = resource.strip_prefix("key/").is_some_and(lower);
        let is_account = account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit());
        if !(partition.starts_with("aws") && lower(partition) && lower(region) && is_account && is_key) {
            return Err(KmsError::Arn);
        }
        Ok(Self { text: text.to_owned(), region: region.to_owned() })
    }

    /// The ARN.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether what was wrapped with the key `other` can be unwrapped with this one: it is the same, or a replica in another region.
    #[must_use]
    pub fn unwraps(&self, other: &str) -> bool {
        let without_region = |arn: &str| {
            let parts: Vec<_> = arn.splitn(6, ':').collect();
            parts
                .get(5)
                .is_some_and(|resource| resource.starts_with(MULTI_REGION))
                .then(|| [1, 2, 4, 5].map(|index| parts.get(index).map(|part| (*part).to_owned())))
        };
        other.len() <= ARN_BYTES_MAX
            && (self.text == other
                || without_region(&self.text).is_some_and(|ours| without_region(other) == Some(ours)))
    }
}

/// The call that unwraps, as KMS and its policies name it.
const DECRYPT: &str = "Decrypt";

/// A key, and where KMS is asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmsKey {
    /// The key.
    pub arn: KeyArn,
    /// Address of KMS; none: as AWS and the SDK's environment (`AWS_ENDPOINT_URL_KMS`) have it for the key's region.
    pub endpoint: Option<String>,
}

/// Why KMS did not wrap or unwrap. Never holds a key; what AWS says is cut.
#[derive(Clone, Debug, thiserror::Error)]
pub enum KmsError {
    /// Not an ARN.
    #[error("it is no ARN of a KMS key (arn:aws:kms:REGION:ACCOUNT:key/ID; an alias is none)")]
    Arn,
    /// AWS does not let us.
    #[error(
        "KMS refuses: {message}; the role must be allowed kms:{action} with {key}, by its own policy and by the key's"
    )]
    Denied {
        /// The key's ARN.
        key: String,
        /// What was asked.
        action: &'static str,
        /// AWS's words.
        message: Arc<str>,
    },
    /// The key cannot be used.
    #[error(
        "the key {key} cannot be used ({code}); is it disabled, deleted, or in another account or region?"
    )]
    Unusable {
        /// The key's ARN.
        key: String,
        /// AWS's code.
        code: Arc<str>,
    },
    /// What was to be unwrapped is not what this key wrapped there.
    #[error(
        "KMS does not unwrap it: it was changed, belongs somewhere else, or was wrapped with another key"
    )]
    Changed,
    /// Too many calls.
    #[error("KMS is asked too often; the account's quota of cryptographic operations may be too small")]
    Throttled,
    /// Keys would cross the network in clear.
    #[error(transparent)]
    Plain(#[from] PlainEndpoint),
    /// No answer, or no credentials to ask with.
    #[error("KMS in {region} cannot be asked: {cause}")]
    Unreachable {
        /// The region.
        region: String,
        /// Details.
        cause: Arc<str>,
    },
}

/// Asks KMS; the client is made with the first call.
#[derive(Debug)]
pub struct Kms {
    key: KmsKey,
    client: OnceCell<Client>,
}

impl Kms {
    /// Asks nobody yet.
    #[must_use]
    pub fn new(key: KmsKey) -> Self {
        Self { key, client: OnceCell::new() }
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &KeyArn {
        &self.key.arn
    }

    async fn client(&self) -> Result<&Client, KmsError> {
        self.client
            .get_or_try_init(async || {
                let retries = RetryConfig::standard()
                    .with_max_attempts(ATTEMPTS_MAX)
                    .with_initial_backoff(BACKOFF_FIRST);
                let timeouts = TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .operation_attempt_timeout(ATTEMPT_TIMEOUT)
                    .operation_timeout(CALL_TIMEOUT)
                    .build();
                let loader = aws_config::defaults(BehaviorVersion::latest())
                    .region(Region::new(self.key.arn.region.clone()))
                    .retry_config(retries)
                    .timeout_config(timeouts);
                let config = loader.load().await;
                // Those who give credentials are asked there too, before KMS is.
                if let Some(endpoint) = config.endpoint_url() {
                    confidential(endpoint)?;
                }
                Ok::<_, KmsError>(self.client_of(Builder::from(&config)))
            })
            .await
    }

    fn client_of(&self, mut own: Builder) -> Client {
        if let Some(endpoint) = &self.key.endpoint {
            own = own.endpoint_url(endpoint);
        }
        Client::from_conf(own.interceptor(Confidential).build())
    }

    /// Wraps a secret, bound to `context`.
    ///
    /// # Errors
    /// KMS does not.
    pub async fn wrap(&self, secret: &[u8], context: HashMap<String, String>) -> Result<Vec<u8>, KmsError> {
        let asked = async {
            let call = self.client().await?.encrypt().key_id(self.key.arn.as_str());
            let answer = call.plaintext(Blob::new(secret)).set_encryption_context(Some(context)).send().await;
            answer.map_err(|error| self.failure(&error, "Encrypt"))
        };
        let answer = self.bounded(asked).await?;
        answer.ciphertext_blob.map(Blob::into_inner).ok_or_else(|| self.unreachable("the answer is empty"))
    }

    /// Unwraps what [`Self::wrap`] returned for the same context.
    ///
    /// # Errors
    /// KMS does not.
    pub async fn unwrap(
        &self,
        wrapped: Vec<u8>,
        context: HashMap<String, String>,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let asked = async {
            // The key is named, so that nobody can have another one used.
            let call = self.client().await?.decrypt().key_id(self.key.arn.as_str());
            let call = call.ciphertext_blob(Blob::new(wrapped)).set_encryption_context(Some(context));
            call.send().await.map_err(|error| self.failure(&error, DECRYPT))
        };
        let answer = self.bounded(asked).await?;
        let secret = answer.plaintext.map(|secret| Zeroizing::new(secret.into_inner()));
        secret.ok_or_else(|| self.unreachable("the answer is empty"))
    }

    /// The SDK's own bound does not cover the search for credentials before the first call.
    async fn bounded<T>(&self, asked: impl Future<Output = Result<T, KmsError>>) -> Result<T, KmsError> {
        let in_time = tokio::time::timeout(CALL_TIMEOUT, asked).await;
        in_time.unwrap_or_else(|_| Err(self.unreachable("no answer in time")))
    }

    fn unreachable(&self, cause: &str) -> KmsError {
        KmsError::Unreachable { region: self.key.arn.region.clone(), cause: shortened(cause) }
    }

    fn failure<E>(
        &self,
        error: &SdkError<E, aws_sdk_kms::config::http::HttpResponse>,
        action: &'static str,
    ) -> KmsError
    where
        E: Error + ProvideErrorMetadata + 'static,
    {
        match error {
            SdkError::ServiceError(context) => {
                let (code, message) = (context.err().code(), context.err().message());
                self.refused(code.unwrap_or("none"), message.unwrap_or_default(), action)
            }
            _ if let Some(plain) = PlainEndpoint::of(error) => plain.into(),
            _ => self.unreachable(&DisplayErrorContext(error).to_string()),
        }
    }

    fn refused(&self, code: &str, message: &str, action: &'static str) -> KmsError {
        let key = self.key.arn.text.clone();
        match code {
            "AccessDeniedException" => KmsError::Denied { key, action, message: shortened(message) },
            "DisabledException"
            | "KMSInvalidStateException"
            | "KeyUnavailableException"
            | "InvalidKeyUsageException"
            | "NotFoundException" => KmsError::Unusable { key, code: shortened(code) },
            "InvalidCiphertextException" | "IncorrectKeyException" => KmsError::Changed,
            // What is to be unwrapped, and for what, is all that a call to unwrap has of others.
            "ValidationException" if action == DECRYPT => KmsError::Changed,
            "ThrottlingException" | "LimitExceededException" => KmsError::Throttled,
            _ => self.unreachable(&format!("{code}: {message}")),
        }
    }
}

/// On one line, and not longer than a log should have.
fn shortened(text: &str) -> Arc<str> {
    let mut line: String = text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect();
    line.truncate(line.floor_char_boundary(MESSAGE_BYTES_MAX));
    line.into()
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::Duration};

    use aws_sdk_kms::{
        Client,
        config::{BehaviorVersion, Builder, Credentials, Region},
    };
    use tokio::{io::AsyncReadExt as _, net::TcpListener};

    use super::{KeyArn, Kms, KmsError, KmsKey};

    const ARN: &str = "arn:aws:kms:eu-central-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab";

    #[test]
    fn only_arns_of_keys_are_taken_and_nothing_in_them_leads_elsewhere() {
        assert_eq!(KeyArn::parse(ARN).unwrap().as_str(), ARN);
        for wrong in [
            "",
            "alias/weir",
            "arn:aws:kms:eu-central-1:123456789012:alias/weir",
            "arn:aws:kms:evil.example/#:123456789012:key/1",
            "arn:aws:kms::123456789012:key/1",
            "arn:aws:kms:eu-central-1:1:key/1",
            "arn:aws:kms:eu-central-1:123456789012:key/",
            "arn:aws:kms:eu-central-1:123456789012:key/*",
            "arn:gcp:kms:eu-central-1:123456789012:key/1",
            "arn:aws:s3:eu-central-1:123456789012:key/1",
        ] {
            assert!(matches!(KeyArn::parse(wrong), Err(KmsError::Arn)), "{wrong}");
        }
    }

    /// Asks KMS at `endpoint`, with credentials that are there already.
    async fn wrap_at(endpoint: &str) -> KmsError {
        let kms = Kms::new(KmsKey { arn: KeyArn::parse(ARN).unwrap(), endpoint: Some(endpoint.to_owned()) });
        let own = Builder::new()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("eu-central-1"))
            .credentials_provider(Credentials::new("id", "secret", None, None, "test"));
        let client: Client = kms.client_of(own);
        kms.client.set(client).unwrap();
        kms.wrap(&[7; 32], HashMap::new()).await.unwrap_err()
    }

    #[tokio::test]
    async fn no_key_crosses_the_network_in_clear() {
        for endpoint in ["http://192.0.2.1:8080", "http://kms.example.com", "http://localhost.example.com"] {
            let error = wrap_at(endpoint).await;
            assert!(matches!(error, KmsError::Plain(_)), "{error}");
            assert!(error.to_string().contains("is not https"), "{error}");
        }
        // To loopback it goes: whoever listens there hears the request.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let heard = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut begin = [0; 4];
            stream.read_exact(&mut begin).await.unwrap();
            begin
        };
        let asked = tokio::spawn(async move { wrap_at(&endpoint).await });
        assert_eq!(&tokio::time::timeout(Duration::from_secs(30), heard).await.unwrap(), b"POST");
        asked.abort();
    }

    #[test]
    fn what_kms_finds_malformed_is_the_wrapped_keys_fault_and_no_reason_to_ask_no_more() {
        let kms = Kms::new(KmsKey { arn: KeyArn::parse(ARN).unwrap(), endpoint: None });
        assert!(matches!(kms.refused("ValidationException", "", "Decrypt"), KmsError::Changed));
        assert!(matches!(kms.refused("ValidationException", "", "Encrypt"), KmsError::Unreachable { .. }));
    }

    #[test]
    fn a_key_unwraps_what_it_or_its_replica_in_another_region_wrapped() {
        let key = |text: &str| KeyArn::parse(text).unwrap();
        let replica = |region: &str| format!("arn:aws:kms:{region}:123456789012:key/mrk-1");
        assert!(key(ARN).unwraps(ARN));
        assert!(key(&replica("eu-west-1")).unwraps(&replica("us-east-1")));
        assert!(!key(ARN).unwraps(&ARN.replace("eu-central-1", "us-east-1")));
        assert!(!key(ARN).unwraps(&ARN.replace("1234567890ab", "1234567890ac")));
        let elsewhere = replica("us-east-1").replace("123456789012", "123456789013");
        assert!(!key(&replica("eu-west-1")).unwraps(&elsewhere) && !key(ARN).unwraps(""));
    }

    #[test]
    fn what_kms_says_is_told_by_what_can_be_done_about_it() {
        let kms = Kms::new(KmsKey { arn: KeyArn::parse(ARN).unwrap(), endpoint: None });
        let said = |code, message| kms.refused(code, message, "Encrypt").to_string();
        assert!(said("AccessDeniedException", "no").contains("must be allowed kms:Encrypt with arn:aws:kms"));
        assert!(said("DisabledException", "").contains("is it disabled"));
        assert!(said("NotFoundException", "").contains("another account or region"));
        assert!(matches!(kms.refused("IncorrectKeyException", "", "Decrypt"), KmsError::Changed));
        assert!(matches!(kms.refused("ThrottlingException", "", "Encrypt"), KmsError::Throttled));
        let long = said("SomethingNew", &"x\n".repeat(400));
        assert!(long.contains("SomethingNew: x x") && long.len() < 400, "{long}");
    }
}
