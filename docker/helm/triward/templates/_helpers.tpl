{{- define "triward.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "triward.selector" -}}
app.kubernetes.io/name: triward
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "triward.labels" -}}
{{ include "triward.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "triward.image" -}}
{{- with .Values.image -}}
{{- .repository -}}
{{- if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end }}

{{- define "triward.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "triward.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{- define "triward.address" -}}
{{ include "triward.fullname" . }}.{{ .Release.Namespace }}.svc:8001
{{- end }}

{{- define "triward.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "triward.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpus -}}
{{- $limits := merge (dict .Values.gpuResource .Values.gpus) ($resources.limits | default dict) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{/* What values.schema.json cannot say: how values fit together. */}}
{{- define "triward.check" -}}
{{- if not (regexMatch "^[a-z][-a-z0-9]*$" (include "triward.fullname" .)) -}}
{{- fail (printf "the release's name %q: the Service is called by it, so it must be a letter and then a-z, 0-9 or -; choose another, or set fullnameOverride" .Release.Name) -}}
{{- end -}}
{{- if and (eq .Values.model.source "hf") (not .Values.model.hf.uri) -}}
{{- fail "model.hf.uri: model.source is hf, so name the model as hf://ORGANIZATION/NAME" -}}
{{- end -}}
{{- if and .Values.tls.clientCASecret (not .Values.tls.secret) -}}
{{- fail "tls.clientCASecret: clients' certificates need TLS; set tls.secret, too" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (not (kindIs "invalid" .Values.replicas)) -}}
{{- fail "replicas: the autoscaler sets it; leave it null, or set autoscaling.enabled to false" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas: %v is more than autoscaling.maxReplicas, %v" .Values.autoscaling.minReplicas .Values.autoscaling.maxReplicas) -}}
{{- end -}}
{{- if and .Values.podMonitor.enabled .Values.serviceMonitor.enabled -}}
{{- fail "serviceMonitor.enabled: podMonitor scrapes the same pods; enable one of them" -}}
{{- end -}}
{{- end }}
