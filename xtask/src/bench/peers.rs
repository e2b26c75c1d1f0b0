//! What the bench of the proxy runs: a static API server, the proxies before it, and load, each on its core.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tempfile::TempDir;
use weir_tests::{
    certificates::{self, Authority, Subject},
    command,
    process::RecordedProcess,
    progress::Progress,
    python, wait_until,
};

use super::{
    configurations::{self, Ports},
    load::{Done, Load},
};

/// Core of load and API server, and that of the proxy.
const LOAD_CORE: &str = "0";
const PROXY_CORE: &str = "1";
/// Bytes of the list.
const LARGE_BYTES: usize = 25 * 1024 * 1024;
/// A proxy is there, and answers, within this.
const START_DEADLINE: Duration = Duration::from_secs(30);
const END_GRACE: Duration = Duration::from_secs(30);
/// A proxy that has done nothing between so many looks, a twentieth of a second apart, has nothing to do.
const RESTING_LOOKS: usize = 30;
/// Ends what a command wrote.
const END: &str = "end-of-command";
/// What clients of Kubernetes send beside the path; the token is of the length that service accounts' have.
const HEADERS: [&str; 2] =
    ["-Huser-agent: kubectl/v1.36.3 (linux/amd64) kubernetes/abcdef0", "-Haccept: application/json"];
const TOKEN_BYTES: usize = 900;
/// Clock ticks a second in `/proc/PID/stat`: the kernel's constant for user space.
const TICKS: f64 = 100.0;

/// One of the proxies that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proxy {
    Nginx,
    Haproxy,
    /// With its access log.
    Envoy,
    /// Writing what passes to a file.
    Mitmproxy,
    /// Recording all of it.
    Weir,
}

impl Proxy {
    /// nginx first: the others are compared with it.
    pub(super) const ALL: [Self; 5] = [Self::Nginx, Self::Haproxy, Self::Envoy, Self::Weir, Self::Mitmproxy];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "HAProxy",
            Self::Envoy => "Envoy + access log",
            Self::Mitmproxy => "mitmproxy -w",
            Self::Weir => "Weir, all recorded",
        }
    }
}

/// The API server's place, and the files of all.
pub(super) struct Bed {
    folder: TempDir,
    agent: PathBuf,
    upstream: RecordedProcess,
    /// Where all of them listen.
    host: IpAddr,
    port: u16,
}

impl Drop for Bed {
    fn drop(&mut self) {
        // What stays is said by its own error the next time; there is nobody to tell here.
        let _ = self.upstream.stop(END_GRACE);
    }
}

/// Something that answers, and the shell whose commands ask it.
pub(super) struct Peer {
    shell: Shell,
    /// The proxy's process; none of the API server itself.
    process: Option<RecordedProcess>,
    pid: u32,
    address: String,
    folder: PathBuf,
    /// Of Weir: where it records.
    journal: Option<PathBuf>,
    requests: usize,
}

impl Bed {
    /// Makes certificates and objects, and starts the API server.
    pub(super) fn start(agent: PathBuf) -> Result<Self> {
        // On the disk whose journals are meant, where the temporary folder is in memory.
        let folder = match std::env::var_os("WEIR_BENCH_DIR") {
            Some(on_disk) => TempDir::new_in(on_disk),
            None => TempDir::new(),
        };
        let folder = folder.context("cannot make a folder for the bench")?;
        let path = folder.path();
        let authority = Authority::create(path, "bench")?;
        let host = own_address()?;
        let text = host.to_string();
        let names = &["localhost", &text];
        authority.sign(&Subject { file: "server", common_name: "localhost", organization: None, names })?;
        let read =
            |name: &str| fs::read_to_string(path.join(name)).with_context(|| format!("cannot read {name}"));
        let both = format!("{}{}", read("server.crt")?, read("server.key")?);
        let write = |name: &str, text: &str| {
            fs::write(path.join(name), text).with_context(|| format!("cannot write {name}"))
        };
        write("server.pem", &both)?;
        write("pod.json", &pod(0).to_string())?;
        write("pods.json", &list())?;
        write("created.json", &config_map().to_string())?;
        let port = free_port(host)?;
        let ports = Ports { host, proxy: port, upstream: port };
        write("upstream.conf", &configurations::upstream(path, ports))?;
        let nginx = command::find_in_path("nginx").context("there is no nginx")?;
        let mut on_core = pinned(LOAD_CORE, &nginx);
        on_core.arg("-c").arg(path.join("upstream.conf"));
        let upstream =
            RecordedProcess::spawn("the API server's place", &mut on_core, &path.join("upstream.log"))?;
        let bed = Self { agent, upstream, host, port, folder };
        bed.wait_for(port, &bed.upstream)?;
        Ok(bed)
    }

    fn wait_for(&self, port: u16, process: &RecordedProcess) -> Result<()> {
        wait_until(&format!("{} to listen", process.name), START_DEADLINE, || {
            if !process.is_running() {
                bail!("{} ended:\n{}", process.name, command::tail(&process.log, 20));
            }
            Ok(TcpStream::connect((self.host, port)).ok().map(drop))
        })
    }

    /// The API server without a proxy.
    pub(super) fn direct(&self) -> Result<Peer> {
        self.peer(Shell::start(&mut Command::new("sh"))?, None, self.port)
    }

    fn peer(&self, shell: Shell, process: Option<RecordedProcess>, port: u16) -> Result<Peer> {
        let pid = match &process {
            Some(process) => u32::try_from(process.pid).context("process id out of range")?,
            None => shell.child.id(),
        };
        let (folder, address) = (self.folder.path().to_owned(), format!("https://{}:{port}", self.host));
        Ok(Peer { shell, process, pid, address, folder, journal: None, requests: 0 })
    }

    /// A proxy that has just started.
    pub(super) fn proxy(&self, proxy: Proxy) -> Result<Peer> {
        if proxy == Proxy::Weir {
            return self.weir();
        }
        let path = self.folder.path();
        let ports = Ports { host: self.host, proxy: free_port(self.host)?, upstream: self.port };
        let mut command = match proxy {
            Proxy::Nginx => {
                let config = written(path, "nginx.conf", &configurations::nginx(path, ports))?;
                let mut command =
                    pinned(PROXY_CORE, &command::find_in_path("nginx").context("there is no nginx")?);
                command.arg("-c").arg(config);
                command
            }
            Proxy::Haproxy => {
                let config = written(path, "haproxy.cfg", &configurations::haproxy(path, ports))?;
                let haproxy = command::find_in_path("haproxy").context("there is no HAProxy")?;
                let mut command = pinned(PROXY_CORE, &haproxy);
                command.arg("-db").arg("-f").arg(config);
                command
            }
            Proxy::Envoy => {
                let config = written(path, "envoy.json", &configurations::envoy(path, ports).to_string())?;
                let mut command = pinned(PROXY_CORE, &python::PROXIES.script("envoy", Progress::Shown)?);
                command.args(["--concurrency", "1", "--log-level", "error", "-c"]).arg(config);
                command
            }
            Proxy::Mitmproxy | Proxy::Weir => {
                let mut command = pinned(PROXY_CORE, &python::PROXIES.script("mitmdump", Progress::Shown)?);
                command.args(configurations::mitmproxy(path, ports));
                command
            }
        };
        let log = path.join("proxy.log");
        let process = RecordedProcess::spawn(proxy.name(), &mut command, &log)?;
        let listening = self.wait_for(ports.proxy, &process);
        if listening.is_err() {
            process.stop(END_GRACE)?;
        }
        listening?;
        self.peer(Shell::start(&mut Command::new("sh"))?, Some(process), ports.proxy)
    }

    /// The agent, whose command is the shell.
    fn weir(&self) -> Result<Peer> {
        let path = self.folder.path();
        let kubeconfig = path.join("kubeconfig");
        let server = format!("https://{}:{}", self.host, self.port);
        certificates::write_anonymous_kubeconfig(&kubeconfig, &server, path)?;
        let journal = path.join("journal");
        let mut command = pinned(PROXY_CORE, &self.agent);
        command.args(["exec", "--quiet", "--kubeconfig"]).arg(&kubeconfig).arg("--journal").arg(&journal);
        command.args(["--", "sh"]);
        let peer = self.peer(Shell::start(&mut command)?, None, self.port)?;
        Ok(Peer { journal: Some(journal), ..peer })
    }
}

impl Peer {
    /// The command of a load.
    fn command(&self, load: &Load) -> String {
        let log = self.folder.join("times").display().to_string();
        let mut words = vec![format!("rm -f {log}; taskset -c {LOAD_CORE}")];
        words.extend(load.words(&log));
        words.extend(HEADERS.iter().map(|header| format!("'{header}'")));
        words.push(format!("'-Hauthorization: Bearer {}'", "t".repeat(TOKEN_BYTES)));
        let path = match (load.large, load.mutates) {
            (true, _) => "/api/v1/pods",
            (false, true) => "/api/v1/namespaces/shop/configmaps",
            (false, false) => "/api/v1/namespaces/shop/pods/web-0",
        };
        if load.mutates {
            let body = self.folder.join("created.json");
            words.push(format!("'-Hcontent-type: application/json' -d {}", body.display()));
        }
        words.push(format!("{}{path}", self.address));
        words.join(" ")
    }

    /// Makes a load and waits for its end.
    pub(super) fn load(&mut self, load: &Load) -> Result<Done> {
        let said = self.shell.run(&self.command(load))?;
        let log = load.rate.map(|_| fs::read_to_string(self.folder.join("times"))).transpose();
        self.requests += load.requests;
        load.done(&said, log.context("h2load left no times")?.as_deref())
    }

    /// Starts a load, whose requests are not counted; its process's id.
    pub(super) fn start_load(&mut self, load: &Load) -> Result<u32> {
        let said = self.shell.run(&format!("{} > /dev/null 2>&1 & echo $!", self.command(load)))?;
        said.trim().parse().with_context(|| format!("the shell did not say a process's id: {said}"))
    }

    pub(super) fn end_load(&mut self, pid: u32) -> Result<()> {
        self.shell.run(&format!("kill {pid}; wait {pid}")).map(drop)
    }

    /// Waits until the proxy has that many connections of clients, and has done nothing for a while: their requests are answered then.
    pub(super) fn wait_for_connections(&self, connections: usize) -> Result<()> {
        let (mut last, mut same) = (None, 0);
        wait_until("the connections to be open and at rest", Duration::from_secs(60), || {
            let open = fs::read_dir(format!("/proc/{}/fd", self.pid)).context("the proxy is gone")?.count();
            let seen = (open, self.cpu()?);
            same = if last.replace(seen) == Some(seen) { same + 1 } else { 0 };
            Ok((open > connections && same >= RESTING_LOOKS).then_some(()))
        })
    }

    /// CPU time of the proxy's threads so far.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).context("the proxy is gone")?;
        // The command's name is in parentheses and may hold any character.
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let ticks: Vec<f64> = fields.skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
        ensure!(ticks.len() == 2, "the proxy's CPU time cannot be read");
        Ok(Duration::from_secs_f64((ticks[0] + ticks[1]) / TICKS))
    }

    /// A line of `/proc/PID/status`, in KiB.
    pub(super) fn memory_kib(&self, name: &str) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).context("the proxy is gone")?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
        number.with_context(|| format!("the kernel does not say {name}"))
    }

    /// Ends it; of Weir the journal must have each request.
    pub(super) fn end(self) -> Result<()> {
        let Self { shell, process, journal, requests, .. } = self;
        shell.end()?;
        if let Some(process) = process {
            process.stop(END_GRACE)?;
        }
        let Some(journal) = journal else { return Ok(()) };
        let recorded = count(&journal, br#""type":"requestClosed""#)?;
        ensure!(recorded >= requests, "of {requests} requests, {recorded} are in the journal");
        fs::remove_dir_all(&journal).context("cannot remove the journal")
    }
}

/// How often `text` stands in the segments below a folder.
fn count(folder: &Path, text: &[u8]) -> Result<usize> {
    let mut found = 0;
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry.context("cannot read the journal")?.path();
        if path.is_dir() {
            found += count(&path, text)?;
        } else if path.extension().is_some_and(|extension| extension == "seg") {
            let bytes = fs::read(&path).context("cannot read a segment")?;
            found += bytes.windows(text.len()).filter(|window| window == &text).count();
        }
    }
    Ok(found)
}

/// A shell that is told one command after the other.
struct Shell {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Shell {
    fn start(command: &mut Command) -> Result<Self> {
        let shown = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {shown}"))?;
        let (input, output) = (child.stdin.take(), child.stdout.take().context("the shell has no output")?);
        let mut shell = Self { child, input, output: BufReader::new(output) };
        shell.run(":")?;
        Ok(shell)
    }

    /// Runs a command; what it wrote.
    fn run(&mut self, line: &str) -> Result<String> {
        let input = self.input.as_mut().context("the shell has ended")?;
        writeln!(input, "{{ {line}\n}} < /dev/null 2>&1; echo; echo {END}").context("the shell has ended")?;
        let mut said = String::new();
        loop {
            let mut line = String::new();
            let length = self.output.read_line(&mut line).context("cannot read what the shell says")?;
            ensure!(length > 0, "the shell ended; before that it said:\n{said}");
            if line.trim_end() == END {
                return Ok(said);
            }
            said.push_str(&line);
        }
    }

    fn end(mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.child.wait().context("cannot wait for the shell")?;
        ensure!(status.success(), "the shell ended with {status}");
        Ok(())
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // It ends with its input, and an agent with it.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// A program on one core.
fn pinned(core: &str, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", core]).arg(program);
    command
}

fn written(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {name}"))?;
    Ok(path)
}

/// An address of this machine that is not its loopback interface's: none of a cluster's is. Nothing is sent for it.
fn own_address() -> Result<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("cannot make a socket")?;
    socket.connect("192.0.2.1:443").context("this machine has no route, and so no address but loopback")?;
    Ok(socket.local_addr().context("a socket has no address")?.ip())
}

fn free_port(host: IpAddr) -> Result<u16> {
    let listener = TcpListener::bind((host, 0)).context("there is no free port")?;
    Ok(listener.local_addr().context("a port has no number")?.port())
}

/// A pod as an API server gives it: 2 KiB.
fn pod(number: usize) -> serde_json::Value {
    let name = format!("web-{number}");
    let time = "2026-11-29T09:00:00Z";
    let conditions = ["Initialized", "Ready", "ContainersReady", "PodScheduled"].map(
        |kind| json!({"type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": time}),
    );
    json!({
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("5f1c2a34-0000-4000-8000-{number:012}"),
            "resourceVersion": "123456", "creationTimestamp": time,
            "labels": {"app": "web", "pod-template-hash": "6d4b75cb6d", "tier": "frontend"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6d4b75cb6d",
                "uid": "1a2b3c4d-0000-4000-8000-000000000000", "controller": true, "blockOwnerDeletion": true}],
        },
        "spec": {
            "containers": [{
                "name": "web", "image": "registry.example.com/shop/web:1.27.3",
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                "env": [{"name": "LOG_LEVEL", "value": "info"}, {"name": "REGION", "value": "eu-central-1"}],
                "resources": {"limits": {"cpu": "500m", "memory": "256Mi"}, "requests": {"cpu": "100m", "memory": "128Mi"}},
                "volumeMounts": [{"name": "kube-api-access-x7k2p", "readOnly": true,
                    "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "imagePullPolicy": "IfNotPresent",
            }],
            "restartPolicy": "Always", "terminationGracePeriodSeconds": 30, "dnsPolicy": "ClusterFirst",
            "serviceAccountName": "web", "nodeName": "ip-10-0-12-34.eu-central-1.compute.internal",
            "schedulerName": "default-scheduler", "priority": 0, "preemptionPolicy": "PreemptLowerPriority",
        },
        "status": {
            "phase": "Running", "hostIP": "10.0.12.34", "podIP": "10.0.13.57", "startTime": time, "qosClass": "Burstable",
            "conditions": conditions,
        },
    })
}

/// A list of pods.
fn list() -> String {
    let mut list =
        r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"123456"},"items":["#.to_owned();
    let mut number = 0;
    while list.len() < LARGE_BYTES {
        if number > 0 {
            list.push(',');
        }
        list.push_str(&pod(number).to_string());
        number += 1;
    }
    list.push_str("]}");
    list
}

fn config_map() -> serde_json::Value {
    json!({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "settings", "namespace": "shop"},
        "data": {"settings.properties": "colour=green\n".repeat(140)}})
}
