"""A run's life as the launcher drives it: submit it once, adopt it if it is there, see how it is.

Works with any backend; what a backend's and a run directory's facts mean together is ``launcher.states``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from influence import rundir
from influence.rundir import RunDirError, RunPaths, RunSpec
from launcher.errors import BackendError, ConflictError, NotFoundError, SpecError, UsageError
from launcher.machine import enumerated
from launcher.places import suggest
from launcher.profiles import Profile, described_clusters, several_nodes_step
from launcher.run_facts import facts_without_directory, read_facts, storage
from launcher.rundir_errors import in_words, run_dir_errors
from launcher.site import Site
from launcher.states import BackendFacts, Phase, RunFacts, RunStatus, State, derive

# Backends that execute a run as one pod.
_ONE_POD = {"kubernetes": "a Job is one pod", "runai": "a training is one pod"}


class Action(StrEnum):
    """What a submit does with a run's name."""

    CREATE = "create"
    ADOPT = "adopt"  # it is under way: nothing to start
    RESTART = "restart"  # it is there, and nothing runs it
    COMPLETE = "complete"  # every step is there: nothing to do

    @property
    def starts(self) -> bool:
        """Whether something is to be started."""
        return self in (Action.CREATE, Action.RESTART)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a submit will do; made without changing anything."""

    run: RunSpec
    action: Action
    status: RunStatus | None
    """The run as it is now; None when there is none."""
    run_dir: str | None
    """Its directory as this machine sees it; None where it does not."""
    storage: str | None = None
    """Where a cluster keeps that directory, in words; None on this machine."""

    @property
    def sentence(self) -> str:
        """The plan in words."""
        name = f"run '{self.run.run}'"
        if self.action is Action.CREATE or self.status is None:
            return f"{name} is new"
        state = f"{self.status.state} ({self.status.reason})"
        return {
            Action.ADOPT: f"{name} exists with the same spec and is {state}: adopted, nothing started",
            Action.RESTART: f"{name} exists with the same spec and is {state}: adopted, and started again",
            Action.COMPLETE: f"{name} exists with the same spec and is complete: nothing to do",
        }[self.action]


def plan_submit(site: Site, run: RunSpec) -> Plan:
    """Adopt or refuse.

    Raises:
        ConflictError: another spec has this name; ``why`` lists what differs. Or the run is being stopped.
        UsageError, SpecError, IncompleteError, BackendError: what lies there is no run that can be adopted,
            or the run would lie where no other command looks for it.
    """
    _require_namespace(site, run)
    with run_dir_errors():
        paths = site.paths(run.run)
        existing = [site.backend.document(run.run)]
        if not site.local:
            existing.append(_stored(paths))
        if paths is not None and not any(existing):
            _refuse_foreign(paths, site)
    for other in filter(None, existing):
        if other.spec_hash != run.spec_hash:
            raise _conflict(run.run, rundir.difference(other.spec, run.spec))
    run_dir = _seen_here(paths)
    kept_in = None if site.local else storage(run)
    new = Plan(run=run, action=Action.CREATE, status=None, run_dir=run_dir, storage=kept_in)
    if not any(existing):
        return new
    facts, run_facts = _observe(site, run.run, paths)
    if run_facts is None:  # it went away between the two questions
        return new
    status = derive(facts, run_facts, now_s=time.time())
    if status.state is State.UNKNOWN:
        raise BackendError(
            f"run '{run.run}' exists with the same spec, but its state is unknown",
            why=status.reason,
            next_step=site.suggest("status", run.run),
        )
    if status.state is State.TERMINATING:
        raise ConflictError(
            f"run '{run.run}' exists with the same spec and is being stopped; nothing was started",
            why=status.reason,
            next_step=f"submit again when it has ended: {site.suggest('status', run.run, '--wait')}",
        )
    if status.state is State.SUCCEEDED:
        action = Action.COMPLETE
    elif status.state.terminal or facts.phase is Phase.NEVER_STARTED:
        action = Action.RESTART
    else:
        action = Action.ADOPT
    return Plan(run=run, action=action, status=status, run_dir=run_dir, storage=kept_in)


def carry_out(site: Site, plan: Plan) -> bool:
    """Do what a plan says; returns whether this call started the run (False: somebody else was quicker).

    Raises:
        ConflictError: another spec took the name since the plan was made.
        BackendError: the backend, or the filesystem, refuses.
    """
    if not plan.action.starts:
        return False
    with run_dir_errors():
        try:
            return site.backend.submit(plan.run)
        except rundir.ConflictError as error:
            raise _conflict(plan.run.run, error.difference) from error


def require_room(site: Site, run: RunSpec, request: Sequence[str]) -> None:
    """Refuse a run that the backend's machines cannot execute, before anything is changed.

    Args:
        request: the user's own options (``--preset``, ...), for the commands that the message suggests.

    Raises:
        BackendError: names what is lacking and what would work.
    """
    refusal = site.backend.refusal(run)
    if refusal is None:
        return
    several = run.spec["hardware"].get("nodes", 1) > 1
    on_a_cpu = site.suggest("submit", *request, "--overlay", "tiny-cpu")
    fits = refusal.device == "cuda" and "tiny-cpu" not in run.spec["overlays"] and not several
    if not site.local:
        next_step = f"{site.suggest('doctor', *request)} (looks at everything that a run needs there)"
    elif several:
        next_step = several_nodes_step()
    elif fits:
        next_step = f"{on_a_cpu} (the same job, small, on a CPU), or {_on_a_cluster(request)}"
    else:
        next_step = (
            "free or add it, or choose smaller settings with --set hardware...=..., or "
            f"{_on_a_cluster(request)}"
        )
    raise BackendError(
        f"preset '{run.spec['preset']}' cannot run on the backend '{site.backend.name}'",
        why=f"it needs {enumerated(refusal.lacking)}",
        next_step=next_step,
    )


def require_nodes(profile: Profile, run: RunSpec) -> None:
    """Refuse a run of several nodes on a cluster whose runs are one pod each; asks no server.

    Raises:
        SpecError: names the clusters that would take it.
    """
    nodes = run.spec["hardware"]["nodes"]
    if nodes == 1 or profile.backend not in _ONE_POD:
        return
    raise SpecError(
        f"hardware.nodes is {nodes}, and cluster '{profile.name}' is of the backend {profile.backend}, where "
        f"{_ONE_POD[profile.backend]}",
        next_step=several_nodes_step(),
    )


def _on_a_cluster(request: Sequence[str]) -> str:
    """How the same run goes to a cluster, in words."""
    clusters = described_clusters()
    if clusters is None or not clusters.names:
        return "describe a cluster in launcher.yaml, and choose it with --cluster"
    others = f" (or {', '.join(clusters.names[1:])})" if clusters.names[1:] else ""
    return f"`{suggest('submit', *request, '--cluster', clusters.names[0])}`{others}"


def run_status(site: Site, run: str) -> RunStatus:
    """The state of one run; UNKNOWN where the backend does not answer.

    Raises:
        UsageError: not a name that a run can have.
        NotFoundError: there is no such run.
        BackendError: the backend answers, but a right is missing or the like.
    """
    with run_dir_errors():
        facts, run_facts = _observe(site, run, site.paths(run))
    if run_facts is None:
        raise NotFoundError(
            f"no run '{run}' in {site}",
            why=elsewhere(site),
            next_step=f"{site.suggest('status')} (lists the runs there are)",
        )
    return derive(facts, run_facts, now_s=time.time())


def elsewhere(site: Site) -> str | None:
    """Where a run may be that is not in this place, in words; None where no other place is described."""
    clusters = described_clusters()
    others = [name for name in (clusters.names if clusters else ()) if name != site.name]
    if clusters is None or not others:
        return None
    return f"only there was looked; {clusters.source} describes more: --cluster {' | '.join(others)}"


def run_statuses(site: Site) -> list[RunStatus]:
    """The state of every run that the backend or the root holds, by name; a broken one is UNKNOWN.

    The backend is asked once, whatever the number of runs.

    Raises:
        BackendError: the root cannot be listed, or the backend does not answer.
    """
    with run_dir_errors():
        known = dict(site.backend.list())
    for name in _directories(site):
        absent = BackendFacts(backend=site.backend.name, phase=Phase.ABSENT, reason="")
        known.setdefault(name, absent)
    now_s = time.time()
    statuses = []
    for name in sorted(known):
        run_facts = _facts_by_name(site, name, known[name])
        if run_facts is not None:
            statuses.append(derive(known[name], run_facts, now_s=now_s))
    return statuses


def _observe(site: Site, run: str, paths: RunPaths | None) -> tuple[BackendFacts, RunFacts | None]:
    """Both sides' facts; None for the run's where neither side knows it."""
    facts = site.backend.get(run)
    directory, why = _directory_facts(site, paths)
    if directory is not None and (site.local or directory.unreadable is None):
        return facts, directory
    if site.local or facts.phase is Phase.ABSENT:
        return facts, directory
    document = facts.document
    if document is None and facts.phase is not Phase.UNREACHABLE:
        try:
            document = site.backend.document(run)
        except BackendError as error:  # it went away between the two questions
            facts = BackendFacts(backend=facts.backend, phase=Phase.UNREACHABLE, reason=str(error))
    return facts, facts_without_directory(run, document, site.options, run_dir=_seen_here(paths), why=why)


def _facts_by_name(site: Site, name: str, facts: BackendFacts) -> RunFacts | None:
    """As `_observe`, for a run of a list: without another question to the backend."""
    try:
        paths = site.paths(name)
        directory, why = _directory_facts(site, paths)
    except RunDirError as error:
        paths = None
        directory, why = RunFacts(run=name, run_dir=f"{site.root}/{name}", unreadable=in_words(error)), None
    if directory is not None and (site.local or directory.unreadable is None):
        return directory
    if site.local or facts.phase is Phase.ABSENT:
        return directory
    return facts_without_directory(name, facts.document, site.options, run_dir=_seen_here(paths), why=why)


def _directory_facts(site: Site, paths: RunPaths | None) -> tuple[RunFacts | None, str | None]:
    """What the run directory says, None where there is none; and why it cannot be read, if it should be.

    On a cluster the directory is a window on what the pods do: trouble with it blocks nothing.
    """
    if paths is None or site.root is None:
        return None, None
    try:
        if site.local:
            return (read_facts(paths, site.options) if paths.root_dir.is_dir() else None), None
        if not site.root.is_dir():
            return None, f"run directories are not reachable in {site.root}: no such folder"
        if not paths.run_json.is_file():  # its pod has not started yet, or the folder is somebody else's
            return None, None
        facts = read_facts(paths, site.options, local=False)
    except OSError as error:
        if site.local:
            raise
        return None, f"its run directory is not reachable: {error.filename}: {error.strerror}"
    return (
        facts,
        None if facts.unreadable is None else f"its run directory is not reachable: {facts.unreadable}",
    )


def _seen_here(paths: RunPaths | None) -> str | None:
    return None if paths is None else str(paths.root_dir)


def _directories(site: Site) -> list[str]:
    """Names of run directories of a cluster's root that may be unknown to its server by now."""
    if site.local or site.root is None:
        return []
    try:
        return [path.parent.name for path in site.root.glob("*/run.json")]
    except OSError:
        return []


def _require_namespace(site: Site, run: RunSpec) -> None:
    """The run's object must lie where every other command looks for it."""
    namespace = run.spec.get("cluster", {}).get("namespace", site.profile.namespace)
    if site.local or namespace == site.profile.namespace:
        return
    raise SpecError(
        f"cluster.namespace is '{namespace}', and cluster '{site.name}' looks for its runs in "
        f"'{site.profile.namespace}'",
        why="status, logs and cancel know the cluster only, not the preset",
        next_step=f"set clusters.{site.name}.cluster.namespace in launcher.yaml instead",
    )


def _stored(paths: RunPaths | None) -> RunSpec | None:
    """The ``run.json`` of a cluster's run, where it can be read here."""
    if paths is None:
        return None
    try:
        return rundir.read_run(paths)
    except (rundir.NotARunError, rundir.StorageError):
        return None


def _refuse_foreign(paths: RunPaths, site: Site) -> None:
    """A folder that holds something and no ``run.json`` is somebody else's: nothing is put into it."""
    known = {"local"}  # a submit that was killed before it wrote run.json
    try:
        foreign = sorted(entry.name for entry in paths.root_dir.iterdir() if entry.name not in known)
    except FileNotFoundError:
        return
    except OSError as error:
        if not site.local:
            return
        raise rundir.StorageError.from_os_error(error, paths.root_dir, "listing") from None
    if any(not name.startswith(".run.json.") for name in foreign):
        raise UsageError(
            f"{paths.root_dir} exists and is no run: it has no run.json, but {', '.join(foreign[:3])}",
            next_step="choose another --name or --root, or move it away",
        )


def _conflict(run: str, difference: Sequence[str]) -> ConflictError:
    return ConflictError(
        f"run '{run}' exists with another spec; nothing was changed",
        why="there -> now:\n" + "\n".join(f"          {line}" for line in difference),
        next_step="give this one another name (--name or --suffix), or submit the existing run's settings",
    )
