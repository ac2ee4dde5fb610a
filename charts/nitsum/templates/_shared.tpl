{{/* Labels of every object. Call with (list . "component"). */}}
{{- define "nitsum.labels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: nitsum
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ $root.Chart.Name }}-{{ $root.Chart.Version }}
{{- end }}

{{/* Labels that select the pods of a component. */}}
{{- define "nitsum.selector" -}}
app.kubernetes.io/name: nitsum
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Image and pull policy. Call with (list . .Values.images.operator). */}}
{{- define "nitsum.image" -}}
{{- $image := index . 1 -}}
image: {{ printf "%s:%s" $image.repository ($image.tag | default (index . 0).Chart.AppVersion) | quote }}
imagePullPolicy: {{ $image.pullPolicy | default "IfNotPresent" }}
{{- end }}

{{/* What restricted PodSecurity asks of a pod, and of a container. */}}
{{- define "nitsum.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- define "nitsum.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "nitsum.modelMounts" -}}
{{- range $claim := .Values.agent.modelClaims }}
- {name: {{ printf "model-%s" ($claim | sha256sum | trunc 12) }}, mountPath: /var/lib/nitsum/volumes/{{ $claim }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "nitsum.modelVolumes" -}}
{{- range $claim := .Values.agent.modelClaims }}
- name: {{ printf "model-%s" ($claim | sha256sum | trunc 12) }}
  persistentVolumeClaim: {claimName: {{ $claim }}, readOnly: true}
{{- end }}
{{- end }}
