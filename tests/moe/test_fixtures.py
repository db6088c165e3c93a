"""Routing against numbers of the official codes: V-MoE, GShard (EVE, DeepSpeed), Tutel, ST-MoE's z-loss.

Sizes, factors and cases are read from the files: the names of the outputs say which there are.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve.config import FeedForward
from eve.moe.dispatch import LocalDispatcher
from eve.moe.losses import importance, load
from eve.moe.plan import RouterOutput, RoutingPlan
from eve.moe.routers import TopKRouter, capacity
from eve.packing import TokenLayout
from eve.tokens import WholeTokens
from kernels.routing import Routing, route
from tests.reference import Reference, files

pytestmark = pytest.mark.fixtures


def one_group(logits_TE: Tensor, k: int, slots: int | None = None, **settings) -> Routing:
    group_T = torch.zeros(len(logits_TE), dtype=torch.int64)
    capacity_G = None if slots is None else torch.tensor([slots])
    return route(logits_TE, k, group_T=group_T, num_groups=1, capacity_G=capacity_G, **settings)


def slots_of(found: Routing) -> Tensor:
    """Place in the buffer of the expert, -1 where dropped."""
    return found.place_TK.long().where(found.kept_TK, -1)


def dense(value_TK: Tensor, expert_TK: Tensor, num_experts: int, fill: float = 0) -> Tensor:
    full = torch.full((len(value_TK), num_experts), fill, dtype=value_TK.dtype)
    return full.scatter(1, expert_TK, value_TK.detach())


def slots_for(num_tokens: int, num_experts: int, k: int, factor: float, rule: str, **settings) -> int:
    return int(capacity(torch.tensor([num_tokens]), num_experts, k, factor, rule, **settings))


def routed(logits_TE: Tensor, noise_TE: Tensor | None, num_samples: int, **settings) -> RouterOutput:
    """What TopKRouter makes of the logits; groups of one sample, of equal lengths."""
    settings = {"num_experts": logits_TE.shape[1], "group_size": 1, "load_balance_weight": 0.0, **settings}
    config = FeedForward(blocks=(0,), router="topk", modality_vector="none", **settings)
    layout = TokenLayout.build([len(logits_TE) // num_samples] * num_samples, [0] * num_samples)
    router = TopKRouter(8, config, 0, WholeTokens())
    return router.route(logits_TE, noise_TE, layout.held, layout)


# --------------------------------------------------------------------------------------------------- V-MoE


@files("routing_vmoe")
def test_vmoe(path):
    file = Reference(path)
    num_groups, size, num_experts = file.input["logits"].shape
    std = file.hyper["noise_std"] / num_experts
    logits = file.input["logits"].flatten(0, 1)
    noise = file.input["noise"].flatten(0, 1) * std
    group_T = torch.arange(num_groups).repeat_interleave(size)

    def routing(scores: Tensor, k: int, **settings) -> Routing:
        return route(scores, k, group_T=group_T, num_groups=num_groups, renormalise="none", **settings)

    for name, scores in (("gates", logits), ("gates_noisy", logits + noise)):
        every = routing(scores, num_experts)
        gates = dense(every.weight_TK, every.expert_TK, num_experts)
        file.equal(name, gates.view(num_groups, size, -1))
    file.equal("gshard_loss_noisy", routing(logits + noise, 1).balance_G)
    file.equal("gshard_loss_deterministic", routing(logits, 1).balance_G)

    for match in file.cases(r"k(\d+)_c(\d+)_(vanilla|bpr)_expert"):
        prefix, k, slots = match[0].removesuffix("expert"), int(match[1]), int(match[2])
        order = {"vanilla": "sequence", "bpr": "priority"}[match[3]]
        found = routing(
            logits + noise, k, order=order, capacity_G=torch.full((num_groups,), slots, dtype=torch.int64)
        )
        undropped = routing(logits + noise, k).weight_TK
        for name, value in (
            ("expert", found.expert_TK),
            ("slot", found.place_TK),
            ("kept", found.kept_TK),
            ("combine_weights", undropped),
            ("combine_dense", dense(found.weight_TK, found.expert_TK, num_experts)),
        ):
            file.equal(prefix + name, value.view(num_groups, size, -1))
        # Through dispatch and combine: expert e computes (e + 1) x + 0.5.
        x_TD = file.input["data"].flatten(0, 1)
        plan = RoutingPlan(found.offsets_E, found.row_token_N, found.token_row_TK, found.weight_TK.detach())
        rows = LocalDispatcher().dispatch(x_TD, plan)
        expert = torch.bucketize(torch.arange(len(rows)), plan.offsets_E.long(), right=True)
        combined = LocalDispatcher().combine(rows * (expert[:, None] + 1) + 0.5, plan)
        file.equal(prefix + "combined", combined.view(num_groups, size, -1))
        buffers = torch.zeros(num_experts, num_groups * slots, x_TD.shape[1])
        token, choice = found.kept_TK.nonzero().unbind(-1)
        slot = group_T[token] * slots + found.place_TK[token, choice]
        buffers[found.expert_TK[token, choice], slot] = rows[found.token_row_TK[token, choice]]
        file.equal(prefix + "expert_inputs", buffers)

    gshard, of_importance, of_load = (
        file.hyper[f"{name}_loss_weight"] for name in ("gshard", "importance", "load")
    )

    def aux(weights: tuple[float, float, float], k: int, noisy: bool) -> tuple[Tensor, Tensor]:
        """The router's auxiliary loss of each group, and its mean's gradient."""
        names = ("load_balance_weight", "importance_weight", "load_weight")
        settings = {"k": k, "noise": "gaussian", "noise_std": file.hyper["noise_std"]}
        settings |= dict(zip(names, weights, strict=True))
        leaf = logits.clone().requires_grad_()
        added = noise if noisy else None
        mean = routed(leaf, added, num_groups, **settings).aux_loss
        (gradient,) = torch.autograd.grad(mean, leaf)
        of_groups = [
            routed(logits[group_T == g], noise[group_T == g] if noisy else None, 1, **settings).aux_loss
            for g in range(num_groups)
        ]
        torch.testing.assert_close(mean, torch.stack(of_groups).mean())
        return torch.stack(of_groups), gradient.view(num_groups, size, -1)

    file.equal("auxiliary_loss_deterministic", aux((gshard, of_importance, of_load), 1, False)[0])
    value, gradient = aux((0.0, 1.0, 0.0), 1, False)
    file.equal("importance_loss", value)
    file.equal("grad_importance_loss", gradient)
    for match in file.cases(r"load_loss_k(\d+)"):
        k = int(match[1])
        value, gradient = aux((0.0, 0.0, 1.0), k, True)
        file.equal(f"load_loss_k{k}", value)
        file.equal(f"grad_load_loss_k{k}", gradient)
        file.equal(f"auxiliary_loss_k{k}", aux((gshard, of_importance, of_load), k, True)[0])

    table = [
        # The file holds fp32: 1.05 is what was meant. Its tokens are multiplied by k already.
        slots_for(
            int(tokens), int(experts), 1, float(f"{factor:.6g}"), "vmoe", multiple=max(int(multiple), 1)
        )
        for tokens, experts, factor, multiple in file.input["capacity_cases"].tolist()
    ]
    file.equal("capacity_table", torch.tensor(table))
    file.done()


# ---------------------------------------------------------------------------------------- GShard, DeepSpeed


@files("routing_gshard")
def test_gshard(path):
    file = Reference(path)
    logits = file.input["logits"]
    num_tokens, num_experts = logits.shape
    least = file.hyper["min_capacity"]
    for match in file.cases(r"((nonoise|gumbel)_cf([\d.]+)_)idx"):
        prefix, factor = match[1], float(match[3])
        noise = file.input["gumbel_noise"] if match[2] == "gumbel" else None
        slots = slots_for(num_tokens, num_experts, 2, factor, "gshard", min_capacity=least)
        found = one_group(logits, 2, slots, noise_TE=noise)
        file.equal(prefix + "capacity", torch.tensor(slots))
        file.equal(prefix + "idx", found.expert_TK)
        file.equal(prefix + "slot", slots_of(found))
        file.equal(prefix + "weights", found.weight_TK)
        file.equal(prefix + "l_aux", found.balance_G[0])
        file.equal(prefix + "first_choice_counts", one_group(logits, 1).counts_ME[0])
        combine = torch.zeros(num_tokens, num_experts, slots)
        token, choice = found.kept_TK.nonzero().unbind(-1)
        place = found.place_TK[token, choice].long()
        combine[token, found.expert_TK[token, choice], place] = found.weight_TK[token, choice]
        file.equal(prefix + "combine_weights", combine)

        # The router with a recipe's keys: the same weights, loss, and rows in the order of the slots.
        settings = {"capacity_factor": factor, "min_capacity": least, "load_balance_weight": 1.0}
        output = routed(logits, noise, 1, noise="gumbel", **settings)
        file.equal(prefix + "weights", output.plan.weight_TK)
        file.equal(prefix + "l_aux", output.aux_loss)
        start_E = F.pad(output.plan.offsets_E[:-1], (1, 0))
        row_TK = output.plan.token_row_TK
        file.equal(prefix + "slot", (row_TK - start_E[found.expert_TK]).where(row_TK >= 0, -1))
    leaf = logits.clone().requires_grad_()
    file.equal("grad_l_aux", torch.autograd.grad(one_group(leaf, 2).balance_G.sum(), leaf)[0])

    for match in file.cases(r"(ds_top(\d+)_(position|probs)_cf([\d.]+)_)slot"):
        prefix, k, factor = match[1], int(match[2]), float(match[4])
        slots = slots_for(num_tokens, num_experts, k, factor, "gshard", min_capacity=least)
        order = {"position": "position", "probs": "score"}[match[3]]
        found = one_group(logits, k, slots, order=order, balance_all=True)
        file.equal(prefix + "capacity", torch.tensor(slots))
        file.equal(prefix + "combine_dense", dense(found.weight_TK, found.expert_TK, num_experts))
        file.equal(prefix + "l_aux", found.balance_G[0])
        if order == "position":
            file.equal(prefix + "slot", dense(slots_of(found), found.expert_TK, num_experts, -1))
        else:
            # Who is kept is decided by the gate, the slots are then given in the order of the tokens.
            kept = dense(found.kept_TK.long(), found.expert_TK, num_experts)
            file.equal(prefix + "slot", (kept.cumsum(0) - 1).where(kept > 0, -1))
    file.done()


# --------------------------------------------------------------------------------------------------- Tutel


@files("routing_tutel")
def test_tutel(path):
    file = Reference(path)
    logits = file.input["logits"]
    num_tokens, num_experts = logits.shape
    std = file.hyper["gate_noise"] / num_experts
    noisy = logits + file.input["noise"] * std
    every = one_group(noisy, num_experts, renormalise="none")
    file.equal("scores", dense(every.weight_TK, every.expert_TK, num_experts))
    for match in file.cases(r"(k(\d+)_(vanilla|bpr)_cf(-?[\d.]+)(_raw)?_)expert"):
        prefix, k, factor = match[1], int(match[2]), float(match[4])
        largest = int(one_group(noisy, k).counts_ME.max())
        slots = slots_for(num_tokens, num_experts, k, abs(factor), "tutel") if factor else largest
        slots = min(slots, largest) if factor < 0 else slots
        file.equal(prefix + "capacity", torch.tensor(slots))
        order = {"vanilla": "sequence", "bpr": "priority"}[match[3]]
        mode = "before_drops" if k > 1 and not match[5] else "none"
        found = one_group(noisy, k, slots, order=order, renormalise=mode)
        undropped = one_group(noisy, k, renormalise=mode).weight_TK
        file.equal(prefix + "expert", found.expert_TK)
        file.equal(prefix + "slot", found.place_TK)
        file.equal(prefix + "gates", undropped)
        assert torch.equal(found.kept_TK, file.output[prefix + "slot"] < slots)
        assert torch.equal(found.weight_TK, undropped * found.kept_TK)
    group_T = torch.zeros(num_tokens, dtype=torch.int64)
    gates = torch.softmax(logits, -1)
    of_importance = importance(gates, group_T, 1, correction=1)[0]
    file.equal("importance_part", of_importance)
    for match in file.cases(r"load_importance_loss_k(\d+)"):
        k = int(match[1])
        threshold_T = noisy.gather(1, one_group(noisy, k).expert_TK[:, -1:])[:, 0]
        # As shipped: gates without noise against a threshold among the logits.
        of_load = load(gates, threshold_T, std, group_T, 1, correction=1)[0]
        file.equal(match[0], (of_importance + of_load) / 2)
        file.equal(f"gshard_loss_k{k}", one_group(noisy, k).balance_G[0])
    file.done()


# -------------------------------------------------------------------------------------------------- z-loss


@files("routing_zloss")
def test_z_loss(path):
    file = Reference(path)
    leaf = file.input["logits"].clone().requires_grad_()
    value = routed(leaf, None, 1, k=1, z_loss_weight=1.0).aux_loss
    file.equal("z_loss", value)
    file.equal("grad_z_loss", torch.autograd.grad(value, leaf)[0])
    # Packed batches hold no padding; here it is a group of its own.
    group_T = file.input["padding_mask"].long()
    value = route(leaf, 1, group_T=group_T, num_groups=2).z_loss_G[0]
    file.equal("z_loss_without_padding", value)
    file.equal("grad_z_loss_without_padding", torch.autograd.grad(value, leaf)[0])
    each = torch.arange(len(leaf))
    squares_T = route(leaf, 1, group_T=each, num_groups=len(leaf)).z_loss_G
    file.equal("logsumexp", squares_T.sqrt() * torch.sign(file.output["logsumexp"]))
    assert all(math.isfinite(value) for value in squares_T.tolist())
    file.done()
