"""Tokens to expert rows and back: the seam `dispatch -> experts -> combine`.

    dispatch(x_TD, plan) -> x_ND      the row of each choice, rows of an expert together
    combine(y_ND, plan) -> y_TD       weighted sum of a token's rows; a dropped choice adds nothing

`ReferenceDispatcher` writes both as products with a selection matrix: slow, obviously right, the
oracle. `LocalDispatcher` moves rows by index. Its backward is written out, so that every direction
is a gather (deterministic, no atomics) and nothing but indices and the experts' output is kept.

Shape suffixes: T token, D width, N row, K choice.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eve.moe.plan import RoutingPlan


class Dispatcher(Protocol):
    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor: ...

    def combine(self, y_ND: Tensor, plan: RoutingPlan) -> Tensor: ...


class ReferenceDispatcher:
    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        if plan.row_token_N is None:
            return x_TD
        return F.one_hot(plan.row_token_N, x_TD.shape[0]).to(x_TD.dtype) @ x_TD

    def combine(self, y_ND: Tensor, plan: RoutingPlan) -> Tensor:
        if plan.token_row_TK is None:
            return y_ND
        num_rows = y_ND.shape[0]
        # A last column stands for "dropped" and is cut off. Rows past the last offset are not defined.
        one_hot_TKN = F.one_hot(plan.token_row_TK % (num_rows + 1), num_rows + 1)[..., :-1]
        mix_TN = (one_hot_TKN * plan.weight_TK[..., None]).sum(1)  # pyright: ignore
        computed_N1 = (torch.arange(num_rows, device=y_ND.device) < plan.offsets_E[-1])[:, None]
        return mix_TN.to(y_ND.dtype) @ y_ND.where(computed_N1, torch.zeros_like(y_ND))


class LocalDispatcher:
    def dispatch(self, x_TD: Tensor, plan: RoutingPlan) -> Tensor:
        if plan.row_token_N is None:
            return x_TD
        return _Dispatch.apply(x_TD, plan.row_token_N, plan.token_row_TK)  # pyright: ignore

    def combine(self, y_ND: Tensor, plan: RoutingPlan) -> Tensor:
        if plan.token_row_TK is None:
            return y_ND
        return _Combine.apply(y_ND, plan.weight_TK, plan.row_token_N, plan.token_row_TK)  # pyright: ignore


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, row_token_N: Tensor, token_row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_row_TK)
        return x_TD.index_select(0, row_token_N)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (token_row_TK,) = ctx.saved_tensors
        grad_TD = _rows(grad_ND, token_row_TK[:, 0])
        for choice in range(1, token_row_TK.shape[1]):
            grad_TD += _rows(grad_ND, token_row_TK[:, choice])
        return grad_TD, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND: Tensor, weight_TK: Tensor, row_token_N: Tensor, token_row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weight_TK, row_token_N, token_row_TK)
        out_TD = _rows(y_ND, token_row_TK[:, 0]) * weight_TK[:, :1]  # fp32 by the weight
        for choice in range(1, token_row_TK.shape[1]):
            out_TD.addcmul_(_rows(y_ND, token_row_TK[:, choice]), weight_TK[:, choice : choice + 1])
        return out_TD.to(y_ND.dtype)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        y_ND, weight_TK, row_token_N, token_row_TK = ctx.saved_tensors
        num_rows = y_ND.shape[0]
        # The weight of each row; rows that nobody owns keep 0.
        weight_N = weight_TK.new_zeros(num_rows + 1)
        weight_N[torch.where(token_row_TK >= 0, token_row_TK, num_rows).flatten()] = weight_TK.flatten()
        grad_ND = grad_TD.index_select(0, row_token_N) * weight_N[:-1, None].to(grad_TD.dtype)
        grad_weight_TK = torch.stack(
            [
                (grad_TD * _rows(y_ND, token_row_TK[:, choice])).sum(-1, dtype=weight_TK.dtype)
                for choice in range(token_row_TK.shape[1])
            ],
            dim=1,
        )
        return grad_ND, grad_weight_TK, None, None


def _rows(y_ND: Tensor, row_T: Tensor) -> Tensor:
    """The rows of that index; zero for -1. `where`, not a product: an undefined row may hold NaN."""
    if y_ND.shape[0] == 0:
        return y_ND.new_zeros(row_T.shape[0], y_ND.shape[1])
    gathered = y_ND.index_select(0, row_T.clamp_min(0))
    return gathered.masked_fill_((row_T < 0)[:, None], 0)
