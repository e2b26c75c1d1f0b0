//! Which objects a body holds, where neither its request says it nor everybody can read the body.

use serde::{Deserialize, Serialize};

use super::Channel;

/// Objects of a body, or of one of its pieces, as the body names them: a claim of whoever sent it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectsNamed {
    /// The body: `requestBody` or `responseBody`.
    pub channel: Channel,
    /// The objects, in their order.
    pub objects: Vec<NamedObject>,
    /// Objects of the body that follow and are not named, since there are too many.
    #[serde(default, skip_serializing_if = "super::is_zero")]
    pub left_out: u64,
}

/// One object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamedObject {
    /// What happened to it, in a watch: `ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK`, `ERROR`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// API version, for example `apps/v1`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub api_version: String,
    /// Kind.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// Namespace; empty if it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Version of the object that the server has stored.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub resource_version: String,
}
