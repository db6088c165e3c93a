"""What an engine and a pass really hold, counted from their tensors."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eve.config import Recipe
from eve.data.batch import Sample, collate
from eve.data.tokenizer import Tokenizer
from eve.objectives import build_objective
from eve.parallel.topology import Topology
from eve.training.stages import build_stage
from tests.steps import BATCH, build_engine, read_batches
from tests.tiny import tiny_recipe

# DeepSpeed's buckets are larger than all of a tiny model; they are of a fixed size.
BUCKET = 4 * 50_000_000


def live_tensors() -> list[Tensor]:
    """Those of floating-point numbers that Python can see, but DeepSpeed's buckets."""
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return [t for t in found if t.is_floating_point() and t.untyped_storage().nbytes() < BUCKET]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of each storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def most_bytes_of_an_engine(recipe_path: Path, overrides: tuple[str, ...], config: str) -> int:
    """Weights, gradients and optimizer of this rank, in bytes: the most after any pass of the second step."""
    recipe = tiny_recipe(recipe_path, *overrides)
    batches = read_batches(recipe, 2)
    # Held, so that nothing new takes their addresses.
    before = live_tensors()
    engine, plan, topology = build_engine(recipe, config)
    size, micro = BATCH // topology.data, plan.micro_batch["pairs"]
    most = 0
    for step, samples in enumerate(batches):
        share = samples[topology.data_rank * size :][:size]
        cut = [collate(share[i : i + micro]) for i in range(0, size, micro)]
        passes = [(stream.name, batch) for batch in cut for stream in recipe.stages[0].streams]
        for number, (stream, batch) in enumerate(passes):
            units = engine.module.objectives[stream].units(collate(samples))
            loss, _ = engine.forward(stream, batch, units, 1.0)
            engine.backward(loss, last=number == len(passes) - 1)
            del loss, _
            if step == 0:
                continue
            # Those that only C++ holds.
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            now = storages([*live_tensors(), *gradients])
            most = max(most, sum(now[address] for address in now.keys() - storages(before).keys()))
        engine.step(1e-3)
    engine.close()
    return most


def bytes_kept_for_the_backward(recipe: Recipe, stream: str, samples: list[Sample]) -> int:
    """What autograd has saved at the end of a forward pass of this rank, but the parameters."""
    topology = Topology.from_environment().arranged(recipe.parallel, recipe.model).connected()
    module = build_stage(recipe, recipe.stages[0], None, topology).train()
    batch = collate(samples)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(stream, batch, module.objectives[stream].units(batch))
    parameters = storages(module.parameters()).keys()
    bytes_of = storages(kept)
    del output
    return sum(bytes_of[address] for address in bytes_of.keys() - parameters)


def kept_on_this_rank(recipe_path: Path, overrides: tuple[str, ...], stream: str, length: int) -> int:
    recipe = tiny_recipe(recipe_path, *overrides)
    return bytes_kept_for_the_backward(recipe, stream, equal_samples(recipe, length))


def equal_samples(recipe: Recipe, length: int, number: int = BATCH) -> list[Sample]:
    """Random pairs whose texts all have `length` tokens, with the masks of the streams."""
    rng = np.random.default_rng(0)
    model = recipe.model
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    samples = []
    for index in range(number):
        pixels = rng.integers(0, 256, (3, model.image_size, model.image_size), dtype=np.uint8)
        tokens = rng.integers(6, len(tokenizer.special_V), length)
        sample = Sample(str(index), 0, index, index, image_CHW=pixels, tokens_N=tokens)
        for stream in recipe.stages[0].streams:
            masking = build_objective(stream, model).masking(tokenizer)
            sample.masks[stream.name] = masking(sample, rng)
        samples.append(sample)
    return samples
