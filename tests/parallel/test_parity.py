"""Every layout makes the steps of one plain process: in fp32, on the same batches.

`EVE_STEPS=20 python -m tests.parallel.test_parity` prints the differences as a table.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from tests.rank_pool import RankPool
from tests.steps import DENSE, OVERRIDES, STEPS, Steps, engine_steps, plain_steps
from tests.tiny import tiny_recipe, write_tiny

LEARNING_RATE = 2e-3
HEADS = ("model.heads=4", "model.decoder.heads=4")
ROUTED, HARD = (*OVERRIDES, *HEADS), (*DENSE, *HEADS)
CAPACITY = ("model.feed_forward.1.capacity_factor=0.7", "model.feed_forward.1.z_loss_weight=0.01")
POOLS = (
    "model.feed_forward.1={blocks: 1, router: topk, experts_by_modality: [4, 4], k: 1, group_size: 2, "
    "modality_vector: none, renormalise: false, noise: gaussian, capacity_factor: 0.9, min_capacity: 1, "
    "drop_order: priority, load_balance_weight: [0, 0.01], importance_weight: [0.01, 0], "
    "load_weight: [0.01, 0]}",
)
BIASES = "stages.0.trainable=['*bias', '*b2_ED', '*b2_D']"
FROZEN_ROUTER = "stages.0.trainable=['encoder.*.attention.*', 'encoder.*.experts.*', 'word_head.*']"
VLMO = (
    "model.feed_forward=[{blocks: 0, router: modality}, {blocks: 1, router: fusion}]",
    "model.relative_positions=blocks",
    "model.text_norm=after_positions",
    *HEADS,
    *OVERRIDES,
)
SEPARATE = (*VLMO, "model.attention=modality", "model.key_bias=true", "model.relative_positions=shared")
PAIR = ("stages.0.streams=[{name: pair, source: pairs, objective: masked_pair}]",)


def degrees(tensor: int = 1, expert: int = 1, sequence: bool = True) -> tuple[str, ...]:
    return (f"parallel.tensor={tensor}", f"parallel.expert={expert}", f"parallel.sequence={sequence}")


CHECKPOINTING = ("training.activation_checkpointing=true",)


def accumulate(micro_batch: int) -> tuple[str, ...]:
    return (f"training.micro_batch_size={micro_batch}",)


# name: (ranks, DeepSpeed config, model, what else)
LAYOUTS: dict[str, tuple[int, str, tuple[str, ...], tuple[str, ...]]] = {
    "data 2": (2, "zero0_fp32", ROUTED, ()),
    "data 4": (4, "zero0_fp32", ROUTED, ()),
    "data 4, ZeRO 1": (4, "zero1_fp32", ROUTED, ()),
    "data 4, ZeRO 2": (4, "zero2_fp32", ROUTED, ()),
    "data 4, ZeRO 3, dense": (4, "zero3_fp32", HARD, ()),
    "data 2, 1 x 8 samples": (2, "zero1_fp32", ROUTED, accumulate(8)),
    "data 2, 4 x 2 samples": (2, "zero1_fp32", ROUTED, accumulate(2)),
    "data 4, checkpointing": (4, "zero1_fp32", ROUTED, CHECKPOINTING),
    "tensor 2": (2, "zero0_fp32", ROUTED, degrees(2, sequence=False)),
    "tensor 2, dense": (2, "zero1_fp32", HARD, degrees(2, sequence=False)),
    "tensor 2, biases alone learn": (2, "zero0_fp32", (*ROUTED, BIASES), degrees(2)),
    "tensor 2 x expert 2, no sequence, router frozen": (
        4,
        "zero1_fp32",
        (*ROUTED, FROZEN_ROUTER),
        degrees(2, 2, sequence=False),
    ),
    "tensor 2, sequence": (2, "zero0_fp32", ROUTED, degrees(2)),
    "tensor 2, sequence, dense": (2, "zero1_fp32", HARD, degrees(2)),
    "tensor 4": (4, "zero0_fp32", ROUTED, degrees(4, sequence=False)),
    "tensor 4, sequence": (4, "zero0_fp32", ROUTED, degrees(4)),
    "tensor 2, data 2, ZeRO 2": (4, "zero2_fp32", ROUTED, degrees(2)),
    "expert 2": (2, "zero0_fp32", ROUTED, degrees(expert=2)),
    "expert 2, ZeRO 1": (2, "zero1_fp32", ROUTED, degrees(expert=2)),
    "expert 2, data 4, ZeRO 2": (4, "zero2_fp32", ROUTED, degrees(expert=2)),
    "expert 4": (4, "zero0_fp32", ROUTED, degrees(expert=4)),
    "expert 4, ZeRO 1": (4, "zero1_fp32", ROUTED, degrees(expert=4)),
    "expert 4, ZeRO 2, 2 x 2 samples": (4, "zero2_fp32", ROUTED, (*degrees(expert=4), *accumulate(2))),
    "expert 4, capacity": (4, "zero1_fp32", (*ROUTED, *CAPACITY), degrees(expert=4)),
    "tensor 2 x expert 2": (4, "zero0_fp32", ROUTED, degrees(2, 2, sequence=False)),
    "tensor 2 x expert 2, sequence": (4, "zero0_fp32", ROUTED, degrees(2, 2)),
    "tensor 2 x expert 2, sequence, ZeRO 1": (4, "zero1_fp32", ROUTED, degrees(2, 2)),
    "tensor 2 x expert 4, sequence, ZeRO 2, checkpointing": (
        4,
        "zero2_fp32",
        ROUTED,
        (*degrees(2, 4), *CHECKPOINTING),
    ),
    "tensor 2 x expert 2, sequence, capacity": (4, "zero1_fp32", (*ROUTED, *CAPACITY), degrees(2, 2)),
    "data 2, 4 x 2 samples, two pools": (2, "zero1_fp32", (*ROUTED, *POOLS), accumulate(2)),
    "tensor 2 x expert 2, sequence, two pools": (4, "zero1_fp32", (*ROUTED, *POOLS), degrees(2, 2)),
    "tensor 2, sequence, relative positions, fusion": (2, "zero1_fp32", VLMO, degrees(2)),
    "tensor 4, attention by modality": (4, "zero0_fp32", SEPARATE, degrees(4)),
    "data 4, ZeRO 3, attention by modality": (4, "zero3_fp32", SEPARATE, ()),
    "tensor 4 x expert 4, one masked pair": (4, "zero1_fp32", (*ROUTED, *PAIR), degrees(4, 4)),
}


@functools.cache
def plain(tiny: Path, model: tuple[str, ...]) -> Steps:
    return plain_steps(tiny_recipe(tiny, *model), STEPS, LEARNING_RATE)


def difference(name: str, tiny: Path, pool: RankPool) -> tuple[float, float, float]:
    """Largest relative difference of (losses, norms, parameters) from plain PyTorch on one process."""
    _, config, model, more = LAYOUTS[name]
    steps = pool.run(engine_steps, tiny, (*model, *more), f"{config}.json", STEPS, LEARNING_RATE)
    return steps[0].difference(plain(tiny, model))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_makes_the_steps_of_one_process(
    name: str, tiny: Path, two_ranks: RankPool, four_ranks: RankPool
) -> None:
    pool = {2: two_ranks, 4: four_ranks}[LAYOUTS[name][0]]
    losses, norms, parameters = difference(name, tiny, pool)
    assert losses < 1e-5
    assert norms < 1e-5
    assert parameters < 1e-5


@pytest.fixture(scope="module")
def bf16_data_parallel(tiny: Path, four_ranks: RankPool) -> Steps:
    return four_ranks.run(engine_steps, tiny, ROUTED, "zero1_bf16.json", STEPS, LEARNING_RATE)[0]


@pytest.mark.parametrize("more", [degrees(2, 2), degrees(expert=4)])
def test_bf16_differs_by_its_rounding(
    more: tuple[str, ...], tiny: Path, bf16_data_parallel: Steps, four_ranks: RankPool
) -> None:
    """Little more than bf16 with data parallelism alone does."""
    exact = plain(tiny, ROUTED)
    found, *_ = four_ranks.run(engine_steps, tiny, (*ROUTED, *more), "zero1_bf16.json", STEPS, LEARNING_RATE)
    losses, norms, _ = found.difference(exact)
    assert losses < 1e-3
    assert norms < 0.03

    def distance(steps: Steps) -> float:
        parts = [(steps.weights[name] - weight).norm() for name, weight in exact.weights.items()]
        return float(torch.stack(parts).norm())

    assert 0 < distance(found) < 1.5 * distance(bf16_data_parallel)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        tiny, pools = write_tiny(Path(directory)), {n: RankPool(n) for n in (2, 4)}
        print(f"{STEPS} steps in fp32 against plain PyTorch on one process, largest relative difference\n")
        print("| layout | ZeRO | loss | gradient norm | parameters |\n|---|---|---:|---:|---:|")
        for name, (ranks, config, _, _) in LAYOUTS.items():
            numbers = " | ".join(f"{value:.1e}" for value in difference(name, tiny, pools[ranks]))
            print(f"| {name} | {config[4]} | {numbers} |", flush=True)
        for pool in pools.values():
            pool.close()


if __name__ == "__main__":
    main()
