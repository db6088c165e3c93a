from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typing_extensions import is_typeddict

from eve.config import Recipe
from eve.errors import UserError
from eve.training.ds_config import (
    DS_CONFIGS,
    describe,
    offloads,
    precision,
    read_ds_config,
    resolve_ds_config,
    routing_group,
    state_format,
    zero_stage,
)
from eve.training.ds_schema import EngineKeys, check_keys
from tests.tiny import tiny_recipe

CONFIGS = sorted(path.name for path in DS_CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_what_its_name_says(name: str) -> None:
    tree = read_ds_config(DS_CONFIGS / name)
    zero, kind, *offload = name.removesuffix(".json").split("_")
    stage = int(zero.removeprefix("zero"))
    assert (zero_stage(tree), precision(tree)) == (stage, kind)
    assert offloads(tree) == (offload == ["offload"])
    assert tree["bf16"]["check_grad_overflow"] is True


def keys_of(section: Any) -> dict[str, Any]:
    """Every key of a TypedDict of ds_schema.py, with the keys of the sections below it."""
    return {
        key: keys_of(kind) if is_typeddict(kind) else None for key, kind in get_type_hints(section).items()
    }


def keys_in(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: keys_in(value) if isinstance(value, dict) else None for key, value in tree.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_everything(name: str) -> None:
    """Defaults of DeepSpeed change between releases; only what a stage does not read may be left out."""
    tree = read_ds_config(DS_CONFIGS / name)
    expected = keys_of(EngineKeys)
    everything = expected["zero_optimization"]
    only_3 = {"sub_group_size", "memory_efficient_linear", *(key for key in everything if "stage3" in key)}
    expected["zero_optimization"] = {
        0: {"stage": None},
        1: {key: value for key, value in everything.items() if key not in only_3},
        2: {key: value for key, value in everything.items() if key not in only_3},
        3: everything,
    }[zero_stage(tree)]
    assert keys_in(tree) == expected


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
    [(1, "null", 2, 32), (2, "null", 2, 32), (2, "4", 4, 32), (4, "2", 4, 32), (1, "2", 16, 32)],
)
def test_accumulation_counts_micro_batches_times_streams(
    num_shares: int, micro_batch: str, passes: int, train_batch_size: int, tiny: Path
) -> None:
    recipe = tiny_recipe(tiny, f"training.micro_batch_size={micro_batch}")
    resolved, plan = resolve_ds_config({}, recipe, recipe.stages[0], num_shares, cuda=False, where="")
    assert resolved["gradient_accumulation_steps"] == plan.passes(recipe.stages[0]) == passes
    assert resolved["train_batch_size"] == train_batch_size
    assert plan.share["pairs"] == 16 // num_shares


def refusal(tree: dict[str, Any], recipe: Recipe, num_shares: int = 1) -> str:
    with pytest.raises(UserError) as error:
        resolve_ds_config(tree, recipe, recipe.stages[0], num_shares, cuda=True, where="ds.json")
    return str(error.value)


def with_zero(name: str, **changes: Any) -> dict[str, Any]:
    tree = read_ds_config(DS_CONFIGS / f"{name}.json")
    return {**tree, "zero_optimization": {**tree["zero_optimization"], **changes}}


DENSE = 'model.feed_forward=[{blocks: "0-1", router: modality}]'
HOST = {"device": "cpu", "pin_memory": True, "ratio": 1.0}


@pytest.mark.parametrize(
    ("tree", "overrides", "sentence"),
    [
        (
            with_zero("zero1_fp16"),
            [],
            "ds.json enables fp16, which is for recipes without a topk router; use bf16",
        ),
        (
            with_zero("zero3_bf16"),
            [],
            "ds.json says zero_optimization.stage 3, which is for recipes without a topk router; use 1 or 2",
        ),
        (
            with_zero("zero3_bf16"),
            [DENSE, "parallel.tensor=2"],
            "ds.json says zero_optimization.stage 3, which does not go with parallel.tensor 2 of the recipe; "
            "use 1 or 2",
        ),
        (
            with_zero("zero3_bf16"),
            [DENSE, "parallel.expert=2"],
            "ds.json says zero_optimization.stage 3, which does not go with parallel.expert 2 of the recipe; "
            "use 1 or 2",
        ),
        (
            with_zero("zero1_bf16", overlap_comm=True),
            [],
            "ds.json says overlap_comm true with ZeRO stage 1, which loses gradients of streams",
        ),
        (
            with_zero("zero1_bf16", stage=0),
            [],
            "ds.json says bf16 with zero_optimization.stage 0, where DeepSpeed starts its fp32 weights from "
            "rounded ones; use stage 1, which sends as much and needs less memory",
        ),
        (
            with_zero("zero0_fp32", offload_optimizer=HOST),
            [],
            "ds.json says offload_optimizer with zero_optimization.stage 0, which keeps its states; "
            "use 1 or 2",
        ),
        (
            with_zero("zero1_bf16"),
            ["training.compile=true", "parallel.tensor=2"],
            "training.compile does not go with parallel.tensor 2; set one of them to its default",
        ),
        (
            with_zero("zero1_bf16"),
            ["training.compile=true", "parallel.expert=2"],
            "training.compile does not go with parallel.expert 2; set one of them to its default",
        ),
    ],
)
def test_what_cannot_work_together(
    tree: dict[str, Any], overrides: list[str], sentence: str, tiny: Path
) -> None:
    assert refusal(tree, tiny_recipe(tiny, *overrides)) == sentence


def test_a_dense_recipe_may_have_the_rest(tiny: Path) -> None:
    for name in ("zero1_fp16", "zero2_fp16", "zero3_bf16", "zero3_bf16_offload"):
        recipe = tiny_recipe(tiny, DENSE, "training.compile=true")
        resolve_ds_config(with_zero(name), recipe, recipe.stages[0], 1, cuda=True, where=name)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"offload_param": {"device": "cpu"}}, "has the key zero_optimization.offload_param; weights stay"),
        (
            {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}},
            'says zero_optimization.offload_optimizer.device "nvme"; states go to the host ("cpu") or stay',
        ),
        (
            {"offload_optimizer": {"device": "cpu", "nvme_path": "/tmp"}},
            'has the key zero_optimization.offload_optimizer.nvme_path; states go to the host ("cpu") only',
        ),
        (
            {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "says zero_optimization.offload_optimizer.ratio 0.5; states are offloaded all (1.0) or not",
        ),
        (
            {"offload_optimizer": {"device": "cpu", "super_offload": True}},
            "has the unknown key zero_optimization.offload_optimizer.super_offload",
        ),
        (
            {"round_robin_gradients": True},
            "says zero_optimization.round_robin_gradients true; tools/convert_checkpoint.py cannot read "
            "checkpoints written so, so use false",
        ),
        ({"elastic_checkpoint": True}, "says zero_optimization.elastic_checkpoint true; tools/convert"),
        ({"parameter_alignment": True}, "says zero_optimization.parameter_alignment true; tools/convert"),
    ],
)
def test_what_the_schema_refuses(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        check_keys(with_zero("zero2_fp32", **keys), "ds.json")
    assert str(error.value).startswith(f"ds.json {sentence}")


def test_the_adam_of_deepspeed_is_not_forced(tiny: Path) -> None:
    tree = with_zero("zero1_bf16_offload")
    with pytest.raises(UserError, match="says zero_force_ds_cpu_optimizer true; offloaded states are"):
        check_keys({**tree, "zero_force_ds_cpu_optimizer": True}, "ds.json")
    del tree["zero_force_ds_cpu_optimizer"]
    recipe = tiny_recipe(tiny)
    resolved, plan = resolve_ds_config(tree, recipe, recipe.stages[0], 1, cuda=True, where="")
    assert resolved["zero_force_ds_cpu_optimizer"] is False
    assert "states of the optimizer on the host" in describe(resolved, plan, recipe.stages[0])


@pytest.mark.parametrize(
    ("overrides", "num_shares", "sentence"),
    [
        (
            ["training.micro_batch_size=2", "model.feed_forward.1.group_size=4"],
            1,
            "the micro-batch 2 is not a multiple of 4, the group_size of the routers; "
            "give training.micro_batch_size=4",
        ),
        (
            ["training.micro_batch_size=6", "data.sources.pairs.batch_size=24", "data.num_readers=2"],
            2,
            # 12 samples a share: 4 would divide them and is a multiple of the group.
            "the micro-batch 6 is not a multiple of 4, the group_size of the routers; "
            "give training.micro_batch_size=4",
        ),
        (
            ["training.micro_batch_size=16"],
            2,
            "data.sources.pairs.batch_size 16 gives each of 2 processes 8 samples, which is not a multiple "
            "of the micro-batch 16; give training.micro_batch_size=8",
        ),
        (
            ["model.feed_forward.1.group_size=16"],
            2,
            "data.sources.pairs.batch_size 16 gives each of 2 processes 8 samples, which is not a multiple "
            "of 16, the group_size of the topk routers",
        ),
        (
            ["parallel.tensor=2", "data.num_readers=4"],
            8,
            "data.num_readers 4 is not a multiple of the 8 groups of 2 processes",
        ),
    ],
)
def test_micro_batches_hold_whole_groups_of_the_routers(
    overrides: list[str], num_shares: int, sentence: str, tiny: Path
) -> None:
    recipe = tiny_recipe(tiny, "model.feed_forward.1.group_size=4", *overrides)
    assert refusal({}, recipe, num_shares) == sentence


def test_groups_of_several_routers_fit_together(tiny: Path) -> None:
    banks = "[{blocks: 0, router: topk, group_size: 4}, {blocks: 1, router: topk, group_size: 6}]"
    recipe = tiny_recipe(
        tiny, f"model.feed_forward={banks}", "data.sources.pairs.batch_size=48", "data.num_readers=2"
    )
    assert routing_group(recipe) == 12
    assert routing_group(tiny_recipe(tiny, DENSE)) == 1
    resolved, _ = resolve_ds_config({}, recipe, recipe.stages[0], 2, cuda=False, where="")
    assert resolved["train_micro_batch_size_per_gpu"] == 24


def test_a_batch_is_cut_by_shares_not_by_processes(tiny: Path) -> None:
    """8 processes with tensor 2 are 4 shares; DeepSpeed's product holds over its data-parallel ranks."""
    recipe = tiny_recipe(tiny, "parallel.tensor=2", "training.micro_batch_size=2")
    resolved, plan = resolve_ds_config({}, recipe, recipe.stages[0], 4, cuda=False, where="")
    assert plan.share == {"pairs": 4}
    assert resolved["train_batch_size"] == 2 * resolved["gradient_accumulation_steps"] * 4 == 32


def test_formats_of_optimizer_states() -> None:
    formats = {name: state_format(read_ds_config(DS_CONFIGS / name)) for name in CONFIGS}
    assert [name for name, kind in formats.items() if kind == "BF16_Optimizer"] == ["zero1_bf16.json"]


def test_numbers_that_agree_are_accepted(tiny: Path) -> None:
    recipe = tiny_recipe(tiny)
    tree = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4, "gradient_clipping": 3.0}
    resolved, plan = resolve_ds_config(tree, recipe, recipe.stages[0], 1, cuda=False, where="")
    assert plan.micro_batches("pairs") == 2
    assert resolved["train_batch_size"] == 32


def test_the_installed_deepspeed_is_the_pinned_one() -> None:
    pins = (Path(__file__).parents[2] / "requirements.txt").read_text()
    assert f"deepspeed=={metadata.version('deepspeed')}" in pins
