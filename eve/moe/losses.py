"""Auxiliary losses of a learned router besides load balance and z-loss, which kernels/routing.py makes.

Importance and load (Shazeer 2017; V-MoE, Riquelme et al. 2021, appendix A) say the same of two numbers of
each expert: they should not vary over the experts. Both are by groups of tokens, and 0 for an empty group.

Shape suffixes: T token, E expert, G group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def variation(value_GE: Tensor, correction: int = 0) -> Tensor:
    """(G,): (standard deviation / mean)^2 over the experts; 0 where all are 0.

    Args:
        correction: 0 is the biased variance of V-MoE, 1 the unbiased one of Tutel.
    """
    mean_G = value_GE.mean(-1)
    variance_G = value_GE.var(-1, correction=correction)
    return variance_G / mean_G.square().clamp_min(torch.finfo(value_GE.dtype).tiny)


def importance(gate_TE: Tensor, group_T: Tensor, num_groups: int, correction: int = 0) -> Tensor:
    """(G,): variation of the sums over tokens of the gates (V-MoE, equation 7).

    Args:
        gate_TE: softmax of the logits without noise.
    """
    return variation(_sums(gate_TE, group_T, num_groups), correction)


def load(
    logits_TE: Tensor,
    threshold_T: Tensor,
    std: float,
    group_T: Tensor,
    num_groups: int,
    correction: int = 0,
) -> Tensor:
    """(G,): variation of the sums over tokens of the probability that an expert, its noise drawn again,
    would be among those chosen: 1 - Phi((threshold - logit) / std) (V-MoE, equations 8 to 10).

    Args:
        logits_TE: without noise.
        threshold_T: the k-th largest logit with noise; gradients flow through it.
        std: of the noise.
    """
    probability_TE = torch.special.ndtr((logits_TE - threshold_T[:, None]) / std)
    return variation(_sums(probability_TE, group_T, num_groups), correction)


def _sums(value_TE: Tensor, group_T: Tensor, num_groups: int) -> Tensor:
    """(G, E), as a product with the one-hot of the groups: in a fixed order, forward and backward."""
    return F.one_hot(group_T, num_groups).to(value_TE.dtype).t() @ value_TE
