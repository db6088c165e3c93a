"""Which part of each parameter a process holds: one table, by name.

Everything that cuts or joins weights reads it: initial weights, loading, export, optimizer groups and
tools/convert_checkpoint.py. Nothing here communicates or builds a model.

    replicated   every tensor rank holds it whole
    row bias     as well, but it is added on the first tensor rank only
    column       cut along the outputs of a layer (Megatron's column-parallel), heads of a projection whole
    row          cut along the inputs (row-parallel)
    vocabulary   cut along the words, after padding to a multiple of 8 words a rank
    expert       cut along the experts over the expert ranks; whole over the tensor ranks

Names are those of the model on one device; `canonical` strips what the expert-parallel bank adds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Kind(Enum):
    REPLICATED = "replicated"
    ROW_BIAS = "row bias"
    COLUMN = "column"
    ROW = "row"
    VOCABULARY = "vocabulary"
    EXPERT = "expert"


@dataclass(frozen=True)
class Placement:
    """`axis` is cut; `parts` are fused along it (query, key, value), and each is cut by itself."""

    kind: Kind
    axis: int = 0
    parts: int = 1


REPLICATED = Placement(Kind.REPLICATED)
EXPERT = Placement(Kind.EXPERT)

# The first pattern that matches counts; what matches none is replicated.
TABLE: tuple[tuple[re.Pattern[str], Placement], ...] = tuple(
    (re.compile(pattern + "$"), placement)
    for pattern, placement in (
        (r"attention\.qkv\.(\w+\.)?weight", Placement(Kind.COLUMN, 0, parts=3)),
        (r"attention\.qkv\.(\w+\.)?[qkv]_bias", Placement(Kind.COLUMN, 0)),
        (r"attention\.proj\.(\w+\.)?weight", Placement(Kind.ROW, 1)),
        (r"attention\.proj\.(\w+\.)?bias", Placement(Kind.ROW_BIAS)),
        # The heads of a process are those of its projections.
        (r"relative_positions\.table_TRH", Placement(Kind.COLUMN, 2)),
        # Experts of hard routers; banks of learned ones are EXPERT, see `placement`.
        (r"feed_forward\.(experts\.\w+|fusion)\.w1_DF", Placement(Kind.COLUMN, 1)),
        (r"feed_forward\.(experts\.\w+|fusion)\.b1_F", Placement(Kind.COLUMN, 0)),
        (r"feed_forward\.(experts\.\w+|fusion)\.w2_FD", Placement(Kind.ROW, 0)),
        (r"feed_forward\.(experts\.\w+|fusion)\.b2_D", Placement(Kind.ROW_BIAS)),
        (r"text_embedding\.word\.weight", Placement(Kind.VOCABULARY, 0)),
        (r"word_head\.output\.(weight|bias)", Placement(Kind.VOCABULARY, 0)),
    )
)

# What the bank's own names look like inside DeepSpeed's MoE module.
DEEPSPEED_EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."

_BANK = re.compile(r"^(.*\.feed_forward)\.experts\.\w+$")


def canonical(name: str) -> str:
    """The name on one device of a parameter of any layout."""
    return name.replace(DEEPSPEED_EXPERTS, ".")


def placement(name: str, names: Collection[str]) -> Placement:
    """Of a canonical name. `names` are all of the model: a bank with a router beside it is cut by experts."""
    bank = _BANK.match(name)
    if bank and f"{bank[1]}.router.weight" in names:
        return EXPERT
    return next((found for pattern, found in TABLE if pattern.search(name)), REPLICATED)


def padded_vocabulary(vocab_size: int, tensor: int) -> int:
    """Words of all tensor ranks together: a multiple of 8 on each, as matrix products like it; no padding
    on one rank."""
    if tensor == 1:
        return vocab_size
    return -(-vocab_size // (8 * tensor)) * 8 * tensor


def cut(whole: Tensor, where: Placement, *, tensor: tuple[int, int], expert: tuple[int, int]) -> Tensor:
    """The part of the whole parameter that a process holds, contiguous.

    Args:
        tensor, expert: (rank, number of ranks) of the process.
    """
    kind, axis = where.kind, where.axis
    if kind in (Kind.REPLICATED, Kind.ROW_BIAS):
        return whole
    index, count = expert if kind is Kind.EXPERT else tensor
    if count == 1:
        return whole
    if kind is Kind.VOCABULARY:
        missing = padded_vocabulary(whole.shape[0], count) - whole.shape[0]
        whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
    size = whole.shape[axis] // where.parts // count
    pieces = [part.narrow(axis, index * size, size) for part in whole.chunk(where.parts, axis)]
    return torch.cat(pieces, axis) if len(pieces) > 1 else pieces[0].contiguous()


def join(shards: Sequence[Tensor], where: Placement, *, vocab_size: int) -> Tensor:
    """The inverse: the whole parameter from the shards of all ranks that it is cut over, in their order.

    Replicated ones are equal on all: the first is taken. Words past `vocab_size` are cut off.
    """
    if len(shards) == 1 or where.kind in (Kind.REPLICATED, Kind.ROW_BIAS):
        return shards[0]
    parts = [shard.chunk(where.parts, where.axis) for shard in shards]
    whole = torch.cat([shard[part] for part in range(where.parts) for shard in parts], where.axis)
    return whole[:vocab_size] if where.kind is Kind.VOCABULARY else whole
