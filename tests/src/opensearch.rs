//! A real store of a SIEM on loopback, and a real way into it from Kafka: OpenSearch, one node, and rsyslog, with the very files of
//! `deploy/siem`. Either can be killed and started anew with what it had written.
//!
//! OpenSearch's server is Maven's, started by codelibs' runner; rsyslog is Debian's. Both run only while a test has them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::command::tail;
use crate::components::repository;
use crate::maven::{self, Installed, Project, Tool};
use crate::packages;
use crate::process::RecordedProcess;
use crate::progress::Progress;
use crate::wait::wait_until;

const PROJECT: Project = Project { folder: "opensearch", name: "OpenSearch", tools: &[RSYSLOGD] };
const RSYSLOGD: Tool = ("rsyslogd", "rsyslog");
/// What rsyslog reads Kafka and writes OpenSearch with.
const MODULES: [&str; 2] = ["rsyslog-kafka", "rsyslog-elasticsearch"];
const MODULE_FILES: [&str; 2] = ["imkafka.so", "omelasticsearch.so"];

/// Where it listens; the runner takes no port above.
const ADDRESS: &str = "127.0.0.1";
const PORTS: std::ops::Range<u16> = 9202..9299;
/// Those between its nodes; nobody else asks there.
const INNER_PORTS: std::ops::Range<u16> = 29_000..29_990;
/// The heap of one node with one index.
const HEAP: &str = "-Xmx512m";
/// Where events are.
const INDEX: &str = "weir-events";

/// It answers within 15 s on an idle machine; builds may run beside it.
const READY_DEADLINE: Duration = Duration::from_secs(180);
/// For SIGKILL to be the end.
const END_DEADLINE: Duration = Duration::from_secs(30);
/// Of one question.
const ASK_TIMEOUT: Duration = Duration::from_secs(30);
const ANSWER_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Lines of a log that an error shows.
const LOG_LINES: usize = 20;

/// What [`install`] would do; none when all is there.
///
/// # Errors
/// When the lock cannot be read or there is no place for the cache.
pub fn plan() -> Result<Option<String>> {
    PROJECT.plan()
}

/// Installs what is missing of OpenSearch and rsyslog.
///
/// # Errors
/// When a package cannot be installed or a jar not be fetched, or when a jar is not the one of the lock.
pub fn install(progress: Progress) -> Result<()> {
    installed(progress).map(drop)
}

fn installed(progress: Progress) -> Result<Installed> {
    let installed = PROJECT.install(progress)?;
    let folders = fs::read_dir("/usr/lib").context("cannot read /usr/lib")?;
    let folders: Vec<PathBuf> = folders.flatten().map(|entry| entry.path().join("rsyslog")).collect();
    let is_there = |file: &str| folders.iter().any(|folder| folder.join(file).is_file());
    if !MODULE_FILES.iter().all(|file| is_there(file)) {
        progress.step(&format!("install {}", MODULES.join(" ")), || packages::install(&MODULES))?;
    }
    Ok(installed)
}

/// The store; it ends when this value goes.
#[derive(Debug)]
pub struct OpenSearch {
    folder: tempfile::TempDir,
    installed: Installed,
    port: u16,
    inner_port: u16,
    process: Option<RecordedProcess>,
    starts: usize,
}

impl OpenSearch {
    /// Starts it with the index template of `deploy/siem`; installs it where it is missing.
    ///
    /// # Errors
    /// When it cannot be installed or does not come up.
    pub fn start() -> Result<Self> {
        let installed = installed(Progress::Shown)?;
        let folder = tempfile::tempdir().context("cannot make a scratch folder")?;
        let (port, inner_port) = (quiet_port(PORTS)?, quiet_port(INNER_PORTS)?);
        for name in ["base", "conf", "tmp"] {
            fs::create_dir(folder.path().join(name)).context("cannot make a scratch folder")?;
        }
        let conf = folder.path().join("conf");
        let settings = format!("network.host: {ADDRESS}\ntransport.port: {inner_port}\n");
        fs::write(conf.join("opensearch.yml"), settings).context("cannot write its settings")?;
        fs::write(conf.join("log4j2.properties"), "rootLogger.level = error\n")
            .context("cannot write its settings")?;
        let mut store = Self { folder, installed, port, inner_port, process: None, starts: 0 };
        store.restart()?;
        let template = repository().join("deploy/siem/opensearch-index-template.json");
        let template = fs::read_to_string(&template).context("cannot read the index template")?;
        store.ask("PUT", &format!("/_index_template/{INDEX}"), &template)?;
        Ok(store)
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    /// When it does not run, or the kernel does not let it go.
    pub fn kill(&mut self) -> Result<()> {
        let process = self.process.take().context("OpenSearch does not run")?;
        process.signal(Signal::SIGKILL);
        process.wait_for_end(END_DEADLINE)
    }

    /// Starts it after [`Self::kill`], with what it had written, and waits until it answers.
    ///
    /// # Errors
    /// When it runs, or does not come up.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "OpenSearch runs already");
        self.starts += 1;
        let path = |name: &str| self.folder.path().join(name);
        let class = "org.codelibs.opensearch.runner.OpenSearchRunner";
        let mut command = self.installed.class(class, &[HEAP], &path("tmp"));
        command.arg("-basePath").arg(path("base")).arg("-confPath").arg(path("conf"));
        command.args(["-numOfNode", "1", "-clusterName", "weir-testbed", "-baseHttpPort"]);
        // It adds the number of the node, which is 1.
        command.arg((self.port - 1).to_string());
        let log = path(&format!("opensearch-{}.log", self.starts));
        let process = RecordedProcess::spawn("opensearch", &mut command, &log)?;
        let ready = wait_until("OpenSearch to answer", READY_DEADLINE, || {
            ensure!(process.is_running(), "OpenSearch has ended");
            let health = self.ask("GET", "/_cluster/health", "");
            Ok(health.ok().filter(|health| health["status"] != "red").map(drop))
        });
        let ready = ready
            .with_context(|| format!("last lines of {}:\n{}", log.display(), tail(&log, LOG_LINES)))
            .with_context(|| format!("ports {} and {}", self.port, self.inner_port));
        self.process = Some(process);
        ready
    }

    /// The documents of these ids, as far as they are there: as they were stored.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn documents(&self, ids: &[String]) -> Result<Vec<Value>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let answer = self.ask("POST", &format!("/{INDEX}/_mget"), &json!({"ids": ids}).to_string())?;
        let documents = answer["docs"].as_array().context("no documents in the answer")?;
        let found = documents.iter().filter(|document| document["found"] == true);
        Ok(found.map(|document| document["_source"].clone()).collect())
    }

    /// How many documents a query finds (Lucene's syntax); all that was written is looked at.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn count(&self, query: &str) -> Result<u64> {
        self.ask("POST", &format!("/{INDEX}/_refresh"), "")?;
        let body = json!({"query": {"query_string": {"query": query}}}).to_string();
        let answer = self.ask("POST", &format!("/{INDEX}/_count"), &body)?;
        answer["count"].as_u64().with_context(|| format!("no count: {answer}"))
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<Value> {
        let mut connection = TcpStream::connect((ADDRESS, self.port)).context("cannot reach OpenSearch")?;
        connection.set_read_timeout(Some(ASK_TIMEOUT)).context("cannot set a timeout")?;
        write!(
            connection,
            "{method} {path} HTTP/1.0\r\nHost: {ADDRESS}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .context("cannot ask OpenSearch")?;
        let mut answer = Vec::new();
        connection.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).context("no answer of OpenSearch")?;
        let text = String::from_utf8(answer).context("the answer is no text")?;
        let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no answer: {text}"))?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        if !status.starts_with('2') {
            bail!("OpenSearch answers {status} to {method} {path}: {body}");
        }
        serde_json::from_str(body).context("the answer is no JSON")
    }
}

impl Drop for OpenSearch {
    fn drop(&mut self) {
        // What survives SIGKILL, nobody can mend.
        if self.process.is_some() {
            let _ = self.kill();
        }
    }
}

/// rsyslog with the configuration of `deploy/siem`; it ends when this value goes.
#[derive(Debug)]
pub struct Rsyslog {
    folder: tempfile::TempDir,
    process: Option<RecordedProcess>,
}

impl Rsyslog {
    /// Starts it between a topic of `kafka` (`HOST:PORT`) and the store.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(kafka: &str, store: &OpenSearch) -> Result<Self> {
        let folder = tempfile::tempdir().context("cannot make a scratch folder")?;
        let file = repository().join("deploy/siem/rsyslog.conf");
        let mut text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let here = folder.path().display().to_string();
        for (shipped, own) in [
            ("127.0.0.1:9092", kafka.to_owned()),
            ("serverport=\"9200\"", format!("serverport=\"{}\"", store.port)),
            ("/var/spool/rsyslog", here.clone()),
            ("/var/log", here),
            ("resumeInterval=\"5\"", "resumeInterval=\"1\"".to_owned()),
        ] {
            ensure!(text.contains(shipped), "{} has no {shipped}", file.display());
            text = text.replace(shipped, &own);
        }
        fs::write(folder.path().join("rsyslog.conf"), text)
            .context("cannot write rsyslog's configuration")?;
        let mut rsyslog = Self { folder, process: None };
        rsyslog.restart()?;
        Ok(rsyslog)
    }

    fn restart(&mut self) -> Result<()> {
        let path = |name: &str| self.folder.path().join(name);
        let mut command = Command::new(maven::path(RSYSLOGD)?);
        command.arg("-n").arg("-f").arg(path("rsyslog.conf")).arg("-i").arg(path("pid"));
        self.process = Some(RecordedProcess::spawn("rsyslogd", &mut command, &path("rsyslogd.log"))?);
        Ok(())
    }

    /// What it says, and what it could not store.
    #[must_use]
    pub fn said(&self) -> String {
        let files = ["rsyslogd.log", "weir-refused.log", "weir-foreign.log"];
        files.map(|name| tail(&self.folder.path().join(name), LOG_LINES)).join("\n")
    }

    /// Messages that were put aside, one a line.
    #[must_use]
    pub fn foreign(&self) -> usize {
        let file = fs::read_to_string(self.folder.path().join("weir-foreign.log"));
        file.unwrap_or_default().lines().count()
    }
}

impl Drop for Rsyslog {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            process.signal(Signal::SIGKILL);
            let _ = process.wait_for_end(END_DEADLINE);
        }
    }
}

/// A port of a range that nobody listens on.
fn quiet_port(ports: std::ops::Range<u16>) -> Result<u16> {
    let count = ports.end - ports.start;
    // Two that look at once look at different places.
    let first = u16::try_from(std::process::id() % u32::from(count)).unwrap_or_default();
    let mut candidates = (0..count).map(|step| ports.start + (first + step) % count);
    let free = candidates.find(|port| TcpListener::bind((ADDRESS, *port)).is_ok());
    free.with_context(|| format!("no port of {ports:?} is free on {ADDRESS}"))
}
