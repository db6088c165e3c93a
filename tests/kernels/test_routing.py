"""Routing, forward and backward, against loops over tokens and against autograd in fp64."""

import pytest
import torch

from kernels.routing import route

SHAPES = [  # tokens, experts, choices, groups
    (0, 3, 2, 1),
    (1, 1, 1, 1),
    (17, 5, 2, 3),
    (70, 4, 4, 2),
    (40, 64, 2, 3),
    (600, 6, 2, 5),
    (300, 2, 1, 1),
]


def by_hand(logits, chosen_by, k, group, num_groups, capacity, align, begin, num_own):
    """Choices, which are kept, offsets, rows: token by token."""
    num_experts = logits.shape[1]
    expert = [sorted(range(num_experts), key=lambda e: (-row[e], e))[:k] for row in chosen_by.tolist()]
    taken, kept = {}, [[True] * k for _ in expert]
    for choice in range(k):
        for t, experts in enumerate(expert):
            queue = (int(group[t]), experts[choice])
            taken[queue] = taken.get(queue, 0) + 1
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
    return expert, kept, offsets, row_token, token_row


def differentiable(logits, expert, kept, group, num_groups, sigmoid, renormalise):
    """weight_TK, balance_G, z_loss_G and the entropy, in plain PyTorch."""
    k, num_experts = expert.shape[1], logits.shape[1]
    score = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1)
    share = score / score.sum(-1, keepdim=True)
    weight = torch.stack([score[torch.arange(len(score)), expert[:, c]] for c in range(k)], 1) * kept
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    balance, z_loss = [], []
    for g in range(num_groups):
        mine = group == g
        tokens = max(int(mine.sum()), 1)
        first = torch.bincount(expert[mine, 0], minlength=num_experts)
        balance.append(num_experts * (first / tokens * share[mine].sum(0) / tokens).sum())
        z_loss.append(torch.logsumexp(logits[mine], -1).square().sum() / tokens)
    entropy = -(share * share.log()).sum()
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
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_tokens(path, shape, grouping, settings):
    num_tokens, num_experts, k, num_groups = shape
    logits, group, generator = tensors(shape, settings == "skew", grouping)
    noise = torch.randn(logits.shape, generator=generator) if settings == "noise" else None
    capacity = None
    if settings in ("capacity", "own", "skew", "raw"):
        even = num_tokens * k // (num_experts * num_groups)
        capacity = torch.tensor([max(1, even - g) for g in range(num_groups)])
    align = {"own": 8, "skew": 4}.get(settings, 1)
    modality = torch.arange(num_tokens) % 5 // 3 if grouping == "mixed" else None
    begin, num_own = (num_tokens // 3, num_tokens // 2) if settings == "own" else (0, num_tokens)
    sigmoid, renormalise = settings == "sigmoid", settings != "raw"

    def run():
        leaf = logits.to(path).requires_grad_()
        found = route(
            leaf,
            k,
            group_T=group.to(path),
            num_groups=num_groups,
            capacity_G=None if capacity is None else capacity.to(path),
            noise_TE=None if noise is None else noise.to(path),
            modality_T=None if modality is None else modality.to(path),
            num_modalities=1 if modality is None else 2,
            sigmoid=sigmoid,
            renormalise=renormalise,
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
    chosen_by = logits if noise is None else logits + noise
    expert, kept, offsets, row_token, token_row = by_hand(
        logits, chosen_by, k, group, num_groups, capacity, align, begin, num_own
    )
    assert found.expert_TK.tolist() == expert
    assert found.kept_TK.tolist() == kept
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
    *outputs, entropy = differentiable(leaf, index, keep, group, num_groups, sigmoid, renormalise)
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
        logits.to(path).requires_grad_(),
        None,
        group.to(path),
        None,
        3,
        2,
        False,
        True,
        4,
        0,
        30,
        None,
        1,
    )
    # Its check of compilation adds up the outputs, which here are of several types.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.eve_kernels.route.default, arguments, test_utils=checks)
