# What a person does with kubectl, each thing once; prints what came of it, without what differs from run to run.
# Arguments: kubectl, namespace, name, port, bytes, Python; IDLE is how long a forwarded port, an exec, a log and a watch lie idle
# before they go on.
kubectl=$1 namespace=$2 name=$3 port=$4 bytes=$5 python=$6
folder=${0%/*}
export HOME=/tmp/$name KUBECACHEDIR=/tmp/$name/cache
mkdir -p "$HOME" && cd "$HOME" || exit 1

# What runs beside the rest is started without this function, so that it can be ended.
k() { "$kubectl" -n "$namespace" "$@"; }
# Output, errors and exit code of a step.
step() {
    echo "== $1"
    shift
    "$@" 2>errors
    echo "exit $?"
    cat errors
}
# Waits until a command succeeds.
until_true() {
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || { echo "timed out: $*"; exit 1; }
        sleep 0.1
    done
}
config_map() { printf 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s, labels: {client: %s}}\ndata: {%s}\n' "$1" "$name" "$2"; }
# The canary is in no command line: echo and printf are the shell's own.
canary=canary-$name-4711
secret() { printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: %s, labels: {client: %s}}\nstringData: {%s}\n' "$1" "$name" "$2"; }

for number in 1 2 3 4 5; do config_map "$name-$number" "value: visible-$name-$number" >"$number.yaml"; done
for number in 1 2 3 4 5; do step create k create -f $number.yaml; done
step "create again" k create -f 1.yaml
step get k get configmap "$name-1" -o 'jsonpath={.data}'
step "get a table" k get configmaps -l "client=$name" --no-headers -o custom-columns=N:.metadata.name,V:.data.value
step list k get configmaps -l "client=$name" --chunk-size=2 -o name
"$kubectl" -n "$namespace" get configmaps -l "client=$name" -w -o 'custom-columns=N:.metadata.name,D:.data' --no-headers >watched &
watching=$!
# As a table, which names no version; what it tells differs from run to run, and the record must have it.
told=/tmp/told-$name-configmaps
"$kubectl" -n "$namespace" get configmaps -l "client=$name" -w --output-watch-events --no-headers >"$told" &
telling=$!
until_true grep -q "$name-5" watched
until_true grep -q "$name-5" "$told"
step "json patch" k patch configmap "$name-1" --type json -p '[{"op":"add","path":"/data/json","value":"1"}]'
step "merge patch" k patch configmap "$name-1" --type merge -p '{"data":{"merge":"2"}}'
step "strategic patch" k patch configmap "$name-1" -p '{"data":{"strategic":"3"}}'
config_map "$name-2" "value: applied" >apply.yaml
step apply k apply -f apply.yaml
config_map "$name-3" "served: applied" >server.yaml
step "apply by the server" k apply --server-side --force-conflicts -f server.yaml
step delete k delete configmap "$name-1"
until_true sh -c "[ \$(grep -c '$name-1' watched) -ge 5 ]"
until_true grep -q "^DELETED *$name-1" "$told"
kill $watching $telling
echo "== watch"
cat watched

secret "$name" "password: $canary" >secret.yaml
secret "$name-applied" "password: $canary" >applied.yaml
step "create secret" k create -f secret.yaml
step "apply secret" k apply -f applied.yaml
secret "$name-applied" "password: $canary-2" >applied.yaml
step "apply secret again" k apply -f applied.yaml
secret "$name-served" "password: $canary" >served.yaml
step "apply secret by the server" k apply --server-side -f served.yaml
echo "token=$canary" >literals
step "create secret from a file" k create secret generic "$name-literals" --from-env-file=literals
step "patch secret" k patch secret "$name" --type merge -p "$(printf '{"metadata":{"labels":{"seen":"yes"}}}')"
# What is refused is quoted in the answer: a value of the wrong type, and a template that may not be changed.
printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: %s}\nstringData: {password: {nested: %s}}\n' "$name-typed" "$canary" >typed.yaml
job() { printf 'apiVersion: batch/v1\nkind: Job\nmetadata: {name: %s}\nspec: {suspend: true, template: {spec: {restartPolicy: Never, containers: [{name: c, image: x, env: [{name: DB_PASSWORD, value: %s}]}]}}}\n' "$name" "$1"; }
job "$canary" >job.yaml
step "create a job" k create -f job.yaml
job "$canary-2" >job.yaml
typed=$(k apply --server-side --validate=false -f typed.yaml 2>&1 | grep -c "$canary")
changed=$(k replace --validate=false -f job.yaml 2>&1 | grep "$canary" | grep -c "field is immutable")
echo "quoted: $typed $changed"
echo "== get secrets"
k get secrets -l "client=$name" -o yaml | grep -c "password:"
k get secrets -l "client=$name" --no-headers | wc -l
k get secret "$name" -o 'jsonpath={.data.password}' | wc -c
k describe secret "$name" | grep -c bytes

step exec k exec target -c "$name" -- sh -c 'echo out; echo err >&2; exit 3' 'two words'
step "exec with stdin" sh -c "echo typed | $kubectl -n $namespace exec -i target -c $name -- sh -c 'cat; exit 4'"
echo "== exec with a terminal"
"$python" "$folder/terminal.py" "a terminal" typed "$kubectl" -n "$namespace" exec -it target -c "$name" -- \
    sh -c 'test -t 0 && echo a terminal; read it; exit 5'
yes 0123456789abcde | head -c "$bytes" >bytes
digest=$(sha256sum <bytes | cut -c 1-64)
echo "bytes in: [\"$(k exec -i target -c "$name" -- sha256sum <bytes | cut -c 1-64)\", \"$digest\"]"
echo "bytes out: [\"$(k exec target -c "$name" -- sh -c "yes 0123456789abcde | head -c $bytes" | sha256sum | cut -c 1-64)\", \"$digest\"]"
step "cp there" k cp bytes "target:/tmp/$name-file" -c "$name"
# From a relative path: of an absolute one tar says something, and kubectl may end before that has come.
step "cp back" k cp "target:tmp/$name-file" back -c "$name"
echo "== cp"
cmp bytes back && echo same

"$kubectl" -n "$namespace" exec target -c "$name" -- sh -c "echo before; sleep ${IDLE:-0}; echo after" >idle-exec 2>&1 &
executing=$!
"$kubectl" -n "$namespace" get configmap "$name-5" -w -o 'jsonpath={.metadata.labels.idle}{"\n"}' >idle-watch 2>&1 &
watching=$!
"$kubectl" -n "$namespace" logs -f target -c "$name" >lines &
following=$!
local=$((port + 1000))
"$kubectl" -n "$namespace" port-forward pod/target "$local:$port" >forwarding 2>&1 &
forwarding=$!
until_true grep -q Forwarding forwarding
sleep "${IDLE:-0}"
echo "== port-forward"
# The server of the target serves one connection after the other.
echo "ping-$name" | timeout 60 nc 127.0.0.1 "$local"
kill $forwarding
wait $executing
echo "== exec that lay idle: exit $?"
cat idle-exec
k label configmap "$name-5" idle=over >/dev/null
until_true grep -q over idle-watch
kill $watching
echo "== watch that lay idle"
cat idle-watch

proxied=$((port + 2000))
"$kubectl" -n "$namespace" proxy --port=$proxied >proxying 2>&1 &
proxying=$!
until_true grep -q Starting proxying
echo "== proxy"
wget -qO - "http://127.0.0.1:$proxied/api/v1/namespaces/$namespace/configmaps/$name-4" | grep -o "visible-$name-4" | head -1
kill $proxying

# The keyboard of what is attached to stays open: what is attached without one shows nothing any more. And what a container says
# at its end may come too late for whoever is attached.
if [ "$name" = kubectl ]; then
    mkfifo debug-keyboard
    k debug -i target --image=weir.test/agent:1 --image-pull-policy=Never --container="debug-$name" \
        -- sh -c 'read it; echo "debugged $it"; read it' <debug-keyboard >debugged 2>errors &
    debugging=$!
    # For both: so it does not wait, which the end of another child would break off.
    exec 3<>debug-keyboard
    echo through >&3
    until_true grep -q 'debugged through' debugged
    echo quit >&3
    wait $debugging
    echo "== debug: exit $?"
    grep -o 'debugged through' debugged
    exec 3>&-
fi

until_true grep -q begins lines
mkfifo keyboard
k attach -i target -c "$name" <keyboard >attached 2>errors &
attaching=$!
exec 3<>keyboard
echo one >&3
until_true grep -q 'got one' attached
echo quit >&3
wait $attaching
echo "== attach: exit $?"
head -1 attached
exec 3>&-
wait $following
echo "== logs -f"
cat lines
