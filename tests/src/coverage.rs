//! Coverage: Weir's records of a pod against the API server's own audit log, joined by Audit-ID in both directions.
//!
//! Pure: entries and events in, a comparison out. What follows from a difference is the caller's to decide.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use weir_common::event::{Event, Kind, Outcome};

use crate::audit::AuditEntry;

/// Most differences that are written out in each direction.
const SHOWN_MAX: usize = 20;

/// How far two witnesses agree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// By verb and resource: entries of the audit log, and how many of them have a record.
    pub rows: BTreeMap<(String, String), (usize, usize)>,
    /// What the API server saw and Weir did not record.
    pub unrecorded: Vec<String>,
    /// What Weir says it forwarded and the API server did not see.
    pub unaudited: Vec<String>,
    /// What has more than one entry in the audit log, or more than one record, under one id.
    pub repeated: Vec<String>,
    /// Recorded requests that need no audit entry: refused by Weir, or not delivered to the API server.
    pub not_forwarded: usize,
}

impl Coverage {
    /// Compares finished requests of the pod `uid` in the audit log with the events of a journal.
    #[must_use]
    pub fn compare(audit: &[AuditEntry], events: &[Event], uid: &str) -> Self {
        let recorded = Recorded::of_pod(events, uid);
        let mut coverage = Self {
            not_forwarded: recorded.not_forwarded.len(),
            repeated: recorded.repeated.iter().map(|id| format!("{id} on record")).collect(),
            ..Self::default()
        };
        let mut audited = BTreeSet::new();
        for entry in audit {
            if !audited.insert(entry.audit_id.as_str()) {
                coverage.repeated.push(format!("{} in the audit log", entry.audit_id));
            }
            let resource = if entry.resource.is_empty() { "(non-resource)" } else { &entry.resource };
            let row = coverage.rows.entry((entry.verb.clone(), resource.to_owned())).or_default();
            row.0 += 1;
            if recorded.opened.contains_key(entry.audit_id.as_str()) {
                row.1 += 1;
            } else {
                coverage.unrecorded.push(format!("{} {} {}", entry.audit_id, entry.verb, entry.request_uri));
            }
        }
        for (id, what) in recorded.opened {
            if !audited.contains(id) && !recorded.not_forwarded.contains(id) {
                coverage.unaudited.push(format!("{id} {what}"));
            }
        }
        coverage
    }

    /// Ids of the sessions in a journal, in order.
    #[must_use]
    pub fn sessions(events: &[Event]) -> Vec<&str> {
        let started = events.iter().filter(|event| matches!(event.kind, Kind::SessionStarted { .. }));
        started.map(|event| event.session.as_str()).collect()
    }

    /// Id of the first request with this method whose path contains `path`.
    #[must_use]
    pub fn find_request<'a>(events: &'a [Event], method: &str, path: &str) -> Option<&'a str> {
        let is_it = |event: &&Event| match &event.kind {
            Kind::RequestOpened(opened) => opened.method == method && opened.uri.contains(path),
            _ => false,
        };
        events.iter().find(is_it)?.request.as_deref()
    }

    /// Whether both witnesses saw the same requests, each once, and at least one.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        !self.rows.is_empty()
            && self.unrecorded.is_empty()
            && self.unaudited.is_empty()
            && self.repeated.is_empty()
    }
}

/// The requests of one pod in a journal.
#[derive(Default)]
struct Recorded<'a> {
    opened: BTreeMap<&'a str, String>,
    not_forwarded: BTreeSet<&'a str>,
    repeated: Vec<&'a str>,
}

impl<'a> Recorded<'a> {
    fn of_pod(events: &'a [Event], uid: &str) -> Self {
        let mut sessions = BTreeSet::new();
        let mut recorded = Self::default();
        for event in events {
            if let Kind::SessionStarted { caller } = &event.kind
                && caller.pod.as_ref().is_some_and(|pod| pod.uid == uid)
            {
                sessions.insert((event.epoch.as_str(), event.session.as_str()));
            }
            let Some(request) = event.request.as_deref() else { continue };
            if !sessions.contains(&(event.epoch.as_str(), event.session.as_str())) {
                continue;
            }
            match &event.kind {
                Kind::RequestOpened(opened) => {
                    let what = format!("{} {}", opened.method, opened.uri);
                    if recorded.opened.insert(request, what).is_some() {
                        recorded.repeated.push(request);
                    }
                }
                Kind::RequestRefused { .. } => {
                    recorded.not_forwarded.insert(request);
                }
                Kind::RequestClosed(closed)
                    if matches!(closed.outcome, Outcome::Refused | Outcome::UpstreamFailed) =>
                {
                    recorded.not_forwarded.insert(request);
                }
                _ => {}
            }
        }
        recorded
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "{:<12} {:<34} {:>9} {:>9}", "verb", "resource", "audit log", "recorded")?;
        let mut total = (0, 0);
        for ((verb, resource), (audited, recorded)) in &self.rows {
            let mark = if audited == recorded { "" } else { "  <- missing" };
            writeln!(formatter, "{verb:<12} {resource:<34} {audited:>9} {recorded:>9}{mark}")?;
            total = (total.0 + audited, total.1 + recorded);
        }
        writeln!(formatter, "{:<47} {:>9} {:>9}", "all", total.0, total.1)?;
        writeln!(formatter, "recorded and not forwarded: {}", self.not_forwarded)?;
        list(formatter, "in the audit log, not recorded", &self.unrecorded)?;
        list(formatter, "more than once", &self.repeated)?;
        list(formatter, "recorded as forwarded, not in the audit log", &self.unaudited)
    }
}

fn list(formatter: &mut fmt::Formatter<'_>, title: &str, lines: &[String]) -> fmt::Result {
    write!(formatter, "{title}: {}", lines.len())?;
    for line in lines.iter().take(SHOWN_MAX) {
        write!(formatter, "\n    {line}")?;
    }
    if lines.len() > SHOWN_MAX {
        write!(formatter, "\n    … and {} more", lines.len() - SHOWN_MAX)?;
    }
    writeln!(formatter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(id: &str) -> AuditEntry {
        AuditEntry {
            audit_id: id.to_owned(),
            stage: "ResponseComplete".to_owned(),
            verb: "get".to_owned(),
            source_ips: Vec::new(),
            request_uri: "/api".to_owned(),
            user: "u".to_owned(),
            pod_uid: Some("pod-1".to_owned()),
            resource: "pods".to_owned(),
            status: Some(200),
        }
    }

    fn event(request: Option<&str>, kind: &serde_json::Value) -> Event {
        let mut event = json!({
            "schema": 1, "sequence": 0, "timeUnixUs": 0, "cluster": "c", "node": "n", "epoch": "e", "session": "s",
        });
        if let Some(request) = request {
            event["request"] = json!(request);
        }
        event["type"] = kind["type"].clone();
        event["data"] = kind["data"].clone();
        serde_json::from_value(event).unwrap()
    }

    fn session() -> Event {
        let pod = json!({"namespace": "a", "name": "p", "uid": "pod-1"});
        let caller = json!({"pod": pod, "cgroup": 1, "netns": 2, "dialled": "10.96.0.1:443"});
        event(None, &json!({"type": "sessionStarted", "data": {"caller": caller}}))
    }

    fn opened(id: &str) -> Event {
        let data = json!({
            "method": "GET", "uri": "/api", "protocol": "HTTP/2", "headers": [], "attributes": {"verb": "get"},
        });
        event(Some(id), &json!({"type": "requestOpened", "data": data}))
    }

    fn refused(id: &str) -> Event {
        event(Some(id), &json!({"type": "requestRefused", "data": {"status": 503, "reason": "full"}}))
    }

    #[test]
    fn the_same_requests_on_both_sides_are_complete() {
        let coverage =
            Coverage::compare(&[entry("1"), entry("2")], &[session(), opened("1"), opened("2")], "pod-1");
        assert!(coverage.is_complete(), "{coverage}");
    }

    #[test]
    fn nothing_on_either_side_is_not_complete() {
        assert!(!Coverage::compare(&[], &[], "pod-1").is_complete());
    }

    #[test]
    fn a_request_that_went_around_is_named() {
        let coverage = Coverage::compare(&[entry("1"), entry("2")], &[session(), opened("1")], "pod-1");
        assert_eq!(coverage.unrecorded, ["2 get /api"]);
    }

    #[test]
    fn a_record_that_the_api_server_never_saw_is_named() {
        let coverage = Coverage::compare(&[entry("1")], &[session(), opened("1"), opened("2")], "pod-1");
        assert_eq!(coverage.unaudited, ["2 GET /api"]);
    }

    #[test]
    fn an_id_that_two_requests_have_is_named() {
        let events = [session(), opened("1"), opened("2"), opened("2")];
        let coverage = Coverage::compare(&[entry("1"), entry("1"), entry("2")], &events, "pod-1");
        assert_eq!(coverage.repeated, ["2 on record", "1 in the audit log"]);
        assert!(!coverage.is_complete());
    }

    #[test]
    fn a_refused_request_needs_no_audit_entry() {
        let events = [session(), opened("1"), opened("2"), refused("2")];
        let coverage = Coverage::compare(&[entry("1")], &events, "pod-1");
        assert!(coverage.is_complete(), "{coverage}");
        assert_eq!(coverage.not_forwarded, 1);
    }

    #[test]
    fn records_of_another_pod_do_not_count() {
        let coverage = Coverage::compare(&[entry("1")], &[session(), opened("1")], "pod-2");
        assert_eq!(coverage.unrecorded, ["1 get /api"]);
    }
}
