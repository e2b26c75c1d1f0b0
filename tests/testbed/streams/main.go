// Records conversations between Kubernetes' own clients and servers of streams, with what both ends saw: the decoders in
// agent/src/streams must say the same. `streams-capture FOLDER FILE` writes one JSON file for each, and `bodies.go`'s to FILE.
//
// The servers are the kubelet's (k8s.io/cri-streaming) and, in front of it, the API server's translator and tunnel
// (k8s.io/apiserver); the clients are client-go's, and gorilla's WebSocket for protocols that client-go has given up.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	gorilla "github.com/gorilla/websocket"
	apiproxy "k8s.io/apiserver/pkg/util/proxy"
	"k8s.io/apimachinery/pkg/util/proxy"
	"k8s.io/client-go/rest"
	clientforward "k8s.io/client-go/tools/portforward"
	clientcommand "k8s.io/client-go/tools/remotecommand"
	clientspdy "k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

const exitCode = 3

// A connection of a port-forward, as the pod saw it.
type forwarded struct {
	Port int32  `json:"port"`
	In   []byte `json:"in"`
	Out  []byte `json:"out"`
}

type piece struct {
	Client bool   `json:"client"`
	Bytes  []byte `json:"bytes"`
}

// One conversation. Bytes are base64.
type conversation struct {
	Subresource string            `json:"subresource"`
	Query       string            `json:"query"`
	Upgrade     string            `json:"upgrade"`
	Subprotocol string            `json:"subprotocol"`
	Lanes       map[string][]byte `json:"lanes,omitempty"`
	Forwarded   []forwarded       `json:"forwarded,omitempty"`
	ExitCode    *int              `json:"exitCode,omitempty"`
	Pieces      []piece           `json:"pieces"`
}

// Notes what passes over the connections of a listener.
type recorder struct {
	net.Listener
	mutex  sync.Mutex
	pieces []piece
}

type conn struct {
	net.Conn
	recorder *recorder
}

func (r *recorder) Accept() (net.Conn, error) {
	accepted, err := r.Listener.Accept()
	return &conn{accepted, r}, err
}

func (r *recorder) note(client bool, data []byte) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if len(data) > 0 {
		r.pieces = append(r.pieces, piece{client, bytes.Clone(data)})
	}
}

func (c *conn) Read(data []byte) (int, error) {
	n, err := c.Conn.Read(data)
	c.recorder.note(true, data[:n])
	return n, err
}

func (c *conn) Write(data []byte) (int, error) {
	c.recorder.note(false, data)
	return c.Conn.Write(data)
}

// What passed behind the heads of HTTP, and the head of the response.
func (r *recorder) upgraded() ([]piece, http.Header) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	var heads [2][]byte
	var rest []piece
	for _, part := range r.pieces {
		side := 0
		if !part.Client {
			side = 1
		}
		if !bytes.Contains(heads[side], []byte("\r\n\r\n")) {
			heads[side] = append(heads[side], part.Bytes...)
			_, behind, _ := bytes.Cut(heads[side], []byte("\r\n\r\n"))
			part.Bytes = bytes.Clone(behind)
		}
		if len(part.Bytes) > 0 {
			rest = append(rest, part)
		}
	}
	header := http.Header{}
	head, _, _ := strings.Cut(string(heads[1]), "\r\n\r\n")
	for _, line := range strings.Split(head, "\r\n")[1:] {
		name, value, _ := strings.Cut(line, ":")
		header.Add(name, strings.TrimSpace(value))
	}
	return rest, header
}

// A pod whose process answers what it reads in capitals, complains, and exits with a code; its ports do the same.
type pod struct {
	mutex     sync.Mutex
	lanes     map[string][]byte
	forwarded []forwarded
	resized   bool
}

func (p *pod) put(lane string, data []byte) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.lanes[lane] = append(p.lanes[lane], data...)
}

func (p *pod) ExecInContainer(_ context.Context, _, _, _ string, _ []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	if tty {
		size := <-resize
		p.put("size", []byte(fmt.Sprintf("%dx%d", size.Width, size.Height)))
	}
	buffer := make([]byte, 32*1024)
	for {
		n, problem := in.Read(buffer)
		p.put("stdin", buffer[:n])
		answer := bytes.ToUpper(buffer[:n])
		if n > 0 {
			p.put("stdout", answer)
			out.Write(answer)
		}
		// A terminal has no end: its process is told to go.
		if problem != nil || (tty && bytes.Contains(buffer[:n], []byte("exit"))) {
			break
		}
	}
	if !tty {
		p.put("stderr", []byte("warning: \xff\x00 no text\n"))
		err.Write([]byte("warning: \xff\x00 no text\n"))
	}
	return exec.CodeExitError{Err: errors.New("exited"), Code: exitCode}
}

func (p *pod) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	seen := forwarded{Port: port}
	buffer := make([]byte, 4096)
	for !bytes.Contains(seen.In, []byte("\n")) {
		n, err := stream.Read(buffer)
		seen.In = append(seen.In, buffer[:n]...)
		if err != nil {
			break
		}
	}
	seen.Out = bytes.ToUpper(seen.In)
	stream.Write(seen.Out)
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.forwarded = append(p.forwarded, seen)
	return nil
}

func (p *pod) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const idle = time.Minute
	if strings.HasSuffix(r.URL.Path, "/portforward") {
		options, err := portforward.NewV4Options(r)
		check(err)
		portforward.ServePortForward(w, r, p, "pod", "uid", options, idle, idle, []string{"portforward.k8s.io"})
		return
	}
	query := r.URL.Query()
	set := func(name string) bool { return query.Get(name) == "true" || query.Get(name) == "1" }
	options := &remotecommand.Options{Stdin: set("stdin"), Stdout: set("stdout"), Stderr: set("stderr"), TTY: set("tty")}
	protocols := []string{"v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"}
	remotecommand.ServeExec(w, r, p, "pod", "uid", "container", nil, options, idle, idle, protocols)
}

// The API server's part: it passes on, translates v5 to SPDY, and takes SPDY out of WebSockets.
func apiServer(kubelet *url.URL) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		location := *kubelet
		// As the API server asks a kubelet.
		location.Path, location.RawQuery = r.URL.Path, strings.ReplaceAll(r.URL.RawQuery, "ports=", "port=")
		offered := r.Header.Get("Sec-WebSocket-Protocol")
		handler := http.Handler(proxy.NewUpgradeAwareHandler(&location, nil, false, true, responder{}))
		if strings.Contains(offered, "v5.channel") {
			query := r.URL.Query()
			options := apiproxy.Options{Stdin: query.Has("stdin"), Stdout: true, Stderr: query.Has("stderr"), Tty: query.Has("tty")}
			handler = apiproxy.NewStreamTranslatorHandler(&location, nil, 0, options)
		} else if strings.Contains(offered, "SPDY/3.1+") {
			handler = apiproxy.NewTunnelingHandler(handler)
		}
		handler.ServeHTTP(w, r)
	})
}

type responder struct{}

func (responder) Error(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusBadGateway)
}

type sizes struct{ left []clientcommand.TerminalSize }

func (s *sizes) Next() *clientcommand.TerminalSize {
	if len(s.left) == 0 {
		return nil
	}
	size := s.left[0]
	s.left = s.left[1:]
	return &size
}

// Runs one client against new servers and writes what passed.
func capture(folder, name, subresource, query string, client func(target *url.URL, config *rest.Config)) {
	p := &pod{lanes: map[string][]byte{}}
	kubelet := httptest.NewServer(p)
	defer kubelet.Close()
	kubeletURL, err := url.Parse(kubelet.URL)
	check(err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	record := &recorder{Listener: listener}
	server := &http.Server{Handler: apiServer(kubeletURL)}
	go server.Serve(record)
	defer server.Close()
	target := &url.URL{Scheme: "http", Host: listener.Addr().String(), Path: "/api/v1/namespaces/n/pods/p/" + subresource, RawQuery: query}
	client(target, &rest.Config{Host: target.Host})
	pieces, header := record.upgraded()
	said := conversation{Subresource: subresource, Query: query, Upgrade: header.Get("Upgrade"),
		Subprotocol: header.Get("Sec-WebSocket-Protocol"), Pieces: pieces}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if subresource == "exec" {
		code := exitCode
		said.Lanes, said.ExitCode = p.lanes, &code
		if !strings.Contains(said.Subprotocol+header.Get("X-Stream-Protocol-Version"), "v4") && !strings.Contains(said.Subprotocol, "v5") {
			said.ExitCode = nil
		}
	}
	said.Forwarded = p.forwarded
	sort.Slice(said.Forwarded, func(i, j int) bool { return bytes.Compare(said.Forwarded[i].In, said.Forwarded[j].In) < 0 })
	out, err := json.MarshalIndent(said, "", " ")
	check(err)
	check(os.WriteFile(filepath.Join(folder, name+".json"), append(out, '\n'), 0o644))
}

func stream(executor clientcommand.Executor, err error, tty bool) {
	check(err)
	options := clientcommand.StreamOptions{Stdin: input(tty), Stdout: io.Discard, Tty: tty}
	if tty {
		options.TerminalSizeQueue = &sizes{[]clientcommand.TerminalSize{{Width: 120, Height: 40}}}
	} else {
		options.Stderr = io.Discard
	}
	err = executor.StreamWithContext(context.Background(), options)
	var exited exec.CodeExitError
	if !errors.As(err, &exited) || exited.Code != exitCode {
		log.Fatalf("exec ended with %v", err)
	}
}

func input(tty bool) io.Reader {
	if tty {
		return strings.NewReader("ls -l\rexit\r")
	}
	return strings.NewReader("first line\n" + strings.Repeat("a longer one that is repeated \u00e9\n", 40) + "last without end")
}

func forward(dialer func(*url.URL, *rest.Config) (*clientforward.PortForwarder, chan struct{}, chan struct{}), target *url.URL, config *rest.Config) {
	forwarder, stop, ready := dialer(target, config)
	done := make(chan error, 1)
	go func() { done <- forwarder.ForwardPorts() }()
	<-ready
	ports, err := forwarder.GetPorts()
	check(err)
	for number, line := range []string{"one\n", "two two\n", "three\n"} {
		connection, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[number%len(ports)].Local))
		check(err)
		_, err = connection.Write([]byte(line))
		check(err)
		_, err = io.ReadAll(connection)
		check(err)
		connection.Close()
	}
	close(stop)
	check(<-done)
}

// A WebSocket client that writes frames itself, as those did that knew only channels.
func channels(target *url.URL, subprotocol string, messages [][]byte, text bool, until func([]byte) bool) {
	dialer := gorilla.Dialer{Subprotocols: []string{subprotocol}}
	location := *target
	location.Scheme = "ws"
	connection, _, err := dialer.Dial(location.String(), nil)
	check(err)
	defer connection.Close()
	kind := gorilla.BinaryMessage
	if text {
		kind = gorilla.TextMessage
	}
	check(connection.WriteControl(gorilla.PingMessage, []byte("are you there"), time.Now().Add(time.Second)))
	for _, message := range messages {
		check(connection.WriteMessage(kind, message))
	}
	for {
		_, message, err := connection.ReadMessage()
		if err != nil || until(message) {
			return
		}
	}
}

func main() {
	folder := os.Args[1]
	check(os.MkdirAll(folder, 0o755))
	bodies(os.Args[2])
	const plain, terminal = "command=x&stdin=true&stdout=true&stderr=true", "command=x&stdin=true&stdout=true&tty=true"
	capture(folder, "exec-spdy", "exec", plain, func(target *url.URL, config *rest.Config) {
		executor, err := clientcommand.NewSPDYExecutor(config, "POST", target)
		stream(executor, err, false)
	})
	capture(folder, "exec-spdy-terminal", "exec", terminal, func(target *url.URL, config *rest.Config) {
		executor, err := clientcommand.NewSPDYExecutor(config, "POST", target)
		stream(executor, err, true)
	})
	capture(folder, "exec-websocket-v5", "exec", plain, func(target *url.URL, config *rest.Config) {
		executor, err := clientcommand.NewWebSocketExecutor(config, "GET", target.String())
		stream(executor, err, false)
	})
	capture(folder, "exec-websocket-v5-terminal", "exec", terminal, func(target *url.URL, config *rest.Config) {
		executor, err := clientcommand.NewWebSocketExecutor(config, "GET", target.String())
		stream(executor, err, true)
	})
	// Without half-close a process that reads to the end of its input never sees one: these have a terminal.
	status := func(first byte) func([]byte) bool {
		return func(message []byte) bool { return len(message) > 1 && message[0] == first }
	}
	lines := []string{"\x04{\"Width\":80,\"Height\":24}", "\x00echo \u00e9", "\x00", "\x00xit or exit\n"}
	for _, protocol := range []string{"channel.k8s.io", "v4.channel.k8s.io", "base64.channel.k8s.io", "v4.base64.channel.k8s.io"} {
		coded := strings.Contains(protocol, "base64")
		var messages [][]byte
		for _, line := range lines {
			message := []byte(line)
			if coded {
				message = append([]byte{'0' + line[0]}, base64.StdEncoding.EncodeToString([]byte(line[1:]))...)
			}
			messages = append(messages, message)
		}
		last := status(3)
		if coded {
			last = status('3')
		}
		capture(folder, "exec-websocket-"+strings.ReplaceAll(protocol, ".", "-"), "exec", terminal, func(target *url.URL, _ *rest.Config) {
			channels(target, protocol, messages, coded, last)
		})
	}
	forwarder := func(target *url.URL, config *rest.Config, tunnel bool) (*clientforward.PortForwarder, chan struct{}, chan struct{}) {
		stop, ready := make(chan struct{}), make(chan struct{})
		transport, upgrader, err := clientspdy.RoundTripperFor(config)
		check(err)
		dialer := clientspdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", target)
		if tunnel {
			dialer, err = clientforward.NewSPDYOverWebsocketDialer(target, config)
			check(err)
		}
		forwarder, err := clientforward.New(dialer, []string{"0:8080", "0:443"}, stop, ready, io.Discard, io.Discard)
		check(err)
		return forwarder, stop, ready
	}
	for name, tunnel := range map[string]bool{"portforward-spdy": false, "portforward-tunnel": true} {
		capture(folder, name, "portforward", "", func(target *url.URL, config *rest.Config) {
			forward(func(target *url.URL, config *rest.Config) (*clientforward.PortForwarder, chan struct{}, chan struct{}) {
				return forwarder(target, config, tunnel)
			}, target, config)
		})
	}
	capture(folder, "portforward-websocket-v4", "portforward", "ports=8080&ports=443", func(target *url.URL, _ *rest.Config) {
		answers := 0
		channels(target, "v4.channel.k8s.io", [][]byte{[]byte("\x00one\n"), []byte("\x02two two\n")}, false, func(message []byte) bool {
			if len(message) > 3 {
				answers++
			}
			return answers == 2
		})
	})
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
