"""Tensor and sequence parallelism (Megatron-LM: Shoeybi et al. 2019; Korthikanti et al. 2022).

The ranks of a tensor group hold a share of the heads, of the hidden width of hard-routed experts, and of
the vocabulary; of the same samples. The layers are plain layers of a smaller size; what is between
them is in TensorTokens. With sequence parallelism each rank also holds a share of the packed tokens between
the layers, and norms, residuals and DropPath work on that.

A parameter that every rank holds whole, but uses on its own tokens only (or, a bias added after a sum, on the
first rank only), has a partial gradient on each rank: `partial_gradients` sums them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.model.layers import VocabLinear
from eve.moe.hard_experts import Expert
from eve.packing import Rows, TokenLayout
from eve.parallel.collectives import (
    CopyIn,
    GatherIn,
    Join,
    ReduceOut,
    ScatterOut,
    Split,
    SumGradients,
    all_reduce,
    gather_over_ranks,
    shares,
)
from eve.parallel.sharding import Kind, canonical, padded_vocabulary, placement
from eve.parallel.topology import Topology
from kernels.masked_text_loss import TextLoss
from kernels.vocabulary_parallel_loss import vocabulary_parallel_text_loss


class TensorTokens:
    """eve.tokens.Tokens on the ranks of a tensor group."""

    def __init__(self, topology: Topology):
        self.sequence = topology.sequence
        self.rank, self.size, self.group = topology.tensor_rank, topology.tensor, topology.tensor_group

    def _cut(self, layout: TokenLayout) -> tuple[list[int], int, Any]:
        return shares(layout.num_tokens, self.size), self.rank, self.group

    def _rows(self, layout: TokenLayout) -> Rows:
        counts = shares(layout.num_tokens, self.size)
        begin = sum(counts[: self.rank])
        return layout.rows(begin, begin + counts[self.rank])

    def split(self, x_TD: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if not self.sequence:
            return x_TD, layout
        return Split.apply(x_TD, *self._cut(layout)), replace(layout, held=self._rows(layout))  # pyright: ignore

    def join(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        return Join.apply(x_TD, *self._cut(layout)) if self.sequence else x_TD  # pyright: ignore

    def to_columns(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        if self.sequence:
            return GatherIn.apply(x_TD, *self._cut(layout))  # pyright: ignore
        return CopyIn.apply(x_TD, self.group)  # pyright: ignore

    def from_rows(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        if self.sequence:
            return ScatterOut.apply(x_TD, *self._cut(layout))  # pyright: ignore
        return ReduceOut.apply(x_TD, self.group)  # pyright: ignore

    def own(self, x_TD: Tensor, layout: TokenLayout) -> tuple[Tensor, Rows]:
        if self.sequence:
            return x_TD, layout.held
        return Split.apply(x_TD, *self._cut(layout)), self._rows(layout)  # pyright: ignore

    def give_back(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        return x_TD if self.sequence else Join.apply(x_TD, *self._cut(layout))  # pyright: ignore

    def gather_own(self, x_TE: Tensor, layout: TokenLayout) -> Tensor:
        return Join.apply(x_TE, *self._cut(layout))  # pyright: ignore


class RowLinear(nn.Linear):
    """(T, in / n) -> this rank's part of the sum (T, out), to which the first rank adds the bias."""

    def __init__(self, in_width: int, out_width: int, topology: Topology):
        super().__init__(in_width // topology.tensor, out_width)
        self.first = topology.tensor_rank == 0

    def forward(self, input: Tensor) -> Tensor:
        # Used on every rank: its gradient is summed over them, and a rank without one would not come.
        return F.linear(input, self.weight, self.bias * self.first)


class HiddenParallelExpert(Expert):
    """An expert with a share of the hidden width; a part of the sum comes out, as of RowLinear."""

    def __init__(self, width: int, hidden: int, activation: str, topology: Topology, products: str = "auto"):
        super().__init__(width, hidden // topology.tensor, activation, products)
        self.first = topology.tensor_rank == 0

    def output_bias(self) -> Tensor:
        return self.b2_D * self.first


class VocabParallelEmbedding(nn.Embedding):
    """A share of the words; ids of others add zero to the sum over ranks."""

    def __init__(self, vocab_size: int, width: int, topology: Topology):
        rows = padded_vocabulary(vocab_size, topology.tensor) // topology.tensor
        super().__init__(rows, width)
        self.begin, self.group = topology.tensor_rank * rows, topology.tensor_group

    def forward(self, input: Tensor) -> Tensor:
        local_N = input - self.begin
        elsewhere_N = (local_N < 0) | (local_N >= self.num_embeddings)
        x_ND = F.embedding(local_N.masked_fill(elsewhere_N, 0), self.weight)
        return ReduceOut.apply(x_ND.masked_fill(elsewhere_N[:, None], 0), self.group)  # pyright: ignore


class VocabParallelLinear(VocabLinear):
    """A share of the words; the cross-entropy never gathers logits."""

    def __init__(self, width: int, vocab_size: int, topology: Topology):
        rows = padded_vocabulary(vocab_size, topology.tensor) // topology.tensor
        super().__init__(width, rows)
        self.vocab_size, self.group, self.size = vocab_size, topology.tensor_group, topology.tensor
        self.begin = topology.tensor_rank * rows

    def forward(self, input: Tensor) -> Tensor:
        """(K, D) -> (K, V), gathered: for pictures, not for a loss."""
        assert not torch.is_grad_enabled()
        logits_VK = self._logits(input).t()
        return Join.apply(logits_VK, [self.out_features] * self.size, 0, self.group).t()[:, : self.vocab_size]  # pyright: ignore

    def cross_entropy(
        self, x_KD: Tensor, target_K: Tensor, smoothing: float = 0.0, z_loss: float = 0.0
    ) -> TextLoss:
        x_KD = CopyIn.apply(x_KD, self.group)  # pyright: ignore
        gather = partial(gather_over_ranks, size=self.size, group=self.group)
        shard = self.weight, self.bias, target_K, self.begin, self.vocab_size
        return vocabulary_parallel_text_loss(x_KD, *shard, gather, smoothing, z_loss)

    def _logits(self, x_KD: Tensor) -> Tensor:
        return F.linear(x_KD, self.weight, self.bias)


def partial_parameters(model: nn.Module, topology: Topology) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of the parameters that learn and have a partial gradient on each tensor rank."""
    names = {canonical(name) for name, _ in model.named_parameters()}
    found = []
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{attribute}"
            if parameter.requires_grad and _is_partial(full, parameter, names, topology.sequence):
                found.append((module, attribute))
    return found


def _is_partial(name: str, parameter: nn.Parameter, names: set[str], sequence: bool) -> bool:
    kind = placement(canonical(name), names).kind
    if kind is Kind.ROW_BIAS:
        return True
    if kind is Kind.EXPERT:
        # The expert-parallel bank's are summed over its copies by DeepSpeed.
        return name == canonical(name)
    if kind is not Kind.REPLICATED:
        return False
    between = ".blocks." in name or name.startswith(("encoder.norm.", "class_token_head.norm."))
    return ".router." in name or (sequence and between)


@contextmanager
def partial_gradients(parameters: list[tuple[nn.Module, str]], group: Any) -> Iterator[None]:
    """Within it, what uses these parameters gets gradients that are summed over the tensor ranks, in one
    all-reduce at the end of each backward. Every rank has to use one of them at least, or none does."""
    originals = [module._parameters[attribute] for module, attribute in parameters]
    views = SumGradients.apply(group, *originals)
    try:
        for (module, attribute), view in zip(parameters, views, strict=True):  # pyright: ignore
            module._parameters[attribute] = view
        yield
    finally:
        for (module, attribute), original in zip(parameters, originals, strict=True):
            module._parameters[attribute] = original


def total_norm(parameters: list[nn.Parameter], topology: Topology) -> Tensor:
    """L2 norm of the gradients of a model without ZeRO; each weight counts once over all ranks."""
    whole, cut, experts = [], [], []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if not getattr(parameter, "allreduce", True):
            experts.append(parameter.grad)
        else:
            (cut if getattr(parameter, "model_parallel", False) else whole).append(parameter.grad)
    square = _sum_of_squares(whole, topology)
    if topology.tensor > 1:
        square = square + all_reduce(_sum_of_squares(cut, topology), topology.tensor_group)
    if topology.expert > 1:
        from eve.parallel.experts import expert_group

        square = square + all_reduce(_sum_of_squares(experts, topology), expert_group(topology))
    return square.sqrt().float()


def _sum_of_squares(gradients: list[Tensor], topology: Topology) -> Tensor:
    """In fp64: on a CPU an fp32 norm of millions of numbers is right to four digits only."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=topology.device)
    return torch.stack(norms).square().sum()
