//! Tries one way to reach an address, and says what came of it in one word and an errno: `connected`, `sent`, `refused`,
//! `timedOut`, `failed`. Whether a byte arrived is for the far side to say, not for this program.
//!
//! Static, so that it runs in any container. `--cgroup`, `--netns` and `--late` put it where only a privileged process
//! can put itself: into a cgroup, into a process's network namespace, and there only after its socket is made; with `--leave` it
//! goes from there into another cgroup once its socket is made, and with `--born` it is cloned into the cgroup, and what it tries
//! is its first instruction. `--relay` has a connection carry standard input
//! and output, behind the line `connected`; `--via` names the machine that unwraps packets, `--from` whom they are from,
//! `--station` the one that IPv6 packets are routed to first, `--patience` for how many seconds `ask` and `concurrent` wait for whoever
//! has to do something for them. `before` makes the sockets of several ways at once, and uses them later.
//! `rewrite CGROUP FROM TO` tries nothing: it is somebody else's program, which stands at a cgroup until its input ends; nor does
//! `ask-agent SOCKET`, which asks an agent whether it is alive as its successor would.

mod again;
mod before;
mod born;
mod forge;
mod packet;
mod rewrite;
mod sockets;
mod tun;
mod v6;
mod watch;

use std::{net::SocketAddr, process::ExitCode, time::Duration};

/// How long a connection may take that the kernel makes.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(2);

/// How long an agent may take, the machine being as busy as it may be; another `--patience` is for one that stands still.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What came of an attempt.
pub(crate) type Outcome = Result<&'static str, nix::Error>;

#[expect(clippy::print_stdout, reason = "the verdict is what the program is for")]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (mut place, mut words, mut is_born) = (sockets::Place::default(), Vec::new(), false);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--cgroup" => place.cgroup = rest.next().cloned(),
            "--netns" => place.netns = rest.next().cloned(),
            "--late" => place.late = true,
            "--leave" => place.leave = rest.next().cloned(),
            "--born" => is_born = true,
            "--relay" => place.relay = true,
            "--from" => place.from = rest.next().and_then(|from| from.parse().ok()),
            "--via" => place.via = rest.next().and_then(|via| via.parse().ok()),
            "--patience" => {
                let seconds = rest.next().and_then(|seconds| seconds.parse().ok());
                place.patience = seconds.map(Duration::from_secs);
            }
            "--station" => place.station = rest.next().and_then(|station| station.parse().ok()),
            word => words.push(word.to_owned()),
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["watch", interface, network] => return watch::run(interface, network, watch::Wanted::From),
        ["watch-to", interface, address] => return watch::run(interface, address, watch::Wanted::To),
        ["before", ..] => return before::run(&words[1..]),
        _ => {}
    }
    let is_to_try = if is_born { born::clone_into(&mut place) } else { Ok(true) };
    let outcome = match is_to_try {
        Ok(true) => act(&words, &place),
        // The clone has said what there was to say.
        Ok(false) => Ok(sockets::ENDED),
        Err(errno) => Err(errno),
    };
    if let Some(words) = said(outcome) {
        println!("{words}");
    }
    ExitCode::SUCCESS
}

/// An outcome in words; none of a connection whose last words were what it carried.
fn said(outcome: Outcome) -> Option<String> {
    match outcome {
        Ok(sockets::ENDED) => None,
        Ok(word) => Some(word.to_owned()),
        Err(nix::Error::ETIMEDOUT | nix::Error::EINPROGRESS | nix::Error::EAGAIN) => {
            Some("timedOut".to_owned())
        }
        Err(nix::Error::ECONNREFUSED) => Some("refused".to_owned()),
        Err(errno) => Some(format!("failed {errno:?}")),
    }
}

fn act(words: &[&str], place: &sockets::Place) -> Outcome {
    match *words {
        ["race", name, server, address] => forge::race(name, server, address, place),
        ["race-until-redirected", name, server, address] => {
            forge::race_until_redirected(name, server, address)
        }
        ["forge", name, address, to] => forge::answer(name, address, to),
        ["rewrite", cgroup, from, to] => rewrite::run(cgroup, from, to),
        ["frames", target, last_from] => match (target.parse(), last_from.parse()) {
            (Ok(target), Ok(last_from)) => packet::frames(target, last_from, place),
            _ => Err(nix::Error::EDESTADDRREQ),
        },
        ["ask-agent", socket] => sockets::ask_agent(socket),
        [way, target] => match target.parse() {
            Ok(SocketAddr::V4(target)) => attempt(way, target, place),
            Ok(SocketAddr::V6(target)) => v6::attempt(way, target, place),
            Err(_) => Err(nix::Error::EDESTADDRREQ),
        },
        _ => Err(nix::Error::EINVAL),
    }
}

fn attempt(way: &str, target: std::net::SocketAddrV4, place: &sockets::Place) -> Outcome {
    match way {
        "raw" | "raw-protocol" | "raw-connected" | "raw-fragment" | "raw-gre" => {
            packet::raw(way, target, place)
        }
        "frame" | "frame-fragment" | "frame-fragments" | "frame-vlan" | "frame-double-vlan"
        | "frame-vxlan" => packet::frame(way, target, place),
        "udp-vxlan" => packet::wrapped(target, place),
        "tun" => tun::forwarded(target, place),
        _ => sockets::attempt(way, target, place),
    }
}
