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
     enrolled. A binding has one selector, and `config.enrolment` may have several. */}}
{{- define "weir.namespaceSelectors" -}}
{{- $selectors := list }}
{{- if kindIs "map" (index . 1) }}
{{- $selectors = list (index . 1) }}
{{- else }}
{{- range (index . 0).Values.config.enrolment }}
{{- if eq (.mode | default "enforce") "enforce" }}{{ $selectors = append $selectors .namespaceSelector }}{{ end }}
{{- end }}
{{- end }}
{{- $selectors | uniq | toJson }}
{{- end }}

{{/* The name of a policy's binding: the first one has the policy's. */}}
{{- define "weir.bindingName" -}}
{{ index . 0 }}{{ with index . 1 }}-{{ add1 . }}{{ end }}
{{- end }}

{{/* Fails where pods are enrolled in namespaces that a selector for them does not choose: each of its requirements must be one of each entry's. */}}
{{- define "weir.covers" -}}
{{- $key := index . 1 }}
{{- $selector := index . 2 }}
{{- range $at, $entry := (index . 0).Values.config.enrolment }}
{{- if eq ($entry.mode | default "enforce") "enforce" }}
{{- $missing := list }}
{{- $labels := $entry.namespaceSelector.matchLabels | default dict }}
{{- range $name, $value := $selector.matchLabels }}
{{- if not (and (hasKey $labels $name) (eq (get $labels $name) $value)) }}{{ $missing = append $missing (printf "%s=%s" $name $value) }}{{ end }}
{{- end }}
{{- range $selector.matchExpressions }}
{{- if not (has . ($entry.namespaceSelector.matchExpressions | default list)) }}{{ $missing = append $missing (toJson .) }}{{ end }}
{{- end }}
{{- if $missing }}
{{- fail (printf "%s asks for %s, and config.enrolment[%d] enrols namespaces without; leave the selector out, and the policy is for the namespaces that are enrolled" $key (join ", " $missing) $at) }}
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
{{- range $part := list "admission" "trustBundle" }}
{{- $values := get $.Values $part }}
{{- if and $values.enabled (kindIs "map" $values.namespaceSelector) }}
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
