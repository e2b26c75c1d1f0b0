//! The metrics of AWS roles: how requests came by their tokens, and what STS was asked.

use super::families::{Family, Gathered, Sample, counter, gauge, labelled};
use crate::{
    aws::{AwsMeasures, StsError},
    proxy::Proxy,
};

static TOKENS: Family = counter(
    "weir_role_tokens",
    &["cluster", "result"],
    "Requests in an AWS role by how they came by a token for the cluster: kept, waited for, or refused by a failure just before.",
);
static SIGNED: Family =
    counter("weir_role_tokens_signed", &["cluster"], "Tokens for the cluster that were signed.");
static FORGOTTEN: Family = counter(
    "weir_role_tokens_forgotten",
    &["cluster"],
    "Tokens that the cluster took no longer and that were thrown away with their credentials.",
);
static ASSUMED: Family = counter(
    "weir_roles_asked",
    &["cluster"],
    "Roles that AWS STS was asked for; tries again and roles on the way not counted.",
);
static FAILED: Family =
    counter("weir_role_failures", &["cluster", "kind"], "Tokens that could not be had, by why.");
static KEPT: Family =
    gauge("weir_roles_kept", &["cluster"], "Roles with their sessions that are kept at the moment.");
static EVICTED: Family = counter("weir_roles_evicted", &["cluster"], "Roles that made room for others.");

/// All of them.
#[cfg(test)]
pub(super) static ALL: [&Family; 7] = [&TOKENS, &SIGNED, &FORGOTTEN, &ASSUMED, &FAILED, &KEPT, &EVICTED];

/// Reads them; no series before there is a proxy.
pub(super) fn gather(proxy: Option<&Proxy>, out: &mut Gathered) {
    let clusters = proxy.map(Proxy::aws_measured).unwrap_or_default();
    let each = |value: &dyn Fn(&AwsMeasures) -> u64| -> Vec<Sample> {
        clusters.iter().map(|(name, measured)| labelled([*name], value(measured))).collect()
    };
    let tokens = clusters.iter().flat_map(|(name, measured)| {
        [("kept", measured.hits), ("waited", measured.waited), ("refused", measured.refused)]
            .map(|(result, value)| labelled([*name, result], value))
    });
    let failed = clusters.iter().flat_map(|(name, measured)| {
        StsError::KINDS
            .map(|kind| labelled([*name, kind], measured.failed.get(kind).copied().unwrap_or_default()))
    });
    out.extend([
        (&TOKENS, tokens.collect()),
        (&SIGNED, each(&|measured| measured.signed)),
        (&FORGOTTEN, each(&|measured| measured.forgotten)),
        (&ASSUMED, each(&|measured| measured.asked)),
        (&FAILED, failed.collect()),
        (&KEPT, each(&|measured| u64::try_from(measured.entries).unwrap_or(u64::MAX))),
        (&EVICTED, each(&|measured| measured.evicted)),
    ] as [(&'static Family, Vec<Sample>); 7]);
}
