"""What each account of the chart may do: the one table that roles and a real API server are held to."""

from __future__ import annotations

Rights = dict[tuple[str, str], set[str]]
"""(group, resource) -> verbs."""

READ = {"get", "list", "watch"}
#: What the launcher does on a cluster, and nothing else.
LAUNCHER_RIGHTS: Rights = {
    ("batch", "jobs"): READ | {"create", "patch"},
    ("", "pods"): READ,
    ("", "pods/log"): {"get"},
    ("", "events"): READ,
    ("", "persistentvolumeclaims"): {"get", "list"},
    ("", "resourcequotas"): {"get", "list"},
    ("", "serviceaccounts"): {"get"},
}
KUBERAY_RIGHTS: Rights = {("ray.io", "rayjobs"): READ | {"create", "patch"}, ("ray.io", "rayclusters"): READ}
KUEUE_RIGHTS: Rights = {
    ("kueue.x-k8s.io", "workloads"): READ | {"patch"},
    ("kueue.x-k8s.io", "localqueues"): {"get", "list"},
}
READER_RIGHTS: Rights = {("", "pods"): READ | {"create", "delete"}, ("", "pods/exec"): {"create", "get"}}
NODE_RIGHTS: Rights = {("", "nodes"): {"get", "list"}}
