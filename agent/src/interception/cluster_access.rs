//! The agent's own way to a cluster: client, CA, and whether it answers.

use std::{
    fmt,
    future::{Ready, ready},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderValue, Request, Response, StatusCode, header::AUTHORIZATION};
use http_body_util::{BodyExt as _, Collected, Empty, LengthLimitError, Limited};
use hyper_util::{client::legacy, rt::TokioExecutor};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    authorization::v1::{
        ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec, SubjectAccessReview,
        SubjectAccessReviewSpec,
    },
    core::v1::ServiceAccount,
};
use kube::{
    Api, Client, Config,
    api::PostParams,
    client::{Body, ConfigExt as _, middleware::AuthLayer},
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::{BoxError, Layer as _, Service, ServiceBuilder, ServiceExt as _};
use weir_common::event::{Pod, UserInfo};
use zeroize::Zeroizing;

use super::service_dial::ServiceDial;
use crate::{
    auth::{
        OwnCredential, Right, effective_groups,
        fetch::{DOCUMENT_BYTES_MAX, FETCH_TIMEOUT, Fetch, FetchError},
    },
    config::Access,
    trust::ClusterCa,
};

/// Longest time that one call of the agent's own client may take, watches apart.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time until the agent's own client is connected.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a cluster cannot be reached at all, now or later.
#[derive(Debug, thiserror::Error)]
pub enum ClusterAccessError {
    /// The kubeconfig is unreadable or makes no sense.
    #[error("cannot use kubeconfig {path}: {message}")]
    Kubeconfig {
        /// The file.
        path: String,
        /// What is wrong with it.
        message: String,
    },
    /// There is no service account where there should be one.
    #[error(
        "cannot use the service account of the agent's pod: {message}; is the agent running in a pod with a mounted token?"
    )]
    InCluster {
        /// What is missing.
        message: String,
    },
    /// The CA.
    #[error("cluster {cluster}: {source}")]
    Ca {
        /// The cluster's name.
        cluster: String,
        /// What is wrong with it.
        source: Box<crate::trust::TrustError>,
    },
    /// There is no CA to verify the API server with.
    #[error(
        "cluster {cluster}: no CA to verify the API server with; set certificateAuthority, or certificate-authority-data in its kubeconfig"
    )]
    NoCa {
        /// The cluster's name.
        cluster: String,
    },
    /// The client cannot be made.
    #[error("cluster {cluster}: cannot make a client: {message}")]
    Client {
        /// The cluster's name.
        cluster: String,
        /// What is wrong.
        message: String,
    },
}

/// The agent's own access to one cluster.
#[derive(Clone)]
pub struct ClusterAccess {
    /// Its client.
    pub client: Client,
    /// The CA by which its API server is verified, and that its pods hold.
    pub ca: ClusterCa,
    /// Host of its API server as the agent dials it.
    pub host: String,
    /// What the agent shows it.
    pub own: Arc<Own>,
    /// The client certificate that the agent shows it, if it has one.
    pub certificate: Option<Arc<dyn rustls::client::ResolvesClientCert>>,
}

/// The agent's own credential for one cluster. Its `Debug` shows nothing of it.
pub struct Own {
    client: Client,
    authorization: Option<AuthLayer>,
}

impl fmt::Debug for Own {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Own").finish_non_exhaustive()
    }
}

/// Gives a request's headers back. kube keeps tokens fresh (files are read again, plugins run again) and gives them to
/// requests alone; so one is made for this.
#[derive(Clone)]
struct Echo;

impl Service<Request<Empty<Bytes>>> for Echo {
    type Response = Response<()>;
    type Error = BoxError;
    type Future = Ready<Result<Response<()>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
        let mut response = Response::new(());
        *response.headers_mut() = request.into_parts().0.headers;
        ready(Ok(response))
    }
}

impl Fetch for Own {
    fn fetch<'a>(&'a self, target: &'a str) -> BoxFuture<'a, Result<Bytes, FetchError>> {
        let url = || target.to_owned();
        async move {
            let request = Request::get(target).body(Body::empty());
            let request = request.map_err(|_| FetchError::Url { url: url() })?;
            let read = async {
                let answer = self.client.send(request).await;
                let answer = answer
                    .map_err(|error| FetchError::Unreachable { url: url(), cause: error.to_string() })?;
                if answer.status() != StatusCode::OK {
                    return Err(FetchError::Status { url: url(), status: answer.status() });
                }
                let body = Limited::new(answer.into_body(), DOCUMENT_BYTES_MAX).collect().await;
                body.map(Collected::to_bytes).map_err(|error| match error.is::<LengthLimitError>() {
                    true => FetchError::TooLong { url: url() },
                    false => FetchError::Unreachable { url: url(), cause: error.to_string() },
                })
            };
            match tokio::time::timeout(FETCH_TIMEOUT, read).await {
                Ok(document) => document,
                Err(_) => Err(FetchError::Timeout { url: url() }),
            }
        }
        .boxed()
    }
}

impl OwnCredential for Own {
    fn authorization(&self) -> BoxFuture<'_, Result<Option<HeaderValue>, String>> {
        let asked =
            self.authorization.as_ref().map(|layer| layer.layer(Echo).oneshot(Request::new(Empty::new())));
        async move {
            match asked {
                None => Ok(None),
                Some(asked) => match asked.await {
                    Ok(echoed) => Ok(echoed.headers().get(AUTHORIZATION).cloned()),
                    Err(error) => Err(error.to_string()),
                },
            }
        }
        .boxed()
    }

    fn lacks<'a>(
        &'a self,
        user: &'a UserInfo,
        rights: &'a [Right],
    ) -> BoxFuture<'a, Result<Option<&'a Right>, String>> {
        async move {
            // One after the other: a wish takes one or two, and none is asked for behind the first that is not given.
            for right in rights {
                if !self.gives(user, right).await? {
                    return Ok(Some(right));
                }
            }
            Ok(None)
        }
        .boxed()
    }

    fn mint<'a>(
        &'a self,
        pod: &'a Pod,
        audience: &'a str,
    ) -> BoxFuture<'a, Result<Zeroizing<String>, String>> {
        async move {
            let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), &pod.namespace);
            let request = TokenRequest {
                spec: TokenRequestSpec {
                    audiences: vec![audience.to_owned()],
                    bound_object_ref: Some(BoundObjectReference {
                        api_version: Some("v1".to_owned()),
                        kind: Some("Pod".to_owned()),
                        name: Some(pod.name.clone()),
                        uid: Some(pod.uid.clone()),
                    }),
                    expiration_seconds: None,
                },
                ..TokenRequest::default()
            };
            let (account, options) = (&pod.service_account, PostParams::default());
            let minted = accounts.create_token_request(account, &options, &request);
            let minted = tokio::time::timeout(READ_TIMEOUT, minted)
                .await
                .map_err(|_| format!("no answer within {} s", READ_TIMEOUT.as_secs()))?
                .map_err(|error| error.to_string())?;
            let status = minted.status.ok_or("the answer to a TokenRequest has no status")?;
            Ok(Zeroizing::new(status.token))
        }
        .boxed()
    }
}

impl Own {
    /// Whether the cluster gives `user`, being impersonated itself, this right.
    async fn gives(&self, user: &UserInfo, right: &Right) -> Result<bool, String> {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.username.clone()),
                uid: given(&user.uid),
                groups: Some(effective_groups(user)),
                extra: Some(user.extra.clone()),
                resource_attributes: Some(impersonate(right)),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let reviewed = create(&self.client, &review).await?;
        Ok(reviewed.status.is_some_and(|status| status.allowed && status.denied != Some(true)))
    }
}

/// The verb `impersonate` on what a right names.
fn impersonate(right: &Right) -> ResourceAttributes {
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    ResourceAttributes {
        verb: Some("impersonate".to_owned()),
        group: given(right.group),
        resource: Some(right.resource.to_owned()),
        subresource: given(&right.subresource),
        namespace: given(&right.namespace),
        name: given(&right.name),
        ..ResourceAttributes::default()
    }
}

/// Has the API server answer a review.
pub(super) async fn create<R>(client: &Client, review: &R) -> Result<R, String>
where
    R: kube::Resource<DynamicType = (), Scope = k8s_openapi::ClusterResourceScope>
        + Clone
        + fmt::Debug
        + serde::Serialize
        + serde::de::DeserializeOwned,
{
    let (reviews, options) = (Api::<R>::all(client.clone()), PostParams::default());
    tokio::time::timeout(READ_TIMEOUT, reviews.create(&options, review))
        .await
        .map_err(|_| format!("no answer within {} s", READ_TIMEOUT.as_secs()))?
        .map_err(|error| error.to_string())
}

impl ClusterAccess {
    /// Reads credentials and CA; does not connect.
    ///
    /// # Errors
    /// A file is missing or makes no sense; the error names it.
    pub async fn load(
        cluster: &str,
        access: &Access,
        ca_file: Option<&Path>,
    ) -> Result<Self, ClusterAccessError> {
        Self::load_with(cluster, access, ca_file, &[]).await
    }

    /// The same, with addresses at which API servers of the cluster were known to be: where the Service's address is all
    /// there is, and leads nowhere, those are tried.
    ///
    /// # Errors
    /// As of [`Self::load`].
    pub async fn load_with(
        cluster: &str,
        access: &Access,
        ca_file: Option<&Path>,
        known: &[SocketAddr],
    ) -> Result<Self, ClusterAccessError> {
        let mut config = load(access).await?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = None;
        let ca = ca(cluster, &config, ca_file)?;
        let host = config.cluster_url.host().unwrap_or_default().to_owned();
        let failed = |error: kube::Error| ClusterAccessError::Client {
            cluster: cluster.to_owned(),
            message: error.to_string(),
        };
        let authorization = config.auth_layer().map_err(failed)?;
        let resolver = config.rustls_client_config().map_err(failed)?.client_auth_cert_resolver;
        let certificate = resolver.has_certs().then_some(resolver);
        let client = match access {
            Access::InCluster => of_service(&config, known),
            Access::Kubeconfig(_) => Client::try_from(config),
        };
        let client = client.map_err(failed)?;
        let own = Arc::new(Own { client: client.clone(), authorization });
        Ok(Self { client, ca, host, own, certificate })
    }

    /// Whether the agent may impersonate any value of the extra attribute `key`.
    ///
    /// # Errors
    /// The API server does not say; in words.
    pub async fn may_impersonate_extra(&self, key: &str) -> Result<bool, String> {
        let right = Right::of_extra(key);
        self.may(impersonate(&right)).await
    }

    /// Whether the agent may ask what rights others have.
    ///
    /// # Errors
    /// The API server does not say; in words.
    pub async fn may_review_access(&self) -> Result<bool, String> {
        self.may(ResourceAttributes {
            verb: Some("create".to_owned()),
            group: Some("authorization.k8s.io".to_owned()),
            resource: Some("subjectaccessreviews".to_owned()),
            ..ResourceAttributes::default()
        })
        .await
    }

    /// Whether requests to this signer may be approved, and denied.
    ///
    /// # Errors
    /// The API server does not say; in words.
    pub async fn may_approve(&self, signer: &str) -> Result<bool, String> {
        self.may(ResourceAttributes {
            verb: Some("approve".to_owned()),
            group: Some("certificates.k8s.io".to_owned()),
            resource: Some("signers".to_owned()),
            name: Some(signer.to_owned()),
            ..ResourceAttributes::default()
        })
        .await
    }

    async fn may(&self, asked: ResourceAttributes) -> Result<bool, String> {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(asked),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        Ok(create(&self.client, &review).await?.status.is_some_and(|status| status.allowed))
    }

    /// Asks the API server for its version.
    ///
    /// # Errors
    /// It does not answer, or refuses; in words.
    pub async fn probe(&self) -> Result<String, String> {
        match tokio::time::timeout(READ_TIMEOUT, self.client.apiserver_version()).await {
            Ok(Ok(version)) => Ok(version.git_version),
            // That a certificate is none of the CA's stands among the causes.
            Ok(Err(error)) => Err(crate::doctor::chain(&error)),
            Err(_) => Err(format!("no answer within {} s", READ_TIMEOUT.as_secs())),
        }
    }
}

/// A client that finds the API server also where its Service's address leads nowhere.
fn of_service(config: &Config, known: &[SocketAddr]) -> Result<Client, kube::Error> {
    let dial = config.rustls_https_connector_with_connector(ServiceDial::new(known))?;
    let client = legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(dial);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .map_err(BoxError::from)
        .service(client);
    Ok(Client::new(service, config.default_namespace.clone()))
}

async fn load(access: &Access) -> Result<Config, ClusterAccessError> {
    match access {
        Access::InCluster => {
            Config::incluster().map_err(|error| ClusterAccessError::InCluster { message: error.to_string() })
        }
        Access::Kubeconfig(path) => {
            let failed = |message: String| ClusterAccessError::Kubeconfig {
                path: path.display().to_string(),
                message,
            };
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| failed(error.to_string()))?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(|error| failed(error.to_string()))
        }
    }
}

fn ca(cluster: &str, config: &Config, file: Option<&Path>) -> Result<ClusterCa, ClusterAccessError> {
    let wrap = |source| ClusterAccessError::Ca { cluster: cluster.to_owned(), source: Box::new(source) };
    if let Some(path) = file {
        let pem = std::fs::read(path)
            .map_err(|source| wrap(crate::trust::TrustError::ReadFile { path: path.to_owned(), source }))?;
        return ClusterCa::from_pem(&pem, path.display().to_string()).map_err(wrap);
    }
    let certificates = config.root_cert.as_ref().filter(|certificates| !certificates.is_empty());
    let certificates =
        certificates.ok_or_else(|| ClusterAccessError::NoCa { cluster: cluster.to_owned() })?;
    ClusterCa::from_der(certificates.iter().map(Vec::as_slice), format!("CA of cluster {cluster}"))
        .map_err(wrap)
}
