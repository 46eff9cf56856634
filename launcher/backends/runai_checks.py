"""What ``launcher doctor`` looks at in a Run:ai profile; nothing is created or changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from influence.rundir import RunSpec
from launcher.backends.runai_client import RunaiClient
from launcher.backends.runai_trainings import PROJECTS, TRAININGS, WORKLOADS, Trainings
from launcher.doctor import Check
from launcher.errors import BackendError, SpecError
from launcher.profiles import Profile, RunaiAccess

NODE_POOLS = "/api/v1/node-pools"
_UNLIMITED = -1


def checks(profile: Profile, run: RunSpec | None) -> Iterator[Check]:
    """Look at the control plane, the project and the rights, one thing after the other; ends where nothing
    further can be seen.

    Args:
        run: a run that is to be submitted there; its needs are compared with what there is.
    """
    if run is not None:
        yield _of_run(run)
    if profile.runai is None:
        yield Check(
            name="profile", outcome="failed", detail=f"cluster '{profile.name}' has no Run:ai",
            next_step="add runai: {url: ..., project: ...} to the cluster in launcher.yaml",
        )  # fmt: skip
        return
    access = profile.runai
    try:
        client = RunaiClient(access)
        client.sign_in()
    except BackendError as error:
        yield _failed("credentials", error)
        return
    yield Check(name="credentials", outcome="ok", detail=f"{client.place} accepts them")
    try:
        place = Trainings(client, access).place()
    except BackendError as error:
        yield _failed("project", error)
        return
    yield Check(
        name="project", outcome="ok", detail=f"'{access.project}' is there, on cluster {place.cluster_id}"
    )
    yield _workloads(client, access)
    yield _right_to_create(client, access, place.project_id)
    if run is not None:
        yield from _node_pools(client, run, place.cluster_id)
        yield from _quota(client, access, run)
    if profile.root is None and profile.kubeconfig is None and profile.context is None:
        yield Check(
            name="logs", outcome="warning",
            detail="Run:ai's REST API has no logs, and the profile names neither a root nor a kubeconfig",
            next_step=f"set root in cluster '{profile.name}' to where the run directories are mounted here",
        )  # fmt: skip


def _of_run(run: RunSpec) -> Check:
    from launcher.runai_values import training_values

    try:
        training_values(run)
    except SpecError as error:
        return _failed("run", error)
    return Check(name="run", outcome="ok", detail=f"'{run.run}' can be a training of Run:ai")


def _workloads(client: RunaiClient, access: RunaiAccess) -> Check:
    try:
        query = {"filterBy": f"projectName=={access.project}"}
        for _ in client.pages(WORKLOADS, "workloads", max_items=1, **query):
            pass
    except BackendError as error:
        return _failed("workloads", error)
    return Check(name="workloads", outcome="ok", detail="those of the project can be listed")


def _right_to_create(client: RunaiClient, access: RunaiAccess, project_id: str) -> Check:
    """Asks with an order that lacks a name and a spec, and so is refused in any case; the reason tells.

    Whether a control plane looks at the rights before the content was not seen on a live one.
    """
    name = "right to create trainings"
    try:
        client.post(TRAININGS, {"projectId": project_id})
    except BackendError as error:
        if error.what.endswith(("(400)", "(422)")):
            return Check(
                name=name, outcome="ok",
                detail="an order without a name was refused for its content, not for a missing right",
            )  # fmt: skip
        if error.what.endswith("(403)"):
            return _failed(name, error)
        return Check(
            name=name, outcome="unknown", detail=_words(error), next_step="submit shows whether it is there"
        )
    return Check(
        name=name, outcome="unknown", detail="an order without a name was not refused",
        next_step=f"look in Run:ai for what was created in project '{access.project}', and remove it",
    )  # fmt: skip


def _node_pools(client: RunaiClient, run: RunSpec, cluster_id: str) -> Iterator[Check]:
    wanted = run.spec["cluster"]["node_pools"]
    if not wanted:
        return
    try:
        pools = [
            pool
            for pool in client.pages(NODE_POOLS, "nodepools", filterBy=f"clusterId=={cluster_id}")
            if isinstance(pool, Mapping) and pool.get("clusterId") in (cluster_id, None)
        ]
    except BackendError as error:
        yield Check(name="node pools", outcome="unknown", detail=_words(error), next_step=error.next_step)
        return
    there = [str(pool.get("name")) for pool in pools]
    missing = [name for name in wanted if name not in there]
    if missing:
        yield Check(
            name="node pools", outcome="failed", detail=f"there is no {', '.join(missing)}",
            next_step=f"set cluster.node_pools to some of: {', '.join(there) or 'none are told'}",
        )  # fmt: skip
    else:
        yield Check(name="node pools", outcome="ok", detail=f"{', '.join(wanted)} are there")


def _quota(client: RunaiClient, access: RunaiAccess, run: RunSpec) -> Iterator[Check]:
    """Only where the project's answer tells a quota of GPUs."""
    hardware = run.spec["hardware"]
    if hardware["device"] != "cuda":
        return
    quota = _gpu_quota(client, access)
    if quota is None:
        return
    num_gpus = hardware["ranks_per_node"] * hardware["nodes"]
    if quota == _UNLIMITED or quota >= num_gpus:
        told = "without a limit" if quota == _UNLIMITED else f"{quota:g} GPUs"
        yield Check(name="quota", outcome="ok", detail=f"the project's is {told}, the run needs {num_gpus}")
        return
    preemptible = run.spec["cluster"]["preemptible"]
    yield Check(
        name="quota",
        outcome="warning" if preemptible else "failed",
        detail=f"the project's is {quota:g} GPUs, and the run needs {num_gpus}"
        + (": beyond it, it runs on what others leave, and may be preempted" if preemptible else ""),
        next_step="ask the project's administrator for more"
        + ("" if preemptible else ", or submit with --set cluster.preemptible=true"),
    )


def _gpu_quota(client: RunaiClient, access: RunaiAccess) -> float | None:
    try:
        projects = list(client.pages(PROJECTS, "projects", filterBy=f"name=={access.project}"))
    except BackendError:
        return None
    for project in projects:
        if isinstance(project, Mapping) and project.get("name") == access.project:
            total: Any = project.get("totalResources")
            quota = total.get("gpuQuota") if isinstance(total, Mapping) else None
            return float(quota) if isinstance(quota, (int, float)) and abs(quota) < 1e9 else None
    return None


def _failed(name: str, error: BackendError | SpecError) -> Check:
    return Check(name=name, outcome="failed", detail=_words(error), next_step=error.next_step)


def _words(error: BackendError | SpecError) -> str:
    return f"{error.what}: {error.why}" if error.why else error.what
