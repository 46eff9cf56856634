"""Runs on a cluster, seen from here: by its server alone, and with the run directories mounted."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from influence.rundir import RunPaths, RunSpec, claim_attempt, create_run
from launcher.errors import BackendError, ConflictError, NotFoundError, SpecError, UsageError
from launcher.lifecycle import Action, carry_out, plan_submit, require_room, run_status, run_statuses
from launcher.site import Site
from launcher.states import Phase, State
from tests.launcher.fake_backend import ENDED, FakeBackend, fake_site
from tests.launcher.local_run import SPEC
from tests.launcher.synthetic_run import SyntheticRun

RUN = "infl-fake-0221"


def some_run(name: str = RUN, **training: int) -> RunSpec:
    spec = copy.deepcopy(SPEC)
    spec["training"] |= training
    spec["cluster"] = {"namespace": "default", "storage": "claim", "claim": "runs", "object_store": None}
    link = f"https://wandb.ai/e/p/runs/{name}"
    return RunSpec.new(name, spec, wandb={"mode": "online", "url": link})


def server(site: Site) -> FakeBackend:
    assert isinstance(site.backend, FakeBackend)
    return site.backend


def submitted(site: Site, run: RunSpec | None = None) -> Site:
    assert carry_out(site, plan_submit(site, some_run() if run is None else run))
    return site


# --- a run that only the server knows


def test_submit_makes_one_object_and_adopts_it() -> None:
    site = fake_site()
    plan = plan_submit(site, some_run())
    assert (plan.action, plan.run_dir) == (Action.CREATE, None)
    assert server(site).objects == {}  # planning changes nothing
    assert carry_out(site, plan)
    again = plan_submit(site, some_run())
    assert again.action is Action.ADOPT
    assert not carry_out(site, again)
    assert len(server(site).objects[RUN]) == 1


def test_two_submits_at_once_make_one_object() -> None:
    site = fake_site()
    plans = [plan_submit(site, some_run()) for _ in range(2)]
    assert [carry_out(site, plan) for plan in plans] == [True, False]
    assert len(server(site).objects[RUN]) == 1


def test_another_spec_is_refused_before_and_after_the_plan() -> None:
    site = fake_site()
    late = plan_submit(site, some_run(total_steps=3))
    submitted(site)
    for refused in (lambda: plan_submit(site, some_run(total_steps=3)), lambda: carry_out(site, late)):
        with pytest.raises(ConflictError) as caught:
            refused()
        assert caught.value.why is not None
        assert "training.total_steps: 2 -> 3" in caught.value.why


def test_the_document_of_the_server_tells_what_the_directory_would() -> None:
    status = run_status(submitted(fake_site()), RUN)
    assert (status.state, status.preset, status.overlays) == (State.PENDING, "smoke", ("tiny-cpu",))
    assert (status.steps_committed, status.total_steps, status.backoff_limit) == (None, None, 2)
    assert status.wandb_url == f"https://wandb.ai/e/p/runs/{RUN}"
    assert (status.run_dir, status.storage) == (None, f"{RUN} in the claim runs")


def test_suggested_commands_name_the_cluster() -> None:
    site = submitted(fake_site())
    for phase, command in (
        (Phase.SUSPENDED, f"launcher resume {RUN} --cluster lab"),
        (Phase.FAILED, f"launcher logs {RUN} --cluster lab"),
        (
            Phase.LOST,
            f"launcher submit --preset smoke --overlay tiny-cpu --name {RUN} --cluster lab",
        ),
    ):
        server(site).objects[RUN][-1].phase = phase
        assert run_status(site, RUN).next_command == command


def test_what_the_backend_advises_goes_before_what_a_state_does() -> None:
    site = submitted(fake_site())
    backend = server(site)
    facts = replace(backend.get(RUN), phase=Phase.STUCK, next_step="ask for a node")
    backend.get = lambda _: facts  # type: ignore[method-assign]
    status = run_status(site, RUN)
    assert (status.next_command, status.next_step, status.advice) == (None, *["ask for a node"] * 2)
    facts = replace(facts, next_step=f"launcher logs {RUN} --cluster lab")
    assert run_status(site, RUN).next_command == facts.next_step


def test_a_plan_and_a_status_name_the_same_place_of_the_directory(tmp_path: Path) -> None:
    """Whether this machine sees it, and from before its pod has made it until it can be read."""
    for root in (None, tmp_path):
        site = fake_site(root)
        plan = plan_submit(site, some_run())
        carry_out(site, plan)
        seen = None if root is None else str(tmp_path / RUN)
        where = (seen, f"{RUN} in the claim runs")
        assert (plan.run_dir, plan.storage) == where
        status = run_status(site, RUN)
        assert (status.run_dir, status.storage) == where
    create_run(RunPaths.of(tmp_path, RUN), some_run())
    status = run_status(site, RUN)
    assert (status.steps_committed, status.run_dir, status.storage) == (0, *where)


def test_a_server_that_does_not_answer_is_unknown_and_not_settled() -> None:
    site = submitted(fake_site())
    server(site).reachable = False
    status = run_status(site, RUN)
    assert (status.state, status.settled, status.reason) == (
        State.UNKNOWN,
        False,
        "the server did not answer",
    )
    with pytest.raises(BackendError):
        run_statuses(site)
    with pytest.raises(BackendError):
        plan_submit(site, some_run())


def test_no_such_run_and_no_such_name() -> None:
    with pytest.raises(NotFoundError, match="no run 'infl-none-0221' in cluster 'lab'"):
        run_status(fake_site(), "infl-none-0221")
    with pytest.raises(UsageError):
        run_status(fake_site(), "../x")


def test_an_object_that_ended_is_started_again_and_one_being_stopped_is_not() -> None:
    site = submitted(fake_site())
    server(site).becomes(RUN, Phase.STOPPING)
    with pytest.raises(ConflictError, match="is being stopped"):
        plan_submit(site, some_run())
    server(site).becomes(RUN, Phase.FAILED)
    plan = plan_submit(site, some_run())
    assert plan.action is Action.RESTART
    assert carry_out(site, plan)
    assert len(server(site).objects[RUN]) == 2


def test_a_run_that_would_lie_in_another_namespace_is_refused() -> None:
    site = fake_site()
    run = some_run()
    elsewhere = RunSpec.new(RUN, run.spec | {"cluster": run.spec["cluster"] | {"namespace": "team"}})
    with pytest.raises(SpecError) as caught:
        plan_submit(site, elsewhere)
    assert "clusters.lab.cluster.namespace" in str(caught.value.next_step)


def test_what_a_cluster_lacks_leads_to_its_doctor() -> None:
    site = fake_site(backend=FakeBackend(lacking=("8 GPUs",)))
    with pytest.raises(BackendError) as caught:
        require_room(site, some_run(), ["--preset", "smoke"])
    assert "launcher doctor --preset smoke --cluster lab" in str(caught.value.next_step)


# --- with the run directories mounted


def test_committed_steps_are_seen_where_the_directory_is(tmp_path: Path) -> None:
    site = submitted(fake_site(tmp_path))
    assert run_status(site, RUN).total_steps is None  # its pod has not started: no directory yet
    paths = RunPaths.of(tmp_path, RUN)
    create_run(paths, some_run())
    claim_attempt(paths)
    server(site).becomes(RUN, Phase.EXECUTING)
    status = run_status(site, RUN)
    assert (status.steps_committed, status.total_steps, status.attempt) == (0, 2, 1)
    assert status.run_dir == str(paths.root_dir)


def test_an_object_that_is_gone_leaves_its_directory_to_speak(tmp_path: Path) -> None:
    run = SyntheticRun.make(tmp_path)
    site = fake_site(tmp_path)
    status = run_status(site, run.paths.name)
    assert (status.state, status.reason) == (State.FAILED, "its object is gone from the cluster")
    assert str(status.next_command).startswith("launcher submit")
    run.complete()
    status = run_status(site, run.paths.name)
    assert (status.state, status.next_command) == (
        State.SUCCEEDED,
        f"launcher collect --run {run.paths.name} --cluster lab",
    )
    assert [each.state for each in run_statuses(site)] == [State.SUCCEEDED]


def test_a_stored_run_of_another_spec_refuses_although_its_object_is_gone(tmp_path: Path) -> None:
    create_run(RunPaths.of(tmp_path, RUN), some_run(total_steps=3))
    with pytest.raises(ConflictError):
        plan_submit(fake_site(tmp_path), some_run())
    assert plan_submit(fake_site(tmp_path), some_run(total_steps=3)).action is Action.RESTART


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / RUN).mkdir()
    (tmp_path / RUN / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="is no run"):
        plan_submit(fake_site(tmp_path), some_run())


@pytest.mark.parametrize("trouble", ["not mounted", "torn", "forbidden"])
def test_trouble_with_the_mount_is_told_and_blocks_nothing(tmp_path: Path, trouble: str) -> None:
    root = tmp_path / "mnt"
    site = submitted(fake_site(root))
    server(site).becomes(RUN, Phase.EXECUTING, "the trainer runs")
    if trouble != "not mounted":
        (root / RUN).mkdir(parents=True)
        (root / RUN / "run.json").write_text("{")
    if trouble == "forbidden":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        (root / RUN).chmod(0)
    for status in (run_status(site, RUN), *run_statuses(site)):
        assert status.state is State.RUNNING
        assert status.reason.startswith("the trainer runs; ")
        assert "not reachable" in status.reason
    if trouble == "not mounted":
        assert plan_submit(site, some_run()).action is Action.ADOPT


def test_folders_on_the_claim_that_are_no_runs_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    assert run_statuses(fake_site(tmp_path)) == []


def test_hundreds_of_runs_are_one_question(tmp_path: Path) -> None:
    site = fake_site()
    for number in range(300):
        server(site).submit(some_run(f"infl-many-{number:04d}"))
    server(site).calls.clear()
    statuses = run_statuses(site)
    assert (len(statuses), server(site).calls) == (300, ["list"])
    assert {status.preset for status in statuses} == {"smoke"}


# --- whatever happens, in whatever order

STEPS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 1)),
    st.tuples(st.sampled_from(["cancel", "suspend", "resume", "forget", "cut", "mend"]), st.just(0)),
    st.tuples(
        st.just("becomes"),
        st.sampled_from(
            [Phase.EXECUTING, Phase.BACKING_OFF, Phase.STUCK, Phase.STOPPING, Phase.FAILED, Phase.COMPLETED]
        ),
    ),
)


@given(steps=st.lists(st.tuples(st.sampled_from(["infl-a-1", "infl-b-1"]), STEPS), max_size=25))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_no_sequence_makes_two_live_objects_or_loses_a_run(
    steps: list[tuple[str, tuple[str, object]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("claim")
    site = fake_site(root)
    backend = server(site)
    known: set[str] = set()
    for name, (order, argument) in steps:
        if order == "submit":
            run = some_run(name, total_steps=2 + int(argument))  # type: ignore[call-overload]
            try:
                carry_out(site, plan_submit(site, run))
            except (ConflictError, BackendError):
                pass
            else:
                known.add(name)
                if not (root / name).exists():  # its pod starts
                    create_run(RunPaths.of(root, name), run)
        elif order in ("cancel", "suspend", "resume"):
            try:
                getattr(backend, order)(name)
            except BackendError:
                assert not backend.reachable
        elif order == "becomes":
            backend.becomes(name, argument)  # type: ignore[arg-type]
        elif order == "forget":
            backend.forget(name)
        else:
            backend.reachable = order == "mend"
        for generations in backend.objects.values():
            assert sum(each.live for each in generations) <= 1
            assert len({each.run.spec_hash for each in generations}) <= 1
            assert all(each.phase in ENDED for each in generations[:-1])
        if backend.reachable:
            assert {status.run for status in run_statuses(site)} == known
        for run_name in known:
            status = run_status(site, run_name)
            assert json.dumps(status.to_dict())
            assert backend.reachable or status.state is State.UNKNOWN
