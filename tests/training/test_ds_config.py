from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from eve.errors import UserError
from eve.training.ds_config import (
    DS_CONFIGS,
    precision,
    read_ds_config,
    resolve_ds_config,
    zero_stage,
)
from tests.tiny import tiny_recipe

CONFIGS = sorted(path.name for path in DS_CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_what_its_name_says(name: str) -> None:
    tree = read_ds_config(DS_CONFIGS / name)
    stage, kind = int(name[4]), name[6:10]
    assert (zero_stage(tree), precision(tree)) == (stage, kind)
    # Defaults of DeepSpeed change between releases: everything that matters is written out.
    keys = {"gradient_clipping", "bf16", "fp16", "data_types", "communication_data_type"}
    assert keys <= tree.keys()
    if stage:
        assert {"overlap_comm", "reduce_bucket_size", "contiguous_gradients"} <= set(
            tree["zero_optimization"]
        )
    assert tree["bf16"]["check_grad_overflow"] is True


@pytest.mark.parametrize("name", CONFIGS)
def test_deepspeed_accepts_every_config(name: str, tiny: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = tiny_recipe(tiny, 'model.feed_forward=[{blocks: "0-1", router: modality}]')
    tree = read_ds_config(DS_CONFIGS / name)
    resolved, _ = resolve_ds_config(tree, recipe, recipe.stages[0], 1, cuda=True, where=name)
    assert '"auto"' not in json.dumps(resolved)
    config = DeepSpeedConfig(resolved)
    assert config.train_batch_size == 32
    assert config.gradient_accumulation_steps == 2
    assert config.gradient_clipping == recipe.optimizer.clip


@pytest.mark.parametrize(
    ("num_shares", "micro_batch", "passes", "train_batch_size"),
    [(1, "null", 2, 32), (2, "null", 2, 32), (2, "4", 4, 32), (4, "1", 8, 32), (1, "2", 16, 32)],
)
def test_accumulation_counts_micro_batches_times_streams(
    num_shares: int, micro_batch: str, passes: int, train_batch_size: int, tiny: Path
) -> None:
    recipe = tiny_recipe(tiny, f"training.micro_batch_size={micro_batch}")
    resolved, plan = resolve_ds_config({}, recipe, recipe.stages[0], num_shares, cuda=False, where="")
    assert resolved["gradient_accumulation_steps"] == plan.passes(recipe.stages[0]) == passes
    assert resolved["train_batch_size"] == train_batch_size
    assert plan.share["pairs"] == 16 // num_shares


def test_fp16_is_for_recipes_without_a_learned_router(tiny: Path) -> None:
    tree = read_ds_config(DS_CONFIGS / "zero1_fp16.json")
    recipe = tiny_recipe(tiny)
    with pytest.raises(UserError, match="enables fp16, which is for recipes without a topk router"):
        resolve_ds_config(tree, recipe, recipe.stages[0], 1, cuda=True, where="fp16.json")


def test_numbers_that_agree_are_accepted(tiny: Path) -> None:
    recipe = tiny_recipe(tiny)
    tree = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4, "gradient_clipping": 3.0}
    resolved, plan = resolve_ds_config(tree, recipe, recipe.stages[0], 1, cuda=False, where="")
    assert plan.micro_batches("pairs") == 2
    assert resolved["train_batch_size"] == 32


def test_the_installed_deepspeed_is_the_pinned_one() -> None:
    pins = (Path(__file__).parents[2] / "requirements.txt").read_text()
    assert f"deepspeed=={metadata.version('deepspeed')}" in pins
