"""The ablations of the four papers as overrides of the large recipes: what changes, and by how much.

Parameters are counted by hand from the published sizes (width 768, hidden 3072, 12 blocks).
"""

from __future__ import annotations

from functools import cache
from math import prod

import pytest

from eve.config import Recipe, load_recipe
from eve.errors import UserError
from eve.model import parameter_shapes

D, F = 768, 3072
# A feed-forward of two layers, with its biases. A norm. The projections of attention and the norm before.
EXPERT, NORM = 2 * D * F + F + D, 2 * D
ATTENTION = 4 * D * D + 2 * D + D + NORM
# A block with attention, gains and one expert.
BLOCK = ATTENTION + 2 * D + NORM + EXPERT
CONTRAST, MATCHING = 2 * D * D + 1, D * D + D + 2 * D + 2
# Of MAE: embedding, mask token, blocks of width 512, norm, prediction of 16 x 16 x 3 values.
DECODER_BLOCK = 4 * 512**2 + 3 * 512 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512
DECODER = D * 512 + 512 + 512 + 8 * DECODER_BLOCK + 2 * 512 + 512 * D + D

CODES = (
    "model.visual_codes=8192",
    "model.mask_token=true",
    "model.decoder=null",
    "data.visual_tokenizer=data/visual_tokenizer",
)
ITC = "{name: contrast, source: pairs, objective: contrast}"
ITC_ITM = "{name: contrast, source: pairs, objective: contrast_matching}"
ITM = "{name: matching, source: pairs, objective: matching}"
TOP = "model.feed_forward.1"
POOLS = ("model.feed_forward.1", "model.feed_forward.3")


def experts(number: int, k: int) -> str:
    """The soft router of EVE's figure 5, in the blocks 8, 10 and 12, counted from 1."""
    return (
        'model.feed_forward=[{blocks: "0-6,8,10", router: modality}, '
        f'{{blocks: "7,9,11", router: topk, num_experts: {number}, k: {k}}}]'
    )


def in_both(setting: str) -> tuple[str, ...]:
    """For the blocks of VL-MoE with pools, in the middle and on top."""
    return tuple(f"{blocks}.{setting}" for blocks in POOLS)


# Row of the paper: (recipe, overrides, parameters more than the recipe's).
MODELS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "EVE table 3, codes": (
        "eve_base",
        (*CODES, "stages.0.streams.0.objective=masked_codes"),
        D * 8192 + 8192 + D - DECODER,
    ),
    "EVE table 6, + ITC": (
        "eve_base",
        (f"model.contrast={{width: {D}}}", f"stages.0.streams=[masked_image, masked_text, {ITC}]"),
        CONTRAST,
    ),
    "EVE table 6, + ITM": (
        "eve_base",
        ("model.matching={}", f"stages.0.streams=[masked_image, masked_text, {ITM}]"),
        MATCHING,
    ),
    "EVE table 6, + ITC + ITM": (
        "eve_base",
        (
            f"model.contrast={{width: {D}}}",
            "model.matching={}",
            f"stages.0.streams=[masked_image, masked_text, {ITC_ITM}]",
        ),
        CONTRAST + MATCHING,
    ),
    "EVE table 7, shared": ("eve_base", (f"{TOP}.router=shared",), -2 * (31 * EXPERT + 32 * D + 2 * D)),
    "EVE table 7, shared and a block": (
        "eve_base",
        ("model.depth=13", f"{TOP}.blocks=10-12", f"{TOP}.router=shared"),
        BLOCK - 2 * (31 * EXPERT + 32 * D + 2 * D),
    ),
    "EVE table 7, hard": (
        "eve_base",
        (f"{TOP}.router=modality",),
        -2 * (30 * EXPERT + 32 * D + 2 * D - NORM),
    ),
    "EVE table 8, without": ("eve_base", (f"{TOP}.modality_vector=none",), -2 * 2 * D),
    **{
        f"EVE figure 5, {number} experts, k {k}": (
            "eve_base",
            (experts(number, k),),
            # Three soft blocks, each beside one hard one less: two experts and a norm of the recipe's.
            3 * (number * EXPERT + number * D + 2 * D) - 2 * (32 * EXPERT + 34 * D) - 2 * EXPERT - NORM,
        )
        for number in (4, 8, 16, 32)
        for k in (1, 2)
    },
    "VLMo, separate attention": ("vlmo_base", ("model.attention=modality",), 12 * ATTENTION),
    "VLMo, one expert": (
        "vlmo_base",
        ("model.feed_forward=[{blocks: 0-11, router: shared}]", "model.contrast.paths=[modality]"),
        -14 * (EXPERT + NORM) - CONTRAST,
    ),
    "VLMo, no expert of pairs": (
        "vlmo_base",
        (f"{TOP}.router=modality", "model.contrast.paths=[modality]"),
        -2 * (EXPERT + NORM) - CONTRAST,
    ),
    "VL-MoE table 3, dense": (
        "vl_moe_base_32e",
        (f"{POOLS[0]}.router=modality", f"{POOLS[1]}.router=fusion"),
        -6 * 2 * (31 * EXPERT + 32 * D),
    ),
    "VL-MoE table 3, T-MoE": (
        "vl_moe_base_32e",
        in_both("experts_by_modality=[1, 32]"),
        -6 * (31 * EXPERT + 32 * D),
    ),
    "VL-MoE table 3, V-MoE": (
        "vl_moe_base_32e",
        in_both("experts_by_modality=[32, 1]"),
        -6 * (31 * EXPERT + 32 * D),
    ),
    **{
        f"VL-MoE, {number} experts": (
            "vl_moe_base_32e",
            in_both(f"experts_by_modality=[{number}, {number}]"),
            -6 * 2 * (32 - number) * (EXPERT + D),
        )
        for number in (4, 8, 16)
    },
}

# Row of the paper: (recipe, overrides, what the objectives of each stage are then).
STAGES: dict[str, tuple[str, tuple[str, ...], list[list[str]]]] = {
    "EVE table 5, MIM": ("eve_base", ("stages.0.streams=[masked_image]",), [["masked_image"]]),
    "EVE table 5, MLM": ("eve_base", ("stages.0.streams=[masked_text]",), [["masked_text"]]),
    "EVE table 5, at once": (
        "eve_base",
        ("stages.0.streams=[{name: both, source: pairs, objective: masked_pair, image_ratio: 0.5}]",),
        [["masked_pair"]],
    ),
    "VLMo, contrast only": (
        "vlmo_base",
        (f"stages.1.streams=[{ITC}]",),
        [["masked_text"], ["contrast"]],
    ),
    "VLMo, random start": (
        "vlmo_base",
        ("stages=[pairs]",),
        [["contrast_matching", "masked_text"]],
    ),
    "VLMo, texts first": (
        "vlmo_tiny",
        ("stages=[text, vision, pairs]",),
        [["masked_text"], ["masked_image"], ["contrast_matching", "masked_text"]],
    ),
    "MoMo, no second stage": (
        "momo_base",
        ("stages=[images, texts and pairs]",),
        [["masked_image"], ["masked_text", "masked_image", "masked_text", "contrast_matching"]],
    ),
    "MoMo, pairs only": (
        "momo_base",
        ("stages=[texts and pairs]", "stages.0.streams=[masked_image, masked_text, pairs]"),
        [["masked_image", "masked_text", "contrast_matching"]],
    ),
}

# Row of the paper: (recipe, overrides, key, what it is then, what it is in the recipe).
SETTINGS: dict[str, tuple[str, tuple[str, ...], str, object, object]] = {
    **{
        f"EVE figure 4, {ratio} of the image": (
            "eve_base",
            (f"stages.0.streams.0.image_ratio={ratio}",),
            "stages.0.streams.0.image_ratio",
            ratio,
            0.75,
        )
        for ratio in (0.3, 0.5, 0.9)
    },
    **{
        f"EVE figure 4, {ratio} of the text": (
            "eve_base",
            (f"stages.0.streams.1.text_ratio={ratio}",),
            "stages.0.streams.1.text_ratio",
            ratio,
            0.5,
        )
        for ratio in (0.25, 0.4, 0.75, 0.9)
    },
    "EVE table 7, no auxiliary loss": (
        "eve_base",
        (f"{TOP}.load_balance_weight=0",),
        f"{TOP}.load_balance_weight",
        0.0,
        0.001,
    ),
    "VLMo, local negatives": (
        "vlmo_base",
        ("stages.1.streams.0.negatives=local",),
        "stages.1.streams.0.negatives",
        "local",
        "global",
    ),
    "VLMo, images only before": (
        "vlmo_base",
        ("stages=[pairs]", "stages.0.init_from=data/beit_base"),
        "stages.0.name",
        "pairs",
        "text",
    ),
    "VL-MoE, load balance": (
        "vl_moe_base_32e",
        (*in_both("load_balance_weight=0.01"), *in_both("importance_weight=0"), *in_both("load_weight=0")),
        f"{POOLS[1]}.importance_weight",
        0.0,
        (0.005, 0.0),
    ),
    "VL-MoE, z-loss": (
        "vl_moe_base_32e",
        in_both("z_loss_weight=1.0e-3"),
        f"{POOLS[1]}.z_loss_weight",
        0.001,
        0.0,
    ),
    "MoMo, sources in turn": (
        "momo_base",
        ("stages.1.gradients=rotate", "stages.2.gradients=rotate"),
        "stages.2.gradients",
        "rotate",
        "accumulate",
    ),
    "MoMo, weights": (
        "momo_base",
        ("stages.2.streams.0.weight=0.5",),
        "stages.2.streams.0.weight",
        0.5,
        1.0,
    ),
}


def parameters(recipe: Recipe) -> int:
    return sum(prod(shape) for shape in parameter_shapes(recipe.model).values())


@cache
def parameters_of(name: str) -> int:
    return parameters(load_recipe(name))


@pytest.mark.parametrize("row", MODELS)
def test_the_model_differs_by_what_the_paper_changes(row: str) -> None:
    name, overrides, more = MODELS[row]
    assert parameters(load_recipe(name, overrides)) - parameters_of(name) == more


@pytest.mark.parametrize("row", STAGES)
def test_the_stages_are_those_of_the_row(row: str) -> None:
    name, overrides, expected = STAGES[row]
    stages = load_recipe(name, overrides).stages
    assert [[stream.objective for stream in stage.streams] for stage in stages] == expected


@pytest.mark.parametrize("row", SETTINGS)
def test_the_key_is_that_of_the_row(row: str) -> None:
    name, overrides, key, then, before = SETTINGS[row]
    for recipe, value in ((load_recipe(name), before), (load_recipe(name, overrides), then)):
        found = recipe
        for part in key.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)  # pyright: ignore
        assert found == value


def test_a_stage_that_is_not_there_is_named() -> None:
    with pytest.raises(
        UserError, match=r"override 'stages': there is no 'pair', expected some of \['text', 'pa"
    ):
        load_recipe("vlmo_base", ["stages=[text, pair]"])


def test_a_stage_that_is_named_twice_is_two() -> None:
    with pytest.raises(UserError, match=r"stage names \['pairs', 'pairs'\] are not all different"):
        load_recipe("vlmo_base", ["stages=[pairs, pairs]"])
    renamed = ("stages=[pairs, pairs]", "stages.0.name=short", "stages.0.warmup_steps=0", "stages.0.steps=5")
    short, pairs = load_recipe("vlmo_base", renamed).stages
    assert (short.name, short.steps, pairs.name, pairs.steps) == ("short", 5, "pairs", 200_000)
