# What a person does with Helm, whose releases are Secrets that hold everything in gzip and twice in base64.
# Arguments: helm, namespace, name.
helm=$1 namespace=$2 name=$3
folder=${0%/*}
export HOME=/tmp/$name
mkdir -p "$HOME" && cd "$HOME" || exit 1

# Output, errors and exit code of a step, without times.
step() {
    echo "== $1"
    shift
    "$helm" -n "$namespace" "$@" >out 2>&1
    echo "exit $?"
    grep -v 'LAST DEPLOYED\|^NAMESPACE' out
}
# The canary is in no command line: printf is the shell's own.
printf 'password: canary-%s-4711\nvisible: visible-%s-1\n' "$name" "$name" >values.yaml
step install install "$name" "$folder/chart" -f values.yaml
printf 'password: canary-%s-4711\nvisible: visible-%s-2\n' "$name" "$name" >values.yaml
step upgrade upgrade "$name" "$folder/chart" -f values.yaml
step list list --short
step values get values "$name" -o json
echo "== manifest"
"$helm" -n "$namespace" get manifest "$name" | grep -c .
step rollback rollback "$name" 1
"$helm" -n "$namespace" history "$name" -o json | grep -o '"revision":[0-9]*'
step uninstall uninstall "$name" --keep-history
