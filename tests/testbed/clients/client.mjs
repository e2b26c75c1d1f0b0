// What a program does with the API by the JavaScript client, each thing once; prints what came of it, without what
// differs from run to run. The same steps as `main.go` and `client.py`. With namespace and name alone it only reads.

import { createHash } from "node:crypto";
import { once } from "node:events";
import { appendFileSync, mkdirSync, writeFileSync } from "node:fs";
import { setTimeout as pause } from "node:timers/promises";
import { PassThrough, Readable, Writable } from "node:stream";

const k8s = await import(`${process.env.NODE_PACKAGES}/@kubernetes/client-node/dist/index.js`);

const [namespace, name, port, bytes] = process.argv.slice(2).map((word, at) => (at < 2 ? word : Number(word)));
const pod = "target";
// No command line has it.
const canary = ["canary", name, "4711"].join("-");

const config = new k8s.KubeConfig();
config.loadFromCluster();
const core = config.makeApiClient(k8s.CoreV1Api);

const say = (step, result) => console.log(`${step}: ${JSON.stringify(result)}`);
const sha256 = (text) => createHash("sha256").update(text).digest("hex");
const sorted = (data) => Object.entries(data).sort();

// What a watch tells differs from run to run; the record must have it.
const writeDown = (resource, type, { metadata }) =>
  appendFileSync(`/tmp/told-${name}-${resource}`, `${type} ${metadata.name} ${metadata.resourceVersion}\n`);

const configMap = (number) => ({
  metadata: { name: `${name}-${number}`, labels: { client: name } },
  data: { value: `visible-${name}-${number}` },
});

const patch = (strategy, body, call = "patchNamespacedConfigMap", object = `${name}-1`, more = {}) =>
  core[call](
    { name: object, namespace, body, ...more },
    k8s.setHeaderOptions("Content-Type", k8s.PatchStrategy[strategy]),
  );

async function reads() {
  say("get", (await core.readNamespacedConfigMap({ name: `${name}-1`, namespace })).data);
  const listed = await core.listNamespacedConfigMap({ namespace, labelSelector: `client=${name}` });
  say("list", listed.items.map((item) => item.metadata.name));
}

async function objects() {
  for (let number = 1; number <= 5; number++) {
    say("create", (await core.createNamespacedConfigMap({ namespace, body: configMap(number) })).data);
  }
  try {
    await core.createNamespacedConfigMap({ namespace, body: configMap(1) });
  } catch (error) {
    say("create again", [error.code, JSON.parse(error.body).reason]);
  }
  say("get", (await core.readNamespacedConfigMap({ name: `${name}-1`, namespace })).data);
  const pages = [];
  let [more, version] = [undefined, undefined];
  do {
    const selector = { namespace, labelSelector: `client=${name}`, limit: 2, _continue: more };
    const page = await core.listNamespacedConfigMap(selector);
    pages.push(page.items.map((item) => item.metadata.name));
    more = page.metadata._continue;
    version ??= page.metadata.resourceVersion;
  } while (more);
  say("list", pages);
  const json = await patch("JsonPatch", [{ op: "add", path: "/data/json", value: "1" }]);
  say("json patch", sorted(json.data));
  say("merge patch", sorted((await patch("MergePatch", { data: { merge: "2" } })).data));
  say("strategic patch", sorted((await patch("StrategicMergePatch", { data: { strategic: "3" } })).data));
  const applied = { apiVersion: "v1", kind: "ConfigMap", metadata: { name: `${name}-1` }, data: { applied: "4" } };
  const fields = [undefined, undefined, { fieldManager: name }];
  say("apply", sorted((await patch("ServerSideApply", applied, ...fields)).data));
  say("delete", (await core.deleteNamespacedConfigMap({ name: `${name}-1`, namespace })).status);
  const seen = [];
  await new Promise((resolve, reject) => {
    const selector = { labelSelector: `client=${name}`, resourceVersion: version };
    const watching = new k8s.Watch(config).watch(
      `/api/v1/namespaces/${namespace}/configmaps`,
      selector,
      (type, object) => {
        writeDown("configmaps", type, object);
        seen.push([type, object.metadata.name, sorted(object.data)]);
        if (type === "DELETED") watching.then((controller) => controller.abort()).then(resolve);
      },
      (error) => (error?.name === "AbortError" ? resolve() : reject(error)),
    );
  });
  say("watch", seen);
}

async function secrets() {
  const body = { metadata: { name, labels: { client: name } }, stringData: { password: canary } };
  say("create secret", (await core.createNamespacedSecret({ namespace, body })).data.password.length);
  say("get secret", (await core.readNamespacedSecret({ name, namespace })).data.password.length);
  const listed = await core.listNamespacedSecret({ namespace, labelSelector: `client=${name}` });
  say("list secrets", listed.items.map((item) => item.metadata.name));
  const secret = ["patchNamespacedSecret", name];
  await patch("MergePatch", { stringData: { merge: canary } }, ...secret);
  await patch("StrategicMergePatch", { stringData: { strategic: canary } }, ...secret);
  await patch("JsonPatch", [{ op: "add", path: "/stringData", value: { json: canary } }], ...secret);
  const applied = { apiVersion: "v1", kind: "Secret", metadata: { name }, stringData: { applied: canary } };
  const result = await patch("ServerSideApply", applied, ...secret, { fieldManager: name });
  say("apply secret", Object.keys(result.data).sort());
  // The informer: a list and a watch behind it.
  const list = () => core.listNamespacedSecret({ namespace, labelSelector: `client=${name}` });
  const path = `/api/v1/namespaces/${namespace}/secrets`;
  const informer = k8s.makeInformer(config, path, list, `client=${name}`);
  const added = new Promise((resolve) => informer.on("add", resolve));
  await informer.start();
  say("informer", Object.keys((await added).data).sort());
  await informer.stop();
}

function sink() {
  const parts = [];
  const stream = new Writable({
    write(part, _, done) {
      parts.push(part);
      stream.emit("part");
      done();
    },
  });
  stream.text = () => Buffer.concat(parts).toString();
  return stream;
}

const exitCode = (status) =>
  status.status === "Success" ? 0 : Number(status.details.causes.find((cause) => cause.reason === "ExitCode").message);

async function run(command, stdin = null, tty = false) {
  const [out, err] = [sink(), sink()];
  let told;
  const status = new Promise((resolve) => (told = resolve));
  const exec = new k8s.Exec(config);
  const connection = await exec.exec(namespace, pod, name, command, out, tty ? null : err, stdin, tty, told);
  connection.onerror = (error) => say("error", error.message);
  const closed = new Promise((resolve) => (connection.onclose = resolve));
  const finish = async () => {
    const code = exitCode(await status);
    await closed;
    return [out.text(), err.text(), code];
  };
  return { out, finish };
}

const ran = async (...more) => (await run(...more)).finish();

async function streams() {
  say("exec", await ran(["sh", "-c", "echo out; echo err >&2; exit 3", "two words"]));
  say("exec with stdin", await ran(["sh", "-c", "cat; exit 4"], Readable.from([Buffer.from("typed\n")])));
  const keyboard = new PassThrough();
  const terminal = await run(["sh", "-c", "test -t 0 && echo a terminal; read it; exit 5"], keyboard, true);
  while (!terminal.out.text().includes("a terminal")) await once(terminal.out, "part");
  keyboard.write("typed\n");
  const [shown, , code] = await terminal.finish();
  say("exec with a terminal", [shown.includes("a terminal"), shown.includes("typed"), code]);
  const text = "0123456789abcde\n".repeat(bytes / 16 + 1).slice(0, bytes);
  const pieces = [];
  for (let begin = 0; begin < bytes; begin += 65536) pieces.push(Buffer.from(text.slice(begin, begin + 65536)));
  const into = await ran(["sha256sum"], Readable.from(pieces));
  say("bytes in", [into[0].split(" ")[0] === sha256(text), sha256(text), into[2]]);
  const from = await ran(["sh", "-c", `yes 0123456789abcde | head -c ${bytes}`]);
  say("bytes out", [sha256(from[0]) === sha256(text), sha256(text), from[2]]);
  const [answers, questions] = [sink(), new PassThrough()];
  const forward = await new k8s.PortForward(config).portForward(namespace, pod, [port], answers, null, questions);
  // How long a forwarded port lies idle before it is used.
  await pause(1000 * Number(process.env.IDLE ?? 0));
  questions.write(`ping-${name}\n`);
  while (!answers.text().includes("\n")) await once(answers, "part");
  say("port-forward", answers.text());
  forward.close();
}

async function until(what, is) {
  for (let count = 0; count < 600; count++) {
    if (await is()) return;
    await pause(100);
  }
  throw new Error(`timed out waiting for ${what}`);
}

async function copies() {
  const there = `/tmp/${name}/there`;
  mkdirSync(there, { recursive: true });
  const text = "0123456789abcde\n".repeat(10_000);
  writeFileSync(`${there}/${name}.txt`, text);
  const copy = new k8s.Cp(config);
  // It does not say when it is done. The other way, this version asks for gzip and does not unpack it.
  await copy.cpToPod(namespace, pod, name, there, "/tmp");
  const digest = sha256(text);
  await until("the copy in the pod", async () => (await ran(["sha256sum", `/tmp/${name}.txt`]))[0].startsWith(digest));
  say("cp", true);
}

async function logsAndAttach() {
  const lines = sink();
  const ended = once(lines, "finish");
  await new k8s.Log(config).log(namespace, pod, name, lines, { follow: true });
  while (!lines.text().includes("begins")) await once(lines, "part");
  const [out, keyboard] = [sink(), new PassThrough()];
  const attached = await new k8s.Attach(config).attach(namespace, pod, name, out, null, keyboard, false);
  const closed = new Promise((resolve) => (attached.onclose = resolve));
  keyboard.write("one\n");
  while (!out.text().includes("got one\n")) await once(out, "part");
  say("attach", out.text());
  // What a container says at its end may come too late for whoever is attached.
  keyboard.write("quit\n");
  await closed;
  await ended;
  say("logs -f", lines.text());
}

if (port === undefined) {
  await reads();
  process.exit(0);
}
await objects();
await secrets();
await streams();
await copies();
await logsAndAttach();
process.exit(0);
