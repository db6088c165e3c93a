"""Shards of a vocabulary, one after the other in one process, against the loss of the whole in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.vocabulary_parallel_loss import logit_statistics, vocabulary_parallel_text_loss
from tests.kernels.test_masked_text_loss import NoGradient

WIDTH = 12


def of_shards(
    x_KD, weight_VD, bias_V, target_K, vocab_size: int, shards: int, options, device: str, chunk=None
):
    """(losses of each shard, gradients of x, W, b): the sum or the concatenation over shards. Each shard's
    `gather` returns what all shards said in a first round; `chunk` rows at a time."""
    rows = weight_VD.shape[0] // shards
    parts = [(weight_VD[s * rows :][:rows], bias_V[s * rows :][:rows], s * rows) for s in range(shards)]
    said: list[Tensor] = []
    for weight, bias, begin in parts:
        num_words = min(max(vocab_size - begin, 0), rows)
        said.append(logit_statistics(x_KD @ weight.t() + bias, target_K, begin, num_words))
    outputs, grads = [], []
    for number, (weight, bias, begin) in enumerate(parts):
        leaves = [each.detach().clone().requires_grad_() for each in (x_KD, weight, bias)]

        asked: list[int] = []

        def gather(mine_5K: Tensor, number: int = number, asked: list[int] = asked) -> Tensor:
            part = slice(sum(asked), sum(asked) + mine_5K.shape[1])
            asked.append(mine_5K.shape[1])
            torch.testing.assert_close(mine_5K, said[number][:, part])
            return torch.stack([stats_5K[:, part] for stats_5K in said])

        limit = None if chunk is None else chunk * 4 * rows
        found = vocabulary_parallel_text_loss(*leaves, target_K, begin, vocab_size, gather, *options, limit)
        assert sum(asked) == len(target_K)
        assert max(asked) <= (chunk or len(target_K))
        weight_K = torch.linspace(-0.5, 1.5, len(target_K), device=device)
        (found.loss_K * weight_K).sum().backward()
        outputs.append(found)
        grads.append([leaf.grad for leaf in leaves])
    x_grad = torch.stack([g[0] for g in grads]).sum(0)
    return outputs, [x_grad, torch.cat([g[1] for g in grads]), torch.cat([g[2] for g in grads])]


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("options", [(0.0, 0.0), (0.1, 1e-2)])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(5, 60), (1, 55), (0, 60), (4, 41), (3, 12), (2, 9000)])
@pytest.mark.parametrize("chunk", [None, 2])
def test_shards_together_are_the_whole(path: str, shards, options, num_rows: int, vocab_size: int, chunk):
    """Also with padding, up to shards that hold nothing else."""
    padded = max(60, -(-vocab_size // 60) * 60)
    generator = torch.Generator().manual_seed(vocab_size)
    x_KD = torch.randn(num_rows, WIDTH, generator=generator)
    weight_VD = torch.randn(padded, WIDTH, generator=generator) * 0.5
    bias_V = torch.randn(padded, generator=generator)
    target_K = torch.randint(vocab_size, (num_rows,), generator=generator)
    exact = [t.double().requires_grad_() for t in (x_KD, weight_VD, bias_V)]
    logits_KV = (exact[0] @ exact[1].t() + exact[2])[:, :vocab_size]
    lse_K = logits_KV.logsumexp(-1)
    nats_K = lse_K - logits_KV[torch.arange(num_rows), target_K]
    smooth_K = lse_K - logits_KV.mean(-1)
    loss_K = (1 - options[0]) * nats_K + options[0] * smooth_K + options[1] * lse_K**2
    (loss_K * torch.linspace(-0.5, 1.5, num_rows)).sum().backward()

    on_device = [t.to(path) for t in (x_KD, weight_VD, bias_V, target_K)]
    outputs, grads = of_shards(*on_device, vocab_size, shards, options, path, chunk)
    for found in outputs:
        torch.testing.assert_close(found.loss_K.double().cpu(), loss_K.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.nats_K.double().cpu(), nats_K.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.right_K.cpu(), logits_KV.argmax(-1) == target_K)
        assert torch.equal(found.loss_K, outputs[0].loss_K)
    for got, leaf in zip(grads, exact, strict=True):
        torch.testing.assert_close(got.double().cpu(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert not grads[1][vocab_size:].any()


def test_a_shard_without_a_possible_word(path: str):
    """Of three; and on the others a first word that is none."""
    generator = torch.Generator().manual_seed(1)
    x_KD, weight_VD = torch.randn(3, WIDTH, generator=generator), torch.randn(12, WIDTH, generator=generator)
    bias_V = torch.zeros(12)
    bias_V[:4] = bias_V[[4, 8]] = -torch.inf
    target_K = torch.tensor([5, 7, 11])
    exact = [t.double().requires_grad_() for t in (x_KD, weight_VD)]
    possible = bias_V.isfinite()
    logits_KV = (exact[0] @ exact[1].t())[:, possible]
    nats_K = logits_KV.logsumexp(-1) - logits_KV[torch.arange(3), torch.tensor([0, 2, 5])]
    (nats_K * torch.linspace(-0.5, 1.5, 3)).sum().backward()
    on_device = [t.to(path) for t in (x_KD, weight_VD, bias_V, target_K)]
    outputs, grads = of_shards(*on_device, 12, 3, (0.0, 0.0), path)
    for found in outputs:
        torch.testing.assert_close(found.loss_K.double().cpu(), nats_K.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.right_K.cpu(), logits_KV.argmax(-1) == torch.tensor([0, 2, 5]))
    for got, leaf in zip(grads, exact, strict=False):
        torch.testing.assert_close(got.double().cpu(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert not grads[2][~possible.to(path)].any()


@pytest.mark.parametrize("target", [-1, 12])
def test_a_target_that_is_no_word_of_any_shard(path: str, target: int):
    """The vocabulary ends at 11, the shards at 12."""
    generator = torch.Generator().manual_seed(1)
    x_KD, weight_VD = torch.randn(2, WIDTH, generator=generator), torch.randn(12, WIDTH, generator=generator)
    on_device = [t.to(path) for t in (x_KD, weight_VD, torch.zeros(12), torch.tensor([3, target]))]
    outputs, grads = of_shards(*on_device, 11, 2, (0.0, 0.0), path)
    for found in outputs:
        assert found.loss_K.isnan().tolist() == [False, True]
    assert grads[0].isnan().any(1).tolist() == [False, True]


def test_no_upstream_gradient(path: str):
    leaves = [torch.randn(shape, device=path, requires_grad=True) for shape in ((2, 3), (5, 3), (5,))]
    target_K = torch.tensor([3, 4], device=path)
    found = vocabulary_parallel_text_loss(*leaves, target_K, 0, 5, lambda stats_5K: stats_5K[None])  # pyright: ignore
    NoGradient.apply(found.loss_K).sum().backward()  # pyright: ignore
    assert all(leaf.grad is None for leaf in leaves)


def test_of_equal_logits_on_two_shards_the_first_word_is_the_most_likely(path: str):
    bias_V = torch.zeros(8, device=path)
    bias_V[[3, 6]] = 2.0
    zeros = torch.zeros(2, WIDTH, device=path), torch.zeros(8, WIDTH, device=path)
    outputs, _ = of_shards(*zeros, bias_V, torch.tensor([3, 6], device=path), 8, 2, (0.0, 0.0), path)
    assert all(found.right_K.tolist() == [True, False] for found in outputs)


def test_rows_past_2_to_the_31_elements(path: str):
    stride = 2**30 + 64
    logits_KV = torch.empty(2 * stride + 8, dtype=torch.bfloat16, device=path).as_strided((3, 8), (stride, 1))
    logits_KV.copy_(torch.arange(24, device=path).view(3, 8).flip(1))
    stats_5K = logit_statistics(logits_KV, torch.tensor([0, 7, 9], device=path), 0, 8)
    sum_exp = torch.arange(8.0).neg().exp().sum().item()
    expected = [[7, 15, 23], [0, 0, 0], [sum_exp] * 3, [7, 8, 0], [28, 92, 156]]
    torch.testing.assert_close(stats_5K.cpu(), torch.tensor(expected))
