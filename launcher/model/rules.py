"""What settings must satisfy together: mostly what verl would refuse, or hang on, minutes into a run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from influence.owned_settings import is_owned_by_the_run
from launcher.model.sections import Cluster, Settings

# What the job templates set, or what decides how the trainer is found and identified.
_OWN_VARIABLES = ("INFL_", "WANDB_")
_OWN_VARIABLE_NAMES = frozenset(
    {
        *("HOME", "USER", "PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "POD_NAME", "POD_UID", "NODE_NAME"),
        "JOB_UID",
        *("RAY_ADDRESS", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"),
    }
)
HYDRA_KEY = re.compile(r"\+?[A-Za-z_][\w-]*([./][\w-]+)*")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a preset.

    Attributes:
        path: the setting it is told at.
        what: "must ...", in words.
        since: the setting that asks for it, where the other may be right by itself.
    """

    path: tuple[str | int, ...]
    what: str
    since: tuple[str | int, ...] | None = None


def broken_rules(settings: Settings) -> list[Problem]:
    """Every rule that ``settings`` break, in the order of the sections."""
    return [
        *_data(settings),
        *_batches(settings),
        *_device(settings),
        *_influence(settings),
        *_cluster(settings.cluster),
        *_nodes(settings),
        *_verl(settings.verl),
    ]


def _data(s: Settings) -> Iterator[Problem]:
    if s.data.source == "parquet" and not s.data.train_files:
        yield Problem(("data", "train_files"), "must name a file, since data.source is parquet")
    if s.data.source == "arithmetic" and (s.data.train_files or s.data.val_files):
        yield Problem(
            ("data", "train_files"), "must be [] (and val_files too), since data.source is arithmetic"
        )


def _batches(s: Settings) -> Iterator[Problem]:
    t, num_ranks = s.training, s.hardware.ranks_per_node * s.hardware.nodes
    if t.prompts_per_step % t.mini_batch_prompts:
        yield Problem(
            ("training", "mini_batch_prompts"),
            f"must divide training.prompts_per_step, {t.prompts_per_step}, not be {t.mini_batch_prompts}",
        )
    num_responses = t.mini_batch_prompts * t.responses_per_prompt
    if num_responses % num_ranks:
        yield Problem(
            ("training", "mini_batch_prompts"),
            f"x training.responses_per_prompt, {num_responses}, must split evenly over {num_ranks} ranks",
        )
    elif not t.use_dynamic_batch and num_responses // num_ranks % t.micro_batch_size_per_rank:
        yield Problem(
            ("training", "micro_batch_size_per_rank"),
            f"must divide the {num_responses // num_ranks} responses that a rank has of a mini-batch",
        )
    longest = s.data.max_prompt_length + s.data.max_response_length
    if t.use_dynamic_batch and t.max_tokens_per_rank < longest:
        yield Problem(
            ("training", "max_tokens_per_rank"),
            f"must hold the longest sequence: {longest} tokens of prompt and response",
        )
    if t.save_freq and t.keep_checkpoints < 2:
        yield Problem(
            ("training", "keep_checkpoints"),
            "must be at least 2: with one, a kill while it is replaced leaves none to resume from",
        )


def _device(s: Settings) -> Iterator[Problem]:
    # By the node: a replica that spans nodes would send every token's activations between them.
    num_ranks = s.hardware.ranks_per_node
    if num_ranks % s.rollout.tensor_parallel_size:
        yield Problem(("rollout", "tensor_parallel_size"), f"must divide the {num_ranks} ranks of a node")
    if s.rollout.name == "hf_cpu" and s.rollout.tensor_parallel_size != 1:
        yield Problem(("rollout", "tensor_parallel_size"), "must be 1, since rollout.name is hf_cpu")
    if s.hardware.device == "cpu":
        if s.rollout.name != "hf_cpu":
            yield Problem(("rollout", "name"), "must be hf_cpu, since hardware.device is cpu")
        if s.model.attn_implementation == "flash_attention_2":
            yield Problem(
                ("model", "attn_implementation"), "must be sdpa or eager, since hardware.device is cpu"
            )
        if s.model.dtype != "float32":
            yield Problem(("model", "dtype"), "must be float32, since hardware.device is cpu")
    elif s.model.attn_implementation == "flash_attention_2" and s.model.dtype == "float32":
        yield Problem(
            ("model", "dtype"), "must be bfloat16, since model.attn_implementation is flash_attention_2"
        )


def _influence(s: Settings) -> Iterator[Problem]:
    if s.influence.max_tokens_per_response == 0:
        yield Problem(("influence", "max_tokens_per_response"), "must be -1 (all) or at least 1")
    of_batch = s.influence.scope == "batch"
    if s.training.responses_per_prompt * (s.training.prompts_per_step if of_batch else 1) < 2:
        path = ("training", "responses_per_prompt")
        least = "must be at least 2 (or training.prompts_per_step)" if of_batch else "must be at least 2"
        if s.influence.contrast != "none":
            yield Problem(path, f"{least}: one response has no contrast")
        elif s.influence.exclude_self:
            yield Problem(path, f"{least}: with influence.exclude_self nothing is left of a group of one")
    if s.influence.capture == "fused" and s.influence.objective != "training_loss":
        if s.training.entropy_coeff != 0 or s.training.use_kl_loss:
            yield Problem(
                ("influence", "capture"),
                "cannot be fused with an entropy or KL term in the loss, whose gradient then is not the "
                "objective's; use auto, or objective: training_loss",
            )
        if s.training.mini_batch_prompts < s.training.prompts_per_step:
            yield Problem(
                ("influence", "capture"),
                "cannot be fused with several updates a step, of which only the first is on policy; use auto",
            )
    for path, names in (
        (("influence", "modules"), s.influence.modules),
        (("store", "columns"), s.store.columns),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                yield Problem(path, f"names {name} {count} times")


def _cluster(c: Cluster) -> Iterator[Problem]:
    if c.storage == "claim" and c.claim is None:
        yield Problem(
            ("cluster", "claim"),
            "must name a claim, since cluster.storage is claim",
            since=("cluster", "storage"),
        )
    if c.storage == "object_store" and c.object_store is None:
        yield Problem(
            ("cluster", "object_store"),
            "must be a URL such as s3://bucket/runs, since cluster.storage is object_store",
            since=("cluster", "storage"),
        )
    if c.scheduler in ("kai", "kueue") and c.queue is None:
        yield Problem(
            ("cluster", "queue"),
            f"must name a queue, since cluster.scheduler is {c.scheduler}",
            since=("cluster", "scheduler"),
        )
    if c.scheduler == "default" and c.queue is not None:
        yield Problem(
            ("cluster", "queue"),
            "must be null, since cluster.scheduler is default",
            since=("cluster", "scheduler"),
        )
    for name in c.environment:
        if name.startswith(_OWN_VARIABLES) or name in _OWN_VARIABLE_NAMES:
            yield Problem(("cluster", "environment", name), "is set by the run itself; leave it out")


def _nodes(s: Settings) -> Iterator[Problem]:
    if s.hardware.nodes > 1 and s.cluster.storage != "claim":
        yield Problem(
            ("cluster", "storage"),
            f"must be claim, since hardware.nodes is {s.hardware.nodes}: every node writes the run directory",
            since=("hardware", "nodes"),
        )


def _verl(overrides: dict[str, Any]) -> Iterator[Problem]:
    for key, value in overrides.items():
        if not HYDRA_KEY.fullmatch(key):
            yield Problem(("verl", key), "must be a path of verl's configuration, such as trainer.test_freq")
        elif is_owned_by_the_run(key):
            yield Problem(("verl", key), "belongs to the run directory and cannot be set; leave it out")
        elif isinstance(value, dict):
            yield Problem(("verl", key), f"must be no mapping: write the path as one key, {key}.<...>")
        elif not _is_plain(value):
            yield Problem(("verl", key), "must be text, a number, true, false, null, or a list of those")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(not isinstance(item, list) and _is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return "\x00" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
    return value is None or isinstance(value, (bool, int))
