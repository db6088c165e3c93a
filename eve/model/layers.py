"""The constructors a model is handed, and the plain layers of one device.

`Layers()` builds a single-device model. eve/parallel replaces fields by layers that hold a part of
the weights and by what moves rows between their devices; the model does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.model.relative_positions import RelativePositions
from eve.moe.dispatch import Dispatcher, LocalDispatcher
from eve.moe.experts import ExpertBank
from eve.moe.hard_experts import Expert
from eve.packing import TokenLayout
from eve.tokens import Tokens, WholeTokens
from kernels.masked_text_loss import TextLoss, masked_text_loss


class QKVLinear(nn.Module):
    """Fused query, key, value projection. A bias of the keys shifts all logits of a query alike and has no
    effect, but where image and text have projections of their own."""

    def __init__(self, width: int, out_width: int, key_bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * out_width, width))
        self.q_bias = nn.Parameter(torch.empty(out_width))
        self.k_bias = nn.Parameter(torch.empty(out_width)) if key_bias else None
        self.v_bias = nn.Parameter(torch.empty(out_width))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, 3 * out_width): queries, keys, values, each heads after heads."""
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        bias = torch.cat([self.q_bias, k_bias, self.v_bias])
        return F.linear(x_TD, self.weight, bias)


class ModalityNorm(nn.Module):
    """LayerNorm with weights of their own for image tokens, text tokens and, where `kinds` is 3, all tokens
    of a fused pair (norm2_imag, norm2_text, norm2_vl of VLMo). x_TD holds the image tokens first."""

    def __init__(self, width: int, eps: float, kinds: int = 2):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kinds, width))
        self.bias = nn.Parameter(torch.empty(kinds, width))
        # Gains and biases, although their shape says matrix.
        self.weight.no_weight_decay = self.bias.no_weight_decay = True  # pyright: ignore
        self.eps = eps

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        width = (x_TD.shape[-1],)
        if layout.fused and self.weight.shape[0] == 3:
            return F.layer_norm(x_TD, width, self.weight[2], self.bias[2], self.eps)
        parts = x_TD.split([layout.held.num_image, layout.held.num_text])
        out = [
            F.layer_norm(part, width, self.weight[m], self.bias[m], self.eps)
            for m, part in enumerate(parts)
            if part.shape[0] or not x_TD.shape[0]
        ]
        return out[0] if len(out) == 1 else torch.cat(out)  # no rows at all: keeps the gradients


class Norm(nn.LayerNorm):
    """One LayerNorm for all tokens, with the signature of ModalityNorm."""

    def forward(self, x_TD: Tensor, layout: TokenLayout | None = None) -> Tensor:  # pyright: ignore
        return F.layer_norm(x_TD, self.normalized_shape, self.weight, self.bias, self.eps)


class VocabLinear(nn.Linear):
    """From hidden states to words: logits, or their cross-entropy."""

    def cross_entropy(
        self, x_KD: Tensor, target_K: Tensor, smoothing: float = 0.0, z_loss: float = 0.0
    ) -> TextLoss:
        """Of (K, D) hidden states against (K,) words, with label smoothing and a weight of the z-loss."""
        return masked_text_loss(x_KD, self.weight, self.bias, target_K, smoothing=smoothing, z_loss=z_loss)


def keep_all(name: str, whole: Tensor) -> Tensor:
    return whole


@dataclass(frozen=True)
class Layers:
    """Constructors of the layers that a parallel layout cuts, called with the sizes of the whole.

    qkv(width, out_width, key_bias); row_linear(in, out), the projection after attention;
    word_embedding(vocab, width); vocab_linear(width, vocab); expert(width, hidden, activation) of a hard
    router; routed_experts(num_experts, width, hidden, activation) of a learned one; relative_positions(side,
    text, tables, heads).
    `tokens` moves rows between devices, `dispatcher` to experts and back. `cut(name, whole)` is the part of a
    whole parameter that this process holds, `name_of(name)` what the parameter of that name is called on one
    device.
    """

    qkv: Callable[[int, int, bool], nn.Module] = QKVLinear
    row_linear: Callable[[int, int], nn.Module] = nn.Linear
    word_embedding: Callable[[int, int], nn.Module] = nn.Embedding
    vocab_linear: Callable[[int, int], nn.Module] = VocabLinear
    expert: Callable[[int, int, str], nn.Module] = Expert
    routed_experts: Callable[[int, int, int, str], nn.Module] = ExpertBank
    relative_positions: Callable[[int, int, int, int], RelativePositions] = RelativePositions
    dispatcher: Dispatcher = field(default_factory=LocalDispatcher)
    tokens: Tokens = field(default_factory=WholeTokens)
    cut: Callable[[str, Tensor], Tensor] = keep_all
    name_of: Callable[[str], str] = str
