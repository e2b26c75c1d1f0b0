//! What Weir knows of an event besides what a format has a field for, each as a short text by its name: annotations
//! `weir.dev/…` of audit events, `unmapped.weir` of OCSF, `weir` of ECS.
//!
//! What the kernel and the cluster attest stands beside what is a claim; names of claims begin with `claimed-`.

use std::collections::BTreeMap;

use serde_json::json;
use weir_common::event::{ActsAs, Caller, IdentityMethod, Outcome, RequestClosed};

use super::{
    context::{Request, Scene},
    facts, listed,
};

/// Texts by their names.
pub(super) type Texts = BTreeMap<String, String>;

/// Texts by their names, of those that are known.
#[derive(Default)]
struct Known(Texts);

impl Known {
    fn add(&mut self, name: &str, text: impl ToString) {
        let text = text.to_string();
        if !text.is_empty() {
            self.0.insert(name.to_owned(), text);
        }
    }

    fn add_known(&mut self, name: &str, text: Option<impl ToString>) {
        if let Some(text) = text {
            self.add(name, text);
        }
    }
}

/// Of every event.
pub(super) fn texts(scene: &Scene<'_>) -> Texts {
    let (event, mut all) = (scene.event, Known::default());
    all.add("epoch", &event.epoch);
    all.add("sequence", event.sequence);
    all.add("node", &event.node);
    all.add("cluster", &event.cluster);
    all.add_known("tenant", event.tenant.as_ref());
    all.add("session", &event.session);
    all.add_known("invocation", event.invocation.as_ref());
    all.add("context-missing", scene.missing().join(","));
    if let Some(caller) = scene.caller() {
        of_caller(caller, &mut all);
    }
    if let Some(container) = scene.container() {
        all.add("container", &container.name);
        all.add("container-id", &container.id);
    }
    if let Some(process) = scene.process() {
        all.add("process-pid", process.pid);
        all.add("process-start-ns", process.start_boottime_ns);
        all.add("process-uid", process.uid);
        all.add("process-executable", &process.executable);
        if !process.argv.is_empty() {
            all.add("claimed-argv", listed(&process.argv));
        }
    }
    if let Some(role) = scene.session.and_then(|session| session.role.as_ref()) {
        all.add("assumed-role", &role.assumed_role_arn);
        all.add("access-key-id", &role.access_key_id);
    }
    // Also where no request says so: what a credential claims must not look like what was verified.
    all.add("user-verified", facts::verified_user(scene.request).is_some());
    if let Some(request) = scene.request {
        of_request(request, &mut all);
    }
    all.0
}

fn of_caller(caller: &Caller, all: &mut Known) {
    if let Some(pod) = &caller.pod {
        all.add("pod", format!("{}/{}", pod.namespace, pod.name));
        all.add("pod-uid", &pod.uid);
        all.add("service-account", &pod.service_account);
        if !pod.intent.is_empty() {
            all.add("claimed-intent", json!(pod.intent));
        }
    }
    all.add("cgroup", caller.cgroup);
    all.add("netns", caller.netns);
    all.add("dialled", &caller.dialled);
    all.add_known("claimed-user", caller.claimed_user.as_ref());
}

fn of_request(request: &Request, all: &mut Known) {
    let opened = &request.opened;
    if let Some(identity) = &opened.identity {
        all.add("identity-method", method(identity.method));
        all.add_known("identity-issuer", identity.issuer.as_ref());
        all.add_known("rule", identity.rule.as_ref());
        all.add_known("acts-as", identity.acts_as.as_ref().map(acts_as));
    }
    all.add_known("upgrade", opened.upgrade.as_ref());
    if let Some(execution) = &opened.execution {
        all.add_known("exec-container", execution.container.as_ref());
        if !execution.command.is_empty() {
            all.add("exec-command", listed(&execution.command));
        }
        all.add("exec-stdin", execution.stdin);
        all.add("exec-tty", execution.tty);
    }
}

/// Of the end of a request, which may not be known itself.
pub(super) fn of_end(request: Option<&Request>, closed: &RequestClosed) -> Texts {
    let mut all = Known::default();
    all.add("outcome", outcome(closed.outcome));
    all.add_known("outcome-reason", closed.reason.as_ref());
    all.add_known("exit-code", closed.exit_code);
    all.add("duration-us", closed.duration_us);
    all.add("response-bytes", closed.response_bytes);
    if closed.client_bytes > 0 {
        all.add("client-bytes", closed.client_bytes);
    }
    let sent = request.and_then(|request| request.opened.body.as_ref());
    for (name, body) in [("request", sent), ("response", closed.body.as_ref())] {
        let Some(body) = body else { continue };
        all.add_known(&format!("{name}-digest"), body.digest.as_ref());
        all.add_known(&format!("{name}-truncated"), body.truncated.as_ref());
        if body.masked > 0 {
            all.add(&format!("{name}-masked-values"), body.masked);
        }
    }
    let Some(request) = request else { return all.0 };
    all.add_known("refused", request.refused.as_ref().map(|(_, reason)| reason));
    if !request.files.is_empty() {
        let files = request
            .files
            .iter()
            .map(|file| json!({"path": file.path, "digest": file.digest, "bytes": file.bytes}));
        all.add("files-copied", json!(files.collect::<Vec<_>>()));
    }
    if request.files_more > 0 {
        all.add("files-copied-more", request.files_more);
    }
    if request.connections > 0 {
        all.add("connections-forwarded", request.connections);
    }
    all.add_known("gap", request.gap.as_ref());
    if request.gaps > 0 {
        all.add("gaps", request.gaps);
    }
    all.0
}

/// How an identity was established, as the record has it.
pub(super) fn method(method: IdentityMethod) -> &'static str {
    match method {
        IdentityMethod::Token => "token",
        IdentityMethod::ClientCertificate => "clientCertificate",
        IdentityMethod::Workload => "workload",
        IdentityMethod::Unverified => "unverified",
    }
}

/// As whom a request goes on, in a word.
pub(super) fn acts_as(acts_as: &ActsAs) -> String {
    match acts_as {
        ActsAs::PassThrough => "passThrough".to_owned(),
        ActsAs::Impersonate { user } => format!("impersonate:{}", user.username),
        ActsAs::Role { arn, .. } => format!("role:{arn}"),
    }
}

/// How a request ended, as the record has it.
pub(super) fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Complete => "complete",
        Outcome::ClientAborted => "clientAborted",
        Outcome::UpstreamFailed => "upstreamFailed",
        Outcome::Refused => "refused",
        Outcome::Drained => "drained",
    }
}
