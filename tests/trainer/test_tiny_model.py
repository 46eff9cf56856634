"""The demo's tokenizer, checkpoint, data and rollout, with transformers."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
import torch

from influence.tiny.arithmetic import Addition, random_additions

pytestmark = pytest.mark.slow


def test_the_tokenizer_is_the_same_after_auto_tokenizer_has_rebuilt_it(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, Qwen2Config

    from influence.tiny.tokenizer import build_tokenizer

    built = build_tokenizer()
    built.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(built)).save_pretrained(tmp_path)  # what makes it Qwen2's own class
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen2"
    rebuilt = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for addition in random_additions(50, rng):
        question = rebuilt.apply_chat_template(
            [{"role": "user", "content": addition.question}], add_generation_prompt=True, tokenize=False
        )
        for text in (question, addition.response(rng, 0.5)):
            ids = rebuilt(text)["input_ids"]
            assert ids == built(text)["input_ids"]
            assert rebuilt.decode(ids) == text
    digits = rebuilt("7+8=15 so 85")["input_ids"]
    assert rebuilt.convert_ids_to_tokens(digits) == [*"7+8=15", "Ġso", "Ġ", "8", "5"]
    longest = Addition(99, 99).response(random.Random(0))
    assert len(rebuilt(longest)["input_ids"]) < 32  # the overlay's limit


def test_two_builds_of_the_checkpoint_have_the_same_bytes(tmp_path: Path) -> None:
    from influence.tiny.model import TinyModel, tiny_checkpoint

    settings = TinyModel(num_updates=5)
    random_state = torch.get_rng_state()
    digests = []
    for name in ("one", "two"):
        checkpoint = tiny_checkpoint(settings, tmp_path / name)
        digests.append(
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.iterdir()}
        )
        torch.rand(3)  # the caller's random numbers have nothing to do with it
    assert digests[0] == digests[1]
    assert {"model.safetensors", "config.json", "tokenizer.json"} < digests[0].keys()
    torch.set_rng_state(random_state)
    tiny_checkpoint(settings, tmp_path / "three")
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_data_has_verls_columns_and_no_prompt_twice(tmp_path: Path) -> None:
    from pyarrow import parquet

    from influence.tiny.data import ArithmeticData, arithmetic_files

    files = arithmetic_files(ArithmeticData(num_train=40, num_validation=10), tmp_path)
    rows = parquet.read_table(files.train).to_pylist()
    assert len(rows) == 40
    assert [row["extra_info"]["index"] for row in rows] == list(range(40))
    for row in rows:
        left, right = row["prompt"][0]["content"].removeprefix("What is ").removesuffix("?").split("+")
        assert int(row["reward_model"]["ground_truth"]) == int(left) + int(right)
    prompts = [row["prompt"][0]["content"] for row in rows + parquet.read_table(files.validation).to_pylist()]
    assert len(set(prompts)) == 50


def test_generation_is_the_models_and_repeats_for_a_seed() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from influence.hf_cpu.sampling import SamplingSettings
    from influence.hf_cpu.server import TokenGenerator

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    generator = TokenGenerator(model, end_token_id=3, max_new_tokens=12)
    settings = SamplingSettings(temperature=0.7)
    prompt = [5, 6, 7]
    outputs = [generator.generate(prompt, settings, seed) for seed in range(30)]
    assert outputs[4] == generator.generate(prompt, settings, 4)
    assert len({tuple(output.token_ids) for output in outputs}) > 20
    assert {output.stop_reason for output in outputs} == {"completed", "length"}
    for output in outputs:
        is_complete = output.stop_reason == "completed"
        assert (output.token_ids[-1] == 3) == is_complete
        assert is_complete or len(output.token_ids) == 12
        assert 3 not in output.token_ids[:-1]
        # The log-probabilities are those of one forward over the whole sequence, without a cache.
        ids = torch.tensor([prompt + output.token_ids])
        log_probs = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.log_probs), expected.detach(), rtol=0, atol=1e-5)
