"""The router beside its peers. Compared: the weight of each expert for each token (zero where it was not
chosen), the load-balance loss, the tokens of each expert, and the gradient of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmark.case import Case, logits
from kernels.benchmark.cost import costs
from kernels.benchmark.peer import Call, Peer, clone_of, module
from kernels.routing import route

EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Logits:
    case: Case
    logits_TE: Tensor
    group_T: Tensor


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Logits:
    """fp32 whatever the type of the rows, as routers have it."""
    group_T = torch.zeros(case.tokens, dtype=torch.int64, device=device)
    return Logits(case, logits(case, device).requires_grad_(), group_T)


def comparable(
    given: Logits, weight_TK: Tensor, expert_TK: Tensor, counts_E: Tensor, balance: Tensor | None = None
) -> dict[str, Tensor]:
    dense_TE = torch.zeros_like(given.logits_TE).scatter(1, expert_TK, weight_TK)
    found = {"weights": dense_TE, "counts": counts_E.float()}
    return found if balance is None else {**found, "balance": balance.reshape(())}


def ours(given: Logits) -> Call:
    def view(found) -> dict[str, Tensor]:
        counts_E = found.offsets_E.diff(prepend=found.offsets_E.new_zeros(1))
        return comparable(given, found.weight_TK, found.expert_TK, counts_E, found.balance_G)

    return Call(
        lambda: route(given.logits_TE, given.case.choices, group_T=given.group_T, num_groups=1),
        {"logits": given.logits_TE},
        view,
    )


def index_operations(logits_TE: Tensor, num_choices: int) -> tuple[Tensor, ...]:
    """What ours returns, as operations of PyTorch: choices, weights, rows, ends, balance, z-loss."""
    num_tokens, num_experts = logits_TE.shape
    share_TE = torch.softmax(logits_TE, -1)
    score_TK, expert_TK = share_TE.topk(num_choices, -1)
    weight_TK = score_TK / score_TK.sum(-1, keepdim=True).clamp_min(EPSILON)
    order_N = torch.argsort(expert_TK.t().flatten(), stable=True)
    row_N = torch.empty_like(order_N)
    row_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    counts_E = F.one_hot(expert_TK, num_experts).sum((0, 1))
    first_E = F.one_hot(expert_TK[:, 0], num_experts).float().mean(0)
    balance = num_experts * (first_E * share_TE.mean(0)).sum()
    z_loss = torch.logsumexp(logits_TE, -1).square().mean()
    return (
        expert_TK, weight_TK, order_N % num_tokens, row_N.view(num_choices, num_tokens).t().contiguous(),
        counts_E.cumsum(0), counts_E, balance, z_loss,
    )  # fmt: skip


def torch_operations(given: Logits) -> Call:
    return by_torch(given, index_operations)


def compiled_operations(given: Logits) -> Call:
    return by_torch(given, torch.compile(index_operations, dynamic=False))


def by_torch(given: Logits, function: Any) -> Call:
    return Call(
        lambda: function(given.logits_TE, given.case.choices),
        {"logits": given.logits_TE},
        lambda found: comparable(given, found[1], found[0], found[5], found[6]),
    )


def native(given: Logits) -> Call:
    """The gate of deepspeed.moe.layer.MoE without its linear layer, nothing dropped, no random order. Its
    top-1 gate does not divide by the weight that is left."""
    moe = module("deepspeed", "deepspeed.moe.sharded_moe")
    top1 = given.case.choices == 1

    def function() -> tuple:
        if top1:
            return moe.top1gating(
                given.logits_TE, 1.0, 0, drop_tokens=False, use_rts=False, sparse_routes=True
            )
        return moe.top2gating(
            given.logits_TE, 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False, sparse_routes=True
        )

    def view(found: tuple) -> dict[str, Tensor]:
        balance, _, _, expert_KT, _, weight_KT, counts_E = found
        seen = comparable(given, weight_KT.t(), expert_KT.t().long(), counts_E, balance)
        return {name: seen[name] for name in seen if not (top1 and name == "weights")}

    return Call(function, {"logits": given.logits_TE}, view)


def autoep(given: Logits) -> Call:
    """The router of AutoEP without its linear layer, and its order of the rows; no losses."""
    router_of = module("deepspeed", "deepspeed.moe.ep_router").TokenChoiceTopKRouter
    router = router_of(
        dim=1, num_experts=given.case.experts, num_expert_groups=None, num_limited_groups=None,
        top_k=given.case.choices, score_func="softmax", route_norm=True, route_scale=1.0, gate_bias=False,
    )  # fmt: skip
    router.gate = torch.nn.Identity()

    def function() -> tuple[Tensor, ...]:
        weight_TK, expert_TK, counts_E = router(given.logits_TE)
        return weight_TK, expert_TK, counts_E, torch.argsort(expert_TK.flatten(), stable=True)

    return Call(
        function,
        {"logits": given.logits_TE},
        lambda found: comparable(given, found[0], found[1], found[2]),
    )


def clone(given: Logits) -> Call:
    return clone_of(*costs(given.case, 4), given.logits_TE.device)


ROUTING = (
    Peer("ours", ours),
    Peer("torch.clone, as many bytes", clone),
    Peer("torch", torch_operations),
    Peer("torch, compiled", compiled_operations, compiles=True),
    Peer("DeepSpeed native", native),
    Peer("DeepSpeed AutoEP", autoep),
)
