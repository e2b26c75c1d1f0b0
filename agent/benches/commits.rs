//! What a mutation waits for: its commit before it is forwarded, and the one before its answer ends, beside fdatasync alone in
//! the same folder and the same run; and how much of each wait was not the fdatasync of its own commit, which is what Weir adds to the
//! disk however the disk is just now. `cargo xtask bench commits` runs it. Goal: one fdatasync before the request goes on.
#![expect(clippy::unwrap_used, reason = "what fails here fails the bench, with its place")]
#![expect(clippy::print_stdout, reason = "the table is what the bench is for")]

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, header::CONTENT_TYPE};
use weir_agent::recording::{
    BacklogLimits, Commit, CommitRule, CommitRules, PodQuota, Recorder, RecorderOptions, RequestHead,
    Unmasked,
};
use weir_common::{
    attributes::Attributes,
    event::{Caller, Outcome, Pod},
};

/// Operations of a row.
const OPERATIONS: usize = 1000;
/// Requests at once, in the rows that have many.
const AT_ONCE: usize = 16;
/// Bytes of a request's body, and of its answer's.
const BODY_BYTES: usize = 2048;
/// Bytes that a mutation's first group takes in the journal, near enough.
const GROUP_BYTES: usize = 4096;
const FILE_BYTES: usize = 64 * 1024 * 1024;
/// Whom content is encrypted for in some rows: Bob of RFC 7748, section 6.1.
const RECIPIENT: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=\n-----END PUBLIC KEY-----\n";

/// Half of them took no longer, and 99 of 100.
fn quantiles(mut took: Vec<Duration>) -> String {
    took.sort_unstable();
    let at = |part: usize| took[(took.len() - 1) * part / 100].as_micros();
    format!("{:>8} {:>8}", at(50), at(99))
}

/// Writes to a preallocated file, and makes each write durable.
fn syncs(folder: &Path) -> Vec<Duration> {
    let path = folder.join("syncs");
    let file = OpenOptions::new().write(true).create_new(true).open(&path).unwrap();
    file.write_all_at(&vec![0; FILE_BYTES], 0).unwrap();
    file.sync_all().unwrap();
    let write = |number: usize| {
        file.write_all_at(&[1; GROUP_BYTES], (number * GROUP_BYTES) as u64).unwrap();
        let since = Instant::now();
        file.sync_data().unwrap();
        since.elapsed()
    };
    let took = (0..OPERATIONS).map(write).collect();
    std::fs::remove_file(path).unwrap();
    took
}

/// How long somebody waited, and for how long of it the journal's fdatasync ran. The latter is of this wait alone where requests come
/// one after the other.
#[derive(Clone, Copy)]
struct Waited {
    took: Duration,
    syncs: Duration,
}

/// Waits for something.
async fn waited<T>(recorder: &Recorder, wait: impl Future<Output = T>) -> (T, Waited) {
    let (syncs, since) = (recorder.measured().sync_time, Instant::now());
    let made = wait.await;
    let took = since.elapsed();
    (made, Waited { took, syncs: recorder.measured().sync_time - syncs })
}

/// One request; what it waited for before it could be forwarded, and before its answer could end.
async fn request(recorder: &Recorder, method: &Method) -> (Waited, Waited) {
    let path = "/api/v1/namespaces/team-a/configmaps";
    let attributes = Attributes::parse(method.as_str(), path, None);
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let head = RequestHead {
        method,
        uri: &Uri::from_static("/api/v1/namespaces/team-a/configmaps"),
        version: Version::HTTP_2,
        headers: &headers,
        attributes: &attributes,
        upgrade: None,
        identity: None,
    };
    let body =
        Bytes::from(format!("{{\"kind\":\"ConfigMap\",\"data\":{{\"a\":\"{}\"}}}}", "x".repeat(BODY_BYTES)));
    let caller = Caller { pod: Some(Pod { uid: "pod".into(), ..Pod::default() }), ..Caller::default() };
    let sent = (*method != Method::GET).then(|| Unmasked(body.clone()));
    let (record, opened) = waited(recorder, recorder.open(&Arc::new(caller), 0, head, sent)).await;
    let record = record.unwrap();
    record.response_started(StatusCode::OK, &headers, false);
    record.response_data(&body);
    let close = async {
        if let Some(committed) = record.close_durably(Outcome::Complete, None) {
            committed.await.unwrap();
        }
    };
    (opened, waited(recorder, close).await.1)
}

async fn row(recorder: &Recorder, name: &str, method: Method, at_once: usize) {
    let before: u64 = recorder.measured().syncs.iter().sum();
    let run = |_| {
        let (recorder, method) = (recorder.clone(), method.clone());
        tokio::spawn(async move {
            let mut took = Vec::new();
            for _ in 0..OPERATIONS / at_once {
                took.push(request(&recorder, &method).await);
            }
            took
        })
    };
    let tasks: Vec<_> = (0..at_once).map(run).collect();
    let mut took = Vec::new();
    for task in tasks {
        took.append(&mut task.await.unwrap());
    }
    let syncs = recorder.measured().syncs.iter().sum::<u64>() - before;
    let (opened, ended): (Vec<_>, Vec<_>) = took.into_iter().unzip();
    let each = syncs as f64 / opened.len() as f64;
    let all = |waits: &[Waited], of: fn(&Waited) -> Duration| quantiles(waits.iter().map(of).collect());
    let rest = |waits: &[Waited]| match at_once {
        1 => all(waits, |wait| wait.took.saturating_sub(wait.syncs)),
        _ => format!("{:>8} {:>8}", "–", "–"),
    };
    let (first, last) = (all(&opened, |wait| wait.took), all(&ended, |wait| wait.took));
    println!("{name:<44} {first} {} {last} {} {each:>8.2}", rest(&opened), rest(&ended));
}

fn rules(commit: Commit) -> CommitRules {
    let rule = CommitRule { commit: Some(commit), ..CommitRule::default() };
    let backlog = BacklogLimits::default();
    CommitRules { rules: vec![rule], async_mutations: true, backlog, ..CommitRules::default() }
}

fn main() {
    let folder = match std::env::var_os("WEIR_BENCH_DIR") {
        Some(on_disk) => tempfile::TempDir::new_in(on_disk),
        None => tempfile::TempDir::new(),
    };
    let folder = folder.unwrap();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load {}, µs, {OPERATIONS} requests a row\n", load.trim());
    let recipient = folder.path().join("recipient.pem");
    std::fs::write(&recipient, RECIPIENT).unwrap();
    let recorder = |name: &str, recipient_files| {
        let options = RecorderOptions::new(folder.path().join(name), "node".into(), vec!["cluster".into()]);
        let pod_quota = PodQuota::UNLIMITED;
        Recorder::start(RecorderOptions { pod_quota, recipient_files, ..options }).unwrap()
    };
    let encrypting = recorder("encrypted", vec![recipient]);
    let recorder = recorder("journal", Vec::new());
    println!("{:<44} {:>8} {:>8}", "", "p50", "p99");
    println!("{:<44} {}", "fdatasync alone, before", quantiles(syncs(folder.path())));
    let waits = ["before forwarding", "without its sync", "before the end", "without its sync"];
    println!("\n{:<44} {} {:>8}", "", waits.map(|name| format!("{name:>17}")).join(" "), "syncs");
    println!("{:<44} {}{:>8}", "", format!("{:>8} {:>8} ", "p50", "p99").repeat(waits.len()), "each");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        row(&recorder, "sync, one mutation after the other", Method::POST, 1).await;
        row(&recorder, &format!("sync, {AT_ONCE} mutations at once"), Method::POST, AT_ONCE).await;
        row(&encrypting, "the first again, encrypted", Method::POST, 1).await;
        row(&encrypting, "the second again, encrypted", Method::POST, AT_ONCE).await;
        row(&recorder, "async, one read after the other", Method::GET, 1).await;
        recorder.set_rules(rules(Commit::Async));
        row(&recorder, "the same mutations async, for comparison", Method::POST, 1).await;
        encrypting.set_rules(rules(Commit::Async));
        row(&encrypting, "the same, encrypted", Method::POST, 1).await;
        recorder.set_rules(rules(Commit::Strict));
        row(&recorder, "strict, one read after the other", Method::GET, 1).await;
    });
    println!("\n{:<44} {}", "fdatasync alone, after", quantiles(syncs(folder.path())));
    for recorder in [recorder, encrypting] {
        runtime.block_on(recorder.stop("bench")).unwrap();
    }
}
