"""The Helm chart, and KServe's manifests beside it."""
