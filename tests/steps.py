"""Training steps on given samples: in plain PyTorch on one process, and through the engine on any layout."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from eve.config import Recipe
from eve.data.batch import Sample, collate
from eve.data.loader import read_samples
from eve.data.tokenizer import Tokenizer
from eve.objectives import build_objective
from eve.parallel.topology import Topology
from eve.training.ds_config import DS_CONFIGS, StepPlan, resolve_ds_config
from eve.training.engine import Engine
from eve.training.stages import build_stage
from tests.tiny import tiny_recipe

BATCH = 16
# Steps that are compared: more than one pass over the tiny data. The README's numbers are of 20.
STEPS = int(os.environ.get("EVE_STEPS", "8"))
OVERRIDES = (
    "optimizer.clip=0.5",
    # With a tiny eps AdamW makes a whole step of what is rounding in a gradient near 0.
    "optimizer.eps=3.0e-4",
)
# ZeRO stage 3 is for recipes without a learned router.
DENSE = ('model.feed_forward=[{blocks: "0-1", router: modality}]', *OVERRIDES)
NO_DECAY = re.compile(
    r"norm|bias|gamma|_token$|position|type_embedding|embedding\.word|modality_vector|b1_E?F|b2_E?D|temperature"
)


@dataclass
class Steps:
    """What a run of steps gives: of each step the mean losses of the streams and the gradient norm; the
    weights after the last (an engine's on rank 0 only)."""

    losses: list[dict[str, float]]
    norms: list[float]
    weights: dict[str, Tensor]

    def difference(self, other: Steps) -> tuple[float, float, float]:
        """Largest relative differences: losses, norms, parameters (each over its largest entry)."""
        losses = [
            abs(ours[name] - theirs[name]) / abs(theirs[name])
            for ours, theirs in zip(self.losses, other.losses, strict=True)
            for name in theirs
        ]
        norms = [abs(a - b) / b for a, b in zip(self.norms, other.norms, strict=True)]
        assert self.weights.keys() == other.weights.keys()
        parameters = [
            float((self.weights[name] - weight).abs().max() / weight.abs().max().clamp_min(1e-12))
            for name, weight in other.weights.items()
        ]
        return max(losses), max(norms), max(parameters)


def read_batches(recipe: Recipe, steps: int) -> list[list[Sample]]:
    """The samples of each step, of as many passes over the tiny data as it takes."""
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    stage = recipe.stages[0]
    objectives = {
        stream.name: build_objective(stream, recipe.model, visual_tokenizer=recipe.data.visual_tokenizer)
        for stream in stage.streams
    }
    found: list[Sample] = []
    while len(found) < steps * BATCH:
        samples = read_samples(
            recipe.data.sources["pairs"].mix[0].shards,
            image_size=recipe.model.image_size,
            max_text_length=recipe.model.max_text_length,
            tokenizer=tokenizer,
            maskings={name: objective.masking(tokenizer) for name, objective in objectives.items()},
            seed=1 + len(found),
            limit=steps * BATCH - len(found),
        )
        found.extend(samples)
    return [found[i : i + BATCH] for i in range(0, steps * BATCH, BATCH)]


def plain_steps(recipe: Recipe, steps: int, learning_rate: float, cut: int = BATCH) -> Steps:
    """One process, torch.optim and torch's clipping, no engine. `cut`: samples of a forward pass."""
    stage = recipe.stages[0]
    alone = Topology(0, 1, 0, torch.device("cpu"))
    module = build_stage(recipe, stage, None, alone).train()
    parameters = dict(module.model.named_parameters())
    bare = {name for name in parameters if NO_DECAY.search(name)}
    config = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for n, p in parameters.items() if n not in bare and p.requires_grad],
                "weight_decay": config.weight_decay,
            },
            {
                "params": [p for n, p in parameters.items() if n in bare and p.requires_grad],
                "weight_decay": 0.0,
            },
        ],
        lr=learning_rate,
        betas=config.betas,
        eps=config.eps,
        foreach=False,
    )
    result = Steps([], [], {})
    for samples in read_batches(recipe, steps):
        losses = {}
        for stream in stage.streams:
            objective = module.objectives[stream.name]
            units = objective.units(collate(samples))
            losses[stream.name] = 0.0
            for start in range(0, BATCH, cut):
                batch = collate(samples[start : start + cut])
                loss = objective(module.model, batch, units, cut / BATCH).loss
                (stream.weight * loss).backward()
                losses[stream.name] += float(loss.detach())
        result.losses.append(losses)
        result.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip or 1e9)))
        optimizer.step()
        optimizer.zero_grad()
    return replace(result, weights={name: p.detach().clone() for name, p in parameters.items()})


def build_engine(
    recipe: Recipe, config: str, previous: dict[str, Tensor] | None = None
) -> tuple[Engine, StepPlan, Topology]:
    """The engine of the recipe's first stage on this rank of its layout."""
    topology = Topology.from_environment().arranged(recipe.parallel, recipe.model).connected()
    stage = recipe.stages[0]
    tree = json.loads((DS_CONFIGS / config).read_text())
    # As of a large model: small weights are cut up as well.
    tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 10}
    resolved, plan = resolve_ds_config(tree, recipe, stage, topology.data, cuda=False, where=config)
    module = build_stage(recipe, stage, previous, topology)
    return Engine(module, recipe.optimizer, resolved, topology), plan, topology


def engine_steps(
    recipe_path: Path, overrides: tuple[str, ...], config: str, steps: int, learning_rate: float
) -> Steps:
    """The same through the engine; runs on every rank of a pool."""
    recipe = tiny_recipe(recipe_path, *overrides)
    engine, plan, topology = build_engine(recipe, config)
    result = run_engine(recipe, engine, plan, topology, read_batches(recipe, steps), learning_rate)
    engine.close()
    return result


def run_engine(
    recipe: Recipe,
    engine: Engine,
    plan: StepPlan,
    topology: Topology,
    batches: list[list[Sample]],
    learning_rate: float,
) -> Steps:
    result = Steps([], [], {})
    for samples in batches:
        made, losses = make_step(recipe, engine, plan, topology, samples, learning_rate)
        assert made
        shares = topology.gather_objects(losses)[:: topology.tensor]
        result.losses.append({name: sum(s[name] for s in shares) / len(shares) for name in losses})
        result.norms.append(engine.gradient_norm)
    return replace(result, weights=engine.weights())


def make_step(
    recipe: Recipe,
    engine: Engine,
    plan: StepPlan,
    topology: Topology,
    samples: list[Sample],
    learning_rate: float,
) -> tuple[bool, dict[str, float]]:
    """(the step was made, losses of the streams on this rank's share)."""
    stage = recipe.stages[0]
    whole = collate(samples)
    size = BATCH // topology.data
    share = samples[topology.data_rank * size :][:size]
    micro = plan.micro_batch["pairs"]
    cut = [collate(share[i : i + micro]) for i in range(0, size, micro)]
    passes = [(stream, batch) for batch in cut for stream in stage.streams]
    losses = dict.fromkeys((stream.name for stream in stage.streams), 0.0)
    for number, (stream, batch) in enumerate(passes):
        units = engine.module.objectives[stream.name].units(whole) / topology.data
        loss, _ = engine.forward(stream.name, batch, units, 1 / plan.micro_batches(stream.source))
        engine.backward(loss * stream.weight, last=number == len(passes) - 1)
        losses[stream.name] += float(loss.detach())
    return engine.step(learning_rate), losses
