"""Masked text loss: rows -> words -> cross-entropy, with optional label smoothing and z-loss.

For row k with logits x = W h + b over V words, l = logsumexp(x), target t, smoothing s and z-loss weight z

    loss = (1 - s) (l - x_t) + s (l - mean(x)) + z l^2      (z-loss: ST-MoE, Zoph et al. 2022, eq. 5)
    dloss/dx_j = p_j (1 + 2 z l) - (1 - s) [j = t] - s / V

Dataflow (the logits have the type of the inputs; their softmax is fp32 and lives in registers):

    forward   cuBLAS   rows_KD @ W^T + b -> logits_KV
              Triton   a program a row, twice over it, the second time from L2: largest logit, its word, sum
                       of exponentials; then the gradient over the logits, in place
    then      cuBLAS   dx = G @ W,  dW = G^T @ x
              Triton   db = sum over k of G_k, down the columns in a fixed order

The last two come in the backward, or, where the logits of all rows would take more than `max_logit_bytes`, in
the forward for one chunk of rows at a time: kernels/chunked_linear.py has the rows' upstream gradients and
the arithmetic of both.

At K = 2,560 rows, V = 64,000, D = 768, bf16, one chunk: the logits are written, read, overwritten, and read
for dx, dW and db, 6 x 328 MB; W twice and dW, 295 MB. That is 2.3 GB, 0.47 ms of an H200's 4.8 TB/s; all but
the kernel's 0.14 ms and db's 0.07 ms lies under the products, 0.75 TFLOP, 1.1 ms at 700 TFLOP/s. Expected:
1.3 ms, 0.43 GB at the peak (G and dW). The naive path has the same products and beside them an fp32 copy,
log-softmax, the gradient of its pick, its own, the cast back: 5.9 GB (4.6 where the pick's is fused), 2.0 to
2.3 ms in all, 2.0 GB at the peak. At 512 rows the products take 0.22 ms, kernel and db 0.04 ms: 0.3 ms and
0.16 GB, against 0.4 ms and 0.4 GB. None of these times is measured.

The PyTorch definition takes its softmax from torch's and the rest in a few passes over rows that are in the
cache. Measured on one core of a shared EPYC in fp32, forward and backward, beside F.linear, F.cross_entropy
and argmax: 0.91 of the CPU time at 2,560 x 64,000 x 768 (8.8 s; the process grows by 0.3 instead of 1.7 GB),
0.93 at 512 rows (tensors of 331 instead of 524 MB), 0.99 and 1.05 at 300 and 64 rows x 4,000 x 128.

Shape suffixes: K row, D width, V word, N row before the gather.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backend import CompileCase, jit, tl, use_triton
from kernels.chunked_linear import backward, empty_left, forward, plan, rows_of_chunk


@dataclass(frozen=True)
class TextLoss:
    """Of each row, in fp32 (of fp64 inputs in fp64, which the kernels compute in fp32 nevertheless): the
    loss, which alone has a gradient; the plain cross-entropy in nats; whether the target is the most likely
    word (of equals the first counts)."""

    loss_K: Tensor
    nats_K: Tensor
    right_K: Tensor


@dataclass(frozen=True)
class Scale:
    smoothing: float
    z_loss: float
    vocab_size: int


# -------------------------------------------------------------------------------------- PyTorch definition

# Of a row: largest logit, its word's id, sum of exp(logit - largest), the target's logit (0 where another
# shard has it), sum of the logits.
LARGEST, WORD, SUM_EXP, TARGET, SUM = range(5)
CACHED = 1 << 20  # numbers: what the definition passes over more than once stays in the cache


def _blocks(x_KV: Tensor) -> Iterator[slice]:
    step = max(1, CACHED // max(1, x_KV.shape[1]))
    return (slice(k, k + step) for k in range(0, x_KV.shape[0], step))


def _softmax(logits_KV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of at least one word: probabilities, largest logit, its column, logsumexp."""
    x_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
    largest_K1, word_K1 = x_KV.max(-1, keepdim=True)
    p_KV = x_KV.softmax(-1)
    lse_K1 = largest_K1 - p_KV.gather(1, word_K1).log_()
    return p_KV, largest_K1[:, 0], word_K1[:, 0], lse_K1[:, 0]


def _losses(lse_K: Tensor, x_target_K: Tensor, total_K: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """(loss, cross-entropy)."""
    nats_K = lse_K - x_target_K
    loss_K = nats_K
    if scale.smoothing:
        loss_K = loss_K + scale.smoothing * (x_target_K - total_K / scale.vocab_size)
    if scale.z_loss:
        loss_K = loss_K + scale.z_loss * lse_K.square()
    return loss_K, nats_K


def _gradient(p_KV: Tensor, at_K1: Tensor, here_K1: Tensor | int, lse_K: Tensor, scale: Scale) -> Tensor:
    """In place, of the probabilities."""
    if scale.z_loss:
        p_KV.mul_(1 + 2 * scale.z_loss * lse_K[:, None])
    if scale.smoothing:
        p_KV.sub_(scale.smoothing / scale.vocab_size)
    on_target_K1 = p_KV.new_full(at_K1.shape, scale.smoothing - 1.0) * here_K1
    return p_KV.scatter_add_(1, at_K1, on_target_K1)


def _loss_definition(
    logits_KV: Tensor, target_K: Tensor, out: tuple[Tensor, ...], scale: Scale, gradient: bool
) -> None:
    loss_K, nats_K, right_K, lse_K = out
    for rows in _blocks(logits_KV):
        x_KV, at_K1 = logits_KV[rows], target_K[rows, None]
        p_KV, _, word_K, lse_K[rows] = _softmax(x_KV)
        x_target_K = x_KV.gather(1, at_K1)[:, 0].to(lse_K.dtype)
        total_K = x_KV.sum(-1, dtype=lse_K.dtype) if scale.smoothing else x_target_K
        loss_K[rows], nats_K[rows] = _losses(lse_K[rows], x_target_K, total_K, scale)
        right_K[rows] = word_K == target_K[rows]
        if gradient:
            x_KV.copy_(_gradient(p_KV, at_K1, 1, lse_K[rows], scale))


def statistics_definition(logits_KV: Tensor, target_K: Tensor, begin: int, num_words: int) -> Tensor:
    exact = torch.promote_types(logits_KV.dtype, torch.float32)
    stats_5K = logits_KV.new_zeros(5, logits_KV.shape[0], dtype=exact)
    stats_5K[LARGEST] = -torch.inf
    for rows in _blocks(logits_KV) if num_words else ():
        x_KV = logits_KV[rows, :num_words]
        at_K1, here_K1 = _columns(target_K[rows], begin, num_words)
        _, largest_K, word_K, lse_K = _softmax(x_KV)
        stats_5K[LARGEST, rows] = largest_K
        stats_5K[WORD, rows] = word_K.to(exact)
        # Of words that are all impossible: no number.
        stats_5K[SUM_EXP, rows] = (lse_K - largest_K).exp_().masked_fill_(largest_K == -torch.inf, 0)
        x_target_K1 = x_KV.gather(1, at_K1).to(exact)
        stats_5K[TARGET, rows] = x_target_K1.masked_fill_(~here_K1, 0)[:, 0]
        stats_5K[SUM, rows] = x_KV.sum(-1, dtype=exact)
    stats_5K[WORD] += begin
    return stats_5K


def _columns(target_K: Tensor, begin: int, num_words: int) -> tuple[Tensor, Tensor]:
    """(K, 1): the targets' columns, 0 where another shard has them; whether this one does."""
    local_K1 = target_K[:, None] - begin
    here_K1 = (local_K1 >= 0) & (local_K1 < num_words)
    return local_K1 * here_K1, here_K1


def merge_statistics(
    stats_R5K: Tensor, target_K: Tensor, scale: Scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, hit, logsumexp) of each row, from the statistics of all shards in their order."""
    largest_RK, word_RK, sum_exp_RK, x_target_RK, total_RK = stats_R5K.unbind(1)
    largest_K = largest_RK.amax(0)
    lse_K = largest_K + (sum_exp_RK * (largest_RK - largest_K).exp()).sum(0).log()
    lse_K = lse_K.where((target_K >= 0) & (target_K < scale.vocab_size), torch.nan)
    # Not the index of the maximum: of equals it is any on a GPU, and here the first counts.
    word_K = word_RK.where(largest_RK == largest_K, torch.inf).amin(0)
    loss_K, nats_K = _losses(lse_K, x_target_RK.sum(0), total_RK.sum(0), scale)
    return loss_K, nats_K, word_K == target_K, lse_K


def _to_gradient_definition(
    logits_KV: Tensor, target_K: Tensor, lse_K: Tensor, begin: int, num_words: int, scale: Scale
) -> None:
    logits_KV[:, num_words:] = 0
    for rows in _blocks(logits_KV) if num_words else ():
        x_KV = logits_KV[rows, :num_words]
        p_KV, largest_K, _, local_lse_K = _softmax(x_KV)
        p_KV.mul_((local_lse_K - lse_K[rows]).exp_()[:, None])
        impossible_K = (largest_K == -torch.inf) & lse_K[rows].isfinite()
        p_KV.masked_fill_(impossible_K[:, None], 0)
        x_KV.copy_(_gradient(p_KV, *_columns(target_K[rows], begin, num_words), lse_K[rows], scale))


# ------------------------------------------------------------------------------------------------- kernels


@jit
def row_statistics(row, num_words, BLOCK: tl.constexpr):
    """One pass over a row: (largest, its column, sum of exp(x - largest), sum of x)."""
    largest = -float("inf")
    word = 0
    sum_exp = 0.0
    total = 0.0
    for first in range(0, num_words, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < num_words, other=-float("inf")).to(tl.float32)
        top = tl.max(x, 0)
        at = tl.min(tl.where(x == top, column, num_words), 0)
        word = tl.where(top > largest, at, word)  # of equals the first
        new = tl.maximum(largest, top)
        shift = tl.where(new == -float("inf"), 0.0, new)  # words that are all impossible
        sum_exp = sum_exp * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        total += tl.sum(tl.where(column < num_words, x, 0.0), 0)
        largest = new
    return largest, word, sum_exp, total


@jit
def _row_to_gradient(row, local, lse, on_target, per_word, z_loss, num_words, width, BLOCK: tl.constexpr):
    """One pass over a row: logits -> gradient, zero in the columns that are no words."""
    on_probability = tl.where(z_loss != 0, 1.0 + 2.0 * z_loss * lse, 1.0)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < num_words, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - lse) * on_probability - per_word
        gradient = tl.where(column == local, gradient - on_target, gradient)
        gradient = tl.where(column < num_words, gradient, 0.0)
        tl.store(row + column, gradient.to(row.dtype.element_ty), mask=column < width)


@jit
def _loss_kernel(
    logits, target, loss, nats, right, lse_out, stride, num_words, smoothing, z_loss,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    row = logits + k * stride
    local = tl.load(target + k)
    # Before the row is overwritten; the reductions of the first pass are a barrier between the two.
    is_word = (local >= 0) & (local < num_words)
    x_target = tl.load(row + local, mask=is_word, other=0.0).to(tl.float32)
    largest, word, sum_exp, total = row_statistics(row, num_words, BLOCK)
    lse = tl.where(is_word, largest + tl.log(sum_exp), float("nan"))
    tl.store(nats + k, lse - x_target)
    # Chosen and not multiplied by 0: a logit of -inf makes the sum infinite.
    smooth = tl.where(smoothing != 0, smoothing * (x_target - total / num_words), 0.0)
    square = tl.where(z_loss != 0, z_loss * lse * lse, 0.0)
    tl.store(loss + k, lse - x_target + smooth + square)
    tl.store(right + k, word == local)
    tl.store(lse_out + k, lse)
    if GRADIENT:
        per_word = smoothing / num_words
        _row_to_gradient(row, local, lse, 1.0 - smoothing, per_word, z_loss, num_words, num_words, BLOCK)


@jit
def _to_gradient_kernel(
    logits, target, lse, stride, begin, num_words, width, on_target, per_word, z_loss, BLOCK: tl.constexpr
):
    k = tl.program_id(0).to(tl.int64)
    local = tl.load(target + k) - begin
    row = logits + k * stride
    _row_to_gradient(row, local, tl.load(lse + k), on_target, per_word, z_loss, num_words, width, BLOCK)


# ------------------------------------------------------------------------------------------------ launches

BLOCK_WORDS, NUM_WARPS = 4096, 8  # 16 numbers a thread: two 16-byte accesses of bf16


def to_loss(
    logits_KV: Tensor, target_K: Tensor, out: tuple[Tensor, ...], scale: Scale, gradient: bool
) -> None:
    """Into `out`: (loss, cross-entropy, hit, logsumexp). With `gradient` the logits become theirs."""
    num_rows, num_words = logits_KV.shape
    if not use_triton(logits_KV):
        _loss_definition(logits_KV, target_K, out, scale, gradient)
    elif num_rows:
        _loss_kernel[(num_rows,)](
            logits_KV, target_K, *out, logits_KV.stride(0), num_words, scale.smoothing, scale.z_loss,
            GRADIENT=gradient, BLOCK=BLOCK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip


def to_gradient(
    logits_KV: Tensor, target_K: Tensor, lse_K: Tensor, begin: int, num_words: int, scale: Scale
) -> None:
    """In place, of a shard with the words from `begin` on; columns past `num_words` become zero."""
    if not use_triton(logits_KV):
        return _to_gradient_definition(logits_KV, target_K, lse_K, begin, num_words, scale)
    num_rows, width = logits_KV.shape
    if num_rows:
        _to_gradient_kernel[(num_rows,)](
            logits_KV, target_K, lse_K, logits_KV.stride(0), begin, num_words, width,
            1 - scale.smoothing, scale.smoothing / scale.vocab_size, scale.z_loss,
            BLOCK=BLOCK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ autograd


def outputs(x_KD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row, to be written: loss, cross-entropy, hit, logsumexp."""
    exact = torch.promote_types(x_KD.dtype, torch.float32)
    loss_K, nats_K, lse_K = (x_KD.new_empty(x_KD.shape[0], dtype=exact) for _ in range(3))
    return loss_K, nats_K, x_KD.new_empty(x_KD.shape[0], dtype=torch.bool), lse_K


@torch.library.custom_op("eve_kernels::masked_text_loss", mutates_args=())
def _loss(
    x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_K: Tensor,
    smoothing: float, z_loss: float, chunk: int, leaves: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `outputs` names, and what is left to the backward (kernels/chunked_linear.py)."""
    out = outputs(x_KD)
    scale = Scale(smoothing, z_loss, weight_VD.shape[0])

    def visit(logits_KV: Tensor, rows: slice) -> None:
        part = tuple(tensor[rows] for tensor in out)
        to_loss(logits_KV, target_K[rows], part, scale, leaves != "nothing")

    return *out, *forward(x_KD, weight_VD, bias_V, chunk, leaves, visit)


@_loss.register_fake
def _(x_KD, weight_VD, bias_V, target_K, smoothing, z_loss, chunk, leaves):  # pyright: ignore
    return *outputs(x_KD), *empty_left(x_KD, weight_VD, leaves)


@torch.library.custom_op("eve_kernels::masked_text_loss_backward", mutates_args=())
def _loss_backward(
    grad_K: Tensor, x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_K: Tensor, lse_K: Tensor,
    left: Sequence[Tensor], smoothing: float, z_loss: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scale = Scale(smoothing, z_loss, weight_VD.shape[0])

    def visit(logits_KV: Tensor, rows: slice) -> None:
        to_gradient(logits_KV, target_K[rows], lse_K[rows], 0, weight_VD.shape[0], scale)

    return backward(grad_K, x_KD, weight_VD, bias_V, left, chunk, visit)


@_loss_backward.register_fake
def _(grad_K, x_KD, weight_VD, *_):  # pyright: ignore
    return torch.empty_like(x_KD), torch.empty_like(weight_VD), weight_VD.new_empty(weight_VD.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, smoothing, z_loss, chunk, _ = inputs
    _, *others = output
    ctx.options = smoothing, z_loss, chunk
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # else zeros of the size of the logits
    ctx.save_for_backward(*tensors, *others[2:])


def _backward(ctx: Any, grad_K: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_K is None:
        return (None,) * 8
    # Read once: activation checkpointing gives them no second time.
    x_KD, weight_VD, bias_V, target_K, lse_K, *left = ctx.saved_tensors
    tensors = x_KD, weight_VD, bias_V, target_K, lse_K
    grad_x_KD, grad_weight_VD, grad_bias_V = _loss_backward(grad_K, *tensors, left, *ctx.options)
    return grad_x_KD, grad_weight_VD, None if bias_V is None else grad_bias_V, *[None] * 5


_loss.register_autograd(_backward, setup_context=_save)


def masked_text_loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_K: Tensor,
    row_K: Tensor | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    max_logit_bytes: int | None = None,
) -> TextLoss:
    """Rows `row_K` (distinct; None: all) of x (N, D) against words `target_K` (K,) int64.

    Each target is one of 0..V-1; no number means "ignore". On any other the definition raises IndexError or
    RuntimeError; the kernel, which cannot, makes loss and gradients of the row NaN. A logit of -inf is a word
    of probability 0; with smoothing it makes the loss infinite.

    `max_logit_bytes` bounds the logits in memory at a time (None: MAX_LOGIT_BYTES of the device)."""
    x_KD = x_ND if row_K is None else x_ND.index_select(0, row_K)
    chunk = rows_of_chunk(weight_VD, max_logit_bytes)
    leaves = plan(x_KD.shape[0], chunk, x_KD, weight_VD, bias_V)
    tensors = x_KD, weight_VD, bias_V, target_K.contiguous()
    loss_K, nats_K, right_K, *_ = _loss(*tensors, smoothing, z_loss, chunk, leaves)
    return TextLoss(loss_K, nats_K, right_K)


COMPILE_CASES = [
    CompileCase(
        name="masked_text_loss",
        kernel=_loss_kernel,
        types={
            "logits": "*bf16", "target": "*i64", "loss": "*fp32", "nats": "*fp32", "right": "*i1",
            "lse_out": "*fp32", "stride": "i32", "num_words": "i32", "smoothing": "fp32", "z_loss": "fp32",
        },
        constants={"GRADIENT": True, "BLOCK": BLOCK_WORDS},
        num_warps=NUM_WARPS,
        aligned=("stride", "num_words"),
    ),
    CompileCase(
        name="masked_text_loss, logits -> gradient",
        kernel=_to_gradient_kernel,
        types={
            "logits": "*bf16", "target": "*i64", "lse": "*fp32", "stride": "i32", "begin": "i32",
            "num_words": "i32", "width": "i32", "on_target": "fp32", "per_word": "fp32", "z_loss": "fp32",
        },
        constants={"BLOCK": BLOCK_WORDS},
        num_warps=NUM_WARPS,
        aligned=("stride", "begin", "num_words", "width"),
    ),
]  # fmt: skip
