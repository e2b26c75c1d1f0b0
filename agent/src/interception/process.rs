//! What `/proc` says of a process that connected: executable, arguments, proxy settings.
//!
//! Evidence is read after the fact, so it is kept only if the process that bears the pid now had started before the
//! connection was made. Arguments are a claim (a process can rewrite them) and may hold credentials, which are
//! masked here, before anything else sees them. Values of the environment never leave this file, but for the host part
//! of a proxy's URL.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use weir_common::event::Process;

/// Most bytes of arguments that are read.
const ARGV_BYTES_MAX: u64 = 16 * 1024;
/// Most arguments that are kept.
const ARGV_MAX: usize = 256;
/// Most bytes of an environment that are searched for proxy settings.
const ENVIRON_BYTES_MAX: u64 = 256 * 1024;
/// Clock ticks per second of `/proc/<pid>/stat` as user space sees them (`USER_HZ`): 100 on every architecture that Weir is built for.
const USER_HZ: u64 = 100;
/// What stands in place of a masked argument.
const MASK: &str = "weir:masked";
/// Flags of kubectl, curl and their like whose value is a credential.
const SECRET_FLAGS: [&str; 7] = [
    "--token",
    "--password",
    "--client-key-data",
    "--docker-password",
    "--from-literal",
    "--secret",
    "--api-key",
];
/// Variables that send HTTP requests through a proxy. Go and curl read both cases.
const PROXY_VARIABLES: [&str; 6] =
    ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];

/// What the kernel knows of a process that connected.
#[derive(Clone, Copy, Debug)]
pub struct Connector {
    /// Thread group id in the initial pid namespace.
    pub tgid: u32,
    /// User id in the initial user namespace.
    pub uid: u32,
    /// When it connected, in ns since boot.
    pub connected_boottime_ns: u64,
}

/// A folder like `/proc`.
#[derive(Clone, Debug)]
pub struct Proc(PathBuf);

impl Default for Proc {
    fn default() -> Self {
        Self(PathBuf::from("/proc"))
    }
}

impl Proc {
    #[cfg(test)]
    pub(super) fn at(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// The evidence for a process. What cannot be read, or belongs to a later process of that pid, is left empty; pid and
    /// uid come from the kernel and always stand.
    pub fn evidence(&self, connector: Connector) -> Process {
        let mut process = Process { pid: connector.tgid, uid: connector.uid, ..Process::default() };
        let folder = self.0.join(connector.tgid.to_string());
        let Some(started) = start_boottime_ns(&folder) else { return process };
        if started > connector.connected_boottime_ns {
            return process;
        }
        let executable = std::fs::read_link(folder.join("exe"));
        let argv = read_bounded(&folder.join("cmdline"), ARGV_BYTES_MAX);
        // Read again: had the process ended in between, the pid could be another's by now.
        if start_boottime_ns(&folder) != Some(started) {
            return process;
        }
        process.start_boottime_ns = started;
        process.executable = executable.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        process.argv = masked_arguments(&argv.unwrap_or_default());
        process
    }

    /// When a process started, in ns since boot; none if there is none.
    pub fn start_boottime_ns(&self, pid: u32) -> Option<u64> {
        start_boottime_ns(&self.0.join(pid.to_string()))
    }

    /// The first proxy variable in a process's environment, with the host part of its value; none if there is none or the
    /// environment cannot be read.
    pub fn proxy_variable(&self, pid: u32) -> Option<ProxyVariable> {
        let environ = read_bounded(&self.0.join(pid.to_string()).join("environ"), ENVIRON_BYTES_MAX)?;
        proxy_variable(&environ)
    }
}

/// A variable that sends requests through a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyVariable {
    /// Its name.
    pub name: &'static str,
    /// Host and port of its value, without user information.
    pub host: String,
    /// The value of `NO_PROXY`, which may exempt the API server; empty if it is not set.
    pub exempt: String,
}

fn proxy_variable(environ: &[u8]) -> Option<ProxyVariable> {
    let value = |name: &str| {
        environ.split(|byte| *byte == 0).find_map(|entry| {
            let entry = std::str::from_utf8(entry).ok()?;
            let (key, value) = entry.split_once('=')?;
            (key == name && !value.is_empty()).then(|| value.to_owned())
        })
    };
    PROXY_VARIABLES.into_iter().find_map(|name| {
        let url = value(name)?;
        let authority = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
        let authority = authority.split(['/', '?', '#']).next().unwrap_or_default();
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host).to_owned();
        let exempt = value("NO_PROXY").or_else(|| value("no_proxy")).unwrap_or_default();
        Some(ProxyVariable { name, host, exempt })
    })
}

/// Start of a process in ns since boot, to the resolution of `USER_HZ`, rounded down; from field 22 of `stat`
/// (proc(5)), counted after the command's closing parenthesis, since a command may hold spaces and parentheses.
fn start_boottime_ns(folder: &Path) -> Option<u64> {
    let stat = read_bounded(&folder.join("stat"), 4096)?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: u64 = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
    ticks.checked_mul(1_000_000_000 / USER_HZ)
}

fn read_bounded(path: &Path, bytes_max: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(bytes_max).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Arguments as recorded: credentials masked, bounded in number.
fn masked_arguments(cmdline: &[u8]) -> Vec<String> {
    let mut arguments: Vec<String> = Vec::new();
    let mut mask_next = false;
    for argument in cmdline.strip_suffix(&[0]).unwrap_or(cmdline).split(|byte| *byte == 0).take(ARGV_MAX) {
        let argument = String::from_utf8_lossy(argument).into_owned();
        if std::mem::take(&mut mask_next) {
            arguments.push(MASK.to_owned());
            continue;
        }
        let (flag, value) = argument.split_once('=').map_or((argument.as_str(), None), |(a, b)| (a, Some(b)));
        if SECRET_FLAGS.contains(&flag) {
            mask_next = value.is_none();
            arguments.push(if value.is_some() { format!("{flag}={MASK}") } else { argument });
        } else if holds_credential(&argument) {
            arguments.push(MASK.to_owned());
        } else {
            arguments.push(argument);
        }
    }
    if arguments.len() == 1 && arguments[0].is_empty() {
        arguments.clear();
    }
    arguments
}

/// Whether an argument looks like a header or value that holds a credential: `Authorization: …`, a JWT.
fn holds_credential(argument: &str) -> bool {
    let lower = argument.to_ascii_lowercase();
    lower.contains("authorization:")
        || lower.contains("bearer ")
        || argument.contains("eyJ") && argument.matches('.').count() >= 2
}

#[cfg(test)]
mod tests {
    use super::{Connector, Proc, masked_arguments, proxy_variable};

    #[track_caller]
    fn masked(arguments: &[&str], expected: &[&str]) {
        assert_eq!(masked_arguments(arguments.join("\0").as_bytes()), expected);
    }

    #[test]
    fn credentials_in_arguments_are_masked() {
        masked(&["kubectl", "get", "pods"], &["kubectl", "get", "pods"]);
        masked(&["kubectl", "--token=abc", "get"], &["kubectl", "--token=weir:masked", "get"]);
        masked(&["kubectl", "--token", "abc", "get"], &["kubectl", "--token", "weir:masked", "get"]);
        masked(&["curl", "-H", "Authorization: Bearer x"], &["curl", "-H", "weir:masked"]);
        masked(&["x", "eyJhbGciOi.eyJzdWIi.c2ln"], &["x", "weir:masked"]);
        masked(
            &["kubectl", "create", "secret", "generic", "a", "--from-literal=p=q"],
            &["kubectl", "create", "secret", "generic", "a", "--from-literal=weir:masked"],
        );
    }

    #[test]
    fn this_process_is_found_and_a_later_one_of_the_same_pid_is_not() {
        let pid = std::process::id();
        let evidence = |connected_boottime_ns| {
            Proc::default().evidence(Connector { tgid: pid, uid: 7, connected_boottime_ns })
        };
        let found = evidence(u64::MAX);
        assert!(found.executable.contains("weir_agent"), "{found:?}");
        assert!(found.start_boottime_ns > 0 && !found.argv.is_empty());
        let earlier = evidence(0);
        assert_eq!((earlier.pid, earlier.uid), (pid, 7));
        assert!(earlier.executable.is_empty() && earlier.argv.is_empty());
    }

    #[test]
    fn a_proxy_is_named_without_its_credentials() {
        let found = proxy_variable(b"A=b\0HTTPS_PROXY=http://user:pass@proxy.test:3128/x\0NO_PROXY=.svc\0")
            .expect("is found");
        assert_eq!(
            (found.name, found.host.as_str(), found.exempt.as_str()),
            ("HTTPS_PROXY", "proxy.test:3128", ".svc")
        );
        assert_eq!(proxy_variable(b"A=b\0HTTPS_PROXY=\0"), None);
    }
}
