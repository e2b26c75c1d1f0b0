// A container runtime's half of NRI, and nothing else: containerd's own library with pods that are made elsewhere.
//
// Usage: nri-runtime SOCKET FOLDER. Each line of standard input is a call to the plugins, as containerd makes it:
//
//	run|start UID NAMESPACE NAME PID CGROUP_PARENT
//
// and each is answered by a line, `ok MICROSECONDS` or `failed WHY`, once every plugin has answered. Calls come one after
// another, as they do in containerd, which holds a lock meanwhile.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
)

func main() {
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(socket, folder string) error {
	// No pods to begin with.
	synchronize := func(ctx context.Context, plugins adaptation.SyncCB) error {
		_, err := plugins(ctx, nil, nil)
		return err
	}
	update := func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
		return nil, nil
	}
	runtime, err := adaptation.New("nri-runtime", "1", synchronize, update,
		adaptation.WithSocketPath(socket), adaptation.WithPluginPath(folder), adaptation.WithPluginConfigPath(folder))
	if err != nil {
		return err
	}
	if err := runtime.Start(); err != nil {
		return err
	}
	defer runtime.Stop()
	fmt.Println("listening")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		started := time.Now()
		if err := call(runtime, strings.Fields(lines.Text())); err != nil {
			fmt.Println("failed", err)
		} else {
			fmt.Println("ok", time.Since(started).Microseconds())
		}
	}
	return lines.Err()
}

func call(runtime *adaptation.Adaptation, words []string) error {
	if len(words) != 6 {
		return fmt.Errorf("%d words instead of 6", len(words))
	}
	pid, err := strconv.ParseUint(words[4], 10, 32)
	if err != nil {
		return err
	}
	pod := &api.PodSandbox{
		Id: words[1], Uid: words[1], Namespace: words[2], Name: words[3], Pid: uint32(pid),
		Linux: &api.LinuxPodSandbox{CgroupParent: words[5]},
	}
	// As containerd does, so that a plugin that has just come is not passed over.
	defer runtime.BlockPluginSync().Unblock()
	switch words[0] {
	case "run":
		return runtime.RunPodSandbox(context.Background(), &api.StateChangeEvent{Pod: pod})
	case "start":
		container := &api.Container{Id: words[1] + "-main", PodSandboxId: words[1], Name: "main"}
		return runtime.StartContainer(context.Background(), &api.StateChangeEvent{Pod: pod, Container: container})
	}
	return fmt.Errorf("no call is named %q", words[0])
}
