//! What tests and developer commands use beside the testbed: tools that are built from Go modules of their own when they are first
//! needed, or all before that.

use std::path::PathBuf;

use anyhow::Result;

use super::{GoModule, cache_folder, downloaded, go, repository};
use crate::clients::{CLIENT_GO, Clients};
use crate::progress::Progress;
use crate::{key_service, otel_collector};

/// What `cargo xtask test` uses, in the order in which it does.
pub(super) static TOOLS: [&GoModule; 10] = [
    &HELM,
    &CLIENT_GO,
    &PROMTOOL,
    &GRAFANA,
    &POLICIES,
    &NOTE_VERIFIER,
    &AUDIT_DECODER,
    &MSK_SIGNER,
    &key_service::LOCAL_KMS,
    &otel_collector::OTEL_COLLECTOR,
];

/// What tests the alert rules; no part of the testbed.
static PROMTOOL: GoModule = GoModule {
    folder: "promtool",
    tags: "remove_all_sd",
    linker_flags: "-s -w",
    copied: &[("github.com/prometheus/prometheus", "cmd/promtool/unittest.go")],
    binaries: &[("promtool-test-rules", ".")],
    minutes: 1.0,
};

/// Kubernetes' clients and servers of streams, which the decoders' conversations are recorded from; no part of the testbed.
static STREAMS: GoModule = GoModule {
    folder: "streams",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("streams-capture", ".")],
    minutes: 1.0,
};

/// Verifies Weir's notes and proofs with the libraries of other logs; no part of the testbed.
static NOTE_VERIFIER: GoModule = GoModule {
    folder: "note-verifier",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("note-verifier", ".")],
    minutes: 0.2,
};

/// AWS's own signer of tokens for Amazon MSK; no part of the testbed.
static MSK_SIGNER: GoModule = GoModule {
    folder: "msk-signer",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("msk-signer", ".")],
    minutes: 0.5,
};

/// Decodes audit events strictly, with Kubernetes' own types; no part of the testbed.
static AUDIT_DECODER: GoModule = GoModule {
    folder: "audit-decoder",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("audit-decoder", ".")],
    minutes: 0.5,
};

/// What reads a dashboard as Grafana does; no part of the testbed.
static GRAFANA: GoModule = GoModule {
    folder: "grafana",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("grafana-dashboard", ".")],
    minutes: 0.3,
};

/// What compiles admission policies as API servers of each version do; no part of the testbed.
static POLICIES: GoModule = GoModule {
    folder: "policies",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("policies", ".")],
    minutes: 0.5,
};

/// What renders and installs the chart; no part of the testbed either.
static HELM: GoModule = GoModule {
    folder: "helm",
    tags: "",
    linker_flags: "-s -w -X helm.sh/helm/v3/internal/version.version=v3.22.0",
    copied: &[],
    binaries: &[("helm", "helm.sh/helm/v3/cmd/helm")],
    minutes: 1.5,
};

/// What records conversations for the stream decoders, built if it is not there.
///
/// # Errors
/// When it cannot be built.
pub fn streams_capture(progress: Progress) -> Result<PathBuf> {
    STREAMS.tool(progress)
}

/// The part of promtool that tests alert rules, built if it is not there.
///
/// # Errors
/// When it cannot be built.
pub fn promtool(progress: Progress) -> Result<PathBuf> {
    PROMTOOL.tool(progress)
}

/// The program that verifies notes and proofs with other libraries than Weir's, built if it is not there.
///
/// # Errors
/// There is no Go, or the build fails.
pub fn note_verifier(progress: Progress) -> Result<PathBuf> {
    NOTE_VERIFIER.tool(progress)
}

/// The program that signs tokens for Amazon MSK as AWS's clients do, built if it is not there.
///
/// # Errors
/// There is no Go, or the build fails.
pub fn msk_signer(progress: Progress) -> Result<PathBuf> {
    MSK_SIGNER.tool(progress)
}

/// The program that decodes audit events as Kubernetes does, built if it is not there.
///
/// # Errors
/// There is no Go, or the build fails.
pub fn audit_decoder(progress: Progress) -> Result<PathBuf> {
    AUDIT_DECODER.tool(progress)
}

/// Helm, built if it is not there.
///
/// # Errors
/// When it cannot be built.
pub fn helm(progress: Progress) -> Result<PathBuf> {
    HELM.tool(progress)
}

/// The program that reads a dashboard as Grafana does, built if it is not there.
///
/// # Errors
/// When it cannot be built.
pub fn grafana_dashboard(progress: Progress) -> Result<PathBuf> {
    GRAFANA.tool(progress)
}

/// The program that compiles admission policies as an API server of a version does, built if it is not there.
///
/// # Errors
/// When it cannot be built.
pub fn policies(progress: Progress) -> Result<PathBuf> {
    POLICIES.tool(progress)
}

/// The definitions of the Prometheus operator's kinds that the chart has, as files of a Go module of its; nothing is built.
///
/// # Errors
/// When there is no Go, or they cannot be fetched.
pub fn prometheus_operator_kinds() -> Result<[PathBuf; 2]> {
    let source = repository().join("tests/testbed/prometheus-operator");
    let module = downloaded(&go()?, &source, "github.com/prometheus-operator/prometheus-operator")?;
    Ok(["servicemonitors", "prometheusrules"].map(|kind| {
        module.join(format!("example/prometheus-operator-crd/monitoring.coreos.com_{kind}.yaml"))
    }))
}

/// Builds and installs all of them that are missing, so that no test has to.
///
/// # Errors
/// When one cannot be built, or a client not be fetched.
pub fn build_tools(progress: Progress) -> Result<()> {
    Clients::install(progress)?.install_java(progress)?;
    TOOLS.iter().try_for_each(|module| module.tool(progress).map(drop))
}

/// What [`build_tools`] would build with Go; nothing when all is there.
///
/// # Errors
/// As of [`super::plan`].
pub fn tools_plan() -> Result<Vec<String>> {
    let folder = cache_folder()?.join("testbed/bin");
    let mut lines = Vec::new();
    for module in TOOLS {
        if !module.is_built(&folder)? {
            go()?;
            lines.push(format!("build with Go: {} (about {} min)", module.binaries[0].0, module.minutes));
        }
    }
    Ok(lines)
}
