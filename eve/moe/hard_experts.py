"""Experts that a token's modality chooses: two-layer feed-forwards with weights of their own names.

Tokens lie by modality (eve/packing.py), so each expert takes a slice and nothing is copied or routed. Each is
a module: a stage can freeze the image expert and train the text expert (VLMo's second stage).
Shape suffixes: T token, N token of one expert, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.packing import TokenLayout
from kernels.expert_feed_forward import expert_feed_forward
from kernels.grouped_linear import activate

# The experts of each hard router, in the order of ModalityNorm's rows.
KINDS = {"shared": ("shared",), "modality": ("image", "text"), "fusion": ("image", "text", "fusion")}


class Expert(nn.Module):
    """One feed-forward. `products`: what multiplies on a GPU, the recipe's moe.experts_backend."""

    def __init__(self, width: int, hidden: int, activation: str, products: str = "auto"):
        super().__init__()
        self.activation, self.products = activation, products
        self.w1_DF = nn.Parameter(torch.empty(width, hidden))
        self.b1_F = nn.Parameter(torch.empty(hidden))
        self.w2_FD = nn.Parameter(torch.empty(hidden, width))
        self.b2_D = nn.Parameter(torch.empty(width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        weights = self.w1_DF[None], self.b1_F[None], self.w2_FD[None], self.output_bias()[None]
        return expert_feed_forward(x_ND, *weights, None, self.activation, self.products)

    def output_bias(self) -> Tensor:
        """What is added to the second product."""
        return self.b2_D


class SubNormExpert(Expert):
    """With a LayerNorm before the second matrix (Magneto, Wang et al. 2022; BEiT-3)."""

    def __init__(self, width: int, hidden: int, activation: str, eps: float):
        super().__init__(width, hidden, activation)
        self.sub_norm = nn.LayerNorm(hidden, eps=eps)

    def forward(self, x_ND: Tensor) -> Tensor:
        h_NF = activate(F.linear(x_ND, self.w1_DF.t(), self.b1_F), self.activation)
        return F.linear(self.sub_norm(h_NF), self.w2_FD.t(), self.b2_D)


class HardExperts(nn.ModuleDict):
    """The bank of a hard router; `expert()` makes one of it."""

    def __init__(self, router: str, expert: Callable[[], nn.Module]):
        super().__init__({kind: expert() for kind in KINDS[router]})

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """All rows (T, D) of the layout -> the same rows."""
        if "shared" in self:
            return self["shared"](x_TD)
        if layout.fused and "fusion" in self:
            return self["fusion"](x_TD)
        parts = zip(("image", "text"), x_TD.split([layout.num_image, layout.num_text]), strict=True)
        out = [self[kind](part) for kind, part in parts if part.shape[0]]
        return out[0] if len(out) == 1 else torch.cat(out)
