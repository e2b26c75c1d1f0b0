"""What a program does with the API by the Python client, each thing once; prints what came of it, without what differs
from run to run. The same steps as `main.go` and `client.mjs`."""

import hashlib
import json
import os
import sys
import threading
import time

from kubernetes import client, config, watch
from kubernetes.client.rest import ApiException
from kubernetes.stream import portforward, stream

NAMESPACE, NAME = sys.argv[1:3]
READS_ONLY = len(sys.argv) == 3
PORT, BYTES = (0, 0) if READS_ONLY else map(int, sys.argv[3:5])
POD = "target"
# How long a forwarded port lies idle before it is used.
IDLE_SECONDS = int(os.environ.get("IDLE", "0"))
# No command line has it.
CANARY = "-".join(["canary", NAME, "4711"])

config.load_incluster_config()
core = client.CoreV1Api()


def say(step, result):
    print(f"{step}: {json.dumps(result, sort_keys=True)}", flush=True)


def write_down(resource, event):
    """What a watch tells differs from run to run; the record must have it."""
    metadata = event["object"].metadata
    with open(f"/tmp/told-{NAME}-{resource}", "a") as told:
        print(event["type"], metadata.name, metadata.resource_version, file=told)


def config_map(number):
    metadata = client.V1ObjectMeta(name=f"{NAME}-{number}", labels={"client": NAME})
    return client.V1ConfigMap(metadata=metadata, data={"value": f"visible-{NAME}-{number}"})


def patch(kind, body, call=None, name=f"{NAME}-1", **more):
    api = client.CoreV1Api(client.ApiClient())
    api.api_client.select_header_content_type = lambda *_, **__: f"application/{kind}"
    call = getattr(api, call or "patch_namespaced_config_map")
    return call(name, NAMESPACE, body, **more)


def reads():
    say("get", core.read_namespaced_config_map(f"{NAME}-1", NAMESPACE).data)
    listed = core.list_namespaced_config_map(NAMESPACE, label_selector=f"client={NAME}")
    say("list", [item.metadata.name for item in listed.items])


def objects():
    for number in range(1, 6):
        say("create", core.create_namespaced_config_map(NAMESPACE, config_map(number)).data)
    try:
        core.create_namespaced_config_map(NAMESPACE, config_map(1))
    except ApiException as error:
        say("create again", [error.status, json.loads(error.body)["reason"]])
    say("get", core.read_namespaced_config_map(f"{NAME}-1", NAMESPACE).data)
    pages, more, version = [], None, None
    while more != "":
        page = core.list_namespaced_config_map(NAMESPACE, label_selector=f"client={NAME}", limit=2, _continue=more)
        pages.append([item.metadata.name for item in page.items])
        more, version = page.metadata._continue or "", version or page.metadata.resource_version
    say("list", pages)
    say("json patch", patch("json-patch+json", [{"op": "add", "path": "/data/json", "value": "1"}]).data)
    say("merge patch", patch("merge-patch+json", {"data": {"merge": "2"}}).data)
    say("strategic patch", patch("strategic-merge-patch+json", {"data": {"strategic": "3"}}).data)
    applied = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{NAME}-1"}, "data": {"applied": "4"}}
    say("apply", patch("apply-patch+yaml", applied, field_manager=NAME).data)
    say("delete", core.delete_namespaced_config_map(f"{NAME}-1", NAMESPACE).status)
    seen, watching = [], watch.Watch()
    for event in watching.stream(
        core.list_namespaced_config_map, NAMESPACE, label_selector=f"client={NAME}", resource_version=version
    ):
        write_down("configmaps", event)
        seen.append([event["type"], event["object"].metadata.name, event["object"].data])
        if event["type"] == "DELETED":
            watching.stop()
    say("watch", seen)


def secrets():
    body = {"metadata": {"name": NAME, "labels": {"client": NAME}}, "stringData": {"password": CANARY}}
    say("create secret", len(core.create_namespaced_secret(NAMESPACE, body).data["password"]))
    say("get secret", len(core.read_namespaced_secret(NAME, NAMESPACE).data["password"]))
    listed = core.list_namespaced_secret(NAMESPACE, label_selector=f"client={NAME}").items
    say("list secrets", [item.metadata.name for item in listed])
    secret = "patch_namespaced_secret"
    patch("merge-patch+json", {"stringData": {"merge": CANARY}}, secret, NAME)
    patch("strategic-merge-patch+json", {"stringData": {"strategic": CANARY}}, secret, NAME)
    patch("json-patch+json", [{"op": "add", "path": "/stringData", "value": {"json": CANARY}}], secret, NAME)
    applied = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME}, "stringData": {"applied": CANARY}}
    say("apply secret", sorted(patch("apply-patch+yaml", applied, secret, NAME, field_manager=NAME).data))
    for event in watch.Watch().stream(core.list_namespaced_secret, NAMESPACE, label_selector=f"client={NAME}"):
        write_down("secrets", event)
        say("watch secrets", [event["type"], sorted(event["object"].data)])
        break


def connect(call, **more):
    api = client.CoreV1Api(client.ApiClient())
    return stream(getattr(api, call), POD, NAMESPACE, container=NAME, _preload_content=False, **more)


def collect(streamed, until=None):
    out, err = [], []
    while streamed.is_open():
        streamed.update(timeout=1)
        out.append(streamed.read_stdout(timeout=0))
        err.append(streamed.read_stderr(timeout=0))
        if until and until in "".join(out):
            break
    if not streamed.is_open():
        out.append(streamed.read_stdout(timeout=0))
        err.append(streamed.read_stderr(timeout=0))
    return "".join(out), "".join(err)


def run(command, stdin=None):
    streamed = connect("connect_get_namespaced_pod_exec", command=command, stdin=stdin is not None, stdout=True,
                       stderr=True, tty=False)
    for begin in range(0, len(stdin or ""), 65536):
        streamed.write_stdin(stdin[begin:begin + 65536])
    if stdin is not None:
        streamed.close_channel(0)
    return [*collect(streamed), streamed.returncode]


def streams():
    say("exec", run(["sh", "-c", "echo out; echo err >&2; exit 3", "two words"]))
    say("exec with stdin", run(["sh", "-c", "cat; exit 4"], "typed\n"))
    typed = connect("connect_get_namespaced_pod_exec", command=["sh", "-c", "test -t 0 && echo a terminal; read it; exit 5"],
                    stdin=True, stdout=True, stderr=False, tty=True)
    shown, _ = collect(typed, "a terminal")
    typed.write_stdin("typed\n")
    shown += collect(typed)[0]
    say("exec with a terminal", ["a terminal" in shown, "typed" in shown, typed.returncode])
    text = ("0123456789abcde\n" * (BYTES // 16 + 1))[:BYTES]
    digest = hashlib.sha256(text.encode()).hexdigest()
    out, _, code = run(["sha256sum"], text)
    say("bytes in", [out.split()[0] == digest, digest, code])
    out, _, code = run(["sh", "-c", f"yes 0123456789abcde | head -c {BYTES}"])
    say("bytes out", [hashlib.sha256(out.encode()).hexdigest() == digest, digest, code])
    api = client.CoreV1Api(client.ApiClient())
    forward = portforward(api.connect_get_namespaced_pod_portforward, POD, NAMESPACE, ports=str(PORT))
    socket = forward.socket(PORT)
    time.sleep(IDLE_SECONDS)
    socket.sendall(f"ping-{NAME}\n".encode())
    say("port-forward", socket.recv(100).decode())
    forward.close()


def logs_and_attach():
    lines, opened = [], threading.Event()

    def follow():
        api = client.CoreV1Api(client.ApiClient())
        for line in watch.Watch().stream(api.read_namespaced_pod_log, POD, NAMESPACE, container=NAME):
            lines.append(line)
            opened.set()

    following = threading.Thread(target=follow)
    following.start()
    opened.wait(60)
    attached = connect("connect_get_namespaced_pod_attach", stdin=True, stdout=True, stderr=True, tty=False)
    attached.write_stdin("one\n")
    say("attach", collect(attached, "got one\n")[0])
    # What a container says at its end may come too late for whoever is attached.
    attached.write_stdin("quit\n")
    collect(attached)
    following.join(60)
    say("logs -f", lines)


if READS_ONLY:
    reads()
    sys.exit()
objects()
secrets()
streams()
logs_and_attach()
