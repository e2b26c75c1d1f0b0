//! Families of metrics in the text format that Prometheus reads (OpenMetrics 1.0). The only file that knows the library
//! for it.

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use super::families::{Family, Kind, Sample, Value};

/// The media type of what [`render`] gives.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Writes the families with their samples, in this order.
pub(super) fn render(families: Vec<(&'static Family, Vec<Sample>)>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Gathered(families)));
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = text::encode(&mut out, &registry);
    out
}

/// Samples that are read already.
#[derive(Debug)]
struct Gathered(Vec<(&'static Family, Vec<Sample>)>);

impl Collector for Gathered {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (family, samples) in &self.0 {
            let kind = match family.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
            };
            let unit = family.unit.map(|unit| Unit::Other(unit.to_owned()));
            let mut metric = encoder.encode_descriptor(family.name, family.help, unit.as_ref(), kind)?;
            for sample in samples {
                if family.labels.is_empty() {
                    value(&mut metric, family.kind, &sample.value)?;
                    continue;
                }
                let escaped = sample.labels.iter().map(|text| escape(text));
                let labels: Vec<_> = family.labels.iter().copied().zip(escaped).collect();
                value(&mut metric.encode_family(&labels)?, family.kind, &sample.value)?;
            }
        }
        Ok(())
    }
}

fn value(metric: &mut MetricEncoder<'_>, kind: Kind, value: &Value) -> Result<(), std::fmt::Error> {
    match (kind, value) {
        (Kind::Counter, Value::Number(number)) => metric.encode_counter::<NoLabelSet, _, f64>(number, None),
        (_, Value::Number(number)) => metric.encode_gauge(&i64::try_from(*number).unwrap_or(i64::MAX)),
        (_, Value::Classes { sum, count, classes }) => {
            metric.encode_histogram::<NoLabelSet>(*sum, *count, classes, None)
        }
    }
}

/// The library writes label values as they are; what would end one stands for itself behind a backslash.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::super::families::{Family, Kind, Sample, Value};

    static COUNTER: Family =
        Family { name: "weir_a", unit: Some("bytes"), kind: Kind::Counter, labels: &["pod"], help: "Bytes." };
    static GAUGE: Family =
        Family { name: "weir_b", unit: None, kind: Kind::Gauge, labels: &[], help: "Ready." };
    static HISTOGRAM: Family =
        Family { name: "weir_c", unit: Some("seconds"), kind: Kind::Histogram, labels: &[], help: "Time." };

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let text = super::render(vec![
            (&COUNTER, vec![Sample { labels: vec!["a\"b\\c\nd".to_owned()], value: Value::Number(3) }]),
            (&GAUGE, vec![Sample { labels: Vec::new(), value: Value::Number(1) }]),
            (
                &HISTOGRAM,
                vec![Sample {
                    labels: Vec::new(),
                    value: Value::Classes { sum: 1.5, count: 3, classes: vec![(0.5, 1), (f64::MAX, 2)] },
                }],
            ),
        ]);
        expect![[r#"
            # HELP weir_a_bytes Bytes.
            # TYPE weir_a_bytes counter
            # UNIT weir_a_bytes bytes
            weir_a_bytes_total{pod="a\"b\\c\nd"} 3
            # HELP weir_b Ready.
            # TYPE weir_b gauge
            weir_b 1
            # HELP weir_c_seconds Time.
            # TYPE weir_c_seconds histogram
            # UNIT weir_c_seconds seconds
            weir_c_seconds_sum 1.5
            weir_c_seconds_count 3
            weir_c_seconds_bucket{le="0.5"} 1
            weir_c_seconds_bucket{le="+Inf"} 3
            # EOF
        "#]]
        .assert_eq(&text);
    }
}
