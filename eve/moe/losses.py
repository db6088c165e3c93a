"""Auxiliary losses of learned routers: load balance (GShard, Switch), z-loss (ST-MoE). T token, E expert."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance(first_E: Tensor, probability_sum_E: Tensor, tokens: Tensor) -> Tensor:
    """E * sum_i f_i * p_i (Shazeer 2017 in the form of GShard and Switch): 1 where balanced.

    Args:
        first_E: number of tokens whose first choice is each expert, before drops; no gradient.
        probability_sum_E: sum over tokens of the gate's probabilities.
        tokens: number of tokens both were counted over.
    """
    num_experts = first_E.shape[0]
    return num_experts * torch.dot(first_E / tokens, probability_sum_E / tokens)


def z_loss(logits_TE: Tensor, tokens: Tensor) -> Tensor:
    """mean_t (logsumexp_i z_ti)^2 (ST-MoE, equation 5); `tokens` is the number that the mean is over."""
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / tokens
