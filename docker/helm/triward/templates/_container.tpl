{{/* The server. */}}
{{- define "triward.container" -}}
name: triward
image: {{ include "triward.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [triward-server]
args:
  - serve
  - --repository=/models
  - --drain-timeout={{ .Values.server.drainSeconds }}
  {{- if .Values.tls.secret }}
  - --tls-certificate=/run/secrets/tls/tls.crt
  - --tls-key=/run/secrets/tls/tls.key
  {{- if .Values.tls.clientCASecret }}
  - --tls-client-ca=/run/secrets/client-ca/ca.crt
  {{- end }}
  {{- end }}
  {{- with .Values.server.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  - --
  # Milliseconds. Clients look for new pods only when a connection ends; requests that are
  # under way have two minutes more.
  - --grpc-max-connection-age={{ mul .Values.server.connectionSeconds 1000 }}
  - --grpc-max-connection-age-grace=120000
  {{- with .Values.server.tritonArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- if or .Values.admin.secret .Values.extraEnv }}
env:
  {{- if .Values.admin.secret }}
  # Also for `kubectl exec … triward-server switch`.
  - {name: TRIWARD_ADMIN_KEY_FILE, value: /run/secrets/triward/{{ .Values.admin.key }}}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
ports:
  - {name: grpc, containerPort: 8001}
  - {name: metrics, containerPort: 8002}
resources:
  {{- include "triward.resources" . | nindent 2 }}
# HTTP listens on the pod's own loopback, which the kubelet cannot reach. All models of the
# repository must be ready. Starting the command takes a second, longer on busy cores.
startupProbe:
  exec:
    command: [triward-server, health, --timeout=5, --repository=/models]
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: {{ divf .Values.server.startupSeconds 10 | ceil | int }}
readinessProbe:
  exec:
    command: [triward-server, health, --timeout=5, --repository=/models]
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 2
# A known conversation must get its known score. The server ends by itself within seconds when it
# finds itself unable to; this is for when it does not. Patient, because a restart under heavy
# load would make the load of the others heavier.
livenessProbe:
  exec:
    command: [triward-server, health, --timeout=30, --deep, --repository=/models]
  periodSeconds: 60
  timeoutSeconds: 40
  failureThreshold: 5
lifecycle:
  # Endpoints lose the pod while it still answers; from SIGTERM on it refuses.
  preStop:
    sleep: {seconds: 10}
securityContext:
  {{- include "triward.securityContext" . | nindent 2 }}
volumeMounts:
  {{- if ne .Values.model.source "baked" }}
  - {name: repository, mountPath: /models, readOnly: true}
  {{- end }}
  {{- if .Values.admin.secret }}
  - {name: admin, mountPath: /run/secrets/triward, readOnly: true}
  {{- end }}
  {{- if .Values.tls.secret }}
  - {name: tls, mountPath: /run/secrets/tls, readOnly: true}
  {{- if .Values.tls.clientCASecret }}
  - {name: client-ca, mountPath: /run/secrets/client-ca, readOnly: true}
  {{- end }}
  {{- end }}
  - {name: shm, mountPath: /dev/shm}
  - {name: tmp, mountPath: /tmp}
{{- end }}

{{/* Fetches a checkpoint and exports it, unless the volume holds the model: its public folder comes last.
Exports into one volume wait for each other; one that waited finds the model, and refuses. */}}
{{- define "triward.export" -}}
{{- $hf := .Values.model.hf -}}
name: export
image: {{ include "triward.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command:
  - /bin/sh
  - -ec
  - |-
    whole="/models/$0/config.pbtxt"
    test -f "$whole" || triward-server export "$@" || test -f "$whole"
args:
  - {{ $hf.name | quote }}
  - --name={{ $hf.name }}
  - --checkpoint={{ trimPrefix "hf://" $hf.uri }}
  {{- with $hf.revision }}
  - --revision={{ . }}
  {{- end }}
  - --output=/models
  {{- with $hf.exportArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
env:
  # The image says 1: serving downloads nothing.
  - {name: HF_HUB_OFFLINE, value: "0"}
  - {name: HF_HOME, value: /cache}
  {{- if $hf.tokenSecret }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef: {name: {{ $hf.tokenSecret | quote }}, key: {{ $hf.tokenKey | quote }}}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
# Those of the server, which starts afterwards: a pod takes the larger of the two, not their sum.
resources:
  {{- include "triward.resources" . | nindent 2 }}
securityContext:
  {{- include "triward.securityContext" . | nindent 2 }}
volumeMounts:
  - {name: repository, mountPath: /models}
  - {name: cache, mountPath: /cache}
  - {name: shm, mountPath: /dev/shm}
  - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "triward.volumes" -}}
{{- $hf := .Values.model.hf -}}
{{- if eq .Values.model.source "pvc" }}
- name: repository
  persistentVolumeClaim: {claimName: {{ .Values.model.pvc.claim | quote }}, readOnly: true}
{{- else if eq .Values.model.source "hf" }}
- name: repository
  {{- if $hf.claim }}
  persistentVolumeClaim: {claimName: {{ $hf.claim | quote }}}
  {{- else if $hf.storageClass }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ $hf.storageClass | quote }}
        resources:
          requests: {storage: {{ $hf.size }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ $hf.size }}}
  {{- end }}
- name: cache
  emptyDir: {sizeLimit: {{ $hf.cacheSize }}}
{{- end }}
{{- if .Values.admin.secret }}
- name: admin
  secret: {secretName: {{ .Values.admin.secret | quote }}}
{{- end }}
{{- if .Values.tls.secret }}
- name: tls
  secret: {secretName: {{ .Values.tls.secret | quote }}}
{{- if .Values.tls.clientCASecret }}
- name: client-ca
  secret:
    secretName: {{ .Values.tls.clientCASecret | quote }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.shmSize }}}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.tmpSize }}}
{{- end }}
