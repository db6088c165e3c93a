"""Routers, dispatchers and experts against token-by-token Python and plain autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from eve.config import FeedForward
from eve.moe.dispatch import LocalDispatcher, ReferenceDispatcher
from eve.moe.experts import ExpertBank
from eve.moe.hard_experts import Expert
from eve.moe.layer import RoutedFeedForward
from eve.moe.plan import RoutingPlan
from eve.packing import TokenLayout
from eve.tokens import WholeTokens
from kernels.routing import route


def kept_by_hand(choices, order, num_experts, groups, capacity):
    """GShard: first choices of all tokens in `order`, then second ones; the expert refuses whose slots of the
    token's group are full. {(token, choice)}."""
    taken = [[] for _ in range(num_experts)]
    kept = set()
    for k in range(len(choices[0]) if choices else 0):
        for t in order:
            e = choices[t][k]
            of_group = sum(groups[other] == groups[t] for other in taken[e])
            if capacity is None or of_group < capacity[groups[t]]:
                kept.add((t, k))
                taken[e].append(t)
    return kept


def plan_within(logits_TE, k, capacity):
    group_T = torch.zeros(len(logits_TE), dtype=torch.int64)
    capacity_G = None if capacity is None else torch.tensor([capacity])
    found = route(logits_TE, k, group_T=group_T, num_groups=1, capacity_G=capacity_G)
    return RoutingPlan(found.offsets_E, found.row_token_N, found.token_row_TK, found.weight_TK.detach())


@pytest.mark.parametrize("capacity", [None, 2])
def test_local_dispatcher_equals_reference_with_gradients(capacity):
    generator = torch.Generator().manual_seed(1)
    plan = plan_within(torch.rand(13, 4, generator=generator), 2, capacity)
    results = []
    for dispatcher in (ReferenceDispatcher(), LocalDispatcher()):
        generator.manual_seed(2)
        x = torch.randn(13, 7, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.rand(13, 2, generator=generator, dtype=torch.float64)
        weight = (weight * (plan.token_row_TK >= 0)).requires_grad_()
        weighted = RoutingPlan(plan.offsets_E, plan.row_token_N, plan.token_row_TK, weight)
        rows = dispatcher.dispatch(x, weighted)
        expert = torch.bucketize(torch.arange(26), plan.offsets_E, right=True)
        out = dispatcher.combine(rows.sin() * (expert[:, None] + 1), weighted)
        (out * torch.randn(13, 7, generator=generator, dtype=torch.float64)).sum().backward()
        kept_grad = weight.grad * (plan.token_row_TK >= 0)
        results.append((out.detach(), x.grad, kept_grad))
    for reference, local in zip(*results, strict=True):
        torch.testing.assert_close(local, reference, atol=1e-12, rtol=1e-12)


def test_rows_that_no_expert_computed_do_not_leak():
    plan = plan_within(torch.tensor([[1.0, 0.0]] * 4), 1, 1)
    plan = RoutingPlan(plan.offsets_E, plan.row_token_N, plan.token_row_TK, torch.ones(4, 1))
    y = torch.full((4, 3), float("nan"))
    y[0] = 1.0
    for dispatcher in (ReferenceDispatcher(), LocalDispatcher()):
        assert dispatcher.combine(y, plan).tolist() == [[1.0] * 3] + [[0.0] * 3] * 3
        x = torch.ones(4, 3, requires_grad=True)
        dispatcher.dispatch(x, plan).backward(y)
        assert x.grad.tolist() == [[1.0] * 3] + [[0.0] * 3] * 3


@pytest.mark.parametrize("ends", [[3, 3, 10], [0, 0, 10], [10, 10, 10], [2, 5, 7]])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_bank_equals_a_loop_over_experts_with_gradients(ends, activation):
    torch.manual_seed(0)
    bank = ExpertBank(3, 8, 16, activation)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(10, 8, requires_grad=True)
    upstream = torch.randn(10, 8)

    def plain(h):
        return F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)

    expected = torch.cat(
        [
            plain(x[a:b] @ bank.w1_EDF[e] + bank.b1_EF[e]) @ bank.w2_EFD[e] + bank.b2_ED[e]
            for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False))
        ]
    )
    used = ends[-1]
    inputs = [x, *bank.parameters()]
    expected_grads = torch.autograd.grad((expected * upstream[:used]).sum(), inputs)
    got = bank(x, torch.tensor(ends, dtype=torch.int32))[:used]
    grads = torch.autograd.grad((got * upstream[:used]).sum(), inputs)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(grads[0][:used], expected_grads[0][:used], atol=1e-4, rtol=1e-5)
    for grad, reference in zip(grads[1:], expected_grads[1:], strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-4, rtol=1e-5)


def layer(dispatcher=None, **settings):
    config = FeedForward(blocks=(0,), router="topk", **settings)
    feed_forward = RoutedFeedForward(
        8,
        12,
        config,
        layer=0,
        activation="gelu",
        experts=ExpertBank,
        expert=Expert,
        dispatcher=dispatcher or LocalDispatcher(),
        tokens=WholeTokens(),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in feed_forward.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return feed_forward


def layer_by_hand(feed_forward, x, layout):
    """Token by token: the gate, its k best experts, capacity, weights, sum."""
    config, router, bank = feed_forward.config, feed_forward.router, feed_forward.experts
    shift = router.modality_vector
    seen = x if shift is None else x + shift[layout.modality_T]
    probabilities = torch.softmax(seen @ router.weight.t(), dim=-1)
    best = probabilities.topk(config.k, dim=-1)
    factor = config.capacity_factor
    groups = [int(sample) // config.group_size for sample in layout.sample_T]
    capacity = None
    if factor:
        capacity = [
            max(config.min_capacity, math.ceil(factor * config.k * groups.count(g) / config.num_experts))
            for g in range(max(groups) + 1)
        ]
    # Sample after sample, image before text.
    sample, modality = layout.sample_T.tolist(), layout.modality_T.tolist()
    order = sorted(range(len(x)), key=lambda t: (sample[t], modality[t], t))
    kept = kept_by_hand(best.indices.tolist(), order, config.num_experts, groups, capacity)
    out, dropped = [], 0
    for t in range(len(x)):
        weights = [best.values[t, k].item() * ((t, k) in kept) for k in range(config.k)]
        dropped += sum((t, k) not in kept for k in range(config.k))
        total = max(sum(weights), 1e-30) if config.renormalise else 1.0
        token = seen[t] if config.modality_vector == "dispatch" else x[t]
        y = torch.zeros(8)
        for k, weight in enumerate(weights):
            e = int(best.indices[t, k])
            h = F.gelu(token @ bank.w1_EDF[e] + bank.b1_EF[e])
            y = y + weight / total * (h @ bank.w2_EFD[e] + bank.b2_ED[e])
        out.append(y)
    return torch.stack(out), probabilities, best.indices, dropped


@pytest.mark.parametrize("modality_vector", ["none", "gate", "dispatch"])
@pytest.mark.parametrize("capacity_factor", [0.0, 0.5])
@pytest.mark.parametrize(("k", "renormalise"), [(1, False), (2, True)])
@pytest.mark.parametrize("dispatcher", [LocalDispatcher(), ReferenceDispatcher()])
@pytest.mark.parametrize("group_size", [1, 2, 8])
def test_routed_layer_equals_token_by_token(
    modality_vector, capacity_factor, k, renormalise, dispatcher, group_size
):
    feed_forward = layer(
        dispatcher,
        num_experts=3,
        k=k,
        modality_vector=modality_vector,
        capacity_factor=capacity_factor,
        renormalise=renormalise,
        min_capacity=2,
        z_loss_weight=0.1,
        group_size=group_size,
    )
    layout = TokenLayout.build([4, 4], [3, 6])
    x = torch.randn(17, 8, generator=torch.Generator().manual_seed(6))
    y, output = feed_forward(x, layout)
    expected, probabilities, indices, dropped = layer_by_hand(feed_forward, x, layout)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    assert int(output.stats.dropped_M.sum()) == dropped
    assert (dropped > 0) == (capacity_factor > 0)
    balances, z_losses = [], []
    for group in (layout.sample_T // group_size).unique():
        mine = layout.sample_T // group_size == group
        fractions = torch.bincount(indices[mine, 0], minlength=3) / mine.sum()
        balances.append(3 * (fractions * probabilities[mine].mean(0)).sum())
        logits = feed_forward.router._logits(x, layout.held)[mine]
        z_losses.append(logits.exp().sum(-1).log().square().mean())
    balance, z_loss = torch.stack(balances).mean(), torch.stack(z_losses).mean()
    torch.testing.assert_close(output.stats.z_loss, z_loss)
    torch.testing.assert_close(output.stats.load_balance, balance)
    for m in (0, 1):
        counts = torch.bincount(indices[layout.modality_T == m].flatten(), minlength=3)
        assert output.stats.counts_ME[m].tolist() == counts.tolist()
    entropy = -(probabilities * probabilities.log()).sum()
    torch.testing.assert_close(output.stats.entropy, entropy, atol=1e-4, rtol=1e-5)
    expected_aux = 0.001 * balance + 0.1 * z_loss
    torch.testing.assert_close(output.aux_loss, expected_aux)


POOLS = {"experts_by_modality": (4, 3), "modality_vector": "none"}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 4},
        {"num_experts": 4, "capacity_factor": 0.7},
        {"num_experts": 4, "capacity_factor": 0.7, "noise": "gumbel", "drop_order": "random"},
        {"num_experts": 4, "noise": "gaussian", "load_weight": 0.1, "importance_weight": 0.2},
        {**POOLS, "capacity_factor": 0.7, "drop_order": "priority"},
        {**POOLS, "noise": "gaussian", "load_weight": (0.1, 0.0), "importance_weight": (0.2, 0.1)},
    ],
    ids=str,
)
def test_a_batch_may_be_cut_between_groups(settings):
    """Outputs, and the means of losses and of their gradients, are those of the whole batch."""
    feed_forward = layer(k=2, group_size=2, min_capacity=1, **settings)
    image, text = [5, 3, 1, 4, 6, 2], [2, 4, 7, 1, 1, 5]
    x = torch.randn(41, 8, generator=torch.Generator().manual_seed(7))
    seeds = torch.arange(6) * 7919 + 11
    whole = TokenLayout.build(image, text)

    def run(samples):
        rows = torch.cat([torch.where(whole.sample_T == s)[0] for s in samples])
        rows = rows[torch.argsort(whole.modality_T[rows], stable=True)]
        layout = TokenLayout.build(
            [image[s] for s in samples], [text[s] for s in samples], seed_B=seeds[list(samples)]
        )
        feed_forward.zero_grad()
        y, output = feed_forward(x[rows], layout)
        output.aux_loss.backward()
        return (
            dict(zip(rows.tolist(), y.detach(), strict=True)),
            output,
            feed_forward.router.weight.grad.clone(),
        )

    y, output, gradient = run(range(6))
    parts = [run(samples) for samples in ([0, 1], [2, 3], [4, 5])]
    for row, value in {row: value for part in parts for row, value in part[0].items()}.items():
        torch.testing.assert_close(value, y[row], atol=1e-5, rtol=1e-5)
    for loss in ("load_balance", "importance", "load"):
        of_parts = torch.stack([getattr(part[1].stats, loss) for part in parts])
        torch.testing.assert_close(of_parts.mean(), getattr(output.stats, loss))
    torch.testing.assert_close(torch.stack([part[2] for part in parts]).mean(0), gradient)
    assert sum(part[1].stats.dropped_M for part in parts).tolist() == output.stats.dropped_M.tolist()
    assert bool(output.stats.dropped_M.sum()) == ("capacity_factor" in settings)


def test_load_balance_is_one_where_balanced_and_e_where_collapsed():
    # A gate as sure as fp32 allows: its probabilities are its choices.
    even, one = torch.eye(4).repeat(5, 1) * 200, torch.eye(4)[:1].repeat(20, 1) * 200
    group_T = torch.arange(40) // 20
    found = route(torch.cat([even, one]), 1, group_T=group_T, num_groups=2)
    assert found.balance_G.tolist() == [1.0, 4.0]
