"""What the recipe's moe.experts_backend names is what every expert of a built stage multiplies by."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from eve.config import MoE
from eve.moe.experts import ExpertBank
from eve.moe.hard_experts import Expert
from eve.parallel.layers import parallel_layers
from eve.parallel.tensor import HiddenParallelExpert
from eve.parallel.topology import Topology
from eve.training.stages import build_stage
from tests.tiny import tiny_recipe


@pytest.mark.parametrize("backend", ["auto", "grouped_mm", "triton", "megablocks"])
def test_experts_of_a_stage_multiply_by_what_the_recipe_names(tiny: Path, backend: str) -> None:
    recipe = tiny_recipe(tiny, f"moe.experts_backend={backend}")
    stage = build_stage(recipe, recipe.stages[0], None, Topology.from_environment())
    experts = [each for each in stage.modules() if isinstance(each, (Expert, ExpertBank))]
    # The image's and the text's of block 0, the bank of block 1, the decoder's one.
    assert Counter(type(each) for each in experts) == {Expert: 3, ExpertBank: 1}
    assert {each.products for each in experts} == {backend}


def test_experts_of_a_process_among_others_do_too(tiny: Path) -> None:
    pytest.importorskip("deepspeed")
    config, moe = tiny_recipe(tiny).model, MoE(experts_backend="triton")
    topology = replace(Topology.from_environment(), world_size=2)
    cut = parallel_layers(config, replace(topology, tensor=2), moe).expert(32, 64, "gelu")
    assert isinstance(cut, HiddenParallelExpert)
    assert (cut.products, tuple(cut.w1_DF.shape)) == ("triton", (32, 32))
    spread = parallel_layers(config, replace(topology, expert=2), moe).routed_experts(4, 32, 64, "gelu")
    (held,) = [each for each in spread.modules() if isinstance(each, ExpertBank)]
    assert (held.products, held.num_experts) == ("triton", 2)
