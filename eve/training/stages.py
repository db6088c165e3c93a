"""What a stage starts from: its modules, what learns in them, and where the weights come from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eve.config import Recipe, Stage
from eve.model import build_model
from eve.objectives import build_objective
from eve.parallel.layers import parallel_layers
from eve.parallel.topology import Topology
from eve.training.engine import EngineModule
from eve.training.export import load_weights
from eve.training.optimizer import freeze


def build_stage(
    recipe: Recipe, stage: Stage, previous: dict[str, Tensor] | None, topology: Topology
) -> EngineModule:
    """The model and the objectives of a stage.

    Weights come from, the first that is there: 1. `init_from`, 2. the stage before (`previous`, this
    process's part by the names of one device), 3. the seed.
    """
    layers = parallel_layers(recipe.model, topology)
    model = build_model(recipe.model, seed=recipe.seed, layers=layers)
    if stage.init_from is not None:
        load_weights(model, Path(stage.init_from), layers)
    elif previous is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(previous[layers.name_of(name)])
    if recipe.training.activation_checkpointing:
        model.enable_checkpointing()
    freeze(model, stage.trainable)
    if recipe.training.compile:
        model.compile_blocks()
    objectives = {stream.name: build_objective(stream, recipe.model) for stream in stage.streams}
    return EngineModule(model, objectives, topology)


def stage_at(recipe: Recipe, step: int) -> tuple[int, int]:
    """(index of the stage, step in it) after `step` steps of the run; a finished stage is still its own."""
    for index, stage in enumerate(recipe.stages):
        if step <= stage.steps:
            return index, step
        step -= stage.steps
    raise AssertionError(f"step {step} past the end of the run")
