"""What a test holds of the control plane: nodes, namespaces, kubeconfigs and faults."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from tests.cluster.bench import programs
from tests.cluster.bench.api import CORE, Api, Json, tolerated
from tests.cluster.bench.controlplane import CHECKOUT
from tests.cluster.bench.namespace import Namespace
from tests.cluster.bench.waiting import until

GPU_PRODUCT = "NVIDIA-H200"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """What the kubelet reads of a node, from ``nodes/NAME.json``."""

    num_gpus: int = 8
    labels: Mapping[str, str] = field(default_factory=dict)
    connected: bool = True
    """False: no lease, no status, no reaction to anything, while its pods' processes go on."""


class Bench:
    """A running control plane. ``kubeconfig`` is an administrator's."""

    def __init__(self, folder: Path) -> None:
        """Starts it below ``folder``; it ends with this process at the latest.

        Raises:
            NoProgramError: there is no binary, and no Go to build it.
        """
        programs.controlplane()  # built here, so that a missing Go is told to the test
        self.folder = folder
        (folder / "log").mkdir(parents=True)
        self._numbers = itertools.count(1)
        self._connection, theirs = socket.socketpair()
        with theirs, (folder / "log" / "serve.log").open("wb") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.bench.serve", str(folder), str(theirs.fileno())],
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the tests; their end is noticed by the socket's
            )
        self._answers = self._connection.makefile("r")
        self._request("wait")
        self.kubeconfig = folder / "pki" / "admin.kubeconfig"
        self.api = Api(self.kubeconfig)

    def close(self) -> None:
        """Returns when no process is left."""
        self._answers.close()
        self._connection.close()
        self._supervisor.wait()

    # Nodes

    def add_node(self, name: str, *, num_gpus: int = 8, labels: Mapping[str, str] | None = None) -> None:
        """A node like those of a GPU cluster; returns when it takes pods. Harmless when repeated."""
        _write_json(self._node_file(name), asdict(NodeSpec(num_gpus=num_gpus, labels=labels or {})))
        self.wait_for_node(name)

    def lose_node(self, name: str) -> None:
        """Cuts a node off: in ten seconds it is NotReady, and its pods are marked for deletion and stay."""
        spec = json.loads(self._node_file(name).read_text())
        _write_json(self._node_file(name), {**spec, "connected": False})

    def find_node(self, name: str) -> None:
        """Undoes ``lose_node``; returns when it takes pods again."""
        spec = json.loads(self._node_file(name).read_text())
        _write_json(self._node_file(name), {**spec, "connected": True})
        self.wait_for_node(name)

    def remove_node(self, name: str) -> None:
        """Takes a node and its pods away, and returns when it is gone; harmless where there is none."""
        self._node_file(name).unlink(missing_ok=True)
        until(lambda: self.api.find(f"{CORE}/nodes/{name}") is None, f"node {name} gone")

    def wait_for_node(self, name: str) -> None:
        def takes_pods() -> bool:
            node = self.api.find(f"{CORE}/nodes/{name}")
            return node is not None and _is_ready(node) and not node["spec"].get("taints")

        until(takes_pods, f"node {name} ready")

    # Namespaces and who may do what in them

    @contextlib.contextmanager
    def namespace(self, prefix: str = "test") -> Iterator[Namespace]:
        """A fresh namespace; what runs in it is killed afterwards, and its deletion isn't waited for."""
        name = f"{prefix}-{os.getpid()}-{next(self._numbers)}"
        self.api.create(f"{CORE}/namespaces", {"metadata": {"name": name}})
        account = f"{CORE}/namespaces/{name}/serviceaccounts/default"
        until(lambda: self.api.find(account), f"the default service account of {name}")
        namespace = Namespace(self.api, name, self.folder)
        try:
            yield namespace
        finally:
            namespace.clear()

    def apply_crds(self, project: str) -> None:
        """Installs the resource definitions of ``kuberay``, ``kueue`` or ``kai``; harmless when repeated."""
        collection = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        # A megabyte each: PyYAML's own parser takes six seconds for KubeRay's four.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        names = []
        for file in programs.crds(project):
            document = yaml.load(file.read_text(), loader)  # noqa: S506 - it is a safe loader
            names.append(document["metadata"]["name"])
            with tolerated(409):
                self.api.create(collection, document)
        for name in names:

            def established(name: str = name) -> bool:
                status = self.api.get(f"{collection}/{name}").get("status", {})
                conditions = status.get("conditions") or []  # null at first
                return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)

            until(established, f"CRD {name} established")

    def create_priority(self, name: str, value: int) -> None:
        """A priority class; harmless when repeated."""
        with tolerated(409):
            body = {"metadata": {"name": name}, "value": value}
            self.api.create("/apis/scheduling.k8s.io/v1/priorityclasses", body)

    # Faults

    @contextlib.contextmanager
    def apiserver_killed(self) -> Iterator[None]:
        """Connections break and new ones are refused; ready again, with the same data, when this returns."""
        self._request("kill_apiserver")
        try:
            yield
        finally:
            self._request("start_apiserver")

    def restart_apiserver(self) -> None:
        """Away for about two seconds."""
        with self.apiserver_killed():
            pass

    def _request(self, what: str) -> None:
        self._connection.sendall(json.dumps({"do": what}).encode() + b"\n")
        line = self._answers.readline()
        if not line:
            log = (self.folder / "log" / "serve.log").read_text(errors="replace")
            raise RuntimeError(f"the control plane's supervisor ended:\n{log[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])

    def _node_file(self, name: str) -> Path:
        return self.folder / "nodes" / f"{name}.json"


def _is_ready(node: Json) -> bool:
    conditions = node.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _write_json(path: Path, document: Json) -> None:
    """Whole or not at all, for the kubelet reads it at any time."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(document))
    temporary.replace(path)
