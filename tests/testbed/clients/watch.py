"""Watches over WebSocket, as browsers have them: the first event of each is printed, without what differs from run to run.
Arguments: namespace, resource, name; TEXT is what must be in the event: no command line has it."""

import base64
import json
import os
import ssl
import sys

import websocket

NAMESPACE, RESOURCE, NAME = sys.argv[1:4]
TEXT = os.environ["TEXT"]
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
SERVER = "{KUBERNETES_SERVICE_HOST}:{KUBERNETES_SERVICE_PORT}".format(**os.environ)
with open(f"{ACCOUNT}/token") as token:
    AUTHORIZATION = f"Authorization: Bearer {token.read()}"

for accept in ["application/json", "application/cbor", "application/vnd.kubernetes.protobuf"]:
    for subprotocol in [None, "binary.k8s.io"]:
        watching = websocket.create_connection(
            f"wss://{SERVER}/api/v1/namespaces/{NAMESPACE}/{RESOURCE}?watch=1&fieldSelector=metadata.name={NAME}",
            sslopt={"ca_certs": f"{ACCOUNT}/ca.crt", "cert_reqs": ssl.CERT_REQUIRED},
            header=[AUTHORIZATION, f"Accept: {accept}"],
            subprotocols=[subprotocol] if subprotocol else None,
            timeout=60,
        )
        code, event = watching.recv_data()
        there = any(text in event for text in [TEXT.encode(), base64.b64encode(TEXT.encode())])
        what = "bytes"
        if accept == "application/json":
            parsed = json.loads(event)
            metadata = parsed["object"]["metadata"]
            what = f"{parsed['type']} {metadata['name']}"
            # The version differs from run to run; the record must have it, of each of the watches.
            with open(f"/tmp/told-{NAME}-{RESOURCE}", "w") as told:
                print(parsed["type"], metadata["name"], metadata["resourceVersion"], file=told)
        print(f"{RESOURCE} as {accept} in {subprotocol}: frame {code}, {what}, it has the text: {there}", flush=True)
        watching.close()
