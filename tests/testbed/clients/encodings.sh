# What few servers serve and few clients ask for: a custom resource in a table with a column that is masked in the record, tokens
# made and reviewed, watches over WebSocket. Prints what came of it. Arguments: kubectl, namespace, Python.
kubectl=$1 namespace=$2 python=$3
folder=${0%/*}
export HOME=/tmp/encodings KUBECACHEDIR=/tmp/encodings/cache
mkdir -p "$HOME" && cd "$HOME" || exit 1
k() { "$kubectl" -n "$namespace" "$@"; }
# The canaries are in no command line: echo and printf are the shell's own.
canary() { printf 'canary-%s-4711' "$1"; }

printf 'apiVersion: v1\nkind: Secret\nmetadata: {name: watched}\nstringData: {password: %s}\n' "$(canary secret)" | k create -f -
printf 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: watched}\ndata: {value: visible-watched, hidden: %s}\n' "$(canary map)" | k create -f -
printf 'apiVersion: v1\nkind: Pod\nmetadata: {name: watched}\nspec: {schedulerName: none, containers: [{name: c, image: x, env: [{name: DB_PASSWORD, value: %s}]}]}\n' "$(canary variable)" | k create -f -
for resource in secrets:secret configmaps:map pods:variable; do
    TEXT=$(canary "${resource#*:}") "$python" "$folder/watch.py" "$namespace" "${resource%:*}" watched
done

printf 'apiVersion: weir.example/v1\nkind: Thing\nmetadata: {name: one}\nspec: {password: %s}\n' "$(canary column)" | k create -f -
k get things --no-headers
k get things one -o 'jsonpath={.spec.password}{"\n"}'

token=$(k create token default)
echo "a token of $(echo "$token" | tr -cd . | wc -c | tr -d ' ') dots"
printf 'apiVersion: authentication.k8s.io/v1\nkind: TokenReview\nspec: {token: %s}\n' "$token" |
    k create -f - -o 'jsonpath={.status.authenticated} {.status.user.username}{"\n"}'
# For who looks whether the record has it; nobody recorded sees this file.
printf %s "$token" >token
