"""A process's part of each parameter, and the whole again, after the table of sharding.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve.config import Model
from eve.model import parameter_shapes
from eve.parallel.sharding import Kind, Placement, canonical, cut, join, placement
from eve.parallel.topology import Topology


class WeightParts:
    """Names are those of one device."""

    def __init__(self, config: Model, topology: Topology):
        self.topology = topology
        self.vocab_size = config.vocab_size
        self.shapes = parameter_shapes(config)

    def placement(self, name: str) -> Placement:
        return placement(name, self.shapes.keys())

    def held(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole parameter."""
        topology = self.topology
        return cut(
            whole,
            self.placement(name),
            tensor=(topology.tensor_rank, topology.tensor),
            expert=(topology.expert_rank, topology.expert),
        )

    def whole(self, name: str, held: Tensor) -> Tensor:
        """The whole parameter from the parts of all processes, which call it together."""
        where = self.placement(name)
        group, size = self._group(where)
        if size == 1:
            return held
        parts = [torch.empty_like(held) for _ in range(size)]
        dist.all_gather(parts, held.contiguous(), group=group)
        return join(parts, where, vocab_size=self.vocab_size)

    def gather(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole weights on the CPU of rank 0, nothing elsewhere, tensor by tensor. All ranks call it."""
        weights = {}
        for name, tensor in held.items():
            whole = self.whole(name, tensor.to(self.topology.device))
            if self.topology.rank == 0:
                weights[name] = whole.cpu()
        return weights

    def _group(self, where: Placement) -> tuple[Any, int]:
        if where.kind is Kind.EXPERT and self.topology.expert > 1:
            from eve.parallel.experts import expert_group

            return expert_group(self.topology), self.topology.expert
        if where.kind in (Kind.COLUMN, Kind.ROW, Kind.VOCABULARY):
            return self.topology.tensor_group, self.topology.tensor
        return None, 1

    def mark_cut(self, model: nn.Module) -> None:
        """Marks what is cut over tensor ranks as DeepSpeed wants it, so that norms count it on each."""
        for name, parameter in model.named_parameters():
            if self.placement(canonical(name)).kind in (Kind.COLUMN, Kind.ROW, Kind.VOCABULARY):
                parameter.model_parallel = self.topology.tensor > 1  # pyright: ignore
