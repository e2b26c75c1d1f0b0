// What a program does with the API by client-go in protobuf, or in what CONTENT_TYPE says, each thing once; prints what came of it, without what
// differs from run to run. The same steps as `client.py` and `client.mjs`. With namespace and name alone it only reads.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"

	apply "k8s.io/client-go/applyconfigurations/core/v1"
)

const pod = "target"

type program struct {
	context         context.Context
	config          *rest.Config
	client          *kubernetes.Clientset
	namespace, name string
	port, bytes     int
	// No command line has it.
	canary string
}

func main() {
	readsOnly := len(os.Args) == 3
	if !readsOnly && len(os.Args) < 5 {
		panic("arguments: namespace, name, port, bytes; or namespace, name")
	}
	config := must(rest.InClusterConfig())
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	if contentType := os.Getenv("CONTENT_TYPE"); contentType != "" {
		config.ContentType, config.AcceptContentTypes = contentType, contentType
	}
	// What some recorders let themselves be told not to record.
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(request *http.Request) (*http.Response, error) {
			request.Header.Set("Kubectl-Command", "kubectl cp")
			return next.RoundTrip(request)
		})
	})
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	p := &program{
		context: ctx, config: config, client: must(kubernetes.NewForConfig(config)),
		namespace: os.Args[1], name: os.Args[2], canary: strings.Join([]string{"canary", os.Args[2], "4711"}, "-"),
	}
	if readsOnly {
		p.reads()
		return
	}
	p.port, p.bytes = must(strconv.Atoi(os.Args[3])), must(strconv.Atoi(os.Args[4]))
	p.objects()
	p.secrets()
	p.streams()
	p.logsAndAttach()
}

type roundTripper func(*http.Request) (*http.Response, error)

func (ask roundTripper) RoundTrip(request *http.Request) (*http.Response, error) {
	return ask(request)
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func say(step string, result any) {
	fmt.Printf("%s: %s\n", step, must(json.Marshal(result)))
}

func (p *program) object(number int) string {
	return fmt.Sprintf("%s-%d", p.name, number)
}

func (p *program) selector() metav1.ListOptions {
	return metav1.ListOptions{LabelSelector: "client=" + p.name}
}

func (p *program) reads() {
	maps := p.client.CoreV1().ConfigMaps(p.namespace)
	say("get", must(maps.Get(p.context, p.object(1), metav1.GetOptions{})).Data)
	names := []string{}
	for _, item := range must(maps.List(p.context, p.selector())).Items {
		names = append(names, item.Name)
	}
	say("list", names)
}

func (p *program) objects() {
	maps := p.client.CoreV1().ConfigMaps(p.namespace)
	labels := map[string]string{"client": p.name}
	create := func(number int) (*corev1.ConfigMap, error) {
		meta := metav1.ObjectMeta{Name: p.object(number), Labels: labels}
		data := map[string]string{"value": "visible-" + p.object(number)}
		return maps.Create(p.context, &corev1.ConfigMap{ObjectMeta: meta, Data: data}, metav1.CreateOptions{})
	}
	for number := 1; number <= 5; number++ {
		say("create", must(create(number)).Data)
	}
	_, err := create(1)
	say("create again", apierrors.ReasonForError(err))
	say("get", must(maps.Get(p.context, p.object(1), metav1.GetOptions{})).Data)
	options, version := p.selector(), ""
	options.Limit = 2
	for {
		page := must(maps.List(p.context, options))
		names := []string{}
		for _, item := range page.Items {
			names = append(names, item.Name)
		}
		say("list", names)
		if version == "" {
			version = page.ResourceVersion
		}
		if options.Continue = page.Continue; options.Continue == "" {
			break
		}
	}
	patch := func(kind types.PatchType, body string) map[string]string {
		return must(maps.Patch(p.context, p.object(1), kind, []byte(body), metav1.PatchOptions{})).Data
	}
	say("json patch", patch(types.JSONPatchType, `[{"op":"add","path":"/data/json","value":"1"}]`))
	say("merge patch", patch(types.MergePatchType, `{"data":{"merge":"2"}}`))
	say("strategic patch", patch(types.StrategicMergePatchType, `{"data":{"strategic":"3"}}`))
	applied := apply.ConfigMap(p.object(1), p.namespace).WithData(map[string]string{"applied": "4"})
	say("apply", must(maps.Apply(p.context, applied, metav1.ApplyOptions{FieldManager: p.name})).Data)
	check(maps.Delete(p.context, p.object(1), metav1.DeleteOptions{}))
	watched := p.selector()
	watched.ResourceVersion = version
	watching := must(maps.Watch(p.context, watched))
	told := p.told("configmaps")
	for event := range watching.ResultChan() {
		object := event.Object.(*corev1.ConfigMap)
		must(fmt.Fprintln(told, event.Type, object.Name, object.ResourceVersion))
		say("watch", []any{event.Type, object.Name, object.Data})
		if event.Type == "DELETED" {
			watching.Stop()
			break
		}
	}
}

// Where it writes down what a watch tells it, which differs from run to run, and which the record must have.
func (p *program) told(resource string) *os.File {
	return must(os.Create("/tmp/told-" + p.name + "-" + resource))
}

func keys(data map[string][]byte) []string {
	names := []string{}
	for name := range data {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

func (p *program) secrets() {
	secrets := p.client.CoreV1().Secrets(p.namespace)
	meta := metav1.ObjectMeta{Name: p.name, Labels: map[string]string{"client": p.name}}
	secret := &corev1.Secret{ObjectMeta: meta, Data: map[string][]byte{"password": []byte(p.canary)}}
	created := must(secrets.Create(p.context, secret, metav1.CreateOptions{}))
	say("create secret", len(created.Data["password"]))
	created.StringData = map[string]string{"updated": p.canary}
	say("update secret", keys(must(secrets.Update(p.context, created, metav1.UpdateOptions{})).Data))
	say("get secret", len(must(secrets.Get(p.context, p.name, metav1.GetOptions{})).Data["password"]))
	say("list secrets", len(must(secrets.List(p.context, p.selector())).Items))
	body := []byte(`{"stringData":{"patched":"` + p.canary + `"}}`)
	for _, kind := range []types.PatchType{types.MergePatchType, types.StrategicMergePatchType} {
		say("patch secret", keys(must(secrets.Patch(p.context, p.name, kind, body, metav1.PatchOptions{})).Data))
	}
	applied := apply.Secret(p.name, p.namespace).WithStringData(map[string]string{"applied": p.canary})
	result := must(secrets.Apply(p.context, applied, metav1.ApplyOptions{FieldManager: p.name}))
	say("apply secret", keys(result.Data))
	// As every controller does: a list, or a watch that begins with one.
	tweak := informers.WithTweakListOptions(func(options *metav1.ListOptions) { options.LabelSelector = "client=" + p.name })
	factory := informers.NewSharedInformerFactoryWithOptions(p.client, 0, informers.WithNamespace(p.namespace), tweak)
	informer := factory.Core().V1().Secrets().Informer()
	updated := make(chan *corev1.Secret, 16)
	told := p.told("secrets")
	tell := func(event string, secret *corev1.Secret) {
		must(fmt.Fprintln(told, event, secret.Name, secret.ResourceVersion))
	}
	must(informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(object any) { tell("ADDED", object.(*corev1.Secret)) },
		UpdateFunc: func(_, object any) {
			tell("MODIFIED", object.(*corev1.Secret))
			updated <- object.(*corev1.Secret)
		},
	}))
	stop := make(chan struct{})
	factory.Start(stop)
	if !cache.WaitForCacheSync(p.context.Done(), informer.HasSynced) {
		panic("the informer does not sync")
	}
	say("informer", informer.GetStore().ListKeys()[0][len(p.namespace)+1:])
	must(secrets.Patch(p.context, p.name, types.MergePatchType, []byte(`{"metadata":{"labels":{"seen":"yes"}}}`), metav1.PatchOptions{}))
	say("informer told", keys((<-updated).Data))
	close(stop)
	factory.Shutdown()
}

// Over WebSocket, as it is preferred, or over SPDY, as older programs do.
func (p *program) executor(subresource string, options any, spdy bool) remotecommand.Executor {
	request := p.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(p.namespace).Name(pod).SubResource(subresource)
	switch options := options.(type) {
	case *corev1.PodExecOptions:
		request.VersionedParams(options, scheme.ParameterCodec)
	case *corev1.PodAttachOptions:
		request.VersionedParams(options, scheme.ParameterCodec)
	}
	if spdy {
		return must(remotecommand.NewSPDYExecutor(p.config, "POST", request.URL()))
	}
	return must(remotecommand.NewWebSocketExecutor(p.config, "GET", request.URL().String()))
}

func (p *program) run(spdy bool, stdin io.Reader, tty bool, out io.Writer, command ...string) (string, int) {
	options := &corev1.PodExecOptions{Container: p.name, Command: command, Stdin: stdin != nil, Stdout: true, Stderr: !tty, TTY: tty}
	var told bytes.Buffer
	streams := remotecommand.StreamOptions{Stdin: stdin, Stdout: out, Tty: tty}
	if !tty {
		streams.Stderr = &told
	}
	err := p.executor("exec", options, spdy).StreamWithContext(p.context, streams)
	var exit exec.CodeExitError
	if errors.As(err, &exit) {
		return told.String(), exit.Code
	}
	check(err)
	return told.String(), 0
}

// A terminal that is typed into when it shows a text.
type terminal struct {
	text  string
	line  string
	shown bytes.Buffer
	typed io.WriteCloser
	once  sync.Once
}

func (t *terminal) Write(piece []byte) (int, error) {
	t.shown.Write(piece)
	if strings.Contains(t.shown.String(), t.text) {
		t.once.Do(func() { go func() { _, _ = t.typed.Write([]byte(t.line)) }() })
	}
	return len(piece), nil
}

func (p *program) streams() {
	text := bytes.Repeat([]byte("0123456789abcde\n"), p.bytes/16+1)[:p.bytes]
	sum := sha256.Sum256(text)
	digest := hex.EncodeToString(sum[:])
	for _, spdy := range []bool{false, true} {
		var out bytes.Buffer
		told, code := p.run(spdy, nil, false, &out, "sh", "-c", "echo out; echo err >&2; exit 3", "two words")
		say("exec", []any{out.String(), told, code})
		out.Reset()
		_, code = p.run(spdy, strings.NewReader("typed\n"), false, &out, "sh", "-c", "cat; exit 4")
		say("exec with stdin", []any{out.String(), code})
		keyboard, typed := io.Pipe()
		screen := &terminal{text: "a terminal", line: "typed\n", typed: typed}
		_, code = p.run(spdy, keyboard, true, screen, "sh", "-c", "test -t 0 && echo a terminal; read it; exit 5")
		shown := screen.shown.String()
		say("exec with a terminal", []any{strings.Contains(shown, "a terminal"), strings.Contains(shown, "typed"), code})
		out.Reset()
		_, code = p.run(spdy, bytes.NewReader(text), false, &out, "sha256sum")
		say("bytes in", []any{strings.HasPrefix(out.String(), digest), digest, code})
		hash := sha256.New()
		_, code = p.run(spdy, nil, false, hash, "sh", "-c", fmt.Sprintf("yes 0123456789abcde | head -c %d", p.bytes))
		say("bytes out", []any{hex.EncodeToString(hash.Sum(nil)) == digest, digest, code})
	}
	p.forward()
}

func (p *program) forward() {
	url := p.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(p.namespace).Name(pod).SubResource("portforward").URL()
	dialer := must(portforward.NewSPDYOverWebsocketDialer(url, p.config))
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder := must(portforward.New(dialer, []string{fmt.Sprintf("0:%d", p.port)}, stop, ready, io.Discard, io.Discard))
	ended := make(chan error)
	go func() { ended <- forwarder.ForwardPorts() }()
	<-ready
	// How long a forwarded port lies idle before it is used.
	idle, _ := strconv.Atoi(os.Getenv("IDLE"))
	time.Sleep(time.Duration(idle) * time.Second)
	ports := must(forwarder.GetPorts())
	connection := must(net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local)))
	must(fmt.Fprintf(connection, "ping-%s\n", p.name))
	answer := make([]byte, 100)
	count := must(connection.Read(answer))
	say("port-forward", string(answer[:count]))
	check(connection.Close())
	close(stop)
	check(<-ended)
}

func (p *program) logsAndAttach() {
	options := &corev1.PodLogOptions{Container: p.name, Follow: true}
	logs := must(p.client.CoreV1().Pods(p.namespace).GetLogs(pod, options).Stream(p.context))
	begin := make([]byte, len("begins\n"))
	must(io.ReadFull(logs, begin))
	attach := &corev1.PodAttachOptions{Container: p.name, Stdin: true, Stdout: true, Stderr: true}
	// The keyboard stays open: what is attached without one shows nothing any more.
	// What a container says at its end may come too late for whoever is attached.
	keyboard, typed := io.Pipe()
	screen := &terminal{text: "got one", line: "quit\n", typed: typed}
	go func() { _, _ = typed.Write([]byte("one\n")) }()
	streams := remotecommand.StreamOptions{Stdin: keyboard, Stdout: screen, Stderr: io.Discard}
	check(p.executor("attach", attach, false).StreamWithContext(p.context, streams))
	say("attach", strings.SplitAfter(screen.shown.String(), "\n")[0])
	say("logs -f", string(begin)+string(must(io.ReadAll(logs))))
}
