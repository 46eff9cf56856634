"""Whether a cluster has room for a run: GPU nodes, what is free on them, and what a quota leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from influence.rundir import RunSpec
from launcher.backends.kubernetes_api import KubernetesApi, Object
from launcher.backends.kubernetes_errors import ApiError, api_path
from launcher.doctor import Check, unknown
from launcher.kubernetes_values import GPU_RESOURCE, PRODUCT_LABEL

_TAKEN = "status.phase!=Succeeded,status.phase!=Failed"


def room(api: KubernetesApi, namespace: str, run: RunSpec) -> Iterator[Check]:
    """Compare what a run's pod asks for with the nodes and the quotas."""
    hardware = run.spec["hardware"]
    num_gpus = int(hardware["ranks_per_node"]) if hardware["device"] == "cuda" else 0
    if num_gpus:
        yield _nodes(api, run.spec, num_gpus)
        yield from _quotas(api, namespace, num_gpus * int(hardware["nodes"]))


def _nodes(api: KubernetesApi, spec: Mapping[str, Any], num_gpus: int) -> Check:
    product = spec["hardware"]["gpu_product"]
    wanted = ({PRODUCT_LABEL: product} if product else {}) | dict(spec["cluster"]["node_selector"])
    name = "GPU nodes"
    try:
        nodes = api.list(api_path("v1", "nodes")).get("items") or []
    except ApiError as error:
        return unknown(name, error)
    labelled = [node for node in nodes if wanted.items() <= _labels(node).items()]
    selector = ", ".join(f"{key}={value}" for key, value in wanted.items()) or "any label"
    if not labelled:
        there = sorted({_labels(node).get(PRODUCT_LABEL, "") for node in nodes} - {""})
        return Check(
            name=name,
            outcome="failed",
            detail=f"none of {len(nodes)} nodes has {selector}; products: {', '.join(there) or 'none'}",
            next_step="correct hardware.gpu_product and cluster.node_selector",
        )
    large = [node for node in labelled if _gpus(node) >= num_gpus and _takes_pods(node)]
    wanted_nodes = int(spec["hardware"]["nodes"])
    if len(large) < wanted_nodes:
        number = f"only {len(large)} that takes pods" if large else "none that takes pods"
        return Check(
            name=name,
            outcome="failed",
            detail=f"{len(labelled)} nodes with {selector}; {number} has {num_gpus} GPUs",
            next_step="set hardware.nodes and hardware.ranks_per_node to what there is, or wait until more "
            "nodes are ready",
        )
    words = f"{len(large)} nodes with {selector} and at least {num_gpus} GPUs"
    free = _num_free(api, large, num_gpus)
    if free is None:
        return Check(name=name, outcome="ok", detail=f"{words}; what is free cannot be seen from here")
    if free < wanted_nodes:
        few = f"only {free} of them" if free else "none of them"
        return Check(name=name, outcome="warning", detail=f"{words}, {few} free now: the run will wait")
    return Check(name=name, outcome="ok", detail=f"{words}, {free} of them free now")


def _num_free(api: KubernetesApi, nodes: Sequence[Object], num_gpus: int) -> int | None:
    """Nodes where enough GPUs are not requested by pods; None where we may not see all pods."""
    try:
        pods = api.list(api_path("v1", "pods"), fieldSelector=_TAKEN).get("items") or []
    except ApiError:
        return None
    taken: dict[str, int] = {}
    for pod in pods:
        spec = pod.get("spec") or {}
        for container in spec.get("containers") or []:
            limits = (container.get("resources") or {}).get("limits") or {}
            node = str(spec.get("nodeName"))
            taken[node] = taken.get(node, 0) + _count(limits.get(GPU_RESOURCE))
    return sum(_gpus(node) - taken.get(node["metadata"]["name"], 0) >= num_gpus for node in nodes)


def _quotas(api: KubernetesApi, namespace: str, num_gpus: int) -> Iterator[Check]:
    """Quotas on GPUs; where there is none, nothing is said."""
    try:
        quotas = api.list(api_path("v1", "resourcequotas", namespace=namespace)).get("items") or []
    except ApiError as error:
        yield unknown("quotas", error)
        return
    key = f"requests.{GPU_RESOURCE}"
    for quota in quotas:
        status = quota.get("status") or {}
        hard, used = status.get("hard") or {}, status.get("used") or {}
        if key not in hard:
            continue
        most, taken = _count(hard[key]), _count(used.get(key))
        name, words = f"quota {quota['metadata']['name']}", f"{taken} of {most} GPUs are in use"
        if most < num_gpus:
            yield Check(
                name=name,
                outcome="failed",
                detail=f"{words}; the run needs {num_gpus}",
                next_step="ask the namespace's administrator for a larger quota",
            )
        elif most - taken < num_gpus:
            yield Check(name=name, outcome="warning", detail=f"{words}: the run will wait for {num_gpus}")
        else:
            yield Check(name=name, outcome="ok", detail=words)


def _labels(node: Object) -> Mapping[str, str]:
    return node["metadata"].get("labels") or {}


def _gpus(node: Object) -> int:
    return _count(((node.get("status") or {}).get("allocatable") or {}).get(GPU_RESOURCE))


def _takes_pods(node: Object) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or []
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
    return ready and not (node.get("spec") or {}).get("unschedulable")


def _count(quantity: Any) -> int:
    """A number of devices; ``1k`` and the like are not used for those."""
    return int(quantity) if str(quantity or "").isdecimal() else 0
