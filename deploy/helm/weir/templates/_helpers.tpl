{{/* The name is fixed: a node has one agent, so a cluster has one release, and a second one finds its objects taken. */}}
{{- define "weir.selector" -}}
app.kubernetes.io/name: weir-agent
{{- end }}

{{- define "weir.labels" -}}
{{ include "weir.selector" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "weir.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- with .Values.image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/* What runs once for a cluster, beside the agents. */}}
{{- define "weir.approver.selector" -}}
app.kubernetes.io/name: weir-approver
{{- end }}

{{- define "weir.approver.labels" -}}
{{ include "weir.approver.selector" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* The port that its `--metrics` has where none is given. */}}
{{- define "weir.approver.metricsPort" -}}
9155
{{- end }}

{{/* Whether agents ask the signer of their own cluster for certificates. */}}
{{- define "weir.asksSigner" -}}
{{- $asks := dict }}
{{- range .Values.config.clusters }}
{{- if and .inCluster (hasKey .trust "clusterSigner") }}{{ $_ := set $asks "signer" true }}{{ end }}
{{- end }}
{{- if $asks.signer }}true{{ end }}
{{- end }}

{{/* The signer that they ask. */}}
{{- define "weir.signerName" -}}
{{- $name := "kubernetes.io/kubelet-serving" }}
{{- range .Values.config.clusters }}
{{- if and .inCluster (hasKey .trust "clusterSigner") }}{{ $name = dig "trust" "clusterSigner" "signerName" $name . }}{{ end }}
{{- end }}
{{- $name }}
{{- end }}

{{/* What their certificates may name beside what the cluster publishes itself. */}}
{{- define "weir.signedNames" -}}
{{- $names := list }}
{{- range .Values.config.clusters }}
{{- if and .inCluster (hasKey .trust "clusterSigner") }}
{{- $names = concat $names (.hostNames | default list) }}
{{- range .addresses }}{{ $names = append $names (regexReplaceAll ":[0-9]+$" . "") }}{{ end }}
{{- end }}
{{- end }}
{{- $names | uniq | toJson }}
{{- end }}

{{/* Port of config.metrics.address; empty where nothing is served. */}}
{{- define "weir.metricsPort" -}}
{{- with .Values.config.metrics }}{{ regexFind "[0-9]+$" (.address | default "127.0.0.1:9155") }}{{ end }}
{{- end }}

{{/* Where the kubelet asks whether the agent lives: at that address, or on the loopback of its family where it is every address. */}}
{{- define "weir.metricsHost" -}}
{{- with .Values.config.metrics }}
{{- $host := .address | default "127.0.0.1:9155" | regexFind "^.*:" | trimSuffix ":" | trimPrefix "[" | trimSuffix "]" }}
{{- get (dict "0.0.0.0" "127.0.0.1" "::" "::1") $host | default $host }}
{{- end }}
{{- end }}

{{/* For which namespaces there are bindings, as a list: those of the selector that is given (the second argument), else those that are
     enrolled. A binding has one selector, and `config.enrolment` may have several. What Weir itself and the cluster consist of is in
     none of the latter: its pods could not be made any more, and pods may be enrolled by their own labels in whatever namespace. */}}
{{- define "weir.namespaceSelectors" -}}
{{- $selectors := list }}
{{- if kindIs "map" (index . 1) }}
{{- $selectors = list (include "weir.withoutNulls" (index . 1) | fromJson) }}
{{- else }}
{{- $others := dict "key" "kubernetes.io/metadata.name" "operator" "NotIn" "values" (list (index . 0).Release.Namespace "kube-system" | uniq) }}
{{- range (index . 0).Values.config.enrolment }}
{{- if eq (.mode | default "enforce") "enforce" }}
{{- $expressions := append (.namespaceSelector.matchExpressions | default list) $others }}
{{- $selectors = append $selectors (merge (dict "matchExpressions" $expressions) (omit .namespaceSelector "matchExpressions")) }}
{{- end }}
{{- end }}
{{- end }}
{{- $selectors | uniq | toJson }}
{{- end }}

{{/* A selector without the labels that are null, as which Helm is told that a default is to go; `--set` makes booleans of some. */}}
{{- define "weir.withoutNulls" -}}
{{- $labels := dict }}
{{- range $name, $value := .matchLabels }}
{{- if not (kindIs "invalid" $value) }}{{ $labels = set $labels $name (toString $value) }}{{ end }}
{{- end }}
{{- merge (dict "matchLabels" $labels) (omit . "matchLabels") | toJson }}
{{- end }}

{{/* The name of a policy's binding for a selector. By its place in a list another one would be changed first, and the selector's
     namespaces be without until Helm comes to the next. */}}
{{- define "weir.bindingName" -}}
{{ index . 0 }}-{{ index . 1 | toJson | sha256sum | trunc 8 }}
{{- end }}

{{/* Fails where pods are enrolled in namespaces that a selector for them may not choose: each of its requirements must follow from one of
     each entry's. */}}
{{- define "weir.covers" -}}
{{- $key := index . 1 }}
{{- $selector := include "weir.withoutNulls" (index . 2) | fromJson }}
{{- $spared := list (index . 0).Release.Namespace "kube-system" }}
{{- range $at, $entry := (index . 0).Values.config.enrolment }}
{{- if eq ($entry.mode | default "enforce") "enforce" }}
{{- $missing := list }}
{{- $labels := $entry.namespaceSelector.matchLabels | default dict }}
{{- $expressions := $entry.namespaceSelector.matchExpressions | default list }}
{{- range $name, $value := $selector.matchLabels }}
{{- $same := and (hasKey $labels $name) (eq (get $labels $name | toString) $value) }}
{{- if not (or $same (has (dict "key" $name "operator" "In" "values" (list $value)) $expressions)) }}{{ $missing = append $missing (printf "%s=%s" $name $value) }}{{ end }}
{{- end }}
{{- range $wanted := $selector.matchExpressions }}
{{- $follows := has $wanted $expressions }}
{{- if hasKey $labels $wanted.key }}
{{- $follows = or $follows (eq $wanted.operator "Exists") (and (eq $wanted.operator "In") (has (get $labels $wanted.key) $wanted.values)) }}
{{- end }}
{{- if and (eq $wanted.key "kubernetes.io/metadata.name") (eq $wanted.operator "NotIn") }}
{{- $follows = or $follows (not (without $wanted.values (index $spared 0) (index $spared 1))) }}
{{- end }}
{{- if not $follows }}{{ $missing = append $missing (toJson $wanted) }}{{ end }}
{{- end }}
{{- if $missing }}
{{- fail (printf "%s asks for %s, which config.enrolment[%d] does not, so namespaces would be enrolled without it; leave the selector out (--set %s=null), and it is for the namespaces that are enrolled, or write it as there" $key (join ", " $missing) $at $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* CEL: whether a namespace with the labels `variables.labels` is one whose pods are enrolled. */}}
{{- define "weir.isEnrolledNamespace" -}}
{{- $entries := list }}
{{- range .Values.config.enrolment }}
{{- if eq (.mode | default "enforce") "enforce" }}
{{- $terms := list "true" }}
{{- range $key, $value := .namespaceSelector.matchLabels }}
{{- $terms = append $terms (printf "%s in variables.labels && variables.labels[%s] == %s" (toJson $key) (toJson $key) (toJson $value)) }}
{{- end }}
{{- range .namespaceSelector.matchExpressions }}
{{- $has := printf "%s in variables.labels" (toJson .key) }}
{{- $isOne := printf "%s && variables.labels[%s] in %s" $has (toJson .key) (toJson (.values | default list)) }}
{{- $terms = append $terms (get (dict "In" $isOne "NotIn" (printf "!(%s)" $isOne) "Exists" $has "DoesNotExist" (printf "!(%s)" $has)) .operator) }}
{{- end }}
{{- $entries = append $entries (printf "(%s)" (join " && " (len $terms | eq 1 | ternary $terms (rest $terms)))) }}
{{- end }}
{{- end }}
{{- join " || " ($entries | default (list "false")) }}
{{- end }}

{{/* The version in which the API server serves MutatingAdmissionPolicy; empty: in none. */}}
{{- define "weir.mutatingApi" -}}
{{- $api := "" }}
{{- range list "v1" "v1beta1" }}
{{- if and (not $api) ($.Capabilities.APIVersions.Has (printf "admissionregistration.k8s.io/%s/MutatingAdmissionPolicy" .)) }}
{{- $api = . }}
{{- end }}
{{- end }}
{{- $api }}
{{- end }}

{{/* What values.schema.json cannot say: keys that must agree with what the pods mount or serve. */}}
{{- define "weir.check" -}}
{{- $config := .Values.config }}
{{- if $config.node }}
{{- fail "config.node: every node has its own; leave it out, the DaemonSet gives each agent the name of its node" }}
{{- end }}
{{- $journal := $config.journal | default dict }}
{{- range $key, $path := dict "config.journal.directory" $journal.directory "config.stateDirectory" $config.stateDirectory }}
{{- if and $path (not (hasPrefix "/var/lib/weir/" (printf "%s/" (clean $path)))) }}
{{- fail (printf "%s: %s is not below /var/lib/weir, the one folder of the node that the agent keeps things in; move it there" $key $path) }}
{{- end }}
{{- end }}
{{- $socket := dig "nri" "socket" "/var/run/nri/nri.sock" $config }}
{{- if eq ($socket | dir | dir) "/" }}
{{- fail (printf "config.nri.socket: the folder above that of %s is the node's whole file system, which would be mounted; give the runtime a socket further down, as /var/run/nri/nri.sock" $socket) }}
{{- end }}
{{- range $part := list "admission" "trustBundle" }}
{{- $values := get $.Values $part }}
{{- if and $values.enabled (kindIs "map" $values.namespaceSelector) (not $.Values.uninstall) }}
{{- include "weir.covers" (list $ (printf "%s.namespaceSelector" $part) $values.namespaceSelector) }}
{{- end }}
{{- end }}
{{- if .Values.trustBundle.enabled }}
{{- $bundled := false }}
{{- range $config.clusters }}
{{- $file := dig "trust" "mountedCa" "clientBundle" "" . }}
{{- if eq $file "/etc/weir/trust-bundle/ca.crt" }}{{- $bundled = true }}{{- end }}
{{- end }}
{{- if not $bundled }}
{{- fail "trustBundle.enabled: no cluster of config.clusters has trust.mountedCa.clientBundle: /etc/weir/trust-bundle/ca.crt, so no agent would serve what pods are told to trust" }}
{{- end }}
{{- end }}
{{- range $config.clusters }}
{{- if and (hasPrefix "/etc/weir/trust-bundle/" (dig "trust" "mountedCa" "clientBundle" "" .)) (not $.Values.trustBundle.enabled) }}
{{- fail (printf "config.clusters: %s has its clientBundle below /etc/weir/trust-bundle, which is mounted with trustBundle.enabled alone; set that, and trustBundle.namespaces" .name) }}
{{- end }}
{{- end }}
{{- if and .Values.monitoring.serviceMonitor (or (not $config.metrics) (regexMatch "^(127\\.|\\[::1\\]|localhost)" ($config.metrics.address | default "127.0.0.1:9155"))) }}
{{- fail "monitoring.serviceMonitor: Prometheus reaches no loopback address; set config.metrics.address to 0.0.0.0:PORT, or scrape from the node" }}
{{- end }}
{{- range regexFindAll "/etc/weir/secrets/[^/\"]+" (toJson $config) -1 | uniq }}
{{- $name := trimPrefix "/etc/weir/secrets/" . }}
{{- if not (has $name $.Values.secrets) }}
{{- fail (printf "config names a file in %s, and %s is not among `secrets`, so nothing would be mounted there; add it" . $name) }}
{{- end }}
{{- end }}
{{- /* Without a cluster to ask, as in `helm template`, nothing is found at all. */}}
{{- if and .Values.requireSecrets (not .Values.uninstall) (lookup "v1" "Namespace" "" "kube-system") }}
{{- range .Values.secrets }}
{{- if not (lookup "v1" "Secret" $.Release.Namespace .) }}
{{- fail (printf "secrets: there is no Secret %s in the namespace %s, and without it no agent's pod starts; make it first (or set requireSecrets=false where something makes it later)" . $.Release.Namespace) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
