"""The four programs of a control plane, started and stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.cluster.bench import processes
from tests.cluster.bench.api import CORE, Api, ApiError
from tests.cluster.bench.pki import Authority
from tests.cluster.bench.waiting import until

HOST = "127.0.0.1"
CHECKOUT = Path(__file__).parents[3]
#: A pod that fails is replaced at once, where Kubernetes waits 10 s, then 20 s, ...
FAST_JOBS = {"JOB_POD_FAILURE_BACKOFF": "200ms", "JOB_SYNC_BATCH_PERIOD": "100ms"}
#: A node that is silent so long is lost (40 s in Kubernetes). A busy machine must not make it silent.
NODE_GRACE_PERIOD_S = 10
#: So long after that, its pods are marked for deletion (300 s in Kubernetes).
LOST_NODE_TOLERATION_S = 2


class ControlPlane:
    """etcd, API server, controller manager, scheduler and kubelet below one folder.

    All of them are children of the thread that calls, and are killed with it.
    """

    def __init__(self, program: Path, folder: Path) -> None:
        self._program = program
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "log").mkdir(parents=True, exist_ok=True)
        etcd_port, peer_port, self._port = processes.free_ports(3)
        self._etcd_url, self._peer_url = f"http://{HOST}:{etcd_port}", f"http://{HOST}:{peer_port}"
        self.url = f"https://{HOST}:{self._port}"
        authority = self._authority = Authority(folder / "pki")
        self._tokens_private, self._tokens_public = authority.service_account_keys()
        self.kubeconfig = authority.kubeconfig("admin", self.url, "bench-admin", "system:masters")

    def start(self) -> None:
        """Returns when a pod could be created.

        Raises:
            RuntimeError: a program ended; the message has the end of its log.
            TimeoutError: it is not ready in time.
        """
        self._start(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            f"--initial-cluster=default={self._peer_url}",
            "--unsafe-no-fsync",  # nothing here outlives the machine
            "--log-level=warn",
        )
        self.start_apiserver()
        controllers = self._authority.kubeconfig("controllers", self.url, "system:kube-controller-manager")
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={controllers}",
            "--secure-port=0",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self._tokens_private}",
            f"--root-ca-file={self._authority.certificate}",
            "--kube-api-qps=1000",
            "--kube-api-burst=1000",
            "--node-monitor-period=1s",
            f"--node-monitor-grace-period={NODE_GRACE_PERIOD_S}s",
        )
        scheduler = self._authority.kubeconfig("scheduler", self.url, "system:kube-scheduler")
        self._start(
            "kube-scheduler",
            f"--kubeconfig={scheduler}",
            "--secure-port=0",
            "--leader-elect=false",
            "--kube-api-qps=1000",
            "--kube-api-burst=1000",
        )
        self._start_kubelet()
        account = f"{CORE}/namespaces/default/serviceaccounts/default"
        self._wait("kube-controller-manager", lambda api: api.find(account) is not None)

    def start_apiserver(self) -> None:
        """Returns when it is ready; a second start takes up the first one's port and data."""
        certificate, key = self._authority.server("kube-apiserver")
        client_certificate, client_key = self._authority.client(
            "kubelet-client", "apiserver", "system:masters"
        )
        self._start(
            "kube-apiserver",
            f"--etcd-servers={self._etcd_url}",
            f"--bind-address={HOST}",
            f"--advertise-address={HOST}",
            f"--secure-port={self._port}",
            "--endpoint-reconciler-type=none",
            f"--client-ca-file={self._authority.certificate}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._tokens_public}",
            f"--service-account-signing-key-file={self._tokens_private}",
            f"--kubelet-client-certificate={client_certificate}",
            f"--kubelet-client-key={client_key}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--default-not-ready-toleration-seconds={LOST_NODE_TOLERATION_S}",
            f"--default-unreachable-toleration-seconds={LOST_NODE_TOLERATION_S}",
            "--profiling=false",
        )
        self._wait("kube-apiserver", lambda api: api.text("/readyz") == "ok")

    def kill_apiserver(self) -> None:
        """Gone at once; connections break, as when its machine fails."""
        process = self._processes.pop("kube-apiserver")
        process.kill()
        process.wait()

    def stop(self) -> None:
        """Everything, and etcd's data; the logs stay."""
        # The kubelet first: it kills the pods' processes.
        for process in reversed(self._processes.values()):
            processes.stop(process)
        self._processes.clear()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def failed(self) -> str | None:
        """A program that ended though nobody stopped it, with the end of its log."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                log = (self.folder / "log" / f"{name}.log").read_text(errors="replace")
                return f"{name} ended with exit code {process.returncode}:\n{log[-2000:]}"
        return None

    def _start(self, name: str, *flags: str) -> None:
        log = self.folder / "log" / f"{name}.log"
        environment = {**os.environ, **FAST_JOBS}
        self._processes[name] = processes.start([self._program, name, *flags], log, environment)

    def _start_kubelet(self) -> None:
        certificate, key = self._authority.server("kubelet")
        kubeconfig = self._authority.kubeconfig("kubelet", self.url, "bench-kubelet", "system:masters")
        (self.folder / "nodes").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.cluster.bench.kubelet"]
        flags = [f"--folder={self.folder}", f"--kubeconfig={kubeconfig}", f"--certificate={certificate}"]
        flags += [f"--key={key}", f"--client-authority={self._authority.certificate}"]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        log = self.folder / "log" / "kubelet.log"
        self._processes["kubelet"] = processes.start([*command, *flags], log, environment)

    def _wait(self, name: str, ready: Callable[[Api], bool]) -> None:
        api = Api(self.kubeconfig)

        def answer() -> bool:
            if words := self.failed():
                raise RuntimeError(words)
            with contextlib.suppress(ApiError, ConnectionError):
                return ready(api)
            return False

        until(answer, f"{name} ready (its log: {self.folder / 'log' / name}.log)")
