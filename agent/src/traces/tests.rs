//! What becomes of traces when nobody takes them.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::{Measured, QUEUE_MAX, STAGES_MAX, Stage, TEXT_BYTES_MAX, Traces, Value};
use crate::config::{self, CollectorEndpoint};

fn nowhere() -> config::Traces {
    // Nobody listens on the port that was just given back.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let endpoint = CollectorEndpoint {
        host: "127.0.0.1".into(),
        port,
        authority: format!("127.0.0.1:{port}"),
        path: "/v1/traces".into(),
        tls: None,
    };
    config::Traces { endpoint, certificate_authority: None, sample_percent: 100 }
}

#[test]
fn a_full_queue_keeps_nobody_waiting_and_what_is_lost_is_counted() {
    let (traces, _exporter) = Traces::new(&nowhere(), "node").expect("traces");
    for _ in 0..QUEUE_MAX + 2 {
        traces.begin(Instant::now()).enter(Stage::Record);
    }
    // A span for the whole, and one for the stage.
    assert_eq!(traces.measured(), Measured { queue_full: 4, ..Measured::default() });
}

#[tokio::test]
async fn what_no_collector_takes_before_the_end_does_not_keep_the_agent_from_ending() {
    let (traces, exporter) = Traces::new(&nowhere(), "node").expect("traces");
    drop(traces.begin(Instant::now()));
    let stop = CancellationToken::new();
    stop.cancel();
    // Within its own deadline; this one is only there so that the test ends.
    let ended = tokio::time::timeout(std::time::Duration::from_secs(30), exporter.run(stop)).await;
    assert!(ended.is_ok());
    assert_eq!(traces.measured().exported, 0);
}

#[test]
fn texts_and_stages_have_bounds_and_a_trace_that_is_not_wanted_is_none() {
    let (traces, _exporter) = Traces::new(&nowhere(), "node").expect("traces");
    let mut trace = traces.begin(Instant::now());
    trace.text("key", &"ü".repeat(TEXT_BYTES_MAX));
    trace.text("empty", "");
    (0..2 * STAGES_MAX).for_each(|_| trace.enter(Stage::Forward));
    trace.with(|traced| {
        let [("key", Value::Text(text))] = traced.attributes.as_slice() else { panic!("{traced:?}") };
        assert_eq!((text.len(), traced.stages.len()), (TEXT_BYTES_MAX, STAGES_MAX));
    });
    let none = super::Trace::default();
    assert!(!none.is_wanted() && none.context().is_none());
}
