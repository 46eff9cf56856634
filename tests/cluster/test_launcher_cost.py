"""What a status of hundreds of runs costs, as its process and the API server see it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.cluster.bench.api import Api, Json
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.proxy import Proxy
from tests.cluster.bench.waiting import until
from tests.cluster.user import User

NUM_JOBS = 500
MAX_PEAK_BYTES = 150 * 10**6


def renamed(job: Json, run: str) -> Json:
    """The Job of another run, as it was before the server had it."""
    spec = copy.deepcopy(job["spec"])
    del spec["selector"]
    labels = {**job["metadata"]["labels"], "infl/run": run}
    spec["template"]["metadata"]["labels"] = labels
    for variable in spec["template"]["spec"]["containers"][0]["env"]:
        if variable["name"] == "INFL_RUN_JSON":
            variable["value"] = variable["value"].replace(
                f'"run":"{job["metadata"]["name"]}"', f'"run":"{run}"'
            )
    metadata = {"name": run, "labels": labels, "annotations": job["metadata"]["annotations"]}
    return {"metadata": metadata, "spec": spec}


def test_a_status_of_five_hundred_jobs_takes_two_lists_and_little_memory(bench: Bench, user: User) -> None:
    """All of them wait for a node, so their pods are asked for too, once."""
    proxy = Proxy(Api(bench.kubeconfig), bench.folder)
    user.describe_cluster(proxy.kubeconfig(user.home / "kubeconfig", bench.kubeconfig))
    try:
        user.submit("infl-model", "bench/image:1", "--set", "hardware.gpu_product=NVIDIA-B300")
        jobs, model = f"{user.namespace.batch}/jobs", user.namespace.job("infl-model")
        with ThreadPoolExecutor(8) as pool:
            bodies = [renamed(model, f"infl-many-{number}") for number in range(NUM_JOBS - 1)]
            list(pool.map(lambda body: bench.api.create(jobs, body), bodies))
        until(lambda: len(user.namespace.pods()) == NUM_JOBS, "a pod each", timeout_s=120, every_s=0.5)

        proxy.requests.clear()
        statuses, peak_bytes = status_and_peak_bytes(user)
        asked = [(method, path.partition("?")[0].rpartition("/")[2]) for method, path in proxy.requests]
        assert asked == [("GET", "jobs"), ("GET", "pods")]
        assert len(statuses) == NUM_JOBS
        assert {status["state"] for status in statuses} == {"PENDING"}
        assert peak_bytes < MAX_PEAK_BYTES, f"{peak_bytes / 1e6:.0f} MB"

        proxy.requests.clear()
        assert user.status("infl-many-7")["state"] == "PENDING"
        assert [method for method, _ in proxy.requests] == ["GET", "GET"]
        assert all("infl%2Frun%3Dinfl-many-7" in path for _, path in proxy.requests)  # and nobody else's
    finally:
        proxy.close()


def status_and_peak_bytes(user: User) -> tuple[list[Json], int]:
    """Of a process of its own, started by a small one: a peak is never less than the starter's memory."""
    program = (
        "import os, subprocess, sys; process = subprocess.Popen(sys.argv[1:]);"
        "_, status, usage = os.wait4(process.pid, 0);"
        "print(usage.ru_maxrss, file=sys.stderr); os._exit(os.waitstatus_to_exitcode(status))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, sys.executable, "-m", "launcher", "status", "--output", "json"],
        cwd=user.home,
        env={**os.environ, **user.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    statuses: list[Json] = json.loads(done.stdout)
    return statuses, int(done.stderr.split()[-1]) * 1024
