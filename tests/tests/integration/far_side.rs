//! A second machine on the pods' network, as a network namespace on their bridge: it has addresses of both families, at
//! which a relay leads to the real API server (so that its certificate and answers are genuine) and notes who came; and a
//! real name server, dnsmasq, whose records can be changed.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex},
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use weir_tests::{Pod, command, testbed::ENDPOINT_NAME, wait_until};

use super::{DEADLINE, escape};

const NAMESPACE: &str = "weir-far-side";
/// Its port of the bridge.
pub(super) const INTERFACE: &str = "weirfar0";
/// Addresses of the relay, and the first one's is the name server's as well. Not among those that the CNI gives away.
pub(super) const FIRST: &str = "10.244.0.241";
pub(super) const SECOND: &str = "10.244.0.242";
pub(super) const THIRD: &str = "10.244.0.243";
pub(super) const V6: &str = "fd00:10:244::241";
pub(super) const V6_NETWORK: &str = "fd00:10:244::";
const BRIDGE: &str = "weirtb0";
/// The host's own, while the far side is there: the agent looks at addresses of both families as well.
const HOST_V6: &str = "fd00:10:244::1/64";
/// Longer than a test: the agent has no reason to ask again before.
pub(super) const RECORD_SECONDS: u32 = 3600;

/// Who came to which address, and how many bytes they sent.
type Came = Arc<Mutex<BTreeMap<(IpAddr, IpAddr), u64>>>;

pub(super) struct FarSide {
    came: Came,
    name_server: Option<Child>,
    records: PathBuf,
    /// What the name server says of questions.
    questions: PathBuf,
}

impl FarSide {
    /// `folder` is for the name server's files.
    pub(super) fn new(api_server: SocketAddr, folder: &Path) -> Self {
        remove();
        ip(&["netns", "add", NAMESPACE]);
        ip(&["link", "add", INTERFACE, "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE]);
        ip(&["link", "set", INTERFACE, "master", BRIDGE, "up"]);
        ip(&["address", "replace", HOST_V6, "dev", BRIDGE, "nodad"]);
        for address in [FIRST, SECOND, THIRD] {
            ip(&["-n", NAMESPACE, "address", "add", &format!("{address}/24"), "dev", "eth0"]);
        }
        ip(&["-n", NAMESPACE, "address", "add", &format!("{V6}/64"), "dev", "eth0", "nodad"]);
        ip(&["-n", NAMESPACE, "link", "set", "eth0", "up"]);
        ip(&["-n", NAMESPACE, "link", "set", "lo", "up"]);
        let came = Came::default();
        let noted = came.clone();
        let (listening, is_listening) = std::sync::mpsc::channel();
        let (accepted, connections) = std::sync::mpsc::channel();
        thread::spawn(move || {
            enter().unwrap();
            let listener = TcpListener::bind("[::]:443").unwrap();
            listening.send(()).unwrap();
            for client in listener.incoming().map_while(Result::ok) {
                let (Ok(from), Ok(to)) = (client.peer_addr(), client.local_addr()) else { continue };
                let ends = (from.ip().to_canonical(), to.ip().to_canonical());
                noted.lock().unwrap().entry(ends).or_default();
                if accepted.send((client, ends)).is_err() {
                    return;
                }
            }
        });
        // From the host's namespace: to Weir, a namespace that it does not know is no other machine, but a way around.
        let noted = came.clone();
        thread::spawn(move || {
            for (client, ends) in connections {
                let noted = noted.clone();
                thread::spawn(move || relay(client, api_server, &noted, ends));
            }
        });
        is_listening.recv().unwrap();
        let mut far_side = Self {
            came,
            name_server: None,
            records: folder.join("records"),
            questions: folder.join("questions"),
        };
        far_side.record(FIRST);
        far_side.start_name_server(RECORD_SECONDS);
        far_side
    }

    /// How often this address has asked for the endpoint's.
    pub(super) fn asked_from(&self, address: &str) -> usize {
        let question = format!("query[A] {ENDPOINT_NAME} from {address}");
        let said = fs::read_to_string(&self.questions).unwrap_or_default();
        said.lines().filter(|line| line.ends_with(&question)).count()
    }

    /// The name server anew, with records that live for so long.
    pub(super) fn restart_name_server(&mut self, record_seconds: u32) {
        self.end_name_server();
        self.start_name_server(record_seconds);
    }

    fn start_name_server(&mut self, record_seconds: u32) {
        let mut server = Command::new("ip");
        server.args(["netns", "exec", NAMESPACE, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"]);
        server.args([
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
            "--user=root",
            "--pid-file",
            "--port=53",
        ]);
        server.arg(format!("--listen-address={FIRST}")).arg(format!("--local-ttl={record_seconds}"));
        server.arg(format!("--addn-hosts={}", self.records.display()));
        server.arg("--log-queries").arg(format!("--log-facility={}", self.questions.display()));
        self.name_server = Some(server.spawn().unwrap());
    }

    /// Gives the endpoint's name another address.
    pub(super) fn record(&self, address: &str) {
        self.record_all(&[(address, ENDPOINT_NAME)]);
    }

    /// Gives these names these addresses, and no others any.
    pub(super) fn record_all(&self, records: &[(&str, &str)]) {
        let lines: String = records.iter().map(|(address, name)| format!("{address} {name}\n")).collect();
        fs::write(&self.records, lines).unwrap();
        if let Some(server) = &self.name_server {
            let pid = Pid::from_raw(i32::try_from(server.id()).unwrap());
            kill(pid, Signal::SIGHUP).unwrap();
        }
    }

    pub(super) fn end_name_server(&mut self) {
        if let Some(mut server) = self.name_server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }

    /// Has it another address, at which the relay is reached.
    pub(super) fn take(&self, address: &str) {
        ip(&["-n", NAMESPACE, "address", "add", &format!("{address}/64"), "dev", "eth0", "nodad"]);
    }

    /// Where the relay met this address since the last time.
    pub(super) fn came_from(&self, address: IpAddr) -> Vec<IpAddr> {
        self.got_from(address).into_iter().map(|(to, _)| to).collect()
    }

    /// The same with the bytes that came.
    pub(super) fn got_from(&self, address: IpAddr) -> Vec<(IpAddr, u64)> {
        let came = std::mem::take(&mut *self.came.lock().unwrap());
        came.into_iter()
            .filter(|((from, _), _)| *from == address)
            .map(|((_, to), bytes)| (to, bytes))
            .collect()
    }
}

impl Drop for FarSide {
    fn drop(&mut self) {
        self.end_name_server();
        remove();
    }
}

/// A pod's addresses are the runtime's matter; an IPv6 one is added as a CNI would.
pub(super) fn give_v6_address(pod: &Pod<'_>, address: &str) {
    let (_, pid) = escape::place(pod);
    let mut add = Command::new("nsenter");
    add.args(["-t", &pid, "-n", "ip", "address", "add", &format!("{address}/64"), "dev", "eth0", "nodad"]);
    command::run(&mut add).unwrap();
}

/// Waits until the name server tells this pod this address of the endpoint.
pub(super) fn wait_for_record(pod: &Pod<'_>, address: &str) {
    wait_for_record_of(pod, ENDPOINT_NAME, address);
}

/// The same of any name.
pub(super) fn wait_for_record_of(pod: &Pod<'_>, name: &str, address: &str) {
    wait_until("the name server's new record", DEADLINE, || {
        let said = pod.exec(&["nslookup", name, FIRST])?;
        Ok(String::from_utf8_lossy(&said.stdout).contains(address).then_some(()))
    })
    .unwrap();
}

fn remove() {
    let _ = command::output(Command::new("ip").args(["netns", "delete", NAMESPACE]));
    let _ = command::output(Command::new("ip").args(["link", "delete", INTERFACE]));
    let _ = command::output(Command::new("ip").args(["address", "delete", HOST_V6, "dev", BRIDGE]));
}

fn ip(arguments: &[&str]) {
    command::run(Command::new("ip").args(arguments)).unwrap();
}

fn enter() -> io::Result<()> {
    setns(File::open(format!("/run/netns/{NAMESPACE}"))?, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

/// What a client sends, counted.
struct Counted {
    client: TcpStream,
    came: Came,
    ends: (IpAddr, IpAddr),
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.client.read(buffer)?;
        // An end is nothing that came: whoever came is noted already, and who did so before somebody looked may end after it, as when the
        // API server waits for nothing any more.
        if length > 0 {
            *self.came.lock().unwrap().entry(self.ends).or_default() += length as u64;
        }
        Ok(length)
    }
}

fn relay(client: TcpStream, api_server: SocketAddr, came: &Came, ends: (IpAddr, IpAddr)) {
    let both = || -> io::Result<()> {
        let server = TcpStream::connect(api_server)?;
        let mut up = Counted { client: client.try_clone()?, came: came.clone(), ends };
        let mut down = server.try_clone()?;
        let upward = thread::spawn({
            let mut server = server.try_clone()?;
            move || {
                let _ = io::copy(&mut up, &mut server);
                let _ = server.shutdown(Shutdown::Write);
            }
        });
        let mut client = client.try_clone()?;
        let _ = io::copy(&mut down, &mut client);
        let _ = client.shutdown(Shutdown::Both);
        let _ = upward.join();
        Ok(())
    };
    let _ = both();
}
