"""Where each element of each parameter lies in a DeepSpeed checkpoint (0.19.8) of a layout.

The engine's files of W ranks; t = rank % tensor, d = rank // tensor, e = rank % expert:

    mp_rank_T_model_states.pt            ZeRO 0 to 2: `module`, the weights that tensor rank t computes with
    layer_L_expert_G_..._model_states.pt the same of expert G of bank L, where expert > 1
    mp_rank_T_... or expp_rank_E_...     ZeRO 0: `optimizer`, the moments by parameter
    zero_pp_rank_D_..._optim_states.pt   ZeRO 1, 2: fp32 weights and moments. The parameters of a group lie
                                         one after another in one vector, which is padded to a multiple of
                                         2 x ranks and cut into as many equal parts
    zero_pp_rank_D_..._optim_states.pt   ZeRO 3: each parameter is cut into equal parts by itself (the last
                                         one padded); rank d holds its parts of all, one after another

In the groups of experts the ranks of equal e share the vector, in the others those of equal t.

A `Plan` gives each file as a tree whose tensors are `Slot`s: what shape, and which elements of which
parameter. The reader gathers from them what the writer puts into them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from eve.config import Recipe
from eve.conversion.checkpoint import MOMENTS, Kind, Parameter
from eve.errors import UserError
from eve.parallel.sharding import DEEPSPEED_EXPERTS, Placement, padded_vocabulary, placement
from eve.parallel.sharding import Kind as Cut
from eve.parallel.topology import check_degrees
from eve.training.ds_config import check_combinations

# `sub_group_size` of ds_configs/zero3_*.json.
SUB_GROUP_SIZE = 1_000_000_000
BANK = "feed_forward.experts."


@dataclass(frozen=True)
class Layout:
    world_size: int
    tensor: int = 1
    expert: int = 1
    zero_stage: int = 0
    precision: str = "fp32"
    # How DeepSpeed lays out an optimizer (eve/training/ds_config.py). What is written here fits both ways.
    state_format: str = "ZeRO"

    @property
    def data(self) -> int:
        return self.world_size // self.tensor

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with its degrees. Raises UserError where its model cannot be trained in this layout."""
        parallel = recipe.parallel.model_copy(update={"tensor": self.tensor, "expert": self.expert})
        recipe = recipe.model_copy(update={"parallel": parallel})
        check_degrees(parallel, recipe.model, self.world_size)
        tree = {
            "zero_optimization": {"stage": self.zero_stage},
            "bf16": {"enabled": self.precision == "bf16"},
        }
        # Compiling may be switched off when the run goes on.
        training = recipe.training.model_copy(update={"compile": False})
        eager = recipe.model_copy(update={"training": training})
        check_combinations(tree, eager, cuda=False, where="the layout of the target")
        return recipe

    def describe(self) -> str:
        return (
            f"{self.world_size} process{'es' if self.world_size > 1 else ''}, tensor {self.tensor}, "
            f"expert {self.expert}, ZeRO stage {self.zero_stage}, {self.precision}"
        )


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of what is left of a parameter after it was cut for a tensor and an expert rank,
    flattened, at `offset` of a slot."""

    name: str
    kind: Kind
    tensor_rank: int
    expert_rank: int
    start: int
    stop: int
    offset: int = 0


@dataclass(frozen=True)
class Slot:
    """A tensor of a file. What no piece covers is padding: zero."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    dtype: torch.dtype = torch.float32
    # A vector that some of DeepSpeed's optimizers write with so many elements of padding at its end.
    padding: int = 0
    # Of the count of updates that AdamW keeps as a tensor.
    step: int | None = None


@dataclass(frozen=True)
class File:
    """`tree`: nested dicts and lists with slots among plain values."""

    name: str
    tree: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike, in its order; `expert`: those cut over expert ranks."""

    parameters: tuple[Parameter, ...]
    decays: bool
    expert: bool

    def name(self, layout: Layout) -> str:
        return f"ep_size_{layout.expert}" if self.expert else "decay" if self.decays else "no_decay"


class Plan:
    """The files of one model in one layout."""

    def __init__(self, layout: Layout, parameters: Sequence[Parameter]) -> None:
        self.layout = layout
        self.parameters = parameters
        names = {parameter.name for parameter in parameters}
        self.placements: dict[str, Placement] = {name: placement(name, names) for name in names}
        self.groups = [
            Group(members, decays, expert)
            for expert in (False, True)
            for decays in (True, False)
            if (
                members := tuple(
                    p for p in parameters if p.learns and p.decays == decays and self.is_expert(p) == expert
                )
            )
        ]

    def is_expert(self, parameter: Parameter) -> bool:
        return self.layout.expert > 1 and self.placements[parameter.name].kind is Cut.EXPERT

    def local_name(self, parameter: Parameter) -> str:
        """The name that DeepSpeed has for it."""
        name = f"model.{parameter.name}"
        if self.is_expert(parameter):
            name = name.replace("." + BANK, f".{BANK[:-1]}{DEEPSPEED_EXPERTS}")
        return name

    def local_shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Of the part that a rank holds."""
        where, shape = self.placements[parameter.name], list(parameter.shape)
        if where.kind is Cut.EXPERT:
            shape[0] //= self.layout.expert
        elif where.kind is Cut.VOCABULARY:
            shape[0] = padded_vocabulary(shape[0], self.layout.tensor) // self.layout.tensor
        elif where.kind in (Cut.COLUMN, Cut.ROW):
            shape[where.axis] //= self.layout.tensor
        return tuple(shape)

    def banks(self) -> list[list[Parameter]]:
        """The parameters of each bank that is cut over expert ranks, in the order of DeepSpeed's layers."""
        found: dict[str, list[Parameter]] = {}
        for parameter in self.parameters:
            if self.is_expert(parameter):
                found.setdefault(parameter.name.rpartition(".")[0], []).append(parameter)
        return list(found.values())

    # Weights that the ranks compute with ---------------------------------------------------------------

    def model_files(self) -> Iterator[File]:
        """`module` of every file, in the precision of the layout."""
        layout, dtype = self.layout, _DTYPES[self.layout.precision]
        for tensor_rank in range(layout.tensor):
            dense = [parameter for parameter in self.parameters if not self.is_expert(parameter)]
            module = OrderedDict(
                (self.local_name(p), self._whole(p, "weight", tensor_rank, dtype=dtype)) for p in dense
            )
            if layout.zero_stage < 3:
                yield File(f"mp_rank_{tensor_rank:02d}_model_states.pt", {"module": module})
        if layout.zero_stage == 3:
            module = OrderedDict((name, Slot((0,), dtype=dtype)) for name in module)
            for rank in range(layout.world_size):
                yield File(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", {"module": module})

    def expert_files(self) -> Iterator[File]:
        layout, dtype = self.layout, _DTYPES[self.layout.precision]
        for number, bank in enumerate(self.banks()):
            for expert in range(bank[0].shape[0]):
                rank, index = divmod(expert, bank[0].shape[0] // layout.expert)
                tree = {}
                for parameter in bank:
                    shape = parameter.shape[1:]
                    size = math.prod(shape)
                    piece = Piece(parameter.name, "weight", 0, rank, index * size, (index + 1) * size)
                    prefix, _, last = self.local_name(parameter).rpartition(".")
                    tree[f"{prefix}.{expert}.{last}"] = Slot(shape, (piece,), dtype)
                name = f"layer_{number}_expert_{expert}_mp_rank_{rank % layout.tensor:02d}_model_states.pt"
                yield File(name, tree)

    def frozen_fragments(self, rank: int) -> dict[str, Slot]:
        """What the file of a rank holds of the weights that do not learn, in ZeRO stages 2 and 3."""
        dtype = _DTYPES[self.layout.precision]
        frozen = [parameter for parameter in self.parameters if not parameter.learns]
        if self.layout.zero_stage < 3:
            return OrderedDict(
                (self.local_name(p), self._whole(p, "weight", rank, dtype=dtype)) for p in frozen
            )
        fragments = OrderedDict()
        for parameter in frozen:
            size = math.prod(parameter.shape)
            part = -(-size // self.layout.world_size)
            start, stop = min(rank * part, size), min((rank + 1) * part, size)
            pieces = (Piece(parameter.name, "weight", 0, 0, start, stop),) if start < stop else ()
            fragments[self.local_name(parameter)] = Slot((part,), pieces, dtype)
        return fragments

    # fp32 weights and moments --------------------------------------------------------------------------

    def optimizer_files(self) -> Iterator[File]:
        """Those with moments; of ZeRO stage 0 without experts, `optimizer` of the model's files."""
        layout = self.layout
        if layout.zero_stage == 0:
            if layout.expert == 1:
                for tensor_rank in range(layout.tensor):
                    name = f"mp_rank_{tensor_rank:02d}_model_states.pt"
                    yield File(name, {"optimizer": {"state": self._state_by_parameter(tensor_rank)}})
            for rank in range(layout.expert if layout.expert > 1 else 0):
                name = f"expp_rank_{rank}_mp_rank_{rank % layout.tensor:02d}_optim_states.pt"
                yield File(name, {"optimizer": {"state": self._state_by_parameter(rank)}})
            return
        prefix = "bf16_" if layout.precision == "bf16" else ""
        for rank in range(layout.world_size):
            data_rank, tensor_rank = divmod(rank, layout.tensor)
            name = f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"
            state = self._parts_of_parameters(rank) if layout.zero_stage == 3 else self._parts_of_groups(rank)
            yield File(name, {"optimizer_state_dict": state})

    def _whole(
        self, parameter: Parameter, kind: Kind, rank: int, *, dtype: torch.dtype = torch.float32
    ) -> Slot:
        """All that `rank` holds of a parameter."""
        shape = self.local_shape(parameter)
        layout = self.layout
        piece = Piece(parameter.name, kind, rank % layout.tensor, rank % layout.expert, 0, math.prod(shape))
        return Slot(shape, (piece,), dtype)

    def _state_by_parameter(self, rank: int) -> dict[int, dict[str, Slot]]:
        members = [parameter for group in self.groups for parameter in group.parameters]
        return {
            index: {"step": Slot((), step=parameter.step)}
            | {kind: self._whole(parameter, kind, rank) for kind in MOMENTS}
            for index, parameter in enumerate(members)
            if parameter.step
        }

    def _parts_of_groups(self, rank: int) -> dict[str, Any]:
        layout = self.layout
        weights, paddings, states = [], [], {}
        for index, group in enumerate(self.groups):
            ranks, mine = self.sharing(group, rank)
            sizes = [math.prod(self.local_shape(parameter)) for parameter in group.parameters]
            aligned = 2 * ranks
            part = -(-sum(sizes) // aligned) * aligned // ranks
            held = min(max(sum(sizes) - mine * part, 0), part)
            paddings.append(part - held)
            pieces, begin = [], -mine * part
            for parameter, size in zip(group.parameters, sizes, strict=True):
                start, stop = max(-begin, 0), min(part - begin, size)
                if start < stop:
                    pieces.append((parameter.name, start, stop, begin + start))
                begin += size

            def slot(kind: Kind, size: int, pieces: list[Any] = pieces) -> Slot:
                tensor_rank, expert_rank = rank % layout.tensor, rank % layout.expert
                return Slot(
                    (size,),
                    tuple(
                        Piece(name, kind, tensor_rank, expert_rank, start, stop, offset)
                        for name, start, stop, offset in pieces
                    ),
                )

            weights.append(replace(slot("weight", held), padding=part - held))
            if step := self.step_of(group):
                states[index] = {"step": Slot((), step=step)} | {kind: slot(kind, part) for kind in MOMENTS}
        return {
            "single_partition_of_fp32_groups": weights,
            "group_paddings": paddings,
            "base_optimizer_state": {"state": states},
        }

    def _parts_of_parameters(self, rank: int) -> dict[str, Any]:
        weights, states = [], {}
        for index, (group, members) in enumerate(self.sub_groups()):
            pieces, offset = [], 0
            for parameter in members:
                size = math.prod(parameter.shape)
                part = -(-size // self.layout.world_size)
                start, stop = min(rank * part, size), min((rank + 1) * part, size)
                if start < stop:
                    pieces.append((parameter.name, start, stop, offset))
                offset += part

            def slot(kind: Kind, size: int = offset, pieces: list[Any] = pieces) -> Slot:
                return Slot(
                    (size,),
                    tuple(Piece(name, kind, 0, 0, start, stop, at) for name, start, stop, at in pieces),
                )

            weights.append(slot("weight"))
            if step := self.step_of(group):
                states[index] = {"step": Slot((), step=step)} | {kind: slot(kind) for kind in MOMENTS}
        return {"fp32_flat_groups": weights, "optimizer_state_dict": {"state": states}}

    def sub_groups(self) -> Iterator[tuple[Group, list[Parameter]]]:
        """ZeRO stage 3 ends a vector with the parameter that fills `sub_group_size` elements of a rank."""
        for group in self.groups:
            members, size = [], 0
            for parameter in group.parameters:
                members.append(parameter)
                size += -(-math.prod(parameter.shape) // self.layout.world_size)
                if size >= SUB_GROUP_SIZE:
                    yield group, members
                    members, size = [], 0
            if members:
                yield group, members

    def sharing(self, group: Group, rank: int) -> tuple[int, int]:
        """(how many ranks share a group's vector with `rank`, its place among them)."""
        degree = self.layout.expert if group.expert else self.layout.tensor
        return self.layout.world_size // degree, rank // degree

    def step_of(self, group: Group) -> int:
        """The count of updates of a group whose parameters lie in one vector.

        Raises UserError where they differ. One that had no update has moments of zero, which any count fits.
        """
        first = next((parameter for parameter in group.parameters if parameter.step), None)
        if first is None:
            return 0
        for parameter in group.parameters:
            if parameter.step not in (0, first.step):
                raise UserError(
                    f"{parameter.name} had {parameter.step} updates and {first.name} {first.step}, but ZeRO "
                    "keeps one count for both; use ZeRO stage 0"
                )
        return first.step or 0


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
