//go:build tools

// Package helm pins the Helm that lints and installs the chart in tests; `go build helm.sh/helm/v3/cmd/helm` builds it.
package helm

import _ "helm.sh/helm/v3/cmd/helm"
