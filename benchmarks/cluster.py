"""What the launcher costs on a cluster, beside the least that the same questions cost, in the same run.

    python benchmarks/cluster.py [--runs 11] [--jobs 500]

It starts the test control plane (``make controlplane`` builds it) with two GPU nodes. A floor is the same
request by urllib3 and json in a process that runs already, with a connection that is open: no interpreter to
start, no settings to resolve, no TLS handshake. Processes are measured by the clock from their start to their
end; peaks are ``ru_maxrss``, which is never less than what the process had that started them (38 MiB here).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cluster.bench.api import Api, Json
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.proxy import Proxy
from tests.cluster.user import User, install

IMPORTS = {
    "python -c pass": "pass",
    "import click": "import click",
    "import launcher.group": "import launcher.group",
    "import what submit needs to make a Job": "import launcher.commands.submit, launcher.spec,"
    " launcher.presets, launcher.model, launcher.render, jinja2, yaml",
    "import the official client's connection": "from kubernetes.client.api_client import ApiClient;"
    " from kubernetes.config import load_kube_config",
    "import of it what the launcher uses": "from launcher.backends.client_imports import client_classes;"
    " client_classes()",
}


@dataclass(frozen=True, slots=True)
class Process:
    """One that has ended."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output: str


def measured(words: list[str], environment: dict[str, str], folder: Path) -> Process:
    """Run a program to its end; raises where it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{words}: {process.returncode}\n{text}")
    return Process(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)


def timed_s(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Benchmark:
    """A user on a control plane."""

    def __init__(self, bench: Bench, user: User, num_runs: int) -> None:
        self.bench, self.user, self.num_runs = bench, user, num_runs
        self.jobs = f"{user.namespace.batch}/jobs"

    def launcher(self, *words: str) -> Process:
        return measured([sys.executable, "-m", "launcher", *words], self.user.environment, self.user.home)

    def submit_words(self, run: str) -> tuple[str, ...]:
        # No node has such GPUs: the Jobs wait, and the machine is free for what is measured.
        return (*self.user.submit_words(run, "bench/image:1"), "--set", "hardware.gpu_product=NVIDIA-B300")

    def submits(self) -> tuple[list[Process], list[float]]:
        """Submits, and creates of the same Job under another name; in turn."""
        processes, floors = [], []
        for number in range(self.num_runs + 1):
            processes.append(self.launcher(*self.submit_words(f"infl-submit-{number}")))
            body = self.copy_of(f"infl-submit-{number}", f"raw-{number}")
            floors.append(timed_s(lambda body=body: self.bench.api.create(self.jobs, body)))
        return processes[1:], floors[1:]

    def copy_of(self, name: str, new: str) -> Json:
        """A Job as it was before the server had it."""
        job = self.bench.api.get(f"{self.jobs}/{name}")
        template = copy.deepcopy(job["spec"]["template"])
        labels = job["metadata"]["labels"] | {"infl/run": new}
        template["metadata"]["labels"] = {k: v for k, v in labels.items() if k.startswith("infl/")}
        spec = {k: v for k, v in job["spec"].items() if k not in ("selector", "manualSelector")}
        metadata = {"name": new, "labels": labels, "annotations": job["metadata"]["annotations"]}
        return {"metadata": metadata, "spec": {**spec, "template": template}}

    def fill(self, num_jobs: int) -> None:
        """So many Jobs of runs, each with its pod, which waits."""
        existing = len(self.bench.api.items(self.jobs))
        model = self.copy_of("infl-submit-0", "infl-many-0")

        def create(number: int) -> None:
            body = copy.deepcopy(model)
            name = f"infl-many-{number}"
            body["metadata"]["name"] = body["metadata"]["labels"]["infl/run"] = name
            body["spec"]["template"]["metadata"]["labels"]["infl/run"] = name
            for variable in body["spec"]["template"]["spec"]["containers"][0]["env"]:
                if variable["name"] == "INFL_RUN_JSON":
                    variable["value"] = variable["value"].replace('"run":"infl-submit-0"', f'"run":"{name}"')
            self.bench.api.create(self.jobs, body)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(create, range(num_jobs - existing)))
        while len(self.bench.api.items(f"{self.user.namespace.core}/pods")) < num_jobs:
            time.sleep(0.5)

    def raw_list(self) -> list[Json]:
        """The floor of `status`: the Jobs and, since all wait, the pods."""
        pods = self.bench.api.items(f"{self.user.namespace.core}/pods", labelSelector="infl/run")
        return self.bench.api.items(self.jobs, labelSelector="infl/run") + pods

    def times(self, call: Callable[[], Process]) -> list[Process]:
        call()
        return [call() for _ in range(self.num_runs)]

    def num_requests(self, *words: str) -> str:
        """The lists that a command asks for, counted by a proxy."""
        proxy = Proxy(Api(self.bench.kubeconfig), self.bench.folder)
        try:
            self.user.describe_cluster(proxy.kubeconfig(self.user.home / "through", self.bench.kubeconfig))
            self.launcher(*words)
        finally:
            proxy.close()
            self.user.describe_cluster(self.bench.kubeconfig)
        kinds = [f"{method} {_resource(path)}" for method, path in proxy.requests]
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _resource(path: str) -> str:
    """``jobs`` of ``/apis/batch/v1/namespaces/lab/jobs/infl-smoke?...``."""
    words = path.partition("?")[0].split("/")
    return words[words.index("namespaces") + 2]


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def row(name: str, processes: list[Process], floor_ms: float | None, floor: str, requests: str = "") -> str:
    wall_ms = median_ms([each.wall_s for each in processes])
    peak = max(each.peak_bytes for each in processes) / 2**20
    cpu = median_ms([each.cpu_s for each in processes])
    beside = f"{floor_ms:.1f} ms ({floor})" if floor_ms is not None else floor
    ratio = f"{wall_ms / floor_ms:.1f}" if floor_ms else ""
    return f"| {name} | {wall_ms:.0f} | {cpu:.0f} | {peak:.0f} | {requests} | {beside} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--jobs", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder / "controlplane")
        try:
            with bench.namespace("benchmark") as namespace:
                packages = install(folder / "packages")
                user = User.of(bench, namespace, folder / "home", packages)
                report(Benchmark(bench, user, options.runs), options.jobs)
        finally:
            bench.close()


def report(benchmark: Benchmark, num_jobs: int) -> None:
    environment, home = benchmark.user.environment, benchmark.user.home
    imports = {
        name: benchmark.times(lambda code=code: measured([sys.executable, "-c", code], environment, home))
        for name, code in IMPORTS.items()
    }
    interpreter_ms = median_ms([each.wall_s for each in imports["python -c pass"]])
    submits, raw_creates = benchmark.submits()
    submit_requests = benchmark.num_requests(*benchmark.submit_words("infl-counted"))
    one = benchmark.times(lambda: benchmark.launcher("status", "infl-submit-1"))
    one_requests = benchmark.num_requests("status", "infl-submit-1")
    benchmark.fill(num_jobs)
    many = benchmark.times(lambda: benchmark.launcher("status"))
    many_requests = benchmark.num_requests("status")
    if len(json.loads(benchmark.launcher("status", "-o", "json").output)) < num_jobs:
        raise RuntimeError("status does not show every run")
    raw_lists = [timed_s(benchmark.raw_list) for _ in range(benchmark.num_runs)]
    path = f"{benchmark.jobs}/infl-submit-1"
    raw_gets = [timed_s(lambda: benchmark.bench.api.get(path)) for _ in range(benchmark.num_runs)]

    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(f"{machine}, {datetime.now(UTC):%Y-%m-%d}, median of {benchmark.num_runs}\n")
    print("| process | wall ms | CPU ms | peak MiB | requests | floor | x floor |")
    print("|---|---:|---:|---:|---|---|---:|")
    raw_create = "POST of the same Job"
    print(row("`submit`, until it ends", submits, median_ms(raw_creates), raw_create, submit_requests))
    print(row("`status RUN`", one, median_ms(raw_gets), "GET of the Job", one_requests))
    raw_list = "both lists and json.loads"
    print(row(f"`status`, {num_jobs} Jobs", many, median_ms(raw_lists), raw_list, many_requests))
    for name, processes in imports.items():
        print(row(name, processes, interpreter_ms, "empty interpreter"))


if __name__ == "__main__":
    main()
