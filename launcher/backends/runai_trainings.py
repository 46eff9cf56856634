"""The trainings of a Run:ai project, as runs: found by exact name and by what they carry.

A filter of the server's narrows an answer down and is not relied on: name and project are compared here, too.
Deleted trainings stay in a listing of their own, which is where a run that was cancelled is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from influence.rundir import RunSpec
from launcher.backends.generations import generation_number
from launcher.backends.runai_answers import ShapeError, Training, Workload, identifier, training
from launcher.backends.runai_answers import workload as parse_workload
from launcher.backends.runai_client import RunaiClient
from launcher.backends.runai_refusals import NotThereError
from launcher.errors import BackendError
from launcher.kubernetes_values import RUN_LABEL, SPEC_LABEL, spec_label
from launcher.profiles import RunaiAccess

WORKLOADS = "/api/v1/workloads"
TRAININGS = "/api/v1/workloads/trainings"
PROJECTS = "/api/v1/org-unit/projects"
CLUSTERS = "/api/v1/clusters"
#: Workloads that carry no run document in a list are taken for runs only if they are named like one.
_RUN_PREFIX = "infl-"
_MAX_DELETED = 500
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One training of a run."""

    number: int
    """From 1."""
    workload: Workload
    document: RunSpec | None
    spec_label: str | None
    """The first digits of the spec's hash; None where Run:ai no longer tells."""


@dataclass(frozen=True, slots=True)
class Found:
    """What stands under a run's names."""

    generations: list[Generation] = field(default_factory=list)
    """The oldest first."""
    foreign: Mapping[str, Workload] = field(default_factory=dict)
    """What is there under one of the run's names and is none of its trainings, by name."""

    @property
    def newest(self) -> Generation | None:
        return self.generations[-1] if self.generations else None


@dataclass(frozen=True, slots=True)
class Place:
    """Run:ai's ids of where trainings are created."""

    project_id: str
    cluster_id: str


class Trainings:
    """The trainings of one project; every method raises BackendError where Run:ai does not tell."""

    def __init__(self, client: RunaiClient, access: RunaiAccess) -> None:
        if (
            not access.project
            or any(c in access.project for c in ",=!<>")
            or not access.project.isprintable()
        ):
            raise BackendError(
                f"the profile's runai.project cannot be a project's name: {access.project[:80]!a}",
                next_step="write the project's name as Run:ai shows it",
            )
        self._client = client
        self._access = access

    def of_run(self, run: str) -> Found:
        """The run's trainings, deleted ones included."""
        found, foreign = self._confirmed(run, deleted=False)
        deleted, _ = self._confirmed(run, deleted=True)
        by_number = {
            each.number: each for each in sorted(deleted, key=lambda each: each.workload.deleted_at or "")
        }
        numbers = [each.number for each in found]
        if len(set(numbers)) < len(numbers):
            ids = ", ".join(each.workload.id for each in found)
            raise BackendError(
                f"{self._client.place}: project '{self._access.project}' has several workloads of one name "
                f"for run '{run}'",
                why=f"their ids are {ids}",
                next_step="delete all but one of them in Run:ai",
            )
        by_number |= {each.number: each for each in found}
        return Found([by_number[number] for number in sorted(by_number)], foreign)

    def every(self) -> dict[str, list[Generation]]:
        """All runs' trainings by run, the oldest first: one listing, and one page of what was deleted."""
        found: dict[str, dict[int, Generation]] = {}
        there = self._list(deleted=False)  # first: one that is deleted between the two is then in both
        listed = [*self._list(deleted=True), *there]
        names = {each.name for each in listed}
        for each in listed:
            run = _run_of(each, names)
            number = None if run is None else generation_number(run, each.name)
            if run is None or number is None:
                continue
            found.setdefault(run, {})[number] = Generation(
                number=number, workload=each, document=each.document,
                spec_label=spec_label(each.document.spec_hash) if each.document else None,
            )  # fmt: skip
        return {run: [numbers[n] for n in sorted(numbers)] for run, numbers in found.items()}

    def named(self, run: str, name: str) -> Generation | Workload | None:
        """What has exactly this name now: a training of the run, something else, or nothing."""
        for each in self._list(deleted=False, run=run):
            if each.name == name:
                return self._confirm(run, each) or each
        return None

    def place(self) -> Place:
        """Looks up the project, and the cluster where the profile names one.

        Raises:
            BackendError: there is none of the name; says which there are.
        """
        wanted = self._access.project
        projects = list(self._client.pages(PROJECTS, "projects", filterBy=f"name=={wanted}"))
        own = [each for each in projects if isinstance(each, Mapping) and each.get("name") == wanted]
        if not own:
            raise BackendError(
                f"{self._client.place} has no project '{wanted}' for these credentials",
                next_step="check the profile's runai.project, and that the account has a role there",
            )
        cluster_id = None if self._access.cluster is None else self._cluster_id(self._access.cluster)
        if cluster_id is not None:
            own = [each for each in own if each.get("clusterId") in (cluster_id, None)]
        if len(own) != 1:
            where = "" if cluster_id is None else f" on cluster '{self._access.cluster}'"
            raise BackendError(
                f"{self._client.place} has {len(own) or 'no'} projects '{wanted}'{where}",
                next_step="set the profile's runai.cluster to the name of the cluster that has the project",
            )
        return self._shaped(
            PROJECTS,
            lambda: Place(identifier(own[0], "id"), cluster_id or identifier(own[0], "clusterId")),
        )

    def _cluster_id(self, wanted: str) -> str:
        answer = self._client.get(CLUSTERS)
        clusters = answer.get("clusters") if isinstance(answer, dict) else answer
        if not isinstance(clusters, list):
            raise self._client.misshapen(CLUSTERS, "no list of clusters")
        known = [each for each in clusters if isinstance(each, Mapping)]
        for each in known:
            if wanted in (each.get("uuid"), each.get("name")):
                return self._shaped(CLUSTERS, partial(identifier, each, "uuid"))
        names = ", ".join(str(each.get("name"))[:60] for each in known[:10])
        raise BackendError(
            f"{self._client.place} has no cluster '{wanted}'",
            why=f"there are: {names}" if names else "it tells of none",
            next_step="correct the profile's runai.cluster, or leave it out",
        )

    def _confirmed(self, run: str, *, deleted: bool) -> tuple[list[Generation], dict[str, Workload]]:
        generations, foreign = [], {}
        for each in self._list(deleted=deleted, run=run):
            confirmed = self._confirm(run, each)
            if confirmed is not None:
                generations.append(confirmed)
            elif generation_number(run, each.name) is not None:
                foreign[each.name] = each
        return generations, foreign

    def _confirm(self, run: str, each: Workload) -> Generation | None:
        """The workload as a generation of the run, if it is one by what it carries, too."""
        number = generation_number(run, each.name)
        if number is None:
            return None
        document, label = each.document, None
        if document is None:
            details = self.details(each)
            if details is None or run not in (details.labels.get(RUN_LABEL), _name(details.document)):
                return None
            document, label = details.document, details.labels.get(SPEC_LABEL)
        if document is not None and document.run != run:
            return None  # copied in Run:ai's own pages, under another name
        return Generation(
            number=number, workload=each, document=document,
            spec_label=spec_label(document.spec_hash) if document else label,
        )  # fmt: skip

    def details(self, each: Workload) -> Training | None:
        """Labels and variables; None where Run:ai has no training of the id (any more)."""
        path = f"{TRAININGS}/{each.id}"
        try:
            answer = self._client.get(path)
        except NotThereError:
            return None
        return self._shaped(path, partial(training, answer))

    def _list(self, *, deleted: bool, run: str | None = None) -> list[Workload]:
        conditions = [f"projectName=={self._access.project}", *([f"name=^{run}"] if run else [])]
        query = {"filterBy": ",".join(conditions), "sortBy": "createdAt"}
        if deleted:
            query |= {"deleted": "true", "sortOrder": "desc"}
        pages = self._client.pages(
            WORKLOADS, "workloads", max_items=_MAX_DELETED if deleted else None, **query
        )
        listed: dict[str, Workload] = {}
        for entry in pages:
            each = self._shaped(WORKLOADS, partial(parse_workload, entry))
            if each.project == self._access.project and deleted == (each.deleted_at is not None):
                listed[each.id] = each  # a page may repeat what moved meanwhile
        return list(listed.values())

    def _shaped(self, path: str, read: Callable[[], _T]) -> _T:
        problem = ""
        try:
            return read()
        except ShapeError as error:
            problem = str(error)
        raise self._client.misshapen(path, problem)


def _run_of(each: Workload, names: Iterable[str]) -> str | None:
    """The run that a workload of a list belongs to, without asking for more."""
    if each.document is not None:
        return each.document.run
    if each.tells_variables or not each.name.startswith(_RUN_PREFIX):
        return None
    base, dash, suffix = each.name.rpartition("-r")
    is_later = dash and suffix.isdecimal() and base in names and generation_number(base, each.name)
    return base if is_later else each.name


def _name(document: RunSpec | None) -> str | None:
    return None if document is None else document.run
