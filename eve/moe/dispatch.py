"""Tokens to expert rows and back: the seam `dispatch -> experts -> combine`.

    dispatch(x_TD, plan) -> x_ND      the row of each choice, rows of an expert together; on the way
                                      x_TD + vector_MD[modality_T] where a vector is given
    combine(y_ND, plan) -> y_TD       weighted sum of a token's rows; a dropped choice adds nothing

`ReferenceDispatcher` writes both as products with a selection matrix: slow, obviously right, the
oracle. `LocalDispatcher` moves rows by index, in kernels/dispatch.py and kernels/combine.py: every direction
is a gather (deterministic, no atomics) and nothing but indices and the experts' output is kept.

Shape suffixes: T token, D width, N row, K choice, M modality.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eve.moe.plan import RoutingPlan
from kernels.combine import combine
from kernels.dispatch import dispatch


class Dispatcher(Protocol):
    def dispatch(
        self,
        x_TD: Tensor,
        plan: RoutingPlan,
        vector_MD: Tensor | None = None,
        modality_T: Tensor | None = None,
    ) -> Tensor: ...

    def combine(self, y_ND: Tensor, plan: RoutingPlan) -> Tensor: ...


class ReferenceDispatcher:
    def dispatch(
        self,
        x_TD: Tensor,
        plan: RoutingPlan,
        vector_MD: Tensor | None = None,
        modality_T: Tensor | None = None,
    ) -> Tensor:
        if vector_MD is not None:
            x_TD = x_TD + vector_MD[modality_T]
        num_tokens = x_TD.shape[0]
        # A last column stands for padding (-1) and is cut off.
        one_hot_NT = F.one_hot(plan.row_token_N % (num_tokens + 1), num_tokens + 1)[:, :-1]
        return zero_past_end(one_hot_NT.to(x_TD.dtype) @ x_TD, plan)

    def combine(self, y_ND: Tensor, plan: RoutingPlan) -> Tensor:
        num_rows = y_ND.shape[0]
        # A last column stands for "dropped" and is cut off.
        one_hot_TKN = F.one_hot(plan.token_row_TK % (num_rows + 1), num_rows + 1)[..., :-1]
        mix_TN = (one_hot_TKN * plan.weight_TK[..., None]).sum(1)
        return mix_TN.to(y_ND.dtype) @ zero_past_end(y_ND, plan)


def zero_past_end(y_ND: Tensor, plan: RoutingPlan) -> Tensor:
    """Of the rows past the last offset neither values nor gradients are defined: both become 0."""
    computed_N1 = (torch.arange(y_ND.shape[0], device=y_ND.device) < plan.offsets_E[-1])[:, None]
    return y_ND.where(computed_N1, torch.zeros_like(y_ND))


class LocalDispatcher:
    def dispatch(
        self,
        x_TD: Tensor,
        plan: RoutingPlan,
        vector_MD: Tensor | None = None,
        modality_T: Tensor | None = None,
    ) -> Tensor:
        return dispatch(x_TD, plan.row_token_N, plan.token_row_TK, vector_MD, modality_T)

    def combine(self, y_ND: Tensor, plan: RoutingPlan) -> Tensor:
        return combine(y_ND, plan.weight_TK, plan.row_token_N, plan.token_row_TK)
