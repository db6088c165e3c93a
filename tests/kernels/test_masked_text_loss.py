"""The masked text loss against its formula in fp64, on every path."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import chunked_linear
from kernels.backend import INTERPRETED
from kernels.masked_text_loss import (
    Scale,
    TextLoss,
    masked_text_loss,
    to_gradient,
)

# Rows, width, words: one row; no row; a row shorter and longer than a block of the kernel; odd everything.
SHAPES = [(1, 3, 5), (0, 4, 7), (7, 24, 33), (5, 40, 4096), (3, 17, 4099), (37, 8, 300)]


def drawn(
    shape: tuple[int, int, int], device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width, words = shape
    generator = torch.Generator().manual_seed(rows * 1000 + words)
    x_KD = torch.randn(rows, width, generator=generator)
    weight_VD = torch.randn(words, width, generator=generator) * width**-0.5 * 2
    bias_V = torch.randn(words, generator=generator)
    target_K = torch.randint(words, (rows,), generator=generator).to(device)
    leaves = [each.to(device, dtype).requires_grad_() for each in (x_KD, weight_VD, bias_V)]
    return *leaves, target_K  # pyright: ignore


def oracle(
    x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_K: Tensor, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, hit) by the docstring's formula."""
    logits_KV = x_KD @ weight_VD.t() + (0 if bias_V is None else bias_V)
    lse_K = logits_KV.exp().sum(-1).log()
    nats_K = lse_K - logits_KV[torch.arange(len(target_K)), target_K]
    uniform_K = lse_K - logits_KV.mean(-1)
    loss_K = (1 - smoothing) * nats_K + smoothing * uniform_K + z_loss * lse_K**2
    return loss_K, nats_K, logits_KV.max(-1).indices == target_K


def in_fp64(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().cpu().requires_grad_() for t in tensors]


def check(
    found: TextLoss, leaves: list[Tensor | None], target_K: Tensor, options: tuple[float, float], tolerance
):
    """Loss and gradients of a loss with another weight on each row."""
    wide = in_fp64(leaves)
    loss_K, nats_K, right_K = oracle(*wide, target_K.cpu(), *options)  # pyright: ignore
    torch.testing.assert_close(found.loss_K.double().cpu(), loss_K.detach(), **tolerance)
    torch.testing.assert_close(found.nats_K.double().cpu(), nats_K.detach(), **tolerance)
    weight_K = torch.linspace(-0.5, 1.5, len(target_K), dtype=torch.float64)
    (found.loss_K * weight_K.to(found.loss_K)).sum().backward()
    (loss_K * weight_K).sum().backward()
    for narrow, exact in zip(leaves, wide, strict=True):
        if narrow is not None:
            torch.testing.assert_close(narrow.grad.double().cpu(), exact.grad, **tolerance)  # pyright: ignore
    if tolerance["atol"] < 1e-3:
        assert torch.equal(found.right_K.cpu(), right_K)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.2, 1e-2)])
def test_loss_and_gradients_follow_the_formula(path: str, shape, options):
    *leaves, target_K = drawn(shape, path)
    found = masked_text_loss(*leaves, target_K, smoothing=options[0], z_loss=options[1])
    check(found, leaves, target_K, options, {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_chunks_give_the_same(path: str, shape):
    *leaves, target_K = drawn(shape, path)
    found = masked_text_loss(*leaves, target_K, smoothing=0.1, z_loss=1e-2, max_logit_bytes=2 * 4 * shape[2])
    check(found, leaves, target_K, (0.1, 1e-2), {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("expanded", [True, False])
def test_one_upstream_gradient_of_all_rows_in_chunks(path: str, shape, expanded: bool):
    """As a sum's, which takes no memory, and as one number written K times."""
    *leaves, target_K = drawn(shape, path)
    wide = in_fp64(leaves)  # pyright: ignore
    oracle(*wide, target_K.cpu(), 0.1, 1e-2)[0].sum().mul(-0.3).backward()  # pyright: ignore
    found = masked_text_loss(*leaves, target_K, smoothing=0.1, z_loss=1e-2, max_logit_bytes=2 * 4 * shape[2])
    upstream_K = torch.full((1,), -0.3, device=path).expand(shape[0])
    found.loss_K.backward(upstream_K if expanded else upstream_K.clone(memory_format=torch.contiguous_format))
    for narrow, exact in zip(leaves, wide, strict=True):
        torch.testing.assert_close(narrow.grad.double().cpu(), exact.grad, rtol=1e-4, atol=1e-5)  # pyright: ignore


@pytest.mark.parametrize("limit", [None, 2 * 8 * 33])
def test_fp64_is_not_rounded(limit: int | None):
    *leaves, target_K = drawn((7, 24, 33), "cpu", torch.float64)
    found = masked_text_loss(*leaves, target_K, smoothing=0.1, z_loss=1e-2, max_logit_bytes=limit)
    assert found.loss_K.dtype == torch.float64
    check(found, leaves, target_K, (0.1, 1e-2), {"rtol": 1e-12, "atol": 1e-12})


def peak_bytes(run: Callable[[], None]) -> int:
    """Of all tensors on the CPU that live at a time, beyond those that lived before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # pyright: ignore
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def test_the_logits_are_never_whole_on_a_cpu():
    rows, width, words = 400, 8, 5000
    *leaves, target_K = drawn((rows, width, words), "cpu")
    whole = 4 * rows * words

    def ours() -> None:
        masked_text_loss(*leaves, target_K, max_logit_bytes=whole // 10).loss_K.sum().backward()

    def naive() -> None:
        torch.nn.functional.cross_entropy(torch.nn.functional.linear(*leaves), target_K).backward()

    assert peak_bytes(ours) < 0.5 * whole
    assert peak_bytes(naive) > 2 * whole


@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_bf16_within_rounding(path: str, chunk_rows: int):
    shape = (23, 32, 517)
    *leaves, target_K = drawn(shape, path, torch.bfloat16)
    found = masked_text_loss(*leaves, target_K, max_logit_bytes=chunk_rows * 2 * shape[2])
    assert all(narrow.dtype == torch.float32 for narrow in (found.loss_K, found.nats_K))
    check(found, leaves, target_K, (0.0, 0.0), {"rtol": 2**-7, "atol": 2**-6})


def test_without_bias(path: str):
    x_KD, weight_VD, _, target_K = drawn((7, 24, 33), path)
    found = masked_text_loss(x_KD, weight_VD, None, target_K)
    check(found, [x_KD, weight_VD, None], target_K, (0.0, 0.0), {"rtol": 1e-4, "atol": 1e-5})


def test_only_the_given_rows_get_a_gradient(path: str):
    x_ND, weight_VD, bias_V, _ = drawn((9, 24, 33), path)
    row_K = torch.tensor([7, 0, 3], device=path)
    target_K = torch.tensor([32, 1, 0], device=path)
    found = masked_text_loss(x_ND, weight_VD, bias_V, target_K, row_K)
    alone_KD = x_ND.detach()[row_K].requires_grad_()
    masked_text_loss(alone_KD, weight_VD, bias_V, target_K).loss_K.sum().backward()
    found.loss_K.sum().backward()
    others = torch.ones(9, dtype=torch.bool, device=path)
    others[row_K] = False
    assert torch.equal(x_ND.grad[row_K], alone_KD.grad)  # pyright: ignore
    assert not x_ND.grad[others].any()  # pyright: ignore


def test_non_contiguous_inputs(path: str):
    x_KD, weight_VD, bias_V, target_K = drawn((7, 24, 33), path)
    target_K = target_K.repeat_interleave(2)[::2]
    turned = [x_KD.detach().t().contiguous().t(), weight_VD.detach().t().contiguous().t(), bias_V.detach()]
    leaves = [each.requires_grad_() for each in turned]
    check(masked_text_loss(*leaves, target_K), leaves, target_K, (0, 0), {"rtol": 1e-4, "atol": 1e-5})


def test_of_equal_logits_the_first_is_the_most_likely(path: str):
    weight_VD = torch.zeros(5000, 2, device=path)
    bias_V = torch.zeros(5000, device=path)
    bias_V[[40, 41, 4500]] = 3.0
    target_K = torch.tensor([40, 41, 4500, 0], device=path)
    found = masked_text_loss(torch.ones(4, 2, device=path), weight_VD, bias_V, target_K)
    assert found.right_K.tolist() == [True, False, False, False]


@pytest.mark.parametrize("impossible", [slice(3, 4), slice(0, 4096)], ids=["a word", "a block of words"])
@pytest.mark.parametrize("options", [(0.0, 0.0), (0.0, 1e-2)])
def test_words_with_a_logit_of_minus_infinity(path: str, impossible: slice, options):
    """They take no part: as if the vocabulary were the other words."""
    words = 4099
    x_KD, weight_VD, bias_V, _ = drawn((3, 8, words), path)
    target_K = torch.tensor([4096, 4098, 4097], device=path)
    with torch.no_grad():
        bias_V[impossible] = -torch.inf
    possible = torch.ones(words, dtype=torch.bool)
    possible[impossible] = False
    wide = in_fp64([x_KD, weight_VD, bias_V])
    few = [wide[0], wide[1][possible], wide[2][possible]]  # pyright: ignore
    at_K = target_K.cpu() - int((~possible).sum())
    found = masked_text_loss(x_KD, weight_VD, bias_V, target_K, smoothing=options[0], z_loss=options[1])
    loss_K, nats_K, right_K = oracle(*few, at_K, *options)  # pyright: ignore
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.loss_K.double().cpu(), loss_K.detach(), **tolerance)
    torch.testing.assert_close(found.nats_K.double().cpu(), nats_K.detach(), **tolerance)
    assert torch.equal(found.right_K.cpu(), right_K)
    found.loss_K.sum().backward()
    loss_K.sum().backward()
    for narrow, exact in zip((x_KD, weight_VD, bias_V), wide, strict=True):
        torch.testing.assert_close(narrow.grad.double().cpu(), exact.grad, **tolerance)  # pyright: ignore


def test_with_smoothing_an_impossible_word_costs_infinitely_much(path: str):
    *leaves, _ = drawn((3, 17, 99), path)
    target_K = torch.tensor([0, 98, 7], device=path)
    with torch.no_grad():
        leaves[2][40] = -torch.inf
    found = masked_text_loss(*leaves, target_K, smoothing=0.1)
    assert found.loss_K.tolist() == [torch.inf] * 3
    assert found.nats_K.isfinite().all()


@pytest.mark.parametrize("target", [-1, -100, 33, 10**9])
def test_a_target_that_is_no_word(path: str, target: int):
    *leaves, target_K = drawn((7, 24, 33), path)
    target_K[2] = target
    if path == "cpu" and not INTERPRETED:
        with pytest.raises((IndexError, RuntimeError)):
            masked_text_loss(*leaves, target_K)
        return
    found = masked_text_loss(*leaves, target_K)
    others = torch.arange(7) != 2
    assert torch.equal(found.loss_K.isnan().cpu(), ~others)
    assert torch.equal(found.nats_K.isnan().cpu(), ~others)
    found.loss_K.sum().backward()
    assert torch.equal(leaves[0].grad.isnan().any(1).cpu(), ~others)  # pyright: ignore


class NoGradient(torch.autograd.Function):
    """What follows it needs no gradient, and says so with None instead of zeros."""

    @staticmethod
    def forward(ctx, x):  # pyright: ignore
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore
        return None


def test_no_upstream_gradient(path: str):
    *leaves, target_K = drawn((7, 24, 33), path)
    NoGradient.apply(masked_text_loss(*leaves, target_K).loss_K).sum().backward()  # pyright: ignore
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("upstream", ["expanded", "equal", "different"])
def test_rows_are_only_made_again_where_their_gradients_differ(monkeypatch, upstream: str):
    *leaves, target_K = drawn((6, 24, 33), "cpu")
    grad_K = {
        "expanded": torch.tensor(0.5).expand(6),
        "equal": torch.full((6,), 0.5),
        "different": torch.linspace(0, 1, 6),
    }[upstream]
    loss_K = masked_text_loss(*leaves, target_K, max_logit_bytes=2 * 4 * 33).loss_K
    again = []
    made = chunked_linear._sums
    monkeypatch.setattr(chunked_linear, "_sums", lambda *inputs: again.append(1) or made(*inputs))
    loss_K.backward(grad_K)
    assert len(again) == (upstream == "different")


def test_large_logits_do_not_overflow(path: str):
    x_KD = torch.full((2, 1), 300.0, device=path)
    weight_VD = torch.tensor([[1.0], [-1.0], [0.5]], device=path)
    found = masked_text_loss(x_KD, weight_VD, None, torch.tensor([0, 1], device=path))
    assert found.nats_K.tolist() == [0.0, 600.0]


def test_two_runs_are_bit_equal(path: str):
    runs = []
    for _ in range(2):
        *leaves, target_K = drawn((37, 8, 300), path)
        found = masked_text_loss(*leaves, target_K, smoothing=0.1, max_logit_bytes=16 * 4 * 300)
        found.loss_K.sum().backward()
        runs.append([found.loss_K, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_without_gradient_nothing_is_kept(path: str):
    *leaves, target_K = drawn((7, 24, 33), path)
    with torch.no_grad():
        found = masked_text_loss(*leaves, target_K)
    assert not found.loss_K.requires_grad
    torch.testing.assert_close(found.loss_K, masked_text_loss(*leaves, target_K).loss_K.detach())


def test_backward_twice(path: str):
    *leaves, target_K = drawn((7, 24, 33), path)
    loss_K = masked_text_loss(*leaves, target_K).loss_K
    first = torch.autograd.grad(loss_K.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(loss_K.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_activation_checkpointing_and_compile_take_it(path: str):
    *leaves, target_K = drawn((7, 24, 33), path)

    def total(x_KD, weight_VD, bias_V):
        return masked_text_loss(x_KD, weight_VD, bias_V, target_K).loss_K.sum()

    plain = torch.autograd.grad(total(*leaves), leaves)
    again = torch.utils.checkpoint.checkpoint(total, *leaves, use_reentrant=False)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    for other in (again, compiled):
        for a, b in zip(torch.autograd.grad(other, leaves), plain, strict=True):
            torch.testing.assert_close(a, b)


def test_rows_past_2_to_the_31_elements(path: str):
    """Three rows that far apart, in memory that is reserved and never touched."""
    stride = 2**30 + 64
    whole = torch.empty(2 * stride + 8, dtype=torch.bfloat16, device=path)
    logits_KV = whole.as_strided((3, 8), (stride, 1))
    start_KV = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().to(path)
    logits_KV.copy_(start_KV)
    target_K = torch.tensor([0, 7, 3], device=path)
    exact_KV = start_KV.double().softmax(-1) - torch.eye(8, device=path, dtype=torch.float64)[target_K]
    to_gradient(logits_KV, target_K, start_KV.float().logsumexp(-1), 0, 8, Scale(0.0, 0.0, 8))
    torch.testing.assert_close(logits_KV.double(), exact_KV, rtol=2**-8, atol=2**-10)
