//! What the name servers say of a cluster's host names, asked again and again.
//!
//! Each name server is asked for itself, since they may answer differently (a private zone, a public one), and all their
//! answers count. One that fails changes nothing: its last answer stays, and that is recorded once.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{NetError, runtime::TokioRuntimeProvider},
    proto::rr::{RData, RecordType},
    system_conf::read_system_conf,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{config::EndpointName, recording::Recorder};

/// Shortest time between two rounds of questions, however short an answer's life is.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Longest, however long it is.
const INTERVAL_MAX: Duration = Duration::from_secs(30);
/// The time after a round in which nobody answered.
const INTERVAL_FAILED: Duration = Duration::from_secs(5);
/// How long a name server may take, each time it is asked.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it is asked in a round.
const ATTEMPTS: usize = 2;
/// Most addresses of one answer.
pub(super) const ADDRESSES_MAX: usize = 64;

/// A cluster's host names, and who is asked.
pub(super) struct Resolution {
    /// Index of the cluster, for the record.
    pub(super) cluster: usize,
    pub(super) names: Vec<EndpointName>,
    /// Empty: those of `/etc/resolv.conf`, which is read anew each time.
    pub(super) servers: Vec<SocketAddr>,
    /// Has them asked now.
    pub(super) ask: Arc<Notify>,
    pub(super) recorder: Recorder,
}

/// An answer, and how long it holds.
struct Answer {
    addresses: Vec<IpAddr>,
    holds: Duration,
}

/// Whether an address can be another machine's: an answer must not make the loopback address an API server's.
pub(super) fn is_of_a_machine(ip: IpAddr) -> bool {
    !(ip.is_unspecified() || ip.to_canonical().is_loopback() || ip.is_multicast())
}

impl Resolution {
    /// Publishes the addresses of all names until cancelled.
    pub(super) async fn follow(
        self,
        publish: watch::Sender<HashSet<SocketAddr>>,
        cancellation: CancellationToken,
    ) {
        let mut last: HashMap<(EndpointName, IpAddr, u16), Vec<IpAddr>> = HashMap::new();
        let mut failing = HashSet::new();
        loop {
            let began = Instant::now();
            let (servers, mut pause) = (self.servers(), INTERVAL_MAX);
            if servers.is_empty() {
                pause = INTERVAL_FAILED;
                self.failed(&mut failing, None, "no name server", "is there one in /etc/resolv.conf?");
            }
            let asked = self.names.iter().flat_map(|name| servers.iter().map(move |server| (name, server)));
            let answers = futures::future::join_all(
                asked.map(|(name, server)| async move { (name, server, ask(*server, name).await) }),
            );
            let answers = tokio::select! {
                () = cancellation.cancelled() => return,
                answers = answers => answers,
            };
            for (name, server, answer) in answers {
                match answer {
                    Ok(answer) => {
                        pause = pause.min(answer.holds.max(INTERVAL_MIN));
                        last.insert((name.clone(), server.ip(), server.port()), answer.addresses);
                        if failing.remove(&Some((name.clone(), *server))) {
                            tracing::info!(event = "name-server-answers-again", %name, %server, "the name server answers again");
                        }
                    }
                    Err(error) => {
                        pause = pause.min(INTERVAL_FAILED);
                        let what = format!("name server {server} does not answer for {name}");
                        self.failed(&mut failing, Some((name.clone(), *server)), &what, &error.to_string());
                    }
                }
            }
            let current: HashSet<SocketAddr> = last
                .iter()
                .flat_map(|((name, _, _), addresses)| {
                    addresses.iter().map(|address| SocketAddr::new(*address, name.port))
                })
                .collect();
            publish.send_if_modified(|published| {
                let changed = *published != current;
                *published = current;
                changed
            });
            tokio::select! {
                () = cancellation.cancelled() => return,
                () = sleep_until(began + pause) => {}
                () = self.ask.notified() => {
                    // Whoever has them asked again and again does so no faster than this.
                    tokio::select! {
                        () = cancellation.cancelled() => return,
                        () = sleep_until(began + INTERVAL_MIN) => {}
                    }
                }
            }
        }
    }

    fn servers(&self) -> Vec<SocketAddr> {
        if !self.servers.is_empty() {
            return self.servers.clone();
        }
        let system = read_system_conf().map(|(config, _)| config.name_servers).unwrap_or_default();
        system.iter().map(|server| SocketAddr::new(server.ip, 53)).collect()
    }

    /// Reports a failure once, until it is over.
    fn failed<K: std::hash::Hash + Eq>(&self, failing: &mut HashSet<K>, key: K, what: &str, why: &str) {
        if failing.insert(key) {
            tracing::warn!(
                event = "host-name-unresolved",
                cluster = self.cluster,
                why,
                "{what}; the last known addresses stay in force"
            );
            let message = format!("{what} ({why}); the last known addresses stay in force");
            self.recorder.finding(Some(self.cluster), None, "hostNameUnresolved", &message);
        }
    }
}

/// Asks one name server for one name: both families, with the shortest life of what it says.
async fn ask(server: SocketAddr, name: &EndpointName) -> Result<Answer, NetError> {
    let resolver = resolver(server)?;
    // Absolute: search domains are for people.
    let absolute = format!("{}.", name.host);
    let (v4, v6) = tokio::join!(
        resolver.lookup(absolute.as_str(), RecordType::A),
        resolver.lookup(absolute.as_str(), RecordType::AAAA),
    );
    let mut answer = Answer { addresses: Vec::new(), holds: INTERVAL_MAX };
    let mut failed = None;
    for found in [v4, v6] {
        match found {
            Ok(found) => {
                for record in found.answers() {
                    answer.holds = answer.holds.min(Duration::from_secs(record.ttl.into()));
                    answer.addresses.extend(match &record.data {
                        RData::A(address) => Some(IpAddr::V4(address.0)),
                        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
                        _ => None,
                    });
                }
            }
            Err(error) => failed = Some(error),
        }
    }
    answer.addresses.retain(|address| is_of_a_machine(*address));
    answer.addresses.truncate(ADDRESSES_MAX);
    match failed {
        // One family is enough.
        Some(error) if answer.addresses.is_empty() => Err(error),
        _ => Ok(answer),
    }
}

fn resolver(server: SocketAddr) -> Result<TokioResolver, NetError> {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = server.port();
        connection
    });
    let mut config = NameServerConfig::udp_and_tcp(server.ip());
    config.connections = connections.to_vec();
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![config]);
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options: &mut ResolverOpts = builder.options_mut();
    (options.timeout, options.attempts) = (ANSWER_TIMEOUT, ATTEMPTS);
    // What it says now is what is asked for.
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    builder.build()
}
