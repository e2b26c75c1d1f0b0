//! What a request means to the API server: verb, resource, namespace, name, read from method and path.
//!
//! Follows Kubernetes' `RequestInfoFactory` (k8s.io/apiserver `pkg/endpoints/request/requestinfo.go`), so that
//! rules and records speak of the same things as RBAC and the API server's audit log. Sans-IO.

use serde::{Deserialize, Serialize};

/// The attributes of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attributes {
    /// Kubernetes verb: get, list, watch, create, update, patch, delete, deletecollection, proxy, connect; for
    /// non-resource paths the method in lower case.
    pub verb: String,
    /// Empty for the core group and for non-resource requests.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub api_group: String,
    /// For example `v1`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub api_version: String,
    /// For example `pods`; empty for non-resource requests.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub resource: String,
    /// For example `exec`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subresource: String,
    /// Empty for cluster-scoped and all-namespace requests.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Object name; empty for collections.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
}
