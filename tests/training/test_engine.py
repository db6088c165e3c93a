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
from eve.training.ds_config import DS_CONFIGS, resolve_ds_config
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


def plain_steps(recipe: Recipe) -> tuple[dict[str, Tensor], list[float]]:
    """(weights, gradient norms): one process, whole batch, torch.optim and torch's clipping, no engine."""
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
        batch = collate(samples)
        for stream in stage.streams:
            objective = module.objectives[stream.name]
            (stream.weight * objective(module.model, batch, objective.units(batch), 1.0).loss).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in parameters.items()}, norms


def engine_steps(
    recipe_path: Path, overrides: tuple[str, ...], config: str, micro_batch: int
) -> tuple[dict[str, Tensor], list[float]]:
    """The same through the engine; runs on every rank of a pool."""
    recipe = tiny_recipe(recipe_path, *overrides, f"training.micro_batch_size={micro_batch}")
    topology = Topology.from_environment()
    stage = recipe.stages[0]
    tree = json.loads((DS_CONFIGS / config).read_text())
    resolved, plan = resolve_ds_config(tree, recipe, stage, topology.world_size, cuda=False, where=config)
    module = build_stage(recipe, stage, None, topology)
    engine = Engine(module, recipe.optimizer, resolved, topology)
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
@pytest.mark.parametrize("config", ["fp32.json", "zero1_fp32.json", "zero2_fp32.json", "zero3_fp32.json"])
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
