// Command audit-decoder reads audit events, one JSON object a line, as Kubernetes reads them, and refuses what is not strictly one:
// fields that the type does not have, fields that are there twice or in another case, levels and stages that do not exist.
//
//	audit-decoder FILE          prints how many events of each stage there are
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	auditv1 "k8s.io/apiserver/pkg/apis/audit/v1"
	kjson "sigs.k8s.io/json"
)

// The stages, in the order in which a request goes through them.
var stages = []auditv1.Stage{auditv1.StageRequestReceived, auditv1.StageResponseStarted, auditv1.StageResponseComplete, auditv1.StagePanic}

var levels = []auditv1.Level{auditv1.LevelMetadata, auditv1.LevelRequest, auditv1.LevelRequestResponse}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: audit-decoder FILE")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	scheme := runtime.NewScheme()
	utilruntime.Must(auditv1.AddToScheme(scheme))
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	counts := map[auditv1.Stage]int{}
	lines := bufio.NewReader(file)
	for number := 1; ; number++ {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			break
		} else if err != nil {
			return fmt.Errorf("line %d does not end: %w", number, err)
		}
		event, err := decode(decoder, bytes.TrimSuffix(line, []byte("\n")))
		if err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
		counts[event.Stage]++
	}
	for _, stage := range stages {
		fmt.Printf("%s %d\n", stage, counts[stage])
	}
	return nil
}

// decode reads an event in both ways that Kubernetes has, its serializer and the library below it.
func decode(decoder runtime.Decoder, line []byte) (*auditv1.Event, error) {
	object, kind, err := decoder.Decode(line, nil, nil)
	if err != nil {
		return nil, err
	}
	if _, is := object.(*auditv1.Event); !is {
		return nil, fmt.Errorf("%s is no audit event", kind)
	}
	var event auditv1.Event
	strict, err := kjson.UnmarshalStrict(line, &event)
	if err := errors.Join(append(strict, err)...); err != nil {
		return nil, err
	}
	if !slices.Contains(stages, event.Stage) || !slices.Contains(levels, event.Level) {
		return nil, fmt.Errorf("no stage %q or no level %q", event.Stage, event.Level)
	}
	if event.AuditID == "" || event.StageTimestamp.IsZero() || event.RequestReceivedTimestamp.IsZero() {
		return nil, errors.New("an id or a time is missing")
	}
	if event.StageTimestamp.Before(&event.RequestReceivedTimestamp) {
		return nil, errors.New("a stage before the request was received")
	}
	for _, object := range []*runtime.Unknown{event.RequestObject, event.ResponseObject} {
		var content any
		if object == nil {
			continue
		}
		if strict, err := kjson.UnmarshalStrict(object.Raw, &content); err != nil || len(strict) > 0 {
			return nil, errors.Join(append(strict, err)...)
		}
	}
	return &event, nil
}
