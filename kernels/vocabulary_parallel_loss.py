"""The masked text loss where each rank holds a share of the vocabulary.

A pass over the logits of the shard gives five numbers a row, which the caller's `gather` brings together over
the ranks: the only communication, 20 bytes a row and rank, once for every chunk of rows. Merged, in the same
order on every rank, they give loss and logsumexp, and a second pass turns the logits into their gradient in
place. Products, bytes and chunks are those of kernels/masked_text_loss.py on this shard, but that the second
pass reads the logits from memory again. The backward communicates nothing: it has the logsumexp.

Shape suffixes: K row, D width, V word of this shard, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.backend import CompileCase, jit, tl, use_triton
from kernels.chunked_linear import backward, forward, plan, rows_of_chunk
from kernels.masked_text_loss import (
    BLOCK_WORDS,
    NUM_WARPS,
    Scale,
    TextLoss,
    merge_statistics,
    outputs,
    row_statistics,
    statistics_definition,
    to_gradient,
)

# ------------------------------------------------------------------------------------------------- kernels


@jit
def _statistics_kernel(logits, target, stats, num_rows, stride, begin, num_words, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    row = logits + k * stride
    local = tl.load(target + k) - begin
    here = (local >= 0) & (local < num_words)
    x_target = tl.load(row + local, mask=here, other=0.0).to(tl.float32)
    largest, word, sum_exp, total = row_statistics(row, num_words, BLOCK)
    stats += k
    tl.store(stats, largest)
    stats += num_rows
    tl.store(stats, (word + begin).to(tl.float32))
    stats += num_rows
    tl.store(stats, sum_exp)
    stats += num_rows
    tl.store(stats, x_target)
    stats += num_rows
    tl.store(stats, total)


# ------------------------------------------------------------------------------------------------ launches


def logit_statistics(logits_KV: Tensor, target_K: Tensor, begin: int, num_words: int) -> Tensor:
    """(5, K) fp32, see LARGEST to SUM, of a shard with the words from `begin` on; columns past `num_words`
    are padding. Word ids are exact in fp32 below 2^24."""
    if not use_triton(logits_KV):
        return statistics_definition(logits_KV, target_K, begin, num_words)
    num_rows = logits_KV.shape[0]
    stats_5K = logits_KV.new_empty(5, num_rows, dtype=torch.float32)
    if num_rows:
        _statistics_kernel[(num_rows,)](
            logits_KV, target_K, stats_5K, num_rows, logits_KV.stride(0), begin, num_words,
            BLOCK=BLOCK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return stats_5K


# ------------------------------------------------------------------------------------------------ autograd


class _ShardLoss(torch.autograd.Function):
    """No operator: it calls back for the collective."""

    @staticmethod
    def forward(ctx, x_KD, weight_VD, bias_V, target_K, begin, scale, gather, chunk, leaves):  # pyright: ignore
        num_words = min(max(scale.vocab_size - begin, 0), weight_VD.shape[0])
        loss_K, nats_K, right_K, lse_K = out = outputs(x_KD)

        def visit(logits_KV: Tensor, rows: slice) -> None:
            stats_5K = logit_statistics(logits_KV, target_K[rows], begin, num_words)
            found = merge_statistics(gather(stats_5K), target_K[rows], scale)
            for tensor, value in zip(out, found, strict=True):
                tensor[rows] = value
            if leaves != "nothing":
                to_gradient(logits_KV, target_K[rows], lse_K[rows], begin, num_words, scale)

        left = forward(x_KD, weight_VD, bias_V, chunk, leaves, visit)
        ctx.options = begin, num_words, scale, chunk
        ctx.mark_non_differentiable(nats_K, right_K)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_KD, weight_VD, bias_V, target_K, lse_K, *left)
        return loss_K, nats_K, right_K

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor | None, *_: None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad_K is None:
            return (None,) * 9
        begin, num_words, scale, chunk = ctx.options
        x_KD, weight_VD, bias_V, target_K, lse_K, *left = ctx.saved_tensors

        def visit(logits_KV: Tensor, rows: slice) -> None:
            to_gradient(logits_KV, target_K[rows], lse_K[rows], begin, num_words, scale)

        grads = backward(grad_K, x_KD, weight_VD, bias_V, left, chunk, visit)
        return *grads[:2], None if bias_V is None else grads[2], *[None] * 6


def vocabulary_parallel_text_loss(
    x_KD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_K: Tensor,
    begin: int,
    vocab_size: int,
    gather: Callable[[Tensor], Tensor],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    max_logit_bytes: int | None = None,
) -> TextLoss:
    """masked_text_loss of a shard with the words from `begin` on; columns past `vocab_size` are padding.

    `gather` (5, K') -> (R, 5, K') gathers over ranks, the only communication; it is called as often on every
    rank, by the same `max_logit_bytes`. The gradient of x is this shard's part of the sum over ranks. Loss
    and gradients of a row whose target is none of 0..vocab_size-1 are NaN.
    """
    chunk = rows_of_chunk(weight_VD, max_logit_bytes)
    leaves = plan(x_KD.shape[0], chunk, x_KD, weight_VD, bias_V)
    options = begin, Scale(smoothing, z_loss, vocab_size), gather, chunk, leaves
    return TextLoss(*_ShardLoss.apply(x_KD, weight_VD, bias_V, target_K.contiguous(), *options))  # pyright: ignore


COMPILE_CASES = [
    CompileCase(
        name="vocabulary_parallel_loss, statistics",
        kernel=_statistics_kernel,
        types={
            "logits": "*bf16", "target": "*i64", "stats": "*fp32", "num_rows": "i32", "stride": "i32",
            "begin": "i32", "num_words": "i32",
        },
        constants={"BLOCK": BLOCK_WORDS},
        num_warps=NUM_WARPS,
        aligned=("stride", "begin", "num_words"),
    ),
]  # fmt: skip
