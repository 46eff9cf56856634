"""Two hundred faults in random order: no second Job of a run, no run lost, no step lost or written twice.

A failure prints its seed; INFL_CHAOS_SEED repeats the order of events (not how they fall together in time).
"""

from __future__ import annotations

import os
import random
import time

from tests.cluster.bench.api import Api
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.proxy import Proxy
from tests.cluster.chaos import NAMES, NODES, Chaos
from tests.cluster.quick_launcher import quick_launcher
from tests.cluster.user import User

NUM_FAULTS = 200
#: At these, the order of events is not random: each takes seconds.
APISERVER_RESTARTS = (25, 80, 130, 175)
NODE_CHANGES = (40, 85, 120, 165)  # lost, found, lost, found
LISTED_EVERY = 4


def test_two_hundred_faults_lose_and_double_nothing(bench: Bench, user: User) -> None:
    seed = int(os.environ.get("INFL_CHAOS_SEED") or random.randrange(2**32))
    proxy = Proxy(Api(bench.kubeconfig), bench.folder)
    for node in NODES:
        bench.add_node(node, labels={"pool": "chaos"})
    user.describe_cluster(proxy.kubeconfig(user.home / "kubeconfig", bench.kubeconfig))
    with quick_launcher(user.home, user.packages, user.home, user.environment) as launcher:
        chaos = Chaos(bench, user, launcher, proxy, seed)
        started = time.monotonic()
        try:
            events = chaos.events()
            for number in range(1, NUM_FAULTS + 1):
                chaos.note(f"{number}, {time.monotonic() - started:.1f} s")
                if number in APISERVER_RESTARTS:
                    chaos.restart_apiserver()
                elif number in NODE_CHANGES:
                    chaos.toggle_node()
                else:
                    chaos.note(f"  was {next(events)}")
                chaos.check()
                if number % LISTED_EVERY == 0:
                    chaos.check_listed()
            chaos.calm()
            chaos.check_listed()
            chaos.finish()
        except BaseException:
            print(f"INFL_CHAOS_SEED={seed}\n" + "\n".join(chaos.log[-60:]))
            raise
        finally:
            proxy.close()
            for node in NODES:
                bench.remove_node(node)
        print(f"seed {seed}, {time.monotonic() - started:.0f} s, {proxy.num_injected} requests spoiled")
        print(dict(sorted(chaos.counts.items())))
        # The order of events reached what it is about.
        assert chaos.counts["submit 0"] >= 20 and chaos.counts["lists"] >= 20
        assert len(chaos.submitted) == len(NAMES)
        assert proxy.num_injected >= 20
