//! What stands at STS's host name: TLS, then moto. It makes up for what moto lacks, and can fail as STS does.
//!
//! moto routes no presigned GETs and answers in XML only. So a presigned GetCallerIdentity is checked here, asked of moto as a
//! POST, and its answer turned into the JSON that aws-iam-authenticator asks for.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::presigned::{Issued, Presigned, Refusal, pairs};

/// Most bytes of a request or answer.
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// A call of STS.
#[derive(Clone, Debug)]
pub struct Call {
    /// For example `AssumeRole`.
    pub action: String,
    /// Its parameters, without tokens.
    pub parameters: BTreeMap<String, String>,
    /// Who signed it; empty for a call that needs no signature.
    pub access_key_id: String,
    /// What the token says that it presents; null where there is none.
    pub web_identity: Value,
}

/// How STS fails.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It answers with an error.
    Error {
        /// HTTP status.
        status: u16,
        /// As AWS calls it.
        code: &'static str,
        /// Its words.
        message: &'static str,
    },
    /// It takes the request and says nothing.
    Silence,
}

/// The front; it ends when this value goes.
#[derive(Debug)]
pub(super) struct Front {
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Debug)]
struct Shared {
    moto: String,
    client: Client<HttpConnector, Full<Bytes>>,
    calls: Mutex<Vec<Call>>,
    fault: Mutex<Option<Fault>>,
    /// By access key.
    issued: Mutex<HashMap<String, Issued>>,
    /// How long credentials live from now on, where not as long as was asked for.
    life: Mutex<Option<Duration>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Front {
    /// Listens on port 443 of `address` with the certificate `sts` in `folder`, for the moto on `moto_port`.
    pub(super) fn start(folder: &Path, address: &str, moto_port: u16) -> Result<Self> {
        let address: SocketAddr = format!("{address}:443").parse().context("no address for the front")?;
        let tls = TlsAcceptor::from(Arc::new(tls(folder)?));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("cannot make the front's runtime")?;
        let listener = runtime
            .block_on(TcpListener::bind(address))
            .with_context(|| format!("cannot listen on {address}; does another rig run?"))?;
        let shared = Arc::new(Shared {
            moto: format!("http://127.0.0.1:{moto_port}/"),
            client: Client::builder(TokioExecutor::new()).build_http(),
            calls: Mutex::default(),
            fault: Mutex::default(),
            issued: Mutex::default(),
            life: Mutex::default(),
        });
        runtime.spawn(serve(listener, tls, shared.clone()));
        Ok(Self { shared, runtime: Some(runtime) })
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        locked(&self.shared.calls).clone()
    }

    pub(super) fn fail(&self, fault: Option<Fault>) {
        *locked(&self.shared.fault) = fault;
    }

    pub(super) fn credentials_live(&self, life: Option<Duration>) {
        *locked(&self.shared.life) = life;
    }

    pub(super) fn revoke(&self, access_key_id: &str) {
        locked(&self.shared.issued).remove(access_key_id);
    }

    pub(super) fn has_expired(&self, access_key_id: &str) -> Result<bool> {
        let expires = locked(&self.shared.issued).get(access_key_id).and_then(|issued| issued.expires);
        let expires =
            expires.with_context(|| format!("{access_key_id} was not issued for a time of its own"))?;
        Ok(expires <= now()?)
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Connections that a silence holds would be waited for.
            runtime.shutdown_background();
        }
    }
}

fn tls(folder: &Path) -> Result<rustls::ServerConfig> {
    let certificate = CertificateDer::from_pem_file(folder.join("sts.crt"))
        .context("cannot read the front's certificate")?;
    let key = PrivateKeyDer::from_pem_file(folder.join("sts.key")).context("cannot read the front's key")?;
    rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![certificate], key))
        .context("cannot set up the front's TLS")
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, shared) = (tls.clone(), shared.clone());
        tokio::spawn(async move {
            // Who does not trust the certificate goes away; tests look at what that client says.
            let Ok(stream) = tls.accept(stream).await else { return };
            let service = service_fn(move |request| answer(shared.clone(), request));
            let connection = hyper::server::conn::http1::Builder::new();
            let _ = connection.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    let is_presigned = head.method == Method::GET;
    if is_presigned {
        return shared.caller_identity(&head).await;
    }
    let body =
        Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes();
    let mut parameters = pairs(&String::from_utf8_lossy(&body));
    let web_identity = parameters.remove("WebIdentityToken").and_then(|token| claims(&token));
    let signed_by = head.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let access_key_id = signed_by.and_then(access_key_id).unwrap_or_default();
    let action = parameters.get("Action").cloned().unwrap_or_default();
    let web_identity = web_identity.unwrap_or_default();
    locked(&shared.calls).push(Call { action, parameters, access_key_id, web_identity });
    let fault = locked(&shared.fault).clone();
    match fault {
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::Error { status, code, message }) => {
            let body = format!(
                "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
                 <Code>{code}</Code><Message>{message}</Message></Error><RequestId>0</RequestId></ErrorResponse>"
            );
            Ok(Response::builder().status(status).body(Full::from(body))?)
        }
        None => {
            let (status, body) = shared.ask_moto(signed_by, body).await?;
            let body = shared.remember(body)?;
            let answer = Response::builder().status(status).header(header::CONTENT_TYPE, "text/xml");
            Ok(answer.body(Full::from(body))?)
        }
    }
}

impl Shared {
    async fn caller_identity(&self, head: &http::request::Parts) -> Result<Response<Full<Bytes>>> {
        let headers = head
            .headers
            .iter()
            .map(|(name, value)| {
                (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
            })
            .collect();
        let presigned = Presigned { query: head.uri.query().unwrap_or_default(), headers };
        let parameters = presigned.parameters();
        let credential = parameters.get("X-Amz-Credential").cloned().unwrap_or_default();
        locked(&self.calls).push(Call {
            action: parameters.get("Action").cloned().unwrap_or_default(),
            parameters: BTreeMap::new(),
            access_key_id: credential.split('/').next().unwrap_or_default().to_owned(),
            web_identity: Value::Null,
        });
        let issued = |id: &str| locked(&self.issued).get(id).cloned();
        if let Err(refusal) = presigned.check(now()?, issued) {
            return refused(refusal);
        }
        let signed = format!("AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=0");
        let form = Bytes::from_static(b"Action=GetCallerIdentity&Version=2011-06-15");
        let (status, body) = self.ask_moto(Some(&signed), form).await?;
        let part = |name| element(&body, name).unwrap_or_default();
        let result = json!({"Account": part("Account"), "Arn": part("Arn"), "UserId": part("UserId")});
        let body = json!({"GetCallerIdentityResponse": {"GetCallerIdentityResult": result}});
        Ok(Response::builder().status(status).body(Full::from(body.to_string()))?)
    }

    async fn ask_moto(&self, signed: Option<&str>, form: Bytes) -> Result<(StatusCode, String)> {
        let mut request = Request::post(&self.moto).header(header::HOST, super::STS_HOST);
        request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        if let Some(signed) = signed {
            request = request.header(header::AUTHORIZATION, signed);
        }
        let response =
            self.client.request(request.body(Full::from(form))?).await.context("moto does not answer")?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    /// Keeps what an answer issues, for the check of what is signed with it; gives the answer, with another end of what it
    /// issues where a test wants one.
    fn remember(&self, answer: String) -> Result<String> {
        let part = |name| element(&answer, name);
        let (Some(id), Some(secret_access_key), Some(session_token), Some(expiration)) =
            (part("AccessKeyId"), part("SecretAccessKey"), part("SessionToken"), part("Expiration"))
        else {
            return Ok(answer);
        };
        let life = locked(&self.life).map(|life| i64::try_from(life.as_secs())).transpose()?;
        let expires = life.map(|life| anyhow::Ok(now()? + life)).transpose()?;
        locked(&self.issued).insert(id, Issued { secret_access_key, session_token, expires });
        let Some(expires) = expires else { return Ok(answer) };
        let other = Timestamp::from_second(expires).context("no time")?;
        let element = |time: &str| format!("<Expiration>{time}</Expiration>");
        Ok(answer.replace(&element(&expiration), &element(&other.to_string())))
    }
}

/// Seconds since 1970.
fn now() -> Result<i64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    Ok(i64::try_from(since.as_secs())?)
}

fn refused((code, message): Refusal) -> Result<Response<Full<Bytes>>> {
    let body = json!({"Error": {"Code": code, "Message": message, "Type": "Sender"}});
    Ok(Response::builder().status(StatusCode::FORBIDDEN).body(Full::from(body.to_string()))?)
}

/// Of a JSON Web Token, whoever has signed it.
fn claims(token: &str) -> Option<Value> {
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?).ok()
}

/// Text of the first element `name`.
fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(text, _)| text.to_owned())
}

/// `AKIA…` of `AWS4-HMAC-SHA256 Credential=AKIA…/20260101/…`.
fn access_key_id(authorization: &str) -> Option<String> {
    let (_, rest) = authorization.split_once("Credential=")?;
    rest.split('/').next().map(str::to_owned)
}
