//! What Prometheus finds by the chart's ServiceMonitors: as its operator reads them, without either of both.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;
use weir_tests::wait_until;

use super::{
    super::{DEADLINE, monitoring::Monitored},
    NAMESPACE,
    release::Release,
};

/// A ServiceMonitor, and a series of whoever is behind it.
const MONITORS: [(&str, &str); 2] =
    [("weir-agent", "weir_ready"), ("weir-approver", "weir_approver_approved_total")];

/// The agent and the approver answer at the endpoints of the Services that are chosen, at the port that is named, and there is one of each.
#[track_caller]
pub(super) fn answers_whom_its_service_monitors_send(release: &Release<'_>) {
    for (monitor, series) in MONITORS {
        let addresses = wait_until(&format!("one endpoint of {monitor}"), DEADLINE, || {
            let addresses = endpoints(release, monitor);
            Ok((addresses.len() == 1).then_some(addresses))
        });
        let monitored = Monitored::at(addresses.unwrap_or_else(|error| panic!("{error:#}"))[0]);
        // The former agent may have had the address until just now.
        wait_until(&format!("an answer for {monitor}"), DEADLINE, || {
            Ok(monitored.get("/metrics").is_ok_and(|(status, _)| status == 200).then_some(()))
        })
        .unwrap();
        let metrics = monitored.metrics();
        assert!(metrics.contains_key(series), "{monitor}: {metrics:#?}");
    }
}

/// Where a ServiceMonitor has Prometheus ask.
fn endpoints(release: &Release<'_>, monitor: &str) -> Vec<SocketAddr> {
    let get = |what: &[&str]| -> Value {
        let text =
            release.testbed.kubectl(&[&["get", "-n", NAMESPACE, "-o", "json"], what].concat()).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let monitor = get(&["servicemonitor", monitor]);
    let labels = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap().iter();
    let labels: Vec<_> = labels.map(|(name, value)| format!("{name}={}", value.as_str().unwrap())).collect();
    let services = get(&["services", "-l", &labels.join(",")]);
    let mut found = Vec::new();
    for service in services["items"].as_array().unwrap() {
        let of = format!("kubernetes.io/service-name={}", service["metadata"]["name"].as_str().unwrap());
        for slice in get(&["endpointslices", "-l", &of])["items"].as_array().unwrap() {
            let mut ports = slice["ports"].as_array().into_iter().flatten();
            let Some(port) = ports.find(|port| port["name"] == monitor["spec"]["endpoints"][0]["port"])
            else {
                continue;
            };
            let port = u16::try_from(port["port"].as_u64().unwrap()).unwrap();
            let addresses = slice["endpoints"].as_array().into_iter().flatten();
            let addresses = addresses.flat_map(|endpoint| endpoint["addresses"].as_array().unwrap());
            let addresses = addresses.map(|address| address.as_str().unwrap().parse::<IpAddr>().unwrap());
            found.extend(addresses.map(|address| SocketAddr::from((address, port))));
        }
    }
    found
}
