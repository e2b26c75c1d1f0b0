//! Certificates from a signer of the cluster's own, through the Kubernetes API.
//!
//! `kubernetes.io/kubelet-serving` issues for subject `O=system:nodes, CN=system:node:…` with any DNS and IP names, for the usages
//! digital signature, key encipherment and server auth (k8s.io/kubernetes `pkg/apis/certificates/helpers.go`,
//! `ValidateKubeletServingCSR`; EKS' `beta.eks.amazonaws.com/app-serving`, by its documentation, for any subject), and by default chains to the CA that every pod trusts. Nobody approves its
//! requests automatically: the agent does, if its service account may, and else waits for the `approver`. The only file of trust that talks to
//! a cluster beside `approver`; verifying what comes back is the caller's.

use std::{fmt, time::Duration};

use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{
    Api, Client,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams},
    runtime::wait::await_condition,
};
use rcgen::DnType;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::json;
use tracing::warn;

use super::ClusterCa;

/// The signer that is asked unless another one is configured.
pub const SIGNER_NAME: &str = "kubernetes.io/kubelet-serving";
/// Life that is asked for; the signer may give less.
pub(super) const EXPIRATION_SECONDS_MAX: i32 = 24 * 60 * 60;
/// HTTP: not allowed.
const FORBIDDEN: u16 = 403;
/// HTTP: somebody else has changed it meanwhile.
pub(super) const CONFLICT: u16 = 409;
/// How long approval and signer may take together.
const ISSUE_DEADLINE: Duration = Duration::from_secs(30);
/// What the agent's service account must be allowed, for error messages.
const NEEDED_RIGHTS: &str = "is the agent's service account allowed to create, get, list, watch and delete certificatesigningrequests?";
/// What the names of an agent's requests begin with.
pub(super) const NAME_PREFIX: &str = "weir-serving-";
/// What is asked for: what the signer gives, and nothing else.
pub(super) const USAGES: [&str; 3] = ["digital signature", "key encipherment", "server auth"];

/// Why the signer gave no certificate.
#[derive(Debug, thiserror::Error)]
pub enum ClusterSignerError {
    /// The API server refused or could not be reached.
    #[error("cannot {action} the certificate signing request {name}: {reason}; {NEEDED_RIGHTS}")]
    Api {
        /// What was tried.
        action: &'static str,
        /// Name of the request.
        name: String,
        /// Why, in the API server's words where it answered.
        reason: String,
    },
    /// The watch on the request broke.
    #[error("lost sight of the certificate signing request {name}; {NEEDED_RIGHTS}")]
    Watch {
        /// Name of the request.
        name: String,
        /// Why.
        source: Box<kube::runtime::wait::Error>,
    },
    /// No certificate in time.
    #[error(
        "the signer {signer} issued nothing for {name} within {} s; does kube-controller-manager run with \
         --cluster-signing-cert-file, and does this cluster offer that signer (EKS: beta.eks.amazonaws.com/app-serving)?",
        ISSUE_DEADLINE.as_secs()
    )]
    Timeout {
        /// Who was asked.
        signer: String,
        /// Name of the request.
        name: String,
    },
    /// Nobody has approved it, and the agent may not.
    #[error(
        "nobody approved the certificate signing request {name} within {} s, and the agent's service account may not \
         itself; does the approver run (the Deployment weir-approver), and what does its log say?",
        ISSUE_DEADLINE.as_secs()
    )]
    NotApproved {
        /// Name of the request.
        name: String,
    },
    /// Denied or failed.
    #[error(
        "the certificate signing request {name} ended as {condition}: {message}; correct that, and the agent asks anew by itself \
         (the approver, the Deployment weir-approver, has what it denied in its log)"
    )]
    Refused {
        /// Name of the request.
        name: String,
        /// `Denied` or `Failed`.
        condition: String,
        /// The signer's words.
        message: String,
    },
    /// What came back is not PEM.
    #[error("the certificate for {name} is not valid PEM")]
    Pem {
        /// Name of the request.
        name: String,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// Somebody deleted the request before it was answered.
    #[error("the certificate signing request {name} was deleted before it was answered")]
    Deleted {
        /// Name of the request.
        name: String,
    },
}

/// The signer of one cluster.
#[derive(Clone)]
pub struct ClusterSigner {
    client: Client,
    node: String,
    cluster_ca: ClusterCa,
    name: String,
}

impl fmt::Debug for ClusterSigner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ClusterSigner").field("node", &self.node).finish_non_exhaustive()
    }
}

impl ClusterSigner {
    /// Asks the signer `name` through `client`, in the name of `node`; `cluster_ca` is what the cluster's pods trust.
    pub fn new(client: Client, node: impl Into<String>, cluster_ca: ClusterCa, name: String) -> Self {
        Self { client, node: node.into(), cluster_ca, name }
    }

    /// The signer's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn cluster_ca(&self) -> &ClusterCa {
        &self.cluster_ca
    }

    pub(super) fn subject(&self) -> [(DnType, String); 2] {
        [
            (DnType::OrganizationName, "system:nodes".to_owned()),
            (DnType::CommonName, format!("system:node:{}", self.node)),
        ]
    }

    /// Has the PEM request signed; leaf first.
    ///
    /// # Errors
    /// Not allowed, refused, or not answered in time.
    pub(super) async fn sign(
        &self,
        request_pem: &str,
    ) -> Result<Vec<CertificateDer<'static>>, ClusterSignerError> {
        let requests: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let name = format!("{NAME_PREFIX}{}", uuid::Uuid::now_v7());
        requests
            .create(&PostParams::default(), &csr(&name, &self.name, request_pem))
            .await
            .map_err(|source| api_error("create", &name, source))?;
        let outcome = approve_and_wait(&requests, &self.name, &name).await;
        // Answered or not, it has served its purpose; the cluster's own clean-up would take an hour or a day.
        if let Err(error) = requests.delete(&name, &DeleteParams::default()).await {
            warn!(
                event = "certificate-request-stays",
                error = &error as &dyn std::error::Error,
                name,
                "cannot delete a certificate signing request; the cluster will in time"
            );
        }
        let certificate = outcome?;
        CertificateDer::pem_slice_iter(&certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| ClusterSignerError::Pem { name, source })
    }
}

fn api_error(action: &'static str, name: &str, source: kube::Error) -> ClusterSignerError {
    let reason = match source {
        kube::Error::Api(status) => status.message,
        other => other.to_string(),
    };
    ClusterSignerError::Api { action, name: name.to_owned(), reason }
}

fn csr(name: &str, signer: &str, request_pem: &str) -> CertificateSigningRequest {
    CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(request_pem.as_bytes().to_vec()),
            signer_name: signer.to_owned(),
            usages: Some(USAGES.map(str::to_owned).to_vec()),
            expiration_seconds: Some(EXPIRATION_SECONDS_MAX),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    }
}

async fn approve_and_wait(
    requests: &Api<CertificateSigningRequest>,
    signer: &str,
    name: &str,
) -> Result<Vec<u8>, ClusterSignerError> {
    let approval = json!({"status": {"conditions": [{
        "type": "Approved",
        "status": "True",
        "reason": "WeirAgent",
        "message": "serving certificate of the Weir agent of this node",
    }]}});
    let approved = requests.patch_approval(name, &PatchParams::default(), &Patch::Merge(&approval)).await;
    let approves_itself = match approved {
        Ok(_) => true,
        // Somebody else does, and may have already.
        Err(kube::Error::Api(status)) if matches!(status.code, FORBIDDEN | CONFLICT) => false,
        Err(source) => return Err(api_error("approve", name, source)),
    };
    let answered = await_condition(requests.clone(), name, |request: Option<&CertificateSigningRequest>| {
        request.is_none_or(|request| certificate(request).is_some() || refusal(request).is_some())
    });
    let answered = match tokio::time::timeout(ISSUE_DEADLINE, answered).await {
        Ok(answered) => answered,
        Err(_elapsed) => {
            let approved = approves_itself || requests.get(name).await.is_ok_and(|last| is_approved(&last));
            let name = name.to_owned();
            return Err(match approved {
                true => ClusterSignerError::Timeout { signer: signer.to_owned(), name },
                false => ClusterSignerError::NotApproved { name },
            });
        }
    };
    let request = answered
        .map_err(|source| ClusterSignerError::Watch { name: name.to_owned(), source: Box::new(source) })?
        .ok_or_else(|| ClusterSignerError::Deleted { name: name.to_owned() })?;
    match (refusal(&request), certificate(&request)) {
        (Some((condition, message)), _) => {
            Err(ClusterSignerError::Refused { name: name.to_owned(), condition, message })
        }
        (None, Some(certificate)) => Ok(certificate.to_vec()),
        (None, None) => Err(ClusterSignerError::Deleted { name: name.to_owned() }),
    }
}

fn is_approved(request: &CertificateSigningRequest) -> bool {
    let conditions = request.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == "Approved")
}

fn certificate(request: &CertificateSigningRequest) -> Option<&[u8]> {
    let bytes = &request.status.as_ref()?.certificate.as_ref()?.0;
    (!bytes.is_empty()).then_some(bytes)
}

fn refusal(request: &CertificateSigningRequest) -> Option<(String, String)> {
    let conditions = request.status.as_ref()?.conditions.as_ref()?;
    let ended =
        conditions.iter().find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed"))?;
    Some((ended.type_.clone(), ended.message.clone().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_status(status: serde_json::Value) -> CertificateSigningRequest {
        let mut request = csr("weir-serving-test", SIGNER_NAME, "pem");
        request.status = serde_json::from_value(status).expect("a status");
        request
    }

    #[test]
    fn an_unanswered_request_has_neither_certificate_nor_refusal() {
        let request = with_status(json!({"conditions": [
            {"type": "Approved", "status": "True"},
        ]}));
        assert_eq!(certificate(&request), None);
        assert_eq!(refusal(&request), None);
        assert!(is_approved(&request) && !is_approved(&csr("weir-serving-test", SIGNER_NAME, "pem")));
    }

    #[test]
    fn a_failed_request_tells_the_signers_words() {
        let request = with_status(json!({"conditions": [
            {"type": "Approved", "status": "True"},
            {"type": "Failed", "status": "True", "message": "subject not allowed"},
        ]}));
        assert_eq!(refusal(&request), Some(("Failed".to_owned(), "subject not allowed".to_owned())));
    }
}
