"""Experts spread over ranks give what one bank gives that holds them all, whatever goes where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eve.moe.experts import ExpertBank
from eve.parallel.deepspeed import import_deepspeed
from eve.parallel.topology import Topology
from tests.rank_pool import RankPool

WIDTH, HIDDEN = 8, 16

# Rows of each expert, on each of four ranks.
ROUTINGS = {
    "even": [[2, 2, 2, 2]] * 4,
    "all to one expert": [[0, 0, 5, 0]] * 4,
    "an expert with none": [[3, 0, 1, 2], [1, 0, 0, 4], [2, 0, 2, 2], [5, 0, 1, 0]],
    "a rank with none": [[1, 2, 3, 4], [0, 0, 0, 0], [4, 0, 0, 1], [0, 1, 0, 0]],
    "nothing at all": [[0, 0, 0, 0]] * 4,
    # A modality plan: two experts of images, two of texts, as a pool for each modality has them.
    "pools": [[3, 1, 0, 0], [0, 0, 2, 2], [4, 4, 1, 0], [0, 2, 0, 6]],
}
# Rows of dropped choices, past the last offset: no expert computes them and nobody reads them.
DROPPED = 3


def filled(bank: ExpertBank) -> ExpertBank:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return bank


def rows(rank: int, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(x, the gradient of y, offsets) of a rank."""
    generator = torch.Generator().manual_seed(10 + rank)
    x, grad = (torch.randn(sum(counts) + DROPPED, WIDTH, generator=generator) for _ in range(2))
    grad[sum(counts) :] = 0
    return x, grad, torch.tensor(counts, dtype=torch.int32).cumsum(0).to(torch.int32)


def spread(routing: list[list[int]], expert: int) -> dict[str, Any]:
    import_deepspeed().init_distributed(dist_init_required=False)
    from eve.parallel.experts import ExpertParallelBank

    topology = replace(Topology.from_environment(), expert=expert)
    bank = ExpertParallelBank(4, WIDTH, HIDDEN, "gelu", topology)
    bank.set_deepspeed_parallelism()
    held = slice(topology.expert_rank * 4 // expert, (topology.expert_rank + 1) * 4 // expert)
    whole = dict(filled(ExpertBank(4, WIDTH, HIDDEN, "gelu")).named_parameters())
    mine = {name.rpartition(".")[-1]: parameter for name, parameter in bank.named_parameters()}
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(whole[name][held])
    x, grad, offsets = rows(topology.rank, routing[topology.rank])
    x.requires_grad_()
    y = bank(x, offsets)
    y.backward(grad)
    state = bank.state_dict()
    other = ExpertParallelBank(4, WIDTH, HIDDEN, "gelu", topology)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(bank.parameters(), other.parameters(), strict=True))
    gradients = {name: parameter.grad for name, parameter in mine.items()}
    return {"y": y.detach(), "x": x.grad, "gradients": gradients, "names": sorted(state)}


@pytest.mark.parametrize("expert", [2, 4])
@pytest.mark.parametrize("name", ROUTINGS)
def test_spread_experts_equal_one_bank(name: str, expert: int, four_ranks: RankPool) -> None:
    routing = ROUTINGS[name]
    bank = filled(ExpertBank(4, WIDTH, HIDDEN, "gelu"))
    answers = four_ranks.run(spread, routing, expert)
    gradients = dict.fromkeys(dict(bank.named_parameters()), 0)
    for rank, answer in enumerate(answers):
        x, grad, offsets = rows(rank, routing[rank])
        x.requires_grad_()
        used = int(offsets[-1])
        bank.zero_grad()
        y = bank(x[:used], offsets)
        y.backward(grad[:used])
        torch.testing.assert_close(answer["y"][:used], y.detach())
        assert not answer["y"][used:].any()
        torch.testing.assert_close(answer["x"], x.grad)
        gradients = {n: gradients[n] + p.grad.clone() for n, p in bank.named_parameters()}  # pyright: ignore
        # One by one, as DeepSpeed writes a file of each.
        assert answer["names"] == sorted(
            f"deepspeed_moe.experts.deepspeed_experts.{index}.{n}"
            for index in range(4 // expert)
            for n in gradients
        )
    for n, gradient in gradients.items():
        # Copies of an expert each have a part of its gradient; DeepSpeed sums them.
        copies = [
            torch.cat([answers[first + r]["gradients"][n] for r in range(expert)])
            for first in range(0, 4, expert)
        ]
        torch.testing.assert_close(sum(copies), gradient, msg=n)
