//go:build tools

package main

// Pins what is built, so that go.mod and go.sum cover every dependency.
import _ "github.com/prometheus/prometheus/cmd/promtool"
