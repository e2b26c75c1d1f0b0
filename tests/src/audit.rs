//! The API server's own audit log, read as a witness: what requests it saw, from which pod, how they ended.
//!
//! Only what comparisons with Weir's records need is parsed; the format is `audit.k8s.io/v1`, one JSON object a line.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

/// Where a bound service account token's pod stands in the user's extra fields.
/// Source: k8s.io/apiserver `pkg/authentication/serviceaccount` (`PodUIDKey`).
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    /// Id that a request's `Audit-ID` header gave it.
    pub audit_id: String,
    /// `ResponseComplete` for a request that is over.
    pub stage: String,
    /// Kubernetes verb.
    pub verb: String,
    /// Path and query.
    pub request_uri: String,
    /// User name.
    pub user: String,
    /// Where it came from: what `X-Forwarded-For` says, then the address of the connection itself.
    pub source_ips: Vec<String>,
    /// UID of the pod whose token made the request.
    pub pod_uid: Option<String>,
    /// Resource with subresource, for example `pods/exec`; empty for non-resource requests.
    pub resource: String,
    /// HTTP status.
    pub status: Option<u16>,
}

/// All entries of the log at `path`, in order. A last line that is still being written is left out.
///
/// # Errors
/// When the log cannot be read or a line is no audit event.
pub fn read(path: &Path) -> Result<Vec<AuditEntry>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text, |_| true).with_context(|| format!("{} is damaged", path.display()))
}

/// The entries for finished requests that the pod `uid` made with its own token.
///
/// # Errors
/// Those of [`read`].
pub fn finished_by_pod(path: &Path, uid: &str) -> Result<Vec<AuditEntry>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    // It is long, and asked again and again: most lines are of others.
    let mut entries =
        parse(&text, |line| line.contains(uid)).with_context(|| format!("{} is damaged", path.display()))?;
    entries.retain(|entry| entry.stage == "ResponseComplete" && entry.pod_uid.as_deref() == Some(uid));
    Ok(entries)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    #[serde(rename = "auditID")]
    audit_id: String,
    stage: String,
    #[serde(default)]
    verb: String,
    #[serde(default, rename = "requestURI")]
    request_uri: String,
    #[serde(default, rename = "sourceIPs")]
    source_ips: Vec<String>,
    #[serde(default)]
    user: Value,
    #[serde(default)]
    object_ref: Value,
    #[serde(default)]
    response_status: Value,
}

fn parse(text: &str, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<AuditEntry>> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().enumerate().filter(|(_, line)| !line.is_empty() && is_wanted(line));
    lines
        .map(|(number, line)| {
            let line: Line = serde_json::from_str(line)
                .with_context(|| format!("line {} is no audit event", number + 1))?;
            Ok(AuditEntry::from(line))
        })
        .collect()
}

impl From<Line> for AuditEntry {
    fn from(line: Line) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let subresource = text(&line.object_ref["subresource"]);
        let mut resource = text(&line.object_ref["resource"]);
        if !subresource.is_empty() {
            resource = format!("{resource}/{subresource}");
        }
        Self {
            audit_id: line.audit_id,
            stage: line.stage,
            verb: line.verb,
            request_uri: line.request_uri,
            source_ips: line.source_ips,
            user: text(&line.user["username"]),
            pod_uid: line.user["extra"][POD_UID][0].as_str().map(str::to_owned),
            resource,
            status: line.response_status["code"].as_u64().and_then(|code| u16::try_from(code).ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Metadata","auditID":"a-1","stage":"ResponseComplete","requestURI":"/api/v1/namespaces/a/pods/p/exec?command=id","verb":"get","sourceIPs":["10.0.0.9","10.0.0.1"],"user":{"username":"system:serviceaccount:a:s","extra":{"authentication.kubernetes.io/pod-uid":["u-1"]}},"objectRef":{"resource":"pods","namespace":"a","name":"p","apiVersion":"v1","subresource":"exec"},"responseStatus":{"metadata":{},"code":101}}"#;

    #[test]
    fn an_entry_names_the_pod_whose_token_made_the_request() {
        let entries = parse(&format!("{LINE}\n"), |_| true).unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].pod_uid.as_deref(), Some("u-1"));
        assert_eq!((entries[0].resource.as_str(), entries[0].status), ("pods/exec", Some(101)));
        assert_eq!(entries[0].source_ips, ["10.0.0.9", "10.0.0.1"]);
    }

    #[test]
    fn a_line_that_is_still_being_written_is_left_out() {
        assert_eq!(parse(&format!("{LINE}\n{}", &LINE[..40]), |_| true).unwrap().len(), 1);
        assert_eq!(parse(&LINE[..40], |_| true).unwrap(), []);
    }

    #[test]
    fn a_line_that_is_no_audit_event_is_named() {
        let error = parse(&format!("{LINE}\nnonsense\n"), |_| true).unwrap_err();
        assert_eq!(error.to_string(), "line 2 is no audit event");
    }
}
