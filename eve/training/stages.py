"""What a stage starts from: its modules, what learns in them, and where the weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eve.config import Recipe, Stage
from eve.errors import UserError
from eve.model import build_model, parameter_shapes
from eve.objectives import build_objective
from eve.objectives.coverage import uses
from eve.parallel.layers import parallel_layers
from eve.parallel.pool import pool_of
from eve.parallel.sharding import Kind, placement
from eve.parallel.topology import Topology
from eve.training.ds_config import precision, state_format, zero_stage
from eve.training.engine import EngineModule
from eve.training.export import check_weights, load_weights
from eve.training.optimizer import freeze, learning_names
from kernels import megablocks_products


def build_stage(
    recipe: Recipe, stage: Stage, previous: dict[str, Tensor] | None, topology: Topology
) -> EngineModule:
    """The model and the objectives of a stage.

    Weights come from, the first that is there: 1. `init_from`, 2. the stage before (`previous`, this
    process's part by the names of one device), 3. the seed.
    """
    layers = parallel_layers(recipe.model, topology, recipe.moe)
    model = build_model(recipe.model, seed=recipe.seed, layers=layers)
    if stage.init_from is not None:
        load_weights(model, Path(stage.init_from), layers)
    elif previous is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(previous[layers.name_of(name)])
    if recipe.training.activation_checkpointing:
        model.enable_checkpointing()
    freeze(model, learning(recipe, stage))
    if recipe.training.compile:
        model.compile_blocks()
    pool = pool_of(topology)
    objectives = {
        stream.name: build_objective(stream, recipe.model, pool, recipe.data.visual_tokenizer)
        for stream in stage.streams
    }
    return EngineModule(model, objectives, topology)


def learning(recipe: Recipe, stage: Stage) -> set[str]:
    """Names of what learns in the stage: what `trainable` names and a stream uses.

    Raises UserError where that is nothing."""
    kinds = {stream.name: recipe.data.sources[stream.source].kind for stream in stage.streams}
    named = learning_names(parameter_shapes(recipe.model).keys(), stage.trainable)
    found = {
        name
        for name in named
        if any(uses(stream, kinds[stream.name], recipe.model, name) for stream in stage.streams)
    }
    if not found:
        raise UserError(
            f"stage {stage.name} trains nothing: its streams use no parameter that trainable names"
        )
    return found


def check_stage(recipe: Recipe, stage: Stage, ds_tree: dict[str, Any], where: str) -> None:
    """Raises UserError where its weights cannot be those of the model or cannot learn so; builds nothing.

    `ds_tree` is the configuration of DeepSpeed that `where` holds.
    """
    if stage.init_from is not None:
        check_weights(Path(stage.init_from), recipe.model)
    names = parameter_shapes(recipe.model).keys()
    kinds = {placement(name, names).kind for name in learning(recipe, stage)}
    tensor, expert = recipe.parallel.tensor, recipe.parallel.expert
    # What DeepSpeed's optimizers (0.19.8) expect to find on every rank.
    if expert > 1 and zero_stage(ds_tree) > 0 and Kind.EXPERT not in kinds:
        raise UserError(
            f"stage {stage.name} trains no expert of a learned router, but parallel.expert is {expert}; "
            "give 1"
        )
    cut = {Kind.COLUMN, Kind.ROW, Kind.VOCABULARY} | ({Kind.EXPERT} if expert > 1 else set())
    lacking = (tensor > 1 and not kinds & cut) or (expert > 1 and kinds == {Kind.EXPERT})
    if state_format(ds_tree) == "BF16_Optimizer" and lacking:
        raise UserError(
            f"stage {stage.name} trains too little for {where} with parallel.tensor {tensor} and "
            f"parallel.expert {expert}: no weight that counts in the gradient norm of every process; use "
            "zero2_bf16.json"
        )


def check_experts_backend(recipe: Recipe, ds_tree: dict[str, Any], *, cuda: bool, where: str) -> None:
    """Raises UserError where the one that the recipe names cannot multiply here; loads it if it can."""
    backend, kind = recipe.moe.experts_backend, precision(ds_tree)
    if backend == "auto":
        return
    if recipe.model.sub_norm:
        # Between the products of such an expert stands a norm, so plain ones multiply (SubNormExpert).
        raise UserError(f"moe.experts_backend is {backend}, but experts with model.sub_norm take auto alone")
    if not cuda:
        raise UserError(f"moe.experts_backend is {backend}, which needs a CUDA device; use auto on a CPU")
    if backend != "triton" and kind != "bf16":
        raise UserError(f"moe.experts_backend is {backend}, which multiplies bf16, but {where} says {kind}")
    if backend == "megablocks":
        try:
            megablocks_products.grouped_gemm()
        except ImportError as error:
            raise UserError(f"moe.experts_backend is megablocks, but {error}") from None


def stage_at(recipe: Recipe, step: int) -> tuple[int, int]:
    """(index of the stage, step in it) after `step` steps of the run; a finished stage is still its own."""
    for index, stage in enumerate(recipe.stages):
        if step <= stage.steps:
            return index, step
        step -= stage.steps
    raise AssertionError(f"step {step} past the end of the run")
