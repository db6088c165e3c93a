"""A step through DeepSpeed, on one and two ranks and with each ZeRO stage, is a step of plain PyTorch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eve.config import Recipe
from eve.data.batch import collate
from eve.data.loader import read_samples
from eve.data.tokenizer import Tokenizer
from eve.objectives import build_objective
from eve.parallel.topology import Topology
from eve.training.ds_config import DS_CONFIGS, StepPlan, resolve_ds_config
from eve.training.engine import Engine
from eve.training.stages import build_stage
from tests.rank_pool import RankPool
from tests.tiny import tiny_recipe

STEPS, BATCH, LEARNING_RATE = 3, 16, 1e-2
OVERRIDES = (
    # The load-balance loss of a micro-batch is not a sum over its tokens: it depends on the cut.
    "model.feed_forward.1.load_balance_weight=0.0",
    "optimizer.clip=0.5",
    # With a tiny eps AdamW makes a whole step of what is rounding in a gradient near 0.
    "optimizer.eps=1.0e-4",
)
NO_DECAY = re.compile(
    r"norm|bias|gamma|token|position|type_embedding|embedding\.word|modality_vector|b1_EF|b2_ED"
)
# ZeRO stage 3 is for recipes without a learned router.
DENSE = ('model.feed_forward=[{blocks: "0-1", router: modality}]', *OVERRIDES[1:])


def read_batches(recipe: Recipe) -> list[list]:
    """The samples of each step."""
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    stage = recipe.stages[0]
    objectives = {stream.name: build_objective(stream, recipe.model) for stream in stage.streams}
    samples = read_samples(
        recipe.data.sources["pairs"].mix[0].shards,
        image_size=recipe.model.image_size,
        max_text_length=recipe.model.max_text_length,
        tokenizer=tokenizer,
        maskings={name: objective.masking(tokenizer) for name, objective in objectives.items()},
        seed=1,
        limit=STEPS * BATCH,
    )
    found = list(samples)
    return [found[i : i + BATCH] for i in range(0, len(found), BATCH)]


def plain_steps(recipe: Recipe, cut: int = BATCH) -> tuple[dict[str, Tensor], list[float]]:
    """(weights, gradient norms): one process, torch.optim and torch's clipping, no engine. `cut`: samples of
    a forward pass."""
    stage = recipe.stages[0]
    alone = Topology(0, 1, 0, torch.device("cpu"))
    module = build_stage(recipe, stage, None, alone).train()
    parameters = dict(module.model.named_parameters())
    bare = {name for name in parameters if NO_DECAY.search(name)}
    config = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for n, p in parameters.items() if n not in bare],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for n, p in parameters.items() if n in bare], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=config.betas,
        eps=config.eps,
        foreach=False,
    )
    norms = []
    for samples in read_batches(recipe):
        for stream in stage.streams:
            objective = module.objectives[stream.name]
            units = objective.units(collate(samples))
            for start in range(0, BATCH, cut):
                batch = collate(samples[start : start + cut])
                (stream.weight * objective(module.model, batch, units, cut / BATCH).loss).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in parameters.items()}, norms


def build_engine(
    recipe: Recipe, config: str, previous: dict[str, Tensor] | None = None
) -> tuple[Engine, StepPlan, Topology]:
    topology = Topology.from_environment()
    stage = recipe.stages[0]
    tree = json.loads((DS_CONFIGS / config).read_text())
    # As of a large model: small weights are cut up as well.
    tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 10}
    resolved, plan = resolve_ds_config(tree, recipe, stage, topology.data, cuda=False, where=config)
    module = build_stage(recipe, stage, previous, topology)
    return Engine(module, recipe.optimizer, resolved, topology), plan, topology


def engine_steps(
    recipe_path: Path, overrides: tuple[str, ...], config: str, micro_batch: int
) -> tuple[dict[str, Tensor], list[float]]:
    """The same through the engine; runs on every rank of a pool."""
    recipe = tiny_recipe(recipe_path, *overrides, f"training.micro_batch_size={micro_batch}")
    stage = recipe.stages[0]
    engine, plan, topology = build_engine(recipe, config)
    module = engine.module
    norms = []
    for samples in read_batches(recipe):
        whole = collate(samples)
        share = samples[topology.rank * BATCH // topology.world_size :][: BATCH // topology.world_size]
        cut = [collate(share[i : i + micro_batch]) for i in range(0, len(share), micro_batch)]
        passes: list[tuple] = [(stream, batch) for batch in cut for stream in stage.streams]
        for number, (stream, batch) in enumerate(passes):
            units = module.objectives[stream.name].units(whole) / topology.world_size
            loss, _ = engine.forward(stream.name, batch, units, 1 / plan.micro_batches(stream.source))
            engine.backward(loss * stream.weight, last=number == len(passes) - 1)
        assert engine.step(LEARNING_RATE)
        norms.append(engine.gradient_norm)
    weights = engine.weights()
    engine.close()
    return weights, norms


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize(
    "config", ["zero0_fp32.json", "zero1_fp32.json", "zero2_fp32.json", "zero3_fp32.json"]
)
def test_two_ranks_equal_one_plain_process(
    config: str, micro_batch: int, tiny: Path, two_ranks: RankPool
) -> None:
    overrides = DENSE if config.startswith("zero3") else OVERRIDES
    expected, expected_norms = plain_steps(tiny_recipe(tiny, *overrides))
    for weights, norms in two_ranks.run(engine_steps, tiny, overrides, config, micro_batch):
        assert norms == pytest.approx(expected_norms, rel=1e-4)
        assert weights.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(
                weights[name], weight, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


PAIR = ("stages.0.streams=[{name: pair, source: pairs, objective: masked_pair}]",)
# So large that the dropped choices are seen in the weights.
CAPACITY = "model.feed_forward.1.capacity_factor=0.5", "model.init_std=0.2", "model.layer_scale=1.0"


@pytest.mark.parametrize(
    ("more", "config", "cut"),
    [
        (PAIR, "zero0_fp32.json", 4),
        (PAIR, "zero2_fp32.json", 8),
        # What finds a slot depends on who is in the forward pass.
        (CAPACITY, "zero0_fp32.json", 4),
        (CAPACITY, "zero1_fp32.json", 8),
    ],
)
def test_pairs_and_slots_equal_plain_micro_batches(
    more: tuple[str, ...], config: str, cut: int, tiny: Path, two_ranks: RankPool
) -> None:
    overrides = (*OVERRIDES, *more)
    expected, expected_norms = plain_steps(tiny_recipe(tiny, *overrides), cut)
    if more == CAPACITY:
        _, dropless = plain_steps(tiny_recipe(tiny, *overrides, "model.feed_forward.1.capacity_factor=0"))
        assert expected_norms != pytest.approx(dropless, rel=1e-3)
    for weights, norms in two_ranks.run(engine_steps, tiny, overrides, config, cut):
        assert norms == pytest.approx(expected_norms, rel=1e-4)
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("config", ["zero1_bf16.json", "zero2_bf16.json"])
def test_bf16_stays_near_fp32(config: str, tiny: Path, two_ranks: RankPool) -> None:
    expected, expected_norms = plain_steps(tiny_recipe(tiny, *OVERRIDES))
    for weights, norms in two_ranks.run(engine_steps, tiny, OVERRIDES, config, 8):
        # bf16 has 8 bits.
        assert norms == pytest.approx(expected_norms, rel=0.05)
        moved = [(weights[name] - weight).abs().max() for name, weight in expected.items()]
        assert max(moved) < STEPS * LEARNING_RATE
        # The fp32 weights are there, not their rounding.
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


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
    after = engine.weights()
    engine.close()
    other, _, _ = build_engine(recipe, config, {name: weight + 1 for name, weight in before.items()})
    other.load(directory, "tag")
    loaded = other.weights()
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
