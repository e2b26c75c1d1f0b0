//! The program that tries ways around Weir, and as which it watches the far side as well.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
};

use weir_tests::{command, wait_until};

use super::DEADLINE;

/// Where it is in a pod.
pub(super) const PROGRAM: &str = "/tmp/weir-escape";
/// Protocol numbers of markers.
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// The program that tries, built static: the image has no libraries.
pub(super) fn program() -> PathBuf {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let target = root.join("target/escape");
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "--quiet", "--locked", "-p", "weir-escape", "--target", &triple, "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .current_dir(root);
    command::run(&mut build).unwrap();
    target.join(triple).join("debug/weir-escape")
}

/// Ports of markers: each its own, since every watch sees those of the others. No server of the testbed has one of these, nor is one given
/// to a client: a packet to a guarded port is never a marker.
const MARKERS: std::ops::Range<u16> = 30_000..32_768;

/// How many were taken.
static TAKEN: AtomicU16 = AtomicU16::new(0);

/// The watcher and what it has seen.
pub(super) struct Watch {
    process: Child,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Watch {
    /// Of what comes from a network.
    pub(super) fn start(program: &Path, interface: &str, network: &str) -> Self {
        Self::by(Command::new(program).args(["watch", interface, network]))
    }

    /// Of what goes to an address.
    pub(super) fn to(program: &Path, interface: &str, address: &str) -> Self {
        Self::by(Command::new(program).args(["watch-to", interface, address]))
    }

    fn by(command: &mut Command) -> Self {
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "watching");
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let collected = seen.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                collected.lock().unwrap().push(line);
            }
        });
        Self { process, seen }
    }

    /// Has a marker sent, waits until it is seen, and takes what was seen before it.
    pub(super) fn until_marker(&self, to: IpAddr, protocol: u8, send: impl Fn(&str)) -> Vec<String> {
        let port = MARKERS.start + TAKEN.fetch_add(1, Ordering::Relaxed) % (MARKERS.end - MARKERS.start);
        let marker = format!(" {to} {protocol} {port}");
        wait_until("the marker at the far side", DEADLINE, || {
            send(&SocketAddr::new(to, port).to_string());
            let mut seen = self.seen.lock().unwrap();
            assert!(!seen.iter().any(|line| line == "lost"), "packets were lost: nothing is proven");
            let at = seen.iter().position(|line| line.ends_with(&marker));
            Ok(at.map(|at| seen.drain(..=at).collect()))
        })
        .unwrap()
    }
}

/// Those of the packets that the far side saw which go to one of these, `ADDRESS:PORT`; one that hides its port does.
pub(super) fn to_any(seen: Vec<String>, guarded: &[&str]) -> Vec<String> {
    let is_to_one = |packet: &String| {
        let words: Vec<&str> = packet.split(' ').collect();
        let [_, to, _, port] = words[..] else { return true };
        guarded.iter().any(|guarded| {
            let (address, guarded_port) = guarded.rsplit_once(':').unwrap();
            to == address && (port == guarded_port || port == "0")
        })
    };
    seen.into_iter().filter(is_to_one).collect()
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
