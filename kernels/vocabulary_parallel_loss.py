"""The masked text loss where each rank holds a share of the vocabulary.

A pass over the logits of the shard gives five numbers a row, which the caller's `gather` brings together over
the ranks: the only communication, 20 bytes a row and rank. Merged, in the same order on every rank, they give
loss and logsumexp, and a second pass turns the logits into their gradient in place. Products and bytes are
those of kernels/masked_text_loss.py, but that the second pass reads the logits from memory again. Rows are
not cut into chunks: a shard's logits are small.

Shape suffixes: K row, D width, V word of this shard, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import CompileCase, jit, tl, use_triton
from kernels.masked_text_loss import (
    BLOCK_WORDS,
    NUM_WARPS,
    Scale,
    TextLoss,
    products,
    row_statistics,
    to_gradient,
)

# Of a row: largest logit, its word's id, sum of exp(logit - largest), the target's logit (0 where another
# shard has it), sum of the logits.
LARGEST, WORD, SUM_EXP, TARGET, SUM = range(5)


@dataclass(frozen=True)
class Merged:
    """Of each row over the whole vocabulary: loss, cross-entropy, hit and the logsumexp of the logits."""

    loss_K: Tensor
    nats_K: Tensor
    right_K: Tensor
    lse_K: Tensor


# ---------------------------------------------------------------------------------------------- definition


def _statistics_definition(logits_KV: Tensor, target_K: Tensor, begin: int, num_words: int) -> Tensor:
    real_KV = logits_KV[:, :num_words].float()
    local_K = target_K - begin
    here_K = (local_K >= 0) & (local_K < num_words)
    stats_5K = real_KV.new_zeros(5, real_KV.shape[0])
    stats_5K[LARGEST] = -torch.inf
    if num_words:
        stats_5K[LARGEST], word_K = real_KV.max(-1)
        stats_5K[WORD] = word_K.float()
        stats_5K[SUM_EXP] = (real_KV - stats_5K[LARGEST, :, None]).exp().sum(-1)
        at_K1 = local_K.clamp(0, num_words - 1)[:, None]
        stats_5K[TARGET] = real_KV.gather(1, at_K1)[:, 0].masked_fill(~here_K, 0)
        stats_5K[SUM] = real_KV.sum(-1)
    stats_5K[WORD] += begin
    return stats_5K


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
        return _statistics_definition(logits_KV, target_K, begin, num_words)
    num_rows = logits_KV.shape[0]
    stats_5K = logits_KV.new_empty(5, num_rows, dtype=torch.float32)
    if num_rows:
        _statistics_kernel[(num_rows,)](
            logits_KV, target_K, stats_5K, num_rows, logits_KV.stride(0), begin, num_words,
            BLOCK=BLOCK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return stats_5K


def merge_statistics(
    stats_R5K: Tensor, target_K: Tensor, smoothing: float, z_loss: float, vocab_size: int
) -> Merged:
    """Of all shards; every rank gets the same bits."""
    largest_RK, word_RK, sum_exp_RK, x_target_RK, total_RK = stats_R5K.unbind(1)
    largest_K = largest_RK.amax(0)
    lse_K = largest_K + (sum_exp_RK * (largest_RK - largest_K).exp()).sum(0).log()
    # Not the index of the maximum: of equals it is any on a GPU, and here the first counts.
    word_K = word_RK.where(largest_RK == largest_K, torch.inf).amin(0)
    nats_K = lse_K - x_target_RK.sum(0)
    loss_K = nats_K + z_loss * lse_K.square()
    if smoothing:
        loss_K = loss_K + smoothing * (x_target_RK.sum(0) - total_RK.sum(0) / vocab_size)
    return Merged(loss_K, nats_K, word_K == target_K, lse_K)


# ------------------------------------------------------------------------------------------------ autograd


class _ShardLoss(torch.autograd.Function):
    """No operator: it calls back for the collective. All rows at once: a shard's logits are small."""

    @staticmethod
    def forward(ctx, x_KD, weight_VD, bias_V, target_K, begin, scale, gather):  # pyright: ignore
        logits_KV = F.linear(x_KD, weight_VD, bias_V)
        num_words = min(max(scale.vocab_size - begin, 0), weight_VD.shape[0])
        target_K = target_K.contiguous()
        stats_R5K = gather(logit_statistics(logits_KV, target_K, begin, num_words))
        merged = merge_statistics(stats_R5K, target_K, scale.smoothing, scale.z_loss, scale.vocab_size)
        if any(ctx.needs_input_grad):
            to_gradient(logits_KV, target_K, merged.lse_K, begin, num_words, scale)
            ctx.save_for_backward(x_KD, weight_VD, logits_KV)
        nats_K = merged.nats_K.clone() if merged.nats_K is merged.loss_K else merged.nats_K
        ctx.mark_non_differentiable(nats_K, merged.right_K)
        return merged.loss_K, nats_K, merged.right_K

    @staticmethod
    def backward(ctx, grad_K, *_):  # pyright: ignore
        x_KD, weight_VD, grad_KV = ctx.saved_tensors
        grads = products(grad_K.contiguous(), grad_KV, x_KD, weight_VD)
        return *grads[:2], grads[2] if ctx.needs_input_grad[2] else None, None, None, None, None


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
) -> TextLoss:
    """masked_text_loss of a shard with the words from `begin` on; columns past `vocab_size` are padding.

    `gather` (5, K) -> (R, 5, K) gathers over ranks, the only communication. The gradient of x is this
    shard's part of the sum over ranks.
    """
    scale = Scale(smoothing, z_loss, vocab_size)
    return TextLoss(*_ShardLoss.apply(x_KD, weight_VD, bias_V, target_K, begin, scale, gather))  # pyright: ignore


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
