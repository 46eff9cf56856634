"""Drives verl's training worker with our engine in it, without Ray: a process a rank, gloo between them.

Started by `test_engine`: ``python -m tests.trainer.engine_worker SCENARIOS.json RANK``, with torch's
variables for the process group in the environment. Saves what verl's metrics say and the weights after the
update, traced and, where a scenario asks to compare, with verl's own engine.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from influence.capture import CaptureError
from tests.trainer.engine_data import Response


def nest(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def as_batch(rows: list[Response], scenario: dict[str, Any]) -> Any:
    """What verl's trainer hands to ``train_mini_batch``."""
    from tensordict import NonTensorStack, TensorDict
    from verl.utils import tensordict_utils as tu

    masks = [torch.tensor(r.mask) for r in rows]
    batch = TensorDict(
        {
            "input_ids": nest([torch.tensor(r.prompt + r.response) for r in rows]),
            "position_ids": nest([torch.arange(len(r.prompt) + len(r.response)) for r in rows]),
            "prompts": nest([torch.tensor(r.prompt) for r in rows]),
            "responses": nest([torch.tensor(r.response) for r in rows]),
            "response_mask": nest(masks),
            "loss_mask": nest(masks),
            "old_log_probs": nest([torch.tensor(r.old_log_probs) for r in rows]),
            "advantages": nest([torch.full((len(r.response),), r.advantage) for r in rows]),
            "ref_log_prob": nest(
                [torch.tensor(r.old_log_probs) - 0.1 * torch.arange(len(r.response)) for r in rows]
            ),
            "rm_scores": nest([torch.tensor([0.0] * (len(r.response) - 1) + [r.reward]) for r in rows]),
            "uid": NonTensorStack(*[r.uid for r in rows]),
            "index": torch.tensor([r.prompt_index for r in rows]),
            "session_id": NonTensorStack(*[r.session_id for r in rows]),
        },
        batch_size=len(rows),
    )
    tu.assign_non_tensor(
        batch,
        temperature=1.0,
        global_batch_size=scenario["mini_batch_size"],
        mini_batch_size=scenario["mini_batch_size"],
        epochs=scenario["epochs"],
        seed=0,
        dataloader_kwargs={"shuffle": False},
        calculate_entropy=scenario["calculate_entropy"],
        influence_step=scenario["step"],
    )
    return batch


def training_worker(scenario: dict[str, Any], *, traced: bool) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine import BaseEngine, EngineRegistry, FSDPEngineWithLMHead
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from influence.verl_engine.engine import InfluenceEngine

    model = HFModelConfig(
        path=scenario["model"],
        use_remove_padding=scenario["packed"],
        enable_gradient_checkpointing=scenario["checkpointing"],
        override_config={"attn_implementation": "sdpa"},
        lora_rank=4 if scenario["adapter"] else 0,
        lora_adapter_path=scenario["adapter"],
    )
    optimizer = FSDPOptimizerConfig(lr=scenario["learning_rate"], total_training_steps=10)
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_dynamic_bsz=scenario["dynamic"],
        max_token_len_per_gpu=64,
        micro_batch_size_per_gpu=2,
    )
    worker_config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=model,
        engine_config=engine,
        optimizer_config=optimizer,
        checkpoint_config=CheckpointConfig(),
    )
    registered: dict[Any, type[BaseEngine]] = EngineRegistry._engines["language_model"]["fsdp2"]
    registered["cpu"] = InfluenceEngine if traced else FSDPEngineWithLMHead
    worker = TrainingWorker(worker_config)
    worker.reset()
    assert type(worker.engine) is registered["cpu"]
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=2,
        optim=optimizer,
        use_dynamic_bsz=False,
        **scenario["actor"],
    )
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def update(scenario: dict[str, Any], rank: int, *, traced: bool) -> dict[str, Any]:
    """One step's update: verl's metrics as its trainer logs them, weights and random state after it."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.metric import reduce_metrics
    from verl.utils.py_functional import rename_dict

    rows = [Response(**row) for row in scenario["rows"]]
    torch.manual_seed(0)
    worker = training_worker(scenario, traced=traced)
    own = rows[rank :: scenario["num_ranks"]]
    try:
        output = worker.train_mini_batch(as_batch(own, scenario))
    except CaptureError as error:
        return {"error": str(error)}
    metrics = reduce_metrics(rename_dict(tu.get(output, "metrics"), "actor/"))
    weights = {name: full(tensor) for name, tensor in worker.engine.module.state_dict().items()}
    return {
        "metrics": {name: float(value) for name, value in metrics.items() if not name.endswith("mfu")},
        "weights": weights,
        "random": torch.get_rng_state(),
        "gradients_left": [n for n, p in worker.engine.module.named_parameters() if p.grad is not None],
    }


def full(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def main(scenarios_path: str, rank_text: str) -> None:
    from influence.verl_engine import (
        capture_pass,
        external,  # noqa: F401  (registers the engine)
    )

    rank = int(rank_text)
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo")
    for scenario in json.loads(Path(scenarios_path).read_text()):
        os.environ.update(INFL_RUN_DIR=scenario["run_dir"], INFL_ATTEMPT="1")
        in_place = patch.object(capture_pass, "in_place_cross_entropy", lambda _data: "it is written over")
        with in_place if scenario["in_place"] else nullcontext():
            result = {"traced": update(scenario, rank, traced=True)}
        if scenario["compare"]:
            result["stock"] = update(scenario, rank, traced=False)
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, result["traced"].get("error"))
        if rank == 0:
            torch.save({**result, "errors": results}, Path(scenario["run_dir"]) / "result.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
