//! `cargo xtask bench proxy`: Weir as a proxy beside others in the same run, TLS on both sides. One core is the proxy's, the other
//! has load and upstream, which are not counted: figures are by the proxy's own CPU time, so that what else the machine does changes
//! them little.
//!
//! Weir is the built agent: `weir-agent exec` around the load generator, so that each connection is redirected by the kernel programs,
//! attributed, decrypted, recorded with its bodies, masked and committed to a journal on disk, and forwarded. The API server is a static one:
//! a real one would be what is measured.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use weir_tests::{command, packages, progress::Progress};

use super::{
    load::{Http, Load},
    peers::{Bed, Peer, Proxy},
    table::{self, Figures},
};

/// Connections that are opened and left alone.
const IDLE_CONNECTIONS: usize = 1000;
/// Requests a second where the time that a proxy adds is measured.
const RATE: usize = 1000;
/// The same for mutations, each of which waits for the disk twice.
const MUTATION_RATE: usize = 100;
/// Connections of a row with as many requests as there can be.
const CONNECTIONS: usize = 16;
/// With what the number of requests of a row is found out.
const TRIAL_REQUESTS: usize = 400;

/// Runs all of it and prints the tables.
///
/// # Errors
/// Something cannot be installed, built or run, or a request was not answered as it should be.
pub(super) fn run(root: &Path, long: bool, only: &[String]) -> Result<()> {
    let agent = build(root, long)?;
    let tools = [("nginx", "nginx-light"), ("haproxy", "haproxy"), ("h2load", "nghttp2-client")];
    let missing: Vec<&str> = tools
        .iter()
        .filter(|(tool, _)| command::find_in_path(tool).is_none())
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        packages::install(&missing)?;
    }
    let bed = Bed::start(agent)?;
    let seconds = if long { 15.0 } else { 4.0 };
    println!("{}", table::heading(long)?);
    let direct = latencies(&mut bed.direct()?)?;
    println!("{}", table::direct(direct.reads.p50, direct.mutations.p50));
    let (mut all, mut failed) = (Vec::new(), Ok(()));
    for proxy in Proxy::ALL {
        if !only.is_empty() && !only.iter().any(|name| name == proxy.name()) {
            continue;
        }
        match Progress::Shown.step(proxy.name(), || measure(&bed, proxy, seconds)) {
            Ok(figures) => all.push((proxy, figures)),
            Err(error) => failed = Err(error.context(format!("the bench of {}", proxy.name()))),
        }
    }
    println!("{}", table::tables(&all, direct.reads, direct.mutations));
    failed
}

/// Builds the agent: as users have it with `--long`; else without LTO, which takes long and gives little. `WEIR_BENCH_AGENT` names one that
/// is built, for a comparison of two.
fn build(root: &Path, long: bool) -> Result<std::path::PathBuf> {
    if let Some(built) = std::env::var_os("WEIR_BENCH_AGENT") {
        return Ok(built.into());
    }
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--locked", "--release", "-p", "weir-agent", "--bin", "weir-agent"]);
    if !long {
        cargo.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    }
    let status = cargo.current_dir(root).status().context("cannot start cargo")?;
    ensure!(status.success(), "the agent cannot be built ({status})");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    Ok(target.join("release/weir-agent"))
}

/// The time that half of the requests took, and 99 of 100.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Quantiles {
    pub(super) p50: f64,
    pub(super) p99: f64,
}

#[derive(Clone, Copy, Debug)]
struct Latencies {
    reads: Quantiles,
    mutations: Quantiles,
}

/// The times at fixed rates.
fn latencies(peer: &mut Peer) -> Result<Latencies> {
    Ok(Latencies { reads: at_rate(peer, RATE, false)?, mutations: at_rate(peer, MUTATION_RATE, true)? })
}

fn at_rate(peer: &mut Peer, rate: usize, mutates: bool) -> Result<Quantiles> {
    let load = Load { connections: 4, requests: rate * 5, rate: Some(rate), mutates, ..Load::default() };
    let took = peer.load(&load)?.took_us;
    ensure!(!took.is_empty(), "h2load wrote no times");
    let at = |part: usize| took[(took.len() - 1) * part / 100] as f64;
    Ok(Quantiles { p50: at(50), p99: at(99) })
}

/// All figures of one proxy. Those of memory are of processes that have just started.
fn measure(bed: &Bed, proxy: Proxy, seconds: f64) -> Result<Figures> {
    let mut peer = bed.proxy(proxy)?;
    peer.load(&Load::default())?;
    let idle = peer.memory_kib("VmRSS")?;
    let many = with_idle_connections(&mut peer)?;
    peer.end()?;
    let mut peer = bed.proxy(proxy)?;
    peer.load(&Load { connections: 4, requests: 4, large: true, ..Load::default() })?;
    let large_peak_kib = peer.memory_kib("VmHWM")?;
    let http1 = throughput(&mut peer, seconds, Load { connections: CONNECTIONS, ..Load::default() })?;
    let streams = Load { connections: 4, streams: 16, http: Http::Two, ..Load::default() };
    let http2 = throughput(&mut peer, seconds, streams)?;
    let mutating = Load { connections: CONNECTIONS, mutates: true, ..Load::default() };
    let mutations = throughput(&mut peer, seconds, mutating)?;
    let handshakes = handshakes(&mut peer, proxy)?;
    let (before, since) = (peer.cpu()?, Instant::now());
    let reads = at_rate(&mut peer, RATE, false)?;
    let cpu = peer.cpu()? - before;
    let kept_up = since.elapsed() < Duration::from_secs(8);
    let mutation_times = at_rate(&mut peer, MUTATION_RATE, true)?;
    let large = Load { connections: 2, requests: 8, large: true, ..Load::default() };
    let (bytes, large_cpu) = spent(&mut peer, &large)?;
    let figures = Figures {
        http1,
        http2,
        mutations,
        handshakes,
        reads: kept_up.then_some(reads),
        mutation_times,
        cpu_ms: cpu.as_secs_f64() * 1e6 / (RATE * 5) as f64,
        large_mb: bytes as f64 / 1e6 / large_cpu.as_secs_f64(),
        idle_kib: idle,
        large_peak_kib,
        per_connection_kib: (many - idle) / IDLE_CONNECTIONS as f64,
        with_connections_kib: many,
    };
    peer.end()?;
    Ok(figures)
}

/// Requests a second of the proxy's CPU, and of the clock.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Throughput {
    pub(super) per_cpu: f64,
    pub(super) per_second: f64,
}

/// As many requests as there can be in about `seconds`.
fn throughput(peer: &mut Peer, seconds: f64, load: Load) -> Result<Throughput> {
    let since = Instant::now();
    peer.load(&Load { requests: TRIAL_REQUESTS, ..load })?;
    // A short trial says too little of the rate: most of it is the start.
    let rate = TRIAL_REQUESTS as f64 / since.elapsed().as_secs_f64();
    peer.load(&Load { requests: TRIAL_REQUESTS.max(rate as usize), ..load })?;
    let (before, since) = (peer.cpu()?, Instant::now());
    let first = TRIAL_REQUESTS.max((rate * seconds) as usize);
    let mut requests = 0;
    while since.elapsed().as_secs_f64() < seconds {
        requests += peer.load(&Load { requests: first, ..load })?.requests;
    }
    let (cpu, clock) = (peer.cpu()? - before, since.elapsed());
    Ok(Throughput {
        per_cpu: requests as f64 / cpu.as_secs_f64(),
        per_second: requests as f64 / clock.as_secs_f64(),
    })
}

/// Connections with a full handshake and one request each, for a second of CPU.
fn handshakes(peer: &mut Peer, proxy: Proxy) -> Result<f64> {
    let (connections, rate) = if proxy == Proxy::Mitmproxy { (200, 40) } else { (3000, 500) };
    let load =
        Load { connections, requests: connections, connections_a_second: Some(rate), ..Load::default() };
    let before = peer.cpu()?;
    peer.load(&load)?;
    Ok(connections as f64 / (peer.cpu()? - before).as_secs_f64())
}

/// Bytes that a load got, and the CPU time it took.
fn spent(peer: &mut Peer, load: &Load) -> Result<(u64, Duration)> {
    peer.load(&Load { requests: load.connections, ..*load })?;
    let before = peer.cpu()?;
    let done = peer.load(load)?;
    Ok((done.bytes, peer.cpu()? - before))
}

/// Resident memory with that many connections, each of which has had one request.
fn with_idle_connections(peer: &mut Peer) -> Result<f64> {
    // The second request of each would come after 100 s.
    let load = Load {
        connections: IDLE_CONNECTIONS,
        requests: 2 * IDLE_CONNECTIONS,
        rate: Some(IDLE_CONNECTIONS / 100),
        ..Load::default()
    };
    let pid = peer.start_load(&load)?;
    let settled = peer.wait_for_connections(IDLE_CONNECTIONS);
    let resident = settled.and_then(|()| peer.memory_kib("VmRSS"));
    peer.end_load(pid)?;
    let resident = resident?;
    if resident <= 0.0 {
        bail!("the proxy's memory cannot be read");
    }
    Ok(resident)
}
