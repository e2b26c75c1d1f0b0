//! The OpenTelemetry collector on loopback (`tests/testbed/otel-collector`): takes traces by OTLP over HTTP and TLS, and writes what it
//! took to a file, as OTLP in JSON.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::certificates::{Authority, Subject};
use crate::command::tail;
use crate::components::GoModule;
use crate::process::RecordedProcess;
use crate::progress::Progress;
use crate::testbed::free_ports;
use crate::wait::wait_until;

/// What is built of it.
pub(crate) static OTEL_COLLECTOR: GoModule = GoModule {
    folder: "otel-collector",
    tags: "",
    linker_flags: "-s -w",
    copied: &[],
    binaries: &[("otel-collector", ".")],
    minutes: 1.0,
};

const ADDRESS: &str = "127.0.0.1";
/// It listens within a second; builds may run beside it.
const READY_DEADLINE: Duration = Duration::from_secs(120);
/// For it to end by itself.
const GRACE: Duration = Duration::from_secs(3);

/// The collector; it ends when this value goes.
#[derive(Debug)]
pub struct OtelCollector {
    folder: tempfile::TempDir,
    port: u16,
    process: RecordedProcess,
}

/// A span, with whose it is.
#[derive(Clone, Debug)]
pub struct Received {
    /// Attributes of the resource.
    pub resource: Value,
    /// Name of the instrumentation scope.
    pub scope: Value,
    /// The span itself.
    pub span: Value,
}

impl OtelCollector {
    /// Starts it on a port that nobody uses; builds it first, if it is not there.
    ///
    /// # Errors
    /// When it cannot be built or does not come up.
    pub fn start(progress: Progress) -> Result<Self> {
        let binary = OTEL_COLLECTOR.tool(progress)?;
        let folder = tempfile::tempdir().context("cannot make a scratch folder")?;
        let path = |name: &str| folder.path().join(name);
        let [port] = free_ports(ADDRESS)?;
        Authority::create(folder.path(), "weir-testbed-otel-collector")?.sign(&Subject {
            file: "collector",
            common_name: ADDRESS,
            organization: None,
            names: &[ADDRESS],
        })?;
        let tls = json!({"cert_file": path("collector.crt"), "key_file": path("collector.key")});
        let http = json!({"endpoint": format!("{ADDRESS}:{port}"), "tls": tls});
        let configuration = json!({
            "receivers": {"otlp": {"protocols": {"http": http}}},
            "exporters": {"file": {"path": path("spans.json"), "flush_interval": "100ms"}},
            "service": {"pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["file"]}}},
        });
        fs::write(path("collector.yaml"), configuration.to_string())
            .context("cannot write the collector's configuration")?;
        let mut command = Command::new(binary);
        command.arg("--config").arg(format!("file:{}", path("collector.yaml").display()));
        let process = RecordedProcess::spawn("otel-collector", &mut command, &path("collector.log"))?;
        let collector = Self { folder, port, process };
        wait_until("the collector to listen", READY_DEADLINE, || {
            if !collector.process.is_running() {
                bail!("the collector has ended:\n{}", tail(&collector.process.log, 20));
            }
            Ok(TcpStream::connect((ADDRESS, port)).ok().map(drop))
        })?;
        Ok(collector)
    }

    /// What an agent is told of it, as `traces` of its configuration.
    #[must_use]
    pub fn configuration(&self) -> Value {
        let authority: PathBuf = self.folder.path().join("ca.crt");
        json!({"endpoint": format!("https://{ADDRESS}:{}", self.port), "certificateAuthority": authority})
    }

    /// What it has written so far.
    ///
    /// # Errors
    /// When its file cannot be read, or is no OTLP.
    pub fn spans(&self) -> Result<Vec<Received>> {
        let text = fs::read_to_string(self.folder.path().join("spans.json"))
            .context("cannot read what the collector wrote")?;
        let mut received = Vec::new();
        // What is behind the last end of a line is being written.
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            let export: Value = serde_json::from_str(line).context("the collector wrote no JSON")?;
            for resource in items(&export["resourceSpans"])? {
                for scope in items(&resource["scopeSpans"])? {
                    let of = |span: &Value| Received {
                        resource: resource["resource"]["attributes"].clone(),
                        scope: scope["scope"]["name"].clone(),
                        span: span.clone(),
                    };
                    received.extend(items(&scope["spans"])?.iter().map(of));
                }
            }
        }
        Ok(received)
    }
}

fn items(list: &Value) -> Result<&[Value]> {
    list.as_array().map(Vec::as_slice).context("the collector wrote no OTLP")
}

impl Drop for OtelCollector {
    fn drop(&mut self) {
        // What survives SIGKILL, nobody can mend here.
        let _ = self.process.clone().stop(GRACE);
    }
}
