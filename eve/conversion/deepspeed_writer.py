"""Writes a checkpoint that DeepSpeed's engine of a layout loads, tensor by tensor.

All files are laid out first, with room for their tensors, and mapped; then each parameter is read once, cut
for each rank, and put where its elements belong.
"""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eve.config import Recipe
from eve.conversion.checkpoint import Checkpoint, Kind, Parameter, Run
from eve.conversion.deepspeed_reader import ENGINE
from eve.conversion.layout import File, Layout, Piece, Plan
from eve.conversion.torch_files import save
from eve.errors import UserError
from eve.parallel.deepspeed import import_deepspeed
from eve.parallel.sharding import cut
from eve.training.engine import FROZEN


def write_deepspeed(
    source: Checkpoint, directory: Path, layout: Layout, *, progress: Callable[[], None]
) -> None:
    """Writes what a step directory of the layout holds, but for its marker, into one that is there and empty.

    Raises UserError where the source has no training state, or one that the layout cannot hold.
    """
    if source.run is None:
        raise UserError(f"{source.where} has no training state; it was written without --training-state")
    recipe = layout.of(source.recipe)
    plan = Plan(layout, source.parameters)
    engine = directory / ENGINE
    engine.mkdir()
    places: dict[tuple[str, Kind], list[tuple[Piece, Tensor]]] = defaultdict(list)
    for file in _files(plan, recipe, source.run):
        for slot, tensor in save(engine / file.name, file.tree):
            for piece in slot.pieces:
                places[piece.name, piece.kind].append((piece, tensor))
    for (name, kind), targets in places.items():
        _put(source.read(name, kind), plan, targets)
        progress()
    torch.save(
        {p.name: source.read(p.name, "weight") for p in source.parameters if not p.learns}, engine / FROZEN
    )
    (directory / "recipe.yaml").write_text(recipe.to_yaml())
    (directory / "tokenizer.model").write_bytes(source.tokenizer)
    (directory / "state.json").write_text(json.dumps(_state(source.run, layout)))


def _state(run: Run, layout: Layout) -> dict[str, Any]:
    """The state of the run, which says for which layout the engine's files are."""
    return run.state | asdict(layout)


def _put(whole: Tensor, plan: Plan, targets: list[tuple[Piece, Tensor]]) -> None:
    layout = plan.layout
    parts: dict[tuple[int, int], Tensor] = {}
    for piece, tensor in targets:
        rank = (piece.tensor_rank, piece.expert_rank)
        if rank not in parts:
            part = cut(
                whole,
                plan.placements[piece.name],
                tensor=(piece.tensor_rank, layout.tensor),
                expert=(piece.expert_rank, layout.expert),
            )
            parts[rank] = part.reshape(-1)
        end = piece.offset + piece.stop - piece.start
        tensor.view(-1)[piece.offset : end] = parts[rank][piece.start : piece.stop]


def _files(plan: Plan, recipe: Recipe, run: Run) -> Iterator[File]:
    """The files with all that DeepSpeed expects in them beside tensors."""
    layout = plan.layout
    optimizer = {file.name: file.tree for file in plan.optimizer_files()}
    groups = _param_groups(plan, recipe)
    for tree in optimizer.values():
        if layout.zero_stage == 0:
            tree["optimizer"]["param_groups"] = groups
        else:
            _complete_zero(tree, plan, recipe, groups)
    for rank, file in enumerate(plan.model_files()):
        own = optimizer.pop(file.name, {})
        yield File(file.name, file.tree | _model_state(plan, run, rank) | own)
    for name, tree in optimizer.items():
        yield File(name, tree)
    yield from plan.expert_files()


def _model_state(plan: Plan, run: Run, rank: int) -> dict[str, Any]:
    layout = plan.layout
    shapes = None
    if layout.zero_stage:
        members = [list(group.parameters) for group in plan.groups]
        if layout.zero_stage == 3:
            members = [parameters for _, parameters in plan.sub_groups()]
        shapes = [_shapes(plan, group) for group in members]
    frozen = [parameter for parameter in plan.parameters if not parameter.learns]
    state = {
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": shapes,
        "frozen_param_shapes": _shapes(plan, frozen) if layout.zero_stage >= 2 else None,
        "frozen_param_fragments": plan.frozen_fragments(rank) if layout.zero_stage >= 2 else None,
        "shared_params": {} if layout.zero_stage else None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        **run.counters,
        "dp_world_size": layout.data,
        "mp_world_size": layout.tensor,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": layout.tensor},
        "ds_config": {"zero_optimization": {"stage": layout.zero_stage}},
        "ds_version": _version(),
    }
    if banks := plan.banks():
        state |= {"num_experts": [bank[0].shape[0] for bank in banks], "ds_autoep_layers": None}
    return state


def _shapes(plan: Plan, parameters: Iterable[Parameter]) -> OrderedDict[str, torch.Size]:
    return OrderedDict((plan.local_name(p), torch.Size(plan.local_shape(p))) for p in parameters)


def _complete_zero(tree: dict[str, Any], plan: Plan, recipe: Recipe, groups: list[dict[str, Any]]) -> None:
    deepspeed = import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    stage = plan.layout.zero_stage
    state = tree["optimizer_state_dict"]
    state |= {
        "loss_scaler": LossScaler(scale=1.0),  # pyright: ignore[reportArgumentType]
        "dynamic_loss_scale": False,
        "overflow": False,
        "zero_stage": ZeroStageEnum(stage),
        "ds_version": deepspeed.__version__,
    }
    if stage == 3:
        state["partition_count"] = plan.layout.world_size
        state["optimizer_state_dict"]["param_groups"] = groups
    else:
        state["partition_count"] = [plan.sharing(group, 0)[0] for group in plan.groups]
        state["clip_grad"] = recipe.optimizer.clip or 0.0
        state["param_alignment_paddings"] = [[0] * len(group.parameters) for group in plan.groups]
        state["base_optimizer_state"]["param_groups"] = groups
    tree["ds_version"] = deepspeed.__version__


def _param_groups(plan: Plan, recipe: Recipe) -> list[dict[str, Any]]:
    """The options of AdamW as its state_dict lists them, with the numbers of each group's tensors."""
    options = recipe.optimizer
    groups: list[dict[str, Any]] = []
    for group in plan.groups:
        groups.append(
            {
                "params": [torch.zeros(1)],
                "weight_decay": options.weight_decay if group.decays else 0.0,
                "name": group.name(plan.layout),
            }
            | ({"moe": True} if group.expert else {})
        )
    adam = torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)
    listed = adam.state_dict()["param_groups"]
    first = 0
    for group, entry in zip(plan.groups, listed, strict=True):
        count = 1
        if plan.layout.zero_stage == 0:
            count = len(group.parameters)
        elif plan.layout.zero_stage == 3:
            count = sum(1 for owner, _ in plan.sub_groups() if owner is group)
        entry["params"] = list(range(first, first + count))
        first += count
    return listed


def _version() -> str:
    return import_deepspeed().__version__
