//! `cargo xtask tidy`: the invariants of ARCHITECTURE.md and the habits of CONTRIBUTING.md that a reader of
//! source text can check. It also runs as a test, so that `cargo test` alone refuses what it refuses.
//!
//! What needs types or control flow is clippy's, not this file's.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::logs;

/// Most production lines (before the file's test module) in one file.
const FILE_LINES_MAX: usize = 500;
/// Most folders below `src/`.
const DEPTH_MAX: usize = 1;
/// Most lines of ARCHITECTURE.md: past that nobody reads it.
const ARCHITECTURE_LINES_MAX: usize = 200;
/// Module names that say nothing.
const EMPTY_NAMES: [&str; 6] = ["utils", "util", "helpers", "types", "manager", "misc"];

/// A third-party library of the edges: the crate's name as imported, and where it may be imported.
const EDGES: [(&str, &[&str]); 22] = [
    ("aws_config", &["agent/src/aws/sts.rs", "common/src/kms.rs"]),
    ("aws_credential_types", &["agent/src/aws/"]),
    ("aws_sdk_kms", &["common/src/kms.rs", "common/src/kms/"]),
    ("aws_sdk_sts", &["agent/src/aws/sts.rs"]),
    ("aws_sigv4", &["agent/src/aws/presigned.rs"]),
    ("aya", &["agent/src/interception/", "agent/build.rs", "common/src/kernel.rs"]),
    ("aya_log", &["agent/src/interception/"]),
    ("aya_obj", &["agent/src/interception/"]),
    ("hickory_resolver", &["agent/src/interception/"]),
    ("kube", &["agent/src/interception/", "agent/src/trust/"]),
    ("k8s_openapi", &["agent/src/interception/", "agent/src/trust/"]),
    (
        "rdkafka",
        &[
            "agent/src/publishing/inspection.rs",
            "agent/src/publishing/kafka.rs",
            "review/src/source/client.rs",
            "review/src/source/group.rs",
            "review/src/source/kafka.rs",
        ],
    ),
    ("rcgen", &["agent/src/trust/", "agent/src/proxy/", "tests/src/"]),
    ("prometheus_client", &["agent/src/telemetry/exposition.rs"]),
    // In recording only the tests: what they read is written by another hand.
    (
        "prost",
        &[
            "agent/src/nri/messages.rs",
            "agent/src/recording/protobuf_tests.rs",
            "agent/src/traces/",
            "agent/src/proxy/trace_tests.rs",
            "agent/src/recording/rule_tests.rs",
        ],
    ),
    ("openidconnect", &["agent/src/auth/keys.rs"]),
    ("opentelemetry_proto", &["agent/src/traces/", "agent/src/proxy/trace_tests.rs"]),
    ("bincode", &["common/src/envelope.rs"]),
    ("cel", &["agent/src/auth/expression.rs", "agent/src/auth/syntax.rs", "agent/src/auth/value.rs"]),
    ("ed25519_dalek", &["common/src/checkpoint.rs", "agent/src/signing.rs"]),
    ("serde_yaml_ng", &["agent/src/config", "agent/src/exec", "agent/src/recording/", "tests/"]),
    ("x509_parser", &["agent/src/trust"]),
];

/// Files that may hold `unsafe`, each for the reason that its SAFETY comments give.
const UNSAFE_FILES: [&str; 4] =
    ["common/src/kernel.rs", "agent/src/interception/", "agent/src/exec/", "tests/escape/src/"];

/// Whose files are kept through `storage` alone.
const JOURNAL_FOLDERS: [&str; 2] = ["agent/src/recording", "agent/src/publishing"];

/// Text that must not stand in Rust source: what, and why.
fn forbidden() -> [(String, &'static str); 4] {
    // Put together at run time, so that this file does not refuse itself.
    [
        (["todo", "!("].concat(), "unfinished"),
        (["unimpl", "emented!("].concat(), "unfinished"),
        (["#[ign", "ore"].concat(), "a test that does not run"),
        (["FIX", "ME"].concat(), "unfinished: open an issue"),
    ]
}

/// Checks the tree at `root`.
///
/// # Errors
/// Lists every finding.
pub(crate) fn run(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    let files = tracked(root)?;
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")) {
        let text = std::fs::read_to_string(root.join(path))
            .with_context(|| format!("cannot read {}", path.display()))?;
        rust_file(path, &text, &mut findings);
    }
    manifests(root, &files, &mut findings)?;
    documents(root, &files, &mut findings)?;
    logs::check(root, &files, &mut findings)?;
    if findings.is_empty() {
        return Ok(());
    }
    let mut message = format!("{} findings:", findings.len());
    for finding in &findings {
        let _ = write!(message, "\n  {finding}");
    }
    bail!(message)
}

/// Files that git tracks or would track.
pub(crate) fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("cannot run git; is it installed?")?;
    if !output.status.success() {
        bail!("git ls-files failed in {}: {}", root.display(), String::from_utf8_lossy(&output.stderr));
    }
    let files: Vec<PathBuf> = String::from_utf8(output.stdout)?.lines().map(PathBuf::from).collect();
    // A deleted file that is still in the index is not there to be read.
    Ok(files.into_iter().filter(|path| root.join(path).is_file()).collect())
}

fn rust_file(path: &Path, text: &str, findings: &mut Vec<String>) {
    let name = path.display().to_string();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    if stem == "mod" {
        findings.push(format!("{name}: name it after its noun (foo.rs + foo/), not mod.rs"));
    }
    if EMPTY_NAMES.contains(&stem.as_ref()) {
        findings.push(format!("{name}: the name says nothing; name the noun it is about"));
    }
    if !text.starts_with("//!") {
        findings.push(format!("{name}: open with `//!`: what lives here, what must not"));
    }
    if let Some((_, below)) = name.split_once("/src/")
        && below.matches('/').count() > DEPTH_MAX
    {
        findings.push(format!("{name}: deeper than two levels under src/"));
    }
    let production = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = production.lines().count();
    if lines > FILE_LINES_MAX {
        findings
            .push(format!("{name}: {lines} production lines, more than {FILE_LINES_MAX}; split it by noun"));
    }
    for (pattern, why) in forbidden() {
        if text.contains(&pattern) {
            findings.push(format!("{name}: has {pattern:?}: {why}"));
        }
    }
    edges(&name, production, findings);
}

fn edges(name: &str, production: &str, findings: &mut Vec<String>) {
    let in_product = ["agent/", "common/", "review/"].iter().any(|folder| name.starts_with(folder))
        && !["/tests/", "/benches/"].iter().any(|folder| name.contains(folder));
    if !in_product {
        return;
    }
    let may = |places: &[&str]| {
        places
            .iter()
            .any(|place| name.starts_with(place) || name == format!("{}.rs", place.trim_end_matches('/')))
    };
    for (library, places) in EDGES {
        let imported = production.lines().map(str::trim_start).any(|line| {
            !line.starts_with("//")
                && (line.contains(&format!("use {library}::"))
                    || line.contains(&format!("use {library};"))
                    || line.contains(&format!(" {library}::"))
                    || line.contains(&format!("({library}::"))
                    || line.contains(&format!("<{library}::")))
        });
        if imported && !may(places) {
            findings.push(format!("{name}: {library} may be imported only in {}", places.join(", ")));
        }
    }
    let keeps_files = JOURNAL_FOLDERS.iter().any(|folder| name.starts_with(folder));
    let is_test = name.ends_with("_tests.rs") || name.ends_with("/tests.rs") || name.ends_with("/fixture.rs");
    if keeps_files && !is_test && production.contains("std::fs") {
        findings
            .push(format!("{name}: files of a journal are kept through agent/src/storage.rs (invariant 5)"));
    }
    let uses_unsafe = production
        .lines()
        .map(str::trim_start)
        .any(|line| !line.starts_with("//") && (line.contains("unsafe {") || line.contains("unsafe impl")));
    if uses_unsafe && !may(&UNSAFE_FILES) {
        findings.push(format!("{name}: `unsafe` may stand only in {}", UNSAFE_FILES.join(", ")));
    }
}

fn manifests(root: &Path, files: &[PathBuf], findings: &mut Vec<String>) -> Result<()> {
    for path in files.iter().filter(|path| path.ends_with("Cargo.toml")) {
        let text = std::fs::read_to_string(root.join(path))?;
        let member = path.components().count() == 2 && !path.starts_with("ebpf");
        if member && !text.contains("[lints]\nworkspace = true") {
            findings.push(format!("{}: opt into the workspace's lints", path.display()));
        }
    }
    let workspace = std::fs::read_to_string(root.join("Cargo.toml"))?;
    if !workspace.contains("bincode = { version = \"=2.0.1\"") {
        findings.push("Cargo.toml: bincode must stay at =2.0.1 (ADR 2)".to_owned());
    }
    let lock = std::fs::read_to_string(root.join("Cargo.lock"))?;
    for library in ["native-tls", "rustls-openssl"] {
        if lock.contains(&format!("name = \"{library}\"")) {
            findings.push(format!("Cargo.lock: {library}: one TLS provider, aws-lc-rs (invariant 1)"));
        }
    }
    for user in users(&lock, "openssl-sys").filter(|user| *user != "rdkafka-sys") {
        findings
            .push(format!("Cargo.lock: {user} uses openssl-sys, which only librdkafka may (invariant 1)"));
    }
    Ok(())
}

/// The packages of a lock file that depend on `library` themselves.
fn users<'a>(lock: &'a str, library: &'a str) -> impl Iterator<Item = &'a str> {
    let names = move |package: &str| {
        package
            .lines()
            .any(|line| line.trim().trim_start_matches('"').trim_end_matches(['"', ',']) == library)
    };
    lock.split("[[package]]")
        .filter(move |package| names(package))
        .filter_map(|package| package.split("name = \"").nth(1)?.split('"').next())
}

fn documents(root: &Path, files: &[PathBuf], findings: &mut Vec<String>) -> Result<()> {
    for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "LICENSE"]
    {
        if !files.iter().any(|path| path == Path::new(name)) {
            findings.push(format!("{name} is missing"));
        }
    }
    let architecture = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap_or_default();
    let lines = architecture.lines().count();
    if lines > ARCHITECTURE_LINES_MAX {
        findings.push(format!("ARCHITECTURE.md: {lines} lines, more than {ARCHITECTURE_LINES_MAX}"));
    }
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = std::fs::read_to_string(root.join(path))?;
        for target in links(&text) {
            let base = path.parent().unwrap_or(Path::new(""));
            if !root.join(base).join(&target).exists() {
                findings.push(format!("{}: links to {target}, which is not there", path.display()));
            }
        }
    }
    Ok(())
}

/// Targets of a Markdown text's links to files of the repository, without fragments.
fn links(text: &str) -> Vec<String> {
    text.match_indices("](")
        .filter_map(|(at, _)| text[at + 2..].split_once(')').map(|(target, _)| target))
        .filter(|target| {
            !target.contains("://") && !target.starts_with('#') && !target.contains(char::is_whitespace)
        })
        .map(|target| target.split('#').next().unwrap_or_default().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{links, run, rust_file, users};

    #[track_caller]
    fn findings(path: &str, text: &str) -> Vec<String> {
        let mut findings = Vec::new();
        rust_file(Path::new(path), text, &mut findings);
        findings
    }

    #[test]
    fn this_tree_is_tidy() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("has a parent");
        if let Err(error) = run(root) {
            panic!("{error:#}");
        }
    }

    #[test]
    fn each_rule_refuses_its_case() {
        assert_eq!(findings("agent/src/proxy/mod.rs", "//! x\n").len(), 1);
        assert_eq!(findings("agent/src/utils.rs", "//! x\n").len(), 1);
        assert_eq!(findings("agent/src/a.rs", "fn a() {}\n").len(), 1);
        assert_eq!(findings("agent/src/a/b/c.rs", "//! x\n").len(), 1);
        assert_eq!(findings("agent/src/a.rs", &format!("//! x\n{}", "a\n".repeat(500))).len(), 1);
        assert_eq!(findings("agent/src/a.rs", "//! x\nuse aya::Ebpf;\n").len(), 1);
        assert_eq!(findings("agent/src/a.rs", "//! x\nfn a() { unsafe { b() } }\n").len(), 1);
        assert_eq!(findings("agent/src/recording/a.rs", "//! x\nfn a() { std::fs::read(b) }\n").len(), 1);
        assert_eq!(findings("agent/src/interception/loader.rs", "//! x\nuse aya::Ebpf;\n").len(), 0);
    }

    #[test]
    fn a_lock_file_says_who_uses_what() {
        let lock = "[[package]]\nname = \"a\"\ndependencies = [\n \"b\",\n \"c-sys\",\n]\n\n[[package]]\nname = \"b\"\n\n[[package]]\nname = \"c-sys\"\n";
        assert_eq!(users(lock, "c-sys").collect::<Vec<_>>(), ["a"]);
        assert_eq!(users(lock, "b").collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn links_leave_out_the_web_and_fragments() {
        assert_eq!(links("[a](b.md#c) [d](https://e) [f](#g)"), ["b.md"]);
    }
}
