"""Which of the rights that the launcher needs in a namespace we have, as the API server itself says."""

from __future__ import annotations

from collections.abc import Generator

from launcher.backends.kubernetes_api import KubernetesApi
from launcher.backends.kubernetes_errors import ApiError, chart_role
from launcher.doctor import Check, unknown

Rights = tuple[tuple[str, str, tuple[str, ...]], ...]
"""API group, resource and verbs."""
POD_RIGHTS: Rights = (
    ("", "pods", ("get", "list", "watch")),
    ("", "pods/log", ("get",)),
    ("", "events", ("list",)),
)
SETTINGS = "launcher.yaml or the preset"
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


def rights(api: KubernetesApi, namespace: str, wanted: Rights) -> Generator[Check, None, bool]:
    """One check a resource: which of the verbs are missing; one in all where every one is.

    Returns:
        Whether there is any right.
    """
    checks = []
    denied = []
    for group, resource, verbs in wanted:
        kind = resource + (f".{group}" if group else "")
        name = f"right on {kind}"
        try:
            missing = [verb for verb in verbs if not _allowed(api, namespace, group, resource, verb)]
        except ApiError as error:
            checks.append(unknown(name, error))
            continue
        if len(missing) == len(verbs):
            denied.append(kind)
        if not missing:
            checks.append(Check(name=name, outcome="ok", detail=", ".join(verbs)))
            continue
        detail = f"{', '.join(missing)} in namespace '{namespace}' is missing"
        step = f"ask the administrator to bind you to {chart_role(kind)}"
        checks.append(Check(name=name, outcome="failed", detail=detail, next_step=step))
    if len(denied) < max(2, len(wanted)):
        yield from checks
        return True
    yield Check(
        name="rights",
        outcome="failed",
        detail=f"you have none in namespace '{namespace}': {', '.join(denied)}",
        next_step=f"correct cluster.namespace in {SETTINGS}, where that is not the namespace that you were "
        f"given; else ask its administrator to bind you to {chart_role(denied[0])}",
    )
    return False


def _allowed(api: KubernetesApi, namespace: str, group: str, resource: str, verb: str) -> bool:
    plural, _, subresource = resource.partition("/")
    attributes = {
        "namespace": namespace, "group": group, "resource": plural, "verb": verb,
        "subresource": subresource,
    }  # fmt: skip
    answer = api.ask(
        _REVIEWS,
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        },
    )
    return (answer.get("status") or {}).get("allowed") is True
