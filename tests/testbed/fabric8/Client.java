// What a program does with the API by fabric8's client, each thing once; prints what came of it, without what differs from
// run to run. The same steps as those in `tests/testbed/clients`.

import io.fabric8.kubernetes.api.model.ConfigMap;
import io.fabric8.kubernetes.api.model.ConfigMapBuilder;
import io.fabric8.kubernetes.api.model.ListOptionsBuilder;
import io.fabric8.kubernetes.api.model.Secret;
import io.fabric8.kubernetes.api.model.SecretBuilder;
import io.fabric8.kubernetes.client.KubernetesClient;
import io.fabric8.kubernetes.client.KubernetesClientBuilder;
import io.fabric8.kubernetes.client.KubernetesClientException;
import io.fabric8.kubernetes.client.LocalPortForward;
import io.fabric8.kubernetes.client.Watch;
import io.fabric8.kubernetes.client.Watcher;
import io.fabric8.kubernetes.client.WatcherException;
import io.fabric8.kubernetes.client.dsl.ContainerResource;
import io.fabric8.kubernetes.client.dsl.ExecWatch;
import io.fabric8.kubernetes.client.dsl.LogWatch;
import io.fabric8.kubernetes.client.dsl.Resource;
import io.fabric8.kubernetes.client.dsl.base.PatchContext;
import io.fabric8.kubernetes.client.dsl.base.PatchType;
import io.fabric8.kubernetes.client.informers.SharedIndexInformer;
import io.vertx.core.http.HttpClosedException;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;

public final class Client {
    private final KubernetesClient client;
    private final String namespace;
    private final String name;
    private final int port;
    private final int bytes;
    // No command line has it.
    private final String canary;

    private Client(KubernetesClient client, String[] words) {
        this.client = client;
        namespace = words[0];
        name = words[1];
        port = Integer.parseInt(words[2]);
        bytes = Integer.parseInt(words[3]);
        canary = String.join("-", "canary", name, "4711");
    }

    public static void main(String[] words) throws Exception {
        try (KubernetesClient client = new KubernetesClientBuilder().build()) {
            Client program = new Client(client, words);
            program.objects();
            program.secrets();
            program.streams();
            program.copies();
            program.logsAndAttach();
        }
        System.exit(0);
    }

    private static void say(String step, Object result) {
        System.out.println(step + ": " + result);
    }

    private static Map<String, String> sorted(ConfigMap object) {
        return new TreeMap<>(object.getData());
    }

    private Resource<ConfigMap> map(int number) {
        return client.configMaps().inNamespace(namespace).withName(name + "-" + number);
    }

    private ConfigMap object(int number) {
        return new ConfigMapBuilder().withNewMetadata().withName(name + "-" + number).withNamespace(namespace)
            .addToLabels("client", name).endMetadata().addToData("value", "visible-" + name + "-" + number).build();
    }

    private void objects() throws Exception {
        for (int number = 1; number <= 5; number++) {
            say("create", sorted(client.resource(object(number)).create()));
        }
        try {
            client.resource(object(1)).create();
        } catch (KubernetesClientException error) {
            say("create again", error.getCode() + " " + error.getStatus().getReason());
        }
        say("get", sorted(map(1).get()));
        String more = null;
        String version = null;
        do {
            var page = client.configMaps().inNamespace(namespace).withLabel("client", name)
                .list(new ListOptionsBuilder().withLimit(2L).withContinue(more).build());
            say("list", page.getItems().stream().map(item -> item.getMetadata().getName()).toList());
            more = page.getMetadata().getContinue();
            version = version == null ? page.getMetadata().getResourceVersion() : version;
        } while (more != null && !more.isEmpty());
        say("json patch", sorted(map(1).patch(PatchContext.of(PatchType.JSON),
            "[{\"op\":\"add\",\"path\":\"/data/json\",\"value\":\"1\"}]")));
        say("merge patch", sorted(map(1).patch(PatchContext.of(PatchType.JSON_MERGE), "{\"data\":{\"merge\":\"2\"}}")));
        say("strategic patch", sorted(map(1).patch(PatchContext.of(PatchType.STRATEGIC_MERGE),
            "{\"data\":{\"strategic\":\"3\"}}")));
        ConfigMap applied = new ConfigMapBuilder().withNewMetadata().withName(name + "-1").withNamespace(namespace)
            .endMetadata().addToData("applied", "4").build();
        say("apply", sorted(client.resource(applied).fieldManager(name).serverSideApply()));
        say("delete", map(1).delete().size());
        CountDownLatch deleted = new CountDownLatch(1);
        List<String> seen = new ArrayList<>();
        // Differs from run to run; the record must have it.
        StringBuilder told = new StringBuilder();
        Watcher<ConfigMap> watcher = new Watcher<>() {
            @Override
            public void eventReceived(Action action, ConfigMap object) {
                told.append(action + " " + object.getMetadata().getName() + " " + object.getMetadata().getResourceVersion() + "\n");
                seen.add(action + " " + object.getMetadata().getName() + " " + sorted(object));
                if (action == Action.DELETED) {
                    deleted.countDown();
                }
            }

            @Override
            public void onClose(WatcherException cause) {
                seen.add("closed: " + cause);
                deleted.countDown();
            }
        };
        Watch watch = client.configMaps().inNamespace(namespace).withLabel("client", name)
            .watch(new ListOptionsBuilder().withResourceVersion(version).build(), watcher);
        deleted.await(60, TimeUnit.SECONDS);
        say("watch", List.copyOf(seen));
        Files.writeString(Path.of("/tmp/told-" + name + "-configmaps"), told);
        watch.close();
    }

    private void secrets() throws Exception {
        Secret secret = new SecretBuilder().withNewMetadata().withName(name).withNamespace(namespace)
            .addToLabels("client", name).endMetadata().addToStringData("password", canary).build();
        say("create secret", client.resource(secret).create().getData().get("password").length());
        Resource<Secret> resource = client.secrets().inNamespace(namespace).withName(name);
        say("get secret", resource.get().getData().get("password").length());
        var secrets = client.secrets().inNamespace(namespace).withLabel("client", name);
        say("list secrets", secrets.list().getItems().size());
        for (PatchType kind : List.of(PatchType.JSON_MERGE, PatchType.STRATEGIC_MERGE)) {
            resource.patch(PatchContext.of(kind), "{\"stringData\":{\"" + kind + "\":\"" + canary + "\"}}");
        }
        Secret applied = new SecretBuilder().withNewMetadata().withName(name).withNamespace(namespace).endMetadata()
            .addToStringData("applied", canary).build();
        say("apply secret", new TreeMap<>(client.resource(applied).fieldManager(name).serverSideApply().getData()).keySet());
        // As controllers do: a list and a watch behind it.
        SharedIndexInformer<Secret> informer = secrets.inform();
        say("informer", informer.getStore().list().get(0).getData().size());
        informer.close();
    }

    private ContainerResource container() {
        return client.pods().inNamespace(namespace).withName("target").inContainer(name);
    }

    private record Ran(String out, String err, int code) {}

    private Ran run(byte[] stdin, String... command) throws Exception {
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        ByteArrayOutputStream err = new ByteArrayOutputStream();
        var executable = stdin == null ? container().writingOutput(out) : container().redirectingInput().writingOutput(out);
        try (ExecWatch watch = executable.writingError(err).exec(command)) {
            if (stdin != null) {
                watch.getInput().write(stdin);
                watch.getInput().flush();
            }
            int code = watch.exitCode().get(120, TimeUnit.SECONDS);
            return new Ran(out.toString(), err.toString(), code);
        }
    }

    // What a terminal shows; it is typed into when it shows something.
    private static final class Screen extends ByteArrayOutputStream {
        private final CountDownLatch shown = new CountDownLatch(1);
        private final String text;

        private Screen(String text) {
            this.text = text;
        }

        @Override
        public synchronized void write(byte[] piece, int begin, int length) {
            super.write(piece, begin, length);
            if (toString().contains(text)) {
                shown.countDown();
            }
        }
    }

    private static String sha256(byte[] text) throws Exception {
        return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(text));
    }

    private interface Step<T> {
        T run() throws Exception;
    }

    // vert.x tells that a connection is closed at once, and what was read before only as fast as it is used. An API server closes
    // right behind its last word: when 16 to 23 frames wait in here by then, the exit status and the Close frame among them,
    // fabric8 takes a session for broken of which all has arrived. It does so without Weir, and without Kubernetes. Such a
    // step is done again; that all was sent is on record, for each time. Other errors are no such thing.
    private static <T> T untilHeard(Step<T> step) throws Exception {
        for (int attempt = 1;; attempt++) {
            try {
                return step.run();
            } catch (ExecutionException | IOException error) {
                Throwable cause = error;
                while (cause != null && !(cause instanceof HttpClosedException)) {
                    cause = cause.getCause();
                }
                if (cause == null || attempt == 5) {
                    throw error;
                }
            }
        }
    }

    private void streams() throws Exception {
        say("exec", run(null, "sh", "-c", "echo out; echo err >&2; exit 3", "two words"));
        // This client cannot end a process's input.
        say("exec with stdin", run("typed\n".getBytes(), "sh", "-c", "head -c 6; exit 4"));
        Screen screen = new Screen("a terminal");
        try (ExecWatch watch = container().redirectingInput().writingOutput(screen).withTTY()
            .exec("sh", "-c", "test -t 0 && echo a terminal; read it; exit 5")) {
            screen.shown.await(60, TimeUnit.SECONDS);
            watch.getInput().write("typed\n".getBytes());
            watch.getInput().flush();
            int code = watch.exitCode().get(60, TimeUnit.SECONDS);
            String shown = screen.toString();
            say("exec with a terminal", shown.contains("a terminal") + " " + shown.contains("typed") + " " + code);
        }
        byte[] text = "0123456789abcde\n".repeat(bytes / 16 + 1).substring(0, bytes).getBytes(StandardCharsets.US_ASCII);
        String digest = sha256(text);
        Ran into = run(text, "sh", "-c", "head -c " + bytes + " | sha256sum");
        say("bytes in", into.out().startsWith(digest) + " \"" + digest + "\" " + into.code());
        Ran from = untilHeard(() -> run(null, "sh", "-c", "yes 0123456789abcde | head -c " + bytes));
        say("bytes out", sha256(from.out().getBytes()).equals(digest) + " \"" + digest + "\" " + from.code());
        try (LocalPortForward forward = client.pods().inNamespace(namespace).withName("target").portForward(port);
            Socket socket = new Socket("127.0.0.1", forward.getLocalPort())) {
            // How long a forwarded port lies idle before it is used.
            Thread.sleep(1000L * Integer.parseInt(System.getenv().getOrDefault("IDLE", "0")));
            socket.getOutputStream().write(("ping-" + name + "\n").getBytes());
            byte[] answer = new byte[100];
            int count = socket.getInputStream().read(answer);
            say("port-forward", new String(answer, 0, count));
        }
    }

    private void copies() throws Exception {
        byte[] text = "0123456789abcde\n".repeat(10_000).getBytes();
        Path there = Files.createTempFile("there", ".txt");
        Files.write(there, text);
        say("cp there", container().file("/tmp/" + name + ".txt").upload(there));
        say("cp back", sha256(untilHeard(this::copiedBack)).equals(sha256(text)));
    }

    private byte[] copiedBack() throws Exception {
        try (InputStream back = container().file("/tmp/" + name + ".txt").read()) {
            return back.readAllBytes();
        }
    }

    private void logsAndAttach() throws Exception {
        ByteArrayOutputStream lines = new ByteArrayOutputStream();
        CountDownLatch begun = new CountDownLatch(1);
        OutputStream following = new OutputStream() {
            @Override
            public void write(int octet) {
                write(new byte[] {(byte) octet}, 0, 1);
            }

            @Override
            public void write(byte[] piece, int begin, int length) {
                lines.write(piece, begin, length);
                if (lines.toString().contains("begins")) {
                    begun.countDown();
                }
            }
        };
        try (LogWatch logs = container().watchLog(following)) {
            begun.await(60, TimeUnit.SECONDS);
            Screen screen = new Screen("got one\n");
            try (ExecWatch attached = container().redirectingInput().writingOutput(screen).attach()) {
                attached.getInput().write("one\n".getBytes());
                attached.getInput().flush();
                screen.shown.await(60, TimeUnit.SECONDS);
                say("attach", screen.toString().lines().findFirst());
                // What a container says at its end may come too late for whoever is attached.
                attached.getInput().write("quit\n".getBytes());
                attached.getInput().flush();
                attached.exitCode().get(60, TimeUnit.SECONDS);
            }
            for (int count = 0; count < 600 && !lines.toString().contains("ends"); count++) {
                Thread.sleep(100);
            }
            say("logs -f", lines.toString());
        }
    }
}
