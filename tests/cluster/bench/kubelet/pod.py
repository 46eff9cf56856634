"""One pod's life on a node."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cluster.bench.images import image_folder
from tests.cluster.bench.kubelet import environment, times, volumes
from tests.cluster.bench.kubelet.container import Container

if TYPE_CHECKING:
    from tests.cluster.bench.kubelet.node import Node

Json = dict[str, Any]

#: An image of such a name cannot be pulled.
MISSING_IMAGE = "missing/"
_RETRY_S = 0.5  # between looks for what keeps a container from starting
_MAX_RESTART_WAIT_S = 30.0


class PodRun:
    """A pod that was bound to a node: runs by itself until it ends or is stopped."""

    def __init__(self, node: Node, pod: Json) -> None:
        self.node = node
        self.pod = pod
        metadata = pod["metadata"]
        self.namespace, self.name, self.uid = metadata["namespace"], metadata["name"], metadata["uid"]
        self.folder = node.folder / "pods" / self.uid
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = pod["spec"]
        self._init = [Container(c, self.folder, is_init=True) for c in spec.get("initContainers", [])]
        self._main = [Container(c, self.folder, is_init=False) for c in spec["containers"]]
        self._started_at = times.seconds()
        self._phase = "Pending"
        self._stopping = threading.Event()
        """Nothing is started any more."""
        self._deleter: threading.Thread | None = None
        self._kill_at = float("inf")
        self._ended = threading.Event()
        self._telling = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"

    def container(self, name: str) -> Container | None:
        return next((c for c in (*self._init, *self._main) if c.name == name), None)

    def stop(self, grace_s: float) -> None:
        """SIGTERM, SIGKILL after ``grace_s``; then the API object goes. A later call can only shorten it."""
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)
        if self._deleter is None:
            self._stopping.set()
            self._deleter = threading.Thread(target=self._stop, daemon=True)
            self._deleter.start()

    def wait(self) -> None:
        """Until nothing of it runs."""
        self._ended.wait()

    def process_environment(self, container: Container) -> tuple[dict[str, str], dict[str, Path]]:
        """The variables of a container's processes, and its mounts.

        Raises:
            LookupError: something that it refers to isn't there.
        """
        mounts = volumes.folders(self.pod, container.spec, self.folder, self._claim_folder)
        own = environment.variables(self.pod, container.spec, self._lookup)
        own = {name: volumes.rewritten(value, mounts) for name, value in own.items()}
        own = {"HOME": str(self.folder), "HOSTNAME": self.name} | own
        return environment.of_image(image_folder(self.node.folder, container.spec["image"])) | own, mounts

    def _run(self) -> None:
        try:
            if self._run_init():
                threads = [
                    threading.Thread(target=self._run_container, args=[c], daemon=True) for c in self._main
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            self._stop_sidecars()
            for container in (*self._init, *self._main):
                container.never_started()
                container.ended.set()
            self._phase = "Succeeded" if all(c.exit_code == 0 for c in self._main) else "Failed"
            self._tell()
        finally:
            self._ended.set()

    def _run_init(self) -> bool:
        """Whether the main containers may start."""
        for container in self._init:
            if container.is_sidecar:
                threading.Thread(target=self._run_container, args=[container], daemon=True).start()
                while "waiting" in container.state and not self._stopping.wait(0.02):
                    pass
                continue
            self._run_container(container)
            if container.exit_code != 0:
                return False
        return not self._stopping.is_set()

    def _run_container(self, container: Container) -> None:
        """Starts it, and again as its restart policy says, until it has ended for good."""
        for attempt in itertools.count():
            if not self._start(container):
                break
            if not container.is_init:
                self._phase = "Running"
            self._tell()
            container.wait()
            if self._stopping.is_set() or not self._restarts(container):
                break
            wait_s = min(2.0**attempt, _MAX_RESTART_WAIT_S)
            container.restart_later(wait_s)
            self._tell()
            if self._stopping.wait(wait_s):
                break
        container.ended.set()

    def _restarts(self, container: Container) -> bool:
        if container.is_sidecar:
            return True
        policy = self.pod["spec"].get("restartPolicy", "Always")
        if container.exit_code == 0:
            return bool(policy == "Always" and not container.is_init)
        return bool(policy != "Never")

    def _start(self, container: Container) -> bool:
        """Waits until everything is there; False where the pod was stopped before."""
        image = container.spec.get("image", "")
        for look in itertools.count():
            if self._stopping.is_set():
                return False
            if MISSING_IMAGE in image:
                self._wait_for_image(container, look)
            else:
                try:
                    variables, mounts = self.process_environment(container)
                    break
                except LookupError as error:
                    reason = {"reason": "CreateContainerConfigError", "message": str(error)}
                    container.state = {"waiting": reason}
            self._tell()
            self._stopping.wait(_RETRY_S)
        words = [*container.spec.get("command", []), *container.spec.get("args", [])]
        command = [volumes.rewritten(environment.expand(word, variables), mounts) for word in words]
        wanted = Path(volumes.rewritten(container.spec.get("workingDir", ""), mounts) or self.folder)
        container.start(command, variables, wanted if wanted.is_dir() else self.folder)
        if self._stopping.is_set():  # it may have been started just after the signal
            container.signal(signal.SIGTERM)
        self.node.event(self.pod, "Normal", "Started", f"Started container {container.name}")
        return True

    def _wait_for_image(self, container: Container, look: int) -> None:
        image = container.spec["image"]
        if look % 2 == 0:
            message = f'failed to pull and unpack image "{image}": {image}: not found'
            container.state = {"waiting": {"reason": "ErrImagePull", "message": message}}
        else:
            message = f'Back-off pulling image "{image}": ErrImagePull: {image}: not found'
            container.state = {"waiting": {"reason": "ImagePullBackOff", "message": message}}
        if look < 2:
            self.node.event(self.pod, "Warning", "BackOff" if look else "Failed", message)

    def _stop(self) -> None:
        self.node.event(self.pod, "Normal", "Killing", f"Stopping pod {self.name}")
        for container in self._main:
            container.signal(signal.SIGTERM)
        while not self._ended.wait(0.05):
            if time.monotonic() >= self._kill_at:
                for container in (*self._init, *self._main):
                    container.signal(signal.SIGKILL)
        self.node.delete_pod(self.pod)

    def _stop_sidecars(self) -> None:
        """After the main containers, which may need them to the last."""
        grace_s = self.pod["spec"].get("terminationGracePeriodSeconds", 30)
        kill_at = min(self._kill_at, time.monotonic() + grace_s)
        self._stopping.set()
        for container in self._init:
            container.signal(signal.SIGTERM)
            while container.is_sidecar and not container.ended.wait(0.05):
                if time.monotonic() >= min(kill_at, self._kill_at):
                    container.signal(signal.SIGKILL)

    def _tell(self) -> None:
        """Sends the status as it is now; in order, since only one thread sends at a time."""
        with self._telling:
            ready = self._phase == "Running" and all("running" in c.state for c in self._main)
            facts = {
                "Initialized": all(c.is_sidecar or c.exit_code == 0 for c in self._init),
                "Ready": ready,
                "ContainersReady": ready,
                "PodReadyToStartContainers": self._phase == "Running",
            }
            now = times.seconds()
            conditions = [
                {"type": name, "status": "True" if fact else "False", "lastTransitionTime": now}
                for name, fact in facts.items()
            ]
            status: Json = {
                "phase": self._phase,
                "startTime": self._started_at,
                "hostIP": "127.0.0.1",
                "podIP": "127.0.0.1",
                "podIPs": [{"ip": "127.0.0.1"}],
                "conditions": conditions,
                "containerStatuses": [c.status() for c in self._main],
            }
            if self._init:
                status["initContainerStatuses"] = [c.status() for c in self._init]
            self.node.tell_pod_status(self.path, self.uid, status)

    def _lookup(self, kind: str, name: str) -> Json | None:
        return self.node.find(f"/api/v1/namespaces/{self.namespace}/{kind}/{name}")

    def _claim_folder(self, name: str) -> Path:
        claim = self._lookup("persistentvolumeclaims", name)
        if claim is None:
            raise LookupError(f'persistentvolumeclaim "{name}" not found')
        volume = self.node.find(f"/api/v1/persistentvolumes/{claim['spec'].get('volumeName')}")
        if volume is None or "hostPath" not in volume["spec"]:
            raise LookupError(f'persistentvolumeclaim "{name}" has no volume that is a folder')
        return Path(volume["spec"]["hostPath"]["path"])
