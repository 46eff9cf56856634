{{/* A name of at most `max` characters: a longer one is cut and ends in digits of its hash, so two never meet. */}}
{{- define "influence.limited" -}}
{{- $name := index . 0 -}}
{{- $max := index . 1 -}}
{{- if le (len $name) (int $max) -}}
{{- $name | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" ($name | trunc (int (sub $max 9)) | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- end -}}

{{- define "influence.name" -}}
{{- include "influence.limited" (list (default .Chart.Name .Values.nameOverride) 63) -}}
{{- end -}}

{{/* The release's own name for objects that no preset speaks of; leaves room for the longest suffix. */}}
{{- define "influence.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- include "influence.limited" (list .Values.fullnameOverride 50) -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- include "influence.limited" (list .Release.Name 50) -}}
{{- else -}}
{{- include "influence.limited" (list (printf "%s-%s" .Release.Name $name) 50) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* ClusterRoles of two releases must not meet; no name of either part holds a colon. */}}
{{- define "influence.nodeViewerName" -}}
{{- printf "%s:%s:node-viewer" .Release.Namespace (include "influence.fullname" .) -}}
{{- end -}}

{{- define "influence.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | quote }}
app.kubernetes.io/name: {{ include "influence.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/part-of: influence-launcher
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The claim that the pods mount, made here or not. */}}
{{- define "influence.claim" -}}
{{- default .Values.artifacts.name .Values.artifacts.existingClaim -}}
{{- end -}}

{{/* One service account; takes [root, account, component]. */}}
{{- define "influence.serviceAccount" -}}
{{- $root := index . 0 -}}
{{- $account := index . 1 -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ $account.name | quote }}
  namespace: {{ $root.Release.Namespace | quote }}
  labels:
    {{- include "influence.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ index . 2 }}
  {{- with $account.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
# Whoever needs a token asks for one (`kubectl create token`), or mounts it knowingly.
automountServiceAccountToken: false
{{- with $account.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Who a binding is for; takes [root, section with serviceAccount and subjects]. */}}
{{- define "influence.subjects" -}}
{{- $root := index . 0 -}}
{{- $section := index . 1 -}}
- kind: ServiceAccount
  name: {{ $section.serviceAccount.name | quote }}
  namespace: {{ $root.Release.Namespace | quote }}
{{- range $section.subjects }}
- kind: {{ .kind }}
  name: {{ .name | quote }}
  {{- if eq .kind "ServiceAccount" }}
  namespace: {{ default $root.Release.Namespace .namespace | quote }}
  {{- else }}
  apiGroup: rbac.authorization.k8s.io
  {{- end }}
{{- end }}
{{- end -}}

{{/* What the schema cannot say: the accounts differ, or the pods would run with a person's rights. */}}
{{- define "influence.requireSeparateAccounts" -}}
{{- $trainer := .Values.trainer.serviceAccount.name -}}
{{- $launcher := .Values.launcher.serviceAccount.name -}}
{{- $reader := .Values.reader.serviceAccount.name -}}
{{- if eq $trainer $launcher -}}
{{- fail (printf "trainer.serviceAccount.name and launcher.serviceAccount.name are both %s: the trainer's pods would have the launcher's rights; name them differently" $trainer) -}}
{{- end -}}
{{- if and .Values.reader.enabled (has $reader (list $trainer $launcher)) -}}
{{- fail (printf "reader.serviceAccount.name is %s, which another account has: the reader's rights reach every Secret; name it differently" $reader) -}}
{{- end -}}
{{- $namespace := .Release.Namespace -}}
{{- range concat .Values.launcher.subjects .Values.reader.subjects -}}
{{- if and (eq .kind "ServiceAccount") (eq .name $trainer) (eq (default $namespace .namespace) $namespace) -}}
{{- fail (printf "subjects: %s is the trainer's account, which has no rights; take it out of the list" $trainer) -}}
{{- end -}}
{{- end -}}
{{- end -}}
