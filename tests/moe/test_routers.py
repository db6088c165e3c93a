"""The learned router: pools by modality, noise, orders of dropping, capacity rules, importance and load."""

import math
from statistics import NormalDist

import pytest
import torch
from pydantic import ValidationError

from eve.config import FeedForward, load_recipe
from eve.errors import UserError
from eve.moe.losses import importance, load
from eve.moe.routers import TopKRouter, capacity
from eve.packing import TokenLayout
from eve.tokens import WholeTokens

IMAGE, TEXT = [5, 3, 4, 6], [2, 4, 7, 1]  # tokens of each sample
WIDTH = 8


def router_of(layer=0, **settings):
    router = TopKRouter(WIDTH, FeedForward(blocks=(0,), router="topk", **settings), layer, WholeTokens())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def tokens(image=IMAGE, text=TEXT, seeds=None):
    layout = TokenLayout.build(image, text, seed_B=seeds)
    x_TD = torch.randn(layout.num_tokens, WIDTH, generator=torch.Generator().manual_seed(4))
    return x_TD.requires_grad_(), layout


def run(router, x_TD, layout):
    return router(x_TD, layout.held, layout)


def experts_of(output, layout, k):
    """The expert of each choice, -1 where it was dropped, from the rows of the plan."""
    row_TK = output.plan.token_row_TK
    expert_TK = torch.bucketize(row_TK, output.plan.offsets_E.long(), right=True)
    return expert_TK.where(row_TK >= 0, -1).view(layout.num_tokens, k)


@pytest.mark.parametrize("pools", [(4, 3), (3, 1), (1, 5)])
def test_two_pools_are_two_routers(pools):
    k = min(*pools, 2)
    settings = {"importance_weight": (0.3, 0.2), "load_balance_weight": (0.0, 0.7), "z_loss_weight": (0.1, 0)}
    router = router_of(
        experts_by_modality=pools, k=k, group_size=2, modality_vector="none", renormalise=False, **settings
    )
    assert len(router.weight) == sum(size for size in pools if size > 1)
    x_TD, layout = tokens()
    output = run(router, x_TD, layout)
    upstream = torch.randn(layout.num_tokens, k, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad(
        (output.plan.weight_TK * upstream).sum() + output.aux_loss, (x_TD, router.weight)
    )

    x = x_TD.detach().double().requires_grad_()
    weight = router.weight.detach().double().requires_grad_()
    begin, row, aux, terms = 0, 0, torch.zeros((), dtype=torch.float64), []
    for m, size in enumerate(pools):
        mine = torch.where(layout.modality_T == m)[0]
        if size == 1:
            assert experts_of(output, layout, k)[mine].flatten().tolist() == [begin] * len(mine)
            assert output.plan.weight_TK[mine].flatten().tolist() == [1.0] * len(mine)
        else:
            gate = torch.softmax(x[mine] @ weight[row : row + size].t(), -1)
            best = gate.topk(k, -1)
            assert experts_of(output, layout, k)[mine].tolist() == (best.indices + begin).tolist()
            terms.append((best.values * upstream[mine]).sum())
            for group in range(2):
                of_group = gate[layout.sample_T[mine] // 2 == group]
                logits = (x[mine] @ weight[row : row + size].t())[layout.sample_T[mine] // 2 == group]
                sums = of_group.sum(0)
                first = torch.bincount(of_group.argmax(-1), minlength=size) / len(of_group)
                imbalance = sums.var(correction=0) / sums.mean() ** 2
                aux = aux + (0.3, 0.2)[m] * imbalance / 2
                aux = aux + (0.0, 0.7)[m] * size * (first * of_group.mean(0)).sum() / 2
                aux = aux + (0.1, 0.0)[m] * torch.logsumexp(logits, -1).square().mean() / 2
            row += size
        counts = output.stats.counts_ME[m]
        assert int(counts[begin : begin + size].sum()) == int(counts.sum()) == k * len(mine)
        begin += size
    torch.testing.assert_close(output.aux_loss.double(), aux, atol=1e-5, rtol=1e-5)
    for one, other in zip(got, torch.autograd.grad(sum(terms) + aux, (x, weight)), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("image", [[5, 3, 4, 6], [0, 0, 0, 0]])
def test_a_dense_pool_drops_nothing_and_has_no_losses(image):
    router = router_of(
        experts_by_modality=(4, 1), k=1, modality_vector="none", renormalise=False, capacity_factor=0.1,
        min_capacity=1, noise="gaussian", load_weight=0.1, importance_weight=0.1,
    )  # fmt: skip
    x_TD, layout = tokens(image, TEXT, torch.arange(4))
    output = run(router, x_TD, layout)
    assert output.stats.dropped_M.tolist() == [max(sum(image) - 4, 0) if sum(image) else 0, 0]
    texts = slice(layout.num_image, None)
    assert experts_of(output, layout, 1)[texts].flatten().tolist() == [4] * sum(TEXT)
    assert (float(output.aux_loss.detach()) != 0) == bool(sum(image))
    loss = output.plan.weight_TK.sum() + output.aux_loss
    for gradient in torch.autograd.grad(loss, (x_TD, router.weight)):
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("noise", ["gaussian", "gumbel"])
def test_noise_belongs_to_the_token_of_a_sample_and_the_layer(noise):
    seeds = torch.tensor([3, 1 << 60, -5, 77])
    router = router_of(num_experts=6, noise=noise)
    _, whole = tokens(seeds=seeds)
    noise_TE = router.noise(whole)
    order = [2, 0, 3, 1]
    _, other = tokens([IMAGE[s] for s in order], [TEXT[s] for s in order], seeds[order])
    other_TE = router.noise(other)
    for place, sample in enumerate(order):
        assert torch.equal(other_TE[other.sample_T == place], noise_TE[whole.sample_T == sample])
    assert noise_TE.unique().numel() == noise_TE.numel()
    of_next = router_of(layer=1, num_experts=6, noise=noise).noise(whole)
    assert torch.cat([noise_TE, of_next]).unique().numel() == 2 * noise_TE.numel()
    assert router.noise(tokens()[1]) is None  # no seeds in evaluation


def test_noise_is_distributed_as_its_name_says():
    _, layout = tokens([400] * 4, [100] * 4, torch.arange(4) * 1000003)
    noise_TE = router_of(experts_by_modality=(16, 4), modality_vector="none", noise="gaussian", noise_std=2.0)
    noise_TE = noise_TE.noise(layout)
    for column, std in ((noise_TE[:, :16], 2 / 16), (noise_TE[:, 16:], 2 / 4)):
        below = (column.flatten()[:, None] < std * torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).double().mean(0)
        expected = [NormalDist().cdf(z) for z in (-2, -1, 0, 1, 2)]
        torch.testing.assert_close(below, torch.tensor(expected).double(), atol=0.02, rtol=0)
    gumbel = router_of(num_experts=16, noise="gumbel").noise(layout).flatten()
    below = (gumbel[:, None] < torch.tensor([-1.0, 0.0, 1.0, 3.0])).double().mean(0)
    expected = [math.exp(-math.exp(-z)) for z in (-1, 0, 1, 3)]
    torch.testing.assert_close(below, torch.tensor(expected).double(), atol=0.02, rtol=0)
    assert bool(torch.isfinite(gumbel).all())


def test_gaussian_noise_moves_choices_and_weights_and_gumbel_later_choices_alone():
    seeds = torch.arange(4)
    x_TD, layout = tokens(seeds=seeds)
    quiet = run(router_of(num_experts=6), x_TD, layout)
    for noise in ("gaussian", "gumbel"):
        router = router_of(num_experts=6, noise=noise, noise_std=12.0, renormalise=False)
        output = run(router, x_TD, layout)
        logits_TE = router._logits(x_TD, layout.held)
        noisy_TE = logits_TE + router.noise(layout)
        scores_TE = torch.softmax(noisy_TE if noise == "gaussian" else logits_TE, -1)
        expert_TK = experts_of(output, layout, 2)
        torch.testing.assert_close(output.plan.weight_TK, scores_TE.gather(1, expert_TK))
        same = expert_TK == experts_of(quiet, layout, 2)
        assert bool(same[:, 0].all()) == (noise == "gumbel")
        assert not bool(same[:, 1].all())
        if noise == "gumbel":
            expected = noisy_TE.scatter(1, expert_TK[:, :1], -math.inf).argmax(-1)
            assert expert_TK[:, 1].tolist() == expected.tolist()


def test_orders_of_dropping():
    settings = {
        "num_experts": 3, "k": 1, "capacity_factor": 0.5, "capacity_factor_eval": 0.5, "min_capacity": 1,
        "renormalise": False,
    }  # fmt: skip
    x_TD, layout = tokens(seeds=torch.arange(4))

    def kept(order, train=True):
        router = router_of(drop_order=order, **settings).train(train)
        seen = layout if train else tokens()[1]
        return run(router, x_TD, seen).plan.token_row_TK[:, 0] >= 0

    score_T, expert_T = torch.softmax(router_of(**settings)._logits(x_TD, layout.held), -1).max(-1)
    slots = math.ceil(0.5 * layout.num_tokens / 3)
    begins = [sum(IMAGE[:sample]) + sum(TEXT[:sample]) for sample in range(4)]
    images = [begins[sample] + place for sample in range(4) for place in range(IMAGE[sample])]
    texts = [begins[s] + IMAGE[s] + place for s in range(4) for place in range(TEXT[s])]
    for order, rank_T in (("priority", -score_T), ("sequence", torch.tensor(images + texts).float())):
        for e in range(3):
            mine = torch.where(expert_T == e)[0]
            first = mine[torch.argsort(rank_T[mine], stable=True)][:slots]
            assert torch.where(kept(order) & (expert_T == e))[0].tolist() == sorted(first.tolist())
    drawn = kept("random")
    assert int(drawn.sum()) == int(kept("sequence").sum())
    assert not torch.equal(drawn, kept("sequence"))
    assert torch.equal(kept("random", train=False), kept("sequence", train=False))


def test_capacity_of_evaluation_is_a_key_of_its_own():
    x_TD, layout = tokens()
    router = router_of(num_experts=3, k=1, capacity_factor=0.3, min_capacity=1, renormalise=False)
    assert int(run(router, x_TD, layout).stats.dropped_M.sum()) > 0
    assert int(run(router.eval(), x_TD, layout).stats.dropped_M.sum()) == 0


@pytest.mark.parametrize(
    ("rule", "num_tokens", "num_experts", "k", "factor", "expected"),
    [
        ("gshard", 40, 4, 2, 0.5, 10),
        ("gshard", 41, 4, 2, 0.5, 11),
        ("gshard", 10, 1, 1, 1.1, 11),  # 11.000000000000002 in fp64
        ("gshard", 3, 4, 1, 1.0, 2),  # min_capacity
        ("vmoe", 100, 8, 1, 1.05, 16),  # 13.125, a multiple of 4
        ("vmoe", 64, 4, 2, 1.0, 32),
        ("tutel", 37, 4, 2, 1.25, 24),  # 2 * int(1.25 * 10)
        ("tutel", 3, 4, 1, 0.5, 0),
    ],
)
def test_capacity_rules(rule, num_tokens, num_experts, k, factor, expected):
    tokens_G = torch.tensor([num_tokens, 0])
    assert capacity(tokens_G, num_experts, k, factor, rule, min_capacity=2)[0] == expected


def test_importance_and_load_by_hand():
    logits = torch.randn(11, 4, generator=torch.Generator().manual_seed(8))
    noisy = logits + 0.25 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    threshold, group = noisy.sort(-1).values[:, -2], torch.tensor([0, 0, 0, 2, 0, 2, 2, 2, 2, 0, 0])
    importances, loads = [], []
    for g in range(3):
        mine = (group == g).nonzero().flatten().tolist()
        sums = [sum(math.exp(logits[t, e]) / logits[t].exp().sum().item() for t in mine) for e in range(4)]
        chances = [
            sum(1 - NormalDist().cdf((threshold[t] - logits[t, e]).item() / 0.25) for t in mine)
            for e in range(4)
        ]
        for values, out in ((sums, importances), (chances, loads)):
            mean = sum(values) / 4
            out.append(sum((v - mean) ** 2 for v in values) / 4 / mean**2 if mine else 0.0)
    leaf = logits.requires_grad_()
    got = importance(torch.softmax(leaf, -1), group, 3)
    torch.testing.assert_close(got, torch.tensor(importances))
    of_load = load(leaf, threshold, 0.25, group, 3)
    torch.testing.assert_close(of_load, torch.tensor(loads))
    (gradient,) = torch.autograd.grad((got + of_load).sum(), leaf)
    assert bool(torch.isfinite(gradient).all())  # also of group 1, which is empty


POOLS = {"experts_by_modality": (4, 1), "k": 1, "modality_vector": "none"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**POOLS, "experts_by_modality": (4, 2), "k": 3}, "k is 3, but a pool of experts_by_modality has 2"),
        ({**POOLS, "k": 2}, "k is 2, but a pool of experts_by_modality has 1"),
        ({**POOLS, "experts_by_modality": (1, 1)}, "that is router: modality"),
        ({**POOLS, "num_experts": 4}, r"num_experts is 4, but experts_by_modality is \[4, 1\]"),
        ({**POOLS, "modality_vector": "gate"}, "modality_vector is not none"),
        ({"z_loss_weight": (0.1, 0.2)}, "z_loss_weight is a pair of weights"),
        ({"load_weight": 0.1}, "noise is none, and the load needs gaussian"),
        ({"noise": "gumbel", "k": 1}, "noise is gumbel"),
        ({"drop_order": "priority"}, "without capacity_factor nothing is dropped"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValidationError, match=message):
        FeedForward(blocks=(0,), router="topk", **settings)


PAIR = r"expected two numbers of experts, image and text, such as \[32, 32\], each at least 1"
WEIGHT = r"is no weight; expected a number from 0 on, or \[image, text\], one for each pool"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experts_by_modality=[0, 4]", rf"experts_by_modality is \[0, 4\], {PAIR}"),
        ("experts_by_modality=[4]", rf"experts_by_modality is \[4\], {PAIR}"),
        ("experts_by_modality=32", rf"experts_by_modality is 32, {PAIR}"),
        ("experts_by_modality=[a, 2]", rf"experts_by_modality is \['a', 2\], {PAIR}"),
        ("load_balance_weight=[0.1]", rf"load_balance_weight: \[0.1\] {WEIGHT}"),
        ("load_balance_weight=[0, -1]", rf"load_balance_weight: \[0, -1\] {WEIGHT}"),
        ("z_loss_weight=little", rf"z_loss_weight: 'little' {WEIGHT}"),
    ],
)
def test_mistakes_in_pairs_are_one_sentence(override, message):
    with pytest.raises(UserError, match=rf"model\.feed_forward\.1[.:] ?{message}$"):
        load_recipe("vl_moe_base_32e", [f"model.feed_forward.1.{override}"])


def test_a_weight_may_be_written_in_any_way_of_yaml():
    recipe = load_recipe("vl_moe_base_32e", ["model.feed_forward.1.z_loss_weight=1e-3"])
    assert recipe.model.feed_forward[1].z_loss_weight == 0.001


def test_the_number_of_experts_is_that_of_both_pools():
    config = FeedForward(blocks=(0,), router="topk", **POOLS)
    assert config.num_experts == 5
    assert FeedForward(**config.model_dump()) == config
