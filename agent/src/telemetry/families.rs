//! Which metrics there are, and where each is read. `docs/metrics.md` is written from this table.
//!
//! Labels have bounds: clusters those of the configuration, verdicts and kinds those of this program, pods
//! [`PODS_MAX`]. The kernel's counters are older than this process and outlive it; the others begin with it.

use std::time::SystemTime;

use super::{Telemetry, journal::durations, server::Monitored as _};
use crate::{
    interception::{
        canary::Health,
        counters::Counters,
        pinned::{PinnedState, PodState, pinned_state},
    },
    recording::SYNC_BOUNDS,
};

/// Most pods with series of their own; how many more there are is in `weir_pods_left_out`.
pub(super) const PODS_MAX: usize = 500;

/// What a family's numbers mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A family of metrics: one name, with the values of its labels many series.
#[derive(Debug)]
pub(super) struct Family {
    /// Without unit and `_total`.
    pub(super) name: &'static str,
    pub(super) unit: Option<&'static str>,
    pub(super) kind: Kind,
    pub(super) labels: &'static [&'static str],
    pub(super) help: &'static str,
}

impl Family {
    /// The name as it is exposed.
    #[cfg(test)]
    pub(super) fn full_name(&self) -> String {
        let unit = self.unit.map(|unit| format!("_{unit}")).unwrap_or_default();
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{total}", self.name)
    }
}

/// One series of a family.
#[derive(Debug)]
pub(super) struct Sample {
    /// In the order of the family's labels.
    pub(super) labels: Vec<String>,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Number(u64),
    /// Of a histogram: sum and count of all, and how many are in each class up to its bound.
    Classes {
        sum: f64,
        count: u64,
        classes: Vec<(f64, u64)>,
    },
}

pub(super) const fn counter(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Family {
    Family { name, unit: None, kind: Kind::Counter, labels, help }
}

pub(super) const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Family {
    Family { name, unit: None, kind: Kind::Gauge, labels, help }
}

const POD: &[&str] = &["namespace", "pod", "uid"];
const POD_VERDICT: &[&str] = &["namespace", "pod", "uid", "verdict"];

static BUILD: Family = gauge("weir_build_info", &["version"], "1, with the agent's version.");
static STARTED: Family = Family {
    name: "weir_start_timestamp",
    unit: Some("seconds"),
    kind: Kind::Gauge,
    labels: &[],
    help: "When the process started, in Unix time: it changes with each start.",
};
static READY: Family = gauge("weir_ready", &[], "1 if the agent is ready; /readyz says why it is not.");
static READABLE: Family = gauge(
    "weir_kernel_readable",
    &[],
    "1 if the pinned maps could be read; at 0 every family that is read from them is missing.",
);
static LINKS: Family = gauge("weir_kernel_links", &[], "Pinned links of the kernel programs.");
static ENDPOINTS: Family =
    gauge("weir_api_endpoints", &["kind"], "Addresses that are guarded, of API servers (api) and kubelets.");
static SEEN: Family = counter(
    "weir_kernel_connections_seen",
    &[],
    "Connects to guarded addresses that the hooks saw on the node, the canary's included.",
);
static VERDICTS: Family = counter(
    "weir_kernel_connections",
    &["verdict"],
    "The same by what the hooks did with them, the canary's included.",
);
static PROTOCOLS: Family = counter(
    "weir_kernel_protocol_refused",
    &[],
    "Sockets of enrolled pods that were refused because of their protocol, and their datagrams to API servers.",
);
static BINDS: Family =
    counter("weir_kernel_bind_refused", &[], "Sockets that were kept from taking a listener's port.");
static FLOWS: Family = counter(
    "weir_kernel_flows",
    &["result"],
    "Flow records of redirected connections: published, or lost, which closes the connection.",
);
static NOTICES: Family = counter(
    "weir_kernel_notices_lost",
    &[],
    "Reports of the kernel programs that did not fit into their buffer.",
);
static DROPPED: Family = counter(
    "weir_kernel_packets_dropped",
    &["guard"],
    "Packets to guarded addresses that came past the hooks and were dropped, at sockets or at pods' interfaces.",
);
static PODS: Family = gauge("weir_pods", &["class"], "Pods of this node by how they are treated.");
static WAITING: Family =
    gauge("weir_pods_waiting", &[], "Enrolled pods without a listener: they are denied until they have one.");
static QUARANTINED: Family = gauge("weir_pods_quarantined", &[], "Pods in quarantine.");
static LEFT_OUT: Family =
    gauge("weir_pods_left_out", &[], "Pods without series of their own, since there are too many.");
static POD_SEEN: Family =
    counter("weir_pod_connections_seen", POD, "Connects of the pod to guarded addresses that the hooks saw.");
static POD_VERDICTS: Family =
    counter("weir_pod_connections", POD_VERDICT, "The same by what the hooks did with them.");
static POD_PROXIED: Family = counter(
    "weir_pod_connections_proxied",
    POD,
    "Connections of the pod that arrived at its listener with a flow record and went to the proxy.",
);
static POD_DROPPED: Family =
    counter("weir_pod_packets_dropped", POD, "Packets of the pod that the guards dropped.");
static CONFIGURED: Family = gauge(
    "weir_configuration_current",
    &[],
    "1 if the configuration file as it is now is in force; 0 if it was refused and the one before is.",
);
static CONFIGURATIONS: Family = counter(
    "weir_configuration_reloads",
    &["result"],
    "Changes of the configuration file: taken, or refused.",
);
static CONNECTIONS: Family =
    counter("weir_proxy_connections", &["cluster"], "Connections that the proxy served.");
static ACTIVE: Family =
    gauge("weir_proxy_connections_active", &[], "Connections and upgraded streams that are open.");
static REQUESTS: Family =
    counter("weir_proxy_requests", &["cluster", "verdict"], "Requests: forwarded, or why Weir refused them.");
static CERTIFICATES: Family = Family {
    name: "weir_certificate_expiry_timestamp",
    unit: Some("seconds"),
    kind: Kind::Gauge,
    labels: &["cluster"],
    help: "End of the validity of the serving certificate in place, in Unix time.",
};
static RECORDING: Family =
    gauge("weir_journal_recording", &[], "1 if the journal accepts; 0: recording stopped.");
static EVENTS: Family = counter("weir_journal_events", &[], "Events that are on disk.");
static WRITTEN: Family = Family {
    name: "weir_journal_written",
    unit: Some("bytes"),
    kind: Kind::Counter,
    labels: &[],
    help: "Bytes of their frames.",
};
static LOST: Family =
    counter("weir_journal_events_lost", &[], "Events that could not be written; a gap record says so.");
static FAILED: Family =
    counter("weir_journal_write_failures", &[], "Groups of events that a segment did not take.");
static BACKLOG: Family = Family {
    name: "weir_journal_backlog",
    unit: Some("bytes"),
    kind: Kind::Gauge,
    labels: &[],
    help: "Events that wait for the disk.",
};
static SYNC: Family = Family {
    name: "weir_journal_sync_duration",
    unit: Some("seconds"),
    kind: Kind::Histogram,
    labels: &[],
    help: "How long fdatasync of a group of events took.",
};
static REFUSALS: Family = counter(
    "weir_connections_refused",
    &[],
    "Refused connections that were recorded, by the kernel, at a listener, or in the proxy; floods are summed up.",
);
static FINDINGS: Family = counter("weir_findings", &["name"], "Findings that were recorded.");
static HANDOVERS: Family = counter(
    "weir_handovers",
    &["result"],
    "Listeners taken from the agent before, given to the one after, or attempts that broke off.",
);

static CANARY: Family = gauge(
    "weir_canary_passing",
    &[],
    "1 if the last canary was refused and redirected as it must be; 0 also before the first.",
);
static CANARY_CHECKS: Family =
    counter("weir_canary_checks", &["result"], "Checks with the canary, one a minute, by how they ended.");
static CANARY_CONNECTIONS: Family = counter(
    "weir_canary_connections",
    &["verdict"],
    "Connects of the canary by what the hooks did with them: its share of weir_kernel_connections_total.",
);

/// All of them, in the order of the exposition.
#[cfg(test)]
pub(super) fn all() -> impl Iterator<Item = &'static Family> {
    let more = super::publishing::ALL
        .into_iter()
        .chain(super::roles::ALL)
        .chain(super::nri::ALL)
        .chain(super::traces::ALL)
        .chain(super::arrivals::ALL);
    ALL.into_iter().chain(super::journal::ALL).chain(more)
}

#[cfg(test)]
static ALL: [&Family; 40] = [
    &BUILD,
    &STARTED,
    &READY,
    &READABLE,
    &LINKS,
    &ENDPOINTS,
    &SEEN,
    &VERDICTS,
    &PROTOCOLS,
    &BINDS,
    &FLOWS,
    &NOTICES,
    &DROPPED,
    &PODS,
    &WAITING,
    &QUARANTINED,
    &LEFT_OUT,
    &POD_SEEN,
    &POD_VERDICTS,
    &POD_PROXIED,
    &POD_DROPPED,
    &CONNECTIONS,
    &ACTIVE,
    &REQUESTS,
    &CERTIFICATES,
    &CONFIGURED,
    &CONFIGURATIONS,
    &RECORDING,
    &EVENTS,
    &WRITTEN,
    &LOST,
    &FAILED,
    &BACKLOG,
    &SYNC,
    &REFUSALS,
    &FINDINGS,
    &HANDOVERS,
    &CANARY,
    &CANARY_CHECKS,
    &CANARY_CONNECTIONS,
];

pub(super) type Gathered = Vec<(&'static Family, Vec<Sample>)>;

fn number(value: u64) -> Vec<Sample> {
    vec![labelled([], value)]
}

fn size(value: usize) -> Vec<Sample> {
    number(u64::try_from(value).unwrap_or(u64::MAX))
}

pub(super) fn labelled<const N: usize>(labels: [&str; N], value: u64) -> Sample {
    Sample { labels: labels.map(str::to_owned).to_vec(), value: Value::Number(value) }
}

/// Reads everything. Blocks for some system calls on the maps.
pub(super) fn gather(telemetry: &Telemetry) -> Gathered {
    let mut out: Gathered = vec![
        (&BUILD, vec![labelled([env!("CARGO_PKG_VERSION")], 1)]),
        (
            &STARTED,
            number(telemetry.started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()),
        ),
        (&READY, number(u64::from(telemetry.unready().is_empty()))),
    ];
    let state = pinned_state(&telemetry.pins);
    let state =
        state.inspect_err(|error| tracing::warn!(event = "counters-not-read", %error, "no kernel counters"));
    let state = state.ok().flatten();
    out.push((&READABLE, number(u64::from(state.is_some()))));
    if let Some(state) = state {
        kernel(&state, &mut out);
        pods(&state, telemetry, &mut out);
    }
    connections(telemetry, &mut out);
    super::arrivals::gather(&telemetry.observed.read(), &mut out);
    recording(telemetry, &mut out);
    super::journal::gather(telemetry, &mut out);
    super::publishing::gather(telemetry.published(), &mut out);
    super::roles::gather(telemetry.proxy.get(), &mut out);
    super::nri::gather(&telemetry.observed.waits(), &mut out);
    super::traces::gather(telemetry.proxy.get(), &mut out);
    out
}

fn kernel(state: &PinnedState, out: &mut Gathered) {
    let counters = &state.counters;
    let length = |of: usize| u64::try_from(of).unwrap_or(u64::MAX);
    out.extend([
        (&LINKS, size(state.links.len())),
        (
            &ENDPOINTS,
            vec![
                labelled(["api"], length(state.api_endpoints.len())),
                labelled(["kubelet"], length(state.kubelets.len())),
            ],
        ),
        (&SEEN, number(counters.seen)),
        (
            &VERDICTS,
            vec![
                labelled(["redirected"], counters.redirected),
                labelled(["passed"], counters.passed),
                labelled(["would_redirect"], counters.would_redirect),
                labelled(["denied_unknown"], counters.denied_unknown),
                labelled(["denied_no_listener"], counters.denied_no_listener),
                labelled(["denied_kubelet"], counters.denied_kubelet),
                labelled(["denied_quarantined"], counters.denied_quarantined),
            ],
        ),
        (&PROTOCOLS, number(counters.protocol_refused)),
        (&BINDS, number(counters.bind_refused)),
        (
            &FLOWS,
            vec![labelled(["published"], counters.flows_published), labelled(["lost"], counters.flows_lost)],
        ),
        (&NOTICES, number(counters.notices_lost)),
        (
            &DROPPED,
            vec![
                labelled(["socket"], counters.guard_dropped),
                labelled(["interface"], counters.interface_dropped),
            ],
        ),
    ] as [(&'static Family, Vec<Sample>); 9]);
}

fn denied(counters: &Counters) -> u64 {
    counters.denied_unknown
        + counters.denied_no_listener
        + counters.denied_kubelet
        + counters.denied_quarantined
        + counters.protocol_refused
}

fn dropped(counters: &Counters) -> u64 {
    counters.guard_dropped + counters.interface_dropped
}

fn pods(state: &PinnedState, telemetry: &Telemetry, out: &mut Gathered) {
    let of_class = |class: &str| state.pods.iter().filter(|pod| pod.class == class).count();
    let classes = [("enrolled", "Enrolled"), ("observed", "Observed"), ("unselected", "Unselected")];
    let count = |pods: usize| u64::try_from(pods).unwrap_or(u64::MAX);
    let waiting = state.pods.iter().filter(|pod| pod.class == "Enrolled" && pod.listener_port == 0);
    // Of a pod that nobody has selected there is nothing to prove.
    let is_shown =
        |pod: &&PodState| pod.class != "Unselected" || denied(&pod.counters) + dropped(&pod.counters) > 0;
    let shown: Vec<_> = state.pods.iter().filter(is_shown).collect();
    out.extend([
        (&PODS, Vec::from(classes.map(|(label, class)| labelled([label], count(of_class(class)))))),
        (&WAITING, size(waiting.count())),
        (&QUARANTINED, size(state.pods.iter().filter(|pod| pod.quarantined).count())),
        (&LEFT_OUT, size(shown.len().saturating_sub(PODS_MAX))),
    ] as [(&'static Family, Vec<Sample>); 4]);
    let [mut seen, mut verdicts, mut proxied, mut packets] = [const { Vec::new() }; 4];
    for pod in shown.into_iter().take(PODS_MAX) {
        let (namespace, name) = pod.pod.split_once('/').unwrap_or(("", &pod.pod));
        let (uid, counters) = (pod.uid.as_str(), &pod.counters);
        seen.push(labelled([namespace, name, uid], counters.seen));
        for (verdict, value) in [
            ("redirected", counters.redirected),
            ("passed", counters.passed + counters.would_redirect),
            ("denied", denied(counters)),
        ] {
            verdicts.push(labelled([namespace, name, uid, verdict], value));
        }
        proxied.push(labelled([namespace, name, uid], telemetry.observed.proxied_of(uid)));
        packets.push(labelled([namespace, name, uid], dropped(counters)));
    }
    out.extend([
        (&POD_SEEN, seen),
        (&POD_VERDICTS, verdicts),
        (&POD_PROXIED, proxied),
        (&POD_DROPPED, packets),
    ] as [(&'static Family, Vec<Sample>); 4]);
}

fn connections(telemetry: &Telemetry, out: &mut Gathered) {
    let observed = telemetry.observed.read();
    out.extend([
        (&CANARY, number(u64::from(telemetry.observed.canary() == Health::Passed))),
        (
            &CANARY_CHECKS,
            vec![labelled(["passed"], observed.canary_passed), labelled(["failed"], observed.canary_failed)],
        ),
        (
            &CANARY_CONNECTIONS,
            vec![
                labelled(["redirected"], observed.canary_redirected),
                labelled(["denied_no_listener"], observed.canary_denied),
            ],
        ),
    ] as [(&'static Family, Vec<Sample>); 3]);
    out.extend([
        (&CONFIGURED, number(u64::from(telemetry.observed.configuration_problem().is_none()))),
        (
            &CONFIGURATIONS,
            vec![
                labelled(["taken"], observed.configurations_taken),
                labelled(["refused"], observed.configurations_refused),
            ],
        ),
    ] as [(&'static Family, Vec<Sample>); 2]);
    let proxy = telemetry.proxy.get();
    let clusters = proxy.map(|proxy| proxy.measured()).unwrap_or_default();
    let [mut served, mut requests, mut certificates] = [const { Vec::new() }; 3];
    for (name, measured, not_after) in clusters {
        served.push(labelled([name], measured.connections));
        for (verdict, value) in measured.requests {
            requests.push(labelled([name, verdict.name()], value));
        }
        let expiry = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        certificates.push(labelled([name], expiry.as_secs()));
    }
    out.extend([
        (&CONNECTIONS, served),
        (&ACTIVE, size(proxy.map(|proxy| proxy.active()).unwrap_or_default())),
        (&REQUESTS, requests),
        (&CERTIFICATES, certificates),
        (
            &HANDOVERS,
            vec![
                labelled(["taken"], observed.handovers_taken),
                labelled(["given"], observed.handovers_given),
                labelled(["broken_off"], observed.handovers_broken_off),
            ],
        ),
    ] as [(&'static Family, Vec<Sample>); 5]);
}

fn recording(telemetry: &Telemetry, out: &mut Gathered) {
    let measured = telemetry.recorder.measured();
    out.extend([
        (&RECORDING, number(u64::from(measured.failure.is_none()))),
        (&EVENTS, number(measured.events)),
        (&WRITTEN, number(measured.bytes)),
        (&LOST, number(measured.lost)),
        (&FAILED, number(measured.failed)),
        (&BACKLOG, size(measured.backlog_bytes)),
        (&SYNC, durations(&SYNC_BOUNDS, &measured.syncs, measured.sync_time)),
        (&REFUSALS, number(measured.connections_refused)),
        (&FINDINGS, measured.findings.iter().map(|(name, count)| labelled([name], *count)).collect()),
    ] as [(&'static Family, Vec<Sample>); 9]);
}
