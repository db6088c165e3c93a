"""Auxiliary losses of learned routers, by groups of tokens: load balance (GShard, Switch), z-loss (ST-MoE).

T token, E expert, G group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance(first_GE: Tensor, probability_sum_GE: Tensor, tokens_G: Tensor) -> Tensor:
    """(G,): E * sum_i f_i * p_i (Shazeer 2017 in the form of GShard and Switch): 1 where balanced.

    Args:
        first_GE: number of tokens whose first choice is each expert, before drops; no gradient.
        probability_sum_GE: sum over tokens of the gate's probabilities.
        tokens_G: number of tokens both were counted over.
    """
    num_experts = first_GE.shape[1]
    return num_experts * (first_GE * probability_sum_GE).sum(-1) / tokens_G.square()


def z_loss(logits_TE: Tensor, group_TG: Tensor, tokens_G: Tensor) -> Tensor:
    """(G,): mean_t (logsumexp_i z_ti)^2 (ST-MoE, equation 5); `group_TG` is the one-hot of the groups."""
    return (torch.logsumexp(logits_TE, dim=-1).square() @ group_TG) / tokens_G
