//! `docs/metrics.md`, written from the table of families; and the checks that nothing is exposed, described or alerted
//! on that is not in it. `cargo xtask docs` writes the file.

use std::{collections::BTreeSet, fmt::Write as _, net::SocketAddr, sync::Arc, time::Duration};

use expect_test::expect_file;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Telemetry, approver, families, server};
use crate::{
    interception::observed::Observed,
    recording::{Recorder, RecorderOptions},
    trust::approvals::Approvals,
};

const INTRODUCTION: &str = include_str!("introduction.txt");
/// What is before the approver's families.
const OF_THE_APPROVER: &str = "
## The approver

`weir-agent approver --metrics ADDRESS` serves the same three paths with these families, and none of an agent's; in the chart
at port 9155 of its pod. It is ready while it can read requests for certificates.

| metric | type | labels | meaning |
|---|---|---|---|
";
/// The rules that are delivered.
const RULES: &str = include_str!("../../../deploy/prometheus/weir-rules.yaml");
/// How long an answer may take; far longer than it takes.
const DEADLINE: Duration = Duration::from_secs(20);

#[test]
fn the_documentation_is_what_the_table_says() {
    let mut text = format!("{INTRODUCTION}\n| metric | type | labels | meaning |\n|---|---|---|---|\n");
    let row = |family: &families::Family| {
        let kind = format!("{:?}", family.kind).to_lowercase();
        let labels = family.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        format!("| `{}` | {kind} | {labels} | {} |\n", family.full_name(), family.help)
    };
    text.extend(families::all().map(row));
    let _ = writeln!(
        text,
        "\nAt most {} pods have series of their own; pods that nobody selected have none unless something of them was denied or dropped.",
        families::PODS_MAX
    );
    text.push_str(OF_THE_APPROVER);
    text.extend(approver::ALL.map(row));
    expect_file!["../../../docs/metrics.md"].assert_eq(&text);
}

#[test]
fn rules_ask_for_nothing_that_is_not_exposed() {
    let all = families::all().chain(approver::ALL);
    let known: BTreeSet<_> = all.map(|family| family.full_name()).collect();
    let words = RULES.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let asked: BTreeSet<_> = words.filter(|word| word.starts_with("weir_")).collect();
    assert!(asked.len() > 5, "{asked:?}");
    for metric in asked {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| metric.strip_suffix(suffix));
        assert!(known.contains(metric) || base.is_some_and(|base| known.contains(base)), "{metric}");
    }
}

/// An agent that has only just started, with its server.
async fn started() -> (Arc<Telemetry>, SocketAddr, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let options = RecorderOptions::new(folder.path().join("journal"), "node".to_owned(), Vec::new());
    let recorder = Recorder::start(options).expect("a recorder");
    let observed: Arc<Observed> = Arc::default();
    let telemetry = Arc::new(Telemetry::new(recorder, None, observed, folder.path().join("pins")));
    (telemetry.clone(), served(telemetry).await, folder)
}

async fn served(monitored: Arc<dyn server::Monitored>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(server::accept(listener, monitored));
    address
}

async fn ask(address: SocketAddr, request: &str) -> String {
    let asking = async {
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("connects");
        stream.write_all(request.as_bytes()).await.expect("is sent");
        let mut answer = Vec::new();
        // A refused head may be answered by a reset once the answer is out.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    tokio::time::timeout(DEADLINE, asking).await.expect("is answered")
}

async fn get(address: SocketAddr, path: &str) -> String {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await
}

#[tokio::test]
async fn an_agent_that_has_only_started_is_alive_and_not_ready_and_says_why() {
    let (telemetry, address, _folder) = started().await;
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    let unready = get(address, "/readyz").await;
    assert!(unready.starts_with("HTTP/1.1 503"), "{unready}");
    assert!(unready.contains("not every cluster has been reached"), "{unready}");
    assert!(unready.contains("pods of this node are not known"), "{unready}");
    telemetry.ends();
    assert!(get(address, "/readyz").await.contains("the agent ends"));
}

#[tokio::test]
async fn what_is_exposed_is_in_the_table() {
    let (_telemetry, address, _folder) = started().await;
    let answer = get(address, "/metrics").await;
    assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0"), "{answer}");
    assert!(answer.contains("\nweir_ready 0\n") && answer.ends_with("# EOF\n"), "{answer}");
    assert!(answer.contains("\nweir_findings_total{name=\"programDetached\"} 0\n"), "{answer}");
    let known: BTreeSet<_> =
        families::all().map(|family| family.full_name().trim_end_matches("_total").to_owned()).collect();
    let exposed: BTreeSet<_> = answer
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next().map(str::to_owned))
        .collect();
    assert!(exposed.is_subset(&known), "{:?}", exposed.difference(&known));
    // The kernel's are missing, since nothing is pinned: that is said, and not shown as zeros.
    let missing: Vec<_> = known.difference(&exposed).collect();
    assert!(
        missing.iter().all(|name| ["kernel", "pod", "api"].iter().any(|part| name.contains(part))),
        "{missing:?}"
    );
    assert!(answer.contains("\nweir_kernel_readable 0\n"), "{answer}");
}

#[tokio::test]
async fn an_approver_that_has_only_started_is_not_ready_and_has_families_of_its_own() {
    let address = served(Arc::new(Approvals::default())).await;
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    let unready = get(address, "/readyz").await;
    assert!(unready.starts_with("HTTP/1.1 503") && unready.contains("cannot be read"), "{unready}");
    let answer = get(address, "/metrics").await;
    let exposed: Vec<_> = answer.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let known = approver::ALL.map(|family| {
        let name = family.full_name();
        format!("{} {}", name.trim_end_matches("_total"), format!("{:?}", family.kind).to_lowercase())
    });
    assert_eq!(exposed, known);
    assert!(answer.contains("\nweir_approver_ready 0\n"), "{answer}");
    assert!(answer.contains("\nweir_approver_denied_total{reason=\"no_name\"} 0\n"), "{answer}");
}

#[tokio::test]
async fn anything_but_a_small_get_is_refused() {
    let (_telemetry, address, _folder) = started().await;
    assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
    assert!(ask(address, "POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.starts_with("HTTP/1.1 405"));
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(1024 * 1024));
    let answer = ask(address, &long).await;
    assert!(!answer.starts_with("HTTP/1.1 200") && !answer.starts_with("HTTP/1.1 404"), "{answer}");
    let headers = "A: b\r\n".repeat(100);
    let answer = ask(address, &format!("GET /healthz HTTP/1.1\r\nHost: x\r\n{headers}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test]
async fn a_client_that_goes_away_without_a_word_gives_its_place_back() {
    let (_telemetry, address, _folder) = started().await;
    for _ in 0..64 {
        let silent = tokio::net::TcpStream::connect(address).await.expect("the kernel takes it");
        drop(silent);
    }
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
}
