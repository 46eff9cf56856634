"""The kubelet of all nodes: keeps them as ``FOLDER/nodes/*.json`` say, until it is stopped."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path

from tests.cluster.bench.api import Api
from tests.cluster.bench.kubelet.container import POD_VARIABLE
from tests.cluster.bench.kubelet.node import Node
from tests.cluster.bench.kubelet.pod import PodRun
from tests.cluster.bench.kubelet.server import serve
from tests.cluster.bench.processes import adopt_orphans, kill_carrying

_LOOK_EVERY_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("folder", "kubeconfig", "certificate", "key", "client-authority"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    folder: Path = options.folder
    nodes: dict[str, Node] = {}

    def find_pod(namespace: str, name: str) -> PodRun | None:
        runs = (run for node in list(nodes.values()) for run in list(node.pods.values()))
        return next((run for run in runs if (run.namespace, run.name) == (namespace, name)), None)

    def stop(*_: object) -> None:
        kill_carrying(POD_VARIABLE, f"{folder}/")
        os._exit(0)  # its threads wait for an API server that may be gone

    adopt_orphans()
    signal.signal(signal.SIGTERM, stop)
    port = serve(find_pod, options.certificate, options.key, options.client_authority)
    api = Api(options.kubeconfig, num_connections=64)
    while True:
        wanted = {path.stem: json.loads(path.read_text()) for path in (folder / "nodes").glob("*.json")}
        for name, spec in wanted.items():
            if name not in nodes:
                nodes[name] = Node(api, folder, port, name, spec)
            elif spec["connected"]:
                nodes[name].connected.set()
            else:
                nodes[name].connected.clear()
        for name in set(nodes) - set(wanted):
            nodes.pop(name).remove()
        time.sleep(_LOOK_EVERY_S)


if __name__ == "__main__":
    main()
