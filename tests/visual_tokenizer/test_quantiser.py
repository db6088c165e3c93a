"""The code book against loops over vectors and codes."""

from __future__ import annotations

import math

import pytest
import torch

from eve.visual_tokenizer import Quantiser, Ranks
from tests.rank_pool import RankPool


def vectors(number: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def placed(codes: int = 7, width: int = 5, *, decay: float = 0.9, revive_below: float = 0.0) -> Quantiser:
    quantiser = Quantiser(codes, width, decay=decay, revive_below=revive_below)
    quantiser.codes_KW.copy_(torch.nn.functional.normalize(vectors(codes, width, 1), dim=-1))
    return quantiser


def cosine(a: list[float], b: list[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_the_code_is_the_one_of_the_largest_cosine() -> None:
    quantiser, x_NW = placed(), vectors(40, 5)
    found = quantiser(x_NW)
    codes = quantiser.codes_KW.tolist()
    for x, code, vector in zip(x_NW.tolist(), found.codes_N.tolist(), found.vectors_NW, strict=True):
        cosines = [cosine(x, other) for other in codes]
        assert code == max(range(7), key=cosines.__getitem__)
        torch.testing.assert_close(vector, quantiser.codes_KW[code])
    unit = x_NW / x_NW.norm(dim=-1, keepdim=True)
    expected = ((unit - quantiser.codes_KW[found.codes_N]) ** 2).mean()
    torch.testing.assert_close(found.distance, expected)


def test_the_gradient_passes_straight_through() -> None:
    """As if the vector of length 1 itself had gone on; the code book gets none."""
    quantiser, x_NW = placed(), vectors(12, 5).requires_grad_()
    weight = vectors(12, 5, 3)
    (quantiser(x_NW).vectors_NW * weight).sum().backward()
    through = x_NW.detach().clone().requires_grad_()
    (through / through.norm(dim=-1, keepdim=True) * weight).sum().backward()
    torch.testing.assert_close(x_NW.grad, through.grad)
    assert not quantiser.codes_KW.requires_grad


def test_codes_follow_the_mean_of_their_vectors() -> None:
    quantiser, x_NW = placed(decay=0.9), vectors(9, 5)
    before, codes = quantiser.codes_KW.double().clone(), quantiser(x_NW).codes_N.tolist()
    quantiser.use_K.fill_(2.0)
    quantiser.update(x_NW, torch.tensor(codes))
    assert set(codes) < set(range(7)), "some code is used, some is not"
    for code in range(7):
        mine = [x.double() / x.double().norm() for x, other in zip(x_NW, codes, strict=True) if other == code]
        expected = before[code]
        if mine:
            mean = torch.stack(mine).sum(0) / len(mine)
            expected = 0.9 * before[code] + 0.1 * mean / mean.norm()
            expected = expected / expected.norm()
        torch.testing.assert_close(quantiser.codes_KW[code].double(), expected, atol=1e-6, rtol=0)
        assert float(quantiser.use_K[code]) == pytest.approx(0.9 * 2.0 + 0.1 * len(mine))


def test_dead_codes_go_to_vectors_far_from_their_code() -> None:
    """A cluster that no code is near to gets the dead codes, the others stay where they were."""
    near = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    quantiser = Quantiser(4, 3, decay=0.5, revive_below=0.2)
    quantiser.codes_KW.copy_(torch.cat([near, -near]))
    quantiser.use_K.copy_(torch.tensor([20.0, 20.0, 0.1, 0.1]))
    noise = 0.001 * vectors(60, 3)
    lonely = torch.tensor([0.0, 0.0, 1.0])
    x_NW = torch.cat([near.repeat(25, 1), lonely.repeat(10, 1)]) + noise
    codes_N = torch.tensor([0, 1] * 25 + [0] * 10)
    quantiser.update(x_NW, codes_N)
    torch.testing.assert_close(quantiser.codes_KW[1], near[1], atol=1e-2, rtol=0)
    for code in (2, 3):
        torch.testing.assert_close(quantiser.codes_KW[code], lonely, atol=1e-2, rtol=0)
    assert not torch.equal(quantiser.codes_KW[2], quantiser.codes_KW[3])
    assert quantiser.use_K[2:].tolist() == [15.0, 15.0], "the even use: 60 vectors, 4 codes"
    assert set(quantiser(x_NW[50:]).codes_N.tolist()) <= {2, 3}


def test_k_means_finds_the_clusters() -> None:
    centres = torch.nn.functional.normalize(vectors(6, 8, 5), dim=-1)
    truth = torch.arange(6).repeat_interleave(torch.tensor([90, 50, 20, 20, 10, 10]))
    x_NW = 3 * (centres[truth] + 0.02 * vectors(200, 8, 6))
    quantiser = Quantiser(6, 8, decay=0.9, revive_below=0.0)
    quantiser.place(x_NW)
    codes = quantiser(x_NW).codes_N
    assert len(set(zip(truth.tolist(), codes.tolist(), strict=True))) == 6
    assert sorted(quantiser.use_K.tolist()) == [10, 10, 20, 20, 50, 90]
    for code in range(6):
        mean = torch.nn.functional.normalize(x_NW[codes == code], dim=-1).sum(0)
        torch.testing.assert_close(quantiser.codes_KW[code], mean / mean.norm())


def test_fewer_vectors_than_codes_leave_no_code_without_length() -> None:
    quantiser = Quantiser(20, 4, decay=0.9, revive_below=0.0)
    quantiser.place(vectors(5, 4))
    torch.testing.assert_close(quantiser.codes_KW.norm(dim=-1), torch.ones(20))
    assert len(set(quantiser(vectors(5, 4)).codes_N.tolist())) == 5


def follow(steps: int, ranks_number: int) -> Quantiser:
    """Runs on each rank of a pool, or alone."""
    import torch.distributed as dist

    from eve.parallel.topology import Topology

    topology = Topology.from_environment()
    ranks = Ranks(topology.rank, topology.world_size, topology.all_reduce_sum)
    assert ranks.number == ranks_number == (dist.get_world_size() if dist.is_initialized() else 1)
    quantiser = Quantiser(16, 4, decay=0.8, revive_below=0.3)
    for step in range(steps):
        share = vectors(64, 4, step).chunk(ranks.number)[ranks.rank]
        if step == 0:
            quantiser.place(share, ranks)
        quantiser.update(share, quantiser(share).codes_N, ranks)
    return quantiser


def test_two_ranks_keep_the_code_book_of_one(two_ranks: RankPool) -> None:
    alone = follow(30, 1)
    first, second = two_ranks.run(follow, 30, 2)
    assert torch.equal(first.codes_KW, second.codes_KW)
    torch.testing.assert_close(first.codes_KW, alone.codes_KW, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.use_K, alone.use_K)
