"""A checkpoint directory of a run, `step-N/`, read tensor by tensor."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from eve.config import load_recipe
from eve.conversion.checkpoint import MOMENTS, Checkpoint, Kind, Parameter, Run
from eve.conversion.layout import File, Layout, Piece, Plan
from eve.conversion.torch_files import load, pairs
from eve.errors import UserError
from eve.model import parameter_shapes
from eve.parallel.sharding import Kind as Cut
from eve.parallel.sharding import cut, join
from eve.training.checkpoint import MARKER
from eve.training.engine import FROZEN

ENGINE = "engine"


class DeepSpeedCheckpoint(Checkpoint):
    """Opening it raises UserError for files that are missing, cut off or of another size than the layout
    says, and for names that are in some of them only."""

    def __init__(self, directory: Path) -> None:
        self.where = directory
        check_complete(directory)
        self.recipe = load_recipe(str(directory / "recipe.yaml"))
        self.tokenizer = (directory / "tokenizer.model").read_bytes()
        state = json.loads((directory / "state.json").read_text())
        self.step = state["step"]
        self.layout = Layout(**{field.name: state[field.name] for field in fields(Layout)})
        # One file after another is opened and its tensors are mapped; none is opened twice.
        self._load = cache(lambda name: load(directory / ENGINE / name))
        self._frozen: dict[str, Tensor] = self._load(FROZEN)
        self._plan = Plan(self.layout, self._parameters())
        self._check_names()
        self.parameters = self._with_steps()
        self._plan = Plan(self.layout, self.parameters)
        self._locate()
        first = self._load(next(self._plan.model_files()).name)
        counters = {key: first[key] for key in ("global_steps", "global_samples", "skipped_steps")}
        self.run = Run(state, counters, _metrics(directory, state["metrics_bytes"]))

    def read(self, name: str, kind: Kind) -> Tensor:
        parameter = next(p for p in self.parameters if p.name == name)
        if not parameter.learns:
            return self._frozen[name]
        if kind in MOMENTS and not parameter.step:
            return torch.zeros(parameter.shape)
        shape = self._plan.local_shape(parameter)
        shards: dict[int, Tensor] = {}
        covered: dict[int, set[int]] = defaultdict(set)
        for piece, tensor in self._pieces[name, kind]:
            key = self._shard_of(piece)
            if key is not None and piece.start not in covered[key]:
                covered[key].add(piece.start)
                shard = shards.setdefault(key, torch.empty(math.prod(shape)))
                end = piece.offset + piece.stop - piece.start
                shard[piece.start : piece.stop] = tensor.reshape(-1)[piece.offset : end]
        ordered = [shards[key].view(shape) for key in sorted(shards)]
        where = self._plan.placements[name]
        if where.kind is Cut.VOCABULARY:
            self._check_padding(name, kind, ordered, parameter.shape[0])
        return join(ordered, where, vocab_size=parameter.shape[0])

    def copies_agree(self, name: str, weight: Tensor) -> bool:
        """Those that the ranks compute with: DeepSpeed loads them beside the optimizer's."""
        layout, where = self.layout, self._plan.placements[name]
        for piece, tensor in self._copies[name]:
            tensor_rank, expert_rank = (piece.tensor_rank, layout.tensor), (piece.expert_rank, layout.expert)
            part = cut(weight, where, tensor=tensor_rank, expert=expert_rank).reshape(-1)
            expected = part[piece.start : piece.stop].to(tensor.dtype)
            if not torch.equal(tensor.reshape(-1)[: len(expected)], expected):
                return False
        return True

    def _shard_of(self, piece: Piece) -> int | None:
        """Which shard of its parameter a piece belongs to; None: a copy that is not looked at."""
        kind = self._plan.placements[piece.name].kind
        if kind is Cut.EXPERT and self.layout.expert > 1:
            return piece.expert_rank
        if kind in (Cut.COLUMN, Cut.ROW, Cut.VOCABULARY):
            return piece.tensor_rank
        return 0 if piece.tensor_rank == 0 else None

    def _check_padding(self, name: str, kind: Kind, shards: list[Tensor], vocab_size: int) -> None:
        """Words past the vocabulary never learn."""
        for number, shard in enumerate(shards):
            begin = max(vocab_size - number * shard.shape[0], 0)
            if bool(shard[begin:].count_nonzero()):
                raise UserError(
                    f"{self.where}: {kind} of {name} is not zero in the padding after {vocab_size} words"
                )

    def _parameters(self) -> tuple[Parameter, ...]:
        """Those of the recipe's model; what learns has the step 0 as yet."""
        shapes = parameter_shapes(self.recipe.model)
        path = self.where / ENGINE / FROZEN
        for name, tensor in self._frozen.items():
            if name not in shapes:
                raise UserError(f"{path} has the unknown name {name}")
            if tensor.shape != shapes[name]:
                raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(shapes[name])}")
        return tuple(
            Parameter(name, tuple(shape), None if name in self._frozen else 0)
            for name, shape in shapes.items()
        )

    def _with_steps(self) -> tuple[Parameter, ...]:
        """Reads how many updates each parameter had."""
        steps: dict[str, int] = {}
        file = next(iter(self._plan.optimizer_files()))
        tree = self._load(file.name)
        if self.layout.zero_stage == 0:
            members = [[parameter] for group in self._plan.groups for parameter in group.parameters]
            state = tree["optimizer"]["state"]
        elif self.layout.zero_stage == 3:
            members = [parameters for _, parameters in self._plan.sub_groups()]
            state = tree["optimizer_state_dict"]["optimizer_state_dict"]["state"]
        else:
            members = [list(group.parameters) for group in self._plan.groups]
            state = tree["optimizer_state_dict"]["base_optimizer_state"]["state"]
        for index, parameters in enumerate(members):
            count = int(state[index]["step"]) if index in state else 0
            steps |= {parameter.name: count for parameter in parameters}
        return tuple(replace(p, step=steps[p.name]) if p.learns else p for p in self._plan.parameters)

    def _locate(self) -> None:
        """Finds the mapped tensors that hold the pieces of each parameter."""
        self._pieces: dict[tuple[str, Kind], list[tuple[Piece, Tensor]]] = defaultdict(list)
        self._copies: dict[str, list[tuple[Piece, Tensor]]] = defaultdict(list)
        for file in (*self._plan.model_files(), *self._plan.expert_files()):
            for piece, tensor in self._pieces_of(file):
                self._copies[piece.name].append((piece, tensor))
                if self.layout.zero_stage == 0:
                    self._pieces[piece.name, "weight"].append((piece, tensor))
        # From ZeRO stage 1 on, the optimizer has the weights in fp32.
        for file in self._plan.optimizer_files():
            for piece, tensor in self._pieces_of(file):
                self._pieces[piece.name, piece.kind].append((piece, tensor))

    def _pieces_of(self, file: File) -> Iterator[tuple[Piece, Tensor]]:
        for slot, tensor in pairs(file.tree, self._load(file.name), str(self.where / ENGINE / file.name)):
            for piece in slot.pieces:
                yield piece, tensor

    def _check_names(self) -> None:
        """All files of a kind have the same names, in the order that the optimizer flattens them in."""
        plan = self._plan
        for file in plan.model_files():
            tree = self._load(file.name)
            self._compare(file.tree["module"], tree["module"], file.name)
            if self.layout.zero_stage == 0:
                continue
            expected = [[plan.local_name(p) for p in group.parameters] for group in plan.groups]
            if self.layout.zero_stage == 3:
                expected = [[plan.local_name(p) for p in members] for _, members in plan.sub_groups()]
            groups = [list(group) for group in tree["param_shapes"]]
            flat, wanted = ([name for group in groups_ for name in group] for groups_ in (groups, expected))
            self._compare(wanted, flat, file.name)
            if groups != expected:
                raise UserError(
                    f"{self.where / ENGINE / file.name} groups its parameters otherwise, as with "
                    "round_robin_gradients or another sub_group_size, which is not supported"
                )
        for number, bank in enumerate(plan.banks()):
            files = (self.where / ENGINE).glob(f"layer_{number}_expert_*")
            experts = 1 + max((int(path.name.split("_")[3]) for path in files), default=-1)
            if experts != bank[0].shape[0]:
                name = bank[0].name.rpartition(".")[0]
                raise UserError(
                    f"{self.where} has {experts} experts of {name}, its recipe has {bank[0].shape[0]}"
                )
        for file in plan.expert_files():
            self._compare(file.tree, self._load(file.name), file.name)

    def _compare(self, expected: Iterable[str], found: Iterable[str], file: str) -> None:
        ours, theirs = set(expected), set(found)
        for name in sorted(ours ^ theirs):
            what = "has no" if name in ours else "has the unknown name"
            raise UserError(f"{self.where / ENGINE / file} {what} {name}")


def check_complete(directory: Path) -> None:
    """Raises UserError where not all files are there that the marker of a whole checkpoint lists."""
    try:
        files = json.loads((directory / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{directory} is not a complete checkpoint: it has no readable {MARKER}") from None
    for name, size in files.items():
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing")
        found = (directory / name).stat().st_size
        if found != size:
            raise UserError(f"{directory / name} has {found:,} bytes, {MARKER} says {size:,}")


def _metrics(directory: Path, size: int) -> bytes:
    """What the run had logged by then, where the directory lies in a run's."""
    path = directory.parents[1] / "metrics.jsonl"
    if directory.parent.name != "checkpoints" or not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(size)
