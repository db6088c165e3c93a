"""Heads on encoded tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from eve.model.layers import Layers


class WordHead(nn.Module):
    """Text decoder of EVE: a two-layer MLP onto the vocabulary, of masked tokens only."""

    def __init__(self, width: int, vocab_size: int, eps: float, layers: Layers):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.output = layers.vocab_linear(width, vocab_size)

    def forward(self, x_KD: Tensor) -> Tensor:
        """(K, D) -> logits (K, V)."""
        return self.output(self._hidden(x_KD))

    def cross_entropy(self, x_KD: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
        """((K,) nats in fp32, (K,) bool: the target is the most likely word)."""
        return self.output.cross_entropy(self._hidden(x_KD), target_K)  # pyright: ignore

    def _hidden(self, x_KD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x_KD)))
