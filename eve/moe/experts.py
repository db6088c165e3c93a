"""A bank of experts: two-layer feed-forwards with weights stacked (E, D, F).

Rows come sorted by expert, so each layer is one grouped matrix product: kernels/expert_feed_forward.py.
Shape suffixes: N row, E expert, D width, F hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.expert_feed_forward import expert_feed_forward


class ExpertBank(nn.Module):
    """`products`: what multiplies on a GPU, the recipe's moe.experts_backend."""

    def __init__(self, num_experts: int, width: int, hidden: int, activation: str, products: str = "auto"):
        super().__init__()
        self.num_experts, self.activation, self.products = num_experts, activation, products
        self.w1_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.b1_EF = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.b2_ED = nn.Parameter(torch.empty(num_experts, width))
        # Biases, although their shape says matrix.
        self.b1_EF.no_weight_decay = self.b2_ED.no_weight_decay = True  # pyright: ignore

    def forward(self, x_ND: Tensor, offsets_E: Tensor) -> Tensor:
        """(N, D) -> (N, D); rows past the last offset are undefined."""
        weights = self.w1_EDF, self.b1_EF, self.w2_EFD, self.output_bias()
        return expert_feed_forward(x_ND, *weights, offsets_E, self.activation, self.products)

    def output_bias(self) -> Tensor:
        """What is added to the second product."""
        return self.b2_ED
