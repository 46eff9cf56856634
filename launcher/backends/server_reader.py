"""What a reader of a namespace's runs can do, whatever kind of object they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from influence.rundir import RunSpec
from launcher.backends.generations import Generation
from launcher.backends.kubernetes_api import KubernetesApi, Object
from launcher.backends.kueue import Workloads
from launcher.backends.pod_facts import PodFacts
from launcher.backends.run_pods import PodsLeft
from launcher.states import BackendFacts


class ObjectStatus(Protocol):
    """What an object of a run says of itself."""

    @property
    def uid(self) -> str: ...
    @property
    def suspended(self) -> bool: ...
    @property
    def suspended_by_us(self) -> bool: ...
    @property
    def cancelled(self) -> bool: ...
    @property
    def deleting(self) -> bool: ...
    @property
    def kueue_queue(self) -> str | None: ...
    @property
    def ended(self) -> bool:
        """Whether nothing of it will run any more, and nothing of it is left."""

    @property
    def at_rest(self) -> bool:
        """Whether it is suspended, and its pods are gone."""


class RunObjects(Protocol):
    """The objects of one run."""

    @property
    def run(self) -> str: ...
    @property
    def newest(self) -> Generation: ...
    def all_pods(self) -> Sequence[PodFacts]:
        """Of every generation, where they were asked for."""

    def attempt_pods(self) -> Sequence[PodFacts]:
        """Those in which a trainer runs: one an attempt, the oldest first."""


_Objects = TypeVar("_Objects", bound=RunObjects, covariant=True)


class Reader(Protocol[_Objects]):
    """What is known of a namespace's runs, and what is particular to their kind of object."""

    @property
    def api(self) -> KubernetesApi: ...
    @property
    def namespace(self) -> str: ...
    @property
    def workloads(self) -> Workloads: ...
    @property
    def left(self) -> PodsLeft: ...
    @property
    def kind(self) -> str:
        """``Job``."""

    @property
    def ending(self) -> Mapping[str, Any]:
        """The change of an object's ``spec`` that makes its controller end it and its pods soon."""

    def path(self, name: str | None = None) -> str: ...
    def objects(self, run: str) -> _Objects | None: ...
    def objects_and_pods(self, run: str) -> _Objects | None: ...
    def facts(self, run: str) -> BackendFacts: ...
    def all_facts(self) -> Mapping[str, BackendFacts]: ...
    def status(self, item: Mapping[str, Any]) -> ObjectStatus: ...
    def document(self, generation: Generation) -> RunSpec: ...
    def manifest(self, run: RunSpec, name: str) -> Object: ...
    def grace_s(self, item: Mapping[str, Any]) -> float:
        """What the pods of an object are given to stop."""
