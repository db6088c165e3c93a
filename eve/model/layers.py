"""The constructors a model is handed, and the plain layers of one device.

`Layers()` builds a single-device model. eve/parallel replaces fields by tensor-parallel layers,
by a bank that is split over ranks, and by reductions over ranks; the model does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.moe.dispatch import Dispatcher, LocalDispatcher
from eve.moe.experts import ExpertBank
from eve.packing import TokenLayout


class QKVLinear(nn.Module):
    """Fused query, key, value projection with a bias on query and value only (a bias of the keys
    shifts all logits of a query alike and has no effect)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.heads = heads

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, 3 D): queries, keys, values, each heads after heads."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x_TD, self.weight, bias)


class ModalityNorm(nn.Module):
    """LayerNorm with weights of their own for image and text tokens (norm2_imag and norm2_text of
    VLMo and EVE). x_TD holds the image tokens first (eve/packing.py)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width))
        self.bias = nn.Parameter(torch.empty(2, width))
        # Gains and biases, although their shape says matrix.
        self.weight.no_weight_decay = self.bias.no_weight_decay = True  # pyright: ignore
        self.eps = eps

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        width = (x_TD.shape[-1],)
        parts = x_TD.split([layout.num_image, layout.num_text])
        out = [
            F.layer_norm(part, width, self.weight[m], self.bias[m], self.eps)
            for m, part in enumerate(parts)
            if part.shape[0]
        ]
        return out[0] if len(out) == 1 else torch.cat(out)


class Norm(nn.LayerNorm):
    """One LayerNorm for all tokens, with the signature of ModalityNorm."""

    def forward(self, x_TD: Tensor, layout: TokenLayout | None = None) -> Tensor:  # pyright: ignore
        return F.layer_norm(x_TD, self.normalized_shape, self.weight, self.bias, self.eps)


def mean_of_one_rank(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Layers:
    """Constructors of the layers that a parallel layout splits.

    qkv(width, heads); column_linear(in, out) and row_linear(in, out), both with bias;
    word_embedding(vocab, width); vocab_linear(width, vocab);
    experts(num_experts, width, hidden, activation). `mean_over_ranks` averages a small tensor over
    the data-parallel ranks (statistics of the routers).
    """

    qkv: Callable[[int, int], nn.Module] = QKVLinear
    column_linear: Callable[[int, int], nn.Module] = nn.Linear
    row_linear: Callable[[int, int], nn.Module] = nn.Linear
    word_embedding: Callable[[int, int], nn.Module] = nn.Embedding
    vocab_linear: Callable[[int, int], nn.Module] = nn.Linear
    experts: Callable[[int, int, int, str], nn.Module] = ExpertBank
    dispatcher: Dispatcher = field(default_factory=LocalDispatcher)
    mean_over_ranks: Callable[[Tensor], Tensor] = mean_of_one_rank
