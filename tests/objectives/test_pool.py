"""Contrast and matching on several ranks: the steps of one process, as every pair meets all of the step."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.rank_pool import RankPool
from tests.steps import OVERRIDES, Steps, engine_steps, plain_steps
from tests.tiny import tiny_recipe

# As it begins all class tokens are nearly alike, and what tells them apart is rounding; weights of this size
# make them differ. What has no gradient DeepSpeed decays, and plain AdamW does not: no decoder.
LARGE = (*OVERRIDES, "model.init_std=0.2", "model.decoder=null")
CONTRAST, MATCHING = "model.contrast={width: 16, paths: [modality, fusion]}", "model.matching={}"
FUSION = (
    *LARGE,
    'model.feed_forward=[{blocks: "0", router: modality}, {blocks: "1", router: fusion}]',
    "model.relative_positions=shared",
    "model.heads=4",
    CONTRAST,
)


def streams(*listed: str) -> str:
    parts = [f"{{name: s{i}, source: pairs, objective: {stream}}}" for i, stream in enumerate(listed)]
    return f"stages.0.streams=[{', '.join(parts)}, {{name: text, source: pairs, objective: masked_text}}]"


VLMO = (*FUSION, MATCHING, streams("contrast_matching, identity: colour"))

# name: (ranks, DeepSpeed config, model and streams, what else)
LAYOUTS = {
    "2": (2, "zero0_fp32", VLMO, ()),
    "4": (4, "zero0_fp32", VLMO, ()),
    "4, ZeRO 2": (4, "zero2_fp32", VLMO, ()),
    "4, ZeRO 3, checkpointing": (4, "zero3_fp32", VLMO, ("training.activation_checkpointing=true",)),
    "tensor 2": (2, "zero0_fp32", VLMO, ("parallel.tensor=2",)),
    "tensor 2 of 4": (4, "zero1_fp32", VLMO, ("parallel.tensor=2",)),
    "soft targets": (4, "zero1_fp32", (*FUSION, streams("contrast, targets: soft, identity: shape")), ()),
    "apart, learned router, expert 2": (
        4,
        "zero1_fp32",
        (*LARGE, "model.contrast={width: 16}", MATCHING, streams("contrast", "matching")),
        ("parallel.expert=2",),
    ),
}


@functools.cache
def plain(tiny: Path, model: tuple[str, ...]) -> Steps:
    return plain_steps(tiny_recipe(tiny, *model), 4, 2e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_make_the_steps_of_one_process(
    name: str, tiny: Path, two_ranks: RankPool, four_ranks: RankPool
) -> None:
    ranks, config, model, more = LAYOUTS[name]
    pool = {2: two_ranks, 4: four_ranks}[ranks]
    found, *_ = pool.run(engine_steps, tiny, (*model, *more), f"{config}.json", 4, 2e-3)
    assert max(found.difference(plain(tiny, model))) < 1e-5
