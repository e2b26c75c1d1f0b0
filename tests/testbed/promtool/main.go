// The part of promtool that tests alert rules (`promtool test rules`), which is a file of promtool's own that is copied here
// when it is built: the whole of it, with what reads and writes everywhere else, takes more than twice as long.
package main

import (
	"os"
	"time"

	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
)

const (
	successExitCode = 0
	failureExitCode = 1
)

func main() {
	options := promqltest.LazyLoaderOpts{EnableAtModifier: true, EnableNegativeOffset: true}
	os.Exit(RulesUnitTest(options, parser.NewParser(parser.Options{}), nil, false, false, false, os.Args[1:]...))
}

// Of a test's start_timestamp; as text alone.
func parseTime(text string) (time.Time, error) { return time.Parse(time.RFC3339Nano, text) }
