"""Routing, forward and backward, against loops over tokens and against autograd in fp64."""

import pytest
import torch

from kernels.routing import route
from kernels.routing_kernels import blocks_of, tile_of

SHAPES = [  # tokens, experts, choices, groups
    (0, 3, 2, 1),
    (1, 1, 1, 1),
    (17, 5, 2, 3),
    (70, 4, 4, 2),
    (40, 64, 2, 3),
    (260, 6, 2, 5),
    (140, 2, 1, 1),
]


def by_hand(logits, noise, score, k, group, capacity, order, priority, align, begin, num_own):
    """Choices, which are kept, places, offsets, rows: token by token."""
    num_experts, num_tokens = logits.shape[1], len(logits)
    expert = []
    for row, later in zip(
        logits.tolist(), (logits if noise is None else logits + noise).tolist(), strict=True
    ):
        first = min(range(num_experts), key=lambda e: (-row[e], e))
        rest = sorted(set(range(num_experts)) - {first}, key=lambda e: (-later[e], e))
        expert.append([first, *rest][:k])

    def before(choice, t):
        of_choice, of_token = float(score[t, expert[t][choice]]), float(score[t, expert[t][0]])
        rank = of_token if priority is None else float(priority[t])
        return {
            "sequence": (choice, t),
            "priority": (choice, -rank, t),
            "position": (t, choice),
            "score": (-of_choice, t, choice),
        }[order]

    taken, kept, place = {}, [[True] * k for _ in expert], [[0] * k for _ in expert]
    for choice, t in sorted(((c, t) for c in range(k) for t in range(num_tokens)), key=lambda x: before(*x)):
        queue = (int(group[t]), expert[t][choice])
        place[t][choice] = taken.get(queue, 0)
        taken[queue] = place[t][choice] + 1
        kept[t][choice] = capacity is None or taken[queue] <= int(capacity[queue[0]])
    own = range(begin, begin + num_own)
    rows = [
        [t for choice in range(k) for t in own if kept[t][choice] and expert[t][choice] == e]
        for e in range(num_experts)
    ]
    token_row, row_token, offsets = [[-1] * k for _ in own], [], []
    for e, tokens in enumerate(rows):
        for t in tokens:
            token_row[t - begin][expert[t].index(e)] = len(row_token)
            row_token.append(t - begin)
        row_token += [-1] * (-len(tokens) % align)
        offsets.append(len(row_token))
    return expert, kept, place, offsets, row_token, token_row


def differentiable(logits, expert, kept, group, num_groups, sigmoid, renormalise, balance_all):
    """weight_TK, balance_G, z_loss_G and the entropy, in plain PyTorch."""
    k, num_experts = expert.shape[1], logits.shape[1]
    score = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1)
    share = score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    raw = torch.stack([score[torch.arange(len(score)), expert[:, c]] for c in range(k)], 1)
    weight = raw * kept
    if renormalise != "none":
        total = (raw if renormalise == "before_drops" else weight).sum(-1, keepdim=True)
        weight = weight / total.clamp_min(torch.finfo(torch.float32).eps)
    balance, z_loss = [], []
    for g in range(num_groups):
        mine = group == g
        tokens = max(int(mine.sum()), 1)
        counted = expert[mine] if balance_all else expert[mine, :1]
        fraction = torch.bincount(counted.flatten(), minlength=num_experts) / (tokens * counted.shape[1])
        balance.append(num_experts * (fraction * share[mine].sum(0) / tokens).sum())
        z_loss.append(torch.logsumexp(logits[mine], -1).square().sum() / tokens)
    possible = share > 0
    entropy = -(share[possible] * share[possible].log()).sum()
    return weight, torch.stack(balance), torch.stack(z_loss), entropy


def tensors(shape, skew, grouping):
    num_tokens, num_experts, _, num_groups = shape
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    if skew:
        logits[:, num_experts // 2] += 9
    token = torch.arange(num_tokens)
    half = max((num_tokens + 1) // 2, 1)
    # As image and text tokens lie, the groups of each in order; or shuffled.
    group = (token % half) * num_groups // half if grouping == "runs" else token * 7 % num_groups
    return logits, group, generator


@pytest.mark.parametrize(
    ("settings", "grouping"),
    [
        ("plain", "runs"),
        ("capacity", "runs"),
        ("capacity", "mixed"),
        ("own", "mixed"),  # some of the tokens, with padding
        ("sigmoid", "mixed"),
        ("raw", "runs"),  # weights that are not renormalised
        ("skew", "mixed"),  # all first choices are one expert
        ("noise", "runs"),
        ("priority", "runs"),
        ("priority", "mixed"),
        ("given priority", "mixed"),  # with ties
        ("position", "mixed"),
        ("score", "runs"),
        ("before_drops", "runs"),
        ("impossible", "runs"),  # experts that some tokens cannot choose
        ("balance of all", "mixed"),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_tokens(path, shape, grouping, settings):
    check(path, shape, grouping, settings)


@pytest.mark.parametrize(("settings", "grouping"), [("own", "runs"), ("score", "mixed")])
def test_more_blocks_of_tokens_than_are_loaded_together(path, grouping, settings):
    """Of so many experts a block has 16 tokens, and 8 blocks are loaded at a time."""
    shape = (130, 130, 2, 3)
    assert shape[0] > tile_of(shape[1])["BLOCK_T"] * blocks_of(shape[1])["BLOCK_B"]
    check(path, shape, grouping, settings)


def test_more_blocks_of_tokens(path):
    check(path, (600, 6, 2, 5), "mixed", "priority")


def check(path, shape, grouping, settings):
    num_tokens, num_experts, k, num_groups = shape
    logits, group, generator = tensors(shape, settings == "skew", grouping)
    noise = 3 * torch.randn(logits.shape, generator=generator) if settings == "noise" else None
    capacity, priority = None, None
    if settings not in ("plain", "sigmoid", "noise", "balance of all"):
        even = num_tokens * k // (num_experts * num_groups)
        capacity = torch.tensor([max(1, even - g) for g in range(num_groups)])
    if settings == "given priority":
        priority = torch.randint(3, (num_tokens,), generator=generator).float()
    if settings == "impossible" and num_experts > k:
        logits[num_tokens // 2 :, : num_experts - k] = float("-inf")
        logits[: num_tokens // 2, k:] = float("-inf")
    order = settings if settings in ("priority", "position", "score") else "sequence"
    order = "priority" if settings == "given priority" else order
    align = {"own": 8, "skew": 4}.get(settings, 1)
    modality = torch.arange(num_tokens) % 5 // 3 if grouping == "mixed" else None
    begin, num_own = (num_tokens // 3, num_tokens // 2) if settings == "own" else (0, num_tokens)
    sigmoid, balance_all = settings == "sigmoid", settings == "balance of all"
    renormalise = {"raw": "none", "before_drops": "before_drops"}.get(settings, "after_drops")

    def run():
        leaf = logits.to(path, copy=True).requires_grad_()
        found = route(
            leaf,
            k,
            group_T=group.to(path),
            num_groups=num_groups,
            modality_T=None if modality is None else modality.to(path),
            num_modalities=1 if modality is None else 2,
            capacity_G=None if capacity is None else capacity.to(path),
            noise_TE=None if noise is None else noise.to(path),
            priority_T=None if priority is None else priority.to(path),
            order=order,
            sigmoid=sigmoid,
            renormalise=renormalise,
            balance_all=balance_all,
            align=align,
            own=(begin, num_own),
        )
        outputs = (found.weight_TK, found.balance_G, found.z_loss_G)
        (grad,) = torch.autograd.grad(outputs, leaf, [tensor.to(path) for tensor in upstream])
        return found, grad.cpu()

    upstream = [
        torch.randn(shape, generator=generator) for shape in ((num_tokens, k), (num_groups,), (num_groups,))
    ]
    found, grad = run()
    score = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1)
    expert, kept, place, offsets, row_token, token_row = by_hand(
        logits, noise, score, k, group, capacity, order, priority, align, begin, num_own
    )
    assert found.expert_TK.tolist() == expert
    assert found.kept_TK.tolist() == kept
    assert found.place_TK.tolist() == ([] if capacity is None else place)
    assert found.offsets_E.tolist() == offsets
    assert found.offsets_E.dtype == torch.int32
    num_rows = num_own * k + num_experts * (align - 1)
    assert found.row_token_N.tolist() == row_token + [0] * (num_rows - len(row_token))
    assert found.token_row_TK.tolist() == token_row

    counts, dropped = torch.zeros(2, num_experts), torch.zeros(2)
    for t in range(num_tokens):
        m = 0 if modality is None else int(modality[t])
        counts[m, expert[t]] += 1
        dropped[m] += k - sum(kept[t])
    assert found.counts_ME.tolist() == counts[: len(found.counts_ME)].tolist()
    assert found.dropped_M.tolist() == dropped[: len(found.dropped_M)].tolist()
    assert len(found.dropped_M) == (1 if modality is None else 2)

    leaf = logits.double().requires_grad_()
    index = torch.tensor(expert, dtype=torch.int64).view(num_tokens, k)
    keep = torch.tensor(kept, dtype=torch.bool).view(num_tokens, k)
    *outputs, entropy = differentiable(
        leaf, index, keep, group, num_groups, sigmoid, renormalise, balance_all
    )
    (expected,) = torch.autograd.grad(outputs, leaf, [tensor.double() for tensor in upstream])
    for one, other in zip(
        (found.weight_TK, found.balance_G, found.z_loss_G, found.entropy), (*outputs, entropy), strict=True
    ):
        torch.testing.assert_close(one.detach().cpu().double(), other.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grad.double(), expected, atol=1e-5, rtol=1e-4)
    again, grad_again = run()
    for name in vars(found):
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    assert torch.equal(grad, grad_again)


def test_of_equal_logits_the_lower_index_comes_first(path):
    logits = torch.zeros(40, 6)
    logits[:, 4] = 1
    found = route(logits.to(path), 3, group_T=torch.zeros(40, dtype=torch.int64, device=path), num_groups=1)
    assert found.expert_TK.tolist() == [[4, 0, 1]] * 40


def test_logits_that_are_not_numbers_name_an_expert(path):
    logits = torch.randn(20, 5)
    logits[3], logits[4], logits[5, 2] = float("nan"), float("-inf"), float("inf")
    found = route(logits.to(path), 2, group_T=torch.zeros(20, dtype=torch.int64, device=path), num_groups=1)
    assert int(found.expert_TK.min()) >= 0
    assert int(found.expert_TK.max()) < 5
    assert found.expert_TK[5, 0] == 2
    assert int(found.token_row_TK.min()) >= 0
    assert int(found.token_row_TK.max()) < 40


@pytest.mark.parametrize("renormalise", ["none", "before_drops", "after_drops"])
def test_sigmoids_that_sum_to_nothing(path, renormalise):
    """Less than an epsilon, and 0 in fp32."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(7))
    logits[:3] -= 19
    logits[3] -= 200
    group = torch.tensor([0, 0, 1, 1, 0, 1])
    generator = torch.Generator().manual_seed(8)
    upstream = [torch.randn(shape, generator=generator) for shape in ((6, 2), (2,))]
    leaf = logits.to(path, copy=True).requires_grad_()
    how = {"sigmoid": True, "renormalise": renormalise}
    found = route(leaf, 2, group_T=group.to(path), num_groups=2, **how)
    outputs = found.weight_TK, found.balance_G
    (grad,) = torch.autograd.grad(outputs, leaf, [tensor.to(path) for tensor in upstream])
    wide = logits.double().requires_grad_()
    kept = torch.ones(6, 2, dtype=torch.bool)
    weight, balance, _, entropy = differentiable(
        wide, found.expert_TK.cpu(), kept, group, 2, True, renormalise, False
    )
    (exact,) = torch.autograd.grad((weight, balance), wide, [tensor.double() for tensor in upstream])
    for one, other in zip((*outputs, found.entropy, grad), (weight, balance, entropy, exact), strict=True):
        torch.testing.assert_close(one.detach().cpu().double(), other.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_choices": 6}, "6 choices of 5 experts"),
        ({"num_choices": 0}, "0 choices"),
        ({"order": "random"}, "order is 'random'; choose sequence"),
        ({"renormalise": "twice"}, "renormalise is 'twice'; choose none"),
        ({"logits_TE": torch.zeros(4, 5, dtype=torch.bfloat16)}, "bfloat16"),
    ],
)
def test_what_cannot_be_routed(path, change, said):
    how = {"logits_TE": torch.zeros(4, 5), "num_choices": 2, "group_T": torch.zeros(4, dtype=torch.int64)}
    how = {
        name: value.to(path) if torch.is_tensor(value) else value for name, value in (how | change).items()
    }
    with pytest.raises(ValueError, match=said):
        route(**how, num_groups=1)


def test_compiles_whole_and_checkpoints(path):
    logits, group, _ = tensors((50, 5, 2, 3), False, "runs")
    logits, group = logits.to(path).requires_grad_(), group.to(path)
    capacity = torch.tensor([3, 5, 4], device=path)

    def step(logits):
        found = route(logits.sin(), 2, group_T=group, num_groups=3, capacity_G=capacity)
        return found.weight_TK.square().sum() + found.balance_G.sum() + found.z_loss_G.sum()

    (expected,) = torch.autograd.grad(step(logits), logits)
    checkpointed = torch.utils.checkpoint.checkpoint(step, logits, use_reentrant=False)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(logits)
    for loss in (checkpointed, compiled):
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_registration(path):
    logits, group, _ = tensors((30, 5, 2, 3), False, "mixed")
    arguments = (
        logits.to(path).requires_grad_(), None, group.to(path), None, None, None, 3, 2, 1, "sequence", False,
        "after_drops", False, 4, 0, 30,
    )  # fmt: skip
    # Its check of compilation adds up the outputs, which here are of several types.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.eve_kernels.route.default, arguments, test_utils=checks)
