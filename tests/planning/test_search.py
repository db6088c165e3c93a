"""Operations, seconds and the choice among layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eve.config import load_recipe
from eve.data.batch import collate
from eve.errors import UserError
from eve.planning.layout import Layout, passes_of
from eve.planning.search import Fixed, Planner, best
from eve.planning.step_time import GPUS, Assumptions, pass_flops, seconds_of
from eve.planning.traffic import Transfer
from eve.planning.weights import ModelWeights
from eve.training.flops import batch_flops
from tests.planning.measure import equal_samples
from tests.tiny import tiny_recipe


def planner(recipe: str, gpus: int, gpu: str, *overrides: str, **given: float) -> Planner:
    loaded = load_recipe(recipe, overrides)
    return Planner(loaded, loaded.stages[0], GPUS[gpu], gpus, 8, Assumptions(**given))  # pyright: ignore


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_a_pass_are_those_of_a_batch(checkpointing: bool, tiny: Path) -> None:
    recipe = tiny_recipe(tiny)
    layout = Layout(gpus=1, micro_batch=16, checkpointing=checkpointing)
    batch = collate(equal_samples(recipe, 9))
    stage = recipe.stages[0]
    for stream, one in zip(stage.streams, passes_of(layout, recipe, stage, 9), strict=True):
        real = batch_flops(recipe.model, stream, batch, checkpointing=checkpointing)
        assert pass_flops(recipe.model, layout, one) == (real.model, real.hardware)


def test_parameters_of_all_ranks_together_are_the_model() -> None:
    recipe = load_recipe("eve_large")
    weights = ModelWeights(recipe, recipe.stages[0])
    whole = weights.count(Layout(gpus=1)).dense
    spread = weights.count(Layout(gpus=8, expert=8))
    assert spread.dense + 8 * spread.experts == whole
    # 806M parameters of routed experts (README).
    assert 8 * spread.experts == pytest.approx(805.8e6, rel=1e-4)
    cut = weights.count(Layout(gpus=8, tensor=4, sequence=True, expert=8))
    # Tables of words are cut into multiples of 8: 64,000 is one of 32.
    replicated = sum(
        weights.held(name, 1, 1)
        for name in weights.sizes
        if weights.held(name, 4, 8) == weights.held(name, 1, 1)
    )
    assert 4 * (cut.dense - replicated) + replicated + 8 * cut.experts == whole


def test_seconds_follow_the_slower_link() -> None:
    gpu = replace(GPUS["h100"], link=400.0, network=50.0)
    given = Assumptions(efficiency=1.0, latency=0.0, network_latency=0.0)
    # A ring of 16 on two hosts: 30 parts of 100 bytes each, an eighth of them over the network.
    assert seconds_of(Transfer("x", "all_reduce", range(16), 8, 1600.0, 1), gpu, given) == pytest.approx(
        max(3000 * 7 / 8 / 400, 3000 / 8 / 50)
    )
    inside = Transfer("x", "all_reduce", range(8), 8, 800.0, 1)
    assert seconds_of(inside, gpu, given) == pytest.approx(1400 / 400)
    later = replace(given, latency=1.0)
    assert seconds_of(replace(inside, count=5), gpu, later) == pytest.approx(1400 / 400 + 5 * 3)


def test_a_model_that_fits_everywhere_is_not_cut() -> None:
    plans, _ = planner("eve_base", 8, "h200").all(Fixed())
    assert best(plans).layout.tensor == 1
    assert all(plan.time.total > 0 and plan.memory.total > 0 for plan in plans)


def test_what_is_fixed_stays() -> None:
    fixed = Fixed(tensor=2, sequence=False, expert=4, zero_stage=1, micro_batch=32, checkpointing=True)
    plans, _ = planner("eve_large", 32, "a100-80").all(fixed)
    assert [plan.layout for plan in plans] == [
        Layout(32, 8, 2, False, 4, 1, "bf16", 32, True),
    ]


def test_checkpointing_where_memory_is_short() -> None:
    wide = ("model.width=2048", "model.hidden=8192", "model.heads=32", "model.depth=24")
    search = planner("eve_large", 8, "a100-40", *wide, "data.num_readers=64")
    plans, _ = search.all(Fixed(micro_batch=64, expert=8))
    assert {plan.fits for plan in plans} == {True, False}
    assert best(plans).memory.total <= GPUS["a100-40"].memory
    with pytest.raises(UserError, match="no layout fits: the smallest needs"):
        best(search.all(Fixed(tensor=1, micro_batch=256, checkpointing=False))[0])


def test_why_layouts_are_left_out() -> None:
    _, refused = planner("eve_large", 256, "h200", "model.feed_forward.1.group_size=16").all(Fixed())
    (reason,) = refused
    assert "8 samples, which is not a multiple of 16, the group_size" in reason
    assert refused[reason].data == 256
    with pytest.raises(UserError, match="heads 12 is not a multiple of"):
        planner("eve_base", 72, "h200").all(Fixed(tensor=9))
    with pytest.raises(UserError, match="does not divide the 8 GPUs of a host"):
        planner("eve_large", 16, "h200").all(Fixed(tensor=16))
