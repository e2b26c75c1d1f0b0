//! How the figures of proxies are shown: each with its ratio to nginx, from the same run.

use std::{fmt::Write as _, fs};

use anyhow::{Context as _, Result};

use super::{
    peers::Proxy,
    proxy::{Quantiles, Throughput},
};

/// What is measured of one proxy.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    pub(super) http1: Throughput,
    pub(super) http2: Throughput,
    pub(super) mutations: Throughput,
    pub(super) handshakes: f64,
    /// None: it did not keep up with the rate.
    pub(super) reads: Option<Quantiles>,
    pub(super) mutation_times: Quantiles,
    /// Milliseconds of CPU for 1,000 requests at the fixed rate.
    pub(super) cpu_ms: f64,
    pub(super) large_mb: f64,
    pub(super) idle_kib: f64,
    pub(super) large_peak_kib: f64,
    pub(super) with_connections_kib: f64,
    pub(super) per_connection_kib: f64,
}

/// What is said before anything runs.
pub(super) fn heading(long: bool) -> Result<String> {
    let load = fs::read_to_string("/proc/loadavg").context("the load cannot be read")?;
    let build = if long { "as users have it" } else { "release without LTO" };
    Ok(format!("load {}, Weir is built: {build}", load.trim()))
}

/// The API server itself.
pub(super) fn direct(read: f64, mutation: f64) -> String {
    format!("without a proxy: p50 {read:.0} µs of a read, {mutation:.0} µs of a mutation")
}

/// Columns of a table: their names, and how each is shown.
type Column = (&'static str, fn(&Figures, Quantiles, Quantiles) -> f64, usize);

const THROUGHPUT: [Column; 7] = [
    ("HTTP/1.1, requests per CPU-s", |figures, _, _| figures.http1.per_cpu, 0),
    ("a second", |figures, _, _| figures.http1.per_second, 0),
    ("HTTP/2, requests per CPU-s", |figures, _, _| figures.http2.per_cpu, 0),
    ("a second", |figures, _, _| figures.http2.per_second, 0),
    ("new connections per CPU-s", |figures, _, _| figures.handshakes, 0),
    ("25 MiB, MB per CPU-s", |figures, _, _| figures.large_mb, 0),
    ("mutations per CPU-s", |figures, _, _| figures.mutations.per_cpu, 0),
];

const TIMES: [Column; 5] = [
    ("added p50 at 1,000/s, µs", |figures, reads, _| added(figures.reads, reads, |of| of.p50), 0),
    ("added p99, µs", |figures, reads, _| added(figures.reads, reads, |of| of.p99), 0),
    ("CPU of 1,000 requests then, ms", |figures, _, _| figures.cpu_ms, 0),
    (
        "mutation at 100/s, added p50, µs",
        |figures, _, mutations| figures.mutation_times.p50 - mutations.p50,
        0,
    ),
    ("added p99, µs", |figures, _, mutations| figures.mutation_times.p99 - mutations.p99, 0),
];

const MEMORY: [Column; 4] = [
    ("idle, MiB", |figures, _, _| figures.idle_kib / 1024.0, 1),
    ("1,000 idle connections, MiB", |figures, _, _| figures.with_connections_kib / 1024.0, 1),
    ("a connection, KiB", |figures, _, _| figures.per_connection_kib, 1),
    ("peak with 4 × 25 MiB, MiB", |figures, _, _| figures.large_peak_kib / 1024.0, 1),
];

fn added(of: Option<Quantiles>, direct: Quantiles, part: fn(&Quantiles) -> f64) -> f64 {
    of.map_or(f64::NAN, |of| part(&of) - part(&direct))
}

/// All tables, as Markdown.
pub(super) fn tables(all: &[(Proxy, Figures)], reads: Quantiles, mutations: Quantiles) -> String {
    let mut text = String::new();
    for columns in [&THROUGHPUT[..], &TIMES[..], &MEMORY[..]] {
        let names: Vec<&str> = columns.iter().map(|(name, ..)| *name).collect();
        let _ = writeln!(text, "\n| | {} |\n|---|{}", names.join(" | "), "---|".repeat(columns.len()));
        for (proxy, figures) in all {
            let cells = columns.iter().map(|(_, value, digits)| {
                let value = |figures: &Figures| value(figures, reads, mutations);
                let first =
                    all.first().filter(|(first, _)| *first == Proxy::Nginx).map(|(_, nginx)| value(nginx));
                cell(value(figures), first, *digits)
            });
            let _ = writeln!(text, "| {} | {} |", proxy.name(), cells.collect::<Vec<_>>().join(" | "));
        }
    }
    text
}

/// A figure and its ratio to nginx's.
fn cell(value: f64, nginx: Option<f64>, digits: usize) -> String {
    match nginx {
        _ if value.is_nan() => "–".to_owned(),
        Some(nginx) if nginx > 0.0 => format!("{value:.digits$} ({:.2})", value / nginx),
        _ => format!("{value:.digits$}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_figure_has_its_ratio_and_who_did_not_keep_up_has_none() {
        let nginx = Figures {
            idle_kib: 1024.0,
            reads: Some(Quantiles { p50: 300.0, p99: 900.0 }),
            ..Figures::default()
        };
        let slow = Figures { idle_kib: 3072.0, reads: None, ..Figures::default() };
        let direct = Quantiles { p50: 100.0, p99: 200.0 };
        let text = tables(&[(Proxy::Nginx, nginx), (Proxy::Mitmproxy, slow)], direct, Quantiles::default());
        assert!(text.contains("| nginx | 200 (1.00) | 700 (1.00) |"), "{text}");
        assert!(text.contains("| mitmproxy -w | – | – |"), "{text}");
        assert!(text.contains("| mitmproxy -w | 3.0 (3.00) |"), "{text}");
    }
}
