"""A step through DeepSpeed, on one and two ranks and with each ZeRO stage, is a step of plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eve.training.stages import build_stage
from tests.rank_pool import RankPool
from tests.steps import DENSE, OVERRIDES, build_engine, engine_steps, plain_steps
from tests.tiny import tiny_recipe

STEPS, LEARNING_RATE = 3, 2e-3


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize(
    "config", ["zero0_fp32.json", "zero1_fp32.json", "zero2_fp32.json", "zero3_fp32.json"]
)
def test_two_ranks_equal_one_plain_process(
    config: str, micro_batch: int, tiny: Path, two_ranks: RankPool
) -> None:
    overrides = DENSE if config.startswith("zero3") else OVERRIDES
    expected = plain_steps(tiny_recipe(tiny, *overrides), STEPS, LEARNING_RATE)
    overrides = (*overrides, f"training.micro_batch_size={micro_batch}")
    found = two_ranks.run(engine_steps, tiny, overrides, config, STEPS, LEARNING_RATE)[0]
    assert max(found.difference(expected)) < 1e-5


PAIR = ("stages.0.streams=[{name: pair, source: pairs, objective: masked_pair}]",)
# So large that the dropped choices are seen in the weights.
CAPACITY = "model.feed_forward.1.capacity_factor=0.5", "model.init_std=0.2", "model.layer_scale=1.0"


@pytest.mark.parametrize(
    ("more", "config", "cut"),
    [
        (PAIR, "zero0_fp32.json", 4),
        (PAIR, "zero2_fp32.json", 8),
        (CAPACITY, "zero0_fp32.json", 4),
        (CAPACITY, "zero1_fp32.json", 8),
    ],
)
def test_pairs_and_slots_equal_one_plain_pass(
    more: tuple[str, ...], config: str, cut: int, tiny: Path, two_ranks: RankPool
) -> None:
    overrides = (*OVERRIDES, *more)
    expected = plain_steps(tiny_recipe(tiny, *overrides), STEPS, LEARNING_RATE)
    if more == CAPACITY:
        dropless = tiny_recipe(tiny, *overrides, "model.feed_forward.1.capacity_factor=0")
        norms = plain_steps(dropless, STEPS, LEARNING_RATE).norms
        assert expected.norms != pytest.approx(norms, rel=1e-3)
    overrides = (*overrides, f"training.micro_batch_size={cut}")
    found = two_ranks.run(engine_steps, tiny, overrides, config, STEPS, LEARNING_RATE)[0]
    assert max(found.difference(expected)) < 1e-5


@pytest.mark.parametrize("config", ["zero1_bf16.json", "zero2_bf16.json"])
def test_bf16_stays_near_fp32(config: str, tiny: Path, two_ranks: RankPool) -> None:
    expected = plain_steps(tiny_recipe(tiny, *OVERRIDES), STEPS, LEARNING_RATE)
    found = two_ranks.run(engine_steps, tiny, OVERRIDES, config, STEPS, LEARNING_RATE)[0]
    # bf16 has 8 bits.
    assert found.norms == pytest.approx(expected.norms, rel=0.05)
    moved = [(found.weights[name] - weight).abs().max() for name, weight in expected.weights.items()]
    assert max(moved) < STEPS * LEARNING_RATE
    # The fp32 weights are there, not their rounding.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in found.weights.values())


FROZEN_DECODER = "stages.0.trainable=['encoder.*', 'word_head.*']"


def weights_around_a_checkpoint(
    recipe_path: Path, overrides: tuple[str, ...], config: str, directory: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(before, of the engine, of another engine, begun elsewhere, that has loaded its checkpoint)."""
    recipe = tiny_recipe(recipe_path, *overrides)
    engine, _, topology = build_engine(recipe, config)
    before = build_stage(recipe, recipe.stages[0], None, topology).model.state_dict()
    if topology.rank == 0:
        (directory / "tag").mkdir(parents=True)
    engine.save(directory, "tag")
    after = engine.held_weights()
    engine.close()
    other, _, _ = build_engine(recipe, config, {name: weight + 1 for name, weight in before.items()})
    other.load(directory, "tag")
    loaded = other.held_weights()
    other.close()
    return before, after, loaded


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("zero1_bf16.json", OVERRIDES),
        ("zero2_bf16.json", OVERRIDES),
        ("zero3_fp32.json", DENSE),
        ("zero3_bf16.json", DENSE),
    ],
)
def test_frozen_weights_keep_every_bit(
    config: str, overrides: tuple[str, ...], tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    answers = two_ranks.run(
        weights_around_a_checkpoint, tiny, (*overrides, FROZEN_DECODER), config, tmp_path / "checkpoint"
    )
    for before, after, loaded in answers:
        assert any(name.startswith("decoder.") for name in before)
        for name, weight in before.items():
            assert torch.equal(after[name], weight), name
            assert torch.equal(loaded[name], weight), name
