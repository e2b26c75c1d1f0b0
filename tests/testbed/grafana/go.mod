// What reads a dashboard as Grafana does.
module weir.dev/testbed/grafana

go 1.26.7

require github.com/grafana/grafana-foundation-sdk/go v0.0.22
