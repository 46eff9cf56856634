"""One node: registered, kept alive, its pods watched."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.bench.api import CORE, Api, ApiError, tolerated
from tests.cluster.bench.kubelet import times
from tests.cluster.bench.kubelet.pod import PodRun

Json = dict[str, Any]
Answer = TypeVar("Answer")

LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_BEAT_S = 2.0
_STATUS_EVERY_BEATS = 5
_RETRY_S = 0.2
_PASSING = {429, 500, 502, 503, 504}


class Node:
    """A node with GPUs of one kind. While it is not ``connected`` it hears and says nothing, and its pods'
    processes go on."""

    def __init__(self, api: Api, folder: Path, port: int, name: str, spec: Json) -> None:
        self.folder = folder
        self.name = name
        self.pods: dict[str, PodRun] = {}
        self.connected = threading.Event()
        self._api = api
        self._port = port
        self._spec = spec
        self._removed = False
        if spec["connected"]:
            self.connected.set()
        for loop in (self._beat, self._watch):
            threading.Thread(target=loop, daemon=True).start()

    def remove(self) -> None:
        """With its pods' processes and its API object."""
        self._removed = True
        self.connected.set()
        for pod in list(self.pods.values()):
            pod.stop(0)
        with tolerated(404):
            self._patiently(lambda: self._api.delete(f"{CORE}/nodes/{self.name}"))

    # What pods say and ask

    def find(self, path: str) -> Json | None:
        return self._patiently(lambda: self._api.find(path))

    def tell_pod_status(self, path: str, uid: str, status: Json) -> None:
        body = {"metadata": {"uid": uid}, "status": status}
        with contextlib.suppress(ApiError):  # 404, 409: it is gone, or another has its name
            self._patiently(lambda: self._api.patch(f"{path}/status", body, "strategic"))

    def delete_pod(self, pod: Json) -> None:
        """The API object, when nothing of the pod runs any more."""
        metadata = pod["metadata"]
        path = f"{CORE}/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
        with contextlib.suppress(ApiError):  # 404, 409: as above
            self._patiently(lambda: self._api.delete(path, body))

    def event(self, pod: Json, kind: str, reason: str, message: str) -> None:
        """``kind``: Normal or Warning. An event that cannot be written now is lost, as a kubelet's is."""
        metadata = pod["metadata"]
        about = {"kind": "Pod", "apiVersion": "v1"} | {k: metadata[k] for k in ("name", "namespace", "uid")}
        now = times.seconds()
        body = {
            "metadata": {"generateName": f"{metadata['name']}."},
            "involvedObject": about,
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": self.name},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        if self.connected.is_set():
            with contextlib.suppress(ApiError, ConnectionError):
                self._api.create(f"{CORE}/namespaces/{metadata['namespace']}/events", body)

    # The node itself

    def _beat(self) -> None:
        self._register()
        beats = 0
        while not self._removed:
            if not self.connected.is_set():
                self.connected.wait()
                beats = 0  # the controllers hold it for lost: the status comes first
            if beats % _STATUS_EVERY_BEATS == 0:
                self._patiently(self._tell_status)
            self._patiently(self._renew_lease)
            beats += 1
            time.sleep(_BEAT_S)

    def _register(self) -> None:
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "nvidia.com/gpu.product": "NVIDIA-H200",
            "nvidia.com/gpu.count": str(self._spec["num_gpus"]),
            **self._spec["labels"],
        }
        body = {"metadata": {"name": self.name, "labels": labels}}
        try:
            self._patiently(lambda: self._api.create(f"{CORE}/nodes", body))
        except ApiError as error:
            if error.status != 409:
                raise
            self._patiently(lambda: self._api.patch(f"{CORE}/nodes/{self.name}", body))

    def _tell_status(self) -> Json:
        now = times.seconds()
        facts = {"Ready": True, "MemoryPressure": False, "DiskPressure": False, "PIDPressure": False}
        conditions = [
            {
                "type": name,
                "status": str(fact),
                "reason": "KubeletReady" if fact else "KubeletHasNo" + name,
                "lastHeartbeatTime": now,
                "lastTransitionTime": now,
            }
            for name, fact in facts.items()
        ]
        capacity = {
            "cpu": "192",
            "memory": "2Ti",
            "ephemeral-storage": "10Ti",
            "pods": "110",
            "nvidia.com/gpu": str(self._spec["num_gpus"]),
        }
        unknown = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion")
        status = {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": conditions,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._port}},
            # Without it the API server speaks SPDY to this kubelet for exec, which our server does not.
            "declaredFeatures": ["ExtendWebSocketsToKubelet"],
            "nodeInfo": {
                **dict.fromkeys(unknown, "bench"),
                "kubeletVersion": "v1.36.2",
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": "amd64",
            },
        }
        return self._api.patch(f"{CORE}/nodes/{self.name}/status", {"status": status}, "strategic")

    def _renew_lease(self) -> Json:
        spec = {"holderIdentity": self.name, "leaseDurationSeconds": 40, "renewTime": times.microseconds()}
        try:
            return self._api.patch(f"{LEASES}/{self.name}", {"spec": spec})
        except ApiError as error:
            if error.status != 404:
                raise
            return self._api.create(LEASES, {"metadata": {"name": self.name}, "spec": spec})

    def _watch(self) -> None:
        """Follows the pods that are bound to this node, from a list on; after any trouble with a new list."""
        mine = {"fieldSelector": f"spec.nodeName={self.name}"}
        while not self._removed:
            try:
                listed = self._patiently(lambda: self._api.get(f"{CORE}/pods", **mine))
                present = {pod["metadata"]["uid"] for pod in listed["items"]}
                for pod in listed["items"]:
                    self._see(pod)
                for uid in set(self.pods) - present:
                    self._gone(uid)
                for event in self._api.watch(f"{CORE}/pods", listed["metadata"]["resourceVersion"], **mine):
                    self.connected.wait()
                    if event["type"] == "ERROR":
                        break
                    if event["type"] == "DELETED":
                        self._gone(event["object"]["metadata"]["uid"])
                    else:
                        self._see(event["object"])
            except (ApiError, ConnectionError):
                time.sleep(_RETRY_S)

    def _see(self, pod: Json) -> None:
        metadata, status = pod["metadata"], pod["status"]
        run = self.pods.get(metadata["uid"])
        if "deletionTimestamp" in metadata:
            if run is not None:
                run.stop(metadata.get("deletionGracePeriodSeconds", 30))
            else:
                self.delete_pod(pod)
        elif run is None and status.get("phase") == "Pending":
            self.pods[metadata["uid"]] = PodRun(self, pod)

    def _gone(self, uid: str) -> None:
        """The API object was removed; by force, where the pod still runs."""
        run = self.pods.pop(uid, None)
        if run is not None:
            run.stop(0)
            threading.Thread(target=self._clean, args=[run], daemon=True).start()

    def _clean(self, run: PodRun) -> None:
        run.wait()
        shutil.rmtree(run.folder, ignore_errors=True)

    def _patiently(self, call: Callable[[], Answer]) -> Answer:
        """Waits until this node is connected and the API server answers.

        Raises:
            ApiError: it refused.
        """
        while True:
            self.connected.wait()
            try:
                return call()
            except ConnectionError:
                time.sleep(_RETRY_S)
            except ApiError as error:
                if error.status not in _PASSING:
                    raise
                time.sleep(_RETRY_S)
