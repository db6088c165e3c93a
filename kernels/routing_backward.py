"""Backward of kernels/routing.py: gradients of weights, balance and z-loss -> gradient of the logits.

One launch over blocks of tokens. The scores are made again from the logits, which are all of size T E that is
read (T E 4 bytes, and as many written); the counts of first choices by group come from forward.

    weights     w_k = s_k / sum_j s_j over the kept choices: ds_k = (dw_k - sum_j dw_j w_j) / sum_j s_j;
                divided before drops, j runs over all choices, and the dw of dropped ones are 0
    balance     E / T_g^2 sum_e first_ge sum_t share_te: the share's gradient is E / T_g^2 first_ge
    shares      of sigmoids: s_te / sum_e s_te, and as above; a sum below EPSILON counts as EPSILON
    z-loss      mean over the T_g tokens of l^2, l = logsumexp: 2 l softmax / T_g

Shape suffixes: T token, E expert, K choice, G group, X expert or choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import CompileCase, divide_up, jit, tl, use_triton
from kernels.routing_kernels import (
    COMPILED_SHAPES,
    EPSILON,
    RENORMALISE,
    WARPS,
    choice_of,
    tile_of,
    token_scores,
)

# ---------------------------------------------------------------------------------------------- definition


def route_backward_definition(
    grad_weight_TK: Tensor,
    grad_balance_G: Tensor,
    grad_z_loss_G: Tensor,
    logits_TE: Tensor,
    group_T: Tensor,
    expert_TK: Tensor,
    kept_TK: Tensor,
    first_GE: Tensor,
    tokens_G: Tensor,
    sigmoid: bool,
    renormalise: str,
) -> Tensor:
    score_TE, _ = scores(logits_TE, sigmoid)
    grad_raw_TK = grad_weight_TK * kept_TK
    if renormalise != "none":
        raw_TK = score_TE.gather(1, expert_TK)
        counted_TK = kept_TK if renormalise == "after_drops" else torch.ones_like(kept_TK)
        grad_raw_TK = through_division(grad_raw_TK, raw_TK * counted_TK) * counted_TK
    grad_score_TE = torch.zeros_like(score_TE).scatter_(1, expert_TK, grad_raw_TK)
    num_experts = logits_TE.shape[1]
    grad_share_TE = ((num_experts * grad_balance_G / tokens_G.square())[:, None] * first_GE)[group_T]
    if sigmoid:
        grad_score_TE = grad_score_TE + through_division(grad_share_TE, score_TE)
        grad_TE = grad_score_TE * score_TE * (1 - score_TE)
    else:
        grad_score_TE = grad_score_TE + grad_share_TE
        grad_TE = score_TE * (grad_score_TE - (score_TE * grad_score_TE).sum(-1, keepdim=True))
    scale_T = (grad_z_loss_G / tokens_G)[group_T] * 2 * torch.logsumexp(logits_TE, dim=-1)
    return grad_TE + scale_T[:, None] * torch.softmax(logits_TE, dim=-1)


def through_division(grad_TX: Tensor, part_TX: Tensor) -> Tensor:
    """Gradient of the parts, from that of part / max(sum of the token's parts, EPSILON)."""
    sum_T1 = part_TX.sum(-1, keepdim=True)
    divisor_T1 = sum_T1.clamp_min(EPSILON)
    mean_T1 = (grad_TX * part_TX).sum(-1, keepdim=True) / divisor_T1 * (sum_T1 >= EPSILON)
    return (grad_TX - mean_T1) / divisor_T1


def scores(logits_TE: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Of each token and expert the score, and its share of the token's scores."""
    if not sigmoid:
        score_TE = torch.softmax(logits_TE, dim=-1)
        return score_TE, score_TE
    score_TE = torch.sigmoid(logits_TE)
    return score_TE, score_TE / score_TE.sum(-1, keepdim=True).clamp_min(EPSILON)


# ------------------------------------------------------------------------------------------------- - kernel


@jit
def route_backward_kernel(
    grad_weight, grad_balance, grad_z_loss, logits, group, expert, kept, first_counts, token_counts, grad,
    num_tokens, epsilon,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T = token_T < num_tokens
    lane_E = tl.arange(0, BLOCK_E)
    place_TE = token_T[:, None] * E + lane_E[None, :]
    tile_TE = inside_T[:, None] & (lane_E < E)[None, :]
    logits_TE = tl.load(logits + place_TE, mask=tile_TE, other=float("-inf"))
    score_TE, share_TE, logsumexp_T = token_scores(logits_TE, tile_TE, inside_T, epsilon, SIGMOID)
    total_T = tl.zeros([BLOCK_T], tl.float32)
    product_T = tl.zeros([BLOCK_T], tl.float32)
    for k in tl.static_range(K):
        expert_T, kept_T = choice_of(expert, kept, token_T, inside_T, k, K)
        chosen_TE = expert_T[:, None] == lane_E[None, :]
        raw_T = tl.sum(tl.where(chosen_TE, score_TE, 0.0), axis=1)
        total_T += tl.where(kept_T, raw_T, 0.0) if RENORMALISE == 2 else raw_T
        product_T += raw_T * tl.load(grad_weight + token_T * K + k, mask=kept_T, other=0.0)
    divisor_T = tl.maximum(total_T, epsilon)
    mean_T = tl.where(total_T >= epsilon, product_T / divisor_T, 0.0)
    grad_score_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for k in tl.static_range(K):
        expert_T, kept_T = choice_of(expert, kept, token_T, inside_T, k, K)
        grad_T = tl.load(grad_weight + token_T * K + k, mask=kept_T, other=0.0)
        if RENORMALISE == 1:
            grad_T = (grad_T - mean_T) / divisor_T
        if RENORMALISE == 2:
            grad_T = tl.where(kept_T, grad_T - mean_T, 0.0) / divisor_T
        chosen_TE = expert_T[:, None] == lane_E[None, :]
        grad_score_TE += tl.where(chosen_TE, grad_T[:, None], 0.0)
    group_T = tl.load(group + token_T, mask=inside_T, other=0).to(tl.int64)
    tokens_T = tl.load(token_counts + group_T, mask=inside_T, other=1.0)
    scale_T = E * tl.load(grad_balance + group_T, mask=inside_T, other=0.0) / (tokens_T * tokens_T)
    first_TE = tl.load(first_counts + group_T[:, None] * E + lane_E[None, :], mask=tile_TE, other=0.0)
    grad_share_TE = scale_T[:, None] * first_TE
    if SIGMOID:
        all_T = tl.sum(score_TE, axis=1)
        mean_T = tl.where(all_T >= epsilon, tl.sum(share_TE * grad_share_TE, axis=1), 0.0)
        grad_score_TE += (grad_share_TE - mean_T[:, None]) / tl.maximum(all_T, epsilon)[:, None]
        grad_TE = grad_score_TE * score_TE * (1.0 - score_TE)
    else:
        grad_score_TE += grad_share_TE
        grad_TE = score_TE * (grad_score_TE - tl.sum(score_TE * grad_score_TE, axis=1)[:, None])
    z_T = 2.0 * logsumexp_T * tl.load(grad_z_loss + group_T, mask=inside_T, other=0.0) / tokens_T
    probability_TE = tl.where(tile_TE, tl.exp(logits_TE - logsumexp_T[:, None]), 0.0)
    tl.store(grad + place_TE, grad_TE + z_T[:, None] * probability_TE, mask=tile_TE)


# ------------------------------------------------------------------------------------------------ operator


@torch.library.custom_op("eve_kernels::route_backward", mutates_args=())
def route_backward(
    grad_weight_TK: Tensor,
    grad_balance_G: Tensor,
    grad_z_loss_G: Tensor,
    logits_TE: Tensor,
    group_T: Tensor,
    expert_TK: Tensor,
    kept_TK: Tensor,
    first_GE: Tensor,
    tokens_G: Tensor,
    sigmoid: bool,
    renormalise: str,
) -> Tensor:
    tensors = (
        grad_weight_TK, grad_balance_G, grad_z_loss_G, logits_TE, group_T, expert_TK, kept_TK, first_GE,
        tokens_G,
    )  # fmt: skip
    if not use_triton(logits_TE) or logits_TE.shape[0] == 0:
        return route_backward_definition(*tensors, sigmoid, renormalise)
    num_tokens, num_experts = logits_TE.shape
    grad_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    tile = tile_of(num_experts)
    route_backward_kernel[(divide_up(num_tokens, tile["BLOCK_T"]),)](
        *(tensor.contiguous() for tensor in tensors), grad_TE, num_tokens, EPSILON, E=num_experts,
        K=expert_TK.shape[1], SIGMOID=sigmoid, RENORMALISE=RENORMALISE[renormalise], **tile, num_warps=WARPS,
    )  # fmt: skip
    return grad_TE


@route_backward.register_fake
def _(grad_weight_TK, grad_balance_G, grad_z_loss_G, logits_TE, *others) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for num_experts, k, sigmoid in COMPILED_SHAPES:
        types = {"grad_weight": "*fp32", "grad_balance": "*fp32", "grad_z_loss": "*fp32", "logits": "*fp32"}
        types |= {"group": "*i64", "expert": "*i64", "kept": "*i1", "first_counts": "*fp32"}
        types |= {"token_counts": "*fp32", "grad": "*fp32", "num_tokens": "i32", "epsilon": "fp32"}
        constants = {
            "E": num_experts,
            "K": k,
            "SIGMOID": sigmoid,
            "RENORMALISE": 2,
            **tile_of(num_experts),
        }
        name = f"route, backward E={num_experts} K={k}"
        cases.append(CompileCase(name, route_backward_kernel, types, constants, num_warps=WARPS))
    return cases


COMPILE_CASES = _compile_cases()
