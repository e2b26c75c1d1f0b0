//! What h2load is asked for, and what it says.

use anyhow::{Context as _, Result, ensure};

/// Version of HTTP that the client speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Http {
    /// HTTP/1.1.
    #[default]
    One,
    /// HTTP/2.
    Two,
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) http: Http,
    pub(super) connections: usize,
    /// Streams at once, of each connection.
    pub(super) streams: usize,
    /// Of all connections.
    pub(super) requests: usize,
    /// Requests a second; none: as fast as they are answered. Then the time of each is noted.
    pub(super) rate: Option<usize>,
    /// New connections a second; none: all at once.
    pub(super) connections_a_second: Option<usize>,
    /// The list of 25 MiB, not the object of 2 KiB.
    pub(super) large: bool,
    /// An object is created.
    pub(super) mutates: bool,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            http: Http::One,
            connections: 1,
            streams: 1,
            requests: 1,
            rate: None,
            connections_a_second: None,
            large: false,
            mutates: false,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Done {
    pub(super) requests: usize,
    pub(super) bytes: u64,
    /// Time of each request, in microseconds and in their order.
    pub(super) took_us: Vec<u64>,
}

impl Load {
    /// The command's words, without the address.
    pub(super) fn words(&self, log: &str) -> Vec<String> {
        let mut words = vec!["h2load".to_owned(), "-t1".to_owned()];
        if self.http == Http::One {
            words.push("--h1".to_owned());
        }
        words.extend([
            format!("-c{}", self.connections),
            format!("-m{}", self.streams),
            format!("-n{}", self.requests),
        ]);
        if let Some(rate) = self.rate {
            // h2load takes the rate of each connection.
            words.push(format!("--rps={}", rate as f64 / self.connections as f64));
            words.push(format!("--log-file={log}"));
        }
        if let Some(rate) = self.connections_a_second {
            words.extend([format!("-r{}", rate.div_ceil(20)), "--rate-period=50ms".to_owned()]);
        }
        // So that large bodies are not stopped by windows of 64 KiB, in which no client of Kubernetes has them.
        words.extend(["-w22".to_owned(), "-W24".to_owned()]);
        words
    }

    /// Reads what h2load wrote, and what it noted of each request.
    pub(super) fn done(&self, said: &str, log: Option<&str>) -> Result<Done> {
        let line = |start: &str| {
            let found = said.lines().find_map(|line| line.strip_prefix(start));
            found.with_context(|| format!("h2load did not say {start:?}:\n{said}"))
        };
        let number = |text: &str, name: &str| -> Result<u64> {
            let part = text.split(',').find_map(|part| part.trim().strip_suffix(name));
            let digits = part.and_then(|part| part.trim().parse().ok());
            digits.with_context(|| format!("h2load did not say how many {name}: {text}"))
        };
        let requests = line("requests: ")?;
        let succeeded = number(requests, "succeeded")? as usize;
        let well = number(line("status codes: ")?, "2xx")? as usize;
        ensure!(
            succeeded == self.requests && well == self.requests,
            "{} requests were made, and not all were answered:\n{said}",
            self.requests
        );
        let traffic = line("traffic: ")?;
        let (_, data) = traffic.rsplit_once('(').with_context(|| format!("no bytes of data: {traffic}"))?;
        let bytes = data.split(')').next().and_then(|digits| digits.parse().ok());
        let mut took_us: Vec<u64> = log
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.split('\t').nth(2)?.parse().ok())
            .collect();
        took_us.sort_unstable();
        Ok(Done {
            requests: succeeded,
            bytes: bytes.with_context(|| format!("no bytes of data: {traffic}"))?,
            took_us,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "starting benchmark...\nfinished in 41.32ms, 2420.14 req/s, 5.01MB/s\n\
        requests: 100 total, 100 started, 100 done, 100 succeeded, 0 failed, 0 errored, 0 timeout\n\
        status codes: 100 2xx, 0 3xx, 0 4xx, 0 5xx\n\
        traffic: 215.23KB (220396) total, 15.23KB (15596) headers (space savings 0.00%), 200.00KB (204800) data\n";

    #[test]
    fn what_h2load_says_is_read() {
        let load = Load { requests: 100, ..Load::default() };
        let done = load.done(SAID, Some("1\t200\t30\n2\t200\t10\n")).unwrap();
        assert_eq!((done.requests, done.bytes, done.took_us), (100, 204_800, vec![10, 30]));
    }

    #[test]
    fn a_request_that_was_not_answered_well_ends_the_bench() {
        let load = Load { requests: 100, ..Load::default() };
        let refused = SAID.replace("100 2xx, 0 3xx, 0 4xx, 0 5xx", "99 2xx, 0 3xx, 0 4xx, 1 5xx");
        assert!(load.done(&refused, None).is_err());
        assert!(load.done("", None).is_err());
    }
}
