"""A bank of experts with a LayerNorm before their second matrix (Magneto, Wang et al. 2022; BEiT-3).

In plain PyTorch, expert by expert: for importing BEiT-3 and for ablations, with hard routers.
Shape suffixes: N row, E expert, D width, F hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.moe.experts import ExpertBank
from kernels.grouped_linear import activate


class SubNormBank(ExpertBank):
    def __init__(self, num_experts: int, width: int, hidden: int, activation: str, eps: float):
        super().__init__(num_experts, width, hidden, activation)
        self.eps = eps
        self.norm_weight_EF = nn.Parameter(torch.empty(num_experts, hidden))
        self.norm_bias_EF = nn.Parameter(torch.empty(num_experts, hidden))
        self.norm_weight_EF.no_weight_decay = self.norm_bias_EF.no_weight_decay = True  # pyright: ignore

    def forward(self, x_ND: Tensor, offsets_E: Tensor) -> Tensor:
        """(N, D) -> (N, D), all rows of some expert."""
        ends = offsets_E.tolist()
        parts = [
            self._expert(expert, x_ND[begin:end])
            for expert, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
            if end > begin or not len(x_ND)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _expert(self, expert: int, x_ND: Tensor) -> Tensor:
        h_NF = torch.addmm(self.b1_EF[expert], x_ND, self.w1_EDF[expert])
        h_NF = activate(h_NF, self.activation)
        norm = self.norm_weight_EF[expert], self.norm_bias_EF[expert]
        h_NF = F.layer_norm(h_NF, h_NF.shape[1:], *norm, self.eps)
        return torch.addmm(self.b2_ED[expert], h_NF, self.w2_EFD[expert])
