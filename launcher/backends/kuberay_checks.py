"""What ``launcher doctor`` looks at on a cluster with KubeRay; nothing is created or changed."""

from __future__ import annotations

from collections.abc import Iterator

from influence.rundir import RunSpec
from launcher.backends.kuberay_reading import API_VERSION, RayJobReader
from launcher.backends.kubernetes_checks import SiteView, surroundings
from launcher.backends.kubernetes_errors import ApiError, ApiForbidden, ApiInvalid, ApiNotFound
from launcher.backends.kubernetes_rights import POD_RIGHTS
from launcher.backends.pod_facts import age_s
from launcher.backends.rayjob_facts import UNSEEN_AFTER_S, RayJobStatus
from launcher.doctor import Check, failed, unknown
from launcher.errors import LauncherError
from launcher.profiles import Profile

_INSTALL = "ask the administrator for KubeRay (v1.6 or later), or use --backend kubernetes"
_RIGHTS = (("ray.io", "rayjobs", ("create", "get", "list", "watch", "patch")), *POD_RIGHTS)


def checks(profile: Profile, run: RunSpec | None) -> Iterator[Check]:
    """Look at everything that a run needs, one thing after the other.

    Args:
        profile: the cluster.
        run: what is to run there; None: what the profile's own settings name.

    Raises:
        BackendError: the kubeconfig cannot be used.
    """
    site = SiteView.open(profile, run)
    reached = site.reachable()
    yield reached
    if reached.outcome == "failed":
        return
    installed = _installed(site)
    yield installed
    if installed.outcome == "failed":
        return
    if not (yield from site.usable_namespace(_RIGHTS)):
        return
    reader = RayJobReader(site.api, profile.namespace)
    yield _operator(reader)
    yield from surroundings(site)
    if run is not None:
        from launcher.backends.kubernetes_room import room

        yield from room(site.api, profile.namespace, run)
        yield _dry_run(site, reader, run)


def _installed(site: SiteView) -> Check:
    """Whether the server knows RayJobs at all; discovery is open to everybody who is somebody."""
    name = "KubeRay"
    try:
        kinds = {kind.get("kind") for kind in site.api.get(f"/apis/{API_VERSION}").get("resources") or []}
    except ApiNotFound:
        return Check(name=name, outcome="failed", detail="is not installed", next_step=_INSTALL)
    except ApiForbidden as error:
        return unknown(name, error)
    except ApiError as error:
        return failed(name, error)
    if "RayJob" not in kinds:
        return Check(name=name, outcome="failed", detail=f"{API_VERSION} has no RayJobs", next_step=_INSTALL)
    return Check(name=name, outcome="ok", detail=f"{API_VERSION} is there, with RayJobs")


def _operator(reader: RayJobReader) -> Check:
    """Whether the operator works here, told by what it did to the RayJobs that are there."""
    name = "KubeRay's operator"
    try:
        items = reader.api.list(reader.path()).get("items") or []
    except ApiForbidden as error:
        return unknown(name, error)
    except ApiError as error:
        return failed(name, error)
    rayjobs, now_s = [RayJobStatus.of(item) for item in items], reader.api.now_s()
    ignored = [
        rayjob
        for rayjob in rayjobs
        if not (rayjob.seen or rayjob.suspended) and (age_s(rayjob.created_at, now_s) or 0) > UNSEEN_AFTER_S
    ]
    if ignored:
        return Check(
            name=name,
            outcome="failed",
            detail=f"has not looked at RayJob {ignored[-1].name} for more than {UNSEEN_AFTER_S:g} s",
            next_step="ask the administrator whether it runs and watches this namespace",
        )
    seen = [rayjob for rayjob in rayjobs if rayjob.seen]
    if seen:
        return Check(name=name, outcome="ok", detail=f"works here: it has seen RayJob {seen[-1].name}")
    return Check(
        name=name,
        outcome="unknown",
        detail="there is no RayJob here yet to tell by",
        next_step="submit a small run, or ask the administrator whether it watches this namespace",
    )


def _dry_run(site: SiteView, reader: RayJobReader, run: RunSpec) -> Check:
    """What the server would say to the RayJob; a field that it does not know is told, not dropped."""
    name = "the RayJob"
    try:
        site.api.ask(reader.path(), reader.manifest(run, run.run), dryRun="All", fieldValidation="Strict")
    except ApiForbidden as error:
        return unknown(name, error)
    except ApiInvalid as error:
        check = failed(name, error)
        if "unknown field" not in check.detail:
            return check
        return Check(
            name=name,
            outcome="failed",
            detail=check.detail,
            next_step="KubeRay is older than v1.6 there; ask the administrator for a newer one",
        )
    except LauncherError as error:
        if isinstance(error, ApiError) and error.reason == "AlreadyExists":
            return Check(name=name, outcome="ok", detail=f"'{run.run}' is there already")
        return failed(name, error)
    return Check(name=name, outcome="ok", detail="the server would take it (dry run)")
