"""The benchmark that says whether tracing changed the training can say that it did."""

from __future__ import annotations

import torch

from benchmarks.verl_gpu import weight_agreement


def checkpoint() -> dict[str, torch.Tensor]:
    return {"model.a": torch.ones(3), "model.b": torch.full((2, 2), 0.1), "optim.a": torch.tensor(2)}


def test_equal_checkpoints_are_equal() -> None:
    assert weight_agreement(checkpoint(), checkpoint()) == {
        "is_bitwise_equal": True,
        "num_tensors": 3,
        "num_different": 0,
        "largest_difference": 0.0,
    }


def test_one_bit_in_one_weight_is_a_difference() -> None:
    changed = checkpoint()
    changed["model.b"][0, 1] = torch.nextafter(changed["model.b"][0, 1], torch.tensor(1.0))
    found = weight_agreement(changed, checkpoint())
    assert (found["is_bitwise_equal"], found["num_different"]) == (False, 1)
    assert 0 < found["largest_difference"] < 1e-8


def test_a_weight_of_another_name_is_a_difference() -> None:
    fewer = checkpoint()
    del fewer["optim.a"]
    assert not weight_agreement(fewer, checkpoint())["is_bitwise_equal"]
