//! `weir-agent support`: what an engineer needs to know of a node, in one file that may be handed on.
//!
//! What goes in is chosen, not what stays out: no file that holds a secret or a record is opened but by `doctor`, which shows
//! neither. The configuration is shown by a list of keys ([`crate::config::shown`]), and everything is looked through for what looks like
//! a credential (`scrub`). Each part has its time: on a node whose disk hangs the others are there all the same.

use std::{
    fmt::Write as _,
    fs::OpenOptions,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use jiff::Timestamp;
use serde_json::{Value, json};

use self::{archive::Archive, scrub::Scrub};
use crate::{
    config::{self, CONFIG_BYTES_MAX, Config, shown},
    doctor::{self, DoctorOptions},
    interception::{handover, loader, presence::Presence, usage},
    status,
};

mod archive;
mod node;
mod scrub;

/// How long a part may take, and the one that talks to clusters and brokers.
const PART_TIMEOUT: Duration = Duration::from_secs(15);
const DOCTOR_TIMEOUT: Duration = Duration::from_secs(90);
/// How long the agent may take to answer for its metrics.
const METRICS_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of an answer.
const ANSWER_BYTES_MAX: u64 = 8 << 20;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct SupportOptions {
    /// Configuration of `run`; without one its parts are missing.
    pub config: Option<PathBuf>,
}

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum SupportError {
    /// It cannot be made.
    #[error("cannot put the bundle together")]
    Archive(#[source] io::Error),
    /// What credentials look like cannot be compiled.
    #[error("cannot look for credentials, so nothing is written")]
    Scrub(#[from] regex::Error),
    /// It cannot be written.
    #[error("cannot write {}; the file must not exist, its folder must", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A bundle that is ready.
pub struct Bundle {
    /// Its bytes, a tar.gz.
    pub bytes: Vec<u8>,
    /// What is in it, and what is not: the same as its README.
    pub contents: String,
}

impl Bundle {
    /// Writes it to a file that only its owner may read.
    ///
    /// # Errors
    /// The file exists, or cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), SupportError> {
        let failed = |source| SupportError::Write { path: path.to_owned(), source };
        // Neither over what is there, nor through a link.
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        file.write_all(&self.bytes).and_then(|()| file.sync_all()).map_err(failed)
    }
}

/// A part: its file, how long it may take, and how it is made.
struct Part {
    name: &'static str,
    timeout: Duration,
    make: Box<dyn FnOnce() -> Result<Text, String> + Send>,
}

/// What a part says.
enum Text {
    Plain(String),
    Json(Value),
}

/// Collects everything. Blocks, for seconds; changes nothing but what `doctor` does.
///
/// # Errors
/// The bundle cannot be made. A part that cannot is named in it instead.
pub fn collect(options: &SupportOptions) -> Result<Bundle, SupportError> {
    let now = Timestamp::now();
    let mut scrub = Scrub::new()?;
    let configuration = within(PART_TIMEOUT, {
        let path = options.config.clone();
        move || path.map(|path| read(&path))
    });
    let configured = match configuration {
        Ok(None) => Err("no --config was given".to_owned()),
        Ok(Some(read)) => read.map_err(|error| doctor::chain(&error)),
        Err(late) => Err(late),
    };
    let shown = configured
        .as_deref()
        .map_err(Clone::clone)
        .and_then(|text| shown::show(text, |value| scrub.text(value)).map_err(|error| error.to_string()));
    let is_shown = shown.is_ok();
    let shown = shown.map(|shown| {
        scrub.also(shown.hidden);
        shown.text
    });
    let node = config::default_node();
    let name = format!("weir-support-{node}-{}", now.strftime("%Y%m%dT%H%M%SZ"));
    let mut archive = Archive::new(name, u64::try_from(now.as_second()).unwrap_or(0));
    let mut contents = format!(
        "weir-agent {}, node {node}, {now}\n\nWhat looks like a credential, and what the configuration hides, was taken out; names of \
         pods, namespaces, hosts and files are there. Nothing that was recorded is.\n\n",
        env!("CARGO_PKG_VERSION")
    );
    let mut add = |name: &str, made: Result<String, String>| -> Result<(), SupportError> {
        match made {
            Ok(text) => {
                let bytes = archive.add(name, &text).map_err(SupportError::Archive)?;
                let _ = writeln!(contents, "{name:20} {bytes} bytes");
            }
            Err(reason) => {
                let _ = writeln!(contents, "{name:20} is missing: {}", scrub.text(&reason));
            }
        }
        Ok(())
    };
    add("configuration.yaml", shown)?;
    // What is no YAML could show itself in the error about it.
    let config = options.config.clone().filter(|_| is_shown);
    let parsed = config.as_ref().and_then(|path| {
        let text = configured.as_deref().unwrap_or_default();
        Config::parse(path, text, &node).ok()
    });
    for part in parts(config, parsed) {
        let made = within(part.timeout, part.make).and_then(|made| made);
        add(part.name, made.and_then(|text| written(&scrub, text)))?;
    }
    archive.add("README.txt", &contents).map_err(SupportError::Archive)?;
    Ok(Bundle { bytes: archive.finish().map_err(SupportError::Archive)?, contents })
}

/// The parts, in the order in which they are made: the quickest first.
fn parts(config: Option<PathBuf>, parsed: Option<Config>) -> Vec<Part> {
    let part = |name, make: Box<dyn FnOnce() -> Result<Text, String> + Send>| Part {
        name,
        timeout: PART_TIMEOUT,
        make,
    };
    let chained = |error: &dyn std::error::Error| doctor::chain(error);
    let metrics = parsed.as_ref().map(|config| config.metrics);
    let journal = parsed.map(|config| config.journal.directory);
    let no_config = || "there is no valid configuration to say where".to_owned();
    vec![
        part("status.json", Box::new(|| Ok(Text::Json(state())))),
        part(
            "kernel.json",
            Box::new(move || {
                let maps = usage::map_usage(&loader::pin_folder()).map_err(|error| chained(&error))?;
                Ok(Text::Json(json!({"maps": maps, "programs": usage::loaded()})))
            }),
        ),
        part("node.txt", Box::new(|| Ok(Text::Plain(node::facts(agent()))))),
        part("metrics.txt", Box::new(move || answer(metrics, "/metrics"))),
        part("ready.txt", Box::new(move || answer(metrics, "/readyz"))),
        part(
            "journal.txt",
            Box::new(move || {
                let folder = journal.ok_or_else(no_config)?;
                node::listing(&folder)
                    .map(Text::Plain)
                    .map_err(|error| format!("{}: {error}", folder.display()))
            }),
        ),
        part("log.txt", Box::new(|| Ok(Text::Plain(node::logs(agent()))))),
        Part {
            name: "doctor.txt",
            timeout: DOCTOR_TIMEOUT,
            make: Box::new(move || {
                let config = Some(config.ok_or_else(no_config)?);
                Ok(Text::Plain(
                    doctor::run(&DoctorOptions { config, ..DoctorOptions::default() }).to_string(),
                ))
            }),
        },
    ]
}

/// What `weir-agent status --json` says, or why it does not.
fn state() -> Value {
    status::read().map_or_else(
        |error| {
            let agent = serde_json::to_value(handover::presence(Path::new(handover::STANDARD))).ok();
            json!({"error": doctor::chain(&error), "agent": agent})
        },
        |status| serde_json::to_value(status).unwrap_or_default(),
    )
}

/// The process of the agent.
fn agent() -> Option<u32> {
    match handover::presence(Path::new(handover::STANDARD)) {
        Presence::Running { pid, .. } => Some(pid),
        Presence::Silent | Presence::Absent => None,
    }
}

fn written(scrub: &Scrub, text: Text) -> Result<String, String> {
    match text {
        Text::Plain(text) => Ok(scrub.text(&text)),
        Text::Json(mut value) => {
            scrub.json(&mut value);
            serde_json::to_string_pretty(&value).map_err(|error| error.to_string())
        }
    }
}

/// The text of the configuration.
fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(CONFIG_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Runs something on a thread of its own; what takes longer is left behind, and ends with this process.
fn within<T: Send + 'static>(
    timeout: Duration,
    make: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (sender, made) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .spawn(move || sender.send(make()))
        .map_err(|error| format!("no thread: {error}"))?;
    made.recv_timeout(timeout).map_err(|error| match error {
        mpsc::RecvTimeoutError::Timeout => format!("it took longer than {} seconds", timeout.as_secs()),
        mpsc::RecvTimeoutError::Disconnected => "it panicked".to_owned(),
    })
}

/// What the agent answers to monitoring.
fn answer(metrics: Option<Option<SocketAddr>>, path: &str) -> Result<Text, String> {
    let address = metrics.ok_or("there is no valid configuration to say where")?;
    let mut address = address.ok_or("the configuration has no `metrics`")?;
    if address.ip().is_unspecified() {
        let is_v4 = address.is_ipv4();
        address.set_ip(if is_v4 { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { IpAddr::V6(Ipv6Addr::LOCALHOST) });
    }
    let asked = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, METRICS_TIMEOUT)?;
        stream.set_read_timeout(Some(METRICS_TIMEOUT))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
        Ok(answer)
    };
    asked().map(Text::Plain).map_err(|error| format!("{address}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_written_for_its_owner_alone_and_over_nothing() {
        use std::os::unix::fs::MetadataExt as _;

        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("bundle.tar.gz");
        let bundle = Bundle { bytes: b"x".to_vec(), contents: String::new() };
        bundle.write(&path).expect("is written");
        assert_eq!(std::fs::metadata(&path).expect("is there").mode() & 0o777, 0o600);
        assert!(bundle.write(&path).is_err(), "it exists");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), &link).expect("is made");
        assert!(bundle.write(&link).is_err() && !folder.path().join("elsewhere").exists());
    }

    #[test]
    fn what_takes_too_long_is_left_behind() {
        let (hold, held) = mpsc::channel::<()>();
        let late = within(Duration::from_millis(1), move || held.recv());
        assert_eq!(late.map(drop), Err("it took longer than 0 seconds".to_owned()));
        drop(hold);
        assert_eq!(within(PART_TIMEOUT, || 7), Ok(7));
    }
}
