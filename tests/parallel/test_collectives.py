"""Collectives and tensor-parallel layers against one process with everything, shares of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eve.packing import TokenLayout
from eve.parallel import collectives
from eve.parallel.tensor import TensorTokens, VocabParallelEmbedding, VocabParallelLinear
from eve.parallel.topology import Topology
from tests.rank_pool import RankPool


def topology_of(tensor: int, sequence: bool) -> Topology:
    from dataclasses import replace

    topology = Topology.from_environment()
    return replace(topology, tensor=tensor, sequence=sequence).connected()


def whole(num_rows: int, seed: int) -> Tensor:
    return torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 10, 17])
def test_shares_are_even_and_whole(num_rows: int) -> None:
    for size in (1, 2, 3, 4):
        counts = collectives.shares(num_rows, size)
        assert sum(counts) == num_rows
        assert max(counts) - min(counts) <= 1


def row_collectives(num_rows: int) -> list[tuple[str, Tensor, Tensor]]:
    """(name, forward, gradient of the input) of each, where rank r puts in the share or the whole of seed r
    and gets the gradient of seed 10 + r."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    counts = collectives.shares(num_rows, size)
    mine, upstream = whole(num_rows, rank), whole(num_rows, 10 + rank)
    results = []
    for name in ("GatherIn", "ScatterOut", "Split", "Join"):
        takes_share = name in ("GatherIn", "Join")
        x = collectives.own_rows(mine, counts, rank).clone() if takes_share else mine.clone()
        x.requires_grad_()
        y = getattr(collectives, name).apply(x, counts, rank, group)
        g = upstream if takes_share else collectives.own_rows(upstream, counts, rank)
        y.backward(g)
        results.append((name, y.detach(), x.grad))
    for name in ("CopyIn", "ReduceOut"):
        x = mine.clone().requires_grad_()
        y = getattr(collectives, name).apply(x * 1.0, group)  # ReduceOut works in place
        y.backward(upstream)
        results.append((name, y.detach(), x.grad))
    return results


@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 10])
def test_rows_and_their_gradients(num_rows: int, four_ranks: RankPool) -> None:
    size = 4
    counts = collectives.shares(num_rows, size)
    inputs, upstream = ([whole(num_rows, r + shift) for r in range(size)] for shift in (0, 10))
    sum_in, sum_up = sum(inputs), sum(upstream)
    shares = [x.split(counts)[r] for r, x in enumerate(inputs)]
    up_shares = [g.split(counts)[r] for r, g in enumerate(upstream)]
    for rank, answers in enumerate(four_ranks.run(row_collectives, num_rows)):
        expected = {
            "GatherIn": (torch.cat(shares), sum_up.split(counts)[rank]),
            "ScatterOut": (sum_in.split(counts)[rank], torch.cat(up_shares)),
            "Split": (inputs[rank].split(counts)[rank], torch.cat(up_shares)),
            "Join": (torch.cat(shares), upstream[rank].split(counts)[rank]),
            "CopyIn": (inputs[rank], sum_up),
            "ReduceOut": (sum_in, upstream[rank]),
        }
        for name, forward, gradient in answers:
            torch.testing.assert_close(forward, expected[name][0], msg=name)
            torch.testing.assert_close(gradient, expected[name][1], msg=name)


SENDS = [[0, 3, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 4]]


def exchanged() -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    sends, receives = SENDS[rank], [row[rank] for row in SENDS]
    x = whole(sum(sends), rank).requires_grad_()
    y = collectives.AllToAll.apply(x, sends, receives, dist.group.WORLD)
    y.backward(2 * y.detach())  # pyright: ignore
    assert x.grad is not None
    return y.detach(), x.grad  # pyright: ignore


def test_all_to_all_of_uneven_parts_and_of_none(four_ranks: RankPool) -> None:
    parts = [whole(sum(sends), rank).split(sends) for rank, sends in enumerate(SENDS)]
    for rank, (received, gradient) in enumerate(four_ranks.run(exchanged)):
        torch.testing.assert_close(received, torch.cat([part[rank] for part in parts]))
        torch.testing.assert_close(gradient, 2 * torch.cat(parts[rank]))


def summed_gradients() -> list[Tensor | None]:
    rank = dist.get_rank()
    a, b = (torch.ones(n, requires_grad=True) for n in (2, 3))
    x, y = collectives.SumGradients.apply(dist.group.WORLD, a, b)  # pyright: ignore
    # Rank 1 does not use b.
    (x.sum() * (rank + 1) + (y.sum() * 5 if rank != 1 else 0)).backward()
    return [a.grad, b.grad]


def test_partial_gradients_are_summed_also_where_unused(two_ranks: RankPool) -> None:
    for a, b in two_ranks.run(summed_gradients):
        assert a.tolist() == [3.0] * 2
        assert b.tolist() == [5.0] * 3


def moved_tokens(sequence: bool, image: list[int], text: list[int]) -> dict[str, Any]:
    tokens = TensorTokens(topology_of(4, sequence))
    layout = TokenLayout.build(image, text)
    x = whole(layout.num_tokens, 0)
    held, after = tokens.split(x, layout)
    own, rows = tokens.own(held, after)
    return {
        "joined": tokens.join(held, after),
        "columns": tokens.to_columns(held, after),
        "back": tokens.join(tokens.give_back(own, after), after),
        "gathered": tokens.gather_own(own, after),
        "held": (held.shape[0], after.held.begin, after.held.num_image, after.held.num_text),
        "rows": (rows.begin, rows.num_image, rows.modality_T.tolist(), rows.sample_T.tolist()),
    }


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("image", "text"), [([5, 5], [2, 7]), ([0, 0], [3, 2]), ([4], [0]), ([1], [0]), ([3, 3, 3], [1, 0, 1])]
)
def test_tokens_come_back_as_they_were(
    sequence: bool, image: list[int], text: list[int], four_ranks: RankPool
) -> None:
    layout = TokenLayout.build(image, text)
    x = whole(layout.num_tokens, 0)
    counts = collectives.shares(layout.num_tokens, 4)
    for rank, answer in enumerate(four_ranks.run(moved_tokens, sequence, image, text)):
        for name in ("joined", "columns", "back", "gathered"):
            assert torch.equal(answer[name], x), name
        begin, end = sum(counts[:rank]), sum(counts[: rank + 1])
        modality = layout.modality_T[begin:end]
        expected = (begin, int((modality == 0).sum()), modality.tolist(), layout.sample_T[begin:end].tolist())
        assert answer["rows"] == expected
        if sequence:
            assert answer["held"] == (end - begin, begin, expected[1], end - begin - expected[1])


def vocabulary(vocab_size: int, num_words: int) -> tuple[Tensor, ...]:
    topology = topology_of(2, False)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(vocab_size, 6, generator=generator)
    bias = torch.randn(vocab_size, generator=generator)
    x = torch.randn(num_words, 6, generator=generator).requires_grad_()
    target = torch.randint(vocab_size, (num_words,), generator=generator)
    head, words = (
        VocabParallelLinear(6, vocab_size, topology),
        VocabParallelEmbedding(vocab_size, 6, topology),
    )
    rows = head.out_features
    assert rows % 8 == 0
    with torch.no_grad():
        padded = torch.cat([table, torch.zeros(2 * rows - vocab_size, 6)])
        mine = slice(topology.tensor_rank * rows, (topology.tensor_rank + 1) * rows)
        head.weight.copy_(padded[mine])
        words.weight.copy_(padded[mine])
        head.bias.copy_(F.pad(bias, (0, 2 * rows - vocab_size))[mine])
    loss = head.cross_entropy(x, target)
    (loss.loss_K * torch.arange(num_words)).sum().backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    looked_up = words(target)
    looked_up.square().sum().backward()
    with torch.no_grad():
        logits = head(x)
    gradients = head.weight.grad, words.weight.grad
    return loss.nats_K, loss.right_K, x.grad, gradients[0], logits, looked_up.detach(), gradients[1]  # pyright: ignore


@pytest.mark.parametrize(("vocab_size", "num_words"), [(40, 7), (16, 1), (33, 9), (17, 0), (9, 5)])
def test_vocabulary_over_two_ranks(vocab_size: int, num_words: int, two_ranks: RankPool) -> None:
    """9 words leave the second rank with one word and padding."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(vocab_size, 6, generator=generator).requires_grad_()
    bias = torch.randn(vocab_size, generator=generator)
    x = torch.randn(num_words, 6, generator=generator).requires_grad_()
    target = torch.randint(vocab_size, (num_words,), generator=generator)
    logits = F.linear(x, table, bias)
    nats = F.cross_entropy(logits, target, reduction="none")
    x_grad, table_grad = torch.autograd.grad((nats * torch.arange(num_words)).sum(), [x, table])
    words_grad = torch.autograd.grad(table[target].square().sum(), table)[0]
    answers = two_ranks.run(vocabulary, vocab_size, num_words)
    for got, right, got_x, _, got_logits, looked_up, _ in answers:
        torch.testing.assert_close(got, nats)
        assert torch.equal(right, logits.argmax(-1) == target)
        torch.testing.assert_close(got_x, x_grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_logits, logits)
        assert torch.equal(looked_up, table[target])
    for index, expected in ((3, table_grad), (6, words_grad)):
        got = torch.cat([answer[index] for answer in answers])
        torch.testing.assert_close(got[:vocab_size], expected, rtol=1e-5, atol=1e-5)
        assert not got[vocab_size:].any()
